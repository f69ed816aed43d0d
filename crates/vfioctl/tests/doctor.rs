//! `vfioctl doctor`, the built program, on this machine and on ones that lack something.

use serde_json::Value;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output};
use tempfile::TempDir;

/// The program, where others than root find it too.
struct Program {
    _dir: TempDir,
    path: PathBuf,
}

impl Program {
    fn new() -> Program {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let path = dir.path().join("vfioctl");
        vfiod_tests::programs::copy(env!("CARGO_BIN_EXE_vfioctl"), &path);
        Program { _dir: dir, path }
    }

    /// `vfioctl doctor --json`, started by the words before it.
    fn json(&self, before: &[&str]) -> (Value, Output) {
        let mut words: Vec<&str> = before.to_vec();
        words.extend([self.path.to_str().unwrap(), "doctor", "--json"]);
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).env_remove("VFIOD_SOCKET");
        let output = command.env_remove("VFIOD_ROOT").output().unwrap();
        let json = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{before:?}: {error}: {output:?}"));
        (json, output)
    }

    /// The same after a line of shell, in a mount namespace of its own.
    fn after(&self, line: &str) -> (Value, Output) {
        let script = format!("{line} && exec \"$0\" \"$@\"");
        self.json(&["unshare", "--mount", "sh", "-c", &script])
    }
}

fn finding<'a>(report: &'a Value, name: &str) -> &'a Value {
    let all = report["doctor"]["findings"].as_array().unwrap();
    let one = all.iter().find(|finding| finding["name"] == name);
    one.unwrap_or_else(|| panic!("no {name} in {report}"))
}

/// Also says so if this machine is none to test on.
fn root() -> bool {
    let root = rustix::process::geteuid().is_root() && std::path::Path::new("/dev/fuse").exists();
    if !root {
        vfiod_tests::skip("making a machine that lacks something takes root and /dev/fuse");
    }
    root
}

const AS_USER: &[&str] = &[
    "setpriv",
    "--reuid=65534",
    "--regid=65534",
    "--clear-groups",
];

#[test]
fn root_has_what_it_needs_and_nothing_is_left() {
    if !root() {
        return;
    }
    let state = || {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let ours = |line: &&str| line.contains("vfioctl-doctor") || line.contains(" /sys/below ");
        mounts.lines().filter(ours).map(str::to_owned).collect()
    };
    let program = Program::new();
    let before: Vec<String> = state();
    let (report, output) = program.json(&["env"]);
    assert_eq!(output.status.code(), Some(0), "{report}");
    assert_eq!(report["doctor"]["works"], true);
    assert_eq!(report["schema"], 1);
    for name in ["fuse", "clients", "seccomp", "mounts", "user-namespaces"] {
        assert_eq!(finding(&report, name)["verdict"], "ok", "{report}");
    }
    let passthrough = &finding(&report, "passthrough")["verdict"];
    if vfiod_tests::skip::kernel_has_passthrough() {
        assert_eq!(passthrough, "ok", "{report}");
    } else {
        assert_eq!(passthrough, "limited", "{report}");
    }
    // All that is said has its reason and, unless all is well, its advice.
    for one in report["doctor"]["findings"].as_array().unwrap() {
        assert_ne!(one["found"], "", "{one}");
        assert_eq!(one["verdict"] == "ok", one["advice"].is_null(), "{one}");
    }
    assert_eq!(state(), before, "nothing of it is mounted");
}

#[test]
fn an_ordinary_user_learns_what_goes_and_what_does_not() {
    if !root() {
        return;
    }
    let (report, output) = Program::new().json(AS_USER);
    assert_eq!(output.status.code(), Some(0), "{report}");
    for name in ["fuse", "clients", "seccomp", "mounts", "user-namespaces"] {
        assert_eq!(finding(&report, name)["verdict"], "ok", "{report}");
    }
    assert_eq!(finding(&report, "passthrough")["verdict"], "limited");
}

#[test]
fn what_is_essential_and_missing_is_said_and_fails() {
    if !root() {
        return;
    }
    let program = Program::new();
    let check = |before: (Value, Output), name: &str, found: &str, advice: &str| {
        let (report, output) = before;
        assert_eq!(output.status.code(), Some(1), "{report}");
        assert_eq!(report["doctor"]["works"], false);
        let one = finding(&report, name);
        assert_eq!(one["verdict"], "missing", "{one}");
        assert!(one["found"].as_str().unwrap().contains(found), "{one}");
        assert!(one["advice"].as_str().unwrap().contains(advice), "{one}");
    };
    let no_fuse = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3";
    check(
        program.after(no_fuse),
        "fuse",
        "no /dev/fuse",
        "modprobe fuse",
    );
    let no_driver =
        "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod /dev/fuse c 10 222";
    check(program.after(no_driver), "fuse", "/dev/fuse", "");
    let not_for_us = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 600 /dev/fuse c 10 229";
    let script = format!("{not_for_us} && exec {} \"$0\" \"$@\"", AS_USER.join(" "));
    let as_user = program.json(&["unshare", "--mount", "sh", "-c", &script]);
    check(as_user, "fuse", "not for this user", "chmod");
    // A namespace whose setting forbids further ones, and a user without capabilities in it.
    let script = "echo 0 > /proc/sys/user/max_user_namespaces && \
                  exec setpriv --bounding-set=-all --inh-caps=-all \"$0\" \"$@\"";
    let mut words = AS_USER.to_vec();
    words.extend(["unshare", "-U", "-r", "sh", "-c", script]);
    check(
        program.json(&words),
        "user-namespaces",
        "cannot have one",
        "max_user_namespaces",
    );
}

#[test]
fn limits_are_read_where_they_hold() {
    let (report, _) = Program::new().json(&["prlimit", "--nofile=512:512"]);
    let limits = finding(&report, "limits");
    assert_eq!(limits["verdict"], "limited", "{limits}");
    assert!(
        limits["found"].as_str().unwrap().contains("512"),
        "{limits}"
    );
}

#[test]
fn it_is_one_line_each_for_people() {
    let output = Command::new(env!("CARGO_BIN_EXE_vfioctl"))
        .arg("doctor")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    for line in text.lines() {
        let word = line.split_whitespace().next().unwrap();
        assert!(["ok", "limited", "MISSING"].contains(&word), "{line}");
    }
    assert!(text.contains("  seccomp"), "{text}");
    assert_eq!(text.contains("MISSING"), output.status.code() == Some(1));
}
