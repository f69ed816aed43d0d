//! What the tests need from Debian: packages of the machine's own release, installed,
//! and a private prefix that leaves the machine as it is.

mod apt;
pub(crate) mod host;
pub(crate) mod private;
mod sources;
mod trixie;
