//! PCI (PCI Local Bus 3.0; PCI Express 4.0 §7.2.2 for ECAM): the root that software addresses, configuration space, interrupt
//! routing, and the bridges of the board.

pub mod bits;
pub mod config;
pub mod device;
pub mod hostbridge;
pub mod lpc;
pub mod messages;
pub mod pirq;
pub mod root;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use config::{BarKind, BarSpec, ConfigSpace, DecodedBar, PciIdentity};
pub use device::{IntxPin, PciDevice, PciFunction, PciFunctionState};
pub use hostbridge::HostBridge;
pub use lpc::LpcBridge;
pub use pirq::PirqRouter;
pub use root::{ConfigPorts, PciError, PciRoot, ResourceWindows};

/// Where the ECAM window is, as bhyve has it.
pub const ECAM_BASE: u64 = 0xe000_0000;
/// Length of the ECAM window: 256 buses of 1 MiB.
pub const ECAM_BYTES: u64 = 256 << 20;
/// First port that BARs may use.
pub const IO_WINDOW: std::ops::Range<u64> = 0x2000..0x1_0000;
/// Memory below 4 GiB that BARs may use.
pub const MEMORY_WINDOW: std::ops::Range<u64> = 0xc000_0000..ECAM_BASE;

/// Slots on a bus.
pub const SLOTS: u8 = 32;
/// Functions in a slot.
pub const FUNCTIONS: u8 = 8;

/// Bus, slot (device) and function number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct PciAddress {
    pub bus: u8,
    pub slot: u8,
    pub function: u8,
}

impl PciAddress {
    /// `None` if slot or function are too large.
    pub fn new(bus: u8, slot: u8, function: u8) -> Option<Self> {
        (slot < SLOTS && function < FUNCTIONS).then_some(PciAddress { bus, slot, function })
    }

    /// From bus, slot and function packed into 16 bits, as both access mechanisms have them.
    fn from_packed(packed: u16) -> Self {
        let [low, bus] = packed.to_le_bytes();
        PciAddress { bus, slot: low >> 3, function: low & 7 }
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.bus, self.slot, self.function)
    }
}

#[cfg(test)]
mod tests;
