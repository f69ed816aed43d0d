//! Copies of programs, for users who may not enter the place where they were built.

use std::path::Path;
use std::process::Command;

/// Copies a program by a process of its own.
///
/// If this process wrote the file itself, a child forked by another test's thread in that moment
/// would have it open for writing until its own `execve`, and running the copy would be ETXTBSY.
pub fn copy(from: impl AsRef<Path>, to: impl AsRef<Path>) {
    let (from, to) = (from.as_ref(), to.as_ref());
    let status = Command::new("cp").arg(from).arg(to).status();
    let status = status.unwrap_or_else(|error| panic!("cp: {error}"));
    assert!(status.success(), "{from:?} is copied to {to:?}: {status}");
}
