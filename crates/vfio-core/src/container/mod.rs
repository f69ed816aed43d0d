//! Containers: `/dev/vfio/vfio` with a type1 backend (`drivers/vfio/container.c`,
//! `vfio_iommu_type1.c`).

mod file;

pub(crate) use file::Attached;
pub use file::Container;
