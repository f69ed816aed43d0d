//! Describing a configuration space: what it contains, and which of its bits can change.

use core::fmt;
use std::sync::Arc;

use vfio_uapi::pci::Command;
use vfio_uapi::pci::MsiControl;
use vfio_uapi::pci::Status;
use vfio_uapi::pci::bar as bar_bits;
use vfio_uapi::pci::cap;
use vfio_uapi::pci::config;

use super::PciConfig;

/// Command bits that can be written: those vfio-pci lets through for an ordinary function.
const COMMAND_WRITABLE: Command = Command::IO
    .union(Command::MEMORY)
    .union(Command::MASTER)
    .union(Command::SERR)
    .union(Command::INTX_DISABLE);
/// Status bits a device raises and a written 1 clears.
pub(super) const STATUS_W1C: Status = Status::PARITY
    .union(Status::SIG_TARGET_ABORT)
    .union(Status::REC_TARGET_ABORT)
    .union(Status::REC_MASTER_ABORT)
    .union(Status::SIG_SYSTEM_ERROR)
    .union(Status::DETECTED_PARITY);

/// Power management: version 1.2, no PME, no D1 or D2.
const PM_CAPABILITIES: u16 = 0x0003;
/// `PCI_PM_CTRL_NO_SOFT_RESET`: leaving D3 keeps the state.
const PM_NO_SOFT_RESET: u16 = 1 << 3;
/// `PCI_PM_CTRL_STATE_MASK`.
pub(super) const PM_STATE: u16 = 0x3;
/// `PCI_PM_CTRL`, offset of the control word in the capability.
pub(super) const PM_CONTROL: usize = 4;

/// `PCI_MSI_FLAGS`, offset of the control word in the capability.
pub(super) const MSI_CONTROL: usize = 2;

/// What kind of access a base address register decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Mem32,
    /// Memory anywhere; takes the next register as well.
    Mem64,
}

/// One base address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bar {
    kind: BarKind,
    size: u64,
    prefetchable: bool,
}

impl Bar {
    /// `size` bytes of I/O ports, a power of two of at least 4.
    #[must_use]
    pub const fn io(size: u64) -> Self {
        Self {
            kind: BarKind::Io,
            size,
            prefetchable: false,
        }
    }

    /// `size` bytes of memory below 4 GiB, a power of two of at least 16.
    #[must_use]
    pub const fn mem32(size: u64) -> Self {
        Self {
            kind: BarKind::Mem32,
            size,
            prefetchable: false,
        }
    }

    /// `size` bytes of memory, a power of two of at least 16.
    #[must_use]
    pub const fn mem64(size: u64) -> Self {
        Self {
            kind: BarKind::Mem64,
            size,
            prefetchable: false,
        }
    }

    /// Reads have no side effects and writes can be merged. No meaning for I/O.
    #[must_use]
    pub const fn prefetchable(mut self) -> Self {
        self.prefetchable = true;
        self
    }

    /// What it decodes.
    #[must_use]
    pub const fn kind(&self) -> BarKind {
        self.kind
    }

    /// Bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    const fn flags(self) -> u32 {
        let kind = match self.kind {
            BarKind::Io => return bar_bits::IO,
            BarKind::Mem32 => 0,
            BarKind::Mem64 => bar_bits::MEM_64,
        };
        if self.prefetchable {
            kind | bar_bits::PREFETCH
        } else {
            kind
        }
    }

    const fn is_possible(self) -> bool {
        let (min, max) = match self.kind {
            BarKind::Io => (4, 1 << 31),
            BarKind::Mem32 => (16, 1 << 31),
            BarKind::Mem64 => (16, 1 << 63),
        };
        self.size.is_power_of_two() && self.size >= min && self.size <= max
    }
}

/// Message signalled interrupts with one vector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Msi {
    /// The message address has 64 bits.
    pub address_64: bool,
    /// There is a mask bit and a pending bit.
    pub maskable: bool,
}

/// A description that no configuration space can have; a mistake in the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BuildError {
    /// There is no such register, it is taken, or a 64-bit one has no second half.
    BarIndex(usize),
    /// No power of two, or too small or large for its kind.
    BarSize(usize),
    /// No power of two from 2 KiB to 2 GiB.
    RomSize(u32),
    /// Not 0 (none) to 4 (D).
    InterruptPin(u8),
    /// The capabilities do not fit into 192 bytes, or a vendor-specific one is longer than its length byte can say.
    CapabilitySpace,
    /// There are two of a kind that can exist once.
    DuplicateCapability(u8),
}

impl fmt::Display for BuildError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BarIndex(index) => write!(
                f,
                "BAR {index} does not exist, is taken, or has no room for its upper half"
            ),
            Self::BarSize(index) => write!(
                f,
                "the size of BAR {index} is not a power of two that its kind can have"
            ),
            Self::RomSize(size) => write!(
                f,
                "a ROM of {size} bytes is not a power of two from 2 KiB to 2 GiB"
            ),
            Self::InterruptPin(pin) => write!(f, "interrupt pin {pin} is not 0 (none) to 4 (INTD)"),
            Self::CapabilitySpace => {
                f.write_str("the capabilities do not fit between 0x40 and 0xff")
            }
            Self::DuplicateCapability(id) => write!(f, "capability {id:#04x} is there twice"),
        }
    }
}

impl std::error::Error for BuildError {}

/// What never changes once the device exists; clones of a configuration space share it.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) fresh: Box<[u8]>,
    /// Bits a write sets and clears.
    pub(super) writable: Box<[u8]>,
    /// Bits a written 1 clears.
    pub(super) w1c: Box<[u8]>,
    /// Bits the device changes by itself.
    pub(super) device: Box<[u8]>,
    pub(super) bars: [Option<Bar>; 6],
    pub(super) rom: Option<u32>,
    pub(super) msi: Option<(usize, Msi)>,
    pub(super) pm: Option<usize>,
}

/// Describes a configuration space; see [`PciConfig::builder`].
#[derive(Clone, Debug)]
pub struct Builder {
    ids: [u16; 4],
    class: u16,
    prog_if: u8,
    revision: u8,
    command: Command,
    status: Status,
    interrupt_pin: u8,
    bars: Vec<(usize, Bar)>,
    rom: Option<u32>,
    caps: Vec<Capability>,
    size: u16,
}

#[derive(Clone, Debug)]
enum Capability {
    Msi(Msi),
    Pm,
    Vendor { data: Vec<u8>, writable: Vec<u8> },
}

impl Capability {
    const fn id(&self) -> u8 {
        match self {
            Self::Msi(_) => cap::MSI,
            Self::Pm => cap::PM,
            Self::Vendor { .. } => cap::VENDOR,
        }
    }

    const fn len(&self) -> usize {
        match self {
            Self::Msi(Msi {
                address_64: false,
                maskable: false,
            }) => 10,
            Self::Msi(Msi {
                address_64: true,
                maskable: false,
            }) => 14,
            Self::Msi(Msi {
                address_64: false,
                maskable: true,
            }) => 20,
            Self::Msi(Msi {
                address_64: true,
                maskable: true,
            }) => 24,
            Self::Pm => 8,
            Self::Vendor { data, .. } => 3 + data.len(),
        }
    }
}

impl Builder {
    /// Subsystem vendor and device; without it 0.
    #[must_use]
    pub const fn subsystem(mut self, vendor: u16, device: u16) -> Self {
        self.ids[2] = vendor;
        self.ids[3] = device;
        self
    }

    /// Class and subclass in one word (see [`vfio_uapi::pci::class`]), and the programming interface.
    #[must_use]
    pub const fn class(mut self, class: u16, prog_if: u8) -> Self {
        self.class = class;
        self.prog_if = prog_if;
        self
    }

    /// The revision.
    #[must_use]
    pub const fn revision(mut self, revision: u8) -> Self {
        self.revision = revision;
        self
    }

    /// The command word after reset; bits that cannot be written stay as they are here.
    #[must_use]
    pub const fn command(mut self, command: Command) -> Self {
        self.command = command;
        self
    }

    /// Fixed status bits, such as the decoding speed; the bit for the capability list is added where there is one.
    #[must_use]
    pub const fn status(mut self, status: Status) -> Self {
        self.status = status;
        self
    }

    /// 1 to 4 for INTA to INTD, 0 for none.
    #[must_use]
    pub const fn interrupt_pin(mut self, pin: u8) -> Self {
        self.interrupt_pin = pin;
        self
    }

    /// Base address register `index`, 0 to 5.
    #[must_use]
    pub fn bar(mut self, index: usize, bar: Bar) -> Self {
        self.bars.push((index, bar));
        self
    }

    /// An expansion ROM of `size` bytes, a power of two of at least 2048.
    #[must_use]
    pub const fn rom(mut self, size: u32) -> Self {
        self.rom = Some(size);
        self
    }

    /// Message signalled interrupts. Capabilities lie in the order they are added, the first at 0x40, each at a multiple of 4.
    #[must_use]
    pub fn msi(mut self, msi: Msi) -> Self {
        self.caps.push(Capability::Msi(msi));
        self
    }

    /// Power management with D0 and D3.
    #[must_use]
    pub fn power_management(mut self) -> Self {
        self.caps.push(Capability::Pm);
        self
    }

    /// A vendor-specific capability; `data` follows the length byte, so its first byte is the fourth of the capability.
    #[must_use]
    pub fn vendor_capability(mut self, data: &[u8]) -> Self {
        self.caps.push(Capability::Vendor {
            data: data.to_vec(),
            writable: Vec::new(),
        });
        self
    }

    /// The same with bits the client can write; `writable` is matched with `data` byte by byte, missing bytes are read-only.
    #[must_use]
    pub fn vendor_capability_writable(mut self, data: &[u8], writable: &[u8]) -> Self {
        self.caps.push(Capability::Vendor {
            data: data.to_vec(),
            writable: writable.to_vec(),
        });
        self
    }

    /// 4096 bytes instead of 256; those beyond 256 read 0.
    #[must_use]
    pub const fn extended(mut self) -> Self {
        self.size = config::EXT_SIZE;
        self
    }

    /// The space as it is after reset.
    pub fn build(self) -> Result<PciConfig, BuildError> {
        let size = usize::from(self.size);
        let zero = || vec![0; size].into_boxed_slice();
        let mut layout = Layout {
            fresh: zero(),
            writable: zero(),
            w1c: zero(),
            device: zero(),
            bars: [None; 6],
            rom: None,
            msi: None,
            pm: None,
        };
        self.header(&mut layout)?;
        for &(index, bar) in &self.bars {
            place_bar(&mut layout, index, bar)?;
        }
        if let Some(size) = self.rom {
            if !size.is_power_of_two() || !(2048..=1 << 31).contains(&size) {
                return Err(BuildError::RomSize(size));
            }
            layout.rom = Some(size);
            put(
                &mut layout.writable,
                config::ROM_ADDRESS,
                &(!(size - 1) & bar_bits::ROM_ADDRESS | bar_bits::ROM_ENABLE).to_le_bytes(),
            );
        }
        self.capabilities(&mut layout)?;
        Ok(PciConfig {
            bytes: layout.fresh.clone(),
            layout: Arc::new(layout),
        })
    }

    fn header(&self, layout: &mut Layout) -> Result<(), BuildError> {
        if self.interrupt_pin > 4 {
            return Err(BuildError::InterruptPin(self.interrupt_pin));
        }
        let [vendor, device, sub_vendor, sub_device] = self.ids;
        let status = if self.caps.is_empty() {
            self.status
        } else {
            self.status | Status::CAP_LIST
        };
        let [subclass, class] = self.class.to_le_bytes();
        let fresh = &mut layout.fresh;
        put(fresh, config::VENDOR_ID, &vendor.to_le_bytes());
        put(fresh, config::DEVICE_ID, &device.to_le_bytes());
        put(fresh, config::COMMAND, &self.command.bits().to_le_bytes());
        put(fresh, config::STATUS, &status.bits().to_le_bytes());
        put(
            fresh,
            config::REVISION_ID,
            &[self.revision, self.prog_if, subclass, class],
        );
        put(
            fresh,
            config::SUBSYSTEM_VENDOR_ID,
            &sub_vendor.to_le_bytes(),
        );
        put(fresh, config::SUBSYSTEM_ID, &sub_device.to_le_bytes());
        put(fresh, config::INTERRUPT_PIN, &[self.interrupt_pin]);
        let writable = &mut layout.writable;
        put(
            writable,
            config::COMMAND,
            &COMMAND_WRITABLE.bits().to_le_bytes(),
        );
        put(writable, config::CACHE_LINE_SIZE, &[0xff]);
        put(writable, config::LATENCY_TIMER, &[0xff]);
        put(writable, config::INTERRUPT_LINE, &[0xff]);
        put(
            &mut layout.w1c,
            config::STATUS,
            &STATUS_W1C.bits().to_le_bytes(),
        );
        put(
            &mut layout.device,
            config::STATUS,
            &(STATUS_W1C | Status::INTERRUPT).bits().to_le_bytes(),
        );
        Ok(())
    }

    fn capabilities(&self, layout: &mut Layout) -> Result<(), BuildError> {
        let mut link = usize::from(config::CAPABILITIES);
        let mut at = usize::from(config::HEADER_END);
        for capability in &self.caps {
            let (id, len) = (capability.id(), capability.len());
            if len > usize::from(u8::MAX) || at + len > usize::from(config::SIZE) {
                return Err(BuildError::CapabilitySpace);
            }
            let here = u8::try_from(at).map_err(|_| BuildError::CapabilitySpace)?;
            let length = u8::try_from(len).map_err(|_| BuildError::CapabilitySpace)?;
            put_at(&mut layout.fresh, link, &[here]);
            put_at(&mut layout.fresh, at, &[id]);
            match capability {
                Capability::Msi(msi) => {
                    if layout.msi.replace((at, *msi)).is_some() {
                        return Err(BuildError::DuplicateCapability(id));
                    }
                    place_msi(layout, at, *msi);
                }
                Capability::Pm => {
                    if layout.pm.replace(at).is_some() {
                        return Err(BuildError::DuplicateCapability(id));
                    }
                    put_at(&mut layout.fresh, at + 2, &PM_CAPABILITIES.to_le_bytes());
                    put_at(
                        &mut layout.fresh,
                        at + PM_CONTROL,
                        &PM_NO_SOFT_RESET.to_le_bytes(),
                    );
                    put_at(
                        &mut layout.writable,
                        at + PM_CONTROL,
                        &PM_STATE.to_le_bytes(),
                    );
                }
                Capability::Vendor { data, writable } => {
                    put_at(&mut layout.fresh, at + 2, &[length]);
                    put_at(&mut layout.fresh, at + 3, data);
                    let masked = writable.len().min(data.len());
                    put_at(
                        &mut layout.writable,
                        at + 3,
                        writable.get(..masked).unwrap_or(&[]),
                    );
                }
            }
            link = at + 1;
            at = (at + len).next_multiple_of(4);
        }
        Ok(())
    }
}

fn place_bar(layout: &mut Layout, index: usize, bar: Bar) -> Result<(), BuildError> {
    let wide = bar.kind == BarKind::Mem64;
    let lower_is_wide = index
        .checked_sub(1)
        .and_then(|lower| layout.bars.get(lower))
        .is_some_and(|lower| lower.is_some_and(|lower| lower.kind == BarKind::Mem64));
    let free = |index: usize| layout.bars.get(index).is_some_and(Option::is_none);
    if !free(index) || lower_is_wide || (wide && !free(index + 1)) {
        return Err(BuildError::BarIndex(index));
    }
    if !bar.is_possible() {
        return Err(BuildError::BarSize(index));
    }
    let at = usize::from(config::BAR0) + 4 * index;
    let flag_bits = if bar.kind == BarKind::Io {
        bar_bits::IO_FLAGS
    } else {
        bar_bits::MEM_FLAGS
    };
    let address = !(bar.size - 1) & !u64::from(flag_bits);
    let bytes = if wide { 8 } else { 4 };
    put_at(
        &mut layout.writable,
        at,
        address.to_le_bytes().get(..bytes).unwrap_or(&[]),
    );
    put_at(&mut layout.fresh, at, &bar.flags().to_le_bytes());
    if let Some(slot) = layout.bars.get_mut(index) {
        *slot = Some(bar);
    }
    Ok(())
}

fn place_msi(layout: &mut Layout, at: usize, msi: Msi) {
    let mut control = MsiControl::empty();
    control.set(MsiControl::ADDRESS_64, msi.address_64);
    control.set(MsiControl::MASKABLE, msi.maskable);
    put_at(
        &mut layout.fresh,
        at + MSI_CONTROL,
        &control.bits().to_le_bytes(),
    );
    put_at(
        &mut layout.writable,
        at + MSI_CONTROL,
        &MsiControl::ENABLE.bits().to_le_bytes(),
    );
    put_at(&mut layout.writable, at + 4, &0xffff_fffcu32.to_le_bytes());
    let data = if msi.address_64 {
        put_at(&mut layout.writable, at + 8, &u32::MAX.to_le_bytes());
        at + 12
    } else {
        at + 8
    };
    put_at(&mut layout.writable, data, &u16::MAX.to_le_bytes());
    if msi.maskable {
        put_at(&mut layout.writable, data + 4, &[1]);
        put_at(&mut layout.device, data + 8, &[1]);
    }
}

/// Writes into an image; what does not fit is left out, which only a mistake in this file could cause.
pub(super) fn put_at(image: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = image.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    } else {
        debug_assert!(
            bytes.is_empty(),
            "{} bytes at {at:#x} are outside the space",
            bytes.len()
        );
    }
}

fn put(image: &mut [u8], at: u16, bytes: &[u8]) {
    put_at(image, usize::from(at), bytes);
}

impl PciConfig {
    /// Starts the description of a device: 256 bytes, no BARs, no interrupt, no capabilities.
    #[must_use]
    pub fn builder(vendor: u16, device: u16) -> Builder {
        Builder {
            ids: [vendor, device, 0, 0],
            class: 0,
            prog_if: 0,
            revision: 0,
            command: Command::empty(),
            status: Status::empty(),
            interrupt_pin: 0,
            bars: Vec::new(),
            rom: None,
            caps: Vec::new(),
            size: config::SIZE,
        }
    }
}
