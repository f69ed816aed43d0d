//! What a call on a device costs, against a server that does nothing.

use anyhow::Result;

use super::Benchmark;
use super::Goal;
use super::measure::Measured;
use super::measure::Pinned;
use super::measure::median;
use super::peer::Peer;
use super::peer::Place;
use super::peer::Role;

/// Calls in one round.
const CALLS: u32 = 6_000;
/// How long two clients call at the same time, in milliseconds.
const WINDOW: u32 = 150;
/// Clients killed in one round.
const KILLED: usize = 7;

/// The rows of this file.
pub(super) const ROWS: [Benchmark; 6] = [
    Benchmark {
        name: "pread of 4 bytes",
        against: "a null FUSE server",
        goal: Goal::AtMost(1.15),
        known_miss: None,
        run: |rounds| same_cpu(rounds, "pread"),
    },
    Benchmark {
        name: "pwrite of 4 bytes",
        against: "a null FUSE server",
        goal: Goal::AtMost(1.15),
        known_miss: None,
        run: |rounds| same_cpu(rounds, "pwrite"),
    },
    Benchmark {
        name: "ioctl with an argument of 32 bytes",
        against: "a null FUSE server that copies it in and out (process_vm)",
        goal: Goal::AtMost(1.15),
        known_miss: None,
        run: |rounds| same_cpu(rounds, "ioctl"),
    },
    Benchmark {
        name: "pread of 4 bytes, client on another CPU",
        against: "a null FUSE server that follows the client",
        goal: Goal::AtMost(1.3),
        known_miss: None,
        run: other_cpu,
    },
    Benchmark {
        name: "two devices, two clients: preads a second",
        against: "two null mounts that follow their clients",
        goal: Goal::AtLeast(0.8),
        known_miss: None,
        run: two_clients,
    },
    Benchmark {
        name: "SIGKILL of a client until its device is closed",
        against: "a null FUSE server that sees RELEASE",
        goal: Goal::AtMost(2.0),
        known_miss: None,
        run: killed,
    },
];

/// Both servers, in a directory of their own.
#[derive(Debug)]
pub(super) struct Servers {
    pub(super) ours: Peer,
    pub(super) null: Peer,
    /// Goes last: what is mounted in it is gone by then.
    place: Place,
}

impl Servers {
    /// Starts them where this thread runs.
    pub(super) fn start(null: Role) -> Result<Self> {
        let place = Place::new()?;
        Ok(Self {
            ours: Peer::start(Role::Served, &[place.path()])?,
            null: Peer::start(null, &[place.path()])?,
            place,
        })
    }

    /// Makes a client open a device of ours and become its user.
    pub(super) fn bind(&self, client: &mut Peer, device: u32) -> Result<()> {
        let path = self.place.path();
        client.ask(&format!(
            "bind {path}/dev/vfio/devices/vfio{device} {path}/dev/iommu"
        ))?;
        Ok(())
    }

    /// Makes a client open a container and put the group of a device of ours into it.
    pub(super) fn contain(&self, client: &mut Peer) -> Result<()> {
        client.ask(&format!("contain {}/dev/vfio", self.place.path()))?;
        Ok(())
    }

    /// Makes a client open the file of a null server.
    pub(super) fn open(&self, client: &mut Peer, mount: u32) -> Result<()> {
        client.ask(&format!("open {}/null{mount}", self.place.path()))?;
        Ok(())
    }

    /// A client with both: node 0 is ours, node 1 the null server's.
    fn client(&self, number: u32) -> Result<Peer> {
        let mut client = Peer::start(Role::Client, &[])?;
        self.bind(&mut client, number)?;
        self.open(&mut client, number)?;
        Ok(client)
    }
}

fn same_cpu(rounds: u32, call: &str) -> Result<Measured> {
    let _pinned = Pinned::to(0)?;
    let servers = Servers::start(Role::Null)?;
    let client = std::cell::RefCell::new(servers.client(0)?);
    let calls = |node| {
        client
            .borrow_mut()
            .number(&format!("{call} {node} {CALLS}"))
    };
    Measured::interleaved(rounds, || calls(0), || calls(1))
}

fn other_cpu(rounds: u32) -> Result<Measured> {
    // Each starts somewhere, and has to find out that its client is on the second.
    let servers = Servers::start(Role::NullFollows)?;
    let client = std::cell::RefCell::new(servers.client(0)?);
    client.borrow_mut().ask("pin 1")?;
    let calls = |node| client.borrow_mut().number(&format!("pread {node} {CALLS}"));
    Measured::interleaved(rounds, || calls(0), || calls(1))
}

fn two_clients(rounds: u32) -> Result<Measured> {
    let servers = Servers::start(Role::NullFollows)?;
    let mut clients = Vec::new();
    for number in 0..2 {
        let mut client = servers.client(number)?;
        client.ask(&format!("pin {number}"))?;
        clients.push(client);
    }
    let clients = std::cell::RefCell::new(clients);
    let total = |node: u32| -> Result<f64> {
        let mut clients = clients.borrow_mut();
        for client in clients.iter_mut() {
            client.say(&format!("rate {node} {WINDOW}"))?;
        }
        let mut total = 0.0;
        for client in clients.iter_mut() {
            total += client.listen()?.parse::<f64>()?;
        }
        Ok(total)
    };
    Measured::interleaved(rounds, || total(0), || total(1))
}

fn killed(rounds: u32) -> Result<Measured> {
    let _pinned = Pinned::to(0)?;
    let servers = std::cell::RefCell::new(Servers::start(Role::Null)?);
    let times = |ours: bool| -> Result<f64> {
        let mut servers = servers.borrow_mut();
        let mut times = Vec::new();
        for _ in 0..KILLED {
            let mut client = Peer::start(Role::Client, &[])?;
            if ours {
                servers.bind(&mut client, 0)?;
            } else {
                servers.open(&mut client, 0)?;
            }
            let server = if ours {
                &mut servers.ours
            } else {
                &mut servers.null
            };
            server.say("closed")?;
            // Everybody has gone to sleep by then, as in life.
            std::thread::sleep(std::time::Duration::from_millis(2));
            let killed = client.kill()?;
            let closed: u64 = server.listen()?.parse()?;
            #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
            times.push(closed.saturating_sub(killed) as f64);
        }
        Ok(median(times))
    };
    Measured::interleaved(rounds, || times(true), || times(false))
}
