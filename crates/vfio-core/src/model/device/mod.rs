//! Devices, and their place in the tree (`drivers/base/core.c`).

mod binding;

use super::bus::Probe;
use super::names::{ByName, sorted, take};
use super::{IommuGroup, Outcome, Waiting, lock, mdev, read, write};
use crate::device::{Device, Policy};
use crate::event::Uevent;
use crate::{Core, Errno, Result};
use binding::Binding;
use std::collections::HashSet;
use std::fmt;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

/// What a device's `subsystem` link leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Subsystem {
    /// `/sys/bus/NAME`.
    Bus(&'static str),
    /// `/sys/class/NAME`.
    Class(&'static str),
}

impl Subsystem {
    /// Its name, as in a uevent's `SUBSYSTEM`.
    pub fn name(self) -> &'static str {
        match self {
            Subsystem::Bus(name) | Subsystem::Class(name) => name,
        }
    }
}

/// A device in the sense of the device model (`struct device`): on a bus or in a class, with a
/// directory under `/sys/devices`. A VFIO device belongs to one.
pub struct BusDevice {
    id: u64,
    name: Box<str>,
    subsystem: Option<Subsystem>,
    parent: Option<Arc<BusDevice>>,
    /// Where its directory is, below `/sys`, when it has no parent: `/devices/virtual/mtty`.
    base: Box<str>,
    vfio: RwLock<Option<Device>>,
    group: RwLock<Option<Arc<IommuGroup>>>,
    role: RwLock<Role>,
    state: Mutex<State>,
}

/// What else a device is.
#[derive(Default)]
pub(crate) enum Role {
    #[default]
    Plain,
    /// An mdev parent.
    Parent(Arc<mdev::Parent>),
    /// A mediated device.
    Mdev(Arc<mdev::Instance>),
    /// A device that brought its own driver along.
    Own(Arc<dyn Probe>),
}

#[derive(Default)]
struct State {
    phase: Phase,
    binding: Binding,
    driver_override: Option<Arc<str>>,
    #[expect(
        clippy::box_collection,
        reason = "most devices have none; 8 bytes, not 48"
    )]
    children: Option<Box<HashSet<ByName>>>,
}

#[derive(Default)]
enum Phase {
    /// Not added yet.
    #[default]
    New,
    /// In the tree.
    Present,
    /// On its way out: only its directory and `iommu_group` are left.
    Removing(Waiting),
    /// Out.
    Gone,
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

impl fmt::Debug for BusDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BusDevice({})", self.devpath())
    }
}

impl BusDevice {
    /// A device with its directory at `base/name`.
    pub fn new(base: &str, name: &str, subsystem: Option<Subsystem>) -> Arc<BusDevice> {
        BusDevice::make(base, name, subsystem, None, Role::Plain)
    }

    /// A device with its directory inside its parent's.
    pub fn child(
        parent: &Arc<BusDevice>,
        name: &str,
        subsystem: Option<Subsystem>,
    ) -> Arc<BusDevice> {
        BusDevice::make("", name, subsystem, Some(Arc::clone(parent)), Role::Plain)
    }

    /// A device of a class with no parent: `/sys/devices/virtual/CLASS/NAME`
    /// (`device_create` with a `NULL` parent).
    pub fn virtual_class(class: &'static str, name: &str) -> Arc<BusDevice> {
        let base = format!("/devices/virtual/{class}");
        BusDevice::new(&base, name, Some(Subsystem::Class(class)))
    }

    pub(crate) fn make(
        base: &str,
        name: &str,
        subsystem: Option<Subsystem>,
        parent: Option<Arc<BusDevice>>,
        role: Role,
    ) -> Arc<BusDevice> {
        Arc::new(BusDevice {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            name: name.into(),
            subsystem,
            parent,
            base: base.into(),
            vfio: RwLock::default(),
            group: RwLock::default(),
            role: RwLock::new(role),
            state: Mutex::default(),
        })
    }

    /// Unlike any other device's of this process, for ever.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Its name on its bus.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its bus or class.
    pub fn subsystem(&self) -> Option<&Subsystem> {
        self.subsystem.as_ref()
    }

    /// The device whose directory its own is in.
    pub fn parent(&self) -> Option<&Arc<BusDevice>> {
        self.parent.as_ref()
    }

    /// The path of its directory below `/sys`.
    pub fn devpath(&self) -> String {
        match &self.parent {
            Some(parent) => format!("{}/{}", parent.devpath(), self.name),
            None => format!("{}/{}", self.base, self.name),
        }
    }

    /// The VFIO device registered for it.
    pub fn vfio_device(&self) -> Option<Device> {
        read(&self.vfio).clone()
    }

    pub(crate) fn set_vfio_device(&self, device: Option<Device>) {
        let before = std::mem::replace(&mut *write(&self.vfio), device);
        drop(before);
    }

    /// Its IOMMU group.
    pub fn iommu_group(&self) -> Option<Arc<IommuGroup>> {
        read(&self.group).clone()
    }

    /// `iommu_group_add_device()`. `EINVAL` when it is in a group.
    pub(crate) fn join_iommu_group(self: &Arc<Self>, group: &Arc<IommuGroup>) -> Result {
        let mut slot = write(&self.group);
        if slot.is_some() {
            return Err(Errno::INVAL);
        }
        *slot = Some(Arc::clone(group));
        drop(slot);
        let mut devices = group.devices.lock().unwrap_or_else(PoisonError::into_inner);
        devices.push(Arc::downgrade(self));
        Ok(())
    }

    /// `iommu_group_remove_device()`.
    pub(crate) fn leave_iommu_group(&self) {
        let group = write(&self.group).take();
        if let Some(group) = group {
            let mut devices = group.devices.lock().unwrap_or_else(PoisonError::into_inner);
            let gone = |device: &Weak<BusDevice>| {
                device.strong_count() == 0 || device.as_ptr() == ptr::from_ref(self)
            };
            while devices.take_first(gone).is_some() {}
        }
    }

    /// The removal that waits for users.
    pub fn removing(&self) -> Option<Waiting> {
        match &lock(&self.state).phase {
            Phase::Removing(waiting) => Some(waiting.clone()),
            _ => None,
        }
    }

    /// True from [`add`](BusDevice::add) until its removal begins.
    pub fn is_present(&self) -> bool {
        matches!(lock(&self.state).phase, Phase::Present)
    }

    /// True while its directory is there: from [`add`](BusDevice::add) to the end of its removal.
    pub fn has_directory(&self) -> bool {
        matches!(lock(&self.state).phase, Phase::Present | Phase::Removing(_))
    }

    /// The devices whose directories are in its own, by name.
    pub fn children(&self) -> Vec<Arc<BusDevice>> {
        let state = lock(&self.state);
        state.children.as_deref().map_or(Vec::new(), sorted)
    }

    /// The child of this name.
    pub fn child_named(&self, name: &str) -> Option<Arc<BusDevice>> {
        let state = lock(&self.state);
        Some(Arc::clone(&state.children.as_ref()?.get(name)?.0))
    }

    /// The mdev parent it is.
    pub fn mdev_parent(&self) -> Option<Arc<mdev::Parent>> {
        match &*read(&self.role) {
            Role::Parent(parent) => Some(Arc::clone(parent)),
            _ => None,
        }
    }

    /// The mediated device it is.
    pub fn mdev(&self) -> Option<Arc<mdev::Instance>> {
        match &*read(&self.role) {
            Role::Mdev(instance) => Some(Arc::clone(instance)),
            _ => None,
        }
    }

    pub(crate) fn own_driver(&self) -> Option<Arc<dyn Probe>> {
        match &*read(&self.role) {
            Role::Own(driver) => Some(Arc::clone(driver)),
            _ => None,
        }
    }

    pub(crate) fn set_role(&self, role: Role) {
        let before = std::mem::replace(&mut *write(&self.role), role);
        drop(before);
    }

    /// For the roots that a core begins with.
    pub(super) fn exists_from_the_start(&self) {
        lock(&self.state).phase = Phase::Present;
    }

    /// What its `uevent` file says, and what goes with its uevents (`dev_uevent`).
    pub fn uevent_env(&self) -> Vec<(String, String)> {
        self.driver()
            .map(|driver| ("DRIVER".to_owned(), driver.name().to_owned()))
            .into_iter()
            .collect()
    }

    /// `kobject_uevent_env()`: `extra` comes before what [`uevent_env`](BusDevice::uevent_env)
    /// says. A device on no bus and in no class has no uevents.
    pub fn uevent(&self, core: &Core, action: &str, extra: Vec<(String, String)>) {
        let Some(subsystem) = self.subsystem else {
            return;
        };
        if !core.is_heard() {
            return;
        }
        let mut env = extra;
        env.extend(self.uevent_env());
        core.uevent(Uevent {
            action: action.to_owned(),
            devpath: self.devpath(),
            subsystem: subsystem.name().to_owned(),
            env,
        });
    }

    /// `device_add()`: into the tree, onto its bus or into its class; then it is bound if the bus
    /// binds by itself. `EEXIST` for a name that is taken, `ENODEV` when its parent is going,
    /// `EINVAL` when it was added before, or is on a bus that there is not.
    pub fn add(self: &Arc<Self>, core: &Core) -> Result {
        self.enter(core)?;
        if let Some(Subsystem::Bus(name)) = self.subsystem
            && let Some(bus) = core.model().bus(name)
            && bus.autoprobe()
        {
            bus.attach(core, self)?;
        }
        Ok(())
    }

    /// The same without a driver.
    pub(crate) fn enter(self: &Arc<Self>, core: &Core) -> Result {
        let model = core.model();
        let bus = match self.subsystem {
            Some(Subsystem::Bus(name)) => Some(model.bus(name).ok_or(Errno::INVAL)?),
            _ => None,
        };
        {
            let mut state = lock(&self.state);
            if !matches!(state.phase, Phase::New) {
                return Err(Errno::INVAL);
            }
            state.phase = Phase::Present;
        }
        let placed = self.place(core).and_then(|()| {
            let entered = match (self.subsystem, &bus) {
                (Some(Subsystem::Class(name)), _) => model.class_insert(name, self),
                (_, Some(bus)) => bus.insert(self),
                _ => Ok(()),
            };
            entered.inspect_err(|_| self.displace(core))
        });
        if let Err(errno) = placed {
            lock(&self.state).phase = Phase::Gone;
            return Err(errno);
        }
        self.uevent(core, "add", Vec::new());
        Ok(())
    }

    /// `device_del()`: its driver lets go, which waits for users as `policy` says, and it leaves
    /// the tree. On return nobody finds it on its bus, in its class or through its attributes,
    /// and its VFIO device takes no new users; while it waits, its directory and `iommu_group`
    /// are all that is left. `ENODEV` when it is going already, `EAGAIN` while its driver's probe
    /// runs (try again), `EBUSY` when other devices are below it or it is an mdev parent.
    pub fn remove(self: &Arc<Self>, core: &Core, policy: Policy) -> Outcome {
        if self.mdev_parent().is_some() {
            return Outcome::Done(Err(Errno::BUSY));
        }
        let waiting = Waiting::new(self);
        let binding = {
            let mut state = lock(&self.state);
            if !matches!(state.phase, Phase::Present) {
                return Outcome::Done(Err(Errno::NODEV));
            }
            if matches!(state.binding, Binding::Probing(_)) {
                return Outcome::Done(Err(Errno::AGAIN));
            }
            if state.children.as_ref().is_some_and(|all| !all.is_empty()) {
                return Outcome::Done(Err(Errno::BUSY));
            }
            state.phase = Phase::Removing(waiting.clone());
            match std::mem::take(&mut state.binding) {
                Binding::Bound(driver, registration) => {
                    state.binding = Binding::Unbinding(waiting.clone());
                    Binding::Bound(driver, registration)
                }
                Binding::Unbinding(unbind) => {
                    state.binding = Binding::Unbinding(unbind.clone());
                    Binding::Unbinding(unbind)
                }
                other => other,
            }
        };
        match self.subsystem {
            Some(Subsystem::Class(name)) => core.model().class_remove(name, self),
            Some(Subsystem::Bus(name)) => {
                if let Some(bus) = core.model().bus(name) {
                    bus.remove(self);
                }
            }
            None => {}
        }
        let device = Arc::clone(self);
        let whole = core.clone();
        let end = waiting.clone();
        let finish = move || {
            device.displace(&whole);
            lock(&device.state).phase = Phase::Gone;
            if let Some(mdev) = device.mdev() {
                mdev.release();
            }
            device.uevent(&whole, "remove", Vec::new());
            end.finish(Ok(()));
        };
        match binding {
            Binding::Bound(_, registration) => {
                let unregistering = registration.unregister();
                self.let_go(core, unregistering, policy, &waiting, finish);
            }
            Binding::Unbinding(unbind) => {
                unbind.on_done(move |_| finish());
                unbind.join(core, policy);
                waiting.set_parts(vec![unbind]);
            }
            _ => finish(),
        }
        waiting.outcome()
    }

    /// Into its parent's directory.
    fn place(self: &Arc<Self>, core: &Core) -> Result {
        let entry = ByName(Arc::clone(self));
        let inserted = match &self.parent {
            Some(parent) => {
                let mut state = lock(&parent.state);
                if !matches!(state.phase, Phase::Present) {
                    return Err(Errno::NODEV);
                }
                state.children.get_or_insert_default().insert(entry)
            }
            None => {
                let mut roots = write(&core.model().roots);
                roots.entry(self.base.clone()).or_default().insert(entry)
            }
        };
        if inserted { Ok(()) } else { Err(Errno::EXIST) }
    }

    /// Out of its parent's directory.
    fn displace(&self, core: &Core) {
        let gone = match &self.parent {
            Some(parent) => {
                let mut state = lock(&parent.state);
                let children = state.children.as_deref_mut();
                children.and_then(|children| take(children, self))
            }
            None => {
                let mut roots = write(&core.model().roots);
                let gone = roots
                    .get_mut(&self.base)
                    .and_then(|devices| take(devices, self));
                if roots.get(&self.base).is_some_and(HashSet::is_empty) {
                    roots.remove(&self.base);
                }
                gone
            }
        };
        drop(gone);
    }
}
