//! The guest-physical memory map: where RAM is, what is left to devices, and the map as firmware reports it.
//!
//! The map is bhyve's: RAM from zero up to at most 3 GiB, a hole for devices below 4 GiB, the rest of RAM from
//! 4 GiB on, and a 32 GiB window for 64-bit PCI BARs at the next 32 GiB boundary above RAM.

use std::ops::Range;

use x86::paging::PAGE_SIZE;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// End of the RAM that a real-mode program may use: the EBDA begins here.
pub const CONVENTIONAL_END: u64 = EBDA_BASE;
/// The extended BIOS data area, one KiB below the VGA window.
pub const EBDA_BASE: u64 = 0x9_fc00;
/// The VGA window, 128 KiB.
pub const VGA_BASE: u64 = 0xa_0000;
/// The firmware's read-only segment, where every table lives.
pub const FIRMWARE_BASE: u64 = 0xf_0000;
/// First address above the firmware segment: extended memory.
pub const HIGH_MEMORY_START: u64 = MIB;

/// RAM below 4 GiB never reaches beyond this.
pub const LOWMEM_LIMIT: u64 = 3 * GIB;
/// RAM that does not fit below [`LOWMEM_LIMIT`] continues here.
pub const HIGHMEM_BASE: u64 = 4 * GIB;

/// Window for 32-bit PCI memory BARs.
pub const PCI_MMIO32: Range<u64> = 0xc000_0000..0xe000_0000;
/// PCI Express enhanced configuration space: one MiB for each of 256 buses.
pub const ECAM_BASE: u64 = 0xe000_0000;
/// Length of [`ECAM_BASE`] in bytes.
pub const ECAM_BYTES: u64 = 256 * MIB;
/// Size and alignment of the window for 64-bit PCI memory BARs.
pub const PCI_MMIO64_BYTES: u64 = 32 * GIB;
/// First port of the window for PCI I/O BARs.
pub const PCI_IO_BASE: u16 = 0x2000;

/// IOAPIC registers.
pub const IOAPIC_BASE: u64 = engine::IOAPIC_BASE;
/// HPET registers.
pub const HPET_BASE: u64 = 0xfed0_0000;
/// Length of the HPET's register block.
pub const HPET_BYTES: u64 = KIB;
/// LAPIC registers.
pub const LAPIC_BASE: u64 = engine::LAPIC_BASE;

/// Least memory a VM can have: the first MiB belongs to firmware, a guest needs something above it.
pub const MIN_MEMORY_BYTES: u64 = 2 * MIB;
/// Physical addresses are at most this wide (SDM 3A §4.1.4).
const MAX_PHYSICAL_ADDRESS_BITS: u32 = 52;

/// The memory size cannot be laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Less than [`MIN_MEMORY_BYTES`].
    #[error("{0} bytes of memory are too few: a virtual machine needs at least 2 MiB")]
    TooSmall(u64),
    /// Does not consist of whole pages.
    #[error("memory of {0} bytes is not a whole number of 4 KiB pages")]
    NotPages(u64),
    /// More than the architecture can address.
    #[error("{0} bytes of memory are more than an x86-64 processor can address")]
    TooLarge(u64),
}

/// What an [`E820Entry`] describes (ACPI 6.5 §15, table 15.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum E820Kind {
    /// RAM, free to use.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
    /// ACPI tables; RAM once they have been read.
    AcpiReclaimable = 3,
    /// ACPI storage that must be preserved.
    AcpiNvs = 4,
}

/// One range of the firmware memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct E820Entry {
    /// First address.
    pub base: u64,
    /// Length in bytes.
    pub len: u64,
    /// What is there.
    pub kind: E820Kind,
}

/// Where a guest of a given size has its RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryLayout {
    low_bytes: u64,
    high_bytes: u64,
}

impl MemoryLayout {
    /// Lays out `total_bytes` of RAM.
    ///
    /// # Errors
    /// The size is below 2 MiB, not a multiple of the page size, or beyond what can be addressed.
    pub fn new(total_bytes: u64) -> Result<Self, LayoutError> {
        if total_bytes < MIN_MEMORY_BYTES {
            return Err(LayoutError::TooSmall(total_bytes));
        }
        if !total_bytes.is_multiple_of(PAGE_SIZE) {
            return Err(LayoutError::NotPages(total_bytes));
        }
        let low_bytes = total_bytes.min(LOWMEM_LIMIT);
        let high_bytes = total_bytes - low_bytes;
        let end = HIGHMEM_BASE
            .checked_add(high_bytes)
            .and_then(|end| end.checked_next_multiple_of(PCI_MMIO64_BYTES))
            .and_then(|base| base.checked_add(PCI_MMIO64_BYTES));
        match end {
            Some(end) if end <= 1 << MAX_PHYSICAL_ADDRESS_BITS => Ok(MemoryLayout { low_bytes, high_bytes }),
            _ => Err(LayoutError::TooLarge(total_bytes)),
        }
    }

    /// Bytes of RAM below 4 GiB, from address zero.
    pub fn low_bytes(&self) -> u64 {
        self.low_bytes
    }

    /// Bytes of RAM from [`HIGHMEM_BASE`] on; may be zero.
    pub fn high_bytes(&self) -> u64 {
        self.high_bytes
    }

    /// All RAM in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.low_bytes + self.high_bytes
    }

    /// The one or two address ranges that are RAM, lowest first.
    pub fn ram_ranges(&self) -> Vec<Range<u64>> {
        let mut ranges = Vec::with_capacity(2);
        ranges.push(0..self.low_bytes);
        if self.high_bytes > 0 {
            ranges.push(HIGHMEM_BASE..HIGHMEM_BASE + self.high_bytes);
        }
        ranges
    }

    /// Window for 64-bit PCI memory BARs.
    pub fn pci_mmio64(&self) -> Range<u64> {
        let base = (HIGHMEM_BASE + self.high_bytes).next_multiple_of(PCI_MMIO64_BYTES);
        base..base + PCI_MMIO64_BYTES
    }

    /// How many physical address bits a processor must offer for this map.
    pub fn physical_address_bits(&self) -> u32 {
        u64::BITS - (self.pci_mmio64().end - 1).leading_zeros()
    }

    /// The map as firmware reports it, lowest address first, without overlaps.
    pub fn e820(&self) -> Vec<E820Entry> {
        let entry =
            |range: Range<u64>, kind| E820Entry { base: range.start, len: range.end - range.start, kind };
        let mut map = vec![
            entry(0..EBDA_BASE, E820Kind::Ram),
            entry(EBDA_BASE..VGA_BASE, E820Kind::Reserved),
            entry(FIRMWARE_BASE..HIGH_MEMORY_START, E820Kind::Reserved),
            entry(HIGH_MEMORY_START..self.low_bytes, E820Kind::Ram),
            entry(ECAM_BASE..ECAM_BASE + ECAM_BYTES, E820Kind::Reserved),
        ];
        if self.high_bytes > 0 {
            map.push(entry(HIGHMEM_BASE..HIGHMEM_BASE + self.high_bytes, E820Kind::Ram));
        }
        map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram_in_map(layout: &MemoryLayout) -> u64 {
        layout.e820().iter().filter(|e| e.kind == E820Kind::Ram).map(|e| e.len).sum()
    }

    #[test]
    fn memory_splits_at_three_gib() {
        for (total, low, high) in [
            (128 * MIB, 128 * MIB, 0),
            (512 * MIB, 512 * MIB, 0),
            (3 * GIB, 3 * GIB, 0),
            (3 * GIB + PAGE_SIZE, 3 * GIB, PAGE_SIZE),
            (6 * GIB, 3 * GIB, 3 * GIB),
        ] {
            let layout = MemoryLayout::new(total).unwrap();
            assert_eq!((layout.low_bytes(), layout.high_bytes()), (low, high));
            assert_eq!(layout.total_bytes(), total);
            let from_ranges: u64 = layout.ram_ranges().iter().map(|r| r.end - r.start).sum();
            assert_eq!(from_ranges, total);
            // Everything but the 385 KiB between the EBDA and 1 MiB is usable.
            assert_eq!(ram_in_map(&layout), total - (MIB - EBDA_BASE));
        }
    }

    #[test]
    fn the_map_is_sorted_and_does_not_overlap() {
        for total in [2 * MIB + PAGE_SIZE, 128 * MIB, 3 * GIB, 6 * GIB, 1 << 40] {
            let map = MemoryLayout::new(total).unwrap().e820();
            for pair in map.windows(2) {
                assert!(pair[0].base + pair[0].len <= pair[1].base, "{pair:?}");
            }
            assert!(map.iter().all(|e| e.len > 0));
        }
    }

    #[test]
    fn the_64_bit_window_is_above_ram() {
        let at = |total| MemoryLayout::new(total).unwrap().pci_mmio64();
        assert_eq!(at(512 * MIB), 32 * GIB..64 * GIB);
        assert_eq!(at(31 * GIB), 32 * GIB..64 * GIB);
        assert_eq!(at(31 * GIB + PAGE_SIZE), 64 * GIB..96 * GIB);
        assert_eq!(MemoryLayout::new(512 * MIB).unwrap().physical_address_bits(), 36);
        assert_eq!(MemoryLayout::new(40 * GIB).unwrap().physical_address_bits(), 37);
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert_eq!(MemoryLayout::new(0), Err(LayoutError::TooSmall(0)));
        assert_eq!(MemoryLayout::new(MIB), Err(LayoutError::TooSmall(MIB)));
        assert_eq!(MemoryLayout::new(8 * MIB + 1), Err(LayoutError::NotPages(8 * MIB + 1)));
        for total in [1 << 52, !0xfff] {
            assert_eq!(MemoryLayout::new(total), Err(LayoutError::TooLarge(total)));
        }
    }
}
