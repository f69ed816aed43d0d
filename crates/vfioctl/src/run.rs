//! `vfioctl run`: a command that finds vfiod's devices beside the machine's own.

use crate::cli::Global;
use crate::fail::{Fail, Result};
use std::ffi::OsString;
use std::process::ExitCode;

/// Exit code for what `run` itself could not do, as `env`, `nohup` and `chroot` have it.
const OWN_FAILURE: u8 = 125;

/// Runs the command; returns only if that failed.
pub(crate) fn run(global: &Global, uevents: bool, command: &[OsString]) -> Result<ExitCode> {
    let own = |fail: Fail| Fail {
        code: OWN_FAILURE,
        ..fail
    };
    let client = crate::commands::daemon(global).map_err(own)?;
    let _ = (uevents, command, client);
    Err(own(Fail::failed(
        "this build of vfioctl cannot run commands",
    )))
}
