//! A client's address space, for as long as DMA needs it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::LazyLock;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::Weak;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use rustix::fd::AsRawFd;
use rustix::fd::OwnedFd;
use rustix::fs::AtFlags;
use rustix::fs::MemfdFlags;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::fs::StatxFlags;
use rustix::io::Errno;
use rustix::process::Pid;

use crate::Caller;
use crate::Result;
use crate::caller::is_running;
use crate::holders::FileId;
use crate::maps::Mapping;
use crate::proc;
use crate::sys;

/// A client's address space (the kernel's `mm_struct`), whatever becomes of the process.
///
/// It is made of an open `/proc/TID/mem` and `/proc/TID/maps`. Both belong to the address space that the
/// process had when they were opened: once that is gone, by exec or exit, every access is
/// [`Errno::FAULT`], and no other program's memory is ever reached. A child made by fork is another
/// address space and is not followed, as the kernel's pinned pages do not follow it either.
///
/// Three descriptors per address space, however many mappings refer to it: see [`Memory::of`].
#[derive(Debug)]
pub struct Memory {
    mem: OwnedFd,
    maps: OwnedFd,
    tgid: Pid,
    key: Fingerprint,
    /// Where the client has the bytes of `key.random`.
    at_random: Option<u64>,
    /// The thread that asked last, held so that its number stays its own.
    last: Mutex<Option<(Pid, OwnedFd)>>,
    /// Cleared when the kernel turns out to lack PROCMAP_QUERY (before 6.11).
    can_query: AtomicBool,
}

/// What tells one address space of a process from the next: the process, and what the kernel put on the
/// stack at exec. `random` is 16 random bytes that the client could overwrite, but only in its own memory.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Fingerprint {
    start_ticks: u64,
    auxv: Vec<u8>,
    random: Option<[u8; 16]>,
}

/// By process, and by thread that asked last.
static CACHE: LazyLock<Mutex<HashMap<Pid, Weak<Memory>>>> = LazyLock::new(Mutex::default);
static THREADS: LazyLock<Mutex<HashMap<Pid, Weak<Memory>>>> = LazyLock::new(Mutex::default);

impl Memory {
    /// The address space of a thread that is blocked in a request to us.
    ///
    /// As long as somebody keeps the result, the same is returned for further requests from the same
    /// address space, so that a client's mappings share it. For the thread that asked last that takes
    /// two system calls; see also [`Memory::copy_in`].
    ///
    /// # Errors
    /// [`Errno::FAULT`]: the caller is gone or execs at this moment. [`Errno::PERM`] or
    /// [`Errno::ACCESS`]: we may not look into it. [`Errno::MFILE`]: no descriptor left.
    pub fn of(caller: Caller) -> Result<Arc<Self>> {
        if let Some(last) = Self::of_last(caller)
            && let Some((addr, random)) = last.mark()
        {
            let mut now = [0; 16];
            if caller.copy_in(addr, &mut now).is_ok() && now == random && last.is_last(caller) {
                return Ok(last);
            }
        }
        let memory = Self::of_process(caller)?;
        // Before Linux 6.9 some threads cannot be held; they are asked all again each time.
        if let Ok(pidfd) = caller.pidfd() {
            let before = lock(&memory.last).replace((caller.tid(), pidfd));
            let mut threads = lock(&THREADS);
            if let Some((tid, _)) = before {
                threads.remove(&tid);
            }
            if threads.len() >= 64 && threads.len().is_power_of_two() {
                threads.retain(|_, memory| memory.strong_count() > 0);
            }
            threads.insert(caller.tid(), Arc::downgrade(&memory));
        }
        Ok(memory)
    }

    /// [`Caller::copy_in`], which for the thread that asked last tells at the same time what
    /// [`Memory::of`] would: the address space that `buf` was filled from. `None` says nothing.
    ///
    /// # Errors
    /// Those of [`Caller::copy_in`].
    pub fn copy_in(caller: Caller, addr: u64, buf: &mut [u8]) -> Result<Option<Arc<Self>>> {
        if let Some(last) = Self::of_last(caller)
            && let Some((mark, random)) = last.mark()
        {
            let mut now = [0; 16];
            if caller.copy_in_both((addr, buf), (mark, &mut now)) {
                return Ok((now == random && last.is_last(caller)).then_some(last));
            }
        }
        caller.copy_in(addr, buf).map(|()| None)
    }

    /// The address space of a thread of this number that has asked before.
    fn of_last(caller: Caller) -> Option<Arc<Self>> {
        lock(&THREADS).get(&caller.tid()).and_then(Weak::upgrade)
    }

    /// What the kernel has put into this address space at exec, and where. Another program of the
    /// same thread has other bytes there.
    fn mark(&self) -> Option<(u64, [u8; 16])> {
        self.at_random.zip(self.key.random)
    }

    /// Whether the caller is the thread that asked last. It exists still, and so its number was no
    /// other's before. Asked after the number was used: a child made by fork has the same
    /// [`mark`](Self::mark), and could have the same number once the thread is gone.
    fn is_last(&self, caller: Caller) -> bool {
        let last = lock(&self.last);
        last.as_ref()
            .is_some_and(|(tid, pidfd)| *tid == caller.tid() && is_running(pidfd))
    }

    fn of_process(caller: Caller) -> Result<Arc<Self>> {
        let tgid = caller.tgid().map_err(vanished)?;
        let key = Fingerprint::of(caller, tgid)?;
        let known = lock(&CACHE).get(&tgid).and_then(Weak::upgrade);
        if let Some(known) = known
            && known.key.same_start(&key)
            && known.key.random_now(&known) == key.random
            && known.is_alive()
        {
            return Ok(known);
        }
        let made = Arc::new(Self::open(caller, tgid, key)?);
        let mut cache = lock(&CACHE);
        if cache.len() >= 64 && cache.len().is_power_of_two() {
            cache.retain(|_, memory| memory.strong_count() > 0);
        }
        cache.insert(tgid, Arc::downgrade(&made));
        Ok(made)
    }

    fn open(caller: Caller, tgid: Pid, key: Fingerprint) -> Result<Self> {
        let open = |file: &str, flags: OFlags| {
            rustix::fs::open(
                proc::path(caller.tid(), file),
                flags | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .map_err(vanished)
        };
        let memory = Self {
            mem: open("mem", OFlags::RDWR)?,
            maps: open("maps", OFlags::RDONLY)?,
            tgid,
            can_query: AtomicBool::new(true),
            at_random: at_random(&key.auxv),
            last: Mutex::new(None),
            key,
        };
        // Both opens saw one address space if nothing was executed from before them to after them.
        if Fingerprint::of(caller, tgid)? != memory.key || !memory.is_alive() {
            return Err(Errno::FAULT);
        }
        Ok(memory)
    }

    /// The process it was made from. The number may be another process's after that one is gone.
    #[must_use]
    pub fn tgid(&self) -> Pid {
        self.tgid
    }

    /// Whether the address space still exists.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        match self.query_kernel(0) {
            Ok(_) | Err(Errno::NOENT) => true,
            Err(Errno::SRCH) => false,
            // Without PROCMAP_QUERY: the list of a dead address space is empty.
            Err(_) => rustix::io::pread(&self.maps, &mut [0_u8; 16][..], 0).is_ok_and(|n| n > 0),
        }
    }

    /// Fills `buf` from `addr`.
    ///
    /// # Errors
    /// [`Errno::FAULT`]: not mapped, wraps, or the address space is gone; `buf` may be partly filled.
    /// Memory that is mapped without PROT_READ is read all the same: permission is looked at when the
    /// kernel pins, and the client can give it to itself.
    pub fn read(&self, addr: u64, buf: &mut [u8]) -> Result<()> {
        end_of(addr, buf.len())?;
        let mut done = 0_usize;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match rustix::io::pread(&self.mem, rest, addr.wrapping_add(done as u64)) {
                // The address space is gone, or nothing is mapped.
                Ok(0) => return Err(Errno::FAULT),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(unreadable(errno)),
            }
        }
        Ok(())
    }

    /// Writes `buf` to `addr`, if all of it is mapped with PROT_WRITE.
    ///
    /// `/proc/PID/mem` alone would write private read-only pages too (FOLL_FORCE in `mem_rw`), hence the
    /// look at the mappings first. A client that takes the permission away in between harms only itself:
    /// the kernel never forces a write into a shared mapping.
    ///
    /// # Errors
    /// [`Errno::FAULT`]: not mapped, not writable, wraps, or the address space is gone. If part of the
    /// range is not writable, nothing was written.
    pub fn write(&self, addr: u64, buf: &[u8]) -> Result<()> {
        let end = end_of(addr, buf.len())?;
        let mut at = addr;
        while at < end {
            let mapping = self.query(at)?;
            if !mapping.writable {
                return Err(Errno::FAULT);
            }
            at = mapping.end;
        }
        self.write_checked(addr, buf)
    }

    /// [`Memory::write`] for a range that the caller has just seen to be writable with
    /// [`Memory::query`].
    ///
    /// # Errors
    /// [`Errno::FAULT`]: not mapped, wraps, or the address space is gone; part may have been written.
    pub fn write_checked(&self, addr: u64, buf: &[u8]) -> Result<()> {
        end_of(addr, buf.len())?;
        let mut done = 0_usize;
        while let Some(rest) = buf.get(done..).filter(|rest| !rest.is_empty()) {
            match rustix::io::pwrite(&self.mem, rest, addr.wrapping_add(done as u64)) {
                Ok(0) => return Err(Errno::FAULT),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(unreadable(errno)),
            }
        }
        Ok(())
    }

    /// The mapping that covers `addr`, as it is now.
    ///
    /// # Errors
    /// [`Errno::FAULT`]: nothing is mapped there, or the address space is gone.
    pub fn query(&self, addr: u64) -> Result<Mapping> {
        match self.query_kernel(addr) {
            Ok(mapping) => Ok(mapping),
            Err(Errno::NOENT | Errno::SRCH) => Err(Errno::FAULT),
            Err(Errno::NOTTY) => self.query_text(addr),
            Err(errno) => Err(errno),
        }
    }

    /// Whether [`Memory::query`] is a single call to the kernel (PROCMAP_QUERY, Linux 6.11) and so cheap
    /// enough for every access.
    #[must_use]
    pub fn query_is_cheap(&self) -> bool {
        // Known since the first query, which making a `Memory` asks.
        self.can_query.load(Ordering::Relaxed)
    }

    fn query_kernel(&self, addr: u64) -> Result<Mapping> {
        if !self.can_query.load(Ordering::Relaxed) {
            return Err(Errno::NOTTY);
        }
        match sys::procmap_query(&self.maps, addr) {
            Ok(query) => Ok(Mapping::from_query(&query)),
            Err(Errno::NOTTY | Errno::INVAL) => {
                self.can_query.store(false, Ordering::Relaxed);
                Err(Errno::NOTTY)
            }
            Err(errno) => Err(errno),
        }
    }

    fn query_text(&self, addr: u64) -> Result<Mapping> {
        let mut text = Vec::new();
        let mut page = vec![0_u8; 16384];
        loop {
            match rustix::io::pread(&self.maps, &mut page[..], text.len() as u64) {
                Ok(0) => break,
                Ok(n) => text.extend_from_slice(page.get(..n).unwrap_or_default()),
                Err(Errno::INTR) => {}
                Err(_) => return Err(Errno::FAULT),
            }
        }
        text.split(|b| *b == b'\n')
            .filter_map(Mapping::parse)
            .map(|(mapping, _)| mapping)
            .find(|mapping| (mapping.start..mapping.end).contains(&addr))
            .ok_or(Errno::FAULT)
    }

    /// Opens the file behind a shared mapping of memory (memfd, tmpfs, shared anonymous, System V,
    /// hugetlb), for reading and, if the mapping is writable, for writing.
    ///
    /// Needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN in the initial user namespace
    /// (`fs/proc/base.c`, `proc_map_files_get_link`). Opens nothing but memory: opening a FUSE file here
    /// would wait for its server, which may be us.
    ///
    /// # Errors
    /// [`Errno::INVAL`]: private, or not memory. [`Errno::PERM`]: not allowed to us. [`Errno::NOENT`]: the
    /// mapping has changed since it was asked for. In each case copying still works.
    pub fn open_mapping(&self, mapping: &Mapping) -> Result<OwnedFd> {
        if !mapping.shared || mapping.file.ino == 0 {
            return Err(Errno::INVAL);
        }
        let name = format!("map_files/{:x}-{:x}", mapping.start, mapping.end);
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let path = rustix::fs::open(proc::path(self.tgid, &name), flags, Mode::empty())?;
        // From here on the inode, and with it the device number, cannot become another's.
        if FileId::of(&path)? != mapping.file {
            return Err(Errno::NOENT);
        }
        if !is_memory(mapping.file.dev, self.tgid) {
            return Err(Errno::INVAL);
        }
        let mode = if mapping.writable {
            OFlags::RDWR
        } else {
            OFlags::RDONLY
        };
        let again = format!("/proc/self/fd/{}", path.as_raw_fd());
        let file = rustix::fs::open(
            again,
            mode | OFlags::CLOEXEC | OFlags::NONBLOCK,
            Mode::empty(),
        )?;
        // Only shmem and hugetlbfs answer (`mm/memfd.c`, `memfd_file_seals_ptr`).
        rustix::fs::fcntl_get_seals(&file)?;
        Ok(file)
    }
}

impl Fingerprint {
    fn of(caller: Caller, tgid: Pid) -> Result<Self> {
        let auxv = proc::read(caller.tid(), "auxv").map_err(vanished)?;
        let random = at_random(&auxv).and_then(|addr| {
            let mut bytes = [0; 16];
            caller.copy_in(addr, &mut bytes).ok().map(|()| bytes)
        });
        Ok(Self {
            start_ticks: proc::stat(tgid).map_err(vanished)?.start_ticks,
            auxv,
            random,
        })
    }

    fn same_start(&self, other: &Self) -> bool {
        self.start_ticks == other.start_ticks && self.auxv == other.auxv
    }

    fn random_now(&self, memory: &Memory) -> Option<[u8; 16]> {
        let mut bytes = [0; 16];
        memory
            .read(at_random(&self.auxv)?, &mut bytes)
            .ok()
            .map(|()| bytes)
    }
}

/// The address that AT_RANDOM gives, from the pairs of words in `/proc/PID/auxv`.
fn at_random(auxv: &[u8]) -> Option<u64> {
    const AT_RANDOM: u64 = 25;
    let words: Vec<u64> = auxv
        .chunks_exact(8)
        .filter_map(|w| w.try_into().ok().map(u64::from_ne_bytes))
        .collect();
    words.chunks_exact(2).find_map(|pair| match pair {
        [AT_RANDOM, value] => Some(*value),
        _ => None,
    })
}

/// Whether a file system is memory, by its device number and without asking the file system.
fn is_memory(dev: u64, tgid: Pid) -> bool {
    /// The kernel's own mounts behind memfd, shared anonymous memory and System V shared memory.
    static INTERNAL: LazyLock<Vec<u64>> = LazyLock::new(|| {
        let mut flags = vec![MemfdFlags::CLOEXEC];
        for entry in std::fs::read_dir("/sys/kernel/mm/hugepages")
            .into_iter()
            .flatten()
            .flatten()
        {
            let size = entry.file_name().to_str().and_then(|name| {
                name.strip_prefix("hugepages-")?
                    .strip_suffix("kB")?
                    .parse::<u64>()
                    .ok()
            });
            if let Some(bytes) = size.and_then(|kib| kib.checked_mul(1024)) {
                let log = bytes.checked_ilog2().unwrap_or_default() << libc::MFD_HUGE_SHIFT;
                flags.push(
                    MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::from_bits_retain(log),
                );
            }
        }
        let dev = |flags| {
            FileId::of(&rustix::fs::memfd_create("probe", flags).ok()?)
                .ok()
                .map(|id| id.dev)
        };
        flags.into_iter().filter_map(dev).collect()
    });
    if INTERNAL.contains(&dev) {
        return true;
    }
    let want = format!("{}:{}", rustix::fs::major(dev), rustix::fs::minor(dev));
    let me = rustix::process::getpid();
    [tgid, me].into_iter().any(|pid| {
        let mounts = proc::read(pid, "mountinfo").unwrap_or_default();
        String::from_utf8_lossy(&mounts).lines().any(|line| {
            let kind = line
                .split_once(" - ")
                .and_then(|(_, tail)| tail.split(' ').next());
            line.split(' ').nth(2) == Some(&*want)
                && matches!(kind, Some("tmpfs" | "hugetlbfs" | "devtmpfs"))
        })
    })
}

impl FileId {
    /// The identity of an open file, without asking its file system's server.
    ///
    /// # Errors
    /// Those of statx.
    pub fn of(fd: impl rustix::fd::AsFd) -> Result<Self> {
        Self::statx(fd, "", AtFlags::EMPTY_PATH)
    }

    pub(crate) fn statx(dir: impl rustix::fd::AsFd, path: &str, flags: AtFlags) -> Result<Self> {
        let flags = flags | AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
        let stat = rustix::fs::statx(dir, path, flags, StatxFlags::INO)?;
        Ok(Self {
            dev: rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor),
            ino: stat.stx_ino,
        })
    }
}

fn end_of(addr: u64, len: usize) -> Result<u64> {
    addr.checked_add(len as u64).ok_or(Errno::FAULT)
}

/// A client that is gone cannot be copied from.
fn vanished(errno: Errno) -> Errno {
    if matches!(errno, Errno::SRCH | Errno::NOENT) {
        Errno::FAULT
    } else {
        errno
    }
}

/// `/proc/PID/mem` says EIO where there is nothing to read.
fn unreadable(errno: Errno) -> Errno {
    if matches!(errno, Errno::NOMEM) {
        errno
    } else {
        Errno::FAULT
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_of_maps_says_the_same_as_the_query() {
        let me = Caller::new(rustix::process::getpid().as_raw_nonzero().get()).unwrap();
        let memory = Memory::of(me).unwrap();
        assert!(memory.is_alive());
        for addr in [
            &raw const memory as u64,
            memory.key.auxv.as_ptr() as u64,
            lock::<u8> as *const () as u64,
        ] {
            let text = memory.query_text(addr).unwrap();
            match memory.query_kernel(addr) {
                Ok(query) => assert_eq!(query, text),
                Err(errno) => assert_eq!(errno, Errno::NOTTY),
            }
        }
        assert_eq!(memory.query_text(0), Err(Errno::FAULT));
        memory.can_query.store(false, Ordering::Relaxed);
        assert!(memory.is_alive() && !memory.query_is_cheap());
        assert_eq!(memory.query(0), Err(Errno::FAULT));
    }
}
