//! A client's file, mapped here once.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::OnceLock;
use std::sync::PoisonError;
use std::sync::RwLock;
use std::sync::RwLockReadGuard;
use std::sync::Weak;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;

use client_process::FileId;
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::fs::SealFlags;
use rustix::io::Errno;

use crate::Result;
use crate::fault::Fault;
use crate::fault::Scalar;
use crate::region::Region;

/// Largest part of one file that is mapped. A sparse file costs its owner nothing, whereas address space
/// (128 TiB on x86-64) is shared by all clients; what lies beyond is read and written with system calls.
const MAX_MAPPED: u64 = 1 << 40;

/// How many reads of a file are made by system calls before it is mapped. Mapping, the first fault and
/// unmapping cost as much as some fifty of them, and many a window is read once or not at all.
const UNMAPPED_READS: u32 = 16;

/// The files of one trust domain (an iommufd context, a container), each opened and mapped once however
/// many areas refer to it.
///
/// Inode numbers of hugetlb files repeat after 2^32 of them, so files of clients that must not reach each
/// other's memory belong in different registries.
#[derive(Debug, Default)]
pub struct FileRegistry {
    files: Mutex<Files>,
    /// Memory of our own devices is out of reach.
    without_devices: bool,
}

#[derive(Debug, Default)]
struct Files {
    known: HashMap<(FileId, bool), Weak<SharedFile>>,
    /// The first one. Which file it is will be asked when there is another one to tell it from.
    first: Option<Weak<SharedFile>>,
}

impl Files {
    /// The first one becomes one of many.
    fn identify(&mut self) -> Result<()> {
        if let Some(first) = self.first.as_ref().and_then(Weak::upgrade) {
            let key = (first.id()?, first.writable);
            self.known.insert(key, Arc::downgrade(&first));
        }
        self.first = None;
        Ok(())
    }

    fn find(&self, id: FileId, writable: bool) -> Option<Arc<SharedFile>> {
        self.known.get(&(id, writable)).and_then(Weak::upgrade)
    }

    /// Nobody has one, as far as can be told without a look at each.
    fn are_none(&self) -> bool {
        let first = self.first.as_ref().map_or(0, Weak::strong_count);
        self.known.is_empty() && first == 0
    }
}

/// A file of memory (memfd, tmpfs, hugetlb) that is used in place.
///
/// It stays mapped until the last area that refers to it is gone, and grows with the file. The client may
/// write it, shrink it and punch holes into it at any time; an access to what is no longer there is a
/// [`Fault`].
#[derive(Debug)]
pub struct SharedFile {
    file: OwnedFd,
    id: OnceLock<FileId>,
    writable: bool,
    /// Asked for when it is mapped first: many files are never touched.
    unit: OnceLock<Unit>,
    /// Set when the machine has no room for a mapping; then system calls serve.
    is_unmappable: AtomicBool,
    /// Reads so far that found it not mapped.
    unmapped_reads: AtomicU32,
    region: RwLock<Option<Region>>,
}

/// What a file is mapped by.
#[derive(Clone, Copy, Debug)]
struct Unit {
    /// Bytes: the huge page size for hugetlb.
    page: u64,
    is_huge: bool,
}

impl FileRegistry {
    /// No files.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The same for a domain that does not reach memory of our own devices, wherever the client has
    /// mapped it: iommufd refuses it ([`Errno::FAULT`]), a container takes it.
    #[must_use]
    pub fn without_devices() -> Self {
        Self {
            without_devices: true,
            ..Self::default()
        }
    }

    pub(crate) fn is_without_devices(&self) -> bool {
        self.without_devices
    }

    /// The file behind this descriptor. The descriptor is kept only if the file is new here.
    ///
    /// Nothing is asked of the file's server before it is known to be memory, so a file of a FUSE server
    /// that does not answer is refused without waiting.
    ///
    /// # Errors
    /// [`Errno::INVAL`]: not memfd, tmpfs, shared anonymous memory or hugetlb, or not open for reading.
    pub fn open(&self, file: OwnedFd) -> Result<Arc<SharedFile>> {
        // Only shmem and hugetlbfs know seals (`mm/memfd.c`, `memfd_file_seals_ptr`).
        let seals = rustix::fs::fcntl_get_seals(&file).map_err(|_| Errno::INVAL)?;
        let mode = rustix::fs::fcntl_getfl(&file)? & OFlags::RWMODE;
        if mode == OFlags::WRONLY {
            return Err(Errno::INVAL);
        }
        let writable =
            mode == OFlags::RDWR && !seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE);
        let made = SharedFile {
            file,
            id: OnceLock::new(),
            writable,
            unit: OnceLock::new(),
            is_unmappable: AtomicBool::new(false),
            unmapped_reads: AtomicU32::new(0),
            region: RwLock::new(None),
        };
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        if files.are_none() {
            let made = Arc::new(made);
            files.first = Some(Arc::downgrade(&made));
            return Ok(made);
        }
        files.identify()?;
        let key = (made.id()?, writable);
        if let Some(known) = files.find(key.0, writable) {
            return Ok(known);
        }
        if files.known.len() >= 64 && files.known.len().is_power_of_two() {
            files.known.retain(|_, file| file.strong_count() > 0);
        }
        let made = Arc::new(made);
        files.known.insert(key, Arc::downgrade(&made));
        Ok(made)
    }

    /// A file that some area refers to already.
    #[must_use]
    pub fn find(&self, id: FileId, writable: bool) -> Option<Arc<SharedFile>> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        // One that cannot be asked stays the first, and is not found.
        let _ = files.identify();
        files.find(id, writable)
    }
}

impl SharedFile {
    /// Which file it is.
    ///
    /// # Errors
    /// Those of statx.
    pub fn id(&self) -> Result<FileId> {
        if let Some(known) = self.id.get() {
            return Ok(*known);
        }
        let id = FileId::of(&self.file)?;
        Ok(*self.id.get_or_init(|| id))
    }

    /// Whether the descriptor it came from can write.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Its size now, in bytes.
    ///
    /// # Errors
    /// Those of fstat.
    pub fn size(&self) -> Result<u64> {
        Ok(u64::try_from(rustix::fs::fstat(&self.file)?.st_size).unwrap_or(0))
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// [`Fault`]: the file ends before. Bytes after its end but in its last page read as zero.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Fault> {
        let end = offset.saturating_add(buf.len() as u64);
        if let Some(region) = self.reaching(end)
            && let Some(mapped) = region.as_ref()
        {
            return mapped.read(offset, buf);
        }
        // A short one may still reach to the end of the last page, which only a mapping shows.
        if self.unmapped_reads.load(Ordering::Relaxed) < UNMAPPED_READS {
            self.unmapped_reads.fetch_add(1, Ordering::Relaxed);
            if rustix::io::pread(&self.file, &mut *buf, offset) == Ok(buf.len()) {
                return Ok(());
            }
        }
        if self
            .with_region(offset, buf.len(), |region| region.read(offset, buf))?
            .is_none()
        {
            self.unmapped(offset, buf.len(), |done, at| {
                rustix::io::pread(&self.file, &mut buf[done..], at)
            })?;
        }
        Ok(())
    }

    /// Writes `buf` at `offset`.
    ///
    /// # Errors
    /// [`Fault`]: the file ends before, or was not open for writing. The file never grows.
    pub fn write(&self, offset: u64, buf: &[u8]) -> Result<(), Fault> {
        if !self.writable {
            return Err(Fault { done: 0 });
        }
        if self
            .with_region(offset, buf.len(), |region| region.write(offset, buf))?
            .is_none()
        {
            self.unmapped(offset, buf.len(), |done, at| {
                rustix::io::pwrite(&self.file, &buf[done..], at)
            })?;
        }
        Ok(())
    }

    /// Reads one value with one instruction: atomic if `offset` is aligned.
    ///
    /// # Errors
    /// [`Fault`]: as [`SharedFile::read`], and where the file cannot be mapped.
    pub fn load<S: Scalar>(&self, offset: u64) -> Result<S, Fault> {
        self.with_region(offset, S::SIZE, |region| region.load(offset))?
            .ok_or(Fault { done: 0 })
    }

    /// Writes one value with one instruction: atomic if `offset` is aligned.
    ///
    /// # Errors
    /// [`Fault`]: as [`SharedFile::write`], and where the file cannot be mapped.
    pub fn store<S: Scalar>(&self, offset: u64, value: S) -> Result<(), Fault> {
        self.with_region(offset, S::SIZE, |region| region.store(offset, value))?
            .ok_or(Fault { done: 0 })
    }

    /// Runs `access` on the mapping if it reaches far enough, after growing it if need be; `None` if it
    /// cannot.
    fn with_region<T>(
        &self,
        offset: u64,
        len: usize,
        access: impl FnOnce(&Region) -> Result<T, Fault>,
    ) -> Result<Option<T>, Fault> {
        let end = offset.checked_add(len as u64).ok_or(Fault { done: 0 })?;
        let mut region = self.reaching(end);
        if region.is_none() {
            self.grow(end)?;
            region = self.reaching(end);
        }
        let mapped = region.as_ref().and_then(|region| region.as_ref());
        mapped.map(access).transpose()
    }

    /// The mapping, if it reaches so far as it is.
    fn reaching(&self, end: u64) -> Option<RwLockReadGuard<'_, Option<Region>>> {
        let region = self.region.read().unwrap_or_else(PoisonError::into_inner);
        let len = region.as_ref().map(|region| region.len() as u64);
        (end <= len?).then_some(region)
    }

    /// What it is mapped by. `block` is what fstat says; only a file of huge pages, or one that may
    /// have them (`mm/shmem.c`, `shmem_getattr`), has blocks larger than a page.
    fn unit(&self, block: u64) -> Result<Unit> {
        const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
        if let Some(unit) = self.unit.get() {
            return Ok(*unit);
        }
        let page = rustix::param::page_size() as u64;
        let mut unit = Unit {
            page,
            is_huge: false,
        };
        if block != page {
            let fs = rustix::fs::fstatfs(&self.file)?;
            if u64::try_from(fs.f_type) == Ok(HUGETLBFS_MAGIC) {
                let page = u64::try_from(fs.f_bsize).unwrap_or(0).max(1);
                unit = Unit {
                    page,
                    is_huge: true,
                };
            }
        }
        Ok(*self.unit.get_or_init(|| unit))
    }

    /// Maps the file as it is now if it reaches to `end`.
    fn grow(&self, end: u64) -> Result<(), Fault> {
        let mut region = self.region.write().unwrap_or_else(PoisonError::into_inner);
        let stat = rustix::fs::fstat(&self.file).map_err(|_| Fault { done: 0 })?;
        let block = u64::try_from(stat.st_blksize).unwrap_or(0);
        let unit = self.unit(block).map_err(|_| Fault { done: 0 })?;
        let size = u64::try_from(stat.st_size)
            .ok()
            .and_then(|size| size.checked_next_multiple_of(unit.page));
        let size = size.ok_or(Fault { done: 0 })?;
        if end > size {
            return Err(Fault { done: 0 });
        }
        let mapped = region.as_ref().map_or(0, |region| region.len() as u64);
        if end <= mapped || end > MAX_MAPPED || self.is_unmappable.load(Ordering::Relaxed) {
            return Ok(());
        }
        // A file that grows page by page is not mapped anew for each. Not so for hugetlb, where a
        // mapping past the end makes the file longer (`fs/hugetlbfs/inode.c`, `hugetlbfs_file_mmap`).
        let want = if unit.is_huge {
            size
        } else {
            size.max(mapped.saturating_mul(2))
        };
        let want = usize::try_from(want.min(MAX_MAPPED)).map_err(|_| Fault { done: 0 })?;
        match Region::map(&self.file, want, self.writable) {
            Ok(new) => *region = Some(new),
            Err(_) => self.is_unmappable.store(true, Ordering::Relaxed),
        }
        Ok(())
    }

    /// The same with system calls, for what is not mapped. `copy` moves bytes after the first `done`.
    fn unmapped(
        &self,
        offset: u64,
        len: usize,
        mut copy: impl FnMut(usize, u64) -> Result<usize>,
    ) -> Result<(), Fault> {
        let end = offset.checked_add(len as u64).ok_or(Fault { done: 0 })?;
        let mut done = 0;
        while done < len {
            // Writing past the end would make the file longer.
            if self.size().is_ok_and(|size| end > size) {
                return Err(Fault { done });
            }
            match copy(done, offset + done as u64) {
                Ok(0) => return Err(Fault { done }),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(_) => return Err(Fault { done }),
            }
        }
        Ok(())
    }
}
