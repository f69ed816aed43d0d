//! What is trapped, and how each call is answered.

use super::kvm::{KVM_CREATE_DEVICE, KVM_HAS_DEVICE_ATTR, KVM_SET_DEVICE_ATTR, Kvm, Outcome};
use super::nodes::Nodes;
use super::path::{Walk, may_be_ours};
use super::pool::Handler;
use super::sys::{self, Stat, Statx};
use super::task::{FileId, Tables, string};
use client_process::Caller;
use rustix::fd::AsFd;
use rustix::io::Errno;
use seccomp_notify::{Filter, Listener, Notification};
use std::ffi::CString;
use std::sync::Arc;
use vfio_uapi::ioctl::{VFIO_DEVICE_FEATURE, VFIO_GROUP_GET_DEVICE_FD};

/// The calls that are trapped: the ioctls whose answer is a descriptor or that are KVM's, and those
/// that say what a file is.
pub(super) fn filter() -> Filter {
    let words = [
        VFIO_GROUP_GET_DEVICE_FD,
        VFIO_DEVICE_FEATURE,
        KVM_CREATE_DEVICE,
        KVM_SET_DEVICE_ATTR,
        KVM_HAS_DEVICE_ATTR,
    ];
    let filter = Filter::new()
        .trap_argument(libc::SYS_ioctl, 1, words)
        .trap(libc::SYS_fstat)
        .trap(libc::SYS_newfstatat)
        .trap(libc::SYS_statx);
    #[cfg(target_arch = "x86_64")]
    let filter = filter.trap(libc::SYS_stat).trap(libc::SYS_lstat);
    filter
}

/// Answers the calls of one command.
pub(super) struct Supervisor {
    pub(super) listener: Arc<Listener>,
    pub(super) nodes: Nodes,
    pub(super) kvm: Kvm,
    /// The file system that `/proc` is.
    pub(super) proc_dev: u64,
}

/// What a call that says what a file is has as arguments.
struct StatCall {
    dirfd: i32,
    /// Address of the path; none: the descriptor itself.
    path: Option<u64>,
    flags: i32,
    /// Where the answer goes.
    buf: u64,
    /// `Some` of the mask for statx.
    statx: Option<u32>,
}

/// How often a device is looked for whose name means another each time.
const TRIES: usize = 8;

impl Handler for Supervisor {
    type Memory = Tables;

    /// Descriptors that are not ours. The caller's memory is not looked at: a page of it can be one
    /// that somebody has yet to bring (userfaultfd, a mapping of a FUSE file).
    fn quick(&self, call: &Notification, tables: &mut Tables) -> bool {
        let about = match StatCall::of(call) {
            Some(StatCall { path: Some(_), .. }) => return false,
            Some(stat) => stat.dirfd,
            None => match word(call, 1) {
                VFIO_GROUP_GET_DEVICE_FD | VFIO_DEVICE_FEATURE => descriptor(call),
                // These are rare, and about files that are no files of ours.
                _ => return false,
            },
        };
        let id = tables.file_id(call.tid, about);
        if id.is_ok_and(|FileId { dev, .. }| self.nodes.is_ours(dev)) {
            return false;
        }
        // If nobody waits for the answer any more, that is that.
        let _ = self.listener.let_through(call.id);
        true
    }

    fn slow(&self, call: &Notification) {
        let _ = match self.answer(call) {
            Ok(Outcome::Result(value)) => self.listener.result(call.id, value),
            Ok(Outcome::Answered) => Ok(()),
            Ok(Outcome::LetThrough) => self.listener.let_through(call.id),
            Err(errno) => self.listener.error(call.id, errno),
        };
    }
}

impl Supervisor {
    /// `SRCH` if nobody waits for an answer any more: what was read may be another's.
    pub(super) fn check(&self, call: &Notification) -> Result<(), Errno> {
        if self.listener.is_valid(call.id) {
            Ok(())
        } else {
            Err(Errno::SRCH)
        }
    }

    fn answer(&self, call: &Notification) -> Result<Outcome, Errno> {
        let caller = Caller::new(call.tid)?;
        if let Some(stat) = StatCall::of(call) {
            // Whatever goes wrong on the way, the kernel's own answer is right.
            let Ok(answer) = self.stat(caller, call, &stat) else {
                return Ok(Outcome::LetThrough);
            };
            caller.copy_out(stat.buf, &answer)?;
            return Ok(Outcome::Result(0));
        }
        match word(call, 1) {
            VFIO_GROUP_GET_DEVICE_FD => self.get_device_fd(caller, call),
            VFIO_DEVICE_FEATURE => self.feature(caller, call),
            KVM_CREATE_DEVICE => self.kvm.create(self, caller, call),
            _ => self.kvm.attribute(self, caller, call),
        }
    }

    /// What a file of ours is, as a char device. Any error: it is not ours, or let the kernel say.
    fn stat(&self, caller: Caller, call: &Notification, stat: &StatCall) -> Result<Vec<u8>, Errno> {
        let path = match stat.path {
            Some(path) => string(caller, path)?,
            None => Vec::new(),
        };
        // Flags that the kernel refuses it shall refuse itself (`fs/stat.c`, `do_statx`).
        const FLAGS: i32 = libc::AT_SYMLINK_NOFOLLOW
            | libc::AT_NO_AUTOMOUNT
            | libc::AT_EMPTY_PATH
            | libc::AT_STATX_FORCE_SYNC
            | libc::AT_STATX_DONT_SYNC;
        if stat.flags & !FLAGS != 0 {
            return Err(Errno::INVAL);
        }
        let empty = path.is_empty();
        if empty && stat.path.is_some() && stat.flags & libc::AT_EMPTY_PATH == 0 {
            return Err(Errno::NOENT);
        }
        if !empty && !may_be_ours(&path) {
            return Err(Errno::NOTTY);
        }
        self.check(call)?;
        let open = if empty {
            self.nodes.get(caller, stat.dirfd)
        } else {
            Err(Errno::BADF)
        };
        let (file, open) = match open {
            Ok(file) => (file, true),
            // A path, or a descriptor opened with O_PATH, which takes no ioctl.
            Err(Errno::BADF) => {
                let follow = stat.flags & libc::AT_SYMLINK_NOFOLLOW == 0;
                let walk = Walk {
                    nodes: &self.nodes,
                    tid: call.tid,
                    proc_dev: self.proc_dev,
                };
                (walk.open(stat.dirfd, &path, follow)?, false)
            }
            Err(errno) => return Err(errno),
        };
        let ours = self.nodes.is_ours(FileId::at(&file, "")?.dev);
        if !ours || is_directory(&file)? {
            return Err(Errno::NOTTY);
        }
        let rdev = if open {
            self.nodes.char_device(file.as_fd())?
        } else {
            self.nodes.char_device_by_name(&file)?
        };
        let answer = match stat.statx {
            Some(mask) => Statx::of(file.as_fd(), stat.flags, mask)?
                .into_char_device(rdev)
                .as_bytes()
                .to_vec(),
            None => Stat::of(file.as_fd())?
                .into_char_device(rdev)
                .as_bytes()
                .to_vec(),
        };
        self.check(call)?;
        Ok(answer)
    }

    /// VFIO_GROUP_GET_DEVICE_FD on a group of ours: the device's node is opened here, made a file of
    /// the group, and given to the client.
    fn get_device_fd(&self, caller: Caller, call: &Notification) -> Result<Outcome, Errno> {
        let group = match self.nodes.get(caller, descriptor(call)) {
            Ok(group) => group,
            // Another file by now.
            Err(Errno::NOTTY) => return Ok(Outcome::LetThrough),
            Err(errno) => return Err(errno),
        };
        let [_, _, name, ..] = call.args;
        let name = string(caller, name).map_err(|errno| match errno {
            // `strndup_user` of `VFIO_GROUP_GET_DEVICE_FD`.
            Errno::NAMETOOLONG => Errno::INVAL,
            other => other,
        })?;
        let name = CString::new(name).map_err(|_| Errno::INVAL)?;
        // The daemon finds its process itself.
        let client = call.tid.cast_unsigned();
        self.check(call)?;
        let mut guess = self.nodes.guess(&name);
        for _ in 0..TRIES {
            let guessed = guess.is_some();
            let index = match guess.take() {
                Some(index) => index,
                None => sys::find_device(group.as_fd(), &name)?,
            };
            let opened = self.nodes.open_device(index).and_then(|device| {
                sys::open_device(device.as_fd(), group.as_fd(), client, &name).map(|()| device)
            });
            let device = match opened {
                Ok(device) => device,
                // A wrong guess, or it went meanwhile and the name may mean another.
                Err(_) if guessed => continue,
                Err(Errno::NOENT | Errno::NODEV | Errno::NXIO | Errno::STALE) => continue,
                Err(errno) => return Err(errno),
            };
            self.nodes.remember(&name, index);
            // Answered with it. If not, the file is closed here and nobody has it.
            self.listener.result_fd(call.id, &device, true)?;
            return Ok(Outcome::Answered);
        }
        Err(Errno::NODEV)
    }
}

fn is_directory(file: impl AsFd) -> Result<bool, Errno> {
    use rustix::fs::{AtFlags, FileType, StatxFlags, statx};
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::EMPTY_PATH;
    let stat = statx(file, "", flags, StatxFlags::TYPE)?;
    Ok(FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Directory)
}

/// An argument that is an int.
#[expect(clippy::cast_possible_truncation, reason = "the kernel does the same")]
pub(super) fn word(call: &Notification, index: usize) -> u32 {
    call.args.get(index).map_or(0, |value| *value as u32)
}

fn int(call: &Notification, index: usize) -> i32 {
    word(call, index).cast_signed()
}

pub(super) fn descriptor(call: &Notification) -> i32 {
    int(call, 0)
}

impl StatCall {
    /// `None` for other calls.
    fn of(call: &Notification) -> Option<StatCall> {
        let [first, second, third, _, fifth, _] = call.args;
        let by_path = |flags| StatCall {
            dirfd: libc::AT_FDCWD,
            path: Some(first),
            flags,
            buf: second,
            statx: None,
        };
        Some(match call.number {
            libc::SYS_fstat => StatCall {
                dirfd: descriptor(call),
                path: None,
                flags: 0,
                buf: second,
                statx: None,
            },
            libc::SYS_newfstatat => StatCall {
                dirfd: descriptor(call),
                path: given(second, int(call, 3)),
                flags: int(call, 3),
                buf: third,
                statx: None,
            },
            libc::SYS_statx => StatCall {
                dirfd: descriptor(call),
                path: given(second, int(call, 2)),
                flags: int(call, 2),
                buf: fifth,
                statx: Some(word(call, 3)),
            },
            #[cfg(target_arch = "x86_64")]
            libc::SYS_stat => by_path(0),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_lstat => by_path(libc::AT_SYMLINK_NOFOLLOW),
            _ => return None,
        })
    }
}

/// With AT_EMPTY_PATH no path is an empty path (`fs/namei.c`, `getname_maybe_null`, Linux 6.11).
fn given(path: u64, flags: i32) -> Option<u64> {
    (path != 0 || flags & libc::AT_EMPTY_PATH == 0).then_some(path)
}
