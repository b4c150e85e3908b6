//! Loads and stores of the elements that a mask chooses: gathers, VMASKMOV and VPMASKMOV (SDM 2, under these names).
//!
//! A gather finds and loads one element after the other. That needs vector registers, and none is free: it takes the
//! destination for the low half of the result and the mask, which is zero in the end, for the high half. What they held before
//! is kept meanwhile in their places in the area, which mean nothing while the registers are in the host's; so is the index.
//! An element whose page is not in the TLB restores both, and the interpreter executes the instruction from its beginning.
//!
//! A masked move is executed on its host address if that of the whole operand is in the TLB: no element can fault then. Else
//! it is the interpreter's, which looks only at those that are accessed.

use iced_x86::{Code, EncodingKind, IcedError, Instruction, MemoryOperand, Register};

use super::asm::{Address, Alu, Label, Rm, Width, cond};
use super::block::Builder;
use super::memory::{FOUND, Operand, on_host};
use super::registers::{T0, T1, home};
use super::stubs::SitePurpose;
use crate::area::{gpr_offset, user_offset};
use crate::native::MemoryUse;
use crate::native::classify;

/// Bytes of half a vector register.
const HALF_BYTES: usize = 16;
const REGISTER_BYTES: i32 = 32;

/// Where a vector register's value is in the area.
fn place(register: Register) -> i32 {
    user_offset!(vector) + REGISTER_BYTES * register.number() as i32
}

/// As a 16-byte register.
fn low_half(register: Register) -> Register {
    Register::XMM0 + register.number() as u32
}

/// What a gather loads, and where from.
#[derive(Clone, Copy)]
struct Gather<'a> {
    instruction: &'a Instruction,
    destination: Register,
    mask: Register,
    index: Register,
    index_bytes: usize,
    element_bytes: usize,
    elements: usize,
}

impl<'a> Gather<'a> {
    fn new(instruction: &'a Instruction) -> Self {
        let (destination, index) = (instruction.op0_register(), instruction.memory_index());
        let index_bytes = if instruction.is_vsib32() { 4 } else { 8 };
        let element_bytes = instruction.memory_size().size();
        Gather {
            instruction,
            destination,
            mask: instruction.op2_register(),
            index,
            index_bytes,
            element_bytes,
            elements: (destination.size() / element_bytes).min(index.size() / index_bytes),
        }
    }

    /// Whether its address is one of 64 bits.
    fn is_wide(&self) -> bool {
        let base = self.instruction.memory_base();
        base.is_gpr64() || base == Register::None && self.instruction.memory_displ_size() == 8
    }

    /// Whether the result has a high half.
    fn has_high_half(&self) -> bool {
        self.elements * self.element_bytes > HALF_BYTES
    }

    /// The register that an element is loaded into, and its number there.
    fn target(&self, element: usize) -> (Register, usize) {
        let in_half = HALF_BYTES / self.element_bytes;
        let register = if element < in_half { self.destination } else { self.mask };
        (low_half(register), element % in_half)
    }

    /// The signs of the mask's elements into a general register.
    fn signs(&self, to: Register) -> Result<Instruction, IcedError> {
        let code = match (self.element_bytes, self.mask.is_ymm()) {
            (4, false) => Code::VEX_Vmovmskps_r32_xmm,
            (4, true) => Code::VEX_Vmovmskps_r32_ymm,
            (_, false) => Code::VEX_Vmovmskpd_r32_xmm,
            (_, true) => Code::VEX_Vmovmskpd_r32_ymm,
        };
        Instruction::with2(code, to, self.mask)
    }

    /// Prepares the halves for elements: what is not an element becomes zero.
    fn split(&self) -> Result<Instruction, IcedError> {
        let low = low_half(self.destination);
        if self.has_high_half() {
            return Instruction::with3(
                Code::VEX_Vextractf128_xmmm128_ymm_imm8,
                low_half(self.mask),
                self.destination,
                1,
            );
        }
        let whole = self.elements * self.element_bytes == HALF_BYTES;
        let code = if whole { Code::VEX_Vmovaps_xmm_xmmm128 } else { Code::VEX_Vmovq_xmm_xmmm64 };
        Instruction::with2(code, low, low)
    }

    /// The element at [`FOUND`] into its register.
    fn load(&self, element: usize) -> Result<Instruction, IcedError> {
        let (register, number) = self.target(element);
        let code = match self.element_bytes {
            4 => Code::VEX_Vpinsrd_xmm_xmm_rm32_imm8,
            _ => Code::VEX_Vpinsrq_xmm_xmm_rm64_imm8,
        };
        let found = MemoryOperand::with_base_index(Register::R10, Register::R11);
        Instruction::with4(code, register, register, found, number as i32)
    }

    /// Puts the halves together.
    fn join(&self) -> Result<Instruction, IcedError> {
        let code = Code::VEX_Vinsertf128_ymm_ymm_xmmm128_imm8;
        Instruction::with4(code, self.destination, self.destination, low_half(self.mask), 1)
    }

    /// The mask becomes zero.
    fn clear_mask(&self) -> Result<Instruction, IcedError> {
        let mask = low_half(self.mask);
        Instruction::with3(Code::VEX_Vpxor_xmm_xmm_xmmm128, mask, mask, mask)
    }
}

/// Which elements a gather loads.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Elements {
    All,
    /// Those whose sign is set in the mask.
    Chosen,
}

impl Builder<'_> {
    /// Whether an instruction is a gather whose addresses are computed inline.
    pub fn can_gather(&self, instruction: &Instruction) -> bool {
        let has_mask_register = instruction.op_code().encoding() == EncodingKind::VEX;
        self.word == 8 && instruction.is_vsib() && has_mask_register && Gather::new(instruction).is_wide()
    }

    /// A gather.
    pub fn gather(&mut self, instruction: &Instruction) {
        self.load_classes();
        self.free_flags();
        self.clobber_flags();
        self.held = None;
        let gather = Gather::new(instruction);
        let (all, missed, done) = (self.asm.label(), self.asm.label(), self.asm.label());
        let slow = self.site(SitePurpose::Interpret, Some(done));
        for register in [gather.destination, gather.mask, gather.index] {
            self.asm.store_ymm(register.number() as u8, place(register));
        }
        self.jump_if_all(gather, all);
        self.gather_elements(gather, Elements::Chosen, missed);
        self.asm.jmp(done);
        self.asm.bind(missed);
        for register in [gather.destination, gather.mask] {
            self.asm.load_ymm(register.number() as u8, place(register));
        }
        self.asm.jmp(slow);
        self.asm.bind(all);
        self.gather_elements(gather, Elements::All, missed);
        self.asm.bind(done);
    }

    /// Goes to a label if the mask chooses every element.
    fn jump_if_all(&mut self, gather: Gather<'_>, all: Label) {
        let every = (1 << gather.elements) - 1;
        self.encode_made(gather.signs(Register::R10D));
        self.asm.alu_imm(Alu::And, Width::W32, Rm::Reg(T0), every);
        self.asm.alu_imm(Alu::Cmp, Width::W32, Rm::Reg(T0), every);
        self.asm.jcc(cond::E, all);
    }

    /// Loads elements, or goes to `missed` with destination and mask changed.
    fn gather_elements(&mut self, gather: Gather<'_>, elements: Elements, missed: Label) {
        self.encode_made(gather.split());
        for element in 0..gather.elements {
            let skip = self.asm.label();
            if elements == Elements::Chosen {
                let high_word = place(gather.mask) + ((element + 1) * gather.element_bytes) as i32 - 4;
                self.asm.alu_imm(Alu::Cmp, Width::W32, Rm::Area(high_word), 0);
                self.asm.jcc(cond::NS, skip);
            }
            self.element_address(gather, element);
            self.look_up_address(gather.element_bytes as u16, false, missed);
            self.encode_made(gather.load(element));
            self.asm.bind(skip);
        }
        if gather.has_high_half() {
            self.encode_made(gather.join());
        }
        self.encode_made(gather.clear_mask());
    }

    /// The linear address of an element into [`T0`].
    fn element_address(&mut self, gather: Gather<'_>, element: usize) {
        let index = Rm::Area(place(gather.index) + (element * gather.index_bytes) as i32);
        match gather.index_bytes {
            4 => self.asm.movsxd(T0, index),
            _ => self.asm.load(Width::W64, T0, index),
        }
        let instruction = gather.instruction;
        let base = (instruction.memory_base() != Register::None).then(|| {
            let number = instruction.memory_base().number();
            home(number).unwrap_or_else(|| {
                self.asm.load(Width::W64, T1, Rm::Area(gpr_offset(number)));
                T1
            })
        });
        let scale = instruction.memory_index_scale().trailing_zeros() as u8;
        let displacement = instruction.memory_displacement64() as i32;
        self.asm.lea(Width::W64, T0, Address { base, index: Some((T0, scale)), displacement });
        self.add_segment_base(instruction);
    }

    /// VMASKMOV and VPMASKMOV.
    pub fn masked_move(&mut self, instruction: &Instruction) {
        self.load_classes();
        self.free_flags();
        self.clobber_flags();
        let done = self.asm.label();
        let slow = self.site(SitePurpose::Interpret, Some(done));
        let (usage, bytes) = classify::memory_use_of(instruction);
        self.linear_address(Operand::Of(instruction), 0);
        self.look_up_address(bytes, usage != MemoryUse::Read, slow);
        self.encode(&on_host(instruction, FOUND));
        self.asm.bind(done);
    }

    /// Encodes one of the translator's own instructions.
    fn encode_made(&mut self, made: Result<Instruction, IcedError>) {
        match made {
            Ok(instruction) => self.encode(&instruction),
            Err(_) => self.refused = true,
        }
    }
}
