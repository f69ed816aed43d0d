//! Serving on the CPU where the client runs.
//!
//! A request between two CPUs costs about fifteen times one on the same CPU when the second is idle and must be woken. So a thread looks, every so
//! many requests, where its client last ran, and goes there.

use std::io::Write;
use std::sync::OnceLock;

use rustix::fs::CWD;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::thread::CpuSet;

/// How many requests lie between two looks after a move; a look costs as much as several requests.
const EVERY: u32 = 256;
/// How many lie between them when the client stays where it is: reached by doubling.
const RARELY: u32 = 2048;

/// What the thread that first started workers was allowed.
static INITIAL: OnceLock<CpuSet> = OnceLock::new();

/// Remembers what this thread may use as what threads of this process may use.
pub(crate) fn remember() {
    if INITIAL.get().is_none()
        && let Ok(allowed) = rustix::thread::sched_getaffinity(None)
    {
        let _ = INITIAL.set(allowed);
    }
}

/// Gives the calling thread the CPUs that the first caller of [`crate::Workers::start`] was allowed. For threads that a handler starts: they inherit
/// the one CPU that [`crate::Policy::follow_cpu`] has bound their starter to.
pub fn restore_affinity() {
    if let Some(initial) = INITIAL.get() {
        // Refused when the process was confined meanwhile; then the confinement holds.
        let _ = rustix::thread::sched_setaffinity(None, initial);
    }
}

/// Binds the thread it was made on to its clients' CPU.
pub(crate) struct Follower {
    allowed: CpuSet,
    bound: Option<usize>,
    /// Requests until the next look.
    left: u32,
    every: u32,
}

impl Follower {
    /// `None` when the thread may use one CPU only, or cannot know.
    pub(crate) fn new() -> Option<Self> {
        let allowed = rustix::thread::sched_getaffinity(None)
            .ok()
            .filter(|allowed| allowed.count() > 1)?;
        // The first look comes soon: a short-lived client gains too.
        Some(Self {
            allowed,
            bound: None,
            left: 16,
            every: EVERY,
        })
    }

    /// Counts a request of the thread `client` names.
    pub(crate) fn request(&mut self, client: impl FnOnce() -> u32) {
        self.left -= 1;
        if self.left != 0 {
            return;
        }
        self.every = (self.every * 2).min(RARELY);
        self.left = self.every;
        let cpu = match client() {
            0 => return,
            client => processor(client),
        };
        let Some(cpu) = cpu else {
            return;
        };
        let wanted = (cpu < CpuSet::MAX_CPU && self.allowed.is_set(cpu)).then_some(cpu);
        if wanted == self.bound {
            return;
        }
        (self.every, self.left) = (EVERY, EVERY);
        let done = match wanted {
            Some(cpu) => {
                let mut one = CpuSet::new();
                one.set(cpu);
                rustix::thread::sched_setaffinity(None, &one)
            }
            None => rustix::thread::sched_setaffinity(None, &self.allowed),
        };
        if done.is_ok() {
            self.bound = wanted;
        }
    }
}

/// The CPU a thread last ran on: field 39 of `/proc/TID/stat`.
fn processor(tid: u32) -> Option<usize> {
    let mut path = [0_u8; 32];
    write!(&mut path[..31], "/proc/{tid}/stat").ok()?;
    let path = std::ffi::CStr::from_bytes_until_nul(&path).ok()?;
    let stat =
        rustix::fs::openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let mut text = [0_u8; 1024];
    let length = rustix::io::read(&stat, &mut text[..]).ok()?;
    parse_processor(text.get(..length)?)
}

fn parse_processor(stat: &[u8]) -> Option<usize> {
    // The command in field 2 may contain spaces and parentheses; the last one closes it.
    let end = stat.iter().rposition(|&byte| byte == b')')?;
    let field = stat
        .get(end + 1..)?
        .split(|&byte| byte == b' ')
        .filter(|field| !field.is_empty())
        .nth(36)?;
    std::str::from_utf8(field).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_is_found_behind_any_command_name() {
        let tail = (3..=52)
            .map(|field| {
                if field == 39 {
                    "7".to_owned()
                } else {
                    (field * 100).to_string()
                }
            })
            .collect::<Vec<_>>()
            .join(" ");
        for command in ["a", "a b", "a) 1 2 (", ")"] {
            assert_eq!(
                parse_processor(format!("12 ({command}) {tail}\n").as_bytes()),
                Some(7)
            );
        }
        assert_eq!(parse_processor(b"12 (a) 1 2"), None);
        assert_eq!(parse_processor(b""), None);
    }

    #[test]
    fn the_kernel_says_where_this_thread_runs() {
        let tid = rustix::thread::gettid()
            .as_raw_nonzero()
            .get()
            .unsigned_abs();
        let cpu = processor(tid).expect("/proc is mounted");
        assert!(cpu < CpuSet::MAX_CPU);
    }
}
