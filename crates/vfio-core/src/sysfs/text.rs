//! What the kernel makes of the bytes that are written to a file.

use crate::{Errno, Result};
use uuid::Uuid;

/// A C string: up to the first NUL.
pub(super) fn c_str(data: &[u8]) -> &[u8] {
    let end = data.iter().position(|byte| *byte == 0);
    &data[..end.unwrap_or(data.len())]
}

/// A name that is compared by `sysfs_streq()`: a C string, one newline at its end not counted.
pub(super) fn name(data: &[u8]) -> Option<&str> {
    let text = c_str(data);
    std::str::from_utf8(text.strip_suffix(b"\n").unwrap_or(text)).ok()
}

/// `kstrtoul(…, 0, …)`: decimal, `0x` hexadecimal or `0` octal, a plus sign, one newline at the
/// end. `EINVAL` for anything else, and for what does not fit.
pub(super) fn number(data: &[u8]) -> Result<u64> {
    let text = std::str::from_utf8(c_str(data)).map_err(|_| Errno::INVAL)?;
    let text = text.strip_suffix('\n').unwrap_or(text);
    let text = text.strip_prefix('+').unwrap_or(text);
    let lower = text.to_ascii_lowercase();
    let (digits, radix) = match lower.strip_prefix("0x") {
        Some(hex) => (hex, 16),
        None if lower.len() > 1 && lower.starts_with('0') => (&lower[1..], 8),
        None => (lower.as_str(), 10),
    };
    if !digits.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        return Err(Errno::INVAL);
    }
    u64::from_str_radix(digits, radix).map_err(|_| Errno::INVAL)
}

/// `driver_set_override()`: `EINVAL` for a page or more, cut at the first NUL, then at the first
/// newline; `None` clears.
pub(super) fn driver_override(data: &[u8]) -> Result<Option<String>> {
    if data.len() >= super::PAGE_SIZE - 1 {
        return Err(Errno::INVAL);
    }
    let text = c_str(data);
    let line = text.split(|byte| *byte == b'\n').next().unwrap_or(text);
    if line.is_empty() {
        return Ok(None);
    }
    // No driver has a name that is not UTF-8; what is shown is what was understood.
    Ok(Some(String::from_utf8_lossy(line).into_owned()))
}

const ACTIONS: [&str; 8] = [
    "add", "remove", "change", "move", "online", "offline", "bind", "unbind",
];

/// A synthetic uevent: `kobject_synth_uevent()`. The action and the variables that go with it.
/// `EINVAL` for an unknown action, a malformed uuid or a malformed `KEY=value`.
pub(super) fn synthetic(data: &[u8]) -> Result<(&'static str, Vec<(String, String)>)> {
    let data = match data {
        [rest @ .., b'\n' | 0] => rest,
        all => all,
    };
    let text = std::str::from_utf8(data).map_err(|_| Errno::INVAL)?;
    let (word, args) = match text.split_once(' ') {
        Some((word, args)) => (word, Some(args)),
        None => (text, None),
    };
    let action = ACTIONS.iter().find(|action| **action == word);
    let action = *action.ok_or(Errno::INVAL)?;
    let Some(args) = args else {
        return Ok((action, vec![("SYNTH_UUID".into(), "0".into())]));
    };
    let uuid = args.get(..36).ok_or(Errno::INVAL)?;
    Uuid::try_parse(uuid).map_err(|_| Errno::INVAL)?;
    let mut env = vec![("SYNTH_UUID".to_owned(), uuid.to_owned())];
    let rest = &args[36..];
    if !rest.is_empty() {
        let pairs = rest.strip_prefix(' ').ok_or(Errno::INVAL)?;
        for pair in pairs.split(' ') {
            let (key, value) = pair.split_once('=').ok_or(Errno::INVAL)?;
            let word = |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric());
            if value.is_empty() || !word(key) || !word(value) {
                return Err(Errno::INVAL);
            }
            env.push((format!("SYNTH_ARG_{key}"), value.to_owned()));
        }
    }
    Ok((action, env))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        for (text, value) in [
            ("1", 1),
            ("1\n", 1),
            ("+1", 1),
            ("0", 0),
            ("0x1f", 31),
            ("0X1F\n", 31),
            ("010", 8),
            ("1\0junk", 1),
        ] {
            assert_eq!(number(text.as_bytes()), Ok(value), "{text:?}");
        }
        for text in [
            " 1",
            "-1",
            "1 ",
            "1\n\n",
            "1x",
            "",
            "\n",
            "0x",
            "08",
            "yes",
            "++1",
            "0x+1",
            "18446744073709551616",
            "\u{661}",
        ] {
            assert_eq!(number(text.as_bytes()), Err(Errno::INVAL), "{text:?}");
        }
        assert_eq!(number(b"\xff"), Err(Errno::INVAL));
    }

    #[test]
    fn overrides() {
        for (text, value) in [
            (&b"vfio-pci"[..], Some("vfio-pci")),
            (b"vfio-pci\n", Some("vfio-pci")),
            (b"vfio-pci\nother", Some("vfio-pci")),
            (b"vfio-pci\0other", Some("vfio-pci")),
            (b"\n", None),
            (b"\0", None),
            (b"\0\0\0abc", None),
        ] {
            assert_eq!(driver_override(text).unwrap().as_deref(), value);
        }
        assert_eq!(driver_override(&[b'a'; 4095]), Err(Errno::INVAL));
        assert_eq!(driver_override(&[0; 4095]), Err(Errno::INVAL));
        assert!(driver_override(&[b'a'; 4094]).unwrap().is_some());
    }

    #[test]
    fn synthetic_uevents() {
        let plain = |action| (action, vec![("SYNTH_UUID".to_owned(), "0".to_owned())]);
        for text in ["add", "add\n", "add\0"] {
            assert_eq!(synthetic(text.as_bytes()), Ok(plain("add")));
        }
        let uuid = "fe4d7c9d-b8c6-4a70-9ef1-3d8a58d18eed";
        let text = format!("change {uuid} A=1 B=abc\n");
        let (action, env) = synthetic(text.as_bytes()).unwrap();
        assert_eq!(action, "change");
        let env: Vec<String> = env.iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(
            env,
            [
                format!("SYNTH_UUID={uuid}"),
                "SYNTH_ARG_A=1".to_owned(),
                "SYNTH_ARG_B=abc".to_owned()
            ]
        );
        for text in [
            "",
            "\n",
            "ad",
            "addd",
            "ADD",
            "add ",
            "add 1",
            "add\n\n",
            "add fe4d7c9d-b8c6-4a70-9ef1-3d8a58d18eex",
            "add fe4d7c9d-b8c6-4a70-9ef1-3d8a58d18eed ",
            "add fe4d7c9d-b8c6-4a70-9ef1-3d8a58d18eed A",
            "add fe4d7c9d-b8c6-4a70-9ef1-3d8a58d18eed A=",
            "add fe4d7c9d-b8c6-4a70-9ef1-3d8a58d18eed A=1 ",
            "add fe4d7c9d-b8c6-4a70-9ef1-3d8a58d18eed A=1=2",
            "add fe4d7c9d-b8c6-4a70-9ef1-3d8a58d18eedA=1",
        ] {
            assert_eq!(synthetic(text.as_bytes()), Err(Errno::INVAL), "{text:?}");
        }
        assert_eq!(synthetic(b"add \xff"), Err(Errno::INVAL));
    }
}
