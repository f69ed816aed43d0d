//! Where nodes are, and the text of links.

use super::{Dir, Entry, Kind, Node, Sysfs};
use crate::model::Subsystem;
use crate::{Errno, Result};

/// The path of a node below `/sys`, for messages and as the base of links.
pub(super) fn of(node: &Node) -> String {
    let dir = of_dir(&node.dir);
    let name: &str = match &node.entry {
        Entry::This => return dir,
        Entry::Attr(name) | Entry::Link(name) => name,
        Entry::Parameter(name) => name,
        Entry::Device(dev) => dev.0.name(),
        Entry::Vfio(_, index) => return format!("{dir}/vfio{index}"),
        Entry::Virtual(device) => return format!("{dir}/{}", device.name()),
        Entry::Driver(bus, name) => return format!("{dir}/{bus}:{name}"),
    };
    format!("{dir}/{name}")
}

fn of_dir(dir: &Dir) -> String {
    match dir {
        Dir::Root => String::new(),
        Dir::Path(path) => path.to_string(),
        Dir::Device(dev) => dev.0.devpath(),
        Dir::Glue(dev) => format!("{}/vfio-dev", dev.0.devpath()),
        Dir::Vfio(dev, index) => vfio(&dev.0.devpath(), *index),
        Dir::Virtual(device) => device.devpath(),
        Dir::Attributes(dev, group) => format!("{}/{group}", dev.0.devpath()),
        Dir::Types(dev) => format!("{}/mdev_supported_types", dev.0.devpath()),
        Dir::Type(dev, ty) => format!("{}/mdev_supported_types/{}", dev.0.devpath(), {
            type_name(dev, *ty)
        }),
        Dir::TypeDevices(dev, ty) => format!("{}/devices", of_dir(&Dir::Type(dev.clone(), *ty))),
        Dir::Buses => "/bus".into(),
        Dir::Bus(bus) => format!("/bus/{bus}"),
        Dir::BusDevices(bus) => format!("/bus/{bus}/devices"),
        Dir::BusDrivers(bus) => format!("/bus/{bus}/drivers"),
        Dir::Driver(bus, name) => driver(bus, name),
        Dir::Classes => "/class".into(),
        Dir::Class(class) => format!("/class/{class}"),
        Dir::Dev => "/dev".into(),
        Dir::DevChar => "/dev/char".into(),
        Dir::Kernel => "/kernel".into(),
        Dir::Groups => "/kernel/iommu_groups".into(),
        Dir::Group(id) => group(*id),
        Dir::GroupDevices(id) => format!("{}/devices", group(*id)),
        Dir::Debug => "/kernel/debug".into(),
        Dir::DebugVfio => "/kernel/debug/vfio".into(),
        Dir::DebugDevice(dev) => format!("/kernel/debug/vfio/{}", dev.0.name()),
        Dir::Modules => "/module".into(),
        Dir::Module(name) => format!("/module/{name}"),
        Dir::Parameters(name) => format!("/module/{name}/parameters"),
        Dir::ModuleDrivers(name) => format!("/module/{name}/drivers"),
    }
}

fn type_name(dev: &super::Dev, ty: u32) -> String {
    let parent = dev.0.mdev_parent();
    let name = parent
        .as_ref()
        .and_then(|parent| parent.type_name(ty as usize));
    name.unwrap_or_default().to_owned()
}

fn vfio(devpath: &str, index: u32) -> String {
    format!("{devpath}/vfio-dev/vfio{index}")
}

fn driver(bus: &str, name: &str) -> String {
    format!("/bus/{bus}/drivers/{name}")
}

fn group(id: u32) -> String {
    format!("/kernel/iommu_groups/{id}")
}

impl Sysfs {
    /// The text of a link: relative, from its own directory, as `kernfs_get_target_path()` makes
    /// it. `EINVAL` for what is no link, `ENOENT` when it is gone.
    pub fn readlink(&self, node: &Node) -> Result<String> {
        if self.kind(node) != Kind::Link {
            return Err(Errno::INVAL);
        }
        if !self.exists(node) {
            return Err(Errno::NOENT);
        }
        let target = self.target(node).ok_or(Errno::NOENT)?;
        Ok(relative(&of_dir(&node.dir), &target))
    }

    /// What a link leads to.
    fn target(&self, node: &Node) -> Option<String> {
        Some(match (&node.entry, &node.dir) {
            (Entry::Device(dev), _) => dev.0.devpath(),
            (Entry::Vfio(dev, index), _) => vfio(&dev.0.devpath(), *index),
            (Entry::Virtual(device), _) => device.devpath(),
            (Entry::Link("subsystem"), Dir::Virtual(device)) => {
                format!("/class/{}", device.class())
            }
            (Entry::Driver(bus, name), _) => driver(bus, name),
            (Entry::Link("subsystem"), Dir::Device(dev)) => match dev.0.subsystem()? {
                Subsystem::Bus(name) => format!("/bus/{name}"),
                Subsystem::Class(name) => format!("/class/{name}"),
            },
            (Entry::Link("subsystem"), _) => "/class/vfio-dev".into(),
            (Entry::Link("device"), Dir::Vfio(dev, _)) => dev.0.devpath(),
            (Entry::Link("driver"), Dir::Device(dev)) => {
                let bound = dev.0.driver()?;
                driver(bound.bus(), bound.name())
            }
            (Entry::Link("iommu_group"), Dir::Device(dev)) => group(dev.0.iommu_group()?.id()),
            (Entry::Link("mdev_type"), Dir::Device(dev)) => {
                let mdev = dev.0.mdev()?;
                let parent = mdev.parent().device().devpath();
                format!("{parent}/mdev_supported_types/{}", mdev.type_name())
            }
            (Entry::Link("module"), Dir::Driver(bus, name)) => {
                let driver = self.core.model().bus(bus)?.driver(name)?;
                format!("/module/{}", driver.module())
            }
            _ => return None,
        })
    }
}

/// The way from a directory to a target.
fn relative(from: &str, target: &str) -> String {
    let from: Vec<&str> = from.split('/').collect();
    let to: Vec<&str> = target.split('/').collect();
    // The common part ends above the target itself, whose own name always appears.
    let common = from
        .iter()
        .zip(&to[..to.len() - 1])
        .take_while(|(a, b)| a == b)
        .count();
    let mut text = "../".repeat(from.len() - common);
    text.push_str(&to[common..].join("/"));
    text
}

#[cfg(test)]
mod tests {
    use super::relative;

    #[test]
    fn links_are_kernel_shaped() {
        let mdev = "/devices/virtual/mtty/mtty/83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
        for (from, to, text) in [
            ("/bus/mdev/devices", mdev, &*format!("../../..{mdev}")),
            (mdev, "/bus/mdev", "../../../../../bus/mdev"),
            (
                mdev,
                "/devices/virtual/mtty/mtty/mdev_supported_types/mtty-1",
                "../mdev_supported_types/mtty-1",
            ),
            (
                &format!("{mdev}/vfio-dev/vfio0"),
                mdev,
                "../../../83b8f4f2-509f-382f-3c1e-e6bfe0fa1001",
            ),
            (
                "/class/vfio-dev",
                "/devices/faux/a/vfio-dev/vfio0",
                "../../devices/faux/a/vfio-dev/vfio0",
            ),
            (
                "/dev/char",
                "/devices/faux/a/vfio-dev/vfio0",
                "../../devices/faux/a/vfio-dev/vfio0",
            ),
        ] {
            assert_eq!(relative(from, to), text);
        }
    }
}
