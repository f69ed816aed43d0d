//! MAP_DMA.

use super::*;

/// The first check that fails decides: each case fails all that come after it, too.
#[test]
fn errnos_in_order() {
    let (c, _attached) = Client::emulated(3);
    let mut memory = Pages::new(4);
    let va = memory.addr();
    c.map(R, va, 4 * PAGE, 2 * PAGE).unwrap();
    let nowhere = c.value(ioctl::VFIO_IOMMU_MAP_DMA, 16);
    assert_eq!(nowhere, Err(Errno::FAULT));
    let mut short = map_arg(MapFlags::from_bits_retain(8), 1, 1, 0);
    short.argsz = 31;
    let short = c.call(ioctl::VFIO_IOMMU_MAP_DMA, &mut short);
    assert_eq!(short, Err(Errno::INVAL));
    for (flags, vaddr, iova, size, want) in [
        (MapFlags::from_bits_retain(8), 1, 1, 0, Errno::INVAL),
        (MapFlags::from_bits_retain(8) | R, va, 0, PAGE, Errno::INVAL),
        (MapFlags::empty(), 1, 1, 0, Errno::INVAL),
        // Wraps, with flags that make no sense.
        (MapFlags::empty(), 0, u64::MAX, 2, Errno::OVERFLOW),
        (VADDR | R, u64::MAX, 0, 2, Errno::OVERFLOW),
        (R, va, u64::MAX - PAGE + 1, 2 * PAGE, Errno::OVERFLOW),
        // Flags, misaligned.
        (VADDR | R, va + 1, 0, PAGE, Errno::INVAL),
        (VADDR | W, va, 0, PAGE, Errno::INVAL),
        (MapFlags::empty(), va, 0, PAGE, Errno::INVAL),
        // Misaligned, over what is mapped.
        (R, va, 4 * PAGE, PAGE + 1, Errno::INVAL),
        (R, va, 4 * PAGE + 1, PAGE, Errno::INVAL),
        (R, va + 1, 4 * PAGE, PAGE, Errno::INVAL),
        // Overlaps.
        (R, va, 4 * PAGE, 2 * PAGE, Errno::EXIST),
        (R, va, 5 * PAGE, PAGE, Errno::EXIST),
        (W, va, 3 * PAGE, 2 * PAGE, Errno::EXIST),
        (W, va, 0, 1 << 40, Errno::EXIST),
    ] {
        let got = c.map(flags, vaddr, iova, size);
        assert_eq!(got, Err(want), "{flags:?} {vaddr:#x} {iova:#x} {size:#x}");
    }
    // What is not there is found at the access.
    c.map(W, PAGE, 0, PAGE).unwrap();
    // The last page of all, and an argument larger than known.
    let mut last = map_arg(RW, va, u64::MAX - PAGE + 1, PAGE);
    last.argsz = 4096;
    assert_eq!(c.call(ioctl::VFIO_IOMMU_MAP_DMA, &mut last), Ok(0));
    assert_eq!(c.unmap(u64::MAX - PAGE + 1, PAGE), Ok(PAGE));
}

#[test]
fn entries_run_out() {
    let (c, attached) = Client::emulated(3);
    for n in 0..65535 {
        c.map(R, PAGE, n * PAGE, PAGE).unwrap();
    }
    assert_eq!(
        c.map(R, PAGE, 0, PAGE),
        Err(Errno::EXIST),
        "looked at first"
    );
    assert_eq!(c.map(R, PAGE, 65535 * PAGE, PAGE), Err(Errno::NOSPC));
    // Before what the hardware cannot address.
    let (_, rest) = c.info(72).unwrap();
    let avail = vfio_uapi::caps::DmaAvailCap::read_from_prefix(&rest[32..]);
    assert_eq!(avail.unwrap().0.avail, 0);
    let device = Opened::new(&attached, None);
    assert_eq!(device.read(65534 * PAGE), Err(Errno::FAULT));
    drop(device);
    assert_eq!(c.unmap(7 * PAGE, PAGE), Ok(PAGE));
    assert_eq!(c.map(R, PAGE, 65535 * PAGE, PAGE), Ok(0));
    assert_eq!(c.unmap_with(UnmapFlags::ALL, 0, 0), Ok(65535 * PAGE));
    c.map(R, PAGE, 0, PAGE).unwrap();
}

#[test]
fn the_limit_can_be_another() {
    let container = Container::with_entry_limit(2);
    let c = Client {
        container,
        ..Client::new()
    };
    let group = c.hardware();
    let _attached = c.join(&group).unwrap();
    c.set_iommu(1).unwrap();
    let mut memory = Pages::new(1);
    let va = memory.addr();
    assert_eq!(c.map(R, PAGE, 0, PAGE), Err(Errno::FAULT));
    c.map(R, va, 0, PAGE).unwrap();
    c.map(R, va, PAGE, PAGE).unwrap();
    let reserved = c.map(R, va, 0xfee0_0000, PAGE);
    assert_eq!(reserved, Err(Errno::NOSPC), "before what is reserved");
    c.unmap(0, PAGE).unwrap();
    assert_eq!(c.map(R, va, 0xfee0_0000, PAGE), Err(Errno::INVAL));
    c.map(R, va, 0, PAGE).unwrap();
}

#[test]
fn a_new_address() {
    let c = Client::new();
    let group = c.hardware();
    let attached = c.join(&group).unwrap();
    c.set_iommu(3).unwrap();
    let mut memory = Pages::new(4);
    let va = memory.addr();
    for (page, n) in memory.bytes().chunks_mut(4096).zip(1..) {
        page.fill(n);
    }
    c.map(RW, va, 0, 2 * PAGE).unwrap();
    let device = Opened::new(&attached, Some(&c.hardware()));
    assert_eq!(c.map(VADDR, va, 8 * PAGE, PAGE), Err(Errno::NOENT));
    assert_eq!(c.map(VADDR, va, 0, 2 * PAGE), Err(Errno::INVAL), "has one");
    assert_eq!(c.unmap_with(UnmapFlags::VADDR, 0, 2 * PAGE), Ok(2 * PAGE));
    assert_eq!(c.join(&c.hardware()).unwrap_err(), Errno::BUSY);
    assert_eq!(device.read(PAGE), Ok(2), "the device goes on");
    for (iova, size) in [(0, PAGE), (PAGE, PAGE), (0, 3 * PAGE)] {
        assert_eq!(c.map(VADDR, va, iova, size), Err(Errno::INVAL));
    }
    assert_eq!(c.map(R, va, 0, PAGE), Err(Errno::EXIST));
    c.map(VADDR, va + 2 * PAGE, 0, 2 * PAGE).unwrap();
    assert_eq!([device.read(0), device.read(PAGE)], [Ok(3), Ok(4)]);
    device.write(1, &[9]).unwrap();
    assert_eq!(memory.bytes()[2 * 4096 + 1], 9, "with the old permissions");
    assert_eq!(c.map(VADDR, va, 0, 2 * PAGE), Err(Errno::INVAL), "has one");
    // Nothing is spent by it, and what has lost its address can be unmapped.
    let left = |c: &Client| {
        let (_, rest) = c.info(120).unwrap();
        let avail = vfio_uapi::caps::DmaAvailCap::read_from_prefix(&rest[32..]);
        avail.unwrap().0.avail
    };
    assert_eq!(left(&c), 65534);
    assert_eq!(c.unmap_with(UnmapFlags::VADDR, 0, 2 * PAGE), Ok(2 * PAGE));
    assert_eq!(c.unmap(0, 2 * PAGE), Ok(2 * PAGE));
    assert_eq!(left(&c), 65535);
    assert!(c.join(&c.hardware()).is_ok());
}
