//! Which instruction forms there are, and random encodings of each.

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, Encoder, EncodingKind, Instruction, Mnemonic,
    OpCodeOperandKind, OpKind, Register,
};

use super::inputs::{GATHER_ORIGIN, is_xsave, target};
use super::state::*;
use super::values::Random;

/// Why a form is not tested here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Skip {
    /// The CPU model does not show it.
    NotInModel,
    /// The host lacks it, so there is nothing to compare with.
    HostLacks,
    /// Reads a clock, a random number, or what describes the processor, or calls the kernel.
    Environment,
    /// Needs descriptor tables of the guest's own.
    Segments,
    /// Would take the host's thread-local storage away.
    HostThread,
    /// The generator has no encoding for it.
    NoEncoding,
}

impl Skip {
    pub fn reason(self) -> &'static str {
        match self {
            Skip::NotInModel => "not in the CPU model",
            Skip::HostLacks => "the host processor lacks it",
            Skip::Environment => "depends on the environment or calls the kernel",
            Skip::Segments => "needs descriptor tables",
            Skip::HostThread => "would disturb the host thread",
            Skip::NoEncoding => "no encoding found",
        }
    }
}

/// An instruction form in one mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    pub code: Code,
    pub bitness: u32,
}

/// Every form of a mode that the CPU model shows, and whether it can be tested.
pub fn forms(bitness: u32) -> Vec<(Form, Result<(), Skip>)> {
    Code::values()
        .filter(|code| {
            let op_code = code.op_code();
            op_code.is_instruction()
                && match bitness {
                    16 => op_code.mode16(),
                    32 => op_code.mode32(),
                    _ => op_code.mode64(),
                }
        })
        .map(|code| (Form { code, bitness }, testable(code)))
        .collect()
}

fn testable(code: Code) -> Result<(), Skip> {
    use Mnemonic::*;
    let op_code = code.op_code();
    if !matches!(op_code.encoding(), EncodingKind::Legacy | EncodingKind::VEX) {
        return Err(Skip::NotInModel);
    }
    let amd_only = vendor() == DecoderOptions::AMD && op_code.amd_decoder64();
    if !op_code.intel_decoder64() && !op_code.intel_decoder32() && !op_code.amd_decoder32() && !amd_only {
        return Err(Skip::NotInModel);
    }
    for feature in code.cpuid_features() {
        match host_has(*feature) {
            None => return Err(Skip::NotInModel),
            Some(false) => return Err(Skip::HostLacks),
            Some(true) => {}
        }
    }
    if op_code.decoder_option() != DecoderOptions::NONE {
        return Err(Skip::NotInModel);
    }
    match code.mnemonic() {
        Rdtsc | Rdtscp | Rdpmc | Rdpid | Cpuid | Xgetbv | Syscall | Sysenter | Sysret | Sysexit | Int
        | Int1 => {
            return Err(Skip::Environment);
        }
        Sldt | Str | Smsw | Sgdt | Sidt | Lar | Lsl | Verr | Verw | Arpl | Lds | Les | Lfs | Lgs | Lss
        | Retf | Iret | Iretd | Iretq => return Err(Skip::Segments),
        Rdfsbase | Wrfsbase | Wrgsbase => return Err(Skip::HostThread),
        // What these leave out is what the processor has seen since some earlier XRSTOR.
        Xsavec | Xsavec64 | Xsaveopt | Xsaveopt64 => return Err(Skip::Environment),
        _ => {}
    }
    let far = matches!(code, Code::Jmp_m1616 | Code::Jmp_m1632 | Code::Jmp_m1664)
        || matches!(code, Code::Call_m1616 | Code::Call_m1632 | Code::Call_m1664);
    let loads_segment = op_code.op_kinds().first().is_some_and(|kind| {
        let fixed = matches!(
            kind,
            OpCodeOperandKind::es
                | OpCodeOperandKind::cs
                | OpCodeOperandKind::ss
                | OpCodeOperandKind::ds
                | OpCodeOperandKind::fs
                | OpCodeOperandKind::gs
        );
        *kind == OpCodeOperandKind::seg_reg || (fixed && code.mnemonic() == Pop)
    });
    let far_operand = op_code
        .op_kinds()
        .iter()
        .any(|kind| matches!(kind, OpCodeOperandKind::farbr2_2 | OpCodeOperandKind::farbr4_2));
    if far || loads_segment || far_operand {
        return Err(Skip::Segments);
    }
    Ok(())
}

/// Whether the host has an extension; `None` if the CPU model never shows it.
fn host_has(feature: CpuidFeature) -> Option<bool> {
    use std::arch::is_x86_feature_detected as has;
    Some(match feature {
        CpuidFeature::INTEL8086
        | CpuidFeature::INTEL8086_ONLY
        | CpuidFeature::INTEL186
        | CpuidFeature::INTEL286
        | CpuidFeature::INTEL386
        | CpuidFeature::INTEL486
        | CpuidFeature::X64
        | CpuidFeature::CPUID
        | CpuidFeature::CX8
        | CpuidFeature::CMOV
        | CpuidFeature::FPU
        | CpuidFeature::FPU287
        | CpuidFeature::FPU387
        | CpuidFeature::MMX
        | CpuidFeature::SSE
        | CpuidFeature::SSE2
        | CpuidFeature::CLFSH
        | CpuidFeature::MULTIBYTENOP
        | CpuidFeature::PAUSE
        | CpuidFeature::TSC
        | CpuidFeature::SEP
        | CpuidFeature::SYSCALL
        | CpuidFeature::MSR
        | CpuidFeature::FXSR => true,
        CpuidFeature::ADX => has!("adx"),
        CpuidFeature::AES => has!("aes"),
        CpuidFeature::AVX => has!("avx"),
        CpuidFeature::AVX2 => has!("avx2"),
        CpuidFeature::BMI1 => has!("bmi1"),
        CpuidFeature::BMI2 => has!("bmi2"),
        CpuidFeature::CMPXCHG16B => has!("cmpxchg16b"),
        CpuidFeature::F16C => has!("f16c"),
        CpuidFeature::FMA => has!("fma"),
        CpuidFeature::GFNI => has!("gfni"),
        CpuidFeature::LZCNT => has!("lzcnt"),
        CpuidFeature::MOVBE => has!("movbe"),
        CpuidFeature::PCLMULQDQ => has!("pclmulqdq"),
        CpuidFeature::POPCNT => has!("popcnt"),
        CpuidFeature::PREFETCHW => true,
        CpuidFeature::RDRAND => has!("rdrand"),
        CpuidFeature::RDSEED => has!("rdseed"),
        CpuidFeature::SHA => has!("sha"),
        CpuidFeature::SSE3 => has!("sse3"),
        CpuidFeature::SSSE3 => has!("ssse3"),
        CpuidFeature::SSE4_1 => has!("sse4.1"),
        CpuidFeature::SSE4_2 => has!("sse4.2"),
        CpuidFeature::SSE4A => has!("sse4a"),
        CpuidFeature::VAES => has!("vaes"),
        CpuidFeature::VPCLMULQDQ => has!("vpclmulqdq"),
        CpuidFeature::XSAVE => has!("xsave"),
        CpuidFeature::XSAVEC => has!("xsavec"),
        CpuidFeature::XSAVEOPT => has!("xsaveopt"),
        CpuidFeature::CLFLUSHOPT => cpuid7_ebx(23),
        CpuidFeature::CLWB => cpuid7_ebx(24),
        CpuidFeature::FSGSBASE => cpuid7_ebx(0),
        CpuidFeature::RDTSCP | CpuidFeature::RDPID | CpuidFeature::RDPMC => true,
        _ => return None,
    })
}

fn cpuid7_ebx(bit: u32) -> bool {
    std::arch::x86_64::__cpuid_count(7, 0).ebx & (1 << bit) != 0
}

/// A way to encode a form, at [`CODE_ENTRY`] of the code memory.
pub struct Encoding {
    pub instruction: Instruction,
    pub bytes: Vec<u8>,
    /// For a memory operand without base register: the index has to have this value.
    pub fixed_index: Option<u64>,
}

const ATTEMPTS: usize = 200;

/// A random encoding of `form`.
pub fn encoding(form: Form, random: &mut Random) -> Option<Encoding> {
    (0..ATTEMPTS).find_map(|_| attempt(form, random))
}

fn attempt(form: Form, random: &mut Random) -> Option<Encoding> {
    use OpCodeOperandKind as K;
    let Form { code, bitness } = form;
    let op_code = code.op_code();
    let count = if bitness == 64 { 16 } else { 8 };
    let address_bits = match bitness {
        64 if random.percent(12) => 32,
        32 if random.percent(3) => 16,
        16 if random.percent(25) => 32,
        other => other,
    };
    let mut instruction = Instruction::default();
    instruction.set_code(code);
    let mut fixed_index = None;
    let ip = code_offset(bitness);
    for (operand, kind) in (0u32..).zip(op_code.op_kinds().iter().copied()) {
        let register = |random: &mut Random, first: Register, count: u64| first + random.below(count) as u32;
        let set = |instruction: &mut Instruction, register: Register| {
            instruction.set_op_kind(operand, OpKind::Register);
            instruction.set_op_register(operand, register);
        };
        let mut memory = |instruction: &mut Instruction, random: &mut Random| {
            instruction.set_op_kind(operand, OpKind::Memory);
            fixed_index = address(instruction, bitness, address_bits, random, None);
        };
        let in_memory = random.percent(55);
        match kind {
            K::mem => memory(&mut instruction, random),
            K::mem_offs => {
                instruction.set_op_kind(operand, OpKind::Memory);
                instruction.set_memory_displ_size(address_bits / 8);
                instruction.set_memory_displacement64(target(random, bitness) - data_base(bitness));
            }
            K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y => {
                if address_bits == 16 {
                    return None;
                }
                let ymm = matches!(kind, K::mem_vsib32y | K::mem_vsib64y);
                let first = if ymm { Register::YMM0 } else { Register::XMM0 };
                let index = register(random, first, count);
                instruction.set_op_kind(operand, OpKind::Memory);
                address(&mut instruction, bitness, address_bits, random, Some(index));
            }
            K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::mm_or_mem
            | K::xmm_or_mem
            | K::ymm_or_mem
                if in_memory =>
            {
                memory(&mut instruction, random);
            }
            K::r8_or_mem | K::r8_reg | K::r8_opcode => {
                set(&mut instruction, register(random, Register::AL, if bitness == 64 { 20 } else { 8 }))
            }
            K::r16_or_mem | K::r16_reg | K::r16_rm | K::r16_opcode | K::r16_reg_mem => {
                set(&mut instruction, register(random, Register::AX, count))
            }
            K::r32_or_mem | K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_vvvv | K::r32_reg_mem => {
                set(&mut instruction, register(random, Register::EAX, count))
            }
            K::r64_or_mem | K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_vvvv | K::r64_reg_mem => {
                set(&mut instruction, register(random, Register::RAX, count))
            }
            K::mm_or_mem | K::mm_reg | K::mm_rm => set(&mut instruction, register(random, Register::MM0, 8)),
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => {
                set(&mut instruction, register(random, Register::XMM0, count))
            }
            K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => {
                set(&mut instruction, register(random, Register::YMM0, count))
            }
            K::seg_reg => set(&mut instruction, register(random, Register::ES, 6)),
            K::es => set(&mut instruction, Register::ES),
            K::cs => set(&mut instruction, Register::CS),
            K::ss => set(&mut instruction, Register::SS),
            K::ds => set(&mut instruction, Register::DS),
            K::fs => set(&mut instruction, Register::FS),
            K::gs => set(&mut instruction, Register::GS),
            K::al => set(&mut instruction, Register::AL),
            K::cl => set(&mut instruction, Register::CL),
            K::ax => set(&mut instruction, Register::AX),
            K::dx => set(&mut instruction, Register::DX),
            K::eax => set(&mut instruction, Register::EAX),
            K::rax => set(&mut instruction, Register::RAX),
            K::st0 => set(&mut instruction, Register::ST0),
            K::sti_opcode => set(&mut instruction, register(random, Register::ST0, 8)),
            K::imm8 => {
                let second = (0..operand)
                    .any(|o| matches!(instruction.op_kind(o), OpKind::Immediate8 | OpKind::Immediate16));
                let value = if code.mnemonic() == Mnemonic::Enter {
                    random.pick(&[0, 0, 1, 2, 3, 31, 32, 255])
                } else {
                    random.integer() as u8
                };
                if second {
                    instruction.set_op_kind(operand, OpKind::Immediate8_2nd);
                    instruction.set_immediate8_2nd(value);
                } else {
                    instruction.set_op_kind(operand, OpKind::Immediate8);
                    instruction.set_immediate8(value);
                }
            }
            K::imm8_const_1 => {
                instruction.set_op_kind(operand, OpKind::Immediate8);
                instruction.set_immediate8(1);
            }
            K::imm8sex16 => {
                instruction.set_op_kind(operand, OpKind::Immediate8to16);
                instruction.set_immediate8to16(i16::from(random.integer() as i8));
            }
            K::imm8sex32 => {
                instruction.set_op_kind(operand, OpKind::Immediate8to32);
                instruction.set_immediate8to32(i32::from(random.integer() as i8));
            }
            K::imm8sex64 => {
                instruction.set_op_kind(operand, OpKind::Immediate8to64);
                instruction.set_immediate8to64(i64::from(random.integer() as i8));
            }
            K::imm16 => {
                instruction.set_op_kind(operand, OpKind::Immediate16);
                instruction.set_immediate16(random.integer() as u16);
            }
            K::imm32 => {
                instruction.set_op_kind(operand, OpKind::Immediate32);
                instruction.set_immediate32(random.integer() as u32);
            }
            K::imm32sex64 => {
                instruction.set_op_kind(operand, OpKind::Immediate32to64);
                instruction.set_immediate32to64(i64::from(random.integer() as i32));
            }
            K::imm64 => {
                instruction.set_op_kind(operand, OpKind::Immediate64);
                instruction.set_immediate64(random.integer());
            }
            K::seg_rSI => instruction.set_op_kind(
                operand,
                by_bits(address_bits, [OpKind::MemorySegSI, OpKind::MemorySegESI, OpKind::MemorySegRSI]),
            ),
            K::es_rDI => instruction.set_op_kind(
                operand,
                by_bits(address_bits, [OpKind::MemoryESDI, OpKind::MemoryESEDI, OpKind::MemoryESRDI]),
            ),
            K::seg_rDI => instruction.set_op_kind(
                operand,
                by_bits(address_bits, [OpKind::MemorySegDI, OpKind::MemorySegEDI, OpKind::MemorySegRDI]),
            ),
            K::seg_rBX_al => {
                instruction.set_op_kind(operand, OpKind::Memory);
                let base = by_bits(address_bits, [Register::BX, Register::EBX, Register::RBX]);
                instruction.set_memory_base(base);
                instruction.set_memory_index(Register::AL);
            }
            K::br16_1 | K::br16_2 => {
                instruction.set_op_kind(operand, OpKind::NearBranch16);
                instruction.set_near_branch16(ip.wrapping_add(random.below(200)).wrapping_sub(100) as u16);
            }
            K::br32_1 | K::br32_4 => {
                instruction.set_op_kind(operand, OpKind::NearBranch32);
                instruction.set_near_branch32(branch_target(ip, kind == K::br32_4, random) as u32);
            }
            K::br64_1 | K::br64_4 => {
                instruction.set_op_kind(operand, OpKind::NearBranch64);
                instruction.set_near_branch64(branch_target(ip, kind == K::br64_4, random));
            }
            _ => return None,
        }
    }
    let explicit_memory = (0..instruction.op_count()).any(|o| instruction.op_kind(o) == OpKind::Memory);
    if op_code.can_use_lock_prefix() && instruction.op0_kind() == OpKind::Memory && random.percent(35) {
        instruction.set_has_lock_prefix(true);
    }
    if op_code.can_use_rep_prefix() && random.percent(40) {
        instruction.set_has_rep_prefix(true);
    } else if op_code.can_use_repne_prefix() && random.percent(40) {
        instruction.set_has_repne_prefix(true);
    }
    if explicit_memory && random.percent(8) {
        // Those that name flat segments in 32-bit code; GS has a base of its own in 64-bit code.
        let choice = match bitness {
            64 => random.pick(&[Register::GS, Register::GS, Register::DS, Register::ES, Register::SS]),
            _ => random.pick(&[Register::DS, Register::ES, Register::SS]),
        };
        instruction.set_segment_prefix(choice);
    }
    if is_xsave(&instruction) {
        // EDX:EAX is not free to be part of the address.
        let parts = [instruction.memory_base(), instruction.memory_index()];
        if parts.iter().any(|part| matches!(part.full_register(), Register::RAX | Register::RDX)) {
            return None;
        }
    }
    let mut encoder = Encoder::new(bitness);
    encoder.encode(&instruction, ip).ok()?;
    let bytes = encoder.take_buffer();
    let decoded = Decoder::with_ip(bitness, &bytes, ip, vendor()).decode();
    (decoded.code() == code && decoded.len() == bytes.len()).then_some(Encoding {
        instruction: decoded,
        bytes,
        fixed_index,
    })
}

fn by_bits<T>(bits: u32, [a, b, c]: [T; 3]) -> T {
    match bits {
        16 => a,
        32 => b,
        _ => c,
    }
}

/// How the host's vendor decodes: near branches with an operand-size prefix are 16 bits wide in 64-bit code on AMD's
/// processors, and the prefix means nothing on Intel's.
fn vendor() -> u32 {
    // SAFETY: CPUID exists on every x86-64 processor. (The call is safe on recent compilers.)
    #[allow(unused_unsafe)]
    let amd = unsafe { core::arch::x86_64::__cpuid(0) }.ebx == u32::from_le_bytes(*b"Auth");
    if amd { DecoderOptions::AMD } else { DecoderOptions::NONE }
}

/// Offset in CS of the instruction.
pub fn code_offset(bitness: u32) -> u64 {
    CODE + CODE_ENTRY - code_base(bitness)
}

fn branch_target(ip: u64, far: bool, random: &mut Random) -> u64 {
    match random.below(10) {
        0 if far => ip.wrapping_add(random.next() as i32 as u64 / 2),
        1..=5 if far => ip - CODE_ENTRY + random.below(CODE_BYTES as u64),
        _ => ip.wrapping_add(random.below(240)).wrapping_sub(110),
    }
}

/// Chooses base, index, scale and displacement. Without a base the whole address is decided here; returned is then what
/// the index must be.
fn address(
    instruction: &mut Instruction,
    bitness: u32,
    address_bits: u32,
    random: &mut Random,
    vector_index: Option<Register>,
) -> Option<u64> {
    if address_bits == 16 {
        let base = random.pick(&[Register::BX, Register::BP]);
        let index = random.pick(&[Register::None, Register::SI, Register::DI]);
        instruction.set_memory_base(base);
        instruction.set_memory_index(index);
        displacement(instruction, random, base, 2);
        return None;
    }
    let count = if bitness == 64 { 16 } else { 8 };
    let first = if address_bits == 64 { Register::RAX } else { Register::EAX };
    let base = first + random.below(count) as u32;
    let mut index = vector_index.unwrap_or(Register::None);
    if vector_index.is_none() && random.percent(40) {
        index = first + random.below(count) as u32;
        if index == first + 4 || index == base {
            index = Register::None;
        }
    }
    let scale = if index == Register::None { 1 } else { 1 << random.below(4) };
    instruction.set_memory_index(index);
    instruction.set_memory_index_scale(scale);
    if vector_index.is_some() && random.percent(10) {
        instruction.set_memory_displ_size(address_bits / 8);
        instruction.set_memory_displacement64(GATHER_ORIGIN - data_base(bitness));
        return None;
    }
    if random.percent(80) || vector_index.is_some() {
        instruction.set_memory_base(base);
        displacement(instruction, random, base, address_bits / 8);
        return None;
    }
    // Absolute, with an index or alone, or relative to RIP.
    let at = target(random, bitness) - data_base(bitness);
    let index_value = random.below(64);
    instruction.set_memory_displ_size(address_bits / 8);
    if index == Register::None {
        instruction.set_memory_displacement64(at);
        if bitness == 64 && random.percent(70) {
            instruction.set_memory_base(if address_bits == 64 { Register::RIP } else { Register::EIP });
        }
        return None;
    }
    instruction.set_memory_displacement64(at.wrapping_sub(index_value * u64::from(scale)));
    Some(index_value)
}

fn displacement(instruction: &mut Instruction, random: &mut Random, base: Register, full_bytes: u32) {
    let needs_one =
        matches!(base, Register::BP | Register::EBP | Register::RBP | Register::R13 | Register::R13D);
    match random.below(3) {
        0 if !needs_one => {}
        2 => {
            instruction.set_memory_displ_size(full_bytes);
            let value = random.integer() as i32 as i64 as u64;
            let value = match full_bytes {
                2 => value & 0xffff,
                4 => value & 0xffff_ffff,
                _ => value,
            };
            instruction.set_memory_displacement64(value);
        }
        _ => {
            instruction.set_memory_displ_size(1);
            let value = random.next() as i8 as i64 as u64;
            let value = match full_bytes {
                2 => value & 0xffff,
                4 => value & 0xffff_ffff,
                _ => value,
            };
            instruction.set_memory_displacement64(value);
        }
    }
}
