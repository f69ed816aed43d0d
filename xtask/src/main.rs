//! What people who work on vfiod run: tests with their real clients, benchmarks, checks.

fn main() {}
