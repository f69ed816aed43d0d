//! What a message of a vfio-user client costs, against a server that does one receive and one send,
//! and against the server of the `vfio_user` crate.

mod client;
mod servers;

use std::cell::RefCell;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;

use super::Benchmark;
use super::Goal;
use super::measure::Measured;
use super::measure::Pinned;
use super::peer::Peer;
use super::peer::Place;
use super::peer::Role;

pub(super) use client::Client;
pub(super) use servers::Crate;
pub(super) use servers::Ours;
pub(super) use servers::Raw;

/// Messages in one round.
const CALLS: u32 = 6_000;
/// Windows that one connection has.
const WINDOWS: u32 = 1_000_000;
/// Windows mapped in one round.
const FEW: u32 = 1_000;
/// Devices that listen.
const DEVICES: u32 = 10_000;
/// What a window may cost, in bytes.
const WINDOW_BYTES: f64 = 64.0;
/// What a device that listens may cost, in bytes.
const DEVICE_BYTES: f64 = 8192.0;

const RAW: &str = "a raw socket server: one receive, one send";
const CRATE: &str = "the vfio_user crate's server";

/// The rows of this file.
pub(super) const ROWS: [Benchmark; 14] = [
    Benchmark {
        name: "vfio-user: region read of 4 bytes",
        against: RAW,
        goal: Goal::AtMost(1.10),
        known_miss: None,
        run: |rounds| against(rounds, Role::UserRaw, "read 4"),
    },
    Benchmark {
        name: "vfio-user: region write of 4 bytes",
        against: RAW,
        goal: Goal::AtMost(1.10),
        known_miss: None,
        run: |rounds| against(rounds, Role::UserRaw, "write 4"),
    },
    Benchmark {
        name: "vfio-user: region read of 4 KiB",
        against: RAW,
        goal: Goal::AtMost(1.15),
        known_miss: None,
        run: |rounds| against(rounds, Role::UserRaw, "read 4096"),
    },
    Benchmark {
        name: "vfio-user: DMA_MAP and DMA_UNMAP of 2 MiB with a descriptor",
        against: RAW,
        goal: Goal::AtMost(1.25),
        known_miss: None,
        run: |rounds| against(rounds, Role::UserRaw, "map 0"),
    },
    Benchmark {
        name: "vfio-user: DMA_MAP, the device reads 4 KiB, DMA_UNMAP",
        against: "a raw socket server that keeps the descriptor and reads with pread",
        goal: Goal::AtMost(1.15),
        known_miss: Some(
            "1.10 to 1.16: two system calls (seals, mode) make sure that the file is memory that may be written \
             and cannot make the server wait, and each of three waits has an end, which takes a timer; the raw \
             server keeps what it is given unseen and waits for ever",
        ),
        run: |rounds| against(rounds, Role::UserRaw, "touch 0"),
    },
    Benchmark {
        name: "vfio-user: region write that raises an interrupt",
        against: RAW,
        goal: Goal::AtMost(1.05),
        known_miss: Some(
            "1.03 to 1.10: the eventfd is looked at (fcntl) before it is written, since a client may have made \
             it wait, and filled it, and the wait for the next message has an end, which takes a timer; the \
             raw server writes without a look and waits for ever",
        ),
        run: |rounds| against(rounds, Role::UserRaw, "interrupt 0"),
    },
    Benchmark {
        name: "vfio-user: region read of 4 bytes, polled from another processor",
        against: "the same, not polled",
        goal: Goal::AtMost(0.8),
        known_miss: None,
        run: polled,
    },
    Benchmark {
        name: "vfio-user: the last 1 000 of 1 000 000 windows into 16 files",
        against: "the first 1 000",
        goal: Goal::AtMost(1.2),
        known_miss: None,
        run: last_windows,
    },
    Benchmark {
        name: "vfio-user: memory of a window, of 1 000 000 into 16 files",
        against: "64 bytes",
        goal: Goal::AtMost(1.0),
        known_miss: None,
        run: window_memory,
    },
    Benchmark {
        name: "vfio-user: memory of a device that listens, of 10 000 without a thread",
        against: "8 KiB",
        goal: Goal::AtMost(1.0),
        known_miss: None,
        run: listening,
    },
    Benchmark {
        name: "vfio-user: region read of 4 bytes, beside the crate",
        against: CRATE,
        goal: Goal::AtMost(1.0),
        known_miss: None,
        run: |rounds| against(rounds, Role::UserCrate, "read 4"),
    },
    Benchmark {
        name: "vfio-user: region write of 4 bytes, beside the crate",
        against: CRATE,
        goal: Goal::AtMost(1.0),
        known_miss: None,
        run: |rounds| against(rounds, Role::UserCrate, "write 4"),
    },
    Benchmark {
        name: "vfio-user: region read of 4 KiB, beside the crate",
        against: CRATE,
        goal: Goal::AtMost(1.0),
        known_miss: None,
        run: |rounds| against(rounds, Role::UserCrate, "read 4096"),
    },
    Benchmark {
        name: "vfio-user: DMA_MAP, the device reads 4 KiB, DMA_UNMAP, beside the crate",
        against: "the vfio_user crate's server with a backend that does mmap, copies, munmap",
        goal: Goal::AtMost(1.0),
        known_miss: None,
        run: |rounds| against(rounds, Role::UserCrate, "touch 0"),
    },
];

/// Our server, another one, and a client of both; all where this thread runs.
fn against(rounds: u32, other: Role, call: &str) -> Result<Measured> {
    let _pinned = Pinned::to(0)?;
    let place = Place::new()?;
    let sockets = [
        format!("{}/ours", place.path()),
        format!("{}/other", place.path()),
    ];
    // What the other one does when a window comes is part of what is compared.
    let kept = match other {
        _ if !call.starts_with("touch") => "nothing",
        Role::UserRaw => "file",
        _ => "mapping",
    };
    let _ours = Peer::start(Role::UserOurs, &[&sockets[0]])?;
    let _other = Peer::start(other, &[&sockets[1], kept])?;
    let mut client = Peer::start(Role::UserClient, &[])?;
    for socket in &sockets {
        client.ask(&format!("connect {socket}"))?;
    }
    let client = RefCell::new(client);
    let calls = |connection: u32| {
        client
            .borrow_mut()
            .number(&format!("{call} {connection} {CALLS}"))
    };
    Measured::interleaved(rounds, || calls(0), || calls(1))
}

/// Our server on a processor of its own, with a device that it polls and one that it does not, and a
/// client of one after the other: polling one slows down the other.
fn polled(rounds: u32) -> Result<Measured> {
    let place = Place::new()?;
    let sockets = [
        format!("{}/polled", place.path()),
        format!("{}/waits", place.path()),
    ];
    let mut server = {
        let _pinned = Pinned::to(1)?;
        Peer::start(Role::UserOurs, &[&sockets[1]])?
    };
    server.ask(&format!("polled {}", sockets[0]))?;
    let client = {
        let _pinned = Pinned::to(0)?;
        Peer::start(Role::UserClient, &[])?
    };
    let peers = RefCell::new((server, client));
    let calls = |socket: &str| {
        let (server, client) = &mut *peers.borrow_mut();
        client.ask(&format!("connect {socket}"))?;
        let time = client.number(&format!("read 4 0 {CALLS}"))?;
        client.ask("disconnect")?;
        server.ask("idle")?;
        Ok(time)
    };
    Measured::interleaved(rounds, || calls(&sockets[0]), || calls(&sockets[1]))
}

/// A server with two devices, and a client of both: the second has nearly all its windows.
struct Filled {
    client: Peer,
    /// Bytes that the windows take.
    bytes: f64,
    /// Go last, in this order.
    _server: Peer,
    _place: Place,
}

impl Filled {
    fn new() -> Result<Self> {
        let place = Place::new()?;
        let sockets = [
            format!("{}/few", place.path()),
            format!("{}/many", place.path()),
        ];
        let mut server = Peer::start(Role::UserOurs, &[&sockets[0], &sockets[1]])?;
        let mut client = Peer::start(Role::UserClient, &[])?;
        for socket in &sockets {
            client.ask(&format!("connect {socket}"))?;
            client.ask("files")?;
        }
        let before = server.number("memory")?;
        client.ask(&format!("fill 1 {}", WINDOWS - FEW))?;
        let bytes = server.number("memory")? - before;
        Ok(Self {
            client,
            bytes,
            _server: server,
            _place: place,
        })
    }
}

fn last_windows(rounds: u32) -> Result<Measured> {
    let _pinned = Pinned::to(0)?;
    let filled = RefCell::new(Filled::new()?);
    let calls = |connection: u32, first: u32| {
        let mut filled = filled.borrow_mut();
        let line = format!("windows {connection} {first} {FEW}");
        filled.client.number(&line)
    };
    Measured::interleaved(rounds, || calls(1, WINDOWS - FEW), || calls(0, 0))
}

fn window_memory(_rounds: u32) -> Result<Measured> {
    let filled = Filled::new()?;
    let each = filled.bytes / f64::from(WINDOWS - FEW);
    Measured::interleaved(1, || Ok(each), || Ok(WINDOW_BYTES))
}

fn listening(_rounds: u32) -> Result<Measured> {
    let place = Place::new()?;
    let mut server = Peer::start(Role::UserOurs, &[])?;
    // What the first one brings with it is not each one's.
    server.ask(&format!("listen {} 0 10", place.path()))?;
    let (memory, threads) = (server.number("memory")?, server.number("threads")?);
    server.ask(&format!("listen {} 10 {DEVICES}", place.path()))?;
    let each = (server.number("memory")? - memory) / f64::from(DEVICES);
    let more = server.number("threads")? - threads;
    ensure!(more < 1.0, "{more} threads more for {DEVICES} devices");
    // They are really there.
    let mut client = Peer::start(Role::UserClient, &[])?;
    for device in [0, DEVICES / 2, DEVICES - 1] {
        client
            .ask(&format!("connect {}/{device}", place.path()))
            .with_context(|| format!("device {device}"))?;
    }
    Measured::interleaved(1, || Ok(each), || Ok(DEVICE_BYTES))
}
