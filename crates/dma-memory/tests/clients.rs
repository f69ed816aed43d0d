//! A device's view of memory that a real client changes under it.

#[path = "../../client-process/tests/child/mod.rs"]
mod child;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use child::Child;
use child::pattern;
use client_process::Caller;
use client_process::FileId;
use client_process::Memory;
use dma_memory::DeviceMemory;
use dma_memory::Errno;
use dma_memory::Fault;
use dma_memory::FileRegistry;
use dma_memory::ProcessMemory;
use dma_memory::Source;
use rustix::fd::AsRawFd;
use rustix::fd::OwnedFd;
use rustix::fs::MemfdFlags;
use rustix::fs::Mode;
use rustix::fs::OFlags;

const PAGE: u64 = 4096;
const HUGE: u64 = 2 << 20;

#[test]
fn child() {
    child::obey();
}

fn memfd(size: u64) -> OwnedFd {
    let file = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, size).unwrap();
    file
}

fn again(file: &OwnedFd, flags: OFlags) -> OwnedFd {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

/// How many mappings of this file we have.
fn mappings(id: FileId) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines()
        .filter(|line| line.split_whitespace().nth(4) == Some(&id.ino.to_string()))
        .count()
}

fn process(client: &Child, addr: u64) -> (Source, Arc<FileRegistry>) {
    let memory = Memory::of(Caller::new(client.pid()).unwrap()).unwrap();
    let files = Arc::new(FileRegistry::new());
    (
        Source::Process(ProcessMemory::new(memory, addr, Arc::clone(&files))),
        files,
    )
}

#[test]
fn a_file_is_mapped_once_for_many_areas() {
    let registry = FileRegistry::new();
    let file = memfd(8 * PAGE);
    let first = registry.open(again(&file, OFlags::RDWR)).unwrap();
    let areas: Vec<Source> = (0..10_000)
        .map(|n| Source::File {
            file: registry.open(file.try_clone().unwrap()).unwrap(),
            offset: (n % 8) * PAGE,
        })
        .collect();
    for (n, area) in areas.iter().enumerate() {
        area.write(8, &[u8::try_from(n % 8).unwrap()]).unwrap();
    }
    let mut byte = [0];
    areas[3].read(8, &mut byte).unwrap();
    assert_eq!(byte, [3]);
    assert_eq!(mappings(first.id().unwrap()), 1);
    drop((areas, first));
    assert_eq!(
        mappings(FileId::of(&file).unwrap()),
        0,
        "unmapped with the last area"
    );
}

#[test]
fn files_are_told_apart_however_late_they_are_asked() {
    let registry = FileRegistry::new();
    let (one, two) = (memfd(PAGE), memfd(PAGE));
    let open = |file: &OwnedFd, mode| registry.open(again(file, mode)).unwrap();
    let first = open(&one, OFlags::RDWR);
    let second = open(&two, OFlags::RDWR);
    assert!(!Arc::ptr_eq(&first, &second));
    assert!(Arc::ptr_eq(&first, &open(&one, OFlags::RDWR)));
    assert!(Arc::ptr_eq(&second, &open(&two, OFlags::RDWR)));
    let reading = open(&one, OFlags::RDONLY);
    assert!(!Arc::ptr_eq(&first, &reading), "it cannot write");
    assert!(Arc::ptr_eq(&reading, &open(&one, OFlags::RDONLY)));

    // The first of a registry is found too, and so is the next first.
    let registry = FileRegistry::new();
    let id = FileId::of(&one).unwrap();
    for _ in 0..2 {
        let only = registry.open(again(&one, OFlags::RDWR)).unwrap();
        assert!(Arc::ptr_eq(&only, &registry.find(id, true).unwrap()));
        assert!(registry.find(id, false).is_none());
        let other = registry.open(again(&two, OFlags::RDWR)).unwrap();
        assert!(!Arc::ptr_eq(&only, &other));
        drop((only, other));
        assert!(registry.find(id, true).is_none());
    }
}

#[test]
fn a_file_that_is_hardly_read_is_not_mapped() {
    let file = memfd(2 * PAGE);
    rustix::io::pwrite(&file, b"there", PAGE - 2).unwrap();
    let shared = FileRegistry::new().open(file.try_clone().unwrap()).unwrap();
    let mapped = || mappings(FileId::of(&file).unwrap());
    let mut buf = [0; 5];
    shared.read(PAGE - 2, &mut buf).unwrap();
    assert_eq!((&buf, mapped()), (b"there", 0));
    for _ in 0..100 {
        shared.read(PAGE - 2, &mut buf).unwrap();
    }
    assert_eq!((&buf, mapped()), (b"there", 1));

    // Its end is the same either way, and what is written is seen at once.
    for reads in [0, 100] {
        let file = memfd(PAGE + 10);
        let shared = FileRegistry::new().open(file.try_clone().unwrap()).unwrap();
        for _ in 0..reads {
            shared.read(0, &mut buf).unwrap();
        }
        assert_eq!(shared.read(PAGE + 8, &mut buf), Ok(()), "in its last page");
        assert_eq!(buf, [0; 5]);
        assert_eq!(shared.read(2 * PAGE - 4, &mut buf), Err(Fault { done: 0 }));
        rustix::io::pwrite(&file, b"fresh", 3).unwrap();
        shared.read(3, &mut buf).unwrap();
        assert_eq!(&buf, b"fresh");
        rustix::fs::ftruncate(&file, 0).unwrap();
        assert!(shared.read(3, &mut buf).is_err());
    }
}

#[test]
fn only_memory_is_taken() {
    let registry = FileRegistry::new();
    let refused = |file: OwnedFd| assert_eq!(registry.open(file).unwrap_err(), Errno::INVAL);
    refused(std::fs::File::open("/dev/zero").unwrap().into());
    refused(std::fs::File::open("/proc/self/status").unwrap().into());
    refused(rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap());
    refused(again(&memfd(PAGE), OFlags::WRONLY));
    refused(again(&memfd(PAGE), OFlags::PATH));
}

#[test]
fn a_read_only_descriptor_gives_no_writing() {
    let registry = FileRegistry::new();
    let file = memfd(PAGE);
    let writable = registry.open(again(&file, OFlags::RDWR)).unwrap();
    let readable = registry.open(again(&file, OFlags::RDONLY)).unwrap();
    writable.write(0, b"w").unwrap();
    assert_eq!(readable.write(0, b"r"), Err(Fault { done: 0 }));
    assert_eq!(readable.store(0, 1_u32), Err(Fault { done: 0 }));
    assert_eq!(readable.load::<u8>(0), Ok(b'w'));
    assert!(!readable.is_writable());

    // Sealed: a writing descriptor cannot write either.
    let sealed = rustix::fs::memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&sealed, PAGE).unwrap();
    rustix::fs::fcntl_add_seals(&sealed, rustix::fs::SealFlags::WRITE).unwrap();
    let sealed = registry.open(sealed).unwrap();
    assert_eq!(sealed.write(0, b"x"), Err(Fault { done: 0 }));
    assert_eq!(sealed.read(0, &mut [1]), Ok(()));
}

#[test]
fn a_file_that_grows_is_followed_and_never_grown_by_us() {
    let file = memfd(0);
    let shared = FileRegistry::new().open(file.try_clone().unwrap()).unwrap();
    assert_eq!(shared.read(0, &mut [0]), Err(Fault { done: 0 }));
    for pages in 1..64 {
        rustix::fs::ftruncate(&file, pages * PAGE).unwrap();
        shared.write(pages * PAGE - 1, &[7]).unwrap();
        let mut buf = [0];
        shared.read(pages * PAGE - 1, &mut buf).unwrap();
        assert_eq!(buf, [7]);
        assert!(shared.write(pages * PAGE, &[7]).is_err());
        assert!(shared.write(pages * PAGE - 1, &[7, 7]).is_err());
        assert_eq!(shared.size(), Ok(pages * PAGE));
    }
    assert_eq!(mappings(shared.id().unwrap()), 1);
    assert!(shared.read(u64::MAX, &mut [0]).is_err());
    assert!(shared.read(u64::MAX - 1, &mut [0; 8]).is_err());
    assert_eq!(
        shared.load::<u64>(3 * PAGE - 4),
        Ok(0x0700_0000),
        "unaligned, across pages"
    );
}

#[test]
fn what_is_too_large_to_map_is_still_reached() {
    let file = memfd(3 << 40);
    let shared = FileRegistry::new().open(file).unwrap();
    let far = (2 << 40) + 5;
    shared.write(far, b"far away").unwrap();
    let mut buf = [0; 8];
    shared.read(far, &mut buf).unwrap();
    assert_eq!(&buf, b"far away");
    assert!(shared.write(3 << 40, &[0]).is_err());
    assert_eq!(shared.size(), Ok(3 << 40));
    assert_eq!(mappings(shared.id().unwrap()), 0);
}

/// Copies in and out while the file is cut and made longer again. Every access must end in success or a
/// fault, and both must have happened; SIGBUS would end the test.
fn cut_under_copies(file: &OwnedFd, size: u64) {
    let shared = FileRegistry::new().open(file.try_clone().unwrap()).unwrap();
    let stop = AtomicBool::new(false);
    let (mut fine, mut faults) = (0_u64, 0_u64);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                rustix::fs::ftruncate(file, 0).unwrap();
                std::thread::yield_now();
                rustix::fs::ftruncate(file, size).unwrap();
                std::thread::yield_now();
            }
        });
        let mut buf = vec![0; 65536];
        let deadline = Instant::now() + Duration::from_secs(20);
        while (fine < 500 || faults < 500) && Instant::now() < deadline {
            for result in [
                shared.read(size - 65536, &mut buf),
                shared.write(size - 65536, &buf),
                shared.read(size - 40, &mut buf[..40]),
                shared.write(size - 39, &buf[..39]),
                shared.load::<u64>(size - 8).map(|_| ()),
                shared.store(size - 4, 1_u32),
            ] {
                match result {
                    Ok(()) => fine += 1,
                    Err(_) => faults += 1,
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(fine >= 500 && faults >= 500, "{fine} fine, {faults} faults");
}

#[test]
fn truncation_under_copies_is_a_fault_and_never_a_signal() {
    cut_under_copies(&memfd(1 << 20), 1 << 20);
}

#[test]
fn long_copies_are_whole_and_say_how_far_they_came() {
    let file = memfd(16 * PAGE);
    let shared = FileRegistry::new().open(file.try_clone().unwrap()).unwrap();
    let bytes: Vec<u8> = (0_u32..16 * 4096).map(|at| (at % 251) as u8).collect();
    for len in [8191, 8192, 8193, 12_287, 12_288, 12_289, 50_001] {
        for from in [0, 1, 63, 4095] {
            shared.write(from as u64, &bytes[from..from + len]).unwrap();
            let mut buf = vec![0; len];
            shared.read(from as u64, &mut buf).unwrap();
            assert!(buf == bytes[from..from + len], "{len} from {from}");
        }
    }
    shared.write(0, &bytes).unwrap();
    rustix::fs::ftruncate(&file, 10 * PAGE).unwrap();
    for from in [0_usize, 1, 4095, 7 * 4096 + 5, 8 * 4096, 8 * 4096 + 1] {
        let mut buf = vec![0; 16 * 4096 - from];
        let done = 10 * 4096 - from;
        let fault = Err(Fault { done });
        assert_eq!(shared.read(from as u64, &mut buf), fault, "{from}");
        assert!(buf[..done] == bytes[from..from + done], "{from}");
        assert!(buf[done..].iter().all(|byte| *byte == 0), "{from}");
        assert_eq!(shared.write(from as u64, &bytes[from..]), fault, "{from}");
    }
}

#[test]
fn a_fault_says_how_far_it_came() {
    let file = memfd(4 * PAGE);
    let shared = FileRegistry::new().open(file.try_clone().unwrap()).unwrap();
    shared.write(0, &[1; 4 * 4096]).unwrap();
    rustix::fs::ftruncate(&file, 2 * PAGE).unwrap();
    for len in [65, 100, 4096, 8192] {
        let mut buf = vec![0; len];
        assert_eq!(
            shared.read(2 * PAGE - 40, &mut buf),
            Err(Fault { done: 40 }),
            "{len}"
        );
        assert_eq!(&buf[..40], [1; 40]);
        assert!(buf[40..].iter().all(|b| *b == 0));
        assert_eq!(
            shared.write(2 * PAGE - 40, &buf),
            Err(Fault { done: 40 }),
            "{len}"
        );
        shared.write(2 * PAGE - 40, &[1; 40]).unwrap();
    }
    for len in 41..64 {
        // Short copies count in words, then in bytes.
        let done = shared
            .read(2 * PAGE - 40, &mut vec![0; len])
            .unwrap_err()
            .done;
        assert_eq!(done, 40, "{len}");
        let done = shared
            .read(2 * PAGE - 37, &mut vec![0; len])
            .unwrap_err()
            .done;
        assert!((32..=37).contains(&done), "{len}: {done}");
    }
    assert_eq!(shared.load::<u16>(2 * PAGE - 2), Ok(0x0101));
    assert!(shared.load::<u16>(2 * PAGE - 1).is_err());
    assert!(shared.store(2 * PAGE, 1_u8).is_err());
    for width in [1, 2, 4, 8] {
        let stored = match width {
            1 => shared.store(0, 0x11_u8),
            2 => shared.store(0, 0x2222_u16),
            4 => shared.store(0, 0x3333_3333_u32),
            _ => shared.store(0, 0x4444_4444_4444_4444_u64),
        };
        assert_eq!(stored, Ok(()));
        let byte = u64::from(0x11_u8) * [0, 1, 2, 0, 3, 0, 0, 0, 4][width];
        let expected = (0..width).fold(0, |v, _| v << 8 | byte);
        let rest = 0x0101_0101_0101_0101_u64;
        let got = shared.load::<u64>(0).unwrap();
        if width == 8 {
            assert_eq!(got, expected);
        } else {
            let bits = width * 8;
            assert_eq!(
                (got & ((1 << bits) - 1), got >> bits),
                (expected, rest >> bits)
            );
        }
        shared.store(0, rest).unwrap();
    }
}

/// Runs this test binary's `role` and returns the signal that ended it.
fn killed_by(role: &str) -> Option<i32> {
    use std::os::unix::process::ExitStatusExt;
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command
        .args([role, "--exact", "--test-threads=1"])
        .env("DMA_MEMORY_TEST_ROLE", role);
    command
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null());
    command.status().unwrap().signal()
}

#[test]
fn a_fault_elsewhere_still_kills() {
    if std::env::var_os("DMA_MEMORY_TEST_ROLE").is_some() {
        let shared = FileRegistry::new().open(memfd(PAGE)).unwrap();
        shared.read(0, &mut [0]).unwrap(); // The handler is in place.
        child::touch_memory_that_is_gone();
        return;
    }
    assert_eq!(
        killed_by("a_fault_elsewhere_still_kills"),
        Some(libc::SIGBUS)
    );
}

#[test]
fn huge_pages_too() {
    let Some(_pages) = vfiod_tests::HugePages::reserve() else {
        vfiod_tests::skip("no huge pages of 2 MiB can be reserved here");
        return;
    };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = rustix::fs::memfd_create("test", flags).unwrap();
    rustix::fs::ftruncate(&file, HUGE).unwrap();
    let shared = FileRegistry::new().open(file.try_clone().unwrap()).unwrap();
    shared.write(HUGE - 4, b"huge").unwrap();
    assert!(shared.write(HUGE - 3, b"huge").is_err());
    assert_eq!(shared.size(), Ok(HUGE), "not made longer by our mapping");
    rustix::fs::ftruncate(&file, 2 * HUGE).unwrap();
    assert_eq!(shared.store(2 * HUGE - 8, 1_u64), Ok(()));
    assert_eq!(shared.load::<u8>(HUGE - 1), Ok(b'e'));
    drop(shared);
    assert_eq!(mappings(FileId::of(&file).unwrap()), 0);
    cut_under_copies(&file, 2 * HUGE);

    // A client's own, reached by address.
    drop(file);
    let mut client = Child::start();
    let fd = client.ask("memfd-huge 2097152");
    let addr = client.ask(&format!("mapfd {fd} 2097152 rw 0"));
    let (source, files) = process(&client, addr);
    let mut buf = [0; 300];
    source.read(HUGE - 300, &mut buf).unwrap();
    assert_eq!(buf[299], pattern(2_097_151));
    let mapping = Memory::of(Caller::new(client.pid()).unwrap())
        .unwrap()
        .query(addr)
        .unwrap();
    assert!(files.find(mapping.file, true).is_some(), "used in place");
    client.tell(&format!("truncate {fd} 0"));
    assert_eq!(source.read(0, &mut buf), Err(Errno::FAULT));
    assert_eq!(source.write(0, &buf), Err(Errno::FAULT));
}

#[test]
fn addresses_of_a_client_are_what_they_are_now() {
    let mut client = Child::start();
    for kind in ["memfd", "shared", "private"] {
        let addr = client.ask(&format!("map {kind} 12288 rw"));
        let (source, files) = process(&client, addr);
        let id = Memory::of(Caller::new(client.pid()).unwrap())
            .unwrap()
            .query(addr)
            .unwrap()
            .file;
        let mut buf = [0; 5000];
        source.read(1000, &mut buf).unwrap();
        assert!((0..5000).all(|at| buf[at] == pattern(at + 1000)), "{kind}");
        assert_eq!(
            files.find(id, true).is_some(),
            kind != "private",
            "{kind}: in place or not"
        );
        source.write(PAGE, b"dma").unwrap();
        assert_eq!(
            client.ask(&format!("peek {}", addr + PAGE + 2)),
            u64::from(b'a'),
            "{kind}"
        );

        // Part read-only, of the same mapping once.
        client.tell(&format!("protect {} 4096 r", addr + PAGE));
        assert_eq!(source.write(PAGE, b"x"), Err(Errno::FAULT), "{kind}");
        assert_eq!(
            client.ask(&format!("peek {}", addr + PAGE)),
            u64::from(b'd')
        );
        source.read(PAGE - 1, &mut buf[..4]).unwrap();
        assert_eq!(&buf[1..4], b"dma", "{kind}: across mappings");
        client.tell(&format!("protect {} 4096 none", addr + PAGE));
        assert_eq!(
            source.read(PAGE, &mut buf[..1]),
            Err(Errno::FAULT),
            "{kind}"
        );

        // The address becomes other memory of each kind, and is that at once.
        for other in ["shared", "private", "memfd"] {
            assert_eq!(client.ask(&format!("remap {other} 12288 rw {addr}")), addr);
            source.read(PAGE, &mut buf[..3]).unwrap();
            assert_eq!(
                buf[..3],
                [pattern(4096), pattern(4097), pattern(4098)],
                "{kind} to {other}"
            );
            source.write(PAGE, b"new").unwrap();
            assert_eq!(
                client.ask(&format!("peek {}", addr + PAGE)),
                u64::from(b'n'),
                "{kind} to {other}"
            );
        }
        client.tell(&format!("unmap {} 4096", addr + PAGE));
        assert_eq!(
            source.read(PAGE - 1, &mut buf[..2]),
            Err(Errno::FAULT),
            "{kind}"
        );
        assert_eq!(
            source.read(u64::MAX - addr, &mut buf),
            Err(Errno::FAULT),
            "{kind}"
        );
        assert_eq!(source.write(u64::MAX, &buf), Err(Errno::FAULT), "{kind}");
    }
}

#[test]
fn a_file_cut_by_its_client_is_a_fault_by_address_too() {
    let mut client = Child::start();
    let fd = client.ask("memfd 65536");
    let addr = client.ask(&format!("mapfd {fd} 65536 rw 0"));
    let (source, _) = process(&client, addr);
    let mut buf = vec![0; 65536];
    source.read(0, &mut buf).unwrap();
    client.tell(&format!("truncate {fd} 4096"));
    assert_eq!(source.read(0, &mut buf), Err(Errno::FAULT));
    assert_eq!(source.write(PAGE, &buf[..8]), Err(Errno::FAULT));
    assert_eq!(source.read(0, &mut buf[..4096]), Ok(()));
    client.tell(&format!("truncate {fd} 65536"));
    assert_eq!(source.read(0, &mut buf), Ok(()));
    assert_eq!(buf[PAGE as usize], 0);
}

#[test]
fn exec_and_death_end_an_area() {
    let mut client = Child::start();
    let addr = client.ask("map shared 4096 rw");
    let (source, _) = process(&client, addr);
    source.write(0, b"x").unwrap();
    assert_eq!(client.tell("exec"), "ready");
    assert_eq!(client.ask(&format!("remap shared 4096 rw {addr}")), addr);
    assert_eq!(source.read(0, &mut [0]), Err(Errno::FAULT));
    assert_eq!(source.write(0, b"y"), Err(Errno::FAULT));
    assert_eq!(client.ask(&format!("peek {addr}")), 0);
    let (source, _) = process(&client, addr);
    source.write(0, b"z").unwrap();
    client.kill();
    assert_eq!(source.read(0, &mut [0]), Err(Errno::FAULT));
    assert_eq!(source.write(0, b"z"), Err(Errno::FAULT));
}

#[test]
fn a_part_is_a_source_of_its_own() {
    let client_file = memfd(4 * PAGE);
    let file = FileRegistry::new().open(client_file).unwrap();
    let source = Source::File { file, offset: PAGE };
    let part = source.advanced(PAGE).unwrap();
    part.write(1, b"p").unwrap();
    let mut byte = [0];
    source.read(PAGE + 1, &mut byte).unwrap();
    assert_eq!(&byte, b"p");
    assert_eq!(part.advanced(u64::MAX).unwrap_err(), Errno::OVERFLOW);
}

#[test]
fn device_memory_is_shared_revoked_and_restored() {
    let memory = DeviceMemory::create(5000).unwrap();
    assert_eq!(memory.size(), 2 * PAGE);
    memory.write(10, b"device").unwrap();
    let mut client = Child::start();
    let path = format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        memory.backing_fd().as_raw_fd()
    );
    let fd = client.ask(&format!("openrw {path}"));
    let addr = client.ask(&format!("mapfd {fd} 8192 rw 0"));
    assert_eq!(memory.load::<u8>(PAGE + 3), Ok(pattern(4099)));
    memory.store(PAGE, 0x55_u8).unwrap();
    assert_eq!(client.ask(&format!("peek {}", addr + PAGE)), 0x55);
    assert_eq!(memory.read(2 * PAGE - 1, &mut [0; 2]), Err(Errno::FAULT));
    assert_eq!(DeviceMemory::create(0).unwrap_err(), Errno::INVAL);
    assert_eq!(DeviceMemory::create(u64::MAX).unwrap_err(), Errno::INVAL);

    memory.revoke();
    assert_eq!(memory.read(0, &mut [0]), Err(Errno::NODEV));
    assert_eq!(memory.store(0, 1_u64), Err(Errno::NODEV));
    assert!(
        Memory::of(Caller::new(client.pid()).unwrap())
            .unwrap()
            .read(addr, &mut [0])
            .is_err()
    );
    memory.restore().unwrap();
    assert_eq!(memory.load::<u8>(PAGE), Ok(0));
    assert_eq!(client.ask(&format!("poke {addr} 9")), 0);
    assert_eq!(memory.load::<u8>(0), Ok(9));

    // The client cannot keep us from revoking, nor grow the sealed kind.
    let mine = memory.backing_fd().try_clone_to_owned().unwrap();
    assert_eq!(
        rustix::fs::fcntl_add_seals(&mine, rustix::fs::SealFlags::SHRINK),
        Err(Errno::PERM)
    );
    let sealed = DeviceMemory::create_sealed(PAGE).unwrap();
    assert_eq!(
        rustix::fs::ftruncate(sealed.backing_fd(), 2 * PAGE),
        Err(Errno::PERM)
    );
    sealed.revoke();
    assert_eq!(sealed.restore(), Err(Errno::PERM));
}

#[test]
fn other_openers_are_seen_until_their_last_mapping_goes() {
    let memory = DeviceMemory::create(PAGE).unwrap();
    memory.write(0, b"ours").unwrap();
    let _dup = memory.backing_fd().try_clone_to_owned().unwrap();
    assert_eq!(
        memory.probe_openers(),
        Ok(false),
        "our mapping and our descriptors do not count"
    );
    let mut client = Child::start();
    let path = format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        memory.backing_fd().as_raw_fd()
    );
    for (open, prot) in [("openrw", Some("rw")), ("openrw", None), ("open", None)] {
        let fd = client.ask(&format!("{open} {path}"));
        assert_eq!(memory.probe_openers(), Ok(true), "{open}");
        if let Some(prot) = prot {
            let addr = client.ask(&format!("mapfd {fd} 4096 {prot} 0"));
            client.tell(&format!("close {fd}"));
            assert!(memory.has_other_openers(), "mapped without a descriptor");
            let forked = i32::try_from(client.ask("fork")).unwrap();
            client.tell(&format!("unmap {addr} 4096"));
            assert!(memory.has_other_openers(), "a forked child still maps it");
            let forked = client_process::Pid::from_raw(forked).unwrap();
            rustix::process::kill_process(forked, rustix::process::Signal::KILL).unwrap();
            let deadline = Instant::now() + Duration::from_secs(10);
            while memory.has_other_openers() {
                assert!(
                    Instant::now() < deadline,
                    "still held after the last mapping went"
                );
                std::thread::yield_now();
            }
        } else {
            client.tell(&format!("close {fd}"));
        }
        assert_eq!(memory.probe_openers(), Ok(false));
    }
}

#[test]
fn asking_for_openers_disturbs_nobody() {
    // Opens that meet the lease wait for its end and succeed, and we survive the kernel's signal.
    let memory = DeviceMemory::create(PAGE).unwrap();
    let path = format!("/proc/self/fd/{}", memory.backing_fd().as_raw_fd());
    let stop = AtomicBool::new(false);
    let mut seen = [0_u64; 2];
    std::thread::scope(|scope| {
        let opener = scope.spawn(|| {
            let mut opens = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                drop(
                    std::fs::File::options()
                        .read(true)
                        .write(true)
                        .open(&path)
                        .unwrap(),
                );
                opens += 1;
            }
            opens
        });
        // A second thread that asks: each must have its own lease, signal and all.
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                memory.probe_openers().unwrap();
            }
        });
        let deadline = Instant::now() + Duration::from_secs(20);
        while seen.iter().any(|n| *n < 200) && Instant::now() < deadline {
            seen[usize::from(memory.probe_openers().unwrap())] += 1;
        }
        stop.store(true, Ordering::Relaxed);
        assert!(opener.join().unwrap() > 0);
    });
    assert!(seen.iter().all(|n| *n >= 200), "{seen:?}");
    // A process that another test starts carries our opener's descriptor until it execs.
    let deadline = Instant::now() + Duration::from_secs(10);
    while memory.probe_openers().unwrap() {
        assert!(Instant::now() < deadline, "still held after the last close");
        std::thread::yield_now();
    }
}
