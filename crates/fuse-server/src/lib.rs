//! The `/dev/fuse` protocol: typed requests, replies that must be used, every interrupt answered.
//!
//! ```no_run
//! # fn main() -> Result<(), rustix::io::Errno> {
//! use fuse_server::{Attr, Connection, Config, MountOptions, Operation, Policy, Request, Workers};
//! use rustix::io::Errno;
//!
//! let (fd, mount) = MountOptions::default().create()?;
//! let connection = Connection::new(fd, &Config::default())?;
//! let handler = |request: Request<'_>| {
//!     let _ = match request.op {
//!         Operation::Getattr { reply, .. } => reply.attr(&Attr::new(1, 0o40755, 0)),
//!         other => other.error(Errno::NOENT),
//!     };
//! };
//! let workers = Workers::start(connection, std::sync::Arc::new(handler), Policy::default())?;
//! let mount = mount.attach("/mnt".as_ref())?;
//! mount.unmount()?;
//! workers.wait(std::time::Duration::from_secs(1));
//! # Ok(())
//! # }
//! ```
//!
//! # Rules for a handler
//! - A request is answered through its reply, at once or later, from any thread. A reply dropped without answer is EIO and a warning.
//! - INTERRUPT is always acted on: a parked request is told ([`ReplyWrite::park`] and the same on all replies), and one that is not answered within
//!   [`Config::interrupt_grace`] is answered EINTR by the crate. A later answer is [`Answered::TooLate`], and what it would have granted must be
//!   taken back. Without this a killed client would stay in state D until the connection ends (`fs/fuse/dev.c`, `request_wait_answer`).
//! - A handler may be slow: [`Workers`] puts a substitute in its place. It gets SIGURG meanwhile, so its system calls can end with EINTR.
//! - A handler must not walk a path, mount, or send an invalidation that needs its own connection (the notices refuse with EDEADLK).
//!
//! # A connection of its own for a node, made at its first open
//! One connection for all nodes is a bottleneck, one for each at rest costs a descriptor and a mount each. Both are avoided: the OPEN of a node on the
//! main connection is parked, another thread mounts a second connection ([`Root::File`]) on top of the node, and the OPEN is answered ESTALE. The
//! kernel then walks the path once more (`fs/namei.c`, `do_filp_open`: the retry with `LOOKUP_REVAL`), crosses into the new mount, and the open
//! lands on the second connection; its caller notices nothing. Tested on Linux 6.18:
//! - It holds for any access mode, for openers in other processes, and through bind mounts in mount namespaces that receive propagation from the main
//!   mount ([`MountOptions::shared`]).
//! - Where propagation is off, and for an open that was under way when the mount came, the retry reaches the main connection again. So an OPEN that
//!   arrives when the second mount already stands must be served on the main connection; a second ESTALE goes to the caller.
//! - The thread that mounts must not be one the main connection needs: `move_mount` walks the path, which sends LOOKUP and GETATTR.
//! - [`Connection::notify_delete`] and [`Connection::notify_inval_entry`] for the node's name detach the mounts on it in every namespace
//!   (`fs/dcache.c`, `d_invalidate`); files open on them stay open, and the second connection ends with the last of them.
//!
//! # What prevents a take-over by another process, and is not used
//! FUSE over io_uring and `FUSE_DEV_IOC_CLONE`: requests read through them die with the process. With one plain descriptor, kept elsewhere,
//! [`Connection::resume`] and [`Connection::notify_resend`] go on where a dead server stopped.

mod affinity;
mod attr;
mod connection;
mod inflight;
mod monitor;
mod mount;
mod parse;
mod passthrough;
mod reply;
mod request;
mod shared;
mod signal;
mod wire;
mod workers;

pub use affinity::restore_affinity;
pub use attr::Attr;
pub use attr::Entry;
pub use connection::Buffer;
pub use connection::Config;
pub use connection::Connection;
pub use connection::Handler;
pub use connection::Negotiated;
pub use connection::Served;
pub use mount::DetachedMount;
pub use mount::Mount;
pub use mount::MountOptions;
pub use mount::Root;
pub use passthrough::BackingId;
pub use reply::Answered;
pub use reply::Opened;
pub use reply::Parked;
pub use reply::ReplyAttr;
pub use reply::ReplyCreate;
pub use reply::ReplyData;
pub use reply::ReplyDirectory;
pub use reply::ReplyDirectoryPlus;
pub use reply::ReplyEmpty;
pub use reply::ReplyEntry;
pub use reply::ReplyIoctl;
pub use reply::ReplyLseek;
pub use reply::ReplyOpen;
pub use reply::ReplyPoll;
pub use reply::ReplyStatfs;
pub use reply::ReplyWrite;
pub use reply::ReplyXattr;
pub use reply::Statfs;
pub use request::Caller;
pub use request::Forgets;
pub use request::Operation;
pub use request::Request;
pub use request::SetAttrs;
pub use request::SetTime;
pub use wire::Features;
pub use wire::ForgetOne;
pub use wire::IoctlFlags;
pub use wire::OpenFlags;
pub use workers::Policy;
pub use workers::Workers;
