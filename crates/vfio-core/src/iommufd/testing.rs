//! A client, its memory and devices to bind, for tests: real copies between this process and
//! itself, no mocks.

use super::Iommufd;
use crate::caller::{Caller, Capability, FileObject};
use crate::device::{
    Device, DeviceInfo, DeviceOps, Dma, GroupType, InitCx, IrqInfo, OpenCx, Opener, RegionInfo,
    RegionPos, Registration, UnregisteredDevice,
};
use crate::irq::SetIrqs;
use crate::model::{BusDevice, IommuGroup};
use crate::{Core, Errno, Result};
use client_process::Memory;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use vfio_uapi::UserMemory;
use vfio_uapi::device::{InfoFlags, IrqFlags, RegionFlags};
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub(crate) const PAGE: u64 = 4096;

/// This thread as a client. Its descriptors for contexts are what [`Us::context`] gave out, for other
/// files what [`Us::number`] did.
#[derive(Default)]
pub(crate) struct Us {
    contexts: Mutex<HashMap<i32, Arc<Iommufd>>>,
    files: Mutex<HashMap<i32, FileObject>>,
    powerless: AtomicBool,
}

impl Us {
    /// A context, and the number it goes by.
    pub(crate) fn context(&self) -> (i32, Arc<Iommufd>) {
        let mut contexts = self.contexts.lock().unwrap();
        let fd = 1000 + i32::try_from(contexts.len()).unwrap();
        let context = Iommufd::new();
        contexts.insert(fd, Arc::clone(&context));
        (fd, context)
    }

    /// A number for an open file of any kind.
    pub(crate) fn number(&self, file: FileObject) -> i32 {
        let mut files = self.files.lock().unwrap();
        let fd = 100_000 + i32::try_from(files.len()).unwrap();
        files.insert(fd, file);
        fd
    }

    /// Has no capabilities from now on.
    pub(crate) fn drop_capabilities(&self) {
        self.powerless.store(true, Ordering::SeqCst);
    }

    fn thread(&self) -> client_process::Caller {
        client_process::Caller::new(rustix::thread::gettid().as_raw_nonzero().get()).unwrap()
    }
}

impl UserMemory for Us {
    fn copy_in(&self, addr: u64, buf: &mut [u8]) -> Result {
        self.thread().copy_in(addr, buf)
    }
    fn copy_out(&self, addr: u64, buf: &[u8]) -> Result {
        self.thread().copy_out(addr, buf)
    }
}

impl Caller for Us {
    fn pid(&self) -> u32 {
        std::process::id()
    }
    fn comm(&self) -> String {
        "test".into()
    }
    fn capable(&self, _capability: Capability) -> bool {
        !self.powerless.load(Ordering::SeqCst)
    }
    fn get_fd(&self, fd: i32) -> Result<OwnedFd> {
        self.thread().get_fd(fd)
    }
    fn file(&self, fd: i32) -> Result<FileObject> {
        if fd < 0 {
            return Err(Errno::BADF);
        }
        if let Some(file) = self.files.lock().unwrap().get(&fd) {
            return Ok(file.clone());
        }
        let contexts = self.contexts.lock().unwrap();
        Ok(match contexts.get(&fd) {
            Some(context) => FileObject::Iommufd(Arc::clone(context)),
            None => FileObject::Other,
        })
    }
    fn memory(&self) -> Result<Arc<Memory>> {
        Memory::of(self.thread())
    }
}

/// A caller that gives its argument and takes no answer: its memory cannot be written.
pub(crate) struct ReadOnly<'a>(pub(crate) &'a Us);

impl UserMemory for ReadOnly<'_> {
    fn copy_in(&self, addr: u64, buf: &mut [u8]) -> Result {
        self.0.copy_in(addr, buf)
    }
    fn copy_out(&self, _addr: u64, _buf: &[u8]) -> Result {
        Err(Errno::FAULT)
    }
}

impl Caller for ReadOnly<'_> {
    fn pid(&self) -> u32 {
        self.0.pid()
    }
    fn comm(&self) -> String {
        self.0.comm()
    }
    fn capable(&self, capability: Capability) -> bool {
        self.0.capable(capability)
    }
    fn get_fd(&self, fd: i32) -> Result<OwnedFd> {
        self.0.get_fd(fd)
    }
    fn file(&self, fd: i32) -> Result<FileObject> {
        self.0.file(fd)
    }
    fn memory(&self) -> Result<Arc<Memory>> {
        self.0.memory()
    }
}

/// Where a value is, for an ioctl that reads and writes it behind the compiler's back.
pub(crate) fn address<T: ?Sized>(value: &mut T) -> u64 {
    (&raw mut *value).cast::<u8>().expose_provenance() as u64
}

/// An ioctl with a structure as argument.
pub(crate) fn call<T>(us: &Us, context: &Arc<Iommufd>, cmd: u32, arg: &mut T) -> Result<u32>
where
    T: FromBytes + IntoBytes + Immutable,
{
    let mut bytes = arg.as_bytes().to_vec();
    let done = context.ioctl(cmd, address(bytes.as_mut_slice()), us);
    *arg = T::read_from_bytes(std::hint::black_box(&bytes)).unwrap();
    done
}

/// Page-aligned memory of this process.
pub(crate) struct Pages {
    bytes: Vec<u8>,
    first: usize,
    len: usize,
}

impl Pages {
    pub(crate) fn new(number: usize) -> Pages {
        let page = PAGE as usize;
        let mut bytes = vec![0; (number + 1) * page];
        let first = (page - address(bytes.as_mut_slice()) as usize % page) % page;
        Pages {
            bytes,
            first,
            len: number * page,
        }
    }

    pub(crate) fn addr(&mut self) -> u64 {
        address(self.bytes())
    }

    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        std::hint::black_box(&mut self.bytes[self.first..][..self.len])
    }
}

/// What a test sees of its device.
#[derive(Default)]
pub(crate) struct Seen {
    /// What `dma_unmap` was told.
    pub(crate) unmaps: Mutex<Vec<(u64, u64)>>,
    pub(crate) dma: Mutex<Option<Dma>>,
    pub(crate) closes: AtomicU32,
}

pub(crate) struct Plain(Arc<Seen>);

impl DeviceOps for Plain {
    const NAME: &'static str = "plain";
    type Args = Arc<Seen>;
    type Session = ();

    fn init(_cx: &InitCx<'_>, seen: Arc<Seen>) -> Result<Self> {
        Ok(Plain(seen))
    }
    fn open(&self, cx: &OpenCx<'_>) -> Result<()> {
        *self.0.dma.lock().unwrap() = Some(cx.dma().clone());
        Ok(())
    }
    fn close(&self, (): ()) {
        self.0.closes.fetch_add(1, Ordering::SeqCst);
    }
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            flags: InfoFlags::PCI,
            num_regions: 1,
            num_irqs: 1,
        }
    }
    fn region(&self, _index: u32) -> Result<RegionInfo> {
        Ok(RegionInfo {
            size: 4,
            flags: RegionFlags::READ,
            caps: Vec::new(),
        })
    }
    fn irq(&self, _index: u32) -> Result<IrqInfo> {
        Ok(IrqInfo {
            flags: IrqFlags::EVENTFD,
            count: 1,
        })
    }
    fn read(&self, (): &(), _at: RegionPos, buf: &mut [u8]) -> Result<usize> {
        Ok(buf.len())
    }
    fn write(&self, (): &(), _at: RegionPos, data: &[u8]) -> Result<usize> {
        Ok(data.len())
    }
    fn set_irqs(&self, (): &(), _request: SetIrqs<'_>) -> Result<u32> {
        Err(Errno::NOTTY)
    }
    fn dma_unmap(&self, (): &(), iova: u64, len: u64) {
        self.0.unmaps.lock().unwrap().push((iova, len));
    }
}

/// A registered device: emulated without a group, physical in one.
pub(crate) fn device(
    core: &Core,
    name: &str,
    group: Option<&Arc<IommuGroup>>,
) -> (Registration, Arc<Seen>) {
    let seen = Arc::new(Seen::default());
    let parent = BusDevice::new("/devices/virtual/test", name, None);
    if let Some(group) = group {
        parent.join_iommu_group(group).unwrap();
    }
    let kind = match group {
        Some(_) => GroupType::Physical,
        None => GroupType::Emulated,
    };
    let made = UnregisteredDevice::<Plain>::alloc(core, &parent, Arc::clone(&seen)).unwrap();
    let registration = made.register(kind).map_err(|(_, errno)| errno).unwrap();
    (registration, seen)
}

/// An opener's name.
pub(crate) fn opener() -> Opener {
    Opener {
        pid: std::process::id(),
        comm: "test".into(),
        since: std::time::SystemTime::now(),
        node: None,
    }
}

/// The device of a registration, to bind.
pub(crate) fn of(registration: &Registration) -> &Device {
    registration.device()
}

/// Mappers, unmappers and devices on the same addresses, `rounds` times. A page is written to only
/// while it is mapped: once an unmap has returned, its memory does not change. `write` goes through a
/// device, whose error is `hole` where nothing is mapped; `map` has a page of memory and its IOVA.
pub(crate) fn no_write_after_unmap(
    rounds: u64,
    hole: Errno,
    write: impl Fn(u64, &[u8]) -> Result + Sync,
    map: impl Fn(u64, u64) -> Result + Sync,
    unmap: impl Fn(u64) -> Result<u64> + Sync,
) {
    let stop = AtomicBool::new(false);
    let writes = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut value = 0u8;
                while !stop.load(Ordering::Relaxed) {
                    value = value.wrapping_add(1);
                    for page in 0..3 {
                        match write(page * PAGE + 2048, &[value; 2048]) {
                            Ok(()) => _ = writes.fetch_add(1, Ordering::Relaxed),
                            Err(errno) if errno == hole || errno == Errno::BUSY => {}
                            Err(errno) => panic!("{errno}"),
                        }
                    }
                }
            });
        }
        let mappers: Vec<_> = (0..3)
            .map(|page| {
                let (map, unmap) = (&map, &unmap);
                scope.spawn(move || {
                    let mut memory = Pages::new(1);
                    let va = memory.addr();
                    for _ in 0..rounds {
                        map(va, page * PAGE).unwrap();
                        std::thread::yield_now();
                        // A writer that is not scheduled for long looks like one that hangs.
                        let unmapped = loop {
                            match unmap(page * PAGE) {
                                Err(Errno::BUSY) => std::thread::yield_now(),
                                done => break done,
                            }
                        };
                        assert_eq!(unmapped, Ok(PAGE));
                        let before = memory.bytes().to_vec();
                        std::thread::yield_now();
                        assert!(memory.bytes() == before, "written to after the unmap");
                    }
                })
            })
            .collect();
        let failed = mappers.into_iter().any(|mapper| mapper.join().is_err());
        stop.store(true, Ordering::Relaxed);
        assert!(!failed);
    });
    assert!(writes.load(Ordering::Relaxed) > 0);
}
