//! Bytes in, messages out: framing that nothing a peer sends can put out of step.
//!
//! A [`Receiver`] knows no socket. Whoever owns one asks for [`room`](Receiver::room), puts there what
//! arrived, and says so with [`fed`](Receiver::fed); then takes messages with
//! [`next`](Receiver::next) until there is none. A message stays in place until
//! [`done`](Receiver::done), so what was merely peeked from a socket can be fed as well, and be taken
//! from the socket when its effect stands.
//!
//! A stream socket's receive ends behind a piece that came with descriptors (`net/unix/af_unix.c`,
//! `unix_stream_read_generic`), but may begin before it. So descriptors belong to the message that
//! starts last in what one receive brought, and if none starts there, to the one under way.

use crate::wire::{HEADER, Header, MAX_FDS, MAX_MESSAGE};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use vfio_core::Errno;
use zerocopy::FromBytes;

/// Room to begin with: most messages, and several small ones at once.
const ROOM: usize = 16 << 10;

/// One whole message.
#[derive(Debug)]
pub struct Message<'a> {
    /// Its header.
    pub header: Header,
    /// What follows it. Empty for a message that [`refused`](Message::refused) says was too long.
    pub payload: &'a [u8],
    /// What came with it. Those that are not taken are closed with the message.
    pub fds: Vec<OwnedFd>,
    /// Why it cannot be served, though it was received whole: `EMSGSIZE` longer than any legal one
    /// (its payload was thrown away), `EMFILE` descriptors were lost.
    pub refused: Option<Errno>,
}

/// The incoming half of a connection, between two receives.
#[derive(Debug, Default)]
pub struct Receiver {
    /// What is not used yet: `bytes[start..end]`.
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    /// Place of `start` in the stream.
    at: u64,
    /// Place in the stream where the last message starts that has begun to arrive.
    last: u64,
    /// Descriptors, by the place where their message starts.
    fds: VecDeque<Arrived>,
    /// A message that is too long, and how much of it is still to be thrown away.
    skip: Option<(Header, u64)>,
    /// Bytes of the message that was given out and is not done.
    given: usize,
}

#[derive(Debug)]
struct Arrived {
    at: u64,
    fds: Vec<OwnedFd>,
    lost: bool,
}

impl Receiver {
    /// Nothing received.
    pub fn new() -> Receiver {
        Receiver::default()
    }

    /// Where to put what arrives: at least one byte, and as much as the message under way needs,
    /// as far as its sender has shown that it means it.
    pub fn room(&mut self) -> &mut [u8] {
        let used = self.end - self.start;
        if used == 0 {
            (self.start, self.end) = (0, 0);
        }
        let want = match self.peek() {
            Some(header) if self.skip.is_none() => {
                (header.size as usize).clamp(HEADER, MAX_MESSAGE)
            }
            _ => HEADER,
        };
        // A length is only a claim: memory follows what has really come.
        let want = want.min((used * 2).max(ROOM));
        if self.start > 0 && self.start + want > self.bytes.len() {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, used);
        }
        if self.bytes.len() < want.max(used + 1) {
            self.bytes.resize(want.max(used + 1).max(ROOM), 0);
        }
        &mut self.bytes[self.end..]
    }

    /// `count` bytes were put into [`room`](Receiver::room), with these descriptors. `lost` says that
    /// there were more, which the kernel threw away (`MSG_CTRUNC`).
    pub fn fed(&mut self, count: usize, fds: Vec<OwnedFd>, lost: bool) {
        self.end = (self.end + count).min(self.bytes.len());
        let end = self.at + (self.end - self.start) as u64;
        // Messages that are done are not walked over again.
        let under_way = match &self.skip {
            Some((header, left)) => (self.at + left).saturating_sub(u64::from(header.size)),
            None => self.at,
        };
        self.last = self.last.max(under_way);
        while let Some(size) = self.size_at(self.last) {
            match self.last.checked_add(size) {
                Some(next) if next < end => self.last = next,
                _ => break,
            }
        }
        if fds.is_empty() && !lost {
            return;
        }
        match self.fds.back_mut() {
            Some(arrived) if arrived.at == self.last => {
                arrived.lost |= lost;
                arrived.fds.extend(fds);
                // As many as one message can carry; a sender that splits one to bring more is not
                // among the known ones.
                arrived.lost |= arrived.fds.len() > MAX_FDS;
                arrived.fds.truncate(MAX_FDS);
            }
            _ => self.fds.push_back(Arrived {
                at: self.last,
                fds,
                lost,
            }),
        }
    }

    /// The next whole message, if there is one. It stays until [`done`](Receiver::done).
    ///
    /// # Errors
    /// `EPROTO`: a header that says its message is shorter than a header. Nothing that follows means
    /// anything: the connection is to be closed.
    #[expect(
        clippy::should_implement_trait,
        reason = "what it gives borrows from it, which an iterator's items cannot"
    )]
    pub fn next(&mut self) -> Result<Option<Message<'_>>, Errno> {
        self.done();
        if self.skip.is_none() {
            let Some(header) = self.peek() else {
                return Ok(None);
            };
            let size = header.size as usize;
            if size < HEADER {
                return Err(Errno::PROTO);
            }
            if size <= MAX_MESSAGE {
                if self.end - self.start < size {
                    return Ok(None);
                }
                self.given = size;
                let (fds, lost) = self.fds_of(self.at);
                return Ok(Some(Message {
                    header,
                    payload: &self.bytes[self.start + HEADER..self.start + size],
                    fds,
                    refused: lost.then_some(Errno::MFILE),
                }));
            }
            self.skip = Some((header, u64::from(header.size)));
        }
        let Some((header, left)) = &mut self.skip else {
            return Ok(None);
        };
        let header = *header;
        let drop = (*left).min((self.end - self.start) as u64);
        *left -= drop;
        let is_over = *left == 0;
        // No wrap: what was received is less than a `usize`, what was ever sent less than a `u64`.
        self.start += drop as usize;
        self.at += drop;
        if !is_over {
            return Ok(None);
        }
        self.skip = None;
        let begin = self.at - u64::from(header.size);
        let (fds, _) = self.fds_of(begin);
        Ok(Some(Message {
            header,
            payload: &[],
            fds,
            refused: Some(Errno::MSGSIZE),
        }))
    }

    /// The message given out last is not needed any more.
    pub fn done(&mut self) {
        self.start += self.given;
        self.at += self.given as u64;
        self.given = 0;
    }

    /// True when nothing has arrived of a next message.
    pub fn is_empty(&self) -> bool {
        self.start + self.given == self.end && self.skip.is_none()
    }

    /// Gives memory back, as a connection does that comes to rest.
    pub fn shrink(&mut self) {
        self.done();
        if self.start == self.end {
            (self.bytes, self.start, self.end) = (Vec::new(), 0, 0);
        }
    }

    fn peek(&self) -> Option<Header> {
        Header::read_from_prefix(&self.bytes[self.start..self.end])
            .ok()
            .map(|(header, _)| header)
    }

    /// The size of the message at a place in the stream, if its header is here.
    fn size_at(&self, place: u64) -> Option<u64> {
        if let Some((header, left)) = &self.skip {
            let begin = (self.at + left).checked_sub(u64::from(header.size));
            if begin == Some(place) {
                return Some(u64::from(header.size));
            }
        }
        let from = self.start + usize::try_from(place.checked_sub(self.at)?).ok()?;
        let (header, _) = Header::read_from_prefix(self.bytes.get(from..self.end)?).ok()?;
        let size = u64::from(header.size);
        (size >= HEADER as u64).then_some(size)
    }

    /// Takes what belongs to the message that starts there, and what was left of earlier ones.
    fn fds_of(&mut self, place: u64) -> (Vec<OwnedFd>, bool) {
        let mut taken = (Vec::new(), false);
        while self.fds.front().is_some_and(|arrived| arrived.at <= place) {
            if let Some(arrived) = self.fds.pop_front()
                && arrived.at == place
            {
                taken = (arrived.fds, arrived.lost);
            }
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    fn message(id: u16, payload: &[u8]) -> Vec<u8> {
        let header = Header {
            id,
            command: 1,
            size: (HEADER + payload.len()) as u32,
            ..Header::default()
        };
        [header.as_bytes(), payload].concat()
    }

    fn feed(receiver: &mut Receiver, bytes: &[u8], fds: Vec<OwnedFd>) {
        let mut fds = Some(fds);
        let mut rest = bytes;
        while !rest.is_empty() {
            let room = receiver.room();
            let n = room.len().min(rest.len());
            room[..n].copy_from_slice(&rest[..n]);
            rest = &rest[n..];
            receiver.fed(n, fds.take().unwrap_or_default(), false);
            assert!(n > 0);
        }
    }

    fn all(receiver: &mut Receiver) -> Vec<(u16, Vec<u8>, usize)> {
        let mut got = Vec::new();
        while let Some(message) = receiver.next().unwrap() {
            got.push((
                message.header.id,
                message.payload.to_vec(),
                message.fds.len(),
            ));
        }
        got
    }

    fn fds(count: usize) -> Vec<OwnedFd> {
        let one = || {
            rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).expect("a descriptor")
        };
        (0..count).map(|_| one()).collect()
    }

    #[test]
    fn any_split_gives_the_same_messages() {
        let stream = [
            message(1, b""),
            message(2, &[7; 100]),
            message(3, b"x"),
            message(4, &vec![9; 70_000]),
            message(5, b"end"),
        ]
        .concat();
        let whole = {
            let mut receiver = Receiver::new();
            let mut got = Vec::new();
            for piece in stream.chunks(1 << 14) {
                feed(&mut receiver, piece, Vec::new());
                got.extend(all(&mut receiver));
            }
            got
        };
        assert_eq!(whole.len(), 5);
        for size in [1, 2, 3, 15, 16, 17, 31, 33, 116, 4096, 69_999] {
            let mut receiver = Receiver::new();
            let mut got = Vec::new();
            for piece in stream.chunks(size) {
                feed(&mut receiver, piece, Vec::new());
                got.extend(all(&mut receiver));
            }
            assert_eq!(got, whole, "in pieces of {size}");
            assert!(receiver.is_empty());
        }
    }

    #[test]
    fn descriptors_go_to_the_message_that_starts_last() {
        let mut receiver = Receiver::new();
        // The tail of one, a whole one, and one with descriptors of which only the start is here.
        let first = message(1, &[1; 40]);
        feed(&mut receiver, &first[..20], fds(1));
        assert_eq!(all(&mut receiver), []);
        let third = message(3, &[3; 8]);
        let glued = [&first[20..], &message(2, b""), &third[..5]].concat();
        feed(&mut receiver, &glued, fds(2));
        let got = all(&mut receiver);
        assert_eq!(
            got.iter().map(|(id, _, n)| (*id, *n)).collect::<Vec<_>>(),
            [(1, 1), (2, 0)]
        );
        // More of the same message, with more descriptors.
        feed(&mut receiver, &third[5..], fds(3));
        let got = all(&mut receiver);
        assert_eq!((got[0].0, got[0].2), (3, 5));
    }

    #[test]
    fn descriptors_of_later_messages_come_with_them() {
        let mut receiver = Receiver::new();
        for id in 0..10 {
            feed(&mut receiver, &message(id, b"abc"), fds(usize::from(id)));
            let got = all(&mut receiver);
            assert_eq!(got, [(id, b"abc".to_vec(), usize::from(id))]);
        }
        // Also right behind one that is thrown away.
        let long = message(11, &vec![0; MAX_MESSAGE]);
        feed(&mut receiver, &long[..100], Vec::new());
        assert_eq!(all(&mut receiver), []);
        let mut got = Vec::new();
        for piece in [&long[100..], &message(12, b"")].concat().chunks(ROOM) {
            let is_last = piece.len() < ROOM;
            feed(&mut receiver, piece, fds(usize::from(is_last)));
            got.extend(all(&mut receiver));
        }
        let got: Vec<_> = got.iter().map(|(id, _, n)| (*id, *n)).collect();
        assert_eq!(got, [(11, 0), (12, 1)]);
    }

    #[test]
    fn too_many_descriptors_are_a_refusal() {
        let mut receiver = Receiver::new();
        let bytes = message(1, b"abcd");
        for byte in bytes.chunks(1) {
            feed(&mut receiver, byte, fds(20));
        }
        let message = receiver.next().unwrap().unwrap();
        assert_eq!(message.refused, Some(Errno::MFILE));
        assert_eq!(message.fds.len(), MAX_FDS);
    }

    #[test]
    fn a_message_that_is_too_long_is_drained() {
        let mut receiver = Receiver::new();
        let long = message(1, &vec![0; MAX_MESSAGE]);
        let mut got = Vec::new();
        let mut first = Some(fds(2));
        for piece in [long, message(2, b"ok")].concat().chunks(10_000) {
            feed(&mut receiver, piece, first.take().unwrap_or_default());
            while let Some(message) = receiver.next().unwrap() {
                got.push((
                    message.header.id,
                    message.payload.len(),
                    message.fds.len(),
                    message.refused,
                ));
            }
            assert!(receiver.bytes.len() <= 2 * ROOM, "nothing of it is kept");
        }
        assert_eq!(got, [(1, 0, 2, Some(Errno::MSGSIZE)), (2, 2, 0, None)]);
    }

    #[test]
    fn a_claim_costs_nothing() {
        let mut receiver = Receiver::new();
        let long = message(1, &vec![0; MAX_MESSAGE - HEADER]);
        feed(&mut receiver, &long[..100], Vec::new());
        assert!(receiver.next().unwrap().is_none());
        receiver.room();
        assert!(receiver.bytes.len() <= 2 * ROOM);
        feed(&mut receiver, &long[100..], Vec::new());
        assert_eq!(
            receiver.next().unwrap().unwrap().payload.len(),
            MAX_MESSAGE - HEADER
        );
        receiver.shrink();
        assert_eq!(receiver.bytes.capacity(), 0);
    }

    #[test]
    fn shorter_than_a_header_is_the_end() {
        let mut receiver = Receiver::new();
        let mut bytes = message(1, b"");
        bytes[4] = 15;
        feed(&mut receiver, &bytes, fds(1));
        assert_eq!(receiver.next().unwrap_err(), Errno::PROTO);
    }
}
