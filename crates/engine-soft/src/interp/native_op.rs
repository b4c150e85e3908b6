//! Instructions that the host processor executes (see [`crate::native`]), with their memory operands provided.

use iced_x86::Instruction;
use x86::bits::cr4;
use x86::{Exception, Vector};

use crate::cpu::{Cpu, R};
use crate::interp::op::{Flow, Op};
use crate::mmu::Access;
use crate::native::elements::{Kind, Plan};
use crate::native::{MemoryUse, NativeFault, Operand, Thunk};
use crate::shared::lock;

type F = R<Flow>;

/// Offset in the bounce buffer that gives a copy the alignment of its guest address.
const ALIGNMENT: u64 = 63;

impl Cpu {
    #[cold]
    fn native_fault<T>(&mut self, fault: NativeFault) -> R<T> {
        let exception = match fault {
            NativeFault::DivideError => Exception::plain(Vector::DivideError),
            NativeFault::Simd if self.control.cr4 & cr4::OSXMMEXCPT != 0 => Exception::plain(Vector::Simd),
            NativeFault::Simd | NativeFault::InvalidOpcode => Exception::ud(),
            NativeFault::X87 => return self.x87_error(),
            NativeFault::GeneralProtection => Exception::gp(0),
            NativeFault::AlignmentCheck => Exception::with_code(Vector::AlignmentCheck, 0),
            NativeFault::HostMemory { address } => {
                self.fatal = Some(format!("the host could not provide memory at {address:#x}"));
                Exception::plain(Vector::MachineCheck)
            }
            NativeFault::Unexpected { vector } => {
                self.fatal = Some(format!("the host raised vector {vector} in a guest instruction"));
                Exception::plain(Vector::MachineCheck)
            }
        };
        Err(self.raise(exception))
    }

    #[inline(always)]
    fn run_thunk(&mut self, thunk: &Thunk, host: *mut u8, guest: u64) -> R<()> {
        // SAFETY: thunks live as long as the blocks that refer to them; `host` was checked for the operand by the
        // caller; MXCSR is only ever loaded with bits that the host has.
        match unsafe { thunk.run(&mut self.user, Operand { host, guest }) } {
            Ok(()) => Ok(()),
            Err(fault) => self.native_fault(fault),
        }
    }

    fn bounce(&mut self, address: u64) -> *mut u8 {
        // SAFETY: the buffer is larger than the alignment plus the largest operand.
        unsafe { self.user.bounce.0.as_mut_ptr().add((address & ALIGNMENT) as usize) }
    }
}

/// Any instruction with a thunk: `imm` points to it, `extra` is 1 if LOCKed.
pub fn native(cpu: &mut Cpu, op: &Op) -> F {
    if op.class & cpu.disabled != 0 {
        return cpu.class_fault(op.class);
    }
    // SAFETY: the decoder put the address of a thunk here that lives as long as the block.
    let thunk: &Thunk = unsafe { &*(op.imm as *const Thunk) };
    match thunk.memory {
        MemoryUse::None => cpu.run_thunk(thunk, std::ptr::null_mut(), 0)?,
        MemoryUse::Address => {
            let offset = op.offset(&cpu.user);
            cpu.run_thunk(thunk, offset as *mut u8, offset)?;
        }
        MemoryUse::Read => {
            let len = u32::from(thunk.memory_bytes);
            let offset = op.offset(&cpu.user);
            let address = cpu.linear(op.segment, offset, len, Access::Read)?;
            if let Err(fault) = thunk.precheck(&cpu.user, address) {
                return cpu.native_fault(fault);
            }
            match cpu.host_for_read(address, u64::from(len))? {
                Some(host) => cpu.run_thunk(thunk, host, offset)?,
                None => {
                    let mut data = [0u8; 512];
                    cpu.read_bytes(address, &mut data[..len as usize])?;
                    let bounce = cpu.bounce(address);
                    // SAFETY: the bounce buffer has room for the operand.
                    unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), bounce, len as usize) };
                    cpu.run_thunk(thunk, bounce, offset)?;
                }
            }
        }
        MemoryUse::Write | MemoryUse::ReadWrite => {
            let len = u32::from(thunk.memory_bytes);
            let offset = op.offset(&cpu.user);
            let address = cpu.linear(op.segment, offset, len, Access::Write)?;
            if let Err(fault) = thunk.precheck(&cpu.user, address) {
                return cpu.native_fault(fault);
            }
            match cpu.host_for_update(address, u64::from(len))? {
                Some(update) => {
                    let result = cpu.run_thunk(thunk, update.host, offset);
                    cpu.updated(update);
                    result?;
                }
                None => native_through_bounce(cpu, op, thunk, address, offset)?,
            }
        }
    }
    Ok(Flow::Next)
}

/// A written operand that spans pages or lies in a device.
#[cold]
fn native_through_bounce(cpu: &mut Cpu, op: &Op, thunk: &Thunk, address: u64, offset: u64) -> R<()> {
    let len = usize::from(thunk.memory_bytes);
    cpu.probe_write(address, len as u64)?;
    let shared = cpu.shared.clone();
    let _guard = (op.extra != 0).then(|| lock(&shared.split_lock));
    let mut data = [0u8; 512];
    let data = &mut data[..len];
    // Not every store happens (an unmasked x87 exception suppresses it): start from what is there. A device is not read.
    if thunk.memory == MemoryUse::ReadWrite || cpu.is_ram(address, len as u64)? {
        cpu.read_bytes(address, data)?;
    }
    let bounce = cpu.bounce(address);
    // SAFETY: the bounce buffer has room for the operand.
    unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), bounce, len) };
    cpu.run_thunk(thunk, bounce, offset)?;
    // SAFETY: as above.
    unsafe { std::ptr::copy_nonoverlapping(bounce, data.as_mut_ptr(), len) };
    cpu.write_bytes(address, data)
}

/// Gathers and masked moves: `imm` points to the decoded instruction.
pub fn elements(cpu: &mut Cpu, op: &Op) -> F {
    if op.class & cpu.disabled != 0 {
        return cpu.class_fault(op.class);
    }
    // SAFETY: the decoder put the address of an instruction here that lives as long as the block.
    let instruction: &Instruction = unsafe { &*(op.imm as *const Instruction) };
    const SUMMARY: u8 = 0x80;
    if op.class == crate::cpu::class::MMX && cpu.user.x87.0[2] & SUMMARY != 0 {
        return cpu.x87_error();
    }
    let Some(mut plan) = Plan::new(instruction, &cpu.user) else { return cpu.ud() };
    match plan.kind() {
        Kind::Gather | Kind::Load => {
            for index in 0..plan.elements().len() {
                let element = plan.elements()[index];
                let len = u32::from(element.len_bytes);
                let address = cpu.linear(op.segment, element.address, len, Access::Read)?;
                let data = match len {
                    4 => u64::from(cpu.read::<u32>(address)?).to_le_bytes(),
                    8 => cpu.read::<u64>(address)?.to_le_bytes(),
                    _ => {
                        let mut data = [0u8; 8];
                        cpu.read_bytes(address, &mut data[..len as usize])?;
                        data
                    }
                };
                plan.loaded(index, data, &mut cpu.user);
            }
        }
        Kind::Store => {
            if let Some((offset, len)) = plan.whole() {
                let address = cpu.linear(op.segment, offset, len as u32, Access::Write)?;
                cpu.probe_write(address, len as u64)?;
            }
            for element in plan.elements() {
                let len = u32::from(element.len_bytes);
                let address = cpu.linear(op.segment, element.address, len, Access::Write)?;
                cpu.probe_write(address, u64::from(len))?;
            }
            for element in plan.elements() {
                let len = u32::from(element.len_bytes);
                let address = cpu.linear(op.segment, element.address, len, Access::Write)?;
                cpu.write_bytes(address, &element.data[..len as usize])?;
            }
        }
    }
    plan.finish(&mut cpu.user);
    Ok(Flow::Next)
}

/// CLFLUSH, CLFLUSHOPT, CLWB: the address is checked as for a load, the caches are the host's business.
pub fn cache_line(cpu: &mut Cpu, op: &Op) -> F {
    let address = cpu.address(op, 1, Access::Read)?;
    cpu.read::<u8>(address)?;
    Ok(Flow::Next)
}
