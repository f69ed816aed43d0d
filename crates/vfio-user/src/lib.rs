//! Devices over a UNIX socket: the vfio-user protocol, its server and its client.
//!
//! - [`Server`] serves any number of devices of a [`vfio_core::Core`] on listening sockets, with few
//!   threads; [`Offer`] is one device on one socket.

#![forbid(unsafe_code)]

mod server;

pub use server::{Client, ClientKind, Offer, OfferOptions, Options, Refusal, Server};
