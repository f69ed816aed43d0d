//! Tests that cannot run on a machine say so: loudly, one by one, with the reason.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::panic::Location;

/// The one reason that continuous integration takes (`tests/assets/allowed-skips.txt`).
pub const NO_PASSTHROUGH: &str =
    "this kernel has no FUSE passthrough (6.9 and newer have it), so no region is mapped natively";

/// Whether this kernel is new enough for FUSE passthrough; the reason to skip is
/// [`NO_PASSTHROUGH`].
pub fn kernel_has_passthrough() -> bool {
    kernel_is_at_least(6, 9)
}

/// Whether this kernel is of this version or newer. One whose release says no number counts as new.
pub fn kernel_is_at_least(major: u32, minor: u32) -> bool {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(its_major)), Some(Ok(its_minor))) => (its_major, its_minor) >= (major, minor),
        _ => true,
    }
}

/// Says that the calling test is skipped and why; the test returns right afterwards.
///
/// `cargo xtask test` collects what is said here, does not count the test as passed, and fails in
/// continuous integration unless the reason is on the list. The test is named by its thread, which
/// is how libtest names them, or by the line of the call where it runs all in one.
#[track_caller]
pub fn skip(reason: &str) {
    let location = Location::caller();
    let thread = std::thread::current();
    let test = match thread.name() {
        Some(name) if name != "main" => name.to_owned(),
        _ => format!("{}:{}", location.file(), location.line()),
    };
    let reason = reason.replace(['\n', '\t'], " ");
    eprintln!("SKIPPED {test}: {reason}");
    let Some(log) = std::env::var_os("VFIOD_SKIP_LOG") else {
        return;
    };
    let result = OpenOptions::new()
        .append(true)
        .create(true)
        .open(&log)
        .and_then(|mut file| file.write_all(format!("{test}\t{reason}\n").as_bytes()));
    if let Err(error) = result {
        // A skip that nobody learns of would count as a pass.
        panic!(
            "the skip of {test} cannot be written to {}: {error}",
            log.display()
        );
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_reason_is_on_the_list() {
        let list = include_str!("../assets/allowed-skips.txt");
        assert!(list.lines().any(|line| line == super::NO_PASSTHROUGH));
    }
}
