//! Addresses without a hole between them.

use rustix::io::Errno;

use crate::Result;

/// A closed range of I/O addresses. `last` may be 2^64-1, and a range is never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Range {
    pub(crate) start: u64,
    pub(crate) last: u64,
}

impl Range {
    /// All 2^64 addresses.
    pub const ALL: Self = Self {
        start: 0,
        last: u64::MAX,
    };

    /// From `start` to `last`, both included.
    ///
    /// # Errors
    /// [`Errno::INVAL`]: `last` lies before `start`.
    pub fn new(start: u64, last: u64) -> Result<Self> {
        if last < start {
            Err(Errno::INVAL)
        } else {
            Ok(Self { start, last })
        }
    }

    /// `len` addresses from `start`.
    ///
    /// # Errors
    /// [`Errno::INVAL`]: no addresses. [`Errno::OVERFLOW`]: wraps (ending at 2^64-1 does not).
    pub fn with_len(start: u64, len: u64) -> Result<Self> {
        let more = len.checked_sub(1).ok_or(Errno::INVAL)?;
        Ok(Self {
            start,
            last: start.checked_add(more).ok_or(Errno::OVERFLOW)?,
        })
    }

    /// First address.
    #[must_use]
    pub fn start(self) -> u64 {
        self.start
    }

    /// Last address.
    #[must_use]
    pub fn last(self) -> u64 {
        self.last
    }

    /// Number of addresses; `None` for all 2^64.
    #[must_use]
    pub fn len(self) -> Option<u64> {
        (self.last - self.start).checked_add(1)
    }

    /// Always false.
    #[must_use]
    pub fn is_empty(self) -> bool {
        false
    }

    /// Whether `address` lies in it.
    #[must_use]
    pub fn contains(self, address: u64) -> bool {
        self.start <= address && address <= self.last
    }

    /// Whether all of `other` lies in it.
    #[must_use]
    pub fn covers(self, other: Self) -> bool {
        self.start <= other.start && other.last <= self.last
    }

    /// Whether they share an address.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.start <= other.last && other.start <= self.last
    }
}
