//! Bytes from the kernel as typed, borrowed requests.
//!
//! The kernel is trusted to send well-formed messages, but not needed to: a message that is too short or lacks a terminating NUL is answered EIO and
//! never panics.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::SystemTime;

use rustix::io::Errno;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::KnownLayout;

use crate::attr::join;
use crate::reply::Answered;
use crate::reply::Entries;
use crate::reply::Reply;
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
use crate::wire;
use crate::wire::ForgetOne;
use crate::wire::IoctlFlags;
use crate::wire::SetattrValid;
use crate::wire::opcode;

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
    inner: ForgetsInner<'a>,
}

#[derive(Clone, Debug)]
enum ForgetsInner<'a> {
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

/// Why a message could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ParseError {
    /// Not even a header: nobody can be answered.
    NoHeader,
    /// The arguments are too short: answer EIO.
    Short,
    /// A request this crate does not know: answer ENOSYS.
    Unknown,
}

/// What a message is to the connection.
#[derive(Debug)]
pub(crate) enum Message<'a> {
    /// For the handler.
    Request(Request<'a>),
    /// `FUSE_INTERRUPT` for the request with this unique.
    Interrupt(u64),
}

/// Takes a message apart from its front.
struct Arguments<'a>(&'a [u8]);

impl<'a> Arguments<'a> {
    fn take<T: FromBytes + KnownLayout + Immutable>(&mut self) -> Result<T, ParseError> {
        let (value, rest) = T::read_from_prefix(self.0).map_err(|_| ParseError::Short)?;
        self.0 = rest;
        Ok(value)
    }

    fn name(&mut self) -> Result<&'a OsStr, ParseError> {
        let end = self
            .0
            .iter()
            .position(|&byte| byte == 0)
            .ok_or(ParseError::Short)?;
        let (name, rest) = self.0.split_at(end);
        self.0 = rest.get(1..).unwrap_or_default();
        Ok(OsStr::from_bytes(name))
    }

    fn bytes(&mut self, size: u32) -> Result<&'a [u8], ParseError> {
        let (bytes, rest) = self
            .0
            .split_at_checked(size as usize)
            .ok_or(ParseError::Short)?;
        self.0 = rest;
        Ok(bytes)
    }
}

/// Reads the header alone.
pub(crate) fn header(message: &[u8]) -> Option<wire::InHeader> {
    wire::InHeader::read_from_prefix(message)
        .ok()
        .map(|(header, _)| header)
}

/// Reads a whole message. `reply` registers the request as under way, and is called only when the message is well formed and wants an answer.
pub(crate) fn parse(
    message: &[u8],
    reply: impl FnOnce(&wire::InHeader) -> Reply,
) -> Result<Message<'_>, ParseError> {
    let (header, rest) =
        wire::InHeader::read_from_prefix(message).map_err(|_| ParseError::NoHeader)?;
    let mut args = Arguments(rest);
    if header.opcode == opcode::INTERRUPT {
        return Ok(Message::Interrupt(args.take::<wire::InterruptIn>()?.unique));
    }
    Ok(Message::Request(Request {
        caller: Caller {
            uid: header.uid,
            gid: header.gid,
            tid: header.pid,
        },
        unique: header.unique,
        node: header.node,
        resent: header.unique & wire::UNIQUE_RESEND != 0,
        op: operation(&header, &mut args, reply)?,
    }))
}

fn operation<'a>(
    header: &wire::InHeader,
    args: &mut Arguments<'a>,
    reply: impl FnOnce(&wire::InHeader) -> Reply,
) -> Result<Operation<'a>, ParseError> {
    Ok(match header.opcode {
        opcode::READ => {
            let wire::ReadIn {
                fh,
                offset,
                size,
                flags,
                ..
            } = args.take()?;
            Operation::Read {
                fh,
                offset,
                size,
                flags,
                reply: ReplyData {
                    inner: reply(header),
                },
            }
        }
        opcode::WRITE => {
            let wire::WriteIn {
                fh,
                offset,
                size,
                flags,
                ..
            } = args.take()?;
            let data = args.bytes(size)?;
            Operation::Write {
                fh,
                offset,
                data,
                flags,
                reply: ReplyWrite {
                    inner: reply(header),
                },
            }
        }
        opcode::IOCTL => {
            let wire::IoctlIn {
                fh,
                flags,
                cmd,
                arg,
                in_size,
                out_size,
            } = args.take()?;
            let data = args.bytes(in_size)?;
            let flags = IoctlFlags::from_bits_retain(flags);
            Operation::Ioctl {
                fh,
                cmd,
                arg,
                flags,
                in_size,
                out_size,
                data,
                reply: ReplyIoctl {
                    inner: reply(header),
                },
            }
        }
        opcode::LOOKUP => Operation::Lookup {
            name: args.name()?,
            reply: ReplyEntry {
                inner: reply(header),
            },
        },
        opcode::FORGET => {
            let nlookup = args.take::<wire::ForgetIn>()?.nlookup;
            Operation::Forget(Forgets {
                inner: ForgetsInner::One(Some(ForgetOne {
                    node: header.node,
                    nlookup,
                })),
            })
        }
        opcode::BATCH_FORGET => {
            let count = args.take::<wire::BatchForgetIn>()?.count;
            let size = count.checked_mul(16).ok_or(ParseError::Short)?;
            Operation::Forget(Forgets {
                inner: ForgetsInner::Batch(args.bytes(size)?),
            })
        }
        opcode::GETATTR => {
            let wire::GetattrIn { flags, fh, .. } = args.take()?;
            Operation::Getattr {
                fh: (flags & 1 != 0).then_some(fh),
                reply: ReplyAttr {
                    inner: reply(header),
                },
            }
        }
        opcode::SETATTR => {
            let attrs = set_attrs(&args.take()?);
            Operation::Setattr {
                attrs,
                reply: ReplyAttr {
                    inner: reply(header),
                },
            }
        }
        opcode::READLINK => Operation::Readlink {
            reply: ReplyData {
                inner: reply(header),
            },
        },
        opcode::SYMLINK => {
            let (name, target) = (args.name()?, args.name()?);
            Operation::Symlink {
                name,
                target,
                reply: ReplyEntry {
                    inner: reply(header),
                },
            }
        }
        opcode::MKNOD => {
            let wire::MknodIn { mode, rdev, .. } = args.take()?;
            Operation::Mknod {
                name: args.name()?,
                mode,
                rdev,
                reply: ReplyEntry {
                    inner: reply(header),
                },
            }
        }
        opcode::MKDIR => {
            let mode = args.take::<wire::MkdirIn>()?.mode;
            Operation::Mkdir {
                name: args.name()?,
                mode,
                reply: ReplyEntry {
                    inner: reply(header),
                },
            }
        }
        opcode::UNLINK => Operation::Unlink {
            name: args.name()?,
            reply: ReplyEmpty {
                inner: reply(header),
            },
        },
        opcode::RMDIR => Operation::Rmdir {
            name: args.name()?,
            reply: ReplyEmpty {
                inner: reply(header),
            },
        },
        opcode::RENAME => {
            let new_parent = args.take::<wire::RenameIn>()?.new_parent;
            let (name, new_name) = (args.name()?, args.name()?);
            Operation::Rename {
                name,
                new_parent,
                new_name,
                flags: 0,
                reply: ReplyEmpty {
                    inner: reply(header),
                },
            }
        }
        opcode::RENAME2 => {
            let wire::Rename2In {
                new_parent, flags, ..
            } = args.take()?;
            let (name, new_name) = (args.name()?, args.name()?);
            Operation::Rename {
                name,
                new_parent,
                new_name,
                flags,
                reply: ReplyEmpty {
                    inner: reply(header),
                },
            }
        }
        opcode::LINK => {
            let old_node = args.take::<wire::LinkIn>()?.old_node;
            Operation::Link {
                old_node,
                name: args.name()?,
                reply: ReplyEntry {
                    inner: reply(header),
                },
            }
        }
        opcode::OPEN => Operation::Open {
            flags: args.take::<wire::OpenIn>()?.flags,
            reply: ReplyOpen {
                inner: reply(header),
            },
        },
        opcode::OPENDIR => Operation::Opendir {
            flags: args.take::<wire::OpenIn>()?.flags,
            reply: ReplyOpen {
                inner: reply(header),
            },
        },
        opcode::STATFS => Operation::Statfs {
            reply: ReplyStatfs {
                inner: reply(header),
            },
        },
        opcode::RELEASE => {
            let wire::ReleaseIn { fh, flags, .. } = args.take()?;
            Operation::Release {
                fh,
                flags,
                reply: ReplyEmpty {
                    inner: reply(header),
                },
            }
        }
        opcode::RELEASEDIR => Operation::Releasedir {
            fh: args.take::<wire::ReleaseIn>()?.fh,
            reply: ReplyEmpty {
                inner: reply(header),
            },
        },
        opcode::FSYNC => {
            let wire::FsyncIn { fh, flags, .. } = args.take()?;
            Operation::Fsync {
                fh,
                datasync: flags & 1 != 0,
                reply: ReplyEmpty {
                    inner: reply(header),
                },
            }
        }
        opcode::FSYNCDIR => {
            let wire::FsyncIn { fh, flags, .. } = args.take()?;
            Operation::Fsyncdir {
                fh,
                datasync: flags & 1 != 0,
                reply: ReplyEmpty {
                    inner: reply(header),
                },
            }
        }
        opcode::SETXATTR => {
            let wire::SetxattrIn { size, flags } = args.take()?;
            let name = args.name()?;
            Operation::Setxattr {
                name,
                value: args.bytes(size)?,
                flags,
                reply: ReplyEmpty {
                    inner: reply(header),
                },
            }
        }
        opcode::GETXATTR => {
            let size = args.take::<wire::GetxattrIn>()?.size;
            Operation::Getxattr {
                name: args.name()?,
                reply: ReplyXattr {
                    inner: reply(header),
                    size,
                },
            }
        }
        opcode::LISTXATTR => {
            let size = args.take::<wire::GetxattrIn>()?.size;
            Operation::Listxattr {
                reply: ReplyXattr {
                    inner: reply(header),
                    size,
                },
            }
        }
        opcode::REMOVEXATTR => Operation::Removexattr {
            name: args.name()?,
            reply: ReplyEmpty {
                inner: reply(header),
            },
        },
        opcode::FLUSH => Operation::Flush {
            fh: args.take::<wire::FlushIn>()?.fh,
            reply: ReplyEmpty {
                inner: reply(header),
            },
        },
        opcode::READDIR => {
            let wire::ReadIn {
                fh, offset, size, ..
            } = args.take()?;
            Operation::Readdir {
                fh,
                offset,
                reply: ReplyDirectory {
                    inner: reply(header),
                    entries: Entries::new(size),
                },
            }
        }
        opcode::READDIRPLUS => {
            let wire::ReadIn {
                fh, offset, size, ..
            } = args.take()?;
            Operation::Readdirplus {
                fh,
                offset,
                reply: ReplyDirectoryPlus {
                    inner: reply(header),
                    entries: Entries::new(size),
                },
            }
        }
        opcode::ACCESS => Operation::Access {
            mask: args.take::<wire::AccessIn>()?.mask,
            reply: ReplyEmpty {
                inner: reply(header),
            },
        },
        opcode::CREATE => {
            let wire::CreateIn {
                flags, mode, umask, ..
            } = args.take()?;
            Operation::Create {
                name: args.name()?,
                mode,
                flags,
                umask,
                reply: ReplyCreate {
                    inner: reply(header),
                },
            }
        }
        opcode::POLL => {
            let wire::PollIn {
                fh,
                kh,
                flags,
                events,
            } = args.take()?;
            Operation::Poll {
                fh,
                kh,
                notify: flags & 1 != 0,
                events,
                reply: ReplyPoll {
                    inner: reply(header),
                },
            }
        }
        opcode::FALLOCATE => {
            let wire::FallocateIn {
                fh,
                offset,
                length,
                mode,
                ..
            } = args.take()?;
            Operation::Fallocate {
                fh,
                offset,
                length,
                mode,
                reply: ReplyEmpty {
                    inner: reply(header),
                },
            }
        }
        opcode::LSEEK => {
            let wire::LseekIn {
                fh, offset, whence, ..
            } = args.take()?;
            Operation::Lseek {
                fh,
                offset,
                whence,
                reply: ReplyLseek {
                    inner: reply(header),
                },
            }
        }
        _ => return Err(ParseError::Unknown),
    })
}

fn set_attrs(wire: &wire::SetattrIn) -> SetAttrs {
    let valid = SetattrValid::from_bits_retain(wire.valid);
    let time = |set, now, seconds, nanos| {
        if valid.contains(now) {
            Some(SetTime::Now)
        } else {
            valid
                .contains(set)
                .then(|| SetTime::At(join(seconds, nanos)))
        }
    };
    SetAttrs {
        mode: valid.contains(SetattrValid::MODE).then_some(wire.mode),
        uid: valid.contains(SetattrValid::UID).then_some(wire.uid),
        gid: valid.contains(SetattrValid::GID).then_some(wire.gid),
        size: valid.contains(SetattrValid::SIZE).then_some(wire.size),
        atime: time(
            SetattrValid::ATIME,
            SetattrValid::ATIME_NOW,
            wire.atime,
            wire.atime_nsec,
        ),
        mtime: time(
            SetattrValid::MTIME,
            SetattrValid::MTIME_NOW,
            wire.mtime,
            wire.mtime_nsec,
        ),
        ctime: valid
            .contains(SetattrValid::CTIME)
            .then(|| join(wire.ctime, wire.ctime_nsec)),
        fh: valid.contains(SetattrValid::FH).then_some(wire.fh),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    use super::*;
    use crate::Config;
    use crate::Connection;
    use crate::Negotiated;
    use crate::wire::Features;

    /// A connection whose answers go to nobody: the parser needs somewhere to register.
    fn connection() -> Connection {
        let null = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .expect("/dev/null");
        let negotiated = Negotiated {
            kernel_minor: 40,
            features: Features::empty(),
            max_write: 4096,
        };
        Connection::resume(null.into(), negotiated, &Config::default())
    }

    fn message(opcode: u32, body: &[u8]) -> Vec<u8> {
        let header = wire::InHeader {
            len: 40 + body.len() as u32,
            opcode,
            unique: 6,
            node: 1,
            ..wire::InHeader::default()
        };
        [header.as_bytes(), body].concat()
    }

    /// What the parser makes of it, as text, with the reply answered.
    fn parsed(connection: &Connection, message: &[u8]) -> Result<String, ParseError> {
        parse(message, |header| connection.register(header)).map(|message| {
            let text = format!("{message:?}");
            if let Message::Request(request) = message {
                if let Operation::Forget(forgets) = &request.op {
                    let _ = forgets.clone().count();
                }
                let _ = request.op.error(Errno::NOSYS);
            }
            text
        })
    }

    #[test]
    fn short_messages_are_errors_and_leave_nothing_registered() {
        let connection = connection();
        assert_eq!(parsed(&connection, &[0; 39]), Err(ParseError::NoHeader));
        assert_eq!(
            parsed(&connection, &message(opcode::LOOKUP, b"no end")),
            Err(ParseError::Short)
        );
        assert_eq!(
            parsed(&connection, &message(opcode::READ, &[0; 39])),
            Err(ParseError::Short)
        );
        assert_eq!(
            parsed(&connection, &message(4096, &[0; 100])),
            Err(ParseError::Unknown)
        );
        let write = wire::WriteIn {
            size: 9,
            ..wire::WriteIn::default()
        };
        assert_eq!(
            parsed(
                &connection,
                &message(opcode::WRITE, &[write.as_bytes(), &[0; 8]].concat())
            ),
            Err(ParseError::Short)
        );
        let ioctl = wire::IoctlIn {
            in_size: u32::MAX,
            ..wire::IoctlIn::default()
        };
        assert_eq!(
            parsed(&connection, &message(opcode::IOCTL, ioctl.as_bytes())),
            Err(ParseError::Short)
        );
        let batch = wire::BatchForgetIn {
            count: u32::MAX,
            dummy: 0,
        };
        assert_eq!(
            parsed(
                &connection,
                &message(opcode::BATCH_FORGET, batch.as_bytes())
            ),
            Err(ParseError::Short)
        );
        assert_eq!(connection.in_flight(), 0);
    }

    #[test]
    fn arguments_come_out_as_they_went_in() {
        let connection = connection();
        let two = [
            ForgetOne {
                node: 3,
                nlookup: 1,
            },
            ForgetOne {
                node: 9,
                nlookup: 4,
            },
        ];
        let batch = [
            wire::BatchForgetIn { count: 2, dummy: 0 }.as_bytes(),
            two.as_bytes(),
        ]
        .concat();
        let bytes = message(opcode::BATCH_FORGET, &batch);
        let Ok(Message::Request(Request {
            op: Operation::Forget(forgets),
            ..
        })) = parse(&bytes, |_| unreachable!("no answer"))
        else {
            panic!("a batch");
        };
        assert_eq!(forgets.collect::<Vec<_>>(), two);

        let body = [
            wire::Rename2In {
                new_parent: 5,
                flags: 1,
                padding: 0,
            }
            .as_bytes(),
            b"a\0b\0",
        ]
        .concat();
        let text = parsed(&connection, &message(opcode::RENAME2, &body)).expect("well formed");
        assert!(
            text.contains(r#"name: "a", new_parent: 5, new_name: "b", flags: 1"#),
            "{text}"
        );

        let set = wire::SetattrIn {
            valid: (SetattrValid::SIZE | SetattrValid::MTIME_NOW).bits(),
            size: 12,
            ..wire::SetattrIn::default()
        };
        let attrs = set_attrs(&set);
        assert_eq!(
            attrs,
            SetAttrs {
                size: Some(12),
                mtime: Some(SetTime::Now),
                ..SetAttrs::default()
            }
        );
        assert_eq!(
            parsed(
                &connection,
                &message(opcode::INTERRUPT, &8_u64.to_ne_bytes())
            )
            .expect("well formed"),
            "Interrupt(8)"
        );
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(opcode in 0_u32..60, body in prop::collection::vec(any::<u8>(), 0..300), cut in 0_usize..340) {
            let connection = connection();
            let mut bytes = message(opcode, &body);
            bytes.truncate(cut);
            let _ = parsed(&connection, &bytes);
            prop_assert_eq!(connection.in_flight(), 0);
        }
    }
}
