//! The sysfs tree, as derived data.
//!
//! Nothing here is stored: a [`Node`] names a place, and every question about it is answered from
//! the core and the [model](crate::model) as they are at that moment. A device costs nothing until
//! somebody looks at it, and what is gone from the model is gone from the tree: a lookup of it is
//! `ENOENT`, a file of it that somebody has open answers `ENODEV`.
//!
//! The rules of the files are `fs/sysfs/file.c`'s and `fs/kernfs/file.c`'s: one write is one
//! store whatever the offset, a write of nothing does nothing, and a store sees at most a page.
//!
//! Beyond the kernel's own tree there is `/sys/kernel/debug/vfio/<device>/state`, which says in a
//! line whether the VFIO device is open and by whom, and, when it is being unregistered, what
//! that waits for. (The device's own directory is nearly empty by then.)

mod attr;
mod path;
#[cfg(all(test, not(feature = "shuttle")))]
mod tests;
mod text;
mod tree;
mod virt;

use crate::model::{BusDevice, Waiting};
use crate::{Core, Errno, Result};
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use virt::Virtual;

/// Bytes a file shows or takes at once, and the size that `stat` says it has.
pub const PAGE_SIZE: usize = 4096;

/// A place in the tree. Equal nodes are the same file; a file that goes and comes again under
/// the same path on another device is another one. It keeps no VFIO device alive.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Node {
    dir: Dir,
    entry: Entry,
}

/// What a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Dir,
    /// A symbolic link.
    Link,
    /// A file.
    Attr,
}

/// What became of a write.
#[derive(Debug)]
#[must_use = "it may have failed, or still be going on"]
pub enum Store {
    /// It is over: the number of bytes taken, or an errno.
    Done(Result<usize>),
    /// It has begun and waits for users; nothing can stop it. A writer that is interrupted gets
    /// `EINTR`, and it goes on.
    Waiting(StoreWaiting),
}

/// A write that waits for users to leave.
#[derive(Clone, Debug)]
pub struct StoreWaiting {
    waiting: Waiting,
    len: usize,
}

impl StoreWaiting {
    /// Calls `f` with what the write returns: at once, here, if it is over, else on the thread
    /// that sees the last user go.
    pub fn on_done(&self, f: impl FnOnce(Result<usize>) + Send + 'static) {
        let len = self.len;
        self.waiting.on_done(move |result| f(result.map(|()| len)));
    }

    /// What it waits for, for people.
    pub fn describe(&self) -> String {
        self.waiting.describe()
    }

    /// The operation itself.
    pub fn operation(&self) -> &Waiting {
        &self.waiting
    }
}

/// A device as part of a node: the same only if it is the very same device.
#[derive(Clone, Debug)]
struct Dev(Arc<BusDevice>);

impl PartialEq for Dev {
    fn eq(&self, other: &Dev) -> bool {
        self.0.id() == other.0.id()
    }
}

impl Eq for Dev {}

impl Hash for Dev {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.id().hash(state);
    }
}

/// The directories there are.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Dir {
    Root,
    /// `/sys/devices`, and what is between it and devices without a parent.
    Path(Arc<str>),
    Device(Dev),
    /// `<device>/vfio-dev`.
    Glue(Dev),
    /// `<device>/vfio-dev/vfioN`.
    Vfio(Dev, u32),
    /// A device of a class that has nothing but a node: `/sys/devices/virtual/CLASS/NAME`.
    Virtual(Virtual),
    /// A driver's attribute group.
    Attributes(Dev, &'static str),
    /// `<parent>/mdev_supported_types`.
    Types(Dev),
    Type(Dev, u32),
    TypeDevices(Dev, u32),
    Buses,
    Bus(&'static str),
    BusDevices(&'static str),
    BusDrivers(&'static str),
    Driver(&'static str, &'static str),
    Classes,
    Class(&'static str),
    Dev,
    DevChar,
    Kernel,
    Groups,
    Group(u32),
    GroupDevices(u32),
    Debug,
    DebugVfio,
    /// Named after the device its VFIO device belongs to.
    DebugDevice(Dev),
    Modules,
    Module(Arc<str>),
    Parameters(Arc<str>),
    ModuleDrivers(Arc<str>),
}

/// What is in a directory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Entry {
    /// The directory itself.
    This,
    Attr(&'static str),
    /// A module's parameter.
    Parameter(Arc<str>),
    /// A link with a name of its own.
    Link(&'static str),
    /// A link to a device.
    Device(Dev),
    /// A link to a VFIO device.
    Vfio(Dev, u32),
    /// A link to a device that has nothing but a node.
    Virtual(Virtual),
    /// A link to a driver.
    Driver(&'static str, &'static str),
}

impl Dir {
    fn node(self) -> Node {
        Node {
            dir: self,
            entry: Entry::This,
        }
    }
}

/// The tree of a core.
#[derive(Clone, Debug)]
pub struct Sysfs {
    core: Core,
}

impl Sysfs {
    /// The tree of this core.
    pub fn new(core: &Core) -> Sysfs {
        Sysfs { core: core.clone() }
    }

    /// `/sys`.
    pub fn root(&self) -> Node {
        Dir::Root.node()
    }

    /// What a path below `/sys` leads to, links followed, with or without a leading slash.
    /// `ENOENT` for what there is not, `ENOTDIR` for a path through a file, `ELOOP` after too
    /// many links.
    pub fn walk(&self, path: &str) -> Result<Node> {
        let mut links = 0;
        let mut here: Vec<Node> = vec![self.root()];
        let mut rest: Vec<String> = path.rsplit('/').map(str::to_owned).collect();
        while let Some(name) = rest.pop() {
            let at = here.last().cloned().unwrap_or_else(|| self.root());
            match name.as_str() {
                "" | "." => {}
                ".." => {
                    if here.len() > 1 {
                        here.pop();
                    }
                }
                _ => {
                    let next = self.lookup(&at, &name)?;
                    if self.kind(&next) == Kind::Link {
                        links += 1;
                        if links > 40 {
                            return Err(Errno::LOOP);
                        }
                        let target = self.readlink(&next)?;
                        rest.extend(target.rsplit('/').map(str::to_owned));
                    } else {
                        here.push(next);
                    }
                }
            }
        }
        here.pop().ok_or(Errno::NOENT)
    }

    /// What it is.
    pub fn kind(&self, node: &Node) -> Kind {
        match node.entry {
            Entry::This => Kind::Dir,
            Entry::Attr(_) | Entry::Parameter(_) => Kind::Attr,
            Entry::Link(_)
            | Entry::Device(_)
            | Entry::Vfio(..)
            | Entry::Virtual(_)
            | Entry::Driver(..) => Kind::Link,
        }
    }

    /// Permission bits, the kernel's: 0755 for directories (0700 below `debug`), 0777 for links.
    /// All belong to root.
    pub fn mode(&self, node: &Node) -> u32 {
        match (&node.entry, &node.dir) {
            (Entry::This, Dir::Debug) => 0o700,
            (Entry::This, _) => 0o755,
            (Entry::Parameter(_), _) => 0o444,
            (Entry::Attr(name), dir) => attr::mode(dir, name),
            _ => 0o777,
        }
    }

    /// Its inode number: the same for equal nodes, for as long as the process runs. The root's
    /// is 1.
    pub fn ino(&self, node: &Node) -> u64 {
        if node.dir == Dir::Root && node.entry == Entry::This {
            return 1;
        }
        // 64 bits of a good hash: two of a million files are alike once in 40 million daemons.
        let mut hasher = DefaultHasher::new();
        node.hash(&mut hasher);
        hasher.finish().max(2)
    }

    /// Whether it may be opened like this. `EACCES` for a way that the file does not know, for
    /// root too (`kernfs_fop_open`); `ENODEV` when it is gone.
    pub fn open(&self, node: &Node, read: bool, write: bool) -> Result {
        let mode = self.mode(node);
        if (read && mode & 0o444 == 0) || (write && mode & 0o222 == 0) {
            return Err(Errno::ACCESS);
        }
        match self.exists(node) {
            true => Ok(()),
            false => Err(Errno::NODEV),
        }
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&path::of(self))
    }
}
