//! Backing files for passthrough opens, as values that own their id.
#![expect(unsafe_code, reason = "two ioctls of /dev/fuse that no crate wraps")]

use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::Weak;

use rustix::io::Errno;
use rustix::ioctl::Opcode;
use rustix::ioctl::Setter;

use crate::shared::Shared;
use crate::wire;

/// A registered backing file. Dropping it takes the id back; opens that use it keep working. It does not keep its connection alive.
#[derive(Debug)]
pub struct BackingId {
    shared: Weak<Shared>,
    id: i32,
}

/// `FUSE_DEV_IOC_BACKING_OPEN`, which returns the new id as the result of the call.
struct Open(wire::BackingMap);

// SAFETY: the kernel only reads `struct fuse_backing_map` through the pointer, which is valid for the call, and the opcode encodes its size.
unsafe impl rustix::ioctl::Ioctl for Open {
    type Output = i32;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        wire::DEV_IOC_BACKING_OPEN
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        (&raw mut self.0).cast()
    }

    unsafe fn output_from_ptr(
        result: rustix::ioctl::IoctlOutput,
        _: *mut std::ffi::c_void,
    ) -> rustix::io::Result<i32> {
        Ok(result)
    }
}

impl BackingId {
    pub(crate) fn open(shared: &Arc<Shared>, file: BorrowedFd<'_>) -> Result<Self, Errno> {
        let map = wire::BackingMap {
            fd: file.as_raw_fd(),
            flags: 0,
            padding: 0,
        };
        // SAFETY: the descriptor is a `/dev/fuse`, on which the opcode has this meaning; on any other file it is refused or reads 16 bytes.
        let id = unsafe { rustix::ioctl::ioctl(shared.fd(), Open(map)) }?;
        Ok(Self {
            shared: Arc::downgrade(shared),
            id,
        })
    }

    /// Wraps an id that a former process registered on a connection that was taken over.
    pub fn adopt(connection: &crate::Connection, id: i32) -> Self {
        Self {
            shared: connection.weak(),
            id,
        }
    }

    /// The kernel's number.
    pub fn raw(&self) -> i32 {
        self.id
    }

    /// Gives up ownership: the id stays registered for whoever takes over the connection.
    pub fn into_raw(mut self) -> i32 {
        self.shared = Weak::new();
        self.id
    }
}

impl Drop for BackingId {
    fn drop(&mut self) {
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        // SAFETY: `FUSE_DEV_IOC_BACKING_CLOSE` reads a 32-bit id through the pointer, as the opcode encodes.
        let close =
            unsafe { Setter::<{ wire::DEV_IOC_BACKING_CLOSE }, u32>::new(self.id.unsigned_abs()) };
        // SAFETY: the descriptor is the `/dev/fuse` on which the id was registered.
        if let Err(errno) = unsafe { rustix::ioctl::ioctl(shared.fd(), close) } {
            tracing::debug!(id = self.id, %errno, "a backing id could not be taken back");
        }
    }
}
