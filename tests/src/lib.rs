//! What the end-to-end tests share: starting a daemon, finding the built programs, guests.

pub mod card;
mod console;
pub mod daemon;
pub mod guest;
pub mod guest_hardware;
pub mod huge_pages;
mod initramfs;
pub mod inside;
pub mod packages;
pub mod programs;
pub mod skip;

pub use huge_pages::HugePages;
pub use skip::skip;
