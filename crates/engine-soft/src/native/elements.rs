//! Instructions that access memory element by element under a mask: gathers, VMASKMOV and VPMASKMOV, MASKMOVQ and
//! MASKMOVDQU (SDM 2, under these names). Elements that are masked off must not be accessed, and so cannot fault; a
//! gather that faults has completed the elements before.
//!
//! [`Plan::new`] lists the accesses in order. The interpreter translates and performs them:
//!
//! - [`Kind::Gather`]: for each element, read it and call [`Plan::loaded`], which also clears its mask; on a fault stop,
//!   the registers are then as the architecture wants them for a restart. At the end, [`Plan::finish`].
//! - [`Kind::Load`]: read every element, [`Plan::loaded`] for each; only [`Plan::finish`] changes registers, so a fault in
//!   between leaves them.
//! - [`Kind::Store`]: translate [`Plan::whole`] if there is one and every element, then write [`Element::data`] of each,
//!   then [`Plan::finish`].

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use crate::user::UserRegs;

/// Most elements that one instruction has: the bytes of an XMM register.
const MAX_ELEMENTS: usize = 16;

/// Offsets in the FXSAVE64 image (SDM 1 table 10-2).
const FSW: usize = 2;
const ABRIDGED_TAGS: usize = 4;
const REGISTERS: std::ops::Range<usize> = 32..160;
const REGISTER_BYTES: usize = 16;
/// FSW.TOP.
const TOP: u16 = 7 << 11;
const TOP_SHIFT: u32 = 11;

/// What a [`Plan`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Loads from an address for each element.
    Gather,
    /// Loads from consecutive elements.
    Load,
    /// Stores to consecutive elements.
    Store,
}

/// One access.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Element {
    /// Which element of the vector.
    pub lane: u8,
    /// Size in bytes: 1, 4 or 8.
    pub len_bytes: u8,
    /// Offset in the segment, reduced to the address size.
    pub address: u64,
    /// For stores, the bytes, of which the first `len_bytes` count.
    pub data: [u8; 8],
}

/// The accesses of one execution.
#[derive(Clone, Debug)]
pub struct Plan {
    kind: Kind,
    elements: [Element; MAX_ELEMENTS],
    count: usize,
    /// Destination of loads.
    destination: usize,
    /// Mask register of gathers.
    mask: usize,
    /// Bytes of the destination that hold elements.
    destination_bytes: usize,
    /// What loads have read.
    result: [u8; 32],
    /// Changes the x87 state to MMX (MASKMOVQ).
    mmx: bool,
    whole: Option<(u64, usize)>,
}

impl Plan {
    /// The accesses that `instruction` makes with these registers; `None` if it is not an instruction of this kind.
    pub fn new(instruction: &Instruction, regs: &UserRegs) -> Option<Plan> {
        use Mnemonic::*;
        match instruction.mnemonic() {
            Vpgatherdd | Vgatherdps => Self::gather(instruction, regs, 4, 4),
            Vpgatherdq | Vgatherdpd => Self::gather(instruction, regs, 4, 8),
            Vpgatherqd | Vgatherqps => Self::gather(instruction, regs, 8, 4),
            Vpgatherqq | Vgatherqpd => Self::gather(instruction, regs, 8, 8),
            Vmaskmovps | Vpmaskmovd => Self::masked(instruction, regs, 4),
            Vmaskmovpd | Vpmaskmovq => Self::masked(instruction, regs, 8),
            Maskmovq | Maskmovdqu | Vmaskmovdqu => Some(Self::bytes(instruction, regs)),
            _ => None,
        }
    }

    /// Address and length in bytes of an operand that has to be writable as a whole, masked or not: MASKMOVQ and
    /// MASKMOVDQU may, and on actual processors do, fault on bytes that they do not write.
    pub fn whole(&self) -> Option<(u64, usize)> {
        self.whole
    }

    /// What it does.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The elements that are accessed, in order.
    pub fn elements(&self) -> &[Element] {
        &self.elements[..self.count]
    }

    /// Takes what was read for the element number `index` of [`Plan::elements`]; the first `len_bytes` of `data` count.
    /// For gathers, `regs` then has the element and its mask is clear.
    pub fn loaded(&mut self, index: usize, data: [u8; 8], regs: &mut UserRegs) {
        let Some(element) = self.elements().get(index).copied() else { return };
        let len = usize::from(element.len_bytes);
        let at = usize::from(element.lane) * len;
        if self.kind == Kind::Gather {
            regs.vector[self.destination][at..][..len].copy_from_slice(&data[..len]);
            regs.vector[self.mask][at..][..len].fill(0);
        } else {
            self.result[at..][..len].copy_from_slice(&data[..len]);
        }
    }

    /// Changes what remains to change in the registers when every access is done.
    pub fn finish(&self, regs: &mut UserRegs) {
        match self.kind {
            Kind::Gather => {
                regs.vector[self.destination][self.destination_bytes..].fill(0);
                regs.vector[self.mask].fill(0);
            }
            Kind::Load => regs.vector[self.destination] = self.result,
            Kind::Store if self.mmx => {
                let top = stack_top(regs);
                let image = &mut regs.x87.0;
                image[REGISTERS].rotate_right(top * REGISTER_BYTES);
                let status = u16::from_le_bytes([image[FSW], image[FSW + 1]]) & !TOP;
                image[FSW..][..2].copy_from_slice(&status.to_le_bytes());
                image[ABRIDGED_TAGS] = 0xff;
            }
            Kind::Store => {}
        }
    }

    fn empty(kind: Kind) -> Plan {
        Plan {
            kind,
            elements: [Element::default(); MAX_ELEMENTS],
            count: 0,
            destination: 0,
            mask: 0,
            destination_bytes: 0,
            result: [0; 32],
            mmx: false,
            whole: None,
        }
    }

    fn push(&mut self, element: Element) {
        if let Some(slot) = self.elements.get_mut(self.count) {
            *slot = element;
            self.count += 1;
        }
    }

    fn gather(instruction: &Instruction, regs: &UserRegs, index_len: usize, len: usize) -> Option<Plan> {
        let index_register = instruction.memory_index();
        if instruction.op_count() != 3 || !index_register.is_vector_register() {
            return None;
        }
        let mut plan = Self::empty(Kind::Gather);
        plan.destination = vector_number(instruction.op0_register());
        plan.mask = vector_number(instruction.op2_register());
        let lanes = (instruction.op0_register().size() / len).min(index_register.size() / index_len);
        plan.destination_bytes = lanes * len;
        let mask = &regs.vector[plan.mask];
        let indices = &regs.vector[vector_number(index_register)];
        let origin = base_value(instruction, regs).wrapping_add(instruction.memory_displacement64());
        for lane in (0..lanes).filter(|lane| mask[lane * len + len - 1] & 0x80 != 0) {
            let bytes = &indices[lane * index_len..];
            let index = if index_len == 4 {
                i64::from(i32::from_le_bytes(prefix(bytes)))
            } else {
                i64::from_le_bytes(prefix(bytes))
            };
            let scaled = (index as u64).wrapping_mul(u64::from(instruction.memory_index_scale()));
            let address = origin.wrapping_add(scaled) & address_mask(instruction);
            plan.push(Element { lane: lane as u8, len_bytes: len as u8, address, data: [0; 8] });
        }
        Some(plan)
    }

    fn masked(instruction: &Instruction, regs: &UserRegs, len: usize) -> Option<Plan> {
        if instruction.op_count() != 3 {
            return None;
        }
        let store = instruction.op0_kind() == OpKind::Memory;
        let mut plan = Self::empty(if store { Kind::Store } else { Kind::Load });
        let register = if store { instruction.op2_register() } else { instruction.op0_register() };
        plan.destination = vector_number(register);
        let source = &regs.vector[plan.destination];
        let mask = &regs.vector[vector_number(instruction.op1_register())];
        let origin = effective_address(instruction, regs);
        for lane in (0..register.size() / len).filter(|lane| mask[lane * len + len - 1] & 0x80 != 0) {
            let at = lane * len;
            let address = origin.wrapping_add(at as u64) & address_mask(instruction);
            let mut data = [0; 8];
            data[..len].copy_from_slice(&source[at..][..len]);
            plan.push(Element { lane: lane as u8, len_bytes: len as u8, address, data });
        }
        Some(plan)
    }

    /// MASKMOVQ and MASKMOVDQU: bytes to DS:rDI.
    fn bytes(instruction: &Instruction, regs: &UserRegs) -> Plan {
        let mut plan = Self::empty(Kind::Store);
        plan.mmx = instruction.mnemonic() == Mnemonic::Maskmovq;
        let operand = |register: Register| -> [u8; 16] {
            if register.is_mm() {
                // The image holds the stack from its top on, MMX registers are the stack's places.
                let mut value = [0; 16];
                let place = (register.number() + 8 - stack_top(regs)) & 7;
                let at = REGISTERS.start + place * REGISTER_BYTES;
                value[..8].copy_from_slice(&regs.x87.0[at..][..8]);
                value
            } else {
                prefix(&regs.vector[vector_number(register)])
            }
        };
        let source = operand(instruction.op1_register());
        let mask = operand(instruction.op2_register());
        let truncate = match instruction.op0_kind() {
            OpKind::MemorySegDI => 0xffff,
            OpKind::MemorySegEDI => 0xffff_ffff,
            _ => u64::MAX,
        };
        let origin = regs.gpr[Register::RDI.number()];
        let lanes = if plan.mmx { 8 } else { 16 };
        plan.whole = Some((origin & truncate, lanes));
        for lane in (0..lanes).filter(|lane| mask[*lane] & 0x80 != 0) {
            let address = origin.wrapping_add(lane as u64) & truncate;
            let data = [source[lane], 0, 0, 0, 0, 0, 0, 0];
            plan.push(Element { lane: lane as u8, len_bytes: 1, address, data });
        }
        plan
    }
}

/// The first bytes of a slice that is known to be long enough; zeros follow if it is not.
fn prefix<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut value = [0; N];
    for (to, from) in value.iter_mut().zip(bytes) {
        *to = *from;
    }
    value
}

/// FSW.TOP.
fn stack_top(regs: &UserRegs) -> usize {
    let status = u16::from_le_bytes([regs.x87.0[FSW], regs.x87.0[FSW + 1]]);
    usize::from((status & TOP) >> TOP_SHIFT)
}

fn vector_number(register: Register) -> usize {
    register.number() & 15
}

/// Bits of an effective address with the instruction's address size.
fn address_mask(instruction: &Instruction) -> u64 {
    let base = instruction.memory_base();
    let index = instruction.memory_index();
    let bytes = if base != Register::None {
        base.size()
    } else if index != Register::None && !index.is_vector_register() {
        index.size()
    } else {
        instruction.memory_displ_size() as usize
    };
    match bytes {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// Value of the base register. RIP-relative addresses are absolute in iced's displacement.
fn base_value(instruction: &Instruction, regs: &UserRegs) -> u64 {
    let base = instruction.memory_base();
    if base.is_gpr() { regs.gpr[base.number()] } else { 0 }
}

/// Offset in the segment of a memory operand with general registers only.
fn effective_address(instruction: &Instruction, regs: &UserRegs) -> u64 {
    let index = instruction.memory_index();
    let scaled = if index.is_gpr() {
        regs.gpr[index.number()].wrapping_mul(u64::from(instruction.memory_index_scale()))
    } else {
        0
    };
    base_value(instruction, regs).wrapping_add(instruction.memory_displacement64()).wrapping_add(scaled)
        & address_mask(instruction)
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    fn decode(bytes: &[u8]) -> Instruction {
        let instruction = Decoder::with_ip(64, bytes, 0x1000, DecoderOptions::NONE).decode();
        assert!(!instruction.is_invalid());
        instruction
    }

    #[test]
    fn a_gather_stops_and_restarts() {
        // vpgatherdd xmm0, [rax+xmm3*4+8], xmm1
        let instruction = decode(&[0xc4, 0xe2, 0x71, 0x90, 0x44, 0x98, 0x08]);
        let mut regs = UserRegs { vector: [[0x11; 32]; 16], ..UserRegs::default() };
        regs.gpr[0] = 0x1000;
        for (lane, index) in [-1i32, 5, 6, 7].into_iter().enumerate() {
            regs.vector[3][lane * 4..][..4].copy_from_slice(&index.to_le_bytes());
        }
        regs.vector[1] = [0; 32];
        regs.vector[1][3] = 0x80;
        regs.vector[1][11] = 0x80;
        let mut plan = Plan::new(&instruction, &regs).unwrap();
        let addresses: Vec<_> = plan.elements().iter().map(|e| (e.lane, e.address)).collect();
        assert_eq!(addresses, [(0, 0x1004), (2, 0x1020)]);
        plan.loaded(0, [1, 2, 3, 4, 0, 0, 0, 0], &mut regs);
        let again = Plan::new(&instruction, &regs).unwrap();
        assert_eq!(again.elements(), &plan.elements()[1..], "a restart goes on where the fault was");
        plan.loaded(1, [5, 6, 7, 8, 0, 0, 0, 0], &mut regs);
        plan.finish(&mut regs);
        assert_eq!(regs.vector[0][..16], [1, 2, 3, 4, 17, 17, 17, 17, 5, 6, 7, 8, 17, 17, 17, 17]);
        assert_eq!(regs.vector[0][16..], [0; 16]);
        assert_eq!(regs.vector[1], [0; 32]);
    }

    #[test]
    fn masked_moves_touch_what_the_mask_says() {
        // vpmaskmovq ymm2, ymm4, [rbx]
        let load = decode(&[0xc4, 0xe2, 0xdd, 0x8c, 0x13]);
        let mut regs = UserRegs { vector: [[0x22; 32]; 16], ..UserRegs::default() };
        regs.vector[4][15] = 0xff;
        let mut plan = Plan::new(&load, &regs).unwrap();
        assert_eq!(plan.kind(), Kind::Load);
        assert_eq!(
            plan.elements(),
            [Element { lane: 1, len_bytes: 8, address: 8, data: [0x22; 8] }],
            "one element is selected"
        );
        plan.loaded(0, [9; 8], &mut regs);
        assert_eq!(regs.vector[2], [0x22; 32]);
        plan.finish(&mut regs);
        assert_eq!(regs.vector[2][8..16], [9; 8]);
        assert_eq!((&regs.vector[2][..8], &regs.vector[2][16..]), (&[0; 8][..], &[0; 16][..]));

        // maskmovdqu xmm1, xmm4
        regs.gpr[7] = 0x8000;
        let store = Plan::new(&decode(&[0x66, 0x0f, 0xf7, 0xcc]), &regs).unwrap();
        assert_eq!((store.kind(), store.whole()), (Kind::Store, Some((0x8000, 16))));
        assert_eq!(store.elements().len(), 1);
        assert_eq!((store.elements()[0].address, store.elements()[0].data[0]), (0x800f, 0x22));
    }
}
