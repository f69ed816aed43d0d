//! The devices: one module each.

pub mod mdpy;
pub mod mtty;
pub mod pci_config;
