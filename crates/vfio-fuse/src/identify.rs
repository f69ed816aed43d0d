//! Which open file a descriptor is: asked through the descriptor itself.
#![expect(unsafe_code, reason = "a raw ioctl on a node of our own")]

use rustix::fd::{AsRawFd, OwnedFd};
use rustix::io::Errno;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// `_IO('V', 0xfd)`: every node answers it with the number of the open file, to this process only.
pub(crate) const IDENTIFY: u32 = (b'V' as u32) << 8 | 0xfd;

/// The number of the open file behind a descriptor of one of our nodes. The request travels through
/// the kernel to another of our threads; the caller has made sure that the node is ours.
pub(crate) fn identify(fd: &OwnedFd) -> Result<u64, Errno> {
    let _asking = Asking::enter();
    // SAFETY: the command carries no pointer: the server of this node (ourselves) answers with a
    // number and touches no memory of the caller.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), IDENTIFY.into(), 0) };
    u64::try_from(answer)
        .map_err(|_| Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::BADFD))
}

/// Threads of this process that are in [`identify`].
static ASKING: Mutex<Vec<u32>> = Mutex::new(Vec::new());

fn asking() -> MutexGuard<'static, Vec<u32>> {
    ASKING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lists the calling thread while it lives. So a number in the list is never another's: the thread
/// that it names is there and waits.
struct Asking(u32);

impl Asking {
    fn enter() -> Asking {
        let tid = rustix::thread::gettid()
            .as_raw_nonzero()
            .get()
            .unsigned_abs();
        asking().push(tid);
        Asking(tid)
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        let mut asking = asking();
        if let Some(at) = asking.iter().position(|tid| *tid == self.0) {
            asking.swap_remove(at);
        }
    }
}

/// True when a thread is one of this process that asks.
pub(crate) fn is_ours(tid: u32) -> bool {
    asking().contains(&tid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_known_while_it_asks() {
        let asking = Asking::enter();
        let tid = asking.0;
        assert!(is_ours(tid));
        // Another that comes and goes takes nothing from it.
        std::thread::spawn(|| {
            let other = Asking::enter().0;
            assert!(!is_ours(other), "it has asked");
        })
        .join()
        .unwrap();
        assert!(is_ours(tid));
        drop(asking);
        assert!(!is_ours(tid));
    }
}
