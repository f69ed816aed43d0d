//! Why a command failed, and with which exit code.

use std::fmt;
use vfiod_control::client::EXIT_UNREACHABLE;
use vfiod_control::{ConnectError, Failure, FailureKind};

/// A failure with its exit code.
#[derive(Debug)]
pub(crate) struct Fail {
    pub(crate) code: u8,
    pub(crate) message: String,
}

impl Fail {
    pub(crate) fn new(kind: FailureKind, message: impl Into<String>) -> Fail {
        Fail {
            code: kind.exit_code(),
            message: message.into(),
        }
    }

    pub(crate) fn failed(message: impl Into<String>) -> Fail {
        Fail::new(FailureKind::Failed, message)
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Fail {
        Fail::new(FailureKind::NotFound, message)
    }
}

impl fmt::Display for Fail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<ConnectError> for Fail {
    fn from(error: ConnectError) -> Fail {
        Fail {
            code: EXIT_UNREACHABLE,
            message: error.to_string(),
        }
    }
}

impl From<Failure> for Fail {
    fn from(failure: Failure) -> Fail {
        Fail::new(failure.kind, failure.message)
    }
}

/// Results of commands.
pub(crate) type Result<T = ()> = std::result::Result<T, Fail>;
