//! Reset, saving and loading.

use super::*;

#[test]
fn reset_returns_to_power_up_and_keeps_the_lines() {
    let board = Board::x2apic(2);
    let chips = &board.chips;
    board.linux_pic(0xff);
    board.redirect(20, 0x8055);
    chips.set_irq_line(20, true);
    chips.set_irq_line(9, true);
    chips.write_msr(0, X2APIC + register::LVT_TIMER, 0x40).unwrap();
    chips.write_msr(0, X2APIC + register::INITIAL_COUNT, 1000).unwrap();
    chips.inject_nmi(1);
    for (port, value) in [(0x43, 0x34), (0x40, 0), (0x40, 0)] {
        board.out(port, value);
    }
    chips.reset();
    assert!(!chips.has_interrupt(0) && !chips.has_signals(1));
    assert_eq!(board.advance(1_000_000_000), None);
    assert_eq!(chips.apic_base(0), 0xfee0_0900);
    let state = chips.chips();
    assert_eq!(state.ioapic.redirection, [0x1_0000; 24]);
    assert_eq!(state.ioapic.lines, 1 << 20 | 1 << 9);
    assert_eq!(state.pic_slave.lines, 1 << 1);
    assert_eq!(state.pic_master.imr, 0xff);
    // The level is still there for the next system.
    board.lapic(0, register::SVR, 0x1ff);
    board.redirect(20, 0x8056);
    assert_eq!(chips.acknowledge(0), Some(0x56));
}

#[test]
fn saved_chips_go_on_elsewhere() {
    for wide in [false, true] {
        let board = if wide { Board::x2apic(2) } else { Board::new(2) };
        let chips = &board.chips;
        let lapic = |chips: &Chips, vcpu, number: u32, value: u32| {
            if wide {
                chips.write_msr(vcpu, X2APIC + number, value.into()).unwrap();
            } else {
                let gpa = 0xfee0_0000 + u64::from(number) * 16;
                assert!(chips.mmio_write(vcpu, gpa, &value.to_le_bytes()));
            }
        };
        board.linux_pic(0xfe);
        lapic(chips, 0, register::LVT_LINT0, 0x700);
        board.redirect(20, 0x0100_0000_0000_8055);
        board.redirect(4, 0x41);
        chips.set_irq_line(20, true);
        assert_eq!(chips.acknowledge(1), Some(0x55));
        chips.set_irq_line(4, true);
        chips.set_irq_line(0, true);
        lapic(chips, 0, register::LVT_TIMER, 0x2_0070);
        lapic(chips, 0, register::DIVIDE, 0xb);
        lapic(chips, 0, register::INITIAL_COUNT, 100_000);
        lapic(chips, 1, register::LVT_TIMER, 0x4_0071);
        chips.write_msr(1, msr::TSC_DEADLINE, 600_000 * TSC_PER_NS + 1).unwrap();
        for (port, value) in [(0x43, 0x34), (0x40, 0), (0x40, 0x40)] {
            board.out(port, value);
        }
        board.advance(130_000);
        assert_eq!(chips.peek(0), Some(0x30));

        let other = Board::with(ChipsConfig::new(2));
        // Its clocks read the same, as a restored VM's do.
        other.time.set(130_000);
        for vcpu in 0..2 {
            let base = chips.read_msr(vcpu, msr::APIC_BASE).unwrap();
            let state = chips.lapic_state(vcpu);
            other.chips.set_lapic_state(vcpu, base, &state).unwrap();
            assert_eq!(other.chips.lapic_state(vcpu), state);
            let deadline = chips.read_msr(vcpu, msr::TSC_DEADLINE).unwrap();
            other.chips.write_msr(vcpu, msr::TSC_DEADLINE, deadline).unwrap();
        }
        other.told();
        let state = chips.chips();
        other.chips.set_chips(&state);
        assert_eq!(other.chips.chips(), state);
        assert!(other.told().contains(&0), "the 8259s still ask");

        let mut histories = Vec::new();
        for board in [&board, &other] {
            let chips = &board.chips;
            let mut history = Vec::new();
            // 8259 first, then the edge, then the timers; the level comes back after its EOI.
            lapic(chips, 1, register::EOI, 0);
            for at_ns in [130_000, 200_000, 599_000, 601_000, 14_000_000] {
                let next = board.advance(at_ns);
                for vcpu in 0..2 {
                    while let Some(vector) = chips.acknowledge(vcpu) {
                        history.push((at_ns, vcpu, vector));
                        if vector == 0x30 {
                            board.out(0x20, 0x20);
                        } else {
                            if vector == 0x55 {
                                chips.set_irq_line(20, false);
                            }
                            lapic(chips, vcpu, register::EOI, 0);
                        }
                    }
                }
                history.push((next.unwrap_or(0), 9, 0));
            }
            histories.push(history);
        }
        assert_eq!(histories[0], histories[1]);
        for vector in [0x30, 0x41, 0x55, 0x70, 0x71] {
            assert!(
                histories[0].iter().any(|(_, _, seen)| *seen == vector),
                "{vector:#x} in {:x?}",
                histories[0]
            );
        }
    }
}

#[test]
fn impossible_state_is_refused() {
    let board = Board::new(1);
    let good = board.chips.lapic_state(0);
    let before = board.chips.apic_base(0);
    for (base, state) in [
        (0xfee0_0400, good.clone()),
        (1 << 63 | 0xfee0_0800, good.clone()),
        (0xfee0_0800, LapicState { registers: vec![0; 63] }),
    ] {
        assert!(board.chips.set_lapic_state(0, base, &state).is_err());
    }
    assert_eq!(board.chips.apic_base(0), before);
    assert_eq!(board.chips.lapic_state(0), good);
    // From any mode to any mode, unlike the MSR.
    for base in [0xfee0_0c00, 0xfee0_0800, 0xfee0_0000, 0xfee0_0c00] {
        board.chips.set_lapic_state(0, base, &good).unwrap();
        assert_eq!(board.chips.apic_base(0), base);
    }
}
