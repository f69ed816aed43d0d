//! The file used as a VFIO container (`drivers/iommu/iommufd/vfio_compat.c`).

use super::Iommufd;
use crate::device::{Binding, Device};
use crate::{Errno, Result};
use std::sync::Arc;
use vfio_uapi::ioctl::ContainerIoctl;

/// Extensions that are answered without an IOAS: type1 in both versions, and unmapping all.
const EXTENSIONS: [u64; 3] = [1, 3, 9];
/// `VFIO_DMA_CC_IOMMU`, which is a matter of the devices in the IOAS.
const DMA_CC: u64 = 4;

impl Iommufd {
    /// What needs the container's IOAS is `ENODEV`.
    pub(super) fn compat_ioctl(&self, cmd: u32, arg: u64) -> Result<u32> {
        match ContainerIoctl::try_from(cmd)? {
            ContainerIoctl::GetApiVersion => Ok(0),
            ContainerIoctl::CheckExtension if arg == DMA_CC => match self.table().compat {
                Some(_) => Ok(1),
                None => Err(Errno::NODEV),
            },
            ContainerIoctl::CheckExtension => Ok(u32::from(EXTENSIONS.contains(&arg))),
            ContainerIoctl::SetIommu
            | ContainerIoctl::GetInfo
            | ContainerIoctl::MapDma
            | ContainerIoctl::UnmapDma => Err(Errno::NODEV),
            _ => Err(Errno::NOTTY),
        }
    }

    /// `VFIO_GROUP_SET_CONTAINER` with an iommufd file: makes the container's IOAS if there is
    /// none.
    pub(crate) fn compat_join(self: &Arc<Self>) -> Result {
        Err(Errno::INVAL)
    }

    /// First open of a device of a group whose container this is: binds it and attaches it to the
    /// container's IOAS. `ENODEV` when there is none. Dropping the value is the last close.
    pub(crate) fn compat_open(self: &Arc<Self>, _device: &Device) -> Result<Box<dyn Binding>> {
        Err(Errno::NODEV)
    }
}
