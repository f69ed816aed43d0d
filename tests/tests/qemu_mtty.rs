//! QEMU, unmodified, with an mtty card: a stock Linux guest talks through it, and it is unplugged.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::fd::OwnedFd;

use vfiod_tests::card::CARD;
use vfiod_tests::card::SHORT;
use vfiod_tests::card::UUID;
use vfiod_tests::card::assert_card_works;
use vfiod_tests::card::assert_unplugged;
use vfiod_tests::card::boot;
use vfiod_tests::card::card;
use vfiod_tests::card::far_end;
use vfiod_tests::card::json;
use vfiod_tests::card::until_closed;
use vfiod_tests::daemon::Daemon;
use vfiod_tests::daemon::until;
use vfiod_tests::guest::Builder;
use vfiod_tests::guest::Guest;
use vfiod_tests::packages::Prefix;

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
    guest.switch_off(SHORT);
    until_closed(&daemon);
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
    guest.switch_off(SHORT);
    daemon.stop().expect("nothing is left");
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
    guest.switch_off(SHORT);
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
