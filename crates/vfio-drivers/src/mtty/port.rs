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

use std::fmt;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::fs::FileType;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::AddressFamily;
use rustix::net::SocketAddrUnix;
use rustix::net::SocketFlags;
use rustix::net::SocketType;
use rustix::pty::OpenptFlags;
use rustix::termios::InputModes;
use rustix::termios::LocalModes;
use rustix::termios::OptionalActions;
use rustix::termios::OutputModes;
use rustix::termios::Termios;

pub use parse::BackendSpec;
pub use parse::ParseError;
pub use queue::Limits;
pub use queue::Outlet;

use pump::Pump;
use pump::Stream;
use queue::Shared;

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
        let mut held: Vec<Box<dyn Send>> = Vec::new();
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
                (
                    None,
                    Some(standard(std::io::stdin().as_fd(), OFlags::RDONLY)?),
                    Some(standard(std::io::stdout().as_fd(), OFlags::WRONLY)?),
                )
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
struct Held(Vec<Box<dyn Send>>);

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Held").field(&self.0.len()).finish()
    }
}

fn at(action: &'static str, path: &Path) -> impl FnOnce(Errno) -> BackendError {
    move |source| BackendError::Path {
        action,
        path: path.to_owned(),
        source,
    }
}

/// A pseudo-terminal. The controlling end is ours; the terminal end is for others.
#[derive(Debug)]
struct Pty {
    controller: Arc<OwnedFd>,
    terminal: PathBuf,
    link: Option<PtyLink>,
}

impl Pty {
    fn open(link: Option<&Path>) -> Result<Self, BackendError> {
        let failed = |source| BackendError::System {
            action: "make a pseudo-terminal",
            source,
        };
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let controller = rustix::pty::openpt(flags).map_err(failed)?;
        rustix::io::ioctl_fionbio(&controller, true).map_err(failed)?;
        rustix::pty::grantpt(&controller).map_err(failed)?;
        rustix::pty::unlockpt(&controller).map_err(failed)?;
        let name = rustix::pty::ptsname(&controller, Vec::new()).map_err(failed)?;
        let terminal = PathBuf::from(std::ffi::OsString::from_vec(name.into_bytes()));
        let mut pty = Self {
            controller: Arc::new(controller),
            terminal,
            link: None,
        };
        // The bytes are the guest's: no echo, no line editing, no translation on the way.
        let end = pty.open_terminal()?;
        let mut modes = rustix::termios::tcgetattr(&end).map_err(failed)?;
        modes.make_raw();
        rustix::termios::tcsetattr(&end, OptionalActions::Now, &modes).map_err(failed)?;
        if let Some(link) = link {
            pty.link = Some(PtyLink::make(link, &pty.terminal)?);
        }
        Ok(pty)
    }

    fn open_terminal(&self) -> Result<OwnedFd, BackendError> {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        rustix::fs::open(&self.terminal, flags, Mode::empty()).map_err(at("open", &self.terminal))
    }
}

/// A symbolic link to the terminal; removed with it, if it is still ours.
#[derive(Debug)]
struct PtyLink {
    path: PathBuf,
    target: PathBuf,
}

impl PtyLink {
    fn make(path: &Path, target: &Path) -> Result<Self, BackendError> {
        let link = || match rustix::fs::symlink(target, path) {
            Ok(()) => Ok(Self {
                path: path.to_owned(),
                target: target.to_owned(),
            }),
            Err(error) => Err(error),
        };
        match link() {
            Err(Errno::EXIST) => {}
            done => return done.map_err(at("make the link", path)),
        }
        // A link into nowhere is what a killed daemon leaves. Anything else is somebody's.
        if rustix::fs::readlink(path, Vec::new()).is_err() || path.exists() {
            return Err(BackendError::Exists(path.to_owned()));
        }
        rustix::fs::unlink(path).map_err(at("replace the stale link", path))?;
        link().map_err(at("make the link", path))
    }
}

impl Drop for PtyLink {
    fn drop(&mut self) {
        let ours = rustix::fs::readlink(&self.path, Vec::new())
            .is_ok_and(|target| target.as_bytes() == self.target.as_os_str().as_bytes());
        if ours {
            let _ = rustix::fs::unlink(&self.path);
        }
    }
}

/// A socket that listens, and its file; removed with it, if it is still ours.
#[derive(Debug)]
struct Listener {
    fd: Arc<OwnedFd>,
    path: PathBuf,
    /// Device and inode of the file we made.
    identity: (u64, u64),
}

impl Listener {
    fn open(path: &Path) -> Result<Self, BackendError> {
        let listen = at("listen on", path);
        let address = match SocketAddrUnix::new(path) {
            Ok(address) => address,
            Err(source) => return Err(listen(source)),
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            || rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
        let bind = || {
            let fd = socket()?;
            // The file gets the mode of the socket: nobody else ever sees it open to all.
            rustix::fs::fchmod(&fd, Mode::RUSR | Mode::WUSR)?;
            rustix::net::bind(&fd, &address)?;
            Ok(fd)
        };
        let fd = match bind() {
            Err(Errno::ADDRINUSE) => {
                let stat = rustix::fs::lstat(path).map_err(at("look at", path))?;
                if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
                    return Err(BackendError::Exists(path.to_owned()));
                }
                // A socket without a listener is what a killed daemon leaves.
                let probe = socket().map_err(at("probe", path))?;
                match rustix::net::connect(&probe, &address) {
                    Err(Errno::CONNREFUSED) => {}
                    _ => return Err(BackendError::InUse(path.to_owned())),
                }
                rustix::fs::unlink(path).map_err(at("replace the stale socket", path))?;
                bind()
            }
            done => done,
        };
        let fd = match fd {
            Ok(fd) => fd,
            Err(source) => return Err(listen(source)),
        };
        let stat = rustix::fs::lstat(path).map_err(at("look at", path))?;
        let listener = Self {
            fd: Arc::new(fd),
            path: path.to_owned(),
            identity: (stat.st_dev, stat.st_ino),
        };
        // One is served; a few may wait for their turn.
        match rustix::net::listen(&listener.fd, 4) {
            Ok(()) => Ok(listener),
            Err(source) => Err(listen(source)),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours = rustix::fs::lstat(&self.path)
            .is_ok_and(|stat| (stat.st_dev, stat.st_ino) == self.identity);
        if ours {
            let _ = rustix::fs::unlink(&self.path);
        }
    }
}

/// A named pipe is opened for both directions: opening it waits for nobody then, and it reports
/// neither an end nor a broken pipe while its user is away.
fn direction(path: &Path, otherwise: OFlags) -> OFlags {
    let pipe = rustix::fs::stat(path)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Fifo);
    let mode = if pipe { OFlags::RDWR } else { otherwise };
    mode | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC
}

fn open_output(path: &Path) -> Result<Stream, BackendError> {
    let flags = direction(path, OFlags::WRONLY) | OFlags::APPEND | OFlags::CREATE;
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::open(path, flags, mode)
        .map(stream)
        .map_err(at("open for output", path))
}

fn open_input(path: &Path) -> Result<Stream, BackendError> {
    rustix::fs::open(path, direction(path, OFlags::RDONLY), Mode::empty())
        .map(stream)
        .map_err(at("open for input", path))
}

fn stream(fd: OwnedFd) -> Stream {
    Stream {
        fd: Arc::new(fd),
        socket: false,
    }
}

/// One of the standard streams, in a form that never waits. Its file may be shared with a shell,
/// so its mode is not ours to change: a terminal or pipe is opened anew, for a mode of its own.
fn standard(fd: std::os::fd::BorrowedFd<'_>, access: OFlags) -> Result<Stream, BackendError> {
    let failed = |source| BackendError::System {
        action: "use a standard stream",
        source,
    };
    let stat = rustix::fs::fstat(fd).map_err(failed)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    if matches!(kind, FileType::CharacterDevice | FileType::Fifo) {
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
        let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        if let Ok(own) = rustix::fs::open(path, flags, Mode::empty()) {
            return Ok(stream(own));
        }
    }
    Ok(Stream {
        fd: Arc::new(rustix::io::fcntl_dupfd_cloexec(fd, 3).map_err(failed)?),
        socket: kind == FileType::Socket,
    })
}

static STDIO_TAKEN: AtomicBool = AtomicBool::new(false);

/// The right to use the standard streams.
#[derive(Debug)]
struct StdioLease(());

impl StdioLease {
    fn take() -> Result<Self, BackendError> {
        if STDIO_TAKEN.swap(true, Ordering::AcqRel) {
            Err(BackendError::StdioTaken)
        } else {
            Ok(Self(()))
        }
    }
}

impl Drop for StdioLease {
    fn drop(&mut self) {
        STDIO_TAKEN.store(false, Ordering::Release);
    }
}

/// The terminal we were started from, without echo and line editing while it is a serial line.
/// The interrupt key still stops the program, and output is still translated for log lines.
struct RawTerminal(Termios);

impl RawTerminal {
    /// `None` if standard input is no terminal, or one that somebody else has the foreground of.
    fn enter() -> Option<Self> {
        let stdin = std::io::stdin();
        let before = rustix::termios::tcgetattr(&stdin).ok()?;
        if rustix::termios::tcgetpgrp(&stdin).ok()? != rustix::process::getpgrp() {
            return None;
        }
        let mut modes = before.clone();
        modes.make_raw();
        modes.local_modes |= LocalModes::ISIG;
        modes.output_modes |= before.output_modes & OutputModes::all();
        modes.input_modes |= before.input_modes & InputModes::IUTF8;
        rustix::termios::tcsetattr(&stdin, OptionalActions::Now, &modes).ok()?;
        Some(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = rustix::termios::tcsetattr(std::io::stdin(), OptionalActions::Now, &self.0);
    }
}

#[cfg(test)]
mod tests;
