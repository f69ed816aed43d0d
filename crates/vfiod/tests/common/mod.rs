//! A daemon under a directory of its own, and `vfioctl` to talk to it.
#![allow(dead_code, reason = "each test program uses a part")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long anything may take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// The built `vfioctl`.
pub(crate) fn vfioctl() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let vfiod = Path::new(env!("CARGO_BIN_EXE_vfiod"));
        let dir = vfiod.parent().unwrap();
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--package", "vfioctl"]);
        if dir.ends_with("release") {
            build.arg("--release");
        }
        build.args(["--target-dir".as_ref(), dir.parent().unwrap().as_os_str()]);
        let status = build
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status()
            .unwrap();
        assert!(status.success(), "vfioctl does not build");
        dir.join("vfioctl")
    })
}

/// A running daemon. Dropping it stops it, and checks that it leaves nothing mounted.
pub(crate) struct Daemon {
    pub(crate) child: Child,
    pub(crate) log: Receiver<String>,
    seen: Vec<String>,
    root: TempDir,
}

impl Daemon {
    pub(crate) fn start() -> Daemon {
        Daemon::with_config("")
    }

    pub(crate) fn with_config(config: &str) -> Daemon {
        let root = tempfile::tempdir().unwrap();
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir_all(root.path().join("etc/vfiod")).unwrap();
        fs::write(root.path().join("etc/vfiod/vfiod.toml"), config).unwrap();
        Daemon::on(root, &[])
    }

    /// Started by `prefix`, a program that becomes it.
    pub(crate) fn on(root: TempDir, prefix: &[&str]) -> Daemon {
        let mut words = prefix.to_vec();
        words.push(env!("CARGO_BIN_EXE_vfiod"));
        let mut child = Command::new(words[0])
            .args(&words[1..])
            .args(["serve", "--log", "debug", "--root"])
            .arg(root.path())
            .stderr(Stdio::piped())
            .env_remove("NOTIFY_SOCKET")
            .env_remove("JOURNAL_STREAM")
            .spawn()
            .unwrap();
        let log = lines(child.stderr.take().unwrap());
        let mut daemon = Daemon {
            child,
            log,
            seen: Vec::new(),
            root,
        };
        daemon.expect_log(" serves ");
        daemon
    }

    /// Waits for a line of the log.
    pub(crate) fn expect_log(&mut self, text: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.log.recv_timeout(left) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if line.contains(text) {
                        return line;
                    }
                }
                Err(_) => panic!("no {text:?} in the log:\n{}", self.seen.join("\n")),
            }
        }
    }

    pub(crate) fn root(&self) -> &Path {
        self.root.path()
    }

    /// A path below the root.
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    pub(crate) fn node(&self, name: &str) -> PathBuf {
        self.path("dev/vfio/devices").join(name)
    }

    /// A command under way, and the lines it says on standard error.
    pub(crate) fn begin(&self, args: &[&str]) -> (Killed, Receiver<String>) {
        let mut child = self.command(args).stderr(Stdio::piped()).spawn().unwrap();
        let said = lines(child.stderr.take().unwrap());
        (Killed(child), said)
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(vfioctl());
        command
            .env_remove("VFIOD_SOCKET")
            .env_remove("VFIOD_ROOT")
            .arg("--root")
            .arg(self.root.path())
            .args(args);
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// What a command that works prints.
    pub(crate) fn text(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    pub(crate) fn json(&self, args: &[&str]) -> serde_json::Value {
        let mut args = args.to_vec();
        args.push("--json");
        serde_json::from_str(&self.text(&args)).unwrap()
    }

    pub(crate) fn code(&self, args: &[&str]) -> i32 {
        self.run(args).status.code().unwrap()
    }

    /// A new serial card: its UUID.
    pub(crate) fn card(&self) -> String {
        self.text(&["start", "mtty-1"]).trim().to_owned()
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> std::process::ExitStatus {
        until("vfiod ends", || self.child.try_wait().unwrap())
    }

    /// The directory, for another daemon.
    pub(crate) fn into_root(mut self) -> TempDir {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let other = tempfile::tempdir().unwrap();
        std::mem::replace(&mut self.root, other)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.child.try_wait().unwrap().is_some() {
            return;
        }
        self.signal(rustix::process::Signal::TERM);
        let status = self.wait();
        if std::thread::panicking() {
            eprintln!("the daemon's log:\n{}", self.seen.join("\n"));
            self.log.try_iter().for_each(|line| eprintln!("{line}"));
            return;
        }
        assert!(status.success(), "{status:?}");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let left = mounts.contains(self.root.path().to_str().unwrap());
        assert!(!left, "something is still mounted:\n{mounts}");
    }
}

/// A child that is killed when it goes out of scope.
pub(crate) struct Killed(pub(crate) Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A process that has a file open as descriptor 0 and does nothing.
pub(crate) fn holder(file: &Path) -> Killed {
    let file = fs::File::open(file).unwrap();
    Killed(
        Command::new("sleep")
            .arg("1000")
            .stdin(file)
            .spawn()
            .unwrap(),
    )
}

/// Lines of a stream, as they come.
pub(crate) fn lines(stream: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Waits for a value.
#[track_caller]
pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = look() {
            return value;
        }
        assert!(Instant::now() < end, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
