//! The two reset registers of a PC beside the keyboard controller's: the reset control register at port CF9h (Intel 82371SB
//! data sheet §2.4.5) and system control port A at port 92h (IBM PS/2 Model 80 Technical Reference).

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use serde::{Deserialize, Serialize};

use crate::bus::{BusError, PioBus, PioDevice};
use crate::host::{PowerControl, PowerEvent};
use crate::snapshot::{Persist, SnapshotError};

/// Port of [`ResetControl`]. It lies within PCI's mechanism #1 ports, so it is attached through
/// [`crate::pci::PciRoot::attach`].
pub const RESET_PORT: u16 = 0xcf9;
/// What ACPI's FADT has guests write there.
pub const RESET_VALUE: u8 = reset_control::RESET_CPU | reset_control::SYSTEM_RESET;
/// Port of [`SystemControlPortA`].
pub const PORT_A: u16 = 0x92;

/// Reset control register.
pub mod reset_control {
    /// The next reset is a hard one.
    pub const SYSTEM_RESET: u8 = 1 << 1;
    /// Resets.
    pub const RESET_CPU: u8 = 1 << 2;
    /// The next reset includes a power cycle.
    pub const FULL_RESET: u8 = 1 << 3;
    /// Bits that keep what is written.
    pub const MASK: u8 = SYSTEM_RESET | FULL_RESET;
}

/// System control port A.
pub mod port_a {
    /// Pulses the processor's reset when it becomes one.
    pub const FAST_RESET: u8 = 1 << 0;
    /// Lets address line 20 through. It always is: no guest of today relies on wrapping at 1 MiB.
    pub const A20: u8 = 1 << 1;
}

/// The reset control register.
pub struct ResetControl {
    register: AtomicU8,
    power: Arc<dyn PowerControl>,
}

impl ResetControl {
    /// A register that resets through `power`.
    pub fn new(power: Arc<dyn PowerControl>) -> Self {
        ResetControl { register: AtomicU8::new(0), power }
    }
}

impl PioDevice for ResetControl {
    fn pio_read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(self.register.load(Ordering::Relaxed));
    }

    fn pio_write(&self, _offset: u16, data: &[u8]) {
        let Some(value) = data.first() else { return };
        self.register.store(value & reset_control::MASK, Ordering::Relaxed);
        if value & reset_control::RESET_CPU != 0 {
            self.power.request(PowerEvent::Reset);
        }
    }
}

/// System control port A.
pub struct SystemControlPortA {
    register: AtomicU8,
    power: Arc<dyn PowerControl>,
}

impl SystemControlPortA {
    /// The port with A20 on; resets through `power`.
    pub fn new(power: Arc<dyn PowerControl>) -> Self {
        SystemControlPortA { register: AtomicU8::new(port_a::A20), power }
    }

    /// Puts the port on the bus.
    ///
    /// # Errors
    /// Another device is there.
    pub fn attach(self: &Arc<Self>, pio: &PioBus) -> Result<(), BusError> {
        pio.insert(u64::from(PORT_A), 1, "system-control-a", self.clone())
    }
}

impl PioDevice for SystemControlPortA {
    fn pio_read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(self.register.load(Ordering::Relaxed));
    }

    fn pio_write(&self, _offset: u16, data: &[u8]) {
        let Some(value) = data.first() else { return };
        let old = self.register.swap(value & (port_a::FAST_RESET | port_a::A20), Ordering::Relaxed);
        if value & !old & port_a::FAST_RESET != 0 {
            self.power.request(PowerEvent::Reset);
        }
    }
}

/// Register of a [`ResetControl`] or a [`SystemControlPortA`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResetState {
    /// The register.
    pub register: u8,
}

impl Persist for ResetControl {
    type State = ResetState;
    const VERSION: u32 = 1;

    fn save(&self) -> ResetState {
        ResetState { register: self.register.load(Ordering::Relaxed) }
    }

    fn restore(&self, state: ResetState) -> Result<(), SnapshotError> {
        self.register.store(state.register & reset_control::MASK, Ordering::Relaxed);
        Ok(())
    }
}

impl Persist for SystemControlPortA {
    type State = ResetState;
    const VERSION: u32 = 1;

    fn save(&self) -> ResetState {
        ResetState { register: self.register.load(Ordering::Relaxed) }
    }

    fn restore(&self, state: ResetState) -> Result<(), SnapshotError> {
        self.register.store(state.register & (port_a::FAST_RESET | port_a::A20), Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Power;

    fn get(device: &dyn PioDevice) -> u8 {
        let mut byte = [0];
        device.pio_read(0, &mut byte);
        byte[0]
    }

    #[test]
    fn reset_control_resets_on_its_bit_only() {
        let power = Power::new();
        let register = ResetControl::new(power.clone());
        register.pio_write(0, &[reset_control::SYSTEM_RESET]);
        assert_eq!(get(&register), reset_control::SYSTEM_RESET);
        assert_eq!(power.take(), []);
        register.pio_write(0, &[RESET_VALUE]);
        assert_eq!(power.take(), [PowerEvent::Reset]);
        assert_eq!(register.save().register, reset_control::SYSTEM_RESET);
    }

    #[test]
    fn port_a_resets_on_the_rising_edge() {
        let power = Power::new();
        let port = SystemControlPortA::new(power.clone());
        assert_eq!(get(&port), port_a::A20);
        port.pio_write(0, &[port_a::A20 | port_a::FAST_RESET]);
        port.pio_write(0, &[port_a::A20 | port_a::FAST_RESET]);
        assert_eq!(power.take(), [PowerEvent::Reset]);
        let copy = SystemControlPortA::new(power.clone());
        copy.restore(port.save()).unwrap();
        assert_eq!(get(&copy), get(&port));
    }
}
