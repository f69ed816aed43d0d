//! The processes of a benchmark: each is this program again, with a role, and is told line by line
//! what to do. Clients and servers are processes of their own because that is what is measured.

use std::io::BufRead;
use std::io::BufReader;
use std::io::Write;
use std::process::Child;
use std::process::ChildStdin;
use std::process::ChildStdout;
use std::process::Command;
use std::process::Stdio;
use std::str::FromStr;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use rustix::thread::ClockId;

use super::client;
use super::null;
use super::served;
use super::vfio_user;

/// What a process of a benchmark is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Role {
    /// Opens nodes and measures what its calls cost.
    Client,
    /// Our server, with devices.
    Served,
    /// The least that could answer.
    Null,
    /// The same, on the CPU of its client.
    NullFollows,
    /// Many devices, counted in memory.
    Registry,
    /// The least that could supervise system calls.
    NullSupervisor,
    /// Speaks vfio-user and measures what its messages cost.
    UserClient,
    /// Our vfio-user server, with devices.
    UserOurs,
    /// The least that could answer on a socket.
    UserRaw,
    /// The server of the `vfio_user` crate.
    UserCrate,
}

/// The hidden command that starts a role.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    role: Role,
    arguments: Vec<String>,
}

/// Plays a role until the other end hangs up.
pub(crate) fn run(options: &Options) -> Result<bool> {
    let arguments = &options.arguments;
    match options.role {
        Role::Client => client::Client::default().converse()?,
        Role::Served => served::Server::start(arguments)?.converse()?,
        Role::Null => null::Server::start(arguments, false)?.converse()?,
        Role::NullFollows => null::Server::start(arguments, true)?.converse()?,
        Role::Registry => super::lifecycle::Counted.converse()?,
        Role::UserClient => vfio_user::Client::default().converse()?,
        Role::UserOurs => vfio_user::Ours::start(arguments)?.converse()?,
        Role::UserRaw => vfio_user::Raw::start(arguments)?.converse()?,
        Role::UserCrate => vfio_user::Crate::start(arguments)?.converse()?,
        Role::NullSupervisor => super::supervised::Null::start(arguments)?.converse()?,
    }
    Ok(true)
}

/// A role: answers one line with one line.
pub(super) trait Converse {
    /// Does what the words say; what it returns is the answer.
    fn answer(&mut self, words: &[&str]) -> Result<String>;

    /// Answers lines until there are no more. Says first that it is there.
    fn converse(mut self) -> Result<()>
    where
        Self: Sized,
    {
        println!("ok");
        for line in std::io::stdin().lock().lines() {
            let line = line?;
            let words: Vec<&str> = line.split_whitespace().collect();
            match self.answer(&words) {
                Ok(answer) => println!("ok {answer}"),
                Err(error) => println!("{error:#}"),
            }
        }
        Ok(())
    }
}

/// A word of a line as a value.
pub(super) fn word<T: FromStr>(words: &[&str], index: usize) -> Result<T>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    let word = words.get(index).context("a word is missing")?;
    word.parse().with_context(|| format!("`{word}`"))
}

/// Nanoseconds on the clock that all processes share.
pub(super) fn now() -> u64 {
    let time = rustix::time::clock_gettime(ClockId::Monotonic);
    let nanoseconds = i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec);
    u64::try_from(nanoseconds).unwrap_or(0)
}

/// A process that plays a role. Dropping it hangs up and waits for its end.
#[derive(Debug)]
pub(super) struct Peer {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Peer {
    /// Starts one; it is ready on return. It may run where this thread may.
    pub(super) fn start(role: Role, arguments: &[&str]) -> Result<Self> {
        Self::start_by(Command::new(std::env::current_exe()?), role, arguments)
    }

    /// Starts one by another program, whose last argument so far is this program.
    pub(super) fn start_by(mut command: Command, role: Role, arguments: &[&str]) -> Result<Self> {
        let role = clap::ValueEnum::to_possible_value(&role).context("a hidden role")?;
        let mut child = command
            .arg("bench-peer")
            .arg(role.get_name())
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting a process of the benchmark")?;
        let input = child.stdin.take();
        let output = child.stdout.take().context("no pipe from the process")?;
        let mut peer = Self {
            child,
            input,
            output: BufReader::new(output),
        };
        peer.listen()
            .with_context(|| format!("role {}", role.get_name()))?;
        Ok(peer)
    }

    /// Says a line without waiting for the answer.
    pub(super) fn say(&mut self, line: &str) -> Result<()> {
        let input = self.input.as_mut().context("it is dead")?;
        writeln!(input, "{line}").context("the process of the benchmark is gone")
    }

    /// Waits for an answer.
    pub(super) fn listen(&mut self) -> Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        match line.trim_end().strip_prefix("ok") {
            Some(answer) => Ok(answer.trim_start().to_owned()),
            None if line.is_empty() => bail!("the process of the benchmark ended"),
            None => bail!("{}", line.trim_end()),
        }
    }

    /// Says a line and waits for the answer.
    pub(super) fn ask(&mut self, line: &str) -> Result<String> {
        self.say(line)?;
        self.listen().with_context(|| format!("asked to {line}"))
    }

    /// Says a line and waits for a number.
    pub(super) fn number(&mut self, line: &str) -> Result<f64> {
        let answer = self.ask(line)?;
        answer.parse().with_context(|| format!("`{answer}`"))
    }

    /// Its process.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills it with SIGKILL; returns when the signal was sent.
    pub(super) fn kill(&mut self) -> Result<u64> {
        let at = now();
        self.child.kill()?;
        Ok(at)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        drop(self.input.take());
        // It ends by itself when its input does; nobody is told how.
        let _ = self.child.wait();
    }
}

/// A directory for mounts, gone when dropped.
#[derive(Debug)]
pub(super) struct Place(std::path::PathBuf);

impl Place {
    /// Makes one.
    pub(super) fn new() -> Result<Self> {
        use std::sync::atomic::AtomicU32;
        use std::sync::atomic::Ordering;
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vfiod-bench-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(Self(path))
    }

    /// Its path; the names of temporary directories are text.
    pub(super) fn path(&self) -> &str {
        self.0.to_str().unwrap_or("/nowhere")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // The servers have unmounted; what a killed one left is detached.
        for name in ["dev", "null0", "null1"] {
            let _ = rustix::mount::unmount(self.0.join(name), rustix::mount::UnmountFlags::DETACH);
        }
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
