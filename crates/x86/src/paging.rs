//! Page-table entry bits and page-fault error codes (SDM 3A §4.3–4.7).

/// Bytes in a page.
pub const PAGE_SIZE: u64 = 4096;
/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Mask of the offset within a page.
pub const PAGE_MASK: u64 = PAGE_SIZE - 1;

/// Page-table entry bits, common to every level.
pub mod pte {
    /// Present.
    pub const P: u64 = 1 << 0;
    /// Writable.
    pub const RW: u64 = 1 << 1;
    /// User-accessible.
    pub const US: u64 = 1 << 2;
    /// Accessed.
    pub const A: u64 = 1 << 5;
    /// Dirty (leaf entries).
    pub const D: u64 = 1 << 6;
    /// Page size: this entry is a leaf above the last level.
    pub const PS: u64 = 1 << 7;
    /// Global (leaf entries).
    pub const G: u64 = 1 << 8;
    /// No execute (64-bit entries).
    pub const NX: u64 = 1 << 63;
    /// Physical address field of a 64-bit entry.
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
}

/// Page-fault error-code bits.
pub mod fault {
    /// The page was present (protection violation).
    pub const P: u32 = 1 << 0;
    /// The access was a write.
    pub const W: u32 = 1 << 1;
    /// The access was made at CPL 3.
    pub const U: u32 = 1 << 2;
    /// A reserved bit was set in a paging-structure entry.
    pub const RSVD: u32 = 1 << 3;
    /// The access was an instruction fetch.
    pub const I: u32 = 1 << 4;
}
