//! Command words, by the kind of file they are given to.
//!
//! All of them are encoded `_IO(';', nr)`: no size, no direction, so a server sees the number and one argument word and nothing else.
//! The numbers 12 to 17 of VFIO mean one thing on a container and another on a device, so there is one enum per kind of file and no
//! conversion that does not name the kind.

use core::fmt;

use rustix::io::Errno;

/// The type byte of every VFIO and iommufd command (`VFIO_TYPE`, `IOMMUFD_TYPE`).
pub const TYPE: u8 = b';';
/// First VFIO number (`VFIO_BASE`).
pub const VFIO_BASE: u32 = 100;
/// First iommufd number (`IOMMUFD_CMD_BASE`).
pub const IOMMUFD_BASE: u32 = 0x80;
/// Last iommufd number of this ABI.
pub const IOMMUFD_LAST: u32 = 0x95;

/// `_IO(';', nr)`.
const fn io(nr: u32) -> u32 {
    (TYPE as u32) << 8 | nr
}

/// `_IOC_NR`: the number in a command word, without type, size and direction.
#[must_use]
pub const fn nr(cmd: u32) -> u32 {
    cmd & 0xff
}

/// A command word that this kind of file does not know; as an errno `ENOTTY`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownIoctl(pub u32);

impl fmt::Display for UnknownIoctl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unknown ioctl {:#x}", self.0)
    }
}

impl std::error::Error for UnknownIoctl {}

impl From<UnknownIoctl> for Errno {
    fn from(_: UnknownIoctl) -> Self {
        Self::NOTTY
    }
}

ioctls! {
    /// What a device file understands, whether it came from a group or from its own node.
    pub enum DeviceIoctl, base VFIO_BASE, {
        GetInfo = 7, VFIO_DEVICE_GET_INFO;
        GetRegionInfo = 8, VFIO_DEVICE_GET_REGION_INFO;
        GetIrqInfo = 9, VFIO_DEVICE_GET_IRQ_INFO;
        SetIrqs = 10, VFIO_DEVICE_SET_IRQS;
        Reset = 11, VFIO_DEVICE_RESET;
        GetPciHotResetInfo = 12, VFIO_DEVICE_GET_PCI_HOT_RESET_INFO;
        PciHotReset = 13, VFIO_DEVICE_PCI_HOT_RESET;
        QueryGfxPlane = 14, VFIO_DEVICE_QUERY_GFX_PLANE;
        GetGfxDmabuf = 15, VFIO_DEVICE_GET_GFX_DMABUF;
        Ioeventfd = 16, VFIO_DEVICE_IOEVENTFD;
        Feature = 17, VFIO_DEVICE_FEATURE;
        BindIommufd = 18, VFIO_DEVICE_BIND_IOMMUFD;
        AttachIommufdPt = 19, VFIO_DEVICE_ATTACH_IOMMUFD_PT;
        DetachIommufdPt = 20, VFIO_DEVICE_DETACH_IOMMUFD_PT;
    }

    /// What a group node (`/dev/vfio/N`) understands.
    pub enum GroupIoctl, base VFIO_BASE, {
        GetStatus = 3, VFIO_GROUP_GET_STATUS;
        SetContainer = 4, VFIO_GROUP_SET_CONTAINER;
        UnsetContainer = 5, VFIO_GROUP_UNSET_CONTAINER;
        GetDeviceFd = 6, VFIO_GROUP_GET_DEVICE_FD;
    }

    /// What a container (`/dev/vfio/vfio`) understands with a type1 backend; an iommufd file used as a container knows the same words.
    pub enum ContainerIoctl, base VFIO_BASE, {
        GetApiVersion = 0, VFIO_GET_API_VERSION;
        /// The argument is a value, not a pointer.
        CheckExtension = 1, VFIO_CHECK_EXTENSION;
        /// The argument is a value, not a pointer.
        SetIommu = 2, VFIO_SET_IOMMU;
        GetInfo = 12, VFIO_IOMMU_GET_INFO;
        MapDma = 13, VFIO_IOMMU_MAP_DMA;
        UnmapDma = 14, VFIO_IOMMU_UNMAP_DMA;
        /// sPAPR only; `ENOTTY` with type1.
        Enable = 15, VFIO_IOMMU_ENABLE;
        /// sPAPR only; `ENOTTY` with type1.
        Disable = 16, VFIO_IOMMU_DISABLE;
        DirtyPages = 17, VFIO_IOMMU_DIRTY_PAGES;
    }

    /// What the data file of a migration session understands.
    pub enum MigrationIoctl, base VFIO_BASE, {
        GetPrecopyInfo = 21, VFIO_MIG_GET_PRECOPY_INFO;
    }

    /// What `/dev/iommu` understands.
    pub enum IommufdIoctl, base IOMMUFD_BASE, {
        Destroy = 0x0, IOMMU_DESTROY;
        IoasAlloc = 0x1, IOMMU_IOAS_ALLOC;
        IoasAllowIovas = 0x2, IOMMU_IOAS_ALLOW_IOVAS;
        IoasCopy = 0x3, IOMMU_IOAS_COPY;
        IoasIovaRanges = 0x4, IOMMU_IOAS_IOVA_RANGES;
        IoasMap = 0x5, IOMMU_IOAS_MAP;
        IoasUnmap = 0x6, IOMMU_IOAS_UNMAP;
        Option = 0x7, IOMMU_OPTION;
        VfioIoas = 0x8, IOMMU_VFIO_IOAS;
        HwptAlloc = 0x9, IOMMU_HWPT_ALLOC;
        GetHwInfo = 0xa, IOMMU_GET_HW_INFO;
        HwptSetDirtyTracking = 0xb, IOMMU_HWPT_SET_DIRTY_TRACKING;
        HwptGetDirtyBitmap = 0xc, IOMMU_HWPT_GET_DIRTY_BITMAP;
        HwptInvalidate = 0xd, IOMMU_HWPT_INVALIDATE;
        FaultQueueAlloc = 0xe, IOMMU_FAULT_QUEUE_ALLOC;
        IoasMapFile = 0xf, IOMMU_IOAS_MAP_FILE;
        ViommuAlloc = 0x10, IOMMU_VIOMMU_ALLOC;
        VdeviceAlloc = 0x11, IOMMU_VDEVICE_ALLOC;
        IoasChangeProcess = 0x12, IOMMU_IOAS_CHANGE_PROCESS;
        VeventqAlloc = 0x13, IOMMU_VEVENTQ_ALLOC;
        HwQueueAlloc = 0x14, IOMMU_HW_QUEUE_ALLOC;
        IoasNoiommuGetPa = 0x15, IOMMU_IOAS_NOIOMMU_GET_PA;
    }
}

/// Who answers a command given to an iommufd file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IommufdRoute {
    /// iommufd itself.
    Native(IommufdIoctl),
    /// The number is outside iommufd's range: the VFIO container emulation decides, whatever the rest of the word says.
    Compat,
    /// The number is iommufd's but type, size or direction are not: `ENOTTY`.
    Unknown(UnknownIoctl),
}

/// Routes a command as `drivers/iommu/iommufd/main.c`, `iommufd_fops_ioctl` does: by number first, then by the whole word.
#[must_use]
pub fn iommufd_route(cmd: u32) -> IommufdRoute {
    if !(IOMMUFD_BASE..=IOMMUFD_LAST).contains(&nr(cmd)) {
        return IommufdRoute::Compat;
    }
    match IommufdIoctl::try_from(cmd) {
        Ok(known) => IommufdRoute::Native(known),
        Err(unknown) => IommufdRoute::Unknown(unknown),
    }
}

/// The kind of file a command was given to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// A device file.
    Device,
    /// A group node.
    Group,
    /// A container.
    Container,
    /// The data file of a migration session.
    MigrationData,
    /// `/dev/iommu`.
    Iommufd,
}

/// The header's name of a command given to a kind of file; `None` if it has none there.
///
/// A container command on an iommufd file has its container name: the emulation answers it.
#[must_use]
pub fn name(kind: FileKind, cmd: u32) -> Option<&'static str> {
    let container = || ContainerIoctl::try_from(cmd).ok().map(ContainerIoctl::name);
    match kind {
        FileKind::Device => DeviceIoctl::try_from(cmd).ok().map(DeviceIoctl::name),
        FileKind::Group => GroupIoctl::try_from(cmd).ok().map(GroupIoctl::name),
        FileKind::Container => container(),
        FileKind::MigrationData => MigrationIoctl::try_from(cmd).ok().map(MigrationIoctl::name),
        FileKind::Iommufd => IommufdIoctl::try_from(cmd)
            .ok()
            .map(IommufdIoctl::name)
            .or_else(container),
    }
}

/// A command as a log line shows it: its name on that kind of file, or the bare word.
#[derive(Clone, Copy, Debug)]
pub struct Named {
    /// The file it was given to.
    pub kind: FileKind,
    /// The command word.
    pub cmd: u32,
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match name(self.kind, self.cmd) {
            Some(name) => f.write_str(name),
            None => write!(f, "ioctl {:#x}", self.cmd),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_io_of_semicolon() {
        assert_eq!(VFIO_GET_API_VERSION, 0x3b64);
        assert_eq!(VFIO_DEVICE_GET_INFO, 0x3b6b);
        assert_eq!(VFIO_DEVICE_BIND_IOMMUFD, 0x3b76);
        assert_eq!(VFIO_MIG_GET_PRECOPY_INFO, 0x3b79);
        assert_eq!(IOMMU_DESTROY, 0x3b80);
        assert_eq!(IOMMU_IOAS_NOIOMMU_GET_PA, 0x3b95);
    }

    #[test]
    fn one_number_means_two_things() {
        for (cmd, device, container) in [
            (
                0x3b70,
                "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO",
                "VFIO_IOMMU_GET_INFO",
            ),
            (0x3b71, "VFIO_DEVICE_PCI_HOT_RESET", "VFIO_IOMMU_MAP_DMA"),
            (
                0x3b72,
                "VFIO_DEVICE_QUERY_GFX_PLANE",
                "VFIO_IOMMU_UNMAP_DMA",
            ),
            (0x3b73, "VFIO_DEVICE_GET_GFX_DMABUF", "VFIO_IOMMU_ENABLE"),
            (0x3b74, "VFIO_DEVICE_IOEVENTFD", "VFIO_IOMMU_DISABLE"),
            (0x3b75, "VFIO_DEVICE_FEATURE", "VFIO_IOMMU_DIRTY_PAGES"),
        ] {
            assert_eq!(name(FileKind::Device, cmd), Some(device));
            assert_eq!(name(FileKind::Container, cmd), Some(container));
            assert_eq!(name(FileKind::Iommufd, cmd), Some(container));
            assert_eq!(name(FileKind::Group, cmd), None);
        }
    }

    #[test]
    fn every_command_comes_back_from_its_word_and_only_from_it() {
        for &ioctl in DeviceIoctl::ALL {
            assert_eq!(DeviceIoctl::try_from(ioctl.cmd()), Ok(ioctl));
            assert_eq!(
                GroupIoctl::try_from(ioctl.cmd()),
                Err(UnknownIoctl(ioctl.cmd()))
            );
            assert_eq!(
                DeviceIoctl::try_from(ioctl.cmd() | 0x4000_0000),
                Err(UnknownIoctl(ioctl.cmd() | 0x4000_0000))
            );
        }
        for &ioctl in IommufdIoctl::ALL {
            assert_eq!(iommufd_route(ioctl.cmd()), IommufdRoute::Native(ioctl));
        }
        assert_eq!(IommufdIoctl::ALL.len(), 22);
        assert_eq!(Errno::from(UnknownIoctl(0)), Errno::NOTTY);
    }

    #[test]
    fn iommufd_routes_by_number_first() {
        assert_eq!(iommufd_route(VFIO_GET_API_VERSION), IommufdRoute::Compat);
        assert_eq!(iommufd_route(0x3b96), IommufdRoute::Compat);
        assert_eq!(iommufd_route(0), IommufdRoute::Compat);
        for cmd in [0x80, 0x3a80, 0xc004_3b80, 0x0004_3b95] {
            assert_eq!(iommufd_route(cmd), IommufdRoute::Unknown(UnknownIoctl(cmd)));
        }
    }

    #[test]
    fn log_lines_name_the_command_or_show_the_word() {
        let shown = |kind, cmd| Named { kind, cmd }.to_string();
        assert_eq!(shown(FileKind::Device, 0x3b76), "VFIO_DEVICE_BIND_IOMMUFD");
        assert_eq!(shown(FileKind::Group, 0x3b76), "ioctl 0x3b76");
        assert_eq!(
            shown(FileKind::MigrationData, 0x3b79),
            "VFIO_MIG_GET_PRECOPY_INFO"
        );
        assert_eq!(DeviceIoctl::Reset.to_string(), "VFIO_DEVICE_RESET");
    }
}
