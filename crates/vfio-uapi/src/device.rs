//! Device files: what a device is, its regions and interrupts, binding it to an iommufd.

use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub mod feature;
pub mod migration;

flags! {
    /// `VFIO_DEVICE_FLAGS_*`.
    pub struct InfoFlags: u32 {
        /// `VFIO_DEVICE_RESET` works.
        const RESET = 1 << 0;
        /// vfio-pci.
        const PCI = 1 << 1;
        /// vfio-platform.
        const PLATFORM = 1 << 2;
        /// vfio-amba.
        const AMBA = 1 << 3;
        /// vfio-ccw.
        const CCW = 1 << 4;
        /// vfio-ap.
        const AP = 1 << 5;
        /// vfio-fsl-mc.
        const FSL_MC = 1 << 6;
        /// There are capabilities.
        const CAPS = 1 << 7;
        /// vfio-cdx.
        const CDX = 1 << 8;
    }

    /// `VFIO_REGION_INFO_FLAG_*`.
    pub struct RegionFlags: u32 {
        /// read works.
        const READ = 1 << 0;
        /// write works.
        const WRITE = 1 << 1;
        /// mmap works, perhaps only in parts (sparse capability).
        const MMAP = 1 << 2;
        /// There are capabilities.
        const CAPS = 1 << 3;
    }

    /// `VFIO_IRQ_INFO_*`.
    pub struct IrqFlags: u32 {
        /// Can signal an eventfd.
        const EVENTFD = 1 << 0;
        /// Can be masked.
        const MASKABLE = 1 << 1;
        /// Masks itself when it fires.
        const AUTOMASKED = 1 << 2;
        /// All vectors are set up at once.
        const NORESIZE = 1 << 3;
    }

    /// `VFIO_IRQ_SET_*`: one data bit says what follows the structure, one action bit what to do.
    pub struct IrqSetFlags: u32 {
        /// Nothing follows.
        const DATA_NONE = 1 << 0;
        /// One byte per vector follows.
        const DATA_BOOL = 1 << 1;
        /// One eventfd per vector follows, as an `i32`.
        const DATA_EVENTFD = 1 << 2;
        /// Mask.
        const ACTION_MASK = 1 << 3;
        /// Unmask.
        const ACTION_UNMASK = 1 << 4;
        /// Set up, signal or tear down.
        const ACTION_TRIGGER = 1 << 5;
    }

    /// `VFIO_PCI_HOT_RESET_FLAG_*`.
    pub struct HotResetFlags: u32 {
        /// [`PciDependentDevice::id`] is an iommufd object, not a group.
        const DEV_ID = 1 << 0;
        /// The caller owns all of them.
        const DEV_ID_OWNED = 1 << 1;
    }

    /// `VFIO_GFX_PLANE_TYPE_*`.
    pub struct GfxPlaneFlags: u32 {
        /// Only ask whether the other bit is supported.
        const PROBE = 1 << 0;
        /// The plane is a dma-buf.
        const DMABUF = 1 << 1;
        /// The plane is a region.
        const REGION = 1 << 2;
    }

    /// `VFIO_DEVICE_IOEVENTFD_*`: the size of the write, exactly one.
    pub struct IoeventfdFlags: u32 {
        /// 1 byte.
        const SIZE_8 = 1 << 0;
        /// 2 bytes.
        const SIZE_16 = 1 << 1;
        /// 4 bytes.
        const SIZE_32 = 1 << 2;
        /// 8 bytes.
        const SIZE_64 = 1 << 3;
    }

    /// `VFIO_DEVICE_BIND_FLAG_*`.
    pub struct BindFlags: u32 {
        /// `token_uuid_ptr` is valid.
        const TOKEN = 1 << 0;
    }

    /// `VFIO_DEVICE_ATTACH_PASID`.
    pub struct AttachFlags: u32 {
        /// `pasid` is valid.
        const PASID = 1 << 0;
    }

    /// `VFIO_DEVICE_DETACH_PASID`.
    pub struct DetachFlags: u32 {
        /// `pasid` is valid.
        const PASID = 1 << 0;
    }
}

impl IrqSetFlags {
    /// `VFIO_IRQ_SET_DATA_TYPE_MASK`.
    pub const DATA_MASK: Self = Self::DATA_NONE
        .union(Self::DATA_BOOL)
        .union(Self::DATA_EVENTFD);
    /// `VFIO_IRQ_SET_ACTION_TYPE_MASK`.
    pub const ACTION_MASKS: Self = Self::ACTION_MASK
        .union(Self::ACTION_UNMASK)
        .union(Self::ACTION_TRIGGER);
}

/// `VFIO_DEVICE_API_*_STRING`: what `device_api` of an mdev type says.
pub mod api {
    /// `VFIO_DEVICE_API_PCI_STRING`.
    pub const PCI: &str = "vfio-pci";
    /// `VFIO_DEVICE_API_PLATFORM_STRING`.
    pub const PLATFORM: &str = "vfio-platform";
    /// `VFIO_DEVICE_API_AMBA_STRING`.
    pub const AMBA: &str = "vfio-amba";
    /// `VFIO_DEVICE_API_CCW_STRING`.
    pub const CCW: &str = "vfio-ccw";
    /// `VFIO_DEVICE_API_AP_STRING`.
    pub const AP: &str = "vfio-ap";
}

/// `struct vfio_device_info`; capabilities start at its end (see [`crate::caps`]).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct Info {
    /// In: bytes the client offers. Out: bytes needed, if those are too few for the capabilities.
    pub argsz: u32,
    /// Out.
    pub flags: InfoFlags,
    /// Out: highest region index + 1, holes included.
    pub num_regions: u32,
    /// Out: highest interrupt index + 1, holes included.
    pub num_irqs: u32,
    /// Out: offset of the first capability, 0 if there is none or none fits.
    pub cap_offset: u32,
    /// Unused.
    pub pad: u32,
}
layout!(Info, size 24, min 16, { argsz 0, flags 4, num_regions 8, num_irqs 12, cap_offset 16, pad 20 });

/// `struct vfio_region_info`; capabilities start at its end (see [`crate::caps`]).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct RegionInfo {
    /// In: bytes the client offers. Out: bytes needed, if those are too few for the capabilities.
    pub argsz: u32,
    /// Out.
    pub flags: RegionFlags,
    /// In: which region.
    pub index: u32,
    /// Out: offset of the first capability, 0 if there is none or none fits.
    pub cap_offset: u32,
    /// Out: bytes; 0 for a region that is not implemented.
    pub size: u64,
    /// Out: where in the device file the region starts.
    pub offset: u64,
}
layout!(RegionInfo, size 32, min 32, { argsz 0, flags 4, index 8, cap_offset 12, size 16, offset 24 });

/// Region types and subtypes of the type capability.
pub mod region_type {
    /// `VFIO_REGION_TYPE_PCI_VENDOR_TYPE`: or-ed with a PCI vendor id.
    pub const PCI_VENDOR: u32 = 1 << 31;
    /// `VFIO_REGION_TYPE_GFX`.
    pub const GFX: u32 = 1;
    /// `VFIO_REGION_TYPE_CCW`.
    pub const CCW: u32 = 2;
    /// `VFIO_REGION_SUBTYPE_GFX_EDID`.
    pub const GFX_EDID: u32 = 1;
    /// `VFIO_REGION_SUBTYPE_CCW_ASYNC_CMD`.
    pub const CCW_ASYNC_CMD: u32 = 1;
    /// `VFIO_REGION_SUBTYPE_CCW_SCHIB`.
    pub const CCW_SCHIB: u32 = 2;
    /// `VFIO_REGION_SUBTYPE_CCW_CRW`.
    pub const CCW_CRW: u32 = 3;

    /// The type of a region only one PCI vendor defines.
    #[must_use]
    pub const fn pci_vendor(vendor: u16) -> u32 {
        PCI_VENDOR | vendor as u32
    }
}

/// `struct vfio_region_gfx_edid`: the head of an EDID region.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct RegionGfxEdid {
    /// Where the blob starts in the region.
    pub edid_offset: u32,
    /// Bytes there is room for.
    pub edid_max_size: u32,
    /// Bytes of blob.
    pub edid_size: u32,
    /// Widest mode.
    pub max_xres: u32,
    /// Highest mode.
    pub max_yres: u32,
    /// [`Self::LINK_UP`] or [`Self::LINK_DOWN`].
    pub link_state: u32,
}
layout!(RegionGfxEdid, size 24, { edid_offset 0, edid_max_size 4, edid_size 8, max_xres 12, max_yres 16, link_state 20 });

impl RegionGfxEdid {
    /// `VFIO_DEVICE_GFX_LINK_STATE_UP`.
    pub const LINK_UP: u32 = 1;
    /// `VFIO_DEVICE_GFX_LINK_STATE_DOWN`.
    pub const LINK_DOWN: u32 = 2;
}

/// `struct vfio_irq_info`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct IrqInfo {
    /// In: bytes the client offers.
    pub argsz: u32,
    /// Out.
    pub flags: IrqFlags,
    /// In: which interrupt index.
    pub index: u32,
    /// Out: vectors of this index.
    pub count: u32,
}
layout!(IrqInfo, size 16, min 16, { argsz 0, flags 4, index 8, count 12 });

/// `struct vfio_irq_set`, without its data.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct IrqSet {
    /// Bytes the client offers, data included.
    pub argsz: u32,
    /// What follows and what to do.
    pub flags: IrqSetFlags,
    /// Which interrupt index.
    pub index: u32,
    /// First vector.
    pub start: u32,
    /// Number of vectors.
    pub count: u32,
}
layout!(IrqSet, size 20, min 20, { argsz 0, flags 4, index 8, start 12, count 16 });

impl IrqSet {
    /// Bytes of data that follow the structure, if the request is well formed for a device with `num_indexes` interrupt indexes of which
    /// this one has `num_irqs` vectors; `EINVAL` otherwise (`vfio_set_irqs_validate_and_prepare`).
    ///
    /// The action bits are the driver's to judge: none or several pass here.
    pub fn data_size(&self, num_irqs: u32, num_indexes: u32) -> Result<usize, Errno> {
        let room = self.argsz.checked_sub(20).ok_or(Errno::INVAL)?;
        if self.index >= num_indexes || self.flags.has_unknown_bits() || self.start >= num_irqs {
            return Err(Errno::INVAL);
        }
        // The comparison with the difference rules out a sum of u32::MAX as well as a wrap.
        if self.count >= u32::MAX - self.start || self.start + self.count > num_irqs {
            return Err(Errno::INVAL);
        }
        let element = match self.flags & IrqSetFlags::DATA_MASK {
            IrqSetFlags::DATA_NONE => 0,
            IrqSetFlags::DATA_BOOL => 1,
            IrqSetFlags::DATA_EVENTFD => 4,
            _ => return Err(Errno::INVAL),
        };
        let bytes = u64::from(self.count) * element;
        if bytes > u64::from(room) {
            return Err(Errno::INVAL);
        }
        usize::try_from(bytes).map_err(|_| Errno::INVAL)
    }
}

/// `struct vfio_pci_dependent_device`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct PciDependentDevice {
    /// The iommu group, or with [`HotResetFlags::DEV_ID`] the iommufd object, [`Self::OWNED`] or [`Self::NOT_OWNED`].
    pub id: u32,
    /// PCI domain.
    pub segment: u16,
    /// PCI bus.
    pub bus: u8,
    /// PCI device and function.
    pub devfn: u8,
}
layout!(PciDependentDevice, size 8, { id 0, segment 4, bus 6, devfn 7 });

impl PciDependentDevice {
    /// `VFIO_PCI_DEVID_OWNED`: in a group the caller owns, but not bound.
    pub const OWNED: u32 = 0;
    /// `VFIO_PCI_DEVID_NOT_OWNED`.
    pub const NOT_OWNED: u32 = u32::MAX;
}

/// `struct vfio_pci_hot_reset_info`, without its array of [`PciDependentDevice`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct PciHotResetInfo {
    /// In: bytes the client offers.
    pub argsz: u32,
    /// Out.
    pub flags: HotResetFlags,
    /// Out: devices there are, also with `ENOSPC`.
    pub count: u32,
}
layout!(PciHotResetInfo, size 12, min 12, { argsz 0, flags 4, count 8 });

/// `struct vfio_pci_hot_reset`, without its array of `i32` group descriptors.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct PciHotReset {
    /// Bytes the client offers.
    pub argsz: u32,
    /// Must be 0.
    pub flags: u32,
    /// Group descriptors that follow; 0 for a device bound to an iommufd.
    pub count: u32,
}
layout!(PciHotReset, size 12, min 12, { argsz 0, flags 4, count 8 });

/// `struct vfio_device_gfx_plane_info`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct GfxPlaneInfo {
    /// In: bytes the client offers.
    pub argsz: u32,
    /// In: which kind of plane.
    pub flags: GfxPlaneFlags,
    /// In: `DRM_PLANE_TYPE_*`; 1 is the primary plane.
    pub drm_plane_type: u32,
    /// Out: fourcc code.
    pub drm_format: u32,
    /// Out: tiling.
    pub drm_format_mod: u64,
    /// Out: pixels.
    pub width: u32,
    /// Out: pixels.
    pub height: u32,
    /// Out: bytes from line to line.
    pub stride: u32,
    /// Out: bytes, whole pages.
    pub size: u32,
    /// Out: cursor position.
    pub x_pos: u32,
    /// Out: cursor position.
    pub y_pos: u32,
    /// Out: cursor hot spot.
    pub x_hot: u32,
    /// Out: cursor hot spot.
    pub y_hot: u32,
    /// Out: `region_index` or `dmabuf_id`, which share this word.
    pub id: u32,
    /// Unused.
    pub reserved: u32,
}
layout!(GfxPlaneInfo, size 64, min 60, {
    argsz 0, flags 4, drm_plane_type 8, drm_format 12, drm_format_mod 16, width 24, height 28, stride 32, size 36,
    x_pos 40, y_pos 44, x_hot 48, y_hot 52, id 56, reserved 60,
});

/// `struct vfio_device_ioeventfd`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct Ioeventfd {
    /// Bytes the client offers.
    pub argsz: u32,
    /// Size of the write.
    pub flags: IoeventfdFlags,
    /// Where in the device file.
    pub offset: u64,
    /// The value to write.
    pub data: u64,
    /// The eventfd, -1 to remove.
    pub fd: i32,
    /// Unused.
    pub reserved: u32,
}
layout!(Ioeventfd, size 32, min 28, { argsz 0, flags 4, offset 8, data 16, fd 24, reserved 28 });

/// `struct vfio_device_bind_iommufd`; its size word follows the iommufd dialect.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct BindIommufd {
    /// Bytes the client offers.
    pub argsz: u32,
    /// Whether there is a token.
    pub flags: BindFlags,
    /// The iommufd, as a descriptor of the client.
    pub iommufd: i32,
    /// Out: the device's object in that iommufd.
    pub out_devid: u32,
    /// Address of a 16-byte UUID in the client.
    pub token_uuid_ptr: u64,
}
layout!(BindIommufd, size 24, min 16, { argsz 0, flags 4, iommufd 8, out_devid 12, token_uuid_ptr 16 });

/// `struct vfio_device_attach_iommufd_pt`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct AttachIommufdPt {
    /// Bytes the client offers; 16 are needed with a PASID.
    pub argsz: u32,
    /// Whether there is a PASID.
    pub flags: AttachFlags,
    /// In: an IOAS or page table. Out: the page table used.
    pub pt_id: u32,
    /// The PASID.
    pub pasid: u32,
}
layout!(AttachIommufdPt, size 16, min 12, { argsz 0, flags 4, pt_id 8, pasid 12 });

/// `struct vfio_device_detach_iommufd_pt`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct DetachIommufdPt {
    /// Bytes the client offers; 12 are needed with a PASID.
    pub argsz: u32,
    /// Whether there is a PASID.
    pub flags: DetachFlags,
    /// The PASID.
    pub pasid: u32,
}
layout!(DetachIommufdPt, size 12, min 8, { argsz 0, flags 4, pasid 8 });

#[cfg(test)]
mod tests {
    use super::*;

    fn irq_set(argsz: u32, flags: u32, index: u32, start: u32, count: u32) -> IrqSet {
        IrqSet {
            argsz,
            flags: IrqSetFlags::from_bits_retain(flags),
            index,
            start,
            count,
        }
    }

    #[test]
    fn irq_set_sizes_by_table() {
        const INVAL: Result<usize, Errno> = Err(Errno::INVAL);
        // argsz, flags, index, start, count, vectors of the index, answer; the device has 5 indexes.
        for (argsz, flags, index, start, count, num_irqs, want) in [
            (20, 0x21, 0, 0, 1, 1, Ok(0)),
            (20, 0x21, 0, 0, 0, 1, Ok(0)),
            (21, 0x22, 0, 0, 1, 1, Ok(1)),
            (24, 0x24, 0, 0, 1, 1, Ok(4)),
            (4096, 0x24, 1, 3, 5, 8, Ok(20)),
            (40, 0x24, 1, 3, 5, 8, Ok(20)),
            // No action and several actions are for the driver.
            (20, 0x01, 0, 0, 1, 1, Ok(0)),
            (20, 0x39, 0, 0, 1, 1, Ok(0)),
            // One byte short, in the header and in the data.
            (19, 0x21, 0, 0, 1, 1, INVAL),
            (0, 0x21, 0, 0, 1, 1, INVAL),
            (20, 0x22, 0, 0, 1, 1, INVAL),
            (23, 0x24, 0, 0, 1, 1, INVAL),
            (39, 0x24, 1, 3, 5, 8, INVAL),
            // Index, range, flags.
            (20, 0x21, 5, 0, 1, 1, INVAL),
            (20, 0x21, u32::MAX, 0, 1, 1, INVAL),
            (20, 0x21, 0, 1, 0, 1, INVAL),
            (20, 0x21, 0, 0, 0, 0, INVAL),
            (20, 0x21, 0, 0, 2, 1, INVAL),
            (20, 0x21, 0, 1, u32::MAX, 8, INVAL),
            (20, 0x21, 0, 1, u32::MAX - 1, u32::MAX, INVAL),
            (u32::MAX, 0x24, 0, 0, u32::MAX - 1, u32::MAX, INVAL),
            (20, 0x61, 0, 0, 1, 1, INVAL),
            (20, 0x20, 0, 0, 1, 1, INVAL),
            (64, 0x23, 0, 0, 1, 1, INVAL),
            (64, 0x26, 0, 0, 1, 1, INVAL),
        ] {
            let set = irq_set(argsz, flags, index, start, count);
            assert_eq!(
                set.data_size(num_irqs, 5),
                want,
                "{set:?} with {num_irqs} vectors"
            );
        }
    }

    #[test]
    fn unknown_bits_survive_and_show() {
        let info = RegionInfo::read_from_bytes(&[0xff; 32]).expect("32 bytes");
        assert_eq!(info.flags.bits(), u32::MAX);
        assert!(info.flags.has_unknown_bits());
        assert!(!RegionFlags::all().has_unknown_bits());
        assert_eq!(
            format!("{:?}", RegionFlags::from_bits_retain(0x11)),
            "READ | 0x10"
        );
        assert_eq!(format!("{:?}", RegionFlags::empty()), "0");
    }

    #[test]
    fn vendor_region_type() {
        assert_eq!(region_type::pci_vendor(0x8086), 0x8000_8086);
    }
}
