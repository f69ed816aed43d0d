//! Memory of a device that clients map.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use client_process::FileId;
use rustix::fd::AsFd;
use rustix::fd::AsRawFd;
use rustix::fd::BorrowedFd;
use rustix::fd::OwnedFd;
use rustix::fs::MemfdFlags;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::fs::SealFlags;
use rustix::io::Errno;

use crate::Result;
use crate::fault::Fault;
use crate::fault::Scalar;
use crate::peer::PeerFile;
use crate::region::Region;
use crate::sys;

/// A device's memory: a file in memory that the device and its clients use at the same time.
///
/// One descriptor and one mapping. The device's side is the methods here; a client maps
/// [`DeviceMemory::backing_fd`], through a FUSE passthrough file or by being given the descriptor.
#[derive(Debug)]
pub struct DeviceMemory {
    file: OwnedFd,
    region: Region,
    is_revoked: AtomicBool,
    /// What mappings of it show as their file.
    names: Mutex<Vec<PeerFile>>,
    /// Held while asking for other openers.
    probing: Mutex<()>,
}

/// Shows in `/proc/PID/maps` as "/memfd:vfio".
const NAME: &str = "vfio";

impl DeviceMemory {
    /// `size` bytes of zeros, rounded up to whole pages.
    ///
    /// Nobody can add seals, so nobody can keep us from truncating. For clients that get the descriptor
    /// itself see [`DeviceMemory::create_sealed`].
    ///
    /// # Errors
    /// [`Errno::INVAL`]: `size` is 0 or absurd. [`Errno::MFILE`], [`Errno::NOMEM`].
    pub fn create(size: u64) -> Result<Self> {
        Self::make(size, SealFlags::SEAL)
    }

    /// As [`DeviceMemory::create`], and the file can never grow: not by a client that holds the
    /// descriptor, and not by [`DeviceMemory::restore`], which then fails.
    ///
    /// # Errors
    /// As [`DeviceMemory::create`].
    pub fn create_sealed(size: u64) -> Result<Self> {
        Self::make(size, SealFlags::SEAL | SealFlags::GROW)
    }

    fn make(size: u64, seals: SealFlags) -> Result<Self> {
        let size = size
            .checked_next_multiple_of(rustix::param::page_size() as u64)
            .ok_or(Errno::INVAL)?;
        let len = usize::try_from(size)
            .ok()
            .filter(|len| (1..=isize::MAX as usize).contains(len))
            .ok_or(Errno::INVAL)?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let made = match rustix::fs::memfd_create(NAME, flags | MemfdFlags::NOEXEC_SEAL) {
            // Before Linux 6.3.
            Err(Errno::INVAL) => rustix::fs::memfd_create(NAME, flags)?,
            other => other?,
        };
        rustix::fs::ftruncate(&made, size)?;
        rustix::fs::fcntl_add_seals(&made, seals)?;
        // A memfd's first descriptor is not counted as a writer (`alloc_file_pseudo` takes no write
        // access), so a lease on it always conflicts with itself. One that was opened is counted.
        let path = format!("/proc/self/fd/{}", made.as_raw_fd());
        let file = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        let region = Region::map(&file, len, true)?;
        Ok(Self {
            region,
            is_revoked: AtomicBool::new(false),
            names: Mutex::new(vec![PeerFile::new(FileId::of(&file)?)]),
            probing: Mutex::new(()),
            file,
        })
    }

    /// Mappings of this file show it, too: a node that is backed by it
    /// (`/proc/PID/maps` tells either, depending on the kernel).
    pub fn known_as(&self, file: FileId) {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        if names.iter().all(|name| name.id() != file) {
            names.push(PeerFile::new(file));
        }
    }

    /// Bytes, whole pages. The same after [`DeviceMemory::revoke`].
    #[must_use]
    pub fn size(&self) -> u64 {
        self.region.len() as u64
    }

    /// The file that clients map. Offsets in it are offsets here.
    #[must_use]
    pub fn backing_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The file opened once more, for a client that gets the descriptor itself: it counts as another
    /// opener for as long as it, or a mapping made from it, exists.
    ///
    /// # Errors
    /// [`Errno::NODEV`]: revoked. [`Errno::MFILE`].
    pub fn reopen(&self, writable: bool) -> Result<OwnedFd> {
        if self.is_revoked() {
            return Err(Errno::NODEV);
        }
        let mode = if writable {
            OFlags::RDWR
        } else {
            OFlags::RDONLY
        };
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        rustix::fs::open(path, mode | OFlags::CLOEXEC, Mode::empty())
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// [`Errno::NODEV`]: revoked. [`Errno::FAULT`]: past the end.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.outcome(self.region.read(offset, buf))
    }

    /// Writes `buf` at `offset`.
    ///
    /// # Errors
    /// As [`DeviceMemory::read`].
    pub fn write(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.outcome(self.region.write(offset, buf))
    }

    /// Reads one value with one instruction: atomic if `offset` is aligned.
    ///
    /// # Errors
    /// As [`DeviceMemory::read`].
    pub fn load<S: Scalar>(&self, offset: u64) -> Result<S> {
        self.outcome(self.region.load(offset))
    }

    /// Writes one value with one instruction: atomic if `offset` is aligned.
    ///
    /// # Errors
    /// As [`DeviceMemory::read`].
    pub fn store<S: Scalar>(&self, offset: u64, value: S) -> Result<()> {
        self.outcome(self.region.store(offset, value))
    }

    /// A fault is the revocation that the access ran into, or a wrong offset.
    fn outcome<T>(&self, result: Result<T, Fault>) -> Result<T> {
        match result {
            _ if self.is_revoked() => Err(Errno::NODEV),
            Ok(value) => Ok(value),
            Err(_) => Err(Errno::FAULT),
        }
    }

    /// Takes the memory away from everybody who maps it (`unmap_mapping_range` of vfio-pci): from the
    /// return on a client's access is SIGBUS and ours is [`Errno::NODEV`]. The contents are gone and the
    /// pages are free. Nobody can prevent it.
    pub fn revoke(&self) {
        self.is_revoked.store(true, Ordering::SeqCst);
        // Shrinking a file in memory fails only for a seal, and nobody can add one.
        let _ = rustix::fs::ftruncate(&self.file, 0);
    }

    /// Gives the memory back, zeroed: mappings that clients still have work again.
    ///
    /// # Errors
    /// [`Errno::PERM`]: made by [`DeviceMemory::create_sealed`].
    pub fn restore(&self) -> Result<()> {
        rustix::fs::ftruncate(&self.file, self.size())?;
        self.is_revoked.store(false, Ordering::SeqCst);
        Ok(())
    }

    /// Whether it is revoked.
    #[must_use]
    pub fn is_revoked(&self) -> bool {
        self.is_revoked.load(Ordering::SeqCst)
    }

    /// Whether somebody else still has this file open or mapped. A mapping keeps the open file that it was
    /// made from, so one that outlives its descriptor counts, and so does a passthrough mapping of a FUSE
    /// file, which has an open file of its own. Our own mapping and descriptors made from
    /// [`DeviceMemory::backing_fd`] by dup or by registering it for passthrough do not count.
    ///
    /// The answer comes from taking a write lease and giving it back. An open of the file that falls
    /// exactly in between waits for that moment; one with O_NONBLOCK would fail with EWOULDBLOCK. So do
    /// not ask while answering an open of the same device.
    ///
    /// False also where leases cannot be had; [`DeviceMemory::probe_openers`] tells the difference.
    #[must_use]
    pub fn has_other_openers(&self) -> bool {
        self.probe_openers().unwrap_or(false)
    }

    /// [`DeviceMemory::has_other_openers`], with the reason if it cannot be told.
    ///
    /// # Errors
    /// [`Errno::ACCESS`]: neither owner of the file nor CAP_LEASE. [`Errno::INVAL`]: leases are off.
    pub fn probe_openers(&self) -> Result<bool> {
        let _one_at_a_time = self.probing.lock().unwrap_or_else(PoisonError::into_inner);
        match sys::try_lease(self.file.as_fd()) {
            Ok(()) => Ok(false),
            Err(Errno::AGAIN) => Ok(true),
            Err(errno) => Err(errno),
        }
    }
}
