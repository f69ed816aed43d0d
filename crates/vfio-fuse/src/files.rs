//! Open files by the number that the kernel sends back with each request.

use slab::Slab;
use std::sync::{Arc, PoisonError, RwLock};

/// A table of open files.
#[derive(Debug)]
pub(crate) struct Files<T>(RwLock<Slab<Arc<T>>>);

impl<T> Default for Files<T> {
    fn default() -> Self {
        Files(RwLock::new(Slab::new()))
    }
}

impl<T> Files<T> {
    pub(crate) fn insert(&self, file: Arc<T>) -> u64 {
        self.0
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(file) as u64
    }

    pub(crate) fn get(&self, fh: u64) -> Option<Arc<T>> {
        let files = self.0.read().unwrap_or_else(PoisonError::into_inner);
        files.get(usize::try_from(fh).ok()?).cloned()
    }

    pub(crate) fn remove(&self, fh: u64) -> Option<Arc<T>> {
        let mut files = self.0.write().unwrap_or_else(PoisonError::into_inner);
        files.try_remove(usize::try_from(fh).ok()?)
    }

    pub(crate) fn len(&self) -> usize {
        self.0.read().unwrap_or_else(PoisonError::into_inner).len()
    }
}
