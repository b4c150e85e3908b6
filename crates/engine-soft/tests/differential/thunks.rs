//! The subject that runs native thunks, with address computation and memory checks of its own.

use engine_soft::native::elements::{Kind, Plan};
use engine_soft::native::{CompileError, MemoryUse, NativeFault, Operand, Thunks, bit_string_displacement};
use engine_soft::user::{UserRegs, status};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use x86::bits::rflags;

use super::inputs::linear_address;
use super::state::*;

pub struct ThunkSubject {
    thunks: Thunks,
    regs: Box<UserRegs>,
}

impl ThunkSubject {
    pub fn new() -> ThunkSubject {
        ThunkSubject { thunks: Thunks::new().expect("thunks"), regs: Box::default() }
    }

    fn load(&mut self, state: &State) {
        let regs = &mut *self.regs;
        regs.gpr = state.gpr;
        regs.rip = state.rip;
        regs.status = status::from_rflags(state.rflags);
        regs.direction = (state.rflags & rflags::DF != 0) as u16;
        regs.mxcsr = state.mxcsr();
        regs.vector = state.vector;
        regs.x87.0 = state.x87;
    }

    fn store(&self, before: &State) -> State {
        let regs = &*self.regs;
        let mut state = State {
            x87: regs.x87.0,
            vector: regs.vector,
            gpr: regs.gpr,
            rip: regs.rip,
            rflags: before.rflags & !rflags::STATUS | status::to_rflags(regs.status),
        };
        state.set_mxcsr(regs.mxcsr);
        state
    }
}

impl ThunkSubject {
    /// Executes a gather or masked move the way an interpreter does.
    fn elementwise(&mut self, mut plan: Plan, case: &Case<'_>, memory: &mut Memory) -> Outcome {
        let instruction = case.instruction;
        let segment = match instruction.memory_segment() {
            Register::GS if case.bitness == 64 => GS_BASE,
            _ => data_base(case.bitness),
        };
        // MASKMOVQ reports a pending x87 exception.
        let pending = case.state.x87[image::FSW] & 0x80 != 0;
        if instruction.mnemonic() == Mnemonic::Maskmovq && pending {
            let end = End::Fault { vector: 16, error_code: 0, address: 0 };
            return Outcome { end, state: case.state.clone() };
        }
        let stack = matches!(instruction.memory_base().full_register(), Register::RBP | Register::RSP)
            && segment != GS_BASE;
        let write = plan.kind() == Kind::Store;
        let elements = plan.elements().to_vec();
        let place = |address: u64| match case.bitness {
            64 => address.wrapping_add(segment),
            _ => address.wrapping_add(segment) & 0xffff_ffff,
        };
        if let Some((address, len)) = plan.whole()
            && let Err(end) = memory.check(place(address), len as u64, true, stack, case.bitness == 64)
        {
            return Outcome { end, state: case.state.clone() };
        }
        for (index, element) in elements.iter().enumerate() {
            let (linear, len) = (place(element.address), usize::from(element.len_bytes));
            if let Err(end) = memory.check(linear, len as u64, write, stack, case.bitness == 64) {
                return Outcome { end, state: self.store(case.state) };
            }
            if !write {
                let mut data = [0; 8];
                data[..len].copy_from_slice(&memory.0[(linear - DATA) as usize..][..len]);
                plan.loaded(index, data, &mut self.regs);
            }
        }
        if write {
            for element in &elements {
                let (linear, len) = (place(element.address), usize::from(element.len_bytes));
                memory.0[(linear - DATA) as usize..][..len].copy_from_slice(&element.data[..len]);
            }
        }
        plan.finish(&mut self.regs);
        let state = State { rip: instruction.next_ip(), ..self.store(case.state) };
        Outcome { end: End::Done, state }
    }
}

impl Subject for ThunkSubject {
    fn name(&self) -> &'static str {
        "thunks"
    }

    fn undefined_like_host(&self) -> bool {
        true
    }

    fn step(&mut self, case: &Case<'_>, memory: &mut Memory) -> Option<Outcome> {
        let instruction = case.instruction;
        self.load(case.state);
        if let Some(plan) = Plan::new(instruction, &self.regs) {
            return Some(self.elementwise(plan, case, memory));
        }
        let thunk = match self.thunks.compile(instruction) {
            Ok(thunk) => thunk,
            Err(CompileError::Unsupported(_)) => return None,
            Err(CompileError::Full) => {
                // SAFETY: thunks are not kept between steps.
                unsafe { self.thunks.clear() };
                self.thunks.compile(instruction).expect("compiles after clearing")
            }
            Err(other) => panic!("{other}"),
        };
        let fault = |end| Some(Outcome { end, state: case.state.clone() });
        let vector_of = |native| match native {
            NativeFault::DivideError => 0,
            NativeFault::InvalidOpcode => 6,
            NativeFault::GeneralProtection => 13,
            NativeFault::X87 => 16,
            NativeFault::Simd => 19,
            other => panic!("{other:?}"),
        };

        let mut operand = Operand::NONE;
        if thunk.memory != MemoryUse::None {
            let index = (0..instruction.op_count()).find(|o| instruction.op_kind(*o) == OpKind::Memory)?;
            let gs = instruction.memory_segment() == Register::GS;
            let base = if gs && case.bitness == 64 { GS_BASE } else { data_base(case.bitness) };
            let mut address = linear_address(instruction, index, case.bitness, case.state, 0);
            if let Some(displacement) = bit_string_displacement(instruction, &self.regs) {
                let offset = address.wrapping_sub(base).wrapping_add(displacement as u64);
                address = base.wrapping_add(offset & address_mask(instruction));
                if case.bitness != 64 {
                    address &= 0xffff_ffff;
                }
            }
            operand.guest = address.wrapping_sub(base);
            if thunk.memory == MemoryUse::Address {
                // LEA does not add the segment base, and neither does iced for it.
                operand.host = address as *mut u8;
            } else {
                if let Err(native) = thunk.precheck(&self.regs, address) {
                    return fault(End::Fault { vector: vector_of(native), error_code: 0, address: 0 });
                }
                let write = thunk.memory != MemoryUse::Read;
                let len = u64::from(thunk.memory_bytes);
                let stack =
                    matches!(instruction.memory_base().full_register(), Register::RBP | Register::RSP)
                        && instruction.segment_prefix() != Register::GS;
                if let Err(end) = memory.check(address, len, write, stack, case.bitness == 64) {
                    return fault(end);
                }
                operand.host = memory.0.as_mut_ptr().wrapping_add((address - DATA) as usize);
            }
        }
        // SAFETY: the thunks are alive, and the operand was checked to lie in `memory`.
        let result = unsafe { thunk.run(&mut self.regs, operand) };
        let mut state = self.store(case.state);
        let end = match result {
            Ok(()) => {
                state.rip = instruction.next_ip();
                End::Done
            }
            Err(native) => End::Fault { vector: vector_of(native), error_code: 0, address: 0 },
        };
        Some(Outcome { end, state })
    }
}

/// Bits of an effective address.
fn address_mask(instruction: &Instruction) -> u64 {
    let base = instruction.memory_base();
    let index = instruction.memory_index();
    let bytes = match (base, index) {
        (Register::None, Register::None) => instruction.memory_displ_size() as usize,
        (Register::None, _) => index.size(),
        _ => base.size(),
    };
    u64::MAX >> (64 - 8 * bytes)
}
