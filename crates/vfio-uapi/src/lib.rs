//! The VFIO and iommufd user ABI: structures, numbers, capability chains; from bytes and to bytes.
