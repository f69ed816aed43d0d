//! IOMMU groups (`drivers/iommu/iommu.c`).

use super::BusDevice;
use crate::few::Few;
use crate::group::Group;
use crate::index::{Index, IndexPool};
use crate::{Errno, Result};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

/// What `type` can read.
const DOMAINS: [&str; 4] = ["unknown", "DMA", "identity", "DMA-FQ"];

/// An IOMMU group: `/sys/kernel/iommu_groups/N`. It exists as long as a device is in it.
#[derive(Debug)]
pub struct IommuGroup {
    name: Option<&'static str>,
    /// What a `default_domain` would say, one of [`DOMAINS`]; a group without a name has one.
    domain: AtomicU8,
    reserved: Box<[ReservedRegion]>,
    /// Who may program its DMA, and with how many of its devices.
    dma_owner: Mutex<Option<(u64, u32)>>,
    pub(super) devices: Mutex<Few<Weak<BusDevice>>>,
    /// The VFIO group of its devices, while one of them is registered.
    vfio: Mutex<Weak<Group>>,
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

    /// Its VFIO group, while a device of it is registered.
    pub fn vfio(&self) -> Option<Arc<Group>> {
        let vfio = self.vfio.lock().unwrap_or_else(PoisonError::into_inner);
        vfio.upgrade()
    }

    pub(crate) fn set_vfio(&self, group: Option<&Arc<Group>>) {
        let new = group.map_or_else(Weak::new, Arc::downgrade);
        *self.vfio.lock().unwrap_or_else(PoisonError::into_inner) = new;
    }

    /// True while its DMA belongs to somebody (`iommu_group_dma_owner_claimed`).
    pub(crate) fn is_dma_owned(&self) -> bool {
        let owner = self.dma_owner.lock();
        owner.unwrap_or_else(PoisonError::into_inner).is_some()
    }
}

/// A range of IOVA that a device cannot use for DMA (`struct iommu_resv_region`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReservedRegion {
    /// First address.
    pub start: u64,
    /// Last address.
    pub last: u64,
    /// Why.
    pub kind: ReservedKind,
}

/// `enum iommu_resv_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReservedKind {
    /// Mapped one to one for the device.
    Direct,
    /// The same, but it can be given up when the device is handed out.
    DirectRelaxable,
    /// Not to be used.
    Reserved,
    /// Where message-signalled interrupts go.
    Msi,
}

impl ReservedKind {
    fn name(self) -> &'static str {
        match self {
            ReservedKind::Direct => "direct",
            ReservedKind::DirectRelaxable => "direct-relaxable",
            ReservedKind::Reserved => "reserved",
            ReservedKind::Msi => "msi",
        }
    }
}

/// The interrupt window of an x86 machine, which every hardware group reserves there.
pub const X86_MSI: ReservedRegion = ReservedRegion {
    start: 0xfee0_0000,
    last: 0xfeef_ffff,
    kind: ReservedKind::Msi,
};

impl IommuGroup {
    /// What its devices cannot use, sorted by address. Empty for software devices.
    pub fn reserved_regions(&self) -> &[ReservedRegion] {
        &self.reserved
    }

    /// The text of `reserved_regions` (`iommu_group_show_resv_regions`).
    pub(crate) fn show_reserved(&self) -> String {
        let line = |region: &ReservedRegion| {
            format!(
                "0x{:016x} 0x{:016x} {}\n",
                region.start,
                region.last,
                region.kind.name()
            )
        };
        self.reserved.iter().map(line).collect()
    }

    /// The text of `type`, without newline: `unknown` for a group without a default domain, as
    /// that of a software device.
    pub(crate) fn domain(&self) -> &'static str {
        let domain = self.domain.load(Ordering::Acquire);
        DOMAINS[usize::from(domain).min(DOMAINS.len() - 1)]
    }

    /// A write to `type` (`iommu_group_store_type`): `EINVAL` for a group without a default
    /// domain and for an unknown word, `EPERM` while one of its devices is open.
    pub(crate) fn set_domain(&self, word: &str) -> Result {
        let wanted = match word {
            "identity" => 2,
            "DMA" | "auto" => 1,
            "DMA-FQ" => 3,
            _ => return Err(Errno::INVAL),
        };
        if self.name.is_some() {
            return Err(Errno::INVAL);
        }
        let owned = |device: Arc<BusDevice>| device.vfio_device().is_some_and(|d| d.is_open());
        if self.is_dma_owned() || self.devices().into_iter().any(owned) {
            return Err(Errno::PERM);
        }
        self.domain.store(wanted, Ordering::Release);
        Ok(())
    }
}

/// A share in the DMA of a group, given back when dropped (`iommu_device_release_dma_owner`).
#[derive(Debug)]
pub(crate) struct DmaOwnership(Arc<IommuGroup>);

impl DmaOwnership {
    pub(crate) fn group(&self) -> &Arc<IommuGroup> {
        &self.0
    }
}

impl Drop for DmaOwnership {
    fn drop(&mut self) {
        let owner = &self.0.dma_owner;
        let mut owner = owner.lock().unwrap_or_else(PoisonError::into_inner);
        *owner = match *owner {
            Some((id, count)) if count > 1 => Some((id, count - 1)),
            _ => None,
        };
    }
}

impl IommuGroup {
    /// One more of its devices belongs to this owner (`iommu_device_claim_dma_owner`). `EPERM`
    /// while another owner has one.
    pub(crate) fn claim_dma(self: &Arc<Self>, owner: u64) -> Result<DmaOwnership> {
        let mut now = self
            .dma_owner
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *now = match *now {
            None => Some((owner, 1)),
            Some((id, count)) if id == owner => Some((id, count.saturating_add(1))),
            Some(_) => return Err(Errno::PERM),
        };
        drop(now);
        Ok(DmaOwnership(Arc::clone(self)))
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
        self.create_with(name, &[])
    }

    /// The same for hardware that reserves address ranges.
    pub fn create_with(
        &self,
        name: Option<&'static str>,
        reserved: &[ReservedRegion],
    ) -> Result<Arc<IommuGroup>> {
        let mut reserved: Box<[ReservedRegion]> = reserved.into();
        reserved.sort_by_key(|region| (region.start, region.last));
        let index = self.numbers.take()?;
        let at = index.get() as usize;
        let group = Arc::new(IommuGroup {
            name,
            domain: AtomicU8::new(u8::from(name.is_none())),
            reserved,
            dma_owner: Mutex::default(),
            devices: Mutex::default(),
            vfio: Mutex::default(),
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
