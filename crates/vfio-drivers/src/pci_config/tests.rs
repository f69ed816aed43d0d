//! Every rule by table, on a card with all kinds of registers.

use super::*;

const EVENTLESS: ConfigWrite = ConfigWrite {
    command: None,
    msi_control: None,
    msi_masked: None,
    bars_moved: 0,
    rom_moved: false,
    power: None,
};

/// I/O at 0, small memory at 1, 64-bit prefetchable memory of 8 GiB at 2 and 3, nothing at 4, memory at 5; ROM; PM at 0x40, MSI at
/// 0x48, vendor at 0x60.
fn card() -> PciConfig {
    PciConfig::builder(0x4348, 0x3253)
        .subsystem(0x1af4, 0x1100)
        .class(0x0700, 0x02)
        .revision(0x10)
        .status(Status::DEVSEL_MEDIUM)
        .interrupt_pin(1)
        .bar(0, Bar::io(8))
        .bar(1, Bar::mem32(16))
        .bar(2, Bar::mem64(8 << 30).prefetchable())
        .bar(5, Bar::mem32(1 << 20).prefetchable())
        .rom(64 << 10)
        .power_management()
        .msi(Msi {
            address_64: true,
            maskable: true,
        })
        .vendor_capability_writable(&[1, 2, 3, 4, 5], &[0, 0xf0])
        .build()
        .expect("a possible card")
}

fn get<const N: usize>(config: &PciConfig, at: u64) -> [u8; N] {
    let mut bytes = [0; N];
    assert_eq!(config.read(at, &mut bytes), Ok(N));
    bytes
}

fn get16(config: &PciConfig, at: u64) -> u16 {
    u16::from_le_bytes(get(config, at))
}

fn get32(config: &PciConfig, at: u64) -> u32 {
    u32::from_le_bytes(get(config, at))
}

fn put32(config: &mut PciConfig, at: u64, value: u32) -> ConfigWrite {
    config.write(at, &value.to_le_bytes()).expect("inside")
}

#[test]
fn identity_reads_as_built_and_ignores_writes() {
    let mut config = card();
    let fresh = config.save();
    for (at, want) in [
        (0x00, 0x3253_4348),
        (0x08, 0x0700_0210),
        (0x2c, 0x1100_1af4),
        (0x34, 0x0000_0040),
        (0x28, 0),
        (0x38, 0),
    ] {
        assert_eq!(get32(&config, at), want, "{at:#x}");
        assert_eq!(put32(&mut config, at, !want), EVENTLESS, "{at:#x}");
        assert_eq!(get32(&config, at), want, "{at:#x}");
    }
    assert_eq!(get16(&config, 0x06), 0x0210);
    assert_eq!(get::<1>(&config, 0x3d), [1]);
    assert_eq!(config.write(0x3d, &[4, 0xff, 0xff]), Ok(EVENTLESS));
    assert_eq!(config.save(), fresh);
}

#[test]
fn each_writable_byte_of_the_header() {
    // Everything else in the header, identity included, is zero here or covered by its own test.
    let mut config = card();
    for at in 0..0x40u64 {
        let _ = config.write(at, &[0xff]).expect("inside");
    }
    let want: [(u64, u32); 16] = [
        (0x00, 0x3253_4348),
        (0x04, 0x0210_0507),
        (0x08, 0x0700_0210),
        (0x0c, 0x0000_ffff),
        (0x10, 0xffff_fff9),
        (0x14, 0xffff_fff0),
        (0x18, 0x0000_000c),
        (0x1c, 0xffff_fffe),
        (0x20, 0),
        (0x24, 0xfff0_0008),
        (0x28, 0),
        (0x2c, 0x1100_1af4),
        (0x30, 0xffff_0001),
        (0x34, 0x0000_0040),
        (0x38, 0),
        (0x3c, 0x0000_01ff),
    ];
    for (at, want) in want {
        assert_eq!(get32(&config, at), want, "{at:#x}");
    }
}

#[test]
fn bars_can_be_sized_with_any_access() {
    for width in [1usize, 2, 4] {
        let mut config = card();
        let size = |config: &mut PciConfig, at: u64| {
            for part in (0..4).step_by(width) {
                let _ = config
                    .write(at + part as u64, &[0xff; 4][..width])
                    .expect("inside");
            }
            let mut value = [0; 4];
            for (part, chunk) in value.chunks_mut(width).enumerate() {
                config
                    .read(at + (part * width) as u64, chunk)
                    .expect("inside");
            }
            u32::from_le_bytes(value)
        };
        let got = [0x10, 0x14, 0x18, 0x1c, 0x20, 0x24, 0x30].map(|at| size(&mut config, at));
        assert_eq!(
            got,
            [
                0xffff_fff9,
                0xffff_fff0,
                0x0000_000c,
                0xffff_fffe,
                0,
                0xfff0_0008,
                0xffff_0001
            ],
            "with {width} bytes at a time"
        );
    }
    let mut small = PciConfig::builder(1, 2)
        .bar(0, Bar::mem64(4096))
        .build()
        .expect("possible");
    let _ = small.write(0x10, &[0xff; 8]).expect("inside");
    assert_eq!(
        (get32(&small, 0x10), get32(&small, 0x14)),
        (0xffff_f004, 0xffff_ffff)
    );
}

#[test]
fn moved_bars_are_told_and_known() {
    let mut config = card();
    for (at, value, bit, index, address) in [
        (0x10, 0x0000_c003, 1 << 0, 0, 0xc000),
        (0x14, 0xfebf_ffff, 1 << 1, 1, 0xfebf_fff0),
        (0x18, 0xffff_ffff, 0, 2, 0),
        (0x1c, 0x0000_0043, 1 << 2, 2, 0x42_0000_0000),
        (0x24, 0xe012_3456, 1 << 5, 5, 0xe010_0000),
    ] {
        let events = put32(&mut config, at, value);
        assert_eq!(
            events,
            ConfigWrite {
                bars_moved: bit,
                ..EVENTLESS
            },
            "{at:#x}"
        );
        assert_eq!(config.bar_address(index), Some(address), "{at:#x}");
        assert!(
            put32(&mut config, at, value).is_empty(),
            "the same again is no event"
        );
    }
    assert_eq!(
        put32(&mut config, 0x30, 0xe020_0001),
        ConfigWrite {
            rom_moved: true,
            ..EVENTLESS
        }
    );
    assert_eq!(
        (
            config.bar_address(3),
            config.bar_address(4),
            config.bar_address(6)
        ),
        (None, None, None)
    );
    assert_eq!(config.bar(2), Some(Bar::mem64(8 << 30).prefetchable()));
    let both = config.write(0x10, &[0; 8]).expect("inside");
    assert_eq!(both.bars_moved, 0b11, "one write over two registers");
}

#[test]
fn command_by_bit() {
    for (written, sticks) in [
        (0x0001, 0x0001),
        (0x0002, 0x0002),
        (0x0004, 0x0004),
        (0x0100, 0x0100),
        (0x0400, 0x0400),
        (0xfaf8, 0x0000),
        (0xffff, 0x0507),
    ] {
        let mut config = card();
        let events = config.write(4, &u16::to_le_bytes(written)).expect("inside");
        let to = Command::from_bits_retain(sticks);
        assert_eq!(
            events.command,
            Change::between(Command::empty(), to),
            "{written:#x}"
        );
        assert_eq!(config.command(), to, "{written:#x}");
    }
    let mut config = PciConfig::builder(1, 2)
        .command(Command::IO | Command::PARITY)
        .build()
        .expect("possible");
    let events = config.write(5, &[0x04]).expect("inside");
    let (from, to) = (
        Command::IO | Command::PARITY,
        Command::IO | Command::PARITY | Command::INTX_DISABLE,
    );
    assert_eq!(
        events.command,
        Some(Change { from, to }),
        "the upper byte alone"
    );
}

#[test]
fn status_errors_are_cleared_by_ones() {
    let mut config = card();
    config.raise_status(Status::DETECTED_PARITY | Status::SIG_SYSTEM_ERROR | Status::CAP_LIST);
    config.set_interrupt_status(true);
    assert_eq!(get16(&config, 6), 0xc218);
    assert_eq!(config.write(6, &0x0000u16.to_le_bytes()), Ok(EVENTLESS));
    assert_eq!(get16(&config, 6), 0xc218);
    assert_eq!(config.write(7, &[0x80]), Ok(EVENTLESS));
    assert_eq!(get16(&config, 6), 0x4218);
    assert_eq!(config.write(6, &0xffffu16.to_le_bytes()), Ok(EVENTLESS));
    assert_eq!(
        get16(&config, 6),
        0x0218,
        "the interrupt bit and the fixed bits stay"
    );
    config.set_interrupt_status(false);
    assert_eq!(config.status(), Status::CAP_LIST | Status::DEVSEL_MEDIUM);
}

#[test]
fn bounds_by_table() {
    for (extended, size) in [(false, 256u64), (true, 4096)] {
        let builder = PciConfig::builder(1, 2);
        let mut config = if extended {
            builder.extended()
        } else {
            builder
        }
        .build()
        .expect("possible");
        assert_eq!(config.size(), size);
        for (at, len, inside) in [
            (0, size as usize, true),
            (0, size as usize + 1, false),
            (1, size as usize, false),
            (size - 1, 1, true),
            (size - 1, 2, false),
            (size - 2, 4, false),
            (size - 7, 7, true),
            (size, 1, false),
            (size, 0, true),
            (u64::MAX, 0, true),
            (u64::MAX, 1, false),
            (1 << 40, 4, false),
        ] {
            let (read, write) = if inside {
                (Ok(len), Ok(EVENTLESS))
            } else {
                (Err(Errno::FAULT), Err(Errno::FAULT))
            };
            assert_eq!(
                config.read(at, &mut vec![0; len]),
                read,
                "read {len} at {at:#x} of {size}"
            );
            assert_eq!(
                config.write(at, &vec![0; len]),
                write,
                "write {len} at {at:#x} of {size}"
            );
        }
    }
}

#[test]
fn a_refused_write_changes_nothing() {
    let mut config = card();
    let before = config.save();
    assert_eq!(config.write(4, &[0xff; 253]), Err(Errno::FAULT));
    assert_eq!(config.save(), before);
}

#[test]
fn any_alignment_reads_the_same_bytes() {
    let config = card();
    let whole: [u8; 256] = get(&config, 0);
    for at in 0..250usize {
        for len in 1..=6usize {
            let mut part = vec![0; len];
            assert_eq!(config.read(at as u64, &mut part), Ok(len));
            assert_eq!(part, &whole[at..at + len]);
        }
    }
}

#[test]
fn the_capability_list_can_be_walked() {
    let config = card();
    let mut found = Vec::new();
    let mut at = get::<1>(&config, 0x34)[0];
    while at != 0 {
        let [id, next] = get(&config, u64::from(at));
        found.push((id, at));
        at = next;
    }
    assert_eq!(found, [(0x01, 0x40), (0x05, 0x48), (0x09, 0x60)]);
    assert!(config.status().contains(Status::CAP_LIST));
    let bare = PciConfig::builder(1, 2).build().expect("possible");
    assert_eq!(get::<1>(&bare, 0x34), [0]);
    assert!(!bare.status().contains(Status::CAP_LIST));
}

#[test]
fn msi_by_layout() {
    for (address_64, maskable, control, data, mask) in [
        (false, false, 0x0000, 0x48, None),
        (true, false, 0x0080, 0x4c, None),
        (false, true, 0x0100, 0x48, Some(0x4c)),
        (true, true, 0x0180, 0x4c, Some(0x50)),
    ] {
        let mut config = PciConfig::builder(1, 2)
            .msi(Msi {
                address_64,
                maskable,
            })
            .build()
            .expect("possible");
        assert_eq!(config.msi_control().bits(), control);
        let events = config
            .write(0x42, &0xffffu16.to_le_bytes())
            .expect("inside");
        let (from, to) = (
            MsiControl::from_bits_retain(control),
            MsiControl::from_bits_retain(control | 1),
        );
        assert_eq!(
            events,
            ConfigWrite {
                msi_control: Some(Change { from, to }),
                ..EVENTLESS
            }
        );
        assert_eq!(config.msi_control(), to);
        assert_eq!(put32(&mut config, 0x44, u32::MAX), EVENTLESS);
        assert_eq!(get32(&config, 0x44), 0xffff_fffc);
        if address_64 {
            let _ = put32(&mut config, 0x48, u32::MAX);
            assert_eq!(get32(&config, 0x48), u32::MAX);
        }
        let _ = put32(&mut config, data, u32::MAX);
        assert_eq!(get32(&config, data), 0xffff);
        config.set_msi_pending(true);
        let Some(mask) = mask else {
            assert!(!config.msi_masked());
            assert_eq!(config.save().bytes[0x50..], [0; 0xb0]);
            continue;
        };
        assert_eq!(
            put32(&mut config, mask, u32::MAX).msi_masked,
            Some(Change {
                from: false,
                to: true
            })
        );
        assert!(config.msi_masked());
        assert_eq!((get32(&config, mask), get32(&config, mask + 4)), (1, 1));
        assert_eq!(
            put32(&mut config, mask + 4, 0),
            EVENTLESS,
            "the pending bit is the device's"
        );
        assert_eq!(get32(&config, mask + 4), 1);
        config.set_msi_pending(false);
        assert_eq!(get32(&config, mask + 4), 0);
    }
}

#[test]
fn power_states() {
    let mut config = card();
    assert_eq!(get32(&config, 0x40), 0x0003_4801);
    for (written, state, event) in [
        (1u8, 0, None),
        (2, 0, None),
        (3, 3, Some(Change { from: 0, to: 3 })),
        (1, 3, None),
        (0xff, 3, None),
        (0, 0, Some(Change { from: 3, to: 0 })),
    ] {
        let events = config.write(0x44, &[written]).expect("inside");
        assert_eq!(
            events,
            ConfigWrite {
                power: event,
                ..EVENTLESS
            },
            "{written}"
        );
        assert_eq!(config.power_state(), state, "{written}");
        assert_eq!(get::<1>(&config, 0x44), [state | 0x08], "{written}");
    }
}

#[test]
fn vendor_capability_bytes() {
    let mut config = card();
    assert_eq!(get::<8>(&config, 0x60), [0x09, 0, 8, 1, 2, 3, 4, 5]);
    assert_eq!(config.write(0x60, &[0xff; 8]), Ok(EVENTLESS));
    assert_eq!(get::<8>(&config, 0x60), [0x09, 0, 8, 1, 0xf2, 3, 4, 5]);
}

#[test]
fn reset_equals_fresh_and_tells_what_it_undid() {
    let mut config = card();
    let fresh = config.save();
    for at in 0..0x100 {
        let _ = config.write(at, &[0xff]).expect("inside");
    }
    config.raise_status(Status::all());
    config.set_interrupt_status(true);
    config.set_msi_pending(true);
    assert_ne!(config.save(), fresh);
    let events = config.reset();
    assert_eq!(config.save(), fresh);
    assert_eq!(events.bars_moved, 0b10_0111);
    assert!(
        events.command.is_some()
            && events.msi_control.is_some()
            && events.msi_masked.is_some()
            && events.rom_moved
    );
    assert_eq!(events.power, Some(Change { from: 3, to: 0 }));
    assert!(config.reset().is_empty());
}

#[test]
fn save_change_restore_save() {
    let mut config = card();
    let _ = put32(&mut config, 0x10, 0xc000);
    let _ = config.write(4, &[0x05]).expect("inside");
    config.raise_status(Status::PARITY);
    config.set_interrupt_status(true);
    config.set_msi_pending(true);
    let saved = config.save();
    let _ = config.reset();
    let events = config.restore(&saved).expect("its own state");
    assert_eq!(events.bars_moved, 1);
    assert_eq!(
        events.command,
        Some(Change {
            from: Command::empty(),
            to: Command::IO | Command::MASTER
        })
    );
    assert_eq!(config.save(), saved);
}

#[test]
fn foreign_states_are_refused() {
    let mut config = card();
    let saved = config.save();
    let mut refused = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut state = saved.clone();
        change(&mut state.bytes);
        assert_eq!(config.restore(&state), Err(Errno::INVAL));
        assert_eq!(config.save(), saved);
    };
    refused(&|bytes| bytes.truncate(255));
    refused(&|bytes| bytes.push(0));
    refused(&|bytes| bytes.clear());
    refused(&|bytes| bytes[0] ^= 1);
    refused(&|bytes| bytes[0x10] ^= 1);
    refused(&|bytes| bytes[0x20] = 1);
    refused(&|bytes| bytes[0x34] = 0);
    refused(&|bytes| bytes[0x44] |= 1);
    refused(&|bytes| bytes[0xff] = 1);
}

#[test]
fn clones_do_not_share_what_is_written() {
    let mut one = card();
    let two = one.clone();
    let _ = one.write(4, &[1]).expect("inside");
    assert_eq!(two.command(), Command::empty());
}

#[test]
fn impossible_cards() {
    let base = || PciConfig::builder(1, 2);
    let error = |builder: Builder| builder.build().err();
    for (builder, want) in [
        (base().bar(6, Bar::io(8)), BuildError::BarIndex(6)),
        (
            base().bar(usize::MAX, Bar::io(8)),
            BuildError::BarIndex(usize::MAX),
        ),
        (
            base().bar(0, Bar::io(8)).bar(0, Bar::io(8)),
            BuildError::BarIndex(0),
        ),
        (base().bar(5, Bar::mem64(4096)), BuildError::BarIndex(5)),
        (
            base().bar(0, Bar::mem64(4096)).bar(1, Bar::io(8)),
            BuildError::BarIndex(1),
        ),
        (
            base().bar(1, Bar::io(8)).bar(0, Bar::mem64(4096)),
            BuildError::BarIndex(0),
        ),
        (base().bar(0, Bar::io(2)), BuildError::BarSize(0)),
        (base().bar(0, Bar::mem32(8)), BuildError::BarSize(0)),
        (base().bar(0, Bar::mem32(0)), BuildError::BarSize(0)),
        (base().bar(0, Bar::mem32(4097)), BuildError::BarSize(0)),
        (base().bar(0, Bar::mem32(1 << 32)), BuildError::BarSize(0)),
        (base().rom(1024), BuildError::RomSize(1024)),
        (base().rom(3000), BuildError::RomSize(3000)),
        (base().interrupt_pin(5), BuildError::InterruptPin(5)),
        (
            base().msi(Msi::default()).msi(Msi::default()),
            BuildError::DuplicateCapability(5),
        ),
        (
            base().power_management().power_management(),
            BuildError::DuplicateCapability(1),
        ),
        (
            base().vendor_capability(&[0; 190]),
            BuildError::CapabilitySpace,
        ),
        (
            base().vendor_capability(&[0; 300]),
            BuildError::CapabilitySpace,
        ),
        (
            base().vendor_capability(&[0; 180]).msi(Msi::default()),
            BuildError::CapabilitySpace,
        ),
    ] {
        assert_eq!(error(builder), Some(want));
    }
    assert!(
        base().vendor_capability(&[0; 189]).build().is_ok(),
        "exactly up to 0xff"
    );
    assert!(
        base()
            .bar(0, Bar::mem64(1 << 63))
            .bar(2, Bar::mem32(1 << 31))
            .rom(1 << 31)
            .build()
            .is_ok()
    );
}
