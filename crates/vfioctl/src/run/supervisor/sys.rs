#![expect(
    unsafe_code,
    reason = "ioctls of vfiod's nodes, stat structures as the kernel writes them, and fork"
)]
//! System calls that no crate wraps, or not as they are needed.

use rustix::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use rustix::io::Errno;
use std::mem::MaybeUninit;
use vfio_uapi::private::{
    ANNOUNCE, Announce, FEATURE, FIND_DEVICE, OPEN_DATA, OPEN_DEVICE, OpenData, OpenDevice, WHAT,
    What,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

fn errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

fn result(value: libc::c_int) -> Result<u32, Errno> {
    u32::try_from(value).map_err(|_| errno())
}

/// What a node of vfiod's is.
pub(super) fn what(node: BorrowedFd<'_>) -> Result<What, Errno> {
    let mut what = What {
        argsz: u32::try_from(size_of::<What>()).unwrap_or(0),
        ..What::default()
    };
    // SAFETY: the command writes at most `argsz` bytes at the address, which are this structure's.
    let done = unsafe { libc::ioctl(node.as_raw_fd(), WHAT.into(), &raw mut what) };
    result(done).map(|_| what)
}

/// Which device of a group a name means; the name ends with a NUL.
pub(super) fn find_device(group: BorrowedFd<'_>, name: &std::ffi::CStr) -> Result<u32, Errno> {
    // SAFETY: the command reads the string, up to its NUL.
    result(unsafe { libc::ioctl(group.as_raw_fd(), FIND_DEVICE.into(), name.as_ptr()) })
}

/// Makes a file opened at a device's node one of a group.
pub(super) fn open_device(
    device: BorrowedFd<'_>,
    group: BorrowedFd<'_>,
    client: u32,
    name: &std::ffi::CStr,
) -> Result<(), Errno> {
    let name = name.to_bytes();
    let open = OpenDevice {
        argsz: u32::try_from(size_of::<OpenDevice>()).unwrap_or(0),
        group_fd: group.as_raw_fd(),
        client_pid: client,
        name_len: u32::try_from(name.len()).map_err(|_| Errno::INVAL)?,
        name_ptr: name.as_ptr() as u64,
    };
    // SAFETY: the command reads the structure, and `name_len` bytes at `name_ptr`; both live on.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), OPEN_DEVICE.into(), &raw const open) };
    result(done).map(drop)
}

/// Lets the daemon look into `memory` when this thread opens a device's node. Returns the daemon's number
/// for the group.
pub(super) fn announce(group: BorrowedFd<'_>, memory: BorrowedFd<'_>) -> Result<u32, Errno> {
    let announce = Announce {
        argsz: u32::try_from(size_of::<Announce>()).unwrap_or(0),
        memory_fd: memory.as_raw_fd(),
    };
    // SAFETY: the command reads the structure.
    result(unsafe { libc::ioctl(group.as_raw_fd(), ANNOUNCE.into(), &raw const announce) })
}

/// `VFIO_DEVICE_FEATURE` for a client that can be given descriptors, for features with at most 8 bytes
/// of data.
pub(super) fn feature(device: BorrowedFd<'_>, arg: &mut [u8; 16]) -> Result<u32, Errno> {
    // SAFETY: the command reads and writes the header and, for these features, 8 bytes of data.
    result(unsafe { libc::ioctl(device.as_raw_fd(), FEATURE.into(), arg.as_mut_ptr()) })
}

/// Makes a file opened at a device's node the data of a migration session of that device.
pub(super) fn open_data(
    file: BorrowedFd<'_>,
    device: BorrowedFd<'_>,
    session: u32,
) -> Result<(), Errno> {
    let open = OpenData {
        argsz: u32::try_from(size_of::<OpenData>()).unwrap_or(0),
        device_fd: device.as_raw_fd(),
        session,
        reserved: 0,
    };
    // SAFETY: the command reads the structure.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), OPEN_DATA.into(), &raw const open) };
    result(done).map(drop)
}

/// `struct stat`, as the native system call writes it (`fs/stat.c`, `cp_new_stat`).
pub(super) struct Stat(libc::stat);

impl Stat {
    pub(super) fn of(fd: BorrowedFd<'_>) -> Result<Stat, Errno> {
        let mut stat = MaybeUninit::<libc::stat>::zeroed();
        // SAFETY: AT_EMPTY_PATH with an empty path means the descriptor; the kernel fills the structure.
        let done = unsafe {
            libc::syscall(
                libc::SYS_newfstatat,
                fd.as_raw_fd(),
                c"".as_ptr(),
                stat.as_mut_ptr(),
                libc::AT_EMPTY_PATH,
            )
        };
        if done != 0 {
            return Err(errno());
        }
        // SAFETY: it was zero, and the kernel filled it.
        Ok(Stat(unsafe { stat.assume_init() }))
    }

    /// Makes it a char device's.
    pub(super) fn into_char_device(mut self, rdev: u64) -> Stat {
        self.0.st_mode = libc::S_IFCHR | self.0.st_mode & 0o7777;
        self.0.st_rdev = rdev;
        self.0.st_size = 0;
        self.0.st_blocks = 0;
        self
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        // SAFETY: the structure was zero before the kernel filled it, padding and all.
        unsafe { std::slice::from_raw_parts((&raw const self.0).cast(), size_of::<libc::stat>()) }
    }
}

/// `struct statx`.
pub(super) struct Statx(libc::statx);

impl Statx {
    /// `flags` are those of the caller that say how fresh it has to be; `mask` is the caller's.
    pub(super) fn of(fd: BorrowedFd<'_>, flags: i32, mask: u32) -> Result<Statx, Errno> {
        let mut stat = MaybeUninit::<libc::statx>::zeroed();
        let flags = flags & (libc::AT_STATX_FORCE_SYNC | libc::AT_STATX_DONT_SYNC);
        // SAFETY: as in `Stat::of`.
        let done = unsafe {
            libc::syscall(
                libc::SYS_statx,
                fd.as_raw_fd(),
                c"".as_ptr(),
                flags | libc::AT_EMPTY_PATH,
                mask,
                stat.as_mut_ptr(),
            )
        };
        if done != 0 {
            return Err(errno());
        }
        // SAFETY: as in `Stat::of`.
        Ok(Statx(unsafe { stat.assume_init() }))
    }

    /// Makes it a char device's.
    pub(super) fn into_char_device(mut self, rdev: u64) -> Statx {
        let kind = u16::try_from(libc::S_IFCHR).unwrap_or(0);
        self.0.stx_mode = kind | self.0.stx_mode & 0o7777;
        self.0.stx_rdev_major = rustix::fs::major(rdev);
        self.0.stx_rdev_minor = rustix::fs::minor(rdev);
        self.0.stx_size = 0;
        self.0.stx_blocks = 0;
        self
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        // SAFETY: as in `Stat::as_bytes`.
        unsafe { std::slice::from_raw_parts((&raw const self.0).cast(), size_of::<libc::statx>()) }
    }
}

/// `struct kvm_create_device` of `include/uapi/linux/kvm.h`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct KvmCreateDevice {
    pub(super) kind: u32,
    pub(super) fd: u32,
    pub(super) flags: u32,
}

/// `struct kvm_device_attr`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct KvmDeviceAttr {
    pub(super) flags: u32,
    pub(super) group: u32,
    pub(super) attr: u64,
    pub(super) addr: u64,
}

/// Whether this machine's KVM has its VFIO device, asked with a virtual machine of our own.
pub(super) fn kvm_has_vfio() -> bool {
    const KVM_CREATE_VM: libc::Ioctl = 0xae01;
    const TEST: u32 = 1;
    let Ok(kvm) = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    else {
        return false;
    };
    // SAFETY: the argument is a number; the result is a new descriptor.
    let vm = unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_CREATE_VM, 0) };
    if vm < 0 {
        return false;
    }
    // SAFETY: it is new and nobody else's.
    let vm = unsafe { OwnedFd::from_raw_fd(vm) };
    let mut create = KvmCreateDevice {
        kind: super::kvm::KVM_DEV_TYPE_VFIO,
        flags: TEST,
        ..KvmCreateDevice::default()
    };
    let command = libc::Ioctl::from(super::kvm::KVM_CREATE_DEVICE);
    // SAFETY: the command reads and writes this structure, whose size it carries.
    unsafe { libc::ioctl(vm.as_fd().as_raw_fd(), command, &raw mut create) == 0 }
}

/// Becomes two processes (`fork`). In the new one `child` runs, and the process ends with it.
///
/// The caller must be the process's only thread: then the new process can do all that this one could.
pub(super) fn fork(child: impl FnOnce()) -> Result<rustix::process::Pid, Errno> {
    let threads = std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
    if threads != 1 {
        return Err(Errno::DEADLK);
    }
    // SAFETY: there is no other thread, so no lock is held that the new process would wait for.
    match unsafe { libc::fork() } {
        0 => {
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
            // SAFETY: it ends the process, without what was to be done at the end of the other one.
            unsafe { libc::_exit(i32::from(ended.is_err())) }
        }
        pid => rustix::process::Pid::from_raw(pid).ok_or_else(errno),
    }
}

/// Closes every descriptor but one, which is returned, and puts /dev/null where programs expect input
/// and output.
///
/// For a new process that will use nothing of what it came with ([`fork`]'s `child`, which never
/// returns).
pub(super) fn leave_all_but(fd: OwnedFd) -> Result<OwnedFd, Errno> {
    const KEPT: i32 = 3;
    let null = rustix::fs::open(
        "/dev/null",
        rustix::fs::OFlags::RDWR,
        rustix::fs::Mode::empty(),
    )?;
    // SAFETY: the process does not return to what had those descriptors.
    unsafe {
        // Out of the way of the numbers that are filled now.
        let fd = libc::fcntl(fd.into_raw_fd(), libc::F_DUPFD_CLOEXEC, KEPT + 1);
        for n in 0..KEPT {
            if libc::dup2(null.as_raw_fd(), n) < 0 {
                return Err(errno());
            }
        }
        std::mem::forget(null);
        if libc::dup3(fd, KEPT, libc::O_CLOEXEC) < 0 {
            return Err(errno());
        }
        if libc::syscall(libc::SYS_close_range, KEPT + 1, u32::MAX, 0) != 0 {
            return Err(errno());
        }
        Ok(OwnedFd::from_raw_fd(KEPT))
    }
}

/// Blocks every signal that can be blocked, in this thread and those it starts.
pub(super) fn block_signals() -> Result<(), Errno> {
    use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)
        .map_err(|errno| Errno::from_raw_os_error(errno as i32))
}
