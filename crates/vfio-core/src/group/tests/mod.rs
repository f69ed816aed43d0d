//! Groups: every row of the tables that the kernel's order makes, then random sequences.

mod random;
mod rows;

use super::{Group, GroupFile};
use crate::caller::FileObject;
use crate::container::Container;
use crate::device::{Device, DeviceFile, Registration};
use crate::iommufd::Iommufd;
use crate::iommufd::testing::{Seen, Us, address, device, opener};
use crate::model::IommuGroup;
use crate::{Config, Core, Errno, Result};
use std::sync::Arc;
use std::time::Duration;
use vfio_uapi::device::{BindFlags, BindIommufd};
use vfio_uapi::group::{Status, StatusFlags};
use vfio_uapi::ioctl::{
    VFIO_DEVICE_BIND_IOMMUFD, VFIO_GROUP_GET_STATUS, VFIO_GROUP_SET_CONTAINER,
    VFIO_GROUP_UNSET_CONTAINER, VFIO_SET_IOMMU,
};
use zerocopy::{FromBytes, IntoBytes};

/// A core, a client, and what the client opens.
struct World {
    core: Core,
    us: Us,
}

impl World {
    fn new() -> World {
        World::with(Config::default())
    }

    /// Who finds something busy does not wait for a close: every close here is over when it returns.
    fn impatient() -> World {
        World::with(Config {
            close_grace: Duration::ZERO,
            ..Config::default()
        })
    }

    fn with(config: Config) -> World {
        let core = Core::new(Config {
            request_interval: Duration::from_millis(5),
            ..config
        });
        World {
            core,
            us: Us::default(),
        }
    }

    /// A software device in a group of its own.
    fn emulated(&self, name: &str) -> (Registration, Arc<Seen>, Arc<Group>) {
        let (registration, seen) = device(&self.core, name, None);
        let group = registration.device().vfio_group().unwrap();
        (registration, seen, group)
    }

    fn hardware(&self) -> Arc<IommuGroup> {
        self.core.iommu_groups().create(None).unwrap()
    }

    fn container(&self) -> (i32, Arc<Container>) {
        let container = Container::new();
        let fd = self
            .us
            .number(FileObject::Container(Arc::clone(&container)));
        (fd, container)
    }

    fn set_iommu(&self, container: &Arc<Container>) -> Result<u32> {
        container.ioctl(VFIO_SET_IOMMU, 3, &self.us)
    }

    fn set_container(&self, group: &GroupFile, fd: i32) -> Result<u32> {
        let mut fd = fd.to_ne_bytes();
        let arg = address(fd.as_mut_slice());
        group.ioctl(VFIO_GROUP_SET_CONTAINER, arg, &self.us)
    }

    fn unset_container(&self, group: &GroupFile) -> Result<u32> {
        group.ioctl(VFIO_GROUP_UNSET_CONTAINER, 0, &self.us)
    }

    fn status(&self, group: &GroupFile) -> Result<StatusFlags> {
        let mut status = Status {
            argsz: 8,
            flags: StatusFlags::empty(),
        };
        let bytes = status.as_mut_bytes();
        group.ioctl(VFIO_GROUP_GET_STATUS, address(bytes), &self.us)?;
        let after = Status::read_from_bytes(std::hint::black_box(bytes)).unwrap();
        Ok(after.flags)
    }

    /// A new file of a device, bound to a context by its own node.
    fn bind(&self, device: &Device, iommufd: i32) -> Result<Arc<DeviceFile>> {
        let file = device.open_cdev(opener())?;
        self.bind_file(&file, iommufd)?;
        Ok(file)
    }

    fn bind_file(&self, file: &DeviceFile, iommufd: i32) -> Result<u32> {
        let mut bind = BindIommufd {
            argsz: 16,
            flags: BindFlags::empty(),
            iommufd,
            out_devid: 0,
            token_uuid_ptr: 0,
        };
        file.ioctl(
            VFIO_DEVICE_BIND_IOMMUFD,
            address(bind.as_mut_bytes()),
            &self.us,
        )
    }

    fn context(&self) -> (i32, Arc<Iommufd>) {
        self.us.context()
    }

    /// What GET_DEVICE_FD does, under a supervisor.
    fn open_device(&self, group: &GroupFile, name: &str) -> Result<Arc<DeviceFile>> {
        let device = group.find_device(name.as_bytes())?;
        let file = device.open_cdev(opener())?;
        file.open_by_group(group, name.as_bytes(), opener())?;
        Ok(file)
    }
}

/// The group with this container, which has a backend.
fn in_container(world: &World, group: &Arc<Group>) -> (Arc<GroupFile>, Arc<Container>) {
    let file = group.open(opener()).unwrap();
    let (fd, container) = world.container();
    world.set_container(&file, fd).unwrap();
    world.set_iommu(&container).unwrap();
    (file, container)
}
