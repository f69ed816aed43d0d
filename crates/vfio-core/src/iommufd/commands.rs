//! The commands on objects and IOASes (`drivers/iommu/iommufd/main.c`, `ioas.c`).
//!
//! Inside a command: reserved fields and flags (`EOPNOTSUPP`), then overflow, then the object,
//! then the content. Arguments are copied with no lock held.

use super::Iommufd;
use super::ioas::{Ioas, Part, Place};
use super::table::{Leftovers, MAX_OBJECTS, Object};
use crate::caller::{Caller, Capability};
use crate::dma::{Mapper, Prot, page_size};
use crate::{Errno, Result};
use dma_memory::{ProcessMemory, Range, Source};
use std::collections::BTreeMap;
use std::mem::offset_of;
use std::sync::Arc;
use vfio_uapi::dialect::iommufd::{read, write_back};
use vfio_uapi::ioctl::{IommufdIoctl, IommufdRoute, iommufd_route};
use vfio_uapi::iommufd::{
    Destroy, IoasAlloc, IoasAllowIovas, IoasChangeProcess, IoasCopy, IoasIovaRanges, IoasMap,
    IoasMapFile, IoasUnmap, IommuOption, IovaRange, MapFlags, VfioIoas, option_id, option_op,
    vfio_ioas_op,
};
use zerocopy::{FromZeros, IntoBytes};

/// How many ranges one `IOMMU_IOAS_ALLOW_IOVAS` may have; beyond is `ENOMEM`.
const MAX_ALLOWED: u32 = 1 << 16;

impl Iommufd {
    /// An ioctl on the file. Returns what the client's `ioctl()` returns. A number outside
    /// iommufd's is the container emulation's; one that nobody knows is `ENOTTY`.
    ///
    /// It may wait for the client's memory as long as the client likes; no lock is held then.
    pub fn ioctl(self: &Arc<Self>, cmd: u32, arg: u64, caller: &dyn Caller) -> Result<u32> {
        let cmd = match iommufd_route(cmd) {
            IommufdRoute::Native(cmd) => cmd,
            IommufdRoute::Compat => return self.compat_ioctl(cmd, arg, caller),
            IommufdRoute::Unknown(unknown) => return Err(unknown.into()),
        };
        match cmd {
            IommufdIoctl::Destroy => self.destroy(arg, caller),
            IommufdIoctl::IoasAlloc => self.ioas_alloc(arg, caller),
            IommufdIoctl::IoasAllowIovas => self.allow_iovas(arg, caller),
            IommufdIoctl::IoasIovaRanges => self.iova_ranges(arg, caller),
            IommufdIoctl::IoasMap => self.map(arg, caller),
            IommufdIoctl::IoasMapFile => self.map_file(arg, caller),
            IommufdIoctl::IoasCopy => self.copy(arg, caller),
            IommufdIoctl::IoasUnmap => self.unmap(arg, caller),
            IommufdIoctl::Option => self.option(arg, caller),
            IommufdIoctl::VfioIoas => self.vfio_ioas(arg, caller),
            IommufdIoctl::IoasChangeProcess => self.change_process(arg, caller),
            other => self.hwpt_ioctl(other, arg, caller),
        }
        .map(|()| 0)
    }

    fn destroy(&self, arg: u64, caller: &dyn Caller) -> Result {
        let (cmd, _) = read::<Destroy, _>(caller, arg, Destroy::MIN_SIZE)?;
        let mut left = Leftovers::default();
        let done = self.table().destroy(cmd.id, &mut left);
        left.settle();
        done
    }

    fn ioas_alloc(&self, arg: u64, caller: &dyn Caller) -> Result {
        let (mut cmd, size) = read::<IoasAlloc, _>(caller, arg, IoasAlloc::MIN_SIZE)?;
        if cmd.flags != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        let index = self.table().take_id()?;
        cmd.out_ioas_id = index.get();
        // An object whose number cannot be told is not made.
        write_back(caller, arg, &cmd, size)?;
        let ioas = Ioas::new(index.get(), Arc::clone(self.quota()));
        let mut table = self.table();
        if table.entries.len() >= MAX_OBJECTS {
            return Err(Errno::NOMEM);
        }
        table.add(index, Object::Ioas(Arc::new(ioas)));
        Ok(())
    }

    fn iova_ranges(&self, arg: u64, caller: &dyn Caller) -> Result {
        let (mut cmd, size) = read::<IoasIovaRanges, _>(caller, arg, IoasIovaRanges::MIN_SIZE)?;
        if cmd.reserved != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        let (ranges, alignment) = self.ioas(cmd.ioas_id)?.ranges();
        let ranges: Vec<IovaRange> = ranges.iter().map(|r| to_abi(*r)).collect();
        let room = usize::try_from(cmd.num_iovas).unwrap_or(usize::MAX);
        let fitting = ranges.get(..room).unwrap_or(&ranges);
        if !fitting.is_empty() {
            caller.copy_out(cmd.allowed_iovas, fitting.as_bytes())?;
        }
        cmd.num_iovas = u32::try_from(ranges.len()).map_err(|_| Errno::OVERFLOW)?;
        cmd.out_iova_alignment = alignment;
        write_back(caller, arg, &cmd, size)?;
        if ranges.len() > room {
            return Err(Errno::MSGSIZE);
        }
        Ok(())
    }

    fn allow_iovas(&self, arg: u64, caller: &dyn Caller) -> Result {
        let (cmd, _) = read::<IoasAllowIovas, _>(caller, arg, IoasAllowIovas::MIN_SIZE)?;
        if cmd.reserved != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        let ioas = self.ioas(cmd.ioas_id)?;
        ioas.allow(read_ranges(cmd.allowed_iovas, cmd.num_iovas, caller)?)
    }

    fn map(&self, arg: u64, caller: &dyn Caller) -> Result {
        let mapper = Mapper::new(caller);
        let (mut cmd, size) = read::<IoasMap, _>(&mapper, arg, IoasMap::MIN_SIZE)?;
        if cmd.reserved != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        let prot = check_flags(cmd.flags, &[cmd.iova, cmd.length])?;
        let ioas = self.ioas(cmd.ioas_id)?;
        check_span(cmd.user_va, cmd.length)?;
        let files = Arc::clone(self.files());
        let memory = ProcessMemory::new(self.mapper.memory(&mapper)?, cmd.user_va, files);
        let part = Part {
            source: Source::Process(memory),
            len: cmd.length,
            writable: prot.write,
        };
        cmd.iova = ioas.map(vec![part], place(cmd.flags, cmd.iova), prot)?;
        write_back(caller, arg, &cmd, size)
    }

    fn map_file(&self, arg: u64, caller: &dyn Caller) -> Result {
        let (mut cmd, size) = read::<IoasMapFile, _>(caller, arg, IoasMapFile::MIN_SIZE)?;
        let prot = check_flags(cmd.flags, &[cmd.iova, cmd.length])?;
        let ioas = self.ioas(cmd.ioas_id)?;
        if cmd.fd < 0 {
            return Err(Errno::BADF);
        }
        let fd = caller.get_fd(cmd.fd)?;
        check_span(cmd.start, cmd.length)?;
        let part = Part {
            source: Source::File {
                file: self.files().open(fd)?,
                offset: cmd.start,
            },
            len: cmd.length,
            writable: prot.write,
        };
        cmd.iova = ioas.map(vec![part], place(cmd.flags, cmd.iova), prot)?;
        write_back(caller, arg, &cmd, size)
    }

    fn copy(&self, arg: u64, caller: &dyn Caller) -> Result {
        let (mut cmd, size) = read::<IoasCopy, _>(caller, arg, IoasCopy::MIN_SIZE)?;
        let prot = check_flags(cmd.flags, &[cmd.length, cmd.src_iova, cmd.dst_iova])?;
        let source = self.ioas(cmd.src_ioas_id)?;
        let parts = source.parts(cmd.src_iova, cmd.length)?;
        let target = self.ioas(cmd.dst_ioas_id)?;
        cmd.dst_iova = target.map(parts, place(cmd.flags, cmd.dst_iova), prot)?;
        write_back(caller, arg, &cmd, size)
    }

    fn unmap(&self, arg: u64, caller: &dyn Caller) -> Result {
        let (mut cmd, size) = read::<IoasUnmap, _>(caller, arg, IoasUnmap::MIN_SIZE)?;
        let ioas = self.ioas(cmd.ioas_id)?;
        let mut unmapped = 0;
        if (cmd.iova, cmd.length) == (0, u64::MAX) {
            ioas.unmap(Range::ALL, &mut unmapped)?;
        } else {
            check_range(&[cmd.iova, cmd.length])?;
            ioas.unmap(Range::with_len(cmd.iova, cmd.length)?, &mut unmapped)?;
            if unmapped == 0 {
                return Err(Errno::NOENT);
            }
        }
        cmd.length = unmapped;
        write_back(caller, arg, &cmd, size)
    }

    fn option(&self, arg: u64, caller: &dyn Caller) -> Result {
        let (cmd, _) = read::<IommuOption, _>(caller, arg, IommuOption::MIN_SIZE)?;
        if cmd.reserved != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        let value = match cmd.option_id {
            option_id::RLIMIT_MODE => self.rlimit_mode(&cmd, caller)?,
            option_id::HUGE_PAGES => self.huge_pages(&cmd)?,
            _ => return Err(Errno::OPNOTSUPP),
        };
        // Only the value is written back.
        let at = arg
            .checked_add(offset_of!(IommuOption, val64) as u64)
            .ok_or(Errno::FAULT)?;
        caller.copy_out(at, &value.to_ne_bytes())
    }

    fn rlimit_mode(&self, cmd: &IommuOption, caller: &dyn Caller) -> Result<u64> {
        if cmd.object_id != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        match cmd.op {
            option_op::GET => Ok(self.table().account_process.into()),
            option_op::SET => {
                if !caller.capable(Capability::SysResource) {
                    return Err(Errno::PERM);
                }
                let mut table = self.table();
                if !table.entries.is_empty() {
                    return Err(Errno::BUSY);
                }
                table.account_process = flag(cmd.val64)?;
                Ok(cmd.val64)
            }
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    fn huge_pages(&self, cmd: &IommuOption) -> Result<u64> {
        let ioas = self.ioas(cmd.object_id)?;
        match cmd.op {
            option_op::GET => Ok(ioas.huge_pages().into()),
            option_op::SET => ioas.set_huge_pages(flag(cmd.val64)?).map(|()| cmd.val64),
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    fn vfio_ioas(&self, arg: u64, caller: &dyn Caller) -> Result {
        let (mut cmd, size) = read::<VfioIoas, _>(caller, arg, VfioIoas::MIN_SIZE)?;
        if cmd.reserved != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        match cmd.op {
            vfio_ioas_op::GET => {
                cmd.ioas_id = self.table().compat.ok_or(Errno::NODEV)?;
                write_back(caller, arg, &cmd, size)
            }
            vfio_ioas_op::SET => {
                let mut table = self.table();
                table.compat = Some(table.ioas(cmd.ioas_id)?.id());
                Ok(())
            }
            vfio_ioas_op::CLEAR => {
                self.table().compat = None;
                Ok(())
            }
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    /// Nothing is accounted to anybody, and what is mapped is files: there is nothing to move.
    fn change_process(&self, arg: u64, caller: &dyn Caller) -> Result {
        let (cmd, _) = read::<IoasChangeProcess, _>(caller, arg, IoasChangeProcess::MIN_SIZE)?;
        if cmd.reserved != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        let ioases: Vec<Arc<Ioas>> = {
            let table = self.table();
            let ioas = |object: &Object| match object {
                Object::Ioas(ioas) => Some(Arc::clone(ioas)),
                _ => None,
            };
            table
                .entries
                .values()
                .filter_map(|e| ioas(&e.object))
                .collect()
        };
        if ioases.iter().all(|ioas| ioas.is_all_files()) {
            Ok(())
        } else {
            Err(Errno::INVAL)
        }
    }
}

/// `EOVERFLOW` for what does not fit below the last address.
fn check_range(values: &[u64]) -> Result {
    match values.contains(&u64::MAX) {
        true => Err(Errno::OVERFLOW),
        false => Ok(()),
    }
}

/// What MAP, MAP_FILE and COPY check before they look for objects. Returns the permissions.
fn check_flags(flags: MapFlags, values: &[u64]) -> Result<Prot> {
    if flags.has_unknown_bits() {
        return Err(Errno::OPNOTSUPP);
    }
    check_range(values)?;
    let prot = Prot {
        read: flags.contains(MapFlags::READABLE),
        write: flags.contains(MapFlags::WRITEABLE),
    };
    if prot == Prot::default() {
        return Err(Errno::INVAL);
    }
    Ok(prot)
}

/// `EOVERFLOW` if the memory wraps, `EINVAL` if there is none.
pub(super) fn check_span(start: u64, length: u64) -> Result {
    start.checked_add(length).ok_or(Errno::OVERFLOW)?;
    // So that rounding to pages cannot wrap (`iopt_alloc_pages`).
    if length == 0 || length > u64::MAX - page_size() {
        return Err(Errno::INVAL);
    }
    Ok(())
}

fn place(flags: MapFlags, iova: u64) -> Place {
    if flags.contains(MapFlags::FIXED_IOVA) {
        Place::Fixed(iova)
    } else {
        Place::Automatic
    }
}

fn flag(value: u64) -> Result<bool> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Errno::INVAL),
    }
}

fn to_abi(range: Range) -> IovaRange {
    IovaRange {
        start: range.start(),
        last: range.last(),
    }
}

/// The client's array, in order. `EFAULT` or `EINVAL` (a range of one address, or backwards, or
/// overlapping an earlier one), whichever comes first; `ENOMEM` if it is too long.
fn read_ranges(addr: u64, number: u32, caller: &dyn Caller) -> Result<Vec<Range>> {
    if number > MAX_ALLOWED {
        return Err(Errno::NOMEM);
    }
    const PIECE: u32 = 256;
    const SIZE: u64 = size_of::<IovaRange>() as u64;
    let mut allowed: BTreeMap<u64, u64> = BTreeMap::new();
    let mut add = |range: &IovaRange| {
        let before = allowed.range(..=range.last).next_back();
        if range.start >= range.last || before.is_some_and(|(_, last)| *last >= range.start) {
            return Err(Errno::INVAL);
        }
        allowed.insert(range.start, range.last);
        Ok(())
    };
    let mut done = 0;
    while done < number {
        let mut piece = [IovaRange::new_zeroed(); PIECE as usize];
        let count = PIECE.min(number - done);
        let piece = piece.get_mut(..count as usize).ok_or(Errno::INVAL)?;
        let at = |n: u32| addr.checked_add(u64::from(n) * SIZE).ok_or(Errno::FAULT);
        let whole = at(done + count).and_then(|_| caller.copy_in(at(done)?, piece.as_mut_bytes()));
        match whole {
            Ok(()) => piece.iter().try_for_each(&mut add)?,
            // One by one, up to the one that faults.
            Err(_) => {
                for (n, range) in (done..).zip(piece) {
                    at(n + 1)?;
                    caller.copy_in(at(n)?, range.as_mut_bytes())?;
                    add(range)?;
                }
            }
        }
        done += count;
    }
    let range = |(start, last): (u64, u64)| Range::new(start, last);
    allowed.into_iter().map(range).collect()
}
