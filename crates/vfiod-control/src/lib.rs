//! The control socket of vfiod: what is said over it, and how.
//!
//! A client connects to the UNIX stream socket (`/run/vfiod/vfiod.sock`), writes one [`Request`]
//! as a JSON object on a line of its own, and reads [`Reply`] lines. Most requests get exactly one
//! reply; [`Call::Unbind`] and the like send [`Answer::Progress`] lines before it; the streams
//! ([`Call::Events`], [`Call::Uevents`]) go on until the client closes the connection. Requests on
//! one connection are answered in order.
//!
//! The types that describe devices ([`view`]) are also what `vfioctl --json` prints for a kernel's
//! own `/sys`, so a reader needs one schema for both.

#![forbid(unsafe_code)]

pub mod client;
pub mod message;
pub mod spec;
pub mod uevent;
pub mod view;
pub mod wire;

pub use client::{Client, ConnectError};
pub use message::{Answer, Call, End, Event, Failure, FailureKind, Reply, Request};
pub use message::{PROTOCOL, UnregisterPolicy};
pub use spec::Spec;
