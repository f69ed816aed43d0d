//! The context, and what binds a device to it.

use super::ioas::Ioas;
use super::table::{Bound, Kind, Leftovers, Object, Table};
use crate::device::{Binding, Device, DmaSpace, GroupType, WeakDevice};
use crate::dma::{LastMapper, Port, Quota, tell};
use crate::{Errno, Result};
use dma_memory::FileRegistry;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How many areas one context may have: some 40 MiB of tables. The kernel charges a client's
/// memory cgroup instead, which a daemon that works for many clients cannot.
const MAX_AREAS: usize = 1 << 18;

/// A context: one open of `/dev/iommu`, plus one reference per device bound to it.
///
/// It ends when the file is closed *and* no device is bound any more, and no group has it for its
/// container: closing the descriptor first leaves every mapping in place for them, as in the
/// kernel, where both hold the file.
///
/// One context has at most 65536 objects, and 262144 mappings in all of its IOASes together;
/// beyond that is `ENOMEM`. Nothing is pinned, so nothing is accounted to `RLIMIT_MEMLOCK`.
#[derive(Debug)]
pub struct Iommufd {
    /// Unlike any other context's: the owner of a group's DMA.
    id: u64,
    table: Mutex<Table>,
    quota: Arc<Quota>,
    files: Arc<FileRegistry>,
    pub(super) mapper: LastMapper,
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

impl Iommufd {
    /// A fresh context, for an open of the node.
    pub fn new() -> Arc<Iommufd> {
        Iommufd::with_areas(MAX_AREAS)
    }

    pub(super) fn with_areas(areas: usize) -> Arc<Iommufd> {
        Arc::new(Iommufd {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            table: Mutex::new(Table::new()),
            quota: Quota::new(areas),
            files: Arc::new(FileRegistry::without_devices()),
            mapper: LastMapper::default(),
        })
    }

    /// The file is closed. If no device is bound, everything is destroyed before this returns;
    /// else that happens when the last one is unbound, and until then all stays as it is.
    pub fn close(&self) {
        let mut left = Leftovers::default();
        let mut table = self.table();
        table.file_open = false;
        table.clear_if_done(&mut left);
        drop(table);
        left.settle();
    }

    /// Binds a device: an *access* object for an emulated one, a *device* object for a physical
    /// one. `ENODEV` for a physical device without an IOMMU group, `EPERM` when its group's DMA
    /// belongs to another context, `ENOMEM`.
    pub(crate) fn bind(self: &Arc<Self>, device: &Device) -> Result<Box<dyn Binding>> {
        let kind = match device.kind() {
            Some(GroupType::Emulated) => Kind::Access { ioas: None },
            Some(GroupType::Physical) => {
                let group = device.parent().iommu_group().ok_or(Errno::NODEV)?;
                Kind::Device {
                    hwpt: None,
                    group: group.claim_dma(self.id)?,
                }
            }
            None => return Err(Errno::NODEV),
        };
        let port = Arc::new(Port::new(Errno::NOENT));
        let bound = Bound {
            device: device.downgrade(),
            port: Arc::clone(&port),
            kind,
        };
        let mut table = self.table();
        let index = table.take_id()?;
        let id = table.add(index, Object::Bound(bound));
        table.holders += 1;
        drop(table);
        Ok(Box::new(Bind {
            context: Arc::clone(self),
            device: device.downgrade(),
            is_access: device.kind() == Some(GroupType::Emulated),
            id,
            port,
        }))
    }

    /// The objects. Held for lookups and changes of the table only.
    pub(super) fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn quota(&self) -> &Arc<Quota> {
        &self.quota
    }

    pub(super) fn files(&self) -> &Arc<FileRegistry> {
        &self.files
    }

    pub(super) fn ioas(&self, id: u32) -> Result<Arc<Ioas>> {
        self.table().ioas(id).cloned()
    }
}

/// A bound device's end of it. Dropping it detaches and removes the object.
struct Bind {
    context: Arc<Iommufd>,
    device: WeakDevice,
    is_access: bool,
    id: u32,
    port: Arc<Port>,
}

impl Bind {
    /// What was mapped there is out of the device's reach now.
    fn tell_all_gone(&self) {
        tell(&[(self.id, self.device.clone())], 0, u64::MAX);
    }
}

impl Binding for Bind {
    fn dma(&self) -> Arc<dyn DmaSpace> {
        Arc::clone(&self.port) as Arc<dyn DmaSpace>
    }

    fn devid(&self) -> u32 {
        self.id
    }

    fn attach(&self, pt_id: u32) -> Result<u32> {
        if !self.is_access {
            // A page table about to be made is filled with what is mapped: looked at first, with
            // no lock held. What is mapped in between is not checked, and fails at the access.
            let ioas = self.context.ioas(pt_id);
            if let Ok(ioas) = ioas {
                ioas.check_reach()?;
            }
        }
        let mut left = Leftovers::default();
        let done = self.context.table().attach(self.id, pt_id, &mut left);
        let replaced = !left.routes.is_empty();
        if replaced && self.is_access {
            self.tell_all_gone();
        }
        left.settle();
        done
    }

    fn detach(&self) {
        let mut left = Leftovers::default();
        self.context.table().detach(self.id, &mut left);
        let was_attached = !left.routes.is_empty();
        if was_attached && self.is_access {
            self.tell_all_gone();
        }
        left.settle();
    }
}

impl Drop for Bind {
    fn drop(&mut self) {
        let mut left = Leftovers::default();
        let mut table = self.context.table();
        table.detach(self.id, &mut left);
        table.remove(self.id, &mut left);
        table.holders = table.holders.saturating_sub(1);
        table.clear_if_done(&mut left);
        drop(table);
        left.settle();
    }
}
