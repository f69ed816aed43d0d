//! One mapping of an address space, and the text form of a list of them.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use crate::holders::FileId;
use crate::sys;

/// One mapping (a VMA) of a client's address space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// Position in the file of the first byte.
    pub offset: u64,
    /// The file behind it; device and inode 0 for private anonymous memory. A passthrough mapping of a
    /// FUSE file shows the FUSE file.
    pub file: FileId,
    /// MAP_SHARED.
    pub shared: bool,
    /// PROT_READ.
    pub readable: bool,
    /// PROT_WRITE.
    pub writable: bool,
}

impl Mapping {
    /// The position in the file of an address inside this mapping.
    #[must_use]
    pub fn file_offset(&self, addr: u64) -> Option<u64> {
        if addr >= self.end {
            return None;
        }
        addr.checked_sub(self.start)?.checked_add(self.offset)
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Never true of what the kernel reports.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn from_query(query: &sys::ProcmapQuery) -> Self {
        Self {
            start: query.vma_start,
            end: query.vma_end,
            offset: query.vma_offset,
            file: FileId {
                dev: rustix::fs::makedev(query.dev_major, query.dev_minor),
                ino: query.inode,
            },
            shared: query.vma_flags & sys::VMA_SHARED != 0,
            readable: query.vma_flags & sys::VMA_READABLE != 0,
            writable: query.vma_flags & sys::VMA_WRITABLE != 0,
        }
    }

    /// One line of `/proc/PID/maps`, and the path at its end.
    pub(crate) fn parse(line: &[u8]) -> Option<(Self, Option<PathBuf>)> {
        let mut rest = line;
        let mut word = || {
            let from = rest.iter().position(|b| *b != b' ')?;
            let tail = rest.get(from..)?;
            let to = tail.iter().position(|b| *b == b' ').unwrap_or(tail.len());
            let (word, after) = tail.split_at(to);
            rest = after;
            std::str::from_utf8(word).ok()
        };
        let hex = |s: &str| u64::from_str_radix(s, 16).ok();
        let (start, end) = word()?.split_once('-')?;
        let prot = word()?.as_bytes();
        let offset = hex(word()?)?;
        let (major, minor) = word()?.split_once(':')?;
        let dev = rustix::fs::makedev(
            u32::from_str_radix(major, 16).ok()?,
            u32::from_str_radix(minor, 16).ok()?,
        );
        let ino = word()?.parse().ok()?;
        let path = rest
            .iter()
            .position(|b| *b != b' ')
            .and_then(|at| rest.get(at..));
        let mapping = Self {
            start: hex(start)?,
            end: hex(end)?,
            offset,
            file: FileId { dev, ino },
            shared: prot.get(3) == Some(&b's'),
            readable: prot.first() == Some(&b'r'),
            writable: prot.get(1) == Some(&b'w'),
        };
        Some((
            mapping,
            path.map(|p| PathBuf::from(OsString::from_vec(p.to_vec()))),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_maps() {
        let (m, path) =
            Mapping::parse(b"7f00-8f00 r--s 00001000 00:1a 42      /memfd:a b (deleted)").unwrap();
        assert_eq!((m.start, m.end, m.offset), (0x7f00, 0x8f00, 0x1000));
        assert_eq!(
            m.file,
            FileId {
                dev: rustix::fs::makedev(0, 0x1a),
                ino: 42
            }
        );
        assert!(m.shared && m.readable && !m.writable);
        assert_eq!(path.unwrap().to_str(), Some("/memfd:a b (deleted)"));
        assert_eq!(m.file_offset(0x7f08), Some(0x1008));
        assert_eq!(m.file_offset(0x8f00), None);
        assert_eq!(m.file_offset(0x7eff), None);

        let (m, path) = Mapping::parse(b"7f00-8f00 -w-p 00000000 00:00 0 ").unwrap();
        assert!(!m.shared && !m.readable && m.writable && path.is_none());
        assert!(Mapping::parse(b"").is_none());
        assert!(Mapping::parse(b"7f00 rw-p").is_none());
    }
}
