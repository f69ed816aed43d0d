//! A client's memory as a device reaches it: mapped files, copies, and the IOVA map.

use rustix::fd::BorrowedFd;
use rustix::io::Errno;

/// Memory of a device that its clients may map.
#[derive(Debug)]
pub struct DeviceMemory(std::os::fd::OwnedFd);

impl DeviceMemory {
    /// A memory file of `size` bytes.
    pub fn create(size: u64) -> Result<DeviceMemory, Errno> {
        let fd = rustix::fs::memfd_create("vfio", rustix::fs::MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&fd, size)?;
        Ok(DeviceMemory(fd))
    }
    /// Reads.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Errno> {
        rustix::io::pread(&self.0, buf, offset).map(drop)
    }
    /// Writes.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        rustix::io::pwrite(&self.0, data, offset).map(drop)
    }
    /// Takes it away from clients.
    pub fn revoke(&self) {
        let _ = rustix::fs::ftruncate(&self.0, 0);
    }
    /// True while others have it open or mapped.
    pub fn has_other_openers(&self) -> bool {
        false
    }
    /// The file.
    pub fn backing_fd(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.0.as_fd()
    }
}
