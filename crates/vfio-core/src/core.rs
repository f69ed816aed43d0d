//! What there is: numbers in use, registered devices, IOMMU groups, those who listen.

use crate::device::{Device, GroupType, Head, Housekeeper, Policy, Sets};
use crate::event::{Event, Notice, Subscribers, Subscription, Uevent, What};
use crate::group::{Group, Groups};
use crate::index::{Index, IndexPool, MINOR_MASK};
use crate::model::{BusDevice, IommuGroup, IommuGroups, Model};
use crate::{Errno, Result};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

/// What can be chosen about a core.
#[derive(Clone, Debug)]
pub struct Config {
    /// Char devices: with it off a registered device has its `vfio-dev/vfioN` directory but no
    /// `dev` file and no node, the state of the series itself (`CONFIG_VFIO_DEVICE_CDEV=n`).
    pub cdev: bool,
    /// Major number of the `vfio-dev` char region.
    pub cdev_major: u32,
    /// Major number of the `vfio` char region, that of the group nodes. The series kept the name
    /// although the nodes of devices have a region of their own, `vfio-dev`.
    pub group_major: u32,
    /// Minor number of `/dev/iommu`, a misc device.
    pub iommu_minor: u32,
    /// How often users of a device that is going are asked to leave; the kernel's 10 s.
    pub request_interval: Duration,
    /// How long an open or a bind that finds the device or its group busy waits for the end of a
    /// close that may have begun. In the kernel `close()` returns when all is done; a server is
    /// told of it afterwards.
    pub close_grace: Duration,
    /// First IOMMU group number to use, beyond those that the machine has itself.
    pub first_iommu_group: u32,
    /// What a write to `unbind` or `remove` in sysfs does about users; the kernel's way is to wait.
    pub sysfs_policy: Policy,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            cdev: true,
            cdev_major: 511,
            group_major: 510,
            iommu_minor: 127,
            request_interval: Duration::from_secs(10),
            close_grace: Duration::from_millis(100),
            first_iommu_group: 0,
            sysfs_policy: Policy::Wait,
        }
    }
}

/// The core. Clones are the same core.
#[derive(Clone, Debug)]
pub struct Core(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: Config,
    indexes: IndexPool,
    /// Registered devices by index: what a name, the class and a char device number lead to.
    registered: RwLock<Vec<Option<Device>>>,
    groups: IommuGroups,
    vfio_groups: Groups,
    sets: Sets,
    subscribers: Arc<Subscribers>,
    house: Arc<Housekeeper>,
    model: Model,
    native_mmap: AtomicBool,
}

impl Core {
    /// A core with nothing in it.
    pub fn new(config: Config) -> Core {
        let groups = IommuGroups::new(config.first_iommu_group);
        let house: Arc<Housekeeper> = Arc::default();
        let vfio_groups = Groups::new(config.close_grace, &house);
        Core(Arc::new(Inner {
            config,
            indexes: IndexPool::new(0, MINOR_MASK),
            registered: RwLock::default(),
            groups,
            vfio_groups,
            sets: Sets::default(),
            subscribers: Arc::default(),
            house,
            model: Model::new(),
            native_mmap: AtomicBool::new(true),
        }))
    }

    /// Says whether clients of the nodes can map regions; they can unless said otherwise. If not,
    /// `VFIO_DEVICE_GET_REGION_INFO` offers no region for mapping, and clients read and write all of
    /// them, as they do where a region has no `VFIO_REGION_INFO_FLAG_MMAP` anyway. Transports that
    /// hand out the memory themselves ([`Device::open_direct`]) are not concerned.
    pub fn set_native_mmap(&self, possible: bool) {
        self.0.native_mmap.store(possible, Ordering::Release);
    }

    pub(crate) fn native_mmap(&self) -> bool {
        self.0.native_mmap.load(Ordering::Acquire)
    }

    /// What was chosen.
    pub fn config(&self) -> &Config {
        &self.0.config
    }

    /// Buses, classes and the devices on them.
    pub fn model(&self) -> &Model {
        &self.0.model
    }

    /// IOMMU groups by number.
    pub fn iommu_groups(&self) -> &IommuGroups {
        &self.0.groups
    }

    /// The VFIO group of this IOMMU group, which is the name of its node.
    pub fn group(&self, id: u32) -> Option<Arc<Group>> {
        self.iommu_groups().get(id)?.vfio()
    }

    /// The VFIO group of this name: a number in decimal, without leading zeros.
    pub fn group_by_name(&self, name: &str) -> Option<Arc<Group>> {
        let group = self.group(name.parse().ok()?)?;
        (group.name() == name).then_some(group)
    }

    /// The VFIO group with this minor number.
    pub fn group_by_minor(&self, minor: u32) -> Option<Arc<Group>> {
        self.0.vfio_groups.by_minor(minor)
    }

    /// All VFIO groups, in the order of their minor numbers.
    pub fn groups(&self) -> Vec<Arc<Group>> {
        self.0.vfio_groups.all()
    }

    /// The registered device with this number: behind `vfioN`, the class link and the char
    /// device M:N alike. `None` as soon as its unregister has begun.
    pub fn device(&self, index: u32) -> Option<Device> {
        let registered = self
            .0
            .registered
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        registered.get(index as usize)?.clone()
    }

    /// The registered device of this name, exactly `vfioN`.
    pub fn device_by_name(&self, name: &str) -> Option<Device> {
        self.device(parse_name(name)?)
    }

    /// All registered devices, in the order of their numbers.
    pub fn devices(&self) -> Vec<Device> {
        let registered = self
            .0
            .registered
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        registered.iter().flatten().cloned().collect()
    }

    /// Calls `f` for every life-cycle event and uevent, on the thread where it happens and with
    /// no lock held, until the subscription is dropped. `f` must be quick and must not call back
    /// into the life cycle; one that has more to do puts the notice into a queue.
    pub fn subscribe(&self, f: impl Fn(&Notice) + Send + Sync + 'static) -> Subscription {
        self.0.subscribers.add(Arc::new(f))
    }

    /// Sends a uevent to those who listen.
    pub fn uevent(&self, uevent: Uevent) {
        if self.0.subscribers.any() {
            self.0.subscribers.send(&Notice::Uevent(uevent));
        }
    }

    /// True when somebody listens; what nobody hears need not be put together.
    pub(crate) fn is_heard(&self) -> bool {
        self.0.subscribers.any()
    }

    pub(crate) fn sets(&self) -> &Sets {
        &self.0.sets
    }

    pub(crate) fn house(&self) -> &Arc<Housekeeper> {
        &self.0.house
    }

    pub(crate) fn take_index(&self) -> Result<Index> {
        self.0.indexes.take()
    }

    pub(crate) fn event(&self, head: &Head, what: What) {
        self.send(self.prepare(head, what));
    }

    /// An event for later, when its device may be gone. `None` if nobody listens.
    pub(crate) fn prepare(&self, head: &Head, what: What) -> Option<Event> {
        self.0.subscribers.any().then(|| Event {
            at: Instant::now(),
            device: format!("vfio{}", head.index.get()),
            index: head.index.get(),
            parent: head.parent.name().to_owned(),
            what,
        })
    }

    pub(crate) fn send(&self, event: Option<Event>) {
        if let Some(event) = event {
            self.0.subscribers.send(&Notice::Event(event));
        }
    }

    /// The variables of a VFIO device's uevents, and of its `uevent` file: those of its node.
    pub(crate) fn vfio_env(&self, device: &Device) -> Vec<(String, String)> {
        if !self.0.config.cdev {
            return Vec::new();
        }
        vec![
            ("MAJOR".into(), self.0.config.cdev_major.to_string()),
            ("MINOR".into(), device.index().to_string()),
            ("DEVNAME".into(), format!("vfio/devices/{}", device.name())),
        ]
    }

    /// The uevent of a VFIO device, with `extra` variables before its own.
    pub(crate) fn announce(&self, device: &Device, action: &str, extra: Vec<(String, String)>) {
        if !self.is_heard() {
            return;
        }
        let mut env = extra;
        env.extend(self.vfio_env(device));
        self.uevent(Uevent {
            action: action.into(),
            devpath: format!("{}/vfio-dev/{}", device.parent().devpath(), device.name()),
            subsystem: "vfio-dev".into(),
            env,
        });
    }

    /// The variables of a VFIO group's uevents, and of its `uevent` file: those of its node.
    pub(crate) fn group_env(&self, group: &Group) -> Vec<(String, String)> {
        vec![
            ("MAJOR".into(), self.0.config.group_major.to_string()),
            ("MINOR".into(), group.minor().to_string()),
            ("DEVNAME".into(), format!("vfio/{}", group.id())),
        ]
    }

    /// The uevent of a VFIO group, with `extra` variables before its own.
    pub(crate) fn announce_group(&self, group: &Group, action: &str, extra: Vec<(String, String)>) {
        if !self.is_heard() {
            return;
        }
        let mut env = extra;
        env.extend(self.group_env(group));
        self.uevent(Uevent {
            action: action.into(),
            devpath: format!("/devices/virtual/vfio/{}", group.id()),
            subsystem: "vfio".into(),
            env,
        });
    }

    /// Group, then names (`vfio_device_set_group`, `vfio_device_add`).
    pub(crate) fn publish(&self, device: &Device, kind: GroupType) -> Result {
        let parent = device.parent();
        if parent.vfio_device().is_some() {
            tracing::warn!("{}: has a VFIO device already", parent.name());
            return Err(Errno::INVAL);
        }
        let iommu = match kind {
            GroupType::Physical => parent.iommu_group().ok_or(Errno::INVAL)?,
            GroupType::Emulated => {
                let group = self.0.groups.create(Some("vfio-noiommu"))?;
                group.add(parent)?;
                group
            }
        };
        let (group, is_new) = self.0.vfio_groups.join(&iommu, kind).inspect_err(|_| {
            if kind == GroupType::Emulated {
                iommu.remove(parent);
            }
        })?;
        if is_new {
            self.announce_group(&group, "add", Vec::new());
        }
        *device
            .head()
            .group
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(group);
        let mut registered = self
            .0
            .registered
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let index = device.index() as usize;
        if registered.len() <= index {
            registered.resize(index + 1, None);
        }
        registered[index] = Some(device.clone());
        drop(registered);
        parent.set_vfio_device(Some(device.clone()));
        Ok(())
    }

    /// The device can be found in its group from now on.
    pub(crate) fn list_in_group(&self, device: &Device) {
        if let Some(group) = device.vfio_group() {
            group.add(device);
        }
    }

    /// The names go: the group's, then class, char link and the parent's directory at once.
    pub(crate) fn unpublish(&self, device: &Device) {
        if let Some(group) = device.vfio_group() {
            group.remove(device);
        }
        let mut registered = self
            .0
            .registered
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let gone = registered
            .get_mut(device.index() as usize)
            .and_then(Option::take);
        drop(registered);
        drop(gone);
        device.parent().set_vfio_device(None);
    }

    /// The group unit goes; with it, for a software device, the group made for it. The VFIO group
    /// dies with the last.
    pub(crate) fn leave_group(&self, device: &Device) {
        let group = device
            .head()
            .group
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(group) = group else { return };
        if group.kind() == GroupType::Emulated {
            device.parent().leave_iommu_group();
        }
        if self.0.vfio_groups.leave(&group) {
            self.announce_group(&group, "remove", Vec::new());
            if self.is_heard() {
                self.0.subscribers.send(&Notice::GroupGone {
                    name: group.name(),
                    serial: group.serial(),
                });
            }
        }
    }

    pub(crate) fn ask(
        &self,
        device: &Device,
        rundown: &Arc<crate::device::Rundown>,
        deadline: Option<Instant>,
    ) {
        self.0
            .house
            .ask(device, rundown, self.0.config.request_interval, deadline);
    }
}

/// The number in `vfioN`: decimal, no leading zero, no sign.
fn parse_name(name: &str) -> Option<u32> {
    let digits = name.strip_prefix("vfio")?;
    let canonical = digits.bytes().all(|b| b.is_ascii_digit())
        && (digits == "0" || !digits.starts_with('0'))
        && !digits.is_empty();
    canonical.then(|| digits.parse().ok())?
}

impl IommuGroup {
    fn add(self: &Arc<Self>, device: &Arc<BusDevice>) -> Result {
        device.join_iommu_group(self)
    }

    fn remove(self: &Arc<Self>, device: &Arc<BusDevice>) {
        device.leave_iommu_group();
    }
}
