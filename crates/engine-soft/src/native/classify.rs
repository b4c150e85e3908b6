//! Which instructions run natively, and what of the register file each needs.

use iced_x86::{
    Code, CpuidFeature, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    OpCodeOperandKind, OpCodeTableKind, OpKind, Register,
};

use super::{CompileError, MemoryUse};
use crate::user::status;

/// Number of RSP among the general-purpose registers.
const RSP: usize = 4;

/// Everything that the emitter has to know of an instruction.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    /// The instruction as it will be executed: 64-bit form, memory operand `[pointer]`, RSP renamed.
    pub instruction: Instruction,
    /// Host register of the memory operand.
    pub pointer: Option<Register>,
    /// Host register for the address of the register file.
    pub base: Register,
    /// Host register that stands for the guest's RSP.
    pub stack_alias: Register,
    /// General-purpose registers to load, a bit each.
    pub gpr_loads: u16,
    /// General-purpose registers to store.
    pub gpr_stores: u16,
    /// Vector registers to load.
    pub vector_loads: u16,
    /// Vector registers to store.
    pub vector_stores: u16,
    /// VEX-encoded: vector registers are moved at 256 bits.
    pub wide: bool,
    /// Uses x87 or MMX registers.
    pub x87: bool,
    /// Records the instruction in FIP and FOP.
    pub x87_pointers: bool,
    /// Depends on or changes MXCSR.
    pub mxcsr: bool,
    /// Reads or changes any status flag.
    pub flags: bool,
    /// Changes any status flag.
    pub flags_stored: bool,
    /// For bit-string instructions: the source register, to be reduced modulo the operand size.
    pub bit_offset: Option<BitOffset>,
    /// What happens to the memory operand.
    pub memory: MemoryUse,
    /// Its size.
    pub memory_bytes: u16,
    /// What its address has to be a multiple of.
    pub alignment_bytes: u8,
    /// Reports a pending x87 exception first.
    pub x87_waits: bool,
}

/// The bit offset of BT, BTS, BTR or BTC with a memory operand.
#[derive(Clone, Copy, Debug)]
pub(super) struct BitOffset {
    /// Number of the guest register.
    pub number: usize,
    /// One less than the operand size in bits.
    pub mask: u32,
}

/// Finds out how to execute `original` natively.
pub(super) fn classify(
    factory: &mut InstructionInfoFactory,
    original: &Instruction,
) -> Result<Shape, CompileError> {
    let unsupported = || CompileError::Unsupported(original.code());
    let mut instruction = *original;
    instruction.set_code(long_mode_code(original.code()).ok_or_else(unsupported)?);
    if !is_native(&instruction) {
        return Err(unsupported());
    }
    // Meaningless without transactional memory, and not to be offered to a host that has it.
    instruction.set_has_rep_prefix(false);
    instruction.set_has_repne_prefix(false);

    let memory_operand = (0..instruction.op_count()).find(|i| instruction.op_kind(*i) == OpKind::Memory);
    if memory_operand.is_some() {
        instruction.set_segment_prefix(Register::None);
        instruction.set_memory_base(Register::None);
        instruction.set_memory_index(Register::None);
        instruction.set_memory_index_scale(1);
        instruction.set_memory_displacement64(0);
        instruction.set_memory_displ_size(0);
    }

    let info = factory.info(&instruction);
    let (mut gpr_loads, mut gpr_stores) = (0u16, 0u16);
    let (mut vector_loads, mut vector_stores) = (0u16, 0u16);
    for used in info.used_registers() {
        let register = used.register();
        // AH to BH have numbers of their own.
        let bit = 1u16 << (register.full_register().number() & 15);
        let (loads, stores) = if register.is_gpr() {
            (&mut gpr_loads, &mut gpr_stores)
        } else if register.is_vector_register() {
            (&mut vector_loads, &mut vector_stores)
        } else {
            continue;
        };
        *loads |= bit;
        if writes(used.access()) {
            *stores |= bit;
        }
    }
    let (memory, memory_bytes) = match memory_operand {
        None => (MemoryUse::None, 0),
        Some(operand) => memory_use(&instruction, info.op_access(operand)),
    };

    let modified = instruction.rflags_modified() & status::ICED;
    let wide = instruction.op_code().encoding() == EncodingKind::VEX;
    if wide && vector_loads != 0 && !is_x86_feature_detected!("avx") {
        // The registers could not even be loaded.
        return Err(unsupported());
    }
    let x87_opcode = is_x87_opcode(&instruction);
    let bit_offset = bit_offset_register(&instruction)
        .map(|r| BitOffset { number: r.number(), mask: r.size() as u32 * 8 - 1 });

    // Registers of the thunk's own. Without a REX prefix, which AH to BH exclude, only the low eight can be named.
    let legacy_only = (0..instruction.op_count())
        .any(|i| instruction.op_kind(i) == OpKind::Register && is_high_byte(instruction.op_register(i)));
    let named = gpr_loads & !(1 << RSP);
    let mut taken = named;
    let mut take = |candidates: &[Register]| {
        let free = candidates.iter().copied().find(|r| taken & (1 << r.number()) == 0)?;
        taken |= 1 << free.number();
        Some(free)
    };
    let low = [Register::RSI, Register::RCX, Register::RDX, Register::RBX, Register::RBP];
    let any = [
        Register::RSI,
        Register::R8,
        Register::R9,
        Register::R10,
        Register::R11,
        Register::RBX,
        Register::R12,
        Register::R13,
        Register::R14,
    ];
    let candidates: &[Register] = if legacy_only { &low } else { &any };
    let pointer = match memory_operand {
        Some(_) => Some(take(candidates).ok_or_else(unsupported)?),
        None => None,
    };
    let stack_alias =
        if gpr_loads & (1 << RSP) != 0 { take(candidates).ok_or_else(unsupported)? } else { Register::RSP };
    let base = take(&[
        Register::RDI,
        Register::R8,
        Register::R9,
        Register::R10,
        Register::R11,
        Register::R12,
        Register::R13,
    ])
    .ok_or_else(unsupported)?;

    if let Some(pointer) = pointer {
        instruction.set_memory_base(pointer);
    }
    for operand in 0..instruction.op_count() {
        if instruction.op_kind(operand) == OpKind::Register {
            let renamed = rename_stack_pointer(instruction.op_register(operand), stack_alias);
            instruction.set_op_register(operand, renamed);
        }
    }

    Ok(Shape {
        instruction,
        pointer,
        base,
        stack_alias,
        gpr_loads,
        gpr_stores,
        vector_loads,
        vector_stores,
        wide,
        x87: x87_opcode || uses_mmx(&instruction),
        x87_pointers: x87_opcode && !is_x87_control(instruction.mnemonic()),
        mxcsr: uses_mxcsr(&instruction, memory_operand.is_some()),
        flags: (modified | instruction.rflags_read()) & status::ICED != 0,
        flags_stored: modified != 0,
        bit_offset,
        memory,
        memory_bytes,
        alignment_bytes: alignment_bytes(&instruction, memory, memory_bytes),
        x87_waits: (x87_opcode && !instruction.op_code().is_fpu_no_wait())
            || names_mmx_register(&instruction),
    })
}

/// The same instruction in a form that 64-bit code has.
pub fn long_mode_code(code: Code) -> Option<Code> {
    Some(match code {
        Code::Inc_r16 => Code::Inc_rm16,
        Code::Inc_r32 => Code::Inc_rm32,
        Code::Dec_r16 => Code::Dec_rm16,
        Code::Dec_r32 => Code::Dec_rm32,
        Code::Add_rm8_imm8_82 => Code::Add_rm8_imm8,
        Code::Or_rm8_imm8_82 => Code::Or_rm8_imm8,
        Code::Adc_rm8_imm8_82 => Code::Adc_rm8_imm8,
        Code::Sbb_rm8_imm8_82 => Code::Sbb_rm8_imm8,
        Code::And_rm8_imm8_82 => Code::And_rm8_imm8,
        Code::Sub_rm8_imm8_82 => Code::Sub_rm8_imm8,
        Code::Xor_rm8_imm8_82 => Code::Xor_rm8_imm8,
        Code::Cmp_rm8_imm8_82 => Code::Cmp_rm8_imm8,
        Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
        Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
        Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
        Code::Mov_RAX_moffs64 => Code::Mov_r64_rm64,
        Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
        Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
        Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
        Code::Mov_moffs64_RAX => Code::Mov_rm64_r64,
        _ if code.op_code().mode64() => code,
        _ => return None,
    })
}

/// Whether thunks execute instructions of this kind.
pub fn is_native(instruction: &Instruction) -> bool {
    let op_code = instruction.op_code();
    if !matches!(op_code.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
        || instruction.is_privileged()
        || op_code.is_input_output()
        || instruction.is_stack_instruction()
        || instruction.is_vsib()
    {
        return false;
    }
    let operands_fit = (0..instruction.op_count()).all(|i| match instruction.op_kind(i) {
        OpKind::Register => {
            let register = instruction.op_register(i);
            register.is_gpr()
                || register.is_xmm()
                || register.is_ymm()
                || register.is_mm()
                || register.is_st()
        }
        OpKind::Memory
        | OpKind::Immediate8
        | OpKind::Immediate8_2nd
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => true,
        _ => false,
    });
    operands_fit
        && instruction.cpuid_features().iter().all(|feature| match feature {
            CpuidFeature::INTEL8086
            | CpuidFeature::INTEL186
            | CpuidFeature::INTEL286
            | CpuidFeature::INTEL386
            | CpuidFeature::INTEL486
            | CpuidFeature::X64 => is_native_integer(instruction.mnemonic()),
            other => is_native_extension(*other) && !is_masked_move(instruction.mnemonic()),
        })
}

/// Instruction-set extensions that consist of user-mode computation.
fn is_native_extension(feature: CpuidFeature) -> bool {
    matches!(
        feature,
        CpuidFeature::ADX
            | CpuidFeature::AES
            | CpuidFeature::AVX
            | CpuidFeature::AVX2
            | CpuidFeature::AVX_IFMA
            | CpuidFeature::AVX_NE_CONVERT
            | CpuidFeature::AVX_VNNI
            | CpuidFeature::AVX_VNNI_INT8
            | CpuidFeature::AVX_VNNI_INT16
            | CpuidFeature::BMI1
            | CpuidFeature::BMI2
            | CpuidFeature::CLDEMOTE
            | CpuidFeature::CLFLUSHOPT
            | CpuidFeature::CLFSH
            | CpuidFeature::CLWB
            | CpuidFeature::CMOV
            | CpuidFeature::CMPXCHG16B
            | CpuidFeature::CX8
            | CpuidFeature::F16C
            | CpuidFeature::FMA
            | CpuidFeature::FPU
            | CpuidFeature::FPU287
            | CpuidFeature::FPU387
            | CpuidFeature::GFNI
            | CpuidFeature::LZCNT
            | CpuidFeature::MMX
            | CpuidFeature::MOVBE
            | CpuidFeature::MOVDIRI
            | CpuidFeature::MULTIBYTENOP
            | CpuidFeature::PAUSE
            | CpuidFeature::PCLMULQDQ
            | CpuidFeature::POPCNT
            | CpuidFeature::PREFETCHW
            | CpuidFeature::PREFETCHWT1
            | CpuidFeature::RDRAND
            | CpuidFeature::RDSEED
            | CpuidFeature::SHA
            | CpuidFeature::SHA512
            | CpuidFeature::SM3
            | CpuidFeature::SM4
            | CpuidFeature::SSE
            | CpuidFeature::SSE2
            | CpuidFeature::SSE3
            | CpuidFeature::SSE4_1
            | CpuidFeature::SSE4_2
            | CpuidFeature::SSE4A
            | CpuidFeature::SSSE3
            | CpuidFeature::VAES
            | CpuidFeature::VPCLMULQDQ
    )
}

/// Stores and loads that skip elements, and with them their page faults.
fn is_masked_move(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Maskmovq
            | Mnemonic::Maskmovdqu
            | Mnemonic::Vmaskmovdqu
            | Mnemonic::Vmaskmovps
            | Mnemonic::Vmaskmovpd
            | Mnemonic::Vpmaskmovd
            | Mnemonic::Vpmaskmovq
    )
}

/// The base instruction set, where computation and system instructions have the same feature.
fn is_native_integer(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Adc | Add
            | And
            | Bsf
            | Bsr
            | Bswap
            | Bt
            | Btc
            | Btr
            | Bts
            | Cbw
            | Cdq
            | Cdqe
            | Clc
            | Cmc
            | Cmp
            | Cmpxchg
            | Cqo
            | Cwd
            | Cwde
            | Dec
            | Div
            | Idiv
            | Imul
            | Inc
            | Lahf
            | Lea
            | Mov
            | Movsx
            | Movsxd
            | Movzx
            | Mul
            | Neg
            | Nop
            | Not
            | Or
            | Rcl
            | Rcr
            | Rol
            | Ror
            | Sahf
            | Sal
            | Sar
            | Sbb
            | Seta
            | Setae
            | Setb
            | Setbe
            | Sete
            | Setg
            | Setge
            | Setl
            | Setle
            | Setne
            | Setno
            | Setnp
            | Setns
            | Seto
            | Setp
            | Sets
            | Shl
            | Shld
            | Shr
            | Shrd
            | Stc
            | Sub
            | Test
            | Wait
            | Xadd
            | Xchg
            | Xor
    )
}

/// The register that holds the bit offset, for BT and relatives with a memory operand.
pub fn bit_offset_register(instruction: &Instruction) -> Option<Register> {
    let bit_test =
        matches!(instruction.mnemonic(), Mnemonic::Bt | Mnemonic::Btc | Mnemonic::Btr | Mnemonic::Bts);
    (bit_test && instruction.op0_kind() == OpKind::Memory && instruction.op1_kind() == OpKind::Register)
        .then(|| instruction.op1_register())
}

fn writes(access: OpAccess) -> bool {
    matches!(access, OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
}

fn memory_use(instruction: &Instruction, access: OpAccess) -> (MemoryUse, u16) {
    if matches!(
        instruction.mnemonic(),
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb | Mnemonic::Cldemote
    ) {
        return (MemoryUse::Read, 1);
    }
    let bytes = instruction.memory_size().size() as u16;
    match access {
        OpAccess::Read | OpAccess::CondRead => (MemoryUse::Read, bytes),
        OpAccess::Write | OpAccess::CondWrite => (MemoryUse::Write, bytes),
        OpAccess::ReadWrite | OpAccess::ReadCondWrite => (MemoryUse::ReadWrite, bytes),
        OpAccess::None | OpAccess::NoMemAccess => (MemoryUse::Address, 0),
    }
}

/// What an instruction does with its memory operand, and the operand's size in bytes.
pub fn memory_use_of(instruction: &Instruction) -> (MemoryUse, u16) {
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(instruction);
    match (0..instruction.op_count()).find(|i| instruction.op_kind(*i) == OpKind::Memory) {
        Some(operand) => memory_use(instruction, info.op_access(operand)),
        None => (MemoryUse::None, 0),
    }
}

/// What the address of the memory operand has to be a multiple of, else #GP; 1 if it does not matter.
pub fn alignment_of(instruction: &Instruction) -> u8 {
    let (memory, bytes) = memory_use_of(instruction);
    alignment_bytes(instruction, memory, bytes)
}

/// Whether the x87 or MMX state is used.
pub fn touches_x87(instruction: &Instruction) -> bool {
    is_x87_opcode(instruction) || uses_mmx(instruction)
}

/// Alignment that the instruction demands (SDM 2 §2.4, exception types 1, 2 and 4).
fn alignment_bytes(instruction: &Instruction, memory: MemoryUse, memory_bytes: u16) -> u8 {
    use Mnemonic::*;
    if matches!(memory, MemoryUse::None | MemoryUse::Address) {
        return 1;
    }
    let vex = instruction.op_code().encoding() == EncodingKind::VEX;
    let demands = match instruction.mnemonic() {
        Cmpxchg16b | Vmovaps | Vmovapd | Vmovdqa | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa => true,
        Movups | Movupd | Movdqu | Lddqu => false,
        Pcmpestri | Pcmpestri64 | Pcmpestrm | Pcmpestrm64 | Pcmpistri | Pcmpistrm => false,
        // Intel's processors demand alignment here and AMD's do not: left to the host.
        Sha1msg1 | Sha1msg2 | Sha1nexte | Sha1rnds4 | Sha256msg1 | Sha256msg2 | Sha256rnds2 => false,
        _ => !vex && memory_bytes == 16,
    };
    if demands { memory_bytes as u8 } else { 1 }
}

/// Opcodes D8 to DF, and WAIT, which reports pending exceptions.
fn is_x87_opcode(instruction: &Instruction) -> bool {
    let op_code = instruction.op_code();
    let value = op_code.op_code();
    let first = if op_code.op_code_len() == 2 { value >> 8 } else { value };
    instruction.mnemonic() == Mnemonic::Wait
        || (op_code.table() == OpCodeTableKind::Normal && (0xd8..=0xdf).contains(&first))
}

/// Control instructions, which leave the last-instruction pointers alone (SDM 1 §8.1.8).
fn is_x87_control(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Wait
            | Mnemonic::Fnclex
            | Mnemonic::Fninit
            | Mnemonic::Fldcw
            | Mnemonic::Fldenv
            | Mnemonic::Frstor
            | Mnemonic::Fnstcw
            | Mnemonic::Fnstsw
            | Mnemonic::Fnstenv
            | Mnemonic::Fnsave
    )
}

/// Uses the MMX registers, or changes how they are tagged.
fn uses_mmx(instruction: &Instruction) -> bool {
    instruction.mnemonic() == Mnemonic::Emms
        || instruction.op_code().op_kinds().iter().any(|kind| {
            matches!(
                kind,
                OpCodeOperandKind::mm_reg | OpCodeOperandKind::mm_rm | OpCodeOperandKind::mm_or_mem
            )
        })
}

/// Uses the MMX registers for certain; whether CVTPI2PS with a memory operand does depends on the processor.
fn names_mmx_register(instruction: &Instruction) -> bool {
    instruction.mnemonic() == Mnemonic::Emms
        || (0..instruction.op_count())
            .any(|i| instruction.op_kind(i) == OpKind::Register && instruction.op_register(i).is_mm())
}

/// Whether MXCSR matters: for all vector instructions but those known to move or compute integers. AMD's
/// misaligned-exception mask (MXCSR.MM) makes it matter for every legacy SSE instruction with a memory operand.
fn uses_mxcsr(instruction: &Instruction, has_memory: bool) -> bool {
    if matches!(
        instruction.mnemonic(),
        Mnemonic::Ldmxcsr | Mnemonic::Stmxcsr | Mnemonic::Vldmxcsr | Mnemonic::Vstmxcsr
    ) {
        return true;
    }
    let vector = instruction.op_code().op_kinds().iter().any(|kind| {
        matches!(
            kind,
            OpCodeOperandKind::xmm_reg
                | OpCodeOperandKind::xmm_rm
                | OpCodeOperandKind::xmm_or_mem
                | OpCodeOperandKind::xmm_vvvv
                | OpCodeOperandKind::ymm_reg
                | OpCodeOperandKind::ymm_rm
                | OpCodeOperandKind::ymm_or_mem
        )
    });
    if !vector {
        return false;
    }
    let name = format!("{:?}", instruction.mnemonic());
    let integer = ["P", "Vp", "Mov", "Vmov", "Aes", "Vaes", "Sha"].iter().any(|p| name.starts_with(p));
    !integer || (has_memory && instruction.op_code().encoding() == EncodingKind::Legacy)
}

fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::BH | Register::CH | Register::DH)
}

/// The part of `alias` that corresponds to the part of RSP that `register` is; other registers as they are.
fn rename_stack_pointer(register: Register, alias: Register) -> Register {
    let parts = match register {
        Register::RSP => Register::RAX,
        Register::ESP => Register::EAX,
        Register::SP => Register::AX,
        Register::SPL => return low_byte(alias),
        other => return other,
    };
    parts + alias.number() as u32
}

/// The low byte of a 64-bit register.
fn low_byte(register: Register) -> Register {
    const LOW: [Register; 16] = [
        Register::AL,
        Register::CL,
        Register::DL,
        Register::BL,
        Register::SPL,
        Register::BPL,
        Register::SIL,
        Register::DIL,
        Register::R8L,
        Register::R9L,
        Register::R10L,
        Register::R11L,
        Register::R12L,
        Register::R13L,
        Register::R14L,
        Register::R15L,
    ];
    LOW[register.number() & 15]
}
