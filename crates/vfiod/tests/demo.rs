//! `vfiod demo` runs its course wherever it is started, says what it could not show, and leaves
//! nothing behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const END: &str =
    "2 devices allocated, 2 released, each exactly once; no file, mount or descriptor left.";

/// A place for the demo's own directory, and a copy of the program that anybody may run.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(dir.path().join("tmp")).unwrap();
        fs::set_permissions(dir.path().join("tmp"), fs::Permissions::from_mode(0o777)).unwrap();
        vfiod_tests::programs::copy(env!("CARGO_BIN_EXE_vfiod"), dir.path().join("vfiod"));
        Place { dir }
    }

    fn program(&self) -> PathBuf {
        self.dir.path().join("vfiod")
    }

    /// Runs a shell command in which `$VFIOD` is the program, in a mount namespace of its own.
    fn shell(&self, script: &str) -> String {
        let output = Command::new("unshare")
            .args(["--mount", "sh", "-ec", script])
            .env("VFIOD", self.program())
            .env("TMPDIR", self.dir.path().join("tmp"))
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{}\n{text}\n{errors}",
            output.status
        );
        assert!(errors.is_empty(), "{errors}");
        assert_eq!(text.trim_end().lines().last(), Some(END), "{text}");
        self.nothing_is_left();
        text
    }

    fn nothing_is_left(&self) {
        let left: Vec<_> = fs::read_dir(self.dir.path().join("tmp")).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let ours = self.dir.path().to_str().unwrap();
        assert!(!mounts.contains(ours), "{mounts}");
    }
}

/// Every step of the story, in order; what the client says of its close may come a little late.
fn is_whole(text: &str) {
    assert!(text.contains("is asked again, and closes it"), "{text}");
    let mut from = 0;
    for step in [
        "registered: in sysfs",
        "BIND_IOMMUFD",
        "config space says 4348:3253",
        "got back \"hello from a device written in Rust\"",
        "unregistering: its names are gone",
        "request(0)",
        "request(1)",
        "released: the driver's state is dropped",
        "config space says 1b36:000f",
        "#   # #### # ####",
        "its users are cut off",
        "gets ENODEV",
    ] {
        let at = text[from..].find(step);
        from += at.unwrap_or_else(|| panic!("{step:?} is missing after {from}:\n{text}"));
    }
}

fn limits(text: &str) -> Vec<&str> {
    text.lines()
        .filter(|line| line.starts_with("(this machine:"))
        .collect()
}

fn fuse() -> bool {
    let there = rustix::process::geteuid().is_root() && Path::new("/dev/fuse").exists();
    assert!(
        there || std::env::var_os("CI").is_none(),
        "CI has root and /dev/fuse"
    );
    if !there {
        vfiod_tests::skip("a demo with nodes needs root and /dev/fuse");
    }
    there
}

#[test]
fn as_root() {
    if !fuse() {
        return;
    }
    let text = Place::new().shell("$VFIOD demo");
    is_whole(&text);
    assert!(text.contains("held by vfiod (pid "), "{text}");
    match limits(&text)[..] {
        [] => assert!(text.contains("SIGBUS"), "{text}"),
        [one] => assert!(one.contains("no FUSE passthrough"), "{one}"),
        _ => panic!("{text}"),
    }
}

#[test]
fn before_passthrough() {
    if !fuse() {
        return;
    }
    let text = Place::new().shell("$VFIOD demo --without passthrough");
    is_whole(&text);
    assert_eq!(limits(&text).len(), 1);
    assert!(text.contains("each one is a trap"));
}

#[test]
fn without_fuse_the_client_is_a_thread() {
    let text = Place::new().shell("$VFIOD demo --without fuse");
    is_whole(&text);
    assert_eq!(limits(&text).len(), 1);
    assert!(text.contains("as a thread"));
}

#[test]
fn in_a_container_without_the_device() {
    if !fuse() {
        return;
    }
    let text = Place::new().shell(
        "mount --bind /dev/null /dev/fuse 2>/dev/null || mount -t tmpfs none /dev; $VFIOD demo",
    );
    is_whole(&text);
    assert!(limits(&text)[0].contains("no nodes"), "{text}");
}

#[test]
fn as_an_ordinary_user() {
    if !fuse() {
        return;
    }
    let user = "setpriv --reuid 65534 --regid 65534 --clear-groups";
    // Whatever this machine's modes are: a node that everybody may open, and one nobody may.
    let text = Place::new().shell(&format!(
        "mkdir $TMPDIR/m; mount -t tmpfs none $TMPDIR/m; mknod -m 666 $TMPDIR/m/fuse c 10 229; \
         mount --bind $TMPDIR/m/fuse /dev/fuse; umount -l $TMPDIR/m; rmdir $TMPDIR/m; {user} $VFIOD demo"
    ));
    is_whole(&text);
    assert_eq!(limits(&text).len(), 1, "{text}");
    assert!(
        limits(&text)[0].contains("only the machine's root"),
        "{text}"
    );
    assert!(text.contains("a client is started, pid"), "{text}");

    let text = Place::new().shell(&format!(
        "mkdir $TMPDIR/m; mount -t tmpfs none $TMPDIR/m; mknod -m 600 $TMPDIR/m/fuse c 10 229; \
         mount --bind $TMPDIR/m/fuse /dev/fuse; umount -l $TMPDIR/m; rmdir $TMPDIR/m; {user} $VFIOD demo"
    ));
    is_whole(&text);
    assert!(
        limits(&text)[0].contains("/dev/fuse cannot be opened"),
        "{text}"
    );
}

/// Root there may mount, and may not pass through: that is said, too.
#[test]
fn as_root_of_a_container() {
    if !fuse() {
        return;
    }
    let text = Place::new().shell("unshare --user --map-root-user $VFIOD demo");
    is_whole(&text);
    assert_eq!(limits(&text).len(), 1, "{text}");
    assert!(
        limits(&text)[0].contains("only the machine's root"),
        "{text}"
    );
    assert!(text.contains("a client is started, pid"), "{text}");
}

#[test]
fn an_audience_that_leaves_is_no_failure() {
    let place = Place::new();
    let mut child = Command::new(place.program())
        .arg("demo")
        .env("TMPDIR", place.dir.path().join("tmp"))
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {errors}", output.status);
    assert!(errors.is_empty(), "{errors}");
    place.nothing_is_left();
}

#[test]
fn an_interrupted_demo_leaves_nothing() {
    if !fuse() {
        return;
    }
    let place = Place::new();
    let mut child = Command::new(place.program())
        .arg("demo")
        .env("TMPDIR", place.dir.path().join("tmp"))
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let tmp = place.dir.path().join("tmp");
    let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while fs::read_dir(&tmp).unwrap().count() == 0 {
        assert!(std::time::Instant::now() < end, "it never began");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    std::thread::sleep(std::time::Duration::from_millis(300));
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130));
    place.nothing_is_left();
}
