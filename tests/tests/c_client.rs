//! A C program, compiled here against the kernel's headers, in a whole session with each device:
//! `assets/cdev_client.c`.

use std::io::BufRead as _;
use std::io::BufReader;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;

use vfiod_tests::daemon;
use vfiod_tests::daemon::Daemon;
use vfiod_tests::packages::Prefix;
use vfiod_tests::programs;
use vfiod_tests::skip;
use vfiod_tests::skip::NO_PASSTHROUGH;
use vfiod_tests::skip::kernel_has_passthrough;

const UUID: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";

/// The client prints it when it waits for somebody to remove its device.
const READY: &str = "ready to be removed";
/// The client prints it when all checks have passed.
const DONE: &str = "all is as it should be";

/// Users are asked to leave twenty times a second.
const CONFIG: &str = "request-interval = 0.05\n";

/// The compiled client, with options such as `-static`, and a daemon with one device.
fn scene(name: &str, mdev_type: &str, options: &[&str]) -> Option<(PathBuf, Daemon)> {
    let prefix = match daemon::possible().and_then(|()| Prefix::find()) {
        Ok(prefix) => prefix,
        Err(reason) => {
            skip(&reason);
            return None;
        }
    };
    let dir = env!("CARGO_TARGET_TMPDIR");
    let program = programs::compile(&prefix, "cdev_client.c", dir, name, options);
    let daemon = Daemon::start(CONFIG).expect("vfiod serves");
    daemon
        .check(&["start", mdev_type, "--uuid", UUID])
        .expect("the device is made");
    Some((program, daemon))
}

/// What the client is to know of this kernel.
fn trapped() -> &'static [&'static str] {
    if kernel_has_passthrough() {
        &[]
    } else {
        &["trapped"]
    }
}

/// Runs a client to its end; when it is ready, its device is removed. Returns what it printed.
fn run(client: &mut Command, daemon: &Daemon) -> String {
    let mut child = client
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the client starts");
    let lines = BufReader::new(child.stdout.take().expect("its output is a pipe")).lines();
    let mut printed = String::new();
    std::thread::scope(|scope| {
        let mut removal = None;
        for line in lines {
            let line = line.expect("the client prints text");
            printed += &line;
            printed.push('\n');
            if line == READY {
                removal = Some(scope.spawn(|| daemon.check(&["stop", UUID, "--wait"])));
            }
        }
        if let Some(removal) = removal {
            let removed = removal.join().expect("the thread lives");
            removed.expect("the device goes when its user has left");
        }
    });
    let status = child.wait().expect("it ends");
    let tail: Vec<&str> = printed.lines().rev().take(12).collect();
    assert!(
        status.success() && printed.trim_end().ends_with(DONE),
        "the client ended with {status}; what it printed last, newest first: {tail:#?}"
    );
    printed
}

/// The client of a serial card, until the card is gone.
fn serial_card(name: &str, options: &[&str]) {
    let Some((program, daemon)) = scene(name, "mtty-2", options) else {
        return;
    };
    let node = daemon.node("vfio0");
    let mut client = Command::new(program);
    let printed = run(client.arg("mtty").arg(daemon.iommu()).arg(&node), &daemon);
    assert!(printed.contains(READY), "it has been asked to leave");
    assert!(!node.exists(), "the node is gone");
    let shown = daemon.ctl(&["show", UUID]).expect("vfioctl runs");
    assert_eq!(
        shown.code, 3,
        "the card is gone: {}{}",
        shown.out, shown.err
    );
    daemon.stop().expect("the daemon ends well");
}

/// The client of a display, with the nodes where they are.
fn display(name: &str, mdev_type: &str, options: &[&str]) {
    let Some((program, daemon)) = scene(name, mdev_type, options) else {
        return;
    };
    let mut client = Command::new(program);
    client
        .arg("mdpy")
        .arg(daemon.iommu())
        .arg(daemon.node("vfio0"))
        .args(trapped());
    run(&mut client, &daemon);
    assert_nobody_holds_it(&daemon);
    daemon.stop().expect("the daemon ends well");
    if !kernel_has_passthrough() {
        skip(NO_PASSTHROUGH);
    }
}

fn assert_nobody_holds_it(daemon: &Daemon) {
    daemon::until("the display has no user", Duration::from_secs(10), || {
        let who = daemon.ctl(&["who", UUID, "--json"]).expect("vfioctl runs");
        let json: serde_json::Value = serde_json::from_str(&who.out).unwrap_or_default();
        json["holders"].as_array().is_some_and(Vec::is_empty)
    });
}

#[test]
fn a_serial_card() {
    serial_card("client-mtty", &[]);
}

#[test]
fn a_serial_card_and_a_program_without_libraries() {
    serial_card("client-mtty-static", &["-static"]);
}

#[test]
fn a_display() {
    display("client-mdpy", "mdpy-vga", &[]);
}

#[test]
fn a_large_display_and_a_program_without_libraries() {
    display("client-mdpy-static", "mdpy-hd", &["-static"]);
}

/// The program finds the nodes in the places that programs have built in.
#[test]
fn a_display_where_the_kernel_has_it() {
    let Some((program, daemon)) = scene("client-mdpy-run", "mdpy-xga", &[]) else {
        return;
    };
    let mut client = daemon.vfioctl();
    client.args(["run", "--"]).arg(program);
    client.args(["mdpy", "/dev/iommu", "/dev/vfio/devices/vfio0"]);
    run(client.args(trapped()), &daemon);
    assert_nobody_holds_it(&daemon);
    daemon.stop().expect("the daemon ends well");
    if !kernel_has_passthrough() {
        skip(NO_PASSTHROUGH);
    }
}
