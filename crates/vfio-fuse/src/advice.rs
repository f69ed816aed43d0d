//! What is said, once, to a program that asks for a descriptor which nobody here can hand out.

use client_process::Caller;
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use vfio_uapi::ioctl::{
    FileKind, Named, VFIO_DEVICE_FEATURE, VFIO_DEVICE_GET_GFX_DMABUF, VFIO_GROUP_GET_DEVICE_FD,
};

/// So many processes are remembered.
const REMEMBERED: usize = 1024;

/// Who has been told.
#[derive(Debug, Default)]
pub(crate) struct Advice {
    /// Process, and its start: a number that is used again is another process.
    told: Mutex<VecDeque<(u32, u64)>>,
}

impl Advice {
    /// An ioctl of this thread has just failed with `EOPNOTSUPP`. If it returns a descriptor to
    /// those who run under a supervisor, its process is told so in the log, the first time.
    pub(crate) fn give(&self, kind: FileKind, cmd: u32, tid: u32) {
        let returns_a_file = match kind {
            FileKind::Group => cmd == VFIO_GROUP_GET_DEVICE_FD,
            FileKind::Device => [VFIO_DEVICE_GET_GFX_DMABUF, VFIO_DEVICE_FEATURE].contains(&cmd),
            _ => false,
        };
        if !returns_a_file {
            return;
        }
        let identity = i32::try_from(tid)
            .ok()
            .and_then(|tid| Caller::new(tid).ok()?.identity().ok());
        let Some(who) = identity else { return };
        let pid = who.tgid.as_raw_nonzero().get().unsigned_abs();
        if !self.is_first(pid, who.start_ticks) {
            return;
        }
        let comm = who.comm.to_string_lossy();
        let comm = comm.escape_debug();
        tracing::warn!(
            "{comm} (pid {pid}): {} returns a descriptor, which only a supervisor can give a \
             process; run it with: vfioctl run -- {}",
            Named { kind, cmd },
            command(pid).as_deref().unwrap_or("CMD"),
        );
    }

    fn is_first(&self, pid: u32, start: u64) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.contains(&(pid, start)) {
            return false;
        }
        if told.len() >= REMEMBERED {
            told.pop_front();
        }
        told.push_back((pid, start));
        true
    }
}

/// The command line of a process, as far as it fits into a line of the log.
fn command(pid: u32) -> Option<String> {
    const LONGEST: usize = 200;
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let text = text.trim_end_matches('\0').replace('\0', " ");
    let mut text = text.escape_debug().to_string();
    if text.is_empty() {
        return None;
    }
    if text.len() > LONGEST {
        let end = (0..=LONGEST).rev().find(|at| text.is_char_boundary(*at));
        text.truncate(end.unwrap_or(0));
        text.push_str(" ...");
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_once() {
        let advice = Advice::default();
        assert!(advice.is_first(7, 1));
        assert!(!advice.is_first(7, 1));
        assert!(advice.is_first(7, 2), "the number was used again");
        for n in 0..REMEMBERED as u64 {
            advice.is_first(8, n);
        }
        assert_eq!(advice.told.lock().unwrap().len(), REMEMBERED);
    }

    #[test]
    fn the_command_is_ours() {
        let said = command(std::process::id()).unwrap();
        assert!(said.contains("vfio_fuse"), "{said}");
    }
}
