//! Where a path of a caller's leads, without asking a stranger's file system.
//!
//! The kernel walks a path by asking each file system on the way for the next name, and a FUSE or
//! network server may never answer. So the walk is done here, name by name: a local file system is
//! asked, vfiod is asked, any other only for what the kernel has in its cache. A walk that ends early
//! is no loss: then the kernel does the call itself.

use super::nodes::{Nodes, is_local};
use super::task::FileId;
use client_process::Caller;
use rustix::fd::OwnedFd;
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::io::Errno;
use std::collections::VecDeque;

/// As many links as the kernel follows in one path (`include/linux/namei.h`, `MAXSYMLINKS`).
const LINKS: usize = 40;

/// Whether a path may lead to a node of ours, by its last name: those that nodes have, and those of
/// links that usually lead to them (`/dev/char/M:N`, `/proc/self/fd/N`, `/dev/stdin`).
///
/// Almost every path that programs ask for ends here.
pub(super) fn may_be_ours(path: &[u8]) -> bool {
    let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    let numbers = |name: &[u8]| {
        name.iter()
            .all(|byte| byte.is_ascii_digit() || *byte == b':')
    };
    match name {
        b"" => false,
        b"iommu" | b"stdin" | b"stdout" | b"stderr" => true,
        name => numbers(name.strip_prefix(b"vfio").unwrap_or(name)),
    }
}

/// A walk for one caller.
pub(super) struct Walk<'a> {
    pub(super) nodes: &'a Nodes,
    pub(super) tid: i32,
    /// The file system that `/proc` is.
    pub(super) proc_dev: u64,
}

impl Walk<'_> {
    /// Opens what a path leads to with O_PATH. `dirfd` is where it begins, if it does not begin with
    /// a slash; `AT_FDCWD` too. `follow` says what to do with a link at its end.
    ///
    /// `AGAIN`: not without a server that is not ours. Otherwise an errno that the kernel would give,
    /// or one of ours: let it do the call.
    pub(super) fn open(&self, dirfd: i32, path: &[u8], follow: bool) -> Result<OwnedFd, Errno> {
        let root = self.proc("root")?;
        let mut at = if path.starts_with(b"/") {
            self.proc("root")?
        } else if dirfd == libc::AT_FDCWD {
            self.proc("cwd")?
        } else {
            self.proc(&format!("fd/{dirfd}"))?
        };
        let mut names: VecDeque<Vec<u8>> = split(path).collect();
        let mut links = 0;
        while let Some(name) = names.pop_front() {
            if name == b".." && FileId::at(&at, "")? == FileId::at(&root, "")? {
                continue;
            }
            if let Some(real) = self.own(&at, &name)? {
                for name in split(real.as_bytes()).rev() {
                    names.push_front(name);
                }
                continue;
            }
            let last = names.is_empty();
            let next = self.step(&at, &name)?;
            if (last && !follow) || !is_link(&next)? {
                at = next;
                continue;
            }
            links += 1;
            if links > LINKS {
                return Err(Errno::LOOP);
            }
            if FileId::at(&next, "")?.dev == self.proc_dev {
                // Its text is not where it leads; the kernel jumps there and asks nobody.
                at = openat(&at, &*name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
                continue;
            }
            self.may_ask(&next)?;
            let text = rustix::fs::readlinkat(&next, "", Vec::new())?;
            if text.as_bytes().starts_with(b"/") {
                at = openat(&root, ".", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
            }
            for name in split(text.as_bytes()).rev() {
                names.push_front(name);
            }
        }
        Ok(at)
    }

    /// Where `self` and `thread-self` of `/proc` lead the caller: for us they lead elsewhere.
    fn own(&self, at: &OwnedFd, name: &[u8]) -> Result<Option<String>, Errno> {
        /// The root's number on every procfs (`include/linux/proc_fs.h`, `PROC_ROOT_INO`).
        const ROOT: u64 = 1;
        if !matches!(name, b"self" | b"thread-self") {
            return Ok(None);
        }
        let id = FileId::at(at, "")?;
        if (id.dev, id.ino) != (self.proc_dev, ROOT) {
            return Ok(None);
        }
        let tgid = Caller::new(self.tid)?.tgid()?.as_raw_nonzero();
        Ok(Some(if name == b"self" {
            tgid.to_string()
        } else {
            format!("{tgid}/task/{}", self.tid)
        }))
    }

    /// A link below the caller's directory in `/proc`.
    fn proc(&self, name: &str) -> Result<OwnedFd, Errno> {
        openat(
            CWD,
            format!("/proc/{}/{name}", self.tid),
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
        )
    }

    /// The file of this name, a link itself.
    fn step(&self, at: &OwnedFd, name: &[u8]) -> Result<OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match openat2(at, name, flags, Mode::empty(), ResolveFlags::CACHED) {
            Err(Errno::AGAIN) => {
                self.may_ask(at)?;
                openat(at, name, flags, Mode::empty())
            }
            other => other,
        }
    }

    fn may_ask(&self, file: &OwnedFd) -> Result<(), Errno> {
        let dev = FileId::at(file, "")?.dev;
        if self.nodes.is_ours(dev) || is_local(self.tid, dev) {
            Ok(())
        } else {
            Err(Errno::AGAIN)
        }
    }
}

fn split(path: &[u8]) -> impl DoubleEndedIterator<Item = Vec<u8>> {
    path.split(|byte| *byte == b'/')
        .filter(|name| !name.is_empty() && *name != b".")
        .map(<[u8]>::to_vec)
}

fn is_link(file: &OwnedFd) -> Result<bool, Errno> {
    use rustix::fs::{AtFlags, StatxFlags, statx};
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::EMPTY_PATH;
    let stat = statx(file, "", flags, StatxFlags::TYPE)?;
    Ok(FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Symlink)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_nodes_have_are_looked_at() {
        for ours in [
            "/dev/vfio/devices/vfio0",
            "vfio17",
            "/dev/vfio/vfio",
            "/dev/vfio/12",
            "/dev/iommu",
            "/dev/char/511:0",
            "/proc/self/fd/5",
            "/dev/stdin",
        ] {
            assert!(may_be_ours(ours.as_bytes()), "{ours}");
        }
        for other in [
            "",
            "/",
            "/dev/vfio/",
            "/etc/passwd",
            "/dev/null",
            "libvfio.so",
            "vfio0x",
            "/usr/lib",
        ] {
            assert!(!may_be_ours(other.as_bytes()), "{other}");
        }
    }
}
