//! A static C program in each of the five ways to an address space, under `vfioctl run`, and in each way
//! that programs are hard on a supervisor: `assets/group_client.c`.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use vfiod_tests::daemon;
use vfiod_tests::daemon::Daemon;
use vfiod_tests::daemon::until;
use vfiod_tests::packages::Prefix;
use vfiod_tests::programs;
use vfiod_tests::skip;

const UUID: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
const OTHER: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002";
const LIMIT: Duration = Duration::from_secs(20);

const MODES: [&str; 5] = ["type1", "type1v2", "compat", "compatv2", "native"];

/// The compiled client and a daemon with two cards, or a reason why there is none.
fn scene() -> Option<(PathBuf, Daemon)> {
    let prefix = match daemon::possible().and_then(|()| Prefix::find()) {
        Ok(prefix) => prefix,
        Err(reason) => {
            skip(&reason);
            return None;
        }
    };
    let dir = env!("CARGO_TARGET_TMPDIR");
    let options = ["-static", "-pthread"];
    let program = programs::compile(&prefix, "group_client.c", dir, "group_client", &options);
    let daemon = Daemon::start("").expect("vfiod serves");
    for uuid in [UUID, OTHER] {
        daemon
            .check(&["start", "mtty-2", "--uuid", uuid])
            .expect("a card is made");
    }
    Some((program, daemon))
}

/// Runs the client in the modes given; afterwards nobody has a card, and the daemon stops well.
fn run(how: &str, modes: &[&str]) {
    let Some((program, daemon)) = scene() else {
        return;
    };
    for mode in modes {
        let mut client = daemon.vfioctl();
        client.args(["run", "--"]).arg(&program);
        client.args([mode, how, UUID, OTHER]);
        // Until its output ends: that may be a child's.
        let output = daemon::output(&mut client).expect("it ends");
        let tail: Vec<&str> = output.out.lines().rev().take(12).collect();
        assert_eq!(output.err, "", "{mode}, newest first: {tail:#?}");
        assert_eq!(output.code, 0, "{mode}: {tail:#?}");
        assert!(
            tail.contains(&"all is as it should be"),
            "{mode}: {tail:#?}"
        );
        until("nobody has a card", LIMIT, || {
            let list = daemon.check(&["list", "--json"]).expect("vfioctl answers");
            let list: serde_json::Value = serde_json::from_str(&list).expect("it is JSON");
            let devices = list["devices"].as_array().expect("a list");
            devices.len() == 2 && devices.iter().all(|device| device["users"] == 0)
        });
    }
    daemon.stop().expect("nothing is left");
}

#[test]
fn a_whole_session_in_all_five_modes() {
    run("plain", &MODES);
}

#[test]
fn another_thread_opens_and_a_third_one_uses() {
    run("threads", &MODES);
}

#[test]
fn a_signal_every_hundred_microseconds() {
    run("storm", &MODES);
}

#[test]
fn closed_in_every_order() {
    run("orders", &MODES);
}

#[test]
fn a_child_goes_on_when_its_parent_has_ended() {
    run("fork", &MODES);
}

#[test]
fn killed_at_any_moment() {
    run("killed", &["type1v2", "compatv2", "native"]);
}

#[test]
fn names_and_descriptors_of_others() {
    run("wrong", &["type1v2"]);
}

#[test]
fn a_parent_that_ignores_its_children_and_a_proc_of_others() {
    if let Err(reason) = daemon::possible() {
        skip(&reason);
        return;
    }
    let daemon = Daemon::start("").expect("vfiod serves");
    let run = |how: &[&str], options: &[&str]| {
        let mut command = Command::new(how[0]);
        command.args(&how[1..]);
        let vfioctl = daemon.vfioctl();
        command.arg(vfioctl.get_program()).args(vfioctl.get_args());
        command.arg("run").args(options);
        command.args(["--", "stat", "-L", "-c", "%F", "/dev/iommu"]);
        daemon::output(&mut command).expect("it ends")
    };
    let ignoring = ["sh", "-c", "trap '' CHLD; exec \"$@\"", "sh"];
    for options in [&[][..], &["--uevents"]] {
        let output = run(&ignoring, options);
        assert_eq!(output.out.trim(), "character special file", "{output:?}");
        assert_eq!(output.code, 0, "{output:?}");
    }
    // Numbers of processes mean others there.
    let output = run(&["unshare", "--pid", "--fork"], &[]);
    assert_eq!(output.code, 125, "{output:?}");
    assert!(output.err.contains("pid namespace"), "{output:?}");
    let output = run(&["unshare", "--pid", "--fork", "--mount-proc"], &[]);
    assert_eq!(output.out.trim(), "character special file", "{output:?}");
    daemon.stop().expect("nothing is left");
}
