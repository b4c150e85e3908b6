use super::*;
use port::*;

/// A timer with a clock that stands where it is put, in counter clocks.
struct Bench {
    pit: Pit,
    now_ns: u64,
}

impl Bench {
    fn new() -> Self {
        Bench { pit: Pit::default(), now_ns: 5_000_000 }
    }

    /// Moves to just after so many clocks from now.
    fn pass(&mut self, clocks: u64) {
        self.now_ns += ns_of(clocks);
    }

    fn out(&mut self, port: u16, value: u8) {
        self.pit.write(port, value, self.now_ns);
    }

    fn read(&mut self, port: u16) -> u8 {
        self.pit.read(port, self.now_ns)
    }

    /// Control word for channel 2, two-byte access, then the count.
    fn program(&mut self, mode: u8, count: u16) {
        self.out(CONTROL, 0xb0 | mode << 1);
        let [low, high] = count.to_le_bytes();
        self.out(CHANNEL_2, low);
        self.out(CHANNEL_2, high);
    }

    fn count(&mut self) -> u16 {
        self.out(CONTROL, 0x80);
        u16::from_le_bytes([self.read(CHANNEL_2), self.read(CHANNEL_2)])
    }

    fn output(&mut self) -> bool {
        self.read(SYSTEM_CONTROL) & system::OUT_2 != 0
    }

    fn gate(&mut self, high: bool) {
        self.out(SYSTEM_CONTROL, u8::from(high));
    }

    /// Runs channel 0 like the alarm thread does until `until_ns`, and says when it interrupted.
    fn interrupts(&mut self, until_ns: u64) -> Vec<u64> {
        let mut seen = Vec::new();
        while let Some(deadline) = self.pit.deadline_ns().filter(|deadline| *deadline <= until_ns) {
            assert!(deadline >= self.now_ns || seen.is_empty(), "time runs backwards");
            self.now_ns = deadline.max(self.now_ns);
            if self.pit.take_interrupt(self.now_ns) {
                seen.push(self.now_ns);
            }
        }
        self.now_ns = until_ns;
        seen
    }
}

#[test]
fn mode_0_rises_at_the_terminal_count() {
    let mut bench = Bench::new();
    bench.gate(true);
    bench.program(0, 100);
    assert!(!bench.output());
    bench.pass(60);
    assert_eq!(bench.count(), 40);
    assert!(!bench.output());
    bench.pass(39);
    assert!(!bench.output());
    bench.pass(1);
    assert!(bench.output());
    assert_eq!(bench.count(), 0);
    // It goes on counting below zero.
    bench.pass(3);
    assert_eq!(bench.count(), 0xfffd);
    assert!(bench.output());
    // The first byte of a new count stops it and takes the output low.
    bench.out(CHANNEL_2, 50);
    assert!(!bench.output());
    bench.pass(1000);
    assert!(!bench.output());
    bench.out(CHANNEL_2, 0);
    bench.pass(49);
    assert!(!bench.output());
    bench.pass(1);
    assert!(bench.output());
}

#[test]
fn mode_0_holds_while_the_gate_is_low() {
    let mut bench = Bench::new();
    bench.gate(true);
    bench.program(0, 100);
    bench.pass(30);
    bench.gate(false);
    bench.pass(500);
    assert_eq!(bench.count(), 70);
    bench.gate(true);
    bench.pass(69);
    assert!(!bench.output());
    bench.pass(1);
    assert!(bench.output());
    // A count written while the gate is low waits for it.
    bench.gate(false);
    bench.program(0, 10);
    bench.pass(20);
    assert_eq!(bench.count(), 10);
    bench.gate(true);
    bench.pass(10);
    assert!(bench.output());
}

#[test]
fn mode_1_is_triggered_and_retriggered_by_the_gate() {
    let mut bench = Bench::new();
    bench.program(1, 100);
    bench.pass(200);
    assert!(bench.output());
    bench.gate(true);
    assert!(!bench.output());
    bench.pass(99);
    assert!(!bench.output());
    // A falling gate does nothing, a rising one starts over.
    bench.gate(false);
    bench.gate(true);
    bench.pass(99);
    assert!(!bench.output());
    bench.pass(1);
    assert!(bench.output());
    // A new count is for the next trigger.
    bench.gate(false);
    bench.gate(true);
    bench.out(CHANNEL_2, 10);
    bench.out(CHANNEL_2, 0);
    bench.pass(50);
    assert!(!bench.output());
    bench.gate(false);
    bench.gate(true);
    bench.pass(10);
    assert!(bench.output());
}

#[test]
fn mode_2_is_low_for_the_last_clock_of_each_period() {
    let mut bench = Bench::new();
    bench.gate(true);
    bench.program(2, 10);
    for clock in 0..30u16 {
        assert_eq!(bench.count(), 10 - clock % 10, "clock {clock}");
        assert_eq!(bench.output(), clock % 10 != 9, "clock {clock}");
        bench.now_ns = 5_000_000 + ns_of(u64::from(clock) + 1);
    }
    // A low gate forces the output high; a rising one begins a period.
    bench.pass(9);
    assert!(!bench.output());
    bench.gate(false);
    assert!(bench.output());
    bench.pass(100);
    bench.gate(true);
    assert_eq!(bench.count(), 10);
}

#[test]
fn mode_2_takes_a_new_count_at_the_end_of_the_period() {
    let mut bench = Bench::new();
    bench.gate(true);
    bench.program(2, 100);
    bench.pass(30);
    bench.out(CHANNEL_2, 20);
    bench.out(CHANNEL_2, 0);
    assert_eq!(bench.count(), 70);
    // Read-back of the status: the new count is not loaded yet.
    bench.out(CONTROL, 0xe8);
    assert_eq!(bench.read(CHANNEL_2), 0x80 | 0x40 | 0x30 | 2 << 1);
    bench.pass(71);
    assert!((18..=20).contains(&bench.count()));
    bench.out(CONTROL, 0xe8);
    assert_eq!(bench.read(CHANNEL_2), 0x80 | 0x30 | 2 << 1);
}

#[test]
fn mode_3_is_high_for_half_a_period_and_counts_by_twos() {
    let mut bench = Bench::new();
    bench.gate(true);
    for (count, high) in [(10u16, 5), (11, 6)] {
        bench.program(3, count);
        let start_ns = bench.now_ns;
        for clock in 0..3 * count {
            let phase = clock % count;
            assert_eq!(bench.output(), phase < high, "clock {clock} of {count}");
            let half_phase = if phase < high { phase } else { phase - high };
            assert_eq!(bench.count(), (count & !1) - 2 * half_phase, "clock {clock} of {count}");
            bench.now_ns = start_ns + ns_of(u64::from(clock) + 1);
        }
    }
}

#[test]
fn mode_3_takes_a_new_count_at_the_end_of_the_half() {
    let mut bench = Bench::new();
    bench.gate(true);
    bench.program(3, 100);
    let start_ns = bench.now_ns;
    bench.pass(20);
    bench.out(CHANNEL_2, 40);
    bench.out(CHANNEL_2, 0);
    bench.now_ns = start_ns + ns_of(49);
    assert!(bench.output());
    // Low for half of the new count, from clock 50 to 70, then high.
    bench.now_ns = start_ns + ns_of(51);
    assert!(!bench.output());
    bench.now_ns = start_ns + ns_of(69);
    assert!(!bench.output());
    bench.now_ns = start_ns + ns_of(71);
    assert!(bench.output());
    bench.now_ns = start_ns + ns_of(91);
    assert!(!bench.output());
}

#[test]
fn mode_4_strobes_once_per_count() {
    let mut bench = Bench::new();
    bench.gate(true);
    bench.program(4, 20);
    let start_ns = bench.now_ns;
    for clock in 0..60 {
        bench.now_ns = start_ns + ns_of(clock);
        assert_eq!(bench.output(), clock != 20, "clock {clock}");
    }
    bench.out(CHANNEL_2, 5);
    bench.out(CHANNEL_2, 0);
    bench.pass(5);
    assert!(!bench.output());
    bench.pass(1);
    assert!(bench.output());
}

#[test]
fn mode_5_strobes_after_a_trigger() {
    let mut bench = Bench::new();
    bench.program(5, 20);
    bench.pass(20);
    assert!(bench.output());
    bench.gate(true);
    bench.pass(10);
    bench.gate(false);
    bench.gate(true);
    bench.pass(19);
    assert!(bench.output());
    bench.pass(1);
    assert!(!bench.output());
    bench.pass(1);
    assert!(bench.output());
}

#[test]
fn modes_6_and_7_are_2_and_3() {
    let mut bench = Bench::new();
    for (mode, shown) in [(6, 2), (7, 3)] {
        bench.program(mode, 10);
        bench.out(CONTROL, 0xe8);
        assert_eq!(bench.read(CHANNEL_2) >> 1 & 7, shown);
    }
}

#[test]
fn bcd_counts_in_decimal() {
    let mut bench = Bench::new();
    bench.gate(true);
    bench.out(CONTROL, 0xb1);
    bench.out(CHANNEL_2, 0x00);
    bench.out(CHANNEL_2, 0x10);
    bench.pass(1);
    assert_eq!(bench.count(), 0x0999);
    bench.pass(999);
    assert!(bench.output());
    bench.pass(1);
    assert_eq!(bench.count(), 0x9999);
    // Zero is ten thousand.
    bench.out(CHANNEL_2, 0);
    bench.out(CHANNEL_2, 0);
    assert_eq!(bench.count(), 0);
    bench.pass(9_999);
    assert!(!bench.output());
    bench.pass(1);
    assert!(bench.output());
}

#[test]
fn zero_is_65536() {
    let mut bench = Bench::new();
    bench.gate(true);
    bench.program(0, 0);
    assert_eq!(bench.count(), 0);
    bench.pass(0xffff);
    assert_eq!(bench.count(), 1);
    assert!(!bench.output());
    bench.pass(1);
    assert!(bench.output());
}

#[test]
fn one_byte_access() {
    let mut bench = Bench::new();
    bench.gate(true);
    bench.out(CONTROL, 0x90);
    bench.out(CHANNEL_2, 200);
    bench.pass(50);
    assert_eq!((bench.read(CHANNEL_2), bench.read(CHANNEL_2)), (150, 150));
    bench.out(CONTROL, 0xa0);
    bench.out(CHANNEL_2, 2);
    bench.pass(256);
    assert_eq!(bench.read(CHANNEL_2), 1);
}

#[test]
fn latches_hold_until_they_are_read() {
    let mut bench = Bench::new();
    bench.gate(true);
    bench.program(0, 1000);
    bench.pass(100);
    bench.out(CONTROL, 0x80);
    bench.pass(100);
    // A second latch does not replace the first.
    bench.out(CONTROL, 0x80);
    assert_eq!(u16::from_le_bytes([bench.read(CHANNEL_2), bench.read(CHANNEL_2)]), 900);
    assert_eq!(u16::from_le_bytes([bench.read(CHANNEL_2), bench.read(CHANNEL_2)]), 800);
    // Read-back of count and status: status comes first.
    bench.out(CONTROL, 0xc8);
    bench.pass(100);
    assert_eq!(bench.read(CHANNEL_2), 0x30);
    assert_eq!(u16::from_le_bytes([bench.read(CHANNEL_2), bench.read(CHANNEL_2)]), 800);
    // Read-back of nothing, or of other channels, changes nothing.
    bench.out(CONTROL, 0xf8);
    bench.out(CONTROL, 0xc6);
    assert_eq!(u16::from_le_bytes([bench.read(CHANNEL_2), bench.read(CHANNEL_2)]), 700);
    // The control port is write-only.
    assert_eq!(bench.read(CONTROL), 0xff);
}

#[test]
fn port_61h_shows_gate_speaker_and_refresh() {
    let mut bench = Bench::new();
    bench.out(SYSTEM_CONTROL, 0xff);
    assert_eq!(bench.read(SYSTEM_CONTROL) & 0x0f, 3);
    bench.out(SYSTEM_CONTROL, 0x02);
    assert_eq!(bench.read(SYSTEM_CONTROL) & 0x0f, 2);
    let before = bench.read(SYSTEM_CONTROL) & system::REFRESH;
    bench.now_ns += system::REFRESH_NS;
    assert_ne!(bench.read(SYSTEM_CONTROL) & system::REFRESH, before);
}

#[test]
fn linux_calibrates_its_tsc_with_channel_2() {
    // As `pit_calibrate_tsc` of Linux does: gate up, speaker off, mode 0, 50 ms, poll OUT.
    let mut bench = Bench::new();
    let port = bench.read(SYSTEM_CONTROL);
    bench.out(SYSTEM_CONTROL, port & !0x02 | 0x01);
    let latch = (CLOCK_HZ / 20) as u16;
    bench.program(0, latch);
    let start_ns = bench.now_ns;
    let mut polls = 0;
    while bench.read(SYSTEM_CONTROL) & 0x20 == 0 {
        bench.now_ns += 1_000;
        polls += 1;
        assert!(polls < 100_000, "OUT never rises");
    }
    let took_ns = bench.now_ns - start_ns;
    assert!((49_999_000..50_003_000).contains(&took_ns), "{took_ns} ns");
    // And as `quick_pit_calibrate`: mode 0 with 0xffff, watching the high byte fall.
    bench.program(0, 0xffff);
    bench.read(CHANNEL_2);
    assert_eq!(bench.read(CHANNEL_2), 0xff);
    bench.pass(256 * 3);
    bench.read(CHANNEL_2);
    assert_eq!(bench.read(CHANNEL_2), 0xfc);
}

#[test]
fn periodic_interrupts_do_not_drift() {
    let mut bench = Bench::new();
    // 100 Hz as Linux and the BSDs program it.
    bench.out(CONTROL, 0x34);
    let divisor = 11_932u64;
    bench.out(CHANNEL_0, divisor as u8);
    bench.out(CHANNEL_0, (divisor >> 8) as u8);
    let start_ns = bench.now_ns;
    let seen = bench.interrupts(start_ns + 3_600_000_000_000);
    assert_eq!(seen.len() as u64, 3600 * CLOCK_HZ / divisor);
    for (n, at_ns) in (1..).zip(&seen) {
        assert_eq!(*at_ns, start_ns + ns_of(n * divisor));
    }
}

#[test]
fn late_alarms_lose_no_tick_and_keep_the_phase() {
    for mode in [2u8, 3] {
        let mut bench = Bench::new();
        bench.out(CONTROL, 0x30 | mode << 1);
        bench.out(CHANNEL_0, 0);
        bench.out(CHANNEL_0, 0x10);
        let start_ns = bench.now_ns;
        bench.now_ns = start_ns + ns_of(10 * 0x1000 + 5);
        assert!(bench.pit.can_wait());
        for tick in 0..10 {
            assert!(bench.pit.take_interrupt(bench.now_ns), "mode {mode} tick {tick}");
            assert_eq!(bench.pit.deadline_ns(), Some(start_ns + ns_of(11 * 0x1000)));
        }
        assert!(!bench.pit.take_interrupt(bench.now_ns));
    }
}

#[test]
fn a_pause_is_not_made_up_for() {
    let mut bench = Bench::new();
    bench.out(CONTROL, 0x34);
    bench.out(CHANNEL_0, 0);
    bench.out(CHANNEL_0, 0x10);
    bench.now_ns += 3_600_000_000_000;
    let ticks = (0..1000).filter(|_| bench.pit.take_interrupt(bench.now_ns)).count();
    assert_eq!(ticks as u64, BACKLOG);
    bench.pass(0x1000);
    assert!(bench.pit.take_interrupt(bench.now_ns));
    assert!(!bench.pit.take_interrupt(bench.now_ns));
}

#[test]
fn programming_the_channel_gives_up_what_was_not_taken() {
    // A control word, a whole count, half a count.
    for bytes in [&[(CONTROL, 0x34)][..], &[(CHANNEL_0, 0), (CHANNEL_0, 0x10)], &[(CHANNEL_0, 0)]] {
        let mut bench = Bench::new();
        bench.out(CONTROL, 0x34);
        bench.out(CHANNEL_0, 0);
        bench.out(CHANNEL_0, 0x10);
        bench.pass(10 * 0x1000 + 5);
        assert!(bench.pit.has_interrupt(bench.now_ns));
        for (port, value) in bytes {
            bench.out(*port, *value);
        }
        assert!(!bench.pit.has_interrupt(bench.now_ns), "{bytes:?}");
    }
    // Other channels and latches are none of its business.
    let mut bench = Bench::new();
    bench.out(CONTROL, 0x34);
    bench.out(CHANNEL_0, 0);
    bench.out(CHANNEL_0, 0x10);
    bench.pass(2 * 0x1000);
    bench.out(CONTROL, 0x00);
    bench.program(2, 1000);
    assert!(bench.pit.take_interrupt(bench.now_ns) && bench.pit.take_interrupt(bench.now_ns));
}

#[test]
fn one_shots_interrupt_once() {
    for mode in [0u8, 4] {
        let mut bench = Bench::new();
        bench.out(CONTROL, 0x30 | mode << 1);
        bench.out(CHANNEL_0, 100);
        bench.out(CHANNEL_0, 0);
        let start_ns = bench.now_ns;
        let clocks = if mode == 0 { 100 } else { 101 };
        assert_eq!(bench.interrupts(start_ns + 1_000_000_000), [start_ns + ns_of(clocks)]);
        // Another count, another interrupt.
        bench.out(CHANNEL_0, 50);
        bench.out(CHANNEL_0, 0);
        assert_eq!(bench.interrupts(start_ns + 2_000_000_000).len(), 1);
    }
    // Channel 0's gate is wired high: the gate-triggered modes never start.
    let mut bench = Bench::new();
    bench.out(CONTROL, 0x32);
    bench.out(CHANNEL_0, 100);
    bench.out(CHANNEL_0, 0);
    assert_eq!(bench.pit.deadline_ns(), None);
}

#[test]
fn reloads_interrupt_at_the_old_and_then_the_new_period() {
    for (mode, first) in [(2u8, 1000), (3, 1000)] {
        let mut bench = Bench::new();
        bench.out(CONTROL, 0x30 | mode << 1);
        bench.out(CHANNEL_0, (first & 0xff) as u8);
        bench.out(CHANNEL_0, (first >> 8) as u8);
        let start_ns = bench.now_ns;
        bench.pass(700);
        bench.out(CHANNEL_0, 100);
        bench.out(CHANNEL_0, 0);
        let seen = bench.interrupts(start_ns + ns_of(1350));
        let expected = [1000, 1100, 1200, 1300].map(|clocks| start_ns + ns_of(clocks));
        assert_eq!(seen.len(), 4, "mode {mode}");
        for (seen, expected) in seen.iter().zip(expected) {
            assert!(seen.abs_diff(expected) <= 2, "mode {mode}");
        }
    }
}

#[test]
fn very_short_periods_are_thinned_out() {
    for count in [1u8, 2, 3] {
        let mut bench = Bench::new();
        bench.out(CONTROL, 0x14);
        bench.out(CHANNEL_0, count);
        let start_ns = bench.now_ns;
        let seen = bench.interrupts(start_ns + 1_000_000);
        assert!((10..=50).contains(&seen.len()), "count {count}: {}", seen.len());
    }
}

#[test]
fn state_goes_round_in_every_mode() {
    for mode in 0..6u8 {
        for (gate, wait) in [(true, 0), (true, 33), (false, 33), (true, 5000)] {
            let mut bench = Bench::new();
            bench.program(mode, 1000);
            bench.gate(true);
            bench.pass(wait);
            bench.gate(gate);
            bench.out(CHANNEL_2, 0x77);
            bench.out(CONTROL, 0xc8);
            let mut other = Bench { pit: Pit::default(), now_ns: 17 };
            let state = bench.pit.state(bench.now_ns);
            other.pit.set_state(&state, other.now_ns);
            assert_eq!(other.pit.state(other.now_ns), state, "mode {mode}");
            for pit in [&mut bench, &mut other] {
                pit.pass(3);
            }
            // Latched status and count, then the running count and the output, with the gate both ways.
            for step in 0..40 {
                assert_eq!(
                    bench.read(CHANNEL_2),
                    other.read(CHANNEL_2),
                    "mode {mode} gate {gate} step {step}"
                );
                let mask = !system::REFRESH;
                let outputs = (bench.read(SYSTEM_CONTROL) & mask, other.read(SYSTEM_CONTROL) & mask);
                assert_eq!(outputs.0, outputs.1, "mode {mode} gate {gate} step {step}");
                for pit in [&mut bench, &mut other] {
                    pit.pass(61);
                    if step == 20 {
                        pit.gate(!gate);
                    }
                }
            }
        }
    }
}

#[test]
fn a_restored_period_goes_on_where_it_was() {
    let mut bench = Bench::new();
    bench.out(CONTROL, 0x34);
    bench.out(CHANNEL_0, 0);
    bench.out(CHANNEL_0, 0x10);
    bench.pass(0x1800);
    assert!(bench.pit.take_interrupt(bench.now_ns));
    let state = bench.pit.state(bench.now_ns);
    let mut other = Pit::default();
    // The new VM's clock has barely begun.
    other.set_state(&state, 100);
    assert!(!other.take_interrupt(100));
    let wait_ns = other.deadline_ns().unwrap() - 100;
    assert!(wait_ns.abs_diff(ns_of(0x800)) <= 2, "{wait_ns}");
}

proptest::proptest! {
    #[test]
    fn no_sequence_of_accesses_panics(
        steps in proptest::collection::vec((0u8..8, proptest::num::u8::ANY, 0u64..3_000_000), 1..200)
    ) {
        let mut bench = Bench::new();
        for (access, value, pass_ns) in steps {
            bench.now_ns += pass_ns;
            let port = [CHANNEL_0, CHANNEL_0 + 1, CHANNEL_2, CONTROL, SYSTEM_CONTROL][usize::from(access) % 5];
            if access < 6 {
                bench.out(port, value);
            } else {
                bench.read(port);
            }
            let interrupted = bench.pit.take_interrupt(bench.now_ns);
            // After the request is taken, the next deadline lies ahead.
            if interrupted {
                proptest::prop_assert!(bench.pit.deadline_ns().is_none_or(|next| next > bench.now_ns));
            }
            let state = bench.pit.state(bench.now_ns);
            let mut other = Pit::default();
            other.set_state(&state, bench.now_ns);
        }
    }
}
