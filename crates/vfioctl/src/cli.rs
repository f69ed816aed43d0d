//! The command line.

use clap::{Args, Parser, Subcommand};
use std::ffi::OsString;
use std::path::PathBuf;

/// See and operate VFIO devices: those of vfiod, and those of a kernel's own /sys.
///
/// DEV is vfioN, a UUID, a PCI address, BUS/ADDRESS, or a path of the device's directory or node.
#[derive(Debug, Parser)]
#[command(
    name = "vfioctl",
    version,
    after_help = "Exit status: 0 done, 1 error, 2 usage, 3 not found, 4 busy or in use, 5 timeout, \
                  6 daemon unreachable.\n`run` exits with the command's status; 125 to 127 are its \
                  own failures."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What every command takes.
#[derive(Clone, Debug, Args)]
pub(crate) struct Global {
    /// Print JSON: one object, with its schema's version; events are one object a line.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// The daemon's control socket.
    #[arg(long, global = true, value_name = "PATH", env = "VFIOD_SOCKET")]
    pub(crate) socket: Option<PathBuf>,
    /// The directory given to `vfiod serve --root`; --socket goes before it.
    #[arg(long, global = true, value_name = "DIR", env = "VFIOD_ROOT")]
    pub(crate) root: Option<PathBuf>,
    /// Read this sysfs tree and ask no daemon.
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) sys: Option<PathBuf>,
    /// Where the nodes of that tree are.
    #[arg(long = "dev", global = true, value_name = "DIR", requires = "sys")]
    pub(crate) nodes: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// What there is, bound to what, open by whom.
    List,
    /// The same, with each device in its place.
    Tree,
    /// All about one device.
    Show {
        /// Which device.
        dev: String,
    },
    /// What mediated devices can be made.
    Types {
        /// Of this parent only.
        parent: Option<String>,
    },
    /// Make a mediated device and print its UUID.
    Start {
        /// The type, as `types` prints it.
        #[arg(value_name = "TYPE")]
        mdev_type: String,
        /// Its UUID; a random one otherwise.
        #[arg(long, short)]
        uuid: Option<String>,
        /// The parent, if several have the type.
        #[arg(long, short)]
        parent: Option<String>,
    },
    /// Remove a mediated device.
    Stop {
        /// Which device.
        dev: String,
        #[command(flatten)]
        policy: Policy,
    },
    /// Bind a device to a driver.
    Bind {
        /// Which device.
        dev: String,
        /// The driver: vfio-pci on PCI, the one of its parent for mediated devices.
        #[arg(long, short)]
        driver: Option<String>,
        #[command(flatten)]
        policy: Policy,
    },
    /// Take a device from its driver.
    Unbind {
        /// Which device.
        dev: String,
        #[command(flatten)]
        policy: Policy,
    },
    /// Offer a device to clients that speak vfio-user, and print the socket's path.
    Offer {
        /// Which device.
        dev: String,
        /// Where the socket shall be, instead of among the others; for root.
        #[arg(long, value_name = "PATH")]
        path: Option<PathBuf>,
    },
    /// Take a device's vfio-user sockets away and close their connections.
    Withdraw {
        /// Which device.
        dev: String,
    },
    /// Print the arguments that attach devices to QEMU, quoted for a shell.
    ///
    /// They are meant for `eval "qemu-system-x86_64 ... $(vfioctl qemu-args DEV)"`. All ways but
    /// vfio-user want QEMU to run under `vfioctl run`.
    QemuArgs {
        /// Which devices.
        #[arg(required = true)]
        dev: Vec<String>,
        /// How QEMU reaches it; over vfio-user if it is offered, else by path.
        #[arg(long, value_enum, value_name = "WAY")]
        via: Option<Via>,
        /// The guest's memory, as QEMU's -m takes it. It is shared with the device.
        #[arg(long, short, value_name = "SIZE", default_value = "1G", value_parser = size)]
        memory: String,
    },
    /// Who holds a device now.
    Who {
        /// Which device.
        dev: String,
    },
    /// Wait for a device.
    Wait {
        /// Which device.
        dev: String,
        /// Until it is gone: unregistered, closed by all, released.
        #[arg(long, required = true)]
        gone: bool,
        /// Give up after so many seconds.
        #[arg(long, value_name = "SECONDS", value_parser = seconds, allow_negative_numbers = true)]
        timeout: Option<std::time::Duration>,
    },
    /// Print life-cycle events as they happen.
    Events,
    /// How the daemon is.
    Status,
    /// What this machine can and cannot do for vfiod, and what to do about it.
    ///
    /// Everything is tried, nothing is left behind. Exits with 1 if something essential is missing.
    Doctor,
    /// Run a command that finds vfiod's devices in /sys and /dev, beside the machine's own.
    ///
    /// The command gets a mount namespace of its own; nothing changes outside.
    Run {
        #[command(flatten)]
        options: RunOptions,
        /// The command and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
    /// Writes text into a file of sysfs, in a process of its own: the write may never return.
    #[command(hide = true)]
    InternalWrite { file: PathBuf, text: String },
    /// Starts a program that is nobody's child and prints its number.
    #[command(hide = true)]
    InternalDetach {
        /// The program and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
    /// Tries things out for `doctor` and prints what came of it.
    #[command(hide = true)]
    InternalDoctor(crate::doctor::Role),
    /// Sends vfiod's uevents into this network namespace while a process lives.
    #[command(hide = true)]
    InternalUevents { pid: i32 },
}

/// How a command is run.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct RunOptions {
    #[command(flatten)]
    pub(crate) own: crate::run::UserOptions,
    /// A network namespace of its own, into which uevents of vfiod's devices are sent. The
    /// command then has no network but loopback.
    #[arg(long)]
    pub(crate) uevents: bool,
    /// Answer no system calls for the command: no ioctl returns a descriptor, and our nodes are
    /// regular files to it. For where another program supervises it already.
    #[arg(long)]
    pub(crate) no_supervisor: bool,
}

/// How QEMU reaches a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Via {
    /// Its vfio-user socket: QEMU 10.1 or newer, as any user who may connect.
    VfioUser,
    /// Descriptors that the shell opens: needs no char devices.
    Fd,
    /// Its node and iommufd, by path.
    Path,
    /// Its IOMMU group and a container, by path.
    Group,
}

/// What happens to the users of a device that is to go.
#[derive(Clone, Copy, Debug, Default, Args)]
pub(crate) struct Policy {
    /// Ask its users to leave and wait for them, for ever (the default; what the kernel does).
    #[arg(long, group = "policy")]
    pub(crate) wait: bool,
    /// Ask and wait so many seconds, then cut them off: they get ENODEV. A kernel's own device
    /// cannot be cut off: then give up waiting with status 5.
    #[arg(long, group = "policy", value_name = "SECONDS", value_parser = seconds, allow_negative_numbers = true)]
    pub(crate) timeout: Option<std::time::Duration>,
    /// Cut its users off now.
    #[arg(long, group = "policy")]
    pub(crate) force: bool,
}

/// A number of bytes with a suffix, as QEMU reads it; nothing else gets into a command line.
fn size(text: &str) -> Result<String, String> {
    let digits = text.trim_end_matches(['K', 'M', 'G', 'T', 'k', 'm', 'g', 't']);
    let sound = !digits.is_empty()
        && digits.bytes().all(|byte| byte.is_ascii_digit())
        && text.len() - digits.len() <= 1;
    if sound {
        Ok(text.to_owned())
    } else {
        Err("not a size; write 512M or 4G".to_owned())
    }
}

fn seconds(text: &str) -> Result<std::time::Duration, String> {
    let seconds: f64 = text
        .parse()
        .map_err(|_| "not a number of seconds".to_owned())?;
    std::time::Duration::try_from_secs_f64(seconds).map_err(|_| "no time in seconds".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn policies_exclude_each_other() {
        let parse = |args: &[&str]| Cli::try_parse_from(args);
        assert!(parse(&["vfioctl", "unbind", "vfio0", "--force"]).is_ok());
        assert!(parse(&["vfioctl", "unbind", "vfio0", "--timeout", "1.5"]).is_ok());
        for wrong in [
            &["vfioctl", "unbind", "vfio0", "--force", "--wait"][..],
            &["vfioctl", "unbind", "vfio0", "--timeout", "-1"],
            &["vfioctl", "unbind", "vfio0", "--timeout", "nan"],
            &["vfioctl", "unbind"],
            &["vfioctl", "wait", "vfio0"],
            &["vfioctl", "run"],
            &["vfioctl", "qemu-args", "vfio0", "--memory", "1G,x=y"],
            &["vfioctl", "qemu-args", "vfio0", "--via", "air"],
            &["vfioctl"],
        ] {
            assert_eq!(parse(wrong).unwrap_err().exit_code(), 2, "{wrong:?}");
        }
    }

    #[test]
    fn run_leaves_the_commands_options_alone() {
        let cli = Cli::try_parse_from(["vfioctl", "run", "--", "ls", "--json", "-l"]).unwrap();
        assert!(!cli.global.json);
        let Command::Run { command, .. } = cli.command else {
            panic!("not run");
        };
        assert_eq!(command, ["ls", "--json", "-l"]);
    }
}
