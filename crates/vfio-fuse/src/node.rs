//! A device's node: what its requests mean, on whichever connection they come.

use crate::Owner;
use crate::caller::{FuseCaller, opener};
use crate::files::note;
use crate::mounter::Mounter;
use crate::private;
use crate::shared::{Ioctl, Ownership, Shared};
use client_process::FileId;
use fuse_server::{
    Answered, Attr, BackingId, Connection, Handler, OpenFlags, Opened, Operation, ReplyAttr,
    ReplyIoctl, ReplyOpen, Request, SetAttrs,
};
use rustix::io::Errno;
use std::cell::RefCell;
use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};
use vfio_core::caller::FileObject;
use vfio_core::device::{Device, DeviceFile, WeakDevice};
use vfio_uapi::ioctl::FileKind;
use vfio_uapi::private::{FEATURE, OPEN_DATA, OPEN_DEVICE, WHAT, What, kind};

/// A node that the kernel knows of.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) shared: Arc<Shared>,
    pub(crate) serial: u64,
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) device: WeakDevice,
    owner: Ownership,
}

/// The node of a device's own connection.
const ROOT: u64 = 1;
/// How long the kernel may believe attributes where it is told of changes.
const ATTRIBUTES: Duration = Duration::from_secs(1);
/// An offset: no pages are meant (`fs/fuse/inode.c`, `fuse_reverse_inval_inode`).
const ATTRIBUTES_ONLY: i64 = -1;

/// A connection as a node needs it: backing ids belong to one.
#[derive(Debug)]
pub(crate) struct Through {
    connection: Connection,
    /// The node as it is seen on this connection, once that is mounted.
    pub(crate) id: OnceLock<FileId>,
    pub(crate) backing: OnceLock<Option<BackingId>>,
    /// How long the kernel may believe the node's attributes. On the `dev` connection, where chmod and
    /// chown may be seen on the device's own, for no time.
    lifetime: Duration,
    /// Open files on this connection.
    open: Mutex<HashSet<u64>>,
}

impl Through {
    pub(crate) fn new(connection: &Connection) -> Through {
        Through {
            connection: connection.clone(),
            id: OnceLock::new(),
            backing: OnceLock::new(),
            lifetime: Duration::ZERO,
            open: Mutex::default(),
        }
    }

    /// A connection of the device's own, which is told when the attributes change elsewhere.
    pub(crate) fn own(connection: &Connection) -> Through {
        Through {
            lifetime: ATTRIBUTES,
            ..Through::new(connection)
        }
    }

    /// The kernel forgets the attributes of the node on this, its own connection. Not for a thread that
    /// serves.
    pub(crate) fn forget_attributes(&self) {
        // ENOENT: it has none.
        let _ = self.connection.notify_inval_inode(ROOT, ATTRIBUTES_ONLY, 0);
    }

    fn open(&self) -> MutexGuard<'_, HashSet<u64>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True when no file is open on this connection.
    pub(crate) fn is_idle(&self) -> bool {
        self.open().is_empty()
    }
}

impl Node {
    pub(crate) fn new(shared: &Arc<Shared>, device: &Device, owner: Owner) -> Node {
        Node {
            shared: Arc::clone(shared),
            serial: device.serial(),
            index: device.index(),
            name: device.name(),
            device: device.downgrade(),
            owner: Ownership::new(owner),
        }
    }

    pub(crate) fn attr(&self, ino: u64) -> Attr {
        self.owner.attr(ino)
    }

    fn setattr(&self, through: &Through, attrs: &SetAttrs, ino: u64, reply: ReplyAttr) -> Answered {
        if let Err(errno) = self.owner.change(attrs) {
            return reply.error(errno);
        }
        if through.lifetime.is_zero() {
            self.shared.mounter.changed(self.serial);
        }
        reply.attr(&self.attr_through(through, ino))
    }

    fn attr_through(&self, through: &Through, ino: u64) -> Attr {
        Attr {
            ttl: through.lifetime,
            ..self.attr(ino)
        }
    }

    pub(crate) fn open(&self, through: &Through, tid: u32, flags: u32, reply: ReplyOpen) {
        if flags & rustix::fs::OFlags::DIRECT.bits() != 0 {
            let _ = reply.error(Errno::INVAL);
            return;
        }
        let file = match self.new_file(through, tid, &reply) {
            Ok(file) => file,
            Err(errno) => {
                note(|| self.name.clone(), errno);
                let _ = reply.error(errno);
                return;
            }
        };
        let fh = self.shared.files.insert(FileObject::Device(file));
        through.open().insert(fh);
        let opened = Opened {
            fh,
            flags: OpenFlags::DIRECT_IO | OpenFlags::NOFLUSH | OpenFlags::PARALLEL_DIRECT_WRITES,
            backing: through.backing.get().and_then(Option::as_ref),
        };
        if !reply.opened(&opened).is_delivered() {
            self.release(through, fh);
        }
    }

    fn new_file(
        &self,
        through: &Through,
        tid: u32,
        reply: &ReplyOpen,
    ) -> Result<Arc<DeviceFile>, Errno> {
        let device = self.device.upgrade().ok_or(Errno::NODEV)?;
        let node = through.id.get().copied();
        let Some(announced) = self.shared.announcers.of(tid) else {
            let file = device.open_cdev(opener(tid, node))?;
            self.back(through, &device);
            return Ok(file);
        };
        let opener = announced.opener(node);
        let file = device.open_cdev(opener.clone())?;
        self.back(through, &device);
        // A driver's `open` runs.
        reply.set_deadline(Instant::now() + self.shared.ioctl_deadline, Errno::TIMEDOUT);
        if let Err(errno) = announced.honour(&file, opener) {
            file.release();
            return Err(errno);
        }
        Ok(file)
    }

    /// Makes the backing of this connection's opens, at the first: all of them give the same.
    fn back(&self, through: &Through, device: &Device) {
        through.backing.get_or_init(|| {
            let connection = &through.connection;
            if !self.shared.passthrough || !connection.has_passthrough() {
                return None;
            }
            let memory = device.memory().ok()??;
            if let Some(id) = through.id.get() {
                // What DMA to a mapping of the node finds.
                memory.known_as(*id);
            }
            match connection.backing_open(memory.backing_fd()) {
                Ok(id) => Some(id),
                Err(errno) => {
                    tracing::warn!("{}: no native mapping, regions trap: {errno}", self.name);
                    None
                }
            }
        });
    }

    pub(crate) fn release(&self, through: &Through, fh: u64) {
        if through.open().remove(&fh)
            && let Some(FileObject::Device(file)) = self.shared.files.remove(fh)
        {
            file.release();
        }
    }

    /// What the node is.
    fn what(&self) -> What {
        What {
            argsz: 0,
            kind: kind::DEVICE,
            major: self.shared.config.cdev_major,
            minor: self.index,
            mode: self.owner.get().mode,
            index: self.index,
        }
    }

    fn ioctl(&self, ioctl: Ioctl, reply: ReplyIoctl) {
        let Some(file) = self.shared.files.device(ioctl.fh) else {
            let _ = reply.error(Errno::BADF);
            return;
        };
        let Ioctl { cmd, arg, .. } = ioctl;
        let name = || self.name.clone();
        let answer = move |caller: &FuseCaller<'_>| match cmd {
            WHAT => private::what(caller, arg, self.what()),
            OPEN_DEVICE => private::open_device(&file, caller, arg),
            FEATURE => file.feature_with_files(arg, caller),
            OPEN_DATA => private::open_data(&file, caller, arg),
            _ => file.ioctl(cmd, arg, caller),
        };
        self.shared
            .ioctl(ioctl, reply, FileKind::Device, name, answer);
    }

    pub(crate) fn handle(&self, through: &Through, ino: u64, request: Request<'_>) {
        let tid = request.caller.tid;
        let _ = match request.op {
            Operation::Read {
                fh,
                offset,
                size,
                reply,
                ..
            } => {
                let Some(file) = self.shared.files.device(fh) else {
                    let _ = reply.error(Errno::BADF);
                    return;
                };
                with_buffer(size as usize, |buf| {
                    let result = file.read(offset, buf);
                    drop(file);
                    match result {
                        Ok(len) => reply.data(buf.get(..len).unwrap_or(buf)),
                        Err(errno) => reply.error(errno),
                    }
                })
            }
            Operation::Write {
                fh,
                offset,
                data,
                reply,
                ..
            } => {
                let Some(file) = self.shared.files.device(fh) else {
                    let _ = reply.error(Errno::BADF);
                    return;
                };
                let result = file.write(offset, data);
                drop(file);
                match result {
                    Ok(len) => reply.written(len.min(data.len()) as u32),
                    Err(errno) => reply.error(errno),
                }
            }
            Operation::Ioctl {
                fh,
                cmd,
                arg,
                reply,
                ..
            } => {
                self.ioctl(Ioctl { fh, cmd, arg, tid }, reply);
                return;
            }
            Operation::Open { flags, reply } => {
                self.open(through, tid, flags, reply);
                return;
            }
            Operation::Release { fh, reply, .. } => {
                self.release(through, fh);
                reply.ok()
            }
            Operation::Getattr { reply, .. } => reply.attr(&self.attr_through(through, ino)),
            Operation::Setattr { attrs, reply } => self.setattr(through, &attrs, ino, reply),
            Operation::Flush { reply, .. } => reply.ok(),
            Operation::Fsync { reply, .. } => reply.error(Errno::INVAL),
            Operation::Statfs { reply } => reply.statfs(&fuse_server::Statfs::default()),
            Operation::Forget(_) => return,
            // POLL among them: without it the kernel says "always ready", as for a VFIO file.
            other => other.error(Errno::NOSYS),
        };
    }
}

/// A buffer for one read: on the stack for register accesses, else this thread's own, used again.
fn with_buffer<R>(size: usize, f: impl FnOnce(&mut [u8]) -> R) -> R {
    const SMALL: usize = 64;
    thread_local! {
        static LARGE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    if size <= SMALL {
        let mut buf = [0; SMALL];
        return f(&mut buf[..size]);
    }
    LARGE.with_borrow_mut(|buf| {
        buf.clear();
        buf.resize(size, 0);
        f(buf)
    })
}

/// The handler of a connection of a device's own: its root is the node.
pub(crate) struct OwnHandler {
    pub(crate) node: Arc<Node>,
    pub(crate) through: Arc<Through>,
    pub(crate) ino: u64,
    pub(crate) mounter: Weak<Mounter>,
}

impl Handler for OwnHandler {
    fn handle(&self, request: Request<'_>) {
        let release = matches!(request.op, Operation::Release { .. });
        if matches!(request.op, Operation::Open { .. })
            && let Some(mounter) = self.mounter.upgrade()
        {
            mounter.arrived(request.caller.tid);
        }
        self.node.handle(&self.through, self.ino, request);
        if release
            && self.through.is_idle()
            && let Some(mounter) = self.mounter.upgrade()
        {
            mounter.idle(self.node.serial);
        }
    }
}

impl Drop for OwnHandler {
    /// The connection has ended. When the last file of a mount that is already detached is
    /// closed, the kernel ends the connection at once, and a RELEASE that nobody has read is lost
    /// (`fs/fuse/inode.c`, `fuse_sb_destroy`): what is still open here is closed now.
    fn drop(&mut self) {
        let open: Vec<u64> = self.through.open().iter().copied().collect();
        for fh in open {
            self.node.release(&self.through, fh);
        }
    }
}

/// A place where a device's open files can be found by scanning.
pub(crate) fn file_id(fd: impl rustix::fd::AsFd) -> Option<FileId> {
    FileId::of(fd).ok()
}
