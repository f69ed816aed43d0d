//! Nodes that are all served on the `dev` connection: `iommu`, `vfio/vfio`, `vfio/N`.

use crate::Owner;
use crate::caller::{FuseCaller, opener};
use crate::private;
use crate::shared::{Ioctl, Ownership, Shared};
use fuse_server::{Attr, OpenFlags, Opened, Operation, ReplyIoctl, ReplyOpen, Request};
use rustix::io::Errno;
use std::sync::Arc;
use vfio_core::caller::FileObject;
use vfio_core::container::Container;
use vfio_core::group::Group;
use vfio_core::iommufd::Iommufd;
use vfio_uapi::ioctl::FileKind;
use vfio_uapi::private::{ANNOUNCE, FIND_DEVICE, WHAT, What, kind};

/// Major number of misc devices (`MISC_MAJOR`).
const MISC_MAJOR: u32 = 10;
/// `VFIO_MINOR`.
const CONTAINER_MINOR: u32 = 196;

/// Which node it is.
#[derive(Debug)]
pub(crate) enum Which {
    Iommu,
    Container,
    /// Kept while the kernel knows the node, dead or alive.
    Group(Arc<Group>),
}

/// A node whose opens need nothing but a value of their own.
#[derive(Debug)]
pub(crate) struct Plain {
    pub(crate) which: Which,
    shared: Arc<Shared>,
    ino: u64,
    owner: Ownership,
}

impl Plain {
    pub(crate) fn new(shared: &Arc<Shared>, which: Which, ino: u64, owner: Owner) -> Plain {
        Plain {
            which,
            shared: Arc::clone(shared),
            ino,
            owner: Ownership::new(owner),
        }
    }

    pub(crate) fn attr(&self) -> Attr {
        self.owner.attr(self.ino)
    }

    /// For messages.
    fn name(&self) -> String {
        match &self.which {
            Which::Iommu => "iommu".into(),
            Which::Container => "vfio/vfio".into(),
            Which::Group(group) => format!("vfio/{}", group.id()),
        }
    }

    fn file_kind(&self) -> FileKind {
        match self.which {
            Which::Iommu => FileKind::Iommufd,
            Which::Container => FileKind::Container,
            Which::Group(_) => FileKind::Group,
        }
    }

    fn what(&self) -> What {
        let config = &self.shared.config;
        let (kind, major, minor, index) = match &self.which {
            Which::Iommu => (kind::IOMMU, MISC_MAJOR, config.iommu_minor, 0),
            Which::Container => (kind::CONTAINER, MISC_MAJOR, CONTAINER_MINOR, 0),
            Which::Group(group) => (kind::GROUP, config.group_major, group.minor(), group.id()),
        };
        What {
            argsz: 0,
            kind,
            major,
            minor,
            mode: self.owner.get().mode,
            index,
        }
    }

    fn open(&self, tid: u32, flags: u32, reply: ReplyOpen) {
        if flags & rustix::fs::OFlags::DIRECT.bits() != 0 {
            let _ = reply.error(Errno::INVAL);
            return;
        }
        let file = match &self.which {
            Which::Iommu => FileObject::Iommufd(Iommufd::new()),
            Which::Container => FileObject::Container(Container::new()),
            Which::Group(group) => match group.open(opener(tid, None)) {
                Ok(file) => FileObject::Group(file),
                Err(errno) => {
                    let _ = reply.error(errno);
                    return;
                }
            },
        };
        let is_group = matches!(file, FileObject::Group(_));
        let fh = self.shared.files.insert(file);
        if is_group {
            self.shared.open_groups().insert(self.ino, fh);
        }
        let opened = Opened {
            fh,
            flags: OpenFlags::DIRECT_IO | OpenFlags::NOFLUSH,
            backing: None,
        };
        if !reply.opened(&opened).is_delivered() {
            self.release(fh);
        }
    }

    fn release(&self, fh: u64) {
        match self.shared.files.remove(fh) {
            Some(FileObject::Iommufd(context)) => context.close(),
            Some(FileObject::Container(container)) => container.close(),
            Some(FileObject::Group(group)) => {
                // Before it can be opened again.
                self.shared.open_groups().remove(&self.ino);
                group.release();
                drop(group);
                self.shared.announcers.prune();
            }
            _ => {}
        }
    }

    fn ioctl(&self, ioctl: Ioctl, reply: ReplyIoctl) {
        let Some(file) = self.shared.files.get(ioctl.fh) else {
            let _ = reply.error(Errno::BADF);
            return;
        };
        let Ioctl { cmd, arg, .. } = ioctl;
        let answer = move |caller: &FuseCaller<'_>| match (&file, cmd) {
            (_, WHAT) => private::what(caller, arg, self.what()),
            (FileObject::Group(group), ANNOUNCE) => self.shared.announcers.add(group, caller, arg),
            (FileObject::Group(group), FIND_DEVICE) => private::find_device(group, caller, arg),
            (FileObject::Iommufd(context), _) => context.ioctl(cmd, arg, caller),
            (FileObject::Container(container), _) => container.ioctl(cmd, arg, caller),
            (FileObject::Group(group), _) => group.ioctl(cmd, arg, caller),
            _ => Err(Errno::BADF),
        };
        let kind = self.file_kind();
        self.shared
            .ioctl(ioctl, reply, kind, || self.name(), answer);
    }

    pub(crate) fn handle(&self, request: Request<'_>) {
        let tid = request.caller.tid;
        let _ = match request.op {
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
                self.open(tid, flags, reply);
                return;
            }
            Operation::Release { fh, reply, .. } => {
                self.release(fh);
                reply.ok()
            }
            Operation::Getattr { reply, .. } => reply.attr(&self.attr()),
            Operation::Setattr { attrs, reply } => match self.owner.change(&attrs) {
                Ok(()) => reply.attr(&self.attr()),
                Err(errno) => reply.error(errno),
            },
            Operation::Read { reply, .. } => reply.error(Errno::INVAL),
            Operation::Write { reply, .. } => reply.error(Errno::INVAL),
            Operation::Flush { reply, .. } => reply.ok(),
            Operation::Fsync { reply, .. } => reply.error(Errno::INVAL),
            // POLL among them: without it the kernel says "always ready", as for a VFIO file.
            other => other.error(Errno::NOSYS),
        };
    }
}
