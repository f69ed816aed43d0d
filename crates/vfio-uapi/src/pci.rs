//! PCI: region and interrupt indexes of vfio-pci, configuration space, class codes.

/// Region indexes, `VFIO_PCI_*_REGION_INDEX`. The index of BAR n is n.
pub mod region {
    /// First BAR.
    pub const BAR0: u32 = 0;
    /// Second BAR.
    pub const BAR1: u32 = 1;
    /// Third BAR.
    pub const BAR2: u32 = 2;
    /// Fourth BAR.
    pub const BAR3: u32 = 3;
    /// Fifth BAR.
    pub const BAR4: u32 = 4;
    /// Sixth BAR.
    pub const BAR5: u32 = 5;
    /// Expansion ROM.
    pub const ROM: u32 = 6;
    /// Configuration space.
    pub const CONFIG: u32 = 7;
    /// Legacy VGA ranges.
    pub const VGA: u32 = 8;
    /// `VFIO_PCI_NUM_REGIONS`: device-specific regions start here.
    pub const COUNT: u32 = 9;

    /// Bits of a file offset below the region index (`VFIO_PCI_OFFSET_SHIFT`).
    pub const OFFSET_SHIFT: u32 = 40;

    /// Where in the device file a region starts (`VFIO_PCI_INDEX_TO_OFFSET`).
    #[must_use]
    pub const fn to_offset(index: u32) -> u64 {
        (index as u64) << OFFSET_SHIFT
    }

    /// The region index and the offset in it of an offset in the device file (`VFIO_PCI_OFFSET_TO_INDEX`).
    #[must_use]
    pub const fn from_offset(offset: u64) -> (u64, u64) {
        (offset >> OFFSET_SHIFT, offset & ((1 << OFFSET_SHIFT) - 1))
    }
}

/// Interrupt indexes, `VFIO_PCI_*_IRQ_INDEX`.
pub mod irq {
    /// Interrupt pin.
    pub const INTX: u32 = 0;
    /// MSI.
    pub const MSI: u32 = 1;
    /// MSI-X.
    pub const MSIX: u32 = 2;
    /// Errors.
    pub const ERR: u32 = 3;
    /// Request to release the device.
    pub const REQ: u32 = 4;
    /// `VFIO_PCI_NUM_IRQS`.
    pub const COUNT: u32 = 5;
}

/// Offsets in a type 0 configuration space, bytes (`linux/pci_regs.h`).
pub mod config {
    /// Bytes of the conventional space (`PCI_CFG_SPACE_SIZE`).
    pub const SIZE: u16 = 256;
    /// Bytes with the extended space (`PCI_CFG_SPACE_EXP_SIZE`).
    pub const EXT_SIZE: u16 = 4096;
    /// 2 bytes.
    pub const VENDOR_ID: u16 = 0x00;
    /// 2 bytes.
    pub const DEVICE_ID: u16 = 0x02;
    /// 2 bytes, [`super::Command`].
    pub const COMMAND: u16 = 0x04;
    /// 2 bytes, [`super::Status`].
    pub const STATUS: u16 = 0x06;
    /// 1 byte.
    pub const REVISION_ID: u16 = 0x08;
    /// 3 bytes: programming interface, subclass, class.
    pub const CLASS: u16 = 0x09;
    /// 1 byte.
    pub const CACHE_LINE_SIZE: u16 = 0x0c;
    /// 1 byte.
    pub const LATENCY_TIMER: u16 = 0x0d;
    /// 1 byte.
    pub const HEADER_TYPE: u16 = 0x0e;
    /// 1 byte.
    pub const BIST: u16 = 0x0f;
    /// Six words of 4 bytes.
    pub const BAR0: u16 = 0x10;
    /// 4 bytes.
    pub const CARDBUS_CIS: u16 = 0x28;
    /// 2 bytes.
    pub const SUBSYSTEM_VENDOR_ID: u16 = 0x2c;
    /// 2 bytes.
    pub const SUBSYSTEM_ID: u16 = 0x2e;
    /// 4 bytes.
    pub const ROM_ADDRESS: u16 = 0x30;
    /// 1 byte: offset of the first capability.
    pub const CAPABILITIES: u16 = 0x34;
    /// 1 byte.
    pub const INTERRUPT_LINE: u16 = 0x3c;
    /// 1 byte: 0 none, 1 to 4 for A to D.
    pub const INTERRUPT_PIN: u16 = 0x3d;
    /// 1 byte.
    pub const MIN_GNT: u16 = 0x3e;
    /// 1 byte.
    pub const MAX_LAT: u16 = 0x3f;
    /// First byte after the header: where capabilities may live.
    pub const HEADER_END: u16 = 0x40;
}

flags! {
    /// `PCI_COMMAND_*`.
    pub struct Command: u16 {
        /// Answers I/O accesses.
        const IO = 1 << 0;
        /// Answers memory accesses.
        const MEMORY = 1 << 1;
        /// May do DMA and send messages.
        const MASTER = 1 << 2;
        /// Parity errors are reported.
        const PARITY = 1 << 6;
        /// System errors are reported.
        const SERR = 1 << 8;
        /// The interrupt pin is silent.
        const INTX_DISABLE = 1 << 10;
    }

    /// `PCI_STATUS_*`.
    pub struct Status: u16 {
        /// The interrupt pin is asserted.
        const INTERRUPT = 1 << 3;
        /// There is a capability list.
        const CAP_LIST = 1 << 4;
        /// 66 MHz.
        const SPEED_66MHZ = 1 << 5;
        /// Fast back to back.
        const FAST_BACK = 1 << 7;
        /// Master data parity error; writing 1 clears.
        const PARITY = 1 << 8;
        /// Medium decoding.
        const DEVSEL_MEDIUM = 1 << 9;
        /// Signalled a target abort; writing 1 clears.
        const SIG_TARGET_ABORT = 1 << 11;
        /// Received a target abort; writing 1 clears.
        const REC_TARGET_ABORT = 1 << 12;
        /// Received a master abort; writing 1 clears.
        const REC_MASTER_ABORT = 1 << 13;
        /// Signalled a system error; writing 1 clears.
        const SIG_SYSTEM_ERROR = 1 << 14;
        /// Detected a parity error; writing 1 clears.
        const DETECTED_PARITY = 1 << 15;
    }

    /// `PCI_MSI_FLAGS_*`, the message control word.
    pub struct MsiControl: u16 {
        /// On.
        const ENABLE = 1 << 0;
        /// log2 of the vectors the device can use.
        const QMASK = 0x7 << 1;
        /// log2 of the vectors the driver allows.
        const QSIZE = 0x7 << 4;
        /// The address has 64 bits.
        const ADDRESS_64 = 1 << 7;
        /// There are mask bits.
        const MASKABLE = 1 << 8;
    }
}

/// Bits of a base address register.
pub mod bar {
    /// `PCI_BASE_ADDRESS_SPACE_IO`.
    pub const IO: u32 = 1 << 0;
    /// `PCI_BASE_ADDRESS_MEM_TYPE_64`.
    pub const MEM_64: u32 = 1 << 2;
    /// `PCI_BASE_ADDRESS_MEM_PREFETCH`.
    pub const PREFETCH: u32 = 1 << 3;
    /// Bits of an I/O BAR that are no address.
    pub const IO_FLAGS: u32 = 0x3;
    /// Bits of a memory BAR that are no address.
    pub const MEM_FLAGS: u32 = 0xf;
    /// `PCI_ROM_ADDRESS_ENABLE`.
    pub const ROM_ENABLE: u32 = 1 << 0;
    /// Bits of the ROM BAR that are address.
    pub const ROM_ADDRESS: u32 = 0xffff_f800;
}

/// Capability ids, `PCI_CAP_ID_*`.
pub mod cap {
    /// Power management.
    pub const PM: u8 = 0x01;
    /// Message signalled interrupts.
    pub const MSI: u8 = 0x05;
    /// Vendor-specific.
    pub const VENDOR: u8 = 0x09;
    /// PCI Express.
    pub const EXP: u8 = 0x10;
    /// MSI-X.
    pub const MSIX: u8 = 0x11;
}

/// Class codes: class and subclass, `PCI_CLASS_*`.
pub mod class {
    /// Display, VGA.
    pub const DISPLAY_VGA: u16 = 0x0300;
    /// Display, other.
    pub const DISPLAY_OTHER: u16 = 0x0380;
    /// Communication, serial.
    pub const COMMUNICATION_SERIAL: u16 = 0x0700;
}

/// Vendor and device ids of the sample devices.
pub mod id {
    /// WCH, whose card mtty imitates.
    pub const VENDOR_WCH: u16 = 0x4348;
    /// The card mtty imitates.
    pub const DEVICE_WCH_MTTY: u16 = 0x3253;
    /// Red Hat's Qumranet range, as the display samples use it.
    pub const VENDOR_REDHAT_QUMRANET: u16 = 0x1af4;
    /// Red Hat.
    pub const VENDOR_REDHAT: u16 = 0x1b36;
    /// mdpy.
    pub const DEVICE_MDPY: u16 = 0x000f;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_and_indexes() {
        assert_eq!(region::to_offset(region::CONFIG), 0x0700_0000_0000);
        assert_eq!(region::from_offset(0x0700_0000_0004), (7, 4));
        assert_eq!(region::from_offset(u64::MAX), (0xff_ffff, 0xff_ffff_ffff));
    }
}
