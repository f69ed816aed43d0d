//! Clients that mean harm, or know no better: other processes with system calls of their own, against
//! nodes that are really mounted. Every test runs in a process of its own, which is the daemon:
//! so descriptors, threads and memory can be counted, and a hang is a failure.
#![allow(
    unreachable_pub,
    missing_debug_implementations,
    clippy::allow_attributes,
    reason = "one program in several files"
)]

mod announced;
mod client;
#[path = "../common/mod.rs"]
mod common;
mod context;
mod dma;
mod eventfd;
mod group;
mod group_life;
mod kill;
mod mapping;
mod order;
mod scale;
mod scene;
mod session;
mod silent;
mod uapi;

/// Not a test: the clients of the others.
#[test]
fn client() {
    client::obey();
}
