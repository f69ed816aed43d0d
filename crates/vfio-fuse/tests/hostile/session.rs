//! A whole session as an unmodified client has it, and the errors of BIND, ATTACH and the info
//! calls in the kernel's order.

use crate::client::Client;
use crate::common::{FIRE, Host, MAPPED, REGISTERS, until};
use crate::scene::{Bystander, Session, alone, host};
use crate::uapi::*;
use std::sync::atomic::Ordering;

fn eventfd(client: &Client) -> u64 {
    client
        .sys(libc::SYS_eventfd2, &[0, libc::EFD_NONBLOCK as u64])
        .unwrap()
}

/// What an eventfd holds: 0 if nothing.
fn counter(client: &Client, fd: u64) -> u64 {
    match client.sys(libc::SYS_read, &[fd, client.arena, 8]) {
        Ok(8) => long(&client.peek(client.arena, 8), 0),
        Err(libc::EAGAIN) => 0,
        other => panic!("an eventfd answers {other:?}"),
    }
}

#[test]
fn all_of_it() {
    alone!("all_of_it", || {
        let Some(host) = host("all_of_it") else {
            return;
        };
        let (_device, seen) = host.device("one");
        let bystander = Bystander::start(&host);
        let s = Session::start(&host, 0);
        let c = &s.client;
        assert_eq!(seen.opened.load(Ordering::SeqCst), 1);

        let mut info = words(&[24, 0, 0, 0, 7, 7]);
        assert_eq!(c.ioctl(s.device, GET_INFO, &mut info), Ok(0));
        assert_eq!((word(&info, 1), word(&info, 2), word(&info, 3)), (2, 3, 5));
        assert_eq!(word(&info, 4), 0, "no capabilities");
        let (flags, size, _) = c.region(s.device, 0).unwrap();
        assert_eq!((flags, size), (3, REGISTERS));
        let (flags, size, at) = c.region(s.device, 1).unwrap();
        assert_eq!((flags, size, at % 4096), (7, MAPPED, 0));
        assert_eq!(c.region(s.device, 2).map(|r| (r.0, r.1)), Ok((0, 0)));
        assert_eq!(c.region(s.device, 3), Err(libc::EINVAL));
        let mut irq = words(&[16, 0, 1, 9]);
        assert_eq!(c.ioctl(s.device, IRQ_INFO, &mut irq), Ok(0));
        assert_eq!((word(&irq, 1), word(&irq, 3)), (1, 1));
        irq = words(&[16, 0, 5, 9]);
        assert_eq!(c.ioctl(s.device, IRQ_INFO, &mut irq), Err(libc::EINVAL));

        memory_of_every_kind(&host, &s);

        // Interrupts: fired, masked, held back, let through.
        let event = eventfd(c);
        let data = (event as u32).to_ne_bytes();
        assert_eq!(c.irqs(s.device, EVENTFD | TRIGGER, 0, 0, 1, &data), Ok(0));
        let fire = |c: &Client| c.pwrite(s.device, s.registers + FIRE, &[1]).unwrap();
        fire(c);
        assert_eq!(counter(c, event), 1);
        assert_eq!(c.irqs(s.device, NONE | UNMASK, 0, 0, 1, &[]), Ok(0));
        assert_eq!(c.irqs(s.device, NONE | MASK, 0, 0, 1, &[]), Ok(0));
        fire(c);
        assert_eq!(counter(c, event), 0, "masked");
        assert_eq!(c.irqs(s.device, NONE | UNMASK, 0, 0, 1, &[]), Ok(0));
        fire(c);
        assert_eq!(counter(c, event), 1);
        assert_eq!(c.irqs(s.device, BOOL | UNMASK, 0, 0, 1, &[1]), Ok(0));
        assert_eq!(c.irqs(s.device, BOOL | TRIGGER, 0, 0, 1, &[1]), Ok(0));
        assert_eq!(counter(c, event), 1, "a trigger by hand");
        // The daemon has an eventfd of its own file: the client may close its number.
        c.close(event);
        assert_eq!(c.irqs(s.device, NONE | UNMASK, 0, 0, 1, &[]), Ok(0));
        fire(c);
        assert_eq!(c.irqs(s.device, NONE | TRIGGER, 0, 0, 0, &[]), Ok(0));

        c.pwrite(s.device, s.registers, &[9; 8]).unwrap();
        assert_eq!(c.ioctl_at(s.device, RESET, 0x1234), Ok(0));
        assert_eq!(c.pread(s.device, s.registers, 8), Ok(vec![0; 8]));

        s.map_rw(c.arena + 65536, 4096, 0);
        assert_eq!(c.detach(s.device), Ok(0));
        assert_eq!(s.dma_read(0), Err(libc::ENOENT), "detached");
        assert_eq!(c.detach(s.device), Ok(0), "again, and nothing happens");
        c.attach(s.device, s.ioas).unwrap();
        s.dma_read(0).unwrap();
        assert_eq!(s.unmap(0, 4096), Ok(4096));
        assert_eq!(s.dma_read(0), Err(libc::ENOENT));
        c.close(s.device);
        until("close", || seen.closed.load(Ordering::SeqCst) == 1);
        bystander.end();
    });
}

/// Both directions, through each kind of memory a client may have.
fn memory_of_every_kind(host: &Host, s: &Session) {
    let c = &s.client;
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    let private = c.memory(8192);
    let anonymous = c
        .mmap(8192, rw, libc::MAP_SHARED | libc::MAP_ANONYMOUS, None, 0)
        .unwrap();
    let memfd = c.memfd(8192, 0).unwrap();
    let shared = c.mmap(8192, rw, libc::MAP_SHARED, Some(memfd), 0).unwrap();
    let copied = c.mmap(8192, rw, libc::MAP_PRIVATE, Some(memfd), 0).unwrap();
    let mut kinds = vec![private, anonymous, shared, copied];
    match c.memfd(2 << 20, libc::MFD_HUGETLB).and_then(|fd| {
        // Reserving pages happens at mmap, and fails there where the machine has none.
        c.mmap(2 << 20, rw, libc::MAP_SHARED, Some(fd), 0)
    }) {
        Ok(addr) => kinds.push(addr),
        Err(errno) => eprintln!("SKIPPED hugetlb memory: this machine has no huge pages: {errno}"),
    }
    for (n, addr) in kinds.iter().enumerate() {
        let iova = 0x10_0000 * (n as u64 + 1);
        s.map_rw(*addr, 8192, iova);
        c.poke(addr + 4096, &(77 + n as u64).to_ne_bytes());
        assert_eq!(s.dma_read(iova + 4096), Ok(77 + n as u64), "kind {n}");
        s.dma_write(iova + 4092, 0x0102_0304_0506_0708).unwrap();
        let seen = c.peek(addr + 4092, 8);
        assert_eq!(
            long(&seen, 0),
            0x0102_0304_0506_0708,
            "across pages, kind {n}"
        );
        assert_eq!(
            s.dma_read(iova + 8184 + 4),
            Err(libc::ENOENT),
            "over the end"
        );
    }
    assert_eq!(
        c.sys(libc::SYS_pread64, &[memfd, c.arena, 8, 4092]),
        Ok(8),
        "the file itself"
    );
    assert_eq!(long(&c.peek(c.arena, 8), 0), 0x0102_0304_0506_0708);
    // The same file, mapped by its descriptor.
    let by_file = |fd: u64, start: u64| {
        let mut arg = words(&[40, MAP_RW | MAP_FIXED, s.ioas, fd as u32]);
        for value in [start, 4096, 0x800_0000] {
            arg.extend(value.to_ne_bytes());
        }
        c.ioctl(s.iommufd, IOAS_MAP_FILE, &mut arg)
    };
    assert_eq!(by_file(memfd, 4096), Ok(0));
    s.dma_write(0x800_0008, 88).unwrap();
    assert_eq!(long(&c.peek(shared + 4104, 8), 0), 88);
    assert_eq!(s.unmap(0x800_0000, 4096), Ok(4096));
    assert_eq!(by_file(u64::MAX, 0), Err(libc::EBADF));
    assert_eq!(by_file(9999, 0), Err(libc::EBADF));
    for fd in [s.device, s.iommufd] {
        assert_eq!(by_file(fd, 0), Err(libc::EINVAL), "no memory");
    }
    // Memory that the client itself may only read.
    let fixed = c
        .mmap(
            4096,
            libc::PROT_READ,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            None,
            0,
        )
        .unwrap();
    assert_eq!(s.map(fixed, 4096, 0x900_0000, MAP_READ), Ok(0x900_0000));
    assert_eq!(s.dma_read(0x900_0000), Ok(0));
    assert_eq!(s.dma_write(0x900_0000, 1), Err(libc::EPERM));
    assert_eq!(s.unmap(0x900_0000, 4096), Ok(4096));
    match s.map(fixed, 4096, 0x900_0000, MAP_RW) {
        // Nothing is pinned: a writable mapping of what cannot be written fails at the access.
        Ok(_) => assert_eq!(s.dma_write(0x900_0000, 1), Err(libc::EFAULT)),
        Err(errno) => assert_eq!(errno, libc::EFAULT),
    }
    assert_eq!(c.peek(fixed, 8), [0; 8]);
    assert!(s.unmap(0, u64::MAX).is_ok());
    let _ = host;
}

/// Table by table: what BIND refuses, in the kernel's order.
#[test]
fn bind_errors() {
    alone!("bind_errors", || {
        let Some(host) = host("bind_errors") else {
            return;
        };
        let (_one, _) = host.device("one");
        let (_two, _) = host.device("two");
        let bystander = Bystander::start(&host);
        let c = Client::start();
        let device = c.open(&host.node(0)).unwrap();
        let iommu = c.open(&host.iommu()).unwrap();
        let nothing = 4096 - 8;
        let bind = |arg: &mut [u8]| c.ioctl(device, BIND, arg);

        // 1: the size word and the structure.
        assert_eq!(c.ioctl_at(device, BIND, nothing), Err(libc::EFAULT));
        assert_eq!(c.ioctl_at(device, BIND, u64::MAX - 2), Err(libc::EFAULT));
        assert_eq!(c.ioctl_at(device, BIND, 1 << 63), Err(libc::EFAULT));
        for short in [0, 1, 8, 15] {
            let mut arg = words(&[short, 0, iommu as u32, 0]);
            assert_eq!(bind(&mut arg), Err(libc::EINVAL), "size {short}");
        }
        let mut tail = words(&[32, 0, iommu as u32, 0, 0, 0, 0, 1]);
        assert_eq!(bind(&mut tail), Err(libc::E2BIG));
        let page = c.memory(8192);
        c.munmap(page + 4096, 4096);
        // The size word can be read, the rest cannot.
        let edge = page + 4096 - 8;
        c.poke(edge, &words(&[16, 0]));
        assert_eq!(c.ioctl_at(device, BIND, edge), Err(libc::EFAULT));
        // So long that the tail leaves mapped memory.
        let edge = page + 4096 - 64;
        c.poke(edge, &words(&[u32::MAX, 0, iommu as u32, 0]));
        let huge = c.ioctl_at(device, BIND, edge);
        assert!(
            matches!(huge, Err(libc::EFAULT | libc::E2BIG)),
            "a huge size: {huge:?}"
        );
        // 2: number and flags, before the descriptor is looked at.
        for fd in [-1_i32, i32::MIN] {
            let mut arg = words(&[16, 0, fd as u32, 0]);
            assert_eq!(bind(&mut arg), Err(libc::EINVAL));
        }
        for flags in [2, 0x8000_0000, 3] {
            let mut arg = words(&[16, flags, iommu as u32, 0]);
            assert_eq!(bind(&mut arg), Err(libc::EINVAL));
        }
        // 6: no token for these drivers.
        let mut token = words(&[24, 1, iommu as u32, 0, 0, 0]);
        assert_eq!(bind(&mut token), Err(libc::EINVAL));
        // 7: what is no iommufd.
        assert_eq!(bind(&mut bind_arg(9999)), Err(libc::EBADF));
        let path = c
            .open_with(&host.iommu(), libc::O_PATH | libc::O_CLOEXEC)
            .unwrap();
        assert_eq!(bind(&mut bind_arg(path)), Err(libc::EBADF));
        let event = c.sys(libc::SYS_eventfd2, &[0, 0]).unwrap();
        let memfd = c.memfd(16, 0).unwrap();
        let file = c.open("/dev/null".as_ref()).unwrap();
        let exe = std::env::current_exe().unwrap();
        let regular = c.open_with(&exe, libc::O_RDONLY).unwrap();
        let other = c.open(&host.node(1)).unwrap();
        for fd in [event, memfd, file, regular, device, other] {
            assert_eq!(bind(&mut bind_arg(fd)), Err(libc::EBADFD), "fd {fd}");
        }
        // Opened read-only it is an iommufd all the same, and a zero tail is no harm.
        let read_only = c.open_with(&host.iommu(), libc::O_RDONLY).unwrap();
        // 12: the answer cannot be written: closed and unbound again, the file may bind later.
        c.poke(page, &words(&[16, 0, read_only as u32, 0]));
        let protect = |prot: i32| c.sys(libc::SYS_mprotect, &[page, 4096, prot as u64]);
        protect(libc::PROT_READ).unwrap();
        assert_eq!(c.ioctl_at(device, BIND, page), Err(libc::EFAULT));
        assert_eq!(
            c.ioctl(device, GET_INFO, &mut words(&[16, 0, 0, 0])),
            Err(libc::EINVAL),
            "not bound"
        );
        let mut long_arg = words(&[32, 0, read_only as u32, 0, 0, 0, 0, 0]);
        assert_eq!(bind(&mut long_arg), Ok(0));
        assert_ne!(word(&long_arg, 3), 0);
        // 5: bound already, even with a descriptor that is not one.
        assert_eq!(bind(&mut bind_arg(iommu)), Err(libc::EINVAL));
        assert_eq!(bind(&mut bind_arg(9999)), Err(libc::EINVAL));
        // 8: another file of the device is bound; 7 comes first.
        let again = c.open(&host.node(0)).unwrap();
        assert_eq!(
            c.ioctl(again, BIND, &mut bind_arg(iommu)),
            Err(libc::EINVAL)
        );
        assert_eq!(c.ioctl(again, BIND, &mut bind_arg(9999)), Err(libc::EBADF));
        assert_eq!(
            c.ioctl(again, BIND, &mut bind_arg(event)),
            Err(libc::EBADFD)
        );
        c.close(device);
        until("the next client's turn", || {
            c.ioctl(again, BIND, &mut bind_arg(iommu)) == Ok(0)
        });
        bystander.end();
    });
}

#[test]
fn attach_errors() {
    alone!("attach_errors", || {
        let Some(host) = host("attach_errors") else {
            return;
        };
        let (_one, _) = host.device("one");
        let s = Session::start(&host, 0);
        let c = &s.client;
        let attach = |arg: &mut [u8]| c.ioctl(s.device, ATTACH, arg);
        let detach = |arg: &mut [u8]| c.ioctl(s.device, DETACH, arg);
        assert_eq!(c.ioctl_at(s.device, ATTACH, 8), Err(libc::EFAULT));
        assert_eq!(c.ioctl_at(s.device, DETACH, 8), Err(libc::EFAULT));
        for size in [0, 11] {
            assert_eq!(attach(&mut words(&[size, 0, s.ioas])), Err(libc::EINVAL));
        }
        for size in [0, 7] {
            assert_eq!(detach(&mut words(&[size, 0])), Err(libc::EINVAL));
        }
        for flags in [2, 4, 0x8000_0000] {
            assert_eq!(attach(&mut words(&[12, flags, s.ioas])), Err(libc::EINVAL));
            assert_eq!(detach(&mut words(&[8, flags])), Err(libc::EINVAL));
        }
        // Emulated: no PASIDs, whatever the size.
        for size in [12, 16, 4096] {
            let mut arg = words(&[size, 1, s.ioas, 1]);
            assert_eq!(attach(&mut arg), Err(libc::EOPNOTSUPP));
        }
        for size in [8, 12, 4096] {
            assert_eq!(detach(&mut words(&[size, 1, 1])), Err(libc::EOPNOTSUPP));
        }
        assert_eq!(attach(&mut words(&[12, 0, 9999])), Err(libc::ENOENT));
        assert_eq!(
            attach(&mut words(&[12, 0, s.devid])),
            Err(libc::ENOENT),
            "an emulated device takes an IOAS only"
        );
        // None of these has changed what is attached.
        s.map_rw(c.arena + 8192, 4096, 0);
        s.dma_read(0).unwrap();
        // Sizes beyond the structure are no matter, in this dialect.
        for size in [12, 13, 16, 24, u32::MAX] {
            let mut arg = words(&[size, 0, s.ioas, 0]);
            assert_eq!(attach(&mut arg), Ok(0), "size {size}");
            assert_eq!(word(&arg, 2), s.ioas);
        }
        // The id cannot be written back: EFAULT, and the device is detached (a kernel quirk).
        let page = c.memory(4096);
        c.poke(page, &words(&[12, 0, s.ioas]));
        c.sys(libc::SYS_mprotect, &[page, 4096, libc::PROT_READ as u64])
            .unwrap();
        assert_eq!(c.ioctl_at(s.device, ATTACH, page), Err(libc::EFAULT));
        assert_eq!(s.dma_read(0), Err(libc::ENOENT), "detached");
        assert_eq!(detach(&mut words(&[8, 0])), Ok(0));
        // Replaced while attached.
        let second = c.ioas(s.iommufd).unwrap();
        c.attach(s.device, s.ioas).unwrap();
        assert_eq!(c.attach(s.device, second), Ok(second));
        assert_eq!(s.dma_read(0), Err(libc::ENOENT), "nothing is mapped there");
        assert_eq!(
            c.ioctl(s.iommufd, DESTROY, &mut words(&[8, second])),
            Err(libc::EBUSY)
        );
        assert_eq!(
            c.ioctl(s.iommufd, DESTROY, &mut words(&[8, s.devid])),
            Err(libc::EBUSY)
        );
    });
}

/// Every argsz one short, exact, odd and huge; pointers to nothing; results that cannot be written.
#[test]
fn sizes_and_pointers() {
    alone!("sizes_and_pointers", || {
        let Some(host) = host("sizes_and_pointers") else {
            return;
        };
        let (_one, _) = host.device("one");
        let bystander = Bystander::start(&host);
        let s = Session::start(&host, 0);
        let c = &s.client;
        for (cmd, min) in [(GET_INFO, 16), (REGION_INFO, 32), (IRQ_INFO, 16)] {
            for (size, expected) in [
                (0, Err(libc::EINVAL)),
                (min - 1, Err(libc::EINVAL)),
                (min, Ok(0)),
                (min + 1, Ok(0)),
                (min + 7, Ok(0)),
                (u32::MAX, Ok(0)),
            ] {
                let mut arg = words(&[size, 0, 0, 0, 0, 0, 0, 0, 0x5a5a_5a5a, 0x5a5a_5a5a]);
                assert_eq!(c.ioctl(s.device, cmd, &mut arg), expected, "{cmd:x} {size}");
                assert_eq!(word(&arg, 8), 0x5a5a_5a5a, "nothing beyond the structure");
            }
            for bad in [0, 8, 4095, 1 << 47, 1 << 63, u64::MAX, u64::MAX - 7] {
                assert_eq!(c.ioctl_at(s.device, cmd, bad), Err(libc::EFAULT), "{bad:x}");
            }
            // Cut off in the middle by the end of a mapping.
            let page = c.memory(8192);
            c.munmap(page + 4096, 4096);
            let edge = page + 4096 - 8;
            c.poke(edge, &words(&[min, 0]));
            assert_eq!(c.ioctl_at(s.device, cmd, edge), Err(libc::EFAULT));
            let edge = page + 4096 - u64::from(min);
            let mut arg = words(&[min, 0, 0, 0, 0, 0, 0, 0]);
            arg.truncate(min as usize);
            c.poke(edge, &arg);
            assert_eq!(c.ioctl_at(s.device, cmd, edge), Ok(0), "it just fits");
            // An odd address.
            c.poke(page + 1, &arg);
            assert_eq!(c.ioctl_at(s.device, cmd, page + 1), Ok(0));
            // The answer cannot be written.
            c.poke(page, &arg);
            c.sys(libc::SYS_mprotect, &[page, 4096, libc::PROT_READ as u64])
                .unwrap();
            assert_eq!(c.ioctl_at(s.device, cmd, page), Err(libc::EFAULT));
            assert_eq!(c.peek(page, arg.len()), arg, "and was not");
        }
        // IOAS_MAP whose answer cannot be written: EFAULT, and the mapping is there.
        let page = c.memory(4096);
        let mut arg = words(&[40, MAP_RW | MAP_FIXED, s.ioas, 0]);
        for value in [c.arena + 65536, 4096, 0x5000] {
            arg.extend(value.to_ne_bytes());
        }
        c.poke(page, &arg);
        c.sys(libc::SYS_mprotect, &[page, 4096, libc::PROT_READ as u64])
            .unwrap();
        assert_eq!(c.ioctl_at(s.iommufd, IOAS_MAP, page), Err(libc::EFAULT));
        assert!(s.dma_read(0x5000).is_ok(), "the side effect is kept");
        assert_eq!(s.unmap(0x5000, 4096), Ok(4096));
        // iommufd's dialect.
        for (cmd, min) in [
            (IOAS_ALLOC, 12),
            (IOAS_MAP, 40),
            (IOAS_UNMAP, 24),
            (DESTROY, 8),
        ] {
            for size in [0, min - 1] {
                let mut arg = words(&[size, 0, s.ioas, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
                let got = c.ioctl(s.iommufd, cmd, &mut arg);
                assert_eq!(got, Err(libc::EINVAL), "{cmd:x} {size}");
            }
            let mut arg = words(&[min + 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            arg[min as usize + 7] = 1;
            assert_eq!(c.ioctl(s.iommufd, cmd, &mut arg), Err(libc::E2BIG));
            for bad in [0, 8, u64::MAX - 3] {
                assert_eq!(c.ioctl_at(s.iommufd, cmd, bad), Err(libc::EFAULT));
            }
        }
        bystander.end();
    });
}
