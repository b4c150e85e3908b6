//! Random states for an encoding: registers, and memory where its operands are.

use iced_x86::{FlowControl, Instruction, Mnemonic, OpCodeOperandKind, OpKind, Register};

use super::forms::{Encoding, Form, code_offset};
use super::state::*;
use super::values::Random;

/// What the indices of gathers are relative to: the border between the two writable pages.
pub const GATHER_ORIGIN: u64 = WRITABLE.start + PAGE;

/// A linear address for an operand.
pub fn target(random: &mut Random, bitness: u32) -> u64 {
    let len = WRITABLE.end - WRITABLE.start;
    match random.below(100) {
        0..45 => WRITABLE.start + (random.below(len - 576) & !63),
        45..60 => WRITABLE.start + (random.below(len - 576) & !15) + random.pick(&[0, 0, 8, 4]),
        60..75 => WRITABLE.start + random.below(len - 576),
        75..82 => WRITABLE.start + PAGE - 1 - random.below(40),
        82..90 => WRITABLE.end - 1 - random.below(48),
        90..92 => WRITABLE.start - 1 - random.below(24),
        92..97 => READ_ONLY.start + random.below(PAGE),
        97..99 => DATA + random.below(DATA_BYTES as u64),
        _ if bitness == 64 => 0x0000_8000_0000_0000u64.wrapping_add(random.next() & 0xffff_ffff),
        _ => WRITABLE.start + 128,
    }
}

/// A random state for one execution of an encoding; also changes memory around the operand.
pub fn state(form: Form, encoding: &Encoding, memory: &mut Memory, random: &mut Random) -> State {
    let instruction = &encoding.instruction;
    let bitness = form.bitness;
    let mut state = State { rip: code_offset(bitness), ..State::default() };
    state.gpr.iter_mut().for_each(|gpr| *gpr = random.integer());
    if random.percent(25) {
        let from = random.below(16) as usize;
        let to = random.below(16) as usize;
        state.gpr[to] = state.gpr[from];
    }
    let divides = matches!(form.code.mnemonic(), Mnemonic::Div | Mnemonic::Idiv);
    if divides && random.percent(75) {
        // So that not every quotient overflows.
        let high = if random.percent(50) { 0 } else { random.below(4) };
        let low = random.integer();
        state.gpr[2] = if random.percent(30) { ((low as i64) >> 63) as u64 } else { high };
        state.gpr[0] = low;
        if form.code.op_code().op_kinds().first() == Some(&OpCodeOperandKind::r8_or_mem) {
            state.gpr[0] &= 0x1fff;
        }
    }
    for flag in [0, 2, 4, 6, 7, 11] {
        state.rflags |= (random.next() & 1) << flag;
    }
    if random.percent(20) {
        state.rflags |= 1 << 10;
    }
    vectors(&mut state, random);
    x87(&mut state, random);

    let linear = |random: &mut Random| target(random, bitness) - data_base(bitness);
    // Implicit memory operands.
    state.gpr[4] = if random.percent(85) {
        (WRITABLE.start - data_base(bitness) + 0x400 + random.below(0x1800)) & !7
    } else {
        linear(random)
    };
    if random.percent(60) {
        state.gpr[5] = (WRITABLE.start - data_base(bitness) + 0x400 + random.below(0x1800)) & !7;
    }
    let repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    if repeated {
        state.gpr[1] = match random.below(10) {
            0 => random.below(0x3000),
            1 => 0,
            _ => random.below(40),
        };
        if random.percent(20) {
            let upper = random.next() << 32;
            state.gpr[1] |= upper * u64::from(address_is_short(instruction));
        }
    }
    let string = instruction.is_string_instruction()
        || (0..instruction.op_count()).any(|o| {
            matches!(
                instruction.op_kind(o),
                OpKind::MemorySegDI | OpKind::MemorySegEDI | OpKind::MemorySegRDI
            )
        });
    if string {
        state.gpr[6] = linear(random);
        state.gpr[7] = linear(random);
        if random.percent(30) {
            state.gpr[7] = state.gpr[6].wrapping_add(random.below(65)).wrapping_sub(32);
        }
        // Equal bytes keep REPE going, a known AL keeps REPNE.
        if random.percent(40) {
            let value = state.gpr[0] as u8;
            memory.0.fill(value);
        }
    }
    if is_xsave(instruction) {
        // x87, SSE and AVX; the host may have more.
        state.gpr[0] = random.below(8);
        state.gpr[2] = 0;
    }
    if bitness != 64 {
        state.gpr.iter_mut().for_each(|gpr| *gpr &= 0xffff_ffff);
        state.gpr[8..].fill(0);
    }
    explicit_operand(instruction, encoding, bitness, &mut state, memory, random);
    if matches!(instruction.mnemonic(), Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq) {
        plain_flags_on_stack(&state, bitness, memory);
    }
    if instruction.flow_control() == FlowControl::Return && random.percent(85) {
        let at = state.gpr[4].wrapping_add(data_base(bitness)).wrapping_sub(DATA) as usize;
        let to = code_offset(bitness) - CODE_ENTRY + random.below(CODE_BYTES as u64);
        if let Some(slot) = memory.0.get_mut(at..at + 8) {
            slot.copy_from_slice(&to.to_le_bytes());
        }
    }
    if matches!(instruction.flow_control(), FlowControl::IndirectBranch | FlowControl::IndirectCall)
        && instruction.op0_kind() == OpKind::Register
        && random.percent(85)
    {
        let to = code_offset(bitness) - CODE_ENTRY + random.below(CODE_BYTES as u64);
        state.gpr[instruction.op0_register().number()] = to;
    }
    if bitness != 64 {
        state.gpr.iter_mut().for_each(|gpr| *gpr &= 0xffff_ffff);
    }
    state
}

/// POPF must not turn on single-stepping or alignment checks in the reference.
fn plain_flags_on_stack(state: &State, bitness: u32, memory: &mut Memory) {
    let at = state.gpr[4].wrapping_add(data_base(bitness)).wrapping_sub(DATA) as usize;
    for (offset, mask) in [(1, 0xbe), (2, 0xfb)] {
        if let Some(byte) = memory.0.get_mut(at.wrapping_add(offset)) {
            *byte &= mask;
        }
    }
}

fn address_is_short(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|o| {
        matches!(instruction.op_kind(o), OpKind::MemorySegESI | OpKind::MemoryESEDI | OpKind::MemorySegEDI)
    })
}

fn vectors(state: &mut State, random: &mut Random) {
    for number in 0..16 {
        let mut register = [0; 32];
        if number > 0 && random.percent(20) {
            register = state.vector[random.below(number) as usize];
        } else {
            random.lanes(&mut register);
        }
        state.vector[number as usize] = register;
    }
    let mut mxcsr = 0x1f80;
    if random.percent(50) {
        mxcsr |= random.pick(&[0, 0x2000, 0x4000, 0x6000]);
    }
    if random.percent(15) {
        mxcsr |= 0x8000;
    }
    if random.percent(15) {
        mxcsr |= 0x40;
    }
    if random.percent(25) {
        mxcsr &= !((random.next() as u32) & 0x1f80);
    }
    if random.percent(30) {
        mxcsr |= random.next() as u32 & 0x3f;
    }
    state.set_mxcsr(mxcsr);
}

fn x87(state: &mut State, random: &mut Random) {
    for number in 0..8 {
        let value = random.extended();
        state.x87[image::REGISTERS + 16 * number..][..10].copy_from_slice(&value);
    }
    let mut control: u16 = 0x7f;
    control |= random.pick(&[0x300, 0x300, 0x300, 0x200, 0x000]);
    control |= (random.below(4) as u16) << 10;
    if random.percent(20) {
        control &= !(random.next() as u16 & 0x3f);
    }
    let mut status = (random.next() as u16) & 0x7f00;
    if random.percent(20) {
        status |= random.next() as u16 & 0x7f;
    }
    if status & !control & 0x3f != 0 {
        status |= 0x8080;
    }
    state.x87[image::FCW..][..2].copy_from_slice(&control.to_le_bytes());
    state.x87[image::FSW..][..2].copy_from_slice(&status.to_le_bytes());
    let any = random.next() as u8;
    state.x87[image::TAGS] = random.pick(&[0xff, 0xff, 0, 0x55, any, any]);
    // AMD processors keep the last-instruction pointers only while an unmasked exception is pending.
    if status & 0x80 == 0 {
        return;
    }
    state.x87[image::FOP..][..2].copy_from_slice(&(random.next() as u16 & 0x7ff).to_le_bytes());
    state.x87[image::FIP..][..8].copy_from_slice(&(CODE + random.below(0x1000)).to_le_bytes());
    state.x87[image::FDP..][..8].copy_from_slice(&(DATA + random.below(0x1000)).to_le_bytes());
}

/// Points the explicit memory operand somewhere, and puts something there.
fn explicit_operand(
    instruction: &Instruction,
    encoding: &Encoding,
    bitness: u32,
    state: &mut State,
    memory: &mut Memory,
    random: &mut Random,
) {
    let Some(operand) = (0..instruction.op_count()).find(|o| instruction.op_kind(*o) == OpKind::Memory)
    else {
        return;
    };
    let index = instruction.memory_index();
    if let Some(value) = encoding.fixed_index {
        set_gpr(state, index, value);
    }
    let mut linear = target(random, bitness);
    let atomic = instruction.has_lock_prefix()
        || instruction.mnemonic() == Mnemonic::Xchg
        || matches!(instruction.mnemonic(), Mnemonic::Cmpxchg16b | Mnemonic::Cmpxchg8b);
    if atomic && WRITABLE.contains(&linear) && random.percent(97) {
        // Accesses across cache lines with LOCK are slow, and fatal on some hosts.
        linear &= !15;
    }
    if is_xsave(instruction) {
        let most = WRITABLE.end - WRITABLE.start - XSAVE_BYTES as u64;
        linear = WRITABLE.start + (random.below(most) & !63);
        if random.percent(5) {
            linear += random.below(64);
        }
        xsave_area(&mut memory.0[(linear - DATA) as usize..][..XSAVE_BYTES], random);
    }
    if index.is_vector_register() {
        let lane_bytes = if instruction.mnemonic().to_lane_bytes() == 4 { 4 } else { 8 };
        let scale = u64::from(instruction.memory_index_scale());
        linear = GATHER_ORIGIN;
        for lane in state.vector[index.number()].chunks_mut(lane_bytes) {
            let distance = match random.below(100) {
                // Across the border between the pages or the end of the second, or beyond.
                0..3 => -1 - random.below(8) as i64,
                3..6 => PAGE as i64 - 1 - random.below(8) as i64,
                6..9 => random.below(0x3e00) as i64 - 0x1f00,
                _ => random.below(0x1e00) as i64 - 0xf00,
            };
            let value = distance / scale as i64;
            lane.copy_from_slice(&value.to_le_bytes()[..lane_bytes]);
        }
        let mask = instruction.op2_register();
        element_mask(&mut state.vector[mask.number()], random);
    }
    if matches!(
        instruction.mnemonic(),
        Mnemonic::Vmaskmovps | Mnemonic::Vmaskmovpd | Mnemonic::Vpmaskmovd | Mnemonic::Vpmaskmovq
    ) {
        let mask = instruction.op1_register();
        element_mask(&mut state.vector[mask.number()], random);
    }
    let bytes = random.below(3);
    if is_xsave(instruction) {
        // There already.
    } else if let Some(slot) = memory.0.get_mut(linear.wrapping_sub(DATA) as usize..).and_then(|rest| {
        let len = rest.len().min(32);
        rest.get_mut(..len)
    }) {
        match bytes {
            0 => random.lanes(slot),
            1 => {
                let value = random.extended();
                let len = slot.len().min(10);
                slot[..len].copy_from_slice(&value[..len]);
            }
            _ => {
                let from = state.vector[random.below(16) as usize];
                let len = slot.len();
                slot.copy_from_slice(&from[..len]);
            }
        }
        if instruction.mnemonic() == Mnemonic::Ldmxcsr || instruction.mnemonic() == Mnemonic::Vldmxcsr {
            let value = if random.percent(90) { random.next() as u32 & 0xffff } else { random.next() as u32 };
            if slot.len() >= 4 {
                slot[..4].copy_from_slice(&value.to_le_bytes());
            }
        }
        if matches!(instruction.mnemonic(), Mnemonic::Cmpxchg | Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b)
            && random.percent(50)
            && slot.len() >= 16
        {
            let half = instruction.memory_size().size() / 2;
            let low = state.gpr[0].to_le_bytes();
            slot[..8].copy_from_slice(&low);
            if instruction.mnemonic() != Mnemonic::Cmpxchg {
                slot[half..2 * half].copy_from_slice(&state.gpr[2].to_le_bytes()[..half]);
            }
        }
    }
    if matches!(instruction.flow_control(), FlowControl::IndirectBranch | FlowControl::IndirectCall)
        && random.percent(85)
    {
        let to = code_offset(bitness) - CODE_ENTRY + random.below(CODE_BYTES as u64);
        let at = linear.wrapping_sub(DATA) as usize;
        if let Some(slot) = memory.0.get_mut(at..at.wrapping_add(8)) {
            slot.copy_from_slice(&to.to_le_bytes());
        }
    }
    // Give the base register what is missing to the address.
    let base = instruction.memory_base();
    if !base.is_gpr() {
        return;
    }
    let now = linear_address(instruction, operand, bitness, state, 0);
    let missing = linear.wrapping_sub(now);
    let value = state.gpr[base.number()].wrapping_add(missing);
    set_gpr(state, base, value);
    if instruction.memory_size().size() >= 4
        && matches!(instruction.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
        && instruction.op1_kind() == OpKind::Register
        && instruction.op1_register().full_register() != base.full_register()
        && instruction.op1_register().full_register() != index.full_register()
    {
        let number = instruction.op1_register().number();
        state.gpr[number] = random.below(8000).wrapping_sub(4000);
    }
}

/// Bytes of the standard-form area for x87, SSE and AVX.
const XSAVE_BYTES: usize = 576 + 256;

/// XSAVE and XRSTOR, whose implicit operands are the components to be stored or loaded.
pub fn is_xsave(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(instruction.mnemonic(), Xsave | Xsave64 | Xrstor | Xrstor64)
}

/// Something that XRSTOR mostly accepts (SDM 1 §13.8).
fn xsave_area(area: &mut [u8], random: &mut Random) {
    random.fill(area);
    let any_mxcsr = random.percent(5);
    let mxcsr = random.next() as u32 & if any_mxcsr { u32::MAX } else { 0xffff };
    area[image::MXCSR..][..4].copy_from_slice(&mxcsr.to_le_bytes());
    let value = random.extended();
    area[image::REGISTERS..][..10].copy_from_slice(&value);
    // Header: XSTATE_BV, XCOMP_BV, and what must be zero.
    area[512..576].fill(0);
    area[512] = random.below(8) as u8;
    if random.percent(5) {
        // Beyond the components that hosts have, and not the bit that says that the area is compacted.
        let wrong = random.pick(&[3, 4, 7, 8, 9, 14, 16, 23]);
        area[512 + wrong] |= 1 << random.below(8);
    }
}

/// A mask that chooses all elements, none, or some.
fn element_mask(mask: &mut [u8; 32], random: &mut Random) {
    random.fill(mask);
    match random.below(10) {
        0..4 => mask.iter_mut().for_each(|byte| *byte |= 0x80),
        4 => mask.iter_mut().for_each(|byte| *byte &= 0x7f),
        _ => {}
    }
}

/// Lane sizes of gather indices.
trait LaneBytes {
    fn to_lane_bytes(self) -> usize;
}

impl LaneBytes for Mnemonic {
    fn to_lane_bytes(self) -> usize {
        use Mnemonic::*;
        match self {
            Vpgatherdd | Vpgatherdq | Vgatherdps | Vgatherdpd => 4,
            _ => 8,
        }
    }
}

/// Changes as much of a register as `register` names, and sometimes what is above.
fn set_gpr(state: &mut State, register: Register, value: u64) {
    let slot = &mut state.gpr[register.full_register().number()];
    let mask = match register.size() {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    };
    *slot = *slot & !mask | value & mask;
}

/// Linear address of a memory operand, by iced's rules.
pub fn linear_address(
    instruction: &Instruction,
    operand: u32,
    bitness: u32,
    state: &State,
    element: usize,
) -> u64 {
    let address = instruction.virtual_address(operand, element, |register, lane, lane_bytes| {
        Some(if register.is_segment_register() {
            match register {
                Register::GS if bitness == 64 => GS_BASE,
                _ => data_base(bitness),
            }
        } else if register.is_vector_register() {
            let bytes = &state.vector[register.number()][lane * lane_bytes..][..lane_bytes];
            if lane_bytes == 4 {
                i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as i64 as u64
            } else {
                u64::from_le_bytes(bytes.try_into().unwrap_or_default())
            }
        } else {
            let full = state.gpr[register.full_register().number()];
            match register.size() {
                1 => full & 0xff,
                2 => full & 0xffff,
                4 => full & 0xffff_ffff,
                _ => full,
            }
        })
    });
    let address = address.unwrap_or_default();
    if bitness == 64 { address } else { address & 0xffff_ffff }
}
