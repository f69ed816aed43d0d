//! How the client gets at devices: through the nodes, or by calls where there can be none.

use super::sys::{self, Mapping};
use rustix::io::Errno;
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;
use vfio_core::caller::{Caller, Capability, FileObject};
use vfio_core::device::{DeviceFile, Opener};
use vfio_core::iommufd::Iommufd;
use vfio_core::{Core, Result};
use vfio_uapi::UserMemory;
use zerocopy::{FromBytes, IntoBytes};

/// The way to devices.
#[derive(Debug)]
pub(super) enum Reach {
    /// The files below this directory, as any VFIO program opens them.
    Nodes(PathBuf),
    /// The core in this process.
    Inside(Core, Arc<Us>),
}

/// An open device.
#[derive(Debug)]
pub(super) enum Device {
    File(File),
    Inside(Arc<DeviceFile>, Arc<Us>),
}

/// An open `/dev/iommu`.
#[derive(Debug)]
pub(super) enum Iommu {
    File(File),
    Inside(i32, Arc<Iommufd>, Arc<Us>),
}

impl Reach {
    /// What a person calls this place.
    pub(super) fn describe(&self, what: &str) -> String {
        match self {
            Reach::Nodes(dev) => format!("{}/{what}", dev.display()),
            Reach::Inside(..) => what.to_owned(),
        }
    }

    /// Opens `vfio/devices/NAME`.
    pub(super) fn device(&self, name: &str) -> Result<Device> {
        match self {
            Reach::Nodes(dev) => Ok(Device::File(open(&dev.join("vfio/devices").join(name))?)),
            Reach::Inside(core, us) => {
                let device = core.device_by_name(name).ok_or(Errno::NOENT)?;
                let file = device.open_cdev(Opener {
                    pid: us.pid(),
                    comm: us.comm(),
                    since: SystemTime::now(),
                    node: None,
                })?;
                Ok(Device::Inside(file, Arc::clone(us)))
            }
        }
    }

    /// Opens `iommu`.
    pub(super) fn iommu(&self) -> Result<Iommu> {
        match self {
            Reach::Nodes(dev) => Ok(Iommu::File(open(&dev.join("iommu"))?)),
            Reach::Inside(_, us) => {
                let context = Iommufd::new();
                let mut contexts = us.contexts();
                let number = (1000..)
                    .find(|n| !contexts.contains_key(n))
                    .ok_or(Errno::MFILE)?;
                contexts.insert(number, Arc::clone(&context));
                drop(contexts);
                Ok(Iommu::Inside(number, context, Arc::clone(us)))
            }
        }
    }
}

fn open(path: &std::path::Path) -> Result<File> {
    let file = File::options().read(true).write(true).open(path);
    file.map_err(|error| errno(&error))
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// The address of a structure of ours, for a core that copies as from any client.
fn address<T>(arg: &mut T) -> u64 {
    (&raw mut *arg).expose_provenance() as u64
}

impl Device {
    pub(super) fn ioctl<T: FromBytes + IntoBytes>(&self, cmd: u32, arg: &mut T) -> Result<u32> {
        match self {
            Device::File(file) => sys::ioctl(file, cmd, arg),
            Device::Inside(file, us) => file.ioctl(cmd, address(arg), &**us),
        }
    }

    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        match self {
            Device::File(file) => file.read_at(buf, offset).map_err(|error| errno(&error)),
            Device::Inside(file, _) => file.read(offset, buf),
        }
    }

    pub(super) fn write(&self, offset: u64, data: &[u8]) -> Result<usize> {
        match self {
            Device::File(file) => file.write_at(data, offset).map_err(|error| errno(&error)),
            Device::Inside(file, _) => file.write(offset, data),
        }
    }

    /// Maps a part of it. `ENODEV` where regions trap.
    pub(super) fn map(&self, offset: u64, len: usize) -> Result<Mapping> {
        match self {
            Device::File(file) => Mapping::of(file, len, offset),
            Device::Inside(..) => Err(Errno::NODEV),
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if let Device::Inside(file, _) = self {
            file.release();
        }
    }
}

impl Iommu {
    pub(super) fn ioctl<T: FromBytes + IntoBytes>(&self, cmd: u32, arg: &mut T) -> Result<u32> {
        match self {
            Iommu::File(file) => sys::ioctl(file, cmd, arg),
            Iommu::Inside(_, context, us) => context.ioctl(cmd, address(arg), &**us),
        }
    }

    /// The descriptor's number, which BIND takes.
    pub(super) fn number(&self) -> i32 {
        match self {
            Iommu::File(file) => file.as_raw_fd(),
            Iommu::Inside(number, ..) => *number,
        }
    }
}

impl Drop for Iommu {
    fn drop(&mut self) {
        if let Iommu::Inside(number, context, us) = self {
            us.contexts().remove(number);
            context.close();
        }
    }
}

/// This process as its own client: real copies of its memory, real descriptors, and contexts by
/// numbers of its own.
#[derive(Debug, Default)]
pub(super) struct Us(Mutex<HashMap<i32, Arc<Iommufd>>>);

impl Us {
    fn contexts(&self) -> std::sync::MutexGuard<'_, HashMap<i32, Arc<Iommufd>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn thread() -> Result<client_process::Caller> {
        client_process::Caller::new(rustix::thread::gettid().as_raw_nonzero().get())
    }
}

impl UserMemory for Us {
    fn copy_in(&self, addr: u64, buf: &mut [u8]) -> Result {
        Us::thread()?.copy_in(addr, buf)
    }

    fn copy_out(&self, addr: u64, buf: &[u8]) -> Result {
        Us::thread()?.copy_out(addr, buf)
    }
}

impl Caller for Us {
    fn pid(&self) -> u32 {
        std::process::id()
    }

    fn comm(&self) -> String {
        "vfiod".to_owned()
    }

    fn capable(&self, capability: Capability) -> bool {
        Us::thread()
            .and_then(|thread| thread.capable(capability))
            .unwrap_or(false)
    }

    fn get_fd(&self, fd: i32) -> Result<OwnedFd> {
        Us::thread()?.get_fd(fd)
    }

    fn file(&self, fd: i32) -> Result<FileObject> {
        Ok(match self.contexts().get(&fd) {
            Some(context) => FileObject::Iommufd(Arc::clone(context)),
            None => FileObject::Other,
        })
    }

    fn memory(&self) -> Result<Arc<client_process::Memory>> {
        client_process::Memory::of(Us::thread()?)
    }
}
