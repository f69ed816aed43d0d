//! The merge tree: the machine's `/sys` with ours in it, for `vfioctl run`.

use super::Server;
use super::failure::{Stop, errno_failure, fail};
use std::path::Path;
use std::sync::PoisonError;
use vfiod_control::{Answer, FailureKind};

/// The merge tree.
#[derive(Debug, Default)]
pub(crate) enum Merge {
    /// Nobody has asked for it.
    #[default]
    Unasked,
    /// Mounted.
    Mounted { _sys: vfio_fuse::Sys },
    /// The daemon is stopping: it is mounted no more.
    Over,
}

impl Server {
    /// Takes the merge tree away, if it was ever asked for.
    pub(crate) fn unmount_merge(&self) {
        let mut merge = self.merge.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *merge, Merge::Over);
        drop(merge);
        drop(before);
    }

    /// Mounts the merge tree at the first request; it stays as long as the daemon.
    pub(super) fn merge_tree(&self) -> Result<Answer, Stop> {
        let mut merge = self.merge.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.sys.with_file_name("merge");
        if let Merge::Over = *merge {
            return Err(fail(FailureKind::Failed, "vfiod is stopping".to_owned()).into());
        }
        if let Merge::Unasked = *merge {
            crate::daemon::clear_stale(&path);
            let made = vfio_fuse::Sys::merged(
                &self.core,
                &path,
                Path::new("/sys"),
                crate::daemon::own_ids(),
            );
            let sys = made.map_err(|errno| {
                errno_failure(errno, format!("cannot mount {}: {errno}", path.display()))
            })?;
            *merge = Merge::Mounted { _sys: sys };
        }
        Ok(Answer::Merge {
            path: path.to_string_lossy().into_owned(),
        })
    }
}
