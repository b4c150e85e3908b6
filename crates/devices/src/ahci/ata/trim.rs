//! Lists of ranges that the host needs no longer (ACS-3 §7.5, data set management).

use block::{DiskInfo, IoError};

use super::super::device::Failure;
use super::bits::log::PAGE;

/// Blocks of a list at most; told in word 105 of IDENTIFY DEVICE.
pub(in super::super) const MAX_BLOCKS: u16 = 8;

/// Bytes of a list of so many blocks.
pub(in super::super) fn list_bytes(blocks: u16) -> usize {
    usize::from(blocks) * PAGE
}

/// The ranges of a list, in bytes, as offset and length; neighbours are joined, empty ones left out.
///
/// # Errors
/// A range is not on the disk.
pub(in super::super) fn ranges(list: &[u8], info: &DiskInfo) -> Result<Vec<(u64, u64)>, Failure> {
    let sector = u64::from(info.sectors.logical);
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for entry in list.chunks_exact(8) {
        let [l0, l1, l2, l3, l4, l5, n0, n1] = *entry else { continue };
        let lba = u64::from_le_bytes([l0, l1, l2, l3, l4, l5, 0, 0]);
        let count = u64::from(u16::from_le_bytes([n0, n1]));
        if count == 0 {
            continue;
        }
        // 48 bits and 16 bits: only the multiplication could overflow, and what does is not on the disk.
        let end = (lba + count).checked_mul(sector).filter(|end| *end <= info.size_bytes);
        if end.is_none() {
            let offset = lba.saturating_mul(sector);
            return Err(Failure::Disk { error: IoError::OutOfRange, offset });
        }
        let (offset, len) = (lba * sector, count * sector);
        match ranges.last_mut() {
            Some((before, so_far)) if *before + *so_far == offset => *so_far += len,
            _ => ranges.push((offset, len)),
        }
    }
    Ok(ranges)
}
