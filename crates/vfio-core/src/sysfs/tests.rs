use super::*;
use crate::Config;
use crate::device::{GroupType, Policy};
use crate::model::testing::*;
use crate::model::{BusOptions, ReservedKind, ReservedRegion, Subsystem, X86_MSI, faux};

/// Everything below a directory, one line each: modes, contents, links.
fn dump(sysfs: &Sysfs, path: &str) -> String {
    let mut lines = Vec::new();
    let node = sysfs.walk(path).unwrap();
    visit(sysfs, &node, path, &mut lines);
    lines.sort();
    lines.join("\n") + "\n"
}

fn visit(sysfs: &Sysfs, node: &Node, path: &str, lines: &mut Vec<String>) {
    for (name, node) in sysfs.entries(node) {
        let path = format!("{path}/{name}");
        let mode = sysfs.mode(&node);
        let line = match sysfs.kind(&node) {
            Kind::Dir => {
                visit(sysfs, &node, &path, lines);
                format!("{path}/ {mode:o}")
            }
            Kind::Link => {
                let target = sysfs.walk(&path).unwrap();
                assert_eq!(sysfs.kind(&target), Kind::Dir, "{path} dangles");
                format!("{path} -> {}", sysfs.readlink(&node).unwrap())
            }
            Kind::Attr => match sysfs.show(&node) {
                Ok(text) => format!("{path} {mode:o} {:?}", String::from_utf8(text).unwrap()),
                Err(errno) => {
                    assert_eq!((errno, mode), (Errno::ACCESS, 0o200), "{path}");
                    format!("{path} {mode:o}")
                }
            },
        };
        lines.push(line);
        assert!(sysfs.walk(&path).is_ok(), "{path} cannot be looked up");
    }
}

struct World {
    core: Core,
    sysfs: Sysfs,
}

impl World {
    fn new() -> World {
        World::with(Config::default())
    }

    fn with(config: Config) -> World {
        let core = core_with(config);
        let sysfs = Sysfs::new(&core);
        World { core, sysfs }
    }

    fn write(&self, path: &str, data: impl AsRef<[u8]>) -> Result<usize> {
        match self.sysfs.store(&self.sysfs.walk(path)?, data.as_ref()) {
            Store::Done(result) => result,
            Store::Waiting(waiting) => panic!("{path}: {}", waiting.describe()),
        }
    }

    fn write_waits(&self, path: &str, data: &str) -> StoreWaiting {
        let node = self.sysfs.walk(path).unwrap();
        match self.sysfs.store(&node, data.as_bytes()) {
            Store::Done(result) => panic!("{path} does not wait: {result:?}"),
            Store::Waiting(waiting) => waiting,
        }
    }

    fn read(&self, path: &str) -> Result<String> {
        let text = self.sysfs.show(&self.sysfs.walk(path)?)?;
        Ok(String::from_utf8(text).unwrap())
    }

    fn list(&self, path: &str) -> Vec<String> {
        let mut names: Vec<String> = self
            .sysfs
            .entries(&self.sysfs.walk(path).unwrap())
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        names.sort();
        names
    }

    fn has(&self, path: &str) -> bool {
        self.sysfs.walk(path).is_ok()
    }
}

const MTTY: &str = "/devices/virtual/mtty/mtty";
const CREATE: &str = "/devices/virtual/mtty/mtty/mdev_supported_types/mtty-1/create";
const CREATE2: &str = "/devices/virtual/mtty/mtty/mdev_supported_types/mtty-2/create";
const VGA: &str = "/class/mdev_bus/mdpy/mdev_supported_types/mdpy-vga";

fn mdev(uuid: &str) -> String {
    format!("/bus/mdev/devices/{uuid}")
}

#[test]
fn the_whole_tree() {
    let world = World::new();
    serial(&world.core);
    display(&world.core);
    world.write(CREATE, UUID).unwrap();
    let text = dump(&world.sysfs, "");
    for (made, golden) in text.lines().zip(include_str!("golden.txt").lines()) {
        assert_eq!(made, golden);
    }
    assert_eq!(text, include_str!("golden.txt"));
}

#[test]
fn inodes_are_unique_and_stable() {
    fn collect(sysfs: &Sysfs, node: &Node, all: &mut Vec<u64>) {
        all.push(sysfs.ino(node));
        for (_, node) in sysfs.entries(node) {
            collect(sysfs, &node, all);
        }
    }
    let world = World::new();
    serial(&world.core);
    world.write(CREATE, UUID).unwrap();
    let (mut all, mut again) = (Vec::new(), Vec::new());
    collect(&world.sysfs, &world.sysfs.root(), &mut all);
    collect(&world.sysfs, &world.sysfs.root(), &mut again);
    assert_eq!(all, again);
    let before = world.sysfs.ino(&world.sysfs.walk(&mdev(UUID)).unwrap());
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), again.len());
    // The same path on another device is another file.
    world.write(&format!("{}/remove", mdev(UUID)), "1").unwrap();
    world.write(CREATE, UUID).unwrap();
    assert_ne!(
        world.sysfs.ino(&world.sysfs.walk(&mdev(UUID)).unwrap()),
        before
    );
}

#[test]
fn without_char_devices() {
    let world = World::with(Config {
        cdev: false,
        ..Config::default()
    });
    serial(&world.core);
    let uevents = Log::uevents(&world.core);
    world.write(CREATE, UUID).unwrap();
    let dir = format!("{}/vfio-dev/vfio0", mdev(UUID));
    assert_eq!(world.list(&dir), ["device", "subsystem", "uevent"]);
    assert_eq!(world.read(&format!("{dir}/uevent")).unwrap(), "");
    // Groups and misc devices have their own.
    assert_eq!(world.list("/dev/char"), ["10:127", "10:196", "510:0"]);
    assert!(!world.has("/dev/char/511:0"));
    assert_eq!(world.list("/class/vfio-dev"), ["vfio0"]);
    let vfio = format!("add {MTTY}/{UUID}/vfio-dev/vfio0 vfio-dev");
    assert!(uevents.take().contains(&vfio), "no node, no variables");
}

#[test]
fn a_group_and_its_places() {
    let world = World::new();
    serial(&world.core);
    let uevents = Log::uevents(&world.core);
    world.write(CREATE, UUID).unwrap();
    let group = world.core.group(0).unwrap();
    assert_eq!(group.name(), "0");
    assert!(
        uevents
            .take()
            .contains(&"add /devices/virtual/vfio/0 vfio MAJOR=510 MINOR=0 DEVNAME=vfio/0".into())
    );
    world.write("/class/vfio/0/uevent", "change").unwrap();
    assert_eq!(
        uevents.take(),
        ["change /devices/virtual/vfio/0 vfio SYNTH_UUID=0 MAJOR=510 MINOR=0 DEVNAME=vfio/0"]
    );
    let held = world.sysfs.walk("/dev/char/510:0").unwrap();
    assert_eq!(held.to_string(), "/devices/virtual/vfio/0");
    for none in [
        "/class/vfio/00",
        "/class/vfio/+0",
        "/class/vfio/vfio0",
        "/class/vfio/1",
        "/dev/char/510:00",
        "/dev/char/0510:0",
        "/dev/char/510:1",
        "/dev/char/10:0196",
        "/class/misc/vfio0",
    ] {
        assert!(!world.has(none), "{none}");
    }
    world.write(&format!("{}/remove", mdev(UUID)), "1").unwrap();
    assert!(world.list("/class/vfio").is_empty());
    // The same number again is another group, and the old place is gone.
    world.write(CREATE, UUID).unwrap();
    assert!(world.has("/class/vfio/0"));
    assert_ne!(world.core.group(0).unwrap().serial(), group.serial());
    assert_eq!(world.sysfs.lookup(&held, "dev"), Err(Errno::NOENT));
    assert_eq!(
        group.minor(),
        0,
        "who holds the dead group holds its number"
    );
    assert_eq!(world.core.group(0).unwrap().minor(), 1);
    assert_eq!(world.read("/class/vfio/0/dev").unwrap(), "510:1\n");
}

#[test]
fn create_takes_36_or_37_bytes() {
    let world = World::new();
    serial(&world.core);
    assert_eq!(world.write(CREATE, ""), Ok(0));
    assert_eq!(world.list("/bus/mdev/devices"), [""; 0]);
    for (n, end) in (0..).zip(["", "\n", "x", "\0", " "]) {
        let text = format!("{}{end}", uuid(n));
        assert_eq!(world.write(CREATE, &text), Ok(text.len()), "{end:?}");
        assert!(world.has(&mdev(&uuid(n))));
    }
    let upper = UUID.to_uppercase();
    assert_eq!(world.write(CREATE, &upper), Ok(36));
    assert!(world.has(&mdev(UUID)) && !world.has(&mdev(&upper)));
    let short = &UUID[..35];
    let long = format!("{UUID}\n\n");
    let dashes = "-".repeat(36);
    let spaces = " ".repeat(36);
    let braces = format!("{{{}}}", &UUID[..34]);
    let plain = UUID.replace('-', "");
    let moved = format!("{}-", UUID.replacen('-', "", 1));
    let huge = UUID.repeat(1000);
    for bad in [
        short, &long, &dashes, &spaces, &braces, &plain, &moved, &huge, "1", "\n", "\0",
    ] {
        assert_eq!(world.write(CREATE, bad), Err(Errno::INVAL), "{bad:.40}");
    }
    assert_eq!(world.write(CREATE, [0xff; 36]), Err(Errno::INVAL));
    assert_eq!(world.list("/bus/mdev/devices").len(), 6);
    assert_eq!(world.read(CREATE), Err(Errno::ACCESS));
}

#[test]
fn create_refuses_what_is_used_or_used_up() {
    let world = World::new();
    serial(&world.core);
    display(&world.core);
    let uevents = Log::uevents(&world.core);
    // The driver counts: 24 ports.
    for n in 0..12 {
        world.write(CREATE2, uuid(n)).unwrap();
    }
    assert_eq!(
        world.read(&CREATE2.replace("create", "available_instances")),
        Ok("0\n".into())
    );
    uevents.take();
    assert_eq!(world.write(CREATE, uuid(20)), Err(Errno::NOSPC));
    let path = format!("{MTTY}/{}", uuid(20));
    assert_eq!(
        uevents.take(),
        [format!("add {path} mdev"), format!("remove {path} mdev")]
    );
    assert!(!world.has(&path));
    // Anywhere in the system, whatever else is wrong.
    let create = format!("{VGA}/create");
    assert_eq!(world.write(CREATE, uuid(3)), Err(Errno::EXIST));
    assert_eq!(world.write(&create, uuid(3)), Err(Errno::EXIST));
    // The bus counts: four, for both types, given back however a create fails.
    let broken = create.replace("vga", "broken");
    for _ in 0..10 {
        assert_eq!(world.write(&broken, uuid(40)), Err(Errno::NOMEM));
    }
    for n in 40..44 {
        let left = format!("{}\n", 44 - n);
        assert_eq!(world.read(&format!("{VGA}/available_instances")), Ok(left));
        world.write(&create, uuid(n)).unwrap();
    }
    for create in [&create, &broken] {
        assert_eq!(world.write(create, uuid(44)), Err(Errno::USERS));
        assert_eq!(world.write(create, uuid(43)), Err(Errno::EXIST));
    }
    world
        .write(&format!("{}/remove", mdev(&uuid(40))), "1")
        .unwrap();
    world.write(&create, uuid(44)).unwrap();
}

#[test]
fn remove_wants_a_number() {
    let world = World::new();
    serial(&world.core);
    for text in ["1", "1\n", "0x10", "+7", "010\n", "2\0"] {
        world.write(CREATE, UUID).unwrap();
        let remove = format!("{}/remove", mdev(UUID));
        for bad in [" 1", "-1", "1 ", "1x", "yes", "\n", "18446744073709551616"] {
            assert_eq!(world.write(&remove, bad), Err(Errno::INVAL), "{bad:?}");
        }
        assert_eq!(world.write(&remove, ""), Ok(0));
        assert_eq!(world.write(&remove, "0\n"), Ok(2));
        assert_eq!(world.read(&remove), Err(Errno::ACCESS));
        let node = world.sysfs.walk(&remove).unwrap();
        assert_eq!(world.write(&remove, text), Ok(text.len()), "{text:?}");
        // A second opener finds nothing; a second writer who has it open is told.
        assert_eq!(world.write(&remove, "1"), Err(Errno::NOENT));
        let Store::Done(result) = world.sysfs.store(&node, b"1") else {
            panic!("it is gone")
        };
        assert_eq!(result, Err(Errno::NODEV));
        assert!(world.list("/kernel/iommu_groups").is_empty());
    }
}

#[test]
fn remove_with_an_open_file_waits() {
    let world = World::new();
    serial(&world.core);
    display(&world.core);
    world.write(CREATE, UUID).unwrap();
    let file = world.core.device(0).unwrap().open_cdev(opener()).unwrap();
    let uevents = Log::uevents(&world.core);
    let remove = world.sysfs.walk(&format!("{}/remove", mdev(UUID))).unwrap();
    let vfio = world.sysfs.walk("/class/vfio-dev/vfio0").unwrap();
    let waiting = world.write_waits(&format!("{}/remove", mdev(UUID)), "1\n");
    let (sender, answer) = std::sync::mpsc::channel();
    waiting.on_done(move |result| {
        let _ = sender.send(result);
    });
    assert!(answer.try_recv().is_err());

    // What is left of it, as on Linux 7.3: one link, the group, the name.
    let dir = format!("{MTTY}/{UUID}");
    assert_eq!(world.list(&dir), ["iommu_group"]);
    assert_eq!(
        world.list("/kernel/iommu_groups/0/devices"),
        [UUID.to_owned()]
    );
    for gone in [
        mdev(UUID),
        format!("{MTTY}/mdev_supported_types/mtty-1/devices/{UUID}"),
        format!("/bus/mdev/drivers/serial/{UUID}"),
        "/class/vfio-dev/vfio0".into(),
        "/dev/char/511:0".into(),
        format!("{dir}/remove"),
        format!("{dir}/uevent"),
        format!("{dir}/driver"),
        format!("{dir}/subsystem"),
        format!("{dir}/mdev_type"),
        format!("{dir}/vfio-dev"),
        format!("{dir}/vendor"),
    ] {
        assert!(!world.has(&gone), "{gone}");
    }
    for (name, path) in [
        ("devices", "/bus/mdev/devices"),
        ("class", "/class/vfio-dev"),
    ] {
        assert!(world.list(path).is_empty(), "{name}");
    }
    // The group lives until the wait has ended.
    assert_eq!(world.list("/dev/char"), ["10:127", "10:196", "510:0"]);
    assert_eq!(world.list("/class/vfio"), ["0"]);
    assert_eq!(world.sysfs.open(&remove, false, true), Err(Errno::NODEV));
    assert_eq!(world.sysfs.lookup(&vfio, "dev"), Err(Errno::NOENT));
    for create in [CREATE.to_owned(), format!("{VGA}/create")] {
        assert_eq!(world.write(&create, UUID), Err(Errno::EXIST));
    }
    assert_eq!(
        uevents.take(),
        [format!(
            "remove {dir}/vfio-dev/vfio0 vfio-dev MAJOR=511 MINOR=0 DEVNAME=vfio/devices/vfio0"
        )]
    );
    let text = "unregistering, waiting for 1 user of vfio0: opened by guest (pid 812)";
    assert_eq!(waiting.describe(), text);
    assert_eq!(
        world.read(&format!("/kernel/debug/vfio/{UUID}/state")),
        Ok(format!("{text}\n"))
    );
    assert_eq!(world.core.model().unregistering().len(), 1);

    // The number is not used again.
    world.write(CREATE, uuid(1)).unwrap();
    assert_eq!(world.list("/class/vfio-dev"), ["vfio1"]);
    uevents.take();

    file.release();
    assert_eq!(answer.recv_timeout(SOON).unwrap(), Ok(2));
    assert!(!world.has(&dir));
    assert!(!world.has("/kernel/iommu_groups/0"));
    assert!(!world.has(&format!("/kernel/debug/vfio/{UUID}")));
    assert!(world.core.model().unregistering().is_empty());
    assert_eq!(waiting.describe(), "unregistered");
    assert_eq!(
        uevents.take(),
        [
            "remove /devices/virtual/vfio/0 vfio MAJOR=510 MINOR=0 DEVNAME=vfio/0".to_owned(),
            format!("unbind {dir} mdev"),
            format!("remove {dir} mdev")
        ]
    );
    world.write(CREATE, UUID).unwrap();
    assert!(world.has("/class/vfio-dev/vfio0"));
}

#[test]
fn a_wait_can_be_cut_short() {
    let world = World::new();
    serial(&world.core);
    world.write(CREATE, UUID).unwrap();
    let file = world.core.device(0).unwrap().open_cdev(opener()).unwrap();
    let waiting = world.write_waits(&format!("{}/remove", mdev(UUID)), "1");
    world.core.model().unregistering()[0].disassociate();
    assert_eq!(waiting.operation().result(), Some(Ok(())));
    assert!(!world.has(&format!("{MTTY}/{UUID}")));
    assert_eq!(file.read(0, &mut [0]), Err(Errno::NODEV));
    world.write(CREATE, UUID).unwrap();
}

#[test]
fn unbind_leaves_a_device_without_driver() {
    let world = World::new();
    serial(&world.core);
    display(&world.core);
    world.write(CREATE, UUID).unwrap();
    let uevents = Log::uevents(&world.core);
    let drivers = "/bus/mdev/drivers";
    for bad in ["", "nobody", "\n", "\0", "../x"] {
        let expected = if bad.is_empty() {
            Ok(0)
        } else {
            Err(Errno::NODEV)
        };
        assert_eq!(
            world.write(&format!("{drivers}/serial/unbind"), bad),
            expected
        );
        assert_eq!(
            world.write(&format!("{drivers}/serial/bind"), bad),
            expected
        );
        assert_eq!(world.write("/bus/mdev/drivers_probe", bad), expected);
    }
    assert_eq!(
        world.write(&format!("{drivers}/display/unbind"), UUID),
        Err(Errno::NODEV)
    );
    let dir = format!("{MTTY}/{UUID}");
    assert_eq!(
        world.write(&format!("{drivers}/serial/unbind"), format!("{UUID}\n")),
        Ok(37)
    );
    assert_eq!(
        world.list(&dir),
        ["mdev_type", "remove", "subsystem", "uevent"]
    );
    assert_eq!(world.read(&format!("{dir}/uevent")), Ok(String::new()));
    assert_eq!(
        uevents.take(),
        [
            format!(
                "remove {dir}/vfio-dev/vfio0 vfio-dev MAJOR=511 MINOR=0 \
                 DEVNAME=vfio/devices/vfio0"
            ),
            "remove /devices/virtual/vfio/0 vfio MAJOR=510 MINOR=0 DEVNAME=vfio/0".to_owned(),
            format!("unbind {dir} mdev")
        ]
    );
    // The bus matches nothing by itself.
    for driver in ["serial", "display"] {
        assert_eq!(
            world.write(&format!("{drivers}/{driver}/bind"), UUID),
            Err(Errno::NODEV)
        );
    }
    assert_eq!(world.write("/bus/mdev/drivers_probe", UUID), Ok(36));
    assert!(!world.has(&format!("{dir}/driver")));
    assert_eq!(world.write(&format!("{dir}/remove"), "1"), Ok(1));
    assert!(!world.has(&dir));
}

#[test]
fn unbind_with_an_open_file_waits() {
    let world = World::new();
    serial(&world.core);
    world.write(CREATE, UUID).unwrap();
    let file = world.core.device(0).unwrap().open_cdev(opener()).unwrap();
    let unbind = "/bus/mdev/drivers/serial/unbind";
    let waiting = world.write_waits(unbind, UUID);
    let dir = format!("{MTTY}/{UUID}");
    assert_eq!(
        world.list(&dir),
        ["iommu_group", "mdev_type", "remove", "subsystem", "uevent"]
    );
    assert_eq!(world.write(unbind, UUID), Err(Errno::NODEV));
    // A removal on top of it waits for the same users.
    let removal = world.write_waits(&format!("{dir}/remove"), "1");
    assert_eq!(world.list(&dir), ["iommu_group"]);
    assert!(removal.describe().contains("1 user of vfio0"));
    drop(file);
    assert_eq!(waiting.operation().wait_for(SOON), Some(Ok(())));
    assert_eq!(removal.operation().wait_for(SOON), Some(Ok(())));
    assert!(!world.has(&dir));
}

#[test]
fn a_parent_goes_when_its_devices_are_gone() {
    let world = World::new();
    let parent = serial(&world.core);
    let uevents = Log::uevents(&world.core);
    for n in 0..3 {
        world.write(CREATE, uuid(n)).unwrap();
    }
    let files: Vec<_> = (0..2)
        .map(|n| world.core.device(n).unwrap().open_cdev(opener()).unwrap())
        .collect();
    // One of them is on its way already.
    let first = world.write_waits(&format!("{}/remove", mdev(&uuid(0))), "1");
    let node = world.sysfs.walk(CREATE).unwrap();
    let class = world.sysfs.walk("/class/mdev_bus").unwrap();
    let link = world.sysfs.lookup(&class, "mtty").unwrap();
    uevents.take();
    let crate::model::Outcome::Waiting(waiting) = parent.unregister(Policy::Wait) else {
        panic!("there are users")
    };
    assert!(world.list("/class/mdev_bus").is_empty());
    assert_eq!(world.sysfs.readlink(&link), Err(Errno::NOENT));
    assert!(world.list("/bus/mdev/devices").is_empty());
    assert!(!world.has(&format!("{MTTY}/{}", uuid(2))));
    assert_eq!(world.write(CREATE, uuid(9)), Err(Errno::NODEV));
    assert_eq!(
        parent.unregister(Policy::Wait).result(),
        Some(Err(Errno::NODEV))
    );
    let text = waiting.describe();
    assert!(text.contains("vfio0") && text.contains("vfio1"), "{text}");
    let mut files = files.into_iter();
    drop(files.next());
    assert_eq!(first.operation().wait_for(SOON), Some(Ok(())));
    assert_eq!(waiting.result(), None);
    drop(files.next());
    assert_eq!(waiting.wait_for(SOON), Some(Ok(())));
    assert_eq!(world.list(MTTY), ["subsystem", "uevent"]);
    assert!(!world.has("/bus/mdev/drivers/serial"));
    assert_eq!(
        uevents.take().last().unwrap(),
        &format!("change {MTTY} mtty MDEV_STATE=unregistered")
    );
    let Store::Done(result) = world.sysfs.store(&node, UUID.as_bytes()) else {
        panic!("it is gone")
    };
    assert_eq!(result, Err(Errno::NODEV));
    assert_eq!(
        parent.device().remove(&world.core, Policy::Wait).result(),
        Some(Ok(()))
    );
    assert!(!world.has("/class/mtty") && !world.has("/devices/virtual/mtty"));
}

#[test]
fn a_parent_says_that_it_is_one() {
    let world = World::new();
    let uevents = Log::uevents(&world.core);
    let parent = serial(&world.core);
    assert_eq!(
        uevents.take(),
        [
            format!("add {MTTY} mtty"),
            format!("change {MTTY} mtty MDEV_STATE=registered")
        ]
    );
    let busy =
        crate::model::mdev::Parent::register(&world.core, parent.device(), Serial(Arc::default()));
    assert_eq!(busy.unwrap_err(), Errno::BUSY);
    assert_eq!(
        parent.device().remove(&world.core, Policy::Wait).result(),
        Some(Err(Errno::BUSY))
    );
}

/// A bus of devices named after the driver they are for, with overrides.
fn named_bus(core: &Core) -> Arc<crate::model::Bus> {
    let options = BusOptions {
        matches: |device, driver| device.name().starts_with(driver.name()),
        driver_override: true,
        autoprobe: true,
    };
    core.model().add_bus("named", options).unwrap()
}

fn on_named_bus(core: &Core, name: &str) -> Arc<BusDevice> {
    let device = BusDevice::new("/devices/named", name, Some(Subsystem::Bus("named")));
    device.add(core).unwrap();
    device
}

#[test]
fn bind_probe_and_override() {
    let world = World::new();
    let bus = named_bus(&world.core);
    let early = on_named_bus(&world.core, "red0");
    bus.add_driver(&world.core, plain("red")).unwrap();
    assert_eq!(
        early.driver().unwrap().name(),
        "red",
        "bound when its driver came"
    );
    bus.add_driver(&world.core, plain("blue")).unwrap();
    assert_eq!(
        bus.add_driver(&world.core, plain("red")).unwrap_err(),
        Errno::BUSY
    );
    let failing = Plain {
        fail: Some(Errno::NXIO),
        ..plain("bad")
    };
    bus.add_driver(&world.core, failing).unwrap();
    on_named_bus(&world.core, "red1");
    let bad = on_named_bus(&world.core, "bad0");
    assert!(bad.driver().is_none());
    assert_eq!(
        world.list("/bus/named/drivers/red"),
        ["bind", "module", "red0", "red1", "uevent", "unbind"]
    );

    let drivers = "/bus/named/drivers";
    assert_eq!(
        world.write(&format!("{drivers}/red/bind"), "red1"),
        Err(Errno::BUSY)
    );
    assert_eq!(
        world.write(&format!("{drivers}/blue/bind"), "red1"),
        Err(Errno::NODEV)
    );
    assert_eq!(
        world.write(&format!("{drivers}/bad/bind"), "bad0"),
        Err(Errno::NXIO)
    );
    assert_eq!(world.write("/bus/named/drivers_probe", "bad0"), Ok(4));

    let over = "/bus/named/devices/red1/driver_override";
    assert_eq!(world.read(over), Ok("(null)\n".into()));
    assert_eq!(world.write(over, "blue\nrest"), Ok(9));
    assert_eq!(world.read(over), Ok("blue\n".into()));
    assert_eq!(world.write(over, [b'a'; 4095]), Err(Errno::INVAL));
    assert_eq!(world.write(over, [b'a'; 9000]), Err(Errno::INVAL));
    assert_eq!(world.read(over), Ok("blue\n".into()));
    // The driver it has stays until somebody unbinds it.
    assert_eq!(early.driver().unwrap().name(), "red");
    assert_eq!(
        world.write(&format!("{drivers}/red/unbind"), "red1\n"),
        Ok(5)
    );
    assert_eq!(
        world.write(&format!("{drivers}/red/bind"), "red1"),
        Err(Errno::NODEV)
    );
    assert_eq!(world.write("/bus/named/drivers_probe", "red1\n"), Ok(5));
    assert_eq!(
        world.read("/bus/named/devices/red1/uevent"),
        Ok("DRIVER=blue\n".into())
    );
    for clear in [&b"\n"[..], b"\0"] {
        world.write(over, "red").unwrap();
        assert_eq!(world.write(over, clear), Ok(1));
        assert_eq!(world.read(over), Ok("(null)\n".into()));
    }
    assert_eq!(world.write(over, ""), Ok(0));

    assert_eq!(world.read("/bus/named/drivers_autoprobe"), Ok("1\n".into()));
    assert_eq!(world.write("/bus/named/drivers_autoprobe", "0\n"), Ok(2));
    assert_eq!(world.read("/bus/named/drivers_autoprobe"), Ok("0\n".into()));
    let late = on_named_bus(&world.core, "red2");
    assert!(late.driver().is_none());
    world.write("/bus/named/drivers_autoprobe", "y").unwrap();
    world.write("/bus/named/drivers_probe", "red2").unwrap();
    assert!(late.driver().is_some());
    let twin = BusDevice::new("/devices/other", "red2", Some(Subsystem::Bus("named")));
    assert_eq!(twin.add(&world.core), Err(Errno::EXIST));
    assert!(!world.has("/devices/other"));
}

#[test]
fn groups() {
    let world = World::new();
    let reserved = [
        X86_MSI,
        ReservedRegion {
            start: 0x1000,
            last: 0x1fff,
            kind: ReservedKind::DirectRelaxable,
        },
    ];
    let groups = world.core.iommu_groups();
    let group = groups.create_with(None, &reserved).unwrap();
    let physical = |name| Plain {
        kind: GroupType::Physical,
        ..plain(name)
    };
    let make =
        |name| faux::Device::create_in(&world.core, name, physical("phys"), Some(&group)).unwrap();
    let (a, b) = (make("a"), make("b"));
    let dir = "/kernel/iommu_groups/0";
    assert_eq!(world.list(dir), ["devices", "reserved_regions", "type"]);
    assert_eq!(world.list(&format!("{dir}/devices")), ["a", "b"]);
    assert_eq!(
        world.read(&format!("{dir}/reserved_regions")).unwrap(),
        "0x0000000000001000 0x0000000000001fff direct-relaxable\n\
         0x00000000fee00000 0x00000000feefffff msi\n"
    );
    let kind = format!("{dir}/type");
    for (word, result, now) in [
        ("DMA-FQ\n", Ok(7), "DMA-FQ\n"),
        ("identity", Ok(8), "identity\n"),
        ("auto", Ok(4), "DMA\n"),
        ("blocked", Err(Errno::INVAL), "DMA\n"),
        ("dma", Err(Errno::INVAL), "DMA\n"),
    ] {
        assert_eq!(world.write(&kind, word), result);
        assert_eq!(world.read(&kind).unwrap(), now);
    }
    // A physical device needs a group.
    let alone = faux::Device::create(&world.core, "c", physical("phys"));
    assert_eq!(alone.unwrap_err(), Errno::INVAL);
    assert!(!world.has("/bus/faux/devices/c"));
    // A device of another bus with the same name.
    let bus = named_bus(&world.core);
    bus.set_autoprobe(false);
    let other = BusDevice::new("/devices/named", "a", Some(Subsystem::Bus("named")));
    other.join_iommu_group(&group).unwrap();
    other.add(&world.core).unwrap();
    assert_eq!(world.list(&format!("{dir}/devices")), ["a", "a.1", "b"]);
    other.leave_iommu_group();
    // The group of a software device has no domain.
    let soft = faux::Device::create(&world.core, "soft", plain("soft")).unwrap();
    assert_eq!(
        world.write("/kernel/iommu_groups/1/type", "DMA"),
        Err(Errno::INVAL)
    );
    assert_eq!(soft.destroy(Policy::Wait).result(), Some(Ok(())));
    assert_eq!(world.list("/kernel/iommu_groups"), ["0"]);
    for device in [a, b] {
        assert_eq!(device.destroy(Policy::Wait).result(), Some(Ok(())));
        assert_eq!(
            device.destroy(Policy::Wait).result(),
            Some(Err(Errno::NODEV))
        );
    }
    assert!(world.list(&format!("{dir}/devices")).is_empty());
    drop(group);
    assert!(!world.has(dir));
}

#[test]
fn uevents_are_replayed() {
    let world = World::new();
    serial(&world.core);
    world.write(CREATE, UUID).unwrap();
    let uevents = Log::uevents(&world.core);
    let dir = format!("{MTTY}/{UUID}");
    world.write(&format!("{dir}/uevent"), "add\n").unwrap();
    let text = format!("change {UUID} A=1\n");
    world
        .write(&format!("{dir}/vfio-dev/vfio0/uevent"), &text)
        .unwrap();
    world.write("/bus/mdev/uevent", "add").unwrap();
    world
        .write("/bus/mdev/drivers/serial/uevent", "change")
        .unwrap();
    assert_eq!(
        uevents.take(),
        [
            format!("add {dir} mdev SYNTH_UUID=0 DRIVER=serial"),
            format!(
                "change {dir}/vfio-dev/vfio0 vfio-dev SYNTH_UUID={UUID} SYNTH_ARG_A=1 MAJOR=511 \
                 MINOR=0 DEVNAME=vfio/devices/vfio0"
            ),
            "add /bus/mdev bus SYNTH_UUID=0".into(),
            "change /bus/mdev/drivers/serial drivers SYNTH_UUID=0".into(),
        ]
    );
    for bad in ["nonsense", "add 1", "\n"] {
        let path = format!("{dir}/uevent");
        assert_eq!(world.write(&path, bad), Err(Errno::INVAL));
    }
    assert!(uevents.take().is_empty());
}

#[test]
fn files_are_opened_as_their_modes_say() {
    let world = World::new();
    serial(&world.core);
    let node = |path: &str| world.sysfs.walk(path).unwrap();
    let open = |path, r, w| world.sysfs.open(&node(path), r, w);
    assert_eq!(open(CREATE, false, true), Ok(()));
    assert_eq!(open(CREATE, true, false), Err(Errno::ACCESS));
    let name = CREATE.replace("create", "name");
    assert_eq!(open(&name, true, false), Ok(()));
    assert_eq!(open(&name, true, true), Err(Errno::ACCESS));
    assert_eq!(world.write(&name, "x"), Err(Errno::ACCESS));
    assert_eq!(world.write(MTTY, "x"), Err(Errno::ACCESS));
    assert_eq!(world.read(MTTY), Err(Errno::ISDIR));
    let link = world.sysfs.lookup(&node(MTTY), "subsystem").unwrap();
    assert_eq!(world.sysfs.show(&link), Err(Errno::INVAL));
    assert_eq!(world.sysfs.readlink(&node(MTTY)), Err(Errno::INVAL));
    assert_eq!(world.sysfs.lookup(&node(&name), "x"), Err(Errno::NOTDIR));
    for path in [
        "/class/vfio-dev/vfio00",
        "/dev/char/511:00",
        "/dev/char/1:0",
        "/nothing",
        "/kernel/iommu_groups/00",
        "/kernel/iommu_groups/+0",
    ] {
        assert!(!world.has(path), "{path}");
    }
    assert_eq!(node("/kernel/debug").to_string(), "/kernel/debug");
    assert_eq!(world.sysfs.mode(&node("/kernel/debug")), 0o700);
}

#[test]
fn ten_thousand_devices() {
    let world = World::new();
    let devices: Vec<faux::Device> = (0..10_000)
        .map(|n| faux::Device::create(&world.core, &format!("d{n:05}"), plain("many")).unwrap())
        .collect();
    for (path, first, last) in [
        ("/bus/faux/devices", "d00000", "d09999"),
        ("/class/vfio-dev", "vfio0", "vfio9999"),
        ("/class/vfio", "0", "9999"),
        ("/kernel/iommu_groups", "0", "9999"),
    ] {
        let dir = world.sysfs.walk(path).unwrap();
        let names: Vec<String> = world.sysfs.entries(&dir).into_iter().map(|e| e.0).collect();
        assert_eq!(names.len(), 10_000);
        assert_eq!((&*names[0], &*names[9_999]), (first, last), "{path}");
        for n in [0, 5_000, 9_999] {
            let node = world.sysfs.lookup(&dir, &names[n]).unwrap();
            assert_eq!(world.sysfs.entries(&dir)[n].1, node);
        }
    }
    assert_eq!(world.list("/devices/faux").len(), 10_001);
    let numbers = world.list("/dev/char");
    assert_eq!(numbers.len(), 20_002, "groups, devices, misc devices");
    let char = world.sysfs.walk("/dev/char").unwrap();
    for number in [&numbers[1], &numbers[5_002], &numbers[20_001]] {
        world.sysfs.lookup(&char, number).unwrap();
    }
    for device in devices {
        assert_eq!(device.destroy(Policy::Wait).result(), Some(Ok(())));
    }
    assert!(world.list("/class/vfio-dev").is_empty());
    assert_eq!(world.list("/devices/faux"), ["uevent"]);
}
