//! The control socket: who may connect, and how many.
//!
//! Each connection has a thread of its own, so a client that does not read, or does not finish its
//! line, stops nobody else. Threads are bounded, in all and for each user but root; a connection
//! beyond is told so and closed.

use crate::calls::Server;
use anyhow::Context as _;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Gid, Mode, Uid};
use rustix::io::Errno;
use std::collections::HashMap;
use std::io::{self, BufReader, Write};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use vfiod_control::{Answer, Failure, FailureKind, PROTOCOL, Reply, Request, wire};

/// Connections at the same time.
const CONNECTIONS: usize = 256;
/// Of those, of one user that is not root.
const CONNECTIONS_PER_USER: usize = 32;
/// How long a connection may be silent between requests, and a client may not read.
const PATIENCE: Duration = Duration::from_secs(60);
/// Enough for a look through /proc and a line of JSON.
const STACK: usize = 512 * 1024;

/// The listening socket and its threads. Dropping it closes all connections.
#[derive(Debug)]
pub(crate) struct Control {
    path: PathBuf,
    shared: Arc<Shared>,
    accept: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    listener: UnixListener,
    stopping: AtomicBool,
    connections: Mutex<Connections>,
}

#[derive(Debug, Default)]
struct Connections {
    next: u64,
    open: HashMap<u64, (u32, UnixStream)>,
}

impl Control {
    /// Listens at `path`, for root and `group`.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub(crate) fn start(
        path: &Path,
        group: Option<u32>,
        server: Arc<Server>,
    ) -> anyhow::Result<Control> {
        let listener = listen(path, group).with_context(|| format!("socket {}", path.display()))?;
        let shared = Arc::new(Shared {
            listener,
            stopping: AtomicBool::new(false),
            connections: Mutex::default(),
        });
        let thread = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name("control".to_owned())
                .spawn(move || shared.accept(&server))?
        };
        Ok(Control {
            path: path.to_owned(),
            shared,
            accept: Some(thread),
        })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        let _ = std::fs::remove_file(&self.path);
        // Shut down, a listening socket's accept returns EINVAL.
        let _ = rustix::net::shutdown(&self.shared.listener, rustix::net::Shutdown::Both);
        if let Some(thread) = self.accept.take() {
            let _ = thread.join();
        }
        for (_, stream) in self.shared.connections().open.values() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

/// A socket that nobody else can connect to for the moment between bind and chown.
fn listen(path: &Path, group: Option<u32>) -> io::Result<UnixListener> {
    match std::fs::symlink_metadata(path) {
        Ok(there) if !there.file_type().is_socket() => {
            return Err(io::Error::other(
                "it is there and is no socket; move it away, or use another directory (--root)",
            ));
        }
        _ => {}
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let before = rustix::process::umask(Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path);
    rustix::process::umask(before);
    let listener = listener?;
    if let Some(group) = group {
        rustix::fs::chown(path, None::<Uid>, Some(Gid::from_raw(group)))?;
    }
    rustix::fs::chmod(path, Mode::from_raw_mode(0o660))?;
    Ok(listener)
}

impl Shared {
    fn connections(&self) -> std::sync::MutexGuard<'_, Connections> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(self: &Arc<Self>, server: &Arc<Server>) {
        while !self.stopping.load(Ordering::Acquire) {
            match self.listener.accept() {
                Ok((stream, _)) => self.admit(stream, server),
                Err(error) => {
                    if self.stopping.load(Ordering::Acquire) {
                        return;
                    }
                    match Errno::from_io_error(&error) {
                        Some(Errno::MFILE | Errno::NFILE) => {
                            tracing::warn!(
                                "control socket: {error}; {}",
                                crate::daemon::FILES_ADVICE
                            );
                        }
                        _ => tracing::warn!("control socket: {error}"),
                    }
                    // The connection is still there: without a pause this would spin.
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn admit(self: &Arc<Self>, stream: UnixStream, server: &Arc<Server>) {
        let uid = rustix::net::sockopt::socket_peercred(&stream)
            .map_or(u32::MAX, |peer| peer.uid.as_raw());
        let result = self.enter(&stream, uid).and_then(|id| {
            let (shared, server, stream) =
                (Arc::clone(self), Arc::clone(server), stream.try_clone()?);
            std::thread::Builder::new()
                .name("control-peer".to_owned())
                .stack_size(STACK)
                .spawn(move || {
                    if let Err(error) = converse(&server, &stream, &shared.stopping) {
                        tracing::debug!("control socket: a client of user {uid}: {error}");
                    }
                    shared.connections().open.remove(&id);
                })
                .map(drop)
                .inspect_err(|_| {
                    self.connections().open.remove(&id);
                })
        });
        if let Err(error) = result {
            let failure = Failure {
                kind: FailureKind::Busy,
                errno: Some("EBUSY".to_owned()),
                message: format!("vfiod takes no more connections: {error}"),
            };
            let _ = stream.set_write_timeout(Some(Duration::from_millis(100)));
            let _ = wire::write(&mut &stream, &Reply::new(Answer::Error(failure)));
        }
    }

    fn enter(&self, stream: &UnixStream, uid: u32) -> io::Result<u64> {
        let mut connections = self.connections();
        let own = connections
            .open
            .values()
            .filter(|(other, _)| *other == uid)
            .count();
        if connections.open.len() >= CONNECTIONS || uid != 0 && own >= CONNECTIONS_PER_USER {
            return Err(io::Error::other("too many are open"));
        }
        let id = connections.next;
        connections.next += 1;
        connections.open.insert(id, (uid, stream.try_clone()?));
        Ok(id)
    }
}

/// One client, from its thread.
pub(crate) struct Peer<'a> {
    stream: &'a UnixStream,
    stopping: &'a AtomicBool,
}

impl Peer<'_> {
    /// True for root and for the daemon's own user, for whom its rights are no more than theirs.
    pub(crate) fn may_choose_paths(&self) -> bool {
        rustix::net::sockopt::socket_peercred(self.stream)
            .is_ok_and(|peer| peer.uid.is_root() || peer.uid == rustix::process::geteuid())
    }

    /// Sends an answer. A client that does not read for long loses its connection.
    ///
    /// # Errors
    /// When it is gone or does not read.
    pub(crate) fn send(&self, answer: Answer) -> io::Result<()> {
        let mut line = Vec::new();
        wire::write(&mut line, &Reply::new(answer))?;
        let mut stream = self.stream;
        stream.write_all(&line)
    }

    /// True while it is worth going on: the client is there, and we are.
    pub(crate) fn is_there(&self) -> bool {
        if self.stopping.load(Ordering::Acquire) {
            return false;
        }
        let mut fds = [PollFd::new(self.stream, PollFlags::RDHUP)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        match poll(&mut fds, Some(&now)) {
            Ok(0) => true,
            Ok(_) => !fds.iter().any(|fd| {
                fd.revents()
                    .intersects(PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR)
            }),
            Err(_) => true,
        }
    }
}

/// Requests and answers until the client closes.
fn converse(server: &Server, stream: &UnixStream, stopping: &AtomicBool) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let peer = Peer { stream, stopping };
    let mut reader = BufReader::with_capacity(1024, stream);
    loop {
        let line = match wire::read_line(&mut reader, wire::MAX_REQUEST) {
            Ok(Some(line)) => line,
            Ok(None) => return Ok(()),
            Err(error) => {
                if error.kind() == io::ErrorKind::InvalidData {
                    peer.send(protocol(&error.to_string()))?;
                }
                return Err(error);
            }
        };
        match serde_json::from_slice::<Request>(&line) {
            Ok(request) if request.v == PROTOCOL => server.answer(request.call, &peer)?,
            Ok(request) => peer.send(protocol(&format!(
                "this vfiod speaks version {PROTOCOL} of the protocol, not {}",
                request.v
            )))?,
            Err(error) => peer.send(protocol(&format!("not a request: {error}")))?,
        }
    }
}

fn protocol(message: &str) -> Answer {
    Answer::Error(Failure {
        kind: FailureKind::Protocol,
        errno: None,
        message: message.to_owned(),
    })
}
