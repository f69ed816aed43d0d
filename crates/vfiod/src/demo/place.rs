//! Where the demo happens: a directory and a mount namespace of its own.

use super::sys;
use anyhow::Context as _;
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::process::{getegid, geteuid};
use rustix::thread::UnshareFlags;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use vfio_core::Core;
use vfio_fuse::{Mounts, Options};

/// A namespace in which this process may mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Privacy {
    /// With the rights it has: those of the machine's root.
    Root,
    /// With those of a user namespace, made here or by a container.
    User,
}

/// A namespace of this process's own, in which nobody else sees its mounts and which goes with it.
/// Must come before the first thread. An error says why there is none.
pub(super) fn namespace() -> Result<Privacy, String> {
    let fuse = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse");
    match fuse {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err("there is no /dev/fuse".to_owned());
        }
        Err(error) => return Err(format!("/dev/fuse cannot be opened: {error}")),
    }
    let privacy = match sys::unshare(UnshareFlags::NEWNS) {
        Ok(()) if is_initial_user_namespace() => Privacy::Root,
        Ok(()) => Privacy::User,
        Err(Errno::PERM) => user_namespace()?,
        Err(errno) => return Err(format!("no mount namespace: {errno}")),
    };
    let all = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
    rustix::mount::mount_change("/", all)
        .map_err(|errno| format!("the mounts cannot be made private: {errno}"))?;
    Ok(privacy)
}

/// Root of a container may mount and yet is not the machine's root. The initial user namespace has
/// a number of its own (`include/linux/proc_ns.h`, `PROC_USER_INIT_INO`).
fn is_initial_user_namespace() -> bool {
    const PROC_USER_INIT_INO: u64 = 0xeffffffd;
    rustix::fs::stat("/proc/self/ns/user").is_ok_and(|stat| stat.st_ino == PROC_USER_INIT_INO)
}

/// Linux 6.9 and newer.
pub(super) fn kernel_has_passthrough() -> bool {
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= (6, 9),
        _ => true,
    }
}

fn user_namespace() -> Result<Privacy, String> {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    sys::unshare(UnshareFlags::NEWUSER | UnshareFlags::NEWNS).map_err(|errno| {
        format!("mounting needs root or a user namespace, which is refused: {errno}")
    })?;
    let write = |file: &str, text: String| {
        std::fs::write(file, text).map_err(|error| format!("{file}: {error}"))
    };
    write("/proc/self/uid_map", format!("{uid} {uid} 1"))?;
    write("/proc/self/setgroups", "deny".to_owned())?;
    write("/proc/self/gid_map", format!("{gid} {gid} 1"))?;
    Ok(Privacy::User)
}

/// The directory with the mounts. Dropping it leaves nothing.
#[derive(Debug)]
pub(super) struct Place {
    mounts: Option<Mounts>,
    dir: PathBuf,
}

impl Place {
    /// Makes the directory and mounts both trees in it.
    pub(super) fn new(core: &Core, passthrough: bool) -> anyhow::Result<Place> {
        let dir = std::env::temp_dir().join(format!("vfiod-demo-{}", std::process::id()));
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .with_context(|| format!("directory {}", dir.display()))?;
        let mut place = Place { mounts: None, dir };
        let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
        let mut options = Options::under(&place.dir);
        options.sys_owner = (uid, gid);
        (options.device.uid, options.device.gid) = (uid, gid);
        (options.iommu.uid, options.iommu.gid) = (uid, gid);
        options.passthrough = passthrough;
        let mounts = Mounts::start(core, &options).context("FUSE cannot be mounted")?;
        place.mounts = Some(mounts);
        Ok(place)
    }

    pub(super) fn mounts(&self) -> Option<&Mounts> {
        self.mounts.as_ref()
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn sys(&self) -> PathBuf {
        self.dir.join("sys")
    }

    pub(super) fn dev(&self) -> PathBuf {
        self.dir.join("dev")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(self.mounts.take());
        clean(&self.dir);
    }
}

/// Removes what is in the directory, mounts first, and the directory.
///
/// By force: a thread of this process that waits for an answer from a mount of this process would
/// otherwise wait for ever once the answering thread is gone (`fs/fuse/dev.c`,
/// `request_wait_answer`), and with it the process.
pub(super) fn clean(dir: &Path) {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let ours = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    let ours: Vec<&Path> = ours
        .map(Path::new)
        .filter(|at| at.starts_with(dir))
        .collect();
    for at in ours.into_iter().rev() {
        let how = UnmountFlags::FORCE | UnmountFlags::NOFOLLOW | UnmountFlags::DETACH;
        let _ = rustix::mount::unmount(at, how);
    }
    for name in ["dev", "sys"] {
        // Never through a mount: then it is not empty.
        let _ = std::fs::remove_dir(dir.join(name));
    }
    let _ = std::fs::remove_dir(dir);
}
