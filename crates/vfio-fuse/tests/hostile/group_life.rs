//! How groups end: in every order, by death, by fork, and when their device goes.

use crate::client::Client;
use crate::common::{Host, until};
use crate::group::{ByGroup, by_group, dma_read, open_found};
use crate::scene::{Bystander, alone, descriptors, host, settles, threads};
use crate::uapi::*;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vfio_core::device::Policy;

/// Nothing is open but what the bystander has.
fn all_closed(host: &Host) {
    let dev = host.dev.as_ref().unwrap();
    until("all closed", || {
        dev.open_groups() == (0, 0) && dev.open_files() == (1, 1)
    });
}

#[test]
fn closed_in_every_order() {
    alone!("closed_in_every_order", || {
        let Some(host) = host("closed_in_every_order") else {
            return;
        };
        let (_device, seen) = host.device("one");
        let beside = Bystander::start(&host);
        let c = Client::start();
        let orders = [
            [0, 1, 2],
            [0, 2, 1],
            [1, 0, 2],
            [1, 2, 0],
            [2, 0, 1],
            [2, 1, 0],
        ];
        let mut sessions = 0;
        for round in 0..10 {
            for order in orders {
                // As soon as the last close has returned, all can be had again.
                let s = by_group(&host, &c, 0, b"one");
                let s = s.unwrap_or_else(|errno| panic!("{order:?} in round {round}: {errno}"));
                sessions += 1;
                let memory = c.arena + 65536;
                c.map_dma(s.container, memory, 65536, 0).unwrap();
                assert!(dma_read(&c, s.device, 0).is_ok());
                let files = [s.container, s.group, s.device];
                for (n, at) in order.into_iter().enumerate() {
                    c.close(files[at]);
                    let device_lives = !order[..=n].contains(&2);
                    if device_lives {
                        // What is left of group and container serves the device.
                        assert!(dma_read(&c, s.device, 0).is_ok(), "{order:?}");
                        assert_eq!(c.open(&host.group(0)), Err(libc::EBUSY), "{order:?}");
                    }
                }
            }
        }
        all_closed(&host);
        until("the last close", || {
            seen.closed.load(Ordering::SeqCst) == sessions
        });
        assert_eq!(seen.opened.load(Ordering::SeqCst), sessions);
        beside.end();
    });
}

#[test]
fn one_opener_whatever_the_mode() {
    alone!("one_opener_whatever_the_mode", || {
        let Some(host) = host("one_opener_whatever_the_mode") else {
            return;
        };
        let (_device, _) = host.device("one");
        let c = Client::start();
        let other = Client::start();
        let modes = [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR];
        for mode in modes {
            let group = c.open_with(&host.group(0), mode).unwrap();
            for second in modes {
                assert_eq!(other.open_with(&host.group(0), second), Err(libc::EBUSY));
                assert_eq!(c.open_with(&host.group(0), second), Err(libc::EBUSY));
            }
            // Copies are the same file: the last one closes it.
            let copy = c.sys(libc::SYS_dup, &[group]).unwrap();
            c.close(group);
            assert_eq!(c.group_status(copy), Ok(1));
            let passed = other.take(c.give(copy));
            c.close(copy);
            assert_eq!(other.group_status(passed), Ok(1));
            assert_eq!(c.open(&host.group(0)), Err(libc::EBUSY));
            other.close(passed);
        }
        // Closed and opened at once, a hundred times: never busy.
        for _ in 0..100 {
            let group = c.open(&host.group(0)).unwrap();
            c.close(group);
        }
        // So is a bind after a close, and an open after that.
        let iommufd = c.open(&host.iommu()).unwrap();
        for _ in 0..50 {
            let group = c.open(&host.group(0)).unwrap();
            c.close(group);
            let device = c.open(&host.node(0)).unwrap();
            c.bind(device, iommufd).unwrap();
            assert_eq!(c.bind(device, iommufd), Err(libc::EINVAL));
            c.close(device);
        }
        // An open node keeps nobody out, until it is bound.
        let device = c.open(&host.node(0)).unwrap();
        let group = c.open(&host.group(0)).unwrap();
        assert_eq!(c.bind(device, iommufd), Err(libc::EBUSY));
        c.close(group);
        assert!(c.bind(device, iommufd).is_ok());
        assert_eq!(other.open(&host.group(0)), Err(libc::EBUSY));
    });
}

#[test]
fn the_parent_exits_and_the_child_goes_on() {
    alone!("the_parent_exits_and_the_child_goes_on", || {
        let Some(host) = host("the_parent_exits_and_the_child_goes_on") else {
            return;
        };
        let (_device, seen) = host.device("one");
        let beside = Bystander::start(&host);
        let parent = Client::start();
        let group = parent.open(&host.group(0)).unwrap();
        let container = parent.open(&host.container()).unwrap();
        let child = parent.fork();
        // The group's file is one: the child sets the container, the parent sees it.
        child.set_container(group, container).unwrap();
        child.ioctl_at(container, SET_IOMMU, TYPE1_V2).unwrap();
        assert_eq!(parent.group_status(group), Ok(3));
        let device = open_found(&host, &parent, group, b"one").unwrap();
        let grandchild = child.fork();
        let passed = child.take(parent.give(device));
        parent.kill();
        assert!(child.region(passed, 0).is_ok());
        let memory = child.arena + 65536;
        child.poke(memory, &77_u64.to_ne_bytes());
        child.map_dma(container, memory, 4096, 0).unwrap();
        assert_eq!(dma_read(&child, passed, 0), Ok(77));
        // Another session by the same group, from yet another process.
        let second = open_found(&host, &grandchild, group, b"one").unwrap();
        assert_eq!(dma_read(&grandchild, second, 0), Ok(77));
        child.kill();
        // The memory was the child's, who is dead; the device is there.
        assert_eq!(dma_read(&grandchild, second, 0), Err(libc::EFAULT));
        assert!(grandchild.region(second, 0).is_ok());
        assert_eq!(seen.closed.load(Ordering::SeqCst), 0);
        grandchild.kill();
        all_closed(&host);
        until("the last close", || seen.closed.load(Ordering::SeqCst) == 1);
        let next = Client::start();
        assert!(by_group(&host, &next, 0, b"one").is_ok());
        drop(next);
        beside.end();
    });
}

/// Begins something and kills the client a moment later, over and over; the moments cover each call.
#[test]
fn deaths_between_call_and_answer() {
    alone!("deaths_between_call_and_answer", || {
        let Some(host) = host("deaths_between_call_and_answer") else {
            return;
        };
        let (_device, seen) = host.device("one");
        let beside = Bystander::start(&host);
        let parent = Client::start();
        let mut quiet = (0, 0);
        for round in 0_u64..300 {
            let c = parent.fork();
            let delay = Duration::from_nanos(round * 7919 % 400_000);
            die_in(&host, &c, round % 6);
            let begun = Instant::now();
            while begun.elapsed() < delay {
                std::hint::spin_loop();
            }
            let pid = c.pid as u64;
            c.kill();
            assert_eq!(parent.sys(libc::SYS_wait4, &[pid, 0, 0, 0]), Ok(pid));
            if round % 50 == 20 {
                all_closed(&host);
                if round == 20 {
                    quiet = (descriptors(), threads());
                }
            }
        }
        all_closed(&host);
        until("the last close", || {
            seen.opened.load(Ordering::SeqCst) == seen.closed.load(Ordering::SeqCst)
        });
        let s = by_group(&host, &parent, 0, b"one").unwrap();
        assert!(parent.region(s.device, 0).is_ok());
        drop(parent);
        beside.end();
        settles("descriptors", quiet.0, descriptors);
        // The tree's own may have been replaced while a test held them up.
        settles("threads", quiet.1 + 1, threads);
    });
}

/// Begins the call, after what comes before it. Busy is no failure: the one before may just be dying.
fn die_in(host: &Host, c: &Client, what: u64) {
    let ioctl = |fd: u64, cmd: u32, arg: u64| {
        c.start_sys(libc::SYS_ioctl, &[fd, cmd.into(), arg, 0]);
    };
    let Ok(container) = c.open(&host.container()) else {
        return;
    };
    if what == 0 {
        let mut name = host.group(0).as_os_str().as_encoded_bytes().to_vec();
        name.push(0);
        let name = c.put(&name);
        let args = [libc::AT_FDCWD as u64, name, libc::O_RDWR as u64, 0];
        return c.start_sys(libc::SYS_openat, &args);
    }
    // Of the one before a RELEASE may be on its way.
    let end = Instant::now() + Duration::from_secs(10);
    let group = loop {
        match c.open(&host.group(0)) {
            Ok(group) => break group,
            Err(errno) => assert_eq!(errno, libc::EBUSY),
        }
        assert!(Instant::now() < end, "the group stays busy");
    };
    if what == 1 {
        let arg = c.put(&(container as u32).to_ne_bytes());
        return ioctl(group, SET_CONTAINER, arg);
    }
    c.set_container(group, container).unwrap();
    if what == 2 {
        return ioctl(container, SET_IOMMU, TYPE1_V2);
    }
    c.ioctl_at(container, SET_IOMMU, TYPE1_V2).unwrap();
    if what == 3 {
        let device = c.open(&host.node(0)).unwrap();
        let name = c.arena + 8192;
        c.poke(name, b"one");
        let mut arg = words(&[24, group as u32, 0, 3]);
        arg.extend(name.to_ne_bytes());
        let arg = c.put(&arg);
        return ioctl(device, OPEN_DEVICE, arg);
    }
    let device = open_found(host, c, group, b"one").unwrap();
    assert!(c.region(device, 0).is_ok());
    if what == 4 {
        ioctl(group, UNSET_CONTAINER, 0);
    } else {
        c.start_sys(libc::SYS_exit_group, &[0, 0, 0, 0]);
    }
}

#[test]
fn the_device_goes_while_all_is_open() {
    alone!("the_device_goes_while_all_is_open", || {
        let Some(host) = host("the_device_goes_while_all_is_open") else {
            return;
        };
        let (device, seen) = host.device("one");
        let beside = Bystander::start(&host);
        let c = Client::start();
        let ByGroup {
            container,
            group,
            device: file,
        } = by_group(&host, &c, 0, b"one").unwrap();
        // A group file alone would not hold it up; the device file does.
        let gone = device.destroy(Policy::Wait);
        assert!(gone.result().is_none(), "it waits");
        assert_eq!(
            c.ioctl_name(group, FIND_DEVICE, b"one\0"),
            Err(libc::ENODEV)
        );
        assert_eq!(
            c.group_status(group),
            Ok(3),
            "the group is there while it waits"
        );
        assert!(std::fs::metadata(host.group(0)).is_ok());
        assert!(c.region(file, 0).is_ok());
        c.close(file);
        assert_eq!(gone.wait_for(Duration::from_secs(10)), Some(Ok(())));
        until("the release", || seen.released.load(Ordering::SeqCst) == 1);
        let dead = |group: u64| {
            assert_eq!(c.group_status(group), Err(libc::ENODEV));
            assert_eq!(c.set_container(group, container), Err(libc::ENODEV));
            assert_eq!(c.set_container(group, 999), Err(libc::EBADF));
            assert_eq!(c.unset_container(group), Err(libc::EINVAL));
            assert_eq!(
                c.ioctl_name(group, FIND_DEVICE, b"one\0"),
                Err(libc::ENODEV)
            );
            assert_eq!(c.ioctl_at(group, GET_INFO, 0), Err(libc::ENOTTY));
        };
        dead(group);
        assert_eq!(c.open(&host.group(0)), Err(libc::ENOENT));
        // The container has lost its last group, and can be used anew.
        assert_eq!(
            c.ioctl_at(container, SET_IOMMU, TYPE1_V2),
            Err(libc::EINVAL)
        );
        let (next, seen) = host.device("one");
        let number = host.core.group(0).map(|group| group.id());
        assert_eq!(number, Some(0), "the name is used again");
        let fresh = c.open(&host.group(0)).unwrap();
        dead(group);
        assert_eq!(c.group_status(fresh), Ok(1));
        c.set_container(fresh, container).unwrap();
        c.ioctl_at(container, SET_IOMMU, TYPE1_V2).unwrap();
        let file = open_found(&host, &c, fresh, b"one").unwrap();
        // By force: nobody is waited for.
        assert_eq!(next.destroy(Policy::Disassociate).result(), Some(Ok(())));
        assert_eq!(seen.closed.load(Ordering::SeqCst), 1);
        assert_eq!(c.region(file, 0), Err(libc::ENODEV));
        dead(fresh);
        for fd in [file, fresh, group, container] {
            c.close(fd);
        }
        all_closed(&host);
        beside.end();
    });
}

#[test]
fn hundreds_of_containers_and_groups() {
    alone!("hundreds_of_containers_and_groups", || {
        let Some(host) = host("hundreds_of_containers_and_groups") else {
            return;
        };
        let devices: Vec<_> = (0..200).map(|n| host.device(&format!("d{n}"))).collect();
        let beside = Bystander::start(&host);
        let before = descriptors();
        let c = Client::start();
        let dev = host.dev.as_ref().unwrap();
        let sets: Vec<(u64, u64)> = (0..200)
            .map(|n| {
                let container = c.open(&host.container()).unwrap();
                let group = c.open(&host.group(n)).unwrap();
                c.set_container(group, container).unwrap();
                c.ioctl_at(container, SET_IOMMU, TYPE1_V2).unwrap();
                c.map_dma(container, c.arena, 4096, 0).unwrap();
                (container, group)
            })
            .collect();
        for _ in 0..300 {
            c.open(&host.container()).unwrap();
        }
        assert_eq!(dev.open_groups(), (200, 500));
        // They cost no descriptor of ours: a device at rest has none, neither has a group.
        settles("descriptors", before + 8, descriptors);
        // One container for many groups: they share its mappings.
        let shared = sets[0].0;
        for (n, (_, group)) in sets.iter().enumerate().skip(1).take(50) {
            c.unset_container(*group).unwrap();
            c.set_container(*group, shared).unwrap();
            let device = open_found(&host, &c, *group, format!("d{n}").as_bytes()).unwrap();
            assert!(dma_read(&c, device, 0).is_ok());
            c.close(device);
        }
        c.kill();
        until("all closed", || dev.open_groups() == (0, 0));
        for (device, seen) in devices {
            assert_eq!(
                device
                    .destroy(Policy::Wait)
                    .wait_for(Duration::from_secs(10)),
                Some(Ok(()))
            );
            // The thread that served the last close may have a reference still.
            until("the release", || seen.released.load(Ordering::SeqCst) == 1);
        }
        beside.end();
    });
}

/// A mapping keeps what a descriptor keeps: the device, with it the group's file and the container.
#[test]
fn a_mapping_outlives_all_descriptors() {
    alone!("a_mapping_outlives_all_descriptors", || {
        let Some(host) = host("a_mapping_outlives_all_descriptors") else {
            return;
        };
        let (_device, seen) = host.device("one");
        let c = Client::start();
        for round in 1..=5 {
            let s = by_group(&host, &c, 0, b"one").unwrap();
            let (flags, size, offset) = c.region(s.device, 1).unwrap();
            if flags & 4 == 0 {
                vfiod_tests::skip(vfiod_tests::skip::NO_PASSTHROUGH);
                return;
            }
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let mapped = c.mmap(size, prot, libc::MAP_SHARED, Some(s.device), offset);
            let mapped = mapped.unwrap();
            c.touch(mapped, Some(9)).unwrap();
            assert_eq!(c.pread(s.device, offset, 1), Ok(vec![9]));
            c.close(s.device);
            assert_eq!(c.unset_container(s.group), Err(libc::EBUSY), "it is mapped");
            assert_eq!(c.touch(mapped, None), Ok(9));
            if round % 2 == 0 {
                c.munmap(mapped, size);
                assert_eq!(c.unset_container(s.group), Ok(0), "right after munmap");
                c.close(s.group);
            } else {
                c.close(s.group);
                assert_eq!(c.open(&host.group(0)), Err(libc::EBUSY), "it is mapped");
                c.munmap(mapped, size);
            }
            c.close(s.container);
            let group = c.open(&host.group(0)).unwrap();
            c.close(group);
            until("the last close", || {
                seen.closed.load(Ordering::SeqCst) == round
            });
        }
    });
}
