//! One open of the container node, and the groups in it.

use crate::caller::Caller;
use crate::device::{Binding, Device, GroupType};
use crate::model::IommuGroup;
use crate::{Errno, Result};
use std::sync::Arc;
use vfio_uapi::container::API_VERSION;
use vfio_uapi::ioctl::ContainerIoctl;

/// A container: one open of `/dev/vfio/vfio`, plus one reference per group in it.
#[derive(Debug)]
pub struct Container {
    _private: (),
}

impl Container {
    /// An empty container, for an open of the node.
    pub fn new() -> Arc<Container> {
        Arc::new(Container { _private: () })
    }

    /// The file is closed. Mappings stay while a group is attached.
    pub fn close(&self) {}

    /// An ioctl on the file. Returns what the client's `ioctl()` returns. What needs a backend is
    /// `EINVAL` before `VFIO_SET_IOMMU`, and a number nobody knows is `ENOTTY` after it.
    pub fn ioctl(self: &Arc<Self>, cmd: u32, _arg: u64, _caller: &dyn Caller) -> Result<u32> {
        match ContainerIoctl::try_from(cmd) {
            Ok(ContainerIoctl::GetApiVersion) => Ok(API_VERSION),
            _ => Err(Errno::INVAL),
        }
    }

    /// `VFIO_GROUP_SET_CONTAINER`: the group joins. Dropping the value takes it out again; with
    /// the last group the backend goes, and every mapping.
    pub(crate) fn attach(
        self: &Arc<Self>,
        _group: &Arc<IommuGroup>,
        _kind: GroupType,
    ) -> Result<Attached> {
        Err(Errno::INVAL)
    }
}

/// A group's membership in a container.
#[derive(Debug)]
pub(crate) struct Attached {
    _container: Arc<Container>,
}

impl Attached {
    /// First open of a device of the group: `EINVAL` before `VFIO_SET_IOMMU`. Dropping the value
    /// is the last close.
    pub(crate) fn open(&self, _device: &Device) -> Result<Box<dyn Binding>> {
        Err(Errno::INVAL)
    }
}
