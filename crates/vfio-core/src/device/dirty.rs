//! The log of what a device has written into its user's memory, for every device that does DMA:
//! it sits in the handle that drivers write through ([`Dma`](super::Dma)), so no driver knows of it
//! (`include/linux/vfio.h`, `struct vfio_log_ops`; `vfio_main.c`,
//! `vfio_ioctl_device_feature_logging_start` and `_report`).

use super::DeviceFile;
use crate::{Errno, Result};
use rustix::thread::{MembarrierCommand, membarrier};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The smallest page that is logged and reported by.
pub(super) const PAGE_SHIFT: u32 = 12;

/// The largest page that is logged by because a client asked for it.
const LARGEST_SHIFT: u32 = 30;

/// Words of a chunk; 4096 pages.
const WORDS: usize = 64;
const CHUNK_SHIFT: u32 = 12;

/// Chunks a log keeps before it logs by larger pages: 16 MiB, or 512 GiB of memory that is dirty
/// everywhere.
const MOST_CHUNKS: usize = 1 << 15;

impl DeviceFile {
    /// Starts to log what the device writes within `ranges`, each `(iova, length)`; none means
    /// everything. Returns the page size that is logged by: the one asked for, rounded down to a
    /// power of two and kept between 4 KiB and 1 GiB.
    ///
    /// In this order for each range: `EINVAL` when its start or length is no multiple of
    /// `page_size` (0 has only the multiple 0), `EOVERFLOW` when its end is 2^64 or wraps, `EINVAL`
    /// when it overlaps an earlier one. Then `EINVAL` when a log is running. The log stops at the
    /// last close.
    pub fn dma_logging_start(&self, page_size: u64, ranges: &[(u64, u64)]) -> Result<u64> {
        self.grant()?.session.dirty().start(page_size, ranges)
    }

    /// Stops. Nothing happens when no log is running.
    pub fn dma_logging_stop(&self) -> Result {
        self.grant()?.session.dirty().stop();
        Ok(())
    }

    /// Sets a bit in `bitmap` for each page of `page_size` bytes in `iova..iova + len` that was
    /// written since the last report, and clears the log there. Bit n is `iova + n * page_size`;
    /// bits are only ever set. Any page size from 4096 that is a power of two will do. With a
    /// smaller one than is logged, all of a written page counts; a logged page that is reported only
    /// in part stays in the log.
    ///
    /// `EINVAL` for another page size, when no log is running, or when the bitmap is too short;
    /// `EOVERFLOW` when the range ends at 2^64 or wraps.
    pub fn dma_logging_report(
        &self,
        iova: u64,
        len: u64,
        page_size: u64,
        bitmap: &mut [u64],
    ) -> Result {
        let grant = self.grant()?;
        let Some(report) = Report::check(iova, len, page_size)? else {
            return grant.session.dirty().running();
        };
        if report.words() > bitmap.len() as u64 {
            return Err(Errno::INVAL);
        }
        grant
            .session
            .dirty()
            .take(&report, 0, report.words(), bitmap)
    }
}

/// A range to report on, and by which pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Report {
    first: u64,
    last: u64,
    shift: u32,
}

impl Report {
    /// `None` when the range is empty. `EINVAL` for the page size, `EOVERFLOW` for the range.
    pub(super) fn check(iova: u64, len: u64, page_size: u64) -> Result<Option<Report>> {
        if page_size < 1 << PAGE_SHIFT || !page_size.is_power_of_two() {
            return Err(Errno::INVAL);
        }
        let end = iova.checked_add(len).ok_or(Errno::OVERFLOW)?;
        Ok((len > 0).then(|| Report {
            first: iova,
            last: end - 1,
            shift: page_size.trailing_zeros(),
        }))
    }

    /// Words of the whole bitmap.
    pub(super) fn words(&self) -> u64 {
        (((self.last - self.first) >> self.shift) >> 6) + 1
    }

    /// The part that words `word..word + words` of the bitmap stand for.
    fn part(&self, word: u64, words: u64) -> (u64, u64) {
        let bytes = |words: u64| {
            u128::from(words) << (self.shift + 6) // At most 2^58 words of up to 2^69 bytes each.
        };
        let first = u128::from(self.first) + bytes(word);
        let last = (first + bytes(words) - 1).min(u128::from(self.last));
        let narrow = |at: u128| u64::try_from(at).unwrap_or(u64::MAX);
        (narrow(first), narrow(last))
    }
}

/// The log of one open device.
#[derive(Debug, Default)]
pub(crate) struct DirtyLog {
    /// Looked at after each write of the device; all that an idle log costs.
    on: AtomicBool,
    log: Mutex<Option<Log>>,
}

impl DirtyLog {
    fn lock(&self) -> MutexGuard<'_, Option<Log>> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`DeviceFile::dma_logging_start`].
    pub(super) fn start(&self, page_size: u64, ranges: &[(u64, u64)]) -> Result<u64> {
        let ranges = check_ranges(page_size, ranges)?;
        let shift = page_size
            .checked_ilog2()
            .unwrap_or(PAGE_SHIFT)
            .clamp(PAGE_SHIFT, LARGEST_SHIFT);
        let mut log = self.lock();
        if log.is_some() {
            return Err(Errno::INVAL);
        }
        *log = Some(Log::new(ranges, shift, MOST_CHUNKS));
        self.on.store(true, Ordering::SeqCst);
        drop(log);
        // A write in progress has put its bytes before it looks at `on`, but neither the compiler's
        // order nor the processor's makes them visible by then. This does, on every thread, so that
        // who copies memory from here on either sees the bytes or finds them in the log.
        if membarrier(MembarrierCommand::RegisterPrivateExpedited)
            .and_then(|()| membarrier(MembarrierCommand::PrivateExpedited))
            .is_err()
        {
            let _ = membarrier(MembarrierCommand::Global);
        }
        Ok(1 << shift)
    }

    /// As [`DeviceFile::dma_logging_stop`].
    pub(super) fn stop(&self) {
        let mut log = self.lock();
        self.on.store(false, Ordering::Relaxed);
        let log = log.take();
        drop(log);
    }

    /// `EINVAL` when it is not running.
    pub(super) fn running(&self) -> Result {
        self.lock().as_ref().map(|_| ()).ok_or(Errno::INVAL)
    }

    /// The device has written there, or tried to.
    pub(super) fn written(&self, iova: u64, len: usize) {
        // The bytes come first: a page is logged at the earliest when they are there.
        std::sync::atomic::compiler_fence(Ordering::SeqCst);
        if self.on.load(Ordering::Relaxed) {
            self.mark(iova, len as u64);
        }
    }

    #[cold]
    fn mark(&self, iova: u64, len: u64) {
        if let (Some(log), Some(len)) = (&mut *self.lock(), len.checked_sub(1)) {
            log.mark(iova, iova.saturating_add(len));
        }
    }

    /// The first word of a report's bitmap, from `word` on, that has a bit set now.
    pub(super) fn next(&self, report: &Report, word: u64) -> Result<Option<u64>> {
        let log = self.lock();
        let log = log.as_ref().ok_or(Errno::INVAL)?;
        if word >= report.words() {
            return Ok(None);
        }
        let (from, _) = report.part(word, 1);
        let at = log.next(from, report.last);
        Ok(at.map(|at| (at.max(from) - report.first) >> report.shift >> 6))
    }

    /// Sets bits for words `word..word + words` of a report in `bitmap`, whose first word is that
    /// one, and clears what has been reported whole. A page that reaches into a later word stays:
    /// whoever takes a report in parts takes them in order.
    pub(super) fn take(
        &self,
        report: &Report,
        word: u64,
        words: u64,
        bitmap: &mut [u64],
    ) -> Result {
        let mut log = self.lock();
        let log = log.as_mut().ok_or(Errno::INVAL)?;
        let (first, last) = report.part(word, words);
        log.take((first, last), report.first, |from, to| {
            let bit = |at: u64| (at - first) >> report.shift;
            set_bits(bitmap, bit(from), bit(to));
        });
        Ok(())
    }

    /// Puts back what [`take`](DirtyLog::take) gave and nobody received.
    pub(super) fn put_back(&self, report: &Report, word: u64, bitmap: &[u64]) {
        let mut log = self.lock();
        let Some(log) = log.as_mut() else {
            return;
        };
        for (n, bits) in bitmap.iter().enumerate() {
            let (first, last) = report.part(word + n as u64, 1);
            let mut rest = *bits;
            while rest != 0 {
                let bit = rest.trailing_zeros();
                rest &= rest - 1;
                let from = first.saturating_add(u64::from(bit) << report.shift);
                log.mark(from, from.saturating_add((1 << report.shift) - 1).min(last));
            }
        }
    }
}

/// The ranges by their first address, with their last.
type Ranges = BTreeMap<u64, u64>;

fn check_ranges(page_size: u64, ranges: &[(u64, u64)]) -> Result<Ranges> {
    if ranges.is_empty() {
        return Ok(BTreeMap::from([(0, u64::MAX)]));
    }
    let mask = page_size.wrapping_sub(1);
    let mut checked = Ranges::new();
    for &(iova, len) in ranges {
        if (iova | len) & mask != 0 {
            return Err(Errno::INVAL);
        }
        let end = iova.checked_add(len).ok_or(Errno::OVERFLOW)?;
        if len == 0 {
            continue;
        }
        let last = end - 1;
        let before = checked.range(..=last).next_back();
        if before.is_some_and(|(_, &before)| before >= iova) {
            return Err(Errno::INVAL);
        }
        checked.insert(iova, last);
    }
    Ok(checked)
}

/// Sets bits `from..=to`.
fn set_bits(bitmap: &mut [u64], from: u64, to: u64) {
    let (first, last) = (from >> 6, to >> 6);
    for word in first..=last {
        let low = if word == first { from & 63 } else { 0 };
        let high = if word == last { to & 63 } else { 63 };
        let bits = (u64::MAX >> (63 - high)) & (u64::MAX << low);
        if let Some(word) = usize::try_from(word)
            .ok()
            .and_then(|word| bitmap.get_mut(word))
        {
            *word |= bits;
        }
    }
}

/// Which pages are dirty: a bit each, in chunks that exist where one is.
#[derive(Debug)]
struct Log {
    ranges: Ranges,
    shift: u32,
    most: usize,
    chunks: BTreeMap<u64, Box<[u64; WORDS]>>,
}

impl Log {
    fn new(ranges: Ranges, shift: u32, most: usize) -> Log {
        Log {
            ranges,
            shift,
            most,
            chunks: BTreeMap::new(),
        }
    }

    /// Marks `first..=last`, as far as it is to be logged.
    fn mark(&mut self, first: u64, last: u64) {
        let chunks = |shift: u32| (last >> shift >> CHUNK_SHIFT) - (first >> shift >> CHUNK_SHIFT);
        if chunks(self.shift) > self.most as u64 {
            let shift = (self.shift..).find(|&shift| chunks(shift) <= self.most as u64 / 2);
            self.coarsen(shift.unwrap_or(self.shift) - self.shift);
        }
        let shift = self.shift;
        let start = self
            .ranges
            .range(..=first)
            .next_back()
            .map_or(first, |(&start, _)| start);
        for (&from, &to) in self.ranges.range(start..=last) {
            if to >= first {
                let (from, to) = (from.max(first), to.min(last));
                mark_pages(&mut self.chunks, from >> shift, to >> shift);
            }
        }
        if self.chunks.len() > self.most {
            let most = 64 - CHUNK_SHIFT - shift;
            let by = (1..=most).find(|&by| {
                let mut keys: Vec<u64> = self.chunks.keys().map(|key| key >> by).collect();
                keys.dedup();
                keys.len() <= self.most / 2
            });
            self.coarsen(by.unwrap_or(most));
        }
    }

    /// Logs by pages that are `2^by` times as large. What was dirty stays so, and its neighbours
    /// become so.
    fn coarsen(&mut self, by: u32) {
        let mut chunks = BTreeMap::new();
        for (key, chunk) in std::mem::take(&mut self.chunks) {
            for_runs(&chunk, |from, to| {
                let page = |bit: u64| ((key << CHUNK_SHIFT) + bit) >> by;
                mark_pages(&mut chunks, page(from), page(to));
            });
        }
        self.chunks = chunks;
        self.shift += by;
    }

    /// The first byte of a dirty page that ends at or after `from` and begins at or before `last`.
    fn next(&self, from: u64, last: u64) -> Option<u64> {
        let page = from >> self.shift;
        for (&key, chunk) in self.chunks.range(page >> CHUNK_SHIFT..) {
            let mut found = None;
            for_runs(chunk, |low, high| {
                let (low, high) = ((key << CHUNK_SHIFT) + low, (key << CHUNK_SHIFT) + high);
                if found.is_none() && high >= page {
                    found = Some(low.max(page) << self.shift);
                }
            });
            if found.is_some() {
                return found.filter(|&at| at <= last);
            }
        }
        None
    }

    /// Calls `f` with the dirty parts of `part`, and clears the pages that end in it and do not
    /// begin before `whole`.
    fn take(&mut self, part: (u64, u64), whole: u64, mut f: impl FnMut(u64, u64)) {
        let (first, last) = part;
        let shift = self.shift;
        let pages = (first >> shift, last >> shift);
        let begins = |page: u64| page << shift;
        let ends = |page: u64| (page << shift) | ((1 << shift) - 1);
        // The pages to clear, a closed range that may be empty.
        let clear_from = if begins(whole >> shift) >= whole {
            whole >> shift
        } else {
            (whole >> shift) + 1
        };
        let clear_from = clear_from.max(pages.0);
        let clear_to = if ends(pages.1) <= last {
            Some(pages.1)
        } else {
            pages.1.checked_sub(1)
        };
        let keys = pages.0 >> CHUNK_SHIFT..=pages.1 >> CHUNK_SHIFT;
        let mut empty = Vec::new();
        for (&key, chunk) in self.chunks.range_mut(keys) {
            let base = key << CHUNK_SHIFT;
            for_runs(chunk, |low, high| {
                let (low, high) = ((base + low).max(pages.0), (base + high).min(pages.1));
                if low <= high {
                    f(begins(low).max(first), ends(high).min(last));
                }
            });
            let Some(clear_to) = clear_to else {
                continue;
            };
            let (low, high) = (
                clear_from.max(base),
                clear_to.min(base + (1 << CHUNK_SHIFT) - 1),
            );
            if low <= high {
                clear_bits(&mut chunk[..], low - base, high - base);
                if chunk.iter().all(|word| *word == 0) {
                    empty.push(key);
                }
            }
        }
        for key in empty {
            self.chunks.remove(&key);
        }
    }
}

fn mark_pages(chunks: &mut BTreeMap<u64, Box<[u64; WORDS]>>, first: u64, last: u64) {
    for key in first >> CHUNK_SHIFT..=last >> CHUNK_SHIFT {
        let base = key << CHUNK_SHIFT;
        let chunk = chunks.entry(key).or_insert_with(|| Box::new([0; WORDS]));
        let (low, high) = (
            first.max(base) - base,
            last.min(base + (1 << CHUNK_SHIFT) - 1) - base,
        );
        set_bits(&mut chunk[..], low, high);
    }
}

fn clear_bits(bitmap: &mut [u64], from: u64, to: u64) {
    let (first, last) = (from >> 6, to >> 6);
    for (n, word) in (0u64..).zip(bitmap) {
        if n >= first && n <= last {
            let low = if n == first { from & 63 } else { 0 };
            let high = if n == last { to & 63 } else { 63 };
            *word &= !((u64::MAX >> (63 - high)) & (u64::MAX << low));
        }
    }
}

/// Calls `f` with each run of set bits, within one word.
fn for_runs(chunk: &[u64; WORDS], mut f: impl FnMut(u64, u64)) {
    for (n, &word) in (0u64..).zip(chunk) {
        let mut rest = word;
        while rest != 0 {
            let low = rest.trailing_zeros();
            let len = (rest >> low).trailing_ones();
            f(n * 64 + u64::from(low), n * 64 + u64::from(low + len) - 1);
            rest &= u64::MAX.checked_shl(low + len).unwrap_or(0);
        }
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests;
