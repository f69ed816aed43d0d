//! Output for people: aligned columns, colour on terminals only.

mod holders;
mod show;
mod text;
mod tree;

pub(crate) use holders::{holders, refusals, who};
pub(crate) use show::show;
pub(crate) use text::{Style, out};
pub(crate) use tree::tree;

use holders::open_by;
use std::fmt::Write as _;
use text::{clock, dash, span, table};
use vfiod_control::Event;
use vfiod_control::view::{Device, Holder, Parent, Pending, Status, Via};

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

#[cfg(test)]
mod tests {
    use super::text::width;
    use super::*;
    use vfiod_control::view::{State, Tree};

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
