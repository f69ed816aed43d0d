//! The `dev` tree: `vfio/devices/vfioN`, `vfio/N`, `vfio/vfio` and `iommu`.

use crate::advice::Advice;
use crate::announced::Announcers;
use crate::files::Files;
use crate::mounter::{Mounter, connection_config};
use crate::node::{Node, Through, file_id};
use crate::plain::{Plain, Which};
use crate::shared::{Shared, refuse};
use crate::{Options, Owner};
use client_process::FileId;
use fuse_server::{
    Attr, Connection, Entry, Handler, Mount, MountOptions, Opened, Operation, Policy, ReplyEntry,
    Request, Workers,
};
use rustix::fs::FileType;
use rustix::io::Errno;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use vfio_core::Core;
use vfio_core::caller::FileObject;
use vfio_core::device::Device;
use vfio_core::event::{Notice, Subscription, What};
use vfio_core::group::Group;
use vfio_uapi::private::INODES;

const ROOT: u64 = 1;
const VFIO: u64 = 2;
const DEVICES: u64 = 3;
// What is no directory, by what its number begins with.
const IOMMU: u64 = INODES | 1;
const CONTAINER: u64 = INODES | 2;
/// Node of a device: this plus its serial. Serials are not used again, so neither are nodes.
const DEVICE: u64 = INODES | 1 << 40;
/// Node of a group: this plus its serial.
const GROUP: u64 = INODES | 1 << 44;

/// `st_ino` of a device's node, whichever connection it is seen on.
pub(crate) fn ino(serial: u64) -> u64 {
    DEVICE + serial
}

/// The mounted `dev` tree. Dropping it unmounts.
#[derive(Debug)]
pub struct Dev {
    tree: Arc<Tree>,
    mount: Option<Mount>,
    workers: Workers,
    _events: Subscription,
    path: PathBuf,
}

struct Tree {
    core: Core,
    shared: Arc<Shared>,
    nodes: Mutex<HashMap<u64, Known>>,
    groups: Mutex<HashMap<u64, KnownGroup>>,
    iommu: Plain,
    container: Plain,
    device: Owner,
    group: Owner,
    redirect: bool,
}

/// A node that the kernel holds lookups of.
struct Known {
    node: Arc<Node>,
    /// Opens that are served here, without a connection of the device's own.
    through: Arc<Through>,
    lookups: u64,
}

/// A group's node that the kernel holds lookups of.
struct KnownGroup {
    node: Arc<Plain>,
    lookups: u64,
}

impl std::fmt::Debug for Tree {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tree")
            .field("mounter", &self.shared.mounter)
            .finish_non_exhaustive()
    }
}

/// Whether the kernel lets this connection give its files a backing: not before Linux 6.9, and not in
/// a user namespace (`fs/fuse/backing.c`, `fuse_backing_open`).
fn hands_files_through(connection: &Connection) -> bool {
    let attempt = || {
        let memory = rustix::fs::memfd_create("vfiod", rustix::fs::MemfdFlags::CLOEXEC)?;
        connection.backing_open(memory.as_fd())
    };
    if !connection.has_passthrough() {
        return false;
    }
    match attempt() {
        Ok(_) => true,
        Err(errno) => {
            tracing::warn!("no native mapping, regions trap: {errno}");
            false
        }
    }
}

impl Dev {
    /// Mounts the tree and serves it.
    pub fn start(core: &Core, options: &Options) -> Result<Dev, Errno> {
        make_dir(&options.dev)?;
        let options_ = MountOptions {
            shared: true,
            ..MountOptions::default()
        };
        let (fd, mount) = options_.create()?;
        let connection = Connection::new(fd, &connection_config())?;
        let passthrough = options.passthrough && hands_files_through(&connection);
        core.set_native_mmap(passthrough);
        let shared = Arc::new(Shared {
            files: Files::default(),
            connection: connection.clone(),
            mount: OnceLock::new(),
            mounter: Mounter::new(options.dev.join("vfio/devices"), options.idle),
            config: core.config().clone(),
            advice: Advice::default(),
            announcers: Announcers::default(),
            open_groups: Mutex::default(),
            ioctl_deadline: options.ioctl_deadline,
            passthrough,
        });
        let tree = Arc::new(Tree {
            core: core.clone(),
            iommu: Plain::new(&shared, Which::Iommu, IOMMU, options.iommu),
            container: Plain::new(&shared, Which::Container, CONTAINER, options.container),
            shared,
            nodes: Mutex::default(),
            groups: Mutex::default(),
            device: options.device,
            group: options.group,
            redirect: options.redirect,
        });
        let policy = Policy {
            name: "vfio-dev".into(),
            // Short requests, which one thread answers faster than several that take turns. Where
            // devices have no connection of their own, their drivers are called here too.
            threads: if options.redirect { 1 } else { 4 },
            follow_cpu: options.redirect,
            ..Policy::default()
        };
        let workers = Workers::start(connection, Arc::clone(&tree) as Arc<dyn Handler>, policy)?;
        let mount = mount.attach(&options.dev)?;
        let node = rustix::fs::open(
            options.dev.join("iommu"),
            rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )?;
        if let Some(id) = file_id(node) {
            let _ = tree.shared.mount.set(id.dev);
        }
        let weak = Arc::downgrade(&tree);
        let events = core.subscribe(move |notice| {
            let Some(tree) = weak.upgrade() else { return };
            match notice {
                Notice::Event(event) if matches!(event.what, What::Unregistering { .. }) => {
                    tree.forget_name(&event.device);
                }
                Notice::GroupGone { name, serial } => tree.forget_group(name, *serial),
                _ => {}
            }
        });
        Ok(Dev {
            tree,
            mount: Some(mount),
            workers,
            _events: events,
            path: options.dev.clone(),
        })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files a client may hold that are this device's: its node here, its node on its own
    /// connection, its memory.
    pub fn file_ids(&self, device: &Device) -> Vec<FileId> {
        let mut ids = Vec::new();
        ids.extend(self.tree.shared.file_id(ino(device.serial())));
        if let Some(own) = self.tree.shared.mounter.file_id(device.serial()) {
            // The root of its own connection: node 1 where a mapping shows it (`i_ino`), and what
            // GETATTR says where stat does (`fs/fuse/inode.c`, `orig_ino`).
            ids.extend([1, ino(device.serial())].map(|ino| FileId { ino, ..own }));
        }
        ids.extend(
            device
                .memory_if_made()
                .and_then(|memory| file_id(memory.backing_fd())),
        );
        ids
    }

    /// The file a client holds that has the group open.
    pub fn group_file_id(&self, group: &Group) -> Option<FileId> {
        self.tree.shared.file_id(GROUP + group.serial())
    }

    /// How many devices have a mount of their own at the moment.
    pub fn own_mounts(&self) -> usize {
        self.tree.shared.mounter.len()
    }

    /// Open device files and iommufd contexts.
    pub fn open_files(&self) -> (usize, usize) {
        let files = &self.tree.shared.files;
        (
            files.count(|file| matches!(file, FileObject::Device(_))),
            files.count(|file| matches!(file, FileObject::Iommufd(_))),
        )
    }

    /// Open group files and containers.
    pub fn open_groups(&self) -> (usize, usize) {
        let files = &self.tree.shared.files;
        (
            files.count(|file| matches!(file, FileObject::Group(_))),
            files.count(|file| matches!(file, FileObject::Container(_))),
        )
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        self.tree.shared.mounter.stop();
        drop(self.mount.take());
        self.workers.wait(Duration::from_millis(200));
    }
}

/// Makes a directory and those above it.
pub(crate) fn make_dir(path: &Path) -> Result<(), Errno> {
    std::fs::create_dir_all(path).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

fn dir_attr(ino: u64) -> Attr {
    Attr {
        nlink: 2,
        ..Attr::new(ino, 0o040_755, 0)
    }
}

impl Tree {
    fn nodes(&self) -> MutexGuard<'_, HashMap<u64, Known>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn node(&self, id: u64) -> Option<(Arc<Node>, Arc<Through>)> {
        let nodes = self.nodes();
        let known = nodes.get(&id)?;
        Some((Arc::clone(&known.node), Arc::clone(&known.through)))
    }

    fn groups(&self) -> MutexGuard<'_, HashMap<u64, KnownGroup>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device behind a name in `devices`. With char devices off none is listed, and nobody but
    /// root opens one by its name: a supervisor does, for those who come by a group.
    fn device(&self, name: &OsStr) -> Option<Device> {
        self.core.device_by_name(name.to_str()?)
    }

    fn device_owner(&self) -> Owner {
        match self.core.config().cdev {
            true => self.device,
            false => Owner {
                mode: 0,
                ..self.device
            },
        }
    }

    fn lookup(&self, parent: u64, name: &OsStr, reply: ReplyEntry) {
        // Names are believed for no time: they go the moment unregister starts.
        let fixed = |node: u64, attr: Attr| Entry {
            node,
            generation: 0,
            ttl: Duration::ZERO,
            attr,
        };
        let entry = match (parent, name.to_str()) {
            (ROOT, Some("vfio")) => fixed(VFIO, dir_attr(VFIO)),
            (ROOT, Some("iommu")) => fixed(IOMMU, self.iommu.attr()),
            (VFIO, Some("devices")) => fixed(DEVICES, dir_attr(DEVICES)),
            (VFIO, Some("vfio")) => fixed(CONTAINER, self.container.attr()),
            (VFIO, Some(name)) => match self.core.group_by_name(name) {
                Some(group) => {
                    let id = GROUP + group.serial();
                    let mut groups = self.groups();
                    let known = groups.entry(id).or_insert_with(|| KnownGroup {
                        node: Arc::new(Plain::new(
                            &self.shared,
                            Which::Group(group),
                            id,
                            self.group,
                        )),
                        lookups: 0,
                    });
                    known.lookups += 1;
                    let attr = known.node.attr();
                    drop(groups);
                    fixed(id, attr)
                }
                None => {
                    let _ = reply.error(Errno::NOENT);
                    return;
                }
            },
            (DEVICES, _) => match self.device(name) {
                Some(device) => {
                    let id = ino(device.serial());
                    let mut nodes = self.nodes();
                    let known = nodes.entry(id).or_insert_with(|| Known {
                        node: Arc::new(Node::new(&self.shared, &device, self.device_owner())),
                        through: Arc::new(Through::new(&self.shared.connection)),
                        lookups: 0,
                    });
                    known.lookups += 1;
                    if let Some(file) = self.shared.file_id(id) {
                        let _ = known.through.id.set(file);
                    }
                    let attr = known.node.attr(id);
                    drop(nodes);
                    fixed(id, attr)
                }
                None => {
                    let _ = reply.error(Errno::NOENT);
                    return;
                }
            },
            _ => {
                let _ = reply.error(Errno::NOENT);
                return;
            }
        };
        let _ = reply.entry(&entry);
    }

    fn forget(&self, id: u64, lookups: u64) {
        if id >= GROUP {
            let mut groups = self.groups();
            if let Some(known) = groups.get_mut(&id) {
                known.lookups = known.lookups.saturating_sub(lookups);
                if known.lookups == 0 {
                    let gone = groups.remove(&id);
                    drop(groups);
                    drop(gone);
                }
            }
            return;
        }
        let mut nodes = self.nodes();
        if let Some(known) = nodes.get_mut(&id) {
            known.lookups = known.lookups.saturating_sub(lookups);
            if known.lookups == 0 {
                let gone = nodes.remove(&id);
                drop(nodes);
                drop(gone);
            }
        }
    }

    /// The names of a directory with their nodes, in a stable order.
    fn names(&self, dir: u64) -> Option<Vec<(u64, FileType, String)>> {
        Some(match dir {
            ROOT => vec![
                (VFIO, FileType::Directory, "vfio".into()),
                (IOMMU, FileType::RegularFile, "iommu".into()),
            ],
            VFIO => {
                let mut names = vec![(CONTAINER, FileType::RegularFile, "vfio".into())];
                if self.core.config().cdev {
                    names.push((DEVICES, FileType::Directory, "devices".into()));
                }
                names.extend(self.core.groups().iter().map(|group| {
                    let node = GROUP + group.serial();
                    (node, FileType::RegularFile, group.name())
                }));
                names
            }
            DEVICES if self.core.config().cdev => self
                .core
                .devices()
                .iter()
                .map(|device| (ino(device.serial()), FileType::RegularFile, device.name()))
                .collect(),
            DEVICES => Vec::new(),
            _ => return None,
        })
    }

    /// The kernel forgets a device's name; with it goes what is mounted there, in every namespace.
    fn forget_name(self: &Arc<Self>, name: &str) {
        // The newest: the kernel may know devices of that name that have gone, as long as somebody holds
        // their nodes.
        let known = self
            .nodes()
            .iter()
            .filter(|(_, known)| known.node.name == name)
            .max_by_key(|(id, _)| **id)
            .map(|(id, known)| (*id, known.node.serial));
        let Some((id, serial)) = known else { return };
        self.shared.mounter.gone(serial);
        let tree = Arc::clone(self);
        let name = name.to_owned();
        self.shared.mounter.notify(move || {
            // ENOENT: the kernel had forgotten it by itself.
            let connection = &tree.shared.connection;
            let _ = connection.notify_delete(DEVICES, id, OsStr::new(&name));
        });
    }

    /// The kernel forgets a group's name. Files that are open go on being answered.
    fn forget_group(self: &Arc<Self>, name: &str, serial: u64) {
        let id = GROUP + serial;
        if !self.groups().contains_key(&id) {
            return;
        }
        let tree = Arc::clone(self);
        let name = name.to_owned();
        self.shared.mounter.notify(move || {
            let connection = &tree.shared.connection;
            let _ = connection.notify_delete(VFIO, id, OsStr::new(&name));
        });
    }

    fn directory(&self, request: Request<'_>) {
        let node = request.node;
        let Some(names) = self.names(node) else {
            let _ = request.op.error(Errno::STALE);
            return;
        };
        let _ = match request.op {
            Operation::Lookup { name, reply } => {
                self.lookup(node, name, reply);
                return;
            }
            Operation::Getattr { reply, .. } => reply.attr(&dir_attr(node)),
            Operation::Opendir { reply, .. } => reply.opened(&Opened::default()),
            Operation::Readdir {
                offset, mut reply, ..
            } => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                for (at, (node, kind, name)) in names.into_iter().enumerate().skip(start) {
                    if !reply.add(node, at as u64 + 1, kind, name) {
                        break;
                    }
                }
                reply.done()
            }
            Operation::Releasedir { reply, .. } => reply.ok(),
            Operation::Statfs { reply } => reply.statfs(&fuse_server::Statfs::default()),
            Operation::Setattr { reply, .. } => reply.error(Errno::PERM),
            other => refuse(other, Errno::PERM),
        };
    }
}

impl Handler for Tree {
    fn handle(&self, request: Request<'_>) {
        if let Operation::Forget(forgets) = &request.op {
            for forget in forgets.clone() {
                self.forget(forget.node, forget.nlookup);
            }
            return;
        }
        match request.node {
            IOMMU => self.iommu.handle(request),
            CONTAINER => self.container.handle(request),
            id if id >= GROUP => {
                let node = self.groups().get(&id).map(|known| Arc::clone(&known.node));
                match node {
                    Some(node) => node.handle(request),
                    None => {
                        let _ = request.op.error(Errno::NXIO);
                    }
                }
            }
            id if id >= DEVICE => {
                let Some((node, through)) = self.node(id) else {
                    let _ = request.op.error(Errno::NXIO);
                    return;
                };
                let tid = request.caller.tid;
                match request.op {
                    Operation::Open { flags, reply } => {
                        let reply = if self.redirect {
                            match self.shared.mounter.redirect(&node, tid, reply) {
                                Some(reply) => reply,
                                None => return,
                            }
                        } else {
                            reply
                        };
                        node.open(&through, tid, flags, reply);
                    }
                    _ => node.handle(&through, id, request),
                }
            }
            _ => self.directory(request),
        }
    }
}
