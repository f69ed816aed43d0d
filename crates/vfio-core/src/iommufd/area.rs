//! One mapping of an IOAS, and holding it for an access.

use super::gate::Gate;
use crate::{Errno, Result};
use dma_memory::Source;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use vfio_uapi::iommufd::MapFlags;

/// How many areas one context may have: some 40 MiB of tables. The kernel charges a client's
/// memory cgroup instead, which a daemon that works for many clients cannot.
pub(super) const MAX_AREAS: usize = 1 << 18;

/// The areas that one context may still have.
#[derive(Debug)]
pub(super) struct Quota(AtomicUsize);

/// One area's place in the quota.
#[derive(Debug)]
pub(super) struct Ticket(Arc<Quota>);

impl Quota {
    pub(super) fn new(areas: usize) -> Arc<Quota> {
        Arc::new(Quota(AtomicUsize::new(areas)))
    }

    /// Room for so many more. `ENOMEM` if there is not.
    pub(super) fn take(quota: &Arc<Quota>, number: usize) -> Result<Vec<Ticket>> {
        quota
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(number)
            })
            .map_err(|_| Errno::NOMEM)?;
        Ok((0..number).map(|_| Ticket(Arc::clone(quota))).collect())
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A mapping. Where it is, the map of the IOAS knows.
#[derive(Debug)]
pub(super) struct Area {
    source: Source,
    prot: MapFlags,
    /// The memory was first mapped for writing, so a copy of it may be writable (the kernel's
    /// `iopt_pages.writable`).
    writable: bool,
    gate: Gate,
    _ticket: Ticket,
}

impl Area {
    pub(super) fn new(source: Source, prot: MapFlags, writable: bool, ticket: Ticket) -> Area {
        Area {
            source,
            prot,
            writable,
            gate: Gate::default(),
            _ticket: ticket,
        }
    }

    pub(super) fn source(&self) -> &Source {
        &self.source
    }

    pub(super) fn is_writable(&self) -> bool {
        self.writable
    }

    pub(super) fn gate(&self) -> &Gate {
        &self.gate
    }
}

/// An area with an access in it, from some offset on.
#[derive(Debug)]
pub(super) struct Piece {
    area: Arc<Area>,
    offset: u64,
}

impl Piece {
    /// `EPERM` if the area lacks a permission, `EBUSY` if it is being unmapped.
    pub(super) fn enter(area: &Arc<Area>, offset: u64, need: MapFlags) -> Result<Piece> {
        if !area.prot.contains(need) {
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
pub(super) struct Held {
    first: Piece,
    first_len: u64,
    rest: Vec<(Piece, u64)>,
}

impl Held {
    pub(super) fn new(first: Piece) -> Held {
        Held {
            first,
            first_len: 0,
            rest: Vec::new(),
        }
    }

    pub(super) fn extend_to(&mut self, len: u64) {
        self.first_len = len;
    }

    pub(super) fn push(&mut self, piece: Piece, len: u64) {
        self.rest.push((piece, len));
    }

    /// Fills `buf`, which is as long as what is held.
    pub(super) fn read(&self, buf: &mut [u8]) -> Result {
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
    pub(super) fn write(&self, data: &[u8]) -> Result {
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
