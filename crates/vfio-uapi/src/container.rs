//! Containers (`/dev/vfio/vfio`) with a type1 backend.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Answer to `VFIO_GET_API_VERSION`.
pub const API_VERSION: u32 = 0;

/// Numbers for `VFIO_CHECK_EXTENSION` and `VFIO_SET_IOMMU`.
pub mod extension {
    /// `VFIO_TYPE1_IOMMU`.
    pub const TYPE1: u32 = 1;
    /// `VFIO_SPAPR_TCE_IOMMU`.
    pub const SPAPR_TCE: u32 = 2;
    /// `VFIO_TYPE1v2_IOMMU`: unmap must match what was mapped.
    pub const TYPE1_V2: u32 = 3;
    /// `VFIO_DMA_CC_IOMMU`: DMA is cache coherent.
    pub const DMA_CC: u32 = 4;
    /// `VFIO_EEH`.
    pub const EEH: u32 = 5;
    /// `VFIO_SPAPR_TCE_v2_IOMMU`.
    pub const SPAPR_TCE_V2: u32 = 7;
    /// `VFIO_NOIOMMU_IOMMU`.
    pub const NOIOMMU: u32 = 8;
    /// `VFIO_UNMAP_ALL`.
    pub const UNMAP_ALL: u32 = 9;
    /// `VFIO_UPDATE_VADDR`.
    pub const UPDATE_VADDR: u32 = 10;
}

flags! {
    /// `VFIO_IOMMU_INFO_*`.
    pub struct InfoFlags: u32 {
        /// `iova_pgsizes` is filled.
        const PGSIZES = 1 << 0;
        /// There are capabilities.
        const CAPS = 1 << 1;
    }

    /// `VFIO_DMA_MAP_FLAG_*`.
    pub struct MapFlags: u32 {
        /// The device may read.
        const READ = 1 << 0;
        /// The device may write.
        const WRITE = 1 << 1;
        /// Give an invalidated mapping a new address.
        const VADDR = 1 << 2;
    }

    /// `VFIO_DMA_UNMAP_FLAG_*`.
    pub struct UnmapFlags: u32 {
        /// A [`Bitmap`] follows the structure.
        const GET_DIRTY_BITMAP = 1 << 0;
        /// Everything; `iova` and `size` must be 0.
        const ALL = 1 << 1;
        /// Only invalidate the client addresses.
        const VADDR = 1 << 2;
    }

    /// `VFIO_IOMMU_DIRTY_PAGES_FLAG_*`; exactly one.
    pub struct DirtyFlags: u32 {
        /// Start tracking.
        const START = 1 << 0;
        /// Stop tracking.
        const STOP = 1 << 1;
        /// A [`DirtyBitmapGet`] follows the structure.
        const GET_BITMAP = 1 << 2;
    }
}

/// `struct vfio_iommu_type1_info`; capabilities start at its end (see [`crate::caps`]).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct Info {
    /// In: bytes the client offers. Out: bytes needed, if those are too few for the capabilities.
    pub argsz: u32,
    /// Out.
    pub flags: InfoFlags,
    /// Out: one bit per page size, bit n for 2^n bytes.
    pub iova_pgsizes: u64,
    /// Out: offset of the first capability, 0 if none fits.
    pub cap_offset: u32,
    /// Unused.
    pub pad: u32,
}
layout!(Info, size 24, min 16, { argsz 0, flags 4, iova_pgsizes 8, cap_offset 16, pad 20 });

/// `struct vfio_iommu_type1_dma_map`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct DmaMap {
    /// Bytes the client offers.
    pub argsz: u32,
    /// Access, or a new address for an old mapping.
    pub flags: MapFlags,
    /// Address in the client.
    pub vaddr: u64,
    /// Address the device uses.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
}
layout!(DmaMap, size 32, min 32, { argsz 0, flags 4, vaddr 8, iova 16, size 24 });

/// `struct vfio_iommu_type1_dma_unmap`, without the [`Bitmap`] that may follow.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct DmaUnmap {
    /// Bytes the client offers.
    pub argsz: u32,
    /// What to unmap and how.
    pub flags: UnmapFlags,
    /// First address.
    pub iova: u64,
    /// In: bytes. Out: bytes unmapped.
    pub size: u64,
}
layout!(DmaUnmap, size 24, min 24, { argsz 0, flags 4, iova 8, size 16 });

/// `struct vfio_bitmap`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct Bitmap {
    /// Bytes one bit stands for.
    pub pgsize: u64,
    /// Bytes of bitmap.
    pub size: u64,
    /// Address of the bitmap in the client.
    pub data: u64,
}
layout!(Bitmap, size 24, { pgsize 0, size 8, data 16 });

/// `struct vfio_iommu_type1_dirty_bitmap`, without the [`DirtyBitmapGet`] that may follow.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct DirtyBitmap {
    /// Bytes the client offers.
    pub argsz: u32,
    /// What to do.
    pub flags: DirtyFlags,
}
layout!(DirtyBitmap, size 8, min 8, { argsz 0, flags 4 });

/// `struct vfio_iommu_type1_dirty_bitmap_get`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct DirtyBitmapGet {
    /// First address.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
    /// Where the bits go.
    pub bitmap: Bitmap,
}
layout!(DirtyBitmapGet, size 40, { iova 0, size 8, bitmap 16 });
