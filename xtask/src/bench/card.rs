//! The device of our servers: a register, an interrupt and a way to memory.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::sync::mpsc::Sender;

use rustix::io::Errno;
use vfio_core::device::DeviceInfo;
use vfio_core::device::DeviceOps;
use vfio_core::device::Dma;
use vfio_core::device::InitCx;
use vfio_core::device::IrqInfo;
use vfio_core::device::OpenCx;
use vfio_core::device::RegionInfo;
use vfio_core::device::RegionPos;
use vfio_core::irq::Data;
use vfio_core::irq::SetIrqs;
use vfio_core::irq::Trigger;
use vfio_core::model::BusDevice;
use vfio_core::model::VfioDriver;
use vfio_uapi::device::InfoFlags;
use vfio_uapi::device::IrqFlags;
use vfio_uapi::device::RegionFlags;

use super::peer::now;

/// Where the one region keeps a value.
pub(super) const REGISTER: u64 = 0;
/// Where a write raises the interrupt.
pub(super) const INTERRUPT: u64 = 8;
/// Where the IOVA goes of which the device reads [`TOUCHED`] bytes.
pub(super) const TOUCH: u64 = 16;
/// What the device reads at once.
pub(super) const TOUCHED: usize = 4096;

/// Where a card leaves what the benchmark needs of it.
#[derive(Debug)]
pub(super) struct Outside {
    dma: Mutex<Option<Dma>>,
    closed: Sender<u64>,
}

impl Outside {
    /// One, and when cards that have it are closed.
    pub(super) fn new() -> (Arc<Self>, Receiver<u64>) {
        let (closed, receiver) = std::sync::mpsc::channel();
        let dma = Mutex::new(None);
        (Arc::new(Self { dma, closed }), receiver)
    }

    /// The way to the memory of whoever has a card open.
    pub(super) fn dma(&self) -> Option<Dma> {
        lock(&self.dma).clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
pub(super) struct Card {
    register: AtomicU32,
    outside: Arc<Outside>,
}

#[derive(Debug)]
pub(super) struct Session {
    dma: Dma,
    interrupt: Mutex<Option<Trigger>>,
}

impl DeviceOps for Card {
    const NAME: &'static str = "card";
    type Args = Arc<Outside>;
    type Session = Session;

    fn init(_cx: &InitCx<'_>, outside: Arc<Outside>) -> vfio_core::Result<Self> {
        Ok(Self {
            register: AtomicU32::new(0),
            outside,
        })
    }

    fn open(&self, cx: &OpenCx<'_>) -> vfio_core::Result<Session> {
        let dma = cx.dma().clone();
        *lock(&self.outside.dma) = Some(dma.clone());
        Ok(Session {
            dma,
            interrupt: Mutex::default(),
        })
    }

    fn close(&self, _session: Session) {
        // Nobody may be listening.
        let _ = self.outside.closed.send(now());
        *lock(&self.outside.dma) = None;
    }

    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            flags: InfoFlags::PCI,
            num_regions: 1,
            num_irqs: 1,
        }
    }

    fn region(&self, _index: u32) -> vfio_core::Result<RegionInfo> {
        Ok(RegionInfo {
            size: 4096,
            flags: RegionFlags::READ | RegionFlags::WRITE,
            caps: Vec::new(),
        })
    }

    fn irq(&self, _index: u32) -> vfio_core::Result<IrqInfo> {
        Ok(IrqInfo {
            flags: IrqFlags::EVENTFD,
            count: 1,
        })
    }

    fn read(&self, _: &Session, _at: RegionPos, buf: &mut [u8]) -> vfio_core::Result<usize> {
        let value = self.register.load(Ordering::Relaxed).to_ne_bytes();
        buf.fill(0);
        buf.get_mut(..4)
            .ok_or(Errno::INVAL)?
            .copy_from_slice(&value);
        Ok(buf.len())
    }

    fn write(&self, session: &Session, at: RegionPos, data: &[u8]) -> vfio_core::Result<usize> {
        match at.offset {
            REGISTER => {
                let value = data.first_chunk().ok_or(Errno::INVAL)?;
                self.register
                    .store(u32::from_ne_bytes(*value), Ordering::Relaxed);
            }
            INTERRUPT => {
                let interrupt = lock(&session.interrupt).clone();
                interrupt.ok_or(Errno::INVAL)?.signal();
            }
            TOUCH => {
                let iova = u64::from_ne_bytes(*data.first_chunk().ok_or(Errno::INVAL)?);
                let mut buf = [0; TOUCHED];
                session.dma.read(iova, &mut buf)?;
                std::hint::black_box(&buf);
            }
            _ => return Err(Errno::INVAL),
        }
        Ok(data.len())
    }

    fn set_irqs(&self, session: &Session, request: SetIrqs<'_>) -> vfio_core::Result<u32> {
        let Data::Eventfd(source) = request.data else {
            return Err(Errno::NOTTY);
        };
        let trigger = source.eventfd(0)?;
        *lock(&session.interrupt) = trigger;
        Ok(0)
    }
}

/// Makes [`Card`]s.
#[derive(Debug)]
pub(super) struct Driver(pub(super) Arc<Outside>);

impl VfioDriver for Driver {
    type Ops = Card;

    fn name(&self) -> &'static str {
        Card::NAME
    }

    fn args(&self, _device: &Arc<BusDevice>) -> vfio_core::Result<Arc<Outside>> {
        Ok(Arc::clone(&self.0))
    }
}
