//! Memory that never answers: as an ioctl's argument and as a DMA target. Whoever touches it
//! waits; the client gets its signal or the deadline, everybody else goes on, and the end of the
//! daemon does not wait for it.

use crate::client::Client;
use crate::common::{self, Host, until};
use crate::scene::{Bystander, Session, alone, settles, threads};
use crate::uapi::*;
use fuse_server::{
    Attr, Config, Connection, Entry, MountOptions, OpenFlags, Opened, Operation, Policy, Request,
    Workers,
};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_millis(400);

fn host(test: &str) -> Option<Host> {
    Host::new(test, |options| options.ioctl_deadline = DEADLINE)
}

/// Memory whose missing pages are asked of a userfaultfd that nobody reads.
pub fn userfault(c: &Client, len: u64) -> Option<u64> {
    let flags = libc::O_CLOEXEC as u64;
    let uffd = match c.sys(libc::SYS_userfaultfd, &[flags]) {
        Ok(uffd) => uffd,
        Err(errno) => {
            eprintln!("SKIPPED userfaultfd: not on this machine: {errno}");
            return None;
        }
    };
    let mut api = words(&[0xaa, 0, 0, 0, 0, 0]);
    c.ioctl(uffd, 0xc018_aa3f, &mut api).unwrap();
    let addr = c.memory(len);
    let mut register = Vec::new();
    for value in [addr, len, 1, 0] {
        register.extend(value.to_ne_bytes());
    }
    c.ioctl(uffd, 0xc020_aa00, &mut register).unwrap();
    Some(addr)
}

/// A file system with one file whose READs are never answered.
struct Abyss {
    path: std::path::PathBuf,
    mount: Option<fuse_server::Mount>,
    _workers: Workers,
    asked: Arc<Mutex<Asked>>,
}

/// READs that wait; with `ends` they are answered, since nothing ends that waits for them.
#[derive(Default)]
struct Asked {
    ends: bool,
    waiting: Vec<fuse_server::ReplyData>,
}

impl Abyss {
    fn new(host: &Host) -> Abyss {
        let path = host.dir.join("abyss");
        std::fs::create_dir_all(&path).unwrap();
        let (fd, detached) = MountOptions::default().create().unwrap();
        let config = Config {
            // Not even an interrupt is answered.
            interrupt_grace: Duration::from_secs(3600),
            ..Config::default()
        };
        let connection = Connection::new(fd, &config).unwrap();
        let asked: Arc<Mutex<Asked>> = Arc::default();
        let keep = Arc::clone(&asked);
        let handler = move |request: Request<'_>| {
            let file = || Attr::new(2, 0o100_666, 1 << 20);
            let _ = match request.op {
                Operation::Lookup { reply, .. } => reply.entry(&Entry {
                    node: 2,
                    generation: 0,
                    ttl: Duration::from_secs(60),
                    attr: file(),
                }),
                Operation::Getattr { reply, .. } if request.node == 1 => {
                    reply.attr(&Attr::new(1, 0o040_755, 0))
                }
                Operation::Getattr { reply, .. } => reply.attr(&file()),
                Operation::Open { reply, .. } => reply.opened(&Opened {
                    fh: 1,
                    flags: OpenFlags::NOFLUSH,
                    backing: None,
                }),
                Operation::Read { reply, .. } => {
                    let mut asked = keep.lock().unwrap();
                    if !asked.ends {
                        asked.waiting.push(reply);
                        return;
                    }
                    reply.error(rustix::io::Errno::IO)
                }
                Operation::Release { reply, .. } => reply.ok(),
                Operation::Forget(_) => return,
                other => other.error(rustix::io::Errno::NOSYS),
            };
        };
        let workers = Workers::start(connection, Arc::new(handler), Policy::default()).unwrap();
        let mount = detached.attach(&path).unwrap();
        Abyss {
            path,
            mount: Some(mount),
            _workers: workers,
            asked,
        }
    }

    /// Client memory that is this file's.
    fn memory(&self, c: &Client, flags: i32) -> u64 {
        let fd = c.open(&self.path.join("f")).unwrap();
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        c.mmap(1 << 20, prot, flags, Some(fd), 0).unwrap()
    }

    fn was_asked(&self) -> bool {
        !self.asked.lock().unwrap().waiting.is_empty()
    }
}

impl Drop for Abyss {
    /// Answers at last, so that nobody is left behind.
    fn drop(&mut self) {
        let waiting = {
            let mut asked = self.asked.lock().unwrap();
            asked.ends = true;
            std::mem::take(&mut asked.waiting)
        };
        for reply in waiting {
            let _ = reply.error(rustix::io::Errno::IO);
        }
        drop(self.mount.take());
    }
}

/// An ioctl whose argument never answers ends by the deadline, by a signal and by death.
fn as_argument(c: &Client, device: u64, arg: u64, beside: &Bystander) {
    let before = Instant::now();
    c.start_sys(libc::SYS_ioctl, &[device, GET_INFO.into(), arg, 0]);
    assert_eq!(c.finish(DEADLINE / 4), None, "it waits");
    beside.goes_on();
    let end = c.finish(Duration::from_secs(5)).expect("the deadline");
    assert_eq!(end, Err(libc::ETIMEDOUT));
    assert!(before.elapsed() >= DEADLINE);

    c.start_sys(libc::SYS_ioctl, &[device, GET_INFO.into(), arg + 4096, 0]);
    assert_eq!(c.finish(DEADLINE / 8), None, "it waits");
    c.signal(libc::SIGUSR1);
    let end = c.finish(DEADLINE).expect("the signal ends it");
    assert_eq!(end, Err(libc::EINTR));
    // The file and the device go on for this client too.
    let good = c.put(&words(&[16, 0, 0, 0]));
    assert_eq!(c.ioctl_at(device, GET_INFO, good), Ok(0));
}

#[test]
fn a_userfault_nobody_handles() {
    alone!("a_userfault_nobody_handles", || {
        let Some(host) = host("a_userfault_nobody_handles") else {
            return;
        };
        let (_one, _) = host.device("one");
        let beside = Bystander::start(&host);
        let quiet = threads();
        let s = Session::start(&host, 0);
        let Some(silent) = userfault(&s.client, 1 << 20) else {
            return;
        };
        as_argument(&s.client, s.device, silent, &beside);
        // BIND and the iommu node have the same protection.
        let c = &s.client;
        for (fd, cmd) in [(s.device, BIND), (s.iommufd, IOAS_ALLOC)] {
            let got = c.ioctl_at(fd, cmd, silent + 65536);
            assert_eq!(got, Err(libc::ETIMEDOUT), "{cmd:x}");
        }
        c.ioas(s.iommufd).unwrap();
        // As a DMA target: `/proc/PID/mem` faults without the permission to wait for a userfault
        // (`mm/memory.c`, `__access_remote_vm`), so this ends by itself.
        s.map_rw(silent + (1 << 19), 65536, 0x10_0000);
        let begun = Instant::now();
        assert_eq!(s.dma_read(0x10_0000), Err(libc::EFAULT));
        assert_eq!(s.dma_write(0x10_1000, 1), Err(libc::EFAULT));
        assert!(begun.elapsed() < DEADLINE);
        beside.goes_on();
        assert!(c.pread(s.device, s.registers, 8).is_ok());
        assert_eq!(s.unmap(0x10_0000, 65536), Ok(65536));
        // SIGKILL in the middle of it: gone at once, closed, and the next client binds.
        c.start_sys(
            libc::SYS_ioctl,
            &[s.device, GET_INFO.into(), silent + 8192, 0],
        );
        assert_eq!(c.finish(Duration::from_millis(50)), None, "it waits");
        s.client.kill();
        let dev = host.dev.as_ref().unwrap();
        until("closed", || dev.open_files() == (1, 1));
        let next = Session::start(&host, 0);
        assert!(next.client.pread(next.device, next.registers, 8).is_ok());
        next.client.kill();
        beside.end();
        // With its memory gone, nobody waits for it any more.
        settles("threads", quiet + 2, threads);
    });
}

#[test]
fn a_file_whose_server_never_answers() {
    alone!("a_file_whose_server_never_answers", || {
        let Some(host) = host("a_file_whose_server_never_answers") else {
            return;
        };
        let abyss = Abyss::new(&host);
        let (_one, _) = host.device("one");
        let beside = Bystander::start(&host);
        let s = Session::start(&host, 0);
        let c = &s.client;
        let fd = c.open(&abyss.path.join("f")).unwrap();
        let private = abyss.memory(c, libc::MAP_PRIVATE);
        let shared = abyss.memory(c, libc::MAP_SHARED);
        as_argument(c, s.device, private, &beside);
        assert!(abyss.was_asked());
        // As a DMA target, private and shared: a shared one must not be opened by us either.
        for (n, addr) in [private, shared].into_iter().enumerate() {
            let iova = 0x10_0000 * (n as u64 + 1);
            s.map_rw(addr + (1 << 19), 65536, iova);
            let at = s.registers + common::DMA_READ;
            let arg = c.put(&iova.to_ne_bytes());
            c.start_sys(libc::SYS_pwrite64, &[s.device, arg, 8, at]);
            assert_eq!(c.finish(Duration::from_millis(50)), None, "it waits");
            beside.goes_on();
            c.signal(libc::SIGUSR1);
            let end = c.finish(Duration::from_secs(5)).expect("a signal ends it");
            assert_eq!(end, Err(libc::EINTR));
        }
        // Unmapping what a stuck access holds does not wait for ever.
        let begun = Instant::now();
        let unmapped = s.unmap(0x10_0000, 65536);
        assert!(
            matches!(
                unmapped,
                Ok(65536) | Err(libc::EBUSY | libc::EDEADLK | libc::ETIMEDOUT)
            ),
            "{unmapped:?}"
        );
        assert!(begun.elapsed() < Duration::from_secs(5));
        // A descriptor of it where an iommufd or an eventfd is wanted: refused, not waited for.
        let begun = Instant::now();
        let second = c.open(&host.node(0)).unwrap();
        assert_eq!(c.bind(second, fd), Err(libc::EBADFD));
        let data = (fd as u32).to_ne_bytes();
        assert_eq!(
            c.irqs(s.device, EVENTFD | TRIGGER, 0, 0, 1, &data),
            Err(libc::EINVAL)
        );
        assert!(begun.elapsed() < DEADLINE);
        // SIGKILL while it waits.
        c.start_sys(
            libc::SYS_ioctl,
            &[s.device, GET_INFO.into(), private + 65536, 0],
        );
        assert_eq!(c.finish(Duration::from_millis(50)), None, "it waits");
        s.client.kill();
        let dev = host.dev.as_ref().unwrap();
        until("closed", || dev.open_files().1 == 1);
        beside.end();
        drop(abyss);
    });
}

#[test]
fn our_own_node_as_memory() {
    alone!("our_own_node_as_memory", || {
        let Some(host) = host("our_own_node_as_memory") else {
            return;
        };
        let (_one, _) = host.device("one");
        let (_two, _) = host.device("two");
        let beside = Bystander::start(&host);
        let s = Session::start(&host, 0);
        let c = &s.client;
        let other = c.open(&host.node(1)).unwrap();
        let iommu = c.open(&host.iommu()).unwrap();
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        for fd in [s.device, other, iommu] {
            let Ok(addr) = c.mmap(4096, prot, libc::MAP_PRIVATE, Some(fd), 1 << 40) else {
                continue;
            };
            // Past the end of the file: SIGBUS for the client, EFAULT for us, at once.
            let begun = Instant::now();
            assert_eq!(c.ioctl_at(s.device, GET_INFO, addr), Err(libc::EFAULT));
            assert_eq!(c.ioctl_at(s.iommufd, IOAS_ALLOC, addr), Err(libc::EFAULT));
            if let Ok(iova) = s.map(addr, 4096, 0x30_0000, MAP_RW) {
                assert_eq!(s.dma_read(iova), Err(libc::EFAULT));
                assert_eq!(s.dma_write(iova, 1), Err(libc::EFAULT));
                s.unmap(iova, 4096).unwrap();
            }
            assert!(begun.elapsed() < DEADLINE, "nobody was asked");
            c.munmap(addr, 4096);
        }
        // The mappable region, privately: where it maps at all, it is memory like other memory.
        let (_, _, offset) = c.region(s.device, 1).unwrap();
        for flags in [libc::MAP_PRIVATE, libc::MAP_SHARED] {
            if let Ok(addr) = c.mmap(4096, prot, flags, Some(s.device), offset) {
                let begun = Instant::now();
                let got = c.ioctl_at(s.device, GET_INFO, addr);
                assert!(
                    matches!(got, Err(libc::EINVAL | libc::EFAULT)),
                    "an argument of zeros, or none: {got:?}"
                );
                if let Ok(iova) = s.map(addr, 4096, 0x40_0000, MAP_RW) {
                    let got = s.dma_read(iova);
                    assert!(matches!(got, Ok(0) | Err(libc::EFAULT)), "{got:?}");
                    s.unmap(iova, 4096).unwrap();
                }
                assert!(begun.elapsed() < DEADLINE, "nobody was asked");
                c.munmap(addr, 4096);
            }
        }
        beside.end();
    });
}

/// The daemon ends while clients' memory does not answer.
#[test]
fn shutdown_does_not_wait() {
    alone!("shutdown_does_not_wait", || {
        let Some(mut host) = host("shutdown_does_not_wait") else {
            return;
        };
        let abyss = Abyss::new(&host);
        let (_one, _) = host.device("one");
        let (_two, _) = host.device("two");
        let a = Session::start(&host, 0);
        let b = Session::start(&host, 1);
        let deep = abyss.memory(&a.client, libc::MAP_PRIVATE);
        let args = [a.device, GET_INFO.into(), deep, 0];
        a.client.start_sys(libc::SYS_ioctl, &args);
        let fault = userfault(&b.client, 65536);
        if let Some(silent) = fault {
            b.map_rw(silent, 65536, 0);
            let at = b.registers + common::DMA_READ;
            let arg = b.client.put(&0_u64.to_ne_bytes());
            b.client
                .start_sys(libc::SYS_pwrite64, &[b.device, arg, 8, at]);
        }
        until("both wait", || abyss.was_asked());
        std::thread::sleep(Duration::from_millis(50));
        let begun = Instant::now();
        drop(host.dev.take());
        assert!(
            begun.elapsed() < Duration::from_secs(2),
            "it took {:?}",
            begun.elapsed()
        );
        // Nobody can open any more; those inside are not in state D for ever.
        assert!(Client::start().open(&host.node(0)).is_err());
        b.client.kill();
        a.client.kill();
        drop(abyss);
    });
}
