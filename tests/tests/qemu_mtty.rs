//! QEMU, unmodified, with an mtty card: a stock Linux guest talks through it, and it is unplugged.

use std::fs::File;
use std::io::Read as _;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::Value;
use vfiod_tests::daemon;
use vfiod_tests::daemon::Daemon;
use vfiod_tests::daemon::until;
use vfiod_tests::guest::Builder;
use vfiod_tests::guest::Guest;
use vfiod_tests::guest_hardware::Interrupt;
use vfiod_tests::packages::Prefix;
use vfiod_tests::skip;

const SHORT: Duration = Duration::from_secs(30);
const CARD: &str = "0000:00:05.0";
const UUID: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";

/// Each port is a socket; users are asked to leave ten times a second.
const CONFIG: &str = r#"
request-interval = 0.1
[parents.mtty]
ports = "unix:{root}/port-{port}"
"#;

/// A daemon with one card of two ports, or a reason why there is none.
fn card() -> Option<(Prefix, Daemon)> {
    let prefix = match daemon::possible().and_then(|()| Prefix::find()) {
        Ok(prefix) => prefix,
        Err(reason) => {
            skip(&reason);
            return None;
        }
    };
    let daemon = Daemon::start(CONFIG).expect("vfiod serves");
    let printed = daemon
        .check(&["start", "mtty-2", "--uuid", UUID])
        .expect("the card is made");
    assert_eq!(printed.trim(), UUID);
    Some((prefix, daemon))
}

/// A guest with the card, given to QEMU as descriptors that this process opened.
fn guest_with_card(prefix: &Prefix, daemon: &Daemon) -> Builder {
    let open = |path| {
        OwnedFd::from(
            File::options()
                .read(true)
                .write(true)
                .open(path)
                .expect("the node opens"),
        )
    };
    let (iommu, device) = (open(daemon.iommu()), open(daemon.node("vfio0")));
    let object = format!("iommufd,id=i0,fd={}", iommu.as_raw_fd());
    let card = format!(
        "vfio-pci,id=card,addr=05.0,sysfsdev=/sys/bus/mdev/devices/{UUID},fd={},iommufd=i0",
        device.as_raw_fd()
    );
    Guest::builder(prefix)
        .modules(&["8250_pci"])
        .program("/usr/bin/lspci")
        .qemu_args(&["-object", &object, "-device", &card])
        .inherit(iommu)
        .inherit(device)
}

fn boot(builder: Builder, daemon: &Daemon) -> Guest {
    let runner = daemon.runner();
    let runner: Vec<&str> = runner.iter().map(String::as_str).collect();
    let guest = builder.boot_under(&runner).expect("the guest boots");
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
fn far_end(daemon: &Daemon, port: usize) -> UnixStream {
    let stream = UnixStream::connect(daemon.root().join(format!("port-{port}")))
        .expect("somebody listens at the port");
    stream
        .set_read_timeout(Some(SHORT))
        .expect("a socket has a timeout");
    stream
}

/// Looks at what the guest's own driver found, then moves lines through a port, both ways.
fn assert_card_works(guest: &mut Guest, far_ends: &mut [UnixStream]) {
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

fn json(daemon: &Daemon, arguments: &[&str]) -> Value {
    let mut all = vec!["--json"];
    all.extend(arguments);
    let text = daemon.check(&all).expect("vfioctl answers");
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn a_guest_talks_through_the_card_with_private_memory() {
    let Some((prefix, daemon)) = card() else {
        return;
    };
    let mut far_ends = [0, 1].map(|port| far_end(&daemon, port));
    let mut guest = boot(guest_with_card(&prefix, &daemon), &daemon);
    assert_card_works(&mut guest, &mut far_ends);

    // The opener, this process, has no descriptor any more; QEMU has.
    let who = json(&daemon, &["who", "vfio0"]);
    let holders = who["holders"].as_array().expect("a list of holders");
    let qemu = u64::from(guest.pid());
    assert!(
        holders.iter().any(|holder| holder["pid"] == qemu),
        "{qemu} is not in {who}"
    );
    assert!(
        !holders
            .iter()
            .any(|holder| holder["pid"] == u64::from(daemon.pid())),
        "the daemon holds its own device: {who}"
    );
    assert!(
        guest
            .power_off(SHORT)
            .expect("the guest switches itself off")
    );
    until("closed with QEMU's end", SHORT, || {
        json(&daemon, &["show", "vfio0"])["show"]["device"]["users"] == 0
    });
    daemon.stop().expect("nothing is left");
}

#[test]
fn a_guest_talks_through_the_card_with_shared_memory() {
    let Some((prefix, daemon)) = card() else {
        return;
    };
    let mut far_ends = [0, 1].map(|port| far_end(&daemon, port));
    let builder = guest_with_card(&prefix, &daemon)
        .machine("pc,memory-backend=ram")
        .qemu_args(&["-object", "memory-backend-memfd,id=ram,size=256M,share=on"]);
    let mut guest = boot(builder, &daemon);
    assert_card_works(&mut guest, &mut far_ends);
    assert!(
        guest
            .power_off(SHORT)
            .expect("the guest switches itself off")
    );
    daemon.stop().expect("nothing is left");
}

/// Waits until the card has left the guest.
fn assert_unplugged(guest: &mut Guest) {
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

#[test]
fn a_card_that_is_stopped_leaves_a_running_guest() {
    let Some((prefix, daemon)) = card() else {
        return;
    };
    let mut guest = boot(guest_with_card(&prefix, &daemon), &daemon);
    guest.serial_ports(CARD, SHORT).expect("the card has ports");
    // The request makes QEMU ask the guest, which lets go: nobody is cut off.
    let stopped = daemon.ctl(&["stop", UUID, "--wait"]).expect("vfioctl ends");
    assert_eq!(stopped.code, 0, "{stopped:?}");
    assert_unplugged(&mut guest);
    let list = json(&daemon, &["list"]);
    assert_eq!(list["devices"].as_array().map(Vec::len), Some(0), "{list}");
    until("released", SHORT, || {
        daemon.log().contains("vfio0: released")
    });
    let status = guest
        .monitor(r#"{"execute": "query-status"}"#)
        .expect("QEMU lives on");
    assert!(status.contains("\"running\""), "{status}");
    assert!(
        guest
            .power_off(SHORT)
            .expect("the guest switches itself off")
    );
    daemon.stop().expect("nothing is left");
}

#[test]
fn a_guest_that_does_not_let_go_is_cut_off_and_qemu_survives() {
    let Some((prefix, daemon)) = card() else {
        return;
    };
    // Without ACPI's hotplug nobody in the guest hears of QEMU's wish.
    let builder = guest_with_card(&prefix, &daemon).kernel_arguments(&["acpi=off"]);
    let mut guest = boot(builder, &daemon);
    let qemu = u64::from(guest.pid());
    let mut unbind = daemon
        .vfioctl()
        .args(["unbind", "vfio0", "--wait"])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("vfioctl runs");
    // Its names are gone, and it waits for QEMU.
    until("unregistering", SHORT, || !daemon.node("vfio0").exists());
    until("waiting for QEMU", SHORT, || {
        let show = json(&daemon, &["show", UUID]);
        let pending = &show["show"]["device"]["pending"];
        let requests = pending["requests"].as_u64().unwrap_or_default();
        let named = pending["holders"]
            .as_array()
            .is_some_and(|holders| holders.iter().any(|holder| holder["pid"] == qemu));
        requests >= 2 && named
    });
    assert!(
        matches!(unbind.try_wait(), Ok(None)),
        "an unbind does not wait for QEMU"
    );
    let timeout = daemon
        .ctl(&["wait", UUID, "--gone", "--timeout", "0.3"])
        .expect("vfioctl ends");
    assert_eq!(timeout.code, 5, "{timeout:?}");

    let forced = daemon
        .ctl(&["unbind", UUID, "--force"])
        .expect("vfioctl ends");
    assert_eq!(forced.code, 0, "{forced:?}");
    assert!(unbind.wait().is_ok_and(|status| status.success()));
    // The guest reads what a slot without a card gives, and goes on.
    guest.check("echo alive", SHORT).expect("the guest goes on");
    let status = guest
        .monitor(r#"{"execute": "query-status"}"#)
        .expect("QEMU lives on");
    assert!(status.contains("\"running\""), "{status}");
    // It cannot switch itself off without ACPI.
    drop(guest);
    until("released", SHORT, || {
        daemon.log().contains("vfio0: released")
    });
    daemon.stop().expect("nothing is left");
}
