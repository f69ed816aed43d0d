use proptest::prelude::*;

use super::*;

use reg::IER_DLM as IER;
use reg::IIR_FCR as FCR;
use reg::IIR_FCR as IIR;
use reg::LCR;
use reg::LSR;
use reg::MCR;
use reg::MSR;
use reg::RBR_THR_DLL as RBR;
use reg::RBR_THR_DLL as THR;
use reg::SCR;

const IDLE_LSR: u8 = lsr::THRE | lsr::TEMT;

/// One step of a table.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// Write register, value.
    W(u8, u8),
    /// Read register, expect value.
    R(u8, u8),
    /// A byte from a far end that can wait; expect whether it is taken.
    In(u8, bool),
    /// A byte from a wire.
    Wire(u8),
    /// A break from the line.
    Break,
    /// Expect this from the transmitter.
    Out(Option<u8>),
    /// Character times pass.
    Idle(u8),
    /// Modem inputs, as the upper half of MSR.
    Lines(u8),
    /// Expect this interrupt line.
    Irq(bool),
}
use Step::*;

fn run(name: &str, table: &[Step]) -> State {
    let mut uart = State::new();
    for (row, step) in table.iter().enumerate() {
        let at = format!("{name}, row {row}: {step:x?}");
        match *step {
            W(register, value) => uart.write(register, value),
            R(register, value) => {
                let got = uart.read(register);
                assert_eq!(got, value, "{at}: read {got:#04x}");
            }
            In(byte, taken) => assert_eq!(uart.receive(byte), taken, "{at}"),
            Wire(byte) => uart.shift_in(byte),
            Break => uart.receive_break(),
            Out(byte) => assert_eq!(uart.transmit(), byte, "{at}"),
            Idle(characters) => uart.elapse(characters),
            Lines(bits) => uart.set_inputs(ModemInputs::from_bits(bits)),
            Irq(level) => assert_eq!(uart.irq(), level, "{at}"),
        }
    }
    uart
}

#[test]
fn registers_after_reset() {
    let table = [
        R(IER, 0),
        R(IIR, iir::NO_INT),
        R(LCR, 0),
        R(MCR, 0),
        R(LSR, IDLE_LSR),
        R(MSR, 0),
        R(SCR, 0),
        R(RBR, 0),
        Out(None),
        Irq(false),
    ];
    run("fresh", &table);

    let mut used = run(
        "used",
        &[
            W(IER, 0xff),
            W(FCR, 0xc1),
            W(LCR, 0x1b),
            W(MCR, 0x0f),
            W(SCR, 1),
            Lines(msr::DCD),
            Wire(1),
            W(THR, 2),
        ],
    );
    used.reset();
    let mut fresh = State::new();
    fresh.inputs = msr::DCD;
    assert_eq!(
        used, fresh,
        "reset keeps what the outside drives and nothing else"
    );
}

#[test]
fn registers_keep_only_the_bits_they_have() {
    run(
        "masks",
        &[
            W(IER, 0xff),
            R(IER, 0x0f),
            W(IER, 0),
            R(IER, 0),
            W(MCR, 0xef),
            R(MCR, 0x0f),
            W(LCR, 0x7f),
            R(LCR, 0x7f),
            W(SCR, 0xa5),
            R(SCR, 0xa5),
            W(SCR, 0x5a),
            R(SCR, 0x5a),
            W(LSR, 0xff),
            R(LSR, IDLE_LSR),
            W(MSR, 0xff),
            R(MSR, 0),
        ],
    );
}

#[test]
fn divisor_latch_hides_data_and_ier() {
    run(
        "dlab",
        &[
            W(LCR, 3),
            W(IER, ier::RDI),
            In(b'x', true),
            W(LCR, lcr::DLAB | 3),
            R(RBR, 12),
            R(IER, 0),
            W(THR, 0x34),
            W(IER, 0x12),
            R(RBR, 0x34),
            R(IER, 0x12),
            Out(None),
            W(LCR, 3),
            R(IER, ier::RDI),
            R(RBR, b'x'),
        ],
    );
}

#[test]
fn word_length_cuts_both_directions() {
    for (wls, mask) in [(0, 0x1f), (1, 0x3f), (2, 0x7f), (3, 0xff)] {
        run(
            "word length",
            &[
                W(LCR, wls),
                W(THR, 0xff),
                Out(Some(mask)),
                In(0xff, true),
                R(RBR, mask),
            ],
        );
    }
}

#[test]
fn fifo_bits_and_toggle() {
    run(
        "fcr",
        &[
            W(LCR, 3),
            // Settings without the enable bit do not count.
            W(FCR, fcr::TRIGGER),
            R(IIR, 0x01),
            W(FCR, fcr::ENABLE),
            R(IIR, 0xc1),
            In(1, true),
            In(2, true),
            W(THR, 9),
            // Written again: nothing is emptied. The clear bits: each its own side.
            W(FCR, fcr::ENABLE),
            R(LSR, lsr::DR),
            W(FCR, fcr::ENABLE | fcr::CLEAR_RCVR),
            R(LSR, 0),
            In(3, true),
            W(FCR, fcr::ENABLE | fcr::CLEAR_XMIT),
            R(LSR, lsr::DR | IDLE_LSR),
            Out(None),
            // Changing the enable bit empties both.
            W(THR, 9),
            W(FCR, 0),
            R(IIR, 0x01),
            R(LSR, IDLE_LSR),
            Out(None),
        ],
    );
}

#[test]
fn trigger_levels() {
    for (setting, level) in [(0x00, 1), (0x40, 4), (0x80, 8), (0xc0, 14)] {
        let mut uart = run(
            "trigger",
            &[
                W(FCR, fcr::ENABLE | setting),
                W(IER, ier::RDI),
                W(MCR, mcr::OUT2),
            ],
        );
        for n in 1..=16 {
            assert!(uart.receive(n));
            assert_eq!(uart.irq(), n >= level, "{n} of {level}");
        }
        for left in (0..16).rev() {
            assert_eq!(uart.read(RBR), 16 - left);
            let id = if left >= level { iir::RDI } else { iir::NO_INT };
            assert_eq!(uart.read(IIR), 0xc0 | id, "{left} left of {level}");
        }
    }
}

#[test]
fn receive_timeout() {
    run(
        "timeout",
        &[
            W(MCR, mcr::OUT2),
            W(IER, ier::RDI),
            W(FCR, fcr::ENABLE | 0x80),
            Idle(200),
            Irq(false),
            In(1, true),
            Idle(3),
            Irq(false),
            // An arrival and a read both start the time again.
            In(2, true),
            Idle(3),
            Irq(false),
            Idle(1),
            Irq(true),
            R(IIR, 0xc0 | iir::TIMEOUT),
            // Reading IIR does not acknowledge it, reading data does.
            R(IIR, 0xc0 | iir::TIMEOUT),
            R(RBR, 1),
            R(IIR, 0xc1),
            Idle(4),
            R(IIR, 0xc0 | iir::TIMEOUT),
            R(RBR, 2),
            Idle(4),
            R(IIR, 0xc1),
            // At the trigger level it is plain data again.
            In(1, true),
            Idle(4),
            R(IIR, 0xc0 | iir::TIMEOUT),
            W(FCR, fcr::ENABLE),
            R(IIR, 0xc0 | iir::RDI),
            // Disabled, it does not show.
            W(IER, 0),
            R(IIR, 0xc1),
        ],
    );
    run(
        "no timeout without FIFOs",
        &[W(IER, ier::RDI), In(1, true), Idle(9), R(IIR, iir::RDI)],
    );
}

#[test]
fn thre_interrupt() {
    run(
        "thre",
        &[
            W(LCR, 3),
            W(MCR, mcr::OUT2),
            W(FCR, fcr::ENABLE),
            // Enabling it with an empty transmitter raises it.
            W(IER, ier::THRI),
            Irq(true),
            // Reading IIR reports and acknowledges it.
            R(IIR, 0xc0 | iir::THRI),
            R(IIR, 0xc1),
            Irq(false),
            // Writing the same value is no new enable; off and on is.
            W(IER, ier::THRI),
            R(IIR, 0xc1),
            W(IER, 0),
            W(IER, ier::THRI),
            Irq(true),
            // Writing data acknowledges it; it returns when the last byte has left.
            W(THR, b'a'),
            Irq(false),
            R(LSR, 0),
            W(THR, b'b'),
            Out(Some(b'a')),
            Irq(false),
            R(LSR, 0),
            Out(Some(b'b')),
            Irq(true),
            R(LSR, IDLE_LSR),
            // Reading LSR does not acknowledge it.
            R(IIR, 0xc0 | iir::THRI),
            // Enabled while something is being sent: not yet.
            W(IER, 0),
            W(THR, b'c'),
            W(IER, ier::THRI),
            Irq(false),
            Out(Some(b'c')),
            Irq(true),
            // Emptying the FIFO by command is an end of sending too.
            W(THR, b'd'),
            Irq(false),
            W(FCR, fcr::ENABLE | fcr::CLEAR_XMIT),
            Irq(true),
        ],
    );
}

#[test]
fn transmit_fifo_holds_sixteen() {
    let mut uart = State::new();
    uart.write(FCR, fcr::ENABLE);
    for byte in 0..20 {
        uart.write(THR, byte);
    }
    let sent: Vec<u8> = std::iter::from_fn(|| uart.transmit()).collect();
    assert_eq!(sent, (0..16).collect::<Vec<u8>>());
    run(
        "one register without FIFOs",
        &[W(THR, 1), W(THR, 2), Out(Some(2)), Out(None)],
    );
}

#[test]
fn overrun() {
    let mut uart = run(
        "fifo",
        &[W(FCR, fcr::ENABLE), W(IER, ier::RLSI), W(MCR, mcr::OUT2)],
    );
    for byte in 0..16 {
        assert!(uart.receive(byte));
    }
    assert!(!uart.receive(16), "a far end that can wait is told so");
    assert!(!uart.irq());
    uart.shift_in(17);
    assert!(uart.irq());
    assert_eq!(uart.read(IIR), 0xc0 | iir::RLSI);
    // An overrun is not an error *in* the FIFO.
    assert_eq!(uart.read(LSR), IDLE_LSR | lsr::DR | lsr::OE);
    assert_eq!(uart.read(LSR), IDLE_LSR | lsr::DR);
    assert!(!uart.irq());
    for byte in 0..16 {
        assert_eq!(uart.read(RBR), byte, "the FIFO keeps what it had");
    }
    assert_eq!(uart.read(LSR), IDLE_LSR);

    run(
        "without FIFOs the new byte wins",
        &[
            W(LCR, 3),
            In(1, true),
            In(2, false),
            Wire(2),
            R(LSR, IDLE_LSR | lsr::DR | lsr::OE),
            R(RBR, 2),
            R(LSR, IDLE_LSR),
        ],
    );
}

#[test]
fn break_is_seen_at_the_front() {
    run(
        "break",
        &[
            W(LCR, 3),
            W(MCR, mcr::OUT2),
            W(IER, ier::RLSI),
            W(FCR, fcr::ENABLE),
            In(b'a', true),
            Break,
            In(b'b', true),
            // Behind another character only the summary bit tells.
            Irq(false),
            R(LSR, IDLE_LSR | lsr::DR | lsr::FIFO_ERROR),
            R(RBR, b'a'),
            Irq(true),
            R(IIR, 0xc0 | iir::RLSI),
            R(LSR, IDLE_LSR | lsr::DR | lsr::FIFO_ERROR | lsr::BI),
            R(LSR, IDLE_LSR | lsr::DR),
            Irq(false),
            R(RBR, 0),
            R(RBR, b'b'),
            R(LSR, IDLE_LSR),
            // Without FIFOs there is no summary bit.
            W(FCR, 0),
            Break,
            R(LSR, IDLE_LSR | lsr::DR | lsr::BI),
            R(RBR, 0),
            // Emptying the FIFO takes its errors along.
            W(FCR, fcr::ENABLE),
            Break,
            W(FCR, fcr::ENABLE | fcr::CLEAR_RCVR),
            R(LSR, IDLE_LSR),
        ],
    );
}

#[test]
fn interrupt_priorities() {
    let mut uart = run(
        "all four",
        &[
            W(LCR, 3),
            W(MCR, mcr::OUT2),
            W(FCR, fcr::ENABLE),
            W(IER, 0x0f),
            Lines(msr::DCD),
            Break,
        ],
    );
    for (id, clear) in [
        (iir::RLSI, LSR),
        (iir::RDI, RBR),
        (iir::THRI, SCR), // Cleared by the read of IIR itself.
        (iir::MSI, MSR),
    ] {
        assert!(uart.irq());
        assert_eq!(uart.read(IIR), 0xc0 | id);
        uart.read(clear);
    }
    assert_eq!(uart.read(IIR), 0xc1);
    assert!(!uart.irq());

    // Each source shows only if enabled, and the line only with OUT2.
    for (bit, id) in [
        (ier::RLSI, iir::RLSI),
        (ier::RDI, iir::RDI),
        (ier::THRI, iir::THRI),
        (ier::MSI, iir::MSI),
    ] {
        let mut uart = run(
            "one source",
            &[W(LCR, 3), W(FCR, fcr::ENABLE), Lines(msr::DCD), Break],
        );
        uart.write(IER, bit);
        assert!(!uart.irq(), "OUT2 is off");
        uart.write(MCR, mcr::OUT2);
        assert!(uart.irq());
        assert_eq!(uart.read(IIR), 0xc0 | id);
    }
}

#[test]
fn modem_status() {
    run(
        "deltas",
        &[
            Lines(msr::CTS),
            R(MSR, msr::CTS | msr::DCTS),
            R(MSR, msr::CTS),
            Lines(msr::CTS | msr::DSR | msr::DCD),
            R(MSR, msr::CTS | msr::DSR | msr::DCD | msr::DDSR | msr::DDCD),
            // RI reports its trailing edge only.
            Lines(msr::RI),
            R(MSR, msr::RI | msr::DCTS | msr::DDSR | msr::DDCD),
            Lines(0),
            R(MSR, msr::TERI),
            R(MSR, 0),
            // There and back is a change too; the same again is none.
            Lines(msr::CTS),
            Lines(0),
            R(MSR, msr::DCTS),
            Lines(0),
            R(MSR, 0),
        ],
    );
}

#[test]
fn loopback_wires_outputs_to_inputs() {
    for (output, input) in [
        (mcr::RTS, msr::CTS),
        (mcr::DTR, msr::DSR),
        (mcr::OUT1, msr::RI),
        (mcr::OUT2, msr::DCD),
    ] {
        let mut uart = run("loop", &[W(MCR, mcr::LOOP), R(MSR, 0)]);
        uart.write(MCR, mcr::LOOP | output);
        assert_eq!(uart.read(MSR) & msr::LINES, input);
    }
    run(
        "the outside is cut off",
        &[
            W(LCR, 3),
            Lines(msr::LINES),
            R(MSR, msr::LINES | msr::DCTS | msr::DDSR | msr::DDCD),
            W(MCR, mcr::LOOP | mcr::DTR | mcr::RTS),
            R(MSR, msr::CTS | msr::DSR | msr::TERI | msr::DDCD),
            In(1, false),
            Wire(2),
            Break,
            R(LSR, IDLE_LSR),
            // What is sent has arrived, and does not leave.
            W(THR, 0x55),
            Out(None),
            R(LSR, IDLE_LSR | lsr::DR),
            R(RBR, 0x55),
            // A line that changed meanwhile is seen afterwards.
            Lines(msr::DCD),
            R(MSR, msr::CTS | msr::DSR),
            W(MCR, 0),
            R(MSR, msr::DCD | msr::DCTS | msr::DDSR | msr::DDCD),
        ],
    );
    let looped = run("pins", &[W(MCR, mcr::LOOP | 3), W(LCR, lcr::BREAK)]);
    assert!(!looped.dtr() && !looped.rts() && !looped.sends_break());
    let open = run("pins", &[W(MCR, 3), W(LCR, lcr::BREAK)]);
    assert!(open.dtr() && open.rts() && open.sends_break());
    run(
        "what waited to be sent goes round too, with its interrupts",
        &[
            W(LCR, 3),
            W(IER, ier::THRI),
            W(THR, 7),
            W(MCR, mcr::LOOP | mcr::OUT2),
            Irq(true),
            R(IIR, iir::THRI),
            R(RBR, 7),
        ],
    );
}

/// `autoconfig` and `autoconfig_16550a` of `drivers/tty/serial/8250/8250_port.c`, access by
/// access: what they see must end in PORT_16550A.
#[test]
fn linux_autoconfig_finds_a_16550a() {
    let mut uart = State::new();
    uart.set_inputs(ModemInputs::CONNECTED);
    // Is there anything: IER takes exactly its four bits.
    uart.write(IER, 0);
    assert_eq!(uart.read(IER), 0);
    uart.write(IER, 0x0f);
    assert_eq!(uart.read(IER), 0x0f);
    uart.write(IER, 0);
    // Loopback: RTS and OUT2 come back as CTS and DCD.
    uart.write(MCR, mcr::LOOP | 0x0a);
    assert_eq!(uart.read(MSR) & 0xf0, 0x90);
    uart.write(MCR, 0);
    // No EFR at IIR's place in either configuration mode, FIFO bits both set.
    uart.write(LCR, 0xbf);
    uart.write(FCR, 0);
    uart.write(LCR, 0);
    uart.write(FCR, fcr::ENABLE);
    assert_eq!(uart.read(IIR) >> 6, 3);
    for mode in [0x80, 0xbf] {
        uart.write(LCR, mode);
        assert_ne!(uart.read(IIR), 0, "an EFR would read 0");
    }
    // Not a National SuperIO: bit 4 at IIR's place does not follow MCR's.
    for looped in [0, mcr::LOOP] {
        uart.write(LCR, 0);
        uart.write(MCR, looped);
        uart.write(LCR, 0xe0);
        assert_eq!(uart.read(IIR) & mcr::LOOP, 0);
    }
    uart.write(LCR, 0);
    uart.write(MCR, 0);
    // Not a 16750: bit 5 stays clear with and without DLAB.
    for dlab in [0, lcr::DLAB] {
        uart.write(LCR, dlab);
        uart.write(FCR, fcr::ENABLE | 0x20);
        assert_eq!(uart.read(IIR) >> 5, 6);
        uart.write(FCR, fcr::ENABLE);
    }
    uart.write(LCR, 0);
    // Not an Xscale: IER bit 6 does not stick.
    uart.write(IER, 0x40);
    assert_eq!(uart.read(IER) & 0x40, 0);
    // size_fifo: 256 bytes sent in loopback, 16 come back.
    uart.write(FCR, fcr::ENABLE | fcr::CLEAR_RCVR | fcr::CLEAR_XMIT);
    uart.write(MCR, mcr::LOOP);
    uart.write(LCR, 3);
    for byte in 0..=255 {
        uart.write(THR, byte);
    }
    let mut count = 0;
    while uart.read(LSR) & lsr::DR != 0 {
        uart.read(RBR);
        count += 1;
    }
    assert_eq!(count, 16);
}

/// The tests of `serial8250_do_startup`, for UART_BUG_THRE and UART_BUG_TXEN.
#[test]
fn linux_startup_finds_no_bugs() {
    let mut uart = State::new();
    uart.write(IER, ier::THRI);
    let first = uart.read(IIR);
    uart.write(IER, 0);
    uart.write(IER, ier::THRI);
    let second = uart.read(IIR);
    uart.write(IER, 0);
    assert_eq!(first & iir::NO_INT, 0);
    assert_eq!(second & iir::NO_INT, 0, "UART_BUG_THRE");

    uart.write(LCR, 3);
    uart.write(MCR, mcr::OUT2);
    uart.write(IER, ier::THRI);
    assert!(uart.irq());
    let line = uart.read(LSR);
    let id = uart.read(IIR);
    uart.write(IER, 0);
    assert!(
        line & lsr::TEMT != 0 && id & iir::NO_INT == 0,
        "UART_BUG_TXEN"
    );
    assert!(!uart.irq());
}

#[test]
fn saved_states_are_checked() {
    let good = run(
        "state",
        &[
            W(LCR, 3),
            W(FCR, fcr::ENABLE | fcr::TRIGGER),
            W(IER, 0x0f),
            In(1, true),
            Break,
            W(THR, 2),
            Lines(msr::CTS),
            Idle(2),
        ],
    );
    let saved = good.save();
    assert_eq!(State::restore(&saved), Ok(good));
    for (at, value, why) in [
        (0, 0x10, "IER"),
        (1, 0x02, "FCR"),
        (1, 0xc0, "FCR"),
        (3, 0x20, "MCR"),
        (3, mcr::LOOP, "loopback"),
        (7, 0x01, "LSR"),
        (9, 2, "flag"),
        (9, 1, "empty"),
        (10, 5, "idle"),
        (11, 17, "FIFO"),
        (12, 17, "FIFO"),
        (30, lsr::BI, "character"),
        (31, lsr::OE, "character"),
    ] {
        let mut bad = saved;
        bad[at] = value;
        let error = State::restore(&bad).expect_err(why).to_string();
        assert!(error.contains(why), "byte {at}: {error}");
    }
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (any::<u8>(), any::<u8>()).prop_map(|(r, v)| W(r, v)),
        4 => any::<u8>().prop_map(|r| R(r, 0)),
        2 => any::<u8>().prop_map(|b| In(b, true)),
        2 => any::<u8>().prop_map(Wire),
        1 => Just(Break),
        2 => Just(Out(None)),
        1 => any::<u8>().prop_map(Idle),
        1 => any::<u8>().prop_map(Lines),
    ]
}

proptest! {
    /// Whatever is done to it, the machine stays one that the data sheet describes.
    #[test]
    fn invariants(steps in proptest::collection::vec(any_step(), 0..400)) {
        let mut uart = State::new();
        for step in steps {
            match step {
                W(register, value) => uart.write(register, value),
                R(register, _) => {
                    uart.read(register);
                }
                In(byte, _) => {
                    let could = uart.can_receive();
                    prop_assert_eq!(uart.receive(byte), could);
                }
                Wire(byte) => uart.shift_in(byte),
                Break => uart.receive_break(),
                Out(_) => {
                    let had = uart.has_output();
                    prop_assert_eq!(uart.transmit().is_some(), had);
                }
                Idle(characters) => uart.elapse(characters),
                Lines(bits) => uart.set_inputs(ModemInputs::from_bits(bits)),
                Irq(_) => {}
            }
            prop_assert!(uart.rx.len <= uart.capacity() && uart.tx.len <= uart.capacity());
            prop_assert!(!uart.thre_pending || uart.tx.is_empty());
            prop_assert!(uart.rx_idle == 0 || uart.fifos() && !uart.rx.is_empty());
            prop_assert!(!uart.looped() || uart.tx.is_empty());
            // A saved state is always one that can be restored, and to the same.
            prop_assert_eq!(State::restore(&uart.save()), Ok(uart.clone()));
            // What the guest reads agrees with the interrupt line.
            let mut probe = uart.clone();
            let id = probe.read(IIR);
            prop_assert_eq!(id & 0x30, 0);
            prop_assert_eq!(uart.irq(), id & iir::NO_INT == 0 && uart.mcr & mcr::OUT2 != 0);
            let status = probe.read(LSR);
            prop_assert_eq!(status & lsr::DR != 0, !uart.rx.is_empty());
            prop_assert_eq!(status & lsr::THRE != 0, uart.tx.is_empty());
            prop_assert_eq!(probe.read(LSR) & lsr::ERRORS, 0, "a read clears the errors");
        }
    }

    /// Bytes that were taken come out once, in order, whatever the batching.
    #[test]
    fn nothing_lost(input in proptest::collection::vec(any::<u8>(), 0..200), reads in 1..20usize) {
        let mut uart = State::new();
        uart.write(LCR, 3);
        uart.write(FCR, fcr::ENABLE);
        let mut waiting = input.iter().copied().peekable();
        let mut output = Vec::new();
        while output.len() < input.len() {
            while waiting.next_if(|byte| uart.receive(*byte)).is_some() {}
            for _ in 0..reads {
                if uart.read(LSR) & lsr::DR != 0 {
                    output.push(uart.read(RBR));
                }
            }
        }
        prop_assert_eq!(output, input);
    }

    /// No bytes from outside make `restore` panic or accept what `save` would not write.
    #[test]
    fn restore_takes_only_real_states(saved in any::<[u8; SAVED_LEN]>()) {
        if let Ok(state) = State::restore(&saved) {
            prop_assert_eq!(State::restore(&state.save()), Ok(state));
        }
    }
}
