//! `vfiod serve`: puts everything together, and takes it apart again.

use crate::calls::Server;
use crate::config::{self, Config, Seconds, Unregister, UnregisterWord};
use crate::control::Control;
use crate::devices::Requests;
use crate::numbers::Numbers;
use crate::parents::{check_mdevs, start_mdevs};
use crate::vfio_user::Sockets;
use crate::{Serve, log, uevent};
use anyhow::Context as _;
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sd_notify::NotifyState;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};
use vfio_core::Core;
use vfio_core::device::Policy;
use vfio_core::event::{Event, Notice, What};
use vfio_core::model::{Outcome, Waiting, mdev};
use vfio_fuse::{Mounts, Options, Owner};

pub(crate) use crate::parents::{make_parents, type_named};

/// What to do about EMFILE.
pub(crate) const FILES_ADVICE: &str = "raise the limit of open files: `ulimit -Hn` in the shell, \
     LimitNOFILE= in the unit; an open device needs a few, one at rest none";

/// Where everything is.
#[derive(Debug)]
struct Places {
    root: PathBuf,
    config: PathBuf,
}

impl Places {
    fn new(serve: &Serve) -> anyhow::Result<Places> {
        Ok(match &serve.root {
            Some(root) => {
                let root = std::path::absolute(root)?;
                Places {
                    config: root.clone(),
                    root,
                }
            }
            None => Places {
                root: PathBuf::from("/run/vfiod"),
                config: PathBuf::from("/"),
            },
        })
    }

    fn sys(&self) -> PathBuf {
        self.root.join("sys")
    }

    fn dev(&self) -> PathBuf {
        self.root.join("dev")
    }

    fn socket(&self) -> PathBuf {
        self.root.join("vfiod.sock")
    }
}

/// Runs until a signal says otherwise.
///
/// # Errors
/// What keeps it from starting.
pub(crate) fn serve(serve: &Serve) -> anyhow::Result<()> {
    log::start(serve.log.as_deref())?;
    let places = Places::new(serve)?;
    let config = match &serve.config {
        Some(file) => Config::read(file)?,
        None => Config::search(&places.config)?,
    };
    if serve.check {
        check(&config, &places)?;
        print!("{}", toml::to_string(&config)?);
        return Ok(());
    }
    // Before the first thread, so that no thread has them unblocked: a signal that comes while
    // things are put together is one to stop.
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    if serve.transient {
        stop_at_eof()?;
    }
    raise_files();
    std::fs::create_dir_all(&places.root).map_err(|error| root_error(&error, &places.root))?;
    let _lock = lock(&places.root)?;
    clear_stale(&places.sys());
    clear_stale(&places.dev());
    clear_stale(&places.root.join("merge"));

    let core = Core::new(core_config(&config));
    let log = core.subscribe(log_event);
    let uevents = match config.uevents.unwrap_or_default() {
        crate::config::Uevents::Host => Some(uevent::Uevents::start(&core)?),
        _ => None,
    };
    let requests = Requests::watch(&core);
    // Before the first device: each of them may want a socket.
    let sockets = Sockets::start(&core, &config, &places.root.join("vfio-user"))?;
    let parents = make_parents(&core, &config)?;
    let options = mount_options(&config, &places)?;
    let mounts =
        Mounts::start(&core, &options).map_err(|errno| mount_error(errno, &places.root))?;
    let mounts = Arc::new(RwLock::new(Some(mounts)));
    start_mdevs(&config, &parents)?;
    let server = Arc::new(Server {
        core: core.clone(),
        mounts: Arc::clone(&mounts),
        merge: Mutex::default(),
        requests,
        sockets,
        sys: places.sys(),
        dev: places.dev(),
        uevents: config.uevents.unwrap_or_default(),
        started: Instant::now(),
    });
    let group = socket_group(&config)?;
    let control = Control::start(&places.socket(), group, Arc::clone(&server))?;
    tracing::info!(
        "vfiod {} serves {}, {} and {}",
        env!("CARGO_PKG_VERSION"),
        places.sys().display(),
        places.dev().display(),
        places.socket().display()
    );
    notify(&[NotifyState::Ready, NotifyState::Status("serving devices")]);

    let signal = signals.forever().next();
    let name = if signal == Some(SIGINT) {
        "SIGINT"
    } else {
        "SIGTERM"
    };
    tracing::info!("{name}: stopping; another one does not wait for users");
    notify(&[NotifyState::Stopping]);
    // Nobody can begin anything new; those who wait are told by their closed connection.
    drop(control);
    let patience = config
        .stop_timeout
        .map_or(Duration::from_secs(10), |time| time.0);
    take_apart(&core, &parents, patience, &mut signals);
    drop(parents);
    server.unmount_merge();
    drop(server);
    let mounted = mounts
        .write()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    if let Some(mounts) = mounted {
        mounts.stop();
    }
    drop(uevents);
    drop(log);
    tracing::info!("stopped");
    if serve.transient {
        remove(&places.root);
    }
    Ok(())
}

/// What can be wrong with a configuration beyond its form, looked at without serving anything.
fn check(config: &Config, places: &Places) -> anyhow::Result<()> {
    let core = Core::new(core_config(config));
    let parents = make_parents(&core, config)?;
    check_mdevs(config, &parents)?;
    mount_options(config, places)?;
    socket_group(config)?;
    Ok(())
}

fn socket_group(config: &Config) -> anyhow::Result<Option<u32>> {
    Ok(match &config.nodes.socket_group {
        Some(group) => Some(id("/etc/group", group).context("nodes.socket-group")?),
        // Others may give files to their own groups only.
        None if rustix::process::geteuid().is_root() => id("/etc/group", "vfio").ok(),
        None => None,
    })
}

fn root_error(error: &std::io::Error, root: &Path) -> anyhow::Error {
    use std::io::ErrorKind::{AlreadyExists, NotADirectory, PermissionDenied};
    let advice = match error.kind() {
        AlreadyExists | NotADirectory => {
            "; something that is no directory is there: use another one (--root)"
        }
        PermissionDenied => {
            "; be root, or use a directory of your own (--root); `vfioctl run --user` does all \
             that an ordinary user needs"
        }
        _ => "; use another one (--root)",
    };
    anyhow::anyhow!(
        "cannot make the directory {}: {error}{advice}",
        root.display()
    )
}

/// Sends this process a SIGTERM when standard input ends: whoever started it is gone, however it went.
fn stop_at_eof() -> anyhow::Result<()> {
    std::thread::Builder::new()
        .name("stdin".to_owned())
        .spawn(|| {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            let own = rustix::process::getpid();
            let _ = rustix::process::kill_process(own, rustix::process::Signal::TERM);
        })?;
    Ok(())
}

/// Takes the directory away, unless something is still mounted in it.
fn remove(root: &Path) {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mounted = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .any(|place| Path::new(place).starts_with(root));
    let removed = if mounted {
        Err(std::io::Error::from(Errno::BUSY))
    } else {
        std::fs::remove_dir_all(root)
    };
    if let Err(error) = removed {
        tracing::warn!("{} stays: {error}", root.display());
    }
}

fn core_config(config: &Config) -> vfio_core::Config {
    let default = vfio_core::Config::default();
    let numbers = Numbers::free();
    vfio_core::Config {
        cdev_major: numbers.cdev_major,
        group_major: numbers.group_major,
        iommu_minor: numbers.iommu_minor,
        cdev: config.cdev.unwrap_or(default.cdev),
        request_interval: config
            .request_interval
            .map_or(default.request_interval, |Seconds(time)| {
                time.max(Duration::from_millis(1))
            }),
        first_iommu_group: config
            .first_iommu_group
            .unwrap_or_else(|| first_free_group(Path::new("/sys"))),
        sysfs_policy: match config.sysfs.unregister {
            None | Some(Unregister::Word(UnregisterWord::Wait)) => Policy::Wait,
            Some(Unregister::Word(UnregisterWord::Force)) => Policy::Disassociate,
            Some(Unregister::Seconds(Seconds(time))) => Policy::WaitThenDisassociate(time),
        },
        ..default
    }
}

/// One past the machine's own groups, so that both fit into one directory.
fn first_free_group(sys: &Path) -> u32 {
    std::fs::read_dir(sys.join("kernel/iommu_groups"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .max()
        .map_or(0, |last| last.saturating_add(1))
}

fn mount_options(config: &Config, places: &Places) -> anyhow::Result<Options> {
    let owner = |config: &Option<String>, file: &str, own: u32| match config {
        Some(name) => id(file, name),
        None => Ok(own),
    };
    let own = own_ids();
    let uid = owner(&config.nodes.owner, "/etc/passwd", own.0).context("nodes.owner")?;
    let gid = owner(&config.nodes.group, "/etc/group", own.1).context("nodes.group")?;
    let default = Options::under(&places.root);
    let node = |mode: Option<config::Mode>, default: Owner| Owner {
        uid,
        gid,
        mode: mode.map_or(default.mode, |mode| mode.0),
    };
    let nodes = &config.nodes;
    Ok(Options {
        dev: places.dev(),
        sys: places.sys(),
        sys_owner: own,
        device: node(nodes.mode, default.device),
        group: node(nodes.group_mode.or(nodes.mode), default.group),
        container: node(nodes.container_mode, default.container),
        iommu: node(nodes.iommu_mode, default.iommu),
        ..default
    })
}

/// Who owns what nothing is said of: root, or in a user namespace without root its only user.
pub(crate) fn own_ids() -> (u32, u32) {
    (
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    )
}

/// A user's or group's number from its name or itself.
pub(crate) fn id(file: &str, name: &str) -> anyhow::Result<u32> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let text = std::fs::read_to_string(file).with_context(|| file.to_owned())?;
    text.lines()
        .filter_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .find_map(|rest| rest.split(':').nth(1)?.parse().ok())
        .with_context(|| format!("{name} is not in {file}"))
}

fn mount_error(errno: Errno, root: &Path) -> anyhow::Error {
    let why = match errno {
        Errno::NOENT | Errno::NXIO | Errno::NODEV => {
            "there is no /dev/fuse; load the module (modprobe fuse), or give the container the device"
        }
        Errno::PERM | Errno::ACCESS => {
            "mounting needs CAP_SYS_ADMIN: be root, or in a user namespace of your own \
             (unshare -Urm)"
        }
        Errno::EXIST | Errno::NOTDIR => {
            "sys or dev is there and is no directory; move it away, or use another directory (--root)"
        }
        Errno::MFILE => FILES_ADVICE,
        _ => "the kernel refused the mount",
    };
    anyhow::anyhow!("cannot mount below {}: {errno}: {why}", root.display())
}

/// The soft limit of open files goes to the hard one.
pub(crate) fn raise_files() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let raised = Rlimit {
            current: limit.maximum,
            ..limit
        };
        if let Err(errno) = setrlimit(Resource::Nofile, raised) {
            tracing::warn!(
                "the limit of open files stays at {:?}: {errno}",
                limit.current
            );
        }
    }
}

/// One daemon for one root.
fn lock(root: &Path) -> anyhow::Result<OwnedFd> {
    let dir = rustix::fs::open(root, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive).map_err(
        |errno| match errno {
            Errno::WOULDBLOCK => anyhow::anyhow!(
                "another vfiod serves {}; stop it, or use another directory (--root)",
                root.display()
            ),
            other => anyhow::anyhow!("{}: {other}", root.display()),
        },
    )?;
    Ok(dir)
}

/// Takes away what a daemon that was killed has left: a mount whose server is gone.
pub(crate) fn clear_stale(place: &Path) {
    for _ in 0..16 {
        match rustix::fs::stat(place) {
            Err(Errno::NOTCONN | Errno::CONNABORTED) => {
                tracing::warn!("{}: taking away a mount without a server", place.display());
                if rustix::mount::unmount(place, UnmountFlags::DETACH).is_err() {
                    return;
                }
            }
            _ => return,
        }
    }
}

/// Unregisters everything: asks the users, waits, cuts them off; a second signal waits no longer.
fn take_apart(
    core: &Core,
    parents: &[Arc<mdev::Parent>],
    patience: Duration,
    signals: &mut Signals,
) {
    let begun = Instant::now();
    let mut waits: Vec<Waiting> = Vec::new();
    for parent in parents {
        match parent.unregister(Policy::WaitThenDisassociate(patience)) {
            Outcome::Waiting(waiting) => waits.push(waiting),
            Outcome::Done(Ok(())) => {}
            Outcome::Done(Err(errno)) => {
                tracing::warn!("mdev {}: unregister: {errno}", parent.device().name());
            }
        }
    }
    for waiting in core.model().unregistering() {
        tracing::info!("{}: {}", waiting.device().name(), waiting.describe());
        if !waits
            .iter()
            .any(|other| Arc::ptr_eq(other.device(), waiting.device()))
        {
            waits.push(waiting);
        }
    }
    let mut forced = false;
    for waiting in &waits {
        while waiting.wait_for(Duration::from_millis(50)).is_none() {
            let late = begun.elapsed() >= patience;
            if !forced && (signals.pending().next().is_some() || late) {
                forced = true;
                tracing::warn!(
                    "{}: cutting off those who still have a device open",
                    if late {
                        "the time is up"
                    } else {
                        "another signal"
                    }
                );
                for waiting in &waits {
                    waiting.disassociate();
                }
            }
        }
    }
    for parent in parents {
        let _ = parent.device().remove(core, Policy::Disassociate);
    }
    if !waits.is_empty() {
        tracing::info!("waited {:.1} s for users", begun.elapsed().as_secs_f64());
    }
}

/// The life of each device, in the log.
pub(crate) fn log_event(notice: &Notice) {
    let Notice::Event(event) = notice else {
        return;
    };
    let Event {
        device,
        parent,
        what,
        ..
    } = event;
    // Most are not logged, and need no name.
    let device = || format!("vfio-dev {device}");
    match what {
        What::Registered => tracing::info!(device = device(), "registered for {parent}"),
        What::Unregistering { users: 0 } => tracing::debug!(device = device(), "unregistering"),
        What::Unregistering { users } => {
            tracing::info!(device = device(), "unregistering, {users} open");
        }
        What::Requested { count } => {
            tracing::info!(
                device = device(),
                "users asked to let go of {parent} ({count})"
            );
        }
        What::Disassociated => tracing::warn!(device = device(), "its users are cut off"),
        What::Released => tracing::info!(device = device(), "released"),
        What::Panicked => tracing::error!(device = device(), "a driver callback panicked"),
        other => tracing::debug!(device = device(), "{other:?}"),
    }
}

pub(crate) fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!("service manager: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_begin_after_the_machines_own() {
        let sys = tempfile::tempdir().unwrap();
        assert_eq!(first_free_group(sys.path()), 0);
        for group in ["0", "9", "10"] {
            std::fs::create_dir_all(sys.path().join("kernel/iommu_groups").join(group)).unwrap();
        }
        assert_eq!(first_free_group(sys.path()), 11);
    }

    #[test]
    fn names_and_numbers_of_users() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("group");
        std::fs::write(&file, "vfiox:x:1:\nvfio:x:77:a,b\n").unwrap();
        let file = file.to_str().unwrap();
        assert_eq!(id(file, "vfio").unwrap(), 77);
        assert_eq!(id(file, "5").unwrap(), 5);
        assert!(id(file, "vf").is_err());
    }
}
