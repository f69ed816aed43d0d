//! What a node is, in this crate's words; turned into `struct fuse_attr` and `struct fuse_entry_out`.

use std::time::Duration;
use std::time::SystemTime;

use crate::wire;

/// Attributes of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    /// `st_ino`.
    pub ino: u64,
    /// Size in bytes.
    pub size: u64,
    /// Type and permission bits (`S_IF*` with `0777`).
    pub mode: u32,
    /// Number of links.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of a device node, as `makedev` in its 32-bit form (`new_encode_dev`).
    pub rdev: u32,
    /// Block size for I/O, in bytes.
    pub blksize: u32,
    /// Last access.
    pub atime: SystemTime,
    /// Last change of the contents.
    pub mtime: SystemTime,
    /// Last change of the node.
    pub ctime: SystemTime,
    /// How long the kernel may use these attributes without asking again.
    pub ttl: Duration,
}

impl Attr {
    /// Attributes of a node with one link, owned by root, with all times at the epoch and no caching.
    pub fn new(ino: u64, mode: u32, size: u64) -> Self {
        Self {
            ino,
            size,
            mode,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            atime: SystemTime::UNIX_EPOCH,
            mtime: SystemTime::UNIX_EPOCH,
            ctime: SystemTime::UNIX_EPOCH,
            ttl: Duration::ZERO,
        }
    }

    pub(crate) fn wire(&self) -> wire::Attr {
        let (atime, atime_nsec) = split(self.atime);
        let (mtime, mtime_nsec) = split(self.mtime);
        let (ctime, ctime_nsec) = split(self.ctime);
        wire::Attr {
            ino: self.ino,
            size: self.size,
            blocks: self.size.div_ceil(512),
            atime,
            mtime,
            ctime,
            atime_nsec,
            mtime_nsec,
            ctime_nsec,
            mode: self.mode,
            nlink: self.nlink,
            uid: self.uid,
            gid: self.gid,
            rdev: self.rdev,
            blksize: self.blksize,
            flags: 0,
        }
    }

    pub(crate) fn out(&self) -> wire::AttrOut {
        wire::AttrOut {
            attr_valid: self.ttl.as_secs(),
            attr_valid_nsec: self.ttl.subsec_nanos(),
            padding: 0,
            attr: self.wire(),
        }
    }
}

/// A name that was found: the node behind it and how long the name may be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The server's number of the node; 1 is the root. Each answer counts as one lookup, taken back by FORGET.
    pub node: u64,
    /// Tells nodes apart that reuse a number.
    pub generation: u64,
    /// How long the kernel may use the name without asking again.
    pub ttl: Duration,
    /// The node's attributes.
    pub attr: Attr,
}

impl Entry {
    pub(crate) fn out(&self) -> wire::EntryOut {
        wire::EntryOut {
            node: self.node,
            generation: self.generation,
            entry_valid: self.ttl.as_secs(),
            attr_valid: self.attr.ttl.as_secs(),
            entry_valid_nsec: self.ttl.subsec_nanos(),
            attr_valid_nsec: self.attr.ttl.subsec_nanos(),
            attr: self.attr.wire(),
        }
    }
}

/// Seconds and nanoseconds since the epoch; seconds are two's complement for earlier times, as the kernel reads them.
fn split(time: SystemTime) -> (u64, u32) {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => (since.as_secs(), since.subsec_nanos()),
        Err(before) => {
            let before = before.duration();
            match before.subsec_nanos() {
                0 => (before.as_secs().wrapping_neg(), 0),
                nanos => (
                    before.as_secs().wrapping_neg().wrapping_sub(1),
                    1_000_000_000 - nanos,
                ),
            }
        }
    }
}

/// A time as the kernel sends it, in a SETATTR.
pub(crate) fn join(seconds: u64, nanos: u32) -> SystemTime {
    let nanos = Duration::from_nanos(u64::from(nanos.min(999_999_999)));
    let signed = seconds.cast_signed();
    let base = if signed >= 0 {
        SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
    } else {
        SystemTime::UNIX_EPOCH.checked_sub(Duration::from_secs(signed.unsigned_abs()))
    };
    base.and_then(|base| base.checked_add(nanos))
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_survive_both_ways_also_before_the_epoch() {
        for (seconds, nanos) in [
            (0, 0),
            (1, 5),
            (u64::MAX, 999_999_999),
            (1_u64.wrapping_neg(), 0),
            (17_u64.wrapping_neg(), 4),
        ] {
            assert_eq!(split(join(seconds, nanos)), (seconds, nanos));
        }
        // Nothing a client can send makes the sum overflow.
        for seconds in [i64::MAX as u64, i64::MIN as u64] {
            let _ = join(seconds, u32::MAX);
        }
    }
}
