//! Registers, commands and codes of NVM Express (NVM Express Base Specification 1.4; sections in brackets).

/// Controller registers (§3.1): offsets in BAR 0.
#[allow(missing_docs)]
pub mod register {
    pub const CAP: u64 = 0x00;
    pub const VS: u64 = 0x08;
    pub const INTMS: u64 = 0x0c;
    pub const INTMC: u64 = 0x10;
    pub const CC: u64 = 0x14;
    pub const CSTS: u64 = 0x1c;
    pub const AQA: u64 = 0x24;
    pub const ASQ: u64 = 0x28;
    pub const ACQ: u64 = 0x30;
    pub const END: u64 = 0x38;
    /// The first doorbell: submission queue 0, then completion queue 0, and so on, four bytes each.
    pub const DOORBELLS: u64 = 0x1000;
}

/// Version 1.4.
pub const VERSION: u32 = 0x0001_0400;

/// Controller capabilities (§3.1.1).
pub mod cap {
    /// Queues have to be contiguous.
    pub const CQR: u64 = 1 << 16;
    /// Position of the time that enabling may take, in units of 500 ms.
    pub const TO_SHIFT: u64 = 24;
    /// The NVM command set.
    pub const CSS_NVM: u64 = 1 << 37;
}

/// Controller configuration (§3.1.5).
pub mod cc {
    /// Enable.
    pub const EN: u32 = 1 << 0;
    /// Command set, page size and arbitration, which have to be 0: NVM, 4 KiB, round robin.
    pub const ZERO: u32 = 7 << 4 | 15 << 7 | 7 << 11;
    /// Shutdown notification.
    pub const SHN_MASK: u32 = 3 << 14;
    /// Position and logarithm of the submission queue entry size.
    pub const IOSQES_SHIFT: u32 = 16;
    /// Of the completion queue entry size.
    pub const IOCQES_SHIFT: u32 = 20;
    /// Bits that exist.
    pub const MASK: u32 = 0x00ff_fff1;
}

/// Controller status (§3.1.6).
pub mod csts {
    /// Ready.
    pub const RDY: u32 = 1 << 0;
    /// Fatal.
    pub const CFS: u32 = 1 << 1;
    /// Shutdown is occurring.
    pub const SHST_OCCURRING: u32 = 1 << 2;
    /// Shutdown is complete.
    pub const SHST_COMPLETE: u32 = 2 << 2;
    /// Both.
    pub const SHST_MASK: u32 = 3 << 2;
}

/// Bytes of entries, and of a page.
#[allow(missing_docs)]
pub mod size {
    pub const SQE: usize = 64;
    pub const CQE: u64 = 16;
    pub const SQE_SHIFT: u32 = 6;
    pub const CQE_SHIFT: u32 = 4;
    pub const PAGE: u64 = 4096;
}

/// Admin commands (§5).
#[allow(missing_docs)]
pub mod admin {
    pub const DELETE_SQ: u8 = 0x00;
    pub const CREATE_SQ: u8 = 0x01;
    pub const GET_LOG_PAGE: u8 = 0x02;
    pub const DELETE_CQ: u8 = 0x04;
    pub const CREATE_CQ: u8 = 0x05;
    pub const IDENTIFY: u8 = 0x06;
    pub const ABORT: u8 = 0x08;
    pub const SET_FEATURES: u8 = 0x09;
    pub const GET_FEATURES: u8 = 0x0a;
    pub const ASYNC_EVENT_REQUEST: u8 = 0x0c;
}

/// NVM commands (§6).
#[allow(missing_docs)]
pub mod nvm {
    pub const FLUSH: u8 = 0x00;
    pub const WRITE: u8 = 0x01;
    pub const READ: u8 = 0x02;
    pub const COMPARE: u8 = 0x05;
    pub const WRITE_ZEROES: u8 = 0x08;
    pub const DATASET_MANAGEMENT: u8 = 0x09;
    /// In command dword 12: stable when done.
    pub const FUA: u32 = 1 << 30;
    /// In command dword 12 of write zeroes: space may be given back.
    pub const DEALLOCATE: u32 = 1 << 25;
    /// In command dword 11 of dataset management.
    pub const ATTRIBUTE_DEALLOCATE: u32 = 1 << 2;
    /// Bytes of a range of dataset management.
    pub const RANGE_BYTES: usize = 16;
    /// Ranges at most.
    pub const MAX_RANGES: usize = 256;
}

/// Features (§5.21.1).
#[allow(missing_docs)]
pub mod feature {
    pub const ARBITRATION: u8 = 0x01;
    pub const POWER_MANAGEMENT: u8 = 0x02;
    pub const TEMPERATURE_THRESHOLD: u8 = 0x04;
    pub const ERROR_RECOVERY: u8 = 0x05;
    pub const VOLATILE_WRITE_CACHE: u8 = 0x06;
    pub const NUMBER_OF_QUEUES: u8 = 0x07;
    pub const INTERRUPT_COALESCING: u8 = 0x08;
    pub const INTERRUPT_VECTOR: u8 = 0x09;
    pub const WRITE_ATOMICITY: u8 = 0x0a;
    pub const ASYNC_EVENT: u8 = 0x0b;
    /// In the asynchronous event configuration: tell when a namespace has changed.
    pub const NOTICE_NAMESPACE: u32 = 1 << 8;
}

/// Log pages (§5.14.1).
#[allow(missing_docs)]
pub mod log {
    pub const ERRORS: u8 = 0x01;
    pub const SMART: u8 = 0x02;
    pub const FIRMWARE: u8 = 0x03;
    pub const CHANGED_NAMESPACES: u8 = 0x04;
    pub const COMMANDS: u8 = 0x05;
}

/// Identify: controller or namespace structure (§5.15.1).
#[allow(missing_docs)]
pub mod cns {
    pub const NAMESPACE: u8 = 0x00;
    pub const CONTROLLER: u8 = 0x01;
    pub const ACTIVE_NAMESPACES: u8 = 0x02;
    pub const DESCRIPTORS: u8 = 0x03;
}

/// Status: type and code, as in bits 1 to 15 of the last word of a completion (§4.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u16);

#[allow(missing_docs)]
impl Status {
    pub const SUCCESS: Status = Status(0);
    pub const INVALID_OPCODE: Status = Status::generic(0x01);
    pub const INVALID_FIELD: Status = Status::generic(0x02);
    pub const DATA_TRANSFER_ERROR: Status = Status::generic(0x04);
    pub const INTERNAL_ERROR: Status = Status::generic(0x06);
    pub const ABORT_SQ_DELETION: Status = Status::generic(0x08);
    pub const INVALID_NAMESPACE: Status = Status::generic(0x0b);
    pub const SGL_SEGMENT: Status = Status::generic(0x0d);
    pub const SGL_COUNT: Status = Status::generic(0x0e);
    pub const SGL_LENGTH: Status = Status::generic(0x0f);
    pub const SGL_TYPE: Status = Status::generic(0x11);
    pub const PRP_OFFSET: Status = Status::generic(0x13);
    pub const WRITE_PROTECTED: Status = Status::generic(0x20);
    pub const LBA_OUT_OF_RANGE: Status = Status::generic(0x80);
    pub const CAPACITY_EXCEEDED: Status = Status::generic(0x81);
    pub const CQ_INVALID: Status = Status::specific(0x00);
    pub const QUEUE_IDENTIFIER: Status = Status::specific(0x01);
    pub const QUEUE_SIZE: Status = Status::specific(0x02);
    pub const ASYNC_EVENT_LIMIT: Status = Status::specific(0x05);
    pub const INTERRUPT_VECTOR: Status = Status::specific(0x08);
    pub const LOG_PAGE: Status = Status::specific(0x09);
    pub const QUEUE_DELETION: Status = Status::specific(0x0c);
    pub const FEATURE_NOT_SAVEABLE: Status = Status::specific(0x0d);
    pub const FEATURE_NOT_CHANGEABLE: Status = Status::specific(0x0e);
    pub const WRITE_FAULT: Status = Status::media(0x80);
    pub const READ_ERROR: Status = Status::media(0x81);
    pub const COMPARE_FAILURE: Status = Status::media(0x85);

    const fn generic(code: u16) -> Status {
        Status(code)
    }
    const fn specific(code: u16) -> Status {
        Status(1 << 8 | code)
    }
    const fn media(code: u16) -> Status {
        Status(2 << 8 | code)
    }

    /// The status field of a completion without its phase bit. What fails here fails again if it is tried again (DNR), but for what
    /// the host could not do.
    pub fn field(self) -> u16 {
        const DO_NOT_RETRY: u16 = 1 << 14;
        let retry = [Status::SUCCESS, Status::INTERNAL_ERROR, Status::WRITE_FAULT, Status::READ_ERROR];
        if retry.contains(&self) { self.0 } else { self.0 | DO_NOT_RETRY }
    }
}

/// SGL descriptor types (§4.4.1).
#[allow(missing_docs)]
pub mod sgl {
    pub const BYTES: u64 = 16;
    pub const DATA_BLOCK: u8 = 0;
    pub const SEGMENT: u8 = 2;
    pub const LAST_SEGMENT: u8 = 3;
}
