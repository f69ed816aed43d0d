//! The sysfs tree through the kernel: everything in it can be walked, read and followed.

mod common;

use common::{Driver, Seen, until};
use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use vfio_core::device::{GroupType, Opener, Policy};
use vfio_core::model::faux;
use vfio_core::{Config, Core};
use vfio_fuse::{Options, Sys};

struct Tree {
    core: Core,
    sys: Option<Sys>,
    dir: PathBuf,
}

impl Tree {
    fn new(test: &str) -> Option<Tree> {
        let dir = std::env::temp_dir().join(format!("vfio-sysfs-{}-{test}", std::process::id()));
        let core = Core::new(Config {
            request_interval: Duration::from_millis(10),
            ..Config::default()
        });
        match Sys::start(&core, &Options::under(&dir)) {
            Ok(sys) => Some(Tree {
                core,
                sys: Some(sys),
                dir,
            }),
            Err(errno) => {
                assert!(std::env::var_os("CI").is_none(), "no FUSE in CI: {errno}");
                vfiod_tests::skip(&format!("{test}: FUSE cannot be mounted here: {errno}"));
                None
            }
        }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.join("sys").join(path)
    }

    fn device(&self, name: &str) -> faux::Device {
        let driver = Driver {
            seen: Arc::new(Seen::default()),
            kind: GroupType::Emulated,
        };
        faux::Device::create(&self.core, name, driver).unwrap()
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        drop(self.sys.take());
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn walk(dir: &Path, seen: &mut BTreeSet<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let meta = fs::symlink_metadata(&path).unwrap();
        assert!(seen.insert(path.clone()), "{} twice", path.display());
        if meta.is_dir() {
            walk(&path, seen);
        } else if meta.is_symlink() {
            let target = fs::read_link(&path).unwrap();
            assert!(
                target.is_relative(),
                "{} -> {}",
                path.display(),
                target.display()
            );
            assert!(
                fs::metadata(&path).is_ok(),
                "{} -> {}",
                path.display(),
                target.display()
            );
        } else if meta.mode() & 0o444 != 0 {
            let text =
                fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            assert!(
                text.is_empty() || text.ends_with(b"\n"),
                "{}",
                path.display()
            );
        } else {
            assert_eq!(
                fs::read(&path).unwrap_err().kind(),
                ErrorKind::PermissionDenied
            );
        }
    }
}

#[test]
fn the_whole_tree_can_be_walked() {
    let Some(tree) = Tree::new("the_whole_tree_can_be_walked") else {
        return;
    };
    let _one = tree.device("one");
    let mut seen = BTreeSet::new();
    walk(&tree.at(""), &mut seen);
    for path in [
        "devices/faux/one/vfio-dev/vfio0/dev",
        "devices/faux/one/vfio-dev/vfio0/subsystem",
        "devices/faux/one/iommu_group",
        "class/vfio-dev/vfio0",
        "bus/faux/devices/one",
        "dev/char/511:0",
        "kernel/iommu_groups/0/devices/one",
    ] {
        assert!(seen.contains(&tree.at(path)), "{path} is missing");
    }
    assert_eq!(
        fs::read_to_string(tree.at("class/vfio-dev/vfio0/dev")).unwrap(),
        "511:0\n"
    );
    let real = fs::canonicalize(tree.at("dev/char/511:0")).unwrap();
    assert_eq!(real, tree.at("devices/faux/one/vfio-dev/vfio0"));
}

#[test]
fn gone_the_moment_unregister_starts() {
    let Some(tree) = Tree::new("gone_the_moment_unregister_starts") else {
        return;
    };
    let one = tree.device("one");
    let device = tree.core.device(0).unwrap();
    let opener = Opener {
        pid: 1,
        comm: "test".into(),
        since: std::time::SystemTime::now(),
        node: None,
    };
    let file = device.open_cdev(opener).unwrap();
    drop(device);
    let dev = tree.at("devices/faux/one/vfio-dev/vfio0/dev");
    assert!(dev.exists());
    let waiting = one.destroy(Policy::Wait);
    assert!(waiting.result().is_none());
    assert!(!dev.exists());
    assert!(!tree.at("class/vfio-dev/vfio0").exists());
    assert!(!tree.at("dev/char/511:0").exists());
    drop(file);
    waiting.wait_for(Duration::from_secs(10)).unwrap().unwrap();
    assert!(!tree.at("kernel/iommu_groups/0").exists());
}

#[test]
fn nothing_is_made_or_removed_by_hand() {
    let Some(tree) = Tree::new("nothing_is_made_or_removed_by_hand") else {
        return;
    };
    let _one = tree.device("one");
    let denied = |result: std::io::Result<()>| {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::PermissionDenied);
    };
    denied(fs::write(tree.at("class/new"), "x"));
    denied(fs::create_dir(tree.at("class/new")));
    denied(fs::remove_file(tree.at("devices/faux/one/uevent")));
    denied(fs::remove_dir(tree.at("class/vfio-dev")));
    let mode = fs::Permissions::from_mode(0o777);
    denied(fs::set_permissions(
        tree.at("devices/faux/one/uevent"),
        mode,
    ));
    denied(fs::write(tree.at("class/vfio-dev/vfio0/dev"), "1"));
}

#[test]
fn a_waiting_write_can_be_interrupted_and_goes_on() {
    let Some(tree) = Tree::new("a_waiting_write_can_be_interrupted_and_goes_on") else {
        return;
    };
    let _one = tree.device("one");
    let device = tree.core.device(0).unwrap();
    let opener = Opener {
        pid: 1,
        comm: "test".into(),
        since: std::time::SystemTime::now(),
        node: None,
    };
    let file = device.open_cdev(opener).unwrap();
    drop(device);
    let unbind = tree.at("bus/faux/drivers/faux_driver/unbind");
    let mut writer = std::process::Command::new("sh")
        .arg("-c")
        .arg(format!("printf one > {}", unbind.display()))
        .spawn()
        .unwrap();
    until("unregister", || tree.core.device(0).is_none());
    assert!(writer.try_wait().unwrap().is_none(), "it waits");
    let pid = rustix::process::Pid::from_child(&writer);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let status = writer.wait().unwrap();
    assert!(!status.success());
    assert!(tree.core.device(0).is_none(), "what it began goes on");
    drop(file);
    until("the driver to be unbound", || {
        !tree.at("devices/faux/one/driver").exists()
    });
}

#[test]
fn merged_with_the_machines_own() {
    let Some(tree) = Tree::new("merged_with_the_machines_own") else {
        return;
    };
    let _one = tree.device("one");
    let merged = Sys::merged(
        &tree.core,
        &tree.dir.join("merged"),
        Path::new("/sys"),
        (0, 0),
    )
    .unwrap();
    let names = |path: &str| -> BTreeSet<String> {
        fs::read_dir(merged.path().join(path))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    };
    let real: BTreeSet<String> = fs::read_dir("/sys/class")
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let both = names("class");
    assert!(both.is_superset(&real));
    assert!(both.contains("vfio-dev"));
    assert!(merged.path().join("devices/faux/one").is_dir());
    assert_eq!(
        fs::read_dir(merged.path().join("class/mem"))
            .unwrap()
            .count(),
        0,
        "a placeholder"
    );
}
