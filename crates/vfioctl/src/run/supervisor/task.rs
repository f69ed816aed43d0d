//! The calling thread's descriptors and memory.

use client_process::Caller;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, openat, statx};
use rustix::io::Errno;
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
    pub(super) fn at(dir: impl rustix::fd::AsFd, name: &str) -> Result<FileId, Errno> {
        let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT | AtFlags::EMPTY_PATH;
        let stat = statx(dir, name, flags, StatxFlags::INO)?;
        Ok(FileId {
            dev: rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor),
            ino: stat.stx_ino,
        })
    }
}

/// Directories `/proc/TID/fd` of threads that called lately, for one thread of ours.
///
/// A look at a descriptor through its link there makes no copy of it, whose close would ask the server
/// of a stranger's file (FLUSH).
#[derive(Default)]
pub(super) struct Tables(HashMap<i32, OwnedFd>);

impl Tables {
    const KEPT: usize = 64;

    /// What a thread's descriptor is. `NOENT`: it is not open.
    pub(super) fn file_id(&mut self, tid: i32, fd: i32) -> Result<FileId, Errno> {
        if fd < 0 {
            return Err(Errno::NOENT);
        }
        let mut digits = [0; 11];
        let name = decimal(fd.cast_unsigned(), &mut digits);
        if let Some(table) = self.0.get(&tid) {
            let id = FileId::at(table, name);
            if id.is_ok() {
                return id;
            }
            // Its number may be another thread's by now.
            self.0.remove(&tid);
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let table = openat(CWD, format!("/proc/{tid}/fd"), flags, Mode::empty())?;
        let id = FileId::at(&table, name);
        if self.0.len() >= Self::KEPT {
            self.0.clear();
        }
        self.0.insert(tid, table);
        id
    }
}

/// A number as text, without memory of its own.
fn decimal(mut number: u32, digits: &mut [u8; 11]) -> &str {
    let mut at = digits.len();
    loop {
        at = at.saturating_sub(1);
        if let Some(digit) = digits.get_mut(at) {
            *digit = b'0' + u8::try_from(number % 10).unwrap_or(0);
        }
        number /= 10;
        if number == 0 {
            break;
        }
    }
    digits
        .get(at..)
        .and_then(|digits| std::str::from_utf8(digits).ok())
        .unwrap_or("0")
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
    fn numbers_are_written_as_format_writes_them() {
        for number in [0, 7, 10, 4_294_967_295, 1024] {
            assert_eq!(decimal(number, &mut [0; 11]), number.to_string());
        }
    }

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
