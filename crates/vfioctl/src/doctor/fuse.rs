//! A small FUSE file system, served and read here and attached nowhere.

use super::{FUSE, Finding, PASSTHROUGH};
use fuse_server::{
    Attr, BackingId, Config, Connection, DetachedMount, Entry, MountOptions, OpenFlags, Opened,
    Operation, Request,
};
use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create, openat};
use rustix::io::Errno;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

/// What the file gives that the server answers for, and the one that the kernel reads elsewhere.
const SERVED: &[u8] = b"served";
const ELSEWHERE: &[u8] = b"passed";

const PERMISSIONS: &str = "chmod 666 /dev/fuse, or a udev rule that gives it to your group";

/// Both findings. This process must be where it may mount.
pub(super) fn fuse() -> [Finding; 2] {
    let not = |finding| {
        [
            finding,
            Finding::limited(PASSTHROUGH, "cannot be tried without fuse", "see above"),
        ]
    };
    if let Err(errno) = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
    {
        return not(match errno {
            Errno::NOENT => Finding::missing(
                FUSE,
                "there is no /dev/fuse",
                "modprobe fuse, or give the container the device (--device /dev/fuse)",
            ),
            Errno::NXIO | Errno::NODEV => Finding::missing(
                FUSE,
                "/dev/fuse has no driver",
                "modprobe fuse, or a kernel with CONFIG_FUSE_FS",
            ),
            Errno::ACCESS => Finding::missing(FUSE, "/dev/fuse is not for this user", PERMISSIONS),
            Errno::PERM => Finding::missing(
                FUSE,
                "/dev/fuse may not be opened in this container",
                "give it the device (--device /dev/fuse)",
            ),
            other => Finding::missing(FUSE, format!("/dev/fuse: {other}"), "see open(2)"),
        });
    }
    let options = MountOptions {
        fsname: "vfioctl-doctor".to_owned(),
        ..MountOptions::default()
    };
    let (fd, mount) = match options.create() {
        Ok(made) => made,
        Err(errno) => {
            return not(Finding::missing(
                FUSE,
                format!("a file system cannot be mounted: {errno}"),
                "it needs CAP_SYS_ADMIN (in a container --cap-add SYS_ADMIN, and AppArmor that lets it \
                 mount) or user namespaces",
            ));
        }
    };
    match serve(fd, &mount) {
        Ok(passthrough) => [
            Finding::ok(FUSE, "a file system of ours is mounted and read"),
            passthrough,
        ],
        Err(errno) => not(Finding::missing(
            FUSE,
            format!("a file system of ours cannot be read: {errno}"),
            "see the kernel's log",
        )),
    }
}

/// Serves it and reads its files.
fn serve(fd: rustix::fd::OwnedFd, mount: &DetachedMount) -> Result<Finding, Errno> {
    let connection = Connection::new(fd, &Config::default())?;
    let file = memfd_create("vfioctl-doctor", MemfdFlags::CLOEXEC)?;
    rustix::io::write(&file, ELSEWHERE)?;
    let backing = if connection.has_passthrough() {
        connection.backing_open(file.as_fd()).map(Arc::new)
    } else {
        Err(Errno::NOSYS)
    };
    let handler = {
        let backing = backing.as_ref().ok().cloned();
        move |request: Request<'_>| handle(request, backing.as_deref())
    };
    // It ends with the mount.
    std::thread::spawn(move || {
        let _ = connection.serve_loop(&handler);
    });
    if read(mount, "served")? != SERVED {
        return Err(Errno::IO);
    }
    Ok(match backing {
        Ok(_) => match read(mount, "elsewhere") {
            Ok(bytes) if bytes == ELSEWHERE => {
                Finding::ok(PASSTHROUGH, "regions can be mapped natively")
            }
            Ok(_) => Finding::limited(
                PASSTHROUGH,
                "the kernel asked the server all the same",
                "regions trap: every access costs a round trip",
            ),
            Err(errno) => Finding::limited(
                PASSTHROUGH,
                errno.to_string(),
                "regions trap: every access costs a round trip",
            ),
        },
        Err(Errno::PERM) => Finding::limited(
            PASSTHROUGH,
            "not for this user: regions trap, none can be mapped",
            "run vfiod as root for native mmap",
        ),
        Err(Errno::NOSYS) => Finding::limited(
            PASSTHROUGH,
            "this kernel has none: regions trap, none can be mapped",
            "Linux 6.9 and newer with CONFIG_FUSE_PASSTHROUGH have it",
        ),
        Err(errno) => Finding::limited(
            PASSTHROUGH,
            format!("{errno}: regions trap, none can be mapped"),
            "see the kernel's log",
        ),
    })
}

fn read(mount: &DetachedMount, name: &str) -> Result<Vec<u8>, Errno> {
    let file = openat(
        mount.as_fd(),
        name,
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let mut bytes = vec![0; 64];
    let length = rustix::io::read(&file, &mut bytes[..])?;
    bytes.truncate(length);
    Ok(bytes)
}

/// Node 2 is `served`, node 3 `elsewhere`.
fn handle(request: Request<'_>, backing: Option<&BackingId>) {
    let attr = |node: u64| {
        let mode = if node == 1 { 0o40755 } else { 0o100644 };
        let mut attr = Attr::new(node, mode, SERVED.len() as u64);
        attr.uid = rustix::process::geteuid().as_raw();
        attr.gid = rustix::process::getegid().as_raw();
        attr
    };
    let node = request.node;
    let _ = match request.op {
        Operation::Lookup { name, reply } => {
            let node = match name.to_str() {
                Some("served") => 2,
                Some("elsewhere") => 3,
                _ => {
                    let _ = reply.error(Errno::NOENT);
                    return;
                }
            };
            reply.entry(&Entry {
                node,
                generation: 0,
                ttl: Duration::from_secs(60),
                attr: attr(node),
            })
        }
        Operation::Getattr { reply, .. } => reply.attr(&attr(node)),
        Operation::Open { reply, .. } if node == 3 => reply.opened(&Opened {
            fh: 0,
            flags: OpenFlags::empty(),
            backing,
        }),
        Operation::Open { reply, .. } => reply.opened(&Opened {
            fh: 0,
            flags: OpenFlags::DIRECT_IO,
            backing: None,
        }),
        Operation::Read { reply, .. } => reply.data(SERVED),
        Operation::Release { reply, .. } => reply.ok(),
        Operation::Flush { reply, .. } => reply.ok(),
        Operation::Forget(_) => return,
        other => other.error(Errno::NOSYS),
    };
}
