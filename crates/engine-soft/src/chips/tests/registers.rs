//! LAPIC registers, their faults and errors.

use super::*;

#[test]
fn errors_are_reported() {
    let board = Board::new(1);
    let chips = &board.chips;
    let esr = || {
        board.lapic(0, register::ESR, 0);
        board.lapic_read(0, register::ESR)
    };
    board.lapic(0, register::LVT_ERROR, 0xfe);
    // Sent with an illegal vector.
    board.ipi(0, 0, 0x400f);
    assert_eq!(chips.acknowledge(0), Some(0xfe));
    assert_eq!(board.lapic_read(0, register::ESR), 0);
    assert_eq!(esr(), 0x20);
    assert_eq!(esr(), 0);
    board.eoi(0);
    // Received one.
    assert!(!chips.send_msi(MsiMessage { address: 0xfee0_0000, data: 3 }));
    assert_eq!(chips.acknowledge(0), Some(0xfe));
    assert_eq!(esr(), 0x40);
    board.eoi(0);
    // A register that does not exist.
    assert_eq!(board.lapic_read(0, 0x2f), 0);
    board.lapic(0, 0x3f, 0x41);
    assert_eq!(chips.acknowledge(0), Some(0xfe));
    assert_eq!(esr(), 0x80);
    board.eoi(0);
    // An illegal vector in the timer's entry, then in the error entry itself.
    board.lapic(0, register::LVT_TIMER, 0x05);
    board.lapic(0, register::INITIAL_COUNT, 10);
    board.advance(1_000);
    assert_eq!(chips.acknowledge(0), Some(0xfe));
    assert_eq!(esr(), 0x40);
    board.eoi(0);
    board.lapic(0, register::LVT_ERROR, 0x05);
    board.ipi(0, 0, 0x400f);
    assert!(!chips.has_interrupt(0));
    assert_eq!(esr(), 0x60);
}

#[test]
fn xapic_registers() {
    let board = Board::new(2);
    assert_eq!(board.lapic_read(1, register::ID), 0x0100_0000);
    board.lapic(1, register::ID, 0x0700_0000);
    assert_eq!(board.lapic_read(1, register::ID), 0x0100_0000);
    board.lapic(1, register::LDR, 0xffff_ffff);
    assert_eq!(board.lapic_read(1, register::LDR), 0xff00_0000);
    board.lapic(1, register::DFR, 0);
    assert_eq!(board.lapic_read(1, register::DFR), 0x0fff_ffff);
    for (number, fields) in [
        (register::LVT_TIMER, 0x7_00ffu32),
        (register::LVT_THERMAL, 0x1_07ff),
        (register::LVT_PERFORMANCE, 0x1_07ff),
        (register::LVT_LINT0, 0x1_a7ff),
        (register::LVT_LINT1, 0x1_a7ff),
        (register::LVT_ERROR, 0x1_00ff),
    ] {
        board.lapic(1, number, u32::MAX);
        assert_eq!(board.lapic_read(1, number), fields, "register {number:#x}");
    }
    // Read-only ones.
    for number in [register::VERSION, register::PPR, register::ISR, register::TMR, register::IRR + 7] {
        let before = board.lapic_read(1, number);
        board.lapic(1, number, u32::MAX);
        assert_eq!(board.lapic_read(1, number), before);
    }
    // Parts of a register can be read; only whole ones can be written.
    let mut byte = [0];
    board.chips.mmio_read(1, 0xfee0_0023, &mut byte);
    assert_eq!(byte, [1]);
    let mut wide = [0xee; 8];
    board.chips.mmio_read(1, 0xfee0_0020, &mut wide);
    assert_eq!(wide, [0, 0, 0, 1, 0, 0, 0, 0]);
    board.chips.mmio_write(1, 0xfee0_0080, &[0x55]);
    board.chips.mmio_write(1, 0xfee0_0084, &[0x55; 4]);
    assert_eq!(board.lapic_read(1, register::TPR), 0);
    // The page ends, and the rest of it is empty.
    assert!(board.chips.mmio_read(1, 0xfee0_0ff0, &mut byte));
    assert_eq!(byte, [0]);
    assert!(!board.chips.mmio_read(1, 0xfee0_1000, &mut byte));
    // It can be moved.
    board.chips.write_msr(1, msr::APIC_BASE, 0xfed1_0800).unwrap();
    assert!(!board.chips.mmio_read(1, 0xfee0_0020, &mut byte));
    assert!(board.chips.mmio_read(1, 0xfed1_0023, &mut byte));
    assert_eq!(byte, [1]);
}

#[test]
fn apic_base_transitions() {
    const EN: u64 = apic_base::EN;
    const EXTD: u64 = apic_base::EXTD;
    const BASE: u64 = 0xfee0_0000;
    let board = Board::with(ChipsConfig::new(2));
    let chips = &board.chips;
    let set = |bits: u64| chips.write_msr(1, msr::APIC_BASE, BASE | bits);
    assert_eq!(chips.apic_base(0), BASE | EN | apic_base::BSP);
    assert_eq!(chips.apic_base(1), BASE | EN);
    // From xAPIC: not to the invalid state; to x2APIC.
    assert_eq!(set(EXTD), Err(GeneralProtection));
    board.lapic(1, register::LDR, 0x0200_0000);
    chips.set_tpr(1, 3);
    assert_eq!(set(EN | EXTD), Ok(()));
    assert_eq!(chips.tpr(1), 3);
    // From x2APIC: not to xAPIC, not to invalid; to off, with everything reset.
    assert_eq!(set(EN), Err(GeneralProtection));
    assert_eq!(set(EXTD), Err(GeneralProtection));
    assert_eq!(chips.read_msr(1, msr::APIC_BASE), Ok(BASE | EN | EXTD));
    assert_eq!(set(0), Ok(()));
    assert_eq!(chips.tpr(1), 0);
    // From off: not to x2APIC, only to xAPIC.
    assert_eq!(set(EN | EXTD), Err(GeneralProtection));
    assert_eq!(set(EN), Ok(()));
    assert_eq!(board.lapic_read(1, register::LDR), 0);
    // Reserved bits, and addresses beyond the processor's.
    for bit in [0, 7, 9, 48, 63] {
        assert_eq!(set(EN | 1 << bit), Err(GeneralProtection), "bit {bit}");
    }
    assert_eq!(set(EN | 1 << 40), Ok(()));
    // A model without x2APIC.
    let board = Board::with(ChipsConfig { x2apic: false, ..ChipsConfig::new(1) });
    assert_eq!(board.chips.write_msr(0, msr::APIC_BASE, BASE | EN | EXTD), Err(GeneralProtection));
}

#[test]
fn x2apic_general_protection() {
    let board = Board::x2apic(1);
    let chips = &board.chips;
    let readable =
        [0x2, 0x3, 0x8, 0xa, 0xd, 0xf, 0x28, 0x30, 0x32, 0x33, 0x34, 0x35, 0x36, 0x37, 0x38, 0x39, 0x3e];
    let writable = [0x8, 0xb, 0xf, 0x28, 0x30, 0x32, 0x33, 0x34, 0x35, 0x36, 0x37, 0x38, 0x3e];
    for number in 0..0x100 {
        let exists = readable.contains(&number) || (0x10..0x28).contains(&number);
        assert_eq!(chips.read_msr(0, X2APIC + number).is_ok(), exists, "read {number:#x}");
        let zero = chips.write_msr(0, X2APIC + number, 0);
        // A self IPI with vector 0 is an error, but not a fault.
        let exists = writable.contains(&number) || number == register::SELF_IPI;
        assert_eq!(zero.is_ok(), exists, "write {number:#x}");
        if number != register::ICR_LOW {
            assert!(chips.write_msr(0, X2APIC + number, 1 << 32).is_err(), "wide write {number:#x}");
        }
    }
    for (number, value) in [
        (register::TPR, 0x100),
        (register::EOI, 1),
        (register::SVR, 0x1000),
        (register::ESR, 1),
        (register::ICR_LOW, 1 << 13),
        (register::ICR_LOW, 1 << 16),
        (register::ICR_LOW, 1 << 20),
        (register::LVT_TIMER, 0x6_0040),
        (register::LVT_TIMER, 0x700),
        (register::LVT_ERROR, 0x100),
        (register::LVT_THERMAL, 1 << 15),
        (register::LVT_LINT0, 1 << 17),
        (register::DIVIDE, 4),
        (register::SELF_IPI, 0x100),
    ] {
        assert!(chips.write_msr(0, X2APIC + number, value).is_err(), "{value:#x} to {number:#x}");
    }
    assert!(chips.write_msr(0, 0x900, 0).is_err());
    // In xAPIC mode none of them is there.
    let board = Board::new(1);
    assert!(board.chips.read_msr(0, X2APIC + register::ID).is_err());
    assert!(board.chips.write_msr(0, X2APIC + register::EOI, 0).is_err());
}
