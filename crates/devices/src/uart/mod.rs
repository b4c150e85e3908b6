//! The 16550A serial port (National Semiconductor PC16550D data sheet; PC wiring: OUT2 gates the interrupt).
//!
//! The line has no speed: what is written to the transmitter leaves at once through the [`ByteSink`], so the transmitter is
//! always empty again when the write returns. The "transmitter empty" interrupt is still an event, as on the chip: it is
//! raised by emptying and by enabling it, and taken away by reading IIR or writing the next byte. A character timeout is due as
//! soon as bytes below the trigger level are there, since no further byte is on its way at any particular time.
//!
//! Input is pushed with [`Uart::receive`], which takes as much as the FIFO holds. A caller whose bytes were refused is told
//! through [`ByteSink::input_ready`] when the guest has made room.

pub mod bits;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::access::lock;
use crate::bus::{BusError, PioBus, PioDevice};
use crate::host::{ByteSink, IrqLine};
use crate::irq::Output;
use crate::snapshot::{Persist, SnapshotError};
use bits::{fcr, ier, iir, lcr, lsr, mcr, msr};

/// Where a PC has its four serial ports: name, first port, ISA interrupt (bhyve's are the same).
pub const COM_PORTS: [(&str, u16, u8); 4] =
    [("com1", 0x3f8, 4), ("com2", 0x2f8, 3), ("com3", 0x3e8, 4), ("com4", 0x2e8, 3)];

const FIFO_BYTES: usize = 16;
/// 115 200 bits per second, so that software which asks for the speed gets a usual one.
const POWER_ON_DIVISOR: u16 = 1;
/// The other end of the cable is always there and ready.
const CONNECTED: u8 = msr::CTS | msr::DSR | msr::DCD;

/// Registers of a [`Uart`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct UartState {
    /// Bytes received and not yet read; more than one only with FIFOs enabled.
    pub received: VecDeque<u8>,
    /// The byte that the receive buffer shows when nothing is there.
    pub last_received: u8,
    pub interrupt_enable: u8,
    pub fifo_control: u8,
    pub line_control: u8,
    pub modem_control: u8,
    /// Error bits of the line status register; the others are derived.
    pub line_errors: u8,
    /// Change bits of the modem status register; the levels are derived.
    pub modem_deltas: u8,
    pub scratch: u8,
    pub divisor: u16,
    /// The transmitter became empty and nobody has been told.
    pub transmit_empty_pending: bool,
}

impl Default for UartState {
    fn default() -> Self {
        UartState {
            received: VecDeque::with_capacity(FIFO_BYTES),
            last_received: 0,
            interrupt_enable: 0,
            fifo_control: 0,
            line_control: 0,
            modem_control: 0,
            line_errors: 0,
            modem_deltas: 0,
            scratch: 0,
            divisor: POWER_ON_DIVISOR,
            transmit_empty_pending: false,
        }
    }
}

impl UartState {
    fn fifos(&self) -> bool {
        self.fifo_control & fcr::ENABLE != 0
    }

    fn capacity(&self) -> usize {
        if self.fifos() { FIFO_BYTES } else { 1 }
    }

    fn trigger(&self) -> usize {
        if self.fifos() {
            fcr::TRIGGER_LEVELS[usize::from(self.fifo_control >> fcr::TRIGGER_SHIFT)]
        } else {
            1
        }
    }

    fn looped_back(&self) -> bool {
        self.modem_control & mcr::LOOPBACK != 0
    }

    fn divisor_latch(&self) -> bool {
        self.line_control & lcr::DLAB != 0
    }

    /// Levels of the modem inputs, in the high half of the modem status register.
    fn modem_levels(&self) -> u8 {
        if !self.looped_back() {
            return CONNECTED;
        }
        let wires = [(mcr::RTS, msr::CTS), (mcr::DTR, msr::DSR), (mcr::OUT1, msr::RI), (mcr::OUT2, msr::DCD)];
        wires.iter().filter(|(output, _)| self.modem_control & output != 0).fold(0, |m, (_, input)| m | input)
    }

    fn line_status(&self) -> u8 {
        let ready = if self.received.is_empty() { 0 } else { lsr::DATA_READY };
        ready | self.line_errors | lsr::TRANSMIT_HOLDING_EMPTY | lsr::TRANSMITTER_EMPTY
    }

    /// The pending enabled interrupt of the highest priority, as IIR names it.
    fn interrupt(&self) -> u8 {
        let enabled = |source| self.interrupt_enable & source != 0;
        if enabled(ier::LINE_STATUS) && self.line_errors & lsr::ERRORS != 0 {
            iir::LINE_STATUS
        } else if enabled(ier::RECEIVED_DATA) && !self.received.is_empty() {
            if self.received.len() >= self.trigger() { iir::RECEIVED_DATA } else { iir::CHARACTER_TIMEOUT }
        } else if enabled(ier::TRANSMIT_EMPTY) && self.transmit_empty_pending {
            iir::TRANSMIT_EMPTY
        } else if enabled(ier::MODEM_STATUS) && self.modem_deltas != 0 {
            iir::MODEM_STATUS
        } else {
            iir::NONE
        }
    }

    fn interrupt_output(&self) -> bool {
        // In loopback the OUT2 pin is inactive whatever the register says (data sheet §8.6, bit 4).
        let gate = self.modem_control & (mcr::OUT2 | mcr::LOOPBACK) == mcr::OUT2;
        gate && self.interrupt() != iir::NONE
    }

    fn push_received(&mut self, byte: u8) {
        if self.received.len() < self.capacity() {
            self.received.push_back(byte);
            return;
        }
        self.line_errors |= lsr::OVERRUN;
        if !self.fifos() {
            // Without FIFOs it is the byte in the buffer that is lost; with them, the one in the shift register.
            self.received.clear();
            self.received.push_back(byte);
        }
    }

    fn set_modem_control(&mut self, value: u8) {
        let before = self.modem_levels();
        self.modem_control = value & mcr::MASK;
        let after = self.modem_levels();
        let changed = before ^ after;
        for (level, delta) in
            [(msr::CTS, msr::DELTA_CTS), (msr::DSR, msr::DELTA_DSR), (msr::DCD, msr::DELTA_DCD)]
        {
            if changed & level != 0 {
                self.modem_deltas |= delta;
            }
        }
        if before & msr::RI != 0 && after & msr::RI == 0 {
            self.modem_deltas |= msr::TRAILING_RI;
        }
    }

    fn set_fifo_control(&mut self, value: u8) {
        let toggled = (value ^ self.fifo_control) & fcr::ENABLE != 0;
        if toggled || value & fcr::CLEAR_RECEIVE != 0 {
            self.received.clear();
        }
        // The other bits count only together with ENABLE (data sheet §8.4).
        self.fifo_control =
            if value & fcr::ENABLE != 0 { value & !(fcr::CLEAR_RECEIVE | fcr::CLEAR_TRANSMIT) } else { 0 };
    }

    fn read(&mut self, register: u16) -> u8 {
        match register {
            bits::DATA if self.divisor_latch() => self.divisor.to_le_bytes()[0],
            bits::DATA => {
                if let Some(byte) = self.received.pop_front() {
                    self.last_received = byte;
                }
                self.last_received
            }
            bits::IER if self.divisor_latch() => self.divisor.to_le_bytes()[1],
            bits::IER => self.interrupt_enable,
            bits::IIR => {
                let interrupt = self.interrupt();
                if interrupt == iir::TRANSMIT_EMPTY {
                    self.transmit_empty_pending = false;
                }
                interrupt | if self.fifos() { iir::FIFOS_ENABLED } else { 0 }
            }
            bits::LCR => self.line_control,
            bits::MCR => self.modem_control,
            bits::LSR => {
                let status = self.line_status();
                self.line_errors = 0;
                status
            }
            bits::MSR => {
                let status = self.modem_levels() | self.modem_deltas;
                self.modem_deltas = 0;
                status
            }
            bits::SCR => self.scratch,
            _ => 0xff,
        }
    }

    /// Every register but the transmitter.
    fn write(&mut self, register: u16, value: u8) {
        match register {
            bits::DATA => self.divisor = self.divisor & 0xff00 | u16::from(value),
            bits::IER if self.divisor_latch() => {
                self.divisor = self.divisor & 0x00ff | u16::from(value) << 8;
            }
            bits::IER => {
                let enabled = value & !self.interrupt_enable;
                self.interrupt_enable = value & ier::MASK;
                if enabled & ier::TRANSMIT_EMPTY != 0 {
                    self.transmit_empty_pending = true;
                }
            }
            bits::FCR => self.set_fifo_control(value),
            bits::LCR => self.line_control = value,
            bits::MCR => self.set_modem_control(value),
            bits::SCR => self.scratch = value,
            // LSR and MSR are for factory tests only.
            _ => {}
        }
    }
}

struct Inner {
    registers: UartState,
    /// [`Uart::receive`] refused bytes, so whoever called it waits for room.
    refused: bool,
}

/// One serial port.
pub struct Uart {
    inner: Mutex<Inner>,
    irq: Output,
    sink: Arc<dyn ByteSink>,
}

impl Uart {
    /// A port after power-up that interrupts through `irq` and sends to `sink`.
    pub fn new(irq: Arc<dyn IrqLine>, sink: Arc<dyn ByteSink>) -> Self {
        Uart {
            inner: Mutex::new(Inner { registers: UartState::default(), refused: false }),
            irq: Output::new(irq),
            sink,
        }
    }

    /// Puts the port on the bus at `base`, under `name`.
    ///
    /// # Errors
    /// Another device is there.
    pub fn attach(self: &Arc<Self>, pio: &PioBus, base: u16, name: &str) -> Result<(), BusError> {
        pio.insert(u64::from(base), u64::from(bits::PORTS), name, self.clone())
    }

    /// Bytes arrive on the line. Returns how many were taken; the rest can be offered again after
    /// [`ByteSink::input_ready`].
    pub fn receive(&self, bytes: &[u8]) -> usize {
        let mut inner = lock(&self.inner);
        let registers = &mut inner.registers;
        // In loopback the input pin is disconnected; the cable holds the bytes back rather than losing them.
        let room = if registers.looped_back() {
            0
        } else {
            registers.capacity().saturating_sub(registers.received.len())
        };
        let accepted = room.min(bytes.len());
        registers.received.extend(&bytes[..accepted]);
        inner.refused = accepted < bytes.len();
        self.irq.set(inner.registers.interrupt_output());
        accepted
    }

    fn read_register(&self, register: u16) -> u8 {
        let (value, invite) = {
            let mut inner = lock(&self.inner);
            let value = inner.registers.read(register);
            self.irq.set(inner.registers.interrupt_output());
            (value, inner.take_invitation())
        };
        if invite {
            self.sink.input_ready();
        }
        value
    }

    fn write_register(&self, register: u16, value: u8) {
        let (output, invite) = {
            let mut inner = lock(&self.inner);
            let registers = &mut inner.registers;
            let transmit = register == bits::DATA && !registers.divisor_latch();
            let mut output = None;
            if transmit {
                // Loading the holding register takes the interrupt away; the byte leaves at once and brings it back. The line has
                // to show both edges: the 8259 input is edge-triggered.
                registers.transmit_empty_pending = false;
                self.irq.set(registers.interrupt_output());
                if registers.looped_back() {
                    registers.push_received(value);
                } else {
                    output = Some(value);
                }
                registers.transmit_empty_pending = true;
            } else {
                registers.write(register, value);
            }
            self.irq.set(inner.registers.interrupt_output());
            (output, inner.take_invitation())
        };
        if let Some(byte) = output {
            self.sink.write(&[byte]);
        }
        if invite {
            self.sink.input_ready();
        }
    }
}

impl Inner {
    /// Whether there is room again for somebody who was refused.
    fn take_invitation(&mut self) -> bool {
        let registers = &self.registers;
        let room = !registers.looped_back() && registers.received.len() < registers.capacity();
        room && std::mem::take(&mut self.refused)
    }
}

impl PioDevice for Uart {
    fn pio_read(&self, offset: u16, data: &mut [u8]) {
        // The chip is 8 bits wide: the bus splits wider accesses.
        for (register, byte) in (offset..).zip(data) {
            *byte = self.read_register(register);
        }
    }

    fn pio_write(&self, offset: u16, data: &[u8]) {
        for (register, byte) in (offset..).zip(data) {
            self.write_register(register, *byte);
        }
    }
}

impl Persist for Uart {
    type State = UartState;
    const VERSION: u32 = 1;

    fn save(&self) -> UartState {
        lock(&self.inner).registers.clone()
    }

    fn restore(&self, state: UartState) -> Result<(), SnapshotError> {
        if state.received.len() > state.capacity() {
            return Err(SnapshotError::Invalid(format!(
                "serial port holds {} received bytes, its buffer {}",
                state.received.len(),
                state.capacity()
            )));
        }
        let mut inner = lock(&self.inner);
        inner.registers = UartState {
            interrupt_enable: state.interrupt_enable & ier::MASK,
            modem_control: state.modem_control & mcr::MASK,
            line_errors: state.line_errors & lsr::ERRORS,
            modem_deltas: state.modem_deltas & msr::DELTAS,
            ..state
        };
        // The host's end may be holding bytes back; asking once too often is harmless.
        inner.refused = true;
        self.irq.set(inner.registers.interrupt_output());
        Ok(())
    }
}

#[cfg(test)]
mod tests;
