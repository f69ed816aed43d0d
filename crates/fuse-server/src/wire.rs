//! The bytes that pass through `/dev/fuse`: `include/uapi/linux/fuse.h`, protocol 7.36 (Linux 6.1) to 7.45.
//!
//! Every structure has the layout of the header; sizes and the offsets that matter are asserted at compile time. Reserved words are kept as
//! private padding so that a reply never carries uninitialised bytes.

use std::mem::offset_of;

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;

/// The protocol version this crate speaks; the kernel speaks the smaller minor of both.
pub(crate) const MAJOR: u32 = 7;
/// 7.40 is the version that brought passthrough (Linux 6.9); nothing later changes a structure that is used here.
pub(crate) const MINOR: u32 = 40;

/// `FUSE_MIN_READ_BUFFER`: the kernel refuses to read into less.
pub(crate) const MIN_READ_BUFFER: usize = 8192;
/// `FUSE_UNIQUE_RESEND`: the request was sent again after `FUSE_NOTIFY_RESEND`.
pub(crate) const UNIQUE_RESEND: u64 = 1 << 63;

/// `_IOW(229, 1, struct fuse_backing_map)`.
pub(crate) const DEV_IOC_BACKING_OPEN: u32 = 0x4010_e501;
/// `_IOW(229, 2, uint32_t)`.
pub(crate) const DEV_IOC_BACKING_CLOSE: u32 = 0x4004_e502;

/// `enum fuse_opcode`, those this crate knows.
pub(crate) mod opcode {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RMDIR: u32 = 11;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FSYNC: u32 = 20;
    pub(crate) const SETXATTR: u32 = 21;
    pub(crate) const GETXATTR: u32 = 22;
    pub(crate) const LISTXATTR: u32 = 23;
    pub(crate) const REMOVEXATTR: u32 = 24;
    pub(crate) const FLUSH: u32 = 25;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const FSYNCDIR: u32 = 30;
    pub(crate) const ACCESS: u32 = 34;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const IOCTL: u32 = 39;
    pub(crate) const POLL: u32 = 40;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const READDIRPLUS: u32 = 44;
    pub(crate) const RENAME2: u32 = 45;
    pub(crate) const LSEEK: u32 = 46;
}

/// `enum fuse_notify_code`: sent in the error field of a message whose unique is zero.
pub(crate) mod notify {
    pub(crate) const POLL: i32 = 1;
    pub(crate) const INVAL_INODE: i32 = 2;
    pub(crate) const INVAL_ENTRY: i32 = 3;
    pub(crate) const DELETE: i32 = 6;
    pub(crate) const RESEND: i32 = 7;
}

/// Declares a structure of the protocol with its size.
macro_rules! wire {
    ($(#[$doc:meta])* $name:ident, $size:literal { $($field:ident: $ty:ty),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub(crate) struct $name { $(pub(crate) $field: $ty),* }
        const _: () = assert!(size_of::<$name>() == $size);
    };
}

wire!(InHeader, 40 {
    len: u32, opcode: u32, unique: u64, node: u64, uid: u32, gid: u32, pid: u32, total_extlen: u16, padding: u16,
});
wire!(OutHeader, 16 { len: u32, error: i32, unique: u64 });
wire!(
    /// The first sixteen bytes are all that kernels before 7.36 send.
    InitIn, 64 { major: u32, minor: u32, max_readahead: u32, flags: u32, flags2: u32, unused: [u32; 11] }
);
wire!(InitOut, 64 {
    major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16, congestion_threshold: u16, max_write: u32, time_gran: u32,
    max_pages: u16, map_alignment: u16, flags2: u32, max_stack_depth: u32, request_timeout: u16, unused: [u16; 11],
});
wire!(Attr, 88 {
    ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64, atime_nsec: u32, mtime_nsec: u32, ctime_nsec: u32, mode: u32,
    nlink: u32, uid: u32, gid: u32, rdev: u32, blksize: u32, flags: u32,
});
wire!(EntryOut, 128 {
    node: u64, generation: u64, entry_valid: u64, attr_valid: u64, entry_valid_nsec: u32, attr_valid_nsec: u32, attr: Attr,
});
wire!(AttrOut, 104 { attr_valid: u64, attr_valid_nsec: u32, padding: u32, attr: Attr });
wire!(GetattrIn, 16 { flags: u32, padding: u32, fh: u64 });
wire!(SetattrIn, 88 {
    valid: u32, padding: u32, fh: u64, size: u64, lock_owner: u64, atime: u64, mtime: u64, ctime: u64, atime_nsec: u32, mtime_nsec: u32,
    ctime_nsec: u32, mode: u32, unused4: u32, uid: u32, gid: u32, unused5: u32,
});
wire!(MknodIn, 16 { mode: u32, rdev: u32, umask: u32, padding: u32 });
wire!(MkdirIn, 8 { mode: u32, umask: u32 });
wire!(RenameIn, 8 { new_parent: u64 });
wire!(Rename2In, 16 { new_parent: u64, flags: u32, padding: u32 });
wire!(LinkIn, 8 { old_node: u64 });
wire!(OpenIn, 8 { flags: u32, open_flags: u32 });
wire!(CreateIn, 16 { flags: u32, mode: u32, umask: u32, open_flags: u32 });
wire!(OpenOut, 16 { fh: u64, open_flags: u32, backing_id: i32 });
wire!(ReleaseIn, 24 { fh: u64, flags: u32, release_flags: u32, lock_owner: u64 });
wire!(FlushIn, 24 { fh: u64, unused: u32, padding: u32, lock_owner: u64 });
wire!(ReadIn, 40 { fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, padding: u32 });
wire!(WriteIn, 40 { fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32, padding: u32 });
wire!(WriteOut, 8 { size: u32, padding: u32 });
wire!(StatfsOut, 80 {
    blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64, bsize: u32, namelen: u32, frsize: u32, padding: u32, spare: [u32; 6],
});
wire!(FsyncIn, 16 { fh: u64, flags: u32, padding: u32 });
wire!(
    /// `FUSE_COMPAT_SETXATTR_IN_SIZE`: the longer form needs `FUSE_SETXATTR_EXT`, which is not asked for.
    SetxattrIn, 8 { size: u32, flags: u32 }
);
wire!(GetxattrIn, 8 { size: u32, padding: u32 });
wire!(GetxattrOut, 8 { size: u32, padding: u32 });
wire!(AccessIn, 8 { mask: u32, padding: u32 });
wire!(InterruptIn, 8 { unique: u64 });
wire!(IoctlIn, 32 { fh: u64, flags: u32, cmd: u32, arg: u64, in_size: u32, out_size: u32 });
wire!(IoctlOut, 16 { result: i32, flags: u32, in_iovs: u32, out_iovs: u32 });
wire!(PollIn, 24 { fh: u64, kh: u64, flags: u32, events: u32 });
wire!(PollOut, 8 { revents: u32, padding: u32 });
wire!(FallocateIn, 32 { fh: u64, offset: u64, length: u64, mode: u32, padding: u32 });
wire!(LseekIn, 24 { fh: u64, offset: u64, whence: u32, padding: u32 });
wire!(LseekOut, 8 { offset: u64 });
wire!(ForgetIn, 8 { nlookup: u64 });
wire!(BatchForgetIn, 8 { count: u32, dummy: u32 });
wire!(Dirent, 24 { ino: u64, off: u64, namelen: u32, kind: u32 });
wire!(NotifyPollOut, 8 { kh: u64 });
wire!(NotifyInvalInodeOut, 24 { ino: u64, off: i64, len: i64 });
wire!(NotifyInvalEntryOut, 16 { parent: u64, namelen: u32, flags: u32 });
wire!(NotifyDeleteOut, 24 { parent: u64, child: u64, namelen: u32, padding: u32 });
wire!(BackingMap, 16 { fd: i32, flags: u32, padding: u64 });

/// `struct fuse_forget_one`, as it stands in a batch.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ForgetOne {
    /// The node that loses references.
    pub node: u64,
    /// How many earlier lookups are taken back.
    pub nlookup: u64,
}
const _: () = assert!(size_of::<ForgetOne>() == 16);

const _: () = {
    assert!(offset_of!(InHeader, unique) == 8);
    assert!(offset_of!(InHeader, pid) == 32);
    assert!(offset_of!(InitIn, flags2) == 16);
    assert!(offset_of!(InitOut, max_background) == 16);
    assert!(offset_of!(InitOut, max_pages) == 28);
    assert!(offset_of!(InitOut, flags2) == 32);
    assert!(offset_of!(InitOut, max_stack_depth) == 36);
    assert!(offset_of!(Attr, mode) == 60);
    assert!(offset_of!(EntryOut, attr) == 40);
    assert!(offset_of!(SetattrIn, mode) == 68);
    assert!(offset_of!(SetattrIn, uid) == 76);
    assert!(offset_of!(OpenOut, backing_id) == 12);
    assert!(offset_of!(ReadIn, size) == 16);
    assert!(offset_of!(IoctlIn, cmd) == 12);
    assert!(offset_of!(IoctlIn, arg) == 16);
};

bitflags::bitflags! {
    /// What both sides can do: the flag words of `FUSE_INIT` (low half `flags`, high half `flags2`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Features: u64 {
        /// Reads of one file may be sent while others are under way.
        const ASYNC_READ = 1 << 0;
        /// `open` with `O_TRUNC` arrives as one OPEN carrying the flag, not as OPEN after a SETATTR of size 0.
        const ATOMIC_O_TRUNC = 1 << 3;
        /// Writes larger than a page.
        const BIG_WRITES = 1 << 5;
        /// Modes of new files arrive unmasked, with the umask beside them.
        const DONT_MASK = 1 << 6;
        /// Cached pages are dropped when size or mtime change.
        const AUTO_INVAL_DATA = 1 << 12;
        /// READDIRPLUS exists.
        const DO_READDIRPLUS = 1 << 13;
        /// The kernel chooses between READDIR and READDIRPLUS.
        const READDIRPLUS_AUTO = 1 << 14;
        /// Direct reads and writes of one file may be sent at the same time.
        const ASYNC_DIO = 1 << 15;
        /// Lookups and readdirs in one directory may be sent at the same time.
        const PARALLEL_DIROPS = 1 << 18;
        /// Requests larger than 32 pages; `max_pages` is valid.
        const MAX_PAGES = 1 << 22;
        /// Targets of symbolic links are cached.
        const CACHE_SYMLINKS = 1 << 23;
        /// The second flag word exists (Linux 5.17).
        const INIT_EXT = 1 << 30;
        /// `mmap(MAP_SHARED)` is allowed on files opened for direct I/O (Linux 6.6).
        const DIRECT_IO_ALLOW_MMAP = 1 << 36;
        /// Opens may be joined to a backing file (Linux 6.9): see [`crate::BackingId`].
        const PASSTHROUGH = 1 << 37;
        /// `FUSE_NOTIFY_RESEND` is understood (Linux 6.9).
        const HAS_RESEND = 1 << 39;
    }

    /// `FOPEN_*`: how the kernel treats an open file.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct OpenFlags: u32 {
        /// No page cache: every read and write reaches the server with the caller's offset and size.
        const DIRECT_IO = 1 << 0;
        /// Cached pages survive this open.
        const KEEP_CACHE = 1 << 1;
        /// The file has no position that can be sought.
        const NONSEEKABLE = 1 << 2;
        /// Directory entries may be cached.
        const CACHE_DIR = 1 << 3;
        /// The file is a stream: no position at all.
        const STREAM = 1 << 4;
        /// `close` sends no FLUSH (Linux 5.17; older kernels send it).
        const NOFLUSH = 1 << 5;
        /// Direct writes to one file may run at the same time.
        const PARALLEL_DIRECT_WRITES = 1 << 6;
        /// Reads, writes and mappings go to the backing file; with [`OpenFlags::DIRECT_IO`] only mappings do. Set by the crate when a backing id
        /// is given.
        const PASSTHROUGH = 1 << 7;
    }

    /// `FUSE_IOCTL_*` of an ioctl request.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct IoctlFlags: u32 {
        /// A 32-bit caller on a 64-bit kernel.
        const COMPAT = 1 << 0;
        /// Unrestricted ioctl (CUSE only).
        const UNRESTRICTED = 1 << 1;
        /// A 32-bit caller whose structures have 32-bit time or alignment.
        const IS_32BIT = 1 << 3;
        /// The file is a directory.
        const DIR = 1 << 4;
        /// A 32-bit caller with the x32 ABI.
        const COMPAT_X32 = 1 << 5;
    }

    /// Which fields of a SETATTR are meant: `FATTR_*`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub(crate) struct SetattrValid: u32 {
        const MODE = 1 << 0;
        const UID = 1 << 1;
        const GID = 1 << 2;
        const SIZE = 1 << 3;
        const ATIME = 1 << 4;
        const MTIME = 1 << 5;
        const FH = 1 << 6;
        const ATIME_NOW = 1 << 7;
        const MTIME_NOW = 1 << 8;
        const CTIME = 1 << 10;
    }
}
