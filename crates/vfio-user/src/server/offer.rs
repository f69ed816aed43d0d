//! One device on one socket.

use super::connection::Connection;
use super::hub::Hub;
use super::link::Link;
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::SystemTime;
use vfio_core::device::{Device, DeviceFile, DmaSpace, Opener, WeakDevice};
use vfio_core::{Errno, Result};

/// Refusals that are remembered.
const REMEMBERED: usize = 16;

/// Connections that have not said VERSION yet; one more, and the oldest is closed.
const SILENT: usize = 32;

/// Connections taken from the backlog in one turn.
const BATCH: usize = 16;

/// What can be chosen about an offer.
#[derive(Clone, Debug, Default)]
pub struct OfferOptions {
    /// Users who may connect, by the socket's peer credentials; none named: any who can open it.
    /// User 0 always may.
    pub uids: Vec<u32>,
    /// Groups whose members may connect, by the primary group of the peer's credentials, in
    /// addition to `uids`.
    pub gids: Vec<u32>,
    /// Look for a client's next message without sleeping: a processor for the latency of one wake-up
    /// less. It ends when the client has said nothing for a second and begins again with its next
    /// message, and only [`Options::pollers`](super::Options::pollers) are polled at once.
    pub poll: bool,
}

/// Who speaks, as told by what it said in VERSION. Some need to be spoken to differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ClientKind {
    /// QEMU's `vfio-user-pci`.
    Qemu,
    /// The `vfio_user` crate, as cloud-hypervisor uses it.
    Rust,
    /// SPDK's initiator.
    Spdk,
    /// libvfio-user's sample client and tests.
    LibvfioUser,
    /// Another one.
    Unknown,
}

impl fmt::Display for ClientKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ClientKind::Qemu => "QEMU",
            ClientKind::Rust => "rust vfio_user",
            ClientKind::Spdk => "SPDK",
            ClientKind::LibvfioUser => "libvfio-user",
            ClientKind::Unknown => "unknown",
        })
    }
}

/// A client that has the device open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// Its process at the time it connected; 0 when it cannot be told.
    pub pid: u32,
    /// Its user then.
    pub uid: u32,
    /// Its group then.
    pub gid: u32,
    /// Its command name then.
    pub comm: String,
    /// When it got the device.
    pub since: SystemTime,
    /// Which program it seems to be.
    pub kind: ClientKind,
}

/// Somebody who did not get the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Process; 0 when it cannot be told.
    pub pid: u32,
    /// User.
    pub uid: u32,
    /// Command name.
    pub comm: String,
    /// When.
    pub at: SystemTime,
    /// `EBUSY`: somebody has it; `EACCES`: not allowed; `ENODEV`: it is going; `EPROTO` and others:
    /// what it said made no sense.
    pub errno: Errno,
    /// The same for people, with who has it.
    pub reason: String,
}

/// Who is at the other end, by the socket's credentials: the process that connected, then.
#[derive(Clone, Debug)]
pub(super) struct Who {
    pub(super) pid: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) comm: String,
}

impl Who {
    fn of(socket: impl AsFd) -> Who {
        let credentials = nix::sys::socket::getsockopt(
            &socket.as_fd(),
            nix::sys::socket::sockopt::PeerCredentials,
        );
        // A peer that cannot be told is nobody in particular.
        let (pid, uid, gid) = match credentials {
            Ok(peer) => (
                u32::try_from(peer.pid()).unwrap_or(0),
                peer.uid(),
                peer.gid(),
            ),
            Err(_) => (0, u32::MAX, u32::MAX),
        };
        let comm = match pid {
            0 => String::new(),
            pid => std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default(),
        };
        Who {
            pid,
            uid,
            gid,
            comm: comm.trim_end().to_owned(),
        }
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "process {} ({}) of user {}",
            self.pid, self.comm, self.uid
        )
    }
}

/// One device on one socket, as the hub and the connections see it.
#[derive(Debug)]
pub(super) struct OfferState {
    device: WeakDevice,
    /// `vfioN`, for messages.
    name: String,
    path: Option<PathBuf>,
    listener: Option<UnixListener>,
    options: OfferOptions,
    is_closed: AtomicBool,
    guests: Mutex<Guests>,
}

#[derive(Default)]
struct Guests {
    /// All connections, oldest first.
    links: Vec<Weak<Link>>,
    client: Option<(Weak<Link>, Client)>,
    refused: VecDeque<Refusal>,
    /// The one connection of an offer that does not listen has ended.
    has_ended: bool,
    on_end: Vec<Box<dyn FnOnce() + Send>>,
}

impl fmt::Debug for Guests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guests")
            .field("links", &self.links.len())
            .field("client", &self.client)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for OfferState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.path {
            Some(path) => write!(f, "{} at {}", self.name, path.display()),
            None => write!(f, "{} at a socket without a name", self.name),
        }
    }
}

impl OfferState {
    pub(super) fn options(&self) -> &OfferOptions {
        &self.options
    }

    pub(super) fn listener(&self) -> Option<BorrowedFd<'_>> {
        self.listener.as_ref().map(AsFd::as_fd)
    }

    fn guests(&self) -> MutexGuard<'_, Guests> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes from the backlog. An error says that more cannot be taken now.
    pub(super) fn accept(self: &Arc<OfferState>, hub: &Arc<Hub>) -> Result {
        let Some(listener) = &self.listener else {
            return Ok(());
        };
        for _ in 0..BATCH {
            match rustix::net::accept_with(listener, rustix::net::SocketFlags::CLOEXEC) {
                Ok(socket) => self.welcome(socket, hub)?,
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => break,
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    fn welcome(self: &Arc<OfferState>, socket: OwnedFd, hub: &Arc<Hub>) -> Result {
        let who = Who::of(&socket);
        if self.is_closed.load(Ordering::SeqCst) {
            return Ok(());
        }
        if !self.allows(&who) {
            let reason = format!("user {} (group {}) is not allowed", who.uid, who.gid);
            self.refuse(&who, Errno::ACCESS, reason);
            return Ok(());
        }
        let connection = Connection::new(socket, self, who, hub)?;
        let mut guests = self.guests();
        let Guests { links, client, .. } = &mut *guests;
        links.retain(|link| link.strong_count() > 0);
        let holder = client.as_ref().map(|(link, _)| link.as_ptr());
        let silent = links.iter().filter(|link| Some(link.as_ptr()) != holder);
        if silent.clone().count() >= SILENT
            && let Some(oldest) = silent.clone().next().and_then(Weak::upgrade)
        {
            oldest.shutdown();
        }
        links.push(Arc::downgrade(connection.link()));
        drop(guests);
        hub.add_connection(connection).map(drop)
    }

    fn allows(&self, who: &Who) -> bool {
        let OfferOptions { uids, gids, .. } = &self.options;
        let is_open = uids.is_empty() && gids.is_empty();
        is_open || who.uid == 0 || uids.contains(&who.uid) || gids.contains(&who.gid)
    }

    /// Opens the device for a client that has said VERSION, or says who has it.
    pub(super) fn admit(
        &self,
        link: &Arc<Link>,
        who: &Who,
        kind: ClientKind,
    ) -> Result<Arc<DeviceFile>, (Errno, String)> {
        let gone = || (Errno::NODEV, "the device is going".to_owned());
        let device = self.device.upgrade().ok_or_else(gone)?;
        let since = SystemTime::now();
        let opener = Opener {
            pid: who.pid,
            comm: who.comm.clone(),
            since,
            node: None,
        };
        let memory = Arc::clone(link) as Arc<dyn DmaSpace>;
        let file = device.open_direct(opener, memory).map_err(|errno| {
            let reason = match errno {
                Errno::BUSY => self.holder(&device),
                Errno::NODEV => gone().1,
                errno => format!("the driver does not open it: {errno}"),
            };
            (errno, reason)
        })?;
        let weak = Arc::downgrade(link);
        file.on_cut_off(move || {
            if let Some(link) = weak.upgrade() {
                link.shutdown();
            }
        });
        let client = Client {
            pid: who.pid,
            uid: who.uid,
            gid: who.gid,
            comm: who.comm.clone(),
            since,
            kind,
        };
        tracing::info!("{self}: {who}, {kind}, has the device");
        self.guests().client = Some((Arc::downgrade(link), client));
        if self.is_closed.load(Ordering::SeqCst) {
            // The offer ended between the two; whoever ended it may have missed this one.
            link.shutdown();
        }
        Ok(file)
    }

    /// Who has the device, for people.
    fn holder(&self, device: &Device) -> String {
        let holder = device.files().into_iter().find(|file| file.is_bound());
        match (holder, &self.guests().client) {
            (Some(file), Some((_, client))) if file.opener().pid == client.pid => format!(
                "process {} ({}) has it, connected to this socket",
                client.pid, client.comm
            ),
            (Some(file), _) => format!(
                "process {} ({}) has it open",
                file.opener().pid,
                file.opener().comm
            ),
            (None, _) => {
                "a former client still has its memory, mapped or as a descriptor".to_owned()
            }
        }
    }

    /// Notes and logs that somebody did not get the device.
    pub(super) fn refuse(&self, who: &Who, errno: Errno, reason: String) {
        tracing::warn!("{self}: {who} is refused ({errno}): {reason}");
        let mut guests = self.guests();
        if guests.refused.len() >= REMEMBERED {
            guests.refused.pop_front();
        }
        guests.refused.push_back(Refusal {
            pid: who.pid,
            uid: who.uid,
            comm: who.comm.clone(),
            at: SystemTime::now(),
            errno,
            reason,
        });
    }

    /// The client has gone and the device is closed.
    pub(super) fn leave(&self, link: &Arc<Link>, who: &Who) {
        tracing::info!("{self}: {who} is gone");
        let mut guests = self.guests();
        if let Some((holder, _)) = &guests.client
            && holder.as_ptr() == Arc::as_ptr(link)
        {
            guests.client = None;
        }
    }

    /// A connection has ended.
    pub(super) fn forget(&self, link: &Arc<Link>) {
        let mut guests = self.guests();
        guests
            .links
            .retain(|known| known.as_ptr() != Arc::as_ptr(link));
        if self.listener.is_none() {
            guests.has_ended = true;
        }
        let told = match guests.has_ended {
            true => std::mem::take(&mut guests.on_end),
            false => Vec::new(),
        };
        drop(guests);
        for f in told {
            f();
        }
    }
}

/// One device offered on one socket. Dropping it stops the offer and closes the connection; it does
/// not wait for a driver's call in progress, which the core's unregister does.
#[derive(Debug)]
pub struct Offer {
    state: Arc<OfferState>,
    hub: Arc<Hub>,
    /// Of the listener.
    key: Option<u64>,
}

impl Offer {
    pub(super) fn new(
        hub: &Arc<Hub>,
        device: &Device,
        listener: Option<UnixListener>,
        stream: Option<UnixStream>,
        options: OfferOptions,
    ) -> io::Result<Offer> {
        let address = listener
            .as_ref()
            .map(UnixListener::local_addr)
            .transpose()?;
        if let Some(listener) = &listener {
            listener.set_nonblocking(true)?;
        }
        let state = Arc::new(OfferState {
            device: device.downgrade(),
            name: device.name(),
            path: address.and_then(|address| address.as_pathname().map(Path::to_owned)),
            listener,
            options,
            is_closed: AtomicBool::new(false),
            guests: Mutex::default(),
        });
        let key = match stream {
            Some(stream) => {
                stream.set_nonblocking(false)?;
                state.welcome(stream.into(), hub)?;
                None
            }
            None => Some(hub.add_listener(&state)?),
        };
        Ok(Offer {
            state,
            hub: Arc::clone(hub),
            key,
        })
    }

    /// The device, while it is not released.
    pub fn device(&self) -> Option<Device> {
        self.state.device.upgrade()
    }

    /// The socket's file; `None` for one without a name.
    pub fn path(&self) -> Option<&Path> {
        self.state.path.as_deref()
    }

    /// Who has the device through this socket now.
    pub fn client(&self) -> Option<Client> {
        let guests = self.state.guests();
        guests.client.as_ref().map(|(_, client)| client.clone())
    }

    /// How many DMA windows the client has mapped.
    pub fn windows(&self) -> usize {
        let guests = self.state.guests();
        let link = guests.client.as_ref().and_then(|(link, _)| link.upgrade());
        drop(guests);
        link.map_or(0, |link| link.windows.len())
    }

    /// The last ones who did not get it, oldest first, at most 16.
    pub fn refused(&self) -> Vec<Refusal> {
        self.state.guests().refused.iter().cloned().collect()
    }

    /// False when nothing can come any more: the one connection of [`Server::serve`] has ended.
    ///
    /// [`Server::serve`]: super::Server::serve
    pub fn is_alive(&self) -> bool {
        !self.state.guests().has_ended
    }

    /// Runs `f` once when the one connection of [`Server::serve`](super::Server::serve) has ended,
    /// at once if it has. Never for an offer that listens. It must be quick.
    pub fn on_end(&self, f: impl FnOnce() + Send + 'static) {
        let mut guests = self.state.guests();
        if guests.has_ended {
            drop(guests);
            return f();
        }
        guests.on_end.push(Box::new(f));
    }
}

impl Drop for Offer {
    fn drop(&mut self) {
        self.state.is_closed.store(true, Ordering::SeqCst);
        if let (Some(key), Some(listener)) = (self.key, self.state.listener()) {
            self.hub.remove_listener(key, listener);
        }
        let links = std::mem::take(&mut self.state.guests().links);
        for link in links.iter().filter_map(Weak::upgrade) {
            link.shutdown();
        }
    }
}
