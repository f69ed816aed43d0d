//! The windows a client has mapped: where in its address space, and what is behind them.

use dma_memory::{FileRegistry, IovaMap, Range, SharedFile};
use slab::Slab;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::time::Duration;
use vfio_core::{Errno, Result};

/// All windows of one connection.
///
/// A million of them into sixteen files are sixteen mappings and a million entries of 32 bytes.
#[derive(Debug)]
pub(crate) struct Windows {
    table: RwLock<Table>,
    /// Accesses in progress, by the parity of the table's age at which they looked.
    inside: [AtomicU32; 2],
    /// Somebody waits for one of them to be 0.
    is_waited_for: AtomicBool,
    lock: Mutex<()>,
    left: Condvar,
    most: usize,
    most_files: usize,
}

#[derive(Debug, Default)]
struct Table {
    map: IovaMap<Window>,
    files: Slab<File>,
    /// Where in `files` a file is, by its address.
    places: HashMap<usize, usize>,
    registry: FileRegistry,
    /// Grows with each removal; only its parity matters.
    age: u32,
}

/// 16 bytes: there may be a million.
#[derive(Clone, Copy, Debug)]
struct Window {
    /// In the file.
    offset: u64,
    /// In the slab of files; [`NO_FILE`] for memory that is reached by messages.
    file: u32,
    flags: u32,
}

const NO_FILE: u32 = u32::MAX;
const READ: u32 = 1;
const WRITE: u32 = 2;

/// A file with windows into it.
#[derive(Debug)]
struct File {
    shared: Arc<SharedFile>,
    windows: u32,
}

/// What a device wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

/// A part of an access that lies in one window.
#[derive(Debug)]
pub(crate) struct Piece {
    /// `None`: ask the client.
    pub(crate) file: Option<Arc<SharedFile>>,
    /// In the file, or the I/O address.
    pub(crate) at: u64,
    pub(crate) len: usize,
}

/// An access in progress: until it is dropped, whoever unmaps waits.
#[derive(Debug)]
pub(crate) struct Inside<'a> {
    windows: &'a Windows,
    parity: usize,
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let left = self.windows.inside[self.parity].fetch_sub(1, Ordering::SeqCst) == 1;
        if left && self.windows.is_waited_for.load(Ordering::SeqCst) {
            drop(
                self.windows
                    .lock
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner),
            );
            self.windows.left.notify_all();
        }
    }
}

impl Windows {
    pub(crate) fn new(most: usize, most_files: usize) -> Windows {
        Windows {
            table: RwLock::default(),
            inside: Default::default(),
            is_waited_for: AtomicBool::new(false),
            lock: Mutex::new(()),
            left: Condvar::new(),
            most,
            most_files,
        }
    }

    /// DMA_MAP. `EINVAL` nothing to read or write, no or a wrapping range, a file that is not memory;
    /// `EACCES` a writable window into a file open for reading; `EEXIST` overlaps another window;
    /// `ENOSPC` too many windows, `EMFILE` too many files.
    pub(crate) fn map(
        &self,
        iova: u64,
        size: u64,
        (readable, writable): (bool, bool),
        file: Option<(OwnedFd, u64)>,
    ) -> Result {
        let range = Range::with_len(iova, size).map_err(|_| Errno::INVAL)?;
        let flags = u32::from(readable) * READ + u32::from(writable) * WRITE;
        if flags == 0 {
            return Err(Errno::INVAL);
        }
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let table = &mut *table;
        if table.map.len() >= self.most {
            return Err(Errno::NOSPC);
        }
        let Some((fd, offset)) = file else {
            let window = Window {
                offset: 0,
                file: NO_FILE,
                flags,
            };
            return table.map.insert(range, window);
        };
        if offset
            .checked_add(size)
            .is_none_or(|end| end > i64::MAX as u64)
        {
            return Err(Errno::INVAL);
        }
        if table.map.overlaps(range) {
            return Err(Errno::EXIST);
        }
        let shared = table.registry.open(fd)?;
        if writable && !shared.is_writable() {
            return Err(Errno::ACCESS);
        }
        let address = Arc::as_ptr(&shared).addr();
        let place = match table.places.get(&address) {
            Some(place) => *place,
            None if table.files.len() >= self.most_files => return Err(Errno::MFILE),
            None => {
                let place = table.files.insert(File { shared, windows: 0 });
                table.places.insert(address, place);
                place
            }
        };
        let window = Window {
            offset,
            // Bounded by the number of files.
            file: place as u32,
            flags,
        };
        table.map.insert(range, window)?;
        table.files[place].windows += 1;
        Ok(())
    }

    /// DMA_UNMAP: `ENOENT` unless it is exactly a window. On return no access can find it and none
    /// is in progress.
    pub(crate) fn unmap(&self, iova: u64, size: u64) -> Result {
        let range = Range::with_len(iova, size).map_err(|_| Errno::INVAL)?;
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        match table.map.find(iova) {
            Some((found, _)) if *found == range => {}
            _ => return Err(Errno::NOENT),
        }
        let gone = table
            .map
            .remove(iova)
            .and_then(|(_, window)| table.forget(window));
        let parity = table.age();
        drop(table);
        self.drain(parity);
        // Unmapping a file takes a while, and nobody needs to wait for it at the lock.
        drop(gone);
        Ok(())
    }

    /// Unmaps everything; as [`unmap`](Windows::unmap).
    pub(crate) fn clear(&self) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let gone = (
            std::mem::take(&mut table.map),
            std::mem::take(&mut table.files),
            std::mem::take(&mut table.places),
        );
        let parity = table.age();
        drop(table);
        self.drain(parity);
        drop(gone);
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.table
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .map
            .len()
    }

    /// The range of every window, in order.
    pub(crate) fn ranges(&self) -> Vec<Range> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.map.iter().map(|(range, _)| *range).collect()
    }

    /// Finds what `len` bytes at `iova` are, in order, and enters. `EINVAL` length 0, `EOVERFLOW` a
    /// wrap, `ENOENT` a hole, `EPERM` a window that does not allow it.
    pub(crate) fn find(
        &self,
        iova: u64,
        len: usize,
        access: Access,
        mut piece: impl FnMut(Piece),
    ) -> Result<Inside<'_>> {
        let range = Range::with_len(iova, len as u64)?;
        let need = match access {
            Access::Read => READ,
            Access::Write => WRITE,
        };
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        // Nearly always one window has all of it.
        let mut at = iova;
        let mut left = len as u64;
        loop {
            let (found, window) = table.map.find(at).ok_or(Errno::NOENT)?;
            if window.flags & need == 0 {
                return Err(Errno::PERM);
            }
            let here = found.last().min(range.last()) - at + 1;
            let within = at - found.start();
            piece(match table.files.get(window.file as usize) {
                Some(file) => Piece {
                    file: Some(Arc::clone(&file.shared)),
                    at: window.offset + within,
                    len: here as usize,
                },
                None => Piece {
                    file: None,
                    at,
                    len: here as usize,
                },
            });
            left -= here;
            if left == 0 {
                break;
            }
            at += here;
        }
        let parity = (table.age & 1) as usize;
        self.inside[parity].fetch_add(1, Ordering::SeqCst);
        Ok(Inside {
            windows: self,
            parity,
        })
    }

    /// Waits until those who looked before the table changed are gone. They copy memory and wait for
    /// nobody, so this ends.
    fn drain(&self, parity: usize) {
        if self.inside[parity].load(Ordering::SeqCst) == 0 {
            return;
        }
        self.is_waited_for.store(true, Ordering::SeqCst);
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while self.inside[parity].load(Ordering::SeqCst) != 0 {
            (guard, _) = self
                .left
                .wait_timeout(guard, Duration::from_millis(100))
                .unwrap_or_else(PoisonError::into_inner);
        }
        self.is_waited_for.store(false, Ordering::SeqCst);
    }
}

impl Table {
    /// One window less of its file; the file, if that was the last.
    fn forget(&mut self, window: Window) -> Option<File> {
        let place = window.file as usize;
        let file = self.files.get_mut(place)?;
        file.windows -= 1;
        if file.windows > 0 {
            return None;
        }
        self.places.remove(&Arc::as_ptr(&file.shared).addr());
        Some(self.files.remove(place))
    }

    /// A removal: later accesses count elsewhere. The parity of the earlier ones. The connection
    /// unmaps one after the other, so those before them have drained.
    fn age(&mut self) -> usize {
        let before = (self.age & 1) as usize;
        self.age = self.age.wrapping_add(1);
        before
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    const PAGE: u64 = 4096;
    const RW: (bool, bool) = (true, true);

    fn memory(size: u64) -> OwnedFd {
        let fd = memfd_create("windows", MemfdFlags::CLOEXEC).expect("a memfd");
        ftruncate(&fd, size).expect("sized");
        fd
    }

    fn dup(fd: &OwnedFd) -> OwnedFd {
        fd.try_clone().expect("a descriptor")
    }

    fn pieces(
        windows: &Windows,
        iova: u64,
        len: usize,
        access: Access,
    ) -> Result<Vec<(bool, u64, usize)>> {
        let mut got = Vec::new();
        windows
            .find(iova, len, access, |piece| {
                got.push((piece.file.is_some(), piece.at, piece.len));
            })
            .map(|_| got)
    }

    #[test]
    fn accesses_by_table() {
        let windows = Windows::new(10, 10);
        let file = memory(8 * PAGE);
        windows
            .map(0x1000, PAGE, RW, Some((dup(&file), 2 * PAGE)))
            .unwrap();
        windows.map(0x2000, PAGE, (true, false), None).unwrap();
        windows
            .map(0x4000, PAGE, (false, true), Some((dup(&file), 0)))
            .unwrap();
        use Access::{Read, Write};
        assert_eq!(
            pieces(&windows, 0x1ff0, 32, Read),
            Ok(vec![(true, 2 * PAGE + 0xff0, 16), (false, 0x2000, 16)])
        );
        assert_eq!(pieces(&windows, 0x1ff0, 32, Write), Err(Errno::PERM));
        assert_eq!(pieces(&windows, 0x2ff0, 32, Read), Err(Errno::NOENT));
        assert_eq!(pieces(&windows, 0x4000, 4, Read), Err(Errno::PERM));
        assert_eq!(pieces(&windows, 0x4000, 4, Write), Ok(vec![(true, 0, 4)]));
        assert_eq!(pieces(&windows, 0x1000, 0, Read), Err(Errno::INVAL));
        assert_eq!(pieces(&windows, u64::MAX, 2, Read), Err(Errno::OVERFLOW));
        assert_eq!(pieces(&windows, u64::MAX, 1, Read), Err(Errno::NOENT));
    }

    #[test]
    fn maps_by_table() {
        let windows = Windows::new(3, 1);
        let file = memory(2 * PAGE);
        let some = || Some((dup(&file), 0));
        let map = |iova, size, access, file| windows.map(iova, size, access, file);
        assert_eq!(map(0, 0, RW, some()), Err(Errno::INVAL));
        assert_eq!(map(0, PAGE, (false, false), some()), Err(Errno::INVAL));
        assert_eq!(map(u64::MAX, 2, RW, None), Err(Errno::INVAL));
        assert_eq!(
            map(0, PAGE, RW, Some((dup(&file), u64::MAX))),
            Err(Errno::INVAL)
        );
        let not_memory = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        assert_eq!(map(0, PAGE, RW, Some((not_memory, 0))), Err(Errno::INVAL));
        assert_eq!(map(PAGE, PAGE, RW, some()), Ok(()));
        assert_eq!(map(PAGE, PAGE, RW, some()), Err(Errno::EXIST));
        assert_eq!(map(2 * PAGE - 1, 1, RW, None), Err(Errno::EXIST));
        let other = memory(PAGE);
        assert_eq!(
            map(0, PAGE, RW, Some((dup(&other), 0))),
            Err(Errno::MFILE),
            "one file only"
        );
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let reading: OwnedFd = std::fs::File::open(path).unwrap().into();
        assert_eq!(
            map(0, PAGE, RW, Some((dup(&reading), 0))),
            Err(Errno::ACCESS)
        );
        assert_eq!(map(u64::MAX, 1, RW, None), Ok(()), "the very last address");
        assert_eq!(map(0, PAGE, RW, some()), Ok(()));
        assert_eq!(map(8 * PAGE, PAGE, RW, None), Err(Errno::NOSPC));
        assert_eq!(windows.unmap(0, PAGE), Ok(()));
        assert_eq!(windows.unmap(0, PAGE), Err(Errno::NOENT));
        assert_eq!(windows.unmap(PAGE, PAGE - 1), Err(Errno::NOENT));
        assert_eq!(windows.unmap(PAGE + 1, PAGE - 1), Err(Errno::NOENT));
        assert_eq!(windows.unmap(PAGE, PAGE), Ok(()));
        assert_eq!(
            map(0, PAGE, RW, Some((other, 0))),
            Ok(()),
            "the other file is gone with its last window"
        );
        windows.clear();
        assert_eq!(windows.len(), 0);
        assert_eq!(map(0, PAGE, RW, some()), Ok(()));
    }

    #[test]
    fn an_unmap_waits_for_accesses_in_progress() {
        let windows = Arc::new(Windows::new(10, 10));
        let file = memory(PAGE);
        windows.map(0, PAGE, RW, Some((dup(&file), 0))).unwrap();
        windows.map(PAGE, PAGE, RW, Some((file, 0))).unwrap();
        let inside = windows.find(0, 8, Access::Read, drop).unwrap();
        let (sender, done) = std::sync::mpsc::channel();
        let unmapper = Arc::clone(&windows);
        let thread = std::thread::spawn(move || {
            unmapper.unmap(0, PAGE).unwrap();
            sender.send(()).unwrap();
        });
        // It has begun when the window cannot be found any more.
        let end = std::time::Instant::now() + Duration::from_secs(20);
        while windows.find(0, 8, Access::Read, drop).is_ok() {
            assert!(std::time::Instant::now() < end);
            std::thread::yield_now();
        }
        // Others come and go, and do not end the wait.
        for _ in 0..100 {
            drop(windows.find(PAGE, 8, Access::Read, drop).unwrap());
        }
        assert!(done.try_recv().is_err(), "one is still inside");
        drop(inside);
        done.recv_timeout(Duration::from_secs(20)).unwrap();
        thread.join().unwrap();
    }
}
