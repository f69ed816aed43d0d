//! Log lines on standard error, shaped as the kernel's: `vfio-dev vfio0: …`, `mtty mtty: …`.

use anyhow::Context as _;
use std::fmt;
use std::io::IsTerminal;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Starts logging: `level` if given, else `RUST_LOG`, else `info`.
///
/// # Errors
/// A level that is none.
pub(crate) fn start(level: Option<&str>) -> anyhow::Result<()> {
    let filter = match level {
        Some(level) => filter(level)?,
        None => EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")),
    };
    let style = if std::io::stderr().is_terminal() {
        Style::Terminal
    } else if std::env::var_os("JOURNAL_STREAM").is_some() {
        Style::Journal
    } else {
        Style::Plain
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .event_format(Lines(style))
        .try_init()
        .map_err(|error| anyhow::anyhow!("logging: {error}"))
}

/// A word that is no level would be taken for a part of the program, of which nothing is ever heard.
fn filter(level: &str) -> anyhow::Result<EnvFilter> {
    let is_word = !level.contains(['=', ',', '[']);
    let filter = if level.is_empty() || is_word && level.parse::<LevelFilter>().is_err() {
        None
    } else {
        EnvFilter::try_new(level).ok()
    };
    filter.with_context(|| {
        format!(
            "--log {level:?}: write error, warn, info, debug or trace, or directives as in \
             RUST_LOG: vfio_core=debug,warn"
        )
    })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    /// Seconds since boot as dmesg has them, colour by level.
    Terminal,
    /// The level as the journal wants it (`<4>`); it has its own clock.
    Journal,
    /// Seconds since boot, the level as a word unless it is the ordinary one.
    Plain,
}

struct Lines(Style);

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut parts = Parts::default();
        event.record(&mut parts);
        line(
            &mut writer,
            self.0,
            *event.metadata().level(),
            &parts,
            uptime(),
        )
    }
}

fn uptime() -> (i64, i64) {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    (time.tv_sec, time.tv_nsec / 1000)
}

/// The message, the device it is about, and everything else.
#[derive(Default)]
struct Parts {
    message: String,
    device: Option<String>,
    rest: String,
}

impl Visit for Parts {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        use fmt::Write as _;
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            "device" => self.device = Some(format!("{value:?}")),
            name => {
                let _ = write!(self.rest, " {name}={value:?}");
            }
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "device" => self.device = Some(value.to_owned()),
            "message" => self.message = value.to_owned(),
            _ => self.record_debug(field, &value),
        }
    }
}

fn line(
    writer: &mut impl fmt::Write,
    style: Style,
    level: Level,
    parts: &Parts,
    (seconds, micros): (i64, i64),
) -> fmt::Result {
    let (syslog, colour, word) = match level {
        Level::ERROR => (3, "31", "error: "),
        Level::WARN => (4, "33", "warning: "),
        Level::INFO => (6, "0", ""),
        Level::DEBUG | Level::TRACE => (7, "2", "debug: "),
    };
    match style {
        Style::Terminal => write!(writer, "\x1b[32m[{seconds:5}.{micros:06}]\x1b[{colour}m ")?,
        Style::Journal => write!(writer, "<{syslog}>")?,
        Style::Plain => write!(writer, "[{seconds:5}.{micros:06}] {word}")?,
    }
    // Names of processes are in messages: nothing of theirs may steer a terminal or forge a line.
    let mut clean = |text: &str| {
        text.chars()
            .try_for_each(|c| writer.write_char(if c.is_control() { '?' } else { c }))
    };
    if let Some(device) = &parts.device {
        clean(device)?;
        clean(": ")?;
    }
    clean(&parts.message)?;
    clean(&parts.rest)?;
    if style == Style::Terminal {
        writer.write_str("\x1b[0m")?;
    }
    writer.write_char('\n')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(style: Style, level: Level, parts: &Parts) -> String {
        let mut text = String::new();
        line(&mut text, style, level, parts, (12, 34)).unwrap();
        text
    }

    #[test]
    fn levels_and_directives() {
        for good in [
            "info",
            "DEBUG",
            "off",
            "vfio_core=debug,warn",
            "vfio_fuse=trace",
        ] {
            filter(good).unwrap();
        }
        for bad in ["loud", "", "vfio_core=loud", "a=b=c"] {
            let error = filter(bad).unwrap_err().to_string();
            assert!(
                error.contains("--log") && error.contains("trace"),
                "{bad:?}: {error}"
            );
        }
    }

    #[test]
    fn lines_are_those_of_dmesg() {
        let parts = Parts {
            message: "registered".into(),
            device: Some("vfio-dev vfio0".into()),
            rest: " group=1".into(),
        };
        assert_eq!(
            text(Style::Plain, Level::INFO, &parts),
            "[   12.000034] vfio-dev vfio0: registered group=1\n"
        );
        assert_eq!(
            text(Style::Journal, Level::WARN, &parts),
            "<4>vfio-dev vfio0: registered group=1\n"
        );
    }

    #[test]
    fn a_message_is_one_line_without_escapes() {
        let parts = Parts {
            message: "opened by \x1b[2J\nforged".into(),
            ..Parts::default()
        };
        assert_eq!(
            text(Style::Plain, Level::ERROR, &parts),
            "[   12.000034] error: opened by ?[2J?forged\n"
        );
    }
}
