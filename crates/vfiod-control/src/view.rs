//! What there is, in the words of the kernel: devices, groups, types, holders.
//!
//! Field names are part of the JSON schema [`SCHEMA`]: one may be added at any time, a change of
//! meaning raises the number.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Version of what `vfioctl --json` prints and of the descriptions on the control socket.
pub const SCHEMA: u32 = 1;

/// A device that VFIO has, could have or is about to let go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// `vfioN`; absent when no VFIO device is registered for it. The number is the lowest free
    /// one at the time, so the name is not stable over time; the address is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its name on its bus: a PCI address, a UUID.
    pub address: String,
    /// Its bus, if it is on one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bus: Option<String>,
    /// Its directory below `/sys`, starting with `/devices/`.
    pub path: String,
    /// The driver bound to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// The type of a mediated device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mdev_type: Option<String>,
    /// Number of its IOMMU group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iommu_group: Option<u32>,
    /// `MAJOR:MINOR` of its char device; absent on kernels without one
    /// (`CONFIG_VFIO_DEVICE_CDEV=n`) and with `cdev = false`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cdev: Option<String>,
    /// The node a program opens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The sockets at which it is offered to clients that speak vfio-user.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sockets: Vec<Socket>,
    /// Where in its life it is.
    pub state: State,
    /// Open files of it, whoever has them now; absent when it cannot be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub users: Option<u32>,
    /// True from the first BIND to the last close; absent when it cannot be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub open: Option<bool>,
    /// Who has it open, as far as a cheap look tells; absent when nobody looked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holders: Option<Vec<Holder>>,
    /// Set while an unregister waits for users.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending: Option<Pending>,
}

impl Device {
    /// The name people know it by: `vfioN` if it has one, else its address.
    pub fn label(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.address)
    }
}

/// A socket at which a device is offered over vfio-user.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Socket {
    /// Its path.
    pub path: String,
    /// Who is connected, once it may use the device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<Holder>,
    /// The clients that were refused last, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub refused: Vec<Refusal>,
}

/// A client that was not served.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Microseconds since the epoch.
    pub at_us: u64,
    /// Process id; 0 when it cannot be told.
    pub pid: u32,
    /// User id.
    pub uid: u32,
    /// Command name.
    pub command: String,
    /// Why, for people.
    pub reason: String,
}

/// Where in its life a device is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// No VFIO device is registered for it.
    #[default]
    Unbound,
    /// Registered: it may be opened.
    Registered,
    /// Its unregister has begun: the names are gone, users may remain.
    Unregistering,
    /// Its users were cut off, or its driver failed: every call gets `ENODEV`.
    Dead,
}

impl State {
    /// As it is printed.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Unbound => "unbound",
            State::Registered => "registered",
            State::Unregistering => "unregistering",
            State::Dead => "dead",
        }
    }
}

/// An unregister that goes on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// `vfioN`.
    pub device: String,
    /// Its name on its bus.
    pub address: String,
    /// Milliseconds since it began.
    pub for_ms: u64,
    /// Open files that remain.
    pub users: u32,
    /// How often the driver was asked to make its users let go.
    pub requests: u32,
    /// False when it had no way to: the users took no request interrupt and leave by themselves or
    /// not at all. Absent when it has not been asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asked: Option<bool>,
    /// Milliseconds until its users are cut off; absent when it waits for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// Who it waits for.
    pub holders: Vec<Holder>,
}

/// A process that holds a device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Process id.
    pub pid: u32,
    /// Command name, at most 15 bytes.
    pub command: String,
    /// Microseconds since the epoch: when it opened the device if `since_open`, else when the
    /// process started (the kernel records nothing closer for a descriptor that was inherited or
    /// passed).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since_us: Option<u64>,
    /// What `since_us` is.
    #[serde(default)]
    pub since_open: bool,
    /// Its descriptors.
    #[serde(default)]
    pub fds: Vec<i32>,
    /// Bytes of its address space that map the device; they hold it without any descriptor.
    #[serde(default)]
    pub mapped_bytes: u64,
    /// How it holds it.
    #[serde(default)]
    pub via: Via,
    /// With [`Via::Socket`]: the user id that it connected with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// With [`Via::Socket`]: the path of the socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
    /// With [`Via::Socket`]: what speaks, by its handshake: `QEMU`, `rust vfio_user`, `SPDK`, `libvfio-user` or `unknown`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<String>,
}

/// What a holder holds.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Via {
    /// The device: its node, a descriptor made from it, a mapping of it.
    #[default]
    Device,
    /// The node of its IOMMU group: nothing says which devices of the group it uses.
    Group,
    /// A connection to a vfio-user socket of the device.
    Socket,
    /// It opened the device and has no descriptor of it any more; someone else has.
    Opener,
}

/// An IOMMU group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Its number.
    pub id: u32,
    /// Its `name` file: `vfio-noiommu` for software devices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its `type` file: the domain type of a hardware group.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// `MAJOR:MINOR` of its char device, if VFIO has one for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cdev: Option<String>,
    /// The node a program opens, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// True while the node is open, or a device that was opened through a container keeps it so;
    /// absent when it cannot be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub open: Option<bool>,
    /// Everything in it.
    pub members: Vec<Member>,
}

/// A device in a group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its name on its bus.
    pub address: String,
    /// The driver bound to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// True if its driver keeps the group from being used: it is bound to one that is not VFIO
    /// (`drivers/iommu/iommu.c`, `iommu_group_claim_dma_owner`).
    #[serde(default)]
    pub blocks: bool,
}

/// Something mediated devices are made of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    /// Its name in `/sys/class/mdev_bus`.
    pub name: String,
    /// Its directory below `/sys`.
    pub path: String,
    /// What can be made.
    pub types: Vec<MdevType>,
}

/// A type of mediated device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MdevType {
    /// Its directory's name: `mtty-1`.
    pub id: String,
    /// For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// `vfio-pci`, `vfio-ccw`, ….
    pub device_api: String,
    /// How many more can be made now.
    pub available: u32,
    /// For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// UUIDs of those that were made.
    #[serde(default)]
    pub devices: Vec<String>,
}

/// Everything, in its places.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tree {
    /// What mediated devices are made of; what was made is in `devices` with a path below
    /// the parent's.
    pub parents: Vec<Parent>,
    /// All devices.
    pub devices: Vec<Device>,
    /// The IOMMU groups that have one of the devices.
    pub groups: Vec<Group>,
}

/// Everything about one device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Show {
    /// The device, with its holders.
    pub device: Device,
    /// Its group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<Group>,
    /// Its regions, when the daemon can ask the driver.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub regions: Vec<Region>,
    /// Its interrupts, likewise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub irqs: Vec<Irq>,
    /// The driver's own attributes (`group/name`) and their text, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub attributes: Vec<(String, String)>,
}

/// A region of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Its index.
    pub index: u32,
    /// Bytes.
    pub size: u64,
    /// `VFIO_REGION_INFO_FLAG_*`.
    pub flags: u32,
}

/// An interrupt index of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Irq {
    /// The index.
    pub index: u32,
    /// How many vectors.
    pub count: u32,
    /// `VFIO_IRQ_INFO_*`.
    pub flags: u32,
}

/// How the daemon is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its version.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// Where its sysfs tree is mounted; absent when nothing is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sys: Option<String>,
    /// Where its nodes are; absent when nothing is mounted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dev: Option<String>,
    /// Its regions of char devices by name, with their major numbers: what `/proc/devices` would list.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub char_regions: BTreeMap<String, u32>,
    /// Its misc devices by name, with their minor numbers: what `/proc/misc` would list.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub misc_devices: BTreeMap<String, u32>,
    /// Registered VFIO devices.
    pub devices: u32,
    /// Unregisters that wait.
    pub pending: u32,
    /// Seconds since it is ready.
    pub uptime_s: u64,
}
