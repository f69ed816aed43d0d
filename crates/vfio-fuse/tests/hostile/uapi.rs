//! The ABI as a client writes it: numbers and bytes, of `include/uapi/linux/vfio.h` and `iommufd.h`.

use crate::client::{Client, Errno, Outcome};

const fn io(nr: u32) -> u32 {
    (b';' as u32) << 8 | nr
}

pub const SET_IOMMU: u32 = io(102);
pub const GROUP_STATUS: u32 = io(103);
pub const SET_CONTAINER: u32 = io(104);
pub const UNSET_CONTAINER: u32 = io(105);
pub const GET_DEVICE_FD: u32 = io(106);
pub const MAP_DMA: u32 = io(113);
pub const GET_INFO: u32 = io(107);
pub const REGION_INFO: u32 = io(108);
pub const IRQ_INFO: u32 = io(109);
pub const SET_IRQS: u32 = io(110);
pub const RESET: u32 = io(111);
pub const FEATURE: u32 = io(117);
pub const BIND: u32 = io(118);
pub const ATTACH: u32 = io(119);
pub const DETACH: u32 = io(120);
pub const DESTROY: u32 = io(0x80);
pub const IOAS_ALLOC: u32 = io(0x81);
pub const IOAS_MAP: u32 = io(0x85);
pub const IOAS_UNMAP: u32 = io(0x86);
pub const IOAS_MAP_FILE: u32 = io(0x8f);

pub const WHAT: u32 = 0x56f0;
pub const OPEN_DEVICE: u32 = 0x56f1;
pub const FIND_DEVICE: u32 = 0x56f2;
pub const ANNOUNCE: u32 = 0x56f5;

/// `VFIO_TYPE1v2_IOMMU`.
pub const TYPE1_V2: u64 = 3;

pub const NONE: u32 = 1;
pub const BOOL: u32 = 2;
pub const EVENTFD: u32 = 4;
pub const MASK: u32 = 8;
pub const UNMASK: u32 = 16;
pub const TRIGGER: u32 = 32;

pub const MAP_FIXED: u32 = 1;
pub const MAP_WRITE: u32 = 2;
pub const MAP_READ: u32 = 4;
pub const MAP_RW: u32 = MAP_WRITE | MAP_READ;

/// A structure of 32-bit words.
pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

pub fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at * 4..at * 4 + 4].try_into().unwrap())
}

pub fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}

pub fn bind_arg(iommufd: u64) -> Vec<u8> {
    words(&[16, 0, iommufd as u32, 0])
}

impl Client {
    /// BIND; the object id.
    pub fn bind(&self, device: u64, iommufd: u64) -> Result<u32, Errno> {
        let mut arg = bind_arg(iommufd);
        self.ioctl(device, BIND, &mut arg)?;
        Ok(word(&arg, 3))
    }

    pub fn set_container(&self, group: u64, container: u64) -> Outcome {
        self.ioctl(group, SET_CONTAINER, &mut words(&[container as u32]))
    }

    pub fn unset_container(&self, group: u64) -> Outcome {
        self.ioctl_at(group, UNSET_CONTAINER, 0)
    }

    /// The flags of GET_STATUS.
    pub fn group_status(&self, group: u64) -> Result<u32, Errno> {
        let mut arg = words(&[8, 0]);
        self.ioctl(group, GROUP_STATUS, &mut arg)?;
        Ok(word(&arg, 1))
    }

    /// What an ioctl makes of a name, which lies at the end of a page.
    pub fn ioctl_name(&self, group: u64, cmd: u32, name: &[u8]) -> Outcome {
        let at = self.arena + 8192 - name.len() as u64;
        self.poke(at, name);
        self.ioctl_at(group, cmd, at)
    }

    /// Makes a device file one of the group: what a supervisor does for GET_DEVICE_FD.
    pub fn open_device(&self, device: u64, group: u64, name: &[u8]) -> Outcome {
        let at = self.arena + 8192;
        self.poke(at, name);
        let mut arg = words(&[24, group as u32, 0, name.len() as u32]);
        arg.extend(at.to_ne_bytes());
        self.ioctl(device, OPEN_DEVICE, &mut arg)
    }

    /// VFIO_IOMMU_MAP_DMA, readable and writable.
    pub fn map_dma(&self, container: u64, addr: u64, len: u64, iova: u64) -> Outcome {
        let mut arg = words(&[32, 3]);
        for value in [addr, iova, len] {
            arg.extend(value.to_ne_bytes());
        }
        self.ioctl(container, MAP_DMA, &mut arg)
    }

    pub fn ioas(&self, iommufd: u64) -> Result<u32, Errno> {
        let mut arg = words(&[12, 0, 0]);
        self.ioctl(iommufd, IOAS_ALLOC, &mut arg)?;
        Ok(word(&arg, 2))
    }

    pub fn attach(&self, device: u64, pt: u32) -> Result<u32, Errno> {
        let mut arg = words(&[12, 0, pt]);
        self.ioctl(device, ATTACH, &mut arg)?;
        Ok(word(&arg, 2))
    }

    pub fn detach(&self, device: u64) -> Outcome {
        self.ioctl(device, DETACH, &mut words(&[8, 0]))
    }

    pub fn map(
        &self,
        iommufd: u64,
        ioas: u32,
        flags: u32,
        addr: u64,
        len: u64,
        iova: u64,
    ) -> Result<u64, Errno> {
        let mut arg = words(&[40, flags, ioas, 0]);
        for value in [addr, len, iova] {
            arg.extend(value.to_ne_bytes());
        }
        self.ioctl(iommufd, IOAS_MAP, &mut arg)?;
        Ok(long(&arg, 32))
    }

    pub fn unmap(&self, iommufd: u64, ioas: u32, iova: u64, len: u64) -> Result<u64, Errno> {
        let mut arg = words(&[24, ioas]);
        arg.extend(iova.to_ne_bytes());
        arg.extend(len.to_ne_bytes());
        self.ioctl(iommufd, IOAS_UNMAP, &mut arg)?;
        Ok(long(&arg, 16))
    }

    /// Flags, size and offset of a region.
    pub fn region(&self, device: u64, index: u32) -> Result<(u32, u64, u64), Errno> {
        let mut arg = words(&[32, 0, index, 0, 0, 0, 0, 0]);
        self.ioctl(device, REGION_INFO, &mut arg)?;
        Ok((word(&arg, 1), long(&arg, 16), long(&arg, 24)))
    }

    pub fn irqs(
        &self,
        device: u64,
        flags: u32,
        index: u32,
        start: u32,
        count: u32,
        data: &[u8],
    ) -> Outcome {
        let mut arg = words(&[20 + data.len() as u32, flags, index, start, count]);
        arg.extend(data);
        self.ioctl(device, SET_IRQS, &mut arg)
    }
}
