//! Page tables, and what is asked of hardware (`drivers/iommu/iommufd/hw_pagetable.c`,
//! `device.c`). The hardware here is an IOMMU without nesting, dirty tracking, PASIDs and faults.

use super::Iommufd;
use super::table::{Leftovers, Object};
use crate::caller::{Caller, Capability};
use crate::dma::page_size;
use crate::model::Subsystem;
use crate::{Errno, Result};
use std::sync::Arc;
use vfio_uapi::dialect::iommufd::{read, write_back};
use vfio_uapi::ioctl::IommufdIoctl;
use vfio_uapi::iommufd::{
    DirtyBitmapFlags, DirtyTrackingFlags, FaultAlloc, HwCapabilities, HwInfo, HwInfoFlags,
    HwptAlloc, HwptAllocFlags, HwptGetDirtyBitmap, HwptInvalidate, HwptSetDirtyTracking,
    hw_info_type, hwpt_data,
};

/// Most entries of one `IOMMU_HWPT_INVALIDATE`.
const MAX_INVALIDATE: u32 = 1 << 19;

impl Iommufd {
    pub(super) fn hwpt_ioctl(&self, cmd: IommufdIoctl, arg: u64, caller: &dyn Caller) -> Result {
        match cmd {
            IommufdIoctl::HwptAlloc => self.hwpt_alloc(arg, caller),
            IommufdIoctl::GetHwInfo => self.get_hw_info(arg, caller),
            IommufdIoctl::HwptSetDirtyTracking => self.set_dirty_tracking(arg, caller),
            IommufdIoctl::HwptGetDirtyBitmap => self.get_dirty_bitmap(arg, caller),
            IommufdIoctl::HwptInvalidate => self.invalidate(arg, caller),
            IommufdIoctl::FaultQueueAlloc => {
                read::<FaultAlloc, _>(caller, arg, FaultAlloc::MIN_SIZE)?;
                Err(Errno::OPNOTSUPP)
            }
            IommufdIoctl::IoasNoiommuGetPa => {
                read::<[u8; 40], _>(caller, arg, 40)?;
                if !caller.capable(Capability::SysRawio) {
                    return Err(Errno::PERM);
                }
                Err(Errno::OPNOTSUPP)
            }
            // Virtual IOMMUs: no driver here has any.
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    fn hwpt_alloc(&self, arg: u64, caller: &dyn Caller) -> Result {
        let (mut cmd, size) = read::<HwptAlloc, _>(caller, arg, HwptAlloc::MIN_SIZE)?;
        if cmd.reserved != 0 || cmd.reserved2 != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        if (cmd.data_type == hwpt_data::NONE) != (cmd.data_len == 0) {
            return Err(Errno::INVAL);
        }
        let ioas = {
            let table = self.table();
            table.device(cmd.dev_id)?;
            match table.object(cmd.pt_id) {
                Ok(Object::Ioas(ioas)) => Arc::clone(ioas),
                // A nested page table.
                Ok(Object::Hwpt(_)) => return Err(Errno::OPNOTSUPP),
                Ok(Object::Bound(_)) | Err(_) => return Err(Errno::INVAL),
            }
        };
        if !(cmd.flags - HwptAllocFlags::FAULT_ID_VALID).is_empty()
            || cmd.data_type != hwpt_data::NONE
        {
            return Err(Errno::OPNOTSUPP);
        }
        if cmd.flags.contains(HwptAllocFlags::FAULT_ID_VALID) {
            // There are no fault queues that the number could name.
            return Err(Errno::NOENT);
        }
        ioas.check_reach()?;
        let id = {
            let mut table = self.table();
            // It may have gone meanwhile.
            let ioas = Arc::clone(table.ioas(cmd.pt_id).map_err(|_| Errno::INVAL)?);
            let id = table.add_hwpt(&ioas, false)?;
            // Until the client knows of it nobody can destroy it.
            table.use_object(id, 1);
            id
        };
        cmd.out_hwpt_id = id;
        let told = write_back(caller, arg, &cmd, size);
        let mut left = Leftovers::default();
        let mut table = self.table();
        table.release(id, 1, &mut left);
        if told.is_err() {
            // It stays if another thread guessed its number and attached something to it.
            let _ = table.destroy(id, &mut left);
        }
        drop(table);
        left.settle();
        told
    }

    /// Devices here say nothing of their IOMMU: no type, no data.
    fn get_hw_info(&self, arg: u64, caller: &dyn Caller) -> Result {
        let (mut cmd, size) = read::<HwInfo, _>(caller, arg, HwInfo::MIN_SIZE)?;
        if cmd.flags.has_unknown_bits() || cmd.reserved != [0; 3] {
            return Err(Errno::OPNOTSUPP);
        }
        let device = self.table().device(cmd.dev_id)?.device.clone();
        if cmd.flags.contains(HwInfoFlags::INPUT_TYPE) && cmd.data_type != hw_info_type::NONE {
            return Err(Errno::OPNOTSUPP);
        }
        zero(cmd.data_uptr, cmd.data_len, caller)?;
        let is_pci = device
            .upgrade()
            .is_some_and(|device| device.parent().subsystem() == Some(&Subsystem::Bus("pci")));
        cmd.data_type = hw_info_type::NONE;
        cmd.data_len = 0;
        cmd.out_max_pasid_log2 = 0;
        cmd.out_capabilities = if is_pci {
            HwCapabilities::PCI_ATS_NOT_SUPPORTED
        } else {
            HwCapabilities::empty()
        };
        write_back(caller, arg, &cmd, size)
    }

    fn set_dirty_tracking(&self, arg: u64, caller: &dyn Caller) -> Result {
        type Cmd = HwptSetDirtyTracking;
        let (cmd, _) = read::<Cmd, _>(caller, arg, Cmd::MIN_SIZE)?;
        if cmd.flags.intersects(!DirtyTrackingFlags::ENABLE) || cmd.flags.has_unknown_bits() {
            return Err(Errno::OPNOTSUPP);
        }
        self.table().hwpt(cmd.hwpt_id)?;
        Err(Errno::OPNOTSUPP)
    }

    fn get_dirty_bitmap(&self, arg: u64, caller: &dyn Caller) -> Result {
        type Cmd = HwptGetDirtyBitmap;
        let (cmd, _) = read::<Cmd, _>(caller, arg, Cmd::MIN_SIZE)?;
        if cmd.flags.intersects(!DirtyBitmapFlags::NO_CLEAR)
            || cmd.flags.has_unknown_bits()
            || cmd.reserved != 0
        {
            return Err(Errno::OPNOTSUPP);
        }
        self.table().hwpt(cmd.hwpt_id)?;
        let last = dma_memory::Range::with_len(cmd.iova, cmd.length)?.last();
        // An IOAS with a page table is aligned to pages.
        let misaligned = |unit: u64| {
            let mask = unit.wrapping_sub(1);
            cmd.iova & mask != 0 || last.wrapping_add(1) & mask != 0
        };
        if misaligned(page_size()) || cmd.page_size == 0 || misaligned(cmd.page_size) {
            return Err(Errno::INVAL);
        }
        Err(Errno::OPNOTSUPP)
    }

    /// The number handled is written back whatever happens: none, since nothing is nested.
    fn invalidate(&self, arg: u64, caller: &dyn Caller) -> Result {
        let (mut cmd, size) = read::<HwptInvalidate, _>(caller, arg, HwptInvalidate::MIN_SIZE)?;
        let done = self.check_invalidate(&cmd);
        cmd.entry_num = 0;
        write_back(caller, arg, &cmd, size)?;
        done
    }

    fn check_invalidate(&self, cmd: &HwptInvalidate) -> Result {
        if cmd.reserved != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        let bad_array = cmd.data_uptr == 0
            || cmd.entry_len == 0
            || u64::from(cmd.entry_len) > page_size()
            || cmd.entry_num > MAX_INVALIDATE;
        if cmd.entry_num > 0 && bad_array {
            return Err(Errno::INVAL);
        }
        self.table().object(cmd.hwpt_id)?;
        Err(Errno::INVAL)
    }
}

fn zero(addr: u64, len: u32, caller: &dyn Caller) -> Result {
    const PIECE: u64 = 1 << 16;
    let zeros = vec![0; PIECE.min(len.into()) as usize];
    let mut done = 0;
    while done < u64::from(len) {
        let at = addr.checked_add(done).ok_or(Errno::FAULT)?;
        let part = PIECE.min(u64::from(len) - done);
        let part = zeros.get(..part as usize).unwrap_or(&zeros);
        caller.copy_out(at, part)?;
        done += part.len() as u64;
    }
    Ok(())
}
