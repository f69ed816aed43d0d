//! A device and its driver (`drivers/base/dd.c`).

use super::{BusDevice, Phase};
use crate::device::{Policy, Registration, Unregistering};
use crate::model::bus::Driver;
use crate::model::{Model, Outcome, Waiting, lock};
use crate::{Core, Errno, Result};
use std::sync::Arc;

#[derive(Default)]
pub(super) enum Binding {
    #[default]
    Unbound,
    /// The driver's probe runs.
    Probing(Arc<Driver>),
    Bound(Arc<Driver>, Registration),
    /// The driver lets go; its VFIO device may have users.
    Unbinding(Waiting),
}

impl BusDevice {
    /// The driver it is bound to, or is being bound to. `None` as soon as unbind has begun.
    pub fn driver(&self) -> Option<Arc<Driver>> {
        match &lock(&self.state).binding {
            Binding::Probing(driver) | Binding::Bound(driver, _) => Some(Arc::clone(driver)),
            Binding::Unbound | Binding::Unbinding(_) => None,
        }
    }

    /// The unbind that waits for users.
    pub fn unbinding(&self) -> Option<Waiting> {
        match &lock(&self.state).binding {
            Binding::Unbinding(waiting) => Some(waiting.clone()),
            _ => None,
        }
    }

    /// The only driver it may be bound to, if somebody wrote one to `driver_override`.
    pub fn driver_override(&self) -> Option<Arc<str>> {
        lock(&self.state).driver_override.clone()
    }

    /// Sets or clears the override. It has no effect on the driver it is bound to now.
    pub fn set_driver_override(&self, driver: Option<&str>) {
        lock(&self.state).driver_override = driver.map(Arc::from);
    }

    /// `device_driver_attach()`: binds it to `driver`, whether or not that is for it. `EBUSY`
    /// when it has a driver, or one that still waits for its users; `ENODEV` when it is going;
    /// else what the probe says.
    pub fn bind(self: &Arc<Self>, core: &Core, driver: &Arc<Driver>) -> Result {
        {
            let mut state = lock(&self.state);
            if !matches!(state.phase, Phase::Present) {
                return Err(Errno::NODEV);
            }
            if !matches!(state.binding, Binding::Unbound) {
                return Err(Errno::BUSY);
            }
            state.binding = Binding::Probing(Arc::clone(driver));
        }
        let probed = driver.probe(core, self);
        let mut state = lock(&self.state);
        match probed {
            Ok(registration) => {
                state.binding = Binding::Bound(Arc::clone(driver), registration);
                drop(state);
                self.uevent(core, "bind", Vec::new());
                Ok(())
            }
            Err(errno) => {
                state.binding = Binding::Unbound;
                drop(state);
                tracing::debug!("{} {}: probe failed: {errno}", driver.name(), self.name());
                Err(errno)
            }
        }
    }

    /// `device_release_driver()`: its driver lets go, which waits for users as `policy` says. On
    /// return the `driver` link is gone and its VFIO device takes no new users. `ENODEV` when it
    /// has no driver, `EAGAIN` while the probe runs.
    pub fn unbind(self: &Arc<Self>, core: &Core, policy: Policy) -> Outcome {
        let waiting = Waiting::new(self);
        let registration = {
            let mut state = lock(&self.state);
            match std::mem::take(&mut state.binding) {
                Binding::Bound(_, registration) => {
                    state.binding = Binding::Unbinding(waiting.clone());
                    registration
                }
                other => {
                    let errno = match other {
                        Binding::Probing(_) => Errno::AGAIN,
                        _ => Errno::NODEV,
                    };
                    state.binding = other;
                    return Outcome::Done(Err(errno));
                }
            }
        };
        let unregistering = registration.unregister();
        if unregistering.is_done() {
            self.is_let_go(core, unregistering);
            waiting.finish(Ok(()));
            return Outcome::Done(Ok(()));
        }
        let end = waiting.clone();
        self.let_go(core, unregistering, policy, &waiting, move || {
            end.finish(Ok(()));
        });
        waiting.outcome()
    }

    /// Nobody had its VFIO device open, which is the rule: the driver's part is over. The last
    /// reference goes before the end is told.
    fn is_let_go(&self, core: &Core, unregistering: Unregistering) {
        drop(unregistering);
        lock(&self.state).binding = Binding::Unbound;
        self.uevent(core, "unbind", Vec::new());
    }

    /// The remove callback of every VFIO driver: unregister, and when the users have gone the
    /// device has no driver and `then` runs.
    pub(super) fn let_go(
        self: &Arc<Self>,
        core: &Core,
        unregistering: Unregistering,
        policy: Policy,
        waiting: &Waiting,
        then: impl FnOnce() + Send + 'static,
    ) {
        if unregistering.is_done() {
            self.is_let_go(core, unregistering);
            then();
            return;
        }
        let noted = policy != Policy::Disassociate;
        if noted {
            core.model().note_leaving(self, waiting);
        }
        let device = Arc::clone(self);
        let whole = core.clone();
        let pending = unregistering.proceed(policy, move || {
            if noted {
                whole.model().forget_leaving(&device);
            }
            lock(&device.state).binding = Binding::Unbound;
            device.uevent(&whole, "unbind", Vec::new());
            then();
        });
        if !pending.is_done() {
            waiting.set_pending(pending);
        }
    }
}

impl Model {
    fn note_leaving(&self, device: &BusDevice, waiting: &Waiting) {
        lock(&self.leaving).insert(device.id, waiting.clone());
    }

    fn forget_leaving(&self, device: &BusDevice) {
        let gone = lock(&self.leaving).remove(&device.id);
        drop(gone);
    }
}
