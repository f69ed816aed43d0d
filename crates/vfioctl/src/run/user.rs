//! `vfioctl run --user`: a daemon for one command, started by an ordinary user.
//!
//! This process, and with it the command, moves into a user namespace in which it is who it was, and
//! into a mount namespace of that; there it has every capability until it executes something, and
//! the daemon, which is started in between, keeps them. So the daemon may mount and reach the
//! command's memory and descriptors. What belongs to the machine stays out of reach: the kernel hands
//! no file through to a mapping (`fs/fuse/backing.c`, `fuse_backing_open`) and opens no file of
//! `/proc/PID/map_files` (`fs/proc/base.c`, `proc_map_files_get_link`) for them.
//!
//! The daemon ends, and takes its directory away, when the last process has closed the descriptor that
//! [`OwnDaemon::lifeline`] is: this one by its end, or whoever else was given it.

use crate::fail::{Fail, Result};
use crate::namespace;
use nix::sched::CloneFlags;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use vfiod_control::{Answer, Call, Client};

/// What `run --user` takes.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct Options {
    /// Start a daemon for this command, as whoever you are, in a user namespace; it ends with the
    /// command. Regions cannot be mapped then, and anonymous shared memory is copied.
    #[arg(long)]
    pub(crate) user: bool,
    /// Start a device with it, and give its UUID to the command: VFIOD_UUID is that of the first,
    /// VFIOD_UUIDS has all. Inside, `vfioctl start` makes more.
    #[arg(long, value_name = "TYPE[=UUID]", requires = "user")]
    start: Vec<String>,
    /// The daemon's configuration; $XDG_CONFIG_HOME/vfiod/vfiod.toml otherwise, if it is there.
    #[arg(long, value_name = "FILE", requires = "user")]
    config: Option<PathBuf>,
    /// Write the daemon's log into this file; nowhere otherwise.
    #[arg(long, value_name = "FILE", requires = "user")]
    log: Option<PathBuf>,
}

/// How long the daemon may take to answer. It needs no more than a few milliseconds.
const START_LIMIT: Duration = Duration::from_secs(30);

/// The daemon of this command.
#[derive(Debug)]
pub(super) struct OwnDaemon {
    root: PathBuf,
    lifeline: OwnedFd,
    uuids: Vec<String>,
}

impl OwnDaemon {
    /// Starts it, in namespaces which this process is in afterwards. It must have one thread.
    pub(super) fn start(options: &Options) -> Result<OwnDaemon> {
        let vfiod = program()?;
        let config = config(options)?;
        let root = directory(&runtime_dir()?)?;
        namespace::own_user(CloneFlags::CLONE_NEWNS).map_err(|error| {
            let _ = std::fs::remove_dir(&root);
            Fail::failed(format!(
                "no user namespace: {error}; `vfioctl doctor` tells what forbids it"
            ))
        })?;
        namespace::mounts_stay_inside()
            .map_err(|errno| Fail::failed(format!("mount propagation: {errno}")))?;
        let log = options
            .log
            .clone()
            .unwrap_or_else(|| root.join("vfiod.log"));
        let mut serve: Vec<OsString> = vec![vfiod.into(), "serve".into(), "--transient".into()];
        serve.extend(["--root".into(), root.clone().into()]);
        if let Some(config) = config {
            serve.extend(["--config".into(), config.into()]);
        }
        let (lifeline, pid) = spawn(&serve, &log)?;
        let mut daemon = OwnDaemon {
            root,
            lifeline,
            uuids: Vec::new(),
        };
        let mut client = daemon.wait(pid, &log)?;
        // Once, and before the command prints anything.
        eprintln!(
            "vfioctl: a vfiod of your own, without privilege: no region can be mapped (accesses trap), \
             and anonymous shared memory is copied"
        );
        for wanted in &options.start {
            let (mdev_type, uuid) = match wanted.split_once('=') {
                Some((mdev_type, uuid)) => (mdev_type, Some(uuid.to_owned())),
                None => (wanted.as_str(), None),
            };
            let call = Call::Start {
                parent: None,
                mdev_type: mdev_type.to_owned(),
                uuid,
            };
            match client.call(call, |_| {})? {
                Answer::Started { uuid, .. } => daemon.uuids.push(uuid),
                _ => return Err(Fail::failed("vfiod gave an answer that does not fit")),
            }
        }
        Ok(daemon)
    }

    /// Its control socket.
    pub(super) fn socket(&self) -> PathBuf {
        self.root.join("vfiod.sock")
    }

    /// The daemon lives as long as somebody has this open. It is closed when this process executes
    /// something.
    pub(super) fn lifeline(&self) -> BorrowedFd<'_> {
        self.lifeline.as_fd()
    }

    /// What the command finds in its environment.
    pub(super) fn environment(&self) -> Vec<(&'static str, OsString)> {
        let mut environment = vec![("VFIOD_SOCKET", self.socket().into_os_string())];
        if let Some(first) = self.uuids.first() {
            environment.push(("VFIOD_UUID", first.into()));
            environment.push(("VFIOD_UUIDS", self.uuids.join(" ").into()));
        }
        environment
    }

    /// Waits until it answers.
    fn wait(&self, pid: Pid, log: &Path) -> Result<Client> {
        let process = pidfd_open(pid, PidfdFlags::empty());
        let deadline = Instant::now() + START_LIMIT;
        loop {
            if let Ok(client) = Client::connect(&self.socket()) {
                return Ok(client);
            }
            let ended = match &process {
                // Also the pause until the next attempt.
                Ok(process) => poll(
                    &mut [PollFd::new(process, PollFlags::IN)],
                    Some(&Timespec {
                        tv_sec: 0,
                        tv_nsec: 2_000_000,
                    }),
                )
                .is_ok_and(|ready| ready > 0),
                Err(_) => true,
            };
            if ended || Instant::now() > deadline {
                let why = last_word(log).unwrap_or_else(|| "it said nothing".to_owned());
                self.remove();
                return Err(Fail::failed(format!("vfiod does not serve: {why}")));
            }
        }
    }

    /// Takes away what a daemon that ended by itself has left. What is mounted, is in use, or is
    /// nobody's business stays.
    fn remove(&self) {
        for dir in ["sys", "dev", "merge"] {
            let _ = std::fs::remove_dir(self.root.join(dir));
        }
        for file in ["vfiod.sock", "vfiod.log"] {
            let _ = std::fs::remove_file(self.root.join(file));
        }
        let _ = std::fs::remove_dir(&self.root);
    }
}

/// Starts the daemon as nobody's child, in a session of its own, with the capabilities that this
/// process has. Returns its lifeline and its number.
fn spawn(serve: &[OsString], log: &Path) -> Result<(OwnedFd, Pid)> {
    let failed = |error: std::io::Error| Fail::failed(format!("starting vfiod: {error}"));
    let log_file = std::fs::File::options()
        .create(true)
        .append(true)
        .open(log)
        .map_err(|error| Fail::failed(format!("{}: {error}", log.display())))?;
    let mut command = Command::new("/proc/self/exe");
    command
        .arg("internal-detach")
        .args(serve)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log_file)
        // Other daemons' places are none of its business.
        .env_remove("VFIOD_ROOT")
        .env_remove("NOTIFY_SOCKET");
    let mut between = namespace::with_capabilities_kept(|| command.spawn())
        .map_err(|errno| failed(errno.into()))?
        .map_err(failed)?;
    let lifeline = between.stdin.take();
    let mut pid = String::new();
    if let Some(stdout) = between.stdout.take() {
        BufReader::new(stdout).read_line(&mut pid).map_err(failed)?;
    }
    super::wait(&mut between).map_err(failed)?;
    let pid = pid.trim().parse().ok().and_then(Pid::from_raw);
    match (lifeline, pid) {
        (Some(lifeline), Some(pid)) => Ok((lifeline.into(), pid)),
        _ => Err(Fail::failed(
            last_word(log).unwrap_or_else(|| "vfiod cannot be started".to_owned()),
        )),
    }
}

/// What a program that failed said in the end: an error of several lines begins with its name.
fn last_word(log: &Path) -> Option<String> {
    let said = std::fs::read_to_string(log).ok()?;
    let word = ["\nvfiod: ", "\nvfioctl: "]
        .iter()
        .filter_map(|name| {
            format!("\n{said}")
                .rfind(name)
                .map(|at| at + name.len() - 1)
        })
        .max()
        .and_then(|at| said.get(at..))
        .or_else(|| said.lines().last())?
        .trim();
    (!word.is_empty()).then(|| word.to_owned())
}

/// The process in between: starts a program with its own standard input and errors, prints its
/// number, and ends.
pub(crate) fn internal_detach(command: &[OsString]) -> Result<ExitCode> {
    let Some((program, arguments)) = command.split_first() else {
        return Err(Fail::failed("no command"));
    };
    let _ = rustix::process::setsid();
    let child = Command::new(program)
        .args(arguments)
        .stdout(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(|error| Fail::failed(format!("{}: {error}", Path::new(program).display())))?;
    println!("{}", child.id());
    Ok(ExitCode::SUCCESS)
}

/// vfiod: beside this program, else by name.
fn program() -> Result<PathBuf> {
    let own = std::env::current_exe()
        .map_err(|error| Fail::failed(format!("finding myself: {error}")))?;
    let beside = own.with_file_name("vfiod");
    Ok(if beside.exists() {
        beside
    } else {
        PathBuf::from("vfiod")
    })
}

/// The configuration file, in full: the daemon may have another working directory.
fn config(options: &Options) -> Result<Option<PathBuf>> {
    if let Some(config) = &options.config {
        let full = std::fs::canonicalize(config)
            .map_err(|error| Fail::failed(format!("{}: {error}", config.display())))?;
        return Ok(Some(full));
    }
    let dir = std::env::var_os("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .filter(|dir| dir.is_absolute())
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".config")));
    Ok(dir
        .map(|dir| dir.join("vfiod/vfiod.toml"))
        .filter(|file| file.exists()))
}

/// `$XDG_RUNTIME_DIR`, or a directory of the user's own in its place.
fn runtime_dir() -> Result<PathBuf> {
    let uid = rustix::process::geteuid().as_raw();
    let why = match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from) {
        None => "is not set".to_owned(),
        Some(dir) => match std::fs::metadata(&dir) {
            Ok(meta) if dir.is_absolute() && meta.is_dir() && meta.uid() == uid => return Ok(dir),
            Ok(_) => format!("({}) is no directory of yours", dir.display()),
            Err(error) => format!("({}): {error}", dir.display()),
        },
    };
    let dir = std::env::temp_dir().join(format!("vfiod-{uid}"));
    eprintln!("vfioctl: XDG_RUNTIME_DIR {why}; {} is used", dir.display());
    own_directory(&dir)?;
    Ok(dir)
}

/// Makes a directory that is this user's and nobody else's. What is there already must be one.
fn own_directory(dir: &Path) -> Result {
    let failed = |error: std::io::Error| Fail::failed(format!("{}: {error}", dir.display()));
    match std::fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        other => return other.map_err(failed),
    }
    let meta = std::fs::symlink_metadata(dir).map_err(failed)?;
    let uid = rustix::process::geteuid().as_raw();
    if meta.is_dir() && meta.uid() == uid && meta.mode() & 0o077 == 0 {
        Ok(())
    } else {
        Err(Fail::failed(format!(
            "{} is there and is not yours alone (a directory of mode 700); remove it",
            dir.display()
        )))
    }
}

/// A new directory for a daemon. Those of daemons that were killed are taken away.
fn directory(runtime: &Path) -> Result<PathBuf> {
    let all = runtime.join("vfiod");
    own_directory(&all)?;
    for entry in std::fs::read_dir(&all).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            sweep(&entry.path());
        }
    }
    let own = all.join(format!("{PREFIX}{}", std::process::id()));
    own_directory(&own)?;
    Ok(own)
}

const PREFIX: &str = "run-";

/// Takes the directory away if its `run` and its daemon have ended: the one gave it its number, the
/// other would hold its lock.
fn sweep(dir: &Path) {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let number = name.strip_prefix(PREFIX).and_then(|pid| pid.parse().ok());
    let Some(pid) = number.and_then(Pid::from_raw) else {
        return;
    };
    if rustix::process::test_kill_process(pid) != Err(Errno::SRCH) {
        return;
    }
    let Ok(held) = rustix::fs::open(dir, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) else {
        return;
    };
    if rustix::fs::flock(&held, FlockOperation::NonBlockingLockExclusive).is_ok() {
        // What a killed daemon had mounted went with its mount namespace.
        let _ = std::fs::remove_dir_all(dir);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_is_the_whole_of_the_last_error() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        for (said, word) in [
            ("", None),
            ("vfiod: no\n", Some("no")),
            (
                "[ 1.0] ready\nvfiod: line 1\n  |\n1 | x\n\n",
                Some("line 1\n  |\n1 | x"),
            ),
            ("vfiod: first\nvfioctl: second\n", Some("second")),
            ("one\nkilled\n", Some("killed")),
        ] {
            std::fs::write(&log, said).unwrap();
            assert_eq!(last_word(&log).as_deref(), word, "{said:?}");
        }
    }

    #[test]
    fn a_directory_of_others_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("own");
        own_directory(&own).unwrap();
        own_directory(&own).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&own, &link).unwrap();
        assert!(own_directory(&link).is_err(), "a link can lead anywhere");
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o750);
        std::fs::set_permissions(&own, open).unwrap();
        assert!(own_directory(&own).is_err());
    }

    #[test]
    fn what_a_killed_daemon_left_goes_and_what_one_that_lives_has_stays() {
        let dir = tempfile::tempdir().unwrap();
        let child = std::process::Command::new("true").spawn();
        let mut child = child.unwrap();
        let dead = dir.path().join(format!("vfiod/{PREFIX}{}", child.id()));
        child.wait().unwrap();
        std::fs::create_dir_all(dead.join("sys")).unwrap();
        let all = dead.parent().unwrap();
        let closed = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        std::fs::set_permissions(all, closed).unwrap();
        let live = all.join(format!("{PREFIX}1"));
        std::fs::create_dir(&live).unwrap();
        let own = directory(dir.path()).unwrap();
        assert!(own.exists() && live.exists() && !dead.exists());
    }
}
