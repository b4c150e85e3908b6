//! IDENTIFY DEVICE (ACS-3 §7.12).

use super::super::text_words;
use super::bits::log::PAGE;
use super::{AtaDisk, MAX_SECTORS_28, trim};

/// Set transfer mode: position of Ultra DMA modes.
pub(super) const ULTRA_DMA: u8 = 0x40;
const MULTIWORD_DMA: u8 = 0x20;
/// The fastest Ultra DMA mode.
pub(super) const BEST_ULTRA_DMA: u8 = 6;

/// Words 82 to 84 and their copies: which features there are.
mod supported {
    /// Word 82: SMART, power management, write cache, look-ahead, NOP.
    pub const WORD_82: u16 = SMART | 1 << 3 | WRITE_CACHE | LOOK_AHEAD | 1 << 14;
    pub const SMART: u16 = 1 << 0;
    pub const WRITE_CACHE: u16 = 1 << 5;
    pub const LOOK_AHEAD: u16 = 1 << 6;
    /// Word 83: advanced power management, 48-bit addresses, FLUSH CACHE and FLUSH CACHE EXT.
    pub const WORD_83: u16 = APM | 1 << 10 | 1 << 12 | 1 << 13;
    pub const APM: u16 = 1 << 3;
    /// Word 84: SMART self-tests, general purpose logging, WRITE … FUA EXT.
    pub const WORD_84: u16 = 1 << 1 | 1 << 5 | 1 << 6;
    /// Word 119: READ LOG DMA EXT.
    pub const WORD_119: u16 = 1 << 3;
    /// Marks words 83, 84, 87, 119 and some more as valid.
    pub const VALID: u16 = 1 << 14;
}

impl AtaDisk {
    /// The data as bytes, with its checksum.
    pub(super) fn identify(&self) -> [u8; PAGE] {
        let info = self.disk.info();
        let settings = &self.settings;
        let mut words = [0u16; PAGE / 2];
        // A fixed ATA disk, which tells all without being spun up.
        words[0] = 1 << 6;
        words[2] = 0xc837;
        // The geometry that every large disk claims.
        words[1] = 16_383;
        words[3] = 16;
        words[6] = 63;
        text_words(&mut words[10..20], &self.identity.serial);
        text_words(&mut words[23..27], &self.identity.firmware);
        text_words(&mut words[27..47], &self.identity.model);
        words[47] = 0x8000 | self.max_multiple() as u16;
        words[48] = supported::VALID;
        // DMA, LBA, IORDY, standby timer as the standard has it.
        words[49] = 1 << 8 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 13;
        words[50] = supported::VALID;
        // Words 64 to 70 and 88 are valid.
        words[53] = 1 << 1 | 1 << 2;
        if settings.multiple != 0 {
            words[59] = 1 << 8 | u16::from(settings.multiple);
        }
        let low = self.sectors.min(MAX_SECTORS_28);
        words[60] = low as u16;
        words[61] = (low >> 16) as u16;
        let selected =
            |kind: u8| if settings.dma_mode & 0x78 == kind { 1 << 8 << (settings.dma_mode & 7) } else { 0 };
        words[63] = 0x0007 | selected(MULTIWORD_DMA);
        words[64] = 0x0003;
        words[65..69].fill(120);
        // What is trimmed reads the same each time, but not necessarily as zeros.
        words[69] = if info.discard { 1 << 14 } else { 0 };
        words[75] = u16::from(super::super::bits::SLOTS) - 1;
        // All three speeds, queueing, and READ LOG DMA EXT in its place.
        words[76] = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 8 | 1 << 15;
        // The speed is Gen3; SEND FPDMA QUEUED for trimming.
        words[77] = 3 << 1 | if info.discard { 1 << 6 } else { 0 };
        // ATA/ATAPI-4 to ACS-3.
        words[80] = 0x07f0;
        let on = |bit: bool, mask: u16| if bit { mask } else { 0 };
        words[82] = supported::WORD_82;
        words[83] = supported::WORD_83 | supported::VALID;
        words[84] = supported::WORD_84 | supported::VALID;
        words[85] = supported::WORD_82
            & !(on(!self.smart.enabled, supported::SMART)
                | on(!settings.write_cache, supported::WRITE_CACHE)
                | on(!settings.look_ahead, supported::LOOK_AHEAD));
        // Bit 15: words 119 and 120 are valid.
        words[86] = supported::WORD_83 & !on(settings.apm == 0, supported::APM) | 1 << 15;
        words[87] = supported::WORD_84 | supported::VALID;
        words[88] = 0x007f | selected(ULTRA_DMA);
        words[91] = settings.apm.into();
        words[92] = 0xfffe;
        for (i, word) in words[100..104].iter_mut().enumerate() {
            *word = (self.sectors >> (16 * i)) as u16;
        }
        let logical = info.sectors.logical;
        let per_physical = (info.sectors.physical / logical).max(1).ilog2() as u16;
        words[106] =
            supported::VALID | on(per_physical > 0, 1 << 13 | per_physical) | on(logical > 512, 1 << 12);
        if logical > 512 {
            words[117] = (logical / 2) as u16;
            words[118] = ((logical / 2) >> 16) as u16;
        }
        words[119] = supported::WORD_119 | supported::VALID;
        words[120] = supported::WORD_119 | supported::VALID;
        if info.discard {
            words[105] = trim::MAX_BLOCKS;
            words[169] = 1 << 0;
        }
        // The first logical sector is the first of a physical one.
        words[209] = supported::VALID;
        words[217] = self.identity.rotation_rate;
        // Serial ATA, up to 3.1.
        words[222] = 0x107f;
        let mut bytes = [0; PAGE];
        for (pair, word) in bytes.chunks_exact_mut(2).zip(words) {
            pair.copy_from_slice(&word.to_le_bytes());
        }
        bytes[PAGE - 2] = 0xa5;
        checksum(&mut bytes);
        bytes
    }
}

/// Makes the last byte such that all add up to zero.
pub(in super::super) fn checksum(block: &mut [u8; PAGE]) {
    let sum = block[..PAGE - 1].iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    block[PAGE - 1] = sum.wrapping_neg();
}
