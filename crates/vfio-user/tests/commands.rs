//! Every command, by our own client.

mod common;

use common::*;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use vfio_core::Errno;
use vfio_core::device::Policy;
use vfio_uapi::device::{InfoFlags, IrqSetFlags, RegionFlags};
use vfio_user::client::Client;
use vfio_user::wire::{RegionAccess, SmallWrite};

const RW: (bool, bool) = (true, true);

fn refused<T: std::fmt::Debug>(done: Result<T, vfio_user::client::Error>) -> Errno {
    let error = done.unwrap_err();
    error.refused().unwrap_or_else(|| panic!("{error:?}"))
}

#[test]
fn a_device_is_what_it_is_to_others() {
    let host = Host::new();
    let mut client = host.connect();
    assert_eq!(client.minor(), 1);
    assert_eq!(client.capabilities()["max_msg_fds"], 16);
    let info = client.device_info().unwrap();
    let flags = InfoFlags::PCI | InfoFlags::RESET;
    assert_eq!(
        (info.flags, info.num_regions, info.num_irqs),
        (flags.bits(), 9, 5)
    );
    for index in 0..9 {
        let region = client.region_info(index).unwrap();
        let wanted = host.device().region(index).unwrap();
        assert_eq!(region.info.size, wanted.size);
        let mappable = wanted.flags.contains(RegionFlags::MMAP);
        assert_eq!(region.fd.is_some(), mappable, "region {index}");
        assert_eq!(region.info.flags.contains(RegionFlags::MMAP), mappable);
    }
    assert_eq!(client.region_info(2).unwrap().areas.len(), 2);
    assert_eq!(refused(client.region_info(9)), Errno::INVAL);
    assert_eq!(client.irq_info(2).unwrap().count, 2048);
    assert_eq!(refused(client.irq_info(5)), Errno::INVAL);
    drop(client);
    host.until_free();
    assert_eq!(host.seen.opened.load(Ordering::SeqCst), 1);
    assert_eq!(host.seen.closed.load(Ordering::SeqCst), 1);
}

#[test]
fn registers_hold_what_is_written() {
    let host = Host::new();
    let mut client = host.connect();
    assert_eq!(client.region_write(0, 100, b"abcd").unwrap(), 4);
    let mut buf = [0; 4];
    assert_eq!(client.region_read(0, 100, &mut buf).unwrap(), 4);
    assert_eq!(&buf, b"abcd");
    let mut all = vec![0xee; 4096];
    assert_eq!(client.region_read(0, 0, &mut all).unwrap(), 4096);
    assert_eq!(&all[100..104], b"abcd");
    // Short at the end, refused past it.
    let mut config = [0xee; 256];
    assert_eq!(client.region_read(7, 0, &mut config).unwrap(), 255);
    assert_eq!(config[254], 254);
    assert_eq!(refused(client.region_read(0, 4094, &mut buf)), Errno::INVAL);
    assert_eq!(refused(client.region_read(9, 0, &mut buf)), Errno::INVAL);
    assert_eq!(
        refused(client.region_write(0, u64::MAX, &buf)),
        Errno::INVAL
    );
    assert_eq!(client.region_read(0, 0, &mut []).unwrap(), 0);
    client.reset().unwrap();
    assert_eq!(client.region_read(0, 100, &mut buf).unwrap(), 4);
    assert_eq!(buf, [0; 4]);
}

#[test]
fn many_small_writes_stop_at_the_first_that_fails() {
    let host = Host::new();
    let mut client = host.connect();
    let write = |offset, count, value: u8| SmallWrite {
        at: RegionAccess {
            offset,
            region: 0,
            count,
        },
        data: [value; 8],
    };
    let writes: Vec<_> = (0..200).map(|n| write(200 + n * 8, 8, n as u8)).collect();
    assert_eq!(client.region_write_multi(&writes).unwrap(), 200);
    let mut buf = [0; 8];
    client.region_read(0, 200 + 199 * 8, &mut buf).unwrap();
    assert_eq!(buf, [199; 8]);
    let bad = [write(200, 4, 1), write(200, 9, 1), write(204, 4, 1)];
    assert_eq!(client.region_write_multi(&bad).unwrap(), 1);
    assert_eq!(refused(client.region_write_multi(&bad[1..])), Errno::INVAL);
    assert_eq!(client.region_write_multi(&[]).unwrap(), 0);
}

#[test]
fn what_a_client_maps_is_what_the_device_sees() {
    let host = Host::new();
    let mut client = host.connect();
    let region = client.region_info(1).unwrap();
    let fd = region.fd.unwrap();
    client.region_write(1, 4096, b"through the socket").unwrap();
    assert_eq!(
        get(&fd, region.info.offset + 4096, 18),
        b"through the socket"
    );
    put(&fd, region.info.offset + 5000, b"through the mapping");
    let mut buf = [0; 19];
    client.region_read(1, 5000, &mut buf).unwrap();
    assert_eq!(&buf, b"through the mapping");
    // One that cannot be written comes with a descriptor that cannot write.
    let reading = client.region_info(3).unwrap().fd.unwrap();
    assert!(rustix::io::pwrite(&reading, b"x", 0).is_err());
}

#[test]
fn dma_through_windows() {
    let host = Host::new();
    let mut client = host.connect();
    let file = memfd(16384);
    put(&file, 4096 + 8, &7u64.to_ne_bytes());
    client
        .dma_map(0x10000, 8192, RW, Some((file.as_fd(), 4096)))
        .unwrap();
    client
        .dma_map(0x20000, 4096, (true, false), Some((file.as_fd(), 0)))
        .unwrap();
    assert_eq!(host.offer().windows(), 2);
    let mut doorbell = |at, iova: u64| client.region_write(0, at, &iova.to_ne_bytes());
    doorbell(DMA_READ, 0x10008).unwrap();
    doorbell(DMA_WRITE, 0x11ff8).unwrap();
    assert_eq!(get(&file, 4096 + 8192 - 8, 8), 7u64.to_ne_bytes());
    doorbell(DMA_READ, 0x20000).unwrap();
    assert_eq!(refused(doorbell(DMA_WRITE, 0x20000)), Errno::PERM);
    assert_eq!(refused(doorbell(DMA_READ, 0x11ffc)), Errno::NOENT);
    assert_eq!(refused(doorbell(DMA_READ, 0)), Errno::NOENT);
    // The file shrinks: an error of that access, and of no other.
    rustix::fs::ftruncate(&file, 4096).unwrap();
    assert_eq!(refused(doorbell(DMA_READ, 0x10008)), Errno::FAULT);
    doorbell(DMA_READ, 0x20000).unwrap();
    rustix::fs::ftruncate(&file, 16384).unwrap();
    doorbell(DMA_READ, 0x10008).unwrap();
    // Unmap.
    assert_eq!(refused(client.dma_unmap(0x10000, 4096)), Errno::NOENT);
    client.dma_unmap(0x10000, 8192).unwrap();
    assert_eq!(*host.seen.unmapped.lock().unwrap(), [(0x10000, 8192)]);
    let gone = client.region_write(0, DMA_READ, &0x10008u64.to_ne_bytes());
    assert_eq!(refused(gone), Errno::NOENT);
    client.dma_unmap_all().unwrap();
    client.dma_unmap_all().unwrap();
    assert_eq!(host.offer().windows(), 0);
    assert_eq!(
        *host.seen.unmapped.lock().unwrap(),
        [(0x10000, 8192), (0x20000, 4096)]
    );
}

#[test]
fn maps_are_refused_by_the_book() {
    let host = Host::new();
    let mut client = host.connect();
    let file = memfd(8192);
    let fd = || Some((file.as_fd(), 0));
    client.dma_map(4096, 4096, RW, fd()).unwrap();
    assert_eq!(refused(client.dma_map(4096, 4096, RW, fd())), Errno::EXIST);
    assert_eq!(refused(client.dma_map(0, 4097, RW, None)), Errno::EXIST);
    assert_eq!(refused(client.dma_map(0, 0, RW, None)), Errno::INVAL);
    assert_eq!(
        refused(client.dma_map(0, 4096, (false, false), None)),
        Errno::INVAL
    );
    assert_eq!(
        refused(client.dma_map(u64::MAX - 4095, 8192, RW, None)),
        Errno::INVAL
    );
    client
        .dma_map(u64::MAX - 4095, 4096, RW, None)
        .expect("the last page is a page");
    let (pipe, _other) = rustix::pipe::pipe().unwrap();
    assert_eq!(
        refused(client.dma_map(0, 4096, RW, Some((pipe.as_fd(), 0)))),
        Errno::INVAL
    );
}

#[test]
fn interrupts_arrive_and_are_taken_back_piece_by_piece() {
    let host = Host::new();
    let mut client = host.connect();
    let eventfds = IrqSetFlags::DATA_EVENTFD | IrqSetFlags::ACTION_TRIGGER;
    let off = IrqSetFlags::DATA_NONE | IrqSetFlags::ACTION_TRIGGER;
    let unmask = IrqSetFlags::DATA_NONE | IrqSetFlags::ACTION_UNMASK;
    let fire = |client: &mut Client, vector: u8| client.region_write(0, FIRE, &[vector]).unwrap();
    // INTx, with its mask.
    let line = eventfd();
    client
        .set_irqs(0, eventfds, (0, 1), &[], &[line.as_fd()])
        .unwrap();
    fire(&mut client, 0);
    fire(&mut client, 0);
    assert_eq!(count(&line), 1, "it masks itself");
    client.set_irqs(0, unmask, (0, 1), &[], &[]).unwrap();
    fire(&mut client, 0);
    assert_eq!(count(&line), 1);
    client.set_irqs(0, off, (0, 0), &[], &[]).unwrap();
    fire(&mut client, 0);
    assert_eq!(count(&line), 0);
    // MSI-X as QEMU does it: first without a descriptor, then one by one.
    client.set_irqs(2, eventfds, (0, 1), &[], &[]).unwrap();
    let vectors: Vec<_> = (0..40).map(|_| eventfd()).collect();
    for start in (0..40).step_by(16) {
        let batch: Vec<_> = vectors[start..40.min(start + 16)]
            .iter()
            .map(AsFd::as_fd)
            .collect();
        client
            .set_irqs(2, eventfds, (start as u32, batch.len() as u32), &[], &batch)
            .unwrap();
    }
    for vector in 0..40 {
        fire(&mut client, vector);
    }
    assert!(vectors.iter().all(|fd| count(fd) == 1));
    // A range in the middle goes, the others stay.
    client.set_irqs(2, eventfds, (10, 5), &[], &[]).unwrap();
    for vector in 0..40 {
        fire(&mut client, vector);
    }
    for (n, fd) in vectors.iter().enumerate() {
        assert_eq!(count(fd), u64::from(!(10..15).contains(&n)), "vector {n}");
    }
    let bools = IrqSetFlags::DATA_BOOL | IrqSetFlags::ACTION_TRIGGER;
    client.set_irqs(2, bools, (0, 3), &[1, 0, 1], &[]).unwrap();
    let counts: Vec<_> = vectors[..3].iter().map(count).collect();
    assert_eq!(counts, [1, 0, 1]);
    // 253 in one message.
    let many: Vec<_> = (0..253).map(|_| eventfd()).collect();
    let fds: Vec<_> = many.iter().map(AsFd::as_fd).collect();
    client.set_irqs(2, eventfds, (0, 253), &[], &fds).unwrap();
    fire(&mut client, 252);
    assert_eq!(count(&many[252]), 1);
    // ERR and REQ can be raised.
    let (err, req) = (eventfd(), eventfd());
    client
        .set_irqs(3, eventfds, (0, 1), &[], &[err.as_fd()])
        .unwrap();
    client
        .set_irqs(4, eventfds, (0, 1), &[], &[req.as_fd()])
        .unwrap();
    client.region_write(0, ERROR, &[1]).unwrap();
    assert_eq!(count(&err), 1);
    // Nonsense.
    let file = memfd(4096);
    for (index, flags, range, data, fds) in [
        (5, off, (0, 0), &[][..], &[][..]),
        (2, eventfds, (2047, 2), &[], &[]),
        (2, eventfds, (0, 1), &[], &[file.as_fd()]),
        (2, eventfds, (0, 2), &[], &[err.as_fd()]),
        (2, bools, (0, 2), &[1], &[]),
        (2, off, (0, 0), &[], &[err.as_fd()]),
        (2, eventfds | IrqSetFlags::DATA_BOOL, (0, 1), &[0], &[]),
    ] {
        let errno = refused(client.set_irqs(index, flags, range, data, fds));
        assert_eq!(errno, Errno::INVAL, "{index} {flags:?} {range:?}");
    }
    let nothing = IrqSetFlags::DATA_NONE;
    assert_eq!(
        refused(client.set_irqs(2, nothing, (0, 1), &[], &[])),
        Errno::NOTTY
    );
}

#[test]
fn unbind_raises_req_and_waits_for_the_client_to_go() {
    let mut host = Host::new();
    let mut client = host.connect();
    let req = eventfd();
    let eventfds = IrqSetFlags::DATA_EVENTFD | IrqSetFlags::ACTION_TRIGGER;
    client
        .set_irqs(4, eventfds, (0, 1), &[], &[req.as_fd()])
        .unwrap();
    let outcome = host.faux.take().unwrap().destroy(Policy::Wait);
    until("REQ", || count(&req) > 0);
    assert!(client.device_info().is_ok(), "it keeps working meanwhile");
    let mut other = host.raw();
    let (header, _) = other.hello(0, Some("{}"));
    assert_eq!(header.errno(), Some(Errno::NODEV));
    drop(client);
    assert_eq!(outcome.wait_for(SOON), Some(Ok(())));
    assert_eq!(host.seen.released.load(Ordering::SeqCst), 1);
}

#[test]
fn a_device_that_is_cut_off_closes_the_connection() {
    let mut host = Host::new();
    let client = host.connect();
    let outcome = host.faux.take().unwrap().destroy(Policy::Disassociate);
    assert_eq!(outcome.wait_for(SOON), Some(Ok(())));
    let mut raw = Raw::new(client.socket().try_clone().unwrap());
    assert!(raw.is_closed());
    until("the client is gone", || host.offer().client().is_none());
}

#[test]
fn a_driver_that_panics_takes_its_connection_with_it() {
    let host = Host::new();
    let mut client = host.connect();
    assert!(client.region_write(0, PANIC, &[1]).is_err());
    let mut raw = Raw::new(client.socket().try_clone().unwrap());
    assert!(raw.is_closed());
}

#[test]
fn the_end_of_an_offer_is_the_end_of_its_connection() {
    let mut host = Host::new();
    let mut client = host.connect();
    client.device_info().unwrap();
    drop(host.offer.take());
    let mut raw = Raw::new(client.socket().try_clone().unwrap());
    assert!(raw.is_closed());
    let device = host.device();
    until("the device is closed", || !device.is_open());
    assert!(std::os::unix::net::UnixStream::connect(host.path()).is_err());
}
