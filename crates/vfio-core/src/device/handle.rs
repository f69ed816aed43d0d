//! The values that a device's life consists of: what may be done next is what they let you do.

use super::ops::{DeviceOps, RequestChannel};
use super::shared::{AnyDevice, GroupType, Head, Life, Shared};
use super::slot::ReleaseSlot;
use super::users::{Lease, Rundown};
use super::{DeviceFile, DeviceInfo, IrqInfo, RegionInfo};
use crate::event::What;
use crate::group::Group;
use crate::model::BusDevice;
use crate::{Core, Errno, Result};
use std::fmt;
use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Allocated and initialised, seen by nobody. Dropping it releases it: a device that was never
/// registered needs only its put.
#[must_use = "dropping an unregistered device releases it"]
pub struct UnregisteredDevice<O: DeviceOps>(Arc<Shared<O>>);

impl<O: DeviceOps> fmt::Debug for UnregisteredDevice<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UnregisteredDevice(vfio{})", self.0.head.index.get())
    }
}

impl<O: DeviceOps> UnregisteredDevice<O> {
    /// N in the `vfioN` it will be.
    pub fn index(&self) -> u32 {
        self.0.head.index.get()
    }

    /// `vfio_alloc_device()`: takes the lowest free number and runs `init`. On error (`ENOSPC`,
    /// or `init`'s own) nothing remains and release has not run. No callback runs after it
    /// returns until the device is registered.
    pub(crate) fn alloc(core: &Core, parent: &Arc<BusDevice>, args: O::Args) -> Result<Self> {
        Ok(UnregisteredDevice(Shared::alloc(core, parent, None, args)?))
    }

    /// The same for a device that occupies a place in somebody else's structure: `EBUSY` while
    /// another device is in the slot, up to and including that one's release. A failed `init`
    /// leaves the slot vacant.
    pub(crate) fn alloc_in(
        core: &Core,
        slot: &Arc<ReleaseSlot>,
        parent: &Arc<BusDevice>,
        args: O::Args,
    ) -> Result<Self> {
        let lease = slot.take()?;
        Ok(UnregisteredDevice(Shared::alloc(
            core,
            parent,
            Some(lease),
            args,
        )?))
    }

    /// `vfio_register_group_dev()` or `vfio_register_emulated_iommu_dev()`: visible in sysfs, has
    /// a node, may be opened. `EINVAL` when a physical device's parent is in no IOMMU group, when
    /// the parent has a VFIO device already, or when an emulated device's parent is in a group.
    /// On error the device comes back unregistered.
    pub(crate) fn register(self, kind: GroupType) -> Result<Registration, (Self, Errno)> {
        let device = Device(Arc::clone(&self.0) as Arc<dyn AnyDevice>);
        let head = device.head();
        match head.core.publish(&device, kind) {
            Ok(()) => {
                let _ = head.kind.set(kind);
                head.set_life(Life::Registered);
                head.users.open();
                head.core.list_in_group(&device);
                head.core.event(head, What::Registered);
                head.core.announce(&device, "add", Vec::new());
                Ok(Registration(Some(device)))
            }
            Err(errno) => Err((self, errno)),
        }
    }
}

/// Visible. Held by the bus for as long as the driver is bound.
///
/// Dropping it is the emergency exit: the users are cut off (they see `ENODEV`), nobody is waited
/// for. The ordinary way out is [`unregister`](Registration::unregister).
#[must_use = "dropping a registration cuts its users off"]
#[derive(Debug)]
pub struct Registration(Option<Device>);

impl Registration {
    /// The device.
    pub fn device(&self) -> &Device {
        self.0
            .as_ref()
            .expect("taken only by unregister, which consumes self, and by drop")
    }

    /// `vfio_unregister_group_dev()` up to its wait: on return the names are gone from sysfs and
    /// the node with them, nobody new can open the device, and its own count is given back. Those
    /// who have it open keep it in full. What happens to them is the caller's choice, by what it
    /// does with the value returned.
    pub fn unregister(mut self) -> Unregistering {
        let device = self.0.take().expect("taken only here and by drop");
        Unregistering::begin(device)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(device) = self.0.take() {
            Unregistering::begin(device).disassociate();
        }
    }
}

/// The names are gone; there may be users. Dropped without a choice, it cuts them off.
#[must_use = "choose: wait for the users, wait until a deadline, or disassociate them"]
pub struct Unregistering {
    device: Option<Device>,
    rundown: Arc<Rundown>,
}

impl fmt::Debug for Unregistering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unregistering")
            .field("device", &self.device)
            .field("rundown", &self.rundown)
            .finish()
    }
}

/// What an unregister does about users who do not leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// As the kernel: ask and wait, for ever.
    Wait,
    /// Ask and wait so long, then cut them off.
    WaitThenDisassociate(Duration),
    /// Cut them off now.
    Disassociate,
}

impl Unregistering {
    fn begin(device: Device) -> Unregistering {
        let head = device.head();
        head.set_life(Life::Unregistering);
        head.core.event(
            head,
            What::Unregistering {
                users: head.users.number(),
            },
        );
        head.core.announce(&device, "remove", Vec::new());
        head.core.unpublish(&device);
        let rundown = head.users.close();
        if rundown.is_done() {
            device.unregistered();
        } else {
            // Runs on whichever thread sees the last user go.
            let last = device.clone();
            rundown.on_done(move || last.unregistered());
        }
        Unregistering {
            device: Some(device),
            rundown,
        }
    }

    /// The device that is going.
    pub fn device(&self) -> &Device {
        self.device
            .as_ref()
            .expect("taken only by the methods that consume self")
    }

    /// True when no user is left.
    pub fn is_done(&self) -> bool {
        self.rundown.is_done()
    }

    /// Carries on under `policy` without blocking, and calls `done` when unregister is complete:
    /// at once on this thread if no user is left, else on the thread that sees the last one go.
    /// For callers that must not wait, which is all that serve closes. The returned value says
    /// how it stands; dropping it changes nothing.
    pub fn proceed(mut self, policy: Policy, done: impl FnOnce() + Send + 'static) -> Pending {
        let device = self
            .device
            .take()
            .expect("taken only here, in wait and in drop");
        let rundown = Arc::clone(&self.rundown);
        let pending = Pending {
            device: device.downgrade(),
            rundown: Arc::clone(&rundown),
        };
        rundown.on_done(done);
        if rundown.is_done() {
            return pending;
        }
        match policy {
            Policy::Disassociate => {
                rundown.force();
                device.disassociate();
                drop(device);
                rundown.reach();
            }
            Policy::Wait => device.head().core.ask(&device, &rundown, None),
            Policy::WaitThenDisassociate(time) => {
                let deadline = Instant::now().checked_add(time);
                device.head().core.ask(&device, &rundown, deadline);
            }
        }
        pending
    }

    /// *Wait*: asks `request(0)`, `request(1)`, … at once and then at the core's interval, and
    /// returns when the last user has gone: no callback runs or will run, except release when the
    /// last reference goes. Never call it on a thread that serves closes.
    pub fn wait(self) {
        let rundown = Arc::clone(&self.rundown);
        self.proceed(Policy::Wait, || {});
        rundown.wait();
    }

    /// *Wait, then disassociate*: as [`wait`](Unregistering::wait) for so long, then as
    /// [`disassociate`](Unregistering::disassociate). True if the users left by themselves.
    pub fn wait_for(self, time: Duration) -> bool {
        let rundown = Arc::clone(&self.rundown);
        self.proceed(Policy::WaitThenDisassociate(time), || {});
        rundown.wait();
        !rundown.was_forced()
    }

    /// *Disassociate*: on return every call of the users gets `ENODEV`, their mappings of the
    /// device fault with SIGBUS, its interrupts are cut. Driver calls that were in progress may
    /// still run; `close` comes after them and release after that, on their threads.
    pub fn disassociate(self) {
        let rundown = Arc::clone(&self.rundown);
        self.proceed(Policy::Disassociate, || {});
        // The last user may just be leaving on another thread.
        rundown.wait();
    }
}

impl Drop for Unregistering {
    fn drop(&mut self) {
        if let Some(device) = self.device.take()
            && !self.rundown.is_done()
        {
            self.rundown.force();
            device.disassociate();
            self.rundown.reach();
        }
    }
}

/// An unregister that goes on by itself.
#[derive(Clone, Debug)]
pub struct Pending {
    device: WeakDevice,
    rundown: Arc<Rundown>,
}

impl Pending {
    /// True when it is complete.
    pub fn is_done(&self) -> bool {
        self.rundown.is_done()
    }

    /// Waits for its end for at most `time`; true if it was reached. Never on a thread that
    /// serves closes.
    pub fn wait_for(&self, time: Duration) -> bool {
        self.rundown.wait_for(time)
    }

    /// Calls `f` at its end, at once if it has been reached.
    pub fn on_done(&self, f: impl FnOnce() + Send + 'static) {
        self.rundown.on_done(f);
    }

    /// Does not wait any longer: as [`Unregistering::disassociate`].
    pub fn disassociate(&self) {
        if self.rundown.is_done() {
            return;
        }
        // One more user for so long: who waits elsewhere wakes when no reference of ours is left.
        if let Some(user) = self.device.upgrade().and_then(Device::stay) {
            self.rundown.force();
            user.device().disassociate();
        }
        self.rundown.reach();
    }

    /// The device, as long as it is not released.
    pub fn device(&self) -> Option<Device> {
        self.device.upgrade()
    }
}

/// A reference to the object (the embedded `struct device`'s count). Keeps memory, allows
/// nothing; the last one to go runs the driver's release.
#[derive(Clone)]
pub struct Device(pub(crate) Arc<dyn AnyDevice>);

/// A reference that keeps nothing.
#[derive(Clone)]
pub struct WeakDevice(Weak<dyn AnyDevice>);

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device(vfio{})", self.index())
    }
}

impl fmt::Debug for WeakDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WeakDevice")
    }
}

impl WeakDevice {
    /// The device, if it is not released.
    pub fn upgrade(&self) -> Option<Device> {
        self.0.upgrade().map(Device)
    }
}

impl Device {
    pub(crate) fn head(&self) -> &Head {
        self.0.head()
    }

    /// N in `vfioN`, also the char device's minor.
    pub fn index(&self) -> u32 {
        self.head().index.get()
    }

    /// Unlike any other device's of this process, for ever: numbers are used again, this is not.
    pub fn serial(&self) -> u64 {
        self.head().serial
    }

    /// `vfioN`. The number is the lowest free one at alloc: names are not stable.
    pub fn name(&self) -> String {
        format!("vfio{}", self.index())
    }

    /// The driver's name.
    pub fn driver(&self) -> &'static str {
        self.head().driver
    }

    /// The device it belongs to.
    pub fn parent(&self) -> &Arc<BusDevice> {
        &self.head().parent
    }

    /// Where in its life it is.
    pub fn life(&self) -> Life {
        self.head().life()
    }

    /// Its VFIO group, from register to the end of unregister.
    pub fn vfio_group(&self) -> Option<Arc<Group>> {
        let group = &self.head().group;
        group.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// True if a name means this device (`VFIO_GROUP_GET_DEVICE_FD`); see
    /// [`DeviceOps::matches`](super::DeviceOps::matches).
    pub(crate) fn matches(&self, name: &[u8]) -> Result<bool> {
        Arc::clone(&self.0).matches(name)
    }

    /// Physical or emulated; `None` before register.
    pub fn kind(&self) -> Option<GroupType> {
        self.head().kind.get().copied()
    }

    /// True from the first open (BIND) until the driver's close has returned.
    pub fn is_open(&self) -> bool {
        self.0.is_open()
    }

    /// How many files of it are open, bound or not.
    pub fn users(&self) -> u32 {
        self.head().users.number()
    }

    /// What the driver says of it.
    pub fn info(&self) -> Result<DeviceInfo> {
        self.0.info()
    }

    /// What the driver says of a region.
    pub fn region(&self, index: u32) -> Result<RegionInfo> {
        self.0.region(index)
    }

    /// What the driver says of an interrupt index.
    pub fn irq(&self, index: u32) -> Result<IrqInfo> {
        self.0.irq(index)
    }

    /// The driver's own attribute groups.
    pub fn attributes(&self) -> &'static [(&'static str, &'static str)] {
        self.0.attributes()
    }

    /// The text of one of them.
    pub fn show(&self, group: &str, name: &str) -> Result<String> {
        Arc::clone(&self.0).show(group, name)
    }

    /// The descriptor that backs its mappable regions, for a transport that maps natively, made
    /// at first use. `None` when nothing can be mapped.
    pub fn memory(&self) -> Result<Option<Arc<dma_memory::DeviceMemory>>> {
        Ok(self.0.memory()?.cloned())
    }

    /// The backing, if anybody has made it.
    pub fn memory_if_made(&self) -> Option<Arc<dma_memory::DeviceMemory>> {
        self.head().memory_if_made().cloned()
    }

    /// A reference that keeps nothing alive.
    pub fn downgrade(&self) -> WeakDevice {
        WeakDevice(Arc::downgrade(&self.0))
    }

    /// One more user: an open file that may do nothing yet. `ENODEV` before register has
    /// finished, once unregister has begun, and for a dead device.
    pub fn try_user(&self) -> Result<User> {
        if self.life() == Life::Dead {
            return Err(Errno::NODEV);
        }
        let lease = self.head().users.try_get()?;
        Ok(User {
            device: self.clone(),
            _lease: lease,
        })
    }

    /// A user for the length of asking the others, if there are any.
    pub(crate) fn stay(self) -> Option<User> {
        let lease = self.head().users.stay()?;
        Some(User {
            device: self,
            _lease: lease,
        })
    }

    /// The files that are open now.
    pub fn files(&self) -> Vec<Arc<DeviceFile>> {
        let files = self
            .head()
            .files
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        files.iter().filter_map(Weak::upgrade).collect()
    }

    /// Who opened them, for people; empty if nobody did.
    pub(crate) fn opened_by(&self) -> String {
        let files = self.files();
        let names: Vec<String> = files.iter().map(|file| file.opener().to_string()).collect();
        names.join(", ")
    }

    /// Cuts its users off.
    pub(crate) fn disassociate(&self) {
        self.head().set_life(Life::Dead);
        // Told first: the last user may go by this, and whoever waits for that wants to know why.
        self.head().core.event(self.head(), What::Disassociated);
        for file in self.files() {
            file.disassociate();
        }
        if let Some(memory) = self.head().memory_if_made() {
            memory.revoke();
        }
    }

    /// A callback of its driver panicked.
    pub(crate) fn panicked(&self) {
        tracing::error!(
            "{} {}: a driver callback panicked; vfio{} is dead: its users get ENODEV, unbind it \
             to release it",
            self.driver(),
            self.parent().name(),
            self.index()
        );
        self.head().core.event(self.head(), What::Panicked);
        self.disassociate();
    }

    /// Asks the driver once to make its users let go.
    pub(crate) fn request(&self, count: u32) -> RequestChannel {
        self.head()
            .core
            .event(self.head(), What::Requested { count });
        let channel = Arc::clone(&self.0).request(count);
        *self
            .head()
            .asked
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(channel);
        channel
    }

    /// How its users were last asked to let go: `None` when they have not been, and
    /// [`RequestChannel::None`] when its driver has no way to ask them, so that an unregister waits
    /// until they leave by themselves.
    pub fn asked(&self) -> Option<RequestChannel> {
        *self
            .head()
            .asked
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The end of unregister: the group unit goes.
    fn unregistered(&self) {
        self.head().set_life(Life::Unregistered);
        self.head().core.leave_group(self);
        self.head().core.event(self.head(), What::Unregistered);
    }
}

/// One open file or connection: it counts, and may do nothing yet.
///
/// The reference is declared before the lease, so it goes first: when a waiter wakes, no user
/// holds a reference any more, and release normally runs on the thread that removes the device.
#[derive(Debug)]
pub struct User {
    pub(crate) device: Device,
    _lease: Lease,
}

impl User {
    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }
}
