//! Which open file a descriptor is: asked through the descriptor itself.
#![expect(unsafe_code, reason = "a raw ioctl on a node of our own")]

use rustix::fd::{AsRawFd, OwnedFd};
use rustix::io::Errno;

/// `_IO('V', 0xfd)`: every node answers it with the number of the open file, to this process only.
pub(crate) const IDENTIFY: u32 = (b'V' as u32) << 8 | 0xfd;

/// The number of the open file behind a descriptor of one of our nodes. The request travels through
/// the kernel to another of our threads; the caller has made sure that the node is ours.
pub(crate) fn identify(fd: &OwnedFd) -> Result<u64, Errno> {
    // SAFETY: the command carries no pointer: the server of this node (ourselves) answers with a
    // number and touches no memory of the caller.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), IDENTIFY.into(), 0) };
    u64::try_from(answer)
        .map_err(|_| Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::BADFD))
}

/// True when a thread is one of this process.
pub(crate) fn is_ours(tid: u32) -> bool {
    std::path::Path::new(&format!("/proc/self/task/{tid}")).exists()
}
