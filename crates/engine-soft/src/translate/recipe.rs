//! How the status flags that an instruction has set can be made again from registers.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::asm::{Alu, Asm, Reg, Rm, Width};
use super::registers::{T1, home, is_high_byte};
use crate::area::gpr_offset;

/// What is done to make them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    /// CMP.
    Compare,
    /// TEST.
    Test,
    /// TEST of the first operand with itself: it is the result of a logical operation.
    Logic,
    /// ADD, whose result the first operand is.
    Add,
    /// SUB, likewise.
    Subtract,
}

/// The second operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Second {
    Register(usize),
    Immediate(i32),
    None,
}

/// How the flags of an instruction are made again, without changing a guest register.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    operation: Operation,
    width: Width,
    /// The first operand, a guest register.
    first: usize,
    second: Second,
}

impl Recipe {
    /// For an instruction that has just been executed, if there is one.
    pub fn of(instruction: &Instruction) -> Option<Recipe> {
        use Mnemonic::*;
        let first = register(instruction, 0)?;
        let second = || second_operand(instruction);
        let (operation, second) = match instruction.mnemonic() {
            Cmp => (Operation::Compare, second()?),
            Test => (Operation::Test, second()?),
            // What these set depends on the result alone.
            And | Or | Xor => (Operation::Logic, Second::None),
            // A register added to itself is not to be had from the sum; subtracted from itself it is zero like any other.
            Add if second()? != Second::Register(first) => (Operation::Add, second()?),
            Sub => (Operation::Subtract, second()?),
            _ => return None,
        };
        let width = match instruction.op0_register().size() {
            1 => Width::W8,
            2 => Width::W16,
            4 => Width::W32,
            _ => Width::W64,
        };
        Some(Recipe { operation, width, first, second })
    }

    /// The general registers that it reads, a bit each.
    pub fn reads(&self) -> u16 {
        let second = if let Second::Register(number) = self.second { 1 << number } else { 0 };
        1 << self.first | second
    }

    /// Makes the flags again, in the host's. [`T1`] is lost.
    pub fn repeat(&self, asm: &mut Asm) {
        let first = match home(self.first) {
            Some(host) if self.undo().is_none() => host,
            Some(host) => {
                asm.mov(T1, host);
                T1
            }
            None => {
                asm.load(Width::W64, T1, Rm::Area(gpr_offset(self.first)));
                T1
            }
        };
        if let Some(undo) = self.undo() {
            self.alu(asm, undo, Width::W64, first);
        }
        match (self.operation, self.second) {
            (Operation::Compare | Operation::Subtract, _) => self.alu(asm, Alu::Cmp, self.width, first),
            (Operation::Add, _) => self.alu(asm, Alu::Add, self.width, first),
            (Operation::Test, Second::Immediate(value)) => asm.test_imm(self.width, first, value),
            (Operation::Test, Second::Register(number)) => asm.test(self.width, place(number), first),
            _ => asm.test(self.width, Rm::Reg(first), first),
        }
    }

    /// What turns the first operand into what it was before the instruction.
    fn undo(&self) -> Option<Alu> {
        match self.operation {
            Operation::Add => Some(Alu::Sub),
            Operation::Subtract => Some(Alu::Add),
            _ => None,
        }
    }

    fn alu(&self, asm: &mut Asm, operation: Alu, width: Width, first: Reg) {
        match self.second {
            Second::Register(number) => asm.alu(operation, width, first, place(number)),
            Second::Immediate(value) => asm.alu_imm(operation, width, Rm::Reg(first), value),
            Second::None => {}
        }
    }
}

/// Where a guest register is.
fn place(number: usize) -> Rm {
    home(number).map_or(Rm::Area(gpr_offset(number)), Rm::Reg)
}

/// The number of a register operand that names the register's low part.
fn register(instruction: &Instruction, operand: u32) -> Option<usize> {
    let register = instruction.op_register(operand);
    let is_low =
        instruction.op_kind(operand) == OpKind::Register && register.is_gpr() && !is_high_byte(register);
    is_low.then(|| register.full_register().number())
}

fn second_operand(instruction: &Instruction) -> Option<Second> {
    match instruction.op1_kind() {
        OpKind::Register => register(instruction, 1).map(Second::Register),
        OpKind::Memory => None,
        _ => i32::try_from(signed_immediate(instruction)).ok().map(Second::Immediate),
    }
}

/// The immediate of the second operand, sign-extended from the width of the operation.
fn signed_immediate(instruction: &Instruction) -> i64 {
    let value = instruction.immediate(1);
    match instruction.op1_kind() {
        OpKind::Immediate8 => i64::from(value as i8),
        OpKind::Immediate16 => i64::from(value as i16),
        OpKind::Immediate32 => i64::from(value as i32),
        _ => value as i64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Code, Register};

    fn recipe(code: Code, first: Register, second: Register) -> Option<Recipe> {
        Recipe::of(&Instruction::with2(code, first, second).unwrap())
    }

    #[test]
    fn what_is_lost_has_no_recipe() {
        assert!(recipe(Code::Add_rm64_r64, Register::RAX, Register::RBX).is_some());
        assert!(recipe(Code::Add_rm64_r64, Register::RAX, Register::RAX).is_none());
        assert!(recipe(Code::Sub_rm64_r64, Register::RAX, Register::RAX).is_some());
        assert!(recipe(Code::Cmp_rm8_r8, Register::AH, Register::BL).is_none());
        assert!(recipe(Code::Adc_rm64_r64, Register::RAX, Register::RBX).is_none());
    }

    #[test]
    fn it_reads_its_operands() {
        let recipe = recipe(Code::Cmp_rm32_r32, Register::ECX, Register::R10D).unwrap();
        assert_eq!(recipe.reads(), 1 << 1 | 1 << 10);
    }
}
