//! What the end-to-end tests share: starting a daemon, finding the built programs, guests.

mod console;
pub mod daemon;
pub mod guest;
pub mod guest_hardware;
mod initramfs;
pub mod packages;
pub mod skip;

pub use skip::skip;
