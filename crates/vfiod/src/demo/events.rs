//! Life-cycle steps, told as they happen and counted.

use super::say::{Teller, Who, count};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use vfio_core::event::{Notice, What};

/// How many devices there have been.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) allocated: AtomicU32,
    pub(super) released: AtomicU32,
}

/// Tells of life-cycle steps as they happen, and counts.
pub(super) fn watch(
    teller: &Arc<Teller>,
    tally: &Arc<Tally>,
) -> impl Fn(&Notice) + Send + Sync + 'static + use<> {
    let (teller, tally) = (Arc::clone(teller), Arc::clone(tally));
    move |notice| {
        let Notice::Event(event) = notice else { return };
        let text = match &event.what {
            What::Allocated => {
                tally.allocated.fetch_add(1, Ordering::AcqRel);
                "init ran; it has the lowest free number, and nobody sees it".to_owned()
            }
            What::Registered => "registered: in sysfs, in a group, with a node".to_owned(),
            What::Opened => "opened: one user more".to_owned(),
            What::Bound => "first open: the driver's open ran".to_owned(),
            What::Unbound => "last close: the driver's close ran".to_owned(),
            What::Closed => "closed: one user less".to_owned(),
            What::Unregistering { users } => format!(
                "unregistering: its names are gone, {} to wait for",
                count(*users as usize, "user")
            ),
            What::Requested { count } => format!("request({count}): the user is asked to let go"),
            What::Disassociated => "its users are cut off".to_owned(),
            What::Unregistered => "unregistered".to_owned(),
            What::Released => {
                tally.released.fetch_add(1, Ordering::AcqRel);
                "released: the driver's state is dropped, the number is free".to_owned()
            }
            _ => return,
        };
        // Standard output may be gone; then nobody listens anyway.
        let _ = teller.line(Who::Core, &format!("{}: {text}", event.device));
    }
}
