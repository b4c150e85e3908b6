//! Data movement, integer arithmetic and near control flow: what most instructions are.

use crate::cpu::{Cpu, R, Raised, gpr};
use crate::interp::alu::{CF, Int, OF, condition};
use crate::interp::op::{Flow, Op};
use crate::mmu::Access;

type F = R<Flow>;

// ---- operands ---------------------------------------------------------------------------------------------------

/// Where an operand is, decided when the instruction is decoded.
pub trait Operand {
    /// Loads it.
    fn get<T: Int>(cpu: &mut Cpu, op: &Op) -> R<T>;
}

/// An operand that can be updated: loads, computes, stores.
pub trait Target: Operand {
    /// Replaces the value by `f`'s result; `f` also yields the status to set.
    fn update<T: Int>(cpu: &mut Cpu, op: &Op, f: impl FnOnce(T) -> (T, u16)) -> R<u16>;
    /// Stores a value.
    fn set<T: Int>(cpu: &mut Cpu, op: &Op, value: T) -> R<()>;
}

/// The register in [`Op::reg`].
pub struct Reg;
/// The register in [`Op::rm`].
pub struct Rm;
/// The memory operand.
pub struct Mem;
/// The immediate.
pub struct Imm;

impl Operand for Reg {
    #[inline(always)]
    fn get<T: Int>(cpu: &mut Cpu, op: &Op) -> R<T> {
        Ok(cpu.reg(op.reg))
    }
}

impl Operand for Rm {
    #[inline(always)]
    fn get<T: Int>(cpu: &mut Cpu, op: &Op) -> R<T> {
        Ok(cpu.reg(op.rm))
    }
}

impl Operand for Mem {
    #[inline(always)]
    fn get<T: Int>(cpu: &mut Cpu, op: &Op) -> R<T> {
        cpu.load(op)
    }
}

impl Operand for Imm {
    #[inline(always)]
    fn get<T: Int>(_: &mut Cpu, op: &Op) -> R<T> {
        Ok(T::from_u64(op.imm))
    }
}

impl Target for Reg {
    #[inline(always)]
    fn update<T: Int>(cpu: &mut Cpu, op: &Op, f: impl FnOnce(T) -> (T, u16)) -> R<u16> {
        let (result, status) = f(cpu.reg(op.reg));
        cpu.set_reg(op.reg, result);
        Ok(status)
    }

    #[inline(always)]
    fn set<T: Int>(cpu: &mut Cpu, op: &Op, value: T) -> R<()> {
        cpu.set_reg(op.reg, value);
        Ok(())
    }
}

impl Target for Mem {
    #[inline(always)]
    fn update<T: Int>(cpu: &mut Cpu, op: &Op, f: impl FnOnce(T) -> (T, u16)) -> R<u16> {
        let address = cpu.address(op, T::BYTES, Access::Write)?;
        if let Some(update) = cpu.host_for_update(address, u64::from(T::BYTES))? {
            let host: *mut T = update.host.cast();
            // SAFETY: `host_for_update` vouches for the bytes.
            let (result, status) = f(unsafe { host.read_unaligned() });
            // SAFETY: as above.
            unsafe { host.write_unaligned(result) };
            cpu.updated(update);
            return Ok(status);
        }
        cpu.probe_write(address, u64::from(T::BYTES))?;
        let (result, status) = f(cpu.read(address)?);
        cpu.write(address, result)?;
        Ok(status)
    }

    #[inline(always)]
    fn set<T: Int>(cpu: &mut Cpu, op: &Op, value: T) -> R<()> {
        cpu.store(op, value)
    }
}

// ---- data movement ----------------------------------------------------------------------------------------------

/// MOV.
pub fn mov<T: Int, D: Target, S: Operand>(cpu: &mut Cpu, op: &Op) -> F {
    let value = S::get::<T>(cpu, op)?;
    D::set(cpu, op, value)?;
    Ok(Flow::Next)
}

/// MOVZX.
pub fn movzx<T: Int, N: Int, S: Operand>(cpu: &mut Cpu, op: &Op) -> F {
    let value = S::get::<N>(cpu, op)?;
    cpu.set_reg(op.reg, T::from_u64(value.zext()));
    Ok(Flow::Next)
}

/// MOVSX and MOVSXD.
pub fn movsx<T: Int, N: Int, S: Operand>(cpu: &mut Cpu, op: &Op) -> F {
    let value = S::get::<N>(cpu, op)?;
    cpu.set_reg(op.reg, T::from_u64(value.sext() as u64));
    Ok(Flow::Next)
}

/// LEA.
pub fn lea<T: Int>(cpu: &mut Cpu, op: &Op) -> F {
    let offset = op.offset(&cpu.user);
    cpu.set_reg(op.reg, T::from_u64(offset));
    Ok(Flow::Next)
}

/// XCHG between registers.
pub fn xchg<T: Int>(cpu: &mut Cpu, op: &Op) -> F {
    let (a, b) = (cpu.reg::<T>(op.reg), cpu.reg::<T>(op.rm));
    cpu.set_reg(op.reg, b);
    cpu.set_reg(op.rm, a);
    Ok(Flow::Next)
}

/// CMOVcc; the source is read whether or not the condition holds.
pub fn cmov<T: Int, S: Operand>(cpu: &mut Cpu, op: &Op) -> F {
    let value = S::get::<T>(cpu, op)?;
    let value = if condition(cpu.user.status, op.aux) { value } else { cpu.reg(op.reg) };
    cpu.set_reg(op.reg, value);
    Ok(Flow::Next)
}

/// SETcc.
pub fn setcc<D: Target>(cpu: &mut Cpu, op: &Op) -> F {
    let value = u8::from(condition(cpu.user.status, op.aux));
    D::set(cpu, op, value)?;
    Ok(Flow::Next)
}

/// CBW, CWDE, CDQE.
pub fn extend_accumulator<T: Int, N: Int>(cpu: &mut Cpu, _: &Op) -> F {
    let value = cpu.reg::<N>(0).sext() as u64;
    cpu.set_reg(0, T::from_u64(value));
    Ok(Flow::Next)
}

/// CWD, CDQ, CQO.
pub fn sign_to_dx<T: Int>(cpu: &mut Cpu, _: &Op) -> F {
    let sign = cpu.reg::<T>(0).sext() >> 63;
    cpu.set_reg(gpr::RDX as u8, T::from_u64(sign as u64));
    Ok(Flow::Next)
}

/// NOP, prefetches, ENDBR and other hints.
pub fn nop(_: &mut Cpu, _: &Op) -> F {
    Ok(Flow::Next)
}

// ---- arithmetic -------------------------------------------------------------------------------------------------

/// An operation with two inputs.
pub trait Binary {
    /// Whether the result is stored (not for CMP and TEST).
    const STORES: bool = true;
    /// Result and flags.
    fn apply<T: Int>(a: T, b: T, status: u16) -> (T, u16);
}

macro_rules! binary {
    ($name:ident, $stores:literal, |$a:ident, $b:ident, $s:ident| $e:expr) => {
        #[doc = concat!("`", stringify!($name), "`")]
        pub struct $name;
        impl Binary for $name {
            const STORES: bool = $stores;
            #[inline(always)]
            fn apply<T: Int>($a: T, $b: T, $s: u16) -> (T, u16) {
                let _ = $s;
                $e
            }
        }
    };
}

binary!(Add, true, |a, b, s| a.add(b));
binary!(Or, true, |a, b, s| a.or(b));
binary!(Adc, true, |a, b, s| a.adc(b, s));
binary!(Sbb, true, |a, b, s| a.sbb(b, s));
binary!(And, true, |a, b, s| a.and(b));
binary!(Sub, true, |a, b, s| a.sub(b));
binary!(Xor, true, |a, b, s| a.xor(b));
binary!(Cmp, false, |a, b, s| a.sub(b));
binary!(Test, false, |a, b, s| a.and(b));

/// ADD, OR, ADC, SBB, AND, SUB, XOR, CMP, TEST.
pub fn binary<O: Binary, T: Int, D: Target, S: Operand>(cpu: &mut Cpu, op: &Op) -> F {
    let status = cpu.user.status;
    let b = S::get::<T>(cpu, op)?;
    cpu.user.status = if O::STORES {
        D::update::<T>(cpu, op, |a| O::apply(a, b, status))?
    } else {
        O::apply(D::get::<T>(cpu, op)?, b, status).1
    };
    Ok(Flow::Next)
}

/// An operation with one input.
pub trait Unary {
    /// Result and flags.
    fn apply<T: Int>(a: T, status: u16) -> (T, u16);
}

macro_rules! unary {
    ($name:ident, |$a:ident, $s:ident| $e:expr) => {
        #[doc = concat!("`", stringify!($name), "`")]
        pub struct $name;
        impl Unary for $name {
            #[inline(always)]
            fn apply<T: Int>($a: T, $s: u16) -> (T, u16) {
                $e
            }
        }
    };
}

/// Keeps CF of the old status: INC and DEC leave it alone.
#[inline(always)]
fn keep_carry<T>(result: (T, u16), old: u16) -> (T, u16) {
    (result.0, result.1 & !CF | old & CF)
}

unary!(Inc, |a, s| keep_carry(a.add(T::from_u64(1)), s));
unary!(Dec, |a, s| keep_carry(a.sub(T::from_u64(1)), s));
unary!(Neg, |a, s| {
    let _ = s;
    T::from_u64(0).sub(a)
});
unary!(Not, |a, s| (T::from_u64(!a.zext()), s));

/// INC, DEC, NEG, NOT.
pub fn unary<O: Unary, T: Int, D: Target>(cpu: &mut Cpu, op: &Op) -> F {
    let status = cpu.user.status;
    cpu.user.status = D::update::<T>(cpu, op, |a| O::apply(a, status))?;
    Ok(Flow::Next)
}

/// A shift or rotation.
pub trait Shift {
    /// Result and flags for a masked count other than zero.
    fn apply<T: Int>(a: T, count: u8, status: u16) -> (T, u16);
}

/// Keeps everything but CF and OF: rotations change only those.
#[inline(always)]
fn only_carry_overflow<T>(result: (T, u16), old: u16) -> (T, u16) {
    (result.0, old & !(CF | OF) | result.1 & (CF | OF))
}

macro_rules! shift {
    ($name:ident, |$a:ident, $c:ident, $s:ident| $e:expr) => {
        #[doc = concat!("`", stringify!($name), "`")]
        pub struct $name;
        impl Shift for $name {
            #[inline(always)]
            fn apply<T: Int>($a: T, $c: u8, $s: u16) -> (T, u16) {
                let _ = $s;
                $e
            }
        }
    };
}

shift!(Shl, |a, c, s| a.shl(c));
shift!(Shr, |a, c, s| a.shr(c));
shift!(Sar, |a, c, s| a.sar(c));
shift!(Rol, |a, c, s| only_carry_overflow(a.rol(c), s));
shift!(Ror, |a, c, s| only_carry_overflow(a.ror(c), s));
shift!(Rcl, |a, c, s| only_carry_overflow(a.rcl(c, s), s));
shift!(Rcr, |a, c, s| only_carry_overflow(a.rcr(c, s), s));

#[inline(always)]
fn shift_by<O: Shift, T: Int, D: Target>(cpu: &mut Cpu, op: &Op, count: u8) -> F {
    let count = count & if T::BYTES == 8 { 63 } else { 31 };
    let status = cpu.user.status;
    cpu.user.status =
        D::update::<T>(cpu, op, |a| if count == 0 { (a, status) } else { O::apply(a, count, status) })?;
    Ok(Flow::Next)
}

/// Shift or rotation by an immediate.
pub fn shift_imm<O: Shift, T: Int, D: Target>(cpu: &mut Cpu, op: &Op) -> F {
    shift_by::<O, T, D>(cpu, op, op.imm as u8)
}

/// Shift or rotation by CL.
pub fn shift_cl<O: Shift, T: Int, D: Target>(cpu: &mut Cpu, op: &Op) -> F {
    let count = cpu.user.gpr[gpr::RCX] as u8;
    shift_by::<O, T, D>(cpu, op, count)
}

/// IMUL with two operands.
pub fn imul<T: Int, S: Operand>(cpu: &mut Cpu, op: &Op) -> F {
    let b = S::get::<T>(cpu, op)?;
    let (result, status) = cpu.reg::<T>(op.reg).imul(b);
    cpu.set_reg(op.reg, result);
    cpu.user.status = status;
    Ok(Flow::Next)
}

/// IMUL with an immediate.
pub fn imul_imm<T: Int, S: Operand>(cpu: &mut Cpu, op: &Op) -> F {
    let a = S::get::<T>(cpu, op)?;
    let (result, status) = a.imul(T::from_u64(op.imm));
    cpu.set_reg(op.reg, result);
    cpu.user.status = status;
    Ok(Flow::Next)
}

/// CLC, STC, CMC, CLD, STD: `aux` is the low opcode byte.
pub fn flag_operation(cpu: &mut Cpu, op: &Op) -> F {
    match op.aux {
        0xf8 => cpu.user.status &= !CF,
        0xf9 => cpu.user.status |= CF,
        0xf5 => cpu.user.status ^= CF,
        0xfc => cpu.user.direction = 0,
        _ => cpu.user.direction = 1,
    }
    Ok(Flow::Next)
}

/// LAHF.
pub fn lahf(cpu: &mut Cpu, _: &Op) -> F {
    cpu.user.gpr[gpr::RAX] = cpu.user.gpr[gpr::RAX] & !0xff00 | u64::from(cpu.user.status & 0xff00);
    Ok(Flow::Next)
}

/// SAHF.
pub fn sahf(cpu: &mut Cpu, _: &Op) -> F {
    let ah = cpu.user.gpr[gpr::RAX] as u16 & 0xd500;
    cpu.user.status = ah | crate::user::status::ALWAYS | cpu.user.status & OF;
    Ok(Flow::Next)
}

/// BT, BTS, BTR, BTC on a bit string in memory: the register selects a bit relative to the operand's address, in both
/// directions. `aux`: 0 BT, 1 BTS, 2 BTR, 3 BTC; `extra`: 1 if LOCKed.
pub fn bit_string<T: Int>(cpu: &mut Cpu, op: &Op) -> F {
    let index = cpu.reg::<T>(op.reg).sext();
    let bit = (index & i64::from(T::BITS - 1)) as u32;
    let displaced = (index >> T::BITS.trailing_zeros()) * i64::from(T::BYTES);
    let offset = op.offset(&cpu.user).wrapping_add(displaced as u64) & op.address_mask;
    let access = if op.aux == 0 { Access::Read } else { Access::Write };
    let address = cpu.linear(op.segment, offset, T::BYTES, access)?;
    let mask = 1u64 << bit;
    let apply = |old: u64| match op.aux {
        1 => old | mask,
        2 => old & !mask,
        _ => old ^ mask,
    };
    let old = if op.aux == 0 {
        cpu.read::<T>(address)?.zext()
    } else if op.extra != 0 {
        cpu.locked_update::<T>(address, apply)?
    } else {
        cpu.probe_write(address, u64::from(T::BYTES))?;
        let old = cpu.read::<T>(address)?.zext();
        cpu.write(address, T::from_u64(apply(old)))?;
        old
    };
    let carry = if old & mask != 0 { CF } else { 0 };
    cpu.user.status = cpu.user.status & !CF | carry;
    Ok(Flow::Next)
}

// ---- stack ------------------------------------------------------------------------------------------------------

/// PUSH.
pub fn push<T: Int, S: Operand>(cpu: &mut Cpu, op: &Op) -> F {
    let value = S::get::<T>(cpu, op)?;
    cpu.push(value)?;
    Ok(Flow::Next)
}

/// POP to a register.
pub fn pop<T: Int>(cpu: &mut Cpu, op: &Op) -> F {
    let value = cpu.peek::<T>(0)?;
    cpu.drop_stack(u64::from(T::BYTES));
    cpu.set_reg(op.reg, value);
    Ok(Flow::Next)
}

/// POP to memory; an address based on RSP uses its value after the pop.
pub fn pop_memory<T: Int>(cpu: &mut Cpu, op: &Op) -> F {
    let value = cpu.peek::<T>(0)?;
    let rsp = cpu.user.gpr[gpr::RSP];
    cpu.drop_stack(u64::from(T::BYTES));
    if let Err(raised) = cpu.store(op, value) {
        cpu.user.gpr[gpr::RSP] = rsp;
        return Err(raised);
    }
    Ok(Flow::Next)
}

/// PUSHA, PUSHAD.
pub fn push_all<T: Int>(cpu: &mut Cpu, _: &Op) -> F {
    let rsp = cpu.user.gpr[gpr::RSP];
    for register in 0..8 {
        let value = if register == gpr::RSP { rsp } else { cpu.user.gpr[register] };
        if let Err(raised) = cpu.push(T::from_u64(value)) {
            cpu.user.gpr[gpr::RSP] = rsp;
            return Err(raised);
        }
    }
    Ok(Flow::Next)
}

/// POPA, POPAD.
pub fn pop_all<T: Int>(cpu: &mut Cpu, _: &Op) -> F {
    let mut values = [T::from_u64(0); 8];
    for (index, value) in values.iter_mut().enumerate() {
        *value = cpu.peek(index as u64 * u64::from(T::BYTES))?;
    }
    cpu.drop_stack(8 * u64::from(T::BYTES));
    for (index, value) in values.iter().enumerate() {
        let register = 7 - index;
        if register != gpr::RSP {
            cpu.set_reg(register as u8, *value);
        }
    }
    Ok(Flow::Next)
}

/// LEAVE.
pub fn leave<T: Int>(cpu: &mut Cpu, _: &Op) -> F {
    let old = cpu.user.gpr[gpr::RSP];
    cpu.set_stack_pointer(cpu.user.gpr[gpr::RBP]);
    match cpu.peek::<T>(0) {
        Ok(value) => {
            cpu.drop_stack(u64::from(T::BYTES));
            cpu.set_reg(gpr::RBP as u8, value);
            Ok(Flow::Next)
        }
        Err(raised) => {
            cpu.user.gpr[gpr::RSP] = old;
            Err(raised)
        }
    }
}

/// ENTER: `imm` holds the frame size and, from bit 16, the nesting level.
pub fn enter<T: Int>(cpu: &mut Cpu, op: &Op) -> F {
    let (size, level) = (op.imm & 0xffff, (op.imm >> 16) & 31);
    let (rsp, rbp) = (cpu.user.gpr[gpr::RSP], cpu.user.gpr[gpr::RBP]);
    let result = enter_frame::<T>(cpu, size, level);
    if result.is_err() {
        cpu.user.gpr[gpr::RSP] = rsp;
        cpu.user.gpr[gpr::RBP] = rbp;
    }
    result
}

fn enter_frame<T: Int>(cpu: &mut Cpu, size: u64, level: u64) -> F {
    cpu.push(T::from_u64(cpu.user.gpr[gpr::RBP]))?;
    let frame = cpu.user.gpr[gpr::RSP];
    if level > 0 {
        let mut rbp = cpu.user.gpr[gpr::RBP];
        for _ in 1..level {
            rbp = rbp.wrapping_sub(u64::from(T::BYTES));
            let offset = rbp & cpu.stack_mask;
            let address = cpu.linear(crate::cpu::seg::SS as u8, offset, T::BYTES, Access::Read)?;
            let value = cpu.read::<T>(address)?;
            cpu.push(value)?;
        }
        cpu.push(T::from_u64(frame))?;
    }
    let rsp = cpu.user.gpr[gpr::RSP].wrapping_sub(size);
    // The new top must be writable.
    let offset = rsp & cpu.stack_mask;
    let address = cpu.linear(crate::cpu::seg::SS as u8, offset, T::BYTES, Access::Write)?;
    cpu.probe_write(address, u64::from(T::BYTES))?;
    cpu.set_stack_pointer(rsp);
    cpu.set_reg(gpr::RBP as u8, T::from_u64(frame));
    Ok(Flow::Next)
}

// ---- near control flow --------------------------------------------------------------------------------------------

/// Jcc.
pub fn jcc(cpu: &mut Cpu, op: &Op) -> F {
    if condition(cpu.user.status, op.aux) {
        let target = cpu.next_ip.wrapping_add(op.imm);
        return cpu.jump(target, op.size);
    }
    Ok(Flow::End)
}

/// JMP to a relative target.
pub fn jmp(cpu: &mut Cpu, op: &Op) -> F {
    let target = cpu.next_ip.wrapping_add(op.imm);
    cpu.jump(target, op.size)
}

/// JMP through a register or memory.
pub fn jmp_indirect<T: Int, S: Operand>(cpu: &mut Cpu, op: &Op) -> F {
    let target = S::get::<T>(cpu, op)?.zext();
    cpu.jump(target, T::BYTES as u8)
}

/// CALL to a relative target.
pub fn call<T: Int>(cpu: &mut Cpu, op: &Op) -> F {
    let target = cpu.next_ip.wrapping_add(op.imm);
    call_to::<T>(cpu, target)
}

/// CALL through a register or memory.
pub fn call_indirect<T: Int, S: Operand>(cpu: &mut Cpu, op: &Op) -> F {
    let target = S::get::<T>(cpu, op)?.zext();
    call_to::<T>(cpu, target)
}

#[inline(always)]
fn call_to<T: Int>(cpu: &mut Cpu, target: u64) -> F {
    let back = cpu.next_ip;
    if let Err(raised) = cpu.jump(target, T::BYTES as u8) {
        return bad_call::<T>(cpu, raised);
    }
    cpu.push(T::from_u64(back))?;
    Ok(Flow::End)
}

/// A bad target is reported only if the stack is good; nothing is pushed.
#[cold]
fn bad_call<T: Int>(cpu: &mut Cpu, raised: Raised) -> F {
    let fault = cpu.fault;
    let offset = cpu.user.gpr[gpr::RSP].wrapping_sub(u64::from(T::BYTES)) & cpu.stack_mask;
    let address = cpu.linear(crate::cpu::seg::SS as u8, offset, T::BYTES, Access::Write)?;
    cpu.probe_write(address, u64::from(T::BYTES)).map_err(|raised| cpu.on_stack(raised))?;
    cpu.fault = fault;
    cpu.fault_noncanonical = false;
    Err(raised)
}

/// RET, RET imm16.
pub fn ret<T: Int>(cpu: &mut Cpu, op: &Op) -> F {
    let target = cpu.peek::<T>(0)?.zext();
    cpu.jump(target, T::BYTES as u8)?;
    cpu.drop_stack(u64::from(T::BYTES) + op.imm);
    Ok(Flow::End)
}

/// LOOP, LOOPE, LOOPNE, JCXZ: `aux` is the opcode, `address_mask` the width of the counter.
pub fn loop_branch(cpu: &mut Cpu, op: &Op) -> F {
    let mask = op.address_mask;
    let mut count = cpu.user.gpr[gpr::RCX] & mask;
    let zero_flag = condition(cpu.user.status, 4);
    let taken = if op.aux == 0xe3 {
        count == 0
    } else {
        count = count.wrapping_sub(1) & mask;
        count != 0
            && match op.aux {
                0xe0 => !zero_flag,
                0xe1 => zero_flag,
                _ => true,
            }
    };
    if taken {
        let target = cpu.next_ip.wrapping_add(op.imm);
        cpu.jump(target, op.size)?;
    }
    if op.aux != 0xe3 {
        let rcx = &mut cpu.user.gpr[gpr::RCX];
        *rcx = if mask == 0xffff { *rcx & !0xffff | count } else { count };
    }
    Ok(Flow::End)
}

// ---- BCD, for legacy modes ----------------------------------------------------------------------------------------

/// DAA, DAS, AAA, AAS, AAM, AAD: `aux` is the opcode (SDM 2).
pub fn bcd(cpu: &mut Cpu, op: &Op) -> F {
    const AF: u16 = 0x1000;
    let status = cpu.user.status;
    let (af, cf) = (status & AF != 0, status & CF != 0);
    let ax = cpu.user.gpr[gpr::RAX] as u16;
    let al = ax as u8;
    let (mut result, mut set) = (ax, 0u16);
    // Flags follow AL, except CF and AF which the digit adjustment decides.
    let mut adjusted = true;
    match op.aux {
        0x27 | 0x2f => {
            let subtract = op.aux == 0x2f;
            let mut value = al;
            let mut carry = false;
            if al & 0xf > 9 || af {
                carry = cf || if subtract { al < 6 } else { al > 0xff - 6 };
                value = if subtract { value.wrapping_sub(6) } else { value.wrapping_add(6) };
                set |= AF;
            }
            if al > 0x99 || cf {
                value = if subtract { value.wrapping_sub(0x60) } else { value.wrapping_add(0x60) };
                carry = true;
            }
            set |= if carry { CF } else { 0 };
            result = ax & 0xff00 | u16::from(value);
        }
        0x37 | 0x3f => {
            if al & 0xf > 9 || af {
                result = if op.aux == 0x37 { ax.wrapping_add(0x106) } else { ax.wrapping_sub(0x106) };
                set |= AF | CF;
            }
            result &= 0xff0f;
        }
        0xd4 => {
            let base = op.imm as u8;
            if base == 0 {
                return Err(cpu.raise(x86::Exception::plain(x86::Vector::DivideError)));
            }
            result = u16::from(al / base) << 8 | u16::from(al % base);
            adjusted = false;
        }
        _ => {
            let high = (ax >> 8) as u8;
            result = u16::from(high.wrapping_mul(op.imm as u8).wrapping_add(al));
            adjusted = false;
        }
    }
    let logical = (result as u8).and(result as u8).1;
    cpu.user.status = logical & !(AF | CF | OF) | if adjusted { set } else { 0 };
    cpu.user.gpr[gpr::RAX] = cpu.user.gpr[gpr::RAX] & !0xffff | u64::from(result);
    Ok(Flow::Next)
}
