//! Bytes from the kernel to typed requests.
//!
//! The kernel is trusted to send well-formed messages, but not needed to: a message that is too short or lacks a terminating NUL is answered EIO and
//! never panics.

use crate::attr::join;
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
use crate::request::Caller;
use crate::request::Forgets;
use crate::request::ForgetsInner;
use crate::request::Operation;
use crate::request::Request;
use crate::request::SetAttrs;
use crate::request::SetTime;
use crate::wire;
use crate::wire::ForgetOne;
use crate::wire::IoctlFlags;
use crate::wire::SetattrValid;
use crate::wire::opcode;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::KnownLayout;

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
    use rustix::io::Errno;
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
