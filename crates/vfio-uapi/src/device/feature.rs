//! `VFIO_DEVICE_FEATURE`: numbers, data, and the checks all features share.

use core::fmt;

use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

flags! {
    /// The flag word: which feature in the low 16 bits, what to do above.
    pub struct FeatureFlags: u32 {
        /// `VFIO_DEVICE_FEATURE_MASK`: the feature; see [`FeatureFlags::index`].
        const INDEX = 0xffff;
        /// `VFIO_DEVICE_FEATURE_GET`.
        const GET = 1 << 16;
        /// `VFIO_DEVICE_FEATURE_SET`.
        const SET = 1 << 17;
        /// `VFIO_DEVICE_FEATURE_PROBE`.
        const PROBE = 1 << 18;
    }

    /// `VFIO_MIGRATION_*`.
    pub struct MigrationFlags: u64 {
        /// Stop and copy.
        const STOP_COPY = 1 << 0;
        /// Peer to peer states.
        const P2P = 1 << 1;
        /// Copying while running.
        const PRE_COPY = 1 << 2;
    }
}

impl FeatureFlags {
    /// The number of the feature.
    #[must_use]
    pub const fn index(self) -> u16 {
        (self.bits() & 0xffff) as u16
    }

    /// The checks before any feature looks at its number (`vfio_ioctl_device_feature`): `EINVAL` for an unknown bit, and for get and set
    /// together unless probing.
    pub fn check(self) -> Result<(), Errno> {
        if self.has_unknown_bits()
            || (self.contains(Self::GET | Self::SET) && !self.contains(Self::PROBE))
        {
            return Err(Errno::INVAL);
        }
        Ok(())
    }
}

/// `struct vfio_device_feature`, without its data.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct FeatureHeader {
    /// Bytes the client offers, data included.
    pub argsz: u32,
    /// Which feature and what to do.
    pub flags: FeatureFlags,
}
layout!(FeatureHeader, size 8, min 8, { argsz 0, flags 4 });

/// What is left to do after [`FeatureHeader::check`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureOp {
    /// Answer 0: the feature is there with the operations asked for.
    Probe,
    /// Fill the data.
    Get,
    /// Take the data.
    Set,
}

impl FeatureHeader {
    /// Bytes of data the client offers.
    #[must_use]
    pub const fn data_room(&self) -> usize {
        (self.argsz as usize).saturating_sub(8)
    }

    /// The checks of one feature that offers `supported` (of get and set) and needs `data_size` bytes (`vfio_check_feature`).
    ///
    /// `EINVAL` for an operation it does not offer, for none at all, and for too little data. Probing looks at neither data nor size.
    pub fn check(&self, supported: FeatureFlags, data_size: usize) -> Result<FeatureOp, Errno> {
        let asked = self.flags & (FeatureFlags::GET | FeatureFlags::SET);
        if !supported.contains(asked) {
            return Err(Errno::INVAL);
        }
        if self.flags.contains(FeatureFlags::PROBE) {
            return Ok(FeatureOp::Probe);
        }
        if asked.is_empty() || self.data_room() < data_size {
            return Err(Errno::INVAL);
        }
        Ok(if asked.contains(FeatureFlags::GET) {
            FeatureOp::Get
        } else {
            FeatureOp::Set
        })
    }
}

/// `VFIO_DEVICE_FEATURE_*` by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Feature {
    /// Shared secret between a physical and a virtual function; set, 16 bytes.
    PciVfToken = 0,
    /// What migration can do; get, [`Migration`].
    Migration = 1,
    /// The migration state; get and set, [`MigState`].
    MigDeviceState = 2,
    /// Enter low power; set, no data.
    LowPowerEntry = 3,
    /// The same with an eventfd; set, [`LowPowerEntryWithWakeup`].
    LowPowerEntryWithWakeup = 4,
    /// Leave low power; set, no data.
    LowPowerExit = 5,
    /// Start logging DMA; set, [`DmaLoggingControl`].
    DmaLoggingStart = 6,
    /// Stop logging DMA; set, no data.
    DmaLoggingStop = 7,
    /// Read and clear the log; get, [`DmaLoggingReport`].
    DmaLoggingReport = 8,
    /// Estimate of the data to copy; get, [`MigDataSize`].
    MigDataSize = 9,
    /// Bus mastering; set, [`BusMaster`].
    BusMaster = 10,
    /// A region as a dma-buf; get, [`DmaBuf`].
    DmaBuf = 11,
    /// Second form of the precopy information; set, no data.
    MigPrecopyInfoV2 = 12,
    /// zPCI errors (s390).
    ZpciError = 13,
}

impl Feature {
    /// All of them, by number.
    pub const ALL: [Self; 14] = [
        Self::PciVfToken,
        Self::Migration,
        Self::MigDeviceState,
        Self::LowPowerEntry,
        Self::LowPowerEntryWithWakeup,
        Self::LowPowerExit,
        Self::DmaLoggingStart,
        Self::DmaLoggingStop,
        Self::DmaLoggingReport,
        Self::MigDataSize,
        Self::BusMaster,
        Self::DmaBuf,
        Self::MigPrecopyInfoV2,
        Self::ZpciError,
    ];

    /// The name in the uapi header.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::PciVfToken => "VFIO_DEVICE_FEATURE_PCI_VF_TOKEN",
            Self::Migration => "VFIO_DEVICE_FEATURE_MIGRATION",
            Self::MigDeviceState => "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE",
            Self::LowPowerEntry => "VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY",
            Self::LowPowerEntryWithWakeup => "VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP",
            Self::LowPowerExit => "VFIO_DEVICE_FEATURE_LOW_POWER_EXIT",
            Self::DmaLoggingStart => "VFIO_DEVICE_FEATURE_DMA_LOGGING_START",
            Self::DmaLoggingStop => "VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP",
            Self::DmaLoggingReport => "VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT",
            Self::MigDataSize => "VFIO_DEVICE_FEATURE_MIG_DATA_SIZE",
            Self::BusMaster => "VFIO_DEVICE_FEATURE_BUS_MASTER",
            Self::DmaBuf => "VFIO_DEVICE_FEATURE_DMA_BUF",
            Self::MigPrecopyInfoV2 => "VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2",
            Self::ZpciError => "VFIO_DEVICE_FEATURE_ZPCI_ERROR",
        }
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl TryFrom<u16> for Feature {
    /// `ENOTTY`, as for a feature the driver lacks.
    type Error = Errno;

    fn try_from(index: u16) -> Result<Self, Errno> {
        Self::ALL
            .get(usize::from(index))
            .copied()
            .ok_or(Errno::NOTTY)
    }
}

/// `struct vfio_device_feature_migration`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct Migration {
    /// What the device can do.
    pub flags: MigrationFlags,
}
layout!(Migration, size 8, { flags 0 });

/// `struct vfio_device_feature_mig_state`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct MigState {
    /// A [`super::migration::State`].
    pub device_state: u32,
    /// Out: the data file the last step opened, or -1.
    pub data_fd: i32,
}
layout!(MigState, size 8, { device_state 0, data_fd 4 });

/// `struct vfio_device_low_power_entry_with_wakeup`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct LowPowerEntryWithWakeup {
    /// Signalled once when the host wakes the device.
    pub wakeup_eventfd: i32,
    /// Not checked.
    pub reserved: u32,
}
layout!(LowPowerEntryWithWakeup, size 8, { wakeup_eventfd 0, reserved 4 });

/// `struct vfio_device_feature_dma_logging_control`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct DmaLoggingControl {
    /// In: wished; out: used.
    pub page_size: u64,
    /// Entries in the array.
    pub num_ranges: u32,
    /// Unused.
    pub reserved: u32,
    /// Address of an array of [`DmaLoggingRange`] in the client.
    pub ranges: u64,
}
layout!(DmaLoggingControl, size 24, { page_size 0, num_ranges 8, reserved 12, ranges 16 });

/// `struct vfio_device_feature_dma_logging_range`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct DmaLoggingRange {
    /// First address.
    pub iova: u64,
    /// Bytes.
    pub length: u64,
}
layout!(DmaLoggingRange, size 16, { iova 0, length 8 });

/// `struct vfio_device_feature_dma_logging_report`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct DmaLoggingReport {
    /// First address.
    pub iova: u64,
    /// Bytes.
    pub length: u64,
    /// Bytes one bit stands for.
    pub page_size: u64,
    /// Address of the bitmap in the client.
    pub bitmap: u64,
}
layout!(DmaLoggingReport, size 32, { iova 0, length 8, page_size 16, bitmap 24 });

/// `struct vfio_device_feature_mig_data_size`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct MigDataSize {
    /// Bytes, estimated.
    pub stop_copy_length: u64,
}
layout!(MigDataSize, size 8, { stop_copy_length 0 });

/// `struct vfio_device_feature_bus_master`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct BusMaster {
    /// 0 clears, 1 sets.
    pub op: u32,
}
layout!(BusMaster, size 4, { op 0 });

/// `struct vfio_device_feature_dma_buf`, without its array of [`DmaBufRange`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct DmaBuf {
    /// A memory BAR.
    pub region_index: u32,
    /// Flags of the new descriptor.
    pub open_flags: u32,
    /// Must be 0.
    pub flags: u32,
    /// Ranges that follow.
    pub nr_ranges: u32,
}
layout!(DmaBuf, size 16, { region_index 0, open_flags 4, flags 8, nr_ranges 12 });

/// `struct vfio_region_dma_range`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct DmaBufRange {
    /// Offset in the region.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}
layout!(DmaBufRange, size 16, { offset 0, length 8 });

#[cfg(test)]
mod tests {
    use super::*;

    const GET: u32 = 0x1_0000;
    const SET: u32 = 0x2_0000;
    const PROBE: u32 = 0x4_0000;

    #[test]
    fn features_by_number() {
        for (number, feature) in (0u16..).zip(Feature::ALL) {
            assert_eq!(feature as u16, number);
            assert_eq!(Feature::try_from(number), Ok(feature));
        }
        assert_eq!(Feature::try_from(14), Err(Errno::NOTTY));
        assert_eq!(Feature::try_from(u16::MAX), Err(Errno::NOTTY));
    }

    #[test]
    fn flag_word_by_table() {
        for (bits, want) in [
            (0, Ok(())),
            (0xffff, Ok(())),
            (GET | 1, Ok(())),
            (GET | SET | PROBE, Ok(())),
            (GET | SET, Err(Errno::INVAL)),
            (0x8_0000, Err(Errno::INVAL)),
            (0x8000_0000 | PROBE, Err(Errno::INVAL)),
        ] {
            assert_eq!(
                FeatureFlags::from_bits_retain(bits).check(),
                want,
                "{bits:#x}"
            );
        }
        assert_eq!(FeatureFlags::from_bits_retain(GET | 0x1234).index(), 0x1234);
    }

    #[test]
    fn operations_by_table() {
        use FeatureOp::{Get, Probe, Set};
        const INVAL: Result<FeatureOp, Errno> = Err(Errno::INVAL);
        // argsz, flags, supported, data size, answer
        for (argsz, flags, supported, data_size, want) in [
            (16, GET, GET, 8, Ok(Get)),
            (16, SET, GET | SET, 8, Ok(Set)),
            (8, SET, SET, 0, Ok(Set)),
            (8, PROBE, GET, 8, Ok(Probe)),
            (8, PROBE | GET | SET, GET | SET, 8, Ok(Probe)),
            (8, PROBE | SET, GET, 0, INVAL),
            (16, SET, GET, 8, INVAL),
            (16, 0, GET | SET, 8, INVAL),
            (15, GET, GET, 8, INVAL),
            (0, GET, GET, 1, INVAL),
        ] {
            let header = FeatureHeader {
                argsz,
                flags: FeatureFlags::from_bits_retain(flags),
            };
            assert_eq!(
                header.check(FeatureFlags::from_bits_retain(supported), data_size),
                want,
                "{header:?}"
            );
        }
    }
}
