//! All about one device, a line each.

use super::holders::{long_holder, refused};
use super::text::{Style, dash, safe};
use super::waiting;
use std::fmt::Write as _;
use vfiod_control::view::Show;

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
