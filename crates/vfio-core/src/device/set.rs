//! Device sets: devices whose opens and closes exclude each other
//! (`drivers/vfio/vfio_main.c`, `vfio_assign_device_set`).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// All sets that exist, by key. A set lives as long as it has a member.
#[derive(Debug, Default)]
pub(crate) struct Sets {
    shared: Arc<Mutex<HashMap<u64, Weak<DeviceSet>>>>,
}

/// A set. Its lock is held around first open, last close, bind, attach and detach.
#[derive(Debug)]
pub(crate) struct DeviceSet {
    key: Option<u64>,
    lock: Mutex<()>,
    sets: Weak<Mutex<HashMap<u64, Weak<DeviceSet>>>>,
}

/// A device's place in its set. Dropping it leaves the set; the last member frees it.
#[derive(Clone, Debug)]
pub(crate) struct Membership(Arc<DeviceSet>);

impl Sets {
    /// Joins the set with this key, which is made if nobody is in it.
    pub(crate) fn join(&self, key: u64) -> Membership {
        let mut sets = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(set) = sets.get(&key).and_then(Weak::upgrade) {
            return Membership(set);
        }
        let set = Arc::new(DeviceSet {
            key: Some(key),
            lock: Mutex::new(()),
            sets: Arc::downgrade(&self.shared),
        });
        sets.insert(key, Arc::downgrade(&set));
        Membership(set)
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
    /// A set of one, for devices that joined none: in no table, since nobody can join it.
    pub(crate) fn singleton() -> Membership {
        Membership(Arc::new(DeviceSet {
            key: None,
            lock: Mutex::new(()),
            sets: Weak::new(),
        }))
    }

    /// The set's lock.
    pub(crate) fn lock(&self) -> MutexGuard<'_, ()> {
        self.0.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True when both are in one set.
    #[cfg(test)]
    pub(crate) fn same(&self, other: &Membership) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Drop for DeviceSet {
    fn drop(&mut self) {
        let (Some(key), Some(sets)) = (self.key, self.sets.upgrade()) else {
            return;
        };
        let mut sets = sets.lock().unwrap_or_else(PoisonError::into_inner);
        // Somebody may have made a new set with this key since the last member left this one.
        if sets.get(&key).is_some_and(|set| set.strong_count() == 0) {
            sets.remove(&key);
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
