//! What a device's access finds.

use super::*;
use crate::iommufd::testing::{device, of};
use crate::{Config, Core};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// Longer than anything here takes, unless it hangs.
const SOON: Duration = Duration::from_secs(20);

fn memfd(pages: u64) -> OwnedFd {
    let fd = memfd_create("client", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, pages * PAGE).unwrap();
    fd
}

fn map_file(c: &Client, ioas: u32, fd: i32, start: u64, length: u64, iova: u64) -> Result<u64> {
    let mut arg = IoasMapFile {
        size: 40,
        flags: FIXED | RW,
        ioas_id: ioas,
        fd,
        start,
        length,
        iova,
    };
    c.call(ioctl::IOMMU_IOAS_MAP_FILE, &mut arg)?;
    Ok(arg.iova)
}

#[test]
fn errnos() {
    let c = Client::new();
    let ioas = c.ioas();
    let mut memory = Pages::new(4);
    let va = memory.addr();
    c.map(ioas, FIXED | RW, va, PAGE, 0x10000).unwrap();
    c.map(ioas, FIXED | R, va + PAGE, PAGE, 0x11000).unwrap();
    c.map(ioas, FIXED | W, va + 2 * PAGE, PAGE, 0x12000)
        .unwrap();
    c.map(ioas, FIXED | RW, PAGE, PAGE, 0x20000).unwrap();
    let unattached = Port::new(Errno::NOENT);
    for port in [&unattached, &c.port(ioas)] {
        assert_eq!(port.read(0x10000, &mut []), Err(Errno::INVAL));
        assert_eq!(port.write(0x10000, &[]), Err(Errno::INVAL));
        assert_eq!(port.read(u64::MAX, &mut [0; 2]), Err(Errno::OVERFLOW));
        assert_eq!(port.write(u64::MAX, &[0; 2]), Err(Errno::OVERFLOW));
    }
    assert_eq!(unattached.read(0x10000, &mut [0]), Err(Errno::NOENT));
    assert_eq!(unattached.write(0x10000, &[0]), Err(Errno::NOENT));
    let port = c.port(ioas);
    assert_eq!(port.write(0x11000, &[0]), Err(Errno::PERM));
    assert_eq!(
        port.write(0x10fff, &[5; 2]),
        Err(Errno::PERM),
        "across, into one without"
    );
    assert_eq!(
        port.write(0x12000, &[8]),
        Ok(()),
        "needs only the permission to write"
    );
    assert_eq!(port.read(0x12000, &mut [0]), Err(Errno::PERM));
    assert_eq!(port.read(0x9000, &mut [0]), Err(Errno::NOENT));
    assert_eq!(port.write(0xffff, &[0; 2]), Err(Errno::NOENT));
    assert_eq!(
        port.write(0x12fff, &[0; 2]),
        Err(Errno::NOENT),
        "runs into a hole"
    );
    assert_eq!(port.read(0x20000, &mut [0]), Err(Errno::FAULT));
    assert_eq!(port.write(0x20000, &[0]), Err(Errno::FAULT));
    assert_eq!(memory.bytes()[2 * 4096], 8);
    assert_eq!(
        memory.bytes()[4095],
        0,
        "what would have failed has done nothing"
    );
}

#[test]
fn across_areas_of_all_kinds() {
    let c = Client::new();
    let ioas = c.ioas();
    let mut memory = Pages::new(2);
    let va = memory.addr();
    let fd = memfd(2);
    c.map(ioas, FIXED | RW, va + PAGE, PAGE, 0).unwrap();
    map_file(&c, ioas, fd.as_raw_fd(), PAGE, PAGE, PAGE).unwrap();
    c.map(ioas, FIXED | RW, va, 100, 2 * PAGE).unwrap();
    let port = c.port(ioas);
    let data: Vec<u8> = (0..PAGE as usize + 90).map(|n| (n % 251) as u8).collect();
    port.write(PAGE - 10, &data).unwrap();
    let mut back = vec![0; data.len()];
    port.read(PAGE - 10, &mut back).unwrap();
    assert_eq!(back, data);
    assert_eq!(memory.bytes()[2 * 4096 - 10..], data[..10]);
    let mut file = vec![0; 4096];
    rustix::io::pread(&fd, &mut file, PAGE).unwrap();
    assert_eq!(file, data[10..10 + 4096]);
    assert_eq!(memory.bytes()[..80], data[10 + 4096..]);
}

#[test]
fn map_file_errnos() {
    let c = Client::new();
    let ioas = c.ioas();
    let fd = memfd(1);
    let number = fd.as_raw_fd();
    assert_eq!(map_file(&c, 99, -1, 0, u64::MAX, 0), Err(Errno::OVERFLOW));
    assert_eq!(map_file(&c, 99, -1, 0, PAGE, 0), Err(Errno::NOENT));
    for bad in [-1, i32::MIN, i32::MAX] {
        assert_eq!(map_file(&c, ioas, bad, u64::MAX, PAGE, 0), Err(Errno::BADF));
    }
    assert_eq!(
        map_file(&c, ioas, number, u64::MAX, PAGE, 0),
        Err(Errno::OVERFLOW)
    );
    assert_eq!(map_file(&c, ioas, number, 0, 0, 0), Err(Errno::INVAL));
    let (pipe, _other) = rustix::pipe::pipe().unwrap();
    assert_eq!(
        map_file(&c, ioas, pipe.as_raw_fd(), 0, PAGE, 0),
        Err(Errno::INVAL)
    );
    let null = std::fs::File::open("/dev/null").unwrap();
    assert_eq!(
        map_file(&c, ioas, null.as_raw_fd(), 0, PAGE, 0),
        Err(Errno::INVAL)
    );
    assert_eq!(map_file(&c, ioas, number, 0, PAGE, 0), Ok(0));
    assert_eq!(map_file(&c, ioas, number, 0, PAGE, 0), Err(Errno::EXIST));
    let mut change = IoasChangeProcess {
        size: 8,
        reserved: 0,
    };
    assert_eq!(
        c.call(ioctl::IOMMU_IOAS_CHANGE_PROCESS, &mut change),
        Ok(0),
        "all files"
    );
    assert_eq!(
        map_file(&c, ioas, number, PAGE, PAGE, 2 * PAGE),
        Ok(2 * PAGE)
    );
    let port = c.port(ioas);
    assert_eq!(byte(&port, 2 * PAGE), Err(Errno::FAULT), "past its end");
    port.write(5, &[6]).unwrap();
    let mut back = [0; 6];
    rustix::io::pread(fd.as_fd(), &mut back, 0).unwrap();
    assert_eq!(back, [0, 0, 0, 0, 0, 6]);
    ftruncate(&fd, 0).unwrap();
    assert_eq!(
        byte(&port, 5),
        Err(Errno::FAULT),
        "cut short under the mapping"
    );
    assert_eq!(port.write(5, &[6]), Err(Errno::FAULT));
    ftruncate(&fd, 2 * PAGE).unwrap();
    assert_eq!(byte(&port, 2 * PAGE), Ok(0), "and grown again");
}

/// An access that does not end (its memory does not answer) holds up nothing but the unmap of its
/// own area, and that not for ever.
#[test]
fn an_access_that_hangs() {
    let c = Client::new();
    let ioas = c.ioas();
    let mut memory = Pages::new(4);
    let va = memory.addr();
    for n in 0..4 {
        c.map(ioas, FIXED | RW, va + n * PAGE, PAGE, n * PAGE)
            .unwrap();
    }
    let object = c.ctx.ioas(ioas).unwrap();
    let port = c.port(ioas);
    // From the middle of area 1 into area 2: what an access does before it touches memory.
    let held = object.hold(PAGE + 8, PAGE, Prot::READ).unwrap();
    let began = Instant::now();
    c.map(ioas, FIXED | RW, va, PAGE, 9 * PAGE).unwrap();
    assert_eq!(byte(&port, PAGE), Ok(0), "other accesses go on, there too");
    assert_eq!(c.unmap(ioas, 3 * PAGE, PAGE), Ok(PAGE));
    assert!(began.elapsed() < SOON);
    assert_eq!(c.unmap(ioas, 2 * PAGE, PAGE), Err(Errno::BUSY));
    assert_eq!(c.unmap(ioas, 0, u64::MAX), Err(Errno::BUSY));
    assert!(began.elapsed() < SOON, "bounded");
    assert_eq!(
        byte(&port, 0),
        Err(Errno::NOENT),
        "what came before is gone"
    );
    assert_eq!(byte(&port, PAGE), Ok(0), "what failed is there as before");
    assert_eq!(
        c.copy((ioas, 20 * PAGE), (ioas, PAGE), PAGE, FIXED | R),
        Ok(20 * PAGE)
    );
    drop(held);
    assert_eq!(c.unmap(ioas, 0, u64::MAX), Ok(4 * PAGE));
}

/// An unmap waits for the access that is in progress, and another one does not.
#[test]
fn unmap_waits_for_accesses_in_progress() {
    let c = Client::new();
    let ioas = c.ioas();
    c.map(ioas, FIXED | R, PAGE, PAGE, 0).unwrap();
    let object = c.ctx.ioas(ioas).unwrap();
    let held = object.hold(0, 1, Prot::READ).unwrap();
    std::thread::scope(|scope| {
        let (object, c) = (&object, &c);
        let unmapper = scope.spawn(move || {
            let mut unmapped = 0;
            let all = dma_memory::Range::ALL;
            (object.unmap(all, &mut unmapped), unmapped)
        });
        // Once it has closed the gate, nobody comes in, and a second unmap finds it racing.
        let deadline = Instant::now() + SOON;
        let refused = loop {
            match object.hold(0, 1, Prot::READ) {
                Err(errno) => break errno,
                Ok(more) => drop(more),
            }
            if unmapper.is_finished() || Instant::now() > deadline {
                break Errno::TIMEDOUT;
            }
        };
        let second = c.unmap(ioas, 0, PAGE);
        drop(held);
        let (done, unmapped) = unmapper.join().unwrap();
        if done.is_ok() {
            assert_eq!(
                (refused, second, unmapped),
                (Errno::BUSY, Err(Errno::BUSY), PAGE)
            );
        } else {
            // A machine so slow that the patience ran out between two lines of this test.
            assert_eq!((done, unmapped), (Err(Errno::BUSY), 0));
        }
    });
}

/// Detaching and closing wait too, but not for ever, and nothing new starts.
#[test]
fn detach_while_an_access_hangs() {
    let core = Core::new(Config::default());
    let c = Client::new();
    let (registered, _) = device(&core, "soft", None);
    let (a, b) = (c.ioas(), c.ioas());
    c.map(a, FIXED | R, PAGE, PAGE, 0).unwrap();
    let binding = c.ctx.bind(of(&registered)).unwrap();
    let port = Arc::clone(&c.ctx.table().bound(binding.devid()).unwrap().port);
    let began = Instant::now();
    binding.attach(a).unwrap();
    let in_a = port.travel().unwrap();
    binding.attach(b).unwrap();
    assert_eq!(byte(&*port, 0), Err(Errno::NOENT), "in the new one");
    let in_b = port.travel().unwrap();
    binding.detach();
    assert_eq!(port.travel().unwrap_err(), Errno::NOENT);
    binding.attach(a).unwrap();
    let again_in_a = port.travel().unwrap();
    drop(binding);
    assert!(began.elapsed() < SOON);
    c.destroy(a).unwrap();
    c.ctx.close();
    drop((in_a, in_b, again_in_a));
    // When the access ends in time, the detach has waited for it.
    let binding = c.ctx.bind(of(&registered)).unwrap();
    let ioas = c.ioas();
    let port = Arc::clone(&c.ctx.table().bound(binding.devid()).unwrap().port);
    binding.attach(ioas).unwrap();
    let travel = port.travel().unwrap();
    let old = port.switch(None).unwrap();
    assert!(!old.drain());
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| while !old.drain() {});
        drop(travel);
        waiter.join().unwrap();
    });
}
