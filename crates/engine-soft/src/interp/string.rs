//! String instructions (SDM 2: MOVS, STOS, LODS, CMPS, SCAS, INS, OUTS) with their repeat prefixes. MOVS and STOS work
//! on whole pieces of pages where they can.

use x86::paging::{PAGE_MASK, PAGE_SIZE};

use crate::cpu::{Cpu, R, gpr, seg};
use crate::interp::alu::Int;
use crate::interp::op::{Flow, Op};
use crate::mmu::Access;

type F = R<Flow>;

/// Values of [`Op::extra`]: the repeat prefix.
pub mod repeat {
    #![allow(missing_docs)]
    pub const NONE: u32 = 0;
    pub const WHILE_EQUAL: u32 = 1;
    pub const WHILE_NOT_EQUAL: u32 = 2;
}

/// Iterations after which a repeated instruction lets interrupts in.
const BATCH: u64 = 4096;
/// ZF in packed status.
const ZF: u16 = 0x4000;

impl Cpu {
    fn string_source(&mut self, op: &Op, len: u32) -> R<u64> {
        let offset = self.user.gpr[gpr::RSI] & op.address_mask;
        self.linear(op.segment, offset, len, Access::Read)
    }

    fn string_target(&mut self, op: &Op, len: u32, access: Access) -> R<u64> {
        let offset = self.user.gpr[gpr::RDI] & op.address_mask;
        self.linear(seg::ES as u8, offset, len, access)
    }

    /// Moves a counter or pointer register within the address size.
    fn advance(&mut self, register: usize, by: u64, mask: u64) {
        let old = self.user.gpr[register];
        let new = old.wrapping_add(by);
        self.user.gpr[register] = match mask {
            u64::MAX => new,
            0xffff => old & !0xffff | new & 0xffff,
            _ => new & mask,
        };
    }

    fn string_step<T: Int>(&self) -> u64 {
        let bytes = u64::from(T::BYTES);
        if self.user.direction != 0 { bytes.wrapping_neg() } else { bytes }
    }
}

/// Runs `once` as the repeat prefix demands. `once` returns whether to go on (for CMPS and SCAS). If there is more to do after
/// a batch, the instruction starts over, so that interrupts are noticed.
#[inline(always)]
fn repeated(cpu: &mut Cpu, op: &Op, mut once: impl FnMut(&mut Cpu) -> R<bool>) -> F {
    if op.extra == repeat::NONE {
        once(cpu)?;
        return Ok(Flow::Next);
    }
    let mask = op.address_mask;
    let mut budget = if cpu.single_step { 1 } else { BATCH };
    while cpu.user.gpr[gpr::RCX] & mask != 0 {
        if budget == 0 || cpu.pending_debug != 0 {
            cpu.next_ip = cpu.user.rip;
            return Ok(Flow::End);
        }
        let go_on = once(cpu)?;
        cpu.advance(gpr::RCX, u64::MAX, mask);
        if !go_on {
            break;
        }
        budget -= 1;
    }
    Ok(Flow::Next)
}

/// How many elements of `size` fit between an address and the end of its page, at most `count`.
fn in_page(address: u64, size: u64, count: u64) -> u64 {
    ((PAGE_SIZE - (address & PAGE_MASK)) / size).min(count)
}

/// As [`repeated`], but with whole pieces of pages where `piece` can: it returns how many elements it did. Where it can do
/// none, which is mostly where one reaches into the next page, one goes by itself.
#[inline(always)]
fn by_pieces(
    cpu: &mut Cpu,
    op: &Op,
    piece: impl Fn(&mut Cpu) -> R<u64>,
    mut once: impl FnMut(&mut Cpu) -> R<bool>,
) -> F {
    /// What a piece counts for in a batch.
    const PIECE: u64 = 256;
    if op.extra == repeat::NONE || cpu.user.direction != 0 || !segments_allow_pieces(cpu, op) {
        return repeated(cpu, op, once);
    }
    let mask = op.address_mask;
    let mut budget = BATCH;
    while cpu.user.gpr[gpr::RCX] & mask != 0 {
        if budget == 0 || cpu.pending_debug != 0 {
            cpu.next_ip = cpu.user.rip;
            return Ok(Flow::End);
        }
        let done = piece(cpu)?;
        if done == 0 {
            once(cpu)?;
        }
        cpu.advance(gpr::RCX, done.max(1).wrapping_neg(), mask);
        budget = budget.saturating_sub(if done == 0 { 1 } else { PIECE });
    }
    Ok(Flow::Next)
}

/// MOVS.
pub fn movs<T: Int>(cpu: &mut Cpu, op: &Op) -> F {
    let mask = op.address_mask;
    by_pieces(
        cpu,
        op,
        |cpu| movs_piece::<T>(cpu, op),
        |cpu| {
            let source = cpu.string_source(op, T::BYTES)?;
            let value = cpu.read::<T>(source)?;
            let target = cpu.string_target(op, T::BYTES, Access::Write)?;
            cpu.write(target, value)?;
            let step = cpu.string_step::<T>();
            cpu.advance(gpr::RSI, step, mask);
            cpu.advance(gpr::RDI, step, mask);
            Ok(true)
        },
    )
}

/// Moves as many elements as lie in one source page and one target page of RAM.
fn movs_piece<T: Int>(cpu: &mut Cpu, op: &Op) -> R<u64> {
    let size = u64::from(T::BYTES);
    let mask = op.address_mask;
    let source = cpu.string_source(op, T::BYTES)?;
    let target = cpu.string_target(op, T::BYTES, Access::Write)?;
    let count = cpu.user.gpr[gpr::RCX] & mask;
    let mut count = in_page(target, size, in_page(source, size, count));
    count = stay_below_wrap(cpu.user.gpr[gpr::RSI], mask, size, count);
    count = stay_below_wrap(cpu.user.gpr[gpr::RDI], mask, size, count);
    if count == 0 {
        return Ok(0);
    }
    let len = count * size;
    let Some(from) = cpu.host_for_read(source, len)? else { return Ok(0) };
    let Some(update) = cpu.host_for_update(target, len)? else { return Ok(0) };
    let to = update.host;
    let distance = (to as u64).wrapping_sub(from as u64);
    if distance != 0 && distance < len {
        // The target follows closely: each element must see what the ones before stored.
        for index in 0..count as usize {
            // SAFETY: both pointers are good for `len` bytes.
            unsafe {
                to.cast::<T>().add(index).write_unaligned(from.cast::<T>().add(index).read_unaligned())
            };
        }
    } else {
        // SAFETY: both pointers are good for `len` bytes; `copy` allows the remaining overlaps.
        unsafe { std::ptr::copy(from, to, len as usize) };
    }
    cpu.updated(update);
    cpu.advance(gpr::RSI, len, mask);
    cpu.advance(gpr::RDI, len, mask);
    Ok(count)
}

/// Whether segment limits need no look for a piece, and no data breakpoint is set.
fn segments_allow_pieces(cpu: &Cpu, op: &Op) -> bool {
    let both = 1 << op.segment | 1 << seg::ES;
    cpu.unchecked_segments & both == both && !cpu.watchpoints && !cpu.single_step
}

/// Limits a piece so that the pointer does not wrap within its address size.
fn stay_below_wrap(pointer: u64, mask: u64, size: u64, count: u64) -> u64 {
    let room = mask - (pointer & mask);
    if room == u64::MAX { count } else { count.min((room + 1) / size) }
}

/// STOS.
pub fn stos<T: Int>(cpu: &mut Cpu, op: &Op) -> F {
    by_pieces(
        cpu,
        op,
        |cpu| stos_piece::<T>(cpu, op),
        |cpu| {
            let target = cpu.string_target(op, T::BYTES, Access::Write)?;
            let value = cpu.reg::<T>(0);
            cpu.write(target, value)?;
            let step = cpu.string_step::<T>();
            cpu.advance(gpr::RDI, step, op.address_mask);
            Ok(true)
        },
    )
}

/// Stores as many elements as lie in one page of RAM.
fn stos_piece<T: Int>(cpu: &mut Cpu, op: &Op) -> R<u64> {
    let size = u64::from(T::BYTES);
    let mask = op.address_mask;
    let target = cpu.string_target(op, T::BYTES, Access::Write)?;
    let count = in_page(target, size, cpu.user.gpr[gpr::RCX] & mask);
    let count = stay_below_wrap(cpu.user.gpr[gpr::RDI], mask, size, count);
    if count == 0 {
        return Ok(0);
    }
    let Some(update) = cpu.host_for_update(target, count * size)? else { return Ok(0) };
    let to = update.host;
    let value = cpu.reg::<T>(0);
    for index in 0..count as usize {
        // SAFETY: the pointer is good for `count` elements.
        unsafe { to.cast::<T>().add(index).write_unaligned(value) };
    }
    cpu.updated(update);
    cpu.advance(gpr::RDI, count * size, mask);
    Ok(count)
}

/// LODS.
pub fn lods<T: Int>(cpu: &mut Cpu, op: &Op) -> F {
    repeated(cpu, op, |cpu| {
        let source = cpu.string_source(op, T::BYTES)?;
        let value = cpu.read::<T>(source)?;
        cpu.set_reg(0, value);
        let step = cpu.string_step::<T>();
        cpu.advance(gpr::RSI, step, op.address_mask);
        Ok(true)
    })
}

/// Whether CMPS or SCAS goes on after a comparison.
fn goes_on(op: &Op, status: u16) -> bool {
    match op.extra {
        repeat::WHILE_EQUAL => status & ZF != 0,
        repeat::WHILE_NOT_EQUAL => status & ZF == 0,
        _ => false,
    }
}

/// CMPS.
pub fn cmps<T: Int>(cpu: &mut Cpu, op: &Op) -> F {
    repeated(cpu, op, |cpu| {
        // The order of the two loads is not architectural; AMD's processors look at ES:rDI first.
        let target = cpu.string_target(op, T::BYTES, Access::Read)?;
        let b = cpu.read::<T>(target)?;
        let source = cpu.string_source(op, T::BYTES)?;
        let a = cpu.read::<T>(source)?;
        cpu.user.status = a.sub(b).1;
        let step = cpu.string_step::<T>();
        cpu.advance(gpr::RSI, step, op.address_mask);
        cpu.advance(gpr::RDI, step, op.address_mask);
        Ok(goes_on(op, cpu.user.status))
    })
}

/// SCAS.
pub fn scas<T: Int>(cpu: &mut Cpu, op: &Op) -> F {
    repeated(cpu, op, |cpu| {
        let target = cpu.string_target(op, T::BYTES, Access::Read)?;
        let b = cpu.read::<T>(target)?;
        cpu.user.status = cpu.reg::<T>(0).sub(b).1;
        let step = cpu.string_step::<T>();
        cpu.advance(gpr::RDI, step, op.address_mask);
        Ok(goes_on(op, cpu.user.status))
    })
}

/// INS.
pub fn ins<T: Int>(cpu: &mut Cpu, op: &Op) -> F {
    let port = cpu.user.gpr[gpr::RDX] as u16;
    cpu.check_port(port, T::BYTES as u8)?;
    repeated(cpu, op, |cpu| {
        let target = cpu.string_target(op, T::BYTES, Access::Write)?;
        cpu.probe_write(target, u64::from(T::BYTES))?;
        let value = cpu.port_in(port, T::BYTES as u8);
        cpu.write(target, T::from_u64(u64::from(value)))?;
        let step = cpu.string_step::<T>();
        cpu.advance(gpr::RDI, step, op.address_mask);
        Ok(true)
    })
}

/// OUTS.
pub fn outs<T: Int>(cpu: &mut Cpu, op: &Op) -> F {
    let port = cpu.user.gpr[gpr::RDX] as u16;
    cpu.check_port(port, T::BYTES as u8)?;
    repeated(cpu, op, |cpu| {
        let source = cpu.string_source(op, T::BYTES)?;
        let value = cpu.read::<T>(source)?.zext() as u32;
        cpu.port_out(port, T::BYTES as u8, value);
        let step = cpu.string_step::<T>();
        cpu.advance(gpr::RSI, step, op.address_mask);
        Ok(true)
    })
}
