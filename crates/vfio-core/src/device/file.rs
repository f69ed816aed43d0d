//! An open device file (`struct vfio_device_file`): first it only counts, after BIND it is the
//! device.

use super::handle::{Device, User, WeakDevice};
use super::migration::DataFile;
use super::ops::RegionPos;
use super::shared::{Leased, Life, Session};
use crate::event::What;
use crate::group::GroupFile;
use crate::{Errno, Result};
use client_process::{FileId, holders};
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::SystemTime;

/// Who opened a file, as it was at that moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opener {
    /// Thread group id; 0 when it cannot be told.
    pub pid: u32,
    /// Command name.
    pub comm: String,
    /// When.
    pub since: SystemTime,
    /// The node it was opened at, where that is a file: `/proc/PID/maps` shows a mapping of the
    /// device under it, or under the file of the device's memory, depending on the kernel.
    pub node: Option<FileId>,
}

/// `qemu-system-x86 (pid 812)`.
impl fmt::Display for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            0 => f.write_str(&self.comm),
            pid => write!(f, "{} (pid {pid})", self.comm),
        }
    }
}

/// An open file of a device, whatever it came through. A transport makes one per open and calls
/// [`release`](DeviceFile::release) when the last descriptor of it is gone.
pub struct DeviceFile {
    device: WeakDevice,
    opener: Opener,
    /// Who it was opened for, if a supervisor opened it.
    user: OnceLock<Opener>,
    state: RwLock<State>,
    /// What to run when it is cut off; `None` once it has been.
    cut_off: Mutex<Option<Vec<CutOff>>>,
}

pub(super) type CutOff = Box<dyn FnOnce() + Send>;

/// `access_granted` as a type: operations exist only on a [`Grant`].
enum State {
    /// Open, blocked: everything but BIND is `EINVAL`.
    Opened(User),
    /// Bound.
    Granted(Arc<Grant>),
    /// Not the device any more, but the data of its migration.
    Data(DataFile),
    /// Cut off: everything is `ENODEV`.
    Dead,
    /// Closed. A request that comes later is the transport's mistake; it gets `ENODEV` too.
    Released,
}

/// What a bound file holds. A call in progress holds a clone, so the driver's `close` comes after
/// it. The session is declared first: close, reference, count.
pub(super) struct Grant {
    pub(super) session: Arc<dyn Session>,
    pub(super) user: User,
    /// It belongs to a group: BIND, ATTACH and DETACH are not for it.
    pub(super) by_group: bool,
}

impl fmt::Debug for DeviceFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &*self.state.read().unwrap_or_else(PoisonError::into_inner) {
            State::Opened(_) => "opened",
            State::Granted(_) => "bound",
            State::Data(_) => "data",
            State::Dead => "dead",
            State::Released => "released",
        };
        f.debug_struct("DeviceFile")
            .field("opener", self.opener())
            .field("state", &state)
            .finish()
    }
}

impl Device {
    /// Opens the char device: a file that counts as a user and may only BIND. `ENODEV` when the
    /// device is not registered (any more). No callback has run when it returns.
    /// `vfio_device_fops_cdev_open`.
    pub fn open_cdev(&self, opener: Opener) -> Result<Arc<DeviceFile>> {
        let user = self.try_user()?;
        let file = Arc::new(DeviceFile {
            device: self.downgrade(),
            opener,
            user: OnceLock::new(),
            state: RwLock::new(State::Opened(user)),
            cut_off: Mutex::new(Some(Vec::new())),
        });
        let mut files = self
            .head()
            .files
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        files.retain(|file| file.strong_count() > 0);
        files.push(Arc::downgrade(&file));
        drop(files);
        if self.life() == Life::Dead {
            // It died between the two; its disassociation may have missed the new file.
            file.disassociate();
            return Err(Errno::NODEV);
        }
        self.head().core.event(self.head(), What::Opened);
        Ok(file)
    }
}

impl DeviceFile {
    /// Who opened it; for a file of a group, who it was opened for.
    pub fn opener(&self) -> &Opener {
        self.user.get().unwrap_or(&self.opener)
    }

    /// True if it belongs to a group, by [`open_by_group`](DeviceFile::open_by_group).
    pub fn is_by_group(&self) -> bool {
        matches!(&*self.state(), State::Granted(grant) if grant.by_group)
    }

    /// The device, while it is not released.
    pub fn device(&self) -> Option<Device> {
        self.device.upgrade()
    }

    /// True once BIND or an open by the group has succeeded, until the file is closed or cut off.
    pub fn is_bound(&self) -> bool {
        matches!(&*self.state(), State::Granted(_))
    }

    /// Reads at a file offset. `EINVAL` before BIND and past the last region, `ENODEV` when the
    /// device is gone, else the driver's answer. 0 bytes succeed without asking it.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        if let Some(data) = self.data() {
            return data.read(buf);
        }
        let (grant, at) = self.locate(offset)?;
        if buf.is_empty() {
            return Ok(0);
        }
        grant.session.read(at, buf)
    }

    /// Writes at a file offset; as [`read`](DeviceFile::read).
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<usize> {
        if let Some(file) = self.data() {
            return file.write(data);
        }
        let (grant, at) = self.locate(offset)?;
        if data.is_empty() {
            return Ok(0);
        }
        grant.session.write(at, data)
    }

    /// Makes a file that was opened at the char device, and may do nothing yet, a file of the group:
    /// what `VFIO_GROUP_GET_DEVICE_FD` does after it has looked the name up
    /// (`drivers/vfio/group.c`, `vfio_device_open_file`). From here on it is as one that the group
    /// returned: bound, with the session that all files of the device share. `user` is who it is
    /// for.
    ///
    /// `EINVAL` for a file that is bound, and for a group without a container, or with one that has
    /// no IOMMU set; `ENODEV` when the name means no device of the group, or the device was cut off;
    /// `ESTALE` when it means another device than this file's; `EBADF` when the group file has been
    /// closed; else what binding and the driver's `open` say. On error the file is as before.
    pub fn open_by_group(&self, group: &GroupFile, name: &[u8], user: Opener) -> Result {
        let device = self.unbound()?;
        if group.find_device(name)?.serial() != device.serial() {
            return Err(Errno::STALE);
        }
        let (way, lease) = group.way()?;
        // Given back, if somebody has the device open already, with no lock held.
        let mut lease = Some(lease);
        let session = Arc::clone(&device.0).open(true, &mut || {
            let binding = way.open(&device)?;
            let lease = lease.take().ok_or(Errno::BUSY)?;
            Ok(Some(Leased::boxed(binding, lease)))
        })?;
        let _ = self.user.set(Opener {
            node: self.opener.node,
            ..user
        });
        self.give_as(session, true)
    }

    /// The last descriptor is gone. On return the driver's `close` has run and the file counts
    /// no more, unless a call is still in progress or the client still maps the device: then
    /// both happen when those end, as in the kernel, where a mapping keeps the file.
    pub fn release(&self) {
        let state = self.replace(State::Released);
        let Some(device) = self.device.upgrade() else {
            return;
        };
        let core = device.head().core.clone();
        let closed = core.prepare(device.head(), What::Closed);
        match (state, device.memory_if_made()) {
            (State::Granted(grant), Some(memory)) if memory.has_other_openers() => {
                outlived(&device, grant, memory);
            }
            (state, _) => {
                // No reference of ours when the count goes: whoever waits for it expects to be
                // the last.
                drop(device);
                drop(state);
            }
        }
        core.send(closed);
    }

    /// Cuts this file off.
    pub(crate) fn disassociate(&self) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if matches!(&*state, State::Opened(_) | State::Granted(_)) {
            let before = std::mem::replace(&mut *state, State::Dead);
            drop(state);
            drop(before);
            let told = self
                .cut_off
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            for f in told.into_iter().flatten() {
                f();
            }
        }
    }

    /// See [`on_cut_off`](DeviceFile::on_cut_off).
    pub(super) fn when_cut_off(&self, f: CutOff) {
        let mut told = self.cut_off.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *told {
            Some(list) => list.push(f),
            None => {
                drop(told);
                f();
            }
        }
    }

    /// What operations need. `EINVAL` before BIND, `ENODEV` when cut off.
    pub(super) fn grant(&self) -> Result<Arc<Grant>> {
        match &*self.state() {
            State::Granted(grant) => Ok(Arc::clone(grant)),
            State::Opened(_) => Err(Errno::INVAL),
            State::Data(_) => Err(Errno::NOTTY),
            State::Dead | State::Released => Err(Errno::NODEV),
        }
    }

    /// The data it is, if it is no device.
    pub(super) fn data(&self) -> Option<DataFile> {
        match &*self.state() {
            State::Data(data) => Some(data.clone()),
            _ => None,
        }
    }

    /// Makes it the data of a migration, for somebody.
    pub(super) fn give_data(&self, data: DataFile, user: Opener) -> Result {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if !matches!(&*state, State::Opened(_)) {
            return Err(Errno::INVAL);
        }
        let before = std::mem::replace(&mut *state, State::Data(data));
        drop(state);
        let _ = self.user.set(Opener {
            node: self.opener.node,
            ..user
        });
        // It counts no more, and whoever waits for that may go on.
        drop(before);
        Ok(())
    }

    /// The device of a file that may still BIND. `EINVAL` when it is bound, `ENODEV` when cut off.
    pub(super) fn unbound(&self) -> Result<Device> {
        match &*self.state() {
            State::Opened(user) => Ok(user.device().clone()),
            State::Granted(_) | State::Data(_) => Err(Errno::INVAL),
            State::Dead | State::Released => Err(Errno::NODEV),
        }
    }

    /// The end of BIND. `ENODEV` when the file was cut off meanwhile; the session is closed then.
    pub(super) fn give(&self, session: Arc<dyn Session>) -> Result {
        self.give_as(session, false)
    }

    fn give_as(&self, session: Arc<dyn Session>, by_group: bool) -> Result {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *state, State::Dead) {
            State::Opened(user) => {
                *state = State::Granted(Arc::new(Grant {
                    session,
                    user,
                    by_group,
                }));
                Ok(())
            }
            other => {
                *state = other;
                drop(state);
                drop(session);
                Err(Errno::NODEV)
            }
        }
    }

    fn locate(&self, offset: u64) -> Result<(Arc<Grant>, RegionPos)> {
        let grant = self.grant()?;
        let at = grant
            .user
            .device()
            .0
            .layout()?
            .find(offset)
            .ok_or(Errno::INVAL)?;
        Ok((grant, at))
    }

    fn state(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn replace(&self, state: State) -> State {
        std::mem::replace(
            &mut *self.state.write().unwrap_or_else(PoisonError::into_inner),
            state,
        )
    }
}

impl Drop for DeviceFile {
    fn drop(&mut self) {
        if !matches!(&*self.state(), State::Released) {
            self.release();
        }
    }
}

/// A FUSE server hears of the close, not of the munmap. What the file held is kept until nobody
/// has the backing file open or mapped (or the device is cut off, which revokes the mapping).
fn outlived(device: &Device, grant: Arc<Grant>, memory: Arc<dma_memory::DeviceMemory>) {
    tracing::debug!("{}: still mapped after close", device.name());
    let weak = device.downgrade();
    let nodes: Vec<FileId> = device
        .files()
        .iter()
        .filter_map(|file| file.opener.node)
        .collect();
    let house = Arc::clone(device.head().core.house());
    house.linger(Box::new(move || {
        let _held = &grant;
        let Some(device) = weak.upgrade() else {
            return false;
        };
        if device.life() == Life::Dead || !memory.has_other_openers() {
            return false;
        }
        // Other open files of the device hold the backing file open too; then only the mappings
        // themselves tell.
        let others = device.files().iter().any(|file| !file.is_released());
        !others || is_mapped(&memory, &nodes) || is_kept(&memory)
    }));
}

/// True when another process has a descriptor of the memory itself, as a vfio-user client gets one: it
/// can map it at any time. A client of a node has only the node's.
fn is_kept(memory: &dma_memory::DeviceMemory) -> bool {
    let id: Vec<FileId> = FileId::of(memory.backing_fd()).into_iter().collect();
    holders(&id, &[rustix::process::getpid()])
        .iter()
        .any(|holder| !holder.fds.is_empty())
}

fn is_mapped(memory: &dma_memory::DeviceMemory, nodes: &[FileId]) -> bool {
    let mut ids = nodes.to_vec();
    ids.extend(FileId::of(memory.backing_fd()));
    // Not ourselves: the device's own view of its memory is a mapping too.
    holders(&ids, &[rustix::process::getpid()])
        .iter()
        .any(|holder| holder.mapped_bytes > 0)
}

impl DeviceFile {
    fn is_released(&self) -> bool {
        matches!(&*self.state(), State::Released)
    }
}
