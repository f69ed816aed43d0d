//! A bound device's way to memory: the same for a software access and, since there is no
//! hardware underneath, for a physical device behind its page table.

use super::area::Held;
use super::gate::Gate;
use super::ioas::Ioas;
use crate::device::DmaSpace;
use crate::{Errno, Result};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};
use vfio_uapi::iommufd::MapFlags;

/// How long a detach waits for accesses in progress before it returns without them.
const PATIENCE: Duration = Duration::from_millis(100);

/// Which IOAS a device is attached to, if any.
#[derive(Debug, Default)]
pub(super) struct Port {
    route: RwLock<Option<Arc<Route>>>,
}

/// One attachment. Closed when it is replaced or ends.
#[derive(Debug)]
pub(super) struct Route {
    ioas: Arc<Ioas>,
    gate: Gate,
}

/// A route with an access on it.
#[derive(Debug)]
pub(super) struct Travel(Arc<Route>);

impl Drop for Travel {
    fn drop(&mut self) {
        self.0.gate.leave();
    }
}

impl Route {
    /// Waits, not for ever, until no access uses it. False if some still do: their memory does not
    /// answer, and they end when it does or when its owner dies.
    pub(super) fn drain(&self) -> bool {
        let drained = self.gate.wait_until(Instant::now() + PATIENCE);
        if !drained {
            tracing::warn!("detached while a DMA access waits for memory that does not answer");
        }
        drained
    }
}

impl Port {
    /// From now on accesses go there. Returns the former route, to be drained with no lock held.
    pub(super) fn switch(&self, ioas: Option<&Arc<Ioas>>) -> Option<Arc<Route>> {
        let new = ioas.map(|ioas| {
            Arc::new(Route {
                ioas: Arc::clone(ioas),
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
    pub(super) fn travel(&self) -> Result<Travel> {
        loop {
            let route = self.route.read().unwrap_or_else(PoisonError::into_inner);
            let route = Arc::clone(route.as_ref().ok_or(Errno::NOENT)?);
            // A closed route has been replaced already: look again.
            if route.gate.enter() {
                return Ok(Travel(route));
            }
        }
    }

    fn hold(&self, iova: u64, len: usize, need: MapFlags) -> Result<(Travel, Held)> {
        let len = u64::try_from(len).map_err(|_| Errno::OVERFLOW)?;
        // The arguments are judged before the attachment.
        dma_memory::Range::with_len(iova, len)?;
        let travel = self.travel()?;
        let held = travel.0.ioas.hold(iova, len, need)?;
        Ok((travel, held))
    }
}

impl DmaSpace for Port {
    fn read(&self, iova: u64, buf: &mut [u8]) -> Result {
        let (travel, held) = self.hold(iova, buf.len(), MapFlags::READABLE)?;
        let done = held.read(buf);
        // Areas first: who waits for the route finds them free as well.
        drop(held);
        drop(travel);
        done
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result {
        let (travel, held) = self.hold(iova, data.len(), MapFlags::WRITEABLE)?;
        let done = held.write(data);
        drop(held);
        drop(travel);
        done
    }
}
