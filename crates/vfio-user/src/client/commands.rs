//! A client's requests, one for each command of the protocol.

use super::{Client, Error, Region, Result, fixed};
use crate::wire::{
    DeviceInfo, DmaMap, DmaUnmap, MigData, RegionAccess, SmallWrite, command, map_flags,
    unmap_flags,
};
use std::os::fd::BorrowedFd;
use vfio_uapi::caps::SparseMmapArea;
use vfio_uapi::caps::region_cap;
use vfio_uapi::device::feature::{FeatureFlags, FeatureHeader};
use vfio_uapi::device::{IrqInfo, IrqSet, IrqSetFlags, RegionInfo};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The commands.
impl Client {
    /// Maps a window. `readable` and `writable` are the device's rights; a descriptor comes with its
    /// offset.
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn dma_map(
        &mut self,
        address: u64,
        size: u64,
        (readable, writable): (bool, bool),
        file: Option<(BorrowedFd<'_>, u64)>,
    ) -> Result {
        let map = DmaMap {
            argsz: size_of::<DmaMap>() as u32,
            flags: u32::from(readable) * map_flags::READ + u32::from(writable) * map_flags::WRITE,
            offset: file.map_or(0, |(_, offset)| offset),
            address,
            size,
        };
        let fds: Vec<_> = file.into_iter().map(|(fd, _)| fd).collect();
        self.plain(command::DMA_MAP, map.as_bytes(), &fds)
    }

    /// Unmaps a window.
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn dma_unmap(&mut self, address: u64, size: u64) -> Result {
        self.unmap(DmaUnmap {
            argsz: size_of::<DmaUnmap>() as u32,
            flags: 0,
            address,
            size,
        })
    }

    /// Unmaps all windows.
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn dma_unmap_all(&mut self) -> Result {
        self.unmap(DmaUnmap {
            argsz: size_of::<DmaUnmap>() as u32,
            flags: unmap_flags::ALL,
            address: 0,
            size: 0,
        })
    }

    fn unmap(&mut self, unmap: DmaUnmap) -> Result {
        let reply = self.call(command::DMA_UNMAP, unmap.as_bytes(), &[])?;
        if reply.payload != unmap.as_bytes() {
            return Err(Error::Protocol("an unmap that is not echoed".into()));
        }
        Ok(())
    }

    /// What the device is.
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn device_info(&mut self) -> Result<DeviceInfo> {
        let asked = DeviceInfo {
            argsz: size_of::<DeviceInfo>() as u32,
            ..DeviceInfo::default()
        };
        self.exactly(command::DEVICE_GET_INFO, asked.as_bytes())
    }

    /// A region, asked for again when its capabilities need more room.
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn region_info(&mut self, index: u32) -> Result<Region> {
        let mut asked = RegionInfo {
            argsz: size_of::<RegionInfo>() as u32,
            index,
            ..RegionInfo::default()
        };
        loop {
            let mut reply = self.call(command::DEVICE_GET_REGION_INFO, asked.as_bytes(), &[])?;
            let (info, _) = fixed::<RegionInfo>(&reply.payload)?;
            if reply.payload.len() > asked.argsz as usize || reply.fds.len() > 1 {
                return Err(Error::Protocol("more than there was room for".into()));
            }
            if info.argsz > asked.argsz {
                asked.argsz = info.argsz;
                continue;
            }
            return Ok(Region {
                info,
                areas: areas(&info, &reply.payload)?,
                fd: reply.fds.pop(),
            });
        }
    }

    /// An interrupt index.
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn irq_info(&mut self, index: u32) -> Result<IrqInfo> {
        let asked = IrqInfo {
            argsz: size_of::<IrqInfo>() as u32,
            index,
            ..IrqInfo::default()
        };
        self.exactly(command::DEVICE_GET_IRQ_INFO, asked.as_bytes())
    }

    /// SET_IRQS, with `data` for [`IrqSetFlags::DATA_BOOL`] and `fds` for
    /// [`IrqSetFlags::DATA_EVENTFD`].
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn set_irqs(
        &mut self,
        index: u32,
        flags: IrqSetFlags,
        (start, count): (u32, u32),
        data: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result {
        let set = IrqSet {
            argsz: (size_of::<IrqSet>() + data.len()) as u32,
            flags,
            index,
            start,
            count,
        };
        let payload = [set.as_bytes(), data].concat();
        self.plain(command::DEVICE_SET_IRQS, &payload, fds)
    }

    /// Reads from a region; how many bytes there were.
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn region_read(&mut self, region: u32, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let asked = RegionAccess {
            offset,
            region,
            count: buf.len() as u32,
        };
        let reply = self.call(command::REGION_READ, asked.as_bytes(), &[])?;
        let (got, data) = fixed::<RegionAccess>(&reply.payload)?;
        if data.len() != got.count as usize || data.len() > buf.len() {
            return Err(Error::Protocol(format!(
                "{got:?} with {} bytes",
                data.len()
            )));
        }
        buf[..data.len()].copy_from_slice(data);
        Ok(data.len())
    }

    /// Writes to a region; how many bytes were taken.
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<usize> {
        let asked = RegionAccess {
            offset,
            region,
            count: data.len() as u32,
        };
        let payload = [asked.as_bytes(), data].concat();
        let reply = self.call(command::REGION_WRITE, &payload, &[])?;
        let (got, _) = fixed::<RegionAccess>(&reply.payload)?;
        Ok(got.count as usize)
    }

    /// Many writes of at most eight bytes; how many were done.
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn region_write_multi(&mut self, writes: &[SmallWrite]) -> Result<u64> {
        let count = writes.len() as u64;
        let payload = [count.as_bytes(), writes.as_bytes()].concat();
        self.exactly(command::REGION_WRITE_MULTI, &payload)
    }

    /// Resets the device.
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn reset(&mut self) -> Result {
        self.plain(command::DEVICE_RESET, &[], &[])
    }

    /// DEVICE_FEATURE, with `data` sent and room for `room` bytes of answer; the data of the answer.
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn feature(&mut self, flags: FeatureFlags, data: &[u8], room: usize) -> Result<Vec<u8>> {
        let head = FeatureHeader {
            argsz: (size_of::<FeatureHeader>() + room.max(data.len())) as u32,
            flags,
        };
        let payload = [head.as_bytes(), data].concat();
        let reply = self.call(command::DEVICE_FEATURE, &payload, &[])?;
        let (_, data) = fixed::<FeatureHeader>(&reply.payload)?;
        Ok(data.to_vec())
    }

    /// Reads the migration stream; fewer bytes than asked for are its end.
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn mig_data_read(&mut self, size: u32) -> Result<Vec<u8>> {
        let asked = MigData {
            argsz: size.saturating_add(size_of::<MigData>() as u32),
            size,
        };
        let reply = self.call(command::MIG_DATA_READ, asked.as_bytes(), &[])?;
        let (got, data) = fixed::<MigData>(&reply.payload)?;
        let data = data.get(..got.size as usize);
        let data = data.ok_or_else(|| Error::Protocol(format!("{got:?} without its data")))?;
        Ok(data.to_vec())
    }

    /// Writes the migration stream.
    ///
    /// # Errors
    /// As [`call`](Client::call).
    pub fn mig_data_write(&mut self, data: &[u8]) -> Result {
        let head = MigData {
            argsz: (size_of::<MigData>() + data.len()) as u32,
            size: data.len() as u32,
        };
        let payload = [head.as_bytes(), data].concat();
        self.plain(command::MIG_DATA_WRITE, &payload, &[])
    }

    /// A command whose reply has no payload.
    fn plain(&mut self, command: u16, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result {
        let reply = self.call(command, payload, fds)?;
        if !reply.payload.is_empty() || !reply.fds.is_empty() {
            return Err(Error::Protocol("a payload where none belongs".into()));
        }
        Ok(())
    }

    /// A command whose reply is one structure.
    fn exactly<T: FromBytes + Immutable>(&mut self, command: u16, payload: &[u8]) -> Result<T> {
        let reply = self.call(command, payload, &[])?;
        match fixed::<T>(&reply.payload)? {
            (value, []) => Ok(value),
            _ => Err(Error::Protocol("more than one structure".into())),
        }
    }
}

/// The areas of a sparse mmap capability.
fn areas(info: &RegionInfo, payload: &[u8]) -> Result<Vec<SparseMmapArea>> {
    let outside = || Error::Protocol("a capability outside the reply".into());
    let mut at = info.cap_offset as usize;
    let mut areas = Vec::new();
    while at != 0 {
        let cap = payload.get(at..).ok_or_else(outside)?;
        let (header, rest) = fixed::<vfio_uapi::caps::Header>(cap)?;
        if header.id == region_cap::SPARSE_MMAP {
            let (count, mut rest) = fixed::<[u32; 2]>(rest)?;
            for _ in 0..count[0] {
                let (area, more) = fixed::<SparseMmapArea>(rest)?;
                areas.push(area);
                rest = more;
            }
        }
        let next = header.next as usize;
        if next != 0 && next <= at {
            return Err(outside());
        }
        at = next;
    }
    Ok(areas)
}
