//! Which files are vfiod's, and what they stand for.

use super::sys;
use super::task::FileId;
use client_process::Caller;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{CWD, Dev, Mode, OFlags, makedev, open, openat};
use rustix::io::Errno;
use rustix::path::DecInt;
use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vfio_uapi::private::{kind, may_be_node};

/// What vfiod's mounts say in mountinfo.
const FUSE_TYPE: &str = "fuse.vfiod";

/// The daemon's nodes, known by the file systems they are on: that of the `dev` tree, and one for
/// each device in use.
pub(super) struct Nodes {
    /// The directory of devices' nodes, as this process sees it.
    devices: OwnedFd,
    dev: PathBuf,
    sys: PathBuf,
    mounts: Mutex<Mounts>,
    /// The file system of the `dev` tree.
    tree: Dev,
    /// Which device a name meant the last time. OPEN_DEVICE refuses one that it does not mean.
    found: Mutex<HashMap<CString, u32>>,
    /// Nodes of devices, opened with O_PATH on the devices' own connections: no name has to be looked up
    /// there. Only while there is much to do: they keep a connection from its end.
    kept: Mutex<HashMap<u32, Arc<OwnedFd>>>,
    /// `/proc/self/fd`, where they are opened again.
    own: OwnedFd,
    /// A file that counts as a node without being one.
    #[cfg(test)]
    pub(super) adopted: Option<FileId>,
}

struct Mounts {
    /// Polls for a change of what it lists.
    table: OwnedFd,
    ours: HashSet<Dev>,
}

impl Nodes {
    /// The nodes below `dev`, with the daemon's `sys` tree beside them.
    pub(super) fn new(dev: &Path, sys: &Path) -> Result<Nodes, Errno> {
        let devices = open(
            dev.join("vfio/devices"),
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let table = open(
            "/proc/self/mountinfo",
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let tree = FileId::at(&devices, "")?.dev;
        let ours = HashSet::from([tree]);
        let nodes = Nodes {
            devices,
            dev: dev.to_owned(),
            sys: sys.to_owned(),
            mounts: Mutex::new(Mounts { table, ours }),
            tree,
            found: Mutex::default(),
            kept: Mutex::default(),
            own: open(
                "/proc/self/fd",
                OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )?,
            #[cfg(test)]
            adopted: None,
        };
        nodes.lock().read(&nodes.dev)?;
        Ok(nodes)
    }

    fn lock(&self) -> MutexGuard<'_, Mounts> {
        self.mounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a file system is the `dev` tree, where groups are.
    pub(super) fn is_tree(&self, dev: Dev) -> bool {
        dev == self.tree
    }

    /// Whether a file is one of ours. Asks no server.
    pub(super) fn is_node(&self, file: FileId) -> bool {
        #[cfg(test)]
        if self.adopted == Some(file) {
            return true;
        }
        may_be_node(file.ino) && self.is_ours(file.dev)
    }

    /// Whether a file system is one of ours. Asks no server.
    pub(super) fn is_ours(&self, dev: Dev) -> bool {
        // A FUSE mount has no block device behind it.
        if rustix::fs::major(dev) != 0 {
            return false;
        }
        let mut mounts = self.lock();
        if mounts.changed() {
            let _ = mounts.read(&self.dev);
        }
        mounts.ours.contains(&dev)
    }

    /// A copy of a caller's descriptor, if it is a file of ours.
    ///
    /// `BADF`: not open, or opened with O_PATH. `NOTTY`: not ours.
    pub(super) fn get(&self, caller: Caller, fd: i32) -> Result<OwnedFd, Errno> {
        let file = caller.get_fd(fd)?;
        // The number may have another file by now.
        if self.is_node(FileId::at(&file, "")?) {
            Ok(file)
        } else {
            Err(Errno::NOTTY)
        }
    }

    /// Opens the node of a device.
    pub(super) fn open_device(&self, index: u32) -> Result<OwnedFd, Errno> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        openat(&self.devices, format!("vfio{index}"), flags, Mode::empty())
    }

    /// The device that a name may mean.
    pub(super) fn guess(&self, name: &CStr) -> Option<u32> {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.get(name).copied()
    }

    /// Opens the node of a device that was opened before.
    pub(super) fn open_again(&self, index: u32) -> Result<OwnedFd, Errno> {
        let kept = self.kept().get(&index).map(Arc::clone);
        let Some(kept) = kept else {
            let device = self.open_device(index)?;
            self.keep(index, device.as_fd());
            return Ok(device);
        };
        let opened = self.reopen(kept.as_fd(), OFlags::RDWR);
        if opened.is_err() {
            self.kept().remove(&index);
        }
        opened
    }

    /// Keeps the node of a device that is open, if it is on the device's own connection: the other node
    /// is where the daemon makes that connection when it is opened.
    fn keep(&self, index: u32, device: BorrowedFd<'_>) {
        if FileId::at(device, "").is_ok_and(|id| id.dev != self.tree)
            && let Ok(node) = self.reopen(device, OFlags::PATH)
        {
            self.kept().insert(index, Arc::new(node));
        }
    }

    /// Opens the file again that a descriptor of ours is of.
    fn reopen(&self, fd: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, Errno> {
        let name = DecInt::from_fd(fd);
        openat(
            &self.own,
            name.as_c_str(),
            flags | OFlags::CLOEXEC,
            Mode::empty(),
        )
    }

    fn kept(&self) -> MutexGuard<'_, HashMap<u32, Arc<OwnedFd>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing has been opened for a while.
    pub(super) fn let_go(&self) {
        let kept = std::mem::take(&mut *self.kept());
        drop(kept);
    }

    /// Notes what a name meant.
    pub(super) fn remember(&self, name: &CStr, index: u32) {
        /// More than a client opens; names are a client's to choose.
        const MANY: usize = 256;
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if found.get(name) == Some(&index) {
            return;
        }
        if found.len() >= MANY {
            found.clear();
        }
        found.insert(name.to_owned(), index);
    }

    /// The char device that an open file of ours stands for, in its own words.
    pub(super) fn char_device(&self, file: BorrowedFd<'_>) -> Result<Dev, Errno> {
        let what = sys::what(file)?;
        if !(kind::CONTAINER..=kind::IOMMU).contains(&what.kind) {
            return Err(Errno::NODEV);
        }
        Ok(makedev(what.major, what.minor))
    }

    /// The char device that a node of ours stands for, by its name: to open it could take it from
    /// somebody.
    pub(super) fn char_device_by_name(&self, node: impl AsFd) -> Result<Dev, Errno> {
        let link = format!("/proc/self/fd/{}", node.as_fd().as_raw_fd());
        let path = rustix::fs::readlink(link, Vec::new())?;
        let path = Path::new(OsStr::from_bytes(path.as_bytes()));
        let name = path
            .file_name()
            .and_then(OsStr::to_str)
            .ok_or(Errno::NODEV)?;
        let dir = path.parent().and_then(Path::file_name);
        let class = match (dir.and_then(OsStr::to_str), name) {
            (Some("devices"), _) => "class/vfio-dev",
            (_, "vfio" | "iommu") => "class/misc",
            _ => "class/vfio",
        };
        let text = std::fs::read_to_string(self.sys.join(class).join(name).join("dev"))
            .map_err(|_| Errno::NODEV)?;
        parse_dev(text.trim()).ok_or(Errno::NODEV)
    }
}

impl Mounts {
    /// Whether mounts came or went since the last time this was asked (`fs/proc_namespace.c`,
    /// `mounts_poll`).
    fn changed(&self) -> bool {
        let mut fds = [PollFd::new(&self.table, PollFlags::PRI)];
        poll(&mut fds, Some(&Timespec::default())).is_ok_and(|count| count > 0)
    }

    /// Learns which file systems are ours. One that is not listed any more can still have open files,
    /// and stays ours until its number is another's.
    fn read(&mut self, below: &Path) -> Result<(), Errno> {
        let mut text = Vec::new();
        let file = std::fs::File::from(self.table.try_clone().map_err(|_| Errno::MFILE)?);
        rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0))?;
        std::io::Read::read_to_end(&mut &file, &mut text)
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        let text = String::from_utf8_lossy(&text);
        let (mut found, mut others) = (Vec::new(), Vec::new());
        for line in text.lines() {
            let Some(mount) = Mount::parse(line) else {
                continue;
            };
            if mount.kind == FUSE_TYPE && Path::new(&unescape(mount.place)).starts_with(below) {
                found.push(mount.dev);
            } else {
                others.push(mount.dev);
            }
        }
        for dev in others {
            self.ours.remove(&dev);
        }
        self.ours.extend(found);
        Ok(())
    }
}

/// A line of mountinfo.
struct Mount<'a> {
    dev: Dev,
    place: &'a str,
    kind: &'a str,
}

impl Mount<'_> {
    fn parse(line: &str) -> Option<Mount<'_>> {
        let (mount, fs) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(2);
        Some(Mount {
            dev: parse_dev(fields.next()?)?,
            place: fields.nth(1)?,
            kind: fs.split(' ').next()?,
        })
    }
}

/// Whether a file system, as the caller's mountinfo lists it, can be asked for a name without waiting
/// for a server.
pub(super) fn is_local(tid: i32, dev: Dev) -> bool {
    const LOCAL: [&str; 16] = [
        "tmpfs", "devtmpfs", "proc", "sysfs", "ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs",
        "overlay", "squashfs", "vfat", "erofs", "ramfs", "rootfs",
    ];
    let text = std::fs::read(format!("/proc/{tid}/mountinfo")).unwrap_or_default();
    String::from_utf8_lossy(&text)
        .lines()
        .filter_map(Mount::parse)
        .any(|mount| mount.dev == dev && LOCAL.contains(&mount.kind))
}

/// The file system that `/proc` is, by its device number.
pub(super) fn proc_dev() -> Result<Dev, Errno> {
    FileId::at(CWD, "/proc").map(|id| id.dev)
}

fn parse_dev(text: &str) -> Option<Dev> {
    let (major, minor) = text.split_once(':')?;
    Some(makedev(major.parse().ok()?, minor.parse().ok()?))
}

/// Spaces and such in mountinfo are `\040`.
fn unescape(text: &str) -> String {
    let mut out = Vec::new();
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'\\' {
            out.push(byte);
            continue;
        }
        let digits = bytes.by_ref().take(3);
        out.push(digits.fold(0_u8, |value, digit| {
            value.wrapping_mul(8).wrapping_add(digit.wrapping_sub(b'0'))
        }));
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_is_understood() {
        let line = r"36 35 0:98 / /mnt/a\040b/vfio\134x rw shared:1 master:2 - fuse.vfiod vfiod rw";
        let mount = Mount::parse(line).unwrap();
        assert_eq!(mount.dev, makedev(0, 98));
        assert_eq!(unescape(mount.place), r"/mnt/a b/vfio\x");
        assert_eq!(mount.kind, FUSE_TYPE);
        assert!(Mount::parse("36 35").is_none());
        assert!(Mount::parse("36 35 098 / / rw - x").is_none());
    }

    #[test]
    fn a_file_system_without_a_server_is_local() {
        let tid = rustix::process::getpid().as_raw_nonzero().get();
        assert!(is_local(tid, proc_dev().unwrap()));
        assert!(!is_local(tid, makedev(0, 0)));
        assert!(!is_local(i32::MAX, proc_dev().unwrap()));
    }
}
