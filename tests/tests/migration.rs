//! QEMU, unmodified, migrates an mtty card: the data of its state goes through descriptors that
//! `vfioctl run` gives it.

use std::io::BufRead as _;
use std::io::BufReader;
use std::io::Write as _;
use std::process::Child;
use std::process::ChildStdin;
use std::process::ChildStdout;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use serde_json::json;
use vfiod_tests::daemon;
use vfiod_tests::daemon::Daemon;
use vfiod_tests::daemon::until;
use vfiod_tests::packages::Prefix;
use vfiod_tests::skip;

const LONG: Duration = Duration::from_secs(120);
const CARDS: [&str; 2] = [
    "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001",
    "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002",
];
/// Scratch register of a port.
const SCR: u64 = 7;

/// QEMU with a card and no guest but its firmware, spoken to by QMP. Dropping it kills it.
struct Machine {
    qemu: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Machine {
    fn start(prefix: &Prefix, daemon: &Daemon, card: &str, more: &[&str]) -> Machine {
        let device =
            format!("vfio-pci,id=card,addr=05.0,sysfsdev=/sys/bus/mdev/devices/{card},iommufd=i0");
        let mut qemu = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .args(daemon.runner())
            .arg(prefix.qemu())
            .args(["-machine", "pc", "-accel", "tcg", "-m", "64"])
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-object", "iommufd,id=i0", "-device", &device])
            .args(["-qmp", "stdio"])
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("QEMU runs");
        let to = qemu.stdin.take().expect("a pipe");
        let from = BufReader::new(qemu.stdout.take().expect("a pipe"));
        let mut machine = Machine { qemu, to, from };
        machine.line();
        machine.ask("qmp_capabilities", json!({}));
        machine
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        let read = self.from.read_line(&mut line).expect("QEMU speaks");
        assert_ne!(read, 0, "QEMU has ended");
        serde_json::from_str(&line).expect("QEMU speaks JSON")
    }

    fn ask(&mut self, what: &str, arguments: Value) -> Value {
        let command = json!({"execute": what, "arguments": arguments});
        writeln!(self.to, "{command}").expect("QEMU listens");
        loop {
            let answer = self.line();
            assert!(answer.get("error").is_none(), "{what}: {answer}");
            if let Some(value) = answer.get("return") {
                return value.clone();
            }
        }
    }

    /// A line of the human monitor.
    fn tell(&mut self, line: &str) -> String {
        let answer = self.ask("human-monitor-command", json!({"command-line": line}));
        answer.as_str().unwrap_or_default().to_owned()
    }

    /// Where the firmware has put the card's first port.
    fn port(&mut self) -> Option<u64> {
        let devices = self.tell("info pci");
        let (_, card) = devices.split_once("4348:3253")?;
        let (_, bar) = card.split_once("BAR0: I/O at 0x")?;
        let end = bar.find(|digit: char| !digit.is_ascii_hexdigit())?;
        let at = u64::from_str_radix(bar.get(..end)?, 16).ok()?;
        (at != 0 && at != 0xffff).then_some(at)
    }

    fn migrated(&mut self) -> Option<Value> {
        let status = self.ask("query-migrate", json!({}));
        assert_ne!(status["status"], "failed", "{status}");
        (status["status"] == "completed").then_some(status)
    }
}

#[test]
fn qemu_moves_a_card_from_one_device_to_another() {
    let prefix = match daemon::possible().and_then(|()| Prefix::find()) {
        Ok(prefix) => prefix,
        Err(reason) => return skip(&reason),
    };
    let daemon = Daemon::start("[parents.mtty]\n").expect("vfiod serves");
    for card in CARDS {
        daemon
            .check(&["start", "mtty-2", "--uuid", card])
            .expect("the card is made");
    }
    let mut source = Machine::start(&prefix, &daemon, CARDS[0], &[]);
    let mut port = None;
    until("the firmware places the card", LONG, || {
        port = source.port();
        port.is_some()
    });
    let scratch = port.expect("placed") + SCR;
    // The firmware may still be at work on the bus.
    until("the register holds", LONG, || {
        source.tell(&format!("o /b {scratch:#x} 0x5a"));
        source
            .tell(&format!("i /b {scratch:#x}"))
            .contains("= 0x5a")
    });

    let file = daemon.root().join("stream");
    let place = file.display();
    source.ask("migrate", json!({"uri": format!("exec:cat > {place}")}));
    let mut status = None;
    until("the source has saved", LONG, || {
        status = source.migrated();
        status.is_some()
    });
    let status = status.expect("saved");
    // Configuration space and two ports, and what frames them.
    let moved = status["vfio"]["transferred"].as_u64();
    assert!(moved.is_some_and(|bytes| bytes >= 384), "{status}");

    let incoming = format!("exec:cat {place}");
    let mut target = Machine::start(&prefix, &daemon, CARDS[1], &["-incoming", &incoming]);
    until("the target runs", LONG, || {
        target.ask("query-status", json!({}))["status"] == "running"
    });
    let read = target.tell(&format!("i /b {scratch:#x}"));
    assert!(read.contains("= 0x5a"), "{read}");

    // The source goes on where it was, and can be left.
    source.ask("cont", json!({}));
    let read = source.tell(&format!("i /b {scratch:#x}"));
    assert!(read.contains("= 0x5a"), "{read}");
    for machine in [&mut source, &mut target] {
        machine.ask("quit", json!({}));
        assert!(machine.qemu.wait().is_ok_and(|status| status.success()));
    }
    drop((source, target));
    daemon.stop().expect("nothing is left");
}
