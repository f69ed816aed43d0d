//! The server: devices of a core, each offered on a socket.

mod connection;
mod feature;
mod hub;
mod irqs;
mod link;
mod offer;
mod session;

pub use offer::{Client, ClientKind, Offer, OfferOptions, Refusal};

use hub::Hub;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use vfio_core::device::Device;

/// What can be chosen about a server.
#[derive(Clone, Debug)]
pub struct Options {
    /// Most threads at once. A connection that is busy has one; at rest none has.
    pub threads: usize,
    /// Most DMA windows of one connection. 65 535 are announced, since QEMU takes no more for an
    /// answer; a client that maps more is served up to here, then gets `ENOSPC`.
    pub windows: usize,
    /// Most different files behind the windows of one connection: each costs a descriptor and a
    /// mapping. One more is `EMFILE`.
    pub files: usize,
    /// Most connections that are polled at once, of those whose offer asks for it
    /// ([`OfferOptions::poll`]); further ones are served as if it did not. By default one less than
    /// the processors this process may use: whoever polls must not take the last one.
    pub pollers: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            threads: 512,
            windows: 1_000_000,
            files: 1024,
            pollers: std::thread::available_parallelism().map_or(0, |most| most.get() - 1),
        }
    }
}

/// Serves any number of devices and connections with few threads: one per process is enough.
/// Dropping it ends all that it serves.
#[derive(Debug)]
pub struct Server(Arc<Hub>);

impl Server {
    /// Starts one that serves nothing yet.
    ///
    /// # Errors
    /// No descriptor or thread is to be had.
    pub fn start(options: Options) -> io::Result<Server> {
        Hub::start(options).map(Server)
    }

    /// Serves `device` on this listening socket until the returned value is dropped.
    ///
    /// One client at a time: who comes second is refused at once, with the reason in the log and in
    /// [`Offer::refused`]. The socket's file stays: removing it is for whoever made it.
    ///
    /// # Errors
    /// The descriptor cannot be watched (`ENOMEM`, `ENOSPC`).
    pub fn offer(
        &self,
        device: &Device,
        listener: UnixListener,
        options: OfferOptions,
    ) -> io::Result<Offer> {
        Offer::new(&self.0, device, Some(listener), None, options)
    }

    /// Serves `device` on one socket that is connected already (`--fd`), until the client closes it
    /// or the returned value is dropped.
    ///
    /// # Errors
    /// As [`offer`](Server::offer).
    pub fn serve(
        &self,
        device: &Device,
        stream: UnixStream,
        options: OfferOptions,
    ) -> io::Result<Offer> {
        Offer::new(&self.0, device, None, Some(stream), options)
    }

    /// How many connections are polled at this moment: each keeps a processor busy.
    pub fn polled(&self) -> usize {
        self.0.polled()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.0.stop();
    }
}
