//! /dev/vfio, /dev/iommu and the sysfs tree as files: request in, core call, reply out.
