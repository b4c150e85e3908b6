//! Where the guest's status flags are at each point of a block.
//!
//! They are in the host's flags after an instruction that sets them, until something of ours needs the host's flags (a TLB
//! lookup compares). Before that they are saved to memory, or, if the instruction that set them can be repeated as long as
//! anybody may ask for them, nothing is saved: they are made again where they are asked for, mostly in a cold stub. So at
//! every place where a block can be left, for a fault or an interrupt, they are exact.

use iced_x86::{Code, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register, RflagsBits};

use super::registers::{home, is_high_byte};

/// OF, SF, ZF, AF, CF, PF.
const STATUS: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// Where the flags are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the host's flags only.
    Host,
    /// In memory only.
    Memory,
    /// In both.
    Both,
    /// In neither: the last instruction that set them is repeated ([`Recipe`]).
    Repeat,
}

/// How the flags that an instruction has set are made again.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    /// An instruction that sets the same flags and changes nothing else.
    pub instruction: Instruction,
    /// The general registers that it reads, a bit each.
    pub reads: u16,
}

impl Recipe {
    /// For an instruction that has just been executed, if there is one.
    pub fn of(instruction: &Instruction) -> Option<Recipe> {
        use Mnemonic::*;
        let is_register = |i| {
            let register = instruction.op_register(i);
            instruction.op_kind(i) == OpKind::Register && register.is_gpr() && !is_high_byte(register)
        };
        let repeated = match instruction.mnemonic() {
            Cmp | Test if is_register(0) && instruction.op1_kind() != OpKind::Memory => {
                if instruction.op1_kind() == OpKind::Register && !is_register(1) {
                    return None;
                }
                *instruction
            }
            // What these set depends on the result alone.
            And | Or | Xor if is_register(0) && !instruction.has_lock_prefix() => {
                let result = instruction.op0_register();
                let code = match result.size() {
                    1 => Code::Test_rm8_r8,
                    2 => Code::Test_rm16_r16,
                    4 => Code::Test_rm32_r32,
                    _ => Code::Test_rm64_r64,
                };
                Instruction::with2(code, result, result).ok()?
            }
            _ => return None,
        };
        let registers = (0..repeated.op_count())
            .filter(|i| repeated.op_kind(*i) == OpKind::Register)
            .map(|i| repeated.op_register(i).full_register().number());
        let (mut reads, mut in_memory) = (0u16, 0u16);
        for number in registers {
            reads |= 1 << number;
            if home(number).is_none() {
                in_memory |= 1 << number;
            }
        }
        // There is one scratch register to hold such a one.
        (in_memory.count_ones() <= 1).then_some(Recipe { instruction: repeated, reads })
    }
}

/// The general registers that an instruction changes, a bit each.
pub fn written_registers(info: &mut InstructionInfoFactory, instruction: &Instruction) -> u16 {
    info.info(instruction)
        .used_registers()
        .iter()
        .filter(|used| used.register().is_gpr())
        .filter(|used| !matches!(used.access(), OpAccess::Read | OpAccess::CondRead))
        .fold(0, |bits, used| bits | 1 << (Register::full_register(used.register()).number() & 15))
}

/// What an instruction does with the status flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Nothing.
    None,
    /// Replaces all, whatever they were.
    Replaces,
    /// Needs the old ones: it reads some, or leaves some as they were.
    Needs {
        /// And changes some.
        changes: bool,
    },
}

/// What an instruction does with the status flags.
pub fn usage(instruction: &Instruction) -> Use {
    let modified = instruction.rflags_modified() & STATUS;
    let read = instruction.rflags_read() & STATUS;
    if modified == 0 && read == 0 {
        return Use::None;
    }
    if read == 0 && modified == STATUS && !may_leave_flags(instruction) {
        return Use::Replaces;
    }
    Use::Needs { changes: modified != 0 }
}

/// Shifts that leave the flags alone if the count is zero, and instructions that leave flags undefined, which on some
/// processors means unchanged.
fn may_leave_flags(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    match instruction.mnemonic() {
        Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd => {
            let last = instruction.op_count() - 1;
            !matches!(instruction.op_kind(last), OpKind::Immediate8) || instruction.immediate8() & 0x1f == 0
        }
        Bsf | Bsr | Div | Idiv | Mul | Imul => true,
        _ => false,
    }
}
