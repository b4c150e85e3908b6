//! Random programs and the states they start in.

use iced_x86::{
    Code, Decoder, Encoder, FlowControl, Instruction, InstructionInfoFactory, MemoryOperand, Mnemonic,
    OpAccess, OpKind, Register, RflagsBits,
};
use x86::bits::rflags;
use x86::xsave;

use super::forms::{self, Form};
use super::inputs::target;
use super::machine::{CODE, COUNTER, FS_BASE, Mode};
use super::program::{Item, Label, Program, mov};
use super::state::{GS_BASE, PAGE, WRITABLE};
use super::values::Random;

/// Instruction forms by what they work on.
pub struct Forms {
    mode: Mode,
    integer: Vec<Code>,
    vector: Vec<Code>,
    x87: Vec<Code>,
    conditions: Vec<Code>,
    setcc: Vec<Code>,
    cmov: Vec<Code>,
}

impl Forms {
    /// All but those whose names contain one of the words in `without`.
    pub fn new(mode: Mode, without: &[String]) -> Forms {
        let mut forms = Forms {
            mode,
            integer: Vec::new(),
            vector: Vec::new(),
            x87: Vec::new(),
            conditions: Vec::new(),
            setcc: Vec::new(),
            cmov: Vec::new(),
        };
        for (form, testable) in forms::forms(mode.bits) {
            let code = form.code;
            let name = format!("{code:?}");
            if testable.is_err() || without.iter().any(|word| name.contains(word)) {
                continue;
            }
            let info = code.op_code();
            let near = if mode.bits == 64 { "_64" } else { "_32" };
            if code.is_jcc_near() && name.ends_with(near) {
                forms.conditions.push(code);
            }
            if code.flow_control() != FlowControl::Next && code.mnemonic() != Mnemonic::Int3 {
                continue;
            }
            if mode.cpl == 0 && (info.must_be_cpl0() || touches_the_machine(code.mnemonic())) {
                continue;
            }
            if !is_repeatable(code.mnemonic()) {
                continue;
            }
            if name.starts_with("Set") && info.op_count() == 1 {
                forms.setcc.push(code);
            }
            if name.starts_with("Cmov") {
                forms.cmov.push(code);
            }
            if is_x87(code) {
                forms.x87.push(code);
            } else if is_vector(code) {
                forms.vector.push(code);
            } else {
                forms.integer.push(code);
            }
        }
        forms
    }
}

/// Would meet the engine's own chips, which know the time, or stop the processor.
fn touches_the_machine(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(mnemonic, In | Out | Insb | Insw | Insd | Outsb | Outsw | Outsd | Hlt)
}

/// Whether it gives the same result each time; POPF has a way of its own into programs.
fn is_repeatable(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    !matches!(mnemonic, Rdrand | Rdseed | Popf | Popfd | Popfq)
}

fn is_x87(code: Code) -> bool {
    use iced_x86::{CpuidFeature, OpCodeOperandKind as K};
    let info = code.op_code();
    code.cpuid_features().iter().any(|f| {
        matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387 | CpuidFeature::MMX)
    }) || info.op_kinds().iter().any(|k| matches!(k, K::mm_or_mem | K::mm_reg | K::mm_rm))
}

fn is_vector(code: Code) -> bool {
    use iced_x86::CpuidFeature::*;
    !code.cpuid_features().iter().any(|f| {
        matches!(
            f,
            INTEL8086
                | INTEL186
                | INTEL286
                | INTEL386
                | INTEL486
                | X64
                | CX8
                | CMOV
                | ADX
                | BMI1
                | BMI2
                | CMPXCHG16B
                | LZCNT
                | MOVBE
                | POPCNT
                | CLFSH
                | MULTIBYTENOP
                | PAUSE
        )
    })
}

/// A program under construction.
struct Generator<'a> {
    forms: &'a Forms,
    random: Random,
    info: InstructionInfoFactory,
    items: Vec<Item>,
    labels: Label,
    /// Instructions so far.
    count: usize,
}

/// The program of a seed.
pub fn program(forms: &Forms, seed: u64) -> Program {
    let mut generator = Generator {
        forms,
        random: Random::new(seed),
        info: InstructionInfoFactory::new(),
        items: Vec::new(),
        labels: 0,
        count: 0,
    };
    generator.all();
    let random = &mut generator.random;
    // Often across the end of a page.
    let at = match random.below(3) {
        0 => CODE,
        1 => CODE + random.below(PAGE),
        _ => CODE + PAGE - random.below(300),
    };
    let turns = random.pick(&[0, 3, 10, 40]);
    Program { mode: forms.mode, items: generator.items, at, turns }
}

fn with<T>(made: Result<T, iced_x86::IcedError>) -> T {
    made.expect("an instruction")
}

impl Generator<'_> {
    fn bits(&self) -> u32 {
        self.forms.mode.bits
    }

    /// The register that holds an address, by number.
    fn wide(&self, number: u64) -> Register {
        let first = if self.bits() == 64 { Register::RAX } else { Register::EAX };
        first + number as u32
    }

    fn any_register(&mut self) -> Register {
        let number = self.random.below(if self.bits() == 64 { 16 } else { 8 });
        self.wide(number)
    }

    fn by_bits(&self, wide: Code, narrow: Code) -> Code {
        if self.bits() == 64 { wide } else { narrow }
    }

    fn all(&mut self) {
        let blocks = 1 + self.random.below(6) as usize;
        let functions = self.random.below(3) as usize;
        self.labels = blocks + functions;
        let size = 5 + self.random.below(56) as usize;
        let each = (size / (blocks + functions)).max(1) as u64;
        for block in 0..blocks {
            self.items.push(Item::Label(block));
            self.steps(1 + each);
            self.branch(block, blocks, functions);
        }
        self.items.push(Item::End);
        for function in blocks..blocks + functions {
            self.items.push(Item::Label(function));
            self.items.push(Item::Turn);
            self.steps(each);
            if self.random.percent(20) && function + 1 < blocks + functions {
                self.items
                    .push(Item::Branch(self.by_bits(Code::Call_rel32_64, Code::Call_rel32_32), function + 1));
                self.steps(1);
            }
            let ret = if self.random.percent(20) {
                let code = self.by_bits(Code::Retnq_imm16, Code::Retnd_imm16);
                with(Instruction::with1(code, self.random.below(4) as i32 * 8))
            } else {
                Instruction::with(self.by_bits(Code::Retnq, Code::Retnd))
            };
            self.items.push(Item::Plain(ret));
        }
    }

    fn steps(&mut self, upto: u64) {
        let steps = 1 + self.random.below(upto.max(1));
        for _ in 0..steps {
            self.step();
        }
    }

    /// What a block ends with.
    fn branch(&mut self, block: usize, blocks: usize, functions: usize) {
        let later = |random: &mut Random| block + 1 + random.below((blocks - block - 1) as u64) as usize;
        let has_later = block + 1 < blocks;
        let condition = self.random.pick(&self.forms.conditions);
        match self.random.below(10) {
            0..3 if has_later => {
                let to = later(&mut self.random);
                self.items.push(Item::Branch(condition, to));
            }
            0..5 => {
                let to = self.random.below(block as u64 + 1) as usize;
                self.items.push(Item::Turn);
                if self.random.percent(50) {
                    self.register_step();
                }
                match self.random.below(5) {
                    0 => {
                        let loops = if self.bits() == 64 {
                            [Code::Loop_rel8_64_RCX, Code::Loope_rel8_64_RCX, Code::Loopne_rel8_64_ECX]
                        } else {
                            [Code::Loop_rel8_32_ECX, Code::Loope_rel8_32_ECX, Code::Loopne_rel8_32_CX]
                        };
                        let code = self.random.pick(&loops);
                        self.items.push(Item::Branch(code, to));
                    }
                    1 => {
                        let code = self.by_bits(Code::Jmp_rel32_64, Code::Jmp_rel32_32);
                        self.items.push(Item::Branch(code, to));
                    }
                    2 => self.jump_through(to, false),
                    _ => self.items.push(Item::Branch(condition, to)),
                }
            }
            5..8 if functions > 0 => {
                let to = blocks + self.random.below(functions as u64) as usize;
                if self.random.percent(60) {
                    let code = self.by_bits(Code::Call_rel32_64, Code::Call_rel32_32);
                    self.items.push(Item::Branch(code, to));
                } else {
                    self.jump_through(to, true);
                }
            }
            8 if has_later => {
                let to = later(&mut self.random);
                self.jump_through(to, false);
            }
            9 if has_later => {
                let code = if self.random.percent(50) {
                    self.by_bits(Code::Jrcxz_rel8_64, Code::Jecxz_rel8_32)
                } else {
                    self.by_bits(Code::Jmp_rel32_64, Code::Jmp_rel32_32)
                };
                let to = later(&mut self.random);
                self.items.push(Item::Branch(code, to));
            }
            _ => {}
        }
    }

    /// An indirect jump or call.
    fn jump_through(&mut self, to: Label, call: bool) {
        let register = self.any_register();
        self.items.push(Item::Address(register, to));
        let slot = COUNTER + 64 + 8 * self.random.below(4);
        let memory = MemoryOperand::with_displ(slot, self.bits() / 8);
        let instruction = if self.random.percent(50) {
            let code = match (call, self.bits()) {
                (true, 64) => Code::Call_rm64,
                (true, _) => Code::Call_rm32,
                (false, 64) => Code::Jmp_rm64,
                (false, _) => Code::Jmp_rm32,
            };
            let store = self.by_bits(Code::Mov_rm64_r64, Code::Mov_rm32_r32);
            if self.random.percent(50) {
                with(Instruction::with1(code, register))
            } else {
                self.items.push(Item::Plain(with(Instruction::with2(store, memory, register))));
                with(Instruction::with1(code, memory))
            }
        } else if call {
            with(Instruction::with1(self.by_bits(Code::Call_rm64, Code::Call_rm32), register))
        } else {
            // By a return.
            let push = self.by_bits(Code::Push_r64, Code::Push_r32);
            self.items.push(Item::Plain(with(Instruction::with1(push, register))));
            Instruction::with(self.by_bits(Code::Retnq, Code::Retnd))
        };
        self.items.push(Item::Plain(instruction));
    }

    fn push(&mut self, instruction: Instruction) {
        self.count += 1;
        self.items.push(Item::Plain(instruction));
    }

    fn step(&mut self) {
        match self.random.below(100) {
            0..46 => {
                let code = self.random.pick(&self.forms.integer);
                self.form(code);
            }
            46..66 => {
                let code = self.random.pick(&self.forms.vector);
                self.form(code);
            }
            66..70 => {
                let code = self.random.pick(&self.forms.x87);
                self.form(code);
            }
            70 if self.bits() == 64 => self.segment_base(),
            70..76 => self.register_step(),
            76..79 => self.flags_consumer(),
            79..83 => self.flags_across_accesses(),
            _ => self.stack_step(),
        }
    }

    /// A random encoding of a form, in most cases with an address that exists.
    fn form(&mut self, code: Code) {
        let form = Form { code, bitness: self.bits() };
        let mut made = None;
        for _ in 0..4 {
            let Some(encoding) = forms::encoding(form, &mut self.random) else { return };
            let instruction = encoding.instruction;
            let writes = |operand| {
                !matches!(
                    self.info.info(&instruction).op_access(operand),
                    OpAccess::Read | OpAccess::CondRead
                )
            };
            let stack = instruction.op_count() > 0
                && instruction.op0_kind() == OpKind::Register
                && instruction.op0_register().full_register() == Register::RSP;
            let moves_stack = stack && { writes }(0);
            made = Some(encoding);
            if !moves_stack || self.random.percent(10) {
                break;
            }
        }
        let Some(encoding) = made else { return };
        let instruction = encoding.instruction;
        let mut instruction = instruction;
        let explicit = (0..instruction.op_count()).any(|o| instruction.op_kind(o) == OpKind::Memory);
        if explicit && self.random.percent(8) {
            instruction.set_segment_prefix(Register::FS);
        }
        if self.random.percent(85) {
            self.set_up(&instruction, encoding.fixed_index);
        }
        if self.random.percent(8) && self.prefixed(&instruction) {
            return;
        }
        self.push(instruction);
        self.define_flags(&instruction);
    }

    /// The instruction with prefixes that nobody needs, if it is still the same one then, or none.
    fn prefixed(&mut self, instruction: &Instruction) -> bool {
        if instruction.is_ip_rel_memory_operand() {
            return false;
        }
        let bits = self.bits();
        let mut encoder = Encoder::new(bits);
        if encoder.encode(instruction, 0).is_err() {
            return false;
        }
        let encoded = encoder.take_buffer();
        let prefixes = [0x26, 0x2e, 0x36, 0x3e, 0x64, 0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x40, 0x48];
        let legacy = if bits == 64 { prefixes.len() } else { prefixes.len() - 2 };
        let mut bytes: Vec<u8> =
            (0..1 + self.random.below(4)).map(|_| self.random.pick(&prefixes[..legacy])).collect();
        bytes.extend(encoded);
        if bytes.len() > 16 {
            return false;
        }
        let decoded = Decoder::new(bits, &bytes, engine_soft::interp::decode::options()).decode();
        if decoded.is_invalid() || decoded.code() != instruction.code() || decoded.len() != bytes.len() {
            return false;
        }
        self.push(with(Instruction::with_declare_byte(&bytes)));
        self.define_flags(&decoded);
        true
    }

    /// An access through a segment whose base was just changed.
    fn segment_base(&mut self) {
        let gs = self.random.percent(50);
        let (segment, write, usual) = if gs {
            (Register::GS, Code::Wrgsbase_r64, GS_BASE)
        } else {
            (Register::FS, Code::Wrfsbase_r64, FS_BASE)
        };
        let base = target(&mut self.random, 64) & !0xfff;
        let (register, other) = (self.wide(self.random.clone().below(4)), self.any_register());
        self.move_to(register, base);
        self.push(with(Instruction::with1(write, register)));
        let at = self.random.below(0x1000);
        let memory = MemoryOperand::new(Register::None, Register::None, 1, at as i64, 4, false, segment);
        let access = match self.random.below(3) {
            0 => Instruction::with2(Code::Mov_r64_rm64, other, memory),
            1 => Instruction::with2(Code::Add_rm64_r64, memory, other),
            _ => Instruction::with1(Code::Push_rm64, memory),
        };
        let access = with(access);
        if access.op0_kind() != OpKind::Register || other.full_register() != Register::RSP {
            self.push(access);
        }
        self.move_to(register, usual);
        self.push(with(Instruction::with1(write, register)));
    }

    fn move_to(&mut self, register: Register, value: u64) {
        let bits = self.bits();
        self.items.push(Item::Plain(mov(bits, register, value)));
    }

    /// Gives registers the values with which an instruction's operands lie in the data window.
    fn set_up(&mut self, instruction: &Instruction, fixed_index: Option<u64>) {
        let bits = self.bits();
        if instruction.is_string_instruction() {
            let (from, mut to) = (target(&mut self.random, bits), target(&mut self.random, bits));
            if self.random.percent(30) {
                to = from.wrapping_add(self.random.below(65)).wrapping_sub(32);
            }
            self.move_to(Register::RSI, from);
            self.move_to(Register::RDI, to);
            if instruction.has_rep_prefix() || instruction.has_repne_prefix() {
                let count = match self.random.below(10) {
                    0 => self.random.below(0x3000),
                    1 => 0,
                    _ => self.random.below(40),
                };
                self.move_to(Register::RCX, count);
            }
            return;
        }
        match instruction.mnemonic() {
            Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu => {
                let to = target(&mut self.random, bits);
                self.move_to(Register::RDI, to);
            }
            Mnemonic::Leave => {
                let frame = self.stack_address();
                self.move_to(Register::RBP, frame);
            }
            Mnemonic::Div | Mnemonic::Idiv => self.move_to(Register::RDX, 0),
            _ => {}
        }
        if !(0..instruction.op_count()).any(|o| instruction.op_kind(o) == OpKind::Memory) {
            return;
        }
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        let mut linear = target(&mut self.random, bits);
        let atomic = instruction.has_lock_prefix()
            || matches!(instruction.mnemonic(), Mnemonic::Xchg | Mnemonic::Cmpxchg16b | Mnemonic::Cmpxchg8b);
        if atomic && WRITABLE.contains(&linear) {
            // Accesses across cache lines with LOCK are slow, and fatal on some hosts.
            linear &= !15;
        }
        let segment = match instruction.memory_segment() {
            Register::GS if bits == 64 => GS_BASE,
            Register::FS => FS_BASE,
            _ => 0,
        };
        let mut missing = linear.wrapping_sub(segment).wrapping_sub(instruction.memory_displacement64());
        if index.is_gpr() && index.size() > 2 {
            let value = fixed_index.unwrap_or_else(|| self.random.below(64));
            self.move_to(index, value);
            missing = missing.wrapping_sub(value * u64::from(instruction.memory_index_scale()));
        }
        if instruction.is_vsib() {
            let (code, count) = if instruction.is_vsib32() {
                (Code::VEX_Vpsrld_ymm_ymm_imm8, 23)
            } else {
                (Code::VEX_Vpsrlq_ymm_ymm_imm8, 55)
            };
            let index = Register::YMM0 + index.number() as u32;
            self.items.push(Item::Plain(with(Instruction::with3(code, index, index, count))));
        }
        if let Some(mask) = element_mask(instruction)
            && self.random.percent(40)
        {
            // Every element.
            let code = Code::VEX_Vpcmpeqd_ymm_ymm_ymmm256;
            self.items.push(Item::Plain(with(Instruction::with3(code, mask, mask, mask))));
        }
        if base.is_gpr() && base.size() > 2 {
            let value = if base.size() == 4 { missing & 0xffff_ffff } else { missing };
            self.move_to(base, value);
        }
    }

    /// After an instruction that leaves flags undefined: one that reads only those it defines, then one that sets all.
    fn define_flags(&mut self, instruction: &Instruction) {
        let mut undefined = instruction.rflags_undefined();
        if matches!(instruction.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr) {
            // Of a rotation by one modulo the width, OF is what it is in the processor.
            undefined |= RflagsBits::OF;
        }
        let logic =
            matches!(instruction.mnemonic(), Mnemonic::And | Mnemonic::Or | Mnemonic::Xor | Mnemonic::Test);
        if undefined == 0 || logic {
            return;
        }
        for _ in 0..2 {
            let code = self.random.pick(&self.forms.setcc);
            let mut consumer = Instruction::default();
            consumer.set_code(code);
            if consumer.rflags_read() & undefined == 0 {
                self.one(code, false);
            }
        }
        let (a, b) = (self.any_register(), self.any_register());
        let code = match self.random.below(2) {
            0 => self.by_bits(Code::Cmp_r64_rm64, Code::Cmp_r32_rm32),
            _ => self.by_bits(Code::Add_r64_rm64, Code::Add_r32_rm32),
        };
        let a = if a.full_register() == Register::RSP { self.wide(0) } else { a };
        self.push(with(Instruction::with2(code, a, b)));
    }

    /// A random encoding of a form; without a memory operand unless `memory`.
    fn one(&mut self, code: Code, memory: bool) {
        let form = Form { code, bitness: self.bits() };
        for _ in 0..20 {
            let Some(encoding) = forms::encoding(form, &mut self.random) else { return };
            let instruction = encoding.instruction;
            let in_memory = (0..instruction.op_count()).any(|o| instruction.op_kind(o) == OpKind::Memory);
            let stack = instruction.op0_kind() == OpKind::Register
                && instruction.op0_register().full_register() == Register::RSP;
            if in_memory && !memory || stack {
                continue;
            }
            if in_memory {
                self.set_up(&instruction, encoding.fixed_index);
            }
            self.push(instruction);
            return;
        }
    }

    /// An arithmetic instruction on registers, also on the high bytes.
    fn register_step(&mut self) {
        let codes = [
            Code::Add_rm8_r8,
            Code::Sub_r8_rm8,
            Code::Adc_rm8_r8,
            Code::Sbb_r16_rm16,
            Code::Adc_r32_rm32,
            Code::Cmp_rm32_r32,
            Code::Xor_r32_rm32,
            Code::Inc_rm8,
            Code::Dec_rm32,
            Code::Neg_rm16,
            Code::Xadd_rm32_r32,
            Code::Xchg_rm8_r8,
            Code::Cmpxchg_rm32_r32,
            Code::Lea_r32_m,
            Code::Movzx_r32_rm8,
            Code::Bswap_r32,
            Code::Mov_r8_rm8,
        ];
        let wide = [
            Code::Add_r64_rm64,
            Code::Sbb_rm64_r64,
            Code::Adc_r64_rm64,
            Code::Lea_r64_m,
            Code::Xadd_rm64_r64,
            Code::Xchg_rm64_r64,
            Code::Mov_r64_rm64,
            Code::Neg_rm64,
        ];
        let code = if self.bits() == 64 && self.random.percent(40) {
            self.random.pick(&wide)
        } else {
            self.random.pick(&codes)
        };
        let memory = self.random.percent(30) || format!("{code:?}").starts_with("Lea");
        self.one(code, memory);
    }

    /// A comparison, then accesses to memory that leave flags alone, and may change what was compared, then what reads flags.
    fn flags_across_accesses(&mut self) {
        let mut comparisons = vec![
            Code::Cmp_r32_rm32,
            Code::Cmp_rm8_r8,
            Code::Cmp_rm32_imm8,
            Code::Cmp_rm16_r16,
            Code::Test_rm32_r32,
            Code::Test_rm8_imm8,
            Code::And_r32_rm32,
            Code::Sub_r32_rm32,
            Code::Dec_rm32,
            Code::Neg_rm32,
            Code::Add_r8_rm8,
            Code::Xor_r32_rm32,
        ];
        let mut accesses = vec![
            Code::Mov_r32_rm32,
            Code::Mov_rm32_r32,
            Code::Mov_r8_rm8,
            Code::Mov_rm8_r8,
            Code::Movzx_r32_rm8,
            Code::Lea_r32_m,
            Code::Movups_xmm_xmmm128,
        ];
        if self.bits() == 64 {
            comparisons.extend([Code::Cmp_r64_rm64, Code::Test_rm64_r64, Code::Cmp_rm64_imm32]);
            accesses.extend([Code::Mov_r64_rm64, Code::Mov_rm64_r64, Code::Mov_rm64_imm32]);
        }
        let comparison = self.random.pick(&comparisons);
        let in_memory = self.random.percent(30);
        self.one(comparison, in_memory);
        for _ in 0..1 + self.random.below(3) {
            if self.random.percent(20) {
                let register = self.any_register();
                let code = self.by_bits(Code::Push_r64, Code::Push_r32);
                self.push(with(Instruction::with1(code, register)));
            } else {
                let access = self.random.pick(&accesses);
                self.one(access, true);
            }
        }
        for _ in 0..1 + self.random.below(2) {
            self.flags_consumer();
        }
    }

    fn flags_consumer(&mut self) {
        let code = match self.random.below(8) {
            0 => Code::Lahf,
            1 => {
                self.push_flags();
                return;
            }
            2 | 3 => self.random.pick(&self.forms.cmov),
            _ => self.random.pick(&self.forms.setcc),
        };
        self.one(code, self.random.clone().percent(40));
    }

    fn push_flags(&mut self) {
        let code = self.by_bits(Code::Pushfq, Code::Pushfd);
        self.push(Instruction::with(code));
    }

    fn stack_address(&mut self) -> u64 {
        WRITABLE.start + 0x400 + (self.random.below(0x1800) & !7)
    }

    fn stack_step(&mut self) {
        match self.random.below(12) {
            0 => {
                let at = match self.random.below(8) {
                    0 => WRITABLE.end - self.random.below(16),
                    1 => WRITABLE.start + self.random.below(16),
                    2 => WRITABLE.start + PAGE - 4,
                    _ => self.stack_address(),
                };
                self.move_to(Register::RSP, at);
            }
            1..5 => {
                let register = self.any_register();
                let code = self.by_bits(Code::Push_r64, Code::Push_r32);
                self.push(with(Instruction::with1(code, register)));
            }
            5..8 => {
                let register = self.any_register();
                let code = self.by_bits(Code::Pop_r64, Code::Pop_r32);
                if register.full_register() != Register::RSP || self.random.percent(10) {
                    self.push(with(Instruction::with1(code, register)));
                }
            }
            8 => self.push_flags(),
            9 => {
                // Sometimes it traps after the next instruction, which leaves no flag undefined.
                let mut flags = self.random.next() as i32 & 0xcd5 | 2;
                for flag in [rflags::AC, rflags::NT, rflags::ID] {
                    if self.random.percent(15) {
                        flags |= flag as i32;
                    }
                }
                let step = self.random.percent(25);
                if step {
                    flags |= rflags::TF as i32;
                }
                let push = self.by_bits(Code::Pushq_imm32, Code::Pushd_imm32);
                let pop = self.by_bits(Code::Popfq, Code::Popfd);
                self.items.push(Item::Plain(with(Instruction::with1(push, flags))));
                self.push(Instruction::with(pop));
                if step {
                    self.register_step();
                }
            }
            10 => {
                let value = self.random.integer() as i32;
                let code = self.by_bits(Code::Pushq_imm32, Code::Pushd_imm32);
                self.push(with(Instruction::with1(code, value)));
            }
            _ => {
                let code = if self.random.percent(50) {
                    self.by_bits(Code::Push_rm64, Code::Push_rm32)
                } else {
                    self.by_bits(Code::Pop_rm64, Code::Pop_rm32)
                };
                self.one(code, true);
            }
        }
    }
}

/// The register whose elements say which elements are accessed, as one of 32 bytes.
fn element_mask(instruction: &Instruction) -> Option<Register> {
    use Mnemonic::*;
    let operand = match instruction.mnemonic() {
        Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq => 1,
        _ if instruction.is_vsib() => 2,
        _ => return None,
    };
    Some(Register::YMM0 + instruction.op_register(operand).number() as u32)
}

/// What a program starts with.
pub struct Start {
    pub gpr: [u64; 16],
    pub rflags: u64,
    /// XSAVE image in standard form.
    pub xsave: Vec<u8>,
}

/// The registers for a seed, and what is in the data window.
pub fn start(mode: Mode, seed: u64, data: &mut [u8]) -> Start {
    let mut random = Random::new(seed ^ 0x5eed_5eed_5eed_5eed);
    random.fill(data);
    for chunk in data.chunks_mut(32).step_by(3) {
        random.lanes(chunk);
    }
    let mut gpr = [0; 16];
    for register in &mut gpr {
        *register = if random.percent(35) { target(&mut random, mode.bits) } else { random.integer() };
    }
    gpr[4] = WRITABLE.start + 0x400 + (random.below(0x1800) & !7);
    if mode.bits == 32 {
        gpr.iter_mut().for_each(|register| *register &= 0xffff_ffff);
        gpr[8..].fill(0);
    }
    let rflags = random.next() & 0x8d5 | 2;
    let mut image = vec![0u8; xsave::MAX_BYTES];
    image[0..2].copy_from_slice(&(0x37f ^ random.pick(&[0u16, 0, 0x400, 0x800, 0x300])).to_le_bytes());
    let rounding: u32 = random.pick(&[0, 0, 0, 0x2000, 0x4000, 0x8040]);
    let unmasked = if random.percent(8) { random.next() as u32 & 0x1f80 } else { 0 };
    image[24..28].copy_from_slice(&(0x1f80 & !unmasked | rounding).to_le_bytes());
    for number in 0..8 {
        let value = random.extended();
        image[32 + 16 * number..][..10].copy_from_slice(&value);
    }
    image[4] = random.pick(&[0, 0xff, 0x55]);
    random.lanes(&mut image[160..288]);
    random.lanes(&mut image[288..416]);
    image[xsave::XSTATE_BV] = 7;
    random.lanes(&mut image[576..832]);
    Start { gpr, rflags, xsave: image }
}
