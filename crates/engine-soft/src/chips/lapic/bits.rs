//! Registers of the local APIC (SDM 3A table 10-1, §10.5, §10.12).

/// Register numbers: the offset in the xAPIC page divided by 16, and the MSR number less 800h.
pub mod register {
    #![allow(missing_docs)]
    pub const ID: u32 = 0x02;
    pub const VERSION: u32 = 0x03;
    pub const TPR: u32 = 0x08;
    /// Arbitration priority; xAPIC only.
    pub const APR: u32 = 0x09;
    pub const PPR: u32 = 0x0a;
    pub const EOI: u32 = 0x0b;
    /// Remote read; xAPIC only.
    pub const RRD: u32 = 0x0c;
    pub const LDR: u32 = 0x0d;
    /// Destination format; xAPIC only.
    pub const DFR: u32 = 0x0e;
    pub const SVR: u32 = 0x0f;
    /// First of eight.
    pub const ISR: u32 = 0x10;
    /// First of eight.
    pub const TMR: u32 = 0x18;
    /// First of eight.
    pub const IRR: u32 = 0x20;
    pub const ESR: u32 = 0x28;
    pub const ICR_LOW: u32 = 0x30;
    /// xAPIC only: the x2APIC's ICR is one register.
    pub const ICR_HIGH: u32 = 0x31;
    pub const LVT_TIMER: u32 = 0x32;
    pub const LVT_THERMAL: u32 = 0x33;
    pub const LVT_PERFORMANCE: u32 = 0x34;
    pub const LVT_LINT0: u32 = 0x35;
    pub const LVT_LINT1: u32 = 0x36;
    pub const LVT_ERROR: u32 = 0x37;
    pub const INITIAL_COUNT: u32 = 0x38;
    pub const CURRENT_COUNT: u32 = 0x39;
    pub const DIVIDE: u32 = 0x3e;
    /// x2APIC only.
    pub const SELF_IPI: u32 = 0x3f;
    /// How many numbers there are.
    pub const COUNT: u32 = 0x40;
}

/// Version register: an integrated APIC with six LVT entries.
pub const VERSION: u32 = 0x0005_0014;
/// Version register: EOI broadcasts can be suppressed.
pub const VERSION_EOI_SUPPRESSION: u32 = 1 << 24;

/// DFR: everything but the model reads as ones.
pub const DFR_FIXED: u32 = 0x0fff_ffff;
/// DFR: the model; all ones is flat.
pub const DFR_MODEL: u32 = 0xf000_0000;
/// LDR of xAPIC mode.
pub const LDR_MASK: u32 = 0xff00_0000;

/// Spurious-vector register.
pub mod svr {
    /// Vector for spurious interrupts.
    pub const VECTOR: u32 = 0xff;
    /// APIC software enable.
    pub const ENABLE: u32 = 1 << 8;
    /// Focus-processor checking off; kept, without effect.
    pub const NO_FOCUS: u32 = 1 << 9;
    /// Do not tell the IOAPIC of EOIs.
    pub const SUPPRESS_EOI_BROADCAST: u32 = 1 << 12;
    /// Value after reset.
    pub const RESET: u32 = 0xff;
}

/// Local vector table.
pub mod lvt {
    /// Interrupt vector.
    pub const VECTOR: u32 = 0xff;
    /// Delivery mode.
    pub const MODE: u32 = 7 << 8;
    /// Bit position of [`MODE`].
    pub const MODE_SHIFT: u32 = 8;
    /// Delivery status, read-only, always idle here.
    pub const STATUS: u32 = 1 << 12;
    /// Active low (LINT0, LINT1); kept, the wires here know no polarity.
    pub const POLARITY: u32 = 1 << 13;
    /// A level-triggered interrupt was accepted and awaits EOI (LINT0, LINT1); read-only.
    pub const REMOTE_IRR: u32 = 1 << 14;
    /// Level-triggered (LINT0, LINT1).
    pub const LEVEL: u32 = 1 << 15;
    /// Masked.
    pub const MASKED: u32 = 1 << 16;
    /// Timer mode, two bits.
    pub const TIMER_MODE: u32 = 3 << 17;
    /// Bit position of [`TIMER_MODE`].
    pub const TIMER_MODE_SHIFT: u32 = 17;
}

/// Interrupt command register, low half.
pub mod icr {
    /// Vector.
    pub const VECTOR: u32 = 0xff;
    /// Bit position of the delivery mode.
    pub const MODE_SHIFT: u32 = 8;
    /// Destination mode: logical.
    pub const LOGICAL: u32 = 1 << 11;
    /// Delivery status, read-only, always idle here.
    pub const STATUS: u32 = 1 << 12;
    /// Level: assert.
    pub const ASSERT: u32 = 1 << 14;
    /// Trigger mode: level.
    pub const LEVEL: u32 = 1 << 15;
    /// Destination shorthand, two bits.
    pub const SHORTHAND: u32 = 3 << 18;
    /// Bit position of [`SHORTHAND`].
    pub const SHORTHAND_SHIFT: u32 = 18;
    /// Bits that software may set.
    pub const WRITABLE: u32 = 0x000c_cfff;
}

/// Error status register.
pub mod esr {
    /// A message with a vector below 16 was to be sent.
    pub const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    /// A message with a vector below 16 arrived, or an LVT entry with one fired.
    pub const RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
    /// A register that does not exist was accessed (xAPIC mode).
    pub const ILLEGAL_REGISTER: u32 = 1 << 7;
}

/// Writable bits of the divide configuration register.
pub const DIVIDE_MASK: u32 = 0b1011;

/// The lowest vector that an interrupt message may carry.
pub const FIRST_VECTOR: u8 = 16;
