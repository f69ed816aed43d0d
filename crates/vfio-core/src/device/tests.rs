use super::shared::Session;
use super::*;
use crate::event::{Notice, What};
use crate::irq::SetIrqs;
use crate::model::BusDevice;
use crate::{Config, Core, Errno, Result};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::time::{Duration, Instant};
use vfio_uapi::device::{InfoFlags, IrqFlags, RegionFlags};

/// Longer than anything here takes, shorter than a test run's patience.
const SOON: Duration = Duration::from_secs(10);

/// What a test sees of its driver, and tells it.
#[derive(Default)]
struct Script {
    log: Mutex<Vec<String>>,
    released: AtomicU32,
    panic_in: Mutex<Option<&'static str>>,
    fail_init: AtomicBool,
    set_key: Mutex<Option<u64>>,
    /// Runs inside the driver's release.
    in_release: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    /// A read waits here.
    gate: Mutex<Option<Arc<Barrier>>>,
}

impl Script {
    fn say(&self, what: impl Into<String>) {
        self.log.lock().unwrap().push(what.into());
    }

    fn said(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    fn maybe_panic(&self, callback: &'static str) {
        if *self.panic_in.lock().unwrap() == Some(callback) {
            panic!("the test asked for a panic in {callback}");
        }
    }
}

struct Probe(Arc<Script>);

impl Drop for Probe {
    fn drop(&mut self) {
        self.0.released.fetch_add(1, Ordering::SeqCst);
        self.0.say("release");
        if let Some(f) = self.0.in_release.lock().unwrap().take() {
            f();
        }
    }
}

impl DeviceOps for Probe {
    const NAME: &'static str = "probe";
    type Args = Arc<Script>;
    type Session = ();

    fn init(cx: &InitCx<'_>, script: Arc<Script>) -> Result<Self> {
        if let Some(key) = *script.set_key.lock().unwrap() {
            cx.assign_device_set(key)?;
            assert_eq!(
                cx.assign_device_set(key),
                Err(Errno::INVAL),
                "in a set already"
            );
        }
        script.maybe_panic("init");
        if script.fail_init.load(Ordering::SeqCst) {
            return Err(Errno::NOSPC);
        }
        script.say("init");
        Ok(Probe(script))
    }

    fn open(&self, _cx: &OpenCx<'_>) -> Result<()> {
        self.0.maybe_panic("open");
        self.0.say("open");
        Ok(())
    }

    fn close(&self, (): ()) {
        self.0.maybe_panic("close");
        self.0.say("close");
    }

    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            flags: InfoFlags::PCI,
            num_regions: 1,
            num_irqs: 1,
        }
    }

    fn region(&self, _index: u32) -> Result<RegionInfo> {
        let flags = RegionFlags::READ | RegionFlags::WRITE;
        Ok(RegionInfo {
            size: 8,
            flags,
            caps: Vec::new(),
        })
    }

    fn irq(&self, _index: u32) -> Result<IrqInfo> {
        Ok(IrqInfo {
            flags: IrqFlags::EVENTFD,
            count: 1,
        })
    }

    fn read(&self, (): &(), _at: RegionPos, buf: &mut [u8]) -> Result<usize> {
        self.0.maybe_panic("read");
        let gate = self.0.gate.lock().unwrap().clone();
        if let Some(gate) = gate {
            gate.wait();
            gate.wait();
        }
        self.0.say("read");
        Ok(buf.len())
    }

    fn write(&self, (): &(), _at: RegionPos, data: &[u8]) -> Result<usize> {
        Ok(data.len())
    }

    fn set_irqs(&self, (): &(), _request: SetIrqs<'_>) -> Result<u32> {
        Err(Errno::NOTTY)
    }

    fn request(&self, session: Option<&()>, count: u32) -> RequestChannel {
        self.0.say(format!(
            "request {count} {}",
            if session.is_some() { "open" } else { "unbound" }
        ));
        RequestChannel::None
    }
}

fn core() -> Core {
    Core::new(Config {
        request_interval: Duration::from_millis(5),
        ..Config::default()
    })
}

fn parent() -> Arc<BusDevice> {
    BusDevice::new("/devices/virtual/test", "parent", None)
}

fn alloc(core: &Core, script: &Arc<Script>) -> UnregisteredDevice<Probe> {
    UnregisteredDevice::alloc(core, &parent(), Arc::clone(script)).unwrap()
}

fn register(core: &Core, script: &Arc<Script>) -> Registration {
    alloc(core, script).register(GroupType::Emulated).unwrap()
}

fn opener() -> Opener {
    Opener {
        pid: 1,
        comm: "test".into(),
        since: std::time::SystemTime::now(),
        node: None,
    }
}

/// What BIND does, without an address space.
fn bind(file: &DeviceFile) -> Result {
    let device = file.unbound()?;
    let session: Arc<dyn Session> = Arc::clone(&device.0).open(false, &mut || Ok(None))?;
    file.give(session)
}

fn until(what: &str, f: impl Fn() -> bool) {
    let end = Instant::now() + SOON;
    while !f() {
        assert!(Instant::now() < end, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn the_whole_life_in_order() {
    let core = core();
    let script = Arc::new(Script::default());
    let (sender, events) = mpsc::channel();
    let sender = Mutex::new(sender);
    let _events = core.subscribe(move |notice| {
        if let Notice::Event(event) = notice {
            sender.lock().unwrap().send(event.what.clone()).unwrap();
        }
    });
    let unregistered = alloc(&core, &script);
    assert!(core.device(0).is_none(), "nobody sees it before register");
    let registration = unregistered.register(GroupType::Emulated).unwrap();
    assert_eq!(registration.device().name(), "vfio0");
    let file = registration.device().open_cdev(opener()).unwrap();
    bind(&file).unwrap();
    file.release();
    drop(file);
    registration.unregister().wait();
    assert_eq!(script.said(), ["init", "open", "close", "release"]);
    assert_eq!(
        events.try_iter().collect::<Vec<_>>(),
        [
            What::Allocated,
            What::Registered,
            What::Opened,
            What::Bound,
            What::Unbound,
            What::Closed,
            What::Unregistering { users: 0 },
            What::Unregistered,
            What::Released,
        ]
    );
}

#[test]
fn a_failed_init_leaves_no_trace() {
    let core = core();
    let script = Arc::new(Script::default());
    script.fail_init.store(true, Ordering::SeqCst);
    *script.set_key.lock().unwrap() = Some(7);
    let failed = UnregisteredDevice::<Probe>::alloc(&core, &parent(), Arc::clone(&script));
    assert_eq!(failed.unwrap_err(), Errno::NOSPC);
    assert_eq!(
        script.released.load(Ordering::SeqCst),
        0,
        "release is not for a failed init"
    );
    assert_eq!(core.sets().len(), 0, "the set assignment is undone");
    script.fail_init.store(false, Ordering::SeqCst);
    assert_eq!(
        register(&core, &script).device().index(),
        0,
        "the number is free again"
    );
}

#[test]
fn a_panicking_init_is_an_error() {
    let core = core();
    let script = Arc::new(Script::default());
    *script.panic_in.lock().unwrap() = Some("init");
    let failed = UnregisteredDevice::<Probe>::alloc(&core, &parent(), Arc::clone(&script));
    assert_eq!(failed.unwrap_err(), Errno::IO);
}

#[test]
fn never_registered_needs_only_its_put() {
    let core = core();
    let script = Arc::new(Script::default());
    drop(alloc(&core, &script));
    assert_eq!(script.said(), ["init", "release"]);
}

#[test]
fn a_failed_register_gives_the_device_back() {
    let core = core();
    let script = Arc::new(Script::default());
    let parent = parent();
    let first = UnregisteredDevice::<Probe>::alloc(&core, &parent, Arc::clone(&script)).unwrap();
    let (first, errno) = first.register(GroupType::Physical).unwrap_err();
    assert_eq!(
        errno,
        Errno::INVAL,
        "a physical device needs its bus's group"
    );
    let first = first.register(GroupType::Emulated).unwrap();
    let second = UnregisteredDevice::<Probe>::alloc(&core, &parent, Arc::clone(&script)).unwrap();
    let (second, errno) = second.register(GroupType::Emulated).unwrap_err();
    assert_eq!(errno, Errno::INVAL, "one VFIO device per parent");
    assert_eq!(script.released.load(Ordering::SeqCst), 0);
    drop(second);
    assert_eq!(script.released.load(Ordering::SeqCst), 1);
    first.unregister().wait();
    assert_eq!(script.released.load(Ordering::SeqCst), 2);
    assert!(
        parent.iommu_group().is_none(),
        "it has left the group made for it"
    );
    assert!(core.iommu_groups().all().is_empty());
}

#[test]
fn numbers_are_the_lowest_free_and_taken_until_after_release() {
    let core = core();
    let script = Arc::new(Script::default());
    let zero = register(&core, &script);
    let one = register(&core, &Arc::new(Script::default()));
    assert_eq!((zero.device().index(), one.device().index()), (0, 1));
    let inside = core.clone();
    let (sender, seen) = mpsc::channel();
    *script.in_release.lock().unwrap() = Some(Box::new(move || {
        let other = alloc(&inside, &Arc::new(Script::default()));
        sender.send(other.index()).unwrap();
    }));
    zero.unregister().wait();
    assert_eq!(
        seen.recv().unwrap(),
        2,
        "0 is still taken while release runs"
    );
    assert_eq!(alloc(&core, &Arc::new(Script::default())).index(), 0);
}

#[test]
fn names_go_the_moment_unregister_starts() {
    let core = core();
    let script = Arc::new(Script::default());
    let registration = register(&core, &script);
    let device = registration.device().clone();
    let file = device.open_cdev(opener()).unwrap();
    let unregistering = registration.unregister();
    assert!(core.device(0).is_none());
    assert!(core.device_by_name("vfio0").is_none());
    assert!(device.parent().vfio_device().is_none());
    assert!(
        device.parent().iommu_group().is_some(),
        "the group unit goes at the end"
    );
    assert_eq!(device.open_cdev(opener()).unwrap_err(), Errno::NODEV);
    assert_eq!(
        bind(&file),
        Ok(()),
        "a file that is open keeps working in full"
    );
    assert_eq!(file.read(0, &mut [0; 4]), Ok(4));
    assert!(!unregistering.is_done());
    drop(file);
    assert!(unregistering.is_done());
    assert!(device.parent().iommu_group().is_none());
    assert_eq!(device.life(), Life::Unregistered);
}

#[test]
fn wait_asks_until_the_last_user_leaves() {
    let core = core();
    let script = Arc::new(Script::default());
    let registration = register(&core, &script);
    let file = registration.device().open_cdev(opener()).unwrap();
    let (done, finished) = mpsc::channel();
    let waiter = std::thread::spawn(move || {
        registration.unregister().wait();
        done.send(()).unwrap();
    });
    until("three requests", || script.log.lock().unwrap().len() >= 4);
    assert!(finished.try_recv().is_err(), "it waits");
    drop(file);
    finished.recv_timeout(SOON).unwrap();
    waiter.join().unwrap();
    let said = script.said();
    assert_eq!(
        said[..4],
        [
            "init",
            "request 0 unbound",
            "request 1 unbound",
            "request 2 unbound"
        ]
    );
    assert_eq!(said.last().unwrap(), "release");
}

#[test]
fn wait_then_disassociate() {
    let core = core();
    let script = Arc::new(Script::default());
    let registration = register(&core, &script);
    let file = registration.device().open_cdev(opener()).unwrap();
    bind(&file).unwrap();
    let left = registration
        .unregister()
        .wait_for(Duration::from_millis(30));
    assert!(!left, "they were cut off");
    assert_eq!(file.read(0, &mut [0; 4]), Err(Errno::NODEV));
    assert_eq!(
        script.released.load(Ordering::SeqCst),
        1,
        "an open file keeps nothing alive"
    );
    let said = script.said();
    assert_eq!(said[said.len() - 2..], ["close", "release"]);
    assert!(said.iter().any(|line| line == "request 1 open"));

    let script = Arc::new(Script::default());
    let registration = register(&core, &script);
    assert!(
        registration.unregister().wait_for(Duration::from_secs(60)),
        "nobody to wait for"
    );
}

#[test]
fn disassociate_returns_with_users_inside_a_call() {
    let core = core();
    let script = Arc::new(Script::default());
    let registration = register(&core, &script);
    let file = registration.device().open_cdev(opener()).unwrap();
    bind(&file).unwrap();
    let gate = Arc::new(Barrier::new(2));
    *script.gate.lock().unwrap() = Some(Arc::clone(&gate));
    let reader = std::thread::spawn({
        let file = Arc::clone(&file);
        move || file.read(0, &mut [0; 4])
    });
    gate.wait();
    registration.unregister().disassociate();
    assert_eq!(file.write(0, &[0]), Err(Errno::NODEV));
    assert_eq!(
        script.released.load(Ordering::SeqCst),
        0,
        "not under a call in progress"
    );
    gate.wait();
    assert_eq!(reader.join().unwrap(), Ok(4), "what had begun ends");
    until("release", || script.released.load(Ordering::SeqCst) == 1);
    let said = script.said();
    assert_eq!(said[said.len() - 3..], ["read", "close", "release"]);
}

#[test]
fn proceed_never_blocks_and_calls_back_once() {
    let core = core();
    let script = Arc::new(Script::default());
    let registration = register(&core, &script);
    let file = registration.device().open_cdev(opener()).unwrap();
    let ended = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&ended);
    let pending = registration.unregister().proceed(Policy::Wait, move || {
        count.fetch_add(1, Ordering::SeqCst);
    });
    assert!(!pending.is_done());
    assert_eq!(ended.load(Ordering::SeqCst), 0);
    pending.disassociate();
    assert!(pending.is_done());
    pending.disassociate();
    drop(file);
    assert_eq!(ended.load(Ordering::SeqCst), 1);
}

#[test]
fn dropping_a_registration_cuts_off_and_waits_for_nobody() {
    let core = core();
    let script = Arc::new(Script::default());
    let registration = register(&core, &script);
    let file = registration.device().open_cdev(opener()).unwrap();
    drop(registration);
    assert_eq!(bind(&file), Err(Errno::NODEV));
    assert_eq!(script.released.load(Ordering::SeqCst), 1);
    drop(file);
    assert_eq!(script.released.load(Ordering::SeqCst), 1);
}

#[test]
fn open_grants_nothing_before_bind_and_only_one_file_binds() {
    let core = core();
    let script = Arc::new(Script::default());
    let registration = register(&core, &script);
    let device = registration.device();
    let first = device.open_cdev(opener()).unwrap();
    let second = device.open_cdev(opener()).unwrap();
    assert_eq!(device.users(), 2);
    assert_eq!(first.read(0, &mut [0; 4]), Err(Errno::INVAL));
    assert_eq!(first.write(0, &[]), Err(Errno::INVAL));
    bind(&first).unwrap();
    assert_eq!(bind(&first), Err(Errno::INVAL));
    assert_eq!(bind(&second), Err(Errno::INVAL));
    assert_eq!(first.read(0, &mut [0; 4]), Ok(4));
    assert_eq!(
        first.read(1 << 40, &mut [0; 4]),
        Err(Errno::INVAL),
        "past the last region"
    );
    assert_eq!(second.read(0, &mut [0; 4]), Err(Errno::INVAL));
    first.release();
    assert_eq!(first.read(0, &mut [0; 4]), Err(Errno::NODEV));
    bind(&second).unwrap();
    assert_eq!(script.said(), ["init", "open", "read", "close", "open"]);
}

#[test]
fn a_panic_kills_its_device_and_nothing_else() {
    for callback in ["open", "read", "close"] {
        let core = core();
        let script = Arc::new(Script::default());
        let other = Arc::new(Script::default());
        let registration = register(&core, &script);
        let neighbour = register(&core, &other);
        let theirs = neighbour.device().open_cdev(opener()).unwrap();
        bind(&theirs).unwrap();
        let file = registration.device().open_cdev(opener()).unwrap();
        *script.panic_in.lock().unwrap() = Some(callback);
        match callback {
            "open" => assert_eq!(bind(&file), Err(Errno::NODEV)),
            "read" => {
                bind(&file).unwrap();
                assert_eq!(file.read(0, &mut [0; 4]), Err(Errno::NODEV));
            }
            _ => bind(&file).unwrap(),
        }
        file.release();
        assert_eq!(registration.device().life(), Life::Dead, "{callback}");
        assert_eq!(
            registration.device().open_cdev(opener()).unwrap_err(),
            Errno::NODEV
        );
        assert_eq!(theirs.read(0, &mut [0; 4]), Ok(4));
        registration.unregister().wait();
        assert_eq!(script.released.load(Ordering::SeqCst), 1, "{callback}");
    }
}

#[test]
fn a_panicking_release_still_gives_the_number_back() {
    let core = core();
    let script = Arc::new(Script::default());
    *script.in_release.lock().unwrap() = Some(Box::new(|| panic!("in release")));
    register(&core, &script).unregister().wait();
    assert_eq!(alloc(&core, &Arc::new(Script::default())).index(), 0);
}

#[test]
fn a_device_in_somebody_elses_structure() {
    let core = core();
    let slot = ReleaseSlot::new();
    let script = Arc::new(Script::default());
    let alloc_in = |script: &Arc<Script>| {
        UnregisteredDevice::<Probe>::alloc_in(&core, &slot, &parent(), Arc::clone(script))
    };
    script.fail_init.store(true, Ordering::SeqCst);
    assert_eq!(alloc_in(&script).unwrap_err(), Errno::NOSPC);
    assert!(slot.is_vacant(), "a failed init gives the place back");
    script.fail_init.store(false, Ordering::SeqCst);
    let registration = alloc_in(&script)
        .unwrap()
        .register(GroupType::Emulated)
        .unwrap();
    let device = registration.device().clone();
    assert_eq!(alloc_in(&script).unwrap_err(), Errno::BUSY);
    registration.unregister().wait();
    assert_eq!(
        alloc_in(&script).unwrap_err(),
        Errno::BUSY,
        "unregistered is not released"
    );
    let owner = std::thread::spawn({
        let slot = Arc::clone(&slot);
        let script = Arc::clone(&script);
        move || {
            slot.wait_vacant();
            script.released.load(Ordering::SeqCst)
        }
    });
    drop(device);
    assert_eq!(
        owner.join().unwrap(),
        1,
        "the owner wakes after release, not before"
    );
    drop(alloc_in(&script).unwrap());
}

#[test]
fn devices_of_one_set_open_one_after_the_other() {
    let core = core();
    let scripts: Vec<_> = (0..2).map(|_| Arc::new(Script::default())).collect();
    for script in &scripts {
        *script.set_key.lock().unwrap() = Some(42);
    }
    let registrations: Vec<_> = scripts
        .iter()
        .map(|script| register(&core, script))
        .collect();
    assert_eq!(core.sets().len(), 1);
    let first = &registrations[0].device().head();
    let second = &registrations[1].device().head();
    assert!(first.set_membership().same(second.set_membership()));
    let held = first.set_membership().lock();
    let file = registrations[1].device().open_cdev(opener()).unwrap();
    let binder = std::thread::spawn({
        let file = Arc::clone(&file);
        move || bind(&file)
    });
    std::thread::sleep(Duration::from_millis(20));
    assert!(!file.is_bound(), "the set is locked");
    drop(held);
    binder.join().unwrap().unwrap();
    drop(file);
    drop(registrations);
    assert_eq!(core.sets().len(), 0);
}

#[test]
fn thousands_of_times_nothing_is_left() {
    let core = core();
    let parent = parent();
    for _ in 0..2000 {
        let script = Arc::new(Script::default());
        let device =
            UnregisteredDevice::<Probe>::alloc(&core, &parent, Arc::clone(&script)).unwrap();
        let registration = device.register(GroupType::Emulated).unwrap();
        let file = registration.device().open_cdev(opener()).unwrap();
        let closer = std::thread::spawn(move || drop(file));
        registration.unregister().wait();
        assert_eq!(
            script.released.load(Ordering::SeqCst),
            1,
            "release before wait returns"
        );
        closer.join().unwrap();
    }
    assert_eq!(Arc::strong_count(&parent), 1);
    assert_eq!(alloc(&core, &Arc::new(Script::default())).index(), 0);
}

mod random {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Step {
        Alloc,
        Register,
        Open,
        Bind(usize),
        Close(usize),
        Unregister,
        Disassociate,
        PutReference,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            Just(Step::Alloc),
            Just(Step::Register),
            Just(Step::Open),
            (0..4usize).prop_map(Step::Bind),
            (0..4usize).prop_map(Step::Close),
            Just(Step::Unregister),
            Just(Step::Disassociate),
            Just(Step::PutReference),
        ]
    }

    proptest! {
        /// Any order of steps that the types allow: the driver's callbacks pair up, release runs
        /// once and last, and only when nobody holds anything.
        #[test]
        fn against_a_model(steps in prop::collection::vec(step(), 1..60)) {
            let core = core();
            let script = Arc::new(Script::default());
            let mut unregistered = None;
            let mut registration: Option<Registration> = None;
            let mut pending: Option<Pending> = None;
            let mut reference: Option<Device> = None;
            let mut files: Vec<Arc<DeviceFile>> = Vec::new();
            let mut bound: Option<usize> = None;
            let (mut dead, mut lives, mut opens) = (false, 0, 0);
            for step in steps {
                match step {
                    Step::Alloc if unregistered.is_none()
                        && registration.is_none()
                        && reference.is_none()
                        && files.is_empty() =>
                    {
                        unregistered = Some(alloc(&core, &script));
                        lives += 1;
                        dead = false;
                    }
                    Step::Register => if let Some(device) = unregistered.take() {
                        let device = device.register(GroupType::Emulated).unwrap();
                        reference = Some(device.device().clone());
                        registration = Some(device);
                    },
                    Step::Open => if let Some(device) = &reference {
                        let opened = device.open_cdev(opener());
                        prop_assert_eq!(opened.is_ok(), registration.is_some());
                        files.extend(opened);
                    },
                    Step::Bind(n) => if let Some(file) = files.get(n) {
                        let result = bind(file);
                        if dead {
                            prop_assert_eq!(result, Err(Errno::NODEV));
                        } else if bound.is_some() {
                            prop_assert_eq!(result, Err(Errno::INVAL));
                        } else {
                            prop_assert_eq!(result, Ok(()));
                            bound = Some(n);
                            opens += 1;
                        }
                    },
                    Step::Close(n) if n < files.len() => {
                        files.remove(n).release();
                        bound = match bound {
                            Some(b) if b == n => None,
                            Some(b) if b > n => Some(b - 1),
                            other => other,
                        };
                    },
                    Step::Unregister => if let Some(device) = registration.take() {
                        pending = Some(device.unregister().proceed(Policy::Wait, || {}));
                    },
                    Step::Disassociate => if let Some(pending) = &pending {
                        if !pending.is_done() {
                            dead = true;
                            bound = None;
                        }
                        pending.disassociate();
                    },
                    Step::PutReference if registration.is_none() => reference = None,
                    _ => {}
                }
                if let Some(pending) = &pending {
                    prop_assert_eq!(pending.is_done(), files.is_empty() || dead);
                }
                let alive = unregistered.is_some() || registration.is_some() || reference.is_some()
                    || (!files.is_empty() && !dead);
                // The asking thread may hold a reference for the length of one request.
                let released = || script.released.load(Ordering::SeqCst);
                if alive {
                    prop_assert_eq!(released(), lives - 1);
                } else if lives > 0 {
                    until("release", || released() == lives);
                }
                if reference.is_none() && registration.is_none() {
                    pending = pending.take().filter(|pending| !pending.is_done());
                }
                if !alive && dead {
                    files.clear();
                }
            }
            drop((files, registration, unregistered, reference, pending));
            until("the end", || script.released.load(Ordering::SeqCst) == lives);
            let said = script.said();
            let count = |what: &str| said.iter().filter(|line| *line == what).count();
            prop_assert_eq!(count("open"), opens);
            prop_assert_eq!(count("close"), opens);
            prop_assert_eq!(count("release") as u32, lives);
        }
    }
}

struct NoMemory;

impl DmaSpace for NoMemory {
    fn read(&self, _iova: u64, _buf: &mut [u8]) -> Result {
        Err(Errno::NOENT)
    }
    fn write(&self, _iova: u64, _data: &[u8]) -> Result {
        Err(Errno::NOENT)
    }
}

fn open_direct(device: &Device) -> Result<Arc<DeviceFile>> {
    device.open_direct(opener(), Arc::new(NoMemory))
}

#[test]
fn a_direct_file_is_bound_and_alone() {
    let core = core();
    let script = Arc::new(Script::default());
    let registration = register(&core, &script);
    let device = registration.device();
    let unbound = device.open_cdev(opener()).unwrap();
    let file = open_direct(device).unwrap();
    assert!(file.is_bound());
    assert_eq!(device.users(), 2);
    assert_eq!(open_direct(device).unwrap_err(), Errno::BUSY);
    assert_eq!(bind(&unbound), Err(Errno::INVAL), "as for any open device");
    let at = |index| RegionPos { index, offset: 0 };
    assert_eq!(file.read_region(at(0), &mut [0; 4]), Ok(4));
    assert_eq!(file.write_region(at(0), &[0; 4]), Ok(4));
    assert_eq!(file.read_region(at(1), &mut [0; 4]), Err(Errno::INVAL));
    assert_eq!(file.write_region(at(1), &[0; 4]), Err(Errno::INVAL));
    file.release();
    assert_eq!(bind(&unbound), Ok(()));
    assert_eq!(open_direct(device).unwrap_err(), Errno::BUSY);
    drop(unbound);
    drop(file);
    registration.unregister().wait();
    assert_eq!(
        script.said(),
        ["init", "open", "read", "close", "open", "close", "release"]
    );
}

#[test]
fn a_file_that_is_cut_off_tells_its_transport_once() {
    let core = core();
    let script = Arc::new(Script::default());
    let registration = register(&core, &script);
    let told = Arc::new(AtomicU32::new(0));
    let tell = |file: &DeviceFile| {
        let told = Arc::clone(&told);
        file.on_cut_off(move || {
            told.fetch_add(1, Ordering::SeqCst);
        });
    };
    let closed = open_direct(registration.device()).unwrap();
    tell(&closed);
    drop(closed);
    assert_eq!(told.load(Ordering::SeqCst), 0, "a close is no cut");
    let file = open_direct(registration.device()).unwrap();
    tell(&file);
    *script.panic_in.lock().unwrap() = Some("read");
    let at = RegionPos {
        index: 0,
        offset: 0,
    };
    assert_eq!(file.read_region(at, &mut [0]), Err(Errno::NODEV));
    assert_eq!(told.load(Ordering::SeqCst), 1);
    tell(&file);
    assert_eq!(told.load(Ordering::SeqCst), 2, "at once: it has been cut");
    registration.unregister().disassociate();
    assert_eq!(told.load(Ordering::SeqCst), 2);
}
