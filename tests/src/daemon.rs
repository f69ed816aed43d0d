//! A `vfiod serve` of a test's own, and `vfioctl` to talk to it.

use std::fs;
use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::ExitStatus;
use std::process::Stdio;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use rustix::mount::UnmountFlags;
use rustix::process::Pid;
use rustix::process::Signal;

use crate::packages;

/// How long it may take to start, and to stop.
const LIMIT: Duration = Duration::from_secs(20);

/// A running daemon. Dropping it stops it, by force if need be, and takes its directory away.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    root: PathBuf,
    vfioctl: PathBuf,
}

/// What a program printed, and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its exit code; -1 if a signal ended it.
    pub code: i32,
    /// What it printed.
    pub out: String,
    /// What it complained about.
    pub err: String,
}

/// Why no daemon can serve here, for [`skip`](crate::skip()).
///
/// # Errors
/// The reason.
pub fn possible() -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("mounting in the machine's own places needs root".to_owned());
    }
    fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map(drop)
        .map_err(|error| format!("/dev/fuse: {error}"))
}

impl Daemon {
    /// Starts one under a directory of its own with this configuration, where `{root}` stands for
    /// that directory, and waits until it answers.
    ///
    /// # Errors
    /// It is not built, ends at once, or does not answer; the message has its log.
    pub fn start(config: &str) -> Result<Self, String> {
        let (vfiod, vfioctl) = (packages::program("vfiod")?, packages::program("vfioctl")?);
        let root = scratch()?;
        let text = config.replace("{root}", &root.to_string_lossy());
        let told = |what: &Path| {
            let what = what.display().to_string();
            move |error: std::io::Error| format!("{what}: {error}")
        };
        let file = root.join("vfiod.toml");
        fs::write(&file, text).map_err(told(&file))?;
        let log = root.join("log");
        let log_file = fs::File::create(&log).map_err(told(&log))?;
        // Should the test die, the daemon stops: setpriv asks the kernel for that.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "TERM"])
            .arg(vfiod)
            .arg("serve")
            .arg("--root")
            .arg(&root)
            .arg("--config")
            .arg(&file)
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log_file)
            .spawn()
            .map_err(|error| format!("setpriv, which runs vfiod: {error}"))?;
        let mut daemon = Self {
            child,
            root,
            vfioctl,
        };
        let deadline = Instant::now() + LIMIT;
        while UnixStream::connect(daemon.socket()).is_err() {
            let ended = daemon.child.try_wait().ok().flatten();
            if ended.is_some() || Instant::now() > deadline {
                return Err(format!("vfiod does not serve:\n{}", daemon.log()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(daemon)
    }

    /// The directory that has everything of it.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Its sysfs.
    pub fn sys(&self) -> PathBuf {
        self.root.join("sys")
    }

    /// Its control socket.
    pub fn socket(&self) -> PathBuf {
        self.root.join("vfiod.sock")
    }

    /// Its `/dev/iommu`.
    pub fn iommu(&self) -> PathBuf {
        self.root.join("dev/iommu")
    }

    /// The node of a VFIO device: `vfio0`.
    pub fn node(&self, name: &str) -> PathBuf {
        self.root.join("dev/vfio/devices").join(name)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.root.join("log")).unwrap_or_default()
    }

    /// `vfioctl`, asking this daemon; arguments are to be added.
    pub fn vfioctl(&self) -> Command {
        let mut command = Command::new(&self.vfioctl);
        command.arg("--root").arg(&self.root);
        command
    }

    /// Runs `vfioctl` with these arguments.
    ///
    /// # Errors
    /// It is still running after 60 s, or could not be run.
    pub fn ctl(&self, arguments: &[&str]) -> Result<Output, String> {
        output(self.vfioctl().args(arguments))
    }

    /// As [`ctl`](Self::ctl), and it must succeed and not complain. Returns what it printed.
    ///
    /// # Errors
    /// It failed or complained.
    pub fn check(&self, arguments: &[&str]) -> Result<String, String> {
        self.ctl(arguments)?
            .success(&format!("vfioctl {}", arguments.join(" ")))
    }

    /// A shell command under `vfioctl run`, which must succeed. Returns what it printed.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn inside(&self, script: &str) -> Result<String, String> {
        self.check(&["run", "--", "sh", "-c", script])
    }

    /// The words that run a command among its devices: `vfioctl --root DIR run --`.
    pub fn runner(&self) -> Vec<String> {
        let mut words: Vec<String> = vec![self.vfioctl.to_string_lossy().into_owned()];
        words.push("--root".to_owned());
        words.push(self.root.to_string_lossy().into_owned());
        words.extend(["run", "--"].map(str::to_owned));
        words
    }

    /// Asks it to stop and waits for its end; nothing of it may be mounted afterwards.
    ///
    /// # Errors
    /// It does not end in time, not with 0, or leaves a mount; the message has its log.
    pub fn stop(mut self) -> Result<(), String> {
        signal(&self.child, Signal::TERM);
        let status = wait(&mut self.child, LIMIT)
            .ok_or_else(|| format!("vfiod does not stop:\n{}", self.log()))?;
        if !status.success() {
            return Err(format!("vfiod ended with {status}:\n{}", self.log()));
        }
        let left = self.mounts();
        if left.is_empty() {
            return Ok(());
        }
        Err(format!(
            "vfiod left {left:?} mounted:\n{}",
            fs::read_to_string(self.root.join("log")).unwrap_or_default()
        ))
    }

    fn mounts(&self) -> Vec<PathBuf> {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let places = table.lines().filter_map(|line| line.split(' ').nth(4));
        places
            .map(PathBuf::from)
            .filter(|place| place.starts_with(&self.root))
            .collect()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of vfiod ---\n{}---", self.log());
        }
        if matches!(self.child.try_wait(), Ok(None)) {
            signal(&self.child, Signal::TERM);
            // The second one does not wait for users.
            signal(&self.child, Signal::TERM);
            if wait(&mut self.child, LIMIT).is_none() {
                let _ = self.child.kill();
                let _ = self.child.wait();
            }
        }
        // Only one that was killed leaves any.
        for place in self.mounts().into_iter().rev() {
            let _ = rustix::mount::unmount(place, UnmountFlags::DETACH);
        }
        let _ = fs::remove_dir_all(&self.root);
    }
}

impl Output {
    /// What it printed, if it succeeded and did not complain.
    ///
    /// # Errors
    /// What happened, with `what` it was.
    pub fn success(self, what: &str) -> Result<String, String> {
        if self.code == 0 && self.err.is_empty() {
            return Ok(self.out);
        }
        Err(format!(
            "{what}: exit code {}\n{}{}",
            self.code, self.out, self.err
        ))
    }
}

/// Runs a program to its end, for at most 60 s.
///
/// # Errors
/// It could not be run, or had to be killed; the message has what it printed.
pub fn output(command: &mut Command) -> Result<Output, String> {
    const LIMIT: Duration = Duration::from_secs(60);
    let shown = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{shown}: {error}"))?;
    let read = |stream: Option<Box<dyn std::io::Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut stream) = stream {
                let _ = stream.read_to_end(&mut bytes);
            }
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let out = read(child.stdout.take().map(|stream| Box::new(stream) as _));
    let err = read(child.stderr.take().map(|stream| Box::new(stream) as _));
    let status = wait(&mut child, LIMIT);
    if status.is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
    let (out, err) = (
        out.join().unwrap_or_default(),
        err.join().unwrap_or_default(),
    );
    let status = status.ok_or_else(|| format!("{shown} does not end:\n{out}{err}"))?;
    Ok(Output {
        code: status.code().unwrap_or(-1),
        out,
        err,
    })
}

/// Waits until a condition holds.
///
/// # Panics
/// It does not within `limit`.
#[track_caller]
pub fn until(what: &str, limit: Duration, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !holds() {
        assert!(Instant::now() < deadline, "in {limit:?} not: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn signal(child: &Child, signal: Signal) {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    if let Some(pid) = pid {
        // One that has ended needs none.
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// The status of a child that ends in time.
fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            _ => return None,
        }
    }
}

/// A new directory. Others may enter: what is in it has modes of its own.
fn scratch() -> Result<PathBuf, String> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let dir = std::env::temp_dir().join(format!(
        "vfiod-test-{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    ));
    fs::create_dir_all(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    Ok(dir)
}
