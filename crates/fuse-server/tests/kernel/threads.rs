//! The threads that serve: where they run, and that they rest.

use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use crate::common::PATIENCE;
use crate::common::Place;
use crate::common::Tree;
use crate::common::able;
use crate::common::open;
use crate::common::until;
use fuse_server::Config;
use fuse_server::Connection;
use fuse_server::MountOptions;
use fuse_server::Operation;
use fuse_server::Policy;
use fuse_server::Request;
use fuse_server::Workers;
use rustix::io::Errno;

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
    if !able() {
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
            .args(["--exact", "threads::at_rest_nothing_ticks", "--nocapture"])
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
