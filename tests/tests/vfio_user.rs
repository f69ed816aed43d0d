//! QEMU 11, unmodified, with an mtty card over a vfio-user socket.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Stdio;

use serde_json::Value;
use vfiod_tests::card::SHORT;
use vfiod_tests::card::UUID;
use vfiod_tests::card::assert_card_works;
use vfiod_tests::card::card_with;
use vfiod_tests::card::far_end;
use vfiod_tests::card::json;
use vfiod_tests::card::uncomplaining;
use vfiod_tests::card::until_closed;
use vfiod_tests::daemon::Daemon;
use vfiod_tests::daemon::until;
use vfiod_tests::guest::Guest;
use vfiod_tests::packages::Prefix;
use vfiod_tests::skip;

/// A daemon that offers every device, with a card, and QEMU 11.
fn offered() -> Option<(Prefix, PathBuf, Daemon)> {
    let (prefix, daemon) = card_with("[vfio-user]\noffer = \"all\"\n")?;
    match prefix.qemu11() {
        Ok(qemu) => Some((prefix, qemu, daemon)),
        Err(reason) => {
            skip(&reason);
            None
        }
    }
}

fn socket(daemon: &Daemon) -> PathBuf {
    daemon.root().join(format!("vfio-user/{UUID}.sock"))
}

/// Boots a guest whose QEMU connects to the card's socket. `qemu-args` says how; only the place in
/// the guest and its memory's size are the test's.
fn boot(prefix: &Prefix, qemu: &PathBuf, daemon: &Daemon) -> Guest {
    let args = json(daemon, &["qemu-args", "vfio0", "--memory", "256M"])["args"].clone();
    let words: Vec<&str> = args
        .as_array()
        .expect("a list of words")
        .iter()
        .map(|word| word.as_str().expect("a word"))
        .collect();
    let value = |option: &str| {
        let at = words.iter().position(|word| *word == option);
        words[at.unwrap_or_else(|| panic!("no {option} in {words:?}")) + 1]
    };
    let mut device: Value = serde_json::from_str(value("-device")).expect("JSON");
    device["addr"] = "05.0".into();
    device["id"] = "card".into();
    let guest = Guest::builder(prefix)
        .qemu(qemu)
        .modules(&["8250_pci"])
        .program("/usr/bin/lspci")
        .machine(&format!("pc,{}", value("-machine")))
        .qemu_args(&["-object", value("-object"), "-device", &device.to_string()])
        .boot()
        .expect("the guest boots");
    uncomplaining(guest)
}

fn holders(daemon: &Daemon) -> Vec<Value> {
    let who = json(daemon, &["who", "vfio0"]);
    who["holders"]
        .as_array()
        .expect("a list of holders")
        .clone()
}

#[test]
fn a_guest_talks_through_the_card_over_its_socket() {
    let Some((prefix, qemu, daemon)) = offered() else {
        return;
    };
    let path = socket(&daemon);
    let file = fs::symlink_metadata(&path).expect("the socket is there");
    assert!(file.file_type().is_socket());
    let mut far_ends = [0, 1].map(|port| far_end(&daemon, port));
    let mut guest = boot(&prefix, &qemu, &daemon);
    assert_card_works(&mut guest, &mut far_ends);

    let holders = holders(&daemon);
    let [holder] = holders.as_slice() else {
        panic!("not one holder: {holders:?}");
    };
    assert_eq!(holder["pid"], u64::from(guest.pid()));
    assert_eq!(holder["client"], "QEMU");
    assert_eq!(holder["socket"], path.to_str().expect("a path in ASCII"));

    // Another client is refused at once, and who and why can be read.
    let mut other = UnixStream::connect(&path).expect("the socket takes connections");
    other.set_read_timeout(Some(SHORT)).expect("a timeout");
    let hello = [
        7u8, 0, 1, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0,
    ];
    let _ = std::io::Write::write_all(&mut other, &hello);
    let mut answer = Vec::new();
    other
        .read_to_end(&mut answer)
        .expect("an answer, or the end");
    if !answer.is_empty() {
        assert_eq!(answer[8] & 0x20, 0x20, "an error: {answer:?}");
        assert_eq!(answer[12..16], 16u32.to_ne_bytes(), "EBUSY: {answer:?}");
    }
    until("the refusal is told", SHORT, || {
        let who = json(&daemon, &["who", "vfio0"]);
        let refused = who["refused"].as_array().cloned().unwrap_or_default();
        refused.iter().any(|one| {
            one["pid"] == u64::from(std::process::id())
                && one["reason"]
                    .as_str()
                    .is_some_and(|reason| reason.contains(&guest.pid().to_string()))
        })
    });
    assert_card_works(&mut guest, &mut far_ends);

    guest.switch_off(SHORT);
    until_closed(&daemon);
    daemon.stop().expect("nothing is left");
}

#[test]
fn a_qemu_that_is_killed_leaves_the_card_to_the_next() {
    let Some((prefix, qemu, daemon)) = offered() else {
        return;
    };
    let guest = boot(&prefix, &qemu, &daemon);
    // Dropping a guest kills its QEMU.
    drop(guest);
    until_closed(&daemon);
    // The ports' wires are those of an open card.
    let mut far_ends = [0, 1].map(|port| far_end(&daemon, port));
    let mut guest = boot(&prefix, &qemu, &daemon);
    assert_card_works(&mut guest, &mut far_ends);
    drop(guest);
    daemon.stop().expect("nothing is left");
}

#[test]
fn an_unbind_says_that_qemu_cannot_be_asked_and_closes_its_connection() {
    let Some((prefix, qemu, daemon)) = offered() else {
        return;
    };
    let mut guest = boot(&prefix, &qemu, &daemon);
    let unbind = daemon
        .vfioctl()
        .args(["unbind", "vfio0", "--timeout", "2"])
        .stdin(Stdio::null())
        .output()
        .expect("vfioctl runs");
    let said = String::from_utf8_lossy(&unbind.stderr) + String::from_utf8_lossy(&unbind.stdout);
    assert!(said.contains("cannot be asked"), "{said}");
    assert!(said.contains(&guest.pid().to_string()), "{said}");
    assert!(
        !socket(&daemon).exists(),
        "the name goes when the unregister begins"
    );
    until("released", SHORT, || {
        daemon.log().contains("vfio0: released")
    });
    // The machine goes on, without its card: nobody has sent it an error interrupt.
    guest.check("echo alive", SHORT).expect("the guest goes on");
    let status = guest
        .monitor(r#"{"execute": "query-status"}"#)
        .expect("QEMU lives on");
    assert!(status.contains("\"running\""), "{status}");
    drop(guest);

    // Bound again it is offered again.
    daemon.check(&["bind", UUID]).expect("the driver takes it");
    let mut far_ends = [0, 1].map(|port| far_end(&daemon, port));
    let mut guest = boot(&prefix, &qemu, &daemon);
    assert_card_works(&mut guest, &mut far_ends);
    // Forced, it takes no time.
    let forced = daemon
        .ctl(&["unbind", "vfio0", "--force"])
        .expect("vfioctl ends");
    assert_eq!(forced.code, 0, "{forced:?}");
    guest.check("echo alive", SHORT).expect("the guest goes on");
    drop(guest);
    daemon.stop().expect("nothing is left");
}
