//! One device on one socket.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use vfio_core::Errno;
use vfio_core::device::{Device, WeakDevice};

/// What can be chosen about an offer.
#[derive(Clone, Debug, Default)]
pub struct OfferOptions {
    /// Users who may connect, by the socket's peer credentials; none named: any who can open it.
    /// User 0 always may.
    pub uids: Vec<u32>,
    /// Groups whose members may connect, by the primary group of the peer's credentials, in
    /// addition to `uids`.
    pub gids: Vec<u32>,
    /// Serve a connected client with a thread of its own that never sleeps: a processor for the
    /// latency of one wake-up less.
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

impl std::fmt::Display for ClientKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
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

/// One device offered on one socket. Dropping it stops the offer and closes the connection; it does
/// not wait for a driver's call in progress, which the core's unregister does.
#[derive(Debug)]
pub struct Offer {
    device: WeakDevice,
    path: Option<PathBuf>,
}

impl Offer {
    pub(super) fn new(
        device: &Device,
        listener: Option<UnixListener>,
        _stream: Option<UnixStream>,
        _options: OfferOptions,
    ) -> io::Result<Offer> {
        let address = listener
            .as_ref()
            .map(UnixListener::local_addr)
            .transpose()?;
        Ok(Offer {
            device: device.downgrade(),
            path: address.and_then(|address| address.as_pathname().map(Path::to_owned)),
        })
    }

    /// The device, while it is not released.
    pub fn device(&self) -> Option<Device> {
        self.device.upgrade()
    }

    /// The socket's file; `None` for one without a name.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Who has the device through this socket now.
    pub fn client(&self) -> Option<Client> {
        None
    }

    /// The last ones who did not get it, oldest first, at most 16.
    pub fn refused(&self) -> Vec<Refusal> {
        Vec::new()
    }

    /// False when nothing can come any more: the one connection of [`Server::serve`] has ended.
    ///
    /// [`Server::serve`]: super::Server::serve
    pub fn is_alive(&self) -> bool {
        true
    }

    /// Runs `f` once when the one connection of [`Server::serve`](super::Server::serve) has ended,
    /// at once if it has. Never for an offer that listens.
    pub fn on_end(&self, _f: impl FnOnce() + Send + 'static) {}
}
