//! Interrupts of a PCI function: INTx, MSI, MSI-X, ERR and REQ, as
//! `drivers/vfio/pci/vfio_pci_intrs.c` keeps them.
//!
//! A driver keeps a [`PciIrqs`] in its session, hands it every SET_IRQS request, tells it the
//! level of its INTx line and fires its MSI vectors. One type of INTx, MSI, MSI-X is enabled at a
//! time; switching needs an explicit disable.

use super::{Action, Data, SetIrqs, Trigger};
use crate::device::RequestChannel;
use crate::{Errno, Result};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use vfio_uapi::pci::irq;

/// How many interrupts a function has of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// It has an interrupt pin.
    pub intx: bool,
    /// MSI vectors advertised.
    pub msi: u32,
    /// Entries of the MSI-X table.
    pub msix: u32,
}

/// The interrupts of one open device.
pub struct PciIrqs {
    counts: Counts,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    on: Option<Kind>,
    intx: Intx,
    /// Of the enabled one of MSI and MSI-X.
    vectors: Vec<Option<Trigger>>,
    err: Option<Trigger>,
    req: Option<Trigger>,
}

#[derive(Default)]
struct Intx {
    /// What the device says: its line is a level.
    asserted: bool,
    masked: bool,
    trigger: Option<Trigger>,
    unmask: Option<Unmask>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Intx,
    Msi,
    Msix,
}

/// What to do when the lock is released.
#[derive(Default)]
struct After {
    signal: Vec<Trigger>,
    drop: Vec<Unmask>,
}

impl fmt::Debug for PciIrqs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = lock(&self.state);
        f.debug_struct("PciIrqs")
            .field("counts", &self.counts)
            .field("on", &state.on)
            .field("asserted", &state.intx.asserted)
            .field("masked", &state.intx.masked)
            .finish_non_exhaustive()
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl After {
    fn run(self) {
        for trigger in self.signal {
            trigger.signal();
        }
        drop(self.drop);
    }
}

impl PciIrqs {
    /// Nothing enabled.
    pub fn new(counts: Counts) -> PciIrqs {
        PciIrqs {
            counts,
            state: Arc::default(),
        }
    }

    /// A SET_IRQS request. The positive answer says how many vectors there are when more were
    /// asked for (nothing is enabled then).
    pub fn set(&self, request: SetIrqs<'_>) -> Result<u32> {
        match request.index {
            irq::INTX => self.set_intx(request).map(|()| 0),
            irq::MSI => self.set_vectors(Kind::Msi, request),
            irq::MSIX => self.set_vectors(Kind::Msix, request),
            irq::ERR => self.set_single(request, |state| &mut state.err).map(|()| 0),
            irq::REQ => self.set_single(request, |state| &mut state.req).map(|()| 0),
            _ => Err(Errno::NOTTY),
        }
    }

    fn set_intx(&self, request: SetIrqs<'_>) -> Result {
        match request.action {
            Action::Trigger => self.trigger_intx(request),
            action => self.mask_intx(action == Action::Mask, request),
        }
    }

    /// The level of the device's INTx line. A rise fires unless masked, and masks (AUTOMASKED):
    /// the next one comes after an unmask, at once if the line is still up.
    pub fn set_level(&self, asserted: bool) {
        let mut after = After::default();
        {
            let mut state = lock(&self.state);
            state.intx.asserted = asserted;
            fire_level(&mut state, &mut after);
        }
        after.run();
    }

    /// Fires an MSI or MSI-X vector: lost when that is not enabled or has no eventfd, as a
    /// masked message is the guest's business.
    pub fn fire(&self, vector: u32) {
        let trigger = {
            let state = lock(&self.state);
            match state.on {
                Some(Kind::Msi | Kind::Msix) => {
                    state.vectors.get(vector as usize).and_then(Clone::clone)
                }
                _ => None,
            }
        };
        if let Some(trigger) = trigger {
            trigger.signal();
        }
    }

    /// True when MSI or MSI-X is enabled, so the INTx line has no say.
    pub fn uses_messages(&self) -> bool {
        matches!(lock(&self.state).on, Some(Kind::Msi | Kind::Msix))
    }

    /// `ops->request` for a PCI function: raises REQ if the user took it.
    pub fn request(&self) -> RequestChannel {
        let req = lock(&self.state).req.clone();
        match req {
            Some(trigger) => {
                trigger.signal();
                RequestChannel::Signalled
            }
            None => RequestChannel::None,
        }
    }

    /// Raises ERR if the user took it.
    pub fn error(&self) {
        let err = lock(&self.state).err.clone();
        if let Some(trigger) = err {
            trigger.signal();
        }
    }

    fn trigger_intx(&self, request: SetIrqs<'_>) -> Result {
        let on = lock(&self.state).on;
        let mut after = After::default();
        match request.data {
            Data::None if request.count == 0 => {
                let mut state = lock(&self.state);
                if state.on != Some(Kind::Intx) {
                    return Err(Errno::INVAL);
                }
                state.on = None;
                state.intx.trigger = None;
                state.intx.masked = false;
                after.drop.extend(state.intx.unmask.take());
            }
            Data::None | Data::Bool(_) => {
                if on != Some(Kind::Intx) || request.count != 1 {
                    return Err(Errno::INVAL);
                }
                if !matches!(request.data, Data::Bool([0, ..])) {
                    after.signal.extend(lock(&self.state).intx.trigger.clone());
                }
            }
            Data::Eventfd(eventfds) => {
                if request.count != 1 {
                    return Err(Errno::INVAL);
                }
                if !self.counts.intx {
                    return Err(Errno::NODEV);
                }
                if on.is_some_and(|on| on != Kind::Intx) {
                    return Err(Errno::INVAL);
                }
                // A bad descriptor leaves an enabled INTx with its old eventfd.
                let trigger = eventfds.eventfd(0)?;
                let mut state = lock(&self.state);
                if state.on.is_some_and(|on| on != Kind::Intx) {
                    return Err(Errno::INVAL);
                }
                if state.on.is_none() {
                    state.on = Some(Kind::Intx);
                    state.intx.masked = false;
                }
                state.intx.trigger = trigger;
                fire_level(&mut state, &mut after);
            }
        }
        after.run();
        Ok(())
    }

    fn mask_intx(&self, mask: bool, request: SetIrqs<'_>) -> Result {
        if lock(&self.state).on != Some(Kind::Intx) || request.start != 0 || request.count != 1 {
            return Err(Errno::INVAL);
        }
        let mut after = After::default();
        match request.data {
            Data::Bool([0, ..]) => {}
            Data::None | Data::Bool(_) => {
                let mut state = lock(&self.state);
                state.intx.masked = mask;
                fire_level(&mut state, &mut after);
            }
            Data::Eventfd(_) if mask => return Err(Errno::NOTTY),
            Data::Eventfd(eventfds) => {
                let fd = eventfds.eventfd(0)?;
                let mut state = lock(&self.state);
                match fd {
                    None => after.drop.extend(state.intx.unmask.take()),
                    Some(fd) if state.intx.unmask.as_ref().is_some_and(|one| one.is_by(&fd)) => {
                        return Err(Errno::BUSY);
                    }
                    // The kernel's is gone when its last user closes it, ours is not: QEMU with KVM
                    // closes one and brings the next.
                    Some(fd) => {
                        let unmask = Unmask::start(fd, &self.state)?;
                        after.drop.extend(state.intx.unmask.replace(unmask));
                    }
                }
            }
        }
        after.run();
        Ok(())
    }

    fn set_vectors(&self, kind: Kind, request: SetIrqs<'_>) -> Result<u32> {
        if request.action != Action::Trigger {
            return Err(Errno::NOTTY);
        }
        let (start, end) = (
            request.start as usize,
            (request.start + request.count) as usize,
        );
        let most = if kind == Kind::Msi {
            self.counts.msi
        } else {
            self.counts.msix
        };
        let mut after = After::default();
        match request.data {
            Data::None if request.count == 0 => {
                let mut state = lock(&self.state);
                if state.on != Some(kind) {
                    return Err(Errno::INVAL);
                }
                state.on = None;
                state.vectors.clear();
                // The line may have been up all along.
                fire_level(&mut state, &mut after);
            }
            Data::None | Data::Bool(_) => {
                let state = lock(&self.state);
                if state.on != Some(kind) || end > state.vectors.len() {
                    return Err(Errno::INVAL);
                }
                let chosen = |n: usize| match request.data {
                    Data::Bool(bytes) => bytes.get(n).is_some_and(|byte| *byte != 0),
                    _ => true,
                };
                let block = state.vectors[start..end].iter().enumerate();
                let block = block.filter(|(n, _)| chosen(*n));
                after
                    .signal
                    .extend(block.filter_map(|(_, trigger)| trigger.clone()));
            }
            Data::Eventfd(eventfds) => {
                if lock(&self.state).on.is_some_and(|on| on != kind) {
                    return Err(Errno::INVAL);
                }
                // Looked up before the lock: a descriptor table may be slow to answer.
                let looked: Result<Vec<Option<Trigger>>> = (0..request.count as usize)
                    .map(|n| eventfds.eventfd(n))
                    .collect();
                let mut state = lock(&self.state);
                if state.on.is_some_and(|on| on != kind) {
                    return Err(Errno::INVAL);
                }
                let was_on = state.on.is_some();
                if !was_on {
                    if end == 0 {
                        return Err(Errno::RANGE);
                    }
                    if end > most as usize {
                        return Ok(most);
                    }
                    state.on = Some(kind);
                    state.vectors = vec![None; end];
                } else if end > state.vectors.len() {
                    // MSI-X grows; MSI is all or nothing.
                    if kind == Kind::Msi || end > most as usize {
                        return Err(Errno::INVAL);
                    }
                    state.vectors.resize(end, None);
                }
                match looked {
                    Ok(triggers) => state.vectors[start..end].clone_from_slice(&triggers),
                    Err(errno) => {
                        state.vectors[start..end].fill(None);
                        if !was_on {
                            state.on = None;
                            state.vectors.clear();
                        }
                        return Err(errno);
                    }
                }
            }
        }
        after.run();
        Ok(0)
    }

    fn set_single(
        &self,
        request: SetIrqs<'_>,
        slot: impl Fn(&mut State) -> &mut Option<Trigger>,
    ) -> Result {
        if request.action != Action::Trigger {
            return Err(Errno::NOTTY);
        }
        if request.start != 0 || request.count > 1 {
            return Err(Errno::INVAL);
        }
        match request.data {
            Data::None => {
                let mut state = lock(&self.state);
                let slot = slot(&mut state);
                let trigger = slot.clone().ok_or(Errno::INVAL)?;
                if request.count == 0 {
                    *slot = None;
                    return Ok(());
                }
                drop(state);
                trigger.signal();
            }
            Data::Bool(bytes) => {
                let byte = bytes.first().ok_or(Errno::INVAL)?;
                let trigger = slot(&mut lock(&self.state)).clone();
                if let (Some(trigger), true) = (trigger, *byte != 0) {
                    trigger.signal();
                }
            }
            Data::Eventfd(eventfds) => {
                if request.count == 0 || eventfds.is_invalid(0) {
                    return Err(Errno::INVAL);
                }
                let trigger = eventfds.eventfd(0)?;
                *slot(&mut lock(&self.state)) = trigger;
            }
        }
        Ok(())
    }
}

/// Fires INTx if its line is up and nothing holds it back.
fn fire_level(state: &mut State, after: &mut After) {
    if state.on == Some(Kind::Intx) && state.intx.asserted && !state.intx.masked {
        state.intx.masked = true;
        after.signal.extend(state.intx.trigger.clone());
    }
}

/// An eventfd as input: each signal unmasks INTx (the kernel's `virqfd`). Dropping it stops and
/// joins its thread.
struct Unmask {
    input: Trigger,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Unmask {
    /// Whether it is this eventfd that unmasks.
    fn is_by(&self, input: &Trigger) -> bool {
        client_process::is_same_eventfd(self.input.fd(), input.fd())
    }

    fn start(input: Trigger, state: &Arc<Mutex<State>>) -> Result<Unmask> {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let stopped = Arc::clone(&stop);
        let state = Arc::downgrade(state);
        let kept = input.clone();
        let thread = std::thread::Builder::new()
            .name("vfio-unmask".into())
            .spawn(move || {
                loop {
                    let mut fds = [
                        PollFd::new(input.fd(), PollFlags::IN),
                        PollFd::new(&*stopped, PollFlags::IN),
                    ];
                    match poll(&mut fds, None) {
                        Err(Errno::INTR) => continue,
                        Err(_) => return,
                        Ok(_) => {}
                    }
                    if !fds[1].revents().is_empty() {
                        return;
                    }
                    // Another reader of the client's may have been quicker: then there is
                    // nothing to consume, and a plain read would wait beyond the stop.
                    let mut count = [0; 8];
                    let mut into = [std::io::IoSliceMut::new(&mut count)];
                    let flags = rustix::io::ReadWriteFlags::NOWAIT;
                    if rustix::io::preadv2(input.fd(), &mut into, u64::MAX, flags).is_err() {
                        continue;
                    }
                    let Some(state) = state.upgrade() else { return };
                    let mut after = After::default();
                    {
                        let mut state = lock(&state);
                        state.intx.masked = false;
                        fire_level(&mut state, &mut after);
                    }
                    after.run();
                }
            })
            .map_err(|_| Errno::NOMEM)?;
        Ok(Unmask {
            input: kept,
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Unmask {
    fn drop(&mut self) {
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests;
