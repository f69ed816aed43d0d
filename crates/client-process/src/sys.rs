#![expect(
    unsafe_code,
    reason = "three kernel calls that neither rustix nor nix wraps"
)]
//! PROCMAP_QUERY, PIDFD_GET_INFO and kcmp.

use rustix::fd::AsFd;
use rustix::fd::AsRawFd;
use rustix::fd::BorrowedFd;
use rustix::io::Errno;
use rustix::ioctl;
use rustix::process::Pid;

use crate::Result;

/// `struct procmap_query` of `include/uapi/linux/fs.h`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct ProcmapQuery {
    pub(crate) size: u64,
    pub(crate) query_flags: u64,
    pub(crate) query_addr: u64,
    pub(crate) vma_start: u64,
    pub(crate) vma_end: u64,
    pub(crate) vma_flags: u64,
    pub(crate) vma_page_size: u64,
    pub(crate) vma_offset: u64,
    pub(crate) inode: u64,
    pub(crate) dev_major: u32,
    pub(crate) dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

const _: () = assert!(size_of::<ProcmapQuery>() == 104);

pub(crate) const VMA_READABLE: u64 = 1;
pub(crate) const VMA_WRITABLE: u64 = 2;
pub(crate) const VMA_SHARED: u64 = 8;

/// The mapping that covers `addr`, from an open `/proc/PID/maps`.
///
/// NOENT: nothing is mapped there. SRCH: the address space is gone. NOTTY: Linux before 6.11.
pub(crate) fn procmap_query(maps: impl AsFd, addr: u64) -> Result<ProcmapQuery> {
    const OPCODE: ioctl::Opcode = ioctl::opcode::read_write::<ProcmapQuery>(b'f', 17);
    let mut query = ProcmapQuery {
        size: size_of::<ProcmapQuery>() as u64,
        query_addr: addr,
        ..ProcmapQuery::default()
    };
    // SAFETY: the opcode carries the size of this very structure, the kernel writes no more than its
    // `size` field, and both buffer sizes in it are zero, so that no address in it is followed.
    unsafe {
        ioctl::ioctl(
            maps,
            ioctl::Updater::<OPCODE, ProcmapQuery>::new(&mut query),
        )
    }?;
    Ok(query)
}

/// `struct pidfd_info` of `include/uapi/linux/pidfd.h`, as it first was.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct PidfdInfo {
    mask: u64,
    cgroupid: u64,
    pid: u32,
    tgid: u32,
    ppid: u32,
    ids: [u32; 8],
    exit_code: i32,
}

const _: () = assert!(size_of::<PidfdInfo>() == 64);

/// The process of the task behind a pidfd.
///
/// SRCH: it is gone. NOTTY: Linux before 6.13.
pub(crate) fn pidfd_tgid(pidfd: impl AsFd) -> Result<Pid> {
    const OPCODE: ioctl::Opcode = ioctl::opcode::read_write::<PidfdInfo>(0xff, 11);
    const PIDFD_INFO_PID: u64 = 1;
    let mut info = PidfdInfo {
        mask: PIDFD_INFO_PID,
        ..PidfdInfo::default()
    };
    // SAFETY: the opcode carries the size of this very structure, and the kernel writes no more than
    // that; no field is an address.
    unsafe { ioctl::ioctl(pidfd, ioctl::Updater::<OPCODE, PidfdInfo>::new(&mut info)) }?;
    if info.mask & PIDFD_INFO_PID == 0 {
        return Err(Errno::SRCH);
    }
    i32::try_from(info.tgid)
        .ok()
        .and_then(Pid::from_raw)
        .ok_or(Errno::SRCH)
}

/// Whether two tasks use one descriptor table. NOSYS: the kernel was built without kcmp.
pub(crate) fn same_files(a: Pid, b: Pid) -> Result<bool> {
    kcmp(a, b, KCMP_FILES, 0, 0)
}

/// Whether descriptor `theirs` of a task is the open file behind `ours`.
pub(crate) fn same_open_file(task: Pid, theirs: i32, ours: BorrowedFd<'_>) -> Result<bool> {
    let Ok(theirs) = u64::try_from(theirs) else {
        return Err(Errno::BADF);
    };
    let ours = u64::try_from(ours.as_raw_fd()).map_err(|_| Errno::BADF)?;
    kcmp(task, rustix::process::getpid(), KCMP_FILE, theirs, ours)
}

// `enum kcmp_type` of `include/uapi/linux/kcmp.h`.
const KCMP_FILE: libc::c_int = 0;
const KCMP_FILES: libc::c_int = 2;

fn kcmp(a: Pid, b: Pid, kind: libc::c_int, first: u64, second: u64) -> Result<bool> {
    let (a, b) = (a.as_raw_nonzero().get(), b.as_raw_nonzero().get());
    // SAFETY: kcmp takes five numbers and follows no address.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, a, b, kind, first, second) };
    if order < 0 {
        return Err(last_errno());
    }
    Ok(order == 0)
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
