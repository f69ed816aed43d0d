//! Containers: `/dev/vfio/vfio` with a type1 backend (`drivers/vfio/container.c`,
//! `vfio_iommu_type1.c`).
//!
//! ```text
//!   client ── ioctl ─► Container ── SET_IOMMU ─► Type1 ── IovaMap ── Area ── memory of the client
//!                          ▲                      ▲  └── Dirty
//!   SET_CONTAINER ── Attached ── open ── Binding ─┘
//! ```
//!
//! Two locks, in this order, each held for lookups and changes only: the container's (its groups
//! and its backend), then the backend's. While client memory is read or written none is held; see
//! `dma` for what keeps an area meanwhile.
//!
//! Differences from the kernel are those of [`crate::iommufd`]: nothing is pinned, and an unmap of
//! memory that an access hangs on ends with `EBUSY`. A group of hardware makes a bad address fail
//! in `VFIO_IOMMU_MAP_DMA` itself, as pinning would; software devices find it out at the access.

mod dirty;
mod file;
mod ioctl;
mod type1;
mod unmap;

#[cfg(all(test, not(feature = "shuttle")))]
mod tests;

pub(crate) use file::Attached;
pub use file::{Container, DMA_ENTRY_LIMIT};
