//! The log of what a device has written into its user's memory.

use super::DeviceFile;
use crate::{Errno, Result};

impl DeviceFile {
    /// Starts to log what the device writes within `ranges`, each `(iova, length)`; none means
    /// everything. Returns the page size that is logged by, which may be another than asked for.
    ///
    /// In this order for each range: `EINVAL` when its start or length is no multiple of
    /// `page_size`, `EOVERFLOW` when its end is 2^64 or wraps, `EINVAL` when it overlaps an earlier
    /// one. `EINVAL` when a log is running.
    pub fn dma_logging_start(&self, _page_size: u64, _ranges: &[(u64, u64)]) -> Result<u64> {
        let _ = self.grant()?;
        Err(Errno::NOTTY)
    }

    /// Stops. Nothing happens when no log is running.
    pub fn dma_logging_stop(&self) -> Result {
        let _ = self.grant()?;
        Err(Errno::NOTTY)
    }

    /// Sets a bit in `bitmap` for each page of `page_size` bytes in `iova..iova + len` that was
    /// written since the last report, and clears the log there. Bit n is `iova + n * page_size`;
    /// bits are only ever set. Any page size from 4096 that is a power of two will do: with a smaller
    /// one than is logged, all of a written page counts.
    ///
    /// `EINVAL` for another page size, when no log is running, or when the bitmap is too short;
    /// `EOVERFLOW` when the range ends at 2^64 or wraps.
    pub fn dma_logging_report(
        &self,
        _iova: u64,
        _len: u64,
        _page_size: u64,
        _bitmap: &mut [u64],
    ) -> Result {
        let _ = self.grant()?;
        Err(Errno::NOTTY)
    }
}
