//! Migration and the DMA log on the wire (specification, "Device State" and "Data Transfer").

mod common;

use common::{DMA_WRITE, Host, LATER_WRITE, REGISTERS, Raw, SOON, VALUE, memfd, until};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use vfio_core::Errno;
use vfio_core::device::MigrationState as State;
use vfio_uapi::device::feature::{Feature, FeatureFlags};
use vfio_user::client::{Client, Error, Hello, Memory};
use vfio_user::wire::{MigData, command};
use zerocopy::IntoBytes;

/// A stream of the probe: 56 bytes, then its registers.
const STREAM: usize = 56 + REGISTERS as usize;

/// What libvfio-user's sample says.
const SAMPLE: &str =
    r#"{"capabilities":{"max_msg_fds":32,"max_data_xfer_size":1024,"migration":{"pgsize":4096}}}"#;

fn flags(operation: FeatureFlags, feature: Feature) -> FeatureFlags {
    operation | FeatureFlags::from_bits_retain(feature as u32)
}

fn set(client: &mut Client, state: State) -> Result<(), Error> {
    let flags = flags(FeatureFlags::SET, Feature::MigDeviceState);
    let data = [state as u32, u32::MAX];
    let reply = client.feature(flags, data.as_bytes(), 8)?;
    assert_eq!(reply, data.as_bytes(), "a set repeats what was set");
    Ok(())
}

fn state(client: &mut Client) -> u32 {
    let flags = flags(FeatureFlags::GET, Feature::MigDeviceState);
    let reply = client.feature(flags, &[], 8).unwrap();
    assert_eq!(reply[4..], [0xff; 4], "no descriptor");
    u32::from_ne_bytes(reply[..4].try_into().unwrap())
}

fn errno<T: std::fmt::Debug>(done: Result<T, Error>) -> Option<Errno> {
    done.expect_err("it was not refused").refused()
}

/// Reads to the end, or to the end for now.
fn read_all(client: &mut Client) -> Vec<u8> {
    let mut stream = Vec::new();
    loop {
        let part = client.mig_data_read(1000).unwrap();
        stream.extend(&part);
        if part.len() < 1000 {
            return stream;
        }
    }
}

#[test]
fn a_device_moves_from_one_server_to_another() {
    let (source, target) = (Host::new(), Host::new());
    let (mut from, mut to) = (source.connect(), target.connect());
    let get = flags(FeatureFlags::GET, Feature::Migration);
    assert_eq!(from.feature(get, &[], 8).unwrap(), 5u64.to_ne_bytes());
    assert_eq!(errno(from.feature(get, &[], 7)), Some(Errno::INVAL));
    assert_eq!(state(&mut from), State::Running as u32);
    from.region_write(0, 0x100, b"before").unwrap();

    // While it runs the head can be read, and what is not there yet is not waited for.
    set(&mut from, State::PreCopy).unwrap();
    let mut stream = read_all(&mut from);
    assert!(!stream.is_empty() && stream.len() < 56);
    assert_eq!(from.mig_data_read(10).unwrap(), [0u8; 0]);
    from.region_write(0, 0x100, b"at last").unwrap();
    set(&mut from, State::StopCopy).unwrap();
    let size = flags(FeatureFlags::GET, Feature::MigDataSize);
    let left = (STREAM - stream.len()) as u64;
    assert_eq!(from.feature(size, &[], 8).unwrap(), left.to_ne_bytes());
    stream.extend(read_all(&mut from));
    assert_eq!(stream.len(), STREAM);
    assert_eq!(from.mig_data_read(10).unwrap(), [0u8; 0], "the end");
    assert_eq!(errno(from.mig_data_write(&[1])), Some(Errno::BADF));

    assert_eq!(errno(to.mig_data_write(&stream)), Some(Errno::NODEV));
    set(&mut to, State::Resuming).unwrap();
    for part in stream.chunks(999) {
        to.mig_data_write(part).unwrap();
    }
    set(&mut to, State::Running).unwrap();
    assert_eq!(errno(to.mig_data_read(1)), Some(Errno::NODEV));
    let mut got = [0; 7];
    to.region_read(0, 0x100, &mut got).unwrap();
    assert_eq!(got, *b"at last");
}

#[test]
fn arcs_that_are_not_there_and_streams_that_are_no_streams() {
    let host = Host::new();
    let mut client = host.connect();
    for state in [State::Error, State::RunningP2p, State::PreCopyP2p] {
        assert_eq!(
            errno(set(&mut client, state)),
            Some(Errno::INVAL),
            "{state}"
        );
    }
    let bad = flags(FeatureFlags::SET, Feature::MigDeviceState);
    let number = [8u32, 0];
    assert_eq!(
        errno(client.feature(bad, number.as_bytes(), 8)),
        Some(Errno::INVAL)
    );
    set(&mut client, State::StopCopy).unwrap();
    assert_eq!(errno(set(&mut client, State::PreCopy)), Some(Errno::INVAL));
    let stream = read_all(&mut client);
    set(&mut client, State::Resuming).unwrap();
    client.mig_data_write(&stream[..STREAM - 1]).unwrap();
    assert_eq!(errno(set(&mut client, State::Stop)), Some(Errno::INVAL));
    assert_eq!(state(&mut client), State::Resuming as u32);
    assert_eq!(errno(client.mig_data_write(&[0; 9000])), Some(Errno::NOMEM));
    client.reset().unwrap();
    assert_eq!(state(&mut client), State::Running as u32);
    set(&mut client, State::Resuming).unwrap();
    assert_eq!(
        errno(client.mig_data_write(&[0x55; 64])),
        Some(Errno::INVAL)
    );
    client.reset().unwrap();
}

/// A client that dies leaves the device as the next one expects it, whatever state it was in.
#[test]
fn a_dead_client_leaves_no_state_behind() {
    let host = Host::new();
    for left_in in [
        State::Stop,
        State::StopCopy,
        State::Resuming,
        State::PreCopy,
    ] {
        let mut client = host.connect();
        set(&mut client, left_in).unwrap();
        drop(client);
        host.until_free();
        let mut next = host.connect();
        assert_eq!(state(&mut next), State::Running as u32, "left in {left_in}");
        assert_eq!(errno(next.mig_data_read(1)), Some(Errno::NODEV));
        next.region_write(0, VALUE, &[1]).unwrap();
        drop(next);
        host.until_free();
    }
    assert_eq!(host.seen.stopped.load(Ordering::SeqCst), 3);
}

/// libvfio-user's sample wants a reply as long as it asked for; others want the data alone.
#[test]
fn a_padded_read_for_those_who_insist() {
    let host = Host::new();
    for (minor, json, padded) in [(2, SAMPLE, true), (1, r#"{"capabilities":{}}"#, false)] {
        let mut raw = host.raw();
        let (header, _) = raw.hello(minor, Some(json));
        assert_eq!(header.errno(), None);
        let set = [
            16u32,
            FeatureFlags::SET.bits() | Feature::MigDeviceState as u32,
            State::StopCopy as u32,
            0,
        ];
        let (header, _) = raw.ask(command::DEVICE_FEATURE, set.as_bytes());
        assert_eq!(header.errno(), None);
        let mut total = 0;
        loop {
            let asked = [1024u32 + 8, 1024];
            let (header, payload) = raw.ask(command::MIG_DATA_READ, asked.as_bytes());
            assert_eq!(header.errno(), None);
            let got = u32::from_ne_bytes(payload[4..8].try_into().unwrap()) as usize;
            total += got;
            let len = if padded { 1024 } else { got };
            assert_eq!(payload.len(), size_of::<MigData>() + len);
            assert!(payload[8 + got..].iter().all(|byte| *byte == 0));
            if got == 0 {
                break;
            }
        }
        assert_eq!(total, STREAM);
        // Stopped, it still answers everything, unlike theirs.
        let (header, _) = raw.ask(command::DEVICE_RESET, &[]);
        assert_eq!(header.errno(), None);
        drop(raw);
        host.until_free();
    }
}

/// Memory of a client that has no descriptor for it.
struct Ram;

impl Memory for Ram {
    fn read(&mut self, _address: u64, buf: &mut [u8]) -> Result<(), Errno> {
        buf.fill(0);
        Ok(())
    }
    fn write(&mut self, _address: u64, _data: &[u8]) -> Result<(), Errno> {
        Ok(())
    }
}

/// What the device writes is in the log whether it goes through a descriptor or by messages, in all
/// windows of a report, and until the log stops.
#[test]
fn every_window_is_logged() {
    let host = Host::new();
    let hello = Hello {
        minor: 2,
        json: Some(SAMPLE.into()),
    };
    let socket = UnixStream::connect(host.path()).unwrap();
    let mut client = Client::greet(socket, &hello).unwrap();
    client.set_memory(Ram);
    let file = memfd(1 << 20);
    let fd = Some((file.as_fd(), 0));
    client.dma_map(0, 1 << 20, (true, true), fd).unwrap();
    client
        .dma_map(1 << 20, 1 << 20, (true, true), None)
        .unwrap();

    // On the wire the ranges follow; none means everything.
    let start = flags(FeatureFlags::SET, Feature::DmaLoggingStart);
    let data = [
        [8192u64, 2].as_bytes(),
        [0u64, 1 << 20, 1 << 20, 1 << 20].as_bytes(),
    ]
    .concat();
    let reply = client.feature(start, &data, data.len()).unwrap();
    assert_eq!(reply, data, "the page size is the one asked for");
    assert_eq!(
        errno(client.feature(start, &data, data.len())),
        Some(Errno::INVAL)
    );

    client
        .region_write(0, DMA_WRITE, &0x5000u64.to_ne_bytes())
        .unwrap();
    client
        .region_write(0, LATER_WRITE, &0x10_9000u64.to_ne_bytes())
        .unwrap();
    let mut done = [0];
    let end = std::time::Instant::now() + SOON;
    while done == [0] {
        assert!(std::time::Instant::now() < end, "the device never wrote");
        client
            .answer_for(std::time::Duration::from_millis(5))
            .unwrap();
        client.region_read(0, common::DONE, &mut done).unwrap();
    }
    let report = flags(FeatureFlags::GET, Feature::DmaLoggingReport);
    let mut bitmap = |page_size: u64| {
        let asked = [0u64, 2 << 20, page_size];
        let words = ((2 << 20) / page_size as usize).div_ceil(64);
        let reply = client
            .feature(report, asked.as_bytes(), 24 + 8 * words)
            .unwrap();
        let bits = reply[24..].iter().enumerate();
        bits.flat_map(|(n, byte)| {
            (0..8)
                .filter(move |bit| byte >> bit & 1 == 1)
                .map(move |bit| n * 8 + bit)
        })
        .collect::<Vec<usize>>()
    };
    // Logged by 8 KiB, reported by 4 KiB: both halves of a page.
    assert_eq!(bitmap(4096), [4, 5, 0x108, 0x109]);
    assert_eq!(bitmap(4096), [0usize; 0]);
    let stop = flags(FeatureFlags::SET, Feature::DmaLoggingStop);
    client.feature(stop, &[], 0).unwrap();
    let asked = [0u64, 2 << 20, 4096];
    assert_eq!(
        errno(client.feature(report, asked.as_bytes(), 24 + 64)),
        Some(Errno::INVAL),
        "it has stopped"
    );
    // A client that goes takes its log with it.
    client.feature(start, &data, data.len()).unwrap();
    drop(client);
    host.until_free();
    let mut next = host.connect();
    next.feature(start, &data, data.len()).unwrap();
}

/// Features by the raw message: what is too short for its data is refused, never read beyond.
#[test]
fn short_features_on_a_device_that_migrates() {
    let host = Host::new();
    let mut raw = host.raw();
    raw.hello(1, Some(r#"{"capabilities":{}}"#));
    for feature in Feature::ALL {
        for operation in [FeatureFlags::GET, FeatureFlags::SET] {
            let whole = [64u32, (operation.bits() | feature as u32)];
            for len in 0..8 {
                let (header, _) = raw.ask(command::DEVICE_FEATURE, &whole.as_bytes()[..len]);
                assert_eq!(header.errno(), Some(Errno::INVAL), "{feature}, {len} bytes");
            }
        }
    }
    // A set that promises a state and brings half of one.
    let half = [
        16u32,
        FeatureFlags::SET.bits() | Feature::MigDeviceState as u32,
        State::Stop as u32,
    ];
    for len in 8..12 {
        let errno = raw.errno(command::DEVICE_FEATURE, &half.as_bytes()[..len]);
        assert_eq!(errno, Some(Errno::INVAL));
    }
    // Ranges that are promised and not there.
    for count in [1u32, 2, 0x1000_0000, u32::MAX] {
        let start = FeatureFlags::SET.bits() | Feature::DmaLoggingStart as u32;
        let payload = [4096u32, start, 4096, 0, count, 0];
        let errno = raw.errno(command::DEVICE_FEATURE, payload.as_bytes());
        assert_eq!(errno, Some(Errno::INVAL), "{count} ranges");
    }
    // Reads and writes of the stream whose sizes lie.
    for (command, payload) in [
        (command::MIG_DATA_READ, [8u32, 1]),
        (command::MIG_DATA_READ, [u32::MAX, u32::MAX]),
        (command::MIG_DATA_WRITE, [12u32, 4]),
        (command::MIG_DATA_WRITE, [8u32, u32::MAX]),
    ] {
        assert_eq!(raw.errno(command, payload.as_bytes()), Some(Errno::INVAL));
    }
    let message = Raw::message(5, command::DEVICE_RESET, 0, &[]);
    raw.send(&message);
    assert_eq!(raw.receive().0.errno(), None, "the connection is in step");
    until("somebody is served", || host.offer().client().is_some());
}
