//! Many devices, and too few descriptors.

use crate::client::Client;
use crate::scene::{Bystander, Session, alone, descriptors, host, settles, threads};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

#[test]
fn ten_thousand_at_rest() {
    alone!("ten_thousand_at_rest", || {
        const MANY: usize = 10_000;
        let Some(host) = host("ten_thousand_at_rest") else {
            return;
        };
        let before = (descriptors(), threads());
        let devices: Vec<_> = (0..MANY).map(|n| host.device(&format!("d{n}")).0).collect();
        // Looked at before anybody opens one: names, attributes, nothing kept.
        let dir = host.dir.join("dev/vfio/devices");
        let listed = std::fs::read_dir(&dir).unwrap().count();
        assert_eq!(listed, MANY);
        assert!(std::fs::metadata(host.node(MANY as u32 - 1)).is_ok());
        // A device at rest has no descriptor and no thread; a thread that took long over the list has
        // a substitute for a moment.
        settles("descriptors", before.0, descriptors);
        settles("threads", before.1, threads);
        let begun = Instant::now();
        let s = Session::start(&host, 7777);
        assert!(s.client.pread(s.device, s.registers, 8).is_ok());
        assert!(begun.elapsed() < Duration::from_secs(2));
        assert_eq!(host.dev.as_ref().unwrap().own_mounts(), 1);
        s.client.kill();
        drop(devices);
    });
}

/// What the daemon logs.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The daemon has no descriptor left: a client gets EMFILE or ENFILE, others go on, and when there
/// are some again so does everybody.
#[test]
fn out_of_descriptors() {
    alone!("out_of_descriptors", || {
        let log = Log::default();
        let writer = log.clone();
        tracing_subscriber::fmt()
            .with_writer(move || writer.clone())
            .init();
        let Some(host) = host("out_of_descriptors") else {
            return;
        };
        let (_one, _) = host.device("one");
        let (_two, _) = host.device("two");
        let beside = Bystander::start(&host);
        let s = Session::start(&host, 0);
        let c = Client::start();
        let iommu = c.open(&host.iommu()).unwrap();
        let event = s.client.sys(libc::SYS_eventfd2, &[0, 0]).unwrap();
        // An open before, whose BIND comes when there are none.
        let early = c.open(&host.node(1)).unwrap();
        // The limit comes down to what is in use; what the kernel keeps for `early` is made.
        let old = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let limit = |current: Option<u64>| {
            rustix::process::setrlimit(
                rustix::process::Resource::Nofile,
                rustix::process::Rlimit { current, ..old },
            )
            .unwrap();
        };
        let highest = std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u64>().ok())
            .max()
            .unwrap();
        let mut fill = Vec::new();
        limit(Some(highest + 1));
        while let Ok(fd) = rustix::io::dup(rustix::stdio::stdin()) {
            fill.push(fd);
        }
        let few = |result: Result<u64, i32>| {
            assert!(
                matches!(result, Err(libc::EMFILE | libc::ENFILE)),
                "{result:?}"
            );
        };
        few(c.bind(early, iommu).map(u64::from));
        let data = (event as u32).to_ne_bytes();
        let flags = crate::uapi::EVENTFD | crate::uapi::TRIGGER;
        few(s.client.irqs(s.device, flags, 0, 0, 1, &data));
        few(s
            .client
            .map(s.iommufd, s.ioas, 6, s.client.arena + 65536, 4096, 0));
        let said = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        let lines = said.lines().filter(|line| line.contains("LimitNOFILE"));
        assert_eq!(lines.count(), 1, "advice, once: {said}");
        // What needs none goes on, for the others and for the one that was refused.
        beside.goes_on();
        assert!(s.client.pread(s.device, s.registers, 8).is_ok());
        assert!(s.client.region(s.device, 0).is_ok());
        // A device's first open finds no room for a connection of its own: it is served with the
        // others, or refused.
        let late = c.open(&host.node(0));
        assert!(
            matches!(late, Ok(_) | Err(libc::EMFILE | libc::ENFILE)),
            "{late:?}"
        );
        drop(fill);
        limit(old.current);
        assert!(c.bind(early, iommu).is_ok());
        assert_eq!(s.client.irqs(s.device, flags, 0, 0, 1, &data), Ok(0));
        beside.end();
    });
}
