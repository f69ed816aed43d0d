//! `vfioctl run`'s supervisor: what it answers, to whom, and what it lets through.

mod client;
#[path = "../common/mod.rs"]
mod common;

use common::{Daemon, Killed, PATIENCE, lines, until};
use rustix::process::{Pid, Signal, kill_process};
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::Receiver;
use std::time::Duration;

/// Where clients begin; in the tests' own process it does nothing.
#[test]
fn client() {
    client::obey();
}

/// A client under supervision.
struct Client {
    process: Killed,
    said: Receiver<String>,
    stdin: ChildStdin,
    role: String,
}

impl Client {
    fn start(daemon: &Daemon, role: &str) -> Client {
        let program = std::env::current_exe().unwrap();
        let program = program.to_str().unwrap();
        let args = ["run", "--", program, "--exact", "client", "--nocapture"];
        Client::of(role, daemon.command(&args))
    }

    fn of(role: &str, mut command: Command) -> Client {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut child = command
            .env(client::ROLE, role)
            .env("TAG", format!("{}-{number}", std::process::id()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Client {
            said: lines(child.stdout.take().unwrap()),
            stdin: child.stdin.take().unwrap(),
            process: Killed(child),
            role: role.to_owned(),
        }
    }

    /// What it says next.
    fn hear(&mut self) -> String {
        loop {
            let line = self.said.recv_timeout(PATIENCE);
            let line = line.unwrap_or_else(|_| panic!("{} says nothing more", self.role));
            // The test harness may have begun the line.
            if let Some((_, said)) = line.split_once(client::SAYS) {
                return said.to_owned();
            }
        }
    }

    fn tell(&mut self) {
        writeln!(self.stdin).unwrap();
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.process.0)
    }

    /// Its supervisor: a copy of vfioctl with the environment that the client was started with, in a
    /// session of its own.
    fn supervisor(&self) -> Pid {
        let own = environment(self.pid());
        let vfioctl = common::vfioctl().canonicalize().unwrap();
        let numbers = std::fs::read_dir("/proc").unwrap().flatten();
        let mut pids = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.find_map(|pid| {
            let pid = Pid::from_raw(pid)?;
            let exe = std::fs::read_link(format!("/proc/{pid}/exe")).ok()?;
            let theirs = environment(pid);
            (exe == vfioctl && theirs == own && !theirs.is_empty()).then_some(pid)
        })
        .expect("it has a supervisor")
    }

    fn end(mut self) {
        let status = until("the client ends", || self.process.0.try_wait().unwrap());
        assert!(status.success(), "{}: {status}", self.role);
    }
}

/// What tells a client, and its supervisor, from all others.
fn environment(pid: Pid) -> Vec<Vec<u8>> {
    let text = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let variables = text.split(|byte| *byte == 0);
    let role = client::ROLE.as_bytes();
    variables
        .filter(|variable| variable.starts_with(role) || variable.starts_with(b"TAG="))
        .map(<[u8]>::to_vec)
        .collect()
}

/// Open files of the only device.
fn users(daemon: &Daemon) -> u64 {
    daemon.json(&["list"])["devices"][0]["users"]
        .as_u64()
        .unwrap()
}

fn nobody_has_it(daemon: &Daemon) {
    until("nobody has the device", || {
        (users(daemon) == 0).then_some(())
    });
    let who = daemon.json(&["who", "vfio0"]);
    assert_eq!(who["holders"], serde_json::json!([]), "{who}");
}

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

/// Roles that do all by themselves.
#[test]
fn clients_of_every_kind_are_answered() {
    let daemon = Daemon::start();
    daemon.card();
    for role in ["threads", "foreign", "wrong"] {
        let mut client = Client::start(&daemon, role);
        assert_eq!(client.hear(), "done", "{role}");
        client.end();
        nobody_has_it(&daemon);
    }
}

#[test]
fn every_call_that_asks_what_a_file_is_gets_the_same_answer() {
    let daemon = Daemon::start();
    daemon.card();
    let mut client = Client::start(&daemon, "stat");
    let dev = inside(&daemon, "cat /sys/class/vfio-dev/vfio0/dev");
    assert_eq!(client.hear(), dev);
    client.end();
}

#[test]
fn an_orphan_stays_supervised() {
    let daemon = Daemon::start();
    daemon.card();
    let mut client = Client::start(&daemon, "orphan");
    let status = until("the first ends", || client.process.0.try_wait().unwrap());
    assert!(status.success());
    assert_eq!(client.hear(), "done");
    nobody_has_it(&daemon);
}

#[test]
fn a_storm_of_signals_opens_each_device_once() {
    let daemon = Daemon::start();
    daemon.card();
    let mut client = Client::start(&daemon, "storm");
    let opened: u64 = client.hear().parse().unwrap();
    assert_eq!(users(&daemon), opened);
    client.tell();
    assert_eq!(client.hear(), "closed");
    until("all are closed", || (users(&daemon) == 0).then_some(()));
    client.tell();
    client.end();
    nobody_has_it(&daemon);
}

#[test]
fn a_full_descriptor_table_is_the_clients_own_matter() {
    let daemon = Daemon::start();
    daemon.card();
    let mut client = Client::start(&daemon, "full");
    assert_eq!(client.hear(), "full");
    until("what could not be given is closed", || {
        (users(&daemon) == 0).then_some(())
    });
    client.tell();
    assert_eq!(client.hear(), "done");
    client.end();
}

#[test]
fn without_its_supervisor_a_client_gets_errors() {
    let daemon = Daemon::start();
    daemon.card();
    let mut client = Client::start(&daemon, "forsaken");
    client.hear();
    let supervisor = client.supervisor();
    // Not answered, and then never.
    kill_process(supervisor, Signal::STOP).unwrap();
    client.tell();
    assert_eq!(client.hear(), "calls");
    let tasks = format!("/proc/{}/task", client.pid());
    until("the call waits", || {
        let tasks = std::fs::read_dir(&tasks).unwrap().flatten();
        let mut calls = tasks.map(|task| std::fs::read_to_string(task.path().join("syscall")));
        let ioctl = format!("{} ", libc::SYS_ioctl);
        calls
            .any(|call| call.is_ok_and(|call| call.starts_with(&ioctl)))
            .then_some(())
    });
    kill_process(supervisor, Signal::KILL).unwrap();
    assert_eq!(client.hear(), "done");
    client.end();
    nobody_has_it(&daemon);
}

/// Zero if the session began outside of our PID namespace, which is no [`Pid`].
fn session(pid: Pid) -> u32 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let after_the_name = stat.rsplit(')').next().unwrap();
    let field = after_the_name.split_whitespace().nth(3).unwrap();
    field.parse().unwrap()
}

#[test]
fn a_supervisor_ends_with_those_it_supervises() {
    let daemon = Daemon::start();
    daemon.card();
    let mut client = Client::start(&daemon, "restless");
    client.hear();
    let supervisor = client.supervisor();
    // Signals for the command's sake do not end it.
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        kill_process(supervisor, signal).unwrap();
    }
    // It holds nothing of the command's: its input, output and working directory are its own.
    for fd in 0..3 {
        let link = std::fs::read_link(format!("/proc/{supervisor}/fd/{fd}")).unwrap();
        assert_eq!(link, Path::new("/dev/null"));
    }
    assert_ne!(session(supervisor), session(client.pid()));
    assert!(users(&daemon) <= 1);
    kill_process(client.pid(), Signal::KILL).unwrap();
    let stat = format!("/proc/{supervisor}/stat");
    until("the supervisor ends", || {
        // Whether somebody has asked how it ended is not its matter.
        let state = std::fs::read_to_string(&stat).unwrap_or_default();
        let state = state.rsplit(')').next().unwrap().trim_start().to_owned();
        (state.is_empty() || state.starts_with('Z')).then_some(())
    });
    nobody_has_it(&daemon);
}

#[test]
fn a_client_killed_in_the_middle_leaves_nothing_open() {
    let daemon = Daemon::start();
    daemon.card();
    for moment in 0..25 {
        let mut client = Client::start(&daemon, "restless");
        assert_eq!(client.hear(), "begins");
        // Somewhere in its loop: each time later by a part of an open.
        std::thread::sleep(Duration::from_micros(500 + moment * 13));
        kill_process(client.pid(), Signal::KILL).unwrap();
        client.process.0.wait().unwrap();
        nobody_has_it(&daemon);
    }
    // The group is free, too.
    let mut client = Client::start(&daemon, "wrong");
    assert_eq!(client.hear(), "done");
    client.end();
}

#[test]
fn calls_that_hang_hold_up_no_others() {
    let daemon = Daemon::start();
    daemon.card();
    for count in [20, 100] {
        let mut client = Client::start(&daemon, &format!("hanging {count}"));
        match client.hear().as_str() {
            "impossible" => {
                vfiod_tests::skip("this kernel has no userfaultfd");
                return;
            }
            said => assert_eq!(said, "done"),
        }
        client.end();
    }
    nobody_has_it(&daemon);
}

#[test]
fn kvm_accepts_our_files() {
    let daemon = Daemon::start();
    daemon.card();
    let mut client = Client::start(&daemon, "kvm");
    match client.hear().as_str() {
        "impossible" => vfiod_tests::skip("no virtual machine can be made here (/dev/kvm)"),
        said => assert_eq!(said, "done"),
    }
    client.end();
    nobody_has_it(&daemon);
}

/// In a user namespace, with a daemon that is root's.
#[test]
fn an_ordinary_user_is_supervised() {
    const NOBODY: u32 = 65534;
    if !rustix::process::geteuid().is_root() {
        vfiod_tests::skip("only root can become somebody else");
        return;
    }
    let config = format!(
        "[nodes]\nowner = \"{NOBODY}\"\ngroup = \"{NOBODY}\"\nsocket-group = \"{NOBODY}\"\n"
    );
    let daemon = Daemon::with_config(&config);
    daemon.card();
    // They may be built where only root may look.
    let open = tempfile::tempdir().unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(open.path(), mode).unwrap();
    let place = |built: &Path| {
        let to = open.path().join(built.file_name().unwrap());
        vfiod_tests::programs::copy(built, &to);
        to
    };
    let vfioctl = place(Path::new(daemon.command(&[]).get_program()));
    let run = |arguments: &[&str]| {
        use std::os::unix::process::CommandExt;
        let usual = daemon.command(&["run", "--"]);
        let mut command = Command::new(&vfioctl);
        command.args(usual.get_args()).args(arguments);
        for (key, _) in usual.get_envs() {
            command.env_remove(key);
        }
        command.uid(NOBODY).gid(NOBODY);
        command.current_dir("/");
        command
    };
    let plain = run(&["stat", "-c", "%F", "/dev/vfio/devices/vfio0"]);
    let output = { plain }.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    if said.contains("no mount namespace") {
        vfiod_tests::skip("ordinary users get no user namespace on this machine");
        return;
    }
    assert_eq!(printed, "character special file\n", "{said}");
    assert_eq!(said.matches("setuid programs").count(), 1, "{said}");
    let program = place(&std::env::current_exe().unwrap());
    let program = program.to_str().unwrap();
    for role in ["threads", "foreign", "stat"] {
        let command = run(&[program, "--exact", "client", "--nocapture"]);
        let mut client = Client::of(role, command);
        client.hear();
        client.end();
        nobody_has_it(&daemon);
    }
}

/// As under a container's runtime that supervises system calls itself.
#[test]
fn another_listener_is_a_reason_to_refuse() {
    let daemon = Daemon::start();
    daemon.card();
    let stat = ["--", "stat", "-c", "%F", "/dev/vfio/devices/vfio0"];
    let mut refused = daemon.command(&["run"]);
    let mut without = daemon.command(&["run", "--no-supervisor"]);
    refused.args(stat);
    without.args(stat);
    // The filter is that thread's and that of what it starts.
    let supervised = std::thread::spawn(move || {
        rustix::thread::set_no_new_privs(true).unwrap();
        let _listener = seccomp_notify::Filter::new().install().unwrap();
        [refused, without].map(|mut command| command.output().unwrap())
    });
    let [refused, without] = supervised.join().unwrap();
    assert_eq!(refused.status.code(), Some(125));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("a container's runtime perhaps"), "{said}");
    assert!(said.contains("--no-supervisor"), "{said}");
    assert!(refused.stdout.is_empty());
    let printed = String::from_utf8(without.stdout).unwrap();
    assert_eq!(printed, "regular empty file\n");
}
