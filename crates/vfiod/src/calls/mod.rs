//! What the control socket answers.

mod failure;
mod make;
mod merge;
mod stream;
mod wait;

pub(crate) use merge::Merge;

use crate::config::Uevents;
use crate::control::Peer;
use crate::devices::{self, Found, Look, Requests};
use crate::vfio_user::Sockets;
use failure::{Stop, fail, not_found};
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};
use vfio_core::Core;
use vfio_core::event::Notice;
use vfio_core::model::mdev;
use vfio_fuse::Mounts;
use vfiod_control::view::Status;
use vfiod_control::{Answer, Call, End, Failure, FailureKind};

/// How often a thread that waits looks whether its client is still there.
const TICK: Duration = Duration::from_millis(100);

/// What answers.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) core: Core,
    pub(crate) mounts: Arc<RwLock<Option<Mounts>>>,
    pub(crate) merge: Mutex<Merge>,
    pub(crate) requests: Requests,
    pub(crate) sockets: Sockets,
    pub(crate) sys: PathBuf,
    pub(crate) dev: PathBuf,
    pub(crate) uevents: Uevents,
    pub(crate) started: Instant,
}

impl Server {
    /// Answers a call.
    ///
    /// # Errors
    /// When the client is gone; what went wrong with the call is an answer.
    pub(crate) fn answer(&self, call: Call, peer: &Peer<'_>) -> io::Result<()> {
        match self.handle(call, peer) {
            Ok(answer) => peer.send(answer),
            Err(Stop::Failure(failure)) => peer.send(Answer::Error(failure)),
            Err(Stop::Gone(error)) => Err(error),
        }
    }

    fn handle(&self, call: Call, peer: &Peer<'_>) -> Result<Answer, Stop> {
        match call {
            Call::Status => Ok(Answer::Status(self.look(|look| self.status(look)))),
            Call::List => Ok(Answer::Devices(self.look(|look| {
                look.all_with_holders()
                    .into_iter()
                    .map(|found| found.view)
                    .collect()
            }))),
            Call::Tree => Ok(Answer::Tree(self.look(|look| look.tree()))),
            Call::Types { parent } => self.types(parent.as_deref()),
            Call::Show { device } => {
                let show = self.look(|look| one(look, &device).map(|found| look.show(&found)))?;
                Ok(Answer::Show(Box::new(show)))
            }
            Call::Who { device } => {
                let holders = self.look(|look| {
                    let found = one(look, &device)?;
                    Ok::<_, Failure>(found.vfio.map(|vfio| look.who(&vfio)).unwrap_or_default())
                })?;
                Ok(Answer::Holders(holders))
            }
            Call::Pending => Ok(Answer::Pending(self.look(|look| look.pending()))),
            Call::Start {
                parent,
                mdev_type,
                uuid,
            } => self.start(parent.as_deref(), &mdev_type, uuid.as_deref()),
            Call::Bind { device, driver } => self.bind(&device, driver.as_deref()),
            Call::Stop { device, policy } => {
                let found = self.look(|look| one(look, &device))?;
                if found.bus_device.mdev().is_none() {
                    return Err(fail(
                        FailureKind::Usage,
                        format!(
                            "{device} is no mediated device; `vfioctl unbind` takes its driver off"
                        ),
                    )
                    .into());
                }
                self.leave(found, policy, peer, |server, found, policy| {
                    mdev::remove(&server.core, &found.bus_device, policy)
                })
            }
            Call::Unbind { device, policy } => {
                let found = self.look(|look| one(look, &device))?;
                if found.waiting.is_none() && found.bus_device.driver().is_none() {
                    return Ok(Answer::Ended(End::default()));
                }
                self.leave(found, policy, peer, |server, found, policy| {
                    found.bus_device.unbind(&server.core, policy)
                })
            }
            Call::Offer { device, path } => self.offer(&device, path.as_deref(), peer),
            Call::Withdraw { device } => {
                let found = self.look(|look| one(look, &device))?;
                match found.vfio {
                    Some(vfio) if self.sockets.withdraw(&vfio) => Ok(Answer::Done),
                    _ => Err(not_found(&format!("{device} is not offered over vfio-user")).into()),
                }
            }
            Call::WaitGone { device, timeout_ms } => self.wait_gone(&device, timeout_ms, peer),
            Call::Events => self.stream(peer, |notice| match notice {
                Notice::Event(event) => Some(Answer::Event(devices::event(event))),
                Notice::Uevent(_) | Notice::GroupGone { .. } => None,
            }),
            Call::Uevents if self.uevents == Uevents::Host => Err(fail(
                FailureKind::Failed,
                "uevents = \"host\": they are sent to the machine's own network namespace"
                    .to_owned(),
            )
            .into()),
            Call::Uevents => self.stream(peer, |notice| match notice {
                Notice::Uevent(uevent) => Some(Answer::Uevent(crate::uevent::translate(uevent))),
                Notice::Event(_) | Notice::GroupGone { .. } => None,
            }),
            Call::MergeTree => self.merge_tree(),
        }
    }

    /// Runs `f` with what a look needs. The mounts are not stopped meanwhile.
    fn look<T>(&self, f: impl FnOnce(&Look<'_>) -> T) -> T {
        let mounts = self.mounts.read().unwrap_or_else(PoisonError::into_inner);
        f(&Look {
            core: &self.core,
            mounts: mounts.as_ref(),
            requests: &self.requests,
            sockets: Some(&self.sockets),
            sys: &self.sys,
            dev: &self.dev,
        })
    }

    fn status(&self, look: &Look<'_>) -> Status {
        let mounted = look.mounts.is_some();
        let place = |path: &PathBuf| mounted.then(|| path.to_string_lossy().into_owned());
        let config = self.core.config();
        let mut char_regions = BTreeMap::from([("vfio".to_owned(), config.group_major)]);
        if config.cdev {
            char_regions.insert("vfio-dev".to_owned(), config.cdev_major);
        }
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            sys: place(&self.sys),
            dev: place(&self.dev),
            char_regions,
            misc_devices: BTreeMap::from([
                ("vfio".to_owned(), 196),
                ("iommu".to_owned(), config.iommu_minor),
            ]),
            devices: u32::try_from(self.core.devices().len()).unwrap_or(u32::MAX),
            pending: u32::try_from(self.core.model().unregistering().len()).unwrap_or(u32::MAX),
            uptime_s: self.started.elapsed().as_secs(),
        }
    }

    fn waiting_for(&self, address: &str) -> Option<String> {
        let all = self.core.model().unregistering();
        let waiting = all.iter().find(|one| one.device().name() == address)?;
        Some(waiting.describe())
    }
}

/// The one device of this name.
fn one(look: &Look<'_>, name: &str) -> Result<Found, Failure> {
    let mut found = look.named(name);
    match found.len() {
        0 => Err(not_found(&format!(
            "{name}: no such device; `vfioctl list` has them all"
        ))),
        1 => found.pop().ok_or_else(|| not_found(name)),
        _ => {
            let all: Vec<&str> = found.iter().map(|one| one.view.label()).collect();
            Err(fail(
                FailureKind::Usage,
                format!("{name}: which of {}?", all.join(", ")),
            ))
        }
    }
}
