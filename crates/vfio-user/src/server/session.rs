//! A client that has the device: its commands, one by one.
//!
//! Each takes a request's payload and descriptors and appends the reply's payload, or fails with the
//! errno that is to be the whole reply.

use super::ClientKind;
use super::link::Link;
use crate::wire::{
    DeviceInfo, DmaMap, DmaUnmap, HEADER, Header, MAX_DATA, RegionAccess, RegionIoFds, SmallWrite,
    command, map_flags, take, unmap_flags,
};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use vfio_core::device::{Device, DeviceFile, RegionPos};
use vfio_core::{Errno, Result};
use vfio_uapi::device::{InfoFlags, IrqInfo, RegionFlags, RegionInfo};
use zerocopy::{FromBytes, IntoBytes};

/// From VERSION to the end of the connection.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) file: Arc<DeviceFile>,
    pub(super) link: Arc<Link>,
    pub(super) kind: ClientKind,
    /// It can take a descriptor with a reply.
    pub(super) takes_fds: bool,
}

/// A reply in the making: the header's place first, then its payload.
#[derive(Debug, Default)]
pub(super) struct Reply {
    pub(super) bytes: Vec<u8>,
    pub(super) fd: Option<OwnedFd>,
}

impl Reply {
    /// Starts a new one.
    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.bytes.resize(HEADER, 0);
        self.fd = None;
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Appends zeros, to be filled.
    pub(super) fn room(&mut self, count: usize) -> &mut [u8] {
        let from = self.bytes.len();
        self.bytes.resize(from + count, 0);
        &mut self.bytes[from..]
    }

    /// Takes back what lies behind the first `count` bytes of payload.
    pub(super) fn truncate(&mut self, count: usize) {
        self.bytes.truncate(HEADER + count);
    }

    /// The message, with its header in place.
    pub(super) fn finish(&mut self, asked: &Header) -> &[u8] {
        let header = asked.reply(self.bytes.len() - HEADER);
        self.bytes[..HEADER].copy_from_slice(header.as_bytes());
        &self.bytes
    }
}

impl Session {
    /// Runs a command.
    pub(super) fn run(
        &self,
        header: &Header,
        payload: &[u8],
        fds: Vec<OwnedFd>,
        reply: &mut Reply,
    ) -> Result {
        let done = match header.command {
            command::REGION_READ => self.region_read(payload, reply),
            command::REGION_WRITE => self.region_write(payload, reply),
            command::DMA_MAP => self.dma_map(payload, fds),
            command::DMA_UNMAP => self.dma_unmap(payload, reply),
            command::DEVICE_GET_INFO => self.device_info(payload, reply),
            command::DEVICE_GET_REGION_INFO => self.region_info(payload, reply),
            command::DEVICE_GET_REGION_IO_FDS => self.region_io_fds(payload, reply),
            command::DEVICE_GET_IRQ_INFO => self.irq_info(payload, reply),
            command::DEVICE_SET_IRQS => self.set_irqs(payload, fds),
            command::DEVICE_RESET => self.file.reset(),
            command::REGION_WRITE_MULTI => self.write_multi(payload, reply),
            command::DEVICE_FEATURE => self.feature(payload, reply),
            command::MIG_DATA_READ => self.mig_read(payload, reply),
            command::MIG_DATA_WRITE => self.mig_write(payload),
            // A second one.
            command::VERSION => Err(Errno::INVAL),
            _ => Err(Errno::OPNOTSUPP),
        };
        match done {
            Err(errno) if self.kind == ClientKind::Rust => {
                reply.clear();
                soften(header, payload, reply).then_some(()).ok_or(errno)
            }
            done => done,
        }
    }

    /// The device; `ENODEV` once it is released.
    fn device(&self) -> Result<Device> {
        self.file.device().ok_or(Errno::NODEV)
    }

    /// Short of what was asked for: a region's end. `EINVAL` for more than was announced.
    fn region_read(&self, payload: &[u8], reply: &mut Reply) -> Result {
        let (mut access, _) = take::<RegionAccess>(payload)?;
        let count = access.count as usize;
        if count > MAX_DATA {
            return Err(Errno::INVAL);
        }
        reply.push(access.as_bytes());
        let room = reply.room(count);
        let done = self.file.read_region(place(&access), room)?.min(count);
        if done < count {
            if self.kind == ClientKind::Rust {
                // It waits for all it asked for.
                room[done..].fill(0xff);
                return Ok(());
            }
            access.count = done as u32;
            reply.clear_to(&access, done);
        }
        Ok(())
    }

    fn region_write(&self, payload: &[u8], reply: &mut Reply) -> Result {
        let (mut access, data) = take::<RegionAccess>(payload)?;
        if access.count as usize > MAX_DATA {
            return Err(Errno::INVAL);
        }
        let data = data.get(..access.count as usize).ok_or(Errno::INVAL)?;
        let done = self.file.write_region(place(&access), data)?;
        access.count = done.min(data.len()) as u32;
        reply.push(access.as_bytes());
        Ok(())
    }

    /// Stops at the first that fails; an error only if that is the first of all.
    fn write_multi(&self, payload: &[u8], reply: &mut Reply) -> Result {
        let (count, mut rest) = take::<u64>(payload)?;
        let fits = count.checked_mul(size_of::<SmallWrite>() as u64);
        if fits.is_none_or(|bytes| bytes > rest.len() as u64) {
            return Err(Errno::INVAL);
        }
        let mut done: u64 = 0;
        while done < count {
            let (write, more) = take::<SmallWrite>(rest)?;
            rest = more;
            let written = match write.data.get(..write.at.count as usize) {
                Some(data) => self.file.write_region(place(&write.at), data).map(drop),
                None => Err(Errno::INVAL),
            };
            match written {
                Err(errno) if done == 0 => return Err(errno),
                Err(_) => break,
                Ok(()) => done += 1,
            }
        }
        reply.push(&done.to_ne_bytes());
        Ok(())
    }

    fn dma_map(&self, payload: &[u8], mut fds: Vec<OwnedFd>) -> Result {
        let (map, _) = take::<DmaMap>(payload)?;
        let is_known = map.flags & !map_flags::ALL == 0;
        if (map.argsz as usize) < size_of::<DmaMap>() || !is_known || fds.len() > 1 {
            return Err(Errno::INVAL);
        }
        let access = (
            map.flags & map_flags::READ != 0,
            map.flags & map_flags::WRITE != 0,
        );
        let file = fds.pop().map(|fd| (fd, map.offset));
        self.link.windows.map(map.address, map.size, access, file)
    }

    /// On return nothing of the range is in use: new accesses do not find it, those in progress are
    /// over, those that waited for the client are cancelled, and the driver has let go.
    fn dma_unmap(&self, payload: &[u8], reply: &mut Reply) -> Result {
        let (unmap, _) = take::<DmaUnmap>(payload)?;
        if (unmap.argsz as usize) < size_of::<DmaUnmap>() {
            return Err(Errno::INVAL);
        }
        match unmap.flags {
            0 => {
                self.link.windows.unmap(unmap.address, unmap.size)?;
                self.link.cancel(unmap.address, unmap.size);
                self.file.dma_unmapped(unmap.address, unmap.size);
            }
            unmap_flags::ALL if unmap.address == 0 && unmap.size == 0 => {
                let ranges = self.link.windows.ranges();
                self.link.windows.clear();
                self.link.cancel(0, u64::MAX);
                for range in ranges {
                    // The map takes none that is longer than a `u64` says.
                    self.file
                        .dma_unmapped(range.start(), range.len().unwrap_or(u64::MAX));
                }
            }
            unmap_flags::DIRTY_BITMAP => return Err(Errno::OPNOTSUPP),
            _ => return Err(Errno::INVAL),
        }
        reply.push(unmap.as_bytes());
        Ok(())
    }

    fn device_info(&self, payload: &[u8], reply: &mut Reply) -> Result {
        let (asked, _) = take::<DeviceInfo>(payload)?;
        if (asked.argsz as usize) < size_of::<DeviceInfo>() {
            return Err(Errno::INVAL);
        }
        let info = self.device()?.info()?;
        let info = DeviceInfo {
            argsz: size_of::<DeviceInfo>() as u32,
            flags: (info.flags - InfoFlags::CAPS).bits(),
            num_regions: info.num_regions,
            num_irqs: info.num_irqs,
        };
        reply.push(info.as_bytes());
        Ok(())
    }

    /// A descriptor goes with the reply that lets the client map: with capabilities the one that
    /// contains them, else the first. QEMU closes what comes with a reply that it asks for again, the
    /// others take it from the complete one.
    fn region_info(&self, payload: &[u8], reply: &mut Reply) -> Result {
        let (mut info, _) = take::<RegionInfo>(payload)?;
        if (info.argsz as usize) < size_of::<RegionInfo>() {
            return Err(Errno::INVAL);
        }
        let device = self.device()?;
        if info.index >= device.info()?.num_regions {
            return Err(Errno::INVAL);
        }
        let mut region = device.region(info.index)?;
        let areas = |cap: &vfio_core::device::RegionCap| match cap {
            vfio_core::device::RegionCap::SparseMmap(areas) => areas.len(),
            _ => 0,
        };
        let areas: usize = region.caps.iter().map(areas).sum();
        // SPDK expects a descriptor for each area, and there is one.
        let is_mappable = self.takes_fds && !(self.kind == ClientKind::Spdk && areas > 1);
        if !is_mappable && region.flags.contains(RegionFlags::MMAP) {
            region.flags -= RegionFlags::MMAP;
            region.caps.retain(|cap| areas_of(cap).is_none());
        }
        let caps = region.chain();
        let placed = caps.place(info.argsz);
        info.argsz = placed.argsz.max(size_of::<RegionInfo>() as u32);
        info.flags = region.flags - RegionFlags::CAPS;
        if placed.has_caps {
            info.flags |= RegionFlags::CAPS;
        }
        info.cap_offset = placed.cap_offset;
        info.size = region.size;
        info.offset = self.file.region_offset(info.index)?;
        reply.push(info.as_bytes());
        reply.push(placed.bytes);
        let is_complete = placed.bytes.len() == caps.as_bytes().len();
        if region.flags.contains(RegionFlags::MMAP) && is_complete {
            let memory = device.memory()?.ok_or(Errno::NODEV)?;
            reply.fd = Some(memory.reopen(region.flags.contains(RegionFlags::WRITE))?);
        }
        Ok(())
    }

    /// No device here has any: its answer is how to reach no region by eventfd.
    fn region_io_fds(&self, payload: &[u8], reply: &mut Reply) -> Result {
        let (asked, _) = take::<RegionIoFds>(payload)?;
        if (asked.argsz as usize) < size_of::<RegionIoFds>() || asked.flags != 0 {
            return Err(Errno::INVAL);
        }
        if asked.index >= self.device()?.info()?.num_regions {
            return Err(Errno::INVAL);
        }
        let none = RegionIoFds {
            argsz: size_of::<RegionIoFds>() as u32,
            count: 0,
            ..asked
        };
        reply.push(none.as_bytes());
        Ok(())
    }

    fn irq_info(&self, payload: &[u8], reply: &mut Reply) -> Result {
        let (mut info, _) = take::<IrqInfo>(payload)?;
        if (info.argsz as usize) < size_of::<IrqInfo>() {
            return Err(Errno::INVAL);
        }
        let device = self.device()?;
        if info.index >= device.info()?.num_irqs {
            return Err(Errno::INVAL);
        }
        let irq = device.irq(info.index)?;
        info.argsz = size_of::<IrqInfo>() as u32;
        info.flags = irq.flags;
        info.count = irq.count;
        reply.push(info.as_bytes());
        Ok(())
    }
}

impl Reply {
    /// Replaces the fixed part of a region access, and ends behind `count` bytes of data.
    fn clear_to(&mut self, access: &RegionAccess, count: usize) {
        let fixed = size_of::<RegionAccess>();
        self.bytes[HEADER..HEADER + fixed].copy_from_slice(access.as_bytes());
        self.truncate(fixed + count);
    }
}

fn areas_of(cap: &vfio_core::device::RegionCap) -> Option<usize> {
    match cap {
        vfio_core::device::RegionCap::SparseMmap(areas) => Some(areas.len()),
        _ => None,
    }
}

fn place(access: &RegionAccess) -> RegionPos {
    RegionPos {
        index: access.region,
        offset: access.offset,
    }
}

/// The crate `vfio_user` never looks at a reply's error bit: after an error in place of data it waits
/// for the data for ever. It gets what a device that is not there reads as: ones, nothing, and for an
/// unmap the echo. False for commands whose reply has no data, where an error is harmless.
fn soften(header: &Header, payload: &[u8], reply: &mut Reply) -> bool {
    match header.command {
        command::REGION_READ => {
            let Ok((access, _)) = take::<RegionAccess>(payload) else {
                return false;
            };
            if access.count as usize > MAX_DATA {
                return false;
            }
            reply.push(access.as_bytes());
            reply.room(access.count as usize).fill(0xff);
        }
        command::REGION_WRITE => echo::<RegionAccess>(payload, reply),
        command::DMA_UNMAP => echo::<DmaUnmap>(payload, reply),
        command::DEVICE_GET_INFO => {
            reply.push(
                DeviceInfo {
                    argsz: size_of::<DeviceInfo>() as u32,
                    ..DeviceInfo::default()
                }
                .as_bytes(),
            );
        }
        command::DEVICE_GET_REGION_INFO => {
            let asked = take::<RegionInfo>(payload).map_or(0, |(info, _)| info.index);
            reply.push(
                RegionInfo {
                    argsz: size_of::<RegionInfo>() as u32,
                    index: asked,
                    ..RegionInfo::default()
                }
                .as_bytes(),
            );
        }
        command::DEVICE_GET_IRQ_INFO => {
            let asked = take::<IrqInfo>(payload).map_or(0, |(info, _)| info.index);
            reply.push(
                IrqInfo {
                    argsz: size_of::<IrqInfo>() as u32,
                    index: asked,
                    ..IrqInfo::default()
                }
                .as_bytes(),
            );
        }
        _ => return false,
    }
    true
}

/// The request's fixed part, zeros where it was too short.
fn echo<T: FromBytes + IntoBytes>(payload: &[u8], reply: &mut Reply) {
    let size = size_of::<T>();
    let known = payload.len().min(size);
    reply.room(size)[..known].copy_from_slice(&payload[..known]);
}
