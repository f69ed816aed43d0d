//! Where regions lie in a device file.
//!
//! A client's mmap never reaches a FUSE server: it goes to the backing file directly. So only
//! mappable regions lie inside the backing file, packed without holes from offset 0 in index
//! order; every other region has the kernel's `index << 40` (`VFIO_PCI_OFFSET_SHIFT`), which is
//! past its end, where a mapping faults with SIGBUS. Offsets are opaque to clients: they take
//! them from `VFIO_DEVICE_GET_REGION_INFO`.

use super::ops::{RegionInfo, RegionPos};
use vfio_uapi::device::RegionFlags;

/// `VFIO_PCI_OFFSET_SHIFT`.
const OFFSET_SHIFT: u32 = 40;

/// Pages that mappings are made of.
const PAGE: u64 = 4096;

/// One region's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Area {
    pub(crate) offset: u64,
    pub(crate) size: u64,
    pub(crate) mapped: bool,
}

/// The places of all regions of a device.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) areas: Vec<Area>,
    /// Bytes of the backing file; 0 when nothing can be mapped.
    pub(crate) backing: u64,
}

impl Layout {
    /// Lays out the regions, in index order.
    pub(crate) fn new<'a>(regions: impl Iterator<Item = &'a RegionInfo>) -> Layout {
        let mut backing = 0;
        let mut areas = Vec::new();
        for (index, region) in regions.enumerate() {
            let mapped = region.flags.contains(RegionFlags::MMAP) && region.size > 0;
            let offset = if mapped {
                let at = backing;
                backing += region.size.next_multiple_of(PAGE);
                at
            } else {
                (index as u64) << OFFSET_SHIFT
            };
            areas.push(Area {
                offset,
                size: region.size,
                mapped,
            });
        }
        // Region 0 has offset 0 whether it can be mapped or not; if it cannot, the packed ones
        // must not start there.
        if backing > 0 && areas.first().is_some_and(|area| !area.mapped) {
            areas[0].offset = (areas.len() as u64) << OFFSET_SHIFT;
        }
        Layout { areas, backing }
    }

    /// The region at a file offset: a mapped one by its range, any other by the high bits.
    /// `None` past the last region.
    pub(crate) fn find(&self, offset: u64) -> Option<RegionPos> {
        if offset < self.backing {
            let index = self.areas.iter().position(|area| {
                area.mapped
                    && (area.offset..area.offset + area.size.next_multiple_of(PAGE))
                        .contains(&offset)
            })?;
            return Some(self.pos(index, offset - self.areas[index].offset));
        }
        let index = offset >> OFFSET_SHIFT;
        if index == self.areas.len() as u64 && self.areas.first().is_some_and(|a| a.offset != 0) {
            return Some(self.pos(0, offset - (index << OFFSET_SHIFT)));
        }
        let index = usize::try_from(index).ok()?;
        let area = self.areas.get(index)?;
        (!area.mapped && area.offset <= offset).then(|| self.pos(index, offset - area.offset))
    }

    fn pos(&self, index: usize, offset: u64) -> RegionPos {
        RegionPos {
            index: index as u32,
            offset,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(size: u64, flags: RegionFlags) -> RegionInfo {
        RegionInfo {
            size,
            flags,
            caps: Vec::new(),
        }
    }

    #[test]
    fn mappable_regions_are_packed_and_the_others_past_the_end() {
        let rw = RegionFlags::READ | RegionFlags::WRITE;
        let regions = [
            region(8, rw),
            region(8192, rw | RegionFlags::MMAP),
            region(0, RegionFlags::empty()),
            region(4096, rw | RegionFlags::MMAP),
            region(256, rw),
        ];
        let layout = Layout::new(regions.iter());
        assert_eq!(layout.backing, 12288);
        assert_eq!((layout.areas[1].offset, layout.areas[3].offset), (0, 8192));
        for (index, area) in layout.areas.iter().enumerate() {
            if !area.mapped {
                assert!(
                    area.offset >= layout.backing,
                    "region {index} overlaps the backing"
                );
            }
            let found = layout.find(area.offset + 3).unwrap();
            assert_eq!(
                found,
                RegionPos {
                    index: index as u32,
                    offset: 3
                }
            );
        }
        assert_eq!(layout.find(6 << OFFSET_SHIFT), None);
        assert_eq!(layout.find(u64::MAX), None);
    }

    #[test]
    fn nothing_mappable_is_the_kernels_layout() {
        let rw = RegionFlags::READ | RegionFlags::WRITE;
        let regions = [region(8, rw), region(8, rw)];
        let layout = Layout::new(regions.iter());
        assert_eq!(layout.backing, 0);
        assert_eq!(
            layout.find(5),
            Some(RegionPos {
                index: 0,
                offset: 5
            })
        );
        assert_eq!(
            layout.find((1 << 40) + 9),
            Some(RegionPos {
                index: 1,
                offset: 9
            })
        );
        assert_eq!(layout.find(2 << 40), None);
    }
}
