//! DEVICE_FEATURE and the migration stream.

use super::ClientKind;
use super::session::{Reply, Session};
use crate::wire::{MAX_DATA, MigData, take};
use vfio_core::device::{Feature as DriverFeature, MigrationState as State};
use vfio_core::{Errno, Result};
use vfio_uapi::device::feature::{
    DmaLoggingRange, Feature, FeatureFlags, FeatureHeader, FeatureOp, MigState, Migration,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of a feature's header.
const HEAD: usize = size_of::<FeatureHeader>();

/// Head of DMA_LOGGING_START on the wire; the ranges follow it.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct LoggingStart {
    page_size: u64,
    num_ranges: u32,
    reserved: u32,
}

/// DMA_LOGGING_REPORT on the wire; the bitmap follows it in the reply.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct LoggingReport {
    iova: u64,
    length: u64,
    page_size: u64,
}

impl Session {
    /// `EINVAL` as the ioctl (`vfio_ioctl_device_feature`, `vfio_check_feature`), and for data that
    /// the message does not hold or a reply that the client has no room for; `ENOTTY` for a feature
    /// that is not there; else what it says.
    pub(super) fn feature(&self, payload: &[u8], reply: &mut Reply) -> Result {
        let (head, data) = take::<FeatureHeader>(payload)?;
        if (head.argsz as usize) < HEAD {
            return Err(Errno::INVAL);
        }
        head.flags.check()?;
        let room = head.data_room();
        let (get, set) = (FeatureFlags::GET, FeatureFlags::SET);
        let index = head.flags.index();
        let known = Feature::ALL
            .into_iter()
            .find(|feature| *feature as u16 == index);
        match known {
            Some(Feature::Migration) => {
                let flags = self.file.migration_flags()?;
                if head.check(get, size_of::<Migration>())? == FeatureOp::Get {
                    return answer(head, room, reply, Migration { flags }.as_bytes());
                }
            }
            Some(Feature::MigDeviceState) => {
                self.file.migration_flags()?;
                match head.check(get | set, size_of::<MigState>())? {
                    FeatureOp::Probe => {}
                    FeatureOp::Get => {
                        let state = MigState {
                            device_state: self.file.migration_state()? as u32,
                            // The data goes through this socket.
                            data_fd: -1,
                        };
                        return answer(head, room, reply, state.as_bytes());
                    }
                    FeatureOp::Set => {
                        let (state, _) = take::<MigState>(data)?;
                        let to = State::ALL
                            .into_iter()
                            .find(|known| *known as u32 == state.device_state)
                            .ok_or(Errno::INVAL)?;
                        self.file.set_migration_state(to)?;
                    }
                }
            }
            Some(Feature::DmaLoggingStart) => {
                if head.check(set, size_of::<LoggingStart>())? == FeatureOp::Set {
                    return self.logging_start(head, data, reply);
                }
            }
            Some(Feature::DmaLoggingStop) => {
                if head.check(set, 0)? == FeatureOp::Set {
                    self.file.dma_logging_stop()?;
                }
            }
            Some(Feature::DmaLoggingReport) => {
                if head.check(get, size_of::<LoggingReport>())? == FeatureOp::Get {
                    return self.logging_report(head, data, reply);
                }
            }
            Some(Feature::MigDataSize) => {
                let size = self.file.migration_data_size()?;
                if head.check(get, 8)? == FeatureOp::Get {
                    return answer(head, room, reply, &size.to_ne_bytes());
                }
            }
            _ => {
                let mut own = data[..data.len().min(room)].to_vec();
                self.file.feature(DriverFeature {
                    flags: head.flags,
                    data: &mut own,
                })?;
                let is_get = head.flags.contains(get) && !head.flags.contains(FeatureFlags::PROBE);
                if is_get {
                    return answer(head, room, reply, &own);
                }
            }
        }
        // What was set or asked about is repeated, as far as there is room for it.
        let repeated = payload.len().min(head.argsz as usize);
        reply.push(&payload[..repeated]);
        Ok(())
    }

    fn logging_start(&self, head: FeatureHeader, data: &[u8], reply: &mut Reply) -> Result {
        let (mut start, mut rest) = take::<LoggingStart>(data)?;
        let fixed = size_of::<LoggingStart>();
        let bytes = u64::from(start.num_ranges) * size_of::<DmaLoggingRange>() as u64;
        if bytes > rest.len() as u64 || fixed as u64 + bytes > head.data_room() as u64 {
            return Err(Errno::INVAL);
        }
        let mut ranges = Vec::with_capacity(start.num_ranges as usize);
        for _ in 0..start.num_ranges {
            let (range, more) = take::<DmaLoggingRange>(rest)?;
            ranges.push((range.iova, range.length));
            rest = more;
        }
        start.page_size = self.file.dma_logging_start(start.page_size, &ranges)?;
        reply.push(head.as_bytes());
        reply.push(start.as_bytes());
        reply.push(&data[fixed..fixed + bytes as usize]);
        Ok(())
    }

    fn logging_report(&self, head: FeatureHeader, data: &[u8], reply: &mut Reply) -> Result {
        let (report, _) = take::<LoggingReport>(data)?;
        if !report.page_size.is_power_of_two() || report.page_size < 4096 || report.length == 0 {
            return Err(Errno::INVAL);
        }
        let words = report.length.div_ceil(report.page_size).div_ceil(64);
        let bytes = words.checked_mul(8).ok_or(Errno::INVAL)?;
        if bytes > MAX_DATA as u64 {
            return Err(Errno::TOOBIG);
        }
        let full = size_of::<LoggingReport>() as u64 + bytes;
        if full > head.data_room() as u64 {
            return Err(Errno::INVAL);
        }
        let mut bitmap = vec![0u64; words as usize];
        self.file
            .dma_logging_report(report.iova, report.length, report.page_size, &mut bitmap)?;
        let head = FeatureHeader {
            argsz: (HEAD as u64 + full) as u32,
            ..head
        };
        reply.push(head.as_bytes());
        reply.push(report.as_bytes());
        reply.push(bitmap.as_bytes());
        Ok(())
    }

    /// Fewer bytes than asked for are the end of the stream, or in PRE_COPY all there is now.
    /// `EINVAL` for more than was announced or than the client has room for; else as
    /// [`migration_read`](vfio_core::device::DeviceFile::migration_read).
    pub(super) fn mig_read(&self, payload: &[u8], reply: &mut Reply) -> Result {
        let (mut asked, _) = take::<MigData>(payload)?;
        let fixed = size_of::<MigData>();
        let count = asked.size as usize;
        if count > MAX_DATA || (asked.argsz as usize) < fixed.saturating_add(count) {
            return Err(Errno::INVAL);
        }
        reply.push(asked.as_bytes());
        let room = reply.room(count);
        let mut done = 0;
        while done < count {
            match self.file.migration_read(&mut room[done..]) {
                Ok(0) | Err(Errno::NOMSG) => break,
                Ok(n) => done += n.min(count - done),
                Err(_) if done > 0 => break,
                Err(errno) => return Err(errno),
            }
        }
        room[done..].fill(0);
        if self.kind != ClientKind::LibvfioUser {
            reply.truncate(fixed + done);
            asked.argsz = (fixed + done) as u32;
        }
        // libvfio-user's sample wants as many bytes as it asked for, whatever the size says.
        asked.size = done as u32;
        reply.bytes[crate::wire::HEADER..][..fixed].copy_from_slice(asked.as_bytes());
        Ok(())
    }

    /// All of the data or none; as [`migration_write`](vfio_core::device::DeviceFile::migration_write).
    pub(super) fn mig_write(&self, payload: &[u8]) -> Result {
        let (head, data) = take::<MigData>(payload)?;
        let data = data.get(..head.size as usize).ok_or(Errno::INVAL)?;
        let mut rest = data;
        while !rest.is_empty() {
            match self.file.migration_write(rest)? {
                0 => return Err(Errno::IO),
                n => rest = rest.get(n..).unwrap_or(&[]),
            }
        }
        Ok(())
    }
}

/// The answer to a GET. `EINVAL` when the client has no room for it.
fn answer(head: FeatureHeader, room: usize, reply: &mut Reply, data: &[u8]) -> Result {
    if data.len() > room {
        return Err(Errno::INVAL);
    }
    let head = FeatureHeader {
        argsz: (HEAD + data.len()) as u32,
        ..head
    };
    reply.push(head.as_bytes());
    reply.push(data);
    Ok(())
}
