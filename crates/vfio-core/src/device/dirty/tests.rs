use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

const PAGE: u64 = 4096;

fn log(shift: u32, most: usize) -> Log {
    Log::new(BTreeMap::from([(0, u64::MAX)]), shift, most)
}

fn running(page_size: u64, ranges: &[(u64, u64)]) -> DirtyLog {
    let log = DirtyLog::default();
    log.start(page_size, ranges).unwrap();
    log
}

fn report(log: &DirtyLog, iova: u64, len: u64, page_size: u64) -> Result<Vec<u64>> {
    let report = Report::check(iova, len, page_size)?.unwrap();
    let mut bitmap = vec![0; usize::try_from(report.words()).unwrap()];
    log.take(&report, 0, report.words(), &mut bitmap)?;
    Ok(bitmap)
}

#[test]
fn ranges_by_table() {
    const M: u64 = 1 << 20;
    for (page_size, ranges, want) in [
        (PAGE, &[(0, M)][..], Ok(PAGE)),
        (PAGE, &[], Ok(PAGE)),
        (PAGE, &[(0, M), (M, M)], Ok(PAGE)),
        (PAGE, &[(M, M), (0, M)], Ok(PAGE)),
        (PAGE, &[(0, M), (M - PAGE, M)], Err(Errno::INVAL)),
        (PAGE, &[(M, M), (0, M + PAGE)], Err(Errno::INVAL)),
        (PAGE, &[(M, PAGE), (0, 4 * M)], Err(Errno::INVAL)),
        (PAGE, &[(1, M)], Err(Errno::INVAL)),
        (PAGE, &[(0, M + 1)], Err(Errno::INVAL)),
        (PAGE, &[(0, 0)], Ok(PAGE)),
        // Ends exactly at 2^64.
        (PAGE, &[(u64::MAX - M + 1, M)], Err(Errno::OVERFLOW)),
        (
            PAGE,
            &[(u64::MAX - PAGE + 1, 2 * PAGE)],
            Err(Errno::OVERFLOW),
        ),
        (PAGE, &[(u64::MAX - M + 1, M - PAGE)], Ok(PAGE)),
        // The first bad range counts.
        (
            PAGE,
            &[(0, M), (1, M), (u64::MAX - M + 1, M)],
            Err(Errno::INVAL),
        ),
        (0, &[(0, 0)], Ok(PAGE)),
        (0, &[(0, PAGE)], Err(Errno::INVAL)),
        (1, &[(3, 5)], Ok(PAGE)),
        (2 * M, &[(0, 2 * M)], Ok(2 * M)),
        (2 * M, &[(0, M)], Err(Errno::INVAL)),
        (1 << 40, &[(0, 1 << 40)], Ok(1 << 30)),
        (3 * PAGE, &[(0, 0)], Ok(2 * PAGE)),
    ] {
        let log = DirtyLog::default();
        assert_eq!(
            log.start(page_size, ranges),
            want,
            "{page_size:#x} {ranges:x?}"
        );
        assert_eq!(log.running().is_ok(), want.is_ok());
    }
}

#[test]
fn reports_by_table() {
    for (iova, len, page_size, want) in [
        (0, PAGE, 2048, Err(Errno::INVAL)),
        (0, PAGE, 0, Err(Errno::INVAL)),
        (0, PAGE, PAGE + 1, Err(Errno::INVAL)),
        (u64::MAX, PAGE, PAGE + 1, Err(Errno::INVAL)),
        (u64::MAX - PAGE + 1, PAGE, PAGE, Err(Errno::OVERFLOW)),
        (u64::MAX, 2, PAGE, Err(Errno::OVERFLOW)),
        (u64::MAX, 0, PAGE, Ok(0)),
        (0, 1, PAGE, Ok(1)),
        (0, 64 * PAGE, PAGE, Ok(1)),
        (0, 64 * PAGE + 1, PAGE, Ok(2)),
        (0, u64::MAX, 1 << 63, Ok(1)),
        (0, u64::MAX, PAGE, Ok(1 << 46)),
    ] {
        let words = Report::check(iova, len, page_size)
            .map(|report| report.map_or(0, |report| report.words()));
        assert_eq!(words, want, "{iova:#x} {len:#x} {page_size:#x}");
    }
}

#[test]
fn off_until_started_and_after_stop() {
    let log = DirtyLog::default();
    log.written(0, 1);
    assert_eq!(report(&log, 0, PAGE, PAGE), Err(Errno::INVAL));
    log.stop();
    assert_eq!(log.start(PAGE, &[(0, PAGE)]), Ok(PAGE));
    assert_eq!(log.start(PAGE, &[(0, PAGE)]), Err(Errno::INVAL), "it runs");
    assert_eq!(
        report(&log, 0, PAGE, PAGE),
        Ok(vec![0]),
        "nothing from before"
    );
    log.written(8, 1);
    log.stop();
    assert_eq!(report(&log, 0, PAGE, PAGE), Err(Errno::INVAL));
    assert_eq!(log.start(PAGE, &[(0, PAGE)]), Ok(PAGE));
    assert_eq!(
        report(&log, 0, PAGE, PAGE),
        Ok(vec![0]),
        "a new log is empty"
    );
}

#[test]
fn only_in_its_ranges_and_read_once() {
    let log = running(PAGE, &[(PAGE, 2 * PAGE), (8 * PAGE, PAGE)]);
    log.written(0, 16 * PAGE as usize);
    log.written(u64::MAX, 16);
    assert_eq!(report(&log, 0, 16 * PAGE, PAGE), Ok(vec![0b1_0000_0110]));
    assert_eq!(
        report(&log, 0, 16 * PAGE, PAGE),
        Ok(vec![0]),
        "it is cleared"
    );
    log.written(3 * PAGE - 1, 1);
    log.written(3 * PAGE, 1);
    assert_eq!(report(&log, 0, 16 * PAGE, PAGE), Ok(vec![0b100]));
    log.written(PAGE, 0);
    assert_eq!(
        report(&log, 0, 16 * PAGE, PAGE),
        Ok(vec![0]),
        "nothing written"
    );
}

#[test]
fn page_sizes_in_both_directions() {
    const M2: u64 = 2 << 20;
    // Logged by small pages, reported by large ones.
    let log = running(PAGE, &[]);
    log.written(3 * M2 + 5 * PAGE, 8);
    assert_eq!(report(&log, 0, 16 * M2, M2), Ok(vec![0b1000]));
    assert_eq!(report(&log, 0, 16 * M2, M2), Ok(vec![0]));
    // Logged by large pages, reported by small ones: more than 256 of them, as the libraries get
    // wrong.
    let log = running(M2, &[]);
    log.written(M2 + 5 * PAGE, 8);
    let bitmap = report(&log, 0, 4 * M2, PAGE).unwrap();
    assert_eq!(bitmap.len(), 32);
    for (n, word) in bitmap.into_iter().enumerate() {
        let dirty = (8..16).contains(&n);
        assert_eq!(word, if dirty { u64::MAX } else { 0 }, "word {n}");
    }
    assert_eq!(report(&log, 0, 4 * M2, PAGE), Ok(vec![0; 32]));
    // Only part of a logged page: it stays until it is reported whole.
    log.written(M2, 1);
    assert_eq!(report(&log, M2, PAGE, PAGE), Ok(vec![1]));
    assert_eq!(report(&log, M2 + PAGE, M2, PAGE).unwrap()[0], u64::MAX);
    assert_eq!(report(&log, M2, M2, M2), Ok(vec![1]));
    assert_eq!(report(&log, M2, M2, M2), Ok(vec![0]));
}

#[test]
fn the_largest_report_ends() {
    let log = running(1 << 30, &[]);
    log.written(u64::MAX - 10, 4);
    log.written(7, 1);
    let report = Report::check(0, u64::MAX, PAGE).unwrap().unwrap();
    assert_eq!(log.next(&report, 0), Ok(Some(0)));
    let last = report.words() - (1 << 18) / 64;
    assert_eq!(log.next(&report, (1 << 18) / 64), Ok(Some(last)));
    assert_eq!(log.next(&report, report.words()), Ok(None));
    let whole = Report::check(0, u64::MAX, 1 << 63).unwrap().unwrap();
    let mut bitmap = [0];
    log.take(&whole, 0, 1, &mut bitmap).unwrap();
    assert_eq!(bitmap, [0b11]);
    log.put_back(&whole, 0, &bitmap);
    assert!(log.lock().as_ref().unwrap().chunks.len() <= MOST_CHUNKS);
    let mut again = [0];
    log.take(&whole, 0, 1, &mut again).unwrap();
    assert_eq!(again, [0b11]);
}

#[test]
fn memory_is_bounded_and_nothing_is_lost() {
    let mut log = log(PAGE_SHIFT, 64);
    let mut pages = BTreeSet::new();
    for n in 0..10_000u64 {
        let page = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) & !(PAGE - 1);
        log.mark(page, page);
        pages.insert(page);
        assert!(log.chunks.len() <= 64);
    }
    let mut found = BTreeSet::new();
    log.take((0, u64::MAX), 0, |from, to| {
        found.extend(pages.range(from..=to).copied());
    });
    assert_eq!(found, pages);
    assert!(log.chunks.is_empty());
}

#[test]
fn writers_against_reports() {
    // Four devices' worth of writers; everything written is in some report.
    const PAGES: u64 = 64 * 1024;
    let log = running(PAGE, &[]);
    let mut seen = vec![0; 1024];
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..4)
            .map(|writer| {
                let log = &log;
                scope.spawn(move || {
                    for page in (writer..PAGES).step_by(4) {
                        log.written(page * PAGE + 17, 4);
                    }
                })
            })
            .collect();
        while !writers.iter().all(|writer| writer.is_finished()) {
            let bitmap = report(&log, 0, PAGES * PAGE, PAGE).unwrap();
            seen.iter_mut()
                .zip(bitmap)
                .for_each(|(seen, new)| *seen |= new);
        }
    });
    let bitmap = report(&log, 0, PAGES * PAGE, PAGE).unwrap();
    seen.iter_mut()
        .zip(bitmap)
        .for_each(|(seen, new)| *seen |= new);
    assert!(seen.iter().all(|word| *word == u64::MAX));
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64),
    /// First page, pages, how many times larger, words of a part, refused parts.
    Report(u64, u64, u32, u64, bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let write = (0..4096 * PAGE, 0..64 * PAGE).prop_map(|(at, len)| Step::Write(at, len));
    let report = (0..4096u64, 1..4096u64, 0..6u32, 1..9u64, any::<bool>())
        .prop_map(|(at, len, by, words, refuse)| Step::Report(at, len, by, words, refuse));
    prop::collection::vec(prop_oneof![3 => write, 1 => report], 1..40)
}

proptest! {
    /// Against a set of small pages: a report gives at least what is dirty and, of what it need not
    /// give, only neighbours within one logged or reported page; and what it gave whole is clean.
    #[test]
    fn against_a_model(shift in PAGE_SHIFT..18, steps in steps()) {
        let log = running(1 << shift, &[]);
        let mut dirty: BTreeSet<u64> = BTreeSet::new(); // Logged pages.
        for step in steps {
            match step {
                Step::Write(at, len) => {
                    log.written(at, usize::try_from(len).unwrap());
                    if len > 0 {
                        dirty.extend(at >> shift..=(at + len - 1) >> shift);
                    }
                }
                Step::Report(page, pages, by, words, refuse) => {
                    let (iova, len) = (page * PAGE, pages * PAGE);
                    let report = Report::check(iova, len, PAGE << by).unwrap().unwrap();
                    let mut bitmap = vec![0u64; usize::try_from(report.words()).unwrap()];
                    let mut word = 0;
                    // As a front end with a small buffer does it.
                    while let Some(next) = log.next(&report, word).unwrap() {
                        prop_assert!(next >= word);
                        let some = words.min(report.words() - next);
                        let part = usize::try_from(next).unwrap()..usize::try_from(next + some).unwrap();
                        if refuse {
                            let mut lost = vec![0; part.len()];
                            log.take(&report, next, some, &mut lost).unwrap();
                            log.put_back(&report, next, &lost);
                        }
                        log.take(&report, next, some, &mut bitmap[part]).unwrap();
                        word = next + some;
                    }
                    let size = PAGE << by;
                    let (first, last) = (iova, iova + len - 1);
                    for bit in 0..report.words() * 64 {
                        let from = iova + bit * size;
                        let to = (from + size - 1).min(last);
                        let set = bitmap[usize::try_from(bit / 64).unwrap()] >> (bit % 64) & 1 == 1;
                        let must = from <= last && dirty.range(from >> shift..=to >> shift).next().is_some();
                        if refuse {
                            // Put back by reported pages, which may reach over others.
                            prop_assert!(set || !must, "bit {} of {:?}", bit, report);
                        } else {
                            prop_assert_eq!(set, must, "bit {} of {:?}", bit, report);
                        }
                    }
                    if refuse {
                        log.stop();
                        log.start(1 << shift, &[]).unwrap();
                        dirty.clear();
                    } else {
                        dirty.retain(|page| {
                            let (begin, end) = (page << shift, (page << shift) + (1 << shift) - 1);
                            begin < first || end > last
                        });
                    }
                }
            }
        }
    }
}
