//! Handlers of system instructions.

use std::sync::atomic::Ordering;

use x86::bits::{cr0, cr4, dr6, dr7, rflags};
use x86::{Exception, Vector};

use crate::cpu::{Cpu, Mode, R, gpr, seg};
use crate::interp::alu::Int;
use crate::interp::integer::{Operand, Target};
use crate::interp::op::{Flow, Op};
use crate::mmu::Access;
use crate::msr::BadMsr;
use crate::system::interrupt::Source;
use crate::system::segmentation::{is_null, rpl, system_type};

type F = R<Flow>;

/// ZF in packed status.
const ZF: u16 = 0x4000;

impl Cpu {
    fn require_cpl0(&mut self) -> R<()> {
        if self.cpl == 0 { Ok(()) } else { self.gp0() }
    }

    fn require_umip(&mut self) -> R<()> {
        if self.cpl > 0 && self.control.cr4 & cr4::UMIP != 0 { self.gp0() } else { Ok(()) }
    }

    fn require_protected(&mut self) -> R<()> {
        if self.is_protected() { Ok(()) } else { self.ud() }
    }

    fn set_zero_flag(&mut self, set: bool) {
        self.user.status = self.user.status & !ZF | if set { ZF } else { 0 };
    }
}

// ---- undefined and trivial ----------------------------------------------------------------------------------------

/// An encoding that is not an instruction, or not one of this CPU model.
pub fn undefined(cpu: &mut Cpu, _: &Op) -> F {
    cpu.ud()
}

/// Longer than fifteen bytes.
pub fn too_long(cpu: &mut Cpu, _: &Op) -> F {
    cpu.gp0()
}

/// Privileged instructions without an effect here: WBINVD, INVD.
pub fn privileged_nop(cpu: &mut Cpu, _: &Op) -> F {
    cpu.require_cpl0()?;
    Ok(Flow::Next)
}

/// PAUSE: lets another vCPU run.
pub fn pause(_: &mut Cpu, _: &Op) -> F {
    std::hint::spin_loop();
    Ok(Flow::Next)
}

// ---- interrupts ---------------------------------------------------------------------------------------------------

/// HLT.
pub fn hlt(cpu: &mut Cpu, _: &Op) -> F {
    cpu.require_cpl0()?;
    cpu.counters.halts += 1;
    cpu.halted = true;
    cpu.note_attention();
    Ok(Flow::End)
}

/// CLI.
pub fn cli(cpu: &mut Cpu, _: &Op) -> F {
    if cpu.is_protected() && cpu.cpl > cpu.iopl() || cpu.mode == Mode::Virtual8086 && cpu.iopl() < 3 {
        if !cpu.virtual_interrupts() {
            return cpu.gp0();
        }
        cpu.system_flags &= !rflags::VIF;
        return Ok(Flow::Next);
    }
    cpu.system_flags &= !rflags::IF;
    Ok(Flow::Next)
}

/// STI.
pub fn sti(cpu: &mut Cpu, _: &Op) -> F {
    if cpu.is_protected() && cpu.cpl > cpu.iopl() || cpu.mode == Mode::Virtual8086 && cpu.iopl() < 3 {
        if !cpu.virtual_interrupts() || cpu.system_flags & rflags::VIP != 0 {
            return cpu.gp0();
        }
        cpu.system_flags |= rflags::VIF;
        return Ok(Flow::Next);
    }
    if cpu.system_flags & rflags::IF == 0 {
        cpu.system_flags |= rflags::IF;
        cpu.interrupt_shadow = true;
        cpu.note_attention();
        return Ok(Flow::End);
    }
    Ok(Flow::Next)
}

/// INT n: the vector is the immediate.
pub fn int(cpu: &mut Cpu, op: &Op) -> F {
    cpu.software_interrupt(op.imm as u8, Source::Software)?;
    Ok(Flow::End)
}

/// INT1.
pub fn int1(cpu: &mut Cpu, _: &Op) -> F {
    cpu.software_interrupt(1, Source::SoftwarePrivileged)?;
    Ok(Flow::End)
}

/// INTO.
pub fn into(cpu: &mut Cpu, op: &Op) -> F {
    if cpu.user.status & crate::interp::alu::OF != 0 {
        return int(cpu, op);
    }
    Ok(Flow::Next)
}

/// BOUND.
pub fn bound<T: Int>(cpu: &mut Cpu, op: &Op) -> F {
    let address = cpu.address(op, 2 * T::BYTES, Access::Read)?;
    let low = cpu.read::<T>(address)?.sext();
    let high_address = cpu.wrap_linear(address.wrapping_add(u64::from(T::BYTES)));
    let high = cpu.read::<T>(high_address)?.sext();
    let index = cpu.reg::<T>(op.reg).sext();
    if index < low || index > high {
        return Err(cpu.raise(Exception::plain(Vector::BoundRange)));
    }
    Ok(Flow::Next)
}

/// PUSHF.
pub fn pushf<T: Int>(cpu: &mut Cpu, _: &Op) -> F {
    let mut flags = cpu.rflags() & !(rflags::VM | rflags::RF);
    if cpu.mode == Mode::Virtual8086 && cpu.iopl() < 3 {
        if cpu.control.cr4 & cr4::VME == 0 || T::BYTES != 2 {
            return cpu.gp0();
        }
        let vif = cpu.system_flags & rflags::VIF != 0;
        flags = flags & !rflags::IF | rflags::IOPL | if vif { rflags::IF } else { 0 };
    }
    cpu.push(T::from_u64(flags))?;
    Ok(Flow::Next)
}

/// POPF.
pub fn popf<T: Int>(cpu: &mut Cpu, _: &Op) -> F {
    let flags = cpu.peek::<T>(0)?.zext();
    if cpu.mode == Mode::Virtual8086 {
        if cpu.iopl() == 3 {
            cpu.drop_stack(u64::from(T::BYTES));
            cpu.merge_flags::<T>(flags & !rflags::RF, rflags::IOPL | rflags::VM | rflags::VIF | rflags::VIP);
            return Ok(Flow::End);
        }
        let pending = cpu.system_flags & rflags::VIP != 0;
        let refused = cpu.control.cr4 & cr4::VME == 0
            || T::BYTES != 2
            || flags & rflags::TF != 0
            || flags & rflags::IF != 0 && pending;
        if refused {
            return cpu.gp0();
        }
        cpu.drop_stack(2);
        let vif = if flags & rflags::IF != 0 { rflags::VIF } else { 0 };
        let keep = rflags::IF | rflags::IOPL;
        let old = cpu.rflags();
        cpu.set_rflags(old & (!0xffff | keep) & !rflags::VIF | flags & 0xffff & !keep | vif);
        return Ok(Flow::End);
    }
    cpu.drop_stack(u64::from(T::BYTES));
    let cpl = cpu.cpl;
    let old_rf_free = flags & !rflags::RF;
    let mut keep = rflags::VM | rflags::VIF | rflags::VIP;
    if cpl > 0 {
        keep |= rflags::IOPL;
    }
    if cpu.is_protected() && cpl > cpu.iopl() {
        keep |= rflags::IF;
    }
    cpu.merge_flags::<T>(old_rf_free, keep);
    Ok(Flow::End)
}

/// STAC (`aux` 1) and CLAC (0).
pub fn set_ac(cpu: &mut Cpu, op: &Op) -> F {
    if cpu.cpl != 0 {
        return cpu.ud();
    }
    if op.aux != 0 {
        cpu.system_flags |= rflags::AC;
    } else {
        cpu.system_flags &= !rflags::AC;
    }
    cpu.update_privilege();
    Ok(Flow::Next)
}

// ---- segment registers and tables -----------------------------------------------------------------------------------

/// MOV to a segment register: `aux` names it.
pub fn mov_to_segment<S: Operand>(cpu: &mut Cpu, op: &Op) -> F {
    let index = usize::from(op.aux);
    if index == seg::CS || index > seg::GS {
        return cpu.ud();
    }
    let selector = S::get::<u16>(cpu, op)?;
    cpu.load_segment(index, selector)?;
    if index == seg::SS {
        cpu.interrupt_shadow = true;
    }
    Ok(Flow::End)
}

/// MOV from a segment register.
pub fn mov_from_segment<T: Int, D: Target>(cpu: &mut Cpu, op: &Op) -> F {
    let selector = cpu.segments[usize::from(op.aux)].selector;
    D::set(cpu, op, T::from_u64(u64::from(selector)))?;
    Ok(Flow::Next)
}

/// PUSH of a segment register, zero-extended. (Some processors leave the upper half of a 32-bit slot as it was; SDM 2 "PUSH"
/// allows both.)
pub fn push_segment<T: Int>(cpu: &mut Cpu, op: &Op) -> F {
    let selector = cpu.segments[usize::from(op.aux)].selector;
    cpu.push(T::from_u64(u64::from(selector)))?;
    Ok(Flow::Next)
}

/// POP to a segment register.
pub fn pop_segment<T: Int>(cpu: &mut Cpu, op: &Op) -> F {
    let selector = cpu.peek::<u16>(0)?;
    let width = u64::from(T::BYTES);
    // The stack pointer moves by the old stack's width even if SS is what is loaded.
    let rsp = cpu.user.gpr[gpr::RSP];
    cpu.drop_stack(width);
    if let Err(raised) = cpu.load_segment(usize::from(op.aux), selector) {
        cpu.user.gpr[gpr::RSP] = rsp;
        return Err(raised);
    }
    if usize::from(op.aux) == seg::SS {
        cpu.interrupt_shadow = true;
    }
    Ok(Flow::End)
}

/// LGDT, LIDT: `aux` 0 and 1; `size` 2 truncates the base to 24 bits.
pub fn load_table(cpu: &mut Cpu, op: &Op) -> F {
    cpu.require_cpl0()?;
    let len = if cpu.is_64bit() { 10 } else { 6 };
    let address = cpu.address(op, len, Access::Read)?;
    let mut table = cpu.read_table_register(address)?;
    if op.size == 2 && !cpu.is_64bit() {
        table.base &= 0xff_ffff;
    }
    if cpu.is_64bit() && !Cpu::is_canonical(table.base) {
        return cpu.gp0();
    }
    if op.aux == 0 {
        cpu.gdt = table;
    } else {
        cpu.idt = table;
    }
    Ok(Flow::Next)
}

/// SGDT, SIDT.
pub fn store_table(cpu: &mut Cpu, op: &Op) -> F {
    cpu.require_umip()?;
    let table = if op.aux == 0 { cpu.gdt } else { cpu.idt };
    let mut bytes = [0u8; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    let len = if cpu.is_64bit() { 10 } else { 6 };
    let address = cpu.address(op, len, Access::Write)?;
    cpu.write_bytes(address, &bytes[..len as usize])?;
    Ok(Flow::Next)
}

/// LLDT and LTR: `aux` 0 and 1.
pub fn load_system_segment<S: Operand>(cpu: &mut Cpu, op: &Op) -> F {
    cpu.require_protected()?;
    cpu.require_cpl0()?;
    let selector = S::get::<u16>(cpu, op)?;
    if op.aux == 0 {
        cpu.load_ldt(selector)?
    } else {
        cpu.load_tr(selector)?
    }
    Ok(Flow::Next)
}

/// SLDT and STR: `aux` 0 and 1.
pub fn store_system_segment<T: Int, D: Target>(cpu: &mut Cpu, op: &Op) -> F {
    cpu.require_protected()?;
    cpu.require_umip()?;
    let selector = if op.aux == 0 { cpu.ldt.selector } else { cpu.tr.selector };
    D::set(cpu, op, T::from_u64(u64::from(selector)))?;
    Ok(Flow::Next)
}

/// LAR (`aux` 0) and LSL (1).
pub fn load_rights<T: Int, S: Operand>(cpu: &mut Cpu, op: &Op) -> F {
    cpu.require_protected()?;
    let selector = S::get::<u16>(cpu, op)?;
    let value = visible_rights(cpu, selector, op.aux != 0)?;
    if let Some(value) = value {
        cpu.set_reg(op.reg, T::from_u64(value));
    }
    cpu.set_zero_flag(value.is_some());
    Ok(Flow::Next)
}

/// What LAR or LSL gives for a selector, if it may be seen.
fn visible_rights(cpu: &mut Cpu, selector: u16, limit: bool) -> R<Option<u64>> {
    if is_null(selector) {
        return Ok(None);
    }
    let Some(descriptor) = cpu.descriptor(selector)? else { return Ok(None) };
    let long = cpu.long_mode();
    let known = match descriptor.system_type() {
        None => true,
        Some(system_type::LDT | system_type::TSS_AVAILABLE | system_type::TSS_BUSY) => true,
        Some(system_type::TSS16_AVAILABLE | system_type::TSS16_BUSY) => !long,
        Some(system_type::CALL_GATE) => !limit,
        Some(system_type::CALL_GATE16 | system_type::TASK_GATE) => !long && !limit,
        _ => false,
    };
    let conforming = descriptor.is_code() && descriptor.conforming();
    if !known || !conforming && descriptor.dpl() < cpu.cpl.max(rpl(selector)) {
        return Ok(None);
    }
    Ok(Some(if limit { u64::from(descriptor.segment.limit) } else { descriptor.low >> 32 & 0x00f0_ff00 }))
}

/// VERR (`aux` 0) and VERW (1).
pub fn verify<S: Operand>(cpu: &mut Cpu, op: &Op) -> F {
    cpu.require_protected()?;
    let selector = S::get::<u16>(cpu, op)?;
    let mut usable = false;
    if !is_null(selector)
        && let Some(d) = cpu.descriptor(selector)?
    {
        let visible = d.is_code() && d.conforming() || d.dpl() >= cpu.cpl.max(rpl(selector));
        usable = visible
            && d.system_type().is_none()
            && if op.aux == 0 {
                d.is_data() || d.readable_or_writable()
            } else {
                d.is_data() && d.readable_or_writable()
            };
    }
    cpu.set_zero_flag(usable);
    Ok(Flow::Next)
}

/// ARPL.
pub fn arpl<D: Target>(cpu: &mut Cpu, op: &Op) -> F {
    cpu.require_protected()?;
    let source = cpu.reg::<u16>(op.aux) & 3;
    let target = D::get::<u16>(cpu, op)?;
    let raise = target & 3 < source;
    if raise {
        D::set(cpu, op, target & !3 | source)?;
    }
    cpu.set_zero_flag(raise);
    Ok(Flow::Next)
}

// ---- control and debug registers --------------------------------------------------------------------------------------

/// MOV to a control register: `aux` is its number, `reg` the source.
pub fn mov_to_cr(cpu: &mut Cpu, op: &Op) -> F {
    cpu.require_cpl0()?;
    cpu.counters.control_registers += 1;
    let mut value = cpu.user.gpr[usize::from(op.reg)];
    if !cpu.is_64bit() {
        value &= 0xffff_ffff;
    }
    match op.aux {
        0 => cpu.write_cr0(value)?,
        2 => cpu.control.cr2 = value,
        3 => cpu.write_cr3(value)?,
        4 => cpu.write_cr4(value)?,
        8 => {
            if value > 15 {
                return cpu.gp0();
            }
            cpu.shared.chips.set_tpr(cpu.id, (value as u8) << 4);
            cpu.note_attention();
        }
        _ => return cpu.ud(),
    }
    Ok(Flow::End)
}

/// MOV from a control register.
pub fn mov_from_cr(cpu: &mut Cpu, op: &Op) -> F {
    cpu.require_cpl0()?;
    let value = match op.aux {
        0 => cpu.control.cr0,
        2 => cpu.control.cr2,
        3 => cpu.control.cr3,
        4 => cpu.control.cr4,
        8 => u64::from(cpu.shared.chips.tpr(cpu.id) >> 4),
        _ => return cpu.ud(),
    };
    store_wide(cpu, op.reg, value);
    Ok(Flow::Next)
}

/// Control and debug registers are 64 bits wide in 64-bit mode and 32 elsewhere.
fn store_wide(cpu: &mut Cpu, register: u8, value: u64) {
    cpu.user.gpr[usize::from(register)] = if cpu.is_64bit() { value } else { value & 0xffff_ffff };
}

/// LMSW.
pub fn lmsw<S: Operand>(cpu: &mut Cpu, op: &Op) -> F {
    cpu.require_cpl0()?;
    let value = u64::from(S::get::<u16>(cpu, op)?);
    let keep_pe = cpu.control.cr0 & cr0::PE;
    let low = cr0::PE | cr0::MP | cr0::EM | cr0::TS;
    let new = cpu.control.cr0 & !low | value & low | keep_pe;
    cpu.write_cr0(new)?;
    Ok(Flow::End)
}

/// SMSW.
pub fn smsw<T: Int, D: Target>(cpu: &mut Cpu, op: &Op) -> F {
    cpu.require_umip()?;
    D::set(cpu, op, T::from_u64(cpu.control.cr0))?;
    Ok(Flow::Next)
}

/// CLTS.
pub fn clts(cpu: &mut Cpu, _: &Op) -> F {
    cpu.require_cpl0()?;
    cpu.control.cr0 &= !cr0::TS;
    cpu.update_disabled();
    Ok(Flow::Next)
}

/// MOV to a debug register.
pub fn mov_to_dr(cpu: &mut Cpu, op: &Op) -> F {
    cpu.require_cpl0()?;
    let number = cpu.debug_register(op.aux)?;
    let value = cpu.user.gpr[usize::from(op.reg)];
    match number {
        0..=3 => cpu.debug.dr[usize::from(number)] = value,
        6 | 7 if cpu.is_64bit() && value >> 32 != 0 => return cpu.gp0(),
        6 => cpu.debug.dr6 = value & 0xe00f | dr6::FIXED,
        _ => cpu.debug.dr7 = value & 0xffff_2bff | dr7::FIXED,
    }
    if number != 6 {
        cpu.update_watchpoints();
    }
    Ok(Flow::End)
}

/// MOV from a debug register.
pub fn mov_from_dr(cpu: &mut Cpu, op: &Op) -> F {
    cpu.require_cpl0()?;
    let value = match cpu.debug_register(op.aux)? {
        number @ 0..=3 => cpu.debug.dr[usize::from(number)],
        6 => cpu.debug.dr6,
        _ => cpu.debug.dr7,
    };
    store_wide(cpu, op.reg, value);
    Ok(Flow::Next)
}

/// INVLPG.
pub fn invlpg(cpu: &mut Cpu, op: &Op) -> F {
    cpu.require_cpl0()?;
    let offset = op.offset(&cpu.user);
    let address = cpu.user.segment_base[usize::from(op.segment)].wrapping_add(offset);
    cpu.flush_page(cpu.wrap_linear(address));
    Ok(Flow::End)
}

/// INVPCID: types 0 and 1 flush one context, 2 everything, 3 everything but global pages.
pub fn invpcid(cpu: &mut Cpu, op: &Op) -> F {
    cpu.require_cpl0()?;
    let kind = if cpu.is_64bit() { cpu.reg::<u64>(op.reg) } else { u64::from(cpu.reg::<u32>(op.reg)) };
    let address = cpu.address(op, 16, Access::Read)?;
    let pcid = cpu.read::<u64>(address)?;
    let linear_address = cpu.wrap_linear(address.wrapping_add(8));
    let linear = cpu.read::<u64>(linear_address)?;
    let no_pcid = cpu.control.cr4 & cr4::PCIDE == 0;
    let bad = kind > 3
        || kind < 2 && (pcid >> 12 != 0 || no_pcid && pcid != 0)
        || kind == 0 && !Cpu::is_canonical(linear);
    if bad {
        return cpu.gp0();
    }
    if kind == 0 {
        cpu.flush_page(linear);
    } else {
        cpu.flush_translations(kind != 2);
    }
    Ok(Flow::End)
}

/// SWAPGS.
pub fn swapgs(cpu: &mut Cpu, _: &Op) -> F {
    if !cpu.is_64bit() {
        return cpu.ud();
    }
    cpu.require_cpl0()?;
    let base = cpu.segments[seg::GS].base;
    cpu.segments[seg::GS].base = cpu.msrs.kernel_gs_base;
    cpu.user.segment_base[seg::GS] = cpu.msrs.kernel_gs_base;
    cpu.msrs.kernel_gs_base = base;
    Ok(Flow::Next)
}

/// RDFSBASE, RDGSBASE (`aux` is the segment, bit 7 for the write forms).
pub fn segment_base<T: Int>(cpu: &mut Cpu, op: &Op) -> F {
    if !cpu.is_64bit() || cpu.control.cr4 & cr4::FSGSBASE == 0 {
        return cpu.ud();
    }
    let index = usize::from(op.aux & 0x7f);
    if op.aux & 0x80 == 0 {
        cpu.set_reg(op.reg, T::from_u64(cpu.segments[index].base));
        return Ok(Flow::Next);
    }
    let base = cpu.reg::<T>(op.reg).zext();
    if !Cpu::is_canonical(base) {
        return cpu.gp0();
    }
    cpu.segments[index].base = base;
    cpu.user.segment_base[index] = base;
    Ok(Flow::Next)
}

// ---- identification, MSRs, time -----------------------------------------------------------------------------------------

/// CPUID.
pub fn cpuid(cpu: &mut Cpu, _: &Op) -> F {
    cpu.counters.cpuid += 1;
    let (leaf, subleaf) = (cpu.user.gpr[gpr::RAX] as u32, cpu.user.gpr[gpr::RCX] as u32);
    let result = cpu.cpuid_now(leaf, subleaf);
    cpu.user.gpr[gpr::RAX] = u64::from(result.eax);
    cpu.user.gpr[gpr::RBX] = u64::from(result.ebx);
    cpu.user.gpr[gpr::RCX] = u64::from(result.ecx);
    cpu.user.gpr[gpr::RDX] = u64::from(result.edx);
    Ok(Flow::Next)
}

fn set_edx_eax(cpu: &mut Cpu, value: u64) {
    cpu.user.gpr[gpr::RAX] = value & 0xffff_ffff;
    cpu.user.gpr[gpr::RDX] = value >> 32;
}

fn edx_eax(cpu: &Cpu) -> u64 {
    cpu.user.gpr[gpr::RAX] & 0xffff_ffff | cpu.user.gpr[gpr::RDX] << 32
}

/// RDMSR.
pub fn rdmsr(cpu: &mut Cpu, _: &Op) -> F {
    cpu.require_cpl0()?;
    cpu.counters.rdmsr += 1;
    let index = cpu.user.gpr[gpr::RCX] as u32;
    match cpu.read_msr(index) {
        Ok(value) => {
            set_edx_eax(cpu, value);
            Ok(Flow::Next)
        }
        Err(BadMsr::Unknown) if !cpu.shared.strict_msr => {
            tracing::debug!("vCPU {}: RDMSR of unknown register {index:#x} gives 0", cpu.id);
            set_edx_eax(cpu, 0);
            Ok(Flow::Next)
        }
        Err(why) => {
            tracing::debug!("vCPU {}: RDMSR of {index:#x} faults: {why:?}", cpu.id);
            cpu.gp0()
        }
    }
}

/// WRMSR.
pub fn wrmsr(cpu: &mut Cpu, _: &Op) -> F {
    cpu.require_cpl0()?;
    cpu.counters.wrmsr += 1;
    let (index, value) = (cpu.user.gpr[gpr::RCX] as u32, edx_eax(cpu));
    match cpu.write_msr(index, value) {
        Ok(()) => Ok(Flow::End),
        Err(BadMsr::Unknown) if !cpu.shared.strict_msr => {
            tracing::debug!("vCPU {}: WRMSR of {value:#x} to unknown register {index:#x} ignored", cpu.id);
            Ok(Flow::End)
        }
        Err(why) => {
            tracing::debug!("vCPU {}: WRMSR of {value:#x} to {index:#x} faults: {why:?}", cpu.id);
            cpu.gp0()
        }
    }
}

/// RDTSC; with `aux` 1 RDTSCP.
pub fn rdtsc(cpu: &mut Cpu, op: &Op) -> F {
    if cpu.cpl > 0 && cpu.control.cr4 & cr4::TSD != 0 {
        return cpu.gp0();
    }
    let tsc = cpu.tsc();
    set_edx_eax(cpu, tsc);
    if op.aux != 0 {
        cpu.user.gpr[gpr::RCX] = cpu.msrs.tsc_aux;
    }
    Ok(Flow::Next)
}

/// RDPID.
pub fn rdpid(cpu: &mut Cpu, op: &Op) -> F {
    cpu.user.gpr[usize::from(op.reg & 15)] = cpu.msrs.tsc_aux;
    Ok(Flow::Next)
}

/// RDPMC: there are no counters.
pub fn rdpmc(cpu: &mut Cpu, _: &Op) -> F {
    cpu.gp0()
}

/// XGETBV.
pub fn xgetbv(cpu: &mut Cpu, _: &Op) -> F {
    if cpu.control.cr4 & cr4::OSXSAVE == 0 {
        return cpu.ud();
    }
    let value = match cpu.user.gpr[gpr::RCX] as u32 {
        0 => cpu.control.xcr0,
        1 => cpu.control.xcr0 & cpu.xstate_in_use(),
        _ => return cpu.gp0(),
    };
    set_edx_eax(cpu, value);
    Ok(Flow::Next)
}

/// XSETBV.
pub fn xsetbv(cpu: &mut Cpu, _: &Op) -> F {
    if cpu.control.cr4 & cr4::OSXSAVE == 0 {
        return cpu.ud();
    }
    cpu.require_cpl0()?;
    if cpu.user.gpr[gpr::RCX] as u32 != 0 {
        return cpu.gp0();
    }
    let value = edx_eax(cpu);
    cpu.write_xcr0(value)?;
    Ok(Flow::End)
}

// ---- ports --------------------------------------------------------------------------------------------------------

impl Cpu {
    /// IN: reads a port of 1, 2 or 4 bytes.
    pub fn port_in(&mut self, port: u16, size: u8) -> u32 {
        self.counters.port_in += 1;
        let mut data = [0xff; 4];
        let data_used = &mut data[..usize::from(size)];
        if crate::chips::Chips::handles_port(port) {
            self.shared.chips.port_read(port, data_used);
        } else {
            let io = self.shared.io.clone();
            io.port_read(self.id, port, data_used);
        }
        self.match_io_breakpoints(port, u64::from(size));
        u32::from_le_bytes(data) & (u32::MAX >> (32 - 8 * u32::from(size)))
    }

    /// OUT: writes a port.
    pub fn port_out(&mut self, port: u16, size: u8, value: u32) {
        self.counters.port_out += 1;
        let data = value.to_le_bytes();
        let data = &data[..usize::from(size)];
        if crate::chips::Chips::handles_port(port) {
            self.shared.chips.port_write(port, data);
        } else {
            let io = self.shared.io.clone();
            io.port_write(self.id, port, data);
        }
        self.match_io_breakpoints(port, u64::from(size));
    }
}

/// Port operand: the immediate, or DX if `aux` is set.
fn port(cpu: &Cpu, op: &Op) -> u16 {
    if op.aux != 0 { cpu.user.gpr[gpr::RDX] as u16 } else { op.imm as u16 }
}

/// IN.
pub fn port_in<T: Int>(cpu: &mut Cpu, op: &Op) -> F {
    let port = port(cpu, op);
    cpu.check_port(port, T::BYTES as u8)?;
    let value = cpu.port_in(port, T::BYTES as u8);
    cpu.set_reg(0, T::from_u64(u64::from(value)));
    // Attention may have been asked for by what the device did.
    Ok(Flow::End)
}

/// OUT.
pub fn port_out<T: Int>(cpu: &mut Cpu, op: &Op) -> F {
    let port = port(cpu, op);
    cpu.check_port(port, T::BYTES as u8)?;
    let value = cpu.reg::<T>(0).zext() as u32;
    cpu.port_out(port, T::BYTES as u8, value);
    Ok(Flow::End)
}

/// XLAT.
pub fn xlat(cpu: &mut Cpu, op: &Op) -> F {
    let offset = op.offset(&cpu.user).wrapping_add(cpu.user.gpr[gpr::RAX] & 0xff) & op.address_mask;
    let address = cpu.linear(op.segment, offset, 1, Access::Read)?;
    let value = cpu.read::<u8>(address)?;
    cpu.set_reg(0, value);
    Ok(Flow::Next)
}

/// SALC, undocumented: AL becomes 0 or FFh as CF says.
pub fn salc(cpu: &mut Cpu, _: &Op) -> F {
    let value = if cpu.user.status & crate::interp::alu::CF != 0 { 0xffu8 } else { 0 };
    cpu.set_reg(0, value);
    Ok(Flow::Next)
}

/// Makes stores visible before what follows: MFENCE and serialising instructions.
pub fn fence(_: &mut Cpu, _: &Op) -> F {
    std::sync::atomic::fence(Ordering::SeqCst);
    Ok(Flow::Next)
}
