//! The mediated device bus (`drivers/vfio/mdev`): parents, types, and software devices made by
//! writing a uuid to a type's `create`.

use super::bus::{Probe, make};
use super::device::Subsystem;
use super::{Bus, BusDevice, BusOptions, Driver as BusDriver, Outcome, Role, Waiting, lock};
use crate::device::{DeviceOps, GroupType, Policy, Registration, ReleaseSlot};
use crate::{Core, Errno, Result};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use uuid::Uuid;

/// The bus's name.
pub const BUS: &str = "mdev";

/// The class that lists the parents.
pub const CLASS: &str = "mdev_bus";

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

/// A [`Driver`], erased.
trait AnyDriver: Send + Sync {
    fn available_instances(&self, ty: &Type) -> Option<u32>;
    fn description(&self, ty: &Type) -> Option<String>;
    fn probe(&self, core: &Core, device: &Arc<BusDevice>, ty: &Type) -> Result<Registration>;
}

struct Erased<D>(Arc<D>);

impl<D: Driver> AnyDriver for Erased<D> {
    fn available_instances(&self, ty: &Type) -> Option<u32> {
        catch_unwind(AssertUnwindSafe(|| self.0.available_instances(ty))).unwrap_or(Some(0))
    }

    fn description(&self, ty: &Type) -> Option<String> {
        catch_unwind(AssertUnwindSafe(|| self.0.description(ty))).unwrap_or(None)
    }

    fn probe(&self, core: &Core, device: &Arc<BusDevice>, ty: &Type) -> Result<Registration> {
        make::<D::Ops>(
            core,
            device,
            self.0.name(),
            GroupType::Emulated,
            || self.0.args(device, ty),
            || self.0.slot(device),
        )
    }
}

impl<D: Driver> Probe for Erased<D> {
    fn probe(&self, core: &Core, device: &Arc<BusDevice>) -> Result<Registration> {
        let instance = device.mdev().ok_or(Errno::NODEV)?;
        AnyDriver::probe(
            self,
            core,
            device,
            &instance.parent.types[instance.type_index()].ty,
        )
    }
}

pub(super) fn bus() -> Arc<Bus> {
    Bus::new(
        BUS,
        BusOptions {
            // `mdev_match`: a new device is bound to its parent's driver, and never again.
            matches: |_, _| false,
            driver_override: false,
            autoprobe: true,
        },
    )
}

/// A type of a parent, with the name of its directory.
#[derive(Clone, Debug)]
struct TypeDir {
    ty: Type,
    name: String,
}

/// A device that mediated devices can be made on (`struct mdev_parent`).
pub struct Parent {
    core: Core,
    device: Arc<BusDevice>,
    driver: Arc<dyn AnyDriver>,
    bus_driver: Arc<BusDriver>,
    device_api: &'static str,
    types: Vec<TypeDir>,
    /// What is left of `max_instances`, unless the driver counts.
    counter: AtomicUsize,
    gate: Mutex<Gate>,
    quiet: Condvar,
}

/// The kernel's `unreg_sem`: creates that run, and whether new ones may begin.
#[derive(Debug, Default)]
struct Gate {
    going: bool,
    creating: usize,
}

impl fmt::Debug for Parent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "mdev::Parent({})", self.device.devpath())
    }
}

/// What makes a device a mediated one (`struct mdev_device`). It holds its uuid, and one of the
/// instances that the parent has; both are given back however the device ends, or fails to begin.
pub struct Instance {
    parent: Arc<Parent>,
    uuid: Uuid,
    ty: u32,
    active: AtomicBool,
    /// The bus counts, and this one is counted.
    counted: bool,
    held: AtomicBool,
}

impl fmt::Debug for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "mdev::Instance({})", self.uuid)
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.release();
    }
}

impl Instance {
    /// The device it was made on.
    pub fn parent(&self) -> &Arc<Parent> {
        &self.parent
    }

    /// The number of its type among the parent's.
    pub fn type_index(&self) -> usize {
        self.ty as usize
    }

    /// The name of its type's directory: `mtty-1`.
    pub fn type_name(&self) -> &str {
        &self.parent.types[self.type_index()].name
    }

    /// Its uuid.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// `mdev_device_release()`: the uuid may be used again.
    pub(super) fn release(&self) {
        if self.held.swap(false, Ordering::AcqRel) {
            lock(&self.parent.core.model().uuids).remove(&self.uuid);
            if self.counted {
                self.parent.counter.fetch_add(1, Ordering::AcqRel);
            }
        }
    }
}

impl Parent {
    /// `mdev_register_parent()`, with the driver registered on the bus along with its first
    /// parent; further parents with the same driver pass the same `Arc`
    /// (`register::<D>`, which names the driver for the compiler). On return the types can be seen and devices made. `EINVAL` when the device is not
    /// in the tree or the driver has no types or no `device_api`, `EBUSY` when it is a parent
    /// already or another driver of this name is registered.
    pub fn register<D: Driver>(
        core: &Core,
        device: &Arc<BusDevice>,
        driver: impl Into<Arc<D>>,
    ) -> Result<Arc<Parent>> {
        let driver: Arc<D> = driver.into();
        if !device.is_present() || driver.device_api().is_empty() {
            return Err(Errno::INVAL);
        }
        if device.mdev_parent().is_some() {
            return Err(Errno::BUSY);
        }
        // `dev_driver_string()`.
        let prefix = match (device.driver(), device.subsystem()) {
            (Some(driver), _) => driver.name(),
            (None, Some(subsystem)) => subsystem.name(),
            (None, None) => "",
        };
        let types: Vec<TypeDir> = driver
            .types()
            .into_iter()
            .map(|ty| TypeDir {
                name: format!("{prefix}-{}", ty.sysfs_name),
                ty,
            })
            .collect();
        if types.is_empty() {
            return Err(Errno::INVAL);
        }
        let bus = core.model().bus(BUS).ok_or(Errno::NODEV)?;
        let value = Arc::as_ptr(&driver).addr();
        let parameters = driver.parameters();
        let bus_driver = bus.insert_driver(
            core.model(),
            &BusDriver::shared(
                BUS,
                driver.name(),
                Arc::new(Erased(Arc::clone(&driver))),
                value,
            ),
            parameters
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value))
                .collect(),
        )?;
        let parent = Arc::new(Parent {
            core: core.clone(),
            device: Arc::clone(device),
            device_api: driver.device_api(),
            counter: AtomicUsize::new(driver.max_instances() as usize),
            driver: Arc::new(Erased(driver)),
            bus_driver,
            types,
            gate: Mutex::default(),
            quiet: Condvar::new(),
        });
        if let Err(errno) = core.model().class_insert(CLASS, device) {
            bus.remove_driver(&parent.bus_driver);
            return Err(errno);
        }
        device.set_role(Role::Parent(Arc::clone(&parent)));
        device.uevent(core, "change", vec![state("registered")]);
        Ok(parent)
    }

    /// The device.
    pub fn device(&self) -> &Arc<BusDevice> {
        &self.device
    }

    /// The driver of its mediated devices.
    pub fn driver(&self) -> &Arc<BusDriver> {
        &self.bus_driver
    }

    /// The names of the type directories.
    pub fn type_names(&self) -> impl Iterator<Item = &str> {
        self.types.iter().map(|dir| dir.name.as_str())
    }

    /// The number of the type with this directory.
    pub fn type_named(&self, name: &str) -> Option<usize> {
        self.types.iter().position(|dir| dir.name == name)
    }

    /// The name of a type's directory.
    pub fn type_name(&self, ty: usize) -> Option<&str> {
        Some(&self.types.get(ty)?.name)
    }

    /// The text of a type's `name`.
    pub fn pretty_name(&self, ty: usize) -> Option<&'static str> {
        let ty = &self.types.get(ty)?.ty;
        Some(ty.pretty_name.unwrap_or(ty.sysfs_name))
    }

    /// The text of `device_api`.
    pub fn device_api(&self) -> &'static str {
        self.device_api
    }

    /// The text of `description`, where there is one.
    pub fn description(&self, ty: usize) -> Option<String> {
        self.driver.description(&self.types.get(ty)?.ty)
    }

    /// How many more devices of a type can be made.
    pub fn available_instances(&self, ty: usize) -> Option<u32> {
        let own = self.driver.available_instances(&self.types.get(ty)?.ty);
        let counted = || u32::try_from(self.counter.load(Ordering::Acquire)).unwrap_or(u32::MAX);
        Some(own.unwrap_or_else(counted))
    }

    /// The mediated devices of it, by name.
    pub fn devices(&self) -> Vec<Arc<BusDevice>> {
        let mut children = self.device.children();
        children.retain(|child| child.mdev().is_some());
        children
    }

    /// A write to `create` (`create_store`): `EINVAL` for a length other than 36 or 37, or what
    /// is no uuid; the 37th byte is not looked at. Else as [`create`](Parent::create).
    pub fn create_text(self: &Arc<Self>, ty: usize, text: &[u8]) -> Result<Arc<BusDevice>> {
        if !matches!(text.len(), 36 | 37) {
            return Err(Errno::INVAL);
        }
        let uuid = Uuid::try_parse_ascii(&text[..36]).map_err(|_| Errno::INVAL)?;
        self.create(ty, uuid)
    }

    /// `mdev_device_create()`. On return the device is in the tree, bound, and may be opened.
    /// `EEXIST` while a device of this uuid exists on any parent, a removed one that waits for
    /// its users included; `EUSERS` when the bus counts and none is left; `ENODEV` when the
    /// parent is going; else what the driver says (`ENOSPC`). On error nothing remains.
    pub fn create(self: &Arc<Self>, ty: usize, uuid: Uuid) -> Result<Arc<BusDevice>> {
        let own = {
            let kind = &self.types.get(ty).ok_or(Errno::NOENT)?.ty;
            self.driver.available_instances(kind).is_some()
        };
        let uuids = &self.core.model().uuids;
        if !lock(uuids).insert(uuid) {
            return Err(Errno::EXIST);
        }
        let take = |left: usize| left.checked_sub(1);
        let counter = &self.counter;
        if !own
            && counter
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, take)
                .is_err()
        {
            lock(uuids).remove(&uuid);
            return Err(Errno::USERS);
        }
        let instance = Arc::new(Instance {
            parent: Arc::clone(self),
            uuid,
            ty: ty as u32,
            active: AtomicBool::new(false),
            counted: !own,
            held: AtomicBool::new(true),
        });
        let _running = self.enter()?;
        let device = BusDevice::make(
            "",
            &uuid.to_string(),
            Some(Subsystem::Bus(BUS)),
            Some(Arc::clone(&self.device)),
            Role::Mdev(Arc::clone(&instance)),
        );
        if let Err(errno) = device.enter(&self.core) {
            instance.release();
            return Err(errno);
        }
        if let Err(errno) = device.bind(&self.core, &self.bus_driver) {
            let _ = device.remove(&self.core, Policy::Disassociate);
            return Err(errno);
        }
        instance.active.store(true, Ordering::Release);
        Ok(device)
    }

    /// `mdev_unregister_parent()`: no new devices; the class link goes; all its mediated devices
    /// are removed, each as [`remove`] would, and when the last is gone so are the types.
    /// All removals begin at once (the kernel's begin one after another), so that every user is
    /// asked and a deadline is the same for all. `ENODEV` when it has begun before.
    ///
    /// Waits for creates that run, which end by themselves; never call it from a driver.
    pub fn unregister(self: &Arc<Self>, policy: Policy) -> Outcome {
        {
            let mut gate = lock(&self.gate);
            if gate.going {
                return Outcome::Done(Err(Errno::NODEV));
            }
            gate.going = true;
            while gate.creating > 0 {
                gate = self
                    .quiet
                    .wait(gate)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
        let model = self.core.model();
        model.class_remove(CLASS, &self.device);
        let waiting = Waiting::new(&self.device);
        let mut parts = Vec::new();
        for device in self.devices() {
            if let Outcome::Waiting(part) = device.remove(&self.core, policy) {
                parts.push(part);
            } else if let Some(part) = device.removing() {
                // Somebody else's removal, which waits.
                part.join(&self.core, policy);
                parts.push(part);
            }
        }
        waiting.set_parts(parts.clone());
        // One more than there are parts, so that it cannot end before all have been told.
        let left = Arc::new(AtomicUsize::new(parts.len() + 1));
        let step = {
            let parent = Arc::clone(self);
            let waiting = waiting.clone();
            move || {
                if left.fetch_sub(1, Ordering::AcqRel) == 1 {
                    parent.finish();
                    waiting.finish(Ok(()));
                }
            }
        };
        for part in parts {
            let step = step.clone();
            part.on_done(move |_| step());
        }
        step();
        waiting.outcome()
    }

    fn finish(&self) {
        self.device.set_role(Role::Plain);
        if let Some(bus) = self.core.model().bus(BUS) {
            bus.remove_driver(&self.bus_driver);
        }
        self.device
            .uevent(&self.core, "change", vec![state("unregistered")]);
    }

    /// A create or remove may run until the value is dropped; `ENODEV` once the parent is going.
    fn enter(&self) -> Result<Running<'_>> {
        let mut gate = lock(&self.gate);
        if gate.going {
            return Err(Errno::NODEV);
        }
        gate.creating += 1;
        Ok(Running(self))
    }
}

struct Running<'a>(&'a Parent);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        lock(&self.0.gate).creating -= 1;
        self.0.quiet.notify_all();
    }
}

/// `mdev_device_remove()`: what a 1 written to `remove` does. `ENODEV` when it is going already
/// or its parent is, `EINVAL` when it is no mediated device, `EAGAIN` while its create still runs.
/// (In the kernel the attribute is gone after that `EAGAIN`; here it can be tried again.)
pub fn remove(core: &Core, device: &Arc<BusDevice>, policy: Policy) -> Outcome {
    let Some(instance) = device.mdev() else {
        return Outcome::Done(Err(Errno::INVAL));
    };
    if !device.is_present() {
        return Outcome::Done(Err(Errno::NODEV));
    }
    if !instance.active.load(Ordering::Acquire) {
        return Outcome::Done(Err(Errno::AGAIN));
    }
    match instance.parent.enter() {
        Ok(_running) => device.remove(core, policy),
        Err(errno) => Outcome::Done(Err(errno)),
    }
}

fn state(text: &str) -> (String, String) {
    ("MDEV_STATE".to_owned(), text.to_owned())
}
