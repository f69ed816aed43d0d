//! Open files by the number that the kernel sends back with each request.

use rustix::io::Errno;
use slab::Slab;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};
use vfio_core::caller::FileObject;
use vfio_core::device::DeviceFile;

/// How often a lack of descriptors is worth a line.
const SAY_AGAIN: Duration = Duration::from_secs(10);

/// A request that ends because this process has no descriptor left says so, with advice: its
/// client sees only an errno.
pub(crate) fn note(name: impl FnOnce() -> String, errno: Errno) {
    static SAID: Mutex<Option<Instant>> = Mutex::new(None);
    let which = match errno {
        Errno::MFILE => "this process",
        Errno::NFILE => "the machine",
        _ => return,
    };
    let now = Instant::now();
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    if said.is_some_and(|at| now.saturating_duration_since(at) < SAY_AGAIN) {
        return;
    }
    *said = Some(now);
    drop(said);
    let name = name();
    tracing::warn!(
        "{name}: {which} has no file descriptor left, a request failed with {errno}: \
         raise LimitNOFILE (or `ulimit -n`; fs.file-max for the machine), or serve fewer clients"
    );
}

/// A table of open files.
#[derive(Debug)]
pub(crate) struct Files<T>(RwLock<Slab<T>>);

impl<T> Default for Files<T> {
    fn default() -> Self {
        Files(RwLock::new(Slab::new()))
    }
}

impl<T: Clone> Files<T> {
    pub(crate) fn insert(&self, file: T) -> u64 {
        self.0
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(file) as u64
    }

    pub(crate) fn get(&self, fh: u64) -> Option<T> {
        let files = self.0.read().unwrap_or_else(PoisonError::into_inner);
        files.get(usize::try_from(fh).ok()?).cloned()
    }

    pub(crate) fn remove(&self, fh: u64) -> Option<T> {
        let mut files = self.0.write().unwrap_or_else(PoisonError::into_inner);
        files.try_remove(usize::try_from(fh).ok()?)
    }
}

/// Files of a `dev` tree, of every kind: one number, one file, so that the number alone tells which.
impl Files<FileObject> {
    pub(crate) fn device(&self, fh: u64) -> Option<Arc<DeviceFile>> {
        let files = self.0.read().unwrap_or_else(PoisonError::into_inner);
        match files.get(usize::try_from(fh).ok()?)? {
            FileObject::Device(file) => Some(Arc::clone(file)),
            _ => None,
        }
    }

    /// How many there are of a kind.
    pub(crate) fn count(&self, is: impl Fn(&FileObject) -> bool) -> usize {
        let files = self.0.read().unwrap_or_else(PoisonError::into_inner);
        files.iter().filter(|(_, file)| is(file)).count()
    }
}
