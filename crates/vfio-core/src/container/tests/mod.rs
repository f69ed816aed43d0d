//! What a client sees of a container, errno by errno.

mod dma;
mod groups;
mod map;
mod model;
mod unmap;

use super::{Attached, Container};
use crate::device::{Dma, GroupType, Registration};
use crate::iommufd::testing::{PAGE, Pages, Seen, Us, address, device, of};
use crate::model::{IommuGroup, IommuGroups, X86_MSI};
use crate::{Config, Core, Errno, Result};
use std::sync::Arc;
use vfio_uapi::caps::IovaRange;
use vfio_uapi::container::*;
use vfio_uapi::ioctl;
use zerocopy::{FromBytes, Immutable, IntoBytes};

const R: MapFlags = MapFlags::READ;
const W: MapFlags = MapFlags::WRITE;
const RW: MapFlags = R.union(W);
const VADDR: MapFlags = MapFlags::VADDR;

/// A client with one container, and groups to put into it.
struct Client {
    us: Us,
    container: Arc<Container>,
    groups: IommuGroups,
}

impl Client {
    fn new() -> Client {
        Client {
            us: Us::default(),
            container: Container::new(),
            groups: IommuGroups::new(0),
        }
    }

    /// With a software device's group, and a backend.
    fn emulated(version: u32) -> (Client, Attached) {
        let c = Client::new();
        let attached = c.join_emulated();
        c.set_iommu(version).unwrap();
        (c, attached)
    }

    fn join_emulated(&self) -> Attached {
        let group = self.groups.create(Some("vfio-noiommu")).unwrap();
        self.container.attach(&group, GroupType::Emulated).unwrap()
    }

    fn hardware(&self) -> Arc<IommuGroup> {
        self.groups.create_with(None, &[X86_MSI]).unwrap()
    }

    fn join(&self, group: &Arc<IommuGroup>) -> Result<Attached> {
        self.container.attach(group, GroupType::Physical)
    }

    fn call<T>(&self, cmd: u32, arg: &mut T) -> Result<u32>
    where
        T: FromBytes + IntoBytes + Immutable,
    {
        let mut bytes = arg.as_bytes().to_vec();
        let done = self
            .container
            .ioctl(cmd, address(bytes.as_mut_slice()), &self.us);
        *arg = T::read_from_bytes(std::hint::black_box(&bytes)).unwrap();
        done
    }

    fn value(&self, cmd: u32, value: u64) -> Result<u32> {
        self.container.ioctl(cmd, value, &self.us)
    }

    fn check_extension(&self, number: u64) -> u32 {
        self.value(ioctl::VFIO_CHECK_EXTENSION, number).unwrap()
    }

    fn set_iommu(&self, number: u32) -> Result<u32> {
        self.value(ioctl::VFIO_SET_IOMMU, number.into())
    }

    fn map(&self, flags: MapFlags, vaddr: u64, iova: u64, size: u64) -> Result<u32> {
        self.call(
            ioctl::VFIO_IOMMU_MAP_DMA,
            &mut map_arg(flags, vaddr, iova, size),
        )
    }

    fn unmap_with(&self, flags: UnmapFlags, iova: u64, size: u64) -> Result<u64> {
        let mut arg = DmaUnmap {
            argsz: 24,
            flags,
            iova,
            size,
        };
        self.call(ioctl::VFIO_IOMMU_UNMAP_DMA, &mut arg)
            .inspect_err(|_| assert_eq!(arg.size, size, "nothing is written back on error"))?;
        Ok(arg.size)
    }

    fn unmap(&self, iova: u64, size: u64) -> Result<u64> {
        self.unmap_with(UnmapFlags::empty(), iova, size)
    }

    /// UNMAP with a bitmap: bytes gone.
    fn unmap_dirty(&self, iova: u64, size: u64, words: &mut [u64]) -> Result<u64> {
        let mut arg = WithBitmap {
            unmap: DmaUnmap {
                argsz: 48,
                flags: UnmapFlags::GET_DIRTY_BITMAP,
                iova,
                size,
            },
            bitmap: bitmap(words),
        };
        self.call(ioctl::VFIO_IOMMU_UNMAP_DMA, &mut arg)?;
        std::hint::black_box(words);
        Ok(arg.unmap.size)
    }

    fn dirty(&self, flags: DirtyFlags) -> Result<u32> {
        let mut arg = DirtyBitmap { argsz: 8, flags };
        self.call(ioctl::VFIO_IOMMU_DIRTY_PAGES, &mut arg)
    }

    fn get_dirty(&self, iova: u64, size: u64, words: &mut [u64]) -> Result<u32> {
        let mut arg = get_arg(iova, size, words);
        let done = self.call(ioctl::VFIO_IOMMU_DIRTY_PAGES, &mut arg);
        std::hint::black_box(words);
        done
    }

    /// GET_INFO with so much room: the structure and what follows it.
    fn info(&self, argsz: u32) -> Result<(Info, Vec<u8>)> {
        let mut bytes = vec![0xee_u8; 4096];
        bytes[..4].copy_from_slice(&argsz.to_ne_bytes());
        let at = address(bytes.as_mut_slice());
        self.container
            .ioctl(ioctl::VFIO_IOMMU_GET_INFO, at, &self.us)?;
        let bytes = std::hint::black_box(bytes);
        let (info, rest) = Info::read_from_prefix(&bytes).unwrap();
        Ok((info, rest.to_vec()))
    }
}

/// UNMAP's structure and the bitmap behind it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct WithBitmap {
    unmap: DmaUnmap,
    bitmap: Bitmap,
}

/// DIRTY_PAGES' structure and what GET_BITMAP has behind it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct GetBitmap {
    dirty: DirtyBitmap,
    get: DirtyBitmapGet,
}

fn bitmap(words: &mut [u64]) -> Bitmap {
    Bitmap {
        pgsize: PAGE,
        size: 8 * words.len() as u64,
        data: address(words),
    }
}

fn get_arg(iova: u64, size: u64, words: &mut [u64]) -> GetBitmap {
    GetBitmap {
        dirty: DirtyBitmap {
            argsz: 48,
            flags: DirtyFlags::GET_BITMAP,
        },
        get: DirtyBitmapGet {
            iova,
            size,
            bitmap: bitmap(words),
        },
    }
}

fn map_arg(flags: MapFlags, vaddr: u64, iova: u64, size: u64) -> DmaMap {
    DmaMap {
        argsz: 32,
        flags,
        vaddr,
        iova,
        size,
    }
}

/// An open device of a group in a container. Dropping it is the last close.
struct Opened {
    _session: Box<dyn std::any::Any + Send + Sync>,
    dma: Dma,
    seen: Arc<Seen>,
    _registration: Registration,
    _core: Core,
}

impl Opened {
    /// A software device, or one of hardware.
    fn new(attached: &Attached, hardware: Option<&Arc<IommuGroup>>) -> Opened {
        let core = Core::new(Config::default());
        let (registration, seen) = device(&core, "card", hardware);
        let open = &mut || attached.open(of(&registration)).map(Some);
        let session = Arc::clone(&of(&registration).0).open(true, open).unwrap();
        let dma = seen.dma.lock().unwrap().clone().unwrap();
        Opened {
            _session: Box::new(session),
            dma,
            seen,
            _registration: registration,
            _core: core,
        }
    }

    fn read(&self, iova: u64) -> Result<u8> {
        let mut buf = [0];
        self.dma.read(iova, &mut buf)?;
        Ok(buf[0])
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result {
        self.dma.write(iova, data)
    }
}
