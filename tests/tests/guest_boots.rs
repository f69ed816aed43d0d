//! The guests that other tests use: they boot, answer, and have the hardware they are given.

use std::io::Read as _;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use std::time::Instant;

use vfiod_tests::guest::Guest;
use vfiod_tests::packages::Kernel;
use vfiod_tests::packages::Prefix;
use vfiod_tests::skip;

const SHORT: Duration = Duration::from_secs(30);

/// Where QEMU puts the serial card.
const CARD: &str = "0000:00:05.0";

macro_rules! prefix_or_skip {
    () => {
        match Prefix::find() {
            Ok(prefix) => prefix,
            Err(reason) => return skip(&reason),
        }
    };
}

#[test]
fn a_stock_kernel_finds_a_serial_card_with_its_own_driver() {
    let prefix = prefix_or_skip!();
    let begin = Instant::now();
    let mut guest = Guest::builder(&prefix)
        .modules(&["8250_pci"])
        .qemu_args(&[
            "-chardev",
            "null,id=card",
            "-device",
            "pci-serial,chardev=card,addr=05.0",
        ])
        .program("/usr/bin/lspci")
        .boot()
        .expect("the guest boots");
    println!(
        "the shell answers after {:.1} s",
        begin.elapsed().as_secs_f64()
    );
    assert!(
        begin.elapsed() < Duration::from_secs(60),
        "{:?}",
        begin.elapsed()
    );

    assert_eq!(
        guest.check("uname -r", SHORT).expect("uname runs"),
        guest.release()
    );
    assert!(guest.release().starts_with("6.1."), "{}", guest.release());

    let devices = guest.check("lspci -n", SHORT).expect("lspci runs");
    assert!(devices.contains("00:05.0 0700: 1b36:0002"), "{devices}");
    let driver = guest.check(
        "basename $(readlink /sys/bus/pci/devices/0000:00:05.0/driver)",
        SHORT,
    );
    assert_eq!(driver.expect("the card has a driver"), "serial");
    let ports = guest
        .check("ls /sys/bus/pci/devices/0000:00:05.0/tty", SHORT)
        .expect("the card has a port");
    assert!(ports.starts_with("ttyS"), "{ports}");
    guest.switch_off(SHORT);
}

#[test]
fn bytes_and_interrupts_pass_an_inherited_descriptor_and_the_card_is_unplugged_while_open() {
    let prefix = prefix_or_skip!();
    let (mut host, qemu) = UnixStream::pair().expect("a pair of sockets");
    host.set_read_timeout(Some(SHORT))
        .expect("a socket has a timeout");
    let qemu = OwnedFd::from(qemu);
    let card = format!("socket,id=card,fd={}", qemu.as_raw_fd());
    let mut guest = Guest::builder(&prefix)
        .qemu_args(&[
            "-chardev",
            &card,
            "-device",
            "pci-serial,chardev=card,addr=05.0,id=serial",
        ])
        .inherit(qemu)
        .boot_under(&["env", "--"])
        .expect("the guest boots");
    let ports = guest
        .serial_ports(CARD, SHORT)
        .expect("the card has a driver");
    let port = ports.first().expect("the card has a port").clone();
    guest
        .check(&format!("exec 3<>/dev/{port}; stty raw -echo <&3"), SHORT)
        .expect("the port opens");
    let before = guest
        .interrupt(&port, SHORT)
        .expect("the guest answers")
        .expect("the port has an interrupt");
    assert_ne!(before.number, 0);

    host.write_all(b"from outside\n").expect("QEMU listens");
    let line = guest
        .check("timeout 20 head -n 1 <&3", SHORT)
        .expect("the line arrives");
    assert_eq!(line, "from outside");
    guest
        .check("echo from inside >&3", SHORT)
        .expect("the port takes it");
    let mut bytes = [0; 12];
    host.read_exact(&mut bytes).expect("the bytes arrive");
    assert_eq!(&bytes, b"from inside\n");
    let after = guest
        .interrupt(&port, SHORT)
        .expect("the guest answers")
        .expect("the port has an interrupt");
    assert_eq!(after.number, before.number);
    assert!(after.count > before.count, "{before:?} {after:?}");

    let status = guest
        .monitor(r#"{"execute": "query-status"}"#)
        .expect("QEMU answers");
    assert!(status.contains("\"running\""), "{status}");
    assert!(guest.monitor(r#"{"execute": "no-such-thing"}"#).is_err());
    guest
        .monitor(r#"{"execute": "device_del", "arguments": {"id": "serial"}}"#)
        .expect("QEMU asks the guest to let go");
    let gone = format!(
        "n=0; while [ -e /sys/bus/pci/devices/{CARD} ] && [ $n -lt 200 ]; do usleep 50000; n=$((n+1)); done; [ ! -e /sys/bus/pci/devices/{CARD} ]"
    );
    guest
        .check(&gone, SHORT)
        .expect("the card leaves the guest");
}

#[test]
fn the_shell_keeps_output_and_status_apart_from_everything_else() {
    let prefix = prefix_or_skip!();
    let mut guest = Guest::builder(&prefix).boot().expect("the guest boots");
    let failed = guest
        .run("echo out; echo err >&2; printf tail; (exit 7)", SHORT)
        .expect("the shell answers");
    assert_eq!((failed.status, failed.text.as_str()), (7, "out\nerr\ntail"));
    let silent = guest.run("true", SHORT).expect("the shell answers");
    assert_eq!((silent.status, silent.text.as_str()), (0, ""));
    // Kernel messages do not get between the lines.
    let noise = guest.check("echo '<4>noise' > /dev/kmsg; dmesg | grep -c noise", SHORT);
    assert_eq!(noise.expect("the message is in the log"), "1");
    let lines = guest.check("seq 1 2000", SHORT).expect("seq runs");
    assert_eq!(lines.lines().count(), 2000);
    let error = guest
        .run("sleep 60", Duration::from_millis(300))
        .expect_err("it does not end in time");
    assert!(error.contains("has not answered in time"), "{error}");
}

#[test]
fn a_guest_that_dies_is_noticed_at_once() {
    let prefix = prefix_or_skip!();
    let mut guest = Guest::builder(&prefix).boot().expect("the guest boots");
    let error = guest
        .run("echo c > /proc/sysrq-trigger", BOOT_OR_DIE)
        .expect_err("the kernel panics");
    assert!(error.contains("the guest is gone"), "{error}");
}

/// Longer than a panic takes, so that only noticing the end makes the test fast.
const BOOT_OR_DIE: Duration = Duration::from_secs(600);

fn vfio_host(kernel: Kernel) -> Option<Guest> {
    match Prefix::find() {
        Ok(prefix) => Some(
            Guest::vfio_host(&prefix)
                .kernel(kernel)
                .program("/usr/bin/lspci")
                .boot()
                .expect("the guest boots"),
        ),
        Err(reason) => {
            skip(&reason);
            None
        }
    }
}

#[test]
fn a_guest_of_debian_12_gives_its_network_card_to_vfio_pci() {
    let Some(mut guest) = vfio_host(Kernel::Bookworm) else {
        return;
    };
    let device = guest
        .bind_vfio("0000:00:02.0", SHORT)
        .expect("vfio-pci takes the card");
    let dir = format!("/sys/kernel/iommu_groups/{}/devices", device.group);
    assert_eq!(
        guest
            .check(&format!("ls {dir}"), SHORT)
            .expect("the group has it"),
        device.address
    );
    let name = guest
        .check(&format!("lspci -s {} -k", device.address), SHORT)
        .expect("lspci runs");
    assert!(name.contains("Kernel driver in use: vfio-pci"), "{name}");
    assert_cdev_off(&mut guest, &device.address);
}

/// Debian builds without VFIO_DEVICE_CDEV: the VFIO device is in sysfs, but has no node.
fn assert_cdev_off(guest: &mut Guest, address: &str) {
    let dir = format!("/sys/bus/pci/devices/{address}/vfio-dev/vfio0");
    let entries = guest
        .check(&format!("ls -1 {dir}"), SHORT)
        .expect("the device is there");
    assert!(
        entries.lines().any(|entry| entry == "subsystem"),
        "{entries}"
    );
    assert!(!entries.lines().any(|entry| entry == "dev"), "{entries}");
    let class = guest
        .check("ls -1 /sys/class/vfio-dev", SHORT)
        .expect("the class is there");
    assert_eq!(class, "vfio0");
}

#[test]
fn a_guest_with_a_newer_kernel_does_so_too() {
    let Some(mut guest) = vfio_host(Kernel::Backports) else {
        return;
    };
    let device = guest
        .bind_vfio("0000:00:02.0", SHORT)
        .expect("vfio-pci takes the card");
    assert_cdev_off(&mut guest, &device.address);
}

#[test]
fn a_guest_boots_under_qemu_11() {
    let prefix = prefix_or_skip!();
    let qemu = match prefix.qemu11() {
        Ok(qemu) => qemu,
        Err(reason) => return skip(&reason),
    };
    let mut guest = Guest::builder(&prefix)
        .qemu(qemu)
        .boot()
        .expect("the guest boots");
    let version = guest
        .monitor(r#"{"execute": "query-version"}"#)
        .expect("the monitor answers");
    assert!(version.contains("\"major\": 11"), "{version}");
    // It runs by its own loader, and is called after itself all the same.
    let comm =
        std::fs::read_to_string(format!("/proc/{}/comm", guest.pid())).expect("QEMU is a process");
    assert_eq!(comm, "qemu-system-x86\n");
    guest.check("true", SHORT).expect("the guest answers");
    guest.switch_off(SHORT);
}
