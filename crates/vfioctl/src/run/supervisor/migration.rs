//! Migration of a device of ours: what a file of it cannot do alone, because the data of a state comes
//! through a descriptor that VFIO_DEVICE_FEATURE returns in its structure.

use super::calls::{Supervisor, descriptor};
use super::kvm::Outcome;
use super::sys;
use client_process::Caller;
use rustix::fd::AsFd;
use rustix::io::Errno;
use seccomp_notify::Notification;
use vfio_uapi::device::feature::{Feature, FeatureFlags, FeatureHeader, MigState};
use vfio_uapi::private::kind;
use zerocopy::{FromBytes, IntoBytes};

const HEAD: usize = size_of::<FeatureHeader>();

/// No feature of migration has more data.
const DATA: usize = size_of::<MigState>();

impl Supervisor {
    /// VFIO_DEVICE_FEATURE on a device of ours. Features of migration are asked of the daemon with our
    /// own copy of the structure; where a session has been opened its file goes to the client
    /// (`drivers/vfio/vfio_main.c`, `vfio_ioctl_device_feature_mig_device_state`). All others are the
    /// device file's.
    pub(super) fn feature(&self, caller: Caller, call: &Notification) -> Result<Outcome, Errno> {
        let [_, _, at, ..] = call.args;
        let mut arg = [0; HEAD + DATA];
        let (head, data) = arg.split_at_mut(HEAD);
        if caller.copy_in(at, head).is_err() {
            // The device file will say so.
            return Ok(Outcome::LetThrough);
        }
        let head = FeatureHeader::read_from_bytes(head).map_err(|_| Errno::INVAL)?;
        let feature = match Feature::try_from(head.flags.index()) {
            Ok(
                feature @ (Feature::Migration
                | Feature::MigDeviceState
                | Feature::MigDataSize
                | Feature::MigPrecopyInfoV2),
            ) => feature,
            _ => return Ok(Outcome::LetThrough),
        };
        let device = match self.nodes.get(caller, descriptor(call)) {
            Ok(device) => device,
            Err(Errno::NOTTY) => return Ok(Outcome::LetThrough),
            Err(errno) => return Err(errno),
        };
        let what = sys::what(device.as_fd())?;
        if what.kind != kind::DEVICE {
            // The number means something else there.
            return Ok(Outcome::LetThrough);
        }
        let data_at = at.checked_add(HEAD as u64).ok_or(Errno::FAULT)?;
        let has_data = !head.flags.contains(FeatureFlags::PROBE) && head.data_room() >= DATA;
        let is_state = feature == Feature::MigDeviceState && has_data;
        if is_state {
            caller.copy_in(data_at, data)?;
        }
        // What was read is the caller's.
        self.check(call)?;
        let done = sys::feature(device.as_fd(), &mut arg);
        let (_, data) = arg.split_at(HEAD);
        let gives = is_state || head.flags.contains(FeatureFlags::GET) && has_data;
        if done.is_ok() && gives {
            // If this faults the state has changed all the same.
            self.check(call)?;
            caller.copy_out(data_at, data)?;
        } else if is_state && self.check(call).is_ok() {
            let _ = caller.copy_out(data_at, data);
        }
        let session = match done? {
            0 => return Ok(Outcome::Result(0)),
            session => session,
        };
        let file = self.nodes.open_device(what.index)?;
        sys::open_data(file.as_fd(), device.as_fd(), session)?;
        let number = self.listener.add_fd(call.id, &file, true)?;
        let number_at = data_at
            .checked_add(std::mem::offset_of!(MigState, data_fd) as u64)
            .ok_or(Errno::FAULT)?;
        caller.copy_out(number_at, number.as_bytes())?;
        Ok(Outcome::Result(0))
    }
}
