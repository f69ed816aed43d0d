//! The files: which there are, what they say, what a write does.

use super::tree::{attributes, mdev_type, vfio};
use super::{Dev, Dir, Entry, Node, PAGE_SIZE, Store, StoreWaiting, Sysfs, text};
use crate::event::Uevent;
use crate::model::{Driver, Outcome, Subsystem, mdev};
use crate::{Errno, Result};
use std::fmt::Write;
use std::sync::Arc;

const R: u32 = 0o444;
const W: u32 = 0o200;
const RW: u32 = 0o644;

/// The files of a directory and their modes.
pub(super) fn list(sysfs: &Sysfs, dir: &Dir) -> Vec<(&'static str, u32)> {
    match dir {
        Dir::Device(dev) => {
            let mut all = Vec::new();
            if dev.0.is_present() {
                all.push(("uevent", RW));
                if let Some(Subsystem::Bus(name)) = dev.0.subsystem()
                    && sysfs.bus(name).is_some_and(|bus| bus.has_driver_override())
                {
                    all.push(("driver_override", RW));
                }
                if dev.0.mdev().is_some() {
                    all.push(("remove", W));
                }
            }
            all
        }
        Dir::Vfio(..) if sysfs.core.config().cdev => vec![("dev", R), ("uevent", RW)],
        Dir::Vfio(..) => vec![("uevent", RW)],
        Dir::Virtual(_) => vec![("dev", R), ("uevent", RW)],
        Dir::Attributes(dev, group) => {
            let of_group = attributes(&dev.0)
                .iter()
                .filter(|(there, _)| there == group);
            of_group.map(|(_, name)| (*name, R)).collect()
        }
        Dir::Type(dev, ty) => {
            let mut all = vec![
                ("available_instances", R),
                ("create", W),
                ("device_api", R),
                ("name", R),
            ];
            let parent = mdev_type(&dev.0, *ty);
            if parent.is_some_and(|parent| parent.description(*ty as usize).is_some()) {
                all.push(("description", R));
            }
            all
        }
        Dir::Bus(_) => vec![
            ("drivers_autoprobe", RW),
            ("drivers_probe", W),
            ("uevent", W),
        ],
        Dir::Driver(..) => vec![("bind", W), ("uevent", W), ("unbind", W)],
        Dir::Group(id) => {
            let mut all = vec![("reserved_regions", R), ("type", RW)];
            if sysfs.group(*id).is_some_and(|group| group.name().is_some()) {
                all.push(("name", R));
            }
            all
        }
        Dir::DebugDevice(_) => vec![("state", R)],
        Dir::Module(_) => vec![("uevent", W)],
        _ => Vec::new(),
    }
}

/// The mode of a file of this name in such a directory, whether or not it is there now.
pub(super) fn mode(dir: &Dir, name: &str) -> u32 {
    match (dir, name) {
        (Dir::Attributes(..), _) => R,
        (Dir::Device(_) | Dir::Vfio(..) | Dir::Virtual(_), "uevent") => RW,
        (_, "driver_override" | "drivers_autoprobe" | "type") => RW,
        (_, "uevent" | "create" | "remove" | "bind" | "unbind" | "drivers_probe") => W,
        _ => R,
    }
}

impl Sysfs {
    /// Reads a file, whole. `ENODEV` when it is gone, `EACCES` when it cannot be read, `EISDIR`
    /// and `EINVAL` for what is no file.
    pub fn show(&self, node: &Node) -> Result<Vec<u8>> {
        let name = match &node.entry {
            Entry::This => return Err(Errno::ISDIR),
            Entry::Attr(name) => *name,
            Entry::Parameter(name) => {
                let value = self.parameter(&node.dir, name).ok_or(Errno::NODEV)?;
                return Ok(format!("{value}\n").into_bytes());
            }
            _ => return Err(Errno::INVAL),
        };
        if !self.exists(node) {
            return Err(Errno::NODEV);
        }
        if self.mode(node) & 0o444 == 0 {
            return Err(Errno::ACCESS);
        }
        let mut text = self.text(&node.dir, name)?.into_bytes();
        text.truncate(PAGE_SIZE);
        Ok(text)
    }

    fn text(&self, dir: &Dir, name: &str) -> Result<String> {
        let gone = Errno::NODEV;
        Ok(match (dir, name) {
            (Dir::Device(dev), "uevent") => lines(&dev.0.uevent_env()),
            (Dir::Device(dev), "driver_override") => match dev.0.driver_override() {
                Some(driver) => format!("{driver}\n"),
                None => "(null)\n".into(),
            },
            (Dir::Vfio(_, index), "dev") => {
                format!("{}:{index}\n", self.core.config().cdev_major)
            }
            (Dir::Vfio(dev, index), "uevent") => {
                lines(&self.core.vfio_env(&vfio(&dev.0, *index).ok_or(gone)?))
            }
            (Dir::Virtual(device), "dev") => {
                let (major, minor) = device.number(&self.core).ok_or(gone)?;
                format!("{major}:{minor}\n")
            }
            (Dir::Virtual(device), "uevent") => lines(&device.env(&self.core).ok_or(gone)?),
            (Dir::Attributes(dev, group), name) => {
                dev.0.vfio_device().ok_or(gone)?.show(group, name)?
            }
            (Dir::Type(dev, ty), name) => {
                let parent = mdev_type(&dev.0, *ty).ok_or(gone)?;
                let ty = *ty as usize;
                match name {
                    "name" => format!("{}\n", parent.pretty_name(ty).ok_or(gone)?),
                    "device_api" => format!("{}\n", parent.device_api()),
                    "available_instances" => {
                        format!("{}\n", parent.available_instances(ty).ok_or(gone)?)
                    }
                    "description" => line(parent.description(ty).ok_or(gone)?),
                    _ => return Err(Errno::IO),
                }
            }
            (Dir::Bus(bus), "drivers_autoprobe") => {
                format!("{}\n", u8::from(self.bus(bus).ok_or(gone)?.autoprobe()))
            }
            (Dir::Group(id), name) => {
                let group = self.group(*id).ok_or(gone)?;
                match name {
                    "type" => format!("{}\n", group.domain()),
                    "reserved_regions" => group.show_reserved(),
                    _ => format!("{}\n", group.name().ok_or(gone)?),
                }
            }
            (Dir::DebugDevice(dev), _) => line(self.state(dev)),
            _ => return Err(Errno::IO),
        })
    }

    /// What is to be said of a device's VFIO device.
    fn state(&self, dev: &Dev) -> String {
        if let Some(waiting) = self.core.model().unregistering_device(&dev.0) {
            return waiting.describe();
        }
        match dev.0.vfio_device() {
            Some(vfio) => vfio.describe_users(),
            None => "unregistered".into(),
        }
    }

    /// Writes to a file: one store of what is there, at most a page of it, wherever in the file
    /// it was written. Errnos are the file's own; `ENODEV` when it is gone, `EACCES` when it
    /// cannot be written.
    pub fn store(&self, node: &Node, data: &[u8]) -> Store {
        let Entry::Attr(name) = node.entry else {
            return Store::Done(Err(Errno::ACCESS));
        };
        if self.mode(node) & 0o222 == 0 {
            return Store::Done(Err(Errno::ACCESS));
        }
        if !self.exists(node) {
            return Store::Done(Err(Errno::NODEV));
        }
        if data.is_empty() {
            return Store::Done(Ok(0));
        }
        let data = &data[..data.len().min(PAGE_SIZE)];
        match self.write(&node.dir, name, data) {
            Ok(Outcome::Done(result)) => Store::Done(result.map(|()| data.len())),
            Ok(Outcome::Waiting(waiting)) => Store::Waiting(StoreWaiting {
                waiting,
                len: data.len(),
            }),
            Err(errno) => Store::Done(Err(errno)),
        }
    }

    fn write(&self, dir: &Dir, name: &str, data: &[u8]) -> Result<Outcome> {
        let core = &self.core;
        let gone = Errno::NODEV;
        match (dir, name) {
            (Dir::Device(dev), "uevent") => {
                let (action, env) = text::synthetic(data)?;
                dev.0.uevent(core, action, env);
            }
            (Dir::Device(dev), "driver_override") => {
                dev.0
                    .set_driver_override(text::driver_override(data)?.as_deref());
            }
            (Dir::Device(dev), "remove") => {
                if text::number(data)? != 0 {
                    return Ok(mdev::remove(core, &dev.0, core.config().sysfs_policy));
                }
            }
            (Dir::Vfio(dev, index), "uevent") => {
                let (action, env) = text::synthetic(data)?;
                core.announce(&vfio(&dev.0, *index).ok_or(gone)?, action, env);
            }
            (Dir::Virtual(device), "uevent") => {
                let (action, mut env) = text::synthetic(data)?;
                env.extend(device.env(core).ok_or(gone)?);
                core.uevent(Uevent {
                    action: action.into(),
                    devpath: device.devpath(),
                    subsystem: device.class().into(),
                    env,
                });
            }
            (Dir::Type(dev, ty), "create") => {
                let parent = mdev_type(&dev.0, *ty).ok_or(gone)?;
                parent.create_text(*ty as usize, data)?;
            }
            (Dir::Bus(bus), "drivers_probe") => {
                let bus = self.bus(bus).ok_or(gone)?;
                let device = text::name(data).and_then(|name| bus.device(name));
                bus.attach(core, &device.ok_or(gone)?)?;
            }
            (Dir::Bus(bus), "drivers_autoprobe") => {
                self.bus(bus).ok_or(gone)?.set_autoprobe(data[0] != b'0');
            }
            (Dir::Bus(_) | Dir::Driver(..) | Dir::Module(_), "uevent") => {
                let (action, env) = text::synthetic(data)?;
                let subsystem = match dir {
                    Dir::Bus(_) => "bus",
                    Dir::Driver(..) => "drivers",
                    _ => "module",
                };
                core.uevent(Uevent {
                    action: action.into(),
                    devpath: dir.clone().node().to_string(),
                    subsystem: subsystem.into(),
                    env,
                });
            }
            (Dir::Driver(bus, driver), "bind") => {
                let bus = self.bus(bus).ok_or(gone)?;
                let driver = bus.driver(driver).ok_or(gone)?;
                let device = text::name(data).and_then(|name| bus.device(name));
                let device = device.ok_or(gone)?;
                if !bus.is_match(&device, &driver) {
                    return Err(Errno::NODEV);
                }
                device.bind(core, &driver)?;
            }
            (Dir::Driver(bus, driver), "unbind") => {
                let bus = self.bus(bus).ok_or(gone)?;
                let device = text::name(data).and_then(|name| bus.device(name));
                let device = device.ok_or(gone)?;
                let is_this = |bound: Arc<Driver>| bound.name() == *driver;
                if !device.driver().is_some_and(is_this) {
                    return Err(Errno::NODEV);
                }
                return Ok(device.unbind(core, core.config().sysfs_policy));
            }
            (Dir::Group(id), "type") => {
                let word = text::name(data).ok_or(Errno::INVAL)?;
                self.group(*id).ok_or(gone)?.set_domain(word)?;
            }
            _ => return Err(Errno::IO),
        }
        Ok(Outcome::Done(Ok(())))
    }
}

/// The lines of a `uevent` file.
fn lines(env: &[(String, String)]) -> String {
    let mut text = String::new();
    for (key, value) in env {
        let _ = writeln!(text, "{key}={value}");
    }
    text
}

/// Ends it with a newline, if its author has not.
fn line(mut text: String) -> String {
    if !text.ends_with('\n') {
        text.push('\n');
    }
    text
}
