//! Logs that READ LOG EXT and READ LOG DMA EXT show (ACS-3 §7.24 and annex A).

use super::super::device::{Command, Plan, Protocol};
use super::AtaDisk;
use super::bits::log::{self, PAGE};
use super::identify::checksum;

/// Pages of the device statistics that there are, but for the list of them.
const STATISTICS_PAGES: [u8; 2] = [STATISTICS_GENERAL, STATISTICS_ERRORS];
const STATISTICS_GENERAL: u8 = 1;
const STATISTICS_ERRORS: u8 = 4;
/// Pages of the IDENTIFY DEVICE data log, but for the list of them.
const IDENTIFY_PAGES: [u8; 3] = [IDENTIFY_COPY, IDENTIFY_CAPACITY, IDENTIFY_STRINGS];
const IDENTIFY_COPY: u8 = 1;
const IDENTIFY_CAPACITY: u8 = 2;
const IDENTIFY_STRINGS: u8 = 5;
/// Marks a quadword of the IDENTIFY DEVICE data log as valid.
const VALID: u64 = 1 << 63;
/// Marks a statistic as one that there is and that is valid.
const STATISTIC: u64 = 1 << 63 | 1 << 62;

fn put(page: &mut [u8; PAGE], offset: usize, bytes: &[u8]) {
    page[offset..offset + bytes.len()].copy_from_slice(bytes);
}

fn put_u64(page: &mut [u8; PAGE], offset: usize, value: u64) {
    put(page, offset, &value.to_le_bytes());
}

/// The page that lists the pages of a log.
fn list_of_pages(pages: &[u8]) -> [u8; PAGE] {
    let mut page = header(0);
    page[8] = pages.len() as u8 + 1;
    put(&mut page, 10, pages);
    page
}

/// A page that begins with its revision and number.
fn header(number: u8) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    put_u64(&mut page, 0, u64::from(number) << 16 | 1);
    page
}

impl AtaDisk {
    /// Pages of a log; 0 if there is none.
    pub(super) fn log_pages(&self, address: u8) -> u16 {
        match address {
            log::DIRECTORY | log::EXTENDED_SELF_TEST | log::NCQ_COMMAND_ERROR => 1,
            log::DEVICE_STATISTICS => u16::from(STATISTICS_ERRORS) + 1,
            log::NCQ_SEND_AND_RECEIVE if self.disk.info().discard => 1,
            log::IDENTIFY_DEVICE_DATA => u16::from(IDENTIFY_STRINGS) + 1,
            _ => 0,
        }
    }

    pub(super) fn read_log(&self, command: &Command, protocol: Protocol, now_ns: u64) -> Plan {
        let [address, low, _, _, high, ..] = command.lba.to_le_bytes();
        let first = u16::from_le_bytes([low, high]);
        let pages = self.log_pages(address);
        let Some(end) = first.checked_add(command.count).filter(|end| command.count > 0 && *end <= pages)
        else {
            return command.aborted();
        };
        let bytes = (first..end).flat_map(|page| self.log_page(address, page, now_ns)).collect();
        self.send(command, protocol, bytes)
    }

    /// A page of a log; zeros for one in a gap.
    fn log_page(&self, address: u8, page: u16, now_ns: u64) -> [u8; PAGE] {
        match (address, page as u8) {
            (log::DIRECTORY, _) => self.directory(),
            (log::DEVICE_STATISTICS, 0) => list_of_pages(&STATISTICS_PAGES),
            (log::DEVICE_STATISTICS, STATISTICS_GENERAL) => self.general_statistics(now_ns),
            (log::DEVICE_STATISTICS, STATISTICS_ERRORS) => {
                let mut page = header(STATISTICS_ERRORS);
                put_u64(&mut page, 8, STATISTIC | u64::from(self.statistics.uncorrectable as u32));
                page
            }
            (log::EXTENDED_SELF_TEST, _) => self.smart.extended_self_test_log(),
            (log::NCQ_COMMAND_ERROR, _) => self.queue_error_page(),
            (log::NCQ_SEND_AND_RECEIVE, _) => {
                let mut page = [0; PAGE];
                // Data set management can be sent, and of that, TRIM.
                page[0] = 1 << 0;
                page[4] = 1 << 0;
                page
            }
            (log::IDENTIFY_DEVICE_DATA, 0) => list_of_pages(&IDENTIFY_PAGES),
            (log::IDENTIFY_DEVICE_DATA, IDENTIFY_COPY) => self.identify(),
            (log::IDENTIFY_DEVICE_DATA, IDENTIFY_CAPACITY) => self.capacity(),
            (log::IDENTIFY_DEVICE_DATA, IDENTIFY_STRINGS) => self.strings(),
            _ => [0; PAGE],
        }
    }

    fn directory(&self) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        put(&mut page, 0, &1u16.to_le_bytes());
        for address in 1..=u8::MAX {
            put(&mut page, 2 * usize::from(address), &self.log_pages(address).to_le_bytes());
        }
        page
    }

    fn general_statistics(&self, now_ns: u64) -> [u8; PAGE] {
        const MASK_48: u64 = (1 << 48) - 1;
        let statistics = &self.statistics;
        let mut page = header(STATISTICS_GENERAL);
        let hours = self.hours(now_ns);
        let values = [
            1,
            u64::from(u32::try_from(hours).unwrap_or(u32::MAX)),
            statistics.sectors_written & MASK_48,
            statistics.writes & MASK_48,
            statistics.sectors_read & MASK_48,
            statistics.reads & MASK_48,
        ];
        for (i, value) in values.into_iter().enumerate() {
            put_u64(&mut page, 8 * (i + 1), STATISTIC | value);
        }
        page
    }

    /// The queued command that failed last (ACS-3 §A.14); with bit 7 of the first byte, none.
    fn queue_error_page(&self) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        match &self.queue_error {
            None => page[0] = 1 << 7,
            Some(failed) => {
                let outcome = failed.outcome;
                page[0] = failed.tag;
                page[2] = outcome.status;
                page[3] = outcome.error;
                let [l0, l1, l2, l3, l4, l5, _, _] = outcome.lba.to_le_bytes();
                put(&mut page, 4, &[l0, l1, l2, outcome.device, l3, l4, l5]);
                put(&mut page, 12, &outcome.count.to_le_bytes());
            }
        }
        checksum(&mut page);
        page
    }

    fn capacity(&self) -> [u8; PAGE] {
        let sectors = self.disk.info().sectors;
        let per_physical = u64::from((sectors.physical / sectors.logical).max(1).ilog2());
        let mut page = header(IDENTIFY_CAPACITY);
        put_u64(&mut page, 0, VALID | u64::from(IDENTIFY_CAPACITY) << 16 | 1);
        put_u64(&mut page, 8, VALID | self.sectors);
        put_u64(&mut page, 16, VALID | 1 << 62 | 1 << 61 | per_physical << 16);
        put_u64(&mut page, 24, VALID | u64::from(sectors.logical / 2));
        page
    }

    /// Serial number, firmware revision and model, in the order of IDENTIFY DEVICE.
    fn strings(&self) -> [u8; PAGE] {
        let identify = self.identify();
        let mut page = header(IDENTIFY_STRINGS);
        put_u64(&mut page, 0, VALID | u64::from(IDENTIFY_STRINGS) << 16 | 1);
        put(&mut page, 8, &identify[20..40]);
        put(&mut page, 32, &identify[46..54]);
        put(&mut page, 48, &identify[54..94]);
        page
    }
}
