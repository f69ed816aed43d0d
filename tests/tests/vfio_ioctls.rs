//! rust-vmm's `vfio-ioctls`, the library of several virtual machine monitors, with an mtty and an
//! mdpy by its way of character devices and iommufd. The library looks in `/dev`, so each test runs
//! itself again under `vfioctl run`.

#![expect(
    unsafe_code,
    reason = "the library's descriptors are raw, and mapped memory is what is tested"
)]

use std::os::fd::AsRawFd as _;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use iommufd_ioctls::IommuFd;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::mm::MapFlags;
use rustix::mm::ProtFlags;
use vfio_bindings::bindings::vfio;
use vfio_ioctls::VfioDevice;
use vfio_ioctls::VfioIommufd;
use vfio_ioctls::VfioOps;
use vfiod_tests::daemon;
use vfiod_tests::inside::Container;
use vfiod_tests::inside::UUID;
use vfiod_tests::inside::inside;
use vfiod_tests::skip;
use vfiod_tests::skip::NO_PASSTHROUGH;
use vfiod_tests::skip::kernel_has_passthrough;
use vmm_sys_util::eventfd::EFD_NONBLOCK;
use vmm_sys_util::eventfd::EventFd;

/// How long an interrupt may take.
const LIMIT: Duration = Duration::from_secs(20);

const BAR0: u32 = vfio::VFIO_PCI_BAR0_REGION_INDEX;
const CONFIG: u32 = vfio::VFIO_PCI_CONFIG_REGION_INDEX;
const INTX: u32 = vfio::VFIO_PCI_INTX_IRQ_INDEX;
const MSI: u32 = vfio::VFIO_PCI_MSI_IRQ_INDEX;
const READ_WRITE: u32 = vfio::VFIO_REGION_INFO_FLAG_READ | vfio::VFIO_REGION_INFO_FLAG_WRITE;

fn address_space() -> Arc<VfioIommufd> {
    let iommufd = Arc::new(IommuFd::new().expect("/dev/iommu opens"));
    Arc::new(VfioIommufd::new(iommufd, None, None).expect("an address space"))
}

fn open(space: &Arc<VfioIommufd>) -> vfio_ioctls::Result<VfioDevice> {
    let path = PathBuf::from("/sys/bus/mdev/devices").join(UUID);
    let ops: Arc<dyn VfioOps> = Arc::clone(space) as _;
    VfioDevice::new(&path, ops, true)
}

/// A little-endian number of up to four bytes, read in one go.
fn read(device: &VfioDevice, region: u32, at: u64, size: usize) -> u32 {
    let mut bytes = [0; 4];
    let read = &mut bytes[..size];
    // The library does not say when a read fails, but leaves what was there.
    read.fill(0xcd);
    device.region_read(region, read, at);
    u32::from_le_bytes(bytes)
}

fn write(device: &VfioDevice, region: u32, at: u64, bytes: &[u8]) {
    device.region_write(region, bytes, at);
}

fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("an eventfd")
}

/// How often it has been signalled, which is waited for.
fn count(event: &EventFd) -> u64 {
    // SAFETY: the eventfd is open as long as it is borrowed here.
    let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    let limit = rustix::event::Timespec::try_from(LIMIT).expect("it is short");
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    rustix::event::poll(&mut fds, Some(&limit)).expect("it can be waited for");
    event.read().expect("it has been signalled")
}

/// What a device does it does before the access returns.
fn assert_silent(event: &EventFd) {
    let error = event.read().expect_err("nothing has been signalled");
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
}

/// Memory of this process that a device may get at.
struct Shared {
    at: *mut u8,
    len: usize,
}

impl Shared {
    fn anonymous(len: usize) -> Self {
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: the kernel chooses the place; nothing that is there is replaced.
        let at = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), len, prot, flags) };
        Self {
            at: at.expect("memory").cast(),
            len,
        }
    }

    fn region(device: &VfioDevice, index: u32) -> Self {
        let len = usize::try_from(device.get_region_size(index)).expect("it fits");
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        let offset = device.get_region_offset(index);
        // SAFETY: the device is open, and the kernel chooses the place.
        let at = unsafe {
            let fd = BorrowedFd::borrow_raw(device.as_raw_fd());
            rustix::mm::mmap(ptr::null_mut(), len, prot, flags, fd, offset)
        };
        Self {
            at: at.expect("the region is mapped").cast(),
            len,
        }
    }

    fn place(&self, at: usize) -> *mut u8 {
        assert!(at < self.len);
        self.at.wrapping_add(at)
    }

    fn get(&self, at: usize) -> u8 {
        // SAFETY: `place` is inside the mapping, which lives as long as `self`.
        unsafe { self.place(at).read_volatile() }
    }

    fn set(&self, at: usize, byte: u8) {
        // SAFETY: as in `get`; nobody has a reference to this memory.
        unsafe { self.place(at).write_volatile(byte) }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and all access goes through it.
        let result = unsafe { rustix::mm::munmap(self.at.cast(), self.len) };
        result.expect("what was mapped is unmapped");
    }
}

/// What is the same for both: who has it, and its memory for DMA.
fn assert_device(space: &Arc<VfioIommufd>, device: &VfioDevice, id: u32, migration: Option<u64>) {
    assert_eq!(read(device, CONFIG, 0, 4), id);
    assert_eq!(device.get_region_size(CONFIG), 256);
    assert_eq!(device.get_region_flags(CONFIG), READ_WRITE);
    for index in 2..CONFIG {
        assert_eq!(device.get_region_size(index), 0, "region {index}");
        assert_eq!(device.get_region_flags(index), 0, "region {index}");
    }
    assert!(device.get_region_caps(BAR0).is_empty());
    let said = device.query_migration_support();
    let said = said.expect("the question is answered");
    assert_eq!(said, migration);
    assert!(device.iommufd_dev_id().is_some_and(|id| id != 0));

    assert!(open(space).is_err(), "one file has it");
    let memory = Shared::anonymous(1 << 20);
    // SAFETY: the memory is only accessed through raw pointers, and outlives its mapping.
    unsafe {
        let mapped = space.vfio_dma_map(1 << 32, memory.len, memory.at);
        mapped.expect("memory is mapped");
        let again = space.vfio_dma_map(1 << 32, 4096, memory.at);
        assert!(again.is_err(), "the addresses are taken");
        let crooked = space.vfio_dma_map(1, 4096, memory.at);
        assert!(crooked.is_err(), "no page begins there");
    }
    let part = space.vfio_dma_unmap(1 << 32, 4096);
    assert!(part.is_err(), "a mapping goes as a whole");
    space
        .vfio_dma_unmap(1 << 32, memory.len)
        .expect("and it goes");
    device.detach_hwpt().expect("it can be detached");
    device
        .attach_hwpt(space.ioas().id())
        .expect("and attached again");
}

#[test]
fn a_serial_card() {
    if !inside("a_serial_card", "mtty-2", Container::Native) {
        return;
    }
    let space = address_space();
    let card = open(&space).expect("the card opens");
    let migration =
        vfio::VFIO_MIGRATION_STOP_COPY | vfio::VFIO_MIGRATION_P2P | vfio::VFIO_MIGRATION_PRE_COPY;
    assert_device(&space, &card, 0x3253_4348, Some(u64::from(migration)));
    for port in [0, 1] {
        assert_eq!(card.get_region_size(port), 8);
        assert_eq!(card.get_region_flags(port), READ_WRITE);
    }
    let irqs: Vec<Option<u32>> = (0..5)
        .map(|index| card.get_irq_info(index).map(|irq| irq.count))
        .collect();
    assert_eq!(irqs, [Some(1), Some(1), Some(0), None, Some(1)]);
    assert_eq!(card.max_interrupts(), 1);

    // The size of its ports, as every system asks for it.
    for port in [0_u32, 1] {
        let bar = u64::from(0x10 + 4 * port);
        write(&card, CONFIG, bar, &[0xff; 4]);
        assert_eq!(read(&card, CONFIG, bar, 4), 0xffff_fff9);
        write(&card, CONFIG, bar, &(0xc000 + 8 * port).to_le_bytes());
        assert_eq!(read(&card, CONFIG, bar, 4), 0xc001 + 8 * port);
    }

    for port in [0, 1] {
        // Words of eight bits, the interrupt let through, one for each byte received.
        for (register, byte) in [(3, 0x03), (4, 0x08), (1, 0x01)] {
            write(&card, port, register, &[byte]);
        }
        let event = eventfd();
        card.enable_irq(INTX, vec![&event]).expect("INTx is on");
        assert_silent(&event);
        write(&card, port, 0, b"V");
        assert_eq!(count(&event), 1);
        assert_eq!(read(&card, port, 2, 1), 0x04, "a byte has been received");
        assert_silent(&event);
        card.unmask_irq(INTX).expect("it can be unmasked");
        assert_eq!(count(&event), 1, "the line was still up");
        assert_eq!(read(&card, port, 0, 1), u32::from(b'V'));
        card.unmask_irq(INTX).expect("it can be unmasked");
        assert_silent(&event);

        let resample = eventfd();
        card.set_irq_resample_fd(INTX, vec![&resample])
            .expect("an eventfd can unmask");
        write(&card, port, 0, b"F");
        assert_eq!(count(&event), 1);
        resample.write(1).expect("it takes a signal");
        assert_eq!(count(&event), 1);
        assert_eq!(read(&card, port, 0, 1), u32::from(b'F'));
        let other = eventfd();
        let two = card.enable_msi(vec![&other]);
        assert!(two.is_err(), "one kind at a time");
        card.disable_irq(INTX).expect("INTx is off");

        card.enable_msi(vec![&other]).expect("MSI is on");
        write(&card, port, 0, b"I");
        assert_eq!(count(&other), 1);
        assert_eq!(read(&card, port, 0, 1), u32::from(b'I'));
        card.trigger_irq(MSI, 0).expect("it can be caused");
        assert_eq!(count(&other), 1);
        assert_silent(&event);
        card.disable_msi().expect("MSI is off");
        write(&card, port, 1, &[0]);
    }

    assert_eq!(read(&card, 1, 3, 1), 0x03);
    card.reset();
    assert_eq!(read(&card, 1, 3, 1), 0, "it has been reset");
    drop(card);
    let again = open(&space).expect("it opens again");
    assert_eq!(read(&again, CONFIG, 0, 2), 0x4348);
}

#[test]
fn a_display() {
    if !inside("a_display", "mdpy-xga", Container::Native) {
        if !kernel_has_passthrough() {
            skip(NO_PASSTHROUGH);
        }
        return;
    }
    let space = address_space();
    let display = open(&space).expect("the display opens");
    assert_device(&space, &display, 0x000f_1b36, None);
    let size = display.get_region_size(BAR0);
    assert_eq!(size, 4 << 20);
    let irqs = (0..5).map(|index| display.get_irq_info(index).map(|irq| irq.count));
    assert_eq!(irqs.collect::<Vec<_>>(), [Some(0); 5]);
    let unused = eventfd();
    assert!(display.enable_msi(vec![&unused]).is_err());

    // Format and size of the picture.
    let words = [0x44, 0x48, 0x4c].map(|at| read(&display, CONFIG, at, 4));
    assert_eq!(words, [u32::from_le_bytes(*b"XR24"), 1024, 768]);
    let row = |y: u64| 1024 * 4 * y;
    assert_eq!(read(&display, BAR0, row(0), 4), 0, "dark above");
    assert_eq!(
        read(&display, BAR0, row(767), 4),
        0xfefe_fefe,
        "bright below"
    );
    write(&display, BAR0, row(5) + 1, b"abc");
    assert_eq!(read(&display, BAR0, row(5) + 2, 2), 0x6362);

    let flags = display.get_region_flags(BAR0);
    if !kernel_has_passthrough() {
        assert_eq!(flags, READ_WRITE, "it cannot be mapped");
        return;
    }
    assert_eq!(flags, READ_WRITE | vfio::VFIO_REGION_INFO_FLAG_MMAP);
    let picture = Shared::region(&display, BAR0);
    let bytes: Vec<u8> = (0..3)
        .map(|n| picture.get(row(5) as usize + 1 + n))
        .collect();
    assert_eq!(bytes, b"abc", "what the daemon has written is here");
    // Each page; what is read is what the daemon sees.
    for at in (0..picture.len).step_by(4096) {
        let byte = (at >> 12) as u8 ^ 0xa5;
        picture.set(at, byte);
        assert_eq!(read(&display, BAR0, at as u64, 1), u32::from(byte), "{at}");
    }
    picture.set(picture.len - 1, 0x5a);
    assert_eq!(read(&display, BAR0, size - 1, 1), 0x5a);
    // The daemon draws, and the mapping shows it.
    display.reset();
    assert_eq!(picture.get(0), 0);
    assert_eq!(picture.get(row(767) as usize), 0xfe);

    // The picture outlives its viewer.
    picture.set(0, 0x11);
    drop(picture);
    drop(display);
    let again = daemon_has_noticed(&space);
    assert_eq!(read(&again, BAR0, 0, 1), 0x11);
}

/// The display opened once more: the end of a mapping is noticed soon, not at once.
fn daemon_has_noticed(space: &Arc<VfioIommufd>) -> VfioDevice {
    let mut opened = None;
    daemon::until("the display can be opened again", LIMIT, || {
        opened = open(space).ok();
        opened.is_some()
    });
    opened.expect("it was")
}
