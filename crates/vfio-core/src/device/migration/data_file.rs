//! The data of a session as a file of its own, as the kernel's `migration_set_state` returns one.
//!
//! An ioctl of ours cannot return a descriptor. So whoever stands between a client and its system
//! calls opens the device's node, makes that file the data's, and gives it to the client.

use crate::caller::Caller;
use crate::device::DeviceFile;
use crate::device::shared::Session;
use crate::{Errno, Result};
use std::sync::{Arc, Weak};
use vfio_uapi::device::migration::{PrecopyFlags, PrecopyInfo};
use vfio_uapi::dialect::vfio;
use vfio_uapi::ioctl::VFIO_MIG_GET_PRECOPY_INFO;

/// The data of one session. It keeps nothing alive: with the device's last close it is dead.
#[derive(Clone)]
pub(crate) struct DataFile {
    of: Weak<dyn Session>,
    session: u32,
}

impl DeviceFile {
    /// Makes a file that was opened at the char device, and may do nothing yet, the data file of a
    /// session of `device`: a stream that is read while the device saves, and written while it
    /// resumes. It counts as a user no more, and may outlive the device.
    ///
    /// `EINVAL` for a file that is bound, `ESTALE` when it is a file of another device, `ENODEV` when
    /// the session has ended.
    pub fn open_migration_data(&self, device: &DeviceFile, session: u32) -> Result {
        let grant = device.grant()?;
        if self.unbound()?.serial() != grant.user.device().serial() {
            return Err(Errno::STALE);
        }
        grant.session.machine().check(session)?;
        let data = DataFile {
            of: Arc::downgrade(&grant.session),
            session,
        };
        self.give_data(data, device.opener().clone())
    }
}

impl DataFile {
    fn session(&self) -> Result<Arc<dyn Session>> {
        self.of.upgrade().ok_or(Errno::NODEV)
    }

    /// As [`migration_read`](DeviceFile::migration_read).
    pub(crate) fn read(&self, buf: &mut [u8]) -> Result<usize> {
        self.session()?.machine().read(Some(self.session), buf)
    }

    /// As [`migration_write`](DeviceFile::migration_write).
    pub(crate) fn write(&self, data: &[u8]) -> Result<usize> {
        let session = self.session()?;
        session
            .machine()
            .write(session.steps(), Some(self.session), data)
    }

    /// `VFIO_MIG_GET_PRECOPY_INFO`, all that there is. What can be read ahead is initial data; a
    /// device's state is small, and comes when it is stopped.
    pub(crate) fn ioctl(&self, cmd: u32, arg: u64, caller: &dyn Caller) -> Result<u32> {
        if cmd != VFIO_MIG_GET_PRECOPY_INFO {
            return Err(Errno::NOTTY);
        }
        const MIN: usize = size_of::<PrecopyInfo>();
        let (mut info, argsz) = vfio::read::<PrecopyInfo, _>(caller, arg, MIN)?;
        info.flags = PrecopyFlags::empty();
        info.initial_bytes = self.session()?.machine().precopy_left(self.session)?;
        info.dirty_bytes = 0;
        vfio::write_back(caller, arg, &info, argsz)?;
        Ok(0)
    }
}
