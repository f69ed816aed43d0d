//! A context's objects, and who uses what.

use super::ioas::Ioas;
use crate::device::WeakDevice;
use crate::dma::{Port, Route};
use crate::index::{Index, IndexPool};
use crate::model::DmaOwnership;
use crate::{Errno, Result};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// How many objects one context may have.
pub(super) const MAX_OBJECTS: usize = 1 << 16;

/// A page table. There is no hardware to fill it for: it stands for "this IOAS has one".
#[derive(Debug)]
pub(super) struct Hwpt {
    pub(super) ioas: Arc<Ioas>,
    /// Made by an attach, gone with the last detach.
    pub(super) auto: bool,
}

/// A bound device.
#[derive(Debug)]
pub(super) struct Bound {
    pub(super) device: WeakDevice,
    pub(super) port: Arc<Port>,
    pub(super) kind: Kind,
}

/// As what it is bound.
#[derive(Debug)]
pub(super) enum Kind {
    /// An *access* object, attached to an IOAS.
    Access { ioas: Option<u32> },
    /// A *device* object, attached to a page table.
    Device {
        hwpt: Option<u32>,
        group: DmaOwnership,
    },
}

#[derive(Debug)]
pub(super) enum Object {
    Ioas(Arc<Ioas>),
    Hwpt(Hwpt),
    Bound(Bound),
}

/// An object with its number and the count of those that use it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) object: Object,
    pub(super) users: u32,
    _index: Index,
}

/// What was taken out of the table: dropped with no lock held, after the routes are drained.
#[derive(Debug, Default)]
#[must_use]
pub(super) struct Leftovers {
    pub(super) entries: Vec<Entry>,
    pub(super) routes: Vec<Arc<Route>>,
}

impl Leftovers {
    /// Waits until no access uses what was detached, within bounds, and frees.
    pub(super) fn settle(self) {
        for route in &self.routes {
            route.drain();
        }
    }
}

/// The objects of a context.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) ids: IndexPool,
    pub(super) entries: BTreeMap<u32, Entry>,
    /// The page table that the members of an IOMMU group are attached to, and how many are.
    pub(super) groups: HashMap<u32, (u32, u32)>,
    /// The IOAS that the container emulation uses.
    pub(super) compat: Option<u32>,
    /// `IOMMU_OPTION_RLIMIT_MODE`. Nothing is accounted, so it is only remembered.
    pub(super) account_process: bool,
    pub(super) file_open: bool,
    /// Bound devices, and groups that have the context for their container: each holds the file.
    pub(super) holders: usize,
}

impl Table {
    pub(super) fn new() -> Table {
        Table {
            // Ids have 31 bits; the number of objects is limited before they run out.
            ids: IndexPool::new(1, i32::MAX as u32),
            entries: BTreeMap::new(),
            groups: HashMap::new(),
            compat: None,
            account_process: false,
            file_open: true,
            holders: 0,
        }
    }

    /// The lowest free number. `ENOMEM` when there are too many objects.
    pub(super) fn take_id(&self) -> Result<Index> {
        if self.entries.len() >= MAX_OBJECTS {
            return Err(Errno::NOMEM);
        }
        self.ids.take().map_err(|_| Errno::NOMEM)
    }

    pub(super) fn add(&mut self, index: Index, object: Object) -> u32 {
        let id = index.get();
        let entry = Entry {
            object,
            users: 0,
            _index: index,
        };
        self.entries.insert(id, entry);
        id
    }

    pub(super) fn object(&self, id: u32) -> Result<&Object> {
        Ok(&self.entries.get(&id).ok_or(Errno::NOENT)?.object)
    }

    pub(super) fn ioas(&self, id: u32) -> Result<&Arc<Ioas>> {
        match self.object(id)? {
            Object::Ioas(ioas) => Ok(ioas),
            _ => Err(Errno::NOENT),
        }
    }

    pub(super) fn hwpt(&self, id: u32) -> Result<&Hwpt> {
        match self.object(id)? {
            Object::Hwpt(hwpt) => Ok(hwpt),
            _ => Err(Errno::NOENT),
        }
    }

    /// A *device* object.
    pub(super) fn device(&self, id: u32) -> Result<&Bound> {
        match self.object(id)? {
            Object::Bound(
                bound @ Bound {
                    kind: Kind::Device { .. },
                    ..
                },
            ) => Ok(bound),
            _ => Err(Errno::NOENT),
        }
    }

    pub(super) fn bound(&mut self, id: u32) -> Result<&mut Bound> {
        match self.entries.get_mut(&id).map(|entry| &mut entry.object) {
            Some(Object::Bound(bound)) => Ok(bound),
            _ => Err(Errno::NOENT),
        }
    }

    pub(super) fn use_object(&mut self, id: u32, by: u32) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.users = entry.users.saturating_add(by);
        }
    }

    /// `by` users less. An automatic page table goes with its last.
    pub(super) fn release(&mut self, id: u32, by: u32, left: &mut Leftovers) {
        let Some(entry) = self.entries.get_mut(&id) else {
            return;
        };
        entry.users = entry.users.saturating_sub(by);
        let idle = entry.users == 0;
        if idle && matches!(&entry.object, Object::Hwpt(Hwpt { auto: true, .. })) {
            self.remove(id, left);
        }
    }

    /// Takes out an object that nobody uses, and with it its use of others.
    pub(super) fn remove(&mut self, id: u32, left: &mut Leftovers) {
        let Some(entry) = self.entries.remove(&id) else {
            return;
        };
        match &entry.object {
            Object::Ioas(_) if self.compat == Some(id) => self.compat = None,
            Object::Hwpt(hwpt) => {
                hwpt.ioas.remove_domain();
                let ioas = hwpt.ioas.id();
                self.release(ioas, 1, left);
            }
            _ => {}
        }
        left.entries.push(entry);
    }

    /// `IOMMU_DESTROY`. `ENOENT` unknown, `EBUSY` in use; what is bound is always in use.
    pub(super) fn destroy(&mut self, id: u32, left: &mut Leftovers) -> Result {
        let entry = self.entries.get(&id).ok_or(Errno::NOENT)?;
        if entry.users > 0 || matches!(entry.object, Object::Bound(_)) {
            return Err(Errno::BUSY);
        }
        self.remove(id, left);
        Ok(())
    }

    /// Once nobody has the file and nothing holds it: page tables, then address spaces.
    pub(super) fn clear_if_done(&mut self, left: &mut Leftovers) {
        if self.file_open || self.holders > 0 {
            return;
        }
        let ids: Vec<u32> = self.entries.keys().copied().collect();
        for hwpts in [true, false] {
            for &id in &ids {
                let is_hwpt = matches!(self.object(id), Ok(Object::Hwpt(_)));
                if is_hwpt == hwpts {
                    self.remove(id, left);
                }
            }
        }
    }
}
