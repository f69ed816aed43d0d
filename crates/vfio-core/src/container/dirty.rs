//! Which pages devices have written to (`VFIO_IOMMU_DIRTY_PAGES`).

use crate::dma::page_size;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Pages written to since they were last asked for, by I/O address. Costs nothing for pages that
/// are not written to, however much is mapped.
#[derive(Debug, Default)]
pub(super) struct Dirty {
    is_on: AtomicBool,
    /// 64 pages a word, by page number / 64. Empty while off.
    words: Mutex<BTreeMap<u64, u64>>,
}

/// Words taken out of a log.
pub(super) type Taken = Vec<(u64, u64)>;

impl Dirty {
    fn words(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        self.words.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_on(&self) -> bool {
        self.is_on.load(Ordering::Acquire)
    }

    /// Idempotent.
    pub(super) fn start(&self) {
        let _words = self.words();
        self.is_on.store(true, Ordering::Release);
    }

    /// Forgets everything. Idempotent.
    pub(super) fn stop(&self) {
        let mut words = self.words();
        self.is_on.store(false, Ordering::Release);
        words.clear();
    }

    /// A device has written there.
    pub(super) fn mark(&self, iova: u64, len: u64) {
        if !self.is_on() || len == 0 {
            return;
        }
        let first = iova / page_size();
        let last = iova.saturating_add(len - 1) / page_size();
        let mut words = self.words();
        // Stopped meanwhile?
        if self.is_on() {
            for (word, bits) in each_word(first, last) {
                *words.entry(word).or_default() |= bits;
            }
        }
    }

    /// Takes the marks of the pages from `first` to `last` out.
    pub(super) fn take(&self, first: u64, last: u64) -> Taken {
        let mut words = self.words();
        let mask = |word: u64| mask(word, first, last);
        let taken: Taken = words
            .range(first / 64..=last / 64)
            .map(|(word, bits)| (*word, bits & mask(*word)))
            .filter(|(_, bits)| *bits != 0)
            .collect();
        for (word, bits) in &taken {
            if let Some(left) = words.get_mut(word) {
                *left &= !bits;
                if *left == 0 {
                    words.remove(word);
                }
            }
        }
        taken
    }

    /// Puts back what could not be told.
    pub(super) fn put_back(&self, taken: Taken) {
        let mut words = self.words();
        if self.is_on() {
            for (word, bits) in taken {
                *words.entry(word).or_default() |= bits;
            }
        }
    }
}

/// The bits of a word of page numbers that lie between two pages.
fn mask(word: u64, first: u64, last: u64) -> u64 {
    let low = if word == first / 64 { first % 64 } else { 0 };
    let high = if word == last / 64 { last % 64 } else { 63 };
    (u64::MAX << low) & (u64::MAX >> (63 - high))
}

/// The words from one page to another, with the bits in between.
fn each_word(first: u64, last: u64) -> impl Iterator<Item = (u64, u64)> {
    (first / 64..=last / 64).map(move |word| (word, mask(word, first, last)))
}

/// A piece of a client's bitmap: bit 0 of the first word is the page `base`.
#[derive(Debug)]
pub(super) struct Bits<'a> {
    pub(super) base: u64,
    pub(super) words: &'a mut [u64],
}

impl Bits<'_> {
    /// Sets or clears the bits of the pages from `first` to `last`, which lie in the piece.
    pub(super) fn fill(&mut self, first: u64, last: u64, value: bool) {
        for (word, bits) in each_word(first - self.base, last - self.base) {
            if let Some(slot) = usize::try_from(word)
                .ok()
                .and_then(|word| self.words.get_mut(word))
            {
                *slot = if value { *slot | bits } else { *slot & !bits };
            }
        }
    }

    /// Sets the bits of what a log had.
    pub(super) fn set(&mut self, taken: &Taken) {
        for &(word, bits) in taken {
            let mut bits = bits;
            while bits != 0 {
                let page = word * 64 + u64::from(bits.trailing_zeros());
                self.fill(page, page, true);
                bits &= bits - 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    #[test]
    fn marks_are_taken_once() {
        let dirty = Dirty::default();
        dirty.mark(0, PAGE);
        assert!(dirty.take(0, 1000).is_empty(), "off");
        dirty.start();
        dirty.start();
        dirty.mark(62 * PAGE + 1, 3 * PAGE);
        dirty.mark(7 * PAGE - 1, 1);
        dirty.mark(7 * PAGE, 0);
        let taken = dirty.take(6, 63);
        assert_eq!(taken, [(0, 1 << 6 | 1 << 62 | 1 << 63)]);
        assert!(dirty.take(0, 63).is_empty());
        dirty.put_back(taken);
        assert_eq!(dirty.take(63, 65), [(0, 1 << 63), (1, 0b11)]);
        dirty.stop();
        dirty.stop();
        dirty.mark(0, PAGE);
        dirty.start();
        assert!(dirty.take(0, u64::MAX / PAGE).is_empty());
        dirty.mark(u64::MAX, 1);
        assert_eq!(
            dirty.take(0, u64::MAX / PAGE),
            [(u64::MAX / PAGE / 64, 1 << 63)]
        );
    }

    #[test]
    fn bits_count_from_the_base() {
        let mut words = [0b1011, u64::MAX];
        let mut bits = Bits {
            base: 100,
            words: &mut words,
        };
        bits.fill(101, 165, false);
        bits.set(&vec![(1, 1 << 37), (2, 1 << 0 | 1 << 37)]);
        assert_eq!(words, [0b11 | 1 << 28, !0b11 | 1 << 1]);
    }
}
