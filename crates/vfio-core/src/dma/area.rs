//! One mapping of an address space, and holding it for an access.

use super::gate::Gate;
use crate::{Errno, Result};
use dma_memory::{IovaMap, Range, Source};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What a device may do with an area, or wants to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Prot {
    pub(crate) read: bool,
    pub(crate) write: bool,
}

impl Prot {
    pub(crate) const READ: Prot = Prot {
        read: true,
        write: false,
    };
    pub(crate) const WRITE: Prot = Prot {
        read: false,
        write: true,
    };
    pub(crate) const BOTH: Prot = Prot {
        read: true,
        write: true,
    };

    fn allows(self, need: Prot) -> bool {
        (self.read || !need.read) && (self.write || !need.write)
    }
}

/// The areas that one context or container may still have.
#[derive(Debug)]
pub(crate) struct Quota(AtomicUsize);

/// One area's place in the quota.
#[derive(Debug)]
pub(crate) struct Ticket(Arc<Quota>);

impl Ticket {
    /// `None` if there is no room.
    pub(crate) fn take(quota: &Arc<Quota>) -> Option<Ticket> {
        quota.sub(1).then(|| Ticket(Arc::clone(quota)))
    }
}

impl Quota {
    pub(crate) fn new(areas: usize) -> Arc<Quota> {
        Arc::new(Quota(AtomicUsize::new(areas)))
    }

    /// Room for so many more. `ENOMEM` if there is not.
    pub(crate) fn take(quota: &Arc<Quota>, number: usize) -> Result<Vec<Ticket>> {
        if !quota.sub(number) {
            return Err(Errno::NOMEM);
        }
        Ok((0..number).map(|_| Ticket(Arc::clone(quota))).collect())
    }

    /// Room left.
    pub(crate) fn left(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    fn sub(&self, number: usize) -> bool {
        let sub = |left: usize| left.checked_sub(number);
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, sub)
            .is_ok()
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A mapping. Where it is, the map of its address space knows.
#[derive(Debug)]
pub(crate) struct Area {
    source: Source,
    prot: Prot,
    /// The memory was first mapped for writing, so a copy of it may be writable (the kernel's
    /// `iopt_pages.writable`).
    writable: bool,
    gate: Gate,
    /// Taken along by an area that takes this one's place.
    ticket: Mutex<Option<Ticket>>,
}

impl Area {
    pub(crate) fn new(source: Source, prot: Prot, writable: bool, ticket: Ticket) -> Area {
        Area {
            source,
            prot,
            writable,
            gate: Gate::default(),
            ticket: Mutex::new(Some(ticket)),
        }
    }

    /// An area for the same place with other memory, to be put there instead of this one.
    pub(crate) fn moved(&self, source: Source) -> Area {
        let ticket = self
            .ticket
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        Area {
            source,
            prot: self.prot,
            writable: self.writable,
            gate: Gate::default(),
            ticket: Mutex::new(ticket),
        }
    }

    /// Two areas that together are this one, the first with `len` bytes. `ENOMEM` if there may be
    /// no more.
    pub(crate) fn split(&self, len: u64, quota: &Arc<Quota>) -> Result<(Area, Area)> {
        let upper = self.source.advanced(len)?;
        let second = Ticket::take(quota).ok_or(Errno::NOMEM)?;
        let lower = self.moved(self.source.advanced(0)?);
        Ok((lower, Area::new(upper, self.prot, self.writable, second)))
    }

    pub(crate) fn source(&self) -> &Source {
        &self.source
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.writable
    }

    pub(crate) fn gate(&self) -> &Gate {
        &self.gate
    }
}

/// An area with an access in it, from some offset on.
#[derive(Debug)]
struct Piece {
    area: Arc<Area>,
    offset: u64,
}

impl Piece {
    /// `EPERM` if the area lacks a permission, `EBUSY` if it is being unmapped.
    fn enter(area: &Arc<Area>, offset: u64, need: Prot) -> Result<Piece> {
        if !area.prot.allows(need) {
            return Err(Errno::PERM);
        }
        if !area.gate.enter() {
            return Err(Errno::BUSY);
        }
        Ok(Piece {
            area: Arc::clone(area),
            offset,
        })
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.area.gate.leave();
    }
}

/// Consecutive addresses, held: none of their areas can be unmapped until this is dropped. One
/// area is the usual case and allocates nothing.
#[derive(Debug)]
pub(crate) struct Held {
    first: Piece,
    first_len: u64,
    rest: Vec<(Piece, u64)>,
}

impl Held {
    fn new(first: Piece) -> Held {
        Held {
            first,
            first_len: 0,
            rest: Vec::new(),
        }
    }

    /// Fills `buf`, which is as long as what is held.
    pub(crate) fn read(&self, buf: &mut [u8]) -> Result {
        let mut rest = buf;
        for (piece, len) in self.pieces() {
            let (part, after) = std::mem::take(&mut rest)
                .split_at_mut_checked(len)
                .ok_or(Errno::FAULT)?;
            rest = after;
            piece.area.source.read(piece.offset, part)?;
        }
        Ok(())
    }

    /// Writes `data`, which is as long as what is held.
    pub(crate) fn write(&self, data: &[u8]) -> Result {
        let mut rest = data;
        for (piece, len) in self.pieces() {
            let (part, after) = rest.split_at_checked(len).ok_or(Errno::FAULT)?;
            rest = after;
            piece.area.source.write(piece.offset, part)?;
        }
        Ok(())
    }

    fn pieces(&self) -> impl Iterator<Item = (&Piece, usize)> {
        std::iter::once((&self.first, self.first_len))
            .chain(self.rest.iter().map(|(piece, len)| (piece, *len)))
            .map(|(piece, len)| (piece, usize::try_from(len).unwrap_or(usize::MAX)))
    }
}

/// Holds the memory at these addresses for an access. `EINVAL` no length, `EOVERFLOW` wrap, `hole`
/// if not all of it is mapped, `EPERM` an area without all of `need`, `EBUSY` an area on its way
/// out. Called with the map's lock held, which the accesses are then made without.
pub(crate) fn hold(
    areas: &IovaMap<Arc<Area>>,
    iova: u64,
    len: u64,
    need: Prot,
    hole: Errno,
) -> Result<Held> {
    let wanted = Range::with_len(iova, len)?;
    let (range, area) = areas.find(iova).ok_or(hole)?;
    let mut held = Held::new(Piece::enter(area, iova - range.start(), need)?);
    let mut last = range.last();
    held.first_len = last.min(wanted.last()) - iova + 1;
    while last < wanted.last() {
        let start = last + 1;
        let (range, area) = areas.find(start).ok_or(hole)?;
        last = range.last();
        let len = last.min(wanted.last()) - start + 1;
        held.rest.push((Piece::enter(area, 0, need)?, len));
    }
    Ok(held)
}
