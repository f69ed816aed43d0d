//! Group files (`/dev/vfio/N`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

flags! {
    /// `VFIO_GROUP_FLAGS_*`.
    pub struct StatusFlags: u32 {
        /// All devices of the group are bound to VFIO or to nothing.
        const VIABLE = 1 << 0;
        /// The group is in a container or has an iommufd context.
        const CONTAINER_SET = 1 << 1;
    }
}

/// `struct vfio_group_status`, answer to `VFIO_GROUP_GET_STATUS`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct Status {
    /// In: bytes the client offers.
    pub argsz: u32,
    /// Out.
    pub flags: StatusFlags,
}
layout!(Status, size 8, min 8, { argsz 0, flags 4 });
