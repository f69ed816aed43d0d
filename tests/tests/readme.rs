//! What README.md says is typed as it stands there.

use std::io::BufRead as _;
use std::io::BufReader;
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::sync::mpsc;
use std::time::Duration;
use std::time::Instant;

use rustix::process::Pid;
use rustix::process::Signal;
use vfiod_tests::card::SHORT;
use vfiod_tests::card::until_closed;
use vfiod_tests::daemon;
use vfiod_tests::daemon::Daemon;
use vfiod_tests::daemon::until;
use vfiod_tests::guest::Guest;
use vfiod_tests::packages::Prefix;
use vfiod_tests::packages::program;
use vfiod_tests::skip;

const README: &str = include_str!("../../README.md");

/// The first block of shell below a heading.
fn block(heading: &str) -> &'static str {
    let (_, below) = README.split_once(heading).expect("the heading");
    let (_, code) = below.split_once("```sh\n").expect("a block of shell");
    code.split_once("```").expect("its end").0
}

/// A shell and all that it started, which do not outlive their test.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        let _ = rustix::process::kill_process_group(Pid::from_child(&self.0), Signal::KILL);
        let _ = self.0.wait();
    }
}

#[test]
fn qemu_in_three_lines() {
    let lines = block("\n### QEMU\n");
    assert_eq!(lines.lines().count(), 3, "{lines}");
    match daemon::possible().and_then(|()| Prefix::find()) {
        Ok(prefix) => typed(lines, &prefix, &prefix.qemu()),
        Err(reason) => skip(&reason),
    }
}

#[test]
fn qemu_over_vfio_user() {
    let lines = block("\n### A device for QEMU over vfio-user\n");
    let found = daemon::possible().and_then(|()| Prefix::find());
    match found.and_then(|prefix| Ok((prefix.qemu11()?, prefix))) {
        Ok((qemu, prefix)) => typed(lines, &prefix, &qemu),
        Err(reason) => skip(&reason),
    }
}

/// Types `lines` with this QEMU; the guest uses the card that they give it.
fn typed(lines: &str, prefix: &Prefix, qemu: &Path) {
    let daemon = Daemon::start("").expect("vfiod serves");
    let guest = Guest::builder(prefix).modules(&["8250_pci"]);
    guest
        .write_to(daemon.root())
        .expect("a kernel and a system");
    let bin = |program: &Path| program.parent().expect("a directory").to_owned();
    let dirs = [bin(&program("vfioctl").expect("it is built")), bin(qemu)];
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths(dirs.into_iter().chain(std::env::split_paths(&path)));
    // What is started with -nographic reads its monitor's escapes, and ends with its guest.
    let qemu = Command::new("sh")
        .args(["-e", "-c", lines])
        .process_group(0)
        .current_dir(daemon.root())
        .env("PATH", path.expect("no colons"))
        .env("VFIOD_ROOT", daemon.root())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a shell");
    let mut group = Group(qemu);
    let qemu = &mut group.0;
    let output = BufReader::new(qemu.stdout.take().expect("a pipe"));
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in output.split(b'\n').map_while(Result::ok) {
            let _ = sender.send(String::from_utf8_lossy(&line).into_owned());
        }
    });
    let mut seen = String::new();
    let mut expect = |text: &str, limit: Duration| {
        let end = Instant::now() + limit;
        while let Ok(line) = lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            seen += &line;
            seen.push('\n');
            if line.contains(text) {
                return;
            }
        }
        panic!("the guest does not say {text:?}:\n{seen}");
    };
    expect("vfiod-guest-ready", vfiod_tests::guest::BOOT_LIMIT);
    let mut stdin = qemu.stdin.take().expect("a pipe");
    let script = "cd /sys/bus/pci/drivers/serial/0000:00:0*; echo \"card $(cat vendor device | tr '\\n' ' ')\"; \
                  for tty in */tty/* tty/*; do [ -e /dev/${tty##*/} ] && port=${tty##*/}; done; \
                  exec 3<>/dev/$port; stty raw -echo clocal <&3; echo over the card >&3; \
                  echo \"it gives back: $(timeout 20 head -n 1 <&3)\"; poweroff -f\n";
    stdin.write_all(script.as_bytes()).expect("the shell reads");
    expect("card 0x4348 0x3253", SHORT);
    expect("it gives back: over the card", SHORT);
    until(
        "QEMU ends with its guest",
        SHORT,
        || matches!(qemu.try_wait(), Ok(Some(status)) if status.success()),
    );
    until_closed(&daemon);
    daemon.stop().expect("nothing is left");
}
