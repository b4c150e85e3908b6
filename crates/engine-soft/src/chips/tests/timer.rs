//! The LAPICs' timers.

use super::*;

#[test]
fn oneshot_and_periodic_timer() {
    let board = Board::new(1);
    let chips = &board.chips;
    board.lapic(0, register::LVT_TIMER, 0x40);
    board.lapic(0, register::DIVIDE, 0x3); // by 16
    board.lapic(0, register::INITIAL_COUNT, 1000);
    assert_eq!(board.advance(8_000), Some(16_000));
    assert_eq!(board.lapic_read(0, register::CURRENT_COUNT), 500);
    assert_eq!(board.advance(16_000), None);
    assert_eq!(chips.acknowledge(0), Some(0x40));
    assert_eq!(board.lapic_read(0, register::CURRENT_COUNT), 0);
    board.eoi(0);
    board.advance(1_000_000);
    assert!(!chips.has_interrupt(0));
    // Periodic, by 1: 100 µs.
    board.lapic(0, register::LVT_TIMER, 0x2_0041);
    board.lapic(0, register::DIVIDE, 0xb);
    board.lapic(0, register::INITIAL_COUNT, 100_000);
    for n in 1..1000 {
        // However late each alarm rings.
        let next = board.advance(1_000_000 + n * 100_000 + n % 7 * 10_000);
        assert_eq!(next, Some(1_000_000 + (n + 1) * 100_000));
        assert_eq!(chips.acknowledge(0), Some(0x41));
        board.eoi(0);
    }
    // Missed periods are one interrupt.
    let next = board.advance(1_000_000 + 1_234_567 * 1_000);
    assert_eq!(next, Some(1_000_000 + 1_234_600_000));
    assert_eq!(chips.acknowledge(0), Some(0x41));
    assert_eq!(board.lapic_read(0, register::CURRENT_COUNT), 33_000);
    board.eoi(0);
    // Masked, it counts without interrupts, and expiries are not made up for.
    board.lapic(0, register::LVT_TIMER, 0x3_0041);
    assert_eq!(board.advance(2_000_000_000), None);
    assert_eq!(board.lapic_read(0, register::CURRENT_COUNT), 100_000);
    board.lapic(0, register::LVT_TIMER, 0x2_0041);
    assert!(!chips.has_interrupt(0));
    assert_eq!(board.advance(2_000_050_000), Some(2_000_100_000));
    // Zero stops it.
    board.lapic(0, register::INITIAL_COUNT, 0);
    assert_eq!(board.advance(3_000_000_000), None);
    assert!(!chips.has_interrupt(0));
}

#[test]
fn every_divider() {
    let board = Board::new(1);
    for (code, divider) in
        [(0x0, 2), (0x1, 4), (0x2, 8), (0x3, 16), (0x8, 32), (0x9, 64), (0xa, 128), (0xb, 1)]
    {
        board.lapic(0, register::DIVIDE, code | 0xf4);
        assert_eq!(board.lapic_read(0, register::DIVIDE), code);
        board.lapic(0, register::INITIAL_COUNT, 1_000_000);
        let now_ns = board.time.now_ns();
        board.time.set(now_ns + 1000 * divider);
        assert_eq!(board.lapic_read(0, register::CURRENT_COUNT), 999_000, "divider {divider}");
    }
    // Changing it on the way keeps the count.
    board.lapic(0, register::DIVIDE, 0x3);
    assert_eq!(board.lapic_read(0, register::CURRENT_COUNT), 999_000);
    board.time.set(board.time.now_ns() + 16);
    assert_eq!(board.lapic_read(0, register::CURRENT_COUNT), 998_999);
}

#[test]
fn tsc_deadline() {
    let board = Board::new(2);
    let chips = &board.chips;
    // Ignored in the other modes.
    chips.write_msr(1, msr::TSC_DEADLINE, 5000).unwrap();
    assert_eq!(chips.read_msr(1, msr::TSC_DEADLINE), Ok(0));
    board.lapic(1, register::LVT_TIMER, 0x4_0070);
    chips.write_msr(1, msr::TSC_DEADLINE, 30_001).unwrap();
    assert_eq!(chips.read_msr(1, msr::TSC_DEADLINE), Ok(30_001));
    let next = board.advance(5_000).unwrap();
    assert!((10_000..10_003).contains(&next), "{next}");
    // Counting registers are dead in this mode.
    board.lapic(1, register::INITIAL_COUNT, 10);
    assert_eq!(board.lapic_read(1, register::INITIAL_COUNT), 0);
    // An alarm that comes too early does nothing.
    chips.run_timers(next);
    assert!(!chips.has_interrupt(1));
    board.told();
    assert_eq!(board.advance(next), None);
    assert_eq!(board.told(), [1]);
    assert_eq!(chips.acknowledge(1), Some(0x70));
    assert_eq!(chips.read_msr(1, msr::TSC_DEADLINE), Ok(0));
    board.lapic(1, register::EOI, 0);
    // A deadline in the past fires at once; zero disarms.
    chips.write_msr(1, msr::TSC_DEADLINE, 1).unwrap();
    assert_eq!(chips.acknowledge(1), Some(0x70));
    board.lapic(1, register::EOI, 0);
    chips.write_msr(1, msr::TSC_DEADLINE, u64::MAX).unwrap();
    assert!(board.advance(next).is_some());
    chips.write_msr(1, msr::TSC_DEADLINE, 0).unwrap();
    assert_eq!(board.advance(next), None);
    // Leaving the mode disarms, too.
    chips.write_msr(1, msr::TSC_DEADLINE, 1 << 40).unwrap();
    board.lapic(1, register::LVT_TIMER, 0x70);
    board.lapic(1, register::LVT_TIMER, 0x4_0070);
    assert_eq!(chips.read_msr(1, msr::TSC_DEADLINE), Ok(0));
    // The reserved mode does nothing.
    board.lapic(1, register::LVT_TIMER, 0x6_0070);
    board.lapic(1, register::INITIAL_COUNT, 10);
    board.advance(1 << 40);
    assert!(!chips.has_interrupt(1));
}

#[test]
fn short_periods_do_not_keep_the_host_busy() {
    let board = Board::new(1);
    board.lapic(0, register::LVT_TIMER, 0x2_0041);
    board.lapic(0, register::DIVIDE, 0xb);
    board.lapic(0, register::INITIAL_COUNT, 1);
    let mut alarms = 0;
    let mut next = board.advance(0);
    while let Some(at_ns) = next.filter(|at_ns| *at_ns <= 1_000_000) {
        next = board.advance(at_ns);
        alarms += 1;
    }
    assert!((40..=51).contains(&alarms), "{alarms}");
}
