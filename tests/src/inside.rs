//! Tests that are clients themselves, of libraries with `/dev` and `/sys` compiled in: they run once
//! more under `vfioctl run`.

use crate::daemon;
use crate::daemon::Daemon;
use crate::skip;

/// Set for the run in which the devices are in `/dev` and `/sys`.
const INSIDE: &str = "VFIOD_TEST_INSIDE";

/// The only device there.
pub const UUID: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";

/// What `/dev/vfio/vfio` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Container {
    /// VFIO's own.
    Native,
    /// iommufd's, as in a kernel with `CONFIG_IOMMUFD_VFIO_CONTAINER`.
    Iommufd,
}

/// True inside. Outside, runs the test of this name there beside a new device, with its own daemon;
/// it has been a success then, or a skip.
///
/// # Panics
/// The test fails inside, or the daemon does.
#[must_use]
pub fn inside(test: &str, mdev_type: &str, container: Container) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    if let Err(reason) = daemon::possible() {
        skip(&reason);
        return false;
    }
    let daemon = Daemon::start("").expect("vfiod serves");
    daemon
        .check(&["start", mdev_type, "--uuid", UUID])
        .expect("the device is made");
    let mut again = daemon.vfioctl();
    again.args(["run", "--"]);
    if container == Container::Iommufd {
        let script = r#"mount --bind /dev/iommu /dev/vfio/vfio && exec "$0" "$@""#;
        again.args(["sh", "-c", script]);
    }
    again
        .arg(std::env::current_exe().expect("this program has a path"))
        .args([test, "--exact", "--nocapture"])
        .env(INSIDE, "1");
    let output = daemon::output(&mut again).expect("it ends");
    assert!(
        output.code == 0 && output.out.contains("1 passed"),
        "{}{}\nvfiod said:\n{}",
        output.out,
        output.err,
        daemon.log()
    );
    daemon.stop().expect("the daemon ends well");
    false
}
