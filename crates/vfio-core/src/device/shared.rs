//! One allocation for core and driver part of a device, as `vfio_alloc_device()` makes one, and
//! the session inside it while the device is open.

use super::dirty::DirtyLog;
use super::migration::{Machine, Steps};
use super::ops::{DeviceOps, Dma, DmaSpace, InitCx, OpenCx, RegionInfo, RequestChannel};
use super::region::Layout;
use super::set::Membership;
use super::slot::SlotLease;
use super::users::Users;
use super::{Device, DeviceFile, DeviceInfo, Feature, GfxPlane, GfxQuery, IrqInfo, RegionPos};
use crate::event::What;
use crate::group::{Group, Lease};
use crate::index::Index;
use crate::irq::SetIrqs;
use crate::model::BusDevice;
use crate::{Core, Errno, Result};
use dma_memory::DeviceMemory;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

/// How a device shares its parent's IOMMU group: `enum vfio_group_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupType {
    /// `VFIO_IOMMU`: the parent is in a group of its bus's making.
    Physical,
    /// `VFIO_EMULATED_IOMMU`: a software device; a group is made for it at register.
    Emulated,
}

/// The part of a device that does not depend on its driver.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) core: Core,
    pub(crate) users: Arc<Users>,
    pub(crate) driver: &'static str,
    /// Unlike any other device's of this process, for ever: numbers are used again, this is not.
    pub(crate) serial: u64,
    pub(crate) files: Mutex<Vec<Weak<DeviceFile>>>,
    pub(crate) group: Mutex<Option<Arc<Group>>>,
    /// Taken in `register`: how it was registered.
    pub(crate) kind: OnceLock<GroupType>,
    /// What the last request to let go has come to.
    pub(crate) asked: Mutex<Option<RequestChannel>>,
    life: AtomicU8,
    layout: OnceLock<Box<Layout>>,
    memory: OnceLock<Arc<DeviceMemory>>,
    // Release order from here on: what others can see of a device's number goes last.
    pub(crate) set: OnceLock<Membership>,
    pub(crate) parent: Arc<BusDevice>,
    pub(crate) index: Index,
    slot: Option<SlotLease>,
}

/// Where in its life a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Life {
    /// Allocated, seen by nobody.
    Allocated = 0,
    /// Registered: visible, may be opened.
    Registered = 1,
    /// Unregister has begun: the names are gone, it waits for its users.
    Unregistering = 2,
    /// Unregister has ended; references may remain.
    Unregistered = 3,
    /// Its users were cut off, by force or because a callback panicked.
    Dead = 4,
}

/// The allocation. The driver's state is declared before everything it may still use: dropping
/// it *is* the driver's release, and it runs before the set, the parent, the number and the slot
/// are given back. (The kernel returns set and index before `ops->release`, so an index can be
/// taken again while the old device's release still runs; here it cannot.)
#[derive(Debug)]
pub(crate) struct Shared<O: DeviceOps> {
    opens: Mutex<Opens<O>>,
    ops: Contained<O>,
    pub(crate) head: Head,
}

#[derive(Debug)]
struct Opens<O: DeviceOps> {
    /// True from the first open until the driver's `close` has returned.
    open: bool,
    session: Weak<OpenSession<O>>,
}

/// A driver's value whose drop may panic without taking anything else down.
struct Contained<T>(Option<T>);

impl<T> std::fmt::Debug for Contained<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Contained")
    }
}

impl<T> Drop for Contained<T> {
    fn drop(&mut self) {
        let value = self.0.take();
        if catch_unwind(AssertUnwindSafe(|| drop(value))).is_err() {
            tracing::error!(
                "the release of a {} panicked; the rest of the release goes on",
                std::any::type_name::<T>()
            );
        }
    }
}

/// What lies between a device and its user's memory, from bind to last close.
pub(crate) trait Binding: Send + Sync {
    /// The device's way to the memory.
    fn dma(&self) -> Arc<dyn DmaSpace>;
    /// The object id that BIND returned.
    fn devid(&self) -> u32;
    /// `VFIO_DEVICE_ATTACH_IOMMUFD_PT`; the id to write back.
    fn attach(&self, pt_id: u32) -> Result<u32>;
    /// `VFIO_DEVICE_DETACH_IOMMUFD_PT`.
    fn detach(&self);
    /// What is to be given back after the last close, when the set's lock is free again.
    fn take_lease(&mut self) -> Option<Lease> {
        None
    }
}

/// A binding with a hold on the device's group.
pub(crate) struct Leased {
    binding: Box<dyn Binding>,
    lease: Option<Lease>,
}

impl Leased {
    pub(crate) fn boxed(binding: Box<dyn Binding>, lease: Lease) -> Box<dyn Binding> {
        Box::new(Leased {
            binding,
            lease: Some(lease),
        })
    }
}

impl Binding for Leased {
    fn dma(&self) -> Arc<dyn DmaSpace> {
        self.binding.dma()
    }
    fn devid(&self) -> u32 {
        self.binding.devid()
    }
    fn attach(&self, pt_id: u32) -> Result<u32> {
        self.binding.attach(pt_id)
    }
    fn detach(&self) {
        self.binding.detach();
    }
    fn take_lease(&mut self) -> Option<Lease> {
        self.lease.take()
    }
}

/// An open device, whatever its driver. The last clone to go closes it.
pub(crate) trait Session: Send + Sync {
    fn read(&self, at: RegionPos, buf: &mut [u8]) -> Result<usize>;
    fn write(&self, at: RegionPos, data: &[u8]) -> Result<usize>;
    fn set_irqs(&self, request: SetIrqs<'_>) -> Result<u32>;
    fn reset(&self) -> Result;
    fn gfx_plane(&self, query: GfxQuery) -> Result<GfxPlane>;
    fn feature(&self, feature: Feature<'_>) -> Result<()>;
    fn dma_unmap(&self, iova: u64, len: u64);
    fn binding(&self) -> Option<&dyn Binding>;
    fn set_lock(&self) -> MutexGuard<'_, ()>;
    fn dirty(&self) -> &DirtyLog;
    fn machine(&self) -> &Machine;
    fn steps(&self) -> &dyn Steps;
}

/// From the first open to the last close. Calls in progress hold a clone, so `close` runs after
/// them by construction, and nobody waits.
pub(super) struct OpenSession<O: DeviceOps> {
    shared: Arc<Shared<O>>,
    session: Option<O::Session>,
    dirty: Arc<DirtyLog>,
    machine: Machine,
    binding: Option<Box<dyn Binding>>,
}

impl<O: DeviceOps> std::fmt::Debug for OpenSession<O> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenSession").finish_non_exhaustive()
    }
}

/// A device, whatever its driver.
pub(crate) trait AnyDevice: Send + Sync {
    fn head(&self) -> &Head;
    fn info(&self) -> Result<DeviceInfo>;
    fn region(&self, index: u32) -> Result<RegionInfo>;
    fn irq(&self, index: u32) -> Result<IrqInfo>;
    /// First or further open. `bind` runs on the first only.
    fn open(self: Arc<Self>, repeated: bool, bind: Bind<'_>) -> Result<Arc<dyn Session>>;
    fn request(self: Arc<Self>, count: u32) -> RequestChannel;
    /// Tells the driver, if the device is open, that client memory is going.
    fn dma_unmap(self: Arc<Self>, iova: u64, len: u64);
    /// True if a name given to the group means it.
    fn matches(self: Arc<Self>, name: &[u8]) -> Result<bool>;
    fn attributes(&self) -> &'static [(&'static str, &'static str)];
    fn show(self: Arc<Self>, group: &str, name: &str) -> Result<String>;
    fn is_open(&self) -> bool;
}

pub(crate) type Bind<'a> = &'a mut dyn FnMut() -> Result<Option<Box<dyn Binding>>>;

/// DMA for a device that was opened without an address space.
struct NoDma;

impl DmaSpace for NoDma {
    fn read(&self, _iova: u64, _buf: &mut [u8]) -> Result {
        Err(Errno::NOENT)
    }
    fn write(&self, _iova: u64, _data: &[u8]) -> Result {
        Err(Errno::NOENT)
    }
}

static NEXT_SERIAL: AtomicU64 = AtomicU64::new(1);

fn unpoison<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<O: DeviceOps> Shared<O> {
    /// `_vfio_alloc_device()`: number, `init`, object. `ENOSPC` when all numbers are taken, else
    /// what `init` says; on error nothing remains.
    pub(crate) fn alloc(
        core: &Core,
        parent: &Arc<BusDevice>,
        slot: Option<SlotLease>,
        args: O::Args,
    ) -> Result<Arc<Shared<O>>> {
        let index = core.take_index()?;
        let set = Mutex::new(None);
        let cx = InitCx {
            core,
            parent,
            index: index.get(),
            set: &set,
        };
        let ops = match catch_unwind(AssertUnwindSafe(|| O::init(&cx, args))) {
            Ok(ops) => ops?,
            Err(_) => {
                tracing::error!("{} {}: init panicked", O::NAME, parent.name());
                return Err(Errno::IO);
            }
        };
        let shared = Arc::new(Shared {
            opens: Mutex::new(Opens {
                open: false,
                session: Weak::new(),
            }),
            ops: Contained(Some(ops)),
            head: Head {
                core: core.clone(),
                users: Users::new(),
                driver: O::NAME,
                serial: NEXT_SERIAL.fetch_add(1, Ordering::Relaxed),
                files: Mutex::default(),
                group: Mutex::default(),
                kind: OnceLock::new(),
                asked: Mutex::new(None),
                life: AtomicU8::new(Life::Allocated as u8),
                layout: OnceLock::new(),
                memory: OnceLock::new(),
                set: OnceLock::new(),
                parent: Arc::clone(parent),
                index,
                slot,
            },
        });
        if let Some(membership) = set.into_inner().unwrap_or_else(PoisonError::into_inner) {
            let _ = shared.head.set.set(membership);
        }
        core.event(&shared.head, What::Allocated);
        Ok(shared)
    }

    fn ops(&self) -> Result<&O> {
        // Only a drop takes the value out, and nobody has `&self` then.
        self.ops.0.as_ref().ok_or(Errno::NODEV)
    }

    fn device(self: &Arc<Self>) -> Device {
        Device(Arc::clone(self) as Arc<dyn AnyDevice>)
    }

    /// Runs a driver callback. A panic kills the device and becomes `ENODEV`.
    fn contain<R>(self: &Arc<Self>, f: impl FnOnce(&O) -> Result<R>) -> Result<R> {
        let ops = self.ops()?;
        match catch_unwind(AssertUnwindSafe(|| f(ops))) {
            Ok(result) => result,
            Err(_) => {
                self.device().panicked();
                Err(Errno::NODEV)
            }
        }
    }

    fn opens(&self) -> MutexGuard<'_, Opens<O>> {
        unpoison(&self.opens)
    }

    /// The driver's `open`, with the set's lock held.
    fn first_open(
        self: &Arc<Self>,
        binding: Option<&dyn Binding>,
        log: &Arc<DirtyLog>,
    ) -> Result<O::Session> {
        let device = self.device();
        let memory = device.0.memory()?.cloned();
        let layout = device.0.layout()?;
        let cx = OpenCx {
            device: &device,
            dma: Dma {
                space: match binding {
                    Some(binding) => binding.dma(),
                    None => Arc::new(NoDma),
                },
                log: Arc::clone(log),
            },
            memory,
            areas: &layout.areas,
        };
        self.contain(|ops| ops.open(&cx))
    }
}

impl Head {
    pub(crate) fn life(&self) -> Life {
        match self.life.load(Ordering::Acquire) {
            0 => Life::Allocated,
            1 => Life::Registered,
            2 => Life::Unregistering,
            3 => Life::Unregistered,
            _ => Life::Dead,
        }
    }

    /// Steps on. A dead device stays dead.
    pub(crate) fn set_life(&self, life: Life) {
        let _ = self
            .life
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| {
                (now != Life::Dead as u8).then_some(life as u8)
            });
    }

    pub(crate) fn set_membership(&self) -> &Membership {
        self.set.get_or_init(Membership::singleton)
    }

    pub(crate) fn memory_if_made(&self) -> Option<&Arc<DeviceMemory>> {
        self.memory.get()
    }
}

impl dyn AnyDevice {
    /// The regions' places, worked out at first use.
    pub(crate) fn layout(&self) -> Result<&Layout> {
        let head = self.head();
        if let Some(layout) = head.layout.get() {
            return Ok(layout);
        }
        let count = self.info()?.num_regions;
        let regions: Vec<RegionInfo> = (0..count)
            .map(|index| self.region(index))
            .collect::<Result<_>>()?;
        Ok(head
            .layout
            .get_or_init(|| Box::new(Layout::new(regions.iter()))))
    }

    /// The backing of the mappable regions, made at first use. `None` if there are none.
    pub(crate) fn memory(&self) -> Result<Option<&Arc<DeviceMemory>>> {
        let size = self.layout()?.backing;
        let head = self.head();
        if size == 0 {
            return Ok(None);
        }
        if head.memory.get().is_none() {
            let made = Arc::new(DeviceMemory::create(size)?);
            let _ = head.memory.set(made);
        }
        Ok(head.memory.get())
    }
}

impl<O: DeviceOps> AnyDevice for Shared<O> {
    fn head(&self) -> &Head {
        &self.head
    }

    fn info(&self) -> Result<DeviceInfo> {
        let ops = self.ops()?;
        catch_unwind(AssertUnwindSafe(|| ops.info())).map_err(|_| Errno::NODEV)
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        let ops = self.ops()?;
        catch_unwind(AssertUnwindSafe(|| ops.region(index))).map_err(|_| Errno::NODEV)?
    }

    fn irq(&self, index: u32) -> Result<IrqInfo> {
        let ops = self.ops()?;
        catch_unwind(AssertUnwindSafe(|| ops.irq(index))).map_err(|_| Errno::NODEV)?
    }

    fn open(self: Arc<Self>, repeated: bool, bind: Bind<'_>) -> Result<Arc<dyn Session>> {
        // Given back, on failure, when the set's lock is free again.
        let mut _lease: Option<Lease> = None;
        let _set = self.head.set_membership().lock();
        if self.head.life() == Life::Dead {
            return Err(Errno::NODEV);
        }
        {
            let opens = self.opens();
            if opens.open {
                // `vfio_df_open`: only files of a group may open a device again. A session that
                // is just closing cannot be joined either.
                return match opens.session.upgrade() {
                    Some(session) if repeated => Ok(session),
                    _ => Err(Errno::INVAL),
                };
            }
        }
        let mut binding = bind()?;
        let dirty = Arc::default();
        let session = self
            .first_open(binding.as_deref(), &dirty)
            .inspect_err(|_| {
                _lease = binding.as_mut().and_then(|binding| binding.take_lease());
            })?;
        let session = Arc::new(OpenSession {
            shared: Arc::clone(&self),
            session: Some(session),
            dirty,
            machine: Machine::default(),
            binding,
        });
        let mut opens = self.opens();
        opens.open = true;
        opens.session = Arc::downgrade(&session);
        drop(opens);
        self.head.core.event(&self.head, What::Bound);
        Ok(session)
    }

    fn request(self: Arc<Self>, count: u32) -> RequestChannel {
        let session = self.opens().session.upgrade();
        let session = session.as_deref().and_then(|open| open.session.as_ref());
        self.contain(|ops| Ok(ops.request(session, count)))
            .unwrap_or(RequestChannel::None)
    }

    fn dma_unmap(self: Arc<Self>, iova: u64, len: u64) {
        let session = self.opens().session.upgrade();
        if let Some(session) = session {
            session.dma_unmap(iova, len);
        }
    }

    fn matches(self: Arc<Self>, name: &[u8]) -> Result<bool> {
        self.contain(|ops| ops.matches(self.head.parent.name(), name))
    }

    fn attributes(&self) -> &'static [(&'static str, &'static str)] {
        match self.ops() {
            Ok(ops) => ops.attributes(),
            Err(_) => &[],
        }
    }

    fn show(self: Arc<Self>, group: &str, name: &str) -> Result<String> {
        self.contain(|ops| ops.show(group, name))
    }

    fn is_open(&self) -> bool {
        self.opens().open
    }
}

impl<O: DeviceOps> OpenSession<O> {
    pub(super) fn call<R>(&self, f: impl FnOnce(&O, &O::Session) -> Result<R>) -> Result<R> {
        let session = self.session.as_ref().ok_or(Errno::NODEV)?;
        self.shared.contain(|ops| f(ops, session))
    }
}

impl<O: DeviceOps> Session for OpenSession<O> {
    fn read(&self, at: RegionPos, buf: &mut [u8]) -> Result<usize> {
        self.call(|ops, session| ops.read(session, at, buf))
    }
    fn write(&self, at: RegionPos, data: &[u8]) -> Result<usize> {
        self.call(|ops, session| ops.write(session, at, data))
    }
    fn set_irqs(&self, request: SetIrqs<'_>) -> Result<u32> {
        self.call(|ops, session| ops.set_irqs(session, request))
    }
    fn reset(&self) -> Result {
        self.machine.reset(self)
    }
    fn gfx_plane(&self, query: GfxQuery) -> Result<GfxPlane> {
        self.call(|ops, session| ops.gfx_plane(session, query))
    }
    fn feature(&self, feature: Feature<'_>) -> Result<()> {
        self.call(|ops, session| ops.feature(session, feature))
    }
    fn dma_unmap(&self, iova: u64, len: u64) {
        let _ = self.call(|ops, session| {
            ops.dma_unmap(session, iova, len);
            Ok(())
        });
    }
    fn binding(&self) -> Option<&dyn Binding> {
        self.binding.as_deref()
    }
    fn set_lock(&self) -> MutexGuard<'_, ()> {
        self.shared.head.set_membership().lock()
    }
    fn dirty(&self) -> &DirtyLog {
        &self.dirty
    }
    fn machine(&self) -> &Machine {
        &self.machine
    }
    fn steps(&self) -> &dyn Steps {
        self
    }
}

impl<O: DeviceOps> Drop for OpenSession<O> {
    /// Last close, in the kernel's order: the driver's close, unbind from the address space,
    /// then the device counts as closed.
    fn drop(&mut self) {
        let set = self.shared.head.set_membership().lock();
        if let Some(session) = self.session.take() {
            let closed = self
                .shared
                .ops()
                .map(|ops| catch_unwind(AssertUnwindSafe(|| ops.close(session))).is_ok());
            if closed == Ok(false) {
                tracing::error!("vfio{}: close panicked", self.shared.head.index.get());
                self.shared.head.set_life(Life::Dead);
                self.shared
                    .head
                    .core
                    .event(&self.shared.head, What::Panicked);
            }
        }
        self.dirty.stop();
        let mut binding = self.binding.take();
        let lease = binding.as_mut().and_then(|binding| binding.take_lease());
        drop(binding);
        self.shared.opens().open = false;
        drop(set);
        drop(lease);
        self.shared
            .head
            .core
            .event(&self.shared.head, What::Unbound);
    }
}

impl Drop for Head {
    fn drop(&mut self) {
        // The driver's state is gone by now (it is declared before the head).
        self.core.event(self, What::Released);
        let _ = &self.slot;
    }
}
