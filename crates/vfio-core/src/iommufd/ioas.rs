//! An I/O address space: what is mapped where, and what may be
//! (`drivers/iommu/iommufd/io_pagetable.c`).

use crate::device::WeakDevice;
use crate::dma::{
    ALL_PATIENCE, Area, Held, PATIENCE, Prot, Quota, Space, address, check_reach, hold, length,
    page_size, tell, without,
};
use crate::{Errno, Result};
use dma_memory::{IovaMap, Range, Source};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Instant;

/// The kernel's `HPAGE_SIZE`: automatic IOVAs are aligned to at most this.
const HUGE_PAGE: u64 = 2 << 20;

/// Where a mapping is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Fixed(u64),
    Automatic,
}

/// What is to be mapped: memory, its length, and whether it was ever mapped for writing.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) source: Source,
    pub(super) len: u64,
    pub(super) writable: bool,
}

/// An IOAS. Its lock is only ever held for lookups and changes of the tables, never while client
/// memory is touched or a driver is called.
#[derive(Debug)]
pub(super) struct Ioas {
    id: u32,
    quota: Arc<Quota>,
    inner: RwLock<Inner>,
}

#[derive(Debug)]
struct Inner {
    areas: IovaMap<Arc<Area>>,
    /// By device object: what it cannot use for DMA.
    reserved: Vec<(u32, Range)>,
    /// In order and disjoint. Empty: everything.
    allowed: Vec<Range>,
    /// Where automatic IOVAs may lie; forgotten when `reserved` or `allowed` change.
    usable: Option<Vec<Range>>,
    alignment: u64,
    domains: u32,
    /// By access object: who is told of unmaps. Replaced as a whole, so that it can be walked
    /// with the lock released.
    accesses: Arc<Vec<(u32, WeakDevice)>>,
    huge_pages: bool,
}

impl Ioas {
    pub(super) fn new(id: u32, quota: Arc<Quota>) -> Ioas {
        Ioas {
            id,
            quota,
            inner: RwLock::new(Inner {
                areas: IovaMap::new(),
                reserved: Vec::new(),
                allowed: Vec::new(),
                usable: None,
                alignment: 1,
                domains: 0,
                accesses: Arc::default(),
                huge_pages: true,
            }),
        }
    }

    pub(super) fn id(&self) -> u32 {
        self.id
    }

    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps the parts one after the other. Returns the IOVA of the first. Nothing is mapped on
    /// error. In this order: `EINVAL` length, for a fixed place `EINVAL` misaligned, `EOVERFLOW`
    /// wrap, `EINVAL` reserved, `EEXIST` overlap; for an automatic one `EOVERFLOW` too long,
    /// `EINVAL` alignment impossible, `ENOSPC`; then `EPERM` writing what was mapped for reading,
    /// `EINVAL` memory misaligned, `ENOMEM` too many areas; `EFAULT` or `EINVAL` if a page table
    /// is attached and the memory is not there. `iopt_map_pages`.
    pub(super) fn map(&self, parts: Vec<Part>, place: Place, prot: Prot) -> Result<u64> {
        let length = parts
            .iter()
            .try_fold(0u64, |sum, part| sum.checked_add(part.len))
            .ok_or(Errno::OVERFLOW)?;
        let (iova, added) = self.insert(parts, length, place, prot)?;
        if let Some(added) = added {
            // Pinning, as far as it exists here: outside the lock, after the places are taken.
            if let Err(errno) = added.iter().try_for_each(|(range, area)| {
                check_reach(area.source(), area.is_writable(), *range)
            }) {
                self.take_back(&added);
                return Err(errno);
            }
        }
        Ok(iova)
    }

    /// The areas are returned if they have to be checked.
    #[expect(clippy::type_complexity, reason = "one use, destructured at once")]
    fn insert(
        &self,
        parts: Vec<Part>,
        length: u64,
        place: Place,
        prot: Prot,
    ) -> Result<(u64, Option<Vec<(Range, Arc<Area>)>>)> {
        let mut inner = self.write();
        let mask = inner.alignment - 1;
        if length == 0 || length & mask != 0 {
            return Err(Errno::INVAL);
        }
        let first = parts.first().map_or(0, |part| address(&part.source));
        let iova = match place {
            Place::Fixed(iova) => inner.check_place(iova, length)?,
            Place::Automatic => inner.choose_place(first, length)?,
        };
        for part in &parts {
            if prot.write && !part.writable {
                return Err(Errno::PERM);
            }
            if (address(&part.source) % page_size()) & mask != 0 {
                return Err(Errno::INVAL);
            }
        }
        let tickets = Quota::take(&self.quota, parts.len())?;
        let mut added = (inner.domains > 0).then(Vec::new);
        let mut at = iova;
        for (part, ticket) in parts.into_iter().zip(tickets) {
            let range = Range::with_len(at, part.len)?;
            let area = Arc::new(Area::new(part.source, prot, part.writable, ticket));
            if let Some(added) = &mut added {
                added.push((range, Arc::clone(&area)));
            }
            inner.areas.insert(range, area)?;
            // Past the last part this may wrap, and is not used.
            at = range.last().wrapping_add(1);
        }
        Ok((iova, added))
    }

    fn take_back(&self, added: &[(Range, Arc<Area>)]) {
        for (range, area) in added {
            let mut inner = self.write();
            // Whoever closes the gate removes the area; an unmap may have been faster.
            let gone = area
                .gate()
                .close()
                .then(|| inner.areas.remove(range.start()));
            drop(inner);
            drop(gone);
        }
    }

    /// The memory mapped at these addresses, for a copy. `EINVAL` no length, `EOVERFLOW` wrap,
    /// `ENOENT` if not all of it is mapped. `iopt_get_pages`.
    pub(super) fn parts(&self, iova: u64, length: u64) -> Result<Vec<Part>> {
        let wanted = Range::with_len(iova, length)?;
        let inner = self.read();
        let mut parts = Vec::new();
        let mut next = Some(wanted.start());
        for (range, area) in inner.areas.range(wanted) {
            let start = range.start().max(wanted.start());
            let last = range.last().min(wanted.last());
            if next != Some(start) || area.gate().is_closed() {
                return Err(Errno::NOENT);
            }
            parts.push(Part {
                source: area.source().advanced(start - range.start())?,
                len: last - start + 1,
                writable: area.is_writable(),
            });
            next = last.checked_add(1);
        }
        let done = parts.last().is_some() && next == wanted.last().checked_add(1);
        if done { Ok(parts) } else { Err(Errno::NOENT) }
    }

    /// Takes out every area in the range. When it returns `Ok`, no access is in progress in any of
    /// them and the drivers attached have been told. `unmapped` counts bytes, also on error: the
    /// areas before the one that failed are gone. `EBUSY`: another unmap has the area, or an
    /// access to it does not end (its memory does not answer). `ENOENT`: an area is only partly
    /// inside. `iopt_unmap_iova_range`.
    pub(super) fn unmap(&self, wanted: Range, unmapped: &mut u64) -> Result {
        let end = Instant::now() + ALL_PATIENCE;
        loop {
            let mut inner = self.write();
            let Some((&range, area)) = inner.areas.range(wanted).next() else {
                return Ok(());
            };
            if area.gate().is_closed() {
                return Err(Errno::BUSY);
            }
            if !wanted.covers(range) {
                return Err(Errno::NOENT);
            }
            let area = Arc::clone(area);
            area.gate().close();
            if !(inner.accesses.is_empty() && area.gate().is_idle()) {
                let accesses = Arc::clone(&inner.accesses);
                drop(inner);
                tell(&accesses, range.start(), length(range));
                if !area.gate().wait_until(end.min(Instant::now() + PATIENCE)) {
                    area.gate().reopen();
                    return Err(Errno::BUSY);
                }
                inner = self.write();
            }
            // Nobody else removes an area whose gate this call closed.
            let gone = inner.areas.remove(range.start());
            drop(inner);
            drop((gone, area));
            *unmapped = unmapped.wrapping_add(length(range));
        }
    }

    /// Splits the area in which `last` is not the last address, so that it is. `EBUSY` as an unmap;
    /// `EINVAL` if the parts would not be aligned; `ENOMEM`. `iopt_cut_iova`.
    pub(super) fn cut(&self, last: u64) -> Result {
        let mut inner = self.write();
        let Some((&range, area)) = inner.areas.find(last) else {
            return Ok(());
        };
        if range.last() == last {
            return Ok(());
        }
        let lower = Range::new(range.start(), last)?;
        let upper = Range::new(last + 1, range.last())?;
        let in_page = address(area.source()) % page_size();
        let mask = inner.alignment - 1;
        if (upper.start() | in_page.wrapping_add(length(lower))) & mask != 0 {
            return Err(Errno::INVAL);
        }
        let area = Arc::clone(area);
        if !area.gate().close() {
            return Err(Errno::BUSY);
        }
        if !area.gate().is_idle() {
            drop(inner);
            if !area.gate().wait_until(Instant::now() + PATIENCE) {
                area.gate().reopen();
                return Err(Errno::BUSY);
            }
            inner = self.write();
        }
        let parts = area.split(length(lower), &self.quota);
        let (low, high) = parts.inspect_err(|_| area.gate().reopen())?;
        // Nobody else changes an area whose gate this call closed, and its place is free.
        inner.areas.remove(range.start());
        inner.areas.insert(lower, Arc::new(low))?;
        inner.areas.insert(upper, Arc::new(high))?;
        drop(inner);
        drop(area);
        Ok(())
    }

    /// True if a page table is filled from it.
    pub(super) fn has_domain(&self) -> bool {
        self.read().domains > 0
    }

    /// What can be mapped (everything but reserved ranges), and the alignment.
    pub(super) fn ranges(&self) -> (Vec<Range>, u64) {
        let inner = self.read();
        (without(&[Range::ALL], inner.reserved()), inner.alignment)
    }

    /// Replaces the ranges that automatic IOVAs are chosen from; none means all. `EADDRINUSE` if
    /// one of them touches a reserved range; then nothing changes. The ranges are in order and
    /// disjoint. `iopt_set_allow_iova`.
    pub(super) fn allow(&self, allowed: Vec<Range>) -> Result {
        let mut inner = self.write();
        let clash = |range: &Range| inner.reserved.iter().any(|(_, r)| r.overlaps(*range));
        if allowed.iter().any(clash) {
            return Err(Errno::ADDRINUSE);
        }
        inner.allowed = allowed;
        inner.usable = None;
        Ok(())
    }

    /// Takes addresses away for a device. `EADDRINUSE` if one is mapped or explicitly allowed;
    /// then nothing changes. `iopt_table_enforce_dev_resv_regions`.
    pub(super) fn reserve(&self, owner: u32, ranges: &[Range]) -> Result {
        let mut inner = self.write();
        for range in ranges {
            if inner.areas.overlaps(*range) || inner.allowed.iter().any(|a| a.overlaps(*range)) {
                return Err(Errno::ADDRINUSE);
            }
        }
        inner
            .reserved
            .extend(ranges.iter().map(|range| (owner, *range)));
        inner.usable = None;
        Ok(())
    }

    pub(super) fn unreserve(&self, owner: u32) {
        let mut inner = self.write();
        inner.reserved.retain(|(of, _)| *of != owner);
        inner.usable = None;
    }

    /// One more page table. `EADDRINUSE` when an area is not aligned to pages.
    /// `iopt_table_add_domain`.
    pub(super) fn add_domain(&self) -> Result {
        let mut inner = self.write();
        inner.realign(1)?;
        inner.domains += 1;
        Ok(())
    }

    pub(super) fn remove_domain(&self) {
        let mut inner = self.write();
        inner.domains -= 1;
        let _ = inner.realign(0);
    }

    /// One more software access. `EADDRINUSE` when an area is not aligned to pages.
    /// `iopt_add_access`.
    pub(super) fn add_access(&self, id: u32, device: WeakDevice) -> Result {
        let mut inner = self.write();
        inner.realign(1)?;
        let mut accesses = Vec::clone(&inner.accesses);
        accesses.push((id, device));
        inner.accesses = Arc::new(accesses);
        Ok(())
    }

    pub(super) fn remove_access(&self, id: u32) {
        let mut inner = self.write();
        let mut accesses = Vec::clone(&inner.accesses);
        accesses.retain(|(of, _)| *of != id);
        inner.accesses = Arc::new(accesses);
        let _ = inner.realign(0);
    }

    /// `IOMMU_OPTION_HUGE_PAGES`.
    pub(super) fn huge_pages(&self) -> bool {
        self.read().huge_pages
    }

    /// Off also means that everything must be aligned to pages: `EADDRINUSE` when an area is not,
    /// `EINVAL` when a page table is filled already. `iopt_disable_large_pages`.
    pub(super) fn set_huge_pages(&self, on: bool) -> Result {
        let mut inner = self.write();
        if inner.huge_pages == on {
            return Ok(());
        }
        if !on && inner.domains > 0 && !inner.areas.is_empty() {
            return Err(Errno::INVAL);
        }
        inner.huge_pages = on;
        inner.realign(0).inspect_err(|_| inner.huge_pages = !on)
    }

    /// What filling a page table with all areas would say, unless one is filled already.
    pub(super) fn check_reach(&self) -> Result {
        let areas: Vec<_> = {
            let inner = self.read();
            if inner.domains > 0 {
                return Ok(());
            }
            inner
                .areas
                .iter()
                .map(|(r, a)| (*r, Arc::clone(a)))
                .collect()
        };
        areas
            .iter()
            .try_for_each(|(range, area)| check_reach(area.source(), area.is_writable(), *range))
    }

    /// False if a mapping is not of a file, which cannot change its process.
    pub(super) fn is_all_files(&self) -> bool {
        let inner = self.read();
        inner
            .areas
            .iter()
            .all(|(_, area)| matches!(area.source(), Source::File { .. }))
    }
}

impl Space for Ioas {
    /// `iommufd_access_rw`.
    fn hold(&self, iova: u64, len: u64, need: Prot) -> Result<Held> {
        hold(&self.read().areas, iova, len, need, Errno::NOENT)
    }
}

impl Inner {
    fn reserved(&self) -> Vec<Range> {
        self.reserved.iter().map(|(_, range)| *range).collect()
    }

    /// `iopt_check_iova`.
    fn check_place(&self, iova: u64, length: u64) -> Result<u64> {
        if iova & (self.alignment - 1) != 0 {
            return Err(Errno::INVAL);
        }
        let range = Range::with_len(iova, length)?;
        if self.reserved.iter().any(|(_, r)| r.overlaps(range)) {
            return Err(Errno::INVAL);
        }
        if self.areas.overlaps(range) {
            return Err(Errno::EXIST);
        }
        Ok(iova)
    }

    /// `iopt_alloc_iova`. The IOVA keeps the position in the page that the memory has.
    fn choose_place(&mut self, address: u64, length: u64) -> Result<u64> {
        if length >= u64::MAX / 2 {
            return Err(Errno::OVERFLOW);
        }
        let natural = match address {
            0 => u64::MAX,
            _ => 1 << address.trailing_zeros(),
        };
        let align = length.next_power_of_two().min(natural).min(HUGE_PAGE);
        if align < self.alignment {
            return Err(Errno::INVAL);
        }
        let usable = match self.usable.take() {
            Some(usable) => usable,
            None => self.usable_ranges(),
        };
        let offset = address % page_size();
        let found = usable.iter().find_map(|range| {
            if offset == 0 {
                return self.areas.find_hole(length, align, 0, *range).ok();
            }
            // Only before anything is attached; the walk is over this client's own areas.
            self.areas.holes(*range).find_map(|hole| {
                let start = hole.start().checked_next_multiple_of(align)? | offset;
                let last = start.checked_add(length - 1)?;
                (last <= hole.last()).then_some(start)
            })
        });
        self.usable = Some(usable);
        found.ok_or(Errno::NOSPC)
    }

    /// The first and the last page are never chosen.
    fn usable_ranges(&self) -> Vec<Range> {
        let (low, high) = (page_size(), u64::MAX - page_size());
        let clip = |range: &Range| Range::new(range.start().max(low), range.last().min(high)).ok();
        let mut merged: Vec<Range> = Vec::new();
        let allowed = self.allowed.iter().filter_map(clip);
        let everything = self.allowed.is_empty().then_some(Range::ALL);
        for range in allowed.chain(everything.iter().filter_map(clip)) {
            match merged.last_mut() {
                Some(before) if before.last() + 1 == range.start() => {
                    *before = Range::new(before.start(), range.last()).unwrap_or(range);
                }
                _ => merged.push(range),
            }
        }
        without(&merged, self.reserved())
    }

    /// Works the alignment out anew, with so many more users to come. Only more alignment can
    /// fail. `iopt_calculate_iova_alignment`.
    fn realign(&mut self, more: usize) -> Result {
        let page = page_size();
        let none = self.domains == 0 && self.accesses.is_empty() && more == 0;
        let alignment = if none && self.huge_pages { 1 } else { page };
        if alignment > self.alignment {
            let mask = alignment - 1;
            let crooked = |(range, area): (&Range, &Arc<Area>)| {
                let in_page = address(area.source()) % page;
                (range.start() | length(*range) | in_page) & mask != 0
            };
            if self.areas.iter().any(crooked) {
                return Err(Errno::ADDRINUSE);
            }
        }
        self.alignment = alignment;
        Ok(())
    }
}
