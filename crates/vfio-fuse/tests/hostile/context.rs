//! Which context a descriptor of `/dev/iommu` means: the open file behind it, however it was copied.

use crate::client::Client;
use crate::common::until;
use crate::scene::{Bystander, Session, alone, descriptors, host, settles};
use crate::uapi::*;

/// True if both descriptors are one context: an object made through one is there in the other.
fn same(a: &Client, fd: u64, b: &Client, other: u64) -> bool {
    let id = a.ioas(fd).unwrap();
    match b.ioctl(other, DESTROY, &mut words(&[8, id])) {
        Ok(_) => {
            assert_eq!(
                a.ioctl(fd, DESTROY, &mut words(&[8, id])),
                Err(libc::ENOENT)
            );
            true
        }
        Err(errno) => {
            assert_eq!(errno, libc::ENOENT);
            a.ioctl(fd, DESTROY, &mut words(&[8, id])).unwrap();
            false
        }
    }
}

#[test]
fn dup_fork_and_passing_are_the_same_and_two_opens_are_two() {
    alone!(
        "dup_fork_and_passing_are_the_same_and_two_opens_are_two",
        || {
            let Some(host) = host("context") else { return };
            let (_one, _) = host.device("one");
            let (_two, _) = host.device("two");
            let (_three, _) = host.device("three");
            let c = Client::start();
            let iommu = c.open(&host.iommu()).unwrap();
            let copy = c.sys(libc::SYS_dup, &[iommu]).unwrap();
            let second = c.open(&host.iommu()).unwrap();
            let stranger = Client::start();
            let passed = stranger.take(c.give(iommu));
            let devices: Vec<u64> = (0..3).map(|n| c.open(&host.node(n)).unwrap()).collect();
            let child = c.fork();
            assert_ne!(child.pid, c.pid);

            assert!(same(&c, iommu, &c, copy));
            assert!(same(&c, iommu, &child, iommu));
            assert!(same(&c, iommu, &stranger, passed));
            assert!(!same(&c, iommu, &c, second));

            // BIND looks behind the number in the same way: the device's object is in the
            // context, whoever names it how.
            let id = c.bind(devices[0], copy).unwrap();
            let busy = |client: &Client, fd: u64, id: u32| {
                client.ioctl(fd, DESTROY, &mut words(&[8, id])) == Err(libc::EBUSY)
            };
            assert!(busy(&c, iommu, id) && busy(&stranger, passed, id));
            let in_child = child.bind(devices[1], iommu).unwrap();
            assert!(busy(&c, iommu, in_child));
            assert_ne!(id, in_child);
            let device = stranger.open(&host.node(2)).unwrap();
            let in_stranger = stranger.bind(device, passed).unwrap();
            assert!(busy(&c, iommu, in_stranger));

            // An IOAS of another context is none.
            let foreign = c.ioas(second).unwrap();
            let own = (0..)
                .map(|_| c.ioas(iommu).unwrap())
                .find(|id| *id > foreign)
                .unwrap();
            assert_eq!(c.attach(devices[0], own), Ok(own));
            assert_eq!(
                c.ioctl(second, DESTROY, &mut words(&[8, own])),
                Err(libc::ENOENT)
            );
            // The context ends with the last copy and the last bound device, not before.
            let dev = host.dev.as_ref().unwrap();
            assert_eq!(dev.open_files(), (4, 2));
            for fd in [iommu, copy] {
                c.close(fd);
                child.close(fd);
            }
            assert!(busy(&stranger, passed, id));
            stranger.close(passed);
            until("RELEASE of the context", || dev.open_files().1 == 1);
            assert_eq!(c.attach(devices[0], own), Ok(own), "the device holds it");
        }
    );
}

/// Finding out takes a duplicate, and keeps it no longer than the call.
#[test]
fn nothing_of_the_client_stays_open() {
    alone!("nothing_of_the_client_stays_open", || {
        let Some(host) = host("nothing_of_the_client_stays_open") else {
            return;
        };
        let (_one, _) = host.device("one");
        let c = Client::start();
        let dev = host.dev.as_ref().unwrap();
        let event = c.sys(libc::SYS_eventfd2, &[0, 0]).unwrap();
        let mut before = 0;
        for round in 0..200 {
            let device = c.open(&host.node(0)).unwrap();
            let iommu = c.open(&host.iommu()).unwrap();
            for wrong in [device, event] {
                assert_eq!(c.bind(device, wrong), Err(libc::EBADFD));
            }
            c.bind(device, iommu).unwrap();
            assert_eq!(dev.open_files(), (1, 1));
            c.close(iommu);
            until("RELEASE of the context", || dev.open_files().1 == 0);
            c.close(device);
            until("RELEASE of the device", || dev.open_files().0 == 0);
            if round == 20 {
                before = descriptors();
            }
        }
        settles("descriptors after 200 sessions", before, descriptors);
    });
}

/// A passed descriptor of the *device* is the same open file too; a thread that is not the
/// leader is a caller like any other.
#[test]
fn device_files_and_threads() {
    alone!("device_files_and_threads", || {
        let Some(host) = host("device_files_and_threads") else {
            return;
        };
        let (_one, _) = host.device("one");
        let bystander = Bystander::start(&host);
        let s = Session::start(&host, 0);
        let c = &s.client;
        c.pwrite(s.device, s.registers, &[7; 8]).unwrap();
        let stranger = Client::start();
        let passed = stranger.take(c.give(s.device));
        assert_eq!(stranger.pread(passed, s.registers, 8), Ok(vec![7; 8]));
        // What the stranger maps is its own memory, through a context that is passed as well.
        let iommu = stranger.take(c.give(s.iommufd));
        let addr = stranger.memory(4096);
        stranger.poke(addr, &77_u64.to_ne_bytes());
        let flags = MAP_RW | MAP_FIXED;
        assert_eq!(
            stranger.map(iommu, s.ioas, flags, addr, 4096, 0x7000),
            Ok(0x7000)
        );
        assert_eq!(s.dma_read(0x7000), Ok(77));
        stranger.kill();
        assert_eq!(s.dma_read(0x7000), Err(libc::EFAULT), "its memory is gone");
        assert_eq!(s.unmap(0x7000, 4096), Ok(4096));

        let arg = c.put(&words(&[16, 0, 0, 0]));
        assert_eq!(
            c.sys_in_thread(libc::SYS_ioctl, &[s.device, GET_INFO.into(), arg, 0]),
            Ok(0)
        );
        assert_eq!(word(&c.peek(arg, 16), 2), 3);
        let event = c.sys(libc::SYS_eventfd2, &[0, 0]).unwrap();
        let mut set = words(&[24, EVENTFD | TRIGGER, 0, 0, 1]);
        set.extend((event as u32).to_ne_bytes());
        let arg = c.put(&set);
        assert_eq!(
            c.sys_in_thread(libc::SYS_ioctl, &[s.device, SET_IRQS.into(), arg, 0]),
            Ok(0)
        );
        // A child by fork: the same files, other memory. What it maps is its own.
        let child = c.fork();
        let addr = c.memory(4096);
        c.poke(addr, &1_u64.to_ne_bytes());
        let child_addr = child.memory(4096);
        assert_eq!(child_addr, addr, "the same address in both");
        child.poke(addr, &2_u64.to_ne_bytes());
        s.map_rw(addr, 4096, 0x1000);
        assert_eq!(
            child.map(s.iommufd, s.ioas, flags, addr, 4096, 0x2000),
            Ok(0x2000)
        );
        assert_eq!((s.dma_read(0x1000), s.dma_read(0x2000)), (Ok(1), Ok(2)));
        bystander.end();
        // The parent goes, the child has all: its memory stays in reach, the parent's does not.
        let Session {
            client,
            device,
            registers,
            iommufd,
            ..
        } = s;
        client.kill();
        let value = child.pread(device, registers, 8).unwrap();
        assert_eq!(value, 2_u64.to_ne_bytes());
        let at = registers + crate::common::DMA_READ;
        assert_eq!(
            child.pwrite(device, at, &0x1000_u64.to_ne_bytes()),
            Err(libc::EFAULT)
        );
        assert_eq!(child.pwrite(device, at, &0x2000_u64.to_ne_bytes()), Ok(8));
        child.close(iommufd);
        child.close(device);
        let dev = host.dev.as_ref().unwrap();
        until("the last close", || dev.open_files() == (0, 0));
        child.kill();
        let next = Session::start(&host, 0);
        assert!(next.client.pread(next.device, next.registers, 8).is_ok());
    });
}
