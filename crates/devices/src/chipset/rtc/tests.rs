use proptest::prelude::*;

use super::*;
use crate::testing::{Line, ManualAlarm, ManualClock};

/// 2026-07-31 23:59:58 UTC, a Friday.
const START: u64 = 1_785_542_398;
const SECOND_NS: u64 = SECOND as u64;

struct Bench {
    rtc: Rtc,
    irq: Arc<Line>,
    clock: Arc<ManualClock>,
    alarm: Arc<ManualAlarm>,
}

impl Bench {
    fn new() -> Self {
        Self::with(RtcConfig::default())
    }

    fn with(config: RtcConfig) -> Self {
        let (irq, clock, alarm) = (Line::new(), ManualClock::new(START), ManualAlarm::new());
        Bench { rtc: Rtc::new(config, irq.clone(), clock.clone(), alarm.clone()), irq, clock, alarm }
    }

    fn get(&self, index: u8) -> u8 {
        self.rtc.pio_write(0, &[index]);
        let mut byte = [0];
        self.rtc.pio_read(1, &mut byte);
        byte[0]
    }

    fn put(&self, index: u8, value: u8) {
        self.rtc.pio_write(0, &[index]);
        self.rtc.pio_write(1, &[value]);
    }

    fn date(&self) -> [u8; 8] {
        [
            bits::CENTURY,
            bits::YEAR,
            bits::MONTH,
            bits::DAY_OF_MONTH,
            bits::HOURS,
            bits::MINUTES,
            bits::SECONDS,
            bits::DAY_OF_WEEK,
        ]
        .map(|index| self.get(index))
    }

    /// Moves to the deadline and rings.
    fn ring(&self) -> u64 {
        let deadline = self.alarm.ring(&self.clock);
        self.rtc.on_alarm();
        deadline
    }
}

#[test]
fn shows_the_hosts_time_and_follows_the_guests() {
    let bench = Bench::new();
    assert_eq!(bench.date(), [0x20, 0x26, 0x07, 0x31, 0x23, 0x59, 0x58, 0x06]);
    bench.clock.advance(2 * SECOND_NS);
    assert_eq!(bench.date(), [0x20, 0x26, 0x08, 0x01, 0x00, 0x00, 0x00, 0x07]);
    assert_eq!(bench.get(bits::REGISTER_D), d::VALID);
    let tokyo = Bench::with(RtcConfig { utc_offset_seconds: 9 * 3600, ..RtcConfig::default() });
    assert_eq!(tokyo.date(), [0x20, 0x26, 0x08, 0x01, 0x08, 0x59, 0x58, 0x07]);
}

#[test]
fn formats_follow_register_b() {
    let bench = Bench::new();
    bench.put(bits::REGISTER_B, b::BINARY);
    assert_eq!(bench.date(), [20, 26, 7, 31, 11 | bits::PM, 59, 58, 6]);
    bench.put(bits::REGISTER_B, b::BINARY | b::HOURS_24);
    assert_eq!(bench.get(bits::HOURS), 23);
}

#[test]
fn is_set_while_halted() {
    let bench = Bench::new();
    bench.put(bits::REGISTER_B, b::SET | b::HOURS_24 | b::UPDATE);
    assert_eq!(bench.get(bits::REGISTER_B) & b::UPDATE, 0, "SET clears the update interrupt");
    for (index, value) in [
        (bits::CENTURY, 0x19),
        (bits::YEAR, 0x99),
        (bits::MONTH, 0x12),
        (bits::DAY_OF_MONTH, 0x31),
        (bits::HOURS, 0x23),
        (bits::MINUTES, 0x59),
        (bits::SECONDS, 0x59),
    ] {
        bench.put(index, value);
    }
    bench.clock.advance(10 * SECOND_NS);
    assert_eq!(bench.get(bits::SECONDS), 0x59, "the time stands");
    assert_eq!(bench.rtc.time(), None);
    bench.put(bits::REGISTER_B, b::HOURS_24);
    bench.clock.advance(SECOND_NS);
    assert_eq!(bench.date(), [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00, 0x07]);
}

#[test]
fn divider_reset_holds_the_time() {
    let bench = Bench::new();
    bench.put(bits::REGISTER_A, 0x76);
    bench.clock.advance(100 * SECOND_NS);
    assert_eq!(bench.get(bits::SECONDS), 0x58);
    bench.put(bits::REGISTER_A, a::POWER_ON);
    bench.clock.advance(SECOND_NS / 2 - 1);
    assert_eq!(bench.get(bits::SECONDS), 0x58);
    assert_ne!(bench.get(bits::REGISTER_A) & a::UPDATE_IN_PROGRESS, 0);
    bench.clock.advance(1);
    assert_eq!(bench.get(bits::SECONDS), 0x59, "half a second after the release");
    assert_eq!(bench.get(bits::REGISTER_A) & a::UPDATE_IN_PROGRESS, 0);
}

#[test]
fn nonsense_stands_until_it_makes_sense() {
    let bench = Bench::new();
    bench.put(bits::MONTH, 0xee);
    bench.clock.advance(5 * SECOND_NS);
    assert_eq!(bench.get(bits::MONTH), 0xee);
    assert_eq!(bench.get(bits::SECONDS), 0x58);
    bench.put(bits::MONTH, 0x10);
    bench.clock.advance(SECOND_NS);
    assert_eq!(bench.date()[..7], [0x20, 0x26, 0x10, 0x31, 0x23, 0x59, 0x59]);
}

#[test]
fn update_interrupt_comes_every_second() {
    let bench = Bench::new();
    assert_eq!(bench.alarm.deadline(), None, "nothing enabled, nothing ticks");
    bench.put(bits::REGISTER_B, b::HOURS_24 | b::UPDATE);
    assert_eq!(bench.ring(), SECOND_NS);
    assert!(bench.irq.level());
    assert_eq!(bench.alarm.deadline(), None, "no further one before this one is seen");
    assert_eq!(bench.get(bits::REGISTER_C), c::INTERRUPT | b::UPDATE | b::PERIODIC);
    assert!(!bench.irq.level());
    assert_eq!(bench.get(bits::REGISTER_C), 0);
    assert_eq!(bench.ring(), 2 * SECOND_NS);
}

#[test]
fn alarm_interrupts_at_its_time() {
    let bench = Bench::new();
    bench.put(bits::HOURS_ALARM, 0x00);
    bench.put(bits::MINUTES_ALARM, 0x01);
    bench.put(bits::SECONDS_ALARM, 0x30);
    bench.put(bits::REGISTER_B, b::HOURS_24 | b::ALARM);
    assert_eq!(bench.ring(), 92 * SECOND_NS);
    assert!(bench.irq.level());
    assert_ne!(bench.get(bits::REGISTER_C) & b::ALARM, 0);
    // "Any" in all parts: every second.
    for index in [bits::HOURS_ALARM, bits::MINUTES_ALARM, bits::SECONDS_ALARM] {
        bench.put(index, 0xff);
    }
    assert_eq!(bench.ring(), 93 * SECOND_NS);
    bench.get(bits::REGISTER_C);
    bench.put(bits::MINUTES_ALARM, 0x7a);
    assert_eq!(bench.alarm.deadline(), None, "never");
}

#[test]
fn a_missed_alarm_is_still_flagged() {
    let bench = Bench::new();
    bench.put(bits::HOURS_ALARM, 0x12);
    bench.clock.advance(86_400 * SECOND_NS * 400);
    assert_eq!(bench.get(bits::REGISTER_C), b::ALARM | b::UPDATE | b::PERIODIC);
    assert!(!bench.irq.level());
}

#[test]
fn periodic_interrupt_has_the_rate_of_register_a() {
    let bench = Bench::new();
    bench.put(bits::REGISTER_A, a::DIVIDER_RUNNING | 6);
    bench.put(bits::REGISTER_B, b::HOURS_24 | b::PERIODIC);
    let mut previous = 0;
    for _ in 0..1024 {
        let now = bench.ring();
        assert!((976_562..=976_563).contains(&(now - previous)));
        previous = now;
        assert!(bench.irq.level());
        assert_ne!(bench.get(bits::REGISTER_C) & b::PERIODIC, 0);
    }
    assert_eq!(previous, SECOND_NS, "no drift");
    bench.put(bits::REGISTER_A, a::DIVIDER_RUNNING | 1);
    assert_eq!(bench.ring() - previous, SECOND_NS / 256);
    bench.put(bits::REGISTER_A, a::DIVIDER_RUNNING);
    bench.get(bits::REGISTER_C);
    assert_eq!(bench.alarm.deadline(), None);
}

#[test]
fn memory_sizes_and_both_banks() {
    let bench = Bench::with(RtcConfig { low_memory: 3 << 30, high_memory: 5 << 30, ..RtcConfig::default() });
    let low = u16::from_le_bytes([bench.get(0x34), bench.get(0x35)]);
    assert_eq!(u64::from(low) * KIB_64, (3 << 30) - MIB_16);
    let high = u32::from_le_bytes([bench.get(0x5b), bench.get(0x5c), bench.get(0x5d), 0]);
    assert_eq!(u64::from(high) * KIB_64, 5 << 30);
    bench.put(0x80 | 0x40, 0x11);
    assert_eq!(bench.get(0x40), 0x11, "the top bit masks NMI and does not select");
    bench.rtc.pio_write(2, &[0x40]);
    bench.rtc.pio_write(3, &[0x22]);
    assert_eq!((bench.rtc.memory(0x40), bench.rtc.memory(0xc0)), (0x11, 0x22));
    assert!(bench.rtc.set_memory(0x41, 0x33) && !bench.rtc.set_memory(bits::CENTURY, 0));
    assert_eq!(bench.get(0x41), 0x33);
}

#[test]
fn can_be_set_from_outside() {
    let bench = Bench::new();
    bench.clock.advance(SECOND_NS / 4);
    assert!(bench.rtc.set_time(0));
    assert_eq!(bench.rtc.time(), Some(0));
    bench.clock.advance(3 * SECOND_NS / 4);
    assert_eq!(bench.rtc.time(), Some(1), "the divider went on");
}

proptest! {
    #[test]
    fn any_use_survives_saving(
        accesses in proptest::collection::vec((0u8..0x40, any::<u8>(), 0u64..1 << 36), 0..60), later in 0u64..1 << 50,
    ) {
        let bench = Bench::new();
        for (index, value, wait) in accesses {
            bench.put(index, value);
            bench.clock.advance(wait);
            bench.get(index);
            if let Some(deadline) = bench.alarm.deadline() {
                prop_assert!(deadline > bench.clock.now_ns());
            }
        }
        let copy = Bench::new();
        copy.clock.set(later);
        let saved = serde_json::to_string(&bench.rtc.save()).unwrap();
        copy.rtc.restore(serde_json::from_str(&saved).unwrap()).unwrap();
        prop_assert_eq!(bench.irq.level(), copy.irq.level());
        for _ in 0..2 {
            for index in 0..0x80 {
                prop_assert_eq!(bench.get(index), copy.get(index), "index {:#x}", index);
            }
            bench.clock.advance(SECOND_NS * 7 / 3);
            copy.clock.advance(SECOND_NS * 7 / 3);
        }
    }
}
