//! The command line of vfiod.

fn main() {}
