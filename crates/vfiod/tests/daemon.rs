//! The built daemon and the built `vfioctl`: life cycle, holders, events, hostile clients, shutdown.

mod common;

use common::{Daemon, Killed, PATIENCE, holder, lines, until, vfioctl};
use rustix::process::Signal;
use serde_json::json;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

#[test]
fn a_device_comes_and_goes() {
    let daemon = Daemon::start();
    let uuid = daemon.card();
    let list = daemon.json(&["list"]);
    assert_eq!(list["source"], "vfiod");
    assert_eq!(list["devices"][0]["name"], "vfio0");
    assert_eq!(list["devices"][0]["address"], uuid);
    assert_eq!(list["devices"][0]["state"], "registered");
    let types = daemon.json(&["types", "mtty"]);
    assert_eq!(types["parents"][0]["types"][0]["available"], 23);
    assert_eq!(types["parents"][0]["types"][0]["devices"], json!([uuid]));
    assert!(daemon.text(&["tree"]).contains(&uuid));
    // The same by the tree that the daemon mounts.
    let plain = Command::new(vfioctl())
        .args(["list", "--json", "--sys"])
        .arg(daemon.path("sys"))
        .arg("--dev")
        .arg(daemon.path("dev"))
        .output()
        .unwrap();
    let plain: serde_json::Value = serde_json::from_slice(&plain.stdout).unwrap();
    assert_eq!(plain["source"], "sysfs");
    for key in [
        "name",
        "address",
        "bus",
        "path",
        "driver",
        "mdev_type",
        "iommu_group",
        "cdev",
        "node",
    ] {
        assert_eq!(plain["devices"][0][key], list["devices"][0][key], "{key}");
    }
    daemon.text(&["stop", &uuid]);
    assert_eq!(daemon.code(&["show", "vfio0"]), 3);
    assert_eq!(daemon.code(&["wait", "vfio0", "--gone"]), 0);
}

#[test]
fn errors_have_their_codes() {
    let daemon = Daemon::start();
    let uuid = daemon.card();
    let start = ["start", "mtty-1"];
    let table: [(&[&str], i32, &str); 9] = [
        (&[&start[..], &["--uuid", &uuid]].concat(), 4, "in use"),
        (&[&start[..], &["--uuid", "x"]].concat(), 2, "is no UUID"),
        (&["start", "mtty-9"], 3, "no parent has this type"),
        (
            &[&start[..], &["--parent", "mdpy"]].concat(),
            3,
            "mdpy has no such type",
        ),
        (
            &[&start[..], &["--parent", "none"]].concat(),
            3,
            "there is no parent none",
        ),
        (&["types", "nobody"], 3, "`vfioctl types`"),
        (&["who", "vfio7"], 3, "`vfioctl list`"),
        (
            &["wait", &uuid, "--gone", "--timeout", "0.1"],
            5,
            "`vfioctl unbind vfio0`",
        ),
        (&["bind", "mdev/none"], 3, "`vfioctl list`"),
    ];
    for (args, code, text) in table {
        let output = daemon.run(args);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains(text), "{args:?}: {said}");
    }
    while daemon.code(&["start", "mtty-1"]) == 0 {}
    let list = daemon.json(&["list"]);
    assert_eq!(list["devices"].as_array().unwrap().len(), 24);
    let output = daemon.run(&["start", "mtty-1"]);
    assert_eq!(output.status.code(), Some(4));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no more"));
}

#[test]
fn unbind_and_bind() {
    let daemon = Daemon::start();
    let uuid = daemon.card();
    daemon.text(&["unbind", "vfio0"]);
    let list = daemon.json(&["list"]);
    assert_eq!(list["devices"][0]["state"], "unbound");
    assert_eq!(list["devices"][0]["driver"], json!(null));
    daemon.text(&["unbind", &uuid]);
    daemon.text(&["bind", &uuid]);
    assert_eq!(daemon.json(&["list"])["devices"][0]["name"], "vfio0");
    daemon.text(&["bind", &uuid]);
    assert_eq!(daemon.code(&["bind", &uuid, "--driver", "mdpy"]), 4);
}

#[test]
fn a_group_is_held() {
    let daemon = Daemon::start();
    let uuid = daemon.card();
    let show = daemon.json(&["show", "vfio0"])["show"].clone();
    let number = show["group"]["id"].as_u64().unwrap();
    let node = daemon.path(&format!("dev/vfio/{number}"));
    assert_eq!(show["group"]["open"], false);
    assert_eq!(show["group"]["node"], node.to_str().unwrap());
    let dev = daemon.path(&format!("sys/class/vfio/{number}/dev"));
    let text = std::fs::read_to_string(dev).unwrap();
    assert_eq!(show["group"]["cdev"], text.trim_end());
    let held = holder(&node);
    let who = daemon.json(&["who", "vfio0"]);
    assert_eq!(who["holders"][0]["pid"], held.0.id());
    assert_eq!(who["holders"][0]["via"], "group");
    for (args, says) in [
        (&["who", &uuid][..], "group fd 0".to_owned()),
        (&["list"], format!("sleep({}) by its group", held.0.id())),
        (&["tree"], format!("group {number}")),
        (&["show", "vfio0"], format!("{}, open", node.display())),
    ] {
        let text = daemon.text(args);
        assert!(text.contains(&says), "{args:?}: {text}");
    }
    // Nobody waits for it.
    daemon.text(&["unbind", "vfio0", "--timeout", "60"]);
    drop(held);
    daemon.text(&["bind", &uuid]);
    assert_eq!(
        daemon.json(&["show", "vfio0"])["show"]["group"]["open"],
        false
    );
}

#[test]
fn a_program_without_a_supervisor_is_told_once() {
    let mut daemon = Daemon::start();
    let uuid = daemon.card();
    let show = daemon.json(&["show", "vfio0"])["show"].clone();
    let group = daemon.path(&format!("dev/vfio/{}", show["group"]["id"]));
    // GET_DEVICE_FD, twice.
    let script = "open(my $g, '+<', $ARGV[0]) or die; my $name = \"$ARGV[1]\\0\"; \
                  for (1, 2) { defined(ioctl($g, 0x3b6a, $name)) or print $!+0, ' '; }";
    let ask = || {
        let mut command = Command::new("perl");
        let command = command.args(["-e", script]).arg(&group).arg(&uuid);
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    };
    assert_eq!(ask(), "95 95 ", "EOPNOTSUPP");
    let line = daemon.expect_log("VFIO_GROUP_GET_DEVICE_FD");
    assert!(
        line.contains("run it with: vfioctl run -- perl -e"),
        "{line}"
    );
    // The next line of that kind is another process's.
    assert_eq!(ask(), "95 95 ");
    let next = daemon.expect_log("VFIO_GROUP_GET_DEVICE_FD");
    let pid = |line: &str| {
        line.split("(pid ")
            .nth(1)
            .map(|rest| rest.split(')').next().unwrap().to_owned())
    };
    assert_ne!(pid(&line).unwrap(), pid(&next).unwrap());
}

#[test]
fn modes_of_nodes() {
    use std::os::unix::fs::MetadataExt;
    let daemon = Daemon::with_config("[nodes]\nmode = \"660\"\ncontainer-mode = \"600\"\n");
    daemon.card();
    let show = daemon.json(&["show", "vfio0"])["show"].clone();
    let mode = |path: &str| {
        let path = daemon.path(&format!("dev/{path}"));
        std::fs::metadata(path).unwrap().mode() & 0o777
    };
    assert_eq!(mode("vfio/devices/vfio0"), 0o660);
    assert_eq!(mode(&format!("vfio/{}", show["group"]["id"])), 0o660);
    assert_eq!(mode("vfio/vfio"), 0o600);
    assert_eq!(mode("iommu"), 0o660);
}

#[test]
fn who_names_the_holder_and_not_the_opener() {
    let daemon = Daemon::start();
    daemon.card();
    assert_eq!(daemon.json(&["who", "vfio0"])["holders"], json!([]));
    let direct = holder(&daemon.node("vfio0"));
    let who = daemon.json(&["who", "vfio0"]);
    assert_eq!(who["holders"][0]["pid"], direct.0.id());
    assert_eq!(who["holders"][0]["command"], "sleep");
    assert_eq!(who["holders"][0]["fds"], json!([0]));
    drop(direct);
    // A shell opens it, leaves it to a child, and ends.
    let script = format!(
        "exec 3<{}; sleep 1000 <&3 3<&- >/dev/null 2>&1 & echo $!",
        daemon.node("vfio0").display()
    );
    let shell = Command::new("sh").args(["-c", &script]).output().unwrap();
    let shell = String::from_utf8(shell.stdout).unwrap();
    let child: u32 = shell.trim().parse().unwrap();
    let who = daemon.json(&["who", "vfio0"]);
    let holders = who["holders"].as_array().unwrap();
    assert_eq!(holders.len(), 1, "{who}");
    assert_eq!(holders[0]["pid"], child);
    assert_eq!(holders[0]["since_open"], false, "it did not open it");
    let list = daemon.text(&["list"]);
    assert!(list.contains(&format!("sleep({child})")), "{list}");
    // While its unregister waits, it is still known.
    let output = daemon.run(&["wait", "vfio0", "--gone", "--timeout", "0"]);
    assert_eq!(output.status.code(), Some(5));
    let (mut stop, said) = daemon.begin(&["stop", "vfio0"]);
    let line = said.recv_timeout(PATIENCE).unwrap();
    assert!(line.contains("waiting for 1 open file"), "{line}");
    let who = daemon.json(&["who", "vfio0"]);
    assert_eq!(who["holders"][0]["pid"], child, "{who}");
    let pid = rustix::process::Pid::from_raw(i32::try_from(child).unwrap()).unwrap();
    rustix::process::kill_process(pid, Signal::KILL).unwrap();
    let status = until("stop ends", || stop.0.try_wait().unwrap());
    assert!(status.success());
    assert_eq!(
        daemon.code(&["wait", "vfio0", "--gone", "--timeout", "10"]),
        0
    );
}

#[test]
fn an_unregister_goes_on_when_its_client_is_killed() {
    let daemon = Daemon::start();
    let uuid = daemon.card();
    let held = holder(&daemon.node("vfio0"));
    {
        let (_stop, said) = daemon.begin(&["stop", "vfio0"]);
        said.recv_timeout(PATIENCE).unwrap();
    }
    let list = daemon.json(&["list"]);
    assert_eq!(list["devices"][0]["state"], "unregistering");
    assert!(list["devices"][0]["pending"]["requests"].as_u64().unwrap() >= 1);
    assert!(!daemon.node("vfio0").exists(), "its node is gone");
    let show = daemon.text(&["show", "vfio0"]);
    assert!(show.contains("waiting for 1 open file of sleep"), "{show}");
    let output = daemon.run(&["start", "mtty-1", "--uuid", &uuid]);
    assert_eq!(output.status.code(), Some(4));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("waiting for 1 user"), "{said}");
    assert_eq!(daemon.json(&["status"])["status"]["pending"], 1);
    drop(held);
    assert_eq!(
        daemon.code(&["wait", "vfio0", "--gone", "--timeout", "10"]),
        0
    );
    daemon.text(&["start", "mtty-1", "--uuid", &uuid]);
}

#[test]
fn users_are_cut_off_at_once_or_after_a_time() {
    let mut daemon = Daemon::start();
    for policy in [&["--force"][..], &["--timeout", "0.3"]] {
        daemon.card();
        let _held = holder(&daemon.node("vfio0"));
        let begun = Instant::now();
        let mut args = vec!["stop", "vfio0", "--json"];
        args.extend(policy);
        let output = daemon.run(&args);
        assert!(output.status.success(), "{output:?}");
        let ended: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(ended["ended"]["users_cut_off"], true);
        let least = if policy.len() == 2 { 300 } else { 0 };
        assert!(begun.elapsed() >= Duration::from_millis(least));
        assert_eq!(daemon.json(&["list"])["devices"], json!([]));
    }
    let line = daemon.expect_log("did not leave in time");
    // The holder's file was opened for it, here.
    let opener = format!("(pid {})", std::process::id());
    assert!(line.contains(&opener), "{line}");
}

#[test]
fn events_tell_a_life_in_order() {
    let daemon = Daemon::start();
    let mut events = Killed(
        daemon
            .command(&["events", "--json"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let stream = lines(events.0.stdout.take().unwrap());
    // Subscribed or not yet: devices come and go until the first event is seen.
    let first = until("an event", || {
        let uuid = daemon.card();
        daemon.text(&["stop", &uuid]);
        stream.recv_timeout(Duration::from_millis(200)).ok()
    });
    assert_eq!(
        serde_json::from_str::<serde_json::Value>(&first).unwrap()["schema"],
        1
    );
    while stream.recv_timeout(Duration::from_millis(300)).is_ok() {}
    let uuid = daemon.card();
    drop(holder(&daemon.node("vfio0")));
    until("it is closed", || {
        (daemon.json(&["list"])["devices"][0]["users"] == 0).then_some(())
    });
    daemon.text(&["stop", &uuid]);
    let mut whats = Vec::new();
    while whats.last().is_none_or(|last| last != "released") {
        let line = stream.recv_timeout(PATIENCE).unwrap();
        let event: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(event["event"]["address"], uuid);
        whats.push(event["event"]["what"].as_str().unwrap().to_owned());
    }
    assert_eq!(
        whats,
        [
            "allocated",
            "registered",
            "opened",
            "closed",
            "unregistering",
            "unregistered",
            "released"
        ]
    );
}

#[test]
fn hostile_clients_harm_nobody() {
    let daemon = Daemon::start();
    let socket = daemon.path("vfiod.sock");
    let connect = || {
        let stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    };
    let reply = |stream: &UnixStream| {
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        serde_json::from_str::<serde_json::Value>(&line).unwrap()
    };
    for line in [
        "\n",
        "{}\n",
        "\0\0\n",
        "[[[[[[[[\n",
        "{\"v\":1}\n",
        "{\"v\":2,\"call\":\"list\"}\n",
        "{\"v\":1,\"call\":\"reboot\"}\n",
        "{\"v\":1,\"call\":{\"who\":{\"device\":7}}}\n",
    ] {
        let mut stream = connect();
        stream.write_all(line.as_bytes()).unwrap();
        assert_eq!(
            reply(&stream)["answer"]["error"]["kind"],
            "protocol",
            "{line:?}"
        );
        // The connection is still good.
        stream.write_all(b"{\"v\":1,\"call\":\"list\"}\n").unwrap();
        assert_eq!(reply(&stream)["answer"]["devices"], json!([]), "{line:?}");
    }
    // A line without end is refused before it is read to its end, and its connection closed.
    let mut long = connect();
    let _ = long.write_all(&vec![b'x'; 1 << 20]);
    let mut answer = Vec::new();
    let _ = long.read_to_end(&mut answer);
    // Clients that say nothing, or do not read what they asked for.
    let silent: Vec<UnixStream> = (0..50).map(|_| connect()).collect();
    let mut deaf = connect();
    deaf.set_nonblocking(true).unwrap();
    while deaf.write_all(b"{\"v\":1,\"call\":\"tree\"}\n").is_ok() {}
    assert_eq!(daemon.code(&["list"]), 0);
    // No more than a bounded number; the one beyond is told so.
    let mut crowd = Vec::new();
    let told = loop {
        let mut stream = connect();
        let _ = stream.write_all(b"{\"v\":1,\"call\":\"status\"}\n");
        let answer = reply(&stream);
        if answer["answer"]["error"]["kind"] == "busy" {
            break crowd.len();
        }
        crowd.push(stream);
        assert!(crowd.len() < 1000, "there is no bound");
    };
    assert!(told > 100);
    drop((crowd, silent, deaf));
    until("room again", || (daemon.code(&["list"]) == 0).then_some(()));
}

#[test]
fn the_socket_is_for_root_and_its_group() {
    let daemon = Daemon::start();
    let mode = fs::metadata(daemon.path("vfiod.sock"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o660);
    // Where another user can get at it.
    let program = daemon.path("vfioctl");
    vfiod_tests::programs::copy(vfioctl(), &program);
    let output = Command::new(&program)
        .arg("--root")
        .arg(daemon.root())
        .arg("list")
        .uid(65534)
        .gid(65534)
        .current_dir("/")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(6), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        said.contains("ermission denied") && said.contains("group"),
        "{said}"
    );
}

#[test]
fn one_daemon_for_one_root() {
    let daemon = Daemon::start();
    let other = Command::new(env!("CARGO_BIN_EXE_vfiod"))
        .arg("serve")
        .arg("--root")
        .arg(daemon.root())
        .output()
        .unwrap();
    assert_eq!(other.status.code(), Some(1));
    let said = String::from_utf8_lossy(&other.stderr).into_owned();
    assert!(said.contains("another vfiod serves"), "{said}");
    assert_eq!(daemon.code(&["status"]), 0);
}

#[test]
fn what_a_killed_daemon_left_is_no_obstacle() {
    let daemon = Daemon::start();
    daemon.card();
    let root = daemon.into_root();
    let gone = fs::metadata(root.path().join("sys")).unwrap_err();
    assert_eq!(
        gone.raw_os_error(),
        Some(rustix::io::Errno::NOTCONN.raw_os_error())
    );
    let daemon = Daemon::on(root, &[]);
    daemon.card();
    assert_eq!(daemon.json(&["list"])["devices"][0]["name"], "vfio0");
}

#[test]
fn stopping_says_for_whom_it_waits_and_then_does_not() {
    let mut daemon = Daemon::with_config("stop-timeout = 0.5\n");
    daemon.card();
    let held = holder(&daemon.node("vfio0"));
    let begun = Instant::now();
    daemon.signal(Signal::TERM);
    let line = daemon.expect_log("waiting for");
    assert!(line.contains("1 user of vfio0"), "{line}");
    assert!(daemon.wait().success());
    assert!(begun.elapsed() >= Duration::from_millis(500));
    daemon.expect_log("released");
    daemon.expect_log("stopped");
    assert!(!daemon.path("vfiod.sock").exists());
    drop(held);
}

#[test]
fn a_second_signal_waits_no_longer() {
    let mut daemon = Daemon::with_config("stop-timeout = 1000\n");
    daemon.card();
    let _held = holder(&daemon.node("vfio0"));
    daemon.signal(Signal::INT);
    daemon.expect_log("waiting for");
    daemon.signal(Signal::INT);
    daemon.expect_log("another signal: cutting off");
    assert!(daemon.wait().success());
}

#[test]
fn the_configuration_makes_devices() {
    let uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
    let daemon = Daemon::with_config(&format!(
        "cdev = false\n[parents.mtty]\n[mdevs.{uuid}]\ntype = \"mtty-2\"\n"
    ));
    let list = daemon.json(&["list"]);
    assert_eq!(list["devices"][0]["address"], uuid);
    assert_eq!(list["devices"][0]["cdev"], json!(null));
    let registered = daemon.path("sys/class/vfio-dev/vfio0");
    assert!(registered.is_dir() && !registered.join("dev").exists());
    let nodes = fs::read_dir(daemon.path("dev/vfio/devices")).unwrap();
    assert_eq!(nodes.count(), 0, "no node is listed");
    assert_eq!(
        daemon.json(&["types"])["parents"].as_array().unwrap().len(),
        1
    );
}

#[test]
fn a_wrong_configuration_is_shown_where_it_is() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("c.toml");
    let uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
    let mdev = |text: &str| format!("[mdevs.{uuid}]\n{text}\n");
    let check = |config: &str| {
        fs::write(&file, config).unwrap();
        Command::new(env!("CARGO_BIN_EXE_vfiod"))
            .args(["serve", "--check", "--config"])
            .arg(&file)
            .output()
            .unwrap()
    };
    let place = format!("mdevs.{uuid}: ");
    for (config, texts) in [
        (
            "cdev = true\ncdve = true\n".to_owned(),
            ["c.toml", "line 2", "cdve"],
        ),
        (
            "[nodes]\nowner = \"no-such-user\"\n".to_owned(),
            ["nodes.owner", "no-such-user", "/etc/passwd"],
        ),
        (
            "[nodes]\nsocket-group = \"no-such\"\n".to_owned(),
            ["nodes.socket-group", "no-such", "/etc/group"],
        ),
        (
            "[parents.serial]\n".to_owned(),
            ["parents.serial", "mtty", "mdpy"],
        ),
        (
            "[parents.\"a/b\"]\ndriver = \"mtty\"\n".to_owned(),
            ["parents.a/b", "directory", "none"],
        ),
        (
            "[parents.mtty]\ncount = 3\n".to_owned(),
            ["parents.mtty", "count", "for mdpy"],
        ),
        (
            "[parents.mdpy]\nports = \"pty\"\n".to_owned(),
            ["parents.mdpy", "ports", "for mtty"],
        ),
        (
            mdev("type = \"mtty-3\""),
            [&place, "no parent has the type \"mtty-3\"", "mtty-2"],
        ),
        (
            mdev("type = \"mtty-2\"\nparent = \"mdpy\""),
            [&place, "mdpy has no type", "mdpy-vga"],
        ),
        (
            mdev("type = \"mtty-2\"\nparent = \"serial\""),
            [&place, "there is no parent", "serial"],
        ),
        (
            mdev("type = \"mdpy-vga\"\nports = [\"pty\"]"),
            [&place, "ports", "for mtty"],
        ),
    ] {
        let output = check(&config);
        assert_eq!(output.status.code(), Some(1), "{config}");
        let said = String::from_utf8_lossy(&output.stderr);
        for text in texts {
            assert!(said.contains(text), "{config}: {text:?} is not in {said}");
        }
    }
    let output = check(&mdev("type = \"mtty-2\"\nports = [\"pty\"]"));
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn what_is_in_the_way_is_named_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("root");
    let serve = || {
        let output = Command::new(env!("CARGO_BIN_EXE_vfiod"))
            .args(["serve", "--root"])
            .arg(&file)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    fs::write(&file, "mine").unwrap();
    let said = serve();
    assert!(
        said.contains("no directory") && said.contains("--root"),
        "{said}"
    );
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    fs::write(file.join("vfiod.sock"), "mine").unwrap();
    let said = serve();
    assert!(
        said.contains("vfiod.sock") && said.contains("no socket"),
        "{said}"
    );
    assert_eq!(fs::read_to_string(file.join("vfiod.sock")).unwrap(), "mine");
}

#[test]
fn host_uevents_are_the_kernels_own() {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir_all(root.path().join("etc/vfiod")).unwrap();
    fs::write(
        root.path().join("etc/vfiod/vfiod.toml"),
        "uevents = \"host\"\n",
    )
    .unwrap();
    // A network namespace stands for the host: this machine's own udev is left alone.
    let daemon = Daemon::on(root, &["unshare", "--net"]);
    let pid = daemon.child.id().to_string();
    let mut monitor = Killed(
        Command::new("nsenter")
            .args([
                "--target",
                &pid,
                "--net",
                "udevadm",
                "monitor",
                "--kernel",
                "--property",
            ])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let said = lines(monitor.0.stdout.take().unwrap());
    let uuid = until("an add event", || {
        let uuid = daemon.card();
        while let Ok(line) = said.recv_timeout(Duration::from_millis(300)) {
            if line.contains("add") && line.contains("vfio-dev/vfio") {
                return Some(uuid);
            }
        }
        None
    });
    daemon.text(&["stop", &uuid]);
    until("a remove event with a kernel's number", || {
        let mut removed = false;
        while let Ok(line) = said.recv_timeout(Duration::from_millis(300)) {
            removed |= line.contains("remove") && line.contains(&uuid);
            if removed && line.starts_with("SEQNUM=") {
                return Some(());
            }
        }
        None
    });
}
