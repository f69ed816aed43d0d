//! What a connection, its replies and its backing ids share: the descriptor and the requests under way.

use std::io::IoSlice;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use rustix::io::Errno;
use zerocopy::IntoBytes;

use crate::connection::Negotiated;
use crate::inflight::Interrupt;
use crate::inflight::Table;
use crate::inflight::Taken;
use crate::monitor;
use crate::reply::Answered;
use crate::wire;

/// Size of the header of an answer.
const HEADER: usize = size_of::<wire::OutHeader>();
/// The longest answer that is put together before it is written.
const SMALL: usize = 160;

/// What connection, replies and backing ids share.
pub(crate) struct Shared {
    fd: OwnedFd,
    table: Mutex<Table>,
    /// How many entries of the table have a deadline or a pending interrupt.
    timed: AtomicUsize,
    ended: AtomicBool,
    grace: Duration,
    negotiated: Negotiated,
    /// The unique of the last interrupt that found no request, and how often in a row.
    stray: Mutex<(u64, u32)>,
}

impl Shared {
    pub(crate) fn new(fd: OwnedFd, negotiated: Negotiated, grace: Duration) -> Self {
        Self {
            fd,
            table: Mutex::default(),
            timed: AtomicUsize::new(0),
            ended: AtomicBool::new(false),
            grace,
            negotiated,
            stray: Mutex::default(),
        }
    }

    pub(crate) fn negotiated(&self) -> Negotiated {
        self.negotiated
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    pub(crate) fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(crate) fn has_timed(&self) -> bool {
        self.timed.load(Ordering::Relaxed) != 0
    }

    /// Gains the right to answer the request. False when somebody else had it.
    pub(crate) fn claim(&self, slot: u32, unique: u64) -> bool {
        let taken = self.table().take(slot, unique);
        taken.map(|taken| self.discount(&taken)).is_some()
    }

    fn discount(&self, taken: &Taken) {
        if taken.was_timed() {
            self.timed.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Writes the answer of a request that was claimed.
    pub(crate) fn answer(
        &self,
        unique: u64,
        opcode: u32,
        error: Option<Errno>,
        body: &[IoSlice<'_>],
    ) -> Answered {
        match self.write(unique, error.map_or(0, |errno| -errno.raw_os_error()), body) {
            Ok(()) => Answered::Delivered,
            // The request was aborted with its connection.
            Err(Errno::NOENT | Errno::NODEV | Errno::CONNABORTED) => Answered::TooLate,
            Err(errno) => {
                tracing::warn!(opcode, unique, %errno, "the kernel refused the answer to a FUSE request; its caller gets EIO");
                let _ = self.write(unique, -Errno::IO.raw_os_error(), &[]);
                Answered::TooLate
            }
        }
    }

    /// Writes one message: an answer, or (unique 0) a notification whose code stands in `error`.
    pub(crate) fn write(&self, unique: u64, error: i32, body: &[IoSlice<'_>]) -> Result<(), Errno> {
        let length = body.iter().map(|part| part.len()).sum::<usize>() + HEADER;
        let header = wire::OutHeader {
            len: u32::try_from(length).map_err(|_| Errno::INVAL)?,
            error,
            unique,
        };
        // One copy of a few bytes costs less than a second segment in the kernel.
        if length <= SMALL {
            let mut small = [0_u8; SMALL];
            let parts = body.iter().map(|part| &**part);
            let mut at = 0;
            for part in std::iter::once(header.as_bytes()).chain(parts) {
                small[at..at + part.len()].copy_from_slice(part);
                at += part.len();
            }
            return rustix::io::write(&self.fd, &small[..length]).map(|_| ());
        }
        let head = IoSlice::new(header.as_bytes());
        match body {
            [one] => rustix::io::writev(&self.fd, &[head, *one]),
            [one, two] => rustix::io::writev(&self.fd, &[head, *one, *two]),
            many => rustix::io::writev(
                &self.fd,
                &std::iter::once(head)
                    .chain(many.iter().copied())
                    .collect::<Vec<_>>(),
            ),
        }
        .map(|_| ())
    }

    pub(crate) fn on_interrupt(&self, slot: u32, unique: u64, callback: Box<dyn FnOnce() + Send>) {
        let back = if self.ended.load(Ordering::Acquire) {
            Some(callback)
        } else {
            self.table().set_callback(slot, unique, callback)
        };
        if let Some(callback) = back {
            callback();
        } else if self.ended.load(Ordering::Acquire) {
            // The end may have come between; whoever takes the callbacks out calls them.
            self.run_callbacks();
        }
    }

    pub(crate) fn interrupt_at_once(&self, slot: u32, unique: u64) {
        let taken = self.table().set_at_once(slot, unique);
        if let Some(taken) = taken {
            self.discount(&taken);
            self.answer(unique, 0, Some(Errno::INTR), &[]);
        }
    }

    pub(crate) fn set_deadline(&self, slot: u32, unique: u64, at: Instant, errno: Errno) {
        if self.table().set_deadline(slot, unique, at, errno) {
            self.add_timed();
        }
    }

    /// Counted while the table is not locked: the entry may already be answered, which only makes the count pass through a wrong value, as both
    /// sides add and subtract exactly once.
    fn add_timed(&self) {
        self.timed.fetch_add(1, Ordering::Relaxed);
        monitor::wake();
    }

    /// Answers what is past its deadline or its grace. Called by the monitor.
    pub(crate) fn sweep(&self, now: Instant) {
        loop {
            let expired = self.table().take_expired(now, self.grace);
            let Some((unique, errno, taken)) = expired else {
                return;
            };
            self.discount(&taken);
            self.answer(unique, 0, Some(errno), &[]);
        }
    }

    /// `interrupt` is the unique of the INTERRUPT itself, `target` that of the request it is for.
    pub(crate) fn interrupt(&self, interrupt: u64, target: u64) {
        let found = self.table().interrupt(target, Instant::now());
        match found {
            Interrupt::AnswerNow(taken) => {
                self.discount(&taken);
                self.answer(target, 0, Some(Errno::INTR), &[]);
            }
            Interrupt::Marked {
                callback,
                newly_timed,
            } => {
                if newly_timed {
                    self.add_timed();
                }
                if let Some(callback) = callback {
                    callback();
                }
            }
            Interrupt::Unknown => self.stray_interrupt(interrupt, target),
        }
    }

    /// An INTERRUPT for a request that is not in the table: another thread has read it and not entered it yet, or it is being answered now.
    /// EAGAIN makes the kernel send the INTERRUPT again if the request still waits (`fs/fuse/dev.c`, `fuse_dev_do_write`); otherwise it is
    /// refused with ENOENT, and that was all. A request nobody here has ever read (its reader died) would go round for ever, so after many turns
    /// it is ended with EINTR.
    fn stray_interrupt(&self, interrupt: u64, target: u64) {
        let turns = {
            let mut stray = self.stray.lock().unwrap_or_else(PoisonError::into_inner);
            let turns = if stray.0 == target {
                stray.1.saturating_add(1)
            } else {
                0
            };
            *stray = (target, turns);
            turns
        };
        match turns {
            0..16 => std::thread::yield_now(),
            16..256 => std::thread::sleep(Duration::from_millis(1)),
            _ => {
                let _ = self.write(target, -Errno::INTR.raw_os_error(), &[]);
                return;
            }
        }
        let _ = self.write(interrupt, -Errno::AGAIN.raw_os_error(), &[]);
    }

    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.run_callbacks();
    }

    fn run_callbacks(&self) {
        let callbacks = self.table().take_callbacks();
        for callback in callbacks {
            callback();
        }
    }
}
