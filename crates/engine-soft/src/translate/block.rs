//! One block's translation.
//!
//! A unit is laid out as its entries, its hot path, then the cold stubs: calls of Rust code for lookups that miss, exits, and
//! branches that are not linked yet. Between two guest instructions nothing of the guest is in a scratch register, and all
//! of an instruction's effects come after the last point where it can fault: every boundary is a precise state.
//!
//! Addresses in a unit are relative to the page it was made from ([`crate::area::RunState::page`]), so that one translation
//! serves wherever the page is mapped.

use std::sync::Arc;

use iced_x86::{
    Code, Decoder, Encoder, FlowControl, Instruction, InstructionInfoFactory, MemorySize, Mnemonic, OpAccess,
    OpKind, Register,
};
use x86::paging::PAGE_SIZE;

use super::asm::{Address, Alu, Asm, Label, Reg, Rm, Width, cond};
use super::cache::{AddressSource, Cache, Guard, Link, NewUnit, Purpose, Site, Variant};
use super::flags::{Place, Recipe, Use, usage, written_registers};
use super::registers::{T0, T1, home, is_high_byte, part};
use super::runtime::{self, Kind, Routines};
use crate::area::{ATTENTION_OFFSET, gpr_offset, run_offset};
use crate::cpu::class;
use crate::interp::block::Block;
use crate::interp::decode;
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

/// What is emitted behind the hot path.
enum Cold {
    /// Calls Rust code for a site.
    Slow { label: Label, site: u32, flags: Option<Recipe> },
    /// Leaves with RIP at an offset in the page.
    Exit { label: Label, offset: i32, flags: Option<Recipe> },
    /// Leaves likewise, asking for a link.
    Unlinked { label: Label, link: u32, offset: i32, flags: Place },
    /// The stack of translated code is full: it begins anew, and the push is tried again.
    FullStack { label: Label, again: Label },
    /// Where a jump leads that something else keeps from being taken.
    Never { label: Label },
}

/// A [`Link`] before addresses are known.
#[derive(Clone, Copy)]
struct NewLink {
    unlinked: Label,
    /// Offset of the rel32 in the code.
    field: usize,
    flags: Place,
    /// Offsets of the fields of its [`Guard`].
    guard: Option<(usize, usize)>,
}

/// What an instruction does to flags and registers.
#[derive(Clone, Copy)]
struct Effects {
    flags: Use,
    /// General registers that it changes, a bit each.
    written: u16,
}

/// A block's translation under construction.
pub(super) struct Builder<'a> {
    pub asm: Asm,
    pub encoder: &'a mut Encoder,
    info: &'a mut InstructionInfoFactory,
    pub variant: Variant,
    /// Bytes of an address and of what is pushed: 8 or 4.
    pub word: u8,
    pub routines: Routines,
    block: &'a Block,
    cold: Vec<Cold>,
    sites: Vec<(Site, Option<Label>, Option<Label>)>,
    links: Vec<NewLink>,
    faults: Vec<(u64, Label)>,
    first_site: u32,
    first_link: u32,
    /// The x87 state is known to be in the host's registers from here on.
    x87_loaded: bool,
    /// The vector registers are.
    vectors_loaded: bool,
    /// The encoder refused the present instruction.
    refused: bool,
    /// How the flags can be made again at this point.
    recipe: Option<Recipe>,
    /// What the block's instructions are.
    classes: Vec<Class>,
    effects: Vec<Effects>,
    /// Where the flags are at this point.
    pub flags: Place,
    /// The instruction being translated, and its place.
    pub current: usize,
    pub offset: i32,
}

/// Whether the host's processor has what the translator's own code uses.
pub fn is_supported() -> bool {
    std::is_x86_feature_detected!("avx") && std::is_x86_feature_detected!("bmi2")
}

/// Translates a block. `None` if there is nothing to gain.
pub fn translate(
    cache: &Cache,
    encoder: &mut Encoder,
    info: &mut InstructionInfoFactory,
    block: &Arc<Block>,
    variant: Variant,
) -> NewUnit {
    let kind = variant.kind();
    let mut builder = Builder {
        asm: cache.asm(),
        encoder,
        info,
        variant,
        word: variant.code_bits() as u8 / 8,
        routines: cache.routines(kind),
        block,
        cold: Vec::new(),
        sites: Vec::new(),
        links: Vec::new(),
        faults: Vec::new(),
        first_site: cache.next_site(),
        first_link: cache.next_link(),
        x87_loaded: false,
        vectors_loaded: kind == Kind::User,
        refused: false,
        recipe: None,
        classes: Vec::new(),
        effects: Vec::new(),
        flags: Place::Host,
        current: 0,
        offset: 0,
    };
    let instructions = builder.decode();
    let classes: Vec<Class> =
        instructions.iter().zip(&block.ops).map(|(i, op)| builder.classify(i, op)).collect();
    builder.effects = instructions
        .iter()
        .map(|i| Effects { flags: usage(i), written: written_registers(builder.info, i) })
        .collect();
    builder.classes = classes.clone();

    let (entry_host, entry_memory, entry_both);
    let start = builder.start(&instructions, &classes);
    match start {
        Place::Memory => {
            entry_host = builder.asm.address();
            runtime::save_flags(&mut builder.asm);
            entry_memory = builder.asm.address();
            entry_both = entry_memory;
        }
        Place::Host => {
            entry_memory = builder.asm.address();
            runtime::restore_flags(&mut builder.asm);
            entry_host = builder.asm.address();
            entry_both = entry_host;
        }
        Place::Both | Place::Repeat => {
            entry_host = builder.asm.address();
            entry_memory = entry_host;
            entry_both = entry_host;
        }
    }
    builder.flags = if start == Place::Both { Place::Host } else { start };

    let mut ended = false;
    for (index, (instruction, class)) in instructions.iter().zip(&classes).enumerate() {
        builder.current = index;
        builder.offset = instruction.ip() as i32;
        ended = builder.instruction(instruction, *class, index + 1 == instructions.len());
        builder.note_effects(instruction, *class);
    }
    if !ended {
        let next = instructions.last().map_or(0, |i| i.next_ip() as i64);
        builder.go_to(next);
    }
    builder.finish(block.clone(), entry_host, entry_memory, entry_both)
}

impl Builder<'_> {
    fn decode(&self) -> Vec<Instruction> {
        let offset = self.block.gpa() & (PAGE_SIZE - 1);
        let bits = self.variant.code_bits();
        let mut decoder = Decoder::with_ip(bits, &self.block.bytes, offset, decode::options());
        self.block.ops.iter().map(|_| decoder.decode()).collect()
    }

    // ---- classification -------------------------------------------------------------------------------------------

    fn classify(&self, instruction: &Instruction, op: &Op) -> Class {
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
    /// scratch registers, and high bytes only together with registers that need no REX prefix.
    fn registers_fit(&self, instruction: &Instruction, memory: bool) -> bool {
        let operands = (0..instruction.op_count())
            .filter(|i| instruction.op_kind(*i) == OpKind::Register)
            .map(|i| instruction.op_register(i))
            .filter(|r| r.is_gpr());
        let (mut high, mut rex) = (false, memory);
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
    fn start(&self, instructions: &[Instruction], classes: &[Class]) -> Place {
        for ((instruction, class), op) in instructions.iter().zip(classes).zip(&self.block.ops) {
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

    // ---- flags ----------------------------------------------------------------------------------------------------

    /// Makes sure that the host's flags may be used for something else: the guest's are in memory, or can be had again.
    pub fn free_flags(&mut self) {
        if self.flags == Place::Host && self.recipe_lasts() {
            self.flags = Place::Repeat;
        }
        if self.flags == Place::Host {
            self.save_flags();
        }
    }

    /// As [`Builder::free_flags`], before an instruction that may fault and uses flags so: what makes them again must not be
    /// done only for the instruction and leave the fault without.
    pub fn free_flags_before_fault(&mut self, usage: Use) {
        match usage {
            Use::Needs { .. } => self.save_flags(),
            _ => self.free_flags(),
        }
    }

    /// Makes memory hold the flags.
    pub fn save_flags(&mut self) {
        if self.flags == Place::Repeat {
            self.restore_flags();
        }
        if self.flags == Place::Host {
            runtime::save_flags(&mut self.asm);
            self.flags = Place::Both;
        }
    }

    /// Notes that the host's flags have been used for something else.
    pub fn clobber_flags(&mut self) {
        debug_assert!(self.flags != Place::Host);
        if self.flags == Place::Both {
            self.flags = Place::Memory;
        }
    }

    /// Makes the host's flags those of the guest. [`T1`] is lost.
    pub fn restore_flags(&mut self) {
        match (self.flags, self.recipe) {
            (Place::Memory, _) => {
                runtime::restore_flags(&mut self.asm);
                self.flags = Place::Both;
            }
            (Place::Repeat, Some(recipe)) => {
                self.native(&recipe.instruction, &[T1]);
                self.flags = Place::Host;
            }
            _ => {}
        }
    }

    /// The recipe, if the flags are nowhere else.
    fn recipe_in_use(&self) -> Option<Recipe> {
        self.recipe.filter(|_| self.flags == Place::Repeat)
    }

    /// In a cold stub: makes the flags again, to memory.
    fn repeat_and_save(&mut self, recipe: Option<Recipe>) {
        if let Some(recipe) = recipe {
            self.native(&recipe.instruction, &[T1]);
            runtime::save_flags(&mut self.asm);
        }
    }

    /// Whether the recipe's registers keep their values until the flags are set anew, or are wanted in their place.
    fn recipe_lasts(&self) -> bool {
        let Some(recipe) = self.recipe else { return false };
        for (class, effects) in self.classes[self.current..].iter().zip(&self.effects[self.current..]) {
            match class {
                Class::Nothing
                | Class::Address
                | Class::Plain
                | Class::Memory(_)
                | Class::Push
                | Class::Pop
                | Class::Leave => {}
                // There they are made again.
                _ => return true,
            }
            match effects.flags {
                Use::Replaces => return true,
                Use::Needs { .. } => return true,
                Use::None => {}
            }
            if effects.written & recipe.reads != 0 {
                return false;
            }
        }
        true
    }

    // ---- sites, stubs, links --------------------------------------------------------------------------------------

    /// A site for the current instruction, with a cold stub that calls Rust code for it. `resume` is where the code goes
    /// on after the instruction, if it does.
    pub fn site(&mut self, purpose: SitePurpose, resume: Option<Label>) -> Label {
        let label = self.asm.label();
        let (purpose, retry) = match purpose {
            SitePurpose::Access { address, len, write, alignment, retry } => {
                (Purpose::Access { address, len, write, alignment, retry: 0 }, Some(retry))
            }
            SitePurpose::Interpret => (Purpose::Interpret, None),
        };
        let number = self.first_site + self.sites.len() as u32;
        let op = &raw const self.block.ops[self.current];
        let site = Site { op, offset: self.offset as u16, variant: self.variant, purpose, resume: 0 };
        self.sites.push((site, retry, resume));
        let flags = self.recipe_in_use();
        self.cold.push(Cold::Slow { label, site: number, flags });
        label
    }

    /// Pushes a register on the stack of translated code.
    pub fn push_shadow(&mut self, register: Reg) {
        self.may_fill_stack();
        self.asm.push(register);
    }

    /// The next instruction pushes: where the stack of translated code is full, it begins anew first.
    fn may_fill_stack(&mut self) {
        let (again, full) = (self.asm.label(), self.asm.label());
        self.asm.bind(again);
        self.faults.push((self.asm.address(), full));
        self.cold.push(Cold::FullStack { label: full, again });
    }

    /// A cold stub that leaves with RIP at an offset of the page; the flags have to be in memory.
    pub fn exit(&mut self, offset: i64) -> Label {
        let label = self.asm.label();
        let flags = self.recipe_in_use();
        self.cold.push(Cold::Exit { label, offset: offset as i32, flags });
        label
    }

    /// A branch within the page: `emit` writes the jump to the label it gets.
    pub fn link(&mut self, offset: i64, emit: impl FnOnce(&mut Asm, Label)) {
        let label = self.asm.label();
        emit(&mut self.asm, label);
        let number = self.first_link + self.links.len() as u32;
        // The rel32 is the last field of the jump.
        self.links.push(NewLink {
            unlinked: label,
            field: self.asm.size() - 4,
            flags: self.flags,
            guard: None,
        });
        self.cold.push(Cold::Unlinked { label, link: number, offset: offset as i32, flags: self.flags });
    }

    /// A branch into another page, or to what may reach into one; the flags have to be in memory, the host's are lost. `emit`
    /// writes the jump or call to the label it gets.
    pub fn link_to_page(&mut self, offset: i64, emit: impl FnOnce(&mut Asm, Label)) {
        self.clobber_flags();
        let unlinked = self.asm.label();
        let guard = self.asm.cmp_area_wide(run_offset!(epochs), 0);
        self.asm.jcc(cond::NE, unlinked);
        let page = offset & !(PAGE_SIZE as i64 - 1);
        if page != 0 {
            self.load_rip(T0, page);
            self.asm.store(Width::W64, Rm::Area(run_offset!(page)), T0);
        }
        let label = self.asm.label();
        emit(&mut self.asm, label);
        let field = self.asm.size() - 4;
        let number = self.first_link + self.links.len() as u32;
        self.links.push(NewLink { unlinked, field, flags: self.flags, guard: Some(guard) });
        // The jump itself is not reached before it is linked.
        self.cold.push(Cold::Unlinked {
            label: unlinked,
            link: number,
            offset: offset as i32,
            flags: self.flags,
        });
        self.cold.push(Cold::Never { label });
    }

    fn finish(mut self, block: Arc<Block>, entry_host: u64, entry_memory: u64, entry_both: u64) -> NewUnit {
        let base = self.asm.address() - self.asm.size() as u64;
        for cold in std::mem::take(&mut self.cold) {
            match cold {
                Cold::Slow { label, site, flags } => {
                    self.asm.bind(label);
                    self.repeat_and_save(flags);
                    self.asm.mov_imm32(T1, site);
                    self.asm.jmp_to(self.routines.slow);
                }
                Cold::Exit { label, offset, flags } => {
                    self.asm.bind(label);
                    self.repeat_and_save(flags);
                    self.asm.mov_simm32(T1, offset);
                    self.asm.jmp_to(self.routines.exit);
                }
                Cold::Unlinked { label, link, offset, flags } => {
                    self.asm.bind(label);
                    self.asm.store_imm(Width::W32, Rm::Area(run_offset!(link)), link as i32);
                    self.asm.mov_simm32(T1, offset);
                    let host = flags != Place::Memory;
                    self.asm.jmp_to(if host { self.routines.exit_host_flags } else { self.routines.exit });
                }
                Cold::FullStack { label, again } => {
                    self.asm.bind(label);
                    self.asm.load(Width::W64, Reg::RSP, Rm::Area(run_offset!(shadow_top)));
                    self.asm.jmp(again);
                }
                Cold::Never { label } => {
                    self.asm.bind(label);
                    self.asm.ud2();
                }
            }
        }
        let place = |label: Label| self.asm.offset_of(label).map_or(0, |offset| base + offset as u64);
        let sites = self
            .sites
            .iter()
            .map(|(site, retry_label, resume)| {
                let mut site = *site;
                if let (Purpose::Access { retry, .. }, Some(label)) = (&mut site.purpose, retry_label) {
                    *retry = place(*label);
                }
                site.resume = resume.map_or(0, place);
                site
            })
            .collect();
        let links = self
            .links
            .iter()
            .map(|new| Link {
                field: base + new.field as u64,
                unlinked: place(new.unlinked),
                flags: new.flags,
                guard: new.guard.map(|(offset, number)| Guard {
                    offset: base + offset as u64,
                    number: base + number as u64,
                }),
            })
            .collect();
        let faults = self.faults.iter().map(|(at, label)| (*at, place(*label))).collect();
        NewUnit {
            block,
            variant: self.variant,
            code: self.asm.finish(),
            entry_host,
            entry_memory,
            entry_both,
            sites,
            links,
            faults,
        }
    }

    // ---- instructions -----------------------------------------------------------------------------------------------

    /// Emits one instruction; returns whether the block ends with it.
    fn instruction(&mut self, instruction: &Instruction, class: Class, last: bool) -> bool {
        let before = (
            self.asm.mark(),
            self.cold.len(),
            self.sites.len(),
            self.links.len(),
            self.faults.len(),
            self.flags,
        );
        let loaded = (self.x87_loaded, self.vectors_loaded);
        let ended = self.emit(instruction, class, last);
        if !std::mem::take(&mut self.refused) {
            return ended;
        }
        // Without a host encoding it is the interpreter's.
        self.asm.back_to(before.0);
        self.cold.truncate(before.1);
        self.sites.truncate(before.2);
        self.links.truncate(before.3);
        self.faults.truncate(before.4);
        self.flags = before.5;
        (self.x87_loaded, self.vectors_loaded) = loaded;
        self.emit(instruction, Class::Interpret, last)
    }

    fn emit(&mut self, instruction: &Instruction, class: Class, last: bool) -> bool {
        match class {
            Class::Nothing => false,
            Class::Plain => {
                self.plain(instruction);
                false
            }
            Class::Address => {
                self.load_address(instruction);
                false
            }
            Class::Memory(usage) => {
                self.memory(instruction, usage);
                false
            }
            Class::Push => {
                self.push(instruction);
                false
            }
            Class::Pop => {
                self.pop(instruction);
                false
            }
            Class::Leave => {
                self.leave();
                false
            }
            Class::Jump => {
                self.go_to(self.target_of(instruction));
                true
            }
            Class::JumpIf => {
                self.jump_if(instruction, last);
                last
            }
            Class::Call => {
                self.call(instruction);
                true
            }
            Class::JumpIndirect | Class::CallIndirect => {
                self.indirect(instruction, class == Class::CallIndirect);
                true
            }
            Class::Return => {
                self.ret(instruction);
                true
            }
            Class::Interpret => {
                self.interpret(last);
                last
            }
        }
    }

    /// The interpreter's handler executes the instruction.
    fn interpret(&mut self, last: bool) {
        self.save_flags();
        let resume = (!last).then(|| self.asm.label());
        let slow = self.site(SitePurpose::Interpret, resume);
        self.asm.jmp(slow);
        if let Some(resume) = resume {
            self.asm.bind(resume);
        }
        self.flags = Place::Both;
    }

    fn has_to_load(&self, op: &Op) -> bool {
        op.class & (class::X87 | class::WAIT | class::MMX) != 0 && !self.x87_loaded
            || op.class & (class::SSE | class::AVX) != 0 && !self.vectors_loaded
    }

    /// Makes sure that the registers of the current instruction's classes are in the host's.
    pub fn load_classes(&mut self) {
        let op = &self.block.ops[self.current];
        if op.class & (class::X87 | class::WAIT | class::MMX) != 0 && !self.x87_loaded {
            self.x87_loaded = true;
            self.call_unless(run_offset!(x87_live), self.routines.load_x87);
        }
        if op.class & (class::SSE | class::AVX) != 0 && !self.vectors_loaded {
            self.vectors_loaded = true;
            self.call_unless(run_offset!(vectors_live), self.routines.load_vectors);
        }
    }

    /// Calls a routine if a word of the area is zero.
    fn call_unless(&mut self, word: i32, routine: u64) {
        self.free_flags();
        self.clobber_flags();
        let skip = self.asm.label();
        self.asm.alu_imm(Alu::Cmp, Width::W32, Rm::Area(word), 0);
        self.asm.jcc(cond::NE, skip);
        self.may_fill_stack();
        self.asm.call_to(routine);
        self.asm.bind(skip);
    }

    /// An instruction without a memory operand.
    fn plain(&mut self, instruction: &Instruction) {
        self.load_classes();
        let usage = usage(instruction);
        if is_faulting(instruction) {
            self.free_flags_before_fault(usage);
        }
        if matches!(usage, Use::Needs { .. }) {
            self.restore_flags();
        }
        let resume = self.asm.label();
        if is_faulting(instruction) {
            self.fault_exit(instruction, &[T1, T0], resume);
        } else {
            self.native(instruction, &[T1, T0]);
        }
        self.asm.bind(resume);
        self.note_flags(usage);
    }

    /// What an instruction's execution means for the recipe.
    fn note_effects(&mut self, instruction: &Instruction, class: Class) {
        let effects = self.effects[self.current];
        match class {
            Class::Nothing | Class::JumpIf => {}
            Class::Interpret => self.recipe = None,
            Class::Plain | Class::Memory(_) if effects.flags != Use::None => {
                let overwrites = |recipe: Recipe| recipe.reads & effects.written != 0;
                if effects.flags == Use::Replaces {
                    self.recipe = Recipe::of(instruction);
                } else if effects.flags != (Use::Needs { changes: false })
                    || self.recipe.is_some_and(overwrites)
                {
                    self.recipe = None;
                }
            }
            _ if self.recipe.is_some_and(|recipe| recipe.reads & effects.written != 0) => {
                debug_assert!(self.flags != Place::Repeat, "the flags are lost");
                self.recipe = None;
            }
            _ => {}
        }
    }

    /// What an instruction's execution means for the place of the flags.
    pub fn note_flags(&mut self, usage: Use) {
        if matches!(usage, Use::Replaces | Use::Needs { changes: true }) {
            self.flags = Place::Host;
        }
    }

    /// Emits an instruction that the host may fault on; then the interpreter executes it and finds out why.
    pub fn fault_exit(&mut self, instruction: &Instruction, scratch: &[Reg], resume: Label) {
        let stub = self.site(SitePurpose::Interpret, Some(resume));
        let at = self.native(instruction, scratch);
        self.faults.push((at, stub));
    }

    /// Emits a guest instruction with its registers renamed; those that live in memory are in `scratch` meanwhile. Returns
    /// the address of the instruction itself.
    pub fn native(&mut self, instruction: &Instruction, scratch: &[Reg]) -> u64 {
        let mut renamed = *instruction;
        let mut borrowed: [Option<(usize, Reg, bool)>; 2] = [None; 2];
        let mut free = scratch.iter().copied();
        let info = self.info.info(instruction);
        for operand in 0..instruction.op_count() {
            if instruction.op_kind(operand) != OpKind::Register {
                continue;
            }
            let register = instruction.op_register(operand);
            if !register.is_gpr() || is_high_byte(register) {
                continue;
            }
            let number = register.full_register().number();
            let writes = !matches!(info.op_access(operand), OpAccess::Read | OpAccess::CondRead);
            let host = match home(number) {
                Some(host) => host,
                None => {
                    let known = borrowed.iter_mut().flatten().find(|(guest, ..)| *guest == number);
                    if let Some((_, host, written)) = known {
                        *written |= writes;
                        *host
                    } else {
                        // `registers_fit` has counted them.
                        let Some(host) = free.next() else { break };
                        self.asm.load(Width::W64, host, Rm::Area(gpr_offset(number)));
                        let slot = usize::from(borrowed[0].is_some());
                        borrowed[slot] = Some((number, host, writes));
                        host
                    }
                }
            };
            renamed.set_op_register(operand, part(host, register));
        }
        let at = self.asm.address();
        self.encode(&renamed);
        for (guest, host, written) in borrowed.into_iter().flatten() {
            if written {
                self.asm.store(Width::W64, Rm::Area(gpr_offset(guest)), host);
            }
        }
        at
    }

    /// Encodes an instruction whose operands are host registers and memory.
    pub fn encode(&mut self, instruction: &Instruction) {
        let mut instruction = *instruction;
        if let Some(code) = classify::long_mode_code(instruction.code()) {
            instruction.set_code(code);
        }
        // AL, AX, EAX, RAX as implied operands stay what they are: RAX is at home in RAX.
        match self.encoder.encode(&instruction, self.asm.address()) {
            Ok(_) => {
                let bytes = self.encoder.take_buffer();
                self.asm.bytes(&bytes);
            }
            Err(error) => {
                tracing::debug!("not translated: {:?}: {error}", instruction.code());
                drop(self.encoder.take_buffer());
                self.refused = true;
            }
        }
    }

    // ---- parts that several instructions share ----------------------------------------------------------------------

    /// Compares the attention word with zero: the host's flags are lost.
    pub fn check_attention(&mut self, otherwise: Label) {
        self.clobber_flags();
        self.asm.alu_imm(Alu::Cmp, Width::W32, Rm::Area(ATTENTION_OFFSET), 0);
        self.asm.jcc(cond::NE, otherwise);
    }

    /// Width of an address and of what is pushed.
    pub fn wide(&self) -> Width {
        if self.word == 8 { Width::W64 } else { Width::W32 }
    }

    /// Where a direct branch leads, relative to the page.
    pub fn target_of(&self, instruction: &Instruction) -> i64 {
        let target = instruction.near_branch_target();
        if self.word == 8 { target as i64 } else { i64::from(target as u32 as i32) }
    }

    /// RIP at an offset of the page.
    pub fn load_rip(&mut self, to: Reg, offset: i64) {
        self.asm.load(Width::W64, to, Rm::Area(run_offset!(page)));
        if offset != 0 {
            self.asm.lea(self.wide(), to, Address::base(to, offset as i32));
        }
    }

    /// A guest register into a host register.
    pub fn load_guest(&mut self, to: Reg, guest: usize) {
        match home(guest) {
            Some(host) => self.asm.mov(to, host),
            None => self.asm.load(Width::W64, to, Rm::Area(gpr_offset(guest))),
        }
    }

    /// A host register into a guest register.
    pub fn store_guest(&mut self, guest: usize, from: Reg) {
        match home(guest) {
            Some(host) => self.asm.mov(host, from),
            None => self.asm.store(Width::W64, Rm::Area(gpr_offset(guest)), from),
        }
    }
}

/// [`Purpose`] before addresses are known.
#[derive(Clone, Copy)]
pub(super) enum SitePurpose {
    Access { address: AddressSource, len: u8, write: bool, alignment: u8, retry: Label },
    Interpret,
}

/// Whether the host processor can fault in the instruction itself.
pub(super) fn is_faulting(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Div | Mnemonic::Idiv)
        || classify::alignment_of(instruction) > 1
}
