//! Sets of devices, found by name.

use super::BusDevice;
use std::borrow::Borrow;
use std::collections::HashSet;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

/// A device as a member of a directory: found by name.
#[derive(Clone, Debug)]
pub(crate) struct ByName(pub(crate) Arc<BusDevice>);

impl PartialEq for ByName {
    fn eq(&self, other: &ByName) -> bool {
        self.0.name() == other.0.name()
    }
}

impl Eq for ByName {}

impl Hash for ByName {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.name().hash(state);
    }
}

impl Borrow<str> for ByName {
    fn borrow(&self) -> &str {
        self.0.name()
    }
}

pub(super) fn sorted(devices: &HashSet<ByName>) -> Vec<Arc<BusDevice>> {
    let mut all: Vec<Arc<BusDevice>> = devices.iter().map(|d| Arc::clone(&d.0)).collect();
    all.sort_unstable_by(|a, b| a.name().cmp(b.name()));
    all
}

/// Takes this very device out, not another one of its name.
pub(super) fn take(devices: &mut HashSet<ByName>, device: &BusDevice) -> Option<ByName> {
    match devices.get(device.name()) {
        Some(found) if found.0.id() == device.id() => devices.take(device.name()),
        _ => None,
    }
}
