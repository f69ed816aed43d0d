//! Requests, typed and borrowed from the buffer they were read into.

use std::ffi::OsStr;
use std::time::SystemTime;

use rustix::io::Errno;
use zerocopy::FromBytes;

use crate::reply::Answered;
use crate::reply::ReplyAttr;
use crate::reply::ReplyCreate;
use crate::reply::ReplyData;
use crate::reply::ReplyDirectory;
use crate::reply::ReplyDirectoryPlus;
use crate::reply::ReplyEmpty;
use crate::reply::ReplyEntry;
use crate::reply::ReplyIoctl;
use crate::reply::ReplyLseek;
use crate::reply::ReplyOpen;
use crate::reply::ReplyPoll;
use crate::reply::ReplyStatfs;
use crate::reply::ReplyWrite;
use crate::reply::ReplyXattr;
use crate::wire::ForgetOne;
use crate::wire::IoctlFlags;

/// Who asks. The kernel fills this from the task that made the system call (`fs/fuse/dev.c`, `fuse_get_req`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// File system user, in the mount's user namespace.
    pub uid: u32,
    /// File system group, in the mount's user namespace.
    pub gid: u32,
    /// The *thread*, in the pid namespace that mounted; 0 when it is not visible there, and for requests without a caller (RELEASE, FORGET).
    pub tid: u32,
}

/// One request from the kernel.
#[derive(Debug)]
pub struct Request<'a> {
    /// Who asks.
    pub caller: Caller,
    /// The kernel's number of the request.
    pub unique: u64,
    /// The node it is about; 1 is the root.
    pub node: u64,
    /// The request was sent again after a server died with it (`FUSE_NOTIFY_RESEND`): it may have been executed already.
    pub resent: bool,
    /// What is asked.
    pub op: Operation<'a>,
}

/// A time in a SETATTR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// The server's current time.
    Now,
    /// This time.
    At(SystemTime),
}

/// What a SETATTR changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetAttrs {
    /// New permission bits (with the type bits).
    pub mode: Option<u32>,
    /// New owner.
    pub uid: Option<u32>,
    /// New group.
    pub gid: Option<u32>,
    /// Truncation or growth to this size.
    pub size: Option<u64>,
    /// New access time.
    pub atime: Option<SetTime>,
    /// New modification time.
    pub mtime: Option<SetTime>,
    /// New change time.
    pub ctime: Option<SystemTime>,
    /// The open file through which the change was made.
    pub fh: Option<u64>,
}

macro_rules! operations {
    ($($(#[$doc:meta])* $name:ident { $($(#[$fdoc:meta])* $field:ident: $ty:ty,)* } => $reply:ty,)*) => {
        /// What is asked, with what is needed to answer. Requests this crate does not know never get here: they are answered ENOSYS, upon which
        /// the kernel does without.
        #[derive(Debug)]
        #[must_use = "a request without an answer ends in EIO for its caller"]
        pub enum Operation<'a> {
            $($(#[$doc])* $name { $($(#[$fdoc])* $field: $ty,)* /** The answer. */ reply: $reply },)*
            /// FORGET and BATCH_FORGET, which have no answer: the kernel takes back lookups.
            Forget(Forgets<'a>),
        }

        impl Operation<'_> {
            /// Answers with an errno, whatever is asked. ENOSYS makes the kernel do without this kind of request.
            pub fn error(self, errno: Errno) -> Answered {
                match self {
                    $(Self::$name { reply, .. } => reply.error(errno),)*
                    Self::Forget(_) => Answered::Delivered,
                }
            }
        }
    };
}

operations! {
    /// Find `name` in the directory.
    Lookup { /** The name. */ name: &'a OsStr, } => ReplyEntry,
    /// Attributes of the node.
    Getattr { /** The open file through which they are asked for. */ fh: Option<u64>, } => ReplyAttr,
    /// Change attributes.
    Setattr { /** What changes. */ attrs: SetAttrs, } => ReplyAttr,
    /// Target of a symbolic link.
    Readlink {} => ReplyData,
    /// Make a symbolic link.
    Symlink { /** Its name. */ name: &'a OsStr, /** Where it points. */ target: &'a OsStr, } => ReplyEntry,
    /// Make a node.
    Mknod { /** Its name. */ name: &'a OsStr, /** Type and permissions. */ mode: u32, /** Device number. */ rdev: u32, } => ReplyEntry,
    /// Make a directory.
    Mkdir { /** Its name. */ name: &'a OsStr, /** Permissions. */ mode: u32, } => ReplyEntry,
    /// Remove a name.
    Unlink { /** The name. */ name: &'a OsStr, } => ReplyEmpty,
    /// Remove a directory.
    Rmdir { /** The name. */ name: &'a OsStr, } => ReplyEmpty,
    /// RENAME and RENAME2.
    Rename {
        /** The old name. */ name: &'a OsStr, /** The new directory. */ new_parent: u64, /** The new name. */ new_name: &'a OsStr,
        /** `RENAME_*`. */ flags: u32,
    } => ReplyEmpty,
    /// Make a hard link.
    Link { /** The node to link to. */ old_node: u64, /** The new name. */ name: &'a OsStr, } => ReplyEntry,
    /// Open the file.
    Open { /** `O_*`, without `O_CREAT`, `O_EXCL` and `O_NOCTTY`. */ flags: u32, } => ReplyOpen,
    /// Read from an open file.
    Read {
        /** The open file. */ fh: u64, /** Where. */ offset: u64, /** How many bytes at most. */ size: u32, /** `O_*` of the file now. */ flags: u32,
    } => ReplyData,
    /// Write to an open file.
    Write {
        /** The open file. */ fh: u64, /** Where. */ offset: u64, /** The bytes. */ data: &'a [u8], /** `O_*` of the file now. */ flags: u32,
    } => ReplyWrite,
    /// Numbers of the file system.
    Statfs {} => ReplyStatfs,
    /// The last descriptor of an open file was closed. Mappings may outlive it.
    Release { /** The open file. */ fh: u64, /** `O_*`. */ flags: u32, } => ReplyEmpty,
    /// Write out what is dirty.
    Fsync { /** The open file. */ fh: u64, /** Data only. */ datasync: bool, } => ReplyEmpty,
    /// Set an extended attribute.
    Setxattr { /** Its name. */ name: &'a OsStr, /** Its value. */ value: &'a [u8], /** `XATTR_*`. */ flags: u32, } => ReplyEmpty,
    /// Get an extended attribute.
    Getxattr { /** Its name. */ name: &'a OsStr, } => ReplyXattr,
    /// List extended attributes.
    Listxattr {} => ReplyXattr,
    /// Remove an extended attribute.
    Removexattr { /** Its name. */ name: &'a OsStr, } => ReplyEmpty,
    /// A descriptor of the open file was closed.
    Flush { /** The open file. */ fh: u64, } => ReplyEmpty,
    /// Open the directory.
    Opendir { /** `O_*`. */ flags: u32, } => ReplyOpen,
    /// Read names.
    Readdir { /** The open directory. */ fh: u64, /** 0, or the `next` of the last name read. */ offset: u64, } => ReplyDirectory,
    /// Read names with attributes.
    Readdirplus { /** The open directory. */ fh: u64, /** 0, or the `next` of the last name read. */ offset: u64, } => ReplyDirectoryPlus,
    /// An open directory was closed.
    Releasedir { /** The open directory. */ fh: u64, } => ReplyEmpty,
    /// `fsync` of a directory.
    Fsyncdir { /** The open directory. */ fh: u64, /** Data only. */ datasync: bool, } => ReplyEmpty,
    /// `access`, on mounts without `default_permissions`.
    Access { /** `R_OK`, `W_OK`, `X_OK`. */ mask: u32, } => ReplyEmpty,
    /// Make and open a file in one step. ENOSYS makes the kernel use MKNOD and OPEN.
    Create {
        /** Its name. */ name: &'a OsStr, /** Type and permissions. */ mode: u32, /** `O_*`. */ flags: u32, /** Mask of permissions. */ umask: u32,
    } => ReplyCreate,
    /// `ioctl`. For numbers that encode a direction the kernel copies `in_size` bytes in and at most `out_size` out; for raw `_IO` numbers both
    /// are 0, and `arg` is all there is: a value or an address in the caller's memory.
    Ioctl {
        /** The open file. */ fh: u64, /** The number. */ cmd: u32, /** The third argument of the system call. */ arg: u64,
        /** How the caller differs. */ flags: IoctlFlags, /** Bytes in `data`. */ in_size: u32, /** Room for the answer. */ out_size: u32,
        /** The caller's bytes. */ data: &'a [u8],
    } => ReplyIoctl,
    /// Which events are true, and (if `notify`) a notice later through [`crate::Connection::notify_poll`].
    Poll {
        /** The open file. */ fh: u64, /** The kernel's handle for the notice. */ kh: u64, /** Whether a notice is wanted. */ notify: bool,
        /** `POLL*` asked for. */ events: u32,
    } => ReplyPoll,
    /// Allocate or punch.
    Fallocate { /** The open file. */ fh: u64, /** From where. */ offset: u64, /** How much. */ length: u64, /** `FALLOC_*`. */ mode: u32, } => ReplyEmpty,
    /// Find data or holes.
    Lseek { /** The open file. */ fh: u64, /** From where. */ offset: u64, /** `SEEK_DATA` or `SEEK_HOLE`. */ whence: u32, } => ReplyLseek,
}

/// The nodes that lose lookups.
#[derive(Clone, Debug)]
pub struct Forgets<'a> {
    pub(crate) inner: ForgetsInner<'a>,
}

#[derive(Clone, Debug)]
pub(crate) enum ForgetsInner<'a> {
    One(Option<ForgetOne>),
    Batch(&'a [u8]),
}

impl Iterator for Forgets<'_> {
    type Item = ForgetOne;

    fn next(&mut self) -> Option<ForgetOne> {
        match &mut self.inner {
            ForgetsInner::One(one) => one.take(),
            ForgetsInner::Batch(bytes) => {
                let (one, rest) = ForgetOne::read_from_prefix(bytes).ok()?;
                *bytes = rest;
                Some(one)
            }
        }
    }
}
