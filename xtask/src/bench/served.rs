//! Our server: the real nodes, in front of a device that has a few registers and DMA.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use nix::sys::uio;
use vfio_core::Config;
use vfio_core::Core;
use vfio_core::model::faux;
use vfio_fuse::Dev;

use super::card::Driver;
use super::card::Outside;
use super::measure;
use super::peer::Converse;
use super::peer::word;
use super::raw::Mapped;

/// Two devices behind their nodes.
#[derive(Debug)]
pub(super) struct Server {
    _dev: Dev,
    _devices: [faux::Device; 2],
    outside: Arc<Outside>,
    closed: Receiver<u64>,
}

impl Server {
    pub(super) fn start(arguments: &[String]) -> Result<Self> {
        let [directory] = arguments else {
            bail!("a directory is needed");
        };
        let core = Core::new(Config::default());
        let options = vfio_fuse::Options::under(PathBuf::from(directory));
        let dev = Dev::start(&core, &options).context("mounting the nodes")?;
        let (outside, closed) = Outside::new();
        let make = |name| faux::Device::create(&core, name, Driver(Arc::clone(&outside)));
        let devices = [make("zero")?, make("one")?];
        Ok(Self {
            _dev: dev,
            _devices: devices,
            outside,
            closed,
        })
    }
}

impl Converse for Server {
    fn answer(&mut self, words: &[&str]) -> Result<String> {
        let number = match words {
            ["closed"] => {
                let closed = self.closed.recv_timeout(Duration::from_secs(10));
                return Ok(closed.context("the device was not closed")?.to_string());
            }
            ["dma", ..] => self.dma(Walk::of(words)?, word(words, 4)?)?,
            ["process-vm", ..] => process_vm(Walk::of(words)?, word(words, 4)?, word(words, 5)?)?,
            ["memcpy", ..] => memcpy(Walk::of(words)?, word(words, 4)?, word(words, 5)?)?,
            _ => bail!("the server cannot {words:?}"),
        };
        Ok(number.to_string())
    }
}

/// How the copies go through the client's memory: so many of one size, one behind the other, from
/// the start again at the end.
#[derive(Debug, Clone, Copy)]
struct Walk {
    count: u32,
    length: usize,
    span: usize,
}

impl Walk {
    fn of(words: &[&str]) -> Result<Self> {
        Ok(Self {
            count: word(words, 1)?,
            length: word(words, 2)?,
            span: word(words, 3)?,
        })
    }

    /// Nanoseconds of one `copy` at an offset.
    fn measure(self, mut copy: impl FnMut(usize, &mut [u8]) -> Result<()>) -> Result<f64> {
        let mut buf = vec![0xee; self.length];
        let mut offset = 0;
        let mut outcome = Ok(());
        let time = measure::typical(self.count, || {
            if let Err(error) = copy(offset, &mut buf) {
                outcome = Err(error);
            }
            offset += self.length;
            if offset + self.length > self.span {
                offset = 0;
            }
        });
        outcome?;
        // The client has filled its memory with this.
        anyhow::ensure!(buf.iter().all(|byte| *byte == 0x5a), "other bytes came");
        Ok(time)
    }
}

impl Server {
    fn dma(&self, walk: Walk, iova: u64) -> Result<f64> {
        let dma = self.outside.dma().context("no device is open")?;
        walk.measure(|offset, buf| Ok(dma.read(iova + offset as u64, buf)?))
    }
}

fn process_vm(walk: Walk, pid: i32, address: usize) -> Result<f64> {
    let pid = nix::unistd::Pid::from_raw(pid);
    walk.measure(|offset, buf| {
        let remote = [uio::RemoteIoVec {
            base: address + offset,
            len: buf.len(),
        }];
        let copied = uio::process_vm_readv(pid, &mut [std::io::IoSliceMut::new(buf)], &remote)?;
        anyhow::ensure!(copied == walk.length, "a short copy");
        Ok(())
    })
}

fn memcpy(walk: Walk, pid: u32, fd: i32) -> Result<f64> {
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/{pid}/fd/{fd}"))?;
    let mapped = Mapped::shared(&file, walk.span)?;
    walk.measure(|offset, buf| {
        mapped.copy_to(offset, buf);
        Ok(())
    })
}
