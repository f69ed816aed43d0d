//! Many listeners at rest, many windows. In a process of its own, whose threads and memory are counted.

mod common;

use common::*;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use vfio_user::OfferOptions;

/// A number of `/proc/self/status`.
fn status(name: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let word = line.and_then(|line| line.split_whitespace().next());
    word.unwrap().parse().unwrap()
}

fn mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps")
        .unwrap()
        .lines()
        .count()
}

// One test: the numbers are of the whole process.
#[test]
fn at_rest_a_listener_is_a_descriptor_and_a_window_is_an_entry() {
    let limit = getrlimit(Resource::Nofile);
    let most = limit.maximum.unwrap_or(1 << 20);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised).unwrap();
    let listeners = 10_000.min(most.saturating_sub(200)) as usize;
    if listeners < 10_000 {
        vfiod_tests::skip(&format!(
            "no 10 000 listeners: only {most} descriptors are allowed"
        ));
    }
    let host = Host::new();
    let (threads, memory) = (status("Threads:"), status("VmRSS:"));
    let offers: Vec<_> = (0..listeners)
        .map(|n| {
            let path = host.dir.path().join(n.to_string());
            let listener = UnixListener::bind(path).unwrap();
            host.server
                .offer(&host.device(), listener, OfferOptions::default())
                .unwrap()
        })
        .collect();
    assert_eq!(status("Threads:"), threads, "no thread each");
    let each = status("VmRSS:").saturating_sub(memory) * 1024 / listeners as u64;
    println!("{each} bytes for each of {listeners} listeners");
    assert!(each <= 8192, "{each} bytes");
    // Any of them serves.
    let last = host.dir.path().join((listeners - 1).to_string());
    let mut client = vfio_user::client::Client::connect(last).unwrap();
    client.device_info().unwrap();
    drop(client);
    drop(offers);
    host.until_free();

    let mut client = host.connect();
    let files: Vec<_> = (0..16).map(|_| memfd(1 << 30)).collect();
    let before = mappings();
    let windows = 100_000u64;
    let memory = status("VmRSS:");
    for n in 0..windows {
        let file = &files[n as usize % 16];
        let map = vfio_user::wire::DmaMap {
            argsz: 32,
            flags: 3,
            offset: n * 4096,
            address: n * 8192,
            size: 4096,
        };
        use zerocopy::IntoBytes;
        let command = vfio_user::wire::command::DMA_MAP;
        client
            .post(command, map.as_bytes(), &[file.as_fd()])
            .unwrap();
    }
    client.device_info().unwrap();
    assert_eq!(host.offer().windows() as u64, windows);
    let each = status("VmRSS:").saturating_sub(memory) * 1024 / windows;
    println!("{each} bytes for each of {windows} windows");
    assert!(each <= 64, "{each} bytes");
    for n in 0..32u64 {
        put(&files[n as usize % 16], n * 4096, &n.to_ne_bytes());
        let iova = n * 8192;
        client
            .region_write(0, DMA_READ, &iova.to_ne_bytes())
            .unwrap();
        let mut value = [0; 8];
        client.region_read(0, VALUE, &mut value).unwrap();
        assert_eq!(u64::from_ne_bytes(value), n);
    }
    assert!(
        mappings() <= before + 40,
        "{} mappings",
        mappings() - before
    );
    client.dma_unmap_all().unwrap();
    assert_eq!(host.offer().windows(), 0);
}
