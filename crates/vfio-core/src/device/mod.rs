//! The life of a device.
//!
//! ```text
//!             alloc: slot, number, init            register: set, group, visible
//!   (nothing) ───────────────► UnregisteredDevice ──────────────► Registration ─┐
//!                                     │ drop                                    │ unregister: no new users
//!                                     ▼                                         ▼
//!   release ◄── last Device reference dropped ◄──── rundown ◄──────── Unregistering (asks, waits)
//!
//!   users:   Device::try_user ─► User ─ bind ─► session ─ drop: close, reference, count
//! ```
//!
//! Steps of one owner are types, consumed by the next step; what others can change at any moment
//! (registered? open?) are guards. A driver sees none of them: it implements [`DeviceOps`], and
//! its bus, which lives in this crate, does the rest.

mod direct;
mod dirty;
mod feature;
mod file;
mod handle;
mod housekeeper;
mod ioctl;
mod migration;
mod ops;
mod region;
mod set;
mod shared;
mod slot;
mod users;

#[cfg(all(test, not(feature = "shuttle")))]
mod tests;

pub use file::{DeviceFile, Opener};
pub use handle::{
    Device, Pending, Policy, Registration, UnregisteredDevice, Unregistering, User, WeakDevice,
};
pub use migration::{
    DataDirection, Form, Migratable, MigrationFlags, State as MigrationState, StepError,
};
pub use ops::{
    DeviceInfo, DeviceOps, Dma, DmaSpace, Feature, GfxPlane, GfxQuery, InitCx, IrqInfo, OpenCx,
    RegionCap, RegionInfo, RegionMemory, RegionPos, RequestChannel,
};
pub use shared::{GroupType, Life};
pub use slot::ReleaseSlot;

pub(crate) use housekeeper::{Housekeeper, LOOK};
pub(crate) use set::Sets;
pub(crate) use shared::{Binding, Head};
pub(crate) use users::Rundown;
