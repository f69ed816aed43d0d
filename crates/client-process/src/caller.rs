//! A thread that is blocked in a request to us.

use std::ffi::OsString;
use std::io::IoSlice;
use std::io::IoSliceMut;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use nix::sys::uio;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::fd::AsFd;
use rustix::fd::BorrowedFd;
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::Pid;
use rustix::process::PidfdFlags;
use rustix::process::PidfdGetfdFlags;

use crate::Result;
use crate::proc;
use crate::sys;

/// A thread that waits for our answer, known by the number that came with its request.
///
/// The kernel puts the *thread's* number into a FUSE request and into a seccomp notification. It stays
/// valid as long as the request is unanswered, unless the thread is killed; then every call here is an
/// errno ([`Errno::FAULT`] for copies, [`Errno::SRCH`] otherwise), and a killed client does not read it.
/// Do not keep a `Caller` past the reply: the number may then be another task's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    tid: Pid,
}

/// Who a [`Caller`] is, as of the moment of asking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The thread that asked.
    pub tid: Pid,
    /// Its process.
    pub tgid: Pid,
    /// The process's name, at most 15 bytes, any bytes.
    pub comm: OsString,
    /// Clock ticks from boot to the start of the process. With `tgid` it names one process for ever.
    pub start_ticks: u64,
    /// Effective user and group of the thread.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
    /// Effective capabilities in the thread's own user namespace: see [`Caller::capable`].
    pub cap_eff: u64,
}

/// Capabilities that VFIO and iommufd ask for (`include/uapi/linux/capability.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Capability {
    /// Lock memory beyond RLIMIT_MEMLOCK.
    IpcLock = 14,
    /// No-IOMMU mode.
    SysRawio = 17,
    /// Change accounting of an iommufd.
    SysResource = 24,
    /// Everything administrative.
    SysAdmin = 21,
}

impl Caller {
    /// The thread with this number, as a request carries it.
    ///
    /// # Errors
    /// [`Errno::SRCH`] for 0 or a negative number: the kernel sends 0 when the client lives in a process
    /// namespace that we cannot see into.
    pub fn new(tid: i32) -> Result<Self> {
        if tid <= 0 {
            return Err(Errno::SRCH);
        }
        Pid::from_raw(tid)
            .map(|tid| Self { tid })
            .ok_or(Errno::SRCH)
    }

    /// The thread's number.
    #[must_use]
    pub fn tid(self) -> Pid {
        self.tid
    }

    /// Fills `buf` from the caller's memory at `addr`, as `copy_from_user` does.
    ///
    /// # Errors
    /// [`Errno::FAULT`] if a byte of it cannot be read by the caller, if the range wraps, or if the
    /// caller is gone; `buf` may then be partly filled. [`Errno::PERM`]: *we* may not look into this
    /// process (no CAP_SYS_PTRACE over it); that is a matter of setting up the daemon.
    pub fn copy_in(self, addr: u64, buf: &mut [u8]) -> Result<()> {
        let len = buf.len();
        if self.copy_in_prefix(addr, buf)? == len {
            Ok(())
        } else {
            Err(Errno::FAULT)
        }
    }

    /// Like [`Caller::copy_in`], but says how many bytes could be read before the first that could not.
    ///
    /// # Errors
    /// [`Errno::PERM`] as there. Unreadable memory is no error: it ends the count, at 0 if need be.
    pub fn copy_in_prefix(self, addr: u64, buf: &mut [u8]) -> Result<usize> {
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let Some(remote) = remote(addr, done, rest.len()) else {
                break;
            };
            match uio::process_vm_readv(self.nix_pid(), &mut [IoSliceMut::new(rest)], &[remote]) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) => {
                    end_of_copy(e)?;
                    break;
                }
            }
        }
        Ok(done)
    }

    /// Fills both of them, each from its address, out of one and the same address space; false if
    /// not all of it could be read.
    pub(crate) fn copy_in_both(
        self,
        (addr, buf): (u64, &mut [u8]),
        (other, bytes): (u64, &mut [u8]),
    ) -> bool {
        let (Some(first), Some(second)) =
            (remote(addr, 0, buf.len()), remote(other, 0, bytes.len()))
        else {
            return false;
        };
        let wanted = buf.len().saturating_add(bytes.len());
        // One look at which address space is the thread's serves both pieces (`mm/process_vm_access.c`,
        // `process_vm_rw_core`).
        let mut local = [IoSliceMut::new(buf), IoSliceMut::new(bytes)];
        uio::process_vm_readv(self.nix_pid(), &mut local, &[first, second]) == Ok(wanted)
    }

    /// Writes `buf` into the caller's memory at `addr`, as `copy_to_user` does: a page that the caller
    /// itself may not write stays as it is.
    ///
    /// # Errors
    /// As [`Caller::copy_in`]; bytes before the first unwritable one may have been written.
    pub fn copy_out(self, addr: u64, buf: &[u8]) -> Result<()> {
        let mut done = 0;
        while let Some(rest) = buf.get(done..).filter(|rest| !rest.is_empty()) {
            let remote = remote(addr, done, rest.len()).ok_or(Errno::FAULT)?;
            match uio::process_vm_writev(self.nix_pid(), &[IoSlice::new(rest)], &[remote]) {
                Ok(0) => return Err(Errno::FAULT),
                Ok(n) => done += n,
                Err(e) => {
                    end_of_copy(e)?;
                    return Err(Errno::FAULT);
                }
            }
        }
        Ok(())
    }

    /// The caller's descriptor `n`, as a descriptor of ours for the same open file.
    ///
    /// A thread that does not share its process's table (`unshare(CLONE_FILES)`) is asked for its own on
    /// Linux 6.9 and later. Before that the leader's table is all the kernel shows: if kcmp then says that
    /// the file is not what the thread calls `n`, the answer is `BADF`, never the wrong file.
    ///
    /// # Errors
    /// [`Errno::BADF`]: negative, closed, or opened with O_PATH (which `fget` refuses as well).
    /// [`Errno::SRCH`]: the caller is gone. [`Errno::PERM`]: we may not look into it.
    /// [`Errno::MFILE`]: we have no descriptor left.
    pub fn get_fd(self, n: i32) -> Result<OwnedFd> {
        if n < 0 {
            return Err(Errno::BADF);
        }
        match self.hold() {
            Ok(thread) => thread.get_fd(n),
            // The flag is unknown before Linux 6.9.
            Err(Errno::INVAL) => self.get_fd_of_leader(n),
            Err(errno) => Err(errno),
        }
    }

    /// A hold on the thread, for those who come again: see [`Thread`].
    ///
    /// # Errors
    /// [`Errno::INVAL`]: Linux before 6.9. [`Errno::SRCH`]: the caller is gone. [`Errno::MFILE`].
    pub fn hold(self) -> Result<Thread> {
        rustix::process::pidfd_open(self.tid, PIDFD_THREAD).map(Thread)
    }

    fn get_fd_of_leader(self, n: i32) -> Result<OwnedFd> {
        let leader = rustix::process::pidfd_open(self.tgid()?, PidfdFlags::empty())?;
        let fd = usable(rustix::process::pidfd_getfd(
            leader,
            n,
            PidfdGetfdFlags::empty(),
        )?)?;
        match sys::same_open_file(self.tid, n, fd.as_fd()) {
            Ok(true) | Err(Errno::NOSYS) => Ok(fd),
            Ok(false) => Err(Errno::BADF),
            Err(errno) => Err(errno),
        }
    }

    /// Whether the caller's descriptor `n` is the open file behind `ours`: also after dup, fork and
    /// SCM_RIGHTS, and not for a second open of the same path (`kcmp`, KCMP_FILE).
    ///
    /// # Errors
    /// [`Errno::BADF`]: `n` is not open there. [`Errno::NOSYS`]: kernel without CONFIG_KCMP.
    pub fn is_same_open_file(self, n: i32, ours: BorrowedFd<'_>) -> Result<bool> {
        sys::same_open_file(self.tid, n, ours)
    }

    /// The caller's process.
    ///
    /// # Errors
    /// [`Errno::SRCH`]: the caller is gone.
    pub fn tgid(self) -> Result<Pid> {
        let pidfd = rustix::process::pidfd_open(self.tid, PIDFD_THREAD);
        match pidfd.and_then(sys::pidfd_tgid) {
            // Linux before 6.9, and before 6.13.
            Err(Errno::INVAL | Errno::NOTTY) => Ok(proc::status(self.tid)?.tgid),
            result => result,
        }
    }

    /// The caller's process and its name, at most 15 bytes, any bytes: the part of
    /// [`Caller::identity`] that is quick to tell.
    ///
    /// # Errors
    /// [`Errno::SRCH`]: the caller is gone.
    pub fn process(self) -> Result<(Pid, OsString)> {
        let tgid = self.tgid()?;
        Ok((tgid, proc::comm(tgid)?))
    }

    /// Who it is, now.
    ///
    /// # Errors
    /// [`Errno::SRCH`]: the caller is gone.
    pub fn identity(self) -> Result<Identity> {
        let status = proc::status(self.tid)?;
        let stat = proc::stat(status.tgid)?;
        Ok(Identity {
            tid: self.tid,
            tgid: status.tgid,
            comm: stat.comm,
            start_ticks: stat.start_ticks,
            uid: status.uid,
            gid: status.gid,
            cap_eff: status.cap_eff,
        })
    }

    /// `capable()`: whether the caller has this capability effective in *our* user namespace. Root of a
    /// user namespace of its own is not root here, whatever its CapEff says.
    ///
    /// # Errors
    /// [`Errno::SRCH`]: the caller is gone.
    pub fn capable(self, capability: Capability) -> Result<bool> {
        let status = proc::status(self.tid)?;
        if status.cap_eff & (1 << capability as u8) == 0 {
            return Ok(false);
        }
        let theirs = rustix::fs::stat(proc::path(self.tid, "ns/user")).map_err(proc::gone)?;
        let ours = rustix::fs::stat("/proc/self/ns/user")?;
        Ok((theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino))
    }

    /// The program file, as the kernel names it (with " (deleted)" if it is). Not a command line, which
    /// its owner can rewrite.
    ///
    /// # Errors
    /// [`Errno::SRCH`]: the caller is gone. [`Errno::PERM`] or [`Errno::ACCESS`]: we may not look.
    pub fn exe(self) -> Result<PathBuf> {
        let link =
            rustix::fs::readlink(proc::path(self.tid, "exe"), Vec::new()).map_err(proc::gone)?;
        Ok(PathBuf::from(OsString::from_vec(link.into_bytes())))
    }

    /// The soft RLIMIT_MEMLOCK in bytes, `None` when unlimited.
    ///
    /// # Errors
    /// [`Errno::SRCH`]: the caller is gone.
    pub fn memlock_limit(self) -> Result<Option<u64>> {
        proc::memlock_limit(self.tid)
    }

    fn nix_pid(self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(self.tid.as_raw_nonzero().get())
    }
}

/// One thread, whatever becomes of its number: when the thread has ended, everything here is `SRCH`.
#[derive(Debug)]
pub struct Thread(OwnedFd);

impl Thread {
    /// As [`Caller::get_fd`], in half as many system calls.
    ///
    /// # Errors
    /// As there.
    pub fn get_fd(&self, n: i32) -> Result<OwnedFd> {
        if n < 0 {
            return Err(Errno::BADF);
        }
        let flags = PidfdGetfdFlags::empty();
        usable(rustix::process::pidfd_getfd(&self.0, n, flags)?)
    }

    /// Whether the thread still exists: while it does, its number is no other's.
    #[must_use]
    pub fn is_running(&self) -> bool {
        is_running(&self.0)
    }
}

/// Whether this descriptor is an eventfd, by the name the kernel gives its anonymous inode.
#[must_use]
pub fn is_eventfd(fd: &OwnedFd) -> bool {
    use rustix::fd::AsRawFd;
    rustix::fs::readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new())
        .is_ok_and(|name| name.as_bytes().starts_with(b"anon_inode:[eventfd"))
}

/// Whether two descriptors are of one eventfd, by the number that `/proc` gives each
/// (`fs/eventfd.c`, `eventfd_show_fdinfo`). False where it cannot be told.
pub fn is_same_eventfd(one: &OwnedFd, other: &OwnedFd) -> bool {
    use rustix::fd::AsRawFd;
    let number = |fd: &OwnedFd| {
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).ok()?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("eventfd-id:"))?;
        line.trim().parse::<u64>().ok()
    };
    number(one).is_some_and(|id| number(other) == Some(id))
}

impl Caller {
    /// A hold on the thread's number: while [`is_running`] is true of it, the number is this thread's.
    /// `INVAL` for a thread that does not lead its process, before Linux 6.9.
    pub(crate) fn pidfd(self) -> Result<OwnedFd> {
        match rustix::process::pidfd_open(self.tid, PIDFD_THREAD) {
            Err(Errno::INVAL) => rustix::process::pidfd_open(self.tid, PidfdFlags::empty()),
            other => other,
        }
    }
}

/// Whether the thread behind [`Caller::pidfd`] still exists.
pub(crate) fn is_running(pidfd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    let now = rustix::event::Timespec::default();
    rustix::event::poll(&mut fds, Some(&now)) == Ok(0)
}

/// PIDFD_THREAD of `include/uapi/linux/pidfd.h`: O_EXCL. Linux 6.9.
const PIDFD_THREAD: PidfdFlags = PidfdFlags::from_bits_retain(OFlags::EXCL.bits());

/// pidfd_getfd hands out O_PATH descriptors, which no ioctl takes (`fget`).
fn usable(fd: OwnedFd) -> Result<OwnedFd> {
    if rustix::fs::fcntl_getfl(&fd)?.contains(OFlags::PATH) {
        Err(Errno::BADF)
    } else {
        Ok(fd)
    }
}

/// The part of the caller's memory that is still to be copied; `None` if it wraps.
fn remote(addr: u64, done: usize, len: usize) -> Option<uio::RemoteIoVec> {
    let base = usize::try_from(addr).ok()?.checked_add(done)?;
    base.checked_add(len)?;
    Some(uio::RemoteIoVec { base, len })
}

/// Unmapped memory and a caller that is gone end a copy; anything else is an error of our own.
fn end_of_copy(errno: nix::errno::Errno) -> Result<()> {
    match errno {
        nix::errno::Errno::EFAULT | nix::errno::Errno::ESRCH | nix::errno::Errno::EIO => Ok(()),
        other => Err(Errno::from_raw_os_error(other as i32)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_what_its_identity_says() {
        let me = rustix::process::getpid();
        let ask = || {
            let caller = Caller {
                tid: rustix::thread::gettid(),
            };
            assert_eq!(proc::status(caller.tid).unwrap().tgid, me);
            assert_eq!(caller.tgid(), Ok(me));
            let (pid, comm) = caller.process().unwrap();
            assert_eq!((pid, comm), (me, caller.identity().unwrap().comm));
        };
        ask();
        std::thread::scope(|scope| {
            scope.spawn(ask);
        });
        let nobody = Caller::new(i32::MAX).unwrap();
        assert_eq!(nobody.tgid(), Err(Errno::SRCH));
        assert_eq!(nobody.process(), Err(Errno::SRCH));
    }

    #[test]
    fn the_leaders_table_serves_kernels_without_thread_pidfds() {
        let me = rustix::process::getpid().as_raw_nonzero().get();
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
        let n = rustix::fd::AsRawFd::as_raw_fd(&event);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let tid = rustix::thread::gettid().as_raw_nonzero().get();
                assert_ne!(tid, me);
                let fd = Caller::new(tid).unwrap().get_fd_of_leader(n).unwrap();
                assert!(is_eventfd(&fd));
            });
        });
    }
}
