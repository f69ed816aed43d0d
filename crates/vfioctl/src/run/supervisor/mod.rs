//! The supervisor of a command: it answers those system calls that a FUSE server cannot.
//!
//! An ioctl on a FUSE file cannot return a descriptor, and a FUSE file is no char device. So the command
//! runs with a seccomp filter that traps the few calls concerned, and another process answers them.
//!
//! That process is not the command's parent but in the background: `run` *becomes* the command, whose
//! pid, parent, signals, terminal, job control and exit status are then as without `run`, and nobody
//! has to pass them on. The supervisor is started first, in a session of its own and with no descriptor
//! of the command's; it ends when the last process with the filter has ended, however deep it was
//! started and whoever its parent is by then.
//!
//! It stays in the mount namespace in which `run` was started: there the daemon's trees are, whatever
//! the command does to its own.

mod calls;
mod kvm;
mod migration;
mod nodes;
mod opening;
mod path;
mod pool;
mod sys;
mod task;

use super::Places;
use crate::fail::{Fail, Result};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use seccomp_notify::{InstallError, Listener};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::sync::Arc;

/// Set for the command: under whose supervision it is.
pub(super) const VARIABLE: &str = "VFIOCTL_RUN";

/// A supervisor that has nobody to supervise yet. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Waiting {
    socket: OwnedFd,
}

impl Waiting {
    /// Starts it. The calling process must have one thread.
    pub(super) fn start(places: &Places) -> Result<Waiting> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |errno: Errno| Fail::failed(format!("supervisor: {what}: {errno}"))
        };
        // Who calls is looked up there, by the number that this namespace knows it by.
        let own = rustix::process::getpid().as_raw_nonzero().to_string();
        if std::fs::read_link("/proc/self").is_ok_and(|link| link.as_os_str() != own.as_str()) {
            return Err(Fail::failed(
                "/proc lists the processes of another pid namespace: mount this one's \
                 (`unshare --mount-proc`), or use --no-supervisor",
            ));
        }
        let (socket, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(failed("socket"))?;
        // Not a child: the command may count its children.
        let between = sys::fork(|| {
            let _ = rustix::process::setsid();
            let _ = sys::fork(|| {
                if let Ok(socket) = sys::leave_all_but(theirs) {
                    let _ = supervise(socket, places);
                }
            });
        })
        .map_err(failed("fork"))?;
        loop {
            match rustix::process::waitpid(Some(between), rustix::process::WaitOptions::empty()) {
                Err(Errno::INTR) => {}
                // With SIGCHLD ignored, which is inherited, nothing is left of it.
                Ok(_) | Err(Errno::CHILD) => break,
                Err(errno) => return Err(failed("fork")(errno)),
            }
        }
        Ok(Waiting { socket })
    }

    /// Puts this thread, and what it executes, under supervision. On return trapped calls are
    /// answered. The supervisor keeps `lifeline` open as long as there is somebody to supervise.
    pub(super) fn begin(self, lifeline: Option<BorrowedFd<'_>>) -> Result {
        let installed = calls::filter().install().map_err(refused)?;
        if !installed.wait_killable {
            eprintln!(
                "vfioctl: before Linux 5.19 a signal can end a call that the supervisor is answering: \
                 a command that gets very many signals may not get on"
            );
        }
        let failed = |errno: Errno| Fail::failed(format!("supervisor: {errno}"));
        let listener = OwnedFd::from(installed.listener);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<BorrowedFd<'_>> = [listener.as_fd()].into_iter().chain(lifeline).collect();
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        let bytes = [IoSlice::new(b"L")];
        sendmsg(&self.socket, &bytes, &mut ancillary, SendFlags::NOSIGNAL).map_err(failed)?;
        drop(listener);
        let mut answer = [0; 1];
        match rustix::io::read(&self.socket, &mut answer[..]) {
            Ok(1) => Ok(()),
            Ok(_) => Err(Fail::failed("the supervisor has ended")),
            Err(errno) => Err(failed(errno)),
        }
    }
}

/// Why there can be no supervision, for people.
fn refused(error: InstallError) -> Fail {
    let rest = "`vfioctl run --no-supervisor` gives the command /sys and /dev alone: then ioctls that \
                return a descriptor, such as VFIO_GROUP_GET_DEVICE_FD, fail";
    Fail::failed(match error {
        InstallError::HasListener if std::env::var_os(VARIABLE).is_some() => {
            "this runs under `vfioctl run` already, and the kernel allows one supervisor: start the \
             command as it is"
                .to_owned()
        }
        InstallError::HasListener => format!(
            "{error}, a container's runtime perhaps, and the kernel allows one: start vfioctl outside \
             of it, or have it run without a listener (`listenerPath` of its seccomp profile). {rest}"
        ),
        error => format!("no supervisor: {error}. {rest}"),
    })
}

/// The supervisor's life.
fn supervise(socket: OwnedFd, places: &Places) -> std::result::Result<(), Errno> {
    // It ends with those it supervises, and not by a signal that was meant for them.
    sys::block_signals()?;
    let _ = rustix::process::chdir("/");
    let _ = raise_descriptor_limit();
    let mut received = receive(&socket)?.into_iter();
    let Some(listener) = received.next() else {
        return Ok(());
    };
    let _lifeline = received.next();
    let listener = Arc::new(Listener::from(listener));
    // Linux before 6.6 wakes whoever it likes.
    let _ = listener.set_sync_wake_up();
    let supervisor = calls::Supervisor {
        listener: Arc::clone(&listener),
        nodes: nodes::Nodes::new(&places.dev, &places.sys)?,
        kvm: kvm::Kvm::default(),
        proc_dev: nodes::proc_dev()?,
    };
    let pool = pool::Pool::new(listener, supervisor)?;
    rustix::io::write(&socket, b"R")?;
    drop(socket);
    pool.run()
}

/// The listener and what is to be kept; nothing if it will not come.
fn receive(socket: &OwnedFd) -> std::result::Result<Vec<OwnedFd>, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0; 1];
    let mut bytes = [IoSliceMut::new(&mut byte)];
    recvmsg(socket, &mut bytes, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let messages = ancillary.drain();
    Ok(messages
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect())
}

/// A command with many threads that open devices at once needs more than the usual 1024.
fn raise_descriptor_limit() -> std::result::Result<(), Errno> {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit)
}
