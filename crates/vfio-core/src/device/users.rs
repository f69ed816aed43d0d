//! Users of a registered device: the kernel's `vfio_device.refcount` and `comp`.
//!
//! This count is not the count of references to the object (that is `Arc`'s): it says how many
//! open files a registered device has, and it is what unregister waits for.

use crate::sync::{AtomicU32, Condvar, Mutex, Ordering, lock};
use crate::{Errno, Result};
use std::sync::Arc;
use std::time::Duration;

/// Set once unregister has begun; nobody new may come in.
const CLOSED: u32 = 1 << 31;

/// The gate and the count behind it.
#[derive(Debug)]
pub(crate) struct Users {
    /// 0 before register and when all have gone; else 1 for the registration while it stands,
    /// plus one per user. `CLOSED` is never taken back: a device is registered at most once.
    count: AtomicU32,
    rundown: Mutex<Option<Arc<Rundown>>>,
}

/// One user. Dropping it may complete an unregister, on this thread.
#[derive(Debug)]
pub(crate) struct Lease(Arc<Users>);

/// The end of an unregister: reached once, waited for by any number.
#[derive(Default)]
pub(crate) struct Rundown {
    /// 1 when it is reached. Set under the lock, read with or without.
    done: AtomicU32,
    state: Mutex<RundownState>,
    reached: Condvar,
}

#[derive(Default)]
struct RundownState {
    reaching: bool,
    cut: bool,
    /// Threads in `wait` or `wait_for`: without any there is nobody to wake.
    waiting: u32,
    callbacks: Vec<Box<dyn FnOnce() + Send>>,
}

impl std::fmt::Debug for Rundown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rundown")
            .field("done", &self.is_done())
            .finish()
    }
}

impl Users {
    pub(crate) fn new() -> Arc<Users> {
        Arc::new(Users {
            count: AtomicU32::new(0),
            rundown: Mutex::new(None),
        })
    }

    /// Registered: from here on `try_get` succeeds. Paired with [`close`](Users::close).
    pub(crate) fn open(&self) {
        self.count.store(1, Ordering::Release);
    }

    /// One more user. `ENODEV` before register and once unregister has begun.
    pub(crate) fn try_get(self: &Arc<Self>) -> Result<Lease> {
        let mut count = self.count.load(Ordering::Acquire);
        loop {
            if count == 0 || count & CLOSED != 0 {
                return Err(Errno::NODEV);
            }
            match self.count.compare_exchange_weak(
                count,
                count + 1,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return Ok(Lease(Arc::clone(self))),
                Err(now) => count = now,
            }
        }
    }

    /// Stays among the users for a moment although unregister has begun, if there are any left:
    /// for asking them. Whoever waits for the last one then also waits for the asking to end.
    pub(crate) fn stay(self: &Arc<Self>) -> Option<Lease> {
        let more = |count: u32| (count & !CLOSED != 0).then(|| count + 1);
        self.count
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, more)
            .ok()?;
        Some(Lease(Arc::clone(self)))
    }

    /// Closes the gate and gives the registration's own count back. Returns the rundown, which
    /// is done when the last user has gone: at once if there is none. To be called once.
    pub(crate) fn close(&self) -> Arc<Rundown> {
        let rundown = Arc::new(Rundown::default());
        let alone = self
            .count
            .compare_exchange(1, CLOSED, Ordering::AcqRel, Ordering::Acquire);
        if alone.is_ok() {
            // Nobody was inside, so nobody looks for the rundown.
            rundown.done.store(1, Ordering::Release);
            return rundown;
        }
        *lock(&self.rundown) = Some(Arc::clone(&rundown));
        let before = self.count.fetch_or(CLOSED, Ordering::AcqRel);
        debug_assert!(
            before & CLOSED == 0 && before > 0,
            "closed once, after register"
        );
        self.put();
        rundown
    }

    /// How many users there are, the registration itself not counted.
    pub(crate) fn number(&self) -> u32 {
        match self.count.load(Ordering::Acquire) {
            0 => 0,
            count if count & CLOSED != 0 => count & !CLOSED,
            count => count - 1,
        }
    }

    fn put(&self) {
        let before = self.count.fetch_sub(1, Ordering::AcqRel);
        if before == CLOSED | 1 {
            // The last one out. `close` stored the rundown before it set the bit.
            let rundown = lock(&self.rundown).clone();
            if let Some(rundown) = rundown {
                rundown.reach();
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.put();
    }
}

impl Rundown {
    /// Runs what waits for the end, on this thread, and then marks it: who waits sees what the
    /// callbacks did. Later calls do nothing.
    pub(crate) fn reach(&self) {
        let mut state = lock(&self.state);
        if std::mem::replace(&mut state.reaching, true) || self.is_done() {
            return;
        }
        while !state.callbacks.is_empty() {
            let callbacks = std::mem::take(&mut state.callbacks);
            drop(state);
            for callback in callbacks {
                callback();
            }
            state = lock(&self.state);
        }
        self.done.store(1, Ordering::Release);
        let waited_for = state.waiting > 0;
        drop(state);
        if waited_for {
            self.reached.notify_all();
        }
    }

    /// The users are about to be cut off: if that ends it, it ended by force.
    pub(crate) fn force(&self) {
        let mut state = lock(&self.state);
        state.cut |= !state.reaching && !self.is_done();
    }

    /// True if the users were cut off.
    pub(crate) fn was_forced(&self) -> bool {
        lock(&self.state).cut
    }

    /// Runs `f` when the end is reached: at once, here, if it has been.
    pub(crate) fn on_done(&self, f: impl FnOnce() + Send + 'static) {
        if self.is_done() {
            f();
            return;
        }
        let mut state = lock(&self.state);
        if !self.is_done() {
            state.callbacks.push(Box::new(f));
            return;
        }
        drop(state);
        f();
    }

    pub(crate) fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire) != 0
    }

    /// Waits for the end.
    pub(crate) fn wait(&self) {
        let mut state = lock(&self.state);
        state.waiting += 1;
        while !self.is_done() {
            state = self
                .reached
                .wait(state)
                .unwrap_or_else(|poison| poison.into_inner());
        }
        state.waiting -= 1;
    }

    /// Waits for the end for at most `time`. True if it was reached.
    pub(crate) fn wait_for(&self, time: Duration) -> bool {
        let mut state = lock(&self.state);
        state.waiting += 1;
        let (mut state, _) = self
            .reached
            .wait_timeout_while(state, time, |_| !self.is_done())
            .unwrap_or_else(|poison| poison.into_inner());
        state.waiting -= 1;
        self.is_done()
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;

    #[test]
    fn nobody_before_register_and_nobody_after_unregister() {
        let users = Users::new();
        assert_eq!(users.try_get().unwrap_err(), Errno::NODEV);
        users.open();
        let lease = users.try_get().unwrap();
        assert_eq!(users.number(), 1);
        let rundown = users.close();
        assert_eq!(users.try_get().unwrap_err(), Errno::NODEV);
        assert!(!rundown.is_done());
        assert!(!rundown.wait_for(Duration::from_millis(1)));
        drop(lease);
        assert!(rundown.is_done());
        rundown.wait();
    }

    #[test]
    fn callbacks_run_once_whether_early_or_late() {
        let users = Users::new();
        users.open();
        let lease = users.try_get().unwrap();
        let rundown = users.close();
        let ran = Arc::new(std::sync::atomic::AtomicU32::new(0));
        for _ in 0..2 {
            let early = Arc::clone(&ran);
            rundown.on_done(move || {
                early.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            });
            assert_eq!(ran.load(std::sync::atomic::Ordering::Relaxed), 0);
        }
        drop(lease);
        assert_eq!(ran.load(std::sync::atomic::Ordering::Relaxed), 2);
        let late = Arc::clone(&ran);
        rundown.on_done(move || {
            late.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        });
        assert_eq!(ran.load(std::sync::atomic::Ordering::Relaxed), 3);
    }
}

#[cfg(all(test, feature = "shuttle"))]
mod explored {
    use super::*;
    use shuttle::thread;

    /// Two openers against one unregister: whoever got in is waited for, and when the wait ends
    /// nobody is inside and nobody can come in.
    #[test]
    fn openers_against_unregister() {
        shuttle::check_random(
            || {
                let users = Users::new();
                users.open();
                let inside = Arc::new(AtomicU32::new(0));
                let openers: Vec<_> = (0..2)
                    .map(|_| {
                        let users = Arc::clone(&users);
                        let inside = Arc::clone(&inside);
                        thread::spawn(move || {
                            if let Ok(lease) = users.try_get() {
                                inside.fetch_add(1, Ordering::SeqCst);
                                thread::yield_now();
                                inside.fetch_sub(1, Ordering::SeqCst);
                                drop(lease);
                            }
                        })
                    })
                    .collect();
                let rundown = users.close();
                rundown.wait();
                assert_eq!(inside.load(Ordering::SeqCst), 0);
                assert!(users.try_get().is_err());
                for opener in openers {
                    opener.join().unwrap();
                }
            },
            5_000,
        );
    }

    /// A callback and a waiter both see the end, once.
    #[test]
    fn callback_against_last_put() {
        shuttle::check_random(
            || {
                let users = Users::new();
                users.open();
                let lease = users.try_get().unwrap();
                let rundown = users.close();
                let ran = Arc::new(AtomicU32::new(0));
                let closer = thread::spawn(move || drop(lease));
                let seen = Arc::clone(&ran);
                rundown.on_done(move || {
                    seen.fetch_add(1, Ordering::SeqCst);
                });
                closer.join().unwrap();
                rundown.wait();
                assert_eq!(ran.load(Ordering::SeqCst), 1);
            },
            5_000,
        );
    }
}
