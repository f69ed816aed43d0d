//! A client's memory as a device reaches it: mapped files, copies, and the IOVA map.
//!
//! - [`IovaMap`] finds what an I/O address points at.
//! - [`Source`] is what it points at: a file ([`SharedFile`], mapped here once and used in place) or an
//!   address of the client ([`ProcessMemory`], in place where the client shares the memory, else copied).
//! - [`DeviceMemory`] is the other direction: memory of ours that clients map.
//!
//! Memory that another process can write, truncate or unmap is never a `&[u8]` here: only copies and
//! single loads and stores, which end in [`Fault`] where the memory is gone, never in SIGBUS.

pub mod fault;

mod device;
mod file;
mod iova;
mod peer;
mod range;
mod region;
mod source;
mod sys;

pub use device::DeviceMemory;
pub use fault::Fault;
pub use fault::Scalar;
pub use file::FileRegistry;
pub use file::SharedFile;
pub use iova::IovaMap;
pub use range::Range;
pub use rustix::io::Errno;
pub use source::ProcessMemory;
pub use source::Source;

/// Results here carry the errno that the client is to see.
pub type Result<T, E = Errno> = std::result::Result<T, E>;
