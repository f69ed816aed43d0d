//! Who makes a call, and what a call can reach of them.

use crate::Result;
use crate::iommufd::Iommufd;
pub use client_process::Capability;
use client_process::Memory;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use vfio_uapi::UserMemory;

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

    /// The iommufd context behind a descriptor of the caller's: the open *file*, so copies made
    /// by dup, fork and SCM_RIGHTS are one context. `EBADF` when it is not open, `EBADFD` when
    /// it is something else (`vfio_get_iommufd_from_fd`).
    fn iommufd(&self, fd: i32) -> Result<Arc<Iommufd>>;

    /// A lasting hold on the caller's address space, for DMA.
    fn memory(&self) -> Result<Arc<Memory>>;
}
