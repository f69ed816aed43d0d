//! The mediated device bus (`drivers/vfio/mdev`): parents, types, and software devices made by
//! writing a uuid to a type's `create`.

use super::BusDevice;
use crate::Result;
use crate::device::{DeviceOps, ReleaseSlot};
use std::sync::Arc;

/// A kind of mediated device that a driver can make (`struct mdev_type`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Type {
    /// Its directory is `<driver of the parent, else its bus, else its class>-<sysfs_name>`:
    /// `1` makes `mtty-1`.
    pub sysfs_name: &'static str,
    /// The text of `name`; without it, `sysfs_name`.
    pub pretty_name: Option<&'static str>,
}

/// A driver of mediated devices (`struct mdev_driver`): how the mdev bus makes one.
///
/// The bus allocates and registers the device when a uuid is written to `create`, and
/// unregisters it when it is removed or unbound; the driver has no part in that. One value may
/// serve several parents.
pub trait Driver: Send + Sync + 'static {
    /// The devices it makes.
    type Ops: DeviceOps;

    /// Its name under `/sys/bus/mdev/drivers`: `mtty`.
    fn name(&self) -> &'static str;

    /// The text of `device_api`: which kind of VFIO device a client gets.
    fn device_api(&self) -> &'static str {
        "vfio-pci"
    }

    /// What it can make, in the order of the directories. Asked once, when a parent is registered.
    fn types(&self) -> Vec<Type>;

    /// The number in `available_instances`. The bus does not look at it when a device is
    /// created: [`args`](Driver::args) or `init` refuses. `None`: the bus counts, per parent and
    /// for all types together, from [`max_instances`](Driver::max_instances) down, and refuses
    /// with `EUSERS`.
    fn available_instances(&self, ty: &Type) -> Option<u32> {
        let _ = ty;
        None
    }

    /// Where the bus's own count starts, for each parent.
    fn max_instances(&self) -> u32 {
        u32::MAX
    }

    /// The text of `description`. Without one for a type, the type has no such file.
    fn description(&self, ty: &Type) -> Option<String> {
        let _ = ty;
        None
    }

    /// What `init` gets for a new device of this type. Its errno is that of the write to
    /// `create` (`ENOSPC` when the parent has no more to give).
    fn args(&self, device: &Arc<BusDevice>, ty: &Type) -> Result<<Self::Ops as DeviceOps>::Args>;

    /// The place the device is to occupy in a structure of somebody else's, if it is not to
    /// stand for itself; see [`ReleaseSlot`].
    fn slot(&self, device: &Arc<BusDevice>) -> Option<Arc<ReleaseSlot>> {
        let _ = device;
        None
    }

    /// Its module parameters, as `/sys/module/<name>/parameters` shows them.
    fn parameters(&self) -> Vec<(&'static str, String)> {
        Vec::new()
    }
}
