//! Where trapped calls arrive and are answered.

use crate::sys;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;

/// Where trapped calls arrive. Several threads may receive; each call arrives once.
///
/// It can be sent to another process and kept there (`SCM_RIGHTS`, pidfd_getfd). Polls readable while a
/// call waits, and hung up (`POLLHUP`) once no task with the filter is left.
#[derive(Debug)]
pub struct Listener(OwnedFd);

/// A trapped call. The caller waits until it is answered or killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notification {
    /// Names the call for as long as it waits. Never used again.
    pub id: u64,
    /// The calling *thread*, as the receiver's process namespace numbers it; 0 if it cannot be seen
    /// from there.
    pub tid: i32,
    /// The call's number (`libc::SYS_…`).
    pub number: libc::c_long,
    /// Its arguments, as the registers held them.
    pub args: [u64; 6],
}

impl Listener {
    pub(crate) fn new(fd: OwnedFd) -> Listener {
        Listener(fd)
    }

    /// Wakes the receiver on the caller's CPU and the caller on the receiver's, which saves the wake-up
    /// of another CPU (`SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP`).
    ///
    /// # Errors
    /// [`Errno::INVAL`]: Linux before 6.6.
    pub fn set_sync_wake_up(&self) -> Result<(), Errno> {
        sys::notif_set_flags(&self.0)
    }

    /// Waits for a trapped call.
    ///
    /// # Errors
    /// [`Errno::NOENT`]: the call was taken back meanwhile, or no task with the filter is left. Which
    /// of the two, poll tells; before Linux 6.11 a receiver that waits already is not told of the
    /// latter, so somebody should poll. [`Errno::INTR`]: a signal.
    pub fn recv(&self) -> Result<Notification, Errno> {
        sys::notif_recv(&self.0)
    }

    /// Whether the call still waits. Ask after each look at the caller's memory or descriptors: then
    /// what was looked at was the caller's.
    #[must_use]
    pub fn is_valid(&self, id: u64) -> bool {
        loop {
            match sys::notif_id_valid(&self.0, id) {
                Err(Errno::INTR) => {}
                result => return result.is_ok(),
            }
        }
    }

    /// Ends the call with a result: what the caller's system call returns.
    ///
    /// # Errors
    /// [`Errno::NOENT`]: the caller is gone, or before Linux 5.19 got a signal. [`Errno::INPROGRESS`]:
    /// the call is answered already.
    pub fn result(&self, id: u64, value: i64) -> Result<(), Errno> {
        sys::notif_send(&self.0, id, value, 0, false)
    }

    /// Ends the call with an errno.
    ///
    /// # Errors
    /// As [`Listener::result`].
    pub fn error(&self, id: u64, errno: Errno) -> Result<(), Errno> {
        sys::notif_send(&self.0, id, 0, -errno.raw_os_error(), false)
    }

    /// Lets the kernel do the call (`SECCOMP_USER_NOTIF_FLAG_CONTINUE`), with the arguments as they are
    /// then.
    ///
    /// # Errors
    /// As [`Listener::result`].
    pub fn let_through(&self, id: u64) -> Result<(), Errno> {
        sys::notif_send(&self.0, id, 0, 0, true)
    }

    /// Gives the caller a descriptor of the same open file, close-on-exec if said so, and ends the call
    /// with its number, both or neither (`SECCOMP_ADDFD_FLAG_SEND`, Linux 5.14).
    ///
    /// # Errors
    /// [`Errno::MFILE`]: the caller has no number left; the call still waits. [`Errno::NOENT`]: the
    /// caller is gone. [`Errno::INPROGRESS`]: the call is answered already.
    pub fn result_fd(&self, id: u64, fd: impl AsFd, cloexec: bool) -> Result<i32, Errno> {
        sys::notif_addfd(&self.0, id, fd.as_fd(), cloexec, true)
    }

    /// Gives the caller a descriptor and leaves the call waiting: for numbers that are returned in
    /// memory. It cannot be taken back.
    ///
    /// # Errors
    /// As [`Listener::result_fd`].
    pub fn add_fd(&self, id: u64, fd: impl AsFd, cloexec: bool) -> Result<i32, Errno> {
        sys::notif_addfd(&self.0, id, fd.as_fd(), cloexec, false)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Listener> for OwnedFd {
    fn from(listener: Listener) -> OwnedFd {
        listener.0
    }
}

/// For a listener that came from another process. Any other descriptor makes every call an errno.
impl From<OwnedFd> for Listener {
    fn from(fd: OwnedFd) -> Listener {
        Listener(fd)
    }
}
