//! The merged `/sys` and `/dev`.

use super::hold;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, Uid, mknodat, statat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

type Result<T = ()> = std::result::Result<T, Errno>;

/// Puts the daemon's `merge` tree over `place` and binds onto it what is only in `place` itself.
/// `ours` is the daemon's tree alone: what both have is ours, except directories, which are merged.
pub(super) fn merge_sys(ours: &Path, merge: &Path, place: &Path) -> Result {
    let real = hold(place)?;
    let ours = hold(ours)?;
    attach(&clone(CWD, merge)?, place)?;
    merge_dir(&real, &ours, Path::new(""), place)
}

fn merge_dir(real: &OwnedFd, ours: &OwnedFd, below: &Path, place: &Path) -> Result {
    for (name, kind) in entries(real.as_fd(), below)? {
        // Links have the machine's text in the merge tree itself.
        if kind == FileType::Symlink {
            continue;
        }
        let path = below.join(&name);
        let our_kind = lstat(ours.as_fd(), &path).ok();
        match our_kind {
            None => bind(real.as_fd(), &path, &place.join(&path))?,
            Some(FileType::Directory) if kind == FileType::Directory => {
                match merge_dir(real, ours, &path, place) {
                    // Not ours to look into: then what is ours in it is all there is.
                    Ok(()) | Err(Errno::ACCESS | Errno::PERM | Errno::NOENT) => {}
                    Err(errno) => return Err(errno),
                }
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Puts a tmpfs over `place` that has everything of it, and the daemon's `vfio` and `iommu`.
pub(super) fn merge_dev(ours: &Path, place: &Path) -> Result {
    let real = hold(place)?;
    let entries = entries(real.as_fd(), Path::new(""))?;
    attach(&tmpfs()?, place)?;
    for (name, kind) in entries {
        if matches!(name.as_bytes(), b"vfio" | b"iommu") {
            eprintln!(
                "vfioctl: the machine's own {} is hidden behind vfiod's",
                place.join(name).display()
            );
            continue;
        }
        let at = place.join(&name);
        match kind {
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(&real, &name, Vec::new())?;
                rustix::fs::symlink(target.as_c_str(), &at)?;
            }
            FileType::Directory => {
                rustix::fs::mkdir(&at, Mode::from_raw_mode(0o755))?;
                bind(real.as_fd(), Path::new(&name), &at)?;
            }
            FileType::CharacterDevice if name == "ptmx" => make_ptmx(&real, &at)?,
            _ => {
                make_file(&at)?;
                bind(real.as_fd(), Path::new(&name), &at)?;
            }
        }
    }
    let ours = hold(ours)?;
    rustix::fs::mkdir(place.join("vfio"), Mode::from_raw_mode(0o755))?;
    bind(ours.as_fd(), Path::new("vfio"), &place.join("vfio"))?;
    make_file(&place.join("iommu"))?;
    bind(ours.as_fd(), Path::new("iommu"), &place.join("iommu"))
}

/// `ptmx` looks for `pts` beside itself (`fs/namei.c`, `path_pts`), and a bound file has nothing
/// beside it: it needs a node of its own, or where none can be made the link that containers have.
fn make_ptmx(real: &OwnedFd, at: &Path) -> Result {
    let stat = statat(real, "ptmx", AtFlags::empty())?;
    let made = mknodat(
        CWD,
        at,
        FileType::CharacterDevice,
        Mode::from_raw_mode(stat.st_mode & 0o7777),
        stat.st_rdev,
    );
    match made {
        Ok(()) => {
            // The mode again: mknod's is less the umask.
            let owner = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
            rustix::fs::chown(at, Some(owner.0), Some(owner.1))?;
            rustix::fs::chmod(at, Mode::from_raw_mode(stat.st_mode & 0o7777))
        }
        Err(Errno::PERM) => rustix::fs::symlink("pts/ptmx", at),
        Err(errno) => Err(errno),
    }
}

pub(super) fn make_file(path: &Path) -> Result {
    rustix::fs::open(
        path,
        OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC,
        Mode::from_raw_mode(0o600),
    )
    .map(drop)
}

fn tmpfs() -> Result<OwnedFd> {
    let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(fs.as_fd(), "source", "vfioctl")?;
    fsconfig_set_string(fs.as_fd(), "mode", "0755")?;
    fsconfig_create(fs.as_fd())?;
    fsmount(
        fs.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_NOSUID,
    )
}

/// Binds what is at `path` below `from`, with all that is mounted there, onto `place`. What goes
/// meanwhile, or has no place any more, is no error.
pub(super) fn bind(from: BorrowedFd<'_>, path: &Path, place: &Path) -> Result {
    let bound = clone(from, path).and_then(|tree| attach(&tree, place));
    match bound {
        Err(Errno::NOENT | Errno::NODEV | Errno::STALE) => Ok(()),
        other => other,
    }
}

fn clone(from: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd> {
    open_tree(
        from,
        path,
        OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_RECURSIVE
            | OpenTreeFlags::AT_SYMLINK_NOFOLLOW,
    )
}

pub(super) fn attach(tree: &OwnedFd, place: &Path) -> Result {
    move_mount(
        tree,
        "",
        CWD,
        place,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
}

/// Names and kinds, sorted. The directory is the one below `root`, whatever lies over it.
fn entries(root: BorrowedFd<'_>, below: &Path) -> Result<Vec<(OsString, FileType)>> {
    let path: PathBuf = if below.as_os_str().is_empty() {
        PathBuf::from(".")
    } else {
        below.to_owned()
    };
    let dir = rustix::fs::openat(
        root,
        &path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW,
        Mode::empty(),
    )?;
    let mut found = Vec::new();
    for entry in Dir::read_from(&dir)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if matches!(name, b"." | b"..") {
            continue;
        }
        let name = OsString::from_vec(name.to_vec());
        // Of what is mounted there the kind may be another than the directory says.
        let Ok(kind) = lstat(root, &path.join(&name)) else {
            continue;
        };
        found.push((name, kind));
    }
    found.sort_by(|(one, _), (other, _)| one.cmp(other));
    Ok(found)
}

fn lstat(root: BorrowedFd<'_>, path: &Path) -> Result<FileType> {
    let stat = statat(root, path, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(FileType::from_raw_mode(stat.st_mode))
}
