//! A place for one device inside a structure that somebody else owns: what vfio-ccw needed.
//!
//! In the series the ccw driver could not allocate its `vfio_device`: it sat inside a structure
//! of the parent's life time, was zeroed by its own `release`, and a completion told the parent's
//! `remove` when the structure could be freed. Here the device's state holds an `Arc` of what
//! the owner shares with it, and a [`ReleaseSlot`] of the owner's says whether a device occupies
//! the place: a second one is refused until the first is *released* (not merely unregistered),
//! and the owner can wait for that moment before it reuses or frees anything.

use crate::sync::{Condvar, Mutex, lock};
use crate::{Errno, Result};
use std::sync::Arc;

/// The owner's side. At most one device at a time.
#[derive(Debug, Default)]
pub struct ReleaseSlot {
    busy: Mutex<bool>,
    vacant: Condvar,
}

/// The device's side, held until after the driver's release.
#[derive(Debug)]
pub(crate) struct SlotLease(Arc<ReleaseSlot>);

impl ReleaseSlot {
    /// A vacant slot.
    pub fn new() -> Arc<ReleaseSlot> {
        Arc::new(ReleaseSlot::default())
    }

    /// Takes the place. `EBUSY` while a device is in it, up to and including its release.
    pub(crate) fn take(self: &Arc<Self>) -> Result<SlotLease> {
        let mut busy = lock(&self.busy);
        if *busy {
            return Err(Errno::BUSY);
        }
        *busy = true;
        drop(busy);
        Ok(SlotLease(Arc::clone(self)))
    }

    /// True when no device is in it.
    pub fn is_vacant(&self) -> bool {
        !*lock(&self.busy)
    }

    /// Returns when no device is in it: the driver's state is dropped, no callback runs or will
    /// run. Never call it on a thread that serves closes, or on one that holds a reference to
    /// the device: it would wait for itself.
    pub fn wait_vacant(&self) {
        let mut busy = lock(&self.busy);
        while *busy {
            busy = self
                .vacant
                .wait(busy)
                .unwrap_or_else(|poison| poison.into_inner());
        }
    }
}

impl Drop for SlotLease {
    fn drop(&mut self) {
        *lock(&self.0.busy) = false;
        self.0.vacant.notify_all();
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;

    #[test]
    fn second_refused_until_the_first_has_left() {
        let slot = ReleaseSlot::new();
        let lease = slot.take().unwrap();
        assert!(!slot.is_vacant());
        assert_eq!(slot.take().unwrap_err(), Errno::BUSY);
        let waiter = std::thread::spawn({
            let slot = Arc::clone(&slot);
            move || slot.wait_vacant()
        });
        assert!(!waiter.is_finished());
        drop(lease);
        waiter.join().unwrap();
        assert!(slot.is_vacant());
        slot.take().unwrap();
    }
}

#[cfg(all(test, feature = "shuttle"))]
mod explored {
    use super::*;

    #[test]
    fn one_at_a_time_and_every_waiter_wakes() {
        shuttle::check_random(
            || {
                let slot = ReleaseSlot::new();
                let first = slot.take().unwrap();
                let waiter = shuttle::thread::spawn({
                    let slot = Arc::clone(&slot);
                    move || slot.wait_vacant()
                });
                let taker = shuttle::thread::spawn({
                    let slot = Arc::clone(&slot);
                    move || slot.take().is_ok()
                });
                drop(first);
                waiter.join().unwrap();
                taker.join().unwrap();
                assert!(slot.is_vacant());
            },
            5_000,
        );
    }
}
