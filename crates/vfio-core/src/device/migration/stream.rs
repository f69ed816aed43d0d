//! The data of a migration: what kind of device it is from, and the device's state as one value.
//!
//! ```text
//!   0   8  "vfiodmig"
//!   8   4  1, the layout of the stream
//!   12  4  version of the state, the driver's
//!   16  32 kind of device, filled up with zeros
//!   48  8  bytes of the state            } not yet in PRE_COPY
//!   56  …  the state                     }
//! ```
//!
//! All numbers are little-endian. It is the same on every machine and for both front ends.

use super::Form;
use crate::{Errno, Result};

const MAGIC: [u8; 8] = *b"vfiodmig";
const LAYOUT: u32 = 1;

/// Longest name of a kind of device.
const KIND: usize = 32;

/// The part that tells what device this is from.
const HEAD: usize = 16 + KIND;

/// What precedes the state.
const BEFORE_STATE: usize = HEAD + 8;

/// The bytes that a stream of a device of this form has at most.
pub(super) fn max_len(form: &Form) -> usize {
    form.max_len.saturating_add(BEFORE_STATE)
}

fn kind(form: &Form) -> [u8; KIND] {
    let mut kind = [0; KIND];
    for (to, from) in kind.iter_mut().zip(form.kind.bytes()) {
        *to = from;
    }
    kind
}

/// What is read while a device saves.
#[derive(Debug)]
pub(super) struct Outgoing {
    bytes: Vec<u8>,
    read: usize,
}

impl Outgoing {
    /// Tells the kind of device, and no more.
    pub(super) fn new(form: &Form) -> Outgoing {
        let mut bytes = Vec::with_capacity(HEAD);
        bytes.extend(MAGIC);
        bytes.extend(LAYOUT.to_le_bytes());
        bytes.extend(form.version.to_le_bytes());
        bytes.extend(kind(form));
        Outgoing { bytes, read: 0 }
    }

    /// Adds the state: the end.
    pub(super) fn finish(&mut self, state: &[u8]) {
        self.bytes.extend((state.len() as u64).to_le_bytes());
        self.bytes.extend(state);
    }

    /// The next bytes; 0 when there are none now.
    pub(super) fn read(&mut self, buf: &mut [u8]) -> usize {
        let rest = &self.bytes[self.read..];
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        self.read += len;
        len
    }

    /// Bytes that were not read yet.
    pub(super) fn left(&self) -> usize {
        self.bytes.len() - self.read
    }
}

/// What has been written to a device that resumes.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    bytes: Vec<u8>,
    refused: bool,
}

impl Incoming {
    /// Takes all of `data` or nothing. `ENOMEM` beyond what a device of this form can have made,
    /// `EINVAL` as soon as it can be told that it is from another kind of device, and from then on.
    pub(super) fn write(&mut self, form: &Form, data: &[u8]) -> Result<usize> {
        if self.refused {
            return Err(Errno::INVAL);
        }
        if data.len() > max_len(form).saturating_sub(self.bytes.len()) {
            return Err(Errno::NOMEM);
        }
        let had_head = self.bytes.len() >= HEAD;
        self.bytes.extend(data);
        if !had_head && self.bytes.len() >= HEAD {
            self.check_head(form).inspect_err(|_| {
                self.refused = true;
                self.bytes = Vec::new();
            })?;
        }
        Ok(data.len())
    }

    /// The version, when it is one that this device understands.
    fn check_head(&self, form: &Form) -> Result<u32> {
        let word = |at: usize| {
            let bytes = self.bytes.get(at..).and_then(|rest| rest.first_chunk());
            bytes.map(|bytes| u32::from_le_bytes(*bytes))
        };
        let (Some(layout), Some(version)) = (word(8), word(12)) else {
            return Err(Errno::INVAL);
        };
        if !self.bytes.starts_with(&MAGIC)
            || layout != LAYOUT
            || self.bytes.get(16..HEAD) != Some(&kind(form)[..])
        {
            return Err(Errno::INVAL);
        }
        if version < form.oldest || version > form.version {
            return Err(Errno::INVAL);
        }
        Ok(version)
    }

    /// The version and the state. `EINVAL` when this is not a whole stream for the device, or more.
    pub(super) fn finish(&self, form: &Form) -> Result<(u32, &[u8])> {
        let version = self.check_head(form)?;
        let (len, state) = self
            .bytes
            .get(HEAD..)
            .and_then(|rest| rest.split_first_chunk())
            .ok_or(Errno::INVAL)?;
        if u64::from_le_bytes(*len) != state.len() as u64 {
            return Err(Errno::INVAL);
        }
        Ok((version, state))
    }
}
