//! The kernel's sample serial card (`samples/vfio-mdev/mtty.c`), made usable: a PCI card
//! 4348:3253 with one or two 16550A ports, each connected to a pty, a socket, a file, the
//! standard streams, or to itself.

pub mod port;
pub mod spec;
pub mod uart;
