//! Sessions of messages that are nearly right. Each is a number, so each can be played again.
//!
//! What holds for all of them: the server answers each command once and in order, or closes; a command
//! that makes sense is answered after them, on this connection or the next; no descriptor stays open.
//!
//! `VFIOD_FUZZ_SECONDS` plays on for so long, `VFIOD_FUZZ_SESSION` begins at another number. A number
//! that fails belongs into `corpus/sessions.txt`.

mod common;

use common::*;
use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};
use vfio_user::wire::{HEADER, Header, command};
use zerocopy::FromBytes;

/// Sessions of the ordinary test.
const SESSIONS: u64 = 300;
const PROBE: u16 = 0xbeef;

/// An xorshift generator: the same in every run.
struct Random(u64);

impl Random {
    fn new(session: u64) -> Random {
        let mut random = Random(session.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..8 {
            random.below(1);
        }
        random
    }

    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % limit.max(1)
    }

    fn once_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }
}

#[derive(Clone)]
struct Seed {
    command: u16,
    fds: usize,
    payload: Vec<u8>,
}

fn corpus() -> Vec<Seed> {
    let text = include_str!("corpus/messages.txt");
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let mut words = line.split_whitespace();
            let command = words.next().unwrap().parse().unwrap();
            let fds = words.next().unwrap().parse().unwrap();
            let digits: String = words.collect();
            let byte = |at: usize| u8::from_str_radix(&digits[at..at + 2], 16).unwrap();
            let payload = (0..digits.len()).step_by(2).map(byte).collect();
            Seed {
                command,
                fds,
                payload,
            }
        })
        .collect()
}

/// A few changes, or none.
fn mutate(seed: &mut Seed, random: &mut Random) {
    const WORDS: [u64; 12] = [
        0,
        1,
        7,
        0xfff,
        0x1000,
        0x10_0000,
        0x10_0001,
        u32::MAX as u64,
        1 << 32,
        i64::MAX as u64,
        u64::MAX - 0xfff,
        u64::MAX,
    ];
    for _ in 0..random.below(4) {
        let len = seed.payload.len();
        match random.below(7) {
            0 if len > 0 => seed.payload[random.below(len)] = random.below(256) as u8,
            1 if len >= 4 => {
                let at = random.below(len / 4) * 4;
                let word = WORDS[random.below(WORDS.len())] as u32;
                seed.payload[at..at + 4].copy_from_slice(&word.to_ne_bytes());
            }
            2 if len >= 8 => {
                let at = random.below(len / 8) * 8;
                let word = WORDS[random.below(WORDS.len())];
                seed.payload[at..at + 8].copy_from_slice(&word.to_ne_bytes());
            }
            3 => seed.payload.truncate(random.below(len + 1)),
            4 => seed.payload.resize(len + random.below(5000), 0xa5),
            5 => seed.fds = [0, 1, 2, 16, 253][random.below(5)],
            6 if random.once_in(4) => seed.command = random.below(24) as u16,
            _ => {}
        }
    }
    // Doorbells that take the probe down, or leave threads that wait for an answer to DMA.
    let doorbell = |at: &[u8]| {
        [LATER_READ, LATER_WRITE, PANIC]
            .iter()
            .any(|bell| at == bell.to_ne_bytes())
    };
    let rings = match seed.command {
        command::REGION_WRITE => seed.payload.get(..8).is_some_and(doorbell),
        command::REGION_WRITE_MULTI => seed.payload.get(8..).is_some_and(|writes| {
            let mut writes = writes.chunks(24);
            writes.any(|write| write.get(..8).is_some_and(doorbell))
        }),
        _ => false,
    };
    if rings {
        seed.payload.clear();
    }
}

/// What a session has read so far, cut into messages.
struct Wire {
    raw: Raw,
    bytes: Vec<u8>,
    got: VecDeque<(Header, Vec<u8>)>,
    is_closed: bool,
}

impl Wire {
    /// Takes what is there. True if something was, or the end.
    fn read(&mut self) -> bool {
        let mut buf = vec![0; 1 << 16];
        match self.raw.socket.read(&mut buf) {
            Ok(0) => self.is_closed = true,
            Ok(count) => self.bytes.extend(&buf[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
            Err(_) => self.is_closed = true,
        }
        while let Ok((header, _)) = Header::read_from_prefix(&self.bytes) {
            let size = header.size as usize;
            assert!(size >= HEADER, "a reply shorter than its header");
            if self.bytes.len() < size {
                break;
            }
            let payload = self.bytes[HEADER..size].to_vec();
            self.bytes.drain(..size);
            assert!(header.is_reply(), "a command of nobody: {header:?}");
            assert!(header.errno().is_none() || payload.is_empty(), "not bare");
            self.got.push_back((header, payload));
        }
        true
    }

    fn wait(&mut self, flags: rustix::event::PollFlags) {
        let mut ready = [rustix::event::PollFd::new(&self.raw.socket, flags)];
        let moment = rustix::time::Timespec {
            tv_sec: 0,
            tv_nsec: 50_000_000,
        };
        let _ = rustix::event::poll(&mut ready, Some(&moment));
    }

    /// Sends, and reads meanwhile, as a client does that must not block.
    fn write(&mut self, mut bytes: &[u8], mut fds: Option<&[OwnedFd]>) {
        use rustix::event::PollFlags;
        let end = Instant::now() + SOON;
        while !bytes.is_empty() && !self.is_closed {
            assert!(Instant::now() < end, "the server takes nothing more");
            let sent = match fds.filter(|fds| !fds.is_empty()) {
                Some(fds) => {
                    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
                    send_fds(&self.raw, bytes, &fds)
                }
                None => self.raw.socket.write(bytes),
            };
            match sent {
                Ok(sent) => {
                    bytes = &bytes[sent..];
                    fds = None;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.wait(PollFlags::IN | PollFlags::OUT);
                    self.read();
                }
                Err(_) => self.is_closed = true,
            }
        }
    }
}

fn send_fds(
    raw: &Raw,
    bytes: &[u8],
    fds: &[std::os::fd::BorrowedFd<'_>],
) -> std::io::Result<usize> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let mut space = vec![std::mem::MaybeUninit::uninit(); 2048];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
    let iov = [std::io::IoSlice::new(bytes)];
    let sent = sendmsg(&raw.socket, &iov, &mut ancillary, SendFlags::NOSIGNAL);
    sent.map_err(Into::into)
}

fn play(host: &Host, corpus: &[Seed], session: u64) {
    let mut random = Random::new(session);
    let mut raw = host.raw();
    let greetings = [
        (
            0,
            Some(
                r#"{"capabilities":{"max_msg_fds":16,"write_multiple":true,"max_dma_maps":65535}}"#,
            ),
        ),
        (1, None),
        (
            2,
            Some(r#"{"capabilities":{"max_msg_fds":32,"max_data_xfer_size":1024}}"#),
        ),
        (0, Some(r#"{"capabilities":{}}"#)),
    ];
    let (minor, json) = greetings[random.below(greetings.len())];
    let (header, _) = raw.hello(minor, json);
    assert_eq!(header.errno(), None, "nobody else has it");
    raw.socket.set_nonblocking(true).unwrap();
    let mut wire = Wire {
        raw,
        bytes: Vec::new(),
        got: VecDeque::new(),
        is_closed: false,
    };

    let mut expected = VecDeque::new();
    let mut lies = false;
    for id in 0..=random.below(12) as u16 {
        let mut seed = corpus[random.below(corpus.len())].clone();
        mutate(&mut seed, &mut random);
        let flags = match random.below(12) {
            0 => 0x10,
            1 => random.below(64) as u32,
            _ => 0,
        };
        let mut message = Raw::message(id, seed.command, flags, &seed.payload);
        if random.once_in(60) {
            let size = [0, 15, 17, 1 << 20, 1 << 24, u32::MAX][random.below(6)];
            message[4..8].copy_from_slice(&size.to_ne_bytes());
            lies = true;
        }
        if flags & 0xf != 1 && flags & 0x10 == 0 {
            expected.push_back((id, seed.command));
        }
        let is_map = seed.command == command::DMA_MAP;
        let one = |_| if is_map { memfd(4096) } else { eventfd() };
        let fds: Vec<OwnedFd> = (0..seed.fds).map(one).collect();
        let mut rest = &message[..];
        let mut first = Some(&fds[..]);
        while !rest.is_empty() {
            let limit = if random.once_in(3) { 20 } else { 1 << 20 };
            let (piece, more) = rest.split_at(rest.len().min(1 + random.below(limit)));
            wire.write(piece, first.take());
            rest = more;
        }
    }
    if lies || random.once_in(8) {
        // Where its messages end is not known, or the client goes in the middle. The next one tells.
        drop(wire);
        return host.until_free();
    }

    let mut info = [0; 16];
    info[..4].copy_from_slice(&16u32.to_ne_bytes());
    wire.write(
        &Raw::message(PROBE, command::DEVICE_GET_INFO, 0, &info),
        None,
    );
    expected.push_back((PROBE, command::DEVICE_GET_INFO));
    let end = Instant::now() + SOON;
    while let Some((id, command)) = expected.pop_front() {
        while wire.got.is_empty() {
            assert!(!wire.is_closed, "closed, though all was in step");
            assert!(
                Instant::now() < end,
                "message {id}, command {command}: no answer"
            );
            wire.wait(rustix::event::PollFlags::IN);
            wire.read();
        }
        let (header, payload) = wire.got.pop_front().unwrap();
        assert_eq!((header.id, header.command), (id, command), "out of step");
        if id == PROBE {
            assert_eq!(header.errno(), None);
            assert_eq!(payload[8..12], 9u32.to_ne_bytes(), "regions");
        }
    }
    assert!(
        wire.got.is_empty() && wire.bytes.is_empty(),
        "more than answers"
    );
    drop(wire);
    host.until_free();
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is no number")),
    )
}

/// Tells which session it was when one fails.
struct Told(u64);

impl Drop for Told {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "this was session {}: VFIOD_FUZZ_SESSION={0} plays it again",
                self.0
            );
        }
    }
}

#[test]
fn nearly_right_messages_keep_the_server_in_step() {
    let corpus = corpus();
    let host = Host::new();
    let sessions = include_str!("corpus/sessions.txt").lines();
    let kept = sessions.filter(|line| !line.starts_with('#'));
    let kept = kept.map(|line| line.parse::<u64>().unwrap());
    let first = number("VFIOD_FUZZ_SESSION").unwrap_or(1000);
    let time = number("VFIOD_FUZZ_SECONDS").map(Duration::from_secs);
    let begin = Instant::now();

    // What the server opens once for all has been opened then.
    for session in kept {
        let _told = Told(session);
        play(&host, &corpus, session);
    }
    let before = descriptors();
    let wanted = |session: u64| match time {
        Some(time) => begin.elapsed() < time,
        None => session < first + SESSIONS,
    };
    for session in (first..).take_while(|session| wanted(*session)) {
        let _told = Told(session);
        play(&host, &corpus, session);
        if session % 50 == 0 {
            until("all descriptors are closed", || descriptors() <= before);
        }
    }
    until("all descriptors are closed", || descriptors() <= before);
}
