//! The VFIO and iommufd user ABI: structures, numbers, capability chains; from bytes and to bytes.
//!
//! The source of every number is `include/uapi/linux/vfio.h` and `include/uapi/linux/iommufd.h` of Linux 7.3. Structures carry the
//! kernel's name without the prefix its module already says: `struct vfio_device_info` is [`device::Info`], `struct iommu_ioas_map` is
//! [`iommufd::IoasMap`]. All of them are plain old data: any bytes are a value, no byte of a value is padding, and flag words keep bits
//! that nobody knows, because refusing those is part of the contract.
//!
//! Nothing here does I/O. Reading an argument from a client goes through [`dialect`], over a [`dialect::UserMemory`] the caller brings.

#![forbid(unsafe_code)]

#[macro_use]
mod macros;

pub mod caps;
pub mod container;
pub mod device;
pub mod dialect;
pub mod group;
pub mod ioctl;
pub mod iommufd;
pub mod pci;
pub mod private;

pub use dialect::UserMemory;
