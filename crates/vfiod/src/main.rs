//! The daemon: configuration, wiring, privileges, shutdown.

fn main() {}
