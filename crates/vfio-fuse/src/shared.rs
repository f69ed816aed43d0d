//! What all nodes have in common: the tables they share, an owner, the way of an ioctl.

use crate::Owner;
use crate::advice::Advice;
use crate::announced::Announcers;
use crate::caller::FuseCaller;
use crate::files::{Files, note};
use crate::identify::{IDENTIFY, is_ours};
use crate::mounter::Mounter;
use crate::private;
use client_process::FileId;
use fuse_server::{Answered, Attr, Connection, Operation, ReplyIoctl, SetAttrs};
use rustix::io::Errno;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use vfio_core::caller::FileObject;
use vfio_uapi::ioctl::FileKind;

/// What all nodes share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) files: Files<FileObject>,
    /// What the `dev` tree is served on.
    pub(crate) connection: Connection,
    /// The file system of the `dev` tree, known once it is mounted.
    pub(crate) mount: OnceLock<u64>,
    /// Where devices have theirs.
    pub(crate) mounter: Arc<Mounter>,
    pub(crate) config: vfio_core::Config,
    pub(crate) advice: Advice,
    pub(crate) announcers: Announcers,
    /// The open file of each group's node, by the node: a group is open once at a time.
    pub(crate) open_groups: Mutex<HashMap<u64, u64>>,
    pub(crate) ioctl_deadline: Duration,
    pub(crate) passthrough: bool,
}

/// An ioctl as it comes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ioctl {
    /// The open file.
    pub(crate) fh: u64,
    pub(crate) cmd: u32,
    pub(crate) arg: u64,
    /// The thread that waits.
    pub(crate) tid: u32,
}

impl Shared {
    /// True if a file system is one that this daemon serves: its files may be asked.
    pub(crate) fn is_our_mount(&self, dev: u64) -> bool {
        self.mount.get() == Some(&dev) || self.mounter.has_mount(dev)
    }

    pub(crate) fn open_groups(&self) -> MutexGuard<'_, HashMap<u64, u64>> {
        self.open_groups
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The open file of a group whose node this is.
    ///
    /// It is the one that a descriptor of that node stands for, as long as that descriptor is open and
    /// takes ioctls: a group is open once at a time, until the kernel has let go of that file.
    pub(crate) fn open_group(&self, id: FileId) -> Option<FileObject> {
        if self.mount.get() != Some(&id.dev) {
            return None;
        }
        let fh = *self.open_groups().get(&id.ino)?;
        self.files.get(fh)
    }

    /// What is served on the `dev` connection, as a scan of processes finds it.
    pub(crate) fn file_id(&self, ino: u64) -> Option<FileId> {
        Some(FileId {
            dev: *self.mount.get()?,
            ino,
        })
    }

    /// Answers an ioctl on an open file of `kind` by what `answer` makes of it, within the time that an
    /// ioctl may take. Whatever `answer` holds is dropped before the reply.
    pub(crate) fn ioctl(
        &self,
        ioctl: Ioctl,
        reply: ReplyIoctl,
        kind: FileKind,
        name: impl FnOnce() -> String,
        answer: impl FnOnce(&FuseCaller<'_>) -> Result<u32, Errno>,
    ) {
        let Ioctl { fh, cmd, tid, .. } = ioctl;
        if cmd == IDENTIFY && is_ours(tid) {
            let _ = private::identified(fh, reply);
            return;
        }
        reply.set_deadline(Instant::now() + self.ioctl_deadline, Errno::TIMEDOUT);
        let result = FuseCaller::new(tid, self).and_then(|caller| answer(&caller));
        let _ = match result {
            Ok(value) => reply.result(i32::try_from(value).unwrap_or(i32::MAX), &[]),
            Err(errno) => {
                if errno == Errno::OPNOTSUPP {
                    self.advice.give(kind, cmd, tid);
                }
                note(name, errno);
                reply.error(errno)
            }
        };
    }
}

/// Who owns a node: chmod and chown, as udev does them.
#[derive(Debug)]
pub(crate) struct Ownership(Mutex<Owner>);

impl Ownership {
    pub(crate) fn new(owner: Owner) -> Ownership {
        Ownership(Mutex::new(owner))
    }

    pub(crate) fn get(&self) -> Owner {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A regular file of size 0: all that lies in a node is reached by direct reads and writes and by
    /// mappings of its backing, and a private mapping of a node without one faults at once
    /// instead of asking this server for pages.
    pub(crate) fn attr(&self, ino: u64) -> Attr {
        let Owner { uid, gid, mode } = self.get();
        Attr {
            uid,
            gid,
            ..Attr::new(ino, 0o100_000 | mode, 0)
        }
    }

    /// `O_TRUNC` at open is nothing, ftruncate is `EINVAL`, as on a char device.
    pub(crate) fn change(&self, attrs: &SetAttrs) -> Result<(), Errno> {
        if attrs.size.is_some() && attrs.fh.is_some() {
            return Err(Errno::INVAL);
        }
        let mut owner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mode) = attrs.mode {
            owner.mode = mode & 0o7777;
        }
        if let Some(uid) = attrs.uid {
            owner.uid = uid;
        }
        if let Some(gid) = attrs.gid {
            owner.gid = gid;
        }
        Ok(())
    }
}

/// The answer to what a tree of ours does not do: nothing is made or removed in it. `create` is what an
/// open says that would make a file.
pub(crate) fn refuse(operation: Operation<'_>, create: Errno) -> Answered {
    match operation {
        Operation::Create { reply, .. } => reply.error(create),
        Operation::Mknod { reply, .. } => reply.error(Errno::PERM),
        Operation::Mkdir { reply, .. } => reply.error(Errno::PERM),
        Operation::Symlink { reply, .. } => reply.error(Errno::PERM),
        Operation::Unlink { reply, .. } => reply.error(Errno::PERM),
        Operation::Rmdir { reply, .. } => reply.error(Errno::PERM),
        Operation::Rename { reply, .. } => reply.error(Errno::PERM),
        Operation::Link { reply, .. } => reply.error(Errno::PERM),
        other => other.error(Errno::NOSYS),
    }
}
