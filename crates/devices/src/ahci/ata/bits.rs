//! Commands, registers and values of ATA devices (ACS-3; older commands: ATA8-ACS).

/// Status register (ACS-3 §6.2).
pub mod status {
    /// Error.
    pub const ERR: u8 = 1 << 0;
    /// Data request.
    pub const DRQ: u8 = 1 << 3;
    /// Always set by disks of old; drivers are used to it.
    pub const SEEK: u8 = 1 << 4;
    /// Device fault.
    pub const DF: u8 = 1 << 5;
    /// Ready.
    pub const DRDY: u8 = 1 << 6;
    /// Busy.
    pub const BSY: u8 = 1 << 7;
    /// What a device shows that has nothing to do and nothing to complain of.
    pub const GOOD: u8 = DRDY | SEEK;
    /// Bits that a set device bits frame changes (SATA 3.1 §10.5.7).
    pub const SET_DEVICE_BITS: u8 = 0x77;
}

/// Error register (ACS-3 §6.3).
pub mod error {
    /// Aborted: the command is not known, or its parameters are not.
    pub const ABRT: u8 = 1 << 2;
    /// The address is not on the disk.
    pub const IDNF: u8 = 1 << 4;
    /// The data cannot be read.
    pub const UNC: u8 = 1 << 6;
    /// Result of diagnosis: passed.
    pub const PASSED: u8 = 0x01;
}

/// Device register: the address is an LBA.
pub const DEVICE_LBA: u8 = 1 << 6;
/// Device register of a queued command: force unit access.
pub const DEVICE_FUA: u8 = 1 << 7;
/// Device control register: software reset.
pub const CONTROL_SRST: u8 = 1 << 2;

/// Command codes (ACS-3 §7).
pub mod command {
    pub const DATA_SET_MANAGEMENT: u8 = 0x06;
    pub const READ_SECTORS: u8 = 0x20;
    pub const READ_SECTORS_EXT: u8 = 0x24;
    pub const READ_DMA_EXT: u8 = 0x25;
    pub const READ_NATIVE_MAX_EXT: u8 = 0x27;
    pub const READ_MULTIPLE_EXT: u8 = 0x29;
    pub const READ_LOG_EXT: u8 = 0x2f;
    pub const WRITE_SECTORS: u8 = 0x30;
    pub const WRITE_SECTORS_EXT: u8 = 0x34;
    pub const WRITE_DMA_EXT: u8 = 0x35;
    pub const WRITE_MULTIPLE_EXT: u8 = 0x39;
    pub const WRITE_DMA_FUA_EXT: u8 = 0x3d;
    pub const READ_VERIFY: u8 = 0x40;
    pub const READ_VERIFY_EXT: u8 = 0x42;
    pub const READ_LOG_DMA_EXT: u8 = 0x47;
    pub const READ_FPDMA_QUEUED: u8 = 0x60;
    pub const WRITE_FPDMA_QUEUED: u8 = 0x61;
    pub const NCQ_NON_DATA: u8 = 0x63;
    pub const SEND_FPDMA_QUEUED: u8 = 0x64;
    pub const RECEIVE_FPDMA_QUEUED: u8 = 0x65;
    pub const EXECUTE_DEVICE_DIAGNOSTIC: u8 = 0x90;
    pub const PACKET: u8 = 0xa0;
    pub const IDENTIFY_PACKET_DEVICE: u8 = 0xa1;
    pub const SMART: u8 = 0xb0;
    pub const READ_MULTIPLE: u8 = 0xc4;
    pub const WRITE_MULTIPLE: u8 = 0xc5;
    pub const SET_MULTIPLE_MODE: u8 = 0xc6;
    pub const READ_DMA: u8 = 0xc8;
    pub const WRITE_DMA: u8 = 0xca;
    pub const WRITE_MULTIPLE_FUA_EXT: u8 = 0xce;
    pub const STANDBY_IMMEDIATE: u8 = 0xe0;
    pub const IDLE_IMMEDIATE: u8 = 0xe1;
    pub const STANDBY: u8 = 0xe2;
    pub const IDLE: u8 = 0xe3;
    pub const CHECK_POWER_MODE: u8 = 0xe5;
    pub const SLEEP: u8 = 0xe6;
    pub const FLUSH_CACHE: u8 = 0xe7;
    pub const FLUSH_CACHE_EXT: u8 = 0xea;
    pub const IDENTIFY_DEVICE: u8 = 0xec;
    pub const SET_FEATURES: u8 = 0xef;
    pub const READ_NATIVE_MAX: u8 = 0xf8;
    /// Of ATAPI devices only (ATA8-ACS §7.8).
    pub const DEVICE_RESET: u8 = 0x08;
}

/// Data set management: features register.
pub const TRIM: u16 = 1 << 0;

/// Subcommands of set features (ACS-3 §7.45).
pub mod feature {
    pub const ENABLE_WRITE_CACHE: u8 = 0x02;
    pub const SET_TRANSFER_MODE: u8 = 0x03;
    pub const ENABLE_APM: u8 = 0x05;
    pub const DISABLE_READ_LOOK_AHEAD: u8 = 0x55;
    /// A software reset leaves features as they are.
    pub const DISABLE_REVERTING: u8 = 0x66;
    pub const DISABLE_WRITE_CACHE: u8 = 0x82;
    pub const DISABLE_APM: u8 = 0x85;
    pub const ENABLE_READ_LOOK_AHEAD: u8 = 0xaa;
    /// A software reset brings features back to their defaults.
    pub const ENABLE_REVERTING: u8 = 0xcc;
}

/// SMART (ACS-2 §7.48).
pub mod smart {
    pub const READ_DATA: u8 = 0xd0;
    pub const READ_THRESHOLDS: u8 = 0xd1;
    pub const ATTRIBUTE_AUTOSAVE: u8 = 0xd2;
    pub const SAVE_ATTRIBUTE_VALUES: u8 = 0xd3;
    pub const EXECUTE_OFFLINE_IMMEDIATE: u8 = 0xd4;
    pub const READ_LOG: u8 = 0xd5;
    pub const ENABLE_OPERATIONS: u8 = 0xd8;
    pub const DISABLE_OPERATIONS: u8 = 0xd9;
    pub const RETURN_STATUS: u8 = 0xda;
    pub const AUTO_OFFLINE: u8 = 0xdb;
    /// LBA bits 23:8 of every SMART command, and of the answer that says all is well.
    pub const SIGNATURE: u64 = 0xc24f;
}

/// Log addresses (ACS-3 annex A).
pub mod log {
    pub const DIRECTORY: u8 = 0x00;
    pub const DEVICE_STATISTICS: u8 = 0x04;
    pub const SMART_SELF_TEST: u8 = 0x06;
    pub const EXTENDED_SELF_TEST: u8 = 0x07;
    pub const NCQ_COMMAND_ERROR: u8 = 0x10;
    pub const NCQ_SEND_AND_RECEIVE: u8 = 0x13;
    pub const IDENTIFY_DEVICE_DATA: u8 = 0x30;
    /// Bytes of a log page, and of most other data blocks.
    pub const PAGE: usize = 512;
}

/// What check power mode answers (ACS-3 §7.3).
pub mod power {
    pub const STANDBY: u8 = 0x00;
    pub const IDLE: u8 = 0x80;
    pub const ACTIVE: u8 = 0xff;
}
