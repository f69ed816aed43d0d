//! Who is inside something that may be taken away.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

/// Set while nobody new may enter.
const CLOSED: u32 = 1 << 31;

/// Counts those inside; can be closed, waited for with a deadline, and opened again.
///
/// An access to memory that never answers stays inside for as long as its owner likes. So nothing
/// that a client can call waits here without a deadline, and no lock is held by those inside.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    count: AtomicU32,
    lock: Mutex<()>,
    drained: Condvar,
}

impl Gate {
    /// One more inside, unless it is closed. Paired with [`leave`](Gate::leave).
    pub(crate) fn enter(&self) -> bool {
        if self.count.fetch_add(1, Ordering::AcqRel) & CLOSED == 0 {
            return true;
        }
        self.leave();
        false
    }

    /// One less.
    pub(crate) fn leave(&self) {
        if self.count.fetch_sub(1, Ordering::AcqRel) == CLOSED | 1 {
            // Under the lock, so that a waiter has either not looked yet or is waiting.
            drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
            self.drained.notify_all();
        }
    }

    /// Nobody new. False if it was closed before.
    pub(crate) fn close(&self) -> bool {
        self.count.fetch_or(CLOSED, Ordering::AcqRel) & CLOSED == 0
    }

    /// The end of a close that did not work out.
    pub(crate) fn reopen(&self) {
        self.count.fetch_and(!CLOSED, Ordering::AcqRel);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.count.load(Ordering::Acquire) & CLOSED != 0
    }

    /// True if nobody is inside.
    pub(crate) fn is_idle(&self) -> bool {
        self.count.load(Ordering::Acquire) & !CLOSED == 0
    }

    /// Waits until nobody is inside; false if the deadline came first. To be called when closed.
    pub(crate) fn wait_until(&self, deadline: Instant) -> bool {
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while !self.is_idle() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            (guard, _) = self
                .drained
                .wait_timeout(guard, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::Duration;

    #[test]
    fn closed_is_closed_until_reopened() {
        let gate = Gate::default();
        assert!(gate.enter());
        assert!(gate.close());
        assert!(!gate.close());
        assert!(!gate.enter());
        assert!(!gate.is_idle(), "the refused one left again");
        assert!(!gate.wait_until(Instant::now() + Duration::from_millis(5)));
        gate.reopen();
        assert!(gate.enter());
        gate.leave();
        gate.leave();
        assert!(gate.is_idle());
    }

    #[test]
    fn a_waiter_sees_the_last_one_leave() {
        for _ in 0..200 {
            let gate = Arc::new(Gate::default());
            assert!(gate.enter());
            let inside = Arc::clone(&gate);
            let leaver = std::thread::spawn(move || inside.leave());
            gate.close();
            assert!(gate.wait_until(Instant::now() + Duration::from_secs(20)));
            leaver.join().unwrap();
        }
    }
}
