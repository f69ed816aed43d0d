#![expect(
    unsafe_code,
    reason = "a client's ioctls and mappings, and memcpy out of another process's memory as the limit of DMA"
)]
//! The system calls of the benchmarks that have no safe wrapper.

use std::ptr::NonNull;

use anyhow::Context;
use anyhow::Result;
use rustix::fd::AsFd;
use rustix::fd::AsRawFd;
use rustix::fd::FromRawFd;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::mm::MapFlags;
use rustix::mm::ProtFlags;

/// An ioctl whose argument is a structure of the VFIO or iommufd ABI that holds no address, or
/// only addresses of mappings that stay.
pub(super) fn ioctl<T>(fd: impl AsFd, cmd: u32, argument: &mut T) -> Result<i32, Errno> {
    let argument: *mut T = argument;
    // SAFETY: the commands of this benchmark read and write the structure they are given, up to
    // the size in its first field, which the callers fill from its type.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::c_ulong::from(cmd), argument) };
    if result < 0 {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    Ok(result)
}

/// An ioctl whose argument is a number.
pub(super) fn ioctl_value(fd: impl AsFd, cmd: u32, value: usize) -> Result<i32, Errno> {
    // SAFETY: the commands of this benchmark take it for a number.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::c_ulong::from(cmd), value) };
    if result < 0 {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    Ok(result)
}

/// VFIO_GROUP_GET_DEVICE_FD.
pub(super) fn device_fd(group: impl AsFd, name: &std::ffi::CStr) -> Result<OwnedFd, Errno> {
    let cmd = libc::c_ulong::from(vfio_uapi::ioctl::VFIO_GROUP_GET_DEVICE_FD);
    // SAFETY: the command reads a string that ends with a NUL; its result is a new descriptor.
    unsafe {
        let fd = libc::ioctl(group.as_fd().as_raw_fd(), cmd, name.as_ptr());
        if fd < 0 {
            return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Memory of this process, or of a file in memory; unmapped when dropped.
#[derive(Debug)]
pub(super) struct Mapped {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the memory belongs to no thread, and is only copied, never borrowed.
unsafe impl Send for Mapped {}

impl Mapped {
    /// Private anonymous memory, every page touched.
    pub(super) fn private(len: usize) -> Result<Self> {
        let flags = MapFlags::PRIVATE | MapFlags::POPULATE;
        // SAFETY: the kernel chooses the place, so nothing that exists is replaced.
        let base = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, Self::protection(), flags)
        };
        Self::new(base.context("mapping private memory")?.cast(), len)
    }

    /// The start of a file in memory, every page touched.
    pub(super) fn shared(file: impl AsFd, len: usize) -> Result<Self> {
        Self::file(file, len, MapFlags::SHARED | MapFlags::POPULATE)
    }

    /// The same, with no page touched before it is used.
    pub(super) fn untouched(file: impl AsFd, len: usize) -> Result<Self> {
        Self::file(file, len, MapFlags::SHARED)
    }

    fn file(file: impl AsFd, len: usize, flags: MapFlags) -> Result<Self> {
        let at = std::ptr::null_mut();
        // SAFETY: as above.
        let base = unsafe { rustix::mm::mmap(at, len, Self::protection(), flags, file, 0) };
        Self::new(base.context("mapping shared memory")?.cast(), len)
    }

    fn protection() -> ProtFlags {
        ProtFlags::READ | ProtFlags::WRITE
    }

    fn new(base: *mut u8, len: usize) -> Result<Self> {
        let base = NonNull::new(base).context("a mapping at address 0")?;
        Ok(Self { base, len })
    }

    /// Where it is.
    pub(super) fn address(&self) -> u64 {
        self.base.as_ptr().addr() as u64
    }

    /// Sets every byte.
    pub(super) fn fill(&self, byte: u8) {
        // SAFETY: valid for the length while `self` lives; nobody has a reference into it.
        unsafe { std::ptr::write_bytes(self.base.as_ptr(), byte, self.len) }
    }

    /// Copies from `offset` what fits into `buf`, as fast as the machine does it.
    pub(super) fn copy_to(&self, offset: usize, buf: &mut [u8]) {
        let within = offset
            .checked_add(buf.len())
            .is_some_and(|end| end <= self.len);
        assert!(within, "a copy outside the mapping");
        // SAFETY: both ranges are valid for the length, the mapping while `self` lives; others may
        // change the bytes meanwhile, and none of them is looked at.
        unsafe {
            let from = self.base.as_ptr().add(offset);
            std::ptr::copy_nonoverlapping(from, buf.as_mut_ptr(), buf.len());
        }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: exactly what was mapped, and no access can be running: each borrows `self`.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}
