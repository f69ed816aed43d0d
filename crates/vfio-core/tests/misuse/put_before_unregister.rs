//! Unregister touches the object, so a put before it was a use after free: the registration owns
//! its reference, and giving it away leaves nothing to unregister.
use vfio_core::device::Registration;

fn put_first(registration: Registration) {
    drop(registration);
    registration.unregister().wait();
}

fn main() {}
