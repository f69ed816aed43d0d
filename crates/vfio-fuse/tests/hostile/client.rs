//! A real client: this test binary again, as a process that makes the system calls it is told to.
//!
//! The test says which call with which numbers; the client makes it, so that everything the daemon
//! sees (thread, descriptors, memory) is another process's. Memory is filled and looked at from
//! here through `/proc/PID/mem`.
#![expect(
    unsafe_code,
    reason = "a client that makes any system call and touches any address"
)]

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

const ROLE: &str = "VFIO_FUSE_HOSTILE_CLIENT";

/// Bytes of scratch memory every client has.
pub const ARENA: u64 = 1 << 20;

const OP_SYS: u64 = 1;
const OP_THREAD: u64 = 2;
const OP_TOUCH: u64 = 3;
const OP_FORK: u64 = 4;
const OP_GIVE: u64 = 5;
const OP_TAKE: u64 = 6;
const OP_SYS_AT: u64 = 7;

/// An errno, as a number that compares with libc's.
pub type Errno = i32;
/// What a system call returned.
pub type Outcome = Result<u64, Errno>;

/// The client, as its test sees it. Killed when dropped.
pub struct Client {
    pub pid: i32,
    /// The thread that makes the calls.
    pub tid: i32,
    /// Start of [`ARENA`] bytes of private memory.
    pub arena: u64,
    socket: UnixStream,
    memory: File,
    process: Option<std::process::Child>,
}

fn read_all(socket: &UnixStream, buf: &mut [u8]) -> std::io::Result<()> {
    (&*socket).read_exact(buf)
}

fn decode(answer: [u8; 8]) -> Outcome {
    let value = i64::from_ne_bytes(answer);
    match value {
        -4095..=-1 => Err((-value) as i32),
        _ => Ok(value as u64),
    }
}

impl Client {
    pub fn start() -> Client {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let theirs: OwnedFd = theirs.into();
        let number = theirs.as_raw_fd();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["client", "--exact", "--nocapture", "--test-threads=1"])
            .env(ROLE, number.to_string())
            .stdout(std::process::Stdio::null());
        // SAFETY: fcntl is safe between fork and exec; the descriptor lives until after spawn.
        unsafe {
            command.pre_exec(move || {
                if libc::fcntl(number, libc::F_SETFD, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let process = command.spawn().unwrap();
        drop(theirs);
        Client::with(ours, Some(process))
    }

    fn with(socket: UnixStream, process: Option<std::process::Child>) -> Client {
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let mut hello = [0; 24];
        read_all(&socket, &mut hello).expect("the client greets");
        let pid = u64::from_ne_bytes(hello[..8].try_into().unwrap()) as i32;
        let tid = u64::from_ne_bytes(hello[8..16].try_into().unwrap()) as i32;
        let arena = u64::from_ne_bytes(hello[16..].try_into().unwrap());
        let memory = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/mem"))
            .unwrap();
        Client {
            pid,
            tid,
            arena,
            socket,
            memory,
            process,
        }
    }

    fn send(&self, op: u64, args: &[u64]) {
        let mut message = [0_u8; 64];
        for (at, word) in std::iter::once(&op).chain(args).enumerate() {
            message[at * 8..at * 8 + 8].copy_from_slice(&word.to_ne_bytes());
        }
        (&self.socket)
            .write_all(&message)
            .expect("the client listens");
    }

    fn answer(&self) -> Outcome {
        let mut answer = [0; 8];
        read_all(&self.socket, &mut answer).expect("the client answers");
        decode(answer)
    }

    /// A system call.
    pub fn sys(&self, number: i64, args: &[u64]) -> Outcome {
        self.start_sys(number, args);
        self.answer()
    }

    /// Begins one; [`Client::finish`] tells how it ended.
    pub fn start_sys(&self, number: i64, args: &[u64]) {
        let mut all = vec![number as u64];
        all.extend(args);
        self.send(OP_SYS, &all);
    }

    /// Begins one when the monotonic clock shows so many nanoseconds.
    pub fn start_sys_at(&self, at: u64, number: i64, args: &[u64]) {
        let mut all = vec![at, number as u64];
        all.extend(args);
        assert!(all.len() <= 7);
        self.send(OP_SYS_AT, &all);
    }

    /// The end of the call that was begun, if it comes in time.
    pub fn finish(&self, within: Duration) -> Option<Outcome> {
        self.socket.set_read_timeout(Some(within)).unwrap();
        let mut answer = [0; 8];
        let result = read_all(&self.socket, &mut answer);
        self.socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        match result {
            Ok(()) => Some(decode(answer)),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => None,
            Err(error) => panic!("the client is gone: {error}"),
        }
    }

    /// The same call from a thread that is not the leader.
    pub fn sys_in_thread(&self, number: i64, args: &[u64]) -> Outcome {
        let mut all = vec![number as u64];
        all.extend(args);
        self.send(OP_THREAD, &all);
        self.answer()
    }

    /// Reads the byte at an address, or writes it: `Err` is the signal it got. The page is then
    /// replaced by an anonymous one.
    pub fn touch(&self, addr: u64, write: Option<u8>) -> Result<u8, i32> {
        let (kind, value) = write.map_or((0, 0), |byte| (1, u64::from(byte)));
        self.send(OP_TOUCH, &[addr, kind, value]);
        let answer = self.answer().unwrap();
        match answer >> 8 {
            0 => Ok(answer as u8),
            signal => Err(signal as i32),
        }
    }

    /// A child of the client by fork, with all it has.
    pub fn fork(&self) -> Client {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let number = self.take(theirs.into());
        self.send(OP_FORK, &[number]);
        self.answer().unwrap();
        Client::with(ours, None)
    }

    /// The client's descriptor, passed to us with SCM_RIGHTS.
    pub fn give(&self, fd: u64) -> OwnedFd {
        self.send(OP_GIVE, &[fd]);
        let got = receive(&self.socket).expect("a descriptor");
        self.answer().unwrap();
        got
    }

    /// Passes a descriptor to the client with SCM_RIGHTS; its number there.
    pub fn take(&self, fd: OwnedFd) -> u64 {
        self.send(OP_TAKE, &[]);
        send(&self.socket, fd.as_raw_fd());
        drop(fd);
        self.answer().unwrap()
    }

    pub fn poke(&self, addr: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, addr).unwrap();
    }

    pub fn peek(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_exact_at(&mut bytes, addr).unwrap();
        bytes
    }

    /// Writes bytes near the start of the arena and returns their address.
    pub fn put(&self, bytes: &[u8]) -> u64 {
        self.poke(self.arena, bytes);
        self.arena
    }

    pub fn open(&self, path: &Path) -> Outcome {
        self.open_with(path, libc::O_RDWR | libc::O_CLOEXEC)
    }

    pub fn open_with(&self, path: &Path, flags: i32) -> Outcome {
        let mut bytes = path.as_os_str().as_encoded_bytes().to_vec();
        bytes.push(0);
        let addr = self.put(&bytes);
        self.sys(
            libc::SYS_openat,
            &[libc::AT_FDCWD as u64, addr, flags as u64, 0],
        )
    }

    pub fn close(&self, fd: u64) {
        assert_eq!(self.sys(libc::SYS_close, &[fd]), Ok(0));
    }

    /// An ioctl whose argument is `bytes`, which hold what the kernel made of them afterwards.
    pub fn ioctl(&self, fd: u64, cmd: u32, bytes: &mut [u8]) -> Outcome {
        let addr = self.put(bytes);
        let result = self.sys(libc::SYS_ioctl, &[fd, cmd.into(), addr]);
        let after = self.peek(addr, bytes.len());
        bytes.copy_from_slice(&after);
        result
    }

    /// An ioctl whose argument is a number.
    pub fn ioctl_at(&self, fd: u64, cmd: u32, arg: u64) -> Outcome {
        self.sys(libc::SYS_ioctl, &[fd, cmd.into(), arg])
    }

    pub fn pread(&self, fd: u64, offset: u64, len: usize) -> Result<Vec<u8>, Errno> {
        let at = self.arena + 4096;
        let n = self.sys(libc::SYS_pread64, &[fd, at, len as u64, offset])?;
        Ok(self.peek(at, n as usize))
    }

    pub fn pwrite(&self, fd: u64, offset: u64, bytes: &[u8]) -> Outcome {
        let at = self.arena + 4096;
        self.poke(at, bytes);
        self.sys(libc::SYS_pwrite64, &[fd, at, bytes.len() as u64, offset])
    }

    pub fn mmap(&self, len: u64, prot: i32, flags: i32, fd: Option<u64>, at: u64) -> Outcome {
        let fd = fd.unwrap_or(u64::MAX);
        self.sys(libc::SYS_mmap, &[0, len, prot as u64, flags as u64, fd, at])
    }

    /// Private anonymous memory.
    pub fn memory(&self, len: u64) -> u64 {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        self.mmap(len, libc::PROT_READ | libc::PROT_WRITE, flags, None, 0)
            .unwrap()
    }

    pub fn munmap(&self, addr: u64, len: u64) {
        assert_eq!(self.sys(libc::SYS_munmap, &[addr, len]), Ok(0));
    }

    /// A memfd of so many bytes.
    pub fn memfd(&self, len: u64, flags: u32) -> Outcome {
        let name = self.put(b"client\0");
        let fd = self.sys(libc::SYS_memfd_create, &[name, flags.into()])?;
        match self.sys(libc::SYS_ftruncate, &[fd, len]) {
            Ok(_) => Ok(fd),
            Err(errno) => {
                self.close(fd);
                Err(errno)
            }
        }
    }

    /// A signal to the thread that makes the calls.
    pub fn signal(&self, signal: i32) {
        // SAFETY: a signal to a process that this test started.
        unsafe { libc::syscall(libc::SYS_tgkill, self.pid, self.tid, signal) };
    }

    /// SIGKILL, and waits until nothing of it is left.
    pub fn kill(mut self) {
        self.signal(libc::SIGKILL);
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let gone = match &mut self.process {
                Some(process) => process.try_wait().unwrap().is_some(),
                None => state(self.pid).is_none_or(|state| state == 'Z'),
            };
            if gone {
                self.process = None;
                return;
            }
            let now = state(self.pid);
            assert!(
                Instant::now() < end,
                "killed, and still there in state {now:?}"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            let _ = process.kill();
            let end = Instant::now() + Duration::from_secs(5);
            // A client that cannot die must fail the test that made it, not hang it.
            while Instant::now() < end && !matches!(process.try_wait(), Ok(Some(_))) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

/// The letter of a process's state; `None` when there is no such process.
pub fn state(pid: i32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

fn send(socket: &UnixStream, fd: RawFd) {
    // SAFETY: open for the call: the caller has it.
    let fd = unsafe { rustix::fd::BorrowedFd::borrow_raw(fd) };
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    rustix::net::sendmsg(
        socket,
        &[IoSlice::new(b"f")],
        &mut control,
        SendFlags::empty(),
    )
    .unwrap();
}

fn receive(socket: &UnixStream) -> Option<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut byte)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )
    .ok()?;
    control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    })
}

// What follows runs in the client.

static SIGNAL: AtomicU64 = AtomicU64::new(0);

extern "C" fn nothing(_: i32) {}

/// A fault while touching: it is noted, and a page put where none was, so that the access ends.
extern "C" fn fault(signal: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel filled it; si_addr is valid for SIGBUS and SIGSEGV.
    let addr = unsafe { (*info).si_addr() } as usize & !4095;
    if SIGNAL.swap(signal as u64, Ordering::SeqCst) != 0 || addr == 0 {
        // SAFETY: ends the process, which is what a second fault deserves.
        unsafe { libc::_exit(99) };
    }
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: replaces the page whose access faulted, which the test meant to lose.
    unsafe { libc::mmap(addr as *mut _, 4096, prot, flags, -1, 0) };
}

fn raw(number: u64, args: &[u64]) -> i64 {
    // SAFETY: whatever the test says is done to this process, which exists for it.
    let result = unsafe {
        libc::syscall(
            number as i64,
            args[0],
            args[1],
            args[2],
            args[3],
            args.get(4).copied().unwrap_or(0),
            args.get(5).copied().unwrap_or(0),
        )
    };
    if result == -1 {
        return -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap());
    }
    result
}

/// Nanoseconds of the monotonic clock.
pub fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

fn greet(socket: &UnixStream, arena: u64) {
    let mut hello = u64::from(std::process::id()).to_ne_bytes().to_vec();
    hello.extend((raw(libc::SYS_gettid as u64, &[0; 6]) as u64).to_ne_bytes());
    hello.extend(arena.to_ne_bytes());
    let _ = (&*socket).write_all(&hello);
}

/// In the client: obeys until the test is gone. Returns at once in the tests' own process.
pub fn obey() {
    let Some(number) = std::env::var(ROLE).ok().and_then(|text| text.parse().ok()) else {
        return;
    };
    // SAFETY: handlers that only touch an atomic, and the descriptor that was left for us.
    let mut socket = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut());
        action.sa_sigaction = fault as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
        libc::sigaction(libc::SIGSEGV, &action, std::ptr::null_mut());
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC);
        UnixStream::from_raw_fd(number)
    };
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE) as u64;
    let arena = raw(libc::SYS_mmap as u64, &[0, ARENA, 3, flags, u64::MAX, 0]) as u64;
    greet(&socket, arena);
    loop {
        let mut message = [0; 64];
        if read_all(&socket, &mut message).is_err() {
            // SAFETY: the test has gone; nothing of this process is worth running destructors for.
            unsafe { libc::_exit(0) };
        }
        let words: Vec<u64> = message
            .chunks_exact(8)
            .map(|word| u64::from_ne_bytes(word.try_into().unwrap()))
            .collect();
        let args = words[1..].to_vec();
        let answer = match words[0] {
            OP_SYS => raw(args[0], &args[1..]),
            OP_SYS_AT => {
                while now() < args[0] {
                    std::hint::spin_loop();
                }
                raw(args[1], &args[2..])
            }
            OP_THREAD => std::thread::spawn(move || raw(args[0], &args[1..]))
                .join()
                .unwrap(),
            OP_TOUCH => {
                SIGNAL.store(0, Ordering::SeqCst);
                let at = args[0] as *mut u8;
                // SAFETY: a fault is what the test may be after; the handler ends it.
                let byte = unsafe {
                    if args[1] == 1 {
                        at.write_volatile(args[2] as u8);
                        0
                    } else {
                        at.read_volatile()
                    }
                };
                (SIGNAL.swap(0, Ordering::SeqCst) << 8 | u64::from(byte)) as i64
            }
            OP_FORK => {
                // SAFETY: this process has one thread.
                let pid = unsafe { libc::fork() };
                // SAFETY: the descriptor was given for this; both sides have their own of it.
                let given = unsafe { UnixStream::from_raw_fd(args[0] as RawFd) };
                if pid == 0 {
                    socket = given;
                    greet(&socket, arena);
                    continue;
                }
                i64::from(pid)
            }
            OP_GIVE => {
                send(&socket, args[0] as RawFd);
                0
            }
            OP_TAKE => receive(&socket).map_or(-1, |fd| i64::from(fd.into_raw_fd())),
            _ => -i64::from(libc::ENOSYS),
        };
        let _ = (&socket).write_all(&answer.to_ne_bytes());
    }
}
