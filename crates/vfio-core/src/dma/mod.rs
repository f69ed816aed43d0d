//! What all address spaces that a device can be given have in common: areas of client memory,
//! holding them for an access, and a device's way to the space that it is attached to.
//!
//! No lock is held while client memory is read or written, since it may never answer. What keeps
//! an area from being unmapped meanwhile is a count with a gate; whoever unmaps waits for it,
//! not for ever.

mod area;
mod gate;
mod port;
mod reach;

pub(crate) use area::{Area, Held, Prot, Quota, Ticket, hold};
pub(crate) use port::{Port, Route, Space};
pub(crate) use reach::{address, check as check_reach};

use crate::Result;
use crate::caller::Caller;
use crate::device::WeakDevice;
use client_process::Memory;
use dma_memory::Range;
use std::cell::Cell;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use vfio_uapi::UserMemory;

/// How long an unmap waits for one access that is in progress in an area, and a detach for those
/// on its route. An access takes longer only if the client's memory does not answer.
pub(crate) const PATIENCE: Duration = Duration::from_millis(100);
/// How long one unmap waits for all accesses together.
pub(crate) const ALL_PATIENCE: Duration = Duration::from_secs(1);

pub(crate) fn page_size() -> u64 {
    rustix::param::page_size() as u64
}

/// One bit per size that a mapping may have: all from a page on without hardware, and with it what
/// the IOMMU of such a machine could map at once.
pub(crate) fn page_sizes(hardware: bool) -> u64 {
    const LARGE: u64 = (2 << 20) | (1 << 30);
    match hardware {
        true => page_size() | LARGE,
        false => !(page_size() - 1),
    }
}

/// No mapping covers all 2^64 addresses, so the length fits.
pub(crate) fn length(range: Range) -> u64 {
    range.len().unwrap_or(u64::MAX)
}

/// The address space that was mapped from last. Telling a caller's anew takes long, so it is kept
/// for the next mapping even if nothing is mapped any more.
#[derive(Debug, Default)]
pub(crate) struct LastMapper(Mutex<Option<Arc<Memory>>>);

/// Who asks for a mapping. Copying the argument in tells the address space as well, if it can.
pub(crate) struct Mapper<'a> {
    caller: &'a dyn Caller,
    known: Cell<Option<Arc<Memory>>>,
}

impl<'a> Mapper<'a> {
    pub(crate) fn new(caller: &'a dyn Caller) -> Mapper<'a> {
        Mapper {
            caller,
            known: Cell::new(None),
        }
    }

    fn memory(&self) -> Result<Arc<Memory>> {
        self.known.take().map_or_else(|| self.caller.memory(), Ok)
    }
}

impl UserMemory for Mapper<'_> {
    fn copy_in(&self, addr: u64, buf: &mut [u8]) -> Result {
        self.known.set(self.caller.copy_in_known(addr, buf)?);
        Ok(())
    }

    fn copy_out(&self, addr: u64, buf: &[u8]) -> Result {
        self.caller.copy_out(addr, buf)
    }
}

impl LastMapper {
    /// A lasting hold on the address space that the argument was copied from.
    pub(crate) fn memory(&self, mapper: &Mapper<'_>) -> Result<Arc<Memory>> {
        let memory = mapper.memory()?;
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = match &*last {
            Some(last) if Arc::ptr_eq(last, &memory) => None,
            _ => last.replace(Arc::clone(&memory)),
        };
        drop(last);
        // Its descriptors may be closed here, with no lock held.
        drop(before);
        Ok(memory)
    }
}

/// Tells the drivers that memory is going. No lock is held.
pub(crate) fn tell<T>(devices: &[(T, WeakDevice)], iova: u64, len: u64) {
    for (_, device) in devices {
        if let Some(device) = device.upgrade() {
            device.0.dma_unmap(iova, len);
        }
    }
}

/// The ranges without what is reserved, in order.
pub(crate) fn without(ranges: &[Range], mut reserved: Vec<Range>) -> Vec<Range> {
    reserved.sort_by_key(|range| range.start());
    let mut left = Vec::new();
    for range in ranges {
        let mut next = Some(range.start());
        for hole in reserved.iter().filter(|r| r.overlaps(*range)) {
            let Some(start) = next else { break };
            if let Some(last) = hole.start().checked_sub(1)
                && let Ok(free) = Range::new(start, last)
            {
                left.push(free);
            }
            next = hole
                .last()
                .checked_add(1)
                .map(|after| after.max(start))
                .filter(|after| *after <= range.last());
        }
        if let Some(start) = next
            && let Ok(free) = Range::new(start, range.last())
        {
            left.push(free);
        }
    }
    left
}
