//! The devices: one module each.

pub mod mtty;
