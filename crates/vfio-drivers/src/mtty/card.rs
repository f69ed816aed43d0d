//! The card behind its registers: configuration space and ports under one lock, and the way from
//! there to the interrupts and the far ends of the ports.
//!
//! Nothing is called with the lock held that could wait: bytes go into a port's queue
//! ([`Outlet::offer`]), and interrupts are raised after it has been released.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use rustix::io::Errno;
use vfio_core::irq::pci::PciIrqs;
use vfio_uapi::pci::Command;
use vfio_uapi::pci::Status;
use vfio_uapi::pci::class;
use vfio_uapi::pci::config;
use vfio_uapi::pci::id;

use super::port::Line;
use super::port::Outlet;
use super::spec::reg;
use super::uart;
use super::uart::ModemInputs;
use super::uart::SAVED_LEN;
use crate::pci_config;
use crate::pci_config::Bar;
use crate::pci_config::Msi;
use crate::pci_config::PciConfig;

/// The sample's revision.
const REVISION: u8 = 0x10;

/// Programming interface of a serial controller that is compatible with a 16550.
const PROG_IF_16550: u8 = 0x02;

/// Bytes of the BAR of a port.
pub(super) const PORT_SIZE: u64 = reg::COUNT as u64;

/// A card with one or two ports.
#[derive(Debug)]
pub(super) struct Card {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    config: PciConfig,
    uarts: Vec<uart::State>,
    /// What the far end of each port drives. A port that is stopped does not see it yet.
    outside: Vec<ModemInputs>,
    /// Whether bytes, modem inputs and interrupts move; see [`Card::stop`].
    running: bool,
    /// An interrupt has risen while stopped, and nobody was sent a message.
    unsent: bool,
    /// Counts what may have changed the interrupt line; see [`Card::publish`].
    generation: u64,
}

impl State {
    /// Whether a port wants attention.
    fn asserted(&self) -> bool {
        self.uarts.iter().any(uart::State::irq)
    }
}

/// Where the bytes of a port go after an access.
#[derive(Clone, Copy, Debug)]
pub(super) enum Wire<'a> {
    /// Back into its receiver.
    Back,
    /// To the far end.
    Out(&'a Outlet),
    /// They stay: the access came from the far end and made none.
    Stay,
}

impl Card {
    /// A card after power on, with nothing connected.
    pub(super) fn new(ports: usize) -> Self {
        let mut config = PciConfig::builder(id::VENDOR_WCH, id::DEVICE_WCH_MTTY)
            .subsystem(id::VENDOR_WCH, id::DEVICE_WCH_MTTY)
            .class(class::COMMUNICATION_SERIAL, PROG_IF_16550)
            .revision(REVISION)
            .command(Command::IO)
            .status(Status::DEVSEL_MEDIUM)
            .interrupt_pin(1)
            .msi(Msi {
                address_64: true,
                maskable: false,
            });
        for port in 0..ports {
            // `pbn_b0_bt_2_115200` of `drivers/tty/serial/8250/8250_pci.c`, which drives this
            // card, takes one BAR per port.
            config = config.bar(port, Bar::io(PORT_SIZE));
        }
        Self {
            state: Mutex::new(State {
                config: config.build().expect("a fixed description, tested"),
                uarts: vec![uart::State::new(); ports],
                outside: vec![ModemInputs::default(); ports],
                running: true,
                unsent: false,
                generation: 0,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A driver that panicked takes its device down; what others still do with it is cleanup.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of configuration space.
    pub(super) fn config_size(&self) -> u64 {
        self.lock().config.size()
    }

    /// Reset as over the bus: registers and configuration, not what the far ends drive. A card
    /// that is stopped stays so.
    pub(super) fn reset(&self) {
        let mut state = self.lock();
        let _ = state.config.reset();
        state.uarts.iter_mut().for_each(uart::State::reset);
        state.unsent = false;
        state.generation += 1;
    }

    /// Reset, and running: however it was left.
    pub(super) fn power_on(&self) {
        self.reset();
        self.lock().running = true;
    }

    /// What the far end of a port drives, without a change to report: it has been so all along.
    pub(super) fn preset_inputs(&self, port: usize, inputs: ModemInputs) {
        let mut state = self.lock();
        if let Some(outside) = state.outside.get_mut(port) {
            *outside = inputs;
        }
        if let Some(uart) = state.uarts.get_mut(port) {
            uart.set_inputs(inputs);
            uart.reset();
        }
    }

    pub(super) fn read_config(&self, offset: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        let mut state = self.lock();
        let asserted = state.asserted();
        state.config.set_interrupt_status(asserted);
        state.config.read(offset, buf)
    }

    pub(super) fn write_config(
        &self,
        irqs: &PciIrqs,
        offset: u64,
        data: &[u8],
    ) -> Result<usize, Errno> {
        let mut state = self.lock();
        let changed = state.config.write(offset, data)?;
        let silence = changed.command.is_some();
        state.generation += u64::from(silence);
        drop(state);
        if silence {
            self.publish(irqs, false);
        }
        Ok(data.len())
    }

    /// Reads registers of a port: each byte is one of its own, an access past the last is cut.
    pub(super) fn read_port(
        &self,
        irqs: &PciIrqs,
        port: usize,
        wire: Wire<'_>,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<usize, Errno> {
        self.each_register(irqs, port, wire, offset, buf.len(), |uart, n, register| {
            if let Some(byte) = buf.get_mut(n) {
                *byte = uart.read(register);
            }
        })
    }

    /// Writes registers of a port, as [`read_port`](Self::read_port).
    pub(super) fn write_port(
        &self,
        irqs: &PciIrqs,
        port: usize,
        wire: Wire<'_>,
        offset: u64,
        data: &[u8],
    ) -> Result<usize, Errno> {
        self.each_register(irqs, port, wire, offset, data.len(), |uart, n, register| {
            if let Some(byte) = data.get(n) {
                uart.write(register, *byte);
            }
        })
    }

    fn each_register(
        &self,
        irqs: &PciIrqs,
        port: usize,
        wire: Wire<'_>,
        offset: u64,
        len: usize,
        mut f: impl FnMut(&mut uart::State, usize, u8),
    ) -> Result<usize, Errno> {
        // As vfio-pci: a position beyond the end is an error, a length beyond it is not.
        let start = u8::try_from(offset).map_err(|_| Errno::INVAL)?;
        if start >= reg::COUNT {
            return Err(Errno::INVAL);
        }
        let mut done = 0;
        self.change(irqs, port, wire, |uart, rose, running| {
            let wire = if running { wire } else { Wire::Stay };
            for (register, n) in (start..reg::COUNT).zip(0..len) {
                rose.step(uart, wire, |uart| f(uart, n, register));
                done = n + 1;
            }
        });
        Ok(done)
    }

    /// Lets `f` change a port, then tells the far end and the interrupts what came of it. `f` is
    /// told whether the card runs; if not, no byte may move.
    fn change(
        &self,
        irqs: &PciIrqs,
        port: usize,
        wire: Wire<'_>,
        f: impl FnOnce(&mut uart::State, &mut Rose, bool),
    ) {
        let mut rose = Rose(false);
        let mut room = false;
        let running = {
            let mut state = self.lock();
            state.generation += 1;
            let running = state.running;
            if let Some(uart) = state.uarts.get_mut(port) {
                f(uart, &mut rose, running);
                room = uart.can_receive();
            }
            running
        };
        if let Wire::Out(outlet) = wire
            && running
        {
            outlet.flush();
            if room {
                outlet.resume();
            }
        }
        self.publish(irqs, rose.0);
    }

    /// Makes the interrupts agree with the ports. The line is a level that several threads may
    /// change, and is set outside the lock: whoever finds that it has changed meanwhile sets it
    /// again, so that the last word is the true one. A message is sent for each rise.
    fn publish(&self, irqs: &PciIrqs, rose: bool) {
        loop {
            let (level, generation) = {
                let state = self.lock();
                let silent = state.config.command().contains(Command::INTX_DISABLE);
                let level = state.asserted() && !silent && state.running;
                (level, state.generation)
            };
            irqs.set_level(level);
            if self.lock().generation == generation {
                break;
            }
        }
        if rose {
            self.send(irqs);
        }
    }

    /// Sends a message, now or when the card runs again.
    fn send(&self, irqs: &PciIrqs) {
        let running = {
            let mut state = self.lock();
            state.unsent |= !state.running;
            state.running
        };
        if running {
            irqs.fire(0);
        }
    }

    /// Sets the interrupt line anew: after reset, and when a session begins.
    pub(super) fn refresh(&self, irqs: &PciIrqs) {
        self.publish(irqs, false);
    }

    /// Messages have just been enabled: what was pending then has not been told to anybody.
    pub(super) fn announce_pending(&self, irqs: &PciIrqs) {
        let asserted = self.lock().asserted();
        if asserted {
            self.send(irqs);
        }
    }

    /// The far end of a port drives other modem inputs.
    fn drive(&self, irqs: &PciIrqs, port: usize, inputs: ModemInputs) {
        if let Some(outside) = self.lock().outside.get_mut(port) {
            *outside = inputs;
        }
        self.change(irqs, port, Wire::Stay, |uart, rose, running| {
            if running {
                rose.step(uart, Wire::Stay, |uart| uart.set_inputs(inputs));
            }
        });
    }

    /// From here on nothing happens but by an access: what comes from the far ends waits there,
    /// what is to be sent waits here, and the interrupt line is down.
    pub(super) fn stop(&self, irqs: &PciIrqs) {
        {
            let mut state = self.lock();
            state.running = false;
            state.generation += 1;
        }
        self.publish(irqs, false);
    }

    /// Goes on: what has waited moves, and interrupts that are pending are raised. Harmless for a
    /// card that runs.
    pub(super) fn resume<'a>(&self, irqs: &PciIrqs, wire: impl Fn(usize) -> Wire<'a>) {
        let (outside, unsent) = {
            let mut state = self.lock();
            state.running = true;
            state.generation += 1;
            (state.outside.clone(), std::mem::take(&mut state.unsent))
        };
        for (port, inputs) in outside.into_iter().enumerate() {
            let wire = wire(port);
            self.change(irqs, port, wire, |uart, rose, _| {
                rose.step(uart, wire, |uart| uart.set_inputs(inputs));
            });
        }
        self.publish(irqs, unsent);
    }

    /// Bytes that [`save`](Self::save) makes.
    pub(super) fn saved_len(ports: usize) -> usize {
        usize::from(config::SIZE) + ports * SAVED_LEN
    }

    /// The configuration space, then each port.
    pub(super) fn save(&self) -> Vec<u8> {
        let mut state = self.lock();
        let asserted = state.asserted();
        state.config.set_interrupt_status(asserted);
        let mut saved = state.config.save().bytes;
        for uart in &state.uarts {
            saved.extend(uart.save());
        }
        saved
    }

    /// What [`save`](Self::save) made, all of it or nothing: `EINVAL` for bytes that are no state
    /// of this card.
    pub(super) fn restore(&self, saved: &[u8]) -> Result<(), Errno> {
        let mut state = self.lock();
        if saved.len() != Self::saved_len(state.uarts.len()) {
            return Err(Errno::INVAL);
        }
        let (bytes, ports) = saved
            .split_at_checked(usize::from(config::SIZE))
            .ok_or(Errno::INVAL)?;
        let (ports, _) = ports.as_chunks::<SAVED_LEN>();
        let uarts = ports
            .iter()
            .map(uart::State::restore)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| {
                tracing::warn!("mtty: a saved card is refused: {error}");
                Errno::INVAL
            })?;
        let bytes = bytes.to_vec();
        // The caller publishes the interrupt line when the card runs again.
        let _ = state.config.restore(&pci_config::State { bytes })?;
        state.uarts = uarts;
        // Where it was saved a message may have been on its way.
        state.unsent = state.asserted();
        state.generation += 1;
        Ok(())
    }
}

/// Whether the interrupt of a port has risen, even if it is up before and after.
struct Rose(bool);

impl Rose {
    /// One step of a port, with the byte traffic that follows from it.
    fn step(&mut self, uart: &mut uart::State, wire: Wire<'_>, f: impl FnOnce(&mut uart::State)) {
        let before = uart.irq();
        let marking = !uart.sends_break();
        f(uart);
        let between = uart.irq();
        match wire {
            Wire::Stay => {}
            Wire::Out(outlet) => uart.transmit_to(|byte| outlet.offer(byte)),
            Wire::Back => {
                while let Some(byte) = uart.transmit() {
                    uart.shift_in(byte);
                }
                if marking && uart.sends_break() {
                    uart.receive_break();
                }
            }
        }
        // The line is infinitely fast: when a step is over, everything has arrived and the pause
        // that the receive timeout waits for has passed.
        uart.elapse(uart::TIMEOUT_CHARACTERS);
        self.0 |= uart.irq() && !(before && between);
    }
}

/// A port as its far end sees it.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) card: Arc<Card>,
    pub(super) irqs: Arc<PciIrqs>,
    pub(super) port: usize,
}

impl Line for Guest {
    fn receive(&self, bytes: &[u8]) -> usize {
        let mut taken = 0;
        self.card
            .change(&self.irqs, self.port, Wire::Stay, |uart, rose, running| {
                if !running {
                    return;
                }
                rose.step(uart, Wire::Stay, |uart| {
                    taken = bytes.iter().take_while(|byte| uart.receive(**byte)).count();
                });
            });
        taken
    }

    fn room(&self, outlet: &Outlet) {
        let wire = Wire::Out(outlet);
        self.card
            .change(&self.irqs, self.port, wire, |uart, rose, running| {
                if running {
                    rose.step(uart, wire, |_| {});
                }
            });
    }

    fn carrier(&self, present: bool) {
        let inputs = if present {
            ModemInputs::CONNECTED
        } else {
            ModemInputs::default()
        };
        self.card.drive(&self.irqs, self.port, inputs);
    }
}
