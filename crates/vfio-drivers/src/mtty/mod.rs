//! A PCI serial card 4348:3253 with one or two 16550A ports: the kernel's sample
//! (`samples/vfio-mdev/mtty.c`), made usable. A Linux guest drives it with its stock 8250_pci
//! (`PCI_DEVICE_ID_WCHCN_CH352_2S`); each port leads to a pty, a socket, files, the standard
//! streams, or back to itself.
//!
//! Unlike the sample, the configuration space has 256 bytes and bounds, regions that are not there
//! have no flags, interrupt limits do not depend on an earlier call, INTx is a level, and there are
//! an MSI capability and a request interrupt. A card migrates with its registers and what is in its
//! FIFOs; where its ports lead does not. Not emulated: the baud rate.

mod card;
mod migrate;
pub mod port;
pub mod spec;
pub mod uart;

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;

use vfio_core::Errno;
use vfio_core::Result;
use vfio_core::device::DeviceInfo;
use vfio_core::device::DeviceOps;
use vfio_core::device::InitCx;
use vfio_core::device::IrqInfo;
use vfio_core::device::Migratable;
use vfio_core::device::OpenCx;
use vfio_core::device::RegionInfo;
use vfio_core::device::RegionPos;
use vfio_core::device::RequestChannel;
use vfio_core::irq::SetIrqs;
use vfio_core::irq::pci::Counts;
use vfio_core::irq::pci::PciIrqs;
use vfio_core::model::BusDevice;
use vfio_core::model::mdev;
use vfio_uapi::device::InfoFlags;
use vfio_uapi::device::IrqFlags;
use vfio_uapi::device::RegionFlags;
use vfio_uapi::pci::irq;
use vfio_uapi::pci::region;

use card::Card;
use card::Guest;
use card::PORT_SIZE;
use card::Wire;
use port::Backend;
use port::BackendSpec;
use port::Connection;
use port::Outlet;
use uart::ModemInputs;

/// Ports that all cards of one parent have together (the sample's `MAX_MTTYS`).
pub const PORT_BUDGET: u32 = 24;

/// The kinds of card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Model {
    /// One port, `mtty-1`.
    Single,
    /// Two ports, `mtty-2`.
    Dual,
}

impl Model {
    /// All of them, in the order of their directories.
    pub const ALL: [Self; 2] = [Self::Single, Self::Dual];

    /// Ports on the card.
    pub const fn ports(self) -> u32 {
        match self {
            Self::Single => 1,
            Self::Dual => 2,
        }
    }

    /// What sysfs shows of it.
    pub const fn mdev_type(self) -> mdev::Type {
        match self {
            Self::Single => mdev::Type {
                sysfs_name: "1",
                pretty_name: Some("Single port serial"),
            },
            Self::Dual => mdev::Type {
                sysfs_name: "2",
                pretty_name: Some("Dual port serial"),
            },
        }
    }

    fn of(ty: &mdev::Type) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|model| model.mdev_type() == *ty);
        found.ok_or(Errno::INVAL)
    }
}

/// The ports that are left for new cards.
#[derive(Debug)]
pub struct PortPool {
    available: AtomicU32,
}

impl PortPool {
    /// A pool of `ports`.
    pub fn new(ports: u32) -> Arc<Self> {
        Arc::new(Self {
            available: AtomicU32::new(ports),
        })
    }

    /// How many are left.
    pub fn available(&self) -> u32 {
        self.available.load(Ordering::Relaxed)
    }

    /// Takes `ports`, until the lease is dropped. `ENOSPC` if not so many are left.
    pub fn take(self: &Arc<Self>, ports: u32) -> Result<PortLease> {
        self.available
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(ports)
            })
            .map_err(|_| Errno::NOSPC)?;
        Ok(PortLease {
            pool: Arc::clone(self),
            ports,
        })
    }
}

/// Ports of a pool that a card has.
#[derive(Debug)]
pub struct PortLease {
    pool: Arc<PortPool>,
    ports: u32,
}

impl Drop for PortLease {
    fn drop(&mut self) {
        self.pool.available.fetch_add(self.ports, Ordering::Relaxed);
    }
}

/// Where each port of a new card leads: asked with the name of the card and the number of the
/// port, from 0.
type Wiring = dyn Fn(&str, usize) -> BackendSpec + Send + Sync;

/// The driver on the mdev bus.
pub struct Driver {
    pool: Arc<PortPool>,
    wiring: Box<Wiring>,
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver")
            .field("pool", &self.pool)
            .finish_non_exhaustive()
    }
}

impl Default for Driver {
    fn default() -> Self {
        Self::new()
    }
}

impl Driver {
    /// A driver with the sample's budget, whose ports loop back.
    pub fn new() -> Self {
        Self {
            pool: PortPool::new(PORT_BUDGET),
            wiring: Box::new(|_, _| BackendSpec::Loopback),
        }
    }

    /// The same with ports that lead elsewhere.
    #[must_use]
    pub fn with_wiring(
        self,
        wiring: impl Fn(&str, usize) -> BackendSpec + Send + Sync + 'static,
    ) -> Self {
        Self {
            wiring: Box::new(wiring),
            ..self
        }
    }

    /// The ports that are left.
    pub fn pool(&self) -> &Arc<PortPool> {
        &self.pool
    }
}

impl mdev::Driver for Driver {
    type Ops = Mtty;

    fn name(&self) -> &'static str {
        Mtty::NAME
    }

    fn types(&self) -> Vec<mdev::Type> {
        Model::ALL.map(Model::mdev_type).into()
    }

    fn available_instances(&self, ty: &mdev::Type) -> Option<u32> {
        let ports = Model::of(ty).ok()?.ports();
        Some(self.pool.available() / ports)
    }

    fn args(&self, device: &Arc<BusDevice>, ty: &mdev::Type) -> Result<Args> {
        let model = Model::of(ty)?;
        Ok(Args {
            model,
            lease: self.pool.take(model.ports())?,
            backends: (0..model.ports() as usize)
                .map(|port| (self.wiring)(device.name(), port))
                .collect(),
        })
    }
}

/// What a card is made of.
#[derive(Debug)]
pub struct Args {
    /// Which card.
    pub model: Model,
    /// Its ports, out of the budget.
    pub lease: PortLease,
    /// Where each port leads; loopback for one that is not named.
    pub backends: Vec<BackendSpec>,
}

/// A card.
#[derive(Debug)]
pub struct Mtty {
    // What it is.
    name: String,
    model: Model,
    // Where its ports lead.
    backends: Vec<Backend>,
    // What the guest changes.
    card: Arc<Card>,
    /// Goes last: the ports are free when nothing of the card is left.
    _lease: PortLease,
}

/// What exists while a card is open. The connections' threads use the rest, so they go first.
#[derive(Debug)]
pub struct Session {
    connections: Vec<Option<Connection>>,
    outlets: Vec<Option<Outlet>>,
    irqs: Arc<PciIrqs>,
}

impl Session {
    fn wire(&self, port: usize) -> Wire<'_> {
        match self.outlets.get(port) {
            Some(Some(outlet)) => Wire::Out(outlet),
            _ => Wire::Back,
        }
    }
}

/// The port behind a BAR.
fn port_of(index: u32, model: Model) -> Option<usize> {
    (index < model.ports()).then_some(index as usize)
}

impl DeviceOps for Mtty {
    const NAME: &'static str = "mtty";
    type Args = Args;
    type Session = Session;

    fn init(cx: &InitCx<'_>, args: Args) -> Result<Self> {
        Self::new(cx.parent().name(), args)
    }

    fn open(&self, _cx: &OpenCx<'_>) -> Result<Session> {
        self.start()
    }

    fn close(&self, session: Session) {
        drop(session.connections);
    }

    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            flags: InfoFlags::PCI | InfoFlags::RESET,
            num_regions: region::COUNT,
            num_irqs: irq::COUNT,
        }
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        let size = match index {
            region::CONFIG => self.card.config_size(),
            _ if port_of(index, self.model).is_some() => PORT_SIZE,
            0..region::COUNT => return Ok(RegionInfo::default()),
            _ => return Err(Errno::INVAL),
        };
        Ok(RegionInfo {
            size,
            flags: RegionFlags::READ | RegionFlags::WRITE,
            caps: Vec::new(),
        })
    }

    fn irq(&self, index: u32) -> Result<IrqInfo> {
        let (flags, count) = match index {
            irq::INTX => (IrqFlags::MASKABLE | IrqFlags::AUTOMASKED, 1),
            irq::MSI | irq::REQ => (IrqFlags::NORESIZE, 1),
            irq::MSIX => (IrqFlags::NORESIZE, 0),
            // Only PCI Express has errors to report (`drivers/vfio/pci/vfio_pci_core.c`); QEMU warns
            // of an index that is there and has none.
            _ => return Err(Errno::INVAL),
        };
        Ok(IrqInfo {
            flags: IrqFlags::EVENTFD | flags,
            count,
        })
    }

    fn read(&self, session: &Session, at: RegionPos, buf: &mut [u8]) -> Result<usize> {
        if at.index == region::CONFIG {
            return self.card.read_config(at.offset, buf);
        }
        let port = port_of(at.index, self.model).ok_or(Errno::INVAL)?;
        let wire = session.wire(port);
        self.card
            .read_port(&session.irqs, port, wire, at.offset, buf)
    }

    fn write(&self, session: &Session, at: RegionPos, data: &[u8]) -> Result<usize> {
        if at.index == region::CONFIG {
            return self.card.write_config(&session.irqs, at.offset, data);
        }
        let port = port_of(at.index, self.model).ok_or(Errno::INVAL)?;
        let wire = session.wire(port);
        self.card
            .write_port(&session.irqs, port, wire, at.offset, data)
    }

    fn set_irqs(&self, session: &Session, request: SetIrqs<'_>) -> Result<u32> {
        let before = session.irqs.uses_messages();
        let answer = session.irqs.set(request)?;
        if !before && session.irqs.uses_messages() {
            self.card.announce_pending(&session.irqs);
        }
        Ok(answer)
    }

    fn reset(&self, session: &Session) -> Result {
        self.card.reset();
        self.card.refresh(&session.irqs);
        Ok(())
    }

    fn request(&self, session: Option<&Session>, _count: u32) -> RequestChannel {
        session.map_or(RequestChannel::None, |session| session.irqs.request())
    }

    fn migratable(&self) -> Option<&dyn Migratable<Session>> {
        Some(self)
    }

    fn attributes(&self) -> &'static [(&'static str, &'static str)] {
        const ALL: [(&str, &str); 3] = [
            ("vendor", "sample_mdev_dev"),
            ("vendor", "port0"),
            ("vendor", "port1"),
        ];
        match self.model {
            Model::Single => &ALL[..2],
            Model::Dual => &ALL,
        }
    }

    fn show(&self, group: &str, name: &str) -> Result<String> {
        let port = match (group, name) {
            ("vendor", "sample_mdev_dev") => return Ok(format!("This is MDEV {}\n", self.name)),
            ("vendor", "port0") => 0,
            ("vendor", "port1") => 1,
            _ => return Err(Errno::NOENT),
        };
        let backend = self.backends.get(port).ok_or(Errno::NOENT)?;
        Ok(format!("{backend}\n"))
    }
}

impl Mtty {
    fn new(name: &str, args: Args) -> Result<Self> {
        let Args {
            model,
            lease,
            backends,
        } = args;
        let ports = model.ports() as usize;
        let specs = backends
            .into_iter()
            .chain(std::iter::repeat(BackendSpec::Loopback));
        let backends = specs
            .take(ports)
            .enumerate()
            .map(|(port, spec)| {
                Backend::open(&spec).map_err(|error| {
                    tracing::error!("mtty {name}: port {port} as {spec}: {error}");
                    error.errno()
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            name: name.to_owned(),
            model,
            backends,
            card: Arc::new(Card::new(ports)),
            _lease: lease,
        })
    }

    /// The card as after power on, its ports connected.
    fn start(&self) -> Result<Session> {
        let irqs = Arc::new(PciIrqs::new(Counts {
            intx: true,
            msi: 1,
            msix: 0,
        }));
        self.card.power_on();
        let mut connections = Vec::new();
        for (port, backend) in self.backends.iter().enumerate() {
            // Itself is always there; somebody else announces himself.
            let inputs = if backend.is_loopback() {
                ModemInputs::CONNECTED
            } else {
                ModemInputs::default()
            };
            self.card.preset_inputs(port, inputs);
            let line = Guest {
                card: Arc::clone(&self.card),
                irqs: Arc::clone(&irqs),
                port,
            };
            let connection = backend.connect(Arc::new(line)).map_err(|error| {
                tracing::error!("mtty {}: port {port}: {error}", self.name);
                error.errno()
            })?;
            connections.push(connection);
        }
        Ok(Session {
            outlets: connections
                .iter()
                .map(|connection| connection.as_ref().map(Connection::outlet))
                .collect(),
            connections,
            irqs,
        })
    }
}

#[cfg(test)]
mod tests;
