use std::fs;
use std::io::Read;
use std::io::Write;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::process::Stdio;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::time::Duration;

use rustix::fs::Mode;

use super::*;

/// Long enough for a loaded machine; only a failing test waits for it.
const DEADLINE: Duration = Duration::from_secs(20);

/// A guest's end that writes down what happens to it.
#[derive(Default)]
struct Recorder {
    seen: Mutex<Seen>,
    changed: Condvar,
}

#[derive(Default)]
struct Seen {
    received: Vec<u8>,
    /// Bytes it takes before it is full; `None` for all.
    room: Option<usize>,
    rooms: usize,
    carrier: Vec<bool>,
}

impl Recorder {
    fn with_room(room: usize) -> Arc<Self> {
        let recorder = Self::default();
        recorder.seen.lock().unwrap().room = Some(room);
        Arc::new(recorder)
    }

    fn wait(&self, what: &str, until: impl Fn(&Seen) -> bool) -> MutexGuard<'_, Seen> {
        let seen = self.seen.lock().unwrap();
        let (seen, timeout) = self
            .changed
            .wait_timeout_while(seen, DEADLINE, |seen| !until(seen))
            .unwrap();
        assert!(!timeout.timed_out(), "never: {what}");
        seen
    }

    fn reach(&self, what: &str, until: impl Fn(&Seen) -> bool) {
        drop(self.wait(what, until));
    }

    fn wait_received(&self, bytes: &[u8]) {
        let seen = self.wait("enough bytes", |seen| seen.received.len() >= bytes.len());
        assert_eq!(seen.received, bytes);
    }
}

impl Line for Recorder {
    fn receive(&self, bytes: &[u8]) -> usize {
        let mut seen = self.seen.lock().unwrap();
        let n = bytes.len().min(seen.room.unwrap_or(usize::MAX));
        seen.received.extend_from_slice(&bytes[..n]);
        seen.room = seen.room.map(|room| room - n);
        self.changed.notify_all();
        n
    }

    fn room(&self, _outlet: &Outlet) {
        self.seen.lock().unwrap().rooms += 1;
        self.changed.notify_all();
    }

    fn carrier(&self, present: bool) {
        self.seen.lock().unwrap().carrier.push(present);
        self.changed.notify_all();
    }
}

/// A directory that goes with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("mtty-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn open(spec: &str) -> Backend {
    Backend::open(&spec.parse().unwrap()).unwrap()
}

fn connect(backend: &Backend, line: &Arc<Recorder>) -> Connection {
    let line: Arc<dyn Line> = Arc::clone(line) as _;
    backend.connect(line).unwrap().unwrap()
}

fn send(outlet: &Outlet, bytes: &[u8]) {
    for byte in bytes {
        assert!(outlet.send(*byte), "there is room for {bytes:?}");
    }
}

/// Threads of this process that serve a port.
fn port_threads() -> usize {
    fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .filter(|comm| comm.trim() == "mtty-port")
        .count()
}

fn open_terminal(path: &Path) -> fs::File {
    let mut options = fs::OpenOptions::new();
    options.read(true).write(true);
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, 0o400); // O_NOCTTY
    options.open(path).unwrap()
}

fn read_exact(from: &mut impl Read, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    from.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn loopback_has_no_connection() {
    let backend = open("loopback");
    assert!(
        backend
            .connect(Arc::<Recorder>::default())
            .unwrap()
            .is_none()
    );
    assert_eq!(backend.path(), None);
}

#[test]
fn pty_carries_every_byte_both_ways() {
    let scratch = Scratch::new("pty");
    let link = scratch.path("tty");
    let backend = open(&format!("pty:{}", link.display()));
    assert_eq!(backend.path(), Some(&*link));
    assert!(fs::read_link(&link).unwrap().starts_with("/dev/pts"));
    let all: Vec<u8> = (0..=255).collect();

    // Twice: a second session of the device finds the same terminal, as it was left.
    for _ in 0..2 {
        let line = Arc::<Recorder>::default();
        let connection = connect(&backend, &line);
        line.reach("carrier", |seen| seen.carrier == [true]);
        // Users of the terminal come and go without the port noticing.
        for _ in 0..2 {
            let mut terminal = open_terminal(&link);
            send(&connection.outlet(), &all);
            assert_eq!(read_exact(&mut terminal, 256), all, "raw, without echo");
            terminal.write_all(&all).unwrap();
            line.wait_received(&all);
            line.seen.lock().unwrap().received.clear();
        }
        drop(connection);
        assert_eq!(line.seen.lock().unwrap().carrier, [true]);
    }
    drop(backend);
    assert!(!link.is_symlink(), "the link goes with the backend");
}

#[test]
fn a_stale_link_is_replaced_and_nothing_else() {
    let scratch = Scratch::new("link");
    let link = scratch.path("tty");
    let spec: BackendSpec = format!("pty:{}", link.display()).parse().unwrap();
    std::os::unix::fs::symlink("/dev/pts/not-there", &link).unwrap();
    let backend = Backend::open(&spec).unwrap();
    let error = Backend::open(&spec).unwrap_err();
    assert_eq!(error.errno(), Errno::EXIST);
    assert!(
        error.to_string().contains(link.to_str().unwrap()),
        "{error}"
    );
    assert!(link.exists(), "the failure left the first one's link alone");

    fs::remove_file(&link).unwrap();
    fs::write(&link, "precious").unwrap();
    assert_eq!(Backend::open(&spec).unwrap_err().errno(), Errno::EXIST);
    drop(backend);
    assert_eq!(fs::read_to_string(&link).unwrap(), "precious");

    let nowhere: BackendSpec = format!("pty:{}/no/tty", scratch.0.display())
        .parse()
        .unwrap();
    assert_eq!(Backend::open(&nowhere).unwrap_err().errno(), Errno::NOENT);
}

#[test]
fn unix_serves_one_client_after_the_other() {
    let scratch = Scratch::new("unix");
    let path = scratch.path("sock");
    let backend = open(&format!("unix:{}", path.display()));
    let meta = fs::metadata(&path).unwrap();
    assert!(meta.file_type().is_socket());
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);
    // A client may come before the device is opened.
    let mut first = UnixStream::connect(&path).unwrap();
    first.write_all(b"early").unwrap();
    let line = Arc::<Recorder>::default();
    let connection = connect(&backend, &line);
    let outlet = connection.outlet();
    line.wait_received(b"early");
    send(&outlet, b"hello");
    assert_eq!(read_exact(&mut first, 5), b"hello");

    // The second waits until the first has left.
    let mut second = UnixStream::connect(&path).unwrap();
    second.write_all(b"second").unwrap();
    send(&outlet, b"!");
    assert_eq!(read_exact(&mut first, 1), b"!");
    assert_eq!(line.seen.lock().unwrap().received, b"early");
    first.write_all(b",").unwrap();
    drop(first);
    line.wait_received(b"early,second");
    assert_eq!(line.seen.lock().unwrap().carrier, [true, false, true]);
    send(&outlet, b"you");
    assert_eq!(read_exact(&mut second, 3), b"you");

    // Half a close: it has said all it wants to say, and still listens.
    second.shutdown(std::net::Shutdown::Write).unwrap();
    send(&outlet, b"still");
    assert_eq!(read_exact(&mut second, 5), b"still");
    drop(second);
    line.reach("gone", |seen| seen.carrier == [true, false, true, false]);
    // Nobody is there: bytes go nowhere, and wait for nobody.
    send(&outlet, &[b'x'; 10_000]);

    let third = UnixStream::connect(&path).unwrap();
    line.reach("third", |seen| seen.carrier.len() == 5);
    drop(connection);
    // The end of the session is the end of the client's connection.
    let mut third = third;
    let mut rest = Vec::new();
    third.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"", "nothing that was sent to nobody");
    assert!(
        outlet.send(b'x'),
        "an outlet outlives its connection harmlessly"
    );
    drop(backend);
    assert!(!path.exists(), "the socket goes with the backend");
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let scratch = Scratch::new("stale");
    let path = scratch.path("sock");
    let spec: BackendSpec = format!("unix:{}", path.display()).parse().unwrap();
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let backend = Backend::open(&spec).unwrap();
    let error = Backend::open(&spec).unwrap_err();
    assert_eq!(error.errno(), Errno::ADDRINUSE);
    assert!(
        error.to_string().contains("listens there already"),
        "{error}"
    );
    // Somebody replaced the file: it is not ours to remove.
    fs::remove_file(&path).unwrap();
    fs::write(&path, "precious").unwrap();
    assert_eq!(Backend::open(&spec).unwrap_err().errno(), Errno::EXIST);
    drop(backend);
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");

    let long = format!("unix:/{}", "x".repeat(200)).parse().unwrap();
    assert_eq!(
        Backend::open(&long).unwrap_err().errno(),
        Errno::NAMETOOLONG
    );
}

#[test]
fn input_waits_for_a_uart_that_is_full() {
    let scratch = Scratch::new("held");
    let path = scratch.path("sock");
    let backend = open(&format!("unix:{}", path.display()));
    let line = Recorder::with_room(16);
    let connection = connect(&backend, &line);
    let mut client = UnixStream::connect(&path).unwrap();
    let text: Vec<u8> = (0..100_000u32).map(|n| n.to_le_bytes()[0]).collect();
    let sender = std::thread::spawn({
        let text = text.clone();
        move || client.write_all(&text).unwrap()
    });
    // A guest that makes room as it reads; the client leaves long before the end.
    let mut done = 0;
    while done < text.len() {
        let mut seen = line.wait("more", |seen| {
            seen.room == Some(0) || seen.received.len() == text.len()
        });
        done = seen.received.len();
        seen.room = Some(16);
        drop(seen);
        connection.outlet().resume();
    }
    sender.join().unwrap();
    let seen = line.wait("left", |seen| seen.carrier == [true, false]);
    assert!(seen.received == text, "everything, in order");
}

#[test]
fn a_slow_reader_slows_the_guest_and_loses_nothing() {
    let scratch = Scratch::new("slow");
    let path = scratch.path("sock");
    let backend = open(&format!("unix:{}", path.display()));
    let line = Arc::<Recorder>::default();
    let connection = connect(&backend, &line);
    let mut client = UnixStream::connect(&path).unwrap();
    line.reach("client", |seen| seen.carrier == [true]);
    let outlet = connection.outlet();
    const TOTAL: usize = 2_000_000;
    let reader = std::thread::spawn(move || {
        let mut got = Vec::new();
        let mut chunk = [0; 4096];
        while got.len() < TOTAL {
            let n = client.read(&mut chunk).unwrap();
            got.extend_from_slice(&chunk[..n]);
        }
        got
    });
    let mut refused = 0;
    for n in 0..TOTAL {
        while !outlet.send(n.to_le_bytes()[0]) {
            refused += 1;
            let rooms = line.seen.lock().unwrap().rooms;
            // `room` may have come before the lock was taken; then the next try works.
            let seen = line.seen.lock().unwrap();
            drop(
                line.changed
                    .wait_timeout_while(seen, Duration::from_millis(50), |seen| seen.rooms == rooms)
                    .unwrap(),
            );
        }
    }
    let got = reader.join().unwrap();
    assert!(
        got.iter()
            .enumerate()
            .all(|(n, b)| *b == n.to_le_bytes()[0]),
        "in order, nothing missing"
    );
    assert!(refused > 0, "the test was fast enough to fill the queue");
}

#[test]
fn a_reader_that_is_stuck_stops_the_guest_only_for_a_while() {
    let backend = open("pty").with_limits(Limits {
        queue: 64,
        stall: Duration::from_millis(50),
    });
    let line = Arc::<Recorder>::default();
    let connection = connect(&backend, &line);
    let outlet = connection.outlet();
    // Nobody reads the terminal: its buffer fills, then the queue, then a byte is refused for as
    // long as the limit says.
    let mut accepted = 0;
    let start = Instant::now();
    while accepted < 1_000_000 {
        assert!(start.elapsed() < DEADLINE, "stuck after {accepted}");
        if outlet.send(b'x') {
            accepted += 1;
        }
        // A guest that polls tries again at once, which must not renew its wait.
    }
    assert!(line.seen.lock().unwrap().rooms > 0, "it was told to go on");
    let mut terminal = open_terminal(backend.path().unwrap());
    // Reading ends it: what is sent from then on arrives again.
    let reader = std::thread::spawn(move || {
        let mut got = 0usize;
        let mut buf = [0; 4096];
        loop {
            let n = terminal.read(&mut buf).unwrap();
            got += n;
            if buf[..n].contains(&b'!') {
                return got;
            }
        }
    });
    while !reader.is_finished() {
        let _ = outlet.send(b'!');
        std::thread::yield_now();
    }
    let got = reader.join().unwrap();
    assert!(got < 1_000_000, "what did not fit was dropped");
    // And a stuck far end does not hold up the end of the session.
    drop(connection);
}

#[test]
fn files_append_and_replay() {
    let scratch = Scratch::new("file");
    let (output, input) = (scratch.path("out"), scratch.path("in"));
    let spec = format!("file:{},in={}", output.display(), input.display());
    let missing = Backend::open(&spec.parse().unwrap()).unwrap_err();
    assert_eq!(missing.errno(), Errno::NOENT);
    assert!(!output.exists(), "a failure leaves nothing behind");

    fs::write(&input, "typed\n").unwrap();
    fs::write(&output, "before\n").unwrap();
    let backend = open(&spec);
    for _ in 0..2 {
        let line = Arc::<Recorder>::default();
        let connection = connect(&backend, &line);
        line.wait_received(b"typed\n");
        // Everything sent is in the file when the session ends.
        send(&connection.outlet(), b"printed\n");
        drop(connection);
        assert_eq!(line.seen.lock().unwrap().received, b"typed\n");
    }
    assert_eq!(
        fs::read_to_string(&output).unwrap(),
        "before\nprinted\nprinted\n"
    );
    let alone = open(&format!("file:{}", scratch.path("log").display()));
    let line = Arc::<Recorder>::default();
    send(&connect(&alone, &line).outlet(), b"only output");
    assert_eq!(
        fs::read_to_string(scratch.path("log")).unwrap(),
        "only output"
    );
}

#[test]
fn a_full_disk_loses_bytes_and_stops_nobody() {
    let backend = open("file:/dev/full");
    let line = Arc::<Recorder>::default();
    let connection = connect(&backend, &line);
    let outlet = connection.outlet();
    for _ in 0..20_000 {
        while !outlet.send(b'x') {
            std::thread::yield_now();
        }
    }
}

#[test]
fn named_pipes_wait_for_nobody() {
    let scratch = Scratch::new("fifo");
    let (output, input) = (scratch.path("out"), scratch.path("in"));
    for path in [&output, &input] {
        rustix::fs::mkfifoat(rustix::fs::CWD, path, Mode::RUSR | Mode::WUSR).unwrap();
    }
    let backend = open(&format!("file:{},in={}", output.display(), input.display()));
    let line = Arc::<Recorder>::default();
    let connection = connect(&backend, &line);
    for text in [b"one", b"two"] {
        // A writer that leaves is not the end of the input.
        line.seen.lock().unwrap().received.clear();
        fs::write(&input, text).unwrap();
        line.wait_received(text);
    }
    send(&connection.outlet(), b"out");
    assert_eq!(read_exact(&mut fs::File::open(&output).unwrap(), 3), b"out");
}

/// Runs itself as the program whose standard streams are the serial line.
#[test]
fn stdio_is_a_line_too() {
    const CHILD: &str = "MTTY_PORT_STDIO_CHILD";
    if std::env::var_os(CHILD).is_some() {
        let backend = open("stdio");
        let taken = Backend::open(&BackendSpec::Stdio).unwrap_err();
        assert_eq!(taken.errno(), Errno::BUSY);
        let line = Arc::<Recorder>::default();
        let connection = connect(&backend, &line);
        line.reach("the question", |seen| seen.received.ends_with(b"?"));
        send(&connection.outlet(), b"[answer]");
        drop(connection);
        drop(backend);
        drop(open("stdio"));
        return;
    }
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "mtty::port::tests::stdio_is_a_line_too"])
        .args(["--nocapture", "--test-threads=1"])
        .env(CHILD, "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"what?").unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("[answer]"), "{text}");
}

/// Runs itself, so that other tests' threads and descriptors do not count.
#[test]
fn nothing_is_left_behind() {
    const CHILD: &str = "MTTY_PORT_LEAK_CHILD";
    if std::env::var_os(CHILD).is_none() {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "mtty::port::tests::nothing_is_left_behind"])
            .env(CHILD, "1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(status.success());
        return;
    }
    let scratch = Scratch::new("leak");
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    let dir = scratch.0.display();
    for (spec, at_rest) in [
        ("loopback".to_owned(), 0),
        (format!("pty:{dir}/tty"), 1),
        (format!("unix:{dir}/sock"), 1),
        (format!("file:{dir}/out"), 0),
        ("stdio".to_owned(), 0),
    ] {
        let backend = open(&spec);
        assert_eq!(descriptors(), before + at_rest, "{spec}, at rest");
        for _ in 0..3 {
            let connection = backend.connect(Arc::<Recorder>::default()).unwrap();
            if connection.is_some() {
                let deadline = Instant::now() + DEADLINE;
                // A thread gives itself its name after it has started.
                while port_threads() != 1 {
                    assert!(Instant::now() < deadline, "{spec}: no thread");
                    std::thread::yield_now();
                }
            }
            drop(connection);
            assert_eq!(port_threads(), 0, "{spec}: the thread is gone");
            assert_eq!(descriptors(), before + at_rest, "{spec}, closed");
        }
        drop(backend);
        assert_eq!(descriptors(), before, "{spec}, dropped");
    }
    assert_eq!(
        fs::read_dir(&scratch.0).unwrap().count(),
        1,
        "only the output file"
    );
}
