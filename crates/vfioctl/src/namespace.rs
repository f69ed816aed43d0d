//! Namespaces of one's own: a user namespace in which one is who one was, and mounts that nobody
//! outside sees.

use nix::sched::CloneFlags;
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    MountPropagationFlags, MoveMountFlags, OpenTreeFlags, mount_change, move_mount, open_tree,
};
use rustix::thread::{
    CapabilitySet, capabilities, clear_ambient_capability_set, configure_capability_in_ambient_set,
    set_capabilities,
};

/// Why there is no user namespace.
#[derive(Debug)]
pub(crate) enum NoNamespace {
    /// `unshare()` says no.
    Unshare(Errno),
    /// A file of `/proc/self` cannot be written.
    Map(&'static str, std::io::Error),
}

impl std::fmt::Display for NoNamespace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            NoNamespace::Unshare(errno) => write!(f, "{errno}"),
            NoNamespace::Map(file, error) => write!(f, "/proc/self/{file}: {error}"),
        }
    }
}

/// Moves this process, which must have one thread only, into a user namespace with the same user and
/// group, and into those that `more` names. It has every capability there until it executes
/// something.
pub(crate) fn own_user(more: CloneFlags) -> Result<(), NoNamespace> {
    let (uid, gid) = (
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    unshare(more | CloneFlags::CLONE_NEWUSER).map_err(NoNamespace::Unshare)?;
    for (file, text) in [
        ("setgroups", "deny".to_owned()),
        ("uid_map", format!("{uid} {uid} 1")),
        ("gid_map", format!("{gid} {gid} 1")),
    ] {
        std::fs::write(format!("/proc/self/{file}"), text)
            .map_err(|error| NoNamespace::Map(file, error))?;
    }
    Ok(())
}

/// `unshare()`.
pub(crate) fn unshare(flags: CloneFlags) -> Result<(), Errno> {
    nix::sched::unshare(flags).map_err(|errno| Errno::from_raw_os_error(errno as i32))
}

/// What is mounted outside from now on arrives here, what is mounted here stays here.
pub(crate) fn mounts_stay_inside() -> Result<(), Errno> {
    let slave = || {
        mount_change(
            "/",
            MountPropagationFlags::REC | MountPropagationFlags::DOWNSTREAM,
        )
    };
    match slave() {
        // The root is no mount point (a chroot): it becomes one.
        Err(Errno::INVAL) => root_as_mount().and_then(|()| slave()),
        other => other,
    }
}

fn root_as_mount() -> Result<(), Errno> {
    let root = open_tree(
        CWD,
        "/",
        OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_RECURSIVE,
    )?;
    move_mount(&root, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    rustix::process::fchdir(&root)?;
    rustix::process::chroot(".")
}

/// Lets what `f` executes keep the capabilities of this thread, as an ordinary user loses them
/// otherwise (`security/commoncap.c`, `cap_bprm_creds_from_file`).
pub(crate) fn with_capabilities_kept<T>(f: impl FnOnce() -> T) -> Result<T, Errno> {
    let mut sets = capabilities(None)?;
    sets.inheritable = sets.permitted;
    set_capabilities(None, sets)?;
    for (_, capability) in sets.permitted.iter_names() {
        configure_capability_in_ambient_set(capability, true)?;
    }
    let result = f();
    clear_ambient_capability_set()?;
    sets.inheritable = CapabilitySet::empty();
    set_capabilities(None, sets)?;
    Ok(result)
}
