//! Handlers that answer late, wrongly or not at all.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use crate::common::PATIENCE;
use crate::common::Place;
use crate::common::Tree;
use crate::common::able;
use crate::common::on_read;
use crate::common::open;
use crate::common::until;
use crate::interrupts::interrupted_read;
use fuse_server::Answered;
use fuse_server::Config;
use fuse_server::Connection;
use fuse_server::MountOptions;
use fuse_server::Operation;
use fuse_server::Policy;
use fuse_server::Request;
use fuse_server::Root;
use fuse_server::Workers;
use rustix::io::Errno;

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
    assert_read_ends_with(tree, Errno::INTR);
}

#[test]
fn stuck_threads_are_bounded_and_all_come_back() {
    if !able() {
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
    assert_read_ends_with(tree, Errno::IO);
}

/// Reads where the handler does not do as it should, and ends the mount.
fn assert_read_ends_with(tree: Tree, errno: Errno) {
    let file = open(&tree);
    assert_eq!(rustix::io::pread(&file, &mut [0_u8; 4], 100), Err(errno));
    drop(file);
    tree.end();
}

#[test]
fn a_handler_that_asks_its_own_connection_hands_over_first() {
    if !able() {
        return;
    }
    let (fd, detached) = MountOptions {
        root: Root::Directory,
        ..MountOptions::default()
    }
    .create()
    .expect("mount");
    let connection = Connection::new(fd, &Config::default()).expect("INIT");
    let place = Place::new();
    let workers: Arc<OnceLock<Workers>> = Arc::default();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (own, set, record) = (connection.clone(), Arc::clone(&workers), Arc::clone(&seen));
    let name = place.path().join("nothing");
    let handler = move |request: Request<'_>| {
        if let Operation::Statfs { reply } = request.op {
            let done = [own.hand_over(), own.hand_over()];
            let threads = set.get().expect("started").threads();
            // A LOOKUP, which only another thread can answer.
            let found = rustix::fs::stat(&name).map(drop);
            let mut record = record.lock().expect("not poisoned");
            record.push((done, threads, found));
            let _ = reply.statfs(&fuse_server::Statfs::default());
        } else {
            let _ = request.op.error(Errno::NOENT);
        }
    };
    let policy = Policy {
        max_stuck: 1,
        ..Policy::default()
    };
    let started = Workers::start(connection.clone(), Arc::new(handler), policy).expect("threads");
    assert!(workers.set(started).is_ok());
    let workers = workers.get().expect("started");
    let mount = detached.attach(place.path()).expect("attach");

    // Nothing to hand over: this thread serves nobody.
    assert_eq!(connection.hand_over(), Ok(()));
    assert_eq!(workers.threads(), (1, 0));
    for _ in 0..3 {
        rustix::fs::statfs(place.path()).expect("statfs");
        let seen = seen.lock().expect("not poisoned").pop();
        assert_eq!(
            seen,
            Some(([Ok(()); 2], (2, 1), Err(Errno::NOENT))),
            "once, and at once"
        );
        until("who has handed over retires", || {
            workers.threads() == (1, 0)
        });
    }
    mount.unmount().expect("unmount");
    assert!(workers.wait(PATIENCE));
}
