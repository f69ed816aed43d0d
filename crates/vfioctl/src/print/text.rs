//! Text on a terminal: colour, columns, times.

use std::io::{IsTerminal, Write};
use std::time::{SystemTime, UNIX_EPOCH};
use vfiod_control::view::State;

/// Where output goes, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Style {
    /// Escape sequences for colour.
    pub(crate) colour: bool,
}

impl Style {
    /// For standard output: colour on a terminal unless `NO_COLOR` is set.
    pub(crate) fn stdout() -> Style {
        Style {
            colour: std::io::stdout().is_terminal()
                && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
                && std::env::var_os("TERM").is_none_or(|term| term != "dumb"),
        }
    }

    pub(crate) fn paint(self, code: &str, text: &str) -> String {
        if self.colour && !text.is_empty() {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    pub(super) fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }

    pub(super) fn dim(self, text: &str) -> String {
        self.paint("2", text)
    }

    pub(super) fn state(self, state: State) -> String {
        let code = match state {
            State::Registered => "32",
            State::Unregistering => "33",
            State::Dead => "31",
            State::Unbound => "2",
        };
        self.paint(code, state.as_str())
    }
}

/// Writes to standard output. A reader that went away (`| head`) is no error.
pub(crate) fn out(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush());
}

/// Rows with aligned columns; the first row is the header. Escape sequences have no width.
pub(super) fn table(style: Style, rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            let cells = rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| width(cell)).max().unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        let mut line = String::new();
        for (cell, wide) in row.iter().zip(&widths) {
            let cell_text = if number == 0 {
                style.bold(cell)
            } else {
                cell.clone()
            };
            line.push_str(&cell_text);
            for _ in width(cell)..wide + 2 {
                line.push(' ');
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Characters that take room.
pub(super) fn width(text: &str) -> usize {
    let mut count = 0;
    let mut escape = false;
    for c in text.chars() {
        match (escape, c) {
            (false, '\x1b') => escape = true,
            (true, 'm') => escape = false,
            (true, _) => {}
            (false, _) => count += 1,
        }
    }
    count
}

/// Names come from other processes: nothing of theirs may steer the terminal.
pub(super) fn safe(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

pub(super) fn dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// Time of day in UTC, to the millisecond.
pub(super) fn clock(us: u64) -> String {
    let (seconds, millis) = (us / 1_000_000, us / 1000 % 1000);
    format!(
        "{:02}:{:02}:{:02}.{millis:03}",
        seconds / 3600 % 24,
        seconds / 60 % 60,
        seconds % 60
    )
}

pub(super) fn ago(us: u64) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    span(now.as_secs().saturating_sub(us / 1_000_000))
}

pub(super) fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86400 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86400, seconds / 3600 % 24),
    }
}
