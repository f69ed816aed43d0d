//! The configuration space of a software PCI endpoint, as a pure machine: no locks, no I/O, no core types.
//!
//! A type 0 header with base address registers, an interrupt pin and a capability list; every byte has a mask of bits that can be
//! written and of bits that a written 1 clears. The client sees what `drivers/vfio/pci/vfio_pci_config.c` shows for a physical device:
//! any size and alignment inside the space, `EFAULT` for a request that starts or ends outside, identity and status that ignore writes,
//! base address registers that can be sized with accesses of 1, 2 or 4 bytes and read 0 where there is none.
//!
//! Not emulated: header types 1 and 2, BIST, MSI with several vectors, MSI-X, PCI Express and extended capabilities (the extended
//! space, if asked for, reads 0).

use std::sync::Arc;

use rustix::io::Errno;
use vfio_uapi::pci::Command;
use vfio_uapi::pci::MsiControl;
use vfio_uapi::pci::Status;
use vfio_uapi::pci::bar as bar_bits;
use vfio_uapi::pci::config;

mod build;

pub use build::Bar;
pub use build::BarKind;
pub use build::BuildError;
pub use build::Builder;
use build::Layout;
use build::MSI_CONTROL;
pub use build::Msi;
use build::PM_CONTROL;
use build::PM_STATE;
use build::STATUS_W1C;
use build::put_at;

/// A value before and after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change<T> {
    /// Before.
    pub from: T,
    /// After.
    pub to: T,
}

impl<T: PartialEq> Change<T> {
    fn between(from: T, to: T) -> Option<Self> {
        (from != to).then_some(Self { from, to })
    }
}

/// What a write, reset or restore changed that a device may have to act on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "the device has to follow what its configuration space now says"]
pub struct ConfigWrite {
    /// Decoding, bus mastering or the silence of the interrupt pin.
    pub command: Option<Change<Command>>,
    /// Message signalled interrupts were switched on or off.
    pub msi_control: Option<Change<MsiControl>>,
    /// The MSI mask bit.
    pub msi_masked: Option<Change<bool>>,
    /// Base address registers whose address changed, bit n for BAR n; also while the client only sizes them.
    pub bars_moved: u8,
    /// The ROM's address or enable bit changed.
    pub rom_moved: bool,
    /// The power state, 0 for D0 and 3 for D3.
    pub power: Option<Change<u8>>,
}

impl ConfigWrite {
    /// Whether there is nothing to act on.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What can differ between two spaces of the same device: saved and restored as one value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// The whole space, 256 or 4096 bytes.
    pub bytes: Vec<u8>,
}

/// The configuration space of one device.
#[derive(Clone, Debug)]
pub struct PciConfig {
    layout: Arc<Layout>,
    bytes: Box<[u8]>,
}

/// Everything [`ConfigWrite`] reports on, at one moment.
struct Watched {
    command: Command,
    msi_control: MsiControl,
    msi_masked: bool,
    bars: [u64; 6],
    rom: u32,
    power: u8,
}

impl PciConfig {
    /// Bytes: 256 or 4096.
    #[must_use]
    pub fn size(&self) -> u64 {
        if self.bytes.len() > usize::from(config::SIZE) {
            u64::from(config::EXT_SIZE)
        } else {
            u64::from(config::SIZE)
        }
    }

    /// The request as a range of the space. `EFAULT` if it starts or ends outside; an empty one is nowhere and always fine.
    fn range(&self, offset: u64, len: usize) -> Result<core::ops::Range<usize>, Errno> {
        if len == 0 {
            return Ok(0..0);
        }
        let start = usize::try_from(offset).map_err(|_| Errno::FAULT)?;
        let end = start
            .checked_add(len)
            .filter(|&end| end <= self.bytes.len())
            .ok_or(Errno::FAULT)?;
        Ok(start..end)
    }

    /// Reads all of `buf`. `EFAULT`, and nothing read, if the request starts or ends outside the space; 0 bytes are fine anywhere.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        let range = self.range(offset, buf.len())?;
        buf.copy_from_slice(self.bytes.get(range).ok_or(Errno::FAULT)?);
        Ok(buf.len())
    }

    /// Writes all of `data`, as far as its bits can be written; the rest is swallowed. `EFAULT`, and nothing written, if the request
    /// starts or ends outside the space. On success all bytes count as written.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<ConfigWrite, Errno> {
        let range = self.range(offset, data.len())?;
        let before = self.watched();
        for (at, &byte) in range.zip(data) {
            let (Some(&writable), Some(&w1c)) =
                (self.layout.writable.get(at), self.layout.w1c.get(at))
            else {
                continue;
            };
            if let Some(old) = self.bytes.get_mut(at) {
                *old = (*old & !writable & !(w1c & byte)) | (byte & writable);
            }
        }
        // A state the device does not have is not entered.
        if let Some(pm) = self.layout.pm
            && matches!(self.power_state(), 1 | 2)
        {
            self.replace_bits(pm + PM_CONTROL, PM_STATE, u16::from(before.power));
        }
        Ok(self.changes_since(&before))
    }

    /// Back to how it was built.
    pub fn reset(&mut self) -> ConfigWrite {
        let before = self.watched();
        self.bytes.copy_from_slice(&self.layout.fresh);
        self.changes_since(&before)
    }

    /// Everything that can change.
    #[must_use]
    pub fn save(&self) -> State {
        State {
            bytes: self.bytes.to_vec(),
        }
    }

    /// Takes over a saved state. `EINVAL`, and nothing changed, if it is of another size or differs in a bit that cannot change:
    /// it then belongs to another device.
    pub fn restore(&mut self, state: &State) -> Result<ConfigWrite, Errno> {
        let State { bytes } = state;
        if bytes.len() != self.bytes.len() {
            return Err(Errno::INVAL);
        }
        let layout = &self.layout;
        let masks = layout
            .writable
            .iter()
            .zip(&layout.w1c)
            .zip(&layout.device)
            .map(|((a, b), c)| a | b | c);
        if bytes
            .iter()
            .zip(&layout.fresh)
            .zip(masks)
            .any(|((new, fresh), mask)| (new ^ fresh) & !mask != 0)
        {
            return Err(Errno::INVAL);
        }
        if let Some(pm) = layout.pm
            && bytes
                .get(pm + PM_CONTROL)
                .is_some_and(|control| matches!(control & 0x3, 1 | 2))
        {
            return Err(Errno::INVAL);
        }
        let before = self.watched();
        self.bytes.copy_from_slice(bytes);
        Ok(self.changes_since(&before))
    }

    /// The command word.
    #[must_use]
    pub fn command(&self) -> Command {
        Command::from_bits_retain(self.u16_at(usize::from(config::COMMAND)))
    }

    /// The status word.
    #[must_use]
    pub fn status(&self) -> Status {
        Status::from_bits_retain(self.u16_at(usize::from(config::STATUS)))
    }

    /// Sets or clears the status bit that tells whether the interrupt pin is asserted.
    pub fn set_interrupt_status(&mut self, asserted: bool) {
        let bit = Status::INTERRUPT.bits();
        self.replace_bits(
            usize::from(config::STATUS),
            bit,
            if asserted { bit } else { 0 },
        );
    }

    /// Raises error bits of the status word, until the client clears them; other bits are left alone.
    pub fn raise_status(&mut self, errors: Status) {
        let bits = (errors & STATUS_W1C).bits();
        self.replace_bits(usize::from(config::STATUS), bits, bits);
    }

    /// 1 to 4 for INTA to INTD, 0 for none.
    #[must_use]
    pub fn interrupt_pin(&self) -> u8 {
        self.bytes
            .get(usize::from(config::INTERRUPT_PIN))
            .copied()
            .unwrap_or(0)
    }

    /// A base address register; `None` for one that is not there or is the upper half of another.
    #[must_use]
    pub fn bar(&self, index: usize) -> Option<Bar> {
        self.layout.bars.get(index).copied().flatten()
    }

    /// The address the client gave a base address register, without the flag bits.
    #[must_use]
    pub fn bar_address(&self, index: usize) -> Option<u64> {
        let bar = self.bar(index)?;
        let at = usize::from(config::BAR0) + 4 * index;
        let low = self.u32_at(at);
        Some(match bar.kind() {
            BarKind::Io => u64::from(low & !bar_bits::IO_FLAGS),
            BarKind::Mem32 => u64::from(low & !bar_bits::MEM_FLAGS),
            BarKind::Mem64 => {
                u64::from(self.u32_at(at + 4)) << 32 | u64::from(low & !bar_bits::MEM_FLAGS)
            }
        })
    }

    /// Bytes of ROM, if there is one.
    #[must_use]
    pub fn rom_size(&self) -> Option<u32> {
        self.layout.rom
    }

    /// The MSI control word; empty without the capability.
    #[must_use]
    pub fn msi_control(&self) -> MsiControl {
        self.layout.msi.map_or(MsiControl::empty(), |(at, _)| {
            MsiControl::from_bits_retain(self.u16_at(at + MSI_CONTROL))
        })
    }

    /// The MSI mask and pending words, where there are any.
    fn msi_mask_at(&self) -> Option<usize> {
        let (at, msi) = self.layout.msi?;
        msi.maskable
            .then_some(if msi.address_64 { at + 16 } else { at + 12 })
    }

    /// Whether the MSI vector is masked; never without a mask bit.
    #[must_use]
    pub fn msi_masked(&self) -> bool {
        self.msi_mask_at()
            .is_some_and(|at| self.u16_at(at) & 1 != 0)
    }

    /// Sets or clears the MSI pending bit; nothing happens without one.
    pub fn set_msi_pending(&mut self, pending: bool) {
        if let Some(at) = self.msi_mask_at() {
            self.replace_bits(at + 4, 1, u16::from(pending));
        }
    }

    /// The power state, 0 for D0 and 3 for D3; always 0 without the capability.
    #[must_use]
    pub fn power_state(&self) -> u8 {
        self.layout
            .pm
            .map_or(0, |at| self.u16_at(at + PM_CONTROL).to_le_bytes()[0] & 0x3)
    }

    fn u16_at(&self, at: usize) -> u16 {
        self.bytes
            .get(at..)
            .and_then(|rest| rest.first_chunk())
            .map_or(0, |bytes| u16::from_le_bytes(*bytes))
    }

    fn u32_at(&self, at: usize) -> u32 {
        self.bytes
            .get(at..)
            .and_then(|rest| rest.first_chunk())
            .map_or(0, |bytes| u32::from_le_bytes(*bytes))
    }

    /// Replaces the bits of `mask`, whether or not a client could.
    fn replace_bits(&mut self, at: usize, mask: u16, bits: u16) {
        let word = (self.u16_at(at) & !mask) | (bits & mask);
        put_at(&mut self.bytes, at, &word.to_le_bytes());
    }

    fn watched(&self) -> Watched {
        let mut bars = [0; 6];
        for (index, address) in bars.iter_mut().enumerate() {
            *address = self.bar_address(index).unwrap_or(0);
        }
        Watched {
            command: self.command(),
            msi_control: self.msi_control(),
            msi_masked: self.msi_masked(),
            bars,
            rom: self.u32_at(usize::from(config::ROM_ADDRESS)),
            power: self.power_state(),
        }
    }

    fn changes_since(&self, before: &Watched) -> ConfigWrite {
        let now = self.watched();
        let moved = before
            .bars
            .iter()
            .zip(&now.bars)
            .enumerate()
            .filter(|(_, (from, to))| from != to);
        ConfigWrite {
            command: Change::between(before.command, now.command),
            msi_control: Change::between(before.msi_control, now.msi_control),
            msi_masked: Change::between(before.msi_masked, now.msi_masked),
            bars_moved: moved.fold(0, |mask, (index, _)| mask | 1 << index),
            rom_moved: before.rom != now.rom,
            power: Change::between(before.power, now.power),
        }
    }
}

#[cfg(test)]
mod tests;
