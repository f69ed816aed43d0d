//! The serial console of a guest, as text to wait for.

use std::io::Read;
use std::sync::Arc;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

/// What came over the serial console and what QEMU said, in order of arrival.
#[derive(Debug, Default)]
pub(crate) struct Console {
    state: Mutex<ConsoleState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct ConsoleState {
    bytes: Vec<u8>,
    /// Where the answer to the next command begins.
    read: usize,
    ended: bool,
}

impl Console {
    fn lock(&self) -> MutexGuard<'_, ConsoleState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(
        &self,
        state: MutexGuard<'a, ConsoleState>,
        limit: Duration,
    ) -> MutexGuard<'a, ConsoleState> {
        self.changed
            .wait_timeout(state, limit)
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }

    /// Collects `stream` until it ends; the end of the console is the end of the guest.
    pub(crate) fn read(self: &Arc<Self>, mut stream: impl Read + Send + 'static, is_console: bool) {
        let console = Arc::clone(self);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                let got = stream.read(&mut buffer).unwrap_or(0);
                let mut state = console.lock();
                // The serial line ends lines with CR LF where the kernel prints.
                state
                    .bytes
                    .extend(buffer.iter().take(got).filter(|byte| **byte != b'\r'));
                state.ended |= got == 0 && is_console;
                drop(state);
                console.changed.notify_all();
                if got == 0 {
                    return;
                }
            }
        });
    }

    /// Waits for `after`, then for `end`; returns what is between them and reads on behind `end`.
    pub(crate) fn wait_for(
        &self,
        after: &str,
        end: &str,
        deadline: Instant,
        what: &str,
    ) -> Result<String, String> {
        let mut state = self.lock();
        loop {
            let unread = state.bytes.get(state.read..).unwrap_or_default();
            let begin = find(unread, after.as_bytes()).map(|at| at + after.len());
            let found = begin.and_then(|begin| {
                let rest = unread.get(begin..)?;
                let length = find(rest, end.as_bytes())?;
                Some((
                    String::from_utf8_lossy(rest.get(..length)?).into_owned(),
                    begin + length + end.len(),
                ))
            });
            if let Some((text, length)) = found {
                state.read += length;
                return Ok(text);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let problem = if state.ended {
                "the guest is gone"
            } else if left.is_zero() {
                "the guest has not answered in time"
            } else {
                state = self.wait(state, left);
                continue;
            };
            drop(state);
            return Err(self.complain(&format!("{what}: {problem}")));
        }
    }

    /// Waits until the guest has closed its console. False if it has not by then.
    pub(crate) fn wait_for_end(&self, deadline: Instant) -> bool {
        let mut state = self.lock();
        while !state.ended {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.wait(state, left);
        }
        true
    }

    /// All that came so far.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().bytes).into_owned()
    }

    /// A message with the end of the log.
    pub(crate) fn complain(&self, message: &str) -> String {
        let state = self.lock();
        let log = String::from_utf8_lossy(&state.bytes);
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines
            .get(lines.len().saturating_sub(40)..)
            .unwrap_or_default()
            .join("\n");
        format!("{message}\n--- end of the guest's console ---\n{tail}\n---")
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    if what.is_empty() {
        return Some(0);
    }
    bytes.windows(what.len()).position(|window| window == what)
}
