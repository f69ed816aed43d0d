//! SET_IRQS: as the ioctl, but the descriptors come beside the payload.

use super::session::Session;
use crate::wire::take;
use client_process::is_eventfd;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};
use vfio_core::irq::{Action, Data, EventfdSource, SetIrqs, Trigger};
use vfio_core::{Errno, Result};
use vfio_uapi::device::{IrqSet, IrqSetFlags};

/// The descriptors of one message. None at all take the eventfds of the range away.
struct Passed(Mutex<Vec<Option<OwnedFd>>>);

impl EventfdSource for Passed {
    fn eventfd(&self, n: usize) -> Result<Option<Trigger>> {
        let mut fds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if fds.is_empty() {
            return Ok(None);
        }
        let fd = fds.get_mut(n).and_then(Option::take).ok_or(Errno::INVAL)?;
        if !is_eventfd(&fd) {
            return Err(Errno::INVAL);
        }
        Ok(Some(Trigger::new(fd)))
    }
}

impl Session {
    /// `EINVAL` as `vfio_set_irqs_validate_and_prepare`, and for another number of descriptors than
    /// of interrupts; `ENOTTY` for none or several actions; `ENOSPC` when there are fewer vectors than
    /// asked for; else the driver's.
    pub(super) fn set_irqs(&self, payload: &[u8], fds: Vec<OwnedFd>) -> Result {
        let (mut set, data) = take::<IrqSet>(payload)?;
        let kind = set.flags & IrqSetFlags::DATA_MASK;
        let device = self.file.device().ok_or(Errno::NODEV)?;
        let indexes = device.info()?.num_irqs;
        let irqs = match set.index < indexes {
            true => device.irq(set.index)?.count,
            false => return Err(Errno::INVAL),
        };
        let off = IrqSetFlags::DATA_NONE | IrqSetFlags::ACTION_TRIGGER;
        if irqs == 0 && set.flags == off && set.start == 0 && set.count == 0 {
            // Clients turn off what they never had.
            return Ok(());
        }
        if kind == IrqSetFlags::DATA_EVENTFD {
            // They are not in the payload, so there is no data to have room for.
            set.flags = (set.flags - IrqSetFlags::DATA_MASK) | IrqSetFlags::DATA_NONE;
        }
        let len = set.data_size(irqs, indexes)?;
        let data = data.get(..len).ok_or(Errno::INVAL)?;
        let has_fds = !fds.is_empty();
        if has_fds && (kind != IrqSetFlags::DATA_EVENTFD || fds.len() != set.count as usize) {
            return Err(Errno::INVAL);
        }
        let passed = Passed(Mutex::new(fds.into_iter().map(Some).collect()));
        let there_are = self.file.set_irqs(SetIrqs {
            index: set.index,
            start: set.start,
            count: set.count,
            action: match set.flags & IrqSetFlags::ACTION_MASKS {
                IrqSetFlags::ACTION_MASK => Action::Mask,
                IrqSetFlags::ACTION_UNMASK => Action::Unmask,
                IrqSetFlags::ACTION_TRIGGER => Action::Trigger,
                _ => return Err(Errno::NOTTY),
            },
            data: match kind {
                IrqSetFlags::DATA_NONE => Data::None,
                IrqSetFlags::DATA_BOOL => Data::Bool(data),
                _ => Data::Eventfd(&passed),
            },
        })?;
        // The reply has no place for the number.
        if there_are > 0 {
            return Err(Errno::NOSPC);
        }
        Ok(())
    }
}
