//! What it costs that a device lives, against the tables that a program would keep of it anyway.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::collections::HashMap;
use std::hint::black_box;
use std::sync::Arc;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use slab::Slab;
use vfio_core::Config;
use vfio_core::Core;
use vfio_core::device::Policy;
use vfio_core::model::BusDevice;
use vfio_core::model::BusOptions;
use vfio_core::model::Driver as BusDriver;
use vfio_core::model::Subsystem;

use super::Benchmark;
use super::Goal;
use super::card;
use super::measure::Measured;
use super::measure::Pinned;
use super::measure::typical;
use super::peer::Converse;
use super::peer::Peer;
use super::peer::Role;
use super::peer::word;

/// Lives in one round.
const LIVES: u32 = 20_000;
/// Devices whose memory is counted.
const MANY: u32 = 100_000;

/// The rows of this file.
pub(super) const ROWS: [Benchmark; 3] = [
    Benchmark {
        name: "alloc, register, look up, unregister, put, at 100 devices",
        against: "slab, name map and inode map, filled and looked up",
        goal: Goal::AtMost(2.5),
        known_miss: Some(
            "with 100 devices the tables are in the nearest cache and have no locks. A life is \
             about a hundred uncontended locks and counts, each a locked instruction, of what other \
             threads may be looking at: parent, group, numbers, class, users, binding",
        ),
        run: |rounds| lives(rounds, 100),
    },
    Benchmark {
        name: "alloc, register, look up, unregister, put, at 100 000 devices",
        against: "slab, name map and inode map, filled and looked up",
        goal: Goal::AtMost(2.5),
        known_miss: None,
        run: |rounds| lives(rounds, MANY),
    },
    Benchmark {
        name: "bytes of a registered device and its parent, at 100 000",
        against: "1 KiB",
        goal: Goal::AtMost(1.0),
        known_miss: None,
        run: bytes,
    },
];

/// What the tables hold in place of a device.
type Stand = Arc<[u8; 144]>;

/// What a program has that keeps devices by number, name and inode, and no life cycle.
#[derive(Debug, Default)]
struct Tables {
    devices: Slab<Stand>,
    names: HashMap<String, Stand>,
    inodes: BTreeMap<u64, Stand>,
}

impl Tables {
    fn insert(&mut self) -> usize {
        let device: Stand = Arc::new([0; 144]);
        let index = self.devices.insert(Arc::clone(&device));
        self.names
            .insert(format!("vfio{index}"), Arc::clone(&device));
        self.inodes.insert(index as u64, device);
        index
    }

    fn look_up(&self, index: usize) {
        black_box(self.names.get(&format!("vfio{index}")));
        black_box(self.devices.get(index));
        black_box(self.inodes.get(&(index as u64)));
    }

    fn remove(&mut self, index: usize) {
        black_box(self.names.remove(&format!("vfio{index}")));
        black_box(self.inodes.remove(&(index as u64)));
        black_box(self.devices.try_remove(index));
    }
}

/// Devices on a bus of their own, bound to one driver.
struct Devices {
    core: Core,
    driver: Arc<BusDriver>,
    all: Vec<Arc<BusDevice>>,
}

impl Devices {
    fn make(count: u32) -> Result<Self> {
        let core = Core::new(Config::default());
        let options = BusOptions {
            matches: |_, _| true,
            driver_override: false,
            autoprobe: true,
        };
        let bus = core.model().add_bus("bench", options)?;
        let (outside, _) = card::Outside::new();
        let driver = bus.add_driver(&core, card::Driver(outside))?;
        let root = BusDevice::new("/devices", "bench", None);
        root.add(&core)?;
        let all = (0..count)
            .map(|number| {
                let bus = Some(Subsystem::Bus("bench"));
                let device = BusDevice::child(&root, &format!("d{number}"), bus);
                device.add(&core)?;
                Ok(device)
            })
            .collect::<Result<_>>()?;
        Ok(Self { core, driver, all })
    }

    /// One life of the `nth` device: it begins with a bind and ends with an unbind, which are what
    /// allocates, registers, unregisters and puts. In between it is found by each of its names.
    fn live(&self, nth: usize) -> Result<()> {
        let parent = self.all.get(nth).context("no such device")?;
        if parent.unbind(&self.core, Policy::Wait).result() != Some(Ok(())) {
            bail!("the device did not go");
        }
        parent.bind(&self.core, &self.driver)?;
        let device = parent.vfio_device().context("not on its parent")?;
        let index = device.index();
        let group = parent.iommu_group().context("not in a group")?;
        let found = self.core.device_by_name(&device.name()).is_some()
            && self.core.device(index).is_some()
            && self.core.iommu_groups().get(group.id()).is_some();
        anyhow::ensure!(black_box(found), "it cannot be found");
        Ok(())
    }
}

fn lives(rounds: u32, count: u32) -> Result<Measured> {
    let _pinned = Pinned::to(0)?;
    let devices = Devices::make(count)?;
    let mut tables = Tables::default();
    let mut indexes: Vec<usize> = (0..count).map(|_| tables.insert()).collect();
    // A step that has no common factor with the count: no pattern that a cache could follow.
    let next = |at: &mut usize| {
        *at = (*at + 61_803) % count as usize;
        *at
    };
    let mut at = 0;
    let mut at_base = 0;
    let tables = RefCell::new(tables);
    Measured::interleaved(
        rounds,
        || {
            let mut outcome = Ok(());
            let time = typical(LIVES, || {
                if let Err(error) = devices.live(next(&mut at)) {
                    outcome = Err(error);
                }
            });
            outcome?;
            Ok(time)
        },
        || {
            let mut tables = tables.borrow_mut();
            Ok(typical(LIVES, || {
                let at = next(&mut at_base);
                tables.remove(indexes[at]);
                indexes[at] = tables.insert();
                tables.look_up(indexes[at]);
            }))
        },
    )
}

/// What the process of this role does: counts the memory of devices.
#[derive(Debug)]
pub(super) struct Counted;

impl Converse for Counted {
    fn answer(&mut self, words: &[&str]) -> Result<String> {
        let count = word(words, 1)?;
        // What the first device costs that no other does.
        let first = Devices::make(1)?;
        let before = resident()?;
        let devices = Devices::make(count)?;
        let after = resident()?;
        let made = devices.all.len() as u64;
        drop((first, devices));
        Ok((after.saturating_sub(before) / made).to_string())
    }
}

/// Bytes of this process's own memory that are in use (`VmRSS` less files).
fn resident() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kibibytes = line.and_then(|line| line.trim().strip_suffix(" kB"));
    let kibibytes: u64 = kibibytes.context("no RssAnon")?.trim().parse()?;
    Ok(kibibytes * 1024)
}

fn bytes(rounds: u32) -> Result<Measured> {
    Measured::interleaved(
        rounds.min(3),
        || Peer::start(Role::Registry, &[])?.number(&format!("count {MANY}")),
        || Ok(1024.0),
    )
}
