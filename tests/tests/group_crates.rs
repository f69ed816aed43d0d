//! Libraries of Rust that know groups and `/dev/vfio/vfio`: rust-vmm's `vfio-ioctls`, and `pci-driver`.
//! Once with VFIO's own container, once with iommufd's in its place.

#![expect(
    unsafe_code,
    reason = "mapping memory for a device is unsafe in both libraries"
)]

use std::os::fd::AsRawFd as _;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pci_driver::backends::vfio::VfioPciDevice;
use pci_driver::device::PciDevice as _;
use pci_driver::regions::PciRegion as _;
use pci_driver::regions::Permissions;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use vfio_bindings::bindings::vfio;
use vfio_ioctls::VfioContainer;
use vfio_ioctls::VfioDevice;
use vfio_ioctls::VfioOps;
use vfiod_tests::daemon::until;
use vfiod_tests::inside::Container;
use vfiod_tests::inside::UUID;
use vfiod_tests::inside::inside;
use vmm_sys_util::eventfd::EFD_NONBLOCK;
use vmm_sys_util::eventfd::EventFd;

/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(20);

const CARD: u32 = 0x3253_4348;
const CONFIG: u32 = vfio::VFIO_PCI_CONFIG_REGION_INDEX;
const INTX: u32 = vfio::VFIO_PCI_INTX_IRQ_INDEX;

fn path() -> PathBuf {
    PathBuf::from("/sys/bus/mdev/devices").join(UUID)
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

/// A page that a device may get at, and nobody else does.
fn page() -> Box<[u8]> {
    let page = vec![0; 8192].into_boxed_slice();
    assert_eq!(page.len(), 8192);
    page
}

/// The first byte of `page` that begins a page of memory.
fn aligned(page: &mut [u8]) -> *mut u8 {
    let at = page.as_mut_ptr();
    at.wrapping_add(at.align_offset(4096))
}

fn vfio_ioctls(which: Container) {
    let container = Arc::new(VfioContainer::new(None).expect("/dev/vfio/vfio opens"));
    let ops: Arc<dyn VfioOps> = Arc::clone(&container) as _;
    let card = VfioDevice::new(&path(), Arc::clone(&ops), true).expect("the card opens");
    // It belongs to the container's group, and one container has that.
    let other: Arc<dyn VfioOps> = Arc::new(VfioContainer::new(None).expect("another container"));
    assert!(VfioDevice::new(&path(), other, true).is_err());

    let mut bytes = [0; 4];
    card.region_read(CONFIG, &mut bytes, 0);
    assert_eq!(u32::from_le_bytes(bytes), CARD);
    assert_eq!(card.get_region_size(0), 8);
    for (register, byte) in [(3, 0x03), (4, 0x08), (1, 0x01)] {
        card.region_write(0, &[byte], register);
    }
    let event = eventfd();
    card.enable_irq(INTX, vec![&event]).expect("INTx is on");
    card.region_write(0, b"V", 0);
    assert_eq!(count(&event), 1);
    let mut byte = [0];
    card.region_read(0, &mut byte, 0);
    assert_eq!(&byte, b"V");
    card.disable_irq(INTX).expect("INTx is off");

    let mut page = page();
    let at = aligned(&mut page);
    // SAFETY: the page outlives its mapping, and only this test and the device know of it.
    unsafe {
        let mapped = container.vfio_dma_map(1 << 32, 4096, at);
        mapped.expect("memory is mapped");
        let again = container.vfio_dma_map(1 << 32, 4096, at);
        assert!(again.is_err(), "the addresses are taken");
    }
    let unmapped = container.vfio_dma_unmap(1 << 32, 4096);
    unmapped.expect("and it goes");
    // Nothing there: the library wants as much unmapped as it asked for.
    assert!(
        container.vfio_dma_unmap(1 << 32, 4096).is_err(),
        "{which:?}"
    );

    // The last of all: device, group, container; then everything from the start.
    drop(card);
    drop(ops);
    drop(container);
    let mut again = None;
    until("the group is free again", LIMIT, || {
        let container = Arc::new(VfioContainer::new(None).expect("/dev/vfio/vfio opens"));
        again = VfioDevice::new(&path(), container, true).ok();
        again.is_some()
    });
}

#[test]
fn vfio_ioctls_with_type1() {
    if inside("vfio_ioctls_with_type1", "mtty-2", Container::Native) {
        vfio_ioctls(Container::Native);
    }
}

#[test]
fn vfio_ioctls_with_iommufds_container() {
    let test = "vfio_ioctls_with_iommufds_container";
    if inside(test, "mtty-2", Container::Iommufd) {
        vfio_ioctls(Container::Iommufd);
    }
}

/// type1 has no ranges to tell for devices without an IOMMU of their own, which this library wants:
/// so it is with a kernel's mdevs too (`drivers/vfio/vfio_iommu_type1.c`, `vfio_iommu_iova_build_caps`).
#[test]
fn pci_driver_learns_from_type1_what_a_kernel_would_tell() {
    let test = "pci_driver_learns_from_type1_what_a_kernel_would_tell";
    if !inside(test, "mtty-2", Container::Native) {
        return;
    }
    let error = VfioPciDevice::open(path()).expect_err("there are no ranges");
    let said = error.to_string();
    assert_eq!(
        said, "VFIO did not provide IOMMU capability with ID 1",
        "it came as far as VFIO_IOMMU_GET_INFO"
    );
}

#[test]
fn pci_driver_with_iommufds_container() {
    let test = "pci_driver_with_iommufds_container";
    if !inside(test, "mtty-2", Container::Iommufd) {
        return;
    }
    let card = VfioPciDevice::open(path()).expect("the card opens");
    assert!(VfioPciDevice::open(path()).is_err(), "one has its group");
    let config = card.config();
    assert_eq!(config.vendor_id().read().expect("it reads"), 0x4348);
    assert_eq!(config.device_id().read().expect("it reads"), 0x3253);
    let class = config.read_u8(0x0b).expect("it reads");
    assert_eq!(class, 7, "a communication controller");
    let command = config.command();
    let ports = command.io_space_enable();
    ports.write(true).expect("it writes");
    assert!(ports.read().expect("it reads"));

    let interrupts = card.interrupts();
    let most = [interrupts.intx(), interrupts.msi(), interrupts.msi_x()].map(|kind| kind.max());
    assert_eq!(most, [1, 1, 0]);
    assert!(card.bar(2).is_none() && card.rom().is_none());
    for index in [0, 1] {
        let port = card.bar(index).expect("a port");
        assert_eq!((port.len(), port.is_mappable()), (8, false));
        for (register, byte) in [(3, 0x03), (4, 0x08), (1, 0x01)] {
            port.write_u8(register, byte).expect("it writes");
        }
        for kind in [interrupts.intx(), interrupts.msi()] {
            let event = eventfd();
            kind.enable(&[event.as_raw_fd()]).expect("it is on");
            port.write_u8(0, b'V').expect("it writes");
            assert_eq!(count(&event), 1);
            assert_eq!(port.read_u8(0).expect("it reads"), b'V');
            kind.disable().expect("it is off");
        }
        port.write_u8(1, 0).expect("it writes");
    }

    let iommu = card.iommu();
    assert_eq!(iommu.alignment(), 4096);
    let ranges = iommu.valid_iova_ranges();
    assert!(
        ranges.iter().any(|range| range.contains(&(1 << 32))),
        "{ranges:?}"
    );
    let mut page = page();
    let at = aligned(&mut page);
    // SAFETY: the page outlives its mapping, and only this test and the device know of it.
    unsafe {
        let mapped = iommu.map(1 << 32, 4096, at, Permissions::ReadWrite);
        mapped.expect("memory is mapped");
        let again = iommu.map(1 << 32, 4096, at, Permissions::Read);
        assert!(again.is_err(), "the addresses are taken");
    }
    iommu.unmap(1 << 32, 4096).expect("and it goes");
    card.reset().expect("it is reset");
    let line = card.bar(1).expect("a port").read_u8(3);
    assert_eq!(line.expect("it reads"), 0, "it has been reset");
    drop(card);
    let mut again = None;
    until("the group is free again", LIMIT, || {
        again = VfioPciDevice::open(path()).ok();
        again.is_some()
    });
}
