//! What is trapped, and how each call is answered.

use super::kvm::{KVM_CREATE_DEVICE, KVM_HAS_DEVICE_ATTR, KVM_SET_DEVICE_ATTR, Kvm, Outcome};
use super::nodes::Nodes;
use super::opening::Note;
use super::path::{Walk, may_be_ours};
use super::pool::Handler;
use super::sys::{Stat, Statx};
use super::task::{FileId, Tables, string};
use client_process::Caller;
use rustix::fd::AsFd;
use rustix::io::Errno;
use seccomp_notify::{Filter, Listener, Notification};
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

/// What a thread of ours keeps from call to call.
#[derive(Default)]
pub(super) struct Thread {
    pub(super) tables: Tables,
    pub(super) note: Note,
}

impl Handler for Supervisor {
    type Memory = Thread;

    /// Descriptors that are not ours. The caller's memory is not looked at: a page of it can be one
    /// that somebody has yet to bring (userfaultfd, a mapping of a FUSE file).
    fn quick(&self, call: &Notification, thread: &mut Thread) -> bool {
        let about = match StatCall::of(call) {
            Some(StatCall { path: Some(_), .. }) => return false,
            Some(stat) => stat.dirfd,
            None => match word(call, 1) {
                VFIO_GROUP_GET_DEVICE_FD if thread.tables.was_group(call.tid, descriptor(call)) => {
                    return false;
                }
                VFIO_GROUP_GET_DEVICE_FD | VFIO_DEVICE_FEATURE => descriptor(call),
                // These are rare, and about files that are no files of ours.
                _ => return false,
            },
        };
        let id = thread.tables.file_id(call.tid, about);
        if id.is_ok_and(|id| self.nodes.is_node(id)) {
            return false;
        }
        // If nobody waits for the answer any more, that is that.
        let _ = self.listener.let_through(call.id);
        true
    }

    fn slow(&self, call: &Notification, thread: &mut Thread) {
        let _ = match self.answer(call, thread) {
            Ok(Outcome::Result(value)) => self.listener.result(call.id, value),
            Ok(Outcome::Answered) => Ok(()),
            Ok(Outcome::LetThrough) => self.listener.let_through(call.id),
            Err(errno) => self.listener.error(call.id, errno),
        };
    }

    fn idle(&self) {
        self.nodes.let_go();
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

    fn answer(&self, call: &Notification, thread: &mut Thread) -> Result<Outcome, Errno> {
        let caller = Caller::new(call.tid)?;
        if let Some(stat) = StatCall::of(call) {
            // Whatever goes wrong on the way, the kernel's own answer is right.
            let Ok(answer) = self.stat(caller, call, &stat, &mut thread.tables) else {
                return Ok(Outcome::LetThrough);
            };
            caller.copy_out(stat.buf, &answer)?;
            return Ok(Outcome::Result(0));
        }
        match word(call, 1) {
            VFIO_GROUP_GET_DEVICE_FD => self.get_device_fd(caller, call, thread),
            VFIO_DEVICE_FEATURE => self.feature(caller, call),
            KVM_CREATE_DEVICE => self.kvm.create(self, caller, call),
            _ => self.kvm.attribute(self, caller, call),
        }
    }

    /// What a file of ours is, as a char device. Any error: it is not ours, or let the kernel say.
    fn stat(
        &self,
        caller: Caller,
        call: &Notification,
        stat: &StatCall,
        tables: &mut Tables,
    ) -> Result<Vec<u8>, Errno> {
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
        // A copy of a stranger's file would be closed again, which asks its server (FLUSH).
        if empty && !self.nodes.is_node(tables.file_id(call.tid, stat.dirfd)?) {
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
        if !self.nodes.is_node(FileId::at(&file, "")?) {
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

#[cfg(test)]
mod tests {
    #![expect(unsafe_code, reason = "a client's system calls, as it makes them")]

    use super::super::nodes;
    use super::*;
    use fuse_server::{
        Attr, Config, Connection, MountOptions, Opened, Operation, Policy, Request, Root, Workers,
    };
    use rustix::fd::AsRawFd;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// A stranger's file, which counts how often it is asked to FLUSH.
    struct Stranger(Arc<AtomicU32>);

    impl fuse_server::Handler for Stranger {
        fn handle(&self, request: Request<'_>) {
            let _ = match request.op {
                Operation::Getattr { reply, .. } => reply.attr(&Attr::new(1, 0o100_666, 0)),
                Operation::Open { reply, .. } => reply.opened(&Opened::default()),
                Operation::Flush { reply, .. } => {
                    self.0.fetch_add(1, Ordering::SeqCst);
                    reply.ok()
                }
                Operation::Release { reply, .. } => reply.ok(),
                other => other.error(Errno::NOSYS),
            };
        }
    }

    #[test]
    fn what_a_strangers_file_is_takes_no_copy_of_it() {
        let options = MountOptions {
            root: Root::File,
            ..MountOptions::default()
        };
        let Ok((fd, mount)) = options.create() else {
            vfiod_tests::skip("FUSE cannot be mounted here");
            return;
        };
        let flushes = Arc::new(AtomicU32::new(0));
        let connection = Connection::new(fd, &Config::default()).unwrap();
        let handler = Arc::new(Stranger(Arc::clone(&flushes)));
        let _workers = Workers::start(connection, handler, Policy::default()).unwrap();
        let anywhere = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(anywhere.path().join("vfio/devices")).unwrap();
        let place = anywhere.path().join("file");
        std::fs::write(&place, "").unwrap();
        let mount = mount.attach(&place).unwrap();
        let file = std::fs::File::open(&place).unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            sender.send(filter().install().unwrap().listener).unwrap();
            let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
            // SAFETY: the kernel, or who answers for it, fills the structure.
            let done = unsafe {
                libc::syscall(
                    libc::SYS_newfstatat,
                    file.as_raw_fd(),
                    c"".as_ptr(),
                    stat.as_mut_ptr(),
                    libc::AT_EMPTY_PATH,
                )
            };
            (done, file)
        });
        let listener = Arc::new(receiver.recv().unwrap());
        let supervisor = Supervisor {
            listener: Arc::clone(&listener),
            nodes: nodes::Nodes::new(anywhere.path(), anywhere.path()).unwrap(),
            kvm: Kvm::default(),
            proc_dev: nodes::proc_dev().unwrap(),
        };
        let mut memory = Thread::default();
        while !thread.is_finished() {
            match listener.recv() {
                Ok(call) if supervisor.quick(&call, &mut memory) => {}
                Ok(call) => supervisor.slow(&call, &mut memory),
                Err(Errno::NOENT | Errno::INTR) => std::thread::yield_now(),
                Err(errno) => panic!("{errno}"),
            }
        }
        let (done, file) = thread.join().unwrap();
        assert_eq!(done, 0);
        assert_eq!(flushes.load(Ordering::SeqCst), 0, "a copy was closed");
        drop(file);
        assert_eq!(flushes.load(Ordering::SeqCst), 1, "it would be told");
        drop(mount);
    }
}
