use super::State::{Error, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
use super::*;
use crate::Core;
use crate::device::{
    Device, DeviceFile, DeviceInfo, DeviceOps, DmaSpace, GroupType, InitCx, IrqInfo, OpenCx,
    Opener, RegionInfo, RegionPos, Registration, UnregisteredDevice,
};
use crate::irq::SetIrqs;
use crate::model::BusDevice;
use proptest::prelude::*;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use vfio_uapi::device::InfoFlags;

/// A device that remembers a number, with a driver that does as it is told.
struct Cell {
    script: Arc<Script>,
    value: AtomicU64,
}

struct Script {
    p2p: bool,
    pre_copy: bool,
    kind: &'static str,
    version: u32,
    said: Mutex<Vec<&'static str>>,
    /// The call that fails next, and how; `None` panics.
    fail: Mutex<Option<(&'static str, Option<StepError>)>>,
}

impl Script {
    fn new(p2p: bool, pre_copy: bool) -> Script {
        Script {
            p2p,
            pre_copy,
            kind: "cell-1",
            version: 3,
            said: Mutex::default(),
            fail: Mutex::default(),
        }
    }

    fn hears(&self, call: &'static str) -> Result<(), StepError> {
        self.said.lock().unwrap().push(call);
        let mut fail = self.fail.lock().unwrap();
        match *fail {
            Some((failing, how)) if failing == call => {
                *fail = None;
                drop(fail);
                Err(how.unwrap_or_else(|| panic!("the test asked for a panic in {call}")))
            }
            _ => Ok(()),
        }
    }

    fn said(&self) -> Vec<&'static str> {
        std::mem::take(&mut self.said.lock().unwrap())
    }

    fn fail(&self, call: &'static str, how: StepError) {
        *self.fail.lock().unwrap() = Some((call, Some(how)));
    }
}

impl DeviceOps for Cell {
    const NAME: &'static str = "cell";
    type Args = Arc<Script>;
    type Session = ();

    fn init(_cx: &InitCx<'_>, script: Arc<Script>) -> Result<Self> {
        Ok(Cell {
            script,
            value: AtomicU64::new(0),
        })
    }
    fn open(&self, _cx: &OpenCx<'_>) -> Result<()> {
        self.value.store(0, Ordering::SeqCst);
        Ok(())
    }
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            flags: InfoFlags::PCI | InfoFlags::RESET,
            num_regions: 1,
            num_irqs: 0,
        }
    }
    fn region(&self, _index: u32) -> Result<RegionInfo> {
        Ok(RegionInfo::default())
    }
    fn irq(&self, _index: u32) -> Result<IrqInfo> {
        Err(Errno::INVAL)
    }
    fn read(&self, (): &(), _at: RegionPos, buf: &mut [u8]) -> Result<usize> {
        buf.copy_from_slice(&self.value.load(Ordering::SeqCst).to_le_bytes());
        Ok(8)
    }
    fn write(&self, (): &(), _at: RegionPos, data: &[u8]) -> Result<usize> {
        let value = u64::from_le_bytes(data.try_into().map_err(|_| Errno::INVAL)?);
        self.value.store(value, Ordering::SeqCst);
        Ok(8)
    }
    fn set_irqs(&self, (): &(), _request: SetIrqs<'_>) -> Result<u32> {
        Err(Errno::NOTTY)
    }
    fn reset(&self, (): &()) -> Result {
        self.script.hears("reset").map_err(StepError::errno)?;
        self.value.store(0, Ordering::SeqCst);
        Ok(())
    }
    fn migratable(&self) -> Option<&dyn Migratable<()>> {
        Some(self)
    }
}

impl Migratable<()> for Cell {
    fn form(&self) -> Form {
        Form {
            kind: self.script.kind.into(),
            version: self.script.version,
            oldest: 2,
            max_len: 16,
            p2p: self.script.p2p,
            pre_copy: self.script.pre_copy,
        }
    }
    fn stop(&self, (): &()) -> Result<(), StepError> {
        self.script.hears("stop")
    }
    fn resume(&self, (): &()) -> Result<(), StepError> {
        self.script.hears("resume")
    }
    fn pause_p2p(&self, (): &()) -> Result<(), StepError> {
        self.script.hears("pause_p2p")
    }
    fn resume_p2p(&self, (): &()) -> Result<(), StepError> {
        self.script.hears("resume_p2p")
    }
    fn save(&self, (): &()) -> Result<Vec<u8>, StepError> {
        self.script.hears("save")?;
        Ok(self.value.load(Ordering::SeqCst).to_le_bytes().to_vec())
    }
    fn restore(&self, (): &(), _version: u32, state: &[u8]) -> Result<(), StepError> {
        self.script.hears("restore")?;
        let value = u64::from_le_bytes(state.try_into().map_err(|_| Errno::INVAL)?);
        self.value.store(value, Ordering::SeqCst);
        Ok(())
    }
}

struct Nowhere;

impl DmaSpace for Nowhere {
    fn read(&self, _iova: u64, _buf: &mut [u8]) -> Result {
        Err(Errno::NOENT)
    }
    fn write(&self, _iova: u64, _data: &[u8]) -> Result {
        Err(Errno::NOENT)
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

pub(in crate::device) struct Bench {
    pub(in crate::device) registration: Registration,
    pub(in crate::device) file: Arc<DeviceFile>,
    script: Arc<Script>,
}

fn bench_of(script: Script) -> Bench {
    let script = Arc::new(script);
    let core = Core::new(crate::Config::default());
    let parent = BusDevice::new("/devices/virtual/test", "parent", None);
    let made = UnregisteredDevice::<Cell>::alloc(&core, &parent, Arc::clone(&script)).unwrap();
    let registration = made.register(GroupType::Emulated).unwrap();
    let file = open(registration.device());
    Bench {
        registration,
        file,
        script,
    }
}

pub(in crate::device) fn bench() -> Bench {
    bench_of(Script::new(true, true))
}

/// The stream of a device that holds `value`.
pub(in crate::device) fn stream(value: u64) -> Vec<u8> {
    bench().stream(value)
}

impl Bench {
    fn set(&self, to: State) -> Result<Option<DataDirection>> {
        self.file.set_migration_state(to)
    }

    fn state(&self) -> State {
        self.file.migration_state().unwrap()
    }

    fn put(&self, value: u64) {
        assert_eq!(self.file.write(0, &value.to_le_bytes()), Ok(8));
    }

    fn value(&self) -> u64 {
        let mut value = [0; 8];
        assert_eq!(self.file.read(0, &mut value), Ok(8));
        u64::from_le_bytes(value)
    }

    fn read_all(&self) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        loop {
            let mut some = [0; 7];
            match self.file.migration_read(&mut some)? {
                0 => return Ok(all),
                n => all.extend(&some[..n]),
            }
        }
    }

    /// The stream of a device that holds `value`.
    fn stream(&self, value: u64) -> Vec<u8> {
        self.put(value);
        self.set(StopCopy).unwrap();
        let stream = self.read_all().unwrap();
        self.set(Running).unwrap();
        self.script.said();
        stream
    }

    fn reopen(&mut self) {
        self.file.release();
        self.file = open(self.registration.device());
    }
}

#[test]
fn a_device_that_cannot_migrate() {
    let core = Core::new(crate::Config::default());
    let (registration, _) = crate::iommufd::testing::device(&core, "plain", None);
    let file = open(registration.device());
    assert_eq!(file.migration_flags(), Err(Errno::NOTTY));
    assert_eq!(file.migration_state(), Err(Errno::NOTTY));
    assert_eq!(file.set_migration_state(Stop), Err(Errno::NOTTY));
    assert_eq!(file.set_migration_state(Running), Err(Errno::NOTTY));
    assert_eq!(file.migration_data_size(), Err(Errno::NOTTY));
    assert_eq!(file.migration_read(&mut [0]), Err(Errno::NOTTY));
    assert_eq!(file.migration_write(&[0]), Err(Errno::NOTTY));
    assert_eq!(file.reset(), Err(Errno::INVAL), "the driver's own answer");
}

#[test]
fn flags_follow_the_driver() {
    for (p2p, pre_copy, bits) in [
        (false, false, 1),
        (true, false, 3),
        (false, true, 5),
        (true, true, 7),
    ] {
        let bench = bench_of(Script::new(p2p, pre_copy));
        assert_eq!(bench.file.migration_flags().unwrap().bits(), bits);
        assert_eq!(bench.state(), Running);
    }
}

/// Every single arc: what the driver hears, and what session it opens.
#[test]
fn every_arc() {
    use DataDirection::{Resuming as In, Saving as Out};
    for (way, heard, opened) in [
        (&[RunningP2p][..], &["pause_p2p"][..], None),
        (&[RunningP2p, Running], &["resume_p2p"], None),
        (&[RunningP2p, Stop], &["stop"], None),
        (&[Stop, RunningP2p], &["resume"], None),
        (&[Stop, StopCopy], &["save"], Some(Out)),
        (&[StopCopy, Stop], &[], None),
        (&[Stop, Resuming], &[], Some(In)),
        (&[PreCopy], &[], Some(Out)),
        (&[PreCopy, Running], &[], None),
        (&[RunningP2p, PreCopyP2p], &[], Some(Out)),
        (&[PreCopyP2p, RunningP2p], &[], None),
        (&[PreCopy, PreCopyP2p], &["pause_p2p"], None),
        (&[PreCopyP2p, PreCopy], &["resume_p2p"], None),
        (&[PreCopyP2p, StopCopy], &["stop", "save"], None),
    ] {
        let bench = bench();
        let (last, before) = way.split_last().unwrap();
        for state in before {
            bench.set(*state).unwrap();
        }
        bench.script.said();
        assert_eq!(bench.set(*last), Ok(opened), "{way:?}");
        assert_eq!(bench.script.said(), heard, "{way:?}");
        assert_eq!(bench.state(), *last);
        // Asking for the present state does nothing.
        assert_eq!(bench.set(*last), Ok(None));
        assert!(bench.script.said().is_empty());
    }
    // Without P2P there is an arc of its own, and no call for what the device does not have.
    let bench = bench_of(Script::new(false, true));
    bench.set(PreCopy).unwrap();
    assert_eq!(bench.set(StopCopy), Ok(None));
    assert_eq!(bench.script.said(), ["stop", "save"]);
    bench.set(Running).unwrap();
    assert_eq!(bench.script.said(), ["resume"]);
    assert_eq!(bench.set(RunningP2p), Err(Errno::INVAL));
    assert_eq!(bench.state(), Running);
}

#[test]
fn several_hops_and_a_whole_migration() {
    let source = bench();
    source.put(0x1122_3344_5566_7788);
    assert_eq!(source.set(PreCopy), Ok(Some(DataDirection::Saving)));
    assert_eq!(source.file.migration_data_size(), Ok(56 + 16));
    let mut stream = Vec::new();
    let mut some = [0; 20];
    loop {
        match source.file.migration_read(&mut some) {
            Ok(n) => stream.extend(&some[..n]),
            Err(errno) => break assert_eq!(errno, Errno::NOMSG),
        }
    }
    assert_eq!(stream.len(), 48, "what kind of device it is");
    assert_eq!(source.file.migration_read(&mut []), Ok(0));
    source.put(7);
    assert_eq!(source.set(StopCopy), Ok(None), "the session goes on");
    assert_eq!(source.script.said(), ["pause_p2p", "stop", "save"]);
    assert_eq!(source.file.migration_data_size(), Ok(16));
    stream.extend(source.read_all().unwrap());
    assert_eq!(
        source.file.migration_read(&mut some),
        Ok(0),
        "still the end"
    );
    assert_eq!(source.file.migration_write(&[1]), Err(Errno::BADF));

    let target = bench();
    assert_eq!(target.set(Resuming), Ok(Some(DataDirection::Resuming)));
    for part in stream.chunks(5) {
        assert_eq!(target.file.migration_write(part), Ok(part.len()));
    }
    assert_eq!(target.file.migration_read(&mut some), Err(Errno::BADF));
    assert_eq!(target.set(Running), Ok(None));
    assert_eq!(
        target.script.said(),
        ["pause_p2p", "stop", "restore", "resume", "resume_p2p"]
    );
    assert_eq!(target.value(), 7, "as it was when it stopped");

    // Both sessions have ended.
    source.set(Running).unwrap();
    for bench in [&source, &target] {
        assert_eq!(bench.file.migration_read(&mut some), Err(Errno::NODEV));
        assert_eq!(bench.file.migration_write(&[1]), Err(Errno::NODEV));
    }
}

#[test]
fn what_is_no_stream_for_this_device() {
    let whole = bench().stream(42);
    let mut cases: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", Vec::new()),
        ("too much", [&whole[..], &[0]].concat()),
    ];
    for len in 1..whole.len() {
        cases.push(("truncated", whole[..len].to_vec()));
    }
    for at in [0, 8, 12, 16, 40, 48, 55] {
        let mut other = whole.clone();
        other[at] ^= 0x40;
        cases.push(("changed", other));
    }
    for (what, stream) in cases {
        let bench = bench();
        bench.put(1);
        bench.set(Resuming).unwrap();
        let mut written = Ok(0);
        for part in stream.chunks(11) {
            written = written.and_then(|_| bench.file.migration_write(part));
        }
        assert_eq!(
            bench.set(Stop),
            Err(Errno::INVAL),
            "{what} {}",
            stream.len()
        );
        assert_eq!(bench.state(), Resuming, "{what}");
        assert_eq!(bench.value(), 1, "{what}: nothing has changed");
        if what == "truncated" {
            // The rest may still come.
            assert!(written.is_ok());
            bench.file.migration_write(&whole[stream.len()..]).unwrap();
            assert_eq!(bench.set(Running), Ok(None));
            assert_eq!(bench.value(), 42);
        } else if written.is_err() {
            assert_eq!(bench.file.migration_write(&whole), Err(Errno::INVAL));
        }
        bench.file.reset().unwrap();
        assert_eq!(bench.state(), Running);
    }
}

#[test]
fn kinds_and_versions() {
    let stream_of = |version| {
        bench_of(Script {
            version,
            ..Script::new(false, false)
        })
        .stream(5)
    };
    for (version, want) in [
        (1, Err(Errno::INVAL)),
        (2, Ok(())),
        (3, Ok(())),
        (4, Err(Errno::INVAL)),
    ] {
        let target = bench();
        target.set(Resuming).unwrap();
        let written = target.file.migration_write(&stream_of(version));
        assert_eq!(written.map(|_| ()), want, "version {version}");
        assert_eq!(target.set(Stop).map(|_| ()), want);
    }
    let other = bench_of(Script {
        kind: "cell-2",
        ..Script::new(true, true)
    });
    let target = bench();
    target.set(Resuming).unwrap();
    assert_eq!(
        target.file.migration_write(&other.stream(5)),
        Err(Errno::INVAL)
    );
}

#[test]
fn what_is_written_is_bounded() {
    let bench = bench();
    bench.set(Resuming).unwrap();
    assert_eq!(
        bench.file.migration_write(&vec![0; 1 << 20]),
        Err(Errno::NOMEM)
    );
    let stream = self::bench().stream(9);
    assert_eq!(bench.file.migration_write(&stream), Ok(stream.len()));
    assert_eq!(bench.file.migration_write(&[0; 8]), Ok(8));
    assert_eq!(bench.file.migration_write(&[0; 1]), Err(Errno::NOMEM));
}

#[test]
fn a_step_that_fails() {
    const IO: StepError = StepError::Refused(Errno::IO);
    const LOST: StepError = StepError::Broken(Errno::IO);
    let stream = bench().stream(3);
    for (from, to, call, how, left_in) in [
        (Running, StopCopy, "pause_p2p", IO, Running),
        (Running, StopCopy, "stop", IO, RunningP2p),
        (Running, StopCopy, "save", IO, Stop),
        (Running, StopCopy, "save", LOST, Error),
        (Running, Stop, "stop", LOST, Error),
        (Stop, Running, "resume", IO, Stop),
        (Stop, Running, "resume_p2p", IO, RunningP2p),
        (PreCopy, StopCopy, "stop", IO, PreCopyP2p),
        (PreCopy, StopCopy, "save", IO, PreCopyP2p),
        (PreCopy, StopCopy, "save", LOST, Error),
        (Resuming, Running, "restore", IO, Resuming),
        (Resuming, Running, "restore", LOST, Error),
    ] {
        let bench = bench();
        bench.set(from).unwrap();
        if from == Resuming {
            bench.file.migration_write(&stream).unwrap();
        }
        bench.script.fail(call, how);
        assert_eq!(bench.set(to), Err(Errno::IO), "{from} to {to}, {call}");
        assert_eq!(bench.state(), left_in, "{from} to {to}, {call}");
        if left_in == Error {
            for state in State::ALL {
                assert_eq!(
                    bench.set(state),
                    Err(Errno::INVAL),
                    "only a reset leaves ERROR"
                );
            }
            assert_eq!(bench.file.migration_read(&mut [0]), Err(Errno::NODEV));
            bench.file.reset().unwrap();
            assert_eq!(bench.state(), Running);
        } else {
            // It can be tried again.
            assert!(bench.set(to).is_ok(), "{from} to {to}, {call}");
            assert_eq!(bench.state(), to);
        }
    }
    // The device could be stopped and not saved, and does not go on either.
    let bench = bench();
    bench.set(PreCopyP2p).unwrap();
    bench.script.fail("save", IO);
    let script = Arc::clone(&bench.script);
    assert_eq!(bench.set(StopCopy), Err(Errno::IO));
    assert_eq!(script.said(), ["pause_p2p", "stop", "save", "resume"]);
}

#[test]
fn a_driver_that_panics_takes_its_device_down_and_nothing_else() {
    let stream = bench().stream(3);
    for (from, to, call) in [
        (Running, RunningP2p, "pause_p2p"),
        (Running, Stop, "stop"),
        (Stop, Running, "resume"),
        (Running, StopCopy, "save"),
        (PreCopy, StopCopy, "save"),
        (Resuming, Stop, "restore"),
    ] {
        let bench = bench();
        let other = self::bench();
        bench.set(from).unwrap();
        if from == Resuming {
            bench.file.migration_write(&stream).unwrap();
        }
        *bench.script.fail.lock().unwrap() = Some((call, None));
        assert_eq!(bench.set(to), Err(Errno::NODEV), "{call}");
        assert_eq!(bench.file.migration_state(), Err(Errno::NODEV), "{call}");
        assert_eq!(bench.file.reset(), Err(Errno::NODEV));
        assert_eq!(other.set(to).map(|_| ()), Ok(()));
        let Bench {
            registration, file, ..
        } = bench;
        file.release();
        registration.unregister().wait();
    }
}

#[test]
fn reset_in_every_state() {
    for p2p in [false, true] {
        let bench = bench_of(Script::new(p2p, true));
        for state in State::ALL {
            if bench.set(state).is_err() {
                continue;
            }
            bench.put(8);
            bench.script.said();
            bench.file.reset().unwrap();
            assert_eq!(bench.state(), Running, "from {state}");
            assert_eq!(bench.value(), 0);
            let said = bench.script.said();
            assert_eq!(said[0], "reset");
            let stopped = matches!(state, Stop | StopCopy | Resuming);
            assert_eq!(said.contains(&"resume"), stopped, "{state}: {said:?}");
            assert_eq!(bench.file.migration_read(&mut [0]), Err(Errno::NODEV));
            assert_eq!(bench.file.migration_write(&[0]), Err(Errno::NODEV));
            // A reset that is refused changes nothing.
            bench.set(state).unwrap();
            bench.script.fail("reset", StepError::Refused(Errno::INVAL));
            assert_eq!(bench.file.reset(), Err(Errno::INVAL));
            assert_eq!(bench.state(), state);
            bench.file.reset().unwrap();
        }
        // A device that does not go on after a reset is lost, until the next.
        bench.set(Stop).unwrap();
        bench.script.fail("resume", StepError::Refused(Errno::IO));
        assert_eq!(bench.file.reset(), Err(Errno::IO));
        assert_eq!(bench.state(), Error);
        bench.file.reset().unwrap();
        assert_eq!(bench.state(), Running);
    }
}

#[test]
fn close_in_every_state() {
    let mut bench = bench();
    for state in State::ALL {
        if bench.set(state).is_err() {
            continue;
        }
        bench.reopen();
        assert_eq!(bench.state(), Running, "closed in {state}");
        assert_eq!(bench.file.migration_read(&mut [0]), Err(Errno::NODEV));
    }
}

/// What a model of the machine knows.
#[derive(Clone, Copy, Debug)]
struct Model {
    state: State,
    value: u64,
    /// What the session saves: read so far, and the value once it is stopped.
    saving: Option<(usize, Option<u64>)>,
    /// How much of a whole stream has been written.
    resuming: Option<usize>,
}

#[derive(Clone, Debug)]
enum Step {
    Set(State),
    Put(u64),
    Read(usize),
    Write(usize),
    Reset,
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => prop::sample::select(&State::ALL[..]).prop_map(Step::Set),
        2 => any::<u64>().prop_map(Step::Put),
        2 => (0..80usize).prop_map(Step::Read),
        2 => (0..80usize).prop_map(Step::Write),
        1 => Just(Step::Reset),
        1 => Just(Step::Reopen),
    ]
}

const STREAM: usize = 64;

impl Model {
    fn fresh() -> Model {
        Model {
            state: Running,
            value: 0,
            saving: None,
            resuming: None,
        }
    }

    /// One arc, as the contract tells it.
    fn hop(&mut self, to: State) -> Result {
        match (self.state, to) {
            (Running, PreCopy) | (RunningP2p, PreCopyP2p) => self.saving = Some((0, None)),
            (Stop, StopCopy) => self.saving = Some((0, Some(self.value))),
            (PreCopy | PreCopyP2p, StopCopy) => {
                self.saving = self.saving.map(|(read, _)| (read, Some(self.value)));
            }
            (PreCopy, Running) | (PreCopyP2p, RunningP2p) | (StopCopy, Stop) => self.saving = None,
            (Stop, Resuming) => self.resuming = Some(0),
            (Resuming, Stop) => {
                if self.resuming != Some(STREAM) {
                    return Err(Errno::INVAL);
                }
                self.resuming = None;
                self.value = 77;
            }
            _ => {}
        }
        self.state = to;
        Ok(())
    }
}

proptest! {
    #[test]
    fn against_a_model(
        p2p: bool,
        pre_copy: bool,
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let whole = bench().stream(77);
        prop_assert_eq!(whole.len(), STREAM);
        let mut bench = bench_of(Script::new(p2p, pre_copy));
        let flags = bench.file.migration_flags().unwrap();
        let mut model = Model::fresh();
        for step in steps {
            match step {
                Step::Set(to) => {
                    let mut want = arcs::path(model.state, to, flags).map(|_| ());
                    for hop in arcs::path(model.state, to, flags).unwrap_or_default() {
                        want = model.hop(hop);
                        if want.is_err() {
                            break;
                        }
                    }
                    prop_assert_eq!(bench.set(to).map(|_| ()), want);
                }
                Step::Put(value) => {
                    bench.put(value);
                    model.value = value;
                }
                Step::Read(len) => {
                    let mut buf = vec![0; len];
                    let got = bench.file.migration_read(&mut buf);
                    let want = match (model.resuming, &mut model.saving) {
                        (Some(_), _) => Err(Errno::BADF),
                        (None, None) => Err(Errno::NODEV),
                        (None, Some((read, value))) => {
                            let there = if value.is_some() { STREAM } else { 48 };
                            let n = len.min(there - *read);
                            *read += n;
                            if n == 0 && len > 0 && value.is_none() { Err(Errno::NOMSG) } else { Ok(n) }
                        }
                    };
                    prop_assert_eq!(got, want);
                    if let (Ok(n), Some((read, Some(value)))) = (got, model.saving) {
                        let stream = [&whole[..56], &value.to_le_bytes()].concat();
                        prop_assert_eq!(&buf[..n], &stream[read - n..read]);
                    }
                }
                Step::Write(len) => {
                    let written = model.resuming.unwrap_or(0);
                    let part = &whole[written..STREAM.min(written + len)];
                    let got = bench.file.migration_write(part);
                    let want = match (&mut model.resuming, model.saving) {
                        (Some(written), _) => {
                            *written += part.len();
                            Ok(part.len())
                        }
                        (None, Some(_)) => Err(Errno::BADF),
                        (None, None) => Err(Errno::NODEV),
                    };
                    prop_assert_eq!(got, want);
                }
                Step::Reset => {
                    bench.file.reset().unwrap();
                    model = Model::fresh();
                }
                Step::Reopen => {
                    bench.reopen();
                    model = Model::fresh();
                }
            }
            prop_assert_eq!(bench.state(), model.state);
            prop_assert_eq!(bench.value(), model.value);
        }
    }
}

/// A reset that arrives in the midst of a step comes after it.
#[test]
fn resets_against_steps() {
    let bench = bench();
    std::thread::scope(|scope| {
        let resets = scope.spawn(|| {
            for _ in 0..500 {
                bench.file.reset().unwrap();
            }
        });
        let mut n = 0;
        while !resets.is_finished() {
            let _ = bench.set([StopCopy, Running, PreCopy, RunningP2p][n % 4]);
            n += 1;
        }
    });
    bench.file.reset().unwrap();
    assert_eq!(bench.state(), Running);
    // Every stop was followed by a resume: it does run.
    let said = bench.script.said();
    let mut running = true;
    for call in said {
        match call {
            "stop" => running = false,
            "resume" => running = true,
            _ => {}
        }
    }
    assert!(running);
}
