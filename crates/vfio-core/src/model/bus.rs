//! Buses and the drivers on them (`drivers/base/{bus,driver,dd}.c`).

use super::names::{self, ByName};
use super::{BusDevice, Model, lock, read, write};
use crate::device::{DeviceOps, GroupType, Registration, ReleaseSlot, UnregisteredDevice};
use crate::{Core, Errno, Result};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock};

/// A driver that makes a VFIO device out of a device on its bus, as a value that says how. The
/// bus allocates, registers, and later unregisters it.
pub trait VfioDriver: Send + Sync + 'static {
    /// The devices it makes.
    type Ops: DeviceOps;

    /// Its name on the bus.
    fn name(&self) -> &'static str;

    /// Physical or emulated.
    fn group_type(&self) -> GroupType {
        GroupType::Emulated
    }

    /// What `init` gets; an error is the errno of the bind.
    fn args(&self, device: &Arc<BusDevice>) -> Result<<Self::Ops as DeviceOps>::Args>;

    /// The place the device is to occupy in a structure of somebody else's, if it is not to
    /// stand for itself; see [`ReleaseSlot`].
    fn slot(&self, device: &Arc<BusDevice>) -> Option<Arc<ReleaseSlot>> {
        let _ = device;
        None
    }
}

/// `drv->probe`, erased.
pub(crate) trait Probe: Send + Sync {
    fn probe(&self, core: &Core, device: &Arc<BusDevice>) -> Result<Registration>;
}

/// Any [`VfioDriver`] as a [`Probe`].
pub(crate) struct Vfio<D>(pub(crate) D);

impl<D: VfioDriver> Probe for Vfio<D> {
    fn probe(&self, core: &Core, device: &Arc<BusDevice>) -> Result<Registration> {
        make::<D::Ops>(
            core,
            device,
            self.0.name(),
            self.0.group_type(),
            || self.0.args(device),
            || self.0.slot(device),
        )
    }
}

/// The body of every VFIO driver's probe: alloc, register. On error nothing remains.
pub(crate) fn make<O: DeviceOps>(
    core: &Core,
    device: &Arc<BusDevice>,
    driver: &str,
    kind: GroupType,
    args: impl FnOnce() -> Result<O::Args>,
    slot: impl FnOnce() -> Option<Arc<ReleaseSlot>>,
) -> Result<Registration> {
    let asked = catch_unwind(AssertUnwindSafe(|| Ok((args()?, slot()))));
    let (args, slot) = asked.unwrap_or_else(|_| {
        tracing::error!("{driver} {}: probe panicked", device.name());
        Err(Errno::IO)
    })?;
    let unregistered = match slot {
        Some(slot) => UnregisteredDevice::<O>::alloc_in(core, &slot, device, args)?,
        None => UnregisteredDevice::<O>::alloc(core, device, args)?,
    };
    unregistered
        .register(kind)
        .map_err(|(unregistered, errno)| {
            drop(unregistered);
            errno
        })
}

/// A driver's name with underscores; most have none to replace.
fn module_of(name: &'static str) -> Cow<'static, str> {
    if name.contains('-') {
        name.replace('-', "_").into()
    } else {
        name.into()
    }
}

/// A driver on a bus (`struct device_driver`).
pub struct Driver {
    name: &'static str,
    bus: &'static str,
    module: Cow<'static, str>,
    probe: Arc<dyn Probe>,
    /// Where the driver's own value is, for drivers that several may register.
    pub(super) value: usize,
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Driver({}:{})", self.bus, self.name)
    }
}

impl Driver {
    pub(crate) fn new(bus: &'static str, name: &'static str, probe: Arc<dyn Probe>) -> Arc<Driver> {
        Arc::new(Driver {
            name,
            bus,
            module: module_of(name),
            probe,
            value: 0,
        })
    }

    /// A driver known by its value's address, which `probe` keeps.
    pub(super) fn shared(
        bus: &'static str,
        name: &'static str,
        probe: Arc<dyn Probe>,
        value: usize,
    ) -> Arc<Driver> {
        Arc::new(Driver {
            name,
            bus,
            module: module_of(name),
            probe,
            value,
        })
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Its bus.
    pub fn bus(&self) -> &'static str {
        self.bus
    }

    /// What its `module` link leads to: its name with underscores.
    pub fn module(&self) -> &str {
        &self.module
    }

    pub(crate) fn probe(&self, core: &Core, device: &Arc<BusDevice>) -> Result<Registration> {
        self.probe.probe(core, device)
    }
}

/// What is particular to a bus.
#[derive(Clone, Copy, Debug)]
pub struct BusOptions {
    /// Whether a driver is for a device (`bus->match`), the override not considered.
    pub matches: fn(&BusDevice, &Driver) -> bool,
    /// Its devices have a `driver_override`.
    pub driver_override: bool,
    /// Devices are bound as they are added.
    pub autoprobe: bool,
}

/// A bus (`struct bus_type`): `/sys/bus/NAME`.
#[derive(Debug)]
pub struct Bus {
    name: &'static str,
    options: BusOptions,
    autoprobe: AtomicBool,
    devices: RwLock<HashSet<ByName>>,
    /// With the number of those who registered it.
    drivers: Mutex<BTreeMap<&'static str, (Arc<Driver>, usize)>>,
}

impl Bus {
    pub(crate) fn new(name: &'static str, options: BusOptions) -> Arc<Bus> {
        Arc::new(Bus {
            name,
            options,
            autoprobe: AtomicBool::new(options.autoprobe),
            devices: RwLock::default(),
            drivers: Mutex::default(),
        })
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// A driver that the bus has from the start.
    pub(super) fn begin_with(&self, driver: Arc<Driver>) {
        lock(&self.drivers).insert(driver.name, (driver, 1));
    }

    /// True when its devices have a `driver_override`.
    pub fn has_driver_override(&self) -> bool {
        self.options.driver_override
    }

    /// The devices on it, by name.
    pub fn devices(&self) -> Vec<Arc<BusDevice>> {
        names::sorted(&read(&self.devices))
    }

    /// The device of this name.
    pub fn device(&self, name: &str) -> Option<Arc<BusDevice>> {
        read(&self.devices)
            .get(name)
            .map(|found| Arc::clone(&found.0))
    }

    /// The drivers on it, by name.
    pub fn drivers(&self) -> Vec<Arc<Driver>> {
        lock(&self.drivers)
            .values()
            .map(|(d, _)| Arc::clone(d))
            .collect()
    }

    /// The driver of this name.
    pub fn driver(&self, name: &str) -> Option<Arc<Driver>> {
        lock(&self.drivers).get(name).map(|(d, _)| Arc::clone(d))
    }

    /// `drivers_autoprobe`.
    pub fn autoprobe(&self) -> bool {
        self.autoprobe.load(Ordering::Relaxed)
    }

    /// Sets `drivers_autoprobe`.
    pub fn set_autoprobe(&self, on: bool) {
        self.autoprobe.store(on, Ordering::Relaxed);
    }

    /// `driver_register()`: adds a driver and, with autoprobe, binds it to the devices that wait
    /// for one. `EBUSY` when there is one of this name.
    pub fn add_driver<D: VfioDriver>(&self, core: &Core, driver: D) -> Result<Arc<Driver>> {
        let driver = Driver::new(self.name, driver.name(), Arc::new(Vfio(driver)));
        let driver = self.insert_driver(core.model(), &driver, Vec::new())?;
        if self.autoprobe() {
            for device in self.devices() {
                if self.is_match(&device, &driver) {
                    // A driver that fails on one device is still there for the others.
                    let _ = device.bind(core, &driver);
                }
            }
        }
        Ok(driver)
    }

    pub(crate) fn insert_driver(
        &self,
        model: &Model,
        driver: &Arc<Driver>,
        parameters: super::Parameters,
    ) -> Result<Arc<Driver>> {
        let mut drivers = lock(&self.drivers);
        let registered = match drivers.get_mut(driver.name) {
            Some((there, count)) if there.value != 0 && there.value == driver.value => {
                *count += 1;
                Arc::clone(there)
            }
            Some(_) => return Err(Errno::BUSY),
            None => {
                drivers.insert(driver.name, (Arc::clone(driver), 1));
                Arc::clone(driver)
            }
        };
        drop(drivers);
        model.add_module(driver.module(), parameters);
        Ok(registered)
    }

    /// One of those who registered it is gone; with the last one, the driver.
    pub(crate) fn remove_driver(&self, driver: &Arc<Driver>) {
        let mut drivers = lock(&self.drivers);
        let last = match drivers.get_mut(driver.name) {
            Some((there, count)) if Arc::ptr_eq(there, driver) => {
                *count -= 1;
                *count == 0
            }
            _ => false,
        };
        let gone = last.then(|| drivers.remove(driver.name));
        drop(drivers);
        drop(gone);
    }

    /// True when `driver` is for `device` (`driver_match_device`, with the override first).
    pub(crate) fn is_match(&self, device: &BusDevice, driver: &Driver) -> bool {
        match device.driver_override() {
            Some(name) if self.options.driver_override => *name == *driver.name,
            _ => (self.options.matches)(device, driver),
        }
    }

    /// Binds a device that has no driver to the first that is for it and does not fail
    /// (`device_attach`). `Ok` also when there is none.
    pub fn attach(&self, core: &Core, device: &Arc<BusDevice>) -> Result {
        for driver in self.drivers() {
            if device.driver().is_some() {
                break;
            }
            if self.is_match(device, &driver) {
                match device.bind(core, &driver) {
                    Ok(()) | Err(Errno::BUSY) => break,
                    // A probe that fails leaves the device to the next driver.
                    Err(_) => {}
                }
            }
        }
        Ok(())
    }

    pub(super) fn insert(&self, device: &Arc<BusDevice>) -> Result {
        match write(&self.devices).insert(ByName(Arc::clone(device))) {
            true => Ok(()),
            false => Err(Errno::EXIST),
        }
    }

    pub(super) fn remove(&self, device: &BusDevice) {
        let gone = names::take(&mut write(&self.devices), device);
        drop(gone);
    }
}
