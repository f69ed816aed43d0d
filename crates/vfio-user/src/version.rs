//! VERSION: who speaks, and what both sides take.

use crate::server::ClientKind;
use crate::wire::{MAX_DATA, Version, take};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use vfio_core::Errno;
use zerocopy::IntoBytes;

/// The minor version we know; libvfio-user's.
const MINOR: u16 = 2;

/// Descriptors that we announce to take in one message. We take 253, but QEMU turns away from a server
/// that says more than 16.
const MSG_FDS: u64 = 16;

/// What a client said, as far as it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) kind: ClientKind,
    pub(crate) minor: u16,
    /// Descriptors it takes in one message.
    pub(crate) msg_fds: u64,
    /// Bytes it takes in one message of DMA: at most what we take.
    pub(crate) max_data: usize,
    /// It wants a second socket for commands to it.
    pub(crate) twin: bool,
    offered: Offered,
}

/// What the answer may speak of: nothing that was not offered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Offered {
    json: bool,
    write_multiple: bool,
    migration: bool,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Capabilities {
    max_msg_fds: Option<u64>,
    max_data_xfer_size: Option<u64>,
    max_dma_maps: Option<u64>,
    pgsizes: Option<u64>,
    twin_socket: Option<TwinSocket>,
    write_multiple: Option<bool>,
    migration: Option<Migration>,
}

#[derive(Deserialize)]
struct TwinSocket {
    #[serde(default)]
    supported: bool,
}

#[derive(Deserialize)]
struct Migration {
    #[expect(dead_code, reason = "must be a number; what it is matters to nobody")]
    pgsize: Option<u64>,
    max_bitmap_size: Option<u64>,
}

impl Hello {
    /// Reads a VERSION payload. `EINVAL` for one that makes no sense, `EPROTONOSUPPORT` for another
    /// major version.
    pub(crate) fn parse(payload: &[u8]) -> Result<Hello, Errno> {
        let (version, text) = take::<Version>(payload)?;
        if version.major != 0 {
            return Err(Errno::PROTONOSUPPORT);
        }
        if text.is_empty() {
            return Ok(Hello {
                kind: if version.minor == 1 {
                    ClientKind::Spdk
                } else {
                    ClientKind::Unknown
                },
                minor: version.minor,
                msg_fds: 1,
                max_data: MAX_DATA,
                twin: false,
                offered: Offered::default(),
            });
        }
        // The text ends at its NUL, which must be there; what lies behind it means nothing.
        let end = text
            .iter()
            .position(|byte| *byte == 0)
            .ok_or(Errno::INVAL)?;
        let said: Map<String, Value> =
            serde_json::from_slice(&text[..end]).map_err(|_| Errno::INVAL)?;
        let caps: Capabilities = match said.get("capabilities") {
            None => Capabilities::default(),
            Some(caps @ Value::Object(_)) => {
                Capabilities::deserialize(caps).map_err(|_| Errno::INVAL)?
            }
            Some(_) => return Err(Errno::INVAL),
        };
        let max_data = caps.max_data_xfer_size.unwrap_or(MAX_DATA as u64);
        if max_data == 0 {
            return Err(Errno::INVAL);
        }
        Ok(Hello {
            kind: caps.kind(version.minor),
            minor: version.minor,
            msg_fds: caps.max_msg_fds.unwrap_or(1),
            max_data: usize::try_from(max_data).map_or(MAX_DATA, |most| most.min(MAX_DATA)),
            twin: caps.twin_socket.is_some_and(|twin| twin.supported),
            offered: Offered {
                json: true,
                write_multiple: caps.write_multiple == Some(true),
                migration: caps.migration.is_some(),
            },
        })
    }

    /// The payload of the answer to a request whose payload had `asked` bytes. `twin` says that a
    /// descriptor for the second socket goes with it.
    ///
    /// QEMU has no room for an answer that is longer than its request, the crate `vfio_user` none for
    /// one without capabilities: whatever says no more than a default does is left out when it does not
    /// fit.
    pub(crate) fn answer(&self, asked: usize, twin: bool) -> Vec<u8> {
        let mut caps = Map::new();
        let mut spare = vec!["max_msg_fds"];
        caps.insert("max_msg_fds".into(), MSG_FDS.into());
        if self.offered.write_multiple {
            caps.insert("write_multiple".into(), true.into());
        }
        if twin {
            let twin = json!({"supported": true, "fd_index": 0});
            caps.insert("twin_socket".into(), twin);
        }
        caps.insert("max_data_xfer_size".into(), MAX_DATA.into());
        spare.push("max_data_xfer_size");
        if self.offered.migration {
            caps.insert("migration".into(), json!({"pgsize": 4096}));
            spare.push("migration");
        }
        let version = Version {
            major: 0,
            minor: self.minor.min(MINOR),
        };
        loop {
            let text = json!({ "capabilities": Value::Object(caps.clone()) }).to_string();
            let payload = [version.as_bytes(), text.as_bytes(), &[0]].concat();
            let fits = !self.offered.json || payload.len() <= asked;
            match spare.pop() {
                Some(name) if !fits => caps.remove(name),
                _ => return payload,
            };
        }
    }
}

impl Capabilities {
    /// Who says that.
    fn kind(&self, minor: u16) -> ClientKind {
        match minor {
            0 if self.write_multiple.is_some() && self.max_dma_maps.is_some() => ClientKind::Qemu,
            1 if self.max_msg_fds == Some(1)
                && self.max_data_xfer_size.is_some()
                && self
                    .migration
                    .as_ref()
                    .is_some_and(|m| m.max_bitmap_size.is_none())
                && self.max_dma_maps.is_none()
                && self.pgsizes.is_none()
                && self.write_multiple.is_none()
                && self.twin_socket.is_none() =>
            {
                ClientKind::Rust
            }
            2.. => ClientKind::LibvfioUser,
            _ => ClientKind::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(minor: u16, text: &str) -> Result<Hello, Errno> {
        Hello::parse(&payload(0, minor, text))
    }

    fn payload(major: u16, minor: u16, text: &str) -> Vec<u8> {
        let version = Version { major, minor };
        let mut payload = version.as_bytes().to_vec();
        if !text.is_empty() {
            payload.extend(text.as_bytes());
            payload.push(0);
        }
        payload
    }

    const QEMU: &str = r#"{"capabilities": {"pgsizes": 4096, "max_msg_fds": 16, "max_dma_maps": 65535, "max_data_xfer_size": 1048576, "migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, "write_multiple": true}}"#;
    const RUST: &str = r#"{"capabilities":{"max_msg_fds":1,"max_data_xfer_size":1048576,"migration":{"pgsize":4096}}}"#;
    const SAMPLE: &str = r#"{"capabilities":{"max_msg_fds":32,"max_data_xfer_size":1024,"migration":{"pgsize":4096}}}"#;

    #[test]
    fn clients_are_recognized() {
        assert_eq!(hello(0, QEMU).unwrap().kind, ClientKind::Qemu);
        assert_eq!(hello(1, RUST).unwrap().kind, ClientKind::Rust);
        assert_eq!(hello(1, "").unwrap().kind, ClientKind::Spdk);
        assert_eq!(hello(0, "").unwrap().kind, ClientKind::Unknown);
        assert_eq!(hello(0, "{}").unwrap().kind, ClientKind::Unknown);
        let sample = hello(2, SAMPLE).unwrap();
        assert_eq!(sample.kind, ClientKind::LibvfioUser);
        assert_eq!((sample.msg_fds, sample.max_data), (32, 1024));
        assert_eq!(hello(1, "").unwrap().msg_fds, 1);
    }

    #[test]
    fn answers_fit_and_say_only_what_was_offered() {
        for (minor, text) in [
            (0, QEMU),
            (1, RUST),
            (2, SAMPLE),
            (0, r#"{"capabilities":{}}"#),
        ] {
            let hello = hello(minor, text).unwrap();
            let asked = payload(0, minor, text).len();
            let answer = hello.answer(asked, false);
            assert_eq!(&answer[..4], &[0, 0, minor as u8, 0]);
            assert_eq!(answer.last(), Some(&0));
            let value: Value = serde_json::from_slice(&answer[4..answer.len() - 1]).unwrap();
            let small = asked < 30;
            assert_eq!(value["capabilities"].get("max_msg_fds").is_none(), small);
            assert!(value["capabilities"].get("twin_socket").is_none());
            let offered: Value = serde_json::from_str(text).unwrap();
            let multiple = offered["capabilities"].get("write_multiple").is_some();
            assert_eq!(
                value["capabilities"].get("write_multiple").is_some(),
                multiple
            );
            assert!(answer.len() <= asked, "{minor} {text}");
        }
        // Without JSON in the request there is no bound, and JSON comes all the same.
        let answer = hello(1, "").unwrap().answer(4, false);
        assert!(answer.len() > 30);
    }

    #[test]
    fn nonsense_is_an_error() {
        let errno = |payload: &[u8]| Hello::parse(payload).unwrap_err();
        assert_eq!(errno(&[]), Errno::INVAL);
        assert_eq!(errno(&[0, 0, 0]), Errno::INVAL);
        assert_eq!(errno(&payload(1, 0, QEMU)), Errno::PROTONOSUPPORT);
        let mut no_nul = payload(0, 0, QEMU);
        no_nul.pop();
        assert_eq!(errno(&no_nul), Errno::INVAL);
        for text in [
            "{",
            "[]",
            "7",
            r#"{"capabilities": 7}"#,
            r#"{"capabilities": {"max_msg_fds": -1}}"#,
            r#"{"capabilities": {"max_msg_fds": "x"}}"#,
            r#"{"capabilities": {"max_data_xfer_size": 0}}"#,
            r#"{"capabilities": {"twin_socket": true}}"#,
        ] {
            assert_eq!(hello(0, text).unwrap_err(), Errno::INVAL, "{text}");
        }
        assert_eq!(errno(&payload(0, 0, &"[".repeat(10_000))), Errno::INVAL);
        // Unknown members are nobody's business.
        assert!(hello(0, r#"{"x": [1], "capabilities": {"y": {}}}"#).is_ok());
    }
}
