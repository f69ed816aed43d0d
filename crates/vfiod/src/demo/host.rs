//! What the host does: it starts clients and hears what they say, writes to sysfs, and waits for
//! what it has begun.

use super::client::{self, Link, MARK, Part};
use super::reach::{Reach, Us};
use super::say::{Teller, Who};
use anyhow::{Context as _, bail};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vfio_core::Core;
use vfio_core::model::Outcome;

/// Nothing here takes longer.
pub(super) const LIMIT: Duration = Duration::from_secs(30);

/// A removal under way.
pub(super) enum Removal {
    Writer(Child),
    Call(Outcome),
}

impl Removal {
    pub(super) fn wait(self) -> anyhow::Result<()> {
        match self {
            Removal::Writer(mut writer) => ended(&mut writer, "the write"),
            Removal::Call(outcome) => done(outcome),
        }
    }
}

/// Writes to a file of our own mount as anybody would: from a process of its own. A thread of
/// this one could keep it from ending, were it stopped in the middle.
pub(super) fn write(file: &Path, text: &str) -> anyhow::Result<Child> {
    Command::new("/bin/sh")
        .args(["-c", "printf %s \"$1\" > \"$0\""])
        .arg(file)
        .arg(text)
        .stdin(Stdio::null())
        .spawn()
        .context("starting a shell")
}

pub(super) fn ended(child: &mut Child, what: &str) -> anyhow::Result<()> {
    let status = child.wait()?;
    if !status.success() {
        bail!("{what} failed: {status}");
    }
    Ok(())
}

pub(super) fn done(outcome: Outcome) -> anyhow::Result<()> {
    Ok(outcome.wait_for(LIMIT).context("it did not end")??)
}

/// The client as the host has it: lines to read, and whoever writes them.
pub(super) struct Client {
    teller: Arc<Teller>,
    lines: BufReader<Box<dyn std::io::Read + Send>>,
    input: Box<dyn Write + Send>,
    body: Body,
}

enum Body {
    Process(Child),
    Thread(Option<JoinHandle<anyhow::Result<()>>>),
}

impl Client {
    pub(super) fn process(
        teller: &Arc<Teller>,
        part: Part,
        name: &str,
        dev: &Path,
    ) -> anyhow::Result<Client> {
        let part = clap::ValueEnum::to_possible_value(&part).context("no such part")?;
        let mut child = Command::new(std::env::current_exe().context("where this program is")?)
            .args([
                "demo",
                "--client",
                part.get_name(),
                "--device",
                name,
                "--nodes",
            ])
            .arg(dev)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting the client")?;
        let lines = child.stdout.take().context("no output")?;
        let input = child.stdin.take().context("no input")?;
        teller.line(
            Who::Host,
            &format!("a client is started, pid {}", child.id()),
        )?;
        Ok(Client {
            teller: Arc::clone(teller),
            lines: BufReader::new(Box::new(lines)),
            input: Box::new(input),
            body: Body::Process(child),
        })
    }

    pub(super) fn thread(
        teller: &Arc<Teller>,
        part: Part,
        name: &str,
        core: &Core,
    ) -> anyhow::Result<Client> {
        let (ours, theirs) = UnixStream::pair()?;
        let reach = Reach::Inside(core.clone(), Arc::new(Us::default()));
        let mut link = Link::new(theirs.try_clone()?, theirs);
        let name = name.to_owned();
        let thread = std::thread::Builder::new()
            .name("client".into())
            .spawn(move || client::play(part, &reach, &name, &mut link))?;
        teller.line(Who::Host, "a client is started, as a thread")?;
        Ok(Client {
            teller: Arc::clone(teller),
            lines: BufReader::new(Box::new(ours.try_clone()?)),
            input: Box::new(ours),
            body: Body::Thread(Some(thread)),
        })
    }

    pub(super) fn until(&mut self, point: &str) -> anyhow::Result<()> {
        self.until_one_of(&[point]).map(drop)
    }

    /// Passes on what the client says until it reaches a point.
    pub(super) fn until_one_of(&mut self, points: &[&str]) -> anyhow::Result<String> {
        loop {
            let mut line = String::new();
            if self.lines.read_line(&mut line)? == 0 {
                self.end()?;
                bail!("the client ended before {}", points.join(" or "));
            }
            let line = line.trim_end();
            match line.strip_prefix(MARK) {
                Some(mark) if points.contains(&mark) => return Ok(mark.to_owned()),
                Some(_) => {}
                None => self.teller.line(Who::Client, line)?,
            }
        }
    }

    pub(super) fn go_on(&mut self) -> anyhow::Result<()> {
        writeln!(self.input, "go")?;
        Ok(self.input.flush()?)
    }

    /// Waits for its end; an error of the client's is one of the demo's.
    pub(super) fn end(&mut self) -> anyhow::Result<()> {
        match &mut self.body {
            Body::Process(child) => ended(child, "the client"),
            Body::Thread(thread) => match thread.take() {
                Some(thread) => thread.join().ok().context("the client panicked")?,
                None => Ok(()),
            },
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Body::Process(child) = &mut self.body {
            // After a failure: nothing is left behind.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub(super) fn wait_until(what: &str, f: impl Fn() -> bool) -> anyhow::Result<()> {
    let end = Instant::now() + LIMIT;
    while !f() {
        if Instant::now() > end {
            bail!("{what} did not come");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
