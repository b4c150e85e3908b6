//! An AHCI host bus adapter (Serial ATA AHCI 1.3.1) with hard disks and ATAPI drives on its ports, as bhyve's `ahci`, `ahci-hd`
//! and `ahci-cd` are: Intel's ICH8, registers in BAR 5, INTx or one MSI.
//!
//! | part | is |
//! | --- | --- |
//! | `controller` | registers of the whole, interrupts, commands' ways out and back |
//! | `port` | registers of a port, command list, received frames, resets |
//! | `prdt` | where a command's data is |
//! | `job` | a command on its way: disk requests, one after another |
//! | `device` | what port and device say to each other |
//! | `ata` | hard disks |
//! | `atapi` | the ATA side of drives that take SCSI commands |
//!
//! A write to PxCI reads the command headers under the adapter's lock and starts the commands after letting go of it, on the calling
//! thread. Their ends come in on whatever thread the disk ends requests on; a port knows which of its lives a command was started in.
//!
//! Not offered, and not shown by the capabilities: port multipliers, FIS-based switching, coalescing of interrupts, power states of
//! links, staggered spin-up, enclosure management, hand-over from firmware, asynchronous notification (whether there is a medium is to
//! be asked with GET EVENT STATUS NOTIFICATION).

mod ata;
mod atapi;
mod bits;
mod controller;
mod device;
mod job;
mod port;
mod prdt;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use block::Disk;
use memory::GuestMemory;

use crate::host::Clock;
use crate::pci::bits::{CAPABILITIES_START, COMMAND, class};
use crate::pci::config::ConfigError;
use crate::pci::{BarKind, BarSpec, ConfigSpace, IntxPin, PciDevice, PciFunction, PciIdentity};
use crate::snapshot::{Persist, SnapshotError};
use ata::AtaDisk;
use atapi::AtapiDevice;
use bits::{PORT_STRIDE, PORTS};
use controller::Controller;
use device::Device;

pub use ata::AtaState;
pub use atapi::{AtapiState, Packet, PacketDevice, PacketEnd, PacketError};
pub use bits::MAX_PORTS;
pub use controller::AhciState;
pub use device::DeviceState;
pub use port::PortState;

/// Ports that there are at least.
pub const MIN_PORTS: usize = 6;
/// The BAR with the registers.
const ABAR: usize = 5;
/// Bytes of the BAR at least, so that it has its pages to itself.
const MIN_ABAR_BYTES: u64 = 0x1000;
/// The largest sector whose blocks PIO can count.
const MAX_SECTOR_BYTES: u32 = 32 << 10;

/// How a drive calls itself. Characters outside of ASCII become spaces, what is too long is cut off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskIdentity {
    /// Up to 40 characters (`model`).
    pub model: String,
    /// Up to 20 characters (`ser`).
    pub serial: String,
    /// Firmware revision, up to 8 characters (`rev`).
    pub firmware: String,
    /// Nominal media rotation rate (`nmrr`): 0 for unknown, 1 for none, which is what solid state disks have, otherwise
    /// revolutions a minute. Not for ATAPI drives.
    pub rotation_rate: u16,
}

impl DiskIdentity {
    /// Firmware revision if none is given, as bhyve has it.
    pub const FIRMWARE: &str = "001";

    /// A hard disk with this serial number.
    pub fn disk(serial: String) -> Self {
        let (model, firmware) = ("Apiary SATA DISK".into(), Self::FIRMWARE.into());
        DiskIdentity { model, serial, firmware, rotation_rate: 0 }
    }

    /// A DVD drive with this serial number.
    pub fn dvd(serial: String) -> Self {
        DiskIdentity { model: "Apiary SATA DVD".into(), ..Self::disk(serial) }
    }
}

/// What is on a port.
pub enum Drive {
    /// A hard disk (`hd`).
    Disk(Arc<Disk>, DiskIdentity),
    /// An ATAPI drive (`cd`).
    Packet(Arc<dyn PacketDevice>, DiskIdentity),
}

/// Why there can be no such adapter.
#[derive(Debug, thiserror::Error)]
pub enum AhciError {
    /// More ports than an adapter has.
    #[error("an AHCI controller has at most 32 ports, not {0}; use a second controller")]
    Ports(usize),
    /// Sectors that ATA has no way to transfer.
    #[error("disk {name}: sectors of {bytes} bytes are too large for AHCI; the largest are 32768")]
    Sector {
        /// The disk.
        name: String,
        /// Its sectors.
        bytes: u32,
    },
    /// Configuration space cannot be laid out.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// The adapter.
pub struct Ahci {
    controller: Arc<Controller>,
}

impl Ahci {
    /// bhyve's: an Intel ICH8.
    pub fn identity() -> PciIdentity {
        PciIdentity {
            vendor: 0x8086,
            device: 0x2821,
            revision: 0,
            class: class::SATA_AHCI,
            subsystem_vendor: 0,
            subsystem: 0,
        }
    }

    /// An adapter after power-up. `drives` has what is on each port, from port 0 on; there are [`MIN_PORTS`] ports at least. `clock`
    /// is what the disks' hours of operation are counted by.
    ///
    /// # Errors
    /// See [`AhciError`].
    pub fn new(
        identity: PciIdentity,
        drives: Vec<Option<Drive>>,
        memory: GuestMemory,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, AhciError> {
        if drives.len() > MAX_PORTS {
            return Err(AhciError::Ports(drives.len()));
        }
        let mut devices = Vec::with_capacity(MAX_PORTS);
        for drive in drives {
            devices.push(match drive {
                None => None,
                Some(Drive::Packet(unit, identity)) => Some(Device::Packet(AtapiDevice::new(unit, identity))),
                Some(Drive::Disk(disk, identity)) => {
                    let bytes = disk.info().sectors.logical;
                    if bytes > MAX_SECTOR_BYTES {
                        return Err(AhciError::Sector { name: disk.name().to_owned(), bytes });
                    }
                    Some(Device::Disk(AtaDisk::new(disk, identity)))
                }
            });
        }
        devices.resize_with(devices.len().max(MIN_PORTS), || None);
        let mut config = ConfigSpace::new(identity);
        let size = u64::from(PORTS) + devices.len() as u64 * u64::from(PORT_STRIDE);
        let size = size.next_power_of_two().max(MIN_ABAR_BYTES);
        let kind = BarKind::Memory32 { prefetchable: false };
        config.add_bar(BarSpec { index: ABAR, kind, size })?;
        config.add_msi_capability(1)?;
        let function = PciFunction::new(config, Some(IntxPin::A));
        Ok(Ahci { controller: Arc::new(Controller::new(function, devices, memory, clock)) })
    }

    /// The disk on a port has another size, which IDENTIFY DEVICE shows from now on. SATA has no way to tell the host: it asks when it
    /// looks at the disk again.
    pub fn resized(&self, port: usize) {
        self.controller.with_device(port, |device| {
            if let Device::Disk(disk) = device {
                disk.resized();
            }
        });
    }

    /// Goes on with commands that a restored snapshot holds. To be called once guest memory is there and the machine runs again;
    /// harmless otherwise.
    pub fn resume(&self) {
        self.controller.start_all();
    }
}

impl PciDevice for Ahci {
    fn function(&self) -> &PciFunction {
        &self.controller.function
    }

    fn config_written(&self, offset: u16, len: usize) {
        // The command register, or a capability: bus mastering or MSI may have been switched.
        let offset = usize::from(offset);
        if offset < COMMAND + 2 && offset + len > COMMAND || offset >= CAPABILITIES_START {
            self.controller.config_written();
        }
    }

    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if bar == ABAR {
            self.controller.read(offset, data);
        }
    }

    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) {
        if bar == ABAR {
            self.controller.write(offset, data);
        }
    }
}

impl Persist for Ahci {
    type State = AhciState;
    const VERSION: u32 = 1;

    fn save(&self) -> AhciState {
        self.controller.save()
    }

    fn restore(&self, state: AhciState) -> Result<(), SnapshotError> {
        self.controller.restore(state)
    }
}

/// Text as ATA has it: two characters a word, the first one in the high byte, filled up with spaces.
fn text_words(words: &mut [u16], text: &str) {
    let printable = |c: char| if c == ' ' || c.is_ascii_graphic() { c as u8 } else { b' ' };
    let mut bytes = text.chars().map(printable).chain(std::iter::repeat(b' '));
    for word in words {
        let high = bytes.next().unwrap_or(b' ');
        let low = bytes.next().unwrap_or(b' ');
        *word = u16::from_be_bytes([high, low]);
    }
}
