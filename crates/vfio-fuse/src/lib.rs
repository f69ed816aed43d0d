//! /dev/vfio, /dev/iommu and the sysfs tree as files: request in, core call, reply out.
//!
//! Two FUSE mounts, `dev` and `sys`, and one more for each device in use: the first open of
//! `vfio/devices/vfioN` finds the node on the `dev` connection, which mounts a connection of the
//! device's own on top of it and answers `ESTALE`; the kernel walks the path again
//! (`fs/namei.c`, `do_filp_open`) and lands there. So two devices share no queue, no thread and no
//! lock on their way, and a device that nobody uses costs no descriptor, no mount and no thread.

mod advice;
mod announced;
mod caller;
mod dev;
mod files;
mod identify;
mod mounter;
mod node;
mod plain;
mod private;
mod shared;
mod sys;

pub use dev::Dev;
pub use sys::Sys;

use rustix::io::Errno;
use std::path::PathBuf;
use std::time::Duration;
use vfio_core::Core;

/// Who owns the nodes, and what they may be used for by whom: the kernel's defaults unless the
/// configuration says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits.
    pub mode: u32,
}

impl Owner {
    /// Root's, with these permission bits.
    #[must_use]
    pub const fn root(mode: u32) -> Owner {
        Owner {
            uid: 0,
            gid: 0,
            mode,
        }
    }
}

/// What can be chosen about the mounts.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the nodes go: `DIR/vfio/devices/vfioN`, `DIR/vfio/N` for groups, `DIR/vfio/vfio` for
    /// containers, `DIR/iommu`. Made if missing.
    pub dev: PathBuf,
    /// Where the sysfs tree goes. Made if missing.
    pub sys: PathBuf,
    /// Device nodes; 0600 root by default.
    pub device: Owner,
    /// Group nodes; 0600 root by default.
    pub group: Owner,
    /// `/dev/vfio/vfio`; 0666 root by default, since a container is worth nothing without a group.
    pub container: Owner,
    /// `/dev/iommu`; 0660 root by default.
    pub iommu: Owner,
    /// User and group of everything in the sysfs tree; root by default. In a user namespace that has
    /// no root, nobody could write to root's files (`fs/namei.c`, `inode_permission`).
    pub sys_owner: (u32, u32),
    /// Regions are mapped natively where the kernel allows it. Off, they trap, as before Linux 6.9.
    pub passthrough: bool,
    /// A connection for each device in use. Off, all share the one of `dev`: for a daemon that may
    /// not mount later.
    pub redirect: bool,
    /// How long a device's own mount stays after its last close.
    pub idle: Duration,
    /// How long an ioctl may take before it ends with `ETIMEDOUT`, whatever its memory does.
    pub ioctl_deadline: Duration,
}

impl Options {
    /// The defaults, with everything under one directory: `DIR/dev` and `DIR/sys`.
    pub fn under(dir: impl Into<PathBuf>) -> Options {
        let dir = dir.into();
        Options {
            dev: dir.join("dev"),
            sys: dir.join("sys"),
            device: Owner::root(0o600),
            group: Owner::root(0o600),
            container: Owner::root(0o666),
            iommu: Owner::root(0o660),
            sys_owner: (0, 0),
            passthrough: true,
            redirect: true,
            idle: Duration::from_secs(2),
            ioctl_deadline: Duration::from_secs(30),
        }
    }
}

/// The mounts of a daemon. Dropping it unmounts.
#[derive(Debug)]
pub struct Mounts {
    dev: Dev,
    sys: Sys,
}

impl Mounts {
    /// Mounts both trees and serves them. `ENOENT`, `ENODEV` or `EPERM` from `/dev/fuse` or the
    /// mount mean that this machine does not allow it.
    pub fn start(core: &Core, options: &Options) -> Result<Mounts, Errno> {
        Ok(Mounts {
            dev: Dev::start(core, options)?,
            sys: Sys::start(core, options)?,
        })
    }

    /// The device nodes.
    pub fn dev(&self) -> &Dev {
        &self.dev
    }

    /// The sysfs tree.
    pub fn sys(&self) -> &Sys {
        &self.sys
    }

    /// Unmounts. Files that are still open keep their connections until this process ends.
    pub fn stop(self) {
        drop(self);
    }
}
