//! The device file's ioctls: an argument in the client's memory in, a driver call, an answer out
//! (`drivers/vfio/vfio_main.c`, `vfio_device_fops_unl_ioctl`; `device_cdev.c`).
//!
//! Client memory is only touched with no lock held.

use super::feature::feature;
use super::file::{DeviceFile, Grant};
use super::handle::Device;
use super::housekeeper::LOOK;
use super::ops::{GfxQuery, RegionCap};
use super::shared::{Bind, Binding, GroupType, Leased, Session};
use crate::caller::Caller;
use crate::irq::{Action, Data, EventfdSource, SetIrqs, Trigger};
use crate::{Errno, Result};
use client_process::is_eventfd;
use std::mem::offset_of;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vfio_uapi::caps::{Caps, CapsBuilder, SparseMmapArea};
use vfio_uapi::device::{
    AttachFlags, AttachIommufdPt, BindFlags, BindIommufd, DetachFlags, DetachIommufdPt,
    GfxPlaneFlags, GfxPlaneInfo, Info, InfoFlags, IrqInfo, IrqSet, IrqSetFlags, RegionFlags,
    RegionInfo,
};
use vfio_uapi::dialect::{iommufd, vfio};
use vfio_uapi::ioctl::DeviceIoctl;

impl DeviceFile {
    /// An ioctl. Returns what the client's `ioctl()` returns. Before BIND everything but BIND is
    /// `EINVAL`; a number nobody knows is `ENOTTY`; a file that was cut off gets `ENODEV`.
    ///
    /// It may wait for the client's memory as long as the client likes; no lock is held then.
    pub fn ioctl(&self, cmd: u32, arg: u64, caller: &dyn Caller) -> Result<u32> {
        if let Some(data) = self.data() {
            return data.ioctl(cmd, arg, caller);
        }
        let known = DeviceIoctl::try_from(cmd);
        if known == Ok(DeviceIoctl::BindIommufd) {
            return self.bind(arg, caller).map(|()| 0);
        }
        let grant = self.grant()?;
        let grant = &*grant;
        match known? {
            DeviceIoctl::GetInfo => get_info(grant, arg, caller),
            DeviceIoctl::GetRegionInfo => get_region_info(grant, arg, caller),
            DeviceIoctl::GetIrqInfo => get_irq_info(grant, arg, caller),
            DeviceIoctl::SetIrqs => return set_irqs(grant, arg, caller),
            DeviceIoctl::Reset => grant.session.reset(),
            DeviceIoctl::QueryGfxPlane => query_gfx_plane(grant, arg, caller),
            DeviceIoctl::Feature => return feature(grant, arg, caller, false),
            // Of a group's file the driver is asked, and no driver knows them.
            DeviceIoctl::AttachIommufdPt | DeviceIoctl::DetachIommufdPt if grant.by_group => {
                Err(Errno::NOTTY)
            }
            DeviceIoctl::AttachIommufdPt => attach(grant, arg, caller),
            DeviceIoctl::DetachIommufdPt => detach(grant, arg, caller),
            _ => Err(Errno::NOTTY),
        }
        .map(|()| 0)
    }

    /// `VFIO_DEVICE_FEATURE` for a client to whom somebody can give descriptors: migration is a
    /// feature of the device then. Where the kernel would return a data file, this returns the number
    /// of its session, for [`open_migration_data`](DeviceFile::open_migration_data), and -1 in the
    /// structure; else 0. Errnos as the ioctl.
    pub fn feature_with_files(&self, arg: u64, caller: &dyn Caller) -> Result<u32> {
        let grant = self.grant()?;
        feature(&grant, arg, caller, true)
    }

    /// An errno has no room for it: a person finds in the log who has the device.
    fn say_who_has_it(&self, device: &Device, errno: Errno) {
        let others = device.files();
        let mut have = others.iter().filter(|file| file.is_bound());
        if let (Errno::INVAL, Some(other)) = (errno, have.next()) {
            tracing::info!(
                "vfio-dev {}: BIND by {} refused: {} has it open",
                device.name(),
                self.opener(),
                other.opener()
            );
        }
    }

    /// `VFIO_DEVICE_BIND_IOMMUFD`, checks in the order of `vfio_df_ioctl_bind_iommufd`.
    fn bind(&self, arg: u64, caller: &dyn Caller) -> Result {
        const MIN: usize = 16;
        if let Some(device) = self.device()
            && !device.head().core.config().cdev
        {
            // A kernel without char devices has no such command; its drivers do not know it.
            return Err(match self.is_bound() {
                true => Errno::NOTTY,
                false => Errno::INVAL,
            });
        }
        let (mut bind, size) = iommufd::read::<BindIommufd, _>(caller, arg, MIN)?;
        if bind.iommufd < 0 || !(bind.flags - BindFlags::TOKEN).is_empty() {
            return Err(Errno::INVAL);
        }
        // A file of a group is bound, too.
        let device = self.unbound()?;
        let group = device.vfio_group().ok_or(Errno::NODEV)?;
        let mut lease = Some(group.block()?);
        if bind.flags.contains(BindFlags::TOKEN) {
            // No driver here has VF tokens.
            return Err(Errno::INVAL);
        }
        let context = caller.iommufd(bind.iommufd)?;
        let session = open_once_closed(&device, true, &mut || {
            let binding: Box<dyn Binding> = context.bind(&device)?;
            let lease = lease.take().ok_or(Errno::BUSY)?;
            Ok(Some(Leased::boxed(binding, lease)))
        })
        .inspect_err(|errno| self.say_who_has_it(&device, *errno))?;
        bind.out_devid = session.binding().map_or(0, Binding::devid);
        let at = arg + offset_of!(BindIommufd, out_devid) as u64;
        debug_assert!(size as usize >= MIN, "the dialect checked it");
        // A fault closes and unbinds again, by dropping the session; the file can bind later.
        caller.copy_out(at, &bind.out_devid.to_ne_bytes())?;
        self.give(session)
    }
}

/// Opens the driver's device. In the kernel `close()` returns when the device is closed; here the
/// close comes as a message, and the kernel lets go of the backing file after it
/// (`fs/fuse/file.c`, `fuse_file_put`). So who finds the device open by no file any more waits a
/// moment for the end of that close, and then only a mapping that outlives its file is `EINVAL`.
/// With `unheard` it waits as well while a file is open, whose close may be on its way.
pub(super) fn open_once_closed(
    device: &Device,
    unheard: bool,
    bind: Bind<'_>,
) -> Result<Arc<dyn Session>> {
    let core = &device.head().core;
    let until = Instant::now() + core.config().close_grace;
    let mut looked = false;
    loop {
        let mut was_closed = false;
        let opened = Arc::clone(&device.0).open(false, &mut || {
            was_closed = true;
            bind()
        });
        // What the context or the driver says of a device that nobody had open is final.
        if was_closed || !matches!(opened, Err(Errno::INVAL)) {
            return opened;
        }
        if !device.0.is_open() && Instant::now() < until {
            // It has ended just now.
            continue;
        }
        let has_file = device.files().iter().any(|file| file.is_bound());
        if !has_file && !std::mem::replace(&mut looked, true) {
            core.house().look(LOOK);
        } else if (unheard || !has_file) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        } else {
            return opened;
        }
    }
}

fn get_info(grant: &Grant, arg: u64, caller: &dyn Caller) -> Result {
    let (mut info, argsz) = vfio::read::<Info, _>(caller, arg, 16)?;
    let device = grant.user.device().info()?;
    info.flags = device.flags - InfoFlags::CAPS;
    info.num_regions = device.num_regions;
    info.num_irqs = device.num_irqs;
    info.cap_offset = 0;
    vfio::write_back(caller, arg, &info, argsz)
}

fn get_region_info(grant: &Grant, arg: u64, caller: &dyn Caller) -> Result {
    let (mut info, argsz) = vfio::read::<RegionInfo, _>(caller, arg, size_of::<RegionInfo>())?;
    let device = grant.user.device();
    if info.index >= device.info()?.num_regions {
        return Err(Errno::INVAL);
    }
    let mut region = device.region(info.index)?;
    if !device.head().core.native_mmap() {
        region.flags -= RegionFlags::MMAP;
        // The others are about mapping.
        region
            .caps
            .retain(|cap| matches!(cap, RegionCap::Type { .. }));
    }
    let layout = device.0.layout()?;
    let area = layout.areas.get(info.index as usize).ok_or(Errno::INVAL)?;
    let caps = region_caps(&region.caps);
    let placed = caps.place(argsz);
    info.argsz = placed.argsz;
    info.flags = region.flags - RegionFlags::CAPS;
    if placed.has_caps {
        info.flags |= RegionFlags::CAPS;
    }
    info.cap_offset = placed.cap_offset;
    info.size = region.size;
    info.offset = area.offset;
    vfio::write_caps(caller, arg, &placed)?;
    vfio::write_back(caller, arg, &info, argsz)
}

pub(super) fn region_caps(caps: &[RegionCap]) -> Caps {
    let mut chain = CapsBuilder::new();
    for cap in caps {
        chain = match cap {
            RegionCap::SparseMmap(areas) => {
                let areas: Vec<SparseMmapArea> = areas
                    .iter()
                    .map(|&(offset, size)| SparseMmapArea { offset, size })
                    .collect();
                chain.sparse_mmap(&areas)
            }
            RegionCap::Type { kind, subtype } => chain.region_type(*kind, *subtype),
            RegionCap::MsixMappable => chain.msix_mappable(),
        };
    }
    chain.finish(size_of::<RegionInfo>() as u32)
}

fn get_irq_info(grant: &Grant, arg: u64, caller: &dyn Caller) -> Result {
    let (mut info, argsz) = vfio::read::<IrqInfo, _>(caller, arg, size_of::<IrqInfo>())?;
    let device = grant.user.device();
    if info.index >= device.info()?.num_irqs {
        return Err(Errno::INVAL);
    }
    let irq = device.irq(info.index)?;
    info.flags = irq.flags;
    info.count = irq.count;
    vfio::write_back(caller, arg, &info, argsz)
}

const ACTIONS: IrqSetFlags = IrqSetFlags::ACTION_MASK
    .union(IrqSetFlags::ACTION_UNMASK)
    .union(IrqSetFlags::ACTION_TRIGGER);

/// Descriptors of a SET_IRQS argument, in the caller's table.
struct CallersEventfds<'a> {
    data: &'a [u8],
    caller: &'a dyn Caller,
}

impl CallersEventfds<'_> {
    fn number(&self, n: usize) -> Option<i32> {
        self.data
            .as_chunks::<4>()
            .0
            .get(n)
            .map(|word| i32::from_ne_bytes(*word))
    }
}

impl EventfdSource for CallersEventfds<'_> {
    fn is_invalid(&self, n: usize) -> bool {
        self.number(n).is_some_and(|fd| fd < -1)
    }

    fn eventfd(&self, n: usize) -> Result<Option<Trigger>> {
        let fd = self.number(n).ok_or(Errno::INVAL)?;
        if fd < 0 {
            return Ok(None);
        }
        let fd = self.caller.get_fd(fd)?;
        if !is_eventfd(&fd) {
            return Err(Errno::INVAL);
        }
        Ok(Some(Trigger::new(fd)))
    }
}

fn set_irqs(grant: &Grant, arg: u64, caller: &dyn Caller) -> Result<u32> {
    const HEAD: usize = size_of::<IrqSet>();
    let (set, _) = vfio::read::<IrqSet, _>(caller, arg, HEAD)?;
    let device = grant.user.device();
    let indexes = device.info()?.num_irqs;
    let count = if set.index < indexes {
        device.irq(set.index)?.count
    } else {
        0
    };
    let len = set.data_size(count, indexes)?;
    let mut data = vec![0; len];
    if len > 0 {
        caller.copy_in(arg.checked_add(HEAD as u64).ok_or(Errno::FAULT)?, &mut data)?;
    }
    let eventfds = CallersEventfds {
        data: &data,
        caller,
    };
    grant.session.set_irqs(SetIrqs {
        index: set.index,
        start: set.start,
        count: set.count,
        // Central validation leaves the action to the driver; no driver knows none or several.
        action: match set.flags & ACTIONS {
            IrqSetFlags::ACTION_MASK => Action::Mask,
            IrqSetFlags::ACTION_UNMASK => Action::Unmask,
            IrqSetFlags::ACTION_TRIGGER => Action::Trigger,
            _ => return Err(Errno::NOTTY),
        },
        data: match set.flags & IrqSetFlags::DATA_MASK {
            IrqSetFlags::DATA_NONE => Data::None,
            IrqSetFlags::DATA_BOOL => Data::Bool(&data),
            _ => Data::Eventfd(&eventfds),
        },
    })
}

fn query_gfx_plane(grant: &Grant, arg: u64, caller: &dyn Caller) -> Result {
    const MIN: usize = 60;
    let (mut info, _) = vfio::read::<GfxPlaneInfo, _>(caller, arg, MIN)?;
    let probe = info.flags.contains(GfxPlaneFlags::PROBE);
    let kind = info.flags - GfxPlaneFlags::PROBE;
    let region = if kind == GfxPlaneFlags::REGION {
        true
    } else if kind == GfxPlaneFlags::DMABUF {
        false
    } else {
        return Err(Errno::INVAL);
    };
    let plane = grant.session.gfx_plane(GfxQuery { probe, region })?;
    if probe {
        return Ok(());
    }
    info.drm_format = plane.drm_format;
    info.drm_format_mod = plane.drm_format_mod;
    info.width = plane.width;
    info.height = plane.height;
    info.stride = plane.stride;
    info.size = plane.size;
    info.x_pos = 0;
    info.y_pos = 0;
    info.x_hot = 0;
    info.y_hot = 0;
    info.id = plane.region_index;
    vfio::write_back(caller, arg, &info, MIN as u32)
}

fn attach(grant: &Grant, arg: u64, caller: &dyn Caller) -> Result {
    let (mut attach, _) = vfio::read::<AttachIommufdPt, _>(caller, arg, 12)?;
    if !(attach.flags - AttachFlags::PASID).is_empty() {
        return Err(Errno::INVAL);
    }
    if attach.flags.contains(AttachFlags::PASID) {
        return Err(no_pasid(grant, arg, caller, &mut attach, 12, 16));
    }
    let Some(binding) = grant.session.binding() else {
        return Err(Errno::NOTTY);
    };
    {
        let _set = grant.session.set_lock();
        attach.pt_id = binding.attach(attach.pt_id)?;
    }
    let at = arg + offset_of!(AttachIommufdPt, pt_id) as u64;
    caller
        .copy_out(at, &attach.pt_id.to_ne_bytes())
        .inspect_err(|_| {
            let _set = grant.session.set_lock();
            binding.detach();
        })
}

fn detach(grant: &Grant, arg: u64, caller: &dyn Caller) -> Result {
    let (mut detach, _) = vfio::read::<DetachIommufdPt, _>(caller, arg, 8)?;
    if !(detach.flags - DetachFlags::PASID).is_empty() {
        return Err(Errno::INVAL);
    }
    if detach.flags.contains(DetachFlags::PASID) {
        return Err(no_pasid(grant, arg, caller, &mut detach, 8, 12));
    }
    let Some(binding) = grant.session.binding() else {
        return Err(Errno::NOTTY);
    };
    let _set = grant.session.set_lock();
    binding.detach();
    Ok(())
}

/// No emulated device has PASIDs (`EOPNOTSUPP` whatever the size); a physical one here sits
/// behind an IOMMU without them, which is found out after the size.
fn no_pasid<T: zerocopy::FromBytes + zerocopy::IntoBytes>(
    grant: &Grant,
    arg: u64,
    caller: &dyn Caller,
    value: &mut T,
    from: usize,
    to: usize,
) -> Errno {
    if grant.user.device().kind() == Some(GroupType::Physical)
        && let Err(errno) = vfio::read_more(caller, arg, value, from, to)
    {
        return errno;
    }
    Errno::OPNOTSUPP
}
