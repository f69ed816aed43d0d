//! JSON objects, one on a line, with a bound on its length.

use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, BufRead, Read, Write};

/// The longest request the daemon reads, in bytes without the newline.
pub const MAX_REQUEST: usize = 16 * 1024;

/// The longest reply a client reads: ten thousand devices fit in a tenth of it.
pub const MAX_REPLY: usize = 64 * 1024 * 1024;

/// Reads the bytes of one line, without its newline; `None` at the end of the stream. Never keeps
/// more than `max` bytes.
///
/// # Errors
/// `InvalidData` for a line longer than `max` (the rest of it is still in the stream, so the
/// connection is of no further use), `UnexpectedEof` for a last line without newline, and what
/// the stream gives.
pub fn read_line(reader: &mut impl BufRead, max: usize) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let limit = u64::try_from(max).unwrap_or(u64::MAX).saturating_add(1);
    reader.by_ref().take(limit).read_until(b'\n', &mut line)?;
    match line.last() {
        None => Ok(None),
        Some(b'\n') => {
            line.pop();
            Ok(Some(line))
        }
        Some(_) if line.len() > max => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a line is longer than {max} bytes"),
        )),
        Some(_) => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Reads one message.
///
/// # Errors
/// As [`read_line`], and `InvalidData` for a line that is not a `T`.
pub fn read<T: DeserializeOwned>(reader: &mut impl BufRead, max: usize) -> io::Result<Option<T>> {
    let Some(line) = read_line(reader, max)? else {
        return Ok(None);
    };
    serde_json::from_slice(&line)
        .map(Some)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Writes one message and flushes.
///
/// # Errors
/// What the stream gives.
pub fn write<T: Serialize>(writer: &mut impl Write, message: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    writer.write_all(&line)?;
    writer.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_bounded() {
        let mut input: &[u8] = b"abc\nabcd\nabcde\n";
        assert_eq!(read_line(&mut input, 4).unwrap().unwrap(), b"abc");
        assert_eq!(read_line(&mut input, 4).unwrap().unwrap(), b"abcd");
        let error = read_line(&mut input, 4).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn an_endless_line_costs_no_memory() {
        // Would never return, or take all memory, if the bound were looked at afterwards.
        let mut endless = io::BufReader::new(io::repeat(b'x'));
        let error = read_line(&mut endless, MAX_REQUEST).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn the_end_is_clean_or_not() {
        let mut input: &[u8] = b"";
        assert!(read_line(&mut input, 4).unwrap().is_none());
        let mut input: &[u8] = b"ab";
        let error = read_line(&mut input, 4).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn what_is_not_json_is_invalid_data() {
        for text in ["{\n", "\0\n", "[1]\n", "\n", "\u{feff}{}\n"] {
            let error = read::<std::collections::BTreeMap<String, u32>>(&mut text.as_bytes(), 99);
            assert_eq!(
                error.unwrap_err().kind(),
                io::ErrorKind::InvalidData,
                "{text:?}"
            );
        }
    }
}
