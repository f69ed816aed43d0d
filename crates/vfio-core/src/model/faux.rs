//! The faux bus (`drivers/base/faux.c`): devices that a program makes, for tests, benchmarks and
//! configuration. Each brings its own driver along; on the bus all of them are bound to
//! `faux_driver`, which passes the probe on.

use super::bus::{Probe, Vfio};
use super::device::Subsystem;
use super::{Bus, BusDevice, BusOptions, Driver, IommuGroup, Outcome, Role, VfioDriver};
use crate::device::{Policy, Registration};
use crate::{Core, Errno, Result};
use std::sync::Arc;

/// The bus's name.
pub const BUS: &str = "faux";

const DRIVER: &str = "faux_driver";

/// The one driver of the bus.
struct PassOn;

impl Probe for PassOn {
    fn probe(&self, core: &Core, device: &Arc<BusDevice>) -> Result<Registration> {
        device.own_driver().ok_or(Errno::NODEV)?.probe(core, device)
    }
}

pub(super) fn bus() -> Arc<Bus> {
    let bus = Bus::new(
        BUS,
        BusOptions {
            matches: |_, _| true,
            driver_override: false,
            autoprobe: true,
        },
    );
    bus.begin_with(Driver::new(BUS, DRIVER, Arc::new(PassOn)));
    bus
}

/// A device on the faux bus. Dropping it leaves the device where it is.
#[derive(Clone, Debug)]
pub struct Device {
    core: Core,
    device: Arc<BusDevice>,
}

impl Device {
    /// `faux_device_create()`: makes `/sys/devices/faux/NAME` and binds it to `driver`. `EEXIST`
    /// for a name that is taken, `EINVAL` for one that cannot be a file's; when the probe fails,
    /// its errno, and nothing remains.
    pub fn create<D: VfioDriver>(core: &Core, name: &str, driver: D) -> Result<Device> {
        Device::create_in(core, name, driver, None)
    }

    /// The same, as a member of an IOMMU group: what a physical device needs. Several devices
    /// may be in one.
    pub fn create_in<D: VfioDriver>(
        core: &Core,
        name: &str,
        driver: D,
        group: Option<&Arc<IommuGroup>>,
    ) -> Result<Device> {
        if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0', '\n']) {
            return Err(Errno::INVAL);
        }
        let device = BusDevice::make(
            "",
            name,
            Some(Subsystem::Bus(BUS)),
            Some(Arc::clone(&core.model().faux)),
            Role::Own(Arc::new(Vfio(driver))),
        );
        if let Some(group) = group {
            device.join_iommu_group(group)?;
        }
        let bus = core.model().bus(BUS).ok_or(Errno::NODEV)?;
        let driver = bus.driver(DRIVER).ok_or(Errno::NODEV)?;
        let made = device.enter(core).and_then(|()| device.bind(core, &driver));
        if let Err(errno) = made {
            let _ = device.remove(core, Policy::Disassociate);
            device.leave_iommu_group();
            return Err(errno);
        }
        Ok(Device {
            core: core.clone(),
            device,
        })
    }

    /// The device on the bus.
    pub fn bus_device(&self) -> &Arc<BusDevice> {
        &self.device
    }

    /// `faux_device_destroy()`: unbinds and removes it; see [`BusDevice::remove`].
    pub fn destroy(&self, policy: Policy) -> Outcome {
        let outcome = self.device.remove(&self.core, policy);
        let device = Arc::clone(&self.device);
        match outcome {
            Outcome::Done(Ok(())) => device.leave_iommu_group(),
            Outcome::Waiting(ref waiting) => {
                waiting.on_done(move |_| device.leave_iommu_group());
            }
            Outcome::Done(Err(_)) => {}
        }
        outcome
    }
}
