//! Threads that serve a connection: one as a rule, more while one is stuck.
//!
//! A thread that has been inside one request for more than about 10 ms is *replaced*: another takes over reading, so that INTERRUPTs and other
//! requests go on; and the stuck one gets a signal on each tick of the monitor, so that an interruptible system call it may be in ends with EINTR.
//! When it comes back and its place is taken, it retires. One thread per connection is also the fastest arrangement: a second reader costs more in
//! wake-ups than it gains. A thread that knows that it will wait for its own connection need not wait for its substitute:
//! [`Connection::hand_over`].

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::Weak;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use rustix::io::Errno;

use crate::affinity;
use crate::affinity::Follower;
use crate::connection::Buffer;
use crate::connection::Connection;
use crate::connection::Handler;
use crate::connection::Received;
use crate::connection::Served;
use crate::connection::wait_readable;
use crate::monitor;
use crate::parse::header;
use crate::signal;
use crate::signal::Nudged;

/// How a connection is served.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Name of the threads (15 bytes are shown).
    pub name: String,
    /// Threads that read at the same time when none is stuck; at least 1.
    pub threads: usize,
    /// How many threads may be stuck in requests and replaced, at the same time. When so many are, the connection waits for one of them.
    pub max_stuck: usize,
    /// Move the thread to the CPU its clients run on (looked at every 256 requests, less often while it stays the same), so that a request costs no
    /// wake-up of another CPU. Threads that the handler starts inherit that CPU unless they call [`crate::restore_affinity`] first.
    pub follow_cpu: bool,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            name: "fuse".to_owned(),
            threads: 1,
            max_stuck: 64,
            follow_cpu: true,
        }
    }
}

/// The threads that serve a connection. They end with the connection; dropping this value leaves them to it.
pub struct Workers {
    set: Arc<Set>,
}

/// What the threads and the monitor share.
pub(crate) struct Set {
    connection: Connection,
    handler: Arc<dyn Handler>,
    policy: Policy,
    state: Mutex<State>,
    changed: Condvar,
    stopping: AtomicBool,
}

#[derive(Default)]
struct State {
    threads: Vec<Arc<Slot>>,
    /// Threads that were not replaced.
    serving: usize,
}

/// One thread, as the monitor sees it.
#[derive(Debug)]
struct Slot {
    /// Odd while inside a request.
    turns: AtomicU64,
    /// What `turns` was at the last look; used by the monitor only.
    seen: AtomicU64,
    /// Another thread reads in this one's place.
    replaced: AtomicBool,
    /// Whom to signal.
    thread: Nudged,
}

impl Workers {
    /// Starts serving `connection`.
    ///
    /// # Errors
    /// EAGAIN when no thread can be started.
    pub fn start(
        connection: Connection,
        handler: Arc<dyn Handler>,
        policy: Policy,
    ) -> Result<Self, Errno> {
        signal::install();
        affinity::remember();
        let threads = policy.threads.max(1);
        let set = Arc::new(Set {
            connection,
            handler,
            policy,
            state: Mutex::default(),
            changed: Condvar::new(),
            stopping: AtomicBool::new(false),
        });
        {
            let mut state = set.lock();
            for _ in 0..threads {
                set.spawn(&mut state)?;
            }
        }
        monitor::watch_set(Arc::downgrade(&set));
        Ok(Self { set })
    }

    /// How many threads there are now, and how many of them are stuck and replaced.
    pub fn threads(&self) -> (usize, usize) {
        let state = self.set.lock();
        (
            state.threads.len(),
            state.threads.len().saturating_sub(state.serving),
        )
    }

    /// Waits until all threads have ended, which is when the connection has; false when `timeout` passed before.
    pub fn wait(&self, timeout: Duration) -> bool {
        let Some(until) = Instant::now().checked_add(timeout) else {
            return false;
        };
        let mut state = self.set.lock();
        while !state.threads.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self
                .set
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }

    /// Makes the threads end although the connection goes on, each after the request it is in. The descriptor stays valid; requests wait for whoever
    /// serves next. True when all have ended before `timeout`.
    pub fn stop(&self, timeout: Duration) -> bool {
        self.set.stopping.store(true, Ordering::SeqCst);
        let Some(until) = Instant::now().checked_add(timeout) else {
            return false;
        };
        loop {
            // A signal can come just before the read it should end, so it is repeated.
            for slot in &self.set.lock().threads {
                slot.thread.nudge();
            }
            if self.wait(Duration::from_millis(2)) {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
        }
    }
}

impl std::fmt::Debug for Workers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workers")
            .field("connection", &self.set.connection)
            .field("policy", &self.set.policy)
            .finish_non_exhaustive()
    }
}

thread_local! {
    /// The set whose thread this is, and its entry there.
    static PLACE: RefCell<Option<(Weak<Set>, Arc<Slot>)>> = const { RefCell::new(None) };
}

/// See [`Connection::hand_over`].
pub(crate) fn hand_over(connection: &Connection) -> Result<(), Errno> {
    let place = PLACE.with_borrow(|place| {
        let (set, slot) = place.as_ref()?;
        Some((set.upgrade()?, Arc::clone(slot)))
    });
    match place {
        Some((set, slot)) if set.connection.is_same(connection) => {
            set.replace(&mut set.lock(), &slot)
        }
        _ => Ok(()),
    }
}

impl Set {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spawn(self: &Arc<Self>, state: &mut State) -> Result<(), Errno> {
        let slot = Arc::new(Slot {
            turns: AtomicU64::new(0),
            seen: AtomicU64::new(0),
            replaced: AtomicBool::new(false),
            thread: Nudged::default(),
        });
        let (set, own) = (Arc::clone(self), Arc::clone(&slot));
        std::thread::Builder::new()
            .name(self.policy.name.clone())
            .spawn(move || set.run(&own))
            .map_err(|error| {
                tracing::warn!(%error, "no thread to serve a FUSE connection");
                Errno::AGAIN
            })?;
        state.threads.push(slot);
        state.serving += 1;
        Ok(())
    }

    /// The monitor's look: replaces threads that are in the same request as last time, and signals them. True when requests were or are served.
    pub(crate) fn look(self: &Arc<Self>) -> bool {
        let mut active = false;
        let mut state = self.lock();
        for slot in state.threads.clone() {
            let turns = slot.turns.load(Ordering::SeqCst);
            let seen = slot.seen.swap(turns, Ordering::Relaxed);
            let inside = turns % 2 == 1;
            active |= turns != seen || inside;
            if !inside || turns != seen {
                continue;
            }
            // Refused, it is tried again on the next tick.
            let _ = self.replace(&mut state, &slot);
            slot.thread.nudge();
        }
        active
    }

    /// Starts a substitute for a thread that is inside a request, unless it has one. EAGAIN: no thread can be started, so many are stuck already, or
    /// the set is to stop.
    fn replace(self: &Arc<Self>, state: &mut State, slot: &Slot) -> Result<(), Errno> {
        if slot.replaced.load(Ordering::Relaxed) {
            return Ok(());
        }
        let stuck = state.threads.len().saturating_sub(state.serving);
        if stuck >= self.policy.max_stuck || self.stopping.load(Ordering::Relaxed) {
            return Err(Errno::AGAIN);
        }
        // First the substitute: without one, the stuck thread must go on reading when it comes back.
        self.spawn(state)?;
        slot.replaced.store(true, Ordering::SeqCst);
        state.serving -= 1;
        Ok(())
    }

    fn run(self: Arc<Self>, slot: &Arc<Slot>) {
        slot.thread.enter();
        PLACE.set(Some((Arc::downgrade(&self), Arc::clone(slot))));
        // The starter may be bound to one CPU.
        affinity::restore_affinity();
        let mut buffer = self.connection.buffer();
        let mut follower = self.policy.follow_cpu.then(Follower::new).flatten();
        let ended = self.serve(slot, &mut buffer, &mut follower);
        if let Err(errno) = ended {
            tracing::error!(%errno, "a thread serving a FUSE connection ends");
        }
        let mut state = self.lock();
        state.threads.retain(|other| !Arc::ptr_eq(other, slot));
        if !slot.replaced.load(Ordering::Relaxed) {
            state.serving = state.serving.saturating_sub(1);
        }
        drop(state);
        self.changed.notify_all();
    }

    fn serve(
        &self,
        slot: &Slot,
        buffer: &mut Buffer,
        follower: &mut Option<Follower>,
    ) -> Result<(), Errno> {
        while !self.stopping.load(Ordering::Relaxed) {
            let length = match self.connection.receive(buffer)? {
                Received::Message(length) => length,
                Received::Not(Served::Ended) => return Ok(()),
                Received::Not(Served::WouldBlock) => {
                    wait_readable(std::os::fd::AsFd::as_fd(&self.connection))?;
                    continue;
                }
                Received::Not(_) => continue,
            };
            // Paired with the monitor's store before its last look.
            slot.turns.fetch_add(1, Ordering::SeqCst);
            monitor::wake();
            let message = buffer.message(length);
            if let Some(follower) = follower {
                follower.request(|| header(message).map_or(0, |header| header.pid));
            }
            // A panic ends in EIO for this caller (its reply is dropped) and must not take the thread from all others.
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                self.connection.dispatch(message, &*self.handler)
            }));
            slot.turns.fetch_add(1, Ordering::Release);
            if outcome.is_err() {
                tracing::error!("a FUSE request handler panicked; its caller got EIO");
            }
            if slot.replaced.load(Ordering::Relaxed) && !self.come_back(slot) {
                return Ok(());
            }
        }
        Ok(())
    }

    /// A replaced thread is free again: true when it is needed.
    fn come_back(&self, slot: &Slot) -> bool {
        let mut state = self.lock();
        if state.serving >= self.policy.threads.max(1) {
            return false;
        }
        state.serving += 1;
        slot.replaced.store(false, Ordering::Relaxed);
        true
    }
}
