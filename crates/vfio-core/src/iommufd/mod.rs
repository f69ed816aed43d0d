//! iommufd: contexts, IOASes, accesses and page tables (`drivers/iommu/iommufd`).

use crate::Result;
use crate::caller::Caller;
use crate::device::{Binding, Device};
use std::sync::Arc;

/// A context: one open of `/dev/iommu`, plus one reference per device bound to it.
#[derive(Debug, Default)]
pub struct Iommufd {}

impl Iommufd {
    /// A fresh context, for an open of the node.
    pub fn new() -> Arc<Iommufd> {
        Arc::default()
    }

    /// An ioctl on the file. Returns what the client's `ioctl()` returns.
    pub fn ioctl(self: &Arc<Self>, _cmd: u32, _arg: u64, _caller: &dyn Caller) -> Result<u32> {
        Err(crate::Errno::NOTTY)
    }

    /// The file is closed: what the user can destroy is destroyed; bound devices keep the rest.
    pub fn close(&self) {}

    /// Binds a device: an *access* object for an emulated one, a *device* object for a physical
    /// one (`EPERM` when its group's DMA belongs to another context).
    pub(crate) fn bind(self: &Arc<Self>, _device: &Device) -> Result<Box<dyn Binding>> {
        Err(crate::Errno::NODEV)
    }
}
