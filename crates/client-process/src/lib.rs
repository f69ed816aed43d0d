//! Another process as a request shows it: its memory, its descriptors, who it is.
//!
//! Two lives, two types:
//! - a [`Caller`] is a thread that is blocked in a request to us *right now*. Its ioctl argument is
//!   copied with [`Caller::copy_in`] and [`Caller::copy_out`], a descriptor number it passed becomes
//!   ours with [`Caller::get_fd`], and [`Caller::identity`] says who it is. Drop it with the reply.
//! - a [`Memory`] is a client's address space for as long as a DMA mapping needs it. It stays bound to
//!   the address space it was made from: after exec or exit it fails, and never shows another program.
//!
//! [`holders`] answers a different question: who holds a file now, whoever opened it.
//!
//! Nothing here waits for another file system's server, with one exception that the kernel leaves no
//! way around: copying from or to memory whose pages come from a server (a private mapping of a FUSE
//! file, userfaultfd) waits for that server. Call the copies from a thread that may wait.

mod caller;
mod holders;
mod maps;
mod memory;
mod names;
mod proc;
mod sys;

pub use caller::Caller;
pub use caller::Capability;
pub use caller::Identity;
pub use caller::Thread;
pub use caller::is_eventfd;
pub use caller::is_same_eventfd;
pub use holders::FileId;
pub use holders::Holder;
pub use holders::holders;
pub use maps::Mapping;
pub use memory::Memory;
pub use names::Processes;
pub use rustix::io::Errno;
pub use rustix::process::Pid;

/// Results here carry the errno that the client is to see.
pub type Result<T, E = Errno> = std::result::Result<T, E>;
