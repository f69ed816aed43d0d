//! iommufd (`/dev/iommu`).
//!
//! The size word is read by [`crate::dialect::iommufd`]. Which commands exist is in [`crate::ioctl::IommufdIoctl`].

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

flags! {
    /// `IOMMU_IOAS_MAP_*`, for map, map file and copy.
    pub struct MapFlags: u32 {
        /// The client chose the IOVA.
        const FIXED_IOVA = 1 << 0;
        /// The device may write.
        const WRITEABLE = 1 << 1;
        /// The device may read.
        const READABLE = 1 << 2;
    }

    /// `IOMMU_HWPT_*` of the allocation.
    pub struct HwptAllocFlags: u32 {
        /// May be the parent of nested page tables.
        const NEST_PARENT = 1 << 0;
        /// Must support dirty tracking.
        const DIRTY_TRACKING = 1 << 1;
        /// `fault_id` is valid.
        const FAULT_ID_VALID = 1 << 2;
        /// May be attached to PASIDs.
        const PASID = 1 << 3;
    }

    /// `IOMMU_HW_INFO_FLAG_*`.
    pub struct HwInfoFlags: u32 {
        /// `data_type` names the type the client asks for.
        const INPUT_TYPE = 1 << 0;
    }

    /// `IOMMU_HW_CAP_*`.
    pub struct HwCapabilities: u64 {
        /// Dirty tracking.
        const DIRTY_TRACKING = 1 << 0;
        /// PASID with execute permission.
        const PCI_PASID_EXEC = 1 << 1;
        /// PASID with privileged mode.
        const PCI_PASID_PRIV = 1 << 2;
        /// No address translation services.
        const PCI_ATS_NOT_SUPPORTED = 1 << 3;
    }

    /// `IOMMU_HWPT_DIRTY_TRACKING_*`.
    pub struct DirtyTrackingFlags: u32 {
        /// On; without it off.
        const ENABLE = 1 << 0;
    }

    /// `IOMMU_HWPT_GET_DIRTY_BITMAP_*`.
    pub struct DirtyBitmapFlags: u32 {
        /// Leave the dirty bits set.
        const NO_CLEAR = 1 << 0;
    }
}

/// `option_id` of [`IommuOption`].
pub mod option_id {
    /// `IOMMU_OPTION_RLIMIT_MODE`: account pages to the process instead of the user.
    pub const RLIMIT_MODE: u32 = 0;
    /// `IOMMU_OPTION_HUGE_PAGES`: allow large entries, per IOAS.
    pub const HUGE_PAGES: u32 = 1;
}

/// `op` of [`IommuOption`].
pub mod option_op {
    /// `IOMMU_OPTION_OP_SET`.
    pub const SET: u16 = 0;
    /// `IOMMU_OPTION_OP_GET`.
    pub const GET: u16 = 1;
}

/// `op` of [`VfioIoas`].
pub mod vfio_ioas_op {
    /// `IOMMU_VFIO_IOAS_GET`.
    pub const GET: u16 = 0;
    /// `IOMMU_VFIO_IOAS_SET`.
    pub const SET: u16 = 1;
    /// `IOMMU_VFIO_IOAS_CLEAR`.
    pub const CLEAR: u16 = 2;
}

/// `data_type` of [`HwptAlloc`].
pub mod hwpt_data {
    /// `IOMMU_HWPT_DATA_NONE`: no driver data.
    pub const NONE: u32 = 0;
    /// `IOMMU_HWPT_DATA_VTD_S1`.
    pub const VTD_S1: u32 = 1;
    /// `IOMMU_HWPT_DATA_ARM_SMMUV3`.
    pub const ARM_SMMUV3: u32 = 2;
}

/// `data_type` of [`HwInfo`].
pub mod hw_info_type {
    /// `IOMMU_HW_INFO_TYPE_NONE` as an answer, `IOMMU_HW_INFO_TYPE_DEFAULT` as a question.
    pub const NONE: u32 = 0;
    /// `IOMMU_HW_INFO_TYPE_INTEL_VTD`.
    pub const INTEL_VTD: u32 = 1;
    /// `IOMMU_HW_INFO_TYPE_ARM_SMMUV3`.
    pub const ARM_SMMUV3: u32 = 2;
}

/// `struct iommu_iova_range`: a closed interval.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct IovaRange {
    /// First address.
    pub start: u64,
    /// Last address, inclusive.
    pub last: u64,
}
layout!(IovaRange, size 16, { start 0, last 8 });

/// `struct iommu_destroy`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct Destroy {
    /// Bytes the client offers.
    pub size: u32,
    /// Any object.
    pub id: u32,
}
layout!(Destroy, size 8, min 8, { size 0, id 4 });

/// `struct iommu_ioas_alloc`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct IoasAlloc {
    /// Bytes the client offers.
    pub size: u32,
    /// Must be 0.
    pub flags: u32,
    /// Out: the new object.
    pub out_ioas_id: u32,
}
layout!(IoasAlloc, size 12, min 12, { size 0, flags 4, out_ioas_id 8 });

/// `struct iommu_ioas_allow_iovas`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct IoasAllowIovas {
    /// Bytes the client offers.
    pub size: u32,
    /// The address space.
    pub ioas_id: u32,
    /// Entries in the array.
    pub num_iovas: u32,
    /// Must be 0.
    pub reserved: u32,
    /// Address of an array of [`IovaRange`] in the client.
    pub allowed_iovas: u64,
}
layout!(IoasAllowIovas, size 24, min 24, { size 0, ioas_id 4, num_iovas 8, reserved 12, allowed_iovas 16 });

/// `struct iommu_ioas_copy`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct IoasCopy {
    /// Bytes the client offers.
    pub size: u32,
    /// Access and placement of the copy.
    pub flags: MapFlags,
    /// Where to.
    pub dst_ioas_id: u32,
    /// Where from.
    pub src_ioas_id: u32,
    /// Bytes.
    pub length: u64,
    /// In if fixed, and out.
    pub dst_iova: u64,
    /// First address of the source.
    pub src_iova: u64,
}
layout!(IoasCopy, size 40, min 40, { size 0, flags 4, dst_ioas_id 8, src_ioas_id 12, length 16, dst_iova 24, src_iova 32 });

/// `struct iommu_ioas_iova_ranges`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct IoasIovaRanges {
    /// Bytes the client offers.
    pub size: u32,
    /// The address space.
    pub ioas_id: u32,
    /// In: entries the array has room for. Out: entries there are.
    pub num_iovas: u32,
    /// Must be 0.
    pub reserved: u32,
    /// Address of an array of [`IovaRange`] in the client.
    pub allowed_iovas: u64,
    /// Out: what IOVAs must be a multiple of.
    pub out_iova_alignment: u64,
}
layout!(IoasIovaRanges, size 32, min 32, {
    size 0, ioas_id 4, num_iovas 8, reserved 12, allowed_iovas 16, out_iova_alignment 24,
});

/// `struct iommu_ioas_map`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct IoasMap {
    /// Bytes the client offers.
    pub size: u32,
    /// Access and placement.
    pub flags: MapFlags,
    /// The address space.
    pub ioas_id: u32,
    /// Must be 0.
    pub reserved: u32,
    /// Address in the client.
    pub user_va: u64,
    /// Bytes.
    pub length: u64,
    /// In if fixed, and out.
    pub iova: u64,
}
layout!(IoasMap, size 40, min 40, { size 0, flags 4, ioas_id 8, reserved 12, user_va 16, length 24, iova 32 });

/// `struct iommu_ioas_map_file`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct IoasMapFile {
    /// Bytes the client offers.
    pub size: u32,
    /// Access and placement.
    pub flags: MapFlags,
    /// The address space.
    pub ioas_id: u32,
    /// The file, as a descriptor of the client.
    pub fd: i32,
    /// First byte of the file.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// In if fixed, and out.
    pub iova: u64,
}
layout!(IoasMapFile, size 40, min 40, { size 0, flags 4, ioas_id 8, fd 12, start 16, length 24, iova 32 });

/// `struct iommu_ioas_unmap`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct IoasUnmap {
    /// Bytes the client offers.
    pub size: u32,
    /// The address space.
    pub ioas_id: u32,
    /// First address.
    pub iova: u64,
    /// In: bytes, `u64::MAX` with `iova` 0 for everything. Out: bytes unmapped.
    pub length: u64,
}
layout!(IoasUnmap, size 24, min 24, { size 0, ioas_id 4, iova 8, length 16 });

/// `struct iommu_option`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct IommuOption {
    /// Bytes the client offers.
    pub size: u32,
    /// One of [`option_id`].
    pub option_id: u32,
    /// One of [`option_op`].
    pub op: u16,
    /// Must be 0.
    pub reserved: u16,
    /// The object, or 0 for options of the whole context.
    pub object_id: u32,
    /// In for set, out for get.
    pub val64: u64,
}
layout!(IommuOption, size 24, min 24, { size 0, option_id 4, op 8, reserved 10, object_id 12, val64 16 });

/// `struct iommu_vfio_ioas`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct VfioIoas {
    /// Bytes the client offers.
    pub size: u32,
    /// In for set, out for get.
    pub ioas_id: u32,
    /// One of [`vfio_ioas_op`].
    pub op: u16,
    /// Must be 0.
    pub reserved: u16,
}
layout!(VfioIoas, size 12, min 12, { size 0, ioas_id 4, op 8, reserved 10 });

/// `struct iommu_hwpt_alloc`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct HwptAlloc {
    /// Bytes the client offers.
    pub size: u32,
    /// What the page table must be able to do.
    pub flags: HwptAllocFlags,
    /// The device whose IOMMU decides the format.
    pub dev_id: u32,
    /// The IOAS, parent page table or virtual IOMMU.
    pub pt_id: u32,
    /// Out: the new object.
    pub out_hwpt_id: u32,
    /// Must be 0.
    pub reserved: u32,
    /// One of [`hwpt_data`].
    pub data_type: u32,
    /// Bytes at `data_uptr`.
    pub data_len: u32,
    /// Address of driver data in the client.
    pub data_uptr: u64,
    /// A fault queue, if the flag says so.
    pub fault_id: u32,
    /// Must be 0.
    pub reserved2: u32,
}
layout!(HwptAlloc, size 48, min 24, {
    size 0, flags 4, dev_id 8, pt_id 12, out_hwpt_id 16, reserved 20, data_type 24, data_len 28, data_uptr 32, fault_id 40, reserved2 44,
});

/// `struct iommu_hw_info`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct HwInfo {
    /// Bytes the client offers.
    pub size: u32,
    /// Whether `data_type` is a question.
    pub flags: HwInfoFlags,
    /// The device.
    pub dev_id: u32,
    /// In: bytes at `data_uptr`. Out: bytes the kernel has, even if more.
    pub data_len: u32,
    /// Address in the client.
    pub data_uptr: u64,
    /// `in_data_type` and `out_data_type` share this word; one of [`hw_info_type`].
    pub data_type: u32,
    /// Out: log2 of the number of PASIDs, 0 for none.
    pub out_max_pasid_log2: u8,
    /// Must be 0.
    pub reserved: [u8; 3],
    /// Out.
    pub out_capabilities: HwCapabilities,
}
layout!(HwInfo, size 40, min 32, {
    size 0, flags 4, dev_id 8, data_len 12, data_uptr 16, data_type 24, out_max_pasid_log2 28, reserved 29, out_capabilities 32,
});

/// `struct iommu_hwpt_set_dirty_tracking`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct HwptSetDirtyTracking {
    /// Bytes the client offers.
    pub size: u32,
    /// On or off.
    pub flags: DirtyTrackingFlags,
    /// The page table.
    pub hwpt_id: u32,
    /// Must be 0.
    pub reserved: u32,
}
layout!(HwptSetDirtyTracking, size 16, min 16, { size 0, flags 4, hwpt_id 8, reserved 12 });

/// `struct iommu_hwpt_get_dirty_bitmap`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct HwptGetDirtyBitmap {
    /// Bytes the client offers.
    pub size: u32,
    /// The page table.
    pub hwpt_id: u32,
    /// Whether reading clears.
    pub flags: DirtyBitmapFlags,
    /// Must be 0.
    pub reserved: u32,
    /// First address; bit 0 of the bitmap.
    pub iova: u64,
    /// Bytes of IOVA.
    pub length: u64,
    /// Bytes one bit stands for.
    pub page_size: u64,
    /// Address of the bitmap in the client.
    pub data: u64,
}
layout!(HwptGetDirtyBitmap, size 48, min 48, {
    size 0, hwpt_id 4, flags 8, reserved 12, iova 16, length 24, page_size 32, data 40,
});

/// `struct iommu_hwpt_invalidate`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct HwptInvalidate {
    /// Bytes the client offers.
    pub size: u32,
    /// The page table or virtual IOMMU.
    pub hwpt_id: u32,
    /// Address of the entries in the client.
    pub data_uptr: u64,
    /// Type of the entries.
    pub data_type: u32,
    /// Bytes of one entry.
    pub entry_len: u32,
    /// In: entries. Out: entries handled, also on error.
    pub entry_num: u32,
    /// Must be 0.
    pub reserved: u32,
}
layout!(HwptInvalidate, size 32, min 32, {
    size 0, hwpt_id 4, data_uptr 8, data_type 16, entry_len 20, entry_num 24, reserved 28,
});

/// `struct iommu_fault_alloc`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct FaultAlloc {
    /// Bytes the client offers.
    pub size: u32,
    /// Must be 0.
    pub flags: u32,
    /// Out: the new object.
    pub out_fault_id: u32,
    /// Out: a descriptor to read faults from.
    pub out_fault_fd: u32,
}
layout!(FaultAlloc, size 16, min 16, { size 0, flags 4, out_fault_id 8, out_fault_fd 12 });

/// `struct iommu_ioas_change_process`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct IoasChangeProcess {
    /// Bytes the client offers.
    pub size: u32,
    /// Must be 0.
    pub reserved: u32,
}
layout!(IoasChangeProcess, size 8, min 8, { size 0, reserved 4 });
