//! Guest instructions run by the host processor itself, one at a time.
//!
//! A *thunk* is a short piece of generated host code that loads the part of [`UserRegs`] that one guest instruction
//! uses into the host's registers of the same number, executes that instruction, and stores what it changed. So
//! results, flags (undefined ones too), rounding and faults are those of the silicon, for every user-mode
//! instruction without control flow, segment or system effect. Sources: Intel SDM 1 (ch. 8–14) and 2, AMD APM 1, 3–5.
//!
//! - A memory operand is rewritten to `[host register]`; the caller gives the host pointer ([`Operand::host`]): into
//!   guest RAM, so that LOCKed instructions are atomic there, or to a bounce buffer that has the guest address's
//!   alignment modulo 64, so that alignment faults stay true. [`Thunk::memory`] says what is accessed.
//! - Registers that the thunk needs for itself are ones the instruction does not name; a guest RSP is renamed, so the
//!   host's stack pointer stays valid throughout.
//! - Faults of the instruction arrive as signals and come back as [`NativeFault`]; no guest register has changed then
//!   but what the architecture changes with the fault (MXCSR flags with #XM, the x87 status word).
//!
//! Not done here ([`CompileError::Unsupported`]): control flow, stack and string instructions, segment registers,
//! anything privileged, FXSAVE/XSAVE and relatives, time stamp and CPUID, gathers and masked moves (element by
//! element, see [`elements`]), EVEX encodings.

pub(crate) mod arena;
pub(crate) mod classify;
pub mod elements;
mod emit;
pub(crate) mod faults;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

use iced_x86::{Code, Encoder, IcedError, Instruction, InstructionInfoFactory, Register};

use crate::user::UserRegs;
use arena::Arena;
use faults::Registration;

/// Bytes of code that [`Thunks::new`] has room for: some eight thousand instructions.
pub const DEFAULT_CAPACITY_BYTES: usize = 1 << 20;

/// Why an instruction has no thunk.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// The instruction is not of a kind that thunks execute; interpret it.
    #[error("{0:?} is not executed natively")]
    Unsupported(Code),
    /// The code buffer is full: call [`Thunks::clear`] when no thunk is held any more, and compile again.
    #[error("the native code buffer is full; clear it and compile again")]
    Full,
    /// The host cannot provide memory for code.
    #[error("no memory for native code: {0}")]
    Host(#[from] std::io::Error),
    /// The encoder refused an instruction that it should know.
    #[error("cannot encode {code:?} for native execution: {source}")]
    Encode {
        /// What was to be encoded.
        code: Code,
        /// The encoder's reason.
        source: IcedError,
    },
}

/// A fault that the host processor raised in a guest instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NativeFault {
    /// #DE.
    DivideError,
    /// #XM: an unmasked SIMD floating-point exception; MXCSR has its flag.
    Simd,
    /// #MF: an unmasked x87 exception was pending.
    X87,
    /// #GP(0): a misaligned operand, or a reserved bit in a value for MXCSR.
    GeneralProtection,
    /// #UD: the host has no such instruction.
    InvalidOpcode,
    /// #AC(0). Not raised as long as the host process leaves RFLAGS.AC clear.
    AlignmentCheck,
    /// The host could not provide the page behind the pointer. Not the guest's fault: the host is out of memory, or
    /// the pointer was wrong.
    HostMemory {
        /// Host address of the access.
        address: u64,
    },
    /// A vector that no user-mode instruction raises.
    Unexpected {
        /// The exception vector.
        vector: u8,
    },
}

/// What an instruction does with its memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryUse {
    /// There is none; [`Operand::host`] is ignored.
    None,
    /// The address is only computed (LEA) or is a hint (PREFETCH, NOP). [`Operand::host`] is the guest's effective
    /// address as a number, nothing is accessed.
    Address,
    /// Read.
    Read,
    /// Written.
    Write,
    /// Read and written; also when the write depends on the operand (CMPXCHG), as permission is needed anyway.
    ReadWrite,
}

/// The memory operand of one execution.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    /// Where the bytes are in the host's address space.
    pub host: *mut u8,
    /// The guest's effective address (offset in its segment), which x87 instructions record as their last data pointer.
    pub guest: u64,
}

impl Operand {
    /// For instructions without a memory operand.
    pub const NONE: Operand = Operand { host: std::ptr::null_mut(), guest: 0 };
}

/// One compiled instruction. Valid until [`Thunks::clear`], or until its [`Thunks`] is dropped.
#[derive(Clone, Copy, Debug)]
pub struct Thunk {
    entry: extern "C" fn(*mut UserRegs, *mut u8) -> emit::ThunkResult,
    /// What the instruction does with its memory operand.
    pub memory: MemoryUse,
    /// Size of the memory operand in bytes; 0 for [`MemoryUse::None`] and [`MemoryUse::Address`]. CLFLUSH and
    /// relatives count as reads of one byte.
    pub memory_bytes: u16,
    /// What the operand's address has to be a multiple of, else #GP; 1 for most.
    pub alignment_bytes: u8,
    /// Reports a pending x87 exception before it does anything.
    x87_waits: bool,
    /// For instructions that record last-instruction pointers in the x87 state.
    pointers: Option<X87Pointers>,
}

/// What an x87 instruction leaves in FIP and FOP when run in its thunk, and what the guest should see.
#[derive(Clone, Copy, Debug)]
struct X87Pointers {
    host_instruction: u64,
    host_opcode: u16,
    guest_opcode: u16,
}

/// Offsets in the FXSAVE64 image (SDM 1 table 10-2).
mod image {
    pub const FSW: usize = 2;
    pub const FOP: usize = 6;
    pub const FIP: usize = 8;
    pub const FDP: usize = 16;
    pub const MXCSR: usize = 24;
}

impl Thunk {
    /// The faults that come before those of the memory access, for an operand at the linear address `address`: a
    /// pending x87 exception, and misalignment. [`Thunk::run`] raises them too, but a caller that translates the
    /// address first has to know.
    ///
    /// # Errors
    /// [`NativeFault::X87`] or [`NativeFault::GeneralProtection`].
    pub fn precheck(&self, regs: &UserRegs, address: u64) -> Result<(), NativeFault> {
        /// MXCSR.MM on AMD processors: no alignment check for legacy SSE operands of arithmetic (APM 1 §4.2.2).
        const MISALIGNED_MASK: u32 = 1 << 17;
        /// FSW.ES.
        const SUMMARY: u8 = 0x80;
        if self.x87_waits && regs.x87.0[image::FSW] & SUMMARY != 0 {
            return Err(NativeFault::X87);
        }
        let mask = u64::from(self.alignment_bytes).wrapping_sub(1);
        if address & mask != 0 && regs.mxcsr & MISALIGNED_MASK == 0 {
            return Err(NativeFault::GeneralProtection);
        }
        Ok(())
    }

    /// Executes the instruction. [`UserRegs::rip`] must be its guest address; RIP is not advanced.
    ///
    /// # Errors
    /// The host processor faulted.
    ///
    /// # Safety
    /// The [`Thunks`] it came from is alive and was not cleared since. Unless [`Thunk::memory`] is `None` or
    /// `Address`, `operand.host` points to [`Thunk::memory_bytes`] bytes that may be accessed so. MXCSR in `regs`
    /// has no bit that the host's MXCSR reserves.
    pub unsafe fn run(&self, regs: &mut UserRegs, operand: Operand) -> Result<(), NativeFault> {
        let result = (self.entry)(regs, operand.host);
        if let Some(pointers) = &self.pointers {
            pointers.make_guest(regs, operand);
        }
        faults::decode(result)
    }
}

impl X87Pointers {
    /// Replaces host addresses that the instruction left in the image. Which of the three fields a processor updates,
    /// and when, differs (SDM 1 §8.1.8, CPUID.7.EBX\[6\]); so what it updated is recognised by value.
    fn make_guest(&self, regs: &mut UserRegs, operand: Operand) {
        let image = &mut regs.x87.0;
        if image[image::FIP..][..8] != self.host_instruction.to_le_bytes() {
            return;
        }
        image[image::FIP..][..8].copy_from_slice(&regs.rip.to_le_bytes());
        if image[image::FDP..][..8] == (operand.host as u64).to_le_bytes() {
            image[image::FDP..][..8].copy_from_slice(&operand.guest.to_le_bytes());
        }
        if image[image::FOP..][..2] == self.host_opcode.to_le_bytes() {
            image[image::FOP..][..2].copy_from_slice(&self.guest_opcode.to_le_bytes());
        }
    }
}

/// What makes a thunk: the instruction as executed, and which of its registers stands for RSP.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    code: [u8; 15],
    len: u8,
    stack_alias: u8,
}

impl Key {
    fn new(guest_code: &[u8], stack_alias: Register) -> Key {
        let mut code = [0; 15];
        let len = guest_code.len().min(code.len());
        code[..len].copy_from_slice(&guest_code[..len]);
        Key { code, len: len as u8, stack_alias: stack_alias.number() as u8 }
    }
}

/// Compiled thunks and the memory they are in. One per vCPU, or shared behind a lock for compiling; running needs no
/// lock.
pub struct Thunks {
    arena: Arena,
    _faults: Registration,
    cache: HashMap<Key, Thunk>,
    factory: InstructionInfoFactory,
    encoder: Encoder,
}

impl Thunks {
    /// Room for `capacity_bytes` of code (about 130 bytes an instruction), W^X: two mappings of one anonymous file.
    ///
    /// # Errors
    /// The host refuses executable memory or signal handlers.
    pub fn with_capacity(capacity_bytes: usize) -> Result<Self, CompileError> {
        faults::install()?;
        let arena = Arena::new(capacity_bytes)?;
        Ok(Thunks {
            _faults: Registration::of_thunks(arena.range()),
            arena,
            cache: HashMap::new(),
            factory: InstructionInfoFactory::new(),
            encoder: Encoder::new(64),
        })
    }

    /// Room for [`DEFAULT_CAPACITY_BYTES`].
    ///
    /// # Errors
    /// As for [`Thunks::with_capacity`].
    pub fn new() -> Result<Self, CompileError> {
        Self::with_capacity(DEFAULT_CAPACITY_BYTES)
    }

    /// The thunk for a decoded instruction of 16-, 32- or 64-bit code. Instructions that differ only in how they
    /// address memory share one.
    ///
    /// # Errors
    /// [`CompileError::Unsupported`] for what has to be interpreted, [`CompileError::Full`] when there is no room.
    pub fn compile(&mut self, instruction: &Instruction) -> Result<Thunk, CompileError> {
        let shape = classify::classify(&mut self.factory, instruction)?;
        let guest_code = emit::encode(&mut self.encoder, &shape.instruction, 0)?;
        let key = Key::new(&guest_code, shape.stack_alias);
        let mut thunk = match self.cache.get(&key) {
            Some(thunk) => *thunk,
            None => {
                let thunk = emit::thunk(&mut self.encoder, &mut self.arena, &shape, &guest_code)?;
                self.cache.insert(key, thunk);
                thunk
            }
        };
        if let Some(pointers) = &mut thunk.pointers {
            pointers.guest_opcode = emit::x87_opcode_of(instruction)?;
        }
        Ok(thunk)
    }

    /// Forgets every thunk.
    ///
    /// # Safety
    /// No [`Thunk`] made before is running, or is run afterwards.
    pub unsafe fn clear(&mut self) {
        self.cache.clear();
        self.arena.truncate(0);
    }
}

/// For BT, BTS, BTR and BTC with a memory operand and a bit offset in a register: how many bytes to add to the
/// effective address, modulo the address size, to reach the operand-sized word that holds the bit (SDM 2A "BT"). The
/// pointer given to [`Thunk::run`] has to be to that word. `None` for every other instruction.
pub fn bit_string_displacement(instruction: &Instruction, regs: &UserRegs) -> Option<i64> {
    let offset = classify::bit_offset_register(instruction)?;
    let value = regs.gpr[offset.number()];
    Some(match offset.size() {
        2 => i64::from(value as i16 >> 4) * 2,
        4 => i64::from(value as i32 >> 5) * 4,
        _ => (value as i64 >> 6) * 8,
    })
}
