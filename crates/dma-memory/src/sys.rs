#![expect(
    unsafe_code,
    reason = "leases are fcntl commands that rustix does not wrap"
)]
//! Leases: the one question that tells who else has a file open.

use rustix::fd::AsRawFd;
use rustix::fd::BorrowedFd;
use rustix::io::Errno;

use crate::Result;

fn fcntl(file: BorrowedFd<'_>, command: libc::c_int, argument: libc::c_int) -> Result<()> {
    // SAFETY: the commands used here take a number, no address.
    if unsafe { libc::fcntl(file.as_raw_fd(), command, argument) } < 0 {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    Ok(())
}

/// Takes a write lease and gives it back. AGAIN: another open file exists (`fs/locks.c`,
/// `check_conflicting_open`). One at a time per open file.
///
/// Whoever opens the file in between makes the kernel send us a signal. SIGIO, the usual one, ends a
/// process; SIGURG is ignored by default. Giving a lease back resets the choice (`lease_modify`), so it
/// is made each time, and another thread must not do so meanwhile.
pub(crate) fn try_lease(file: BorrowedFd<'_>) -> Result<()> {
    /// `include/uapi/asm-generic/fcntl.h`; libc lacks it for Linux with glibc.
    const F_SETSIG: libc::c_int = 10;
    fcntl(file, F_SETSIG, libc::SIGURG)?;
    fcntl(file, libc::F_SETLEASE, libc::F_WRLCK)?;
    fcntl(file, libc::F_SETLEASE, libc::F_UNLCK)
}
