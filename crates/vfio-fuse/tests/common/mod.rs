//! A device to open, and a place to mount it.
#![allow(
    dead_code,
    unreachable_pub,
    missing_debug_implementations,
    clippy::allow_attributes,
    reason = "shared by test programs, each of which uses its part"
)]

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vfio_core::device::{
    DeviceInfo, DeviceOps, Dma, GroupType, InitCx, IrqInfo, OpenCx, RegionInfo, RegionMemory,
    RegionPos, RequestChannel,
};
use vfio_core::irq::SetIrqs;
use vfio_core::irq::pci::{Counts, PciIrqs};
use vfio_core::model::{BusDevice, VfioDriver, faux};
use vfio_core::{Config, Core, Errno, Result};
use vfio_fuse::{Dev, Options};
use vfio_uapi::device::{InfoFlags, IrqFlags, RegionFlags};

/// Registers: 64 bytes that hold what is written, and a doorbell. Writing an IOVA (8 bytes) at
/// `DMA_READ` copies 8 bytes from there to `VALUE`, at `DMA_WRITE` the other way, at `FIRE` raises
/// INTx. Region 1 can be mapped.
pub const REGISTERS: u64 = 64;
pub const MAPPED: u64 = 8192;
pub const VALUE: u64 = 0;
pub const DMA_READ: u64 = 8;
pub const DMA_WRITE: u64 = 16;
pub const FIRE: u64 = 24;

#[derive(Debug, Default)]
pub struct Seen {
    pub released: AtomicU32,
    pub opened: AtomicU32,
    pub closed: AtomicU32,
}

#[derive(Debug)]
pub struct Probe(pub Arc<Seen>);

pub struct Session {
    registers: Mutex<[u8; REGISTERS as usize]>,
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
            registers: Mutex::new([0; REGISTERS as usize]),
            mapped: cx.memory(1).ok_or(Errno::NXIO)?,
            dma: cx.dma().clone(),
            irqs: PciIrqs::new(Counts {
                intx: true,
                msi: 1,
                msix: 0,
            }),
        })
    }

    fn close(&self, _session: Session) {
        self.0.closed.fetch_add(1, Ordering::SeqCst);
    }

    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            flags: InfoFlags::PCI,
            num_regions: 3,
            num_irqs: 5,
        }
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        let rw = RegionFlags::READ | RegionFlags::WRITE;
        Ok(match index {
            0 => RegionInfo {
                size: REGISTERS,
                flags: rw,
                caps: Vec::new(),
            },
            1 => RegionInfo {
                size: MAPPED,
                flags: rw | RegionFlags::MMAP,
                caps: Vec::new(),
            },
            _ => RegionInfo::default(),
        })
    }

    fn irq(&self, index: u32) -> Result<IrqInfo> {
        let count = u32::from(index != 2);
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
            _ => return Err(Errno::INVAL),
        }
        Ok(buf.len())
    }

    fn write(&self, session: &Session, at: RegionPos, data: &[u8]) -> Result<usize> {
        match (at.index, at.offset) {
            (0, DMA_READ | DMA_WRITE) if data.len() == 8 => {
                let iova = u64::from_ne_bytes(data.try_into().map_err(|_| Errno::INVAL)?);
                let mut value = [0; 8];
                if at.offset == DMA_READ {
                    session.dma.read(iova, &mut value)?;
                    session.registers.lock().unwrap()[..8].copy_from_slice(&value);
                } else {
                    value.copy_from_slice(&session.registers.lock().unwrap()[..8]);
                    session.dma.write(iova, &value)?;
                }
            }
            (0, FIRE) => {
                session.irqs.set_level(true);
                session.irqs.set_level(false);
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
        session.map_or(RequestChannel::None, |session| session.irqs.request())
    }
}

/// Makes [`Probe`]s.
#[derive(Debug)]
pub struct Driver {
    pub seen: Arc<Seen>,
    pub kind: GroupType,
}

impl VfioDriver for Driver {
    type Ops = Probe;

    fn name(&self) -> &'static str {
        "probe"
    }

    fn group_type(&self) -> GroupType {
        self.kind
    }

    fn args(&self, _device: &Arc<BusDevice>) -> Result<Arc<Seen>> {
        Ok(Arc::clone(&self.seen))
    }
}

/// A core with its `dev` tree mounted in a directory of its own.
#[derive(Debug)]
pub struct Host {
    pub core: Core,
    pub dev: Option<Dev>,
    pub dir: PathBuf,
}

impl Host {
    /// `None`, said loudly, where FUSE cannot be mounted.
    pub fn new(test: &str, change: impl FnOnce(&mut Options)) -> Option<Host> {
        Host::with(test, Config::default(), change)
    }

    pub fn with(test: &str, config: Config, change: impl FnOnce(&mut Options)) -> Option<Host> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("vfio-fuse-{}-{n}", std::process::id()));
        let core = Core::new(Config {
            request_interval: Duration::from_millis(10),
            ..config
        });
        let mut options = Options::under(&dir);
        change(&mut options);
        match Dev::start(&core, &options) {
            Ok(dev) => Some(Host {
                core,
                dev: Some(dev),
                dir,
            }),
            Err(errno) => {
                assert!(std::env::var_os("CI").is_none(), "no FUSE in CI: {errno}");
                vfiod_tests::skip(&format!("{test}: FUSE cannot be mounted here: {errno}"));
                None
            }
        }
    }

    pub fn device(&self, name: &str) -> (faux::Device, Arc<Seen>) {
        let seen = Arc::new(Seen::default());
        let driver = Driver {
            seen: Arc::clone(&seen),
            kind: GroupType::Emulated,
        };
        (
            faux::Device::create(&self.core, name, driver).unwrap(),
            seen,
        )
    }

    pub fn node(&self, index: u32) -> PathBuf {
        self.dir.join(format!("dev/vfio/devices/vfio{index}"))
    }

    pub fn group(&self, number: u32) -> PathBuf {
        self.dir.join(format!("dev/vfio/{number}"))
    }

    pub fn container(&self) -> PathBuf {
        self.dir.join("dev/vfio/vfio")
    }

    pub fn iommu(&self) -> PathBuf {
        self.dir.join("dev/iommu")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.dev.take());
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Waits for a condition, for at most ten seconds.
pub fn until(what: &str, f: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !f() {
        assert!(Instant::now() < end, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}
