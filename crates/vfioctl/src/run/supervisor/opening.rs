//! VFIO_GROUP_GET_DEVICE_FD: a device's node is opened here, made a file of the group, and given to
//! the client.

use super::calls::{Supervisor, Thread, descriptor};
use super::kvm::Outcome;
use super::nodes::Nodes;
use super::sys;
use super::task::{FileId, string};
use client_process::Caller;
use dma_memory::{FileRegistry, SharedFile};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use seccomp_notify::Notification;
use std::ffi::{CStr, CString};
use std::mem::offset_of;
use std::sync::Arc;
use vfio_uapi::private::{Announcement, announcement};
use zerocopy::IntoBytes;

/// How often a device is looked for whose name means another each time.
const TRIES: usize = 8;

const STATE: u64 = offset_of!(Announcement, state) as u64;

/// What is to be opened.
struct Wanted {
    group: OwnedFd,
    name: CString,
    /// For messages; the daemon finds its process itself.
    client: u32,
}

impl Supervisor {
    pub(super) fn get_device_fd(
        &self,
        caller: Caller,
        call: &Notification,
        thread: &mut Thread,
    ) -> Result<Outcome, Errno> {
        let fd = descriptor(call);
        let tables = &mut thread.tables;
        if let Some(group) = tables.group_again(call.tid, fd) {
            let wanted = self.wanted(caller, call, group)?;
            if let Some(device) = wanted.open_known(&self.nodes, &mut thread.note) {
                tables.note_group(caller, fd);
                return self.give(call, wanted, device);
            }
        }
        let group = match self.nodes.get(caller, fd) {
            Ok(group) => group,
            // Another file by now.
            Err(Errno::NOTTY) => return Ok(Outcome::LetThrough),
            Err(errno) => return Err(errno),
        };
        let wanted = self.wanted(caller, call, group)?;
        let device = wanted.open(&self.nodes)?;
        tables.note_group(caller, fd);
        self.give(call, wanted, device)
    }

    /// What a call asks for, of the open file that it is made on.
    fn wanted(&self, caller: Caller, call: &Notification, group: OwnedFd) -> Result<Wanted, Errno> {
        let [_, _, name, ..] = call.args;
        let name = string(caller, name).map_err(|errno| match errno {
            // `strndup_user` of `VFIO_GROUP_GET_DEVICE_FD`.
            Errno::NAMETOOLONG => Errno::INVAL,
            other => other,
        })?;
        self.check(call)?;
        Ok(Wanted {
            group,
            name: CString::new(name).map_err(|_| Errno::INVAL)?,
            client: call.tid.cast_unsigned(),
        })
    }

    fn give(&self, call: &Notification, wanted: Wanted, device: OwnedFd) -> Result<Outcome, Errno> {
        // The client may close its own as soon as it has an answer.
        drop(wanted);
        // Answered with it. If not, the file is closed here and nobody has it.
        self.listener.result_fd(call.id, &device, true)?;
        Ok(Outcome::Answered)
    }
}

/// Where a thread of ours says what its next open is to be.
#[derive(Default)]
pub(super) struct Note {
    memory: Option<Memory>,
    /// Groups by their nodes, and the daemon's numbers for them.
    groups: Vec<(u64, u32)>,
}

/// Memory that the daemon sees.
struct Memory {
    file: OwnedFd,
    mapped: Arc<SharedFile>,
}

impl Memory {
    fn new() -> Option<Memory> {
        let file = memfd_create("vfioctl run", MemfdFlags::CLOEXEC).ok()?;
        rustix::fs::ftruncate(&file, size_of::<Announcement>() as u64).ok()?;
        let copy = file.try_clone().ok()?;
        let mapped = FileRegistry::new().open(copy).ok()?;
        Some(Memory { file, mapped })
    }
}

impl Note {
    /// Says that the next open of this thread is to be a file of the group `group`, whose node is
    /// `ino`. `None` if that cannot be said.
    fn announce(&mut self, wanted: &Wanted, ino: u64) -> Option<()> {
        let name = wanted.name.to_bytes();
        let mut announcement = Announcement {
            state: announcement::NONE,
            group: self.number(wanted.group.as_fd(), ino)?,
            client_pid: wanted.client,
            name_len: u32::try_from(name.len()).ok()?,
            name: [0; 64],
        };
        announcement
            .name
            .get_mut(..name.len())?
            .copy_from_slice(name);
        let memory = &self.memory.as_ref()?.mapped;
        memory.write(0, announcement.as_bytes()).ok()?;
        memory.store(STATE, announcement::ANNOUNCED).ok()
    }

    /// The daemon's number for a group.
    fn number(&mut self, group: BorrowedFd<'_>, ino: u64) -> Option<u32> {
        /// More than are in use at the same time.
        const MANY: usize = 64;
        if let Some((_, number)) = self.groups.iter().find(|(node, _)| *node == ino) {
            return Some(*number);
        }
        if self.memory.is_none() {
            self.memory = Memory::new();
        }
        let number = sys::announce(group, self.memory.as_ref()?.file.as_fd()).ok()?;
        if self.groups.len() >= MANY {
            self.groups.clear();
        }
        self.groups.push((ino, number));
        Some(number)
    }

    /// Takes back what was announced. True if it was honoured.
    fn end(&mut self) -> bool {
        let Some(memory) = &self.memory else {
            return false;
        };
        let honoured = memory.mapped.load::<u32>(STATE) == Ok(announcement::HONOURED);
        let _ = memory.mapped.store(STATE, announcement::NONE);
        if !honoured {
            // The group has been opened anew, or the daemon has forgotten this thread.
            self.groups.clear();
        }
        honoured
    }
}

impl Wanted {
    /// By one request, if it is known which device the name means and where its node is. `None` for
    /// whatever is in the way: then nothing has been opened.
    fn open_known(&self, nodes: &Nodes, note: &mut Note) -> Option<OwnedFd> {
        let index = nodes.guess(&self.name)?;
        let group = self.group.as_fd();
        // A group is open once at a time: its node tells which open file it is, and the daemon whether
        // that is still the one.
        let FileId { dev, ino } = FileId::at(group, "").ok()?;
        if !nodes.is_tree(dev) {
            return None;
        }
        note.announce(self, ino)?;
        let device = nodes.open_again(index);
        let honoured = note.end();
        let device = device.ok()?;
        if !honoured {
            // Another daemon, or one that has forgotten this thread.
            sys::open_device(device.as_fd(), group, self.client, &self.name).ok()?;
        }
        Some(device)
    }

    /// By a request for each step.
    fn open(&self, nodes: &Nodes) -> Result<OwnedFd, Errno> {
        let group = self.group.as_fd();
        let name: &CStr = &self.name;
        for _ in 0..TRIES {
            let index = sys::find_device(group, name)?;
            let opened = nodes.open_device(index).and_then(|device| {
                sys::open_device(device.as_fd(), group, self.client, name).map(|()| device)
            });
            match opened {
                Ok(device) => {
                    nodes.remember(name, index);
                    return Ok(device);
                }
                // It went meanwhile, and the name may mean another.
                Err(Errno::NOENT | Errno::NODEV | Errno::NXIO | Errno::STALE) => {}
                Err(errno) => return Err(errno),
            }
        }
        Err(Errno::NODEV)
    }
}
