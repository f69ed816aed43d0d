//! A client that does nothing but send messages and wait for their replies.

use std::io::IoSlice;
use std::io::Read as _;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use rustix::event::EventfdFlags;
use rustix::fs::MemfdFlags;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendAncillaryMessage;
use rustix::net::SendFlags;
use vfio_uapi::device::IrqSet;
use vfio_uapi::device::IrqSetFlags;
use vfio_user::wire::DmaMap;
use vfio_user::wire::DmaUnmap;
use vfio_user::wire::Header;
use vfio_user::wire::RegionAccess;
use vfio_user::wire::command;
use vfio_user::wire::flags;
use vfio_user::wire::map_flags;
use zerocopy::FromBytes as _;
use zerocopy::IntoBytes as _;

use super::super::card::INTERRUPT;
use super::super::card::REGISTER;
use super::super::card::TOUCH;
use super::super::measure;
use super::super::peer::Converse;
use super::super::peer::word;
use super::servers::LARGE;

/// Where the one window is.
const IOVA: u64 = 1 << 32;
/// A window of many.
const SMALL: u64 = 4096;
/// Files behind many windows.
const FILES: u32 = 16;

/// The connections of a client.
#[derive(Debug, Default)]
pub(crate) struct Client {
    connections: Vec<Connection>,
}

#[derive(Debug)]
struct Connection {
    socket: UnixStream,
    /// Memory: one file, or as many as `files` made.
    files: Vec<OwnedFd>,
    interrupt: OwnedFd,
    /// The message under way, and its reply.
    message: Vec<u8>,
    reply: Vec<u8>,
}

impl Converse for Client {
    fn answer(&mut self, words: &[&str]) -> Result<String> {
        match *words {
            ["connect", path] => {
                self.connections.push(Connection::new(path)?);
                Ok(String::new())
            }
            ["disconnect"] => {
                self.connections.pop().context("no connection")?;
                Ok(String::new())
            }
            ["files"] => {
                let connection = self.connections.last_mut().context("no connection")?;
                connection.files = (0..FILES).map(|_| memory(LARGE)).collect::<Result<_>>()?;
                Ok(String::new())
            }
            ["fill", ..] => {
                let count: u32 = word(words, 2)?;
                let connection = self.connection(words, 1)?;
                (0..count).try_for_each(|n| connection.map_small(n))?;
                Ok(String::new())
            }
            ["windows", ..] => {
                let (first, count) = (word(words, 2)?, word(words, 3)?);
                return Ok(self
                    .connection(words, 1)?
                    .windows(first, count)?
                    .to_string());
            }
            [_, length, ..] => {
                let length: u32 = length.parse()?;
                let count: u32 = word(words, 3)?;
                let connection = self.connection(words, 2)?;
                let time = match words.first() {
                    Some(&"read") => connection.time(count, |c| c.read(length)),
                    Some(&"write") => connection.time(count, |c| c.write(REGISTER, &[7; 4])),
                    Some(&"map") => connection.time(count, |c| {
                        c.map(IOVA, 0, LARGE, 0)?;
                        c.unmap(IOVA, LARGE)
                    }),
                    Some(&"touch") => connection.time(count, |c| {
                        c.map(IOVA, 0, LARGE, 0)?;
                        c.write(TOUCH, &(IOVA + 8192).to_ne_bytes())?;
                        c.unmap(IOVA, LARGE)
                    }),
                    Some(&"interrupt") => connection.time(count, Connection::interrupted),
                    _ => bail!("a client cannot {words:?}"),
                };
                Ok(time?.to_string())
            }
            _ => bail!("a client cannot {words:?}"),
        }
    }
}

impl Client {
    fn connection(&mut self, words: &[&str], index: usize) -> Result<&mut Connection> {
        let number: usize = word(words, index)?;
        self.connections.get_mut(number).context("no connection")
    }
}

/// A file of memory.
fn memory(size: u64) -> Result<OwnedFd> {
    let file = rustix::fs::memfd_create("bench", MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&file, size)?;
    Ok(file)
}

impl Connection {
    /// Connects, says VERSION, and gives the device an eventfd for its interrupt.
    fn new(path: &str) -> Result<Self> {
        let socket = UnixStream::connect(path).with_context(|| format!("connecting to {path}"))?;
        let mut connection = Self {
            socket,
            files: vec![memory(LARGE)?],
            // As QEMU's are.
            interrupt: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            message: Vec::new(),
            reply: vec![0; 16 << 10],
        };
        let hello =
            b"\0\0\x01\0{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":1048576}}\0";
        connection.call(command::VERSION, &[hello], None)?;
        let set = IrqSet {
            argsz: u32::try_from(size_of::<IrqSet>())?,
            flags: IrqSetFlags::DATA_EVENTFD | IrqSetFlags::ACTION_TRIGGER,
            index: 0,
            start: 0,
            count: 1,
        };
        let eventfd = connection.interrupt.try_clone()?;
        connection.call(command::DEVICE_SET_IRQS, &[set.as_bytes()], Some(&eventfd))?;
        Ok(connection)
    }

    /// Sends a command and waits for the whole of its reply; how long that was.
    fn call(&mut self, command: u16, parts: &[&[u8]], fd: Option<&OwnedFd>) -> Result<usize> {
        let size = size_of::<Header>() + parts.iter().map(|part| part.len()).sum::<usize>();
        let header = Header {
            id: 1,
            command,
            size: u32::try_from(size)?,
            ..Header::default()
        };
        self.message.clear();
        self.message.extend_from_slice(header.as_bytes());
        for part in parts {
            self.message.extend_from_slice(part);
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        }
        let sent = rustix::net::sendmsg(
            &self.socket,
            &[IoSlice::new(&self.message)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )?;
        ensure!(sent == size, "{sent} of {size} bytes sent");
        let mut got = 0;
        loop {
            let more = self
                .socket
                .read(self.reply.get_mut(got..).unwrap_or_default())?;
            ensure!(more > 0, "the server hung up");
            got += more;
            let Ok((header, _)) =
                Header::read_from_prefix(self.reply.get(..got).unwrap_or_default())
            else {
                continue;
            };
            if got >= header.size as usize {
                ensure!(
                    header.flags & flags::ERROR == 0,
                    "command {command}: errno {}",
                    header.error
                );
                return Ok(got);
            }
        }
    }

    fn time(&mut self, count: u32, mut f: impl FnMut(&mut Self) -> Result<()>) -> Result<f64> {
        let mut outcome = Ok(());
        let time = measure::typical(count, || {
            if let Err(error) = f(self) {
                outcome = Err(error);
            }
        });
        outcome.map(|()| time)
    }

    fn read(&mut self, count: u32) -> Result<()> {
        let access = RegionAccess {
            offset: 0,
            region: 0,
            count,
        };
        let got = self.call(command::REGION_READ, &[access.as_bytes()], None)?;
        ensure!(got == 32 + count as usize, "{got} bytes for {count}");
        Ok(())
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let access = RegionAccess {
            offset,
            region: 0,
            count: u32::try_from(data.len())?,
        };
        self.call(command::REGION_WRITE, &[access.as_bytes(), data], None)?;
        Ok(())
    }

    fn interrupted(&mut self) -> Result<()> {
        self.write(INTERRUPT, &[1; 4])?;
        let mut counter = [0; 8];
        rustix::io::read(&self.interrupt, &mut counter)?;
        ensure!(u64::from_ne_bytes(counter) == 1, "not one interrupt");
        Ok(())
    }

    fn map(&mut self, iova: u64, offset: u64, size: u64, file: usize) -> Result<()> {
        let map = DmaMap {
            argsz: u32::try_from(size_of::<DmaMap>())?,
            flags: map_flags::READ | map_flags::WRITE,
            offset,
            address: iova,
            size,
        };
        let files = std::mem::take(&mut self.files);
        let fd = files.get(file).context("no such file");
        let done = fd.and_then(|fd| self.call(command::DMA_MAP, &[map.as_bytes()], Some(fd)));
        self.files = files;
        done.map(drop)
    }

    fn unmap(&mut self, iova: u64, size: u64) -> Result<()> {
        let unmap = DmaUnmap {
            argsz: u32::try_from(size_of::<DmaUnmap>())?,
            flags: 0,
            address: iova,
            size,
        };
        self.call(command::DMA_UNMAP, &[unmap.as_bytes()], None)?;
        Ok(())
    }

    /// The `n`th of many windows.
    fn map_small(&mut self, n: u32) -> Result<()> {
        let offset = u64::from(n / FILES) * SMALL % LARGE;
        let file = usize::try_from(n % FILES)?;
        self.map(IOVA + u64::from(n) * SMALL, offset, SMALL, file)
    }

    /// Nanoseconds that mapping of one window takes, from the `first` on; they are unmapped again.
    fn windows(&mut self, first: u32, count: u32) -> Result<f64> {
        let mut next = first;
        let time = self.time(count, |connection| {
            let n = next;
            next += 1;
            connection.map_small(n)
        });
        for n in first..next {
            self.unmap(IOVA + u64::from(n) * SMALL, SMALL)?;
        }
        time
    }
}
