//! A connection as others see it: the thread that serves it, and the driver's threads that reach the
//! client's memory through it.

use super::ClientKind;
use crate::socket;
use crate::windows::{Access, Windows};
use crate::wire::{DmaAccess, HEADER, Header, command, take};
use dma_memory::SharedFile;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use vfio_core::device::DmaSpace;
use vfio_core::{Errno, Result};
use zerocopy::{FromBytes, IntoBytes};

/// How long a client may take to answer a command of ours. Less than the 5 s after which QEMU gives
/// up on an answer of ours that may depend on it.
const PATIENCE: Duration = Duration::from_secs(4);

/// Most bytes that wait for a client to read. One reply and the commands of a driver's threads come
/// nowhere near it.
const UNSENT_MAX: usize = 16 << 20;

thread_local! {
    /// The link whose command this thread is in, by its address.
    static SERVING: Cell<usize> = const { Cell::new(0) };
}

/// While it lives, this thread is inside a command of the link's client.
#[derive(Debug)]
pub(super) struct Serving(usize);

impl Drop for Serving {
    fn drop(&mut self) {
        SERVING.set(self.0);
    }
}

/// A socket and what could not be sent on it yet.
#[derive(Debug)]
pub(super) struct Pipe {
    socket: OwnedFd,
    unsent: Mutex<Unsent>,
    /// Looked at without the lock, which the ordinary case never takes for long.
    has_unsent: AtomicBool,
}

#[derive(Debug, Default)]
struct Unsent {
    messages: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
    /// Bytes of the first one that went already.
    gone: usize,
    total: usize,
}

/// What both sides of one connection share.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) main: Pipe,
    /// For commands to the client, where it asked for it.
    twin: OnceLock<Pipe>,
    pub(super) windows: Windows,
    calls: Mutex<Calls>,
    answered: Condvar,
    terms: OnceLock<Terms>,
    /// Whether a QEMU counts DMA messages in 64 bits.
    is_wide: OnceLock<bool>,
}

/// What VERSION settled.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    pub(super) kind: ClientKind,
    /// Bytes of DMA the client takes in one message.
    pub(super) max_data: usize,
}

/// Commands to the client that are not answered yet.
#[derive(Debug, Default)]
struct Calls {
    next: u16,
    waiting: HashMap<u16, Call>,
    is_closed: bool,
}

#[derive(Debug)]
struct Call {
    command: u16,
    iova: u64,
    len: u64,
    done: Option<Result<Vec<u8>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pipe {
    pub(super) fn new(socket: OwnedFd) -> Pipe {
        Pipe {
            socket,
            unsent: Mutex::default(),
            has_unsent: AtomicBool::new(false),
        }
    }

    /// Sends a message or, where the client does not read, keeps it for [`flush`](Pipe::flush).
    /// `ENOBUFS` when the client has not read for too long; any error is the connection's end.
    pub(super) fn send(&self, bytes: &[u8], fd: Option<OwnedFd>) -> Result {
        let mut unsent = lock(&self.unsent);
        let mut gone = 0;
        let fds: Vec<OwnedFd> = fd.into_iter().collect();
        if unsent.messages.is_empty() {
            let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            match retry(|| socket::send(&self.socket, bytes, &borrowed)) {
                Ok(sent) if sent == bytes.len() => return Ok(()),
                Ok(sent) => gone = sent,
                Err(Errno::AGAIN) => {}
                Err(errno) => return Err(errno),
            }
            unsent.gone = gone;
        }
        // What has begun to go out must go on: only then nothing else waits.
        if unsent.total + bytes.len() > UNSENT_MAX {
            return Err(Errno::NOBUFS);
        }
        unsent.total += bytes.len();
        let fds = if gone > 0 { Vec::new() } else { fds };
        unsent.messages.push_back((bytes.to_vec(), fds));
        self.has_unsent.store(true, Ordering::Release);
        Ok(())
    }

    /// Sends what was kept. False if some of it still cannot go.
    pub(super) fn flush(&self) -> Result<bool> {
        if !self.has_unsent() {
            return Ok(true);
        }
        let mut unsent = lock(&self.unsent);
        let unsent = &mut *unsent;
        while let Some((bytes, fds)) = unsent.messages.front_mut() {
            let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            let rest = &bytes[unsent.gone..];
            match retry(|| socket::send(&self.socket, rest, &borrowed)) {
                Ok(sent) if sent == rest.len() => {
                    unsent.total -= bytes.len();
                    unsent.gone = 0;
                    unsent.messages.pop_front();
                }
                Ok(sent) => {
                    unsent.gone += sent;
                    fds.clear();
                }
                Err(Errno::AGAIN) => return Ok(false),
                Err(errno) => return Err(errno),
            }
        }
        self.has_unsent.store(false, Ordering::Release);
        Ok(true)
    }

    /// Takes a command of ours back that still waits to be sent. False when a part of it has gone, so
    /// that the rest must follow.
    fn withdraw(&self, id: u16) -> bool {
        let mut unsent = lock(&self.unsent);
        let unsent = &mut *unsent;
        let is_it = |(bytes, _): &(Vec<u8>, Vec<OwnedFd>)| {
            Header::read_from_prefix(bytes)
                .is_ok_and(|(header, _)| header.id == id && !header.is_reply())
        };
        let Some(at) = unsent.messages.iter().position(is_it) else {
            return true;
        };
        if at == 0 && unsent.gone > 0 {
            return false;
        }
        if let Some((bytes, _)) = unsent.messages.remove(at) {
            unsent.total -= bytes.len();
        }
        self.has_unsent
            .store(!unsent.messages.is_empty(), Ordering::Release);
        true
    }

    pub(super) fn has_unsent(&self) -> bool {
        self.has_unsent.load(Ordering::Acquire)
    }

    /// From now on both sides see the end.
    pub(super) fn shutdown(&self) {
        // It fails only when the peer is gone already.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }
}

impl AsFd for Pipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Until a signal does not interrupt it.
fn retry<T>(mut f: impl FnMut() -> Result<T>) -> Result<T> {
    loop {
        match f() {
            Err(Errno::INTR) => {}
            done => return done,
        }
    }
}

impl Link {
    pub(super) fn new(socket: OwnedFd, windows: Windows) -> Arc<Link> {
        Arc::new(Link {
            main: Pipe::new(socket),
            twin: OnceLock::new(),
            windows,
            calls: Mutex::default(),
            answered: Condvar::new(),
            terms: OnceLock::new(),
            is_wide: OnceLock::new(),
        })
    }

    /// What VERSION settled; once.
    pub(super) fn agree(&self, terms: Terms, twin: Option<OwnedFd>) {
        let _ = self.terms.set(terms);
        if let Some(twin) = twin {
            let _ = self.twin.set(Pipe::new(twin));
        }
    }

    /// The second socket.
    pub(super) fn twin(&self) -> Option<&Pipe> {
        self.twin.get()
    }

    /// The calling thread is about to run a command of this client.
    pub(super) fn serving(&self) -> Serving {
        Serving(SERVING.replace(std::ptr::from_ref(self).addr()))
    }

    /// Both ends see the end, and whoever waits for the client waits no more.
    pub(super) fn shutdown(&self) {
        self.main.shutdown();
        if let Some(twin) = self.twin.get() {
            twin.shutdown();
        }
        let mut calls = lock(&self.calls);
        calls.is_closed = true;
        for call in calls.waiting.values_mut() {
            call.done.get_or_insert(Err(Errno::FAULT));
        }
        drop(calls);
        self.answered.notify_all();
    }

    /// Ends the calls that touch a range which has just been unmapped: nothing finds it any more, and
    /// nobody waits for the client to say so.
    pub(super) fn cancel(&self, iova: u64, len: u64) {
        let last = iova.saturating_add(len.saturating_sub(1));
        let mut calls = lock(&self.calls);
        for call in calls.waiting.values_mut() {
            let call_last = call.iova.saturating_add(call.len.saturating_sub(1));
            if call.iova <= last && iova <= call_last {
                call.done.get_or_insert(Err(Errno::BUSY));
            }
        }
        let is_awaited = !calls.waiting.is_empty();
        drop(calls);
        if is_awaited {
            self.answered.notify_all();
        }
    }

    /// A reply has come. One that nobody waits for (any more) is dropped.
    pub(super) fn reply(&self, header: &Header, payload: &[u8]) {
        let mut calls = lock(&self.calls);
        let Some(call) = calls.waiting.get_mut(&header.id) else {
            return;
        };
        if call.command != header.command {
            return;
        }
        call.done.get_or_insert(match header.errno() {
            Some(errno) => Err(errno),
            None => Ok(payload.to_vec()),
        });
        drop(calls);
        self.answered.notify_all();
    }

    /// Registers a call, so that it can be cancelled from now on.
    fn prepare(&self, command: u16, iova: u64, len: u64) -> Result<u16> {
        let mut calls = lock(&self.calls);
        if calls.is_closed {
            return Err(Errno::FAULT);
        }
        if calls.waiting.len() >= usize::from(u16::MAX) {
            return Err(Errno::BUSY);
        }
        while calls.waiting.contains_key(&calls.next) {
            calls.next = calls.next.wrapping_add(1);
        }
        let id = calls.next;
        calls.next = id.wrapping_add(1);
        let call = Call {
            command,
            iova,
            len,
            done: None,
        };
        calls.waiting.insert(id, call);
        Ok(id)
    }

    /// Sends a prepared call and waits for its reply. `ETIMEDOUT` when none comes in time.
    fn finish(&self, id: u16, command: u16, parts: [&[u8]; 2]) -> Result<Vec<u8>> {
        let pipe = self.twin.get().unwrap_or(&self.main);
        let header = Header {
            id,
            command,
            size: (HEADER + parts[0].len() + parts[1].len()) as u32,
            ..Header::default()
        };
        let message = [header.as_bytes(), parts[0], parts[1]].concat();
        let deadline = Instant::now() + PATIENCE;
        let sent = pipe.send(&message, None);
        let mut calls = lock(&self.calls);
        loop {
            let call = calls.waiting.get_mut(&id);
            if let Some(done) = call.and_then(|call| call.done.take()) {
                calls.waiting.remove(&id);
                return done;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || sent.is_err() {
                calls.waiting.remove(&id);
                drop(calls);
                // Nobody would send the rest, and the client would wait for it for ever.
                if !pipe.withdraw(id) {
                    tracing::warn!("a client stopped reading in the midst of a DMA command");
                    self.shutdown();
                }
                return Err(sent.err().map_or(Errno::TIMEDOUT, |_| Errno::FAULT));
            }
            if pipe.has_unsent() {
                // The client does not read. Perhaps it does in a moment.
                drop(calls);
                let mut ready = [PollFd::new(pipe, PollFlags::OUT)];
                let moment = Timespec {
                    tv_sec: 0,
                    tv_nsec: 20_000_000,
                };
                let _ = poll(&mut ready, Some(&moment));
                let _ = pipe.flush();
                calls = lock(&self.calls);
                continue;
            }
            (calls, _) = self
                .answered
                .wait_timeout(calls, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether this client takes commands, and whether now.
    ///
    /// `EDEADLK` inside one of its own commands, unless it has a second socket: it may not answer
    /// before that is answered (QEMU holds its big lock). `EOPNOTSUPP` for a client that would take a
    /// command for the reply it waits for, and for QEMU before 11, whose messages have another layout.
    fn may_call(&self) -> Result {
        let terms = self.terms.get().ok_or(Errno::NOENT)?;
        if self.twin.get().is_none() && SERVING.get() == std::ptr::from_ref(self).addr() {
            return Err(Errno::DEADLK);
        }
        match terms.kind {
            ClientKind::Rust | ClientKind::Spdk => Err(Errno::OPNOTSUPP),
            ClientKind::Qemu if !self.is_wide()? => Err(Errno::OPNOTSUPP),
            _ => Ok(()),
        }
    }

    /// Asks a QEMU, once, how it counts: a count above 2^32 is too big for one that sees all of it,
    /// and a harmless read for one that sees the lower half.
    fn is_wide(&self) -> Result<bool> {
        if let Some(known) = self.is_wide.get() {
            return Ok(*known);
        }
        let probe = DmaAccess {
            address: 0,
            count: 1 << 32,
        };
        let id = self.prepare(command::DMA_READ, 0, 0)?;
        let is_wide = match self.finish(id, command::DMA_READ, [probe.as_bytes(), &[]]) {
            Err(Errno::TOOBIG) => true,
            Err(errno @ (Errno::TIMEDOUT | Errno::FAULT | Errno::BUSY)) => return Err(errno),
            _ => {
                tracing::warn!(
                    "this QEMU's DMA messages have another layout (it is older than 11): memory \
                     it maps without a descriptor cannot be reached; give it shared memory \
                     (memory-backend-memfd,share=on)"
                );
                false
            }
        };
        Ok(*self.is_wide.get_or_init(|| is_wide))
    }

    fn access(&self, iova: u64, mut data: Data<'_>) -> Result {
        let len = data.len();
        let mut first = None;
        let mut more = Vec::new();
        let inside = self.windows.find(iova, len, data.access(), |piece| {
            if first.is_none() {
                first = Some(piece);
            } else {
                more.push(piece);
            }
        })?;
        let pieces = || first.iter().chain(&more);
        if pieces().all(|piece| piece.file.is_some()) {
            let mut at = 0;
            let mut done = Ok(());
            for piece in pieces() {
                if let (Some(file), Ok(())) = (&piece.file, done) {
                    done = data.copy(at, piece.len, file, piece.at);
                }
                at += piece.len;
            }
            // Files first: whoever unmaps the last window of one waits only for `inside`.
            drop((first, more));
            drop(inside);
            return done;
        }
        drop((first, more));
        drop(inside);
        self.by_message(iova, data)
    }

    /// An access of which at least a part is by message, part by part.
    fn by_message(&self, iova: u64, mut data: Data<'_>) -> Result {
        self.may_call()?;
        let most = self.terms.get().map_or(1, |terms| terms.max_data);
        let mut at = 0;
        while at < data.len() {
            let here = iova + at as u64;
            let mut piece = None;
            let part = most.min(data.len() - at);
            let inside = self.windows.find(here, part, data.access(), |found| {
                piece.get_or_insert(found);
            })?;
            let piece = piece.ok_or(Errno::NOENT)?;
            match &piece.file {
                Some(file) => data.copy(at, piece.len, file, piece.at)?,
                None => {
                    // While inside, so that an unmap that waits for us finds the call to cancel.
                    let id = self.prepare(data.command(), here, piece.len as u64)?;
                    drop(inside);
                    self.message(id, here, piece.len, &mut data, at)?;
                }
            }
            at += piece.len;
        }
        Ok(())
    }

    /// One DMA_READ or DMA_WRITE. `EIO` for an answer that does not fit the question.
    fn message(&self, id: u16, iova: u64, len: usize, data: &mut Data<'_>, at: usize) -> Result {
        let asked = DmaAccess {
            address: iova,
            count: len as u64,
        };
        let out: &[u8] = match data {
            Data::In(_) => &[],
            Data::Out(bytes) => &bytes[at..at + len],
        };
        let reply = self.finish(id, data.command(), [asked.as_bytes(), out])?;
        match data {
            Data::In(buf) => {
                let (said, bytes) = take::<DmaAccess>(&reply).map_err(|_| Errno::IO)?;
                if said != asked || bytes.len() != len {
                    return Err(Errno::IO);
                }
                buf[at..at + len].copy_from_slice(bytes);
                Ok(())
            }
            Data::Out(_) => {
                // The count has four bytes in the specification's table, eight on every wire.
                let mut said = [0; size_of::<DmaAccess>()];
                let known = reply.len().min(said.len());
                said[..known].copy_from_slice(&reply[..known]);
                if known < 12 || said != asked.as_bytes() {
                    return Err(Errno::IO);
                }
                Ok(())
            }
        }
    }
}

/// Where an access's bytes go to or come from.
enum Data<'a> {
    In(&'a mut [u8]),
    Out(&'a [u8]),
}

impl Data<'_> {
    fn len(&self) -> usize {
        match self {
            Data::In(buf) => buf.len(),
            Data::Out(bytes) => bytes.len(),
        }
    }

    fn access(&self) -> Access {
        match self {
            Data::In(_) => Access::Read,
            Data::Out(_) => Access::Write,
        }
    }

    fn command(&self) -> u16 {
        match self {
            Data::In(_) => command::DMA_READ,
            Data::Out(_) => command::DMA_WRITE,
        }
    }

    /// `EFAULT`: the file ends before.
    fn copy(&mut self, at: usize, len: usize, file: &SharedFile, place: u64) -> Result {
        match self {
            Data::In(buf) => file.read(place, &mut buf[at..at + len])?,
            Data::Out(bytes) => file.write(place, &bytes[at..at + len])?,
        }
        Ok(())
    }
}

/// As [`DmaSpace`] says, and for memory that only messages reach: `EDEADLK`, `EOPNOTSUPP` as
/// `may_call` says, `ETIMEDOUT` no answer in time, `EBUSY` unmapped meanwhile, `EFAULT` the client is
/// gone, `EIO` an answer that does not fit, else what the client says.
impl DmaSpace for Link {
    fn read(&self, iova: u64, buf: &mut [u8]) -> Result {
        self.access(iova, Data::In(buf))
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result {
        self.access(iova, Data::Out(data))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, recv, socketpair};

    fn pair() -> (Pipe, OwnedFd) {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("a pair");
        (Pipe::new(ours), theirs)
    }

    fn message(id: u16, size: usize) -> Vec<u8> {
        let header = Header {
            id,
            command: command::DMA_WRITE,
            size: size as u32,
            ..Header::default()
        };
        let mut bytes = header.as_bytes().to_vec();
        bytes.resize(size, 0);
        bytes
    }

    /// Sends what waits and reads all of it; how many bytes that were.
    fn drain(pipe: &Pipe, theirs: &OwnedFd) -> usize {
        let mut buf = vec![0; 1 << 20];
        let mut read = 0;
        loop {
            let is_sent = pipe.flush().expect("a peer");
            match recv(theirs, &mut buf[..], RecvFlags::DONTWAIT) {
                Ok((_, n)) => read += n,
                Err(Errno::AGAIN) if is_sent => return read,
                Err(errno) => assert_eq!(errno, Errno::AGAIN),
            }
        }
    }

    #[test]
    fn what_was_refused_does_not_count_as_waiting() {
        let (pipe, theirs) = pair();
        let megabyte = message(0, 1 << 20);
        let mut kept = 0;
        while pipe.send(&megabyte, None).is_ok() {
            kept += 1;
        }
        assert!(kept >= 16);
        for _ in 0..20 {
            assert_eq!(pipe.send(&megabyte, None), Err(Errno::NOBUFS));
        }
        assert_eq!(drain(&pipe, &theirs), kept << 20);
        assert_eq!(pipe.send(&megabyte, None), Ok(()), "all of it has gone");
        assert_eq!(drain(&pipe, &theirs), 1 << 20);
    }

    #[test]
    fn a_command_can_be_taken_back_until_it_begins_to_go() {
        let (pipe, theirs) = pair();
        for id in 1..4 {
            pipe.send(&message(id, 1 << 20), None).expect("kept");
        }
        assert!(!pipe.withdraw(1), "it has begun");
        assert!(pipe.withdraw(2));
        assert_eq!(drain(&pipe, &theirs), 2 << 20);
        assert!(pipe.withdraw(3), "it has gone");
        assert!(!pipe.has_unsent());
    }
}
