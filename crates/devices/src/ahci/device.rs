//! What a port and the device on its cable have to say to each other: a command with its registers, what the port is to do for
//! it, and the registers at its end.

use std::sync::Arc;

use block::{Disk, IoError};
use serde::{Deserialize, Serialize};

use super::ata::AtaDisk;
use super::ata::bits::{DEVICE_LBA, command, error, status};
use super::atapi::{AtapiDevice, PacketDevice};
use super::bits::{fis, table};
use crate::snapshot::SnapshotError;

/// Registers that the host has written (SATA 3.1 §10.5.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Command {
    pub code: u8,
    pub features: u16,
    pub count: u16,
    /// 48 bits.
    pub lba: u64,
    pub device: u8,
    pub auxiliary: u32,
}

impl Command {
    /// The command in a host to device frame.
    pub fn from_fis(fis: &[u8; table::CFIS_BYTES]) -> Self {
        let lba = [fis[4], fis[5], fis[6], fis[8], fis[9], fis[10], 0, 0];
        Command {
            code: fis[2],
            features: u16::from_le_bytes([fis[3], fis[11]]),
            count: u16::from_le_bytes([fis[12], fis[13]]),
            lba: u64::from_le_bytes(lba),
            device: fis[7],
            auxiliary: u32::from_le_bytes([fis[16], fis[17], fis[18], fis[19]]),
        }
    }

    /// The address in a 28-bit command.
    pub fn lba28(&self) -> u64 {
        u64::from(self.device & 0xf) << 24 | self.lba & 0xff_ffff
    }

    /// The low half of the features register: subcommands.
    pub fn subcommand(&self) -> u8 {
        self.features as u8
    }

    /// Whether the command goes into the device's queue.
    pub fn queued(&self) -> bool {
        matches!(
            self.code,
            command::READ_FPDMA_QUEUED
                | command::WRITE_FPDMA_QUEUED
                | command::NCQ_NON_DATA
                | command::SEND_FPDMA_QUEUED
                | command::RECEIVE_FPDMA_QUEUED
        )
    }

    /// The tag of a queued command.
    pub fn tag(&self) -> u8 {
        (self.count as u8) >> 3
    }

    /// The command has ended well, with all registers as the host wrote them.
    pub fn good(&self) -> Outcome {
        Outcome { status: status::GOOD, error: 0, count: self.count, lba: self.lba, device: self.device }
    }

    /// The command has ended with error bits.
    pub fn failed(&self, error: u8) -> Outcome {
        Outcome { status: status::GOOD | status::ERR, error, ..self.good() }
    }

    /// The command is not known, or its parameters make no sense.
    pub fn aborted(&self) -> Plan {
        Plan::ends(self.failed(error::ABRT))
    }
}

/// Registers that the device shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Outcome {
    pub status: u8,
    pub error: u8,
    pub count: u16,
    pub lba: u64,
    pub device: u8,
}

impl Outcome {
    /// With an address as 28-bit commands answer it.
    pub fn with_lba28(self, lba: u64) -> Self {
        let device = DEVICE_LBA | (lba >> 24 & 0xf) as u8;
        Outcome { lba: lba & 0xff_ffff, device, ..self }
    }

    /// Whether it tells of an error.
    pub fn is_error(&self) -> bool {
        self.status & status::ERR != 0
    }

    /// The register frame that carries it (SATA 3.1 §10.5.6).
    pub fn to_fis(self, interrupt: bool) -> [u8; 20] {
        let [l0, l1, l2, l3, l4, l5, _, _] = self.lba.to_le_bytes();
        let [c0, c1] = self.count.to_le_bytes();
        let flags = if interrupt { fis::INTERRUPT } else { 0 };
        [
            fis::D2H,
            flags,
            self.status,
            self.error,
            l0,
            l1,
            l2,
            self.device,
            l3,
            l4,
            l5,
            0,
            c0,
            c1,
            0,
            0,
            0,
            0,
            0,
            0,
        ]
    }
}

/// How a command's data and its end are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    /// Register frame at the end. Also commands without data.
    Dma,
    /// Setup frame with each block of up to this many bytes; that of the last one is the end.
    PioIn(u16),
    /// Setup frame with each block, register frame at the end.
    PioOut(u16),
    /// Accepted at once, set device bits frame at the end.
    Queued,
    /// A SCSI command by PIO: setup frame with each block of up to so many bytes, register frame at the end.
    Packet(u16),
}

/// What is to be done for a command.
pub(super) enum Todo {
    /// Nothing: it has ended.
    Nothing,
    /// These bytes go to the host.
    Send(Vec<u8>),
    /// Sectors are read or written. Bytes.
    Access { write: bool, fua: bool, offset: u64, len: u64 },
    /// Sectors are read and forgotten. Bytes.
    Verify { offset: u64, len: u64 },
    /// This many bytes of ranges come from the host, and the ranges are given back.
    Trim { list_bytes: usize },
    /// All is made stable.
    Flush,
    /// A SCSI command.
    Packet { cdb: [u8; table::ACMD_BYTES] },
}

/// How a command goes on.
pub(super) struct Plan {
    pub protocol: Protocol,
    pub todo: Todo,
    /// The registers at the end if all goes well.
    pub outcome: Outcome,
}

impl Plan {
    /// There is nothing to do.
    pub fn ends(outcome: Outcome) -> Self {
        Plan { protocol: Protocol::Dma, todo: Todo::Nothing, outcome }
    }
}

/// Why a command could not be done.
#[derive(Debug)]
pub(super) enum Failure {
    /// The disk says so, of what is at this offset in bytes.
    Disk { error: IoError, offset: u64 },
    /// The command's parameters, seen when its data was there.
    Aborted,
    /// The table has no room for the data.
    Overflow,
    /// The table, or what it points to, is not memory.
    Memory,
    /// A SCSI command's status is not GOOD; this is its sense key.
    Sense(u8),
}

/// What does the work of a device.
#[derive(Clone)]
pub(super) enum Worker {
    Disk(Arc<Disk>),
    Packet(Arc<dyn PacketDevice>),
}

/// The device on a port's cable.
pub(super) enum Device {
    Disk(AtaDisk),
    Packet(AtapiDevice),
}

/// Registers and logs of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum DeviceState {
    Disk(super::ata::AtaState),
    Packet(super::atapi::AtapiState),
}

impl Device {
    /// A command has come. `packet` is what its command table has in the place of a SCSI command, `now_ns` the guest's time.
    pub fn begin(&mut self, command: &Command, packet: [u8; table::ACMD_BYTES], now_ns: u64) -> Plan {
        match self {
            Device::Disk(disk) => disk.begin(command, now_ns),
            Device::Packet(device) => device.begin(command, packet),
        }
    }

    /// A command has been done that was to move data; `write` from the host.
    pub fn moved(&mut self, write: bool, bytes: u64) {
        if let Device::Disk(disk) = self {
            disk.moved(write, bytes);
        }
    }

    /// A command has failed; the registers that tell so.
    pub fn failure(&mut self, command: &Command, failure: &Failure) -> Outcome {
        match self {
            Device::Disk(disk) => disk.failure(command, failure),
            Device::Packet(device) => device.failure(command, failure),
        }
    }

    /// A queued command has failed: remembered for the log.
    pub fn queue_failed(&mut self, tag: u8, outcome: Outcome) {
        if let Device::Disk(disk) = self {
            disk.queue_failed(tag, outcome);
        }
    }

    /// COMRESET, or power.
    pub fn hard_reset(&mut self) {
        match self {
            Device::Disk(disk) => disk.hard_reset(),
            Device::Packet(device) => device.hard_reset(),
        }
    }

    /// SRST.
    pub fn soft_reset(&mut self) {
        match self {
            Device::Disk(disk) => disk.soft_reset(),
            Device::Packet(device) => device.soft_reset(),
        }
    }

    /// What a reset ends with: diagnosis and signature (ACS-3 §9.1).
    pub fn signature(&self) -> Outcome {
        match self {
            Device::Disk(_) => {
                Outcome { status: status::GOOD, error: error::PASSED, count: 1, lba: 1, device: 0 }
            }
            Device::Packet(_) => super::atapi::SIGNATURE,
        }
    }

    /// What does its work.
    pub fn worker(&self) -> Worker {
        match self {
            Device::Disk(disk) => Worker::Disk(disk.disk().clone()),
            Device::Packet(device) => Worker::Packet(device.unit().clone()),
        }
    }

    pub fn save(&self, now_ns: u64) -> DeviceState {
        match self {
            Device::Disk(disk) => DeviceState::Disk(disk.save(now_ns)),
            Device::Packet(device) => DeviceState::Packet(device.save()),
        }
    }

    /// Whether a state can be this device's.
    pub fn check(&self, state: &DeviceState) -> Result<(), SnapshotError> {
        match (self, state) {
            (Device::Disk(_), DeviceState::Disk(state)) => state.check(),
            (Device::Packet(_), DeviceState::Packet(_)) => Ok(()),
            _ => Err(SnapshotError::Invalid("an AHCI port with another kind of device".into())),
        }
    }

    /// Puts back a state that [`Device::check`] has found to fit.
    pub fn restore(&mut self, state: DeviceState, now_ns: u64) {
        match (self, state) {
            (Device::Disk(disk), DeviceState::Disk(state)) => disk.restore(state, now_ns),
            (Device::Packet(device), DeviceState::Packet(state)) => device.restore(state),
            _ => {}
        }
    }
}
