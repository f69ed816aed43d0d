//! The VFIO core: life cycle, device model, buses, iommufd objects.
//!
//! What the kernel keeps in `drivers/vfio` and `drivers/iommu/iommufd`, as a library. A driver
//! (a type that implements [`device::DeviceOps`]) writes no life-cycle code at all: the core
//! allocates, registers, counts, waits and releases. A transport (FUSE files, a socket, a test)
//! turns what a client sends into calls on [`device::DeviceFile`] and
//! [`iommufd::Iommufd`], and knows nothing of drivers.

#![forbid(unsafe_code)]

pub mod caller;
pub mod container;
mod core;
pub mod device;
mod dma;
pub mod event;
mod few;
pub mod group;
pub mod index;
pub mod iommufd;
pub mod irq;
pub mod model;
mod sync;
pub mod sysfs;

pub use self::core::{Config, Core};
pub use rustix::io::Errno;

/// The kernel's way of failing: an errno and nothing else.
pub type Result<T = (), E = Errno> = std::result::Result<T, E>;
