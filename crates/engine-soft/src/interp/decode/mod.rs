//! From bytes to [`Op`]s: iced-x86 decodes, this module chooses the handler for each form.

use iced_x86::{
    CodeSize, Decoder, DecoderError, DecoderOptions, Instruction, Mnemonic, OpCodeOperandKind, OpKind,
    Register,
};

use crate::cpu::{class, seg};
use crate::interp::integer as int;
use crate::interp::native_op;
use crate::interp::op::{BASE_NONE, BASE_RIP, HIGH_BYTE, Handler, Op};
use crate::interp::string::repeat;
use crate::native::{CompileError, Thunk, Thunks};
use crate::system::instructions as sys;

/// What decoding of a run of instructions gives.
#[derive(Default)]
pub struct Decoded {
    /// The instructions.
    pub ops: Vec<Op>,
    /// Kept for handlers that refer to them.
    pub instructions: Vec<Box<Instruction>>,
    /// Likewise.
    pub thunks: Vec<Box<Thunk>>,
    /// Bytes used.
    pub len: usize,
}

/// Why nothing was decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// The first instruction does not end within the bytes.
    NeedMore,
    /// There is no room for native code; everything compiled so far has to go first.
    Full,
}

/// Decodes up to `max` instructions from `bytes`, which start at `ip`. Ends after an instruction that may change the flow,
/// before one that does not end within the bytes.
///
/// # Errors
/// See [`DecodeError`].
pub fn decode(
    bytes: &[u8],
    bits: u8,
    ip: u64,
    max: usize,
    thunks: &mut Thunks,
) -> Result<Decoded, DecodeError> {
    let mut decoder = Decoder::with_ip(u32::from(bits), bytes, ip, options());
    let mut instruction = Instruction::default();
    let mut decoded = Decoded::default();
    while decoded.ops.len() < max && decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        if decoder.last_error() == DecoderError::NoMoreBytes && bytes.len() - decoded.len < 15 {
            if decoded.ops.is_empty() {
                return Err(DecodeError::NeedMore);
            }
            break;
        }
        let mut builder = Builder { instruction: &instruction, thunks, decoded: &mut decoded };
        let (op, ends) = match builder.build() {
            Ok(built) => built,
            Err(error) if decoded.ops.is_empty() => return Err(error),
            Err(_) => break,
        };
        decoded.ops.push(op);
        decoded.len += instruction.len();
        if ends {
            break;
        }
    }
    Ok(decoded)
}

/// Decoding as the host's vendor does it: they differ in a few encodings.
pub fn options() -> u32 {
    static OPTIONS: std::sync::OnceLock<u32> = std::sync::OnceLock::new();
    *OPTIONS.get_or_init(|| {
        // SAFETY: CPUID exists on every x86-64 processor. (The call is safe on recent compilers.)
        #[allow(unused_unsafe)]
        let vendor = unsafe { core::arch::x86_64::__cpuid(0) };
        if vendor.ebx == u32::from_le_bytes(*b"Auth") { DecoderOptions::AMD } else { DecoderOptions::NONE }
    })
}

/// Chooses a type parameter by operand size in bytes.
macro_rules! sized {
    ($size:expr, $t:ident => $handler:expr) => {
        match $size {
            1 => {
                type $t = u8;
                $handler as Handler
            }
            2 => {
                type $t = u16;
                $handler as Handler
            }
            4 => {
                type $t = u32;
                $handler as Handler
            }
            _ => {
                type $t = u64;
                $handler as Handler
            }
        }
    };
}

/// A two-operand instruction by the kinds of its operands.
macro_rules! two_operand {
    ($builder:expr, $size:expr, $t:ident, $op:ty) => {
        match $builder.kinds() {
            (Kind::Reg, Kind::Reg) => sized!($size, $t => int::binary::<$op, $t, Reg, Rm>),
            (Kind::Reg, Kind::Mem) => sized!($size, $t => int::binary::<$op, $t, Reg, Mem>),
            (Kind::Reg, _) => sized!($size, $t => int::binary::<$op, $t, Reg, Imm>),
            (Kind::Mem, Kind::Reg) => sized!($size, $t => int::binary::<$op, $t, Mem, Reg>),
            _ => sized!($size, $t => int::binary::<$op, $t, Mem, Imm>),
        }
    };
}

macro_rules! one_operand {
    ($builder:expr, $size:expr, $t:ident, $op:ty) => {
        match $builder.kind(0) {
            Kind::Reg => sized!($size, $t => int::unary::<$op, $t, Reg>),
            _ => sized!($size, $t => int::unary::<$op, $t, Mem>),
        }
    };
}

macro_rules! shift {
    ($builder:expr, $size:expr, $t:ident, $op:ty) => {
        match ($builder.kind(0), $builder.kind(1)) {
            (Kind::Reg, Kind::Reg) => sized!($size, $t => int::shift_cl::<$op, $t, Reg>),
            (Kind::Reg, _) => sized!($size, $t => int::shift_imm::<$op, $t, Reg>),
            (_, Kind::Reg) => sized!($size, $t => int::shift_cl::<$op, $t, Mem>),
            _ => sized!($size, $t => int::shift_imm::<$op, $t, Mem>),
        }
    };
}

mod choose;

/// What an operand is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Reg,
    Mem,
    Imm,
}

struct Builder<'a> {
    instruction: &'a Instruction,

    thunks: &'a mut Thunks,
    decoded: &'a mut Decoded,
}

/// Number of a general register as [`Op::reg`] holds it.
fn register_number(register: Register) -> u8 {
    match register {
        Register::AH | Register::CH | Register::DH | Register::BH => {
            HIGH_BYTE | (register as u8 - Register::AH as u8)
        }
        _ => register.full_register().number() as u8,
    }
}

/// Number of a segment register.
pub(crate) fn segment_number(register: Register) -> u8 {
    match register {
        Register::ES => seg::ES as u8,
        Register::CS => seg::CS as u8,
        Register::SS => seg::SS as u8,
        Register::FS => seg::FS as u8,
        Register::GS => seg::GS as u8,
        _ => seg::DS as u8,
    }
}

fn mask(bytes: usize) -> u64 {
    match bytes {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

impl Builder<'_> {
    fn kind(&self, operand: u32) -> Kind {
        match self.instruction.op_kind(operand) {
            OpKind::Register => Kind::Reg,
            OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64 => Kind::Imm,
            _ => Kind::Mem,
        }
    }

    fn kinds(&self) -> (Kind, Kind) {
        (self.kind(0), self.kind(1))
    }

    /// Size in bytes of an operand.
    fn size(&self, operand: u32) -> usize {
        match self.kind(operand) {
            Kind::Reg => self.instruction.op_register(operand).size(),
            _ => self.instruction.memory_size().size(),
        }
    }

    fn branch_size(&self) -> u8 {
        match self.instruction.op0_kind() {
            OpKind::NearBranch16 => 2,
            OpKind::NearBranch32 => 4,
            _ => 8,
        }
    }

    /// Operands, common to all handlers.
    fn operands(&self) -> Op {
        let insn = self.instruction;
        let mut op = Op {
            run: sys::undefined,
            imm: 0,
            disp: 0,
            address_mask: u64::MAX,
            base: BASE_NONE,
            index: BASE_NONE,
            scale: 0,
            segment: seg::DS as u8,
            reg: 0,
            rm: 0,
            len: insn.len() as u8,
            aux: 0,
            extra: 0,
            class: 0,
            size: 0,
        };
        let mut registers = 0;
        let mut has_memory = false;
        for operand in 0..insn.op_count() {
            match insn.op_kind(operand) {
                OpKind::Register => {
                    let number = register_number(insn.op_register(operand));
                    if registers == 0 {
                        op.reg = number;
                    } else {
                        op.rm = number;
                    }
                    registers += 1;
                }
                OpKind::Memory => {
                    has_memory = true;
                    self.memory_operand(&mut op);
                }
                OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                    op.imm = insn.near_branch_target().wrapping_sub(insn.next_ip());
                    op.size = self.branch_size();
                }
                OpKind::FarBranch16 => {
                    op.imm = u64::from(insn.far_branch16()) | u64::from(insn.far_branch_selector()) << 32;
                }
                OpKind::FarBranch32 => {
                    op.imm = u64::from(insn.far_branch32()) | u64::from(insn.far_branch_selector()) << 32;
                }
                OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => {
                    has_memory = true;
                    op.address_mask = 0xffff;
                    op.segment = segment_number(insn.memory_segment());
                }
                OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => {
                    has_memory = true;
                    op.address_mask = 0xffff_ffff;
                    op.segment = segment_number(insn.memory_segment());
                }
                OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => {
                    has_memory = true;
                    op.segment = segment_number(insn.memory_segment());
                }
                _ if self.kind(operand) == Kind::Imm => op.imm = insn.immediate(operand),
                _ => {}
            }
        }
        // Instructions that only touch the stack report its faults as #SS.
        if !has_memory && insn.is_stack_instruction() {
            op.segment = seg::SS as u8;
        }
        op
    }

    /// Segment of the memory operand. 64-bit code ignores all overrides but FS and GS.
    fn effective_segment(&self) -> Register {
        let insn = self.instruction;
        let overridden = insn.segment_prefix();
        let ignored = matches!(overridden, Register::ES | Register::CS | Register::SS | Register::DS);
        if !(insn.code_size() == CodeSize::Code64 && ignored) {
            return insn.memory_segment();
        }
        match insn.memory_base().full_register() {
            Register::RSP | Register::RBP => Register::SS,
            _ => Register::DS,
        }
    }

    fn memory_operand(&self, op: &mut Op) {
        let insn = self.instruction;
        let (base, index) = (insn.memory_base(), insn.memory_index());
        op.segment = segment_number(self.effective_segment());
        op.scale = insn.memory_index_scale().trailing_zeros() as u8;
        if index != Register::None && index.is_gpr() {
            op.index = register_number(index);
        }
        let width = if base != Register::None {
            base.size()
        } else if index != Register::None && index.is_gpr() {
            index.size()
        } else {
            insn.memory_displ_size() as usize
        };
        op.address_mask = mask(width);
        if insn.is_ip_rel_memory_operand() {
            op.base = BASE_RIP;
            op.disp = insn.ip_rel_memory_address().wrapping_sub(insn.ip());
        } else {
            op.disp = insn.memory_displacement64();
            if base != Register::None {
                op.base = register_number(base);
            }
        }
    }

    /// The instruction as an operation, and whether it ends a block.
    fn build(&mut self) -> Result<(Op, bool), DecodeError> {
        let mut op = self.operands();
        if self.instruction.is_invalid() {
            // An instruction longer than fifteen bytes is #GP, everything else that cannot be decoded #UD.
            op.run = if self.instruction.len() >= 15 { sys::too_long } else { sys::undefined };
            op.len = op.len.max(1);
            return Ok((op, true));
        }
        let locked = self.instruction.has_lock_prefix();
        let exchange = self.instruction.mnemonic() == Mnemonic::Xchg
            && (self.kind(0) == Kind::Mem || self.kind(1) == Kind::Mem);
        let chosen = if locked || exchange { None } else { self.choose(&mut op) };
        if let Some(handler) = chosen {
            op.run = handler;
            return Ok((op, self.ends_block()));
        }
        let string_of_bits = matches!(
            self.instruction.mnemonic(),
            Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
        ) && self.kind(0) == Kind::Mem
            && self.kind(1) == Kind::Reg;
        if string_of_bits {
            self.bit_string(&mut op, locked);
            return Ok((op, false));
        }
        self.native(&mut op, locked || exchange)?;
        Ok((op, false))
    }

    fn bit_string(&self, op: &mut Op, locked: bool) {
        op.aux = match self.instruction.mnemonic() {
            Mnemonic::Bt => 0,
            Mnemonic::Bts => 1,
            Mnemonic::Btr => 2,
            _ => 3,
        };
        op.extra = u32::from(locked);
        op.run = sized!(self.size(1), T => int::bit_string::<T>);
    }

    /// Lets the host execute it, or makes it undefined.
    fn native(&mut self, op: &mut Op, locked: bool) -> Result<(), DecodeError> {
        op.class = self.class();
        op.extra = u32::from(locked);
        if is_by_elements(self.instruction.mnemonic()) {
            let kept = Box::new(*self.instruction);
            op.imm = std::ptr::from_ref(kept.as_ref()) as u64;
            op.segment = segment_number(self.effective_segment());
            self.decoded.instructions.push(kept);
            op.run = native_op::elements;
            return Ok(());
        }
        match self.thunks.compile(self.instruction) {
            Ok(thunk) => {
                let kept = Box::new(thunk);
                op.imm = std::ptr::from_ref(kept.as_ref()) as u64;
                self.decoded.thunks.push(kept);
                op.run = native_op::native;
                Ok(())
            }
            Err(CompileError::Full) => Err(DecodeError::Full),
            Err(error) => {
                tracing::debug!("no way to execute {:?} ({error}): undefined", self.instruction.code());
                op.run = sys::undefined;
                Ok(())
            }
        }
    }

    /// Which switch of the OS disables the instruction.
    fn class(&self) -> u8 {
        use iced_x86::CpuidFeature as C;
        let insn = self.instruction;
        if insn.mnemonic() == Mnemonic::Wait {
            return class::WAIT;
        }
        // By the form, not by the registers named: of CVTSS2SI from memory none is a vector register.
        let uses_vector = || insn.op_code().op_kinds().iter().any(|kind| is_vector_operand(*kind));
        let uses_mmx = |r: Register| r.is_mm();
        let mut class = 0;
        for feature in insn.cpuid_features() {
            match feature {
                C::FPU | C::FPU287 | C::FPU387 | C::FPU287XL_ONLY | C::FPU387SL_ONLY => class |= class::X87,
                C::MMX | C::D3NOW | C::D3NOWEXT => class |= class::MMX,
                C::AVX | C::AVX2 | C::FMA | C::F16C | C::FMA4 | C::XOP | C::AVX_VNNI => class |= class::AVX,
                _ => {}
            }
        }
        if insn.op_code().encoding() == iced_x86::EncodingKind::VEX {
            // VEX instructions on general registers (BMI) need no state enabled.
            let vector = uses_vector();
            let all = matches!(
                insn.mnemonic(),
                Mnemonic::Vzeroall | Mnemonic::Vzeroupper | Mnemonic::Vldmxcsr | Mnemonic::Vstmxcsr
            );
            return if vector || all { class::AVX } else { 0 };
        }
        let vector = uses_vector();
        let mmx = (0..insn.op_count()).any(|i| uses_mmx(insn.op_register(i)));
        if mmx {
            class |= class::MMX;
        }
        if vector || matches!(insn.mnemonic(), Mnemonic::Ldmxcsr | Mnemonic::Stmxcsr) {
            class |= class::SSE;
        }
        class
    }

    fn ends_block(&self) -> bool {
        use iced_x86::FlowControl;
        if self.instruction.flow_control() != FlowControl::Next {
            return true;
        }
        matches!(
            self.instruction.mnemonic(),
            Mnemonic::Sti
                | Mnemonic::Popf
                | Mnemonic::Popfd
                | Mnemonic::Popfq
                | Mnemonic::Hlt
                | Mnemonic::In
                | Mnemonic::Out
                | Mnemonic::Wrmsr
                | Mnemonic::Invlpg
                | Mnemonic::Invpcid
                | Mnemonic::Lmsw
                | Mnemonic::Xsetbv
                | Mnemonic::Lss
                | Mnemonic::Lds
                | Mnemonic::Les
                | Mnemonic::Lfs
                | Mnemonic::Lgs
        ) || self.instruction.op0_register().is_segment_register()
            || self.instruction.op0_register().is_cr()
            || self.instruction.op0_register().is_dr()
    }

    /// Size of a stack operation by how far it moves the stack pointer.
    fn stack_size(&self) -> usize {
        self.instruction.stack_pointer_increment().unsigned_abs() as usize
    }

    fn repeat_kind(&self) -> u32 {
        if self.instruction.has_repne_prefix() {
            repeat::WHILE_NOT_EQUAL
        } else if self.instruction.has_rep_prefix() {
            repeat::WHILE_EQUAL
        } else {
            repeat::NONE
        }
    }
}

/// Whether an operand of this kind is a vector register, or memory that stands for one.
fn is_vector_operand(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind::*;
    matches!(
        kind,
        xmm_reg
            | xmm_rm
            | xmm_or_mem
            | xmm_vvvv
            | xmm_is4
            | xmm_is5
            | ymm_reg
            | ymm_rm
            | ymm_or_mem
            | ymm_vvvv
            | ymm_is4
            | ymm_is5
            | mem_vsib32x
            | mem_vsib64x
            | mem_vsib32y
            | mem_vsib64y
    )
}

/// Instructions that access memory element by element.
fn is_by_elements(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Vpgatherdd
            | Vgatherdps
            | Vpgatherdq
            | Vgatherdpd
            | Vpgatherqd
            | Vgatherqps
            | Vpgatherqq
            | Vgatherqpd
            | Vmaskmovps
            | Vmaskmovpd
            | Vpmaskmovd
            | Vpmaskmovq
            | Maskmovq
            | Maskmovdqu
            | Vmaskmovdqu
    )
}
