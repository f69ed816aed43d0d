//! The file used as a VFIO container (`drivers/iommu/iommufd/vfio_compat.c`).

use super::Iommufd;
use super::commands::check_span;
use super::ioas::{Ioas, Part, Place};
use super::table::{Leftovers, Object};
use crate::caller::Caller;
use crate::device::{Binding, Device, DmaSpace};
use crate::dma::{Mapper, Prot, page_sizes};
use crate::{Errno, Result};
use dma_memory::{ProcessMemory, Range, Source};
use std::mem::offset_of;
use std::sync::Arc;
use vfio_uapi::caps::{ArrayCap, DmaAvailCap, Header, IovaRange, type1_cap};
use vfio_uapi::container::{
    API_VERSION, DmaMap, DmaUnmap, Info, InfoFlags, MapFlags, UnmapFlags, extension,
};
use vfio_uapi::dialect::vfio;
use vfio_uapi::ioctl::ContainerIoctl;
use zerocopy::IntoBytes;

impl Iommufd {
    /// A container's ioctl. What needs the container's IOAS is `ENODEV` while there is none.
    pub(super) fn compat_ioctl(&self, cmd: u32, arg: u64, caller: &dyn Caller) -> Result<u32> {
        match ContainerIoctl::try_from(cmd)? {
            ContainerIoctl::GetApiVersion => return Ok(API_VERSION),
            ContainerIoctl::CheckExtension => return self.compat_check_extension(arg),
            ContainerIoctl::SetIommu => self.compat_set_iommu(arg),
            ContainerIoctl::GetInfo => self.compat_get_info(arg, caller),
            ContainerIoctl::MapDma => self.compat_map_dma(arg, caller),
            ContainerIoctl::UnmapDma => self.compat_unmap_dma(arg, caller),
            _ => Err(Errno::NOTTY),
        }
        .map(|()| 0)
    }

    fn compat_ioas(&self) -> Result<Arc<Ioas>> {
        let table = self.table();
        table.ioas(table.compat.ok_or(Errno::NODEV)?).cloned()
    }

    /// Coherency is a matter of the devices in the IOAS, the rest is known without one.
    fn compat_check_extension(&self, number: u64) -> Result<u32> {
        match u32::try_from(number) {
            Ok(extension::DMA_CC) => self.compat_ioas().map(|_| 1),
            Ok(extension::TYPE1 | extension::TYPE1_V2 | extension::UNMAP_ALL) => Ok(1),
            _ => Ok(0),
        }
    }

    /// As often as one likes; only the first version changes anything, and for ever: mappings are
    /// split where an unmap cuts them.
    fn compat_set_iommu(&self, number: u64) -> Result {
        match u32::try_from(number) {
            Ok(extension::TYPE1) => self.compat_ioas()?.set_huge_pages(false),
            Ok(extension::TYPE1_V2) => self.compat_ioas().map(|_| ()),
            _ => Err(Errno::INVAL),
        }
    }

    /// `argsz` is always the whole size; capabilities that fit are written even if others do not.
    fn compat_get_info(&self, arg: u64, caller: &dyn Caller) -> Result {
        let (mut info, argsz) = vfio::read::<Info, _>(caller, arg, Info::MIN_SIZE)?;
        let ioas = self.compat_ioas()?;
        let first = size_of::<Info>() as u32;
        let room = |at: u32| argsz.saturating_sub(at) as usize;
        let place = |at: u32| arg.checked_add(at.into()).ok_or(Errno::FAULT);

        let avail = DmaAvailCap {
            header: header(type1_cap::DMA_AVAIL),
            avail: u32::MAX,
        };
        if room(first) >= size_of_val(&avail) {
            caller.copy_out(place(first)?, avail.as_bytes())?;
        }
        let second = first + (size_of_val(&avail) as u32).next_multiple_of(8);
        if argsz >= second {
            let next = place(first + offset_of!(Header, next) as u32)?;
            caller.copy_out(next, &second.to_ne_bytes())?;
        }

        let to_abi = |range: &Range| IovaRange {
            start: range.start(),
            end: range.last(),
        };
        let ranges: Vec<IovaRange> = ioas.ranges().0.iter().map(to_abi).collect();
        let fitting = room(second + size_of::<ArrayCap>() as u32) / size_of::<IovaRange>();
        let fitting = ranges.get(..fitting).unwrap_or(&ranges);
        if !fitting.is_empty() {
            let at = place(second + size_of::<ArrayCap>() as u32)?;
            caller.copy_out(at, fitting.as_bytes())?;
        }
        if fitting.len() == ranges.len() && room(second) >= size_of::<ArrayCap>() {
            let cap = ArrayCap {
                header: header(type1_cap::IOVA_RANGE),
                count: u32::try_from(ranges.len()).map_err(|_| Errno::OVERFLOW)?,
                reserved: 0,
            };
            caller.copy_out(place(second)?, cap.as_bytes())?;
        }
        let size = size_of::<ArrayCap>() + size_of_val(ranges.as_slice());
        let total = second + u32::try_from(size).map_err(|_| Errno::OVERFLOW)?;

        info.argsz = total;
        info.flags = InfoFlags::PGSIZES | InfoFlags::CAPS;
        info.iova_pgsizes = page_sizes(ioas.has_domain());
        info.cap_offset = if argsz >= total { first } else { 0 };
        vfio::write_back(caller, arg, &info, argsz)
    }

    /// Without `READ` and `WRITE` a place is taken that no device can reach.
    fn compat_map_dma(&self, arg: u64, caller: &dyn Caller) -> Result {
        let mapper = Mapper::new(caller);
        let (map, _) = vfio::read::<DmaMap, _>(&mapper, arg, DmaMap::MIN_SIZE)?;
        if !(map.flags - (MapFlags::READ | MapFlags::WRITE)).is_empty() {
            return Err(Errno::INVAL);
        }
        let ioas = self.compat_ioas()?;
        check_span(map.vaddr, map.size)?;
        let prot = Prot {
            read: map.flags.contains(MapFlags::READ),
            write: map.flags.contains(MapFlags::WRITE),
        };
        let files = Arc::clone(self.files());
        let part = Part {
            source: Source::Process(ProcessMemory::new(
                self.mapper.memory(&mapper)?,
                map.vaddr,
                files,
            )),
            len: map.size,
            writable: prot.write,
        };
        ioas.map(vec![part], Place::Fixed(map.iova), prot)
            .map(|_| ())
    }

    /// What is gone is told on error, too.
    fn compat_unmap_dma(&self, arg: u64, caller: &dyn Caller) -> Result {
        const MIN: usize = DmaUnmap::MIN_SIZE;
        let (mut unmap, _) = vfio::read::<DmaUnmap, _>(caller, arg, MIN)?;
        if !(unmap.flags - UnmapFlags::ALL).is_empty() {
            return Err(Errno::INVAL);
        }
        let ioas = self.compat_ioas()?;
        let mut gone = 0;
        let done = if unmap.flags.contains(UnmapFlags::ALL) {
            if unmap.iova != 0 || unmap.size != 0 {
                return Err(Errno::INVAL);
            }
            ioas.unmap(Range::ALL, &mut gone)
        } else {
            let range = Range::with_len(unmap.iova, unmap.size);
            match range {
                Ok(range) if !ioas.huge_pages() => {
                    let before = range.start().checked_sub(1);
                    [Some(range.last()), before]
                        .into_iter()
                        .flatten()
                        .try_for_each(|last| ioas.cut(last))?;
                }
                _ => {}
            }
            range.and_then(|range| ioas.unmap(range, &mut gone))
        };
        unmap.size = gone;
        vfio::write_back(caller, arg, &unmap, MIN as u32)?;
        done
    }

    /// `VFIO_GROUP_SET_CONTAINER` with an iommufd file: makes the container's IOAS if there is
    /// none (`iommufd_vfio_compat_ioas_create`); the client may use and destroy it like its own.
    /// `ENOMEM` when there are too many objects. Dropping the value is the end of it; until then
    /// the context outlives its file.
    pub(crate) fn compat_join(self: &Arc<Self>) -> Result<Joined> {
        let mut table = self.table();
        if table.compat.is_none() {
            let index = table.take_id()?;
            let ioas = Ioas::new(index.get(), Arc::clone(self.quota()));
            let id = table.add(index, Object::Ioas(Arc::new(ioas)));
            table.compat = Some(id);
        }
        table.holders += 1;
        drop(table);
        Ok(Joined(Arc::clone(self)))
    }
}

fn header(id: u16) -> Header {
    Header {
        id,
        version: 1,
        next: 0,
    }
}

/// A group that has an iommufd for its container.
#[derive(Debug)]
pub(crate) struct Joined(Arc<Iommufd>);

impl Joined {
    /// First open of a device of the group: binds it and attaches it to the container's IOAS.
    /// `ENODEV` when there is none (any more); else what BIND and ATTACH say. Dropping the value is
    /// the last close, and may come after that of `self`.
    pub(crate) fn open(&self, device: &Device) -> Result<Box<dyn Binding>> {
        let binding = self.0.bind(device)?;
        let compat = self.0.table().compat.ok_or(Errno::NODEV)?;
        binding.attach(compat)?;
        Ok(Box::new(OfGroup(binding)))
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        let mut left = Leftovers::default();
        let mut table = self.0.table();
        table.holders = table.holders.saturating_sub(1);
        table.clear_if_done(&mut left);
        drop(table);
        left.settle();
    }
}

/// A device opened through its group: it is bound and attached for as long as it is open.
struct OfGroup(Box<dyn Binding>);

impl Binding for OfGroup {
    fn dma(&self) -> Arc<dyn DmaSpace> {
        self.0.dma()
    }

    fn devid(&self) -> u32 {
        0
    }

    /// A file of a group does not know this command.
    fn attach(&self, _pt_id: u32) -> Result<u32> {
        Err(Errno::NOTTY)
    }

    fn detach(&self) {}
}
