//! An open group file: its ioctls, and the devices it leads to.

use super::{Backend, Group, Lease, State};
use crate::caller::{Caller, FileObject};
use crate::device::{Binding, Device, GroupType};
use crate::{Errno, Result};
use std::fmt;
use std::sync::{Arc, MutexGuard};
use vfio_uapi::dialect::vfio;
use vfio_uapi::group::{Status, StatusFlags};
use vfio_uapi::ioctl::GroupIoctl;

/// The one open file of a group, whatever it came through. A transport makes one per open and calls
/// [`release`](GroupFile::release) when the last descriptor of it is gone; dup, fork and SCM_RIGHTS
/// share it.
pub struct GroupFile {
    group: Arc<Group>,
    id: u64,
}

impl fmt::Debug for GroupFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GroupFile")
            .field("group", &self.group.id())
            .finish_non_exhaustive()
    }
}

impl Drop for GroupFile {
    fn drop(&mut self) {
        self.release();
    }
}

/// How a device of the group is opened.
pub(crate) enum Way {
    Container(Arc<crate::container::Attached>),
    Iommufd(Arc<crate::iommufd::Joined>),
}

impl Way {
    /// First open: what the container or the context says (4.2 and SET_IOMMU rules are theirs).
    pub(crate) fn open(&self, device: &Device) -> Result<Box<dyn Binding>> {
        match self {
            Way::Container(attached) => attached.open(device),
            Way::Iommufd(joined) => joined.open(device),
        }
    }
}

impl GroupFile {
    pub(super) fn new(group: &Arc<Group>, id: u64) -> GroupFile {
        GroupFile {
            group: Arc::clone(group),
            id,
        }
    }

    /// The group.
    pub fn group(&self) -> &Arc<Group> {
        &self.group
    }

    /// An ioctl. Returns what the client's `ioctl()` returns. `ENOTTY` for a number that groups do
    /// not know. `VFIO_GROUP_GET_DEVICE_FD` is `EOPNOTSUPP`: nobody here can give the caller a
    /// descriptor; a supervisor uses [`find_device`](GroupFile::find_device) and
    /// [`DeviceFile::open_by_group`](crate::device::DeviceFile::open_by_group) instead.
    ///
    /// After the group has died (its last device was unregistered) `VFIO_GROUP_GET_STATUS` and
    /// `VFIO_GROUP_SET_CONTAINER` are `ENODEV`.
    pub fn ioctl(&self, cmd: u32, arg: u64, caller: &dyn Caller) -> Result<u32> {
        match GroupIoctl::try_from(cmd)? {
            GroupIoctl::GetStatus => self.status(arg, caller),
            GroupIoctl::SetContainer => self.set_container(arg, caller),
            GroupIoctl::UnsetContainer => self.unset_container(),
            GroupIoctl::GetDeviceFd => Err(Errno::OPNOTSUPP),
        }
        .map(|()| 0)
    }

    /// The device of the group that a name means: by the driver's
    /// [`matches`](crate::device::DeviceOps::matches), newest device first. `ENODEV` when none does, or
    /// when the group has died; what a driver says of a malformed name ends the search.
    pub fn find_device(&self, name: &[u8]) -> Result<Device> {
        for device in self.group.devices() {
            if device.matches(name)? && device.try_user().is_ok() {
                return Ok(device);
            }
        }
        Err(Errno::NODEV)
    }

    /// The last descriptor is gone. On return the container is left and the group can be opened
    /// again, unless a device is open through the container: then both happen when the last one is
    /// closed (`vfio_group_fops_release`).
    pub fn release(&self) {
        let mut state = self.group.state();
        if let Some(open) = state.open.as_mut().filter(|open| open.id == self.id) {
            open.fds = false;
        }
        drop(state);
        self.group.finish_close();
    }

    /// The books, as long as this file is open. `EBADF` when it has been closed meanwhile.
    fn state(&self) -> Result<MutexGuard<'_, State>> {
        let state = self.group.state();
        if state.open.as_ref().is_some_and(|open| open.id == self.id) {
            Ok(state)
        } else {
            Err(Errno::BADF)
        }
    }

    /// What a device of the group is opened with, and what its session holds. `EINVAL` without a
    /// container.
    pub(crate) fn way(&self) -> Result<(Way, Lease)> {
        let mut guard = self.state()?;
        let state = &mut *guard;
        match &state.backend {
            Backend::None | Backend::Joining => Err(Errno::INVAL),
            Backend::Container(attached) => {
                let way = Way::Container(Arc::clone(attached));
                if let Some(open) = &mut state.open {
                    open.kept += 1;
                }
                Ok((way, Lease::container(&self.group)))
            }
            Backend::Iommufd(joined) => {
                let way = Way::Iommufd(Arc::clone(joined));
                state.iommufd += 1;
                Ok((way, Lease::iommufd(&self.group)))
            }
        }
    }

    /// `VFIO_GROUP_GET_STATUS`.
    fn status(&self, arg: u64, caller: &dyn Caller) -> Result {
        let (mut status, argsz) = vfio::read::<Status, _>(caller, arg, size_of::<Status>())?;
        let state = self.state()?;
        let iommu = state.iommu.as_ref().ok_or(Errno::NODEV)?;
        status.flags = match state.backend {
            Backend::Container(_) | Backend::Iommufd(_) => {
                StatusFlags::CONTAINER_SET | StatusFlags::VIABLE
            }
            // Software devices have no DMA that anybody could own.
            _ if self.group.kind == GroupType::Emulated || !iommu.is_dma_owned() => {
                StatusFlags::VIABLE
            }
            _ => StatusFlags::empty(),
        };
        drop(state);
        vfio::write_back(caller, arg, &status, argsz)
    }

    /// `VFIO_GROUP_SET_CONTAINER`, checks in the order of `vfio_group_ioctl_set_container`.
    fn set_container(&self, arg: u64, caller: &dyn Caller) -> Result {
        let mut fd = [0; 4];
        caller.copy_in(arg, &mut fd)?;
        let file = caller.file(i32::from_ne_bytes(fd))?;
        let native = matches!(file, FileObject::Container(_));
        let in_use =
            |state: &State| native && state.iommufd > 0 && matches!(state.backend, Backend::None);
        drop(self.group.settled(|state| !in_use(state)));
        let mut state = self.state()?;
        if !matches!(state.backend, Backend::None) {
            return Err(Errno::INVAL);
        }
        let iommu = state.iommu.clone().ok_or(Errno::NODEV)?;
        match file {
            // A member that somebody left open through an iommufd would be joined without the
            // container knowing. The kernel lets it, and its books are wrong from there on.
            FileObject::Container(_) if in_use(&state) => return Err(Errno::BUSY),
            FileObject::Container(_) | FileObject::Iommufd(_) => {}
            _ => return Err(Errno::BADFD),
        }
        state.backend = Backend::Joining;
        drop(state);
        let joined = match file {
            FileObject::Container(container) => container
                .attach(&iommu, self.group.kind)
                .map(|attached| Backend::Container(Arc::new(attached))),
            FileObject::Iommufd(context) => context
                .compat_join()
                .map(|joined| Backend::Iommufd(Arc::new(joined))),
            _ => Err(Errno::BADFD),
        };
        let mut state = self.group.state();
        let still_open = state.open.as_ref().is_some_and(|open| open.id == self.id);
        if still_open {
            state.backend = Backend::None;
        }
        // Otherwise the close has taken the mark away, and what is set now is another file's.
        let alive = state.iommu.is_some();
        let result = match joined {
            Ok(_) if !still_open => Err(Errno::BADF),
            Ok(_) if !alive => Err(Errno::NODEV),
            Ok(backend) => {
                state.backend = backend;
                Ok(())
            }
            Err(errno) => Err(errno),
        };
        drop(state);
        self.group.changed.notify_all();
        result
    }

    /// `VFIO_GROUP_UNSET_CONTAINER`: `EINVAL` when none is set, `EBUSY` while a device is open
    /// through it. An iommufd is forgotten whether or not one is.
    fn unset_container(&self) -> Result {
        let kept = |state: &State| state.open.as_ref().map_or(0, |open| open.kept);
        drop(self.state()?);
        let in_use =
            |state: &State| matches!(state.backend, Backend::Container(_)) && kept(state) > 0;
        let mut state = self.group.settled(|state| !in_use(state));
        if state.open.as_ref().is_none_or(|open| open.id != self.id) {
            return Err(Errno::BADF);
        }
        if in_use(&state) {
            return Err(Errno::BUSY);
        }
        if matches!(state.backend, Backend::None | Backend::Joining) {
            return Err(Errno::INVAL);
        }
        let left = std::mem::replace(&mut state.backend, Backend::None);
        drop(state);
        drop(left);
        Ok(())
    }
}
