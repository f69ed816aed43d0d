//! The thread of a connected port: moves bytes both ways, and is the only one that waits.

use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::net::SendFlags;
use rustix::net::SocketFlags;

use super::Line;
use super::queue::Outlet;
use super::queue::Shared;

/// Bytes moved in one system call.
const CHUNK: usize = 512;

/// How long no client is accepted after that has failed (out of descriptors, mostly).
const ACCEPT_RETRY: Duration = Duration::from_secs(1);

/// A descriptor, and how to move bytes through it without waiting.
#[derive(Clone, Debug)]
pub(super) struct Stream {
    pub(super) fd: Arc<OwnedFd>,
    /// Sockets have a call that never waits, whatever mode their file is in. Everything else is
    /// in non-blocking mode, or a regular file.
    pub(super) socket: bool,
}

impl Stream {
    fn read(&self, buf: &mut [u8]) -> Result<usize, Errno> {
        if self.socket {
            rustix::net::recv(&self.fd, buf, RecvFlags::DONTWAIT).map(|(n, _)| n)
        } else {
            rustix::io::read(&self.fd, buf)
        }
    }

    fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        if self.socket {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            rustix::net::send(&self.fd, bytes, flags)
        } else {
            rustix::io::write(&self.fd, bytes)
        }
    }
}

/// What the thread works on.
pub(super) struct Pump {
    pub(super) shared: Arc<Shared>,
    pub(super) line: Arc<dyn Line>,
    /// For log lines.
    pub(super) name: String,
    /// Where clients come from; they replace `input` and `output`.
    pub(super) listener: Option<Arc<OwnedFd>>,
    pub(super) input: Option<Stream>,
    pub(super) output: Option<Stream>,
    /// A client has been accepted and has not left.
    pub(super) client: bool,
    /// Read, and not yet taken by the UART.
    pub(super) pending: Vec<u8>,
    /// Taken from the queue, and not yet written.
    pub(super) outgoing: Vec<u8>,
    pub(super) last_progress: Instant,
    pub(super) accept_after: Option<Instant>,
}

impl Pump {
    /// Runs until told to stop, then writes what can be written without waiting.
    pub(super) fn run(mut self) {
        if self.output.is_some() || self.input.is_some() {
            self.line.carrier(true);
        }
        loop {
            let Some(timeout) = self.prepare() else {
                while !self.outgoing.is_empty() && self.write_out() {
                    self.refill();
                }
                return;
            };
            let Some(ready) = self.wait(timeout) else {
                tracing::warn!("{}: waiting failed, the port stops", self.name);
                self.hang_up();
                return;
            };
            if ready.output_gone {
                self.output_gone();
            }
            if ready.writable {
                self.write_out();
            }
            if ready.readable {
                self.read_in();
            }
            self.deliver();
            if ready.client {
                self.accept();
            }
            self.close_client();
            self.tell_room();
        }
    }

    /// Settles with the queue what this turn waits for: `None` to stop, otherwise how long at most
    /// (`Some(None)` for as long as it takes).
    fn prepare(&mut self) -> Option<Option<Duration>> {
        self.refill();
        let mut queue = self.shared.lock();
        if queue.stop {
            return None;
        }
        queue.asleep = self.outgoing.is_empty();
        let stalled = queue
            .refused
            .map(|since| since.max(self.last_progress) + self.shared.limits.stall);
        drop(queue);
        let until = [stalled, self.accept_after].into_iter().flatten().min();
        Some(until.map(|at| at.saturating_duration_since(Instant::now())))
    }

    fn refill(&mut self) {
        if self.outgoing.is_empty() {
            let mut queue = self.shared.lock();
            let n = queue.bytes.len().min(CHUNK);
            self.outgoing.extend(queue.bytes.drain(..n));
        }
    }

    /// Waits for one of the descriptors. What must not be looked at is left out rather than asked
    /// for nothing: a hangup is reported even to those who did not ask, and would not let us sleep.
    fn wait(&mut self, timeout: Option<Duration>) -> Option<Ready> {
        if self
            .accept_after
            .is_some_and(|after| after <= Instant::now())
        {
            self.accept_after = None;
        }
        let listener = self
            .listener
            .as_ref()
            .filter(|_| self.output.is_none() && self.input.is_none())
            .filter(|_| self.accept_after.is_none());
        let input = self.input.as_ref().filter(|_| self.pending.is_empty());
        let output = self
            .output
            .as_ref()
            .filter(|stream| stream.socket || !self.outgoing.is_empty());
        let wanted = if self.outgoing.is_empty() {
            PollFlags::empty()
        } else {
            PollFlags::OUT
        };
        let mut fds = vec![PollFd::from_borrowed_fd(
            self.shared.wake.as_fd(),
            PollFlags::IN,
        )];
        fds.extend(listener.map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)));
        fds.extend(input.map(|s| PollFd::from_borrowed_fd(s.fd.as_fd(), PollFlags::IN)));
        fds.extend(output.map(|s| PollFd::from_borrowed_fd(s.fd.as_fd(), wanted)));
        let (listener, input, output) = (listener.is_some(), input.is_some(), output.is_some());
        let timeout = timeout.and_then(|t| Timespec::try_from(t).ok());
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Some(Ready::default()),
            Err(_) => return None,
        }
        let mut events = fds.iter().map(PollFd::revents);
        let mut next = |there: bool| {
            let events = there.then(|| events.next()).flatten();
            events.unwrap_or(PollFlags::empty())
        };
        let (woken, listener, input, output) =
            (next(true), next(listener), next(input), next(output));
        if !woken.is_empty() {
            let _ = rustix::io::read(&self.shared.wake, &mut [0; 8]);
        }
        let gone = PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL;
        Some(Ready {
            client: !listener.is_empty(),
            readable: !input.is_empty(),
            writable: output.contains(PollFlags::OUT),
            output_gone: output.intersects(gone),
        })
    }

    fn read_in(&mut self) {
        let Some(input) = &self.input else { return };
        let mut buf = [0; CHUNK];
        match input.read(&mut buf) {
            Ok(0) => self.input = None,
            Ok(n) => self.pending.extend_from_slice(&buf[..n]),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => {
                if !input.socket {
                    tracing::warn!("{}: reading failed: {error}", self.name);
                }
                self.input = None;
            }
        }
    }

    /// Gives the UART what it takes. What it does not take waits for [`Outlet::resume`].
    fn deliver(&mut self) {
        self.shared.held.store(false, Ordering::SeqCst);
        while !self.pending.is_empty() {
            let taken = self.line.receive(&self.pending).min(self.pending.len());
            self.pending.drain(..taken);
            if taken > 0 || self.pending.is_empty() {
                continue;
            }
            // Between the refusal and this store the guest may have read everything and called
            // `resume` in vain, so it is asked once more after it.
            if self.shared.held.swap(true, Ordering::SeqCst) {
                return;
            }
        }
        self.shared.held.store(false, Ordering::SeqCst);
    }

    /// Writes once; whether it helped.
    fn write_out(&mut self) -> bool {
        let Some(output) = &self.output else {
            self.outgoing.clear();
            return true;
        };
        match output.write(&self.outgoing) {
            Ok(n) => {
                self.outgoing.drain(..n);
                self.last_progress = Instant::now();
                n > 0
            }
            Err(Errno::AGAIN | Errno::INTR) => false,
            Err(error) if output.socket || error == Errno::PIPE => {
                self.output_gone();
                false
            }
            Err(error) => {
                let lost = self.outgoing.len();
                tracing::warn!("{}: {lost} bytes lost: {error}", self.name);
                self.outgoing.clear();
                true
            }
        }
    }

    /// Nobody reads any more: what waits is gone, and so is what comes.
    fn output_gone(&mut self) {
        self.output = None;
        self.outgoing.clear();
        let mut queue = self.shared.lock();
        queue.connected = false;
        queue.bytes.clear();
        queue.dropping = false;
    }

    /// A client is gone when both directions are; the next one's turn comes after that.
    fn close_client(&mut self) {
        if self.listener.is_some()
            && self.output.is_none()
            && self.input.is_none()
            && std::mem::take(&mut self.client)
        {
            self.hang_up();
        }
    }

    fn hang_up(&mut self) {
        self.output_gone();
        self.input = None;
        self.line.carrier(false);
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else {
            return;
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match rustix::net::accept_with(listener, flags) {
            Ok(client) => {
                let stream = Stream {
                    fd: Arc::new(client),
                    socket: true,
                };
                self.input = Some(stream.clone());
                self.output = Some(stream);
                self.last_progress = Instant::now();
                self.client = true;
                self.shared.lock().connected = true;
                self.line.carrier(true);
            }
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
            Err(error) => {
                tracing::warn!("{}: a client could not be accepted: {error}", self.name);
                self.accept_after = Some(Instant::now() + ACCEPT_RETRY);
            }
        }
    }

    /// Tells the UART that bytes it was refused may be tried again: because there is room, because
    /// nobody is there, or because the far end has been stuck for so long that the guest shall not
    /// wait for it any more.
    fn tell_room(&mut self) {
        self.refill();
        let mut queue = self.shared.lock();
        let roomy = queue.bytes.len() <= self.shared.limits.queue / 2;
        let mut lost = 0;
        if roomy && std::mem::take(&mut queue.dropping) {
            lost = std::mem::take(&mut queue.dropped);
        }
        let Some(refused) = queue.refused else {
            drop(queue);
            self.report(lost);
            return;
        };
        let stuck = refused.max(self.last_progress).elapsed() >= self.shared.limits.stall;
        let tell = roomy || stuck || !queue.connected;
        if tell {
            queue.refused = None;
            queue.dropping = stuck && !roomy && queue.connected;
        }
        let dropping = queue.dropping;
        drop(queue);
        self.report(lost);
        if dropping {
            tracing::warn!(
                "{}: nobody has read for {:?}; what does not fit is dropped until somebody does",
                self.name,
                self.shared.limits.stall
            );
        }
        if tell {
            self.line.room(&Outlet(Arc::clone(&self.shared)));
        }
    }

    fn report(&self, lost: u64) {
        if lost > 0 {
            tracing::warn!(
                "{}: transmit overrun, {lost} bytes dropped while nobody read",
                self.name
            );
        }
    }
}

#[derive(Default)]
struct Ready {
    client: bool,
    readable: bool,
    writable: bool,
    output_gone: bool,
}
