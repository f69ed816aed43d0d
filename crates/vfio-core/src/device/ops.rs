//! What the author of a device writes: [`DeviceOps`], the kernel's `struct vfio_device_ops`.

use super::dirty::DirtyLog;
use super::migration::Migratable;
use super::{Device, WeakDevice};
use crate::irq::SetIrqs;
use crate::model::BusDevice;
use crate::{Core, Errno, Result};
use dma_memory::DeviceMemory;
use std::fmt;
use std::sync::Arc;
use vfio_uapi::device::feature::FeatureFlags;
use vfio_uapi::device::{InfoFlags, IrqFlags, RegionFlags};

/// A device. `Self` is the driver's private state and lives from [`init`](DeviceOps::init) to
/// release; release is dropping it (write `impl Drop` only where dropping the fields is not
/// enough).
///
/// All calls take `&self` and may run together on any threads, as in the kernel. Only `open`
/// and `close` of the devices of one set exclude each other (the set's lock). A call must not
/// wait for another user of its own device, and `open` must not call into its own device. A
/// panic in any of them takes this device down and nothing else.
///
/// A driver cannot free, register, unregister or put a device: no value that could do so ever
/// reaches it.
pub trait DeviceOps: Send + Sync + Sized + 'static {
    /// The driver's name in log lines and errors: `mtty`.
    const NAME: &'static str;

    /// What it takes to make one.
    type Args: Send;

    /// What exists only from the first open to the last close: eventfds, worker threads.
    type Session: Send + Sync + 'static;

    /// Makes the state. Nobody sees the device yet. An error leaves no trace: what was built so
    /// far is dropped, the index and the set membership are given back, and `Drop for Self`
    /// does not run (there is no `Self`). `ops->init`.
    fn init(cx: &InitCx<'_>, args: Self::Args) -> Result<Self>;

    /// First open. On error the device stays closed and can be opened again. `ops->open_device`.
    fn open(&self, cx: &OpenCx<'_>) -> Result<Self::Session>;

    /// Last close: the file that had it open is gone, calls in progress have returned, DMA is
    /// still attached. `ops->close_device`.
    fn close(&self, session: Self::Session) {
        drop(session);
    }

    /// `VFIO_DEVICE_GET_INFO`.
    fn info(&self) -> DeviceInfo;

    /// `VFIO_DEVICE_GET_REGION_INFO`, for an index below `info().num_regions`. A region the
    /// device does not implement is [`RegionInfo::default`]: size 0, no flags, success.
    fn region(&self, index: u32) -> Result<RegionInfo>;

    /// `VFIO_DEVICE_GET_IRQ_INFO`, for an index below `info().num_irqs`. Count 0 is success.
    fn irq(&self, index: u32) -> Result<IrqInfo>;

    /// Reads from a region. `at` may be anywhere; the length is what the client asked for. The
    /// number of bytes read, or the errno of the first that failed.
    fn read(&self, session: &Self::Session, at: RegionPos, buf: &mut [u8]) -> Result<usize>;

    /// Writes to a region; as [`read`](DeviceOps::read).
    fn write(&self, session: &Self::Session, at: RegionPos, data: &[u8]) -> Result<usize>;

    /// `VFIO_DEVICE_SET_IRQS`, after central validation. The positive number is returned to the
    /// client (MSI: fewer vectors available). `ENOTTY` for a combination the index does not know.
    fn set_irqs(&self, session: &Self::Session, request: SetIrqs<'_>) -> Result<u32>;

    /// `VFIO_DEVICE_RESET`. `EINVAL` when the device cannot be reset.
    fn reset(&self, _session: &Self::Session) -> Result {
        Err(Errno::INVAL)
    }

    /// Somebody wants the device back: tell its user. Called with 0, 1, 2, … until the last user
    /// has gone; `session` is `None` when files are open but none is bound. `ops->request`.
    fn request(&self, _session: Option<&Self::Session>, _count: u32) -> RequestChannel {
        RequestChannel::None
    }

    /// `VFIO_DEVICE_QUERY_GFX_PLANE`; a `probe` asks only whether `kind` is the right one.
    /// `ENOTTY` for a device without a display, `EINVAL` for another kind.
    fn gfx_plane(&self, _session: &Self::Session, _query: GfxQuery) -> Result<GfxPlane> {
        Err(Errno::NOTTY)
    }

    /// `VFIO_DEVICE_FEATURE`, after the generic rules (sizes, GET and SET exclusive). `ENOTTY`
    /// for a feature the driver does not have, also for a probe.
    fn feature(&self, _session: &Self::Session, _feature: Feature<'_>) -> Result<()> {
        Err(Errno::NOTTY)
    }

    /// How devices of this driver migrate; `None` when they cannot.
    fn migratable(&self) -> Option<&dyn Migratable<Self::Session>> {
        None
    }

    /// A range of client memory is going away: let go of what is pinned in it. May arrive before
    /// `open` has returned. `ops->dma_unmap`.
    fn dma_unmap(&self, _session: &Self::Session, _iova: u64, _len: u64) {}

    /// True if a client that asks the group for `name` (`VFIO_GROUP_GET_DEVICE_FD`) means this device,
    /// whose parent's name is `parent`; by default if the two are equal. An error ends the client's
    /// search: a name that is malformed, or a token that is wrong (`ops->match`).
    fn matches(&self, parent: &str, name: &[u8]) -> Result<bool> {
        Ok(parent.as_bytes() == name)
    }

    /// Attribute groups that the driver adds to its parent's directory, as `(group, name)`, all
    /// readable: mdpy's `vendor/resolution`.
    fn attributes(&self) -> &'static [(&'static str, &'static str)] {
        &[]
    }

    /// The text of one of [`attributes`](DeviceOps::attributes), with its newline.
    fn show(&self, _group: &str, _name: &str) -> Result<String> {
        Err(Errno::NOENT)
    }
}

/// What `init` can reach.
pub struct InitCx<'a> {
    pub(crate) core: &'a Core,
    pub(crate) parent: &'a Arc<BusDevice>,
    pub(crate) index: u32,
    pub(crate) set: &'a std::sync::Mutex<Option<super::set::Membership>>,
}

impl fmt::Debug for InitCx<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InitCx")
            .field("index", &self.index)
            .finish_non_exhaustive()
    }
}

impl InitCx<'_> {
    /// The device's number: N in `vfioN`.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The device it will belong to.
    pub fn parent(&self) -> &BusDevice {
        self.parent
    }

    /// Puts the device into the set with this key, shared by all devices with the same key:
    /// their opens and closes exclude each other. Without a call it gets a set of its own at
    /// register. `EINVAL` if it is in a set already. `vfio_assign_device_set`.
    pub fn assign_device_set(&self, key: u64) -> Result {
        let mut set = self.set.lock().unwrap_or_else(|poison| poison.into_inner());
        if set.is_some() {
            return Err(Errno::INVAL);
        }
        *set = Some(self.core.sets().join(key));
        Ok(())
    }
}

/// What `open` can reach, and what a session may keep.
pub struct OpenCx<'a> {
    pub(crate) device: &'a Device,
    pub(crate) dma: Dma,
    pub(crate) memory: Option<Arc<DeviceMemory>>,
    pub(crate) areas: &'a [super::region::Area],
}

impl fmt::Debug for OpenCx<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenCx")
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

impl OpenCx<'_> {
    /// The client's memory, through whatever IOAS the device is attached to at the time.
    pub fn dma(&self) -> &Dma {
        &self.dma
    }

    /// The bytes of a region that has the MMAP flag: what the client's mappings show. `None`
    /// for any other region.
    pub fn memory(&self, region: u32) -> Option<RegionMemory> {
        let area = self.areas.get(region as usize)?;
        let memory = self.memory.clone()?;
        area.mapped.then(|| RegionMemory {
            memory,
            base: area.offset,
            size: area.size,
        })
    }

    /// A handle for workers: it does not keep the device alive (a device that owns a thread that
    /// owns the device would never be released).
    pub fn device(&self) -> WeakDevice {
        self.device.downgrade()
    }
}

/// A device's way to the memory of its user. Cheap to clone; dead after the last close. What is
/// written through it is logged when the user asks for that.
#[derive(Clone)]
pub struct Dma {
    pub(crate) space: Arc<dyn DmaSpace>,
    pub(crate) log: Arc<DirtyLog>,
}

impl fmt::Debug for Dma {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Dma")
    }
}

/// What a backend (an iommufd access, a container, a vfio-user client) offers for DMA.
pub trait DmaSpace: Send + Sync {
    /// Fills `buf` from `iova`. `ENOENT` not attached or a hole, `EPERM` no permission, `EFAULT`
    /// the memory behind it is gone, `EINVAL` length 0, `EOVERFLOW` wrap, `EBUSY` it is just being
    /// unmapped (`iommufd_access_rw`). May wait for as long as the client's memory does not answer.
    fn read(&self, iova: u64, buf: &mut [u8]) -> Result;

    /// Writes `data` to `iova`; as [`read`](DmaSpace::read).
    fn write(&self, iova: u64, data: &[u8]) -> Result;
}

impl Dma {
    /// Fills `buf` from the client's memory at `iova`; errnos as [`DmaSpace::read`].
    pub fn read(&self, iova: u64, buf: &mut [u8]) -> Result {
        self.space.read(iova, buf)
    }

    /// Writes `data` to the client's memory at `iova`; errnos as [`DmaSpace::read`].
    pub fn write(&self, iova: u64, data: &[u8]) -> Result {
        let written = self.space.write(iova, data);
        // Whatever came of it: an access that failed may have written a part.
        self.log.written(iova, data.len());
        written
    }
}

/// The memory of one mappable region: the same bytes the client maps.
#[derive(Clone, Debug)]
pub struct RegionMemory {
    memory: Arc<DeviceMemory>,
    base: u64,
    size: u64,
}

impl RegionMemory {
    /// All of `memory` as one region: what a driver's tests have in place of [`OpenCx::memory`].
    pub fn whole(memory: Arc<DeviceMemory>) -> RegionMemory {
        let size = memory.size();
        RegionMemory {
            memory,
            base: 0,
            size,
        }
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Reads at an offset within the region. `EINVAL` outside it, `ENODEV` after revocation.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result {
        self.memory.read(self.at(offset, buf.len())?, buf)
    }

    /// Writes at an offset within the region; as [`read`](RegionMemory::read).
    pub fn write(&self, offset: u64, data: &[u8]) -> Result {
        self.memory.write(self.at(offset, data.len())?, data)
    }

    fn at(&self, offset: u64, len: usize) -> Result<u64> {
        let end = offset.checked_add(len as u64).ok_or(Errno::INVAL)?;
        if end > self.size {
            return Err(Errno::INVAL);
        }
        Ok(self.base + offset)
    }
}

/// `struct vfio_device_info` as a driver fills it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// What it is and whether it can be reset.
    pub flags: InfoFlags,
    /// Regions, holes counted.
    pub num_regions: u32,
    /// Interrupt indexes.
    pub num_irqs: u32,
}

/// `struct vfio_region_info` as a driver fills it: the offset is the core's business.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegionInfo {
    /// Bytes. A region with the MMAP flag is a multiple of the page size.
    pub size: u64,
    /// READ, WRITE, MMAP. CAPS is set by the core when there are some.
    pub flags: RegionFlags,
    /// Its capabilities, in the order of the chain.
    pub caps: Vec<RegionCap>,
}

/// A region capability.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegionCap {
    /// Only these `(offset, size)` areas can be mapped.
    SparseMmap(Vec<(u64, u64)>),
    /// What a device-specific region is.
    Type {
        /// Vendor types are `0x8000_0000 | PCI vendor id`.
        kind: u32,
        /// Within the type.
        subtype: u32,
    },
    /// The BAR that holds the MSI-X table may be mapped whole.
    MsixMappable,
}

/// `struct vfio_irq_info` as a driver fills it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqInfo {
    /// EVENTFD, MASKABLE, AUTOMASKED, NORESIZE.
    pub flags: IrqFlags,
    /// How many interrupts the index has.
    pub count: u32,
}

/// A place in a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionPos {
    /// Region index, below `num_regions`.
    pub index: u32,
    /// Bytes from its start. May lie beyond its end.
    pub offset: u64,
}

/// How [`DeviceOps::request`] reached the user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestChannel {
    /// The user took the REQ interrupt and it was raised.
    Signalled,
    /// There is no channel: the unbind waits until the user lets go by itself.
    None,
}

/// `VFIO_DEVICE_QUERY_GFX_PLANE`, in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GfxQuery {
    /// Only asks whether the kind is supported.
    pub probe: bool,
    /// True for a region, false for a dma-buf.
    pub region: bool,
}

/// `VFIO_DEVICE_QUERY_GFX_PLANE`, out. All zero: the display is off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GfxPlane {
    /// DRM fourcc of the format.
    pub drm_format: u32,
    /// DRM format modifier.
    pub drm_format_mod: u64,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Bytes per line.
    pub stride: u32,
    /// Bytes.
    pub size: u32,
    /// Region that holds it, for the region kind.
    pub region_index: u32,
}

/// `VFIO_DEVICE_FEATURE` after the generic rules.
pub struct Feature<'a> {
    /// Feature number and operations; [`FeatureFlags::check`] applies the per-feature rules.
    pub flags: FeatureFlags,
    /// The payload, as long as the client said (`argsz - 8`, at most a page); for GET the driver
    /// writes its answer here. Shorter than needed: `EINVAL`. Empty for a probe.
    pub data: &'a mut [u8],
}

impl fmt::Debug for Feature<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Feature")
            .field("flags", &self.flags)
            .finish_non_exhaustive()
    }
}
