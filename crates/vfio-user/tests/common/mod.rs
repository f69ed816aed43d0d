//! A device to offer, a place for its socket, and raw messages.
#![allow(
    dead_code,
    unreachable_pub,
    missing_debug_implementations,
    clippy::allow_attributes,
    reason = "shared by test programs, each of which uses its part"
)]

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vfio_core::device::{
    Device, DeviceInfo, DeviceOps, Dma, Form, GroupType, InitCx, IrqInfo, Migratable, OpenCx,
    RegionCap, RegionInfo, RegionMemory, RegionPos, RequestChannel, StepError,
};
use vfio_core::irq::SetIrqs;
use vfio_core::irq::pci::{Counts, PciIrqs};
use vfio_core::model::{BusDevice, VfioDriver, faux};
use vfio_core::{Config, Core, Errno, Result};
use vfio_uapi::device::{InfoFlags, IrqFlags, RegionFlags};
use vfio_user::client::Client;
use vfio_user::wire::{HEADER, Header};
use vfio_user::{Offer, OfferOptions, Options, Server};
use zerocopy::{FromBytes, IntoBytes};

/// Longer than anything here takes.
pub const SOON: Duration = Duration::from_secs(30);

/// Region 0: 4 KiB that hold what is written, with doorbells. Writing an IOVA (8 bytes) at `DMA_READ`
/// copies 8 bytes from there to `VALUE`, at `DMA_WRITE` the other way; at `LATER_READ` and
/// `LATER_WRITE` a thread of the driver does it, and adds one to `DONE` (or puts an errno into
/// `FAILED`). `FIRE` raises INTx or MSI vector 0, `ERROR` raises ERR, `PANIC` panics, `STUCK` waits
/// until the test opens the gate.
pub const REGISTERS: u64 = 4096;
pub const VALUE: u64 = 0;
pub const DMA_READ: u64 = 8;
pub const DMA_WRITE: u64 = 16;
pub const FIRE: u64 = 24;
pub const LATER_READ: u64 = 32;
pub const LATER_WRITE: u64 = 40;
pub const DONE: u64 = 48;
pub const FAILED: u64 = 56;
pub const ERROR: u64 = 64;
pub const PANIC: u64 = 72;
pub const STUCK: u64 = 80;
/// A thread of the driver reads 2 KiB from there to the upper half of the registers.
pub const LATER_BULK: u64 = 88;
/// A thread of the driver writes 1 MiB there, more than a socket holds.
pub const LATER_FLOOD: u64 = 96;
/// Region 1 can be mapped, region 2 in two areas, region 3 in one. Region 7 is 255 bytes long.
pub const MAPPED: u64 = 8192;

#[derive(Debug, Default)]
pub struct Seen {
    pub released: AtomicU32,
    pub opened: AtomicU32,
    pub closed: AtomicU32,
    pub unmapped: Mutex<Vec<(u64, u64)>>,
    pub requests: AtomicU32,
    /// Held by a test to keep `STUCK` waiting.
    pub gate: Mutex<()>,
    pub stuck: AtomicU32,
    pub stopped: AtomicU32,
    /// What came of `LATER_FLOOD`.
    pub flooded: Mutex<Option<Result>>,
}

#[derive(Debug)]
pub struct Probe(pub Arc<Seen>);

pub struct Session {
    registers: Arc<Mutex<Vec<u8>>>,
    mapped: RegionMemory,
    dma: Dma,
    irqs: PciIrqs,
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.0.released.fetch_add(1, Ordering::SeqCst);
    }
}

fn span(offset: u64, len: usize, size: u64) -> Result<std::ops::Range<usize>> {
    let end = offset.checked_add(len as u64).ok_or(Errno::INVAL)?;
    if end > size {
        return Err(Errno::INVAL);
    }
    Ok(offset as usize..end as usize)
}

fn transfer(dma: &Dma, registers: &Mutex<Vec<u8>>, iova: u64, is_read: bool) -> Result {
    let mut value = [0; 8];
    if is_read {
        dma.read(iova, &mut value)?;
        registers.lock().unwrap()[..8].copy_from_slice(&value);
    } else {
        value.copy_from_slice(&registers.lock().unwrap()[..8]);
        dma.write(iova, &value)?;
    }
    Ok(())
}

impl Session {
    fn later(&self, iova: u64, is_read: bool) {
        let dma = self.dma.clone();
        let registers = Arc::clone(&self.registers);
        std::thread::spawn(move || {
            let done = transfer(&dma, &registers, iova, is_read);
            let mut registers = registers.lock().unwrap();
            match done {
                Ok(()) => registers[DONE as usize] += 1,
                Err(errno) => {
                    registers[FAILED as usize..][..4]
                        .copy_from_slice(&errno.raw_os_error().to_ne_bytes());
                }
            }
        });
    }
}

impl DeviceOps for Probe {
    const NAME: &'static str = "probe";
    type Args = Arc<Seen>;
    type Session = Session;

    fn init(_cx: &InitCx<'_>, seen: Arc<Seen>) -> Result<Self> {
        Ok(Probe(seen))
    }

    fn open(&self, cx: &OpenCx<'_>) -> Result<Session> {
        self.0.opened.fetch_add(1, Ordering::SeqCst);
        Ok(Session {
            registers: Arc::new(Mutex::new(vec![0; REGISTERS as usize])),
            mapped: cx.memory(1).ok_or(Errno::NXIO)?,
            dma: cx.dma().clone(),
            irqs: PciIrqs::new(Counts {
                intx: true,
                msi: 1,
                msix: 2048,
            }),
        })
    }

    fn close(&self, _session: Session) {
        self.0.closed.fetch_add(1, Ordering::SeqCst);
    }

    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            flags: InfoFlags::PCI | InfoFlags::RESET,
            num_regions: 9,
            num_irqs: 5,
        }
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        let rw = RegionFlags::READ | RegionFlags::WRITE;
        let region = |size, flags, caps| RegionInfo { size, flags, caps };
        Ok(match index {
            0 => region(REGISTERS, rw, Vec::new()),
            1 => region(MAPPED, rw | RegionFlags::MMAP, Vec::new()),
            2 => {
                let areas = vec![(0, 4096), (8192, 4096)];
                let caps = vec![RegionCap::SparseMmap(areas)];
                region(3 * 4096, rw | RegionFlags::MMAP, caps)
            }
            3 => {
                let caps = vec![RegionCap::SparseMmap(vec![(4096, 4096)])];
                region(MAPPED, RegionFlags::READ | RegionFlags::MMAP, caps)
            }
            7 => region(255, rw, Vec::new()),
            _ => RegionInfo::default(),
        })
    }

    fn irq(&self, index: u32) -> Result<IrqInfo> {
        let count = match index {
            2 => 2048,
            _ => 1,
        };
        Ok(IrqInfo {
            flags: IrqFlags::EVENTFD,
            count,
        })
    }

    fn read(&self, session: &Session, at: RegionPos, buf: &mut [u8]) -> Result<usize> {
        match at.index {
            0 => {
                let span = span(at.offset, buf.len(), REGISTERS)?;
                buf.copy_from_slice(&session.registers.lock().unwrap()[span]);
            }
            1 => session.mapped.read(at.offset, buf)?,
            7 => {
                let left = 255u64.saturating_sub(at.offset);
                let count = buf.len().min(left as usize);
                for (n, byte) in buf[..count].iter_mut().enumerate() {
                    *byte = (at.offset as usize + n) as u8;
                }
                return Ok(count);
            }
            _ => return Err(Errno::INVAL),
        }
        Ok(buf.len())
    }

    fn write(&self, session: &Session, at: RegionPos, data: &[u8]) -> Result<usize> {
        let iova = || -> Result<u64> {
            let bytes = data.try_into().map_err(|_| Errno::INVAL)?;
            Ok(u64::from_ne_bytes(bytes))
        };
        match (at.index, at.offset) {
            (0, DMA_READ) => transfer(&session.dma, &session.registers, iova()?, true)?,
            (0, DMA_WRITE) => transfer(&session.dma, &session.registers, iova()?, false)?,
            (0, LATER_READ) => session.later(iova()?, true),
            (0, LATER_WRITE) => session.later(iova()?, false),
            (0, LATER_BULK) => {
                let (dma, iova) = (session.dma.clone(), iova()?);
                let registers = Arc::clone(&session.registers);
                std::thread::spawn(move || {
                    let mut bulk = vec![0; 2048];
                    let done = dma.read(iova, &mut bulk);
                    let mut registers = registers.lock().unwrap();
                    registers[2048..].copy_from_slice(&bulk);
                    registers[DONE as usize] += u8::from(done.is_ok());
                });
            }
            (0, LATER_FLOOD) => {
                let (dma, iova) = (session.dma.clone(), iova()?);
                let seen = Arc::clone(&self.0);
                std::thread::spawn(move || {
                    let done = dma.write(iova, &vec![0; 1 << 20]);
                    *seen.flooded.lock().unwrap() = Some(done);
                });
            }
            (0, FIRE) => {
                if session.irqs.uses_messages() {
                    session.irqs.fire(u32::from(data[0]));
                } else {
                    session.irqs.set_level(true);
                    session.irqs.set_level(false);
                }
            }
            (0, ERROR) => session.irqs.error(),
            (0, PANIC) => panic!("the test asked for it"),
            (0, STUCK) => {
                self.0.stuck.fetch_add(1, Ordering::SeqCst);
                drop(self.0.gate.lock().unwrap());
            }
            (0, offset) => {
                let span = span(offset, data.len(), REGISTERS)?;
                session.registers.lock().unwrap()[span].copy_from_slice(data);
            }
            (1, offset) => session.mapped.write(offset, data)?,
            _ => return Err(Errno::INVAL),
        }
        Ok(data.len())
    }

    fn set_irqs(&self, session: &Session, request: SetIrqs<'_>) -> Result<u32> {
        session.irqs.set(request)
    }

    fn reset(&self, session: &Session) -> Result {
        session.registers.lock().unwrap().fill(0);
        Ok(())
    }

    fn request(&self, session: Option<&Session>, _count: u32) -> RequestChannel {
        self.0.requests.fetch_add(1, Ordering::SeqCst);
        session.map_or(RequestChannel::None, |session| session.irqs.request())
    }

    fn migratable(&self) -> Option<&dyn Migratable<Session>> {
        Some(self)
    }

    fn dma_unmap(&self, _session: &Session, iova: u64, len: u64) {
        self.0.unmapped.lock().unwrap().push((iova, len));
    }
}

/// Its state is what its registers hold.
impl Migratable<Session> for Probe {
    fn form(&self) -> Form {
        Form {
            kind: "probe".into(),
            version: 1,
            oldest: 1,
            max_len: REGISTERS as usize,
            p2p: false,
            pre_copy: true,
        }
    }

    fn stop(&self, _session: &Session) -> Result<(), StepError> {
        self.0.stopped.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn resume(&self, _session: &Session) -> Result<(), StepError> {
        Ok(())
    }

    fn save(&self, session: &Session) -> Result<Vec<u8>, StepError> {
        Ok(session.registers.lock().unwrap().clone())
    }

    fn restore(&self, session: &Session, _version: u32, state: &[u8]) -> Result<(), StepError> {
        if state.len() != REGISTERS as usize {
            return Err(Errno::INVAL.into());
        }
        session.registers.lock().unwrap().copy_from_slice(state);
        Ok(())
    }
}

/// Makes [`Probe`]s.
#[derive(Debug)]
pub struct Driver(pub Arc<Seen>);

impl VfioDriver for Driver {
    type Ops = Probe;

    fn name(&self) -> &'static str {
        "probe"
    }

    fn group_type(&self) -> GroupType {
        GroupType::Emulated
    }

    fn args(&self, _device: &Arc<BusDevice>) -> Result<Arc<Seen>> {
        Ok(Arc::clone(&self.0))
    }
}

/// A server with one probe offered on a socket.
pub struct Host {
    pub core: Core,
    pub server: Server,
    pub offer: Option<Offer>,
    pub faux: Option<faux::Device>,
    pub seen: Arc<Seen>,
    pub dir: TempDir,
}

impl Host {
    pub fn new() -> Host {
        Host::with(Options::default(), OfferOptions::default())
    }

    pub fn with(options: Options, offer: OfferOptions) -> Host {
        let core = Core::new(Config {
            request_interval: Duration::from_millis(10),
            ..Config::default()
        });
        let seen = Arc::new(Seen::default());
        let faux = faux::Device::create(&core, "one", Driver(Arc::clone(&seen))).unwrap();
        let server = Server::start(options).unwrap();
        let dir = TempDir::new().unwrap();
        let listener = UnixListener::bind(dir.path().join("sock")).unwrap();
        let offer = server
            .offer(&core.device(0).unwrap(), listener, offer)
            .unwrap();
        Host {
            core,
            server,
            offer: Some(offer),
            faux: Some(faux),
            seen,
            dir,
        }
    }

    pub fn device(&self) -> Device {
        self.core.device(0).unwrap()
    }

    pub fn offer(&self) -> &Offer {
        self.offer.as_ref().unwrap()
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("sock")
    }

    pub fn connect(&self) -> Client {
        Client::connect(self.path()).unwrap()
    }

    pub fn raw(&self) -> Raw {
        Raw::new(UnixStream::connect(self.path()).unwrap())
    }

    /// Waits until nobody has the device, and it is closed.
    pub fn until_free(&self) {
        until("the device is closed", || {
            !self.device().is_open() && self.offer().client().is_none()
        });
    }
}

pub fn until(what: &str, f: impl Fn() -> bool) {
    let end = Instant::now() + SOON;
    while !f() {
        assert!(Instant::now() < end, "{what}: it did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A socket on which anything can be said.
pub struct Raw {
    pub socket: UnixStream,
}

impl Raw {
    pub fn new(socket: UnixStream) -> Raw {
        socket.set_read_timeout(Some(SOON)).unwrap();
        Raw { socket }
    }

    pub fn message(id: u16, command: u16, flags: u32, payload: &[u8]) -> Vec<u8> {
        let header = Header {
            id,
            command,
            size: (HEADER + payload.len()) as u32,
            flags,
            error: 0,
        };
        [header.as_bytes(), payload].concat()
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    pub fn send_fds(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
        let mut space = vec![std::mem::MaybeUninit::uninit(); 2048];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        let iov = [std::io::IoSlice::new(bytes)];
        let sent = sendmsg(&self.socket, &iov, &mut ancillary, SendFlags::empty()).unwrap();
        assert_eq!(sent, bytes.len());
    }

    pub fn receive(&mut self) -> (Header, Vec<u8>) {
        let mut header = [0; HEADER];
        self.socket.read_exact(&mut header).unwrap();
        let header = Header::read_from_bytes(&header).unwrap();
        let mut payload = vec![0; header.size as usize - HEADER];
        self.socket.read_exact(&mut payload).unwrap();
        (header, payload)
    }

    /// Sends a command and takes its reply.
    pub fn ask(&mut self, command: u16, payload: &[u8]) -> (Header, Vec<u8>) {
        self.send(&Raw::message(77, command, 0, payload));
        let (header, payload) = self.receive();
        assert_eq!((header.id, header.command), (77, command));
        (header, payload)
    }

    /// Sends a command; the errno of its reply, which must be bare.
    pub fn errno(&mut self, command: u16, payload: &[u8]) -> Option<Errno> {
        let (header, payload) = self.ask(command, payload);
        let errno = header.errno();
        assert!(errno.is_none() || payload.is_empty(), "not bare");
        errno
    }

    /// VERSION with this text.
    pub fn hello(&mut self, minor: u16, json: Option<&str>) -> (Header, Vec<u8>) {
        let mut payload = vec![0, 0];
        payload.extend(minor.to_ne_bytes());
        if let Some(json) = json {
            payload.extend(json.as_bytes());
            payload.push(0);
        }
        self.ask(1, &payload)
    }

    /// True once the server has closed its end.
    pub fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.socket.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

pub fn memfd(size: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, size).unwrap();
    fd
}

pub fn put(fd: impl AsFd, offset: u64, bytes: &[u8]) {
    assert_eq!(rustix::io::pwrite(fd, bytes, offset), Ok(bytes.len()));
}

pub fn get(fd: impl AsFd, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    assert_eq!(rustix::io::pread(fd, &mut bytes, offset), Ok(len));
    bytes
}

pub fn eventfd() -> OwnedFd {
    let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
    rustix::event::eventfd(0, flags).unwrap()
}

/// How often it was signalled; 0 if not.
pub fn count(eventfd: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    match rustix::io::read(eventfd, &mut bytes) {
        Ok(_) => u64::from_ne_bytes(bytes),
        Err(_) => 0,
    }
}

/// Open descriptors of this process.
pub fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
