//! The descriptors behind a port: how each kind of far end is opened, and what of it is removed
//! when it goes.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

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

use super::BackendError;
use super::pump::Stream;

fn at(action: &'static str, path: &Path) -> impl FnOnce(Errno) -> BackendError {
    move |source| BackendError::Path {
        action,
        path: path.to_owned(),
        source,
    }
}

/// A pseudo-terminal. The controlling end is ours; the terminal end is for others.
#[derive(Debug)]
pub(super) struct Pty {
    pub(super) controller: Arc<OwnedFd>,
    pub(super) terminal: PathBuf,
    pub(super) link: Option<PtyLink>,
}

impl Pty {
    pub(super) fn open(link: Option<&Path>) -> Result<Self, BackendError> {
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
        let terminal = PathBuf::from(OsString::from_vec(name.into_bytes()));
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

    pub(super) fn open_terminal(&self) -> Result<OwnedFd, BackendError> {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        rustix::fs::open(&self.terminal, flags, Mode::empty()).map_err(at("open", &self.terminal))
    }
}

/// A symbolic link to the terminal; removed with it, if it is still ours.
#[derive(Debug)]
pub(super) struct PtyLink {
    pub(super) path: PathBuf,
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
pub(super) struct Listener {
    pub(super) fd: Arc<OwnedFd>,
    pub(super) path: PathBuf,
    /// Device and inode of the file we made.
    identity: (u64, u64),
}

impl Listener {
    pub(super) fn open(path: &Path) -> Result<Self, BackendError> {
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

pub(super) fn open_output(path: &Path) -> Result<Stream, BackendError> {
    let flags = direction(path, OFlags::WRONLY) | OFlags::APPEND | OFlags::CREATE;
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::open(path, flags, mode)
        .map(stream)
        .map_err(at("open for output", path))
}

pub(super) fn open_input(path: &Path) -> Result<Stream, BackendError> {
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

/// Standard input, for a port.
pub(super) fn standard_input() -> Result<Stream, BackendError> {
    standard(std::io::stdin().as_fd(), OFlags::RDONLY)
}

/// Standard output, for a port.
pub(super) fn standard_output() -> Result<Stream, BackendError> {
    standard(std::io::stdout().as_fd(), OFlags::WRONLY)
}

/// One of the standard streams, in a form that never waits. Its file may be shared with a shell,
/// so its mode is not ours to change: a terminal or pipe is opened anew, for a mode of its own.
fn standard(fd: BorrowedFd<'_>, access: OFlags) -> Result<Stream, BackendError> {
    let failed = |source| BackendError::System {
        action: "use a standard stream",
        source,
    };
    let stat = rustix::fs::fstat(fd).map_err(failed)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    if matches!(kind, FileType::CharacterDevice | FileType::Fifo) {
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
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
pub(super) struct StdioLease(());

impl StdioLease {
    pub(super) fn take() -> Result<Self, BackendError> {
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
pub(super) struct RawTerminal(Termios);

impl RawTerminal {
    /// `None` if standard input is no terminal, or one that somebody else has the foreground of.
    pub(super) fn enter() -> Option<Self> {
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
