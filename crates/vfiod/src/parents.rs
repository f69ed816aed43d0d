//! What mediated devices are made of, and those that the configuration names.

use crate::config::{Config, Driver, Mdev, Parent, Port};
use anyhow::{Context as _, bail};
use std::collections::HashMap;
use std::sync::Arc;
use uuid::Uuid;
use vfio_core::Core;
use vfio_core::device::DeviceOps as _;
use vfio_core::model::{BusDevice, mdev};
use vfio_drivers::mtty::port::BackendSpec;
use vfio_drivers::{mdpy, mtty};

/// The ports of single cards, by the card's name.
type Cards = Arc<HashMap<String, Vec<Port>>>;

/// What mediated devices are made of, with what was chosen for single devices.
///
/// # Errors
/// What is wrong with a parent, and with which.
pub(crate) fn make_parents(core: &Core, config: &Config) -> anyhow::Result<Vec<Arc<mdev::Parent>>> {
    let mut declared = config.parents.clone();
    if declared.is_empty() {
        for name in ["mtty", "mdpy"] {
            declared.insert(name.to_owned(), Parent::default());
        }
    }
    let cards: Cards = Arc::new(
        config
            .mdevs
            .iter()
            .map(|(uuid, mdev)| (uuid.to_string(), mdev.ports.clone()))
            .collect(),
    );
    let made = |(name, parent): (&String, &Parent)| {
        make_parent(core, name, parent, &cards).with_context(|| format!("parents.{name}"))
    };
    declared.iter().map(made).collect()
}

fn make_parent(
    core: &Core,
    name: &str,
    parent: &Parent,
    cards: &Cards,
) -> anyhow::Result<Arc<mdev::Parent>> {
    if matches!(name, "" | "." | "..") || name.contains(|c: char| c == '/' || c.is_control()) {
        bail!("a parent is a directory in sysfs, and this can be the name of none");
    }
    let driver = match (parent.driver, name) {
        (Some(driver), _) => driver,
        (None, "mtty") => Driver::Mtty,
        (None, "mdpy") => Driver::Mdpy,
        (None, _) => bail!("say which driver, mtty or mdpy"),
    };
    let made = match driver {
        Driver::Mtty => {
            if parent.count.is_some() {
                bail!("count is for mdpy");
            }
            let device = BusDevice::virtual_class("mtty", name);
            device.add(core)?;
            let driver = mtty::Driver::new().with_wiring(wire(parent.ports.clone(), cards));
            mdev::Parent::register::<mtty::Driver>(core, &device, driver)
        }
        Driver::Mdpy => {
            if parent.ports.is_some() {
                bail!("ports are for mtty");
            }
            let device = BusDevice::virtual_class("mdpy", name);
            device.add(core)?;
            let driver = parent
                .count
                .map_or_else(mdpy::Driver::default, mdpy::Driver::new);
            mdev::Parent::register::<mdpy::Driver>(core, &device, driver)
        }
    };
    Ok(made?)
}

/// Where the ports of a card lead: what was said of the card, else of the parent, else back.
fn wire(
    default: Option<Port>,
    cards: &Cards,
) -> impl Fn(&str, usize) -> BackendSpec + Send + Sync + 'static {
    let cards = Arc::clone(cards);
    move |uuid, port| {
        let own = cards.get(uuid).and_then(|ports| ports.get(port));
        let Some(chosen) = own.or(default.as_ref()) else {
            return BackendSpec::Loopback;
        };
        chosen.backend(uuid, port).unwrap_or_else(|error| {
            tracing::warn!("mtty {uuid}: port {port} loops back: {error}");
            BackendSpec::Loopback
        })
    }
}

/// Makes the mediated devices that the configuration names.
///
/// # Errors
/// The first that cannot be made, and why.
pub(crate) fn start_mdevs(config: &Config, parents: &[Arc<mdev::Parent>]) -> anyhow::Result<()> {
    for (uuid, wanted) in &config.mdevs {
        make_mdev(parents, *uuid, wanted).with_context(|| format!("mdevs.{uuid}"))?;
    }
    Ok(())
}

fn make_mdev(parents: &[Arc<mdev::Parent>], uuid: Uuid, wanted: &Mdev) -> anyhow::Result<()> {
    let (parent, ty) = place_of(parents, wanted)?;
    parent.create(ty, uuid)?;
    Ok(())
}

/// Looks whether the mediated devices of the configuration could be made.
///
/// # Errors
/// The first that could not, and why.
pub(crate) fn check_mdevs(config: &Config, parents: &[Arc<mdev::Parent>]) -> anyhow::Result<()> {
    for (uuid, wanted) in &config.mdevs {
        place_of(parents, wanted).with_context(|| format!("mdevs.{uuid}"))?;
    }
    Ok(())
}

/// The parent that a device is to be made of, and the type's number.
fn place_of<'a>(
    parents: &'a [Arc<mdev::Parent>],
    wanted: &Mdev,
) -> anyhow::Result<(&'a Arc<mdev::Parent>, usize)> {
    let name = wanted.parent.as_deref();
    let ty = &wanted.mdev_type;
    let named =
        |parent: &&Arc<mdev::Parent>| name.is_none_or(|name| parent.device().name() == name);
    let Some((parent, number)) = type_named(parents, name, ty) else {
        let types: Vec<&str> = parents
            .iter()
            .filter(named)
            .flat_map(|parent| parent.type_names())
            .collect();
        match name {
            Some(name) if types.is_empty() => bail!("there is no parent {name}"),
            Some(name) => bail!("{name} has no type {ty:?}; it has {}", types.join(", ")),
            None => bail!(
                "no parent has the type {ty:?}; there are {}",
                types.join(", ")
            ),
        }
    };
    if !wanted.ports.is_empty() && parent.driver().name() != mtty::Mtty::NAME {
        bail!("ports are for mtty; {ty} has none");
    }
    Ok((parent, number))
}

/// The parent, of this name if there is one, that has a type.
pub(crate) fn type_named<'a>(
    parents: &'a [Arc<mdev::Parent>],
    name: Option<&str>,
    mdev_type: &str,
) -> Option<(&'a Arc<mdev::Parent>, usize)> {
    parents
        .iter()
        .filter(|parent| name.is_none_or(|name| parent.device().name() == name))
        .find_map(|parent| Some((parent, parent.type_named(mdev_type)?)))
}
