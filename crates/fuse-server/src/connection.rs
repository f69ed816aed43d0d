//! One FUSE connection: the descriptor, what was negotiated, and the requests under way.

use std::cell::Cell;
use std::ffi::OsStr;
use std::io::IoSlice;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::Weak;
use std::time::Duration;

use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::io::Errno;
use zerocopy::FromBytes;
use zerocopy::IntoBytes;

use crate::monitor;
use crate::parse::Message;
use crate::parse::ParseError;
use crate::parse::header;
use crate::parse::parse;
use crate::passthrough::BackingId;
use crate::reply::Reply;
use crate::request::Request;
use crate::shared::Shared;
use crate::wire;
use crate::wire::Features;
use crate::wire::notify;
use crate::wire::opcode;
use crate::workers;

/// Answers requests. Called from every thread that serves the connection, at the same time; closures of the same shape are handlers too.
pub trait Handler: Send + Sync {
    /// Handles one request: answers it, or keeps its reply for later. It may not wait for anything that needs this thread.
    fn handle(&self, request: Request<'_>);
}

impl<F: Fn(Request<'_>) + Send + Sync> Handler for F {
    fn handle(&self, request: Request<'_>) {
        self(request);
    }
}

/// What is asked of the kernel at the start of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// The largest WRITE in bytes; also sizes the buffer of each thread, of which only touched pages cost memory. At least 4096.
    pub max_write: u32,
    /// Features wanted; those the kernel does not offer are dropped (see [`Connection::features`]).
    pub features: Features,
    /// How long an interrupted request may stay unanswered before the crate answers EINTR.
    pub interrupt_grace: Duration,
    /// How many background requests (readahead, RELEASE) the kernel keeps in flight.
    pub max_background: u16,
    /// Stacking depth for backing files: 1 allows backing files on ordinary file systems, memfds among them.
    pub max_stack_depth: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_write: 1 << 20,
            features: Features::ASYNC_READ
                | Features::BIG_WRITES
                | Features::ASYNC_DIO
                | Features::PARALLEL_DIROPS
                | Features::MAX_PAGES
                | Features::DO_READDIRPLUS
                | Features::READDIRPLUS_AUTO
                | Features::DIRECT_IO_ALLOW_MMAP
                | Features::PASSTHROUGH
                | Features::HAS_RESEND,
            interrupt_grace: Duration::from_millis(50),
            max_background: 64,
            max_stack_depth: 1,
        }
    }
}

/// What kernel and server agreed on. Whoever takes over the descriptor of a living connection needs it: see [`Connection::resume`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// The kernel's protocol minor version (major is 7).
    pub kernel_minor: u32,
    /// What both sides can do.
    pub features: Features,
    /// The largest WRITE in bytes.
    pub max_write: u32,
}

/// What one call of a serve function did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// A request was read and handed on.
    Request,
    /// Nothing: a signal came, or the request was withdrawn meanwhile.
    Nothing,
    /// Nothing waits, and the descriptor is non-blocking.
    WouldBlock,
    /// The connection is over (unmounted or aborted).
    Ended,
}

/// The memory a serving thread reads requests into; one per thread, used again for each request.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
}

thread_local! {
    /// The connection this thread is serving a request of, as an address; 0 for none.
    static SERVING: Cell<usize> = const { Cell::new(0) };
}

/// A FUSE connection. Clones are the same connection; the descriptor is closed when the last clone, serving thread and unanswered reply are gone, and
/// closing it ends the connection for its clients (ENOTCONN).
#[derive(Clone)]
pub struct Connection {
    shared: Arc<Shared>,
}

impl Connection {
    /// Takes the descriptor of a new file system and answers its INIT, which waits for one when the mount is not made yet.
    ///
    /// # Errors
    /// ENODEV when the file system is already gone, EPROTO when the first message is not an INIT of protocol 7, EINVAL for a descriptor that is not
    /// `/dev/fuse`.
    pub fn new(fd: OwnedFd, config: &Config) -> Result<Self, Errno> {
        let mut bytes = [0_u8; wire::MIN_READ_BUFFER];
        let (header, init) = loop {
            let length = match rustix::io::read(&fd, &mut bytes[..]) {
                Ok(length) => length,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => {
                    wait_readable(fd.as_fd())?;
                    continue;
                }
                Err(errno) => return Err(errno),
            };
            let message = bytes.get(..length).unwrap_or_default();
            let header = header(message)
                .filter(|header| header.opcode == opcode::INIT)
                .ok_or(Errno::PROTO)?;
            // Kernels before 7.36 send sixteen bytes; what is missing reads as zero.
            let mut padded = [0_u8; size_of::<wire::InitIn>()];
            let body = message
                .get(size_of::<wire::InHeader>()..)
                .unwrap_or_default();
            let length = body.len().min(padded.len());
            padded[..length].copy_from_slice(&body[..length]);
            let init = wire::InitIn::read_from_bytes(&padded).map_err(|_| Errno::PROTO)?;
            if init.major == wire::MAJOR {
                break (header, init);
            }
            if init.major < wire::MAJOR {
                return Err(Errno::PROTO);
            }
            // A newer kernel learns our version and asks again.
            let out = wire::InitOut {
                major: wire::MAJOR,
                minor: wire::MINOR,
                ..wire::InitOut::default()
            };
            write_first(fd.as_fd(), header.unique, &out)?;
        };
        let mut offered = u64::from(init.flags);
        if init.flags & Features::INIT_EXT.bits() as u32 != 0 {
            offered |= u64::from(init.flags2) << 32;
        }
        let mut features =
            Features::from_bits_retain(offered) & (config.features | Features::INIT_EXT);
        if config.max_stack_depth == 0 {
            features -= Features::PASSTHROUGH;
        }
        let max_write = config.max_write.max(4096);
        let max_pages = u16::try_from(max_write.div_ceil(4096)).unwrap_or(u16::MAX);
        // A kernel older than 7.40 reads max_stack_depth as unused.
        let out = wire::InitOut {
            major: wire::MAJOR,
            minor: wire::MINOR,
            max_readahead: init.max_readahead,
            flags: features.bits() as u32,
            max_background: config.max_background,
            congestion_threshold: config.max_background - config.max_background / 4,
            max_write,
            time_gran: 1,
            max_pages,
            flags2: (features.bits() >> 32) as u32,
            max_stack_depth: if features.contains(Features::PASSTHROUGH) {
                config.max_stack_depth
            } else {
                0
            },
            ..wire::InitOut::default()
        };
        write_first(fd.as_fd(), header.unique, &out)?;
        Ok(Self::resume(
            fd,
            Negotiated {
                kernel_minor: init.minor,
                features,
                max_write,
            },
            config,
        ))
    }

    /// Takes over the descriptor of a connection that another process negotiated. Follow it with [`Connection::notify_resend`] to get the requests
    /// that process had read and not answered.
    pub fn resume(fd: OwnedFd, negotiated: Negotiated, config: &Config) -> Self {
        let shared = Arc::new(Shared::new(fd, negotiated, config.interrupt_grace));
        monitor::watch_connection(Arc::downgrade(&shared));
        Self { shared }
    }

    /// What both sides can do.
    pub fn features(&self) -> Features {
        self.shared.negotiated().features
    }

    /// What was agreed on at the start.
    pub fn negotiated(&self) -> Negotiated {
        self.shared.negotiated()
    }

    /// Whether opens can be joined to a backing file; registering one also needs `CAP_SYS_ADMIN` in the initial user namespace.
    pub fn has_passthrough(&self) -> bool {
        self.features().contains(Features::PASSTHROUGH)
    }

    /// Whether a serving thread has seen the end of the connection.
    pub fn has_ended(&self) -> bool {
        self.shared.has_ended()
    }

    /// How many requests were read and not yet answered.
    pub fn in_flight(&self) -> usize {
        self.shared.table().len()
    }

    /// A buffer fit for this connection.
    pub fn buffer(&self) -> Buffer {
        let size = self.shared.negotiated().max_write as usize + 4096;
        Buffer {
            bytes: vec![0; size.max(wire::MIN_READ_BUFFER)],
        }
    }

    /// Reads one request and hands it to `handler`. Waits for one unless the descriptor is non-blocking. A panic of the handler passes through; the
    /// request's reply, dropped by it, has then answered EIO.
    ///
    /// # Errors
    /// EINVAL for a buffer of another connection that is too small. The end of the connection is no error but [`Served::Ended`].
    pub fn serve_one(&self, buffer: &mut Buffer, handler: &dyn Handler) -> Result<Served, Errno> {
        match self.receive(buffer)? {
            Received::Message(length) => {
                self.dispatch(buffer.bytes.get(..length).unwrap_or_default(), handler);
                Ok(Served::Request)
            }
            Received::Not(served) => Ok(served),
        }
    }

    /// Serves requests on this thread until the connection ends. One thread alone cannot see the INTERRUPT of the request it is busy with: use
    /// [`crate::Workers`] where a handler can be slow.
    ///
    /// # Errors
    /// As [`Connection::serve_one`].
    pub fn serve_loop(&self, handler: &dyn Handler) -> Result<(), Errno> {
        let mut buffer = self.buffer();
        loop {
            match self.serve_one(&mut buffer, handler)? {
                Served::Ended => return Ok(()),
                Served::WouldBlock => wait_readable(self.shared.fd())?,
                Served::Request | Served::Nothing => {}
            }
        }
    }

    /// Makes reads return [`Served::WouldBlock`] instead of waiting, so that one epoll thread can serve many connections. A property of the open
    /// file: it holds for every thread and every process that has the descriptor.
    ///
    /// # Errors
    /// None that are known.
    pub fn set_nonblocking(&self, nonblocking: bool) -> Result<(), Errno> {
        rustix::io::ioctl_fionbio(self.shared.fd(), nonblocking)
    }

    pub(crate) fn receive(&self, buffer: &mut Buffer) -> Result<Received, Errno> {
        match rustix::io::read(self.shared.fd(), &mut buffer.bytes[..]) {
            Ok(length) => Ok(Received::Message(length)),
            // ENOENT: the request was aborted while it was being read.
            Err(Errno::INTR | Errno::NOENT) => Ok(Received::Not(Served::Nothing)),
            Err(Errno::AGAIN) => Ok(Received::Not(Served::WouldBlock)),
            Err(Errno::NODEV | Errno::CONNABORTED) => {
                self.shared.end();
                Ok(Received::Not(Served::Ended))
            }
            Err(errno) => Err(errno),
        }
    }

    /// Enters a request as under way.
    pub(crate) fn register(&self, header: &wire::InHeader) -> Reply {
        Reply::new(&self.shared, header.unique, header.opcode)
    }

    pub(crate) fn dispatch(&self, message: &[u8], handler: &dyn Handler) {
        let parsed = parse(message, |header| self.register(header));
        match parsed {
            Ok(Message::Request(request)) => {
                let _serving = Serving::enter(&self.shared);
                handler.handle(request);
            }
            Ok(Message::Interrupt(target)) => {
                let _serving = Serving::enter(&self.shared);
                if let Some(header) = header(message) {
                    self.shared.interrupt(header.unique, target);
                }
            }
            Err(error) => {
                if let Some(header) = header(message) {
                    let errno = if error == ParseError::Unknown {
                        Errno::NOSYS
                    } else {
                        Errno::IO
                    };
                    self.shared
                        .answer(header.unique, header.opcode, Some(errno), &[]);
                }
            }
        }
    }

    /// To be called inside a request by the thread that serves it, before it waits for an answer that this same connection has to give: another thread
    /// reads in its place at once, not only when it has been stuck for a while. On any other thread it does nothing.
    ///
    /// # Errors
    /// EAGAIN: there can be no other thread now. Who waits all the same may wait for ever.
    pub fn hand_over(&self) -> Result<(), Errno> {
        if SERVING.get() != Arc::as_ptr(&self.shared).addr() {
            return Ok(());
        }
        workers::hand_over(self)
    }

    /// Whether both are one connection.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    /// Drops the kernel's cached attributes of a node, and its cached pages from `offset` for `length` bytes (0: to the end; a negative offset: none).
    ///
    /// # Errors
    /// ENOENT when the kernel does not know the node. EDEADLK on a thread that is serving this connection: the kernel may wait here for an answer that
    /// only this thread could give.
    pub fn notify_inval_inode(&self, node: u64, offset: i64, length: i64) -> Result<(), Errno> {
        self.notify(
            notify::INVAL_INODE,
            &[wire::NotifyInvalInodeOut {
                ino: node,
                off: offset,
                len: length,
            }
            .as_bytes()],
        )
    }

    /// Makes the kernel forget the name `name` in the directory `parent`. What is mounted on it is detached, in every mount namespace.
    ///
    /// # Errors
    /// ENOENT when the kernel does not know the name, EDEADLK as [`Connection::notify_inval_inode`].
    pub fn notify_inval_entry(&self, parent: u64, name: &OsStr) -> Result<(), Errno> {
        let out = wire::NotifyInvalEntryOut {
            parent,
            namelen: name_length(name)?,
            flags: 0,
        };
        self.notify(
            notify::INVAL_ENTRY,
            &[out.as_bytes(), name.as_bytes(), &[0]],
        )
    }

    /// Tells the kernel that the name was removed: like [`Connection::notify_inval_entry`], and watchers (inotify) see a delete.
    ///
    /// # Errors
    /// ENOENT when the kernel does not know the name or it is not `child`, ENOTEMPTY for a directory with children in use, EDEADLK as
    /// [`Connection::notify_inval_inode`].
    pub fn notify_delete(&self, parent: u64, child: u64, name: &OsStr) -> Result<(), Errno> {
        let out = wire::NotifyDeleteOut {
            parent,
            child,
            namelen: name_length(name)?,
            padding: 0,
        };
        self.notify(notify::DELETE, &[out.as_bytes(), name.as_bytes(), &[0]])
    }

    /// Tells those who poll an open file to ask again; `kh` is from the POLL request.
    ///
    /// # Errors
    /// Those of a connection that has ended.
    pub fn notify_poll(&self, kh: u64) -> Result<(), Errno> {
        // Takes no lock that a client's request could hold, so it may come from any thread.
        self.send_notice(notify::POLL, &[wire::NotifyPollOut { kh }.as_bytes()])
    }

    /// Asks for every request that was read and not answered once more, marked as resent. For a process that took over the descriptor.
    ///
    /// # Errors
    /// EINVAL on kernels before 6.9.
    pub fn notify_resend(&self) -> Result<(), Errno> {
        self.send_notice(notify::RESEND, &[])
    }

    fn notify(&self, code: i32, parts: &[&[u8]]) -> Result<(), Errno> {
        if SERVING.get() == Arc::as_ptr(&self.shared).addr() {
            return Err(Errno::DEADLK);
        }
        self.send_notice(code, parts)
    }

    fn send_notice(&self, code: i32, parts: &[&[u8]]) -> Result<(), Errno> {
        let parts: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
        self.shared.write(0, code, &parts)
    }

    /// Registers a file as backing for passthrough opens.
    ///
    /// # Errors
    /// EPERM without `CAP_SYS_ADMIN` in the initial user namespace or without negotiated passthrough, ENOTTY before Linux 6.9, ELOOP for a file whose
    /// file system is stacked too deep, EOPNOTSUPP for a file that cannot be read and written directly.
    pub fn backing_open(&self, file: BorrowedFd<'_>) -> Result<BackingId, Errno> {
        BackingId::open(&self.shared, file)
    }

    pub(crate) fn weak(&self) -> Weak<Shared> {
        Arc::downgrade(&self.shared)
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.fd()
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("fd", &self.shared.fd())
            .field("negotiated", &self.shared.negotiated())
            .finish_non_exhaustive()
    }
}

/// What a read of the descriptor gave.
pub(crate) enum Received {
    /// A message of this length.
    Message(usize),
    /// None, and why.
    Not(Served),
}

impl Buffer {
    pub(crate) fn message(&self, length: usize) -> &[u8] {
        self.bytes.get(..length).unwrap_or_default()
    }
}

/// Marks the thread as serving a connection while it lives; restores what was before, also after a panic.
struct Serving {
    before: usize,
}

impl Serving {
    fn enter(shared: &Arc<Shared>) -> Self {
        Self {
            before: SERVING.replace(Arc::as_ptr(shared).addr()),
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        SERVING.set(self.before);
    }
}

fn name_length(name: &OsStr) -> Result<u32, Errno> {
    u32::try_from(name.len()).map_err(|_| Errno::NAMETOOLONG)
}

fn write_first(fd: BorrowedFd<'_>, unique: u64, out: &wire::InitOut) -> Result<(), Errno> {
    let header = wire::OutHeader {
        len: (size_of::<wire::OutHeader>() + size_of::<wire::InitOut>()) as u32,
        error: 0,
        unique,
    };
    rustix::io::writev(
        fd,
        &[
            IoSlice::new(header.as_bytes()),
            IoSlice::new(out.as_bytes()),
        ],
    )
    .map(|_| ())
}

pub(crate) fn wait_readable(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    match rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::IN)], None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno),
    }
}
