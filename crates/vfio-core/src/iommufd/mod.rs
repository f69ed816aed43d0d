//! iommufd: contexts, IOASes, accesses and page tables (`drivers/iommu/iommufd`).
//!
//! ```text
//!   client ── ioctl ─► Iommufd ── Table ─┬─ Ioas ── IovaMap ── Area ── memory of the client
//!                                        ├─ Hwpt ──┘ ▲
//!   driver ── Dma ─► Port ── Route ──────┼───────────┘
//!                     ▲                  │
//!   BIND, ATTACH ── Binding ─────────────┴─ Bound (access or device object)
//! ```
//!
//! Three locks, in this order, each held for lookups and changes only: the table of a context,
//! then one IOAS or one port. While client memory is read or written none of them is held, since
//! it may never answer; what keeps an area from being unmapped meanwhile is a count with a
//! gate, and whoever unmaps waits for it, not for ever.
//!
//! Differences from the kernel, all on purpose: nothing is pinned, so `RLIMIT_MEMLOCK` does not
//! matter, memory that the client unmaps after mapping it for DMA is `EFAULT` at the access, and
//! a memory file cut short is `EFAULT` too. A descriptor that is not memory is refused by
//! `IOMMU_IOAS_MAP_FILE` itself, not at the first access. An unmap of memory that an access hangs
//! on ends with `EBUSY`. Page tables have no dirty tracking, no nesting, no PASIDs and no faults.

mod attach;
mod commands;
mod compat;
mod context;
mod hwpt;
mod ioas;
mod table;

#[cfg(all(test, not(feature = "shuttle")))]
pub(crate) mod testing;
#[cfg(all(test, not(feature = "shuttle")))]
mod tests;

pub(crate) use compat::Joined;
pub use context::Iommufd;
