//! `VFIO_DEVICE_FEATURE` on a device file (`drivers/vfio/vfio_main.c`,
//! `vfio_ioctl_device_feature`): the core's own features, and the way to the driver's.
//!
//! Client memory is only touched with no lock held.

use super::dirty::Report;
use super::file::Grant;
use super::ops::Feature;
use crate::caller::Caller;
use crate::{Errno, Result};
use vfio_uapi::device::feature::{
    DmaLoggingControl, DmaLoggingRange, DmaLoggingReport, Feature as Number, FeatureFlags,
    FeatureHeader, FeatureOp, MigState,
};
use vfio_uapi::device::migration::State;
use vfio_uapi::dialect::vfio;
use zerocopy::{FromBytes, IntoBytes};

const HEAD: usize = size_of::<FeatureHeader>();

/// Most bytes of a driver's feature data that are looked at: every feature's structure is far
/// smaller.
const DATA_MAX: usize = 4096;

/// `LOG_MAX_RANGES`: one page of them.
const RANGES_MAX: u32 = 256;

/// Words of a bitmap that are looked at together: 32 KiB, which is 1 GiB of small pages.
const PIECE: u64 = 4096;

/// `files`: whoever asks can turn the number of a data session, which is what this returns then,
/// into a file for the client. 0 otherwise.
pub(super) fn feature(grant: &Grant, arg: u64, caller: &dyn Caller, files: bool) -> Result<u32> {
    let (head, argsz) = vfio::read::<FeatureHeader, _>(caller, arg, HEAD)?;
    head.flags.check()?;
    let data = arg.checked_add(HEAD as u64).ok_or(Errno::FAULT)?;
    match Number::try_from(head.flags.index()) {
        // The state's data comes through a descriptor, which no ioctl of ours can return. A device
        // that announces what it cannot do is worse than one that does not: QEMU would set no
        // blocker, find out when its guest is stopped, and reset the device. So without a
        // supervisor this is the file of a device without `mig_ops`.
        Ok(Number::Migration | Number::MigDeviceState | Number::MigDataSize) if !files => {
            Err(Errno::NOTTY)
        }
        Ok(Number::MigPrecopyInfoV2) if !files => Err(Errno::INVAL),
        Ok(Number::MigDeviceState) => return migration_state(grant, &head, data, caller),
        Ok(number @ (Number::Migration | Number::MigDataSize)) => {
            let session = &grant.session;
            let flags = session.steps().form()?.flags();
            if head.check(FeatureFlags::GET, size_of::<u64>())? == FeatureOp::Probe {
                return Ok(0);
            }
            let answer = match number {
                Number::Migration => flags.bits(),
                _ => session.machine().data_size(session.steps())?,
            };
            caller.copy_out(data, &answer.to_ne_bytes())
        }
        Ok(Number::MigPrecopyInfoV2) => {
            let form = grant.session.steps().form().map_err(|_| Errno::INVAL)?;
            if !form.pre_copy {
                return Err(Errno::INVAL);
            }
            // Flags are always cleared in the answer, so there is nothing to switch.
            head.check(FeatureFlags::SET, 0).map(drop)
        }
        Ok(Number::DmaLoggingStart) => logging_start(grant, &head, data, caller),
        Ok(Number::DmaLoggingStop) => {
            if head.check(FeatureFlags::SET, 0)? == FeatureOp::Set {
                grant.session.dirty().stop();
            }
            Ok(())
        }
        Ok(Number::DmaLoggingReport) => logging_report(grant, &head, data, caller),
        _ => drivers_own(grant, &head, argsz, data, caller),
    }
    .map(|()| 0)
}

/// `vfio_ioctl_device_feature_mig_device_state`. After the arcs the structure is written back
/// whatever came of them; if that faults, the state has changed all the same.
fn migration_state(
    grant: &Grant,
    head: &FeatureHeader,
    at: u64,
    caller: &dyn Caller,
) -> Result<u32> {
    let session = &grant.session;
    session.steps().form()?;
    let both = FeatureFlags::GET | FeatureFlags::SET;
    let op = head.check(both, size_of::<MigState>())?;
    if op == FeatureOp::Probe {
        return Ok(0);
    }
    let mut asked: MigState = read(caller, at)?;
    let answer = if op == FeatureOp::Get {
        asked.device_state = session.machine().state() as u32;
        Ok(0)
    } else {
        State::try_from(asked.device_state)
            .and_then(|to| session.machine().set(session.steps(), to))
            .map(|opened| opened.map_or(0, |opened| opened.session))
    };
    asked.data_fd = -1;
    caller.copy_out(at, asked.as_bytes())?;
    answer
}

fn drivers_own(
    grant: &Grant,
    head: &FeatureHeader,
    argsz: u32,
    at: u64,
    caller: &dyn Caller,
) -> Result {
    let probe = head.flags.contains(FeatureFlags::PROBE);
    let room = (argsz as usize).saturating_sub(HEAD).min(DATA_MAX);
    let mut data = vec![0; if probe { 0 } else { room }];
    if !data.is_empty() {
        caller.copy_in(at, &mut data)?;
    }
    grant.session.feature(Feature {
        flags: head.flags,
        data: &mut data,
    })?;
    if head.flags.contains(FeatureFlags::GET) && !data.is_empty() {
        caller.copy_out(at, &data)?;
    }
    Ok(())
}

fn read<T: FromBytes + IntoBytes>(caller: &dyn Caller, at: u64) -> Result<T> {
    let mut value = T::new_zeroed();
    caller.copy_in(at, value.as_mut_bytes())?;
    Ok(value)
}

/// `vfio_ioctl_device_feature_logging_start`.
fn logging_start(grant: &Grant, head: &FeatureHeader, at: u64, caller: &dyn Caller) -> Result {
    if head.check(FeatureFlags::SET, size_of::<DmaLoggingControl>())? == FeatureOp::Probe {
        return Ok(());
    }
    let mut control: DmaLoggingControl = read(caller, at)?;
    match control.num_ranges {
        0 => return Err(Errno::INVAL),
        1..=RANGES_MAX => {}
        _ => return Err(Errno::TOOBIG),
    }
    let mut array = vec![DmaLoggingRange::default(); control.num_ranges as usize];
    caller.copy_in(control.ranges, array.as_mut_slice().as_mut_bytes())?;
    let ranges: Vec<(u64, u64)> = array
        .iter()
        .map(|range| (range.iova, range.length))
        .collect();
    let log = grant.session.dirty();
    control.page_size = log.start(control.page_size, &ranges)?;
    caller
        .copy_out(at, control.as_bytes())
        .inspect_err(|_| log.stop())
}

/// `vfio_ioctl_device_feature_logging_report`. The bitmap is the client's; bits of it are only set.
fn logging_report(grant: &Grant, head: &FeatureHeader, at: u64, caller: &dyn Caller) -> Result {
    if head.check(FeatureFlags::GET, size_of::<DmaLoggingReport>())? == FeatureOp::Probe {
        return Ok(());
    }
    let asked: DmaLoggingReport = read(caller, at)?;
    let log = grant.session.dirty();
    let Some(report) = Report::check(asked.iova, asked.length, asked.page_size)? else {
        return log.running();
    };
    let mut word = 0;
    while let Some(next) = log.next(&report, word)? {
        let words = PIECE.min(report.words() - next);
        let mut bits = vec![0; words as usize];
        log.take(&report, next, words, &mut bits)?;
        give(asked.bitmap, next, &bits, caller)
            .inspect_err(|_| log.put_back(&report, next, &bits))?;
        word = next + words;
    }
    Ok(())
}

/// Sets bits in the client's bitmap, from word `word` of it on.
fn give(bitmap: u64, word: u64, bits: &[u64], caller: &dyn Caller) -> Result {
    let used = bits
        .iter()
        .rposition(|word| *word != 0)
        .map_or(0, |n| n + 1);
    let bits = &bits[..used];
    let at = word
        .checked_mul(8)
        .and_then(|offset| bitmap.checked_add(offset))
        .ok_or(Errno::FAULT)?;
    let mut theirs = vec![0u64; bits.len()];
    caller.copy_in(at, theirs.as_mut_slice().as_mut_bytes())?;
    for (theirs, bits) in theirs.iter_mut().zip(bits) {
        *theirs |= bits;
    }
    caller.copy_out(at, theirs.as_slice().as_bytes())
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests;
