//! Drivers for the tests of the model and the tree.

use super::{BusDevice, VfioDriver, mdev};
use crate::device::{
    DeviceInfo, DeviceOps, GroupType, InitCx, IrqInfo, OpenCx, Opener, RegionInfo, RegionPos,
    ReleaseSlot,
};
use crate::event::{Notice, Subscription};
use crate::irq::SetIrqs;
use crate::{Config, Core, Errno, Result};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vfio_uapi::device::InfoFlags;

pub(crate) const SOON: Duration = Duration::from_secs(10);

pub(crate) const UUID: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";

/// Another uuid for every number.
pub(crate) fn uuid(n: u32) -> String {
    format!("83b8f4f2-509f-382f-3c1e-{n:012x}")
}

pub(crate) fn core_with(config: Config) -> Core {
    Core::new(Config {
        request_interval: Duration::from_millis(5),
        ..config
    })
}

pub(crate) fn core() -> Core {
    core_with(Config::default())
}

pub(crate) fn opener() -> Opener {
    Opener {
        pid: 812,
        comm: "guest".into(),
        since: std::time::SystemTime::now(),
        node: None,
    }
}

/// A device that does nothing, and gives its ports back when it is released.
pub(crate) struct Dummy {
    ports: u32,
    budget: Arc<AtomicU32>,
}

/// How many ports, out of what.
pub(crate) type Ports = (u32, Arc<AtomicU32>);

impl Drop for Dummy {
    fn drop(&mut self) {
        self.budget.fetch_add(self.ports, Ordering::SeqCst);
    }
}

impl DeviceOps for Dummy {
    const NAME: &'static str = "dummy";
    type Args = Ports;
    type Session = ();

    fn init(_cx: &InitCx<'_>, (ports, budget): Ports) -> Result<Dummy> {
        budget
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                left.checked_sub(ports)
            })
            .map_err(|_| Errno::NOSPC)?;
        Ok(Dummy { ports, budget })
    }

    fn open(&self, _cx: &OpenCx<'_>) -> Result<()> {
        Ok(())
    }

    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            flags: InfoFlags::PCI,
            num_regions: 0,
            num_irqs: 0,
        }
    }

    fn region(&self, _index: u32) -> Result<RegionInfo> {
        Err(Errno::INVAL)
    }

    fn irq(&self, _index: u32) -> Result<IrqInfo> {
        Err(Errno::INVAL)
    }

    fn read(&self, (): &(), _at: RegionPos, _buf: &mut [u8]) -> Result<usize> {
        Err(Errno::INVAL)
    }

    fn write(&self, (): &(), _at: RegionPos, _data: &[u8]) -> Result<usize> {
        Err(Errno::INVAL)
    }

    fn set_irqs(&self, (): &(), _request: SetIrqs<'_>) -> Result<u32> {
        Err(Errno::NOTTY)
    }

    fn attributes(&self) -> &'static [(&'static str, &'static str)] {
        &[("vendor", "ports")]
    }

    fn show(&self, group: &str, name: &str) -> Result<String> {
        assert_eq!((group, name), ("vendor", "ports"));
        Ok(format!("{}\n", self.ports))
    }
}

/// A driver on a bus of devices, with the name and the errno it is given.
pub(crate) struct Plain {
    pub(crate) name: &'static str,
    pub(crate) kind: GroupType,
    pub(crate) fail: Option<Errno>,
    pub(crate) slot: Option<Arc<ReleaseSlot>>,
}

pub(crate) fn plain(name: &'static str) -> Plain {
    Plain {
        name,
        kind: GroupType::Emulated,
        fail: None,
        slot: None,
    }
}

impl VfioDriver for Plain {
    type Ops = Dummy;

    fn name(&self) -> &'static str {
        self.name
    }

    fn group_type(&self) -> GroupType {
        self.kind
    }

    fn args(&self, _device: &Arc<BusDevice>) -> Result<Ports> {
        match self.fail {
            Some(errno) => Err(errno),
            None => Ok((0, Arc::default())),
        }
    }

    fn slot(&self, _device: &Arc<BusDevice>) -> Option<Arc<ReleaseSlot>> {
        self.slot.clone()
    }
}

/// Counts for itself, as mtty: 24 ports, types of one and two.
pub(crate) struct Serial(pub(crate) Arc<AtomicU32>);

impl mdev::Driver for Serial {
    type Ops = Dummy;

    fn name(&self) -> &'static str {
        "serial"
    }

    fn types(&self) -> Vec<mdev::Type> {
        vec![
            mdev::Type {
                sysfs_name: "1",
                pretty_name: Some("Single port serial"),
            },
            mdev::Type {
                sysfs_name: "2",
                pretty_name: Some("Dual port serial"),
            },
        ]
    }

    fn available_instances(&self, ty: &mdev::Type) -> Option<u32> {
        Some(self.0.load(Ordering::SeqCst) / ports(ty))
    }

    fn args(&self, _device: &Arc<BusDevice>, ty: &mdev::Type) -> Result<Ports> {
        Ok((ports(ty), Arc::clone(&self.0)))
    }
}

fn ports(ty: &mdev::Type) -> u32 {
    ty.sysfs_name.parse().unwrap()
}

/// Lets the bus count, as mdpy: four of any type, one of which fails.
pub(crate) struct Display;

impl mdev::Driver for Display {
    type Ops = Dummy;

    fn name(&self) -> &'static str {
        "display"
    }

    fn types(&self) -> Vec<mdev::Type> {
        let ty = |sysfs_name| mdev::Type {
            sysfs_name,
            pretty_name: None,
        };
        vec![ty("vga"), ty("broken")]
    }

    fn max_instances(&self) -> u32 {
        4
    }

    fn description(&self, ty: &mdev::Type) -> Option<String> {
        (ty.sysfs_name == "vga").then(|| "virtual display, 640x480".to_owned())
    }

    fn args(&self, _device: &Arc<BusDevice>, ty: &mdev::Type) -> Result<Ports> {
        match ty.sysfs_name {
            "vga" => Ok((0, Arc::default())),
            _ => Err(Errno::NOMEM),
        }
    }

    fn parameters(&self) -> Vec<(&'static str, String)> {
        vec![("count", "4".into())]
    }
}

/// `/sys/devices/virtual/mtty/mtty` with 24 ports.
pub(crate) fn serial(core: &Core) -> Arc<mdev::Parent> {
    let device = BusDevice::virtual_class("mtty", "mtty");
    device.add(core).unwrap();
    let driver = Arc::new(Serial(Arc::new(AtomicU32::new(24))));
    mdev::Parent::register::<Serial>(core, &device, driver).unwrap()
}

pub(crate) fn display(core: &Core) -> Arc<mdev::Parent> {
    let device = BusDevice::virtual_class("mdpy", "mdpy");
    device.add(core).unwrap();
    mdev::Parent::register(core, &device, Display).unwrap()
}

/// Everything that happens, as lines.
pub(crate) struct Log {
    pub(crate) lines: Arc<Mutex<Vec<String>>>,
    _subscription: Subscription,
}

impl Log {
    /// Uevents only.
    pub(crate) fn uevents(core: &Core) -> Log {
        let lines: Arc<Mutex<Vec<String>>> = Arc::default();
        let to = Arc::clone(&lines);
        let subscription = core.subscribe(move |notice| {
            if let Notice::Uevent(uevent) = notice {
                let env: Vec<String> = uevent
                    .env
                    .iter()
                    .map(|(key, value)| format!(" {key}={value}"))
                    .collect();
                to.lock().unwrap().push(format!(
                    "{} {} {}{}",
                    uevent.action,
                    uevent.devpath,
                    uevent.subsystem,
                    env.concat()
                ));
            }
        });
        Log {
            lines,
            _subscription: subscription,
        }
    }

    pub(crate) fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.lines.lock().unwrap())
    }
}
