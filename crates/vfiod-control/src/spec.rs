//! How people and programs name a device.

use crate::view::Device;
use std::path::{Component, Path};

/// A device as somebody named it: `vfioN`, a UUID or PCI address, `BUS/ADDRESS`, or a path of its
/// directory, its links or its node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Spec {
    /// `vfioN`, `/dev/vfio/devices/vfioN`, `/sys/class/vfio-dev/vfioN`.
    Name(String),
    /// A name on any bus.
    Address(String),
    /// A name on this bus.
    OnBus(String, String),
    /// A directory below `/sys`, starting with `/devices/`.
    Directory(String),
    /// `/dev/vfio/N`: all devices of an IOMMU group.
    Group(u32),
    /// A char device, `/sys/dev/char/M:N`.
    Char(String),
}

impl Spec {
    /// Reads a name. `sys` and `dev` are where the trees are; a path below them or below `/sys`
    /// and `/dev` counts alike, and the file system is not looked at.
    pub fn parse(text: &str, sys: &Path, dev: &Path) -> Spec {
        if text.starts_with('/') {
            return Spec::path(Path::new(text), sys, dev)
                .unwrap_or_else(|| Spec::Directory(text.to_owned()));
        }
        if is_name(text) {
            return Spec::Name(text.to_owned());
        }
        // A short PCI address is one of domain 0, as lspci has it.
        match text.split_once('/') {
            Some((bus, address)) => Spec::OnBus(bus.to_owned(), canonical(address)),
            None => Spec::Address(canonical(text)),
        }
    }

    fn path(path: &Path, sys: &Path, dev: &Path) -> Option<Spec> {
        if let Ok(below) = path
            .strip_prefix(dev)
            .or_else(|_| path.strip_prefix("/dev"))
        {
            return match *parts(below)?.as_slice() {
                ["vfio", "devices", name] => Some(Spec::Name(name.to_owned())),
                ["vfio", group] => Some(Spec::Group(group.parse().ok()?)),
                _ => None,
            };
        }
        let below = path
            .strip_prefix(sys)
            .or_else(|_| path.strip_prefix("/sys"))
            .or_else(|_| path.strip_prefix("/"))
            .ok()?;
        match *parts(below)?.as_slice() {
            ["bus", bus, "devices", address, ..] => {
                Some(Spec::OnBus(bus.to_owned(), address.to_owned()))
            }
            ["class", "vfio-dev", name, ..] => Some(Spec::Name(name.to_owned())),
            ["dev", "char", number] => Some(Spec::Char(number.to_owned())),
            ["kernel", "iommu_groups", _, "devices", address, ..] => {
                Some(Spec::Address(address.to_owned()))
            }
            ["kernel", "iommu_groups", group] => Some(Spec::Group(group.parse().ok()?)),
            ["devices", .., "vfio-dev", name] => Some(Spec::Name(name.to_owned())),
            ["devices", ..] => Some(Spec::Directory(format!("/{}", below.display()))),
            _ => None,
        }
    }

    /// True for the device that was named.
    pub fn matches(&self, device: &Device) -> bool {
        match self {
            Spec::Name(name) => device.name.as_deref() == Some(name),
            Spec::Address(address) => device.address == *address,
            Spec::OnBus(bus, address) => {
                device.bus.as_deref() == Some(bus) && device.address == *address
            }
            Spec::Directory(path) => {
                device.path.trim_end_matches('/') == path.trim_end_matches('/')
            }
            Spec::Group(group) => device.iommu_group == Some(*group),
            Spec::Char(number) => device.cdev.as_deref() == Some(number),
        }
    }
}

/// The parts of a relative path; `None` if it leaves its root or is no text.
fn parts(path: &Path) -> Option<Vec<&str>> {
    path.components()
        .map(|part| match part {
            Component::Normal(name) => name.to_str(),
            _ => None,
        })
        .collect()
}

fn is_name(text: &str) -> bool {
    text.strip_prefix("vfio")
        .is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()))
}

fn canonical(address: &str) -> String {
    let bytes = address.as_bytes();
    let hex = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_hexdigit);
    let short_pci = bytes.len() == 7
        && bytes.get(2) == Some(&b':')
        && bytes.get(5) == Some(&b'.')
        && [0, 1, 3, 4, 6].into_iter().all(hex);
    let lower = address.to_ascii_lowercase();
    if short_pci {
        format!("0000:{lower}")
    } else if is_uuid(address) {
        lower
    } else {
        address.to_owned()
    }
}

fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(at, b)| match at {
            8 | 13 | 18 | 23 => b == b'-',
            _ => b.is_ascii_hexdigit(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Spec {
        Spec::parse(text, Path::new("/r/sys"), Path::new("/r/dev"))
    }

    #[test]
    fn names() {
        let on = |bus: &str, address: &str| Spec::OnBus(bus.into(), address.into());
        let table = [
            ("vfio12", Spec::Name("vfio12".into())),
            ("vfio", Spec::Address("vfio".into())),
            ("0000:3b:00.0", Spec::Address("0000:3b:00.0".into())),
            ("3B:00.0", Spec::Address("0000:3b:00.0".into())),
            ("pci/3b:00.0", on("pci", "0000:3b:00.0")),
            (
                "83B8F4F2-509F-382F-3C1E-E6BFE0FA1001",
                Spec::Address("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001".into()),
            ),
            ("/dev/vfio/devices/vfio3", Spec::Name("vfio3".into())),
            ("/r/dev/vfio/devices/vfio3", Spec::Name("vfio3".into())),
            ("/dev/vfio/7", Spec::Group(7)),
            ("/sys/bus/mdev/devices/x", on("mdev", "x")),
            ("/r/sys/bus/mdev/devices/x/", on("mdev", "x")),
            ("/sys/class/vfio-dev/vfio1", Spec::Name("vfio1".into())),
            ("/sys/dev/char/511:2", Spec::Char("511:2".into())),
            ("/sys/kernel/iommu_groups/4", Spec::Group(4)),
            ("/sys/devices/a/b", Spec::Directory("/devices/a/b".into())),
            ("/devices/a/b", Spec::Directory("/devices/a/b".into())),
            (
                "/sys/devices/a/b/vfio-dev/vfio5",
                Spec::Name("vfio5".into()),
            ),
            ("/dev/../etc", Spec::Directory("/dev/../etc".into())),
            ("/dev/vfio/x", Spec::Directory("/dev/vfio/x".into())),
        ];
        for (text, spec) in table {
            assert_eq!(parse(text), spec, "{text}");
        }
    }

    #[test]
    fn a_name_matches_its_device_only() {
        let device = Device {
            name: Some("vfio1".into()),
            address: "x".into(),
            bus: Some("mdev".into()),
            path: "/devices/p/x".into(),
            iommu_group: Some(4),
            cdev: Some("511:1".into()),
            ..Device::default()
        };
        for yes in [
            "vfio1",
            "x",
            "mdev/x",
            "/sys/devices/p/x",
            "/dev/vfio/4",
            "/sys/dev/char/511:1",
        ] {
            assert!(parse(yes).matches(&device), "{yes}");
        }
        for no in ["vfio10", "vfio", "pci/x", "/sys/devices/p", "/dev/vfio/5"] {
            assert!(!parse(no).matches(&device), "{no}");
        }
    }
}
