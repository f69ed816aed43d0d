//! Who holds a device, and who was turned away.

use super::text::{Style, ago, safe, table};
use std::fmt::Write as _;
use vfiod_control::view::{Device, Holder, Refusal, Socket, Via};

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

pub(super) fn long_holder(one: &Holder) -> String {
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
pub(super) fn refused(refusal: &Refusal) -> String {
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

pub(super) fn open_by(device: &Device) -> String {
    match (&device.holders, device.users) {
        (Some(list), _) if !list.is_empty() => holders(list),
        (_, Some(0)) | (Some(_), None) => "-".to_owned(),
        (_, Some(users)) => format!("{users} open"),
        (None, None) => "?".to_owned(),
    }
}
