//! Many at once.

use super::*;
use crate::iommufd::testing::{self, device, of};
use crate::{Config, Core};
use std::sync::atomic::{AtomicBool, Ordering};

#[test]
fn no_write_after_unmap() {
    let c = Client::new();
    let ioas = c.ioas();
    let port = c.port(ioas);
    testing::no_write_after_unmap(
        400,
        Errno::NOENT,
        |iova, data| port.write(iova, data),
        |va, iova| c.map(ioas, FIXED | W, va, PAGE, iova).map(drop),
        |iova| c.unmap(ioas, iova, PAGE),
    );
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
