//! Calls at the wrong time, on the wrong node, at the wrong place; races; owners.

use crate::client::{Client, now};
use crate::common::{FIRE, MAPPED, REGISTERS, until};
use crate::scene::{Bystander, Session, alone, host};
use crate::uapi::*;
use std::time::Duration;
use vfio_core::device::Policy;

/// Every device ioctl, with an argument that would be good.
fn every() -> Vec<(u32, Vec<u8>)> {
    vec![
        (GET_INFO, words(&[16, 0, 0, 0])),
        (REGION_INFO, words(&[32, 0, 0, 0, 0, 0, 0, 0])),
        (IRQ_INFO, words(&[16, 0, 0, 0])),
        (SET_IRQS, words(&[20, NONE | TRIGGER, 0, 0, 0])),
        (RESET, words(&[0])),
        (FEATURE, words(&[8, 0])),
        (ATTACH, words(&[12, 0, 1])),
        (DETACH, words(&[8, 0])),
        (io_number(0xff), words(&[0; 8])),
    ]
}

fn io_number(nr: u32) -> u32 {
    (b';' as u32) << 8 | (nr & 0xff)
}

#[test]
fn before_bind_after_unregister_and_after_disassociate() {
    alone!(
        "before_bind_after_unregister_and_after_disassociate",
        || {
            let Some(host) = host("order") else { return };
            let (device, _) = host.device("one");
            let bystander = Bystander::start(&host);
            let c = Client::start();
            let file = c.open(&host.node(0)).unwrap();
            for (cmd, mut arg) in every() {
                assert_eq!(c.ioctl(file, cmd, &mut arg), Err(libc::EINVAL), "{cmd:x}");
                assert_eq!(c.ioctl_at(file, cmd, 8), Err(libc::EINVAL), "{cmd:x}");
            }
            assert_eq!(c.pread(file, 0, 4), Err(libc::EINVAL));
            assert_eq!(c.pwrite(file, 0, &[0; 4]), Err(libc::EINVAL));
            c.close(file);

            let s = Session::start(&host, 0);
            let c = &s.client;
            let second = c.open(&host.node(0)).unwrap();
            let gone = device.destroy(Policy::Wait);
            assert!(gone.result().is_none(), "it waits for its users");
            // No new opens, but those who have it go on.
            assert_eq!(c.open(&host.node(0)), Err(libc::ENOENT));
            s.map_rw(c.arena + 65536, 4096, 0);
            assert_eq!(s.dma_read(0), Ok(0));
            assert!(c.region(s.device, 0).is_ok());
            assert_eq!(c.ioctl_at(s.device, RESET, 0), Ok(0));
            c.close(s.device);
            // The file that never was bound may still bind: the device is there while it is open.
            until("the second file's turn", || {
                c.bind(second, s.iommufd).is_ok()
            });
            assert!(c.region(second, 0).is_ok());
            c.close(second);
            assert_eq!(gone.wait_for(Duration::from_secs(10)), Some(Ok(())));

            let (device, _) = host.device("next");
            let index = crate::scene::device_index(&host, &device);
            let s = Session::start(&host, index);
            let c = &s.client;
            let unbound = c.open(&host.node(index)).unwrap();
            let event = c.sys(libc::SYS_eventfd2, &[0, libc::EFD_NONBLOCK as u64]);
            let event = event.unwrap();
            let data = (event as u32).to_ne_bytes();
            c.irqs(s.device, EVENTFD | TRIGGER, 0, 0, 1, &data).unwrap();
            assert_eq!(
                device.destroy(Policy::Disassociate).result(),
                Some(Ok(())),
                "not waiting for anybody"
            );
            for (cmd, mut arg) in every() {
                let got = c.ioctl(s.device, cmd, &mut arg);
                assert_eq!(got, Err(libc::ENODEV), "{cmd:x}");
                let got = c.ioctl(unbound, cmd, &mut arg);
                assert_eq!(got, Err(libc::ENODEV), "{cmd:x}, never bound");
            }
            assert_eq!(c.bind(unbound, s.iommufd), Err(libc::ENODEV));
            assert_eq!(c.pread(s.device, s.registers, 4), Err(libc::ENODEV));
            assert_eq!(
                c.pwrite(s.device, s.registers + FIRE, &[1]),
                Err(libc::ENODEV)
            );
            assert_eq!(
                c.sys(libc::SYS_read, &[event, c.arena, 8]),
                Err(libc::EAGAIN),
                "no interrupt after that"
            );
            // The context is the client's own and goes on.
            assert!(c.ioas(s.iommufd).is_ok());
            assert_eq!(c.open(&host.node(index)), Err(libc::ENOENT));
            c.close(s.device);
            c.close(unbound);
            bystander.end();
        }
    );
}

#[test]
fn the_wrong_node() {
    alone!("the_wrong_node", || {
        let Some(host) = host("the_wrong_node") else {
            return;
        };
        let (_one, _) = host.device("one");
        let s = Session::start(&host, 0);
        let c = &s.client;
        for cmd in [IOAS_ALLOC, IOAS_MAP, DESTROY] {
            let mut arg = words(&[40, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            assert_eq!(c.ioctl(s.device, cmd, &mut arg), Err(libc::ENOTTY));
        }
        for (cmd, mut arg) in every() {
            let got = c.ioctl(s.iommufd, cmd, &mut arg);
            assert!(
                matches!(got, Err(libc::ENOTTY | libc::ENODEV)),
                "{cmd:x}: {got:?}"
            );
        }
        // Numbers that look like ours with another type, direction or size.
        for cmd in [
            0,
            0xffff_ffff,
            GET_INFO | 1 << 30,
            BIND | 4 << 16,
            0x4004_5601,
        ] {
            let got = c.ioctl(s.device, cmd, &mut words(&[16, 0, 0, 0]));
            assert_eq!(got, Err(libc::ENOTTY), "{cmd:x}");
        }
        // The question that the daemon asks itself is no client's.
        let identify = (u32::from(b'V') << 8) | 0xfd;
        let got = c.ioctl_at(s.iommufd, identify, 0);
        assert_eq!(got, Err(libc::ENOTTY), "who asks is not the daemon");
        assert_eq!(c.pread(s.iommufd, 0, 8), Err(libc::EINVAL));
        assert_eq!(c.pwrite(s.iommufd, 0, &[0; 8]), Err(libc::EINVAL));
        for fd in [s.device, s.iommufd] {
            assert_eq!(c.sys(libc::SYS_ftruncate, &[fd, 0]), Err(libc::EINVAL));
            assert_eq!(c.sys(libc::SYS_fsync, &[fd]), Err(libc::EINVAL));
        }
        assert!(c.pread(s.device, s.registers, 8).is_ok());
    });
}

#[test]
fn offsets_past_the_end() {
    alone!("offsets_past_the_end", || {
        let Some(host) = host("offsets_past_the_end") else {
            return;
        };
        let (_one, _) = host.device("one");
        let bystander = Bystander::start(&host);
        let s = Session::start(&host, 0);
        let c = &s.client;
        let end = s.registers + REGISTERS;
        assert!(c.pread(s.device, end - 8, 8).is_ok());
        for at in [end, end - 4, end + 4096, s.registers + (1 << 40), 1 << 62] {
            assert_eq!(c.pread(s.device, at, 8), Err(libc::EINVAL), "{at:x}");
            assert_eq!(c.pwrite(s.device, at, &[0; 8]), Err(libc::EINVAL), "{at:x}");
        }
        for at in [1 << 63, u64::MAX, u64::MAX - 7] {
            assert_eq!(c.pread(s.device, at, 8), Err(libc::EINVAL), "{at:x}");
        }
        let top = i64::MAX as u64;
        for at in [top, top - 7] {
            let got = c.pread(s.device, at, 8);
            assert!(
                matches!(got, Err(libc::EINVAL | libc::EOVERFLOW)),
                "{at:x}: {got:?}"
            );
        }
        let (_, _, mapped) = c.region(s.device, 1).unwrap();
        assert!(c.pread(s.device, mapped + MAPPED - 8, 8).is_ok());
        for at in [mapped + MAPPED - 4, mapped + MAPPED] {
            assert!(c.pread(s.device, at, 8).is_err(), "{at:x}");
        }
        let (_, _, empty) = c.region(s.device, 2).unwrap();
        assert_eq!(c.pread(s.device, empty, 1), Err(libc::EINVAL));
        assert_eq!(c.pread(s.device, s.registers, 0), Ok(Vec::new()));
        // Buffers that are not there: nothing was written to the device, nothing read wrongly.
        c.pwrite(s.device, s.registers, &[5; 8]).unwrap();
        let page = c.memory(8192);
        c.munmap(page + 4096, 4096);
        for addr in [8, 1 << 47, page + 4096] {
            for nr in [libc::SYS_pread64, libc::SYS_pwrite64] {
                let got = c.sys(nr, &[s.device, addr, 8, s.registers]);
                assert_eq!(got, Err(libc::EFAULT), "{addr:x}");
            }
        }
        // Half of it is there: FUSE asks for as much as there is room for
        // (`fs/fuse/file.c`, `fuse_get_user_pages`), a char device's driver would say EFAULT.
        let pread = [s.device, page + 4092, 8, s.registers];
        assert_eq!(c.sys(libc::SYS_pread64, &pread), Ok(4));
        assert_eq!(c.pread(s.device, s.registers + 4, 4), Ok(vec![5; 4]));
        bystander.end();
    });
}

/// The central validation of SET_IRQS, row by row.
#[test]
fn irqs_out_of_range() {
    alone!("irqs_out_of_range", || {
        let Some(host) = host("irqs_out_of_range") else {
            return;
        };
        let (_one, _) = host.device("one");
        let bystander = Bystander::start(&host);
        let s = Session::start(&host, 0);
        let c = &s.client;
        let event = c
            .sys(libc::SYS_eventfd2, &[0, libc::EFD_NONBLOCK as u64])
            .unwrap();
        let set = |arg: &[u32]| c.ioctl(s.device, SET_IRQS, &mut words(arg));
        let good = EVENTFD | TRIGGER;
        let fd = event as u32;
        assert_eq!(c.ioctl_at(s.device, SET_IRQS, 8), Err(libc::EFAULT));
        for (row, why) in [
            ([19, NONE | TRIGGER, 0, 0, 0, 0], "argsz"),
            ([0, NONE | TRIGGER, 0, 0, 0, 0], "argsz 0"),
            ([24, good, 5, 0, 1, fd], "index"),
            ([24, good, u32::MAX, 0, 1, fd], "index"),
            ([24, good, 0, 0, u32::MAX, fd], "count"),
            ([24, good, 0, 1, u32::MAX - 1, fd], "start + count wraps"),
            ([24, good, 0, u32::MAX, 1, fd], "start"),
            ([24, good, 0, 0, 2, fd], "more than there are"),
            ([24, good, 0, 1, 1, fd], "start past the last"),
            ([24, good, 0, 1, 0, fd], "start past the last, count 0"),
            ([20, NONE | TRIGGER, 2, 0, 0, 0], "disable without any irq"),
            ([24, good | 64, 0, 0, 1, fd], "unknown flag"),
            ([24, good | 1 << 31, 0, 0, 1, fd], "unknown flag"),
            ([24, TRIGGER, 0, 0, 1, fd], "no data bit"),
            ([24, good | NONE, 0, 0, 1, fd], "two data bits"),
            ([24, good | BOOL, 0, 0, 1, fd], "two data bits"),
            ([23, good, 0, 0, 1, fd], "too little data"),
            ([20, BOOL | TRIGGER, 0, 0, 1, 0], "too little data"),
        ] {
            assert_eq!(set(&row), Err(libc::EINVAL), "{why}");
        }
        for flags in [EVENTFD, EVENTFD | MASK | TRIGGER, NONE | MASK | UNMASK] {
            let got = set(&[24, flags, 0, 0, 1, fd]);
            assert_eq!(got, Err(libc::ENOTTY), "no action or several: {flags}");
        }
        // The data leaves memory although the structure does not.
        let page = c.memory(8192);
        c.munmap(page + 4096, 4096);
        let edge = page + 4096 - 20;
        c.poke(edge, &words(&[24, good, 0, 0, 1]));
        assert_eq!(c.ioctl_at(s.device, SET_IRQS, edge), Err(libc::EFAULT));
        // What is no eventfd.
        let with = |fd: u64| c.irqs(s.device, good, 0, 0, 1, &(fd as u32).to_ne_bytes());
        assert_eq!(with(9999), Err(libc::EBADF));
        let memfd = c.memfd(8, 0).unwrap();
        for fd in [memfd, s.device, s.iommufd] {
            assert_eq!(with(fd), Err(libc::EINVAL));
        }
        let path = c.open_with(&host.node(0), libc::O_PATH).unwrap();
        assert_eq!(with(path), Err(libc::EBADF));
        // Off still, after all of that.
        assert_eq!(
            c.irqs(s.device, NONE | TRIGGER, 0, 0, 1, &[]),
            Err(libc::EINVAL)
        );
        assert_eq!(with(event), Ok(0));
        // A bad one while it is on leaves the old one.
        assert_eq!(with(9999), Err(libc::EBADF));
        c.pwrite(s.device, s.registers + FIRE, &[1]).unwrap();
        assert_eq!(c.sys(libc::SYS_read, &[event, c.arena, 8]), Ok(8));
        // Another type while INTx is on.
        let data = fd.to_ne_bytes();
        assert_eq!(
            c.irqs(s.device, good, 1, 0, 1, &data),
            Err(libc::EINVAL),
            "one type at a time"
        );
        assert_eq!(c.irqs(s.device, NONE | TRIGGER, 0, 0, 0, &[]), Ok(0));
        assert_eq!(c.irqs(s.device, good, 1, 0, 1, &data), Ok(0));
        for flags in [NONE | MASK, NONE | UNMASK] {
            let got = c.irqs(s.device, flags, 1, 0, 1, &[]);
            assert_eq!(got, Err(libc::ENOTTY));
        }
        bystander.end();
    });
}

#[test]
fn exactly_one_wins_a_bind() {
    alone!("exactly_one_wins_a_bind", || {
        let Some(host) = host("exactly_one_wins_a_bind") else {
            return;
        };
        let (_one, _) = host.device("one");
        let bystander = Bystander::start(&host);
        let clients = [Client::start(), Client::start()];
        let iommus = clients.each_ref().map(|c| c.open(&host.iommu()).unwrap());
        let mut wins = [0, 0];
        for round in 0..100 {
            let files = clients.each_ref().map(|c| c.open(&host.node(0)).unwrap());
            let at = now() + 300_000;
            for n in 0..2 {
                let arg = clients[n].arena + 512;
                clients[n].poke(arg, &bind_arg(iommus[n]));
                let args = [files[n], BIND.into(), arg, 0];
                clients[n].start_sys_at(at, libc::SYS_ioctl, &args);
            }
            let patience = Duration::from_secs(10);
            let got = clients.each_ref().map(|c| c.finish(patience).unwrap());
            let winner = match got {
                [Ok(0), Err(libc::EINVAL)] => 0,
                [Err(libc::EINVAL), Ok(0)] => 1,
                other => panic!("round {round}: {other:?}"),
            };
            wins[winner] += 1;
            let (c, lost) = (&clients[winner], &clients[1 - winner]);
            assert!(c.region(files[winner], 0).is_ok());
            assert_eq!(lost.region(files[1 - winner], 0), Err(libc::EINVAL));
            c.close(files[winner]);
            until("the loser's turn", || {
                lost.bind(files[1 - winner], iommus[1 - winner]).is_ok()
            });
            lost.close(files[1 - winner]);
        }
        eprintln!("wins: {wins:?}");
        bystander.end();
    });
}

/// Modes and owners are checked by the kernel, with the numbers that we give.
#[test]
fn another_user() {
    alone!("another_user", || {
        let Some(host) = crate::common::Host::new("another_user", |options| {
            options.device.uid = 0;
        }) else {
            return;
        };
        let _ = std::fs::set_permissions(&host.dir, PermissionsExt::from_mode(0o755));
        use std::os::unix::fs::PermissionsExt;
        let (_one, _) = host.device("one");
        let c = Client::start();
        let root = Client::start();
        c.sys(libc::SYS_setgroups, &[0, 0]).unwrap();
        c.sys(libc::SYS_setresgid, &[65534, 65534, 65534]).unwrap();
        c.sys(libc::SYS_setresuid, &[65534, 65534, 65534]).unwrap();
        assert_eq!(c.open(&host.node(0)), Err(libc::EACCES));
        assert_eq!(c.open(&host.iommu()), Err(libc::EACCES));
        assert_eq!(
            c.open_with(&host.node(0), libc::O_RDONLY),
            Err(libc::EACCES)
        );
        assert!(root.open(&host.node(0)).is_ok());
        // A descriptor that was passed by somebody who may is good.
        let passed = c.take(root.give(root.open(&host.iommu()).unwrap()));
        assert!(c.ioas(passed).is_ok());
        // As udev would: chown, chmod.
        std::os::unix::fs::chown(host.node(0), Some(65534), None).unwrap();
        std::fs::set_permissions(host.iommu(), PermissionsExt::from_mode(0o666)).unwrap();
        let device = c.open(&host.node(0)).unwrap();
        let iommu = c.open(&host.iommu()).unwrap();
        assert!(c.bind(device, iommu).is_ok());
        assert!(c.region(device, 0).is_ok());
        drop(host);

        let Some(host) = crate::common::Host::new("another_user", |options| {
            (options.device.uid, options.device.gid) = (65534, 65534);
            options.iommu.mode = 0o660;
            options.iommu.gid = 65534;
        }) else {
            return;
        };
        let (_one, _) = host.device("one");
        let device = c.open(&host.node(0)).unwrap();
        let iommu = c.open(&host.iommu()).unwrap();
        let devid = c.bind(device, iommu).unwrap();
        let ioas = c.ioas(iommu).unwrap();
        assert_eq!(c.attach(device, ioas), Ok(ioas));
        assert_ne!(devid, ioas);
    });
}
