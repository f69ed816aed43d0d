//! Answers as values: one type per kind of answer, used up by answering, sendable to any thread, EIO when forgotten.

use std::ffi::OsStr;
use std::io::IoSlice;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use rustix::fs::FileType;
use rustix::io::Errno;
use zerocopy::IntoBytes;

use crate::attr::Attr;
use crate::attr::Entry;
use crate::passthrough::BackingId;
use crate::shared::Shared;
use crate::wire;
use crate::wire::OpenFlags;

/// Whether an answer reached the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answered {
    /// The kernel took the answer.
    Delivered,
    /// The request had already been answered by its deadline or its interrupt, or the connection is gone. What the answer granted (an open file, a
    /// looked-up node) was not granted: take it back, no RELEASE or FORGET will come for it.
    TooLate,
}

impl Answered {
    /// Whether the kernel took the answer.
    pub fn is_delivered(self) -> bool {
        self == Self::Delivered
    }
}

/// The right to answer one request.
pub(crate) struct Reply {
    shared: Arc<Shared>,
    unique: u64,
    slot: u32,
    opcode: u32,
    answered: bool,
}

impl Reply {
    pub(crate) fn new(shared: &Arc<Shared>, unique: u64, opcode: u32) -> Self {
        let slot = shared.table().insert(unique);
        Self {
            shared: Arc::clone(shared),
            unique,
            slot,
            opcode,
            answered: false,
        }
    }

    fn send(mut self, error: Option<Errno>, body: &[IoSlice<'_>]) -> Answered {
        self.answered = true;
        if !self.shared.claim(self.slot, self.unique) {
            return Answered::TooLate;
        }
        self.shared.answer(self.unique, self.opcode, error, body)
    }

    pub(crate) fn ok(self, body: &[u8]) -> Answered {
        self.send(None, &[IoSlice::new(body)])
    }

    fn error(self, errno: Errno) -> Answered {
        self.send(Some(errno), &[])
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if self.answered || !self.shared.claim(self.slot, self.unique) {
            return;
        }
        tracing::warn!(
            opcode = self.opcode,
            unique = self.unique,
            "a FUSE request was dropped without an answer; its caller gets EIO"
        );
        self.shared
            .answer(self.unique, self.opcode, Some(Errno::IO), &[]);
    }
}

impl std::fmt::Debug for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reply")
            .field("unique", &self.unique)
            .field("opcode", &self.opcode)
            .finish_non_exhaustive()
    }
}

/// A reply that waits for its answer; whoever takes it first, the owner or the interrupt, gives the answer.
#[derive(Debug)]
#[must_use = "a parked reply that is dropped can only be answered by its interrupt"]
pub struct Parked<R> {
    reply: Arc<Mutex<Option<R>>>,
}

impl<R> Parked<R> {
    /// The reply, unless its interrupt has it.
    pub fn take(&self) -> Option<R> {
        self.reply
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

macro_rules! reply {
    ($(#[$doc:meta])* $name:ident $(, $field:ident: $ty:ty)*) => {
        $(#[$doc])*
        #[derive(Debug)]
        #[must_use = "a request without an answer ends in EIO for its caller"]
        pub struct $name { pub(crate) inner: Reply, $(pub(crate) $field: $ty,)* }

        impl $name {
            /// Answers with an errno. Never ENOSYS for a request that is implemented: the kernel remembers it and stops sending that kind.
            pub fn error(self, errno: Errno) -> Answered {
                self.inner.error(errno)
            }

            /// Whether the caller has a signal pending that ends its wait, or does not wait any more.
            pub fn is_interrupted(&self) -> bool {
                self.inner.shared.table().is_interrupted(self.inner.slot, self.inner.unique)
            }

            /// Keeps the reply for later. When the caller is interrupted or the connection ends before [`Parked::take`], `interrupted` gets it, to
            /// answer EINTR as a rule: on the thread that reads the INTERRUPT, or on this one when it has already come. It must not block, and no lock
            /// it takes may be held around this call. If nobody answers within the connection's grace, the crate answers EINTR.
            pub fn park(self, interrupted: impl FnOnce(Self) + Send + 'static) -> Parked<Self> {
                let (shared, slot, unique) = (Arc::clone(&self.inner.shared), self.inner.slot, self.inner.unique);
                let parked = Parked { reply: Arc::new(Mutex::new(Some(self))) };
                let other = Parked { reply: Arc::clone(&parked.reply) };
                shared.on_interrupt(slot, unique, Box::new(move || {
                    if let Some(reply) = other.take() {
                        interrupted(reply);
                    }
                }));
                parked
            }

            /// Calls `callback` once when the caller is interrupted or the connection ends; at once, on this thread, when that has already happened, so
            /// no lock it takes may be held around this call. Otherwise it runs on the thread that reads the INTERRUPT: it must not block. For work
            /// that can be cut short; a reply that just waits is better parked.
            pub fn on_interrupt(&self, callback: impl FnOnce() + Send + 'static) {
                self.inner.shared.on_interrupt(self.inner.slot, self.inner.unique, Box::new(callback));
            }

            /// From now on an interrupt answers this request with EINTR at once; the later answer is then [`Answered::TooLate`]. For requests whose
            /// work goes on without their caller.
            pub fn interrupt_at_once(&self) {
                self.inner.shared.interrupt_at_once(self.inner.slot, self.inner.unique);
            }

            /// Answers the request with `errno` at `at` (to about 10 ms) unless it was answered before.
            pub fn set_deadline(&self, at: Instant, errno: Errno) {
                self.inner.shared.set_deadline(self.inner.slot, self.inner.unique, at, errno);
            }

            /// Whether the answer would still be delivered.
            pub fn is_awaited(&self) -> bool {
                self.inner.shared.table().contains(self.inner.slot, self.inner.unique)
            }
        }
    };
}

reply!(
    /// Answer to requests that ask for nothing but success.
    ReplyEmpty
);
reply!(
    /// Answer to LOOKUP, MKNOD, MKDIR, SYMLINK and LINK.
    ReplyEntry
);
reply!(
    /// Answer to GETATTR and SETATTR.
    ReplyAttr
);
reply!(
    /// Answer to requests that ask for bytes: READ, READLINK.
    ReplyData
);
reply!(
    /// Answer to OPEN and OPENDIR.
    ReplyOpen
);
reply!(
    /// Answer to CREATE.
    ReplyCreate
);
reply!(
    /// Answer to WRITE.
    ReplyWrite
);
reply!(
    /// Answer to IOCTL.
    ReplyIoctl
);
reply!(
    /// Answer to POLL.
    ReplyPoll
);
reply!(
    /// Answer to LSEEK.
    ReplyLseek
);
reply!(
    /// Answer to STATFS.
    ReplyStatfs
);
reply!(
    /// Answer to GETXATTR and LISTXATTR.
    ReplyXattr, size: u32
);
reply!(
    /// Answer to READDIR: entries are added until it is full.
    ReplyDirectory, entries: Entries
);
reply!(
    /// Answer to READDIRPLUS: entries with their attributes are added until it is full.
    ReplyDirectoryPlus, entries: Entries
);

impl ReplyEmpty {
    /// Success.
    pub fn ok(self) -> Answered {
        self.inner.ok(&[])
    }
}

impl ReplyEntry {
    /// The name exists. The kernel counts one lookup of the node.
    pub fn entry(self, entry: &Entry) -> Answered {
        self.inner.ok(entry.out().as_bytes())
    }

    /// The name does not exist, and may be believed not to exist for `ttl`. Without caching, answer ENOENT instead.
    pub fn negative(self, ttl: Duration) -> Answered {
        let out = wire::EntryOut {
            entry_valid: ttl.as_secs(),
            entry_valid_nsec: ttl.subsec_nanos(),
            ..wire::EntryOut::default()
        };
        self.inner.ok(out.as_bytes())
    }
}

impl ReplyAttr {
    /// The node's attributes.
    pub fn attr(self, attr: &Attr) -> Answered {
        self.inner.ok(attr.out().as_bytes())
    }
}

impl ReplyData {
    /// The bytes; fewer than asked for means end of file. More than asked for ends the request with EIO (the kernel refuses it).
    pub fn data(self, data: &[u8]) -> Answered {
        self.inner.ok(data)
    }

    /// The bytes, gathered from several places.
    pub fn data_vectored(self, data: &[IoSlice<'_>]) -> Answered {
        self.inner.send(None, data)
    }
}

/// What an open gives.
#[derive(Clone, Copy, Debug, Default)]
pub struct Opened<'a> {
    /// The server's number of the open file; comes back with each request on it.
    pub fh: u64,
    /// How the kernel treats the file.
    pub flags: OpenFlags,
    /// Where mappings (and, without `DIRECT_IO`, reads and writes) go. All opens of one inode that are open at the same time must give the same id,
    /// or none if the first gave none (`fs/fuse/iomode.c`, EIO otherwise).
    pub backing: Option<&'a BackingId>,
}

impl Opened<'_> {
    fn out(&self) -> wire::OpenOut {
        let (flags, backing_id) = match self.backing {
            Some(backing) => (self.flags | OpenFlags::PASSTHROUGH, backing.raw()),
            None => (self.flags - OpenFlags::PASSTHROUGH, 0),
        };
        wire::OpenOut {
            fh: self.fh,
            open_flags: flags.bits(),
            backing_id,
        }
    }
}

impl ReplyOpen {
    /// The file is open. On [`Answered::TooLate`] it is not, and no RELEASE comes: release it here.
    pub fn opened(self, opened: &Opened<'_>) -> Answered {
        self.inner.ok(opened.out().as_bytes())
    }
}

impl ReplyCreate {
    /// The file was made (or found) and is open.
    pub fn created(self, entry: &Entry, opened: &Opened<'_>) -> Answered {
        self.inner.send(
            None,
            &[
                IoSlice::new(entry.out().as_bytes()),
                IoSlice::new(opened.out().as_bytes()),
            ],
        )
    }
}

impl ReplyWrite {
    /// So many bytes were taken. More than were sent ends the request with EIO (the kernel refuses it).
    pub fn written(self, size: u32) -> Answered {
        self.inner
            .ok(wire::WriteOut { size, padding: 0 }.as_bytes())
    }
}

impl ReplyIoctl {
    /// The call's return value and the bytes the kernel copies to the caller: at most `out_size`, which is 0 for raw `_IO` numbers.
    pub fn result(self, result: i32, data: &[u8]) -> Answered {
        let out = wire::IoctlOut {
            result,
            ..wire::IoctlOut::default()
        };
        self.inner
            .send(None, &[IoSlice::new(out.as_bytes()), IoSlice::new(data)])
    }
}

impl ReplyPoll {
    /// The `POLL*` bits that are true now.
    pub fn events(self, revents: u32) -> Answered {
        self.inner.ok(wire::PollOut {
            revents,
            padding: 0,
        }
        .as_bytes())
    }
}

impl ReplyLseek {
    /// The new position.
    pub fn offset(self, offset: u64) -> Answered {
        self.inner.ok(wire::LseekOut { offset }.as_bytes())
    }
}

/// Numbers of a file system, as `statfs` shows them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Statfs {
    /// Blocks in all, free, and free for ordinary users.
    pub blocks: [u64; 3],
    /// Nodes in all and free.
    pub files: [u64; 2],
    /// Block size in bytes.
    pub block_size: u32,
    /// Longest name in bytes.
    pub name_max: u32,
}

impl ReplyStatfs {
    /// The numbers.
    pub fn statfs(self, statfs: &Statfs) -> Answered {
        let [blocks, bfree, bavail] = statfs.blocks;
        let [files, ffree] = statfs.files;
        let (bsize, namelen) = (statfs.block_size, statfs.name_max);
        let out = wire::StatfsOut {
            blocks,
            bfree,
            bavail,
            files,
            ffree,
            bsize,
            namelen,
            frsize: bsize,
            ..wire::StatfsOut::default()
        };
        self.inner.ok(out.as_bytes())
    }
}

impl ReplyXattr {
    /// The value, or the names each ended by NUL. Handles the question for the size alone, and ERANGE when the caller's buffer is too small.
    pub fn value(self, value: &[u8]) -> Answered {
        match self.size {
            0 => {
                let size = u32::try_from(value.len()).unwrap_or(u32::MAX);
                self.inner
                    .ok(wire::GetxattrOut { size, padding: 0 }.as_bytes())
            }
            size if value.len() > size as usize => self.inner.error(Errno::RANGE),
            _ => self.inner.ok(value),
        }
    }
}

/// Directory entries up to the size the caller has room for.
#[derive(Debug)]
pub(crate) struct Entries {
    bytes: Vec<u8>,
    size: usize,
}

impl Entries {
    pub(crate) fn new(size: u32) -> Self {
        Self {
            bytes: Vec::new(),
            size: size as usize,
        }
    }

    fn add(
        &mut self,
        entry: Option<&Entry>,
        ino: u64,
        next: u64,
        kind: FileType,
        name: &OsStr,
    ) -> bool {
        let name = name.as_bytes();
        let kind = (kind.as_raw_mode() >> 12) & 0o17;
        let dirent = wire::Dirent {
            ino,
            off: next,
            namelen: u32::try_from(name.len()).unwrap_or(u32::MAX),
            kind,
        };
        let head = if entry.is_some() {
            size_of::<wire::EntryOut>()
        } else {
            0
        };
        let length = (head + size_of::<wire::Dirent>() + name.len()).next_multiple_of(8);
        if self.bytes.len() + length > self.size {
            return false;
        }
        let end = self.bytes.len() + length;
        if let Some(entry) = entry {
            self.bytes.extend_from_slice(entry.out().as_bytes());
        }
        self.bytes.extend_from_slice(dirent.as_bytes());
        self.bytes.extend_from_slice(name);
        self.bytes.resize(end, 0);
        true
    }
}

impl ReplyDirectory {
    /// Adds a name; `next` is the offset at which a later READDIR goes on after it. False when there is no room: it was not added.
    #[must_use]
    pub fn add(&mut self, ino: u64, next: u64, kind: FileType, name: impl AsRef<OsStr>) -> bool {
        self.entries.add(None, ino, next, kind, name.as_ref())
    }

    /// Sends what was added; nothing means the end of the directory.
    pub fn done(self) -> Answered {
        self.inner.ok(&self.entries.bytes)
    }
}

impl ReplyDirectoryPlus {
    /// Adds a name with its node, which counts as looked up (not for `.` and `..`: give them node 0). False when there is no room: it was not added.
    #[must_use]
    pub fn add(&mut self, next: u64, name: impl AsRef<OsStr>, entry: &Entry) -> bool {
        let kind = FileType::from_raw_mode(entry.attr.mode);
        self.entries
            .add(Some(entry), entry.attr.ino, next, kind, name.as_ref())
    }

    /// Sends what was added; nothing means the end of the directory.
    pub fn done(self) -> Answered {
        self.inner.ok(&self.entries.bytes)
    }
}
