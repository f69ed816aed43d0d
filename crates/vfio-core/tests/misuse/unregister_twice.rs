//! Unregister consumes the registration.
use vfio_core::device::Registration;

fn twice(registration: Registration) {
    registration.unregister().wait();
    registration.unregister().wait();
}

fn main() {}
