//! System calls of the client and of its private place that have no safe wrapper.
#![expect(
    unsafe_code,
    reason = "raw ioctls and mappings are what a VFIO program is made of"
)]

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use rustix::thread::UnshareFlags;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use zerocopy::{FromBytes, IntoBytes};

/// `ioctl(2)` with a structure that the other side reads and writes.
pub(super) fn ioctl<T: FromBytes + IntoBytes>(
    file: &File,
    cmd: u32,
    arg: &mut T,
) -> Result<u32, Errno> {
    // SAFETY: the pointer is to a whole T for the length of the call, any bytes make a T, and
    // the structures say themselves how long they are (argsz, size). A file that is not ours
    // does not know these numbers.
    let answer = unsafe { libc::ioctl(file.as_raw_fd(), cmd.into(), &raw mut *arg) };
    u32::try_from(answer).map_err(|_| last())
}

fn last() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Gives this process, which has one thread, namespaces of its own.
pub(super) fn unshare(flags: UnshareFlags) -> Result<(), Errno> {
    // SAFETY: only CLONE_FILES and CLONE_FS could break what other code relies on; neither is
    // ever asked for here.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}

/// Memory of this process, its own or a device's.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the memory belongs to the value and is only used through it.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Fresh memory of whole pages.
    pub(super) fn anonymous(len: usize) -> Result<Mapping, Errno> {
        // SAFETY: a new mapping at a place the kernel chooses touches nothing that exists.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }?;
        Mapping::own(start, len)
    }

    /// A region of a device.
    pub(super) fn of(file: impl AsFd, len: usize, offset: u64) -> Result<Mapping, Errno> {
        // SAFETY: as above.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file,
                offset,
            )
        }?;
        Mapping::own(start, len)
    }

    fn own(start: *mut std::ffi::c_void, len: usize) -> Result<Mapping, Errno> {
        let start = NonNull::new(start.cast()).ok_or(Errno::FAULT)?;
        Ok(Mapping { start, len })
    }

    /// Where it is, for a call that takes an address.
    pub(super) fn address(&self) -> u64 {
        self.start.as_ptr().expose_provenance() as u64
    }

    /// Bytes.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Stores bytes, one by one, as a program stores pixels. What would lie beyond the end is left.
    pub(super) fn store(&mut self, offset: usize, data: &[u8]) {
        let room = self.len.saturating_sub(offset);
        for (n, byte) in data.iter().take(room).enumerate() {
            // SAFETY: offset + n is below the length of the mapping, which this value owns.
            unsafe { self.start.add(offset + n).write_volatile(*byte) };
        }
    }

    /// The signal that a process dies of that touches the memory now, tried by a copy of this
    /// process; none if it lives.
    pub(super) fn deadly(&self) -> Result<Option<i32>, Errno> {
        // SAFETY: the process has one thread (the client is a program of its own), and the child
        // calls nothing but setrlimit, a load and _exit.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let none = libc::rlimit {
                rlim_cur: 0,
                rlim_max: 0,
            };
            // SAFETY: a valid structure; no core file for a death that is wanted.
            unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) };
            // SAFETY: the address is mapped; what it means when the pages are gone is the
            // question, and the answer is a signal to this child.
            let byte = unsafe { self.start.read_volatile() };
            // SAFETY: ends this child, and runs nothing of the parent's.
            unsafe { libc::_exit(i32::from(byte & 1)) };
        }
        let child = rustix::process::Pid::from_raw(child)
            .filter(|_| child > 0)
            .ok_or_else(last)?;
        let status = rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty())?;
        Ok(status.and_then(|(_, status)| status.terminating_signal()))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and nothing borrows from it.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}
