//! Ticks of the 8254 that the guest is late for: none is lost, none comes before the one before was taken.

use super::*;

/// 250 Hz, as Linux programs it.
const COUNT: u64 = 4772;
const VECTOR: u8 = 0x62;

fn after_periods(periods: u64) -> u64 {
    (periods * COUNT * 1_000_000_000).div_ceil(pit::CLOCK_HZ) + 100
}

/// A board whose 8254 ticks in `mode` from time zero.
fn ticking(vcpus: u32, mode: u8) -> Board {
    let board = Board::new(vcpus);
    board.out(0x43, 0x30 | mode << 1);
    board.out(0x40, COUNT as u8);
    board.out(0x40, (COUNT >> 8) as u8);
    board
}

/// Takes and finishes interrupts of a vCPU until there is none.
fn serve(board: &Board, vcpu: VcpuId, expected: u8) -> usize {
    let mut ticks = 0;
    while let Some(vector) = board.chips.acknowledge(vcpu) {
        assert_eq!(vector, expected);
        ticks += 1;
        assert!(ticks <= 1000, "no end of ticks");
        // While it is being served, as in a processor, nothing of the same priority comes.
        assert!(!board.chips.has_interrupt(vcpu), "tick {ticks} before the last one is finished");
        board.eoi(vcpu);
    }
    ticks
}

#[test]
fn every_tick_comes_through_the_ioapic() {
    for mode in [2, 3] {
        let board = ticking(1, mode);
        board.redirect(2, VECTOR.into());
        board.advance(after_periods(15));
        assert_eq!(serve(&board, 0, VECTOR), 15, "mode {mode}");
        // And as many again if the alarm rings each time but the processor does not listen.
        for period in 16..=30 {
            board.advance(after_periods(period));
        }
        board.told();
        assert_eq!(serve(&board, 0, VECTOR), 15, "mode {mode}");
        assert!(!board.told().is_empty(), "the processor is told of the next tick");
        assert_eq!(serve(&board, 0, VECTOR), 0);
        // Then on time.
        let next = board.advance(after_periods(30)).unwrap();
        assert!(next > after_periods(30) && next < after_periods(31));
        board.advance(after_periods(31));
        assert_eq!(serve(&board, 0, VECTOR), 1);
    }
}

#[test]
fn every_tick_comes_through_a_level_triggered_entry() {
    let board = ticking(1, 2);
    board.redirect(2, 0x8000 | u64::from(VECTOR));
    board.advance(after_periods(5));
    assert_eq!(serve(&board, 0, VECTOR), 5);
}

#[test]
fn every_tick_comes_through_the_8259s() {
    let board = ticking(2, 2);
    board.linux_pic(0xfe);
    board.virtual_wire(0);
    board.advance(after_periods(15));
    for tick in 0..15 {
        assert_eq!(board.chips.acknowledge(0), Some(0x30), "tick {tick}");
        // The next waits in the 8259 for the EOI.
        assert_eq!(board.chips.acknowledge(0), None);
        board.out(0x20, 0x60);
    }
    assert_eq!(board.chips.acknowledge(0), None);
    // Polling acknowledges too.
    board.advance(after_periods(18));
    for _ in 0..3 {
        board.out(0x20, 0x0c);
        assert_eq!(board.input(0x20), 0x80);
        board.out(0x20, 0x20);
    }
    board.out(0x20, 0x0c);
    assert_eq!(board.input(0x20), 0);
}

#[test]
fn a_late_alarm_does_not_keep_ticks_back() {
    let board = ticking(1, 2);
    board.redirect(2, VECTOR.into());
    board.advance(after_periods(1));
    // Nobody runs the timers any more; the guest's own EOIs do.
    board.time.set(after_periods(6));
    assert_eq!(serve(&board, 0, VECTOR), 6);
}

#[test]
fn a_pause_does_not_end_in_a_flood() {
    let board = ticking(1, 2);
    board.redirect(2, VECTOR.into());
    board.advance(after_periods(100_000));
    assert_eq!(serve(&board, 0, VECTOR) as u64, pit::BACKLOG);
}

#[test]
fn ticks_that_nobody_listens_to_are_gone() {
    let board = ticking(1, 2);
    // Masked at the IOAPIC and at the 8259s: what comes later is new, but for the edge that the 8259 latches.
    board.linux_pic(0xff);
    board.virtual_wire(0);
    for period in 1..=10 {
        board.advance(after_periods(period));
    }
    board.redirect(2, VECTOR.into());
    assert_eq!(serve(&board, 0, VECTOR), 0);
    board.redirect(2, 0x1_0000);
    board.out(0x21, 0xfe);
    assert_eq!(board.chips.acknowledge(0), Some(0x30));
    board.out(0x20, 0x20);
    assert_eq!(board.chips.acknowledge(0), None);
    // Open at the 8259s, whose output leads nowhere.
    board.lapic(0, register::LVT_LINT0, 0x1_0700);
    board.advance(after_periods(20));
    board.virtual_wire(0);
    assert_eq!(board.chips.acknowledge(0), Some(0x30));
    board.out(0x20, 0x20);
    assert_eq!(board.chips.acknowledge(0), None);
    // Through the IOAPIC to a LAPIC that is off.
    board.redirect(2, VECTOR.into());
    board.lapic(0, register::SVR, 0xff);
    board.advance(after_periods(30));
    board.lapic(0, register::SVR, 0x1ff);
    board.out(0x21, 0xff);
    assert_eq!(serve(&board, 0, VECTOR), 0);
    // Taken off the line.
    board.chips.set_pit_wired(false);
    board.advance(after_periods(40));
    board.chips.set_pit_wired(true);
    assert_eq!(serve(&board, 0, VECTOR), 0);
    board.advance(after_periods(41));
    assert_eq!(serve(&board, 0, VECTOR), 1);
}

#[test]
fn a_processor_that_takes_none_does_not_hold_up_the_others() {
    let board = ticking(2, 2);
    // Fixed, to both.
    board.redirect(2, 0x0300_0000_0000_0800 | u64::from(VECTOR));
    for period in 1..=10 {
        board.advance(after_periods(period));
        assert_eq!(serve(&board, 0, VECTOR), 1, "period {period}");
    }
    assert_eq!(serve(&board, 1, VECTOR), 1);
}

#[test]
fn reprogramming_reset_and_restored_state_begin_without_old_ticks() {
    let late = || {
        let board = ticking(1, 2);
        board.redirect(2, VECTOR.into());
        board.advance(after_periods(10));
        board
    };
    // Stopped as Linux does: one more, which the LAPIC has already.
    let board = late();
    for (port, value) in [(0x43, 0x30), (0x40, 0), (0x40, 0)] {
        board.out(port, value);
    }
    assert_eq!(serve(&board, 0, VECTOR), 1);
    // While the handler runs there is room for one.
    let board = late();
    assert_eq!(board.chips.acknowledge(0), Some(VECTOR));
    board.out(0x43, 0x30);
    board.eoi(0);
    assert_eq!(serve(&board, 0, VECTOR), 1);
    let board = late();
    let state = board.chips.chips();
    board.chips.reset();
    board.lapic(0, register::SVR, 0x1ff);
    board.redirect(2, VECTOR.into());
    assert_eq!(serve(&board, 0, VECTOR), 0);
    board.chips.set_chips(&state);
    assert_eq!(serve(&board, 0, VECTOR), 0);
    board.advance(after_periods(11));
    assert_eq!(serve(&board, 0, VECTOR), 1);
}

#[test]
fn an_edge_before_a_write_is_not_lost() {
    let board = ticking(1, 2);
    board.redirect(2, VECTOR.into());
    board.time.set(after_periods(1));
    board.out(0x43, 0x30);
    assert_eq!(serve(&board, 0, VECTOR), 1);
    // Nor that of a one-shot, which nobody makes wait.
    for (port, value) in [(0x40, 100), (0x40, 0)] {
        board.out(port, value);
    }
    board.time.set(after_periods(2));
    board.out(0x43, 0x30);
    assert_eq!(serve(&board, 0, VECTOR), 1);
}
