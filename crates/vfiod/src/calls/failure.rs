//! Why a call failed, as the client is told.

use rustix::io::Errno;
use std::io;
use vfio_core::model::Waiting;
use vfiod_control::{Failure, FailureKind};

/// Why a call failed, or that the client is gone.
pub(super) enum Stop {
    Failure(Failure),
    Gone(io::Error),
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Stop {
        Stop::Failure(failure)
    }
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Stop {
        Stop::Gone(error)
    }
}

pub(super) fn fail(kind: FailureKind, message: String) -> Failure {
    Failure {
        kind,
        errno: None,
        message,
    }
}

pub(super) fn not_found(message: &str) -> Failure {
    fail(FailureKind::NotFound, message.to_owned())
}

/// Something was asked of a device whose users are waited for.
pub(super) fn leaving(name: &str, waiting: &Waiting) -> Failure {
    let what = waiting.describe();
    errno_failure(
        Errno::BUSY,
        format!("{name} is {what}; `vfioctl unbind {name} --force` cuts its users off"),
    )
}

pub(super) fn errno_failure(errno: Errno, message: String) -> Failure {
    let (kind, name) = match errno {
        Errno::NODEV => (FailureKind::NotFound, "ENODEV"),
        Errno::NOENT => (FailureKind::NotFound, "ENOENT"),
        Errno::BUSY => (FailureKind::Busy, "EBUSY"),
        Errno::AGAIN => (FailureKind::Busy, "EAGAIN"),
        Errno::EXIST => (FailureKind::Busy, "EEXIST"),
        Errno::NOSPC => (FailureKind::Busy, "ENOSPC"),
        Errno::USERS => (FailureKind::Busy, "EUSERS"),
        Errno::INVAL => (FailureKind::Failed, "EINVAL"),
        Errno::MFILE => (FailureKind::Failed, "EMFILE"),
        Errno::NOMEM => (FailureKind::Failed, "ENOMEM"),
        _ => (FailureKind::Failed, ""),
    };
    let message = if errno == Errno::MFILE {
        format!("{message}; {}", crate::daemon::FILES_ADVICE)
    } else {
        message
    };
    Failure {
        kind,
        errno: Some(name.to_owned()).filter(|name| !name.is_empty()),
        message,
    }
}
