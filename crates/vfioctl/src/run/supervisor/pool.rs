//! Threads that receive trapped calls.
//!
//! One thread, the leader, receives. What never waits for anybody it answers at once, and so it does
//! with what may take long; but then a clock ticks, and if the leader is in the same call from one
//! tick to the next, another thread becomes the leader. So the usual call costs no hand-over, and a
//! slow one holds up others for two ticks at most.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};
use seccomp_notify::{Listener, Notification};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// From one look at the leader to the next, while it has calls that may take long.
const TICK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 2_000_000,
};
/// How many calls may be slow at the same time. More wait for their turn; quick ones do not.
const SLOW: usize = 64;

/// Answers calls.
pub(super) trait Handler: Send + Sync + 'static {
    /// What a thread keeps between calls.
    type Memory: Default;

    /// Answers the call if that never waits for anybody. False: it was not, and may take long.
    fn quick(&self, call: &Notification, memory: &mut Self::Memory) -> bool;

    /// Answers the call.
    fn slow(&self, call: &Notification, memory: &mut Self::Memory);

    /// There has been no slow call for a while.
    fn idle(&self);
}

/// The threads, and what they have between them.
pub(super) struct Pool<H> {
    listener: Arc<Listener>,
    handler: H,
    timer: OwnedFd,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Which thread receives: they are counted.
    leader: u64,
    /// The leader is in a slow call.
    busy: bool,
    /// Slow calls so far, and what the last tick saw of that.
    count: u64,
    seen: u64,
    /// The clock ticks.
    ticking: bool,
    /// Slow calls in progress.
    slow: usize,
    /// Slow calls that wait for one of those to end.
    waiting: VecDeque<Notification>,
}

impl<H: Handler> Pool<H> {
    pub(super) fn new(listener: Arc<Listener>, handler: H) -> Result<Pool<H>, Errno> {
        Ok(Pool {
            listener,
            handler,
            timer: timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?,
            state: Mutex::default(),
        })
    }

    /// Answers calls until no task with the filter is left. Threads may still be in slow calls then;
    /// nobody waits for their answers.
    pub(super) fn run(self) -> Result<(), Errno> {
        let pool = Arc::new(self);
        pool.lead(0)?;
        loop {
            let mut fds = [
                PollFd::new(&pool.timer, PollFlags::IN),
                // Only its end: a call would be woken for twice.
                PollFd::from_borrowed_fd(pool.listener.as_fd(), PollFlags::empty()),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
            let [timer, listener] = fds.map(|fd| fd.revents());
            if listener.contains(PollFlags::HUP) {
                return Ok(());
            }
            if timer.contains(PollFlags::IN) {
                let _ = rustix::io::read(&pool.timer, &mut [0_u8; 8][..]);
                pool.tick();
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the thread that is to be the leader of this number.
    fn lead(self: &Arc<Self>, number: u64) -> Result<(), Errno> {
        let pool = Arc::clone(self);
        std::thread::Builder::new()
            .name("vfioctl-run".into())
            .spawn(move || pool.receive(number))
            .map(drop)
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::AGAIN))
    }

    /// Puts another thread in the place of a leader that is still in the same call. The clock stops
    /// when there was no call since the last tick.
    fn tick(self: &Arc<Self>) {
        let mut state = self.state();
        if state.count != state.seen {
            state.seen = state.count;
            return;
        }
        if !state.busy {
            state.ticking = false;
            self.set_clock(Timespec::default());
            drop(state);
            self.handler.idle();
            return;
        }
        let number = state.leader.wrapping_add(1);
        // Without a thread the leader goes on when its call is answered.
        if self.lead(number).is_ok() {
            state.leader = number;
            state.busy = false;
        }
    }

    fn receive(&self, number: u64) {
        let mut memory = H::Memory::default();
        loop {
            let call = match self.listener.recv() {
                Ok(call) => call,
                // Taken back by a signal, or nobody is left: `run` ends the process.
                Err(Errno::NOENT | Errno::INTR) if !self.hung_up() => continue,
                Err(_) => return,
            };
            if !self.handler.quick(&call, &mut memory) && !self.take_time(number, call, &mut memory)
            {
                return;
            }
        }
    }

    fn hung_up(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(
            self.listener.as_fd(),
            PollFlags::empty(),
        )];
        poll(&mut fds, Some(&Timespec::default())).is_ok()
            && fds.iter().any(|fd| fd.revents().contains(PollFlags::HUP))
    }

    /// Answers a call that may take long. False if meanwhile another thread became the leader.
    fn take_time(&self, number: u64, call: Notification, memory: &mut H::Memory) -> bool {
        let mut state = self.state();
        if state.slow >= SLOW {
            state.waiting.push_back(call);
            return true;
        }
        state.slow += 1;
        state.busy = true;
        state.count = state.count.wrapping_add(1);
        if !std::mem::replace(&mut state.ticking, true) {
            self.set_clock(TICK);
        }
        drop(state);
        self.handler.slow(&call, memory);
        let mut state = self.state();
        while state.leader != number {
            let Some(call) = state.waiting.pop_front() else {
                state.slow -= 1;
                return false;
            };
            drop(state);
            self.handler.slow(&call, memory);
            state = self.state();
        }
        state.busy = false;
        state.slow -= 1;
        true
    }

    /// Sets the time between ticks; zero stops them.
    fn set_clock(&self, time: Timespec) {
        let time = Itimerspec {
            it_interval: time,
            it_value: time,
        };
        // It cannot fail with a time in range; without it a slow call would hold up others.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &time);
    }
}
