//! `vfioctl run`: a command that finds vfiod's devices beside the machine's own.
//!
//! The command gets a mount namespace in which everything mounted outside goes on arriving and
//! nothing of ours gets out. Over `/sys` lies the daemon's merge tree, a live listing of its
//! directories and the machine's; on each entry that is only the machine's, the real thing is bound.
//! Over `/dev` lies a tmpfs with the machine's entries bound into it and the daemon's `vfio` and
//! `iommu` beside them. Then this process becomes the command: signals and exit status are its own.
//! What no file system can answer, another process does ([`supervisor`]).

mod machine;
mod net;
mod supervisor;
mod tree;
mod user;

use crate::cli::{Global, RunOptions as Options};
use crate::fail::{Fail, Result};
use crate::namespace;
use nix::sched::CloneFlags;
use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, FdFlags};
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};
use vfiod_control::view::Status;
use vfiod_control::{Answer, Call, Client};

/// Exit code for what `run` itself could not do, as `env`, `nohup` and `chroot` have it.
const OWN_FAILURE: u8 = 125;
/// The command is there and cannot be run.
const CANNOT_RUN: u8 = 126;
/// There is no such command.
const NO_COMMAND: u8 = 127;

pub(crate) use net::internal_uevents;
pub(crate) use user::{Options as UserOptions, internal_detach};

/// Becomes the command; returns only if that failed.
pub(crate) fn run(global: &Global, options: &Options, command: &[OsString]) -> Result<ExitCode> {
    let own = |fail: Fail| Fail {
        code: OWN_FAILURE,
        ..fail
    };
    let own_daemon = match options.own.user {
        true => Some(user::OwnDaemon::start(&options.own).map_err(own)?),
        false => None,
    };
    let global = &match &own_daemon {
        Some(daemon) => Global {
            socket: Some(daemon.socket()),
            ..global.clone()
        },
        None => global.clone(),
    };
    let mut client = crate::commands::daemon(global).map_err(own)?;
    let places = places(&mut client).map_err(own)?;
    drop(client);
    let supervisor = match options.no_supervisor {
        true => None,
        false => Some(supervisor::Waiting::start(&places).map_err(own)?),
    };
    enter(&places, options.uevents).map_err(own)?;
    if options.uevents {
        eprintln!("vfioctl: a network namespace of its own: uevents, and no network but loopback");
        net::start(&crate::commands::socket(global).0).map_err(own)?;
    }
    let Some((program, arguments)) = command.split_first() else {
        return Err(own(Fail::failed("no command")));
    };
    let mut command = Command::new(program);
    let lifeline = own_daemon.as_ref().map(user::OwnDaemon::lifeline);
    match (supervisor, lifeline) {
        (Some(supervisor), lifeline) => {
            supervisor.begin(lifeline).map_err(own)?;
            command.env(supervisor::VARIABLE, "1");
        }
        // Then it is the command that keeps the daemon, and those it leaves it to.
        (None, Some(lifeline)) => rustix::io::fcntl_setfd(lifeline, FdFlags::empty())
            .map_err(|errno| own(Fail::failed(format!("lifeline: {errno}"))))?,
        (None, None) => {}
    }
    if let Some(daemon) = &own_daemon {
        command.envs(daemon.environment()).env_remove("VFIOD_ROOT");
    }
    let error = command
        .args(arguments)
        // libudev believes only in a sysfs of the kernel's unless told (systemd,
        // `src/libsystemd/sd-device/sd-device.c`).
        .env("SYSTEMD_DEVICE_VERIFY_SYSFS", "0")
        .exec();
    Err(Fail {
        code: match error.kind() {
            std::io::ErrorKind::NotFound => NO_COMMAND,
            _ => CANNOT_RUN,
        },
        message: format!("{}: {error}", program.to_string_lossy()),
    })
}

/// Where the daemon's trees are.
struct Places {
    /// Its sysfs.
    sys: PathBuf,
    /// Its nodes.
    dev: PathBuf,
    /// Its sysfs with places for the machine's.
    merge: PathBuf,
    /// Its char devices: regions by major number, misc devices by minor number.
    regions: machine::Numbers,
    misc: machine::Numbers,
}

fn places(client: &mut Client) -> Result<Places> {
    let Answer::Status(Status {
        sys: Some(sys),
        dev: Some(dev),
        char_regions,
        misc_devices,
        ..
    }) = client.call(Call::Status, |_| {})?
    else {
        return Err(Fail::failed("this vfiod has nothing mounted"));
    };
    let Answer::Merge { path: merge } = client.call(Call::MergeTree, |_| {})? else {
        return Err(Fail::failed("this vfiod has no merge tree"));
    };
    for path in [&sys, &dev, &merge] {
        let there = rustix::fs::statfs(path.as_str());
        if there.is_ok_and(|fs| fs.f_type == FUSE_SUPER_MAGIC) {
            continue;
        }
        return Err(Fail::failed(format!(
            "{path} is not mounted here: vfiod runs in another mount namespace; run vfioctl in the \
             same"
        )));
    }
    Ok(Places {
        sys: sys.into(),
        dev: dev.into(),
        merge: merge.into(),
        regions: char_regions,
        misc: misc_devices,
    })
}

/// `include/uapi/linux/magic.h`
const FUSE_SUPER_MAGIC: rustix::fs::FsWord = 0x6573_5546;

/// Moves this process into the namespaces and builds both trees.
fn enter(places: &Places, uevents: bool) -> Result {
    let here = std::env::current_dir().ok();
    let mut flags = CloneFlags::CLONE_NEWNS;
    if uevents {
        flags |= CloneFlags::CLONE_NEWNET;
    }
    unshare(flags)?;
    // What is mounted outside from now on arrives here (each device in use has a mount of its
    // own); what is mounted here stays here.
    namespace::mounts_stay_inside()
        .map_err(|errno| Fail::failed(format!("mount propagation: {errno}")))?;
    let say = |what: &str, path: &Path| {
        let text = format!("{what} {}", path.display());
        move |errno: Errno| Fail::failed(format!("{text}: {errno}"))
    };
    let sys = Path::new("/sys");
    tree::merge_sys(&places.sys, &places.merge, sys).map_err(say("merging", sys))?;
    let dev = Path::new("/dev");
    tree::merge_dev(&places.dev, dev).map_err(say("merging", dev))?;
    if let Err((what, errno)) = machine::merge(&places.regions, &places.misc) {
        eprintln!("vfioctl: {what} is the machine's, without vfiod's part: {errno}");
    }
    if let Some(here) = here {
        // Otherwise a command started below /sys or /dev would still be in the tree underneath.
        let _ = std::env::set_current_dir(here);
    }
    Ok(())
}

/// `unshare()`; without the right to, in a user namespace with the same ids.
fn unshare(flags: CloneFlags) -> Result {
    let refused = |why: &dyn std::fmt::Display| {
        Fail::failed(format!(
            "no mount namespace: {why}; be root, or allow user namespaces"
        ))
    };
    match namespace::unshare(flags) {
        Err(Errno::PERM) => {
            namespace::own_user(flags).map_err(|error| refused(&error))?;
            eprintln!(
                "vfioctl: the command runs in a user namespace, where sudo and other setuid programs \
                 get no privileges: that is why they fail"
            );
            Ok(())
        }
        other => other.map_err(|errno| refused(&errno)),
    }
}

/// Waits for a child. False if it failed; where SIGCHLD is ignored, which is inherited, the kernel does
/// not say.
fn wait(child: &mut Child) -> std::io::Result<bool> {
    match child.wait() {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::CHILD) => Ok(true),
        status => status.map(|status| status.success()),
    }
}

/// A place that can be come back to when something else lies over it.
fn hold(path: &Path) -> std::result::Result<rustix::fd::OwnedFd, Errno> {
    rustix::fs::open(
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
}
