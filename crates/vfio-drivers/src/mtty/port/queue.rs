//! What waits between the guest and the far end of a port.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use rustix::event::EventfdFlags;
use rustix::event::eventfd;
use rustix::io::Errno;

/// How much a port holds for a far end that does not take it, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes that wait outside the UART.
    pub queue: usize,
    /// How long a full queue may stop the guest before bytes are dropped.
    pub stall: Duration,
}

impl Default for Limits {
    /// 4 KiB, about what a terminal buffers; one second, longer than a program that reads is away
    /// and shorter than what a guest takes for a hang.
    fn default() -> Self {
        Self {
            queue: 4096,
            stall: Duration::from_secs(1),
        }
    }
}

/// The guest's end of a connection: cheap to clone, never blocks, and harmless once the
/// connection is gone.
#[derive(Clone, Debug)]
pub struct Outlet(pub(super) Arc<Shared>);

impl Outlet {
    /// Sends one byte. `false` if the queue is full: keep the byte; [`Line::room`] will be called
    /// when it is worth trying again, at the latest after [`Limits::stall`], and from then on bytes
    /// that do not fit are dropped (and counted in the log) until the far end takes some.
    /// With nobody at the far end the byte is gone, as on any serial line.
    ///
    /// [`Line::room`]: super::Line::room
    #[must_use = "a byte that was not taken stays with the UART"]
    pub fn send(&self, byte: u8) -> bool {
        let taken = self.offer(byte);
        self.flush();
        taken
    }

    /// [`send`](Self::send) without a system call, for callers that hold a lock: they call
    /// [`flush`](Self::flush) once they have released it.
    #[must_use = "a byte that was not taken stays with the UART"]
    pub fn offer(&self, byte: u8) -> bool {
        let mut queue = self.0.lock();
        if !queue.connected || queue.stop {
            return true;
        }
        let taken = if queue.bytes.len() < self.0.limits.queue {
            queue.bytes.push_back(byte);
            true
        } else if queue.dropping {
            queue.dropped += 1;
            true
        } else {
            false
        };
        if taken {
            let asleep = std::mem::take(&mut queue.asleep);
            queue.wanted |= asleep;
        } else if queue.refused.is_none() {
            // Since the first refusal: a guest that tries again all the time waits no longer.
            queue.refused = Some(Instant::now());
            queue.wanted = true;
        }
        taken
    }

    /// Lets the thread know of what was offered, if it has to.
    pub fn flush(&self) {
        let wanted = std::mem::take(&mut self.0.lock().wanted);
        if wanted {
            self.0.wake();
        }
    }

    /// The UART has room again: offers what [`Line::receive`](super::Line::receive) left. Costs
    /// nothing when nothing waits.
    pub fn resume(&self) {
        if self.0.held.load(Ordering::SeqCst) {
            self.0.wake();
        }
    }
}

/// What the guest's side and the thread share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) limits: Limits,
    /// Interrupts the thread's poll.
    pub(super) wake: OwnedFd,
    /// The thread has input that the UART did not take.
    pub(super) held: AtomicBool,
    queue: Mutex<Queue>,
}

#[derive(Debug, Default)]
pub(super) struct Queue {
    pub(super) bytes: VecDeque<u8>,
    /// Somebody is there to send to.
    pub(super) connected: bool,
    /// Since when a byte waits in the UART because of us.
    pub(super) refused: Option<Instant>,
    /// The far end has been stuck for too long: what does not fit is dropped.
    pub(super) dropping: bool,
    pub(super) dropped: u64,
    /// The thread sleeps with nothing to write; the next byte must wake it.
    pub(super) asleep: bool,
    /// The thread has something to learn and has not been woken.
    pub(super) wanted: bool,
    pub(super) stop: bool,
}

impl Shared {
    pub(super) fn new(limits: Limits) -> Result<Self, Errno> {
        Ok(Self {
            limits,
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            held: AtomicBool::new(false),
            queue: Mutex::default(),
        })
    }

    /// The lock is held for a few instructions and never across a call, so it cannot be poisoned
    /// in a state that matters.
    pub(super) fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wake(&self) {
        // Full means the thread has not looked yet, and will: nothing is lost.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}
