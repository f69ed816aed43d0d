//! Programs for tests: clients in C, and copies for users who may not enter the place where a program
//! was built.

use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use crate::daemon;
use crate::packages::Prefix;

/// Compiles a client of `assets` to `DIR/NAME`, against the private headers and without a warning, with
/// further options such as `-static`.
pub fn compile(
    prefix: &Prefix,
    source: &str,
    dir: impl AsRef<Path>,
    name: &str,
    options: &[&str],
) -> PathBuf {
    let program = dir.as_ref().join(name);
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets");
    let mut cc = Command::new("cc");
    cc.args(["-Wall", "-Werror", "-O2"]).args(options);
    for include in prefix.include_dirs() {
        cc.arg("-isystem").arg(include);
    }
    daemon::output(cc.arg("-o").arg(&program).arg(assets.join(source)))
        .and_then(|output| output.success("cc"))
        .expect("the client compiles without a warning");
    program
}

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
