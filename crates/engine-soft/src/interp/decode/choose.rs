//! Which handler executes which instruction: one place per fact about an encoding that iced-x86's tables do not give.

use iced_x86::{Code, DecoderOptions, Instruction, MandatoryPrefix, Mnemonic, OpKind};

use super::{Builder, Kind, mask, options, register_number, segment_number};
use crate::cpu::seg;
use crate::interp::integer::{self as int, Imm, Mem, Reg, Rm};
use crate::interp::native_op;
use crate::interp::op::{BASE_NONE, Handler, Op};
use crate::interp::string;
use crate::interp::xstate::{self, form};
use crate::system::{instructions as sys, transfer};

impl Builder<'_> {
    /// The handler for an instruction that the interpreter executes itself.
    pub(super) fn choose(&mut self, op: &mut Op) -> Option<Handler> {
        use Mnemonic::*;
        let insn = self.instruction;
        let size = if insn.op_count() > 0 { self.size(0) } else { 0 };
        if insn.is_string_instruction() {
            return self.choose_string(op);
        }
        if insn.is_jcc_short_or_near() {
            op.aux = condition_code(insn);
            return Some(int::jcc);
        }
        Some(match insn.mnemonic() {
            Mov => return self.choose_mov(op),
            Movzx | Movsx | Movsxd => return self.choose_extension(op),
            Lea => sized!(size, T => int::lea::<T>),
            Add => two_operand!(self, size, T, int::Add),
            Or => two_operand!(self, size, T, int::Or),
            Adc => two_operand!(self, size, T, int::Adc),
            Sbb => two_operand!(self, size, T, int::Sbb),
            And => two_operand!(self, size, T, int::And),
            Sub => two_operand!(self, size, T, int::Sub),
            Xor => two_operand!(self, size, T, int::Xor),
            Cmp => two_operand!(self, size, T, int::Cmp),
            Test => two_operand!(self, size, T, int::Test),
            Inc => one_operand!(self, size, T, int::Inc),
            Dec => one_operand!(self, size, T, int::Dec),
            Neg => one_operand!(self, size, T, int::Neg),
            Not => one_operand!(self, size, T, int::Not),
            Shl | Sal => shift!(self, size, T, int::Shl),
            Shr => shift!(self, size, T, int::Shr),
            Sar => shift!(self, size, T, int::Sar),
            Rol => shift!(self, size, T, int::Rol),
            Ror => shift!(self, size, T, int::Ror),
            Rcl => shift!(self, size, T, int::Rcl),
            Rcr => shift!(self, size, T, int::Rcr),
            Imul if insn.op_count() == 2 => match self.kind(1) {
                Kind::Reg => sized!(size, T => int::imul::<T, Rm>),
                _ => sized!(size, T => int::imul::<T, Mem>),
            },
            Imul if insn.op_count() == 3 => match self.kind(1) {
                Kind::Reg => sized!(size, T => int::imul_imm::<T, Rm>),
                _ => sized!(size, T => int::imul_imm::<T, Mem>),
            },
            Xchg => sized!(size, T => int::xchg::<T>),
            Cbw => int::extend_accumulator::<u16, u8>,
            Cwde => int::extend_accumulator::<u32, u16>,
            Cdqe => int::extend_accumulator::<u64, u32>,
            Cwd => int::sign_to_dx::<u16>,
            Cdq => int::sign_to_dx::<u32>,
            Cqo => int::sign_to_dx::<u64>,
            // Intel's processors take these for NOP; AMD's know 0F 0D only as a prefetch, which needs memory.
            Reservednop if is_prefetch_of_register(insn.code()) && options() == DecoderOptions::AMD => {
                sys::undefined
            }
            // Hints that this processor does not know: RDSSP leaves its register alone without shadow stacks.
            Nop | Endbr32 | Endbr64 | Rdsspd | Rdsspq | Prefetcht0 | Prefetcht1 | Prefetcht2
            | Prefetchnta | Prefetchw | Prefetch | Prefetchwt1 | Reservednop => int::nop,
            Pause => sys::pause,
            Clc | Stc | Cmc | Cld | Std => {
                op.aux = match insn.mnemonic() {
                    Clc => 0xf8,
                    Stc => 0xf9,
                    Cmc => 0xf5,
                    Cld => 0xfc,
                    _ => 0xfd,
                };
                int::flag_operation
            }
            Lahf => int::lahf,
            Sahf => int::sahf,
            Push => return self.choose_push(op),
            Pop => return self.choose_pop(op),
            Pusha | Pushad => sized!(self.stack_size() / 8, T => int::push_all::<T>),
            Popa | Popad => sized!(self.stack_size() / 8, T => int::pop_all::<T>),
            Pushf => sys::pushf::<u16>,
            Pushfd => sys::pushf::<u32>,
            Pushfq => sys::pushf::<u64>,
            Popf => sys::popf::<u16>,
            Popfd => sys::popf::<u32>,
            Popfq => sys::popf::<u64>,
            Leave => match insn.code() {
                Code::Leavew => int::leave::<u16>,
                Code::Leaved => int::leave::<u32>,
                _ => int::leave::<u64>,
            },
            Enter => {
                op.imm = u64::from(insn.immediate16()) | u64::from(insn.immediate8_2nd()) << 16;
                match insn.code() {
                    Code::Enterw_imm16_imm8 => int::enter::<u16>,
                    Code::Enterd_imm16_imm8 => int::enter::<u32>,
                    _ => int::enter::<u64>,
                }
            }
            Jmp => return self.choose_jump(op),
            Call => return self.choose_call(op),
            Ret => {
                op.imm = if insn.op_count() > 0 { u64::from(insn.immediate16()) } else { 0 };
                match insn.code() {
                    Code::Retnw | Code::Retnw_imm16 => int::ret::<u16>,
                    Code::Retnd | Code::Retnd_imm16 => int::ret::<u32>,
                    _ => int::ret::<u64>,
                }
            }
            Retf => {
                op.imm = if insn.op_count() > 0 { u64::from(insn.immediate16()) } else { 0 };
                match insn.code() {
                    Code::Retfw | Code::Retfw_imm16 => transfer::ret_far::<u16>,
                    Code::Retfd | Code::Retfd_imm16 => transfer::ret_far::<u32>,
                    _ => transfer::ret_far::<u64>,
                }
            }
            Loop | Loope | Loopne | Jcxz | Jecxz | Jrcxz => {
                op.aux = match insn.mnemonic() {
                    Loopne => 0xe0,
                    Loope => 0xe1,
                    Loop => 0xe2,
                    _ => 0xe3,
                };
                op.address_mask = mask(insn.op_code().address_size() as usize / 8);
                int::loop_branch
            }
            Daa | Das | Aaa | Aas | Aam | Aad => {
                op.aux = match insn.mnemonic() {
                    Daa => 0x27,
                    Das => 0x2f,
                    Aaa => 0x37,
                    Aas => 0x3f,
                    Aam => 0xd4,
                    _ => 0xd5,
                };
                int::bcd
            }
            Xlatb => {
                op.base = crate::cpu::gpr::RBX as u8;
                op.segment = segment_number(insn.memory_segment());
                op.address_mask = mask(insn.memory_base().size());
                op.index = BASE_NONE;
                sys::xlat
            }
            Salc => sys::salc,
            Bound => sized!(size, T => sys::bound::<T>),
            Fxsave | Fxsave64 | Fxrstor | Fxrstor64 | Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xrstor
            | Xrstor64 => {
                op.aux = match insn.mnemonic() {
                    Fxsave | Fxsave64 => form::FXSAVE,
                    Fxrstor | Fxrstor64 => form::FXRSTOR,
                    Xsave | Xsave64 => form::XSAVE,
                    Xsaveopt | Xsaveopt64 => form::XSAVEOPT,
                    _ => form::XRSTOR,
                };
                op.size = match insn.mnemonic() {
                    Fxsave64 | Fxrstor64 | Xsave64 | Xsaveopt64 | Xrstor64 => 8,
                    _ => 4,
                };
                xstate::xstate
            }
            Mfence | Lfence | Sfence | Serialize => sys::fence,
            Clflush | Clflushopt | Clwb => native_op::cache_line,
            _ if is_setcc(insn.code()) => {
                op.aux = condition_code(insn);
                match self.kind(0) {
                    Kind::Reg => int::setcc::<Reg>,
                    _ => int::setcc::<Mem>,
                }
            }
            _ if is_cmov(insn.code()) => {
                op.aux = condition_code(insn);
                match self.kind(1) {
                    Kind::Reg => sized!(size, T => int::cmov::<T, Rm>),
                    _ => sized!(size, T => int::cmov::<T, Mem>),
                }
            }
            _ => return self.choose_system(op),
        })
    }

    fn choose_mov(&mut self, op: &mut Op) -> Option<Handler> {
        let insn = self.instruction;
        let (target, source) = (insn.op0_register(), insn.op1_register());
        if target.is_segment_register() {
            op.aux = segment_number(target);
            if self.kind(1) == Kind::Reg {
                op.rm = register_number(source);
                return Some(sys::mov_to_segment::<Rm>);
            }
            return Some(sys::mov_to_segment::<Mem>);
        }
        if source.is_segment_register() {
            op.aux = segment_number(source);
            return Some(match self.kind(0) {
                Kind::Reg => sized!(target.size(), T => sys::mov_from_segment::<T, Reg>),
                _ => sys::mov_from_segment::<u16, Mem>,
            });
        }
        for (register, other, to) in [(target, source, true), (source, target, false)] {
            if register.is_cr() || register.is_dr() {
                op.aux = register.number() as u8;
                op.reg = register_number(other);
                return Some(match (register.is_cr(), to) {
                    (true, true) => sys::mov_to_cr,
                    (true, false) => sys::mov_from_cr,
                    (false, true) => sys::mov_to_dr,
                    (false, false) => sys::mov_from_dr,
                });
            }
        }
        if target.is_tr() || source.is_tr() {
            return Some(sys::undefined);
        }
        let size = self.size(0);
        Some(match self.kinds() {
            (Kind::Reg, Kind::Reg) => sized!(size, T => int::mov::<T, Reg, Rm>),
            (Kind::Reg, Kind::Mem) => sized!(size, T => int::mov::<T, Reg, Mem>),
            (Kind::Reg, _) => sized!(size, T => int::mov::<T, Reg, Imm>),
            (_, Kind::Reg) => sized!(size, T => int::mov::<T, Mem, Reg>),
            _ => sized!(size, T => int::mov::<T, Mem, Imm>),
        })
    }

    fn choose_extension(&self, op: &mut Op) -> Option<Handler> {
        let _ = &op;
        let (to, from) = (self.size(0), self.size(1));
        let signed = self.instruction.mnemonic() != Mnemonic::Movzx;
        macro_rules! extension {
            ($narrow:ty) => {
                match (signed, self.kind(1)) {
                    (false, Kind::Reg) => sized!(to, T => int::movzx::<T, $narrow, Rm>),
                    (false, _) => sized!(to, T => int::movzx::<T, $narrow, Mem>),
                    (true, Kind::Reg) => sized!(to, T => int::movsx::<T, $narrow, Rm>),
                    (true, _) => sized!(to, T => int::movsx::<T, $narrow, Mem>),
                }
            };
        }
        Some(match from {
            1 => extension!(u8),
            2 => extension!(u16),
            _ => extension!(u32),
        })
    }

    fn choose_push(&self, op: &mut Op) -> Option<Handler> {
        let size = self.stack_size();
        let register = self.instruction.op0_register();
        if register.is_segment_register() {
            op.aux = segment_number(register);
            return Some(sized!(size, T => sys::push_segment::<T>));
        }
        Some(match self.kind(0) {
            Kind::Reg => sized!(size, T => int::push::<T, Reg>),
            Kind::Imm => sized!(size, T => int::push::<T, Imm>),
            Kind::Mem => sized!(size, T => int::push::<T, Mem>),
        })
    }

    fn choose_pop(&self, op: &mut Op) -> Option<Handler> {
        let size = self.stack_size();
        let register = self.instruction.op0_register();
        if register.is_segment_register() {
            op.aux = segment_number(register);
            return Some(sized!(size, T => sys::pop_segment::<T>));
        }
        Some(match self.kind(0) {
            Kind::Reg => sized!(size, T => int::pop::<T>),
            _ => sized!(size, T => int::pop_memory::<T>),
        })
    }

    fn choose_jump(&self, op: &mut Op) -> Option<Handler> {
        let insn = self.instruction;
        Some(match insn.op0_kind() {
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => int::jmp,
            OpKind::FarBranch16 | OpKind::FarBranch32 => transfer::jmp_far_direct,
            OpKind::Register => sized!(self.size(0), T => int::jmp_indirect::<T, Reg>),
            _ => match insn.code() {
                Code::Jmp_m1616 => transfer::jmp_far::<u16>,
                Code::Jmp_m1632 => transfer::jmp_far::<u32>,
                Code::Jmp_m1664 => transfer::jmp_far::<u64>,
                _ => {
                    let _ = &op;
                    sized!(self.size(0), T => int::jmp_indirect::<T, Mem>)
                }
            },
        })
    }

    fn choose_call(&self, op: &mut Op) -> Option<Handler> {
        let insn = self.instruction;
        Some(match insn.op0_kind() {
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                sized!(usize::from(op.size), T => int::call::<T>)
            }
            OpKind::FarBranch16 => transfer::call_far_direct::<u16>,
            OpKind::FarBranch32 => transfer::call_far_direct::<u32>,
            OpKind::Register => sized!(self.size(0), T => int::call_indirect::<T, Reg>),
            _ => match insn.code() {
                Code::Call_m1616 => transfer::call_far::<u16>,
                Code::Call_m1632 => transfer::call_far::<u32>,
                Code::Call_m1664 => transfer::call_far::<u64>,
                _ => sized!(self.size(0), T => int::call_indirect::<T, Mem>),
            },
        })
    }

    fn choose_string(&self, op: &mut Op) -> Option<Handler> {
        use Mnemonic::*;
        let insn = self.instruction;
        let size = insn.memory_size().size();
        op.extra = self.repeat_kind();
        Some(match insn.mnemonic() {
            Movsb | Movsw | Movsd | Movsq => sized!(size, T => string::movs::<T>),
            Stosb | Stosw | Stosd | Stosq => sized!(size, T => string::stos::<T>),
            Lodsb | Lodsw | Lodsd | Lodsq => sized!(size, T => string::lods::<T>),
            Cmpsb | Cmpsw | Cmpsd | Cmpsq => sized!(size, T => string::cmps::<T>),
            Scasb | Scasw | Scasd | Scasq => sized!(size, T => string::scas::<T>),
            Insb | Insw | Insd => sized!(size, T => string::ins::<T>),
            _ => sized!(size, T => string::outs::<T>),
        })
    }

    fn choose_system(&mut self, op: &mut Op) -> Option<Handler> {
        use Mnemonic::*;
        let insn = self.instruction;
        let size = if insn.op_count() > 0 { self.size(0) } else { 0 };
        let memory = insn.op_count() > 0 && self.kind(0) == Kind::Mem;
        Some(match insn.mnemonic() {
            Hlt => sys::hlt,
            Cli => sys::cli,
            Sti => sys::sti,
            Clac | Stac => {
                op.aux = u8::from(insn.mnemonic() == Stac);
                sys::set_ac
            }
            Int => sys::int,
            Int3 => {
                op.imm = 3;
                sys::int
            }
            Into => {
                op.imm = 4;
                sys::into
            }
            Int1 => sys::int1,
            Iret => transfer::iret::<u16>,
            Iretd => transfer::iret::<u32>,
            Iretq => transfer::iret::<u64>,
            Syscall => transfer::syscall,
            Sysret | Sysretq => {
                op.aux = u8::from(insn.mnemonic() == Sysretq);
                transfer::sysret
            }
            Sysenter => transfer::sysenter,
            Sysexit | Sysexitq => {
                op.aux = u8::from(insn.mnemonic() == Sysexitq);
                transfer::sysexit
            }
            Lds | Les | Lss | Lfs | Lgs => {
                op.aux = match insn.mnemonic() {
                    Lds => seg::DS,
                    Les => seg::ES,
                    Lss => seg::SS,
                    Lfs => seg::FS,
                    _ => seg::GS,
                } as u8;
                sized!(size, T => transfer::load_far_pointer::<T>)
            }
            Lgdt | Lidt => {
                op.aux = u8::from(insn.mnemonic() == Lidt);
                let narrow = matches!(insn.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16);
                op.size = if narrow { 2 } else { 4 };
                sys::load_table
            }
            Sgdt | Sidt => {
                op.aux = u8::from(insn.mnemonic() == Sidt);
                sys::store_table
            }
            Lldt | Ltr => {
                op.aux = u8::from(insn.mnemonic() == Ltr);
                if memory { sys::load_system_segment::<Mem> } else { sys::load_system_segment::<Reg> }
            }
            Sldt | Str => {
                op.aux = u8::from(insn.mnemonic() == Str);
                if memory {
                    sys::store_system_segment::<u16, Mem>
                } else {
                    sized!(size, T => sys::store_system_segment::<T, Reg>)
                }
            }
            Lar | Lsl => {
                op.aux = u8::from(insn.mnemonic() == Lsl);
                if self.kind(1) == Kind::Mem {
                    sized!(size, T => sys::load_rights::<T, Mem>)
                } else {
                    sized!(size, T => sys::load_rights::<T, Rm>)
                }
            }
            Verr | Verw => {
                op.aux = u8::from(insn.mnemonic() == Verw);
                if memory { sys::verify::<Mem> } else { sys::verify::<Reg> }
            }
            Arpl => {
                op.aux = register_number(insn.op1_register());
                if memory { sys::arpl::<Mem> } else { sys::arpl::<Reg> }
            }
            Lmsw => {
                if memory {
                    sys::lmsw::<Mem>
                } else {
                    sys::lmsw::<Reg>
                }
            }
            Smsw => {
                if memory {
                    sys::smsw::<u16, Mem>
                } else {
                    sized!(size, T => sys::smsw::<T, Reg>)
                }
            }
            Clts => sys::clts,
            Invlpg => sys::invlpg,
            Invpcid => sys::invpcid,
            Swapgs => sys::swapgs,
            Rdfsbase | Rdgsbase | Wrfsbase | Wrgsbase => {
                let index = if matches!(insn.mnemonic(), Rdfsbase | Wrfsbase) { seg::FS } else { seg::GS };
                let write = matches!(insn.mnemonic(), Wrfsbase | Wrgsbase);
                op.aux = index as u8 | if write { 0x80 } else { 0 };
                sized!(size, T => sys::segment_base::<T>)
            }
            Cpuid => sys::cpuid,
            Rdmsr => sys::rdmsr,
            Wrmsr => sys::wrmsr,
            Rdtsc => sys::rdtsc,
            Rdtscp => {
                op.aux = 1;
                sys::rdtsc
            }
            Rdpid => sys::rdpid,
            Rdpmc => sys::rdpmc,
            Xgetbv => sys::xgetbv,
            Xsetbv => sys::xsetbv,
            Invd | Wbinvd => sys::privileged_nop,
            In => {
                op.aux = u8::from(self.kind(1) == Kind::Reg);
                sized!(size, T => sys::port_in::<T>)
            }
            Out => {
                op.aux = u8::from(self.kind(0) == Kind::Reg);
                sized!(self.size(1), T => sys::port_out::<T>)
            }
            Ud0 | Ud1 | Ud2 | Rsm => sys::undefined,
            _ => return None,
        })
    }
}

/// Condition code number of a Jcc, SETcc or CMOVcc.
fn condition_code(instruction: &Instruction) -> u8 {
    use iced_x86::ConditionCode as C;
    match instruction.condition_code() {
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        _ => 15,
    }
}

/// 0F 0D with a register operand.
fn is_prefetch_of_register(code: Code) -> bool {
    matches!(
        code,
        Code::Reservednop_rm16_r16_0F0D | Code::Reservednop_rm32_r32_0F0D | Code::Reservednop_rm64_r64_0F0D
    )
}

/// SETcc: two-byte opcodes 0F 90–9F without mandatory prefix.
fn is_setcc(code: Code) -> bool {
    let info = code.op_code();
    info.table() == iced_x86::OpCodeTableKind::T0F
        && (0x90..=0x9f).contains(&info.op_code())
        && info.encoding() == iced_x86::EncodingKind::Legacy
}

/// CMOVcc: two-byte opcodes 0F 40–4F.
fn is_cmov(code: Code) -> bool {
    let info = code.op_code();
    info.table() == iced_x86::OpCodeTableKind::T0F
        && (0x40..=0x4f).contains(&info.op_code())
        && info.encoding() == iced_x86::EncodingKind::Legacy
        && info.mandatory_prefix() == MandatoryPrefix::None
}
