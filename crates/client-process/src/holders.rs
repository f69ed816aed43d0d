//! Who holds a file now.

use std::ffi::OsString;
use std::time::Duration;
use std::time::SystemTime;

use rustix::fs::AtFlags;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::process::Pid;

use crate::maps::Mapping;
use crate::proc;
use crate::sys;

/// One file of one file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId {
    /// Device number of the file system, as `st_dev`.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
}

/// A process that holds a file: by descriptors, by mappings, or both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The process.
    pub pid: Pid,
    /// Its name: at most 15 bytes, any bytes.
    pub comm: OsString,
    /// When the process started. When it got the file is not recorded anywhere.
    pub since: SystemTime,
    /// Its descriptors of the file, in order. Those of a thread with a table of its own are included.
    pub fds: Vec<i32>,
    /// Bytes of address space that map the file; they hold it even without a descriptor.
    pub mapped_bytes: u64,
}

/// Which processes hold one of these files at this moment, whoever opened it: inherited and passed
/// descriptors count, and so do mappings whose descriptor is long closed.
///
/// A look at /proc, process by process, so a process that comes or goes meanwhile may be missed. So are
/// descriptors that are in flight in a socket, and processes that we may not look into (without
/// CAP_SYS_PTRACE, those of other users). Nothing here asks a file system's server: a dead FUSE server
/// does not make it wait. Processes in `except` (ourselves, our supervisor) are left out.
#[must_use]
pub fn holders(files: &[FileId], except: &[Pid]) -> Vec<Holder> {
    let boot = boot_time();
    let mut pids: Vec<Pid> = numbers("/proc").collect();
    pids.sort_unstable_by_key(|pid| pid.as_raw_nonzero());
    pids.into_iter()
        .filter(|pid| !except.contains(pid))
        .filter_map(|pid| holder(pid, files, boot))
        .collect()
}

fn holder(pid: Pid, files: &[FileId], boot: SystemTime) -> Option<Holder> {
    let mut fds = Vec::new();
    let mut mapped_bytes = None;
    let mut seen: Vec<Pid> = Vec::new();
    for tid in numbers(&proc::path(pid, "task")) {
        // A leader that has ended shows neither; then the next thread is asked.
        if mapped_bytes.is_none() {
            mapped_bytes = mapped(tid, files);
        }
        // Threads nearly always share one table, and it is read once. Without kcmp a thread's own
        // table cannot be told, and only the first that shows anything is read.
        if seen
            .iter()
            .any(|other| sys::same_files(*other, tid).unwrap_or(true))
        {
            continue;
        }
        if let Some(found) = descriptors(tid, files) {
            seen.push(tid);
            fds.extend(found);
        }
    }
    let mapped_bytes = mapped_bytes.unwrap_or(0);
    if fds.is_empty() && mapped_bytes == 0 {
        return None;
    }
    fds.sort_unstable();
    fds.dedup();
    let stat = proc::stat(pid).ok()?;
    Some(Holder {
        pid,
        comm: stat.comm,
        since: boot + ticks(stat.start_ticks),
        fds,
        mapped_bytes,
    })
}

/// The descriptors of a task that are one of these files; `None` if it shows no table.
fn descriptors(tid: Pid, files: &[FileId]) -> Option<Vec<i32>> {
    let path = proc::path(tid, "fd");
    let dir = rustix::fs::open(
        &*path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .ok()?;
    let mut any = false;
    let mut found = Vec::new();
    for entry in rustix::fs::Dir::read_from(&dir).ok()?.flatten() {
        let Some((name, n)) = entry
            .file_name()
            .to_str()
            .ok()
            .and_then(|s| Some((s, s.parse().ok()?)))
        else {
            continue;
        };
        any = true;
        // Following the link finds the open file itself; no path is walked.
        if FileId::statx(&dir, name, AtFlags::empty()).is_ok_and(|id| files.contains(&id)) {
            found.push(n);
        }
    }
    any.then_some(found)
}

/// Bytes that map one of these files; `None` if the task has no address space any more.
fn mapped(tid: Pid, files: &[FileId]) -> Option<u64> {
    let maps = proc::read(tid, "maps")
        .ok()
        .filter(|text| !text.is_empty())?;
    let lines = maps.split(|b| *b == b'\n').filter_map(Mapping::parse);
    let ours = lines.filter(|(mapping, _)| files.contains(&mapping.file));
    Some(ours.fold(0, |sum, (mapping, _)| sum.saturating_add(mapping.len())))
}

/// The directory's entries that are numbers of tasks.
fn numbers(dir: &str) -> impl Iterator<Item = Pid> + use<> {
    std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?))
}

fn ticks(ticks: u64) -> Duration {
    let hertz = rustix::param::clock_ticks_per_second().max(1);
    Duration::from_millis(ticks.saturating_mul(1000) / hertz)
}

/// Second at which the machine started (`btime` in /proc/stat), by the clock as it is set now.
fn boot_time() -> SystemTime {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let seconds = stat
        .lines()
        .find_map(|line| line.strip_prefix("btime ")?.trim().parse().ok());
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.unwrap_or(0))
}
