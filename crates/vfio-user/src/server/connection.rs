//! One connection: a value that whoever serves it owns, and that rests in the hub in between.

use super::hub::Hub;
use super::link::{Link, Pipe, Terms};
use super::offer::{OfferState, Who};
use super::session::{Reply, Session};
use crate::receiver::{Message, Receiver};
use crate::socket;
use crate::version::Hello;
use crate::windows::Windows;
use crate::wire::{command, flags};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, socketpair};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vfio_core::{Errno, Result};
use zerocopy::IntoBytes;

/// How long a thread waits for the next message of a connection that has been busy. After that the
/// connection rests, and the next message costs one turn at the epoll set more.
const LINGER: Duration = Duration::from_millis(100);

/// How long a client that is polled may be silent before it rests as well.
const SILENCE: Duration = Duration::from_secs(1);

/// How long a client may take to say VERSION.
const HELLO: Duration = Duration::from_secs(10);

/// How long a client may leave our replies unread before it is closed: QEMU has given up by then.
const UNREAD: Duration = Duration::from_secs(5);

/// How a turn of serving ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Nothing to do until something comes.
    Read,
    /// Nothing to do until the client reads what is there for it.
    Write,
    /// It is over.
    Closed,
}

/// Which of a client's sockets it is.
#[derive(Debug)]
enum Role {
    /// The one it connected with.
    Main {
        offer: Arc<OfferState>,
        who: Who,
        /// From VERSION on.
        session: Option<Session>,
    },
    /// The one it asked for, for our commands: only replies come here.
    Twin,
}

#[derive(Debug)]
pub(super) struct Connection {
    link: Arc<Link>,
    role: Role,
    receiver: Receiver,
    reply: Reply,
    /// When it has waited too long, if it waits for something that must come.
    deadline: Option<Instant>,
    /// Whether its offer wants it polled.
    polls: bool,
}

/// A link's socket, which lives as long as somebody has the link.
pub(super) struct SharedSocket(Arc<Link>, bool);

impl AsFd for SharedSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        pipe(&self.0, self.1).as_fd()
    }
}

fn pipe(link: &Link, is_twin: bool) -> &Pipe {
    match link.twin() {
        Some(twin) if is_twin => twin,
        _ => &link.main,
    }
}

impl Connection {
    pub(super) fn new(
        socket: OwnedFd,
        offer: &Arc<OfferState>,
        who: Who,
        hub: &Hub,
    ) -> Result<Box<Connection>> {
        set_socket_timeout(&socket, Timeout::Recv, Some(LINGER))?;
        let windows = Windows::new(hub.options.windows, hub.options.files);
        Ok(Box::new(Connection {
            link: Link::new(socket, windows),
            role: Role::Main {
                offer: Arc::clone(offer),
                who,
                session: None,
            },
            receiver: Receiver::new(),
            reply: Reply::default(),
            deadline: Some(Instant::now() + HELLO),
            polls: offer.options().poll,
        }))
    }

    fn twin(link: &Arc<Link>) -> Box<Connection> {
        Box::new(Connection {
            link: Arc::clone(link),
            role: Role::Twin,
            receiver: Receiver::new(),
            reply: Reply::default(),
            deadline: None,
            polls: false,
        })
    }

    pub(super) fn link(&self) -> &Arc<Link> {
        &self.link
    }

    fn is_twin(&self) -> bool {
        matches!(self.role, Role::Twin)
    }

    fn pipe(&self) -> &Pipe {
        pipe(&self.link, self.is_twin())
    }

    pub(super) fn shared_socket(&self) -> SharedSocket {
        SharedSocket(Arc::clone(&self.link), self.is_twin())
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Its deadline is over: it is about to be dropped.
    pub(super) fn too_late(&mut self) {
        if let Role::Main {
            offer,
            who,
            session,
        } = &self.role
        {
            if session.is_some() {
                tracing::warn!(
                    "{offer}: {who} does not read its replies; the connection is closed"
                );
            } else {
                offer.refuse(who, Errno::TIMEDOUT, "it said nothing".into());
            }
        }
    }

    /// Serves what there is, and what comes within a moment.
    pub(super) fn serve(&mut self, hub: &Arc<Hub>) -> Next {
        match self.turn(hub) {
            Ok(next) => next,
            Err(errno) => {
                if let Role::Main { offer, who, .. } = &self.role
                    && !matches!(errno, Errno::PIPE | Errno::CONNRESET)
                {
                    tracing::warn!("{offer}: the connection of {who} is closed: {errno}");
                }
                Next::Closed
            }
        }
    }

    fn turn(&mut self, hub: &Arc<Hub>) -> Result<Next> {
        if !self.pipe().flush()? {
            return Ok(self.must_wait());
        }
        let mut polling = None;
        let mut silent_since = None;
        loop {
            while self.step(hub)? {
                if self.pipe().has_unsent() && !self.pipe().flush()? {
                    return Ok(self.must_wait());
                }
            }
            if self.polls && polling.is_none() && self.has_session() {
                polling = hub.poll();
            }
            let blocks = polling.is_none() && hub.may_block();
            let flags = if blocks {
                RecvFlags::empty()
            } else {
                RecvFlags::DONTWAIT
            };
            let socket = pipe(&self.link, self.is_twin());
            match socket::receive(socket, self.receiver.room(), flags) {
                Ok(got) if got.bytes == 0 => return Ok(Next::Closed),
                Ok(got) => {
                    self.receiver.fed(got.bytes, got.fds, got.lost);
                    silent_since = None;
                    // Also of one that says it byte by byte, and never rests.
                    if !self.has_session() && self.deadline.is_some_and(|end| end < Instant::now())
                    {
                        self.too_late();
                        return Ok(Next::Closed);
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if polling.is_some() && !hub.is_left() => {
                    let now = Instant::now();
                    if now - *silent_since.get_or_insert(now) > SILENCE {
                        return Ok(self.rest());
                    }
                    // Whoever else wants this processor has it first, the client above all.
                    std::thread::yield_now();
                }
                Err(Errno::AGAIN) => return Ok(self.rest()),
                Err(errno) => return Err(errno),
            }
            if hub.is_stopped() {
                return Ok(Next::Closed);
            }
        }
    }

    /// Nothing has come for a while.
    fn rest(&mut self) -> Next {
        self.receiver.shrink();
        self.reply = Reply::default();
        if self.has_session() {
            self.deadline = None;
        }
        Next::Read
    }

    fn must_wait(&mut self) -> Next {
        self.deadline = Some(Instant::now() + UNREAD);
        Next::Write
    }

    fn has_session(&self) -> bool {
        match &self.role {
            Role::Main { session, .. } => session.is_some(),
            Role::Twin => true,
        }
    }

    /// Takes one message; false if there is none. An error is the connection's end.
    fn step(&mut self, hub: &Arc<Hub>) -> Result<bool> {
        let Connection {
            link,
            role,
            receiver,
            reply,
            ..
        } = self;
        let Some(message) = receiver.next()? else {
            return Ok(false);
        };
        let header = message.header;
        if header.is_reply() {
            if message.refused.is_none() {
                link.reply(&header, message.payload);
            }
            return Ok(true);
        }
        let Role::Main {
            offer,
            who,
            session,
        } = role
        else {
            // Commands come on the other socket.
            return Err(Errno::PROTO);
        };
        let pipe = &link.main;
        let refused = match message.refused {
            Some(errno) => Some(errno),
            None if header.flags & flags::TYPE != flags::COMMAND => Some(Errno::INVAL),
            None => None,
        };
        if let Some(errno) = refused {
            if !header.no_reply() {
                pipe.send(header.refusal(errno).as_bytes(), None)?;
            }
            return Ok(true);
        }
        let Some(session) = session else {
            // Whoever does not begin with VERSION, or says what cannot be, is no client.
            let (opened, twin) = match hello(link, offer, who, message, reply) {
                Ok(opened) => opened,
                Err((errno, reason)) => {
                    // Whoever hears of it can look it up.
                    offer.refuse(who, errno, reason);
                    let _ = pipe.send(header.refusal(errno).as_bytes(), None);
                    return Err(Errno::PIPE);
                }
            };
            *session = Some(opened);
            let fd = reply.fd.take();
            pipe.send(reply.finish(&header), fd)?;
            if twin {
                hub.add_connection(Connection::twin(link))?;
            }
            return Ok(true);
        };
        reply.clear();
        let done = {
            let _serving = link.serving();
            session.run(&header, message.payload, message.fds, reply)
        };
        if header.no_reply() {
            return Ok(true);
        }
        match done {
            Ok(()) => {
                let fd = reply.fd.take();
                pipe.send(reply.finish(&header), fd)?;
            }
            Err(errno) => pipe.send(header.refusal(errno).as_bytes(), None)?,
        }
        Ok(true)
    }
}

type Refused = (Errno, String);

/// VERSION: the client gets the device, or is told why not. True with a second socket.
fn hello(
    link: &Arc<Link>,
    offer: &Arc<OfferState>,
    who: &Who,
    message: Message<'_>,
    reply: &mut Reply,
) -> Result<(Session, bool), Refused> {
    if message.header.command != command::VERSION {
        let reason = format!(
            "it began with command {}, not with VERSION",
            message.header.command
        );
        return Err((Errno::INVAL, reason));
    }
    let hello = Hello::parse(message.payload).map_err(|errno| {
        let what = match errno {
            Errno::PROTONOSUPPORT => "it speaks another major version than 0",
            _ => "its VERSION makes no sense",
        };
        (errno, what.to_owned())
    })?;
    let mut twin = None;
    reply.clear();
    if hello.twin && hello.msg_fds > 0 {
        let flags = SocketFlags::CLOEXEC;
        let pair = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None);
        let pair = pair.and_then(|(ours, theirs)| {
            set_socket_timeout(&ours, Timeout::Recv, Some(LINGER))?;
            Ok((ours, theirs))
        });
        let (ours, theirs) =
            pair.map_err(|errno| (errno, "there is no second socket to be had".into()))?;
        twin = Some(ours);
        reply.fd = Some(theirs);
    }
    // Last of what can fail: whoever is admitted has the device, and leaves it.
    let file = offer.admit(link, who, hello.kind)?;
    let has_twin = twin.is_some();
    reply.push(&hello.answer(message.payload.len(), has_twin));
    let terms = Terms {
        kind: hello.kind,
        max_data: hello.max_data,
    };
    link.agree(terms, twin);
    let session = Session {
        file,
        link: Arc::clone(link),
        kind: hello.kind,
        takes_fds: hello.msg_fds > 0,
    };
    Ok((session, has_twin))
}

impl Drop for Connection {
    /// The client is gone, or is made to be. Its device is closed, which is when the driver's `close`
    /// runs with the DMA space still there, then its memory and its files are let go of.
    fn drop(&mut self) {
        if let Role::Main {
            offer,
            who,
            session,
        } = &mut self.role
        {
            if session.is_none() {
                // Not before the refusal has gone out.
                let _ = self.link.main.flush();
            }
            self.link.shutdown();
            if let Some(session) = session.take() {
                session.file.release();
                drop(session);
                self.link.windows.clear();
                offer.leave(&self.link, who);
            }
            offer.forget(&self.link);
        }
    }
}
