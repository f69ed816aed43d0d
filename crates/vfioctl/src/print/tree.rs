//! The tree: buses, parents and devices, each below what it belongs to.

use super::holders::open_by;
use super::text::{Style, width};
use vfiod_control::view::{Device, Tree};

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
