//! Exceptions and their vectors (SDM 3A §6.15).

use serde::{Deserialize, Serialize};

/// Architectural exception vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Vector {
    DivideError = 0,
    Debug = 1,
    Nmi = 2,
    Breakpoint = 3,
    Overflow = 4,
    BoundRange = 5,
    InvalidOpcode = 6,
    DeviceNotAvailable = 7,
    DoubleFault = 8,
    CoprocessorOverrun = 9,
    InvalidTss = 10,
    SegmentNotPresent = 11,
    StackFault = 12,
    GeneralProtection = 13,
    PageFault = 14,
    X87 = 16,
    AlignmentCheck = 17,
    MachineCheck = 18,
    Simd = 19,
    ControlProtection = 21,
}

impl Vector {
    /// The exception with this vector number; `None` where the architecture has none.
    pub const fn from_number(number: u8) -> Option<Vector> {
        Some(match number {
            0 => Vector::DivideError,
            1 => Vector::Debug,
            2 => Vector::Nmi,
            3 => Vector::Breakpoint,
            4 => Vector::Overflow,
            5 => Vector::BoundRange,
            6 => Vector::InvalidOpcode,
            7 => Vector::DeviceNotAvailable,
            8 => Vector::DoubleFault,
            9 => Vector::CoprocessorOverrun,
            10 => Vector::InvalidTss,
            11 => Vector::SegmentNotPresent,
            12 => Vector::StackFault,
            13 => Vector::GeneralProtection,
            14 => Vector::PageFault,
            16 => Vector::X87,
            17 => Vector::AlignmentCheck,
            18 => Vector::MachineCheck,
            19 => Vector::Simd,
            21 => Vector::ControlProtection,
            _ => return None,
        })
    }

    /// Whether delivery pushes an error code.
    pub const fn has_error_code(self) -> bool {
        matches!(
            self,
            Vector::DoubleFault
                | Vector::InvalidTss
                | Vector::SegmentNotPresent
                | Vector::StackFault
                | Vector::GeneralProtection
                | Vector::PageFault
                | Vector::AlignmentCheck
                | Vector::ControlProtection
        )
    }

    /// Whether the exception is contributory for double-fault purposes (SDM 3A table 6-4).
    pub const fn is_contributory(self) -> bool {
        matches!(
            self,
            Vector::DivideError
                | Vector::InvalidTss
                | Vector::SegmentNotPresent
                | Vector::StackFault
                | Vector::GeneralProtection
                | Vector::ControlProtection
        )
    }
}

/// A fault or trap on its way to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exception {
    /// Which exception.
    pub vector: Vector,
    /// The error code, for vectors that push one.
    pub error_code: u32,
    /// The faulting linear address (CR2), for page faults; DR6 bits to set, for #DB.
    pub payload: u64,
}

impl Exception {
    /// An exception without an error code.
    pub const fn plain(vector: Vector) -> Self {
        Exception { vector, error_code: 0, payload: 0 }
    }

    /// An exception with an error code.
    pub const fn with_code(vector: Vector, error_code: u32) -> Self {
        Exception { vector, error_code, payload: 0 }
    }

    /// #PF at a linear address with the given error-code bits (see [`crate::paging::fault`]).
    pub const fn page_fault(gva: u64, error_code: u32) -> Self {
        Exception { vector: Vector::PageFault, error_code, payload: gva }
    }

    /// #GP(`error_code`).
    pub const fn gp(error_code: u32) -> Self {
        Self::with_code(Vector::GeneralProtection, error_code)
    }

    /// #UD.
    pub const fn ud() -> Self {
        Self::plain(Vector::InvalidOpcode)
    }

    /// #DB with the DR6 bits that explain it.
    pub const fn debug(dr6: u64) -> Self {
        Exception { vector: Vector::Debug, error_code: 0, payload: dr6 }
    }
}
