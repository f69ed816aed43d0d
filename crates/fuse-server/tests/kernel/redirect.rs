//! How a node gets a connection of its own at first use: the OPEN on the main connection is answered ESTALE after another connection was mounted on
//! top of the node, and the kernel walks the path once more (`fs/namei.c`, `do_filp_open`: `LOOKUP_REVAL`), now into the new mount.

use std::fs::File;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::sync::mpsc;

use crate::common::Files;
use crate::common::NODE;
use crate::common::Tree;
use crate::common::pass;
use crate::common::until;
use fuse_server::Connection;
use fuse_server::Mount;
use fuse_server::MountOptions;
use fuse_server::Operation;
use fuse_server::ReplyOpen;
use fuse_server::Request;
use fuse_server::Root;
use fuse_server::Workers;
use rustix::io::Errno;

/// The second connection, once it is there.
type Second = Arc<Mutex<Option<(Arc<Files>, Connection, Workers, Mount)>>>;

struct Redirecting {
    tree: Tree,
    second: Second,
    /// OPENs that reached the main connection.
    reached: Arc<AtomicU64>,
}

/// A tree whose node `n` moves to a connection of its own at its first OPEN. Its contents there are `second`, on the main connection `main`.
fn redirecting() -> Option<Redirecting> {
    let (send, receive) = mpsc::channel::<ReplyOpen>();
    let send = Mutex::new(send);
    let mounted = Arc::new(AtomicBool::new(false));
    let reached = Arc::new(AtomicU64::new(0));
    let (seen, count) = (Arc::clone(&mounted), Arc::clone(&reached));
    let tree = Tree::hooked(Box::new(move |request: Request<'_>| {
        let Request {
            caller,
            unique,
            node,
            resent,
            op,
        } = request;
        match op {
            Operation::Open { flags, reply } if node == NODE => {
                count.fetch_add(1, Ordering::SeqCst);
                if seen.load(Ordering::SeqCst) {
                    // The opener does not see the mount: it is served here.
                    return Some(Request {
                        caller,
                        unique,
                        node,
                        resent,
                        op: Operation::Open { flags, reply },
                    });
                }
                send.lock()
                    .expect("not poisoned")
                    .send(reply)
                    .expect("the mounter lives");
                None
            }
            op => Some(Request {
                caller,
                unique,
                node,
                resent,
                op,
            }),
        }
    }))?;
    *tree.files.bytes.lock().expect("not poisoned") = b"main".to_vec();
    let second = Second::default();
    let (slot, path) = (Arc::clone(&second), tree.file());
    // Mounting walks the path, which asks the main connection: so another thread than the one that serves it.
    std::thread::spawn(move || {
        for reply in receive {
            let mut slot = slot.lock().expect("not poisoned");
            if slot.is_none() {
                let options = MountOptions {
                    root: Root::File,
                    ..MountOptions::default()
                };
                let served = crate::common::serve(&options, &path, Box::new(pass));
                *served.0.bytes.lock().expect("not poisoned") = b"second".to_vec();
                *slot = Some(served);
                mounted.store(true, Ordering::SeqCst);
            }
            let _ = reply.error(Errno::STALE);
        }
    });
    Some(Redirecting {
        tree,
        second,
        reached,
    })
}

impl Redirecting {
    fn opens_of_second(&self) -> u64 {
        self.second
            .lock()
            .expect("not poisoned")
            .as_ref()
            .map_or(0, |second| second.0.opens.load(Ordering::SeqCst))
    }

    fn end(self) {
        drop(self.second.lock().expect("not poisoned").take());
        self.tree.end();
    }
}

/// A shell that runs one line at a time and says `done STATUS` after each.
struct Shell {
    child: Child,
    answers: BufReader<std::process::ChildStdout>,
}

impl Shell {
    /// In a mount namespace of its own, with the given propagation (`unshare --propagation`).
    fn in_namespace(propagation: &str) -> Self {
        let mut child = Command::new("unshare")
            .args(["--mount", "--propagation", propagation, "sh"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare and sh exist");
        let answers = BufReader::new(child.stdout.take().expect("piped"));
        Self { child, answers }
    }

    /// What the line printed, and its status.
    fn run(&mut self, line: &str) -> (String, i32) {
        let stdin = self.child.stdin.as_mut().expect("piped");
        writeln!(stdin, "{line}\necho \"\ndone $?\"").expect("the shell lives");
        let mut printed = String::new();
        loop {
            let mut answer = String::new();
            assert_ne!(
                self.answers
                    .read_line(&mut answer)
                    .expect("the shell lives"),
                0,
                "the shell ended in: {line}"
            );
            match answer.strip_prefix("done ") {
                Some(status) => {
                    return (
                        printed.trim().to_owned(),
                        status.trim().parse().expect("a status"),
                    );
                }
                None => printed.push_str(&answer),
            }
        }
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// Opens read-write, as another process, and reads.
fn open_and_read(path: &std::path::Path) -> String {
    let output = Command::new("sh")
        .arg("-c")
        .arg("exec 3<>\"$1\" && cat <&3")
        .arg("sh")
        .arg(path)
        .output()
        .expect("sh exists");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn the_first_open_lands_on_the_second_connection() {
    let Some(redirecting) = redirecting() else {
        return;
    };
    assert_eq!(open_and_read(&redirecting.tree.file()), "second");
    assert_eq!(redirecting.opens_of_second(), 1);
    assert_eq!(redirecting.reached.load(Ordering::SeqCst), 1);
    // Later opens never reach the main connection.
    let file = File::options()
        .read(true)
        .write(true)
        .open(redirecting.tree.file())
        .expect("open");
    let mut bytes = [0; 6];
    file.read_exact_at(&mut bytes, 0).expect("read");
    assert_eq!(&bytes, b"second");
    assert_eq!(redirecting.reached.load(Ordering::SeqCst), 1);
    drop(file);
    redirecting.end();
}

#[test]
fn concurrent_first_opens_all_land_on_the_second_connection() {
    let Some(redirecting) = redirecting() else {
        return;
    };
    let path = redirecting.tree.file();
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| assert!(["second", "main"].contains(&open_and_read(&path).as_str())));
        }
    });
    assert_eq!(open_and_read(&path), "second");
    redirecting.end();
}

#[test]
fn it_propagates_through_a_bind_mount_in_a_slave_namespace() {
    let Some(redirecting) = redirecting() else {
        return;
    };
    let elsewhere = crate::common::Place::new();
    let mut shell = Shell::in_namespace("slave");
    let (_, status) = shell.run(&format!(
        "mount --bind {} {}",
        redirecting.tree.place.path().display(),
        elsewhere.path().display()
    ));
    assert_eq!(status, 0);
    assert_eq!(
        shell.run(&format!(
            "exec 3<>{}/n && cat <&3",
            elsewhere.path().display()
        )),
        ("second".to_owned(), 0)
    );
    assert_eq!(redirecting.opens_of_second(), 1);
    // Unmounting propagates too.
    drop(redirecting.second.lock().expect("not poisoned").take());
    let (mounts, _) = shell.run("exec 3<&-; cat /proc/self/mountinfo");
    assert!(
        !mounts.contains(&format!("{}/n ", elsewhere.path().display())),
        "{mounts}"
    );
    drop(shell);
    redirecting.end();
}

#[test]
fn without_propagation_the_retry_is_served_by_the_main_connection() {
    let Some(redirecting) = redirecting() else {
        return;
    };
    let mut shell = Shell::in_namespace("private");
    assert_eq!(
        shell.run(&format!(
            "exec 3<>{} && cat <&3",
            redirecting.tree.file().display()
        )),
        ("main".to_owned(), 0)
    );
    assert_eq!(
        redirecting.reached.load(Ordering::SeqCst),
        2,
        "the first OPEN and its retry"
    );
    assert_eq!(redirecting.opens_of_second(), 0);
    drop(shell);
    // Outside, the mount is there.
    assert_eq!(open_and_read(&redirecting.tree.file()), "second");
    redirecting.end();
}

#[test]
fn a_deleted_name_loses_its_mounts_in_every_namespace() {
    for delete in [true, false] {
        let Some(redirecting) = redirecting() else {
            return;
        };
        let mut shell = Shell::in_namespace("slave");
        let held = File::options()
            .read(true)
            .write(true)
            .open(redirecting.tree.file())
            .expect("open");
        let path = format!(" {} ", redirecting.tree.file().display());
        assert!(shell.run("cat /proc/self/mountinfo").0.contains(&path));
        let name = std::ffi::OsStr::new("n");
        if delete {
            redirecting
                .tree
                .connection
                .notify_delete(1, NODE, name)
                .expect("the kernel knows the name");
        } else {
            redirecting
                .tree
                .connection
                .notify_inval_entry(1, name)
                .expect("the kernel knows the name");
        }
        assert!(!shell.run("cat /proc/self/mountinfo").0.contains(&path));
        assert!(
            !std::fs::read_to_string("/proc/self/mountinfo")
                .expect("proc")
                .contains(&path)
        );
        // What is open stays open, and its close ends the second connection.
        let mut bytes = [0; 6];
        held.read_exact_at(&mut bytes, 0).expect("still served");
        drop(held);
        let second = redirecting
            .second
            .lock()
            .expect("not poisoned")
            .take()
            .expect("mounted");
        until("the second connection ends", || second.1.has_ended());
        drop(second);
        drop(shell);
        redirecting.tree.end();
    }
}
