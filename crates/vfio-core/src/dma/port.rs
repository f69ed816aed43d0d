//! A bound device's way to memory: the same for a software access and, since there is no
//! hardware underneath, for a physical device behind its page table.

use super::area::Held;
use super::gate::Gate;
use super::{PATIENCE, Prot};
use crate::device::DmaSpace;
use crate::{Errno, Result};
use std::fmt::Debug;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

/// An address space, as a device sees it: an IOAS, or a container.
pub(crate) trait Space: Debug + Send + Sync {
    /// Holds memory for an access: `need` is [`Prot::READ`] or [`Prot::WRITE`]. The errnos are
    /// the device's to see.
    fn hold(&self, iova: u64, len: u64, need: Prot) -> Result<Held>;

    /// A write has ended, well or not; the memory is still held.
    fn written(&self, _iova: u64, _len: u64) {}
}

/// Which address space a device is attached to, if any.
#[derive(Debug)]
pub(crate) struct Port {
    route: RwLock<Option<Arc<Route>>>,
    /// What an access gets while there is none.
    detached: Errno,
}

/// One attachment. Closed when it is replaced or ends.
#[derive(Debug)]
pub(crate) struct Route {
    space: Arc<dyn Space>,
    gate: Gate,
}

/// A route with an access on it.
#[derive(Debug)]
pub(crate) struct Travel(Arc<Route>);

impl Drop for Travel {
    fn drop(&mut self) {
        self.0.gate.leave();
    }
}

impl Route {
    /// Waits, not for ever, until no access uses it. False if some still do: their memory does not
    /// answer, and they end when it does or when its owner dies.
    pub(crate) fn drain(&self) -> bool {
        let drained = self.gate.wait_until(Instant::now() + PATIENCE);
        if !drained {
            tracing::warn!("detached while a DMA access waits for memory that does not answer");
        }
        drained
    }
}

impl Port {
    /// Leads nowhere yet. `detached` is what an access gets then.
    pub(crate) fn new(detached: Errno) -> Port {
        Port {
            route: RwLock::new(None),
            detached,
        }
    }

    /// From now on accesses go there. Returns the former route, to be drained with no lock held.
    pub(crate) fn switch(&self, space: Option<Arc<dyn Space>>) -> Option<Arc<Route>> {
        let new = space.map(|space| {
            Arc::new(Route {
                space,
                gate: Gate::default(),
            })
        });
        let mut route = self.route.write().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *route, new);
        drop(route);
        if let Some(old) = &old {
            old.gate.close();
        }
        old
    }

    /// The way an access takes: while it is held, whoever detaches waits.
    pub(crate) fn travel(&self) -> Result<Travel> {
        loop {
            let route = self.route.read().unwrap_or_else(PoisonError::into_inner);
            let route = Arc::clone(route.as_ref().ok_or(self.detached)?);
            // A closed route has been replaced already: look again.
            if route.gate.enter() {
                return Ok(Travel(route));
            }
        }
    }

    fn hold(&self, iova: u64, len: usize, need: Prot) -> Result<(Travel, Held)> {
        let len = u64::try_from(len).map_err(|_| Errno::OVERFLOW)?;
        // The arguments are judged before the attachment.
        dma_memory::Range::with_len(iova, len)?;
        let travel = self.travel()?;
        let held = travel.0.space.hold(iova, len, need)?;
        Ok((travel, held))
    }
}

impl DmaSpace for Port {
    fn read(&self, iova: u64, buf: &mut [u8]) -> Result {
        let (travel, held) = self.hold(iova, buf.len(), Prot::READ)?;
        let done = held.read(buf);
        // Areas first: who waits for the route finds them free as well.
        drop(held);
        drop(travel);
        done
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result {
        let (travel, held) = self.hold(iova, data.len(), Prot::WRITE)?;
        let done = held.write(data);
        travel.0.space.written(iova, data.len() as u64);
        drop(held);
        drop(travel);
        done
    }
}
