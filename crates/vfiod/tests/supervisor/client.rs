//! The other side: this very test binary, run under supervision as a program that does what it is told.
#![expect(
    unsafe_code,
    reason = "raw system calls, signals and threads of a client that wishes nobody well"
)]

use rustix::fd::{AsRawFd, FromRawFd, OwnedFd};
use rustix::io::Errno;
#[cfg(target_arch = "x86_64")]
use std::arch::asm;
use std::fs::File;
use std::io::Write as _;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use vfio_uapi::ioctl::{
    VFIO_DEVICE_GET_INFO, VFIO_GROUP_GET_DEVICE_FD, VFIO_GROUP_SET_CONTAINER, VFIO_SET_IOMMU,
};

/// What a client is to do.
pub(crate) const ROLE: &str = "VFIOD_TEST_ROLE";
/// Begins each line that a client says.
pub(crate) const SAYS: &str = "client: ";

const TYPE1V2: u64 = 3;

/// Plays the role that the environment names, if any.
pub(crate) fn obey() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    let mut words = role.split(' ');
    match words.next().unwrap() {
        "threads" => threads(),
        "orphan" => orphan(),
        "second" => second(),
        "storm" => storm(),
        "stat" => stat(),
        "foreign" => foreign(),
        "wrong" => wrong(),
        "full" => full(),
        "forsaken" => forsaken(),
        "restless" => restless(),
        "hanging" => hanging(words.next().unwrap().parse().unwrap()),
        "kvm" => kvm(),
        other => panic!("{other}"),
    }
}

fn say(text: impl std::fmt::Display) {
    println!("{SAYS}{text}");
    std::io::stdout().flush().unwrap();
}

fn result(value: i64) -> Result<i64, Errno> {
    if value < 0 {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap());
    }
    Ok(value)
}

/// Any system call.
fn call(number: libc::c_long, args: [u64; 5]) -> Result<i64, Errno> {
    let [a, b, c, d, e] = args;
    // SAFETY: the addresses given are those of memory of the right size, or none at all.
    result(unsafe { libc::syscall(number, a, b, c, d, e) })
}

fn ioctl(fd: i32, word: u32, arg: u64) -> Result<i64, Errno> {
    let fd = u64::from(fd.cast_unsigned());
    call(libc::SYS_ioctl, [fd, word.into(), arg, 0, 0])
}

/// A group of ours, and the name of its device.
struct Group {
    file: File,
    /// It ends with a NUL.
    name: String,
    _container: Option<File>,
}

fn open(path: &str) -> File {
    let file = File::options().read(true).write(true).open(path);
    file.unwrap_or_else(|error| panic!("{path}: {error}"))
}

impl Group {
    /// The first of them, alone.
    fn open() -> Group {
        let numbers = std::fs::read_dir("/dev/vfio").unwrap().flatten();
        let mut names = numbers.filter_map(|entry| entry.file_name().into_string().ok());
        let number = names.find(|name| name.parse::<u32>().is_ok()).unwrap();
        let devices = format!("/sys/kernel/iommu_groups/{number}/devices");
        let mut devices = std::fs::read_dir(devices).unwrap().flatten();
        let device = devices.next().unwrap().file_name().into_string().unwrap();
        Group {
            file: open(&format!("/dev/vfio/{number}")),
            name: device + "\0",
            _container: None,
        }
    }

    /// In a container that is ready.
    fn ready() -> Group {
        let mut group = Group::open();
        let container = open("/dev/vfio/vfio");
        let fd = container.as_raw_fd();
        ioctl(group.fd(), VFIO_GROUP_SET_CONTAINER, &raw const fd as u64).unwrap();
        ioctl(fd, VFIO_SET_IOMMU, TYPE1V2).unwrap();
        group._container = Some(container);
        group
    }

    fn fd(&self) -> i32 {
        self.file.as_raw_fd()
    }

    fn device(&self) -> Result<OwnedFd, Errno> {
        get_device(self.fd(), self.name.as_ptr() as u64)
    }
}

fn get_device(group: i32, name: u64) -> Result<OwnedFd, Errno> {
    let fd = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, name)?;
    // SAFETY: it is new and ours.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).unwrap()) })
}

/// Fails if it is no working device.
fn works(device: &OwnedFd) {
    let mut info = [20_u32, 0, 0, 0, 0];
    ioctl(
        device.as_raw_fd(),
        VFIO_DEVICE_GET_INFO,
        info.as_mut_ptr() as u64,
    )
    .unwrap();
    assert!(info[2] > 0, "{info:?}");
    let flags = rustix::io::fcntl_getfd(device).unwrap();
    assert_eq!(flags, rustix::io::FdFlags::CLOEXEC);
}

/// Threads that are not the first open devices, one with a descriptor table of its own.
fn threads() {
    let group = Group::ready();
    std::thread::scope(|scope| {
        for number in 0..8 {
            let group = &group;
            scope.spawn(move || {
                if number == 0 {
                    // SAFETY: this thread opens and closes for itself from here on.
                    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FILES) }
                        .unwrap();
                    // The same number is another file to the others.
                    let own = rustix::io::dup(&group.file).unwrap();
                    works(&get_device(own.as_raw_fd(), group.name.as_ptr() as u64).unwrap());
                }
                for _ in 0..40 {
                    works(&group.device().unwrap());
                }
            });
        }
    });
    say("done");
}

/// Starts a process that outlives this one and opens a device then.
fn orphan() {
    let group = Group::ready();
    let fd = rustix::io::dup(&group.file).unwrap();
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty()).unwrap();
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "client", "--nocapture"])
        .env(ROLE, "second")
        .env("FIRST", std::process::id().to_string())
        .env("GROUP", fd.as_raw_fd().to_string())
        .env("NAME", group.name.trim_end_matches('\0'))
        .spawn()
        .unwrap();
    std::mem::forget((child, fd, group));
}

fn second() {
    let first: u32 = std::env::var("FIRST").unwrap().parse().unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    while std::os::unix::process::parent_id() == first {
        assert!(Instant::now() < end, "the first does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
    let group: i32 = std::env::var("GROUP").unwrap().parse().unwrap();
    let name = std::env::var("NAME").unwrap() + "\0";
    works(&get_device(group, name.as_ptr() as u64).unwrap());
    say("done");
}

/// Opens a device again and again while a signal comes every 100 microseconds.
fn storm() {
    const OPENS: usize = 200;
    static CAUGHT: AtomicU32 = AtomicU32::new(0);
    extern "C" fn caught(_: libc::c_int) {
        CAUGHT.fetch_add(1, Ordering::Relaxed);
    }
    let group = Group::ready();
    let before = std::fs::read_dir("/proc/self/fd").unwrap().count();
    let every = |micros| libc::itimerval {
        it_interval: libc::timeval {
            tv_sec: 0,
            tv_usec: micros,
        },
        it_value: libc::timeval {
            tv_sec: 0,
            tv_usec: micros,
        },
    };
    // SAFETY: the handler adds to an atomic; the structures are zero or set.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = caught as extern "C" fn(libc::c_int) as usize;
        action.sa_flags = libc::SA_RESTART;
        assert_eq!(
            libc::sigaction(libc::SIGALRM, &action, std::ptr::null_mut()),
            0
        );
        assert_eq!(
            libc::setitimer(libc::ITIMER_REAL, &every(100), std::ptr::null_mut()),
            0
        );
    }
    let devices: Vec<OwnedFd> = (0..OPENS).map(|_| group.device().unwrap()).collect();
    // SAFETY: as above.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &every(0), std::ptr::null_mut()) };
    let after = std::fs::read_dir("/proc/self/fd").unwrap().count();
    assert_eq!(after - before, OPENS, "each once");
    devices.iter().for_each(works);
    assert!(CAUGHT.load(Ordering::Relaxed) > 50, "there was a storm");
    say(OPENS);
    wait();
    drop(devices);
    say("closed");
    wait();
}

/// Until the test says something.
fn wait() {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
}

/// Every way to ask what a file is.
fn stat() {
    let node = "/dev/vfio/devices/vfio0\0";
    let path = node.as_ptr() as u64;
    let file = open(node.trim_end_matches('\0'));
    let opath = rustix::fs::open(
        node.trim_end_matches('\0'),
        rustix::fs::OFlags::PATH,
        rustix::fs::Mode::empty(),
    )
    .unwrap();
    let empty = c"".as_ptr() as u64;
    let fd = u64::from(file.as_raw_fd().cast_unsigned());
    let cwd = libc::AT_FDCWD as u64;
    let empty_path = libc::AT_EMPTY_PATH as u64;
    let mut answers = Vec::new();
    let mut ask = |number, args: [u64; 5], at: usize| {
        // SAFETY: all zero is a value of it.
        let mut buf: libc::stat = unsafe { std::mem::zeroed() };
        let mut args = args;
        args[at] = &raw mut buf as u64;
        call(number, args).unwrap();
        assert_eq!(buf.st_mode & libc::S_IFMT, libc::S_IFCHR);
        answers.push(buf.st_rdev);
    };
    ask(libc::SYS_fstat, [fd, 0, 0, 0, 0], 1);
    ask(libc::SYS_fstat, [opath.as_raw_fd() as u64, 0, 0, 0, 0], 1);
    ask(libc::SYS_newfstatat, [fd, empty, 0, empty_path, 0], 2);
    ask(libc::SYS_newfstatat, [cwd, path, 0, 0, 0], 2);
    #[cfg(target_arch = "x86_64")]
    {
        ask(libc::SYS_stat, [path, 0, 0, 0, 0], 1);
        ask(libc::SYS_lstat, [path, 0, 0, 0, 0], 1);
    }
    for args in [[fd, empty, empty_path], [cwd, path, 0]] {
        // SAFETY: all zero is a value of it.
        let mut buf: libc::statx = unsafe { std::mem::zeroed() };
        let [dirfd, path, flags] = args;
        let mask = u64::from(libc::STATX_BASIC_STATS);
        call(
            libc::SYS_statx,
            [dirfd, path, flags, mask, &raw mut buf as u64],
        )
        .unwrap();
        assert_eq!(u32::from(buf.stx_mode) & libc::S_IFMT, libc::S_IFCHR);
        answers.push(libc::makedev(buf.stx_rdev_major, buf.stx_rdev_minor));
    }
    assert!(
        answers.iter().all(|rdev| *rdev == answers[0]),
        "{answers:?}"
    );
    // Flags and masks that the kernel refuses.
    // SAFETY: all zero is a value of it.
    let mut buf: libc::statx = unsafe { std::mem::zeroed() };
    let mut statx = |flags: u64, mask: u64| {
        let at = &raw mut buf as u64;
        call(libc::SYS_statx, [cwd, path, flags, mask, at])
    };
    assert_eq!(statx(1 << 20, 0), Err(Errno::INVAL));
    assert_eq!(statx(0, 1 << 31), Err(Errno::INVAL));
    assert_eq!(statx(0x6000, 0), Err(Errno::INVAL));
    // Memory that cannot be written.
    assert_eq!(call(libc::SYS_fstat, [fd, 8, 0, 0, 0]), Err(Errno::FAULT));
    let read_only = node.as_ptr() as u64;
    assert_eq!(
        call(libc::SYS_fstat, [fd, read_only, 0, 0, 0]),
        Err(Errno::FAULT)
    );
    let (major, minor) = (libc::major(answers[0]), libc::minor(answers[0]));
    say(format_args!("{major}:{minor}"));
}

/// What is not ours is the kernel's.
fn foreign() {
    const KVM_CREATE_DEVICE: u32 = 0xc00c_aee0;
    const KVM_HAS_DEVICE_ATTR: u32 = 0x4018_aee3;
    let (pipe, _other) = rustix::pipe::pipe().unwrap();
    let name = c"name".as_ptr() as u64;
    for word in [
        VFIO_GROUP_GET_DEVICE_FD,
        KVM_CREATE_DEVICE,
        KVM_HAS_DEVICE_ATTR,
    ] {
        let file = File::open("/etc/passwd").unwrap();
        assert_eq!(ioctl(file.as_raw_fd(), word, name), Err(Errno::NOTTY));
        assert_eq!(ioctl(pipe.as_raw_fd(), word, name), Err(Errno::NOTTY));
        assert_eq!(ioctl(-1, word, name), Err(Errno::BADF));
        assert_eq!(ioctl(1 << 20, word, name), Err(Errno::BADF));
    }
    // Our own nodes of other kinds.
    let iommu = open("/dev/iommu");
    assert_eq!(
        ioctl(iommu.as_raw_fd(), VFIO_GROUP_GET_DEVICE_FD, name),
        Err(Errno::NOTTY)
    );
    // SAFETY: all zero is a value of it.
    let mut buf: libc::stat = unsafe { std::mem::zeroed() };
    let at = &raw mut buf as u64;
    assert_eq!(
        call(libc::SYS_fstat, [u64::MAX, at, 0, 0, 0]),
        Err(Errno::BADF)
    );
    call(libc::SYS_fstat, [pipe.as_raw_fd() as u64, at, 0, 0, 0]).unwrap();
    assert_eq!(buf.st_mode & libc::S_IFMT, libc::S_IFIFO);
    let stat = |path: u64| {
        let at = &raw const buf as u64;
        call(
            libc::SYS_newfstatat,
            [libc::AT_FDCWD as u64, path, at, 0, 0],
        )
    };
    assert_eq!(stat(8), Err(Errno::FAULT));
    assert_eq!(stat(c"".as_ptr() as u64), Err(Errno::NOENT));
    assert_eq!(stat(c"/nowhere/vfio0".as_ptr() as u64), Err(Errno::NOENT));
    assert_eq!(
        stat(c"/etc/passwd/vfio0".as_ptr() as u64),
        Err(Errno::NOTDIR)
    );
    let long = vec![b'x'; 5000];
    assert_eq!(stat(long.as_ptr() as u64), Err(Errno::NAMETOOLONG));
    // A link that leads to itself.
    let dir = std::env::temp_dir().join(format!("vfiod-loop-{}", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    std::os::unix::fs::symlink("vfio7", dir.join("vfio7")).unwrap();
    let looped = format!("{}\0", dir.join("vfio7").display());
    let answer = stat(looped.as_ptr() as u64);
    std::fs::remove_dir_all(&dir).unwrap();
    assert_eq!(answer, Err(Errno::LOOP));
    // Another table of system calls: i386's getppid is not trapped, nor is its ioctl (54).
    #[cfg(target_arch = "x86_64")]
    {
        let old = |number: i64, fd: i64, word: i64| -> i64 {
            let mut value = number;
            // SAFETY: these calls take numbers and touch no memory.
            unsafe {
                asm!(
                    "push rbx", "mov rbx, {fd}", "int 0x80", "pop rbx",
                    fd = in(reg) fd,
                    inlateout("rax") value,
                    in("rcx") word, in("rdx") 0,
                    out("r8") _, out("r9") _, out("r10") _, out("r11") _,
                )
            };
            i64::from(value as i32)
        };
        let parent = i64::from(std::os::unix::process::parent_id());
        assert_eq!(old(64, 0, 0), parent);
        let pipe = i64::from(pipe.as_raw_fd());
        assert_eq!(old(54, pipe, VFIO_GROUP_GET_DEVICE_FD.into()), -25);
    }
    say("done");
}

/// What GET_DEVICE_FD refuses, in the kernel's order.
fn wrong() {
    let group = Group::open();
    let at = |name: u64| get_device(group.fd(), name).map(drop);
    let name = group.name.as_ptr() as u64;
    assert_eq!(at(8), Err(Errno::FAULT));
    let long = vec![b'x'; 4096];
    assert_eq!(at(long.as_ptr() as u64), Err(Errno::INVAL));
    // The last byte before memory that is not there.
    let page = unmapped_after(b'x');
    assert_eq!(at(page), Err(Errno::FAULT));
    // A wrong name before a missing container.
    assert_eq!(at(c"nobody".as_ptr() as u64), Err(Errno::NODEV));
    assert_eq!(at(c"".as_ptr() as u64), Err(Errno::NODEV));
    assert_eq!(at(name), Err(Errno::INVAL));
    let opath = rustix::fs::open(
        format!("/proc/self/fd/{}", group.fd()),
        rustix::fs::OFlags::PATH,
        rustix::fs::Mode::empty(),
    )
    .unwrap();
    assert_eq!(
        get_device(opath.as_raw_fd(), name).map(drop),
        Err(Errno::BADF)
    );
    // A container without an IOMMU type.
    let container = open("/dev/vfio/vfio");
    let fd = container.as_raw_fd();
    ioctl(group.fd(), VFIO_GROUP_SET_CONTAINER, &raw const fd as u64).unwrap();
    assert_eq!(at(name), Err(Errno::INVAL));
    ioctl(fd, VFIO_SET_IOMMU, TYPE1V2).unwrap();
    works(&group.device().unwrap());
    say("done");
}

/// Address of a page's last byte, which has this value; the next page is not there.
fn unmapped_after(value: u8) -> u64 {
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
    let size = rustix::param::page_size();
    // SAFETY: the kernel chooses where; the second page is given back unused.
    unsafe {
        let at = mmap_anonymous(
            std::ptr::null_mut(),
            2 * size,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE,
        )
        .unwrap();
        munmap(at.byte_add(size), size).unwrap();
        let last = at.byte_add(size - 1).cast::<u8>();
        *last = value;
        last as u64
    }
}

/// No number is left for a descriptor.
fn full() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let group = Group::ready();
    works(&group.device().unwrap());
    let before = getrlimit(Resource::Nofile);
    let next = rustix::io::dup(&group.file).unwrap();
    let limit = Rlimit {
        current: Some(next.as_raw_fd() as u64),
        ..before
    };
    drop(next);
    setrlimit(Resource::Nofile, limit).unwrap();
    for _ in 0..20 {
        assert_eq!(group.device().map(drop), Err(Errno::MFILE));
    }
    say("full");
    wait();
    setrlimit(Resource::Nofile, before).unwrap();
    works(&group.device().unwrap());
    say("done");
}

/// Its supervisor is stopped, then killed.
fn forsaken() {
    let group = Group::ready();
    say(std::process::id());
    wait();
    let device = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| group.device().map(drop));
        say("calls");
        waiting.join().unwrap()
    });
    assert_eq!(device, Err(Errno::NOSYS));
    assert_eq!(group.device().map(drop), Err(Errno::NOSYS));
    // SAFETY: all zero is a value of it.
    let mut buf: libc::stat = unsafe { std::mem::zeroed() };
    let at = &raw mut buf as u64;
    assert_eq!(call(libc::SYS_fstat, [0, at, 0, 0, 0]), Err(Errno::NOSYS));
    // What is not trapped goes on.
    assert!(call(libc::SYS_getppid, [0; 5]).is_ok());
    say("done");
}

/// Opens and closes for ever.
fn restless() {
    let group = Group::ready();
    say("begins");
    loop {
        drop(group.device().unwrap());
    }
}

/// Threads whose calls wait for memory that never comes do not hold up this one.
fn hanging(count: usize) {
    let group = Group::ready();
    let Some(memory) = never_there() else {
        say("impossible");
        return;
    };
    for _ in 0..count {
        std::thread::spawn(move || {
            // SAFETY: all zero is a value of it.
            let mut buf: libc::stat = unsafe { std::mem::zeroed() };
            let at = &raw mut buf as u64;
            call(
                libc::SYS_newfstatat,
                [libc::AT_FDCWD as u64, memory, at, 0, 0],
            )
        });
    }
    // Each is in its call now, or will be while the calls below are made.
    std::thread::sleep(Duration::from_millis(20));
    // SAFETY: all zero is a value of it.
    let mut buf: libc::stat = unsafe { std::mem::zeroed() };
    let at = &raw mut buf as u64;
    let file = File::open("/etc/passwd").unwrap();
    for _ in 0..500 {
        call(libc::SYS_fstat, [file.as_raw_fd() as u64, at, 0, 0, 0]).unwrap();
    }
    if count < 64 {
        works(&group.device().unwrap());
    }
    // The threads end with the process.
    say("done");
}

/// An address where a page is only there once somebody brings it (userfaultfd), which nobody does.
fn never_there() -> Option<u64> {
    #[repr(C)]
    struct Api {
        api: u64,
        features: u64,
        ioctls: u64,
    }
    #[repr(C)]
    struct Register {
        start: u64,
        len: u64,
        mode: u64,
        ioctls: u64,
    }
    const UFFDIO_API: u32 = 0xc018_aa3f;
    const UFFDIO_REGISTER: u32 = 0xc020_aa00;
    let fd = call(libc::SYS_userfaultfd, [libc::O_CLOEXEC as u64, 0, 0, 0, 0]).ok()?;
    let fd = i32::try_from(fd).unwrap();
    let mut api = Api {
        api: 0xaa,
        features: 0,
        ioctls: 0,
    };
    ioctl(fd, UFFDIO_API, &raw mut api as u64).ok()?;
    let size = rustix::param::page_size();
    // SAFETY: the kernel chooses where.
    let at = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            size,
            rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
            rustix::mm::MapFlags::PRIVATE,
        )
    }
    .unwrap() as u64;
    let mut register = Register {
        start: at,
        len: size as u64,
        mode: 1,
        ioctls: 0,
    };
    ioctl(fd, UFFDIO_REGISTER, &raw mut register as u64).ok()?;
    Some(at)
}

/// What QEMU does with KVM.
fn kvm() {
    const KVM_CREATE_VM: u32 = 0xae01;
    const KVM_CREATE_DEVICE: u32 = 0xc00c_aee0;
    const KVM_SET_DEVICE_ATTR: u32 = 0x4018_aee1;
    const KVM_HAS_DEVICE_ATTR: u32 = 0x4018_aee3;
    const VFIO: u32 = 4;
    #[repr(C)]
    struct Attr {
        flags: u32,
        group: u32,
        attr: u64,
        addr: u64,
    }
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    let Some(vm) = kvm
        .ok()
        .and_then(|kvm| ioctl(kvm.as_raw_fd(), KVM_CREATE_VM, 0).ok())
    else {
        say("impossible");
        return;
    };
    let vm = i32::try_from(vm).unwrap();
    let create = |kind: u32, flags: u32| {
        let mut create = [kind, u32::MAX, flags];
        ioctl(vm, KVM_CREATE_DEVICE, create.as_mut_ptr() as u64).map(|_| create[1])
    };
    assert_eq!(create(VFIO, 1), Ok(u32::MAX), "a test makes none");
    assert_eq!(create(1000, 0), Err(Errno::NODEV));
    assert_eq!(ioctl(vm, KVM_CREATE_DEVICE, 8), Err(Errno::FAULT));
    let device = i32::try_from(create(VFIO, 0).unwrap()).unwrap();
    let attribute = |word: u32, group: u32, attr: u64, fd: &i32| {
        let attr = Attr {
            flags: 0,
            group,
            attr,
            addr: std::ptr::from_ref(fd) as u64,
        };
        ioctl(device, word, &raw const attr as u64)
    };
    assert_eq!(attribute(KVM_HAS_DEVICE_ATTR, 1, 1, &0), Ok(0));
    assert_eq!(attribute(KVM_HAS_DEVICE_ATTR, 1, 9, &0), Err(Errno::NXIO));
    assert_eq!(attribute(KVM_HAS_DEVICE_ATTR, 2, 1, &0), Err(Errno::NXIO));
    let group = Group::open();
    let cdev = open("/dev/vfio/devices/vfio0");
    for fd in [group.fd(), cdev.as_raw_fd()] {
        assert_eq!(attribute(KVM_SET_DEVICE_ATTR, 1, 1, &fd), Ok(0));
        assert_eq!(attribute(KVM_SET_DEVICE_ATTR, 1, 2, &fd), Ok(0));
    }
    let other = File::open("/etc/passwd").unwrap();
    for (fd, errno) in [(other.as_raw_fd(), Errno::INVAL), (-1, Errno::BADF)] {
        assert_eq!(attribute(KVM_SET_DEVICE_ATTR, 1, 1, &fd), Err(errno));
    }
    assert_eq!(ioctl(device, KVM_SET_DEVICE_ATTR, 8), Err(Errno::FAULT));
    say("done");
}
