//! The built program against a sysfs tree of ordinary files and real symlinks, without a daemon.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

const UUID: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";

/// A machine with a card of two functions in one group (one bound to vfio-pci, one to a driver
/// that keeps the group), another on an old kernel without char devices, and an mdev.
struct Machine(TempDir);

impl Machine {
    fn new() -> Machine {
        let machine = Machine(tempfile::tempdir().unwrap());
        for driver in ["vfio-pci", "snd_hda_intel", "vfio_mdev"] {
            let bus = if driver == "vfio_mdev" { "mdev" } else { "pci" };
            let dir = machine.sys().join(format!("bus/{bus}/drivers/{driver}"));
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("unbind"), "").unwrap();
        }
        fs::write(machine.sys().join("bus/pci/drivers_probe"), "").unwrap();
        let root = "devices/pci0000:00";
        machine.device(root, "0000:00:01.0", "pci", Some("vfio-pci"), Some(7));
        machine.device(root, "0000:00:01.1", "pci", Some("snd_hda_intel"), Some(7));
        machine.device(root, "0000:00:02.0", "pci", Some("vfio-pci"), Some(8));
        machine.device(root, "0000:00:03.0", "pci", None, None);
        machine.vfio(&format!("{root}/0000:00:01.0"), "vfio10", Some("511:10"));
        // Linux 6.1: the directory without `dev`, and no node of its own.
        machine.vfio(&format!("{root}/0000:00:02.0"), "vfio2", None);
        let mtty = "devices/virtual/mtty/mtty";
        machine.device(mtty, UUID, "mdev", Some("vfio_mdev"), Some(9));
        machine.vfio(&format!("{mtty}/{UUID}"), "vfio0", Some("511:0"));
        let kind = machine.sys().join(mtty).join("mdev_supported_types/mtty-1");
        fs::create_dir_all(kind.join("devices")).unwrap();
        for (file, text) in [
            ("name", "Single port serial\n"),
            ("device_api", "vfio-pci\n"),
            ("available_instances", "23\n"),
            ("create", ""),
        ] {
            fs::write(kind.join(file), text).unwrap();
        }
        fs::write(machine.sys().join(mtty).join(UUID).join("remove"), "").unwrap();
        symlink(&kind, machine.sys().join(mtty).join(UUID).join("mdev_type")).unwrap();
        fs::create_dir_all(machine.sys().join("class/mdev_bus")).unwrap();
        symlink(
            "../../devices/virtual/mtty/mtty",
            machine.sys().join("class/mdev_bus/mtty"),
        )
        .unwrap();
        machine
    }

    fn sys(&self) -> PathBuf {
        self.0.path().join("sys")
    }

    fn dev(&self) -> PathBuf {
        self.0.path().join("dev")
    }

    fn device(&self, at: &str, name: &str, bus: &str, driver: Option<&str>, group: Option<u32>) {
        let dir = self.sys().join(at).join(name);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("driver_override"), "(null)\n").unwrap();
        let devices = self.sys().join(format!("bus/{bus}/devices"));
        fs::create_dir_all(&devices).unwrap();
        symlink(format!("../../../{at}/{name}"), devices.join(name)).unwrap();
        if let Some(driver) = driver {
            let target = self.sys().join(format!("bus/{bus}/drivers/{driver}"));
            symlink(target, dir.join("driver")).unwrap();
        }
        if let Some(group) = group {
            let group = self.sys().join(format!("kernel/iommu_groups/{group}"));
            fs::create_dir_all(group.join("devices")).unwrap();
            symlink(&dir, group.join("devices").join(name)).unwrap();
            symlink(&group, dir.join("iommu_group")).unwrap();
        }
    }

    fn vfio(&self, at: &str, name: &str, number: Option<&str>) {
        let dir = self.sys().join(at).join("vfio-dev").join(name);
        fs::create_dir_all(&dir).unwrap();
        if let Some(number) = number {
            fs::write(dir.join("dev"), format!("{number}\n")).unwrap();
            let nodes = self.dev().join("vfio/devices");
            fs::create_dir_all(&nodes).unwrap();
            fs::write(nodes.join(name), "").unwrap();
        }
        let class = self.sys().join("class/vfio-dev");
        fs::create_dir_all(&class).unwrap();
        symlink(format!("../../{at}/vfio-dev/{name}"), class.join(name)).unwrap();
    }

    fn run(&self, args: &[&str]) -> Output {
        vfioctl()
            .args(["--sys".as_ref(), self.sys().as_os_str()])
            .args(["--dev".as_ref(), self.dev().as_os_str()])
            .args(args)
            .output()
            .unwrap()
    }

    fn json(&self, args: &[&str]) -> serde_json::Value {
        let mut args = args.to_vec();
        args.push("--json");
        let output = self.run(&args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(value["schema"], 1);
        assert_eq!(value["source"], "sysfs");
        value
    }

    fn text(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        assert!(!output.stdout.contains(&0x1b), "no colour into a pipe");
        String::from_utf8(output.stdout).unwrap()
    }
}

fn vfioctl() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vfioctl"));
    command.env_remove("VFIOD_SOCKET").env_remove("VFIOD_ROOT");
    command
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

#[test]
fn list_has_every_vfio_device_in_order() {
    let machine = Machine::new();
    let list = machine.json(&["list"]);
    let names: Vec<_> = list["devices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|device| device["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["vfio0", "vfio2", "vfio10"]);
    let text = machine.text(&["list"]);
    assert!(text.starts_with("NAME"), "{text}");
    assert_eq!(text.lines().count(), 4, "{text}");
    assert!(!text.contains("0000:00:03.0"), "not VFIO's: {text}");
}

#[test]
fn a_device_without_a_char_device_is_told_from_one_with() {
    let machine = Machine::new();
    let old = &machine.json(&["show", "vfio2"])["show"]["device"];
    assert_eq!(old["cdev"], serde_json::Value::Null);
    assert_eq!(old["state"], "registered");
    let new = &machine.json(&["show", "vfio10"])["show"]["device"];
    assert_eq!(new["cdev"], "511:10");
    assert_eq!(
        new["node"],
        machine.dev().join("vfio/devices/vfio10").to_str().unwrap()
    );
}

#[test]
fn show_names_what_keeps_the_group() {
    let machine = Machine::new();
    let text = machine.text(&["show", "pci/00:01.0"]);
    let line = text.lines().find(|line| line.contains("01.1")).unwrap();
    assert!(line.contains("snd_hda_intel"), "{text}");
    assert!(line.contains("keeps the group from being used"), "{text}");
    let tree = machine.text(&["tree"]);
    assert!(tree.contains("0000:00:01.1 bound elsewhere"), "{tree}");
}

#[test]
fn all_names_of_a_device_lead_to_it() {
    let machine = Machine::new();
    let sys = machine.sys();
    let directory = sys.join("devices/virtual/mtty/mtty").join(UUID);
    let node = machine.dev().join("vfio/devices/vfio0");
    for name in [
        "vfio0",
        UUID,
        &format!("mdev/{UUID}"),
        directory.to_str().unwrap(),
        node.to_str().unwrap(),
        "/dev/vfio/devices/vfio0",
        &format!("/sys/bus/mdev/devices/{UUID}"),
        "/dev/vfio/9",
        "/sys/dev/char/511:0",
    ] {
        let show = machine.json(&["show", name]);
        assert_eq!(show["show"]["device"]["address"], UUID, "{name}");
        assert_eq!(show["show"]["device"]["mdev_type"], "mtty-1", "{name}");
    }
}

#[test]
fn tree_and_types() {
    let machine = Machine::new();
    let tree = machine.text(&["tree"]);
    let below: Vec<&str> = tree
        .lines()
        .skip_while(|line| !line.contains("mtty"))
        .collect();
    assert!(below.first().unwrap().contains("mtty-1 23 left"), "{tree}");
    assert!(below.get(1).unwrap().contains(UUID), "{tree}");
    assert!(below.get(2).unwrap().contains("vfio0"), "{tree}");
    let types = machine.json(&["types", "mtty"]);
    assert_eq!(types["parents"][0]["types"][0]["id"], "mtty-1");
    assert_eq!(types["parents"][0]["types"][0]["available"], 23);
    assert_eq!(code(&machine.run(&["types", "nobody"])), 3);
}

#[test]
fn who_finds_descriptors_and_mappings() {
    let machine = Machine::new();
    let node = machine.dev().join("vfio/devices/vfio0");
    let mut child = Command::new("sleep")
        .arg("1000")
        .stdin(fs::File::open(&node).unwrap())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let who = machine.json(&["who", "vfio0"]);
    let other = machine.json(&["who", "vfio10"]);
    let list = machine.text(&["list"]);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(who["holders"][0]["pid"], child.id());
    assert_eq!(who["holders"][0]["command"], "sleep");
    assert_eq!(who["holders"][0]["fds"], serde_json::json!([0]));
    assert_eq!(other["holders"], serde_json::json!([]));
    assert!(list.contains(&format!("sleep({})", child.id())), "{list}");
    let text = machine.text(&["who", "vfio0"]);
    assert_eq!(text, "vfio0: nobody has it open\n");
}

#[test]
fn writes_are_those_of_the_kernels_contract() {
    let machine = Machine::new();
    let read = |path: &Path| fs::read_to_string(path).unwrap();
    let mtty = machine.sys().join("devices/virtual/mtty/mtty");
    let started = machine.text(&["start", "mtty-1", "--uuid", UUID]);
    assert_eq!(started, format!("{UUID}\n"));
    assert_eq!(read(&mtty.join("mdev_supported_types/mtty-1/create")), UUID);
    machine.text(&["stop", UUID]);
    assert_eq!(read(&mtty.join(UUID).join("remove")), "1");
    machine.text(&["unbind", "vfio10"]);
    let unbind = machine.sys().join("bus/pci/drivers/vfio-pci/unbind");
    assert_eq!(read(&unbind), "0000:00:01.0");
    // Nothing binds in a tree of plain files, and drivers_probe never says so: the look after it does.
    let bind = machine.run(&["bind", "0000:00:03.0"]);
    assert_eq!(code(&bind), 1, "{bind:?}");
    assert_eq!(
        read(&machine.sys().join("bus/pci/drivers_probe")),
        "0000:00:03.0"
    );
    let device = machine.sys().join("devices/pci0000:00/0000:00:03.0");
    assert!(read(&device.join("driver_override")).starts_with("vfio-pci"));
}

#[test]
fn a_write_that_never_returns_ends_with_5() {
    let machine = Machine::new();
    let remove = machine
        .sys()
        .join("devices/virtual/mtty/mtty")
        .join(UUID)
        .join("remove");
    fs::remove_file(&remove).unwrap();
    // Opening a pipe for writing waits for a reader, as the store of `remove` waits for users.
    let made = Command::new("mkfifo").arg(&remove).status().unwrap();
    assert!(made.success());
    let output = machine.run(&["stop", UUID, "--timeout", "0.2"]);
    assert_eq!(code(&output), 5, "{output:?}");
    // Lets the writer that is still waiting go.
    let text = fs::read_to_string(&remove).unwrap();
    assert_eq!(text, "1");
}

#[test]
fn exit_codes() {
    let machine = Machine::new();
    let table: [(&[&str], i32); 8] = [
        (&["list"], 0),
        (&["unbind", "vfio0", "--force"], 1),
        (&["frobnicate"], 2),
        (&["show"], 2),
        (&["show", "vfio99"], 3),
        (&["start", "mtty-9"], 3),
        (&["wait", "vfio0", "--gone", "--timeout", "0.1"], 5),
        (&["wait", "vfio99", "--gone"], 0),
    ];
    for (args, expected) in table {
        let output = machine.run(args);
        assert_eq!(code(&output), expected, "{args:?}: {output:?}");
    }
    let exhausted = machine
        .sys()
        .join("devices/virtual/mtty/mtty/mdev_supported_types/mtty-1/available_instances");
    fs::write(exhausted, "0\n").unwrap();
    assert_eq!(code(&machine.run(&["start", "mtty-1"])), 4);
}

#[test]
fn a_daemon_that_was_named_and_is_not_there_is_6() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vfiod.sock");
    for command in [&["list"][..], &["events"], &["status"], &["run", "true"]] {
        let output = vfioctl()
            .arg("--socket")
            .arg(&socket)
            .args(command)
            .output()
            .unwrap();
        // What `run` itself cannot do is 125, so that it is not taken for the command's status.
        let expected = if command.first() == Some(&"run") {
            125
        } else {
            6
        };
        assert_eq!(code(&output), expected, "{output:?}");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.contains(socket.to_str().unwrap()), "{text}");
        assert!(text.contains("vfiod serve --root"), "{text}");
    }
}

#[test]
fn a_tree_that_is_not_there_is_no_empty_one() {
    let output = vfioctl()
        .args(["--sys", "/nonexistent/sys", "list"])
        .output()
        .unwrap();
    assert_eq!(code(&output), 2);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("--sys /nonexistent/sys: no such"), "{said}");
}

#[test]
fn an_empty_tree_says_so() {
    let dir = tempfile::tempdir().unwrap();
    for command in ["list", "tree"] {
        let output = vfioctl()
            .arg("--sys")
            .arg(dir.path())
            .arg(command)
            .output()
            .unwrap();
        assert_eq!(code(&output), 0);
        assert!(output.stdout.is_empty());
        assert_eq!(output.stderr, b"no VFIO devices\n");
    }
}
