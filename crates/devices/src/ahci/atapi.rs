//! An ATAPI device: the ATA side of a drive whose real commands are SCSI's (ACS-3 §4.3 for the PACKET feature set; MMC-6 for what
//! goes through it). What executes those is a [`PacketDevice`].

use std::sync::Arc;

use block::Span;
use serde::{Deserialize, Serialize};

use super::ata::bits::{command, error, feature, power, status};
use super::ata::checksum;
use super::bits::table;
use super::device::{Command, Failure, Outcome, Plan, Protocol, Todo};
use super::{DiskIdentity, text_words};

/// Features register of [`command::PACKET`]: data is transferred by DMA.
const FEATURE_DMA: u16 = 1 << 0;
/// Count register at the end of a packet: the command has completed (command and to-host bits).
const COMPLETED: u16 = 3;
/// Address and count of a device that speaks ATAPI (ACS-3 §9.1).
const SIGNATURE_LBA: u64 = 0xeb_1401;
/// What it shows after a reset. It is not ready before somebody has talked to it.
pub(super) const SIGNATURE: Outcome =
    Outcome { status: 0, error: error::PASSED, count: 1, lba: SIGNATURE_LBA, device: 0 };
/// The sense key for parameters that make no sense.
const ILLEGAL_REQUEST: u8 = 5;

/// Why a packet failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PacketError {
    /// CHECK CONDITION, with this sense key. The unit keeps the rest for REQUEST SENSE.
    Sense(u8),
    /// The data's place is not guest memory.
    Memory,
}

/// The end of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketEnd {
    /// Bytes transferred.
    pub transferred: u64,
    /// There was more data than room for it.
    pub overflow: bool,
    /// Whether it went well.
    pub result: Result<(), PacketError>,
}

/// A SCSI command for a [`PacketDevice`].
pub struct Packet {
    /// The command, of which 12 bytes count.
    pub cdb: [u8; table::ACMD_BYTES],
    /// Where its data is or goes in guest memory.
    pub data: Vec<Span>,
    /// Called once at the end, on any thread, also from within [`PacketDevice::execute`].
    pub done: Box<dyn FnOnce(PacketEnd) + Send>,
}

/// A unit that executes SCSI commands: one at a time, which the port sees to.
pub trait PacketDevice: Send + Sync {
    /// Takes a command.
    fn execute(&self, packet: Packet);

    /// The device is reset; no command is on its way.
    fn reset(&self);
}

/// Registers of an ATAPI device. The unit's are saved by whoever has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AtapiState {
    dma_mode: u8,
}

/// An ATAPI device.
pub(super) struct AtapiDevice {
    unit: Arc<dyn PacketDevice>,
    identity: DiskIdentity,
    state: AtapiState,
}

const ULTRA_DMA_6: u8 = 0x46;

impl AtapiDevice {
    pub fn new(unit: Arc<dyn PacketDevice>, identity: DiskIdentity) -> Self {
        AtapiDevice { unit, identity, state: AtapiState { dma_mode: ULTRA_DMA_6 } }
    }

    pub fn unit(&self) -> &Arc<dyn PacketDevice> {
        &self.unit
    }

    pub fn begin(&mut self, command: &Command, cdb: [u8; table::ACMD_BYTES]) -> Plan {
        let good = command.good();
        match command.code {
            command::PACKET => {
                let outcome = Outcome { count: COMPLETED, ..good };
                let [_, low, high, ..] = command.lba.to_le_bytes();
                let protocol = match command.features & FEATURE_DMA {
                    0 => Protocol::Packet(u16::from_le_bytes([low, high])),
                    _ => Protocol::Dma,
                };
                Plan { protocol, todo: Todo::Packet { cdb }, outcome }
            }
            command::IDENTIFY_PACKET_DEVICE => {
                let block = Protocol::PioIn(super::ata::bits::log::PAGE as u16);
                Plan { protocol: block, todo: Todo::Send(self.identify()), outcome: good }
            }
            // Commands of disks show by the signature what this is (ACS-3 §7.12, §7.26).
            command::IDENTIFY_DEVICE | command::READ_SECTORS => {
                Plan::ends(Outcome { count: 1, lba: SIGNATURE_LBA, ..command.failed(error::ABRT) })
            }
            command::DEVICE_RESET => {
                self.soft_reset();
                Plan::ends(SIGNATURE)
            }
            command::EXECUTE_DEVICE_DIAGNOSTIC => Plan::ends(SIGNATURE),
            command::SET_FEATURES if command.subcommand() == feature::SET_TRANSFER_MODE => {
                let value = command.count as u8;
                match (value >> 3, value & 7) {
                    (0, 0..=1) | (1, 0..=4) => {}
                    (4, 0..=2) | (8, 0..=6) => self.state.dma_mode = value,
                    _ => return command.aborted(),
                }
                Plan::ends(good)
            }
            command::CHECK_POWER_MODE => Plan::ends(Outcome { count: power::ACTIVE.into(), ..good }),
            command::IDLE_IMMEDIATE | command::STANDBY_IMMEDIATE => Plan::ends(good),
            _ => command.aborted(),
        }
    }

    pub fn failure(&self, command: &Command, failure: &Failure) -> Outcome {
        let key = if let Failure::Sense(key) = failure { *key & 0xf } else { ILLEGAL_REQUEST };
        let aborted = if key == ILLEGAL_REQUEST { error::ABRT } else { 0 };
        Outcome { count: COMPLETED, status: status::GOOD | status::ERR, ..command.failed(key << 4 | aborted) }
    }

    pub fn hard_reset(&mut self) {
        self.state.dma_mode = ULTRA_DMA_6;
        self.unit.reset();
    }

    pub fn soft_reset(&mut self) {
        self.unit.reset();
    }

    pub fn save(&self) -> AtapiState {
        self.state.clone()
    }

    pub fn restore(&mut self, state: AtapiState) {
        self.state = state;
    }

    /// IDENTIFY PACKET DEVICE (ACS-3 §7.13).
    fn identify(&self) -> Vec<u8> {
        let mut words = [0u16; 256];
        // ATAPI, a CD or DVD drive, removable, data is requested within 50 µs, packets of 12 bytes.
        words[0] = 2 << 14 | 5 << 8 | 1 << 7 | 2 << 5;
        text_words(&mut words[10..20], &self.identity.serial);
        text_words(&mut words[23..27], &self.identity.firmware);
        text_words(&mut words[27..47], &self.identity.model);
        // DMA, LBA, IORDY.
        words[49] = 1 << 8 | 1 << 9 | 1 << 10 | 1 << 11;
        words[50] = 1 << 14;
        words[53] = 1 << 1 | 1 << 2;
        let mode = self.state.dma_mode;
        let selected = |kind: u8| if mode & 0x78 == kind { 1 << 8 << (mode & 7) } else { 0 };
        words[63] = 0x0007 | selected(0x20);
        words[64] = 0x0003;
        words[65..69].fill(120);
        words[76] = 1 << 1 | 1 << 2 | 1 << 3;
        words[77] = 3 << 1;
        words[80] = 0x07f0;
        // Power management, PACKET, DEVICE RESET, NOP.
        words[82] = 1 << 3 | 1 << 4 | 1 << 9 | 1 << 14;
        words[83] = 1 << 14;
        words[84] = 1 << 14;
        words[85] = words[82];
        words[87] = 1 << 14;
        words[88] = 0x007f | selected(0x40);
        words[222] = 0x107f;
        let mut bytes = [0; 512];
        for (pair, word) in bytes.chunks_exact_mut(2).zip(words) {
            pair.copy_from_slice(&word.to_le_bytes());
        }
        bytes[510] = 0xa5;
        checksum(&mut bytes);
        bytes.to_vec()
    }
}
