//! Devices: binding, attaching, groups, and in which order it may all end.

use super::*;
use crate::iommufd::testing::{Seen, device, of, opener};
use crate::model::{IommuGroup, ReservedKind, ReservedRegion, X86_MSI};
use crate::{Config, Core};
use std::sync::atomic::Ordering;
use vfio_uapi::device::{AttachIommufdPt, BindIommufd, DetachIommufdPt};

const MSI: u64 = 0xfee0_0000;

fn core() -> Core {
    Core::new(Config::default())
}

fn hardware(core: &Core) -> Arc<IommuGroup> {
    let relaxable = ReservedRegion {
        start: 0x1000_0000,
        last: 0x1000_ffff,
        kind: ReservedKind::DirectRelaxable,
    };
    core.iommu_groups()
        .create_with(None, &[X86_MSI, relaxable])
        .unwrap()
}

#[test]
fn an_emulated_device_takes_an_ioas_and_nothing_else() {
    let (core, c) = (core(), Client::new());
    let (registered, _) = device(&core, "soft", None);
    let ioas = c.ioas();
    let binding = c.ctx.bind(of(&registered)).unwrap();
    let access = binding.devid();
    assert_eq!(access, 2, "one namespace");
    assert_eq!(c.destroy(access), Err(Errno::BUSY));
    for bad in [0, 99, access] {
        assert_eq!(binding.attach(bad), Err(Errno::NOENT), "{bad}");
    }
    let mut info = HwInfo {
        size: 40,
        dev_id: access,
        ..Default::default()
    };
    assert_eq!(
        c.call(ioctl::IOMMU_GET_HW_INFO, &mut info),
        Err(Errno::NOENT)
    );
    assert_eq!(c.hwpt(access, ioas), Err(Errno::NOENT));
    assert_eq!(binding.attach(ioas), Ok(ioas));
    assert_eq!(
        c.ranges(ioas),
        (vec![(0, u64::MAX)], PAGE),
        "aligned, nothing reserved"
    );
    assert_eq!(c.destroy(ioas), Err(Errno::BUSY));
    assert_eq!(c.map(ioas, FIXED | R, PAGE, PAGE, 8), Err(Errno::INVAL));
    assert_eq!(
        c.map(ioas, FIXED | R, 0, PAGE, 0),
        Ok(0),
        "not looked at until used"
    );
    binding.detach();
    binding.detach();
    assert_eq!(c.ranges(ioas).1, 1);
    assert_eq!(c.destroy(ioas), Ok(0), "with its mapping");
    drop(binding);
    assert_eq!(
        c.destroy(access),
        Err(Errno::NOENT),
        "gone with the binding"
    );
}

#[test]
fn attaching_again_replaces_or_changes_nothing() {
    let (core, c) = (core(), Client::new());
    let (registered, _) = device(&core, "soft", None);
    let mut memory = Pages::new(2);
    let va = memory.addr();
    memory.bytes()[0] = 1;
    memory.bytes()[4096] = 2;
    let (a, b, crooked) = (c.ioas(), c.ioas(), c.ioas());
    c.map(a, FIXED | R, va, PAGE, 0).unwrap();
    c.map(b, FIXED | R, va + PAGE, PAGE, 0).unwrap();
    c.map(crooked, FIXED | R, va, PAGE, 8).unwrap();
    let binding = c.ctx.bind(of(&registered)).unwrap();
    let dma = binding.dma();
    assert_eq!(byte(&*dma, 0), Err(Errno::NOENT), "not attached");
    binding.attach(a).unwrap();
    assert_eq!(byte(&*dma, 0), Ok(1));
    binding.attach(b).unwrap();
    assert_eq!(byte(&*dma, 0), Ok(2));
    assert_eq!(c.ranges(a).1, 1);
    assert_eq!(binding.attach(crooked), Err(Errno::ADDRINUSE));
    assert_eq!(binding.attach(77), Err(Errno::NOENT));
    assert_eq!(byte(&*dma, 0), Ok(2), "as before");
    binding.attach(b).unwrap();
    assert_eq!(c.destroy(b), Err(Errno::BUSY));
    c.destroy(a).unwrap();
    binding.detach();
    assert_eq!(byte(&*dma, 0), Err(Errno::NOENT));
    c.destroy(b).unwrap();
    drop(binding);
    assert_eq!(
        byte(&*dma, 0),
        Err(Errno::NOENT),
        "dead after the last close"
    );
}

#[test]
fn a_physical_device_gets_a_page_table_of_its_own_making() {
    let (core, c) = (core(), Client::new());
    let group = hardware(&core);
    let (one, _) = device(&core, "one", Some(&group));
    let (two, _) = device(&core, "two", Some(&group));
    let other_group = hardware(&core);
    let (three, _) = device(&core, "three", Some(&other_group));
    let ioas = c.ioas();
    let [first, second, third] = [&one, &two, &three].map(|d| c.ctx.bind(of(d)).unwrap());
    assert_eq!([first.devid(), second.devid(), third.devid()], [2, 3, 4]);
    assert_eq!(first.attach(99), Err(Errno::NOENT));
    assert_eq!(
        first.attach(first.devid()),
        Err(Errno::INVAL),
        "not something to attach to"
    );
    let hwpt = first.attach(ioas).unwrap();
    assert_eq!(hwpt, 5);
    assert_eq!(c.destroy(hwpt), Err(Errno::BUSY));
    assert_eq!(c.destroy(ioas), Err(Errno::BUSY));
    let without_msi = vec![(0, MSI - 1), (MSI + 0x10_0000, u64::MAX)];
    assert_eq!(c.ranges(ioas), (without_msi.clone(), PAGE));
    assert_eq!(c.map(ioas, FIXED | R, PAGE, PAGE, MSI), Err(Errno::INVAL));
    assert_eq!(third.attach(ioas), Ok(hwpt), "shared across groups");
    let elsewhere = c.ioas();
    assert_eq!(
        second.attach(elsewhere),
        Err(Errno::INVAL),
        "its group is attached already"
    );
    assert_eq!(c.ranges(elsewhere), (vec![(0, u64::MAX)], 1), "no trace");
    c.destroy(elsewhere).unwrap();
    assert_eq!(second.attach(ioas), Ok(hwpt));
    first.detach();
    first.detach();
    third.detach();
    assert_eq!(
        c.ranges(ioas).0,
        without_msi,
        "each is recorded for its ranges"
    );
    assert_eq!(c.destroy(hwpt), Err(Errno::BUSY));
    drop(second);
    assert_eq!(
        c.destroy(hwpt),
        Err(Errno::NOENT),
        "gone with the last detach"
    );
    assert_eq!(c.ranges(ioas), (vec![(0, u64::MAX)], 1));
    assert_eq!(c.destroy(ioas), Ok(0));
}

#[test]
fn replacing_moves_the_whole_group() {
    let (core, c) = (core(), Client::new());
    let group = hardware(&core);
    let (one, _) = device(&core, "one", Some(&group));
    let (two, _) = device(&core, "two", Some(&group));
    let mut memory = Pages::new(2);
    let va = memory.addr();
    memory.bytes()[0] = 1;
    memory.bytes()[4096] = 2;
    let (a, b) = (c.ioas(), c.ioas());
    c.map(a, FIXED | R, va, PAGE, 0).unwrap();
    c.map(b, FIXED | R, va + PAGE, PAGE, 0).unwrap();
    let [first, second] = [&one, &two].map(|d| c.ctx.bind(of(d)).unwrap());
    let (of_first, of_second) = (first.dma(), second.dma());
    let old = first.attach(a).unwrap();
    assert_eq!(first.attach(a), Ok(old));
    second.attach(a).unwrap();
    let new = second.attach(b).unwrap();
    assert_ne!(old, new);
    assert_eq!(byte(&*of_first, 0), Ok(2));
    assert_eq!(byte(&*of_second, 0), Ok(2));
    assert_eq!(c.destroy(old), Err(Errno::NOENT));
    assert_eq!(c.ranges(a), (vec![(0, u64::MAX)], 1), "given back");
    assert_eq!(c.destroy(a), Ok(0), "nobody uses it any more");
    // What lies in the interrupt window keeps them from moving there.
    let blocked = c.ioas();
    c.map(blocked, FIXED | R, va, PAGE, MSI + PAGE).unwrap();
    assert_eq!(first.attach(blocked), Err(Errno::ADDRINUSE));
    assert_eq!(byte(&*of_first, 0), Ok(2));
    assert_eq!(c.ranges(blocked), (vec![(0, u64::MAX)], 1), "no trace");
    drop((first, second));
    c.destroy(blocked).unwrap();
    c.destroy(b).unwrap();
}

#[test]
fn addresses_in_use() {
    let (core, c) = (core(), Client::new());
    let group = hardware(&core);
    let (one, _) = device(&core, "one", Some(&group));
    let binding = c.ctx.bind(of(&one)).unwrap();
    let ioas = c.ioas();
    c.allow(ioas, &[(MSI, MSI + 0xfff)]).unwrap();
    assert_eq!(
        binding.attach(ioas),
        Err(Errno::ADDRINUSE),
        "allowed, then reserved"
    );
    c.allow(ioas, &[(0x1000_0000, 0x1000_ffff)]).unwrap();
    let hwpt = binding.attach(ioas).unwrap();
    assert_eq!(
        c.allow(ioas, &[(0, MSI)]),
        Err(Errno::ADDRINUSE),
        "reserved, then allowed"
    );
    let mut memory = Pages::new(1);
    let va = memory.addr();
    assert_eq!(
        c.map(ioas, R, va, PAGE, 0),
        Ok(0x1000_0000),
        "the set before is in force"
    );
    binding.detach();
    assert_eq!(c.destroy(hwpt), Err(Errno::NOENT));
    c.allow(ioas, &[(0, MSI)]).unwrap();
    for crooked in [(va, PAGE, 8), (va + 8, 8, 0x8000)] {
        c.unmap(ioas, 0, u64::MAX).unwrap();
        c.allow(ioas, &[]).unwrap();
        c.map(ioas, FIXED | R, crooked.0, crooked.1, crooked.2)
            .unwrap();
        assert_eq!(binding.attach(ioas), Err(Errno::ADDRINUSE));
        assert_eq!(c.hwpt(binding.devid(), ioas), Err(Errno::ADDRINUSE));
    }
    // Automatic IOVAs go around what is reserved.
    c.unmap(ioas, 0, u64::MAX).unwrap();
    binding.attach(ioas).unwrap();
    c.allow(
        ioas,
        &[(MSI + 0x10_0000, MSI + 0x10_0fff), (MSI - PAGE, MSI - 1)],
    )
    .unwrap();
    assert_eq!(c.map(ioas, R, va, PAGE, 0), Ok(MSI - PAGE));
    assert_eq!(c.map(ioas, R, va, PAGE, 0), Ok(MSI + 0x10_0000));
    assert_eq!(c.map(ioas, R, va, PAGE, 0), Err(Errno::NOSPC));
}

/// As with pinning, memory must be there once there is a page table.
#[test]
fn a_page_table_wants_memory() {
    static READ_ONLY: [u8; 8192] = [3; 8192];
    let (core, c) = (core(), Client::new());
    let group = hardware(&core);
    let (one, _) = device(&core, "one", Some(&group));
    let binding = c.ctx.bind(of(&one)).unwrap();
    let ioas = c.ioas();
    c.map(ioas, FIXED | R, PAGE, PAGE, 0).unwrap();
    assert_eq!(binding.attach(ioas), Err(Errno::FAULT));
    assert_eq!(c.hwpt(binding.devid(), ioas), Err(Errno::FAULT));
    c.unmap(ioas, 0, u64::MAX).unwrap();
    binding.attach(ioas).unwrap();
    assert_eq!(c.map(ioas, FIXED | R, PAGE, PAGE, 0), Err(Errno::FAULT));
    assert_eq!(c.unmap(ioas, 0, u64::MAX), Ok(0), "not mapped");
    let read_only = (&raw const READ_ONLY).expose_provenance() as u64;
    let read_only = read_only.next_multiple_of(PAGE);
    assert_eq!(
        c.map(ioas, FIXED | RW, read_only, PAGE, 0),
        Err(Errno::FAULT)
    );
    assert_eq!(c.map(ioas, FIXED | R, read_only, PAGE, 0), Ok(0));
    assert_eq!(
        c.option(option_id::HUGE_PAGES, option_op::SET, ioas, 0),
        Err(Errno::INVAL)
    );
    assert_eq!(c.unmap(ioas, 0, u64::MAX), Ok(PAGE));
    assert_eq!(
        c.option(option_id::HUGE_PAGES, option_op::SET, ioas, 0),
        Ok(0)
    );
}

#[test]
fn page_tables_made_by_hand() {
    let (core, c) = (core(), Client::new());
    let group = hardware(&core);
    let (one, _) = device(&core, "one", Some(&group));
    let (two, _) = device(&core, "two", Some(&group));
    let [first, second] = [&one, &two].map(|d| c.ctx.bind(of(d)).unwrap());
    let dev_id = first.devid();
    let ioas = c.ioas();
    let alloc = |change: &dyn Fn(&mut HwptAlloc)| {
        let mut arg = HwptAlloc {
            size: 48,
            dev_id,
            pt_id: ioas,
            ..Default::default()
        };
        change(&mut arg);
        c.call(ioctl::IOMMU_HWPT_ALLOC, &mut arg)
            .map(|_| arg.out_hwpt_id)
    };
    assert_eq!(alloc(&|a| a.reserved = 1), Err(Errno::OPNOTSUPP));
    assert_eq!(alloc(&|a| a.reserved2 = 1), Err(Errno::OPNOTSUPP));
    assert_eq!(
        alloc(&|a| (a.data_len, a.dev_id) = (8, 99)),
        Err(Errno::INVAL)
    );
    assert_eq!(
        alloc(&|a| (a.data_type, a.dev_id) = (1, 99)),
        Err(Errno::INVAL)
    );
    assert_eq!(alloc(&|a| a.dev_id = 99), Err(Errno::NOENT));
    assert_eq!(alloc(&|a| a.dev_id = ioas), Err(Errno::NOENT));
    assert_eq!(alloc(&|a| a.pt_id = 99), Err(Errno::INVAL));
    assert_eq!(alloc(&|a| a.pt_id = a.dev_id), Err(Errno::INVAL));
    assert_eq!(
        alloc(&|a| (a.data_type, a.data_len) = (1, 8)),
        Err(Errno::OPNOTSUPP)
    );
    for flags in [1, 2, 8, 1 << 31] {
        let flags = HwptAllocFlags::from_bits_retain(flags);
        assert_eq!(alloc(&|a| a.flags = flags), Err(Errno::OPNOTSUPP));
    }
    assert_eq!(
        alloc(&|a| a.flags = HwptAllocFlags::FAULT_ID_VALID),
        Err(Errno::NOENT)
    );
    let hwpt = alloc(&|a| a.size = 24).unwrap();
    assert_eq!(hwpt, 4);
    assert_eq!(
        alloc(&|a| a.pt_id = hwpt),
        Err(Errno::OPNOTSUPP),
        "nothing nests"
    );
    assert_eq!(c.ranges(ioas).1, PAGE);
    assert_eq!(c.destroy(ioas), Err(Errno::BUSY));
    assert_eq!(first.attach(hwpt), Ok(hwpt));
    assert_eq!(c.destroy(hwpt), Err(Errno::BUSY));
    assert_eq!(
        second.attach(ioas),
        Err(Errno::INVAL),
        "an automatic one is another"
    );
    assert_eq!(second.attach(hwpt), Ok(hwpt));
    let auto = first.attach(ioas).unwrap();
    assert_ne!(auto, hwpt);
    first.detach();
    second.detach();
    assert_eq!(c.destroy(auto), Err(Errno::NOENT));
    assert_eq!(c.destroy(hwpt), Ok(0), "its maker must destroy it");
    assert_eq!(c.destroy(ioas), Ok(0));
}

#[test]
fn questions_about_hardware() {
    let (core, c) = (core(), Client::new());
    let group = hardware(&core);
    let (one, _) = device(&core, "one", Some(&group));
    let binding = c.ctx.bind(of(&one)).unwrap();
    let ioas = c.ioas();
    let hwpt = c.hwpt(binding.devid(), ioas).unwrap();
    let mut data = [0xffu8; 24];
    let template = HwInfo {
        size: 40,
        dev_id: binding.devid(),
        ..Default::default()
    };
    let ask = |arg: &mut HwInfo| c.call(ioctl::IOMMU_GET_HW_INFO, arg);
    let mut arg = HwInfo {
        data_len: 20,
        data_uptr: address(&mut data),
        ..template
    };
    assert_eq!(ask(&mut arg), Ok(0));
    assert_eq!((arg.data_type, arg.data_len), (0, 0));
    let data = std::hint::black_box(&data);
    assert_eq!(
        (&data[..20], &data[20..]),
        (&[0; 20][..], &[0xff; 4][..]),
        "zeroed"
    );
    assert_eq!(
        ask(&mut HwInfo {
            data_len: 8,
            data_uptr: 8,
            ..template
        }),
        Err(Errno::FAULT)
    );
    for bad in [
        HwInfo {
            reserved: [0, 0, 1],
            dev_id: 99,
            ..template
        },
        HwInfo {
            flags: HwInfoFlags::from_bits_retain(2),
            ..template
        },
        HwInfo {
            flags: HwInfoFlags::INPUT_TYPE,
            data_type: 1,
            ..template
        },
    ] {
        assert_eq!(ask(&mut { bad }), Err(Errno::OPNOTSUPP), "{bad:?}");
    }
    assert_eq!(
        ask(&mut HwInfo {
            dev_id: hwpt,
            ..template
        }),
        Err(Errno::NOENT)
    );

    let track = |flags: u32, hwpt_id: u32| {
        let mut arg = HwptSetDirtyTracking {
            size: 16,
            flags: DirtyTrackingFlags::from_bits_retain(flags),
            hwpt_id,
            reserved: 0,
        };
        c.call(ioctl::IOMMU_HWPT_SET_DIRTY_TRACKING, &mut arg)
    };
    assert_eq!(track(2, 99), Err(Errno::OPNOTSUPP));
    assert_eq!(track(1, ioas), Err(Errno::NOENT));
    assert_eq!(track(1, hwpt), Err(Errno::OPNOTSUPP));

    let bitmap = |flags: u32, hwpt_id: u32, iova: u64, length: u64, page_size: u64| {
        let mut arg = HwptGetDirtyBitmap {
            size: 48,
            hwpt_id,
            flags: DirtyBitmapFlags::from_bits_retain(flags),
            reserved: 0,
            iova,
            length,
            page_size,
            data: 0,
        };
        c.call(ioctl::IOMMU_HWPT_GET_DIRTY_BITMAP, &mut arg)
    };
    assert_eq!(bitmap(2, 99, 0, 0, 0), Err(Errno::OPNOTSUPP));
    assert_eq!(bitmap(0, ioas, 0, 0, 0), Err(Errno::NOENT));
    assert_eq!(bitmap(0, hwpt, 0, 0, PAGE), Err(Errno::INVAL));
    assert_eq!(bitmap(0, hwpt, u64::MAX, 2, PAGE), Err(Errno::OVERFLOW));
    assert_eq!(bitmap(0, hwpt, 1, PAGE - 1, 1), Err(Errno::INVAL));
    assert_eq!(bitmap(0, hwpt, 0, PAGE, 0), Err(Errno::INVAL));
    assert_eq!(bitmap(0, hwpt, PAGE, PAGE, 2 * PAGE), Err(Errno::INVAL));
    assert_eq!(
        bitmap(1, hwpt, 0, 2 * PAGE, 2 * PAGE),
        Err(Errno::OPNOTSUPP)
    );

    let template = HwptInvalidate {
        size: 32,
        hwpt_id: hwpt,
        data_uptr: 1,
        entry_len: 16,
        entry_num: 3,
        ..Default::default()
    };
    for (arg, errno) in [
        (
            HwptInvalidate {
                reserved: 1,
                hwpt_id: 99,
                ..template
            },
            Errno::OPNOTSUPP,
        ),
        (
            HwptInvalidate {
                data_uptr: 0,
                hwpt_id: 99,
                ..template
            },
            Errno::INVAL,
        ),
        (
            HwptInvalidate {
                entry_len: 0,
                ..template
            },
            Errno::INVAL,
        ),
        (
            HwptInvalidate {
                entry_len: 4097,
                ..template
            },
            Errno::INVAL,
        ),
        (
            HwptInvalidate {
                entry_num: (1 << 19) + 1,
                ..template
            },
            Errno::INVAL,
        ),
        (
            HwptInvalidate {
                hwpt_id: 99,
                entry_num: 0,
                entry_len: 0,
                ..template
            },
            Errno::NOENT,
        ),
        (
            HwptInvalidate {
                hwpt_id: 99,
                ..template
            },
            Errno::NOENT,
        ),
        (template, Errno::INVAL),
    ] {
        let mut arg = arg;
        let got = c.call(ioctl::IOMMU_HWPT_INVALIDATE, &mut arg);
        assert_eq!((got, arg.entry_num), (Err(errno), 0), "written back always");
    }
}

#[test]
fn a_group_belongs_to_one_context() {
    let core = core();
    let (a, b) = (Client::new(), Client::new());
    let group = hardware(&core);
    let (one, _) = device(&core, "one", Some(&group));
    let (two, _) = device(&core, "two", Some(&group));
    let (free, _) = device(&core, "free", Some(&hardware(&core)));
    let (soft, _) = device(&core, "soft", None);
    let first = a.ctx.bind(of(&one)).unwrap();
    assert_eq!(b.ctx.bind(of(&two)).map(drop).unwrap_err(), Errno::PERM);
    assert_eq!(b.ioas(), 1, "a refused bind leaves no object");
    let second = a.ctx.bind(of(&two)).unwrap();
    let _other = b.ctx.bind(of(&free)).unwrap();
    let _soft = b.ctx.bind(of(&soft)).unwrap();
    drop(first);
    assert_eq!(b.ctx.bind(of(&two)).map(drop).unwrap_err(), Errno::PERM);
    drop(second);
    let _moved = b.ctx.bind(of(&two)).unwrap();
    assert_eq!(a.ctx.bind(of(&one)).map(drop).unwrap_err(), Errno::PERM);
}

/// Mappings stay until the file is closed and no device is bound, in whatever order.
#[test]
fn ends_in_any_order() {
    let orders = [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ];
    for order in orders {
        let (core, c) = (core(), Client::new());
        let mut memory = Pages::new(1);
        let va = memory.addr();
        let (soft, _) = device(&core, "soft", None);
        let (hard, _) = device(&core, "hard", Some(&hardware(&core)));
        let ioas = c.ioas();
        c.map(ioas, FIXED | RW, va, PAGE, 0).unwrap();
        let mut bindings = [&soft, &hard].map(|d| Some(c.ctx.bind(of(d)).unwrap()));
        for binding in bindings.iter().flatten() {
            binding.attach(ioas).unwrap();
        }
        let dma = bindings.each_ref().map(|b| b.as_ref().unwrap().dma());
        let spare = c.hwpt(bindings[1].as_ref().unwrap().devid(), ioas).unwrap();
        let watched = Arc::downgrade(&c.ctx.ioas(ioas).unwrap());
        for step in order {
            assert!(watched.upgrade().is_some(), "{order:?}");
            match step {
                2 => c.ctx.close(),
                n => bindings[n] = None,
            }
            for (binding, dma) in bindings.iter().zip(&dma) {
                let want = if binding.is_some() {
                    Ok(0)
                } else {
                    Err(Errno::NOENT)
                };
                assert_eq!(byte(&**dma, 0), want, "{order:?}");
            }
        }
        assert!(
            watched.upgrade().is_none(),
            "{order:?}: {spare} and {ioas} are destroyed"
        );
        assert!(c.ctx.table().entries.is_empty());
    }
}

/// The same through a device file's ioctls, with a driver that hears of it.
#[test]
fn through_the_device_file() {
    let (core, c) = (core(), Client::new());
    let (registered, seen) = device(&core, "soft", None);
    let mut memory = Pages::new(3);
    let va = memory.addr();
    memory.bytes()[0] = 42;
    let ioas = c.ioas();
    let file = of(&registered).open_cdev(opener()).unwrap();
    let mut bind = BindIommufd {
        argsz: 24,
        iommufd: c.fd,
        ..Default::default()
    };
    file.ioctl(ioctl::VFIO_DEVICE_BIND_IOMMUFD, address(&mut bind), &c.us)
        .unwrap();
    assert_eq!(std::hint::black_box(&bind).out_devid, 2);
    let attach = |pt_id: u32| {
        let mut arg = AttachIommufdPt {
            argsz: 16,
            pt_id,
            ..Default::default()
        };
        file.ioctl(
            ioctl::VFIO_DEVICE_ATTACH_IOMMUFD_PT,
            address(&mut arg),
            &c.us,
        )
    };
    attach(ioas).unwrap();
    let dma = seen.dma.lock().unwrap().clone().unwrap();
    let mut buf = [0];
    c.map(ioas, FIXED | RW, va, PAGE, 0).unwrap();
    c.map(ioas, FIXED | RW, va, PAGE, 2 * PAGE).unwrap();
    dma.read(0, &mut buf).unwrap();
    assert_eq!(buf, [42]);
    let told = |seen: &Seen| std::mem::take(&mut *seen.unmaps.lock().unwrap());
    assert_eq!(told(&seen), []);
    c.unmap(ioas, 0, u64::MAX).unwrap();
    assert_eq!(told(&seen), [(0, PAGE), (2 * PAGE, PAGE)]);
    let other = c.ioas();
    attach(other).unwrap();
    assert_eq!(told(&seen), [(0, u64::MAX)], "all of the old one");
    attach(other).unwrap();
    assert_eq!(attach(99), Err(Errno::NOENT));
    assert_eq!(told(&seen), []);
    let mut detach = DetachIommufdPt {
        argsz: 12,
        ..Default::default()
    };
    for _ in 0..2 {
        let at = address(&mut detach);
        file.ioctl(ioctl::VFIO_DEVICE_DETACH_IOMMUFD_PT, at, &c.us)
            .unwrap();
    }
    assert_eq!(told(&seen), [(0, u64::MAX)]);
    assert_eq!(dma.read(0, &mut buf), Err(Errno::NOENT));
    attach(other).unwrap();
    c.ctx.close();
    file.release();
    assert_eq!(seen.closes.load(Ordering::SeqCst), 1);
    assert!(
        c.ctx.table().entries.is_empty(),
        "the last bound device took all with it"
    );
}
