//! The few files of /proc that say who a task is.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::Pid;

use crate::Result;

/// `/proc/PID/FILE`.
pub(crate) fn path(pid: Pid, file: &str) -> String {
    format!("/proc/{}/{file}", pid.as_raw_nonzero())
}

/// The bytes of `/proc/PID/FILE`. A task that is gone is SRCH.
pub(crate) fn read(pid: Pid, file: &str) -> Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::open(path(pid, file), flags, Mode::empty()).map_err(gone)?;
    // Most have less than this, and every read costs as much as the text.
    let mut chunk = [0; 4096];
    let mut bytes = Vec::new();
    loop {
        match rustix::io::read(&file, &mut chunk[..]) {
            Ok(0) => return Ok(bytes),
            Ok(n) => bytes.extend_from_slice(chunk.get(..n).unwrap_or_default()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(gone(errno)),
        }
    }
}

/// A task's directory vanishes with it.
pub(crate) fn gone(errno: Errno) -> Errno {
    if errno == Errno::NOENT {
        Errno::SRCH
    } else {
        errno
    }
}

/// What `/proc/TID/status` tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Status {
    pub(crate) tgid: Pid,
    /// Effective ids: the second of the four columns.
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) cap_eff: u64,
}

pub(crate) fn status(tid: Pid) -> Result<Status> {
    parse_status(&read(tid, "status")?).ok_or(Errno::SRCH)
}

fn parse_status(bytes: &[u8]) -> Option<Status> {
    // The name may be any bytes, but a newline in it is escaped, so lines can be trusted.
    let text = String::from_utf8_lossy(bytes);
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
    };
    let effective = |name| field(name)?.split_whitespace().nth(1)?.parse().ok();
    Some(Status {
        tgid: Pid::from_raw(field("Tgid")?.trim().parse().ok()?)?,
        uid: effective("Uid")?,
        gid: effective("Gid")?,
        cap_eff: u64::from_str_radix(field("CapEff")?.trim(), 16).ok()?,
    })
}

/// The name of a task: `/proc/PID/comm`, which nothing is escaped in (`fs/proc/base.c`, `comm_show`).
pub(crate) fn comm(pid: Pid) -> Result<OsString> {
    let mut name = read(pid, "comm")?;
    if name.last() == Some(&b'\n') {
        name.pop();
    }
    Ok(OsString::from_vec(name))
}

/// What `/proc/PID/stat` tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stat {
    pub(crate) comm: OsString,
    /// Clock ticks from boot to the start of the process: with its number, its identity.
    pub(crate) start_ticks: u64,
}

pub(crate) fn stat(pid: Pid) -> Result<Stat> {
    parse_stat(&read(pid, "stat")?).ok_or(Errno::SRCH)
}

fn parse_stat(bytes: &[u8]) -> Option<Stat> {
    // The name is in parentheses and may contain some: the last one ends it.
    let open = bytes.iter().position(|b| *b == b'(')?;
    let close = bytes.iter().rposition(|b| *b == b')')?;
    let rest = std::str::from_utf8(bytes.get(close.checked_add(1)?..)?).ok()?;
    Some(Stat {
        comm: OsString::from_vec(bytes.get(open.checked_add(1)?..close)?.to_vec()),
        // Field 22; the first after the name is field 3.
        start_ticks: rest.split_whitespace().nth(19)?.parse().ok()?,
    })
}

/// The soft RLIMIT_MEMLOCK in bytes; `None` is unlimited.
pub(crate) fn memlock_limit(tid: Pid) -> Result<Option<u64>> {
    parse_memlock(&read(tid, "limits")?).ok_or(Errno::SRCH)
}

fn parse_memlock(bytes: &[u8]) -> Option<Option<u64>> {
    let text = std::str::from_utf8(bytes).ok()?;
    let soft = text
        .lines()
        .find_map(|line| line.strip_prefix("Max locked memory"))?
        .split_whitespace()
        .next()?;
    if soft == "unlimited" {
        return Some(None);
    }
    soft.parse().ok().map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_full_of_parentheses_does_not_shift_the_fields() {
        let line = b"7 (a) R 1 (b)) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 0\n";
        let stat = parse_stat(line).unwrap();
        assert_eq!(stat.comm, "a) R 1 (b)");
        assert_eq!(stat.start_ticks, 4242);
        assert_eq!(parse_stat(b"7 (a) S 1"), None);
        assert_eq!(parse_stat(b")("), None);
    }

    #[test]
    fn status_takes_the_effective_ids() {
        let status = parse_status(
            b"Name:\tx\nTgid:\t12\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nCapEff:\t0000000000001000\n",
        )
        .unwrap();
        assert_eq!(
            (status.tgid.as_raw_nonzero().get(), status.uid, status.gid),
            (12, 2, 6)
        );
        assert_eq!(status.cap_eff, 0x1000);
        assert_eq!(parse_status(b"Name:\tx\n"), None);
    }

    #[test]
    fn memlock_is_a_number_or_unlimited() {
        assert_eq!(
            parse_memlock(b"Max locked memory         8388608    8388608   bytes\n"),
            Some(Some(8_388_608))
        );
        assert_eq!(
            parse_memlock(b"Max locked memory         unlimited  unlimited bytes\n"),
            Some(None)
        );
        assert_eq!(parse_memlock(b"Max cpu time unlimited\n"), None);
    }
}
