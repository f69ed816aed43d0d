//! Devices over vfio-user: their sockets come and go with them, for whom the configuration says,
//! and one device is served by a program of its own.

mod common;

use common::{Daemon, Killed, PATIENCE, lines, until};
use rustix::io::Errno;
use rustix::process::Signal;
use std::fs;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use vfio_user::client::Client;

const ALL: &str = "request-interval = 0.1\n[vfio-user]\noffer = \"all\"\n";

fn socket(daemon: &Daemon, uuid: &str) -> PathBuf {
    daemon.path(&format!("vfio-user/{uuid}.sock"))
}

/// The first bytes of the card's configuration space: vendor and device.
fn assert_is_mtty(client: &mut Client) {
    let mut id = [0; 4];
    assert_eq!(client.region_read(7, 0, &mut id).unwrap(), 4);
    assert_eq!(id, [0x48, 0x43, 0x53, 0x32]);
}

fn assert_said(output: &std::process::Output, code: i32, text: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(said.contains(text), "no {text:?} in: {said}");
}

#[test]
fn a_socket_lives_as_long_as_its_device() {
    let daemon = Daemon::with_config(ALL);
    let uuid = daemon.card();
    let path = socket(&daemon, &uuid);
    let meta = fs::symlink_metadata(&path).unwrap();
    assert!(meta.file_type().is_socket());
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);
    let show = daemon.text(&["show", "vfio0"]);
    assert!(show.contains(path.to_str().unwrap()), "{show}");
    assert_is_mtty(&mut Client::connect(&path).unwrap());
    daemon.text(&["unbind", "vfio0", "--force"]);
    assert!(!path.exists());
    daemon.text(&["bind", &uuid]);
    assert!(path.exists());
    daemon.text(&["stop", &uuid, "--force"]);
    assert!(!path.exists());
}

#[test]
fn a_device_is_offered_when_somebody_asks() {
    let daemon = Daemon::start();
    let uuid = daemon.card();
    let path = socket(&daemon, &uuid);
    assert!(!path.exists());
    assert_said(&daemon.run(&["withdraw", "vfio0"]), 3, "not offered");
    let arguments = daemon.run(&["qemu-args", "vfio0", "--via", "vfio-user"]);
    assert_said(&arguments, 4, "vfioctl offer vfio0");
    let printed = daemon.text(&["offer", "vfio0"]);
    assert_eq!(Path::new(printed.trim()), path);
    assert_eq!(daemon.text(&["offer", &uuid]), printed, "offered twice");
    assert!(
        daemon
            .text(&["qemu-args", "vfio0"])
            .contains(printed.trim())
    );
    let other = daemon.path("other.sock");
    let words = ["offer", "vfio0", "--path", other.to_str().unwrap()];
    assert_eq!(Path::new(daemon.text(&words).trim()), other);
    let mut client = Client::connect(&other).unwrap();
    assert_is_mtty(&mut client);
    daemon.text(&["withdraw", "vfio0"]);
    assert!(!path.exists() && !other.exists());
    assert!(client.device_info().is_err(), "it is still served");
    until("closed", || {
        (daemon.json(&["show", "vfio0"])["show"]["device"]["users"] == 0).then_some(())
    });
}

#[test]
fn one_has_it_and_the_others_are_told_who() {
    let daemon = Daemon::with_config(ALL);
    let uuid = daemon.card();
    let path = socket(&daemon, &uuid);
    let client = Client::connect(&path).unwrap();
    let own = std::process::id();
    let who = daemon.json(&["who", "vfio0"]);
    assert_eq!(who["holders"][0]["pid"], own, "{who}");
    assert_eq!(who["holders"][0]["via"], "socket", "{who}");
    assert_eq!(who["holders"].as_array().unwrap().len(), 1, "{who}");
    let text = daemon.text(&["who", "vfio0"]);
    assert!(
        text.contains(&format!("vfio-user socket {}", path.display())),
        "{text}"
    );
    assert!(daemon.text(&["tree"]).contains("over vfio-user"));

    let refused = Client::connect(&path).unwrap_err();
    assert_eq!(refused.refused(), Some(Errno::BUSY), "{refused}");
    let who = daemon.json(&["who", "vfio0"]);
    let reason = who["refused"][0]["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains(&own.to_string()), "{reason}");
    assert!(daemon.text(&["who", "vfio0"]).contains(&reason));
    drop(client);
    until("closed", || {
        (daemon.json(&["show", "vfio0"])["show"]["device"]["users"] == 0).then_some(())
    });
    assert_is_mtty(&mut Client::connect(&path).unwrap());
}

#[test]
fn an_unbind_says_that_the_client_cannot_be_asked() {
    let daemon = Daemon::with_config(ALL);
    let uuid = daemon.card();
    let mut client = Client::connect(socket(&daemon, &uuid)).unwrap();
    let mut unbind = Killed(
        daemon
            .command(&["unbind", "vfio0"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let said = lines(unbind.0.stderr.take().unwrap());
    let told = until("told", || {
        let line = said.recv_timeout(PATIENCE).unwrap();
        line.contains("cannot be asked").then_some(line)
    });
    assert!(told.contains("over vfio-user"), "{told}");
    assert!(
        told.contains("--force would close the connection"),
        "{told}"
    );
    // Who is in keeps everything.
    assert_is_mtty(&mut client);
    drop(client);
    assert!(unbind.0.wait().unwrap().success());
}

#[test]
fn both_ways_at_once_are_refused_with_a_reason() {
    let mut daemon = Daemon::with_config(ALL);
    let uuid = daemon.card();
    let path = socket(&daemon, &uuid);
    let open = |path: PathBuf| {
        let mut options = fs::File::options();
        options.read(true).write(true).open(path).unwrap()
    };
    let (iommu, device) = (open(daemon.path("dev/iommu")), open(daemon.node("vfio0")));
    // An open file alone keeps nobody out, as in the kernel: it may do nothing before BIND.
    let client = Client::connect(&path).unwrap();
    assert_eq!(bind::bind(&device, &iommu), Err(Errno::INVAL));
    let own = format!("(pid {})", std::process::id());
    let line = daemon.expect_log("BIND by");
    assert!(
        line.contains("has it open") && line.matches(&own).count() == 2,
        "{line}"
    );
    drop(client);
    until("closed", || bind::bind(&device, &iommu).ok());
    let refused = Client::connect(&path).unwrap_err();
    assert_eq!(refused.refused(), Some(Errno::BUSY), "{refused}");
    let who = daemon.json(&["who", "vfio0"]);
    let reason = who["refused"][0]["reason"].as_str().unwrap();
    assert!(reason.contains(&std::process::id().to_string()), "{reason}");
    assert_eq!(who["holders"][0]["via"], "device", "{who}");
    drop(device);
    until("served", || Client::connect(&path).ok());
}

#[test]
fn the_configuration_says_who_may_connect() {
    let daemon = Daemon::with_config(
        "[vfio-user]\noffer = \"all\"\nmode = \"666\"\nowner = \"65534\"\nusers = [1, \"daemon\"]\n",
    );
    let uuid = daemon.card();
    let path = socket(&daemon, &uuid);
    let meta = fs::metadata(&path).unwrap();
    assert_eq!(meta.permissions().mode() & 0o777, 0o666);
    assert_eq!(meta.uid(), 65534);
    let connect_as = |uid: u32| {
        let path = path.clone();
        let as_user = move || {
            let uid = rustix::process::Uid::from_raw(uid);
            rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
            Client::connect(path).map(drop)
        };
        std::thread::spawn(as_user).join().unwrap()
    };
    connect_as(1).unwrap();
    until("closed", || {
        (daemon.json(&["show", "vfio0"])["show"]["device"]["users"] == 0).then_some(())
    });
    assert!(connect_as(65534).is_err());
    let who = daemon.json(&["who", "vfio0"]);
    assert_eq!(who["refused"][0]["uid"], 65534, "{who}");
}

/// True if a thread that serves vfio-user runs or wants to; one that waits does not.
fn polls(pid: u32) -> bool {
    fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .any(|task| {
            let stat = task.and_then(|task| fs::read_to_string(task.path().join("stat")));
            stat.is_ok_and(|stat| stat.contains("(vfio-user) R "))
        })
}

#[test]
fn a_polled_client_is_served_and_keeps_nothing_up() {
    if std::thread::available_parallelism().unwrap().get() < 2 {
        vfiod_tests::skip("one processor, and polling never takes the last");
        return;
    }
    let mut daemon = Daemon::with_config(&(ALL.to_owned() + "poll = true\n"));
    let pid = daemon.child.id();
    let uuid = daemon.card();
    let path = socket(&daemon, &uuid);
    let mut client = Client::connect(&path).unwrap();
    assert_is_mtty(&mut client);
    until("polled", || polls(pid).then_some(()));
    // It is silent: the processor is given back, the device is not.
    until("it rests", || {
        let looks = (0..100).all(|_| !polls(pid));
        looks.then_some(())
    });
    assert_is_mtty(&mut client);
    until("polled again", || polls(pid).then_some(()));

    // Another process has the connection, and is killed.
    let socket = client.socket().try_clone().unwrap();
    let mut holder = Killed(
        Command::new("sleep")
            .arg("1000")
            .stdin(std::process::Stdio::from(std::os::fd::OwnedFd::from(
                socket,
            )))
            .spawn()
            .unwrap(),
    );
    assert_is_mtty(&mut client);
    drop(client);
    assert_eq!(
        daemon.json(&["show", "vfio0"])["show"]["device"]["users"],
        1
    );
    holder.0.kill().unwrap();
    until("closed", || {
        (daemon.json(&["show", "vfio0"])["show"]["device"]["users"] == 0).then_some(())
    });

    // Neither an unbind nor the daemon's own end waits for one who polls.
    let mut client = Client::connect(&path).unwrap();
    assert_is_mtty(&mut client);
    daemon.text(&["unbind", "vfio0", "--force"]);
    assert!(client.device_info().is_err(), "it is still served");
    daemon.text(&["bind", &uuid]);
    let mut client = Client::connect(&path).unwrap();
    assert_is_mtty(&mut client);
    until("polled", || polls(pid).then_some(()));
    daemon.signal(Signal::TERM);
    assert!(daemon.wait().success());
    assert!(client.device_info().is_err());
}

#[test]
fn what_cannot_be_is_said_at_start() {
    let check = |config: &str, text: &str| {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("etc/vfiod")).unwrap();
        fs::write(root.path().join("etc/vfiod/vfiod.toml"), config).unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_vfiod"))
            .args(["serve", "--root"])
            .arg(root.path())
            .output()
            .unwrap();
        assert_said(&output, 1, text);
    };
    let long = "x".repeat(80);
    check(
        &format!("[vfio-user]\ndir = \"/tmp/{long}\"\n"),
        "too long by",
    );
    check("[vfio-user]\nowner = \"nobody-knows\"\n", "vfio-user.owner");
    check(
        "[vfio-user]\nusers = [\"nobody-knows\"]\n",
        "vfio-user.users",
    );
    check("[vfio-user]\nusers = []\n", "name who may be served");
    check("[vfio-user]\nofer = \"all\"\n", "line 2");
}

#[test]
fn what_a_killed_daemon_left_is_replaced_and_what_is_others_is_not() {
    let mut daemon = Daemon::with_config(
        &(ALL.to_owned() + "[mdevs.83b8f4f2-509f-382f-3c1e-e6bfe0fa1001]\ntype = \"mtty-1\"\n"),
    );
    let path = socket(&daemon, "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001");
    daemon.signal(Signal::KILL);
    daemon.wait();
    assert!(path.exists());
    let root = daemon.into_root();
    let path = root
        .path()
        .join("vfio-user")
        .join(path.file_name().unwrap());
    let daemon = Daemon::on(root, &[]);
    assert_is_mtty(&mut Client::connect(&path).unwrap());
    // Another's socket and another's file stay; the device lives without.
    let taken = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002";
    let listener = UnixListener::bind(socket(&daemon, taken)).unwrap();
    daemon.text(&["start", "mtty-1", "--uuid", taken]);
    let answer = daemon.run(&["offer", taken]);
    assert_said(&answer, 1, "another process serves this socket");
    drop(listener);
    daemon.text(&["offer", taken]);
    let file = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1003";
    fs::write(socket(&daemon, file), "mine").unwrap();
    daemon.text(&["start", "mtty-1", "--uuid", file]);
    assert_said(&daemon.run(&["offer", file]), 1, "is no socket");
    assert_eq!(fs::read_to_string(socket(&daemon, file)).unwrap(), "mine");
}

#[test]
fn thousands_of_sockets_come_and_go() {
    let daemon = Daemon::with_config(&(ALL.to_owned() + "[parents.mdpy]\ncount = 100\n"));
    let dir = daemon.path("vfio-user");
    let create = daemon.path("sys/class/mdev_bus/mdpy/mdev_supported_types/mdpy-vga/create");
    let threads = |pid: u32| fs::read_dir(format!("/proc/{pid}/task")).unwrap().count();
    let fds = |pid: u32| fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let pid = daemon.child.id();
    let round = |number: usize| {
        let uuids: Vec<String> = (0..100)
            .map(|n| format!("83b8f4f2-509f-382f-{number:04x}-{n:012x}"))
            .collect();
        for uuid in &uuids {
            fs::write(&create, uuid).unwrap();
        }
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 100);
        let at_work = (threads(pid), fds(pid));
        for uuid in &uuids {
            let remove = daemon.path(&format!("sys/bus/mdev/devices/{uuid}/remove"));
            fs::write(&remove, "1").unwrap();
        }
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
        at_work
    };
    let (threads_first, _) = round(0);
    let fds_between = fds(pid);
    for number in 1..20 {
        let (threads_now, _) = round(number);
        assert!(threads_now <= threads_first + 8, "{threads_now} threads");
    }
    until("nothing is left", || {
        (fds(pid) <= fds_between + 8).then_some(())
    });
}

mod bind {
    #![expect(unsafe_code, reason = "an ioctl as a C program makes it")]

    use rustix::io::Errno;
    use std::fs::File;
    use std::os::fd::AsRawFd as _;

    /// `VFIO_DEVICE_BIND_IOMMUFD`.
    pub(super) fn bind(device: &File, iommu: &File) -> Result<(), Errno> {
        const BIND: u64 = (b';' as u64) << 8 | (100 + 18);
        let mut argument = [16, 0, iommu.as_raw_fd(), 0];
        // SAFETY: The argument is a structure of 16 bytes, as its first word says, and lives on.
        match unsafe { libc::ioctl(device.as_raw_fd(), BIND, argument.as_mut_ptr()) } {
            0 => Ok(()),
            _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap()),
        }
    }
}

/// A program that serves one device.
fn program(configure: impl FnOnce(&mut Command)) -> Killed {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vfiod"));
    command.args(["vfio-user", "mtty-2"]);
    configure(&mut command);
    Killed(command.stderr(Stdio::piped()).spawn().unwrap())
}

#[test]
fn one_device_is_served_by_a_program_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("card.sock");
    let mut server = program(|command| {
        command.arg(format!("--socket-path={}", path.display()));
    });
    until("it listens", || UnixStream::connect(&path).ok());
    for _ in 0..2 {
        // One after the other.
        let mut client = until("served", || Client::connect(&path).ok());
        assert_is_mtty(&mut client);
    }
    let pid = rustix::process::Pid::from_child(&server.0);
    // With a client and without one it ends at once.
    let _client = until("served", || Client::connect(&path).ok());
    rustix::process::kill_process(pid, Signal::TERM).unwrap();
    assert!(server.0.wait().unwrap().success());
    assert!(!path.exists());
}

#[test]
fn a_program_serves_an_inherited_socket_until_its_client_goes() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty()).unwrap();
    let mut server = program(|command| {
        command.arg(format!("--fd={}", theirs.as_raw_fd()));
    });
    drop(theirs);
    let mut client = Client::greet(ours, &vfio_user::client::Hello::default()).unwrap();
    assert_is_mtty(&mut client);
    drop(client);
    assert!(server.0.wait().unwrap().success());
}

#[test]
fn a_program_says_what_it_cannot_serve() {
    let run = |words: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_vfiod"))
            .arg("vfio-user")
            .args(words)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    };
    assert_said(&run(&["mtty-2"]), 2, "--socket-path");
    assert_said(
        &run(&["mtty-2", "--fd=3", "--socket-path=/x"]),
        2,
        "cannot be used with",
    );
    assert_said(&run(&["mtty-2", "--fd=-1"]), 1, "0 or more");
    assert_said(&run(&["mtty-2", "--fd=77"]), 1, "--fd=77");
    assert_said(&run(&["mtty-2", "--fd=0"]), 1, "no UNIX stream socket");
    assert_said(&run(&["mtty-9", "--socket-path=/x"]), 1, "there are");
}

#[test]
fn each_description_starts_a_server() {
    let share = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../share/vfio-user");
    let mut found = 0;
    for entry in fs::read_dir(share).unwrap() {
        let text = fs::read_to_string(entry.unwrap().path()).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["binary"], "/usr/bin/vfiod");
        assert!(!json["description"].as_str().unwrap().is_empty());
        let words: Vec<String> = serde_json::from_value(json["args"].clone()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _server = Killed(
            Command::new(env!("CARGO_BIN_EXE_vfiod"))
                .args(words)
                .arg(format!("--socket-path={}", path.display()))
                .stderr(Stdio::null())
                .spawn()
                .unwrap(),
        );
        let mut client = until("served", || Client::connect(&path).ok());
        client.device_info().unwrap();
        found += 1;
    }
    assert!(found > 0);
}
