//! The VFIO core: life cycle, device model, buses, iommufd objects.
