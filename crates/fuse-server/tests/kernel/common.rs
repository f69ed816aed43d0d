//! A small file system with one file `n`, and places to mount it.

use std::ffi::OsStr;
use std::fs::File;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use fuse_server::Attr;
use fuse_server::Config;
use fuse_server::Connection;
use fuse_server::Entry;
use fuse_server::Handler;
use fuse_server::Mount;
use fuse_server::MountOptions;
use fuse_server::OpenFlags;
use fuse_server::Opened;
use fuse_server::Operation;
use fuse_server::Policy;
use fuse_server::ReplyData;
use fuse_server::Request;
use fuse_server::Root;
use fuse_server::Workers;
use rustix::io::Errno;

/// How long a test waits for what must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// The node number of `n` on a directory mount.
pub(crate) const NODE: u64 = 2;

/// Handles a request, or gives it back for the ordinary answer.
pub(crate) type Hook = Box<dyn for<'a> Fn(Request<'a>) -> Option<Request<'a>> + Send + Sync>;

/// The hook that wants nothing.
pub(crate) fn pass(request: Request<'_>) -> Option<Request<'_>> {
    Some(request)
}

/// One directory with one file, or one file alone.
pub(crate) struct Files {
    /// What the root is.
    pub(crate) root: Root,
    /// The contents of the file.
    pub(crate) bytes: Mutex<Vec<u8>>,
    /// OPENs answered.
    pub(crate) opens: AtomicU64,
    /// RELEASEs seen.
    pub(crate) releases: AtomicU64,
    hook: Hook,
}

impl Files {
    fn attr(&self, node: u64) -> Attr {
        if node == 1 && self.root == Root::Directory {
            Attr::new(1, 0o40755, 0)
        } else {
            Attr::new(NODE, 0o100666, 4096)
        }
    }
}

impl Handler for Files {
    fn handle(&self, request: Request<'_>) {
        let Some(request) = (self.hook)(request) else {
            return;
        };
        let attr = self.attr(request.node);
        let _ = match request.op {
            Operation::Lookup { name, reply } if name == OsStr::new("n") && request.node == 1 => {
                reply.entry(&Entry {
                    node: NODE,
                    generation: 0,
                    ttl: Duration::from_secs(60),
                    attr: self.attr(NODE),
                })
            }
            Operation::Getattr { reply, .. } => reply.attr(&attr),
            Operation::Setattr { reply, .. } => reply.attr(&attr),
            Operation::Open { reply, .. } => {
                self.opens.fetch_add(1, Ordering::SeqCst);
                reply.opened(&Opened {
                    fh: 7,
                    flags: OpenFlags::DIRECT_IO | OpenFlags::NOFLUSH,
                    backing: None,
                })
            }
            Operation::Opendir { reply, .. } => reply.opened(&Opened::default()),
            Operation::Readdir {
                offset, mut reply, ..
            } => {
                if offset == 0 {
                    assert!(reply.add(NODE, 1, rustix::fs::FileType::RegularFile, "n"));
                }
                reply.done()
            }
            Operation::Readdirplus {
                offset, mut reply, ..
            } => {
                if offset == 0 {
                    assert!(reply.add(
                        1,
                        "n",
                        &Entry {
                            node: NODE,
                            generation: 0,
                            ttl: Duration::ZERO,
                            attr: self.attr(NODE)
                        }
                    ));
                }
                reply.done()
            }
            Operation::Read {
                offset,
                size,
                reply,
                ..
            } => {
                let bytes = self.bytes.lock().expect("no panic under the lock");
                let rest = bytes.get(offset as usize..).unwrap_or_default();
                reply.data(&rest[..rest.len().min(size as usize)])
            }
            Operation::Write {
                offset,
                data,
                reply,
                ..
            } => {
                let mut bytes = self.bytes.lock().expect("no panic under the lock");
                let end = offset as usize + data.len();
                if bytes.len() < end {
                    bytes.resize(end, 0);
                }
                bytes[offset as usize..end].copy_from_slice(data);
                reply.written(data.len() as u32)
            }
            Operation::Release { reply, .. } => {
                self.releases.fetch_add(1, Ordering::SeqCst);
                reply.ok()
            }
            Operation::Releasedir { reply, .. } => reply.ok(),
            Operation::Forget(_) => return,
            other => other.error(Errno::NOSYS),
        };
    }
}

/// A directory that is removed at the end.
pub(crate) struct Place(PathBuf);

impl Place {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::SeqCst);
        let path = std::env::temp_dir().join(format!("fuse-server-{}-{count}", std::process::id()));
        std::fs::create_dir(&path).expect("a directory to mount on");
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0).or_else(|_| std::fs::remove_file(&self.0));
    }
}

/// A served mount.
pub(crate) struct Tree {
    pub(crate) files: Arc<Files>,
    pub(crate) connection: Connection,
    pub(crate) workers: Workers,
    pub(crate) mount: Mount,
    pub(crate) place: Place,
}

/// Says loudly why a test cannot run here; where CI promises FUSE, that is a failure.
pub(crate) fn able() -> bool {
    let why = match MountOptions::default().create() {
        Ok(_) => return true,
        Err(errno) => errno,
    };
    vfiod_tests::skip(&format!("no FUSE mount can be made here: {why}"));
    assert!(
        std::env::var_os("CI").is_none() || !Path::new("/dev/fuse").exists(),
        "CI has /dev/fuse, so the mount must work: {why}"
    );
    false
}

impl Tree {
    pub(crate) fn mount() -> Option<Self> {
        Self::with(Root::Directory, Box::new(pass))
    }

    pub(crate) fn hooked(hook: Hook) -> Option<Self> {
        Self::with(Root::Directory, hook)
    }

    pub(crate) fn with(root: Root, hook: Hook) -> Option<Self> {
        if !able() {
            return None;
        }
        let place = Place::new();
        if root == Root::File {
            std::fs::remove_dir(place.path()).expect("empty");
            std::fs::write(place.path(), b"under").expect("a file to mount on");
        }
        let options = MountOptions {
            root,
            shared: true,
            ..MountOptions::default()
        };
        let (files, connection, workers, mount) = serve(&options, place.path(), hook);
        Some(Self {
            files,
            connection,
            workers,
            mount,
            place,
        })
    }

    /// The path of the file.
    pub(crate) fn file(&self) -> PathBuf {
        match self.files.root {
            Root::Directory => self.place.path().join("n"),
            Root::File => self.place.path().to_owned(),
        }
    }

    /// Unmounts, and checks that the connection ends by itself with nothing left over.
    pub(crate) fn end(self) {
        self.mount.unmount().expect("unmount");
        assert!(
            self.workers.wait(PATIENCE),
            "the threads end with the connection"
        );
        assert!(self.connection.has_ended());
        assert_eq!(self.connection.in_flight(), 0);
    }
}

/// Mounts and serves.
pub(crate) fn serve(
    options: &MountOptions,
    path: &Path,
    hook: Hook,
) -> (Arc<Files>, Connection, Workers, Mount) {
    let (fd, detached) = options.create().expect("make the file system");
    let connection = Connection::new(fd, &Config::default()).expect("INIT");
    let files = Arc::new(Files {
        root: options.root,
        bytes: Mutex::default(),
        opens: AtomicU64::new(0),
        releases: AtomicU64::new(0),
        hook,
    });
    let workers =
        Workers::start(connection.clone(), files.clone(), Policy::default()).expect("threads");
    let mount = detached.attach(path).expect("attach");
    (files, connection, workers, mount)
}

/// Waits until `condition` holds.
pub(crate) fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited too long until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The tree's file, for reading and writing.
pub(crate) fn open(tree: &Tree) -> File {
    File::options()
        .read(true)
        .write(true)
        .open(tree.file())
        .expect("open")
}

/// Hooks READ at offset `at`: `handle` gets the reply.
pub(crate) fn on_read(at: u64, handle: impl Fn(ReplyData) + Send + Sync + 'static) -> Hook {
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
