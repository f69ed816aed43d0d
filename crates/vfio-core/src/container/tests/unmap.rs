//! UNMAP_DMA and DIRTY_PAGES.

use super::*;

const ALL: UnmapFlags = UnmapFlags::ALL;
const LOSE: UnmapFlags = UnmapFlags::VADDR;

#[test]
fn errnos_in_order() {
    let (c, _attached) = Client::emulated(3);
    c.map(R, PAGE, 0, 4 * PAGE).unwrap();
    let nowhere = c.value(ioctl::VFIO_IOMMU_UNMAP_DMA, 16);
    assert_eq!(nowhere, Err(Errno::FAULT));
    let mut short = DmaUnmap {
        argsz: 23,
        flags: LOSE,
        iova: 1,
        size: 0,
    };
    let short = c.call(ioctl::VFIO_IOMMU_UNMAP_DMA, &mut short);
    assert_eq!(short, Err(Errno::INVAL));
    let none = UnmapFlags::empty();
    for (flags, iova, size, want) in [
        (UnmapFlags::from_bits_retain(8), 0, 4 * PAGE, Errno::INVAL),
        (UnmapFlags::from_bits_retain(8) | LOSE, 1, 0, Errno::INVAL),
        // Software devices, before anything about the range.
        (LOSE, 1, 0, Errno::BUSY),
        (LOSE | ALL, 0, 0, Errno::BUSY),
        (none, 1, 4 * PAGE, Errno::INVAL),
        (none, 1, u64::MAX, Errno::INVAL),
        (ALL, PAGE, 0, Errno::INVAL),
        (ALL, 0, PAGE, Errno::INVAL),
        (none, 0, 0, Errno::INVAL),
        (none, 0, 1, Errno::INVAL),
        (none, u64::MAX - PAGE + 1, 2 * PAGE, Errno::OVERFLOW),
        // Cuts a mapping.
        (none, 0, PAGE, Errno::INVAL),
        (none, PAGE, PAGE, Errno::INVAL),
        (none, 3 * PAGE, 2 * PAGE, Errno::INVAL),
    ] {
        let got = c.unmap_with(flags, iova, size);
        assert_eq!(got, Err(want), "{flags:?} {iova:#x} {size:#x}");
    }
    assert_eq!(c.unmap(8 * PAGE, PAGE), Ok(0), "nothing there");
    assert_eq!(c.unmap(0, 4 * PAGE), Ok(4 * PAGE));
    assert_eq!(c.unmap_with(ALL, 0, 0), Ok(0));
}

#[test]
fn bitmap_errnos_in_order() {
    let c = Client::new();
    let _attached = c.join(&c.hardware()).unwrap();
    c.set_iommu(3).unwrap();
    let mut memory = Pages::new(1);
    c.map(R, memory.addr(), 0, PAGE).unwrap();
    let mut words = [0u64; 1];
    let good = WithBitmap {
        unmap: DmaUnmap {
            argsz: 48,
            flags: UnmapFlags::GET_DIRTY_BITMAP,
            iova: 0,
            size: PAGE,
        },
        bitmap: bitmap(&mut words),
    };
    let check = |change: &dyn Fn(&mut WithBitmap), want: Errno| {
        let mut arg = good;
        change(&mut arg);
        let got = c.call(ioctl::VFIO_IOMMU_UNMAP_DMA, &mut arg);
        assert_eq!(got, Err(want), "{arg:?}");
    };
    for flags in [ALL, LOSE] {
        check(&|arg| arg.unmap.flags |= flags, Errno::INVAL);
    }
    check(&|arg| arg.unmap.argsz = 47, Errno::INVAL);
    for (data, size) in [(1 << 63, 8), (u64::MAX, 8)] {
        check(
            &|arg| (arg.bitmap.data, arg.bitmap.size) = (data, size),
            Errno::INVAL,
        );
    }
    for pgsize in [0, 2 * PAGE] {
        check(&|arg| arg.bitmap.pgsize = pgsize, Errno::INVAL);
    }
    for size in [0, 7, (256 << 20) + 1] {
        check(&|arg| arg.bitmap.size = size, Errno::INVAL);
    }
    check(&|arg| arg.unmap.size = 65 * PAGE, Errno::INVAL);
    check(&|arg| arg.unmap.iova = 1, Errno::INVAL);
    check(&|arg| arg.unmap.iova = u64::MAX - PAGE + 1, Errno::INVAL);
    check(&|_| {}, Errno::INVAL);
    c.dirty(DirtyFlags::START).unwrap();
    check(&|arg| arg.unmap.size = 2 * PAGE + 1, Errno::INVAL);
    check(
        &|arg| (arg.unmap.iova, arg.unmap.size) = (u64::MAX - PAGE + 1, 2 * PAGE),
        Errno::OVERFLOW,
    );
    check(
        &|arg| (arg.bitmap.pgsize, arg.bitmap.size) = (512, 8),
        Errno::INVAL,
    );
    check(&|arg| arg.bitmap.data = 64, Errno::FAULT);
    let mut arg = good;
    assert_eq!(c.call(ioctl::VFIO_IOMMU_UNMAP_DMA, &mut arg), Ok(0));
    assert_eq!(arg.unmap.size, PAGE);
    assert_eq!(std::hint::black_box(words), [1], "hardware: all is dirty");
}

#[test]
fn v1_takes_whole_mappings() {
    let (c, _attached) = Client::emulated(1);
    c.map(R, PAGE, 4 * PAGE, 2 * PAGE).unwrap();
    c.map(R, PAGE, 8 * PAGE, 2 * PAGE).unwrap();
    c.map(R, PAGE, 10 * PAGE, PAGE).unwrap();
    assert_eq!(c.unmap(5 * PAGE, PAGE), Ok(0), "not its first page");
    assert_eq!(c.unmap(5 * PAGE, 100 * PAGE), Ok(0), "stops at the first");
    assert_eq!(c.unmap(4 * PAGE, PAGE), Ok(2 * PAGE));
    assert_eq!(
        c.unmap(4 * PAGE, 5 * PAGE),
        Ok(2 * PAGE),
        "the last one whole"
    );
    assert_eq!(c.unmap(0, u64::MAX - PAGE + 1), Ok(PAGE));
    assert_eq!(c.dirty(DirtyFlags::START), Err(Errno::ACCESS));
    let nowhere = c.value(ioctl::VFIO_IOMMU_DIRTY_PAGES, 1);
    assert_eq!(nowhere, Err(Errno::ACCESS));
}

#[test]
fn v2_takes_what_is_covered() {
    let (c, attached) = Client::emulated(3);
    for n in 0..4 {
        c.map(R, PAGE, n * 2 * PAGE, 2 * PAGE).unwrap();
    }
    let device = Opened::new(&attached, None);
    assert_eq!(c.unmap(0, 3 * PAGE), Err(Errno::INVAL));
    assert_eq!(c.unmap(PAGE, 3 * PAGE), Err(Errno::INVAL));
    assert!(
        device.seen.unmaps.lock().unwrap().is_empty(),
        "nothing is gone"
    );
    assert_eq!(c.unmap(2 * PAGE, 4 * PAGE), Ok(4 * PAGE));
    let told = std::mem::take(&mut *device.seen.unmaps.lock().unwrap());
    let mapping = |n| (n * PAGE, 2 * PAGE);
    assert_eq!(told, [mapping(2), mapping(4)], "each with all of it");
    assert_eq!(c.unmap_with(ALL, 0, 0), Ok(4 * PAGE));
    let told = std::mem::take(&mut *device.seen.unmaps.lock().unwrap());
    assert_eq!(told, [mapping(0), mapping(6)]);
}

#[test]
fn invalidating() {
    let c = Client::new();
    let attached = c.join(&c.hardware()).unwrap();
    c.set_iommu(3).unwrap();
    let mut memory = Pages::new(4);
    let va = memory.addr();
    for n in 0..3 {
        c.map(R, va, n * PAGE, PAGE).unwrap();
    }
    assert_eq!(c.unmap_with(LOSE, PAGE, PAGE), Ok(PAGE));
    // One that has lost it: nothing changes.
    assert_eq!(c.unmap_with(LOSE, 0, 3 * PAGE), Err(Errno::INVAL));
    assert_eq!(c.map(VADDR, va, 0, PAGE), Err(Errno::INVAL));
    assert_eq!(c.map(VADDR, va, PAGE, PAGE), Ok(0));
    assert_eq!(c.unmap_with(LOSE | ALL, 0, 0), Ok(3 * PAGE));
    assert_eq!(c.unmap_with(LOSE, 16 * PAGE, PAGE), Ok(0));
    for n in 0..3 {
        c.map(VADDR, va + PAGE, n * PAGE, PAGE).unwrap();
    }
    let emulated = c.join_emulated();
    assert_eq!(c.unmap_with(LOSE, 0, PAGE), Err(Errno::BUSY));
    drop((attached, emulated));
}

#[test]
fn dirty_errnos_in_order() {
    let (c, _attached) = Client::emulated(3);
    c.map(R, PAGE, 0, 4 * PAGE).unwrap();
    let nowhere = c.value(ioctl::VFIO_IOMMU_DIRTY_PAGES, 1);
    assert_eq!(nowhere, Err(Errno::FAULT));
    let mut short = DirtyBitmap {
        argsz: 7,
        flags: DirtyFlags::START,
    };
    let short = c.call(ioctl::VFIO_IOMMU_DIRTY_PAGES, &mut short);
    assert_eq!(short, Err(Errno::INVAL));
    for bits in [0, 3, 5, 6, 7, 8, 9] {
        let got = c.dirty(DirtyFlags::from_bits_retain(bits));
        assert_eq!(got, Err(Errno::INVAL), "{bits}");
    }
    assert_eq!(c.dirty(DirtyFlags::STOP), Ok(0), "even if not started");
    let mut words = [0u64; 1];
    let good = get_arg(0, 4 * PAGE, &mut words);
    let check = |change: &dyn Fn(&mut GetBitmap), want: Errno| {
        let mut arg = good;
        change(&mut arg);
        let got = c.call(ioctl::VFIO_IOMMU_DIRTY_PAGES, &mut arg);
        assert_eq!(got, Err(want), "{arg:?}");
    };
    check(&|arg| arg.dirty.argsz = 47, Errno::INVAL);
    check(&|_| {}, Errno::INVAL);
    for _ in 0..2 {
        assert_eq!(c.dirty(DirtyFlags::START), Ok(0), "as often as one likes");
    }
    check(
        &|arg| (arg.get.iova, arg.get.size, arg.get.bitmap.size) = (u64::MAX, 2, 0),
        Errno::OVERFLOW,
    );
    check(&|arg| arg.get.size = 0, Errno::INVAL);
    for pgsize in [0, 512, 2 * PAGE] {
        check(&|arg| arg.get.bitmap.pgsize = pgsize, Errno::INVAL);
    }
    for size in [0, 7, (256 << 20) + 1] {
        check(&|arg| arg.get.bitmap.size = size, Errno::INVAL);
    }
    check(&|arg| arg.get.bitmap.data = 1 << 63, Errno::INVAL);
    check(&|arg| arg.get.size = 65 * PAGE, Errno::INVAL);
    check(&|arg| arg.get.iova = 1, Errno::INVAL);
    check(&|arg| arg.get.size += 1, Errno::INVAL);
    for (iova, size) in [(0, PAGE), (PAGE, 3 * PAGE), (PAGE, 8 * PAGE)] {
        check(
            &|arg| (arg.get.iova, arg.get.size) = (iova, size),
            Errno::INVAL,
        );
    }
    check(&|arg| arg.get.bitmap.data = 64, Errno::FAULT);
    let mut arg = good;
    assert_eq!(c.call(ioctl::VFIO_IOMMU_DIRTY_PAGES, &mut arg), Ok(0));
    c.dirty(DirtyFlags::STOP).unwrap();
    check(&|_| {}, Errno::INVAL);
}

#[test]
fn dirty_pages_are_those_written_to() {
    let (c, attached) = Client::emulated(3);
    let mut memory = Pages::new(300);
    let va = memory.addr();
    let device = Opened::new(&attached, None);
    c.map(RW, va, 10 * PAGE, 100 * PAGE).unwrap();
    c.map(RW, va, 130 * PAGE, 100 * PAGE).unwrap();
    device.write(10 * PAGE, &[1]).unwrap();
    c.dirty(DirtyFlags::START).unwrap();
    device.write(12 * PAGE + 4095, &[1; 4098]).unwrap();
    device.write(229 * PAGE, &[1]).unwrap();
    device.read(20 * PAGE).unwrap();
    // Bits of holes keep what they were.
    let mut words = [u64::MAX; 4];
    c.get_dirty(0, 256 * PAGE, &mut words).unwrap();
    let bits = |words: &[u64; 4]| {
        let set = |n: &usize| words[n / 64] >> (n % 64) & 1 == 1;
        (0..256).filter(set).collect::<Vec<usize>>()
    };
    let holes = || (0..10).chain(110..130).chain(230..256);
    let mut want: Vec<usize> = holes().chain([12, 13, 14, 229]).collect();
    want.sort_unstable();
    assert_eq!(bits(&words), want);
    // Once.
    let mut words = [0; 4];
    c.get_dirty(0, 256 * PAGE, &mut words).unwrap();
    assert_eq!(words, [0; 4]);
    // What could not be told is told the next time.
    device.write(11 * PAGE, &[1]).unwrap();
    let mut arg = get_arg(0, 256 * PAGE, &mut words);
    arg.get.bitmap.data = 64;
    let told = c.call(ioctl::VFIO_IOMMU_DIRTY_PAGES, &mut arg);
    assert_eq!(told, Err(Errno::FAULT));
    // Counted from the first page asked for.
    let mut words = [0; 2];
    c.get_dirty(10 * PAGE, 100 * PAGE, &mut words).unwrap();
    assert_eq!(words, [2, 0]);
    // A failed write may have moved a part.
    c.map(RW, PAGE, 300 * PAGE, PAGE).unwrap();
    assert_eq!(device.write(300 * PAGE, &[1]), Err(Errno::FAULT));
    let mut words = [0];
    c.get_dirty(300 * PAGE, PAGE, &mut words).unwrap();
    assert_eq!(words, [1]);
    // With the unmap, and not for the next mapping in that place.
    device.write(131 * PAGE, &[1]).unwrap();
    let mut words = [0; 3];
    assert_eq!(
        c.unmap_dirty(10 * PAGE, 190 * PAGE, &mut words),
        Err(Errno::INVAL),
        "cuts one"
    );
    let mut words = [0; 4];
    assert_eq!(
        c.unmap_dirty(10 * PAGE, 220 * PAGE, &mut words),
        Ok(200 * PAGE)
    );
    assert_eq!(words, [0, 1 << (121 - 64), 0, 0]);
    c.map(RW, va, 130 * PAGE, 100 * PAGE).unwrap();
    device.write(140 * PAGE, &[1]).unwrap();
    c.unmap(130 * PAGE, 100 * PAGE).unwrap();
    c.map(RW, va, 130 * PAGE, 100 * PAGE).unwrap();
    let mut words = [0; 2];
    c.get_dirty(130 * PAGE, 100 * PAGE, &mut words).unwrap();
    assert_eq!(words, [0; 2], "new here");
    // STOP forgets.
    device.write(140 * PAGE, &[1]).unwrap();
    c.dirty(DirtyFlags::STOP).unwrap();
    c.dirty(DirtyFlags::START).unwrap();
    c.get_dirty(130 * PAGE, 100 * PAGE, &mut words).unwrap();
    assert_eq!(words, [0; 2]);
    // With hardware in the container everything is.
    let hardware = c.join(&c.hardware()).unwrap_err();
    assert_eq!(hardware, Errno::FAULT, "page 300 is not there");
    c.unmap(300 * PAGE, PAGE).unwrap();
    let hardware = c.join(&c.hardware()).unwrap();
    c.get_dirty(130 * PAGE, 100 * PAGE, &mut words).unwrap();
    assert_eq!(words, [u64::MAX, (1 << 36) - 1]);
    drop(hardware);
    c.get_dirty(130 * PAGE, 100 * PAGE, &mut words).unwrap();
    assert_eq!(words, [0; 2]);
}

#[test]
fn a_bitmap_of_many_pieces() {
    let (c, attached) = Client::emulated(3);
    let device = Opened::new(&attached, None);
    let mut memory = Pages::new(1);
    // 2^21 pages and a half word, from an odd place, one page of it real.
    let pages: u64 = (1 << 21) + 32;
    let first = 77;
    let real = first + (1 << 20) + 5;
    c.map(RW, PAGE, first * PAGE, (real - first) * PAGE)
        .unwrap();
    c.map(RW, memory.addr(), real * PAGE, PAGE).unwrap();
    let rest = first + pages - real - 1;
    c.map(RW, PAGE, (real + 1) * PAGE, rest * PAGE).unwrap();
    c.dirty(DirtyFlags::START).unwrap();
    device.write(real * PAGE, &[1]).unwrap();
    let mut words = vec![0xaa; (pages as usize).div_ceil(64)];
    c.get_dirty(first * PAGE, pages * PAGE, &mut words).unwrap();
    let last = words.pop().unwrap();
    assert_eq!(last, 0xaa & !0xffff_ffff, "its upper half is not asked for");
    for (n, word) in (0..).zip(words) {
        let want = if n == (1 << 20) / 64 { 1 << 5 } else { 0 };
        assert_eq!(word, want, "{n}");
    }
}

/// The kernel does one after the other (`vfio_dma_do_map`, the container's lock).
#[test]
fn an_address_is_not_given_back_to_what_is_being_unmapped() {
    use crate::container::type1::Type1;
    let c = Client::new();
    let attached = c.join(&c.hardware()).unwrap();
    c.set_iommu(3).unwrap();
    let mut memory = Pages::new(1);
    let va = memory.addr();
    c.map(R, va, 0, PAGE).unwrap();
    assert_eq!(c.unmap_with(LOSE, 0, PAGE), Ok(PAGE));
    // An unmap has begun: it waits for accesses, say.
    let backend = c.container.backend().unwrap();
    let range = dma_memory::Range::with_len(0, PAGE).unwrap();
    let area = std::sync::Arc::clone(backend.read().areas.find(0).unwrap().1);
    assert!(area.gate().close());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(30));
            // Nothing has taken its place.
            let mut inner = backend.write();
            let gone = Type1::forget(&mut inner, range);
            drop(inner);
            assert!(std::sync::Arc::ptr_eq(&gone.unwrap().1, &area));
            backend.unmap_ended();
        });
        assert_eq!(c.map(VADDR, va, 0, PAGE), Err(Errno::NOENT));
    });
    drop(attached);
}
