//! Listening sockets that nobody else can connect to before they are ready, that take the place of
//! what a dead daemon left and of nothing else, and whose name goes when they go.

use anyhow::Context as _;
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// The longest path of a UNIX socket: `sun_path` has 108 bytes, the last of which is NUL.
pub(crate) const LONGEST_PATH: usize = 107;

/// Clients that may wait to be accepted. Each is accepted and answered at once.
const BACKLOG: i32 = 64;

/// Who may connect.
#[derive(Clone, Debug)]
pub(crate) struct Permissions {
    pub(crate) mode: u32,
    pub(crate) owner: Option<u32>,
    pub(crate) group: Option<u32>,
}

/// The name of a listening socket. Dropping it takes the name away, if it is still this socket's.
#[derive(Debug)]
pub(crate) struct Name {
    path: PathBuf,
    file: (u64, u64),
}

impl Name {
    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        let now = rustix::fs::lstat(&self.path).map(|stat| (stat.st_dev, stat.st_ino));
        if now == Ok(self.file) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Listens at `path`. A socket that nobody serves any more is replaced; anything else that has the
/// name stays.
///
/// # Errors
/// The path is too long or taken, or the socket cannot be made; the message says what to do.
pub(crate) fn listen(
    path: &Path,
    permissions: &Permissions,
) -> anyhow::Result<(UnixListener, Name)> {
    let length = path.as_os_str().len();
    if length > LONGEST_PATH {
        anyhow::bail!(
            "{}: {length} bytes, and the path of a UNIX socket has at most {LONGEST_PATH}; choose a \
             shorter directory",
            path.display()
        );
    }
    make_room(path)?;
    let made = bind(path, permissions);
    made.with_context(|| format!("socket {}", path.display()))
}

fn bind(path: &Path, permissions: &Permissions) -> anyhow::Result<(UnixListener, Name)> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // The file gets the mode of the socket's own inode (net/unix/af_unix.c, unix_bind_bsd), so there
    // is no moment in which others may connect, and no umask to change under other threads.
    rustix::fs::fchmod(&socket, Mode::from_raw_mode(0o600))?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    // What was bound, whoever may have put another file there meanwhile.
    let file = rustix::fs::open(
        path,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let stat = rustix::fs::fstat(&file)?;
    let name = Name {
        path: path.to_owned(),
        file: (stat.st_dev, stat.st_ino),
    };
    if !FileType::from_raw_mode(stat.st_mode).is_socket() {
        anyhow::bail!("somebody has put another file into its place");
    }
    if permissions.owner.is_some() || permissions.group.is_some() {
        rustix::fs::chownat(
            file.as_fd(),
            "",
            permissions.owner.map(Uid::from_raw),
            permissions.group.map(Gid::from_raw),
            AtFlags::EMPTY_PATH,
        )
        .context("changing its owner")?;
    }
    // An O_PATH descriptor takes no fchmod; its link in /proc leads to the same file.
    let through = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    rustix::fs::chmod(&through, Mode::from_raw_mode(permissions.mode))
        .context("changing its mode")?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok((UnixListener::from(socket), name))
}

/// Takes away a socket that nobody serves.
fn make_room(path: &Path) -> anyhow::Result<()> {
    let mode = match rustix::fs::lstat(path) {
        Ok(stat) => stat.st_mode,
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(errno).with_context(|| path.display().to_string()),
    };
    if !FileType::from_raw_mode(mode).is_socket() {
        anyhow::bail!(
            "{} exists and is no socket; remove it, or choose another path",
            path.display()
        );
    }
    let probe = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    match rustix::net::connect(&probe, &SocketAddrUnix::new(path)?) {
        Err(Errno::CONNREFUSED) => match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("removing {}, which is stale", path.display()))
            }
            _ => Ok(()),
        },
        Err(Errno::NOENT) => Ok(()),
        // Another kind of socket, or one whose queue is full, is somebody's.
        _ => anyhow::bail!(
            "{}: another process serves this socket; stop it, or choose another path",
            path.display()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::net::UnixStream;

    const OWN: Permissions = Permissions {
        mode: 0o640,
        owner: None,
        group: None,
    };

    #[test]
    fn a_socket_has_its_mode_and_goes_with_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        let (listener, name) = listen(&path, &OWN).unwrap();
        let mode = std::fs::symlink_metadata(&path)
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o7777, 0o640);
        UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        drop(name);
        assert!(!path.exists());
    }

    #[test]
    fn what_a_dead_daemon_left_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let (_listener, _name) = listen(&path, &OWN).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn what_is_in_use_or_no_socket_stays() {
        let dir = tempfile::tempdir().unwrap();
        let served = dir.path().join("served");
        let _listener = UnixListener::bind(&served).unwrap();
        let error = listen(&served, &OWN).unwrap_err().to_string();
        assert!(error.contains("another process serves"), "{error}");
        let file = dir.path().join("file");
        std::fs::write(&file, "mine").unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&served, &link).unwrap();
        for other in [&file, &link] {
            let error = listen(other, &OWN).unwrap_err().to_string();
            assert!(error.contains("is no socket"), "{error}");
        }
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "mine");
        UnixStream::connect(&served).unwrap();
    }

    #[test]
    fn a_path_that_is_too_long_is_told_as_such() {
        let path = PathBuf::from(format!("/{}", "x".repeat(LONGEST_PATH)));
        let error = listen(&path, &OWN).unwrap_err().to_string();
        assert!(
            error.contains("108 bytes") && error.contains("at most 107"),
            "{error}"
        );
    }

    #[test]
    fn another_socket_in_its_place_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        let (_listener, name) = listen(&path, &OWN).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(name);
        UnixStream::connect(&path).unwrap();
    }
}
