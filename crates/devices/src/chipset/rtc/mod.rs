//! The real-time clock and its memory: MC146818A (Motorola data sheet) with the century byte, a second bank of 128 bytes
//! behind ports 72h and 73h, and the memory sizes that firmware expects.
//!
//! The clock is set from the host's when the machine starts and then follows guest time. Nothing ticks: the time registers are
//! worked out when they are read, and an alarm is asked for only while an interrupt is enabled whose flag is not set yet.

mod bits;
mod calendar;

use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::access::{AlarmSetting, lock};
use crate::bus::{BusError, PioBus, PioDevice};
use crate::host::{Alarm, Clock, IrqLine, OnAlarm};
use crate::irq::Output;
use crate::snapshot::{Persist, SnapshotError};
use bits::{a, b, c, d};
use calendar::{AlarmTime, DateTime, SECONDS_PER_DAY};

/// First of the chip's four ports.
pub const RTC_BASE: u16 = bits::INDEX_PORT;
/// Interrupt of the clock.
pub const RTC_IRQ: u8 = 8;
/// Index of the century byte, for ACPI's FADT.
pub const CENTURY_INDEX: u8 = bits::CENTURY;
/// Bytes of memory, time registers included.
pub const MEMORY_BYTES: usize = 256;

const BANK_BYTES: usize = 128;
const SECOND: i64 = 1_000_000_000;
/// UIP rises this long before the time changes (data sheet, "Update cycle").
const UPDATE_WARNING_NS: i64 = 244_000;
/// The first update follows the divider's release by half a second.
const DIVIDER_RELEASE_NS: i64 = SECOND / 2;
const CRYSTAL_HZ: i64 = 32_768;
const MIB_16: u64 = 16 << 20;
const KIB_64: u64 = 64 << 10;

/// What a clock starts with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RtcConfig {
    /// Seconds east of UTC that the registers show (0 shows UTC).
    pub utc_offset_seconds: i64,
    /// Memory below 4 GiB in bytes.
    pub low_memory: u64,
    /// Memory above 4 GiB in bytes.
    pub high_memory: u64,
}

/// The time while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Running {
    /// Seconds since 1970 that the registers show ...
    seconds: i64,
    /// ... from this moment of the guest clock on. A boundary of the divider.
    since_ns: i64,
}

struct Inner {
    memory: [u8; MEMORY_BYTES],
    index: [u8; 2],
    /// Register C without its summary bit.
    flags: u8,
    /// `None` while the time stands; the time registers are then what is in `memory`.
    running: Option<Running>,
    /// A moment at which the divider passed a whole second; `None` while it is held.
    divider_ns: Option<i64>,
    /// Flags have been raised for everything up to this moment.
    checked_ns: i64,
    alarm_setting: AlarmSetting,
}

/// The clock.
pub struct Rtc {
    inner: Mutex<Inner>,
    irq: Output,
    clock: Arc<dyn Clock>,
    alarm: Arc<dyn Alarm>,
}

/// Registers of an [`Rtc`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    /// 256 bytes; the time registers in them count only while the time stands.
    pub memory: Vec<u8>,
    /// Selected index of each bank.
    pub index: [u8; 2],
    /// Register C without its summary bit.
    pub flags: u8,
    /// Seconds since 1970 that the registers show, if the time runs.
    pub seconds: Option<i64>,
    /// Nanoseconds since the divider passed a whole second (negative right after its release), unless it is held.
    pub divider_ns: Option<i64>,
}

fn is_time_register(index: u8) -> bool {
    matches!(
        index,
        bits::SECONDS
            | bits::MINUTES
            | bits::HOURS
            | bits::DAY_OF_WEEK
            | bits::DAY_OF_MONTH
            | bits::MONTH
            | bits::YEAR
            | bits::CENTURY
    )
}

impl Inner {
    fn register(&self, index: u8) -> u8 {
        self.memory[usize::from(index) % BANK_BYTES]
    }

    fn set_register(&mut self, index: u8, value: u8) {
        self.memory[usize::from(index) % BANK_BYTES] = value;
    }

    fn mode(&self) -> u8 {
        self.register(bits::REGISTER_B)
    }

    fn seconds_at(&self, now: i64) -> Option<i64> {
        self.running.map(|r| r.seconds + (now - r.since_ns).div_euclid(SECOND))
    }

    /// Writes the time into the registers.
    fn show_time(&mut self, now: i64) {
        let Some(seconds) = self.seconds_at(now) else { return };
        let date = DateTime::from_seconds(seconds);
        let mode = self.mode();
        let two_digits = |value: i64| calendar::encode(mode, value as u8);
        for (index, value) in [
            (bits::SECONDS, calendar::encode(mode, date.second)),
            (bits::MINUTES, calendar::encode(mode, date.minute)),
            (bits::HOURS, calendar::encode_hour(mode, date.hour)),
            (bits::DAY_OF_WEEK, calendar::encode(mode, date.weekday)),
            (bits::DAY_OF_MONTH, calendar::encode(mode, date.day)),
            (bits::MONTH, calendar::encode(mode, date.month)),
            (bits::YEAR, two_digits(date.year % 100)),
            (bits::CENTURY, two_digits(date.year / 100)),
        ] {
            self.set_register(index, value);
        }
    }

    /// Reads the time out of the registers.
    fn composed_time(&self) -> Option<i64> {
        let mode = self.mode();
        let get = |index| calendar::decode(mode, self.register(index));
        let date = DateTime {
            year: i64::from(get(bits::CENTURY)?) * 100 + i64::from(get(bits::YEAR).filter(|y| *y < 100)?),
            month: get(bits::MONTH)?,
            day: get(bits::DAY_OF_MONTH)?,
            hour: calendar::decode_hour(mode, self.register(bits::HOURS))?,
            minute: get(bits::MINUTES)?,
            second: get(bits::SECONDS)?,
            weekday: 1,
        };
        date.to_seconds()
    }

    /// Starts or stops the time as registers A and B say. Registers that show no possible time do not run; they wait to be set.
    fn settle(&mut self, now: i64) {
        let divider = self.divider_ns.filter(|_| self.mode() & b::SET == 0);
        match (divider, self.running) {
            (Some(divider_ns), None) => {
                let since_ns = now - (now - divider_ns).rem_euclid(SECOND);
                self.running = self.composed_time().map(|seconds| Running { seconds, since_ns });
            }
            (None, Some(_)) => {
                self.show_time(now);
                self.running = None;
            }
            _ => {}
        }
    }

    fn alarm_time(&self) -> Option<AlarmTime> {
        let mode = self.mode();
        let part = |index, decode: fn(u8, u8) -> Option<u8>| {
            let value = self.register(index);
            // `None` outside: the alarm can never match; `None` inside: it matches anything.
            if value >= bits::ALARM_ANY { Some(None) } else { decode(mode, value).map(Some) }
        };
        Some(AlarmTime {
            hour: part(bits::HOURS_ALARM, calendar::decode_hour)?,
            minute: part(bits::MINUTES_ALARM, calendar::decode)?,
            second: part(bits::SECONDS_ALARM, calendar::decode)?,
        })
    }

    /// Seconds after `seconds` until the alarm rings.
    fn seconds_until_alarm(&self, seconds: i64) -> Option<i64> {
        self.alarm_time()?.seconds_until(seconds.rem_euclid(SECONDS_PER_DAY))
    }

    /// Nanoseconds of the periodic interrupt, in 1/32768 s steps; `None` if it is off.
    fn periodic_crystals(&self) -> Option<i64> {
        let rate = self.register(bits::REGISTER_A) & a::RATE;
        self.divider_ns?;
        match rate {
            0 => None,
            // The two slowest-looking codes repeat 256 Hz and 128 Hz (data sheet, table 5).
            1 | 2 => Some(1 << (rate + 6)),
            _ => Some(1 << (rate - 1)),
        }
    }

    /// Crystal oscillations since the divider's origin.
    fn crystals(&self, now: i64) -> i64 {
        let since = i128::from(now - self.divider_ns.unwrap_or(now));
        (since * i128::from(CRYSTAL_HZ)).div_euclid(i128::from(SECOND)) as i64
    }

    /// Raises the flags of everything that has happened up to `now`.
    fn catch_up(&mut self, now: i64) {
        let since = std::mem::replace(&mut self.checked_ns, now);
        if now <= since {
            return;
        }
        if let Some(period) = self.periodic_crystals()
            && self.crystals(now).div_euclid(period) != self.crystals(since).div_euclid(period)
        {
            self.flags |= b::PERIODIC;
        }
        if let (Some(before), Some(after)) = (self.seconds_at(since), self.seconds_at(now))
            && after > before
        {
            self.flags |= b::UPDATE;
            if self.seconds_until_alarm(before).is_some_and(|wait| before + wait <= after) {
                self.flags |= b::ALARM;
            }
        }
    }

    /// When the next interrupt that is enabled and not pending is due.
    fn next_event(&self, now: i64) -> Option<i64> {
        let wanted = self.mode() & !self.flags & b::INTERRUPTS;
        let periodic = self.periodic_crystals().filter(|_| wanted & b::PERIODIC != 0).map(|period| {
            let next = (self.crystals(now).div_euclid(period) + 1) * period;
            let ns = (i128::from(next) * i128::from(SECOND) + i128::from(CRYSTAL_HZ) - 1)
                .div_euclid(i128::from(CRYSTAL_HZ));
            self.divider_ns.unwrap_or(now) + ns as i64
        });
        let time = self.running.and_then(|running| {
            let seconds = self.seconds_at(now)?;
            let update = (wanted & b::UPDATE != 0).then_some(1);
            let alarm = if wanted & b::ALARM != 0 { self.seconds_until_alarm(seconds) } else { None };
            let wait = update.into_iter().chain(alarm).min()?;
            Some(running.since_ns + (seconds + wait - running.seconds) * SECOND)
        });
        periodic.into_iter().chain(time).min()
    }

    fn interrupt(&self) -> bool {
        self.flags & self.mode() & b::INTERRUPTS != 0
    }

    fn read(&mut self, index: u8, now: i64) -> u8 {
        match index {
            bits::REGISTER_A => {
                let about_to_change = self.running.is_some_and(|running| {
                    (now - running.since_ns).rem_euclid(SECOND) >= SECOND - UPDATE_WARNING_NS
                });
                self.register(index) | if about_to_change { a::UPDATE_IN_PROGRESS } else { 0 }
            }
            bits::REGISTER_C => {
                let value = self.flags | if self.interrupt() { c::INTERRUPT } else { 0 };
                self.flags = 0;
                value
            }
            bits::REGISTER_D => d::VALID,
            _ => {
                if is_time_register(index) {
                    self.show_time(now);
                }
                self.register(index)
            }
        }
    }

    fn write(&mut self, index: u8, value: u8, now: i64) {
        match index {
            bits::REGISTER_A => {
                self.set_register(index, value & !a::UPDATE_IN_PROGRESS);
                let runs = value & a::DIVIDER == a::DIVIDER_RUNNING;
                if runs && self.divider_ns.is_none() {
                    self.divider_ns = Some(now - (SECOND - DIVIDER_RELEASE_NS));
                } else if !runs {
                    self.show_time(now);
                    self.running = None;
                    self.divider_ns = None;
                }
            }
            bits::REGISTER_B => {
                self.show_time(now);
                // Setting the clock takes the update interrupt away (data sheet, register B, SET).
                let value = if value & b::SET != 0 { value & !b::UPDATE } else { value };
                let format = (value ^ self.mode()) & (b::BINARY | b::HOURS_24);
                self.set_register(index, value);
                if format != 0 && self.running.is_some() {
                    // The time goes on; its registers show it in the new format.
                    self.show_time(now);
                }
            }
            bits::REGISTER_C | bits::REGISTER_D => {}
            _ if is_time_register(index) => {
                self.show_time(now);
                self.set_register(index, value);
                self.running = None;
            }
            _ => self.set_register(index, value),
        }
        self.settle(now);
    }
}

impl Rtc {
    /// A running clock that shows the host's time. `alarm` must call this device back.
    pub fn new(
        config: RtcConfig,
        irq: Arc<dyn IrqLine>,
        clock: Arc<dyn Clock>,
        alarm: Arc<dyn Alarm>,
    ) -> Self {
        let mut memory = [0; MEMORY_BYTES];
        memory[usize::from(bits::REGISTER_A)] = a::POWER_ON;
        memory[usize::from(bits::REGISTER_B)] = b::HOURS_24;
        let mut put = |index: u8, value: u64, bytes: usize| {
            let index = usize::from(index);
            let value = value.min((1 << (8 * bytes)) - 1);
            memory[index..index + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
        };
        put(bits::LOW_MEMORY, config.low_memory.saturating_sub(MIB_16) / KIB_64, 2);
        put(bits::HIGH_MEMORY, config.high_memory / KIB_64, 3);

        let now = clock_ns(&*clock);
        let (seconds, part) = wall_seconds(clock.wall());
        let since_ns = now - part;
        let inner = Inner {
            memory,
            index: [0; 2],
            flags: 0,
            running: Some(Running { seconds: seconds.saturating_add(config.utc_offset_seconds), since_ns }),
            divider_ns: Some(since_ns),
            checked_ns: now,
            alarm_setting: AlarmSetting::default(),
        };
        Rtc { inner: Mutex::new(inner), irq: Output::new(irq), clock, alarm }
    }

    /// Puts the chip on the bus.
    ///
    /// # Errors
    /// Another device is there.
    pub fn attach(self: &Arc<Self>, pio: &PioBus) -> Result<(), BusError> {
        pio.insert(u64::from(RTC_BASE), u64::from(bits::PORTS), "rtc", self.clone())
    }

    /// What the clock shows, in seconds since 1970 (in the guest's time zone); `None` while the guest has stopped it.
    pub fn time(&self) -> Option<i64> {
        lock(&self.inner).seconds_at(clock_ns(&*self.clock))
    }

    /// Sets the clock from outside, as `bhyvectl --set-rtc-time` does. Returns false while the guest has stopped it.
    pub fn set_time(&self, seconds: i64) -> bool {
        self.with_registers(|inner, now| {
            let Some(running) = &mut inner.running else { return false };
            let seconds = seconds.clamp(calendar::FIRST_SECOND, calendar::LAST_SECOND);
            *running = Running { seconds, since_ns: now - (now - running.since_ns).rem_euclid(SECOND) };
            true
        })
    }

    /// A byte of memory, as software would read it, but without clearing flags.
    pub fn memory(&self, index: u8) -> u8 {
        self.with_registers(|inner, now| {
            inner.show_time(now);
            inner.memory[usize::from(index)]
        })
    }

    /// Sets a byte of memory. Returns false for the registers at the beginning, which are not memory.
    pub fn set_memory(&self, index: u8, value: u8) -> bool {
        if index <= bits::REGISTER_D || is_time_register(index) {
            return false;
        }
        lock(&self.inner).memory[usize::from(index)] = value;
        true
    }

    /// Runs `access` on registers that are up to date, then drives the interrupt and the alarm.
    fn with_registers<T>(&self, access: impl FnOnce(&mut Inner, i64) -> T) -> T {
        let mut inner = lock(&self.inner);
        let now = clock_ns(&*self.clock);
        inner.catch_up(now);
        let result = access(&mut inner, now);
        self.irq.set(inner.interrupt());
        let deadline_ns = inner.next_event(now).map(|at| u64::try_from(at).unwrap_or(0));
        inner.alarm_setting.set(&*self.alarm, deadline_ns);
        result
    }
}

fn clock_ns(clock: &dyn Clock) -> i64 {
    i64::try_from(clock.now_ns()).unwrap_or(i64::MAX)
}

/// Whole seconds since 1970, and the nanoseconds after them.
fn wall_seconds(wall: SystemTime) -> (i64, i64) {
    match wall.duration_since(UNIX_EPOCH) {
        Ok(since) => (i64::try_from(since.as_secs()).unwrap_or(0), i64::from(since.subsec_nanos())),
        Err(_) => (0, 0),
    }
}

/// Even ports select a byte, odd ports hold it; the second pair is for the second bank.
impl PioDevice for Rtc {
    fn pio_read(&self, offset: u16, data: &mut [u8]) {
        self.with_registers(|inner, now| {
            for (port, byte) in (offset..).zip(data) {
                *byte = match port {
                    1 => inner.read(inner.index[0], now),
                    3 => inner.memory[BANK_BYTES + usize::from(inner.index[1])],
                    // Index ports cannot be read.
                    _ => 0xff,
                };
            }
        });
    }

    fn pio_write(&self, offset: u16, data: &[u8]) {
        self.with_registers(|inner, now| {
            for (port, byte) in (offset..).zip(data) {
                match port {
                    0 => inner.index[0] = byte & bits::INDEX_MASK,
                    1 => inner.write(inner.index[0], *byte, now),
                    2 => inner.index[1] = byte & bits::INDEX_MASK,
                    3 => inner.memory[BANK_BYTES + usize::from(inner.index[1])] = *byte,
                    _ => {}
                }
            }
        });
    }
}

impl OnAlarm for Rtc {
    fn on_alarm(&self) {
        self.with_registers(|inner, _| inner.alarm_setting.rang());
    }
}

impl Persist for Rtc {
    type State = RtcState;
    const VERSION: u32 = 1;

    fn save(&self) -> RtcState {
        self.with_registers(|inner, now| {
            inner.show_time(now);
            RtcState {
                memory: inner.memory.to_vec(),
                index: inner.index,
                flags: inner.flags,
                seconds: inner.seconds_at(now),
                divider_ns: inner.divider_ns.map(|origin| {
                    let since = now - origin;
                    if since < 0 { since } else { since % SECOND }
                }),
            }
        })
    }

    fn restore(&self, state: RtcState) -> Result<(), SnapshotError> {
        let memory: [u8; MEMORY_BYTES] = state.memory.try_into().map_err(|bytes: Vec<u8>| {
            SnapshotError::Invalid(format!("clock memory of {} bytes", bytes.len()))
        })?;
        if state.divider_ns.is_some_and(|ns| !(-SECOND..SECOND).contains(&ns)) {
            return Err(SnapshotError::Invalid("clock divider outside one second".to_owned()));
        }
        let possible = calendar::FIRST_SECOND..=calendar::LAST_SECOND;
        if state.seconds.is_some_and(|seconds| !possible.contains(&seconds)) {
            return Err(SnapshotError::Invalid("clock outside the years 0 to 9999".to_owned()));
        }
        self.with_registers(|inner, now| {
            let divider_ns = state.divider_ns.map(|since| now - since);
            *inner = Inner {
                memory,
                index: state.index.map(|index| index & bits::INDEX_MASK),
                flags: state.flags & b::INTERRUPTS,
                running: state.seconds.zip(divider_ns).map(|(seconds, origin)| Running {
                    seconds,
                    since_ns: now - (now - origin).rem_euclid(SECOND),
                }),
                divider_ns,
                checked_ns: now,
                alarm_setting: std::mem::take(&mut inner.alarm_setting),
            };
            inner.settle(now);
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests;
