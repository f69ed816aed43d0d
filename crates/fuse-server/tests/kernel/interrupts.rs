//! Requests whose client waits no longer: interrupted, killed, or gone.

use std::fs::File;
use std::process::Command;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::Duration;
use std::time::Instant;

use crate::common::NODE;
use crate::common::PATIENCE;
use crate::common::Place;
use crate::common::Tree;
use crate::common::able;
use crate::common::on_read;
use crate::common::open;
use crate::common::until;
use fuse_server::Answered;
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
use fuse_server::Workers;
use rustix::io::Errno;

/// Sends SIGURG, whose handler the crate has installed without `SA_RESTART`, to a thread of this process.
fn signal(tid: i32) {
    // SAFETY: tgkill touches no memory.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, libc::SIGURG) };
}

/// Reads 4 bytes at `offset` in a thread and signals it every 10 ms until it returns.
pub(crate) fn interrupted_read(file: &File, offset: u64) -> (rustix::io::Result<usize>, Duration) {
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
    if !able() {
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
