use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// The same by the simplest means.
#[derive(Default)]
struct Model(BTreeMap<u64, (u64, u32)>);

impl Model {
    fn overlaps(&self, r: Range) -> bool {
        self.0
            .iter()
            .any(|(start, (last, _))| *start <= r.last && r.start <= *last)
    }

    fn find(&self, iova: u64) -> Option<(u64, u64, u32)> {
        let (start, (last, value)) = self.0.range(..=iova).next_back()?;
        (iova <= *last).then_some((*start, *last, *value))
    }

    fn holes(&self, within: Range) -> Vec<(u64, u64)> {
        let mut holes = Vec::new();
        let mut next = Some(within.start);
        for (start, (last, _)) in &self.0 {
            let Some(from) = next else { break };
            if *last < from {
                continue;
            }
            if *start > within.last {
                break;
            }
            if *start > from {
                holes.push((from, start - 1));
            }
            next = last.checked_add(1).filter(|n| *n <= within.last);
        }
        if let Some(from) = next {
            holes.push((from, within.last));
        }
        holes
    }

    fn find_hole(&self, len: u64, align: u64, offset: u64, within: Range) -> Option<u64> {
        self.holes(within).into_iter().find_map(|(from, to)| {
            // Slow and obvious: the addresses with the right low bits, from below.
            let mut at = u128::from(from) & !u128::from(align - 1) | u128::from(offset);
            if at < u128::from(from) {
                at += u128::from(align);
            }
            let end = at + u128::from(len) - 1;
            (end <= u128::from(to)).then(|| u64::try_from(at).unwrap())
        })
    }
}

#[derive(Debug, Clone)]
enum Op {
    Insert(u64, u64),
    Remove(usize),
    RemoveAt(u64),
    Find(u64),
    Hole {
        len: u64,
        align: u32,
        offset: u64,
        within: (u64, u64),
    },
    Sweep(u64, u64),
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..4096_u64,
        (u64::MAX - 4096)..=u64::MAX,
        Just(0),
        Just(u64::MAX)
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (address(), 1..24_u64).prop_map(|(a, l)| Op::Insert(a, l)),
        3 => any::<usize>().prop_map(Op::Remove),
        1 => address().prop_map(Op::RemoveAt),
        2 => address().prop_map(Op::Find),
        2 => (1..64_u64, 0..6_u32, any::<u64>(), address(), address()).prop_map(|(len, align, offset, a, b)| Op::Hole {
            len,
            align,
            offset,
            within: (a.min(b), a.max(b))
        }),
        1 => (address(), address()).prop_map(|(a, b)| Op::Sweep(a.min(b), a.max(b))),
    ]
}

/// The invariants that lookups rely on.
fn check(map: &IovaMap<u32>, model: &Model) {
    assert_eq!(map.len(), model.0.len());
    assert_eq!(map.firsts.len(), map.chunks.len());
    assert_eq!(map.holes.len(), map.chunks.len());
    for (at, chunk) in map.chunks.iter().enumerate() {
        assert!(!chunk.ranges.is_empty() && chunk.ranges.len() <= CHUNK);
        assert_eq!(chunk.ranges.len(), chunk.values.len());
        assert_eq!(map.firsts[at], chunk.ranges[0].start);
        let longest = (0..chunk.ranges.len())
            .map(|e| map.hole_after(at, e))
            .max()
            .unwrap();
        assert!(
            map.holes[at].load(Ordering::Relaxed) >= longest,
            "a hole would be overlooked"
        );
    }
    let ours: Vec<_> = map.iter().map(|(r, v)| (r.start, r.last, *v)).collect();
    let theirs: Vec<_> = model.0.iter().map(|(s, (l, v))| (*s, *l, *v)).collect();
    assert_eq!(ours, theirs);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn behaves_like_a_plain_map(ops in proptest::collection::vec(op(), 1..1500)) {
        let mut map = IovaMap::new();
        let mut model = Model::default();
        for (n, op) in ops.into_iter().enumerate() {
            let value = u32::try_from(n).unwrap();
            match op {
                Op::Insert(start, len) => {
                    let Ok(range) = Range::with_len(start, len) else { continue };
                    let fits = !model.overlaps(range);
                    prop_assert_eq!(map.overlaps(range), !fits);
                    prop_assert_eq!(map.insert(range, value), if fits { Ok(()) } else { Err(Errno::EXIST) });
                    if fits {
                        model.0.insert(range.start, (range.last, value));
                    }
                }
                Op::Remove(pick) => {
                    let Some(start) = model.0.keys().nth(pick % model.0.len().max(1)).copied() else { continue };
                    let (last, value) = model.0.remove(&start).unwrap();
                    prop_assert_eq!(map.remove(start), Some((Range { start, last }, value)));
                }
                Op::RemoveAt(start) => {
                    let there = model.0.remove(&start).map(|(last, v)| (Range { start, last }, v));
                    prop_assert_eq!(map.remove(start), there);
                }
                Op::Find(iova) => {
                    prop_assert_eq!(map.find(iova).map(|(r, v)| (r.start, r.last, *v)), model.find(iova));
                    prop_assert_eq!(map.find_mut(iova).map(|(r, v)| (r.start, r.last, *v)), model.find(iova));
                }
                Op::Hole { len, align, offset, within } => {
                    let align = 1 << align;
                    let within = Range::new(within.0, within.1).unwrap();
                    let expected = model.find_hole(len, align, offset % align, within).ok_or(Errno::NOSPC);
                    prop_assert_eq!(map.find_hole(len, align, offset % align, within), expected);
                }
                Op::Sweep(start, last) => {
                    let within = Range::new(start, last).unwrap();
                    let holes: Vec<_> = map.holes(within).map(|r| (r.start, r.last)).collect();
                    prop_assert_eq!(holes, model.holes(within));
                    let areas: Vec<_> = map.range(within).map(|(r, v)| (r.start, r.last, *v)).collect();
                    let there = model.0.iter().map(|(s, (l, v))| (*s, *l, *v));
                    let there: Vec<_> = there.filter(|(s, l, _)| *s <= last && start <= *l).collect();
                    prop_assert_eq!(areas, there);
                }
            }
        }
        check(&map, &model);
        for start in model.0.keys().copied().collect::<Vec<_>>() {
            model.0.remove(&start);
            prop_assert!(map.remove(start).is_some());
        }
        check(&map, &model);
    }
}

#[test]
fn the_last_address_can_be_mapped() {
    let mut map = IovaMap::new();
    let top = Range::with_len(u64::MAX - 4095, 4096).unwrap();
    map.insert(top, 1).unwrap();
    assert_eq!(map.find(u64::MAX), Some((&top, &1)));
    assert_eq!(map.insert(Range::ALL, 2), Err(Errno::EXIST));
    assert_eq!(
        map.find_hole(
            4096,
            4096,
            0,
            Range::new(u64::MAX - 4095, u64::MAX).unwrap()
        ),
        Err(Errno::NOSPC)
    );
    assert_eq!(
        map.holes(Range::ALL).collect::<Vec<_>>(),
        [Range::new(0, u64::MAX - 4096).unwrap()]
    );
    assert_eq!(map.remove(u64::MAX - 4095), Some((top, 1)));
    map.insert(Range::ALL, 3).unwrap();
    assert_eq!(map.find(12345).unwrap().1, &3);
    assert_eq!(map.holes(Range::ALL).count(), 0);
    assert_eq!(map.find_hole(1, 1, 0, Range::ALL), Err(Errno::NOSPC));
}

#[test]
fn an_emptied_map_is_filled_again_as_a_new_one() {
    let mut map = IovaMap::new();
    let areas = |from: u64| (0..200).map(move |n| (from + n * 16, n));
    for from in [0, 8, 0x1_0000] {
        for (start, n) in areas(from) {
            map.insert(Range::with_len(start, 8).unwrap(), n).unwrap();
        }
        assert!(
            map.iter()
                .map(|(range, n)| (range.start(), *n))
                .eq(areas(from))
        );
        let all = Range::ALL;
        assert_eq!(
            map.find_hole(9, 1, 0, all),
            Ok(if from > 8 { 0 } else { from + 199 * 16 + 8 })
        );
        for (start, n) in areas(from) {
            assert_eq!(map.remove(start).map(|(_, n)| n), Some(n));
            assert_eq!(map.find(start), None);
        }
        assert!(map.is_empty() && map.iter().next().is_none());
        assert_eq!(map.find_hole(u64::MAX, 1, 0, all), Ok(0));
    }
}

#[test]
fn ranges_refuse_what_wraps_or_is_empty() {
    assert_eq!(Range::with_len(5, 0), Err(Errno::INVAL));
    assert_eq!(Range::with_len(u64::MAX, 2), Err(Errno::OVERFLOW));
    assert_eq!(Range::with_len(u64::MAX, 1).unwrap().last(), u64::MAX);
    assert_eq!(Range::new(2, 1), Err(Errno::INVAL));
    assert_eq!(Range::ALL.len(), None);
}

#[test]
fn automatic_addresses_do_not_scan_everything_each_time() {
    // A million areas back to back, then a million-and-first: with a scan of every entry this would
    // take 10^12 steps.
    let mut map = IovaMap::new();
    let within = Range::new(4096, u64::MAX - 4096).unwrap();
    for _ in 0..200_000 {
        let start = map.find_hole(4096, 4096, 0, within).unwrap();
        map.insert(Range::with_len(start, 4096).unwrap(), ())
            .unwrap();
    }
    assert_eq!(map.iter().last().unwrap().0.last(), 4096 * 200_001 - 1);
    map.remove(4096 * 1000).unwrap();
    assert_eq!(map.find_hole(8192, 4096, 0, within), Ok(4096 * 200_001));
    assert_eq!(map.find_hole(4096, 4096, 0, within), Ok(4096 * 1000));
}
