//! Buses, drivers, devices, classes, IOMMU groups: the kernel's device model (`drivers/base`,
//! `drivers/iommu/iommu.c`), as far as a VFIO program can see it.

pub mod mdev;

use crate::device::Device;
use crate::index::{Index, IndexPool};
use crate::{Errno, Result};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

/// What a device's `subsystem` link leads to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Subsystem {
    /// `/sys/bus/NAME`.
    Bus(&'static str),
    /// `/sys/class/NAME`.
    Class(&'static str),
}

/// A device in the sense of the device model (`struct device`): on a bus or in a class, with a
/// directory under `/sys/devices`. A VFIO device belongs to one.
pub struct BusDevice {
    id: u64,
    name: String,
    subsystem: Option<Subsystem>,
    parent: Option<Arc<BusDevice>>,
    /// Where its directory is, below `/sys`, when it has no parent: `/devices/virtual/mtty`.
    base: String,
    vfio: RwLock<Option<Device>>,
    group: RwLock<Option<Arc<IommuGroup>>>,
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
        BusDevice::make(base.to_owned(), name, subsystem, None)
    }

    /// A device with its directory inside its parent's.
    pub fn child(
        parent: &Arc<BusDevice>,
        name: &str,
        subsystem: Option<Subsystem>,
    ) -> Arc<BusDevice> {
        BusDevice::make(String::new(), name, subsystem, Some(Arc::clone(parent)))
    }

    fn make(
        base: String,
        name: &str,
        subsystem: Option<Subsystem>,
        parent: Option<Arc<BusDevice>>,
    ) -> Arc<BusDevice> {
        Arc::new(BusDevice {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            name: name.to_owned(),
            subsystem,
            parent,
            base,
            vfio: RwLock::default(),
            group: RwLock::default(),
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
        self.vfio
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(crate) fn set_vfio_device(&self, device: Option<Device>) {
        let before = std::mem::replace(
            &mut *self.vfio.write().unwrap_or_else(PoisonError::into_inner),
            device,
        );
        drop(before);
    }

    /// Its IOMMU group.
    pub fn iommu_group(&self) -> Option<Arc<IommuGroup>> {
        self.group
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// `iommu_group_add_device()`. `EINVAL` when it is in a group.
    pub(crate) fn join_iommu_group(self: &Arc<Self>, group: &Arc<IommuGroup>) -> Result {
        let mut slot = self.group.write().unwrap_or_else(PoisonError::into_inner);
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
        let group = self
            .group
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(group) = group {
            let mut devices = group.devices.lock().unwrap_or_else(PoisonError::into_inner);
            devices.retain(|device| device.upgrade().is_some_and(|device| device.id != self.id));
        }
    }
}

/// An IOMMU group: `/sys/kernel/iommu_groups/N`. It exists as long as a device is in it.
#[derive(Debug)]
pub struct IommuGroup {
    name: Option<&'static str>,
    devices: Mutex<Vec<Weak<BusDevice>>>,
    groups: Weak<RwLock<Vec<Weak<IommuGroup>>>>,
    index: Index,
}

impl IommuGroup {
    /// Its number.
    pub fn id(&self) -> u32 {
        self.index.get()
    }

    /// The text of its `name` file, if it has one: `vfio-noiommu` for software devices.
    pub fn name(&self) -> Option<&'static str> {
        self.name
    }

    /// The devices in it.
    pub fn devices(&self) -> Vec<Arc<BusDevice>> {
        let devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        devices.iter().filter_map(Weak::upgrade).collect()
    }
}

impl Drop for IommuGroup {
    fn drop(&mut self) {
        if let Some(groups) = self.groups.upgrade() {
            let mut groups = groups.write().unwrap_or_else(PoisonError::into_inner);
            if let Some(slot) = groups.get_mut(self.index.get() as usize) {
                *slot = Weak::new();
            }
        }
    }
}

/// All IOMMU groups, by number.
#[derive(Debug)]
pub struct IommuGroups {
    numbers: IndexPool,
    groups: Arc<RwLock<Vec<Weak<IommuGroup>>>>,
}

impl IommuGroups {
    pub(crate) fn new(first: u32) -> IommuGroups {
        IommuGroups {
            numbers: IndexPool::new(first, i32::MAX as u32),
            groups: Arc::default(),
        }
    }

    /// `iommu_group_alloc()`: a group with the lowest free number. It is gone when the last
    /// reference to it is.
    pub fn create(&self, name: Option<&'static str>) -> Result<Arc<IommuGroup>> {
        let index = self.numbers.take()?;
        let at = index.get() as usize;
        let group = Arc::new(IommuGroup {
            name,
            devices: Mutex::default(),
            groups: Arc::downgrade(&self.groups),
            index,
        });
        let mut groups = self.groups.write().unwrap_or_else(PoisonError::into_inner);
        if groups.len() <= at {
            groups.resize(at + 1, Weak::new());
        }
        groups[at] = Arc::downgrade(&group);
        Ok(group)
    }

    /// The group with this number.
    pub fn get(&self, id: u32) -> Option<Arc<IommuGroup>> {
        let groups = self.groups.read().unwrap_or_else(PoisonError::into_inner);
        groups.get(id as usize)?.upgrade()
    }

    /// All groups, in the order of their numbers.
    pub fn all(&self) -> Vec<Arc<IommuGroup>> {
        let groups = self.groups.read().unwrap_or_else(PoisonError::into_inner);
        groups.iter().filter_map(Weak::upgrade).collect()
    }
}

/// Buses and classes and what is on them.
#[derive(Debug)]
pub struct Model {}

impl Model {
    pub(crate) fn new() -> Model {
        Model {}
    }
}
