//! The 16550A as a pure machine: a register access or an event on the line goes in, values come
//! out. No locks, no I/O, no clock; whoever owns a [`State`] moves the bytes and passes the time.
//!
//! Follows the PC16550D data sheet. Where the sheet is silent, it does what the stock Linux driver
//! tests for (`drivers/tty/serial/8250/8250_port.c`, `autoconfig`, `size_fifo`,
//! `serial8250_do_startup`): the THRE interrupt comes back each time it is enabled while the
//! transmitter is empty, `IIR` has no bits of later chips, and `IER` and `MCR` keep only theirs.
//!
//! Not emulated: the time a character takes (the owner pops bytes when the far end has room), the
//! meaning of the divisor, parity, and DMA signalling.

mod saved;

pub use saved::InvalidState;
pub use saved::SAVED_LEN;

use crate::mtty::spec::fcr;
use crate::mtty::spec::ier;
use crate::mtty::spec::iir;
use crate::mtty::spec::lcr;
use crate::mtty::spec::lsr;
use crate::mtty::spec::mcr;
use crate::mtty::spec::msr;
use crate::mtty::spec::reg;

/// Characters in each FIFO.
pub const FIFO_SIZE: usize = 16;

/// Character times without traffic after which a receive FIFO below its trigger level asks for
/// attention (data sheet, "FIFO timeout interrupts").
pub const TIMEOUT_CHARACTERS: u8 = 4;

/// The divisor after reset: 9600 baud from the usual 1.8432 MHz clock.
const RESET_DIVISOR: u16 = 12;

/// The four modem inputs, each `true` when asserted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ModemInputs {
    /// Clear to send: the far end takes data.
    pub cts: bool,
    /// Data set ready: there is a far end.
    pub dsr: bool,
    /// Ring indicator.
    pub ri: bool,
    /// Carrier detect: the far end is connected.
    pub dcd: bool,
}

impl ModemInputs {
    /// Somebody is at the far end and listens.
    pub const CONNECTED: Self = Self {
        cts: true,
        dsr: true,
        ri: false,
        dcd: true,
    };

    fn bits(self) -> u8 {
        let Self { cts, dsr, ri, dcd } = self;
        [
            (cts, msr::CTS),
            (dsr, msr::DSR),
            (ri, msr::RI),
            (dcd, msr::DCD),
        ]
        .into_iter()
        .filter(|(on, _)| *on)
        .fold(0, |bits, (_, bit)| bits | bit)
    }

    fn from_bits(bits: u8) -> Self {
        Self {
            cts: bits & msr::CTS != 0,
            dsr: bits & msr::DSR != 0,
            ri: bits & msr::RI != 0,
            dcd: bits & msr::DCD != 0,
        }
    }
}

/// A queue of at most [`FIFO_SIZE`]. The oldest is always at the front, so two queues of equal
/// content are equal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Fifo<T> {
    slots: [T; FIFO_SIZE],
    len: usize,
}

impl<T: Copy + Default> Fifo<T> {
    fn push(&mut self, item: T) -> bool {
        let Some(slot) = self.slots.get_mut(self.len) else {
            return false;
        };
        *slot = item;
        self.len += 1;
        true
    }

    fn pop(&mut self) -> Option<T> {
        let first = *self.as_slice().first()?;
        self.slots.copy_within(1.., 0);
        self.slots[FIFO_SIZE - 1] = T::default();
        self.len -= 1;
        Some(first)
    }

    fn as_slice(&self) -> &[T] {
        &self.slots[..self.len]
    }

    fn front_mut(&mut self) -> Option<&mut T> {
        self.slots[..self.len].first_mut()
    }

    fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}

/// One received character and the errors that came with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Received {
    byte: u8,
    /// Of `lsr::CHARACTER_ERRORS`.
    errors: u8,
}

/// Everything one port remembers. Cloning it is a snapshot, comparing it is exact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    ier: u8,
    /// The bits of FCR that stay: enable, DMA mode, trigger.
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scr: u8,
    divisor: u16,
    rx: Fifo<Received>,
    tx: Fifo<u8>,
    /// Errors seen by LSR and not read yet: an overrun, and those of the character that has
    /// reached the front of the receive FIFO.
    line_errors: u8,
    /// What the outside drives, in the upper half of MSR's layout.
    inputs: u8,
    /// The lower half of MSR.
    deltas: u8,
    /// The transmitter has become empty and nobody has been told.
    thre_pending: bool,
    /// Character times since the last arrival or read, up to `TIMEOUT_CHARACTERS`.
    rx_idle: u8,
}

impl Default for State {
    fn default() -> Self {
        Self {
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            scr: 0,
            divisor: RESET_DIVISOR,
            rx: Fifo::default(),
            tx: Fifo::default(),
            line_errors: 0,
            inputs: 0,
            deltas: 0,
            thre_pending: false,
            rx_idle: 0,
        }
    }
}

impl State {
    /// A port after power on with nothing connected.
    pub fn new() -> Self {
        Self::default()
    }

    /// Master reset. Every register returns to its value after power on; the modem inputs stay,
    /// because the outside drives them, and report no change.
    pub fn reset(&mut self) {
        *self = Self {
            inputs: self.inputs,
            ..Self::default()
        };
    }

    /// Reads register `register` (only the low three bits count, as only they are wired), with
    /// the side effects a read has.
    pub fn read(&mut self, register: u8) -> u8 {
        match register % reg::COUNT {
            reg::RBR_THR_DLL if self.dlab() => self.divisor.to_le_bytes()[0],
            reg::RBR_THR_DLL => self.read_rbr(),
            reg::IER_DLM if self.dlab() => self.divisor.to_le_bytes()[1],
            reg::IER_DLM => self.ier,
            reg::IIR_FCR => self.read_iir(),
            reg::LCR => self.lcr,
            reg::MCR => self.mcr,
            reg::LSR => self.read_lsr(),
            reg::MSR => {
                let value = self.modem_lines() | self.deltas;
                self.deltas = 0;
                value
            }
            _ => self.scr,
        }
    }

    /// Writes register `register` (low three bits). LSR and MSR ignore it.
    pub fn write(&mut self, register: u8, value: u8) {
        match register % reg::COUNT {
            reg::RBR_THR_DLL if self.dlab() => {
                self.divisor = u16::from_le_bytes([value, self.divisor.to_le_bytes()[1]]);
            }
            reg::RBR_THR_DLL => self.write_thr(value),
            reg::IER_DLM if self.dlab() => {
                self.divisor = u16::from_le_bytes([self.divisor.to_le_bytes()[0], value]);
            }
            reg::IER_DLM => self.write_ier(value),
            reg::IIR_FCR => self.write_fcr(value),
            reg::LCR => self.lcr = value,
            reg::MCR => self.write_mcr(value),
            reg::LSR | reg::MSR => {}
            _ => self.scr = value,
        }
    }

    /// The level of the interrupt line. `OUT2` gates it, as on every PC card; the *register* bit
    /// does, so that a self test in loopback mode sees its interrupts too.
    pub fn irq(&self) -> bool {
        self.mcr & mcr::OUT2 != 0 && self.pending() != iir::NO_INT
    }

    /// Takes the next byte for the line, cut to the word length. `None` when there is none, and
    /// in loopback mode, where the line is cut off. Taking the last one raises THRE.
    pub fn transmit(&mut self) -> Option<u8> {
        if self.looped() {
            return None;
        }
        let byte = self.tx.pop()?;
        self.thre_pending |= self.tx.is_empty();
        Some(byte & self.word_mask())
    }

    /// Offers the bytes for the line one by one, until there are no more or one is not taken,
    /// which then stays first.
    pub fn transmit_to(&mut self, mut take: impl FnMut(u8) -> bool) {
        while self.has_output()
            && let Some(byte) = self.tx.as_slice().first()
            && take(byte & self.word_mask())
        {
            self.transmit();
        }
    }

    /// Whether [`transmit`](Self::transmit) has something to give.
    pub fn has_output(&self) -> bool {
        !self.looped() && !self.tx.is_empty()
    }

    /// Whether [`receive`](Self::receive) would take a byte.
    pub fn can_receive(&self) -> bool {
        !self.looped() && self.rx.len < self.capacity()
    }

    /// A byte from a far end that can wait: taken if there is room. `false` leaves the state as
    /// it was, and the byte with the caller.
    pub fn receive(&mut self, byte: u8) -> bool {
        let room = self.can_receive();
        if room {
            self.shift_in(byte);
        }
        room
    }

    /// A byte from a wire that waits for nobody: with the FIFO full it is lost, without FIFOs it
    /// replaces the one before, and both are an overrun. In loopback mode the input is cut off
    /// and the byte is gone.
    pub fn shift_in(&mut self, byte: u8) {
        if !self.looped() {
            self.arrive(Received {
                byte: byte & self.word_mask(),
                errors: 0,
            });
        }
    }

    /// The far end holds the line at spacing: one zero character that carries the break error.
    pub fn receive_break(&mut self) {
        if !self.looped() {
            self.arrive(Received {
                byte: 0,
                errors: lsr::BI,
            });
        }
    }

    /// The outside drives the modem inputs. In loopback mode they are remembered, and seen when
    /// that ends.
    pub fn set_inputs(&mut self, inputs: ModemInputs) {
        let before = self.modem_lines();
        self.inputs = inputs.bits();
        self.note_modem_change(before);
    }

    /// What the outside drives, as last set.
    pub fn inputs(&self) -> ModemInputs {
        ModemInputs::from_bits(self.inputs)
    }

    /// `characters` character times pass without traffic. A receive FIFO that holds something
    /// reports the timeout after [`TIMEOUT_CHARACTERS`].
    pub fn elapse(&mut self, characters: u8) {
        if self.fifos() && !self.rx.is_empty() {
            self.rx_idle = self
                .rx_idle
                .saturating_add(characters)
                .min(TIMEOUT_CHARACTERS);
        }
    }

    /// The DTR pin; inactive in loopback mode.
    pub fn dtr(&self) -> bool {
        !self.looped() && self.mcr & mcr::DTR != 0
    }

    /// The RTS pin; inactive in loopback mode.
    pub fn rts(&self) -> bool {
        !self.looped() && self.mcr & mcr::RTS != 0
    }

    /// Whether the guest holds the line at spacing; never in loopback mode, where the output pin
    /// is marking.
    pub fn sends_break(&self) -> bool {
        !self.looped() && self.lcr & lcr::BREAK != 0
    }

    fn dlab(&self) -> bool {
        self.lcr & lcr::DLAB != 0
    }

    fn looped(&self) -> bool {
        self.mcr & mcr::LOOP != 0
    }

    fn fifos(&self) -> bool {
        self.fcr & fcr::ENABLE != 0
    }

    /// Characters that fit in each direction: the FIFO, or the one register.
    fn capacity(&self) -> usize {
        if self.fifos() { FIFO_SIZE } else { 1 }
    }

    fn trigger(&self) -> usize {
        match self.fcr >> 6 {
            0 => 1,
            1 => 4,
            2 => 8,
            _ => 14,
        }
    }

    fn word_mask(&self) -> u8 {
        0xff >> (3 - (self.lcr & lcr::WORD_LENGTH))
    }

    /// The interrupt of highest priority that is enabled and pending, in IIR's coding.
    fn pending(&self) -> u8 {
        let enabled = |bit| self.ier & bit != 0;
        let level = self.rx.len;
        if enabled(ier::RLSI) && self.line_errors != 0 {
            iir::RLSI
        } else if enabled(ier::RDI) && level > 0 && (!self.fifos() || level >= self.trigger()) {
            iir::RDI
        } else if enabled(ier::RDI) && self.rx_idle >= TIMEOUT_CHARACTERS {
            iir::TIMEOUT
        } else if enabled(ier::THRI) && self.thre_pending {
            iir::THRI
        } else if enabled(ier::MSI) && self.deltas != 0 {
            iir::MSI
        } else {
            iir::NO_INT
        }
    }

    fn read_rbr(&mut self) -> u8 {
        self.rx_idle = 0;
        let received = self.rx.pop().unwrap_or_default();
        self.reveal_errors();
        received.byte
    }

    /// Reading IIR acknowledges THRE if that is what it reports, and nothing else.
    fn read_iir(&mut self) -> u8 {
        let pending = self.pending();
        if pending == iir::THRI {
            self.thre_pending = false;
        }
        pending | if self.fifos() { iir::FIFO_ENABLED } else { 0 }
    }

    fn read_lsr(&mut self) -> u8 {
        let mut value = self.line_errors;
        if !self.rx.is_empty() {
            value |= lsr::DR;
        }
        if self.tx.is_empty() {
            value |= lsr::THRE | lsr::TEMT;
        }
        let queued = self.rx.as_slice().iter().any(|r| r.errors != 0);
        if self.fifos() && (queued || self.line_errors & lsr::CHARACTER_ERRORS != 0) {
            value |= lsr::FIFO_ERROR;
        }
        self.line_errors = 0;
        value
    }

    fn write_thr(&mut self, byte: u8) {
        self.thre_pending = false;
        if !self.fifos() {
            // The one register: a byte not yet sent is overwritten.
            self.tx.clear();
        }
        // A driver that writes into a full FIFO loses what it wrote.
        self.tx.push(byte);
        self.circulate();
    }

    fn write_ier(&mut self, value: u8) {
        let before = std::mem::replace(&mut self.ier, value & ier::MASK);
        if (before ^ self.ier) & ier::THRI != 0 {
            // Enabling it while the transmitter is empty raises it even if it had been
            // acknowledged before: `serial8250_do_startup` marks a chip that does not as broken.
            self.thre_pending = self.ier & ier::THRI != 0 && self.tx.is_empty();
        }
    }

    fn write_fcr(&mut self, value: u8) {
        let toggled = (value ^ self.fcr) & fcr::ENABLE != 0;
        let enabled = value & fcr::ENABLE != 0;
        if toggled || (enabled && value & fcr::CLEAR_RCVR != 0) {
            self.rx.clear();
            self.rx_idle = 0;
            // The errors of characters go with them; an overrun has happened nevertheless.
            self.line_errors &= lsr::OE;
        }
        if (toggled || (enabled && value & fcr::CLEAR_XMIT != 0)) && !self.tx.is_empty() {
            self.tx.clear();
            self.thre_pending = true;
        }
        self.fcr = if enabled {
            value & (fcr::ENABLE | fcr::DMA_MODE | fcr::TRIGGER)
        } else {
            0
        };
    }

    fn write_mcr(&mut self, value: u8) {
        let before = self.modem_lines();
        self.mcr = value & mcr::MASK;
        self.note_modem_change(before);
        self.circulate();
    }

    /// In loopback mode the transmitter feeds the receiver: what is to be sent has arrived.
    fn circulate(&mut self) {
        if !self.looped() {
            return;
        }
        while let Some(byte) = self.tx.pop() {
            let byte = byte & self.word_mask();
            self.arrive(Received { byte, errors: 0 });
            self.thre_pending |= self.tx.is_empty();
        }
    }

    fn arrive(&mut self, received: Received) {
        self.rx_idle = 0;
        if self.rx.len >= self.capacity() {
            self.line_errors |= lsr::OE;
            if self.fifos() {
                // The FIFO keeps what it has; the shift register is overwritten.
                return;
            }
            self.rx.clear();
        }
        self.rx.push(received);
        if self.rx.len == 1 {
            self.reveal_errors();
        }
    }

    /// LSR shows the errors of a character when it reaches the front.
    fn reveal_errors(&mut self) {
        if let Some(front) = self.rx.front_mut() {
            self.line_errors |= std::mem::take(&mut front.errors);
        }
    }

    /// The upper half of MSR: the inputs, or in loopback mode the outputs wired to them.
    fn modem_lines(&self) -> u8 {
        if !self.looped() {
            return self.inputs;
        }
        [
            (mcr::RTS, msr::CTS),
            (mcr::DTR, msr::DSR),
            (mcr::OUT1, msr::RI),
            (mcr::OUT2, msr::DCD),
        ]
        .into_iter()
        .filter(|(output, _)| self.mcr & output != 0)
        .fold(0, |lines, (_, input)| lines | input)
    }

    fn note_modem_change(&mut self, before: u8) {
        let now = self.modem_lines();
        // CTS, DSR and DCD report both edges, RI only its trailing one.
        let changed = (before ^ now) & !msr::RI | (before & !now & msr::RI);
        self.deltas |= changed >> 4;
    }
}

#[cfg(test)]
mod tests;
