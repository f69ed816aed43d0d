//! What calls cost under `vfioctl run`, against the least that could supervise.

use std::cell::RefCell;
use std::os::fd::IntoRawFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::Pid;
use rustix::process::PidfdFlags;
use rustix::process::PidfdGetfdFlags;
use rustix::process::Signal;
use seccomp_notify::Filter;
use seccomp_notify::Listener;
use vfio_uapi::ioctl::VFIO_GROUP_GET_DEVICE_FD;

use super::Benchmark;
use super::Goal;
use super::measure::Measured;
use super::measure::Pinned;
use super::peer::Converse;
use super::peer::Peer;
use super::peer::Place;
use super::peer::Role;
use super::peer::word;
use crate::workspace;

/// Calls in one round.
const CALLS: u32 = 4_000;
/// What a call that is not trapped may cost more, in nanoseconds.
const MORE: f64 = 30.0;

/// The rows of this file.
pub(super) const ROWS: [Benchmark; 4] = [
    Benchmark {
        name: "VFIO_GROUP_GET_DEVICE_FD and close, under run",
        against: "a null supervisor that opens the file of a null FUSE server and adds it (ADDFD)",
        goal: Goal::AtMost(1.3),
        known_miss: Some(
            "1.24 to 1.32: as many requests as the null one has (one less: node attributes may be kept), but \
             the client's descriptor is copied and looked at, the name is copied, and a session is opened \
             and closed for whom `who` will name, each time",
        ),
        run: device_fd,
    },
    Benchmark {
        name: "fstat of an ordinary file, under run",
        against: "a null supervisor that lets it through (CONTINUE)",
        goal: Goal::AtMost(1.3),
        known_miss: Some(
            "1.5 to 1.6: whether a descriptor is one of ours is one more system call, a look through /proc \
             (0.9 us in a loop, more after a switch of processes, beside 2.7 in all). A copy of it \
             (pidfd_getfd) costs less, but its close would flush files of strangers",
        ),
        run: fstat,
    },
    Benchmark {
        name: "getppid, under run",
        against: "the same without run, and 30 ns",
        goal: Goal::AtMost(1.0),
        known_miss: None,
        run: |rounds| untrapped(rounds, "getppid"),
    },
    Benchmark {
        name: "an ioctl of another kind, under run",
        against: "the same without run, and 30 ns",
        goal: Goal::AtMost(1.0),
        known_miss: Some(
            "0.98 to 1.02 on a quiet machine: of ioctl some words are trapped, so the filter runs, which is 27 \
             to 33 ns with what the kernel does around it, of which five comparisons are ours",
        ),
        run: |rounds| untrapped(rounds, "other-ioctl"),
    },
];

/// The least that could supervise. It can have a null FUSE server's file to give away.
#[derive(Debug)]
pub(super) struct Null {
    file: Option<PathBuf>,
}

impl Null {
    pub(super) fn start(arguments: &[String]) -> Result<Self> {
        Ok(Self {
            file: arguments.first().map(PathBuf::from),
        })
    }
}

impl Converse for Null {
    fn answer(&mut self, words: &[&str]) -> Result<String> {
        let ["supervise", ..] = words else {
            bail!("a null supervisor cannot {words:?}");
        };
        let pid = Pid::from_raw(word(words, 1)?).context("a process")?;
        let process = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
        let listener =
            rustix::process::pidfd_getfd(process, word(words, 2)?, PidfdGetfdFlags::empty())?;
        let listener = Listener::from(listener);
        // As ours does.
        let _ = listener.set_sync_wake_up();
        let file = self.file.clone();
        std::thread::spawn(move || serve(&listener, file.as_deref()));
        Ok(String::new())
    }
}

fn serve(listener: &Listener, file: Option<&Path>) {
    loop {
        let call = match listener.recv() {
            Ok(call) => call,
            Err(Errno::INTR) => continue,
            Err(_) => return,
        };
        // A caller that is gone is not answered.
        let _ = if call.number == libc::SYS_ioctl {
            let file = file.ok_or(Errno::NODEV).and_then(|file| {
                rustix::fs::open(file, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            });
            match file {
                Ok(file) => listener.result_fd(call.id, file, true).map(drop),
                Err(errno) => listener.error(call.id, errno),
            }
        } else {
            listener.let_through(call.id)
        };
    }
}

/// For a client: the same calls are trapped as under `run`. Answers with its process and the
/// listener's number.
pub(super) fn trap() -> Result<String> {
    let installed = Filter::new()
        .trap_argument(libc::SYS_ioctl, 1, [VFIO_GROUP_GET_DEVICE_FD])
        .trap(libc::SYS_fstat)
        .trap(libc::SYS_newfstatat)
        .trap(libc::SYS_statx)
        .install()?;
    // It is the supervisor's from here on; closed here when the process ends.
    let listener = OwnedFd::from(installed.listener).into_raw_fd();
    Ok(format!("{} {listener}", std::process::id()))
}

/// A client under a null supervisor.
struct NullRun {
    client: Peer,
    _supervisor: Peer,
    _server: Option<Peer>,
    _place: Place,
}

impl NullRun {
    fn start(with_server: bool) -> Result<Self> {
        let place = Place::new()?;
        let file = format!("{}/null0", place.path());
        let (server, arguments) = if with_server {
            let server = Peer::start(Role::Null, &[place.path()])?;
            (Some(server), vec![file.as_str()])
        } else {
            (None, Vec::new())
        };
        let mut supervisor = Peer::start(Role::NullSupervisor, &arguments)?;
        let mut client = Peer::start(Role::Client, &[])?;
        let listener = client.ask("trap")?;
        supervisor.ask(&format!("supervise {listener}"))?;
        Ok(Self {
            client,
            _supervisor: supervisor,
            _server: server,
            _place: place,
        })
    }
}

/// A daemon with one device. Dropping it ends it.
struct Daemon {
    child: Child,
    programs: PathBuf,
    root: Place,
}

impl Daemon {
    /// Builds the programs as this one was built, and starts one.
    fn start() -> Result<Self> {
        let own = std::env::current_exe()?;
        let programs = own.parent().context("a directory")?.to_owned();
        let mut build = Command::new(workspace::cargo());
        build
            .args(["build", "--quiet", "--release"])
            .args(["--package", "vfiod", "--package", "vfioctl"])
            .arg("--target-dir")
            .arg(programs.parent().context("a directory")?)
            .current_dir(env!("CARGO_MANIFEST_DIR"));
        workspace::run(&mut build)?;
        let root = Place::new()?;
        let mut child = Command::new(programs.join("vfiod"))
            .args(["serve", "--root", root.path()])
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting vfiod")?;
        let log = child.stderr.take().context("no pipe from vfiod")?;
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(log));
        let serves = lines.any(|line| line.is_ok_and(|line| line.contains(" serves ")));
        let daemon = Self {
            child,
            programs,
            root,
        };
        if !serves {
            bail!("vfiod does not serve");
        }
        // What it logs is read, so that it never waits.
        std::thread::spawn(move || lines.for_each(drop));
        let mut start = daemon.vfioctl();
        workspace::output(start.args(["start", "mtty-1"]))?;
        Ok(daemon)
    }

    fn vfioctl(&self) -> Command {
        let mut command = Command::new(self.programs.join("vfioctl"));
        command
            .env_remove("VFIOD_SOCKET")
            .env_remove("VFIOD_ROOT")
            .args(["--root", self.root.path()]);
        command
    }

    /// A client under `vfioctl run`.
    fn client(&self) -> Result<Peer> {
        let mut run = self.vfioctl();
        run.args(["run", "--"]).arg(std::env::current_exe()?);
        run.stderr(Stdio::null());
        Peer::start_by(run, Role::Client, &[])
    }

    /// The number of the only group.
    fn group(&self) -> Result<u32> {
        let list = workspace::output(self.vfioctl().args(["list", "--json"]))?;
        let list: serde_json::Value = serde_json::from_str(&list)?;
        let group = list.pointer("/devices/0/iommu_group");
        let group = group.and_then(serde_json::Value::as_u64);
        Ok(u32::try_from(group.context("the device has no group")?)?)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(pid) = Pid::from_raw(self.child.id().cast_signed()) {
            let _ = rustix::process::kill_process(pid, Signal::TERM);
        }
        let _ = self.child.wait();
    }
}

fn device_fd(rounds: u32) -> Result<Measured> {
    let _pinned = Pinned::to(0)?;
    let daemon = Daemon::start()?;
    let mut ours = daemon.client()?;
    ours.ask(&format!("group {}", daemon.group()?))?;
    ours.ask("keep")?;
    let null = RefCell::new(NullRun::start(true)?);
    let ours = RefCell::new(ours);
    Measured::interleaved(
        rounds,
        || ours.borrow_mut().number(&format!("device-fd {CALLS}")),
        || {
            let client = &mut null.borrow_mut().client;
            client.number(&format!("any-fd {CALLS}"))
        },
    )
}

fn fstat(rounds: u32) -> Result<Measured> {
    let _pinned = Pinned::to(0)?;
    let daemon = Daemon::start()?;
    let ours = RefCell::new(daemon.client()?);
    let null = RefCell::new(NullRun::start(false)?);
    let calls = format!("fstat {CALLS}");
    Measured::interleaved(
        rounds,
        || ours.borrow_mut().number(&calls),
        || null.borrow_mut().client.number(&calls),
    )
}

fn untrapped(rounds: u32, call: &str) -> Result<Measured> {
    let _pinned = Pinned::to(0)?;
    let daemon = Daemon::start()?;
    let ours = RefCell::new(daemon.client()?);
    let plain = RefCell::new(Peer::start(Role::Client, &[])?);
    let calls = format!("{call} {}", 10 * CALLS);
    Measured::interleaved(
        rounds,
        || ours.borrow_mut().number(&calls),
        || Ok(plain.borrow_mut().number(&calls)? + MORE),
    )
}
