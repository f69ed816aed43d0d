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
