//! A PCI display 1b36:000f that is nothing but a framebuffer to map: the kernel's sample
//! (`samples/vfio-mdev/mdpy.c`, `mdpy-defs.h`). A Linux guest drives it with the sample's `mdpy-fb`.
//! BAR 0 is the picture; a vendor capability in the configuration space tells its format and size.
//!
//! Unlike the sample, the configuration space has 256 bytes and bounds, interrupt limits do not
//! depend on an earlier call, reading and writing the framebuffer respects the offset, and the plane
//! is said to be in BAR 0 instead of in a region beyond `num_regions`. There is no interrupt.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use vfio_core::Errno;
use vfio_core::Result;
use vfio_core::device::DeviceInfo;
use vfio_core::device::DeviceOps;
use vfio_core::device::GfxPlane;
use vfio_core::device::GfxQuery;
use vfio_core::device::InitCx;
use vfio_core::device::IrqInfo;
use vfio_core::device::OpenCx;
use vfio_core::device::RegionInfo;
use vfio_core::device::RegionMemory;
use vfio_core::device::RegionPos;
use vfio_core::irq::SetIrqs;
use vfio_core::model::BusDevice;
use vfio_core::model::mdev;
use vfio_uapi::device::InfoFlags;
use vfio_uapi::device::IrqFlags;
use vfio_uapi::device::RegionFlags;
use vfio_uapi::pci::Command;
use vfio_uapi::pci::class;
use vfio_uapi::pci::id;
use vfio_uapi::pci::irq;
use vfio_uapi::pci::region;

use crate::pci_config::Bar;
use crate::pci_config::PciConfig;

/// How many displays a parent has unless told otherwise (the sample's parameter `count`).
pub const COUNT: u32 = 4;

/// `DRM_FORMAT_XRGB8888`, the only format: fourcc `XR24`.
pub const FORMAT: u32 = u32::from_le_bytes(*b"XR24");

/// Bytes of a pixel in [`FORMAT`].
const BYTES_PER_PIXEL: u32 = 4;

/// `PCI_SUBDEVICE_ID_QEMU`.
const SUBDEVICE_QEMU: u16 = 0x1100;

/// The kinds of display.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 640x480, `mdpy-vga`.
    Vga,
    /// 1024x768, `mdpy-xga`.
    Xga,
    /// 1920x1080, `mdpy-hd`.
    Hd,
}

impl Mode {
    /// All of them, in the order of their directories.
    pub const ALL: [Self; 3] = [Self::Vga, Self::Xga, Self::Hd];

    /// Width and height in pixels.
    pub const fn resolution(self) -> (u32, u32) {
        match self {
            Self::Vga => (640, 480),
            Self::Xga => (1024, 768),
            Self::Hd => (1920, 1080),
        }
    }

    /// What sysfs shows of it.
    pub const fn mdev_type(self) -> mdev::Type {
        let (sysfs_name, pretty_name) = match self {
            Self::Vga => ("vga", "mdpy-vga"),
            Self::Xga => ("xga", "mdpy-xga"),
            Self::Hd => ("hd", "mdpy-hd"),
        };
        mdev::Type {
            sysfs_name,
            pretty_name: Some(pretty_name),
        }
    }

    /// Bytes of the framebuffer's region: what a base address register can say.
    pub const fn memory_size(self) -> u32 {
        let (width, height) = self.resolution();
        (width * height * BYTES_PER_PIXEL).next_power_of_two()
    }

    fn stride(self) -> u32 {
        self.resolution().0 * BYTES_PER_PIXEL
    }

    fn of(ty: &mdev::Type) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|mode| mode.mdev_type() == *ty);
        found.ok_or(Errno::INVAL)
    }

    /// The configuration space as it is after reset. The capability has its place at 0x40 and tells
    /// format, width and height in the words at 0x44, 0x48 and 0x4c (`mdpy-defs.h`).
    fn config(self) -> Result<PciConfig> {
        let (width, height) = self.resolution();
        // Behind the length of the capability, which is the builder's, one byte up to the words.
        let words = [FORMAT, width, height].map(u32::to_le_bytes);
        let data = [&[0][..], words.as_flattened()].concat();
        let bar = Bar::mem32(u64::from(self.memory_size())).prefetchable();
        PciConfig::builder(id::VENDOR_REDHAT, id::DEVICE_MDPY)
            .subsystem(id::VENDOR_REDHAT_QUMRANET, SUBDEVICE_QEMU)
            .class(class::DISPLAY_OTHER, 0)
            .revision(1)
            .command(Command::IO | Command::MEMORY)
            .bar(0, bar)
            .vendor_capability(&data)
            .build()
            .map_err(|error| {
                tracing::error!("mdpy: {error}");
                Errno::INVAL
            })
    }
}

/// The driver on the mdev bus.
#[derive(Debug)]
pub struct Driver {
    count: u32,
}

impl Default for Driver {
    fn default() -> Self {
        Self::new(COUNT)
    }
}

impl Driver {
    /// A driver that makes up to `count` displays for each parent.
    pub const fn new(count: u32) -> Self {
        Self { count }
    }
}

impl mdev::Driver for Driver {
    type Ops = Mdpy;

    fn name(&self) -> &'static str {
        Mdpy::NAME
    }

    fn types(&self) -> Vec<mdev::Type> {
        Mode::ALL.map(Mode::mdev_type).into()
    }

    fn max_instances(&self) -> u32 {
        self.count
    }

    fn description(&self, ty: &mdev::Type) -> Option<String> {
        let (width, height) = Mode::of(ty).ok()?.resolution();
        Some(format!("virtual display, {width}x{height} framebuffer"))
    }

    fn args(&self, _device: &Arc<BusDevice>, ty: &mdev::Type) -> Result<Mode> {
        Mode::of(ty)
    }

    fn parameters(&self) -> Vec<(&'static str, String)> {
        vec![("count", self.count.to_string())]
    }
}

/// A display.
#[derive(Debug)]
pub struct Mdpy {
    mode: Mode,
    // What the guest changes; the picture is in the device's memory, which outlives a session.
    config: Mutex<PciConfig>,
    /// The memory, which is made at first open, has its first picture.
    painted: AtomicBool,
}

impl DeviceOps for Mdpy {
    const NAME: &'static str = "mdpy";
    type Args = Mode;
    /// The framebuffer.
    type Session = RegionMemory;

    fn init(_cx: &InitCx<'_>, mode: Mode) -> Result<Self> {
        Self::new(mode)
    }

    fn open(&self, cx: &OpenCx<'_>) -> Result<RegionMemory> {
        let frame = cx.memory(region::BAR0).ok_or(Errno::NOMEM)?;
        self.start(&frame)?;
        Ok(frame)
    }

    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            flags: InfoFlags::PCI | InfoFlags::RESET,
            num_regions: region::COUNT,
            num_irqs: irq::COUNT,
        }
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        let (size, map) = match index {
            region::BAR0 => (self.mode.memory_size().into(), RegionFlags::MMAP),
            region::CONFIG => (self.config().size(), RegionFlags::empty()),
            _ if index < region::COUNT => return Ok(RegionInfo::default()),
            _ => return Err(Errno::INVAL),
        };
        Ok(RegionInfo {
            size,
            flags: RegionFlags::READ | RegionFlags::WRITE | map,
            caps: Vec::new(),
        })
    }

    fn irq(&self, index: u32) -> Result<IrqInfo> {
        if index >= irq::COUNT {
            return Err(Errno::INVAL);
        }
        Ok(IrqInfo {
            flags: IrqFlags::empty(),
            count: 0,
        })
    }

    fn read(&self, frame: &RegionMemory, at: RegionPos, buf: &mut [u8]) -> Result<usize> {
        match at.index {
            region::BAR0 => {
                self.check(at.offset, buf.len())?;
                frame.read(at.offset, buf)?;
                Ok(buf.len())
            }
            region::CONFIG => self.config().read(at.offset, buf),
            _ => Err(Errno::INVAL),
        }
    }

    fn write(&self, frame: &RegionMemory, at: RegionPos, data: &[u8]) -> Result<usize> {
        match at.index {
            region::BAR0 => {
                self.check(at.offset, data.len())?;
                frame.write(at.offset, data)?;
            }
            // The memory is where the client mapped it, whatever address it gives the register.
            region::CONFIG => _ = self.config().write(at.offset, data)?,
            _ => return Err(Errno::INVAL),
        }
        Ok(data.len())
    }

    fn set_irqs(&self, _frame: &RegionMemory, _request: SetIrqs<'_>) -> Result<u32> {
        Err(Errno::INVAL)
    }

    fn reset(&self, frame: &RegionMemory) -> Result {
        let _ = self.config().reset();
        self.paint(frame)
    }

    fn gfx_plane(&self, _frame: &RegionMemory, query: GfxQuery) -> Result<GfxPlane> {
        if !query.region {
            return Err(Errno::INVAL);
        }
        let (width, height) = self.mode.resolution();
        Ok(GfxPlane {
            drm_format: FORMAT,
            drm_format_mod: 0,
            width,
            height,
            stride: self.mode.stride(),
            size: self.mode.memory_size(),
            region_index: region::BAR0,
        })
    }

    fn attributes(&self) -> &'static [(&'static str, &'static str)] {
        &[("vendor", "resolution")]
    }

    fn show(&self, group: &str, name: &str) -> Result<String> {
        let (width, height) = self.mode.resolution();
        match (group, name) {
            ("vendor", "resolution") => Ok(format!("{width}x{height}\n")),
            _ => Err(Errno::NOENT),
        }
    }
}

impl Mdpy {
    fn new(mode: Mode) -> Result<Self> {
        Ok(Self {
            mode,
            config: Mutex::new(mode.config()?),
            painted: AtomicBool::new(false),
        })
    }

    fn config(&self) -> MutexGuard<'_, PciConfig> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first picture, once; what a client has drawn since stays for the next one.
    fn start(&self, frame: &RegionMemory) -> Result {
        if !self.painted.load(Ordering::Acquire) {
            self.paint(frame)?;
            self.painted.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// The sample's picture after reset, dark above and bright below (`mdpy_reset`).
    fn paint(&self, frame: &RegionMemory) -> Result {
        let height = self.mode.resolution().1;
        let stride = self.mode.stride();
        let mut line = vec![0; stride as usize];
        for row in 0..height {
            let [gray, ..] = (row * 255 / height).to_le_bytes();
            line.fill(gray);
            frame.write(u64::from(row) * u64::from(stride), &line)?;
        }
        Ok(())
    }

    /// `EFAULT` for a request that starts or ends outside the framebuffer (`mdev_access`).
    fn check(&self, offset: u64, len: usize) -> Result {
        let end = offset.checked_add(len as u64).ok_or(Errno::FAULT)?;
        if end > u64::from(self.mode.memory_size()) {
            return Err(Errno::FAULT);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use dma_memory::DeviceMemory;
    use vfio_core::Config;
    use vfio_core::Core;

    use super::*;

    const RW: RegionFlags = RegionFlags::READ.union(RegionFlags::WRITE);

    fn display(mode: Mode) -> (Mdpy, RegionMemory) {
        let memory = DeviceMemory::create(mode.memory_size().into()).expect("memory");
        let frame = RegionMemory::whole(Arc::new(memory));
        let display = Mdpy::new(mode).expect("a display");
        display.start(&frame).expect("it can be opened");
        (display, frame)
    }

    fn bar0(offset: u64) -> RegionPos {
        RegionPos {
            index: region::BAR0,
            offset,
        }
    }

    fn config(offset: u64) -> RegionPos {
        RegionPos {
            index: region::CONFIG,
            offset,
        }
    }

    fn byte(display: &Mdpy, frame: &RegionMemory, offset: u64) -> u8 {
        let mut buf = [0];
        let read = display.read(frame, bar0(offset), &mut buf);
        assert_eq!(read, Ok(1), "at {offset}");
        buf[0]
    }

    #[test]
    fn the_configuration_space_is_the_samples() {
        let (display, frame) = display(Mode::Xga);
        let mut bytes = [0xee; 256];
        assert_eq!(display.read(&frame, config(0), &mut bytes), Ok(256));
        #[rustfmt::skip]
        let golden = [
            0x36, 0x1b, 0x0f, 0x00, 0x03, 0x00, 0x10, 0x00, 0x01, 0x00, 0x80, 0x03, 0, 0, 0, 0,
            0x08, 0, 0, 0,          0, 0, 0, 0,             0, 0, 0, 0,             0, 0, 0, 0,
            0, 0, 0, 0,             0, 0, 0, 0,             0, 0, 0, 0,             0xf4, 0x1a, 0x00, 0x11,
            0, 0, 0, 0,             0x40, 0, 0, 0,          0, 0, 0, 0,             0, 0, 0, 0,
            0x09, 0x00, 0x10, 0x00, b'X', b'R', b'2', b'4', 0x00, 0x04, 0x00, 0x00, 0x00, 0x03, 0x00, 0x00,
        ];
        assert_eq!(bytes[..80], golden);
        assert!(bytes[80..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn bar_0_can_be_sized_and_the_identity_cannot_be_written() {
        for (mode, sized) in [
            (Mode::Vga, 0xffe0_0008_u32),
            (Mode::Xga, 0xffc0_0008),
            (Mode::Hd, 0xff80_0008),
        ] {
            let (display, frame) = display(mode);
            assert_eq!(display.write(&frame, config(0x10), &[0xff; 4]), Ok(4));
            assert_eq!(display.write(&frame, config(0x44), &[0; 12]), Ok(12));
            let (mut bar, mut format) = ([0; 4], [0; 4]);
            assert_eq!(display.read(&frame, config(0x10), &mut bar), Ok(4));
            assert_eq!(display.read(&frame, config(0x44), &mut format), Ok(4));
            assert_eq!(u32::from_le_bytes(bar), sized, "{mode:?}");
            assert_eq!(u32::from_le_bytes(format), FORMAT);
            // Nothing is behind the last byte.
            let past = display.read(&frame, config(255), &mut [0; 2]);
            assert_eq!(past, Err(Errno::FAULT));
        }
    }

    #[test]
    fn regions_and_interrupts_are_what_there_is() {
        let (display, _) = display(Mode::Hd);
        let info = display.info();
        assert_eq!(info.flags, InfoFlags::PCI | InfoFlags::RESET);
        assert_eq!((info.num_regions, info.num_irqs), (9, 5));
        for index in 0..info.num_regions {
            let region = display.region(index).expect("an index below the limit");
            let expected = match index {
                region::BAR0 => (8 << 20, RW | RegionFlags::MMAP),
                region::CONFIG => (256, RW),
                _ => (0, RegionFlags::empty()),
            };
            assert_eq!((region.size, region.flags), expected, "region {index}");
        }
        assert_eq!(display.region(info.num_regions), Err(Errno::INVAL));
        for index in 0..info.num_irqs {
            let irq = display.irq(index).expect("an index below the limit");
            assert_eq!((irq.flags, irq.count), (IrqFlags::empty(), 0));
        }
        assert_eq!(display.irq(info.num_irqs), Err(Errno::INVAL));
    }

    #[test]
    fn the_plane_is_the_region_that_can_be_mapped() {
        let (display, frame) = display(Mode::Hd);
        let query = |probe, region| display.gfx_plane(&frame, GfxQuery { probe, region });
        assert_eq!(query(true, false), Err(Errno::INVAL));
        assert_eq!(query(false, false), Err(Errno::INVAL));
        assert!(query(true, true).is_ok());
        let plane = query(false, true).expect("a display that is on");
        assert_eq!(
            plane,
            GfxPlane {
                drm_format: 0x3432_5258,
                drm_format_mod: 0,
                width: 1920,
                height: 1080,
                stride: 7680,
                size: 8 << 20,
                region_index: 0,
            }
        );
        let region = display.region(plane.region_index).expect("it exists");
        assert!(region.flags.contains(RegionFlags::MMAP));
        assert!(u64::from(plane.stride * plane.height) <= region.size);
    }

    #[test]
    fn the_picture_stays_until_reset() {
        let (display, frame) = display(Mode::Vga);
        let last_row = 479 * 640 * 4;
        assert_eq!(byte(&display, &frame, 0), 0, "black above");
        assert_eq!(byte(&display, &frame, last_row), 254, "white below");
        // Past the last row there is memory, and no picture.
        assert_eq!(byte(&display, &frame, 480 * 640 * 4), 0);

        assert_eq!(
            display.write(&frame, bar0(last_row - 1), &[7, 8, 9]),
            Ok(3),
            "any size and alignment"
        );
        // The next client's first open.
        display.start(&frame).expect("it can be opened again");
        let mut seen = [0; 4];
        assert_eq!(display.read(&frame, bar0(last_row - 1), &mut seen), Ok(4));
        assert_eq!(seen, [7, 8, 9, 254]);
        assert_eq!(display.write(&frame, config(0x10), &[0xff; 4]), Ok(4));

        assert_eq!(display.reset(&frame), Ok(()));
        assert_eq!(display.read(&frame, bar0(last_row - 1), &mut seen), Ok(4));
        assert_eq!(seen, [253, 254, 254, 254]);
        assert_eq!(display.read(&frame, config(0x10), &mut seen), Ok(4));
        assert_eq!(seen, [8, 0, 0, 0]);
    }

    #[test]
    fn what_lies_outside_is_refused_whole() {
        let (display, frame) = display(Mode::Vga);
        let end = u64::from(Mode::Vga.memory_size());
        for offset in [end, end - 1, u64::MAX] {
            let mut buf = [0; 2];
            let (read, written) = (
                display.read(&frame, bar0(offset), &mut buf),
                display.write(&frame, bar0(offset), &[1, 1]),
            );
            assert_eq!((read, written), (Err(Errno::FAULT), Err(Errno::FAULT)));
        }
        assert_eq!(byte(&display, &frame, end - 1), 0, "nothing of it happened");
        let nowhere = RegionPos {
            index: region::BAR1,
            offset: 0,
        };
        assert_eq!(
            display.read(&frame, nowhere, &mut [0]),
            Err(Errno::INVAL),
            "a region that is not there"
        );
    }

    #[test]
    fn the_bus_shows_three_types_and_counts_for_them_together() {
        let core = Core::new(Config::default());
        let parent = BusDevice::virtual_class("mdpy", "mdpy");
        parent.add(&core).expect("a parent");
        let parent = mdev::Parent::register(&core, &parent, Driver::new(2)).expect("types");
        let names: Vec<&str> = parent.type_names().collect();
        assert_eq!(names, ["mdpy-vga", "mdpy-xga", "mdpy-hd"]);
        assert_eq!(parent.device_api(), "vfio-pci");
        assert_eq!(parent.pretty_name(2), Some("mdpy-hd"));
        assert_eq!(
            parent.description(0).as_deref(),
            Some("virtual display, 640x480 framebuffer")
        );
        assert_eq!(parent.available_instances(0), Some(2));

        let uuid = |n: u8| format!("4c0ffee0-0000-4000-8000-00000000000{n}");
        let first = parent.create_text(0, uuid(1).as_bytes()).expect("one");
        parent.create_text(2, uuid(2).as_bytes()).expect("two");
        assert_eq!(parent.available_instances(1), Some(0));
        let third = parent.create_text(1, uuid(3).as_bytes());
        assert_eq!(third.err(), Some(Errno::USERS));

        let device = first.vfio_device().expect("it is registered");
        assert_eq!(device.attributes(), [("vendor", "resolution")]);
        assert_eq!(
            device.show("vendor", "resolution").as_deref(),
            Ok("640x480\n")
        );
        assert_eq!(device.show("vendor", "colour"), Err(Errno::NOENT));
    }
}
