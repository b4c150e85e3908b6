//! Which memory accesses of a block share a lookup.
//!
//! Accesses whose addresses differ by constants only (fields of one structure, the slots of one stack frame) mostly lie in
//! one page. The first of them looks up the whole *span* from the lowest byte to the highest, for loads or, if one of
//! them stores, for stores; the others use the host address that it found. Where the span is not in one page, or may not be
//! stored to, the block goes on in a translation without spans.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::block::Builder;
use super::classes::Class;
use crate::cpu::gpr;
use crate::native::MemoryUse;
use crate::native::classify;

/// Longest span in bytes. The longer, the more often it does not lie in one page.
pub(super) const MAX_SPAN: i64 = 512;
/// Largest displacement (absolute) of an operand in a span: that of the span's first byte has to be one too.
const MAX_DISPLACEMENT: u64 = (i32::MAX as i64 - MAX_SPAN) as u64;
/// Spans in a block: each has a word in [`crate::area::RunState::spans`].
pub const MAX_SPANS: usize = 8;

/// Which of an instruction's two accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Which {
    /// Through its memory operand, or the frame of LEAVE.
    Operand,
    /// Through RSP.
    Stack,
}

/// An access that shares a lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Member {
    /// Number of the span.
    pub span: u8,
    /// Where the access begins, from the span's first byte.
    pub offset: i32,
    /// It is the first: it looks up.
    pub lead: Option<Lead>,
}

/// What the first access of a span looks up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lead {
    /// Bytes from the span's first to its last.
    pub len: u16,
    /// One of the accesses stores.
    pub write: bool,
}

/// Which accesses of a block share lookups.
#[derive(Default)]
pub(super) struct Spans(Vec<[Option<Member>; 2]>);

impl Spans {
    /// How an access of the instruction with this number shares a lookup, if it does.
    pub fn member(&self, instruction: usize, which: Which) -> Option<Member> {
        self.0.get(instruction)?[which as usize]
    }
}

/// What is known of a register: some unknown value plus a constant.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Value {
    unknown: u32,
    plus: i64,
}

/// What addresses have in common that differ by constants only.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Key {
    segment: Register,
    base: u32,
    index: u32,
    scale: u32,
}

/// In [`Key`]: no register.
const NONE: u32 = 0;
/// In [`Key`]: the page of the code.
const RIP: u32 = 1;
/// The first number of an unknown value.
const FIRST_UNKNOWN: u32 = 2;

/// An access as it was found.
struct Access {
    instruction: usize,
    which: Which,
    /// Offset from what its key stands for.
    at: i64,
}

/// A span that may still grow.
struct Growing {
    key: Key,
    low: i64,
    high: i64,
    write: bool,
    accesses: Vec<Access>,
}

/// Goes through a block, following what is known of its registers.
struct Finder {
    registers: [Value; 16],
    unknowns: u32,
    growing: Vec<Growing>,
    grown: Vec<Growing>,
}

impl Finder {
    fn new() -> Self {
        let mut finder = Finder {
            registers: [Value { unknown: NONE, plus: 0 }; 16],
            unknowns: FIRST_UNKNOWN,
            growing: Vec::new(),
            grown: Vec::new(),
        };
        finder.forget_everything();
        finder
    }

    /// Nothing is known any more, not even what pages are mapped.
    fn forget_everything(&mut self) {
        for register in 0..16 {
            self.forget(register);
        }
        self.grown.append(&mut self.growing);
    }

    fn forget(&mut self, register: usize) {
        self.registers[register] = Value { unknown: self.unknowns, plus: 0 };
        self.unknowns += 1;
    }

    fn add(&mut self, register: usize, more: i64) {
        let plus = &mut self.registers[register].plus;
        *plus = plus.wrapping_add(more);
    }

    fn value(&self, register: Register) -> Value {
        match register {
            Register::None => Value { unknown: NONE, plus: 0 },
            _ => self.registers[register.number()],
        }
    }

    /// An address as what it has in common with others, and an offset. `None` unless it is one of 64 bits.
    fn address(&self, instruction: &Instruction) -> Option<(Key, i64)> {
        let segment = match instruction.memory_segment() {
            segment @ (Register::FS | Register::GS) => segment,
            _ => Register::None,
        };
        if instruction.is_ip_rel_memory_operand() {
            let key = Key { segment, base: RIP, index: NONE, scale: 1 };
            let at = instruction.ip_rel_memory_address() as i64;
            return (at.unsigned_abs() <= MAX_DISPLACEMENT).then_some((key, at));
        }
        let displacement = instruction.memory_displacement64() as i64;
        if displacement.unsigned_abs() > MAX_DISPLACEMENT {
            return None;
        }
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        let wide = |register: Register| register == Register::None || register.is_gpr64();
        if !wide(base) || !wide(index) || base == Register::None && index == Register::None {
            return None;
        }
        let scale = if index == Register::None { 1 } else { instruction.memory_index_scale() };
        let (base, index) = (self.value(base), self.value(index));
        let at = base.plus.wrapping_add(index.plus.wrapping_mul(i64::from(scale))).wrapping_add(displacement);
        Some((Key { segment, base: base.unknown, index: index.unknown, scale }, at))
    }

    /// Adds an access to the span that it fits in, or begins one.
    fn access(&mut self, (key, at): (Key, i64), len: u8, write: bool, instruction: usize, which: Which) {
        let end = at.wrapping_add(i64::from(len));
        let access = Access { instruction, which, at };
        if let Some(place) = self.growing.iter().position(|span| span.key == key) {
            let span = &mut self.growing[place];
            let (low, high) = (span.low.min(at), span.high.max(end));
            if high.wrapping_sub(low) <= MAX_SPAN {
                (span.low, span.high) = (low, high);
                span.write |= write;
                span.accesses.push(access);
                return;
            }
            self.grown.push(self.growing.remove(place));
        }
        self.growing.push(Growing { key, low: at, high: end, write, accesses: vec![access] });
    }

    fn stack(&mut self, below: i64, len: u8, write: bool, instruction: usize) {
        let Value { unknown: base, plus } = self.registers[gpr::RSP];
        let key = Key { segment: Register::None, base, index: NONE, scale: 1 };
        self.access((key, plus.wrapping_sub(below)), len, write, instruction, Which::Stack);
    }

    fn operand(&mut self, instruction: &Instruction, len: u8, write: bool, number: usize) {
        if let Some(address) = self.address(instruction) {
            self.access(address, len, write, number, Which::Operand);
        }
    }

    /// What an instruction without an access leaves in registers, if that is known.
    fn follow(&mut self, instruction: &Instruction) -> bool {
        let target = instruction.op0_register();
        if instruction.op0_kind() != OpKind::Register || !target.is_gpr64() {
            return false;
        }
        let target = target.number();
        let immediate = || match instruction.op1_kind() {
            OpKind::Immediate8to64 | OpKind::Immediate32to64 => Some(instruction.immediate(1) as i64),
            _ => None,
        };
        match instruction.mnemonic() {
            Mnemonic::Mov if instruction.op1_register().is_gpr64() => {
                self.registers[target] = self.registers[instruction.op1_register().number()];
            }
            Mnemonic::Add => match immediate() {
                Some(more) => self.add(target, more),
                None => return false,
            },
            Mnemonic::Sub => match immediate() {
                Some(less) => self.add(target, less.wrapping_neg()),
                None => return false,
            },
            Mnemonic::Inc => self.add(target, 1),
            Mnemonic::Dec => self.add(target, -1),
            Mnemonic::Lea => match self.address(instruction) {
                Some((Key { base, index: NONE, .. }, at)) if base >= FIRST_UNKNOWN => {
                    self.registers[target] = Value { unknown: base, plus: at };
                }
                _ => return false,
            },
            _ => return false,
        }
        true
    }

    /// The spans that two accesses or more share.
    fn finish(mut self, instructions: usize) -> Spans {
        self.grown.append(&mut self.growing);
        let mut members = vec![[None; 2]; instructions];
        let shared = self.grown.iter().filter(|span| span.accesses.len() > 1);
        for (number, span) in shared.take(MAX_SPANS).enumerate() {
            let mut lead = Some(Lead { len: (span.high - span.low) as u16, write: span.write });
            for access in &span.accesses {
                members[access.instruction][access.which as usize] = Some(Member {
                    span: number as u8,
                    offset: (access.at - span.low) as i32,
                    lead: lead.take(),
                });
            }
        }
        Spans(members)
    }
}

impl Builder<'_> {
    /// Finds the accesses of the block that share lookups.
    pub(super) fn find_spans(&self, instructions: &[Instruction]) -> Spans {
        if self.word != 8 || self.variant.is_without_spans() {
            return Spans::default();
        }
        let mut finder = Finder::new();
        for (number, instruction) in instructions.iter().enumerate() {
            self.note_accesses(&mut finder, instruction, number);
            self.note_values(&mut finder, instruction, number);
        }
        finder.finish(instructions.len())
    }

    fn note_accesses(&self, finder: &mut Finder, instruction: &Instruction, number: usize) {
        const WORD: u8 = 8;
        match self.classes[number] {
            Class::Memory(usage) => {
                let (_, bytes) = classify::memory_use_of(instruction);
                finder.operand(instruction, bytes as u8, usage != MemoryUse::Read, number);
            }
            // Its handler, if the load has to be left to that, executes it as a whole and passes over a lookup for others.
            Class::Push if instruction.op0_kind() == OpKind::Memory => {
                finder.operand(instruction, WORD, false, number);
            }
            Class::Push | Class::Call | Class::CallIndirect => {
                if instruction.op0_kind() == OpKind::Memory {
                    finder.operand(instruction, WORD, false, number);
                }
                finder.stack(i64::from(WORD), WORD, true, number);
            }
            Class::JumpIndirect if instruction.op0_kind() == OpKind::Memory => {
                finder.operand(instruction, WORD, false, number);
            }
            Class::Pop | Class::Return => finder.stack(0, WORD, false, number),
            Class::Leave => {
                let Value { unknown: base, plus } = finder.registers[gpr::RBP];
                let key = Key { segment: Register::None, base, index: NONE, scale: 1 };
                finder.access((key, plus), WORD, false, number, Which::Operand);
            }
            _ => {}
        }
    }

    fn note_values(&self, finder: &mut Finder, instruction: &Instruction, number: usize) {
        match self.classes[number] {
            Class::Push => finder.add(gpr::RSP, -8),
            Class::Pop => {
                finder.add(gpr::RSP, 8);
                finder.forget(instruction.op0_register().number());
            }
            Class::Leave => {
                finder.registers[gpr::RSP] = finder.registers[gpr::RBP];
                finder.add(gpr::RSP, 8);
                finder.forget(gpr::RBP);
            }
            Class::Plain | Class::Address if finder.follow(instruction) => {}
            Class::Interpret => finder.forget_everything(),
            _ => {
                let written = self.effects[number].written;
                (0..16).filter(|register| written >> register & 1 != 0).for_each(|r| finder.forget(r));
            }
        }
    }
}
