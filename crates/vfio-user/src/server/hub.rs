//! Who serves what, and when: one epoll set for all listeners and all connections at rest, and a few
//! threads that wait at it.
//!
//! The thread that gets an event serves it itself, so nothing is handed over; before it does, it sees
//! to it that another one waits. A connection that is busy keeps its thread, which then blocks on the
//! socket and on nothing else; when it has been idle for a moment it goes back to the set. At rest a
//! listener or a connection is a descriptor and an entry here.

use super::Options;
use super::connection::{Connection, Next};
use super::offer::OfferState;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use slab::Slab;
use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vfio_core::{Errno, Result};

/// How many threads may wait at the set; one more goes.
const SPARE: usize = 2;

/// How long no connection is accepted when there are no descriptors.
const BREATHER: Duration = Duration::from_millis(100);

/// Keys of what is no entry. Those of entries have a generation above 0 in the upper half.
const STOP: u64 = 0;
const TIMER: u64 = 1;

#[derive(Debug)]
pub(super) struct Hub {
    epoll: OwnedFd,
    timer: OwnedFd,
    stop: OwnedFd,
    is_stopped: AtomicBool,
    entries: Mutex<Entries>,
    /// Threads at the set.
    waiting: AtomicUsize,
    /// The last one has left it, and there is none to be had in its place.
    is_left: AtomicBool,
    /// All threads.
    threads: AtomicUsize,
    /// Those that poll.
    pollers: AtomicUsize,
    pub(super) options: Options,
}

#[derive(Debug, Default)]
struct Entries {
    slab: Slab<Entry>,
    generation: u32,
    deadlines: BTreeSet<(Instant, u64)>,
}

#[derive(Debug)]
struct Entry {
    key: u64,
    what: What,
    deadline: Option<Instant>,
}

#[derive(Debug)]
enum What {
    Listener(Arc<OfferState>),
    Resting(Box<Connection>),
    /// A thread has it.
    Busy,
}

/// A thread that polls, in their number.
#[derive(Debug)]
pub(super) struct Polling<'a>(&'a AtomicUsize);

impl Drop for Polling<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Entries {
    fn get(&mut self, key: u64) -> Option<&mut Entry> {
        let entry = self.slab.get_mut(index(key))?;
        (entry.key == key).then_some(entry)
    }

    fn add(&mut self, what: What) -> u64 {
        let vacant = self.slab.vacant_entry();
        self.generation = self.generation.wrapping_add(1).max(1);
        let key = (u64::from(self.generation) << 32) | vacant.key() as u64;
        vacant.insert(Entry {
            key,
            what,
            deadline: None,
        });
        key
    }

    fn remove(&mut self, key: u64) -> Option<Entry> {
        self.get(key)?;
        let entry = self.slab.remove(index(key));
        if let Some(deadline) = entry.deadline {
            self.deadlines.remove(&(deadline, key));
        }
        Some(entry)
    }

    fn set_deadline(&mut self, key: u64, deadline: Option<Instant>) {
        let Some(entry) = self.get(key) else { return };
        let before = std::mem::replace(&mut entry.deadline, deadline);
        if let Some(before) = before {
            self.deadlines.remove(&(before, key));
        }
        if let Some(deadline) = deadline {
            self.deadlines.insert((deadline, key));
        }
    }
}

fn index(key: u64) -> usize {
    (key & u64::from(u32::MAX)) as usize
}

impl Hub {
    pub(super) fn start(options: Options) -> std::io::Result<Arc<Hub>> {
        let hub = Arc::new(Hub {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            timer: timerfd_create(
                TimerfdClockId::Monotonic,
                TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
            )?,
            stop: eventfd(0, EventfdFlags::CLOEXEC)?,
            is_stopped: AtomicBool::new(false),
            entries: Mutex::default(),
            waiting: AtomicUsize::new(0),
            is_left: AtomicBool::new(false),
            threads: AtomicUsize::new(0),
            pollers: AtomicUsize::new(0),
            options,
        });
        epoll::add(
            &hub.epoll,
            &hub.stop,
            EventData::new_u64(STOP),
            EventFlags::IN,
        )?;
        let once = EventFlags::IN | EventFlags::ONESHOT;
        epoll::add(&hub.epoll, &hub.timer, EventData::new_u64(TIMER), once)?;
        hub.spawn()?;
        Ok(hub)
    }

    /// Ends all threads and connections. Driver calls in progress end by themselves.
    pub(super) fn stop(&self) {
        self.is_stopped.store(true, Ordering::SeqCst);
        // The counter is far from full.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        let slab = std::mem::take(&mut self.lock().slab);
        drop(slab);
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.is_stopped.load(Ordering::SeqCst)
    }

    /// Whether the calling thread may block: another one waits at the set.
    pub(super) fn may_block(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) > 0
    }

    /// Whether the calling thread is wanted at the set, however busy it is: nobody else goes there.
    pub(super) fn is_left(&self) -> bool {
        self.is_left.load(Ordering::SeqCst)
    }

    /// Lets the calling thread poll until the value is dropped, unless enough do already.
    pub(super) fn poll(&self) -> Option<Polling<'_>> {
        let one_more = |pollers| (pollers < self.options.pollers).then_some(pollers + 1);
        let order = Ordering::SeqCst;
        self.pollers.fetch_update(order, order, one_more).ok()?;
        Some(Polling(&self.pollers))
    }

    /// How many threads poll.
    pub(super) fn polled(&self) -> usize {
        self.pollers.load(Ordering::SeqCst)
    }

    /// Watches a listening socket; its key.
    pub(super) fn add_listener(&self, offer: &Arc<OfferState>) -> Result<u64> {
        let listener = offer.listener().ok_or(Errno::INVAL)?;
        let key = self.lock().add(What::Listener(Arc::clone(offer)));
        self.watch(key, listener, EventFlags::IN)
    }

    /// Watches a connection that has just been made.
    pub(super) fn add_connection(&self, connection: Box<Connection>) -> Result<u64> {
        let deadline = connection.deadline();
        let socket = connection.shared_socket();
        let mut entries = self.lock();
        if self.is_stopped() {
            return Err(Errno::CANCELED);
        }
        let key = entries.add(What::Resting(connection));
        entries.set_deadline(key, deadline);
        self.arm(&entries);
        drop(entries);
        self.watch(key, socket.as_fd(), EventFlags::IN)
    }

    /// Stops watching a listener.
    pub(super) fn remove_listener(&self, key: u64, listener: impl AsFd) {
        let _ = epoll::delete(&self.epoll, listener);
        let entry = self.lock().remove(key);
        drop(entry);
    }

    fn watch(&self, key: u64, fd: impl AsFd, what: EventFlags) -> Result<u64> {
        let flags = what | EventFlags::ONESHOT;
        if let Err(errno) = epoll::add(&self.epoll, fd, EventData::new_u64(key), flags) {
            let entry = self.lock().remove(key);
            drop(entry);
            return Err(errno);
        }
        Ok(key)
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the timer to the first deadline.
    fn arm(&self, entries: &Entries) {
        let value = match entries.deadlines.first() {
            Some((at, _)) => at
                .saturating_duration_since(Instant::now())
                .max(Duration::from_nanos(1)),
            None => Duration::ZERO,
        };
        let zero = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let timer = Itimerspec {
            it_interval: zero,
            it_value: Timespec {
                tv_sec: value.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: i64::from(value.subsec_nanos()),
            },
        };
        // Of a timer of ours with a valid time this cannot fail.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &timer);
    }

    fn spawn(self: &Arc<Hub>) -> std::io::Result<()> {
        let hub = Arc::clone(self);
        self.threads.fetch_add(1, Ordering::SeqCst);
        // Counted as waiting from now on, so that nobody starts another one meanwhile.
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let thread = std::thread::Builder::new()
            .name("vfio-user".into())
            .spawn(move || hub.run());
        if let Err(error) = thread {
            self.threads.fetch_sub(1, Ordering::SeqCst);
            self.waiting.fetch_sub(1, Ordering::SeqCst);
            return Err(error);
        }
        Ok(())
    }

    /// One thread's life. `waiting` counts it at the start of each turn.
    fn run(self: Arc<Hub>) {
        loop {
            let mut events = Vec::with_capacity(1);
            let got = epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                None,
            );
            let left = self.waiting.fetch_sub(1, Ordering::SeqCst) - 1;
            if self.is_stopped() {
                break;
            }
            if let (Ok(_), Some(event)) = (got, events.first()) {
                let key = event.data.u64();
                let is_crowded = self.threads.load(Ordering::SeqCst) >= self.options.threads.max(1);
                // Also for the timer: whom it is over for is closed by this thread.
                if left == 0 && (is_crowded || self.spawn().is_err()) {
                    // Without a successor this one serves what is there and comes back.
                    self.is_left.store(true, Ordering::SeqCst);
                }
                self.event(key);
            }
            if self.waiting.fetch_add(1, Ordering::SeqCst) >= SPARE {
                self.waiting.fetch_sub(1, Ordering::SeqCst);
                break;
            }
            self.is_left.store(false, Ordering::SeqCst);
        }
        self.threads.fetch_sub(1, Ordering::SeqCst);
    }

    fn event(self: &Arc<Hub>, key: u64) {
        if key == TIMER {
            return self.expire();
        }
        let mut entries = self.lock();
        let Some(entry) = entries.get(key) else {
            return;
        };
        match &mut entry.what {
            What::Listener(offer) => {
                let offer = Arc::clone(offer);
                drop(entries);
                self.accept(key, &offer);
            }
            What::Busy => {}
            what @ What::Resting(_) => {
                let what = std::mem::replace(what, What::Busy);
                entries.set_deadline(key, None);
                drop(entries);
                if let What::Resting(connection) = what {
                    self.serve(key, connection);
                }
            }
        }
    }

    fn serve(self: &Arc<Hub>, key: u64, mut connection: Box<Connection>) {
        let next = connection.serve(self);
        let interest = match next {
            Next::Read => EventFlags::IN,
            Next::Write => EventFlags::OUT,
            Next::Closed => {
                // The entry first: what its number means next is watched under another key.
                let _ = epoll::delete(&self.epoll, connection.shared_socket().as_fd());
                drop(connection);
                let entry = self.lock().remove(key);
                drop(entry);
                return;
            }
        };
        let deadline = connection.deadline();
        let socket = connection.shared_socket();
        let mut entries = self.lock();
        let Some(entry) = entries.get(key) else {
            // Stopped meanwhile.
            drop(entries);
            return;
        };
        entry.what = What::Resting(connection);
        entries.set_deadline(key, deadline);
        if deadline.is_some() {
            self.arm(&entries);
        }
        drop(entries);
        let flags = interest | EventFlags::ONESHOT;
        let _ = epoll::modify(&self.epoll, socket.as_fd(), EventData::new_u64(key), flags);
    }

    fn accept(self: &Arc<Hub>, key: u64, offer: &Arc<OfferState>) {
        let pause = match offer.accept(self) {
            Ok(()) => None,
            // No descriptors or memory: the backlog keeps them, and it may get better.
            Err(errno) => {
                tracing::warn!("{offer}: no connection can be accepted: {errno}");
                Some(Instant::now() + BREATHER)
            }
        };
        let mut entries = self.lock();
        entries.set_deadline(key, pause);
        if pause.is_some() {
            return self.arm(&entries);
        }
        drop(entries);
        self.listen_again(key, offer);
    }

    fn listen_again(&self, key: u64, offer: &OfferState) {
        let flags = EventFlags::IN | EventFlags::ONESHOT;
        if let Some(listener) = offer.listener() {
            let _ = epoll::modify(&self.epoll, listener, EventData::new_u64(key), flags);
        }
    }

    /// Some deadlines may be over.
    fn expire(self: &Arc<Hub>) {
        let now = Instant::now();
        let mut late = Vec::new();
        let mut entries = self.lock();
        while let Some(&(at, key)) = entries.deadlines.first() {
            if at > now {
                break;
            }
            entries.set_deadline(key, None);
            let Some(entry) = entries.get(key) else {
                continue;
            };
            match &mut entry.what {
                What::Listener(offer) => {
                    let offer = Arc::clone(offer);
                    self.listen_again(key, &offer);
                }
                What::Busy => {}
                What::Resting(_) => late.extend(entries.remove(key)),
            }
        }
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.timer, &mut count);
        self.arm(&entries);
        drop(entries);
        let flags = EventFlags::IN | EventFlags::ONESHOT;
        let _ = epoll::modify(&self.epoll, &self.timer, EventData::new_u64(TIMER), flags);
        for entry in late {
            if let What::Resting(mut connection) = entry.what {
                let _ = epoll::delete(&self.epoll, connection.shared_socket().as_fd());
                connection.too_late();
            }
        }
    }
}
