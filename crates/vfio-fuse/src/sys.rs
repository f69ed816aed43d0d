//! The sysfs tree: the core's derived [`Sysfs`] as files.
//!
//! The write contract is `fs/kernfs/file.c`'s: one write is one store whatever the offset; opens
//! with `O_CREAT`, `O_TRUNC` and `O_APPEND` are fine; the store's errno is the write's. A store
//! that waits for users parks its reply: no thread waits, an interrupted writer gets `EINTR`, and
//! what it began goes on.
//!
//! A second mount can *merge* the tree with the machine's own: where both have a directory it
//! lists both, with placeholders for what is only in the machine's, onto which a private mount
//! namespace binds the real thing.

use crate::Options;
use crate::dev::make_dir;
use crate::files::Files;
use crate::shared::refuse;
use fuse_server::{
    Attr, Config, Connection, Entry, Features, Handler, Mount, MountOptions, OpenFlags, Opened,
    Operation, Policy, ReplyEntry, ReplyWrite, Request, Workers,
};
use rustix::fs::{AtFlags, CWD, FileType, Stat};
use rustix::io::Errno;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vfio_core::Core;
use vfio_core::sysfs::{Kind, Node, PAGE_SIZE, Store, Sysfs};

const ROOT: u64 = 1;

/// A mounted sysfs tree. Dropping it unmounts.
#[derive(Debug)]
pub struct Sys {
    mount: Option<Mount>,
    workers: Workers,
    path: PathBuf,
}

struct Tree {
    sysfs: Sysfs,
    /// The machine's own tree, for a merged one.
    real: Option<PathBuf>,
    /// User and group of what is ours.
    owner: (u32, u32),
    nodes: Mutex<HashMap<u64, Known>>,
    files: Files<Arc<OpenFile>>,
}

/// A node that the kernel holds lookups of.
struct Known {
    place: Place,
    lookups: u64,
}

/// What a node is.
#[derive(Clone, Debug)]
enum Place {
    Ours(Node),
    /// Only in the machine's tree, by its path from there.
    Real(PathBuf),
}

enum OpenFile {
    /// A file, and what it showed when it was last read from the start.
    Attr(Node, Mutex<Vec<u8>>),
    /// A directory as it was when opened.
    Dir(Vec<(u64, FileType, Vec<u8>)>),
    Placeholder,
}

impl Sys {
    /// Mounts the tree and serves it.
    pub fn start(core: &Core, options: &Options) -> Result<Sys, Errno> {
        Sys::mount(core, &options.sys, None, options.sys_owner)
    }

    /// Mounts the tree merged with another (the machine's own `/sys`) at `path`. What is not the
    /// machine's has this owner: see [`Options::sys_owner`].
    pub fn merged(core: &Core, path: &Path, real: &Path, owner: (u32, u32)) -> Result<Sys, Errno> {
        Sys::mount(core, path, Some(real.to_owned()), owner)
    }

    fn mount(
        core: &Core,
        path: &Path,
        real: Option<PathBuf>,
        owner: (u32, u32),
    ) -> Result<Sys, Errno> {
        make_dir(path)?;
        let options = MountOptions {
            shared: true,
            ..MountOptions::default()
        };
        let (fd, mount) = options.create()?;
        let default = Config::default();
        let unwanted = Features::DO_READDIRPLUS | Features::READDIRPLUS_AUTO;
        let config = Config {
            features: default.features - unwanted,
            ..default
        };
        let connection = Connection::new(fd, &config)?;
        let tree = Arc::new(Tree {
            sysfs: Sysfs::new(core),
            real,
            owner,
            nodes: Mutex::default(),
            files: Files::default(),
        });
        let policy = Policy {
            name: "vfio-sys".into(),
            follow_cpu: false,
            ..Policy::default()
        };
        let workers = Workers::start(connection, tree, policy)?;
        let mount = mount.attach(path)?;
        Ok(Sys {
            mount: Some(mount),
            workers,
            path: path.to_owned(),
        })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Sys {
    fn drop(&mut self) {
        drop(self.mount.take());
        self.workers.wait(Duration::from_millis(200));
    }
}

impl Tree {
    fn nodes(&self) -> MutexGuard<'_, HashMap<u64, Known>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self, id: u64) -> Option<Place> {
        if id == ROOT {
            return Some(Place::Ours(self.sysfs.root()));
        }
        self.nodes().get(&id).map(|known| known.place.clone())
    }

    fn id(&self, place: &Place) -> u64 {
        match place {
            Place::Ours(node) => self.sysfs.ino(node),
            Place::Real(path) => {
                let mut hasher = DefaultHasher::new();
                ("real", path).hash(&mut hasher);
                hasher.finish().max(2)
            }
        }
    }

    /// Where a directory is in the machine's tree, if it is there too.
    fn real_dir(&self, place: &Place) -> Option<PathBuf> {
        let real = self.real.as_ref()?;
        let Place::Ours(node) = place else {
            return None;
        };
        let path = real.join(node.to_string().trim_start_matches('/'));
        let stat = lstat(&path).ok()?;
        (FileType::from_raw_mode(stat.st_mode) == FileType::Directory).then_some(path)
    }

    fn attr(&self, place: &Place) -> Result<Attr, Errno> {
        let id = self.id(place);
        match place {
            Place::Ours(node) => {
                let (kind, size) = match self.sysfs.kind(node) {
                    Kind::Dir => (FileType::Directory, 0),
                    Kind::Attr => (FileType::RegularFile, PAGE_SIZE as u64),
                    Kind::Link => (FileType::Symlink, self.sysfs.readlink(node)?.len() as u64),
                };
                let mut attr = Attr::new(id, kind.as_raw_mode() | self.sysfs.mode(node), size);
                (attr.uid, attr.gid) = self.owner;
                attr.nlink = if kind == FileType::Directory { 2 } else { 1 };
                Ok(attr)
            }
            Place::Real(path) => {
                let stat = lstat(path)?;
                let mut attr = Attr::new(id, stat.st_mode, stat.st_size.unsigned_abs());
                (attr.uid, attr.gid) = (stat.st_uid, stat.st_gid);
                Ok(attr)
            }
        }
    }

    fn find(&self, dir: &Place, name: &OsStr) -> Result<Place, Errno> {
        let Place::Ours(node) = dir else {
            return Err(Errno::NOENT);
        };
        let ours = name
            .to_str()
            .ok_or(Errno::NOENT)
            .and_then(|name| self.sysfs.lookup(node, name));
        match (ours, self.real_dir(dir)) {
            (Ok(node), _) => Ok(Place::Ours(node)),
            (Err(_), Some(real)) => {
                let path = real.join(name);
                lstat(&path).map(|_| Place::Real(path))
            }
            (Err(errno), None) => Err(errno),
        }
    }

    fn lookup(&self, dir: &Place, name: &OsStr, reply: ReplyEntry) {
        let found = self.find(dir, name).and_then(|place| {
            let attr = self.attr(&place)?;
            Ok((place, attr))
        });
        match found {
            Ok((place, attr)) => {
                let id = attr.ino;
                let mut nodes = self.nodes();
                nodes
                    .entry(id)
                    .or_insert(Known { place, lookups: 0 })
                    .lookups += 1;
                drop(nodes);
                // Believed for no time: what is gone from the model is gone from the tree.
                let entry = Entry {
                    node: id,
                    generation: 0,
                    ttl: Duration::ZERO,
                    attr,
                };
                let _ = reply.entry(&entry);
            }
            Err(errno) => {
                let _ = reply.error(errno);
            }
        }
    }

    fn forget(&self, id: u64, lookups: u64) {
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

    fn list(&self, dir: &Place) -> Result<Vec<(u64, FileType, Vec<u8>)>, Errno> {
        let Place::Ours(node) = dir else {
            return Ok(Vec::new());
        };
        let mut names: Vec<(u64, FileType, Vec<u8>)> = self
            .sysfs
            .entries(node)
            .into_iter()
            .map(|(name, node)| {
                let kind = match self.sysfs.kind(&node) {
                    Kind::Dir => FileType::Directory,
                    Kind::Attr => FileType::RegularFile,
                    Kind::Link => FileType::Symlink,
                };
                (self.sysfs.ino(&node), kind, name.into_bytes())
            })
            .collect();
        if let Some(real) = self.real_dir(dir) {
            let ours: std::collections::HashSet<Vec<u8>> =
                names.iter().map(|(_, _, name)| name.clone()).collect();
            let entries = std::fs::read_dir(&real)
                .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
            for entry in entries.flatten() {
                let name = entry.file_name();
                let Ok(stat) = lstat(&entry.path()) else {
                    continue;
                };
                if !ours.contains(name.as_bytes()) {
                    let id = self.id(&Place::Real(entry.path()));
                    let kind = FileType::from_raw_mode(stat.st_mode);
                    names.push((id, kind, name.as_bytes().to_vec()));
                }
            }
        }
        Ok(names)
    }

    fn open(&self, place: Place, flags: u32) -> Result<OpenFile, Errno> {
        let Place::Ours(node) = place else {
            return Ok(OpenFile::Placeholder);
        };
        let access = flags & libc::O_ACCMODE.unsigned_abs();
        let read = access != libc::O_WRONLY.unsigned_abs();
        let write = access != libc::O_RDONLY.unsigned_abs();
        self.sysfs.open(&node, read, write)?;
        Ok(OpenFile::Attr(node, Mutex::default()))
    }

    fn read(&self, fh: u64, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        let file = self.files.get(fh).ok_or(Errno::BADF)?;
        let OpenFile::Attr(node, shown) = &*file else {
            return Ok(Vec::new());
        };
        let mut shown = shown.lock().unwrap_or_else(PoisonError::into_inner);
        if offset == 0 || shown.is_empty() {
            *shown = self.sysfs.show(node)?;
        }
        let start = usize::try_from(offset)
            .unwrap_or(usize::MAX)
            .min(shown.len());
        let end = start.saturating_add(size as usize).min(shown.len());
        Ok(shown[start..end].to_vec())
    }

    fn write(&self, fh: u64, data: &[u8], reply: ReplyWrite) {
        let Some(file) = self.files.get(fh) else {
            let _ = reply.error(Errno::BADF);
            return;
        };
        let OpenFile::Attr(node, _) = &*file else {
            let _ = reply.error(Errno::ACCESS);
            return;
        };
        let answer = |reply: ReplyWrite, result: Result<usize, Errno>| {
            let _ = match result {
                Ok(len) => reply.written(u32::try_from(len).unwrap_or(u32::MAX)),
                Err(errno) => reply.error(errno),
            };
        };
        match self.sysfs.store(node, data) {
            Store::Done(result) => answer(reply, result),
            Store::Waiting(waiting) => {
                tracing::info!("{}", waiting.describe());
                // A signal ends the write with EINTR at once; a later answer is dropped.
                reply.interrupt_at_once();
                waiting.on_done(move |result| answer(reply, result));
            }
        }
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
        let Some(place) = self.place(request.node) else {
            let _ = request.op.error(Errno::STALE);
            return;
        };
        let _ = match request.op {
            Operation::Lookup { name, reply } => {
                self.lookup(&place, name, reply);
                return;
            }
            Operation::Getattr { reply, .. } => match self.attr(&place) {
                Ok(attr) => reply.attr(&attr),
                Err(errno) => reply.error(errno),
            },
            // O_TRUNC and touch are nothing; owners and modes are the kernel's.
            Operation::Setattr { attrs, reply } => {
                let asked = attrs.mode.is_some() || attrs.uid.is_some() || attrs.gid.is_some();
                match self.attr(&place) {
                    Ok(_) if asked => reply.error(Errno::PERM),
                    Ok(attr) => reply.attr(&attr),
                    Err(errno) => reply.error(errno),
                }
            }
            Operation::Readlink { reply } => {
                let target = match &place {
                    Place::Ours(node) => self.sysfs.readlink(node).map(String::into_bytes),
                    Place::Real(path) => {
                        rustix::fs::readlink(path, Vec::new()).map(std::ffi::CString::into_bytes)
                    }
                };
                match target {
                    Ok(target) => reply.data(&target),
                    Err(errno) => reply.error(errno),
                }
            }
            Operation::Open { flags, reply } => match self.open(place, flags) {
                Ok(file) => {
                    let fh = self.files.insert(Arc::new(file));
                    let flags = OpenFlags::DIRECT_IO | OpenFlags::NOFLUSH;
                    let answered = reply.opened(&Opened {
                        fh,
                        flags,
                        backing: None,
                    });
                    if !answered.is_delivered() {
                        drop(self.files.remove(fh));
                    }
                    answered
                }
                Err(errno) => reply.error(errno),
            },
            Operation::Read {
                fh,
                offset,
                size,
                reply,
                ..
            } => match self.read(fh, offset, size) {
                Ok(data) => reply.data(&data),
                Err(errno) => reply.error(errno),
            },
            Operation::Write {
                fh, data, reply, ..
            } => {
                self.write(fh, data, reply);
                return;
            }
            Operation::Release { fh, reply, .. } => {
                drop(self.files.remove(fh));
                reply.ok()
            }
            Operation::Opendir { reply, .. } => match self.list(&place) {
                Ok(names) => {
                    let fh = self.files.insert(Arc::new(OpenFile::Dir(names)));
                    let answered = reply.opened(&Opened {
                        fh,
                        ..Opened::default()
                    });
                    if !answered.is_delivered() {
                        drop(self.files.remove(fh));
                    }
                    answered
                }
                Err(errno) => reply.error(errno),
            },
            Operation::Readdir {
                fh,
                offset,
                mut reply,
            } => {
                if let Some(file) = self.files.get(fh)
                    && let OpenFile::Dir(names) = &*file
                {
                    let start = usize::try_from(offset).unwrap_or(usize::MAX);
                    for (at, (id, kind, name)) in names.iter().enumerate().skip(start) {
                        if !reply.add(*id, at as u64 + 1, *kind, OsStr::from_bytes(name)) {
                            break;
                        }
                    }
                }
                reply.done()
            }
            Operation::Releasedir { fh, reply } => {
                drop(self.files.remove(fh));
                reply.ok()
            }
            Operation::Flush { reply, .. } => reply.ok(),
            Operation::Fsync { reply, .. } => reply.ok(),
            Operation::Statfs { reply } => reply.statfs(&fuse_server::Statfs::default()),
            // There is nothing to make or remove here (`fs/kernfs`: no such operations).
            other => refuse(other, Errno::ACCESS),
        };
    }
}

fn lstat(path: &Path) -> Result<Stat, Errno> {
    rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW)
}
