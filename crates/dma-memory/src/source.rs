//! What an IOVA area points at.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use client_process::Mapping;
use client_process::Memory;
use rustix::io::Errno;

use crate::Result;
use crate::file::FileRegistry;
use crate::file::SharedFile;
use crate::peer::is_peer;

/// What an IOVA area points at. Offsets count from the start of the area.
///
/// Whether the area may be read or written is the business of whoever keeps the areas; how long it is,
/// too.
#[derive(Debug)]
pub enum Source {
    /// Part of a file (IOMMU_IOAS_MAP_FILE, or a vfio-user DMA region).
    File {
        /// The file.
        file: Arc<SharedFile>,
        /// Where in it the area starts.
        offset: u64,
    },
    /// Memory of a client at an address (IOMMU_IOAS_MAP, VFIO_IOMMU_MAP_DMA).
    Process(ProcessMemory),
}

impl Source {
    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// [`Errno::FAULT`]: the memory is not there (any more); `buf` may be partly filled.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        match self {
            Self::File { file, offset: base } => Ok(file.read(add(*base, offset)?, buf)?),
            Self::Process(memory) => memory.read(offset, buf),
        }
    }

    /// Writes `buf` at `offset`.
    ///
    /// # Errors
    /// [`Errno::FAULT`]: the memory is not there, or its owner could not write it; part may have been
    /// written.
    pub fn write(&self, offset: u64, buf: &[u8]) -> Result<()> {
        match self {
            Self::File { file, offset: base } => Ok(file.write(add(*base, offset)?, buf)?),
            Self::Process(memory) => memory.write(offset, buf),
        }
    }

    /// The same memory from `offset` on, as a source of its own (for IOMMU_IOAS_COPY of a part).
    ///
    /// # Errors
    /// [`Errno::OVERFLOW`]: wraps.
    pub fn advanced(&self, by: u64) -> Result<Self> {
        match self {
            Self::File { file, offset } => {
                let offset = offset.checked_add(by).ok_or(Errno::OVERFLOW)?;
                Ok(Self::File {
                    file: Arc::clone(file),
                    offset,
                })
            }
            Self::Process(memory) => {
                let addr = memory.addr.checked_add(by).ok_or(Errno::OVERFLOW)?;
                Ok(Self::Process(ProcessMemory::new(
                    Arc::clone(&memory.memory),
                    addr,
                    Arc::clone(&memory.files),
                )))
            }
        }
    }
}

/// Memory of a client at an address.
///
/// Where the client shares the memory (memfd, shared anonymous, hugetlb) the file behind it is mapped here
/// and used in place; the rest is copied. Which of both is asked of the kernel at every access: an address
/// that the client has mapped to something else since is that something else, as it is for the client.
/// Unlike the kernel's pinned pages, memory that the client unmaps is then [`Errno::FAULT`].
#[derive(Debug)]
pub struct ProcessMemory {
    memory: Arc<Memory>,
    addr: u64,
    files: Arc<FileRegistry>,
    /// The file that was behind this area last, kept mapped as long as the area exists.
    last: Mutex<Option<Arc<SharedFile>>>,
}

impl ProcessMemory {
    /// The client's memory from `addr` on.
    #[must_use]
    pub fn new(memory: Arc<Memory>, addr: u64, files: Arc<FileRegistry>) -> Self {
        Self {
            memory,
            addr,
            files,
            last: Mutex::new(None),
        }
    }

    /// The address in the client.
    #[must_use]
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// The client's address space.
    #[must_use]
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// See [`Source::read`].
    ///
    /// # Errors
    /// As there.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let addr = add(self.addr, offset)?;
        if !self.memory.query_is_cheap() {
            return self.memory.read(addr, buf);
        }
        let mut rest = buf;
        self.by_mapping(addr, rest.len(), |at, len, mapping| {
            if !mapping.readable {
                return Err(Errno::FAULT);
            }
            let (part, after) = std::mem::take(&mut rest).split_at_mut(len);
            rest = after;
            match self.in_place(mapping, at)? {
                Some((file, from)) => Ok(file.read(from, part)?),
                None => self.memory.read(at, part),
            }
        })
    }

    /// See [`Source::write`].
    ///
    /// # Errors
    /// As there.
    pub fn write(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let addr = add(self.addr, offset)?;
        if !self.memory.query_is_cheap() {
            return self.memory.write(addr, buf);
        }
        let mut rest = buf;
        self.by_mapping(addr, buf.len(), |at, len, mapping| {
            if !mapping.writable {
                return Err(Errno::FAULT);
            }
            let (part, after) = rest.split_at(len);
            rest = after;
            match self.in_place(mapping, at)? {
                Some((file, to)) => Ok(file.write(to, part)?),
                None => self.memory.write_checked(at, part),
            }
        })
    }

    /// Calls `access` for each mapping that the range touches, with the part that lies in it.
    fn by_mapping(
        &self,
        addr: u64,
        len: usize,
        mut access: impl FnMut(u64, usize, &Mapping) -> Result<()>,
    ) -> Result<()> {
        let end = add(addr, len as u64)?;
        let mut at = addr;
        while at < end {
            let mapping = self.memory.query(at)?;
            let stop = mapping.end.min(end);
            let len = stop
                .checked_sub(at)
                .and_then(|len| usize::try_from(len).ok())
                .ok_or(Errno::FAULT)?;
            access(at, len, &mapping)?;
            at = stop;
        }
        Ok(())
    }

    /// Whether this domain reaches what the client has mapped there: see
    /// [`FileRegistry::without_devices`].
    #[must_use]
    pub fn reaches(&self, mapping: &Mapping) -> bool {
        !(self.files.is_without_devices() && mapping.shared && is_peer(mapping.file))
    }

    /// The file to use in place for an address, and the position in it; `None` if it must be copied.
    /// [`Errno::FAULT`]: out of reach.
    fn in_place(&self, mapping: &Mapping, at: u64) -> Result<Option<(Arc<SharedFile>, u64)>> {
        if !mapping.shared {
            return Ok(None);
        }
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = last.as_ref().filter(|file| usable(file, mapping)) {
            let file = Arc::clone(file);
            return Ok(mapping.file_offset(at).map(|from| (file, from)));
        }
        drop(last);
        // A device's memory is copied. Whoever holds its file open keeps the device from being
        // closed, and the device's end is what ends this mapping.
        if is_peer(mapping.file) {
            return match self.reaches(mapping) {
                true => Ok(None),
                false => Err(Errno::FAULT),
            };
        }
        Ok(self.open_in_place(mapping, at))
    }

    fn open_in_place(&self, mapping: &Mapping, at: u64) -> Option<(Arc<SharedFile>, u64)> {
        let from = mapping.file_offset(at)?;
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = last.as_ref().filter(|file| usable(file, mapping)) {
            return Some((Arc::clone(file), from));
        }
        let known = [true, false].into_iter().find_map(|w| {
            self.files
                .find(mapping.file, w)
                .filter(|f| usable(f, mapping))
        });
        let file = known.or_else(|| {
            self.files
                .open(self.memory.open_mapping(mapping).ok()?)
                .ok()
                .filter(|f| usable(f, mapping))
        })?;
        *last = Some(Arc::clone(&file));
        Some((file, from))
    }
}

/// An open file keeps its inode, so an equal identity is the same file.
fn usable(file: &SharedFile, mapping: &Mapping) -> bool {
    file.id() == Ok(mapping.file) && (file.is_writable() || !mapping.writable)
}

fn add(a: u64, b: u64) -> Result<u64> {
    a.checked_add(b).ok_or(Errno::FAULT)
}
