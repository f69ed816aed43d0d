//! Reading and answering an argument whose first word is its size.
//!
//! There are two dialects. VFIO takes any size that is large enough and never looks at the rest. iommufd, and `VFIO_DEVICE_BIND_IOMMUFD`
//! with it, takes a longer argument only if the rest is zero, and fills up a shorter one with zeros.

use rustix::io::Errno;

/// The memory of the process whose argument is read.
pub trait UserMemory {
    /// Fills `buf` from `addr`. `EFAULT` if a byte cannot be read; `buf` may then be partly filled.
    fn copy_in(&self, addr: u64, buf: &mut [u8]) -> Result<(), Errno>;

    /// Writes `buf` to `addr`. `EFAULT` if a byte cannot be written; the bytes before it may then be.
    fn copy_out(&self, addr: u64, buf: &[u8]) -> Result<(), Errno>;
}

fn split(bytes: &mut [u8], at: usize) -> (&mut [u8], &mut [u8]) {
    let at = at.min(bytes.len());
    bytes.split_at_mut(at)
}

fn offset(addr: u64, by: usize) -> Result<u64, Errno> {
    u64::try_from(by)
        .ok()
        .and_then(|by| addr.checked_add(by))
        .ok_or(Errno::FAULT)
}

/// Copies in `buf` unless the address wraps, which no argument can.
fn copy_in<M: UserMemory + ?Sized>(mem: &M, addr: u64, buf: &mut [u8]) -> Result<(), Errno> {
    offset(addr, buf.len())?;
    mem.copy_in(addr, buf)
}

fn size_word(bytes: &[u8]) -> u32 {
    bytes
        .first_chunk::<4>()
        .map_or(0, |word| u32::from_ne_bytes(*word))
}

/// The dialect of VFIO: `argsz`.
pub mod vfio {
    use rustix::io::Errno;
    use zerocopy::{FromBytes, Immutable, IntoBytes};

    use super::{UserMemory, copy_in, offset, size_word, split};
    use crate::caps::Placement;

    /// Reads the first `minsz` bytes of an argument; the rest of `T` is zero. Returns it with its `argsz`, which the client may have
    /// made as large as it likes.
    ///
    /// `EFAULT` if those bytes cannot be read, then `EINVAL` if `argsz` is below `minsz`.
    pub fn read<T, M>(mem: &M, addr: u64, minsz: usize) -> Result<(T, u32), Errno>
    where
        T: FromBytes + IntoBytes,
        M: UserMemory + ?Sized,
    {
        let mut value = T::new_zeroed();
        let (head, _) = split(value.as_mut_bytes(), minsz);
        copy_in(mem, addr, head)?;
        let argsz = size_word(head);
        if usize::try_from(argsz).is_ok_and(|argsz| argsz < minsz) {
            return Err(Errno::INVAL);
        }
        Ok((value, argsz))
    }

    /// Reads the bytes from `from` to `to` of an argument whose first `from` bytes are in `value`, for fields that only some flags need.
    ///
    /// `EINVAL` if `argsz` is below `to`, then `EFAULT`.
    pub fn read_more<T, M>(
        mem: &M,
        addr: u64,
        value: &mut T,
        from: usize,
        to: usize,
    ) -> Result<(), Errno>
    where
        T: FromBytes + IntoBytes,
        M: UserMemory + ?Sized,
    {
        let bytes = value.as_mut_bytes();
        if usize::try_from(size_word(bytes)).is_ok_and(|argsz| argsz < to) {
            return Err(Errno::INVAL);
        }
        let (head, _) = split(bytes, to);
        let (_, tail) = split(head, from);
        copy_in(mem, offset(addr, from)?, tail)
    }

    /// Writes the capability chain behind the answer of an argument at `addr`; nothing if there is none, or no room. `EFAULT` if it
    /// cannot be written. The answer itself comes after it, with [`write_back`].
    pub fn write_caps<M: UserMemory + ?Sized>(
        mem: &M,
        addr: u64,
        caps: &Placement<'_>,
    ) -> Result<(), Errno> {
        if caps.bytes.is_empty() {
            return Ok(());
        }
        let at = addr
            .checked_add(u64::from(caps.cap_offset))
            .ok_or(Errno::FAULT)?;
        mem.copy_out(at, caps.bytes)
    }

    /// Writes back as much of the answer as the client offered room for. `EFAULT` if it cannot be written; what the call did stays done.
    pub fn write_back<T, M>(mem: &M, addr: u64, value: &T, argsz: u32) -> Result<(), Errno>
    where
        T: IntoBytes + Immutable,
        M: UserMemory + ?Sized,
    {
        super::write_back(mem, addr, value.as_bytes(), argsz)
    }
}

/// The dialect of iommufd: `size`.
pub mod iommufd {
    use rustix::io::Errno;
    use zerocopy::{FromBytes, Immutable, IntoBytes};

    use super::{UserMemory, copy_in, offset, size_word, split};

    /// The tail of a too long argument is scanned in pieces that end at these boundaries, so that the bytes before an unmapped page count.
    const PAGE: u64 = 4096;

    /// The longest argument scanned; a longer one is `E2BIG` even if zero.
    ///
    /// The kernel would go on to 4 GiB. No client offers more than a page, and one that does must not keep a server busy.
    pub const MAX_SIZE: u32 = 1 << 20;

    /// Reads an argument of which at least `min` bytes must be there (`copy_struct_from_user`). Returns it with its size word; bytes
    /// beyond that are zero in `T`.
    ///
    /// In this order: `EFAULT` if the size word cannot be read, `EINVAL` if it is below `min`, `E2BIG` or `EFAULT` for what comes first
    /// of a non-zero byte or an unmapped page beyond `T`, `EFAULT` if the known bytes cannot be read.
    pub fn read<T, M>(mem: &M, addr: u64, min: usize) -> Result<(T, u32), Errno>
    where
        T: FromBytes + IntoBytes,
        M: UserMemory + ?Sized,
    {
        let mut value = T::new_zeroed();
        // What must be there is copied at once. Not all of it can be: then the word says what is wrong.
        let (head, _) = split(value.as_mut_bytes(), min.max(4));
        let mut done = head.len();
        if copy_in(mem, addr, head) == Err(Errno::FAULT) {
            let (word, rest) = split(head, 4);
            rest.fill(0);
            copy_in(mem, addr, word)?;
            done = word.len();
        }
        let size = size_word(value.as_mut_bytes());
        let given = usize::try_from(size).map_err(|_| Errno::TOOBIG)?;
        if given < min.max(4) {
            return Err(Errno::INVAL);
        }
        // An argument that cannot be in any address space faults before a byte of it is looked at.
        offset(addr, given)?;
        if given > size_of::<T>() {
            check_zeroed(mem, offset(addr, size_of::<T>())?, given - size_of::<T>())?;
        }
        let (known, _) = split(value.as_mut_bytes(), given);
        if let Some(rest) = known.get_mut(done..).filter(|rest| !rest.is_empty()) {
            copy_in(mem, offset(addr, done)?, rest)?;
        }
        Ok((value, size))
    }

    fn check_zeroed<M: UserMemory + ?Sized>(mem: &M, addr: u64, len: usize) -> Result<(), Errno> {
        let limit = usize::try_from(MAX_SIZE).unwrap_or(usize::MAX);
        let (mut at, mut left) = (addr, len.min(limit));
        let mut page = [0; PAGE as usize];
        while left > 0 {
            let to_boundary = usize::try_from(PAGE - at % PAGE).unwrap_or(left);
            let (piece, _) = split(&mut page, left.min(to_boundary));
            copy_in(mem, at, piece)?;
            if piece.iter().any(|&byte| byte != 0) {
                return Err(Errno::TOOBIG);
            }
            left -= piece.len();
            at = offset(at, piece.len())?;
        }
        if len > limit {
            Err(Errno::TOOBIG)
        } else {
            Ok(())
        }
    }

    /// Writes back the first `min(size, size_of::<T>())` bytes of the answer. `EFAULT` if it cannot be written.
    pub fn write_back<T, M>(mem: &M, addr: u64, value: &T, size: u32) -> Result<(), Errno>
    where
        T: IntoBytes + Immutable,
        M: UserMemory + ?Sized,
    {
        super::write_back(mem, addr, value.as_bytes(), size)
    }
}

fn write_back<M: UserMemory + ?Sized>(
    mem: &M,
    addr: u64,
    bytes: &[u8],
    size: u32,
) -> Result<(), Errno> {
    let given = usize::try_from(size).unwrap_or(usize::MAX);
    let reply = bytes.get(..given).unwrap_or(bytes);
    offset(addr, reply.len())?;
    mem.copy_out(addr, reply)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::UserMemory;
    use super::iommufd;
    use super::vfio;
    use crate::device::AttachIommufdPt;
    use crate::device::BindIommufd;
    use crate::device::GfxPlaneInfo;
    use crate::device::Info;
    use crate::iommufd::HwptAlloc;
    use rustix::io::Errno;

    /// Memory from `base` up; everything else is unmapped.
    struct Flat {
        base: u64,
        bytes: RefCell<Vec<u8>>,
        read_only: bool,
    }

    impl Flat {
        fn new(base: u64, bytes: Vec<u8>) -> Self {
            Self {
                base,
                bytes: RefCell::new(bytes),
                read_only: false,
            }
        }

        fn range(&self, addr: u64, len: usize) -> Result<std::ops::Range<usize>, Errno> {
            let start = usize::try_from(addr.checked_sub(self.base).ok_or(Errno::FAULT)?)
                .map_err(|_| Errno::FAULT)?;
            let end = start.checked_add(len).ok_or(Errno::FAULT)?;
            if end > self.bytes.borrow().len() {
                Err(Errno::FAULT)
            } else {
                Ok(start..end)
            }
        }
    }

    impl UserMemory for Flat {
        fn copy_in(&self, addr: u64, buf: &mut [u8]) -> Result<(), Errno> {
            let range = self.range(addr, buf.len())?;
            buf.copy_from_slice(&self.bytes.borrow()[range]);
            Ok(())
        }

        fn copy_out(&self, addr: u64, buf: &[u8]) -> Result<(), Errno> {
            if self.read_only {
                return Err(Errno::FAULT);
            }
            let range = self.range(addr, buf.len())?;
            self.bytes.borrow_mut()[range].copy_from_slice(buf);
            Ok(())
        }
    }

    const BASE: u64 = 0x1_0000;

    /// `len` bytes of 0x11, 0x12, ... after a size word.
    fn argument(size: u32, len: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..len).map(|n| 0x11u8.wrapping_add(n as u8)).collect();
        let word = size.to_ne_bytes();
        let n = word.len().min(len);
        bytes[..n].copy_from_slice(&word[..n]);
        bytes
    }

    #[test]
    fn vfio_every_mapped_length_and_argsz() {
        let minsz = Info::MIN_SIZE;
        for mapped in 0..=40usize {
            for argsz in (0..=40u32).chain([4096, u32::MAX]) {
                let mem = Flat::new(BASE, argument(argsz, mapped));
                let got = vfio::read::<Info, _>(&mem, BASE, minsz).map(|(_, argsz)| argsz);
                let want = if mapped < minsz {
                    Err(Errno::FAULT)
                } else if argsz < 16 {
                    Err(Errno::INVAL)
                } else {
                    Ok(argsz)
                };
                assert_eq!(got, want, "{mapped} bytes mapped, argsz {argsz}");
            }
        }
    }

    #[test]
    fn vfio_reads_minsz_and_no_more() {
        let mem = Flat::new(BASE, argument(24, 24));
        let (info, _) = vfio::read::<Info, _>(&mem, BASE, Info::MIN_SIZE).expect("complete");
        assert_eq!(info.num_irqs, u32::from_ne_bytes([0x1d, 0x1e, 0x1f, 0x20]));
        assert_eq!((info.cap_offset, info.pad), (0, 0));
    }

    #[test]
    fn vfio_writes_back_no_more_than_offered() {
        for (argsz, written) in [
            (16, 16),
            (17, 17),
            (23, 23),
            (24, 24),
            (25, 24),
            (u32::MAX, 24),
        ] {
            let mem = Flat::new(BASE, vec![0xee; 40]);
            let value = Info {
                argsz: 0x0101_0101,
                pad: 0x0101_0101,
                cap_offset: 0x0101_0101,
                ..Info::default()
            };
            vfio::write_back(&mem, BASE, &value, argsz).expect("mapped");
            let bytes = mem.bytes.borrow();
            assert!(bytes[..written].iter().all(|&byte| byte != 0xee), "{argsz}");
            assert!(bytes[written..].iter().all(|&byte| byte == 0xee), "{argsz}");
        }
        let mem = Flat {
            read_only: true,
            ..Flat::new(BASE, vec![0; 40])
        };
        assert_eq!(
            vfio::write_back(&mem, BASE, &Info::default(), 24),
            Err(Errno::FAULT)
        );
    }

    #[test]
    fn vfio_optional_fields() {
        for (argsz, mapped, want) in [
            (12, 16, Err(Errno::INVAL)),
            (15, 16, Err(Errno::INVAL)),
            (16, 16, Ok(0x1d1e_1f20u32.swap_bytes())),
            (17, 16, Ok(0x1d1e_1f20u32.swap_bytes())),
            (16, 15, Err(Errno::FAULT)),
        ] {
            let mem = Flat::new(BASE, argument(argsz, mapped));
            let (mut attach, _) =
                vfio::read::<AttachIommufdPt, _>(&mem, BASE, AttachIommufdPt::MIN_SIZE)
                    .expect("12 bytes are there");
            assert_eq!(attach.pasid, 0);
            let got = vfio::read_more(&mem, BASE, &mut attach, 12, 16)
                .map(|()| u32::from_ne_bytes(attach.pasid.to_ne_bytes()));
            assert_eq!(
                got,
                want.map(|word| if cfg!(target_endian = "little") {
                    word
                } else {
                    word.swap_bytes()
                }),
                "{argsz} {mapped}"
            );
        }
    }

    #[test]
    fn vfio_bad_pointers() {
        let mem = Flat::new(BASE, vec![0; 4096]);
        for addr in [
            0,
            1,
            BASE - 1,
            BASE + 4096,
            BASE + 4096 - 59,
            u64::MAX,
            u64::MAX - 59,
            1 << 63,
        ] {
            assert_eq!(
                vfio::read::<GfxPlaneInfo, _>(&mem, addr, GfxPlaneInfo::MIN_SIZE),
                Err(Errno::FAULT),
                "{addr:#x}"
            );
        }
        assert_eq!(
            vfio::read::<GfxPlaneInfo, _>(&mem, BASE + 4096 - 60, 60),
            Err(Errno::INVAL),
            "mapped, but argsz is 0"
        );
        assert_eq!(
            vfio::write_back(&mem, u64::MAX, &Info::default(), 24),
            Err(Errno::FAULT)
        );
    }

    /// Bytes after the size word are `fill` up to `known`, then zero.
    fn struct_of(size: u32, mapped: usize, known: usize) -> Vec<u8> {
        let mut bytes = argument(size, mapped);
        if let Some(tail) = bytes.get_mut(known..) {
            tail.fill(0);
        }
        bytes
    }

    #[test]
    fn iommufd_every_mapped_length_and_size() {
        // min 16, known 24
        for mapped in 0..=40usize {
            for size in 0..=40u32 {
                let mem = Flat::new(BASE, struct_of(size, mapped, 24));
                let got = iommufd::read::<BindIommufd, _>(&mem, BASE, BindIommufd::MIN_SIZE)
                    .map(|(_, size)| size);
                let want = if mapped < 4 {
                    Err(Errno::FAULT)
                } else if size < 16 {
                    Err(Errno::INVAL)
                } else if mapped < size as usize {
                    Err(Errno::FAULT)
                } else {
                    Ok(size)
                };
                assert_eq!(got, want, "{mapped} bytes mapped, size {size}");
            }
        }
    }

    #[test]
    fn iommufd_a_short_tail_is_zero() {
        for size in 24..48usize {
            let mem = Flat::new(BASE, vec![0xff; 48]);
            mem.bytes.borrow_mut()[..4].copy_from_slice(&(size as u32).to_ne_bytes());
            let (value, _) = iommufd::read::<HwptAlloc, _>(&mem, BASE, HwptAlloc::MIN_SIZE)
                .expect("long enough");
            let bytes = zerocopy::IntoBytes::as_bytes(&value);
            assert!(bytes[4..size].iter().all(|&byte| byte == 0xff), "{size}");
            assert!(bytes[size..].iter().all(|&byte| byte == 0), "{size}");
        }
    }

    #[test]
    fn iommufd_each_extra_byte_is_looked_at() {
        for at in 24..200usize {
            let mut bytes = struct_of(200, 200, 24);
            bytes[at] = 1;
            let got =
                iommufd::read::<BindIommufd, _>(&Flat::new(BASE, bytes), BASE, 16).map(|_| ());
            assert_eq!(got, Err(Errno::TOOBIG), "byte {at}");
        }
        let mut bytes = struct_of(200, 201, 24);
        bytes[200] = 1;
        assert!(
            iommufd::read::<BindIommufd, _>(&Flat::new(BASE, bytes), BASE, 16).is_ok(),
            "beyond the size nobody looks"
        );
    }

    #[test]
    fn iommufd_what_comes_first_in_the_tail_decides() {
        // The argument starts 64 bytes before a page boundary; the pages after the second are unmapped.
        let addr = BASE + 4096 - 64;
        let read = |size: u32, nonzero: Option<u64>| {
            let mut bytes = vec![0; 8192];
            bytes[4096 - 64..][..4].copy_from_slice(&size.to_ne_bytes());
            if let Some(at) = nonzero {
                bytes[(at - BASE) as usize] = 1;
            }
            iommufd::read::<BindIommufd, _>(&Flat::new(BASE, bytes), addr, 16).map(|_| ())
        };
        assert_eq!(
            read(4096 + 64, None),
            Ok(()),
            "exactly to the end of the mapped pages"
        );
        assert_eq!(read(4096 + 65, None), Err(Errno::FAULT));
        assert_eq!(
            read(4096 + 65, Some(BASE + 4096 - 40)),
            Err(Errno::TOOBIG),
            "first byte after the known ones"
        );
        assert_eq!(
            read(8192, Some(BASE + 4096)),
            Err(Errno::TOOBIG),
            "first byte of the next page"
        );
        assert_eq!(
            read(8192, Some(BASE + 8191)),
            Err(Errno::TOOBIG),
            "last mapped byte"
        );
        assert_eq!(read(u32::MAX, None), Err(Errno::FAULT));
        assert_eq!(read(u32::MAX, Some(BASE + 8191)), Err(Errno::TOOBIG));
    }

    #[test]
    fn iommufd_sizes_beyond_a_page() {
        for (size, want) in [
            (4096, Ok(4096)),
            (4097, Ok(4097)),
            (8192, Ok(8192)),
            (2 << 20, Err(Errno::TOOBIG)),
        ] {
            let mem = Flat::new(BASE, struct_of(size, 4 << 20, 24));
            let got = iommufd::read::<BindIommufd, _>(&mem, BASE, 16).map(|(_, size)| size);
            assert_eq!(got, want, "{size}");
        }
    }

    #[test]
    fn iommufd_writes_back_what_both_know() {
        for (size, written) in [(16, 16), (23, 23), (24, 24), (25, 24), (u32::MAX, 24)] {
            let mem = Flat::new(BASE, vec![0xee; 40]);
            iommufd::write_back(&mem, BASE, &BindIommufd::default(), size).expect("mapped");
            let bytes = mem.bytes.borrow();
            assert!(bytes[..written].iter().all(|&byte| byte == 0), "{size}");
            assert!(bytes[written..].iter().all(|&byte| byte == 0xee), "{size}");
        }
    }

    #[test]
    fn iommufd_bad_pointers() {
        let mem = Flat::new(BASE, struct_of(24, 24, 24));
        for addr in [
            0,
            BASE - 1,
            BASE + 24,
            BASE + 21,
            u64::MAX,
            u64::MAX - 3,
            1 << 63,
        ] {
            assert_eq!(
                iommufd::read::<BindIommufd, _>(&mem, addr, 16),
                Err(Errno::FAULT),
                "{addr:#x}"
            );
        }
    }

    #[test]
    fn iommufd_the_checked_size_is_the_size() {
        /// Says 24 when first asked and 4096 after.
        struct Fickle(RefCell<u32>);
        impl UserMemory for Fickle {
            fn copy_in(&self, _: u64, buf: &mut [u8]) -> Result<(), Errno> {
                buf.fill(0);
                buf[..4].copy_from_slice(&self.0.replace(4096).to_ne_bytes());
                Ok(())
            }
            fn copy_out(&self, _: u64, _: &[u8]) -> Result<(), Errno> {
                Ok(())
            }
        }
        let (value, size) = iommufd::read::<BindIommufd, _>(&Fickle(RefCell::new(24)), BASE, 16)
            .expect("well formed");
        assert_eq!((value.argsz, size), (24, 24));
    }
}
