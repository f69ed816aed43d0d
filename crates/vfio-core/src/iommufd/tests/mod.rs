//! What a client sees of iommufd, errno by errno.

mod attach;
mod commands;
mod compat;
mod dma;
mod model;
mod threads;

use super::Iommufd;
use super::testing::{PAGE, Pages, Us, address, call};
use crate::device::DmaSpace;
use crate::dma::{Port, Prot, Space};
use crate::{Errno, Result};
use std::sync::Arc;
use vfio_uapi::ioctl;
use vfio_uapi::iommufd::*;

const R: MapFlags = MapFlags::READABLE;
const W: MapFlags = MapFlags::WRITEABLE;
const RW: MapFlags = R.union(W);
const FIXED: MapFlags = MapFlags::FIXED_IOVA;

/// One client with one context.
struct Client {
    us: Us,
    fd: i32,
    ctx: Arc<Iommufd>,
}

impl Client {
    fn new() -> Client {
        let us = Us::default();
        let (fd, ctx) = us.context();
        Client { us, fd, ctx }
    }

    fn call<T>(&self, cmd: u32, arg: &mut T) -> Result<u32>
    where
        T: zerocopy::FromBytes + zerocopy::IntoBytes + zerocopy::Immutable,
    {
        call(&self.us, &self.ctx, cmd, arg)
    }

    fn ioas(&self) -> u32 {
        let mut arg = IoasAlloc {
            size: 12,
            ..Default::default()
        };
        self.call(ioctl::IOMMU_IOAS_ALLOC, &mut arg).unwrap();
        arg.out_ioas_id
    }

    fn destroy(&self, id: u32) -> Result<u32> {
        self.call(ioctl::IOMMU_DESTROY, &mut Destroy { size: 8, id })
    }

    /// Returns the IOVA.
    fn map(&self, ioas: u32, flags: MapFlags, va: u64, length: u64, iova: u64) -> Result<u64> {
        let mut arg = map_arg(ioas, flags, va, length, iova);
        self.call(ioctl::IOMMU_IOAS_MAP, &mut arg)?;
        Ok(arg.iova)
    }

    /// Returns the length.
    fn unmap(&self, ioas: u32, iova: u64, length: u64) -> Result<u64> {
        let mut arg = IoasUnmap {
            size: 24,
            ioas_id: ioas,
            iova,
            length,
        };
        let done = self.call(ioctl::IOMMU_IOAS_UNMAP, &mut arg);
        if done.is_err() {
            assert_eq!(arg.length, length, "nothing is written back on error");
        }
        done.map(|_| arg.length)
    }

    fn copy(
        &self,
        (dst, dst_iova): (u32, u64),
        (src, src_iova): (u32, u64),
        length: u64,
        flags: MapFlags,
    ) -> Result<u64> {
        let mut arg = IoasCopy {
            size: 40,
            flags,
            dst_ioas_id: dst,
            src_ioas_id: src,
            length,
            dst_iova,
            src_iova,
        };
        self.call(ioctl::IOMMU_IOAS_COPY, &mut arg)?;
        Ok(arg.dst_iova)
    }

    /// Ranges and alignment.
    fn ranges(&self, ioas: u32) -> (Vec<(u64, u64)>, u64) {
        let mut array = [IovaRange::default(); 16];
        let mut arg = IoasIovaRanges {
            size: 32,
            ioas_id: ioas,
            num_iovas: 16,
            allowed_iovas: address(&mut array),
            ..Default::default()
        };
        self.call(ioctl::IOMMU_IOAS_IOVA_RANGES, &mut arg).unwrap();
        let array = std::hint::black_box(&array);
        let ranges = &array[..arg.num_iovas as usize];
        (
            ranges.iter().map(|r| (r.start, r.last)).collect(),
            arg.out_iova_alignment,
        )
    }

    fn allow(&self, ioas: u32, ranges: &[(u64, u64)]) -> Result<u32> {
        let mut array: Vec<IovaRange> = ranges
            .iter()
            .map(|&(start, last)| IovaRange { start, last })
            .collect();
        let mut arg = IoasAllowIovas {
            size: 24,
            ioas_id: ioas,
            num_iovas: array.len() as u32,
            reserved: 0,
            allowed_iovas: address(array.as_mut_slice()),
        };
        self.call(ioctl::IOMMU_IOAS_ALLOW_IOVAS, &mut arg)
    }

    fn option(&self, id: u32, op: u16, object: u32, val64: u64) -> Result<u64> {
        let mut arg = IommuOption {
            size: 24,
            option_id: id,
            op,
            reserved: 0,
            object_id: object,
            val64,
        };
        self.call(ioctl::IOMMU_OPTION, &mut arg)?;
        Ok(arg.val64)
    }

    fn hwpt(&self, dev_id: u32, pt_id: u32) -> Result<u32> {
        let mut arg = HwptAlloc {
            size: 48,
            dev_id,
            pt_id,
            ..Default::default()
        };
        self.call(ioctl::IOMMU_HWPT_ALLOC, &mut arg)?;
        Ok(arg.out_hwpt_id)
    }

    /// DMA in an IOAS without a device, so that its alignment stays 1.
    fn port(&self, ioas: u32) -> Port {
        let port = Port::new(Errno::NOENT);
        port.switch(Some(self.ctx.ioas(ioas).unwrap()));
        port
    }
}

fn map_arg(ioas: u32, flags: MapFlags, user_va: u64, length: u64, iova: u64) -> IoasMap {
    IoasMap {
        size: 40,
        flags,
        ioas_id: ioas,
        reserved: 0,
        user_va,
        length,
        iova,
    }
}

fn byte(port: &dyn DmaSpace, iova: u64) -> Result<u8> {
    let mut buf = [0];
    port.read(iova, &mut buf)?;
    Ok(buf[0])
}
