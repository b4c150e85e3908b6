//! SMART (ACS-2 §7.48): a disk that never fails by itself, and says so in the form that monitoring programs read.
//!
//! A self-test ends at once and well, and is entered in the logs of self-tests. Errors are not logged.

use serde::{Deserialize, Serialize};

use super::super::device::{Command, Outcome, Plan};
use super::bits::log::{self, PAGE};
use super::bits::smart;
use super::identify::checksum;
use super::{AtaDisk, BLOCK};
use crate::snapshot::SnapshotError;

/// Entries of the self-test log.
const TESTS: usize = 21;
/// Entries of a page of the extended self-test log.
const EXTENDED_TESTS: usize = 19;
/// Bytes of an entry of the attribute and threshold tables.
const ATTRIBUTE_BYTES: usize = 12;
/// The attribute's value is kept at all times; it is updated by offline tests or not; it counts events.
const COUNTER: u16 = 0x0032;
/// The same, and a value at or below the threshold means that the disk is about to fail.
const PREFAILURE: u16 = 0x0033;

/// Kinds of self-tests: the low byte of the address in [`smart::EXECUTE_OFFLINE_IMMEDIATE`].
mod test {
    pub const OFFLINE: u8 = 0x00;
    pub const SHORT: u8 = 0x01;
    pub const EXTENDED: u8 = 0x02;
    pub const ABORT: u8 = 0x7f;
    /// The command ends only with the test.
    pub const CAPTIVE: u8 = 0x80;
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SelfTest {
    kind: u8,
    hours: u16,
}

/// What SMART keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SmartState {
    pub(super) enabled: bool,
    /// An offline collection of data has been made.
    collected: bool,
    /// The latest self-tests, oldest first.
    tests: Vec<SelfTest>,
}

impl Default for SmartState {
    fn default() -> Self {
        SmartState { enabled: true, collected: false, tests: Vec::new() }
    }
}

impl SmartState {
    pub(super) fn check(&self) -> Result<(), SnapshotError> {
        if self.tests.len() > TESTS {
            return Err(SnapshotError::Invalid(format!("ATA disk with {} self-tests", self.tests.len())));
        }
        Ok(())
    }

    fn record(&mut self, kind: u8, hours: u64) {
        if self.tests.len() >= TESTS {
            self.tests.remove(0);
        }
        self.tests.push(SelfTest { kind, hours: u16::try_from(hours).unwrap_or(u16::MAX) });
    }

    /// The entries of a log of self-tests: each `len` bytes, the newest being the last one.
    fn entries<const LEN: usize>(&self, most: usize) -> Vec<[u8; LEN]> {
        let skip = self.tests.len().saturating_sub(most);
        let entry = |test: &SelfTest| {
            let mut entry = [0; LEN];
            entry[0] = test.kind;
            // Byte 1: completed without error.
            entry[2..4].copy_from_slice(&test.hours.to_le_bytes());
            entry
        };
        self.tests.iter().skip(skip).map(entry).collect()
    }

    fn self_test_log(&self) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        page[0] = 1;
        let entries = self.entries::<24>(TESTS);
        page[508] = entries.len() as u8;
        page[2..2 + 24 * entries.len()].copy_from_slice(entries.as_flattened());
        checksum(&mut page);
        page
    }

    pub(super) fn extended_self_test_log(&self) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        page[0] = 1;
        let entries = self.entries::<26>(EXTENDED_TESTS);
        page[2] = entries.len() as u8;
        page[4..4 + 26 * entries.len()].copy_from_slice(entries.as_flattened());
        checksum(&mut page);
        page
    }
}

/// An attribute: number, flags, threshold, raw value.
type Attribute = (u8, u16, u8, u64);

impl AtaDisk {
    fn attributes(&self, now_ns: u64) -> [Attribute; 10] {
        let statistics = &self.statistics;
        [
            // Read error rate.
            (1, PREFAILURE, 6, 0),
            // Reallocated sectors.
            (5, PREFAILURE, 10, 0),
            // Power-on hours, power cycles.
            (9, COUNTER, 0, self.hours(now_ns)),
            (12, COUNTER, 0, 1),
            // Uncorrectable errors that were reported.
            (187, COUNTER, 0, statistics.uncorrectable),
            // Sectors that wait to be reallocated, that could not be.
            (197, COUNTER, 0, 0),
            (198, COUNTER, 0, 0),
            // Errors of the link.
            (199, COUNTER, 0, 0),
            // Sectors written, read.
            (241, COUNTER, 0, statistics.sectors_written),
            (242, COUNTER, 0, statistics.sectors_read),
        ]
    }

    fn smart_data(&self, now_ns: u64) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        page[0] = 0x10;
        let table = page[2..].chunks_exact_mut(ATTRIBUTE_BYTES);
        for (entry, (id, flags, _, raw)) in table.zip(self.attributes(now_ns)) {
            entry[0] = id;
            entry[1..3].copy_from_slice(&flags.to_le_bytes());
            // Value and worst value: as good as new.
            entry[3..5].fill(100);
            entry[5..11].copy_from_slice(&raw.to_le_bytes()[..6]);
        }
        // Offline collection: completed or never started. Self-test: completed without error.
        page[362] = if self.smart.collected { 0x02 } else { 0x00 };
        // Offline collection and self-tests can be started.
        page[367] = 1 << 0 | 1 << 4;
        // Values are saved, also by themselves.
        page[368] = 0x03;
        // Minutes of a short and of an extended self-test.
        page[372] = 1;
        page[373] = 1;
        checksum(&mut page);
        page
    }

    fn smart_thresholds(&self) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        page[0] = 0x10;
        let table = page[2..].chunks_exact_mut(ATTRIBUTE_BYTES);
        for (entry, (id, _, threshold, _)) in table.zip(self.attributes(0)) {
            entry[0] = id;
            entry[1] = threshold;
        }
        checksum(&mut page);
        page
    }

    pub(super) fn smart(&mut self, command: &Command, now_ns: u64) -> Plan {
        let [parameter, signature_low, signature_high, ..] = command.lba.to_le_bytes();
        let signed = u64::from(u16::from_le_bytes([signature_low, signature_high])) == smart::SIGNATURE;
        let subcommand = command.subcommand();
        if !signed || !self.smart.enabled && subcommand != smart::ENABLE_OPERATIONS {
            return command.aborted();
        }
        match subcommand {
            smart::READ_DATA => self.send(command, BLOCK, self.smart_data(now_ns).to_vec()),
            smart::READ_THRESHOLDS => self.send(command, BLOCK, self.smart_thresholds().to_vec()),
            smart::READ_LOG => self.smart_log(command, parameter),
            smart::ENABLE_OPERATIONS => {
                self.smart.enabled = true;
                Plan::ends(command.good())
            }
            smart::DISABLE_OPERATIONS => {
                self.smart.enabled = false;
                Plan::ends(command.good())
            }
            // Values are always saved.
            smart::ATTRIBUTE_AUTOSAVE | smart::SAVE_ATTRIBUTE_VALUES | smart::AUTO_OFFLINE => {
                Plan::ends(command.good())
            }
            smart::EXECUTE_OFFLINE_IMMEDIATE => self.self_test(command, parameter, now_ns),
            // No threshold has been exceeded: the signature comes back as it was.
            smart::RETURN_STATUS => {
                let lba = smart::SIGNATURE << 8 | u64::from(parameter);
                Plan::ends(Outcome { lba, ..command.good() })
            }
            _ => command.aborted(),
        }
    }

    fn self_test(&mut self, command: &Command, kind: u8, now_ns: u64) -> Plan {
        match kind & !test::CAPTIVE {
            test::OFFLINE if kind == test::OFFLINE => self.smart.collected = true,
            test::SHORT | test::EXTENDED => {
                let hours = self.hours(now_ns);
                self.smart.record(kind, hours);
            }
            // There is never one under way.
            test::ABORT if kind == test::ABORT => {}
            _ => return command.aborted(),
        }
        Plan::ends(command.good())
    }

    fn smart_log(&self, command: &Command, address: u8) -> Plan {
        let page = match address {
            log::DIRECTORY => {
                let mut page = [0; PAGE];
                page[0] = 1;
                page[2 * usize::from(log::SMART_SELF_TEST)] = 1;
                page
            }
            log::SMART_SELF_TEST => self.smart.self_test_log(),
            _ => return command.aborted(),
        };
        if command.count as u8 != 1 {
            return command.aborted();
        }
        self.send(command, BLOCK, page.to_vec())
    }
}
