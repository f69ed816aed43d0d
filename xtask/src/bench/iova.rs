//! The map of I/O addresses, against the least that could do the same lookup.

use std::hint::black_box;

use anyhow::Context;
use anyhow::Result;
use dma_memory::IovaMap;
use dma_memory::Range;

use super::Benchmark;
use super::Goal;
use super::measure::Measured;
use super::measure::Pinned;
use super::measure::nanoseconds;

const MILLION: u32 = 1_000_000;
const SMALL: u32 = 64_000;
/// Operations in one round.
const OPERATIONS: u32 = 200_000;

/// The rows of this file.
pub(super) const ROWS: [Benchmark; 3] = [
    Benchmark {
        name: "IOVA lookup, 1 M mappings of 4 KiB to 1 TiB, random",
        against: "binary search in a sorted array of the same",
        goal: Goal::AtMost(1.2),
        known_miss: None,
        run: |rounds| lookup(rounds, MILLION as usize),
    },
    Benchmark {
        name: "IOVA lookup, 1 M mappings of 4 KiB to 1 TiB, hot",
        against: "binary search in a sorted array of the same",
        goal: Goal::AtMost(2.0),
        known_miss: None,
        run: |rounds| lookup(rounds, 16),
    },
    Benchmark {
        name: "IOVA insert and remove at 1 M mappings",
        against: "the same at 64 k",
        goal: Goal::AtMost(3.0),
        known_miss: Some(
            "2.8 on a machine that is quiet, more beside other work: at 64 k the map fits into the \
             second-level cache, at 1 M each step misses it, and what others do to the shared cache \
             decides how dear that is",
        ),
        run: insert_and_remove,
    },
];

/// Looks up addresses in `targets` different mappings, in an order without pattern.
fn lookup(rounds: u32, targets: usize) -> Result<Measured> {
    let _pinned = Pinned::to(0)?;
    let mut random = Random(1);
    let ranges = ranges(MILLION, &mut random)?;
    let map = map(&ranges)?;
    let sorted: Vec<(Range, u64)> = ranges.iter().copied().zip(0..).collect();
    let pool: Vec<Range> = (0..targets).filter_map(|_| random.pick(&ranges)).collect();
    let addresses: Vec<u64> = (0..OPERATIONS)
        .filter_map(|_| {
            let range = random.pick(&pool)?;
            Some(range.start() + random.next() % 4096)
        })
        .collect();
    Measured::interleaved(
        rounds,
        || {
            each(&addresses, |address| {
                black_box(map.find(address));
            })
        },
        || {
            each(&addresses, |address| {
                let at = sorted
                    .partition_point(|(range, _)| range.start() <= address)
                    .checked_sub(1);
                black_box(
                    at.and_then(|at| sorted.get(at))
                        .filter(|(range, _)| address <= range.last()),
                );
            })
        },
    )
}

/// Takes out mappings without pattern and puts them back.
fn insert_and_remove(rounds: u32) -> Result<Measured> {
    let _pinned = Pinned::to(0)?;
    let round = |count: u32| {
        let mut random = Random(u64::from(count));
        let ranges = ranges(count, &mut random)?;
        let mut map = map(&ranges)?;
        let starts: Vec<u64> = (0..OPERATIONS)
            .filter_map(|_| random.pick(&ranges))
            .map(Range::start)
            .collect();
        Ok::<_, anyhow::Error>(move || {
            each(&starts, |start| {
                if let Some((range, value)) = map.remove(start) {
                    // It was there a moment ago, so that its place is free.
                    let _ = black_box(map.insert(range, value));
                }
            })
        })
    };
    let (large, small) = (round(MILLION)?, round(SMALL)?);
    Measured::interleaved(rounds, large, small)
}

/// Nanoseconds for one of `operation` on each of `addresses`.
fn each(addresses: &[u64], mut operation: impl FnMut(u64)) -> Result<f64> {
    let mut next = addresses.iter();
    let count = u32::try_from(addresses.len()).context("too many operations in a round")?;
    Ok(nanoseconds(count, || {
        if let Some(address) = next.next() {
            operation(*address);
        }
    }))
}

/// `count` disjoint ranges in order, of 4 KiB to 1 TiB, with and without holes between them.
fn ranges(count: u32, random: &mut Random) -> Result<Vec<Range>> {
    let mut start = 0_u64;
    (0..count)
        .map(|_| {
            let length = 4096_u64 << (random.next() % 29);
            let range = Range::with_len(start, length)
                .map_err(|errno| anyhow::anyhow!("the ranges do not fit into 64 bits: {errno}"))?;
            start = start + length + 4096 * (random.next() % 3);
            Ok(range)
        })
        .collect()
}

fn map(ranges: &[Range]) -> Result<IovaMap<u64>> {
    let mut map = IovaMap::new();
    for (range, value) in ranges.iter().zip(0..) {
        map.insert(*range, value)
            .map_err(|errno| anyhow::anyhow!("two ranges overlap: {errno}"))?;
    }
    Ok(map)
}

/// A xorshift generator: the same sequence in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn pick(&mut self, ranges: &[Range]) -> Option<Range> {
        let count = u64::try_from(ranges.len())
            .ok()
            .filter(|count| *count > 0)?;
        ranges
            .get(usize::try_from(self.next() % count).ok()?)
            .copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_measured_is_there() {
        let mut random = Random(7);
        let ranges = ranges(5_000, &mut random).expect("they fit");
        let map = map(&ranges).expect("they are disjoint");
        for (range, value) in ranges.iter().zip(0..) {
            let found = map.find(range.last()).expect("each is found");
            assert_eq!((found.0.start(), *found.1), (range.start(), value));
        }
    }
}
