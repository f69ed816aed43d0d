//! The container's own commands, and groups that come and go.

use super::*;
use vfio_uapi::caps::{ArrayCap, DmaAvailCap, Header, MigrationCap};

fn every_command() -> [u32; 4] {
    [
        ioctl::VFIO_IOMMU_GET_INFO,
        ioctl::VFIO_IOMMU_MAP_DMA,
        ioctl::VFIO_IOMMU_UNMAP_DMA,
        ioctl::VFIO_IOMMU_DIRTY_PAGES,
    ]
}

#[test]
fn before_set_iommu() {
    let c = Client::new();
    assert_eq!(c.value(ioctl::VFIO_GET_API_VERSION, 0), Ok(0));
    for number in 0..12 {
        let known = [1, 3, 9].contains(&number);
        assert_eq!(c.check_extension(number), u32::from(known), "{number}");
    }
    assert_eq!(c.check_extension(1 << 32 | 1), 0);
    for cmd in every_command() {
        assert_eq!(c.value(cmd, 0), Err(Errno::INVAL), "even with no argument");
    }
    for cmd in [ioctl::VFIO_IOMMU_ENABLE, ioctl::VFIO_GROUP_GET_STATUS, 77] {
        assert_eq!(c.value(cmd, 0), Err(Errno::INVAL), "{cmd:#x}");
    }
    for number in [1, 3, 9, 4] {
        assert_eq!(c.set_iommu(number), Err(Errno::INVAL), "no group");
    }
}

#[test]
fn set_iommu() {
    let c = Client::new();
    let first = c.join_emulated();
    assert_eq!(c.set_iommu(9), Err(Errno::INVAL));
    for number in [0, 2, 4, 5, 6, 7, 8, 10, 11, u32::MAX] {
        assert_eq!(c.set_iommu(number), Err(Errno::NODEV), "{number}");
    }
    let large = c.value(ioctl::VFIO_SET_IOMMU, 1 << 32 | 1);
    assert_eq!(large, Err(Errno::NODEV));
    assert_eq!(c.info(24).unwrap_err(), Errno::INVAL, "still not set");
    c.set_iommu(1).unwrap();
    for number in [1, 3, 4] {
        assert_eq!(c.set_iommu(number), Err(Errno::INVAL), "set already");
    }
    for cmd in [
        ioctl::VFIO_IOMMU_ENABLE,
        ioctl::VFIO_IOMMU_DISABLE,
        ioctl::VFIO_GROUP_GET_STATUS,
        ioctl::IOMMU_DESTROY,
        77,
    ] {
        assert_eq!(c.value(cmd, 0), Err(Errno::NOTTY), "{cmd:#x}");
    }
    // The last group takes the backend along, with all that is mapped.
    c.map(R, PAGE, 0, PAGE).unwrap();
    let second = c.join_emulated();
    drop(first);
    assert_eq!(c.map(R, PAGE, 0, PAGE), Err(Errno::EXIST));
    drop(second);
    assert_eq!(c.map(R, PAGE, 0, PAGE), Err(Errno::INVAL));
    assert_eq!(c.set_iommu(3), Err(Errno::INVAL));
    let _third = c.join_emulated();
    c.set_iommu(3).unwrap();
    c.map(R, PAGE, 0, PAGE).unwrap();
}

#[test]
fn extensions_once_set() {
    let (c, attached) = Client::emulated(3);
    let answers = |c: &Client| (0..12).filter(|n| c.check_extension(*n) == 1).collect();
    let emulated: Vec<u64> = answers(&c);
    assert_eq!(emulated, [1, 3, 4, 9], "no UPDATE_VADDR");
    let _hardware = c.join(&c.hardware()).unwrap();
    let both: Vec<u64> = answers(&c);
    assert_eq!(both, emulated);
    drop(attached);
    let hardware: Vec<u64> = answers(&c);
    assert_eq!(hardware, [1, 3, 4, 9, 10]);
}

#[test]
fn info_of_software_devices() {
    let (c, _attached) = Client::emulated(3);
    assert_eq!(c.info(15).unwrap_err(), Errno::INVAL);
    let nowhere = c.value(ioctl::VFIO_IOMMU_GET_INFO, 8);
    assert_eq!(nowhere, Err(Errno::FAULT));
    for argsz in [16, 23, 24, 71] {
        let (info, rest) = c.info(argsz).unwrap();
        assert_eq!(info.argsz, 72, "what it takes");
        assert_eq!(info.flags, InfoFlags::PGSIZES | InfoFlags::CAPS);
        assert_eq!(info.iova_pgsizes, 0xffff_ffff_ffff_f000);
        let untouched = 0xeeee_eeee;
        let offset = if argsz >= 20 { 0 } else { untouched };
        if argsz != 23 {
            assert_eq!(info.cap_offset, offset, "{argsz}");
        }
        assert!(rest.iter().all(|byte| *byte == 0xee));
    }
    for argsz in [72, 73, 4096] {
        let (info, rest) = c.info(argsz).unwrap();
        assert_eq!((info.argsz, info.cap_offset), (argsz, 24));
        let (migration, rest) = MigrationCap::read_from_prefix(&rest).unwrap();
        let header = |id, next| Header {
            id,
            version: 1,
            next,
        };
        assert_eq!(migration.header, header(2, 56));
        assert_eq!(
            (migration.flags, migration.pgsize_bitmap),
            (0, PAGE),
            "the smallest page only"
        );
        assert_eq!(migration.max_dirty_bitmap_size, 0x1000_0000);
        let (avail, rest) = DmaAvailCap::read_from_prefix(rest).unwrap();
        assert_eq!((avail.header, avail.avail), (header(3, 0), 65535));
        assert_eq!(rest[..4], [0; 4]);
        assert!(rest[4..].iter().all(|byte| *byte == 0xee));
    }
    c.map(R, PAGE, 0, PAGE).unwrap();
    let (_, rest) = c.info(72).unwrap();
    let avail = DmaAvailCap::read_from_prefix(&rest[32..]).unwrap().0;
    assert_eq!(avail.avail, 65534);
}

#[test]
fn info_of_hardware() {
    let (c, emulated) = Client::emulated(3);
    let group = c.hardware();
    let attached = c.join(&group).unwrap();
    let (info, rest) = c.info(4096).unwrap();
    assert_eq!(info.iova_pgsizes, 0x4020_1000);
    assert_eq!((info.argsz, info.cap_offset), (4096, 24));
    assert_eq!(c.info(119).unwrap().0.argsz, 120, "three capabilities");
    let avail = DmaAvailCap::read_from_prefix(&rest[32..]).unwrap().0;
    assert_eq!((avail.header.id, avail.header.next), (3, 72));
    let (ranges, rest) = ArrayCap::read_from_prefix(&rest[48..]).unwrap();
    assert_eq!((ranges.header.id, ranges.header.next), (1, 0));
    assert_eq!(ranges.count, 2);
    let range = |start, end| IovaRange { start, end };
    for (n, want) in [range(0, 0xfedf_ffff), range(0xfef0_0000, u64::MAX)]
        .into_iter()
        .enumerate()
    {
        let got = IovaRange::read_from_prefix(&rest[n * 16..]).unwrap().0;
        assert_eq!(got, want);
    }
    drop(emulated);
    drop(attached);
    let _emulated = c.join_emulated();
    c.set_iommu(3).unwrap();
    assert_eq!(c.info(4096).unwrap().0.iova_pgsizes, 0xffff_ffff_ffff_f000);
}

#[test]
fn hardware_joins_what_it_can_reach() {
    let (c, _emulated) = Client::emulated(3);
    let mut memory = Pages::new(1);
    let group = c.hardware();
    // Where interrupts go.
    c.map(R, memory.addr(), 0xfee0_0000, PAGE).unwrap();
    assert_eq!(c.join(&group).unwrap_err(), Errno::INVAL);
    c.unmap(0xfee0_0000, PAGE).unwrap();
    // Not there.
    c.map(R, PAGE, 0, PAGE).unwrap();
    assert_eq!(c.join(&group).unwrap_err(), Errno::FAULT);
    assert_eq!(c.info(4096).unwrap().0.iova_pgsizes, 0xffff_ffff_ffff_f000);
    c.unmap(0, PAGE).unwrap();
    c.map(RW, memory.addr(), 0, PAGE).unwrap();
    let attached = c.join(&group).unwrap();
    assert_eq!(c.join(&group).unwrap_err(), Errno::PERM, "DMA is taken");
    let other = Container::new();
    let elsewhere = other.attach(&group, GroupType::Physical);
    assert_eq!(elsewhere.unwrap_err(), Errno::PERM);
    // From now on an address has to be there, and may not be reserved.
    assert_eq!(c.map(R, PAGE, PAGE, PAGE), Err(Errno::FAULT));
    assert_eq!(
        c.map(R, memory.addr(), PAGE, PAGE),
        Ok(0),
        "the place is free"
    );
    for (iova, size) in [(0xfee0_0000, PAGE), (0xfed0_0000, 16 << 20)] {
        assert_eq!(c.map(R, memory.addr(), iova, size), Err(Errno::INVAL));
    }
    drop(attached);
    c.map(R, memory.addr(), 0xfee0_0000, PAGE).unwrap();
    assert!(other.attach(&group, GroupType::Physical).is_ok());
}

#[test]
fn a_group_is_in_once() {
    let c = Client::new();
    let group = c.groups.create(Some("vfio-noiommu")).unwrap();
    let _attached = c.container.attach(&group, GroupType::Emulated).unwrap();
    c.set_iommu(3).unwrap();
    let again = c.container.attach(&group, GroupType::Emulated);
    assert_eq!(again.unwrap_err(), Errno::INVAL);
    c.map(R, PAGE, 0, PAGE).unwrap();
}

#[test]
fn an_open_device_keeps_its_group_in() {
    let (c, attached) = Client::emulated(3);
    let mut memory = Pages::new(1);
    memory.bytes()[0] = 7;
    c.map(RW, memory.addr(), 0, PAGE).unwrap();
    let device = Opened::new(&attached, None);
    // Any order: container, group, device.
    c.container.close();
    drop(attached);
    assert_eq!(device.read(0), Ok(7));
    let dma = device.dma.clone();
    drop(device);
    assert_eq!(dma.read(0, &mut [0]), Err(Errno::INVAL), "closed");
    assert_eq!(c.unmap(0, PAGE), Err(Errno::INVAL), "no backend");
}

#[test]
fn a_device_needs_a_backend() {
    let c = Client::new();
    let attached = c.join_emulated();
    let core = Core::new(Config::default());
    let (registration, _) = device(&core, "card", None);
    let opened = attached.open(of(&registration));
    assert_eq!(opened.map(|_| ()), Err(Errno::INVAL));
    c.set_iommu(1).unwrap();
    let binding = attached.open(of(&registration)).unwrap();
    assert_eq!(binding.devid(), 0);
    assert_eq!(binding.attach(1), Err(Errno::NOTTY));
}

#[test]
fn hundreds_of_containers() {
    let mut memory = Pages::new(1);
    memory.bytes()[5] = 5;
    let all: Vec<_> = (0..300u64)
        .map(|n| {
            let (c, attached) = Client::emulated(if n % 2 == 0 { 1 } else { 3 });
            c.map(R, memory.addr(), n * PAGE, PAGE).unwrap();
            let device = Opened::new(&attached, None);
            (c, attached, device)
        })
        .collect();
    for (n, (_, _, device)) in (0..).zip(&all) {
        assert_eq!(device.read(n * PAGE + 5), Ok(5));
        assert_eq!(device.read((n + 1) * PAGE), Err(Errno::INVAL), "another's");
    }
}
