//! The daemon: configuration, wiring, privileges, shutdown.

mod calls;
mod config;
mod control;
mod daemon;
mod demo;
mod devices;
mod log;
mod numbers;
mod parents;
mod uevent;
mod vfio_user;

use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

/// Serves VFIO devices that are written in Rust to programs that know nothing of it.
#[derive(Debug, Parser)]
#[command(name = "vfiod", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run in the foreground until SIGTERM or SIGINT; a second one does not wait for users.
    Serve(Serve),
    /// Serve one device of its own on a vfio-user socket, without a daemon, until SIGTERM.
    VfioUser(vfio_user::Program),
    /// Show the life of a device, step by step; needs no configuration and leaves nothing behind.
    Demo(demo::Args),
}

/// What `serve` takes.
#[derive(Clone, Debug, clap::Args)]
struct Serve {
    /// Read this configuration only: no defaults' places, no drop-ins.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Put everything under this directory: sys, dev, vfiod.sock, and etc/vfiod and
    /// usr/lib/vfiod for the configuration.
    #[arg(long, value_name = "DIR", env = "VFIOD_ROOT")]
    root: Option<PathBuf>,
    /// error, warn, info, debug or trace, or directives as in RUST_LOG, which it overrides.
    #[arg(long, value_name = "LEVEL")]
    log: Option<String>,
    /// Check the configuration, print it as it was understood, and end.
    #[arg(long)]
    check: bool,
    /// Serve one command: stop, as by SIGTERM, when standard input ends, and take the directory away.
    #[arg(long, requires = "root")]
    transient: bool,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Serve(serve) => daemon::serve(&serve),
        Command::VfioUser(program) => vfio_user::serve_one(&program),
        Command::Demo(args) => demo::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vfiod: {error:#}");
            ExitCode::FAILURE
        }
    }
}
