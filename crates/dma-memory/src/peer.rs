//! Which files are memory of our own devices.

use std::collections::HashMap;
use std::sync::LazyLock;
use std::sync::PoisonError;
use std::sync::RwLock;

use client_process::FileId;

/// How often each is named.
static FILES: LazyLock<RwLock<HashMap<FileId, usize>>> = LazyLock::new(RwLock::default);

/// As long as this exists, mappings of a file are mappings of a device's memory.
#[derive(Debug)]
pub(crate) struct PeerFile(FileId);

impl PeerFile {
    pub(crate) fn new(file: FileId) -> Self {
        let mut files = FILES.write().unwrap_or_else(PoisonError::into_inner);
        *files.entry(file).or_default() += 1;
        Self(file)
    }

    pub(crate) fn id(&self) -> FileId {
        self.0
    }
}

impl Drop for PeerFile {
    fn drop(&mut self) {
        let mut files = FILES.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = files.get_mut(&self.0) {
            *count -= 1;
            if *count == 0 {
                files.remove(&self.0);
            }
        }
    }
}

/// Whether a file is a device's memory.
pub(crate) fn is_peer(file: FileId) -> bool {
    let files = FILES.read().unwrap_or_else(PoisonError::into_inner);
    files.contains_key(&file)
}
