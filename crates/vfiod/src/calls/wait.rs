//! Calls that wait for the end of a device.

use super::failure::{Stop, errno_failure, fail};
use super::{Server, TICK, one};
use crate::control::Peer;
use crate::devices::Found;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vfio_core::device::{Device, Life, Policy};
use vfio_core::event::{Notice, What};
use vfio_core::model::{Outcome, Waiting};
use vfiod_control::view::State;
use vfiod_control::{Answer, End, FailureKind, UnregisterPolicy};

/// How often a client that waits is told for what.
const PROGRESS: Duration = Duration::from_secs(10);

impl Server {
    /// Has a device go, and waits as the policy says. If the client closes, it goes on.
    pub(super) fn leave(
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
    pub(super) fn wait_gone(
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
                    Ok(view) if view.state == State::Registered => {
                        format!("registered; `vfioctl unbind {label}` makes it go")
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
}
