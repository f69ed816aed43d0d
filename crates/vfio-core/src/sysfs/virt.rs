//! Devices that have nothing but a node: groups, and the misc devices of VFIO.

use crate::Core;
use crate::group::Group;
use std::sync::Arc;

/// Their classes, and where the directories of each are.
pub(super) const CLASSES: [(&str, &str); 2] = [
    ("misc", "/devices/virtual/misc"),
    ("vfio", "/devices/virtual/vfio"),
];

/// Major number of misc devices (`MISC_MAJOR`).
const MISC_MAJOR: u32 = 10;
/// `VFIO_MINOR`.
const CONTAINER_MINOR: u32 = 196;

/// A device with no parent and no driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Virtual {
    /// A VFIO group: the number of its IOMMU group, and which one it is.
    Group { id: u32, serial: u64 },
    /// `/dev/vfio/vfio`.
    Container,
    /// `/dev/iommu`.
    Iommu,
}

impl Virtual {
    fn of(group: &Group) -> Virtual {
        Virtual::Group {
            id: group.id(),
            serial: group.serial(),
        }
    }

    fn group(self, core: &Core) -> Option<Arc<Group>> {
        match self {
            Virtual::Group { id, serial } => {
                core.group(id).filter(|group| group.serial() == serial)
            }
            _ => None,
        }
    }

    /// All of a class, by name: groups by number.
    pub(super) fn all(core: &Core, class: &str) -> Vec<Virtual> {
        match class {
            "misc" => vec![Virtual::Iommu, Virtual::Container],
            "vfio" => {
                let groups = core.groups();
                let mut all: Vec<Virtual> = groups.iter().map(|one| Virtual::of(one)).collect();
                all.sort_by_key(|device| match device {
                    Virtual::Group { id, .. } => *id,
                    _ => 0,
                });
                all
            }
            _ => Vec::new(),
        }
    }

    /// The one of this name.
    pub(super) fn named(core: &Core, class: &str, name: &str) -> Option<Virtual> {
        match (class, name) {
            ("misc", "vfio") => Some(Virtual::Container),
            ("misc", "iommu") => Some(Virtual::Iommu),
            ("vfio", _) => Some(Virtual::of(&*core.group_by_name(name)?)),
            _ => None,
        }
    }

    /// The one with this device number, `MAJOR:MINOR` without leading zeros.
    pub(super) fn numbered(core: &Core, text: &str) -> Option<Virtual> {
        let (major, minor) = text.split_once(':')?;
        let (major, minor): (u32, u32) = (major.parse().ok()?, minor.parse().ok()?);
        let config = core.config();
        let found = if major == MISC_MAJOR && minor == CONTAINER_MINOR {
            Virtual::Container
        } else if major == MISC_MAJOR && minor == config.iommu_minor {
            Virtual::Iommu
        } else if major == config.group_major {
            Virtual::of(&*core.group_by_minor(minor)?)
        } else {
            return None;
        };
        (format!("{major}:{minor}") == text).then_some(found)
    }

    pub(super) fn exists(self, core: &Core) -> bool {
        match self {
            Virtual::Group { .. } => self.group(core).is_some(),
            Virtual::Container | Virtual::Iommu => true,
        }
    }

    pub(super) fn name(self) -> String {
        match self {
            Virtual::Group { id, .. } => id.to_string(),
            Virtual::Container => "vfio".into(),
            Virtual::Iommu => "iommu".into(),
        }
    }

    pub(super) fn class(self) -> &'static str {
        match self {
            Virtual::Group { .. } => "vfio",
            Virtual::Container | Virtual::Iommu => "misc",
        }
    }

    pub(super) fn devpath(self) -> String {
        format!("/devices/virtual/{}/{}", self.class(), self.name())
    }

    /// Its device number; `None` for a group that has died.
    pub(super) fn number(self, core: &Core) -> Option<(u32, u32)> {
        match self {
            Virtual::Group { .. } => {
                let group = self.group(core)?;
                Some((core.config().group_major, group.minor()))
            }
            Virtual::Container => Some((MISC_MAJOR, CONTAINER_MINOR)),
            Virtual::Iommu => Some((MISC_MAJOR, core.config().iommu_minor)),
        }
    }

    /// The variables of its uevents; `None` for a group that has died.
    pub(super) fn env(self, core: &Core) -> Option<Vec<(String, String)>> {
        let (name, mode) = match self {
            Virtual::Group { .. } => return Some(core.group_env(&*self.group(core)?)),
            Virtual::Container => ("vfio/vfio", "0666"),
            Virtual::Iommu => ("iommu", "0660"),
        };
        let (major, minor) = self.number(core)?;
        Some(vec![
            ("MAJOR".into(), major.to_string()),
            ("MINOR".into(), minor.to_string()),
            ("DEVNAME".into(), name.into()),
            ("DEVMODE".into(), mode.into()),
        ])
    }
}
