//! A device opened by a transport that brings its own address space, and has no descriptors to
//! pass and no ioctl arguments to copy: a vfio-user connection, a test.
//!
//! The file is bound from the start, so it goes through the same life as any other: it counts as a
//! user, shows among the device's [`files`](Device::files), is asked to let go, and can be cut off.

use super::file::DeviceFile;
use super::handle::Device;
use super::ioctl::open_once_closed;
use super::ops::{DmaSpace, Feature, RegionInfo, RegionPos};
use super::shared::{Binding, Leased};
use super::{Opener, ioctl};
use crate::irq::SetIrqs;
use crate::{Errno, Result};
use std::sync::Arc;
use vfio_uapi::caps::Caps;

/// An address space that belongs to whoever opened the device: nothing to attach to.
struct Direct(Arc<dyn DmaSpace>);

impl Binding for Direct {
    fn dma(&self) -> Arc<dyn DmaSpace> {
        Arc::clone(&self.0)
    }

    fn devid(&self) -> u32 {
        0
    }

    fn attach(&self, _pt_id: u32) -> Result<u32> {
        Err(Errno::NOTTY)
    }

    fn detach(&self) {}
}

impl Device {
    /// Opens the device for a transport with a DMA space of its own. On return the driver's `open`
    /// has run, and the file may do everything a bound one may.
    ///
    /// `EBUSY` while anybody has the device open (bound, or still mapped after its close) or its
    /// group's node,
    /// `ENODEV` as [`open_cdev`](Device::open_cdev), else what the driver's `open` says; on error
    /// nothing remains open. While the file is open, BIND of another one and opens of the group are
    /// refused as for any open device (`vfio_df_open`, `vfio_device_block_group`).
    pub fn open_direct(&self, opener: Opener, dma: Arc<dyn DmaSpace>) -> Result<Arc<DeviceFile>> {
        let file = self.open_cdev(opener)?;
        let group = self.vfio_group().ok_or(Errno::NODEV)?;
        let mut lease = Some(group.block()?);
        let session = open_once_closed(self, false, &mut || {
            let binding = Box::new(Direct(Arc::clone(&dma)));
            let lease = lease.take().ok_or(Errno::BUSY)?;
            Ok(Some(Leased::boxed(binding, lease)))
        })
        .map_err(|errno| match errno {
            Errno::INVAL if self.is_open() => Errno::BUSY,
            errno => errno,
        })?;
        file.give(session)?;
        Ok(file)
    }
}

impl DeviceFile {
    /// Reads from a region, which need not know where it lies in a device file; as
    /// [`read`](DeviceFile::read). `EINVAL` for an index past the last region.
    pub fn read_region(&self, at: RegionPos, buf: &mut [u8]) -> Result<usize> {
        let grant = self.grant()?;
        if at.index as usize >= grant.user.device().0.layout()?.areas.len() {
            return Err(Errno::INVAL);
        }
        if buf.is_empty() {
            return Ok(0);
        }
        grant.session.read(at, buf)
    }

    /// Writes to a region; as [`read_region`](DeviceFile::read_region).
    pub fn write_region(&self, at: RegionPos, data: &[u8]) -> Result<usize> {
        let grant = self.grant()?;
        if at.index as usize >= grant.user.device().0.layout()?.areas.len() {
            return Err(Errno::INVAL);
        }
        if data.is_empty() {
            return Ok(0);
        }
        grant.session.write(at, data)
    }

    /// Where a region lies in the device file and, if it can be mapped, in the device's memory
    /// ([`Device::memory`]). `EINVAL` past the last region.
    pub fn region_offset(&self, index: u32) -> Result<u64> {
        let grant = self.grant()?;
        let layout = grant.user.device().0.layout()?;
        let area = layout.areas.get(index as usize).ok_or(Errno::INVAL)?;
        Ok(area.offset)
    }

    /// A SET_IRQS request that the transport has validated as [`SetIrqs`] says; what the driver
    /// answers.
    pub fn set_irqs(&self, request: SetIrqs<'_>) -> Result<u32> {
        self.grant()?.session.set_irqs(request)
    }

    /// `VFIO_DEVICE_RESET`; what the driver answers.
    pub fn reset(&self) -> Result {
        self.grant()?.session.reset()
    }

    /// A feature that is the driver's own; the transport has applied the generic rules. `ENOTTY`
    /// for one the driver does not have.
    pub fn feature(&self, feature: Feature<'_>) -> Result {
        self.grant()?.session.feature(feature)
    }

    /// A range of the DMA space is gone: tells the driver to let go of what it keeps of it. To be
    /// called when no new access can find the range any more.
    pub fn dma_unmapped(&self, iova: u64, len: u64) {
        if let Ok(grant) = self.grant() {
            grant.session.dma_unmap(iova, len);
        }
    }

    /// Runs `f` once when the file is cut off (its device was disassociated, or the driver
    /// panicked); at once if it has been. Not when the file is closed. It runs on whichever thread
    /// cuts off, so it must be quick and must not wait.
    pub fn on_cut_off(&self, f: impl FnOnce() + Send + 'static) {
        self.when_cut_off(Box::new(f));
    }
}

impl RegionInfo {
    /// The capability chain that follows `struct vfio_region_info`, the same on a socket.
    pub fn chain(&self) -> Caps {
        ioctl::region_caps(&self.caps)
    }
}
