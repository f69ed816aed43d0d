//! The crate against the running kernel. Needs `/dev/fuse` and the right to mount.
#![expect(unsafe_code, reason = "raw ioctls, mappings and signals of a client")]

mod common;
mod interrupts;
mod redirect;
mod stuck;
mod threads;

use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use common::NODE;
use common::PATIENCE;
use common::Tree;
use common::on_read;
use common::open;
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
use fuse_server::Policy;
use fuse_server::Request;
use fuse_server::Root;
use fuse_server::Served;
use fuse_server::Workers;
use rustix::io::Errno;

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
    if !vfiod_tests::skip::kernel_is_at_least(6, 8) {
        return vfiod_tests::skip(
            "this kernel gives a mount's number again (STATX_MNT_ID_UNIQUE, Linux 6.8)",
        );
    }
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
            "interrupts::a_killed_client_goes_away_and_its_file_is_released",
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
