//! The least that could answer: reads a request from `/dev/fuse`, writes the reply, and does
//! nothing else. What it negotiated and the flags of its opens are those of our device nodes.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::mpsc::Receiver;
use std::sync::mpsc::Sender;
use std::time::Duration;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use fuse_server::Config;
use fuse_server::Connection;
use fuse_server::Features;
use fuse_server::Mount;
use fuse_server::MountOptions;
use fuse_server::OpenFlags;
use fuse_server::Root;
use nix::sys::uio;
use rustix::io::Errno;
use rustix::thread::CpuSet;
use vfio_uapi::container::DmaMap;
use vfio_uapi::container::DmaUnmap;
use vfio_uapi::ioctl;

use super::peer::Converse;
use super::peer::now;

const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const INTERRUPT: u32 = 36;
const IOCTL: u32 = 39;
const FORGET: u32 = 2;
const BATCH_FORGET: u32 = 42;

/// Bytes of `struct fuse_out_header`.
const OUT_HEADER: usize = 16;
/// What the argument of an ioctl has at most.
const ARGUMENT: usize = 32;
/// How often the server that follows looks where its client is.
const EVERY: u32 = 256;

/// Two mounts, each a file with a thread.
#[derive(Debug)]
pub(super) struct Server {
    _mounts: Vec<Mount>,
    closed: Receiver<u64>,
}

impl Server {
    pub(super) fn start(arguments: &[String], follows: bool) -> Result<Self> {
        let [directory] = arguments else {
            bail!("a directory is needed");
        };
        let (sender, closed) = std::sync::mpsc::channel();
        let mounts = ["null0", "null1"]
            .map(|name| mount(&Path::new(directory).join(name), follows, sender.clone()));
        Ok(Self {
            _mounts: mounts.into_iter().collect::<Result<_>>()?,
            closed,
        })
    }
}

impl Converse for Server {
    fn answer(&mut self, words: &[&str]) -> Result<String> {
        match words {
            ["closed"] => Ok(self
                .closed
                .recv_timeout(Duration::from_secs(10))
                .context("no RELEASE came")?
                .to_string()),
            _ => bail!("a null server cannot {words:?}"),
        }
    }
}

fn mount(path: &Path, follows: bool, closed: Sender<u64>) -> Result<Mount> {
    std::fs::write(path, "").with_context(|| format!("making {}", path.display()))?;
    let options = MountOptions {
        root: Root::File,
        ..MountOptions::default()
    };
    let (fd, mount) = options.create().context("making a FUSE mount")?;
    let config = Config::default();
    let config = Config {
        features: config.features - Features::DIRECT_IO_ALLOW_MMAP,
        ..config
    };
    let connection = Connection::new(fd, &config).context("negotiating")?;
    std::thread::spawn(move || {
        // It ends with the mount, or with the process.
        let _ = serve(&connection, follows, &closed);
    });
    Ok(mount.attach(path)?)
}

fn serve(connection: &Connection, follows: bool, closed: &Sender<u64>) -> Result<(), Errno> {
    let fd = connection.as_fd();
    let mut request = vec![0_u8; (1 << 20) + 4096];
    let mut reply = vec![0_u8; 1 << 17];
    let mut requests = 0_u32;
    loop {
        let length = match rustix::io::read(fd, &mut request[..]) {
            Ok(length) => length,
            Err(Errno::INTR | Errno::NOENT) => continue,
            Err(errno) => return Err(errno),
        };
        let request = &request[..length];
        let client = u32_at(request, 32);
        requests += 1;
        if follows && requests.is_multiple_of(EVERY) {
            follow(client);
        }
        reply[OUT_HEADER..OUT_HEADER + 104].fill(0);
        let body = &mut reply[OUT_HEADER..];
        let (error, length) = match u32_at(request, 4) {
            READ => (0, (u32_at(request, 56) as usize).min(body.len())),
            WRITE => {
                body[..4].copy_from_slice(&request[56..60]);
                (0, 8)
            }
            IOCTL => match copy_argument(client, u32_at(request, 52), u64_at(request, 56)) {
                Ok(()) => (0, 16),
                Err(errno) => (-errno.raw_os_error(), 0),
            },
            OPEN => {
                let flags =
                    OpenFlags::DIRECT_IO | OpenFlags::NOFLUSH | OpenFlags::PARALLEL_DIRECT_WRITES;
                body[8..12].copy_from_slice(&flags.bits().to_ne_bytes());
                (0, 16)
            }
            GETATTR => {
                // Of `struct fuse_attr`, what a regular file needs: number, mode, links.
                body[16..24].copy_from_slice(&1_u64.to_ne_bytes());
                body[76..80].copy_from_slice(&0o100_600_u32.to_ne_bytes());
                body[80..84].copy_from_slice(&1_u32.to_ne_bytes());
                (0, 104)
            }
            RELEASE => {
                let _ = closed.send(now());
                (0, 0)
            }
            FORGET | BATCH_FORGET | INTERRUPT => continue,
            _ => (-Errno::NOSYS.raw_os_error(), 0),
        };
        let total = OUT_HEADER + length;
        reply[..4].copy_from_slice(&u32::try_from(total).unwrap_or(0).to_ne_bytes());
        reply[4..8].copy_from_slice(&error.to_ne_bytes());
        reply[8..16].copy_from_slice(&request[8..16]);
        // Withdrawn requests cannot be answered.
        let _ = rustix::io::write(fd, &reply[..total]);
    }
}

/// Copies the argument in and out again, as a server must that looks at it.
fn copy_argument(client: u32, cmd: u32, address: u64) -> Result<(), Errno> {
    let (length, answers) = match cmd {
        ioctl::VFIO_IOMMU_MAP_DMA => (size_of::<DmaMap>(), false),
        ioctl::VFIO_IOMMU_UNMAP_DMA => (size_of::<DmaUnmap>(), true),
        _ => (ARGUMENT, true),
    };
    let pid = nix::unistd::Pid::from_raw(i32::try_from(client).map_err(|_| Errno::SRCH)?);
    let base = usize::try_from(address).map_err(|_| Errno::FAULT)?;
    let mut argument = [0; ARGUMENT];
    let argument = argument.get_mut(..length).ok_or(Errno::INVAL)?;
    let remote = [uio::RemoteIoVec { base, len: length }];
    let mut local = [std::io::IoSliceMut::new(argument)];
    uio::process_vm_readv(pid, &mut local, &remote).map_err(|_| Errno::FAULT)?;
    if answers {
        let local = [std::io::IoSlice::new(argument)];
        uio::process_vm_writev(pid, &local, &remote).map_err(|_| Errno::FAULT)?;
    }
    Ok(())
}

/// Goes to the CPU that a thread last ran on: field 39 of its `stat`.
fn follow(thread: u32) {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{thread}/stat")) else {
        return;
    };
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let cpu = fields.split_whitespace().nth(36);
    if let Some(cpu) = cpu.and_then(|cpu| cpu.parse().ok()) {
        let mut only = CpuSet::new();
        only.set(cpu);
        let _ = rustix::thread::sched_setaffinity(None, &only);
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |word| u32::from_ne_bytes(*word))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |word| u64::from_ne_bytes(*word))
}
