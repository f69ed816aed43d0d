//! VFIO groups: `/dev/vfio/N` (`drivers/vfio/group.c`).
//!
//! One per IOMMU group that has a registered VFIO device. It comes with the first one and dies with
//! the last, which an open file of it survives:
//!
//! ```text
//!   open ─► GroupFile ─ SET_CONTAINER ─► Container or Iommufd
//!              │                              ▲
//!              └─ find_device, open_by_group ─┴─► DeviceFile ── session ── Lease
//! ```
//!
//! What excludes what is a count with a guard: a lease is held by each session of a device of
//! the group and given back after the last close. A device that is open through a container keeps
//! the group *file*, as in the kernel: closing its descriptor leaves the group busy. One that is
//! open through an iommufd does not. One that is bound through its own node keeps the group from
//! being opened.
//!
//! The group's lock is held for looks and changes of its own books only: neither client memory nor
//! a container, a device set or a driver is touched under it. (The kernel holds `group_lock` around
//! all of that; here a reservation is made under the lock, and the work done after it.)
//!
//! The no-IOMMU mode is not offered: there is no parameter that turns it on, and no group of that
//! kind.

mod file;
mod lease;
mod table;
#[cfg(all(test, not(feature = "shuttle")))]
mod tests;

pub use file::GroupFile;
pub(crate) use lease::Lease;
pub(crate) use table::Groups;

use crate::container::Attached;
use crate::device::{Device, GroupType, Housekeeper, LOOK, Opener};
use crate::few::Few;
use crate::index::Index;
use crate::iommufd::Joined;
use crate::model::IommuGroup;
use crate::{Errno, Result};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// So many may wait for the end of a close that may have begun (`Config::close_grace`). The others get `EBUSY` at once.
const WAITERS: u32 = 4;

static NEXT: AtomicU64 = AtomicU64::new(1);

/// A number that no group and no open file of one had before.
fn next() -> u64 {
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A VFIO group: an IOMMU group with at least one registered VFIO device (`struct vfio_group`).
pub struct Group {
    serial: u64,
    kind: GroupType,
    id: u32,
    minor: Index,
    /// [`Config::close_grace`](crate::Config::close_grace), in milliseconds.
    close_grace: u32,
    house: Arc<Housekeeper>,
    state: Mutex<State>,
    /// Something was given back.
    changed: Condvar,
}

/// The books of a group (`group_lock`).
struct State {
    /// `None` once the group has died.
    iommu: Option<Arc<IommuGroup>>,
    /// Registered devices in it, up to the end of their unregister.
    drivers: u32,
    /// The one open file; boxed, since most groups have none.
    open: Option<Box<Open>>,
    backend: Backend,
    /// Registered devices whose unregister has not begun, in the order of their register.
    devices: Few<Device>,
    /// Binds of members through their own nodes, in progress or done.
    cdev: u32,
    /// Members that are open through an iommufd.
    iommufd: u32,
    waiters: u32,
}

/// An open file of the group.
struct Open {
    id: u64,
    opener: Opener,
    /// A descriptor of it exists.
    fds: bool,
    /// Members that are open through the container: each keeps the file.
    kept: u32,
    /// Somebody is about to end it: it is open until that is done.
    closing: bool,
}

/// What SET_CONTAINER has set.
enum Backend {
    None,
    /// A SET_CONTAINER is under way.
    Joining,
    Container(Arc<Attached>),
    Iommufd(Arc<Joined>),
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        f.debug_struct("Group")
            .field("id", &self.id)
            .field("minor", &self.minor.get())
            .field("drivers", &state.drivers)
            .field("open", &state.open.is_some())
            .finish_non_exhaustive()
    }
}

impl Group {
    fn new(iommu: &Arc<IommuGroup>, kind: GroupType, minor: Index, all: &Groups) -> Group {
        Group {
            serial: next(),
            kind,
            id: iommu.id(),
            minor,
            close_grace: u32::try_from(all.close_grace.as_millis()).unwrap_or(u32::MAX),
            house: Arc::clone(&all.house),
            state: Mutex::new(State {
                iommu: Some(Arc::clone(iommu)),
                drivers: 1,
                open: None,
                backend: Backend::None,
                devices: Few::default(),
                cdev: 0,
                iommufd: 0,
                waiters: 0,
            }),
            changed: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of its IOMMU group.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The name of its node: the number of its IOMMU group, in decimal.
    pub fn name(&self) -> String {
        self.id.to_string()
    }

    /// Minor number of its char device: the lowest free one, whatever the group's number. It is
    /// free again when the last reference to the group is gone.
    pub fn minor(&self) -> u32 {
        self.minor.get()
    }

    /// Unlike any other group's of this process, for ever.
    pub fn serial(&self) -> u64 {
        self.serial
    }

    /// Real or made for a software device.
    pub fn kind(&self) -> GroupType {
        self.kind
    }

    /// The registered devices in it, newest first, as a lookup by name visits them. One whose
    /// unregister has begun is not among them.
    pub fn devices(&self) -> Vec<Device> {
        let state = self.state();
        state.devices.iter().rev().cloned().collect()
    }

    /// True until the last device's unregister has ended.
    pub fn is_alive(&self) -> bool {
        self.state().iommu.is_some()
    }

    /// Who opened the file of it that is open, or that is kept open by devices.
    pub fn opener(&self) -> Option<Opener> {
        self.state().open.as_ref().map(|open| open.opener.clone())
    }

    /// How many of its devices are open through its file: by a container, by an iommufd.
    pub fn opened_devices(&self) -> (u32, u32) {
        let state = self.state();
        (
            state.open.as_ref().map_or(0, |open| open.kept),
            state.iommufd,
        )
    }

    /// Opens the node, which one file at a time can have, whatever its access mode. `ENODEV` when
    /// the group has died, `EBUSY` while a member is bound through its own node, `EBUSY` while the
    /// group is open or a device keeps its file (`vfio_group_fops_open`).
    pub fn open(self: &Arc<Self>, opener: Opener) -> Result<Arc<GroupFile>> {
        let state = self.settled(|state| state.iommu.is_none() || !state.is_taken());
        let mut state = state;
        if state.drivers == 0 {
            return Err(Errno::NODEV);
        }
        if state.is_taken() {
            return Err(Errno::BUSY);
        }
        let id = next();
        state.open = Some(Box::new(Open {
            id,
            opener,
            fds: true,
            kept: 0,
            closing: false,
        }));
        Ok(Arc::new(GroupFile::new(self, id)))
    }

    /// A device is about to be bound through its own node: the group cannot be opened until the
    /// lease is dropped. `EBUSY` while it is open (`vfio_device_block_group`).
    pub(crate) fn block(self: &Arc<Self>) -> Result<Lease> {
        let mut state = self.settled(|state| state.open.is_none());
        if state.open.is_some() {
            return Err(Errno::BUSY);
        }
        state.cdev += 1;
        drop(state);
        Ok(Lease::cdev(self))
    }

    /// The books once `free` is true of them, or after a while in which it was not.
    fn settled(&self, free: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let mut state = self.state();
        if free(&state) || state.waiters >= WAITERS {
            return state;
        }
        state.waiters += 1;
        drop(state);
        // A device that nobody has open may be held by a mapping only, or not any more.
        self.house.look(LOOK);
        state = self.state();
        let end = Instant::now() + Duration::from_millis(self.close_grace.into());
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || free(&state) {
                state.waiters -= 1;
                return state;
            }
            (state, _) = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The end of its open file, if nothing keeps that any more: the container is left, the group
    /// can be opened again. To be called with the books unlocked.
    fn finish_close(&self) {
        let mut state = self.state();
        // Who takes the container out of the books is who makes the group free, when it is left:
        // another thread that comes meanwhile finds nothing to take and must not.
        let id = match &mut state.open {
            Some(open) if !open.fds && open.kept == 0 && !open.closing => {
                open.closing = true;
                open.id
            }
            _ => return,
        };
        // Of a SET_CONTAINER under way this takes the mark: it finds the file closed, and takes back what
        // it has joined.
        let left = std::mem::replace(&mut state.backend, Backend::None);
        drop(state);
        // The last group of a container takes its mappings along.
        drop(left);
        let mut state = self.state();
        if state.open.as_ref().is_some_and(|open| open.id == id) {
            state.open = None;
        }
        drop(state);
        self.changed.notify_all();
    }

    /// A device is registered: names lead to it from now on.
    pub(crate) fn add(&self, device: &Device) {
        self.state().devices.push(device.clone());
    }

    /// Its unregister begins.
    pub(crate) fn remove(&self, device: &Device) {
        let is_it = |there: &Device| there.serial() == device.serial();
        let gone = self.state().devices.take_first(is_it);
        drop(gone);
    }
}

impl State {
    /// True when it cannot be opened.
    fn is_taken(&self) -> bool {
        self.cdev > 0 || self.open.is_some()
    }
}
