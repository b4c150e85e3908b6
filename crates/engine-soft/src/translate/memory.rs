//! Memory operands: effective address, TLB lookup, and the instruction on the host address.

use std::mem::offset_of;

use iced_x86::{Code, Instruction, MemoryOperand, OpKind, Register};

use super::asm::{Address, Alu, Label, Reg, Rm, Width, cond};
use super::block::Builder;
use super::classes::is_faulting;
use super::flags::{Use, usage};
use super::registers::{GUEST_RSP, T0, T1, home, is_high_byte};
use super::spans::{Member, Which};
use super::stubs::{AddressSource, SitePurpose, SpanLead};
use crate::area::{Layout, gpr_offset, run_offset, user_offset};
use crate::cpu::{gpr, seg};
use crate::interp::decode;
use crate::native::MemoryUse;
use crate::native::classify;
use crate::tlb::{INDEX_BITS, Table};

const PAGE_BYTES: i32 = 4096;

/// An address that a lookup is for.
#[derive(Clone, Copy)]
pub(super) enum Operand<'a> {
    /// The instruction's memory operand.
    Of(&'a Instruction),
    /// RSP plus this.
    Stack(i8),
}

impl Operand<'_> {
    fn source(self) -> AddressSource {
        match self {
            Operand::Of(_) => AddressSource::Operand,
            Operand::Stack(offset) => AddressSource::Stack(offset),
        }
    }

    fn alignment(self) -> u8 {
        match self {
            Operand::Of(instruction) => classify::alignment_of(instruction),
            Operand::Stack(_) => 1,
        }
    }
}

/// The host operand that a lookup leaves: offset in the page plus the page's host address.
pub(super) const FOUND: Address = Address { base: Some(T0), index: Some((T1, 0)), displacement: 0 };

/// Whether an operand is AH, CH, DH or BH.
fn names_high_byte(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|operand| is_high_byte(instruction.op_register(operand)))
}

/// An instruction with a found place for its operand.
pub(super) fn on_host(instruction: &Instruction, found: Address) -> Instruction {
    let mut instruction = *instruction;
    instruction.set_segment_prefix(Register::None);
    instruction.set_memory_displacement64(found.displacement as u64);
    instruction.set_memory_displ_size(u32::from(found.displacement != 0));
    instruction.set_memory_index_scale(1);
    instruction.set_memory_base(Register::R10);
    instruction.set_memory_index(if found.index.is_some() { Register::R11 } else { Register::None });
    instruction
}

impl Builder<'_> {
    /// Whether the effective address is of a form that is computed inline.
    pub fn can_address(&self, instruction: &Instruction) -> bool {
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        let fits = |r: Register| r == Register::None || r.is_gpr64() || r.is_gpr32();
        if self.word == 4 {
            let segment = decode::segment_number(instruction.memory_segment());
            let has_width =
                base != Register::None || index != Register::None || instruction.memory_displ_size() == 4;
            if !self.variant.is_unchecked(segment) || !has_width {
                return false;
            }
        }
        if instruction.is_ip_rel_memory_operand() {
            let offset = instruction.ip_rel_memory_address() as i64;
            return base == Register::RIP && i32::try_from(offset).is_ok();
        }
        fits(base) && fits(index)
    }

    fn address_width(instruction: &Instruction) -> Width {
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        let narrow = base.is_gpr32()
            || index.is_gpr32()
            || base == Register::None && index == Register::None && instruction.memory_displ_size() == 4;
        // A bare 32-bit displacement is sign-extended in 64-bit code unless the address size says otherwise; the decoder
        // gives it as four bytes only then.
        if narrow { Width::W32 } else { Width::W64 }
    }

    /// The effective address of a memory operand, without its segment, into [`T0`], or rather what is so much `below` it.
    /// [`T1`] may be lost, flags are not.
    fn effective_address(&mut self, instruction: &Instruction, below: i32) {
        self.held = None;
        if instruction.is_ip_rel_memory_operand() {
            self.load_rip(T0, instruction.ip_rel_memory_address() as i64 - i64::from(below));
            return;
        }
        let width = Self::address_width(instruction);
        let displacement = instruction.memory_displacement64().wrapping_sub(below as u64);
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        if base == Register::None && index == Register::None {
            match width {
                Width::W32 => self.asm.mov_imm32(T0, displacement as u32),
                _ => self.asm.mov_imm64(T0, displacement),
            }
            return;
        }
        let mut place = |register: Register, scratch: Reg| {
            let number = register.full_register().number();
            home(number).unwrap_or_else(|| {
                self.asm.load(Width::W64, scratch, Rm::Area(gpr_offset(number)));
                scratch
            })
        };
        let base = (base != Register::None).then(|| place(base, T0));
        let scale = instruction.memory_index_scale().trailing_zeros() as u8;
        let index = (index != Register::None).then(|| (place(index, T1), scale));
        let address = Address { base, index, displacement: displacement as i32 };
        match address {
            Address { base: Some(base), index: None, displacement: 0 } if width == Width::W64 => {
                if base != T0 {
                    self.asm.mov(T0, base);
                }
            }
            _ => self.asm.lea(width, T0, address),
        }
    }

    /// LEA.
    pub fn load_address(&mut self, instruction: &Instruction) {
        self.effective_address(instruction, 0);
        let target = instruction.op0_register();
        let number = target.full_register().number();
        match target.size() {
            8 => self.store_guest(number, T0),
            4 => {
                self.asm.load(Width::W32, T0, Rm::Reg(T0));
                self.store_guest(number, T0);
            }
            _ => {
                self.load_guest(T1, number);
                self.asm.store(Width::W16, Rm::Reg(T1), T0);
                self.store_guest(number, T1);
            }
        }
    }

    /// How an access shares a lookup.
    fn member(&self, operand: Operand<'_>) -> Option<Member> {
        let which = match operand {
            Operand::Of(_) => Which::Operand,
            Operand::Stack(_) => Which::Stack,
        };
        self.spans.member(self.current, which)
    }

    /// Whether an access finds what it needs without a comparison, so that the host's flags stay.
    fn is_found(&self, operand: Operand<'_>) -> bool {
        self.member(operand).is_some_and(|member| member.lead.is_none())
    }

    /// Makes sure that the host's flags are not needed if the access takes them.
    fn free_flags_for(&mut self, operand: Operand<'_>) {
        if !self.is_found(operand) {
            self.free_flags();
        }
    }

    /// Finds the host address of an access: that of [`FOUND`], or an offset from [`T0`], then [`T1`] is free. The host's
    /// flags may be lost and have to be free for that. `resume` follows the instruction.
    pub fn access(&mut self, operand: Operand<'_>, len: u8, write: bool, resume: Option<Label>) -> Address {
        let Some(member) = self.member(operand) else {
            self.lookup(operand, len, write, resume);
            return FOUND;
        };
        let host = Rm::Area(run_offset!(spans) + 8 * i32::from(member.span));
        if let Some(lead) = member.lead {
            let access = SpanLead {
                address: operand.source(),
                len,
                write,
                alignment: operand.alignment(),
                offset: member.offset as u16,
                span: lead.len,
                span_write: lead.write,
            };
            self.lookup_span(operand, access);
            self.asm.lea(Width::W64, T0, FOUND);
            self.asm.store(Width::W64, host, T0);
        } else if self.held != Some(member.span) {
            self.asm.load(Width::W64, T0, host);
        }
        self.held = Some(member.span);
        Address::base(T0, member.offset)
    }

    /// Looks an address up; afterwards [`FOUND`] is the operand's host address. The host's flags are lost.
    fn lookup(&mut self, operand: Operand<'_>, len: u8, write: bool, resume: Option<Label>) {
        self.clobber_flags();
        let retry = self.asm.label();
        self.asm.bind(retry);
        self.linear_address(operand, 0);
        let alignment = operand.alignment();
        let purpose = SitePurpose::Access { address: operand.source(), len, write, alignment, retry };
        let slow = self.site(purpose, resume);
        self.look_up_address(u16::from(len), write, slow);
    }

    /// As [`Builder::lookup`], for the first access of a span and the whole of it.
    fn lookup_span(&mut self, operand: Operand<'_>, access: SpanLead) {
        self.clobber_flags();
        let retry = self.asm.label();
        self.asm.bind(retry);
        self.linear_address(operand, i32::from(access.offset));
        let slow = self.site(SitePurpose::Span { access, retry }, None);
        self.look_up_address(access.span, access.span_write, slow);
    }

    /// The linear address that is so much `below` an operand, into [`T0`].
    pub(super) fn linear_address(&mut self, operand: Operand<'_>, below: i32) {
        self.held = None;
        match operand {
            Operand::Of(instruction) => {
                self.effective_address(instruction, below);
                self.add_segment_base(instruction);
            }
            Operand::Stack(offset) => match i32::from(offset) - below {
                0 => self.asm.load(self.wide(), T0, Rm::Reg(GUEST_RSP)),
                offset => self.asm.lea(self.wide(), T0, Address::base(GUEST_RSP, offset)),
            },
        }
    }

    /// Makes an effective address in [`T0`] a linear one. The host's flags may be lost.
    pub(super) fn add_segment_base(&mut self, instruction: &Instruction) {
        let number = match instruction.memory_segment() {
            Register::FS => seg::FS,
            Register::GS => seg::GS,
            _ => return,
        };
        let base = user_offset!(segment_base) + 8 * number as i32;
        self.asm.alu(Alu::Add, self.wide(), T0, Rm::Area(base));
    }

    /// Looks the linear address in [`T0`] up, or goes to `slow`; afterwards [`FOUND`] is the host address.
    pub(super) fn look_up_address(&mut self, len: u16, write: bool, slow: Label) {
        let table = offset_of!(Layout, tlb) + self.variant.privilege() as usize * size_of::<Table>();
        let tags = table + if write { offset_of!(Table, write) } else { offset_of!(Table, read) };
        let hosts = table + offset_of!(Table, host);
        const { assert!(INDEX_BITS == 16, "the index is the page number's low word") };
        self.asm.rorx(T1, T0, 12);
        self.asm.movzx16(T1, Rm::Reg(T1));
        self.asm.alu(Alu::Xor, Width::W64, T0, Rm::AreaIndex(T1, 3, tags as i32));
        // What is left is the offset in the page, if it is that page; the operand must not reach beyond it.
        self.asm.alu_imm(Alu::Cmp, Width::W64, Rm::Reg(T0), PAGE_BYTES - i32::from(len));
        self.asm.jcc(cond::A, slow);
        self.asm.load(Width::W64, T1, Rm::AreaIndex(T1, 3, hosts as i32));
    }

    /// An instruction with a memory operand.
    pub fn memory(&mut self, instruction: &Instruction, memory: MemoryUse) {
        self.load_classes();
        let usage = usage(instruction);
        let write = memory != MemoryUse::Read;
        let (_, bytes) = classify::memory_use_of(instruction);
        let resume = self.asm.label();
        let operand = Operand::Of(instruction);
        if is_faulting(instruction) {
            self.free_flags_before_fault(usage);
        } else {
            self.free_flags_for(operand);
        }
        let place = self.access(operand, bytes as u8, write, Some(resume));

        let in_memory = (0..instruction.op_count()).any(|i| {
            let register = instruction.op_register(i);
            instruction.op_kind(i) == OpKind::Register
                && register.is_gpr()
                && home(register.full_register().number()).is_none()
        });
        let needs_flags = matches!(usage, Use::Needs { .. });
        let high_byte = names_high_byte(instruction);
        // The second scratch register may be wanted for something else.
        let place = if in_memory || needs_flags || high_byte { self.one_register(place) } else { place };
        let found = on_host(instruction, place);
        if needs_flags {
            self.restore_flags();
        }
        if is_faulting(instruction) {
            self.fault_exit(&found, &[T1]);
        } else if high_byte {
            self.high_byte(&found);
        } else {
            self.native(&found, &[T1]);
        }
        self.asm.bind(resume);
        self.note_flags(usage);
    }

    /// An instruction on a found place and a high byte, which cannot be named where an address needs a REX prefix: the
    /// address borrows RSI, which no such instruction uses.
    fn high_byte(&mut self, found: &Instruction) {
        const BORROWED: Reg = Reg::RSI;
        let kept = Rm::Area(run_offset!(temporary));
        self.asm.store(Width::W64, kept, BORROWED);
        self.asm.mov(BORROWED, T0);
        let mut found = *found;
        found.set_memory_base(Register::RSI);
        self.encode(&found);
        self.asm.load(Width::W64, BORROWED, kept);
    }

    /// Makes a found place one that [`T1`] is not needed for.
    pub fn one_register(&mut self, found: Address) -> Address {
        if found.index.is_none() {
            return found;
        }
        self.asm.lea(Width::W64, T0, found);
        Address::base(T0, 0)
    }

    /// Loads an address, or what was pushed, from a found place.
    pub fn load_found(&mut self, to: Reg, found: Address) {
        self.asm.load(self.wide(), to, Rm::Memory(found));
        if to == T0 {
            self.held = None;
        }
    }

    // ---- the stack ------------------------------------------------------------------------------------------------

    /// PUSH.
    pub fn push(&mut self, instruction: &Instruction) {
        let resume = self.asm.label();
        let stack = Operand::Stack(-(self.word as i8));
        let from_memory = instruction.op0_kind() == OpKind::Memory;
        if from_memory {
            self.free_flags();
            let found = self.access(Operand::Of(instruction), self.word, false, Some(resume));
            self.load_found(T0, found);
            self.asm.store(Width::W64, Rm::Area(run_offset!(temporary)), T0);
        }
        self.free_flags_for(stack);
        let found = self.access(stack, self.word, true, Some(resume));
        let wide = self.wide();
        match instruction.op0_kind() {
            OpKind::Register => {
                let number = instruction.op0_register().full_register().number();
                match home(number) {
                    Some(host) => self.asm.store(wide, Rm::Memory(found), host),
                    None => self.store_word(found, gpr_offset(number)),
                }
            }
            OpKind::Memory => self.store_word(found, run_offset!(temporary)),
            _ => self.asm.store_imm(wide, Rm::Memory(found), instruction.immediate(0) as i32),
        }
        self.move_stack(-i32::from(self.word));
        self.asm.bind(resume);
        if from_memory {
            self.held = None;
        }
    }

    /// Stores a word of the area to a found place.
    fn store_word(&mut self, found: Address, word: i32) {
        let place = self.one_register(found);
        self.asm.load(Width::W64, T1, Rm::Area(word));
        self.asm.store(self.wide(), Rm::Memory(place), T1);
    }

    /// POP to a register.
    pub fn pop(&mut self, instruction: &Instruction) {
        let resume = self.asm.label();
        let stack = Operand::Stack(0);
        self.free_flags_for(stack);
        let found = self.access(stack, self.word, false, Some(resume));
        let number = instruction.op0_register().full_register().number();
        match home(number) {
            Some(host) => self.load_found(host, found),
            None => {
                self.load_found(T1, found);
                self.store_guest(number, T1);
            }
        }
        if number != gpr::RSP {
            self.move_stack(i32::from(self.word));
        }
        self.asm.bind(resume);
    }

    /// LEAVE.
    pub fn leave(&mut self) {
        let resume = self.asm.label();
        // The frame that RBP points to, as an operand like any other.
        let (code, base) = match self.word {
            8 => (Code::Mov_r64_rm64, Register::RBP),
            _ => (Code::Mov_r32_rm32, Register::EBP),
        };
        let Ok(frame) = Instruction::with2(code, base, MemoryOperand::with_base(base)) else {
            self.refused = true;
            return;
        };
        let frame = Operand::Of(&frame);
        self.free_flags_for(frame);
        let found = self.access(frame, self.word, false, Some(resume));
        self.asm.lea(self.wide(), GUEST_RSP, Address::base(Reg::RBP, i32::from(self.word)));
        self.load_found(Reg::RBP, found);
        self.asm.bind(resume);
    }

    /// Adds to RSP without touching flags.
    pub fn move_stack(&mut self, by: i32) {
        self.asm.lea(self.wide(), GUEST_RSP, Address::base(GUEST_RSP, by));
    }
}
