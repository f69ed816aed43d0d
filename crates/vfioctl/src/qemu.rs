//! The arguments that attach devices to QEMU.

use crate::cli::Via;
use crate::fail::{Fail, Result};
use vfiod_control::FailureKind;
use vfiod_control::view::Device;

/// The first descriptor that a shell is told to open: 0 to 2 are taken.
const FIRST_FD: u32 = 3;

/// What a command line is put together from: QEMU's own words, and what the shell opens for it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// For QEMU, one word each.
    pub(crate) words: Vec<String>,
    /// For the shell: descriptor and file.
    pub(crate) opens: Vec<(u32, String)>,
    /// True if QEMU finds its device only under `vfioctl run`.
    pub(crate) inside: bool,
}

impl Arguments {
    /// One line for a shell to evaluate.
    pub(crate) fn line(&self) -> String {
        let mut parts: Vec<String> = self.words.iter().map(|word| quote(word)).collect();
        parts.extend(
            self.opens
                .iter()
                .map(|(fd, file)| format!("{fd}<>{}", quote(file))),
        );
        parts.join(" ")
    }
}

/// The arguments for `devices` in a guest with `memory`, which is shared with them.
///
/// # Errors
/// A device cannot be reached this way; the message says what to do.
pub(crate) fn arguments(devices: &[Device], via: Option<Via>, memory: &str) -> Result<Arguments> {
    let mut all = Arguments::default();
    let mut push = |words: &[&str]| {
        all.words
            .extend(words.iter().map(|word| (*word).to_owned()))
    };
    // Devices reach private memory of a guest by copies, or, over vfio-user, not at all.
    push(&[
        "-m",
        memory,
        "-object",
        &format!("memory-backend-memfd,id=vfiod-ram,size={memory},share=on"),
        "-machine",
        "memory-backend=vfiod-ram",
    ]);
    let ways: Vec<Via> = devices
        .iter()
        .map(|device| via.unwrap_or_else(|| best(device)))
        .collect();
    if ways.contains(&Via::Fd) {
        push(&[
            "-object",
            &format!("iommufd,id=vfiod-iommufd,fd={FIRST_FD}"),
        ]);
        all.opens.push((FIRST_FD, "/dev/iommu".to_owned()));
    } else if ways.contains(&Via::Path) {
        push(&["-object", "iommufd,id=vfiod-iommufd"]);
    }
    for (device, way) in devices.iter().zip(ways) {
        let value = match way {
            Via::VfioUser => over_socket(device)?,
            Via::Fd => {
                let last = all.opens.last().map_or(FIRST_FD, |(fd, _)| *fd);
                let name = registered(device)?;
                all.opens
                    .push((last + 1, format!("/dev/vfio/devices/{name}")));
                let place = match place(device) {
                    // Its descriptor says it all, and no sysfs is looked at.
                    place if place.starts_with("host=") => String::new(),
                    place => format!("{place},"),
                };
                format!("vfio-pci,{place}fd={},iommufd=vfiod-iommufd", last + 1)
            }
            Via::Path => {
                registered(device)?;
                format!("vfio-pci,{},iommufd=vfiod-iommufd", place(device))
            }
            Via::Group => {
                registered(device)?;
                format!("vfio-pci,{}", place(device))
            }
        };
        all.inside |= way != Via::VfioUser;
        all.words.extend(["-device".to_owned(), value]);
    }
    Ok(all)
}

fn best(device: &Device) -> Via {
    if device.sockets.is_empty() {
        Via::Path
    } else {
        Via::VfioUser
    }
}

/// QEMU takes the socket's address, which is a structure, only as JSON.
fn over_socket(device: &Device) -> Result<String> {
    let Some(socket) = device.sockets.first() else {
        return Err(Fail::new(
            FailureKind::Busy,
            format!(
                "{name} is not offered over vfio-user; `vfioctl offer {name}` does it, or offer = \
                 \"all\" in [vfio-user] of the configuration",
                name = device.label()
            ),
        ));
    };
    let value = serde_json::json!({
        "driver": "vfio-user-pci",
        "socket": { "type": "unix", "path": socket.path },
    });
    Ok(value.to_string())
}

/// Where QEMU finds the device in sysfs.
fn place(device: &Device) -> String {
    match device.bus.as_deref() {
        Some("pci") => format!("host={}", device.address),
        // QEMU takes it for a mediated device by this very path.
        Some("mdev") => format!("sysfsdev=/sys/bus/mdev/devices/{}", device.address),
        _ => format!("sysfsdev=/sys{}", device.path),
    }
}

fn registered(device: &Device) -> Result<&str> {
    device.name.as_deref().ok_or_else(|| {
        Fail::new(
            FailureKind::Busy,
            format!(
                "{label} has no VFIO device; `vfioctl bind {label}` gives it one",
                label = device.label()
            ),
        )
    })
}

/// One word of a POSIX shell.
fn quote(word: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_=,./:@%+".contains(&byte);
    if !word.is_empty() && word.bytes().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vfiod_control::view::Socket;

    fn mdev(path: Option<&str>) -> Device {
        Device {
            name: Some("vfio0".into()),
            address: "u-u-i-d".into(),
            bus: Some("mdev".into()),
            sockets: path
                .map(|path| Socket {
                    path: path.into(),
                    ..Socket::default()
                })
                .into_iter()
                .collect(),
            ..Device::default()
        }
    }

    #[test]
    fn a_shell_gets_back_what_was_meant() {
        let device = mdev(Some("/run/it's here.sock"));
        let arguments = arguments(&[device], None, "256M").unwrap();
        let output = std::process::Command::new("sh")
            .args([
                "-c",
                &format!("for word in {}; do echo \"$word\"; done", arguments.line()),
            ])
            .output()
            .unwrap();
        let words = String::from_utf8(output.stdout).unwrap();
        assert_eq!(words.lines().collect::<Vec<_>>(), arguments.words);
        let device: serde_json::Value =
            serde_json::from_str(arguments.words.last().unwrap()).unwrap();
        assert_eq!(device["driver"], "vfio-user-pci");
        assert_eq!(device["socket"]["path"], "/run/it's here.sock");
        assert!(!arguments.inside);
    }

    #[test]
    fn each_way_has_its_line() {
        let line = |via, device: Device| arguments(&[device], Some(via), "1G").unwrap().line();
        let memory = "-m 1G -object memory-backend-memfd,id=vfiod-ram,size=1G,share=on \
                      -machine memory-backend=vfiod-ram";
        let sysfs = "sysfsdev=/sys/bus/mdev/devices/u-u-i-d";
        assert_eq!(
            line(Via::Fd, mdev(None)),
            format!(
                "{memory} -object iommufd,id=vfiod-iommufd,fd=3 -device \
                 vfio-pci,{sysfs},fd=4,iommufd=vfiod-iommufd 3<>/dev/iommu \
                 4<>/dev/vfio/devices/vfio0"
            )
        );
        assert_eq!(
            line(Via::Path, mdev(None)),
            format!(
                "{memory} -object iommufd,id=vfiod-iommufd -device \
                 vfio-pci,{sysfs},iommufd=vfiod-iommufd"
            )
        );
        assert_eq!(
            line(Via::Group, mdev(None)),
            format!("{memory} -device vfio-pci,{sysfs}")
        );
        let pci = Device {
            bus: Some("pci".into()),
            address: "0000:3b:00.0".into(),
            ..mdev(None)
        };
        assert!(line(Via::Fd, pci.clone()).contains(" vfio-pci,fd=4,iommufd="));
        assert!(line(Via::Path, pci).contains(" vfio-pci,host=0000:3b:00.0,iommufd="));
    }

    #[test]
    fn several_devices_share_what_they_can() {
        let devices = [mdev(None), mdev(None)];
        let line = arguments(&devices, Some(Via::Fd), "1G").unwrap().line();
        assert_eq!(line.matches("-object iommufd").count(), 1, "{line}");
        assert!(line.contains("fd=4,") && line.contains("fd=5,"), "{line}");
    }

    #[test]
    fn what_cannot_be_is_said_with_what_to_do() {
        let message = |device, via| {
            let fail = arguments(&[device], Some(via), "1G").unwrap_err();
            assert_eq!(fail.code, 4);
            fail.message
        };
        assert!(message(mdev(None), Via::VfioUser).contains("vfioctl offer vfio0"));
        let unbound = Device {
            name: None,
            ..mdev(None)
        };
        assert!(message(unbound, Via::Path).contains("vfioctl bind u-u-i-d"));
    }
}
