//! Which way an instruction is translated, and where the flags should be when a block begins.

use iced_x86::{Code, FlowControl, Instruction, MemorySize, Mnemonic, OpKind, Register};

use super::block::Builder;
use super::flags::{Place, Use, usage};
use super::registers::{home, is_high_byte};
use crate::interp::op::Op;
use crate::native::MemoryUse;
use crate::native::classify;

/// How an instruction is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// Nothing to do.
    Nothing,
    /// Copied.
    Plain,
    /// The address of its operand is all it needs.
    Address,
    /// Copied, on a host address.
    Memory(MemoryUse),
    /// Loads from an address for each element of a vector.
    Gather,
    /// Loads or stores the elements that a mask chooses.
    MaskedMove,
    Push,
    Pop,
    Leave,
    Jump,
    JumpIf,
    Call,
    JumpIndirect,
    CallIndirect,
    Return,
    /// The interpreter's.
    Interpret,
}

/// Whether the host processor can fault in the instruction itself.
pub(super) fn is_faulting(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Div | Mnemonic::Idiv)
        || classify::alignment_of(instruction) > 1
}

impl Builder<'_> {
    pub(super) fn classify(&self, instruction: &Instruction, op: &Op) -> Class {
        use Mnemonic::*;
        if instruction.is_invalid() || op.class & self.variant.disabled() != 0 {
            return Class::Interpret;
        }
        let near = |kind| kind == if self.word == 8 { OpKind::NearBranch64 } else { OpKind::NearBranch32 };
        let wide = |register: Register| register.is_gpr() && register.size() == usize::from(self.word);
        match instruction.flow_control() {
            FlowControl::Next => {}
            FlowControl::UnconditionalBranch if near(instruction.op0_kind()) => return Class::Jump,
            FlowControl::ConditionalBranch
                if instruction.is_jcc_short_or_near() && near(instruction.op0_kind()) =>
            {
                return Class::JumpIf;
            }
            FlowControl::Call if near(instruction.op0_kind()) => return Class::Call,
            FlowControl::IndirectBranch | FlowControl::IndirectCall => {
                let fits = match instruction.op0_kind() {
                    OpKind::Register => wide(instruction.op0_register()),
                    _ => {
                        instruction.memory_size() == MemorySize::QwordOffset && self.can_address(instruction)
                    }
                };
                return match (fits, instruction.mnemonic()) {
                    (true, Jmp) => Class::JumpIndirect,
                    (true, Call) => Class::CallIndirect,
                    _ => Class::Interpret,
                };
            }
            FlowControl::Return
                if match self.word {
                    8 => matches!(instruction.code(), Code::Retnq | Code::Retnq_imm16),
                    _ => matches!(instruction.code(), Code::Retnd | Code::Retnd_imm16),
                } =>
            {
                return Class::Return;
            }
            _ => return Class::Interpret,
        }
        match instruction.mnemonic() {
            Nop | Endbr32 | Endbr64 | Rdsspd | Rdsspq | Prefetcht0 | Prefetcht1 | Prefetcht2
            | Prefetchnta | Prefetchw | Prefetch | Prefetchwt1 => return Class::Nothing,
            // On some processors undefined.
            Reservednop => return Class::Interpret,
            // In 32-bit code there are only eight registers to be cleared.
            Vzeroupper | Vzeroall if self.word == 4 => return Class::Interpret,
            Push => return self.classify_push(instruction),
            Pop if instruction.op0_kind() == OpKind::Register && wide(instruction.op0_register()) => {
                return Class::Pop;
            }
            Leave if instruction.code() == if self.word == 8 { Code::Leaveq } else { Code::Leaved } => {
                return Class::Leave;
            }
            Pause => return Class::Plain,
            Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq if self.can_address(instruction) => {
                return Class::MaskedMove;
            }
            _ if self.can_gather(instruction) => return Class::Gather,
            _ => {}
        }
        if !classify::is_native(instruction) {
            return Class::Interpret;
        }
        if classify::touches_x87(instruction) && !self.variant.has_x87() {
            return Class::Interpret;
        }
        // What may unmask exceptions, and what stores addresses of instructions.
        if matches!(
            instruction.mnemonic(),
            Ldmxcsr | Stmxcsr | Vldmxcsr | Vstmxcsr | Fldcw | Fldenv | Fnstenv | Frstor | Fnsave
        ) {
            return Class::Interpret;
        }
        let memory = (0..instruction.op_count()).any(|i| instruction.op_kind(i) == OpKind::Memory);
        if !self.registers_fit(instruction, memory) {
            return Class::Interpret;
        }
        if !memory {
            return Class::Plain;
        }
        if !self.can_address(instruction) || classify::bit_offset_register(instruction).is_some() {
            return Class::Interpret;
        }
        if instruction.mnemonic() == Lea {
            return Class::Address;
        }
        match classify::memory_use_of(instruction) {
            (MemoryUse::None | MemoryUse::Address, _) => Class::Nothing,
            (MemoryUse::Read, _)
                if matches!(instruction.mnemonic(), Clflush | Clflushopt | Clwb | Cldemote) =>
            {
                Class::Interpret
            }
            (_, bytes) if bytes == 0 || bytes > 64 => Class::Interpret,
            (usage, _) => Class::Memory(usage),
        }
    }

    fn classify_push(&self, instruction: &Instruction) -> Class {
        let fits = match instruction.op0_kind() {
            OpKind::Register => instruction.op0_register().is_gpr(),
            OpKind::Memory => self.can_address(instruction),
            _ => true,
        } && instruction.stack_pointer_increment() == -i32::from(self.word);
        if fits { Class::Push } else { Class::Interpret }
    }

    /// Whether the operands' registers can be had at the same time: at most so many of them live in memory as there are
    /// scratch registers, and high bytes only together with registers that need no REX prefix. (The address can do
    /// without: [`Builder::memory`].)
    fn registers_fit(&self, instruction: &Instruction, memory: bool) -> bool {
        let operands = (0..instruction.op_count())
            .filter(|i| instruction.op_kind(*i) == OpKind::Register)
            .map(|i| instruction.op_register(i))
            .filter(|r| r.is_gpr());
        let (mut high, mut rex) = (false, false);
        let mut in_memory: Vec<Register> = Vec::new();
        for register in operands {
            let full = register.full_register();
            if is_high_byte(register) {
                high = true;
                continue;
            }
            match home(full.number()) {
                Some(host) => rex |= host.0 >= 8 || register.size() == 1 && host.0 >= 4,
                None => {
                    rex = true;
                    if !in_memory.contains(&full) {
                        in_memory.push(full);
                    }
                }
            }
        }
        let scratch = if memory { 1 } else { 2 };
        in_memory.len() <= scratch && !(high && rex)
    }

    /// Where the flags should be when the block begins.
    pub(super) fn start(&self, instructions: &[Instruction]) -> Place {
        for ((instruction, class), op) in instructions.iter().zip(&self.classes).zip(&self.block.ops) {
            match class {
                Class::Nothing | Class::Address => {}
                Class::Plain if is_faulting(instruction) || self.has_to_load(op) => return Place::Memory,
                Class::Plain => match usage(instruction) {
                    Use::None => {}
                    Use::Replaces => return Place::Both,
                    Use::Needs { .. } => return Place::Host,
                },
                Class::JumpIf => return Place::Host,
                Class::Jump => return Place::Host,
                _ => return Place::Memory,
            }
        }
        Place::Host
    }
}
