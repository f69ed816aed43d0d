//! Device sets: devices whose opens and closes exclude each other
//! (`drivers/vfio/vfio_main.c`, `vfio_assign_device_set`).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// All sets that exist, by key. A set lives as long as it has a member.
#[derive(Debug, Default)]
pub(crate) struct Sets {
    shared: Arc<Mutex<HashMap<u64, Weak<DeviceSet>>>>,
}

/// A set that several devices may be in.
#[derive(Debug)]
pub(crate) struct DeviceSet {
    key: u64,
    lock: Mutex<()>,
    sets: Weak<Mutex<HashMap<u64, Weak<DeviceSet>>>>,
}

/// A device's place in its set. Dropping it leaves the set; the last member frees it. The set's
/// lock is held around first open, last close, bind, attach and detach.
#[derive(Debug)]
pub(crate) enum Membership {
    /// In no table, since nobody can join it: the lock is all there is of it.
    Alone(Mutex<()>),
    /// With those who gave the same key.
    Shared(Arc<DeviceSet>),
}

impl Sets {
    /// Joins the set with this key, which is made if nobody is in it.
    pub(crate) fn join(&self, key: u64) -> Membership {
        let mut sets = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(set) = sets.get(&key).and_then(Weak::upgrade) {
            return Membership::Shared(set);
        }
        let set = Arc::new(DeviceSet {
            key,
            lock: Mutex::new(()),
            sets: Arc::downgrade(&self.shared),
        });
        sets.insert(key, Arc::downgrade(&set));
        Membership::Shared(set)
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.shared
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }
}

impl Membership {
    /// A set of one, for devices that joined none.
    pub(crate) fn singleton() -> Membership {
        Membership::Alone(Mutex::new(()))
    }

    /// The set's lock.
    pub(crate) fn lock(&self) -> MutexGuard<'_, ()> {
        let lock = match self {
            Membership::Alone(lock) => lock,
            Membership::Shared(set) => &set.lock,
        };
        lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True when both are in one set.
    #[cfg(test)]
    pub(crate) fn same(&self, other: &Membership) -> bool {
        match (self, other) {
            (Membership::Shared(one), Membership::Shared(other)) => Arc::ptr_eq(one, other),
            _ => std::ptr::eq(self, other),
        }
    }
}

impl Drop for DeviceSet {
    fn drop(&mut self) {
        let Some(sets) = self.sets.upgrade() else {
            return;
        };
        let mut sets = sets.lock().unwrap_or_else(PoisonError::into_inner);
        // Somebody may have made a new set with this key since the last member left this one.
        if sets
            .get(&self.key)
            .is_some_and(|set| set.strong_count() == 0)
        {
            sets.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_key_same_set_and_gone_with_the_last_member() {
        let sets = Sets::default();
        let a = sets.join(7);
        let b = sets.join(7);
        let c = sets.join(8);
        assert!(a.same(&b));
        assert!(!a.same(&c));
        assert_eq!(sets.len(), 2);
        drop((a, c));
        assert_eq!(sets.len(), 1);
        assert!(sets.join(7).same(&b));
        drop(b);
        assert_eq!(sets.len(), 0);
    }
}
