//! Capability chains behind info structures (`vfio_info_cap_add`, `vfio_info_add_capability`).
//!
//! A chain starts right after its structure. Every entry is a header and data, padded with zeros to 8 bytes; `next` in the header counts
//! from the start of the whole structure, and is 0 in the last entry. If the client's argument is too small for the chain, it gets
//! the structure alone, with the size it should have offered: see [`Caps::place`].

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Capability ids of regions, `VFIO_REGION_INFO_CAP_*`.
pub mod region_cap {
    /// Only some areas can be mapped.
    pub const SPARSE_MMAP: u16 = 1;
    /// What a device-specific region is.
    pub const TYPE: u16 = 2;
    /// The BAR with the MSI-X table can be mapped whole.
    pub const MSIX_MAPPABLE: u16 = 3;
}

/// Capability ids of devices, `VFIO_DEVICE_INFO_CAP_*`.
pub mod device_cap {
    /// Atomic operations the device can complete.
    pub const PCI_ATOMIC_COMP: u16 = 5;
}

/// Capability ids of a type1 container, `VFIO_IOMMU_TYPE1_INFO_*`.
pub mod type1_cap {
    /// Usable addresses.
    pub const IOVA_RANGE: u16 = 1;
    /// Dirty page tracking.
    pub const MIGRATION: u16 = 2;
    /// Mappings left.
    pub const DMA_AVAIL: u16 = 3;
}

/// `struct vfio_info_cap_header`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct Header {
    /// Which capability.
    pub id: u16,
    /// Of its layout.
    pub version: u16,
    /// Offset of the next one from the start of the structure, 0 in the last.
    pub next: u32,
}
layout!(Header, size 8, { id 0, version 2, next 4 });

/// `struct vfio_region_sparse_mmap_area`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct SparseMmapArea {
    /// Offset in the region.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}
layout!(SparseMmapArea, size 16, { offset 0, size 8 });

/// `struct vfio_iova_range`: a closed interval.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct IovaRange {
    /// First address.
    pub start: u64,
    /// Last address, inclusive.
    pub end: u64,
}
layout!(IovaRange, size 16, { start 0, end 8 });

/// Head of `struct vfio_region_info_cap_sparse_mmap`; also of `struct vfio_iommu_type1_info_cap_iova_range`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct ArrayCap {
    /// The header.
    pub header: Header,
    /// Entries that follow.
    pub count: u32,
    /// 0.
    pub reserved: u32,
}
layout!(ArrayCap, size 16, { header 0, count 8, reserved 12 });

/// `struct vfio_region_info_cap_type`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct RegionTypeCap {
    /// The header.
    pub header: Header,
    /// See [`crate::device::region_type`].
    pub type_: u32,
    /// Depends on the type.
    pub subtype: u32,
}
layout!(RegionTypeCap, size 16, { header 0, type_ 8, subtype 12 });

/// `struct vfio_device_info_cap_pci_atomic_comp`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct PciAtomicCompCap {
    /// The header.
    pub header: Header,
    /// `VFIO_PCI_ATOMIC_COMP*`: 1, 2, 4 for 32, 64, 128 bits.
    pub flags: u32,
    /// 0.
    pub reserved: u32,
}
layout!(PciAtomicCompCap, size 16, { header 0, flags 8, reserved 12 });

/// `struct vfio_iommu_type1_info_cap_migration`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct MigrationCap {
    /// The header.
    pub header: Header,
    /// 0.
    pub flags: u32,
    /// 0.
    pub reserved: u32,
    /// Page sizes of the dirty bitmap.
    pub pgsize_bitmap: u64,
    /// Largest bitmap, bytes.
    pub max_dirty_bitmap_size: u64,
}
layout!(MigrationCap, size 32, { header 0, flags 8, reserved 12, pgsize_bitmap 16, max_dirty_bitmap_size 24 });

/// `struct vfio_iommu_type1_info_dma_avail`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct DmaAvailCap {
    /// The header.
    pub header: Header,
    /// Mappings left.
    pub avail: u32,
}
layout!(DmaAvailCap, size 12, { header 0, avail 8 });

/// Collects capabilities; [`CapsBuilder::finish`] links them.
#[derive(Clone, Debug, Default)]
pub struct CapsBuilder {
    bytes: Vec<u8>,
    starts: Vec<usize>,
}

impl CapsBuilder {
    /// No capabilities yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a capability of any kind; `data` is what follows the header.
    #[must_use]
    pub fn push(mut self, id: u16, version: u16, data: &[u8]) -> Self {
        self.starts.push(self.bytes.len());
        self.bytes.extend_from_slice(
            Header {
                id,
                version,
                next: 0,
            }
            .as_bytes(),
        );
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        self
    }

    fn push_array(self, id: u16, count: usize, entries: &[u8]) -> Self {
        let count = u32::try_from(count).expect("a capability with 2^32 entries was asked for");
        let mut data = Vec::with_capacity(8 + entries.len());
        data.extend_from_slice([count, 0].as_bytes());
        data.extend_from_slice(entries);
        self.push(id, 1, &data)
    }

    /// Areas of a region that can be mapped; the rest traps.
    #[must_use]
    pub fn sparse_mmap(self, areas: &[SparseMmapArea]) -> Self {
        self.push_array(region_cap::SPARSE_MMAP, areas.len(), areas.as_bytes())
    }

    /// What a device-specific region is; see [`crate::device::region_type`].
    #[must_use]
    pub fn region_type(self, type_: u32, subtype: u32) -> Self {
        self.push(region_cap::TYPE, 1, [type_, subtype].as_bytes())
    }

    /// The BAR with the MSI-X table can be mapped whole.
    #[must_use]
    pub fn msix_mappable(self) -> Self {
        self.push(region_cap::MSIX_MAPPABLE, 1, &[])
    }

    /// Atomic operations a PCI device can complete.
    #[must_use]
    pub fn pci_atomic_comp(self, flags: u32) -> Self {
        self.push(device_cap::PCI_ATOMIC_COMP, 1, [flags, 0].as_bytes())
    }

    /// Addresses a type1 container can map.
    #[must_use]
    pub fn iova_range(self, ranges: &[IovaRange]) -> Self {
        self.push_array(type1_cap::IOVA_RANGE, ranges.len(), ranges.as_bytes())
    }

    /// Dirty page tracking of a type1 container.
    #[must_use]
    pub fn migration(self, pgsize_bitmap: u64, max_dirty_bitmap_size: u64) -> Self {
        self.push(
            type1_cap::MIGRATION,
            1,
            [0, pgsize_bitmap, max_dirty_bitmap_size].as_bytes(),
        )
    }

    /// Mappings a type1 container has left.
    #[must_use]
    pub fn dma_avail(self, avail: u32) -> Self {
        self.push(type1_cap::DMA_AVAIL, 1, avail.as_bytes())
    }

    /// Links the capabilities for a structure of `base` bytes (24 or 32, a multiple of 8).
    #[must_use]
    pub fn finish(self, base: u32) -> Caps {
        let mut bytes = self.bytes;
        for pair in self.starts.windows(2) {
            let [start, next] = pair else { continue };
            let next = u32::try_from(*next)
                .ok()
                .and_then(|next| base.checked_add(next))
                .expect("a capability chain of 4 GiB");
            if let Some(field) = bytes.get_mut(start + 4..start + 8) {
                field.copy_from_slice(&next.to_ne_bytes());
            }
        }
        Caps { base, bytes }
    }
}

/// A finished chain, ready to be copied behind its structure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caps {
    base: u32,
    bytes: Vec<u8>,
}

/// Where a chain goes in an answer; see [`Caps::place`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement<'a> {
    /// Whether the flag that says "there are capabilities" is set.
    pub has_caps: bool,
    /// `argsz` of the answer.
    pub argsz: u32,
    /// `cap_offset` of the answer.
    pub cap_offset: u32,
    /// What to copy to `cap_offset`; empty if nothing fits.
    pub bytes: &'a [u8],
}

impl Caps {
    /// Whether there is no capability.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The chain itself, a multiple of 8 bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What a client that offered `argsz` bytes gets: the chain if all of it fits, else the size needed and no chain. Neither is an error.
    ///
    /// `argsz` is only rewritten when it was too small. An empty chain changes nothing, whatever the size.
    #[must_use]
    pub fn place(&self, argsz: u32) -> Placement<'_> {
        if self.is_empty() {
            return Placement {
                has_caps: false,
                argsz,
                cap_offset: 0,
                bytes: &[],
            };
        }
        let needed = u32::try_from(self.bytes.len())
            .ok()
            .and_then(|len| self.base.checked_add(len))
            .unwrap_or(u32::MAX);
        if argsz < needed {
            Placement {
                has_caps: true,
                argsz: needed,
                cap_offset: 0,
                bytes: &[],
            }
        } else {
            Placement {
                has_caps: true,
                argsz,
                cap_offset: self.base,
                bytes: &self.bytes,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks a chain the way a client does.
    fn walk(structure: &[u8], first: usize) -> Vec<(u16, usize)> {
        let mut found = Vec::new();
        let mut at = first;
        while at != 0 {
            let (header, _) = Header::read_from_prefix(&structure[at..]).expect("header inside");
            assert_eq!(header.version, 1);
            assert_eq!(at % 8, 0);
            found.push((header.id, at));
            at = header.next as usize;
        }
        found
    }

    fn whole(base: usize, caps: &Caps) -> Vec<u8> {
        let mut structure = vec![0xaa; base];
        structure.extend_from_slice(caps.as_bytes());
        structure
    }

    #[test]
    fn type1_chain_of_an_emulated_container() {
        // Offsets and total as `VFIO_IOMMU_GET_INFO` of 7.3 answers with only software devices.
        let caps = CapsBuilder::new()
            .migration(0x1000, 256 << 20)
            .dma_avail(65535)
            .finish(24);
        let structure = whole(24, &caps);
        assert_eq!(structure.len(), 72);
        assert_eq!(walk(&structure, 24), [(2, 24), (3, 56)]);
        let migration = MigrationCap::read_from_bytes(&structure[24..56]).expect("32 bytes");
        assert_eq!(
            (
                migration.flags,
                migration.pgsize_bitmap,
                migration.max_dirty_bitmap_size
            ),
            (0, 0x1000, 0x1000_0000)
        );
        let avail = DmaAvailCap::read_from_bytes(&structure[56..68]).expect("12 bytes");
        assert_eq!(avail.avail, 65535);
        assert_eq!(structure[68..], [0; 4], "the padding is zero");
    }

    #[test]
    fn type1_chain_with_ranges() {
        let ranges = [
            IovaRange {
                start: 0,
                end: 0xfedf_ffff,
            },
            IovaRange {
                start: 0xfef0_0000,
                end: (1 << 48) - 1,
            },
        ];
        let caps = CapsBuilder::new()
            .migration(0x1000, 256 << 20)
            .dma_avail(65535)
            .iova_range(&ranges)
            .finish(24);
        let structure = whole(24, &caps);
        assert_eq!(structure.len(), 120);
        assert_eq!(walk(&structure, 24), [(2, 24), (3, 56), (1, 72)]);
        let array = ArrayCap::read_from_bytes(&structure[72..88]).expect("16 bytes");
        assert_eq!((array.count, array.reserved), (2, 0));
        assert_eq!(
            IovaRange::read_from_bytes(&structure[104..120]),
            Ok(ranges[1])
        );
    }

    #[test]
    fn region_chain() {
        let areas = [SparseMmapArea {
            offset: 0x1000,
            size: 0x2000,
        }];
        let caps = CapsBuilder::new()
            .sparse_mmap(&areas)
            .msix_mappable()
            .region_type(1, 1)
            .finish(32);
        let structure = whole(32, &caps);
        assert_eq!(walk(&structure, 32), [(1, 32), (3, 64), (2, 72)]);
        let kind = RegionTypeCap::read_from_bytes(&structure[72..88]).expect("16 bytes");
        assert_eq!((kind.header.next, kind.type_, kind.subtype), (0, 1, 1));
        let atomic = CapsBuilder::new().pci_atomic_comp(3).finish(24);
        let atomic = PciAtomicCompCap::read_from_bytes(atomic.as_bytes()).expect("16 bytes");
        assert_eq!((atomic.header.id, atomic.flags), (5, 3));
    }

    #[test]
    fn too_small_an_argument_gets_the_size() {
        let caps = CapsBuilder::new().region_type(1, 1).finish(32);
        let small = Placement {
            has_caps: true,
            argsz: 48,
            cap_offset: 0,
            bytes: &[],
        };
        for argsz in [0, 32, 40, 47] {
            assert_eq!(caps.place(argsz), small, "{argsz}");
        }
        for argsz in [48, 49, 4096, u32::MAX] {
            assert_eq!(
                caps.place(argsz),
                Placement {
                    has_caps: true,
                    argsz,
                    cap_offset: 32,
                    bytes: caps.as_bytes()
                }
            );
        }
        let none = CapsBuilder::new().finish(32);
        for argsz in [0, 32, u32::MAX] {
            assert_eq!(
                none.place(argsz),
                Placement {
                    has_caps: false,
                    argsz,
                    cap_offset: 0,
                    bytes: &[]
                }
            );
        }
    }
}
