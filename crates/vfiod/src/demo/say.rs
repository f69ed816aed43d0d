//! What the audience sees: lines on standard output, with colour and time on a terminal.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant, SystemTime};

/// Writes the story.
#[derive(Debug)]
pub(super) struct Teller {
    start: Instant,
    /// Standard output is a terminal: lines carry the time since the start.
    times: bool,
    colour: bool,
}

/// Who a line is about, which is also its colour.
#[derive(Clone, Copy, Debug)]
pub(super) enum Who {
    /// The story itself.
    Host,
    /// The life cycle.
    Core,
    /// The program that uses a device.
    Client,
}

impl Teller {
    /// For standard output as it is. `NO_COLOR` is respected.
    pub(super) fn new() -> Teller {
        let times = io::stdout().is_terminal();
        let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
            || std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Teller {
            start: Instant::now(),
            times,
            colour: times && !plain,
        }
    }

    /// A line that is not part of a step.
    pub(super) fn plain(&self, text: &str) -> io::Result<()> {
        self.write(&format!("{}\n", clean(text)))
    }

    /// The last word.
    pub(super) fn closing(&self, text: &str) -> io::Result<()> {
        self.write(&format!("\n{}\n", self.paint("1;32", &clean(text))))
    }

    /// A step begins.
    pub(super) fn step(&self, title: &str) -> io::Result<()> {
        self.write(&format!("\n{}\n", self.paint("1", &format!("== {title}"))))
    }

    /// Why the step is worth a look.
    pub(super) fn explain(&self, text: &str) -> io::Result<()> {
        self.write(&format!("   {}\n", self.paint("2", text)))
    }

    /// Something happened.
    pub(super) fn line(&self, who: Who, text: &str) -> io::Result<()> {
        let (name, code) = match who {
            Who::Host => ("demo", "36"),
            Who::Core => ("core", "33"),
            Who::Client => ("client", "35"),
        };
        let time = if self.times {
            let ms = self.start.elapsed().as_secs_f64() * 1000.0;
            self.paint("2", &format!("{ms:8.1} ms  "))
        } else {
            "   ".to_owned()
        };
        let name = self.paint(code, &format!("{name:<6}"));
        self.write(&format!("{time}{name}  {}\n", clean(text)))
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    fn write(&self, text: &str) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()
    }
}

/// Names of processes are theirs to choose; they do not steer the terminal.
fn clean(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

/// `1 user`, `2 users`.
pub(super) fn count(n: usize, what: &str) -> String {
    let s = if n == 1 { "" } else { "s" };
    format!("{n} {what}{s}")
}

/// How long ago that was.
pub(super) fn since(micros: u64) -> String {
    let then = SystemTime::UNIX_EPOCH + Duration::from_micros(micros);
    SystemTime::now()
        .duration_since(then)
        .map_or(String::new(), |ago| {
            format!(", for {:.1} s", ago.as_secs_f64())
        })
}
