//! The chips on the board. A device is a plain struct with registers that knows the bus it sits on
//! ([`bus::PioDevice`], [`bus::MmioDevice`], [`pci::PciDevice`]) and the few things it needs from outside ([`host`]): an
//! interrupt line, a clock, an alarm, a byte sink. It knows nothing of engines, threads, sockets or the command line, so a
//! test pokes its registers and a snapshot is its [`snapshot::Persist::State`].
//!
//! The 8259s, IOAPIC, LAPICs and 8254 (with port 61h) are not here: engines own those.
#![forbid(unsafe_code)]

pub mod ahci;
pub mod bus;
pub mod chipset;
pub mod host;
pub mod irq;
pub mod nvme;
pub mod pci;
pub mod snapshot;
pub mod uart;
pub mod virtio;

mod access;
#[cfg(test)]
mod testing;
