//! Whether memory that is to be mapped for a device is there.
//!
//! The kernel pins the pages when a page table is attached and so finds out. Here nothing is
//! pinned: the mappings of the client are looked at instead, so that a bad address fails in the
//! same call. What the client does later is found at the access.

use crate::{Errno, Result};
use dma_memory::{Range, Source};

/// The address that decides about alignment: in the client, or in the file.
pub(crate) fn address(source: &Source) -> u64 {
    match source {
        Source::File { offset, .. } => *offset,
        Source::Process(memory) => memory.addr(),
    }
}

/// `EFAULT` if part of the client's memory is not mapped or may not be used that way, `EINVAL` if
/// the file ends before. Waits for nothing of the client's, but takes its address space's lock.
pub(crate) fn check(source: &Source, writable: bool, range: Range) -> Result {
    let len = range.len().ok_or(Errno::FAULT)?;
    match source {
        Source::File { file, offset } => {
            let end = offset.checked_add(len).ok_or(Errno::INVAL)?;
            if end > file.size()?.saturating_add(super::page_size() - 1) {
                return Err(Errno::INVAL);
            }
        }
        Source::Process(memory) => {
            let mut at = memory.addr();
            let end = at.checked_add(len).ok_or(Errno::FAULT)?;
            while at < end {
                let mapping = memory.memory().query(at).map_err(|_| Errno::FAULT)?;
                if !memory.reaches(&mapping)
                    || !mapping.readable
                    || (writable && !mapping.writable)
                    || mapping.end <= at
                {
                    return Err(Errno::FAULT);
                }
                at = mapping.end;
            }
        }
    }
    Ok(())
}
