//! The configuration: TOML files, later ones over earlier ones, key by key.
//!
//! Read in this order: `/usr/lib/vfiod/vfiod.toml`, `/etc/vfiod/vfiod.toml`, then
//! `/usr/lib/vfiod/conf.d/*.toml` and `/etc/vfiod/conf.d/*.toml` together by file name, where one in
//! /etc replaces one of the same name in /usr/lib.

use anyhow::Context as _;
use serde::de::{Deserializer, Error, Visitor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fmt, fs};
use vfio_drivers::mtty::port::BackendSpec;

/// One file, or all of them merged. What is absent has its default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Config {
    /// Char devices; true by default.
    pub(crate) cdev: Option<bool>,
    /// Seconds between the requests to a device's users to leave; 10 by default.
    pub(crate) request_interval: Option<Seconds>,
    /// First IOMMU group number; by default the first that the machine has not.
    pub(crate) first_iommu_group: Option<u32>,
    /// Where uevents go; nowhere by default.
    pub(crate) uevents: Option<Uevents>,
    /// How long a stopping daemon waits for users before it cuts them off; 10 s by default.
    pub(crate) stop_timeout: Option<Seconds>,
    /// What writes to sysfs do.
    #[serde(default)]
    pub(crate) sysfs: Sysfs,
    /// Owners and modes.
    #[serde(default)]
    pub(crate) nodes: Nodes,
    /// Sockets for clients that speak vfio-user.
    #[serde(default)]
    pub(crate) vfio_user: VfioUser,
    /// What mediated devices are made of, by name. Without any: an mtty and an mdpy.
    #[serde(default)]
    pub(crate) parents: BTreeMap<String, Parent>,
    /// Mediated devices to make at start, by UUID.
    #[serde(default)]
    pub(crate) mdevs: BTreeMap<uuid::Uuid, Mdev>,
}

/// A time in seconds, not negative.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub(crate) struct Seconds(pub(crate) Duration);

impl TryFrom<f64> for Seconds {
    type Error = String;

    fn try_from(seconds: f64) -> Result<Seconds, String> {
        Duration::try_from_secs_f64(seconds)
            .map(Seconds)
            .map_err(|_| format!("{seconds} is no time in seconds"))
    }
}

impl From<Seconds> for f64 {
    fn from(seconds: Seconds) -> f64 {
        seconds.0.as_secs_f64()
    }
}

/// Where uevents go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Uevents {
    /// Nowhere by itself; `vfioctl run --uevents` may still take them into a network namespace of
    /// its own.
    #[default]
    None,
    /// The same, said aloud.
    Private,
    /// To everybody in the daemon's own network namespace, the machine's udev included.
    Host,
}

/// `[sysfs]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Sysfs {
    /// What a write to `unbind` or `remove` does about users: `wait` as the kernel, `force`, or
    /// wait so many seconds.
    pub(crate) unregister: Option<Unregister>,
}

/// `"wait"`, `"force"` or a number of seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "\"wait\", \"force\" or a number of seconds")]
pub(crate) enum Unregister {
    /// A word.
    Word(UnregisterWord),
    /// A deadline.
    Seconds(Seconds),
}

/// The words of [`Unregister`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum UnregisterWord {
    /// For ever.
    Wait,
    /// Not at all.
    Force,
}

/// `[nodes]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Nodes {
    /// Mode of `vfio/devices/vfioN`, in octal; 600 by default.
    pub(crate) mode: Option<Mode>,
    /// Mode of `vfio/N`, the nodes of groups, in octal; that of devices by default.
    pub(crate) group_mode: Option<Mode>,
    /// Mode of `vfio/vfio`, in octal; 666 by default: a container is worth nothing without a group.
    pub(crate) container_mode: Option<Mode>,
    /// Mode of `iommu`, in octal; 660 by default.
    pub(crate) iommu_mode: Option<Mode>,
    /// Owner of all of them, by name or number; root by default.
    pub(crate) owner: Option<String>,
    /// Group, by name or number; root by default.
    pub(crate) group: Option<String>,
    /// Group of the control socket; `vfio` if there is such a group, else root.
    pub(crate) socket_group: Option<String>,
}

/// Permission bits, written as a string in octal: `"660"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(into = "String")]
pub(crate) struct Mode(pub(crate) u32);

impl TryFrom<String> for Mode {
    type Error = String;

    fn try_from(text: String) -> Result<Mode, String> {
        let digits = text.strip_prefix("0o").unwrap_or(&text);
        match u32::from_str_radix(digits, 8) {
            Ok(mode) if mode <= 0o777 && !digits.starts_with('+') => Ok(Mode(mode)),
            _ => Err(format!("{text:?} is no mode; write \"660\", in octal")),
        }
    }
}

impl<'de> Deserialize<'de> for Mode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Mode, D::Error> {
        struct Octal;
        impl Visitor<'_> for Octal {
            type Value = Mode;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a mode in octal, as text: \"660\"")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Mode, E> {
                Mode::try_from(text.to_owned()).map_err(E::custom)
            }
        }
        // A number would be read as decimal, and nobody means that.
        deserializer.deserialize_str(Octal)
    }
}

impl From<Mode> for String {
    fn from(mode: Mode) -> String {
        format!("{:03o}", mode.0)
    }
}

/// `[vfio-user]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct VfioUser {
    /// Which devices have a socket; those that `vfioctl offer` names by default.
    pub(crate) offer: Option<Offered>,
    /// The directory of the sockets, `NAME.sock` each, where NAME is the UUID or PCI address;
    /// `vfio-user` beside the control socket by default.
    pub(crate) dir: Option<PathBuf>,
    /// Mode of the sockets, in octal; 600 by default. Who may write to a socket may connect.
    pub(crate) mode: Option<Mode>,
    /// Owner of the sockets, by name or number; root by default.
    pub(crate) owner: Option<String>,
    /// Group of the sockets, by name or number; root by default.
    pub(crate) group: Option<String>,
    /// Users, by name or number, who may be served beside root, whatever the mode lets through;
    /// everybody by default.
    pub(crate) users: Option<Vec<User>>,
    /// True to look for a client's requests without sleeping, until it is silent for a second: a
    /// processor each for less latency. One processor is always left alone: clients beyond, and all
    /// of them where there is only one, are served as if it were false. False by default.
    pub(crate) poll: Option<bool>,
}

/// Which devices have a socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Offered {
    /// Those that somebody asks for.
    #[default]
    Asked,
    /// Every one, from its register to its unregister.
    All,
}

/// A user's name or number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "the name or number of a user")]
pub(crate) enum User {
    /// Number.
    Number(u32),
    /// Name, or a number as text.
    Name(String),
}

/// `[parents.NAME]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Parent {
    /// `mtty` or `mdpy`; the name by default.
    pub(crate) driver: Option<Driver>,
    /// mtty: where ports lead, as `pty:/run/vfiod/ports/{uuid}-{port}`; loopback by default.
    pub(crate) ports: Option<Port>,
    /// mdpy: how many displays; the driver's own limit by default.
    pub(crate) count: Option<u32>,
}

/// The drivers of mediated devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Driver {
    /// Serial cards.
    Mtty,
    /// Displays.
    Mdpy,
}

/// Where a serial port leads; `{uuid}` and `{port}` stand for the card's name and the port's number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Port(String);

impl TryFrom<String> for Port {
    type Error = String;

    fn try_from(text: String) -> Result<Port, String> {
        let port = Port(text);
        port.backend("00000000-0000-0000-0000-000000000000", 0)
            .map(|_| port)
    }
}

impl From<Port> for String {
    fn from(port: Port) -> String {
        port.0
    }
}

impl Port {
    /// For one port of one card.
    pub(crate) fn backend(&self, uuid: &str, port: usize) -> Result<BackendSpec, String> {
        let text = self
            .0
            .replace("{uuid}", uuid)
            .replace("{port}", &port.to_string());
        text.parse()
            .map_err(|error: vfio_drivers::mtty::port::ParseError| error.to_string())
    }
}

/// `[mdevs.UUID]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Mdev {
    /// As `vfioctl types` prints it: `mtty-1`.
    #[serde(rename = "type")]
    pub(crate) mdev_type: String,
    /// The parent's name, if several have the type.
    pub(crate) parent: Option<String>,
    /// mtty: where each port leads.
    #[serde(default)]
    pub(crate) ports: Vec<Port>,
}

impl Config {
    /// Reads one file.
    ///
    /// # Errors
    /// What is wrong, with the file, the line and the key.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Config> {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        // The error shows the line and underlines the place.
        toml::from_str(&text).map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))
    }

    /// Reads all files of a root, `/` for the machine's own. None need exist.
    ///
    /// # Errors
    /// The first file that is wrong.
    pub(crate) fn search(root: &Path) -> anyhow::Result<Config> {
        let mut config = Config::default();
        for path in files(root) {
            config.merge(Config::read(&path)?);
        }
        Ok(config)
    }

    /// Puts `later` over this: keys win one by one, tables of names are joined.
    fn merge(&mut self, later: Config) {
        fn put<T>(slot: &mut Option<T>, later: Option<T>) {
            if later.is_some() {
                *slot = later;
            }
        }
        let Config {
            cdev,
            request_interval,
            first_iommu_group,
            uevents,
            stop_timeout,
            sysfs: Sysfs { unregister },
            nodes:
                Nodes {
                    mode,
                    group_mode,
                    container_mode,
                    iommu_mode,
                    owner,
                    group,
                    socket_group,
                },
            vfio_user,
            parents,
            mdevs,
        } = later;
        put(&mut self.cdev, cdev);
        put(&mut self.request_interval, request_interval);
        put(&mut self.first_iommu_group, first_iommu_group);
        put(&mut self.uevents, uevents);
        put(&mut self.stop_timeout, stop_timeout);
        put(&mut self.sysfs.unregister, unregister);
        put(&mut self.nodes.mode, mode);
        put(&mut self.nodes.group_mode, group_mode);
        put(&mut self.nodes.container_mode, container_mode);
        put(&mut self.nodes.iommu_mode, iommu_mode);
        put(&mut self.nodes.owner, owner);
        put(&mut self.nodes.group, group);
        put(&mut self.nodes.socket_group, socket_group);
        let sockets = &mut self.vfio_user;
        put(&mut sockets.offer, vfio_user.offer);
        put(&mut sockets.dir, vfio_user.dir);
        put(&mut sockets.mode, vfio_user.mode);
        put(&mut sockets.owner, vfio_user.owner);
        put(&mut sockets.group, vfio_user.group);
        put(&mut sockets.users, vfio_user.users);
        put(&mut sockets.poll, vfio_user.poll);
        for (name, later) in parents {
            let parent = self.parents.entry(name).or_default();
            put(&mut parent.driver, later.driver);
            put(&mut parent.ports, later.ports);
            put(&mut parent.count, later.count);
        }
        self.mdevs.extend(mdevs);
    }
}

/// The files that exist, in the order they are read.
fn files(root: &Path) -> Vec<PathBuf> {
    let dirs = [root.join("usr/lib/vfiod"), root.join("etc/vfiod")];
    let mut files: Vec<PathBuf> = dirs.iter().map(|dir| dir.join("vfiod.toml")).collect();
    files.retain(|file| file.exists());
    let mut drop_ins: BTreeMap<std::ffi::OsString, PathBuf> = BTreeMap::new();
    for dir in &dirs {
        for entry in fs::read_dir(dir.join("conf.d"))
            .into_iter()
            .flatten()
            .flatten()
        {
            if entry.path().extension().is_some_and(|end| end == "toml") {
                drop_ins.insert(entry.file_name(), entry.path());
            }
        }
    }
    files.extend(drop_ins.into_values());
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, toml::de::Error> {
        toml::from_str(text)
    }

    #[test]
    fn everything_can_be_said() {
        let config = parse(
            r#"
            cdev = false
            request-interval = 0.5
            uevents = "host"
            stop-timeout = 3
            first-iommu-group = 100
            [sysfs]
            unregister = 7
            [nodes]
            mode = "660"
            group-mode = "640"
            container-mode = "600"
            group = "kvm"
            [vfio-user]
            offer = "all"
            dir = "/run/sockets"
            mode = "660"
            users = ["qemu", 1000]
            poll = true
            [parents.serial]
            driver = "mtty"
            ports = "pty:/run/ports/{uuid}-{port}"
            [mdevs.83b8f4f2-509f-382f-3c1e-e6bfe0fa1001]
            type = "serial-2"
            ports = ["loopback", "unix:/run/x"]
            "#,
        )
        .unwrap();
        assert_eq!(config.cdev, Some(false));
        assert_eq!(config.request_interval.unwrap().0.as_millis(), 500);
        assert_eq!(config.nodes.mode, Some(Mode(0o660)));
        assert_eq!(config.nodes.group_mode, Some(Mode(0o640)));
        assert_eq!(config.nodes.container_mode, Some(Mode(0o600)));
        assert_eq!(
            config.sysfs.unregister,
            Some(Unregister::Seconds(Seconds(Duration::from_secs(7))))
        );
        assert_eq!(config.vfio_user.offer, Some(Offered::All));
        assert_eq!(
            config.vfio_user.users,
            Some(vec![User::Name("qemu".into()), User::Number(1000)])
        );
        let ports = config.parents.get("serial").unwrap().ports.clone();
        assert_eq!(
            ports.unwrap().backend("u", 1),
            Ok(BackendSpec::Pty {
                link: Some("/run/ports/u-1".into())
            })
        );
        let text = toml::to_string(&config).unwrap();
        assert_eq!(parse(&text).unwrap(), config, "{text}");
    }

    #[test]
    fn what_is_wrong_is_shown_where_it_is() {
        for (text, place) in [
            ("cdev = true\ncdevs = 1\n", "line 2"),
            ("[nodes]\nmode = \"888\"\n", "line 2"),
            ("[nodes]\nmode = 600\n", "line 2"),
            ("[nodes]\n\nmodes = \"600\"\n", "line 3"),
            ("request-interval = -1\n", "line 1"),
            ("uevents = \"all\"\n", "line 1"),
            ("[sysfs]\nunregister = \"never\"\n", "line 2"),
            ("[vfio-user]\noffer = \"some\"\n", "line 2"),
            ("[vfio-user]\nusers = [-1]\n", "line 2"),
            ("[parents.x]\nports = \"pyt\"\n", "line 2"),
            ("[mdevs.nonsense]\ntype = \"mtty-1\"\n", "line 1"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(place), "{text:?}: {error}");
        }
        for (text, what) in [
            ("[nodes]\nmode = 600\n", "as text: \"660\""),
            ("[nodes]\nmode = \"888\"\n", "write \"660\""),
            ("stop-timeout = -1\n", "-1 is no time in seconds"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(what), "{text:?}: {error}");
        }
    }

    #[test]
    fn later_files_win_key_by_key() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write(
            "usr/lib/vfiod/vfiod.toml",
            "cdev = false\nstop-timeout = 1\n[parents.a]\ndriver = \"mtty\"\n",
        );
        write(
            "etc/vfiod/vfiod.toml",
            "stop-timeout = 2\nuevents = \"host\"\n",
        );
        write("usr/lib/vfiod/conf.d/10.toml", "stop-timeout = 3\n");
        write("usr/lib/vfiod/conf.d/20.toml", "uevents = \"private\"\n");
        write("etc/vfiod/conf.d/20.toml", "[parents.a]\nports = \"pty\"\n");
        write("etc/vfiod/conf.d/ignored.txt", "nonsense");
        let config = Config::search(root.path()).unwrap();
        assert_eq!(config.cdev, Some(false));
        assert_eq!(config.stop_timeout.unwrap().0, Duration::from_secs(3));
        assert_eq!(config.uevents, Some(Uevents::Host));
        let parent = config.parents.get("a").unwrap();
        assert_eq!(parent.driver, Some(Driver::Mtty));
        assert!(parent.ports.is_some());
        write("etc/vfiod/conf.d/30.toml", "unknown = 1\n");
        let error = Config::search(root.path()).unwrap_err().to_string();
        assert!(error.contains("30.toml"), "{error}");
    }

    #[test]
    fn nothing_is_needed() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(Config::search(root.path()).unwrap(), Config::default());
    }
}
