//! The log of a vhdx file ([MS-VHDX] §2.3): changes of metadata that were decided and perhaps not made.

use std::collections::BTreeMap;
use std::io;

use super::layout::{Guid, Header, checksum, guid_at, le32, le64};
use crate::image::Image;
use crate::image::fault::{Fault, invalid};
use crate::image::raw::RawImage;

/// What the log is made of.
const SECTOR: usize = 4096;
/// §2.3.1.1
const ENTRY_HEADER_BYTES: usize = 64;
const DESCRIPTOR_BYTES: usize = 32;

/// What a log changes, by place in the file: for files that are only read, instead of changing them.
#[derive(Default)]
pub(super) struct Overlay {
    pages: BTreeMap<u64, Vec<u8>>,
    /// Zeroed ranges, each with the pages that it has overwritten taken out of `pages`.
    zeroed: Vec<(u64, u64)>,
    /// How long the file would be at least.
    end: u64,
}

/// Zeroed ranges at most, in all entries.
const MAX_ZEROED: usize = 1 << 16;

/// A valid entry of the log.
struct Entry {
    bytes: Vec<u8>,
    sequence: u64,
    /// Where the oldest entry is that has to be replayed with it.
    tail: u64,
}

impl Overlay {
    /// Reads what the file would have after replaying.
    pub fn read(&self, file: &RawImage, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        file.read_bytes(at, bytes)?;
        let end = at + bytes.len() as u64;
        let mut put = |from: u64, len: u64, data: Option<&[u8]>| {
            let (start, stop) = (from.max(at), from.saturating_add(len).min(end));
            if start < stop
                && let Some(place) = bytes.get_mut((start - at) as usize..(stop - at) as usize)
            {
                match data {
                    None => place.fill(0),
                    Some(data) => {
                        place.copy_from_slice(&data[(start - from) as usize..(stop - from) as usize])
                    }
                }
            }
        };
        for (from, len) in &self.zeroed {
            put(*from, *len, None);
        }
        let first = at.saturating_sub(SECTOR as u64 - 1);
        for (from, page) in self.pages.range(first..end) {
            put(*from, SECTOR as u64, Some(page));
        }
        Ok(())
    }

    /// Makes the changes, for good.
    pub fn write(&self, file: &RawImage) -> io::Result<()> {
        if file.size() < self.end {
            file.resize(self.end)?;
        }
        for (at, len) in &self.zeroed {
            let end = at.saturating_add(*len).min(file.size());
            file.write_zeroes(*at, end.saturating_sub(*at), false)?;
        }
        for (at, page) in &self.pages {
            file.write_bytes(*at, page)?;
        }
        file.flush()
    }

    /// What the log of a file says, if it has one.
    pub fn of(file: &RawImage, header: &Header) -> Result<Overlay, Fault> {
        if !header.has_log() {
            return Ok(Overlay::default());
        }
        let (log_at, log_len) = header.log(file.size())?;
        let mut log = vec![0; log_len as usize];
        file.read_bytes(log_at, &mut log)?;
        let entries = active_sequence(&log, header.log_guid());
        let Some(newest) = entries.last() else {
            return invalid("its log has nothing to replay where it has to; the file is damaged");
        };
        // §2.3.1.1: the file was at least so long when the entry was written.
        if le64(&newest.bytes, 48) > file.size() {
            return invalid("the file is shorter than its log says; it is truncated");
        }
        let mut overlay =
            Overlay { end: le64(&newest.bytes, 56).min(file.size() + (64 << 30)), ..Overlay::default() };
        for entry in &entries {
            overlay.add(entry)?;
        }
        Ok(overlay)
    }

    fn add(&mut self, entry: &Entry) -> Result<(), Fault> {
        let count = le32(&entry.bytes, 24) as usize;
        let mut data_at = (ENTRY_HEADER_BYTES + count * DESCRIPTOR_BYTES).next_multiple_of(SECTOR);
        for index in 0..count {
            let at = ENTRY_HEADER_BYTES + index * DESCRIPTOR_BYTES;
            let Some(descriptor) = entry.bytes.get(at..at + DESCRIPTOR_BYTES) else { return broken() };
            let place = le64(descriptor, 16);
            // Nothing of the log's concern is before the region tables' end, nor beyond any file.
            if le64(descriptor, 24) != entry.sequence
                || !place.is_multiple_of(SECTOR as u64)
                || place > 1 << 60
            {
                return broken();
            }
            if descriptor.starts_with(b"zero") {
                let len = le64(descriptor, 8);
                if !len.is_multiple_of(SECTOR as u64) || len > 1 << 60 {
                    return broken();
                }
                if self.zeroed.len() >= MAX_ZEROED {
                    return broken();
                }
                let within: Vec<u64> = self.pages.range(place..place + len).map(|(at, _)| *at).collect();
                for at in within {
                    self.pages.remove(&at);
                }
                self.zeroed.push((place, len));
            } else if descriptor.starts_with(b"desc") {
                let Some(sector) = entry.bytes.get(data_at..data_at + SECTOR) else { return broken() };
                data_at += SECTOR;
                let sequence = u64::from(le32(sector, 4)) << 32 | u64::from(le32(sector, SECTOR - 4));
                if !sector.starts_with(b"data") || sequence != entry.sequence {
                    return broken();
                }
                // The first eight and last four bytes were taken by signature and sequence, and are in the descriptor.
                let mut page = sector.to_vec();
                page[..8].copy_from_slice(&descriptor[8..16]);
                page[SECTOR - 4..].copy_from_slice(&descriptor[4..8]);
                self.pages.insert(place, page);
            } else {
                return broken();
            }
        }
        Ok(())
    }
}

fn broken<T>() -> Result<T, Fault> {
    invalid("its log is broken")
}

/// The entry at a place of the log, if there is a valid one. It may go on at the log's beginning. `budget` is how many bytes may still be
/// looked through in all.
fn entry_at(log: &[u8], at: usize, guid: Guid, budget: &mut usize) -> Option<Entry> {
    let header = log.get(at..at + ENTRY_HEADER_BYTES)?;
    if !header.starts_with(b"loge") || guid_at(header, 32) != guid {
        return None;
    }
    let (len, tail, sequence, count) =
        (le32(header, 8) as usize, le32(header, 12), le64(header, 16), le32(header, 24) as usize);
    let descriptors = count.checked_mul(DESCRIPTOR_BYTES)?.checked_add(ENTRY_HEADER_BYTES)?;
    let tail_fine = (tail as usize).is_multiple_of(SECTOR) && (tail as usize) < log.len();
    if len == 0
        || !len.is_multiple_of(SECTOR)
        || len > log.len()
        || sequence == 0
        || !tail_fine
        || descriptors > len
    {
        return None;
    }
    *budget = budget.checked_sub(len)?;
    let first = len.min(log.len() - at);
    let mut bytes = log[at..at + first].to_vec();
    bytes.extend(&log[..len - first]);
    (le32(&bytes, 4) == checksum(&bytes, 4)).then_some(Entry { bytes, sequence, tail: u64::from(tail) })
}

/// The entries to be replayed, from the oldest (§2.3.2): the run of entries with the highest sequence number, as far as its newest one
/// refers back.
fn active_sequence(log: &[u8], guid: Guid) -> Vec<Entry> {
    let mut best: Vec<Entry> = Vec::new();
    // Entries follow one another, so each byte is looked through hardly more than once, unless somebody wants to keep us busy.
    let mut budget = log.len() * 8;
    let mut start = 0;
    while start < log.len() {
        let mut run: Vec<(usize, Entry)> = Vec::new();
        let (mut at, mut walked) = (start, 0);
        while walked < log.len()
            && let Some(entry) = entry_at(log, at, guid, &mut budget)
            && run.last().is_none_or(|(_, last)| last.sequence.checked_add(1) == Some(entry.sequence))
        {
            let len = entry.bytes.len();
            run.push((at, entry));
            walked += len;
            at = (at + len) % log.len();
        }
        // Entries before the one that the newest refers back to are done with.
        let tail = run.last().map_or(0, |(_, newest)| newest.tail as usize);
        let from = run.iter().position(|(at, _)| *at == tail);
        let newer = run.last().map(|(_, newest)| newest.sequence) > best.last().map(|newest| newest.sequence);
        match from {
            Some(from) => {
                // The next run begins behind this one; what has gone around the end has been seen.
                start += walked;
                if newer {
                    best = run.drain(from..).map(|(_, entry)| entry).collect();
                }
            }
            None => start += SECTOR,
        }
    }
    best
}
