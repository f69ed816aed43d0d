//! What says that the machine has VFIO: `/proc/devices`, `/proc/misc`, and a modprobe that need not load
//! it.
//!
//! These are files of text as they were when the command was started, bound over the machine's own.

use super::tree::{attach, bind, make_file};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Numbers of char devices by name, as the daemon has them.
pub(super) type Numbers = BTreeMap<String, u32>;

/// In the merged `/dev`: what is bound elsewhere, and the machine's modprobe. The modprobe of ours has
/// this path in it.
const OWN: &str = "/dev/.vfioctl";

/// Why something is not as it should be: what was done, and the errno.
type Result<T = ()> = std::result::Result<T, (&'static str, Errno)>;

fn errno(what: &'static str) -> impl Fn(std::io::Error) -> (&'static str, Errno) {
    move |error| (what, Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

/// Puts vfiod's char devices among the machine's. `/dev` is the merged one already.
pub(super) fn merge(regions: &Numbers, misc: &Numbers) -> Result {
    fs::create_dir(OWN).map_err(errno("/dev/.vfioctl"))?;
    fs::set_permissions(OWN, fs::Permissions::from_mode(0o755)).map_err(errno("/dev/.vfioctl"))?;
    replace("/proc/devices", "devices", |text| {
        with_regions(text, regions)
    })?;
    replace("/proc/misc", "misc", |text| with_misc(text, misc))?;
    modprobe()
}

/// Lays a changed copy over a file, if the machine has it.
fn replace(path: &'static str, name: &str, change: impl FnOnce(&str) -> String) -> Result {
    let Ok(text) = fs::read_to_string(path) else {
        return Ok(());
    };
    let copy = Path::new(OWN).join(name);
    fs::write(&copy, change(&text)).map_err(errno(path))?;
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o444)).map_err(errno(path))?;
    over(&copy, Path::new(path)).map_err(|errno| (path, errno))?;
    // What is mounted stays.
    fs::remove_file(&copy).map_err(errno(path))
}

/// Binds a file onto another, which may be a link: then the link itself is covered.
fn over(file: &Path, place: &Path) -> std::result::Result<(), Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    attach(&open_tree(CWD, file, flags)?, place)
}

/// driverctl and others call modprobe for vfio-pci by its path and give up if it fails.
fn modprobe() -> Result {
    const SCRIPT: &str = include_str!("modprobe.sh");
    const PLACE: &str = "/sbin/modprobe";
    let Ok(real) = fs::canonicalize(PLACE) else {
        // No modprobe at all: a container. There is no place for one then.
        return Ok(());
    };
    let wrong = |errno| (PLACE, errno);
    // The real one, under the name that it goes by.
    let kept = Path::new(OWN).join("modprobe");
    make_file(&kept).map_err(wrong)?;
    let root =
        rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(wrong)?;
    bind(rustix::fd::AsFd::as_fd(&root), &real, &kept).map_err(wrong)?;
    let script = Path::new(OWN).join("shim");
    fs::write(&script, SCRIPT).map_err(errno(PLACE))?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).map_err(errno(PLACE))?;
    over(&script, Path::new(PLACE)).map_err(wrong)?;
    fs::remove_file(&script).map_err(errno(PLACE))
}

/// `/proc/devices` with more char devices, each where its number belongs.
fn with_regions(text: &str, regions: &Numbers) -> String {
    let mut out = String::new();
    let mut left: Vec<(&u32, &String)> =
        regions.iter().map(|(name, major)| (major, name)).collect();
    left.sort_unstable();
    let mut left = left.into_iter().peekable();
    let mut in_chars = false;
    for line in text.lines() {
        if in_chars {
            let major = line
                .split_whitespace()
                .next()
                .and_then(|word| word.parse().ok());
            while let Some((region, name)) =
                left.next_if(|(region, _)| major.is_none_or(|major: u32| **region < major))
            {
                out += &format!("{region:3} {name}\n");
            }
            in_chars = major.is_some();
        } else {
            in_chars = line == "Character devices:";
        }
        // A kernel's own VFIO is hidden behind vfiod's.
        let name = line.split_whitespace().nth(1);
        if !(in_chars && name.is_some_and(|name| regions.contains_key(name))) {
            out += line;
            out.push('\n');
        }
    }
    for (region, name) in left {
        out += &format!("{region:3} {name}\n");
    }
    out
}

/// `/proc/misc` with more devices: the newest are first.
fn with_misc(text: &str, misc: &Numbers) -> String {
    let mut out = String::new();
    for (name, minor) in misc {
        out += &format!("{minor:3} {name}\n");
    }
    for line in text.lines() {
        let name = line.split_whitespace().nth(1);
        if !name.is_some_and(|name| misc.contains_key(name)) {
            out += line;
            out.push('\n');
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_where_their_numbers_belong() {
        let text = "Character devices:\n  1 mem\n254 ndctl\n509 vfio\n\nBlock devices:\n  7 loop\n";
        let regions = Numbers::from([("vfio-dev".into(), 511), ("vfio".into(), 120)]);
        assert_eq!(
            with_regions(text, &regions),
            "Character devices:\n  1 mem\n120 vfio\n254 ndctl\n511 vfio-dev\n\nBlock devices:\n  7 \
             loop\n"
        );
        let without_end = "Character devices:\n  1 mem\n";
        assert_eq!(
            with_regions(without_end, &regions),
            "Character devices:\n  1 mem\n120 vfio\n511 vfio-dev\n"
        );
    }

    #[test]
    fn misc_devices_are_there_once() {
        let misc = Numbers::from([("vfio".into(), 196), ("iommu".into(), 5)]);
        assert_eq!(
            with_misc("232 kvm\n196 vfio\n", &misc),
            "  5 iommu\n196 vfio\n232 kvm\n"
        );
    }
}
