//! Groups and containers, with clients that do everything in the wrong order.

use crate::client::{Client, Outcome};
use crate::common::{DMA_READ, Host, VALUE};
use crate::scene::{Bystander, alone, host};
use crate::uapi::*;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// A device opened by its group, and what it is opened with.
pub struct ByGroup {
    pub container: u64,
    pub group: u64,
    pub device: u64,
}

/// The whole way of a client under a supervisor: container, group, device.
pub fn by_group(host: &Host, c: &Client, n: u32, name: &[u8]) -> Result<ByGroup, i32> {
    let container = c.open(&host.container())?;
    let group = c.open(&host.group(n))?;
    c.set_container(group, container)?;
    c.ioctl_at(container, SET_IOMMU, TYPE1_V2)?;
    let device = open_found(host, c, group, name)?;
    Ok(ByGroup {
        container,
        group,
        device,
    })
}

pub fn open_found(host: &Host, c: &Client, group: u64, name: &[u8]) -> Outcome {
    let mut terminated = name.to_vec();
    terminated.push(0);
    let index = c.ioctl_name(group, FIND_DEVICE, &terminated)?;
    let device = c.open(&host.node(index as u32))?;
    match c.open_device(device, group, name) {
        Ok(_) => Ok(device),
        Err(errno) => {
            c.close(device);
            Err(errno)
        }
    }
}

pub fn dma_read(c: &Client, device: u64, iova: u64) -> Result<u64, i32> {
    let at = c.region(device, 0)?.2;
    c.pwrite(device, at + DMA_READ, &iova.to_ne_bytes())?;
    let value = c.pread(device, at + VALUE, 8)?;
    Ok(u64::from_ne_bytes(value.try_into().unwrap()))
}

#[test]
fn a_session_by_group() {
    alone!("a_session_by_group", || {
        let Some(host) = host("a_session_by_group") else {
            return;
        };
        let (_device, seen) = host.device("one");
        let c = Client::start();
        let s = by_group(&host, &c, 0, b"one").unwrap();
        assert_eq!(c.group_status(s.group), Ok(3));
        c.map_dma(s.container, c.arena + 65536, 65536, 0x10_0000)
            .unwrap();
        c.poke(c.arena + 65536 + 64, &0x1234_5678_u64.to_ne_bytes());
        assert_eq!(dma_read(&c, s.device, 0x10_0040), Ok(0x1234_5678));
        // 19 and 20 are not for a group's file, and it cannot be bound.
        assert_eq!(c.attach(s.device, 1), Err(libc::ENOTTY));
        assert_eq!(c.detach(s.device), Err(libc::ENOTTY));
        let iommufd = c.open(&host.iommu()).unwrap();
        assert_eq!(c.bind(s.device, iommufd), Err(libc::EINVAL));
        // Again: another file of the same session.
        let second = open_found(&host, &c, s.group, b"one").unwrap();
        assert_eq!(dma_read(&c, second, 0x10_0040), Ok(0x1234_5678));
        assert_eq!(seen.opened.load(Ordering::SeqCst), 1);
        c.close(s.device);
        assert_eq!(dma_read(&c, second, 0x10_0040), Ok(0x1234_5678));
        // Who holds it is the client, whoever opened it for him.
        let device = host.core.device(0).unwrap();
        assert_eq!(device.files().last().unwrap().opener().pid, c.pid as u32);
        assert_eq!(c.unset_container(s.group), Err(libc::EBUSY));
        c.close(second);
        assert_eq!(c.unset_container(s.group), Ok(0), "right after the close");
        assert_eq!(c.unset_container(s.group), Err(libc::EINVAL));
        assert_eq!(seen.closed.load(Ordering::SeqCst), 1);
        c.close(s.group);
        let again = c.open(&host.group(0)).unwrap();
        c.close(again);
        let bound = c.open(&host.node(0)).unwrap();
        assert!(c.bind(bound, iommufd).is_ok(), "right after the close");
        assert_eq!(c.open(&host.group(0)), Err(libc::EBUSY));
    });
}

/// What `WHAT` says of an open file.
fn what(c: &Client, fd: u64) -> Vec<u32> {
    let mut arg = words(&[24, 0, 0, 0, 0, 0]);
    assert_eq!(c.ioctl(fd, WHAT, &mut arg), Ok(0));
    (1..6).map(|at| word(&arg, at)).collect()
}

#[test]
fn nodes_say_what_they_are() {
    alone!("nodes_say_what_they_are", || {
        let Some(host) = host("nodes_say_what_they_are") else {
            return;
        };
        let (_first, _) = host.device("zero");
        let (_device, _) = host.device("one");
        let c = Client::start();
        let container = c.open(&host.container()).unwrap();
        let group = c.open(&host.group(1)).unwrap();
        let device = c.open(&host.node(1)).unwrap();
        let iommu = c.open(&host.iommu()).unwrap();
        for path in [host.container(), host.group(0), host.iommu()] {
            let direct = c.open_with(&path, libc::O_RDWR | libc::O_DIRECT);
            assert_eq!(direct, Err(libc::EINVAL), "{path:?}");
        }
        assert_eq!(what(&c, container), [1, 10, 196, 0o666, 0]);
        assert_eq!(what(&c, group), [2, 510, 1, 0o600, 1]);
        assert_eq!(what(&c, device), [3, 511, 1, 0o600, 1]);
        assert_eq!(what(&c, iommu), [4, 10, 127, 0o660, 0]);
        assert_eq!(
            c.ioctl(group, WHAT, &mut words(&[23, 0, 0, 0, 0, 0])),
            Err(libc::EINVAL)
        );
        assert_eq!(c.ioctl_at(group, WHAT, 8), Err(libc::EFAULT));
        // Reads and writes are nothing for them; seeking is the kernel's.
        for fd in [container, group, iommu] {
            assert_eq!(c.pread(fd, 0, 8), Err(libc::EINVAL));
            assert_eq!(c.pwrite(fd, 0, b"12345678"), Err(libc::EINVAL));
            let mapped = c.mmap(4096, libc::PROT_READ, libc::MAP_SHARED, Some(fd), 0);
            assert_eq!(mapped, Err(libc::ENODEV));
            assert_eq!(
                c.ioctl_at(fd, GET_INFO, 0).unwrap_err(),
                match fd {
                    fd if fd == container => libc::EINVAL,
                    _ => libc::ENOTTY,
                }
            );
        }
        assert_eq!(
            c.ioctl_name(group, GET_DEVICE_FD, b"one\0"),
            Err(libc::EOPNOTSUPP)
        );
        // The nodes of the machine's own kernel have the same modes.
        use std::os::unix::fs::MetadataExt;
        let mode = |path| std::fs::metadata(path).unwrap().mode() & 0o7777;
        assert_eq!(mode(host.group(0)), 0o600);
        assert_eq!(mode(host.container()), 0o666);
        let mut names: Vec<String> = std::fs::read_dir(host.dir.join("dev/vfio"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["0", "1", "devices", "vfio"]);
    });
}

#[test]
fn names_that_are_no_devices() {
    alone!("names_that_are_no_devices", || {
        let Some(host) = host("names_that_are_no_devices") else {
            return;
        };
        let (_first, _) = host.device("zero");
        let (_second, _) = host.device("one");
        let beside = Bystander::start(&host);
        let c = Client::start();
        let s = by_group(&host, &c, 0, b"zero").unwrap();
        let find = |name: &[u8]| c.ioctl_name(s.group, FIND_DEVICE, name);
        assert_eq!(find(b"zero\0"), Ok(0));
        for none in ["one", "zero ", " zero", "zer", "ZERO", "", "0000:00:00.0"] {
            assert_eq!(
                find(format!("{none}\0").as_bytes()),
                Err(libc::ENODEV),
                "{none:?}"
            );
        }
        // Without a NUL: at the end of the memory, and in 4096 bytes.
        let end = c.memory(8192);
        c.munmap(end + 4096, 4096);
        c.poke(end + 4090, b"zero\0x");
        assert_eq!(
            c.ioctl_at(s.group, FIND_DEVICE, end + 4090),
            Ok(0),
            "not past the NUL"
        );
        c.poke(end + 4090, b"zerone");
        assert_eq!(
            c.ioctl_at(s.group, FIND_DEVICE, end + 4090),
            Err(libc::EFAULT)
        );
        for bad in [0, 8, end + 4096, u64::MAX - 2] {
            assert_eq!(
                c.ioctl_at(s.group, FIND_DEVICE, bad),
                Err(libc::EFAULT),
                "{bad:#x}"
            );
        }
        let long = c.memory(8192);
        c.poke(long, &[b'x'; 8192]);
        assert_eq!(
            c.ioctl_at(s.group, FIND_DEVICE, long + 1),
            Err(libc::EINVAL)
        );
        c.poke(long + 4096, b"\0");
        assert_eq!(
            c.ioctl_at(s.group, FIND_DEVICE, long),
            Err(libc::EINVAL),
            "4097 with it"
        );
        assert_eq!(
            c.ioctl_at(s.group, FIND_DEVICE, long + 1),
            Err(libc::ENODEV),
            "4096"
        );

        // OPEN_DEVICE: a name of another device, another group, no group at all.
        let other = c.open(&host.node(1)).unwrap();
        assert_eq!(c.open_device(other, s.group, b"one"), Err(libc::ENODEV));
        assert_eq!(c.open_device(other, s.group, b"zero"), Err(libc::ESTALE));
        let foreign = c.open(&host.group(1)).unwrap();
        assert_eq!(
            c.open_device(other, foreign, b"one"),
            Err(libc::EINVAL),
            "no container"
        );
        let pipe = c.memfd(4096, 0).unwrap();
        for (fd, errno) in [
            (pipe, libc::EBADFD),
            (s.container, libc::EBADFD),
            (s.device, libc::EBADFD),
            (other, libc::EBADFD),
            (999, libc::EBADF),
            (u64::MAX, libc::EBADF),
        ] {
            assert_eq!(c.open_device(other, fd, b"one"), Err(errno), "{fd}");
        }
        assert_eq!(
            c.open_device(s.device, s.group, b"zero"),
            Err(libc::EINVAL),
            "bound"
        );
        assert_eq!(
            c.open_device(other, foreign, &[b'x'; 4096]),
            Err(libc::EINVAL)
        );
        assert_eq!(
            c.ioctl(other, OPEN_DEVICE, &mut words(&[23, 0, 0, 0, 0, 0])),
            Err(libc::EINVAL)
        );
        assert_eq!(
            c.ioctl(
                other,
                OPEN_DEVICE,
                &mut words(&[24, s.group as u32, 0, 4, 8, 0])
            ),
            Err(libc::EFAULT)
        );
        // It is as it was: it can be opened the right way.
        c.set_container(foreign, s.container).unwrap();
        assert_eq!(c.open_device(other, foreign, b"one"), Ok(0));
        // SET_CONTAINER with what is no container.
        let (_third, _) = host.device("two");
        let index = crate::scene::device_index(&host, &_third);
        let free = c.open(&host.group(index)).unwrap();
        for fd in [pipe, s.device, s.group, free] {
            assert_eq!(c.set_container(free, fd), Err(libc::EBADFD), "{fd}");
        }
        assert_eq!(c.set_container(free, 999), Err(libc::EBADF));
        assert_eq!(c.ioctl_at(free, SET_CONTAINER, 8), Err(libc::EFAULT));
        let path = c.open_with(&host.container(), libc::O_PATH).unwrap();
        assert_eq!(c.set_container(free, path), Err(libc::EBADF), "O_PATH");
        let directory = c
            .open_with(&host.dir.join("dev/vfio"), libc::O_RDONLY)
            .unwrap();
        assert_eq!(
            c.set_container(free, directory),
            Err(libc::EBADFD),
            "a directory of ours"
        );
        beside.end();
    });
}

/// A daemon without char devices, as the series itself was: groups are the only way.
#[test]
fn by_group_only() {
    alone!("by_group_only", || {
        let config = vfio_core::Config {
            cdev: false,
            ..vfio_core::Config::default()
        };
        let Some(host) = Host::with("by_group_only", config, |_| {}) else {
            return;
        };
        let (_device, _) = host.device("one");
        let mut names: Vec<_> = std::fs::read_dir(host.dir.join("dev/vfio"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["0", "vfio"]);
        let devices = host.dir.join("dev/vfio/devices");
        assert_eq!(std::fs::read_dir(devices).unwrap().count(), 0);
        let c = Client::start();
        let s = by_group(&host, &c, 0, b"one").unwrap();
        assert!(c.region(s.device, 0).is_ok());
        let iommufd = c.open(&host.iommu()).unwrap();
        assert_eq!(c.bind(s.device, iommufd), Err(libc::ENOTTY));
        for fd in [s.device, s.group, s.container] {
            c.close(fd);
        }
        // Who opens it by its name can do nothing with it.
        let device = c.open(&host.node(0)).unwrap();
        assert_eq!(c.bind(device, iommufd), Err(libc::EINVAL));
        let mode = |c: &Client| c.sys(libc::SYS_setuid, &[65534]);
        assert_eq!(mode(&c), Ok(0));
        assert_eq!(c.open(&host.node(0)), Err(libc::EACCES));
    });
}

/// Memory that never answers, as the argument of a group's commands: the client is told in time, and
/// the others go on.
#[test]
fn arguments_that_never_answer() {
    alone!("arguments_that_never_answer", || {
        let deadline = Duration::from_millis(400);
        let host = Host::new("arguments_that_never_answer", |options| {
            options.ioctl_deadline = deadline;
        });
        let Some(host) = host else { return };
        let (_device, _) = host.device("one");
        let beside = Bystander::start(&host);
        let c = Client::start();
        let s = by_group(&host, &c, 0, b"one").unwrap();
        let Some(silent) = crate::silent::userfault(&c, 65536) else {
            return;
        };
        let device = c.open(&host.node(0)).unwrap();
        for (fd, cmd) in [
            (s.group, GROUP_STATUS),
            (s.group, SET_CONTAINER),
            (s.group, FIND_DEVICE),
            (s.group, WHAT),
            (device, OPEN_DEVICE),
            (s.container, MAP_DMA),
        ] {
            c.start_sys(libc::SYS_ioctl, &[fd, cmd.into(), silent, 0]);
            beside.goes_on();
            let end = c.finish(Duration::from_secs(20));
            assert!(
                matches!(end, Some(Err(libc::ETIMEDOUT | libc::EFAULT))),
                "{cmd:x}: {end:?}"
            );
        }
        // The group is nobody's but his, and works.
        assert_eq!(c.group_status(s.group), Ok(3));
        let other = Client::start();
        assert_eq!(other.open(&host.group(0)), Err(libc::EBUSY));
        c.kill();
        crate::common::until("the group is free", || other.open(&host.group(0)).is_ok());
        beside.end();
    });
}

/// `/dev/iommu` as the container, in both modes of type1 and without any; all on one context.
#[test]
fn a_session_by_group_through_an_iommufd() {
    alone!("a_session_by_group_through_an_iommufd", || {
        let Some(host) = host("a_session_by_group_through_an_iommufd") else {
            return;
        };
        let (_device, seen) = host.device("one");
        let c = Client::start();
        for mode in [None, Some(1), Some(TYPE1_V2)] {
            let iommufd = c.open(&host.iommu()).unwrap();
            let group = c.open(&host.group(0)).unwrap();
            c.set_container(group, iommufd).unwrap();
            if let Some(mode) = mode {
                c.ioctl_at(iommufd, SET_IOMMU, mode).unwrap();
            }
            assert_eq!(c.group_status(group), Ok(3));
            let device = open_found(&host, &c, group, b"one").unwrap();
            let memory = c.arena + 65536;
            c.map_dma(iommufd, memory, 65536, 0x10_0000).unwrap();
            c.poke(memory + 64, &0x7777_u64.to_ne_bytes());
            assert_eq!(dma_read(&c, device, 0x10_0040), Ok(0x7777));
            assert_eq!(c.attach(device, 1), Err(libc::ENOTTY));
            // The group goes, the device stays with its context; so does what is mapped.
            c.close(group);
            c.close(iommufd);
            let again = c.open(&host.group(0)).unwrap();
            assert_eq!(dma_read(&c, device, 0x10_0040), Ok(0x7777));
            let container = c.open(&host.container()).unwrap();
            assert_eq!(c.set_container(again, container), Err(libc::EBUSY));
            c.close(device);
            assert_eq!(
                c.set_container(again, container),
                Ok(0),
                "right after the close"
            );
            c.close(again);
            c.close(container);
        }
        crate::common::until("the last close", || seen.closed.load(Ordering::SeqCst) == 3);
    });
}
