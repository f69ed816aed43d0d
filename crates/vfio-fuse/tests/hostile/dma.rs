//! Memory that changes under a mapping: it shrinks, or becomes something else.

use crate::client::Client;
use crate::common::until;
use crate::scene::{Bystander, Session, alone, host};
use crate::uapi::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Truncates and grows a file while another process's device reads and writes it by DMA.
fn shrinks(flags: u32, len: u64) {
    let Some(host) = host("shrinks") else { return };
    let (_one, _) = host.device("one");
    let beside = Bystander::start(&host);
    let s = Session::start(&host, 0);
    let c = &s.client;
    let mapped = c.memfd(len, flags).and_then(|fd| {
        let addr = c.mmap(len, RW, libc::MAP_SHARED, Some(fd), 0)?;
        Ok((fd, addr))
    });
    let (fd, addr) = match mapped {
        Ok(mapped) => mapped,
        Err(errno) => {
            eprintln!("SKIPPED shrinking of memory with flags {flags:x}: {errno}");
            return;
        }
    };
    s.map_rw(addr, len, 0);
    assert_eq!(s.dma_read(len - 8), Ok(0));
    // The same file in another process of the client's, which shrinks it.
    let other = c.fork();
    let stop = Arc::new(AtomicBool::new(false));
    let rounds = Arc::new(AtomicU64::new(0));
    let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&rounds));
    let shrinker = std::thread::spawn(move || {
        while !stopped.load(Ordering::SeqCst) {
            for size in [0, len] {
                assert_eq!(other.sys(libc::SYS_ftruncate, &[fd, size]), Ok(0));
            }
            counted.fetch_add(1, Ordering::SeqCst);
        }
        other
    });
    let (mut good, mut bad) = (0, 0);
    for round in 0_u64.. {
        for result in [s.dma_read(len - 8).map(drop), s.dma_write(len - 16, round)] {
            match result {
                Ok(()) => good += 1,
                Err(errno) => {
                    assert_eq!(errno, libc::EFAULT);
                    bad += 1;
                }
            }
        }
        if round > 2000 && good > 50 && bad > 50 {
            break;
        }
        assert!(round < 200_000, "{good} accesses, {bad} faults");
    }
    stop.store(true, Ordering::SeqCst);
    let other = shrinker.join().unwrap();
    assert!(rounds.load(Ordering::SeqCst) > 0);
    other.sys(libc::SYS_ftruncate, &[fd, 0]).unwrap();
    assert_eq!(s.dma_read(0), Err(libc::EFAULT));
    assert_eq!(s.dma_write(len - 8, 1), Err(libc::EFAULT));
    let mut stat = [0; 144];
    let at = c.put(&stat);
    c.sys(libc::SYS_fstat, &[fd, at]).unwrap();
    stat.copy_from_slice(&c.peek(at, 144));
    assert_eq!(long(&stat, 48), 0, "DMA does not make the file longer");
    other.sys(libc::SYS_ftruncate, &[fd, len]).unwrap();
    assert_eq!(s.dma_write(len - 8, 5), Ok(()));
    assert_eq!(s.dma_read(len - 8), Ok(5));
    beside.end();
}

#[test]
fn a_memfd_that_shrinks() {
    alone!("a_memfd_that_shrinks", || shrinks(0, 1 << 20));
}

#[test]
fn huge_pages_that_shrink() {
    alone!("huge_pages_that_shrink", || shrinks(
        libc::MFD_HUGETLB,
        2 << 20
    ));
}

/// A file mapped at an address, with a value in it.
fn file_at(c: &Client, addr: u64, value: u64) -> u64 {
    let fd = c.memfd(65536, 0).unwrap();
    let arg = c.put(&value.to_ne_bytes());
    c.sys(libc::SYS_pwrite64, &[fd, arg, 8, 0]).unwrap();
    let flags = libc::MAP_SHARED | libc::MAP_FIXED;
    let got = c.sys(
        libc::SYS_mmap,
        &[addr, 65536, RW as u64, flags as u64, fd, 0],
    );
    assert_eq!(got, Ok(addr));
    fd
}

#[test]
fn an_address_that_becomes_something_else() {
    alone!("an_address_that_becomes_something_else", || {
        let Some(host) = host("an_address_that_becomes_something_else") else {
            return;
        };
        let (_one, _) = host.device("one");
        let beside = Bystander::start(&host);
        let s = Session::start(&host, 0);
        let c = &s.client;
        let addr = c.memory(65536);
        let first = file_at(c, addr, 1);
        s.map_rw(addr, 65536, 0);
        assert_eq!(s.dma_read(0), Ok(1));
        // Gone: nothing is read, least of all what was there.
        c.munmap(addr, 65536);
        assert_eq!(s.dma_read(0), Err(libc::EFAULT));
        assert_eq!(s.dma_write(0, 99), Err(libc::EFAULT));
        // Another file, then the first at another place of it, then private memory, then read-only.
        let second = file_at(c, addr, 2);
        assert_eq!(s.dma_read(0), Ok(2));
        s.dma_write(8, 22).unwrap();
        let value = |fd: u64, at: u64| {
            c.sys(libc::SYS_pread64, &[fd, c.arena, 8, at]).unwrap();
            long(&c.peek(c.arena, 8), 0)
        };
        assert_eq!((value(second, 8), value(first, 8)), (22, 0));
        let fixed = |prot: i32, flags: i32, fd: u64, at: u64| {
            let flags = (flags | libc::MAP_FIXED) as u64;
            let args = [addr, 32768, prot as u64, flags, fd, at];
            assert_eq!(c.sys(libc::SYS_mmap, &args), Ok(addr));
        };
        let arg = c.put(&3_u64.to_ne_bytes());
        c.sys(libc::SYS_pwrite64, &[first, arg, 8, 32768]).unwrap();
        fixed(RW, libc::MAP_SHARED, first, 32768);
        assert_eq!(s.dma_read(0), Ok(3));
        fixed(RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, u64::MAX, 0);
        assert_eq!(s.dma_read(0), Ok(0));
        s.dma_write(0, 44).unwrap();
        assert_eq!(long(&c.peek(addr, 8), 0), 44);
        assert_eq!((value(first, 32768), value(second, 0)), (3, 2), "untouched");
        fixed(libc::PROT_READ, libc::MAP_SHARED, second, 0);
        assert_eq!(s.dma_read(0), Ok(2));
        assert_eq!(s.dma_write(0, 5), Err(libc::EFAULT), "it may only be read");
        fixed(libc::PROT_NONE, libc::MAP_SHARED, second, 0);
        // Without PROCMAP_QUERY (Linux 6.11) permissions are looked at for writes only.
        let told = vfiod_tests::skip::kernel_is_at_least(6, 11);
        assert_eq!(s.dma_read(0), if told { Err(libc::EFAULT) } else { Ok(2) });
        assert_eq!(value(second, 0), 2);
        // Changed all the time: what is read is one of those, the file that is not there is not
        // written.
        let other = c.fork();
        drop(other);
        for round in 0..300 {
            let wanted = 1000 + round;
            let fd = file_at(c, addr, wanted);
            assert_eq!(s.dma_read(0), Ok(wanted));
            c.close(fd);
        }
        // The program is replaced: its memory is another's, and never reached.
        let path = c.arena + 768;
        c.poke(path, b"/bin/sleep\0");
        let words_at = c.arena + 256;
        c.poke(words_at, b"sleep\0\0\x00100\0");
        let argv: Vec<u8> = [words_at, words_at + 8, 0]
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        c.poke(c.arena + 512, &argv);
        let child = c.fork();
        let flags = MAP_RW | MAP_FIXED;
        let own = child.memory(4096);
        child
            .map(s.iommufd, s.ioas, flags, own, 4096, 0x100_0000)
            .unwrap();
        assert_eq!(s.dma_read(0x100_0000), Ok(0));
        child.start_sys(libc::SYS_execve, &[path, c.arena + 512, 0, 0]);
        until("the exec", || s.dma_read(0x100_0000) == Err(libc::EFAULT));
        child.kill();
        beside.end();
    });
}
