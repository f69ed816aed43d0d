//! What a container's mappings cost: against a server that does nothing with the same arguments,
//! and the last against the first.

use std::cell::RefCell;

use anyhow::Result;

use super::Benchmark;
use super::Goal;
use super::measure::Measured;
use super::measure::Pinned;
use super::peer::Peer;
use super::peer::Role;
use super::requests::Servers;

/// Pairs of calls in one round.
const PAIRS: u32 = 4_000;
/// Mappings that a container may have.
const ENTRIES: u32 = 65_535;
/// Mappings of which the time is taken.
const TIMED: u32 = 1_000;

/// The rows of this file.
pub(super) const ROWS: [Benchmark; 2] = [
    Benchmark {
        name: "MAP_DMA + UNMAP_DMA of 2 MiB of shared memory",
        against: "a null FUSE server that copies the same arguments",
        goal: Goal::AtMost(1.25),
        known_miss: None,
        run: map_and_unmap,
    },
    Benchmark {
        name: "MAP_DMA, the last 1 000 of 65 535",
        against: "the first 1 000",
        goal: Goal::AtMost(1.1),
        known_miss: None,
        run: map_rate,
    },
];

fn map_and_unmap(rounds: u32) -> Result<Measured> {
    let _pinned = Pinned::to(0)?;
    let servers = Servers::start(Role::Null)?;
    let mut client = Peer::start(Role::Client, &[])?;
    servers.contain(&mut client)?;
    servers.open(&mut client, 0)?;
    let client = RefCell::new(client);
    let pairs = |node| {
        client
            .borrow_mut()
            .number(&format!("map-unmap {node} {PAIRS}"))
    };
    Measured::interleaved(rounds, || pairs(0), || pairs(1))
}

fn map_rate(rounds: u32) -> Result<Measured> {
    let _pinned = Pinned::to(0)?;
    let servers = Servers::start(Role::Null)?;
    let mut client = Peer::start(Role::Client, &[])?;
    servers.contain(&mut client)?;
    let client = RefCell::new(client);
    let maps = |before: u32| {
        client
            .borrow_mut()
            .number(&format!("map-after 0 {before} {TIMED}"))
    };
    Measured::interleaved(rounds, || maps(ENTRIES - TIMED), || maps(0))
}
