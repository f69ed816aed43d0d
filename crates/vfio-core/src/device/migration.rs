//! Migration of a device: the states of `enum vfio_device_mig_state`, and its data stream.

use super::DeviceFile;
use crate::{Errno, Result};
pub use vfio_uapi::device::feature::MigrationFlags;
pub use vfio_uapi::device::migration::State;

/// Which way the data of a session goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataDirection {
    /// The client reads what the device saves.
    Saving,
    /// The client writes what the device is to become.
    Resuming,
}

impl DeviceFile {
    /// What the device can do (`VFIO_DEVICE_FEATURE_MIGRATION`). `ENOTTY` when it cannot migrate,
    /// `EINVAL` before BIND, `ENODEV` when cut off.
    pub fn migration_flags(&self) -> Result<MigrationFlags> {
        let _ = self.grant()?;
        Err(Errno::NOTTY)
    }

    /// The state (`VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`, GET). Errnos as
    /// [`migration_flags`](DeviceFile::migration_flags).
    pub fn migration_state(&self) -> Result<State> {
        let _ = self.grant()?;
        Err(Errno::NOTTY)
    }

    /// Goes to a state by the single arcs that lead there. Tells which data session the last arc
    /// opened, if any. `EINVAL` for a state that cannot be reached from here or that the device
    /// does not have; any other error is the driver's. On error the state that was reached is what
    /// [`migration_state`](DeviceFile::migration_state) tells, which may be another than before.
    pub fn set_migration_state(&self, _to: State) -> Result<Option<DataDirection>> {
        let _ = self.grant()?;
        Err(Errno::NOTTY)
    }

    /// An estimate of the bytes that can be read in `STOP_COPY` (`VFIO_DEVICE_FEATURE_MIG_DATA_SIZE`).
    pub fn migration_data_size(&self) -> Result<u64> {
        let _ = self.grant()?;
        Err(Errno::NOTTY)
    }

    /// Reads the next bytes of the saved device. `Ok(0)` in `STOP_COPY` is the end; `ENOMSG` in
    /// `PRE_COPY` means that there is no more now; `EBADF` in `RESUMING`; `ENODEV` when no session is
    /// open (any more).
    pub fn migration_read(&self, _buf: &mut [u8]) -> Result<usize> {
        let _ = self.grant()?;
        Err(Errno::NOTTY)
    }

    /// Takes the next bytes of a saved device, all of them or none. `ENOMEM` beyond the longest
    /// stream the device could have made, `EINVAL` when it is not a stream of this kind of device,
    /// `EBADF` while saving, `ENODEV` when no session is open (any more).
    pub fn migration_write(&self, _data: &[u8]) -> Result<usize> {
        let _ = self.grant()?;
        Err(Errno::NOTTY)
    }
}
