//! Kernel, limits, huge pages and the daemon.

use super::Finding;
use crate::cli::Global;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use vfiod_control::Client;

/// Which kernel; what it can do the other lines tell.
pub(super) fn kernel() -> Finding {
    let uname = rustix::system::uname();
    Finding::ok(
        "kernel",
        format!(
            "{} {} on {}",
            uname.sysname().to_string_lossy(),
            uname.release().to_string_lossy(),
            uname.machine().to_string_lossy()
        ),
    )
}

/// Whether a huge page can be had now: taken, and given back.
pub(super) fn huge_pages() -> Finding {
    const NAME: &str = "hugepages";
    const SIZE: u64 = 2 << 20;
    let take = || {
        let file = memfd_create(
            "vfioctl-doctor",
            MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        )?;
        ftruncate(&file, SIZE)?;
        fallocate(&file, FallocateFlags::empty(), 0, SIZE)
    };
    let advice = "sysctl vm.nr_hugepages=N, if clients want some";
    match take() {
        Ok(()) => Finding::ok(NAME, "of 2 MiB, free"),
        Err(Errno::NOSPC | Errno::NOMEM) => Finding::limited(NAME, "none free", advice),
        Err(Errno::INVAL | Errno::NODEV | Errno::NOSYS | Errno::OPNOTSUPP) => Finding::limited(
            NAME,
            "none of 2 MiB on this kernel",
            "clients use ordinary pages",
        ),
        Err(errno) => Finding::limited(NAME, errno.to_string(), advice),
    }
}

/// Descriptors and mappings. An open device takes about five of the daemon's descriptors: its
/// connection, the files behind its regions, its client and interrupts.
pub(super) fn limits() -> Finding {
    const NAME: &str = "limits";
    const FEW: u64 = 16 * 1024;
    const MAPPINGS: u64 = 65_530;
    let number = |path: &str| -> Option<u64> {
        std::fs::read_to_string(path)
            .ok()?
            .trim()
            .parse::<u64>()
            .ok()
    };
    let files = getrlimit(Resource::Nofile).maximum;
    let all = number("/proc/sys/fs/file-max");
    let maps = number("/proc/sys/vm/max_map_count");
    let shown = |value: Option<u64>| value.map_or_else(|| "?".to_owned(), |n| n.to_string());
    let found = format!(
        "open files {} per process, {} in all; mappings {} per process",
        files.map_or_else(|| "unlimited".to_owned(), |n| n.to_string()),
        // Without a limit it is the largest number there is.
        all.filter(|n| *n < u64::MAX / 2)
            .map_or_else(|| "unlimited".to_owned(), |n| n.to_string()),
        shown(maps)
    );
    if files.is_some_and(|n| n < FEW) {
        return Finding::limited(
            NAME,
            found,
            "raise the limit of open files for thousands of devices in use: `ulimit -Hn` in the shell, \
             LimitNOFILE= in the unit",
        );
    }
    if all.is_some_and(|n| n < 4 * FEW) {
        return Finding::limited(NAME, found, "sysctl fs.file-max=1000000");
    }
    if maps.is_some_and(|n| n < MAPPINGS) {
        return Finding::limited(NAME, found, format!("sysctl vm.max_map_count={MAPPINGS}"));
    }
    Finding::ok(NAME, found)
}

/// Whether a daemon answers.
pub(super) fn daemon(global: &Global) -> Finding {
    const NAME: &str = "daemon";
    let (socket, _) = crate::commands::socket(global);
    match Client::connect(&socket) {
        Ok(_) => Finding::ok(NAME, format!("answers at {}", socket.display())),
        Err(error) => Finding::limited(NAME, error.to_string(), "or `vfioctl run --user`"),
    }
}
