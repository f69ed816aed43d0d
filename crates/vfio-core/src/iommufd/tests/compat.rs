//! The file as a container.

use super::*;
use crate::iommufd::compat::Joined;
use crate::iommufd::testing::{ReadOnly, Seen, device, of};
use crate::model::{IommuGroups, X86_MSI};
use crate::{Config, Core};
use vfio_uapi::caps::{ArrayCap, DmaAvailCap, IovaRange};
use vfio_uapi::container::{
    DirtyBitmap, DirtyFlags, DmaMap, DmaUnmap, Info, InfoFlags, MapFlags, UnmapFlags,
};
use zerocopy::FromBytes;

const R: MapFlags = MapFlags::READ;
const W: MapFlags = MapFlags::WRITE;
const NONE: MapFlags = MapFlags::empty();

impl Client {
    fn value(&self, cmd: u32, value: u64) -> Result<u32> {
        self.ctx.ioctl(cmd, value, &self.us)
    }

    fn set_iommu(&self, number: u64) -> Result<u32> {
        self.value(ioctl::VFIO_SET_IOMMU, number)
    }

    fn check_extension(&self, number: u64) -> Result<u32> {
        self.value(ioctl::VFIO_CHECK_EXTENSION, number)
    }

    fn map_dma(&self, flags: MapFlags, vaddr: u64, iova: u64, size: u64) -> Result<u32> {
        let mut arg = DmaMap {
            argsz: 32,
            flags,
            vaddr,
            iova,
            size,
        };
        self.call(ioctl::VFIO_IOMMU_MAP_DMA, &mut arg)
    }

    /// The result, and the size in the structure afterwards.
    fn unmap_dma(&self, flags: UnmapFlags, iova: u64, size: u64) -> (Result<u32>, u64) {
        let mut arg = DmaUnmap {
            argsz: 24,
            flags,
            iova,
            size,
        };
        let done = self.call(ioctl::VFIO_IOMMU_UNMAP_DMA, &mut arg);
        (done, arg.size)
    }

    /// Bytes gone.
    fn unmap_range(&self, iova: u64, size: u64) -> Result<u64> {
        let (done, size) = self.unmap_dma(UnmapFlags::empty(), iova, size);
        done.map(|_| size)
    }

    fn info(&self, argsz: u32) -> Result<(Info, Vec<u8>)> {
        let mut bytes = vec![0xee_u8; 4096];
        bytes[..4].copy_from_slice(&argsz.to_ne_bytes());
        let at = address(bytes.as_mut_slice());
        self.ctx.ioctl(ioctl::VFIO_IOMMU_GET_INFO, at, &self.us)?;
        let bytes = std::hint::black_box(bytes);
        let (info, rest) = Info::read_from_prefix(&bytes).unwrap();
        Ok((info, rest.to_vec()))
    }

    fn vfio_ioas(&self, op: u16, ioas_id: u32) -> Result<u32> {
        let mut arg = VfioIoas {
            size: 12,
            ioas_id,
            op,
            reserved: 0,
        };
        self.call(ioctl::IOMMU_VFIO_IOAS, &mut arg)?;
        Ok(arg.ioas_id)
    }

    /// With a container's IOAS.
    fn container() -> (Client, Joined) {
        let c = Client::new();
        let joined = c.ctx.compat_join().unwrap();
        (c, joined)
    }
}

/// A software device opened through the container.
struct Opened {
    _session: Box<dyn std::any::Any + Send + Sync>,
    _registration: crate::device::Registration,
    _core: Core,
    seen: Arc<Seen>,
}

impl Opened {
    fn new(joined: &Joined) -> Result<Opened> {
        let core = Core::new(Config::default());
        let (registration, seen) = device(&core, "card", None);
        let open = &mut || joined.open(of(&registration)).map(Some);
        let session = Arc::clone(&of(&registration).0).open(true, open)?;
        Ok(Opened {
            _session: Box::new(session),
            _registration: registration,
            _core: core,
            seen,
        })
    }

    fn read(&self, iova: u64) -> Result<u8> {
        let dma = self.seen.dma.lock().unwrap().clone().unwrap();
        byte(&*dma.space, iova)
    }
}

#[test]
fn without_an_ioas() {
    let c = Client::new();
    assert_eq!(c.value(ioctl::VFIO_GET_API_VERSION, 0), Ok(0));
    for number in 0..12 {
        let want = match number {
            1 | 3 | 9 => Ok(1),
            4 => Err(Errno::NODEV),
            _ => Ok(0),
        };
        assert_eq!(c.check_extension(number), want, "{number}");
    }
    for number in [0, 2, 4, 8, 9, 10, 1 << 32 | 1] {
        assert_eq!(c.set_iommu(number), Err(Errno::INVAL), "{number}");
    }
    for number in [1, 3] {
        assert_eq!(c.set_iommu(number), Err(Errno::NODEV), "{number}");
    }
    // What is wrong with the argument comes first.
    assert_eq!(c.info(15).unwrap_err(), Errno::INVAL);
    assert_eq!(c.info(16).unwrap_err(), Errno::NODEV);
    assert_eq!(c.map_dma(MapFlags::VADDR, 0, 0, 0), Err(Errno::INVAL));
    assert_eq!(c.map_dma(R, 1, 1, 0), Err(Errno::NODEV));
    let (done, _) = c.unmap_dma(UnmapFlags::VADDR, 0, 0);
    assert_eq!(done, Err(Errno::INVAL));
    let (done, size) = c.unmap_dma(UnmapFlags::ALL, 1, 7);
    assert_eq!((done, size), (Err(Errno::NODEV), 7));
    for cmd in [
        ioctl::VFIO_IOMMU_GET_INFO,
        ioctl::VFIO_IOMMU_MAP_DMA,
        ioctl::VFIO_IOMMU_UNMAP_DMA,
    ] {
        assert_eq!(c.value(cmd, 8), Err(Errno::FAULT));
    }
    for cmd in [
        ioctl::VFIO_IOMMU_DIRTY_PAGES,
        ioctl::VFIO_IOMMU_ENABLE,
        ioctl::VFIO_GROUP_GET_STATUS,
        77,
    ] {
        assert_eq!(c.value(cmd, 0), Err(Errno::NOTTY), "{cmd:#x}");
    }
}

#[test]
fn which_ioas() {
    let c = Client::new();
    assert_eq!(c.vfio_ioas(vfio_ioas_op::GET, 0), Err(Errno::NODEV));
    assert_eq!(c.vfio_ioas(vfio_ioas_op::SET, 1), Err(Errno::NOENT));
    assert_eq!(c.vfio_ioas(vfio_ioas_op::CLEAR, 1), Ok(1));
    assert_eq!(c.vfio_ioas(3, 0), Err(Errno::OPNOTSUPP));
    // One that the client has chosen is not replaced.
    let mine = c.ioas();
    c.vfio_ioas(vfio_ioas_op::SET, mine).unwrap();
    let joined = c.ctx.compat_join().unwrap();
    assert_eq!(c.vfio_ioas(vfio_ioas_op::GET, 0), Ok(mine));
    c.map_dma(R, PAGE, 0, PAGE).unwrap();
    assert_eq!(c.unmap(mine, 0, PAGE), Ok(PAGE), "the same IOAS");
    c.vfio_ioas(vfio_ioas_op::CLEAR, 0).unwrap();
    assert_eq!(Opened::new(&joined).err(), Some(Errno::NODEV));
    assert_eq!(c.set_iommu(3), Err(Errno::NODEV));
    // Else one is made, which can be destroyed.
    let _again = c.ctx.compat_join().unwrap();
    let made = c.vfio_ioas(vfio_ioas_op::GET, 0).unwrap();
    assert_ne!(made, mine);
    c.map_dma(R, PAGE, 0, PAGE).unwrap();
    c.destroy(made).unwrap();
    assert_eq!(c.vfio_ioas(vfio_ioas_op::GET, 0), Err(Errno::NODEV));
    c.vfio_ioas(vfio_ioas_op::SET, mine).unwrap();
    let opened = Opened::new(&joined).unwrap();
    assert_eq!(c.destroy(mine), Err(Errno::BUSY));
    drop(opened);
    c.destroy(mine).unwrap();
}

#[test]
fn a_group_outlives_the_file() {
    let (c, joined) = Client::container();
    let mut memory = Pages::new(1);
    memory.bytes()[0] = 6;
    c.map_dma(R, memory.addr(), 0, PAGE).unwrap();
    c.ctx.close();
    let opened = Opened::new(&joined).unwrap();
    drop(joined);
    assert_eq!(opened.read(0), Ok(6), "nor does a device need the group");
    drop(opened);
    assert!(c.ctx.table().entries.is_empty());
}

#[test]
fn set_iommu_and_extensions() {
    let (c, _joined) = Client::container();
    assert_eq!(c.check_extension(4), Ok(1));
    for number in [3, 1, 1, 3, 3] {
        assert_eq!(c.set_iommu(number), Ok(0));
    }
    // Splitting needs what a filled page table does not have.
    let core = Core::new(Config::default());
    let group = IommuGroups::new(0).create(None).unwrap();
    let (registered, _) = device(&core, "hard", Some(&group));
    let other = Client::new();
    let joined = other.ctx.compat_join().unwrap();
    let mut memory = Pages::new(1);
    other.map_dma(R, memory.addr(), 0, PAGE).unwrap();
    let _binding = joined.open(of(&registered)).unwrap();
    assert_eq!(other.set_iommu(1), Err(Errno::INVAL));
    assert_eq!(other.set_iommu(3), Ok(0));
}

#[test]
fn info() {
    let (c, joined) = Client::container();
    let mut cases = Vec::new();
    for argsz in [16, 24, 35, 36, 39, 40, 55, 56, 71, 72, 73, 4096] {
        cases.push((argsz, c.info(argsz).unwrap()));
    }
    for (argsz, (info, rest)) in cases {
        assert_eq!(info.argsz, 72, "always the whole");
        assert_eq!(info.flags, InfoFlags::PGSIZES | InfoFlags::CAPS);
        assert_eq!(info.iova_pgsizes, 0xffff_ffff_ffff_f000);
        if argsz >= 24 {
            let offset = if argsz >= 72 { 24 } else { 0 };
            assert_eq!(info.cap_offset, offset, "{argsz}");
        }
        let avail = DmaAvailCap::read_from_prefix(&rest).unwrap().0;
        if argsz >= 36 {
            assert_eq!((avail.header.id, avail.avail), (3, u32::MAX), "{argsz}");
        } else {
            assert_eq!(avail.avail, 0xeeee_eeee, "{argsz}");
        }
        if argsz >= 40 {
            assert_eq!(avail.header.next, 40, "{argsz}");
        }
        let (ranges, rest) = ArrayCap::read_from_prefix(&rest[16..]).unwrap();
        let range = IovaRange::read_from_prefix(rest).unwrap().0;
        if argsz >= 72 {
            assert_eq!((ranges.header.id, ranges.header.next), (1, 0));
            assert_eq!(ranges.count, 1);
            assert_eq!((range.start, range.end), (0, u64::MAX));
        } else {
            assert_eq!(ranges.count, 0xeeee_eeee, "{argsz}");
        }
        assert!(rest[16..].iter().all(|byte| *byte == 0xee));
    }
    // With hardware two ranges.
    let core = Core::new(Config::default());
    let groups = IommuGroups::new(0);
    let group = groups.create_with(None, &[X86_MSI]).unwrap();
    let (registered, _) = device(&core, "hard", Some(&group));
    let _binding = joined.open(of(&registered)).unwrap();
    let (info, rest) = c.info(100).unwrap();
    assert_eq!((info.argsz, info.iova_pgsizes), (88, 0x4020_1000));
    let (ranges, rest) = ArrayCap::read_from_prefix(&rest[16..]).unwrap();
    assert_eq!(ranges.count, 2);
    let first = IovaRange::read_from_prefix(rest).unwrap().0;
    assert_eq!((first.start, first.end), (0, 0xfedf_ffff));
}

#[test]
fn map_errnos() {
    let (c, joined) = Client::container();
    let mut memory = Pages::new(4);
    let va = memory.addr();
    c.map_dma(R, va, 4 * PAGE, PAGE).unwrap();
    for (flags, vaddr, iova, size, want) in [
        (MapFlags::VADDR, u64::MAX, 0, 2, Errno::INVAL),
        (MapFlags::from_bits_retain(8), va, 0, PAGE, Errno::INVAL),
        (R, u64::MAX, u64::MAX, 2, Errno::OVERFLOW),
        (R, va, u64::MAX, 2, Errno::OVERFLOW),
        (R, va, u64::MAX, 0, Errno::INVAL),
        (R, va, 4 * PAGE + 5, 1, Errno::EXIST),
        (NONE, va, 4 * PAGE, PAGE, Errno::EXIST),
    ] {
        let got = c.map_dma(flags, vaddr, iova, size);
        assert_eq!(got, Err(want), "{flags:?} {vaddr:#x} {iova:#x} {size:#x}");
    }
    // Without permissions; and bytes, as long as nothing is attached.
    c.map_dma(NONE, va, 0, PAGE).unwrap();
    c.map_dma(W, va + 3, PAGE + 1, 5).unwrap();
    assert_eq!(Opened::new(&joined).err(), Some(Errno::ADDRINUSE));
    assert_eq!(c.set_iommu(1), Err(Errno::ADDRINUSE));
    assert_eq!(c.unmap_range(PAGE + 1, 5), Ok(5));
    let opened = Opened::new(&joined).unwrap();
    assert_eq!(opened.read(0), Err(Errno::PERM));
    assert_eq!(opened.read(2 * PAGE), Err(Errno::NOENT), "as an IOAS");
    for (vaddr, iova, size) in [(va + 1, PAGE, PAGE), (va, PAGE + 1, PAGE), (va, PAGE, 1)] {
        assert_eq!(c.map_dma(R, vaddr, iova, size), Err(Errno::INVAL));
    }
    drop(opened);
    // The first version wants pages even then.
    c.set_iommu(1).unwrap();
    assert_eq!(c.map_dma(R, va, PAGE, 1), Err(Errno::INVAL));
}

#[test]
fn there_is_no_entry_limit() {
    let (c, _joined) = Client::container();
    for n in 0..100 {
        c.map_dma(R, PAGE, n * PAGE, PAGE).unwrap();
    }
    let (_, rest) = c.info(100).unwrap();
    let avail = DmaAvailCap::read_from_prefix(&rest).unwrap().0;
    assert_eq!(avail.avail, u32::MAX);
}

#[test]
fn unmap_errnos() {
    let (c, _joined) = Client::container();
    let map = || {
        c.map_dma(R, PAGE, 0, 2 * PAGE).unwrap();
        c.map_dma(R, PAGE, 2 * PAGE, 2 * PAGE).unwrap();
    };
    map();
    for (flags, iova, size, want) in [
        // Nothing is written back.
        (UnmapFlags::VADDR, 0, 2 * PAGE, (Errno::INVAL, 2 * PAGE)),
        (UnmapFlags::GET_DIRTY_BITMAP, 0, 7, (Errno::INVAL, 7)),
        (UnmapFlags::from_bits_retain(8), 0, 7, (Errno::INVAL, 7)),
        (UnmapFlags::ALL, 0, 7, (Errno::INVAL, 7)),
        (UnmapFlags::ALL, 7, 0, (Errno::INVAL, 0)),
        // What is gone is.
        (UnmapFlags::empty(), 0, 0, (Errno::INVAL, 0)),
        (UnmapFlags::empty(), u64::MAX, 2, (Errno::OVERFLOW, 0)),
        (UnmapFlags::empty(), PAGE, PAGE, (Errno::NOENT, 0)),
        (UnmapFlags::empty(), 0, PAGE, (Errno::NOENT, 0)),
        (UnmapFlags::empty(), 0, 3 * PAGE, (Errno::NOENT, 2 * PAGE)),
    ] {
        let (done, left) = c.unmap_dma(flags, iova, size);
        assert_eq!((done.unwrap_err(), left), want, "{flags:?} {iova:#x}");
    }
    assert_eq!(c.unmap_range(0, 2 * PAGE), Ok(0), "the first is gone");
    assert_eq!(c.unmap_range(1, 3), Ok(0), "misaligned, and nothing there");
    assert_eq!(c.unmap_range(0, 4 * PAGE), Ok(2 * PAGE));
    map();
    let (done, gone) = c.unmap_dma(UnmapFlags::ALL, 0, 0);
    assert_eq!((done, gone), (Ok(0), 4 * PAGE));
    let (done, gone) = c.unmap_dma(UnmapFlags::ALL, 0, 0);
    assert_eq!((done, gone), (Ok(0), 0));
    // A result that cannot be written, after the fact.
    map();
    let arg = Box::leak(Box::new(DmaUnmap {
        argsz: 24,
        flags: UnmapFlags::ALL,
        iova: 0,
        size: 0,
    }));
    let at = address(arg);
    let done = c
        .ctx
        .ioctl(ioctl::VFIO_IOMMU_UNMAP_DMA, at, &ReadOnly(&c.us));
    assert_eq!(done, Err(Errno::FAULT));
    assert_eq!(c.unmap_range(0, 4 * PAGE), Ok(0));
}

#[test]
fn v1_splits_mappings() {
    let (c, joined) = Client::container();
    c.set_iommu(1).unwrap();
    let mut memory = Pages::new(8);
    let va = memory.addr();
    for (page, n) in memory.bytes().chunks_mut(4096).zip(0..) {
        page.fill(n);
    }
    let opened = Opened::new(&joined).unwrap();
    c.map_dma(R, va, 8 * PAGE, 8 * PAGE).unwrap();
    assert_eq!(c.unmap_range(10 * PAGE, 2 * PAGE), Ok(2 * PAGE));
    let pages: Vec<_> = (8..16).map(|n| opened.read(n * PAGE).ok()).collect();
    let want = [0, 1, 9, 9, 4, 5, 6, 7].map(|n| (n != 9).then_some(n));
    assert_eq!(pages, want);
    // Across the hole, both ends cut.
    assert_eq!(c.unmap_range(9 * PAGE, 4 * PAGE), Ok(2 * PAGE));
    assert_eq!(opened.read(8 * PAGE), Ok(0));
    assert_eq!(opened.read(13 * PAGE), Ok(5));
    // Not in the middle of a page.
    let (done, size) = c.unmap_dma(UnmapFlags::empty(), 14 * PAGE, 5);
    assert_eq!((done, size), (Err(Errno::INVAL), 5));
    let (done, gone) = c.unmap_dma(UnmapFlags::ALL, 0, 0);
    assert_eq!((done, gone), (Ok(0), 4 * PAGE));
    let told = std::mem::take(&mut *opened.seen.unmaps.lock().unwrap());
    let part = |n: u64, pages: u64| (n * PAGE, pages * PAGE);
    assert_eq!(
        *told,
        [
            part(10, 2),
            part(9, 1),
            part(12, 1),
            part(8, 1),
            part(13, 3)
        ]
    );
    // From the first address of all.
    c.map_dma(R, va, 0, 2 * PAGE).unwrap();
    assert_eq!(c.unmap_range(0, PAGE), Ok(PAGE));
    assert_eq!(c.unmap_range(PAGE, PAGE), Ok(PAGE));
}

#[test]
fn no_dirty_pages() {
    let (c, _joined) = Client::container();
    c.set_iommu(3).unwrap();
    let mut arg = DirtyBitmap {
        argsz: 8,
        flags: DirtyFlags::START,
    };
    let done = c.call(ioctl::VFIO_IOMMU_DIRTY_PAGES, &mut arg);
    assert_eq!(done, Err(Errno::NOTTY));
}

#[test]
fn a_device_of_a_group_is_attached_while_it_is_open() {
    let (c, joined) = Client::container();
    let core = Core::new(Config::default());
    let group = IommuGroups::new(0).create(None).unwrap();
    let (registered, _) = device(&core, "hard", Some(&group));
    let binding = joined.open(of(&registered)).unwrap();
    assert_eq!(binding.devid(), 0);
    assert_eq!(binding.attach(1), Err(Errno::NOTTY));
    binding.detach();
    let compat = c.vfio_ioas(vfio_ioas_op::GET, 0).unwrap();
    assert_eq!(c.destroy(compat), Err(Errno::BUSY), "still attached");
    let elsewhere = Client::container();
    let second = elsewhere.1.open(of(&registered));
    assert_eq!(
        second.err(),
        Some(Errno::PERM),
        "its DMA is another context's"
    );
    drop(binding);
    c.destroy(compat).unwrap();
}
