//! One registration, one owner.
use vfio_core::device::Registration;

fn two(registration: Registration) -> (Registration, Registration) {
    let other: Registration = registration.clone();
    (registration, other)
}

fn main() {}
