//! A client's memory as a device reaches it: mapped files, copies, and the IOVA map.
<<<<<<< HEAD

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
=======
//!
//! - [`IovaMap`] finds what an I/O address points at.
//! - [`Source`] is what it points at: a file ([`SharedFile`], mapped here once and used in place) or an
//!   address of the client ([`ProcessMemory`], in place where the client shares the memory, else copied).
//! - [`DeviceMemory`] is the other direction: memory of ours that clients map.
//!
//! Memory that another process can write, truncate or unmap is never a `&[u8]` here: only copies and
//! single loads and stores, which end in [`Fault`] where the memory is gone, never in SIGBUS.

pub mod fault;

mod device;
mod file;
mod iova;
mod region;
mod source;
mod sys;

pub use device::DeviceMemory;
pub use fault::Fault;
pub use fault::Scalar;
pub use file::FileRegistry;
pub use file::SharedFile;
pub use iova::IovaMap;
pub use iova::Range;
pub use rustix::io::Errno;
pub use source::ProcessMemory;
pub use source::Source;

/// Results here carry the errno that the client is to see.
pub type Result<T, E = Errno> = std::result::Result<T, E>;
>>>>>>> 5428416 (dma-memory: fault-safe access, shared files, device memory and the IOVA map)
