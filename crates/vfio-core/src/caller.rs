//! Who makes a call, and what a call can reach of them.

use crate::container::Container;
use crate::device::DeviceFile;
use crate::group::GroupFile;
use crate::iommufd::Iommufd;
use crate::{Errno, Result};
pub use client_process::Capability;
use client_process::Memory;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use vfio_uapi::UserMemory;

/// What a client's descriptor is, told by the open *file* behind it: copies made by dup, fork and
/// SCM_RIGHTS are one file.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum FileObject {
    /// A context.
    Iommufd(Arc<Iommufd>),
    /// A container.
    Container(Arc<Container>),
    /// A group.
    Group(Arc<GroupFile>),
    /// A device, from its own node or from a group.
    Device(Arc<DeviceFile>),
    /// None of ours.
    Other,
}

/// The process behind an ioctl: its memory, its descriptors, its rights.
///
/// A transport implements this for the length of one call. Every method may be slow, and those
/// that touch the client's memory may wait for as long as the client likes (a page that a
/// userfaultfd never serves), so none is called with a core lock held.
pub trait Caller: UserMemory {
    /// Thread group id, as this process sees it. 0 when it cannot be told.
    fn pid(&self) -> u32;

    /// The command name, for messages.
    fn comm(&self) -> String;

    /// True if the caller has the capability.
    fn capable(&self, capability: Capability) -> bool;

    /// A duplicate of the caller's descriptor. `EBADF` when it is not open, or opened with
    /// `O_PATH`.
    fn get_fd(&self, fd: i32) -> Result<OwnedFd>;

    /// What a descriptor of the caller's is. `EBADF` when it is not open, or opened with `O_PATH`.
    fn file(&self, fd: i32) -> Result<FileObject>;

    /// The iommufd context behind a descriptor of the caller's. `EBADF` when it is not open,
    /// `EBADFD` when it is something else (`vfio_get_iommufd_from_fd`).
    fn iommufd(&self, fd: i32) -> Result<Arc<Iommufd>> {
        match self.file(fd)? {
            FileObject::Iommufd(context) => Ok(context),
            _ => Err(Errno::BADFD),
        }
    }

    /// A lasting hold on the caller's address space, for DMA.
    fn memory(&self) -> Result<Arc<Memory>>;

    /// [`copy_in`](UserMemory::copy_in), with what [`memory`](Caller::memory) returns if it can be
    /// told at the same time; `None` says nothing.
    fn copy_in_known(&self, addr: u64, buf: &mut [u8]) -> Result<Option<Arc<Memory>>> {
        self.copy_in(addr, buf).map(|()| None)
    }
}
