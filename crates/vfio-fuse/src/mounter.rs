//! The thread that mounts and unmounts devices' own connections.
//!
//! Mounting walks the path to the node, which asks the `dev` connection, so no thread that serves
//! it may do this (`vfio_fuse`'s redirect). The thread exists while there is something to do.

use crate::node::{Node, OwnHandler, Through, file_id};
use client_process::FileId;
use fuse_server::{
    Config, Connection, Features, Mount, MountOptions, Policy, ReplyOpen, Root, Workers,
};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// How long a mount waits for the open that asked for it.
const FIRST_OPEN: Duration = Duration::from_secs(2);

/// Mounts of devices' own connections, by device serial.
pub(crate) struct Mounter {
    state: Mutex<State>,
    changed: Condvar,
    /// `DIR/vfio/devices`.
    dir: PathBuf,
    idle: Duration,
    /// Threads whose last open was answered ESTALE: one that comes again did not see the mount.
    redirected: Mutex<Vec<u32>>,
}

#[derive(Default)]
struct State {
    running: bool,
    stopping: bool,
    todo: Vec<Todo>,
    /// The mount under way, and who waits for it.
    mounting: Option<(u64, Vec<ReplyOpen>)>,
    own: HashMap<u64, Own>,
    /// Connections whose mount is gone while files of them may be open: what to know them by.
    unmounted: Vec<(u64, FileId, Weak<Through>)>,
}

impl State {
    /// Takes out a device's own mount, for the caller to drop without the lock.
    fn take(&mut self, serial: u64) -> Option<Own> {
        let own = self.own.remove(&serial)?;
        self.unmounted
            .retain(|(_, _, through)| through.strong_count() > 0);
        if let Some(id) = own.id {
            self.unmounted
                .push((serial, id, Arc::downgrade(&own.through)));
        }
        Some(own)
    }
}

enum Todo {
    Mount {
        node: Arc<Node>,
        waiting: Vec<ReplyOpen>,
    },
    Notify(Box<dyn FnOnce() + Send>),
    Gone(u64),
}

/// A device's own connection.
struct Own {
    mount: Mount,
    id: Option<FileId>,
    through: Arc<Through>,
    idle_since: Option<Instant>,
}

impl std::fmt::Debug for Mounter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mounter")
            .field("own", &self.state().own.len())
            .finish_non_exhaustive()
    }
}

impl Mounter {
    pub(crate) fn new(dir: PathBuf, idle: Duration) -> Arc<Mounter> {
        Arc::new(Mounter {
            state: Mutex::default(),
            changed: Condvar::new(),
            dir,
            idle,
            redirected: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An open that came on the `dev` connection. Either it will be answered ESTALE, after which
    /// the kernel walks to the device's own connection, or it comes back to be served here: from
    /// a mount namespace that our mounts do not reach, or because mounting is not possible.
    pub(crate) fn redirect(
        self: &Arc<Self>,
        node: &Arc<Node>,
        tid: u32,
        reply: ReplyOpen,
    ) -> Option<ReplyOpen> {
        {
            let mut redirected = self
                .redirected
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if let Some(at) = redirected.iter().position(|seen| *seen == tid) {
                redirected.swap_remove(at);
                return Some(reply);
            }
            if redirected.len() > 1024 {
                redirected.clear();
            }
            redirected.push(tid);
        }
        let mut state = self.state();
        if state.stopping {
            return Some(reply);
        }
        if let Some(own) = state.own.get_mut(&node.serial) {
            own.idle_since = None;
            drop(state);
            let _ = reply.error(Errno::STALE);
            return None;
        }
        if let Some((serial, waiting)) = &mut state.mounting
            && *serial == node.serial
        {
            waiting.push(reply);
            return None;
        }
        let asked = state.todo.iter_mut().find_map(|todo| match todo {
            Todo::Mount {
                node: asked,
                waiting,
            } if asked.serial == node.serial => Some(waiting),
            _ => None,
        });
        match asked {
            Some(waiting) => waiting.push(reply),
            None => {
                let node = Arc::clone(node);
                state.todo.push(Todo::Mount {
                    node,
                    waiting: vec![reply],
                });
            }
        }
        self.start(state);
        None
    }

    /// Forgets that a thread was redirected: its open has arrived.
    pub(crate) fn arrived(&self, tid: u32) {
        let mut redirected = self
            .redirected
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        redirected.retain(|seen| *seen != tid);
    }

    /// Runs something on this thread: notices must not be sent from one that serves.
    pub(crate) fn notify(self: &Arc<Self>, f: impl FnOnce() + Send + 'static) {
        let mut state = self.state();
        state.todo.push(Todo::Notify(Box::new(f)));
        self.start(state);
    }

    /// Attributes of the device's node were changed on the `dev` connection.
    pub(crate) fn changed(self: &Arc<Self>, serial: u64) {
        let own = self
            .state()
            .own
            .get(&serial)
            .map(|own| Arc::clone(&own.through));
        if let Some(own) = own {
            self.notify(move || own.forget_attributes());
        }
    }

    /// The device's name is gone: its own mount goes too; open files keep their connection.
    pub(crate) fn gone(self: &Arc<Self>, serial: u64) {
        let mut state = self.state();
        state.todo.push(Todo::Gone(serial));
        self.start(state);
    }

    /// Where open files of the device may be found beside the `dev` mount.
    pub(crate) fn file_id(&self, serial: u64) -> Option<FileId> {
        let state = self.state();
        if let Some(own) = state.own.get(&serial) {
            return own.id;
        }
        let mut unmounted = state.unmounted.iter().rev();
        let (_, id, _) =
            unmounted.find(|(one, _, open)| *one == serial && open.strong_count() > 0)?;
        Some(*id)
    }

    /// True if a file system is a device's own mount, or was one while a file of it is still open.
    pub(crate) fn has_mount(&self, dev: u64) -> bool {
        let state = self.state();
        let mut own = state.own.values().filter_map(|own| own.id);
        let mut unmounted = state.unmounted.iter();
        own.any(|id| id.dev == dev)
            || unmounted.any(|(_, id, open)| id.dev == dev && open.strong_count() > 0)
    }

    /// How many devices have a connection of their own.
    pub(crate) fn len(&self) -> usize {
        self.state().own.len()
    }

    /// The last file on a device's own connection was closed.
    pub(crate) fn idle(self: &Arc<Self>, serial: u64) {
        let mut state = self.state();
        if let Some(own) = state.own.get_mut(&serial) {
            own.idle_since = Some(Instant::now());
            self.start(state);
        }
    }

    fn start(self: &Arc<Self>, mut state: MutexGuard<'_, State>) {
        if state.running {
            drop(state);
            self.changed.notify_all();
            return;
        }
        state.running = true;
        drop(state);
        let mounter = Arc::clone(self);
        let spawned = std::thread::Builder::new()
            .name("vfio-mounter".into())
            .spawn(move || {
                // The serving thread that starts this one may have followed a client to its CPU.
                fuse_server::restore_affinity();
                mounter.run();
            });
        if let Err(error) = spawned {
            tracing::error!("no thread for mounting: {error}");
            let todo = {
                let mut state = self.state();
                state.running = false;
                std::mem::take(&mut state.todo)
            };
            for todo in todo {
                if let Todo::Mount { waiting, .. } = todo {
                    for reply in waiting {
                        let _ = reply.error(Errno::AGAIN);
                    }
                }
            }
        }
    }

    fn run(self: &Arc<Self>) {
        let mut state = self.state();
        loop {
            if !state.todo.is_empty() {
                match state.todo.remove(0) {
                    Todo::Mount { node, waiting } => {
                        state.mounting = Some((node.serial, waiting));
                        drop(state);
                        let made = self.mount(&node);
                        state = self.state();
                        let (_, waiting) = state.mounting.take().unwrap_or_default();
                        let mut unwanted = None;
                        match made {
                            Ok(own) if state.stopping => unwanted = Some(own),
                            Ok(own) => unwanted = state.own.insert(node.serial, own),
                            Err(errno) => {
                                crate::files::note(|| node.name.clone(), errno);
                                tracing::debug!(
                                    "{}: no connection of its own, it shares: {errno}",
                                    node.name
                                );
                            }
                        }
                        drop(state);
                        drop(unwanted);
                        // Also without the mount: the second try is served where it arrives.
                        for reply in waiting {
                            let _ = reply.error(Errno::STALE);
                        }
                    }
                    Todo::Notify(f) => {
                        drop(state);
                        f();
                    }
                    Todo::Gone(serial) => {
                        let own = state.take(serial);
                        drop(state);
                        drop(own);
                    }
                }
                state = self.state();
                continue;
            }
            let now = Instant::now();
            let expired = state.own.iter().find_map(|(serial, own)| {
                let since = own.idle_since?;
                let idle = own.through.is_idle();
                (idle && now.saturating_duration_since(since) >= self.idle).then_some(*serial)
            });
            if let Some(serial) = expired {
                let own = state.take(serial);
                drop(state);
                drop(own);
                state = self.state();
                continue;
            }
            let waiting = state.own.values().filter_map(|own| own.idle_since).min();
            match waiting {
                Some(since) => {
                    let time = (since + self.idle).saturating_duration_since(now);
                    let time = time.max(Duration::from_millis(1));
                    (state, _) = self
                        .changed
                        .wait_timeout(state, time)
                        .unwrap_or_else(PoisonError::into_inner);
                    for own in state.own.values_mut() {
                        if !own.through.is_idle() {
                            own.idle_since = None;
                        }
                    }
                }
                None => {
                    state.running = false;
                    return;
                }
            }
        }
    }

    /// The node as it is seen on the `dev` connection, to be mounted on. `STALE`: its name leads to
    /// another by now.
    fn place(&self, path: &Path, node: &Node) -> Result<OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let place = rustix::fs::open(path, flags, Mode::empty())?;
        let wanted = node.shared.file_id(crate::dev::ino(node.serial));
        if wanted.is_none() || file_id(&place) != wanted {
            return Err(Errno::STALE);
        }
        Ok(place)
    }

    fn mount(self: &Arc<Self>, node: &Arc<Node>) -> Result<Own, Errno> {
        let path = self.dir.join(&node.name);
        // Somebody may still have the node of a device that has gone (O_PATH), and open it: what has its
        // name now is not to be covered.
        let place = self.place(&path, node)?;
        let options = MountOptions {
            root: Root::File,
            ..MountOptions::default()
        };
        let (fd, mount) = options.create()?;
        let connection = Connection::new(fd, &connection_config())?;
        let through = Arc::new(Through::own(&connection));
        let handler = OwnHandler {
            node: Arc::clone(node),
            through: Arc::clone(&through),
            ino: crate::dev::ino(node.serial),
            mounter: Arc::downgrade(self),
        };
        let policy = Policy {
            name: node.name.clone(),
            ..Policy::default()
        };
        // They end with the connection: when it is unmounted and the last file closed.
        drop(Workers::start(connection, Arc::new(handler), policy)?);
        let mount = mount.attach_on(place.as_fd(), &path)?;
        drop(place);
        // The root's owner is unknown until the kernel has asked for it once, and it lets nobody
        // write to a file of an unknown owner (`fs/namei.c`, `inode_permission`).
        rustix::fs::stat(&path)?;
        let id = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .ok()
            .and_then(file_id)
            // The kernel has not asked for the root's attributes yet and would say 1.
            .map(|id| FileId {
                ino: crate::dev::ino(node.serial),
                ..id
            });
        if let Some(id) = id {
            let _ = through.id.set(id);
        }
        Ok(Own {
            mount,
            id,
            through,
            // The open that asked for it is on its way.
            idle_since: Some(Instant::now() + FIRST_OPEN),
        })
    }

    /// Unmounts all. Opens from now on are served where they arrive.
    pub(crate) fn stop(&self) {
        let mut state = self.state();
        state.stopping = true;
        let own = std::mem::take(&mut state.own);
        drop(state);
        for (_, own) in own {
            if let Err(errno) = own.mount.unmount() {
                tracing::debug!("unmount: {errno}");
            }
        }
        self.changed.notify_all();
    }
}

/// What is asked of the kernel for device nodes: no page cache ever, so no shared mapping of a
/// direct file, which would go through it (`fs/fuse/file.c`, `fuse_file_mmap`).
pub(crate) fn connection_config() -> Config {
    let default = Config::default();
    let unwanted =
        Features::DIRECT_IO_ALLOW_MMAP | Features::DO_READDIRPLUS | Features::READDIRPLUS_AUTO;
    Config {
        features: default.features - unwanted,
        ..default
    }
}
