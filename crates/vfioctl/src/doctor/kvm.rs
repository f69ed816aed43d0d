//! Whether virtual machines run at the processor's own speed.
#![expect(
    unsafe_code,
    reason = "two ioctls of /dev/kvm that no crate here wraps"
)]

use super::Finding;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `_IO(KVMIO, 0x00)` and `_IO(KVMIO, 0x01)` (`include/uapi/linux/kvm.h`)
const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;
const KVM_CREATE_VM: libc::c_ulong = 0xae01;

/// Makes a virtual machine and forgets it.
pub(super) fn kvm() -> Finding {
    const NAME: &str = "kvm";
    let slow = "without KVM run QEMU with -accel tcg, which works and is slower";
    match try_kvm() {
        Ok(version) => Finding::ok(NAME, format!("makes virtual machines (API {version})")),
        Err(Errno::NOENT | Errno::NXIO | Errno::NODEV) => {
            Finding::limited(NAME, "there is no /dev/kvm", slow)
        }
        Err(Errno::ACCESS | Errno::PERM) => Finding::limited(
            NAME,
            "/dev/kvm is not for this user",
            "join the group kvm, or run QEMU with -accel tcg",
        ),
        Err(errno) => Finding::limited(NAME, format!("/dev/kvm: {errno}"), slow),
    }
}

fn try_kvm() -> Result<i32, Errno> {
    let kvm = rustix::fs::open("/dev/kvm", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let version = ioctl(&kvm, KVM_GET_API_VERSION)?;
    let machine = ioctl(&kvm, KVM_CREATE_VM)?;
    // SAFETY: KVM_CREATE_VM returned it, and nothing else knows of it.
    drop(unsafe { OwnedFd::from_raw_fd(machine) });
    Ok(version)
}

fn ioctl(kvm: &OwnedFd, command: libc::c_ulong) -> Result<i32, Errno> {
    // SAFETY: both commands take a number, 0, and touch no memory of ours.
    let result = unsafe { libc::ioctl(kvm.as_raw_fd(), command as _, 0_usize) };
    if result < 0 {
        let error = std::io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    Ok(result)
}
