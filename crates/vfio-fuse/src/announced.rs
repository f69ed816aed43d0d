//! Opens that say beforehand what the file is to be (`vfio_uapi::private::ANNOUNCE`).
//!
//! `VFIO_GROUP_GET_DEVICE_FD` is an open of the device's node and a command that makes the new file
//! one of the group. A supervisor does that for every call of its clients, so it leaves the command's
//! argument where the open itself finds it.
//!
//! Nothing that is announced is believed: a thread announces for groups alone whose files it has held,
//! and the name has to mean the device that is opened.

use crate::caller::{FuseCaller, opener_known_by, shares_our_pids};
use client_process::{FileId, Processes, Thread};
use dma_memory::{Fault, FileRegistry, SharedFile};
use rustix::io::Errno;
use std::collections::HashMap;
use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use vfio_core::caller::Caller as _;
use vfio_core::device::{DeviceFile, Opener};
use vfio_core::group::GroupFile;
use vfio_uapi::dialect::vfio;
use vfio_uapi::private::{Announce, Announcement, announcement};

/// So many threads are remembered, each by two descriptors. When there are more all are forgotten: who
/// still announces sees that its opens are plain, and comes again.
const THREADS: usize = 64;
/// So many group files a thread.
const GROUPS: usize = 64;

/// Threads that announce, by their numbers.
#[derive(Debug, Default)]
pub(crate) struct Announcers {
    threads: Mutex<HashMap<u32, Arc<Announcer>>>,
    last: AtomicU32,
}

/// Where a thread announces.
#[derive(Debug)]
struct Announcer {
    /// Held, so that another thread that has got the number is not taken for it.
    thread: Thread,
    memory: Arc<SharedFile>,
    /// The numbers that it knows processes by are ours.
    shares_pids: bool,
    /// Those for whom it opens.
    clients: Processes,
    groups: Mutex<Vec<(u32, Weak<GroupFile>)>>,
}

impl Announcers {
    fn threads(&self) -> MutexGuard<'_, HashMap<u32, Arc<Announcer>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, tid: u32) -> Option<Arc<Announcer>> {
        let announcer = Arc::clone(self.threads().get(&tid)?);
        if announcer.thread.is_running() {
            return Some(announcer);
        }
        self.threads().remove(&tid);
        None
    }

    /// `ANNOUNCE`.
    pub(crate) fn add(
        &self,
        group: &Arc<GroupFile>,
        caller: &FuseCaller<'_>,
        addr: u64,
    ) -> Result<u32, Errno> {
        let (announce, _) = vfio::read::<Announce, _>(caller, addr, Announce::MIN_SIZE)?;
        // A registry for itself: nobody else's file is ever taken for it.
        let memory = FileRegistry::without_devices().open(caller.get_fd(announce.memory_fd)?)?;
        let id = memory.id()?;
        if !memory.is_writable() {
            return Err(Errno::INVAL);
        }
        let tid = caller.thread.tid().as_raw_nonzero().get().unsigned_abs();
        let known = self.get(tid);
        let announcer = match known.filter(|known| known.memory.id() == Ok(id)) {
            Some(known) => known,
            None => {
                let thread = caller.thread.hold().map_err(|errno| match errno {
                    Errno::INVAL => Errno::OPNOTSUPP,
                    other => other,
                })?;
                let new = Arc::new(Announcer {
                    thread,
                    memory,
                    shares_pids: shares_our_pids(tid),
                    clients: Processes::default(),
                    groups: Mutex::default(),
                });
                let mut threads = self.threads();
                if threads.len() >= THREADS {
                    threads.clear();
                }
                threads.insert(tid, Arc::clone(&new));
                new
            }
        };
        // Positive as an ioctl's result.
        let number = self.last.fetch_add(1, Ordering::Relaxed) & 0x3fff_ffff;
        let mut groups = announcer.groups();
        groups.retain(|(_, group)| group.strong_count() > 0);
        if groups.len() >= GROUPS {
            groups.clear();
        }
        groups.push((number, Arc::downgrade(group)));
        Ok(number)
    }

    /// Forgets threads that are gone, and those whose groups are all closed: at rest nothing is kept.
    pub(crate) fn prune(&self) {
        let mut gone = Vec::new();
        self.threads().retain(|_, announcer| {
            announcer
                .groups()
                .retain(|(_, group)| group.strong_count() > 0);
            let keep = !announcer.groups().is_empty() && announcer.thread.is_running();
            if !keep {
                gone.push(Arc::clone(announcer));
            }
            keep
        });
        // Without the lock.
        drop(gone);
    }

    /// What a thread has announced for the open that it waits for.
    pub(crate) fn of(&self, tid: u32) -> Option<Announced> {
        let announcer = self.get(tid)?;
        let field = |offset: usize| announcer.memory.load::<u32>(offset as u64);
        if field(offset_of!(Announcement, state)) != Ok(announcement::ANNOUNCED) {
            return None;
        }
        let read = || {
            let mut name = [0; 64];
            let at = offset_of!(Announcement, name) as u64;
            announcer.memory.read(at, &mut name)?;
            Ok::<_, Fault>(Announced {
                group: announcer.group(field(offset_of!(Announcement, group))?),
                client: match field(offset_of!(Announcement, client_pid))? {
                    pid if pid != 0 && announcer.shares_pids => pid,
                    _ => tid,
                },
                name_len: field(offset_of!(Announcement, name_len))? as usize,
                name,
                announcer: Arc::clone(&announcer),
            })
        };
        read().ok()
    }
}

impl Announcer {
    fn groups(&self) -> MutexGuard<'_, Vec<(u32, Weak<GroupFile>)>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn group(&self, id: u32) -> Option<Arc<GroupFile>> {
        let groups = self.groups();
        groups.iter().find(|(one, _)| *one == id)?.1.upgrade()
    }
}

/// An open that is to become a file of a group.
pub(crate) struct Announced {
    group: Option<Arc<GroupFile>>,
    /// Who the file is for, as a thread's number. For messages alone: a number that we do not know as
    /// the caller does is worth nothing.
    client: u32,
    name: [u8; 64],
    name_len: usize,
    announcer: Arc<Announcer>,
}

impl Announced {
    /// Who will use the file.
    pub(crate) fn opener(&self, node: Option<FileId>) -> Opener {
        opener_known_by(self.client, node, |thread| {
            self.announcer.clients.of(thread)
        })
    }

    /// Makes a new file what was announced. On error it is to be closed.
    ///
    /// Errors of `OPEN_DEVICE`; but `ESTALE`, from which the kernel would conclude that its walk to
    /// the node is to be repeated (`fs/namei.c`, `do_filp_open`), is `ENODEV`.
    pub(crate) fn honour(&self, file: &DeviceFile, user: Opener) -> Result<(), Errno> {
        let name = self.name.get(..self.name_len).ok_or(Errno::INVAL)?;
        let group = self.group.as_ref().ok_or(Errno::BADF)?;
        let done = file.open_by_group(group, name, user);
        done.map_err(|errno| match errno {
            Errno::STALE => Errno::NODEV,
            other => other,
        })?;
        let state = offset_of!(Announcement, state) as u64;
        let stored = self.announcer.memory.store(state, announcement::HONOURED);
        stored.map_err(|_| Errno::FAULT)
    }
}
