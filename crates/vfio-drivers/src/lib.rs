//! The devices: one module each.
