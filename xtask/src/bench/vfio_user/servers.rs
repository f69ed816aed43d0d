//! The servers that are compared: ours, the least that could answer, and the `vfio_user` crate's.

use std::fs::File;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use rust_vfio_user::DmaMapFlags;
use rust_vfio_user::DmaUnmapFlags;
use rustix::net::RecvAncillaryBuffer;
use rustix::net::RecvAncillaryMessage;
use rustix::net::RecvFlags;
use vfio_core::Config;
use vfio_core::Core;
use vfio_core::model::faux;
use vfio_uapi::device::IrqFlags;
use vfio_uapi::device::RegionFlags;
use vfio_user::Offer;
use vfio_user::OfferOptions;
use vfio_user::Options;
use vfio_user::Server;
use vfio_user::wire::DmaMap;
use vfio_user::wire::Header;
use vfio_user::wire::RegionAccess;
use vfio_user::wire::command;
use zerocopy::FromBytes as _;
use zerocopy::IntoBytes as _;

use super::super::card::Driver;
use super::super::card::INTERRUPT;
use super::super::card::Outside;
use super::super::card::TOUCH;
use super::super::card::TOUCHED;
use super::super::peer::Converse;
use super::super::peer::word;
use super::super::raw::Mapped;

/// The window of the messages that map one.
pub(super) const LARGE: u64 = 2 << 20;

/// Our server, with a device at each path.
#[derive(Debug)]
pub(crate) struct Ours {
    core: Core,
    server: Server,
    outside: Arc<Outside>,
    offers: Vec<(Offer, faux::Device)>,
}

impl Ours {
    pub(in super::super) fn start(arguments: &[String]) -> Result<Self> {
        let options = Options {
            // It may be bound to one processor, of several.
            pollers: 1,
            ..Options::default()
        };
        let (outside, _) = Outside::new();
        let mut ours = Self {
            core: Core::new(Config::default()),
            server: Server::start(options)?,
            outside,
            offers: Vec::new(),
        };
        for path in arguments {
            ours.offer(path, OfferOptions::default())?;
        }
        Ok(ours)
    }

    fn offer(&mut self, path: &str, options: OfferOptions) -> Result<()> {
        let listener = UnixListener::bind(path).with_context(|| format!("socket {path}"))?;
        let name = format!("card{}", self.offers.len());
        let device = faux::Device::create(&self.core, &name, Driver(Arc::clone(&self.outside)))?;
        let bus_device = self.core.devices().pop().context("no device was made")?;
        let offer = self.server.offer(&bus_device, listener, options)?;
        self.offers.push((offer, device));
        Ok(())
    }

    /// Nobody is connected, and nothing runs.
    fn is_idle(&self) -> bool {
        let mut offers = self.offers.iter();
        self.server.polled() == 0 && offers.all(|(offer, _)| offer.client().is_none())
    }
}

impl Converse for Ours {
    fn answer(&mut self, words: &[&str]) -> Result<String> {
        match *words {
            // Bytes of memory of this process, that of its tables in the kernel not counted.
            ["memory"] => field("VmRSS:").map(|kib| (kib * 1024).to_string()),
            ["threads"] => field("Threads:").map(|number| number.to_string()),
            ["listen", directory, ..] => {
                raise_files(word(words, 3)?)?;
                let from: u32 = word(words, 2)?;
                let count: u32 = word(words, 3)?;
                for device in from..from.max(count) {
                    let path = format!("{directory}/{device}");
                    self.offer(&path, OfferOptions::default())?;
                }
                Ok(String::new())
            }
            ["polled", path] => {
                let options = OfferOptions {
                    poll: true,
                    ..OfferOptions::default()
                };
                self.offer(path, options)?;
                Ok(String::new())
            }
            ["idle"] => {
                let end = Instant::now() + Duration::from_secs(10);
                while !self.is_idle() {
                    ensure!(Instant::now() < end, "somebody is still connected");
                    std::thread::sleep(Duration::from_millis(1));
                }
                Ok(String::new())
            }
            _ => bail!("our server cannot {words:?}"),
        }
    }
}

/// A number of `/proc/self/status`.
fn field(name: &str) -> Result<u64> {
    let text = std::fs::read_to_string("/proc/self/status")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.context("no such line")?.parse()?)
}

/// Room for so many descriptors more than usual.
fn raise_files(more: u64) -> Result<()> {
    use rustix::process::Resource;
    use rustix::process::Rlimit;
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let wanted = more + 1024;
    if limit.current.is_some_and(|now| now < wanted) {
        let raised = Rlimit {
            current: Some(wanted),
            maximum: limit.maximum.map(|now| now.max(wanted)),
        };
        rustix::process::setrlimit(Resource::Nofile, raised)
            .with_context(|| format!("{wanted} descriptors for one process"))?;
    }
    Ok(())
}

/// A thread that serves one connection after the other, until the process ends.
#[derive(Debug)]
struct Serving;

impl Converse for Serving {
    fn answer(&mut self, words: &[&str]) -> Result<String> {
        bail!("this server cannot {words:?}")
    }
}

/// What a window means to the other servers.
#[derive(Debug, Default)]
struct Window {
    kept: Kept,
    memory: Option<Memory>,
    iova: u64,
}

/// What is kept of the file behind a window.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
enum Kept {
    #[default]
    Nothing,
    /// Itself, to read from it.
    File,
    Mapping,
}

#[derive(Debug)]
enum Memory {
    File(OwnedFd),
    Mapping(Mapped),
}

impl Window {
    fn of(arguments: &[String]) -> Result<(UnixListener, Self)> {
        let [path, kept] = arguments else {
            bail!("a path and `nothing`, `file` or `mapping` are needed");
        };
        let listener = UnixListener::bind(path).with_context(|| format!("socket {path}"))?;
        let window = Self {
            kept: match kept.as_str() {
                "file" => Kept::File,
                "mapping" => Kept::Mapping,
                _ => Kept::Nothing,
            },
            ..Self::default()
        };
        Ok((listener, window))
    }

    fn map(&mut self, iova: u64, size: u64, fd: Option<impl Into<OwnedFd>>) -> Result<()> {
        let Some(fd) = fd.filter(|_| self.kept != Kept::Nothing) else {
            return Ok(());
        };
        self.iova = iova;
        self.memory = Some(match self.kept {
            Kept::Mapping => Memory::Mapping(Mapped::untouched(fd.into(), usize::try_from(size)?)?),
            _ => Memory::File(fd.into()),
        });
        Ok(())
    }

    fn unmap(&mut self) {
        self.memory = None;
    }

    fn touch(&self, data: &[u8]) -> Result<()> {
        let iova = u64::from_ne_bytes(*data.first_chunk().context("no address")?);
        let offset = iova - self.iova;
        let mut buf = [0; TOUCHED];
        match self.memory.as_ref().context("no window")? {
            Memory::Mapping(mapped) => mapped.copy_to(usize::try_from(offset)?, &mut buf),
            Memory::File(file) => {
                let got = rustix::io::pread(file, &mut buf, offset)?;
                ensure!(got == TOUCHED, "a short file");
            }
        }
        std::hint::black_box(&buf);
        Ok(())
    }
}

/// The least that could answer: one receive, one send, and a look at the command.
#[derive(Debug)]
pub(crate) struct Raw;

impl Raw {
    pub(in super::super) fn start(arguments: &[String]) -> Result<impl Converse> {
        let (listener, window) = Window::of(arguments)?;
        std::thread::spawn(move || {
            let mut window = window;
            for socket in listener.incoming().flatten() {
                if let Err(error) = raw(&socket, &mut window) {
                    eprintln!("raw server: {error:#}");
                }
            }
        });
        Ok(Serving)
    }
}

fn raw(socket: &UnixStream, window: &mut Window) -> Result<()> {
    let mut message = vec![0; 16 << 10];
    let mut reply = vec![0; 16 << 10];
    let mut interrupt: Option<OwnedFd> = None;
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let got = rustix::net::recvmsg(
            socket,
            &mut [IoSliceMut::new(&mut message)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )?
        .bytes;
        if got == 0 {
            return Ok(());
        }
        let fd = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let (header, payload) = Header::read_from_prefix(message.get(..got).unwrap_or_default())
            .map_err(|_| anyhow::anyhow!("half a header"))?;
        let answer = match header.command {
            command::REGION_READ => {
                let (access, _) = RegionAccess::read_from_prefix(payload)
                    .map_err(|_| anyhow::anyhow!("half a message"))?;
                16 + access.count as usize
            }
            command::REGION_WRITE => {
                let (access, data) = RegionAccess::read_from_prefix(payload)
                    .map_err(|_| anyhow::anyhow!("half a message"))?;
                match access.offset {
                    INTERRUPT => {
                        let fd = interrupt.as_ref().context("no eventfd")?;
                        rustix::io::write(fd, &1u64.to_ne_bytes())?;
                    }
                    TOUCH => window.touch(data)?,
                    _ => {}
                }
                16
            }
            command::DMA_MAP => {
                let (map, _) = DmaMap::read_from_prefix(payload)
                    .map_err(|_| anyhow::anyhow!("half a message"))?;
                window.map(map.address, map.size, fd)?;
                0
            }
            command::DMA_UNMAP => {
                window.unmap();
                24
            }
            command::DEVICE_SET_IRQS => {
                interrupt = fd;
                0
            }
            _ => payload.len(),
        };
        let out = reply.get_mut(..16 + answer).context("a long answer")?;
        out.get_mut(..16)
            .context("a header")?
            .copy_from_slice(header.reply(answer).as_bytes());
        rustix::io::write(socket, out)?;
    }
}

/// The server of the `vfio_user` crate.
#[derive(Debug)]
pub(crate) struct Crate;

impl Crate {
    pub(in super::super) fn start(arguments: &[String]) -> Result<impl Converse> {
        let (listener, window) = Window::of(arguments)?;
        let irqs = vec![rust_vfio_user::IrqInfo {
            index: 0,
            flags: IrqFlags::EVENTFD.bits(),
            count: 1,
        }];
        let region = rust_vfio_user::ServerRegion {
            region_info: vfio_bindings::bindings::vfio::vfio_region_info {
                argsz: 32,
                flags: (RegionFlags::READ | RegionFlags::WRITE).bits(),
                size: 4096,
                ..Default::default()
            },
            sparse_areas: Vec::new(),
            mmap_fd: None,
        };
        let listener = OwnedFd::from(listener);
        let server = rust_vfio_user::Server::from_owned_fd(listener, true, irqs, vec![region]);
        std::thread::spawn(move || {
            let mut backend = Backend(window);
            if let Err(error) = server.run(&mut backend) {
                eprintln!("the crate's server: {error}");
            }
        });
        Ok(Serving)
    }
}

/// What the crate's server serves.
struct Backend(Window);

fn other(error: anyhow::Error) -> std::io::Error {
    std::io::Error::other(error)
}

impl rust_vfio_user::ServerBackend for Backend {
    fn region_read(&mut self, _: u32, _: u64, data: &mut [u8]) -> std::io::Result<()> {
        data.fill(0);
        Ok(())
    }

    fn region_write(&mut self, _: u32, offset: u64, data: &[u8]) -> std::io::Result<()> {
        if offset == TOUCH {
            self.0.touch(data).map_err(other)?;
        }
        Ok(())
    }

    fn dma_map(
        &mut self,
        _flags: DmaMapFlags,
        _offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> std::io::Result<()> {
        self.0.map(address, size, fd).map_err(other)
    }

    fn dma_unmap(&mut self, _: DmaUnmapFlags, _: u64, _: u64) -> std::io::Result<()> {
        self.0.unmap();
        Ok(())
    }

    fn reset(&mut self) -> std::io::Result<()> {
        Ok(())
    }

    fn set_irqs(
        &mut self,
        _index: u32,
        _flags: u32,
        _start: u32,
        _count: u32,
        _fds: Vec<File>,
    ) -> std::io::Result<()> {
        Ok(())
    }
}
