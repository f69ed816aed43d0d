//! One test a table.

use super::*;
use crate::device::{
    DeviceInfo, DeviceOps, GroupType, InitCx, IrqInfo, Life, OpenCx, RegionInfo, RegionPos,
    UnregisteredDevice,
};
use crate::irq::SetIrqs;
use crate::model::BusDevice;
use std::sync::atomic::Ordering;
use vfio_uapi::device::InfoFlags;
use vfio_uapi::ioctl::{
    IOMMU_VFIO_IOAS, VFIO_DEVICE_ATTACH_IOMMUFD_PT, VFIO_DEVICE_DETACH_IOMMUFD_PT,
};
use vfio_uapi::iommufd::{VfioIoas, vfio_ioas_op};

#[test]
fn who_may_open_a_group() {
    let world = World::new();
    let (registration, _, group) = world.emulated("one");
    assert_eq!((group.name(), group.minor()), ("0".into(), 0));
    assert_eq!(group.kind(), GroupType::Emulated);
    let file = group.open(opener()).unwrap();
    assert_eq!(group.open(opener()).unwrap_err(), Errno::BUSY, "once");
    assert_eq!(group.opener().unwrap().comm, "test");
    // An open cdev file is no matter; binding one is.
    let cdev = registration.device().open_cdev(opener()).unwrap();
    let (fd, _context) = world.context();
    assert_eq!(world.bind_file(&cdev, fd), Err(Errno::BUSY));
    file.release();
    drop(file);
    assert!(group.opener().is_none());
    world.bind_file(&cdev, fd).unwrap();
    assert_eq!(group.open(opener()).unwrap_err(), Errno::BUSY, "bound");
    // A refused BIND gives its block back.
    let other = registration.device().open_cdev(opener()).unwrap();
    assert_eq!(world.bind_file(&other, fd), Err(Errno::INVAL));
    cdev.release();
    let file = group.open(opener()).unwrap();
    file.release();
    // A file that is released twice closes nobody else's.
    let next = group.open(opener()).unwrap();
    file.release();
    drop(file);
    assert_eq!(group.open(opener()).unwrap_err(), Errno::BUSY);
    drop(next);
    group.open(opener()).unwrap().release();
}

#[test]
fn refused_binds_give_the_group_back() {
    let world = World::new();
    let (registration, _, group) = world.emulated("one");
    let file = registration.device().open_cdev(opener()).unwrap();
    let (container, _) = world.container();
    for (fd, errno) in [
        (-1, Errno::INVAL),
        (77, Errno::BADFD),
        (container, Errno::BADFD),
    ] {
        assert_eq!(world.bind_file(&file, fd), Err(errno));
        let open = group.open(opener()).unwrap();
        open.release();
    }
}

#[test]
fn status() {
    let world = World::new();
    let (_one, _, group) = world.emulated("one");
    let file = group.open(opener()).unwrap();
    let call = |argsz: u32| {
        let mut words = [argsz, 0xffff_ffff];
        let bytes = words.as_mut_bytes();
        let done = file.ioctl(VFIO_GROUP_GET_STATUS, address(bytes), &world.us);
        done.map(|_| std::hint::black_box(words)[1])
    };
    assert_eq!(
        file.ioctl(VFIO_GROUP_GET_STATUS, 8, &world.us),
        Err(Errno::FAULT)
    );
    assert_eq!(call(7), Err(Errno::INVAL));
    assert_eq!(call(8), Ok(1), "viable");
    assert_eq!(call(4096), Ok(1));
    let (fd, _container) = world.container();
    world.set_container(&file, fd).unwrap();
    assert_eq!(call(8), Ok(3), "and in a container");
    // Hardware whose DMA belongs to somebody is not viable.
    let iommu = world.hardware();
    let (physical, _) = device(&world.core, "card", Some(&iommu));
    let (sibling, _) = device(&world.core, "function", Some(&iommu));
    let group = physical.device().vfio_group().unwrap();
    assert_eq!(
        sibling.device().vfio_group().unwrap().serial(),
        group.serial()
    );
    let file = group.open(opener()).unwrap();
    assert_eq!(world.status(&file), Ok(StatusFlags::VIABLE));
    let owned = iommu.claim_dma(1).unwrap();
    assert_eq!(world.status(&file), Ok(StatusFlags::empty()));
    drop(owned);
    assert_eq!(world.status(&file), Ok(StatusFlags::VIABLE));
    for unknown in [0x3b64, 0x3b6b, 0x3b6e, 0x3b76, 0, 0x56f1] {
        assert_eq!(file.ioctl(unknown, 0, &world.us), Err(Errno::NOTTY));
    }
}

#[test]
fn set_container_in_order() {
    let world = World::new();
    let (one, _, group) = world.emulated("one");
    let file = group.open(opener()).unwrap();
    let (fd, container) = world.container();
    assert_eq!(
        file.ioctl(VFIO_GROUP_SET_CONTAINER, 8, &world.us),
        Err(Errno::FAULT)
    );
    assert_eq!(world.set_container(&file, -1), Err(Errno::BADF));
    let own = world.us.number(FileObject::Group(Arc::clone(&file)));
    let cdev = one.device().open_cdev(opener()).unwrap();
    let cdev = world.us.number(FileObject::Device(cdev));
    for other in [77, own, cdev] {
        assert_eq!(world.set_container(&file, other), Err(Errno::BADFD));
    }
    assert_eq!(world.unset_container(&file), Err(Errno::INVAL));
    world.set_container(&file, fd).unwrap();
    // It is set, whatever comes; a bad number is found out before that.
    assert_eq!(world.set_container(&file, -1), Err(Errno::BADF));
    for any in [fd, 77, own] {
        assert_eq!(world.set_container(&file, any), Err(Errno::INVAL));
    }
    world.set_iommu(&container).unwrap();
    world.unset_container(&file).unwrap();
    // The last group has gone, the backend with it.
    assert_eq!(world.set_iommu(&container), Err(Errno::INVAL));
    world.set_container(&file, fd).unwrap();
    world.set_iommu(&container).unwrap();
    // Closing the file is leaving the container.
    file.release();
    assert_eq!(world.set_iommu(&container), Err(Errno::INVAL));
    assert_eq!(world.set_container(&file, fd), Err(Errno::BADF), "closed");
    assert_eq!(world.unset_container(&file), Err(Errno::BADF));
    assert_eq!(world.status(&file), Err(Errno::BADF));

    // Hardware whose DMA is somebody else's.
    let iommu = world.hardware();
    let (card, _) = device(&world.core, "card", Some(&iommu));
    let file = card.device().vfio_group().unwrap().open(opener()).unwrap();
    let owned = iommu.claim_dma(1).unwrap();
    assert_eq!(world.set_container(&file, fd), Err(Errno::PERM));
    drop(owned);
    world.set_container(&file, fd).unwrap();
    assert_eq!(
        world.status(&file),
        Ok(StatusFlags::VIABLE | StatusFlags::CONTAINER_SET)
    );
}

#[test]
fn opening_a_device_in_order() {
    let world = World::new();
    let (one, seen, group) = world.emulated("one");
    let (_two, _, _) = world.emulated("two");
    let file = group.open(opener()).unwrap();
    // The name comes first: without any container a wrong one is ENODEV.
    for wrong in ["", "two", "one ", "on"] {
        assert_eq!(
            file.find_device(wrong.as_bytes()).unwrap_err(),
            Errno::NODEV
        );
    }
    assert_eq!(file.find_device(b"one").unwrap().index(), 0);
    assert_eq!(world.open_device(&file, "one").unwrap_err(), Errno::INVAL);
    let (fd, container) = world.container();
    world.set_container(&file, fd).unwrap();
    assert_eq!(
        world.open_device(&file, "one").unwrap_err(),
        Errno::INVAL,
        "no IOMMU set"
    );
    assert_eq!(
        group.opened_devices(),
        (0, 0),
        "the refused open keeps nothing"
    );
    world.set_iommu(&container).unwrap();
    let two = world.core.device(1).unwrap().open_cdev(opener()).unwrap();
    assert_eq!(
        two.open_by_group(&file, b"one", opener()),
        Err(Errno::STALE)
    );
    assert_eq!(
        two.open_by_group(&file, b"two", opener()),
        Err(Errno::NODEV)
    );
    let first = world.open_device(&file, "one").unwrap();
    assert!(first.is_by_group() && first.is_bound());
    assert_eq!(
        first.open_by_group(&file, b"one", opener()),
        Err(Errno::INVAL),
        "bound"
    );
    let second = world.open_device(&file, "one").unwrap();
    assert_eq!(group.opened_devices(), (1, 0), "one session, one hold");
    for command in [VFIO_DEVICE_ATTACH_IOMMUFD_PT, VFIO_DEVICE_DETACH_IOMMUFD_PT] {
        assert_eq!(first.ioctl(command, 8, &world.us), Err(Errno::NOTTY));
    }
    let (iommufd, _context) = world.context();
    assert_eq!(
        world.bind_file(&first, iommufd),
        Err(Errno::INVAL),
        "a group's"
    );
    assert_eq!(one.device().users(), 2);
    first.release();
    assert_eq!(seen.closes.load(Ordering::SeqCst), 0);
    assert_eq!(second.read(0, &mut [0; 4]), Ok(4));
    assert_eq!(world.unset_container(&file), Err(Errno::BUSY));
    second.release();
    assert_eq!(seen.closes.load(Ordering::SeqCst), 1);
    assert_eq!(group.opened_devices(), (0, 0));
    world.unset_container(&file).unwrap();
    // Cut off: no open any more.
    world.set_container(&file, fd).unwrap();
    world.set_iommu(&container).unwrap();
    let cdev = one.device().open_cdev(opener()).unwrap();
    let held = one.device().clone();
    one.unregister().disassociate();
    assert_eq!(held.life(), Life::Dead);
    assert_eq!(
        cdev.open_by_group(&file, b"one", opener()),
        Err(Errno::NODEV)
    );
}

#[test]
fn a_device_keeps_the_file_of_its_group() {
    let world = World::new();
    let (one, seen, group) = world.emulated("one");
    let (file, container) = in_container(&world, &group);
    let open = world.open_device(&file, "one").unwrap();
    file.release();
    drop(file);
    assert_eq!(group.open(opener()).unwrap_err(), Errno::BUSY);
    let (iommufd, _context) = world.context();
    assert_eq!(world.bind(one.device(), iommufd).unwrap_err(), Errno::BUSY);
    assert_eq!(group.opened_devices(), (1, 0));
    // The container's own file may go at any time.
    container.close();
    assert_eq!(open.read(0, &mut [0; 4]), Ok(4));
    open.release();
    assert_eq!(seen.closes.load(Ordering::SeqCst), 1);
    let file = group.open(opener()).unwrap();
    assert_eq!(world.status(&file), Ok(StatusFlags::VIABLE), "it has left");
    assert_eq!(world.set_iommu(&container), Err(Errno::INVAL));
}

#[test]
fn what_a_dead_group_says() {
    let world = World::new();
    let (one, _, group) = world.emulated("one");
    let (file, container) = in_container(&world, &group);
    let (other, _) = world.container();
    one.unregister().wait();
    assert!(!group.is_alive());
    assert!(world.core.group(0).is_none());
    assert_eq!(
        world.set_iommu(&container),
        Err(Errno::INVAL),
        "it has left"
    );
    assert_eq!(world.status(&file), Err(Errno::NODEV));
    assert_eq!(world.set_container(&file, other), Err(Errno::NODEV));
    assert_eq!(
        world.set_container(&file, 77),
        Err(Errno::NODEV),
        "before its kind"
    );
    assert_eq!(world.set_container(&file, -1), Err(Errno::BADF));
    assert_eq!(world.unset_container(&file), Err(Errno::INVAL));
    assert_eq!(file.find_device(b"one").unwrap_err(), Errno::NODEV);
    assert_eq!(file.ioctl(0x3b76, 0, &world.us), Err(Errno::NOTTY));
    // The name is free, the number when the file is gone.
    let (_two, _, reborn) = world.emulated("two");
    assert_eq!((reborn.id(), reborn.minor()), (0, 1));
    assert_ne!(reborn.serial(), group.serial());
    file.release();
    assert_eq!(group.open(opener()).unwrap_err(), Errno::NODEV);
    drop((file, group));
    let (_three, _, third) = world.emulated("three");
    assert_eq!((third.id(), third.minor()), (1, 0));
}

#[test]
fn a_group_lives_until_its_last_device_has_gone() {
    let world = World::new();
    let iommu = world.hardware();
    let (one, _) = device(&world.core, "one", Some(&iommu));
    let (two, _) = device(&world.core, "two", Some(&iommu));
    let group = one.device().vfio_group().unwrap();
    let names = |group: &Group| -> Vec<u32> { group.devices().iter().map(Device::index).collect() };
    assert_eq!(names(&group), [1, 0], "newest first");
    let (file, _container) = in_container(&world, &group);
    let open = world.open_device(&file, "one").unwrap();
    let other = world.open_device(&file, "two").unwrap();
    assert_eq!(group.opened_devices(), (2, 0));
    let leaving = one.unregister();
    assert_eq!(names(&group), [1], "names go first");
    assert_eq!(file.find_device(b"one").unwrap_err(), Errno::NODEV);
    assert!(!leaving.is_done());
    open.release();
    leaving.wait();
    assert!(group.is_alive());
    other.release();
    two.unregister().wait();
    assert!(!group.is_alive());
    assert!(iommu.vfio().is_none());
    // The IOMMU group is there still, and so is its number, for the next.
    let (next, _) = device(&world.core, "one", Some(&iommu));
    assert_eq!(next.device().vfio_group().unwrap().id(), iommu.id());
}

#[test]
fn members_by_node_and_by_group() {
    let world = World::new();
    let iommu = world.hardware();
    let (one, _) = device(&world.core, "one", Some(&iommu));
    let (two, _) = device(&world.core, "two", Some(&iommu));
    let group = one.device().vfio_group().unwrap();
    let (first, _context) = world.context();
    let (second, _other) = world.context();
    let bound = world.bind(one.device(), first).unwrap();
    assert_eq!(
        group.open(opener()).unwrap_err(),
        Errno::BUSY,
        "a member is bound"
    );
    assert_eq!(world.bind(one.device(), first).unwrap_err(), Errno::INVAL);
    assert_eq!(
        world.bind(two.device(), second).unwrap_err(),
        Errno::PERM,
        "another context"
    );
    let sibling = world.bind(two.device(), first).unwrap();
    bound.release();
    assert_eq!(
        group.open(opener()).unwrap_err(),
        Errno::BUSY,
        "the other is"
    );
    sibling.release();
    let file = group.open(opener()).unwrap();
    assert_eq!(world.bind(two.device(), second).unwrap_err(), Errno::BUSY);
    let unbound = two.device().open_cdev(opener()).unwrap();
    assert!(!unbound.is_bound(), "an open alone is no matter");
    file.release();
    let direct = two
        .device()
        .open_direct(opener(), Arc::new(Nothing))
        .unwrap();
    assert_eq!(
        group.open(opener()).unwrap_err(),
        Errno::BUSY,
        "as a bound one"
    );
    direct.release();
    let file = group.open(opener()).unwrap();
    assert_eq!(
        two.device()
            .open_direct(opener(), Arc::new(Nothing))
            .unwrap_err(),
        Errno::BUSY
    );
    file.release();
}

struct Nothing;

impl crate::device::DmaSpace for Nothing {
    fn read(&self, _iova: u64, _buf: &mut [u8]) -> Result {
        Err(Errno::NOENT)
    }
    fn write(&self, _iova: u64, _data: &[u8]) -> Result {
        Err(Errno::NOENT)
    }
}

#[test]
fn cut_off_with_everything_open() {
    let world = World::new();
    let (one, seen, group) = world.emulated("one");
    let (file, container) = in_container(&world, &group);
    let open = world.open_device(&file, "one").unwrap();
    one.unregister().disassociate();
    assert_eq!(seen.closes.load(Ordering::SeqCst), 1);
    assert!(!group.is_alive());
    assert_eq!(open.read(0, &mut [0; 4]), Err(Errno::NODEV));
    assert_eq!(
        world.set_iommu(&container),
        Err(Errno::INVAL),
        "it has left"
    );
    assert_eq!(group.opened_devices(), (0, 0));
    open.release();
    file.release();
    assert!(group.opener().is_none());
}

#[test]
fn who_waits_for_a_close_and_for_how_long() {
    let world = World::new();
    let (_one, _, group) = world.emulated("one");
    let file = group.open(opener()).unwrap();
    let closer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        file.release();
    });
    // The close is told a moment late; the open finds it done.
    let again = group.open(opener()).unwrap();
    closer.join().unwrap();
    // Many who wait for one who does not leave: all are told, none for long.
    let openers: Vec<_> = (0..32)
        .map(|_| {
            let group = Arc::clone(&group);
            std::thread::spawn(move || group.open(opener()).map(drop))
        })
        .collect();
    for opener in openers {
        assert_eq!(opener.join().unwrap(), Err(Errno::BUSY));
    }
    again.release();
}

/// A driver that reads the name itself, and may not open.
struct Picky {
    name: &'static [u8],
    open: Result,
}

impl DeviceOps for Picky {
    const NAME: &'static str = "picky";
    type Args = (&'static [u8], Result);
    type Session = ();

    fn init(_cx: &InitCx<'_>, (name, open): Self::Args) -> Result<Self> {
        Ok(Picky { name, open })
    }
    fn open(&self, _cx: &OpenCx<'_>) -> Result<()> {
        self.open
    }
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            flags: InfoFlags::PCI,
            num_regions: 0,
            num_irqs: 0,
        }
    }
    fn region(&self, _index: u32) -> Result<RegionInfo> {
        Err(Errno::INVAL)
    }
    fn irq(&self, _index: u32) -> Result<IrqInfo> {
        Err(Errno::INVAL)
    }
    fn read(&self, (): &(), _at: RegionPos, _buf: &mut [u8]) -> Result<usize> {
        Err(Errno::INVAL)
    }
    fn write(&self, (): &(), _at: RegionPos, _data: &[u8]) -> Result<usize> {
        Err(Errno::INVAL)
    }
    fn set_irqs(&self, (): &(), _request: SetIrqs<'_>) -> Result<u32> {
        Err(Errno::NOTTY)
    }
    fn matches(&self, _parent: &str, name: &[u8]) -> Result<bool> {
        assert_ne!(name, b"panic", "the test asked for a panic");
        match name.strip_prefix(self.name) {
            Some(b"") => Ok(true),
            Some(b" vf_token=1") => Err(Errno::ACCESS),
            _ => Ok(false),
        }
    }
}

fn picky(
    world: &World,
    parent: &str,
    iommu: &Arc<IommuGroup>,
    args: (&'static [u8], Result),
) -> Registration {
    let parent = BusDevice::new("/devices/virtual/test", parent, None);
    parent.join_iommu_group(iommu).unwrap();
    let made = UnregisteredDevice::<Picky>::alloc(&world.core, &parent, args).unwrap();
    made.register(GroupType::Physical)
        .map_err(|(_, errno)| errno)
        .unwrap()
}

#[test]
fn a_driver_says_which_name_is_its_own() {
    let world = World::new();
    let iommu = world.hardware();
    let one = picky(&world, "one", &iommu, (b"alpha", Ok(())));
    let two = picky(&world, "two", &iommu, (b"beta", Err(Errno::IO)));
    let group = one.device().vfio_group().unwrap();
    let (file, _container) = in_container(&world, &group);
    let find = |name: &[u8]| file.find_device(name).map(|device| device.index());
    assert_eq!(find(b"alpha"), Ok(0));
    assert_eq!(find(b"beta"), Ok(1));
    assert_eq!(
        find(b"one"),
        Err(Errno::NODEV),
        "the parent's name is not asked"
    );
    // An errno ends the search, as a wrong token does.
    assert_eq!(find(b"beta vf_token=1"), Err(Errno::ACCESS));
    assert_eq!(find(b"alpha vf_token=1"), Err(Errno::ACCESS));
    // The driver's open fails: nothing is kept.
    assert_eq!(world.open_device(&file, "beta").unwrap_err(), Errno::IO);
    assert_eq!(group.opened_devices(), (0, 0));
    assert_eq!(two.device().users(), 0);
    assert_eq!(world.unset_container(&file), Ok(0));
    // A panic is that device's end, and nobody else's.
    assert_eq!(find(b"panic"), Err(Errno::NODEV));
    assert_eq!(two.device().life(), Life::Dead);
    assert_eq!(find(b"alpha"), Ok(0));
    assert_eq!(find(b"beta"), Err(Errno::NODEV), "dead");
}

#[test]
fn one_group_for_all_of_an_iommu_group() {
    let pool = crate::group::Groups::new(Duration::ZERO, &Arc::default());
    let groups = crate::model::IommuGroups::new(0);
    let iommu = groups.create(None).unwrap();
    let (group, is_new) = pool.join(&iommu, GroupType::Physical).unwrap();
    assert!(is_new);
    let (same, is_new) = pool.join(&iommu, GroupType::Physical).unwrap();
    assert!(!is_new && Arc::ptr_eq(&group, &same));
    assert!(!pool.leave(&group));
    assert!(pool.by_minor(0).is_some());
    assert!(pool.leave(&group));
    assert!(pool.by_minor(0).is_none() && pool.all().is_empty());
}

#[test]
fn an_iommufd_as_container() {
    let world = World::new();
    let (one, seen, group) = world.emulated("one");
    let (fd, context) = world.context();
    let (other, _other) = world.context();
    let (native, container) = world.container();
    let file = group.open(opener()).unwrap();
    world.set_container(&file, fd).unwrap();
    assert_eq!(
        world.status(&file),
        Ok(StatusFlags::VIABLE | StatusFlags::CONTAINER_SET)
    );
    assert_eq!(world.set_container(&file, fd), Err(Errno::INVAL));
    // No SET_IOMMU is needed.
    let open = world.open_device(&file, "one").unwrap();
    assert_eq!(group.opened_devices(), (0, 1));
    for command in [VFIO_DEVICE_ATTACH_IOMMUFD_PT, VFIO_DEVICE_DETACH_IOMMUFD_PT] {
        assert_eq!(open.ioctl(command, 8, &world.us), Err(Errno::NOTTY));
    }
    // The context is forgotten although the device is open; the device is not.
    world.unset_container(&file).unwrap();
    assert_eq!(world.unset_container(&file), Err(Errno::INVAL));
    assert_eq!(world.open_device(&file, "one").unwrap_err(), Errno::INVAL);
    assert_eq!(open.read(0, &mut [0; 4]), Ok(4));
    // A native container would not know of it.
    assert_eq!(world.set_container(&file, native), Err(Errno::BUSY));
    // The group's file is kept by nobody.
    file.release();
    let file = group.open(opener()).unwrap();
    assert_eq!(world.bind(one.device(), fd).unwrap_err(), Errno::BUSY);
    assert_eq!(world.set_container(&file, native), Err(Errno::BUSY));
    world.set_container(&file, other).unwrap();
    let second = world.open_device(&file, "one").unwrap();
    assert_eq!(group.opened_devices(), (0, 1), "the same session");
    file.release();
    assert_eq!(
        world.bind(one.device(), fd).unwrap_err(),
        Errno::INVAL,
        "nobody has the group open, but the device is"
    );
    open.release();
    assert_eq!(seen.closes.load(Ordering::SeqCst), 0);
    second.release();
    assert_eq!(seen.closes.load(Ordering::SeqCst), 1);
    let file = group.open(opener()).unwrap();
    world.set_container(&file, native).unwrap();
    world.set_iommu(&container).unwrap();
    world.unset_container(&file).unwrap();
    // A dead group remembers its context.
    world.set_container(&file, fd).unwrap();
    one.unregister().wait();
    assert_eq!(world.status(&file), Err(Errno::NODEV));
    assert_eq!(world.set_container(&file, native), Err(Errno::INVAL));
    world.unset_container(&file).unwrap();
    assert_eq!(world.unset_container(&file), Err(Errno::INVAL));
    assert_eq!(world.set_container(&file, native), Err(Errno::NODEV));
    context.close();
}

#[test]
fn an_iommufd_without_its_ioas() {
    let world = World::new();
    let (_one, seen, group) = world.emulated("one");
    let (fd, context) = world.context();
    let file = group.open(opener()).unwrap();
    world.set_container(&file, fd).unwrap();
    let mut clear = VfioIoas {
        size: 12,
        ioas_id: 0,
        op: vfio_ioas_op::CLEAR,
        reserved: 0,
    };
    let arg = address(clear.as_mut_bytes());
    context.ioctl(IOMMU_VFIO_IOAS, arg, &world.us).unwrap();
    assert_eq!(world.open_device(&file, "one").unwrap_err(), Errno::NODEV);
    assert_eq!(group.opened_devices(), (0, 0));
    assert_eq!(seen.closes.load(Ordering::SeqCst), 0);
    // Two members of hardware, two contexts.
    let iommu = world.hardware();
    let (card, _) = device(&world.core, "card", Some(&iommu));
    let (function, _) = device(&world.core, "function", Some(&iommu));
    let group = card.device().vfio_group().unwrap();
    let (other, _other) = world.context();
    let file = group.open(opener()).unwrap();
    world.set_container(&file, other).unwrap();
    let open = world.open_device(&file, "card").unwrap();
    world.unset_container(&file).unwrap();
    world.set_container(&file, fd).unwrap();
    assert_eq!(
        world.open_device(&file, "function").unwrap_err(),
        Errno::PERM
    );
    open.release();
    let open = world.open_device(&file, "function").unwrap();
    open.release();
    drop(function);
}
