//! Devices over a UNIX socket: the vfio-user protocol, its server and its client.
//!
//! - [`Server`] serves any number of devices of a [`vfio_core::Core`] on listening sockets, with few
//!   threads; [`Offer`] is one device on one socket.
//! - [`client`] is the other half, for people who test servers.
//! - [`wire`] and [`receiver`] are what both are made of.
//!
//! What a session looks like, and how it ends:
//!
//! 1. A client connects. It holds nothing but a descriptor until it has said VERSION.
//! 2. VERSION opens the device ([`Device::open_direct`](vfio_core::device::Device::open_direct)): the
//!    connection is its user, with the windows the client maps as its DMA space. Who comes second is
//!    told `EBUSY`, and who reads the log is told who has it.
//! 3. Each command is answered in order, by one message, at once. Nothing waits for the client inside
//!    one; what it does not read is kept for it for a while, and then it is closed.
//! 4. The client closes its end, is closed, or the device is cut off: the driver's `close` runs, the
//!    windows go. The device keeps its state for the next client.

#![forbid(unsafe_code)]

pub mod client;
pub mod receiver;
mod server;
mod socket;
mod version;
mod windows;
pub mod wire;

pub use server::{Client, ClientKind, Offer, OfferOptions, Options, Refusal, Server};
