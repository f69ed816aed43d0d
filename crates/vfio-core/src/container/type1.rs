//! The type1 backend: what is mapped where, and who may use it
//! (`drivers/vfio/vfio_iommu_type1.c`).

use super::dirty::Dirty;
use crate::device::{GroupType, WeakDevice};
use crate::dma::{
    ALL_PATIENCE, Area, Held, LastMapper, Prot, Quota, Space, Ticket, check_reach, hold, length,
    page_sizes, without,
};
use crate::model::{IommuGroup, ReservedKind};
use crate::{Errno, Result};
use client_process::Memory;
use dma_memory::{FileRegistry, IovaMap, ProcessMemory, Range, Source};
use std::collections::BTreeSet;
use std::sync::{
    Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
};
use std::time::Instant;
use vfio_uapi::caps::IovaRange;

/// Which of the two type1 interfaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    /// An unmap that covers the first address of a mapping takes all of it.
    V1,
    /// An unmap must not cut a mapping.
    V2,
}

/// A group in a container.
#[derive(Clone, Debug)]
pub(super) struct Member {
    /// Unlike any other's: also the owner of a hardware group's DMA.
    pub(super) id: u64,
    pub(super) group: Arc<IommuGroup>,
    pub(super) kind: GroupType,
}

/// A container's mappings. Its lock is only ever held for lookups and changes of the tables, never
/// while client memory is touched or a driver is called.
#[derive(Debug)]
pub(super) struct Type1 {
    version: Version,
    files: Arc<FileRegistry>,
    pub(super) mapper: LastMapper,
    quota: Arc<Quota>,
    pub(super) dirty: Dirty,
    inner: RwLock<Inner>,
    /// Counts unmaps that have ended after waiting, for those who met their areas.
    ended: Mutex<u64>,
    ending: Condvar,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) areas: IovaMap<Arc<Area>>,
    /// First addresses of mappings that have lost their address in the client.
    pub(super) invalid: BTreeSet<u64>,
    pub(super) groups: Vec<Member>,
    /// What may be mapped, in order and disjoint; `None` while there is no hardware.
    allowed: Option<Vec<Range>>,
    /// Open software devices: who is told of unmaps. Replaced as a whole, so that it can be walked
    /// with the lock released.
    pub(super) devices: Arc<Vec<(u64, WeakDevice)>>,
}

impl Inner {
    pub(super) fn has(&self, kind: GroupType) -> bool {
        self.groups.iter().any(|group| group.kind == kind)
    }

    /// `vfio_iommu_iova_dma_valid`.
    fn check_allowed(&self, range: Range) -> Result {
        match &self.allowed {
            Some(allowed) if !allowed.iter().any(|a| a.covers(range)) => Err(Errno::INVAL),
            _ => Ok(()),
        }
    }

    fn work_out_allowed(&mut self) {
        let hardware = self.has(GroupType::Physical);
        self.allowed = hardware.then(|| without(&[Range::ALL], reserved(&self.groups)));
    }
}

/// What the groups' devices cannot use (`vfio_iommu_resv_exclude`): all that is reserved but what
/// can be given up.
fn reserved(groups: &[Member]) -> Vec<Range> {
    groups
        .iter()
        .filter(|member| member.kind == GroupType::Physical)
        .flat_map(|member| member.group.reserved_regions())
        .filter(|region| region.kind != ReservedKind::DirectRelaxable)
        .filter_map(|region| Range::new(region.start, region.last).ok())
        .collect()
}

impl Type1 {
    pub(super) fn new(version: Version, entry_limit: u32) -> Type1 {
        Type1 {
            version,
            files: Arc::default(),
            mapper: LastMapper::default(),
            quota: Quota::new(usize::try_from(entry_limit).unwrap_or(usize::MAX)),
            dirty: Dirty::default(),
            inner: RwLock::new(Inner {
                areas: IovaMap::new(),
                invalid: BTreeSet::new(),
                groups: Vec::new(),
                allowed: None,
                devices: Arc::default(),
            }),
            ended: Mutex::new(0),
            ending: Condvar::new(),
        }
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn version(&self) -> Version {
        self.version
    }

    /// Mappings that there is still room for.
    pub(super) fn entries_left(&self) -> u32 {
        u32::try_from(self.quota.left()).unwrap_or(u32::MAX)
    }

    /// See [`page_sizes`].
    pub(super) fn page_sizes(&self) -> u64 {
        page_sizes(self.read().has(GroupType::Physical))
    }

    /// What may be mapped; `None` while there are only software devices, which can use anything.
    pub(super) fn ranges(&self) -> Option<Vec<IovaRange>> {
        let to_abi = |range: &Range| IovaRange {
            start: range.start(),
            end: range.last(),
        };
        let inner = self.read();
        let allowed = inner.allowed.as_ref()?;
        Some(allowed.iter().map(to_abi).collect())
    }

    pub(super) fn has_emulated(&self) -> bool {
        self.read().has(GroupType::Emulated)
    }

    /// A group joins: see [`super::Container::attach`] for the errnos.
    pub(super) fn attach(&self, member: &Member) -> Result {
        let mut inner = self.write();
        if !inner.invalid.is_empty() {
            return Err(Errno::BUSY);
        }
        if inner
            .groups
            .iter()
            .any(|other| Arc::ptr_eq(&other.group, &member.group))
        {
            return Err(Errno::INVAL);
        }
        let reserved = reserved(std::slice::from_ref(member));
        if reserved.iter().any(|range| inner.areas.overlaps(*range)) {
            return Err(Errno::INVAL);
        }
        inner.groups.push(member.clone());
        inner.work_out_allowed();
        Ok(())
    }

    pub(super) fn detach(&self, id: u64) {
        let mut inner = self.write();
        inner.groups.retain(|group| group.id != id);
        inner.work_out_allowed();
    }

    pub(super) fn add_device(&self, id: u64, device: WeakDevice) {
        let mut inner = self.write();
        let mut devices = Vec::clone(&inner.devices);
        devices.push((id, device));
        inner.devices = Arc::new(devices);
    }

    pub(super) fn remove_device(&self, id: u64) {
        let mut inner = self.write();
        let mut devices = Vec::clone(&inner.devices);
        devices.retain(|(of, _)| *of != id);
        inner.devices = Arc::new(devices);
    }

    /// Whether all that is mapped is there, for a first hardware group. `EFAULT` if not.
    pub(super) fn check_reach(&self) -> Result {
        let areas: Vec<_> = {
            let inner = self.read();
            let areas = inner.areas.iter();
            areas.map(|(r, area)| (*r, Arc::clone(area))).collect()
        };
        areas
            .iter()
            .try_for_each(|(range, area)| check_reach(area.source(), area.is_writable(), *range))
    }

    /// The container as a device sees it.
    pub(super) fn view(self: &Arc<Self>, emulated: bool) -> View {
        View {
            backend: Arc::clone(self),
            emulated,
        }
    }

    /// Maps memory of the client. In this order: `EEXIST` overlap, `ENOSPC` no entry left,
    /// `EINVAL` not inside one allowed range, and with hardware in the container `EFAULT` if the
    /// memory is not there; then nothing is mapped. An error instead of `memory` is told where the
    /// kernel would pin. `vfio_dma_do_map`.
    pub(super) fn map(
        &self,
        range: Range,
        vaddr: u64,
        prot: Prot,
        memory: Result<Arc<Memory>>,
    ) -> Result {
        let mut inner = self.write();
        if inner.areas.overlaps(range) {
            return Err(Errno::EXIST);
        }
        let ticket = Ticket::take(&self.quota).ok_or(Errno::NOSPC)?;
        inner.check_allowed(range)?;
        let source = self.source(memory?, vaddr);
        let area = Arc::new(Area::new(source, prot, prot.write, ticket));
        let check = inner.has(GroupType::Physical).then(|| Arc::clone(&area));
        inner.areas.insert(range, area)?;
        drop(inner);
        // Pinning, as far as it exists here: outside the lock, after the place is taken.
        if let Some(area) = check
            && let Err(errno) = check_reach(area.source(), prot.write, range)
        {
            self.take_back(range, &area);
            return Err(errno);
        }
        Ok(())
    }

    /// Gives a mapping that has lost its address a new one. `ENOENT` nothing mapped in the range,
    /// `EINVAL` it has not lost it, or is not exactly this range. Accesses that have begun end in
    /// the old memory. `vfio_dma_do_map` with `VFIO_DMA_MAP_FLAG_VADDR`.
    pub(super) fn map_vaddr(
        &self,
        range: Range,
        vaddr: u64,
        memory: Result<Arc<Memory>>,
    ) -> Result {
        let deadline = Instant::now() + ALL_PATIENCE;
        let (mut inner, old) = loop {
            let seen = self.unmaps_ended();
            let inner = self.write();
            let (found, old) = inner.areas.range(range).next().ok_or(Errno::NOENT)?;
            if *found != range || !inner.invalid.contains(&range.start()) {
                return Err(Errno::INVAL);
            }
            let old = Arc::clone(old);
            if !old.gate().is_closed() {
                break (inner, old);
            }
            // An unmap has begun with it: the kernel does one after the other.
            drop(inner);
            if !self.wait_for_unmap(seen, deadline) {
                return Err(Errno::BUSY);
            }
        };
        let new = old.moved(self.source(memory?, vaddr));
        inner.areas.remove(range.start());
        inner.areas.insert(range, Arc::new(new))?;
        inner.invalid.remove(&range.start());
        Ok(())
    }

    fn source(&self, memory: Arc<Memory>, vaddr: u64) -> Source {
        Source::Process(ProcessMemory::new(memory, vaddr, Arc::clone(&self.files)))
    }

    fn take_back(&self, range: Range, area: &Arc<Area>) {
        let mut inner = self.write();
        // Whoever closes the gate removes the area; an unmap may have been faster.
        if area.gate().close() {
            let gone = Self::forget(&mut inner, range);
            drop(inner);
            drop(gone);
        }
    }

    /// An unmap that had taken areas has ended, well or not.
    pub(super) fn unmap_ended(&self) {
        *self.ended() += 1;
        self.ending.notify_all();
    }

    /// How many have.
    pub(super) fn unmaps_ended(&self) -> u64 {
        *self.ended()
    }

    /// Waits until more unmaps have ended than `seen`; false if the deadline came first.
    pub(super) fn wait_for_unmap(&self, seen: u64, deadline: Instant) -> bool {
        let mut ended = self.ended();
        while *ended == seen {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            (ended, _) = self
                .ending
                .wait_timeout(ended, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
        true
    }

    fn ended(&self) -> MutexGuard<'_, u64> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bytes of a mapping, for a count of what is gone.
    pub(super) fn forget(inner: &mut Inner, range: Range) -> Option<(Range, Arc<Area>)> {
        inner.invalid.remove(&range.start());
        let gone = inner.areas.remove(range.start());
        debug_assert!(length(range) > 0);
        gone
    }
}

/// A container as one device sees it.
#[derive(Debug)]
pub(super) struct View {
    backend: Arc<Type1>,
    emulated: bool,
}

impl Space for View {
    /// A software device gets the errnos of `vfio_iommu_type1_dma_rw`: `EINVAL` for a hole, and
    /// `EPERM` for a mapping that it may not read even if it only writes. Hardware asks for what
    /// it does.
    fn hold(&self, iova: u64, len: u64, need: Prot) -> Result<Held> {
        let inner = self.backend.read();
        let need = match self.emulated {
            true if !inner.invalid.is_empty() => return Err(Errno::BUSY),
            true if need.write => Prot::BOTH,
            _ => need,
        };
        hold(&inner.areas, iova, len, need, Errno::INVAL)
    }

    fn written(&self, iova: u64, len: u64) {
        self.backend.dirty.mark(iova, len);
    }
}
