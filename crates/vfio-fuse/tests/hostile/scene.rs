//! A daemon of one's own, and somebody beside whom nothing may disturb.

use crate::client::Client;
use crate::common::{self, Host, Seen};
use crate::uapi::MAP_RW;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use vfio_core::model::faux;

const ALONE: &str = "VFIO_FUSE_HOSTILE_ALONE";

/// Runs a test in a process of its own, which must end within two minutes.
pub fn run_alone(module: &str, name: &str, body: impl FnOnce()) {
    if std::env::var_os(ALONE).is_some() {
        body();
        return;
    }
    let module = module.split_once("::").map_or(module, |(_, rest)| rest);
    let path = format!("{module}::{name}");
    let said =
        std::env::temp_dir().join(format!("{}-{}", std::process::id(), path.replace(':', "-")));
    let file = std::fs::File::create(&said).unwrap();
    // For those that share huge pages with a device; who needs them and has none says so.
    let _pages = vfiod_tests::HugePages::reserve();
    let mut process = Command::new(std::env::current_exe().unwrap())
        .args([&path, "--exact", "--nocapture", "--test-threads=1"])
        .env(ALONE, "1")
        .stdin(Stdio::null())
        .stdout(file.try_clone().unwrap())
        .stderr(file)
        .spawn()
        .unwrap();
    let end = Instant::now() + Duration::from_secs(120);
    let status = loop {
        if let Some(status) = process.try_wait().unwrap() {
            break Some(status);
        }
        if Instant::now() > end {
            let _ = process.kill();
            break None;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let text = std::fs::read(&said).unwrap_or_default();
    let _ = std::fs::remove_file(&said);
    let text = String::from_utf8_lossy(&text);
    for line in text.lines().filter(|line| line.contains("SKIPPED")) {
        match line {
            line if line.contains("native mapping") => {
                vfiod_tests::skip(vfiod_tests::skip::NO_PASSTHROUGH)
            }
            line => vfiod_tests::skip(line),
        }
    }
    assert!(
        status.is_some_and(|status| status.success()),
        "{path}: {status:?} (none: it did not end)\n{text}"
    );
}

/// `alone!("name", || { … })`, in a test of that name.
macro_rules! alone {
    ($name:literal, $body:expr) => {
        crate::scene::run_alone(module_path!(), $name, $body)
    };
}
pub(crate) use alone;

/// A client on a device: bound, with an IOAS attached, and a page of its arena mapped at IOVA 0.
pub struct Session {
    pub client: Client,
    pub device: u64,
    pub iommufd: u64,
    pub ioas: u32,
    /// Where the registers lie in the file.
    pub registers: u64,
    pub devid: u32,
}

impl Session {
    pub fn start(host: &Host, index: u32) -> Session {
        Session::of(Client::start(), host, index)
    }

    pub fn of(client: Client, host: &Host, index: u32) -> Session {
        let device = client.open(&host.node(index)).unwrap();
        let iommufd = client.open(&host.iommu()).unwrap();
        let devid = client.bind(device, iommufd).unwrap();
        let ioas = client.ioas(iommufd).unwrap();
        client.attach(device, ioas).unwrap();
        let registers = client.region(device, 0).unwrap().2;
        Session {
            client,
            device,
            iommufd,
            ioas,
            registers,
            devid,
        }
    }

    /// Maps client memory at an IOVA.
    pub fn map(&self, addr: u64, len: u64, iova: u64, flags: u32) -> Result<u64, i32> {
        let flags = flags | crate::uapi::MAP_FIXED;
        self.client
            .map(self.iommufd, self.ioas, flags, addr, len, iova)
    }

    pub fn map_rw(&self, addr: u64, len: u64, iova: u64) {
        assert_eq!(self.map(addr, len, iova, MAP_RW), Ok(iova));
    }

    pub fn unmap(&self, iova: u64, len: u64) -> Result<u64, i32> {
        self.client.unmap(self.iommufd, self.ioas, iova, len)
    }

    /// The device reads 8 bytes at an IOVA; what it read.
    pub fn dma_read(&self, iova: u64) -> Result<u64, i32> {
        let at = self.registers + common::DMA_READ;
        self.client.pwrite(self.device, at, &iova.to_ne_bytes())?;
        let at = self.registers + common::VALUE;
        let value = self.client.pread(self.device, at, 8)?;
        Ok(u64::from_ne_bytes(value.try_into().unwrap()))
    }

    /// The device writes 8 bytes at an IOVA.
    pub fn dma_write(&self, iova: u64, value: u64) -> Result<(), i32> {
        let at = self.registers + common::VALUE;
        self.client.pwrite(self.device, at, &value.to_ne_bytes())?;
        let at = self.registers + common::DMA_WRITE;
        self.client
            .pwrite(self.device, at, &iova.to_ne_bytes())
            .map(drop)
    }
}

/// Another client on another device, which reads registers all the time.
pub struct Bystander {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    longest: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
    _seen: Arc<Seen>,
    _device: faux::Device,
}

impl Bystander {
    pub fn start(host: &Host) -> Bystander {
        let (device, seen) = host.device("bystander");
        let index = device_index(host, &device);
        let session = Session::start(host, index);
        let value = 0x1122_3344_5566_7788_u64;
        let at = session.registers;
        session
            .client
            .pwrite(session.device, at, &value.to_ne_bytes())
            .unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let rounds = Arc::new(AtomicU64::new(0));
        let longest = Arc::new(AtomicU64::new(0));
        let shared = (Arc::clone(&stop), Arc::clone(&rounds), Arc::clone(&longest));
        let thread = std::thread::spawn(move || {
            let (stop, rounds, longest) = shared;
            while !stop.load(Ordering::SeqCst) {
                let begun = Instant::now();
                let got = session.client.pread(session.device, at, 8);
                assert_eq!(got, Ok(value.to_ne_bytes().to_vec()));
                let time = begun.elapsed().as_micros() as u64;
                longest.fetch_max(time, Ordering::SeqCst);
                rounds.fetch_add(1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        Bystander {
            stop,
            rounds,
            longest,
            thread: Some(thread),
            _seen: seen,
            _device: device,
        }
    }

    /// It still reads, now.
    pub fn goes_on(&self) {
        let before = self.rounds.load(Ordering::SeqCst);
        let begun = Instant::now();
        common::until("the other client's reads", || {
            self.rounds.load(Ordering::SeqCst) > before + 10
        });
        assert!(
            begun.elapsed() < Duration::from_secs(2),
            "another client had to wait: {:?}",
            begun.elapsed()
        );
    }

    /// Stops it; none of its reads took long.
    pub fn end(mut self) {
        self.goes_on();
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap();
        let longest = Duration::from_micros(self.longest.load(Ordering::SeqCst));
        // The machine may be busy; what must not be seen is a wait for somebody else's memory.
        assert!(longest < Duration::from_secs(1), "a read took {longest:?}");
    }
}

/// The index a device got.
pub fn device_index(host: &Host, device: &faux::Device) -> u32 {
    let name = device.bus_device().name().to_owned();
    host.core
        .devices()
        .iter()
        .find(|found| found.parent().name() == name)
        .map(|found| found.index())
        .expect("registered")
}

/// Descriptors of this process.
pub fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Threads of this process.
pub fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

/// Anonymous and shared memory of this process, in KiB.
pub fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB")?.parse().ok())
        .unwrap()
}

/// Waits until there are no more descriptors than that.
pub fn settles(what: &str, limit: usize, count: impl Fn() -> usize) {
    let end = Instant::now() + Duration::from_secs(10);
    while count() > limit {
        assert!(
            Instant::now() < end,
            "{what}: {} instead of {limit}: {:?}",
            count(),
            std::fs::read_dir("/proc/self/fd")
                .unwrap()
                .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
                .collect::<Vec<_>>()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A host in a test's own process, or a skip, said loudly.
pub fn host(test: &str) -> Option<Host> {
    Host::new(test, |_| {})
}
