//! Interrupts: what `VFIO_DEVICE_SET_IRQS` asks for, and how a driver raises one.

use crate::{Errno, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use std::sync::Arc;

pub mod pci;

/// What a SET_IRQS request does, one of the three `VFIO_IRQ_SET_ACTION_*` bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Hold interrupts back.
    Mask,
    /// Let them through again.
    Unmask,
    /// Raise them, or say where they go.
    Trigger,
}

/// Where descriptors named in a request come from: the caller's table for the ioctl, the
/// message's ancillary data for vfio-user.
pub trait EventfdSource {
    /// The `n`th descriptor of the request as something to signal; `None` for -1 (any negative
    /// number). `EBADF` when it is not open, `EINVAL` when it is not an eventfd.
    fn eventfd(&self, n: usize) -> Result<Option<Trigger>>;

    /// True for a number that is neither a descriptor nor -1, which ERR and REQ refuse.
    fn is_invalid(&self, _n: usize) -> bool {
        false
    }
}

/// The data of a request, one of the three `VFIO_IRQ_SET_DATA_*` kinds.
#[derive(Clone, Copy)]
pub enum Data<'a> {
    /// No data: the action applies to all of `start..start + count`.
    None,
    /// One byte each; non-zero means the action applies.
    Bool(&'a [u8]),
    /// One descriptor each, looked up only when the driver asks.
    Eventfd(&'a dyn EventfdSource),
}

impl std::fmt::Debug for Data<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Data::None => f.write_str("None"),
            Data::Bool(bytes) => f.debug_tuple("Bool").field(bytes).finish(),
            Data::Eventfd(_) => f.write_str("Eventfd"),
        }
    }
}

/// A `VFIO_DEVICE_SET_IRQS` request that passed the central validation
/// (`vfio_set_irqs_validate_and_prepare`): `index` exists, `start + count` is within the
/// index's number of interrupts, exactly one kind of data and one action.
#[derive(Clone, Copy, Debug)]
pub struct SetIrqs<'a> {
    /// Interrupt index, for PCI one of [`vfio_uapi::pci`]'s.
    pub index: u32,
    /// First interrupt concerned.
    pub start: u32,
    /// How many; 0 disables the index for `None` + `Trigger`.
    pub count: u32,
    /// What to do.
    pub action: Action,
    /// To which, or with which descriptors.
    pub data: Data<'a>,
}

/// An eventfd that somebody waits on. Clones signal the same counter.
///
/// It holds its own reference, so a client may close its descriptor before it disables the
/// interrupt (QEMU does).
#[derive(Clone, Debug)]
pub struct Trigger(Arc<Eventfd>);

#[derive(Debug)]
struct Eventfd {
    fd: OwnedFd,
    /// Whether writing did not wait when it was named. The open file is the client's, which may
    /// change that.
    was_nonblocking: bool,
}

impl Eventfd {
    fn is_nonblocking(fd: &OwnedFd) -> bool {
        rustix::fs::fcntl_getfl(fd).is_ok_and(|flags| flags.contains(OFlags::NONBLOCK))
    }

    /// Whether writing waits for nobody, as far as can be seen. Most eventfds are non-blocking
    /// (QEMU's are), and that is quicker to be seen than room in the counter.
    fn is_writable(&self) -> bool {
        if self.was_nonblocking && Eventfd::is_nonblocking(&self.fd) {
            return true;
        }
        let mut ready = [PollFd::new(&self.fd, PollFlags::OUT)];
        match poll(&mut ready, Some(&Timespec::default())) {
            Ok(_) => ready[0].revents().contains(PollFlags::OUT),
            Err(_) => true,
        }
    }
}

impl Trigger {
    /// Wraps an eventfd. The transport has checked that it is one.
    pub fn new(eventfd: OwnedFd) -> Trigger {
        Trigger(Arc::new(Eventfd {
            was_nonblocking: Eventfd::is_nonblocking(&eventfd),
            fd: eventfd,
        }))
    }

    /// Adds one to the counter, as `eventfd_signal()`.
    ///
    /// A counter that is full is a signal nobody has consumed yet: nothing is lost and nothing
    /// is reported. Call it with no lock held: a hostile client can make the write wait until
    /// the transport's monitor interrupts it.
    pub fn signal(&self) {
        // The client's descriptor stays as it is (O_NONBLOCK belongs to the open file, which is
        // the client's), so whether it would wait is looked at first. Between the two calls
        // somebody may fill it: then the write waits, and EINTR ends it.
        if !self.0.is_writable() {
            return;
        }
        match rustix::io::write(&self.0.fd, &1u64.to_ne_bytes()) {
            Ok(_) | Err(Errno::INTR | Errno::AGAIN) => {}
            Err(error) => tracing::warn!("an interrupt's eventfd cannot be written: {error}"),
        }
    }

    /// The descriptor, for pollers (an eventfd used as input, the kernel's `virqfd`).
    pub fn fd(&self) -> &OwnedFd {
        &self.0.fd
    }

    /// True when both signal through the same value.
    pub fn same(&self, other: &Trigger) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::fcntl_setfl;

    const FULL: u64 = u64::MAX - 1;

    /// A trigger, and the client's descriptor of it.
    fn pair(flags: EventfdFlags) -> (Trigger, OwnedFd) {
        let client = eventfd(0, flags | EventfdFlags::CLOEXEC).unwrap();
        (Trigger::new(client.try_clone().unwrap()), client)
    }

    fn count(client: &OwnedFd) -> u64 {
        let mut count = [0; 8];
        rustix::io::read(client, &mut count).unwrap();
        u64::from_ne_bytes(count)
    }

    #[test]
    fn signals_are_counted_and_a_full_counter_is_left_alone() {
        for flags in [EventfdFlags::empty(), EventfdFlags::NONBLOCK] {
            let (trigger, client) = pair(flags);
            trigger.signal();
            trigger.signal();
            assert_eq!(count(&client), 2);
            rustix::io::write(&client, &FULL.to_ne_bytes()).unwrap();
            // A write that waits would wait for this thread.
            trigger.signal();
            assert_eq!(count(&client), FULL);
            trigger.signal();
            assert_eq!(count(&client), 1);
        }
    }

    #[test]
    fn a_client_that_changes_whether_it_waits_holds_nobody() {
        for (flags, changed) in [
            (EventfdFlags::NONBLOCK, OFlags::empty()),
            (EventfdFlags::empty(), OFlags::NONBLOCK),
        ] {
            let (trigger, client) = pair(flags);
            fcntl_setfl(&client, changed).unwrap();
            rustix::io::write(&client, &FULL.to_ne_bytes()).unwrap();
            trigger.signal();
            assert_eq!(count(&client), FULL);
            trigger.signal();
            assert_eq!(count(&client), 1);
        }
    }
}
