//! A FUSE request's caller as the core sees one.

use crate::identify::identify;
use crate::shared::Shared;
use client_process::{Capability, FileId, Memory, Pid};
use rustix::io::Errno;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use vfio_core::caller::{Caller, FileObject};
use vfio_core::device::Opener;
use vfio_uapi::UserMemory;

/// The thread that waits for the answer to a request.
pub(crate) struct FuseCaller<'a> {
    pub(crate) thread: client_process::Caller,
    pub(crate) shared: &'a Shared,
}

impl FuseCaller<'_> {
    /// The caller of a request. `ESRCH` for a thread that we cannot see: one in a pid namespace
    /// that ours does not contain.
    pub(crate) fn new(tid: u32, shared: &Shared) -> Result<FuseCaller<'_>, Errno> {
        let tid = i32::try_from(tid).map_err(|_| Errno::SRCH)?;
        Ok(FuseCaller {
            thread: client_process::Caller::new(tid)?,
            shared,
        })
    }
}

impl FuseCaller<'_> {
    /// Which open file our duplicate of a client's descriptor is of.
    ///
    /// The duplicate is the client's open file: asking our own node through it tells which one that is,
    /// whoever copied the descriptor how. It is to be closed before the reply, and while it is open the
    /// file cannot be released, so the number cannot mean another.
    pub(crate) fn file_of(&self, duplicate: &OwnedFd) -> Result<FileObject, Errno> {
        // Compared without asking any server: the file may be of one that never answers.
        let id = FileId::of(duplicate).ok();
        let Some(id) = id.filter(|id| self.shared.is_our_mount(id.dev)) else {
            return Ok(FileObject::Other);
        };
        if let Some(group) = self.shared.open_group(id) {
            return Ok(group);
        }
        // SET_CONTAINER is served on the connection that it asks.
        self.shared.connection.hand_over()?;
        match identify(duplicate) {
            Ok(fh) => Ok(self.shared.files.get(fh).unwrap_or(FileObject::Other)),
            // A directory of ours, or a node whose connection has ended.
            Err(Errno::NOTTY | Errno::NOSYS | Errno::NOTCONN) => Ok(FileObject::Other),
            Err(errno) => Err(errno),
        }
    }
}

/// True when the numbers that a thread knows processes by are ours too.
pub(crate) fn shares_our_pids(tid: u32) -> bool {
    static OURS: LazyLock<Option<PathBuf>> = LazyLock::new(|| of("self"));
    fn of(who: &str) -> Option<PathBuf> {
        std::fs::read_link(format!("/proc/{who}/ns/pid")).ok()
    }
    OURS.is_some() && of(&tid.to_string()) == *OURS
}

/// Who opens a file, as well as it can be told.
pub(crate) fn opener(tid: u32, node: Option<FileId>) -> Opener {
    opener_known_by(tid, node, client_process::Caller::process)
}

/// The same, with another way to ask for the process and its name.
pub(crate) fn opener_known_by(
    tid: u32,
    node: Option<FileId>,
    process: impl FnOnce(client_process::Caller) -> Result<(Pid, OsString), Errno>,
) -> Opener {
    let process = i32::try_from(tid)
        .ok()
        .and_then(|tid| client_process::Caller::new(tid).ok())
        .and_then(|thread| process(thread).ok());
    let since = std::time::SystemTime::now();
    match process {
        Some((pid, comm)) => Opener {
            pid: pid.as_raw_nonzero().get().unsigned_abs(),
            comm: comm.to_string_lossy().into_owned(),
            since,
            node,
        },
        None => Opener {
            pid: 0,
            comm: String::new(),
            since,
            node,
        },
    }
}

impl UserMemory for FuseCaller<'_> {
    fn copy_in(&self, addr: u64, buf: &mut [u8]) -> Result<(), Errno> {
        self.thread.copy_in(addr, buf)
    }

    fn copy_out(&self, addr: u64, buf: &[u8]) -> Result<(), Errno> {
        self.thread.copy_out(addr, buf)
    }
}

impl Caller for FuseCaller<'_> {
    fn pid(&self) -> u32 {
        self.thread
            .tgid()
            .map_or(0, |pid| pid.as_raw_nonzero().get().unsigned_abs())
    }

    fn comm(&self) -> String {
        self.thread.identity().map_or_else(
            |_| String::new(),
            |id| id.comm.to_string_lossy().into_owned(),
        )
    }

    fn capable(&self, capability: Capability) -> bool {
        self.thread.capable(capability).unwrap_or(false)
    }

    fn get_fd(&self, fd: i32) -> Result<OwnedFd, Errno> {
        self.thread.get_fd(fd)
    }

    fn file(&self, fd: i32) -> Result<FileObject, Errno> {
        self.file_of(&self.thread.get_fd(fd)?)
    }

    fn memory(&self) -> Result<Arc<Memory>, Errno> {
        Memory::of(self.thread)
    }

    fn copy_in_known(&self, addr: u64, buf: &mut [u8]) -> Result<Option<Arc<Memory>>, Errno> {
        Memory::copy_in(self.thread, addr, buf)
    }
}
