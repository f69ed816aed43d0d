//! A client: opens nodes as any VFIO program does, and measures its own calls.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use rustix::fs::MemfdFlags;
use vfio_uapi::container::DmaMap;
use vfio_uapi::container::DmaUnmap;
use vfio_uapi::container::MapFlags as DmaFlags;
use vfio_uapi::container::extension;
use vfio_uapi::device::AttachFlags;
use vfio_uapi::device::AttachIommufdPt;
use vfio_uapi::device::BindFlags;
use vfio_uapi::device::BindIommufd;
use vfio_uapi::device::RegionInfo;
use vfio_uapi::ioctl;
use vfio_uapi::iommufd::IoasAlloc;
use vfio_uapi::iommufd::IoasMap;
use vfio_uapi::iommufd::MapFlags;

use super::measure;
use super::measure::Pinned;
use super::peer::Converse;
use super::peer::word;
use super::raw;
use super::raw::Mapped;

/// What a container maps at once, and of how much there are many.
const LARGE: u64 = 2 << 20;
const SMALL: u64 = 4096;

/// What a client has open.
#[derive(Debug, Default)]
pub(super) struct Client {
    nodes: Vec<File>,
    iommu: Option<File>,
    /// Keeps what is mapped in the container.
    member: Option<File>,
    memory: Vec<(Option<rustix::fd::OwnedFd>, Mapped)>,
    group: Option<Group>,
}

/// A group that is ready, and one of its devices by name.
#[derive(Debug)]
struct Group {
    file: File,
    name: std::ffi::CString,
    _container: File,
}

impl Converse for Client {
    fn answer(&mut self, words: &[&str]) -> Result<String> {
        match words {
            // For the rest of its life.
            ["pin", ..] => {
                std::mem::forget(Pinned::to(word(words, 1)?)?);
                Ok(String::new())
            }
            ["open", path] => {
                self.nodes.push(open(path)?);
                Ok(String::new())
            }
            ["bind", path, iommu] => {
                let device = open(path)?;
                let iommu = open(iommu)?;
                bind(&device, &iommu)?;
                self.nodes.push(device);
                self.iommu = Some(iommu);
                Ok(String::new())
            }
            ["contain", directory] => self.contain(directory),
            ["map-unmap", ..] => self.map_unmap(words),
            ["map-after", ..] => self.map_after(words),
            ["map", kind, ..] => self.map(kind, word(words, 2)?),
            ["pread", ..] => self.calls(words, pread),
            ["pwrite", ..] => self.calls(words, pwrite),
            ["ioctl", ..] => self.calls(words, region_info),
            ["group", number] => {
                self.group = Some(Group::open(number)?);
                Ok(String::new())
            }
            // A device stays open, so that the others are no first opens.
            ["keep"] => {
                let group = self.group.as_ref().context("no group is open")?;
                self.nodes.push(group.device()?.into());
                Ok(String::new())
            }
            // Each is closed again.
            ["device-fd", count] => {
                let group = self.group.as_ref().context("no group is open")?;
                timed(count.parse()?, || group.device().map(drop))
            }
            // What is no group, but trapped by a supervisor that answers with a descriptor.
            ["any-fd", count] => {
                let (other, _end) = rustix::pipe::pipe()?;
                timed(count.parse()?, || {
                    drop(raw::device_fd(&other, c"any")?);
                    Ok(())
                })
            }
            ["fstat", count] => {
                let file = File::open(std::env::current_exe()?)?;
                timed(count.parse()?, || {
                    rustix::fs::fstat(&file)?;
                    Ok(())
                })
            }
            ["getppid", count] => timed(count.parse()?, || {
                let _ = rustix::process::getppid();
                Ok(())
            }),
            // An ioctl that nobody traps.
            ["other-ioctl", count] => {
                let (other, _end) = rustix::pipe::pipe()?;
                timed(count.parse()?, || {
                    rustix::io::ioctl_fionread(&other)?;
                    Ok(())
                })
            }
            ["trap"] => super::supervised::trap(),
            ["rate", ..] => {
                let node = self.node(words)?;
                let time = Duration::from_millis(word(words, 2)?);
                rate(node, time)
            }
            _ => bail!("a client cannot {words:?}"),
        }
    }
}

fn open(path: &str) -> Result<File> {
    let options = File::options().read(true).write(true).open(path);
    options.with_context(|| format!("opening {path}"))
}

fn bind(device: &File, iommu: &File) -> Result<()> {
    let mut bind = BindIommufd {
        argsz: size(&BindIommufd::default()),
        flags: BindFlags::empty(),
        iommufd: iommu.as_raw_fd(),
        ..BindIommufd::default()
    };
    raw::ioctl(device, ioctl::VFIO_DEVICE_BIND_IOMMUFD, &mut bind).context("BIND_IOMMUFD")?;
    Ok(())
}

#[expect(clippy::cast_possible_truncation, reason = "structures are small")]
fn size<T>(_: &T) -> u32 {
    size_of::<T>() as u32
}

fn pread(node: &File) -> Result<()> {
    node.read_exact_at(&mut [0; 4], 0)?;
    Ok(())
}

fn pwrite(node: &File) -> Result<()> {
    node.write_all_at(&[0; 4], 0)?;
    Ok(())
}

/// An ioctl with an argument of 32 bytes, read and written.
fn region_info(node: &File) -> Result<()> {
    let mut info = RegionInfo::default();
    info.argsz = size(&info);
    raw::ioctl(node, ioctl::VFIO_DEVICE_GET_REGION_INFO, &mut info)?;
    Ok(())
}

/// Nanoseconds that a call takes as a rule.
fn timed(count: u32, mut call: impl FnMut() -> Result<()>) -> Result<String> {
    let mut outcome = Ok(());
    let time = measure::typical(count, || {
        if let Err(error) = call() {
            outcome = Err(error);
        }
    });
    outcome?;
    Ok(time.to_string())
}

impl Group {
    /// The group of this number, with a container of its own.
    fn open(number: &str) -> Result<Self> {
        const TYPE1V2: usize = 3;
        let file = open(&format!("/dev/vfio/{number}"))?;
        let container = open("/dev/vfio/vfio")?;
        let mut fd = container.as_raw_fd();
        raw::ioctl(&file, ioctl::VFIO_GROUP_SET_CONTAINER, &mut fd).context("SET_CONTAINER")?;
        raw::ioctl_value(&container, ioctl::VFIO_SET_IOMMU, TYPE1V2).context("SET_IOMMU")?;
        let devices = format!("/sys/kernel/iommu_groups/{number}/devices");
        let device = std::fs::read_dir(devices)?.next().context("no device")??;
        Ok(Self {
            file,
            name: std::ffi::CString::new(device.file_name().into_encoded_bytes())?,
            _container: container,
        })
    }

    fn device(&self) -> Result<rustix::fd::OwnedFd> {
        Ok(raw::device_fd(&self.file, &self.name)?)
    }
}

fn map_dma(container: &File, vaddr: u64, iova: u64, size: u64) -> Result<()> {
    let mut map = DmaMap {
        argsz: 32,
        flags: DmaFlags::READ | DmaFlags::WRITE,
        vaddr,
        iova,
        size,
    };
    raw::ioctl(container, ioctl::VFIO_IOMMU_MAP_DMA, &mut map)?;
    Ok(())
}

fn unmap_dma(container: &File, iova: u64, size: u64) -> Result<()> {
    let mut unmap = DmaUnmap {
        argsz: 24,
        iova,
        size,
        ..DmaUnmap::default()
    };
    raw::ioctl(container, ioctl::VFIO_IOMMU_UNMAP_DMA, &mut unmap)?;
    anyhow::ensure!(
        unmap.size == size,
        "{} bytes of {size} unmapped",
        unmap.size
    );
    Ok(())
}

/// `pread`s a second.
fn rate(node: &File, time: Duration) -> Result<String> {
    let begin = Instant::now();
    let mut count = 0_u32;
    while begin.elapsed() < time {
        for _ in 0..64 {
            pread(node)?;
        }
        count += 64;
    }
    let rate = f64::from(count) / begin.elapsed().as_secs_f64();
    Ok(rate.to_string())
}

impl Client {
    fn node(&self, words: &[&str]) -> Result<&File> {
        let node: usize = word(words, 1)?;
        self.nodes.get(node).context("no such node is open")
    }

    /// Nanoseconds that a call takes.
    fn calls(&self, words: &[&str], call: fn(&File) -> Result<()>) -> Result<String> {
        let node = self.node(words)?;
        let mut outcome = Ok(());
        let time = measure::typical(word(words, 2)?, || {
            if let Err(error) = call(node) {
                outcome = Err(error);
            }
        });
        outcome?;
        Ok(time.to_string())
    }

    /// Opens a container with a group in it, as the next node, and makes memory to map.
    fn contain(&mut self, directory: &str) -> Result<String> {
        let container = open(&format!("{directory}/vfio"))?;
        let number = std::fs::read_dir(directory)?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .find(|name| name.parse::<u32>().is_ok())
            .context("there is no group")?;
        let group = open(&format!("{directory}/{number}"))?;
        let mut fd = container.as_raw_fd();
        raw::ioctl(&group, ioctl::VFIO_GROUP_SET_CONTAINER, &mut fd).context("SET_CONTAINER")?;
        raw::ioctl_value(
            &container,
            ioctl::VFIO_SET_IOMMU,
            extension::TYPE1_V2 as usize,
        )
        .context("SET_IOMMU")?;
        self.nodes.push(container);
        self.member = Some(group);
        let file = rustix::fs::memfd_create("bench", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&file, LARGE)?;
        let mapped = Mapped::shared(&file, usize::try_from(LARGE)?)?;
        self.memory.push((Some(file), mapped));
        Ok(String::new())
    }

    /// The address of the memory that `contain` made.
    fn address(&self) -> Result<u64> {
        let (_, mapped) = self.memory.last().context("there is no memory")?;
        Ok(mapped.address())
    }

    /// Nanoseconds that mapping and unmapping of 2 MiB take together.
    fn map_unmap(&self, words: &[&str]) -> Result<String> {
        let node = self.node(words)?;
        let vaddr = self.address()?;
        let mut outcome = Ok(());
        let time = measure::typical(word(words, 2)?, || {
            let both = map_dma(node, vaddr, 0, LARGE).and_then(|()| unmap_dma(node, 0, LARGE));
            if let Err(error) = both {
                outcome = Err(error);
            }
        });
        outcome?;
        Ok(time.to_string())
    }

    /// Nanoseconds that mapping of a page takes when so many others are mapped.
    fn map_after(&self, words: &[&str]) -> Result<String> {
        let node = self.node(words)?;
        let vaddr = self.address()?;
        let page = |n: u64| {
            let from = vaddr + n % (LARGE / SMALL) * SMALL;
            map_dma(node, from, n * SMALL, SMALL)
        };
        let before: u64 = word(words, 2)?;
        (0..before).try_for_each(page)?;
        let mut next = before;
        let mut outcome = Ok(());
        let time = measure::typical(word(words, 3)?, || {
            if let Err(error) = page(next) {
                outcome = Err(error);
            }
            next += 1;
        });
        outcome?;
        unmap_dma(node, 0, next * SMALL)?;
        Ok(time.to_string())
    }

    /// Makes memory, full of 0x5a, and lets the bound device reach it. Answers with its IOVA, its
    /// address and its descriptor, which is -1 for private memory.
    fn map(&mut self, kind: &str, length: usize) -> Result<String> {
        let device = self.nodes.last().context("no device is bound")?;
        let iommu = self.iommu.as_ref().context("no device is bound")?;
        let (file, mapped) = match kind {
            "private" => (None, Mapped::private(length)?),
            "shared" => {
                let file = rustix::fs::memfd_create("bench", MemfdFlags::CLOEXEC)?;
                rustix::fs::ftruncate(&file, length as u64)?;
                let mapped = Mapped::shared(&file, length)?;
                (Some(file), mapped)
            }
            _ => bail!("there is no {kind} memory"),
        };
        mapped.fill(0x5a);

        let mut ioas = IoasAlloc::default();
        ioas.size = size(&ioas);
        raw::ioctl(iommu, ioctl::IOMMU_IOAS_ALLOC, &mut ioas).context("IOAS_ALLOC")?;
        let mut attach = AttachIommufdPt {
            argsz: 12,
            flags: AttachFlags::empty(),
            pt_id: ioas.out_ioas_id,
            ..AttachIommufdPt::default()
        };
        raw::ioctl(device, ioctl::VFIO_DEVICE_ATTACH_IOMMUFD_PT, &mut attach).context("ATTACH")?;
        let mut map = IoasMap {
            flags: MapFlags::READABLE | MapFlags::WRITEABLE,
            ioas_id: ioas.out_ioas_id,
            user_va: mapped.address(),
            length: length as u64,
            ..IoasMap::default()
        };
        map.size = size(&map);
        raw::ioctl(iommu, ioctl::IOMMU_IOAS_MAP, &mut map).context("IOAS_MAP")?;
        let descriptor = file.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let answer = format!("{} {} {descriptor}", map.iova, mapped.address());
        self.memory.push((file, mapped));
        Ok(answer)
    }
}
