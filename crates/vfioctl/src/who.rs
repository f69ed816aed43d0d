//! Who holds a device, found in /proc without anybody's help.
//!
//! A kernel's VFIO leaves three kinds of trace. An open `/dev/vfio/devices/vfioN` is a descriptor
//! with that device number. A descriptor made by a group (`VFIO_GROUP_GET_DEVICE_FD`) is
//! `anon_inode:[vfio-device]`; since 6.18 its fdinfo has `vfio-device-syspath:`, before that only
//! the open group node tells, and which device of the group is meant cannot be told. Mappings show
//! as the node's or as `anon_inode:[vfio-device]`; the latter are counted for those who hold a
//! descriptor.

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use vfiod_control::view::{Device, Holder, Via};

/// A device as its traces show it.
#[derive(Debug)]
pub(crate) struct Target {
    /// Device number of its node.
    pub(crate) rdev: Option<(u32, u32)>,
    /// Device number of its group's node.
    pub(crate) group_rdev: Option<(u32, u32)>,
    /// What `vfio-device-syspath:` says, `/sys/devices/…`.
    pub(crate) syspath: String,
    /// File system and inode of its node: what tells a node that is a file of vfiod's.
    pub(crate) node: Option<((u32, u32), u64)>,
}

impl Target {
    /// The traces of `device` on a machine with its nodes at `dev`.
    pub(crate) fn new(device: &Device, dev: &Path) -> Target {
        let node = device
            .name
            .as_ref()
            .and_then(|name| stat(&dev.join("vfio/devices").join(name)));
        let group = device
            .iommu_group
            .and_then(|group| stat(&dev.join(format!("vfio/{group}"))));
        Target {
            rdev: device
                .cdev
                .as_deref()
                .and_then(numbers)
                .filter(|_| node.as_ref().is_none_or(|node| node.char_device)),
            group_rdev: group.filter(|node| node.char_device).map(|node| node.rdev),
            syspath: format!("/sys{}", device.path),
            node: node.filter(|node| !node.char_device).map(|node| node.file),
        }
    }
}

/// What was seen, and what could not be.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    /// For each target, who holds it.
    pub(crate) holders: Vec<Vec<Holder>>,
    /// Processes that may not be looked into: holders may be missing.
    pub(crate) hidden: usize,
}

/// Looks through all processes but this one.
pub(crate) fn scan(targets: &[Target], proc: &Path) -> Scan {
    let mut scan = Scan {
        holders: vec![Vec::new(); targets.len()],
        hidden: 0,
    };
    let boot = boot_time(proc);
    let own = std::process::id();
    let mut pids: Vec<u32> = fs::read_dir(proc)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != own)
        .collect();
    pids.sort_unstable();
    for pid in pids {
        let dir = proc.join(pid.to_string());
        let Ok(seen) = look(&dir, targets) else {
            scan.hidden += 1;
            continue;
        };
        let mut about = None;
        for (seen, holders) in seen.into_iter().zip(&mut scan.holders) {
            let via_device = !seen.device.is_empty() || seen.mapped > 0;
            let fds = if via_device { seen.device } else { seen.group };
            if fds.is_empty() && !via_device {
                continue;
            }
            let (command, since_us) = about.get_or_insert_with(|| describe(&dir, boot)).clone();
            holders.push(Holder {
                pid,
                command,
                since_us,
                since_open: false,
                fds,
                mapped_bytes: seen.mapped,
                via: if via_device { Via::Device } else { Via::Group },
                ..Holder::default()
            });
        }
    }
    scan
}

#[derive(Clone, Debug, Default)]
struct Seen {
    device: Vec<i32>,
    group: Vec<i32>,
    mapped: u64,
}

/// One process. `Err` when it may not be looked into; one that has gone holds nothing.
fn look(dir: &Path, targets: &[Target]) -> Result<Vec<Seen>, ()> {
    let mut seen = vec![Seen::default(); targets.len()];
    let gone = |error: &std::io::Error| {
        matches!(
            error.raw_os_error(),
            Some(code) if code == rustix::io::Errno::NOENT.raw_os_error()
                || code == rustix::io::Errno::SRCH.raw_os_error()
        )
    };
    let entries = match fs::read_dir(dir.join("fd")) {
        Ok(entries) => entries,
        Err(error) if gone(&error) => return Ok(seen),
        Err(_) => return Err(()),
    };
    let mut anonymous = false;
    for entry in entries.flatten() {
        let Some(fd) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let Ok(link) = fs::read_link(entry.path()) else {
            continue;
        };
        if link.as_os_str() == "anon_inode:[vfio-device]" {
            anonymous = true;
            let Some(path) = syspath(&dir.join("fdinfo").join(entry.file_name())) else {
                continue;
            };
            for (target, seen) in targets.iter().zip(&mut seen) {
                if target.syspath == path {
                    seen.device.push(fd);
                }
            }
            continue;
        }
        // Only what can be a node is asked about: a file of somebody's dead server would not answer.
        if !link.to_string_lossy().contains("vfio") {
            continue;
        }
        let Some(node) = stat(&entry.path()) else {
            continue;
        };
        for (target, seen) in targets.iter().zip(&mut seen) {
            if node.char_device && target.rdev == Some(node.rdev) || target.node == Some(node.file)
            {
                seen.device.push(fd);
            } else if node.char_device && target.group_rdev == Some(node.rdev) {
                seen.group.push(fd);
            }
        }
    }
    let maps = fs::read_to_string(dir.join("maps")).unwrap_or_default();
    for line in maps.lines().filter(|line| line.contains("vfio")) {
        let Some(mapping) = Mapping::parse(line) else {
            continue;
        };
        for (target, seen) in targets.iter().zip(&mut seen) {
            let ours = match target.node {
                Some(file) => file == mapping.file,
                None => mapping
                    .path
                    .strip_prefix("/dev/vfio/devices/")
                    .is_some_and(|name| target.names(name)),
            };
            // A mapping of a group's device file names no device: it counts for who holds one.
            let anonymous =
                anonymous && mapping.path == "anon_inode:[vfio-device]" && !seen.device.is_empty();
            if ours || anonymous {
                seen.mapped = seen.mapped.saturating_add(mapping.length);
            }
        }
    }
    for seen in &mut seen {
        seen.device.sort_unstable();
        seen.group.sort_unstable();
    }
    Ok(seen)
}

impl Target {
    /// True for the name of its node in a mapping's path (which may end in ` (deleted)`).
    fn names(&self, name: &str) -> bool {
        let minor = self.rdev.map(|(_, minor)| format!("vfio{minor}"));
        let name = name.strip_suffix(" (deleted)").unwrap_or(name);
        minor.as_deref() == Some(name)
    }
}

struct Mapping<'a> {
    length: u64,
    file: ((u32, u32), u64),
    path: &'a str,
}

impl Mapping<'_> {
    /// A line of /proc/PID/maps.
    fn parse(line: &str) -> Option<Mapping<'_>> {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let mut rest = rest.splitn(5, ' ');
        let (_modes, _offset) = (rest.next()?, rest.next()?);
        let (major, minor) = rest.next()?.split_once(':')?;
        let inode = rest.next()?.parse().ok()?;
        let hex = |text| u64::from_str_radix(text, 16).ok();
        let id = |text| u32::from_str_radix(text, 16).ok();
        Some(Mapping {
            length: hex(end)?.checked_sub(hex(start)?)?,
            file: ((id(major)?, id(minor)?), inode),
            path: rest.next().unwrap_or_default().trim_start(),
        })
    }
}

struct Node {
    char_device: bool,
    rdev: (u32, u32),
    file: ((u32, u32), u64),
}

/// What a path leads to, from what the kernel has at hand.
fn stat(path: &Path) -> Option<Node> {
    let fd = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let statx = rustix::fs::statx(
        fd,
        "",
        AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC,
        StatxFlags::TYPE | StatxFlags::INO,
    )
    .ok()?;
    Some(Node {
        char_device: rustix::fs::FileType::from_raw_mode(statx.stx_mode.into())
            == rustix::fs::FileType::CharacterDevice,
        rdev: (statx.stx_rdev_major, statx.stx_rdev_minor),
        file: ((statx.stx_dev_major, statx.stx_dev_minor), statx.stx_ino),
    })
}

fn syspath(fdinfo: &Path) -> Option<String> {
    let text = fs::read_to_string(fdinfo).ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("vfio-device-syspath:"))?;
    Some(line.trim().to_owned())
}

fn numbers(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Name and start of a process, from /proc/PID/stat.
fn describe(dir: &Path, boot: SystemTime) -> (String, Option<u64>) {
    let stat = fs::read(dir.join("stat")).unwrap_or_default();
    let stat = String::from_utf8_lossy(&stat);
    // The name may have parentheses in it: the last one ends it.
    let (Some(open), Some(close)) = (stat.find('('), stat.rfind(')')) else {
        return (String::from("?"), None);
    };
    let command = stat.get(open + 1..close).unwrap_or("?").to_owned();
    let ticks: Option<u64> = stat
        .get(close + 1..)
        .and_then(|rest| rest.split_whitespace().nth(19)?.parse().ok());
    let hertz = rustix::param::clock_ticks_per_second().max(1);
    let since = ticks.map(|ticks| boot + Duration::from_millis(ticks.saturating_mul(1000) / hertz));
    (command, since.and_then(micros))
}

/// Microseconds since the epoch.
pub(crate) fn micros(time: SystemTime) -> Option<u64> {
    let since = time.duration_since(UNIX_EPOCH).ok()?;
    u64::try_from(since.as_micros()).ok()
}

fn boot_time(proc: &Path) -> SystemTime {
    let stat = fs::read_to_string(proc.join("stat")).unwrap_or_default();
    let seconds = stat
        .lines()
        .find_map(|line| line.strip_prefix("btime ")?.trim().parse().ok());
    UNIX_EPOCH + Duration::from_secs(seconds.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_maps() {
        let line = "7f0000000000-7f0000002000 rw-s 00001000 00:2d 42                         /dev/vfio/devices/vfio0";
        let mapping = Mapping::parse(line).unwrap();
        assert_eq!(mapping.length, 0x2000);
        assert_eq!(mapping.file, ((0, 0x2d), 42));
        assert_eq!(mapping.path, "/dev/vfio/devices/vfio0");
        assert!(Mapping::parse("7f-").is_none());
        let nameless = "7f0000000000-7f0000002000 rw-s 00001000 00:2d 42";
        assert_eq!(Mapping::parse(nameless).unwrap().path, "");
    }

    #[test]
    fn a_holder_is_found_by_the_file_behind_its_descriptor() {
        // A file of vfiod stands for a node here; its name must say vfio, as all nodes do.
        let name = std::env::temp_dir().join(format!("vfio-who-{}", std::process::id()));
        let _ = fs::remove_file(&name);
        fs::write(&name, "").unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("100")
            .stdin(fs::File::open(&name).unwrap())
            .spawn()
            .unwrap();
        let node = stat(&name).unwrap();
        let target = Target {
            rdev: None,
            group_rdev: None,
            syspath: String::new(),
            node: Some(node.file),
        };
        let scan = scan(&[target], Path::new("/proc"));
        child.kill().unwrap();
        child.wait().unwrap();
        fs::remove_file(&name).unwrap();
        let [holders] = scan.holders.as_slice() else {
            panic!("one target, one list");
        };
        let [holder] = holders.as_slice() else {
            panic!("one holder, not {holders:?}");
        };
        assert_eq!(holder.pid, child.id());
        assert_eq!(holder.fds, [0]);
        assert_eq!(holder.via, Via::Device);
        assert!(holder.since_us.is_some());
    }
}
