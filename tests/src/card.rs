//! An mtty card in a guest, whichever way QEMU comes by it.

use std::io::Read as _;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::Value;

use crate::daemon;
use crate::daemon::Daemon;
use crate::guest::Builder;
use crate::guest::Guest;
use crate::guest_hardware::Interrupt;
use crate::packages::Prefix;
use crate::skip;

/// How long anything may take that takes no time.
pub const SHORT: Duration = Duration::from_secs(30);
/// Where the card is in the guest.
pub const CARD: &str = "0000:00:05.0";
/// The card's name.
pub const UUID: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";

/// Each port is a socket; users are asked to leave ten times a second.
const CONFIG: &str = r#"
request-interval = 0.1
[parents.mtty]
ports = "unix:{root}/port-{port}"
"#;

/// A daemon with one card of two ports, or a reason why there is none.
///
/// # Panics
/// The daemon does not serve, or makes no card.
pub fn card() -> Option<(Prefix, Daemon)> {
    card_with("")
}

/// The same with more configuration.
///
/// # Panics
/// As [`card`].
pub fn card_with(more: &str) -> Option<(Prefix, Daemon)> {
    let prefix = match daemon::possible().and_then(|()| Prefix::find()) {
        Ok(prefix) => prefix,
        Err(reason) => {
            skip(&reason);
            return None;
        }
    };
    let daemon = Daemon::start(&format!("{CONFIG}{more}")).expect("vfiod serves");
    let printed = daemon
        .check(&["start", "mtty-2", "--uuid", UUID])
        .expect("the card is made");
    assert_eq!(printed.trim(), UUID);
    Some((prefix, daemon))
}

/// Boots a guest. QEMU must complain of nothing.
///
/// # Panics
/// It does not boot, or QEMU complains.
pub fn boot(builder: Builder, daemon: &Daemon) -> Guest {
    let runner = daemon.runner();
    let runner: Vec<&str> = runner.iter().map(String::as_str).collect();
    uncomplaining(builder.boot_under(&runner).expect("the guest boots"))
}

/// A guest whose QEMU has complained of nothing.
///
/// # Panics
/// It has.
pub fn uncomplaining(guest: Guest) -> Guest {
    // QEMU warns of what the device could not do for it.
    for line in guest.log().lines() {
        assert!(
            !line.contains("qemu-system-x86_64:"),
            "QEMU complains: {line}"
        );
    }
    guest
}

/// The host's end of a port.
///
/// # Panics
/// Nobody listens there.
pub fn far_end(daemon: &Daemon, port: usize) -> UnixStream {
    let stream = UnixStream::connect(daemon.root().join(format!("port-{port}")))
        .expect("somebody listens at the port");
    stream
        .set_read_timeout(Some(SHORT))
        .expect("a socket has a timeout");
    stream
}

/// Looks at what the guest's own driver found, then moves lines through a port, both ways.
///
/// # Panics
/// Anything is not as it should be.
pub fn assert_card_works(guest: &mut Guest, far_ends: &mut [UnixStream]) {
    let devices = guest.check("lspci -n", SHORT).expect("lspci runs");
    let line = devices
        .lines()
        .find(|line| line.starts_with("00:05.0 "))
        .expect("the card is there");
    assert!(line.contains("4348:3253"), "{line}");
    let driver = guest.check(
        &format!("basename $(readlink /sys/bus/pci/devices/{CARD}/driver)"),
        SHORT,
    );
    assert_eq!(driver.expect("the card has a driver"), "serial");
    let ports = guest.serial_ports(CARD, SHORT).expect("the card has ports");
    assert_eq!(ports.len(), far_ends.len(), "{ports:?}");
    let log = guest.check("dmesg", SHORT).expect("dmesg runs");
    for port in &ports {
        let line = log
            .lines()
            .find(|line| line.contains(&format!("{CARD}: {port} at I/O 0x")))
            .unwrap_or_else(|| panic!("the kernel does not tell of {port}:\n{log}"));
        assert!(line.contains("is a 16550A"), "{line}");
        assert!(!line.contains("irq = 0,"), "{line}");
    }
    for (port, far_end) in ports.iter().zip(far_ends) {
        talk(guest, &ports, port, far_end);
    }
}

/// The line that an open port's interrupts come by. The card's ports share one, which Linux calls
/// after one of them.
fn interrupt(guest: &mut Guest, ports: &[String], port: &str) -> Interrupt {
    let number = guest
        .check(&format!("cat /sys/class/tty/{port}/irq"), SHORT)
        .expect("the guest answers");
    assert_ne!(number, "0", "{port} has no interrupt: its driver polls");
    let line = ports
        .iter()
        .find_map(|name| guest.interrupt(name, SHORT).expect("the guest answers"))
        .unwrap_or_else(|| panic!("nobody asked for interrupt {number} of {port}"));
    assert_eq!(line.number.to_string(), number, "{port}");
    line
}

/// Lines out and in, more than the port's FIFO holds, and the interrupts that carried them.
fn talk(guest: &mut Guest, ports: &[String], port: &str, far_end: &mut UnixStream) {
    guest
        .check(
            &format!("exec 3<>/dev/{port}; stty raw -echo clocal <&3"),
            SHORT,
        )
        .expect("the port opens");
    let before = interrupt(guest, ports, port);

    // In 16550A's terms: 8 fillings of the FIFO.
    let long = format!("{port}: {}\n", "from outside,".repeat(9));
    far_end
        .write_all(long.as_bytes())
        .expect("the port takes it");
    let line = guest
        .check("timeout 20 head -n 1 <&3", SHORT)
        .expect("the line arrives");
    assert_eq!(line, long.trim_end());
    let received = interrupt(guest, ports, port);
    assert_eq!(received.number, before.number);
    assert!(
        received.count > before.count,
        "{port} received without interrupts: {before:?} {received:?}"
    );

    let long = format!("{port}: {}\n", "from inside,".repeat(9));
    guest
        .check(&format!("echo '{}' >&3", long.trim_end()), SHORT)
        .expect("the port takes it");
    let mut bytes = vec![0; long.len()];
    far_end.read_exact(&mut bytes).expect("the bytes arrive");
    assert_eq!(String::from_utf8_lossy(&bytes), long);
    let sent = interrupt(guest, ports, port);
    assert!(
        sent.count > received.count,
        "{port} sent without interrupts: {received:?} {sent:?}"
    );
    guest.check("exec 3>&-", SHORT).expect("the port closes");
}

/// What vfioctl prints as JSON.
///
/// # Panics
/// vfioctl fails.
pub fn json(daemon: &Daemon, arguments: &[&str]) -> Value {
    let mut all = vec!["--json"];
    all.extend(arguments);
    let text = daemon.check(&all).expect("vfioctl answers");
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Waits until nobody has the card open any more.
///
/// # Panics
/// Somebody keeps it.
pub fn until_closed(daemon: &Daemon) {
    daemon::until("the card is closed", SHORT, || {
        json(daemon, &["show", "vfio0"])["show"]["device"]["users"] == 0
    });
}

/// Waits until the card has left the guest.
///
/// # Panics
/// It does not.
pub fn assert_unplugged(guest: &mut Guest) {
    let gone = format!(
        "n=0; while [ -e /sys/bus/pci/devices/{CARD} ] && [ $n -lt 300 ]; do usleep 50000; n=$((n+1)); done; [ ! -e /sys/bus/pci/devices/{CARD} ]"
    );
    guest
        .check(&gone, SHORT)
        .expect("the card leaves the guest");
    let devices = guest.check("lspci -n", SHORT).expect("lspci runs");
    assert!(!devices.contains("4348:3253"), "{devices}");
    assert!(devices.contains("00:00.0 "), "{devices}");
}
