//! All groups (`vfio.group_list`, and the ida of their minors).

use super::{Backend, Group};
use crate::Result;
use crate::device::{GroupType, Housekeeper};
use crate::index::{IndexPool, MINOR_MASK};
use crate::model::IommuGroup;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

/// Groups by minor. The lock is the kernel's `vfio.group_lock`: finding, making and ending a group
/// exclude each other.
#[derive(Debug)]
pub(crate) struct Groups {
    minors: IndexPool,
    table: RwLock<Vec<Option<Arc<Group>>>>,
    pub(super) close_grace: Duration,
    pub(super) house: Arc<Housekeeper>,
}

impl Groups {
    pub(crate) fn new(close_grace: Duration, house: &Arc<Housekeeper>) -> Groups {
        Groups {
            minors: IndexPool::new(0, MINOR_MASK),
            table: RwLock::default(),
            close_grace,
            house: Arc::clone(house),
        }
    }

    /// One more device of the IOMMU group is registered (`vfio_group_find_or_alloc`,
    /// `vfio_create_group`). True with it if the group is new. `ENOSPC` when all minors are taken.
    pub(crate) fn join(
        &self,
        iommu: &Arc<IommuGroup>,
        kind: GroupType,
    ) -> Result<(Arc<Group>, bool)> {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(group) = iommu.vfio() {
            group.state().drivers += 1;
            return Ok((group, false));
        }
        let minor = self.minors.take()?;
        let at = minor.get() as usize;
        let group = Arc::new(Group::new(iommu, kind, minor, self));
        if table.len() <= at {
            table.resize(at + 1, None);
        }
        table[at] = Some(Arc::clone(&group));
        iommu.set_vfio(Some(&group));
        Ok((group, true))
    }

    /// A device of it is unregistered; the last one ends it (`vfio_device_remove_group`). True if
    /// it has died: its name leads nowhere, and the container is left. Who has it open keeps the
    /// object.
    pub(crate) fn leave(&self, group: &Arc<Group>) -> bool {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let mut state = group.state();
        state.drivers -= 1;
        if state.drivers > 0 {
            return false;
        }
        let iommu = state.iommu.take();
        let left = match &state.backend {
            Backend::Container(_) => std::mem::replace(&mut state.backend, Backend::None),
            // An iommufd stays recorded; who joins sees that the group is dead.
            _ => Backend::None,
        };
        drop(state);
        if let Some(iommu) = &iommu {
            iommu.set_vfio(None);
        }
        let gone = table.get_mut(group.minor() as usize).and_then(Option::take);
        drop(table);
        drop((gone, left, iommu));
        group.changed.notify_all();
        true
    }

    /// The group with this minor, until it dies.
    pub(crate) fn by_minor(&self, minor: u32) -> Option<Arc<Group>> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.get(minor as usize)?.clone()
    }

    /// All of them, by minor.
    pub(crate) fn all(&self) -> Vec<Arc<Group>> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.iter().flatten().cloned().collect()
    }
}
