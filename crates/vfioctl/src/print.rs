//! Output for people: aligned columns, colour on terminals only.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::time::{SystemTime, UNIX_EPOCH};
use vfiod_control::Event;
use vfiod_control::view::{
    Device, Holder, Parent, Pending, Refusal, Show, Socket, State, Status, Tree, Via,
};

/// Where output goes, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Style {
    /// Escape sequences for colour.
    pub(crate) colour: bool,
}

impl Style {
    /// For standard output: colour on a terminal unless `NO_COLOR` is set.
    pub(crate) fn stdout() -> Style {
        Style {
            colour: std::io::stdout().is_terminal()
                && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
                && std::env::var_os("TERM").is_none_or(|term| term != "dumb"),
        }
    }

    pub(crate) fn paint(self, code: &str, text: &str) -> String {
        if self.colour && !text.is_empty() {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }

    fn dim(self, text: &str) -> String {
        self.paint("2", text)
    }

    fn state(self, state: State) -> String {
        let code = match state {
            State::Registered => "32",
            State::Unregistering => "33",
            State::Dead => "31",
            State::Unbound => "2",
        };
        self.paint(code, state.as_str())
    }
}

/// Writes to standard output. A reader that went away (`| head`) is no error.
pub(crate) fn out(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush());
}

/// Rows with aligned columns; the first row is the header. Escape sequences have no width.
fn table(style: Style, rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            let cells = rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| width(cell)).max().unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        let mut line = String::new();
        for (cell, wide) in row.iter().zip(&widths) {
            let cell_text = if number == 0 {
                style.bold(cell)
            } else {
                cell.clone()
            };
            line.push_str(&cell_text);
            for _ in width(cell)..wide + 2 {
                line.push(' ');
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Characters that take room.
fn width(text: &str) -> usize {
    let mut count = 0;
    let mut escape = false;
    for c in text.chars() {
        match (escape, c) {
            (false, '\x1b') => escape = true,
            (true, 'm') => escape = false,
            (true, _) => {}
            (false, _) => count += 1,
        }
    }
    count
}

/// Names come from other processes: nothing of theirs may steer the terminal.
pub(crate) fn safe(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

fn holder(holder: &Holder) -> String {
    let name = format!("{}({})", safe(&holder.command), holder.pid);
    match holder.via {
        Via::Device => name,
        Via::Group => format!("{name} by its group"),
        Via::Socket => format!("{name} over vfio-user"),
        Via::Opener => format!("{name}, gone, whose file lives on"),
    }
}

/// The holders on one line; `-` for none.
pub(crate) fn holders(holders: &[Holder]) -> String {
    match holders {
        [] => "-".to_owned(),
        some => some.iter().map(holder).collect::<Vec<_>>().join(", "),
    }
}

fn open_by(device: &Device) -> String {
    match (&device.holders, device.users) {
        (Some(list), _) if !list.is_empty() => holders(list),
        (_, Some(0)) | (Some(_), None) => "-".to_owned(),
        (_, Some(users)) => format!("{users} open"),
        (None, None) => "?".to_owned(),
    }
}

fn dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

pub(crate) fn list(style: Style, devices: &[Device]) -> String {
    let header = [
        "NAME", "ADDRESS", "BUS", "DRIVER", "GROUP", "CDEV", "STATE", "OPEN BY",
    ];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for device in devices {
        rows.push(vec![
            dash(device.name.as_ref()),
            device.address.clone(),
            dash(device.bus.as_ref()),
            dash(device.driver.as_ref()),
            dash(device.iommu_group),
            dash(device.cdev.as_ref()),
            style.state(device.state),
            open_by(device),
        ]);
    }
    table(style, &rows)
}

/// A line of the tree: label, details, and what is below.
struct Node {
    label: String,
    details: String,
    below: Vec<Node>,
}

pub(crate) fn tree(style: Style, tree: &Tree) -> String {
    let mut buses: Vec<Node> = Vec::new();
    let mut placed = vec![false; tree.devices.len()];
    let mut mdev = Vec::new();
    for parent in &tree.parents {
        let inside = format!("{}/", parent.path);
        let mut below = Vec::new();
        for (device, placed) in tree.devices.iter().zip(&mut placed) {
            if device.path.starts_with(&inside) {
                *placed = true;
                below.push(device_node(style, device));
            }
        }
        let types: Vec<String> = parent
            .types
            .iter()
            .map(|kind| format!("{} {} left", kind.id, kind.available))
            .collect();
        mdev.push(Node {
            label: style.bold(&parent.name),
            details: style.dim(&types.join(", ")),
            below,
        });
    }
    let mut by_bus: std::collections::BTreeMap<&str, Vec<Node>> = std::collections::BTreeMap::new();
    if !mdev.is_empty() {
        by_bus.insert("mdev", mdev);
    }
    for (device, placed) in tree.devices.iter().zip(placed) {
        if !placed {
            let bus = device.bus.as_deref().unwrap_or("no bus");
            by_bus
                .entry(bus)
                .or_default()
                .push(device_node(style, device));
        }
    }
    for (bus, below) in by_bus {
        buses.push(Node {
            label: bus.to_owned(),
            details: String::new(),
            below,
        });
    }
    let mut rows = Vec::new();
    for bus in &buses {
        flatten(bus, "", "", &mut rows);
    }
    for group in &tree.groups {
        let blocking: Vec<&str> = group
            .members
            .iter()
            .filter(|member| member.blocks)
            .map(|member| member.address.as_str())
            .collect();
        if !blocking.is_empty() {
            rows.push((
                format!("group {}", group.id),
                style.paint(
                    "31",
                    &format!("not usable: {} bound elsewhere", blocking.join(", ")),
                ),
            ));
        } else if group.open == Some(true) {
            let details = match &group.node {
                Some(node) => format!("{node}, open"),
                None => "open".to_owned(),
            };
            rows.push((format!("group {}", group.id), details));
        }
    }
    let wide = rows
        .iter()
        .map(|(label, _)| width(label))
        .max()
        .unwrap_or(0);
    let mut text = String::new();
    for (label, details) in rows {
        let gap = " ".repeat((wide + 2).saturating_sub(width(&label)));
        let line = format!("{label}{gap}{details}");
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn device_node(style: Style, device: &Device) -> Node {
    let mut details = Vec::new();
    details.extend(device.mdev_type.clone());
    details.push(match &device.driver {
        Some(driver) => format!("driver {driver}"),
        None => "no driver".to_owned(),
    });
    details.extend(device.iommu_group.map(|group| format!("group {group}")));
    let below = device.name.iter().map(|name| {
        let mut details = vec![style.state(device.state)];
        details.extend(device.node.clone());
        details.push(match open_by(device).as_str() {
            "-" => "not open".to_owned(),
            "?" => String::new(),
            by => format!("open by {by}"),
        });
        details.retain(|part| !part.is_empty());
        Node {
            label: style.bold(name),
            details: details.join(", "),
            below: Vec::new(),
        }
    });
    Node {
        label: device.address.clone(),
        details: details.join(", "),
        below: below.collect(),
    }
}

fn flatten(node: &Node, own: &str, below: &str, rows: &mut Vec<(String, String)>) {
    rows.push((format!("{own}{}", node.label), node.details.clone()));
    let last = node.below.len().saturating_sub(1);
    for (at, child) in node.below.iter().enumerate() {
        let (branch, trunk) = if at == last {
            ("└─ ", "   ")
        } else {
            ("├─ ", "│  ")
        };
        flatten(
            child,
            &format!("{below}{branch}"),
            &format!("{below}{trunk}"),
            rows,
        );
    }
}

pub(crate) fn show(style: Style, show: &Show) -> String {
    let device = &show.device;
    let mut text = String::new();
    let names = show.attributes.iter().map(|(name, _)| name.chars().count());
    let wide = names.max().unwrap_or(0).max(12);
    let mut line = |key: &str, value: String| {
        let _ = writeln!(text, "{} {value}", style.dim(&format!("{key:<wide$}")));
    };
    line("device", style.bold(device.label()));
    line("address", device.address.clone());
    line("directory", format!("/sys{}", device.path));
    line("bus", dash(device.bus.as_ref()));
    line("driver", dash(device.driver.as_ref()));
    if let Some(kind) = &device.mdev_type {
        line("type", kind.clone());
    }
    line("state", style.state(device.state));
    if let Some(pending) = &device.pending {
        line("waiting", waiting(pending));
    }
    line("char device", dash(device.cdev.as_ref()));
    line("node", dash(device.node.as_ref()));
    for socket in &device.sockets {
        line("socket", socket.path.clone());
        for refusal in &socket.refused {
            line("", refused(refusal));
        }
    }
    match &show.group {
        None => line("group", "-".to_owned()),
        Some(group) => {
            let names = [group.name.as_deref(), group.domain.as_deref()];
            let extra: Vec<&str> = names.into_iter().flatten().collect();
            let extra = if extra.is_empty() {
                String::new()
            } else {
                format!(" ({})", extra.join(", "))
            };
            let node = group.node.as_ref().map(|node| format!(", {node}"));
            let open = match group.open {
                Some(true) => ", open",
                _ => "",
            };
            let node = node.unwrap_or_default();
            line("group", format!("{}{extra}{node}{open}", group.id));
            for member in &group.members {
                let mark = if member.blocks {
                    style.paint("31", "  keeps the group from being used")
                } else {
                    String::new()
                };
                line(
                    "",
                    format!("{} {}{mark}", member.address, dash(member.driver.as_ref())),
                );
            }
        }
    }
    if let Some(open) = device.open {
        line("bound", if open { "yes" } else { "no" }.to_owned());
    }
    if let Some(users) = device.users {
        line("open files", users.to_string());
    }
    for region in &show.regions {
        line(
            &format!("region {}", region.index),
            format!("{:#x} bytes {}", region.size, region_flags(region.flags)),
        );
    }
    for irq in &show.irqs {
        line(
            &format!("irq {}", irq.index),
            format!("{}, flags {:#x}", irq.count, irq.flags),
        );
    }
    for (name, value) in &show.attributes {
        line(name, safe(value.trim_end()));
    }
    match &device.holders {
        None => {}
        Some(list) if list.is_empty() => line("held by", "nobody".to_owned()),
        Some(list) => {
            for (at, one) in list.iter().enumerate() {
                line(if at == 0 { "held by" } else { "" }, long_holder(one));
            }
        }
    }
    text
}

/// `VFIO_REGION_INFO_FLAG_READ`, `_WRITE`, `_MMAP` as letters.
fn region_flags(flags: u32) -> String {
    [(1, 'r'), (2, 'w'), (4, 'm')]
        .into_iter()
        .map(|(bit, letter)| if flags & bit == 0 { '-' } else { letter })
        .collect()
}

fn long_holder(one: &Holder) -> String {
    let mut text = holder(one);
    if !one.fds.is_empty() {
        let fds: Vec<String> = one.fds.iter().map(ToString::to_string).collect();
        let _ = write!(text, ", fd {}", fds.join(" "));
    }
    if one.mapped_bytes > 0 {
        let _ = write!(text, ", maps {} KiB", one.mapped_bytes / 1024);
    }
    if let Some(since) = one.since_us {
        let what = if one.since_open {
            "since"
        } else {
            "process started"
        };
        let _ = write!(text, ", {what} {} ago", ago(since));
    }
    text
}

pub(crate) fn who(style: Style, device: &str, list: &[Holder]) -> String {
    if list.is_empty() {
        return format!("{device}: nobody has it open\n");
    }
    let header = ["PID", "COMMAND", "HOLDS", "SINCE"]
        .map(str::to_owned)
        .to_vec();
    let mut rows = vec![header];
    for one in list {
        let mut holds = Vec::new();
        if !one.fds.is_empty() {
            let fds: Vec<String> = one.fds.iter().map(ToString::to_string).collect();
            let what = if one.via == Via::Group {
                "group fd"
            } else {
                "fd"
            };
            holds.push(format!("{what} {}", fds.join(" ")));
        }
        if one.mapped_bytes > 0 {
            holds.push(format!("{} KiB mapped", one.mapped_bytes / 1024));
        }
        if let Some(socket) = &one.socket {
            let kind = one.client.as_deref().unwrap_or("unknown");
            holds.push(format!("vfio-user socket {socket} ({kind} client)"));
        }
        holds.extend(one.uid.map(|uid| format!("uid {uid}")));
        if one.via == Via::Opener {
            holds.push("opened it; who has it now cannot be seen".to_owned());
        }
        let since = match (one.since_us, one.since_open) {
            (None, _) => "?".to_owned(),
            (Some(at), true) if one.via == Via::Socket => format!("connected {} ago", ago(at)),
            (Some(at), true) => format!("opened {} ago", ago(at)),
            (Some(at), false) => format!("process started {} ago", ago(at)),
        };
        rows.push(vec![
            one.pid.to_string(),
            safe(&one.command),
            holds.join(", "),
            since,
        ]);
    }
    table(style, &rows)
}

/// A client that was turned away, as `who` and `show` tell it.
fn refused(refusal: &Refusal) -> String {
    let who = match refusal.pid {
        0 => format!("uid {}", refusal.uid),
        pid => format!("{}({pid}), uid {}", safe(&refusal.command), refusal.uid),
    };
    format!(
        "refused {who} {} ago: {}",
        ago(refusal.at_us),
        safe(&refusal.reason)
    )
}

/// Those that were turned away, one a line.
pub(crate) fn refusals(sockets: &[Socket]) -> String {
    sockets
        .iter()
        .flat_map(|socket| {
            let at = &socket.path;
            socket
                .refused
                .iter()
                .map(move |one| format!("{at}: {}\n", refused(one)))
        })
        .collect()
}

pub(crate) fn types(style: Style, parents: &[Parent]) -> String {
    let header = ["PARENT", "TYPE", "AVAILABLE", "API", "NAME", "DESCRIPTION"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for parent in parents {
        for kind in &parent.types {
            rows.push(vec![
                parent.name.clone(),
                kind.id.clone(),
                kind.available.to_string(),
                kind.device_api.clone(),
                dash(kind.name.as_ref()),
                kind.description
                    .clone()
                    .unwrap_or_default()
                    .replace('\n', "; "),
            ]);
        }
    }
    table(style, &rows)
}

/// What an unregister waits for, in a sentence.
pub(crate) fn waiting(pending: &Pending) -> String {
    let mut text = format!(
        "unregistering for {}, waiting for {} open file{}",
        span(pending.for_ms / 1000),
        pending.users,
        if pending.users == 1 { "" } else { "s" }
    );
    if !pending.holders.is_empty() {
        let _ = write!(text, " of {}", holders(&pending.holders));
    }
    let over_socket = |one: &Holder| one.via == Via::Socket;
    if pending.asked == Some(false) {
        let what = if pending.holders.iter().any(over_socket) {
            "close the connection"
        } else {
            "cut it off"
        };
        text.push_str(", which took no request interrupt and cannot be asked to let go");
        if pending.deadline_ms.is_none() {
            let _ = write!(text, "; --timeout or --force would {what}");
        }
    }
    if let Some(left) = pending.deadline_ms {
        let _ = write!(text, "; they are cut off in {}", span(left.div_ceil(1000)));
    }
    text
}

pub(crate) fn event(style: Style, event: &Event) -> String {
    let count = match (event.what.as_str(), event.count) {
        ("unregistering", Some(users)) => format!(" ({users} open)"),
        ("requested", Some(count)) => format!(" (for the {} time)", ordinal(count)),
        _ => String::new(),
    };
    let code = match event.what.as_str() {
        "registered" | "opened" | "bound" => "32",
        "unregistering" | "requested" => "33",
        "disassociated" | "panicked" => "31",
        _ => "0",
    };
    format!(
        "{} {} {} {}{count}\n",
        style.dim(&clock(event.at_us)),
        style.bold(&format!("{:<7}", event.device)),
        event.address,
        style.paint(code, &event.what),
    )
}

fn ordinal(count: u32) -> String {
    let n = u64::from(count) + 1;
    let suffix = match (n % 10, n % 100) {
        (_, 11..=13) => "th",
        (1, _) => "st",
        (2, _) => "nd",
        (3, _) => "rd",
        _ => "th",
    };
    format!("{n}{suffix}")
}

pub(crate) fn status(style: Style, status: &Status) -> String {
    let rows = [
        ("version", status.version.clone()),
        ("pid", status.pid.to_string()),
        ("up", span(status.uptime_s)),
        ("sysfs", dash(status.sys.as_ref())),
        ("nodes", dash(status.dev.as_ref())),
        ("devices", status.devices.to_string()),
        ("waiting", status.pending.to_string()),
    ];
    let mut text = String::new();
    for (key, value) in rows {
        let _ = writeln!(text, "{} {value}", style.dim(&format!("{key:<8}")));
    }
    text
}

/// Time of day in UTC, to the millisecond.
fn clock(us: u64) -> String {
    let (seconds, millis) = (us / 1_000_000, us / 1000 % 1000);
    format!(
        "{:02}:{:02}:{:02}.{millis:03}",
        seconds / 3600 % 24,
        seconds / 60 % 60,
        seconds % 60
    )
}

fn ago(us: u64) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    span(now.as_secs().saturating_sub(us / 1_000_000))
}

fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86400 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Style = Style { colour: false };

    fn device() -> Device {
        Device {
            name: Some("vfio0".into()),
            address: "u-u-i-d".into(),
            bus: Some("mdev".into()),
            path: "/devices/virtual/mtty/mtty/u-u-i-d".into(),
            driver: Some("mtty".into()),
            mdev_type: Some("mtty-1".into()),
            iommu_group: Some(0),
            state: State::Registered,
            users: Some(0),
            ..Device::default()
        }
    }

    #[test]
    fn columns_line_up_with_and_without_colour() {
        let devices = [
            device(),
            Device {
                address: "x".into(),
                ..Device::default()
            },
        ];
        let plain = list(PLAIN, &devices);
        let lines: Vec<&str> = plain.lines().collect();
        let column = lines.first().unwrap().find("STATE").unwrap();
        assert_eq!(&lines.get(1).unwrap()[column..][..10], "registered");
        assert_eq!(&lines.get(2).unwrap()[column..][..7], "unbound");
        let coloured = list(Style { colour: true }, &devices);
        assert!(coloured.contains("\x1b[32mregistered\x1b[0m"));
        let widths: Vec<usize> = coloured.lines().map(width).collect();
        let expected: Vec<usize> = plain.lines().map(width).collect();
        assert_eq!(widths, expected);
    }

    #[test]
    fn the_tree_has_a_device_below_its_parent() {
        let text = tree(
            PLAIN,
            &Tree {
                parents: vec![Parent {
                    name: "mtty".into(),
                    path: "/devices/virtual/mtty/mtty".into(),
                    types: Vec::new(),
                }],
                devices: vec![device()],
                groups: Vec::new(),
            },
        );
        assert_eq!(
            text,
            "mdev\n\
             └─ mtty\n   \
                └─ u-u-i-d   mtty-1, driver mtty, group 0\n      \
                   └─ vfio0  registered, not open\n"
        );
    }

    #[test]
    fn a_process_name_cannot_steer_the_terminal() {
        let evil = Holder {
            pid: 1,
            command: "\x1b[2Jx".into(),
            ..Holder::default()
        };
        assert!(!who(PLAIN, "vfio0", &[evil]).contains('\x1b'));
    }

    #[test]
    fn ordinals() {
        let all: Vec<String> = [0, 1, 2, 3, 10, 20].map(ordinal).to_vec();
        assert_eq!(all, ["1st", "2nd", "3rd", "4th", "11th", "21st"]);
    }
}
