//! QEMU with KVM and an mtty card that it opens by its paths under `vfioctl run`. KVM is told of the
//! card's files, which are none of the kernel's own VFIO. The guest is the firmware alone: it finds the
//! card on the bus, and no guest kernel has to boot where KVM itself runs in a virtual machine.

use std::fs::File;
use std::io::Write as _;
use std::process::Command;
use std::process::Stdio;

use vfiod_tests::card::SHORT;
use vfiod_tests::card::UUID;
use vfiod_tests::card::card;
use vfiod_tests::card::json;
use vfiod_tests::card::until_closed;
use vfiod_tests::daemon::until;
use vfiod_tests::skip;

fn with_kvm(iommufd: bool) {
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    if let Err(error) = kvm {
        eprintln!("/dev/kvm: {error}");
        skip("no virtual machine can be made here (/dev/kvm)");
        return;
    }
    let Some((prefix, daemon)) = card() else {
        return;
    };
    let mut device = format!("vfio-pci,id=card,addr=05.0,sysfsdev=/sys/bus/mdev/devices/{UUID}");
    let runner = daemon.runner();
    let (program, arguments) = runner.split_first().expect("vfioctl");
    let mut command = Command::new(program);
    command.args(arguments).arg(prefix.qemu());
    command.args(["-accel", "kvm", "-machine", "pc", "-m", "64"]);
    command.args(["-nodefaults", "-display", "none", "-monitor", "stdio"]);
    if iommufd {
        command.args(["-object", "iommufd,id=i0"]);
        device += ",iommufd=i0";
    }
    let mut qemu = command
        .args(["-device", &device])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("vfioctl starts");
    let mut monitor = qemu.stdin.take().expect("its input is a pipe");
    until("the card is open", SHORT, || {
        let ended = qemu.try_wait().expect("it can be asked").is_some();
        ended || json(&daemon, &["show", "vfio0"])["show"]["device"]["open"] == true
    });
    // That QEMU has ended already, its output tells.
    let _ = writeln!(monitor, "info status\ninfo pci\nquit");
    let output = qemu.wait_with_output().expect("QEMU ends");
    let printed = String::from_utf8_lossy(&output.stdout);
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{complaints}{printed}");
    assert!(printed.contains("PCI device 4348:3253"), "{printed}");
    assert!(printed.contains("VM status: running"), "{printed}");
    // QEMU ends when KVM refuses a file in iommufd mode, and complains in group mode. Whatever it says
    // of the processor is no matter of ours.
    let of_vfio = |line: &str| line.contains("qemu-system") && line.contains("vfio");
    assert!(!complaints.lines().any(of_vfio), "{complaints}");
    until_closed(&daemon);
    daemon.stop().expect("nothing is left");
}

#[test]
fn kvm_is_told_of_the_cards_group() {
    with_kvm(false);
}

#[test]
fn kvm_is_told_of_the_cards_node() {
    with_kvm(true);
}
