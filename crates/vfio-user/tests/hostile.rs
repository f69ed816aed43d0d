//! Clients that break the protocol, lie, stall, or speak before their turn. What each peer's library
//! got wrong is here too.

mod common;

use common::*;
use rustix::fs::{Gid, Uid};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::RwLock;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vfio_core::Errno;
use vfio_user::client::{Client, Error};
use vfio_user::wire::{DmaAccess, DmaUnmap, MAX_DATA, RegionAccess, command};
use vfio_user::{OfferOptions, Options};
use zerocopy::IntoBytes;

/// Held for writing by tests that count this process's descriptors, for reading by all others.
static ALONE: RwLock<()> = RwLock::new(());

fn with_others() -> std::sync::RwLockReadGuard<'static, ()> {
    ALONE
        .read()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The server still serves this client, in step.
fn still_serves(raw: &mut Raw) {
    let access = RegionAccess {
        offset: 0,
        region: 7,
        count: 4,
    };
    let (header, payload) = raw.ask(command::REGION_READ, access.as_bytes());
    assert_eq!(header.errno(), None);
    assert_eq!(payload[16..], [0, 1, 2, 3]);
}

fn greeted(host: &Host) -> Raw {
    let mut raw = host.raw();
    let (header, _) = raw.hello(0, Some(r#"{"capabilities":{"max_msg_fds":8}}"#));
    assert_eq!(header.errno(), None);
    raw
}

#[test]
fn a_version_that_makes_no_sense_is_refused() {
    let _guard = with_others();
    let host = Host::new();
    let json = br#"{"capabilities":{}}"#;
    for (payload, errno) in [
        (&b""[..], Errno::INVAL),
        (b"\0\0\0", Errno::INVAL),
        (b"\x01\0\0\0", Errno::PROTONOSUPPORT),
        (&[b"\0\0\0\0", &json[..]].concat(), Errno::INVAL),
        (b"\0\0\0\0{\0", Errno::INVAL),
        (b"\0\0\0\0\xff\xfe\0", Errno::INVAL),
    ] {
        let mut raw = host.raw();
        assert_eq!(
            raw.errno(command::VERSION, payload),
            Some(errno),
            "{payload:?}"
        );
        assert!(raw.is_closed());
    }
    // No JSON at all is SPDK's way.
    let mut raw = host.raw();
    let (header, payload) = raw.ask(command::VERSION, b"\0\0\x01\0");
    assert_eq!((header.errno(), payload.last()), (None, Some(&0)));
    still_serves(&mut raw);
    assert_eq!(raw.errno(command::VERSION, b"\0\0\0\0"), Some(Errno::INVAL));
    still_serves(&mut raw);
    assert_eq!(host.offer().refused().len(), 6);
}

#[test]
fn nothing_is_served_before_version() {
    let _guard = with_others();
    let host = Host::new();
    let mut raw = host.raw();
    assert_eq!(raw.errno(command::DEVICE_RESET, b""), Some(Errno::INVAL));
    assert!(raw.is_closed());
    assert_eq!(host.seen.opened.load(Ordering::SeqCst), 0);
}

#[test]
fn any_split_of_headers_and_bodies_is_one_message() {
    let _guard = with_others();
    let host = Host::new();
    let mut raw = host.raw();
    for byte in Raw::message(1, command::VERSION, 0, b"\0\0\0\0") {
        raw.send(&[byte]);
    }
    raw.receive();
    let access = RegionAccess {
        offset: 128,
        region: 0,
        count: 64,
    };
    let write = [access.as_bytes(), &[9; 64]].concat();
    let write = Raw::message(2, command::REGION_WRITE, 0, &write);
    for byte in &write {
        raw.send(&[*byte]);
    }
    assert_eq!(raw.receive().0.errno(), None);
    for at in [1, 8, 15, 16, 17, 31, 40, 95] {
        raw.send(&write[..at]);
        // Long enough that the server has seen the first part and waits for the second.
        std::thread::sleep(Duration::from_millis(2));
        raw.send(&write[at..]);
        assert_eq!(raw.receive().0.errno(), None);
    }
    still_serves(&mut raw);
}

#[test]
fn what_cannot_be_served_is_drained_and_refused() {
    let _guard = with_others();
    let host = Host::new();
    let mut raw = greeted(&host);
    for number in [0, 11, 12, 14, 19, 0x7fff, 0xffff] {
        let errno = raw.errno(number, &[7; 1000]);
        assert_eq!(errno, Some(Errno::OPNOTSUPP), "command {number}");
    }
    // Wrong type: neither a command nor a reply.
    raw.send(&Raw::message(5, command::REGION_READ, 2, &[0; 16]));
    assert_eq!(raw.receive().0.errno(), Some(Errno::INVAL));
    // A reply that nobody waits for.
    raw.send(&Raw::message(6, command::DMA_READ, 1, &[0; 500]));
    still_serves(&mut raw);
    // Far longer than anything legal: thrown away piece by piece.
    let long = Raw::message(7, command::REGION_WRITE, 0, &vec![1; 5 << 20]);
    raw.send(&long);
    assert_eq!(raw.receive().0.errno(), Some(Errno::MSGSIZE));
    still_serves(&mut raw);
    // Longer than its structure is fine.
    let (header, payload) = raw.ask(command::DEVICE_GET_REGION_INFO, &{
        let mut asked = vec![0; 4064];
        asked[0] = 32;
        asked
    });
    assert_eq!((header.errno(), payload.len()), (None, 32));
    // Every command with every short payload.
    for number in 2..19 {
        for len in 0..48 {
            let (_, _) = raw.ask(number, &vec![0xff; len]);
        }
    }
    still_serves(&mut raw);
    // A header that is shorter than itself.
    let mut broken = Raw::message(8, command::REGION_READ, 0, &[]);
    broken[4] = 3;
    raw.send(&broken);
    assert!(raw.is_closed());
    host.until_free();
}

#[test]
fn counts_are_checked_against_what_was_announced_and_what_is_there() {
    let _guard = with_others();
    let host = Host::new();
    let mut raw = greeted(&host);
    for count in [MAX_DATA as u32 + 1, 8 << 20, u32::MAX] {
        let access = RegionAccess {
            offset: 0,
            region: 0,
            count,
        };
        let errno = raw.errno(command::REGION_READ, access.as_bytes());
        assert_eq!(errno, Some(Errno::INVAL));
        let errno = raw.errno(command::REGION_WRITE, access.as_bytes());
        assert_eq!(errno, Some(Errno::INVAL));
    }
    for writes in [1, 1000, u64::MAX / 24 + 1, u64::MAX] {
        let errno = raw.errno(command::REGION_WRITE_MULTI, writes.as_bytes());
        assert_eq!(errno, Some(Errno::INVAL));
    }
    for size in [1, 100, u32::MAX] {
        let data = [8, size];
        assert_ne!(raw.errno(command::MIG_DATA_WRITE, data.as_bytes()), None);
        assert_ne!(raw.errno(command::MIG_DATA_READ, data.as_bytes()), None);
    }
    still_serves(&mut raw);
}

#[test]
fn a_feature_shorter_than_its_data_is_an_error() {
    let _guard = with_others();
    let host = Host::new();
    let mut raw = greeted(&host);
    for feature in 0..16u32 {
        for operation in 0..8u32 {
            let flags = feature | operation << 16;
            for argsz in [0, 7, 8, 9, 16, 24, 4096, u32::MAX] {
                for len in [0, 1, 7, 8, 15, 16, 23, 24, 40] {
                    let mut data = vec![0xff; len];
                    // Many ranges, of which there are none.
                    if len > 12 {
                        data[8..12].copy_from_slice(&u32::MAX.to_ne_bytes());
                    }
                    let payload = [argsz.as_bytes(), flags.as_bytes(), &data].concat();
                    let (header, payload) = raw.ask(command::DEVICE_FEATURE, &payload);
                    if header.errno().is_none() {
                        assert!(payload.len() <= argsz as usize, "{flags:#x} {argsz} {len}");
                    }
                }
            }
        }
    }
    still_serves(&mut raw);
}

#[test]
fn a_dirty_report_may_have_another_page_size_than_the_log() {
    let _guard = with_others();
    let host = Host::new();
    let mut client = host.connect();
    let file = memfd(4 << 20);
    client
        .dma_map(0, 4 << 20, (true, true), Some((file.as_fd(), 0)))
        .unwrap();
    use vfio_uapi::device::feature::FeatureFlags;
    let set = |feature: u32| FeatureFlags::SET | FeatureFlags::from_bits_retain(feature);
    let get = FeatureFlags::GET | FeatureFlags::from_bits_retain(8);
    let start = [4096u64, 0];
    client.feature(set(6), start.as_bytes(), 16).unwrap();
    let doorbell = 0x20_3000u64;
    client
        .region_write(0, DMA_WRITE, &doorbell.to_ne_bytes())
        .unwrap();
    // 64 KiB pages, 64 of them, in one word: the 33rd.
    let asked = [0u64, 4 << 20, 65536];
    let report = client.feature(get, asked.as_bytes(), 24 + 8).unwrap();
    assert_eq!(report[..24], *asked.as_bytes());
    assert_eq!(report[24..], (1u64 << 32).to_ne_bytes());
    // And by 4 KiB, which is 1024 pages.
    client
        .region_write(0, DMA_WRITE, &doorbell.to_ne_bytes())
        .unwrap();
    let asked = [0u64, 4 << 20, 4096];
    let report = client.feature(get, asked.as_bytes(), 24 + 128).unwrap();
    let set_bits: Vec<usize> = (0..1024)
        .filter(|bit| report[24 + bit / 8] & (1 << (bit % 8)) != 0)
        .collect();
    assert_eq!(set_bits, [0x203]);
    // No room for the answer, and more than can be asked for.
    let short = client.feature(get, asked.as_bytes(), 24 + 120).unwrap_err();
    assert_eq!(short.refused(), Some(Errno::INVAL));
    let all = [0u64, u64::MAX, 4096];
    let absurd = client.feature(get, all.as_bytes(), 1 << 20).unwrap_err();
    assert_eq!(absurd.refused(), Some(Errno::TOOBIG));
    client.feature(set(7), start.as_bytes(), 16).unwrap();
}

#[test]
fn silent_and_slow_clients_block_nobody() {
    let _guard = with_others();
    let options = Options {
        threads: 3,
        ..Options::default()
    };
    let host = Host::with(options, OfferOptions::default());
    // More than the server has threads, and more than may be silent.
    let mut silent: Vec<Raw> = (0..40).map(|_| host.raw()).collect();
    // Half a header, half a body.
    for raw in &mut silent[20..30] {
        raw.send(&[1, 2, 3, 4, 5]);
    }
    for raw in &mut silent[30..40] {
        raw.send(&Raw::message(1, command::VERSION, 0, &[0; 5000])[..1000]);
    }
    let mut client = host.connect();
    client.device_info().unwrap();
    // Others of the same server, too.
    let path = host.dir.path().join("other");
    let listener = UnixListener::bind(&path).unwrap();
    drop(client);
    host.until_free();
    let offer = host
        .server
        .offer(&host.device(), listener, OfferOptions::default())
        .unwrap();
    let mut client = vfio_user::client::Client::connect(&path).unwrap();
    client.device_info().unwrap();
    assert!(offer.client().is_some());
    let oldest = &mut silent[0];
    assert!(oldest.is_closed(), "not more than 32 are kept");
}

#[test]
fn a_client_that_does_not_read_is_closed() {
    let _guard = with_others();
    let host = Host::new();
    let mut raw = greeted(&host);
    let begin = Instant::now();
    // Replies of 4 KiB, until nothing goes any more.
    let access = RegionAccess {
        offset: 0,
        region: 0,
        count: 4096,
    };
    let read = Raw::message(1, command::REGION_READ, 0, access.as_bytes());
    raw.socket.set_nonblocking(true).unwrap();
    let mut sent = 0;
    while begin.elapsed() < SOON {
        match std::io::Write::write(&mut raw.socket, &read) {
            Ok(_) => sent += 1,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(_) => break,
        }
    }
    assert!(sent > 10);
    assert!(begin.elapsed() < SOON, "it was never closed");
    host.until_free();
    // The device is there for the next one.
    still_serves(&mut greeted(&host));
}

#[test]
fn a_reply_larger_than_the_socket_holds_arrives() {
    let _guard = with_others();
    let host = Host::new();
    let mut client = host.connect();
    let reads: Vec<u16> = (0..200)
        .map(|_| {
            let access = RegionAccess {
                offset: 0,
                region: 0,
                count: 4096,
            };
            client
                .send(command::REGION_READ, 0, access.as_bytes(), &[])
                .unwrap()
        })
        .collect();
    for id in reads {
        let reply = client.wait(id, command::REGION_READ).unwrap();
        assert_eq!(reply.payload.len(), 16 + 4096);
    }
}

#[test]
fn the_second_client_is_told_and_the_first_stays() {
    let _guard = with_others();
    let host = Host::new();
    let mut first = host.connect();
    let mut second = host.raw();
    let begin = Instant::now();
    let (header, payload) = second.hello(0, Some("{}"));
    assert_eq!((header.errno(), payload.len()), (Some(Errno::BUSY), 0));
    assert!(second.is_closed());
    assert!(begin.elapsed() < Duration::from_secs(5), "at once");
    let refused = host.offer().refused();
    assert_eq!(refused.len(), 1);
    assert_eq!(refused[0].errno, Errno::BUSY);
    assert_eq!(refused[0].pid, std::process::id());
    let reason = &refused[0].reason;
    assert!(reason.contains(&std::process::id().to_string()), "{reason}");
    first.device_info().unwrap();
    let client = host.offer().client().unwrap();
    assert_eq!(client.pid, std::process::id());
    drop(first);
    host.until_free();
    drop(host.connect());
}

#[test]
fn whoever_keeps_the_devices_memory_keeps_the_device() {
    let _guard = with_others();
    let host = Host::new();
    let mut client = host.connect();
    let memory = client.region_info(1).unwrap().fd.unwrap();
    let mut keeper = std::process::Command::new("sleep")
        .arg("100")
        .stdin(memory)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    drop(client);
    until("it is gone", || host.offer().client().is_none());
    let mut second = host.raw();
    assert_eq!(second.hello(0, Some("{}")).0.errno(), Some(Errno::BUSY));
    let reason = host.offer().refused()[0].reason.clone();
    keeper.kill().unwrap();
    keeper.wait().unwrap();
    assert!(reason.contains("memory"), "{reason}");
    host.until_free();
    drop(host.connect());
}

/// Connects as another user and group; only this thread becomes them.
fn as_user(host: &Host, uid: u32, gid: u32) -> Result<(), Error> {
    let path = host.path();
    let connects = move || {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        rustix::thread::set_thread_groups(&[]).unwrap();
        rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
        rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
        Client::connect(path).map(drop)
    };
    let done = std::thread::spawn(connects).join().unwrap();
    if done.is_ok() {
        host.until_free();
    }
    done
}

#[test]
fn only_those_who_may_are_served() {
    const NOBODY: u32 = 65534;
    let _guard = with_others();
    if !rustix::process::geteuid().is_root() {
        vfiod_tests::skip("only root can connect as other users");
        return;
    }
    let offer = OfferOptions {
        uids: vec![1],
        gids: vec![2],
        ..OfferOptions::default()
    };
    let host = Host::with(Options::default(), offer);
    // Whatever the file system lets through.
    let open = |path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode));
    open(host.dir.path().to_owned(), 0o755).unwrap();
    open(host.path(), 0o666).unwrap();
    for (uid, gid) in [(NOBODY, NOBODY), (2, 1), (NOBODY, 1)] {
        let refused = as_user(&host, uid, gid);
        assert!(refused.is_err(), "user {uid}, group {gid} is served");
        let last = host.offer().refused().pop().unwrap();
        assert_eq!((last.errno, last.uid), (Errno::ACCESS, uid));
        assert_eq!(last.pid, std::process::id());
        let reason = format!("user {uid} (group {gid}) is not allowed");
        assert_eq!(last.reason, reason);
    }
    assert_eq!(host.seen.opened.load(Ordering::SeqCst), 0);
    for (uid, gid) in [(1, NOBODY), (NOBODY, 2), (0, NOBODY)] {
        as_user(&host, uid, gid).unwrap();
    }
    assert_eq!(host.seen.opened.load(Ordering::SeqCst), 3);
    assert_eq!(host.offer().refused().len(), 3);
}

#[test]
fn descriptors_nobody_took_are_closed() {
    let _guard = ALONE
        .write()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let host = Host::new();
    let many: Vec<_> = (0..100).map(|_| eventfd()).collect();
    let fds: Vec<_> = many.iter().map(AsFd::as_fd).collect();
    {
        let mut raw = greeted(&host);
        still_serves(&mut raw);
    }
    host.until_free();
    let before = descriptors();
    // With a short header, and the end of the connection.
    for _ in 0..3 {
        let mut raw = host.raw();
        raw.send_fds(&[1, 2, 3], &fds);
    }
    until("they are closed", || descriptors() <= before);
    let mut raw = greeted(&host);
    let before = descriptors();
    // With commands that take none, that are unknown, too long, refused, and with replies.
    raw.send_fds(&Raw::message(1, command::DEVICE_RESET, 0, &[]), &fds);
    assert_eq!(raw.receive().0.errno(), None);
    raw.send_fds(&Raw::message(2, 99, 0, &[]), &fds);
    assert_eq!(raw.receive().0.errno(), Some(Errno::OPNOTSUPP));
    raw.send_fds(&Raw::message(3, command::DMA_MAP, 0, &[0; 32]), &fds);
    assert_eq!(raw.receive().0.errno(), Some(Errno::INVAL));
    raw.send_fds(&Raw::message(4, command::DMA_READ, 1, &[0; 32]), &fds);
    let long = Raw::message(5, command::DMA_MAP, 0, &vec![0; 2 << 20]);
    let (head, tail) = long.split_at(1000);
    raw.send_fds(head, &fds);
    raw.send(tail);
    assert_eq!(raw.receive().0.errno(), Some(Errno::MSGSIZE));
    // SPDK sends the descriptor with the unmap as well.
    let unmap = DmaUnmap {
        argsz: 24,
        flags: 0,
        address: 0,
        size: 4096,
    };
    raw.send_fds(
        &Raw::message(6, command::DMA_UNMAP, 0, unmap.as_bytes()),
        &fds[..1],
    );
    assert_eq!(raw.receive().0.errno(), Some(Errno::NOENT));
    still_serves(&mut raw);
    until("they are closed", || descriptors() <= before);
    drop(raw);
    host.until_free();
}

/// Answers the server's next command with this payload; the command.
fn answer(raw: &mut Raw, payload: impl FnOnce(DmaAccess) -> Vec<u8>) -> DmaAccess {
    let (header, asked) = raw.receive();
    assert!(!header.is_reply(), "{header:?}");
    let (access, _) = vfio_user::wire::take::<DmaAccess>(&asked).unwrap();
    raw.send(&Raw::message(
        header.id,
        header.command,
        1,
        &payload(access),
    ));
    access
}

#[test]
fn answers_to_dma_that_do_not_fit_are_errors_of_that_access() {
    let _guard = with_others();
    let host = Host::new();
    let mut raw = greeted(&host);
    let map = [32u32, 3, 0, 0, 0x1000, 0, 0x1000, 0];
    assert_eq!(raw.errno(command::DMA_MAP, map.as_bytes()), None);
    let ring = |raw: &mut Raw, at: u64| {
        let access = RegionAccess {
            offset: at,
            region: 0,
            count: 8,
        };
        let payload = [access.as_bytes(), &0x1000u64.to_ne_bytes()].concat();
        // The doorbell's reply and the driver's command may come in any order.
        raw.send(&Raw::message(
            9,
            command::REGION_WRITE,
            flags_no_reply(),
            &payload,
        ));
    };
    let failed = |raw: &mut Raw| {
        let end = Instant::now() + SOON;
        loop {
            let access = RegionAccess {
                offset: FAILED,
                region: 0,
                count: 4,
            };
            let (_, payload) = raw.ask(command::REGION_READ, access.as_bytes());
            if payload[16..] != [0; 4] || Instant::now() > end {
                let clear = RegionAccess {
                    offset: FAILED,
                    region: 0,
                    count: 4,
                };
                let clear = [clear.as_bytes(), &[0; 4]].concat();
                raw.ask(command::REGION_WRITE, &clear);
                return payload[16];
            }
        }
    };
    type Lie = fn(DmaAccess) -> Vec<u8>;
    let lies: [Lie; 5] = [
        |_| Vec::new(),
        |asked| asked.as_bytes().to_vec(),
        |asked| [asked.as_bytes(), &[0; 100]].concat(),
        |asked| {
            let other = DmaAccess {
                address: 0,
                ..asked
            };
            [other.as_bytes(), &[0; 8]].concat()
        },
        |asked| {
            let other = DmaAccess {
                count: 1 << 40,
                ..asked
            };
            [other.as_bytes(), &[0; 8]].concat()
        },
    ];
    for lie in lies {
        ring(&mut raw, LATER_READ);
        answer(&mut raw, lie);
        assert_eq!(i32::from(failed(&mut raw)), Errno::IO.raw_os_error());
    }
    // A silent one is waited for, but not for ever, and what comes late is dropped.
    ring(&mut raw, LATER_WRITE);
    let (late, _) = raw.receive();
    assert_eq!(i32::from(failed(&mut raw)), Errno::TIMEDOUT.raw_os_error());
    raw.send(&Raw::message(late.id, late.command, 1, &[0; 16]));
    still_serves(&mut raw);
    // An unmap does not wait for it.
    ring(&mut raw, LATER_READ);
    raw.receive();
    let begin = Instant::now();
    let unmap = DmaUnmap {
        argsz: 24,
        flags: 0,
        address: 0x1000,
        size: 0x1000,
    };
    assert_eq!(raw.errno(command::DMA_UNMAP, unmap.as_bytes()), None);
    assert!(begin.elapsed() < Duration::from_secs(3));
    assert_eq!(i32::from(failed(&mut raw)), Errno::BUSY.raw_os_error());
    drop(raw);
    host.until_free();
}

#[test]
fn a_client_that_stops_reading_in_the_midst_of_a_command_is_closed() {
    let _guard = with_others();
    let host = Host::new();
    let mut raw = greeted(&host);
    let map = [32u32, 3, 0, 0, 0x1000, 0, 2 << 20, 0];
    assert_eq!(raw.errno(command::DMA_MAP, map.as_bytes()), None);
    let access = RegionAccess {
        offset: LATER_FLOOD,
        region: 0,
        count: 8,
    };
    let flood = [access.as_bytes(), &0x1000u64.to_ne_bytes()].concat();
    let flood = Raw::message(9, command::REGION_WRITE, flags_no_reply(), &flood);
    raw.send(&flood);
    until("the driver is told", || {
        host.seen.flooded.lock().unwrap().is_some()
    });
    let flooded = *host.seen.flooded.lock().unwrap();
    assert_eq!(flooded, Some(Err(Errno::TIMEDOUT)));
    // A part of the command is there; no more will come, and it must not be waited for.
    assert!(raw.is_closed(), "it waits for the rest");
    host.until_free();
    still_serves(&mut greeted(&host));
}

fn flags_no_reply() -> u32 {
    vfio_user::wire::flags::NO_REPLY
}

#[test]
fn a_client_that_dies_in_the_middle_of_anything_leaves_a_free_device() {
    let _guard = with_others();
    let host = Host::new();
    let file = memfd(8192);
    for round in 0..50 {
        let mut raw = greeted(&host);
        let map = [32u32, 3, 0, 0, 0x1000, 0, 0x1000, 0];
        raw.send_fds(
            &Raw::message(1, command::DMA_MAP, 0, map.as_bytes()),
            &[file.as_fd()],
        );
        let write = Raw::message(2, command::REGION_WRITE, 0, &[0; 100]);
        raw.send(&write[..(round * 2).min(write.len())]);
        drop(raw);
        host.until_free();
    }
    let count = |counter: &std::sync::atomic::AtomicU32| counter.load(Ordering::SeqCst);
    assert_eq!(
        (count(&host.seen.opened), count(&host.seen.closed)),
        (50, 50)
    );
}

#[test]
fn a_driver_that_is_stuck_holds_up_only_its_own_client() {
    let _guard = with_others();
    let host = Host::new();
    let gate = host.seen.gate.lock().unwrap();
    let mut raw = greeted(&host);
    let access = RegionAccess {
        offset: STUCK,
        region: 0,
        count: 1,
    };
    let stuck = [access.as_bytes(), &[0]].concat();
    raw.send(&Raw::message(1, command::REGION_WRITE, 0, &stuck));
    until("it is stuck", || {
        host.seen.stuck.load(Ordering::SeqCst) == 1
    });
    let mut second = host.raw();
    assert_eq!(second.hello(0, Some("{}")).0.errno(), Some(Errno::BUSY));
    // It dies in the call; the device is closed when the call has ended.
    drop(raw);
    assert!(host.device().is_open());
    drop(gate);
    host.until_free();
    assert!(UnixStream::connect(host.path()).is_ok());
}
