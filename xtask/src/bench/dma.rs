//! What a device's access to its client's memory costs, against the copy alone.

use std::cell::RefCell;

use anyhow::Context;
use anyhow::Result;

use super::Benchmark;
use super::Goal;
use super::measure::Measured;
use super::measure::Pinned;
use super::peer::Peer;
use super::peer::Role;
use super::requests::Servers;

/// Bytes of one access.
const LENGTH: u32 = 64 << 10;
/// Bytes that the accesses walk through.
const SPAN: u32 = 64 << 20;
/// Accesses in one round: twice through.
const COUNT: u32 = 2 * (SPAN / LENGTH);

/// The rows of this file.
pub(super) const ROWS: [Benchmark; 2] = [
    Benchmark {
        name: "DMA of 64 KiB, shared client memory",
        against: "memcpy from a mapping of the same",
        goal: Goal::AtMost(1.05),
        known_miss: None,
        run: |rounds| dma(rounds, "shared"),
    },
    Benchmark {
        name: "DMA of 64 KiB, private client memory",
        against: "process_vm_readv of the same",
        goal: Goal::AtMost(1.05),
        known_miss: Some(
            "private memory is read through /proc/PID/mem, which belongs to one address space for \
             ever; process_vm_readv goes by a number, behind which another program may be after an \
             exec, and saves a copy of each page inside the kernel. On top comes one look at the \
             mapping (PROCMAP_QUERY) for each access",
        ),
        run: |rounds| dma(rounds, "private"),
    },
];

fn dma(rounds: u32, kind: &str) -> Result<Measured> {
    let _pinned = Pinned::to(0)?;
    let servers = Servers::start(Role::Null)?;
    let mut client = Peer::start(Role::Client, &[])?;
    servers.bind(&mut client, 0)?;
    let answer = client.ask(&format!("map {kind} {SPAN}"))?;
    let mut words = answer.split(' ');
    let mut word = || words.next().context("a short answer");
    let (iova, address, descriptor) = (word()?, word()?, word()?);
    let pid = client.pid();
    let walk = format!("{COUNT} {LENGTH} {SPAN}");
    let base = match kind {
        "shared" => format!("memcpy {walk} {pid} {descriptor}"),
        _ => format!("process-vm {walk} {pid} {address}"),
    };
    let ours = format!("dma {walk} {iova}");
    let server = RefCell::new(servers);
    let number = |line: &str| server.borrow_mut().ours.number(line);
    Measured::interleaved(rounds, || number(&ours), || number(&base))
}
