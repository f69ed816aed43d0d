//! What happened to whom: life-cycle events, for the control socket, for uevents and for
//! transports that must forget names.

use crate::sync::{Mutex, lock};
use std::sync::Arc;
use std::time::Instant;

/// A step in the life of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum What {
    /// `init` returned; the index is taken, nobody sees the device yet.
    Allocated,
    /// Visible in sysfs; a node exists; users may come.
    Registered,
    /// A file of the device was opened (it counts as a user, it may do nothing yet).
    Opened,
    /// First open: the driver's `open` returned.
    Bound,
    /// Last close: the driver's `close` returned.
    Unbound,
    /// A file of the device was closed.
    Closed,
    /// Unregister has begun: the names are gone, no new users.
    Unregistering {
        /// How many users it found.
        users: u32,
    },
    /// The driver was asked to make its users let go.
    Requested {
        /// 0 for the first time, as `ops->request(vdev, count)`.
        count: u32,
    },
    /// The users were cut off: every call of theirs gets `ENODEV` from now on.
    Disassociated,
    /// The last user has gone; unregister has returned or will now.
    Unregistered,
    /// The driver's state is dropped and the index is free.
    Released,
    /// A driver callback panicked; the device is dead.
    Panicked,
}

/// One event.
#[derive(Clone, Debug)]
pub struct Event {
    /// When.
    pub at: Instant,
    /// `vfioN`.
    pub device: String,
    /// The device's index, N in `vfioN`.
    pub index: u32,
    /// The name of the device it belongs to (a uuid, a PCI address).
    pub parent: String,
    /// What happened.
    pub what: What,
}

/// A kernel-style uevent: what udev would be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uevent {
    /// `add`, `remove`, `change`, `bind`, `unbind`, `move`, `online` or `offline`.
    pub action: String,
    /// Path below `/sys`, starting with `/devices/`.
    pub devpath: String,
    /// `SUBSYSTEM`.
    pub subsystem: String,
    /// Further `KEY=value` pairs, in order.
    pub env: Vec<(String, String)>,
}

/// Something a subscriber gets.
#[derive(Clone, Debug)]
pub enum Notice {
    /// A device's life went a step further.
    Event(Event),
    /// udev would be told this.
    Uevent(Uevent),
    /// A VFIO group has died: its name leads nowhere, files of it that are open live on.
    GroupGone {
        /// Its name, the number of its IOMMU group.
        name: String,
        /// [`Group::serial`](crate::group::Group::serial).
        serial: u64,
    },
}

type Subscriber = Arc<dyn Fn(&Notice) + Send + Sync>;

/// The list of those who listen.
#[derive(Default)]
pub(crate) struct Subscribers {
    /// Replaced as a whole, so that an event takes one count to have it.
    list: Mutex<Arc<[(u64, Subscriber)]>>,
    next: Mutex<u64>,
    any: std::sync::atomic::AtomicBool,
}

impl std::fmt::Debug for Subscribers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Subscribers")
            .field("count", &lock(&self.list).len())
            .finish()
    }
}

/// Somebody listens until this is dropped.
#[derive(Debug)]
#[must_use = "dropping a subscription ends it"]
pub struct Subscription {
    id: u64,
    subscribers: Arc<Subscribers>,
}

impl Subscribers {
    pub(crate) fn add(self: &Arc<Self>, f: Subscriber) -> Subscription {
        let id = {
            let mut next = lock(&self.next);
            *next += 1;
            *next
        };
        let mut list = lock(&self.list);
        *list = list.iter().cloned().chain([(id, f)]).collect();
        self.any.store(true, std::sync::atomic::Ordering::Release);
        drop(list);
        Subscription {
            id,
            subscribers: Arc::clone(self),
        }
    }

    /// True when somebody listens; what nobody hears need not be put together.
    pub(crate) fn any(&self) -> bool {
        self.any.load(std::sync::atomic::Ordering::Acquire)
    }

    /// Calls every subscriber, on this thread, with no lock held.
    pub(crate) fn send(&self, notice: &Notice) {
        let list = Arc::clone(&*lock(&self.list));
        for (_, f) in list.iter() {
            f(notice);
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut list = lock(&self.subscribers.list);
        let others = list.iter().filter(|(id, _)| *id != self.id);
        let others = others.cloned().collect();
        let before = std::mem::replace(&mut *list, others);
        self.subscribers
            .any
            .store(!list.is_empty(), std::sync::atomic::Ordering::Release);
        drop(list);
        drop(before);
    }
}
