//! The command line of vfiod.

mod cli;
mod commands;
mod doctor;
mod fail;
mod namespace;
mod plain;
mod print;
mod qemu;
mod run;
mod sysfs;
mod who;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    // clap prints usage errors itself and ends with 2.
    let cli = cli::Cli::parse();
    match commands::run(&cli) {
        Ok(code) => code,
        Err(fail) => {
            eprintln!("vfioctl: {fail}");
            ExitCode::from(fail.code)
        }
    }
}
