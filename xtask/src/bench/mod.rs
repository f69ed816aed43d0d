//! `cargo xtask bench`: speed as ratios between two things measured in the same run, so that
//! the machine cancels out. The rows are in the files beside this one.

mod card;
mod client;
mod container;
mod dma;
mod iova;
mod lifecycle;
mod measure;
mod null;
pub(crate) mod peer;
mod raw;
mod requests;
mod served;
mod supervised;
mod table;
mod vfio_user;

use std::process::Command;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;

use self::measure::Measured;
use crate::workspace;
use crate::workspace::Workspace;

/// Options of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Print one JSON object a line instead of a table
    #[arg(long)]
    json: bool,
    /// Run only benchmarks whose name contains this; can be given again
    #[arg(long, value_name = "NAME")]
    row: Vec<String>,
    /// Rounds of each pair; the median counts
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Only a few rounds: a first look
    #[arg(long, conflicts_with = "rounds")]
    quick: bool,
    /// Print the names of the benchmarks and stop
    #[arg(long)]
    list: bool,
}

/// What a ratio has to be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Goal {
    /// Time against time: less is better.
    AtMost(f64),
    /// Throughput against throughput: more is better.
    AtLeast(f64),
}

impl Goal {
    /// True if `ratio` is good enough. A ratio that is no number is not.
    fn is_met(self, ratio: f64) -> bool {
        match self {
            Self::AtMost(limit) => ratio <= limit,
            Self::AtLeast(limit) => ratio >= limit,
        }
    }
}

/// One row of the table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Benchmark {
    /// What is measured.
    pub(crate) name: &'static str,
    /// What it is compared with, in the same run.
    pub(crate) against: &'static str,
    /// What the ratio of the two has to be.
    pub(crate) goal: Goal,
    /// Why the goal is missed, if it is known to be; printed with a miss.
    pub(crate) known_miss: Option<&'static str>,
    /// Runs this many rounds of both, interleaved.
    pub(crate) run: fn(rounds: u32) -> Result<Measured>,
}

/// A benchmark that has run.
#[derive(Debug)]
struct Row {
    benchmark: Benchmark,
    /// Or why it could not be.
    measured: Result<Measured>,
}

impl Row {
    fn is_met(&self) -> bool {
        let measured = self.measured.as_ref();
        measured.is_ok_and(|measured| self.benchmark.goal.is_met(measured.ratio()))
    }
}

/// All rows, in the order of the table.
fn all() -> Vec<Benchmark> {
    let (first, last) = requests::ROWS.split_at(5);
    let rows: [&[Benchmark]; 8] = [
        first,
        &dma::ROWS,
        &container::ROWS,
        &iova::ROWS,
        &lifecycle::ROWS,
        &supervised::ROWS,
        last,
        &vfio_user::ROWS,
    ];
    rows.concat()
}

/// Runs the benchmarks and prints the table. True if each goal is met or its miss explained.
///
/// # Errors
/// The program could not be built.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<bool> {
    let chosen: Vec<Benchmark> = all()
        .into_iter()
        .filter(|benchmark| {
            let mut names = options.row.iter();
            options.row.is_empty() || names.any(|name| benchmark.name.contains(name.as_str()))
        })
        .collect();
    if options.list {
        for benchmark in chosen {
            println!("{}", benchmark.name);
        }
        return Ok(true);
    }
    if cfg!(debug_assertions) {
        return optimised(workspace);
    }
    let rounds = if options.quick { 3 } else { options.rounds };
    let mut rows = Vec::new();
    for benchmark in chosen {
        let begin = Instant::now();
        let measured = (benchmark.run)(rounds);
        eprintln!("{}: {:.1} s", benchmark.name, begin.elapsed().as_secs_f64());
        rows.push(Row {
            benchmark,
            measured,
        });
    }
    print!(
        "{}",
        if options.json {
            table::json(&rows)
        } else {
            table::text(&rows)
        }
    );
    Ok(rows
        .iter()
        .all(|row| row.is_met() || (row.measured.is_ok() && row.benchmark.known_miss.is_some())))
}

/// The same command, built as the product is: numbers of a debug build mean nothing.
fn optimised(workspace: &Workspace) -> Result<bool> {
    let mut command = Command::new(workspace::cargo());
    command
        .args(["run", "--quiet", "--release", "--package", "xtask", "--"])
        .args(std::env::args_os().skip(1))
        .current_dir(&workspace.root);
    let status = command
        .status()
        .with_context(|| format!("running `{}`", workspace::shown(&command)))?;
    Ok(status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_has_a_direction() {
        assert!(Goal::AtMost(1.15).is_met(1.15) && !Goal::AtMost(1.15).is_met(1.16));
        assert!(Goal::AtLeast(0.8).is_met(0.8) && !Goal::AtLeast(0.8).is_met(0.79));
        assert!(!Goal::AtMost(1.0).is_met(f64::NAN) && !Goal::AtLeast(1.0).is_met(f64::NAN));
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<&str> = all().iter().map(|benchmark| benchmark.name).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
