//! QEMU, unmodified, with an mtty card that it opens by its paths under `vfioctl run`: nothing is passed
//! on. By the group and the container, and by the device's own node and iommufd.

use std::fs;

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
use vfiod_tests::guest::Builder;
use vfiod_tests::guest::Guest;
use vfiod_tests::packages::Prefix;

/// A guest with the card, which QEMU opens by its paths: by the group without `iommufd`, else by the
/// node of the device. Nothing is passed on.
fn guest_by_paths(prefix: &Prefix, iommufd: bool) -> Builder {
    let mut card = format!("vfio-pci,id=card,addr=05.0,sysfsdev=/sys/bus/mdev/devices/{UUID}");
    let mut builder = Guest::builder(prefix)
        .modules(&["8250_pci"])
        .program("/usr/bin/lspci");
    if iommufd {
        builder = builder.qemu_args(&["-object", "iommufd,id=i0"]);
        card += ",iommufd=i0";
    }
    builder.qemu_args(&["-device", &card])
}

/// A guest that QEMU gives the card by its paths, from boot to power-off.
fn by_paths(iommufd: bool, shared: bool) {
    let Some((prefix, daemon)) = card() else {
        return;
    };
    let mut far_ends = [0, 1].map(|port| far_end(&daemon, port));
    let mut builder = guest_by_paths(&prefix, iommufd);
    if shared {
        builder = builder
            .machine("pc,memory-backend=ram")
            .qemu_args(&["-object", "memory-backend-memfd,id=ram,size=256M,share=on"]);
    }
    let mut guest = boot(builder, &daemon);
    assert_card_works(&mut guest, &mut far_ends);
    let who = json(&daemon, &["who", "vfio0"]);
    let qemu = u64::from(guest.pid());
    let holders = who["holders"].as_array().expect("a list of holders");
    assert!(
        holders.iter().any(|holder| holder["pid"] == qemu),
        "{qemu} is not in {who}"
    );
    guest.switch_off(SHORT);
    until_closed(&daemon);
    daemon.stop().expect("nothing is left");
}

#[test]
fn qemu_opens_the_card_by_its_group() {
    by_paths(false, false);
}

#[test]
fn qemu_opens_the_card_by_its_group_with_shared_memory() {
    by_paths(false, true);
}

#[test]
fn qemu_opens_the_card_by_its_node() {
    by_paths(true, false);
}

#[test]
fn a_card_by_its_group_is_stopped_and_leaves_a_running_guest() {
    let Some((prefix, daemon)) = card() else {
        return;
    };
    let mut guest = boot(guest_by_paths(&prefix, false), &daemon);
    guest.serial_ports(CARD, SHORT).expect("the card has ports");
    let stopped = daemon.ctl(&["stop", UUID, "--wait"]).expect("vfioctl ends");
    assert_eq!(stopped.code, 0, "{stopped:?}");
    assert_unplugged(&mut guest);
    let groups = fs::read_dir(daemon.root().join("dev/vfio")).expect("a directory");
    let names: Vec<String> = groups
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.parse::<u32>().is_ok())
        .collect();
    assert_eq!(names, [""; 0], "the group went with its only device");
    guest.switch_off(SHORT);
    daemon.stop().expect("nothing is left");
}
