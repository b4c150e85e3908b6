//! Generates thunks. In order, each part only if the instruction needs it:
//!
//! 1. save the host's callee-saved registers that are used, and its MXCSR;
//! 2. load x87 state (FXRSTOR64, which also sets XMM registers and MXCSR), vector registers, MXCSR, status flags,
//!    general-purpose registers, in this order as each step would disturb the later ones;
//! 3. the marker with the distance to the fault exit, and the guest instruction;
//! 4. store what it changed: general-purpose registers, flags, vector registers, MXCSR, x87 state;
//! 5. give the host its x87 state and MXCSR back, return zero.
//!
//! The fault exit does 4 for MXCSR and x87 only, then 5, and returns what the signal handler put in RAX and RDX.

use std::mem::offset_of;

use iced_x86::{Code, CodeSize, Encoder, Instruction, MemoryOperand, Register};

use super::arena::Arena;
use super::classify::Shape;
use super::{CompileError, Thunk, X87Pointers, image};
use crate::user::UserRegs;

/// What a thunk returns, in RAX and RDX.
#[repr(C)]
pub(super) struct ThunkResult {
    /// Zero, or one more than the vector of the exception.
    pub vector_plus_one: u64,
    /// For page faults, the host address.
    pub address: u64,
}

/// Opcode and ModRM of a multi-byte NOP with a 32-bit displacement. The displacement is the distance from the guest
/// instruction, which follows, to the fault exit.
pub(super) const MARKER: [u8; 3] = [0x0f, 0x1f, 0x80];
/// Length of the marker with its displacement.
pub(super) const MARKER_BYTES: usize = 7;

/// MXCSR after reset, which also suits the moves around the guest instruction.
const MXCSR_DEFAULT: u32 = 0x1f80;

const GPR: [Register; 16] = [
    Register::RAX,
    Register::RCX,
    Register::RDX,
    Register::RBX,
    Register::RSP,
    Register::RBP,
    Register::RSI,
    Register::RDI,
    Register::R8,
    Register::R9,
    Register::R10,
    Register::R11,
    Register::R12,
    Register::R13,
    Register::R14,
    Register::R15,
];

/// What the System V ABI wants unchanged, RSP aside.
const CALLEE_SAVED: [Register; 6] =
    [Register::RBX, Register::RBP, Register::R12, Register::R13, Register::R14, Register::R15];

/// Encodes one instruction for an address.
pub(super) fn encode(
    encoder: &mut Encoder,
    instruction: &Instruction,
    address: u64,
) -> Result<Vec<u8>, CompileError> {
    let outcome = encoder.encode(instruction, address);
    let bytes = encoder.take_buffer();
    outcome.map_err(|source| CompileError::Encode { code: instruction.code(), source })?;
    Ok(bytes)
}

/// The 11-bit x87 opcode (SDM 1 §8.1.9) of an instruction in its own mode.
pub(super) fn x87_opcode_of(instruction: &Instruction) -> Result<u16, CompileError> {
    let bitness = match instruction.code_size() {
        CodeSize::Code16 => 16,
        CodeSize::Code32 => 32,
        CodeSize::Code64 | CodeSize::Unknown => 64,
    };
    let bytes = encode(&mut Encoder::new(bitness), instruction, instruction.ip())?;
    Ok(x87_opcode(&bytes))
}

/// The 11-bit x87 opcode in an encoding: three bits of the first opcode byte over the ModRM byte.
fn x87_opcode(bytes: &[u8]) -> u16 {
    let start = bytes.iter().position(|byte| (0xd8..=0xdf).contains(byte));
    match start.and_then(|at| bytes.get(at..at + 2)) {
        Some(pair) => u16::from(pair[0] & 7) << 8 | u16::from(pair[1]),
        None => 0,
    }
}

/// Generates the thunk for `shape`, whose instruction encodes as `guest_code`.
pub(super) fn thunk(
    encoder: &mut Encoder,
    arena: &mut Arena,
    shape: &Shape,
    guest_code: &[u8],
) -> Result<Thunk, CompileError> {
    let mut emitter = Emitter { encoder, code: Vec::with_capacity(256), shape };
    emitter.enter()?;
    emitter.load()?;
    emitter.code.extend(MARKER);
    let distance_at = emitter.code.len();
    emitter.code.extend([0; 4]);
    let guest_at = emitter.code.len();
    emitter.code.extend(guest_code);
    emitter.store()?;
    emitter.store_floating_point()?;
    emitter.op2(Code::Xor_r32_rm32, Register::EAX, Register::EAX)?;
    emitter.leave()?;
    let distance = (emitter.code.len() - guest_at) as u32;
    emitter.code[distance_at..guest_at].copy_from_slice(&distance.to_le_bytes());
    emitter.store_floating_point()?;
    emitter.leave()?;
    let code = emitter.code;

    let address = arena.next_address();
    let entry = arena.place(&code).ok_or(CompileError::Full)?;
    let pointers = shape.x87_pointers.then(|| X87Pointers {
        host_instruction: address + guest_at as u64,
        host_opcode: x87_opcode(guest_code),
        guest_opcode: 0,
    });
    // SAFETY: the code at `entry` follows the C calling convention for this signature, and stays there as long as the
    // contract of `Thunk::run` lets it be called.
    let entry = unsafe {
        std::mem::transmute::<*const u8, extern "C" fn(*mut UserRegs, *mut u8) -> ThunkResult>(entry)
    };
    Ok(Thunk {
        entry,
        memory: shape.memory,
        memory_bytes: shape.memory_bytes,
        alignment_bytes: shape.alignment_bytes,
        x87_waits: shape.x87_waits,
        pointers,
    })
}

struct Emitter<'a> {
    encoder: &'a mut Encoder,
    code: Vec<u8>,
    shape: &'a Shape,
}

impl Emitter<'_> {
    fn push(&mut self, instruction: &Instruction) -> Result<(), CompileError> {
        let bytes = encode(self.encoder, instruction, 0)?;
        self.code.extend(bytes);
        Ok(())
    }

    /// `code` with two register operands.
    fn op2(&mut self, code: Code, first: Register, second: Register) -> Result<(), CompileError> {
        let made = Instruction::with2(code, first, second);
        self.push(&made.map_err(|source| CompileError::Encode { code, source })?)
    }

    /// `code` with a register operand.
    fn op1(&mut self, code: Code, register: Register) -> Result<(), CompileError> {
        let made = Instruction::with1(code, register);
        self.push(&made.map_err(|source| CompileError::Encode { code, source })?)
    }

    /// `code register, field`.
    fn load_field(&mut self, code: Code, register: Register, offset: usize) -> Result<(), CompileError> {
        let made = Instruction::with2(code, register, self.field(offset));
        self.push(&made.map_err(|source| CompileError::Encode { code, source })?)
    }

    /// `code field, register`.
    fn store_field(&mut self, code: Code, offset: usize, register: Register) -> Result<(), CompileError> {
        let made = Instruction::with2(code, self.field(offset), register);
        self.push(&made.map_err(|source| CompileError::Encode { code, source })?)
    }

    /// `code memory`.
    fn on_memory(&mut self, code: Code, memory: MemoryOperand) -> Result<(), CompileError> {
        let made = Instruction::with1(code, memory);
        self.push(&made.map_err(|source| CompileError::Encode { code, source })?)
    }

    /// `code register_or_memory, immediate`.
    fn immediate(&mut self, made: Result<Instruction, iced_x86::IcedError>) -> Result<(), CompileError> {
        let made = made.map_err(|source| CompileError::Encode { code: Code::INVALID, source })?;
        self.push(&made)
    }

    /// A field of the register file.
    fn field(&self, offset: usize) -> MemoryOperand {
        MemoryOperand::with_base_displ(self.shape.base, offset as i64)
    }

    /// Host register that holds guest register `number`.
    fn host_register(&self, number: usize) -> Register {
        if GPR[number] == Register::RSP { self.shape.stack_alias } else { GPR[number] }
    }

    /// Callee-saved host registers that the thunk changes.
    fn saved(&self) -> impl DoubleEndedIterator<Item = Register> + use<> {
        let shape = self.shape;
        let own = [Some(shape.base), shape.pointer, Some(shape.stack_alias)];
        let loads = shape.gpr_loads;
        CALLEE_SAVED.into_iter().filter(move |r| loads & (1 << r.number()) != 0 || own.contains(&Some(*r)))
    }

    fn changes_mxcsr(&self) -> bool {
        self.shape.mxcsr || self.shape.x87
    }

    fn enter(&mut self) -> Result<(), CompileError> {
        for register in self.saved() {
            self.op1(Code::Push_r64, register)?;
        }
        if self.shape.base != Register::RDI {
            self.op2(Code::Mov_r64_rm64, self.shape.base, Register::RDI)?;
        }
        if let Some(pointer) = self.shape.pointer
            && pointer != Register::RSI
        {
            self.op2(Code::Mov_r64_rm64, pointer, Register::RSI)?;
        }
        if self.changes_mxcsr() {
            self.immediate(Instruction::with2(Code::Sub_rm64_imm8, Register::RSP, 8))?;
            self.on_memory(Code::Stmxcsr_m32, MemoryOperand::with_base(Register::RSP))?;
        }
        Ok(())
    }

    fn load(&mut self) -> Result<(), CompileError> {
        let shape = self.shape;
        if shape.x87 {
            // The image's MXCSR is not the guest's; whatever is in it must not fault here.
            let field = self.field(offset_of!(UserRegs, x87) + image::MXCSR);
            self.immediate(Instruction::with2(Code::Mov_rm32_imm32, field, MXCSR_DEFAULT))?;
            let x87 = self.field(offset_of!(UserRegs, x87));
            self.on_memory(Code::Fxrstor64_m512byte, x87)?;
        }
        for number in bits(shape.vector_loads) {
            let offset = vector_offset(number);
            if shape.wide {
                self.load_field(Code::VEX_Vmovdqu_ymm_ymmm256, Register::YMM0 + number as u32, offset)?;
            } else {
                self.load_field(Code::Movups_xmm_xmmm128, Register::XMM0 + number as u32, offset)?;
            }
        }
        if shape.mxcsr {
            let mxcsr = self.field(offset_of!(UserRegs, mxcsr));
            self.on_memory(Code::Ldmxcsr_m32, mxcsr)?;
        }
        // Masking changes flags, and loading flags changes RAX; so the masked value waits on the stack.
        if let Some(bit) = shape.bit_offset {
            self.load_gpr(bit.number, Register::RAX)?;
            self.immediate(Instruction::with2(Code::And_rm32_imm8, Register::EAX, bit.mask))?;
            self.op1(Code::Push_r64, Register::RAX)?;
        }
        if shape.flags {
            self.load_field(Code::Movzx_r32_rm16, Register::EAX, offset_of!(UserRegs, status))?;
            // 1 + 7F overflows and 0 + 7F does not.
            self.immediate(Instruction::with2(Code::Add_AL_imm8, Register::AL, 0x7f))?;
            self.push(&Instruction::with(Code::Sahf))?;
        }
        for number in bits(shape.gpr_loads) {
            let register = self.host_register(number);
            if shape.bit_offset.is_some_and(|bit| bit.number == number) {
                self.op1(Code::Pop_r64, register)?;
            } else {
                self.load_gpr(number, register)?;
            }
        }
        Ok(())
    }

    fn load_gpr(&mut self, number: usize, register: Register) -> Result<(), CompileError> {
        self.load_field(Code::Mov_r64_rm64, register, gpr_offset(number))
    }

    fn store(&mut self) -> Result<(), CompileError> {
        let shape = self.shape;
        for number in bits(shape.gpr_stores) {
            let register = self.host_register(number);
            self.store_field(Code::Mov_rm64_r64, gpr_offset(number), register)?;
        }
        if shape.flags_stored {
            self.push(&Instruction::with(Code::Lahf))?;
            self.op1(Code::Seto_rm8, Register::AL)?;
            self.store_field(Code::Mov_rm16_r16, offset_of!(UserRegs, status), Register::AX)?;
        }
        for number in bits(shape.vector_stores) {
            let offset = vector_offset(number);
            if shape.wide {
                self.store_field(Code::VEX_Vmovdqu_ymmm256_ymm, offset, Register::YMM0 + number as u32)?;
            } else {
                self.store_field(Code::Movups_xmmm128_xmm, offset, Register::XMM0 + number as u32)?;
            }
        }
        Ok(())
    }

    /// Stores MXCSR and x87 state, and gives the host its own.
    fn store_floating_point(&mut self) -> Result<(), CompileError> {
        let shape = self.shape;
        if shape.mxcsr {
            let mxcsr = self.field(offset_of!(UserRegs, mxcsr));
            self.on_memory(Code::Stmxcsr_m32, mxcsr)?;
        }
        if shape.x87 {
            let x87 = self.field(offset_of!(UserRegs, x87));
            self.on_memory(Code::Fxsave64_m512byte, x87)?;
            self.push(&Instruction::with(Code::Fninit))?;
        }
        if self.changes_mxcsr() {
            self.on_memory(Code::Ldmxcsr_m32, MemoryOperand::with_base(Register::RSP))?;
        }
        if shape.wide && shape.vector_loads != 0 {
            self.push(&Instruction::with(Code::VEX_Vzeroupper))?;
        }
        Ok(())
    }

    fn leave(&mut self) -> Result<(), CompileError> {
        if self.changes_mxcsr() {
            self.immediate(Instruction::with2(Code::Add_rm64_imm8, Register::RSP, 8))?;
        }
        for register in self.saved().rev() {
            self.op1(Code::Pop_r64, register)?;
        }
        self.push(&Instruction::with(Code::Retnq))
    }
}

fn bits(mask: u16) -> impl Iterator<Item = usize> {
    (0..16).filter(move |number| mask & (1 << number) != 0)
}

fn gpr_offset(number: usize) -> usize {
    offset_of!(UserRegs, gpr) + 8 * number
}

fn vector_offset(number: usize) -> usize {
    offset_of!(UserRegs, vector) + 32 * number
}
