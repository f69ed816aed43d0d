//! Clients of other makes: what each of them sends, and what it cannot take.

mod common;

use common::*;
use rust_vfio_user::Client as RustClient;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vfio_core::Errno;
use vfio_user::ClientKind;
use vfio_user::client::{Client, Error, Hello, Memory};
use vfio_user::wire::{DmaAccess, RegionAccess, command};
use zerocopy::IntoBytes;

const QEMU: &str = r#"{"capabilities": {"pgsizes": 4096, "max_msg_fds": 16, "max_dma_maps": 65535, "max_data_xfer_size": 1048576, "migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, "write_multiple": true}}"#;
const SAMPLE: &str =
    r#"{"capabilities":{"max_msg_fds":32,"max_data_xfer_size":1024,"migration":{"pgsize":4096}}}"#;
const RW: (bool, bool) = (true, true);

/// Memory of a client that it gives no descriptor of.
#[derive(Clone, Default)]
struct Private(Arc<Mutex<Held>>);

/// Its bytes, and what was asked for.
type Held = (Vec<u8>, Vec<(u64, usize)>);

impl Private {
    fn new(size: usize) -> Private {
        let bytes = (0..size).map(|n| n as u8).collect();
        Private(Arc::new(Mutex::new((bytes, Vec::new()))))
    }
}

impl Memory for Private {
    fn read(&mut self, address: u64, buf: &mut [u8]) -> Result<(), Errno> {
        let (bytes, asked) = &mut *self.0.lock().unwrap();
        asked.push((address, buf.len()));
        let from = address as usize;
        buf.copy_from_slice(bytes.get(from..from + buf.len()).ok_or(Errno::NODEV)?);
        Ok(())
    }

    fn write(&mut self, address: u64, data: &[u8]) -> Result<(), Errno> {
        let (bytes, asked) = &mut *self.0.lock().unwrap();
        asked.push((address, data.len()));
        let from = address as usize;
        let to = bytes.get_mut(from..from + data.len()).ok_or(Errno::NODEV)?;
        to.copy_from_slice(data);
        Ok(())
    }
}

fn greet(host: &Host, minor: u16, json: &str) -> Client {
    let socket = std::os::unix::net::UnixStream::connect(host.path()).unwrap();
    let hello = Hello {
        minor,
        json: Some(json.to_owned()),
    };
    Client::greet(socket, &hello).unwrap()
}

/// Rings a doorbell whose work is done by a thread of the driver, and waits for it.
fn later(client: &mut Client, doorbell: u64, iova: u64) -> Result<(), Errno> {
    let register = |client: &mut Client, at| {
        let mut buf = [0; 4];
        client.region_read(0, at, &mut buf).unwrap();
        buf
    };
    let before = register(client, DONE);
    client.region_write(0, FAILED, &[0; 4]).unwrap();
    client
        .region_write(0, doorbell, &iova.to_ne_bytes())
        .unwrap();
    let end = Instant::now() + SOON;
    loop {
        client.answer_for(Duration::from_millis(1)).unwrap();
        if register(client, DONE) != before {
            return Ok(());
        }
        let failed = i32::from_ne_bytes(register(client, FAILED));
        if failed != 0 {
            return Err(Errno::from_raw_os_error(failed));
        }
        assert!(Instant::now() < end, "nothing happened");
    }
}

#[test]
fn messages_reach_memory_without_a_descriptor() {
    let host = Host::new();
    for (minor, json, kind) in [
        (2, SAMPLE, ClientKind::LibvfioUser),
        (0, QEMU, ClientKind::Qemu),
        (0, "{}", ClientKind::Unknown),
    ] {
        let mut client = greet(&host, minor, json);
        assert_eq!(host.offer().client().unwrap().kind, kind);
        let memory = Private::new(8192);
        client.set_memory(memory.clone());
        client.dma_map(0, 8192, RW, None).unwrap();
        assert_eq!(later(&mut client, LATER_READ, 16), Ok(()), "{kind}");
        let mut value = [0; 8];
        client.region_read(0, VALUE, &mut value).unwrap();
        assert_eq!(value, [16, 17, 18, 19, 20, 21, 22, 23]);
        assert_eq!(later(&mut client, LATER_WRITE, 4096), Ok(()));
        assert_eq!(memory.0.lock().unwrap().0[4096..4104], value);
        // Not inside a command: it may not answer before that is answered.
        let inside = client.region_write(0, DMA_READ, &16u64.to_ne_bytes());
        assert_eq!(inside.unwrap_err().refused(), Some(Errno::DEADLK));
        // In parts that it takes.
        memory.0.lock().unwrap().1.clear();
        assert_eq!(later(&mut client, LATER_BULK, 100), Ok(()));
        let asked = memory.0.lock().unwrap().1.clone();
        if kind == ClientKind::LibvfioUser {
            assert_eq!(asked, [(100, 1024), (1124, 1024)]);
        } else {
            assert_eq!(asked, [(100, 2048)]);
        }
        let mut bulk = vec![0; 2048];
        client.region_read(0, 2048, &mut bulk).unwrap();
        assert_eq!(bulk, memory.0.lock().unwrap().0[100..2148]);
        // What it says is what the driver hears; a transfer from window to window is one.
        client.dma_map(8192, 4096, RW, None).unwrap();
        assert_eq!(later(&mut client, LATER_READ, 8192), Err(Errno::NODEV));
        let file = memfd(4096);
        put(&file, 0, &[0xab; 4]);
        client
            .dma_map(12288, 4096, RW, Some((file.as_fd(), 0)))
            .unwrap();
        memory.0.lock().unwrap().0.resize(12288, 0xcd);
        assert_eq!(later(&mut client, LATER_READ, 12284), Ok(()));
        client.region_read(0, VALUE, &mut value).unwrap();
        assert_eq!(value, [0xcd, 0xcd, 0xcd, 0xcd, 0xab, 0xab, 0xab, 0xab]);
        drop(client);
        host.until_free();
    }
}

#[test]
fn a_qemu_with_the_old_layout_is_never_written_to() {
    let host = Host::new();
    let mut raw = host.raw();
    assert_eq!(raw.hello(0, Some(QEMU)).0.errno(), None);
    let map = [32u32, 3, 0, 0, 0x1000, 0, 0x1000, 0];
    assert_eq!(raw.errno(command::DMA_MAP, map.as_bytes()), None);
    let access = RegionAccess {
        offset: LATER_WRITE,
        region: 0,
        count: 8,
    };
    let ring = [access.as_bytes(), &0x1000u64.to_ne_bytes()].concat();
    raw.send(&Raw::message(3, command::REGION_WRITE, 1 << 4, &ring));
    // It counts in 32 bits, so it reads nothing from there, and says so.
    let (header, payload) = raw.receive();
    assert_eq!(header.command, command::DMA_READ);
    let asked = DmaAccess {
        address: 0,
        count: 1 << 32,
    };
    assert_eq!(payload, asked.as_bytes());
    raw.send(&Raw::message(header.id, header.command, 1, &[0; 16]));
    let failed = RegionAccess {
        offset: FAILED,
        region: 0,
        count: 4,
    };
    let end = Instant::now() + SOON;
    let errno = loop {
        let (_, payload) = raw.ask(command::REGION_READ, failed.as_bytes());
        if payload[16..] != [0; 4] {
            break i32::from_ne_bytes(payload[16..].try_into().unwrap());
        }
        assert!(Instant::now() < end);
    };
    assert_eq!(errno, Errno::OPNOTSUPP.raw_os_error());
}

#[test]
fn with_a_second_socket_dma_works_inside_a_command() {
    let host = Host::new();
    let json = r#"{"capabilities":{"max_msg_fds":8,"twin_socket":{"supported":true}}}"#;
    let mut client = greet(&host, 0, json);
    assert_eq!(client.capabilities()["twin_socket"]["fd_index"], 0);
    client.set_memory(Private::new(4096));
    client.dma_map(0, 4096, RW, None).unwrap();
    client
        .region_write(0, DMA_READ, &40u64.to_ne_bytes())
        .unwrap();
    let mut value = [0; 8];
    client.region_read(0, VALUE, &mut value).unwrap();
    assert_eq!(value, [40, 41, 42, 43, 44, 45, 46, 47]);
    assert_eq!(later(&mut client, LATER_WRITE, 0), Ok(()));
    drop(client);
    host.until_free();
}

#[test]
fn the_crate_that_cloud_hypervisor_uses() {
    let host = Host::new();
    let mut client = RustClient::new(&host.path()).unwrap();
    let told = host.offer().client().unwrap();
    assert_eq!(
        (told.kind, told.pid),
        (ClientKind::Rust, std::process::id())
    );
    assert_eq!(client.region(2).unwrap().sparse_areas.len(), 2);
    assert!(client.region(1).unwrap().file_offset.is_some());
    client.region_write(0, 100, b"hello").unwrap();
    let mut buf = [0; 5];
    client.region_read(0, 100, &mut buf).unwrap();
    assert_eq!(&buf, b"hello");
    let file = memfd(8192);
    put(&file, 4096, &[5; 8]);
    client
        .dma_map(4096, 0x1000, 4096, file.as_raw_fd())
        .unwrap();
    client
        .region_write(0, DMA_READ, &0x1000u64.to_ne_bytes())
        .unwrap();
    let mut value = [0; 8];
    client.region_read(0, VALUE, &mut value).unwrap();
    assert_eq!(value, [5; 8]);
    // As many descriptors as it likes, whatever was announced.
    let vectors: Vec<_> = (0..40).map(|_| eventfd()).collect();
    let fds: Vec<_> = vectors.iter().map(AsRawFd::as_raw_fd).collect();
    let flags = 4 | 32;
    client.set_irqs(2, flags, 0, 16, &fds[..16]).unwrap();
    client.set_irqs(2, flags, 16, 24, &fds[16..]).unwrap();
    client.region_write(0, FIRE, &[39]).unwrap();
    assert_eq!(count(&vectors[39]), 1);
    assert_eq!(client.get_irq_info(2).unwrap().count, 2048);
    // Where others get an error, it would wait for data for ever.
    let mut buf = [0; 300];
    client.region_read(0, 4000, &mut buf).unwrap();
    assert_eq!(buf, [0xff; 300]);
    client.region_read(7, 0, &mut buf).unwrap();
    assert_eq!((buf[254], buf[255]), (254, 0xff));
    client.region_write(8, 0, b"x").unwrap();
    client.dma_unmap(0x9000, 4096).unwrap();
    client.dma_unmap(0x1000, 4096).unwrap();
    assert_eq!(client.get_irq_info(9).unwrap().count, 0);
    client.reset().unwrap();
    // It cannot take commands.
    client
        .region_write(0, LATER_READ, &0u64.to_ne_bytes())
        .unwrap();
    client.shutdown().unwrap();
    until("it is gone", || host.offer().client().is_none());
    drop(client);
    host.until_free();
}

#[test]
fn spdk_on_the_wire() {
    let host = Host::new();
    let mut raw = host.raw();
    let ask = |raw: &mut Raw, command: u16, payload: &[u8]| {
        raw.send(&Raw::message(0, command, 0, payload));
        let (header, payload) = raw.receive();
        assert_eq!((header.id, header.command), (0, command));
        assert!(payload.len() <= 4096);
        (header, payload)
    };
    let (header, payload) = ask(&mut raw, command::VERSION, b"\0\0\x01\0");
    assert_eq!(header.errno(), None);
    assert_eq!(payload[..4], *b"\0\0\x01\0");
    assert_eq!(host.offer().client().unwrap().kind, ClientKind::Spdk);
    for index in 0..9u32 {
        let mut info = vec![0; 4064];
        info[..4].copy_from_slice(&4064u32.to_ne_bytes());
        info[8..12].copy_from_slice(&index.to_ne_bytes());
        let (header, payload) = ask(&mut raw, command::DEVICE_GET_REGION_INFO, &info);
        assert_eq!(header.errno(), None);
        let flags = u32::from_ne_bytes(payload[4..8].try_into().unwrap());
        // It takes one descriptor for each area, and there is one.
        let mappable = matches!(index, 1 | 3);
        assert_eq!(flags & 4 != 0, mappable, "region {index}");
    }
    let file = memfd(2 << 20);
    let map: [u64; 4] = [32 | 3 << 32, 0, 0x7f00_0000_0000, 2 << 20];
    raw.send_fds(
        &Raw::message(0, command::DMA_MAP, 0, map.as_bytes()),
        &[file.as_fd()],
    );
    assert_eq!(raw.receive().0.errno(), None);
    let unmap: [u64; 3] = [24, 0x7f00_0000_0000, 2 << 20];
    raw.send_fds(
        &Raw::message(0, command::DMA_UNMAP, 0, unmap.as_bytes()),
        &[file.as_fd()],
    );
    let (header, payload) = raw.receive();
    assert_eq!((header.errno(), payload.len()), (None, 24));
    let (header, payload) = ask(&mut raw, command::REGION_READ, &[0xff; 16]);
    assert!(header.errno().is_some() && payload.is_empty());
}

#[test]
fn qemu_on_the_wire() {
    let host = Host::new();
    let mut raw = host.raw();
    let (header, answer) = raw.hello(0, Some(QEMU));
    assert!(header.size as usize <= 16 + 4 + QEMU.len() + 1);
    assert_eq!(answer[..4], [0; 4], "0.0 exactly");
    let text: serde_json::Value = serde_json::from_slice(&answer[4..answer.len() - 1]).unwrap();
    assert_eq!(text["capabilities"]["write_multiple"], true);
    assert_eq!(text["capabilities"]["max_msg_fds"], 16);
    // Maps are pipelined, and only the last one's reply is waited for; region info has 32 bytes of
    // payload whatever its argsz, and the reply fits that.
    for n in 0..4u64 {
        let map: [u64; 4] = [32 | 3 << 32, 0, n << 20, 1 << 20];
        let last = n == 3;
        let flags = if last { 0 } else { 1 << 4 };
        raw.send(&Raw::message(
            n as u16,
            command::DMA_MAP,
            flags,
            map.as_bytes(),
        ));
    }
    assert_eq!(raw.receive().0.id, 3);
    for argsz in [32u32, 64, 4096] {
        let asked = [argsz, 0, 2, 0, 0, 0, 0, 0];
        let (_, payload) = raw.ask(command::DEVICE_GET_REGION_INFO, asked.as_bytes());
        assert!(payload.len() <= argsz as usize);
        assert_eq!(
            payload.len(),
            if argsz < 64 { 32 } else { 32 + 48 }.min(payload.len())
        );
    }
    // Posted writes are done before a following read is answered.
    for value in 0..100u8 {
        let access = RegionAccess {
            offset: 0,
            region: 0,
            count: 1,
        };
        let write = [access.as_bytes(), &[value]].concat();
        raw.send(&Raw::message(5, command::REGION_WRITE, 1 << 4, &write));
        let (_, payload) = raw.ask(command::REGION_READ, access.as_bytes());
        assert_eq!(payload[16], value);
    }
}

#[test]
fn our_client_says_who_is_not_there() {
    let dir = tempfile::TempDir::new().unwrap();
    let nobody = Client::connect(dir.path().join("nothing")).unwrap_err();
    assert!(matches!(nobody, Error::Socket(_)), "{nobody:?}");
    let host = Host::new();
    let _first = host.connect();
    let busy = Client::connect(host.path()).unwrap_err();
    assert_eq!(busy.refused(), Some(Errno::BUSY));
}
