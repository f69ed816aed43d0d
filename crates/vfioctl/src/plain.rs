//! Commands on a plain sysfs tree: a kernel's own, without any daemon.

use crate::cli::Policy;
use crate::fail::{Fail, Result};
use crate::print;
use crate::sysfs::{Sysfs, is_vfio_driver, names};
use crate::who::{self, Target};
use rustix::io::Errno;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use vfiod_control::client::DEFAULT_SOCKET;
use vfiod_control::view::{Device, Holder, Parent, Show, Tree};
use vfiod_control::{FailureKind, Spec};

/// A tree and the processes of the machine.
#[derive(Debug)]
pub(crate) struct Plain {
    sysfs: Sysfs,
    proc: PathBuf,
    /// True for what a daemon would have been asked first.
    instead: bool,
}

impl Plain {
    pub(crate) fn new(sys: &Path, dev: &Path) -> Plain {
        Plain {
            sysfs: Sysfs::new(sys, dev),
            proc: PathBuf::from("/proc"),
            instead: false,
        }
    }

    /// The machine's own, since no daemon answers.
    pub(crate) fn of_the_machine() -> Plain {
        Plain {
            instead: true,
            ..Plain::new(Path::new("/sys"), Path::new("/dev"))
        }
    }

    /// Not here; but perhaps a daemon would have had it.
    fn absent(&self, what: impl fmt::Display) -> Fail {
        let note = if self.instead {
            format!("; this is the machine's own /sys, since no vfiod answers at {DEFAULT_SOCKET}")
        } else {
            String::new()
        };
        Fail::not_found(format!("{what}{note}"))
    }

    fn no_device(&self, dev: &str) -> Fail {
        self.absent(format_args!(
            "{dev}: no such device; `vfioctl list` has them all"
        ))
    }

    pub(crate) fn list(&self) -> Vec<Device> {
        self.with_holders(self.sysfs.devices())
    }

    pub(crate) fn tree(&self) -> Tree {
        let mut tree = self.sysfs.tree();
        tree.devices = self.with_holders(tree.devices);
        tree
    }

    pub(crate) fn show(&self, dev: &str) -> Result<Show> {
        let device = self.find(dev)?;
        let device = self.with_holders(vec![device]).into_iter().next();
        let device = device.ok_or_else(|| self.no_device(dev))?;
        Ok(Show {
            group: device.iommu_group.and_then(|group| self.sysfs.group(group)),
            device,
            ..Show::default()
        })
    }

    pub(crate) fn types(&self, parent: Option<&str>) -> Result<Vec<Parent>> {
        let mut parents = self.sysfs.parents();
        if let Some(wanted) = parent {
            parents.retain(|parent| parent.name == wanted);
            if parents.is_empty() {
                return Err(self.absent(format_args!(
                    "{wanted}: not in {}",
                    self.sysfs.sys.join("class/mdev_bus").display()
                )));
            }
        }
        Ok(parents)
    }

    pub(crate) fn who(&self, dev: &str) -> Result<Vec<Holder>> {
        let device = self.find(dev)?;
        let scan = who::scan(&[Target::new(&device, &self.sysfs.dev)], &self.proc);
        if scan.hidden > 0 {
            eprintln!(
                "vfioctl: {} processes of others may not be looked into; be root to see them all",
                scan.hidden
            );
        }
        Ok(scan.holders.into_iter().next().unwrap_or_default())
    }

    /// One look through /proc for all of them.
    fn with_holders(&self, mut devices: Vec<Device>) -> Vec<Device> {
        if devices.is_empty() {
            return devices;
        }
        let targets: Vec<Target> = devices
            .iter()
            .map(|device| Target::new(device, &self.sysfs.dev))
            .collect();
        let scan = who::scan(&targets, &self.proc);
        for (device, holders) in devices.iter_mut().zip(scan.holders) {
            // Without a look at all processes, "nobody" would be a guess.
            if scan.hidden == 0 || !holders.is_empty() {
                device.holders = Some(holders);
            }
        }
        devices
    }

    /// The device that was named: VFIO's first, then any of the tree.
    fn find(&self, dev: &str) -> Result<Device> {
        let spec = Spec::parse(dev, &self.sysfs.sys, &self.sysfs.dev);
        let mut found: Vec<Device> = self.sysfs.devices();
        found.retain(|device| spec.matches(device));
        match found.as_slice() {
            [] => {}
            [_] => return found.into_iter().next().ok_or_else(|| self.no_device(dev)),
            several => {
                let all: Vec<String> = several
                    .iter()
                    .map(|one| format!("{}/{}", one.bus.as_deref().unwrap_or("?"), one.address))
                    .collect();
                return Err(Fail::new(
                    FailureKind::Usage,
                    format!("{dev}: which of {}?", all.join(", ")),
                ));
            }
        }
        let any = match &spec {
            Spec::Address(address) => self.sysfs.any(None, address),
            Spec::OnBus(bus, address) => self.sysfs.any(Some(bus), address),
            Spec::Directory(path) => Path::new(path)
                .file_name()
                .and_then(|name| self.sysfs.any(None, name.to_str()?))
                .filter(|device| spec.matches(device)),
            _ => None,
        };
        any.ok_or_else(|| self.no_device(dev))
    }

    /// `echo UUID > …/create`, after a look whether one is left.
    pub(crate) fn start(
        &self,
        parent: Option<&str>,
        id: &str,
        uuid: Option<&str>,
    ) -> Result<String> {
        let parents = self.types(parent)?;
        let mut with: Vec<(&Parent, u32)> = Vec::new();
        for parent in &parents {
            with.extend(
                parent
                    .types
                    .iter()
                    .filter(|kind| kind.id == id)
                    .map(|kind| (parent, kind.available)),
            );
        }
        let (parent, available) = match *with.as_slice() {
            [] => return Err(self.absent(format_args!("{id}: no parent has this type"))),
            [one] => one,
            _ => {
                return Err(Fail::new(
                    FailureKind::Usage,
                    format!("{id}: several parents have it, name one with --parent"),
                ));
            }
        };
        if available == 0 {
            return Err(Fail::new(
                FailureKind::Busy,
                format!("{id}: {} has no more of them to give", parent.name),
            ));
        }
        let uuid = match uuid {
            Some(uuid) => uuid.to_owned(),
            None => random_uuid()?,
        };
        let file = self
            .sysfs
            .sys
            .join(parent.path.trim_start_matches('/'))
            .join("mdev_supported_types")
            .join(id)
            .join("create");
        write(&file, &uuid, None)?;
        Ok(uuid)
    }

    pub(crate) fn stop(&self, dev: &str, policy: &Policy) -> Result {
        let device = self.find(dev)?;
        let file = self.sysfs.dir(&device).join("remove");
        if !file.exists() {
            return Err(Fail::new(
                FailureKind::Usage,
                format!("{dev} is no mediated device; `vfioctl unbind` takes its driver off"),
            ));
        }
        self.leave(&device, &file, "1", policy)
    }

    pub(crate) fn unbind(&self, dev: &str, policy: &Policy) -> Result {
        let device = self.find(dev)?;
        if device.driver.is_none() {
            return Ok(());
        }
        let dir = self.sysfs.dir(&device);
        self.leave(&device, &dir.join("driver/unbind"), &device.address, policy)?;
        // Whoever bound it by an override gets the bus's own choice back.
        if device.bus.as_deref() == Some("pci")
            && device.driver.as_deref().is_some_and(is_vfio_driver)
            && dir.join("driver_override").exists()
        {
            write(&dir.join("driver_override"), "\n", None)?;
        }
        Ok(())
    }

    /// Override and probe, then a look whether it worked: `new_id` would claim every card of the
    /// kind, and `drivers_probe` reports success whatever happened.
    pub(crate) fn bind(&self, dev: &str, driver: Option<&str>, policy: &Policy) -> Result {
        let device = self.find(dev)?;
        let dir = self.sysfs.dir(&device);
        let bus = device
            .bus
            .clone()
            .ok_or_else(|| Fail::failed(format!("{dev} is on no bus")))?;
        let driver = match (driver, bus.as_str()) {
            (Some(driver), _) => Some(driver.to_owned()),
            (None, "pci") => Some("vfio-pci".to_owned()),
            (None, _) => None,
        };
        if device.driver.is_some() && (driver.is_none() || device.driver == driver) {
            return Ok(());
        }
        let bus_dir = self.sysfs.sys.join("bus").join(&bus);
        if let Some(driver) = &driver {
            if !bus_dir.join("drivers").join(driver).is_dir() {
                let module = driver.replace('-', "_");
                return Err(Fail::not_found(format!(
                    "{bus} has no driver {driver}; is its module loaded? (modprobe {module})"
                )));
            }
            let file = dir.join("driver_override");
            if file.exists() {
                write(&file, driver, None)?;
            }
        }
        if device.driver.is_some() {
            self.leave(&device, &dir.join("driver/unbind"), &device.address, policy)?;
        }
        write(&bus_dir.join("drivers_probe"), &device.address, None)?;
        let now = self
            .sysfs
            .any(Some(&bus), &device.address)
            .and_then(|device| device.driver);
        match (&driver, &now) {
            (Some(wanted), Some(now)) if wanted == now => Ok(()),
            (None, Some(_)) => Ok(()),
            _ => Err(Fail::failed(format!(
                "{dev}: no driver took it (wanted {}, bound to {}); the kernel's log says why",
                driver.as_deref().unwrap_or("any"),
                now.as_deref().unwrap_or("none"),
            ))),
        }
    }

    /// A write that the kernel answers only when all users have gone.
    fn leave(&self, device: &Device, file: &Path, text: &str, policy: &Policy) -> Result {
        if policy.force {
            return Err(Fail::failed(format!(
                "{}: a kernel cannot cut users off, it waits for them; see `vfioctl who {0}`",
                device.label()
            )));
        }
        let holders = |plain: &Plain| {
            let target = Target::new(device, &plain.sysfs.dev);
            let scan = who::scan(&[target], &plain.proc);
            scan.holders.into_iter().next().unwrap_or_default()
        };
        let held = holders(self);
        if !held.is_empty() {
            eprintln!(
                "vfioctl: {}: waiting for {}",
                device.label(),
                print::holders(&held)
            );
        }
        match write(file, text, policy.timeout) {
            Err(fail) if fail.code == FailureKind::Timeout.exit_code() => Err(Fail {
                message: format!(
                    "{}: {}; held by {}; the kernel goes on waiting",
                    device.label(),
                    fail.message,
                    print::holders(&held)
                ),
                ..fail
            }),
            other => other,
        }
    }

    /// Polls: a kernel tells nobody when a device's last user has gone, only when it has.
    pub(crate) fn wait_gone(&self, dev: &str, timeout: Option<Duration>) -> Result {
        let device = match self.find(dev) {
            Ok(device) => device,
            Err(fail) if fail.code == FailureKind::NotFound.exit_code() => return Ok(()),
            Err(fail) => return Err(fail),
        };
        let dir = self.sysfs.dir(&device);
        let end = timeout.and_then(|time| Instant::now().checked_add(time));
        loop {
            let registered = match &device.name {
                Some(name) => names(&dir.join("vfio-dev")).contains(name),
                None => dir.exists(),
            };
            if !registered {
                return Ok(());
            }
            if end.is_some_and(|end| Instant::now() >= end) {
                return Err(Fail::new(
                    FailureKind::Timeout,
                    format!("{} is still there", device.label()),
                ));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn random_uuid() -> Result<String> {
    std::fs::read_to_string("/proc/sys/kernel/random/uuid")
        .map(|text| text.trim().to_owned())
        .map_err(|error| Fail::failed(format!("no random UUID: {error}; give one with --uuid")))
}

/// One write of one value. A file that may make the writer wait for ever is written by another
/// process, so that this one can give up.
fn write(file: &Path, text: &str, timeout: Option<Duration>) -> Result {
    let Some(timeout) = timeout else {
        return store(file, text).map_err(|errno| explain(file, errno));
    };
    let own = std::env::current_exe()
        .map_err(|error| Fail::failed(format!("cannot start myself: {error}")))?;
    let mut child = Command::new(own)
        .arg("internal-write")
        .arg("--")
        .arg(file)
        .arg(text)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| Fail::failed(format!("cannot start myself: {error}")))?;
    let end = Instant::now().checked_add(timeout);
    loop {
        match child.try_wait() {
            Ok(Some(status)) => {
                return match status.code() {
                    Some(0) => Ok(()),
                    Some(errno) => Err(explain(file, Errno::from_raw_os_error(errno))),
                    None => Err(Fail::failed(format!(
                        "{}: the write was killed",
                        file.display()
                    ))),
                };
            }
            Ok(None) if end.is_some_and(|end| Instant::now() >= end) => {
                return Err(Fail::new(
                    FailureKind::Timeout,
                    format!("not done after {:.1} s", timeout.as_secs_f64()),
                ));
            }
            Ok(None) => std::thread::sleep(Duration::from_millis(10)),
            Err(error) => return Err(Fail::failed(error.to_string())),
        }
    }
}

/// The other process: its exit status is the errno.
pub(crate) fn internal_write(file: &Path, text: &str) -> Result<ExitCode> {
    let errno = store(file, text).err().map_or(0, Errno::raw_os_error);
    Ok(ExitCode::from(u8::try_from(errno).unwrap_or(u8::MAX)))
}

fn store(file: &Path, text: &str) -> std::result::Result<(), Errno> {
    use rustix::fs::{Mode, OFlags};
    let fd = rustix::fs::open(file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    let written = rustix::io::write(fd, text.as_bytes())?;
    if written == text.len() {
        Ok(())
    } else {
        Err(Errno::IO)
    }
}

fn explain(file: &Path, errno: Errno) -> Fail {
    let kind = match errno {
        Errno::NOENT | Errno::NODEV | Errno::NXIO => FailureKind::NotFound,
        Errno::BUSY | Errno::EXIST | Errno::NOSPC | Errno::USERS => FailureKind::Busy,
        _ => FailureKind::Failed,
    };
    let advice = match errno {
        Errno::ACCESS | Errno::PERM => "; be root",
        Errno::EXIST => "; the UUID is in use",
        Errno::NOSPC | Errno::USERS => "; none is left",
        _ => "",
    };
    Fail::new(kind, format!("{}: {errno}{advice}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_machine_has_not_a_daemon_might_have() {
        let message = |plain: Plain| plain.show("vfio4000000").unwrap_err().message;
        let said = message(Plain::of_the_machine());
        assert!(said.contains(DEFAULT_SOCKET), "{said}");
        let asked_for = Path::new("/nonexistent");
        let said = message(Plain::new(asked_for, asked_for));
        assert!(said.ends_with("has them all"), "{said}");
    }
}
