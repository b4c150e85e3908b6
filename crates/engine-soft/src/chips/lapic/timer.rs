//! The timer of a local APIC (SDM 3A §10.5.4): counts down at the bus clock through a divider, once or
//! periodically, or waits for the TSC to reach a deadline.
//!
//! No tick is ever counted: the count is derived from the time since it was loaded, and the periodic deadlines
//! are whole periods after it, so nothing drifts however late the alarm rings. Periods that passed unnoticed
//! become one interrupt, as on a processor whose interrupt was held off that long.

use super::bits::{DIVIDE_MASK, lvt};
use crate::chips::VcpuTime;

/// Frequency of the counter before the divider. CPUID leaf 15H reports the same where the model shows it.
pub const BUS_HZ: u64 = 1_000_000_000;
/// Length of one undivided tick.
const TICK_NS: u64 = 1_000_000_000 / BUS_HZ;

/// The shortest time from one periodic interrupt to the next, so that a guest cannot keep the host's alarm
/// thread busy with a period of a few nanoseconds.
pub const SHORTEST_PERIOD_NS: u64 = 20_000;

/// Timer mode field of the LVT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Count down once.
    OneShot,
    /// Reload at zero.
    Periodic,
    /// Fire when the TSC reaches IA32_TSC_DEADLINE.
    TscDeadline,
    /// Encoding 11b: never fires.
    Reserved,
}

impl Mode {
    /// Decodes the mode from an LVT register.
    pub fn from_lvt(value: u32) -> Self {
        match (value & lvt::TIMER_MODE) >> lvt::TIMER_MODE_SHIFT {
            0 => Mode::OneShot,
            1 => Mode::Periodic,
            2 => Mode::TscDeadline,
            _ => Mode::Reserved,
        }
    }
}

/// The timer's registers, except its LVT entry.
#[derive(Clone, Debug)]
pub struct Timer {
    mode: Mode,
    initial: u32,
    divide: u32,
    /// Time at which `initial` was loaded, or would have been, had the divider always been the present one;
    /// negative if that was before this VM's clock began (a restored timer).
    loaded_ns: i64,
    tsc_deadline: u64,
    /// When something happens next; `None` while stopped.
    next_ns: Option<u64>,
}

impl Default for Timer {
    fn default() -> Self {
        Timer { mode: Mode::OneShot, initial: 0, divide: 0, loaded_ns: 0, tsc_deadline: 0, next_ns: None }
    }
}

impl Timer {
    /// The next deadline on [`crate::chips::Time::now_ns`].
    pub fn next_ns(&self) -> Option<u64> {
        self.next_ns
    }

    /// The initial count.
    pub fn initial(&self) -> u32 {
        self.initial
    }

    /// The divide configuration register.
    pub fn divide(&self) -> u32 {
        self.divide
    }

    /// IA32_TSC_DEADLINE: zero when not armed and outside TSC-deadline mode.
    pub fn tsc_deadline(&self) -> u64 {
        self.tsc_deadline
    }

    /// Nanoseconds of one count.
    fn count_ns(&self) -> u64 {
        // Bits 3, 1 and 0 of the register: 000 is 2, 001 is 4, … 110 is 128, 111 is 1.
        let code = (self.divide >> 1 & 4) | (self.divide & 3);
        TICK_NS << ((code + 1) & 7)
    }

    fn period_ns(&self) -> u64 {
        u64::from(self.initial) * self.count_ns()
    }

    fn elapsed_ns(&self, now_ns: u64) -> u64 {
        u64::try_from(signed(now_ns).saturating_sub(self.loaded_ns)).unwrap_or(0)
    }

    /// The current count.
    pub fn current(&self, now_ns: u64) -> u32 {
        let elapsed = self.elapsed_ns(now_ns) / self.count_ns();
        match self.mode {
            _ if self.initial == 0 => 0,
            Mode::OneShot => u64::from(self.initial).saturating_sub(elapsed) as u32,
            // A reload shows as the initial count, so zero is never seen.
            Mode::Periodic => self.initial - (elapsed % u64::from(self.initial)) as u32,
            Mode::TscDeadline | Mode::Reserved => 0,
        }
    }

    /// Writes the initial count: starts the timer, or stops it with zero. Ignored in TSC-deadline mode.
    pub fn set_initial(&mut self, value: u32, now_ns: u64) {
        if matches!(self.mode, Mode::TscDeadline | Mode::Reserved) {
            return;
        }
        self.initial = value;
        self.loaded_ns = signed(now_ns);
        self.next_ns = (value != 0).then(|| now_ns.saturating_add(self.period_ns()));
    }

    /// Writes the divide configuration; a count in progress goes on from where it is at the new rate.
    pub fn set_divide(&mut self, value: u32, now_ns: u64) {
        let current = self.current(now_ns);
        self.divide = value & DIVIDE_MASK;
        if self.next_ns.is_some() && self.mode != Mode::TscDeadline {
            self.resume_from(current, now_ns);
        }
    }

    /// Makes the count `current` at `now_ns`.
    fn resume_from(&mut self, current: u32, now_ns: u64) {
        let current = current.min(self.initial);
        let done_ns = u64::from(self.initial - current) * self.count_ns();
        self.loaded_ns = signed(now_ns).saturating_sub(signed(done_ns));
        self.next_ns = Some(now_ns.saturating_add(u64::from(current) * self.count_ns()));
    }

    /// Changes the mode, as a write to the LVT does. Going into or out of TSC-deadline mode disarms the timer.
    pub fn set_mode(&mut self, mode: Mode, now_ns: u64) {
        if mode == self.mode {
            return;
        }
        let counts = |mode| matches!(mode, Mode::OneShot | Mode::Periodic);
        if counts(mode) && counts(self.mode) {
            let current = self.current(now_ns);
            let running = self.next_ns.is_some();
            self.mode = mode;
            if running {
                self.resume_from(current, now_ns);
            }
        } else {
            *self = Timer { mode, divide: self.divide, ..Timer::default() };
        }
    }

    /// Writes IA32_TSC_DEADLINE; true if it has passed already and the timer fires. Ignored outside TSC-deadline
    /// mode. To be called again with the same value when the guest changes its TSC.
    pub fn set_tsc_deadline(&mut self, deadline: u64, time: &VcpuTime) -> bool {
        if self.mode != Mode::TscDeadline {
            return false;
        }
        self.tsc_deadline = deadline;
        self.next_ns = None;
        deadline != 0 && self.aim_at_tsc(time)
    }

    /// Computes `next_ns` from the TSC deadline, or disarms the timer and returns true if that has passed.
    fn aim_at_tsc(&mut self, time: &VcpuTime) -> bool {
        let ticks = self.tsc_deadline.saturating_sub(time.tsc());
        if ticks == 0 {
            self.tsc_deadline = 0;
            self.next_ns = None;
            return true;
        }
        let wait_ns = u128::from(ticks) * 1_000_000_000 / u128::from(time.tsc_hz().max(1));
        // One more: the TSC has to have got there when the alarm rings.
        let wait_ns = u64::try_from(wait_ns + 1).unwrap_or(u64::MAX);
        self.next_ns = Some(time.now_ns().saturating_add(wait_ns));
        false
    }

    /// Whether the timer has fired by `now_ns`; moves on to the next deadline.
    pub fn expire(&mut self, now_ns: u64, time: &VcpuTime) -> bool {
        let Some(next_ns) = self.next_ns.filter(|next| *next <= now_ns) else { return false };
        match self.mode {
            Mode::OneShot => self.next_ns = None,
            Mode::Periodic => {
                self.next_ns = Some(next_periodic(next_ns, self.period_ns(), now_ns));
            }
            Mode::TscDeadline => return self.aim_at_tsc(time),
            Mode::Reserved => {
                self.next_ns = None;
                return false;
            }
        }
        true
    }

    /// Loads saved registers: the timer goes on from `current` in the counting modes; the TSC deadline follows
    /// separately.
    pub fn restore(&mut self, mode: Mode, initial: u32, current: u32, divide: u32, now_ns: u64) {
        *self = Timer {
            mode,
            initial,
            divide: divide & DIVIDE_MASK,
            loaded_ns: signed(now_ns),
            ..Timer::default()
        };
        match mode {
            // It has run out; the count stays at zero.
            Mode::OneShot if current == 0 => {
                self.loaded_ns = signed(now_ns).saturating_sub(signed(self.period_ns()))
            }
            Mode::OneShot | Mode::Periodic if initial != 0 => self.resume_from(current, now_ns),
            _ => {}
        }
    }
}

fn signed(ns: u64) -> i64 {
    i64::try_from(ns).unwrap_or(i64::MAX)
}

/// The first deadline after `now_ns` that is a whole number of periods after `last_ns`, and not sooner than
/// [`SHORTEST_PERIOD_NS`] from now if the period is shorter than that.
pub fn next_periodic(last_ns: u64, period_ns: u64, now_ns: u64) -> u64 {
    let period_ns = period_ns.max(1);
    let not_before =
        if period_ns < SHORTEST_PERIOD_NS { now_ns.saturating_add(SHORTEST_PERIOD_NS) } else { now_ns };
    let passed = not_before.saturating_sub(last_ns) / period_ns;
    last_ns.saturating_add(period_ns.saturating_mul(passed.saturating_add(1)))
}
