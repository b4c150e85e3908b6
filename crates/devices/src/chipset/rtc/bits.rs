//! Registers of the MC146818A (Motorola data sheet, "Address map" and "Registers"), and the bytes of its memory that PC
//! firmware gives a meaning.

/// Register selection for the lower 128 bytes (write).
pub const INDEX_PORT: u16 = 0x70;
/// Ports of the chip: two index and two data ports.
pub const PORTS: u16 = 4;

pub const SECONDS: u8 = 0x00;
pub const SECONDS_ALARM: u8 = 0x01;
pub const MINUTES: u8 = 0x02;
pub const MINUTES_ALARM: u8 = 0x03;
pub const HOURS: u8 = 0x04;
pub const HOURS_ALARM: u8 = 0x05;
pub const DAY_OF_WEEK: u8 = 0x06;
pub const DAY_OF_MONTH: u8 = 0x07;
pub const MONTH: u8 = 0x08;
pub const YEAR: u8 = 0x09;
pub const REGISTER_A: u8 = 0x0a;
pub const REGISTER_B: u8 = 0x0b;
pub const REGISTER_C: u8 = 0x0c;
pub const REGISTER_D: u8 = 0x0d;
/// The century, where ACPI's FADT says it is.
pub const CENTURY: u8 = 0x32;

/// Memory from 16 MiB to 4 GiB in units of 64 KiB, 2 bytes.
pub const LOW_MEMORY: u8 = 0x34;
/// Memory above 4 GiB in units of 64 KiB, 3 bytes.
pub const HIGH_MEMORY: u8 = 0x5b;

/// Port 70h: the other bits select; this one masks NMI on a PC.
pub const INDEX_MASK: u8 = 0x7f;

pub mod a {
    /// The time is about to change.
    pub const UPDATE_IN_PROGRESS: u8 = 1 << 7;
    /// Divider selection.
    pub const DIVIDER: u8 = 0x70;
    /// Divider running from a 32 768 Hz crystal; anything else holds it.
    pub const DIVIDER_RUNNING: u8 = 0x20;
    /// Rate of the periodic interrupt.
    pub const RATE: u8 = 0x0f;
    /// After power-up: running, 1024 Hz.
    pub const POWER_ON: u8 = 0x26;
}

pub mod b {
    /// The time stands and can be set.
    pub const SET: u8 = 1 << 7;
    /// Periodic interrupt.
    pub const PERIODIC: u8 = 1 << 6;
    /// Alarm interrupt.
    pub const ALARM: u8 = 1 << 5;
    /// Update-ended interrupt.
    pub const UPDATE: u8 = 1 << 4;
    /// Registers are binary rather than BCD.
    pub const BINARY: u8 = 1 << 2;
    /// Hours count to 24 rather than 12.
    pub const HOURS_24: u8 = 1 << 1;
    /// The interrupt enables, which are where the flags are in register C.
    pub const INTERRUPTS: u8 = PERIODIC | ALARM | UPDATE;
}

pub mod c {
    /// Some enabled flag is set.
    pub const INTERRUPT: u8 = 1 << 7;
}

pub mod d {
    /// The battery has kept the memory.
    pub const VALID: u8 = 1 << 7;
}

/// Hours in 12-hour mode.
pub const PM: u8 = 1 << 7;
/// Alarm bytes from this value up match everything.
pub const ALARM_ANY: u8 = 0xc0;
