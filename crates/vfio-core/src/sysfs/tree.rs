//! What is in which directory.

use super::virt::{CLASSES, Virtual};
use super::{Dev, Dir, Entry, Node, Sysfs, attr};
use crate::device::Device;
use crate::model::{Bus, BusDevice, IommuGroup, mdev};
use crate::{Errno, Result};
use std::collections::BTreeSet;
use std::sync::Arc;

/// The attribute groups of a driver's that this device has now.
pub(super) fn attributes(dev: &BusDevice) -> &'static [(&'static str, &'static str)] {
    dev.vfio_device().map_or(&[], |vfio| vfio.attributes())
}

/// The VFIO device of this number, if it is the device's and registered.
pub(super) fn vfio(dev: &BusDevice, index: u32) -> Option<Device> {
    dev.vfio_device().filter(|vfio| vfio.index() == index)
}

/// Its parent, and its type if that is one.
pub(super) fn mdev_type(dev: &BusDevice, ty: u32) -> Option<Arc<mdev::Parent>> {
    let parent = dev.mdev_parent()?;
    parent.type_name(ty as usize)?;
    Some(parent)
}

impl Sysfs {
    /// What a name in a directory is. `ENOENT` when there is none, also when the directory itself
    /// has gone; `ENOTDIR` when it is none.
    pub fn lookup(&self, node: &Node, name: &str) -> Result<Node> {
        if node.entry != Entry::This {
            return Err(Errno::NOTDIR);
        }
        if !self.exists(node) {
            return Err(Errno::NOENT);
        }
        self.find(&node.dir, name).ok_or(Errno::NOENT)
    }

    /// Everything in a directory, without `.` and `..`. Devices come sorted by name, or by
    /// number where they have one. A reader that takes several steps keeps the list: the next
    /// one may be another. Empty for what is no directory, or has gone.
    pub fn entries(&self, node: &Node) -> Vec<(String, Node)> {
        if node.entry != Entry::This || !self.exists(node) {
            return Vec::new();
        }
        let mut list = List {
            dir: &node.dir,
            all: Vec::new(),
        };
        for (name, _) in attr::list(self, &node.dir) {
            list.entry(name, Entry::Attr(name));
        }
        self.fill(&mut list);
        list.all
    }

    /// True while it is there.
    pub(super) fn exists(&self, node: &Node) -> bool {
        if !self.has_dir(&node.dir) {
            return false;
        }
        match &node.entry {
            Entry::This => true,
            Entry::Attr(name) => attr::list(self, &node.dir)
                .iter()
                .any(|(there, _)| there == name),
            Entry::Link(name) => self.find(&node.dir, name).is_some(),
            Entry::Vfio(dev, index) => vfio(&dev.0, *index).is_some(),
            Entry::Virtual(device) => device.exists(&self.core),
            Entry::Device(dev) => self.lists_device(&node.dir, &dev.0),
            Entry::Driver(bus, name) => self.bus(bus).is_some_and(|b| b.driver(name).is_some()),
            Entry::Parameter(name) => self.parameter(&node.dir, name).is_some(),
        }
    }

    pub(super) fn bus(&self, name: &str) -> Option<Arc<Bus>> {
        self.core.model().bus(name)
    }

    pub(super) fn group(&self, id: u32) -> Option<Arc<IommuGroup>> {
        self.core.iommu_groups().get(id)
    }

    pub(super) fn parameter(&self, dir: &Dir, name: &str) -> Option<String> {
        let Dir::Parameters(module) = dir else {
            return None;
        };
        let parameters = self.core.model().module(module)?;
        let found = parameters.into_iter().find(|(there, _)| there == name);
        found.map(|(_, value)| value)
    }

    fn has_dir(&self, dir: &Dir) -> bool {
        let model = self.core.model();
        match dir {
            Dir::Path(path) => {
                let bases = model.bases();
                let bases = bases.iter().map(|base| &**base);
                &**path == "/devices"
                    || bases
                        .chain(CLASSES.map(|(_, at)| at))
                        .any(|base| is_below(base, path))
            }
            Dir::Device(dev) => dev.0.has_directory(),
            Dir::Glue(dev) => dev.0.vfio_device().is_some(),
            Dir::Vfio(dev, index) => vfio(&dev.0, *index).is_some(),
            Dir::Virtual(device) => device.exists(&self.core),
            Dir::Attributes(dev, group) => {
                attributes(&dev.0).iter().any(|(there, _)| there == group)
            }
            Dir::Types(dev) => dev.0.mdev_parent().is_some(),
            Dir::Type(dev, ty) | Dir::TypeDevices(dev, ty) => mdev_type(&dev.0, *ty).is_some(),
            Dir::Bus(bus) | Dir::BusDevices(bus) | Dir::BusDrivers(bus) => self.bus(bus).is_some(),
            Dir::Driver(bus, name) => self.bus(bus).is_some_and(|b| b.driver(name).is_some()),
            Dir::Class(class) => {
                *class == "vfio-dev" || is_virtual(class) || model.class(class).is_some()
            }
            Dir::Group(id) | Dir::GroupDevices(id) => self.group(*id).is_some(),
            Dir::DebugDevice(dev) => {
                dev.0.vfio_device().is_some() || model.unregistering_device(&dev.0).is_some()
            }
            Dir::Module(name) => model.module(name).is_some(),
            Dir::Parameters(name) => model.module(name).is_some_and(|all| !all.is_empty()),
            Dir::ModuleDrivers(name) => !self.drivers_of(name).is_empty(),
            Dir::Root
            | Dir::Buses
            | Dir::Classes
            | Dir::Dev
            | Dir::DevChar
            | Dir::Kernel
            | Dir::Groups
            | Dir::Debug
            | Dir::DebugVfio
            | Dir::Modules => true,
        }
    }

    fn lists_device(&self, dir: &Dir, dev: &Arc<BusDevice>) -> bool {
        match dir {
            // The wait of a removal leaves it in its group and nowhere else.
            Dir::GroupDevices(id) => dev.iommu_group().is_some_and(|group| group.id() == *id),
            Dir::Driver(_, name) => {
                dev.is_present() && dev.driver().is_some_and(|driver| driver.name() == *name)
            }
            // A parent may leave `mdev_bus` and stay in its own class.
            Dir::Class(class) => {
                let there = self.core.model().class_device(class, dev.name());
                there.is_some_and(|there| there.id() == dev.id())
            }
            _ => dev.is_present(),
        }
    }

    /// Big directories are asked for the one name; the others are short.
    fn find(&self, dir: &Dir, name: &str) -> Option<Node> {
        if let Some((there, _)) = attr::list(self, dir)
            .iter()
            .find(|(there, _)| *there == name)
        {
            return Some(Node {
                dir: dir.clone(),
                entry: Entry::Attr(there),
            });
        }
        let model = self.core.model();
        let link = |entry| Node {
            dir: dir.clone(),
            entry,
        };
        match dir {
            Dir::Device(dev) => {
                if let Some(child) = dev.0.child_named(name) {
                    return Some(Dir::Device(Dev(child)).node());
                }
            }
            Dir::BusDevices(bus) => {
                return Some(link(Entry::Device(Dev(self.bus(bus)?.device(name)?))));
            }
            Dir::Class("vfio-dev") => {
                let vfio = self.core.device_by_name(name)?;
                let entry = Entry::Vfio(Dev(Arc::clone(vfio.parent())), vfio.index());
                return Some(link(entry));
            }
            Dir::Class(class) if is_virtual(class) => {
                let device = Virtual::named(&self.core, class, name)?;
                return Some(link(Entry::Virtual(device)));
            }
            Dir::Path(path) => {
                if let Some(class) = class_at(path)
                    && let Some(device) = Virtual::named(&self.core, class, name)
                {
                    return Some(Dir::Virtual(device).node());
                }
            }
            Dir::Class(class) => {
                return Some(link(Entry::Device(Dev(model.class_device(class, name)?))));
            }
            Dir::DevChar => {
                let (major, minor) = name.split_once(':')?;
                if let Some(device) = Virtual::numbered(&self.core, name) {
                    return Some(link(Entry::Virtual(device)));
                }
                let vfio = self.core.device(minor.parse().ok()?)?;
                let canonical = format!("{}:{}", self.core.config().cdev_major, vfio.index());
                if !self.core.config().cdev || major.is_empty() || canonical != name {
                    return None;
                }
                let entry = Entry::Vfio(Dev(Arc::clone(vfio.parent())), vfio.index());
                return Some(link(entry));
            }
            Dir::Groups => {
                let id: u32 = name.parse().ok()?;
                let group = self
                    .group(id)
                    .filter(|group| group.id().to_string() == name)?;
                return Some(Dir::Group(group.id()).node());
            }
            _ => {}
        }
        let mut list = List {
            dir,
            all: Vec::new(),
        };
        match dir {
            // The children were asked above.
            Dir::Device(dev) => self.fill_device(dev, &mut list),
            _ => self.fill(&mut list),
        }
        let found = list.all.into_iter().find(|(there, _)| there == name);
        found.map(|(_, node)| node)
    }

    fn drivers_of(&self, module: &str) -> Vec<(&'static str, &'static str)> {
        let buses = self.core.model().buses();
        let drivers = buses.iter().flat_map(|bus| bus.drivers());
        drivers
            .filter(|driver| driver.module() == module)
            .map(|driver| (driver.bus(), driver.name()))
            .collect()
    }

    /// What a device's directory has besides files and children.
    fn fill_device(&self, dev: &Dev, list: &mut List<'_>) {
        let device = &dev.0;
        if device.iommu_group().is_some() {
            list.link("iommu_group");
        }
        if !device.is_present() {
            // On its way out, waiting for users.
            return;
        }
        if device.driver().is_some() {
            list.link("driver");
        }
        if device.subsystem().is_some() {
            list.link("subsystem");
        }
        if device.mdev().is_some() {
            list.link("mdev_type");
        }
        if device.mdev_parent().is_some() {
            list.dir("mdev_supported_types", Dir::Types(dev.clone()));
        }
        if device.vfio_device().is_some() {
            list.dir("vfio-dev", Dir::Glue(dev.clone()));
        }
        let groups: BTreeSet<&'static str> = attributes(device).iter().map(|(g, _)| *g).collect();
        for group in groups {
            list.dir(group, Dir::Attributes(dev.clone(), group));
        }
    }

    /// Everything in a directory but its files.
    fn fill(&self, list: &mut List<'_>) {
        let core = &self.core;
        let model = core.model();
        match list.dir {
            Dir::Root => {
                list.dir("bus", Dir::Buses);
                list.dir("class", Dir::Classes);
                list.dir("dev", Dir::Dev);
                list.dir("devices", Dir::Path("/devices".into()));
                list.dir("kernel", Dir::Kernel);
                list.dir("module", Dir::Modules);
            }
            Dir::Path(path) => {
                let mut below: BTreeSet<String> = BTreeSet::new();
                let bases = model.bases();
                for base in bases
                    .iter()
                    .map(|base| &**base)
                    .chain(CLASSES.map(|(_, at)| at))
                {
                    let rest = base.strip_prefix(&**path).and_then(|r| r.strip_prefix('/'));
                    below.extend(rest.and_then(|rest| Some(rest.split('/').next()?.to_owned())));
                }
                for name in below {
                    let at = format!("{path}/{name}");
                    list.dir(&name, Dir::Path(at.into()));
                }
                for device in model.roots(path) {
                    list.device_dir(device);
                }
                for device in class_at(path).map_or(Vec::new(), |class| Virtual::all(core, class)) {
                    list.dir(&device.name(), Dir::Virtual(device));
                }
            }
            Dir::Device(dev) => {
                self.fill_device(dev, list);
                for child in dev.0.children() {
                    list.device_dir(child);
                }
            }
            Dir::Glue(dev) => {
                if let Some(vfio) = dev.0.vfio_device() {
                    list.dir(&vfio.name(), Dir::Vfio(dev.clone(), vfio.index()));
                }
            }
            Dir::Virtual(_) => list.link("subsystem"),
            Dir::Vfio(..) => {
                list.link("device");
                list.link("subsystem");
            }
            Dir::Types(dev) => {
                if let Some(parent) = dev.0.mdev_parent() {
                    for (ty, name) in (0..).zip(parent.type_names()) {
                        list.dir(name, Dir::Type(dev.clone(), ty));
                    }
                }
            }
            Dir::Type(dev, ty) => list.dir("devices", Dir::TypeDevices(dev.clone(), *ty)),
            Dir::TypeDevices(dev, ty) => {
                let of_type = |child: &Arc<BusDevice>| {
                    child.is_present()
                        && child
                            .mdev()
                            .is_some_and(|mdev| mdev.type_index() == *ty as usize)
                };
                for child in dev.0.children().into_iter().filter(of_type) {
                    list.device_link(child);
                }
            }
            Dir::Buses => {
                for bus in model.buses() {
                    list.dir(bus.name(), Dir::Bus(bus.name()));
                }
            }
            Dir::Bus(bus) => {
                list.dir("devices", Dir::BusDevices(bus));
                list.dir("drivers", Dir::BusDrivers(bus));
            }
            Dir::BusDevices(bus) => {
                for device in self.bus(bus).map_or(Vec::new(), |bus| bus.devices()) {
                    list.device_link(device);
                }
            }
            Dir::BusDrivers(bus) => {
                for driver in self.bus(bus).map_or(Vec::new(), |bus| bus.drivers()) {
                    list.dir(driver.name(), Dir::Driver(bus, driver.name()));
                }
            }
            Dir::Driver(bus, name) => {
                let Some(bus) = self.bus(bus) else { return };
                // Code that is not in a module has no link, as what is built into the kernel.
                let driver = bus.driver(name);
                if driver.is_some_and(|d| self.core.model().module(d.module()).is_some()) {
                    list.link("module");
                }
                let bound =
                    |device: &Arc<BusDevice>| device.driver().is_some_and(|d| d.name() == *name);
                for device in bus.devices().into_iter().filter(bound) {
                    list.device_link(device);
                }
            }
            Dir::Classes => {
                let mut names: BTreeSet<&'static str> = model.classes().into_iter().collect();
                names.insert("vfio-dev");
                names.extend(CLASSES.iter().map(|(class, _)| *class));
                for name in names {
                    list.dir(name, Dir::Class(name));
                }
            }
            Dir::Class("vfio-dev") => {
                for vfio in core.devices() {
                    let name = vfio.name();
                    list.entry(&name, vfio_entry(&vfio));
                }
            }
            Dir::Class(class) if is_virtual(class) => {
                for device in Virtual::all(core, class) {
                    list.entry(&device.name(), Entry::Virtual(device));
                }
            }
            Dir::Class(class) => {
                for device in model.class(class).unwrap_or_default() {
                    list.device_link(device);
                }
            }
            Dir::Dev => list.dir("char", Dir::DevChar),
            Dir::DevChar => {
                for device in ["misc", "vfio"].iter().flat_map(|c| Virtual::all(core, c)) {
                    if let Some((major, minor)) = device.number(core) {
                        list.entry(&format!("{major}:{minor}"), Entry::Virtual(device));
                    }
                }
                if core.config().cdev {
                    let major = core.config().cdev_major;
                    for vfio in core.devices() {
                        let name = format!("{major}:{}", vfio.index());
                        list.entry(&name, vfio_entry(&vfio));
                    }
                }
            }
            Dir::Kernel => {
                list.dir("debug", Dir::Debug);
                list.dir("iommu_groups", Dir::Groups);
            }
            Dir::Groups => {
                for group in core.iommu_groups().all() {
                    list.dir(&group.id().to_string(), Dir::Group(group.id()));
                }
            }
            Dir::Group(id) => list.dir("devices", Dir::GroupDevices(*id)),
            Dir::GroupDevices(id) => {
                let mut names: BTreeSet<String> = BTreeSet::new();
                for device in self.group(*id).map_or(Vec::new(), |group| group.devices()) {
                    // Devices of several buses may have one name (`iommu_group_add_device`).
                    let plain = device.name().to_owned();
                    let mut name = plain.clone();
                    let mut n = 0;
                    while !names.insert(name.clone()) {
                        n += 1;
                        name = format!("{plain}.{n}");
                    }
                    list.entry(&name, Entry::Device(Dev(device)));
                }
            }
            Dir::Debug => list.dir("vfio", Dir::DebugVfio),
            Dir::DebugVfio => {
                let going = model.unregistering();
                let going = going.iter().map(|waiting| Arc::clone(waiting.device()));
                let there = core.devices();
                let there = there.iter().map(|vfio| Arc::clone(vfio.parent()));
                let mut names = BTreeSet::new();
                for device in going.chain(there) {
                    if names.insert(device.name().to_owned()) {
                        let name = device.name().to_owned();
                        list.dir(&name, Dir::DebugDevice(Dev(device)));
                    }
                }
            }
            Dir::Modules => {
                for name in model.modules() {
                    list.dir(&name, Dir::Module(name.as_str().into()));
                }
            }
            Dir::Module(name) => {
                if !self.drivers_of(name).is_empty() {
                    list.dir("drivers", Dir::ModuleDrivers(Arc::clone(name)));
                }
                if model.module(name).is_some_and(|all| !all.is_empty()) {
                    list.dir("parameters", Dir::Parameters(Arc::clone(name)));
                }
            }
            Dir::Parameters(name) => {
                for (name, _) in model.module(name).unwrap_or_default() {
                    list.entry(&name, Entry::Parameter(name.as_str().into()));
                }
            }
            Dir::ModuleDrivers(name) => {
                for (bus, driver) in self.drivers_of(name) {
                    list.entry(&format!("{bus}:{driver}"), Entry::Driver(bus, driver));
                }
            }
            Dir::Attributes(..) | Dir::DebugDevice(_) => {}
        }
    }
}

/// Classes whose members are in the core, not in the model, besides `vfio-dev`.
fn is_virtual(class: &str) -> bool {
    CLASSES.iter().any(|(name, _)| *name == class)
}

/// The class whose members have their directories at this path.
fn class_at(path: &str) -> Option<&'static str> {
    let (class, _) = CLASSES.iter().find(|(_, at)| *at == path)?;
    Some(class)
}

fn vfio_entry(vfio: &Device) -> Entry {
    Entry::Vfio(Dev(Arc::clone(vfio.parent())), vfio.index())
}

/// True when `path` is `base` or a directory above it.
fn is_below(base: &str, path: &str) -> bool {
    base.strip_prefix(path)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

struct List<'a> {
    dir: &'a Dir,
    all: Vec<(String, Node)>,
}

impl List<'_> {
    fn entry(&mut self, name: &str, entry: Entry) {
        let dir = self.dir.clone();
        self.all.push((name.to_owned(), Node { dir, entry }));
    }

    fn link(&mut self, name: &'static str) {
        self.entry(name, Entry::Link(name));
    }

    fn device_link(&mut self, device: Arc<BusDevice>) {
        let name = device.name().to_owned();
        self.entry(&name, Entry::Device(Dev(device)));
    }

    fn dir(&mut self, name: &str, dir: Dir) {
        self.all.push((name.to_owned(), dir.node()));
    }

    fn device_dir(&mut self, device: Arc<BusDevice>) {
        let name = device.name().to_owned();
        self.dir(&name, Dir::Device(Dev(device)));
    }
}
