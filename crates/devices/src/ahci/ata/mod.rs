//! A hard disk that speaks ATA (ACS-3; SATA 3.1 §13.6 for native command queueing) on a [`Disk`].
//!
//! 28-bit and 48-bit addresses, PIO, DMA and 32 queued commands, also trimming in the queue; SMART with self-tests, and logs.
//! There is no CHS addressing, and neither the security nor the device configuration, host protected area, error logging or
//! streaming features: IDENTIFY DEVICE does not show them and their commands are aborted.

pub(super) mod bits;
mod identify;
mod logs;
mod smart;
pub(super) mod trim;

use std::sync::Arc;

use block::{Disk, IoError};
use serde::{Deserialize, Serialize};

use super::DiskIdentity;
use super::device::{Command, Failure, Outcome, Plan, Protocol, Todo};
use crate::snapshot::SnapshotError;
use bits::log::PAGE;
use bits::{DEVICE_FUA, command, error, feature, power, status};
pub(super) use identify::checksum;
use smart::SmartState;

/// A block of 512 bytes, as most commands that are not about sectors transfer them.
const BLOCK: Protocol = Protocol::PioIn(PAGE as u16);
/// Nanoseconds of an hour, in which the life of a disk is told.
const HOUR_NS: u64 = 3600 * 1_000_000_000;
/// Sectors of the largest disk that 28 bits can address.
const MAX_SECTORS_28: u64 = 0x0fff_ffff;
/// What a data block of [`command::READ_MULTIPLE`] may hold at most.
const MAX_MULTIPLE_BYTES: u32 = 32 << 10;
const MAX_MULTIPLE: u32 = 16;

/// Registers and logs of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct AtaState {
    settings: Settings,
    smart: SmartState,
    queue_error: Option<QueueError>,
    statistics: Statistics,
    /// Nanoseconds since it was first switched on.
    powered_ns: u64,
}

impl AtaState {
    /// Whether a disk can be in it.
    pub(super) fn check(&self) -> Result<(), SnapshotError> {
        let multiple = u32::from(self.settings.multiple);
        if multiple > MAX_MULTIPLE || multiple != 0 && !multiple.is_power_of_two() {
            return Err(SnapshotError::Invalid(format!("ATA disk with blocks of {multiple} sectors")));
        }
        self.smart.check()
    }
}

/// What commands set and resets bring back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Settings {
    write_cache: bool,
    look_ahead: bool,
    /// Level of advanced power management, 0 if it is off.
    apm: u8,
    /// Sectors of a block of [`command::READ_MULTIPLE`], 0 if there are none.
    multiple: u8,
    /// As [`feature::SET_TRANSFER_MODE`] sets it: a DMA mode.
    dma_mode: u8,
    /// A software reset brings the defaults back.
    reverting: bool,
    power: Power,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Power {
    Active,
    Idle,
    Standby,
    /// Only a reset ends it.
    Sleep,
}

/// A queued command that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct QueueError {
    tag: u8,
    outcome: Outcome,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Statistics {
    reads: u64,
    writes: u64,
    sectors_read: u64,
    sectors_written: u64,
    uncorrectable: u64,
}

/// A hard disk.
pub(super) struct AtaDisk {
    disk: Arc<Disk>,
    identity: DiskIdentity,
    /// Size that the host knows of.
    sectors: u64,
    settings: Settings,
    smart: SmartState,
    queue_error: Option<QueueError>,
    statistics: Statistics,
    /// Guest time at which it was first switched on, or would have been.
    powered: Since,
}

/// A moment before now, perhaps before the guest's clock started.
#[derive(Clone, Copy, Default)]
struct Since {
    start_ns: u64,
    before_ns: u64,
}

impl Since {
    fn elapsed_ns(self, now_ns: u64) -> u64 {
        self.before_ns.saturating_add(now_ns.saturating_sub(self.start_ns))
    }
}

/// A command that transfers sectors.
struct Access {
    write: bool,
    fua: bool,
    /// 48-bit address and 16-bit count.
    ext: bool,
    how: How,
}

enum How {
    Dma,
    Pio,
    Multiple,
    Queued,
}

impl Access {
    fn of(code: u8) -> Option<Self> {
        let access = |write, fua, ext, how| Some(Access { write, fua, ext, how });
        match code {
            command::READ_SECTORS => access(false, false, false, How::Pio),
            command::READ_SECTORS_EXT => access(false, false, true, How::Pio),
            command::WRITE_SECTORS => access(true, false, false, How::Pio),
            command::WRITE_SECTORS_EXT => access(true, false, true, How::Pio),
            command::READ_MULTIPLE => access(false, false, false, How::Multiple),
            command::READ_MULTIPLE_EXT => access(false, false, true, How::Multiple),
            command::WRITE_MULTIPLE => access(true, false, false, How::Multiple),
            command::WRITE_MULTIPLE_EXT => access(true, false, true, How::Multiple),
            command::WRITE_MULTIPLE_FUA_EXT => access(true, true, true, How::Multiple),
            command::READ_DMA => access(false, false, false, How::Dma),
            command::READ_DMA_EXT => access(false, false, true, How::Dma),
            command::WRITE_DMA => access(true, false, false, How::Dma),
            command::WRITE_DMA_EXT => access(true, false, true, How::Dma),
            command::WRITE_DMA_FUA_EXT => access(true, true, true, How::Dma),
            command::READ_FPDMA_QUEUED => access(false, false, true, How::Queued),
            command::WRITE_FPDMA_QUEUED => access(true, false, true, How::Queued),
            _ => None,
        }
    }
}

impl AtaDisk {
    /// A disk that has just been switched on.
    pub fn new(disk: Arc<Disk>, identity: DiskIdentity) -> Self {
        let mut new = AtaDisk {
            settings: Settings::default_of(&disk),
            disk,
            identity,
            sectors: 0,
            smart: SmartState::default(),
            queue_error: None,
            statistics: Statistics::default(),
            powered: Since::default(),
        };
        new.resized();
        new
    }

    /// Its disk.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Takes the size that the disk has now.
    pub fn resized(&mut self) {
        self.sectors = self.disk.info().size_bytes / self.sector_bytes();
    }

    fn sector_bytes(&self) -> u64 {
        self.disk.info().sectors.logical.into()
    }

    /// Sectors of a block of [`command::READ_MULTIPLE`] at most.
    fn max_multiple(&self) -> u32 {
        (MAX_MULTIPLE_BYTES / self.disk.info().sectors.logical).clamp(1, MAX_MULTIPLE)
    }

    fn hours(&self, now_ns: u64) -> u64 {
        self.powered.elapsed_ns(now_ns) / HOUR_NS
    }

    pub fn begin(&mut self, command: &Command, now_ns: u64) -> Plan {
        if self.settings.power == Power::Sleep {
            return command.aborted();
        }
        if let Some(access) = Access::of(command.code) {
            return self.access(command, &access);
        }
        let good = command.good();
        let (protocol, outcome) = (Protocol::Dma, good);
        match command.code {
            command::READ_VERIFY | command::READ_VERIFY_EXT => {
                let ext = command.code == command::READ_VERIFY_EXT;
                match self.range(command, ext, count(command, ext)) {
                    Ok((offset, len)) => {
                        self.settings.power = Power::Active;
                        Plan { protocol, todo: Todo::Verify { offset, len }, outcome }
                    }
                    Err(outcome) => Plan::ends(outcome),
                }
            }
            command::FLUSH_CACHE | command::FLUSH_CACHE_EXT => Plan { protocol, todo: Todo::Flush, outcome },
            command::DATA_SET_MANAGEMENT if command.features == bits::TRIM => {
                self.trim(command, command.count, Protocol::Dma)
            }
            // Subcommand 0, data set management, with the feature bits in the auxiliary register (ACS-3 §7.43.4).
            command::SEND_FPDMA_QUEUED
                if command.count >> 8 & 0x1f == 0 && command.auxiliary == u32::from(bits::TRIM) =>
            {
                self.trim(command, command.features, Protocol::Queued)
            }
            command::IDENTIFY_DEVICE => self.send(command, BLOCK, self.identify().to_vec()),
            // An ATAPI device would answer; this one shows by its signature that it is none (ACS-3 §7.13).
            command::IDENTIFY_PACKET_DEVICE => {
                Plan::ends(Outcome { count: 1, lba: 1, ..command.failed(error::ABRT) })
            }
            command::EXECUTE_DEVICE_DIAGNOSTIC => Plan::ends(Outcome {
                status: status::GOOD,
                error: error::PASSED,
                count: 1,
                lba: 1,
                device: 0,
            }),
            command::SET_FEATURES => self.set_features(command),
            command::SET_MULTIPLE_MODE => {
                let sectors = u32::from(command.count as u8);
                if sectors > self.max_multiple() || sectors != 0 && !sectors.is_power_of_two() {
                    return command.aborted();
                }
                self.settings.multiple = sectors as u8;
                Plan::ends(good)
            }
            command::READ_NATIVE_MAX => {
                let last = self.sectors.min(MAX_SECTORS_28).saturating_sub(1);
                Plan::ends(good.with_lba28(last))
            }
            command::READ_NATIVE_MAX_EXT => {
                Plan::ends(Outcome { lba: self.sectors.saturating_sub(1), ..good })
            }
            command::READ_LOG_EXT => self.read_log(command, BLOCK, now_ns),
            command::READ_LOG_DMA_EXT => self.read_log(command, Protocol::Dma, now_ns),
            command::SMART => self.smart(command, now_ns),
            command::CHECK_POWER_MODE => {
                let mode = match self.settings.power {
                    Power::Active => power::ACTIVE,
                    Power::Idle => power::IDLE,
                    Power::Standby | Power::Sleep => power::STANDBY,
                };
                Plan::ends(Outcome { count: mode.into(), ..good })
            }
            command::IDLE | command::IDLE_IMMEDIATE => {
                self.settings.power = Power::Idle;
                Plan::ends(good)
            }
            // What is in the write cache is written before the platters stop.
            command::STANDBY | command::STANDBY_IMMEDIATE => {
                self.settings.power = Power::Standby;
                Plan { protocol, todo: Todo::Flush, outcome }
            }
            command::SLEEP => {
                self.settings.power = Power::Sleep;
                Plan { protocol, todo: Todo::Flush, outcome }
            }
            // NOP is defined to be aborted.
            _ => command.aborted(),
        }
    }

    /// A command that sends bytes to the host.
    fn send(&self, command: &Command, protocol: Protocol, bytes: Vec<u8>) -> Plan {
        Plan { protocol, todo: Todo::Send(bytes), outcome: command.good() }
    }

    /// A range of sectors in bytes, or how the command fails if it is not on the disk.
    fn range(&self, command: &Command, ext: bool, sectors: u64) -> Result<(u64, u64), Outcome> {
        if !ext && command.device & bits::DEVICE_LBA == 0 {
            return Err(command.failed(error::ABRT));
        }
        let lba = if ext { command.lba } else { command.lba28() };
        if lba.saturating_add(sectors) > self.sectors {
            return Err(at(command.failed(error::IDNF), ext, lba.max(self.sectors)));
        }
        let bytes = self.sector_bytes();
        Ok((lba * bytes, sectors * bytes))
    }

    fn access(&mut self, command: &Command, access: &Access) -> Plan {
        let multiple = u64::from(self.settings.multiple);
        let block = match access.how {
            How::Multiple if multiple == 0 => return command.aborted(),
            How::Multiple => multiple * self.sector_bytes(),
            _ => self.sector_bytes(),
        };
        let block = block as u16;
        let protocol = match access.how {
            How::Dma => Protocol::Dma,
            How::Queued => Protocol::Queued,
            How::Pio | How::Multiple if access.write => Protocol::PioOut(block),
            How::Pio | How::Multiple => Protocol::PioIn(block),
        };
        let (sectors, fua) = match access.how {
            How::Queued => (whole(command.features.into(), 1 << 16), command.device & DEVICE_FUA != 0),
            _ => (count(command, access.ext), access.fua),
        };
        match self.range(command, access.ext, sectors) {
            Ok((offset, len)) => {
                self.settings.power = Power::Active;
                // Without a write cache every write is stable when it is done.
                let fua = access.write && (fua || !self.settings.write_cache);
                let todo = Todo::Access { write: access.write, fua, offset, len };
                Plan { protocol, todo, outcome: command.good() }
            }
            Err(outcome) => Plan::ends(outcome),
        }
    }

    fn trim(&mut self, command: &Command, blocks: u16, protocol: Protocol) -> Plan {
        if !self.disk.info().discard || blocks == 0 || blocks > trim::MAX_BLOCKS {
            return command.aborted();
        }
        self.settings.power = Power::Active;
        let todo = Todo::Trim { list_bytes: trim::list_bytes(blocks) };
        Plan { protocol, todo, outcome: command.good() }
    }

    fn set_features(&mut self, command: &Command) -> Plan {
        let settings = &mut self.settings;
        let value = command.count as u8;
        match command.subcommand() {
            feature::ENABLE_WRITE_CACHE => settings.write_cache = true,
            feature::DISABLE_WRITE_CACHE => {
                settings.write_cache = false;
                // From now on all that was written is stable.
                return Plan { protocol: Protocol::Dma, todo: Todo::Flush, outcome: command.good() };
            }
            feature::SET_TRANSFER_MODE => match (value >> 3, value & 7) {
                // PIO: the DMA mode stays.
                (0, 0..=1) | (1, 0..=4) => {}
                // Multiword DMA, Ultra DMA.
                (4, 0..=2) | (8, 0..=6) => settings.dma_mode = value,
                _ => return command.aborted(),
            },
            feature::ENABLE_APM if (1..=0xfe).contains(&value) => settings.apm = value,
            feature::DISABLE_APM => settings.apm = 0,
            feature::ENABLE_READ_LOOK_AHEAD => settings.look_ahead = true,
            feature::DISABLE_READ_LOOK_AHEAD => settings.look_ahead = false,
            feature::ENABLE_REVERTING => settings.reverting = true,
            feature::DISABLE_REVERTING => settings.reverting = false,
            _ => return command.aborted(),
        }
        Plan::ends(command.good())
    }

    pub fn moved(&mut self, write: bool, bytes: u64) {
        let sectors = bytes / self.sector_bytes();
        let (commands, total) = match write {
            true => (&mut self.statistics.writes, &mut self.statistics.sectors_written),
            false => (&mut self.statistics.reads, &mut self.statistics.sectors_read),
        };
        *commands = commands.saturating_add(1);
        *total = total.saturating_add(sectors);
    }

    pub fn failure(&mut self, command: &Command, failure: &Failure) -> Outcome {
        let Failure::Disk { error, offset } = failure else { return command.failed(error::ABRT) };
        let access = Access::of(command.code);
        let reads = match &access {
            Some(access) => !access.write,
            None => matches!(command.code, command::READ_VERIFY | command::READ_VERIFY_EXT),
        };
        let outcome = match error {
            IoError::OutOfRange => command.failed(error::IDNF),
            IoError::NoSpace | IoError::Host(_) if reads => {
                self.statistics.uncorrectable = self.statistics.uncorrectable.saturating_add(1);
                command.failed(error::UNC)
            }
            IoError::NoSpace | IoError::Host(_) => {
                let failed = command.failed(error::ABRT);
                Outcome { status: failed.status | status::DF, ..failed }
            }
            _ => return command.failed(error::ABRT),
        };
        let ext = access.map_or(command.code != command::READ_VERIFY, |access| access.ext);
        at(outcome, ext, offset / self.sector_bytes())
    }

    pub fn queue_failed(&mut self, tag: u8, outcome: Outcome) {
        self.queue_error = Some(QueueError { tag, outcome });
    }

    pub fn hard_reset(&mut self) {
        self.settings = Settings::default_of(&self.disk);
        self.reset();
    }

    pub fn soft_reset(&mut self) {
        if self.settings.reverting {
            self.settings = Settings::default_of(&self.disk);
        }
        // A disk that sleeps wakes up as far as standby (ACS-3 §4.15).
        if self.settings.power == Power::Sleep {
            self.settings.power = Power::Standby;
        }
        self.reset();
    }

    fn reset(&mut self) {
        self.queue_error = None;
    }

    pub fn save(&self, now_ns: u64) -> AtaState {
        AtaState {
            settings: self.settings.clone(),
            smart: self.smart.clone(),
            queue_error: self.queue_error.clone(),
            statistics: self.statistics.clone(),
            powered_ns: self.powered.elapsed_ns(now_ns),
        }
    }

    pub fn restore(&mut self, state: AtaState, now_ns: u64) {
        self.settings = state.settings;
        self.smart = state.smart;
        self.queue_error = state.queue_error;
        self.statistics = state.statistics;
        self.powered = Since { start_ns: now_ns, before_ns: state.powered_ns };
        self.resized();
    }
}

impl Settings {
    fn default_of(disk: &Disk) -> Self {
        Settings {
            write_cache: !disk.info().writethrough,
            look_ahead: true,
            apm: 0,
            multiple: 0,
            dma_mode: identify::ULTRA_DMA | identify::BEST_ULTRA_DMA,
            reverting: false,
            power: Power::Active,
        }
    }
}

/// A count register in which zero stands for one more than it can hold.
fn whole(count: u64, zero: u64) -> u64 {
    if count == 0 { zero } else { count }
}

/// Sectors that a command is about.
fn count(command: &Command, ext: bool) -> u64 {
    if ext { whole(command.count.into(), 1 << 16) } else { whole(u64::from(command.count as u8), 1 << 8) }
}

/// An outcome that tells of a sector.
fn at(outcome: Outcome, ext: bool, lba: u64) -> Outcome {
    if ext { Outcome { lba, ..outcome } } else { outcome.with_lba28(lba) }
}
