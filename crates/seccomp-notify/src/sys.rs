#![expect(
    unsafe_code,
    reason = "seccomp() and the ioctls of its listener, which no crate wraps whole"
)]
//! The kernel's interface (`include/uapi/linux/seccomp.h`).

use crate::Notification;
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use rustix::io::Errno;
use rustix::ioctl;
use std::ffi::c_void;

bitflags::bitflags! {
    /// `SECCOMP_FILTER_FLAG_…`
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Flags: libc::c_ulong {
        const NEW_LISTENER = 1 << 3;
        const WAIT_KILLABLE_RECV = 1 << 5;
    }
}

/// `struct sock_filter`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Instruction {
    pub(crate) code: u16,
    pub(crate) jt: u8,
    pub(crate) jf: u8,
    pub(crate) k: u32,
}

/// `struct sock_fprog`.
#[repr(C)]
struct Program {
    len: u16,
    filter: *const Instruction,
}

/// Puts a filter on the calling thread.
pub(crate) fn set_filter(program: &[Instruction], flags: Flags) -> Result<OwnedFd, Errno> {
    const SECCOMP_SET_MODE_FILTER: libc::c_uint = 1;
    let program = Program {
        len: u16::try_from(program.len()).map_err(|_| Errno::INVAL)?,
        filter: program.as_ptr(),
    };
    // SAFETY: the kernel copies `len` instructions from `filter`, both of one slice that outlives the
    // call, and writes nothing.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            SECCOMP_SET_MODE_FILTER,
            flags.bits(),
            &raw const program,
        )
    };
    if fd < 0 {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    let fd = i32::try_from(fd).map_err(|_| Errno::BADF)?;
    // SAFETY: with NEW_LISTENER the result is a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `struct seccomp_notif` with its `struct seccomp_data`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Notif {
    id: u64,
    pid: u32,
    flags: u32,
    nr: i32,
    arch: u32,
    instruction_pointer: u64,
    args: [u64; 6],
}
const _: () = assert!(size_of::<Notif>() == 80);

/// `struct seccomp_notif_resp`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Response {
    id: u64,
    val: i64,
    error: i32,
    flags: u32,
}
const _: () = assert!(size_of::<Response>() == 24);

/// `struct seccomp_notif_addfd`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct AddFd {
    id: u64,
    flags: u32,
    srcfd: u32,
    newfd: u32,
    newfd_flags: u32,
}
const _: () = assert!(size_of::<AddFd>() == 24);

/// `SECCOMP_IOC_MAGIC`
const MAGIC: u8 = b'!';

pub(crate) fn notif_recv(fd: impl AsFd) -> Result<Notification, Errno> {
    const OPCODE: ioctl::Opcode = ioctl::opcode::read_write::<Notif>(MAGIC, 0);
    // The kernel insists on zeroes (`kernel/seccomp.c`, `seccomp_notify_recv`).
    let mut notif = Notif::default();
    // SAFETY: the command carries the size of this very structure, which is plain numbers.
    unsafe { ioctl::ioctl(fd, ioctl::Updater::<OPCODE, Notif>::new(&mut notif)) }?;
    Ok(Notification {
        id: notif.id,
        tid: i32::try_from(notif.pid).unwrap_or(0),
        number: notif.nr.into(),
        args: notif.args,
    })
}

pub(crate) fn notif_send(
    fd: impl AsFd,
    id: u64,
    val: i64,
    error: i32,
    proceed: bool,
) -> Result<(), Errno> {
    const OPCODE: ioctl::Opcode = ioctl::opcode::read_write::<Response>(MAGIC, 1);
    let mut response = Response {
        id,
        val,
        error,
        flags: u32::from(proceed),
    };
    loop {
        // SAFETY: the command carries the size of this very structure, which is plain numbers.
        let sent = unsafe {
            ioctl::ioctl(
                fd.as_fd(),
                ioctl::Updater::<OPCODE, Response>::new(&mut response),
            )
        };
        match sent {
            // It waits for a lock; nothing was sent.
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

/// A command whose argument is the address of a number that is only read.
struct WithNumber<const OPCODE: ioctl::Opcode>(u64);

// SAFETY: the kernel reads eight bytes at the address given, which are this value's.
unsafe impl<const OPCODE: ioctl::Opcode> ioctl::Ioctl for WithNumber<OPCODE> {
    type Output = ();
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> ioctl::Opcode {
        OPCODE
    }

    fn as_ptr(&mut self) -> *mut c_void {
        (&raw mut self.0).cast()
    }

    unsafe fn output_from_ptr(_: ioctl::IoctlOutput, _: *mut c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}

pub(crate) fn notif_id_valid(fd: impl AsFd, id: u64) -> Result<(), Errno> {
    const OPCODE: ioctl::Opcode = ioctl::opcode::write::<u64>(MAGIC, 2);
    // SAFETY: see `WithNumber`; the command reads an id.
    unsafe { ioctl::ioctl(fd, WithNumber::<OPCODE>(id)) }
}

/// The ioctl passes the flags by value.
pub(crate) fn notif_set_flags(fd: impl AsFd) -> Result<(), Errno> {
    const OPCODE: ioctl::Opcode = ioctl::opcode::write::<u64>(MAGIC, 4);
    const SYNC_WAKE_UP: usize = 1;
    // SAFETY: the argument is a number and no address (`kernel/seccomp.c`, `seccomp_notify_set_flags`).
    unsafe { ioctl::ioctl(fd, ioctl::IntegerSetter::<OPCODE>::new_usize(SYNC_WAKE_UP)) }
}

pub(crate) fn notif_addfd(
    fd: impl AsFd,
    id: u64,
    source: BorrowedFd<'_>,
    cloexec: bool,
    send: bool,
) -> Result<i32, Errno> {
    /// The number of the new descriptor is what the ioctl returns.
    struct Add(AddFd);
    // SAFETY: the command carries the size of this very structure, which is plain numbers and read.
    unsafe impl ioctl::Ioctl for Add {
        type Output = i32;
        const IS_MUTATING: bool = false;

        fn opcode(&self) -> ioctl::Opcode {
            ioctl::opcode::write::<AddFd>(MAGIC, 3)
        }

        fn as_ptr(&mut self) -> *mut c_void {
            (&raw mut self.0).cast()
        }

        unsafe fn output_from_ptr(
            out: ioctl::IoctlOutput,
            _: *mut c_void,
        ) -> rustix::io::Result<i32> {
            Ok(out)
        }
    }
    const SEND: u32 = 1 << 1;
    let source = u32::try_from(source.as_raw_fd()).map_err(|_| Errno::BADF)?;
    let cloexec = if cloexec { libc::O_CLOEXEC } else { 0 };
    let request = AddFd {
        id,
        flags: if send { SEND } else { 0 },
        srcfd: source,
        newfd: 0,
        newfd_flags: u32::try_from(cloexec).unwrap_or(0),
    };
    // SAFETY: see `Add`.
    unsafe { ioctl::ioctl(fd, Add(request)) }
}
