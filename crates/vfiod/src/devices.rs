//! The core's devices in the words of the control socket.

use crate::vfio_user::Sockets;
use client_process::{Pid, holders};
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use vfio_core::Core;
use vfio_core::device::{Device, Life, RequestChannel};
use vfio_core::event::{Event, Notice, Subscription, What};
use vfio_core::model::{BusDevice, IommuGroup, Subsystem, Waiting, mdev};
use vfio_fuse::Mounts;
use vfiod_control::Spec;
use vfiod_control::view::{
    self, Group, Holder, Irq, MdevType, Member, Parent, Pending, Region, Show, State, Tree, Via,
};

/// How often the users of a device were asked to leave, by the device's index.
#[derive(Debug)]
pub(crate) struct Requests {
    counts: Arc<Mutex<HashMap<u32, u32>>>,
    _subscription: Subscription,
}

impl Requests {
    pub(crate) fn watch(core: &Core) -> Requests {
        let counts: Arc<Mutex<HashMap<u32, u32>>> = Arc::default();
        let seen = Arc::clone(&counts);
        let subscription = core.subscribe(move |notice| {
            let Notice::Event(event) = notice else {
                return;
            };
            let mut counts = seen.lock().unwrap_or_else(PoisonError::into_inner);
            match event.what {
                What::Requested { count } => {
                    counts.insert(event.index, count.saturating_add(1));
                }
                What::Released => {
                    counts.remove(&event.index);
                }
                _ => {}
            }
        });
        Requests {
            counts,
            _subscription: subscription,
        }
    }

    fn of(&self, device: &Device) -> u32 {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.get(&device.index()).copied().unwrap_or(0)
    }
}

/// So many devices in use get a look through /proc when all are listed; of more, the openers are
/// told, which costs nothing.
const LOOKED_AT: usize = 16;

/// Everything that a question about devices needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Look<'a> {
    pub(crate) core: &'a Core,
    pub(crate) mounts: Option<&'a Mounts>,
    pub(crate) requests: &'a Requests,
    /// `None`: nothing is offered.
    pub(crate) sockets: Option<&'a Sockets>,
    pub(crate) sys: &'a Path,
    pub(crate) dev: &'a Path,
}

/// A device that was found by its name.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub(crate) bus_device: Arc<BusDevice>,
    pub(crate) vfio: Option<Device>,
    pub(crate) waiting: Option<Waiting>,
    pub(crate) view: view::Device,
}

impl Look<'_> {
    /// Every device that has a VFIO device, waits to lose it, or is mediated.
    pub(crate) fn all(&self) -> Vec<Found> {
        let mut found: Vec<Found> = Vec::new();
        let mut add =
            |bus_device: &Arc<BusDevice>, vfio: Option<Device>, waiting: Option<Waiting>| {
                if !found
                    .iter()
                    .any(|other| Arc::ptr_eq(&other.bus_device, bus_device))
                {
                    found.push(self.found(bus_device, vfio, waiting));
                }
            };
        // Those that wait come first: they are in no other list, or there without their names.
        for waiting in self.core.model().unregistering() {
            for device in waiting.vfio_devices() {
                let parent = Arc::clone(device.parent());
                add(&parent, Some(device), Some(waiting.clone()));
            }
        }
        let mut all: Vec<Found> = {
            for bus in self.core.model().buses() {
                for device in bus.devices() {
                    let vfio = device.vfio_device();
                    if vfio.is_some() || device.mdev().is_some() {
                        add(&device, vfio, None);
                    }
                }
            }
            for device in self.core.devices() {
                let parent = Arc::clone(device.parent());
                add(&parent, Some(device), None);
            }
            found
        };
        all.sort_by_cached_key(|found| {
            let index = found.vfio.as_ref().map_or(u32::MAX, Device::index);
            (index, found.view.address.clone())
        });
        all
    }

    /// The same, with those who hold each device now.
    pub(crate) fn all_with_holders(&self) -> Vec<Found> {
        let mut all = self.all();
        let in_use = |found: &Found| {
            let group = found.vfio.as_ref().and_then(Device::vfio_group);
            found.view.users.is_some_and(|users| users > 0)
                || group.is_some_and(|group| group.opener().is_some())
        };
        if all.iter().filter(|found| in_use(found)).count() <= LOOKED_AT {
            for found in all.iter_mut().filter(|found| in_use(found)) {
                self.look_who(found);
            }
        }
        all
    }

    fn look_who(&self, found: &mut Found) {
        let Some(vfio) = &found.vfio else {
            return;
        };
        let holders = self.who(vfio);
        if let Some(pending) = &mut found.view.pending {
            pending.holders.clone_from(&holders);
            pending.holders.retain(|holder| holder.via != Via::Group);
        }
        found.view.holders = Some(holders);
    }

    /// The devices of this name; more than one only for a group's.
    pub(crate) fn named(&self, name: &str) -> Vec<Found> {
        let spec = Spec::parse(name, self.sys, self.dev);
        // The usual name costs no look at ten thousand others.
        if let Spec::Name(name) = &spec
            && let Some(device) = self.core.device_by_name(name)
        {
            let parent = Arc::clone(device.parent());
            return vec![self.found(&parent, Some(device), None)];
        }
        let mut all = self.all();
        all.retain(|found| spec.matches(&found.view));
        all
    }

    fn found(
        &self,
        bus_device: &Arc<BusDevice>,
        vfio: Option<Device>,
        waiting: Option<Waiting>,
    ) -> Found {
        let vfio = vfio.or_else(|| bus_device.vfio_device());
        let group = bus_device.iommu_group();
        let registered = vfio
            .as_ref()
            .is_some_and(|device| device.life() == Life::Registered);
        let cdev = vfio
            .as_ref()
            .filter(|_| registered && self.core.config().cdev);
        let sockets = vfio
            .as_ref()
            .map(|device| self.sockets_of(device))
            .unwrap_or_default();
        let view = view::Device {
            name: vfio.as_ref().map(Device::name),
            address: bus_device.name().to_owned(),
            bus: match bus_device.subsystem() {
                Some(Subsystem::Bus(bus)) => Some((*bus).to_owned()),
                _ => None,
            },
            path: bus_device.devpath(),
            driver: bus_device.driver().map(|driver| driver.name().to_owned()),
            mdev_type: bus_device.mdev().map(|mdev| mdev.type_name().to_owned()),
            iommu_group: group.as_deref().map(IommuGroup::id),
            cdev: cdev
                .map(|device| format!("{}:{}", self.core.config().cdev_major, device.index())),
            node: cdev.filter(|_| self.mounts.is_some()).map(|device| {
                let node = self.dev.join("vfio/devices").join(device.name());
                node.to_string_lossy().into_owned()
            }),
            state: vfio
                .as_ref()
                .map_or(State::Unbound, |device| match device.life() {
                    Life::Allocated => State::Unbound,
                    Life::Registered => State::Registered,
                    Life::Unregistering | Life::Unregistered => State::Unregistering,
                    Life::Dead => State::Dead,
                }),
            users: vfio.as_ref().map(Device::users),
            open: vfio.as_ref().map(Device::is_open),
            holders: vfio.as_ref().map(|device| openers(device, &sockets)),
            pending: waiting
                .as_ref()
                .zip(vfio.as_ref())
                .map(|(waiting, device)| Pending {
                    holders: openers(device, &sockets),
                    ..self.pending_at(waiting, device)
                }),
            sockets,
        };
        Found {
            bus_device: Arc::clone(bus_device),
            vfio,
            waiting,
            view,
        }
    }

    /// One unregister that waits, and for whom.
    pub(crate) fn pending_of(&self, waiting: &Waiting, device: &Device) -> Pending {
        Pending {
            holders: self.users(device),
            ..self.pending_at(waiting, device)
        }
    }

    fn pending_at(&self, waiting: &Waiting, device: &Device) -> Pending {
        Pending {
            device: device.name(),
            address: device.parent().name().to_owned(),
            for_ms: u64::try_from(waiting.since().elapsed().as_millis()).unwrap_or(u64::MAX),
            users: device.users(),
            requests: self.requests.of(device),
            asked: device
                .asked()
                .map(|channel| channel == RequestChannel::Signalled),
            deadline_ms: None,
            holders: Vec::new(),
        }
    }

    /// All unregisters that wait.
    pub(crate) fn pending(&self) -> Vec<Pending> {
        let mut all = Vec::new();
        for waiting in self.core.model().unregistering() {
            for device in waiting.vfio_devices() {
                all.push(self.pending_of(&waiting, &device));
            }
        }
        all
    }

    /// Who holds it or its group now. A group's file keeps others out, but no unregister waits for it.
    pub(crate) fn who(&self, device: &Device) -> Vec<Holder> {
        let mut list = self.users(device);
        if let Some(group) = device.vfio_group().filter(|group| group.opener().is_some())
            && let Some(file) = self
                .mounts
                .and_then(|mounts| mounts.dev().group_file_id(&group))
        {
            for holder in holders(&[file], &ourselves()) {
                let holder = seen(holder, Via::Group);
                if !list.iter().any(|other| other.pid == holder.pid) {
                    list.push(holder);
                }
            }
        }
        list
    }

    fn sockets_of(&self, device: &Device) -> Vec<view::Socket> {
        self.sockets
            .map(|sockets| sockets.of(device))
            .unwrap_or_default()
    }

    /// Who holds it now: a look through /proc, completed by what is known of the opens.
    fn users(&self, device: &Device) -> Vec<Holder> {
        let opened = openers(device, &self.sockets_of(device));
        let Some(mounts) = self.mounts else {
            return opened;
        };
        let except = ourselves();
        let files = mounts.dev().file_ids(device);
        let mut list: Vec<Holder> = holders(&files, &except)
            .into_iter()
            .map(|holder| {
                let pid = holder.pid.as_raw_nonzero().get().unsigned_abs();
                let opened = opened.iter().find(|opener| opener.pid == pid);
                Holder {
                    pid,
                    command: holder.comm.to_string_lossy().into_owned(),
                    since_us: opened
                        .and_then(|opener| opener.since_us)
                        .or_else(|| micros(holder.since)),
                    since_open: opened.is_some(),
                    fds: holder.fds,
                    mapped_bytes: holder.mapped_bytes,
                    via: Via::Device,
                    ..Holder::default()
                }
            })
            .collect();
        // A connection is no file of the device: nothing in /proc tells of it.
        let connected = opened.iter().filter(|holder| holder.via == Via::Socket);
        list.extend(connected.cloned());
        // An open file that nobody was found to hold is in flight in a socket, or with a process
        // that we may not look into: its opener is the best that can be told.
        if list.is_empty() && device.users() > 0 {
            list.extend(opened.into_iter().map(|opener| Holder {
                via: Via::Opener,
                ..opener
            }));
        }
        list
    }

    /// All about a device.
    pub(crate) fn show(&self, found: &Found) -> Show {
        let mut found = found.clone();
        self.look_who(&mut found);
        let mut show = Show::default();
        if let Some(vfio) = &found.vfio {
            if let Ok(info) = vfio.info() {
                show.regions = (0..info.num_regions)
                    .filter_map(|index| Some((index, vfio.region(index).ok()?)))
                    .map(|(index, region)| Region {
                        index,
                        size: region.size,
                        flags: region.flags.bits(),
                    })
                    .filter(|region| region.size > 0)
                    .collect();
                show.irqs = (0..info.num_irqs)
                    .filter_map(|index| Some((index, vfio.irq(index).ok()?)))
                    .map(|(index, irq)| Irq {
                        index,
                        count: irq.count,
                        flags: irq.flags.bits(),
                    })
                    .filter(|irq| irq.count > 0)
                    .collect();
            }
            show.attributes = vfio
                .attributes()
                .iter()
                .filter_map(|(group, name)| {
                    Some((format!("{group}/{name}"), vfio.show(group, name).ok()?))
                })
                .collect();
        }
        show.group = found
            .bus_device
            .iommu_group()
            .map(|group| self.group(&group));
        show.device = found.view;
        show
    }

    fn group(&self, group: &IommuGroup) -> Group {
        let vfio = group.vfio();
        let number = |vfio: &Arc<vfio_core::group::Group>| {
            format!("{}:{}", self.core.config().group_major, vfio.minor())
        };
        let node = vfio.as_ref().filter(|_| self.mounts.is_some());
        Group {
            id: group.id(),
            name: group.name().map(str::to_owned),
            domain: None,
            cdev: vfio.as_ref().map(number),
            node: node.map(|vfio| {
                let node = self.dev.join("vfio").join(vfio.name());
                node.to_string_lossy().into_owned()
            }),
            open: vfio.as_ref().map(|vfio| vfio.opener().is_some()),
            members: members(group),
        }
    }

    /// What mediated devices can be made of.
    pub(crate) fn parents(&self) -> Vec<Parent> {
        let class = self.core.model().class("mdev_bus").unwrap_or_default();
        class
            .iter()
            .filter_map(|device| Some((device, device.mdev_parent()?)))
            .map(|(device, parent)| Parent {
                name: device.name().to_owned(),
                path: device.devpath(),
                types: types(&parent),
            })
            .collect()
    }

    /// All of it.
    pub(crate) fn tree(&self) -> Tree {
        let devices = self.all_with_holders();
        let mut groups: Vec<Arc<IommuGroup>> = devices
            .iter()
            .filter_map(|found| found.bus_device.iommu_group())
            .collect();
        groups.sort_by_key(|group| group.id());
        groups.dedup_by_key(|group| group.id());
        Tree {
            parents: self.parents(),
            devices: devices.into_iter().map(|found| found.view).collect(),
            groups: groups.iter().map(|one| self.group(one)).collect(),
        }
    }
}

fn types(parent: &Arc<mdev::Parent>) -> Vec<MdevType> {
    let devices = parent.devices();
    let ids = parent.type_names().map(str::to_owned);
    ids.enumerate()
        .map(|(ty, id)| MdevType {
            name: parent.pretty_name(ty).map(str::to_owned),
            device_api: parent.device_api().to_owned(),
            available: parent.available_instances(ty).unwrap_or(0),
            description: parent.description(ty),
            devices: devices
                .iter()
                .filter(|device| device.mdev().is_some_and(|mdev| mdev.type_index() == ty))
                .map(|device| device.name().to_owned())
                .collect(),
            id,
        })
        .collect()
}

/// Whom a scan leaves out.
fn ourselves() -> Vec<Pid> {
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    Pid::from_raw(own).into_iter().collect()
}

/// The members of a group.
fn members(group: &IommuGroup) -> Vec<Member> {
    let member = |device: &Arc<BusDevice>| Member {
        address: device.name().to_owned(),
        driver: device.driver().map(|driver| driver.name().to_owned()),
        blocks: false,
    };
    group.devices().iter().map(member).collect()
}

/// A process that a scan found.
fn seen(holder: client_process::Holder, via: Via) -> Holder {
    Holder {
        pid: holder.pid.as_raw_nonzero().get().unsigned_abs(),
        command: holder.comm.to_string_lossy().into_owned(),
        since_us: micros(holder.since),
        since_open: false,
        fds: holder.fds,
        mapped_bytes: holder.mapped_bytes,
        via,
        ..Holder::default()
    }
}

/// Who opened it, one entry a process. A process that is gone has passed the file on: what holds it
/// now, a look through /proc tells.
fn openers(device: &Device, sockets: &[view::Socket]) -> Vec<Holder> {
    let connected = sockets.iter().filter_map(|socket| socket.client.clone());
    let mut list: Vec<Holder> = connected.collect();
    for file in device.files() {
        let opener = file.opener();
        if list.iter().any(|other| other.pid == opener.pid) {
            continue;
        }
        let now = command_now(opener.pid, opener.since);
        let alive = now.is_some();
        list.push(Holder {
            pid: opener.pid,
            // A shell that opens a file for a command becomes the command.
            command: now.unwrap_or_else(|| opener.comm.clone()),
            since_us: micros(opener.since),
            since_open: true,
            via: if alive { Via::Device } else { Via::Opener },
            ..Holder::default()
        });
    }
    list
}

/// The name of a process that had started by `since`; one that started later has only its number.
fn command_now(pid: u32, since: SystemTime) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let rest = stat.get(stat.rfind(')')? + 1..)?;
    let ticks: u64 = rest.split_whitespace().nth(19)?.parse().ok()?;
    let hertz = rustix::param::clock_ticks_per_second().max(1);
    let started = Duration::from_millis(ticks.saturating_mul(1000) / hertz);
    let boot = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let uptime = Duration::new(
        u64::try_from(boot.tv_sec).ok()?,
        u32::try_from(boot.tv_nsec).ok()?,
    );
    let age = uptime.saturating_sub(started);
    // The clock of processes counts in hundredths of a second.
    let slack = Duration::from_millis(50);
    if SystemTime::now().checked_sub(age + slack)? > since {
        return None;
    }
    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some(comm.trim_end_matches('\n').to_owned())
}

/// An event in the words of the control socket.
pub(crate) fn event(event: &Event) -> vfiod_control::Event {
    let (what, count) = match event.what {
        What::Allocated => ("allocated", None),
        What::Registered => ("registered", None),
        What::Opened => ("opened", None),
        What::Bound => ("bound", None),
        What::Unbound => ("unbound", None),
        What::Closed => ("closed", None),
        What::Unregistering { users } => ("unregistering", Some(users)),
        What::Requested { count } => ("requested", Some(count)),
        What::Disassociated => ("disassociated", None),
        What::Unregistered => ("unregistered", None),
        What::Released => ("released", None),
        What::Panicked => ("panicked", None),
        _ => ("other", None),
    };
    let at = SystemTime::now().checked_sub(event.at.elapsed());
    vfiod_control::Event {
        at_us: at.and_then(micros).unwrap_or(0),
        device: event.device.clone(),
        address: event.parent.clone(),
        what: what.to_owned(),
        count,
    }
}

pub(crate) fn micros(time: SystemTime) -> Option<u64> {
    let since = time.duration_since(UNIX_EPOCH).ok()?;
    u64::try_from(since.as_micros()).ok()
}
