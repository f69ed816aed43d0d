//! What lies on the socket: headers, payloads and numbers, as the specification lays them out
//! (QEMU, `docs/interop/vfio-user.rst`). All fields are in host byte order and packed; where a
//! payload is the argument of an ioctl, the structure is [`vfio_uapi`]'s.

use vfio_core::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of a header.
pub const HEADER: usize = 16;

/// Largest `count` of a read or write message that is served and announced: the specification's
/// default.
pub const MAX_DATA: usize = 1 << 20;

/// Largest message that is kept whole. Every legal request fits: a header, the longest fixed part and
/// the data. Longer ones are drained and refused.
pub const MAX_MESSAGE: usize = HEADER + 32 + MAX_DATA;

/// Descriptors that one message may carry: the kernel's limit (`include/net/scm.h`, `SCM_MAX_FD`).
pub const MAX_FDS: usize = 253;

/// Commands. Client to server, but for [`DMA_READ`](command::DMA_READ) and
/// [`DMA_WRITE`](command::DMA_WRITE).
pub mod command {
    /// First of all.
    pub const VERSION: u16 = 1;
    /// A window into the client's memory.
    pub const DMA_MAP: u16 = 2;
    /// The end of one.
    pub const DMA_UNMAP: u16 = 3;
    /// `VFIO_DEVICE_GET_INFO`.
    pub const DEVICE_GET_INFO: u16 = 4;
    /// `VFIO_DEVICE_GET_REGION_INFO`.
    pub const DEVICE_GET_REGION_INFO: u16 = 5;
    /// Eventfds that stand for writes to a region.
    pub const DEVICE_GET_REGION_IO_FDS: u16 = 6;
    /// `VFIO_DEVICE_GET_IRQ_INFO`.
    pub const DEVICE_GET_IRQ_INFO: u16 = 7;
    /// `VFIO_DEVICE_SET_IRQS`.
    pub const DEVICE_SET_IRQS: u16 = 8;
    /// `pread` of a region.
    pub const REGION_READ: u16 = 9;
    /// `pwrite` of a region.
    pub const REGION_WRITE: u16 = 10;
    /// Server to client: reads memory that was mapped without a descriptor.
    pub const DMA_READ: u16 = 11;
    /// Server to client: writes it.
    pub const DMA_WRITE: u16 = 12;
    /// `VFIO_DEVICE_RESET`.
    pub const DEVICE_RESET: u16 = 13;
    /// Many small writes.
    pub const REGION_WRITE_MULTI: u16 = 15;
    /// `VFIO_DEVICE_FEATURE`.
    pub const DEVICE_FEATURE: u16 = 16;
    /// Reads the migration stream.
    pub const MIG_DATA_READ: u16 = 17;
    /// Writes it.
    pub const MIG_DATA_WRITE: u16 = 18;
}

/// Bits of [`Header::flags`].
pub mod flags {
    /// Bits 0 to 3: the type.
    pub const TYPE: u32 = 0xf;
    /// Type: a command.
    pub const COMMAND: u32 = 0;
    /// Type: a reply.
    pub const REPLY: u32 = 1;
    /// Of a command: no reply, please.
    pub const NO_REPLY: u32 = 1 << 4;
    /// Of a reply: `error` is an errno.
    pub const ERROR: u32 = 1 << 5;
}

/// In front of every message, in both directions.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct Header {
    /// Chosen by the sender, echoed in the reply. Need not be unique.
    pub id: u16,
    /// See [`command`].
    pub command: u16,
    /// Bytes of the whole message, this header included.
    pub size: u32,
    /// See [`flags`].
    pub flags: u32,
    /// Of a reply with [`flags::ERROR`]: the errno.
    pub error: u32,
}

impl Header {
    /// The header of a reply with `payload` bytes behind it.
    pub fn reply(&self, payload: usize) -> Header {
        Header {
            id: self.id,
            command: self.command,
            size: (HEADER + payload) as u32,
            flags: flags::REPLY,
            error: 0,
        }
    }

    /// The header that is a whole error reply. The errno is never 0: QEMU takes that for success.
    pub fn refusal(&self, errno: Errno) -> Header {
        Header {
            flags: flags::REPLY | flags::ERROR,
            error: errno.raw_os_error().unsigned_abs().max(1),
            ..self.reply(0)
        }
    }

    /// Whether the sender of this command wants no reply.
    pub fn no_reply(&self) -> bool {
        self.flags & flags::NO_REPLY != 0
    }

    /// Whether it is a reply.
    pub fn is_reply(&self) -> bool {
        self.flags & flags::TYPE == flags::REPLY
    }

    /// The errno of an error reply.
    pub fn errno(&self) -> Option<Errno> {
        (self.flags & flags::ERROR != 0).then(|| {
            let number = i32::try_from(self.error).unwrap_or(0);
            if (1..4096).contains(&number) {
                Errno::from_raw_os_error(number)
            } else {
                Errno::IO
            }
        })
    }
}

/// Start of [`command::VERSION`], both ways; JSON and a NUL may follow.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct Version {
    /// 0.
    pub major: u16,
    /// What the sender knows of major 0.
    pub minor: u16,
}

/// Bits of [`DmaMap::flags`].
pub mod map_flags {
    /// The device may read.
    pub const READ: u32 = 1 << 0;
    /// The device may write.
    pub const WRITE: u32 = 1 << 1;
    /// libvfio-user: map the descriptor.
    pub const MMAP: u32 = 1 << 2;
    /// libvfio-user: use pread and pwrite on it. Which of both is the server's business here.
    pub const FILE_IO: u32 = 1 << 3;
    /// All of them.
    pub const ALL: u32 = READ | WRITE | MMAP | FILE_IO;
}

/// [`command::DMA_MAP`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct DmaMap {
    /// Of this structure.
    pub argsz: u32,
    /// See [`map_flags`].
    pub flags: u32,
    /// Where in the file.
    pub offset: u64,
    /// Where in the device's address space.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

/// Bits of [`DmaUnmap::flags`].
pub mod unmap_flags {
    /// libvfio-user: return a dirty bitmap as well. Not here: DMA logging does that.
    pub const DIRTY_BITMAP: u32 = 1 << 0;
    /// Everything; address and size are 0.
    pub const ALL: u32 = 1 << 1;
}

/// [`command::DMA_UNMAP`] and its reply.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct DmaUnmap {
    /// Of this structure.
    pub argsz: u32,
    /// See [`unmap_flags`].
    pub flags: u32,
    /// Exactly a window's.
    pub address: u64,
    /// Exactly a window's.
    pub size: u64,
}

/// [`command::DEVICE_GET_INFO`] and its reply: the first 16 bytes of `struct vfio_device_info`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct DeviceInfo {
    /// Room for the reply; its size.
    pub argsz: u32,
    /// [`vfio_uapi::device::InfoFlags`].
    pub flags: u32,
    /// Highest region index + 1.
    pub num_regions: u32,
    /// Highest interrupt index + 1.
    pub num_irqs: u32,
}

/// [`command::DEVICE_GET_REGION_IO_FDS`] and the start of its reply.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct RegionIoFds {
    /// Room for the reply; its size.
    pub argsz: u32,
    /// 0.
    pub flags: u32,
    /// Which region.
    pub index: u32,
    /// Entries that follow.
    pub count: u32,
}

/// Start of [`command::REGION_READ`] and [`command::REGION_WRITE`], and of their replies.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct RegionAccess {
    /// Where in the region.
    pub offset: u64,
    /// Which region.
    pub region: u32,
    /// Bytes.
    pub count: u32,
}

/// One write of [`command::REGION_WRITE_MULTI`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct SmallWrite {
    /// Where.
    pub at: RegionAccess,
    /// The first `count` of these.
    pub data: [u8; 8],
}

/// Start of [`command::DMA_READ`] and [`command::DMA_WRITE`], and of their replies.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct DmaAccess {
    /// In the device's address space.
    pub address: u64,
    /// Bytes. Eight bytes in libvfio-user and QEMU 11, whatever the text says of a reply.
    pub count: u64,
}

/// Start of [`command::MIG_DATA_READ`] and [`command::MIG_DATA_WRITE`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct MigData {
    /// Room for the reply; its size.
    pub argsz: u32,
    /// Bytes of data.
    pub size: u32,
}

/// A structure at the start of a payload; what follows is the second value. `EINVAL` when the
/// payload is shorter.
pub fn take<T: FromBytes>(payload: &[u8]) -> Result<(T, &[u8]), Errno> {
    T::read_from_prefix(payload).map_err(|_| Errno::INVAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_the_specifications() {
        assert_eq!(size_of::<Header>(), HEADER);
        assert_eq!(size_of::<Version>(), 4);
        assert_eq!(size_of::<DmaMap>(), 32);
        assert_eq!(size_of::<DmaUnmap>(), 24);
        assert_eq!(size_of::<DeviceInfo>(), 16);
        assert_eq!(size_of::<RegionIoFds>(), 16);
        assert_eq!(size_of::<RegionAccess>(), 16);
        assert_eq!(size_of::<SmallWrite>(), 24);
        assert_eq!(size_of::<DmaAccess>(), 16);
        assert_eq!(size_of::<MigData>(), 8);
        assert_eq!(size_of::<vfio_uapi::device::RegionInfo>(), 32);
        assert_eq!(size_of::<vfio_uapi::device::IrqInfo>(), 16);
        assert_eq!(size_of::<vfio_uapi::device::IrqSet>(), 20);
    }

    #[test]
    fn an_error_reply_has_an_errno() {
        let asked = Header {
            id: 7,
            command: command::REGION_READ,
            size: 32,
            ..Header::default()
        };
        let refusal = asked.refusal(Errno::NODEV);
        assert_eq!((refusal.size, refusal.flags, refusal.error), (16, 0x21, 19));
        assert_eq!(asked.refusal(Errno::BUSY).errno(), Some(Errno::BUSY));
        let absurd = Header {
            error: u32::MAX,
            ..refusal
        };
        assert_eq!(absurd.errno(), Some(Errno::IO));
        assert_eq!(asked.reply(16).errno(), None);
    }
}
