//! Making FUSE file systems: on a directory or on a single regular file, attached or handed on as a detached mount.
//!
//! Uses the mount API of Linux 5.2 (`fsopen` … `move_mount`), so that a mount can exist as a descriptor before it has a place. Works as root and
//! in a user namespace whose creator is mapped (`fs/fuse/inode.c`, `FS_USERNS_MOUNT`); `/dev/fuse` must then be opened inside that namespace,
//! which [`MountOptions::create`] does.

use std::fmt::Write as _;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::path::PathBuf;

use rustix::fs::AtFlags;
use rustix::fs::CWD;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::fs::StatxFlags;
use rustix::io::Errno;
use rustix::mount::FsMountFlags;
use rustix::mount::FsOpenFlags;
use rustix::mount::MountAttrFlags;
use rustix::mount::MountPropagationFlags;
use rustix::mount::MoveMountFlags;
use rustix::mount::UnmountFlags;

/// What the root of the file system is; it must match the kind of the place it is attached to (`move_mount` gives ENOTDIR otherwise).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Root {
    /// A directory (mode 0755 until the first GETATTR).
    #[default]
    Directory,
    /// One regular file (mode 0666 until the first GETATTR): a connection for a single node.
    File,
}

/// How a FUSE file system is made. Start from [`MountOptions::default`] and change fields.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// Shown as the source in `/proc/mounts`.
    pub fsname: String,
    /// Shown after `fuse.` as the type in `/proc/mounts`.
    pub subtype: String,
    /// What the root is.
    pub root: Root,
    /// The kernel checks modes and owners itself. Without it every access that [`MountOptions::allow_other`] lets in reaches the server.
    pub default_permissions: bool,
    /// Other users than the one that mounts may enter.
    pub allow_other: bool,
    /// The largest READ the kernel sends, in bytes; `None` leaves it to the kernel.
    pub max_read: Option<u32>,
    /// Reject writes with EROFS.
    pub read_only: bool,
    /// Later mount namespaces made from this one see mounts and unmounts below this mount (`MS_SHARED`).
    pub shared: bool,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            fsname: "vfiod".to_owned(),
            subtype: "vfiod".to_owned(),
            root: Root::Directory,
            default_permissions: true,
            allow_other: true,
            max_read: None,
            read_only: false,
            shared: false,
        }
    }
}

impl MountOptions {
    /// Opens `/dev/fuse` and makes the file system, not yet attached anywhere. The INIT request waits in the returned descriptor: give it to
    /// [`crate::Connection::new`] before anything touches the mount.
    ///
    /// # Errors
    /// ENOENT or ENXIO without `/dev/fuse`, EPERM without `CAP_SYS_ADMIN` in the namespace, EINVAL for an option this kernel does not know.
    pub fn create(&self) -> Result<(OwnedFd, DetachedMount), Errno> {
        let device = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        let fs = rustix::mount::fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
        let set =
            |key: &str, value: &str| rustix::mount::fsconfig_set_string(fs.as_fd(), key, value);
        let mode = match self.root {
            Root::Directory => "40755",
            Root::File => "100666",
        };
        let mut number = String::new();
        let mut text = |value: u32| {
            number.clear();
            write!(number, "{value}")
                .map(|()| number.clone())
                .unwrap_or_default()
        };
        set("source", &self.fsname)?;
        set("subtype", &self.subtype)?;
        set("fd", &text(device.as_raw_fd().unsigned_abs()))?;
        set("rootmode", mode)?;
        set("user_id", &text(rustix::process::geteuid().as_raw()))?;
        set("group_id", &text(rustix::process::getegid().as_raw()))?;
        if let Some(max_read) = self.max_read {
            set("max_read", &text(max_read))?;
        }
        if self.default_permissions {
            rustix::mount::fsconfig_set_flag(fs.as_fd(), "default_permissions")?;
        }
        if self.allow_other {
            rustix::mount::fsconfig_set_flag(fs.as_fd(), "allow_other")?;
        }
        rustix::mount::fsconfig_create(fs.as_fd())?;
        let mut attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
        if self.read_only {
            attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
        }
        let mount = rustix::mount::fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        Ok((
            device,
            DetachedMount {
                mount,
                shared: self.shared,
            },
        ))
    }
}

/// A mount that has no place yet. Dropping it dissolves the mount, which ends its connection.
#[derive(Debug)]
pub struct DetachedMount {
    mount: OwnedFd,
    shared: bool,
}

impl DetachedMount {
    /// Attaches the mount on top of `path`. Walking to `path` may itself send requests to a FUSE server: never call this from a thread that the
    /// walk needs.
    ///
    /// # Errors
    /// ENOENT when the place does not exist, ENOTDIR when root and place are not of the same kind, EPERM without `CAP_SYS_ADMIN`.
    pub fn attach(self, path: &Path) -> Result<Mount, Errno> {
        rustix::mount::move_mount(
            self.mount.as_fd(),
            "",
            CWD,
            path,
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        )?;
        self.attached(path)
    }

    /// Attaches the mount on top of the file that `place` (an `O_PATH` descriptor) refers to; nothing is walked. `path` is what
    /// [`Mount::unmount`] will use.
    ///
    /// # Errors
    /// As [`DetachedMount::attach`].
    pub fn attach_on(self, place: BorrowedFd<'_>, path: &Path) -> Result<Mount, Errno> {
        let flags =
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        rustix::mount::move_mount(self.mount.as_fd(), "", place, "", flags)?;
        self.attached(path)
    }

    fn attached(self, path: &Path) -> Result<Mount, Errno> {
        let mount = Mount {
            path: path.to_owned(),
            id: mount_id(self.mount.as_fd()),
            attached: true,
        };
        if self.shared {
            rustix::mount::mount_change(path, MountPropagationFlags::SHARED)?;
        }
        Ok(mount)
    }
}

impl AsFd for DetachedMount {
    /// The mount as an `O_PATH`-like descriptor, for `move_mount` elsewhere (another process may attach it).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.mount.as_fd()
    }
}

/// An attached mount. Dropping it unmounts, if it is still there: a later mount at the same place is left alone. Unmounting walks the path, so it must
/// not happen on a thread that a FUSE server on the way needs.
#[derive(Debug)]
pub struct Mount {
    path: PathBuf,
    /// Tells this mount from another that came to the same place later.
    id: Option<u64>,
    attached: bool,
}

impl Mount {
    /// Where it is attached.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Detaches the mount at once (`MNT_DETACH`). Files open on it go on working; the connection ends (ENODEV for its threads) when the last is
    /// closed and no other namespace holds a copy of the mount.
    ///
    /// # Errors
    /// EINVAL when it is not there any more (unmounted by somebody else, or gone with the name it stood on), ENOENT when its place is gone too.
    pub fn unmount(mut self) -> Result<(), Errno> {
        self.detach()
    }

    /// Leaves the mount in place for whoever else knows of it.
    pub fn leave(mut self) -> PathBuf {
        self.attached = false;
        std::mem::take(&mut self.path)
    }

    fn detach(&mut self) -> Result<(), Errno> {
        if !std::mem::replace(&mut self.attached, false) {
            return Ok(());
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let there = rustix::fs::open(&self.path, flags, Mode::empty())?;
        if self.id.is_some() && mount_id(there.as_fd()) != self.id {
            return Err(Errno::INVAL);
        }
        // Through the descriptor, so that what is unmounted is what was looked at.
        let exact = format!("/proc/self/fd/{}", there.as_raw_fd());
        match rustix::mount::unmount(exact, UnmountFlags::DETACH) {
            Err(Errno::NOENT) => {
                rustix::mount::unmount(&self.path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
            }
            done => done,
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(error) = self.detach() {
            tracing::debug!(path = %self.path.display(), %error, "the mount was not there any more");
        }
    }
}

/// The kernel's number of the mount a descriptor refers to: `STATX_MNT_ID_UNIQUE` (Linux 6.8), or before that `STATX_MNT_ID`, which a later mount may
/// get again. Asks the kernel only, not the server.
fn mount_id(fd: BorrowedFd<'_>) -> Option<u64> {
    const MNT_ID_UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let statx = rustix::fs::statx(fd, "", flags, StatxFlags::MNT_ID | MNT_ID_UNIQUE).ok()?;
    let got = StatxFlags::from_bits_retain(statx.stx_mask);
    got.intersects(StatxFlags::MNT_ID | MNT_ID_UNIQUE)
        .then_some(statx.stx_mnt_id)
}
