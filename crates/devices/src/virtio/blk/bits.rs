//! The block device's numbers (virtio 1.2 §5.2).

/// Features (§5.2.3).
pub mod feature {
    /// `seg_max` is valid.
    pub const SEG_MAX: u64 = 1 << 2;
    /// The disk cannot be written.
    pub const RO: u64 = 1 << 5;
    /// `blk_size` is valid.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// There is a volatile write cache, and a request to flush it.
    pub const FLUSH: u64 = 1 << 9;
    /// The topology is valid.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// The driver can turn the write cache off.
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// Several queues.
    pub const MQ: u64 = 1 << 12;
    /// Discard requests.
    pub const DISCARD: u64 = 1 << 13;
    /// Write zeroes requests.
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Types of requests (§5.2.6).
#[allow(missing_docs)]
pub mod request {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
    /// Bytes of the header: type, reserved, sector.
    pub const HEADER_BYTES: usize = 16;
    /// Bytes of a range of discard and write zeroes: sector, number of sectors, flags.
    pub const RANGE_BYTES: usize = 16;
    /// Flag of a range: its space may be given back.
    pub const UNMAP: u32 = 1 << 0;
    /// Bytes of the answer to [`GET_ID`].
    pub const ID_BYTES: usize = 20;
}

/// The last byte of a request (§5.2.6).
#[allow(missing_docs)]
pub mod status {
    pub const OK: u8 = 0;
    pub const IOERR: u8 = 1;
    pub const UNSUPP: u8 = 2;
}

/// Bytes of a sector, whatever the disk's own sectors are.
pub const SECTOR: u64 = 512;

/// Offset of the byte by which the driver turns the write cache on and off.
pub const CONFIG_WRITEBACK: u64 = 32;
/// Bytes of the configuration up to and with `write_zeroes_may_unmap`, filled up.
pub const CONFIG_BYTES: usize = 60;
