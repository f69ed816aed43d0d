//! The saved form of a port, for migration: written here, and checked when it comes back.

use super::*;

/// Bytes that [`State::save`] makes.
pub const SAVED_LEN: usize = 64;

/// A saved state that no 16550A can be in; see [`State::restore`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the saved UART state is inconsistent: {0}")]
pub struct InvalidState(&'static str);

impl State {
    /// The state as bytes, for [`restore`](Self::restore). The layout is: IER, FCR, LCR, MCR, SCR,
    /// divisor (little-endian), line errors, inputs and deltas as MSR, THRE pending, idle time,
    /// lengths of receive and transmit FIFO, reserved zero, then 16 received bytes, their 16
    /// errors, 16 bytes to transmit, and zeros to the end.
    pub fn save(&self) -> [u8; SAVED_LEN] {
        let Self {
            ier,
            fcr,
            lcr,
            mcr,
            scr,
            divisor,
            rx,
            tx,
            line_errors,
            inputs,
            deltas,
            thre_pending,
            rx_idle,
        } = self;
        let [dll, dlm] = divisor.to_le_bytes();
        let lens = [rx.len, tx.len].map(|len| u8::try_from(len).unwrap_or(u8::MAX));
        let mut out = [0; SAVED_LEN];
        out[..14].copy_from_slice(&[
            *ier,
            *fcr,
            *lcr,
            *mcr,
            *scr,
            dll,
            dlm,
            *line_errors,
            inputs | deltas,
            u8::from(*thre_pending),
            *rx_idle,
            lens[0],
            lens[1],
            0,
        ]);
        for (i, (received, byte)) in rx.slots.iter().zip(&tx.slots).enumerate() {
            out[14 + i] = received.byte;
            out[14 + FIFO_SIZE + i] = received.errors;
            out[14 + 2 * FIFO_SIZE + i] = *byte;
        }
        out
    }

    /// The state that [`save`](Self::save) made, or why these bytes are none: they may come from
    /// a client.
    pub fn restore(saved: &[u8; SAVED_LEN]) -> Result<Self, InvalidState> {
        let [
            ier,
            fcr,
            lcr,
            mcr,
            scr,
            dll,
            dlm,
            line_errors,
            msr,
            thre_pending,
            rx_idle,
            rx_len,
            tx_len,
            _,
            ..,
        ] = *saved;
        let mut state = Self {
            ier,
            fcr,
            lcr,
            mcr,
            scr,
            divisor: u16::from_le_bytes([dll, dlm]),
            rx: Fifo::default(),
            tx: Fifo::default(),
            line_errors,
            inputs: msr & msr::LINES,
            deltas: msr & msr::DELTAS,
            thre_pending: thre_pending == 1,
            rx_idle,
        };
        let capacity = state.capacity();
        let (rx_len, tx_len) = (usize::from(rx_len), usize::from(tx_len));
        for (bad, what) in [
            (ier & !ier::MASK != 0, "IER has bits that do not exist"),
            (
                fcr & !(fcr::ENABLE | fcr::DMA_MODE | fcr::TRIGGER) != 0,
                "FCR has bits that do not stay",
            ),
            (
                fcr & fcr::ENABLE == 0 && fcr != 0,
                "FCR has settings without FIFOs",
            ),
            (mcr & !mcr::MASK != 0, "MCR has bits that do not exist"),
            (
                line_errors & !lsr::ERRORS != 0,
                "LSR has errors that do not exist",
            ),
            (thre_pending > 1, "a flag is neither 0 nor 1"),
            (
                thre_pending == 1 && tx_len > 0,
                "the transmitter reports empty and is not",
            ),
            (
                rx_idle > TIMEOUT_CHARACTERS || (rx_idle > 0 && (rx_len == 0 || fcr == 0)),
                "idle time without something to wait for",
            ),
            (
                rx_len > capacity || tx_len > capacity,
                "more characters than the FIFO holds",
            ),
            (
                state.looped() && tx_len > 0,
                "something to transmit in loopback mode",
            ),
        ] {
            if bad {
                return Err(InvalidState(what));
            }
        }
        for i in 0..rx_len {
            let received = Received {
                byte: saved[14 + i],
                errors: saved[14 + FIFO_SIZE + i],
            };
            if received.errors & !lsr::CHARACTER_ERRORS != 0 || (i == 0 && received.errors != 0) {
                return Err(InvalidState("a character has errors it cannot have"));
            }
            state.rx.push(received);
        }
        for byte in &saved[14 + 2 * FIFO_SIZE..][..tx_len] {
            state.tx.push(*byte);
        }
        Ok(state)
    }
}
