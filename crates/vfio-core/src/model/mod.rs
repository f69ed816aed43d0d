//! Buses, drivers, devices, classes, IOMMU groups: the kernel's device model (`drivers/base`,
//! `drivers/iommu/iommu.c`), as far as a VFIO program can see it.
//!
//! Nothing here blocks. What ends at once is [`Outcome::Done`]; an unbind or a removal that finds
//! users is [`Outcome::Waiting`], goes on by itself, and can be watched or cut short through the
//! value it comes with.

mod bus;
mod device;
pub mod faux;
mod group;
pub mod mdev;
mod names;
mod outcome;
#[cfg(all(test, not(feature = "shuttle")))]
pub(crate) mod testing;
#[cfg(all(test, not(feature = "shuttle")))]
mod tests;

pub use bus::{Bus, BusOptions, Driver, VfioDriver};
pub use device::{BusDevice, Subsystem};
pub(crate) use group::DmaOwnership;
pub use group::{IommuGroup, IommuGroups, ReservedKind, ReservedRegion, X86_MSI};
pub use outcome::{Outcome, Waiting};

pub(crate) use device::Role;
pub(crate) use names::ByName;

use crate::{Errno, Result};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use uuid::Uuid;

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read<T: ?Sized>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T: ?Sized>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// Parameters of a module, name and text without newline.
pub type Parameters = Vec<(String, String)>;

/// Buses and classes and what is on them.
#[derive(Debug)]
pub struct Model {
    buses: RwLock<BTreeMap<&'static str, Arc<Bus>>>,
    classes: RwLock<BTreeMap<&'static str, HashSet<ByName>>>,
    /// Devices without a parent, by the path their directory is in.
    roots: RwLock<BTreeMap<Box<str>, HashSet<ByName>>>,
    modules: RwLock<BTreeMap<String, Parameters>>,
    /// Mdevs that exist, up to the end of their removal.
    uuids: Arc<Mutex<HashSet<Uuid>>>,
    /// Devices whose driver waits for users, by the device's id.
    leaving: Mutex<HashMap<u64, Waiting>>,
    faux: Arc<BusDevice>,
}

impl Model {
    pub(crate) fn new() -> Model {
        let model = Model {
            buses: RwLock::default(),
            classes: RwLock::default(),
            roots: RwLock::default(),
            modules: RwLock::default(),
            uuids: Arc::default(),
            leaving: Mutex::default(),
            faux: BusDevice::new("/devices", "faux", None),
        };
        model.faux.exists_from_the_start();
        write(&model.roots).insert(
            "/devices".into(),
            HashSet::from([ByName(Arc::clone(&model.faux))]),
        );
        write(&model.classes).insert("mdev_bus", HashSet::new());
        let bus = mdev::bus();
        write(&model.buses).insert(bus.name(), bus);
        let bus = faux::bus();
        write(&model.buses).insert(bus.name(), bus);
        for (module, parameters) in MODULES {
            let text = |(name, value): &(&str, &str)| ((*name).into(), (*value).into());
            model.add_module(module, parameters.iter().map(text).collect());
        }
        model
    }

    /// The bus of this name.
    pub fn bus(&self, name: &str) -> Option<Arc<Bus>> {
        read(&self.buses).get(name).cloned()
    }

    /// All buses, by name.
    pub fn buses(&self) -> Vec<Arc<Bus>> {
        read(&self.buses).values().cloned().collect()
    }

    /// `bus_register()`. `EEXIST` when there is one of this name.
    pub fn add_bus(&self, name: &'static str, options: BusOptions) -> Result<Arc<Bus>> {
        let mut buses = write(&self.buses);
        if buses.contains_key(name) {
            return Err(Errno::EXIST);
        }
        let bus = Bus::new(name, options);
        buses.insert(name, Arc::clone(&bus));
        Ok(bus)
    }

    /// The classes that exist besides `vfio-dev`, by name. One exists while a device is in it;
    /// `mdev_bus` always.
    pub fn classes(&self) -> Vec<&'static str> {
        read(&self.classes).keys().copied().collect()
    }

    /// The devices in a class, by name; `None` when there is no such class.
    pub fn class(&self, name: &str) -> Option<Vec<Arc<BusDevice>>> {
        read(&self.classes).get(name).map(names::sorted)
    }

    /// A device of a class.
    pub fn class_device(&self, class: &str, name: &str) -> Option<Arc<BusDevice>> {
        let classes = read(&self.classes);
        Some(Arc::clone(&classes.get(class)?.get(name)?.0))
    }

    /// Devices without a parent whose directory is in `base`, by name.
    pub fn roots(&self, base: &str) -> Vec<Arc<BusDevice>> {
        read(&self.roots)
            .get(base)
            .map_or(Vec::new(), names::sorted)
    }

    /// The paths below `/sys` that hold devices without a parent.
    pub fn bases(&self) -> Vec<Box<str>> {
        read(&self.roots).keys().cloned().collect()
    }

    /// Modules and their parameters, by name: `/sys/module`.
    pub fn modules(&self) -> Vec<String> {
        read(&self.modules).keys().cloned().collect()
    }

    /// The parameters of one.
    pub fn module(&self, name: &str) -> Option<Parameters> {
        read(&self.modules).get(name).cloned()
    }

    /// Adds a module, or replaces its parameters.
    pub fn add_module(&self, name: &str, parameters: Parameters) {
        write(&self.modules).insert(name.to_owned(), parameters);
    }

    /// Every unbind and removal that waits for users at the moment, oldest first. What
    /// `vfioctl show` tells ("unregistering, waiting for …") comes from
    /// [`Waiting::describe`].
    pub fn unregistering(&self) -> Vec<Waiting> {
        let mut all: Vec<Waiting> = lock(&self.leaving).values().cloned().collect();
        all.sort_by_key(Waiting::since);
        all
    }

    /// The wait of one device, if its driver waits.
    pub fn unregistering_device(&self, device: &BusDevice) -> Option<Waiting> {
        lock(&self.leaving).get(&device.id()).cloned()
    }

    fn class_insert(&self, class: &'static str, device: &Arc<BusDevice>) -> Result {
        let mut classes = write(&self.classes);
        let members = classes.entry(class).or_default();
        if !members.insert(ByName(Arc::clone(device))) {
            return Err(Errno::EXIST);
        }
        Ok(())
    }

    fn class_remove(&self, class: &'static str, device: &BusDevice) {
        let mut classes = write(&self.classes);
        let Some(members) = classes.get_mut(class) else {
            return;
        };
        let gone = names::take(members, device);
        if members.is_empty() && class != "mdev_bus" {
            classes.remove(class);
        }
        drop(classes);
        drop(gone);
    }
}

/// What a kernel with VFIO has under `/sys/module`, with the parameters' values at rest.
const MODULES: &[(&str, &[(&str, &str)])] = &[
    ("iommufd", &[("allow_unsafe_interrupts", "N")]),
    ("mdev", &[]),
    ("vfio", &[("enable_unsafe_noiommu_mode", "N")]),
    (
        "vfio_iommu_type1",
        &[
            ("allow_unsafe_interrupts", "N"),
            ("disable_hugepages", "N"),
            ("dma_entry_limit", "65535"),
        ],
    ),
];
