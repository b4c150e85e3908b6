//! The 8259s and the 8254 on the board.

use super::*;

#[test]
fn linux_sets_up_the_8259s_behind_the_virtual_wire() {
    let board = Board::new(2);
    let chips = &board.chips;
    board.linux_pic(0xfe & !4);
    board.virtual_wire(0);
    board.told();
    chips.set_irq_line(0, true);
    assert_eq!(board.told(), [0]);
    assert!(chips.has_interrupt(0));
    assert!(!chips.has_interrupt(1));
    assert_eq!(chips.peek(0), Some(0x30));
    // ExtINT passes by the processor priority.
    chips.set_tpr(0, 15);
    assert!(chips.has_interrupt(0));
    assert_eq!(chips.acknowledge(0), Some(0x30));
    assert!(!chips.has_interrupt(0));
    assert_eq!(chips.acknowledge(0), None);
    chips.set_irq_line(0, false);
    chips.set_irq_line(0, true);
    assert!(!chips.has_interrupt(0));
    board.out(0x20, 0x60);
    assert_eq!(chips.acknowledge(0), Some(0x30));
    board.out(0x20, 0x60);
    // A masked LINT0 cuts the wire, a new edge or not.
    chips.set_irq_line(0, false);
    board.lapic(0, register::LVT_LINT0, 0x1_0700);
    chips.set_irq_line(0, true);
    assert!(!chips.has_interrupt(0));
    board.told();
    board.virtual_wire(0);
    assert_eq!(board.told(), [0]);
    assert_eq!(chips.acknowledge(0), Some(0x30));
    board.out(0x20, 0x60);
    // The slave.
    board.out(0xa1, 0xfe);
    chips.set_irq_line(8, true);
    assert_eq!(chips.acknowledge(0), Some(0x38));
}

#[test]
fn the_8259s_go_on_asking_after_an_acknowledge() {
    let board = Board::new(1);
    let chips = &board.chips;
    // Automatic EOI, so that nothing but the acknowledge happens in between.
    for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 0x04), (0x21, 0x03)] {
        board.out(port, value);
    }
    board.virtual_wire(0);
    chips.set_irq_line(3, true);
    chips.set_irq_line(4, true);
    assert_eq!(chips.acknowledge(0), Some(0x33));
    assert_eq!(chips.acknowledge(0), Some(0x34));
    assert_eq!(chips.acknowledge(0), None);
}

#[test]
fn a_request_that_vanishes_is_no_interrupt() {
    let board = Board::new(1);
    let chips = &board.chips;
    board.linux_pic(0xdf);
    board.out(0x4d0, 0x20);
    board.virtual_wire(0);
    chips.set_irq_line(5, true);
    assert!(chips.has_interrupt(0));
    chips.set_irq_line(5, false);
    assert!(!chips.has_interrupt(0));
    assert_eq!(chips.acknowledge(0), None);
    // Masking between request and acknowledge does the same.
    chips.set_irq_line(5, true);
    board.out(0x21, 0xff);
    assert_eq!(chips.acknowledge(0), None);
}

#[test]
fn the_8259s_reach_a_processor_whose_lapic_is_off() {
    let board = Board::with(ChipsConfig::new(1));
    let chips = &board.chips;
    board.linux_pic(0xfe);
    chips.set_irq_line(0, true);
    assert!(!chips.has_interrupt(0));
    board.told();
    chips.write_msr(0, msr::APIC_BASE, 0xfee0_0100).unwrap();
    assert_eq!(board.told(), [0]);
    assert_eq!(chips.acknowledge(0), Some(0x30));
    assert_eq!(chips.lapic_page(0), None);
    assert!(!chips.mmio_write(0, 0xfee0_00f0, &[0; 4]));
}

#[test]
fn ext_int_through_the_ioapic() {
    let board = Board::new(2);
    let chips = &board.chips;
    board.linux_pic(0xfc);
    chips.set_irq_line(0, true);
    // Input 0 as ExtINT to vCPU 1, set up after the 8259s began to ask.
    board.told();
    board.redirect(0, 0x0100_0000_0000_0700);
    assert_eq!(board.told(), [1]);
    chips.set_irq_line(1, true);
    assert_eq!(chips.acknowledge(1), Some(0x30));
    assert!(!chips.has_interrupt(1));
    // The EOI lets the next one out: a new edge at input 0.
    board.out(0x20, 0x20);
    assert_eq!(chips.acknowledge(1), Some(0x31));
    board.out(0x20, 0x20);
    assert!(!chips.has_interrupt(1));
}

#[test]
fn lint0_as_an_interrupt_of_its_own() {
    let board = Board::new(1);
    let chips = &board.chips;
    board.linux_pic(0xfe);
    // Fixed, edge: one interrupt per rise of the pair's output.
    board.lapic(0, register::LVT_LINT0, 0x51);
    chips.set_irq_line(0, true);
    assert_eq!(chips.acknowledge(0), Some(0x51));
    board.eoi(0);
    assert!(!chips.has_interrupt(0));
    // NMI, as the old watchdog of Linux used it. Unmasking with the line up is no edge.
    board.lapic(0, register::LVT_LINT0, 0x1_0400);
    board.lapic(0, register::LVT_LINT0, 0x400);
    assert!(!chips.has_signals(0));
    board.out(0x20, 0x0c);
    assert_eq!(board.input(0x20), 0x80);
    board.out(0x20, 0x20);
    chips.set_irq_line(0, false);
    chips.set_irq_line(0, true);
    assert!(chips.take_signals(0).nmi);
    // Fixed, level: again after each EOI while the line is up.
    board.lapic(0, register::LVT_LINT0, 0x8052);
    assert_eq!(chips.acknowledge(0), Some(0x52));
    assert_eq!(board.lapic_read(0, register::LVT_LINT0), 0xc052);
    board.eoi(0);
    assert_eq!(chips.acknowledge(0), Some(0x52));
    board.out(0x21, 0xff);
    board.eoi(0);
    assert!(!chips.has_interrupt(0));
    assert_eq!(board.lapic_read(0, register::LVT_LINT0), 0x8052);
}

#[test]
fn irq_0_is_gsi_2() {
    let board = Board::new(1);
    let chips = &board.chips;
    board.redirect(2, 0x62);
    chips.set_irq_line(0, true);
    assert_eq!(chips.acknowledge(0), Some(0x62));
    board.eoi(0);
    chips.set_irq_line(0, false);
    chips.set_irq_line(2, true);
    assert_eq!(chips.acknowledge(0), Some(0x62));
    // Lines that do not exist.
    chips.set_irq_line(24, true);
    chips.set_irq_line(u32::MAX, true);
}

#[test]
fn pit_interrupts_through_both_controllers() {
    let board = Board::new(1);
    let chips = &board.chips;
    board.redirect(2, 0x62);
    board.linux_pic(0xfe);
    board.virtual_wire(0);
    for (port, value) in [(0x43, 0x34), (0x40, 0x9c), (0x40, 0x2e)] {
        board.out(port, value);
    }
    let period_ns = 11_932u64 * 1_000_000_000 / pit::CLOCK_HZ + 1;
    assert_eq!(board.advance(0), Some(period_ns));
    assert_eq!(board.advance(period_ns - 1), Some(period_ns));
    assert!(!chips.has_interrupt(0));
    board.told();
    assert!(board.advance(period_ns).is_some_and(|next| next > period_ns));
    assert_eq!(board.told(), [0]);
    assert_eq!(chips.acknowledge(0), Some(0x30));
    assert_eq!(chips.acknowledge(0), Some(0x62));
    board.eoi(0);
    board.out(0x20, 0x20);
    // Taken off the line, as the HPET does.
    chips.set_pit_wired(false);
    board.advance(3 * period_ns);
    assert!(!chips.has_interrupt(0));
    chips.set_pit_wired(true);
    board.advance(5 * period_ns);
    assert_eq!(chips.acknowledge(0), Some(0x30));
}

#[test]
fn words_and_foreign_ports() {
    let board = Board::new(1);
    board.linux_pic(0xab);
    let mut word = [0; 2];
    board.chips.port_read(0x21, &mut word);
    assert_eq!(word, [0xab, 0xff]);
    board.chips.port_write(0x20, &[0x0b, 0x55]);
    assert_eq!(board.input(0x21), 0x55);
    for port in [0x20, 0x21, 0x40, 0x43, 0x61, 0xa0, 0xa1, 0x4d0, 0x4d1] {
        assert!(Chips::handles_port(port));
    }
    for port in [0x1f, 0x22, 0x3f, 0x44, 0x60, 0x62, 0x4d2] {
        assert!(!Chips::handles_port(port));
    }
    // The end of the port space.
    let mut data = [0; 4];
    board.chips.port_read(0xffff, &mut data);
    assert_eq!(data[0], 0xff);
    board.chips.port_write(0xffff, &[0; 4]);
}
