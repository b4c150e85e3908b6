//! The high precision event timer (IA-PC HPET Specification 1.0a): a 64-bit counter at bhyve's 16.777216 MHz and eight timers,
//! all of them able to be periodic and to send messages.
//!
//! Nothing ticks: the counter is worked out from the guest clock when it is read, and one alarm is set for the earliest match
//! that somebody would notice. Matches that came due together are delivered as one.

mod bits;

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::access::{AlarmSetting, lock, merge, store_from};
use crate::bus::{BusError, MmioBus, MmioDevice};
use crate::host::{Alarm, Clock, IrqLine, MsiSink, OnAlarm};
use crate::irq::Output;
use crate::snapshot::{Persist, SnapshotError};
use bits::{capabilities, configuration, timer};

/// Where the registers are.
pub const HPET_BASE: u64 = 0xfed0_0000;
/// Length of the register space.
pub const HPET_BYTES: u64 = 0x400;
/// Number of timers.
pub const TIMERS: usize = 8;
/// Length of a tick in femtoseconds: 2^24 Hz.
pub const PERIOD_FEMTOSECONDS: u64 = 1_000_000_000_000_000 / (1 << 24);
/// Interrupt inputs that timers can use unless told otherwise: IOAPIC inputs 20 to 23.
pub const DEFAULT_ROUTES: u32 = 0x00f0_0000;

const VENDOR: u64 = 0x8086;
const FEMTOSECONDS_PER_NANOSECOND: u128 = 1_000_000;
/// A guest may ask for periods of a few nanoseconds; nobody could deliver them, so matches nearer than this are delivered
/// together.
const SHORTEST_PERIOD_NS: u64 = 50_000;

/// What a particular HPET can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HpetConfig {
    /// Interrupt inputs that timers can be routed to, one bit each.
    pub routes: u32,
    /// Whether timers 0 and 1 can take the places of the 8254 and the RTC. bhyve's cannot.
    pub legacy_replacement: bool,
}

impl Default for HpetConfig {
    fn default() -> Self {
        HpetConfig { routes: DEFAULT_ROUTES, legacy_replacement: false }
    }
}

/// Where interrupts go.
pub struct HpetLines {
    /// Interrupt input `n` at index `n`, as far as [`HpetConfig::routes`] needs them.
    pub inputs: Vec<Option<Arc<dyn IrqLine>>>,
    /// The lines that stand for IRQ 0 and IRQ 8 in legacy replacement mode.
    pub legacy: [Arc<dyn IrqLine>; 2],
    /// Carries messages.
    pub messages: Arc<dyn MsiSink>,
}

#[derive(Clone, Copy, Default)]
struct Timer {
    /// The writable bits of the configuration register.
    configuration: u64,
    comparator: u64,
    period: u64,
    message: u64,
    /// Ticks after [`Registers::start_ns`] at which the comparator matches next.
    match_at: Option<u64>,
}

impl Timer {
    fn is(&self, bit: u64) -> bool {
        self.configuration & bit != 0
    }

    fn route(&self) -> usize {
        ((self.configuration & timer::ROUTE) >> timer::ROUTE_SHIFT) as usize
    }

    fn width_mask(&self) -> u64 {
        if self.is(timer::MODE_32) { u64::from(u32::MAX) } else { u64::MAX }
    }

    /// Works out when the comparator matches, at a moment when the counter shows `counter` and has run for `elapsed` ticks.
    fn arm(&mut self, counter: u64, elapsed: u64) {
        let mask = self.width_mask();
        let mut wait = self.comparator.wrapping_sub(counter) & mask;
        if self.is(timer::PERIODIC) && self.period != 0 && wait > mask / 2 {
            // Already past: the next match is a whole number of periods later.
            let behind = counter.wrapping_sub(self.comparator) & mask;
            let periods = behind / self.period + 1;
            self.comparator = self.comparator.wrapping_add(periods.wrapping_mul(self.period)) & mask;
            wait = self.comparator.wrapping_sub(counter) & mask;
        }
        self.match_at = elapsed.checked_add(wait);
    }

    /// Whether the comparator has matched by `elapsed`; moves on to the next match.
    fn take_match(&mut self, elapsed: u64) -> bool {
        let Some(at) = self.match_at.filter(|at| *at <= elapsed) else { return false };
        let period = match self.period {
            period if self.is(timer::PERIODIC) && period != 0 => period,
            // The counter comes round to a 32-bit comparator again.
            _ if self.is(timer::MODE_32) => 1 << 32,
            // A 64-bit one it does not reach again in a lifetime.
            _ => {
                self.match_at = None;
                return true;
            }
        };
        let periods = (elapsed - at) / period + 1;
        let distance = periods.saturating_mul(period);
        self.match_at = at.checked_add(distance);
        if self.is(timer::PERIODIC) {
            self.comparator = self.comparator.wrapping_add(distance) & self.width_mask();
        }
        true
    }
}

#[derive(Default)]
struct Registers {
    configuration: u64,
    status: u64,
    /// The counter when it was started, or while it stands.
    counter: u64,
    /// Guest time at which it was started.
    start_ns: u64,
    timers: [Timer; TIMERS],
    /// Outputs that are asserted, one bit each as [`Registers::output`] numbers them.
    asserted: u64,
    alarm_setting: AlarmSetting,
}

/// Number of the first legacy line among the outputs; interrupt inputs come before.
const LEGACY_OUTPUTS: usize = 32;

fn ticks(ns: u64) -> u64 {
    (u128::from(ns) * FEMTOSECONDS_PER_NANOSECOND / u128::from(PERIOD_FEMTOSECONDS)) as u64
}

/// The first nanosecond at which [`ticks`] gives `count`.
fn nanoseconds(count: u64) -> u64 {
    let ns = (u128::from(count) * u128::from(PERIOD_FEMTOSECONDS)).div_ceil(FEMTOSECONDS_PER_NANOSECOND);
    u64::try_from(ns).unwrap_or(u64::MAX)
}

impl Registers {
    fn runs(&self) -> bool {
        self.configuration & configuration::ENABLE != 0
    }

    fn legacy(&self) -> bool {
        self.configuration & configuration::LEGACY_REPLACEMENT != 0
    }

    /// Ticks since the counter was started.
    fn elapsed(&self, now_ns: u64) -> u64 {
        if self.runs() { ticks(now_ns.saturating_sub(self.start_ns)) } else { 0 }
    }

    fn counter_at(&self, now_ns: u64) -> u64 {
        self.counter.wrapping_add(self.elapsed(now_ns))
    }

    /// Sets the counter, running or not, and works out all matches anew.
    fn set_counter(&mut self, value: u64, now_ns: u64) {
        self.counter = value;
        self.start_ns = now_ns;
        for index in 0..TIMERS {
            self.arm(index, now_ns);
        }
    }

    /// The output that a timer's interrupts go to; `None` if they are messages.
    fn output(&self, index: usize) -> Option<usize> {
        let timer = &self.timers[index];
        if self.legacy() && index < 2 {
            Some(LEGACY_OUTPUTS + index)
        } else if timer.is(timer::MESSAGE) {
            None
        } else {
            Some(timer.route())
        }
    }

    /// Outputs that level-triggered timers assert.
    fn levels(&self) -> u64 {
        let wanted = timer::LEVEL | timer::INTERRUPT;
        let asserting = |index: &usize| {
            self.runs()
                && self.timers[*index].configuration & wanted == wanted
                && self.status & 1 << index != 0
        };
        (0..TIMERS)
            .filter(asserting)
            .filter_map(|index| self.output(index))
            .fold(0, |all, output| all | 1 << output)
    }

    fn arm(&mut self, index: usize, now_ns: u64) {
        let (counter, elapsed) = (self.counter_at(now_ns), self.elapsed(now_ns));
        let runs = self.runs();
        let timer = &mut self.timers[index];
        timer.match_at = None;
        if runs {
            timer.arm(counter, elapsed);
        }
    }
}

/// The chip.
pub struct Hpet {
    registers: Mutex<Registers>,
    config: HpetConfig,
    /// Interrupt inputs, then at [`LEGACY_OUTPUTS`] the legacy lines.
    outputs: Vec<Option<Output>>,
    messages: Arc<dyn MsiSink>,
    clock: Arc<dyn Clock>,
    alarm: Arc<dyn Alarm>,
}

/// Registers of an [`Hpet`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct HpetState {
    pub configuration: u64,
    pub status: u64,
    pub counter: u64,
    pub timers: Vec<HpetTimerState>,
}

/// Registers of one timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HpetTimerState {
    /// Writable bits of the configuration register.
    pub configuration: u64,
    /// Value of the comparator register.
    pub comparator: u64,
    /// Ticks between matches in periodic mode.
    pub period: u64,
    /// Message address and data register.
    pub message: u64,
    /// Ticks to the next match while the counter runs.
    pub ticks_to_match: Option<u64>,
}

impl Hpet {
    /// A chip after power-up: the counter stands at zero. `alarm` must call this device back.
    pub fn new(config: HpetConfig, lines: HpetLines, clock: Arc<dyn Clock>, alarm: Arc<dyn Alarm>) -> Self {
        let mut registers = Registers::default();
        for timer in &mut registers.timers {
            timer.comparator = u64::MAX;
        }
        let mut outputs: Vec<Option<Output>> =
            lines.inputs.into_iter().map(|line| line.map(Output::new)).take(LEGACY_OUTPUTS).collect();
        outputs.resize_with(LEGACY_OUTPUTS, || None);
        outputs.extend(lines.legacy.map(|line| Some(Output::new(line))));
        let messages = lines.messages;
        Hpet { registers: Mutex::new(registers), config, outputs, messages, clock, alarm }
    }

    /// Puts the chip on the bus.
    ///
    /// # Errors
    /// Another device is there.
    pub fn attach(self: &Arc<Self>, mmio: &MmioBus) -> Result<(), BusError> {
        mmio.insert(HPET_BASE, HPET_BYTES, "hpet", self.clone())
    }

    /// The low half of the capabilities register, which ACPI's HPET table repeats.
    pub fn block_id(&self) -> u32 {
        self.capabilities() as u32
    }

    fn capabilities(&self) -> u64 {
        capabilities::REVISION
            | (TIMERS as u64 - 1) << capabilities::LAST_TIMER_SHIFT
            | capabilities::COUNTER_64
            | if self.config.legacy_replacement { capabilities::LEGACY_REPLACEMENT } else { 0 }
            | VENDOR << capabilities::VENDOR_SHIFT
            | PERIOD_FEMTOSECONDS << capabilities::PERIOD_SHIFT
    }

    fn timer_capabilities(&self) -> u64 {
        timer::PERIODIC_CAPABLE
            | timer::WIDE_CAPABLE
            | timer::MESSAGE_CAPABLE
            | u64::from(self.config.routes) << timer::ROUTES_SHIFT
    }

    /// Delivers every match up to now.
    fn catch_up(&self, registers: &mut Registers, now_ns: u64) {
        let elapsed = registers.elapsed(now_ns);
        for index in 0..TIMERS {
            if !registers.timers[index].take_match(elapsed) {
                continue;
            }
            let timer = registers.timers[index];
            match registers.output(index) {
                Some(_) if timer.is(timer::LEVEL) => registers.status |= 1 << index,
                _ if !timer.is(timer::INTERRUPT) => {}
                Some(output) => {
                    if let Some(Some(line)) = self.outputs.get(output) {
                        line.pulse();
                    }
                }
                None => self.messages.send(timer.message >> 32, timer.message as u32),
            }
        }
    }

    /// Drives level-triggered lines and the alarm.
    fn update(&self, registers: &mut Registers, now_ns: u64) {
        let asserted = registers.levels();
        let changed = asserted ^ std::mem::replace(&mut registers.asserted, asserted);
        for (output, line) in self.outputs.iter().enumerate() {
            if changed & 1 << output != 0
                && let Some(line) = line
            {
                line.set(asserted & 1 << output != 0);
            }
        }
        let deadline_ns = (0..TIMERS)
            .filter_map(|index| {
                let timer = &registers.timers[index];
                let told = timer.is(timer::LEVEL) && registers.status & 1 << index != 0;
                if told || !timer.is(timer::INTERRUPT) {
                    return None;
                }
                let at = registers.start_ns.saturating_add(nanoseconds(timer.match_at?));
                let crowded = timer.is(timer::PERIODIC) && nanoseconds(timer.period) < SHORTEST_PERIOD_NS;
                Some(if crowded { at.max(now_ns.saturating_add(SHORTEST_PERIOD_NS)) } else { at })
            })
            .min();
        registers.alarm_setting.set(&*self.alarm, deadline_ns);
    }

    /// Runs `access` on registers that are up to date, then drives the outputs.
    fn with_registers<T>(&self, access: impl FnOnce(&mut Registers, u64) -> T) -> T {
        let mut registers = lock(&self.registers);
        let now_ns = self.clock.now_ns();
        self.catch_up(&mut registers, now_ns);
        let result = access(&mut registers, now_ns);
        // An access may have brought a match about.
        self.catch_up(&mut registers, now_ns);
        self.update(&mut registers, now_ns);
        result
    }

    fn read(&self, registers: &Registers, register: u64, now_ns: u64) -> u64 {
        match register {
            bits::CAPABILITIES => self.capabilities(),
            bits::CONFIGURATION => registers.configuration,
            bits::STATUS => registers.status,
            bits::COUNTER => registers.counter_at(now_ns),
            _ => match timer_register(register) {
                Some((index, bits::TIMER_CONFIGURATION)) => {
                    registers.timers[index].configuration | self.timer_capabilities()
                }
                Some((index, bits::TIMER_COMPARATOR)) => registers.timers[index].comparator,
                Some((index, bits::TIMER_MESSAGE)) => registers.timers[index].message,
                _ => 0,
            },
        }
    }

    fn write(&self, registers: &mut Registers, register: u64, skip: u64, data: &[u8], now_ns: u64) {
        let value = merge(self.read(registers, register, now_ns), data, skip);
        match register {
            bits::CONFIGURATION => self.configure(registers, value, now_ns),
            // Ones clear; bytes that were not written clear nothing.
            bits::STATUS => registers.status &= !merge(0, data, skip),
            bits::COUNTER => registers.set_counter(value, now_ns),
            _ => match timer_register(register) {
                Some((index, bits::TIMER_CONFIGURATION)) => {
                    self.configure_timer(registers, index, value, now_ns)
                }
                Some((index, bits::TIMER_COMPARATOR)) => {
                    let timer = &mut registers.timers[index];
                    let mask = timer.width_mask();
                    if timer.is(timer::PERIODIC) {
                        timer.period = merge(timer.period, data, skip) & mask;
                    }
                    // A write with SET_VALUE sets both; some guests write only once.
                    if !timer.is(timer::PERIODIC) || timer.is(timer::SET_VALUE) {
                        timer.comparator = value & mask;
                        timer.configuration &= !timer::SET_VALUE;
                        registers.arm(index, now_ns);
                    }
                }
                Some((index, bits::TIMER_MESSAGE)) => registers.timers[index].message = value,
                _ => {}
            },
        }
    }

    fn configure(&self, registers: &mut Registers, value: u64, now_ns: u64) {
        let mut allowed = configuration::ENABLE;
        if self.config.legacy_replacement {
            allowed |= configuration::LEGACY_REPLACEMENT;
        }
        let counter = registers.counter_at(now_ns);
        let changed = (value & allowed) ^ registers.configuration;
        if changed == 0 {
            return;
        }
        registers.configuration = value & allowed;
        if changed & configuration::ENABLE != 0 {
            registers.set_counter(counter, now_ns);
        }
    }

    fn configure_timer(&self, registers: &mut Registers, index: usize, value: u64, now_ns: u64) {
        let mut value = value & timer::WRITABLE;
        let route = (value & timer::ROUTE) >> timer::ROUTE_SHIFT;
        if self.config.routes & 1 << route == 0 {
            // Software reads back whether its choice was taken (§2.3.8, Tn_INT_ROUTE_CNF).
            value &= !timer::ROUTE;
        }
        let timer = &mut registers.timers[index];
        let old = std::mem::replace(&mut timer.configuration, value);
        if value & timer::LEVEL == 0 {
            registers.status &= !(1 << index);
        }
        if value & timer::MODE_32 != 0 {
            timer.comparator &= u64::from(u32::MAX);
            timer.period &= u64::from(u32::MAX);
        }
        if (old ^ value) & (timer::PERIODIC | timer::MODE_32) != 0 {
            registers.arm(index, now_ns);
        }
    }
}

/// Timer and register within it.
fn timer_register(register: u64) -> Option<(usize, u64)> {
    let offset = register.checked_sub(bits::TIMERS)?;
    let index = usize::try_from(offset / bits::TIMER_STRIDE).ok().filter(|index| *index < TIMERS)?;
    Some((index, offset % bits::TIMER_STRIDE))
}

/// Accesses are 4 or 8 bytes, aligned (§2.3.1); others read as zero and write nothing.
fn place(offset: u64, len: usize) -> Option<(u64, u64)> {
    (matches!(len, 4 | 8) && offset.is_multiple_of(len as u64)).then_some((offset & !7, offset & 7))
}

impl MmioDevice for Hpet {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        let Some((register, skip)) = place(offset, data.len()) else {
            data.fill(0);
            return;
        };
        let value = self.with_registers(|registers, now_ns| self.read(registers, register, now_ns));
        store_from(data, value, skip);
    }

    fn mmio_write(&self, offset: u64, data: &[u8]) {
        if let Some((register, skip)) = place(offset, data.len()) {
            self.with_registers(|registers, now_ns| self.write(registers, register, skip, data, now_ns));
        }
    }
}

impl OnAlarm for Hpet {
    fn on_alarm(&self) {
        self.with_registers(|registers, _| registers.alarm_setting.rang());
    }
}

impl Persist for Hpet {
    type State = HpetState;
    const VERSION: u32 = 1;

    fn save(&self) -> HpetState {
        self.with_registers(|registers, now_ns| {
            let elapsed = registers.elapsed(now_ns);
            HpetState {
                configuration: registers.configuration,
                status: registers.status,
                counter: registers.counter_at(now_ns),
                timers: registers
                    .timers
                    .iter()
                    .map(|t| HpetTimerState {
                        configuration: t.configuration,
                        comparator: t.comparator,
                        period: t.period,
                        message: t.message,
                        ticks_to_match: t.match_at.map(|at| at.saturating_sub(elapsed)),
                    })
                    .collect(),
            }
        })
    }

    fn restore(&self, state: HpetState) -> Result<(), SnapshotError> {
        let timers: [HpetTimerState; TIMERS] = state.timers.try_into().map_err(|t: Vec<_>| {
            SnapshotError::Invalid(format!("HPET with {} timers, this one has {TIMERS}", t.len()))
        })?;
        let legacy = state.configuration & configuration::LEGACY_REPLACEMENT != 0;
        if legacy && !self.config.legacy_replacement {
            return Err(SnapshotError::Invalid("HPET in legacy replacement mode".to_owned()));
        }
        self.with_registers(|registers, now_ns| {
            *registers = Registers {
                configuration: state.configuration
                    & (configuration::ENABLE | configuration::LEGACY_REPLACEMENT),
                status: state.status & ((1 << TIMERS) - 1),
                counter: state.counter,
                start_ns: now_ns,
                timers: timers.map(|t| Timer {
                    configuration: t.configuration & timer::WRITABLE,
                    comparator: t.comparator,
                    period: t.period,
                    message: t.message,
                    match_at: t.ticks_to_match,
                }),
                asserted: registers.asserted,
                alarm_setting: std::mem::take(&mut registers.alarm_setting),
            };
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests;
