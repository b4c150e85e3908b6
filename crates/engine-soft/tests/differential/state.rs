//! What an execution starts from and ends with.

use x86::bits::rflags;

/// Guest address of the page that instructions are executed from. Everything is below 4 GiB, so that 32-bit code
/// reaches it, and is mapped at its own address in the host process.
pub const CODE: u64 = 0x4000_0000;
/// Bytes of code memory, filled with INT3.
pub const CODE_BYTES: usize = 0x2000;
/// Where in the code memory the instruction is.
pub const CODE_ENTRY: u64 = 0x1000;
/// Guest address of the data area; no round distance from the code, which bit-string offsets would find.
pub const DATA: u64 = 0x5765_4000;
/// Bytes of the data area, with its holes.
pub const DATA_BYTES: usize = 6 * PAGE as usize;
/// Two pages that can be written.
pub const WRITABLE: std::ops::Range<u64> = DATA + PAGE..DATA + 3 * PAGE;
/// A page that can only be read. The pages around it and around the writable ones are not mapped.
pub const READ_ONLY: std::ops::Range<u64> = DATA + 4 * PAGE..DATA + 5 * PAGE;
/// A page of memory.
pub const PAGE: u64 = 0x1000;
/// GS base in 64-bit code.
pub const GS_BASE: u64 = 0x1234_5000;

/// Offsets in the FXSAVE64 image.
pub mod image {
    pub const FCW: usize = 0;
    pub const FSW: usize = 2;
    pub const TAGS: usize = 4;
    pub const FOP: usize = 6;
    pub const FIP: usize = 8;
    pub const FDP: usize = 16;
    pub const MXCSR: usize = 24;
    pub const REGISTERS: usize = 32;
}

/// Registers before or after.
#[repr(C, align(64))]
#[derive(Clone, PartialEq, Eq)]
pub struct State {
    /// FXSAVE64 image of x87, MMX and MXCSR; the XMM part is not used.
    pub x87: [u8; 512],
    /// YMM0–15.
    pub vector: [[u8; 32]; 16],
    /// General-purpose registers.
    pub gpr: [u64; 16],
    /// Offset in CS.
    pub rip: u64,
    pub rflags: u64,
}

impl Default for State {
    fn default() -> Self {
        let mut x87 = [0; 512];
        x87[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
        x87[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        State { x87, vector: [[0; 32]; 16], gpr: [0; 16], rip: 0, rflags: rflags::RESERVED_ONE | rflags::IF }
    }
}

impl State {
    pub fn mxcsr(&self) -> u32 {
        let at = image::MXCSR;
        u32::from_le_bytes([self.x87[at], self.x87[at + 1], self.x87[at + 2], self.x87[at + 3]])
    }

    pub fn set_mxcsr(&mut self, value: u32) {
        self.x87[image::MXCSR..][..4].copy_from_slice(&value.to_le_bytes());
    }
}

/// How an execution ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The instruction completed.
    Done,
    /// An exception.
    Fault {
        vector: u8,
        error_code: u32,
        /// CR2 for page faults, else zero.
        address: u64,
    },
}

/// Everything after an execution but memory.
#[derive(Clone)]
pub struct Outcome {
    pub end: End,
    pub state: State,
}

/// The data area's bytes. The guard pages are there too, so that offsets are simple.
#[repr(C, align(4096))]
pub struct Memory(pub [u8; DATA_BYTES]);

impl Memory {
    pub fn new() -> Box<Memory> {
        Box::new(Memory([0; DATA_BYTES]))
    }

    /// What an access to `len` bytes at a linear address in user mode meets.
    /// `stack` says whether the access is through SS.
    pub fn check(
        &self,
        address: u64,
        len: u64,
        write: bool,
        stack: bool,
        long_mode: bool,
    ) -> Result<(), End> {
        let last = address.wrapping_add(len.saturating_sub(1));
        if long_mode && [address, last].iter().any(|a| (*a as i64) << 16 >> 16 != *a as i64) {
            return Err(End::Fault { vector: if stack { 12 } else { 13 }, error_code: 0, address: 0 });
        }
        let mut at = address;
        loop {
            let present = WRITABLE.contains(&at) || READ_ONLY.contains(&at);
            if !present || (write && !WRITABLE.contains(&at)) {
                let error_code = 4 | if write { 2 } else { 0 } | if present { 1 } else { 0 };
                return Err(End::Fault { vector: 14, error_code, address: at });
            }
            if at & !(PAGE - 1) == last & !(PAGE - 1) {
                return Ok(());
            }
            at = (at & !(PAGE - 1)) + PAGE;
        }
    }
}

/// One instruction with the state to execute it in.
pub struct Case<'a> {
    /// Decoded at the place where it is executed.
    pub instruction: &'a iced_x86::Instruction,
    /// Its encoding.
    pub bytes: &'a [u8],
    /// 16, 32 or 64.
    pub bitness: u32,
    /// State before.
    pub state: &'a State,
}

/// Linear base of the code segment.
pub fn code_base(bitness: u32) -> u64 {
    if bitness == 16 { CODE } else { 0 }
}

/// Linear base of the data and stack segments.
pub fn data_base(bitness: u32) -> u64 {
    if bitness == 16 { DATA } else { 0 }
}

/// Something that executes instructions like a processor in user mode.
pub trait Subject {
    fn name(&self) -> &'static str;
    /// Whether flags and registers that the manuals call undefined are the host's.
    fn undefined_like_host(&self) -> bool;
    /// Executes one instruction, all repetitions included; `None` if it is not one for this subject.
    fn step(&mut self, case: &Case<'_>, memory: &mut Memory) -> Option<Outcome>;
}
