//! Where what is in a vhdx file ([MS-VHDX] §2): headers, region table, metadata.

use std::io;

use crate::image::Image;
use crate::image::raw::RawImage;

use super::log::Overlay;
use crate::image::fault::{Fault, invalid, unsupported};

pub(super) const KIB: u64 = 1 << 10;
pub(super) const MIB: u64 = 1 << 20;
/// §2.2.2: the two headers.
const HEADERS_AT: [u64; 2] = [64 * KIB, 128 * KIB];
const HEADER_BYTES: usize = 4096;
/// §2.2.3: the two region tables.
const REGIONS_AT: [u64; 2] = [192 * KIB, 256 * KIB];
const REGION_TABLE_BYTES: usize = 64 << 10;
/// §2.6.1: the metadata table.
const METADATA_TABLE_BYTES: u64 = 64 * KIB;
/// Entries of either table.
const MAX_ENTRIES: usize = 2047;
/// The longest log we replay.
const MAX_LOG: u64 = 64 * MIB;
/// §2.6.2.2: the largest disk.
const MAX_SIZE: u64 = 64 << 40;
/// The longest item of metadata we read.
const MAX_ITEM: u64 = 1 << 16;
/// §2.6.2.1
const BLOCK_BYTES: std::ops::RangeInclusive<u64> = MIB..=256 * MIB;

/// A GUID as it is in the file.
pub(super) type Guid = [u8; 16];

/// Makes a GUID of its usual notation's numbers.
const fn guid(a: u32, b: u16, c: u16, d: [u8; 8]) -> Guid {
    let (a, b, c) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
    [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]
}

const REGION_BAT: Guid = guid(0x2dc2_7766, 0xf623, 0x4200, [0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08]);
const REGION_METADATA: Guid =
    guid(0x8b7c_a206, 0x4790, 0x4b9a, [0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e]);
pub(super) const FILE_PARAMETERS: Guid =
    guid(0xcaa1_6737, 0xfa36, 0x4d43, [0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b]);
const DISK_SIZE: Guid = guid(0x2fa5_4224, 0xcd1b, 0x4876, [0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4, 0xb8]);
const DISK_ID: Guid = guid(0xbeca_12ab, 0xb2e6, 0x4523, [0x93, 0xef, 0xc3, 0x09, 0xe0, 0x00, 0xc7, 0x46]);
const LOGICAL_SECTOR: Guid =
    guid(0x8141_bf1d, 0xa96f, 0x4709, [0xba, 0x47, 0xf2, 0x33, 0xa8, 0xfa, 0xab, 0x5f]);
const PHYSICAL_SECTOR: Guid =
    guid(0xcda3_48c7, 0x445d, 0x4471, [0x9c, 0xc9, 0xe9, 0x88, 0x52, 0x51, 0xc5, 0x56]);
pub(super) const PARENT_LOCATOR: Guid =
    guid(0xa8d3_5f2d, 0xb30b, 0x454d, [0xab, 0xf7, 0xd3, 0xd8, 0x48, 0x34, 0xab, 0x0c]);
/// The one type of parent locator there is.
pub(super) const VHDX_LOCATOR: Guid =
    guid(0xb04a_efb7, 0xd19e, 0x4a81, [0xb7, 0x89, 0x25, 0xb8, 0xe9, 0x44, 0x59, 0x13]);

pub(super) fn le16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_le_bytes)
}

pub(super) fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

pub(super) fn le64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

pub(super) fn guid_at(bytes: &[u8], at: usize) -> Guid {
    bytes.get(at..at + 16).and_then(|b| b.try_into().ok()).unwrap_or_default()
}

/// CRC-32C (Castagnoli) of `bytes`, with the four bytes of the checksum at `skip` taken for zeros.
pub(super) fn checksum(bytes: &[u8], skip: usize) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut index = 0;
        while index < 256 {
            let mut value = index as u32;
            let mut bit = 0;
            while bit < 8 {
                value = if value & 1 != 0 { (value >> 1) ^ 0x82f6_3b78 } else { value >> 1 };
                bit += 1;
            }
            table[index] = value;
            index += 1;
        }
        table
    };
    let crc = bytes.iter().enumerate().fold(!0u32, |crc, (index, byte)| {
        let byte = if (skip..skip + 4).contains(&index) { 0 } else { *byte };
        (crc >> 8) ^ TABLE[((crc ^ u32::from(byte)) & 0xff) as usize]
    });
    !crc
}

/// A header (§2.2.2).
#[derive(Clone)]
pub(super) struct Header {
    bytes: Vec<u8>,
    /// Which of the two it is.
    place: usize,
}

impl Header {
    /// The current one of the two.
    pub fn read(file: &RawImage) -> Result<Header, Fault> {
        let mut current: Option<Header> = None;
        for (place, at) in HEADERS_AT.into_iter().enumerate() {
            let mut bytes = vec![0; HEADER_BYTES];
            file.read_bytes(at, &mut bytes)?;
            let header = Header { bytes, place };
            if header.is_valid() && current.as_ref().is_none_or(|other| header.sequence() > other.sequence())
            {
                current = Some(header);
            }
        }
        let Some(header) = current else { return invalid("neither of its headers is valid") };
        let (version, log_version) = (le16(&header.bytes, 66), le16(&header.bytes, 64));
        if version != 1 || header.has_log() && log_version != 0 {
            return unsupported(format!("version {version} of the format is not known"));
        }
        Ok(header)
    }

    fn is_valid(&self) -> bool {
        self.bytes.starts_with(b"head") && le32(&self.bytes, 4) == checksum(&self.bytes, 4)
    }

    fn sequence(&self) -> u64 {
        le64(&self.bytes, 8)
    }

    /// Changes whenever what the disk has does.
    pub fn data_write_guid(&self) -> Guid {
        guid_at(&self.bytes, 32)
    }

    pub fn log_guid(&self) -> Guid {
        guid_at(&self.bytes, 48)
    }

    /// Whether there is something to replay.
    pub fn has_log(&self) -> bool {
        self.log_guid() != Guid::default()
    }

    /// Where the log is, and its length.
    pub fn log(&self, file_bytes: u64) -> Result<(u64, u64), Fault> {
        let (len, at) = (u64::from(le32(&self.bytes, 68)), le64(&self.bytes, 72));
        let end = at.checked_add(len);
        if len == 0
            || at < MIB
            || !len.is_multiple_of(MIB)
            || !at.is_multiple_of(MIB)
            || end.is_none_or(|end| end > file_bytes)
        {
            return invalid("its log is not within the file; the file may be truncated");
        }
        if len > MAX_LOG {
            return unsupported("its log is too long");
        }
        Ok((at, len))
    }

    /// Writes this header over the other one and then over itself, each for good, with `change` made to both.
    pub fn replace(&mut self, file: &RawImage, change: impl Fn(&mut Self)) -> io::Result<()> {
        for _ in 0..2 {
            change(self);
            let sequence = self.sequence().wrapping_add(1);
            self.put(8, &sequence.to_le_bytes());
            self.place ^= 1;
            let checksum = checksum(&self.bytes, 4);
            self.put(4, &checksum.to_le_bytes());
            file.write_bytes(HEADERS_AT[self.place & 1], &self.bytes)?;
            file.flush()?;
        }
        Ok(())
    }

    /// As before something is changed for the first time: the file and the data are others from now on.
    pub fn renew(&mut self, file_write: Guid, data_write: Guid) {
        self.put(16, &file_write);
        self.put(32, &data_write);
    }

    pub fn set_log_guid(&mut self, guid: Guid) {
        self.put(48, &guid);
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.bytes.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }
}

/// A part of the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Region {
    pub at: u64,
    pub len: u64,
}

/// What the region table says (§2.2.3): where the block allocation table and the metadata are.
pub(super) fn regions(file: &RawImage, overlay: &Overlay) -> Result<(Region, Region), Fault> {
    let mut table = vec![0; REGION_TABLE_BYTES];
    for at in REGIONS_AT {
        overlay.read(file, at, &mut table)?;
        if table.starts_with(b"regi") && le32(&table, 4) == checksum(&table, 4) {
            return read_regions(file, &table);
        }
    }
    invalid("neither of its region tables is valid")
}

fn read_regions(file: &RawImage, table: &[u8]) -> Result<(Region, Region), Fault> {
    let count = le32(table, 8) as usize;
    if count > MAX_ENTRIES {
        return invalid("its region table has too many entries");
    }
    let (mut bat, mut metadata) = (None, None);
    for index in 0..count {
        let entry = 16 + index * 32;
        let region = Region { at: le64(table, entry + 16), len: u64::from(le32(table, entry + 24)) };
        let end = region.at.checked_add(region.len);
        let fine = region.at >= MIB
            && region.at.is_multiple_of(MIB)
            && region.len.is_multiple_of(MIB)
            && region.len > 0;
        if !fine || end.is_none_or(|end| end > file.size()) {
            return invalid("a region of it is not within the file; the file may be truncated");
        }
        let place = match guid_at(table, entry) {
            REGION_BAT => &mut bat,
            REGION_METADATA => &mut metadata,
            _ if le32(table, entry + 28) & 1 != 0 => {
                return unsupported("it needs a region that is not known");
            }
            _ => continue,
        };
        if place.replace(region).is_some() {
            return invalid("its region table has a region twice");
        }
    }
    match (bat, metadata) {
        (Some(bat), Some(metadata)) if metadata.len >= METADATA_TABLE_BYTES => Ok((bat, metadata)),
        _ => invalid("its region table lacks a region"),
    }
}

/// What the metadata say (§2.6.2).
#[derive(Debug)]
pub(super) struct Metadata {
    pub size: u64,
    pub block: u64,
    pub logical: u32,
    pub physical: u32,
    /// The parent locator's keys and values, if it has a parent.
    pub parent: Option<Vec<(String, String)>>,
}

impl Metadata {
    pub fn read(file: &RawImage, overlay: &Overlay, region: Region) -> Result<Metadata, Fault> {
        let mut table = vec![0; METADATA_TABLE_BYTES as usize];
        overlay.read(file, region.at, &mut table)?;
        let count = usize::from(le16(&table, 10));
        if !table.starts_with(b"metadata") || count > MAX_ENTRIES {
            return invalid("its metadata table is not one");
        }
        let mut items = std::collections::HashMap::new();
        for index in 0..count {
            let entry = 32 + index * 32;
            let (at, len) = (u64::from(le32(&table, entry + 16)), u64::from(le32(&table, entry + 20)));
            let (id, flags) = (guid_at(&table, entry), le32(&table, entry + 24));
            let ours = [FILE_PARAMETERS, DISK_SIZE, DISK_ID, LOGICAL_SECTOR, PHYSICAL_SECTOR, PARENT_LOCATOR];
            // Bit 0: the user's own. Bit 2: must be understood.
            if flags & 1 != 0 || !ours.contains(&id) {
                if flags & 4 != 0 {
                    return unsupported("it has metadata that are not known and have to be");
                }
                continue;
            }
            if at < METADATA_TABLE_BYTES || len > MAX_ITEM || at + len > region.len {
                return invalid("an item of its metadata is not within them");
            }
            let mut item = vec![0; len as usize];
            overlay.read(file, region.at + at, &mut item)?;
            if items.insert(id, item).is_some() {
                return invalid("an item of its metadata is there twice");
            }
        }
        let item = |id: Guid, len: usize| match items.get(&id) {
            Some(item) if item.len() >= len => Ok(item.as_slice()),
            _ => invalid("an item of its metadata is missing"),
        };
        let parameters = item(FILE_PARAMETERS, 8)?;
        let (block, flags) = (u64::from(le32(parameters, 0)), le32(parameters, 4));
        let (size, logical, physical) = (
            le64(item(DISK_SIZE, 8)?, 0),
            le32(item(LOGICAL_SECTOR, 4)?, 0),
            le32(item(PHYSICAL_SECTOR, 4)?, 0),
        );
        if !block.is_power_of_two() || !BLOCK_BYTES.contains(&block) {
            return invalid(format!("blocks of {block} bytes are not possible"));
        }
        if ![512, 4096].contains(&logical) || ![512, 4096].contains(&physical) {
            return invalid(format!("sectors of {logical} and {physical} bytes are not possible"));
        }
        if size == 0 || size > MAX_SIZE || size % u64::from(logical) != 0 {
            return invalid(format!("a disk of {size} bytes is not possible"));
        }
        let parent = (flags & 2 != 0).then(|| item(PARENT_LOCATOR, 20).and_then(read_locator)).transpose()?;
        Ok(Metadata { size, block, logical, physical: physical.max(logical), parent })
    }
}

/// A parent locator (§2.6.2.6): keys and values in UTF-16.
fn read_locator(item: &[u8]) -> Result<Vec<(String, String)>, Fault> {
    if guid_at(item, 0) != VHDX_LOCATOR {
        return unsupported("its parent is located in a way that is not known");
    }
    let text = |at: usize, len: usize| {
        let units = item.get(at..at.checked_add(len)?)?.chunks_exact(2).map(|unit| le16(unit, 0));
        char::decode_utf16(units).collect::<Result<String, _>>().ok()
    };
    let mut pairs = Vec::new();
    for index in 0..usize::from(le16(item, 18)) {
        let entry = 20 + index * 12;
        let key = text(le32(item, entry) as usize, usize::from(le16(item, entry + 8)));
        let value = text(le32(item, entry + 4) as usize, usize::from(le16(item, entry + 10)));
        match (key, value) {
            (Some(key), Some(value)) => pairs.push((key, value)),
            _ => return invalid("its parent locator is broken"),
        }
        if pairs.len() > 64 {
            return invalid("its parent locator has too many entries");
        }
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_checksum_is_the_one_of_castagnoli() {
        assert_eq!(super::checksum(b"123456789", 100), 0xe306_9283);
        assert_eq!(super::checksum(b"12345\0\0\0\0", 100), super::checksum(b"123456789", 5));
    }
}
