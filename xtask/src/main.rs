//! What people who work on vfiod run: tests with their real clients, benchmarks, checks.

mod bench;
mod check;
mod docs;
mod packages;
mod suites;
mod workspace;

use std::process::ExitCode;

use clap::Parser;
use clap::Subcommand;

/// Tests, checks and benchmarks of vfiod.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Run the tests: units, documentation, then real clients on the built programs
    Test(suites::Options),
    /// Measure speed, as ratios within one run
    Bench(bench::Options),
    /// One process of a benchmark
    #[command(hide = true)]
    BenchPeer(bench::peer::Options),
    /// Check the rules of the architecture: dependencies between crates, unsafe code, long
    /// files, and that what the documents name is there
    Check,
    /// Fetch and install what the tests need, and run none
    Prepare,
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    if let Task::BenchPeer(options) = &command {
        return exit_code(bench::peer::run(options));
    }
    exit_code(
        workspace::Workspace::load().and_then(|workspace| match command {
            Task::Test(options) => suites::run(&workspace, &options),
            Task::Bench(options) => bench::run(&workspace, &options),
            Task::Check => check::run(&workspace),
            Task::BenchPeer(options) => bench::peer::run(&options),
            Task::Prepare => suites::prepare(&workspace).map(|()| true),
        }),
    )
}

fn exit_code(result: anyhow::Result<bool>) -> ExitCode {
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
