//! Register numbers and bit names of the 16550A, as the PC16550D data sheet and
//! `include/uapi/linux/serial_reg.h` have them.

/// Registers by their offset in the eight bytes of a port. Two names on one number are the two
/// directions (or the two settings of `lcr::DLAB`) of that address.
pub mod reg {
    /// Receiver buffer (read), transmitter holding (write), divisor low byte (`DLAB`).
    pub const RBR_THR_DLL: u8 = 0;
    /// Interrupt enable, divisor high byte (`DLAB`).
    pub const IER_DLM: u8 = 1;
    /// Interrupt identification (read), FIFO control (write).
    pub const IIR_FCR: u8 = 2;
    /// Line control.
    pub const LCR: u8 = 3;
    /// Modem control.
    pub const MCR: u8 = 4;
    /// Line status.
    pub const LSR: u8 = 5;
    /// Modem status.
    pub const MSR: u8 = 6;
    /// Scratch.
    pub const SCR: u8 = 7;
    /// How many bytes of I/O space one port takes.
    pub const COUNT: u8 = 8;
}

/// Interrupt enable register.
pub mod ier {
    /// Received data available, and the receive timeout.
    pub const RDI: u8 = 0x01;
    /// Transmitter holding register empty.
    pub const THRI: u8 = 0x02;
    /// Receiver line status.
    pub const RLSI: u8 = 0x04;
    /// Modem status.
    pub const MSI: u8 = 0x08;
    /// The bits that exist; the others read as zero.
    pub const MASK: u8 = 0x0f;
}

/// Interrupt identification register.
pub mod iir {
    /// Set when *no* interrupt is pending.
    pub const NO_INT: u8 = 0x01;
    /// Modem status, the lowest priority.
    pub const MSI: u8 = 0x00;
    /// Transmitter holding register empty.
    pub const THRI: u8 = 0x02;
    /// Received data available.
    pub const RDI: u8 = 0x04;
    /// Receiver line status, the highest priority.
    pub const RLSI: u8 = 0x06;
    /// Receive timeout, of the same priority as `RDI`.
    pub const TIMEOUT: u8 = 0x0c;
    /// Both set while the FIFOs are enabled.
    pub const FIFO_ENABLED: u8 = 0xc0;
}

/// FIFO control register.
pub mod fcr {
    /// FIFOs on. Changing it empties both; the other bits count only together with it.
    pub const ENABLE: u8 = 0x01;
    /// Empties the receive FIFO, clears itself.
    pub const CLEAR_RCVR: u8 = 0x02;
    /// Empties the transmit FIFO, clears itself.
    pub const CLEAR_XMIT: u8 = 0x04;
    /// DMA signalling mode; kept, without effect (the pins it steers are not connected).
    pub const DMA_MODE: u8 = 0x08;
    /// Trigger level of the receive FIFO: 1, 4, 8 or 14 bytes.
    pub const TRIGGER: u8 = 0xc0;
}

/// Line control register.
pub mod lcr {
    /// Word length: 5 bits plus this.
    pub const WORD_LENGTH: u8 = 0x03;
    /// Set break: the line is held at spacing.
    pub const BREAK: u8 = 0x40;
    /// Divisor latch access.
    pub const DLAB: u8 = 0x80;
}

/// Modem control register.
pub mod mcr {
    /// Data terminal ready.
    pub const DTR: u8 = 0x01;
    /// Request to send.
    pub const RTS: u8 = 0x02;
    /// General output 1.
    pub const OUT1: u8 = 0x04;
    /// General output 2; on PC cards it lets the interrupt through.
    pub const OUT2: u8 = 0x08;
    /// Diagnostic loopback.
    pub const LOOP: u8 = 0x10;
    /// The bits that exist; the others read as zero.
    pub const MASK: u8 = 0x1f;
}

/// Line status register.
pub mod lsr {
    /// Data ready.
    pub const DR: u8 = 0x01;
    /// Overrun error.
    pub const OE: u8 = 0x02;
    /// Parity error.
    pub const PE: u8 = 0x04;
    /// Framing error.
    pub const FE: u8 = 0x08;
    /// Break interrupt.
    pub const BI: u8 = 0x10;
    /// Transmitter holding register (or FIFO) empty.
    pub const THRE: u8 = 0x20;
    /// Transmitter empty.
    pub const TEMT: u8 = 0x40;
    /// At least one error in the receive FIFO.
    pub const FIFO_ERROR: u8 = 0x80;
    /// The errors that belong to one received character.
    pub const CHARACTER_ERRORS: u8 = PE | FE | BI;
    /// What reading the register clears, and what raises the line status interrupt.
    pub const ERRORS: u8 = OE | CHARACTER_ERRORS;
}

/// Modem status register.
pub mod msr {
    /// Clear to send has changed.
    pub const DCTS: u8 = 0x01;
    /// Data set ready has changed.
    pub const DDSR: u8 = 0x02;
    /// Trailing edge of the ring indicator.
    pub const TERI: u8 = 0x04;
    /// Carrier detect has changed.
    pub const DDCD: u8 = 0x08;
    /// Clear to send.
    pub const CTS: u8 = 0x10;
    /// Data set ready.
    pub const DSR: u8 = 0x20;
    /// Ring indicator.
    pub const RI: u8 = 0x40;
    /// Carrier detect.
    pub const DCD: u8 = 0x80;
    /// The four that report change; reading the register clears them.
    pub const DELTAS: u8 = 0x0f;
    /// The four lines.
    pub const LINES: u8 = 0xf0;
}
