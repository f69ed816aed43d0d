//! The daemon's devices over vfio-user: which have a socket, where, for whom.
//!
//! A socket appears when its device registers (or is asked for) and its name goes the moment an
//! unregister begins; a client that is connected then stays until it leaves or is cut off. At rest
//! it costs a descriptor, no thread.

mod program;
mod socket;

pub(crate) use program::{Program, serve_one};

use crate::config::{Config, Offered as Which, User};
use anyhow::Context as _;
use socket::{Name, Permissions};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vfio_core::Core;
use vfio_core::device::{Device, Life};
use vfio_core::event::{Notice, Subscription, What};
use vfio_user::{Offer, OfferOptions, Server};
use vfiod_control::view::{self, Holder, Via};

/// The longest name of a device that is known beforehand: a UUID.
const USUAL_NAME: usize = 36;

/// All sockets. Dropping it takes them away and closes their connections.
#[derive(Debug)]
pub(crate) struct Sockets {
    inner: Arc<Inner>,
    _subscription: Subscription,
}

#[derive(Debug)]
struct Inner {
    core: Core,
    dir: PathBuf,
    all: bool,
    permissions: Permissions,
    options: OfferOptions,
    /// One offer is made after the other: the second finds what the first has made. The server is
    /// started for the first one.
    server: Mutex<Option<Server>>,
    offered: Mutex<HashMap<u32, Vec<Offered>>>,
}

/// A device on a socket.
#[derive(Debug)]
struct Offered {
    path: PathBuf,
    /// `None` once unregister has begun.
    name: Option<Name>,
    offer: Offer,
}

impl Sockets {
    /// Listens for devices that come and go from now on. `default` is where the sockets are unless
    /// the configuration says otherwise.
    ///
    /// # Errors
    /// What the configuration asks for cannot be.
    pub(crate) fn start(core: &Core, config: &Config, default: &Path) -> anyhow::Result<Sockets> {
        let chosen = &config.vfio_user;
        let dir = match &chosen.dir {
            Some(dir) => std::path::absolute(dir)?,
            None => default.to_owned(),
        };
        let all = chosen.offer == Some(Which::All);
        let longest = dir.as_os_str().len() + "/.sock".len() + USUAL_NAME;
        if (all || chosen.dir.is_some()) && longest > socket::LONGEST_PATH {
            anyhow::bail!(
                "vfio-user.dir: {} is too long by {} bytes: the path of a UNIX socket has at most \
                 {}, and UUID.sock comes after it",
                dir.display(),
                longest - socket::LONGEST_PATH,
                socket::LONGEST_PATH
            );
        }
        let inner = Arc::new(Inner {
            core: core.clone(),
            dir,
            all,
            permissions: permissions(config)?,
            options: options(config)?,
            server: Mutex::default(),
            offered: Mutex::default(),
        });
        if all {
            inner.make_dir()?;
        }
        let weak = Arc::downgrade(&inner);
        let subscription = core.subscribe(move |notice| {
            if let Notice::Event(event) = notice
                && let Some(inner) = weak.upgrade()
            {
                inner.hear(event.index, &event.what);
            }
        });
        Ok(Sockets {
            inner,
            _subscription: subscription,
        })
    }

    /// Offers a device, at `path` if there is one, and returns where. One that is offered there
    /// already stays as it is.
    ///
    /// # Errors
    /// The device is going, or the socket cannot be made; the message says what to do.
    pub(crate) fn offer(&self, device: &Device, path: Option<&Path>) -> anyhow::Result<PathBuf> {
        if path.is_none() {
            self.inner.make_dir()?;
        }
        self.inner.offer(device, path)
    }

    /// Takes a device's sockets away and closes their connections. True if there were any.
    pub(crate) fn withdraw(&self, device: &Device) -> bool {
        let gone = self.inner.offered().remove(&device.index());
        gone.is_some()
    }

    /// The sockets of a device.
    pub(crate) fn of(&self, device: &Device) -> Vec<view::Socket> {
        let offered = self.inner.offered();
        let of_device = offered.get(&device.index()).into_iter().flatten();
        of_device
            .filter(|one| one.name.is_some() || one.offer.client().is_some())
            .map(Offered::view)
            .collect()
    }
}

impl Inner {
    fn offered(&self) -> MutexGuard<'_, HashMap<u32, Vec<Offered>>> {
        self.offered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs inside a step of a device's life: quick, and never waits.
    fn hear(&self, index: u32, what: &What) {
        match what {
            What::Registered if self.all => {
                if let Some(device) = self.core.device(index)
                    && let Err(error) = self.offer(&device, None)
                {
                    tracing::error!(
                        "vfio-dev {}: not offered over vfio-user: {error:#}",
                        device.name()
                    );
                }
            }
            What::Unregistering { .. } => {
                let mut offered = self.offered();
                let of_device = offered.get_mut(&index).into_iter().flatten();
                let names: Vec<Name> = of_device.filter_map(|one| one.name.take()).collect();
                drop(offered);
                drop(names);
            }
            What::Unregistered => {
                let gone = self.offered().remove(&index);
                drop(gone);
            }
            _ => {}
        }
    }

    fn make_dir(&self) -> anyhow::Result<()> {
        std::fs::create_dir_all(&self.dir)
            .with_context(|| format!("directory {} of vfio-user sockets", self.dir.display()))
    }

    fn offer(&self, device: &Device, path: Option<&Path>) -> anyhow::Result<PathBuf> {
        let path = match path {
            Some(path) => path.to_owned(),
            None => self.dir.join(format!("{}.sock", device.parent().name())),
        };
        let mut server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = self.offered().iter().find_map(|(index, all)| {
            let taken = all.iter().any(|one| one.path == path && one.name.is_some());
            taken.then_some(*index)
        });
        match taken {
            Some(index) if index == device.index() => return Ok(path),
            Some(index) => anyhow::bail!("vfio{index} is offered at {} already", path.display()),
            None => {}
        }
        let (listener, name) = socket::listen(&path, &self.permissions)?;
        let server = match &mut *server {
            Some(server) => server,
            empty => empty.insert(
                Server::start(vfio_user::Options::default())
                    .context("starting the vfio-user server")?,
            ),
        };
        let offer = server
            .offer(device, listener, self.options.clone())
            .with_context(|| format!("serving {}", path.display()))?;
        let offered = Offered {
            path: path.clone(),
            name: Some(name),
            offer,
        };
        self.offered()
            .entry(device.index())
            .or_default()
            .push(offered);
        // Its unregister may have begun between the look at it and the note of it.
        if device.life() != Life::Registered {
            let gone = self.offered().remove(&device.index());
            drop(gone);
            anyhow::bail!("{} is going", device.name());
        }
        tracing::debug!("vfio-dev {}: offered at {}", device.name(), path.display());
        Ok(path)
    }
}

impl Offered {
    fn view(&self) -> view::Socket {
        let path = self.path.to_string_lossy().into_owned();
        view::Socket {
            client: self.offer.client().map(|client| Holder {
                pid: client.pid,
                command: client.comm,
                since_us: crate::devices::micros(client.since),
                since_open: true,
                via: Via::Socket,
                uid: Some(client.uid),
                socket: Some(path.clone()),
                client: Some(client.kind.to_string()),
                ..Holder::default()
            }),
            refused: self
                .offer
                .refused()
                .into_iter()
                .map(|refusal| view::Refusal {
                    at_us: crate::devices::micros(refusal.at).unwrap_or(0),
                    pid: refusal.pid,
                    uid: refusal.uid,
                    command: refusal.comm,
                    reason: refusal.reason,
                })
                .collect(),
            path,
        }
    }
}

fn permissions(config: &Config) -> anyhow::Result<Permissions> {
    let chosen = &config.vfio_user;
    let number = |name: &Option<String>, file: &str| {
        name.as_deref()
            .map(|name| crate::daemon::id(file, name))
            .transpose()
    };
    Ok(Permissions {
        mode: chosen.mode.map_or(0o600, |mode| mode.0),
        owner: number(&chosen.owner, "/etc/passwd").context("vfio-user.owner")?,
        group: number(&chosen.group, "/etc/group").context("vfio-user.group")?,
    })
}

/// Whether clients are polled, if that is asked for; says so where it has no effect.
fn polls(asked: bool) -> bool {
    if asked && vfio_user::Options::default().pollers == 0 {
        tracing::warn!(
            "poll has no effect: there is one processor to run on, and polling never takes the last"
        );
    }
    asked
}

fn options(config: &Config) -> anyhow::Result<OfferOptions> {
    let uid = |user: &User| match user {
        User::Number(uid) => Ok(*uid),
        User::Name(name) => crate::daemon::id("/etc/passwd", name).context("vfio-user.users"),
    };
    let users = config.vfio_user.users.as_deref();
    if users.is_some_and(<[User]>::is_empty) {
        // To the server, nobody named is everybody.
        anyhow::bail!("vfio-user.users is empty: name who may be served, or leave it out");
    }
    Ok(OfferOptions {
        uids: users
            .unwrap_or_default()
            .iter()
            .map(uid)
            .collect::<anyhow::Result<_>>()?,
        poll: polls(config.vfio_user.poll.unwrap_or_default()),
        ..OfferOptions::default()
    })
}
