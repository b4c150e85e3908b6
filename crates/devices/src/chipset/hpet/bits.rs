//! Registers of the HPET (IA-PC HPET Specification 1.0a §2.3).

/// General capabilities and ID.
pub const CAPABILITIES: u64 = 0x000;
/// General configuration.
pub const CONFIGURATION: u64 = 0x010;
/// General interrupt status.
pub const STATUS: u64 = 0x020;
/// Main counter.
pub const COUNTER: u64 = 0x0f0;
/// First register of timer 0.
pub const TIMERS: u64 = 0x100;
/// Distance between timers.
pub const TIMER_STRIDE: u64 = 0x20;
/// Configuration and capabilities, in a timer.
pub const TIMER_CONFIGURATION: u64 = 0x00;
/// Comparator, in a timer.
pub const TIMER_COMPARATOR: u64 = 0x08;
/// Message address and data, in a timer.
pub const TIMER_MESSAGE: u64 = 0x10;

pub mod capabilities {
    pub const REVISION: u64 = 1;
    /// Position of the number of the last timer.
    pub const LAST_TIMER_SHIFT: u64 = 8;
    pub const COUNTER_64: u64 = 1 << 13;
    pub const LEGACY_REPLACEMENT: u64 = 1 << 15;
    pub const VENDOR_SHIFT: u64 = 16;
    /// Position of the tick length in femtoseconds.
    pub const PERIOD_SHIFT: u64 = 32;
}

pub mod configuration {
    /// The counter runs and timers interrupt.
    pub const ENABLE: u64 = 1 << 0;
    /// Timers 0 and 1 take the places of the 8254 and the RTC.
    pub const LEGACY_REPLACEMENT: u64 = 1 << 1;
}

pub mod timer {
    pub const LEVEL: u64 = 1 << 1;
    pub const INTERRUPT: u64 = 1 << 2;
    pub const PERIODIC: u64 = 1 << 3;
    /// Periodic mode exists.
    pub const PERIODIC_CAPABLE: u64 = 1 << 4;
    /// 64 bits exist.
    pub const WIDE_CAPABLE: u64 = 1 << 5;
    /// The next write to the comparator of a periodic timer sets its next match, not only its period.
    pub const SET_VALUE: u64 = 1 << 6;
    pub const MODE_32: u64 = 1 << 8;
    pub const ROUTE_SHIFT: u64 = 9;
    pub const ROUTE: u64 = 0x1f << ROUTE_SHIFT;
    /// Interrupts are messages.
    pub const MESSAGE: u64 = 1 << 14;
    /// Messages exist.
    pub const MESSAGE_CAPABLE: u64 = 1 << 15;
    /// Position of the mask of interrupt inputs that can be chosen.
    pub const ROUTES_SHIFT: u64 = 32;
    pub const WRITABLE: u64 = LEVEL | INTERRUPT | PERIODIC | SET_VALUE | MODE_32 | ROUTE | MESSAGE;
}
