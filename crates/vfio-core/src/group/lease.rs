//! What a session of a device holds of its group.

use super::Group;
use std::sync::Arc;

/// A device of the group is open, or about to be. Given back after the last close, with no lock
/// held that comes after the group's.
#[derive(Debug)]
pub(crate) struct Lease {
    group: Arc<Group>,
    kind: Kind,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Bound through its own node: the group cannot be opened.
    Cdev,
    /// Open through the container: keeps the group's file, and the container.
    Container,
    /// Open through an iommufd: keeps neither.
    Iommufd,
}

impl Lease {
    /// The caller has counted it.
    pub(super) fn cdev(group: &Arc<Group>) -> Lease {
        Lease {
            group: Arc::clone(group),
            kind: Kind::Cdev,
        }
    }

    pub(super) fn container(group: &Arc<Group>) -> Lease {
        Lease {
            group: Arc::clone(group),
            kind: Kind::Container,
        }
    }

    pub(super) fn iommufd(group: &Arc<Group>) -> Lease {
        Lease {
            group: Arc::clone(group),
            kind: Kind::Iommufd,
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.group.state();
        match self.kind {
            Kind::Cdev => state.cdev = state.cdev.saturating_sub(1),
            Kind::Iommufd => state.iommufd = state.iommufd.saturating_sub(1),
            Kind::Container => {
                // The file cannot have gone: this kept it.
                if let Some(open) = &mut state.open {
                    open.kept = open.kept.saturating_sub(1);
                }
            }
        }
        let awaited = state.waiters > 0;
        drop(state);
        if awaited {
            self.group.changed.notify_all();
        }
        self.group.finish_close();
    }
}
