mod migrate;

use std::fs;
use std::io::Read;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;
use std::time::Instant;

use rustix::event::EventfdFlags;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::event::eventfd;
use rustix::event::poll;
use vfio_core::Config;
use vfio_core::Core;
use vfio_core::device::Policy;
use vfio_core::irq::Action;
use vfio_core::irq::Data;
use vfio_core::irq::EventfdSource;
use vfio_core::irq::Trigger;
use vfio_core::model::mdev::Driver as _;

use super::spec::fcr;
use super::spec::ier;
use super::spec::iir;
use super::spec::lcr;
use super::spec::lsr;
use super::spec::mcr;
use super::spec::msr;
use super::*;

use reg::IER_DLM as IER;
use reg::IIR_FCR as FCR;
use reg::IIR_FCR as IIR;
use reg::LCR;
use reg::LSR;
use reg::MCR;
use reg::MSR;
use reg::RBR_THR_DLL as RBR;
use reg::RBR_THR_DLL as THR;
use spec::reg;

const DEADLINE: Duration = Duration::from_secs(20);

fn card(model: Model, backends: &[&str]) -> Mtty {
    let args = Args {
        model,
        lease: PortPool::new(PORT_BUDGET).take(model.ports()).unwrap(),
        backends: backends.iter().map(|spec| spec.parse().unwrap()).collect(),
    };
    Mtty::new("card", args).unwrap()
}

/// A card with an open session, driven as a client drives it.
struct Guest<'a> {
    card: &'a Mtty,
    session: Session,
}

impl<'a> Guest<'a> {
    fn open(card: &'a Mtty) -> Self {
        Self {
            card,
            session: card.start().unwrap(),
        }
    }

    fn read(&self, index: u32, offset: u64, len: usize) -> Result<Vec<u8>> {
        let mut buf = vec![0xee; len];
        let n = self
            .card
            .read(&self.session, RegionPos { index, offset }, &mut buf)?;
        buf.truncate(n);
        Ok(buf)
    }

    fn write(&self, index: u32, offset: u64, data: &[u8]) -> Result<usize> {
        self.card
            .write(&self.session, RegionPos { index, offset }, data)
    }

    fn inb(&self, port: u32, register: u8) -> u8 {
        self.read(port, register.into(), 1).unwrap()[0]
    }

    fn outb(&self, port: u32, register: u8, value: u8) {
        assert_eq!(self.write(port, register.into(), &[value]), Ok(1));
    }

    fn config16(&self, offset: u64) -> u16 {
        let bytes = self.read(region::CONFIG, offset, 2).unwrap();
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    fn set(&self, index: u32, action: Action, count: u32, data: Data<'_>) -> Result<u32> {
        let request = SetIrqs {
            index,
            start: 0,
            count,
            action,
            data,
        };
        self.card.set_irqs(&self.session, request)
    }

    fn enable(&self, index: u32) -> Interrupt {
        let interrupt = Interrupt::new();
        let data = Data::Eventfd(&interrupt);
        assert_eq!(self.set(index, Action::Trigger, 1, data), Ok(0));
        interrupt
    }

    fn unmask(&self) {
        assert_eq!(self.set(irq::INTX, Action::Unmask, 1, Data::None), Ok(0));
    }

    /// As `serial8250_do_startup` and `_set_termios` leave a port.
    fn start_up(&self, port: u32, interrupts: u8) {
        self.outb(port, FCR, fcr::ENABLE);
        self.outb(port, FCR, fcr::ENABLE | 0x80);
        self.outb(port, LCR, 3);
        self.outb(port, MCR, mcr::DTR | mcr::RTS | mcr::OUT2);
        self.inb(port, MSR);
        self.outb(port, IER, interrupts);
    }
}

/// An eventfd as a client has it.
struct Interrupt(Trigger);

impl Interrupt {
    fn new() -> Self {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Self(Trigger::new(eventfd(0, flags).unwrap()))
    }

    /// How often it came since last asked.
    fn count(&self) -> u64 {
        let mut count = [0; 8];
        match rustix::io::read(self.0.fd(), &mut count) {
            Ok(_) => u64::from_ne_bytes(count),
            Err(Errno::AGAIN) => 0,
            Err(error) => panic!("{error}"),
        }
    }

    /// Waits for it, and takes it.
    fn wait(&self, time: Duration) -> bool {
        let time = Timespec::try_from(time).unwrap();
        let mut fds = [PollFd::new(self.0.fd(), PollFlags::IN)];
        poll(&mut fds, Some(&time)).unwrap() > 0 && self.count() > 0
    }
}

impl EventfdSource for Interrupt {
    fn eventfd(&self, _n: usize) -> Result<Option<Trigger>> {
        Ok(Some(self.0.clone()))
    }
}

#[test]
fn the_card_is_what_8250_pci_looks_for() {
    let card = card(Model::Dual, &[]);
    let guest = Guest::open(&card);
    assert_eq!(
        guest.read(region::CONFIG, 0, 16).unwrap(),
        [
            0x48, 0x43, 0x53, 0x32, 0x01, 0x00, 0x10, 0x02, 0x10, 0x02, 0x00, 0x07, 0, 0, 0, 0
        ]
    );
    assert_eq!(guest.config16(0x2c), 0x4348);
    assert_eq!(guest.config16(0x2e), 0x3253);
    // INTA, and a list that is just the MSI capability.
    assert_eq!(guest.read(region::CONFIG, 0x3d, 1).unwrap(), [1]);
    let list = guest.read(region::CONFIG, 0x34, 1).unwrap()[0];
    assert_eq!(guest.config16(list.into()), 0x0005);
    // BARs of 8 ports each, as many as ports.
    for (model, sizes) in [(Model::Single, [8, 0, 0]), (Model::Dual, [8, 8, 0])] {
        let card = self::card(model, &[]);
        let guest = Guest::open(&card);
        for (bar, size) in sizes.into_iter().enumerate() {
            let at = 0x10 + 4 * bar as u64;
            guest.write(region::CONFIG, at, &[0xff; 4]).unwrap();
            let bytes = guest.read(region::CONFIG, at, 4).unwrap();
            let sized = u32::from_le_bytes(bytes.try_into().unwrap());
            let want = if size == 0 { 0 } else { !(size - 1) | 1 };
            assert_eq!(sized, want, "{model:?} BAR {bar}");
        }
    }
}

#[test]
fn regions_and_interrupts() {
    let rw = RegionFlags::READ | RegionFlags::WRITE;
    for (model, sizes) in [
        (Model::Single, [8, 0, 0, 0, 0, 0, 0, 256, 0]),
        (Model::Dual, [8, 8, 0, 0, 0, 0, 0, 256, 0]),
    ] {
        let card = card(model, &[]);
        let info = card.info();
        assert_eq!(info.flags, InfoFlags::PCI | InfoFlags::RESET);
        assert_eq!((info.num_regions, info.num_irqs), (9, 5));
        for (index, size) in (0..).zip(sizes) {
            let region = card.region(index).unwrap();
            assert_eq!(region.size, size, "{model:?} region {index}");
            let flags = if size > 0 { rw } else { RegionFlags::empty() };
            assert_eq!(region.flags, flags, "{model:?} region {index}");
        }
        assert_eq!(card.region(9), Err(Errno::INVAL));
        // Without an earlier GET_INFO, unlike the sample.
        for (index, flags, count) in [(0, 7, 1), (1, 9, 1), (2, 9, 0), (4, 9, 1)] {
            let irq = card.irq(index).unwrap();
            assert_eq!((irq.flags.bits(), irq.count), (flags, count), "irq {index}");
        }
        for index in [3, 5] {
            assert_eq!(card.irq(index), Err(Errno::INVAL), "irq {index}");
        }
    }
}

#[test]
fn accesses_at_the_edges() {
    let card = card(Model::Single, &[]);
    let guest = Guest::open(&card);
    guest.outb(0, reg::SCR, 0x77);
    for (index, offset, len, answer) in [
        (0, 7, 1, Ok(1)),
        // Cut at the end, and each byte a register.
        (0, 5, 8, Ok(3)),
        (0, 0, 1000, Ok(8)),
        (0, 8, 1, Err(Errno::INVAL)),
        (0, 256, 1, Err(Errno::INVAL)),
        (0, u64::MAX, 1, Err(Errno::INVAL)),
        // BARs that are not there, whatever the position; ROM and VGA.
        (1, 0, 1, Err(Errno::INVAL)),
        (2, 0, 8, Err(Errno::INVAL)),
        (5, 3, 1, Err(Errno::INVAL)),
        (6, 0, 1, Err(Errno::INVAL)),
        (8, 0, 1, Err(Errno::INVAL)),
        (u32::MAX, 0, 1, Err(Errno::INVAL)),
        (7, 0, 256, Ok(256)),
        (7, 255, 1, Ok(1)),
        (7, 255, 2, Err(Errno::FAULT)),
        (7, 256, 1, Err(Errno::FAULT)),
        (7, u64::MAX, 4, Err(Errno::FAULT)),
    ] {
        let case = format!("region {index} at {offset:#x}, {len} bytes");
        let read = guest.read(index, offset, len).map(|bytes| bytes.len());
        assert_eq!(read, answer, "read {case}");
        if index != 0 {
            let data = vec![0; len];
            assert_eq!(guest.write(index, offset, &data), answer, "write {case}");
        }
    }
    assert_eq!(guest.read(0, 5, 8).unwrap()[2], 0x77);
    assert_eq!(guest.write(0, 3, &[3, 0, 0, 0, 0x11, 0xff]), Ok(5));
    assert_eq!(guest.inb(0, LCR), 3);
    assert_eq!(guest.inb(0, reg::SCR), 0x11);
}

#[test]
fn loopback_with_a_level_interrupt() {
    let card = card(Model::Single, &[]);
    let guest = Guest::open(&card);
    assert_eq!(guest.inb(0, MSR), msr::CTS | msr::DSR | msr::DCD);
    let intx = guest.enable(irq::INTX);
    guest.start_up(0, ier::RDI);
    assert_eq!(intx.count(), 0);
    for byte in *b"hello" {
        guest.outb(0, THR, byte);
    }
    // Once: it masks itself. Unmasked while asserted, it comes again at once.
    assert_eq!(intx.count(), 1);
    guest.unmask();
    assert_eq!(intx.count(), 1);
    assert_eq!(guest.inb(0, IIR), 0xc0 | iir::TIMEOUT);
    let mut got = Vec::new();
    while guest.inb(0, LSR) & lsr::DR != 0 {
        got.push(guest.inb(0, RBR));
    }
    assert_eq!(got, b"hello");
    guest.unmask();
    assert_eq!(intx.count(), 0, "nothing is pending any more");
    guest.outb(0, THR, b'!');
    assert_eq!(intx.count(), 1);

    // A long break, as the terminal end of a loopback plug sees it.
    assert_eq!(guest.inb(0, RBR), b'!');
    guest.outb(0, LCR, 3 | lcr::BREAK);
    assert_eq!(guest.inb(0, LSR) & lsr::BI, lsr::BI);
}

#[test]
fn both_ports_share_the_line() {
    let card = card(Model::Dual, &[]);
    let guest = Guest::open(&card);
    let intx = guest.enable(irq::INTX);
    for port in 0..2 {
        guest.start_up(port, ier::RDI);
        guest.outb(port, THR, port as u8);
    }
    assert_eq!(intx.count(), 1);
    assert_eq!(guest.inb(0, RBR), 0);
    guest.unmask();
    assert_eq!(intx.count(), 1, "the other port still holds it");
    assert_eq!(guest.inb(1, RBR), 1);
    guest.unmask();
    assert_eq!(intx.count(), 0);
}

#[test]
fn the_command_word_silences_intx_and_status_tells() {
    const PENDING: u16 = 1 << 3;
    let card = card(Model::Single, &[]);
    let guest = Guest::open(&card);
    let intx = guest.enable(irq::INTX);
    guest.start_up(0, ier::RDI);
    guest.write(region::CONFIG, 4, &[0x01, 0x04]).unwrap();
    guest.outb(0, THR, 1);
    assert_eq!(intx.count(), 0);
    assert_eq!(guest.config16(6) & PENDING, PENDING, "pending all the same");
    guest.write(region::CONFIG, 4, &[0x01, 0x00]).unwrap();
    assert_eq!(intx.count(), 1);
    guest.inb(0, RBR);
    assert_eq!(guest.config16(6) & PENDING, 0);
}

#[test]
fn messages_come_with_each_rise() {
    let card = card(Model::Dual, &[]);
    let guest = Guest::open(&card);
    guest.start_up(0, ier::RDI | ier::THRI);
    // What was pending before anybody listened is announced.
    let msi = guest.enable(irq::MSI);
    assert_eq!(msi.count(), 1);
    assert_eq!(guest.inb(0, IIR), 0xc0 | iir::THRI);
    assert_eq!(msi.count(), 0);
    // Empty again within one write: the line falls and rises.
    guest.outb(0, IER, ier::THRI);
    assert_eq!(msi.count(), 0);
    guest.outb(0, THR, 1);
    assert_eq!(msi.count(), 1);
    guest.outb(0, THR, 2);
    assert_eq!(
        msi.count(),
        1,
        "again, though it was up before and is after"
    );
    // The other port's rise is a message of its own.
    guest.start_up(1, ier::THRI);
    assert_eq!(msi.count(), 1);
    // No line while messages are on, and none of both at once.
    let other = Interrupt::new();
    let data = Data::Eventfd(&other);
    assert_eq!(
        guest.set(irq::INTX, Action::Trigger, 1, data),
        Err(Errno::INVAL)
    );
    // Back on the line, the level is still there.
    assert_eq!(guest.set(irq::MSI, Action::Trigger, 0, Data::None), Ok(0));
    assert_eq!(guest.enable(irq::INTX).count(), 1);
}

#[test]
fn the_request_interrupt() {
    let card = card(Model::Single, &[]);
    assert_eq!(card.request(None, 0), RequestChannel::None);
    let guest = Guest::open(&card);
    assert_eq!(card.request(Some(&guest.session), 0), RequestChannel::None);
    let req = guest.enable(irq::REQ);
    for count in 0..3 {
        let channel = card.request(Some(&guest.session), count);
        assert_eq!(channel, RequestChannel::Signalled);
        assert_eq!(req.count(), 1);
    }
}

#[test]
fn reset_and_reopen_start_afresh() {
    let card = card(Model::Single, &[]);
    let config = |guest: &Guest<'_>| guest.read(region::CONFIG, 0, 256).unwrap();
    let guest = Guest::open(&card);
    let fresh = config(&guest);
    let spoil = |guest: &Guest<'_>| {
        guest.write(region::CONFIG, 0x10, &[0xff; 4]).unwrap();
        guest.start_up(0, 0x0f);
        guest.outb(0, THR, 1);
        guest.outb(0, reg::SCR, 9);
        assert_ne!(config(guest), fresh);
    };
    let is_fresh = |guest: &Guest<'_>| {
        assert_eq!(config(guest), fresh);
        let registers = guest.read(0, 0, 8).unwrap();
        let lines = msr::CTS | msr::DSR | msr::DCD;
        assert_eq!(
            registers,
            [0, 0, iir::NO_INT, 0, 0, lsr::THRE | lsr::TEMT, lines, 0]
        );
    };
    spoil(&guest);
    let intx = guest.enable(irq::INTX);
    assert_eq!(intx.count(), 1);
    card.reset(&guest.session).unwrap();
    guest.unmask();
    assert_eq!(intx.count(), 0, "the line went down with the reset");
    is_fresh(&guest);
    spoil(&guest);
    let Guest { session, .. } = guest;
    card.close(session);
    is_fresh(&Guest::open(&card));
}

#[test]
fn the_budget() {
    let driver = Driver::new();
    let types = driver.types();
    let names: Vec<_> = types
        .iter()
        .map(|ty| (ty.sysfs_name, ty.pretty_name.unwrap()))
        .collect();
    assert_eq!(
        names,
        [("1", "Single port serial"), ("2", "Dual port serial")]
    );
    let available = || {
        let of = |ty| driver.available_instances(ty).unwrap();
        (of(&types[0]), of(&types[1]))
    };
    assert_eq!(available(), (24, 12));
    let mut cards = Vec::new();
    let parent = BusDevice::new("/devices/virtual/mtty", "mtty", None);
    for _ in 0..11 {
        let args = driver.args(&parent, &types[1]).unwrap();
        cards.push(Mtty::new("card", args).unwrap());
    }
    let one = driver.args(&parent, &types[0]).unwrap();
    assert_eq!(available(), (1, 0));
    let refused = driver.args(&parent, &types[1]).map(drop);
    assert_eq!(refused, Err(Errno::NOSPC));
    assert_eq!(available(), (1, 0), "a refusal takes nothing");
    drop(one);
    drop(cards);
    assert_eq!(available(), (24, 12));

    // A card that cannot be made gives its ports back.
    let failing = Driver::new().with_wiring(|_, port| match port {
        0 => BackendSpec::Loopback,
        _ => "unix:/nowhere/at/all".parse().unwrap(),
    });
    let args = failing.args(&parent, &types[1]).unwrap();
    assert_eq!(failing.pool().available(), 22);
    assert_eq!(Mtty::new("card", args).map(drop), Err(Errno::NOENT));
    assert_eq!(failing.pool().available(), 24);
}

#[test]
fn attributes_tell_where_ports_lead() {
    let card = card(Model::Dual, &["pty"]);
    let texts: Vec<_> = card
        .attributes()
        .iter()
        .map(|(group, name)| card.show(group, name).unwrap())
        .collect();
    assert_eq!(texts[0], "This is MDEV card\n");
    assert!(texts[1].starts_with("pty /dev/pts/"), "{}", texts[1]);
    assert_eq!(texts[2], "loopback\n");
    assert_eq!(card.show("vendor", "port2"), Err(Errno::NOENT));
    assert_eq!(self::card(Model::Single, &[]).attributes().len(), 2);
}

/// A directory that goes with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("mtty-card-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Through the mdev bus, as a write to `create` goes.
#[test]
fn cards_made_on_the_mdev_bus() {
    let scratch = Scratch::new("mdev");
    let dir = scratch.0.display().to_string();
    let core = Core::new(Config::default());
    let device = BusDevice::virtual_class("mtty", "mtty");
    device.add(&core).unwrap();
    let driver = Driver::new().with_wiring(move |name, port| {
        format!("unix:{dir}/{}-{port}", &name[..8]).parse().unwrap()
    });
    let parent = mdev::Parent::register(&core, &device, driver).unwrap();
    let names: Vec<_> = parent.type_names().collect();
    assert_eq!(names, ["mtty-1", "mtty-2"]);
    assert_eq!(parent.pretty_name(1), Some("Dual port serial"));
    assert_eq!(parent.device_api(), "vfio-pci");
    assert_eq!(parent.description(0), None, "as in the sample");

    let made: Vec<_> = (0..12u32)
        .map(|n| {
            let uuid = format!("{n:08x}-0000-4000-8000-000000000000\n");
            parent.create_text(1, uuid.as_bytes()).unwrap()
        })
        .collect();
    assert_eq!(parent.available_instances(0), Some(0));
    let more = b"ffffffff-0000-4000-8000-000000000000";
    for ty in 0..2 {
        let refused = parent.create_text(ty, more).map(drop);
        assert_eq!(refused, Err(Errno::NOSPC), "the bus does not count for us");
    }
    assert_eq!(fs::read_dir(&scratch.0).unwrap().count(), 24);
    let vfio = made[3].vfio_device().unwrap();
    assert_eq!(vfio.driver(), "mtty");
    assert_eq!(
        vfio.show("vendor", "sample_mdev_dev").unwrap(),
        "This is MDEV 00000003-0000-4000-8000-000000000000\n"
    );
    assert!(
        vfio.show("vendor", "port1")
            .unwrap()
            .ends_with("00000003-1\n")
    );
    drop(vfio);

    // Removed is released: the ports are back and the sockets gone.
    let outcome = mdev::remove(&core, &made[3], Policy::Wait);
    assert_eq!(outcome.wait_for(DEADLINE), Some(Ok(())));
    assert_eq!(parent.available_instances(1), Some(1));
    assert_eq!(fs::read_dir(&scratch.0).unwrap().count(), 22);
    let outcome = parent.unregister(Policy::Wait);
    assert_eq!(outcome.wait_for(DEADLINE), Some(Ok(())));
    assert_eq!(fs::read_dir(&scratch.0).unwrap().count(), 0);
}

/// What `serial8250_interrupt` and `serial8250_handle_irq` do, as an echo: every received byte is
/// sent back.
fn handle_interrupt(guest: &Guest<'_>, to_send: &Mutex<std::collections::VecDeque<u8>>) {
    while guest.inb(0, IIR) & iir::NO_INT == 0 {
        let mut status = guest.inb(0, LSR);
        for _ in 0..256 {
            if status & lsr::DR == 0 {
                break;
            }
            to_send.lock().unwrap().push_back(guest.inb(0, RBR));
            status = guest.inb(0, LSR);
        }
        guest.inb(0, MSR);
        if status & lsr::THRE != 0 {
            let mut queue = to_send.lock().unwrap();
            if queue.is_empty() {
                guest.outb(0, IER, ier::RDI | ier::RLSI);
            } else {
                guest.outb(0, IER, ier::RDI | ier::RLSI | ier::THRI);
                for _ in 0..16 {
                    if let Some(byte) = queue.pop_front() {
                        guest.outb(0, THR, byte);
                    }
                }
            }
        }
    }
}

/// Bytes both ways through a socket, moved by interrupts alone: one that is lost, or a level that
/// stays wrong, ends the traffic.
fn echo_by_interrupts(index: u32) {
    let scratch = Scratch::new(&format!("echo{index}"));
    let path = scratch.0.join("sock");
    let card = card(Model::Single, &[&format!("unix:{}", path.display())]);
    let guest = Guest::open(&card);
    let interrupt = guest.enable(index);
    let to_send = Mutex::default();
    guest.start_up(0, ier::RDI | ier::RLSI);

    let text: Vec<u8> = (0..200_000u32).map(|n| n.to_le_bytes()[0] ^ 0x5a).collect();
    let mut client = UnixStream::connect(&path).unwrap();
    let mut reader = client.try_clone().unwrap();
    let sender = std::thread::spawn({
        let text = text.clone();
        move || client.write_all(&text).unwrap()
    });
    let receiver = std::thread::spawn({
        let len = text.len();
        move || {
            let mut got = vec![0; len];
            reader.read_exact(&mut got).unwrap();
            got
        }
    });
    let start = Instant::now();
    let mut interrupts = 0;
    while !receiver.is_finished() {
        assert!(start.elapsed() < 3 * DEADLINE, "after {interrupts}");
        if interrupt.wait(Duration::from_millis(100)) {
            interrupts += 1;
            handle_interrupt(&guest, &to_send);
            if index == irq::INTX {
                guest.unmask();
            }
        } else {
            assert_eq!(guest.inb(0, IIR) & iir::NO_INT, 1, "an interrupt was lost");
        }
    }
    assert!(receiver.join().unwrap() == text, "everything, in order");
    sender.join().unwrap();
}

#[test]
fn echo_through_a_socket_by_intx() {
    echo_by_interrupts(irq::INTX);
}

#[test]
fn echo_through_a_socket_by_messages() {
    echo_by_interrupts(irq::MSI);
}

/// Modem lines follow the client, and tell of it by interrupt.
#[test]
fn carrier_follows_the_client() {
    let scratch = Scratch::new("carrier");
    let path = scratch.0.join("sock");
    let card = card(Model::Single, &[&format!("unix:{}", path.display())]);
    let guest = Guest::open(&card);
    let intx = guest.enable(irq::INTX);
    guest.start_up(0, ier::MSI);
    assert_eq!(guest.inb(0, MSR), 0);
    let client = UnixStream::connect(&path).unwrap();
    assert!(intx.wait(DEADLINE));
    let up = msr::CTS | msr::DSR | msr::DCD;
    assert_eq!(guest.inb(0, MSR), up | msr::DCTS | msr::DDSR | msr::DDCD);
    guest.unmask();
    drop(client);
    assert!(intx.wait(DEADLINE));
    assert_eq!(guest.inb(0, MSR) & msr::LINES, 0);
}

/// One port gets a byte while the other's last is read, at the same moment: whoever is later, the
/// line must be up afterwards, or an interrupt is lost for good.
#[test]
fn the_level_survives_races() {
    let card = card(Model::Dual, &[]);
    let guest = Guest::open(&card);
    let intx = guest.enable(irq::INTX);
    for port in 0..2 {
        guest.start_up(port, ier::RDI);
    }
    guest.outb(1, THR, 0);
    const ROUNDS: u32 = 50_000;
    let mut lost = 0;
    let turns = [const { AtomicU32::new(0) }; 2];
    let meet = |me: usize, turn: u32| {
        turns[me].store(turn, Ordering::SeqCst);
        while turns[1 - me].load(Ordering::SeqCst) < turn {
            std::hint::spin_loop();
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..ROUNDS {
                meet(1, 2 * round + 1);
                guest.outb(round % 2, THR, 1);
                meet(1, 2 * round + 2);
            }
        });
        for round in 0..ROUNDS {
            // Both are pending nowhere but on the port that is about to be read.
            intx.count();
            meet(0, 2 * round + 1);
            guest.inb(1 - round % 2, RBR);
            meet(0, 2 * round + 2);
            intx.count();
            guest.unmask();
            // Not an assertion: a panic here would leave the other thread waiting.
            lost += u32::from(intx.count() != 1);
        }
    });
    assert_eq!(lost, 0, "of {ROUNDS} interrupts");
}
