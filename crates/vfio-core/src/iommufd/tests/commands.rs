//! Every command and every errno of it that does not need a device.

use super::*;
use crate::iommufd::testing::ReadOnly;

const MAX: u64 = u64::MAX;

#[test]
fn dispatch() {
    let c = Client::new();
    let call = |cmd: u32, arg: u64| c.ctx.ioctl(cmd, arg, &c.us);
    assert_eq!(
        call(0x4000_3b80, 0),
        Err(Errno::NOTTY),
        "iommufd's number, another word"
    );
    assert_eq!(call(0x3b9f, 0), Err(Errno::NOTTY));
    assert_eq!(call(ioctl::VFIO_GET_API_VERSION, 0), Ok(0));
    for (extension, answer) in [(1, Ok(1)), (3, Ok(1)), (9, Ok(1)), (6, Ok(0)), (10, Ok(0))] {
        assert_eq!(call(ioctl::VFIO_CHECK_EXTENSION, extension), answer);
    }
    assert_eq!(call(ioctl::VFIO_SET_IOMMU, 1), Err(Errno::NODEV));
    assert_eq!(call(ioctl::VFIO_CHECK_EXTENSION, 4), Err(Errno::NODEV));
    assert_eq!(call(ioctl::VFIO_IOMMU_DIRTY_PAGES, 0), Err(Errno::NOTTY));
    for &cmd in ioctl::IommufdIoctl::ALL {
        let got = call(cmd.cmd(), 0);
        let unsupported = matches!(cmd.cmd(), 0x3b90 | 0x3b91 | 0x3b93 | 0x3b94);
        let want = if unsupported {
            Errno::OPNOTSUPP
        } else {
            Errno::FAULT
        };
        assert_eq!(got, Err(want), "{cmd}");
    }
}

/// The size word of every command: one short, one long and zero, one long and not, huge.
#[test]
fn sizes() {
    let c = Client::new();
    let sizes = [
        (ioctl::IOMMU_DESTROY, 8, 8),
        (ioctl::IOMMU_IOAS_ALLOC, 12, 12),
        (ioctl::IOMMU_IOAS_ALLOW_IOVAS, 24, 24),
        (ioctl::IOMMU_IOAS_COPY, 40, 40),
        (ioctl::IOMMU_IOAS_IOVA_RANGES, 32, 32),
        (ioctl::IOMMU_IOAS_MAP, 40, 40),
        (ioctl::IOMMU_IOAS_MAP_FILE, 40, 40),
        (ioctl::IOMMU_IOAS_UNMAP, 24, 24),
        (ioctl::IOMMU_OPTION, 24, 24),
        (ioctl::IOMMU_VFIO_IOAS, 12, 12),
        (ioctl::IOMMU_HWPT_ALLOC, 24, 48),
        (ioctl::IOMMU_GET_HW_INFO, 32, 40),
        (ioctl::IOMMU_HWPT_SET_DIRTY_TRACKING, 16, 16),
        (ioctl::IOMMU_HWPT_GET_DIRTY_BITMAP, 48, 48),
        (ioctl::IOMMU_HWPT_INVALIDATE, 32, 32),
        (ioctl::IOMMU_IOAS_CHANGE_PROCESS, 8, 8),
        (ioctl::IOMMU_FAULT_QUEUE_ALLOC, 16, 16),
        (ioctl::IOMMU_IOAS_NOIOMMU_GET_PA, 40, 40),
    ];
    for (cmd, min, known) in sizes {
        let try_size = |size: u32, tail: u8| {
            let mut bytes = vec![0u8; 64];
            bytes[..4].copy_from_slice(&size.to_ne_bytes());
            bytes[known as usize] = tail;
            c.ctx.ioctl(cmd, address(bytes.as_mut_slice()), &c.us)
        };
        assert_eq!(try_size(min - 1, 0), Err(Errno::INVAL), "{cmd:#x}");
        assert_eq!(try_size(0, 0), Err(Errno::INVAL), "{cmd:#x}");
        assert_eq!(try_size(known + 1, 1), Err(Errno::TOOBIG), "{cmd:#x}");
        assert_eq!(try_size(u32::MAX, 1), Err(Errno::TOOBIG), "{cmd:#x}");
        let exact = try_size(known, 0);
        assert_ne!(exact, Err(Errno::TOOBIG), "{cmd:#x}");
        if cmd != ioctl::IOMMU_IOAS_ALLOC {
            assert_eq!(try_size(known + 1, 0), exact, "{cmd:#x}");
            assert_eq!(try_size(known, 1), exact, "beyond the size: {cmd:#x}");
        }
    }
}

#[test]
fn ids_are_lowest_free_from_one() {
    let c = Client::new();
    assert_eq!([c.ioas(), c.ioas(), c.ioas()], [1, 2, 3]);
    assert_eq!(c.destroy(2), Ok(0));
    assert_eq!(c.destroy(2), Err(Errno::NOENT));
    assert_eq!(c.destroy(0), Err(Errno::NOENT));
    assert_eq!([c.ioas(), c.ioas()], [2, 4]);
    let other = Client::new();
    assert_eq!(other.ioas(), 1, "a namespace per context");
    assert_eq!(other.destroy(3), Err(Errno::NOENT));
}

#[test]
fn ioas_alloc() {
    let c = Client::new();
    let mut arg = IoasAlloc {
        size: 12,
        flags: 1,
        out_ioas_id: 0,
    };
    assert_eq!(
        c.call(ioctl::IOMMU_IOAS_ALLOC, &mut arg),
        Err(Errno::OPNOTSUPP)
    );
    arg.flags = 0;
    let at = address(&mut arg);
    let done = c
        .ctx
        .ioctl(ioctl::IOMMU_IOAS_ALLOC, at, &ReadOnly(&Us::default()));
    assert_eq!(done, Err(Errno::FAULT));
    assert_eq!(c.destroy(1), Err(Errno::NOENT), "not made");
    assert_eq!(c.ioas(), 1);
}

#[test]
fn objects_are_bounded() {
    let c = Client::new();
    for _ in 0..crate::iommufd::table::MAX_OBJECTS {
        c.ioas();
    }
    let mut arg = IoasAlloc {
        size: 12,
        ..Default::default()
    };
    assert_eq!(c.call(ioctl::IOMMU_IOAS_ALLOC, &mut arg), Err(Errno::NOMEM));
    c.destroy(77).unwrap();
    assert_eq!(c.ioas(), 77);
}

#[test]
fn map_errnos() {
    let c = Client::new();
    let mut memory = Pages::new(4);
    let va = memory.addr();
    let ioas = c.ioas();
    c.map(ioas, FIXED | R, va, PAGE, 0x10_0000).unwrap();
    let unknown = MapFlags::from_bits_retain(8);
    let cases = [
        (ioas, R | unknown, va, PAGE, 0, Errno::OPNOTSUPP),
        (99, unknown, va, MAX, MAX, Errno::OPNOTSUPP),
        (99, R, va, MAX, 0, Errno::OVERFLOW),
        (99, FIXED | R, va, PAGE, MAX, Errno::OVERFLOW),
        (99, FIXED, va, PAGE, 0, Errno::INVAL),
        (99, FIXED | R, MAX, PAGE, 0, Errno::NOENT),
        (ioas, FIXED | R, MAX - PAGE + 1, PAGE, 0, Errno::OVERFLOW),
        (ioas, FIXED | R, va, 0, 0, Errno::INVAL),
        (ioas, FIXED | R, va, PAGE, MAX - 1, Errno::OVERFLOW),
        (ioas, FIXED | R, va, PAGE, 0x10_0000, Errno::EXIST),
        (ioas, FIXED | R, va, PAGE, 0x10_0000 - 1, Errno::EXIST),
        (ioas, FIXED | R, va, 1, 0x10_0fff, Errno::EXIST),
        (ioas, R, 0, MAX / 2, 0, Errno::OVERFLOW),
        (ioas, R, 0x8000, MAX / 2, 0, Errno::OVERFLOW),
    ];
    for (n, (id, flags, va, length, iova, errno)) in cases.into_iter().enumerate() {
        assert_eq!(c.map(id, flags, va, length, iova), Err(errno), "case {n}");
    }
    let mut reserved = map_arg(ioas, FIXED | R, va, PAGE, 0);
    reserved.reserved = 1;
    let got = c.call(ioctl::IOMMU_IOAS_MAP, &mut reserved);
    assert_eq!(got, Err(Errno::OPNOTSUPP));
    // Nothing of all that is mapped, and nobody has looked at a bad address.
    assert_eq!(c.unmap(ioas, 0, MAX), Ok(PAGE));
    assert_eq!(
        c.map(ioas, FIXED | R, 0, PAGE, 0),
        Ok(0),
        "bad memory is found at the access"
    );
    assert_eq!(byte(&c.port(ioas), 0), Err(Errno::FAULT));
}

#[test]
fn edges_of_the_space() {
    let c = Client::new();
    let ioas = c.ioas();
    let mut memory = Pages::new(1);
    let va = memory.addr();
    memory.bytes().fill(9);
    let last_page = MAX - PAGE + 1;
    assert_eq!(c.map(ioas, FIXED | R, va, PAGE, last_page), Ok(last_page));
    let port = c.port(ioas);
    assert_eq!(byte(&port, MAX), Ok(9));
    assert_eq!(port.read(MAX, &mut [0; 2]), Err(Errno::OVERFLOW));
    assert_eq!(c.map(ioas, FIXED | R, va, 1, MAX - 1), Err(Errno::EXIST));
    assert_eq!(c.unmap(ioas, last_page, PAGE), Ok(PAGE));
    assert_eq!(
        c.map(ioas, FIXED | R, 0, MAX - PAGE - 1, 0),
        Ok(0),
        "nearly all of it"
    );
    assert_eq!(c.unmap(ioas, 0, MAX - 1), Ok(MAX - PAGE - 1));
}

#[test]
fn unmap_errnos() {
    let c = Client::new();
    let ioas = c.ioas();
    assert_eq!(c.unmap(99, MAX, MAX), Err(Errno::NOENT));
    assert_eq!(c.unmap(ioas, MAX, 1), Err(Errno::OVERFLOW));
    assert_eq!(c.unmap(ioas, 1, MAX), Err(Errno::OVERFLOW));
    assert_eq!(c.unmap(ioas, PAGE, 0), Err(Errno::INVAL));
    assert_eq!(c.unmap(ioas, MAX - 1, 3), Err(Errno::OVERFLOW));
    assert_eq!(
        c.unmap(ioas, PAGE, PAGE),
        Err(Errno::NOENT),
        "nothing there"
    );
    assert_eq!(c.unmap(ioas, 0, MAX), Ok(0), "all of nothing");
    for n in 0..4 {
        c.map(ioas, FIXED | R, PAGE, PAGE, n * PAGE).unwrap();
    }
    assert_eq!(
        c.unmap(ioas, 0, 2 * PAGE + 1),
        Err(Errno::NOENT),
        "cuts the third"
    );
    assert_eq!(
        c.unmap(ioas, 0, PAGE),
        Err(Errno::NOENT),
        "the first are gone already"
    );
    assert_eq!(c.unmap(ioas, 2 * PAGE + 1, PAGE), Err(Errno::NOENT));
    assert_eq!(
        c.unmap(ioas, PAGE, 2 * PAGE),
        Ok(PAGE),
        "holes do not matter"
    );
    assert_eq!(c.unmap(ioas, 0, MAX), Ok(PAGE));
}

#[test]
fn automatic_iovas() {
    let c = Client::new();
    let ioas = c.ioas();
    let first = c.map(ioas, R, 0x7000_0000_0000, PAGE, 0x5000).unwrap();
    assert_eq!(
        first, PAGE,
        "the first page is never chosen, the argument ignored"
    );
    for (va, length, align) in [
        (0x7000_0000_0000, 3 * PAGE, 4 * PAGE),
        (0x7000_0000_1000, 1 << 30, PAGE),
        (0x7000_0020_0000, 1 << 30, 2 << 20),
        (0, 8 * PAGE, 8 * PAGE),
    ] {
        let iova = c.map(ioas, R, va, length, 0).unwrap();
        assert_eq!(iova % align, 0, "{va:#x} {length:#x} {iova:#x}");
    }
    // The place in the page is kept as long as nothing demands alignment.
    let iova = c.map(ioas, R, 0x7000_0000_0010, 100, 0).unwrap();
    assert_eq!(iova % PAGE, 0x10);
    c.unmap(ioas, 0, MAX).unwrap();
    c.option(option_id::HUGE_PAGES, option_op::SET, ioas, 0)
        .unwrap();
    let crooked = c.map(ioas, R, 0x7000_0000_0010, PAGE, 0);
    assert_eq!(crooked, Err(Errno::INVAL));
    // Within what is allowed, in order; fixed ones may go anywhere.
    c.allow(
        ioas,
        &[
            (0x3_0000, 0x3_1fff),
            (0x1_0000, 0x1_0fff),
            (0x3_2000, 0x3_2fff),
        ],
    )
    .unwrap();
    let mut got = Vec::new();
    for _ in 0..4 {
        got.push(c.map(ioas, R, PAGE, PAGE, 0).unwrap());
    }
    assert_eq!(got, [0x1_0000, 0x3_0000, 0x3_1000, 0x3_2000]);
    assert_eq!(c.map(ioas, R, PAGE, PAGE, 0), Err(Errno::NOSPC));
    assert_eq!(c.map(ioas, FIXED | R, PAGE, PAGE, 0), Ok(0));
    c.unmap(ioas, 0, MAX).unwrap();
    assert_eq!(
        c.map(ioas, R, PAGE, 3 * PAGE, 0),
        Ok(0x3_0000),
        "neighbours are one range"
    );
    c.allow(ioas, &[]).unwrap();
    assert_eq!(
        c.map(ioas, R, PAGE, PAGE, 0),
        Ok(PAGE),
        "none allowed is all allowed"
    );
    // The last page is never chosen either.
    c.unmap(ioas, 0, MAX).unwrap();
    c.allow(ioas, &[(MAX - 2 * PAGE + 1, MAX)]).unwrap();
    assert_eq!(c.map(ioas, R, PAGE, PAGE, 0), Ok(MAX - 2 * PAGE + 1));
    assert_eq!(c.map(ioas, R, PAGE, PAGE, 0), Err(Errno::NOSPC));
}

#[test]
fn allow_iovas_errnos() {
    let c = Client::new();
    let ioas = c.ioas();
    assert_eq!(c.allow(99, &[(1, 0)]), Err(Errno::NOENT));
    for bad in [
        &[(5, 5)][..],
        &[(6, 5)],
        &[(0, 10), (10, 20)],
        &[(10, 20), (0, 10)],
        &[(0, 100), (10, 20)],
        &[(10, 20), (0, 100)],
        &[(0, 1), (0, 1)],
    ] {
        assert_eq!(c.allow(ioas, bad), Err(Errno::INVAL), "{bad:?}");
    }
    let mut arg = IoasAllowIovas {
        size: 24,
        ioas_id: ioas,
        num_iovas: 1,
        reserved: 1,
        allowed_iovas: 0,
    };
    let cmd = ioctl::IOMMU_IOAS_ALLOW_IOVAS;
    assert_eq!(c.call(cmd, &mut arg), Err(Errno::OPNOTSUPP));
    arg.reserved = 0;
    assert_eq!(c.call(cmd, &mut arg), Err(Errno::FAULT));
    arg.allowed_iovas = MAX - 7;
    assert_eq!(c.call(cmd, &mut arg), Err(Errno::FAULT));
    arg.num_iovas = u32::MAX;
    assert_eq!(c.call(cmd, &mut arg), Err(Errno::NOMEM));
    // More than one piece, the last range overlapping the first: the one set before stays.
    c.allow(ioas, &[(0x9000, 0x9fff)]).unwrap();
    let mut many: Vec<(u64, u64)> = (0..600)
        .map(|n| (n * 0x1_0000, n * 0x1_0000 + 0xfff))
        .collect();
    many.push((0xfff, 0x1_0000));
    assert_eq!(c.allow(ioas, &many), Err(Errno::INVAL));
    assert_eq!(c.map(ioas, R, PAGE, PAGE, 0), Ok(0x9000));
    many.pop();
    c.allow(ioas, &many).unwrap();
    assert_eq!(c.map(ioas, R, PAGE, PAGE, 0), Ok(0x1_0000));
}

#[test]
fn iova_ranges() {
    let c = Client::new();
    let ioas = c.ioas();
    assert_eq!(c.ranges(ioas), (vec![(0, MAX)], 1), "a fresh one");
    let mut arg = IoasIovaRanges {
        size: 32,
        ioas_id: ioas,
        ..Default::default()
    };
    let cmd = ioctl::IOMMU_IOAS_IOVA_RANGES;
    assert_eq!(c.call(cmd, &mut arg), Err(Errno::MSGSIZE));
    assert_eq!(
        (arg.num_iovas, arg.out_iova_alignment),
        (1, 1),
        "told nevertheless"
    );
    arg.allowed_iovas = 8;
    assert_eq!(c.call(cmd, &mut arg), Err(Errno::FAULT));
    arg.reserved = 1;
    arg.ioas_id = 99;
    assert_eq!(c.call(cmd, &mut arg), Err(Errno::OPNOTSUPP));
    arg.reserved = 0;
    assert_eq!(c.call(cmd, &mut arg), Err(Errno::NOENT));
}

#[test]
fn copy_errnos() {
    let c = Client::new();
    let (a, b) = (c.ioas(), c.ioas());
    let mut memory = Pages::new(4);
    let va = memory.addr();
    memory
        .bytes()
        .chunks_mut(4096)
        .zip(1..)
        .for_each(|(page, n)| page.fill(n));
    c.map(a, FIXED | RW, va, 2 * PAGE, 0x10000).unwrap();
    c.map(a, FIXED | R, va + 2 * PAGE, 2 * PAGE, 0x12000)
        .unwrap();
    let unknown = MapFlags::from_bits_retain(1 << 20);
    let cases = [
        ((99, 0), (99, 0), MAX, unknown, Errno::OPNOTSUPP),
        ((99, 0), (99, 0), MAX, FIXED, Errno::OVERFLOW),
        ((99, MAX), (99, 0), 1, FIXED, Errno::OVERFLOW),
        ((99, 0), (99, MAX), 1, FIXED, Errno::OVERFLOW),
        ((99, 0), (99, 0), 1, FIXED, Errno::INVAL),
        ((b, 0), (99, 0), 1, FIXED | R, Errno::NOENT),
        ((b, 0), (a, 0x10000), 0, FIXED | R, Errno::INVAL),
        ((b, 0), (a, MAX - 1), 3, FIXED | R, Errno::OVERFLOW),
        ((b, 0), (a, 0xffff), 2, FIXED | R, Errno::NOENT),
        ((b, 0), (a, 0x13fff), 2, FIXED | R, Errno::NOENT),
        ((99, 0), (a, 0x10000), PAGE, FIXED | R, Errno::NOENT),
        ((b, 0), (a, 0x12000), PAGE, FIXED | RW, Errno::PERM),
        ((b, 0), (a, 0x11000), 2 * PAGE, FIXED | W, Errno::PERM),
        ((a, 0x13000), (a, 0x10000), PAGE, FIXED | R, Errno::EXIST),
        ((b, MAX - 1), (a, 0x10000), PAGE, FIXED | R, Errno::OVERFLOW),
    ];
    for (n, (dst, src, length, flags, errno)) in cases.into_iter().enumerate() {
        assert_eq!(c.copy(dst, src, length, flags), Err(errno), "case {n}");
    }
    assert_eq!(c.unmap(b, 0, MAX), Ok(0), "all or nothing");
    // A part, across two mappings, into the same IOAS and another; it outlives its source.
    assert_eq!(c.copy((b, 0), (a, 0x11800), PAGE, FIXED | R), Ok(0));
    assert_eq!(
        c.copy((a, 0x20000), (a, 0x10000), PAGE, FIXED | R),
        Ok(0x20000)
    );
    assert_eq!(
        c.copy((b, 0), (a, 0x11000), PAGE, R),
        Ok(PAGE),
        "a place of its choice"
    );
    c.destroy(a).unwrap();
    let port = c.port(b);
    assert_eq!(
        [byte(&port, 0), byte(&port, 0x7ff), byte(&port, 0x800)],
        [Ok(2), Ok(2), Ok(3)]
    );
    assert_eq!(byte(&port, PAGE), Ok(2));
    // What was mapped for writing can be copied for writing even from a copy that was not.
    c.copy((b, 0x5000), (b, PAGE), PAGE, FIXED | RW).unwrap();
    port.write(0x5000, &[77]).unwrap();
    assert_eq!(memory.bytes()[4096], 77);
    assert_eq!(c.unmap(b, 0, 0x800), Ok(0x800), "two areas");
}

#[test]
fn areas_are_bounded() {
    let c = Client {
        ctx: Iommufd::with_areas(1000),
        ..Client::new()
    };
    let ioas = c.ioas();
    let max = 1000;
    for n in 0..max - 1 {
        c.map(ioas, FIXED | R, PAGE, 1, n).unwrap();
    }
    let other = c.ioas();
    assert_eq!(
        c.copy((other, 0), (ioas, 0), 2, FIXED | R),
        Err(Errno::NOMEM)
    );
    assert_eq!(c.copy((other, 0), (ioas, 0), 1, FIXED | R), Ok(0));
    assert_eq!(
        c.map(ioas, FIXED | R, PAGE, 1, max),
        Err(Errno::NOMEM),
        "of the whole context"
    );
    assert_eq!(c.unmap(ioas, 0, MAX), Ok(max - 1));
    assert_eq!(c.map(ioas, FIXED | R, PAGE, 1, max), Ok(max));
}

#[test]
fn options() {
    use option_id::{HUGE_PAGES, RLIMIT_MODE};
    use option_op::{GET, SET};
    let c = Client::new();
    assert_eq!(c.option(RLIMIT_MODE, GET, 0, 7), Ok(0));
    assert_eq!(c.option(RLIMIT_MODE, SET, 0, 1), Ok(1));
    assert_eq!(c.option(RLIMIT_MODE, GET, 0, 7), Ok(1));
    assert_eq!(c.option(RLIMIT_MODE, SET, 0, 2), Err(Errno::INVAL));
    assert_eq!(c.option(RLIMIT_MODE, SET, 1, 1), Err(Errno::OPNOTSUPP));
    assert_eq!(c.option(RLIMIT_MODE, 2, 0, 1), Err(Errno::OPNOTSUPP));
    assert_eq!(c.option(2, GET, 0, 0), Err(Errno::OPNOTSUPP));
    let ioas = c.ioas();
    assert_eq!(c.option(RLIMIT_MODE, SET, 0, 2), Err(Errno::BUSY));
    c.us.drop_capabilities();
    assert_eq!(c.option(RLIMIT_MODE, SET, 0, 0), Err(Errno::PERM));
    assert_eq!(c.option(RLIMIT_MODE, GET, 0, 0), Ok(1));
    assert_eq!(c.option(HUGE_PAGES, GET, 99, 0), Err(Errno::NOENT));
    assert_eq!(c.option(HUGE_PAGES, GET, ioas, 0), Ok(1));
    assert_eq!(c.option(HUGE_PAGES, 2, ioas, 0), Err(Errno::OPNOTSUPP));
    assert_eq!(c.option(HUGE_PAGES, SET, ioas, 2), Err(Errno::INVAL));
    for (va, length, iova) in [(PAGE, PAGE, 8), (PAGE, 8, PAGE), (PAGE + 8, PAGE, PAGE)] {
        c.map(ioas, FIXED | R, va, length, iova).unwrap();
        assert_eq!(c.option(HUGE_PAGES, SET, ioas, 0), Err(Errno::ADDRINUSE));
        assert_eq!(c.ranges(ioas).1, 1);
        c.unmap(ioas, 0, MAX).unwrap();
    }
    c.map(ioas, FIXED | R, PAGE, PAGE, PAGE).unwrap();
    assert_eq!(c.option(HUGE_PAGES, SET, ioas, 0), Ok(0));
    assert_eq!(c.option(HUGE_PAGES, GET, ioas, 9), Ok(0));
    assert_eq!(c.ranges(ioas).1, PAGE);
    for (va, length, iova) in [(PAGE, PAGE, 8), (PAGE, 8, 0), (PAGE + 8, PAGE, 0)] {
        let crooked = c.map(ioas, FIXED | R, va, length, iova);
        assert_eq!(crooked, Err(Errno::INVAL));
    }
    assert_eq!(c.option(HUGE_PAGES, SET, ioas, 1), Ok(1));
    assert_eq!(c.ranges(ioas).1, 1);
    let mut arg = IommuOption {
        size: 24,
        option_id: 9,
        reserved: 1,
        ..Default::default()
    };
    assert_eq!(c.call(ioctl::IOMMU_OPTION, &mut arg), Err(Errno::OPNOTSUPP));
}

#[test]
fn vfio_ioas() {
    let c = Client::new();
    let ask = |op: u16, ioas_id: u32, reserved: u16| {
        let mut arg = VfioIoas {
            size: 12,
            ioas_id,
            op,
            reserved,
        };
        c.call(ioctl::IOMMU_VFIO_IOAS, &mut arg)
            .map(|_| arg.ioas_id)
    };
    use vfio_ioas_op::{CLEAR, GET, SET};
    assert_eq!(ask(GET, 7, 0), Err(Errno::NODEV));
    assert_eq!(ask(SET, 7, 0), Err(Errno::NOENT));
    assert_eq!(ask(3, 7, 0), Err(Errno::OPNOTSUPP));
    assert_eq!(ask(GET, 7, 1), Err(Errno::OPNOTSUPP));
    assert_eq!(ask(CLEAR, 7, 0), Ok(7));
    let ioas = c.ioas();
    assert_eq!(ask(SET, ioas, 0), Ok(ioas));
    assert_eq!(ask(GET, 0, 0), Ok(ioas));
    let dma_cc = |c: &Client| c.ctx.ioctl(ioctl::VFIO_CHECK_EXTENSION, 4, &c.us);
    assert_eq!(dma_cc(&c), Ok(1));
    assert_eq!(c.destroy(ioas), Ok(0), "destroying it clears the pointer");
    assert_eq!(ask(GET, 0, 0), Err(Errno::NODEV));
    assert_eq!(ask(SET, c.ioas(), 0), Ok(1));
    assert_eq!(ask(CLEAR, 0, 0), Ok(0));
    assert_eq!(dma_cc(&c), Err(Errno::NODEV));
}

#[test]
fn change_process() {
    let c = Client::new();
    let change = |reserved: u32| {
        let mut arg = IoasChangeProcess { size: 8, reserved };
        c.call(ioctl::IOMMU_IOAS_CHANGE_PROCESS, &mut arg)
    };
    assert_eq!(change(1), Err(Errno::OPNOTSUPP));
    assert_eq!(change(0), Ok(0), "nothing to change");
    let ioas = c.ioas();
    c.map(ioas, FIXED | R, PAGE, PAGE, 0).unwrap();
    assert_eq!(change(0), Err(Errno::INVAL));
}

#[test]
fn page_table_commands_without_a_device() {
    let c = Client::new();
    let ioas = c.ioas();
    assert_eq!(c.hwpt(ioas, ioas), Err(Errno::NOENT), "not a device");
    let mut info = HwInfo {
        size: 40,
        dev_id: ioas,
        ..Default::default()
    };
    assert_eq!(
        c.call(ioctl::IOMMU_GET_HW_INFO, &mut info),
        Err(Errno::NOENT)
    );
    let mut fault = FaultAlloc {
        size: 16,
        ..Default::default()
    };
    let queue = c.call(ioctl::IOMMU_FAULT_QUEUE_ALLOC, &mut fault);
    assert_eq!(queue, Err(Errno::OPNOTSUPP));
    let mut pa = [0u8; 40];
    pa[0] = 40;
    let get_pa = ioctl::IOMMU_IOAS_NOIOMMU_GET_PA;
    assert_eq!(c.call(get_pa, &mut pa), Err(Errno::OPNOTSUPP));
    c.us.drop_capabilities();
    assert_eq!(c.call(get_pa, &mut pa), Err(Errno::PERM));
}
