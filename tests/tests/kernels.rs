//! Our devices served by Debian's stock kernels, old and new, to real clients: everything of ours runs
//! in the guest.

use std::path::Path;
use std::time::Duration;

use vfiod_tests::guest::Guest;
use vfiod_tests::packages::Kernel;
use vfiod_tests::packages::Prefix;
use vfiod_tests::packages::program;
use vfiod_tests::programs;
use vfiod_tests::skip;

const UUID: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
const OTHER: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002";
const LIMIT: Duration = Duration::from_secs(120);

/// What the clients print when all checks have passed.
const DONE: &str = "all is as it should be";

/// What a kernel lets the daemon do.
struct Ability {
    kernel: Kernel,
    /// What its release begins with.
    release: &'static str,
    /// FUSE passthrough, Linux 6.9: regions are mapped natively.
    mapped: bool,
    /// `SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP`, Linux 6.6.
    sync_wake_up: bool,
}

const OLD: Ability = Ability {
    kernel: Kernel::Bookworm,
    release: "6.1.",
    mapped: false,
    sync_wake_up: false,
};

const NEW: Ability = Ability {
    kernel: Kernel::Backports,
    release: "6.",
    mapped: true,
    sync_wake_up: true,
};

/// A guest with our programs and clients in it; `None` where there cannot be one, which is said.
fn boot(able: &Ability) -> Option<Guest> {
    let prefix = match Prefix::find() {
        Ok(prefix) => prefix,
        Err(reason) => {
            skip(&reason);
            return None;
        }
    };
    let mut builder = Guest::builder(&prefix)
        .kernel(able.kernel)
        .modules(&["fuse"])
        .memory_mib(768)
        .program("/usr/bin/setpriv");
    for name in ["vfiod", "vfioctl"] {
        builder = builder.program(program(name).expect("it is built"));
    }
    // The other kernel's test may compile the same at the same time.
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(able.release);
    std::fs::create_dir_all(&dir).expect("a directory");
    for name in ["cdev_client", "group_client"] {
        let (source, options) = (format!("{name}.c"), ["-static", "-pthread"]);
        let client = programs::compile(&prefix, &source, &dir, name, &options);
        builder = builder.program(client);
    }
    let mut guest = builder.boot().expect("the guest boots");
    let release = guest.release().to_owned();
    assert!(release.starts_with(able.release), "{release}");
    // As udev makes it.
    say(&mut guest, "export NO_COLOR=1; chmod 666 /dev/fuse");
    Some(guest)
}

/// What a command of the guest prints, on both outputs; it has to work.
#[track_caller]
fn say(guest: &mut Guest, command: &str) -> String {
    guest.check(command, LIMIT).expect("the command works")
}

/// Waits in the guest until a command succeeds.
#[track_caller]
fn until(guest: &mut Guest, condition: &str) {
    say(
        guest,
        &format!(
            "n=0; until {condition}; do n=$((n+1)); [ $n -lt 600 ] || break; usleep 100000; done; {condition}"
        ),
    );
}

/// A client's whole run, whose output ends with [`DONE`].
#[track_caller]
fn client(guest: &mut Guest, command: &str) {
    let output = guest
        .run(&format!("{command} > /tmp/out 2>&1"), LIMIT)
        .expect("the shell answers");
    // What a child of it prints may come later.
    let tail = say(guest, "tail -n 12 /tmp/out");
    assert_eq!(output.status, 0, "{command}: {tail}");
    assert!(tail.ends_with(DONE), "{command}: {tail}");
}

/// Starts the daemon.
fn serve(guest: &mut Guest) {
    say(
        guest,
        "echo 'request-interval = 0.05' > /tmp/vfiod.toml; \
         vfiod serve --config /tmp/vfiod.toml 2> /tmp/log & daemon=$!",
    );
    until(guest, "vfioctl list > /dev/null 2>&1");
}

/// Ends the daemon, which leaves nothing mounted and complained of nothing the kernel did.
fn stop(guest: &mut Guest) {
    let status = guest
        .run("kill $daemon; wait $daemon", LIMIT)
        .expect("it ends");
    let log = say(guest, "cat /tmp/log");
    assert_eq!(status.status, 0, "{log}");
    assert!(log.ends_with("stopped"), "{log}");
    assert!(!log.contains("panicked"), "{log}");
    let left = guest.run("grep -c fuse /proc/mounts", LIMIT);
    assert_eq!(left.expect("it runs").text.trim_end(), "0");
    let kernel = guest.run("dmesg | grep -E 'BUG|WARNING|Call Trace'", LIMIT);
    assert_eq!(kernel.expect("it runs").text, "", "the kernel complains");
}

/// The demo runs its course and says what it cannot show here.
fn demo(guest: &mut Guest, able: &Ability) {
    let told = say(guest, "vfiod demo");
    let limit = "(this machine: regions trap: this kernel has no FUSE passthrough (Linux 6.9))";
    assert_eq!(told.contains(limit), !able.mapped, "{told}");
    let shown = [
        (
            "draws into the frame buffer with pwrite: each one is a trap",
            !able.mapped,
        ),
        (
            "draws into the frame buffer, mapped: plain stores, nothing is trapped",
            able.mapped,
        ),
        ("SIGBUS, nothing of the device is left there", able.mapped),
        ("each by an interrupt", true),
        ("reads once more, and gets ENODEV", true),
    ];
    for (what, expected) in shown {
        assert_eq!(told.contains(what), expected, "{what}: {told}");
    }
    let end =
        "2 devices allocated, 2 released, each exactly once; no file, mount or descriptor left.";
    assert!(told.ends_with(end), "{told}");
}

/// vfioctl doctor says the same of the kernel as this test.
fn doctor(guest: &mut Guest, able: &Ability) {
    let text = say(guest, "vfioctl doctor");
    for (subject, good) in [
        ("fuse", true),
        ("passthrough", able.mapped),
        ("clients", true),
        ("seccomp", able.sync_wake_up),
        ("mounts", true),
        ("user-namespaces", true),
        ("daemon", true),
    ] {
        let line = text
            .lines()
            .find(|line| line.split_whitespace().nth(1) == Some(subject))
            .unwrap_or_else(|| panic!("nothing about {subject}: {text}"));
        let word = if good { "ok" } else { "limited" };
        assert!(line.starts_with(word), "{line}");
    }
}

fn by_cdev(guest: &mut Guest, able: &Ability) {
    say(guest, &format!("vfioctl start mtty-2 --uuid {UUID}"));
    say(
        guest,
        "dev=/run/vfiod/dev; \
         cdev_client mtty $dev/iommu $dev/vfio/devices/vfio0 > /tmp/out 2>&1 & client=$!",
    );
    until(guest, "grep -q '^ready to be removed' /tmp/out");
    let who = say(guest, "vfioctl who vfio0; echo pid $client");
    let (who, pid) = who.rsplit_once("pid ").expect("both");
    let holder = who.lines().nth(1).unwrap_or_default();
    assert!(
        holder.starts_with(pid) && holder.contains("cdev_client"),
        "{who}"
    );
    say(guest, &format!("vfioctl stop {UUID} --wait; wait $client"));
    assert_eq!(say(guest, "tail -n 1 /tmp/out"), DONE);
    say(guest, &format!("vfioctl start mdpy-vga --uuid {UUID}"));
    let trapped = if able.mapped { "" } else { "trapped" };
    client(
        guest,
        &format!("vfioctl run -- cdev_client mdpy /dev/iommu /dev/vfio/devices/vfio0 {trapped}"),
    );
    say(guest, &format!("vfioctl stop {UUID} --wait"));
}

fn by_group(guest: &mut Guest) {
    for uuid in [UUID, OTHER] {
        say(guest, &format!("vfioctl start mtty-2 --uuid {uuid}"));
    }
    for (mode, how) in [
        ("type1v2", "plain"),
        ("type1", "orders"),
        ("compat", "plain"),
        ("native", "threads"),
        ("type1v2", "wrong"),
    ] {
        client(
            guest,
            &format!("vfioctl run -- group_client {mode} {how} {UUID} {OTHER}"),
        );
    }
}

/// Somebody holds a card and does not let go: it is asked, then taken away.
fn by_force(guest: &mut Guest) {
    say(
        guest,
        "sh -c 'exec 3<>/run/vfiod/dev/vfio/devices/vfio0; exec sleep 1000' & holder=$!",
    );
    until(guest, "vfioctl who vfio0 | grep -q sleep");
    let late = guest.run("vfioctl unbind vfio0 --timeout 0.2 2>&1", LIMIT);
    let late = late.expect("it runs");
    assert_eq!(late.status, 0, "{}", late.text);
    say(guest, &format!("vfioctl stop {OTHER} --force"));
    let left = say(guest, "vfioctl list; ls /run/vfiod/dev/vfio/devices");
    assert!(!left.contains("vfio0") && !left.contains("vfio1"), "{left}");
    say(guest, "kill $holder; wait $holder; true");
}

/// An ordinary user with a daemon of its own. BusyBox's shell takes its own setpriv unless told where
/// ours is.
fn by_a_user(guest: &mut Guest) {
    say(
        guest,
        "mkdir -m 700 /run/user; chown 65534:65534 /run/user; chmod 1777 /tmp",
    );
    client(
        guest,
        &format!(
            "XDG_RUNTIME_DIR=/run/user HOME=/run/user /bin/setpriv --reuid 65534 --regid 65534 \
             --clear-groups vfioctl run --user --start mtty-2={UUID} --start mtty-2={OTHER} -- \
             group_client type1v2 plain {UUID} {OTHER}"
        ),
    );
    until(guest, "! pidof vfiod > /dev/null");
}

fn served(able: &Ability) {
    let Some(mut guest) = boot(able) else { return };
    let guest = &mut guest;
    demo(guest, able);
    serve(guest);
    doctor(guest, able);
    by_cdev(guest, able);
    by_group(guest);
    by_force(guest);
    stop(guest);
    by_a_user(guest);
}

#[test]
fn debian_12_without_native_mmap() {
    served(&OLD);
}

#[test]
fn a_newer_kernel_with_native_mmap() {
    served(&NEW);
}
