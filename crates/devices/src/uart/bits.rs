//! Registers of the 16550A (National Semiconductor PC16550D data sheet, §8 "Registers").

/// Receive buffer (read) and transmit holding (write); low byte of the divisor while [`lcr::DLAB`] is set.
pub const DATA: u16 = 0;
/// Interrupt enable; high byte of the divisor while [`lcr::DLAB`] is set.
pub const IER: u16 = 1;
/// Interrupt identification (read).
pub const IIR: u16 = 2;
/// FIFO control (write).
pub const FCR: u16 = 2;
/// Line control.
pub const LCR: u16 = 3;
/// Modem control.
pub const MCR: u16 = 4;
/// Line status.
pub const LSR: u16 = 5;
/// Modem status.
pub const MSR: u16 = 6;
/// Scratch.
pub const SCR: u16 = 7;
/// Number of register addresses.
pub const PORTS: u16 = 8;

/// Interrupt enable register.
pub mod ier {
    /// Received data available, and character timeout.
    pub const RECEIVED_DATA: u8 = 1 << 0;
    /// Transmit holding register empty.
    pub const TRANSMIT_EMPTY: u8 = 1 << 1;
    /// Receiver line status.
    pub const LINE_STATUS: u8 = 1 << 2;
    /// Modem status.
    pub const MODEM_STATUS: u8 = 1 << 3;
    /// Bits that exist.
    pub const MASK: u8 = 0x0f;
}

/// Interrupt identification register.
pub mod iir {
    /// Nothing pending.
    pub const NONE: u8 = 0x01;
    /// Modem status (lowest priority).
    pub const MODEM_STATUS: u8 = 0x00;
    /// Transmit holding register empty.
    pub const TRANSMIT_EMPTY: u8 = 0x02;
    /// Received data at the trigger level.
    pub const RECEIVED_DATA: u8 = 0x04;
    /// Received data below the trigger level that nobody came for.
    pub const CHARACTER_TIMEOUT: u8 = 0x0c;
    /// Receiver line status (highest priority).
    pub const LINE_STATUS: u8 = 0x06;
    /// Both set while FIFOs are enabled.
    pub const FIFOS_ENABLED: u8 = 0xc0;
}

/// FIFO control register.
pub mod fcr {
    /// FIFOs on.
    pub const ENABLE: u8 = 1 << 0;
    /// Empties the receive FIFO; clears itself.
    pub const CLEAR_RECEIVE: u8 = 1 << 1;
    /// Empties the transmit FIFO; clears itself.
    pub const CLEAR_TRANSMIT: u8 = 1 << 2;
    /// DMA mode, without effect on a PC.
    pub const DMA_MODE: u8 = 1 << 3;
    /// Position of the two-bit receive trigger level.
    pub const TRIGGER_SHIFT: u8 = 6;
    /// Receive trigger levels in bytes.
    pub const TRIGGER_LEVELS: [usize; 4] = [1, 4, 8, 14];
}

/// Line control register.
pub mod lcr {
    /// Sends a break.
    pub const BREAK: u8 = 1 << 6;
    /// The first two addresses are the divisor latch.
    pub const DLAB: u8 = 1 << 7;
}

/// Modem control register.
pub mod mcr {
    /// Data terminal ready.
    pub const DTR: u8 = 1 << 0;
    /// Request to send.
    pub const RTS: u8 = 1 << 1;
    /// Spare output 1.
    pub const OUT1: u8 = 1 << 2;
    /// Spare output 2; on a PC it connects the interrupt output to the interrupt controller.
    pub const OUT2: u8 = 1 << 3;
    /// Outputs are looped back to inputs inside the chip.
    pub const LOOPBACK: u8 = 1 << 4;
    /// Bits that exist.
    pub const MASK: u8 = 0x1f;
}

/// Line status register.
pub mod lsr {
    /// Data ready.
    pub const DATA_READY: u8 = 1 << 0;
    /// A byte was lost because the receiver was full.
    pub const OVERRUN: u8 = 1 << 1;
    /// Parity error in the next byte.
    pub const PARITY: u8 = 1 << 2;
    /// Framing error in the next byte.
    pub const FRAMING: u8 = 1 << 3;
    /// The next byte is a break.
    pub const BREAK: u8 = 1 << 4;
    /// Transmit holding register (or FIFO) empty.
    pub const TRANSMIT_HOLDING_EMPTY: u8 = 1 << 5;
    /// Transmitter idle.
    pub const TRANSMITTER_EMPTY: u8 = 1 << 6;
    /// Some byte in the FIFO has an error.
    pub const FIFO_ERROR: u8 = 1 << 7;
    /// Sources of the receiver line status interrupt.
    pub const ERRORS: u8 = OVERRUN | PARITY | FRAMING | BREAK;
}

/// Modem status register: level in the high half, change since last read in the low half.
pub mod msr {
    /// Change of CTS.
    pub const DELTA_CTS: u8 = 1 << 0;
    /// Change of DSR.
    pub const DELTA_DSR: u8 = 1 << 1;
    /// RI went from asserted to not asserted.
    pub const TRAILING_RI: u8 = 1 << 2;
    /// Change of DCD.
    pub const DELTA_DCD: u8 = 1 << 3;
    /// Clear to send.
    pub const CTS: u8 = 1 << 4;
    /// Data set ready.
    pub const DSR: u8 = 1 << 5;
    /// Ring indicator.
    pub const RI: u8 = 1 << 6;
    /// Carrier detect.
    pub const DCD: u8 = 1 << 7;
    /// The change bits.
    pub const DELTAS: u8 = 0x0f;
}
