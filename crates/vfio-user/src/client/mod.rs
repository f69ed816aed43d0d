//! The other half: a client, to test servers with.
//!
//! One request at a time, each waited for with a deadline; commands of the server that come meanwhile
//! are answered from the [`Memory`] given to [`Client::set_memory`]. It checks what it gets: a reply that
//! does not fit its request is [`Error::Protocol`].

mod commands;

use crate::receiver::Receiver;
use crate::socket;
use crate::wire::{DmaAccess, HEADER, Header, MAX_DATA, Version, command, flags, take};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::RecvFlags;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use vfio_core::Errno;
use vfio_uapi::caps::SparseMmapArea;
use vfio_uapi::device::RegionInfo;
use zerocopy::{FromBytes, IntoBytes};

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket failed.
    #[error("the socket failed")]
    Socket(#[source] io::Error),
    /// The server answered with an errno.
    #[error("the server refused it: {0}")]
    Refused(Errno),
    /// The server has closed the connection.
    #[error("the server has closed the connection")]
    Closed,
    /// No answer within the client's patience.
    #[error("no answer in time")]
    Late,
    /// What came makes no sense.
    #[error("the server broke the protocol: {0}")]
    Protocol(String),
}

/// Results here.
pub type Result<T = (), E = Error> = std::result::Result<T, E>;

impl From<Errno> for Error {
    fn from(errno: Errno) -> Error {
        match errno {
            Errno::PIPE | Errno::CONNRESET => Error::Closed,
            errno => Error::Socket(errno.into()),
        }
    }
}

impl Error {
    /// The errno of a refusal.
    pub fn refused(&self) -> Option<Errno> {
        match self {
            Error::Refused(errno) => Some(*errno),
            _ => None,
        }
    }
}

/// What a server reaches by DMA_READ and DMA_WRITE.
pub trait Memory: Send {
    /// Fills `buf` from an address; the errno goes to the server.
    fn read(&mut self, address: u64, buf: &mut [u8]) -> Result<(), Errno>;
    /// Writes `data` to an address; as [`read`](Memory::read).
    fn write(&mut self, address: u64, data: &[u8]) -> Result<(), Errno>;
}

/// What to say first.
#[derive(Clone, Debug)]
pub struct Hello {
    /// Minor version.
    pub minor: u16,
    /// The JSON text, without its NUL; `None` to send none.
    pub json: Option<String>,
}

impl Default for Hello {
    /// Everything this client can do.
    fn default() -> Hello {
        let json = serde_json::json!({"capabilities": {
            "max_msg_fds": 16,
            "max_data_xfer_size": MAX_DATA,
            "max_dma_maps": 65_535,
            "pgsizes": 4096,
            "write_multiple": true,
        }});
        Hello {
            minor: 1,
            json: Some(json.to_string()),
        }
    }
}

/// A reply.
#[derive(Debug)]
pub struct Reply {
    /// What follows the header.
    pub payload: Vec<u8>,
    /// What came with it.
    pub fds: Vec<OwnedFd>,
}

/// A region, with what its capabilities say.
#[derive(Debug)]
pub struct Region {
    /// The structure.
    pub info: RegionInfo,
    /// Parts that can be mapped; empty: all of it, if the flag is set.
    pub areas: Vec<SparseMmapArea>,
    /// What to map, from `info.offset` on.
    pub fd: Option<OwnedFd>,
}

/// A connection.
pub struct Client {
    socket: UnixStream,
    receiver: Receiver,
    twin: Option<(OwnedFd, Receiver)>,
    next: u16,
    patience: Duration,
    memory: Option<Box<dyn Memory>>,
    /// What the server answered to VERSION.
    minor: u16,
    capabilities: serde_json::Value,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("minor", &self.minor)
            .field("capabilities", &self.capabilities)
            .finish_non_exhaustive()
    }
}

impl Client {
    /// Connects, and says what [`Hello::default`] says.
    ///
    /// # Errors
    /// [`Error::Socket`] nobody listens; [`Error::Refused`] `EBUSY`: somebody else has the device.
    pub fn connect(path: impl AsRef<Path>) -> Result<Client> {
        let socket = UnixStream::connect(path).map_err(Error::Socket)?;
        Client::greet(socket, &Hello::default())
    }

    /// Says VERSION on a connected socket.
    ///
    /// # Errors
    /// As [`connect`](Client::connect).
    pub fn greet(socket: UnixStream, hello: &Hello) -> Result<Client> {
        let mut client = Client {
            socket,
            receiver: Receiver::new(),
            twin: None,
            next: 0,
            patience: Duration::from_secs(20),
            memory: None,
            minor: 0,
            capabilities: serde_json::Value::Null,
        };
        let version = Version {
            major: 0,
            minor: hello.minor,
        };
        let mut payload = version.as_bytes().to_vec();
        if let Some(json) = &hello.json {
            payload.extend(json.as_bytes());
            payload.push(0);
        }
        let mut reply = client.call(command::VERSION, &payload, &[])?;
        let (version, text) = fixed::<Version>(&reply.payload)?;
        if version.major != 0 || version.minor > hello.minor {
            return Err(Error::Protocol(format!("it speaks {version:?}")));
        }
        client.minor = version.minor;
        if let Some((0, json)) = text.split_last() {
            let said: serde_json::Value = serde_json::from_slice(json)
                .map_err(|error| Error::Protocol(format!("its VERSION is no JSON: {error}")))?;
            client.capabilities = said["capabilities"].clone();
        }
        if client.capabilities["twin_socket"]["supported"] == true {
            let fd = reply.fds.pop();
            let fd = fd.ok_or_else(|| Error::Protocol("a twin socket without one".into()))?;
            client.twin = Some((fd, Receiver::new()));
        }
        Ok(client)
    }

    /// How long to wait for an answer; 20 s at first.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// What the server's DMA_READ and DMA_WRITE reach. Without it they are refused (`ENODEV`).
    pub fn set_memory(&mut self, memory: impl Memory + 'static) {
        self.memory = Some(Box::new(memory));
    }

    /// The server's minor version.
    pub fn minor(&self) -> u16 {
        self.minor
    }

    /// The server's capabilities; null if it said none.
    pub fn capabilities(&self) -> &serde_json::Value {
        &self.capabilities
    }

    /// The socket, for what this client does not do.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Sends a command and waits for its reply.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub fn call(&mut self, command: u16, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Reply> {
        let id = self.send(command, 0, payload, fds)?;
        self.wait(id, command)
    }

    /// Sends a command that wants no reply.
    ///
    /// # Errors
    /// [`Error::Socket`], [`Error::Closed`].
    pub fn post(&mut self, command: u16, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result {
        self.send(command, flags::NO_REPLY, payload, fds).map(drop)
    }

    /// Sends a command and does not wait: its id, for [`wait`](Client::wait).
    ///
    /// # Errors
    /// [`Error::Socket`], [`Error::Closed`], [`Error::Late`].
    pub fn send(
        &mut self,
        command: u16,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<u16> {
        self.next = self.next.wrapping_add(1);
        let header = Header {
            id: self.next,
            command,
            size: (HEADER + payload.len()) as u32,
            flags,
            error: 0,
        };
        let message = [header.as_bytes(), payload].concat();
        send_all(&self.socket, &message, fds, self.patience)?;
        Ok(header.id)
    }

    /// Waits for the reply to a command, and answers what the server asks meanwhile.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub fn wait(&mut self, id: u16, command: u16) -> Result<Reply> {
        let deadline = Instant::now() + self.patience;
        loop {
            if let Some((header, reply)) = self.take(deadline)? {
                if header.id != id || header.command != command {
                    return Err(Error::Protocol(format!("a reply to nothing: {header:?}")));
                }
                return match header.errno() {
                    Some(_) if !reply.payload.is_empty() => {
                        Err(Error::Protocol("an error reply with a payload".into()))
                    }
                    Some(errno) => Err(Error::Refused(errno)),
                    None => Ok(reply),
                };
            }
        }
    }

    /// Answers what the server asks for so long; how many commands that were.
    ///
    /// # Errors
    /// Any of [`Error`] but [`Error::Late`].
    pub fn answer_for(&mut self, time: Duration) -> Result<usize> {
        let deadline = Instant::now() + time;
        let mut count = 0;
        loop {
            match self.take(deadline) {
                Ok(None) => count += 1,
                Ok(Some((header, _))) => {
                    return Err(Error::Protocol(format!("a reply to nothing: {header:?}")));
                }
                Err(Error::Late) => return Ok(count),
                Err(error) => return Err(error),
            }
        }
    }

    /// One message from either socket: a reply, or `None` after a command was answered.
    fn take(&mut self, deadline: Instant) -> Result<Option<(Header, Reply)>> {
        loop {
            let Client {
                socket,
                receiver,
                twin,
                memory,
                ..
            } = self;
            if let Some((header, reply)) = message(receiver)? {
                if header.is_reply() {
                    return Ok(Some((header, reply)));
                }
                answer(
                    socket.as_fd(),
                    memory.as_deref_mut(),
                    &header,
                    &reply,
                    self.patience,
                )?;
                return Ok(None);
            }
            if let Some((twin, receiver)) = twin
                && let Some((header, asked)) = message(receiver)?
            {
                answer(
                    twin.as_fd(),
                    memory.as_deref_mut(),
                    &header,
                    &asked,
                    self.patience,
                )?;
                return Ok(None);
            }
            let mut ready = vec![PollFd::new(socket, PollFlags::IN)];
            if let Some((twin, _)) = &*twin {
                ready.push(PollFd::from_borrowed_fd(twin.as_fd(), PollFlags::IN));
            }
            wait_until(&mut ready, deadline)?;
            let has_twin = ready.get(1).is_some_and(|fd| !fd.revents().is_empty());
            let has_main = !ready[0].revents().is_empty();
            drop(ready);
            match twin {
                Some((twin, receiver)) if has_twin && !has_main => fill(twin, receiver)?,
                _ => fill(socket, receiver)?,
            }
        }
    }
}

fn fixed<T: FromBytes>(payload: &[u8]) -> Result<(T, &[u8])> {
    take(payload).map_err(|_| Error::Protocol("a reply that is too short".into()))
}

/// The next message that is there.
fn message(receiver: &mut Receiver) -> Result<Option<(Header, Reply)>> {
    let broken = |_| Error::Protocol("a message that is shorter than its header".into());
    Ok(receiver.next().map_err(broken)?.map(|message| {
        let reply = Reply {
            payload: message.payload.to_vec(),
            fds: message.fds,
        };
        (message.header, reply)
    }))
}

fn fill(socket: impl AsFd, receiver: &mut Receiver) -> Result {
    match socket::receive(socket, receiver.room(), RecvFlags::DONTWAIT) {
        Ok(got) if got.bytes == 0 => Err(Error::Closed),
        Ok(got) => {
            receiver.fed(got.bytes, got.fds, got.lost);
            Ok(())
        }
        Err(Errno::AGAIN | Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn wait_until(ready: &mut [PollFd<'_>], deadline: Instant) -> Result {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(Error::Late);
    }
    let left = Timespec {
        tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: i64::from(left.subsec_nanos()),
    };
    match poll(ready, Some(&left)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn send_all(
    socket: impl AsFd,
    message: &[u8],
    fds: &[BorrowedFd<'_>],
    patience: Duration,
) -> Result {
    let deadline = Instant::now() + patience;
    let mut gone = 0;
    while gone < message.len() {
        let fds = if gone == 0 { fds } else { &[] };
        match socket::send(&socket, &message[gone..], fds) {
            Ok(sent) => gone += sent,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                wait_until(&mut [PollFd::new(&socket, PollFlags::OUT)], deadline)?;
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Answers DMA_READ and DMA_WRITE; anything else is `ENOSYS`, as QEMU has it.
fn answer(
    socket: BorrowedFd<'_>,
    memory: Option<&mut (dyn Memory + 'static)>,
    header: &Header,
    asked: &Reply,
    patience: Duration,
) -> Result {
    let served = || -> Result<Vec<u8>, Errno> {
        if !matches!(header.command, command::DMA_READ | command::DMA_WRITE) {
            return Err(Errno::NOSYS);
        }
        let memory = memory.ok_or(Errno::NODEV)?;
        let (access, data) = take::<DmaAccess>(&asked.payload)?;
        let count = usize::try_from(access.count).map_err(|_| Errno::TOOBIG)?;
        if count > MAX_DATA {
            return Err(Errno::TOOBIG);
        }
        let mut reply = access.as_bytes().to_vec();
        if header.command == command::DMA_READ {
            let mut buf = vec![0; count];
            memory.read(access.address, &mut buf)?;
            reply.extend(buf);
        } else {
            memory.write(access.address, data.get(..count).ok_or(Errno::TOOBIG)?)?;
        }
        Ok(reply)
    }();
    if header.no_reply() {
        return Ok(());
    }
    let message = match served {
        Ok(payload) => [header.reply(payload.len()).as_bytes(), &payload].concat(),
        Err(errno) => header.refusal(errno).as_bytes().to_vec(),
    };
    send_all(socket, &message, &[], patience)
}
