//! Devices whose client gave them memory that is none: behind a userfaultfd that nobody serves, or
//! another device's. The kernel does not wait for the first on behalf of `/proc/PID/mem`
//! (`fs/userfaultfd.c`, `handle_userfault`, without `FAULT_FLAG_ALLOW_RETRY`), so the access ends in
//! `EFAULT`.

#![expect(
    unsafe_code,
    reason = "a mapping for userfaultfd, and its two ioctls, have no safe form"
)]

use client_process::{Caller as Thread, Memory};
use rustix::ioctl::{Updater, ioctl, opcode};
use rustix::mm::{MapFlags, ProtFlags, UserfaultfdFlags, mmap_anonymous, userfaultfd};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, SystemTime};
use vfio_core::caller::{Caller, Capability, FileObject};
use vfio_core::container::Container;
use vfio_core::device::{
    DeviceFile, DeviceInfo, DeviceOps, Dma, InitCx, IrqInfo, OpenCx, Opener, RegionInfo, RegionPos,
};
use vfio_core::iommufd::Iommufd;
use vfio_core::irq::SetIrqs;
use vfio_core::model::{BusDevice, VfioDriver, faux};
use vfio_core::{Config, Core, Errno, Result};
use vfio_uapi::UserMemory;
use vfio_uapi::container::{DmaMap, DmaUnmap, MapFlags as DmaFlags};
use vfio_uapi::device::{AttachIommufdPt, BindIommufd, InfoFlags, IrqFlags, RegionFlags};
use vfio_uapi::ioctl as cmd;
use vfio_uapi::iommufd::{IoasAlloc, IoasMap, IoasUnmap, MapFlags as IovaFlags};

const PAGE: usize = 4096;

/// Longer than anything here takes, unless it hangs.
const SOON: Duration = Duration::from_secs(20);

/// Reading the device reads client memory at the offset.
struct Reader;

impl DeviceOps for Reader {
    const NAME: &'static str = "reader";
    type Args = ();
    type Session = Dma;

    fn init(_cx: &InitCx<'_>, (): ()) -> Result<Self> {
        Ok(Reader)
    }
    fn open(&self, cx: &OpenCx<'_>) -> Result<Dma> {
        Ok(cx.dma().clone())
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
            size: 1 << 20,
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
    fn read(&self, dma: &Dma, at: RegionPos, buf: &mut [u8]) -> Result<usize> {
        dma.read(at.offset, buf).map(|()| buf.len())
    }
    fn write(&self, _dma: &Dma, _at: RegionPos, _data: &[u8]) -> Result<usize> {
        Err(Errno::INVAL)
    }
    fn set_irqs(&self, _dma: &Dma, _request: SetIrqs<'_>) -> Result<u32> {
        Err(Errno::NOTTY)
    }
}

struct Driver;

impl VfioDriver for Driver {
    type Ops = Reader;
    fn name(&self) -> &'static str {
        "reader"
    }
    fn args(&self, _device: &Arc<BusDevice>) -> Result {
        Ok(())
    }
}

/// This thread, as a client with one context and one container. Descriptor 1 is the container.
struct Us(Arc<Iommufd>, Arc<Container>);

impl Us {
    fn thread(&self) -> Thread {
        Thread::new(rustix::thread::gettid().as_raw_nonzero().get()).unwrap()
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
        true
    }
    fn get_fd(&self, fd: i32) -> Result<OwnedFd> {
        self.thread().get_fd(fd)
    }
    fn file(&self, fd: i32) -> Result<FileObject> {
        Ok(match fd {
            1 => FileObject::Container(Arc::clone(&self.1)),
            _ => FileObject::Iommufd(Arc::clone(&self.0)),
        })
    }
    fn memory(&self) -> Result<Arc<Memory>> {
        Memory::of(self.thread())
    }
}

fn at<T>(value: &mut T) -> u64 {
    (&raw mut *value).expose_provenance() as u64
}

fn map(us: &Us, ioas_id: u32, user_va: u64, iova: u64) -> Result<u32> {
    let mut arg = IoasMap {
        size: 40,
        flags: IovaFlags::FIXED_IOVA | IovaFlags::READABLE,
        ioas_id,
        reserved: 0,
        user_va,
        length: PAGE as u64,
        iova,
    };
    us.0.ioctl(cmd::IOMMU_IOAS_MAP, at(&mut arg), us)
}

fn unmap(us: &Us, ioas_id: u32, iova: u64, length: u64) -> Result<u32> {
    let mut arg = IoasUnmap {
        size: 24,
        ioas_id,
        iova,
        length,
    };
    us.0.ioctl(cmd::IOMMU_IOAS_UNMAP, at(&mut arg), us)
}

fn ioas(us: &Us) -> u32 {
    let mut arg = IoasAlloc {
        size: 12,
        ..Default::default()
    };
    us.0.ioctl(cmd::IOMMU_IOAS_ALLOC, at(&mut arg), us).unwrap();
    std::hint::black_box(&arg).out_ioas_id
}

fn attach(file: &DeviceFile, us: &Us, pt_id: u32) -> Result<u32> {
    let mut arg = AttachIommufdPt {
        argsz: 16,
        pt_id,
        ..Default::default()
    };
    file.ioctl(cmd::VFIO_DEVICE_ATTACH_IOMMUFD_PT, at(&mut arg), us)
}

/// A device bound to the context and attached.
fn open(core: &Core, name: &str, us: &Us, ioas: u32) -> (faux::Device, Arc<DeviceFile>) {
    let made = faux::Device::create(core, name, Driver).unwrap();
    let device = core.devices().pop().unwrap();
    let file = device.open_cdev(opener()).unwrap();
    let mut bind = BindIommufd {
        argsz: 24,
        ..Default::default()
    };
    file.ioctl(cmd::VFIO_DEVICE_BIND_IOMMUFD, at(&mut bind), us)
        .unwrap();
    attach(&file, us, ioas).unwrap();
    (made, file)
}

fn map_dma(us: &Us, vaddr: u64, iova: u64) -> Result<u32> {
    let mut arg = DmaMap {
        argsz: 32,
        flags: DmaFlags::READ | DmaFlags::WRITE,
        vaddr,
        iova,
        size: PAGE as u64,
    };
    us.1.ioctl(cmd::VFIO_IOMMU_MAP_DMA, at(&mut arg), us)
}

fn unmap_dma(us: &Us, iova: u64) -> Result<u64> {
    let mut arg = DmaUnmap {
        argsz: 24,
        iova,
        size: PAGE as u64,
        ..Default::default()
    };
    us.1.ioctl(cmd::VFIO_IOMMU_UNMAP_DMA, at(&mut arg), us)?;
    Ok(std::hint::black_box(&arg).size)
}

/// A device opened through its group, which is in the container, with a backend.
fn open_by_group(core: &Core, name: &str, us: &Us) -> (faux::Device, Arc<DeviceFile>) {
    let made = faux::Device::create(core, name, Driver).unwrap();
    let device = core.devices().pop().unwrap();
    let group = core.groups().pop().unwrap().open(opener()).unwrap();
    let mut fd = 1;
    group
        .ioctl(cmd::VFIO_GROUP_SET_CONTAINER, at(&mut fd), us)
        .unwrap();
    us.1.ioctl(cmd::VFIO_SET_IOMMU, 3, us).unwrap();
    let file = device.open_cdev(opener()).unwrap();
    file.open_by_group(&group, name.as_bytes(), opener())
        .unwrap();
    // The device keeps it open.
    group.release();
    (made, file)
}

fn opener() -> Opener {
    Opener {
        pid: std::process::id(),
        comm: "test".into(),
        since: SystemTime::now(),
        node: None,
    }
}

/// `struct uffdio_api` and `struct uffdio_register` (`include/uapi/linux/userfaultfd.h`).
const UFFDIO_API: rustix::ioctl::Opcode = opcode::read_write::<[u64; 3]>(0xaa, 0x3f);
const UFFDIO_REGISTER: rustix::ioctl::Opcode = opcode::read_write::<[u64; 4]>(0xaa, 0x00);

/// A page that makes whoever touches it wait, until the descriptor is closed. `None` where only root
/// may make one.
fn silent_page() -> Option<(u64, OwnedFd)> {
    // SAFETY: creating the descriptor touches no memory.
    let uffd = match unsafe { userfaultfd(UserfaultfdFlags::CLOEXEC) } {
        Ok(uffd) => uffd,
        Err(Errno::PERM) => return None,
        Err(errno) => panic!("{errno}"),
    };
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let page = unsafe { mmap_anonymous(std::ptr::null_mut(), PAGE, prot, MapFlags::PRIVATE) };
    let page = page.unwrap().expose_provenance() as u64;
    let mut api = [0xaa_u64, 0, 0];
    // SAFETY: the structure is as long as the command says.
    unsafe { ioctl(&uffd, Updater::<UFFDIO_API, _>::new(&mut api)) }.unwrap();
    const MISSING: u64 = 1;
    let mut register = [page, PAGE as u64, MISSING, 0];
    // SAFETY: as above; nothing of this program looks at the page.
    unsafe { ioctl(&uffd, Updater::<UFFDIO_REGISTER, _>::new(&mut register)) }.unwrap();
    Some((page, uffd))
}

#[test]
fn dma_to_memory_of_a_silent_userfaultfd() {
    let Some((silent, uffd)) = silent_page() else {
        vfiod_tests::skip("userfaultfd for kernel accesses needs root");
        return;
    };
    let core = Core::new(Config::default());
    let us = Us(Iommufd::new(), Container::new());
    let first = ioas(&us);
    let mut good = vec![7u8; 2 * PAGE];
    let good = at(&mut good[0]).next_multiple_of(PAGE as u64);
    map(&us, first, silent, 0).unwrap();
    map(&us, first, good, 0x10000).unwrap();
    let (_made_one, one) = open(&core, "one", &us, first);
    let (_made_two, two) = open(&core, "two", &us, first);
    // On a thread of its own: if it waited after all, this test would say so and not hang.
    let (done, ended) = mpsc::channel();
    let file = Arc::clone(&one);
    let reader = std::thread::spawn(move || done.send(file.read(0, &mut [0; 8])));
    let mut buf = [0; 8];
    assert_eq!(two.read(0x10000, &mut buf), Ok(8), "the other device");
    assert_eq!(buf, [7; 8]);
    assert_eq!(
        ended.recv_timeout(SOON),
        Ok(Err(Errno::FAULT)),
        "not waited for"
    );
    reader.join().unwrap().unwrap();
    assert_eq!(unmap(&us, first, 0, u64::MAX), Ok(0), "nothing hangs in it");
    drop(uffd);
    map(&us, first, silent, 0).unwrap();
    assert_eq!(one.read(0, &mut buf), Ok(8), "it answers now");
    assert_eq!(buf, [0; 8]);
    two.release();
    one.release();
    us.0.close();
}

#[test]
fn dma_of_a_container_to_memory_of_a_silent_userfaultfd() {
    let Some((silent, uffd)) = silent_page() else {
        vfiod_tests::skip("userfaultfd for kernel accesses needs root");
        return;
    };
    let core = Core::new(Config::default());
    let us = Us(Iommufd::new(), Container::new());
    let (_made, file) = open_by_group(&core, "one", &us);
    map_dma(&us, silent, 0).unwrap();
    // On a thread of its own: if it waited after all, this test would say so and not hang.
    let (done, ended) = mpsc::channel();
    let reading = Arc::clone(&file);
    let reader = std::thread::spawn(move || done.send(reading.read(0, &mut [0; 8])));
    assert_eq!(ended.recv_timeout(SOON), Ok(Err(Errno::FAULT)));
    reader.join().unwrap().unwrap();
    assert_eq!(unmap_dma(&us, 0), Ok(PAGE as u64), "nothing hangs in it");
    drop(uffd);
    map_dma(&us, silent, 0).unwrap();
    assert_eq!(file.read(0, &mut [0; 8]), Ok(8), "it answers now");
    us.1.close();
    file.release();
    assert_eq!(map_dma(&us, silent, 0), Err(Errno::INVAL), "no backend");
}

/// A client's mapping of a device's memory: a container takes it, iommufd does not.
#[test]
fn dma_to_a_devices_memory() {
    let memory = dma_memory::DeviceMemory::create(PAGE as u64).unwrap();
    memory.write(0, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
    // An open file of its own, as a client's node is.
    let number = std::os::fd::AsRawFd::as_raw_fd(&memory.backing_fd());
    let opened = std::fs::File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/self/fd/{number}"))
        .unwrap();
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    let null = std::ptr::null_mut();
    // SAFETY: a fresh mapping at an address of the kernel's choice; nothing here looks into it.
    let mapped = unsafe { rustix::mm::mmap(null, PAGE, prot, MapFlags::SHARED, &opened, 0) };
    let mapped = mapped.unwrap().expose_provenance() as u64;
    drop(opened);
    let core = Core::new(Config::default());
    let us = Us(Iommufd::new(), Container::new());
    let (_one, grouped) = open_by_group(&core, "one", &us);
    map_dma(&us, mapped, 0).unwrap();
    let mut buf = [0; 8];
    assert_eq!(grouped.read(0, &mut buf), Ok(8));
    assert_eq!(buf, [1, 2, 3, 4, 5, 6, 7, 8]);
    let first = ioas(&us);
    map(&us, first, mapped, 0).unwrap();
    let (_two, bound) = open(&core, "two", &us, first);
    assert_eq!(bound.read(0, &mut buf), Err(Errno::FAULT));
    // A mapping of it does not keep it in use, and goes with it.
    assert!(memory.has_other_openers(), "the client's mapping does");
    memory.revoke();
    assert_eq!(grouped.read(0, &mut buf), Err(Errno::FAULT));
    // SAFETY: what was mapped above, and nobody has a reference into it.
    unsafe { rustix::mm::munmap(std::ptr::with_exposed_provenance_mut(mapped as usize), PAGE) }
        .unwrap();
    assert!(!memory.has_other_openers(), "but DMA does not");
    bound.release();
    grouped.release();
}
