//! vfiod's own commands on its own nodes, for `vfioctl run`: what the kernel's ABI has no command for, because the kernel does it itself.
//!
//! They are encoded `_IO('V', nr)`, a type byte that no VFIO or iommufd command has. The answers serve the supervisor that stands between a
//! client and its system calls; a client that sends them itself gets nothing that its descriptors do not already give it.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `_IO('V', nr)`.
const fn io(nr: u32) -> u32 {
    (b'V' as u32) << 8 | nr
}

/// On any node of vfiod's: what it is. The argument is the address of a [`What`].
///
/// `EFAULT` for memory that cannot be used, `EINVAL` for an `argsz` below 24. It is answered on a device file that was never bound, on a
/// group that has died and on a file whose device is gone, too.
pub const WHAT: u32 = io(0xf0);

/// On a device file that was opened at its node and does nothing yet: makes it a file of the group that the caller's `group_fd` is.
/// The argument is the address of an [`OpenDevice`]. Returns 0; then the file is as one that `VFIO_GROUP_GET_DEVICE_FD` returns.
///
/// `EFAULT`, `EINVAL` (`argsz` below 24, a name longer than 4096 bytes with its NUL, a file that is bound, a group without container),
/// `EBADF` and `EBADFD` (`group_fd` is closed; is no group file of this daemon), `ENODEV` (the group has no such device, or it is going),
/// `ESTALE` (the name means another device than this file's; find it again), and what opening the device says.
pub const OPEN_DEVICE: u32 = io(0xf1);

/// On a group file: which device of the group a name means. The argument is the address of a NUL-terminated name in the caller's memory.
/// Returns N of the `vfioN` whose node is to be opened.
///
/// `EFAULT`; `EINVAL` without a NUL within 4096 bytes; `ENODEV` when the group has no such device, or none any more.
pub const FIND_DEVICE: u32 = io(0xf2);

/// On a device file: `VFIO_DEVICE_FEATURE` on behalf of a client to whom the caller can give descriptors. The argument is the same, in the
/// caller's memory. Features of migration, which the device file itself does not have, are there. Where the kernel would return a data
/// file, `data_fd` is -1 and this returns the number of its session, for [`OPEN_DATA`]; else 0.
pub const FEATURE: u32 = io(0xf3);

/// On a device file that was opened at its node and does nothing yet: makes it the data file of a migration session. The argument is the
/// address of an [`OpenData`]. Returns 0.
///
/// `EFAULT`, `EINVAL` (`argsz` below 16, a file that is bound), `EBADF` and `EBADFD` (`device_fd` is closed; is no device file of this
/// daemon), `ESTALE` (it is another device's), `ENODEV` (the session has ended).
pub const OPEN_DATA: u32 = io(0xf4);

/// On a group file: where the calling thread will say, before it opens the node of a device, that the new file is to be one of this group.
/// The argument is the address of an [`Announce`]. Returns a number that stands for the group file there.
///
/// It saves [`OPEN_DEVICE`] a request of its own: an open by this thread looks into the memory, and where an [`Announcement`] is
/// [`ANNOUNCED`](announcement::ANNOUNCED), does what OPEN_DEVICE would do with the new file and then makes it
/// [`HONOURED`](announcement::HONOURED). What cannot be done fails the open, with OPEN_DEVICE's errno, `ENODEV` in place of `ESTALE`, `EBADF`
/// for a group file that is closed. A server that has forgotten the thread leaves it ANNOUNCED and opens a file that does nothing yet: then
/// OPEN_DEVICE is to be used.
///
/// To have held the group file once is the right to announce for it as long as somebody has it open: who held it could have kept it.
///
/// `EFAULT`, `EINVAL` (`argsz` below 8, memory that is no memfd or cannot be written), `EBADF` (`memory_fd` is closed), `EOPNOTSUPP` where the
/// kernel cannot hold a thread (before Linux 6.9).
pub const ANNOUNCE: u32 = io(0xf5);

/// Longest name of a device, its NUL included (`drivers/vfio/group.c`, `vfio_group_ioctl_get_device_fd`: `strndup_user(arg, PAGE_SIZE)`).
pub const NAME_MAX: usize = 4096;

/// `st_ino` of a node has these bits above the lowest 48, directories have not: so a file is known not to be a node without a look at mounts.
/// One that has them need not be.
pub const INODES: u64 = 0x7666 << 48;

/// Whether a file with this `st_ino` may be a node.
pub const fn may_be_node(ino: u64) -> bool {
    ino >> 48 == INODES >> 48
}

/// What a node is: the answer to [`WHAT`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct What {
    /// In: bytes the caller offers, at least 24.
    pub argsz: u32,
    /// A [`kind`].
    pub kind: u32,
    /// Char device number that sysfs `dev` promises, major part.
    pub major: u32,
    /// Minor part.
    pub minor: u32,
    /// Permission bits, as `stat` says them.
    pub mode: u32,
    /// N of `vfioN` for a device, the number of the IOMMU group for a group, else 0.
    pub index: u32,
}
layout!(What, size 24, min 24, { argsz 0, kind 4, major 8, minor 12, mode 16, index 20 });

/// Values of [`What::kind`].
pub mod kind {
    /// `/dev/vfio/vfio`.
    pub const CONTAINER: u32 = 1;
    /// `/dev/vfio/N`.
    pub const GROUP: u32 = 2;
    /// `/dev/vfio/devices/vfioN`.
    pub const DEVICE: u32 = 3;
    /// `/dev/iommu`.
    pub const IOMMU: u32 = 4;
}

/// The argument of [`OPEN_DEVICE`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct OpenDevice {
    /// Bytes of this structure, at least 24.
    pub argsz: u32,
    /// The group file, in the caller's table. To hold it is the right to open its devices.
    pub group_fd: i32,
    /// The process that will use the file, as the caller sees it; 0: the caller. For messages, it gives no right.
    pub client_pid: u32,
    /// Bytes of the name, without a NUL.
    pub name_len: u32,
    /// Address of the name, as the client gave it.
    pub name_ptr: u64,
}
layout!(OpenDevice, size 24, min 24, { argsz 0, group_fd 4, client_pid 8, name_len 12, name_ptr 16 });

/// The argument of [`ANNOUNCE`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct Announce {
    /// Bytes of this structure, at least 8.
    pub argsz: u32,
    /// Memory (memfd) in the caller's table that begins with an [`Announcement`]; the same for all groups.
    pub memory_fd: i32,
}
layout!(Announce, size 8, min 8, { argsz 0, memory_fd 4 });

/// What the next open by a thread is to be, in memory that it shares with the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Announcement {
    /// An [`announcement`] state.
    pub state: u32,
    /// What [`ANNOUNCE`] returned.
    pub group: u32,
    /// As in [`OpenDevice`].
    pub client_pid: u32,
    /// Bytes of the name, without a NUL; at most 64. Longer names are for [`OPEN_DEVICE`].
    pub name_len: u32,
    /// The name, as the client gave it.
    pub name: [u8; 64],
}
layout!(Announcement, size 80, { state 0, group 4, client_pid 8, name_len 12, name 16 });

/// States of an [`Announcement`].
pub mod announcement {
    /// Nothing is announced: opens are plain.
    pub const NONE: u32 = 0;
    /// The next open by this thread is meant.
    pub const ANNOUNCED: u32 = 1;
    /// Written by the server: the file that was opened is the announced one.
    pub const HONOURED: u32 = 2;
}

/// The argument of [`OPEN_DATA`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct OpenData {
    /// Bytes of this structure, at least 16.
    pub argsz: u32,
    /// The client's device file, in the caller's table.
    pub device_fd: i32,
    /// What [`FEATURE`] returned.
    pub session: u32,
    /// Not looked at.
    pub reserved: u32,
}
layout!(OpenData, size 16, min 16, { argsz 0, device_fd 4, session 8, reserved 12 });

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_word_is_one_of_the_kernels() {
        for word in [WHAT, OPEN_DEVICE, FIND_DEVICE, FEATURE, OPEN_DATA, ANNOUNCE] {
            assert_eq!(word >> 8, u32::from(b'V'));
            assert_ne!((word >> 8) as u8, crate::ioctl::TYPE);
        }
        assert_eq!([WHAT, OPEN_DEVICE, FIND_DEVICE], [0x56f0, 0x56f1, 0x56f2]);
    }
}
