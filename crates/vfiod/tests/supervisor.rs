//! `vfioctl run`'s supervisor: what it answers, to whom, and what it lets through.

mod common;

use common::Daemon;
use std::os::unix::process::ExitStatusExt;

/// Runs a shell command under supervision: what it prints.
fn inside(daemon: &Daemon, command: &str) -> String {
    let output = daemon.run(&["run", "--", "sh", "-c", command]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success(),
        "{command}: {text}{:?}",
        output.stderr
    );
    text.trim().to_owned()
}

#[test]
fn a_node_is_the_char_device_that_sysfs_promises() {
    let daemon = Daemon::start();
    daemon.card();
    let promised = inside(&daemon, "cat /sys/class/vfio-dev/vfio0/dev");
    let (major, minor) = promised.split_once(':').unwrap();
    let (major, minor): (u64, u64) = (major.parse().unwrap(), minor.parse().unwrap());
    let char_device = format!("character special file {major:x}:{minor:x} 600");
    // By path, by link, by a path from where the command is; statx and newfstatat.
    for path in [
        "/dev/vfio/devices/vfio0",
        "/dev/../dev/./vfio//devices/vfio0",
        "devices/vfio0",
        "/proc/self/cwd/devices/vfio0",
        "/dev/fd/5",
        "/proc/self/fd/5",
        "/proc/thread-self/fd/5",
    ] {
        let command = format!(
            "cd /dev/vfio; exec 5</dev/vfio/devices/vfio0; stat -L -c '%F %t:%T %a' {path}"
        );
        assert_eq!(inside(&daemon, &command), char_device, "{path}");
    }
    assert_eq!(
        inside(
            &daemon,
            "test -c /dev/vfio/devices/vfio0 && ls -l /dev/vfio/devices | grep ^c | wc -l"
        ),
        "1"
    );
    assert_eq!(inside(&daemon, "ls /dev/vfio/devices"), "vfio0");
    // What is not a node is what it is.
    for (path, kind) in [
        ("/dev/vfio", "directory"),
        ("/dev/null", "character special file"),
        ("/etc/passwd", "regular file"),
        ("/proc/self", "symbolic link"),
    ] {
        let command = format!("stat -c %F {path}");
        assert_eq!(inside(&daemon, &command), kind);
    }
    let refused = daemon.run(&["run", "--", "stat", "/dev/vfio/devices/vfio1"]);
    assert!(!refused.status.success());
    let text = String::from_utf8(refused.stderr).unwrap();
    assert!(text.contains("No such file"), "{text}");
    // Without a supervisor it is the regular file that FUSE has.
    let plain = daemon.text(&[
        "run",
        "--no-supervisor",
        "--",
        "stat",
        "-c",
        "%F",
        "/dev/vfio/devices/vfio0",
    ]);
    assert_eq!(plain.trim(), "regular empty file");
}

#[test]
fn exit_status_and_signals_are_the_commands_own() {
    let daemon = Daemon::start();
    assert_eq!(daemon.code(&["run", "--", "sh", "-c", "exit 201"]), 201);
    for signal in [9, 15] {
        let command = format!("kill -{signal} $$");
        let output = daemon.run(&["run", "--", "sh", "-c", &command]);
        assert_eq!(output.status.signal(), Some(signal));
    }
}

#[test]
fn one_supervisor_is_enough() {
    let daemon = Daemon::start();
    let vfioctl = common::vfioctl().to_str().unwrap();
    let root = daemon.root().to_str().unwrap();
    let nested = [
        "run", "--", vfioctl, "--root", root, "run", "--", "echo", "ran",
    ];
    let output = daemon.run(&nested);
    assert_eq!(output.status.code(), Some(125));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("runs under `vfioctl run` already"), "{text}");
    assert!(output.stdout.is_empty());
}

#[test]
fn the_machine_has_vfio() {
    let daemon = Daemon::start();
    let regions = inside(&daemon, "cat /proc/devices");
    let before = std::fs::read_to_string("/proc/devices").unwrap();
    let ours = [" vfio", " vfio-dev"];
    let others = |text: &str| -> Vec<String> {
        let lines = text.lines().map(str::to_owned);
        let ours = |line: &String| ours.iter().any(|name| line.ends_with(name));
        lines.filter(|line| !ours(line)).collect()
    };
    assert_eq!(others(&regions), others(&before));
    let major = |name: &str| {
        let mut chars = regions.lines().take_while(|line| !line.is_empty());
        let line = chars.find(|line| line.ends_with(name)).unwrap();
        line.split_whitespace().next().unwrap().to_owned()
    };
    daemon.card();
    let dev = inside(&daemon, "cat /sys/class/vfio-dev/vfio0/dev");
    assert_eq!(format!("{}:0", major(" vfio-dev")), dev);
    let group = inside(&daemon, "cat /sys/class/vfio/*/dev");
    assert_eq!(format!("{}:0", major(" vfio")), group);
    let misc = inside(&daemon, "cat /proc/misc");
    assert!(misc.contains("196 vfio\n"), "{misc}");
    let iommu = inside(&daemon, "cat /sys/class/misc/iommu/dev");
    let iommu = format!("{} iommu", iommu.strip_prefix("10:").unwrap());
    assert!(misc.lines().any(|line| line.trim() == iommu), "{misc}");
    assert_eq!(std::fs::read_to_string("/proc/devices").unwrap(), before);
}

#[test]
fn modprobe_need_not_load_vfio() {
    let daemon = Daemon::start();
    if !std::path::Path::new("/sbin/modprobe").exists() {
        vfiod_tests::skip("this machine has no /sbin/modprobe");
        return;
    }
    let code = |words: &[&str]| {
        let mut args = vec!["run", "--"];
        args.extend(words);
        let output = daemon.run(&args);
        let text = String::from_utf8(output.stderr).unwrap();
        (output.status.code().unwrap(), text)
    };
    for works in [
        &["/sbin/modprobe", "vfio-pci"][..],
        &["modprobe", "-q", "vfio_iommu_type1"],
        &["/sbin/modprobe", "-a", "vfio", "vfio_pci", "mdev"],
        &["/sbin/modprobe", "vfio_pci", "ids=8086:1234"],
        &["/sbin/modprobe", "-C", "/dev/null", "vfio"],
        &["/sbin/modprobe", "--version"],
    ] {
        let (code, text) = code(works);
        assert_eq!(code, 0, "{works:?}: {text}");
    }
    // Others are the real one's to find, and to miss.
    for wrong in [
        &["/sbin/modprobe", "no-such-module"][..],
        &["/sbin/modprobe", "no-such-module", "vfio"],
        &["/sbin/modprobe", "-a", "vfio", "no-such-module"],
    ] {
        let (code, text) = code(wrong);
        assert_ne!(code, 0, "{wrong:?}");
        assert!(
            text.contains("no-such-module") && !text.contains(" vfio"),
            "{text}"
        );
    }
    let (removed, text) = code(&["/sbin/modprobe", "-r", "vfio-pci"]);
    assert_eq!(removed, 1);
    assert!(text.contains("in use: it is vfiod's"), "{text}");
}
