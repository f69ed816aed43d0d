//! Taking mappings out, and telling which of their pages devices have written to.

use super::dirty::Bits;
use super::type1::{Inner, Type1, Version};
use crate::caller::Caller;
use crate::device::GroupType;
use crate::dma::{ALL_PATIENCE, Area, PATIENCE, length, page_size, tell};
use crate::{Errno, Result};
use dma_memory::Range;
use std::sync::Arc;
use std::time::Instant;
use zerocopy::IntoBytes;

/// Pages of a bitmap that are copied at a time: 64 KiB of it.
const PIECE: u64 = 1 << 19;

/// What is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    All,
    Range(Range),
}

impl What {
    fn range(self) -> Range {
        match self {
            What::All => Range::ALL,
            What::Range(range) => range,
        }
    }
}

impl Inner {
    /// A mapping that the range cuts: `EINVAL`.
    fn check_cut(&self, range: Range) -> Result {
        let first = self.areas.find(range.start());
        let last = self.areas.find(range.last());
        let cut = first.is_some_and(|(r, _)| r.start() < range.start())
            || last.is_some_and(|(r, _)| r.last() > range.last());
        if cut { Err(Errno::INVAL) } else { Ok(()) }
    }
}

impl Type1 {
    /// The mappings that an unmap is about. v2: `EINVAL` if the range cuts one. v1: none if the
    /// first begins before the range; the last may reach beyond it.
    fn chosen<'a>(
        &self,
        inner: &'a Inner,
        what: What,
    ) -> Result<impl Iterator<Item = (Range, &'a Arc<Area>)>> {
        let wanted = what.range();
        if self.version() == Version::V2 && what != What::All {
            inner.check_cut(wanted)?;
        }
        let areas = inner.areas.range(wanted);
        // Only the first can begin before the range, and only with v1.
        Ok(areas
            .take_while(move |(range, _)| range.start() >= wanted.start())
            .map(|(range, area)| (*range, area)))
    }

    /// Takes mappings out and returns how many bytes that were. When it returns `Ok`, no access is
    /// in progress in any of them and the drivers have been told. `before` runs for each with no
    /// lock held, after that and before it goes. `EINVAL`: the range cuts a mapping. `EBUSY`: an
    /// access does not end (its memory does not answer). On error, also of `before`, the mappings
    /// before that one are gone. `vfio_dma_do_unmap`.
    pub(super) fn unmap(
        &self,
        what: What,
        mut before: Option<&mut dyn FnMut(Range) -> Result>,
    ) -> Result<u64> {
        let mut deadline = None;
        let (taken, devices) = loop {
            let seen = self.unmaps_ended();
            let mut inner = self.write();
            let chosen: Vec<(Range, Arc<Area>)> = self
                .chosen(&inner, what)?
                .map(|(range, area)| (range, Arc::clone(area)))
                .collect();
            if chosen.iter().any(|(_, area)| area.gate().is_closed()) {
                // Another unmap has begun with one of them: the kernel does one after the other.
                drop(inner);
                let deadline = *deadline.get_or_insert_with(|| Instant::now() + ALL_PATIENCE);
                if !self.wait_for_unmap(seen, deadline) {
                    return Err(Errno::BUSY);
                }
                continue;
            }
            for (_, area) in &chosen {
                area.gate().close();
            }
            let quiet = inner.devices.is_empty()
                && before.is_none()
                && chosen.iter().all(|(_, area)| area.gate().is_idle());
            if !quiet {
                break (chosen, Arc::clone(&inner.devices));
            }
            let mut gone = 0;
            for (range, _) in &chosen {
                drop(Type1::forget(&mut inner, *range));
                gone += u128::from(length(*range));
            }
            drop(inner);
            self.clean(&chosen);
            // The size is 64 bits wide; only all 2^64 do not fit.
            return Ok(gone as u64);
        };
        let end = deadline.unwrap_or_else(|| Instant::now() + ALL_PATIENCE);
        let mut gone: u64 = 0;
        let mut outcome = Ok(());
        let mut left = taken.iter();
        for (range, area) in left.by_ref() {
            tell(&devices, range.start(), length(*range));
            outcome = match area.gate().wait_until(end.min(Instant::now() + PATIENCE)) {
                true => before.as_mut().map_or(Ok(()), |before| before(*range)),
                false => Err(Errno::BUSY),
            };
            if outcome.is_err() {
                area.gate().reopen();
                break;
            }
            // Nobody else removes an area whose gate this call closed.
            drop(Type1::forget(&mut self.write(), *range));
            self.clean(std::slice::from_ref(&(*range, Arc::clone(area))));
            gone = gone.wrapping_add(length(*range));
        }
        for (_, area) in left {
            area.gate().reopen();
        }
        self.unmap_ended();
        outcome.map(|()| gone)
    }

    /// What is gone has no dirty pages any more.
    fn clean(&self, gone: &[(Range, Arc<Area>)]) {
        if self.dirty.is_on() {
            for (range, _) in gone {
                let page = page_size();
                drop(self.dirty.take(range.start() / page, range.last() / page));
            }
        }
    }

    /// Takes the address in the client away from mappings; devices go on with the memory. Returns
    /// the bytes. `EBUSY` while there are software devices, `EINVAL` if the range cuts a mapping,
    /// or one has lost its address before; then nothing changes.
    pub(super) fn invalidate(&self, what: What) -> Result<u64> {
        let mut inner = self.write();
        if inner.has(GroupType::Emulated) {
            return Err(Errno::BUSY);
        }
        let chosen: Vec<Range> = self.chosen(&inner, what)?.map(|(range, _)| range).collect();
        let known = |range: &Range| inner.invalid.contains(&range.start());
        if chosen.iter().any(known) {
            return Err(Errno::INVAL);
        }
        let bytes = chosen.iter().map(|range| u128::from(length(*range)));
        let bytes: u128 = bytes.sum();
        let starts = chosen.iter().map(|range| range.start());
        inner.invalid.extend(starts);
        Ok(bytes as u64)
    }

    /// Writes to the client's bitmap which pages devices have written to, and forgets it. Only the
    /// bits of pages that are mapped are written; bit 0 is the page at `range.start()`. `EINVAL`:
    /// not tracking, or the range cuts a mapping. `EFAULT`: what could not be told is not
    /// forgotten. `vfio_iova_dirty_bitmap`.
    pub(super) fn dirty_bitmap(&self, range: Range, bitmap: u64, caller: &dyn Caller) -> Result {
        if !self.dirty.is_on() {
            return Err(Errno::INVAL);
        }
        self.read().check_cut(range)?;
        self.copy_dirty(range.start(), range, bitmap, caller)
    }

    /// The part of [`dirty_bitmap`](Type1::dirty_bitmap) that lies in `range`, for a bitmap whose
    /// bit 0 is the page at `base`.
    pub(super) fn copy_dirty(
        &self,
        base: u64,
        range: Range,
        bitmap: u64,
        caller: &dyn Caller,
    ) -> Result {
        let page = page_size();
        let base = base / page;
        let (mut first, end) = (range.start() / page, range.last() / page);
        loop {
            // Pieces end where words of the bitmap do.
            let last = end.min(base + ((first - base) / PIECE + 1) * PIECE - 1);
            self.copy_piece(base, first, last, bitmap, caller)?;
            if last == end {
                return Ok(());
            }
            first = last + 1;
        }
    }

    fn copy_piece(
        &self,
        base: u64,
        first: u64,
        last: u64,
        bitmap: u64,
        caller: &dyn Caller,
    ) -> Result {
        let page = page_size();
        let (mapped, all) = {
            let inner = self.read();
            let wanted = Range::new(first * page, last * page + (page - 1))?;
            let pages = |(range, _): (&Range, &Arc<Area>)| {
                let first = first.max(range.start() / page);
                (first, last.min(range.last() / page))
            };
            let mapped: Vec<(u64, u64)> = inner.areas.range(wanted).map(pages).collect();
            // Hardware has not proven to write nowhere else than where it was told.
            (mapped, inner.has(GroupType::Physical))
        };
        let (Some(&(low, _)), Some(&(_, high))) = (mapped.first(), mapped.last()) else {
            return Ok(());
        };
        let (low, high) = ((low - base) / 64, (high - base) / 64);
        let count = usize::try_from(high - low + 1).map_err(|_| Errno::INVAL)?;
        let at = bitmap.checked_add(low * 8).ok_or(Errno::FAULT)?;
        let mut words = vec![0_u64; count];
        caller.copy_in(at, words.as_mut_bytes())?;
        let mut bits = Bits {
            base: base + low * 64,
            words: &mut words,
        };
        let mut taken = Vec::new();
        for &(first, last) in &mapped {
            bits.fill(first, last, all);
            let marks = self.dirty.take(first, last);
            bits.set(&marks);
            taken.extend(marks);
        }
        let told = caller.copy_out(at, words.as_bytes());
        if told.is_err() {
            self.dirty.put_back(taken);
        }
        told
    }
}
