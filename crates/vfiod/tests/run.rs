//! `vfioctl run`: what a command finds inside, and that nothing changes outside.

mod common;

use common::{Daemon, Killed, PATIENCE, lines, until};
use std::fs;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::mpsc::Receiver;
use std::time::Duration;

/// A shell inside, one command at a time.
struct Inside {
    _shell: Killed,
    stdin: ChildStdin,
    stdout: Receiver<String>,
}

impl Inside {
    fn new(daemon: &Daemon, options: &[&str]) -> Inside {
        let mut args = vec!["run"];
        args.extend(options);
        args.extend(["--", "sh"]);
        let mut shell = Killed(
            daemon
                .command(&args)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap(),
        );
        Inside {
            stdin: shell.0.stdin.take().unwrap(),
            stdout: lines(shell.0.stdout.take().unwrap()),
            _shell: shell,
        }
    }

    /// What a command prints, with its errors.
    fn text(&mut self, command: &str) -> String {
        writeln!(
            self.stdin,
            "{{ {command}\n}} 2>&1 </dev/null; echo; echo END"
        )
        .unwrap();
        let mut text = String::new();
        loop {
            let line = self.stdout.recv_timeout(PATIENCE).unwrap();
            if line == "END" {
                return text.trim().to_owned();
            }
            text.push_str(&line);
            text.push('\n');
        }
    }
}

fn outside(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    (text + &String::from_utf8_lossy(&output.stderr))
        .trim()
        .to_owned()
}

#[test]
fn the_command_is_the_process() {
    let daemon = Daemon::start();
    for (command, code) in [
        (&["true"][..], 0),
        (&["sh", "-c", "exit 77"], 77),
        (&["/etc/passwd"], 126),
        (&["/nonexistent"], 127),
    ] {
        let mut args = vec!["run", "--"];
        args.extend(command);
        assert_eq!(daemon.code(&args), code, "{command:?}");
    }
    let mut child = daemon
        .command(&["run", "--", "sleep", "1000"])
        .spawn()
        .unwrap();
    let stat = format!("/proc/{}/comm", child.id());
    until("it is sleep", || {
        (fs::read_to_string(&stat).unwrap() == "sleep\n").then_some(())
    });
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(15));
}

#[test]
fn ours_is_beside_the_machines_own() {
    let daemon = Daemon::start();
    let uuid = daemon.card();
    // Shared memory and terminals come and go by themselves.
    let state = || {
        outside(
            "find /dev -path /dev/pts -prune -o -path /dev/shm -prune -o -printf '%p %y %m %U %G\\n' | \
             sort; awk '$5 ~ \"^/(dev|sys)\"' /proc/self/mountinfo",
        )
    };
    let before = state();
    let mut inside = Inside::new(&daemon, &[]);
    // What the machine has reads as outside.
    for command in [
        "nproc",
        "cat /sys/devices/system/cpu/online /proc/self/comm",
        "ls /sys/kernel/mm/hugepages /sys/devices/system /sys/block /sys/fs",
        "cat /sys/kernel/mm/transparent_hugepage/enabled",
        "stat -c '%t:%T %a %u:%g' /dev/null /dev/zero /dev/kvm /dev/fuse /dev/tty",
        "cd /sys/class; for c in *; do case $c in vfio|vfio-dev|mdev_bus|mtty|mdpy|bdi) ;; *) ls -I vfio -I iommu $c;; esac; done",
        "cd /sys/module; for m in *; do case $m in vfio*|mdev|mtty|mdpy|iommufd) ;; *) find $m -type f;; esac; done | sort",
        "ls -l /sys/dev/block; readlink /dev/fd /dev/stdin",
        "cat /sys/kernel/uevent_seqnum",
    ] {
        // The machine goes on meanwhile: other tests mount, and each mount is a backing device and
        // an event. What differs for good is what differs every time.
        let mut same = || inside.text(command) == outside(command);
        if !(0..20).any(|_| same()) {
            assert_eq!(inside.text(command), outside(command), "{command}");
        }
    }
    assert_eq!(
        inside.text("script -qec 'tty; echo a pty' /dev/null | tr -d '\\r' | tail -1"),
        "a pty"
    );
    let name = format!("vfiod-test-{}", std::process::id());
    inside.text(&format!("echo shared > /dev/shm/{name}"));
    assert_eq!(
        outside(&format!("cat /dev/shm/{name}; rm /dev/shm/{name}")),
        "shared"
    );
    // What is ours is in its places.
    assert_eq!(inside.text("ls /dev/vfio/devices"), "vfio0");
    assert_eq!(inside.text("test -e /dev/iommu && echo yes"), "yes");
    assert_eq!(inside.text("ls /sys/bus/mdev/devices"), uuid);
    assert_eq!(
        inside.text(&format!("realpath /sys/bus/mdev/devices/{uuid}/subsystem")),
        "/sys/bus/mdev"
    );
    let number = inside.text("cat /sys/class/vfio-dev/vfio0/dev");
    assert!(number.ends_with(":0"), "{number}");
    assert_eq!(
        inside.text(&format!("realpath /sys/dev/char/{number}")),
        format!("/sys/devices/virtual/mtty/mtty/{uuid}/vfio-dev/vfio0")
    );
    assert_eq!(
        inside.text("test -d /sys/bus/pci && test -d /sys/module/vfio && echo yes"),
        "yes"
    );
    assert_eq!(inside.text("echo $SYSTEMD_DEVICE_VERIFY_SYSFS"), "0");
    drop(inside);
    assert_eq!(state(), before, "nothing changed outside");
}

#[test]
fn devices_appear_and_vanish_inside() {
    let daemon = Daemon::start();
    let mut inside = Inside::new(&daemon, &[]);
    assert_eq!(
        inside.text("ls /dev/vfio/devices /sys/bus/mdev/devices | wc -w"),
        "2"
    );
    let uuid = daemon.card();
    let number = inside.text("cat /sys/class/vfio-dev/vfio0/dev");
    let places = format!(
        "ls -d /dev/vfio/devices/vfio0 /sys/class/vfio-dev/vfio0 /sys/dev/char/{number} \
         /sys/bus/mdev/devices/{uuid} /sys/devices/virtual/mtty/mtty/{uuid} 2>/dev/null | wc -l"
    );
    assert_eq!(inside.text(&places), "5");
    let group = daemon.json(&["list"])["devices"][0]["iommu_group"].to_string();
    assert_eq!(
        inside.text(&format!("ls /sys/kernel/iommu_groups/{group}/devices")),
        uuid
    );
    // Its own mount, made at the first open, arrives here too.
    inside.text("exec 5</dev/vfio/devices/vfio0");
    let who = daemon.json(&["who", "vfio0"]);
    assert_eq!(who["holders"][0]["command"], "sh", "{who}");
    inside.text("exec 5<&-");
    until("it is closed", || {
        (daemon.json(&["list"])["devices"][0]["users"] == 0).then_some(())
    });
    daemon.text(&["stop", &uuid]);
    assert_eq!(inside.text(&places), "0");
    assert_eq!(
        inside
            .text("echo mtty > /sys/bus/mdev/nonexistent; ls /sys/bus/mdev/devices | wc -l")
            .lines()
            .last(),
        Some("0")
    );
    // And by the tree from inside, as mdevctl does it.
    inside.text(&format!(
        "printf %s {uuid} > /sys/class/mdev_bus/mtty/mdev_supported_types/mtty-1/create"
    ));
    assert_eq!(inside.text(&places), "5");
}

#[test]
fn uevents_of_our_devices_come_into_a_network_of_its_own() {
    let daemon = Daemon::start();
    let mut monitor = Killed(
        daemon
            .command(&["run", "--uevents", "--", "udevadm", "monitor", "--kernel"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let said = lines(monitor.0.stderr.take().unwrap());
    let first = said.recv_timeout(PATIENCE).unwrap();
    assert!(first.contains("network namespace"), "{first}");
    let events = lines(monitor.0.stdout.take().unwrap());
    let expect = |action: &str, path: &str| {
        let mut seen = Vec::new();
        while let Ok(line) = events.recv_timeout(Duration::from_secs(5)) {
            if line.contains(action) && line.contains(path) {
                return;
            }
            seen.push(line);
        }
        panic!("no {action} of {path} in {seen:?}");
    };
    // It prints this once it listens.
    until("the monitor listens", || {
        let line = events.recv_timeout(PATIENCE).unwrap();
        line.contains("KERNEL").then_some(())
    });
    let uuid = daemon.card();
    expect("add", &format!("{uuid} "));
    expect("add", "vfio-dev/vfio0");
    let file = daemon
        .path("sys/bus/mdev/devices")
        .join(&uuid)
        .join("uevent");
    fs::write(file, "change\n").unwrap();
    expect("change", &uuid);
    daemon.text(&["stop", &uuid]);
    expect("remove", "vfio-dev/vfio0");
    expect("remove", &format!("{uuid} "));
    // Only loopback, and it is up.
    let links = daemon.text(&["run", "--uevents", "--", "ls", "/proc/self/net/dev_snmp6"]);
    let v4 = daemon.text(&[
        "run",
        "--uevents",
        "--",
        "sh",
        "-c",
        "tail -n +3 /proc/net/dev | wc -l",
    ]);
    assert_eq!(v4.trim(), "1", "{links}");
}
