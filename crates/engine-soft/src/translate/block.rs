//! One block's translation.
//!
//! A unit is laid out as its entries, its hot path, then the cold stubs: calls of Rust code for lookups that miss, exits, and
//! branches that are not linked yet. Between two guest instructions nothing of the guest is in a scratch register, and all
//! of an instruction's effects come after the last point where it can fault: every boundary is a precise state.
//!
//! Addresses in a unit are relative to the page it was made from ([`crate::area::RunState::page`]), so that one translation
//! serves wherever the page is mapped.

use iced_x86::{Decoder, Encoder, Instruction, InstructionInfoFactory, OpAccess, OpKind};
use x86::paging::PAGE_SIZE;

use super::asm::{Address, Alu, Asm, Label, Reg, Rm, Width, cond};
use super::cache::{Cache, NewUnit, Variant};
use super::classes::{Class, is_faulting};
use super::flags::{Effects, Place, Use, usage, written_registers};
use super::recipe::Recipe;
use super::registers::{T0, T1, home, is_high_byte, part};
use super::runtime::{self, Kind, Routines};
use super::spans::Spans;
use super::stubs::{Cold, NewLink, NewSite, SitePurpose};
use crate::area::{ATTENTION_OFFSET, gpr_offset, run_offset};
use crate::cpu::class;
use crate::interp::block::Block;
use crate::interp::decode;
use crate::interp::op::Op;
use crate::native::classify;

/// A block's translation under construction.
pub(super) struct Builder<'a> {
    pub asm: Asm,
    pub encoder: &'a mut Encoder,
    pub info: &'a mut InstructionInfoFactory,
    pub variant: Variant,
    /// Bytes of an address and of what is pushed: 8 or 4.
    pub word: u8,
    pub routines: Routines,
    pub block: &'a Block,
    pub cold: Vec<Cold>,
    pub sites: Vec<NewSite>,
    pub links: Vec<NewLink>,
    pub faults: Vec<(u64, Label)>,
    pub first_site: u32,
    pub first_link: u32,
    /// The x87 state is known to be in the host's registers from here on.
    pub x87_loaded: bool,
    /// The vector registers are.
    pub vectors_loaded: bool,
    /// The encoder refused the present instruction.
    pub refused: bool,
    /// How the flags can be made again at this point.
    pub recipe: Option<Recipe>,
    /// What the block's instructions are.
    pub classes: Vec<Class>,
    pub effects: Vec<Effects>,
    /// Which accesses share lookups.
    pub spans: Spans,
    /// The span whose host address is in [`T0`].
    pub held: Option<u8>,
    /// Where they are wanted when the block begins.
    pub begins_with_flags: Place,
    /// The block is a loop that has a second body.
    pub rounds: Option<Rounds>,
    /// Where the flags are at this point.
    pub flags: Place,
    /// The instruction being translated, and its place.
    pub current: usize,
    pub offset: i32,
}

/// The second body of a block that branches to its own beginning, for all rounds but the first: it knows how the flags can
/// be made again that the last round left, so that it need not save them.
#[derive(Clone, Copy)]
pub(super) struct Rounds {
    pub label: Label,
    pub recipe: Recipe,
}

/// Where a unit is entered.
#[derive(Clone, Copy)]
pub struct Entries {
    /// With the flags in the host's register.
    pub host: u64,
    /// With the flags in memory.
    pub memory: u64,
    /// With the flags in both.
    pub both: u64,
}

/// Whether the host's processor has what the translator's own code uses.
pub fn is_supported() -> bool {
    std::is_x86_feature_detected!("avx") && std::is_x86_feature_detected!("bmi2")
}

/// Translates a block.
pub fn translate<'a>(
    cache: &Cache,
    encoder: &'a mut Encoder,
    info: &'a mut InstructionInfoFactory,
    block: &'a Block,
    variant: Variant,
) -> NewUnit<'a> {
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
        spans: Spans::default(),
        held: None,
        begins_with_flags: Place::Host,
        rounds: None,
        flags: Place::Host,
        current: 0,
        offset: 0,
    };
    let instructions = builder.decode();
    builder.classes = instructions.iter().zip(&block.ops).map(|(i, op)| builder.classify(i, op)).collect();
    builder.effects = instructions
        .iter()
        .map(|i| Effects { flags: usage(i), written: written_registers(builder.info, i) })
        .collect();
    builder.spans = builder.find_spans(&instructions);

    let entries = builder.entries(&instructions);
    builder.body(&instructions);
    if let Some(round) = builder.rounds {
        builder.rounds_body(&instructions, round);
    }
    builder.finish(entries)
}

impl Builder<'_> {
    /// Emits the entries.
    fn entries(&mut self, instructions: &[Instruction]) -> Entries {
        let start = self.start(instructions);
        self.begins_with_flags = start;
        self.flags = if start == Place::Both { Place::Host } else { start };
        let first = self.asm.address();
        match start {
            Place::Memory => {
                runtime::save_flags(&mut self.asm);
                let memory = self.asm.address();
                Entries { host: first, memory, both: memory }
            }
            Place::Host => {
                runtime::restore_flags(&mut self.asm);
                let host = self.asm.address();
                Entries { host, memory: first, both: host }
            }
            Place::Both | Place::Repeat => Entries { host: first, memory: first, both: first },
        }
    }

    /// Emits the instructions and the way on.
    fn body(&mut self, instructions: &[Instruction]) {
        let mut ended = false;
        for (index, instruction) in instructions.iter().enumerate() {
            let class = self.classes[index];
            self.current = index;
            self.offset = instruction.ip() as i32;
            ended = self.instruction(instruction, class, index + 1 == instructions.len());
            self.note_effects(instruction, class);
        }
        if !ended {
            let next = instructions.last().map_or(0, |i| i.next_ip() as i64);
            self.go_to(next);
        }
    }

    /// Emits the instructions for all rounds of a loop but the first.
    fn rounds_body(&mut self, instructions: &[Instruction], rounds: Rounds) {
        self.asm.bind(rounds.label);
        self.recipe = Some(rounds.recipe);
        self.flags = Place::Repeat;
        self.held = None;
        self.body(instructions);
    }

    fn decode(&self) -> Vec<Instruction> {
        let offset = self.block.gpa() & (PAGE_SIZE - 1);
        let bits = self.variant.code_bits();
        let mut decoder = Decoder::with_ip(bits, &self.block.bytes, offset, decode::options());
        self.block.ops.iter().map(|_| decoder.decode()).collect()
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
        // What it was to look up for others is not looked up.
        self.spans = Spans::default();
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
            Class::Gather => {
                self.gather(instruction);
                false
            }
            Class::MaskedMove => {
                self.masked_move(instruction);
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
        self.held = None;
        let resume = (!last).then(|| self.asm.label());
        let slow = self.site(SitePurpose::Interpret, resume);
        self.asm.jmp(slow);
        if let Some(resume) = resume {
            self.asm.bind(resume);
        }
        self.flags = Place::Both;
    }

    pub fn has_to_load(&self, op: &Op) -> bool {
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
        self.held = None;
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
        if is_faulting(instruction) {
            self.fault_exit(instruction, &[T1, T0]);
        } else {
            self.native(instruction, &[T1, T0]);
        }
        self.note_flags(usage);
    }

    /// Emits an instruction that the host may fault on; then the interpreter executes it and finds out why.
    pub fn fault_exit(&mut self, instruction: &Instruction, scratch: &[Reg]) {
        let resume = self.asm.label();
        let stub = self.site(SitePurpose::Interpret, Some(resume));
        let at = self.native(instruction, scratch);
        self.faults.push((at, stub));
        self.asm.bind(resume);
        self.held = None;
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
                        if host == T0 {
                            self.held = None;
                        }
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
        if to == T0 {
            self.held = None;
        }
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
