//! One thread for the whole process that looks after the time: deadlines, graces of interrupts, and threads that are stuck in a request.
//!
//! It ticks only while there is something to look after. A serving thread tells it apart from rest with one atomic addition and one load
//! ([`wake`]); both are sequentially consistent, as is the monitor's store before its last look, so that either the thread sees it asleep or it sees
//! the thread busy.

use std::sync::Mutex;
use std::sync::OnceLock;
use std::sync::PoisonError;
use std::sync::Weak;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::thread::Thread;
use std::time::Duration;
use std::time::Instant;

use crate::shared::Shared;
use crate::workers::Set;

/// How often the monitor looks; also how long a thread may be in one request before it counts as stuck (one to two ticks).
pub(crate) const TICK: Duration = Duration::from_millis(10);
/// Ticks without any activity before the monitor sleeps.
const IDLE_TICKS: u32 = 20;

static ASLEEP: AtomicBool = AtomicBool::new(false);
static THREAD: OnceLock<Thread> = OnceLock::new();
static WATCHED: Mutex<Watched> = Mutex::new(Watched {
    connections: Vec::new(),
    sets: Vec::new(),
});

struct Watched {
    connections: Vec<Weak<Shared>>,
    sets: Vec<Weak<Set>>,
}

pub(crate) fn watch_connection(connection: Weak<Shared>) {
    WATCHED
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .connections
        .push(connection);
    start();
}

pub(crate) fn watch_set(set: Weak<Set>) {
    WATCHED
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .sets
        .push(set);
    start();
}

/// Tells the monitor that there is something to look after. Costs one load unless it sleeps.
pub(crate) fn wake() {
    if ASLEEP.load(Ordering::SeqCst)
        && ASLEEP.swap(false, Ordering::SeqCst)
        && let Some(thread) = THREAD.get()
    {
        thread.unpark();
    }
}

fn start() {
    THREAD.get_or_init(|| {
        let handle = std::thread::Builder::new().name("fuse-monitor".to_owned()).spawn(run);
        match handle {
            Ok(handle) => handle.thread().clone(),
            Err(error) => {
                // Requests are served all the same; only stuck ones are not helped. The current thread stands in as the one to wake.
                tracing::error!(%error, "no thread for the FUSE monitor: deadlines and stuck requests are not looked after");
                std::thread::current()
            }
        }
    });
}

fn run() {
    let mut idle = 0;
    loop {
        if look() {
            idle = 0;
        } else {
            idle += 1;
        }
        if idle < IDLE_TICKS {
            std::thread::park_timeout(TICK);
            continue;
        }
        ASLEEP.store(true, Ordering::SeqCst);
        if look() {
            ASLEEP.store(false, Ordering::SeqCst);
        }
        while ASLEEP.load(Ordering::SeqCst) {
            std::thread::park();
        }
        idle = 0;
    }
}

/// One look at everything; true when something is or was going on since the last.
fn look() -> bool {
    let now = Instant::now();
    let mut active = false;
    // Copies, so that nothing is called under the lock. Weak, so that an ended connection is let go.
    let (connections, sets) = {
        let mut watched = WATCHED.lock().unwrap_or_else(PoisonError::into_inner);
        watched
            .connections
            .retain(|connection| connection.strong_count() != 0);
        watched.sets.retain(|set| set.strong_count() != 0);
        (watched.connections.clone(), watched.sets.clone())
    };
    for connection in connections {
        if let Some(connection) = connection
            .upgrade()
            .filter(|connection| connection.has_timed())
        {
            active = true;
            connection.sweep(now);
        }
    }
    for set in sets {
        if let Some(set) = set.upgrade() {
            active |= set.look();
        }
    }
    active
}
