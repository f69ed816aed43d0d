//! A harmless signal that makes interruptible system calls of a thread end with EINTR.
#![expect(
    unsafe_code,
    reason = "signal handlers and signals to one thread have no safe interface"
)]

use std::sync::Once;
use std::sync::atomic::AtomicI32;
use std::sync::atomic::Ordering;

/// Ignored by default, so a process that never installed the handler is not harmed by it.
const SIGNAL: libc::c_int = libc::SIGURG;

extern "C" fn nothing(_: libc::c_int) {}

/// Installs the handler (which does nothing) once, without `SA_RESTART`. A handler the program has set already is left alone.
pub(crate) fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: a zeroed sigaction is a valid value (default action, empty mask, no flags).
        let mut old: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: with a null new action the call only writes to `old`.
        let known = unsafe { libc::sigaction(SIGNAL, std::ptr::null(), &raw mut old) } == 0;
        if !known || (old.sa_sigaction != libc::SIG_DFL && old.sa_sigaction != libc::SIG_IGN) {
            return;
        }
        // SAFETY: as above.
        let mut new: libc::sigaction = unsafe { std::mem::zeroed() };
        new.sa_sigaction = nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
        // SAFETY: the handler does nothing, so it is safe at any point of any thread.
        unsafe { libc::sigaction(SIGNAL, &raw const new, std::ptr::null_mut()) };
    });
}

/// A thread that can be signalled.
#[derive(Debug, Default)]
pub(crate) struct Nudged {
    tid: AtomicI32,
}

impl Nudged {
    /// Called by the thread itself: lets the signal through and says who it is.
    pub(crate) fn enter(&self) {
        // SAFETY: sigset_t is plain data, initialised by sigemptyset before use; the call changes only this thread's mask.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, SIGNAL);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
        }
        self.tid.store(
            rustix::thread::gettid().as_raw_nonzero().get(),
            Ordering::Release,
        );
    }

    /// Sends the signal. The caller holds the lock under which the thread takes itself off the list before it ends, so the id is its own.
    pub(crate) fn nudge(&self) {
        let tid = self.tid.load(Ordering::Acquire);
        if tid == 0 {
            return;
        }
        // SAFETY: tgkill touches no memory; the handler does nothing.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, SIGNAL) };
    }
}
