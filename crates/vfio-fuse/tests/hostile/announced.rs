//! Opens that are announced, and announcements that are none.

use crate::client::{Client, Outcome};
use crate::group::{by_group, dma_read};
use crate::scene::{Bystander, alone, descriptors, host, settles};
use crate::uapi::*;

const NONE: u32 = 0;
const ANNOUNCED: u32 = 1;
const HONOURED: u32 = 2;

/// Memory in which a client announces.
struct Note {
    fd: u64,
    at: u64,
}

impl Note {
    fn new(c: &Client) -> Note {
        let fd = c.memfd(4096, 0).unwrap();
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let at = c.mmap(4096, prot, libc::MAP_SHARED, Some(fd), 0).unwrap();
        Note { fd, at }
    }

    fn register(&self, c: &Client, group: u64) -> Result<u32, i32> {
        let number = c.ioctl(group, ANNOUNCE, &mut words(&[8, self.fd as u32]))?;
        Ok(number as u32)
    }

    fn write(&self, c: &Client, group: u32, name: &[u8], len: u32) {
        c.poke(self.at + 16, name);
        c.poke(self.at, &words(&[ANNOUNCED, group, 0, len]));
    }

    /// The state, which is taken back.
    fn end(&self, c: &Client) -> u32 {
        let state = word(&c.peek(self.at, 4), 0);
        c.poke(self.at, &words(&[NONE]));
        state
    }

    /// An open of device `n` that is to be `name` of the group.
    fn open(&self, c: &Client, path: &std::path::Path, group: u32, name: &[u8]) -> (Outcome, u32) {
        self.write(c, group, name, name.len() as u32);
        let opened = c.open(path);
        (opened, self.end(c))
    }
}

/// What a file does that was only opened: nothing.
fn is_plain(c: &Client, device: u64) {
    assert_eq!(c.region(device, 0), Err(libc::EINVAL));
    c.close(device);
}

#[test]
fn an_announced_open_is_a_file_of_the_group() {
    alone!("an_announced_open_is_a_file_of_the_group", || {
        let Some(host) = host("an_announced_open_is_a_file_of_the_group") else {
            return;
        };
        let (_device, seen) = host.device("one");
        let c = Client::start();
        let s = by_group(&host, &c, 0, b"one").unwrap();
        let node = host.node(0);
        let before = descriptors();
        let note = Note::new(&c);
        let number = note.register(&c, s.group).unwrap();
        c.map_dma(s.container, c.arena + 65536, 4096, 0x10_0000)
            .unwrap();
        c.poke(c.arena + 65536, &7_u64.to_ne_bytes());
        for _ in 0..3 {
            let (device, state) = note.open(&c, &node, number, b"one");
            let device = device.unwrap();
            assert_eq!(state, HONOURED);
            assert_eq!(dma_read(&c, device, 0x10_0000), Ok(7));
            let files = host.core.device(0).unwrap().files();
            assert_eq!(files.last().unwrap().opener().pid, c.pid as u32);
            c.close(device);
        }
        assert_eq!(seen.opened.load(std::sync::atomic::Ordering::SeqCst), 1);
        // Nothing is announced any more; and what others open is not meant.
        is_plain(&c, c.open(&node).unwrap());
        note.write(&c, number, b"one", 3);
        let mut path = node.as_os_str().as_encoded_bytes().to_vec();
        path.push(0);
        let path = c.put(&path);
        let args = [libc::AT_FDCWD as u64, path, libc::O_RDWR as u64, 0];
        let by_a_thread = c.sys_in_thread(libc::SYS_openat, &args).unwrap();
        is_plain(&c, by_a_thread);
        let child = c.fork();
        is_plain(&child, child.open(&node).unwrap());
        child.kill();
        assert_eq!(note.end(&c), ANNOUNCED);
        // With the group goes what was kept for it.
        c.close(s.device);
        c.close(s.group);
        settles("descriptors", before, descriptors);
        assert_eq!(note.open(&c, &node, number, b"one").1, ANNOUNCED);
    });
}

#[test]
fn announcements_that_are_wrong_fail_the_open() {
    alone!("announcements_that_are_wrong_fail_the_open", || {
        let Some(host) = host("announcements_that_are_wrong_fail_the_open") else {
            return;
        };
        let (_first, _) = host.device("zero");
        let (_second, _) = host.device("one");
        let beside = Bystander::start(&host);
        let c = Client::start();
        let s = by_group(&host, &c, 0, b"zero").unwrap();
        let foreign = c.open(&host.group(1)).unwrap();
        let note = Note::new(&c);
        let zero = note.register(&c, s.group).unwrap();
        let one = note.register(&c, foreign).unwrap();
        assert_ne!(zero, one);
        for (node, group, name, errno) in [
            (1, zero, &b"one"[..], libc::ENODEV),
            (1, zero, b"zero", libc::ENODEV),
            (0, zero, b"", libc::ENODEV),
            (0, zero, &[b'x'; 64], libc::ENODEV),
            (1, one, b"one", libc::EINVAL),
            (0, one, b"zero", libc::ENODEV),
            (0, one + 1, b"zero", libc::EBADF),
            (0, u32::MAX, b"zero", libc::EBADF),
        ] {
            let (opened, state) = note.open(&c, &host.node(node), group, name);
            assert_eq!((opened, state), (Err(errno), ANNOUNCED), "{group} {name:?}");
        }
        for len in [65, 4096, u32::MAX] {
            note.write(&c, zero, b"zero", len);
            assert_eq!(c.open(&host.node(0)), Err(libc::EINVAL), "{len}");
            note.end(&c);
        }
        for state in [HONOURED, 3, u32::MAX] {
            note.write(&c, zero, b"zero", 4);
            c.poke(note.at, &words(&[state]));
            is_plain(&c, c.open(&host.node(0)).unwrap());
            assert_eq!(note.end(&c), state);
        }

        // Where it is announced.
        let announce = |fd: u64| c.ioctl(s.group, ANNOUNCE, &mut words(&[8, fd as u32]));
        let sealed = c.memfd(4096, libc::MFD_ALLOW_SEALING).unwrap();
        let seal = [sealed, libc::F_ADD_SEALS as u64, libc::F_SEAL_WRITE as u64];
        c.sys(libc::SYS_fcntl, &seal).unwrap();
        for (fd, errno) in [
            (s.group, libc::EINVAL),
            (s.device, libc::EINVAL),
            (sealed, libc::EINVAL),
            (999, libc::EBADF),
            (u64::MAX, libc::EBADF),
        ] {
            assert_eq!(announce(fd), Err(errno), "{fd}");
        }
        let short = c.ioctl(s.group, ANNOUNCE, &mut words(&[7, note.fd as u32]));
        assert_eq!(short, Err(libc::EINVAL));
        assert_eq!(c.ioctl_at(s.group, ANNOUNCE, 8), Err(libc::EFAULT));
        // It is for groups.
        let mut arg = words(&[8, note.fd as u32]);
        assert_eq!(c.ioctl(s.container, ANNOUNCE, &mut arg), Err(libc::ENOTTY));
        assert_eq!(c.ioctl(s.device, ANNOUNCE, &mut arg), Err(libc::ENOTTY));

        // A group that was closed is not the one that is open now.
        c.close(s.device);
        c.close(s.group);
        let again = c.open(&host.group(0)).unwrap();
        c.set_container(again, s.container).unwrap();
        c.ioctl_at(s.container, SET_IOMMU, TYPE1_V2).unwrap();
        let (opened, _) = note.open(&c, &host.node(0), zero, b"zero");
        assert_eq!(opened, Err(libc::EBADF));
        let zero = note.register(&c, again).unwrap();
        let (opened, state) = note.open(&c, &host.node(0), zero, b"zero");
        assert_eq!(state, HONOURED);
        c.close(opened.unwrap());

        // Memory that goes away says nothing.
        note.write(&c, zero, b"zero", 4);
        c.sys(libc::SYS_ftruncate, &[note.fd, 0]).unwrap();
        is_plain(&c, c.open(&host.node(0)).unwrap());
        c.sys(libc::SYS_ftruncate, &[note.fd, 4096]).unwrap();
        beside.end();
    });
}

/// Many threads that announce: no more descriptors than for a few, and each gets its device.
#[test]
fn many_announcers_are_no_burden() {
    alone!("many_announcers_are_no_burden", || {
        let Some(host) = host("many_announcers_are_no_burden") else {
            return;
        };
        let (_device, _) = host.device("one");
        let c = Client::start();
        let s = by_group(&host, &c, 0, b"one").unwrap();
        let before = descriptors();
        for _ in 0..200 {
            let child = c.fork();
            let note = Note::new(&child);
            let number = note.register(&child, s.group).unwrap();
            let (device, state) = note.open(&child, &host.node(0), number, b"one");
            assert_eq!(state, HONOURED);
            child.close(device.unwrap());
            child.kill();
        }
        assert!(descriptors() < before + 256, "{}", descriptors());
        c.close(s.device);
        c.close(s.group);
        settles("descriptors", before, descriptors);
    });
}
