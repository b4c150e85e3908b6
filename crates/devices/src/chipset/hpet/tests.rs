use proptest::prelude::*;

use super::*;
use crate::testing::{Line, ManualAlarm, ManualClock, Messages};

struct Bench {
    hpet: Hpet,
    inputs: Vec<Arc<Line>>,
    legacy: [Arc<Line>; 2],
    messages: Arc<Messages>,
    clock: Arc<ManualClock>,
    alarm: Arc<ManualAlarm>,
}

const ROUTED_20: u64 = 20 << timer::ROUTE_SHIFT;

impl Bench {
    fn new() -> Self {
        Self::with(HpetConfig { legacy_replacement: true, ..HpetConfig::default() })
    }

    fn with(config: HpetConfig) -> Self {
        let inputs: Vec<_> = (0..24).map(|_| Line::new()).collect();
        let legacy = [Line::new(), Line::new()];
        let (messages, clock, alarm) = (Messages::new(), ManualClock::new(0), ManualAlarm::new());
        let lines = HpetLines {
            inputs: inputs.iter().map(|l| Some(l.clone() as Arc<dyn IrqLine>)).collect(),
            legacy: legacy.clone().map(|l| l as Arc<dyn IrqLine>),
            messages: messages.clone(),
        };
        let hpet = Hpet::new(config, lines, clock.clone(), alarm.clone());
        Bench { hpet, inputs, legacy, messages, clock, alarm }
    }

    fn get(&self, register: u64) -> u64 {
        let mut data = [0; 8];
        self.hpet.mmio_read(register, &mut data);
        u64::from_le_bytes(data)
    }

    fn put(&self, register: u64, value: u64) {
        self.hpet.mmio_write(register, &value.to_le_bytes());
    }

    fn put32(&self, register: u64, value: u32) {
        self.hpet.mmio_write(register, &value.to_le_bytes());
    }

    fn ring(&self) {
        self.alarm.ring(&self.clock);
        self.hpet.on_alarm();
    }
}

fn timer(index: u64, register: u64) -> u64 {
    bits::TIMERS + index * bits::TIMER_STRIDE + register
}

#[test]
fn says_what_it_is() {
    let bench = Bench::with(HpetConfig::default());
    let value = bench.get(bits::CAPABILITIES);
    assert_eq!(value >> 32, 59_604_644, "16.777216 MHz in femtoseconds");
    assert_eq!(value as u32, 0x8086_2701);
    assert_eq!(bench.hpet.block_id(), 0x8086_2701);
    assert_eq!(Bench::new().hpet.block_id(), 0x8086_a701);
    assert_eq!(bench.get(timer(0, 0)), 0x00f0_0000_0000_8030);
    let mut half = [0; 4];
    bench.hpet.mmio_read(4, &mut half);
    assert_eq!(u32::from_le_bytes(half), 59_604_644);
    bench.put(bits::CONFIGURATION, 3);
    assert_eq!(bench.get(bits::CONFIGURATION), 1, "legacy replacement is not offered");
}

#[test]
fn counter_runs_while_enabled() {
    let bench = Bench::new();
    bench.clock.advance(1_000_000_000);
    assert_eq!(bench.get(bits::COUNTER), 0);
    bench.put(bits::CONFIGURATION, 1);
    bench.clock.advance(1_000_000_000);
    let count = bench.get(bits::COUNTER);
    assert_eq!(count, 1_000_000_000 * 1_000_000 / PERIOD_FEMTOSECONDS);
    bench.put(bits::CONFIGURATION, 0);
    bench.clock.advance(1_000_000_000);
    assert_eq!(bench.get(bits::COUNTER), count);
    bench.put(bits::COUNTER, u64::MAX);
    bench.put(bits::CONFIGURATION, 1);
    bench.clock.advance(60);
    assert_eq!(bench.get(bits::COUNTER), 0, "wraps");
}

#[test]
fn one_shot_fires_once_at_its_time() {
    let bench = Bench::new();
    bench.put(timer(2, 0), timer::INTERRUPT | ROUTED_20);
    bench.put(timer(2, 8), 1000);
    assert_eq!(bench.alarm.deadline(), None, "the counter stands");
    bench.put(bits::CONFIGURATION, 1);
    let deadline = bench.alarm.deadline().unwrap();
    bench.clock.set(deadline - 1);
    bench.hpet.on_alarm();
    assert_eq!(bench.inputs[20].edges(), 0);
    bench.ring();
    assert_eq!((bench.inputs[20].edges(), bench.inputs[20].level()), (1, false));
    assert_eq!(bench.get(bits::COUNTER), 1000);
    assert_eq!(bench.alarm.deadline(), None);
}

#[test]
fn periodic_as_linux_sets_it_up() {
    let bench = Bench::new();
    bench.put(bits::CONFIGURATION, 1);
    let mode = timer::INTERRUPT | timer::PERIODIC | timer::SET_VALUE | timer::MODE_32;
    bench.put32(timer(0, 0), (mode | ROUTED_20) as u32);
    bench.put32(timer(0, 8), 50_000);
    assert_eq!(bench.get(timer(0, 0)) & timer::SET_VALUE, 0);
    bench.put32(timer(0, 8), 20_000);
    for expected in [50_000, 70_000, 90_000] {
        bench.ring();
        assert_eq!(bench.get(bits::COUNTER), expected);
    }
    assert_eq!(bench.inputs[20].edges(), 3);
    bench.clock.advance(nanoseconds(20_000 * 100));
    bench.hpet.on_alarm();
    assert_eq!(bench.inputs[20].edges(), 4, "matches that came together are one");
    assert_eq!(bench.get(timer(0, 8)), 90_000 + 101 * 20_000);
}

#[test]
fn tiny_periods_do_not_run_the_host_hot() {
    let bench = Bench::new();
    bench.put(bits::CONFIGURATION, 1);
    bench.put(timer(0, 0), timer::INTERRUPT | timer::PERIODIC | timer::SET_VALUE | ROUTED_20);
    bench.put(timer(0, 8), 1);
    for _ in 0..10 {
        let before = bench.clock.now_ns();
        bench.ring();
        assert!(bench.clock.now_ns() >= before + SHORTEST_PERIOD_NS);
    }
}

#[test]
fn level_stays_until_acknowledged() {
    let bench = Bench::new();
    for index in [3, 4] {
        bench.put(timer(index, 0), timer::INTERRUPT | timer::LEVEL | ROUTED_20);
        bench.put(timer(index, 8), 100 * index);
    }
    bench.put(bits::CONFIGURATION, 1);
    bench.ring();
    bench.ring();
    assert_eq!(bench.get(bits::STATUS), 0b11000);
    bench.put(bits::STATUS, 0b1000);
    assert!(bench.inputs[20].level(), "the other timer shares the line");
    bench.put(timer(4, 0), timer::INTERRUPT | timer::LEVEL | 21 << timer::ROUTE_SHIFT);
    assert!(!bench.inputs[20].level() && bench.inputs[21].level());
    bench.put32(bits::STATUS, 0b10000);
    assert!(!bench.inputs[21].level());
}

#[test]
fn routes_that_do_not_exist_are_not_taken() {
    let bench = Bench::new();
    bench.put(timer(0, 0), 5 << timer::ROUTE_SHIFT);
    assert_eq!(bench.get(timer(0, 0)) & timer::ROUTE, 0);
    bench.put(timer(0, 0), 23 << timer::ROUTE_SHIFT);
    assert_eq!(bench.get(timer(0, 0)) & timer::ROUTE, 23 << timer::ROUTE_SHIFT);
}

#[test]
fn messages_and_legacy_replacement() {
    let bench = Bench::new();
    bench.put(timer(0, 0), timer::INTERRUPT | timer::MESSAGE);
    bench.put(timer(0, 16), 0xfee0_1000_0000_4041);
    bench.put(timer(0, 8), 10);
    bench.put(bits::CONFIGURATION, 1);
    bench.ring();
    assert_eq!(bench.messages.take(), [(0xfee0_1000, 0x4041)]);
    bench.put(bits::CONFIGURATION, 3);
    bench.put(timer(0, 8), 1000);
    bench.put(timer(1, 0), timer::INTERRUPT | timer::LEVEL);
    bench.put(timer(1, 8), 2000);
    bench.ring();
    assert_eq!(bench.legacy[0].edges(), 1);
    bench.ring();
    assert!(bench.legacy[1].level());
    bench.put(bits::CONFIGURATION, 1);
    assert!(!bench.legacy[1].level());
    assert_eq!(bench.messages.take(), []);
}

#[test]
fn odd_accesses_do_nothing() {
    let bench = Bench::new();
    bench.hpet.mmio_write(bits::CONFIGURATION, &[1]);
    bench.hpet.mmio_write(bits::CONFIGURATION + 4, &[1; 8]);
    assert_eq!(bench.get(bits::CONFIGURATION), 0);
    let mut data = [0xaa; 3];
    bench.hpet.mmio_read(0, &mut data);
    assert_eq!(data, [0; 3]);
}

proptest! {
    #[test]
    fn any_use_survives_saving(
        accesses in proptest::collection::vec(
            (prop_oneof![0u64..0x20, 0x20u64..0x80].prop_map(|n| n * 8), any::<u64>(), any::<bool>(), 0u64..1 << 34), 0..60),
        later in 0u64..1 << 50,
    ) {
        let bench = Bench::new();
        for (register, value, wide, wait) in accesses {
            if wide { bench.put(register, value) } else { bench.put32(register | value & 4, value as u32) }
            bench.clock.advance(wait);
            bench.get(register);
            if let Some(deadline) = bench.alarm.deadline() {
                prop_assert!(deadline > bench.clock.now_ns());
            }
        }
        let copy = Bench::new();
        copy.clock.set(later);
        let saved = serde_json::to_string(&bench.hpet.save()).unwrap();
        copy.hpet.restore(serde_json::from_str(&saved).unwrap()).unwrap();
        for register in (0..HPET_BYTES).step_by(8) {
            prop_assert_eq!(bench.get(register), copy.get(register), "register {:#x}", register);
        }
        for (one, two) in bench.inputs.iter().zip(&copy.inputs) {
            prop_assert_eq!(one.level(), two.level());
        }
    }
}
