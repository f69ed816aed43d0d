//! The client's end.

use crate::message::{Answer, Call, Failure, FailureKind, Reply, Request};
use crate::wire;
use std::io::{self, BufReader};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the daemon listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/vfiod/vfiod.sock";

/// Exit code of `vfioctl` when there is no daemon to talk to.
pub const EXIT_UNREACHABLE: u8 = 6;

/// A connection to the daemon.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<UnixStream>,
    socket: PathBuf,
}

/// Nobody answers on the socket.
#[derive(Debug, thiserror::Error)]
#[error("vfiod is not reachable at {}: {}; {}", .socket.display(), .source, advice(.source, .socket))]
pub struct ConnectError {
    /// The socket that was tried.
    pub socket: PathBuf,
    /// Why not.
    #[source]
    pub source: io::Error,
}

fn advice(error: &io::Error, socket: &Path) -> String {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "be root or a member of the group that owns the socket".to_owned()
        }
        io::ErrorKind::ConnectionRefused if !is_socket(socket) => {
            "it is no socket: name that of a daemon with --socket, or its directory with --root"
                .to_owned()
        }
        io::ErrorKind::ConnectionRefused => {
            "a daemon that is gone left it behind: start it again with `vfiod serve`".to_owned()
        }
        _ if socket == Path::new(DEFAULT_SOCKET) => {
            "start it with `vfiod serve` as root, or name its socket with --socket".to_owned()
        }
        _ => format!(
            "start it with `vfiod serve --root {}`, or name another socket with --socket",
            socket.parent().unwrap_or(Path::new(".")).display()
        ),
    }
}

fn is_socket(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|there| there.file_type().is_socket())
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// [`ConnectError`], which says which socket was tried and what to do.
    pub fn connect(socket: &Path) -> Result<Client, ConnectError> {
        let stream = UnixStream::connect(socket).map_err(|source| ConnectError {
            socket: socket.to_owned(),
            source,
        })?;
        Ok(Client {
            reader: BufReader::new(stream),
            socket: socket.to_owned(),
        })
    }

    /// The socket it is connected to.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Sends a request.
    ///
    /// # Errors
    /// What the socket gives.
    pub fn send(&mut self, call: Call) -> io::Result<()> {
        wire::write(self.reader.get_mut(), &Request::new(call))
    }

    /// Waits for the next reply; `None` when the daemon has closed the connection.
    ///
    /// # Errors
    /// What the socket gives; `InvalidData` for what is not a reply.
    pub fn reply(&mut self) -> io::Result<Option<Answer>> {
        let reply: Option<Reply> = wire::read(&mut self.reader, wire::MAX_REPLY)?;
        Ok(reply.map(|reply| reply.answer))
    }

    /// Sends a request and returns the reply that ends it; `progress` is called with those that
    /// come before. A failure that the daemon reports is the error.
    ///
    /// # Errors
    /// The daemon's failure, or one made from what the socket gives.
    pub fn call(
        &mut self,
        call: Call,
        mut progress: impl FnMut(&Answer),
    ) -> Result<Answer, Failure> {
        let lost = |error: io::Error| Failure {
            kind: FailureKind::Failed,
            errno: None,
            message: format!("the connection to vfiod broke: {error}"),
        };
        self.send(call).map_err(lost)?;
        loop {
            match self.reply().map_err(lost)? {
                None => return Err(lost(io::ErrorKind::UnexpectedEof.into())),
                Some(Answer::Error(failure)) => return Err(failure),
                Some(answer @ Answer::Progress(_)) => progress(&answer),
                Some(answer) => return Ok(answer),
            }
        }
    }

    /// The connection once more: shut it down, and whoever waits for a reply gets the end.
    ///
    /// # Errors
    /// `EMFILE` and the like.
    pub fn stream(&self) -> io::Result<UnixStream> {
        self.reader.get_ref().try_clone()
    }

    /// A limit on how long [`reply`](Client::reply) waits.
    ///
    /// # Errors
    /// `InvalidInput` for a time of zero.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.reader.get_ref().set_read_timeout(timeout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_says_which_socket_and_what_to_do() {
        let text = Client::connect(Path::new("/nonexistent/dir/vfiod.sock"))
            .unwrap_err()
            .to_string();
        assert!(text.contains("/nonexistent/dir/vfiod.sock"), "{text}");
        assert!(
            text.contains("vfiod serve --root /nonexistent/dir"),
            "{text}"
        );
        let text = Client::connect(Path::new("/etc/passwd"))
            .unwrap_err()
            .to_string();
        assert!(text.contains("it is no socket"), "{text}");
    }
}
