//! Names of processes that are asked for often.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use rustix::fd::OwnedFd;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::Pid;

use crate::Caller;
use crate::Result;
use crate::proc;

/// So many threads are remembered, each by two descriptors at most.
const KEPT: usize = 8;
/// Longest name, its newline included, as the kernel's buffer has it (`fs/proc/base.c`, `comm_show`).
const LONGEST: usize = 64;

/// What [`Caller::process`] says, for callers that come again: a system call or two each time, not nine.
///
/// It keeps `/proc/TID/comm` of the last few threads open. Such a file belongs to one task for ever, and
/// reading it tells the task's name of this moment: so neither is a number ever taken for the thread that
/// had it before, nor is a name from before an exec told.
#[derive(Debug, Default)]
pub struct Processes {
    kept: Mutex<Vec<Kept>>,
}

#[derive(Debug)]
struct Kept {
    tid: Pid,
    tgid: Pid,
    /// The thread's; `None` for one that leads its process.
    thread: Option<OwnedFd>,
    process: OwnedFd,
}

impl Processes {
    /// The caller's process and its name, at most 15 bytes, any bytes.
    ///
    /// # Errors
    /// [`Errno::SRCH`]: the caller is gone. [`Errno::MFILE`]: no descriptor left.
    pub fn of(&self, caller: Caller) -> Result<(Pid, OsString)> {
        let tid = caller.tid();
        let mut kept = self.kept();
        if let Some(at) = kept.iter().position(|one| one.tid == tid) {
            if let Some(Ok(known)) = kept.get(at).map(Kept::now) {
                return Ok(known);
            }
            // The number is another's, or nobody's.
            kept.swap_remove(at);
        }
        drop(kept);
        let new = Kept::new(caller)?;
        let now = new.now()?;
        let mut kept = self.kept();
        if kept.len() >= KEPT {
            kept.clear();
        }
        kept.push(new);
        Ok(now)
    }

    fn kept(&self) -> MutexGuard<'_, Vec<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn new(caller: Caller) -> Result<Self> {
        let tid = caller.tid();
        let open = |pid| {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            rustix::fs::open(proc::path(pid, "comm"), flags, Mode::empty()).map_err(proc::gone)
        };
        // Opened before it is asked whose it is: what it says then is of the task that is open.
        let thread = open(tid)?;
        let tgid = caller.tgid()?;
        Ok(if tgid == tid {
            Self {
                tid,
                tgid,
                thread: None,
                process: thread,
            }
        } else {
            Self {
                tid,
                tgid,
                thread: Some(thread),
                process: open(tgid)?,
            }
        })
    }

    /// `SRCH` once the thread is no more.
    fn now(&self) -> Result<(Pid, OsString)> {
        if let Some(thread) = &self.thread {
            name(thread)?;
        }
        Ok((self.tgid, name(&self.process)?))
    }
}

fn name(comm: &OwnedFd) -> Result<OsString> {
    let mut bytes = [0; LONGEST];
    let len = rustix::io::pread(comm, &mut bytes[..], 0)?;
    // A task that is gone can read as nothing, too.
    if len == 0 {
        return Err(Errno::SRCH);
    }
    let name = bytes.get(..len).unwrap_or_default();
    let name = name.strip_suffix(b"\n").unwrap_or(name);
    Ok(OsString::from_vec(name.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn this_thread() -> Caller {
        Caller::new(rustix::thread::gettid().as_raw_nonzero().get()).unwrap()
    }

    #[test]
    fn names_are_of_now_and_threads_are_not_mixed_up() {
        let processes = Processes::default();
        let me = rustix::process::getpid();
        let ask = || {
            let caller = this_thread();
            for _ in 0..3 {
                assert_eq!(processes.of(caller).unwrap(), caller.process().unwrap());
            }
            caller
        };
        ask();
        let gone = std::thread::scope(|scope| scope.spawn(ask).join().unwrap());
        assert_ne!(gone.tid(), me);
        // Its end is not seen before the kernel is done with it.
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while processes.of(gone) != Err(Errno::SRCH) {
            assert!(std::time::Instant::now() < end, "it is gone");
            std::thread::yield_now();
        }
        // A program that becomes another, in the same thread.
        let mut child = std::process::Command::new("sh")
            .args(["-c", "read line; exec cat"])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let caller = Caller::new(i32::try_from(child.id()).unwrap()).unwrap();
        let name = || {
            processes
                .of(caller)
                .map(|(pid, name)| (pid == caller.tid(), name))
        };
        // The parent goes on as soon as the old memory is let go, and that is before the name changes
        // (`fs/exec.c`, `begin_new_exec`).
        while name() != Ok((true, "sh".into())) {
            assert!(std::time::Instant::now() < end, "it is a shell");
            std::thread::yield_now();
        }
        let mut input = child.stdin.take().unwrap();
        std::io::Write::write_all(&mut input, b"\n").unwrap();
        while name() != Ok((true, "cat".into())) {
            assert!(std::time::Instant::now() < end, "it is another program");
            std::thread::yield_now();
        }
        drop(input);
        child.wait().unwrap();
        assert_eq!(name(), Err(Errno::SRCH));
    }

    #[test]
    fn no_more_than_a_few_are_kept() {
        let processes = Processes::default();
        for _ in 0..3 * KEPT {
            std::thread::scope(|scope| {
                scope.spawn(|| processes.of(this_thread()).unwrap());
            });
            assert!(processes.kept().len() <= KEPT);
        }
    }
}
