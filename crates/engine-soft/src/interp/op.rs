//! The decoded form of one guest instruction: a handler and its operands, ready to run.

use x86::{Exception, Vector};

use crate::cpu::{Cpu, R, Raised, seg};
use crate::interp::alu::Int;
use crate::mmu::Access;
use crate::user::UserRegs;

/// What the run loop does after an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// The next instruction of the block.
    Next,
    /// The block is over; [`Cpu::next_ip`] says where to go.
    End,
}

/// Executes one instruction. On an error nothing architectural may have changed, except as the instruction defines.
pub type Handler = fn(&mut Cpu, &Op) -> R<Flow>;

/// Register index in [`Op::base`] and [`Op::index`] for the address of the current instruction.
pub const BASE_RIP: u8 = 16;
/// Register index that reads as zero.
pub const BASE_NONE: u8 = 17;

/// Set in [`Op::reg`] or [`Op::rm`] for AH, CH, DH and BH; the low bits name the register.
pub const HIGH_BYTE: u8 = 16;

/// One decoded instruction.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Op {
    /// What it does.
    pub run: Handler,
    /// Immediate operand, sign-extended; branch target relative to the next instruction; or a pointer that the handler knows.
    pub imm: u64,
    /// Displacement of the memory operand.
    pub disp: u64,
    /// Mask of the effective address.
    pub address_mask: u64,
    /// Base register of the memory operand.
    pub base: u8,
    /// Index register.
    pub index: u8,
    /// log2 of the index scale.
    pub scale: u8,
    /// Segment register of the memory operand; SS for instructions that only touch the stack.
    pub segment: u8,
    /// First operand if a register.
    pub reg: u8,
    /// Second operand if a register.
    pub rm: u8,
    /// Length in bytes.
    pub len: u8,
    /// Handler's choice: condition code, operand size in bytes, operation.
    pub aux: u8,
    /// Handler's choice: bytes of the memory operand of a native instruction, flags.
    pub extra: u32,
    /// Class bits that must not be in [`Cpu::disabled`].
    pub class: u8,
    /// Operand size in bytes.
    pub size: u8,
}

impl Op {
    /// Effective address: offset within the segment.
    #[inline(always)]
    pub fn offset(&self, user: &UserRegs) -> u64 {
        let registers = user.gpr.as_ptr();
        // SAFETY: `rip` and `zero` follow the sixteen registers in the fixed layout of UserRegs, and the decoder makes
        // no index above BASE_NONE.
        let (base, index) =
            unsafe { (*registers.add(usize::from(self.base)), *registers.add(usize::from(self.index))) };
        base.wrapping_add(index << self.scale).wrapping_add(self.disp) & self.address_mask
    }
}

impl Cpu {
    /// Value of a register operand.
    #[inline(always)]
    pub fn reg<T: Int>(&self, reg: u8) -> T {
        if T::BYTES == 1 && reg >= HIGH_BYTE {
            T::from_u64(self.user.gpr[usize::from(reg & 3)] >> 8)
        } else {
            T::from_u64(self.user.gpr[usize::from(reg & 15)])
        }
    }

    /// Writes a register operand: 32-bit results clear the upper half, narrower ones leave the rest.
    #[inline(always)]
    pub fn set_reg<T: Int>(&mut self, reg: u8, value: T) {
        let value = value.zext();
        match T::BYTES {
            1 if reg >= HIGH_BYTE => {
                let r = &mut self.user.gpr[usize::from(reg & 3)];
                *r = *r & !0xff00 | value << 8;
            }
            1 => {
                let r = &mut self.user.gpr[usize::from(reg & 15)];
                *r = *r & !0xff | value;
            }
            2 => {
                let r = &mut self.user.gpr[usize::from(reg & 15)];
                *r = *r & !0xffff | value;
            }
            _ => self.user.gpr[usize::from(reg & 15)] = value,
        }
    }

    /// Linear address of the memory operand, with the segment checks of legacy modes.
    #[inline(always)]
    pub fn address(&mut self, op: &Op, len: u32, access: Access) -> R<u64> {
        let offset = op.offset(&self.user);
        self.linear(op.segment, offset, len, access)
    }

    /// Linear address of an offset in a segment.
    #[inline(always)]
    pub fn linear(&mut self, segment: u8, offset: u64, len: u32, access: Access) -> R<u64> {
        let linear = self.user.segment_base[usize::from(segment)].wrapping_add(offset);
        if self.alignment_check {
            self.check_alignment(linear, len)?;
        }
        if self.code_bits == 64 {
            return Ok(linear);
        }
        if self.unchecked_segments >> segment & 1 != 0 && offset <= u64::from(u32::MAX) - u64::from(len - 1) {
            return Ok(linear & 0xffff_ffff);
        }
        self.check_segment(segment, offset, len, access)?;
        Ok(linear & 0xffff_ffff)
    }

    /// #AC for an integer or floating-point operand that is not a multiple of its size (SDM 3A §6.15, "Alignment Check").
    #[cold]
    fn check_alignment(&mut self, linear: u64, len: u32) -> R<()> {
        if len.is_power_of_two() && len <= 8 && linear & u64::from(len - 1) != 0 {
            return Err(self.raise(Exception::with_code(Vector::AlignmentCheck, 0)));
        }
        Ok(())
    }

    /// Loads the memory operand.
    #[inline(always)]
    pub fn load<T: Int>(&mut self, op: &Op) -> R<T> {
        let address = self.address(op, T::BYTES, Access::Read)?;
        self.read(address)
    }

    /// Stores the memory operand.
    #[inline(always)]
    pub fn store<T: Int>(&mut self, op: &Op, value: T) -> R<()> {
        let address = self.address(op, T::BYTES, Access::Write)?;
        self.write(address, value)
    }

    /// Pushes a value of its own width.
    #[inline(always)]
    pub fn push<T: Int>(&mut self, value: T) -> R<()> {
        use crate::cpu::gpr::RSP;
        let rsp = self.user.gpr[RSP].wrapping_sub(u64::from(T::BYTES));
        let offset = rsp & self.stack_mask;
        let address = self.linear(seg::SS as u8, offset, T::BYTES, Access::Write)?;
        if let Err(raised) = self.write(address, value) {
            return Err(self.on_stack(raised));
        }
        self.set_stack_pointer(rsp);
        Ok(())
    }

    /// A non-canonical stack address is #SS, not #GP.
    #[cold]
    pub(crate) fn on_stack(&mut self, raised: Raised) -> Raised {
        if self.fault_noncanonical {
            return self.raise(Exception::with_code(Vector::StackFault, 0));
        }
        raised
    }

    /// Reads the top of the stack without popping it.
    #[inline(always)]
    pub fn peek<T: Int>(&mut self, skip: u64) -> R<T> {
        use crate::cpu::gpr::RSP;
        let offset = self.user.gpr[RSP].wrapping_add(skip) & self.stack_mask;
        let address = self.linear(seg::SS as u8, offset, T::BYTES, Access::Read)?;
        self.read(address).map_err(|raised| self.on_stack(raised))
    }

    /// Moves the stack pointer up by `bytes`.
    #[inline(always)]
    pub fn drop_stack(&mut self, bytes: u64) {
        use crate::cpu::gpr::RSP;
        self.set_stack_pointer(self.user.gpr[RSP].wrapping_add(bytes));
    }

    /// Sets the part of RSP that the stack's width covers.
    #[inline(always)]
    pub fn set_stack_pointer(&mut self, value: u64) {
        use crate::cpu::gpr::RSP;
        let mask = self.stack_mask;
        let old = self.user.gpr[RSP];
        self.user.gpr[RSP] = match mask {
            u64::MAX => value,
            0xffff => old & !0xffff | value & 0xffff,
            _ => value & mask,
        };
    }

    /// Branches to an offset in CS, truncated to the operand size.
    #[inline(always)]
    pub fn jump(&mut self, target: u64, operand_size: u8) -> R<Flow> {
        let target = match operand_size {
            8 => target,
            4 => target & 0xffff_ffff,
            _ => target & 0xffff,
        };
        if self.code_bits == 64 {
            if !Cpu::is_canonical(target) {
                return self.gp0();
            }
        } else if target > u64::from(self.segments[seg::CS].limit) {
            return self.gp0();
        }
        self.next_ip = target;
        Ok(Flow::End)
    }
}
