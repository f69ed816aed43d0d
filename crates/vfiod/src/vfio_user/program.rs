//! One device on one vfio-user socket, as a program of its own: for QEMU, libvirt and others that
//! start a server for each device. The program rules are those of the vfio-user specification
//! ("Backend Program Conventions"): it stays in the foreground, leaves descriptors 0 to 2 alone and
//! ends on SIGTERM.

use super::socket::{self, Permissions};
use crate::config::{Config, Mdev, Mode, Port};
use crate::{daemon, log};
use anyhow::Context as _;
use rustix::net::{AddressFamily, SocketType, sockopt};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::channel;
use uuid::Uuid;
use vfio_core::Core;
use vfio_core::device::Policy;
use vfio_user::{OfferOptions, Options, Server};

/// What `vfio-user` takes.
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
#[command(group(clap::ArgGroup::new("where").required(true).args(["socket_path", "fd"])))]
pub(crate) struct Program {
    /// The type of the device, as `vfioctl types` prints it: mtty-1, mtty-2, mdpy-vga, ….
    #[arg(value_name = "TYPE")]
    mdev_type: String,
    /// Listen here, for one client after the other; the name goes when the program ends.
    #[arg(long, value_name = "PATH")]
    socket_path: Option<PathBuf>,
    /// Serve this inherited socket: the one client of a connected one, then end; one client after
    /// the other of one that listens.
    #[arg(long, value_name = "FDNUM")]
    fd: Option<i32>,
    /// Mode of the socket, in octal.
    #[arg(long, value_name = "MODE", default_value = "600", requires = "socket_path", value_parser = mode)]
    mode: Mode,
    /// mtty: where a port leads (pty, pty:LINK, unix:PATH, file:PATH, loopback); once for each.
    #[arg(long = "port", value_name = "PLACE", value_parser = port)]
    ports: Vec<Port>,
    /// The UUID of the device, for the log and `{uuid}` in places; a random one otherwise.
    #[arg(long)]
    uuid: Option<Uuid>,
    /// Look for requests without sleeping while the client speaks, until it is silent for a second:
    /// a processor for less latency. Without effect where there is only one.
    #[arg(long)]
    poll: bool,
    /// error, warn, info, debug or trace, or directives as in RUST_LOG, which it overrides.
    #[arg(long, value_name = "LEVEL")]
    log: Option<String>,
}

fn mode(text: &str) -> Result<Mode, String> {
    Mode::try_from(text.to_owned())
}

fn port(text: &str) -> Result<Port, String> {
    Port::try_from(text.to_owned())
}

/// Why it ends.
enum End {
    Signal(i32),
    Disconnected,
}

/// Serves until a signal says otherwise, or the one client has gone.
///
/// # Errors
/// What keeps it from starting.
pub(crate) fn serve_one(program: &Program) -> anyhow::Result<()> {
    // First of all: a number that nobody gave us could be a descriptor of our own later.
    let inherited = program.fd.map(inherited::take).transpose()?;
    log::start(program.log.as_deref())?;
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    daemon::raise_files();

    let uuid = program.uuid.unwrap_or_else(Uuid::new_v4);
    let mut config = Config::default();
    config.mdevs.insert(
        uuid,
        Mdev {
            mdev_type: program.mdev_type.clone(),
            parent: None,
            ports: program.ports.clone(),
        },
    );
    let core = Core::new(vfio_core::Config {
        cdev: false,
        ..vfio_core::Config::default()
    });
    let _log = core.subscribe(daemon::log_event);
    let parents = daemon::make_parents(&core, &config)?;
    let Some((parent, ty)) = daemon::type_named(&parents, None, &program.mdev_type) else {
        let types: Vec<String> = parents
            .iter()
            .flat_map(|parent| parent.type_names().map(str::to_owned).collect::<Vec<_>>())
            .collect();
        anyhow::bail!(
            "no type {:?}; there are {}",
            program.mdev_type,
            types.join(", ")
        );
    };
    parent
        .create(ty, uuid)
        .with_context(|| format!("{} {uuid}", program.mdev_type))?;
    let device = core
        .devices()
        .pop()
        .with_context(|| format!("{uuid}: no driver has taken the device"))?;

    let (ends, end) = channel();
    let server = Server::start(Options::default()).context("starting the vfio-user server")?;
    let options = OfferOptions {
        poll: super::polls(program.poll),
        ..OfferOptions::default()
    };
    let mut name = None;
    let offer = match (inherited, &program.socket_path) {
        (Some(Inherited::Connected(stream)), _) => server.serve(&device, stream, options),
        (Some(Inherited::Listening(listener)), _) => server.offer(&device, listener, options),
        (None, Some(path)) => {
            let permissions = Permissions {
                mode: program.mode.0,
                owner: None,
                group: None,
            };
            let (listener, made) = socket::listen(&std::path::absolute(path)?, &permissions)?;
            name = Some(made);
            server.offer(&device, listener, options)
        }
        (None, None) => anyhow::bail!("say where: --socket-path=PATH or --fd=FDNUM"),
    }
    .context("serving the socket")?;
    let weak = device.downgrade();
    drop(device);
    {
        let ends = ends.clone();
        // Nobody hears of it after the end.
        offer.on_end(move || drop(ends.send(End::Disconnected)));
    }
    let handle = signals.handle();
    let waiter = std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for signal in signals.forever() {
                if ends.send(End::Signal(signal)).is_err() {
                    return;
                }
            }
        })?;
    match &name {
        Some(name) => tracing::info!(
            "{} {uuid}: serving vfio-user at {}",
            program.mdev_type,
            name.path().display()
        ),
        None => tracing::info!(
            "{} {uuid}: serving vfio-user on descriptor {}",
            program.mdev_type,
            program.fd.unwrap_or_default()
        ),
    }
    daemon::notify(&[sd_notify::NotifyState::Ready]);

    match end.recv() {
        Ok(End::Signal(signal)) => tracing::info!(
            "{}: ending",
            if signal == SIGINT {
                "SIGINT"
            } else {
                "SIGTERM"
            }
        ),
        Ok(End::Disconnected) | Err(_) => tracing::info!("the client has gone: ending"),
    }
    handle.close();
    drop(name);
    drop(offer);
    drop(server);
    for parent in &parents {
        // Cut off, and not waited for.
        let _ = parent.unregister(Policy::Disassociate);
        let _ = parent.device().remove(&core, Policy::Disassociate);
    }
    let _ = waiter.join();
    if weak.upgrade().is_some() {
        tracing::debug!("a call of the driver is still in progress");
    }
    Ok(())
}

/// A socket that whoever started us has made.
enum Inherited {
    Connected(UnixStream),
    Listening(UnixListener),
}

impl Inherited {
    fn of(socket: OwnedFd) -> anyhow::Result<Inherited> {
        let is_stream = sockopt::socket_domain(&socket).is_ok_and(|one| one == AddressFamily::UNIX)
            && sockopt::socket_type(&socket).is_ok_and(|one| one == SocketType::STREAM);
        if !is_stream {
            anyhow::bail!("it is no UNIX stream socket");
        }
        Ok(if sockopt::socket_acceptconn(&socket)? {
            Inherited::Listening(UnixListener::from(socket))
        } else {
            Inherited::Connected(UnixStream::from(socket))
        })
    }
}

mod inherited {
    #![expect(
        unsafe_code,
        reason = "a descriptor that is known by its number belongs to no value yet"
    )]

    use super::Inherited;
    use anyhow::Context as _;
    use rustix::io::{FdFlags, fcntl_dupfd_cloexec};
    use std::os::fd::BorrowedFd;

    /// The socket with this number, as a duplicate.
    ///
    /// # Errors
    /// There is none, or it is of another kind.
    pub(super) fn take(number: i32) -> anyhow::Result<Inherited> {
        if number < 0 {
            anyhow::bail!("--fd={number}: a descriptor is 0 or more");
        }
        // SAFETY: Only for this call, and only to duplicate it, which fails for a number that is not
        // open. It is the first thing the program does: nothing else could close it meanwhile.
        let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
        let socket = fcntl_dupfd_cloexec(borrowed, 3).and_then(|socket| {
            // The number itself stays with us, not with what we might start.
            rustix::io::fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
            Ok(socket)
        });
        socket
            .map_err(anyhow::Error::from)
            .and_then(Inherited::of)
            .with_context(|| format!("--fd={number}"))
    }
}
