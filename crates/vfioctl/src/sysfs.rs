//! What a sysfs tree says of VFIO: a kernel's own, or one that vfiod serves.
//!
//! Everything is read by the layout that the kernel documents (`Documentation/ABI/testing/
//! sysfs-devices-vfio-dev`, `sysfs-bus-vfio-mdev`, `sysfs-kernel-iommu_groups`). Absent files are no
//! errors: a 6.1 kernel has `vfio-dev/vfioN` without `dev`, and a device may go while it is read.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use vfiod_control::view::{Device, Group, MdevType, Member, Parent, State, Tree};

/// A tree to read.
#[derive(Clone, Debug)]
pub(crate) struct Sysfs {
    /// Where it is.
    pub(crate) sys: PathBuf,
    /// Where the nodes are.
    pub(crate) dev: PathBuf,
    /// `sys` without links, to cut off paths.
    root: PathBuf,
}

impl Sysfs {
    /// The tree at `sys`, with its nodes at `dev`.
    pub(crate) fn new(sys: &Path, dev: &Path) -> Sysfs {
        Sysfs {
            sys: sys.to_owned(),
            dev: dev.to_owned(),
            root: fs::canonicalize(sys).unwrap_or_else(|_| sys.to_owned()),
        }
    }

    /// Devices that have a VFIO device, are bound to a driver of VFIO, or are mediated.
    pub(crate) fn devices(&self) -> Vec<Device> {
        let mut found: BTreeMap<String, Device> = BTreeMap::new();
        for bus in names(&self.sys.join("bus")) {
            for address in names(&self.sys.join("bus").join(&bus).join("devices")) {
                let link = self
                    .sys
                    .join("bus")
                    .join(&bus)
                    .join("devices")
                    .join(&address);
                let Some(device) = self.device(&link, &address, Some(&bus)) else {
                    continue;
                };
                if interesting(&device) {
                    found.insert(device.path.clone(), device);
                }
            }
        }
        // A parent that is on no bus shows only in the class.
        for name in names(&self.sys.join("class/vfio-dev")) {
            let link = self.sys.join("class/vfio-dev").join(&name);
            let Some(parent) = fs::canonicalize(&link)
                .ok()
                .and_then(|dir| Some(dir.parent()?.parent()?.to_owned()))
            else {
                continue;
            };
            let Some(address) = parent.file_name().and_then(|name| name.to_str()) else {
                continue;
            };
            if let Some(device) = self.device(&parent, address, None) {
                found.entry(device.path.clone()).or_insert(device);
            }
        }
        let mut devices: Vec<Device> = found.into_values().collect();
        devices
            .sort_by_cached_key(|device| (number(device.name.as_deref()), device.address.clone()));
        devices
    }

    /// The device behind a link or directory.
    fn device(&self, link: &Path, address: &str, bus: Option<&str>) -> Option<Device> {
        let dir = fs::canonicalize(link).ok()?;
        let name = names(&dir.join("vfio-dev"))
            .into_iter()
            .find(|name| name.starts_with("vfio"));
        let cdev = name
            .as_ref()
            .and_then(|name| text(&dir.join("vfio-dev").join(name).join("dev")));
        let iommu_group = base(&dir.join("iommu_group")).and_then(|group| group.parse().ok());
        let node = match (&name, &cdev, iommu_group) {
            (Some(name), Some(_), _) => Some(self.dev.join("vfio/devices").join(name)),
            (_, _, Some(group)) => {
                Some(self.dev.join(format!("vfio/{group}"))).filter(|node| node.exists())
            }
            _ => None,
        };
        Some(Device {
            state: if name.is_some() {
                State::Registered
            } else {
                State::Unbound
            },
            name,
            address: address.to_owned(),
            bus: bus.map(str::to_owned),
            path: self.below(&dir),
            driver: base(&dir.join("driver")),
            mdev_type: base(&dir.join("mdev_type")),
            iommu_group,
            cdev,
            node: node.map(|node| node.to_string_lossy().into_owned()),
            ..Device::default()
        })
    }

    /// Any device of the tree, VFIO's or not, by bus and address.
    pub(crate) fn any(&self, bus: Option<&str>, address: &str) -> Option<Device> {
        let buses = match bus {
            Some(bus) => vec![bus.to_owned()],
            None => names(&self.sys.join("bus")),
        };
        buses.iter().find_map(|bus| {
            let link = self.sys.join("bus").join(bus).join("devices").join(address);
            self.device(&link, address, Some(bus))
        })
    }

    /// An IOMMU group.
    pub(crate) fn group(&self, id: u32) -> Option<Group> {
        let dir = self.sys.join(format!("kernel/iommu_groups/{id}"));
        let members = names(&dir.join("devices"));
        if members.is_empty() && !dir.is_dir() {
            return None;
        }
        let members = members
            .into_iter()
            .map(|address| {
                let member = dir.join("devices").join(&address);
                let driver = base(&member.join("driver"));
                let vfio = member.join("vfio-dev").is_dir();
                Member {
                    blocks: !vfio && driver.as_deref().is_some_and(keeps_group),
                    address,
                    driver,
                }
            })
            .collect();
        Some(Group {
            cdev: None,
            node: None,
            open: None,
            id,
            name: text(&dir.join("name")),
            domain: text(&dir.join("type")),
            members,
        })
    }

    /// What mediated devices can be made of.
    pub(crate) fn parents(&self) -> Vec<Parent> {
        let class = self.sys.join("class/mdev_bus");
        let mut parents = Vec::new();
        for name in names(&class) {
            let Ok(dir) = fs::canonicalize(class.join(&name)) else {
                continue;
            };
            let types = dir.join("mdev_supported_types");
            parents.push(Parent {
                path: self.below(&dir),
                types: names(&types)
                    .into_iter()
                    .filter_map(|id| mdev_type(&types.join(&id), id))
                    .collect(),
                name,
            });
        }
        parents
    }

    /// All of it.
    pub(crate) fn tree(&self) -> Tree {
        let devices = self.devices();
        let mut groups: Vec<u32> = devices.iter().filter_map(|d| d.iommu_group).collect();
        groups.sort_unstable();
        groups.dedup();
        Tree {
            parents: self.parents(),
            groups: groups.into_iter().filter_map(|id| self.group(id)).collect(),
            devices,
        }
    }

    /// The directory of a device.
    pub(crate) fn dir(&self, device: &Device) -> PathBuf {
        self.sys.join(device.path.trim_start_matches('/'))
    }

    /// A path below the root as the kernel names it, starting with a slash.
    fn below(&self, dir: &Path) -> String {
        let below = dir.strip_prefix(&self.root).unwrap_or(dir);
        format!("/{}", below.to_string_lossy().trim_start_matches('/'))
    }
}

fn mdev_type(dir: &Path, id: String) -> Option<MdevType> {
    Some(MdevType {
        name: text(&dir.join("name")),
        device_api: text(&dir.join("device_api"))?,
        available: text(&dir.join("available_instances"))?.parse().ok()?,
        description: text(&dir.join("description")),
        devices: names(&dir.join("devices")),
        id,
    })
}

fn interesting(device: &Device) -> bool {
    device.name.is_some()
        || device.bus.as_deref() == Some("mdev")
        || device.driver.as_deref().is_some_and(is_vfio_driver)
}

/// Drivers that are VFIO's by their name: `vfio-pci`, `mlx5_vfio_pci`, `vfio_ccw`, `vfio-platform`.
/// The directory `vfio-dev` says it of the others, on kernels that have it (6.1).
pub(crate) fn is_vfio_driver(driver: &str) -> bool {
    driver.contains("vfio")
}

/// True for a driver whose device keeps its group from being given to a user: all but VFIO's, the
/// stub, and bridges' (`driver_managed_dma` in `drivers/pci/pci-stub.c` and `drivers/pci/pcie/
/// portdrv.c`).
fn keeps_group(driver: &str) -> bool {
    !is_vfio_driver(driver) && !matches!(driver, "pci-stub" | "pcieport" | "shpchp")
}

/// The names in a directory, sorted; none if it is not there.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort_unstable();
    names
}

/// The text of an attribute, without the space around it; `None` if it is not there or empty.
pub(crate) fn text(file: &Path) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// The last part of what a link points to.
fn base(link: &Path) -> Option<String> {
    let target = fs::read_link(link).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}

/// For sorting: `vfio2` before `vfio10`, those without a number last.
fn number(name: Option<&str>) -> u64 {
    name.and_then(|name| name.strip_prefix("vfio")?.parse().ok())
        .unwrap_or(u64::MAX)
}
