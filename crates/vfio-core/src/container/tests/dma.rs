//! What devices see, and what happens at once.

use super::*;
use crate::iommufd::testing;
use std::sync::atomic::{AtomicBool, Ordering};

#[test]
fn a_software_device_gets_the_errnos_of_dma_rw() {
    let (c, attached) = Client::emulated(3);
    let mut memory = Pages::new(3);
    let va = memory.addr();
    let device = Opened::new(&attached, None);
    c.map(RW, va, 0, PAGE).unwrap();
    c.map(R, va + PAGE, PAGE, PAGE).unwrap();
    c.map(W, va + 2 * PAGE, 2 * PAGE, PAGE).unwrap();
    c.map(RW, PAGE, 3 * PAGE, PAGE).unwrap();
    let dma = &device.dma;
    assert_eq!(dma.read(0, &mut []), Err(Errno::INVAL));
    assert_eq!(dma.write(u64::MAX, &[0; 2]), Err(Errno::OVERFLOW));
    assert_eq!(device.read(16 * PAGE), Err(Errno::INVAL), "unmapped");
    assert_eq!(device.write(PAGE, &[1]), Err(Errno::PERM));
    assert_eq!(device.read(2 * PAGE), Err(Errno::PERM));
    let write = device.write(2 * PAGE, &[1]);
    assert_eq!(
        write,
        Err(Errno::PERM),
        "it may not read, so it may not write"
    );
    assert_eq!(device.read(3 * PAGE), Err(Errno::FAULT));
    assert_eq!(device.write(3 * PAGE, &[1]), Err(Errno::FAULT));
    // Across mappings, all or nothing.
    memory.bytes()[4095..=4096].copy_from_slice(&[3, 4]);
    let mut buf = [0; 2];
    dma.read(PAGE - 1, &mut buf).unwrap();
    assert_eq!(buf, [3, 4]);
    assert_eq!(dma.write(PAGE - 1, &[9, 9]), Err(Errno::PERM));
    assert_eq!(memory.bytes()[4095], 3);
}

#[test]
fn hardware_asks_for_what_it_does() {
    let c = Client::new();
    let attached = c.join(&c.hardware()).unwrap();
    c.set_iommu(3).unwrap();
    let mut memory = Pages::new(1);
    c.map(W, memory.addr(), 0, PAGE).unwrap();
    let device = Opened::new(&attached, Some(&c.hardware()));
    assert_eq!(device.write(0, &[5]), Ok(()));
    assert_eq!(memory.bytes()[0], 5);
    assert_eq!(device.read(0), Err(Errno::PERM));
    assert_eq!(device.read(PAGE), Err(Errno::INVAL));
}

#[test]
fn no_write_after_unmap() {
    let (c, attached) = Client::emulated(3);
    let device = Opened::new(&attached, None);
    testing::no_write_after_unmap(
        300,
        Errno::INVAL,
        |iova, data| device.write(iova, data),
        |va, iova| c.map(RW, va, iova, PAGE).map(drop),
        |iova| c.unmap(iova, PAGE),
    );
    assert_eq!(c.unmap_with(UnmapFlags::ALL, 0, 0), Ok(0));
}

/// Two unmaps of the same mappings come one after the other: what the first takes, the second
/// does not find, and no byte is counted twice.
#[test]
fn unmaps_take_turns() {
    let (c, attached) = Client::emulated(3);
    let _device = Opened::new(&attached, None);
    for _ in 0..200 {
        for n in 0..8 {
            c.map(RW, PAGE, n * PAGE, PAGE).unwrap();
        }
        let gone: u64 = std::thread::scope(|scope| {
            let unmap = || scope.spawn(|| c.unmap(0, 8 * PAGE).unwrap());
            let both = [unmap(), unmap()];
            both.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(gone, 8 * PAGE);
    }
}

/// No written page is missed: a write that has ended shows in this bitmap or in the next, or in
/// that of the unmap.
#[test]
fn no_dirty_page_is_missed() {
    let (c, attached) = Client::emulated(3);
    let device = Opened::new(&attached, None);
    let mut memory = Pages::new(64);
    c.map(RW, memory.addr(), 0, 64 * PAGE).unwrap();
    c.dirty(DirtyFlags::START).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..2u64)
            .map(|n| {
                let (device, stop) = (&device, &stop);
                scope.spawn(move || {
                    let mut mine = 0u64;
                    for page in (0..32).map(|page| 2 * page + n).cycle() {
                        device.write(page * PAGE, &[n as u8 + 1]).unwrap();
                        mine |= 1 << page;
                        if stop.load(Ordering::Relaxed) && page == 62 + n {
                            break;
                        }
                    }
                    mine
                })
            })
            .collect();
        let mut seen = 0;
        for _ in 0..500 {
            let mut words = [0];
            c.get_dirty(0, 64 * PAGE, &mut words).unwrap();
            seen |= words[0];
        }
        stop.store(true, Ordering::Relaxed);
        let written = writers
            .into_iter()
            .map(|writer| writer.join().unwrap())
            .fold(0, |all, mine| all | mine);
        let mut words = [0];
        assert_eq!(c.unmap_dirty(0, 64 * PAGE, &mut words), Ok(64 * PAGE));
        assert_eq!(written & !(seen | words[0]), 0);
        assert_eq!(written, u64::MAX);
    });
}
