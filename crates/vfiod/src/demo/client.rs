//! The program that uses the devices: a VFIO client like any other, only that it tells what it
//! does. It is a process of its own where there are nodes, else a thread.

use super::reach::{Device, Iommu, Reach};
use super::sys::Mapping;
use anyhow::{Context as _, bail};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::io::Errno;
use std::io::{BufRead, BufReader, Read, Write};
use vfio_uapi::device::{
    AttachIommufdPt, BindIommufd, Info, IrqSet, IrqSetFlags, RegionFlags, RegionInfo,
};
use vfio_uapi::ioctl::{DeviceIoctl, IommufdIoctl};
use vfio_uapi::iommufd::{IoasAlloc, IoasMap, MapFlags};
use vfio_uapi::pci::irq;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Begins a line that is for the host's program, not for the audience.
pub(super) const MARK: char = '@';

/// What a client is told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Part {
    /// Talk through the serial card; leave when asked for the second time.
    Serial,
    /// Draw into the display; stay until cut off.
    Display,
}

/// The line to the host.
pub(super) struct Link {
    input: BufReader<Box<dyn Read + Send>>,
    output: Box<dyn Write + Send>,
}

impl Link {
    pub(super) fn new(
        input: impl Read + Send + 'static,
        output: impl Write + Send + 'static,
    ) -> Link {
        Link {
            input: BufReader::new(Box::new(input)),
            output: Box::new(output),
        }
    }

    fn say(&mut self, text: &str) -> anyhow::Result<()> {
        writeln!(self.output, "{text}")?;
        Ok(self.output.flush()?)
    }

    /// Tells the host that a point is reached, and waits until it says to go on.
    fn meet(&mut self, point: &str) -> anyhow::Result<()> {
        self.mark(point)?;
        let mut line = String::new();
        if self.input.read_line(&mut line)? == 0 {
            bail!("the demo went away");
        }
        Ok(())
    }

    fn mark(&mut self, point: &str) -> anyhow::Result<()> {
        self.say(&format!("{MARK}{point}"))
    }
}

/// Plays a part to its end.
pub(super) fn play(part: Part, reach: &Reach, name: &str, link: &mut Link) -> anyhow::Result<()> {
    match part {
        Part::Serial => serial(reach, name, link),
        Part::Display => display(reach, name, link),
    }
}

/// An open, bound device with an address space. Dropped in the order a program closes them.
struct Session {
    device: Device,
    _memory: Mapping,
    _iommu: Iommu,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct IrqSetFd {
    head: IrqSet,
    fd: i32,
}

fn open(reach: &Reach, name: &str, link: &mut Link) -> anyhow::Result<Session> {
    let path = reach.describe(&format!("vfio/devices/{name}"));
    let device = reach.device(name).with_context(|| path.clone())?;
    link.say(&format!("opens {path}; an open file may do nothing yet"))?;
    let refused = device.read(0, &mut [0; 4]);
    if refused != Err(Errno::INVAL) {
        bail!("a read before BIND gave {refused:?}");
    }
    let iommu = reach.iommu().context("iommu")?;
    let mut bind = BindIommufd {
        argsz: size_of::<BindIommufd>() as u32,
        iommufd: iommu.number(),
        ..Default::default()
    };
    device
        .ioctl(DeviceIoctl::BindIommufd.cmd(), &mut bind)
        .context("BIND")?;
    let mut ioas = IoasAlloc {
        size: size_of::<IoasAlloc>() as u32,
        ..Default::default()
    };
    iommu
        .ioctl(IommufdIoctl::IoasAlloc.cmd(), &mut ioas)
        .context("IOAS_ALLOC")?;
    let memory = Mapping::anonymous(64 << 10)?;
    let mut map = IoasMap {
        size: size_of::<IoasMap>() as u32,
        flags: MapFlags::FIXED_IOVA | MapFlags::READABLE | MapFlags::WRITEABLE,
        ioas_id: ioas.out_ioas_id,
        user_va: memory.address(),
        length: memory.len() as u64,
        iova: 0x10_0000,
        ..Default::default()
    };
    iommu
        .ioctl(IommufdIoctl::IoasMap.cmd(), &mut map)
        .context("IOAS_MAP")?;
    let mut attach = AttachIommufdPt {
        argsz: size_of::<AttachIommufdPt>() as u32,
        pt_id: ioas.out_ioas_id,
        ..Default::default()
    };
    device
        .ioctl(DeviceIoctl::AttachIommufdPt.cmd(), &mut attach)
        .context("ATTACH")?;
    link.say("BIND_IOMMUFD: now it is the device's user; 64 KiB of its memory are mapped for DMA")?;
    let mut info = Info {
        argsz: size_of::<Info>() as u32,
        ..Default::default()
    };
    device
        .ioctl(DeviceIoctl::GetInfo.cmd(), &mut info)
        .context("GET_INFO")?;
    let config = region(&device, 7)?;
    let mut ids = [0; 4];
    device
        .read(config.offset, &mut ids)
        .context("config space")?;
    let [v0, v1, d0, d1] = ids;
    link.say(&format!(
        "{} regions, {} interrupt indexes; config space says {:04x}:{:04x}",
        info.num_regions,
        info.num_irqs,
        u16::from_le_bytes([v0, v1]),
        u16::from_le_bytes([d0, d1]),
    ))?;
    Ok(Session {
        device,
        _memory: memory,
        _iommu: iommu,
    })
}

fn region(device: &Device, index: u32) -> anyhow::Result<RegionInfo> {
    let mut info = RegionInfo {
        argsz: size_of::<RegionInfo>() as u32,
        index,
        ..Default::default()
    };
    device
        .ioctl(DeviceIoctl::GetRegionInfo.cmd(), &mut info)
        .context("GET_REGION_INFO")?;
    Ok(info)
}

/// Has an interrupt delivered to an eventfd.
fn take_irq(device: &Device, index: u32) -> anyhow::Result<OwnedFd> {
    let fd = eventfd(0, EventfdFlags::CLOEXEC)?;
    let mut set = IrqSetFd {
        head: IrqSet {
            argsz: size_of::<IrqSetFd>() as u32,
            flags: IrqSetFlags::DATA_EVENTFD | IrqSetFlags::ACTION_TRIGGER,
            index,
            start: 0,
            count: 1,
        },
        fd: fd.as_raw_fd(),
    };
    device
        .ioctl(DeviceIoctl::SetIrqs.cmd(), &mut set)
        .context("SET_IRQS")?;
    Ok(fd)
}

fn unmask(device: &Device) -> anyhow::Result<()> {
    let mut set = IrqSet {
        argsz: size_of::<IrqSet>() as u32,
        flags: IrqSetFlags::DATA_NONE | IrqSetFlags::ACTION_UNMASK,
        index: irq::INTX,
        start: 0,
        count: 1,
    };
    device
        .ioctl(DeviceIoctl::SetIrqs.cmd(), &mut set)
        .context("unmask")?;
    Ok(())
}

/// Waits for an interrupt, but not for ever.
fn wait(fd: &OwnedFd, what: &str) -> anyhow::Result<u64> {
    let mut ready = [PollFd::new(fd, PollFlags::IN)];
    let limit = Timespec {
        tv_sec: 20,
        tv_nsec: 0,
    };
    if poll(&mut ready, Some(&limit))? == 0 {
        bail!("no {what} in 20 s");
    }
    let mut times = [0; 8];
    rustix::io::read(fd, &mut times)?;
    Ok(u64::from_ne_bytes(times))
}

/// Registers of a 16550.
mod uart {
    pub(super) const DATA: u64 = 0;
    pub(super) const IER: u64 = 1;
    pub(super) const IIR_FCR: u64 = 2;
    pub(super) const LCR: u64 = 3;
    pub(super) const MCR: u64 = 4;
    pub(super) const LSR: u64 = 5;
}

fn serial(reach: &Reach, name: &str, link: &mut Link) -> anyhow::Result<()> {
    let session = open(reach, name, link)?;
    let device = &session.device;
    let port = region(device, 0)?.offset;
    let put = |register: u64, value: u8| device.write(port + register, &[value]);
    let get = |register: u64| {
        let mut value = [0];
        device.read(port + register, &mut value).map(|_| value[0])
    };
    let intx = take_irq(device, irq::INTX)?;
    let req = take_irq(device, irq::REQ)?;
    link.say("takes INTx for the port and REQ, by which a device asks to be given back")?;
    // Eight bits, FIFOs on and empty, DTR, RTS and OUT2 (the interrupt's gate), receive interrupt.
    for (register, value) in [
        (uart::LCR, 3),
        (uart::IIR_FCR, 7),
        (uart::MCR, 11),
        (uart::IER, 1),
    ] {
        put(register, value).context("programming the UART")?;
    }
    let text = "hello from a device written in Rust";
    let (mut back, mut interrupts) = (Vec::new(), 0);
    for byte in text.bytes() {
        put(uart::DATA, byte)?;
        wait(&intx, "interrupt")?;
        interrupts += 1;
        get(uart::IIR_FCR)?;
        while get(uart::LSR)? & 1 != 0 {
            back.push(get(uart::DATA)?);
        }
        unmask(device)?;
    }
    if back != text.as_bytes() {
        bail!("the port gave back {:?}", String::from_utf8_lossy(&back));
    }
    link.say(&format!(
        "sent {} bytes through the port's loopback, each by an interrupt ({interrupts}), and got back {text:?}",
        text.len(),
    ))?;
    link.mark("ready")?;
    let mut asked = wait(&req, "request")?;
    link.say("is asked to give the device back, and has something to finish first")?;
    while asked < 2 {
        asked += wait(&req, "second request")?;
    }
    link.say("is asked again, and closes it")?;
    drop(session);
    link.mark("closed")
}

fn display(reach: &Reach, name: &str, link: &mut Link) -> anyhow::Result<()> {
    let session = open(reach, name, link)?;
    let device = &session.device;
    let bar = region(device, 0)?;
    let mut mapping = None;
    if bar.flags.contains(RegionFlags::MMAP) {
        mapping = device.map(bar.offset, usize::try_from(bar.size)?).ok();
    }
    let picture = super::picture::draw();
    match &mut mapping {
        Some(mapping) => {
            for (offset, row) in &picture {
                mapping.store(*offset, row);
            }
            link.say("draws into the frame buffer, mapped: plain stores, nothing is trapped")?;
        }
        None => {
            for (offset, row) in &picture {
                device
                    .write(bar.offset + *offset as u64, row)
                    .context("drawing")?;
            }
            link.say("draws into the frame buffer with pwrite: each one is a trap")?;
        }
    }
    link.mark(if mapping.is_some() {
        "mapped"
    } else {
        "trapped"
    })?;
    link.meet("ready")?;
    let read = device.read(bar.offset, &mut [0; 4]);
    if read != Err(Errno::NODEV) {
        bail!("a read of a device that was taken away gave {read:?}");
    }
    link.say("reads once more, and gets ENODEV")?;
    if let Some(mapping) = &mapping {
        match mapping.deadly()? {
            Some(signal) if signal == libc::SIGBUS => {
                link.say("touches its mapping (in a copy of itself): SIGBUS, nothing of the device is left there")?;
            }
            other => bail!("a mapping of a device that was taken away gave {other:?}"),
        }
    }
    drop(session);
    link.mark("closed")
}
