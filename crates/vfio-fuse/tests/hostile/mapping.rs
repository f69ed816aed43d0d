//! Regions that clients map.

use crate::client::Client;
use crate::common::{MAPPED, until};
use crate::scene::{Bystander, Session, alone, host, resident};
use std::sync::atomic::Ordering;
use std::time::Duration;
use vfio_core::device::Policy;

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// The mappable region mapped natively, where the machine can do that.
fn map(s: &Session) -> Option<(u64, u64)> {
    let (flags, size, offset) = s.client.region(s.device, 1).unwrap();
    assert_eq!((flags & 4, size), (4, MAPPED));
    match s
        .client
        .mmap(size, RW, libc::MAP_SHARED, Some(s.device), offset)
    {
        Ok(addr) => Some((addr, offset)),
        Err(errno) => {
            eprintln!("SKIPPED native mapping: no FUSE passthrough here: {errno}");
            None
        }
    }
}

#[test]
fn both_sides_see_the_same_bytes() {
    alone!("both_sides_see_the_same_bytes", || {
        let Some(host) = host("both_sides_see_the_same_bytes") else {
            return;
        };
        let (_one, _) = host.device("one");
        let beside = Bystander::start(&host);
        let s = Session::start(&host, 0);
        let c = &s.client;
        let Some((addr, offset)) = map(&s) else {
            return;
        };
        c.pwrite(s.device, offset + 4096, b"from read and write")
            .unwrap();
        assert_eq!(c.touch(addr + 4096, None), Ok(b'f'));
        assert_eq!(c.touch(addr + 100, Some(42)), Ok(0));
        assert_eq!(c.pread(s.device, offset + 100, 1), Ok(vec![42]));
        // Other offsets are past the end of the file: the mapping succeeds (no server is asked),
        // the access does not.
        for at in [offset + MAPPED, s.registers & !4095, 1 << 40, 1 << 50] {
            if let Ok(beyond) = c.mmap(4096, RW, libc::MAP_SHARED, Some(s.device), at) {
                assert_eq!(c.touch(beyond, None), Err(libc::SIGBUS), "{at:x}");
                c.munmap(beyond, 4096);
            }
        }
        // Half in, half out.
        let half = c.mmap(8192, RW, libc::MAP_SHARED, Some(s.device), offset + 4096);
        if let Ok(half) = half {
            assert!(c.touch(half, None).is_ok());
            assert_eq!(c.touch(half + 4096, None), Err(libc::SIGBUS));
        }
        let read_only = c.open_with(&host.node(0), libc::O_RDONLY).unwrap();
        assert_eq!(
            c.mmap(4096, RW, libc::MAP_SHARED, Some(read_only), offset),
            Err(libc::EACCES)
        );
        beside.end();
    });
}

#[test]
fn mapping_over_and_over_costs_the_daemon_nothing() {
    alone!("mapping_over_and_over_costs_the_daemon_nothing", || {
        let Some(host) = host("mapping_over_and_over") else {
            return;
        };
        let (_one, _) = host.device("one");
        let s = Session::start(&host, 0);
        let c = &s.client;
        let Some((_, offset)) = map(&s) else { return };
        let mut before = 0;
        for round in 0..3000 {
            let addr = c
                .mmap(MAPPED, RW, libc::MAP_SHARED, Some(s.device), offset)
                .unwrap();
            c.touch(addr, Some(1)).unwrap();
            c.touch(addr + 4096, Some(1)).unwrap();
            if round % 2 == 0 {
                c.munmap(addr, MAPPED);
            }
            // Far out, where nothing is.
            let far = c.mmap(1 << 30, RW, libc::MAP_SHARED, Some(s.device), 1 << 40);
            if let Ok(far) = far {
                c.touch(far + (1 << 29), Some(1)).unwrap_err();
                c.munmap(far, 1 << 30);
            }
            if round == 300 {
                before = resident();
            }
        }
        let after = resident();
        assert!(after < before + 4096, "{before} KiB became {after} KiB");
    });
}

/// A mapping that outlives its file keeps the device, until munmap or death.
#[test]
fn a_mapping_outlives_its_file() {
    alone!("a_mapping_outlives_its_file", || {
        let Some(host) = host("a_mapping_outlives_its_file") else {
            return;
        };
        let beside = Bystander::start(&host);
        for dies in [false, true] {
            let (device, seen) = host.device("one");
            let index = crate::scene::device_index(&host, &device);
            let s = Session::start(&host, index);
            let Some((addr, _)) = map(&s) else { return };
            let Session {
                client,
                device: file,
                ..
            } = s;
            client.touch(addr, Some(7)).unwrap();
            client.close(file);
            let next = Client::start();
            let other = next.open(&host.node(index)).unwrap();
            let iommu = next.open(&host.iommu()).unwrap();
            assert_eq!(next.bind(other, iommu), Err(libc::EINVAL), "still mapped");
            next.close(other);
            let gone = device.destroy(Policy::Wait);
            assert!(gone.result().is_none(), "it waits for the mapping");
            assert_eq!(seen.closed.load(Ordering::SeqCst), 0);
            assert_eq!(client.touch(addr, None), Ok(7));
            let kept = if dies {
                client.kill();
                None
            } else {
                client.munmap(addr, MAPPED);
                Some(client)
            };
            assert_eq!(gone.wait_for(Duration::from_secs(10)), Some(Ok(())));
            until("the driver's close", || {
                seen.closed.load(Ordering::SeqCst) == 1
            });
            drop(kept);
        }
        // And the next client's turn comes by itself, without an unregister.
        let (device, _) = host.device("one");
        let index = crate::scene::device_index(&host, &device);
        let s = Session::start(&host, index);
        let Some((addr, _)) = map(&s) else { return };
        s.client.close(s.device);
        let second = s.client.open(&host.node(index)).unwrap();
        assert_eq!(s.client.bind(second, s.iommufd), Err(libc::EINVAL));
        s.client.munmap(addr, MAPPED);
        // At once, unless the machine is busy.
        until("the bind", || s.client.bind(second, s.iommufd).is_ok());
        beside.end();
    });
}

/// Cutting users off takes the memory away.
#[test]
fn disassociation_revokes() {
    alone!("disassociation_revokes", || {
        let Some(host) = host("disassociation_revokes") else {
            return;
        };
        let (device, _) = host.device("one");
        let beside = Bystander::start(&host);
        let index = crate::scene::device_index(&host, &device);
        let s = Session::start(&host, index);
        let Some((addr, _)) = map(&s) else { return };
        s.client.touch(addr, Some(7)).unwrap();
        assert_eq!(device.destroy(Policy::Disassociate).result(), Some(Ok(())));
        assert_eq!(s.client.touch(addr, None), Err(libc::SIGBUS));
        assert_eq!(s.client.touch(addr + 4096, Some(1)), Err(libc::SIGBUS));
        assert_eq!(s.client.pread(s.device, s.registers, 4), Err(libc::ENODEV));
        beside.end();
    });
}
