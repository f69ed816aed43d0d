//! The devices: one module each.

pub mod mtty;
pub mod pci_config;
