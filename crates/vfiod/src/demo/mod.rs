//! `vfiod demo`: the life of a device, step by step, with nothing left behind.
//!
//! The devices, the trees and the nodes are the real ones, in a mount namespace and a directory
//! of the demo's own; the client is a process of its own. Where the machine does not allow FUSE
//! the client is a thread that makes the same calls.

mod client;
mod events;
mod host;
mod picture;
mod place;
mod reach;
mod say;
mod sys;

use crate::devices::{Look, Requests};
use anyhow::{Context as _, bail};
use client::{Link, Part};
use events::{Tally, watch};
use host::{Client, Removal, done, ended, wait_until, write};
use place::{Place, Privacy};
use reach::Reach;
use say::{Teller, Who, count, since};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use vfio_core::device::Policy;
use vfio_core::event::Subscription;
use vfio_core::model::{BusDevice, mdev};
use vfio_core::{Config, Core};
use vfio_drivers::{mdpy, mtty};

/// How often the demo's devices ask their users to leave; the kernel's ten seconds are long for
/// an audience.
const EVERY: Duration = Duration::from_millis(400);

/// What the demo can be told, all of it for its own use and for its tests.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Do as if the machine lacked this.
    #[arg(long, value_enum, hide = true)]
    without: Vec<Lacking>,
    /// Be the client.
    #[arg(long, value_enum, hide = true, requires = "device")]
    client: Option<Part>,
    /// The client's device.
    #[arg(long, hide = true)]
    device: Option<String>,
    /// Where the client's nodes are.
    #[arg(long, hide = true)]
    nodes: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Lacking {
    /// Linux before 6.9.
    Passthrough,
    /// A container without /dev/fuse.
    Fuse,
}

/// Runs it.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if let (Some(part), Some(device), Some(nodes)) = (args.client, &args.device, &args.nodes) {
        // Without the demo there is nothing to use.
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        let reach = Reach::Nodes(nodes.clone());
        let mut link = Link::new(std::io::stdin(), std::io::stdout());
        return client::play(part, &reach, device, &mut link);
    }
    match Demo::new(args)?.tell() {
        // `vfiod demo | head`: the audience has seen enough, and all is taken away.
        Err(error) if is_broken_pipe(&error) => Ok(()),
        other => other,
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

struct Demo {
    teller: Arc<Teller>,
    core: Core,
    place: Option<Place>,
    limits: Vec<String>,
    parents: Vec<Arc<mdev::Parent>>,
    tally: Arc<Tally>,
    requests: Requests,
    descriptors: usize,
    _events: Subscription,
}

impl Demo {
    fn new(args: &Args) -> anyhow::Result<Demo> {
        let mut limits = Vec::new();
        let lacks = |what| args.without.contains(&what);
        // Before the first thread: a user namespace is for processes that have one.
        let privacy = if lacks(Lacking::Fuse) {
            Err("FUSE is left out as asked".to_owned())
        } else {
            place::namespace()
        };
        let cleaning = Arc::new(OnceLock::new());
        clean_up_on_signals(&cleaning)?;
        let descriptors = descriptors();
        let core = Core::new(Config {
            request_interval: EVERY,
            ..Config::default()
        });
        let passthrough = !lacks(Lacking::Passthrough);
        let place = match privacy {
            Ok(privacy) => match Place::new(&core, passthrough) {
                Ok(place) => {
                    if !passthrough {
                        limits.push("regions trap: native mapping is left out as asked".into());
                    } else if privacy == Privacy::User {
                        limits.push(
                            "regions trap: only the machine's root may back a FUSE file for native mapping"
                                .into(),
                        );
                    } else if !place::kernel_has_passthrough() {
                        limits.push(
                            "regions trap: this kernel has no FUSE passthrough (Linux 6.9)".into(),
                        );
                    }
                    Some(place)
                }
                Err(error) => {
                    limits.push(format!("no nodes, the client is a thread: {error:#}"));
                    None
                }
            },
            Err(why) => {
                limits.push(format!("no nodes, the client is a thread: {why}"));
                None
            }
        };
        if let Some(place) = &place {
            let _ = cleaning.set(place.dir().to_owned());
        }
        let teller = Arc::new(Teller::new());
        let tally = Arc::new(Tally::default());
        let events = core.subscribe(watch(&teller, &tally));
        Ok(Demo {
            requests: Requests::watch(&core),
            teller,
            core,
            place,
            limits,
            parents: Vec::new(),
            tally,
            descriptors,
            _events: events,
        })
    }

    fn tell(mut self) -> anyhow::Result<()> {
        let teller = Arc::clone(&self.teller);
        teller.plain("vfiod: the life of VFIO devices, under a core that owns it")?;
        for limit in &self.limits {
            teller.plain(&format!("(this machine: {limit})"))?;
        }
        let (serial, display) = self.start()?;
        self.tree()?;
        self.unplug_while_in_use(&serial)?;
        self.take_away_by_force(&display)?;
        self.end()
    }

    /// Two parents, two devices.
    fn start(&mut self) -> anyhow::Result<(String, String)> {
        self.teller.step("Two devices are made")?;
        self.teller.explain(
            "A uuid written to `create` makes a device: its driver's init runs, then it appears.",
        )?;
        let serial = BusDevice::virtual_class("mtty", "mtty");
        let display = BusDevice::virtual_class("mdpy", "mdpy");
        for parent in [&serial, &display] {
            parent
                .add(&self.core)
                .with_context(|| parent.name().to_owned())?;
        }
        let core = &self.core;
        self.parents = vec![
            mdev::Parent::register::<mtty::Driver>(core, &serial, mtty::Driver::new())?,
            mdev::Parent::register::<mdpy::Driver>(core, &display, mdpy::Driver::default())?,
        ];
        let mut names = Vec::new();
        for (parent, kind) in [(&serial, "mtty-2"), (&display, "mdpy-vga")] {
            let uuid = uuid::Uuid::new_v4();
            let dir = format!("{}/mdev_supported_types/{kind}", parent.devpath());
            match &self.place {
                Some(place) => {
                    let file = place.sys().join(dir.trim_start_matches('/')).join("create");
                    self.say(Who::Host, &format!("echo {uuid} > {}", file.display()))?;
                    ended(&mut write(&file, &uuid.to_string())?, "the write")?;
                }
                None => {
                    self.say(Who::Host, &format!("create {kind} {uuid}"))?;
                    let parent = parent.mdev_parent().context("not an mdev parent")?;
                    let ty = parent.type_named(kind).context("no such type")?;
                    parent.create(ty, uuid)?;
                }
            }
            names.push(uuid.to_string());
        }
        let [serial, display] = names.try_into().ok().context("two devices")?;
        Ok((serial, display))
    }

    /// What there is.
    fn tree(&self) -> anyhow::Result<()> {
        self.teller.step("What there is now")?;
        let tree = self.look().tree();
        for parent in &tree.parents {
            self.teller.plain(&format!("   {}", parent.name))?;
            for device in tree
                .devices
                .iter()
                .filter(|device| device.path.starts_with(&parent.path))
            {
                let kind = device.mdev_type.as_deref().unwrap_or("?");
                let driver = device.driver.as_deref().unwrap_or("no driver");
                self.teller
                    .plain(&format!("   └─ {} ({kind}, {driver})", device.address))?;
                if let Some(name) = &device.name {
                    let group = device
                        .iommu_group
                        .map_or(String::new(), |id| format!(", group {id}"));
                    let node = device.node.as_deref().unwrap_or("no node");
                    self.teller
                        .plain(&format!("      └─ {name}: {node}{group}"))?;
                }
            }
        }
        Ok(())
    }

    /// The kernel's way: ask, and wait until the user has gone.
    fn unplug_while_in_use(&self, uuid: &str) -> anyhow::Result<()> {
        self.teller.step("A program uses the serial card")?;
        let name = self.name_of(uuid)?;
        let mut client = self.client(Part::Serial, &name)?;
        client.until("ready")?;
        self.teller
            .step("The card is unplugged while the program has it open")?;
        self.teller.explain(
            "Its names go at once; then the driver asks the user to let go, and unplugging waits.",
        )?;
        let device = self
            .core
            .device_by_name(&name)
            .context("the device is gone already")?;
        let removal = self.remove(uuid, Policy::Wait)?;
        wait_until("unregister", || self.core.device_by_name(&name).is_none())?;
        for holder in self.look().who(&device) {
            let what = match (holder.fds.len(), holder.mapped_bytes) {
                (0, 0) => "by the file it opened".to_owned(),
                (fds, _) => format!("by {}", count(fds, "descriptor")),
            };
            let since = holder.since_us.map_or(String::new(), since);
            let who = format!(
                "held by {} (pid {}), {what}{since}",
                holder.command, holder.pid
            );
            self.say(Who::Core, &format!("{name}: {who}"))?;
        }
        drop(device);
        client.until("closed")?;
        client.end()?;
        removal.wait()?;
        self.say(
            Who::Host,
            "the write to `remove` returns: nothing of the card is left",
        )
    }

    /// What the kernel does not have: users are cut off.
    fn take_away_by_force(&self, uuid: &str) -> anyhow::Result<()> {
        self.teller.step("Another program draws on the display")?;
        let name = self.name_of(uuid)?;
        let mut client = self.client(Part::Display, &name)?;
        let mapped = client.until_one_of(&["mapped", "trapped"])? == "mapped";
        client.until("ready")?;
        let device = self
            .core
            .device_by_name(&name)
            .context("the device is gone already")?;
        let memory = device.memory()?.context("a display without memory")?;
        let lines = picture::look(|at| {
            let mut pixel = [0];
            memory.read(at as u64, &mut pixel).map(|()| pixel[0])
        })?;
        let how = if mapped {
            "without having been asked once"
        } else {
            "trap by trap"
        };
        self.say(Who::Host, &format!("sees in the device's memory, {how}:"))?;
        for line in &lines {
            self.teller.plain(&format!("              {line}"))?;
        }
        if !picture::is_ours(&lines) {
            bail!("the device's memory does not show what the client drew");
        }
        drop((memory, device));
        self.teller.step("The display is taken away by force")?;
        self.teller.explain(
            "Nobody is asked: calls get ENODEV, mappings are revoked, close and release follow.",
        )?;
        let removal = self.remove(uuid, Policy::Disassociate)?;
        removal.wait()?;
        client.go_on()?;
        client.until("closed")?;
        client.end()
    }

    fn end(mut self) -> anyhow::Result<()> {
        for parent in self.parents.drain(..) {
            let device = Arc::clone(parent.device());
            done(parent.unregister(Policy::Disassociate))?;
            drop(parent);
            done(device.remove(&self.core, Policy::Disassociate))?;
        }
        let dir = self.place.as_ref().map(|place| place.dir().to_owned());
        self.place = None;
        let (allocated, released) = (
            self.tally.allocated.load(Ordering::Acquire),
            self.tally.released.load(Ordering::Acquire),
        );
        wait_until("the last descriptor's end", || {
            descriptors() <= self.descriptors
        })?;
        let gone = dir.as_deref().is_none_or(|dir| !dir.exists());
        if allocated != released || allocated == 0 || !gone {
            bail!("{allocated} allocated, {released} released; directory gone: {gone}");
        }
        let allocated = count(allocated as usize, "device");
        self.teller.closing(&format!(
            "{allocated} allocated, {released} released, each exactly once; no file, mount or descriptor left."
        ))?;
        Ok(())
    }

    fn say(&self, who: Who, text: &str) -> anyhow::Result<()> {
        Ok(self.teller.line(who, text)?)
    }

    fn look(&self) -> Look<'_> {
        static NOWHERE: &str = "";
        let (sys, dev) = match &self.place {
            Some(place) => match place.mounts() {
                Some(mounts) => (mounts.sys().path(), mounts.dev().path()),
                None => (Path::new(NOWHERE), Path::new(NOWHERE)),
            },
            None => (Path::new(NOWHERE), Path::new(NOWHERE)),
        };
        Look {
            core: &self.core,
            mounts: self.place.as_ref().and_then(Place::mounts),
            requests: &self.requests,
            sockets: None,
            sys,
            dev,
        }
    }

    fn bus_device(&self, uuid: &str) -> anyhow::Result<Arc<BusDevice>> {
        let bus = self.core.model().bus("mdev").context("no mdev bus")?;
        bus.device(uuid)
            .with_context(|| format!("{uuid} is not on the bus"))
    }

    /// A client finds its device by the name below its parent's `vfio-dev`.
    fn name_of(&self, uuid: &str) -> anyhow::Result<String> {
        let device = self.bus_device(uuid)?;
        let vfio = device.vfio_device().context("no VFIO device")?;
        Ok(vfio.name())
    }

    fn client(&self, part: Part, name: &str) -> anyhow::Result<Client> {
        match &self.place {
            Some(place) => Client::process(&self.teller, part, name, &place.dev()),
            None => Client::thread(&self.teller, part, name, &self.core),
        }
    }

    fn remove(&self, uuid: &str, policy: Policy) -> anyhow::Result<Removal> {
        let device = self.bus_device(uuid)?;
        match &self.place {
            Some(place) if policy == Policy::Wait => {
                let dir = device.devpath();
                let file = place.sys().join(dir.trim_start_matches('/')).join("remove");
                self.say(Who::Host, &format!("echo 1 > …/{uuid}/remove"))?;
                Ok(Removal::Writer(write(&file, "1")?))
            }
            _ => {
                let how = if policy == Policy::Wait {
                    ""
                } else {
                    " --force"
                };
                self.say(Who::Host, &format!("vfioctl stop {uuid}{how}"))?;
                Ok(Removal::Call(mdev::remove(&self.core, &device, policy)))
            }
        }
    }
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

/// Ctrl-C and SIGTERM leave nothing behind either.
fn clean_up_on_signals(dir: &Arc<OnceLock<PathBuf>>) -> anyhow::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    let dir = Arc::clone(dir);
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            if let Some(signal) = signals.forever().next() {
                if let Some(dir) = dir.get() {
                    place::clean(dir);
                }
                #[expect(clippy::exit, reason = "the process was told to end")]
                std::process::exit(128 + signal);
            }
        })?;
    Ok(())
}
