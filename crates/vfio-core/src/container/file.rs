//! One open of the container node, and the groups in it.

use super::type1::{Member, Type1, Version};
use crate::device::{Binding, Device, DmaSpace, GroupType};
use crate::dma::{Port, Space};
use crate::model::{DmaOwnership, IommuGroup};
use crate::{Errno, Result};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vfio_uapi::container::extension;

/// How many mappings a container may have unless it is told otherwise: the module parameter
/// `dma_entry_limit`.
pub const DMA_ENTRY_LIMIT: u32 = 65535;

/// A container: one open of `/dev/vfio/vfio`, plus one reference per group in it.
///
/// Empty, it grants nothing. With groups in it, `VFIO_SET_IOMMU` gives it a backend, which goes
/// with the last group, and all mappings with it; then it is empty again and can be used anew.
/// Container, groups and devices may be closed in any order.
#[derive(Debug)]
pub struct Container {
    entry_limit: u32,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// In the order of joining.
    groups: Vec<Member>,
    backend: Option<Arc<Type1>>,
}

impl Container {
    /// An empty container, for an open of the node.
    pub fn new() -> Arc<Container> {
        Container::with_entry_limit(DMA_ENTRY_LIMIT)
    }

    /// The same with room for so many mappings at a time; one more is `ENOSPC`.
    pub fn with_entry_limit(entry_limit: u32) -> Arc<Container> {
        Arc::new(Container {
            entry_limit,
            state: Mutex::default(),
        })
    }

    /// The file is closed. What is mapped stays for as long as a group is in the container, as in
    /// the kernel, where each group holds a reference.
    pub fn close(&self) {
        // The groups have the rest: each takes its part away when it goes.
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn backend(&self) -> Option<Arc<Type1>> {
        self.state().backend.clone()
    }

    /// `VFIO_SET_IOMMU`. `EINVAL` without a group, when it is set already, and for the extension
    /// number 9, which type1 knows but cannot be opened as; `ENODEV` for what no backend knows
    /// (`vfio_ioctl_set_iommu`, `vfio_iommu_type1_open`).
    pub(super) fn set_iommu(&self, number: u64) -> Result {
        let mut state = self.state();
        if state.groups.is_empty() || state.backend.is_some() {
            return Err(Errno::INVAL);
        }
        let version = match u32::try_from(number) {
            Ok(extension::TYPE1) => Version::V1,
            Ok(extension::TYPE1_V2) => Version::V2,
            Ok(extension::UNMAP_ALL) => return Err(Errno::INVAL),
            _ => return Err(Errno::NODEV),
        };
        let backend = Type1::new(version, self.entry_limit);
        for group in &state.groups {
            backend.attach(group)?;
        }
        state.backend = Some(Arc::new(backend));
        Ok(())
    }

    /// `VFIO_GROUP_SET_CONTAINER`: the group joins. Dropping the value takes it out again; with
    /// the last group the backend goes, and every mapping.
    ///
    /// In this order: `EPERM` when the DMA of a hardware group belongs to somebody else; if there
    /// is a backend, `EBUSY` while a mapping has lost its address (`VFIO_DMA_UNMAP_FLAG_VADDR`),
    /// `EINVAL` when the group is in already or what it cannot address is mapped, and `EFAULT`
    /// when memory that is mapped is not there (`vfio_iommu_type1_attach_group`).
    pub(crate) fn attach(
        self: &Arc<Self>,
        group: &Arc<IommuGroup>,
        kind: GroupType,
    ) -> Result<Attached> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1 << 63);
        let member = Member {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            group: Arc::clone(group),
            kind,
        };
        let owned = match kind {
            GroupType::Physical => Some(group.claim_dma(member.id)?),
            GroupType::Emulated => None,
        };
        let backend = {
            let mut state = self.state();
            let backend = state.backend.clone();
            if let Some(backend) = &backend {
                backend.attach(&member)?;
            }
            state.groups.push(member.clone());
            backend
        };
        let attached = Attached(Arc::new(Membership {
            container: Arc::clone(self),
            id: member.id,
            _owned: owned,
        }));
        // A new domain is filled with what is mapped. Looked at with no lock held; what is mapped
        // meanwhile is looked at there, since the group counts already.
        if let Some(backend) = backend.filter(|_| kind == GroupType::Physical) {
            backend.check_reach()?;
        }
        Ok(attached)
    }

    fn leave(&self, id: u64) {
        let mut state = self.state();
        state.groups.retain(|group| group.id != id);
        if let Some(backend) = &state.backend {
            backend.detach(id);
        }
        let gone = match state.groups.is_empty() {
            true => state.backend.take(),
            false => None,
        };
        drop(state);
        // Every mapping goes, with no lock held.
        drop(gone);
    }
}

/// A group's place in a container. Dropped by whichever of group and devices lets go last.
#[derive(Debug)]
struct Membership {
    container: Arc<Container>,
    id: u64,
    _owned: Option<DmaOwnership>,
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.container.leave(self.id);
    }
}

/// A group's membership in a container. Dropping it is the detach, unless a device is still open
/// through it: then the last close is.
#[derive(Debug)]
pub(crate) struct Attached(Arc<Membership>);

impl Attached {
    /// First open of a device of the group: `EINVAL` before `VFIO_SET_IOMMU`. The device's DMA
    /// goes to the container from now on, until the value is dropped, which is the last close: it
    /// waits, not for ever, for accesses in progress.
    pub(crate) fn open(&self, device: &Device) -> Result<Box<dyn Binding>> {
        let backend = self.0.container.backend().ok_or(Errno::INVAL)?;
        let emulated = device.kind() == Some(GroupType::Emulated);
        let id = device.serial();
        if emulated {
            backend.add_device(id, device.downgrade());
        }
        let port = Arc::new(Port::new(Errno::INVAL));
        port.switch(Some(Arc::new(backend.view(emulated)) as Arc<dyn Space>));
        Ok(Box::new(Opened {
            port,
            backend,
            id,
            _membership: Arc::clone(&self.0),
        }))
    }
}

/// An open device's end of it.
struct Opened {
    port: Arc<Port>,
    backend: Arc<Type1>,
    id: u64,
    _membership: Arc<Membership>,
}

impl fmt::Debug for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opened").finish_non_exhaustive()
    }
}

impl Binding for Opened {
    fn dma(&self) -> Arc<dyn DmaSpace> {
        Arc::clone(&self.port) as Arc<dyn DmaSpace>
    }

    fn devid(&self) -> u32 {
        0
    }

    /// A file of a group does not know this command.
    fn attach(&self, _pt_id: u32) -> Result<u32> {
        Err(Errno::NOTTY)
    }

    fn detach(&self) {}
}

impl Drop for Opened {
    fn drop(&mut self) {
        if let Some(route) = self.port.switch(None) {
            route.drain();
        }
        self.backend.remove_device(self.id);
    }
}
