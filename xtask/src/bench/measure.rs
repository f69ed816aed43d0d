//! How two things are compared: in turns, on the same processor, by the median.

use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use rustix::thread::CpuSet;

/// Rounds of two things, measured in turns.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Measured {
    /// Ours, one number a round: nanoseconds an operation, or operations a second.
    ours: Vec<f64>,
    /// What it is compared with, in the same unit and rounds.
    base: Vec<f64>,
}

impl Measured {
    /// Measures `ours` and `base` in turns; who goes first changes every round, so that neither
    /// always finds the caches as the other left them. One round of each runs before and is not
    /// counted.
    ///
    /// # Errors
    /// As the first of the two that fails, or one gave a number that is not above zero.
    pub(crate) fn interleaved(
        rounds: u32,
        mut ours: impl FnMut() -> Result<f64>,
        mut base: impl FnMut() -> Result<f64>,
    ) -> Result<Self> {
        ours()?;
        base()?;
        let mut measured = Self {
            ours: Vec::new(),
            base: Vec::new(),
        };
        for round in 0..rounds {
            let (a, b) = if round % 2 == 0 {
                let a = ours()?;
                (a, base()?)
            } else {
                let b = base()?;
                (ours()?, b)
            };
            if !(a > 0.0 && b > 0.0) {
                bail!("a round took no time: {a} against {b}");
            }
            measured.ours.push(a);
            measured.base.push(b);
        }
        Ok(measured)
    }

    /// The median of the rounds' ratios, ours to the other: a machine that gets slower for a while
    /// slows both halves of a round.
    pub(crate) fn ratio(&self) -> f64 {
        median(self.ratios())
    }

    /// How far the middle half of the rounds' ratios reaches, as lowest and highest.
    pub(crate) fn spread(&self) -> (f64, f64) {
        let mut ratios = self.ratios();
        ratios.sort_by(f64::total_cmp);
        let at = |index: usize| ratios.get(index).copied().unwrap_or(f64::NAN);
        (
            at(ratios.len() / 4),
            at((ratios.len() * 3 / 4).min(ratios.len().saturating_sub(1))),
        )
    }

    /// The median of ours.
    pub(crate) fn ours(&self) -> f64 {
        median(self.ours.clone())
    }

    /// The median of what it is compared with.
    pub(crate) fn base(&self) -> f64 {
        median(self.base.clone())
    }

    fn ratios(&self) -> Vec<f64> {
        self.ours
            .iter()
            .zip(&self.base)
            .map(|(ours, base)| ours / base)
            .collect()
    }
}

/// The middle value; of an even number, the mean of the middle two. NaN of none.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
    let middle = values.len() / 2;
    if values.len().is_multiple_of(2) {
        f64::midpoint(at(middle.wrapping_sub(1)), at(middle))
    } else {
        at(middle)
    }
}

/// Nanoseconds that one of `count` calls of `operation` takes.
#[expect(
    clippy::cast_precision_loss,
    reason = "counts and times are far below 2^52"
)]
pub(crate) fn nanoseconds(count: u32, mut operation: impl FnMut()) -> f64 {
    let begin = Instant::now();
    for _ in 0..count {
        operation();
    }
    begin.elapsed().as_nanos() as f64 / f64::from(count)
}

/// Nanoseconds that one of `count` calls of `operation` takes as a rule: the median of chunks of
/// 20, so that a moment in which another program had the processor does not count.
pub(crate) fn typical(count: u32, mut operation: impl FnMut()) -> f64 {
    const CHUNK: u32 = 20;
    let chunks = (0..count.div_ceil(CHUNK)).map(|_| nanoseconds(CHUNK, &mut operation));
    median(chunks.collect())
}

/// The calling thread, bound to one processor until this is dropped.
#[derive(Debug)]
pub(crate) struct Pinned {
    before: CpuSet,
}

impl Pinned {
    /// Binds the calling thread, and the threads and processes it starts from here on, to the
    /// `nth` processor that it may use.
    ///
    /// # Errors
    /// There are not so many processors, or the kernel refuses.
    pub(crate) fn to(nth: usize) -> Result<Self> {
        let before = rustix::thread::sched_getaffinity(None)
            .context("asking for the processors to run on")?;
        let cpu = (0..CpuSet::MAX_CPU)
            .filter(|cpu| before.is_set(*cpu))
            .nth(nth)
            .with_context(|| format!("this benchmark needs {} processors", nth + 1))?;
        let mut only = CpuSet::new();
        only.set(cpu);
        rustix::thread::sched_setaffinity(None, &only).context("binding to a processor")?;
        Ok(Self { before })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // The set was ours before; should the kernel refuse, the thread stays where it is.
        let _ = rustix::thread::sched_setaffinity(None, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn the_median_of_round_ratios_ignores_a_slow_round() {
        let ours = RefCell::new(vec![2.0, 3.0, 200.0, 2.0, 9.0].into_iter());
        let base = RefCell::new(vec![1.0, 1.0, 100.0, 1.0, 1.0].into_iter());
        // The first of each warms up: left are 3/1, 200/100, 2/1, 9/1.
        let measured = Measured::interleaved(
            4,
            || ours.borrow_mut().next().context("enough rounds"),
            || base.borrow_mut().next().context("enough rounds"),
        )
        .expect("both run");
        assert_eq!(measured.ratios(), [3.0, 2.0, 2.0, 9.0]);
        assert!((measured.ratio() - 2.5).abs() < 1e-9);
    }

    #[test]
    fn who_goes_first_changes() {
        let order = RefCell::new(String::new());
        let note = |letter| {
            order.borrow_mut().push(letter);
            Ok(1.0)
        };
        Measured::interleaved(2, || note('o'), || note('b')).expect("both run");
        assert_eq!(order.into_inner(), "obobbo");
    }

    #[test]
    fn much_more_work_is_a_higher_ratio() {
        let _pinned = Pinned::to(0).expect("there is a processor");
        let mut value = 1_u64;
        let mut work = |times: u32| {
            nanoseconds(50, || {
                for _ in 0..times {
                    value = std::hint::black_box(
                        value
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .rotate_left(17),
                    );
                }
            })
        };
        let work = RefCell::new(&mut work);
        let measured = Measured::interleaved(
            15,
            || Ok((*work.borrow_mut())(2_000)),
            || Ok((*work.borrow_mut())(20)),
        )
        .expect("both run");
        // A hundred times the work, measured on a machine that may be busy.
        assert!(measured.ratio() > 5.0, "{measured:?}");
    }

    #[test]
    fn a_slow_moment_is_not_typical() {
        let mut calls = 0;
        let time = typical(100, || {
            calls += 1;
            if calls == 50 {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        });
        assert_eq!(calls, 100);
        assert!(
            time < 100_000.0,
            "one chunk of five has 1 ms a call: {time}"
        );
    }

    #[test]
    fn a_failing_round_fails_the_row() {
        assert!(Measured::interleaved(1, || Ok(1.0), || bail!("no")).is_err());
        assert!(Measured::interleaved(1, || Ok(0.0), || Ok(1.0)).is_err());
    }

    #[test]
    fn pinning_ends() {
        let before = rustix::thread::sched_getaffinity(None).expect("it can be asked");
        let pinned = Pinned::to(0).expect("there is a processor");
        assert_eq!(
            rustix::thread::sched_getaffinity(None)
                .expect("it can be asked")
                .count(),
            1
        );
        drop(pinned);
        assert!(rustix::thread::sched_getaffinity(None).expect("it can be asked") == before);
        assert!(Pinned::to(CpuSet::MAX_CPU).is_err());
    }
}
