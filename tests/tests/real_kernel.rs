//! `vfioctl` without vfiod: on a stock Debian kernel it tells of that kernel's own vfio-pci.

use std::time::Duration;

use vfiod_tests::guest::Guest;
use vfiod_tests::packages::Kernel;
use vfiod_tests::packages::Prefix;
use vfiod_tests::packages::program;
use vfiod_tests::skip;

const SHORT: Duration = Duration::from_secs(30);

/// Where QEMU puts the network card.
const CARD: &str = "0000:00:02.0";

/// A function of the chipset: two others are in its group.
const SATA: &str = "0000:00:1f.2";

/// A guest with an IOMMU and `vfioctl`; `None` where there cannot be one, which is said.
fn boot(kernel: Kernel) -> Option<Guest> {
    let prefix = match Prefix::find() {
        Ok(prefix) => prefix,
        Err(reason) => {
            skip(&reason);
            return None;
        }
    };
    let mut guest = Guest::vfio_host(&prefix)
        .kernel(kernel)
        .program(program("vfioctl").expect("vfioctl is built"))
        .boot()
        .expect("the guest boots");
    // The console is a terminal, where names would have colours.
    say(&mut guest, "export NO_COLOR=1");
    Some(guest)
}

/// What a command of the guest prints, on both outputs; it has to work.
#[track_caller]
fn say(guest: &mut Guest, command: &str) -> String {
    guest.check(command, SHORT).expect("the command works")
}

/// As [`say`], without any white space: JSON whose layout does not matter.
#[track_caller]
fn json(guest: &mut Guest, command: &str) -> String {
    say(guest, command).split_whitespace().collect()
}

/// A command that ends with `status`, and says why.
#[track_caller]
fn refused(guest: &mut Guest, command: &str, status: i32, why: &str) {
    let output = guest.run(command, SHORT).expect("the shell answers");
    assert_eq!(output.status, status, "{command}: {}", output.text);
    assert!(output.text.contains(why), "{command}: {}", output.text);
}

/// The words of the line that has `word` as one of its own.
#[track_caller]
fn row<'a>(text: &'a str, word: &str) -> Vec<&'a str> {
    text.lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .find(|words| words.contains(&word))
        .unwrap_or_else(|| panic!("no line has {word}:\n{text}"))
}

/// A process of the guest that has the group's node open as descriptor 3: its pid.
fn hold(guest: &mut Guest, group: u32) -> String {
    say(
        guest,
        &format!("sh -c 'exec 3<>/dev/vfio/{group}; exec sleep 1000' & holder=$!"),
    );
    // Once it is `sleep`, it has the node open.
    say(
        guest,
        "n=0; until [ $(cat /proc/$holder/comm) = sleep ] || [ $n -gt 1000 ]; do \
         usleep 10000; n=$((n+1)); done; readlink /proc/$holder/fd/3; echo $holder",
    )
    .lines()
    .last()
    .expect("a pid")
    .to_owned()
}

fn vfioctl_tells_of_the_kernels_own_device(kernel: Kernel) {
    let Some(mut guest) = boot(kernel) else {
        return;
    };
    let guest = &mut guest;
    assert_eq!(say(guest, "vfioctl list"), "no VFIO devices");
    // Any device can be shown, to see what it could be given as.
    let unbound = say(guest, &format!("vfioctl show {CARD}"));
    assert_eq!(row(&unbound, "state"), ["state", "unbound"]);
    refused(guest, "vfioctl who 0000:00:09.0", 3, "0000:00:09.0");
    refused(guest, "vfioctl events", 6, "vfiod is not reachable");

    let group = guest
        .bind_vfio(CARD, SHORT)
        .expect("vfio-pci takes the card")
        .group;
    let group_text = group.to_string();
    // Debian builds without VFIO_DEVICE_CDEV: there is no number, and the node is the group's.
    let columns = [
        "vfio0",
        CARD,
        "pci",
        "vfio-pci",
        &group_text,
        "-",
        "registered",
    ];
    let list = say(guest, "vfioctl list");
    assert_eq!(list.lines().count(), 2, "{list}");
    assert_eq!(row(&list, CARD), [&columns[..], &["-"]].concat());
    assert_eq!(say(guest, "vfioctl who vfio0"), "vfio0: nobody has it open");

    let pid = hold(guest, group);
    let by = format!("sleep({pid})");
    let opened = [by.as_str(), "by", "its", "group"];
    let list = say(guest, "vfioctl list");
    assert_eq!(row(&list, CARD), [&columns[..], &opened].concat());

    let device = format!(
        r#"{{"name":"vfio0","address":"{CARD}","bus":"pci","path":"/devices/pci0000:00/{CARD}","driver":"vfio-pci","iommu_group":{group},"node":"/dev/vfio/{group}","state":"registered","holders":[{{"pid":{pid},"command":"sleep","since_us":"#
    );
    let list = json(guest, "vfioctl list --json");
    let head = format!(r#"{{"schema":1,"source":"sysfs","devices":[{device}"#);
    assert!(list.starts_with(&head), "{list}");
    assert!(list.contains(r#""fds":[3]"#), "{list}");
    assert!(list.contains(r#""via":"group""#), "{list}");
    assert_eq!(list.matches(r#""address""#).count(), 1, "{list}");

    let tree = say(guest, "vfioctl tree");
    let tree: Vec<Vec<&str>> = tree
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let node = format!("/dev/vfio/{group},");
    let card = ["└─", CARD, "driver", "vfio-pci,", "group", &group_text];
    let vfio = ["└─", "vfio0", "registered,", &node, "open", "by"];
    let expected = [vec!["pci"], card.to_vec(), [&vfio[..], &opened].concat()];
    assert_eq!(tree, expected);

    let show = say(guest, &format!("vfioctl show {CARD}"));
    for (key, value) in [
        ("device", "vfio0"),
        ("address", CARD),
        ("directory", &format!("/sys/devices/pci0000:00/{CARD}")),
        ("bus", "pci"),
        ("driver", "vfio-pci"),
        ("state", "registered"),
        ("node", &format!("/dev/vfio/{group}")),
        ("group", &group_text),
    ] {
        let line = show.lines().find(|line| line.starts_with(key));
        let said = line.and_then(|line| line.split_whitespace().nth(1));
        assert_eq!(said, Some(value), "{key}:\n{show}");
    }
    let held = row(&show, "held");
    assert_eq!(held.get(2), Some(&by.as_str()), "{show}");
    let json_show = json(guest, &format!("vfioctl show {CARD} --json"));
    assert!(json_show.contains(&device), "{json_show}");
    let domain = say(guest, &format!("cat /sys/kernel/iommu_groups/{group}/type"));
    let member = format!(
        r#""group":{{"id":{group},"type":"{domain}","members":[{{"address":"{CARD}","driver":"vfio-pci","blocks":false}}]}}"#
    );
    assert!(json_show.contains(&member), "{json_show}");

    // All its names lead to it.
    for name in [
        "vfio0",
        CARD,
        "00:02.0",
        &format!("pci/{CARD}"),
        &format!("/dev/vfio/{group}"),
        &format!("/sys/bus/pci/devices/{CARD}"),
        "/sys/class/vfio-dev/vfio0",
    ] {
        let who = say(guest, &format!("vfioctl who {name}"));
        assert_eq!(who.lines().count(), 2, "{name}: {who}");
        let words = row(&who, &pid);
        assert_eq!(
            words.get(..5),
            Some(&[pid.as_str(), "sleep", "group", "fd", "3"][..]),
            "{name}"
        );
    }

    say(guest, "kill $holder; wait $holder; true");
    let who = say(guest, "vfioctl who vfio0");
    assert_eq!(who, "vfio0: nobody has it open");
}

#[test]
fn vfioctl_tells_of_vfio_pci_on_debian_12() {
    vfioctl_tells_of_the_kernels_own_device(Kernel::Bookworm);
}

#[test]
fn vfioctl_tells_of_vfio_pci_on_a_newer_kernel() {
    vfioctl_tells_of_the_kernels_own_device(Kernel::Backports);
}

#[test]
fn vfioctl_binds_and_unbinds_and_shows_who_shares_a_group() {
    let Some(mut guest) = boot(Kernel::Bookworm) else {
        return;
    };
    let guest = &mut guest;
    say(guest, &format!("vfioctl bind {CARD}"));
    say(guest, &format!("vfioctl bind {SATA}"));
    let list = say(guest, "vfioctl list");
    assert_eq!(list.lines().count(), 3, "{list}");
    for (address, name) in [(CARD, "vfio0"), (SATA, "vfio1")] {
        assert_eq!(
            row(&list, address).get(..4),
            Some(&[name, address, "pci", "vfio-pci"][..])
        );
        let driver = format!("basename $(readlink /sys/bus/pci/devices/{address}/driver)");
        assert_eq!(say(guest, &driver), "vfio-pci");
    }

    // The other members of the group have no driver, so it can be used.
    let dir = format!("/sys/bus/pci/devices/{SATA}/iommu_group/devices");
    let members = say(guest, &format!("ls -1 {dir}"));
    assert!(members.lines().count() > 1, "{members}");
    let show = say(guest, "vfioctl show vfio1");
    for member in members.lines() {
        let line = show
            .lines()
            .rev()
            .find(|line| line.contains(member) && !line.contains('/'));
        let driver = line.and_then(|line| line.split_whitespace().last());
        let expected = if member == SATA { "vfio-pci" } else { "-" };
        assert_eq!(driver, Some(expected), "{member}:\n{show}");
    }
    assert!(!show.contains("keeps the group"), "{show}");

    say(guest, "vfioctl unbind vfio1");
    let list = say(guest, "vfioctl list");
    assert_eq!(list.lines().count(), 2, "{list}");
    assert!(!list.contains(SATA), "{list}");
    say(
        guest,
        &format!("[ ! -e /sys/bus/pci/devices/{SATA}/driver ]"),
    );
    say(guest, &format!("vfioctl unbind {CARD}"));
    assert_eq!(say(guest, "vfioctl list"), "no VFIO devices");
    refused(guest, "vfioctl who vfio0", 3, "vfio0");
}
