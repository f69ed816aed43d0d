//! The nodes: names, opens, connections of a device's own, and how they go.

mod common;

use common::{Host, until};
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Duration;
use vfio_core::device::Policy;

fn open(path: &std::path::Path) -> std::io::Result<File> {
    File::options().read(true).write(true).open(path)
}

#[test]
fn names_come_and_go_with_the_device() {
    let Some(host) = Host::new("names_come_and_go_with_the_device", |_| {}) else {
        return;
    };
    let dir = host.dir.join("dev/vfio/devices");
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
    let (device, seen) = host.device("one");
    let names: Vec<_> = std::fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["vfio0"]);
    let meta = std::fs::metadata(host.node(0)).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid()), (0o600, 0));
    assert_eq!(
        std::fs::metadata(host.iommu()).unwrap().mode() & 0o7777,
        0o660
    );
    assert_eq!(device.destroy(Policy::Disassociate).result(), Some(Ok(())));
    assert_eq!(
        std::fs::metadata(host.node(0)).unwrap_err().kind(),
        ErrorKind::NotFound
    );
    assert_eq!(seen.released.load(std::sync::atomic::Ordering::SeqCst), 1);
}

#[test]
fn an_open_moves_to_a_connection_of_its_own_and_back_to_none() {
    let name = "an_open_moves_to_a_connection_of_its_own_and_back_to_none";
    let quick = |options: &mut vfio_fuse::Options| options.idle = Duration::from_millis(100);
    let Some(host) = Host::new(name, quick) else {
        return;
    };
    let (device, _) = host.device("one");
    let dev = host.dev.as_ref().unwrap();
    assert_eq!(dev.own_mounts(), 0, "at rest a device costs nothing");
    let shared = std::fs::metadata(host.iommu()).unwrap().dev();
    let file = open(&host.node(0)).unwrap();
    assert_eq!(dev.own_mounts(), 1);
    assert_ne!(file.metadata().unwrap().dev(), shared);
    assert_eq!(
        file.read_at(&mut [0; 4], 0).unwrap_err().raw_os_error(),
        Some(libc::EINVAL)
    );
    let second = open(&host.node(0)).unwrap();
    assert_eq!(
        second.metadata().unwrap().dev(),
        file.metadata().unwrap().dev()
    );
    assert_eq!(dev.open_files().0, 2);
    drop(second);
    drop(file);
    // Forgotten first, unmounted then; an open in between is still served by the old connection.
    let seen_on = || std::fs::metadata(host.node(0)).unwrap().dev();
    until("the mount's end", || {
        dev.own_mounts() == 0 && seen_on() == shared
    });
    assert_eq!(dev.open_files().0, 0);
    let again = open(&host.node(0)).unwrap();
    assert_eq!(dev.own_mounts(), 1);
    drop(again);
    // The close is told to the server after it has returned to the client, so it may run still.
    let gone = device.destroy(Policy::Disassociate);
    assert_eq!(gone.wait_for(Duration::from_secs(10)), Some(Ok(())));
}

#[test]
fn its_files_are_found_by_those_who_look_for_holders() {
    let name = "its_files_are_found_by_those_who_look_for_holders";
    for redirect in [true, false] {
        let Some(host) = Host::new(name, |options| options.redirect = redirect) else {
            return;
        };
        let (_device, _) = host.device("one");
        let file = open(&host.node(0)).unwrap();
        let device = host.core.device(0).unwrap();
        let ids = host.dev.as_ref().unwrap().file_ids(&device);
        let holders = client_process::holders(&ids, &[]);
        let this = holders
            .iter()
            .find(|holder| holder.pid == rustix::process::getpid());
        let fds = &this.expect("this process holds it").fds;
        assert!(
            fds.contains(&std::os::fd::AsRawFd::as_raw_fd(&file)),
            "{fds:?}"
        );
    }
}

#[test]
fn without_redirect_all_share_one() {
    let name = "without_redirect_all_share_one";
    let Some(host) = Host::new(name, |options| options.redirect = false) else {
        return;
    };
    let (_device, _) = host.device("one");
    let file = open(&host.node(0)).unwrap();
    let shared = std::fs::metadata(host.iommu()).unwrap().dev();
    assert_eq!(file.metadata().unwrap().dev(), shared);
    assert_eq!(
        file.write_at(&[0; 4], 0).unwrap_err().raw_os_error(),
        Some(libc::EINVAL)
    );
}

#[test]
fn an_open_file_outlives_the_name_and_is_waited_for() {
    let name = "an_open_file_outlives_the_name_and_is_waited_for";
    let Some(host) = Host::new(name, |_| {}) else {
        return;
    };
    let (device, seen) = host.device("one");
    let file = open(&host.node(0)).unwrap();
    let gone = device.destroy(Policy::Wait);
    assert!(gone.result().is_none(), "it waits");
    assert_eq!(open(&host.node(0)).unwrap_err().kind(), ErrorKind::NotFound);
    until("no mount left", || {
        host.dev.as_ref().unwrap().own_mounts() == 0
    });
    assert_eq!(
        file.read_at(&mut [0; 4], 0).unwrap_err().raw_os_error(),
        Some(libc::EINVAL)
    );
    drop(file);
    gone.wait_for(Duration::from_secs(10)).unwrap().unwrap();
    until("release", || {
        seen.released.load(std::sync::atomic::Ordering::SeqCst) == 1
    });
}

/// The node of a device before anybody has opened it: on the `dev` connection, where no right to it is
/// needed to hold it.
fn hold(path: &std::path::Path) -> File {
    use std::os::unix::fs::OpenOptionsExt;
    File::options()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path)
        .unwrap()
}

fn open_held(held: &File) -> std::io::Result<File> {
    let fd = std::os::fd::AsRawFd::as_raw_fd(held);
    open(std::path::Path::new(&format!("/proc/self/fd/{fd}")))
}

#[test]
fn the_node_of_a_device_that_has_gone_takes_nothing_from_the_next_of_its_name() {
    let name = "the_node_of_a_device_that_has_gone_takes_nothing_from_the_next_of_its_name";
    let Some(host) = Host::new(name, |_| {}) else {
        return;
    };
    let (first, _) = host.device("one");
    let held = hold(&host.node(0));
    assert_eq!(first.destroy(Policy::Disassociate).result(), Some(Ok(())));
    let (second, _) = host.device("two");
    let dev = host.dev.as_ref().unwrap();
    for _ in 0..3 {
        let error = open_held(&held).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
        assert_eq!(dev.own_mounts(), 0, "nobody has opened the second");
    }
    // Also where the second has a connection of its own already.
    for _ in 0..2 {
        drop(open(&host.node(0)).unwrap());
        assert!(open_held(&held).is_err());
    }
    assert_eq!(dev.own_mounts(), 1);
    // Its name goes at once, and what is mounted there.
    let gone = second.destroy(Policy::Disassociate);
    assert_eq!(gone.wait_for(Duration::from_secs(10)), Some(Ok(())));
    until("its own mount's end", || dev.own_mounts() == 0);
    drop(held);
}
