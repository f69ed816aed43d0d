//! Calls that make something of a device: it itself, its driver, its socket.

use super::failure::{Stop, errno_failure, fail, leaving, not_found};
use super::{Server, one};
use crate::control::Peer;
use rustix::io::Errno;
use std::path::Path;
use std::sync::Arc;
use uuid::Uuid;
use vfio_core::model::{BusDevice, Subsystem, mdev};
use vfiod_control::{Answer, Failure, FailureKind, Spec};

impl Server {
    pub(super) fn types(&self, parent: Option<&str>) -> Result<Answer, Stop> {
        let mut parents = self.look(|look| look.parents());
        if let Some(wanted) = parent {
            parents.retain(|parent| parent.name == wanted);
            if parents.is_empty() {
                return Err(not_found(&format!(
                    "{wanted}: no such parent; `vfioctl types` has all"
                ))
                .into());
            }
        }
        Ok(Answer::Types(parents))
    }

    pub(super) fn start(
        &self,
        parent: Option<&str>,
        id: &str,
        uuid: Option<&str>,
    ) -> Result<Answer, Stop> {
        let class = self.core.model().class("mdev_bus").unwrap_or_default();
        let mut fitting: Vec<(Arc<mdev::Parent>, usize)> = class
            .iter()
            .filter(|device| parent.is_none_or(|wanted| device.name() == wanted))
            .filter_map(|device| device.mdev_parent())
            .filter_map(|parent| {
                let ty = parent.type_named(id)?;
                Some((parent, ty))
            })
            .collect();
        let Some((parent, ty)) = fitting.pop() else {
            let why = match parent {
                None => "no parent has this type".to_owned(),
                Some(name) if class.iter().any(|device| device.name() == name) => {
                    format!("{name} has no such type")
                }
                Some(name) => format!("there is no parent {name}"),
            };
            return Err(not_found(&format!("{id}: {why}; `vfioctl types` has all")).into());
        };
        if !fitting.is_empty() {
            return Err(fail(
                FailureKind::Usage,
                format!("{id}: several parents have it, name one with --parent"),
            )
            .into());
        }
        let uuid = match uuid {
            Some(text) => Uuid::try_parse(text).map_err(|_| {
                let message = format!("{text:?} is no UUID; without --uuid a random one is taken");
                fail(FailureKind::Usage, message)
            })?,
            None => Uuid::new_v4(),
        };
        match parent.create(ty, uuid) {
            Ok(device) => Ok(Answer::Started {
                uuid: uuid.to_string(),
                device: device.vfio_device().map(|vfio| vfio.name()),
            }),
            Err(errno) => {
                let why = match errno {
                    Errno::EXIST => match self.waiting_for(&uuid.to_string()) {
                        Some(text) => format!("the UUID is in use by a device that is {text}"),
                        None => "the UUID is in use".to_owned(),
                    },
                    Errno::NOSPC | Errno::USERS => {
                        format!(
                            "{} has no more of them to give; `vfioctl stop` gives one back",
                            parent.device().name()
                        )
                    }
                    Errno::NODEV => "its parent is going".to_owned(),
                    other => other.to_string(),
                };
                Err(errno_failure(errno, format!("{id} {uuid}: {why}")).into())
            }
        }
    }

    pub(super) fn offer(
        &self,
        name: &str,
        path: Option<&str>,
        peer: &Peer<'_>,
    ) -> Result<Answer, Stop> {
        if path.is_some() && !peer.may_choose_paths() {
            return Err(fail(
                FailureKind::Usage,
                "another place for the socket is for root: it is made with the daemon's rights; \
                 leave --path out"
                    .to_owned(),
            )
            .into());
        }
        let found = self.look(|look| one(look, name))?;
        let Some(vfio) = &found.vfio else {
            return Err(fail(
                FailureKind::Busy,
                format!("{name} has no VFIO device; `vfioctl bind {name}` gives it one"),
            )
            .into());
        };
        if let Some(waiting) = &found.waiting {
            return Err(leaving(name, waiting).into());
        }
        match self.sockets.offer(vfio, path.map(Path::new)) {
            Ok(path) => Ok(Answer::Offered {
                path: path.to_string_lossy().into_owned(),
            }),
            Err(error) => Err(fail(FailureKind::Failed, format!("{name}: {error:#}")).into()),
        }
    }

    pub(super) fn bind(&self, name: &str, driver: Option<&str>) -> Result<Answer, Stop> {
        let device = self.bindable(name)?;
        if let Some(waiting) = self.core.model().unregistering_device(&device) {
            return Err(leaving(name, &waiting).into());
        }
        if let Some(bound) = device.driver() {
            return if driver.is_none_or(|wanted| wanted == bound.name()) {
                Ok(Answer::Done)
            } else {
                Err(errno_failure(
                    Errno::BUSY,
                    format!("{name} is bound to {}; unbind it first", bound.name()),
                )
                .into())
            };
        }
        let bus = match device.subsystem() {
            Some(Subsystem::Bus(bus)) => self.core.model().bus(bus),
            _ => None,
        };
        let Some(bus) = bus else {
            return Err(fail(FailureKind::Usage, format!("{name} is on no bus")).into());
        };
        let chosen = match (driver, device.mdev()) {
            (Some(driver), _) => Some(
                bus.driver(driver)
                    .ok_or_else(|| not_found(&format!("{} has no driver {driver}", bus.name())))?,
            ),
            (None, Some(mdev)) => Some(Arc::clone(mdev.parent().driver())),
            (None, None) => None,
        };
        let result = match &chosen {
            Some(driver) => device.bind(&self.core, driver),
            None => bus.attach(&self.core, &device),
        };
        result.map_err(|errno| {
            errno_failure(errno, format!("{name}: the driver refused it: {errno}"))
        })?;
        if device.driver().is_none() {
            return Err(
                not_found(&format!("{name}: no driver of {} is for it", bus.name())).into(),
            );
        }
        Ok(Answer::Done)
    }

    /// Any device on a bus, VFIO's or not.
    fn bindable(&self, name: &str) -> Result<Arc<BusDevice>, Failure> {
        match self.look(|look| one(look, name)) {
            Ok(found) => Ok(found.bus_device),
            Err(failure) => {
                let spec = Spec::parse(name, &self.sys, &self.dev);
                let mut buses = self.core.model().buses();
                let address = match spec {
                    Spec::Address(address) => address,
                    Spec::OnBus(bus, address) => {
                        buses.retain(|one| one.name() == bus);
                        address
                    }
                    _ => return Err(failure),
                };
                let device = buses.iter().find_map(|bus| bus.device(&address));
                device.ok_or(failure)
            }
        }
    }
}
