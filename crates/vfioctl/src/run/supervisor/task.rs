//! The calling thread's descriptors and memory.

use client_process::{Caller, Thread};
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, openat, statx};
use rustix::io::Errno;
use rustix::path::{Arg, DecInt};
use std::collections::HashMap;

/// Longest path of the kernel, its NUL included.
const PATH_MAX: usize = 4096;

/// Device and inode of an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileId {
    pub(super) dev: u64,
    pub(super) ino: u64,
}

impl FileId {
    /// Of `name` below `dir`, following links, or of `dir` itself if it is empty. Asks no file system's
    /// server.
    pub(super) fn at(dir: impl rustix::fd::AsFd, name: impl Arg) -> Result<FileId, Errno> {
        let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT | AtFlags::EMPTY_PATH;
        let stat = statx(dir, name, flags, StatxFlags::INO)?;
        Ok(FileId {
            dev: rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor),
            ino: stat.stx_ino,
        })
    }
}

/// Descriptor tables of threads that called lately, for one thread of ours.
///
/// A look at a descriptor through its link in `/proc/TID/fd` makes no copy of it, whose close would ask
/// the server of a stranger's file (FLUSH).
pub(super) struct Tables {
    tables: HashMap<i32, Table>,
    /// How many are kept.
    room: usize,
}

impl Default for Tables {
    fn default() -> Tables {
        // Each has two descriptors, and what else is needed for a call is to find some.
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let room = limit.and_then(|limit| usize::try_from(limit / 16).ok());
        Tables {
            tables: HashMap::new(),
            room: room.unwrap_or(Tables::KEPT).clamp(1, Tables::KEPT),
        }
    }
}

struct Table {
    /// `/proc/TID/fd`.
    dir: OwnedFd,
    /// `None` before Linux 6.9.
    thread: Option<Thread>,
    /// The descriptor that was a group of ours the last time.
    group: Option<i32>,
}

impl Tables {
    const KEPT: usize = 64;

    /// What a thread's descriptor is. `NOENT`: it is not open.
    pub(super) fn file_id(&mut self, tid: i32, fd: i32) -> Result<FileId, Errno> {
        if fd < 0 {
            return Err(Errno::NOENT);
        }
        let name = DecInt::new(fd);
        if let Some(table) = self.tables.get(&tid) {
            let id = FileId::at(&table.dir, name.as_c_str());
            if id.is_ok() {
                return id;
            }
            // Its number may be another thread's by now.
            self.tables.remove(&tid);
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let path = format!("/proc/{tid}/fd");
        let dir = match openat(CWD, &*path, flags, Mode::empty()) {
            // Threads that have ended may be among those that are kept.
            Err(Errno::MFILE) if !self.tables.is_empty() => {
                self.tables.clear();
                openat(CWD, &*path, flags, Mode::empty())?
            }
            other => other?,
        };
        let id = FileId::at(&dir, name.as_c_str());
        if self.tables.len() >= self.room {
            self.tables.clear();
        }
        let table = Table {
            dir,
            thread: None,
            group: None,
        };
        self.tables.insert(tid, table);
        id
    }

    /// Notes that a thread's descriptor is a group of ours.
    pub(super) fn note_group(&mut self, caller: Caller, fd: i32) {
        if let Some(table) = self.tables.get_mut(&caller.tid().as_raw_nonzero().get()) {
            table.group = Some(fd);
            if table.thread.is_none() {
                table.thread = caller.hold().ok();
            }
        }
    }

    /// Whether a thread's descriptor was a group of ours the last time.
    pub(super) fn was_group(&self, tid: i32, fd: i32) -> bool {
        self.tables
            .get(&tid)
            .is_some_and(|table| table.group == Some(fd))
    }

    /// A copy of what was a group of ours the last time, unless the thread is another: it may be any
    /// file by now.
    pub(super) fn group_again(&mut self, tid: i32, fd: i32) -> Option<OwnedFd> {
        let table = self.tables.get_mut(&tid)?;
        // It is noted again when it proves to be one.
        if table.group.take() != Some(fd) {
            return None;
        }
        let copy = table.thread.as_ref()?.get_fd(fd);
        if copy.is_err() {
            table.thread = None;
        }
        copy.ok()
    }
}

/// Copies a string from the caller, without its NUL.
///
/// `FAULT`: it cannot be read. `NAMETOOLONG`: no NUL within 4096 bytes.
pub(super) fn string(caller: Caller, addr: u64) -> Result<Vec<u8>, Errno> {
    // Most are short, and within a page.
    let mut bytes = vec![0; 256];
    let mut done = 0;
    loop {
        let buf = bytes.get_mut(done..).unwrap_or_default();
        let wanted = buf.len();
        let from = addr.checked_add(done as u64).ok_or(Errno::FAULT)?;
        let copied = caller.copy_in_prefix(from, buf)?;
        let copied = buf.get(..copied).unwrap_or_default();
        if let Some(end) = copied.iter().position(|byte| *byte == 0) {
            bytes.truncate(done + end);
            return Ok(bytes);
        }
        if copied.len() < wanted {
            return Err(Errno::FAULT);
        }
        done = bytes.len();
        if done >= PATH_MAX {
            return Err(Errno::NAMETOOLONG);
        }
        bytes.resize(PATH_MAX, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_end_within_a_page_or_not_at_all() {
        let me = Caller::new(rustix::process::getpid().as_raw_nonzero().get()).unwrap();
        let mut bytes = vec![b'x'; 5000];
        let at = |bytes: &Vec<u8>| string(me, bytes.as_ptr() as u64);
        for end in [0, 1, 255, 256, 257, 4095] {
            bytes[end] = 0;
            assert_eq!(at(&bytes).unwrap().len(), end);
            bytes[end] = b'x';
        }
        bytes[4096] = 0;
        assert_eq!(at(&bytes), Err(Errno::NAMETOOLONG));
        assert_eq!(string(me, 0), Err(Errno::FAULT));
        assert_eq!(string(me, u64::MAX - 4), Err(Errno::FAULT));
    }

    /// In a process of its own, which has few descriptors.
    #[test]
    fn without_a_descriptor_left_the_tables_of_others_are_given_up() {
        const FEW: &str = "VFIOCTL_TEST_FEW_DESCRIPTORS";
        if std::env::var_os(FEW).is_none() {
            let name = "run::supervisor::task::tests::without_a_descriptor_left_the_tables_of_others_are_given_up";
            let own = std::process::Command::new(std::env::current_exe().unwrap())
                .args([name, "--exact", "--nocapture"])
                .env(FEW, "1")
                .output()
                .unwrap();
            assert!(own.status.success(), "{own:?}");
            return;
        }
        let own = rustix::thread::gettid().as_raw_nonzero().get();
        let mut tables = Tables::default();
        assert!(tables.file_id(own, 0).is_ok());
        let mut all = Vec::new();
        while let Ok(file) = std::fs::File::open("/dev/null") {
            all.push(file);
            if all.len() == 64 {
                let open = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64;
                let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
                limit.current = Some(open);
                rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
            }
        }
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let other = rustix::thread::gettid().as_raw_nonzero().get();
                assert!(
                    tables.file_id(other, 0).is_ok(),
                    "it takes the place of the first"
                );
            });
        });
        assert!(tables.file_id(own, 0).is_ok());
        assert!(Tables::default().room < Tables::KEPT, "few are kept");
    }

    #[test]
    fn a_descriptor_is_known_by_its_link() {
        let file = tempfile::tempfile().unwrap();
        let mut tables = Tables::default();
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        let fd = rustix::fd::AsRawFd::as_raw_fd(&file);
        let id = FileId::at(&file, "").unwrap();
        for _ in 0..2 {
            assert_eq!(tables.file_id(tid, fd), Ok(id));
        }
        drop(file);
        assert_ne!(tables.file_id(tid, fd), Ok(id));
        assert_eq!(tables.file_id(tid, -1), Err(Errno::NOENT));
        assert_eq!(tables.file_id(i32::MAX, 0), Err(Errno::NOENT));
    }
}
