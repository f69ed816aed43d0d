#![expect(
    unsafe_code,
    reason = "mapping memory, and reaching it only through fault-safe accesses"
)]
//! A mapping of a file that others can change and truncate.

use std::ptr::NonNull;

use rustix::fd::AsFd;
use rustix::mm::MapFlags;
use rustix::mm::ProtFlags;

use crate::Result;
use crate::fault;
use crate::fault::Fault;
use crate::fault::Scalar;

/// `len` bytes of a file from its start, mapped shared. Unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Region {
    base: NonNull<u8>,
    len: usize,
    writable: bool,
}

// SAFETY: the memory belongs to no thread, and every access is a copy or a single instruction that is
// made for memory others change at the same time; no reference into it ever exists.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `len` bytes, a multiple of the file's page size. Pages past the end of the file fault.
    /// Nothing is reserved: huge pages that the client has not reserved itself fault too.
    pub(crate) fn map(file: impl AsFd, len: usize, writable: bool) -> Result<Self> {
        fault::install();
        let prot = if writable {
            ProtFlags::READ | ProtFlags::WRITE
        } else {
            ProtFlags::READ
        };
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses the place, so nothing that exists is replaced.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, prot, flags, file, 0) }?;
        let base = NonNull::new(base.cast()).ok_or(rustix::io::Errno::NOMEM)?;
        Ok(Self {
            base,
            len,
            writable,
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The address of `len` bytes at `offset`, if all of them are inside.
    fn at(&self, offset: u64, len: usize) -> Result<*mut u8, Fault> {
        let offset = usize::try_from(offset).map_err(|_| Fault { done: 0 })?;
        let end = offset.checked_add(len).ok_or(Fault { done: 0 })?;
        if end > self.len {
            return Err(Fault { done: 0 });
        }
        // SAFETY: inside the mapping, or just past its end.
        Ok(unsafe { self.base.as_ptr().add(offset) })
    }

    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Fault> {
        let src = self.at(offset, buf.len())?;
        // SAFETY: the source is inside our mapping, which lives as long as `self`; the destination is the
        // caller's own; mapping installed the handler.
        unsafe { fault::copy(buf.as_mut_ptr(), src, buf.len()) }
    }

    pub(crate) fn write(&self, offset: u64, buf: &[u8]) -> Result<(), Fault> {
        let dst = self.writable_at(offset, buf.len())?;
        // SAFETY: as in `read`, the other way round; the mapping is writable.
        unsafe { fault::copy(dst, buf.as_ptr(), buf.len()) }
    }

    pub(crate) fn load<S: Scalar>(&self, offset: u64) -> Result<S, Fault> {
        let src = self.at(offset, S::SIZE)?;
        // SAFETY: as in `read`.
        unsafe { fault::load(src) }
    }

    pub(crate) fn store<S: Scalar>(&self, offset: u64, value: S) -> Result<(), Fault> {
        let dst = self.writable_at(offset, S::SIZE)?;
        // SAFETY: as in `write`.
        unsafe { fault::store(dst, value) }
    }

    fn writable_at(&self, offset: u64, len: usize) -> Result<*mut u8, Fault> {
        if !self.writable {
            return Err(Fault { done: 0 });
        }
        self.at(offset, len)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: exactly what `map` returned, and no access can be running: each borrows `self`.
        // Unmapping a range that was mapped as a whole cannot fail.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}
