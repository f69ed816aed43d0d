//! What the tools of a Debian machine print about devices of vfiod: mdevctl, udevadm and fuser,
//! unmodified. Where they read `/sys` and `/dev`, `vfioctl run` puts the devices there.

use std::fs;
use std::io::BufRead as _;
use std::io::BufReader;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Output;
use std::process::Stdio;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use vfiod_tests::packages::program;
use vfiod_tests::skip;

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// The UUID that mdevctl is told to use.
const UUID: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";

/// A `vfiod serve` below a directory of its own. Dropping it stops it, and checks that it ends well
/// and leaves nothing mounted.
struct Daemon {
    child: Child,
    root: PathBuf,
    vfioctl: PathBuf,
}

impl Daemon {
    /// `None` where it cannot run, which is said.
    fn start() -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        if !rustix::process::geteuid().is_root() {
            skip("mdevctl needs root to create devices");
            return None;
        }
        if let Err(error) = fs::File::open("/dev/fuse") {
            skip(&format!("/dev/fuse cannot be opened: {error}"));
            return None;
        }
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let root = std::env::temp_dir().join(format!("vfiod-tools-{}-{count}", std::process::id()));
        fs::create_dir(&root).expect("a directory of the test's own");
        fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).expect("it is the test's");
        let mut child = Command::new(program("vfiod").expect("vfiod is built"))
            .args(["serve", "--root"])
            .arg(&root)
            .env_remove("NOTIFY_SOCKET")
            .env_remove("JOURNAL_STREAM")
            .stderr(Stdio::piped())
            .spawn()
            .expect("vfiod starts");
        let log = child.stderr.take().expect("its log is piped");
        // The log goes on being read, or a full pipe would stop the daemon.
        let (sender, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(log).lines().map_while(Result::ok) {
                eprintln!("{line}");
                let _ = sender.send(line);
            }
        });
        let daemon = Self {
            child,
            root,
            vfioctl: program("vfioctl").expect("vfioctl is built"),
        };
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let line = lines.recv_timeout(left).expect("vfiod says that it serves");
            if line.contains(" serves ") {
                return Some(daemon);
            }
        }
    }

    fn vfioctl(&self, args: &[&str]) -> Output {
        Command::new(&self.vfioctl)
            .env_remove("VFIOD_SOCKET")
            .env("VFIOD_ROOT", &self.root)
            .args(args)
            .output()
            .expect("vfioctl starts")
    }

    /// A new card of two ports: its UUID.
    fn card(&self) -> String {
        text(&self.vfioctl(&["start", "mtty-2"])).trim().to_owned()
    }

    /// Runs a command that finds the devices in `/sys` and `/dev`.
    fn inside(&self, command: &[&str]) -> Output {
        self.vfioctl(&[&["run", "--"], command].concat())
    }

    /// What a command that works prints there.
    fn says(&self, command: &[&str]) -> String {
        text(&self.inside(command))
    }

    fn node(&self, name: &str) -> PathBuf {
        self.root.join("dev/vfio/devices").join(name)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("vfiod is there");
        let end = Instant::now() + PATIENCE;
        let status = loop {
            match self.child.try_wait().expect("vfiod is our child") {
                Some(status) => break Some(status),
                None if Instant::now() > end => break None,
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        if status.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let left = mounts.contains(&*self.root.to_string_lossy());
        if !left {
            let _ = fs::remove_dir_all(&self.root);
        }
        if std::thread::panicking() {
            return;
        }
        assert!(
            status.is_some_and(|status| status.success()),
            "vfiod ended with {status:?}"
        );
        assert!(!left, "something is still mounted:\n{mounts}");
    }
}

/// A process that has a file open and does nothing.
struct Holder(Child);

impl Holder {
    fn of(file: &Path) -> Self {
        let mut options = fs::File::options();
        let file = options.read(true).write(true).open(file);
        let file = file.expect("the node opens");
        let sleep = Command::new("sleep").arg("1000").stdin(file).spawn();
        Self(sleep.expect("sleep starts"))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The standard output of a program that worked.
#[track_caller]
fn text(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).expect("text")
}

/// The lines of a program's output, sorted, without empty ones.
fn lines(text: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
    lines.sort_unstable();
    lines
}

#[test]
fn mdevctl_types_tells_what_can_be_made_and_how_often() {
    let Some(daemon) = Daemon::start() else {
        return;
    };
    let expected = |one: u32, two: u32| {
        format!(
            "mtty\n  mtty-1\n    Available instances: {one}\n    Device API: vfio-pci\n    \
             Name: Single port serial\n  mtty-2\n    Available instances: {two}\n    \
             Device API: vfio-pci\n    Name: Dual port serial\n"
        )
    };
    let types = ["mdevctl", "types", "-p", "mtty"];
    assert_eq!(daemon.says(&types).trim(), expected(24, 12).trim());
    // A card of two ports takes two of the 24.
    daemon.card();
    assert_eq!(daemon.says(&types).trim(), expected(22, 11).trim());
    // Without a parent it lists all of them.
    let all = daemon.says(&["mdevctl", "types"]);
    for name in ["\nmtty\n", "\n  mtty-1\n", "mdpy\n", "\n  mdpy-vga\n"] {
        assert!(format!("\n{all}").contains(name), "{all}");
    }
}

#[test]
fn mdevctl_starts_lists_and_stops_a_card() {
    let Some(daemon) = Daemon::start() else {
        return;
    };
    let list = || daemon.says(&["mdevctl", "list", "-p", "mtty"]);
    assert_eq!(list().trim(), "", "nothing is there yet");
    let other = daemon.card();
    let other_line = format!("{other} mtty mtty-2 manual");
    assert_eq!(lines(&list()), [other_line.as_str()]);

    let start = ["mdevctl", "start", "-u", UUID, "-p", "mtty", "-t", "mtty-2"];
    daemon.says(&start);
    let line = format!("{UUID} mtty mtty-2 manual");
    let mut both = [line.as_str(), other_line.as_str()];
    both.sort_unstable();
    assert_eq!(lines(&list()), both);
    // Its UUID alone leads to it, with its place in sysfs.
    let one = daemon.says(&["mdevctl", "list", "-v", "-u", UUID]);
    assert!(one.starts_with(&line), "{one}");
    // The daemon knows it as one of its own, and it can be opened.
    let known = text(&daemon.vfioctl(&["list"]));
    let row = known.lines().find(|row| row.contains(UUID));
    assert!(row.is_some_and(|row| row.starts_with("vfio1 ")), "{known}");
    drop(fs::File::open(daemon.node("vfio1")).expect("the node opens"));

    // A UUID in use, and a type that is not there, are refused, and nothing is made.
    assert!(!daemon.inside(&start).status.success());
    let fresh = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002";
    let unknown = [
        "mdevctl", "start", "-u", fresh, "-p", "mtty", "-t", "mtty-9",
    ];
    assert!(!daemon.inside(&unknown).status.success());
    assert_eq!(lines(&list()), both);

    daemon.says(&["mdevctl", "stop", "-u", UUID]);
    assert_eq!(lines(&list()), [other_line.as_str()]);
    assert!(!daemon.node("vfio1").exists());
    assert!(
        !daemon
            .inside(&["mdevctl", "stop", "-u", UUID])
            .status
            .success(),
        "it is gone already"
    );
    daemon.says(&["mdevctl", "stop", "-u", &other]);
    assert_eq!(list().trim(), "");
}

#[test]
fn udevadm_info_knows_the_vfio_device() {
    let Some(daemon) = Daemon::start() else {
        return;
    };
    let uuid = daemon.card();
    let class = "/sys/class/vfio-dev/vfio0";
    let path = daemon.says(&["realpath", class]);
    let path = path.trim();
    let devpath = format!("/devices/virtual/mtty/mtty/{uuid}/vfio-dev/vfio0");
    assert_eq!(path, format!("/sys{devpath}"));
    let numbers = daemon.says(&["cat", &format!("{class}/dev")]);
    let (major, minor) = numbers.trim().split_once(':').expect("MAJOR:MINOR");
    // By its place, by its class and by its number: it is the same device.
    let by_number = format!("/sys/dev/char/{major}:{minor}");
    for name in [path, class, &by_number] {
        let info = daemon.says(&["udevadm", "info", name]);
        for line in [
            format!("P: {devpath}"),
            "M: vfio0".to_owned(),
            "U: vfio-dev".to_owned(),
            format!("D: c {major}:{minor}"),
            "N: vfio/devices/vfio0".to_owned(),
            format!("E: DEVPATH={devpath}"),
            "E: SUBSYSTEM=vfio-dev".to_owned(),
            "E: DEVNAME=/dev/vfio/devices/vfio0".to_owned(),
            format!("E: MAJOR={major}"),
            format!("E: MINOR={minor}"),
        ] {
            assert!(
                info.lines().any(|said| said == line),
                "{name}: {line} is not in\n{info}"
            );
        }
    }
    let parent = daemon.says(&["udevadm", "info", &format!("/sys/bus/mdev/devices/{uuid}")]);
    for line in ["E: SUBSYSTEM=mdev", "E: DRIVER=mtty"] {
        assert!(parent.lines().any(|said| said == line), "{parent}");
    }
    let gone = daemon.inside(&["udevadm", "info", "/sys/class/vfio-dev/vfio1"]);
    assert!(!gone.status.success(), "{gone:?}");
}

#[test]
fn udevadm_info_walks_from_the_vfio_device_to_the_parent() {
    let Some(daemon) = Daemon::start() else {
        return;
    };
    let uuid = daemon.card();
    let walk = daemon.says(&["udevadm", "info", "-a", "/sys/class/vfio-dev/vfio0"]);
    // One part of the text for each device; what is before the first explains.
    let parts: Vec<&str> = walk.split("\n  looking at ").skip(1).collect();
    let card = format!("/devices/virtual/mtty/mtty/{uuid}");
    let expected: [(String, Vec<String>); 3] = [
        (
            format!("device '{card}/vfio-dev/vfio0':"),
            vec![
                r#"KERNEL=="vfio0""#.to_owned(),
                r#"SUBSYSTEM=="vfio-dev""#.to_owned(),
            ],
        ),
        (
            format!("parent device '{card}':"),
            vec![
                format!(r#"KERNELS=="{uuid}""#),
                r#"SUBSYSTEMS=="mdev""#.to_owned(),
                r#"DRIVERS=="mtty""#.to_owned(),
                r#"ATTRS{remove}=="(not readable)""#.to_owned(),
            ],
        ),
        (
            "parent device '/devices/virtual/mtty/mtty':".to_owned(),
            vec![
                r#"KERNELS=="mtty""#.to_owned(),
                r#"ATTRS{mdev_supported_types/mtty-2/available_instances}=="11""#.to_owned(),
                r#"ATTRS{mdev_supported_types/mtty-2/create}=="(not readable)""#.to_owned(),
                r#"ATTRS{mdev_supported_types/mtty-2/device_api}=="vfio-pci""#.to_owned(),
            ],
        ),
    ];
    assert!(parts.len() >= expected.len(), "{walk}");
    for (part, (head, attributes)) in parts.iter().zip(expected) {
        assert!(part.starts_with(&head), "{head} is not at\n{part}");
        for attribute in attributes {
            assert!(
                part.lines().any(|line| line.trim() == attribute),
                "{attribute} is not in\n{part}"
            );
        }
    }
}

/// The processes that `fuser` names. It also says `kernel`, for a node is a mount of its own.
fn pids(output: &Output) -> Vec<u32> {
    String::from_utf8_lossy(&output.stdout)
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect()
}

#[test]
fn fuser_names_the_process_that_holds_a_node() {
    let Some(daemon) = Daemon::start() else {
        return;
    };
    daemon.card();
    daemon.card();
    let (node, other) = (daemon.node("vfio0"), daemon.node("vfio1"));
    let outside = |node: &Path| {
        let fuser = Command::new("fuser").arg("-v").arg(node).output();
        fuser.expect("fuser starts")
    };
    assert_eq!(pids(&outside(&node)), Vec::<u32>::new());
    let holder = Holder::of(&node);
    let said = outside(&node);
    assert_eq!(pids(&said), [holder.0.id()], "{said:?}");
    // The table is on standard error: the user, F for a file open for writing, and the command.
    let table = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(
        table.contains("root") && table.contains("F.... sleep"),
        "{table}"
    );
    // Neither the daemon nor the holder has the other device open.
    assert_eq!(pids(&outside(&other)), Vec::<u32>::new());
    // The name that programs know leads to the same process.
    let inside = daemon.inside(&["fuser", "-v", "/dev/vfio/devices/vfio0"]);
    assert_eq!(pids(&inside), [holder.0.id()], "{inside:?}");
    drop(holder);
    assert_eq!(pids(&outside(&node)), Vec::<u32>::new());
}

#[test]
fn fuser_names_the_process_that_works_in_the_tree() {
    let Some(daemon) = Daemon::start() else {
        return;
    };
    let uuid = daemon.card();
    let dir = daemon.root.join("sys/bus/mdev/devices").join(uuid);
    let sleep = Command::new("sleep").arg("1000").current_dir(&dir).spawn();
    let holder = Holder(sleep.expect("sleep starts"));
    let fuser = Command::new("fuser").arg("-v").arg(&dir).output();
    let said = fuser.expect("fuser starts");
    assert_eq!(pids(&said), [holder.0.id()], "{said:?}");
    let table = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(table.contains("..c.. sleep"), "{table}");
}
