//! What happens to the users is the caller's choice; not choosing is an error here.
#![deny(unused_must_use)]
use vfio_core::device::Registration;

fn forget(registration: Registration) {
    registration.unregister();
}

fn main() {}
