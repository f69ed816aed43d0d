//! The commands of our own nodes (`vfio_uapi::private`): what a supervisor asks.

use crate::caller::{FuseCaller, opener, shares_our_pids};
use fuse_server::{Answered, ReplyIoctl};
use rustix::io::Errno;
use vfio_core::caller::{Caller as _, FileObject};
use vfio_core::device::DeviceFile;
use vfio_core::group::GroupFile;
use vfio_uapi::UserMemory;
use vfio_uapi::dialect::vfio;
use vfio_uapi::private::{NAME_MAX, OpenData, OpenDevice, What};

/// No smaller than what a client's memory can be unmapped by.
const PAGE: u64 = 4096;

/// The answer to our own question.
pub(crate) fn identified(fh: u64, reply: ReplyIoctl) -> Answered {
    match i32::try_from(fh) {
        Ok(fh) => reply.result(fh, &[]),
        Err(_) => reply.error(Errno::OVERFLOW),
    }
}

/// `WHAT`.
pub(crate) fn what(caller: &FuseCaller<'_>, arg: u64, mut what: What) -> Result<u32, Errno> {
    let (asked, argsz) = vfio::read::<What, _>(caller, arg, size_of::<What>())?;
    what.argsz = asked.argsz;
    vfio::write_back(caller, arg, &what, argsz)?;
    Ok(0)
}

/// `FIND_DEVICE`.
pub(crate) fn find_device(
    group: &GroupFile,
    caller: &FuseCaller<'_>,
    arg: u64,
) -> Result<u32, Errno> {
    let name = read_name(caller, arg)?;
    Ok(group.find_device(&name)?.index())
}

/// `OPEN_DEVICE`.
pub(crate) fn open_device(
    file: &DeviceFile,
    caller: &FuseCaller<'_>,
    arg: u64,
) -> Result<u32, Errno> {
    let (open, _) = vfio::read::<OpenDevice, _>(caller, arg, size_of::<OpenDevice>())?;
    let len = open.name_len as usize;
    if len >= NAME_MAX {
        return Err(Errno::INVAL);
    }
    let mut name = vec![0; len];
    caller.copy_in(open.name_ptr, &mut name)?;
    let FileObject::Group(group) = caller.file(open.group_fd)? else {
        return Err(Errno::BADFD);
    };
    let tid = caller.thread.tid().as_raw_nonzero().get().unsigned_abs();
    // Only for messages: a number that we do not know as the caller does is worth nothing.
    let user = match open.client_pid {
        0 => tid,
        pid if shares_our_pids(tid) => pid,
        _ => tid,
    };
    file.open_by_group(&group, &name, opener(user, None))?;
    Ok(0)
}

/// `OPEN_DATA`.
pub(crate) fn open_data(
    file: &DeviceFile,
    caller: &FuseCaller<'_>,
    arg: u64,
) -> Result<u32, Errno> {
    let (open, _) = vfio::read::<OpenData, _>(caller, arg, size_of::<OpenData>())?;
    let FileObject::Device(device) = caller.file(open.device_fd)? else {
        return Err(Errno::BADFD);
    };
    file.open_migration_data(&device, open.session)?;
    Ok(0)
}

/// A string of the client's, without its NUL. `EFAULT` for memory that cannot be read before the
/// NUL, `EINVAL` without one in the first 4096 bytes (`strndup_user`).
fn read_name(caller: &impl UserMemory, addr: u64) -> Result<Vec<u8>, Errno> {
    let mut name = Vec::new();
    while name.len() < NAME_MAX {
        let at = addr.checked_add(name.len() as u64).ok_or(Errno::FAULT)?;
        // What lies past the end of a page may be missing.
        let len = (PAGE - at % PAGE).min((NAME_MAX - name.len()) as u64);
        let mut part = vec![0; len as usize];
        caller.copy_in(at, &mut part)?;
        if let Some(end) = part.iter().position(|byte| *byte == 0) {
            part.truncate(end);
            name.append(&mut part);
            return Ok(name);
        }
        name.append(&mut part);
    }
    Err(Errno::INVAL)
}
