//! Migration of a device: the states of `enum vfio_device_mig_state`, and its data stream.
//!
//! The state machine is the core's; a driver offers its state as one value
//! ([`Migratable`]). The value is whole: with the device's identity it is all it takes to make the
//! device again, in another process too.

mod arcs;
mod data_file;
mod driver;
mod machine;
mod stream;

use super::DeviceFile;
use crate::{Errno, Result};
use std::borrow::Cow;
pub use vfio_uapi::device::feature::MigrationFlags;
pub use vfio_uapi::device::migration::State;

pub(crate) use data_file::DataFile;
pub(crate) use machine::{Machine, Steps};

/// What a driver offers so that its devices can migrate; see
/// [`DeviceOps::migratable`](super::DeviceOps::migratable). `S` is its session.
///
/// The core calls one of these at a time for a device, and never for an arc the kernel's table
/// does not have. A device is running after `open`, and `reset` may come in any state; after it the
/// core calls [`resume`](Migratable::resume) and [`resume_p2p`](Migratable::resume_p2p) for what
/// was stopped. Both are therefore harmless for a device that runs. No call may wait for the
/// client. A panic takes the device down, as anywhere in a driver.
///
/// The counterpart is the kernel's `struct vfio_migration_ops`, whose `migration_set_state` leaves
/// the arcs, the file and its data to each driver.
pub trait Migratable<S> {
    /// What the saved state looks like, and what the device can do. Always the same for a device.
    fn form(&self) -> Form;

    /// `RUNNING_P2P` to `STOP`: on return the device does nothing by itself any more. It neither
    /// touches the client's memory nor raises interrupts nor talks to the outside, and what comes
    /// from there waits. Its regions can still be accessed.
    fn stop(&self, session: &S) -> Result<(), StepError>;

    /// `STOP` to `RUNNING_P2P`: goes on. What was held back happens now; interrupts that were
    /// pending are raised.
    fn resume(&self, session: &S) -> Result<(), StepError>;

    /// `RUNNING` to `RUNNING_P2P`: on return the device begins no DMA to other devices. Not called
    /// unless [`Form::p2p`] is set.
    fn pause_p2p(&self, _session: &S) -> Result<(), StepError> {
        Ok(())
    }

    /// `RUNNING_P2P` to `RUNNING`.
    fn resume_p2p(&self, _session: &S) -> Result<(), StepError> {
        Ok(())
    }

    /// The state of a stopped device: everything its client could notice if it were missing, and
    /// nothing that belongs to where it runs (descriptors, backends, memory). At most
    /// [`Form::max_len`] bytes.
    fn save(&self, session: &S) -> Result<Vec<u8>, StepError>;

    /// Makes a stopped device what [`save`](Migratable::save) saw, perhaps in an older version of
    /// this driver. The bytes are a client's: anything that `save` could not have made is `EINVAL`,
    /// and the device stays as it was.
    fn restore(&self, session: &S, version: u32, state: &[u8]) -> Result<(), StepError>;
}

/// What a device's saved state looks like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Form {
    /// The kind of device, at most 32 bytes: a stream of another kind is refused. Two devices of
    /// one kind can take each other's state.
    pub kind: Cow<'static, str>,
    /// The version that is saved.
    pub version: u32,
    /// The oldest version that can be restored.
    pub oldest: u32,
    /// Most bytes of saved state.
    pub max_len: usize,
    /// It has the states in which it does no DMA to other devices.
    pub p2p: bool,
    /// It has the states in which it runs while a session is open. What can be read ahead then is
    /// what kind of device it is, so that the other side can refuse early.
    pub pre_copy: bool,
}

impl Form {
    /// `VFIO_MIGRATION_*`; `STOP_COPY` always.
    pub fn flags(&self) -> MigrationFlags {
        let mut flags = MigrationFlags::STOP_COPY;
        flags.set(MigrationFlags::P2P, self.p2p);
        flags.set(MigrationFlags::PRE_COPY, self.pre_copy);
        flags
    }
}

/// Why a driver did not make a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepError {
    /// The device is as it was before.
    Refused(Errno),
    /// Nobody knows what the device is now: it goes to `ERROR`, which only a reset leaves.
    Broken(Errno),
}

impl StepError {
    /// What the client is told.
    pub fn errno(self) -> Errno {
        match self {
            StepError::Refused(errno) | StepError::Broken(errno) => errno,
        }
    }
}

impl From<Errno> for StepError {
    /// As [`StepError::Refused`].
    fn from(errno: Errno) -> StepError {
        StepError::Refused(errno)
    }
}

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
        Ok(self.grant()?.session.steps().form()?.flags())
    }

    /// The state (`VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`, GET). Errnos as
    /// [`migration_flags`](DeviceFile::migration_flags).
    pub fn migration_state(&self) -> Result<State> {
        let grant = self.grant()?;
        grant.session.steps().form()?;
        Ok(grant.session.machine().state())
    }

    /// Goes to a state by the single arcs that lead there. Tells which data session the last arc
    /// opened, if any. `EINVAL` for a state that cannot be reached from here, that the device does
    /// not have, or, leaving `RESUMING`, when what was written is not a whole stream for this
    /// device; any other error is the driver's. On error the state that was reached is what
    /// [`migration_state`](DeviceFile::migration_state) tells, which may be another than before.
    ///
    /// A device is in `RUNNING` after its first open and after a reset.
    pub fn set_migration_state(&self, to: State) -> Result<Option<DataDirection>> {
        let session = &self.grant()?.session;
        let opened = session.machine().set(session.steps(), to)?;
        Ok(opened.map(|opened| opened.direction))
    }

    /// An estimate of the bytes that can be read until the end of `STOP_COPY`
    /// (`VFIO_DEVICE_FEATURE_MIG_DATA_SIZE`), never too small.
    pub fn migration_data_size(&self) -> Result<u64> {
        let session = &self.grant()?.session;
        session.machine().data_size(session.steps())
    }

    /// Reads the next bytes of the saved device. `Ok(0)` in `STOP_COPY` is the end; `ENOMSG` in
    /// `PRE_COPY` means that there is no more now; `EBADF` in `RESUMING`; `ENODEV` when no session is
    /// open (any more).
    pub fn migration_read(&self, buf: &mut [u8]) -> Result<usize> {
        let session = &self.grant()?.session;
        session.steps().form()?;
        session.machine().read(None, buf)
    }

    /// Takes the next bytes of a saved device, all of them or none. `ENOMEM` beyond the longest
    /// stream the device could have made, `EINVAL` when it is not a stream of this kind of device,
    /// `EBADF` while saving, `ENODEV` when no session is open (any more).
    pub fn migration_write(&self, data: &[u8]) -> Result<usize> {
        let session = &self.grant()?.session;
        session.machine().write(session.steps(), None, data)
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
pub(super) mod tests;
