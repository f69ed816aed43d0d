//! `vfioctl run --user`: everything by an ordinary user, without a daemon of root's.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;

use vfiod_tests::daemon;
use vfiod_tests::daemon::Output;
use vfiod_tests::daemon::until;
use vfiod_tests::packages::Prefix;
use vfiod_tests::packages::program;
use vfiod_tests::programs;
use vfiod_tests::skip;

/// Nobody in particular.
const USER: u32 = 65534;
const UUID: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
const LIMIT: Duration = Duration::from_secs(20);

/// A directory of the user's, with the programs in it: others' may not be theirs to enter.
struct Home(PathBuf);

impl Home {
    fn new(name: &str) -> Option<Home> {
        if let Err(reason) = daemon::possible() {
            // Becoming another user takes root as well.
            skip(&reason);
            return None;
        }
        let dir = std::env::temp_dir().join(format!("vfiod-user-{}-{name}", std::process::id()));
        fs::create_dir_all(dir.join("run")).expect("a directory");
        for name in ["vfiod", "vfioctl"] {
            let built = program(name).expect("it is built");
            vfiod_tests::programs::copy(built, dir.join(name));
        }
        for path in [&dir, &dir.join("run")] {
            std::os::unix::fs::chown(path, Some(USER), Some(USER)).expect("it is given away");
        }
        let mode = fs::Permissions::from_mode(0o700);
        fs::set_permissions(dir.join("run"), mode).expect("a mode");
        Some(Home(dir))
    }

    /// A program, run by the user.
    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .uid(USER)
            .gid(USER)
            .current_dir("/")
            .env_clear()
            .env("PATH", format!("{}:/usr/bin:/bin", self.0.display()))
            .env("HOME", &self.0)
            .env("XDG_RUNTIME_DIR", self.0.join("run"));
        command
    }

    /// `vfioctl run --user OPTIONS -- sh -c SCRIPT`.
    fn shell(&self, options: &[&str], script: &str) -> Command {
        let mut command = self.command(self.0.join("vfioctl"));
        command.args(["run", "--user"]).args(options);
        command.args(["--", "sh", "-c", script]);
        command
    }

    fn output(&self, options: &[&str], script: &str) -> Output {
        daemon::output(&mut self.shell(options, script)).expect("it runs")
    }

    fn put(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
        fs::write(&path, text).expect("a file");
        path
    }

    /// Waits until no daemon is left, nor anything of one.
    fn nothing_is_left(&self) {
        until("the daemon has ended and cleaned up", LIMIT, || {
            let left = fs::read_dir(self.0.join("run/vfiod"));
            left.map_or(0, Iterator::count) == 0 && self.processes().is_empty()
        });
    }

    /// Processes that run something from here.
    fn processes(&self) -> Vec<PathBuf> {
        let all = fs::read_dir("/proc").expect("there are processes");
        all.flatten()
            .map(|entry| entry.path())
            .filter(|process| {
                fs::read_link(process.join("exe")).is_ok_and(|exe| exe.starts_with(&self.0))
            })
            .collect()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A child that does not outlive its test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const SAID: &str = "vfioctl: a vfiod of your own, without privilege: no region can be mapped \
                    (accesses trap), and anonymous shared memory is copied\n";

/// Compiles a client from `assets`, static, as `client` among the user's programs. False, and a skip, if
/// there is nothing to compile it against.
fn compile(home: &Home, source: &str) -> bool {
    let prefix = match Prefix::find() {
        Ok(prefix) => prefix,
        Err(reason) => {
            skip(&reason);
            return false;
        }
    };
    let options = ["-static", "-pthread"];
    programs::compile(&prefix, source, &home.0, "client", &options);
    true
}

/// The C program of `c_client.rs` in a whole session with a device.
fn client(mdev_type: &str, kind: &str) {
    let Some(home) = Home::new(kind) else {
        return;
    };
    if !compile(&home, "cdev_client.c") {
        return;
    }
    let config = home.put("vfiod.toml", "request-interval = 0.05\n");
    // Once the client says so, its device is removed under it, from inside.
    let script = format!(
        "client {kind} /dev/iommu /dev/vfio/devices/vfio0 trapped | while read -r line; do \
         echo \"$line\"; case $line in 'ready to be removed') vfioctl stop $VFIOD_UUID & ;; esac; done"
    );
    let config = config.to_str().expect("text");
    let output = home.output(&["--config", config, "--start", mdev_type], &script);
    let tail: Vec<&str> = output.out.lines().rev().take(12).collect();
    assert_eq!(output.code, 0, "{}{tail:#?}", output.err);
    assert_eq!(tail.first(), Some(&"all is as it should be"), "{tail:#?}");
    assert_eq!(output.err, SAID);
    home.nothing_is_left();
}

#[test]
fn a_client_of_a_serial_card() {
    client("mtty-2", "mtty");
}

#[test]
fn a_client_of_a_display_without_native_mmap() {
    client("mdpy-vga", "mdpy");
}

/// The C program of `group_clients.rs`.
#[test]
fn clients_in_all_five_modes() {
    const OTHER: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002";
    let Some(home) = Home::new("groups") else {
        return;
    };
    if !compile(&home, "group_client.c") {
        return;
    }
    let starts = [UUID, OTHER].map(|uuid| format!("mtty-2={uuid}"));
    let options = ["--start", &starts[0], "--start", &starts[1]];
    for (mode, how) in [
        ("type1", "plain"),
        ("type1v2", "plain"),
        ("type1v2", "storm"),
        ("type1v2", "wrong"),
        ("compat", "plain"),
        ("compatv2", "threads"),
        ("native", "plain"),
        ("native", "storm"),
    ] {
        let output = home.output(&options, &format!("exec client {mode} {how} $VFIOD_UUIDS"));
        let tail: Vec<&str> = output.out.lines().rev().take(12).collect();
        assert_eq!(output.err, SAID, "{mode} {how}, newest first: {tail:#?}");
        assert_eq!(output.code, 0, "{mode} {how}: {tail:#?}");
        assert_eq!(
            tail.first(),
            Some(&"all is as it should be"),
            "{mode} {how}"
        );
    }
    home.nothing_is_left();
}

#[test]
fn a_user_is_who_it_was_and_finds_its_devices() {
    let Some(home) = Home::new("view") else {
        return;
    };
    let start = format!("mtty-2={UUID}");
    let output = home.output(
        &["--start", &start, "--start", "mdpy-vga"],
        "id -u; id -g; cat /proc/self/uid_map; grep CapEff /proc/self/status; echo $VFIOD_UUID; \
         echo $VFIOD_UUIDS | wc -w; ls /dev/vfio/devices | tr '\\n' ' '; stat -c '%F %U %a' \
         /dev/vfio/devices/vfio0; vfioctl list --json | grep -c '\"name\"'; \
         readlink /sys/bus/mdev/devices/$VFIOD_UUID/iommu_group; ls /sys/class/mdev_bus | wc -l; \
         printf %s $VFIOD_UUID > /sys/bus/mdev/drivers/mtty/unbind || \
         echo 1 > /sys/bus/mdev/devices/$VFIOD_UUID/remove; ls /dev/vfio/devices | tr '\\n' ' '; \
         vfioctl start mtty-1 > /dev/null; ls /dev/vfio/devices | wc -l",
    );
    assert_eq!(output.err, SAID, "{}", output.out);
    let words: Vec<Vec<&str>> = output
        .out
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let user = USER.to_string();
    let expected: &[&[&str]] = &[
        &[&user],
        &[&user],
        &[&user, &user, "1"],
        &["CapEff:", "0000000000000000"],
        &[UUID],
        &["2"],
    ];
    assert_eq!(
        words.get(..6),
        Some(
            &expected
                .iter()
                .map(|line| line.to_vec())
                .collect::<Vec<_>>()[..]
        ),
        "{}",
        output.out
    );
    let rest = output.out.lines().skip(6).collect::<Vec<_>>().join("\n");
    assert!(
        rest.starts_with("vfio0 vfio1 character special file nobody 600\n2\n"),
        "{rest}"
    );
    assert!(rest.contains("/kernel/iommu_groups/"), "{rest}");
    assert!(rest.ends_with("vfio1 2"), "{rest}");
    home.nothing_is_left();
}

#[test]
fn the_daemon_ends_with_the_last_of_the_command_however_it_goes() {
    let Some(home) = Home::new("ends") else {
        return;
    };
    assert_eq!(home.output(&[], "exit 77").code, 77);
    home.nothing_is_left();
    // Killed as hard as can be.
    let mut run = Killed(
        home.shell(&["--start", "mtty-1"], "exec sleep 1000")
            .stderr(Stdio::null())
            .spawn()
            .expect("it starts"),
    );
    let comm = format!("/proc/{}/comm", run.0.id());
    until("it runs the command", LIMIT, || {
        fs::read_to_string(&comm).is_ok_and(|comm| comm == "sleep\n")
    });
    assert_eq!(home.processes().len(), 2, "the daemon and the supervisor");
    run.0.kill().expect("it is killed");
    run.0.wait().expect("it ends");
    home.nothing_is_left();
    // What the command leaves behind keeps the daemon, and its device.
    let script = "(exec 3<>/dev/vfio/devices/vfio0; read -r _; test -e /dev/vfio/devices/vfio0 && \
                  echo still there) 2>&1 &";
    let mut run = Killed(
        home.shell(
            &["--start", "mtty-1"],
            &format!(
                "exec 4<&0; {}",
                script.replace("read -r _", "read -r _ <&4")
            ),
        )
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts"),
    );
    let stdin = run.0.stdin.take().expect("a pipe");
    let mut out = run.0.stdout.take().expect("a pipe");
    assert!(run.0.wait().expect("the command ends").success());
    assert_eq!(home.processes().len(), 2, "the daemon and the supervisor");
    drop(stdin);
    let said = std::io::read_to_string(&mut out).expect("text");
    assert_eq!(said, "still there\n");
    home.nothing_is_left();
}

#[test]
fn configuration_and_places_are_found_or_it_says_what_it_does() {
    let Some(home) = Home::new("places") else {
        return;
    };
    home.put(
        ".config/vfiod/vfiod.toml",
        &format!("[mdevs.{UUID}]\ntype = \"mtty-1\"\n"),
    );
    let devices = "ls /sys/bus/mdev/devices";
    let output = home.output(&[], devices);
    assert_eq!(
        (output.code, output.out.trim()),
        (0, UUID),
        "{}",
        output.err
    );
    let other = home.put("elsewhere/vfiod/vfiod.toml", "");
    let mut command = home.shell(&[], devices);
    command.env("XDG_CONFIG_HOME", home.0.join("elsewhere"));
    let output = daemon::output(&mut command).expect("it runs");
    assert_eq!(
        (output.code, output.out.as_str()),
        (0, ""),
        "{}",
        output.err
    );
    // Nothing serves what is wrong, and it says why.
    fs::write(other, "nonsense = 1\n").expect("a file");
    let output = daemon::output(&mut command).expect("it runs");
    assert_eq!(output.code, 125, "{}", output.err);
    assert!(
        output.err.contains("vfiod does not serve: "),
        "{}",
        output.err
    );
    assert!(output.err.contains("nonsense"), "{}", output.err);
    home.nothing_is_left();
    let output = home.output(&["--start", "no-such-type"], "true");
    assert_eq!(output.code, 125, "{}", output.err);
    assert!(output.err.contains("no-such-type"), "{}", output.err);
    home.nothing_is_left();

    // Without a place of the session's, one of the user's own, and a word about it.
    let mut command = home.shell(&[], "dirname $VFIOD_SOCKET");
    command.env_remove("XDG_RUNTIME_DIR").env("TMPDIR", &home.0);
    let output = daemon::output(&mut command).expect("it runs");
    let place = home.0.join(format!("vfiod-{USER}"));
    assert!(
        output.out.starts_with(place.to_str().expect("text")),
        "{output:?}"
    );
    assert!(
        output.err.contains("XDG_RUNTIME_DIR is not set"),
        "{}",
        output.err
    );
    let mode = fs::metadata(&place)
        .expect("it was made")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o700);
    // Not one that others may write to.
    fs::set_permissions(&place, fs::Permissions::from_mode(0o777)).expect("a mode");
    let output = daemon::output(&mut command).expect("it runs");
    assert_eq!(output.code, 125, "{output:?}");
    assert!(output.err.contains("not yours alone"), "{}", output.err);
    home.nothing_is_left();
}
