//! The container's ioctls: what a client may ask, checked in the kernel's order
//! (`vfio_fops_unl_ioctl`, `vfio_iommu_type1_ioctl`).
//!
//! Arguments are copied with no lock held.

use super::file::Container;
use super::type1::{Type1, Version};
use super::unmap::What;
use crate::caller::Caller;
use crate::dma::{Mapper, Prot, page_size};
use crate::{Errno, Result};
use dma_memory::Range;
use std::sync::Arc;
use vfio_uapi::caps::{Caps, CapsBuilder};
use vfio_uapi::container::{
    API_VERSION, Bitmap, DirtyBitmap, DirtyBitmapGet, DirtyFlags, DmaMap, DmaUnmap, Info,
    InfoFlags, MapFlags, UnmapFlags, extension,
};
use vfio_uapi::dialect::vfio;
use vfio_uapi::ioctl::ContainerIoctl;
use zerocopy::{FromBytes, IntoBytes};

/// Most bytes of a bitmap (`DIRTY_BITMAP_SIZE_MAX`).
const BITMAP_SIZE_MAX: u64 = 256 << 20;

/// No client has memory from here on, on any machine: what `access_ok` refuses.
const USER_END: u64 = 1 << 56;

impl Container {
    /// An ioctl on the file. Returns what the client's `ioctl()` returns. What needs a backend is
    /// `EINVAL` before `VFIO_SET_IOMMU`, and a number nobody knows is `ENOTTY` after it.
    ///
    /// It may wait for the client's memory as long as the client likes; no lock is held then.
    pub fn ioctl(self: &Arc<Self>, cmd: u32, arg: u64, caller: &dyn Caller) -> Result<u32> {
        let known = ContainerIoctl::try_from(cmd);
        match known {
            Ok(ContainerIoctl::GetApiVersion) => return Ok(API_VERSION),
            Ok(ContainerIoctl::CheckExtension) => return Ok(self.check_extension(arg).into()),
            Ok(ContainerIoctl::SetIommu) => return self.set_iommu(arg).map(|()| 0),
            _ => {}
        }
        let backend = self.backend().ok_or(Errno::INVAL)?;
        match known? {
            ContainerIoctl::GetInfo => get_info(&backend, arg, caller),
            ContainerIoctl::MapDma => map_dma(&backend, arg, caller),
            ContainerIoctl::UnmapDma => unmap_dma(&backend, arg, caller),
            ContainerIoctl::DirtyPages => dirty_pages(&backend, arg, caller),
            _ => Err(Errno::NOTTY),
        }
        .map(|()| 0)
    }

    /// `vfio_iommu_type1_check_extension`: two answers depend on what is in the container.
    fn check_extension(&self, number: u64) -> bool {
        match u32::try_from(number) {
            Ok(extension::TYPE1 | extension::TYPE1_V2 | extension::UNMAP_ALL) => true,
            Ok(extension::DMA_CC) => self.backend().is_some(),
            Ok(extension::UPDATE_VADDR) => self.backend().is_some_and(|b| !b.has_emulated()),
            _ => false,
        }
    }
}

/// `vfio_iommu_type1_get_info`.
fn get_info(backend: &Type1, arg: u64, caller: &dyn Caller) -> Result {
    let (mut info, argsz) = vfio::read::<Info, _>(caller, arg, Info::MIN_SIZE)?;
    let caps = capabilities(backend);
    let placed = caps.place(argsz);
    info.argsz = placed.argsz;
    info.flags = InfoFlags::PGSIZES | InfoFlags::CAPS;
    info.iova_pgsizes = backend.page_sizes();
    info.cap_offset = placed.cap_offset;
    vfio::write_caps(caller, arg, &placed)?;
    vfio::write_back(caller, arg, &info, argsz)
}

fn capabilities(backend: &Type1) -> Caps {
    let mut chain = CapsBuilder::new()
        .migration(page_size(), BITMAP_SIZE_MAX)
        .dma_avail(backend.entries_left());
    if let Some(ranges) = backend.ranges() {
        chain = chain.iova_range(&ranges);
    }
    chain.finish(size_of::<Info>() as u32)
}

/// `vfio_iommu_type1_map_dma`, `vfio_dma_do_map`.
fn map_dma(backend: &Type1, arg: u64, caller: &dyn Caller) -> Result {
    let mapper = Mapper::new(caller);
    let (map, _) = vfio::read::<DmaMap, _>(&mapper, arg, DmaMap::MIN_SIZE)?;
    if map.flags.has_unknown_bits() {
        return Err(Errno::INVAL);
    }
    let range = Range::with_len(map.iova, map.size)?;
    Range::with_len(map.vaddr, map.size)?;
    let prot = Prot {
        read: map.flags.contains(MapFlags::READ),
        write: map.flags.contains(MapFlags::WRITE),
    };
    let set_vaddr = map.flags.contains(MapFlags::VADDR);
    if set_vaddr != (prot == Prot::default()) {
        return Err(Errno::INVAL);
    }
    if (map.size | map.iova | map.vaddr) & (page_size() - 1) != 0 {
        return Err(Errno::INVAL);
    }
    // It looks into the client's address space, so no lock is held yet.
    let memory = backend.mapper.memory(&mapper);
    if set_vaddr {
        backend.map_vaddr(range, map.vaddr, memory)
    } else {
        backend.map(range, map.vaddr, prot, memory)
    }
}

/// `vfio_iommu_type1_unmap_dma`, `vfio_dma_do_unmap`.
fn unmap_dma(backend: &Type1, arg: u64, caller: &dyn Caller) -> Result {
    const MIN: usize = DmaUnmap::MIN_SIZE;
    let (mut unmap, argsz) = vfio::read::<DmaUnmap, _>(caller, arg, MIN)?;
    let dirty = unmap.flags.contains(UnmapFlags::GET_DIRTY_BITMAP);
    let others = unmap.flags - UnmapFlags::GET_DIRTY_BITMAP;
    if unmap.flags.has_unknown_bits() || (dirty && !others.is_empty()) {
        return Err(Errno::INVAL);
    }
    let bitmap = match dirty {
        true => Some(read_tail::<Bitmap>(caller, arg, argsz, MIN)?),
        false => None,
    };
    if let Some(bitmap) = &bitmap {
        check_bitmap(bitmap, unmap.size)?;
    }
    let invalidate = unmap.flags.contains(UnmapFlags::VADDR);
    if invalidate && backend.has_emulated() {
        return Err(Errno::BUSY);
    }
    let mask = page_size() - 1;
    if unmap.iova & mask != 0 {
        return Err(Errno::INVAL);
    }
    let what = if unmap.flags.contains(UnmapFlags::ALL) {
        if unmap.iova != 0 || unmap.size != 0 {
            return Err(Errno::INVAL);
        }
        What::All
    } else {
        if unmap.size == 0 || unmap.size & mask != 0 {
            return Err(Errno::INVAL);
        }
        What::Range(Range::with_len(unmap.iova, unmap.size)?)
    };
    unmap.size = match bitmap {
        None if invalidate => backend.invalidate(what)?,
        None => backend.unmap(what, None)?,
        Some(bitmap) => {
            if !backend.dirty.is_on() || bitmap.pgsize != page_size() {
                return Err(Errno::INVAL);
            }
            backend.unmap(
                what,
                Some(&mut |range| backend.copy_dirty(unmap.iova, range, bitmap.data, caller)),
            )?
        }
    };
    // What is gone stays gone if this cannot be told.
    vfio::write_back(caller, arg, &unmap, MIN as u32)
}

/// `vfio_iommu_type1_dirty_pages`.
fn dirty_pages(backend: &Type1, arg: u64, caller: &dyn Caller) -> Result {
    const MIN: usize = DirtyBitmap::MIN_SIZE;
    if backend.version() == Version::V1 {
        return Err(Errno::ACCESS);
    }
    let (dirty, argsz) = vfio::read::<DirtyBitmap, _>(caller, arg, MIN)?;
    match dirty.flags {
        DirtyFlags::START => backend.dirty.start(),
        DirtyFlags::STOP => backend.dirty.stop(),
        DirtyFlags::GET_BITMAP => {
            let get = read_tail::<DirtyBitmapGet>(caller, arg, argsz, MIN)?;
            if get.size != 0 {
                Range::with_len(get.iova, get.size)?;
            }
            check_bitmap(&get.bitmap, get.size)?;
            let mask = page_size() - 1;
            if get.bitmap.pgsize != page_size() || (get.iova | get.size) & mask != 0 {
                return Err(Errno::INVAL);
            }
            let range = Range::with_len(get.iova, get.size)?;
            return backend.dirty_bitmap(range, get.bitmap.data, caller);
        }
        // None of them, several, or one nobody knows.
        _ => return Err(Errno::INVAL),
    }
    Ok(())
}

/// What follows an argument. `EINVAL` if the client offers less than that, then `EFAULT`.
fn read_tail<T: FromBytes + IntoBytes>(
    caller: &dyn Caller,
    arg: u64,
    argsz: u32,
    from: usize,
) -> Result<T> {
    if (argsz as usize) < from + size_of::<T>() {
        return Err(Errno::INVAL);
    }
    let at = arg.checked_add(from as u64).ok_or(Errno::FAULT)?;
    let mut tail = T::new_zeroed();
    caller.copy_in(at, tail.as_mut_bytes())?;
    Ok(tail)
}

/// `EINVAL` for a bitmap that cannot be in the client's memory, or is empty, too large, or too
/// short for so many bytes (`verify_bitmap_size`).
fn check_bitmap(bitmap: &Bitmap, size: u64) -> Result {
    let end = bitmap.data.checked_add(bitmap.size);
    if end.is_none_or(|end| end > USER_END) {
        return Err(Errno::INVAL);
    }
    // A page size of 0 has no lowest bit.
    let pages = size
        .checked_shr(bitmap.pgsize.trailing_zeros())
        .unwrap_or(0);
    let needed = pages.div_ceil(64).saturating_mul(8);
    if pages == 0 || bitmap.size == 0 || bitmap.size > BITMAP_SIZE_MAX || bitmap.size < needed {
        return Err(Errno::INVAL);
    }
    Ok(())
}
