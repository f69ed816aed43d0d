//! Many at once.

use super::*;
use crate::iommufd::testing::{device, of};
use crate::{Config, Core};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Mappers, unmappers and devices on the same addresses. A page is written to only while it is
/// mapped: once an unmap has returned, its memory does not change.
#[test]
fn no_write_after_unmap() {
    const ROUNDS: u64 = 400;
    let c = Client::new();
    let ioas = c.ioas();
    let port = c.port(ioas);
    let stop = AtomicBool::new(false);
    let writes = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut value = 0u8;
                while !stop.load(Ordering::Relaxed) {
                    value = value.wrapping_add(1);
                    for page in 0..3 {
                        match port.write(page * PAGE + 2048, &[value; 2048]) {
                            Ok(()) => _ = writes.fetch_add(1, Ordering::Relaxed),
                            Err(Errno::NOENT | Errno::BUSY) => {}
                            Err(errno) => panic!("{errno}"),
                        }
                    }
                }
            });
        }
        let mappers: Vec<_> = (0..3)
            .map(|page| {
                let c = &c;
                scope.spawn(move || {
                    let mut memory = Pages::new(1);
                    let va = memory.addr();
                    for _ in 0..ROUNDS {
                        c.map(ioas, FIXED | W, va, PAGE, page * PAGE).unwrap();
                        std::thread::yield_now();
                        // A writer that is not scheduled for long looks like one that hangs.
                        let unmapped = loop {
                            match c.unmap(ioas, page * PAGE, PAGE) {
                                Err(Errno::BUSY) => std::thread::yield_now(),
                                done => break done,
                            }
                        };
                        assert_eq!(unmapped, Ok(PAGE));
                        let before = memory.bytes().to_vec();
                        std::thread::yield_now();
                        assert!(memory.bytes() == before, "written to after the unmap");
                    }
                })
            })
            .collect();
        let failed = mappers.into_iter().any(|mapper| mapper.join().is_err());
        stop.store(true, Ordering::Relaxed);
        assert!(!failed);
    });
    assert!(writes.load(Ordering::Relaxed) > 0);
    assert_eq!(c.unmap(ioas, 0, u64::MAX), Ok(0));
}

/// A replace is one step: an access sees the old memory or the new, never none.
#[test]
fn replace_is_atomic() {
    let core = Core::new(Config::default());
    let c = Client::new();
    let (registered, _) = device(&core, "soft", None);
    let mut memory = Pages::new(2);
    let va = memory.addr();
    memory.bytes()[0] = 1;
    memory.bytes()[4096] = 2;
    let ids = [c.ioas(), c.ioas()];
    for (id, va) in ids.iter().zip([va, va + PAGE]) {
        c.map(*id, FIXED | R, va, PAGE, 0).unwrap();
    }
    let binding = c.ctx.bind(of(&registered)).unwrap();
    binding.attach(ids[0]).unwrap();
    let dma = binding.dma();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut seen = [0u64; 3];
                    while !stop.load(Ordering::Relaxed) || seen[1..].contains(&0) {
                        seen[usize::from(byte(&*dma, 0).unwrap())] += 1;
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                    }
                    seen[0]
                })
            })
            .collect();
        for n in 0..500 {
            binding.attach(ids[(n + 1) % 2]).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        for reader in readers {
            assert_eq!(reader.join().unwrap(), 0);
        }
    });
}

/// Objects made, mapped, copied and destroyed by several threads: nothing is left, and every
/// errno is one that the race explains.
#[test]
fn objects_come_and_go() {
    let c = Client::new();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for n in 0..300u32 {
                    let mine = c.ioas();
                    c.map(mine, FIXED | R, PAGE, PAGE, 0).unwrap();
                    let other = n % 6 + 1;
                    match c.copy((mine, PAGE), (other, 0), PAGE, FIXED | R) {
                        Ok(_) | Err(Errno::NOENT) => {}
                        Err(errno) => panic!("{errno}"),
                    }
                    match c.unmap(other, 0, PAGE) {
                        Ok(_) | Err(Errno::NOENT | Errno::BUSY) => {}
                        Err(errno) => panic!("{errno}"),
                    }
                    assert_eq!(c.destroy(mine), Ok(0));
                }
            });
        }
    });
    assert!(c.ctx.table().entries.is_empty());
    assert_eq!(c.ioas(), 1);
}
