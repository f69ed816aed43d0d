//! Numbers: the lowest free one first, given back when the value that holds it is dropped.
//!
//! The kernel's `ida_alloc_max()`, as used for `vfio_device.index` and group minors.

use crate::sync::{Mutex, lock};
use crate::{Errno, Result};
use std::sync::Arc;

/// Largest char device minor, so the largest index: `MINORMASK`.
pub const MINOR_MASK: u32 = (1 << 20) - 1;

/// A pool of numbers from 0 up to a maximum.
#[derive(Clone, Debug)]
pub struct IndexPool(Arc<Mutex<Bits>>);

/// Three levels of bitmaps: a set bit in a leaf is a number in use, a set bit above is a full
/// word below, so the lowest free number takes one step per level, whatever is in use.
#[derive(Debug)]
struct Bits {
    first: u32,
    max: u32,
    levels: Vec<Vec<u64>>,
}

/// A number in use. Dropping it gives the number back.
#[derive(Debug)]
pub struct Index {
    pool: IndexPool,
    value: u32,
}

impl IndexPool {
    /// A pool of the numbers `first..=max`.
    pub fn new(first: u32, max: u32) -> IndexPool {
        let mut bits = Bits {
            first,
            max,
            levels: vec![Vec::new()],
        };
        for value in 0..first {
            bits.set(value);
        }
        IndexPool(Arc::new(Mutex::new(bits)))
    }

    /// Takes the lowest free number. `ENOSPC` when all are in use, as `ida_alloc_max()`.
    pub fn take(&self) -> Result<Index> {
        let mut bits = lock(&self.0);
        let value = bits.lowest_free();
        if value > bits.max {
            return Err(Errno::NOSPC);
        }
        bits.set(value);
        drop(bits);
        Ok(Index {
            pool: self.clone(),
            value,
        })
    }

    /// True when `value` is held by somebody.
    pub fn in_use(&self, value: u32) -> bool {
        let bits = lock(&self.0);
        value >= bits.first && bits.get(value)
    }
}

impl Index {
    /// The number.
    pub fn get(&self) -> u32 {
        self.value
    }
}

impl Drop for Index {
    fn drop(&mut self) {
        lock(&self.pool.0).clear(self.value);
    }
}

impl Bits {
    fn get(&self, value: u32) -> bool {
        let word = self.levels[0].get(value as usize / 64);
        word.is_some_and(|word| word & (1 << (value % 64)) != 0)
    }

    fn lowest_free(&self) -> u32 {
        // From the top: the first word that is not full, down to a leaf bit.
        let mut at = 0usize;
        for (depth, level) in self.levels.iter().enumerate().rev() {
            let top = depth + 1 == self.levels.len();
            let word = if top {
                match level.iter().position(|word| *word != u64::MAX) {
                    Some(word) => word,
                    None => level.len(),
                }
            } else {
                at
            };
            let bits = level.get(word).copied().unwrap_or(0);
            at = word * 64 + bits.trailing_ones() as usize;
        }
        u32::try_from(at).unwrap_or(u32::MAX)
    }

    fn set(&mut self, value: u32) {
        let mut at = value as usize;
        let mut depth = 0;
        loop {
            let top = self.levels.len() - 1;
            let level = &mut self.levels[depth];
            if level.len() <= at / 64 {
                level.resize(at / 64 + 1, 0);
            }
            let word = &mut level[at / 64];
            *word |= 1 << (at % 64);
            if *word != u64::MAX {
                return;
            }
            if depth == top {
                if level.len() == 1 {
                    return;
                }
                // The first full word among several: from now on a level above says which are.
                let mut above = vec![0u64; level.len().div_ceil(64)];
                for (n, word) in level.iter().enumerate() {
                    if *word == u64::MAX {
                        above[n / 64] |= 1 << (n % 64);
                    }
                }
                self.levels.push(above);
            }
            at /= 64;
            depth += 1;
        }
    }

    fn clear(&mut self, value: u32) {
        let mut at = value as usize;
        for level in &mut self.levels {
            let Some(word) = level.get_mut(at / 64) else {
                return;
            };
            let was_full = *word == u64::MAX;
            *word &= !(1 << (at % 64));
            if !was_full {
                return;
            }
            at /= 64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[test]
    fn lowest_free_first_and_enospc_at_the_end() {
        let pool = IndexPool::new(0, 2);
        let a = pool.take().unwrap();
        let b = pool.take().unwrap();
        let c = pool.take().unwrap();
        assert_eq!((a.get(), b.get(), c.get()), (0, 1, 2));
        assert_eq!(pool.take().unwrap_err(), Errno::NOSPC);
        drop(b);
        assert_eq!(pool.take().unwrap().get(), 1);
    }

    #[test]
    fn numbers_below_the_first_are_never_given() {
        let pool = IndexPool::new(1, 10);
        assert_eq!(pool.take().unwrap().get(), 1);
        assert!(!pool.in_use(0));
    }

    #[test]
    fn the_whole_minor_range() {
        let pool = IndexPool::new(0, MINOR_MASK);
        let mut all: Vec<Index> = (0..=MINOR_MASK)
            .map(|n| {
                let index = pool.take().unwrap();
                assert_eq!(index.get(), n);
                index
            })
            .collect();
        assert_eq!(pool.take().unwrap_err(), Errno::NOSPC);
        all.swap_remove(777_777);
        assert_eq!(pool.take().unwrap().get(), 777_777);
    }

    proptest! {
        #[test]
        fn like_a_sorted_set(steps in prop::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 1..2000)) {
            let pool = IndexPool::new(0, 10_000);
            let mut held: BTreeMap<u32, Index> = BTreeMap::new();
            for (take, which) in steps {
                if take || held.is_empty() {
                    let want = (0..).find(|n| !held.contains_key(n)).unwrap();
                    let index = pool.take().unwrap();
                    prop_assert_eq!(index.get(), want);
                    held.insert(want, index);
                } else {
                    let key = *held.keys().nth(which.index(held.len())).unwrap();
                    held.remove(&key);
                    prop_assert!(!pool.in_use(key));
                }
            }
        }
    }
}
