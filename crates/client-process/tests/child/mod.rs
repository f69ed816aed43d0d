//! A real client: this very test binary, run again as a process that does what it is told.
//!
//! A binary that uses it has a test `child` that calls [`obey`], which returns at once in the tests' own
//! process.
#![expect(unsafe_code, reason = "a client that maps, forks and pokes its memory")]

use std::io::BufRead;
use std::io::BufReader;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::ChildStdin;
use std::process::ChildStdout;
use std::process::Command;
use std::process::Stdio;
use std::str::SplitWhitespace;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;
use std::time::Instant;

use rustix::fd::AsRawFd;
use rustix::fd::FromRawFd;
use rustix::fd::IntoRawFd;
use rustix::fd::OwnedFd;
use rustix::process::Pid;

const ROLE: &str = "CLIENT_PROCESS_TEST_ROLE";

/// The threads that the client has made, and whether they are to end.
static THREADS: Mutex<Vec<JoinHandle<()>>> = Mutex::new(Vec::new());
static END: AtomicBool = AtomicBool::new(false);

/// What the memory of a new mapping holds.
#[must_use]
pub(crate) fn pattern(at: usize) -> u8 {
    u8::try_from(at % 251).unwrap_or(0)
}

/// The client as its test sees it. Killed when dropped.
#[derive(Debug)]
pub(crate) struct Child {
    process: std::process::Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Child {
    /// Starts one and waits until it listens.
    #[must_use]
    pub(crate) fn start() -> Self {
        let mut process = command()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = process.stdin.take().unwrap();
        let stdout = BufReader::new(process.stdout.take().unwrap());
        let mut child = Self {
            process,
            stdin,
            stdout,
        };
        assert_eq!(child.answer(), "ready");
        child
    }

    #[must_use]
    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.process.id()).unwrap()
    }

    /// Has it do something; the answer is what it says.
    pub(crate) fn tell(&mut self, what: &str) -> String {
        writeln!(self.stdin, "{what}").unwrap();
        self.answer()
    }

    /// The same for an answer that is one number.
    pub(crate) fn ask(&mut self, what: &str) -> u64 {
        let answer = self.tell(what);
        answer
            .parse()
            .unwrap_or_else(|_| panic!("{what}: {answer}"))
    }

    fn answer(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(
                self.stdout.read_line(&mut line).unwrap(),
                0,
                "the client died"
            );
            if let Some((_, answer)) = line.split_once('@') {
                return answer.trim_end().to_owned();
            }
        }
    }

    /// SIGKILL, and waits until it is gone.
    pub(crate) fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn command() -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["child", "--exact", "--nocapture", "--test-threads=1"])
        .env(ROLE, "1");
    command
}

/// In the client: obeys until the input ends.
pub(crate) fn obey() {
    if std::env::var_os(ROLE).is_none() {
        return;
    }
    println!("@ready");
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let mut words = line.split_whitespace();
        let answer = act(words.next().unwrap(), &mut words);
        println!("@{answer}");
    }
}

/// A plain read of a mapping whose file has been cut: SIGBUS.
pub(crate) fn touch_memory_that_is_gone() {
    let file = rustix::fs::memfd_create("gone", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, 4096).unwrap();
    let at = mmap(libc::MAP_SHARED, file.as_raw_fd(), 4096, "rw", 0).unwrap();
    rustix::fs::ftruncate(&file, 0).unwrap();
    // SAFETY: the address is mapped; that the page is gone is the point.
    unsafe { std::ptr::read_volatile(at as *const u8) };
}

fn act(verb: &str, words: &mut SplitWhitespace<'_>) -> String {
    let mut word = || words.next().unwrap();
    match verb {
        // map KIND LEN PROT, or at a fixed ADDR
        "map" | "remap" => {
            let (kind, len, prot) = (word(), number(word()), word());
            let at = if verb == "remap" { number(word()) } else { 0 };
            map(kind, len, prot, at)
        }
        // mapfd FD LEN PROT ADDR: a descriptor that is open already
        "mapfd" => {
            let (fd, len, prot, at) = (
                word().parse().unwrap(),
                number(word()),
                word(),
                number(word()),
            );
            mmap(libc::MAP_SHARED, fd, len, prot, at)
                .map_or_else(|e| e.to_string(), |at| at.to_string())
        }
        "unmap" => {
            // SAFETY: memory that the test has chosen for it.
            unsafe { libc::munmap(number(word()) as *mut _, number(word())) }.to_string()
        }
        "protect" => {
            // SAFETY: as above.
            unsafe { libc::mprotect(number(word()) as *mut _, number(word()), prot(word())) }
                .to_string()
        }
        "peek" => {
            // SAFETY: as above.
            unsafe { std::ptr::read_volatile(number(word()) as *const u8) }.to_string()
        }
        "poke" => {
            // SAFETY: as above.
            unsafe { std::ptr::write_volatile(number(word()) as *mut u8, word().parse().unwrap()) };
            "0".to_owned()
        }
        "memfd" => {
            let fd = rustix::fs::memfd_create("client", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
            rustix::fs::ftruncate(&fd, number(word()) as u64).unwrap();
            fd.into_raw_fd().to_string()
        }
        "memfd-huge" => {
            let flags = rustix::fs::MemfdFlags::HUGETLB | rustix::fs::MemfdFlags::HUGE_2MB;
            let fd = rustix::fs::memfd_create("client", flags).unwrap();
            rustix::fs::ftruncate(&fd, number(word()) as u64).unwrap();
            fd.into_raw_fd().to_string()
        }
        "truncate" => {
            // SAFETY: a call with numbers.
            unsafe { libc::ftruncate(word().parse().unwrap(), number(word()) as i64) }.to_string()
        }
        "open" => std::fs::File::open(word())
            .unwrap()
            .into_raw_fd()
            .to_string(),
        "openrw" => {
            let mut options = std::fs::File::options();
            let file = options.read(true).write(true).open(word()).unwrap();
            file.into_raw_fd().to_string()
        }
        "opath" => {
            let path = std::ffi::CString::new(word()).unwrap();
            // SAFETY: a string that lives through the call.
            unsafe { libc::open(path.as_ptr(), libc::O_PATH) }.to_string()
        }
        "eventfd" => rustix::event::eventfd(0, rustix::event::EventfdFlags::empty())
            .unwrap()
            .into_raw_fd()
            .to_string(),
        "close" => {
            // SAFETY: a descriptor that the test has made for it.
            drop(unsafe { OwnedFd::from_raw_fd(word().parse().unwrap()) });
            "0".to_owned()
        }
        // thread shared|unshared: "TID FD", the descriptor being an eventfd of the thread's table.
        // It lives until `end`.
        "thread" => {
            let own_table = word() == "unshared";
            let (tell, told) = std::sync::mpsc::channel();
            let thread = std::thread::spawn(move || {
                if own_table {
                    // SAFETY: this thread uses no descriptor that another would close.
                    assert_eq!(unsafe { libc::unshare(libc::CLONE_FILES) }, 0);
                }
                let fd = rustix::event::eventfd(7, rustix::event::EventfdFlags::empty()).unwrap();
                let tid = rustix::thread::gettid().as_raw_nonzero();
                tell.send(format!("{tid} {}", fd.as_raw_fd())).unwrap();
                while !END.load(Ordering::SeqCst) {
                    std::thread::park();
                }
            });
            THREADS.lock().unwrap().push(thread);
            told.recv().unwrap()
        }
        "end" => {
            END.store(true, Ordering::SeqCst);
            for thread in THREADS.lock().unwrap().drain(..) {
                thread.thread().unpark();
                thread.join().unwrap();
            }
            "0".to_owned()
        }
        "fork" => {
            let parent = rustix::process::getpid();
            // SAFETY: the child does nothing but wait for its death.
            match unsafe { libc::fork() } {
                0 => wait_for_death(parent),
                pid => pid.to_string(),
            }
        }
        // fork-as TID: the number is nobody's, or about to be
        "fork-as" => fork_as(word().parse().unwrap()),
        "die" => {
            touch_memory_that_is_gone();
            "alive".to_owned()
        }
        "exec" => panic!("{}", command().exec()),
        other => panic!("{other}?"),
    }
}

/// What a child made by fork does.
fn wait_for_death(parent: Pid) -> ! {
    // SAFETY: no arguments.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    // The parent may have died before that.
    while rustix::process::getppid() == Some(parent) {
        // SAFETY: no arguments.
        unsafe { libc::pause() };
    }
    // SAFETY: no arguments.
    unsafe { libc::_exit(0) }
}

/// A fork whose child has this number; the error if the kernel does not let us choose it.
fn fork_as(number: libc::pid_t) -> String {
    // SAFETY: numbers and addresses, of which none is a valid value.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.exit_signal = libc::SIGCHLD as u64;
    args.set_tid = (&raw const number).addr() as u64;
    args.set_tid_size = 1;
    let until = Instant::now() + Duration::from_secs(10);
    let parent = rustix::process::getpid();
    loop {
        // SAFETY: without a stack it is a fork, and the child does nothing but wait for its death.
        let child = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) };
        let error = std::io::Error::last_os_error();
        match child {
            0 => wait_for_death(parent),
            // The thread that had it is not quite gone.
            -1 if error.raw_os_error() == Some(libc::EEXIST) && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(1));
            }
            -1 => return error.to_string(),
            child => return child.to_string(),
        }
    }
}

fn map(kind: &str, len: usize, prot: &str, at: usize) -> String {
    let memfd = |flags| {
        let fd =
            rustix::fs::memfd_create("client", flags | rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, len as u64).unwrap();
        fd
    };
    let made = match kind {
        "private" => mmap(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, len, prot, at),
        "shared" => mmap(libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, len, prot, at),
        "memfd" => {
            let fd = memfd(rustix::fs::MemfdFlags::empty());
            mmap(libc::MAP_SHARED, fd.as_raw_fd(), len, prot, at)
        }
        other => panic!("{other}?"),
    };
    made.map_or_else(|e| e.to_string(), |at| at.to_string())
}

/// Maps, filled with [`pattern`].
fn mmap(flags: i32, fd: i32, len: usize, last: &str, at: usize) -> std::io::Result<usize> {
    let flags = if at == 0 {
        flags
    } else {
        flags | libc::MAP_FIXED
    };
    // SAFETY: a new place, or one that the test has chosen.
    let made = unsafe { libc::mmap(at as *mut _, len, prot("rw"), flags, fd, 0) };
    if made == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: just mapped, and nobody else knows of it.
    let bytes = unsafe { std::slice::from_raw_parts_mut(made.cast::<u8>(), len) };
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = pattern(at);
    }
    // SAFETY: just mapped.
    assert_eq!(unsafe { libc::mprotect(made, len, prot(last)) }, 0);
    Ok(made as usize)
}

fn prot(word: &str) -> i32 {
    match word {
        "rw" => libc::PROT_READ | libc::PROT_WRITE,
        "r" => libc::PROT_READ,
        "none" => libc::PROT_NONE,
        other => panic!("{other}?"),
    }
}

fn number(word: &str) -> usize {
    word.parse().unwrap()
}
