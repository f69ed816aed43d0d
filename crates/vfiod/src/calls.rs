//! What the control socket answers.

use crate::config::Uevents;
use crate::control::Peer;
use crate::devices::{self, Found, Look, Requests};
use crate::vfio_user::Sockets;
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};
use uuid::Uuid;
use vfio_core::Core;
use vfio_core::device::{Device, Life, Policy};
use vfio_core::event::{Notice, What};
use vfio_core::model::{Outcome, Waiting, mdev};
use vfio_fuse::Mounts;
use vfiod_control::view::{State, Status};
use vfiod_control::{Answer, Call, End, Failure, FailureKind, UnregisterPolicy};

/// How often a thread that waits looks whether its client is still there.
const TICK: Duration = Duration::from_millis(100);
/// How often a client that waits is told for what.
const PROGRESS: Duration = Duration::from_secs(10);
/// Events that may wait for a slow reader.
const QUEUE: usize = 8192;

/// The merge tree.
#[derive(Debug, Default)]
pub(crate) enum Merge {
    /// Nobody has asked for it.
    #[default]
    Unasked,
    /// Mounted.
    Mounted { _sys: vfio_fuse::Sys },
    /// The daemon is stopping: it is mounted no more.
    Over,
}

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

/// Why a call failed, or that the client is gone.
enum Stop {
    Failure(Failure),
    Gone(io::Error),
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Stop {
        Stop::Failure(failure)
    }
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Stop {
        Stop::Gone(error)
    }
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

    fn types(&self, parent: Option<&str>) -> Result<Answer, Stop> {
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

    fn start(&self, parent: Option<&str>, id: &str, uuid: Option<&str>) -> Result<Answer, Stop> {
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
            return Err(not_found(&format!(
                "{id}: {} has this type; `vfioctl types` has all",
                parent.unwrap_or("no parent")
            ))
            .into());
        };
        if !fitting.is_empty() {
            return Err(fail(
                FailureKind::Usage,
                format!("{id}: several parents have it, name one with --parent"),
            )
            .into());
        }
        let uuid = match uuid {
            Some(text) => Uuid::try_parse(text).map_err(|error| {
                fail(FailureKind::Usage, format!("{text:?} is no UUID: {error}"))
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
                        format!("{} has no more of them to give", parent.device().name())
                    }
                    Errno::NODEV => "its parent is going".to_owned(),
                    other => other.to_string(),
                };
                Err(errno_failure(errno, format!("{id} {uuid}: {why}")).into())
            }
        }
    }

    fn offer(&self, name: &str, path: Option<&str>, peer: &Peer<'_>) -> Result<Answer, Stop> {
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
            return Err(
                errno_failure(Errno::BUSY, format!("{name} is {}", waiting.describe())).into(),
            );
        }
        match self.sockets.offer(vfio, path.map(Path::new)) {
            Ok(path) => Ok(Answer::Offered {
                path: path.to_string_lossy().into_owned(),
            }),
            Err(error) => Err(fail(FailureKind::Failed, format!("{name}: {error:#}")).into()),
        }
    }

    fn waiting_for(&self, address: &str) -> Option<String> {
        let all = self.core.model().unregistering();
        let waiting = all.iter().find(|one| one.device().name() == address)?;
        Some(waiting.describe())
    }

    fn bind(&self, name: &str, driver: Option<&str>) -> Result<Answer, Stop> {
        let device = self.bindable(name)?;
        if let Some(waiting) = self.core.model().unregistering_device(&device) {
            return Err(
                errno_failure(Errno::BUSY, format!("{name} is {}", waiting.describe())).into(),
            );
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
            Some(vfio_core::model::Subsystem::Bus(bus)) => self.core.model().bus(bus),
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
    fn bindable(&self, name: &str) -> Result<Arc<vfio_core::model::BusDevice>, Failure> {
        match self.look(|look| one(look, name)) {
            Ok(found) => Ok(found.bus_device),
            Err(failure) => {
                let spec = vfiod_control::Spec::parse(name, &self.sys, &self.dev);
                let mut buses = self.core.model().buses();
                let address = match spec {
                    vfiod_control::Spec::Address(address) => address,
                    vfiod_control::Spec::OnBus(bus, address) => {
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

    /// Has a device go, and waits as the policy says. If the client closes, it goes on.
    fn leave(
        &self,
        found: Found,
        policy: UnregisterPolicy,
        peer: &Peer<'_>,
        begin: impl FnOnce(&Server, &Found, Policy) -> Outcome,
    ) -> Result<Answer, Stop> {
        let name = found.view.label().to_owned();
        let deadline = match policy {
            UnregisterPolicy::Timeout { ms } => {
                Instant::now().checked_add(Duration::from_millis(ms))
            }
            _ => None,
        };
        let cut_off = Arc::new(AtomicBool::new(false));
        let _watch = found.vfio.as_ref().map(|device| {
            let (index, cut_off) = (device.index(), Arc::clone(&cut_off));
            self.core.subscribe(move |notice| {
                if let Notice::Event(event) = notice
                    && event.index == index
                    && event.what == What::Disassociated
                {
                    cut_off.store(true, Ordering::Release);
                }
            })
        });
        let Found { waiting, vfio, .. } = &found;
        let waiting = match waiting {
            // Somebody has begun it; the policy can only make it shorter.
            Some(waiting) => waiting.clone(),
            None => {
                let policy = match policy {
                    UnregisterPolicy::Wait => Policy::Wait,
                    UnregisterPolicy::Timeout { ms } => {
                        Policy::WaitThenDisassociate(Duration::from_millis(ms))
                    }
                    UnregisterPolicy::Force => Policy::Disassociate,
                };
                match begin(self, &found, policy) {
                    Outcome::Done(result) => {
                        result.map_err(|errno| errno_failure(errno, format!("{name}: {errno}")))?;
                        return Ok(Answer::Ended(End {
                            users_cut_off: cut_off.load(Ordering::Acquire),
                        }));
                    }
                    Outcome::Waiting(waiting) => waiting,
                }
            }
        };
        let weak = vfio.as_ref().map(Device::downgrade);
        // What is waited for must not be kept from its release by the one who waits.
        drop(found);
        if policy == UnregisterPolicy::Force {
            waiting.disassociate();
        }
        let state = || {
            let device = weak.as_ref()?.upgrade()?;
            Some((device.users(), device.asked()))
        };
        let progress = |waiting: &Waiting| {
            let device = weak.as_ref()?.upgrade()?;
            let mut pending = self.look(|look| look.pending_of(waiting, &device));
            pending.deadline_ms = deadline.map(|end| {
                let left = end.saturating_duration_since(Instant::now());
                u64::try_from(left.as_millis()).unwrap_or(u64::MAX)
            });
            Some(pending)
        };
        let mut told: Option<(_, Instant)> = None;
        loop {
            if let Some(result) = waiting.wait_for(TICK) {
                result.map_err(|errno| errno_failure(errno, format!("{name}: {errno}")))?;
                return Ok(Answer::Ended(End {
                    users_cut_off: cut_off.load(Ordering::Acquire),
                }));
            }
            if !peer.is_there() {
                return Err(Stop::Gone(io::ErrorKind::BrokenPipe.into()));
            }
            if deadline.is_some_and(|end| Instant::now() >= end) {
                waiting.disassociate();
                continue;
            }
            let now = state();
            let news = told.is_none_or(|(before, at)| before != now || at.elapsed() >= PROGRESS);
            if news && let Some(pending) = progress(&waiting) {
                told = Some((now, Instant::now()));
                peer.send(Answer::Progress(pending))?;
            }
        }
    }

    /// Until the device is released.
    fn wait_gone(
        &self,
        name: &str,
        timeout_ms: Option<u64>,
        peer: &Peer<'_>,
    ) -> Result<Answer, Stop> {
        let end = timeout_ms.and_then(|ms| Instant::now().checked_add(Duration::from_millis(ms)));
        let found = match self.look(|look| one(look, name)) {
            Ok(found) => found,
            Err(failure) if failure.kind == FailureKind::NotFound => {
                return Ok(Answer::Ended(End::default()));
            }
            Err(failure) => return Err(failure.into()),
        };
        let Some(device) = found.vfio.as_ref().map(Device::downgrade) else {
            return Ok(Answer::Ended(End::default()));
        };
        let label = found.view.label().to_owned();
        drop(found);
        let mut dead = false;
        loop {
            // Looked at often and held for no time: a reference would put the release off.
            match device.upgrade() {
                None => {
                    return Ok(Answer::Ended(End {
                        users_cut_off: dead,
                    }));
                }
                Some(device) => dead = device.life() == Life::Dead,
            }
            if end.is_some_and(|end| Instant::now() >= end) {
                let view = self.look(|look| one(look, &label)).map(|found| found.view);
                let why = match view {
                    Ok(view) if view.state == State::Unregistering => {
                        self.waiting_for(&view.address).unwrap_or_default()
                    }
                    Ok(view) => view.state.as_str().to_owned(),
                    Err(_) => "not released".to_owned(),
                };
                return Err(fail(
                    FailureKind::Timeout,
                    format!("{label} is still there: {why}"),
                )
                .into());
            }
            if !peer.is_there() {
                return Err(Stop::Gone(io::ErrorKind::BrokenPipe.into()));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends what `pick` makes of notices until the client closes. A queue lies between, so that a
    /// slow reader holds up nothing in the core; when it is full, the reader is told what it lost.
    fn stream(
        &self,
        peer: &Peer<'_>,
        pick: impl Fn(&Notice) -> Option<Answer> + Send + Sync + 'static,
    ) -> Result<Answer, Stop> {
        let (sender, receiver) = sync_channel::<Answer>(QUEUE);
        let lost = Arc::new(AtomicU64::new(0));
        let _subscription = {
            let lost = Arc::clone(&lost);
            self.core.subscribe(move |notice| {
                if let Some(answer) = pick(notice)
                    && sender.try_send(answer).is_err()
                {
                    lost.fetch_add(1, Ordering::AcqRel);
                }
            })
        };
        peer.send(Answer::Subscribed)?;
        loop {
            match receiver.recv_timeout(TICK) {
                Ok(answer) => peer.send(answer)?,
                Err(RecvTimeoutError::Timeout) => {
                    let count = lost.swap(0, Ordering::AcqRel);
                    if count > 0 {
                        peer.send(Answer::Lost { count })?;
                    }
                    if !peer.is_there() {
                        return Err(Stop::Gone(io::ErrorKind::BrokenPipe.into()));
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Stop::Gone(io::ErrorKind::BrokenPipe.into()));
                }
            }
        }
    }

    /// Takes the merge tree away, if it was ever asked for.
    pub(crate) fn unmount_merge(&self) {
        let mut merge = self.merge.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *merge, Merge::Over);
        drop(merge);
        drop(before);
    }

    /// Mounts the merge tree at the first request; it stays as long as the daemon.
    fn merge_tree(&self) -> Result<Answer, Stop> {
        let mut merge = self.merge.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.sys.with_file_name("merge");
        if let Merge::Over = *merge {
            return Err(fail(FailureKind::Failed, "vfiod is stopping".to_owned()).into());
        }
        if let Merge::Unasked = *merge {
            crate::daemon::clear_stale(&path);
            let made = vfio_fuse::Sys::merged(
                &self.core,
                &path,
                Path::new("/sys"),
                crate::daemon::own_ids(),
            );
            let sys = made.map_err(|errno| {
                errno_failure(errno, format!("cannot mount {}: {errno}", path.display()))
            })?;
            *merge = Merge::Mounted { _sys: sys };
        }
        Ok(Answer::Merge {
            path: path.to_string_lossy().into_owned(),
        })
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

fn fail(kind: FailureKind, message: String) -> Failure {
    Failure {
        kind,
        errno: None,
        message,
    }
}

fn not_found(message: &str) -> Failure {
    fail(FailureKind::NotFound, message.to_owned())
}

fn errno_failure(errno: Errno, message: String) -> Failure {
    let (kind, name) = match errno {
        Errno::NODEV => (FailureKind::NotFound, "ENODEV"),
        Errno::NOENT => (FailureKind::NotFound, "ENOENT"),
        Errno::BUSY => (FailureKind::Busy, "EBUSY"),
        Errno::AGAIN => (FailureKind::Busy, "EAGAIN"),
        Errno::EXIST => (FailureKind::Busy, "EEXIST"),
        Errno::NOSPC => (FailureKind::Busy, "ENOSPC"),
        Errno::USERS => (FailureKind::Busy, "EUSERS"),
        Errno::INVAL => (FailureKind::Failed, "EINVAL"),
        Errno::MFILE => (FailureKind::Failed, "EMFILE"),
        Errno::NOMEM => (FailureKind::Failed, "ENOMEM"),
        _ => (FailureKind::Failed, ""),
    };
    let message = if errno == Errno::MFILE {
        format!("{message}; {}", crate::daemon::FILES_ADVICE)
    } else {
        message
    };
    Failure {
        kind,
        errno: Some(name.to_owned()).filter(|name| !name.is_empty()),
        message,
    }
}
