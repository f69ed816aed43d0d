//! Migration states and the data file's one ioctl.

use core::fmt;

use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::feature::MigrationFlags;

/// `enum vfio_device_mig_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum State {
    /// Undefined after a failed step; only reset leaves it.
    Error = 0,
    /// Does nothing and changes nothing.
    Stop = 1,
    /// Runs.
    Running = 2,
    /// Stopped, its state can be read.
    StopCopy = 3,
    /// Stopped, its state can be written.
    Resuming = 4,
    /// Runs, but starts no DMA to other devices.
    RunningP2p = 5,
    /// Runs, and state can be read ahead.
    PreCopy = 6,
    /// Both of the above.
    PreCopyP2p = 7,
}

impl State {
    /// All of them, by number.
    pub const ALL: [Self; 8] = [
        Self::Error,
        Self::Stop,
        Self::Running,
        Self::StopCopy,
        Self::Resuming,
        Self::RunningP2p,
        Self::PreCopy,
        Self::PreCopyP2p,
    ];

    /// What a device must be able to do to have this state.
    #[must_use]
    pub const fn needs(self) -> MigrationFlags {
        let stop_copy = MigrationFlags::STOP_COPY;
        match self {
            Self::Error => MigrationFlags::empty(),
            Self::Stop | Self::Running | Self::StopCopy | Self::Resuming => stop_copy,
            Self::RunningP2p => stop_copy.union(MigrationFlags::P2P),
            Self::PreCopy => stop_copy.union(MigrationFlags::PRE_COPY),
            Self::PreCopyP2p => stop_copy
                .union(MigrationFlags::P2P)
                .union(MigrationFlags::PRE_COPY),
        }
    }
}

impl TryFrom<u32> for State {
    /// `EINVAL`.
    type Error = Errno;

    fn try_from(number: u32) -> Result<Self, Errno> {
        usize::try_from(number)
            .ok()
            .and_then(|index| Self::ALL.get(index).copied())
            .ok_or(Errno::INVAL)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "ERROR",
            Self::Stop => "STOP",
            Self::Running => "RUNNING",
            Self::StopCopy => "STOP_COPY",
            Self::Resuming => "RESUMING",
            Self::RunningP2p => "RUNNING_P2P",
            Self::PreCopy => "PRE_COPY",
            Self::PreCopyP2p => "PRE_COPY_P2P",
        })
    }
}

flags! {
    /// `VFIO_PRECOPY_INFO_*`.
    pub struct PrecopyFlags: u32 {
        /// There is new initial data; only in the second form.
        const REINIT = 1 << 0;
    }
}

/// `struct vfio_precopy_info`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct PrecopyInfo {
    /// In: bytes the client offers.
    pub argsz: u32,
    /// Out, in the second form only.
    pub flags: PrecopyFlags,
    /// Out: bytes of initial data left.
    pub initial_bytes: u64,
    /// Out: bytes that changed since.
    pub dirty_bytes: u64,
}
layout!(PrecopyInfo, size 24, min 24, { argsz 0, flags 4, initial_bytes 8, dirty_bytes 16 });

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_by_number() {
        for (number, state) in (0u32..).zip(State::ALL) {
            assert_eq!(state as u32, number);
            assert_eq!(State::try_from(number), Ok(state));
        }
        assert_eq!(State::try_from(8), Err(Errno::INVAL));
        assert_eq!(State::try_from(u32::MAX), Err(Errno::INVAL));
    }

    #[test]
    fn needs_by_table() {
        for (state, bits) in [
            (State::Stop, 1),
            (State::Running, 1),
            (State::StopCopy, 1),
            (State::Resuming, 1),
            (State::RunningP2p, 3),
            (State::PreCopy, 5),
            (State::PreCopyP2p, 7),
        ] {
            assert_eq!(state.needs().bits(), bits, "{state}");
        }
    }
}
