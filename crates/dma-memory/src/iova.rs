//! Which area covers an I/O address.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use rustix::io::Errno;

use crate::Range;
use crate::Result;

/// Most entries in one chunk. Chosen by measurement: small enough that inserting moves little, large
/// enough that the array of first addresses stays in the cache at a million areas.
const CHUNK: usize = 64;

/// Disjoint ranges of I/O addresses in order, each with a value.
///
/// Two levels of arrays instead of a tree: a lookup searches one array of first addresses and then one
/// chunk of at most 64 ranges, so a million areas cost two or three cache misses.
pub struct IovaMap<T> {
    /// The first address of each chunk.
    firsts: Vec<u64>,
    /// For each chunk, at least the longest hole that follows one of its entries. Holes only get
    /// shorter by inserting, so it may be too high; a search that finds nothing corrects it.
    holes: Vec<AtomicU64>,
    #[expect(
        clippy::vec_box,
        reason = "making room for a chunk moves all after it, so pointers must do"
    )]
    chunks: Vec<Box<Chunk<T>>>,
    /// An empty chunk for the next: a client that maps and unmaps one area has none made each time.
    spare: Option<Box<Chunk<T>>>,
    len: usize,
}

struct Chunk<T> {
    values: Vec<T>,
    ranges: Ranges,
}

/// An entry's place; past the end when `chunk` is the number of chunks.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place {
    chunk: usize,
    entry: usize,
}

impl<T> Default for IovaMap<T> {
    fn default() -> Self {
        Self {
            firsts: Vec::new(),
            holes: Vec::new(),
            chunks: Vec::new(),
            spare: None,
            len: 0,
        }
    }
}

impl<T> std::fmt::Debug for IovaMap<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IovaMap")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

impl<T> IovaMap<T> {
    /// Nothing mapped.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of areas.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The area that covers `iova`.
    #[must_use]
    pub fn find(&self, iova: u64) -> Option<(&Range, &T)> {
        let chunk = self.chunks.get(
            self.firsts
                .partition_point(|first| *first <= iova)
                .checked_sub(1)?,
        )?;
        let at = chunk
            .ranges
            .partition_point(|range| range.start <= iova)
            .checked_sub(1)?;
        let range = chunk.ranges.get(at)?;
        if iova > range.last {
            return None;
        }
        Some((range, chunk.values.get(at)?))
    }

    /// The value of the area that covers `iova`, to change.
    pub fn find_mut(&mut self, iova: u64) -> Option<(Range, &mut T)> {
        let place = self.place_of(iova)?;
        let chunk = self.chunks.get_mut(place.chunk)?;
        Some((
            *chunk.ranges.get(place.entry)?,
            chunk.values.get_mut(place.entry)?,
        ))
    }

    /// The areas that share an address with `range`, in order.
    pub fn range(&self, range: Range) -> impl Iterator<Item = (&Range, &T)> {
        let mut place = self.first_reaching(range.start);
        std::iter::from_fn(move || {
            let chunk = self.chunks.get(place.chunk)?;
            let entry = chunk
                .ranges
                .get(place.entry)
                .zip(chunk.values.get(place.entry))?;
            place = self.next(place);
            Some(entry)
        })
        .take_while(move |(found, _)| found.start <= range.last)
    }

    /// All areas in order.
    pub fn iter(&self) -> impl Iterator<Item = (&Range, &T)> {
        self.chunks
            .iter()
            .flat_map(|chunk| chunk.ranges.iter().zip(&chunk.values))
    }

    /// Whether an area shares an address with `range`.
    #[must_use]
    pub fn overlaps(&self, range: Range) -> bool {
        self.range(range).next().is_some()
    }

    /// Adds an area.
    ///
    /// # Errors
    /// [`Errno::EXIST`]: it shares an address with one that is there; nothing changes.
    pub fn insert(&mut self, range: Range, value: T) -> Result<()> {
        // The chunk whose first address is the last one at or before ours, or the first chunk.
        let mut at = self
            .firsts
            .partition_point(|first| *first <= range.start)
            .saturating_sub(1);
        let Some(chunk) = self.chunks.get(at) else {
            let chunk = self.chunk_of(range, value);
            self.push_chunk(0, chunk, u64::MAX);
            self.len += 1;
            return Ok(());
        };
        let mut entry = chunk.ranges.partition_point(|r| r.start <= range.start);
        let before = entry.checked_sub(1).and_then(|e| chunk.ranges.get(e));
        let after = chunk
            .ranges
            .get(entry)
            .or_else(|| self.chunks.get(at + 1)?.ranges.first());
        if before.is_some_and(|r| r.last >= range.start)
            || after.is_some_and(|r| r.start <= range.last)
        {
            return Err(Errno::EXIST);
        }
        let hole = hole_between(range, after);
        if chunk.ranges.len() >= CHUNK {
            let is_end = entry == chunk.ranges.len() && at + 1 == self.chunks.len();
            if is_end {
                // Areas added in order fill their chunks.
                let chunk = self.chunk_of(range, value);
                self.push_chunk(at + 1, chunk, hole);
                self.len += 1;
                return Ok(());
            }
            let middle = CHUNK / 2;
            self.split(at, middle);
            if entry > middle {
                at += 1;
                entry -= middle;
            }
        }
        if let (Some(chunk), Some(first), Some(longest)) = (
            self.chunks.get_mut(at),
            self.firsts.get_mut(at),
            self.holes.get_mut(at),
        ) {
            chunk.ranges.insert(entry, range);
            chunk.values.insert(entry, value);
            *first = (*first).min(range.start);
            *longest.get_mut() = (*longest.get_mut()).max(hole);
        }
        self.len += 1;
        Ok(())
    }

    /// Takes out the area that starts at `start`.
    pub fn remove(&mut self, start: u64) -> Option<(Range, T)> {
        let place = self.place_of(start)?;
        let chunk = self.chunks.get_mut(place.chunk)?;
        if chunk.ranges.get(place.entry)?.start != start {
            return None;
        }
        let range = chunk.ranges.remove(place.entry)?;
        let value = chunk.values.remove(place.entry);
        self.len -= 1;
        // The hole after the entry before it, wherever that is, now reaches to the next.
        let first = chunk.ranges.first().map(|r| r.start);
        let before = match place.entry.checked_sub(1) {
            Some(entry) => Some((place.chunk, entry)),
            None => place.chunk.checked_sub(1).map(|c| {
                (
                    c,
                    self.chunks
                        .get(c)
                        .map_or(0, |c| c.ranges.len().saturating_sub(1)),
                )
            }),
        };
        if let Some((c, entry)) = before {
            let hole = self.hole_after(c, entry);
            if let Some(longest) = self.holes.get_mut(c) {
                *longest.get_mut() = (*longest.get_mut()).max(hole);
            }
        }
        match first {
            Some(first) => {
                if let Some(slot) = self.firsts.get_mut(place.chunk) {
                    *slot = first;
                }
                self.shrink(place.chunk);
            }
            None => {
                self.spare = Some(self.chunks.remove(place.chunk));
                self.firsts.remove(place.chunk);
                self.holes.remove(place.chunk);
                // The hole after the last entry before it was counted while the empty chunk was there.
                if let Some(c) = place.chunk.checked_sub(1) {
                    let entry = self
                        .chunks
                        .get(c)
                        .map_or(0, |c| c.ranges.len().saturating_sub(1));
                    let hole = self.hole_after(c, entry);
                    if let Some(longest) = self.holes.get_mut(c) {
                        *longest.get_mut() = (*longest.get_mut()).max(hole);
                    }
                }
            }
        }
        Some((range, value))
    }

    /// Takes out everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// The unmapped ranges inside `within`, in order.
    pub fn holes(&self, within: Range) -> impl Iterator<Item = Range> {
        let mut areas = self.range(within);
        let mut next = Some(within.start);
        std::iter::from_fn(move || {
            loop {
                let start = next?;
                let Some((area, _)) = areas.next() else {
                    next = None;
                    return Range::new(start, within.last).ok();
                };
                next = area.last.checked_add(1).filter(|n| *n <= within.last);
                if let Some(last) = area.start.checked_sub(1).filter(|last| *last >= start) {
                    return Some(Range { start, last });
                }
            }
        })
    }

    /// The lowest address in `within` where `len` unmapped addresses begin, with the alignment `align`
    /// (a power of two) and the low bits `offset` (less than `align`): the choice of an automatic IOVA
    /// (`drivers/iommu/iommufd/io_pagetable.c`, `iopt_alloc_iova`).
    ///
    /// # Errors
    /// [`Errno::NOSPC`]: no hole fits. [`Errno::INVAL`]: `len` is 0, or the alignment makes no sense.
    pub fn find_hole(&self, len: u64, align: u64, offset: u64, within: Range) -> Result<u64> {
        if len == 0 || !align.is_power_of_two() || offset >= align {
            return Err(Errno::INVAL);
        }
        let fit = |hole: Range| {
            let start = align_up(hole.start.max(within.start), align, offset)?;
            let last = start.checked_add(len - 1)?;
            (last <= hole.last.min(within.last)).then_some(start)
        };
        let mut place = self.first_reaching(within.start);
        let next = self.get(place);
        if next.is_none_or(|next| next.start > within.start)
            && let last = next.map_or(u64::MAX, |next| next.start - 1)
            && let Some(start) = fit(Range {
                start: within.start,
                last,
            })
        {
            return Ok(start);
        }
        while let Some(chunk) = self.chunks.get(place.chunk) {
            let longest = self.holes.get(place.chunk).ok_or(Errno::NOSPC)?;
            if chunk
                .ranges
                .get(place.entry)
                .is_some_and(|r| r.start > within.last)
            {
                break;
            }
            if longest.load(Ordering::Relaxed) >= len {
                let mut seen = 0;
                for entry in place.entry..chunk.ranges.len() {
                    let hole = self.hole_after(place.chunk, entry);
                    seen = seen.max(hole);
                    if hole >= len
                        && let Some(start) =
                            chunk.ranges.get(entry).and_then(|r| r.last.checked_add(1))
                        && let Some(start) = fit(Range {
                            start,
                            last: start.saturating_add(hole - 1),
                        })
                    {
                        return Ok(start);
                    }
                }
                if place.entry == 0 {
                    longest.store(seen, Ordering::Relaxed);
                }
            }
            place = Place {
                chunk: place.chunk + 1,
                entry: 0,
            };
        }
        Err(Errno::NOSPC)
    }

    fn place_of(&self, iova: u64) -> Option<Place> {
        let chunk = self
            .firsts
            .partition_point(|first| *first <= iova)
            .checked_sub(1)?;
        let ranges = &self.chunks.get(chunk)?.ranges;
        let entry = ranges
            .partition_point(|range| range.start <= iova)
            .checked_sub(1)?;
        ranges
            .get(entry)?
            .contains(iova)
            .then_some(Place { chunk, entry })
    }

    /// The first entry whose last address is at or after `iova`.
    fn first_reaching(&self, iova: u64) -> Place {
        let chunk = self
            .firsts
            .partition_point(|first| *first <= iova)
            .saturating_sub(1);
        let entry = self
            .chunks
            .get(chunk)
            .map_or(0, |c| c.ranges.partition_point(|r| r.last < iova));
        let place = Place { chunk, entry };
        if self.get(place).is_some() {
            place
        } else {
            Place {
                chunk: chunk + 1,
                entry: 0,
            }
        }
    }

    fn get(&self, place: Place) -> Option<Range> {
        self.chunks
            .get(place.chunk)?
            .ranges
            .get(place.entry)
            .copied()
    }

    fn next(&self, place: Place) -> Place {
        let next = Place {
            entry: place.entry + 1,
            ..place
        };
        if self.get(next).is_some() {
            next
        } else {
            Place {
                chunk: place.chunk + 1,
                entry: 0,
            }
        }
    }

    /// Addresses between an entry and the next, or to the end of the space.
    fn hole_after(&self, chunk: usize, entry: usize) -> u64 {
        let Some(range) = self.get(Place { chunk, entry }) else {
            return 0;
        };
        let next = self.get(Place {
            chunk,
            entry: entry + 1,
        });
        let next = next.or_else(|| self.chunks.get(chunk + 1)?.ranges.first().copied());
        hole_between(range, next.as_ref())
    }

    /// A chunk with one entry.
    fn chunk_of(&mut self, range: Range, value: T) -> Box<Chunk<T>> {
        let mut chunk = self.spare.take().unwrap_or_default();
        chunk.ranges.insert(0, range);
        chunk.values.push(value);
        chunk
    }

    fn push_chunk(&mut self, at: usize, chunk: Box<Chunk<T>>, hole: u64) {
        self.firsts
            .insert(at, chunk.ranges.first().map_or(0, |r| r.start));
        self.holes.insert(at, AtomicU64::new(hole));
        self.chunks.insert(at, chunk);
    }

    fn split(&mut self, at: usize, middle: usize) {
        let Some(chunk) = self.chunks.get_mut(at) else {
            return;
        };
        let upper = Box::new(Chunk {
            ranges: chunk.ranges.split_off(middle),
            values: split_off(&mut chunk.values, middle),
        });
        let hole = self
            .holes
            .get(at)
            .map_or(u64::MAX, |h| h.load(Ordering::Relaxed));
        self.push_chunk(at + 1, upper, hole);
    }

    /// Joins a chunk that has become small with its neighbour, so that removing leaves no dust.
    fn shrink(&mut self, at: usize) {
        let len = |c: usize| self.chunks.get(c).map(|c| c.ranges.len());
        if len(at).is_none_or(|n| n >= CHUNK / 8) {
            return;
        }
        let low = if len(at + 1).is_some() {
            at
        } else {
            at.saturating_sub(1)
        };
        let Some((a, b)) = len(low).zip(len(low + 1)) else {
            return;
        };
        if a + b > CHUNK / 2 {
            return;
        }
        self.firsts.remove(low + 1);
        let hole = self.holes.remove(low + 1).into_inner();
        let upper = self.chunks.remove(low + 1);
        if let Some((chunk, longest)) = self.chunks.get_mut(low).zip(self.holes.get_mut(low)) {
            chunk.ranges.extend(&upper.ranges);
            chunk.values.extend(upper.values);
            *longest.get_mut() = (*longest.get_mut()).max(hole);
        }
    }
}

impl<T> Default for Chunk<T> {
    fn default() -> Self {
        Self {
            values: Vec::new(),
            ranges: Ranges::default(),
        }
    }
}

/// The ranges of a chunk in order, in the chunk itself: a lookup goes from the array of first addresses
/// right to them. Dereferences to those in use.
struct Ranges {
    len: usize,
    all: [Range; CHUNK],
}

impl Default for Ranges {
    fn default() -> Self {
        Self {
            len: 0,
            all: [Range::ALL; CHUNK],
        }
    }
}

impl std::ops::Deref for Ranges {
    type Target = [Range];

    fn deref(&self) -> &[Range] {
        self.all.get(..self.len).unwrap_or_default()
    }
}

impl Ranges {
    /// There is room: a full chunk is split first.
    fn insert(&mut self, at: usize, range: Range) {
        self.all.copy_within(at..self.len, at + 1);
        if let Some(slot) = self.all.get_mut(at) {
            *slot = range;
            self.len += 1;
        }
    }

    fn remove(&mut self, at: usize) -> Option<Range> {
        let range = *self.get(at)?;
        self.all.copy_within(at + 1..self.len, at);
        self.len -= 1;
        Some(range)
    }

    fn split_off(&mut self, middle: usize) -> Self {
        let mut upper = Self::default();
        upper.extend(self.get(middle..).unwrap_or_default());
        self.len = self.len.min(middle);
        upper
    }

    fn extend(&mut self, more: &[Range]) {
        let end = self.len.saturating_add(more.len());
        if let Some(room) = self.all.get_mut(self.len..end) {
            room.copy_from_slice(more);
            self.len = end;
        }
    }
}

/// `Vec::split_off` leaves the upper half without room to grow; both halves will be inserted into.
fn split_off<U>(vec: &mut Vec<U>, middle: usize) -> Vec<U> {
    let mut upper = Vec::with_capacity(CHUNK);
    upper.extend(vec.drain(middle..));
    upper
}

fn hole_between(range: Range, next: Option<&Range>) -> u64 {
    next.map_or(u64::MAX - range.last, |next| {
        (next.start - range.last).saturating_sub(1)
    })
}

fn align_up(address: u64, align: u64, offset: u64) -> Option<u64> {
    let low = address & (align - 1);
    let base = address - low;
    if low <= offset {
        base.checked_add(offset)
    } else {
        base.checked_add(align)?.checked_add(offset)
    }
}

#[cfg(test)]
mod tests;
