//! The one thread that asks users to leave and watches mappings that outlive their file.
//!
//! It exists only while there is something to ask or to watch. Nothing that must survive lives
//! on its stack: the list is plain data under a lock.

use super::handle::{Device, WeakDevice};
use super::ops::RequestChannel;
use super::users::Rundown;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// How often a mapping without a descriptor is looked for: at first, and at most.
const LINGER: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(200));

/// How long somebody who finds a device open waits for a look whether it is only mapped.
pub(crate) const LOOK: Duration = Duration::from_secs(2);

/// Asks and watches.
#[derive(Default)]
pub(crate) struct Housekeeper {
    state: Mutex<State>,
    changed: Condvar,
    looked: Condvar,
}

#[derive(Default)]
struct State {
    running: bool,
    asks: Vec<Ask>,
    lingering: Vec<Linger>,
    /// A look at those that linger is under way, with the list unlocked.
    looking: bool,
    /// How many looks have ended.
    looks: u64,
}

struct Ask {
    device: WeakDevice,
    rundown: Arc<Rundown>,
    every: Duration,
    next: Instant,
    count: u32,
    deadline: Option<Instant>,
}

struct Linger {
    /// True while the mapping is there. Dropping the box lets go of what it holds.
    still: Box<dyn Fn() -> bool + Send>,
    every: Duration,
    next: Instant,
}

impl fmt::Debug for Housekeeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        f.debug_struct("Housekeeper")
            .field("asks", &state.asks.len())
            .field("lingering", &state.lingering.len())
            .finish()
    }
}

impl Housekeeper {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `request(0)` now, here, and 1, 2, … every so often until the rundown is reached; at
    /// the deadline cuts the users off.
    pub(crate) fn ask(
        self: &Arc<Self>,
        device: &Device,
        rundown: &Arc<Rundown>,
        every: Duration,
        deadline: Option<Instant>,
    ) {
        request(device, 0);
        if rundown.is_done() {
            return;
        }
        let weak = Arc::downgrade(self);
        rundown.on_done(move || {
            // So that the list does not keep what has ended until its next turn.
            if let Some(house) = Weak::upgrade(&weak) {
                house.changed.notify_all();
            }
        });
        let mut state = self.state();
        state.asks.push(Ask {
            device: device.downgrade(),
            rundown: Arc::clone(rundown),
            every,
            next: Instant::now() + every,
            count: 1,
            deadline,
        });
        self.start(state);
    }

    /// Keeps what `still` captured until it returns false.
    pub(crate) fn linger(self: &Arc<Self>, still: Box<dyn Fn() -> bool + Send>) {
        let mut state = self.state();
        state.lingering.push(Linger {
            still,
            every: LINGER.0,
            next: Instant::now() + LINGER.0,
        });
        self.start(state);
    }

    /// Looks at once whether what is kept must still be. On return a look has ended that began after
    /// the call, unless nothing is kept or it took longer than `patience`: on a busy machine with
    /// many processes it may take long.
    pub(crate) fn look(&self, patience: Duration) {
        let now = Instant::now();
        let mut state = self.state();
        for linger in &mut state.lingering {
            linger.next = now;
        }
        let wanted = state.looks + 1 + u64::from(state.looking);
        self.changed.notify_all();
        while (state.looking || !state.lingering.is_empty()) && state.looks < wanted {
            let left = patience.saturating_sub(now.elapsed());
            if left.is_zero() {
                return;
            }
            (state, _) = self
                .looked
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn start(self: &Arc<Self>, mut state: MutexGuard<'_, State>) {
        if state.running {
            drop(state);
            self.changed.notify_all();
            return;
        }
        state.running = true;
        drop(state);
        let house = Arc::clone(self);
        let spawned = std::thread::Builder::new()
            .name("vfio-house".into())
            .spawn(move || house.run());
        if let Err(error) = spawned {
            tracing::error!("no thread for asking users to leave: {error}");
            self.state().running = false;
        }
    }

    fn run(&self) {
        let mut state = self.state();
        loop {
            let now = Instant::now();
            let done: Vec<Ask> = state
                .asks
                .extract_if(.., |ask| ask.rundown.is_done())
                .collect();
            if state.asks.is_empty() && state.lingering.is_empty() {
                state.running = false;
                return;
            }
            let mut requests: Vec<(WeakDevice, u32)> = Vec::new();
            let mut late: Vec<(WeakDevice, Arc<Rundown>)> = Vec::new();
            for ask in &mut state.asks {
                if ask.deadline.is_some_and(|deadline| deadline <= now) {
                    ask.deadline = None;
                    late.push((ask.device.clone(), Arc::clone(&ask.rundown)));
                } else if ask.next <= now {
                    requests.push((ask.device.clone(), ask.count));
                    ask.count = ask.count.wrapping_add(1);
                    ask.next = now + ask.every;
                }
            }
            let due: Vec<Linger> = state
                .lingering
                .extract_if(.., |linger| linger.next <= now)
                .collect();
            if !(done.is_empty() && requests.is_empty() && late.is_empty() && due.is_empty()) {
                // Callbacks run, and things are dropped, with the list unlocked.
                let looks = !due.is_empty();
                state.looking = looks;
                drop(state);
                drop(done);
                for (device, count) in requests {
                    if let Some(user) = device.upgrade().and_then(Device::stay) {
                        request(user.device(), count);
                    }
                }
                for (device, rundown) in late {
                    // One more user for so long: who waits for the last one may expect that no
                    // reference is left then, ours least of all.
                    if let Some(user) = device.upgrade().and_then(Device::stay) {
                        let device = user.device();
                        tracing::warn!(
                            "{} {}: {} user(s) did not leave in time, cutting them off: {}",
                            device.driver(),
                            device.parent().name(),
                            device.users().saturating_sub(1),
                            device.opened_by()
                        );
                        rundown.force();
                        device.disassociate();
                    }
                    rundown.reach();
                }
                let mut again = Vec::new();
                for mut linger in due {
                    if (linger.still)() {
                        linger.every = (linger.every * 2).min(LINGER.1);
                        linger.next = Instant::now() + linger.every;
                        again.push(linger);
                    }
                }
                state = self.state();
                state.lingering.append(&mut again);
                if looks {
                    state.looking = false;
                    state.looks += 1;
                    self.looked.notify_all();
                }
                continue;
            }
            let next = state
                .asks
                .iter()
                .flat_map(|ask| [Some(ask.next), ask.deadline])
                .flatten()
                .chain(state.lingering.iter().map(|linger| linger.next))
                .min()
                .unwrap_or(now);
            let wait = next.saturating_duration_since(now);
            (state, _) = self
                .changed
                .wait_timeout(state, wait)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// One request, with the kernel's log lines (`vfio_pci_core_request`).
fn request(device: &Device, count: u32) {
    match device.request(count) {
        RequestChannel::Signalled if count.is_multiple_of(10) => tracing::info!(
            "{} {}: Relaying device request to user (#{count})",
            device.driver(),
            device.parent().name()
        ),
        RequestChannel::None if count == 0 => tracing::warn!(
            "{} {}: No device request channel registered, blocked until released by user",
            device.driver(),
            device.parent().name()
        ),
        _ => {}
    }
}
