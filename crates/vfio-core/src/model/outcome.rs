//! What an operation that may have to wait for users returns.

use super::{BusDevice, lock};
use crate::device::{Device, Pending, Policy};
use crate::{Core, Result};
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How an operation stands when the call returns.
#[derive(Debug)]
#[must_use = "it may have failed, or still be going on"]
pub enum Outcome {
    /// It is over.
    Done(Result),
    /// It has begun, nothing can stop it, and it ends when the last user has gone.
    Waiting(Waiting),
}

impl Outcome {
    /// Calls `f` with the result: at once, here, if there is one.
    pub fn on_done(self, f: impl FnOnce(Result) + Send + 'static) {
        match self {
            Outcome::Done(result) => f(result),
            Outcome::Waiting(waiting) => waiting.on_done(f),
        }
    }

    /// Waits for the result for at most `time`; `None` if it is not there by then. Never on a
    /// thread that serves closes.
    pub fn wait_for(self, time: Duration) -> Option<Result> {
        match self {
            Outcome::Done(result) => Some(result),
            Outcome::Waiting(waiting) => waiting.wait_for(time),
        }
    }

    /// The result, if it is over.
    pub fn result(&self) -> Option<Result> {
        match self {
            Outcome::Done(result) => Some(*result),
            Outcome::Waiting(waiting) => waiting.result(),
        }
    }
}

/// An unbind or a removal that waits for users. Clones are the same one; dropping it changes
/// nothing.
#[derive(Clone)]
pub struct Waiting(Arc<Inner>);

struct Inner {
    device: Arc<BusDevice>,
    since: OnceLock<Instant>,
    progress: Mutex<Progress>,
    reached: Condvar,
}

type Callback = Box<dyn FnOnce(Result) + Send>;

#[derive(Default)]
struct Progress {
    result: Option<Result>,
    /// Threads in `wait_for`: without any there is nobody to wake.
    waiting: u32,
    callbacks: Vec<Callback>,
    pending: Option<Pending>,
    parts: Vec<Waiting>,
}

impl fmt::Debug for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waiting")
            .field("device", &self.0.device)
            .field("result", &self.result())
            .finish()
    }
}

impl Waiting {
    pub(crate) fn new(device: &Arc<BusDevice>) -> Waiting {
        Waiting(Arc::new(Inner {
            device: Arc::clone(device),
            since: OnceLock::new(),
            progress: Mutex::default(),
            reached: Condvar::new(),
        }))
    }

    /// The device that is unbound or removed; for the end of a parent, the parent.
    pub fn device(&self) -> &Arc<BusDevice> {
        &self.0.device
    }

    /// The VFIO devices that still have users and are not released.
    pub fn vfio_devices(&self) -> Vec<Device> {
        let (pending, parts) = self.snapshot();
        let mut devices: Vec<Device> = pending
            .filter(|pending| !pending.is_done())
            .and_then(|pending| pending.device())
            .into_iter()
            .collect();
        devices.extend(parts.iter().flat_map(Waiting::vfio_devices));
        devices
    }

    /// When it began.
    pub fn since(&self) -> Instant {
        *self.0.since.get_or_init(Instant::now)
    }

    /// The result, if it is over.
    pub fn result(&self) -> Option<Result> {
        lock(&self.0.progress).result
    }

    /// Calls `f` with the result: at once, here, if it is over, else on the thread that sees the
    /// last user go.
    pub fn on_done(&self, f: impl FnOnce(Result) + Send + 'static) {
        let mut progress = lock(&self.0.progress);
        match progress.result {
            Some(result) => {
                drop(progress);
                f(result);
            }
            None => progress.callbacks.push(Box::new(f)),
        }
    }

    /// Waits for the result for at most `time`; `None` if it is not there by then. Never on a
    /// thread that serves closes.
    pub fn wait_for(&self, time: Duration) -> Option<Result> {
        let mut progress = lock(&self.0.progress);
        progress.waiting += 1;
        let (mut progress, _) = self
            .0
            .reached
            .wait_timeout_while(progress, time, |progress| progress.result.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        progress.waiting -= 1;
        progress.result
    }

    /// Does not wait any longer: cuts the users off, who get `ENODEV` from now on. It is over
    /// when this returns.
    pub fn disassociate(&self) {
        let (pending, parts) = self.snapshot();
        if let Some(pending) = pending {
            pending.disassociate();
        }
        for part in parts {
            part.disassociate();
        }
    }

    /// Somebody else waits for the same users, with a policy of their own: the stricter holds. A
    /// deadline is kept to a fifth of a second.
    pub(crate) fn join(&self, core: &Core, policy: Policy) {
        match policy {
            Policy::Wait => {}
            Policy::Disassociate => self.disassociate(),
            Policy::WaitThenDisassociate(time) => {
                let begun = Instant::now();
                let waiting = self.clone();
                core.house().linger(Box::new(move || {
                    if waiting.result().is_some() {
                        return false;
                    }
                    let late = begun.elapsed() >= time;
                    if late {
                        waiting.disassociate();
                    }
                    !late
                }));
            }
        }
    }

    /// What it waits for, for people: which device, and who has it open.
    pub fn describe(&self) -> String {
        if let Some(result) = self.result() {
            return match result {
                Ok(()) => "unregistered".to_owned(),
                Err(errno) => format!("failed: {errno}"),
            };
        }
        let devices = self.vfio_devices();
        if devices.is_empty() {
            return "unregistering".to_owned();
        }
        let waits: Vec<String> = devices.iter().map(users_of).collect();
        format!("unregistering, waiting for {}", waits.join("; "))
    }

    pub(crate) fn set_pending(&self, pending: Pending) {
        lock(&self.0.progress).pending = Some(pending);
    }

    pub(crate) fn set_parts(&self, parts: Vec<Waiting>) {
        lock(&self.0.progress).parts = parts;
    }

    /// The end, reached once.
    pub(crate) fn finish(&self, result: Result) {
        let mut progress = lock(&self.0.progress);
        if progress.result.is_some() {
            return;
        }
        progress.result = Some(result);
        let callbacks = std::mem::take(&mut progress.callbacks);
        let pending = progress.pending.take();
        let parts = std::mem::take(&mut progress.parts);
        let waited_for = progress.waiting > 0;
        drop(progress);
        drop((pending, parts));
        if waited_for {
            self.0.reached.notify_all();
        }
        for callback in callbacks {
            callback(result);
        }
    }

    /// What the caller of the operation gets.
    pub(crate) fn outcome(self) -> Outcome {
        match self.result() {
            Some(result) => Outcome::Done(result),
            None => {
                // It did not end at once: from here on it matters when it began.
                self.since();
                Outcome::Waiting(self)
            }
        }
    }

    fn snapshot(&self) -> (Option<Pending>, Vec<Waiting>) {
        let progress = lock(&self.0.progress);
        (progress.pending.clone(), progress.parts.clone())
    }
}

impl Device {
    /// Who has it open, for people: `closed`, or `open: 1 user of vfio0: …`.
    pub fn describe_users(&self) -> String {
        match self.users() {
            0 => "closed".to_owned(),
            _ => format!("open: {}", users_of(self)),
        }
    }
}

/// `2 users of vfio3: qemu-system-x86 (pid 812), bench (pid 820)`.
fn users_of(device: &Device) -> String {
    let openers = device.opened_by();
    let count = device.users();
    let users = if count == 1 { "user" } else { "users" };
    let who = if openers.is_empty() {
        String::new()
    } else {
        format!(": opened by {openers}")
    };
    format!("{count} {users} of {}{who}", device.name())
}
