//! Threads that have themselves supervised, on the kernel that is there.
#![expect(unsafe_code, reason = "raw system calls are what is trapped")]

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use seccomp_notify::{Errno, Filter, InstallError, Listener, Notification};
use std::os::linux::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A call with up to three arguments: what it returns, or its errno.
fn call(number: libc::c_long, args: [u64; 3]) -> Result<i64, Errno> {
    // SAFETY: the calls of these tests are trapped, or take numbers only.
    let result = unsafe { libc::syscall(number, args[0], args[1], args[2]) };
    if result < 0 {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap());
    }
    Ok(result)
}

/// Starts a thread that has itself supervised and then runs `client`.
fn client<T: Send + 'static>(
    filter: Filter,
    client: impl FnOnce() -> T + Send + 'static,
) -> (Listener, JoinHandle<T>) {
    let (sender, receiver) = channel();
    let thread = std::thread::spawn(move || {
        let installed = without_new_privileges(|| filter.install()).unwrap();
        sender.send(installed.listener).unwrap();
        client()
    });
    (receiver.recv().unwrap(), thread)
}

/// Ordinary users have to give up new privileges first.
fn without_new_privileges<T>(then: impl FnOnce() -> T) -> T {
    rustix::thread::set_no_new_privs(true).unwrap();
    then()
}

/// The next call; an old one may have been taken back by a signal.
fn next(listener: &Listener) -> Notification {
    loop {
        match listener.recv() {
            Ok(notification) => return notification,
            Err(Errno::NOENT | Errno::INTR) => {}
            Err(errno) => panic!("{errno}"),
        }
    }
}

/// What a second answer is told, before and after the caller has gone on.
fn answered<T>(result: Result<T, Errno>) -> bool {
    matches!(result, Err(Errno::NOENT | Errno::INPROGRESS))
}

#[test]
fn a_call_gets_what_its_supervisor_says() {
    let (listener, thread) = client(Filter::new().trap(libc::SYS_getppid), || {
        let me = rustix::thread::gettid().as_raw_nonzero().get();
        let calls: [Result<i64, Errno>; 4] =
            std::array::from_fn(|at| call(libc::SYS_getppid, [at as u64, 7, u64::MAX]));
        // Not trapped.
        assert!(call(libc::SYS_gettid, [0; 3]).is_ok());
        (me, calls)
    });
    let _ = listener.set_sync_wake_up();
    let first = next(&listener);
    assert_eq!(first.number, libc::SYS_getppid);
    assert_eq!(first.args[..3], [0, 7, u64::MAX]);
    assert!(listener.is_valid(first.id) && !listener.is_valid(first.id + 1000));
    listener.result(first.id, 1 << 40).unwrap();
    assert!(!listener.is_valid(first.id));
    assert!(answered(listener.result(first.id, 2)));
    listener.result(next(&listener).id, 0).unwrap();
    listener.error(next(&listener).id, Errno::XFULL).unwrap();
    listener.let_through(next(&listener).id).unwrap();
    let (tid, calls) = thread.join().unwrap();
    assert_eq!(first.tid, tid);
    let parent = i64::from(std::os::unix::process::parent_id());
    assert_eq!(calls, [Ok(1 << 40), Ok(0), Err(Errno::XFULL), Ok(parent)]);
}

#[test]
fn a_descriptor_and_the_answer_come_together() {
    let word = 0x1234;
    let (listener, thread) = client(
        Filter::new().trap_argument(libc::SYS_ioctl, 1, [word]),
        move || {
            let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
            let fd = event.as_raw_fd() as u64;
            // Another command: the kernel's own answer.
            assert_eq!(call(libc::SYS_ioctl, [fd, 0x1235, 0]), Err(Errno::NOTTY));
            // The upper half of the word is not looked at.
            let one = call(libc::SYS_ioctl, [fd, 1 << 32 | u64::from(word), 0]).unwrap();
            let two = call(libc::SYS_ioctl, [fd, u64::from(word), 0]).unwrap();
            // SAFETY: the supervisor put them there for us.
            [one, two].map(|fd| unsafe { OwnedFd::from_raw_fd(fd as i32) })
        },
    );
    let memory = rustix::fs::memfd_create("given", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let call = next(&listener);
    listener.result_fd(call.id, &memory, true).unwrap();
    let call = next(&listener);
    let before = listener.add_fd(call.id, &memory, false).unwrap();
    assert!(listener.is_valid(call.id), "it waits for its answer");
    listener.result(call.id, before.into()).unwrap();
    assert!(answered(listener.result_fd(call.id, &memory, true)));
    let [one, two] = thread.join().unwrap();
    let cloexec =
        |fd: &OwnedFd| rustix::io::fcntl_getfd(fd).unwrap() == rustix::io::FdFlags::CLOEXEC;
    assert!(cloexec(&one) && !cloexec(&two));
    let ino = |fd: &OwnedFd| {
        std::fs::File::from(fd.try_clone().unwrap())
            .metadata()
            .unwrap()
            .st_ino()
    };
    assert!(ino(&one) == ino(&memory) && ino(&two) == ino(&memory));
}

#[test]
fn a_task_has_one_listener() {
    let (listener, thread) = client(Filter::new(), || Filter::new().install().err());
    assert_eq!(thread.join().unwrap(), Some(InstallError::HasListener));
    drop(listener);
}

#[test]
fn the_end_of_the_last_task_is_told() {
    let (release, wait) = channel::<()>();
    let (listener, thread) = client(Filter::new().trap(libc::SYS_getppid), move || {
        wait.recv().unwrap();
    });
    let mut fds = [PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)];
    assert_eq!(poll(&mut fds, Some(&Timespec::default())).unwrap(), 0);
    release.send(()).unwrap();
    thread.join().unwrap();
    let long = Timespec {
        tv_sec: 20,
        tv_nsec: 0,
    };
    assert_eq!(poll(&mut fds, Some(&long)).unwrap(), 1);
    assert!(fds[0].revents().contains(PollFlags::HUP));
    if vfiod_tests::skip::kernel_is_at_least(6, 11) {
        assert_eq!(listener.recv(), Err(Errno::NOENT));
    }
    // Before that it would wait for ever (`kernel/seccomp.c`, `seccomp_notify_recv`).
}

#[test]
fn without_a_listener_calls_fail_at_once() {
    let (listener, thread) = client(Filter::new().trap(libc::SYS_getppid), || {
        [0; 2].map(|_| call(libc::SYS_getppid, [0; 3]))
    });
    let received = next(&listener);
    // It waits for an answer that will not come.
    drop(listener);
    assert_eq!(thread.join().unwrap(), [Err(Errno::NOSYS); 2]);
    assert!(received.tid > 0);
}

/// Each call is answered exactly once, however many signals come.
#[test]
fn a_storm_of_signals_repeats_nothing() {
    const CALLS: u32 = 300;
    static CAUGHT: AtomicU32 = AtomicU32::new(0);
    extern "C" fn caught(_: libc::c_int) {
        CAUGHT.fetch_add(1, Ordering::Relaxed);
    }
    // SAFETY: the handler adds to an atomic; the structure is zero or set.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = caught as extern "C" fn(libc::c_int) as usize;
        action.sa_flags = libc::SA_RESTART;
        assert_eq!(
            libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut()),
            0
        );
    }
    let tid = Arc::new(AtomicU32::new(0));
    let told = Arc::clone(&tid);
    let (listener, thread) = client(Filter::new().trap(libc::SYS_getppid), move || {
        let me = rustix::thread::gettid().as_raw_nonzero().get();
        told.store(me.cast_unsigned(), Ordering::Release);
        let calls = (0..CALLS).map(|_| call(libc::SYS_getppid, [0; 3]).unwrap());
        let calls: Vec<i64> = calls.collect();
        told.store(0, Ordering::Release);
        calls
    });
    let stop = Arc::new(AtomicBool::new(false));
    let ended = Arc::clone(&stop);
    let storm = std::thread::spawn(move || {
        while !ended.load(Ordering::Relaxed) {
            let to = tid.load(Ordering::Acquire);
            let me = std::process::id();
            if to != 0 {
                // SAFETY: it takes numbers. That the thread has just ended is an errno.
                unsafe { libc::syscall(libc::SYS_tgkill, me, to, libc::SIGUSR1) };
            }
            let until = Instant::now() + Duration::from_micros(100);
            while Instant::now() < until {
                std::thread::yield_now();
            }
        }
    });
    let answered = Mutex::new(Vec::new());
    while answered.lock().unwrap().len() < CALLS as usize {
        let call = next(&listener);
        let number = answered.lock().unwrap().len() as i64;
        // Time in which signals come.
        std::thread::sleep(Duration::from_micros(300));
        match listener.result(call.id, number) {
            Ok(()) => answered.lock().unwrap().push(number),
            // Linux before 5.19 takes a received call back.
            Err(Errno::NOENT) => {}
            Err(errno) => panic!("{errno}"),
        }
    }
    stop.store(true, Ordering::Relaxed);
    storm.join().unwrap();
    assert_eq!(thread.join().unwrap(), answered.into_inner().unwrap());
    assert!(CAUGHT.load(Ordering::Relaxed) > 100, "there was a storm");
}
