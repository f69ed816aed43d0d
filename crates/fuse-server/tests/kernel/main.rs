//! The crate against the running kernel. Needs `/dev/fuse` and the right to mount.
#![expect(unsafe_code, reason = "raw ioctls, mappings and signals of a client")]

mod common;
mod redirect;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::Duration;
use std::time::Instant;

use common::NODE;
use common::PATIENCE;
use common::Place;
use common::Tree;
use common::pass;
use common::until;
use fuse_server::Answered;
use fuse_server::BackingId;
use fuse_server::Config;
use fuse_server::Connection;
use fuse_server::MountOptions;
use fuse_server::OpenFlags;
use fuse_server::Opened;
use fuse_server::Operation;
use fuse_server::Parked;
use fuse_server::Policy;
use fuse_server::ReplyData;
use fuse_server::ReplyOpen;
use fuse_server::Request;
use fuse_server::Root;
use fuse_server::Served;
use fuse_server::Workers;
use rustix::io::Errno;

fn open(tree: &Tree) -> File {
    File::options()
        .read(true)
        .write(true)
        .open(tree.file())
        .expect("open")
}

/// Hooks READ at offset `at`: `handle` gets the reply.
fn on_read(at: u64, handle: impl Fn(ReplyData) + Send + Sync + 'static) -> common::Hook {
    Box::new(move |request: Request<'_>| match request {
        Request {
            op: Operation::Read { offset, reply, .. },
            ..
        } if offset == at => {
            handle(reply);
            None
        }
        other => Some(other),
    })
}

/// Sends SIGURG, whose handler the crate has installed without `SA_RESTART`, to a thread of this process.
fn signal(tid: i32) {
    // SAFETY: tgkill touches no memory.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, libc::SIGURG) };
}

/// Reads 4 bytes at `offset` in a thread and signals it every 10 ms until it returns.
fn interrupted_read(file: &File, offset: u64) -> (rustix::io::Result<usize>, Duration) {
    let (send, receive) = mpsc::channel();
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            send.send(rustix::thread::gettid().as_raw_nonzero().get())
                .expect("the test waits");
            let start = Instant::now();
            (
                rustix::io::pread(file, &mut [0_u8; 4], offset),
                start.elapsed(),
            )
        });
        let tid = receive.recv().expect("the reader starts");
        std::thread::sleep(Duration::from_millis(30));
        while !reader.is_finished() {
            signal(tid);
            std::thread::sleep(Duration::from_millis(10));
        }
        reader.join().expect("no panic")
    })
}

#[test]
fn open_read_write_and_end() {
    let Some(tree) = Tree::mount() else { return };
    let file = open(&tree);
    file.write_all_at(b"abcd", 2).expect("write");
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, 2).expect("read");
    assert_eq!(&bytes, b"abcd");
    let names: Vec<_> = std::fs::read_dir(tree.place.path())
        .expect("readdir")
        .map(|entry| entry.expect("entry").file_name())
        .collect();
    assert_eq!(names, ["n"]);
    assert_eq!(
        std::fs::read(tree.place.path().join("x"))
            .expect_err("no such name")
            .raw_os_error(),
        Some(libc::ENOSYS)
    );
    drop(file);
    until("RELEASE", || {
        tree.files.releases.load(Ordering::SeqCst) == 1
    });
    tree.end();
}

#[test]
fn a_single_file_is_a_mount_of_its_own() {
    let Some(tree) = Tree::with(Root::File, Box::new(pass)) else {
        return;
    };
    let file = open(&tree);
    file.write_all_at(b"one", 0).expect("write");
    let mut bytes = [0; 3];
    file.read_exact_at(&mut bytes, 0).expect("read");
    assert_eq!(&bytes, b"one");
    drop(file);
    let Tree {
        mount,
        workers,
        place,
        ..
    } = tree;
    mount.unmount().expect("unmount");
    assert!(workers.wait(PATIENCE));
    assert_eq!(
        std::fs::read(place.path()).expect("what was under it"),
        b"under"
    );
}

#[test]
fn dropping_a_mount_leaves_a_later_one_at_its_place_alone() {
    let Some(tree) = Tree::mount() else { return };
    let Tree {
        mount,
        workers,
        place,
        ..
    } = tree;
    rustix::mount::unmount(place.path(), rustix::mount::UnmountFlags::DETACH)
        .expect("by somebody else");
    assert!(workers.wait(PATIENCE));
    let options = MountOptions::default();
    let (_, _, workers, later) = common::serve(&options, place.path(), Box::new(pass));
    assert_eq!(mount.unmount(), Err(Errno::INVAL));
    assert!(place.path().join("n").exists());
    later.unmount().expect("still there");
    assert!(workers.wait(PATIENCE));
}

#[test]
fn raw_ioctl_numbers_bring_their_argument_and_sized_ones_their_bytes() {
    let caller = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&caller);
    let Some(tree) = Tree::hooked(Box::new(move |request: Request<'_>| match request {
        Request {
            caller,
            op:
                Operation::Ioctl {
                    cmd,
                    arg,
                    in_size,
                    out_size,
                    data,
                    reply,
                    ..
                },
            ..
        } => {
            seen.store(caller.tid.into(), Ordering::SeqCst);
            let _ = match cmd {
                // _IO(';', 100), like VFIO_GET_API_VERSION: neither size nor direction.
                0x3b64
                    if in_size == 0
                        && out_size == 0
                        && data.is_empty()
                        && arg == 0xdead_beef_f00d =>
                {
                    reply.result(42, &[])
                }
                // _IO(';', 101) with an errno.
                0x3b65 => reply.error(Errno::NOTTY),
                // _IOWR(';', 1, [u8; 4])
                0xc004_3b01 if data == [1, 2, 3, 4] && out_size == 4 => {
                    reply.result(0, &[5, 6, 7, 8])
                }
                _ => reply.error(Errno::INVAL),
            };
            None
        }
        other => Some(other),
    })) else {
        return;
    };
    let file = open(&tree);
    // SAFETY: the server takes the argument as a number.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), 0x3b64, 0xdead_beef_f00d_u64) };
    assert_eq!(result, 42);
    assert_eq!(
        caller.load(Ordering::SeqCst),
        u64::from(
            rustix::thread::gettid()
                .as_raw_nonzero()
                .get()
                .unsigned_abs()
        )
    );
    // SAFETY: as above.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), 0x3b65, 0) };
    assert_eq!(result, -1);
    assert_eq!(
        std::io::Error::last_os_error().raw_os_error(),
        Some(libc::ENOTTY)
    );
    let mut bytes = [1_u8, 2, 3, 4];
    // SAFETY: the kernel reads and writes the four bytes the number says.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), 0xc004_3b01, bytes.as_mut_ptr()) };
    assert_eq!(result, 0);
    assert_eq!(bytes, [5, 6, 7, 8]);
    drop(file);
    tree.end();
}

#[test]
fn a_parked_request_ends_with_eintr_by_its_callback() {
    let parked = Arc::new(Mutex::new(None::<Parked<ReplyData>>));
    let keep = Arc::clone(&parked);
    let Some(tree) = Tree::hooked(on_read(100, move |reply| {
        let waiting = reply.park(|reply| assert_eq!(reply.error(Errno::INTR), Answered::Delivered));
        *keep.lock().expect("not poisoned") = Some(waiting);
    })) else {
        return;
    };
    let file = open(&tree);
    let (result, took) = interrupted_read(&file, 100);
    assert_eq!(result, Err(Errno::INTR));
    assert!(
        took < Duration::from_millis(500),
        "by the callback, not by the grace: {took:?}"
    );
    assert_eq!(tree.connection.in_flight(), 0);
    let waiting = parked.lock().expect("not poisoned").take().expect("parked");
    assert!(waiting.take().is_none());
    drop(file);
    tree.end();
}

#[test]
fn interrupts_that_overtake_their_requests_are_not_lost() {
    if !common::able() {
        return;
    }
    let (fd, detached) = MountOptions::default().create().expect("mount");
    // Without grace to speak of: only the interrupt itself can end a request.
    let config = Config {
        interrupt_grace: Duration::from_secs(3600),
        ..Config::default()
    };
    let connection = Connection::new(fd, &config).expect("INIT");
    let parked = Mutex::new(Vec::new());
    let handler = move |request: Request<'_>| {
        if let Operation::Statfs { reply } = request.op {
            reply.interrupt_at_once();
            parked.lock().expect("not poisoned").push(reply);
        } else {
            let _ = request.op.error(Errno::NOENT);
        }
    };
    // Two readers: one gets the request, the other its interrupt.
    let policy = Policy {
        threads: 2,
        ..Policy::default()
    };
    let workers = Workers::start(connection.clone(), Arc::new(handler), policy).expect("threads");
    let place = Place::new();
    let mount = detached.attach(place.path()).expect("attach");
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..4)
            .map(|_| {
                let (send, receive) = mpsc::channel();
                let path = place.path();
                let client = scope.spawn(move || {
                    let tid = rustix::thread::gettid().as_raw_nonzero().get();
                    send.send(tid).expect("the test waits");
                    // A signal that comes before the call is lost, and the next one ends it.
                    (0..300).all(|_| rustix::fs::statfs(path).err() == Some(Errno::INTR))
                });
                (receive.recv().expect("the client starts"), client)
            })
            .collect();
        let start = Instant::now();
        while clients.iter().any(|(_, client)| !client.is_finished()) {
            if start.elapsed() > PATIENCE {
                // Ends the connection, or the clients would never go away.
                let flags =
                    rustix::mount::UnmountFlags::FORCE | rustix::mount::UnmountFlags::DETACH;
                let _ = rustix::mount::unmount(place.path(), flags);
                panic!(
                    "an interrupt was lost; {} requests under way",
                    connection.in_flight()
                );
            }
            for (tid, client) in &clients {
                if !client.is_finished() {
                    signal(*tid);
                }
            }
            std::thread::yield_now();
        }
        assert!(
            clients
                .into_iter()
                .all(|(_, client)| client.join().expect("no panic"))
        );
    });
    assert_eq!(connection.in_flight(), 0);
    mount.unmount().expect("unmount");
    assert!(workers.wait(PATIENCE));
}

#[test]
fn a_parked_request_that_asked_for_it_is_interrupted_at_once_and_answers_too_late() {
    let parked = Arc::new(Mutex::new(None::<ReplyData>));
    let keep = Arc::clone(&parked);
    let Some(tree) = Tree::hooked(on_read(100, move |reply| {
        reply.interrupt_at_once();
        *keep.lock().expect("not poisoned") = Some(reply);
    })) else {
        return;
    };
    let file = open(&tree);
    assert_eq!(interrupted_read(&file, 100).0, Err(Errno::INTR));
    let reply = parked.lock().expect("not poisoned").take().expect("parked");
    assert!(reply.is_interrupted() && !reply.is_awaited());
    assert_eq!(reply.data(b"late"), Answered::TooLate);
    drop(file);
    tree.end();
}

#[test]
fn a_killed_client_goes_away_and_its_file_is_released() {
    let parked = Mutex::new(Vec::new());
    let count = Arc::new(AtomicU64::new(0));
    let reached = Arc::clone(&count);
    // Nobody ever answers: the grace does.
    let Some(tree) = Tree::hooked(on_read(0, move |reply| {
        parked.lock().expect("not poisoned").push(reply);
        reached.fetch_add(1, Ordering::SeqCst);
    })) else {
        return;
    };
    let mut client = Command::new("cat")
        .arg(tree.file())
        .stdout(Stdio::null())
        .spawn()
        .expect("cat exists");
    until("the read arrives", || count.load(Ordering::SeqCst) == 1);
    client.kill().expect("kill");
    let start = Instant::now();
    client.wait().expect("wait");
    until("RELEASE", || {
        tree.files.releases.load(Ordering::SeqCst) == 1
    });
    assert!(start.elapsed() < Duration::from_secs(2));
    tree.end();
}

#[test]
fn an_open_abandoned_by_its_client_tells_the_handler() {
    let (send, receive) = mpsc::channel::<ReplyOpen>();
    let send = Mutex::new(send);
    let Some(tree) = Tree::hooked(Box::new(move |request: Request<'_>| match request {
        Request {
            op: Operation::Open { reply, .. },
            node: NODE,
            ..
        } => {
            send.lock()
                .expect("not poisoned")
                .send(reply)
                .expect("the test waits");
            None
        }
        other => Some(other),
    })) else {
        return;
    };
    let mut client = Command::new("cat")
        .arg(tree.file())
        .stdout(Stdio::null())
        .spawn()
        .expect("cat exists");
    let reply = receive.recv_timeout(PATIENCE).expect("OPEN");
    client.kill().expect("kill");
    client.wait().expect("wait");
    assert_eq!(
        reply.opened(&Opened {
            fh: 1,
            flags: OpenFlags::DIRECT_IO,
            backing: None
        }),
        Answered::TooLate
    );
    assert_eq!(tree.files.releases.load(Ordering::SeqCst), 0);
    tree.end();
}

#[test]
fn a_stuck_handler_stops_nobody_else_and_can_be_interrupted() {
    let answers = Arc::new(Mutex::new(Vec::new()));
    let record = Arc::clone(&answers);
    let Some(tree) = Tree::hooked(on_read(100, move |reply| {
        std::thread::sleep(Duration::from_secs(1));
        record
            .lock()
            .expect("not poisoned")
            .push(reply.data(b"slow"));
    })) else {
        return;
    };
    tree.files
        .bytes
        .lock()
        .expect("not poisoned")
        .extend_from_slice(b"fast");
    let file = open(&tree);
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| {
            let mut bytes = [0; 4];
            file.read_exact_at(&mut bytes, 100).map(|()| bytes)
        });
        until("the slow read is under way", || {
            tree.connection.in_flight() == 1
        });
        let start = Instant::now();
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, 0).expect("read");
        assert_eq!(&bytes, b"fast");
        assert!(
            start.elapsed() < Duration::from_millis(500),
            "{:?}",
            start.elapsed()
        );
        assert_eq!(tree.workers.threads(), (2, 1));
        assert_eq!(&slow.join().expect("no panic").expect("read"), b"slow");
    });
    until("the surplus thread retires", || {
        tree.workers.threads() == (1, 0)
    });
    assert_eq!(
        answers.lock().expect("not poisoned").pop(),
        Some(Answered::Delivered)
    );

    let (result, took) = interrupted_read(&file, 100);
    assert_eq!(result, Err(Errno::INTR));
    assert!(
        took < Duration::from_millis(700),
        "before the handler is done: {took:?}"
    );
    until("the handler comes back", || {
        answers.lock().expect("not poisoned").len() == 1
    });
    assert_eq!(
        answers.lock().expect("not poisoned").pop(),
        Some(Answered::TooLate)
    );
    drop(file);
    tree.end();
}

#[test]
fn a_system_call_of_a_stuck_handler_ends_with_eintr() {
    let Some(tree) = Tree::hooked(on_read(100, |reply| {
        // A full counter: the write waits for a reader that never comes.
        let eventfd =
            rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).expect("eventfd");
        rustix::io::write(&eventfd, &(u64::MAX - 1).to_ne_bytes()).expect("fits");
        let _ = match rustix::io::write(&eventfd, &1_u64.to_ne_bytes()) {
            Err(errno) => reply.error(errno),
            Ok(_) => reply.data(b"what"),
        };
    })) else {
        return;
    };
    let file = open(&tree);
    assert_eq!(
        rustix::io::pread(&file, &mut [0_u8; 4], 100),
        Err(Errno::INTR)
    );
    drop(file);
    tree.end();
}

#[test]
fn stuck_threads_are_bounded_and_all_come_back() {
    if !common::able() {
        return;
    }
    let (fd, detached) = MountOptions {
        root: Root::Directory,
        ..MountOptions::default()
    }
    .create()
    .expect("mount");
    let connection = Connection::new(fd, &Config::default()).expect("INIT");
    let gate = Arc::new(AtomicBool::new(false));
    let opened = Arc::clone(&gate);
    let handler = move |request: Request<'_>| {
        if let Operation::Statfs { reply } = request.op {
            until("the gate opens", || opened.load(Ordering::SeqCst));
            let _ = reply.statfs(&fuse_server::Statfs::default());
        } else {
            let _ = request.op.error(Errno::NOENT);
        }
    };
    let policy = Policy {
        max_stuck: 3,
        ..Policy::default()
    };
    let workers = Workers::start(connection, Arc::new(handler), policy).expect("threads");
    let place = Place::new();
    let mount = detached.attach(place.path()).expect("attach");
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| rustix::fs::statfs(place.path()).expect("statfs"));
        }
        until("three are stuck", || workers.threads() == (4, 3));
        // The fourth is stuck too, and no more are started.
        std::thread::sleep(Duration::from_millis(60));
        assert_eq!(workers.threads(), (4, 3));
        gate.store(true, Ordering::SeqCst);
    });
    until("the surplus retires", || workers.threads() == (1, 0));
    mount.unmount().expect("unmount");
    assert!(workers.wait(PATIENCE));
}

#[test]
fn a_deadline_answers_with_its_errno() {
    let parked = Arc::new(Mutex::new(None));
    let keep = Arc::clone(&parked);
    let Some(tree) = Tree::hooked(on_read(100, move |reply| {
        reply.set_deadline(Instant::now() + Duration::from_millis(40), Errno::TIMEDOUT);
        *keep.lock().expect("not poisoned") = Some(reply);
    })) else {
        return;
    };
    let file = open(&tree);
    let start = Instant::now();
    assert_eq!(
        rustix::io::pread(&file, &mut [0_u8; 4], 100),
        Err(Errno::TIMEDOUT)
    );
    assert!(start.elapsed() >= Duration::from_millis(40));
    let reply = parked.lock().expect("not poisoned").take().expect("parked");
    assert_eq!(reply.data(b"late"), Answered::TooLate);
    drop(file);
    tree.end();
}

#[test]
fn a_dropped_reply_and_a_panic_are_eio_and_the_thread_goes_on() {
    let Some(tree) = Tree::hooked(Box::new(|request: Request<'_>| match request {
        Request {
            op: Operation::Read { offset: 100, .. },
            ..
        } => None,
        Request {
            op: Operation::Read { offset: 200, .. },
            ..
        } => panic!("a handler's mistake, on purpose"),
        other => Some(other),
    })) else {
        return;
    };
    tree.files
        .bytes
        .lock()
        .expect("not poisoned")
        .extend_from_slice(b"here");
    let file = open(&tree);
    assert_eq!(
        rustix::io::pread(&file, &mut [0_u8; 4], 100),
        Err(Errno::IO)
    );
    assert_eq!(
        rustix::io::pread(&file, &mut [0_u8; 4], 200),
        Err(Errno::IO)
    );
    assert_eq!(rustix::io::pread(&file, &mut [0_u8; 4], 0), Ok(4));
    drop(file);
    tree.end();
}

#[test]
fn answers_the_kernel_refuses_are_eio() {
    let Some(tree) = Tree::hooked(on_read(100, |reply| {
        assert_eq!(reply.data(&[0; 100]), Answered::TooLate);
    })) else {
        return;
    };
    let file = open(&tree);
    assert_eq!(
        rustix::io::pread(&file, &mut [0_u8; 4], 100),
        Err(Errno::IO)
    );
    drop(file);
    tree.end();
}

#[test]
fn a_mapping_is_native_while_reads_are_trapped() {
    let backing = Arc::new(OnceLock::<BackingId>::new());
    let give = Arc::clone(&backing);
    let Some(tree) = Tree::hooked(Box::new(move |request: Request<'_>| match request {
        Request {
            op: Operation::Open { reply, .. },
            node: NODE,
            ..
        } if give.get().is_some() => {
            let flags = OpenFlags::DIRECT_IO | OpenFlags::NOFLUSH;
            assert_eq!(
                reply.opened(&Opened {
                    fh: 7,
                    flags,
                    backing: give.get()
                }),
                Answered::Delivered
            );
            None
        }
        other => Some(other),
    })) else {
        return;
    };
    if !tree.connection.has_passthrough() {
        vfiod_tests::skip(vfiod_tests::skip::NO_PASSTHROUGH);
        return tree.end();
    }
    let memfd = rustix::fs::memfd_create("region", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
    rustix::fs::ftruncate(&memfd, 4096).expect("grow");
    backing
        .set(
            tree.connection
                .backing_open(memfd.as_fd())
                .expect("backing id"),
        )
        .expect("set once");
    tree.files
        .bytes
        .lock()
        .expect("not poisoned")
        .extend_from_slice(b"trap");
    let file = open(&tree);
    let again = open(&tree);
    // SAFETY: a fresh shared mapping of one page.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    assert_ne!(
        address,
        libc::MAP_FAILED,
        "{}",
        std::io::Error::last_os_error()
    );
    // SAFETY: the page is mapped read and write, and nothing else uses it.
    unsafe { address.cast::<[u8; 4]>().write_volatile(*b"mmap") };
    let mut bytes = [0; 4];
    rustix::io::pread(&memfd, &mut bytes, 0).expect("read the memfd");
    assert_eq!(&bytes, b"mmap");
    again
        .read_exact_at(&mut bytes, 0)
        .expect("read through the server");
    assert_eq!(&bytes, b"trap");
    // RELEASE comes at close, not at munmap.
    drop((file, again));
    until("RELEASE", || {
        tree.files.releases.load(Ordering::SeqCst) == 2
    });
    // SAFETY: still mapped.
    let result = unsafe { address.cast::<[u8; 4]>().read_volatile() };
    assert_eq!(result, *b"mmap");
    // SAFETY: the mapping made above.
    unsafe { libc::munmap(address, 4096) };
    tree.end();
    drop(backing);
}

#[test]
fn a_hundred_clients_at_once() {
    let Some(tree) = Tree::mount() else { return };
    std::thread::scope(|scope| {
        for client in 0..100_u64 {
            let tree = &tree;
            scope.spawn(move || {
                let file = open(tree);
                for turn in 0..50_u64 {
                    let value = (client << 32 | turn).to_ne_bytes();
                    file.write_all_at(&value, client * 8).expect("write");
                    let mut back = [0; 8];
                    file.read_exact_at(&mut back, client * 8).expect("read");
                    assert_eq!(back, value);
                }
            });
        }
    });
    until("all RELEASEs", || {
        tree.files.releases.load(Ordering::SeqCst) == 100
    });
    tree.end();
}

#[test]
fn invalidations_are_refused_on_a_serving_thread() {
    let connection = Arc::new(OnceLock::<Connection>::new());
    let own = Arc::clone(&connection);
    let Some(tree) = Tree::hooked(on_read(100, move |reply| {
        let connection = own.get().expect("set before the read");
        assert_eq!(
            connection.notify_inval_inode(NODE, -1, 0),
            Err(Errno::DEADLK)
        );
        assert_eq!(
            connection.notify_delete(1, NODE, "n".as_ref()),
            Err(Errno::DEADLK)
        );
        let _ = reply.data(b"fine");
    })) else {
        return;
    };
    connection.set(tree.connection.clone()).expect("set once");
    let file = open(&tree);
    assert_eq!(rustix::io::pread(&file, &mut [0_u8; 4], 100), Ok(4));
    tree.connection
        .notify_inval_inode(NODE, -1, 0)
        .expect("another thread may");
    assert_eq!(
        tree.connection.notify_inval_entry(1, "x".as_ref()),
        Err(Errno::NOENT)
    );
    drop(file);
    tree.end();
}

#[test]
fn another_server_goes_on_with_the_descriptor() {
    let Some(tree) = Tree::hooked(on_read(100, std::mem::forget)) else {
        return;
    };
    if !tree
        .connection
        .features()
        .contains(fuse_server::Features::HAS_RESEND)
    {
        vfiod_tests::skip("this kernel does not send requests again (Linux 6.9)");
        return tree.end();
    }
    let file = open(&tree);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(move || rustix::io::pread(&file, &mut [0_u8; 4], 100));
        until("the first server has it", || {
            tree.connection.in_flight() == 1
        });
        assert!(tree.workers.stop(PATIENCE));
        assert!(!tree.connection.has_ended());
        let fd = tree.connection.as_fd().try_clone_to_owned().expect("dup");
        let next = Connection::resume(fd, tree.connection.negotiated(), &Config::default());
        let resent = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&resent);
        let handler = move |request: Request<'_>| {
            seen.fetch_or(request.resent, Ordering::SeqCst);
            let _ = match request.op {
                Operation::Read { reply, .. } => reply.data(b"next"),
                Operation::Release { reply, .. } => reply.ok(),
                other => other.error(Errno::NOENT),
            };
        };
        let workers =
            Workers::start(next.clone(), Arc::new(handler), Policy::default()).expect("threads");
        next.notify_resend().expect("resend");
        assert_eq!(waiting.join().expect("no panic"), Ok(4));
        assert!(resent.load(Ordering::SeqCst));
        tree.mount.unmount().expect("unmount");
        assert!(workers.wait(PATIENCE));
    });
}

#[test]
fn a_non_blocking_connection_waits_for_nothing() {
    if !common::able() {
        return;
    }
    let (fd, detached) = MountOptions::default().create().expect("mount");
    let connection = Connection::new(fd, &Config::default()).expect("INIT");
    connection.set_nonblocking(true).expect("FIONBIO");
    let mut buffer = connection.buffer();
    let handler = |request: Request<'_>| {
        let _ = request.op.error(Errno::NOENT);
    };
    assert_eq!(
        connection.serve_one(&mut buffer, &handler),
        Ok(Served::WouldBlock)
    );
    drop(detached);
    assert_eq!(
        connection.serve_one(&mut buffer, &handler),
        Ok(Served::Ended)
    );
    assert!(connection.has_ended());
}

/// The thread of this process with this name, which it gives itself soon after its start.
fn thread_named(name: &str) -> std::path::PathBuf {
    let find = || {
        let tasks = std::fs::read_dir("/proc/self/task").expect("/proc");
        tasks
            .filter_map(|task| Some(task.ok()?.path()))
            .find(|task| {
                std::fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim() == name)
            })
    };
    until("the thread has its name", || find().is_some());
    find().expect("found just now")
}

/// A field of a thread's status.
fn status(task: &std::path::Path, field: &str) -> String {
    let text = std::fs::read_to_string(task.join("status")).expect("the thread lives");
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.expect("the field exists").trim().to_owned()
}

#[test]
fn the_server_follows_its_client_to_each_cpu() {
    if !common::able() {
        return;
    }
    let allowed = rustix::thread::sched_getaffinity(None).expect("affinity");
    if allowed.count() < 2 {
        vfiod_tests::skip("only one CPU");
        return;
    }
    let (fd, detached) = MountOptions::default().create().expect("mount");
    let connection = Connection::new(fd, &Config::default()).expect("INIT");
    let handler = |request: Request<'_>| {
        let _ = match request.op {
            Operation::Statfs { reply } => reply.statfs(&fuse_server::Statfs::default()),
            other => other.error(Errno::NOENT),
        };
    };
    let policy = Policy {
        name: "follower".to_owned(),
        ..Policy::default()
    };
    let workers = Workers::start(connection, Arc::new(handler), policy).expect("threads");
    let place = Place::new();
    let mount = detached.attach(place.path()).expect("attach");
    let server = thread_named("follower");
    let cpus = (0..rustix::thread::CpuSet::MAX_CPU)
        .filter(|&cpu| allowed.is_set(cpu))
        .take(2);
    for cpu in cpus.cycle().take(4) {
        // A thread of its own, so that this one keeps its CPUs.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut one = rustix::thread::CpuSet::new();
                one.set(cpu);
                rustix::thread::sched_setaffinity(None, &one).expect("allowed");
                for _ in 0..5000 {
                    rustix::fs::statfs(place.path()).expect("statfs");
                }
            });
        });
        assert_eq!(status(&server, "Cpus_allowed_list"), cpu.to_string());
    }
    let own = rustix::thread::sched_getaffinity(None).expect("affinity");
    assert_eq!(own.count(), allowed.count(), "no other thread is bound");
    mount.unmount().expect("unmount");
    assert!(workers.wait(PATIENCE));
}

#[test]
fn at_rest_nothing_ticks() {
    // In a process of its own: other tests keep the monitor busy.
    if std::env::var_os("FUSE_SERVER_AT_REST").is_none() {
        let exe = std::env::current_exe().expect("this test");
        let mut child = Command::new(exe);
        child
            .args(["--exact", "at_rest_nothing_ticks", "--nocapture"])
            .env("FUSE_SERVER_AT_REST", "1");
        assert!(child.status().expect("run").success());
        return;
    }
    let Some(tree) = Tree::mount() else { return };
    let file = open(&tree);
    file.write_all_at(b"abcd", 0).expect("write");
    let monitor = thread_named("fuse-monitor");
    let ticks = || status(&monitor, "voluntary_ctxt_switches");
    until("the monitor sleeps", || {
        let before = ticks();
        std::thread::sleep(Duration::from_millis(100));
        ticks() == before
    });
    // And it wakes up when there is something to look after.
    let before = ticks();
    file.write_all_at(b"efgh", 0).expect("write");
    until("the monitor is awake", || ticks() != before);
    drop(file);
    tree.end();
}

#[test]
fn it_works_in_a_user_namespace() {
    if !common::able() {
        return;
    }
    let exe = std::env::current_exe().expect("this test");
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount"])
        .arg(exe)
        .args([
            "--exact",
            "open_read_write_and_end",
            "a_killed_client_goes_away_and_its_file_is_released",
            "--nocapture",
        ])
        .output()
        .expect("unshare exists");
    let text = String::from_utf8_lossy(&output.stdout);
    if text.contains("SKIPPED")
        || String::from_utf8_lossy(&output.stderr).contains("unshare failed")
    {
        vfiod_tests::skip(&format!("no FUSE mount in a user namespace here: {text}"));
        assert!(
            std::env::var_os("CI").is_none(),
            "CI allows user namespaces"
        );
        return;
    }
    assert!(
        output.status.success() && text.contains("2 passed"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
