//! `vfiod demo`: the life of a device, step by step, with nothing left behind.
//!
//! The devices, the trees and the nodes are the real ones, in a mount namespace and a directory
//! of the demo's own; the client is a process of its own. Where the machine does not allow FUSE
//! the client is a thread that makes the same calls.

mod client;
mod picture;
mod place;
mod reach;
mod say;
mod sys;

use crate::devices::{Look, Requests};
use anyhow::{Context as _, bail};
use client::{Link, MARK, Part};
use place::{Place, Privacy};
use reach::{Reach, Us};
use say::{Teller, Who, count};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};
use vfio_core::device::Policy;
use vfio_core::event::{Notice, Subscription, What};
use vfio_core::model::{BusDevice, Outcome, mdev};
use vfio_core::{Config, Core};
use vfio_drivers::{mdpy, mtty};

/// How often the demo's devices ask their users to leave; the kernel's ten seconds are long for
/// an audience.
const EVERY: Duration = Duration::from_millis(400);

/// Nothing here takes longer.
const LIMIT: Duration = Duration::from_secs(30);

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

/// How many devices there have been.
#[derive(Debug, Default)]
struct Tally {
    allocated: AtomicU32,
    released: AtomicU32,
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
                    } else if !kernel_has_passthrough() {
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

/// A removal under way.
enum Removal {
    Writer(Child),
    Call(Outcome),
}

impl Removal {
    fn wait(self) -> anyhow::Result<()> {
        match self {
            Removal::Writer(mut writer) => ended(&mut writer, "the write"),
            Removal::Call(outcome) => done(outcome),
        }
    }
}

/// Writes to a file of our own mount as anybody would: from a process of its own. A thread of
/// this one could keep it from ending, were it stopped in the middle.
fn write(file: &Path, text: &str) -> anyhow::Result<Child> {
    Command::new("/bin/sh")
        .args(["-c", "printf %s \"$1\" > \"$0\""])
        .arg(file)
        .arg(text)
        .stdin(Stdio::null())
        .spawn()
        .context("starting a shell")
}

fn ended(child: &mut Child, what: &str) -> anyhow::Result<()> {
    let status = child.wait()?;
    if !status.success() {
        bail!("{what} failed: {status}");
    }
    Ok(())
}

fn done(outcome: Outcome) -> anyhow::Result<()> {
    Ok(outcome.wait_for(LIMIT).context("it did not end")??)
}

/// The client as the host has it: lines to read, and whoever writes them.
struct Client {
    teller: Arc<Teller>,
    lines: BufReader<Box<dyn std::io::Read + Send>>,
    input: Box<dyn Write + Send>,
    body: Body,
}

enum Body {
    Process(Child),
    Thread(Option<JoinHandle<anyhow::Result<()>>>),
}

impl Client {
    fn process(teller: &Arc<Teller>, part: Part, name: &str, dev: &Path) -> anyhow::Result<Client> {
        let part = clap::ValueEnum::to_possible_value(&part).context("no such part")?;
        let mut child = Command::new(std::env::current_exe().context("where this program is")?)
            .args([
                "demo",
                "--client",
                part.get_name(),
                "--device",
                name,
                "--nodes",
            ])
            .arg(dev)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting the client")?;
        let lines = child.stdout.take().context("no output")?;
        let input = child.stdin.take().context("no input")?;
        teller.line(
            Who::Host,
            &format!("a client is started, pid {}", child.id()),
        )?;
        Ok(Client {
            teller: Arc::clone(teller),
            lines: BufReader::new(Box::new(lines)),
            input: Box::new(input),
            body: Body::Process(child),
        })
    }

    fn thread(teller: &Arc<Teller>, part: Part, name: &str, core: &Core) -> anyhow::Result<Client> {
        let (ours, theirs) = UnixStream::pair()?;
        let reach = Reach::Inside(core.clone(), Arc::new(Us::default()));
        let mut link = Link::new(theirs.try_clone()?, theirs);
        let name = name.to_owned();
        let thread = std::thread::Builder::new()
            .name("client".into())
            .spawn(move || client::play(part, &reach, &name, &mut link))?;
        teller.line(Who::Host, "a client is started, as a thread")?;
        Ok(Client {
            teller: Arc::clone(teller),
            lines: BufReader::new(Box::new(ours.try_clone()?)),
            input: Box::new(ours),
            body: Body::Thread(Some(thread)),
        })
    }

    fn until(&mut self, point: &str) -> anyhow::Result<()> {
        self.until_one_of(&[point]).map(drop)
    }

    /// Passes on what the client says until it reaches a point.
    fn until_one_of(&mut self, points: &[&str]) -> anyhow::Result<String> {
        loop {
            let mut line = String::new();
            if self.lines.read_line(&mut line)? == 0 {
                self.end()?;
                bail!("the client ended before {}", points.join(" or "));
            }
            let line = line.trim_end();
            match line.strip_prefix(MARK) {
                Some(mark) if points.contains(&mark) => return Ok(mark.to_owned()),
                Some(_) => {}
                None => self.teller.line(Who::Client, line)?,
            }
        }
    }

    fn go_on(&mut self) -> anyhow::Result<()> {
        writeln!(self.input, "go")?;
        Ok(self.input.flush()?)
    }

    /// Waits for its end; an error of the client's is one of the demo's.
    fn end(&mut self) -> anyhow::Result<()> {
        match &mut self.body {
            Body::Process(child) => ended(child, "the client"),
            Body::Thread(thread) => match thread.take() {
                Some(thread) => thread.join().ok().context("the client panicked")?,
                None => Ok(()),
            },
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Body::Process(child) = &mut self.body {
            // After a failure: nothing is left behind.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Tells of life-cycle steps as they happen, and counts.
fn watch(
    teller: &Arc<Teller>,
    tally: &Arc<Tally>,
) -> impl Fn(&Notice) + Send + Sync + 'static + use<> {
    let (teller, tally) = (Arc::clone(teller), Arc::clone(tally));
    let drivers: Mutex<BTreeMap<u32, String>> = Mutex::default();
    move |notice| {
        let Notice::Event(event) = notice else { return };
        let text = match &event.what {
            What::Allocated => {
                tally.allocated.fetch_add(1, Ordering::AcqRel);
                let mut drivers = drivers.lock().unwrap_or_else(PoisonError::into_inner);
                drivers.insert(event.index, event.parent.clone());
                "init ran; it has the lowest free number, and nobody sees it".to_owned()
            }
            What::Registered => "registered: in sysfs, in a group, with a node".to_owned(),
            What::Opened => "opened: one user more".to_owned(),
            What::Bound => "first open: the driver's open ran".to_owned(),
            What::Unbound => "last close: the driver's close ran".to_owned(),
            What::Closed => "closed: one user less".to_owned(),
            What::Unregistering { users } => format!(
                "unregistering: its names are gone, {} to wait for",
                count(*users as usize, "user")
            ),
            What::Requested { count } => format!("request({count}): the user is asked to let go"),
            What::Disassociated => "its users are cut off".to_owned(),
            What::Unregistered => "unregistered".to_owned(),
            What::Released => {
                tally.released.fetch_add(1, Ordering::AcqRel);
                "released: the driver's state is dropped, the number is free".to_owned()
            }
            _ => return,
        };
        // Standard output may be gone; then nobody listens anyway.
        let _ = teller.line(Who::Core, &format!("{}: {text}", event.device));
    }
}

/// How long ago that was.
fn since(micros: u64) -> String {
    let then = SystemTime::UNIX_EPOCH + Duration::from_micros(micros);
    SystemTime::now()
        .duration_since(then)
        .map_or(String::new(), |ago| {
            format!(", for {:.1} s", ago.as_secs_f64())
        })
}

fn wait_until(what: &str, f: impl Fn() -> bool) -> anyhow::Result<()> {
    let end = Instant::now() + LIMIT;
    while !f() {
        if Instant::now() > end {
            bail!("{what} did not come");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

/// Linux 6.9 and newer.
fn kernel_has_passthrough() -> bool {
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= (6, 9),
        _ => true,
    }
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
