//! A card that migrates: by its driver's calls, and as a client does it, through the core.

use super::*;
use proptest::prelude::*;
use vfio_core::device::DataDirection;
use vfio_core::device::Device;
use vfio_core::device::DeviceFile;
use vfio_core::device::DmaSpace;
use vfio_core::device::MigrationState as State;
use vfio_core::device::Opener;

impl Guest<'_> {
    fn stop(&self) {
        self.card.stop(&self.session).unwrap();
    }

    fn resume(&self) {
        self.card.resume(&self.session).unwrap();
    }

    fn save(&self) -> Vec<u8> {
        self.card.save(&self.session).unwrap()
    }

    fn restore(&self, saved: &[u8]) -> Result<()> {
        self.card
            .restore(&self.session, 1, saved)
            .map_err(|error| error.errno())
    }

    /// Everything of a port that reading does not change.
    fn registers(&self, port: u32) -> [u8; 4] {
        [IER, LCR, MCR, reg::SCR].map(|register| self.inb(port, register))
    }
}

#[test]
fn registers_fifos_and_configuration_come_along() {
    let (source, target) = (card(Model::Dual, &[]), card(Model::Dual, &[]));
    let guest = Guest::open(&source);
    guest
        .write(region::CONFIG, 0x10, &0xc000u32.to_le_bytes())
        .unwrap();
    guest.write(region::CONFIG, 0x3c, &[11]).unwrap();
    guest.start_up(0, ier::RDI | ier::THRI);
    guest.outb(0, reg::SCR, 0x42);
    for byte in *b"hello" {
        guest.outb(0, THR, byte);
    }
    guest.start_up(1, ier::MSI);
    guest.outb(1, MCR, mcr::LOOP | mcr::OUT2);
    guest.stop();
    let saved = guest.save();
    assert_eq!(saved.len(), source.form().max_len);
    assert_eq!(guest.save(), saved, "saving changes nothing");

    let other = Guest::open(&target);
    other.stop();
    other.restore(&saved).unwrap();
    assert_eq!(other.save(), saved);
    other.resume();
    guest.resume();
    for port in 0..2 {
        assert_eq!(other.registers(port), guest.registers(port), "port {port}");
    }
    assert_eq!(other.config16(0x10), guest.config16(0x10));
    assert_eq!(other.read(region::CONFIG, 0x3c, 1), Ok(vec![11]));
    for byte in *b"hello" {
        assert_eq!(other.inb(0, LSR) & lsr::DR, lsr::DR);
        assert_eq!(other.inb(0, RBR), byte);
    }
    assert_eq!(other.inb(0, LSR) & lsr::DR, 0);
}

#[test]
fn pending_interrupts_come_along() {
    for index in [irq::INTX, irq::MSI] {
        let (source, target) = (card(Model::Single, &[]), card(Model::Single, &[]));
        let guest = Guest::open(&source);
        let raised = guest.enable(index);
        guest.start_up(0, ier::RDI);
        guest.outb(0, THR, b'x');
        assert_eq!(raised.count(), 1);
        guest.stop();
        assert_eq!(raised.count(), 0);
        let saved = guest.save();

        // The client enables interrupts before or after the state arrives; both happen.
        for early in [true, false] {
            let other = Guest::open(&target);
            other.stop();
            let mut raised = early.then(|| other.enable(index));
            other.restore(&saved).unwrap();
            let raised = raised.get_or_insert_with(|| other.enable(index));
            assert_eq!(raised.count(), 0, "stopped: index {index}");
            other.resume();
            assert_eq!(raised.count(), 1, "index {index}, early {early}");
            other.resume();
            assert_eq!(raised.count(), 0, "once");
            assert_eq!(other.inb(0, RBR), b'x');
            let Guest { session, .. } = other;
            target.close(session);
        }
        // The source can go on, and does not repeat itself.
        guest.resume();
        if index == irq::INTX {
            assert_eq!(raised.count(), 0, "masked since it was raised");
            guest.unmask();
            assert_eq!(raised.count(), 1);
        } else {
            assert_eq!(raised.count(), 0);
        }
    }
}

#[test]
fn nothing_is_raised_while_stopped() {
    for index in [irq::INTX, irq::MSI] {
        let card = card(Model::Single, &[]);
        let guest = Guest::open(&card);
        let raised = guest.enable(index);
        guest.start_up(0, ier::RDI | ier::THRI);
        raised.count();
        guest.inb(0, IIR);
        guest.stop();
        // In diagnostic loopback a byte arrives by the access alone.
        guest.outb(0, MCR, mcr::LOOP | mcr::OUT2);
        guest.outb(0, THR, 1);
        if index == irq::INTX {
            guest.unmask();
        }
        assert_eq!(raised.count(), 0);
        guest.resume();
        assert_eq!(raised.count(), 1, "index {index}");
    }
}

#[test]
fn bytes_and_carrier_wait_while_stopped() {
    let scratch = Scratch::new("stopped");
    let path = scratch.0.join("sock");
    let card = card(Model::Single, &[&format!("unix:{}", path.display())]);
    let guest = Guest::open(&card);
    guest.start_up(0, ier::RDI);
    guest.stop();
    let before = guest.save();
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"from outside").unwrap();
    guest.outb(0, THR, b'!');
    let mut with_output = guest.save();
    assert_ne!(with_output, before);
    // A time is no proof; what is proved is that nothing is lost and nothing comes early.
    client
        .set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    assert!(client.read(&mut [0]).is_err(), "it was sent while stopped");
    assert_eq!(guest.save(), with_output);
    guest.resume();
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut byte = [0];
    client.read_exact(&mut byte).unwrap();
    assert_eq!(byte, *b"!");
    let mut got = Vec::new();
    let start = Instant::now();
    while got.len() < 12 {
        assert!(start.elapsed() < DEADLINE, "got {got:?}");
        if guest.inb(0, LSR) & lsr::DR != 0 {
            got.push(guest.inb(0, RBR));
        }
    }
    assert_eq!(got, b"from outside");
    let up = msr::CTS | msr::DSR | msr::DCD;
    assert_eq!(guest.inb(0, MSR), up | msr::DCTS | msr::DDSR | msr::DDCD);

    // At the target nobody is at the far end: the guest is told that the carrier has gone.
    guest.stop();
    with_output = guest.save();
    let target = self::card(Model::Single, &[&format!("unix:{}-2", path.display())]);
    let other = Guest::open(&target);
    other.stop();
    other.restore(&with_output).unwrap();
    assert_eq!(other.save(), with_output, "not before it runs");
    other.resume();
    assert_eq!(other.inb(0, MSR), msr::DCTS | msr::DDSR | msr::DDCD);
}

#[test]
fn what_is_no_saved_card() {
    let card = card(Model::Single, &[]);
    let guest = Guest::open(&card);
    guest.start_up(0, ier::RDI);
    guest.stop();
    let saved = guest.save();
    let mut cases = vec![Vec::new(), saved[1..].to_vec(), [&saved[..], &[0]].concat()];
    // The identity, a BAR's kind, and a port's impossible register.
    for (at, bit) in [
        (0, 1),
        (0x0b, 1),
        (0x10, 1),
        (0x14, 0x80),
        (256, 0x80),
        (256 + 11, 0xff),
    ] {
        let mut other = saved.clone();
        other[at] ^= bit;
        cases.push(other);
    }
    cases.push({
        let dual = self::card(Model::Dual, &[]);
        Guest::open(&dual).save()
    });
    guest.outb(0, reg::SCR, 0x55);
    let before = guest.save();
    for case in cases {
        assert_eq!(guest.restore(&case), Err(Errno::INVAL), "{case:x?}");
        assert_eq!(guest.save(), before, "nothing has changed");
    }
    guest.restore(&saved).unwrap();
    assert_eq!(guest.save(), saved);
}

#[derive(Clone, Copy, Debug)]
enum Access {
    Write(u32, u8, u8),
    Read(u32, u8),
    Config(u8, u8),
}

fn access() -> impl Strategy<Value = Access> {
    prop_oneof![
        4 => (0..2u32, 0..8u8, any::<u8>()).prop_map(|(p, r, v)| Access::Write(p, r, v)),
        2 => (0..2u32, 0..8u8).prop_map(|(p, r)| Access::Read(p, r)),
        1 => any::<(u8, u8)>().prop_map(|(at, value)| Access::Config(at, value)),
    ]
}

impl Guest<'_> {
    fn does(&self, access: Access) -> Option<u8> {
        match access {
            Access::Write(port, register, value) => self.outb(port, register, value),
            Access::Read(port, register) => return Some(self.inb(port, register)),
            Access::Config(at, value) => {
                self.write(region::CONFIG, at.into(), &[value]).unwrap();
            }
        }
        None
    }
}

proptest! {
    /// A card that has migrated at any moment cannot be told from one that has not.
    #[test]
    fn nobody_notices(
        before in prop::collection::vec(access(), 0..60),
        after in prop::collection::vec(access(), 1..40),
    ) {
        let (stayed, left, arrived) =
            (card(Model::Dual, &[]), card(Model::Dual, &[]), card(Model::Dual, &[]));
        let (here, from, to) = (Guest::open(&stayed), Guest::open(&left), Guest::open(&arrived));
        for access in before {
            prop_assert_eq!(here.does(access), from.does(access));
        }
        from.stop();
        to.stop();
        to.restore(&from.save()).unwrap();
        to.resume();
        for access in after {
            prop_assert_eq!(here.does(access), to.does(access), "{:?}", access);
        }
        prop_assert_eq!(here.save(), to.save());
    }

    /// A state with any bytes changed is refused and changes nothing, or is one that is saved
    /// again as it was taken, and works.
    #[test]
    fn hostile_states(
        changes in prop::collection::vec((0..384usize, any::<u8>()), 1..8),
        after in prop::collection::vec(access(), 0..20),
    ) {
        let card = card(Model::Dual, &[]);
        let guest = Guest::open(&card);
        guest.stop();
        let before = guest.save();
        let mut state = before.clone();
        for (at, value) in changes {
            state[at] = value;
        }
        match guest.restore(&state) {
            Err(errno) => {
                prop_assert_eq!(errno, Errno::INVAL);
                prop_assert_eq!(guest.save(), before);
            }
            Ok(()) => {
                let taken = guest.save();
                guest.restore(&taken).unwrap();
                prop_assert_eq!(guest.save(), taken);
            }
        }
        guest.resume();
        for access in after {
            guest.does(access);
        }
    }
}

/// Cards made on a bus, opened as a transport with its own memory opens them.
struct Bus {
    core: Core,
    parent: Arc<mdev::Parent>,
    made: Vec<Arc<BusDevice>>,
}

struct Nowhere;

impl DmaSpace for Nowhere {
    fn read(&self, _iova: u64, _buf: &mut [u8]) -> Result<()> {
        Err(Errno::NOENT)
    }
    fn write(&self, _iova: u64, _data: &[u8]) -> Result<()> {
        Err(Errno::NOENT)
    }
}

impl Bus {
    fn new() -> Self {
        let core = Core::new(Config::default());
        let device = BusDevice::virtual_class("mtty", "mtty");
        device.add(&core).unwrap();
        let parent = mdev::Parent::register(&core, &device, Driver::new()).unwrap();
        Bus {
            core,
            parent,
            made: Vec::new(),
        }
    }

    fn card(&mut self, ty: usize) -> Device {
        let uuid = format!("{:08x}-0000-4000-8000-000000000000", self.made.len());
        let made = self.parent.create_text(ty, uuid.as_bytes()).unwrap();
        let device = made.vfio_device().unwrap();
        self.made.push(made);
        device
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        for made in self.made.drain(..) {
            let outcome = mdev::remove(&self.core, &made, Policy::Disassociate);
            assert_eq!(outcome.wait_for(DEADLINE), Some(Ok(())));
        }
    }
}

fn open(device: &Device) -> Arc<DeviceFile> {
    let opener = Opener {
        pid: 1,
        comm: "test".into(),
        since: std::time::SystemTime::now(),
        node: None,
    };
    device.open_direct(opener, Arc::new(Nowhere)).unwrap()
}

fn at(index: u32, offset: u8) -> RegionPos {
    RegionPos {
        index,
        offset: offset.into(),
    }
}

fn read_all(file: &DeviceFile) -> Vec<u8> {
    let mut stream = Vec::new();
    let mut some = [0; 100];
    loop {
        match file.migration_read(&mut some) {
            Ok(0) | Err(Errno::NOMSG) => return stream,
            Ok(n) => stream.extend(&some[..n]),
            Err(errno) => panic!("{errno}"),
        }
    }
}

#[test]
fn a_client_moves_a_card() {
    let mut bus = Bus::new();
    let (source, target, other) = (bus.card(0), bus.card(0), bus.card(1));
    let (from, to, dual) = (open(&source), open(&target), open(&other));
    assert_eq!(from.migration_flags().unwrap().bits(), 7);
    from.write_region(at(0, reg::SCR), &[0x5a]).unwrap();
    assert_eq!(
        from.set_migration_state(State::PreCopy),
        Ok(Some(DataDirection::Saving))
    );
    let mut stream = read_all(&from);
    // It runs all the while.
    from.write_region(at(0, reg::SCR), &[0xa5]).unwrap();
    from.set_migration_state(State::StopCopy).unwrap();
    stream.extend(read_all(&from));
    assert!(stream.len() as u64 <= to.migration_data_size().unwrap());
    for (file, want) in [(&dual, Err(Errno::INVAL)), (&to, Ok(stream.len()))] {
        file.set_migration_state(State::Resuming).unwrap();
        assert_eq!(file.migration_write(&stream), want);
    }
    assert_eq!(to.set_migration_state(State::Running), Ok(None));
    assert_eq!(dual.set_migration_state(State::Running), Err(Errno::INVAL));
    let mut scratch = [0];
    to.read_region(at(0, reg::SCR), &mut scratch).unwrap();
    assert_eq!(scratch, [0xa5]);
    dual.reset().unwrap();
    assert_eq!(dual.migration_state(), Ok(State::Running));
    for file in [from, to, dual] {
        file.release();
    }
}

/// In every state, a reset and a close leave a card that runs: a byte goes round.
#[test]
fn reset_and_close_in_every_state() {
    let mut bus = Bus::new();
    let device = bus.card(0);
    let mut file = open(&device);
    let works = |file: &DeviceFile| {
        assert_eq!(file.migration_state(), Ok(State::Running));
        file.write_region(at(0, THR), &[7]).unwrap();
        let mut byte = [0];
        file.read_region(at(0, RBR), &mut byte).unwrap();
        assert_eq!(byte, [7]);
    };
    for state in State::ALL
        .into_iter()
        .filter(|state| *state != State::Error)
    {
        file.set_migration_state(state).unwrap();
        file.write_region(at(0, reg::SCR), &[1]).unwrap();
        file.reset().unwrap();
        works(&file);
        file.set_migration_state(state).unwrap();
        file.release();
        file = open(&device);
        works(&file);
    }
    file.release();
}
