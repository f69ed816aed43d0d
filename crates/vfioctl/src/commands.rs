//! Each command: from the daemon when it answers, from a plain sysfs tree when it does not.

use crate::cli::{Cli, Command, Global, Policy};
use crate::fail::{Fail, Result};
use crate::plain::Plain;
use crate::print::{self, Style};
use crate::qemu;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use vfiod_control::client::{DEFAULT_SOCKET, EXIT_UNREACHABLE};
use vfiod_control::view::{Device, Holder, Refusal, SCHEMA, Show};
use vfiod_control::{Answer, Call, Client, FailureKind, UnregisterPolicy};

/// Where answers come from.
enum Source {
    Daemon(Client),
    Plain(Plain),
}

impl Source {
    fn name(&self) -> &'static str {
        match self {
            Source::Daemon(_) => "vfiod",
            Source::Plain(_) => "sysfs",
        }
    }
}

/// What `--json` prints: payloads under their names, beside schema and source.
#[derive(Serialize)]
struct Envelope<'a, P: Serialize> {
    schema: u32,
    source: &'a str,
    #[serde(flatten)]
    payload: P,
}

/// What `who --json` prints.
#[derive(Serialize)]
struct Who<'a> {
    holders: &'a [Holder],
    refused: Vec<&'a Refusal>,
}

struct Output {
    json: bool,
    style: Style,
    source: &'static str,
}

impl Output {
    /// One value under its name.
    fn put<T: Serialize>(&self, key: &str, value: &T, text: impl FnOnce(Style) -> String) {
        self.put_all(BTreeMap::from([(key, value)]), text);
    }

    /// Several, the fields of a structure.
    fn put_all(&self, payload: impl Serialize, text: impl FnOnce(Style) -> String) {
        if !self.json {
            print::out(&text(self.style));
            return;
        }
        let envelope = Envelope {
            schema: SCHEMA,
            source: self.source,
            payload,
        };
        match serde_json::to_string_pretty(&envelope) {
            Ok(text) => print::out(&format!("{text}\n")),
            Err(error) => eprintln!("vfioctl: {error}"),
        }
    }
}

/// Does what was asked; the exit code is 0 except for `run`.
pub(crate) fn run(cli: &Cli) -> Result<ExitCode> {
    let global = &cli.global;
    match &cli.command {
        Command::InternalWrite { file, text } => return crate::plain::internal_write(file, text),
        Command::InternalUevents { pid } => {
            return crate::run::internal_uevents(daemon(global)?, *pid);
        }
        Command::InternalDoctor(role) => return crate::doctor::internal(role),
        Command::Doctor => return crate::doctor::run(global),
        Command::Events => return events(global),
        Command::Status => return status(global),
        Command::InternalDetach { command } => return crate::run::internal_detach(command),
        Command::Run { options, command } => return crate::run::run(global, options, command),
        _ => {}
    }
    let mut source = source(global)?;
    let output = Output {
        json: global.json,
        style: Style::stdout(),
        source: source.name(),
    };
    match &cli.command {
        Command::List => {
            let devices = match &mut source {
                Source::Daemon(client) => expect(client, Call::List, |answer| match answer {
                    Answer::Devices(devices) => Some(devices),
                    _ => None,
                })?,
                Source::Plain(plain) => plain.list(),
            };
            if devices.is_empty() && !global.json {
                eprintln!("no VFIO devices");
            } else {
                output.put("devices", &devices, |style| print::list(style, &devices));
            }
        }
        Command::Tree => {
            let tree = match &mut source {
                Source::Daemon(client) => expect(client, Call::Tree, |answer| match answer {
                    Answer::Tree(tree) => Some(tree),
                    _ => None,
                })?,
                Source::Plain(plain) => plain.tree(),
            };
            if tree.devices.is_empty() && tree.parents.is_empty() && !global.json {
                eprintln!("no VFIO devices");
            } else {
                output.put("tree", &tree, |style| print::tree(style, &tree));
            }
        }
        Command::Show { dev } => {
            let show = show(&mut source, dev)?;
            output.put("show", &show, |style| print::show(style, &show));
        }
        Command::Types { parent } => {
            let types = match &mut source {
                Source::Daemon(client) => {
                    let call = Call::Types {
                        parent: parent.clone(),
                    };
                    expect(client, call, |answer| match answer {
                        Answer::Types(types) => Some(types),
                        _ => None,
                    })?
                }
                Source::Plain(plain) => plain.types(parent.as_deref())?,
            };
            if types.is_empty() && !global.json {
                eprintln!("nothing that mediated devices could be made of");
            } else {
                output.put("parents", &types, |style| print::types(style, &types));
            }
        }
        Command::Start {
            mdev_type,
            uuid,
            parent,
        } => {
            let uuid = match &mut source {
                Source::Daemon(client) => {
                    let call = Call::Start {
                        parent: parent.clone(),
                        mdev_type: mdev_type.clone(),
                        uuid: uuid.clone(),
                    };
                    expect(client, call, |answer| match answer {
                        Answer::Started { uuid, .. } => Some(uuid),
                        _ => None,
                    })?
                }
                Source::Plain(plain) => {
                    plain.start(parent.as_deref(), mdev_type, uuid.as_deref())?
                }
            };
            output.put("uuid", &uuid, |_| format!("{uuid}\n"));
        }
        Command::Stop { dev, policy } => match &mut source {
            Source::Daemon(client) => {
                let call = Call::Stop {
                    device: full(dev),
                    policy: wire_policy(policy),
                };
                leave(client, call, dev, &output)?;
            }
            Source::Plain(plain) => plain.stop(&full(dev), policy)?,
        },
        Command::Bind {
            dev,
            driver,
            policy,
        } => match &mut source {
            Source::Daemon(client) => {
                let call = Call::Bind {
                    device: full(dev),
                    driver: driver.clone(),
                };
                expect(client, call, |answer| match answer {
                    Answer::Done => Some(()),
                    _ => None,
                })?;
            }
            Source::Plain(plain) => plain.bind(&full(dev), driver.as_deref(), policy)?,
        },
        Command::Unbind { dev, policy } => match &mut source {
            Source::Daemon(client) => {
                let call = Call::Unbind {
                    device: full(dev),
                    policy: wire_policy(policy),
                };
                leave(client, call, dev, &output)?;
            }
            Source::Plain(plain) => plain.unbind(&full(dev), policy)?,
        },
        Command::Who { dev } => {
            let (holders, sockets) = match &mut source {
                Source::Daemon(_) => {
                    let device = show(&mut source, dev)?.device;
                    (device.holders.unwrap_or_default(), device.sockets)
                }
                Source::Plain(plain) => (plain.who(&full(dev))?, Vec::new()),
            };
            let payload = Who {
                holders: &holders,
                refused: sockets.iter().flat_map(|one| &one.refused).collect(),
            };
            output.put_all(&payload, |style| {
                print::who(style, dev, &holders) + &print::refusals(&sockets)
            });
        }
        Command::Offer { dev, path } => {
            let call = Call::Offer {
                device: full(dev),
                path: path.as_deref().map(absolute),
            };
            let path = expect(ours(&mut source)?, call, |answer| match answer {
                Answer::Offered { path } => Some(path),
                _ => None,
            })?;
            output.put("socket", &path, |_| format!("{path}\n"));
        }
        Command::Withdraw { dev } => {
            let call = Call::Withdraw { device: full(dev) };
            expect(ours(&mut source)?, call, |answer| match answer {
                Answer::Done => Some(()),
                _ => None,
            })?;
        }
        Command::QemuArgs { dev, via, memory } => {
            let devices = dev
                .iter()
                .map(|dev| Ok(show(&mut source, dev)?.device))
                .collect::<Result<Vec<Device>>>()?;
            let arguments = qemu::arguments(&devices, *via, memory)?;
            let here = |device: &Device| Path::new(&format!("/sys{}", device.path)).exists();
            if arguments.inside && !devices.iter().all(here) {
                eprintln!("vfioctl: QEMU finds it only when run by `vfioctl run --`");
            }
            output.put("args", &arguments.words, |_| {
                format!("{}\n", arguments.line())
            });
        }
        Command::Wait { dev, timeout, .. } => match &mut source {
            Source::Daemon(client) => {
                let call = Call::WaitGone {
                    device: full(dev),
                    timeout_ms: timeout.map(millis),
                };
                leave(client, call, dev, &output)?;
            }
            Source::Plain(plain) => plain.wait_gone(&full(dev), *timeout)?,
        },
        Command::Events
        | Command::Status
        | Command::InternalWrite { .. }
        | Command::InternalUevents { .. }
        | Command::InternalDetach { .. }
        | Command::InternalDoctor { .. }
        | Command::Doctor
        | Command::Run { .. } => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// The socket to use, and whether somebody asked for this one.
pub(crate) fn socket(global: &Global) -> (PathBuf, bool) {
    match (&global.socket, &global.root) {
        (Some(socket), _) => (socket.clone(), true),
        (None, Some(root)) => (root.join("vfiod.sock"), true),
        (None, None) => (PathBuf::from(DEFAULT_SOCKET), false),
    }
}

/// The daemon, for what only it can do.
pub(crate) fn daemon(global: &Global) -> Result<Client> {
    Ok(Client::connect(&socket(global).0)?)
}

fn source(global: &Global) -> Result<Source> {
    if let Some(sys) = &global.sys {
        if !sys.is_dir() {
            let message = format!("--sys {}: no such directory", sys.display());
            return Err(Fail::new(FailureKind::Usage, message));
        }
        let dev = global
            .nodes
            .clone()
            .unwrap_or_else(|| PathBuf::from("/dev"));
        return Ok(Source::Plain(Plain::new(sys, &dev)));
    }
    let (socket, asked) = socket(global);
    match Client::connect(&socket) {
        Ok(client) => Ok(Source::Daemon(client)),
        Err(error) if asked => Err(error.into()),
        Err(error) => {
            if error.source.kind() == std::io::ErrorKind::PermissionDenied {
                eprintln!("vfioctl: {error}; this is the machine's own /sys:");
            }
            Ok(Source::Plain(Plain::of_the_machine()))
        }
    }
}

/// The daemon, for what a plain sysfs tree has not.
fn ours(source: &mut Source) -> Result<&mut Client> {
    match source {
        Source::Daemon(client) => Ok(client),
        Source::Plain(_) => Err(Fail {
            code: EXIT_UNREACHABLE,
            message: "only devices of vfiod have sockets, and no vfiod answers; `vfiod serve` \
                      starts one"
                .to_owned(),
        }),
    }
}

/// All about one device.
fn show(source: &mut Source, dev: &str) -> Result<Show> {
    match source {
        Source::Daemon(client) => {
            let call = Call::Show { device: full(dev) };
            let show = expect(client, call, |answer| match answer {
                Answer::Show(show) => Some(show),
                _ => None,
            })?;
            Ok(*show)
        }
        Source::Plain(plain) => plain.show(&full(dev)),
    }
}

fn absolute(path: &Path) -> String {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    path.to_string_lossy().into_owned()
}

/// Sends `call` and takes the answer that `pick` knows.
fn expect<T>(client: &mut Client, call: Call, pick: impl FnOnce(Answer) -> Option<T>) -> Result<T> {
    let answer = client.call(call, |_| {})?;
    pick(answer).ok_or_else(|| Fail::failed("vfiod gave an answer that does not fit the question"))
}

/// A call that may wait for a device's users: says for whom, on standard error.
fn leave(client: &mut Client, call: Call, dev: &str, output: &Output) -> Result {
    let answer = client.call(call, |progress| {
        if let Answer::Progress(pending) = progress {
            eprintln!("vfioctl: {}: {}", pending.device, print::waiting(pending));
        }
    })?;
    match answer {
        Answer::Ended(end) => {
            if end.users_cut_off && !output.json {
                eprintln!("vfioctl: {dev}: its users were cut off");
            }
            if output.json {
                output.put("ended", &end, |_| String::new());
            }
            Ok(())
        }
        Answer::Done => Ok(()),
        _ => Err(Fail::failed(
            "vfiod gave an answer that does not fit the question",
        )),
    }
}

fn status(global: &Global) -> Result<ExitCode> {
    let mut client = daemon(global)?;
    let status = expect(&mut client, Call::Status, |answer| match answer {
        Answer::Status(status) => Some(status),
        _ => None,
    })?;
    let output = Output {
        json: global.json,
        style: Style::stdout(),
        source: "vfiod",
    };
    output.put("status", &status, |style| print::status(style, &status));
    Ok(ExitCode::SUCCESS)
}

fn events(global: &Global) -> Result<ExitCode> {
    let mut client = daemon(global)?;
    let style = Style::stdout();
    let broken = |error: std::io::Error| {
        Fail::new(
            FailureKind::Failed,
            format!("the connection to vfiod broke: {error}"),
        )
    };
    client.send(Call::Events).map_err(broken)?;
    while let Some(answer) = client.reply().map_err(broken)? {
        match answer {
            Answer::Event(event) if global.json => {
                print::out(&format!(
                    "{}\n",
                    serde_json::json!({"schema": SCHEMA, "event": event})
                ));
            }
            Answer::Event(event) => print::out(&print::event(style, &event)),
            Answer::Lost { count } if global.json => {
                print::out(&format!(
                    "{}\n",
                    serde_json::json!({"schema": SCHEMA, "lost": count})
                ));
            }
            Answer::Lost { count } => eprintln!("vfioctl: {count} events were lost: too slow"),
            Answer::Error(failure) => return Err(failure.into()),
            _ => {}
        }
    }
    Err(Fail {
        code: EXIT_UNREACHABLE,
        message: "vfiod has ended".to_owned(),
    })
}

fn wire_policy(policy: &Policy) -> UnregisterPolicy {
    match (policy.force, policy.timeout) {
        (true, _) => UnregisterPolicy::Force,
        (false, Some(time)) => UnregisterPolicy::Timeout { ms: millis(time) },
        (false, None) => UnregisterPolicy::Wait,
    }
}

fn millis(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The daemon has another working directory: a path goes to it in full. A name that happens to be a
/// file's here stays a name.
fn full(dev: &str) -> String {
    if !dev.starts_with("./") && !dev.starts_with("../") {
        return dev.to_owned();
    }
    let path = std::fs::canonicalize(dev).or_else(|_| std::path::absolute(dev));
    path.map_or_else(
        |_| dev.to_owned(),
        |path| path.to_string_lossy().into_owned(),
    )
}
