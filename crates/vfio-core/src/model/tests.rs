use super::testing::*;
use super::*;
use crate::Core;
use crate::device::{DeviceFile, Policy, ReleaseSlot};
use proptest::prelude::*;
use std::sync::atomic::{AtomicU32, Ordering};

#[test]
fn a_slot_is_taken_until_release() {
    let core = core();
    let slot = ReleaseSlot::new();
    let make = |name| {
        let driver = Plain {
            slot: Some(Arc::clone(&slot)),
            ..plain("ccw")
        };
        faux::Device::create(&core, name, driver)
    };
    let first = make("first").unwrap();
    assert_eq!(make("second").unwrap_err(), Errno::BUSY);
    // A reference that outlives the unregister keeps the place.
    let reference = first.bus_device().vfio_device().unwrap();
    assert_eq!(first.destroy(Policy::Wait).result(), Some(Ok(())));
    assert_eq!(make("second").unwrap_err(), Errno::BUSY);
    drop(reference);
    slot.wait_vacant();
    let second = make("second").unwrap();
    assert_eq!(second.destroy(Policy::Wait).result(), Some(Ok(())));
}

#[test]
fn one_driver_for_two_parents() {
    let core = core();
    let driver = Arc::new(Serial(Arc::new(AtomicU32::new(2))));
    let parents: Vec<_> = ["a", "b"]
        .map(|name| {
            let device = BusDevice::virtual_class("mtty", name);
            device.add(&core).unwrap();
            mdev::Parent::register::<Serial>(&core, &device, Arc::clone(&driver)).unwrap()
        })
        .into();
    let bus = core.model().bus("mdev").unwrap();
    for parent in &parents {
        parent
            .create_text(0, uuid(parent.device().id() as u32).as_bytes())
            .unwrap();
    }
    assert_eq!(parents[0].available_instances(0), Some(0));
    let other = BusDevice::virtual_class("mtty", "c");
    other.add(&core).unwrap();
    let clash = mdev::Parent::register(&core, &other, Serial(Arc::default()));
    assert_eq!(
        clash.unwrap_err(),
        Errno::BUSY,
        "another driver of this name"
    );
    for (parent, left) in parents.iter().zip([true, false]) {
        assert_eq!(parent.unregister(Policy::Wait).result(), Some(Ok(())));
        assert_eq!(bus.driver("serial").is_some(), left);
    }
    assert_eq!(driver.0.load(Ordering::SeqCst), 2);
}

#[test]
fn a_deadline_cuts_users_off() {
    let core = core();
    let device = faux::Device::create(&core, "a", plain("late")).unwrap();
    let vfio = device.bus_device().vfio_device().unwrap();
    let file = vfio.open_cdev(opener()).unwrap();
    drop(vfio);
    let policy = Policy::WaitThenDisassociate(std::time::Duration::from_millis(20));
    let outcome = device.destroy(policy);
    assert!(outcome.result().is_none());
    assert_eq!(outcome.wait_for(SOON), Some(Ok(())));
    assert_eq!(file.read(0, &mut [0]), Err(Errno::NODEV));
    assert!(core.model().bus("faux").unwrap().devices().is_empty());
}

#[test]
fn a_deadline_also_counts_for_waits_that_had_none() {
    let core = core();
    let parent = serial(&core);
    let [unbound, removed] = [0, 1].map(|n| {
        let device = parent.create_text(0, uuid(n).as_bytes()).unwrap();
        let file = device.vfio_device().unwrap().open_cdev(opener()).unwrap();
        (device, file)
    });
    let unbind = unbound.0.unbind(&core, Policy::Wait);
    let remove = mdev::remove(&core, &removed.0, Policy::Wait);
    assert!(unbind.result().is_none() && remove.result().is_none());
    let policy = Policy::WaitThenDisassociate(std::time::Duration::from_millis(5));
    let outcome = parent.unregister(policy);
    for outcome in [outcome, unbind, remove] {
        assert_eq!(outcome.wait_for(SOON), Some(Ok(())));
    }
    assert!(parent.devices().is_empty());
}

#[test]
fn creates_race_and_one_wins() {
    let core = core();
    let parent = serial(&core);
    for round in 0..50 {
        let results: Vec<Result<_>> = std::thread::scope(|scope| {
            let racers: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| parent.create_text(0, uuid(round).as_bytes())))
                .collect();
            racers
                .into_iter()
                .map(|racer| racer.join().unwrap())
                .collect()
        });
        let won: Vec<_> = results.iter().flatten().collect();
        assert_eq!(won.len(), 1);
        assert!(
            results
                .iter()
                .all(|result| matches!(result, Ok(_) | Err(Errno::EXIST)))
        );
        // And one of two removals.
        let device = won[0];
        let ended: Vec<_> = std::thread::scope(|scope| {
            let racers: Vec<_> = (0..2)
                .map(|_| scope.spawn(|| mdev::remove(&core, device, Policy::Wait).result()))
                .collect();
            racers
                .into_iter()
                .map(|racer| racer.join().unwrap())
                .collect()
        });
        assert!(ended.contains(&Some(Ok(()))) && ended.contains(&Some(Err(Errno::NODEV))));
    }
    assert_eq!(parent.available_instances(0), Some(24));
}

/// What may be done to one of a few mdevs.
#[derive(Clone, Copy, Debug)]
enum Step {
    Create { who: usize, ports: u32 },
    Remove(usize),
    Unbind(usize),
    Open(usize),
    Close(usize),
    Force(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let who = 0..4usize;
    prop_oneof![
        (who.clone(), 1..=2u32).prop_map(|(who, ports)| Step::Create { who, ports }),
        who.clone().prop_map(Step::Remove),
        who.clone().prop_map(Step::Unbind),
        who.clone().prop_map(Step::Open),
        who.clone().prop_map(Step::Close),
        who.prop_map(Step::Force),
    ]
}

/// The contract in a few words, for one uuid.
#[derive(Default)]
struct Slot {
    device: Option<Arc<BusDevice>>,
    /// Held by the driver's state.
    ports: u32,
    bound: bool,
    removing: bool,
    files: Vec<Arc<DeviceFile>>,
    /// Files that no longer count.
    dead: Vec<Arc<DeviceFile>>,
}

impl Slot {
    /// What follows when the users have gone.
    fn settle(&mut self) {
        if self.files.is_empty() {
            if !self.bound {
                self.ports = 0;
            }
            if self.removing {
                *self = Slot {
                    dead: std::mem::take(&mut self.dead),
                    ..Slot::default()
                };
            }
        }
    }
}

const PORTS: u32 = 5;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn like_the_contract(steps in prop::collection::vec(step(), 1..60)) {
        let core = core();
        let parent_device = BusDevice::virtual_class("mtty", "mtty");
        parent_device.add(&core).unwrap();
        let budget = Arc::new(AtomicU32::new(PORTS));
        let parent =
            mdev::Parent::register(&core, &parent_device, Serial(Arc::clone(&budget))).unwrap();
        let bus = core.model().bus("mdev").unwrap();
        let mut slots: Vec<Slot> = (0..4).map(|_| Slot::default()).collect();
        for step in steps {
            let left = PORTS - slots.iter().map(|slot| slot.ports).sum::<u32>();
            match step {
                Step::Create { who, ports } => {
                    let made = parent.create_text(ports as usize - 1, uuid(who as u32).as_bytes());
                    let slot = &mut slots[who];
                    if slot.device.is_some() {
                        prop_assert_eq!(made.unwrap_err(), Errno::EXIST);
                    } else if left < ports {
                        prop_assert_eq!(made.unwrap_err(), Errno::NOSPC);
                    } else {
                        slot.device = Some(made.unwrap());
                        slot.ports = ports;
                        slot.bound = true;
                    }
                }
                Step::Remove(who) => {
                    let slot = &mut slots[who];
                    let Some(device) = &slot.device else { continue };
                    let outcome = mdev::remove(&core, device, Policy::Wait);
                    if slot.removing {
                        prop_assert_eq!(outcome.result(), Some(Err(Errno::NODEV)));
                    } else {
                        let expected = slot.files.is_empty().then_some(Ok(()));
                        prop_assert_eq!(outcome.result(), expected);
                        slot.removing = true;
                        slot.bound = false;
                        slot.settle();
                    }
                }
                Step::Unbind(who) => {
                    let slot = &mut slots[who];
                    let Some(device) = &slot.device else { continue };
                    let outcome = device.unbind(&core, Policy::Wait);
                    if slot.bound {
                        let expected = slot.files.is_empty().then_some(Ok(()));
                        prop_assert_eq!(outcome.result(), expected);
                        slot.bound = false;
                        slot.settle();
                    } else {
                        prop_assert_eq!(outcome.result(), Some(Err(Errno::NODEV)));
                    }
                }
                Step::Open(who) => {
                    let slot = &mut slots[who];
                    let Some(device) = &slot.device else { continue };
                    let vfio = device.vfio_device();
                    prop_assert_eq!(vfio.is_some(), slot.bound);
                    if let Some(vfio) = vfio {
                        slot.files.push(vfio.open_cdev(opener()).unwrap());
                    }
                }
                Step::Close(who) => {
                    let slot = &mut slots[who];
                    slot.dead.pop();
                    if slot.files.pop().is_some() {
                        slot.settle();
                    }
                }
                Step::Force(who) => {
                    let slot = &mut slots[who];
                    let Some(device) = &slot.device else { continue };
                    let waiting = core.model().unregistering_device(device);
                    prop_assert_eq!(waiting.is_some(), !slot.bound && !slot.files.is_empty());
                    if let Some(waiting) = waiting {
                        waiting.disassociate();
                        slot.dead.append(&mut slot.files);
                        slot.settle();
                    }
                }
            }
            let names = |keep: fn(&Slot) -> bool| -> Vec<String> {
                let there = slots.iter().zip(0..).filter(|(slot, _)| keep(slot));
                there.map(|(_, n)| uuid(n)).collect()
            };
            let named = |devices: Vec<Arc<BusDevice>>| -> Vec<String> {
                devices.iter().map(|device| device.name().to_owned()).collect()
            };
            prop_assert_eq!(named(bus.devices()), names(|s| s.device.is_some() && !s.removing));
            prop_assert_eq!(named(parent.devices()), names(|s| s.device.is_some()));
            prop_assert_eq!(core.devices().len(), names(|s| s.bound).len());
            let waiting = names(|s| s.device.is_some() && !s.bound && !s.files.is_empty());
            prop_assert_eq!(core.model().unregistering().len(), waiting.len());
            let in_group = names(|s| s.bound || !s.files.is_empty());
            prop_assert_eq!(core.iommu_groups().all().len(), in_group.len());
            let used: u32 = slots.iter().map(|slot| slot.ports).sum();
            prop_assert_eq!(budget.load(Ordering::SeqCst), PORTS - used);
        }
        let outcome = parent.unregister(Policy::Disassociate);
        prop_assert_eq!(outcome.result(), Some(Ok(())));
        prop_assert_eq!(budget.load(Ordering::SeqCst), PORTS);
        prop_assert!(core.devices().is_empty() && bus.devices().is_empty());
    }
}

/// What a driver does while its `args` runs.
type Meanwhile = Box<dyn Fn(&Arc<BusDevice>) -> Result<Ports> + Send + Sync>;

struct Hooked(Meanwhile);

impl mdev::Driver for Hooked {
    type Ops = Dummy;

    fn name(&self) -> &'static str {
        "hooked"
    }

    fn types(&self) -> Vec<mdev::Type> {
        vec![mdev::Type {
            sysfs_name: "only",
            pretty_name: None,
        }]
    }

    fn max_instances(&self) -> u32 {
        1
    }

    fn args(&self, device: &Arc<BusDevice>, _ty: &mdev::Type) -> Result<Ports> {
        (self.0)(device)
    }
}

fn hooked(core: &Core, meanwhile: Meanwhile) -> Arc<mdev::Parent> {
    let device = BusDevice::virtual_class("hooked", "hooked");
    device.add(core).unwrap();
    mdev::Parent::register(core, &device, Hooked(meanwhile)).unwrap()
}

#[test]
fn remove_during_create_can_be_tried_again() {
    let core = core();
    let inside = core.clone();
    let parent = hooked(
        &core,
        Box::new(move |device| {
            let again = Some(Err(Errno::AGAIN));
            let remove = mdev::remove(&inside, device, Policy::Wait);
            assert_eq!(remove.result(), again);
            assert_eq!(device.remove(&inside, Policy::Wait).result(), again);
            assert_eq!(device.unbind(&inside, Policy::Wait).result(), again);
            let driver = device.driver().expect("its driver is seen from the start");
            assert_eq!(device.bind(&inside, &driver), Err(Errno::BUSY));
            Ok((0, Arc::default()))
        }),
    );
    let device = parent.create_text(0, UUID.as_bytes()).unwrap();
    let remove = mdev::remove(&core, &device, Policy::Wait);
    assert_eq!(remove.result(), Some(Ok(())));
}

#[test]
fn a_panic_in_a_probe_is_eio_and_nothing_more() {
    let core = core();
    let parent = hooked(&core, Box::new(|_| panic!("the test asked for it")));
    for _ in 0..3 {
        // Neither the uuid nor the one instance is lost.
        let made = parent.create_text(0, UUID.as_bytes());
        assert_eq!(made.unwrap_err(), Errno::IO);
    }
    assert_eq!(parent.available_instances(0), Some(1));
    assert!(parent.devices().is_empty());
}

#[test]
fn the_end_of_a_parent_waits_for_a_create() {
    let core = core();
    let barrier = Arc::new(std::sync::Barrier::new(2));
    let inside = Arc::clone(&barrier);
    let parent = hooked(
        &core,
        Box::new(move |_| {
            inside.wait();
            inside.wait();
            Ok((0, Arc::default()))
        }),
    );
    std::thread::scope(|scope| {
        let create = scope.spawn(|| parent.create_text(0, UUID.as_bytes()));
        barrier.wait();
        let unregister = scope.spawn(|| parent.unregister(Policy::Wait).result());
        let late = mdev::remove(&core, &parent.devices()[0], Policy::Wait);
        assert_eq!(late.result(), Some(Err(Errno::AGAIN)));
        barrier.wait();
        // A create that got in succeeds, and its device goes with the others.
        assert!(create.join().unwrap().is_ok());
        assert_eq!(unregister.join().unwrap(), Some(Ok(())));
    });
    assert!(parent.devices().is_empty());
    assert!(core.devices().is_empty());
    let after = parent.create_text(0, UUID.as_bytes());
    assert_eq!(after.unwrap_err(), Errno::NODEV);
}

#[test]
fn listeners_may_look_at_everything() {
    let core = core();
    let inside = core.clone();
    let seen = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&seen);
    let _subscription = core.subscribe(move |_| {
        // Would hang if an event were sent under one of the model's locks.
        let model = inside.model();
        for bus in model.buses() {
            for device in bus.devices() {
                let _ = (device.driver(), device.vfio_device(), device.children());
            }
        }
        let _ = (
            model.unregistering(),
            model.class("mdev_bus"),
            model.roots("/devices"),
        );
        let _ = (inside.devices(), inside.iommu_groups().all());
        count.fetch_add(1, Ordering::SeqCst);
    });
    let parent = serial(&core);
    let device = parent.create_text(0, UUID.as_bytes()).unwrap();
    let file = device.vfio_device().unwrap().open_cdev(opener()).unwrap();
    let outcome = parent.unregister(Policy::Wait);
    drop(file);
    assert_eq!(outcome.wait_for(SOON), Some(Ok(())));
    assert_eq!(
        parent.device().remove(&core, Policy::Wait).result(),
        Some(Ok(()))
    );
    assert!(seen.load(Ordering::SeqCst) > 10);
}
