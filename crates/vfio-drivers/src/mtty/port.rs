//! Where the bytes of a serial port go: a terminal, a socket, files, the standard streams, or back.
//!
//! A [`Backend`] lives as long as its device and is what people see: the terminal, the socket, the
//! link. It costs one descriptor for a terminal or a socket and none otherwise. A [`Connection`]
//! lives while the device is open and has the only thread, which does all the waiting: sending
//! ([`Outlet::send`]) and offering room ([`Outlet::resume`]) never block. Dropping either leaves
//! nothing behind.

mod parse;
mod pump;
mod queue;
mod wires;

use std::fmt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::io::Errno;

pub use parse::BackendSpec;
pub use parse::ParseError;
pub use queue::Limits;
pub use queue::Outlet;

use pump::Pump;
use pump::Stream;
use queue::Shared;
use wires::Listener;
use wires::Pty;
use wires::RawTerminal;
use wires::StdioLease;
use wires::open_input;
use wires::open_output;
use wires::standard_input;
use wires::standard_output;

/// The guest's side of a port, as the connection's thread calls it. No call may wait for the
/// thread (dropping the [`Connection`] does), and none is made with a lock held.
pub trait Line: Send + Sync + 'static {
    /// Bytes from outside. Returns how many the UART took; the rest is offered again after
    /// [`Outlet::resume`].
    fn receive(&self, bytes: &[u8]) -> usize;
    /// What [`Outlet::send`] refused may be tried again.
    fn room(&self, outlet: &Outlet);
    /// Somebody is at the far end, or has left.
    fn carrier(&self, present: bool);
}

/// Why a backend could not be made or connected; for people, with [`errno`](Self::errno) for
/// programs.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The system refused something about a file.
    #[error("cannot {action} {}: {source}", path.display())]
    Path {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why not.
        source: Errno,
    },
    /// The system refused something else.
    #[error("cannot {action}: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: Errno,
    },
    /// A live socket has that path.
    #[error("{}: a program listens there already; stop it or choose another path", .0.display())]
    InUse(PathBuf),
    /// The path is taken by something that is not a leftover of ours.
    #[error("{} exists and is not a leftover of a serial port; remove it or choose another path", .0.display())]
    Exists(PathBuf),
    /// There is one standard input.
    #[error("another port uses stdio already; give this one a pty or a socket")]
    StdioTaken,
}

impl BackendError {
    /// The errno a program gets for it.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Path { source, .. } | Self::System { source, .. } => *source,
            Self::InUse(_) => Errno::ADDRINUSE,
            Self::Exists(_) => Errno::EXIST,
            Self::StdioTaken => Errno::BUSY,
        }
    }
}

/// The host's side of a port, for the lifetime of its device.
#[derive(Debug)]
pub struct Backend {
    kind: Kind,
    limits: Limits,
}

#[derive(Debug)]
enum Kind {
    Loopback,
    Pty(Pty),
    Unix(Listener),
    File {
        output: PathBuf,
        input: Option<PathBuf>,
    },
    Stdio(StdioLease),
}

impl Backend {
    /// Makes what the specification names: opens the terminal, listens on the socket, sees whether
    /// the files can be opened. Nothing of it is left if it fails.
    pub fn open(spec: &BackendSpec) -> Result<Self, BackendError> {
        let kind = match spec {
            BackendSpec::Loopback => Kind::Loopback,
            BackendSpec::Pty { link } => Kind::Pty(Pty::open(link.as_deref())?),
            BackendSpec::Unix { path } => Kind::Unix(Listener::open(path)?),
            BackendSpec::File { output, input } => {
                // In this order: the output is made if it is not there.
                input.as_deref().map(open_input).transpose()?;
                open_output(output)?;
                Kind::File {
                    output: output.clone(),
                    input: input.clone(),
                }
            }
            BackendSpec::Stdio => Kind::Stdio(StdioLease::take()?),
        };
        Ok(Self {
            kind,
            limits: Limits::default(),
        })
    }

    /// The same with other limits.
    #[must_use]
    pub fn with_limits(self, limits: Limits) -> Self {
        Self { limits, ..self }
    }

    /// Whether the port hears itself, so that [`connect`](Self::connect) has nothing to connect.
    pub fn is_loopback(&self) -> bool {
        matches!(self.kind, Kind::Loopback)
    }

    /// Where somebody connects to the port: the link or the terminal, the socket, the output file.
    pub fn path(&self) -> Option<&Path> {
        match &self.kind {
            Kind::Loopback | Kind::Stdio(_) => None,
            Kind::Pty(pty) => Some(pty.link.as_ref().map_or(&pty.terminal, |link| &link.path)),
            Kind::Unix(listener) => Some(&listener.path),
            Kind::File { output, .. } => Some(output),
        }
    }

    /// Starts moving bytes. `None` for loopback: its owner hands what is sent back to the UART.
    /// A device connects a port once at a time.
    pub fn connect(&self, line: Arc<dyn Line>) -> Result<Option<Connection>, BackendError> {
        let mut held: Vec<Box<dyn Send + Sync>> = Vec::new();
        let (listener, input, output) = match &self.kind {
            Kind::Loopback => return Ok(None),
            Kind::Pty(pty) => {
                // As long as one terminal end is open, reading never reports a hangup, whoever
                // comes and goes.
                held.push(Box::new(pty.open_terminal()?));
                let stream = Stream {
                    fd: Arc::clone(&pty.controller),
                    socket: false,
                };
                (None, Some(stream.clone()), Some(stream))
            }
            Kind::Unix(listener) => (Some(Arc::clone(&listener.fd)), None, None),
            Kind::File { output, input } => (
                None,
                input.as_deref().map(open_input).transpose()?,
                Some(open_output(output)?),
            ),
            Kind::Stdio(_) => {
                held.extend(RawTerminal::enter().map(|raw| Box::new(raw) as _));
                (None, Some(standard_input()?), Some(standard_output()?))
            }
        };
        let shared = Arc::new(
            Shared::new(self.limits).map_err(|source| BackendError::System {
                action: "make an eventfd for a serial port",
                source,
            })?,
        );
        shared.lock().connected = output.is_some();
        let pump = Pump {
            shared: Arc::clone(&shared),
            line,
            name: self.to_string(),
            listener,
            input,
            output,
            client: false,
            pending: Vec::new(),
            outgoing: Vec::new(),
            last_progress: Instant::now(),
            accept_after: None,
        };
        let thread = std::thread::Builder::new()
            .name("mtty-port".into())
            .spawn(move || pump.run())
            .map_err(|error| BackendError::System {
                action: "start the thread of a serial port",
                source: Errno::from_io_error(&error).unwrap_or(Errno::AGAIN),
            })?;
        Ok(Some(Connection {
            outlet: Outlet(shared),
            thread: Some(thread),
            _held: Held(held),
        }))
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            Kind::Loopback => f.write_str("loopback"),
            Kind::Pty(pty) => {
                write!(f, "pty {}", pty.terminal.display())?;
                match &pty.link {
                    Some(link) => write!(f, " ({})", link.path.display()),
                    None => Ok(()),
                }
            }
            Kind::Unix(listener) => write!(f, "unix {}", listener.path.display()),
            Kind::File { output, .. } => write!(f, "file {}", output.display()),
            Kind::Stdio(_) => f.write_str("stdio"),
        }
    }
}

/// A port that is in use. Dropping it stops the thread and waits for that; what can be written
/// without waiting still is, and no call of [`Line`] runs afterwards.
#[derive(Debug)]
pub struct Connection {
    outlet: Outlet,
    thread: Option<JoinHandle<()>>,
    /// Goes after the thread.
    _held: Held,
}

impl Connection {
    /// The handle that the UART's side sends with.
    pub fn outlet(&self) -> Outlet {
        self.outlet.clone()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.outlet.0.lock().stop = true;
        self.outlet.0.wake();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("the thread of a serial port panicked");
        }
    }
}

/// What a connection keeps and never looks at.
struct Held(Vec<Box<dyn Send + Sync>>);

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Held").field(&self.0.len()).finish()
    }
}

#[cfg(test)]
mod tests;
