//! A small assembler for the instructions that the translator itself adds; guest instructions go through iced-x86's encoder.
//! Encodings: Intel SDM 2, chapter 2 and appendix B.

/// A host register by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reg(pub u8);

#[allow(missing_docs)]
impl Reg {
    pub const RAX: Reg = Reg(0);
    pub const RCX: Reg = Reg(1);
    pub const RDX: Reg = Reg(2);
    pub const RBX: Reg = Reg(3);
    pub const RSP: Reg = Reg(4);
    pub const RBP: Reg = Reg(5);
    pub const RSI: Reg = Reg(6);
    pub const RDI: Reg = Reg(7);
    pub const R8: Reg = Reg(8);
    pub const R9: Reg = Reg(9);
    pub const R10: Reg = Reg(10);
    pub const R11: Reg = Reg(11);
    pub const R12: Reg = Reg(12);
    pub const R13: Reg = Reg(13);
    pub const R14: Reg = Reg(14);
    pub const R15: Reg = Reg(15);
}

/// The operand that ModRM's r/m field names.
#[derive(Clone, Copy, Debug)]
pub enum Rm {
    /// A register.
    Reg(Reg),
    /// The vCPU's area at this offset (GS-relative).
    Area(i32),
    /// The vCPU's area at `index * scale + offset`; the scale as a power of two.
    AreaIndex(Reg, u8, i32),
    /// `base + index * scale + displacement` in host memory.
    Memory(Address),
}

/// An effective address of host registers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Address {
    /// Base register.
    pub base: Option<Reg>,
    /// Index register and its scale as a power of two.
    pub index: Option<(Reg, u8)>,
    /// Displacement.
    pub displacement: i32,
}

impl Address {
    /// A base register and a displacement.
    pub fn base(base: Reg, displacement: i32) -> Self {
        Address { base: Some(base), index: None, displacement }
    }
}

/// Operand widths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Width {
    W8,
    W16,
    W32,
    W64,
}

/// Condition codes (SDM 1 appendix B).
#[allow(missing_docs)]
pub mod cond {
    pub const B: u8 = 2;
    pub const E: u8 = 4;
    pub const NE: u8 = 5;
    pub const BE: u8 = 6;
    pub const A: u8 = 7;
    pub const NS: u8 = 9;
}

/// The two-operand arithmetic instructions by their number in the opcode.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub enum Alu {
    Add = 0,
    And = 4,
    Sub = 5,
    Xor = 6,
    Cmp = 7,
}

/// A place in the code that jumps refer to before it is known.
#[derive(Clone, Copy, Debug)]
pub struct Label(usize);

/// Code under construction, for one address.
pub struct Asm {
    code: Vec<u8>,
    base: u64,
    labels: Vec<Option<usize>>,
    /// Positions of rel32 fields and the labels they wait for.
    fixups: Vec<(usize, Label)>,
}

impl Asm {
    /// Empty code that will lie at `base`.
    pub fn new(base: u64) -> Self {
        Asm { code: Vec::with_capacity(1024), base, labels: Vec::new(), fixups: Vec::new() }
    }

    /// Bytes so far.
    pub fn size(&self) -> usize {
        self.code.len()
    }

    /// Address of the next byte.
    pub fn address(&self) -> u64 {
        self.base + self.code.len() as u64
    }

    /// Appends bytes that were encoded for [`Asm::address`].
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    /// This point, for [`Asm::back_to`].
    pub fn mark(&self) -> (usize, usize) {
        (self.code.len(), self.fixups.len())
    }

    /// Drops what was assembled since a mark. Labels that were bound since then are not to be used.
    pub fn back_to(&mut self, (code, fixups): (usize, usize)) {
        self.code.truncate(code);
        self.fixups.truncate(fixups);
    }

    /// A label without a place yet.
    pub fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// Puts a label here.
    pub fn bind(&mut self, label: Label) {
        self.labels[label.0] = Some(self.code.len());
    }

    /// Offset of a bound label in the code.
    pub fn offset_of(&self, label: Label) -> Option<usize> {
        self.labels[label.0]
    }

    /// The finished code. Every label that a jump refers to is bound.
    pub fn finish(mut self) -> Vec<u8> {
        for (position, label) in std::mem::take(&mut self.fixups) {
            let target = self.labels[label.0].unwrap_or(position + 4);
            debug_assert!(self.labels[label.0].is_some(), "a jump to nowhere");
            let relative = target as i32 - (position as i32 + 4);
            self.code[position..position + 4].copy_from_slice(&relative.to_le_bytes());
        }
        self.code
    }

    // ---- the general form ---------------------------------------------------------------------------------------

    /// One instruction with a ModRM byte.
    fn modrm(&mut self, prefix: &[u8], width: Width, opcode: &[u8], reg: u8, rm: Rm) {
        if matches!(rm, Rm::Area(_) | Rm::AreaIndex(..)) {
            self.code.push(0x65);
        }
        if width == Width::W16 {
            self.code.push(0x66);
        }
        self.code.extend_from_slice(prefix);
        let (base, index) = match rm {
            Rm::Reg(r) => (r.0, 0),
            Rm::Area(_) => (0, 0),
            Rm::AreaIndex(index, ..) => (0, index.0),
            Rm::Memory(address) => (address.base.map_or(0, |r| r.0), address.index.map_or(0, |(r, _)| r.0)),
        };
        let rex = u8::from(width == Width::W64) << 3 | (reg >> 3) << 2 | (index >> 3) << 1 | base >> 3;
        // Byte registers 4 to 7 are SPL … DIL only with a REX prefix.
        let byte_register = width == Width::W8
            && (reg & 0xc == 4 && reg < 8 || matches!(rm, Rm::Reg(r) if r.0 & 0xc == 4 && r.0 < 8));
        if rex != 0 || byte_register {
            self.code.push(0x40 | rex);
        }
        self.code.extend_from_slice(opcode);
        let reg = (reg & 7) << 3;
        match rm {
            Rm::Reg(r) => self.code.push(0xc0 | reg | r.0 & 7),
            Rm::Area(offset) => {
                self.code.extend_from_slice(&[reg | 4, 0x25]);
                self.code.extend_from_slice(&offset.to_le_bytes());
            }
            Rm::AreaIndex(index, scale, offset) => {
                self.code.extend_from_slice(&[reg | 4, scale << 6 | (index.0 & 7) << 3 | 5]);
                self.code.extend_from_slice(&offset.to_le_bytes());
            }
            Rm::Memory(address) => self.memory(reg, address),
        }
    }

    fn memory(&mut self, reg: u8, address: Address) {
        let displacement = address.displacement.to_le_bytes();
        let Some(base) = address.base else {
            let (index, scale) = address.index.map_or((4, 0), |(r, scale)| (r.0 & 7, scale));
            self.code.extend_from_slice(&[reg | 4, scale << 6 | index << 3 | 5]);
            self.code.extend_from_slice(&displacement);
            return;
        };
        // RBP and R13 as a base without displacement mean something else.
        let mode = match address.displacement {
            0 if base.0 & 7 != 5 => 0,
            -128..=127 => 0x40,
            _ => 0x80,
        };
        if let Some((index, scale)) = address.index {
            debug_assert!(index != Reg::RSP);
            self.code.extend_from_slice(&[mode | reg | 4, scale << 6 | (index.0 & 7) << 3 | base.0 & 7]);
        } else if base.0 & 7 == 4 {
            self.code.extend_from_slice(&[mode | reg | 4, 0x24]);
        } else {
            self.code.push(mode | reg | base.0 & 7);
        }
        match mode {
            0 => {}
            0x40 => self.code.push(displacement[0]),
            _ => self.code.extend_from_slice(&displacement),
        }
    }

    // ---- moves ----------------------------------------------------------------------------------------------------

    /// MOV to a register; narrow ones leave the rest of it.
    pub fn load(&mut self, width: Width, to: Reg, from: Rm) {
        let opcode = if width == Width::W8 { 0x8a } else { 0x8b };
        self.modrm(&[], width, &[opcode], to.0, from);
    }

    /// MOV from a register.
    pub fn store(&mut self, width: Width, to: Rm, from: Reg) {
        let opcode = if width == Width::W8 { 0x88 } else { 0x89 };
        self.modrm(&[], width, &[opcode], from.0, to);
    }

    /// MOV between 64-bit registers.
    pub fn mov(&mut self, to: Reg, from: Reg) {
        self.load(Width::W64, to, Rm::Reg(from));
    }

    /// MOVZX of a 16-bit register or memory operand.
    pub fn movzx16(&mut self, to: Reg, from: Rm) {
        self.modrm(&[], Width::W32, &[0x0f, 0xb7], to.0, from);
    }

    /// MOVSXD: 32 bits, sign-extended.
    pub fn movsxd(&mut self, to: Reg, from: Rm) {
        self.modrm(&[], Width::W64, &[0x63], to.0, from);
    }

    /// MOV of an immediate, zero-extended.
    pub fn mov_imm32(&mut self, to: Reg, value: u32) {
        if to.0 >= 8 {
            self.code.push(0x41);
        }
        self.code.push(0xb8 | to.0 & 7);
        self.code.extend_from_slice(&value.to_le_bytes());
    }

    /// MOV of a sign-extended immediate.
    pub fn mov_simm32(&mut self, to: Reg, value: i32) {
        self.store_imm(Width::W64, Rm::Reg(to), value);
    }

    /// MOV of a 64-bit immediate.
    pub fn mov_imm64(&mut self, to: Reg, value: u64) {
        self.code.extend_from_slice(&[0x48 | to.0 >> 3, 0xb8 | to.0 & 7]);
        self.code.extend_from_slice(&value.to_le_bytes());
    }

    /// MOV of an immediate to memory: sign-extended to 64 bits.
    pub fn store_imm(&mut self, width: Width, to: Rm, value: i32) {
        let opcode = if width == Width::W8 { 0xc6 } else { 0xc7 };
        self.modrm(&[], width, &[opcode], 0, to);
        self.immediate(width, value);
    }

    /// LEA.
    pub fn lea(&mut self, width: Width, to: Reg, address: Address) {
        self.modrm(&[], width, &[0x8d], to.0, Rm::Memory(address));
    }

    /// The address of a label.
    pub fn lea_label(&mut self, to: Reg, label: Label) {
        self.code.extend_from_slice(&[0x48 | to.0 >> 3 << 2, 0x8d, (to.0 & 7) << 3 | 5]);
        self.relative(label);
    }

    /// 32-byte vector move, aligned (VMOVDQA ymm).
    pub fn load_ymm(&mut self, register: u8, offset: i32) {
        self.vex_ymm(0x6f, register, offset);
    }

    /// As [`Asm::load_ymm`], the other way.
    pub fn store_ymm(&mut self, register: u8, offset: i32) {
        self.vex_ymm(0x7f, register, offset);
    }

    fn vex_ymm(&mut self, opcode: u8, register: u8, offset: i32) {
        // GS override, then VEX.256.66.0F.WIG.
        self.code.extend_from_slice(&[0x65, 0xc5, 0x7d | (!register >> 3 & 1) << 7, opcode]);
        self.code.extend_from_slice(&[(register & 7) << 3 | 4, 0x25]);
        self.code.extend_from_slice(&offset.to_le_bytes());
    }

    /// VZEROUPPER.
    pub fn vzeroupper(&mut self) {
        self.code.extend_from_slice(&[0xc5, 0xf8, 0x77]);
    }

    /// LDMXCSR.
    pub fn load_mxcsr(&mut self, offset: i32) {
        self.modrm(&[], Width::W32, &[0x0f, 0xae], 2, Rm::Area(offset));
    }

    /// STMXCSR.
    pub fn store_mxcsr(&mut self, offset: i32) {
        self.modrm(&[], Width::W32, &[0x0f, 0xae], 3, Rm::Area(offset));
    }

    /// XSAVE64 of the components in EDX:EAX to the area.
    pub fn xsave(&mut self, offset: i32) {
        self.modrm(&[], Width::W64, &[0x0f, 0xae], 4, Rm::Area(offset));
    }

    /// XRSTOR64 of the components in EDX:EAX from the area.
    pub fn xrstor(&mut self, offset: i32) {
        self.modrm(&[], Width::W64, &[0x0f, 0xae], 5, Rm::Area(offset));
    }

    /// FNINIT.
    pub fn fninit(&mut self) {
        self.code.extend_from_slice(&[0xdb, 0xe3]);
    }

    // ---- arithmetic -------------------------------------------------------------------------------------------------

    /// A register with a register or memory operand.
    pub fn alu(&mut self, operation: Alu, width: Width, to: Reg, from: Rm) {
        let opcode = if width == Width::W8 { 2 } else { 3 };
        self.modrm(&[], width, &[(operation as u8) << 3 | opcode], to.0, from);
    }

    /// With an immediate.
    pub fn alu_imm(&mut self, operation: Alu, width: Width, to: Rm, value: i32) {
        if width == Width::W8 {
            self.modrm(&[], width, &[0x80], operation as u8, to);
            self.code.push(value as u8);
        } else if let Ok(short) = i8::try_from(value) {
            self.modrm(&[], width, &[0x83], operation as u8, to);
            self.code.push(short as u8);
        } else {
            self.modrm(&[], width, &[0x81], operation as u8, to);
            self.immediate(width, value);
        }
    }

    /// TEST of a register or memory operand with a register.
    pub fn test(&mut self, width: Width, first: Rm, second: Reg) {
        let opcode = if width == Width::W8 { 0x84 } else { 0x85 };
        self.modrm(&[], width, &[opcode], second.0, first);
    }

    /// TEST of a register with an immediate.
    pub fn test_imm(&mut self, width: Width, first: Reg, value: i32) {
        let opcode = if width == Width::W8 { 0xf6 } else { 0xf7 };
        self.modrm(&[], width, &[opcode], 0, Rm::Reg(first));
        self.immediate(width, value);
    }

    /// The immediate field of an instruction.
    fn immediate(&mut self, width: Width, value: i32) {
        let bytes = value.to_le_bytes();
        let len = match width {
            Width::W8 => 1,
            Width::W16 => 2,
            Width::W32 | Width::W64 => 4,
        };
        self.code.extend_from_slice(&bytes[..len]);
    }

    /// CMP of 32 bits of the area with an immediate that is not shortened; returns where the offset and the immediate are, so
    /// that both can be changed later.
    pub fn cmp_area_wide(&mut self, offset: i32, value: u32) -> (usize, usize) {
        self.code.extend_from_slice(&[0x65, 0x81, 0x3c, 0x25]);
        let place = self.code.len();
        self.code.extend_from_slice(&offset.to_le_bytes());
        self.code.extend_from_slice(&value.to_le_bytes());
        (place, place + 4)
    }

    /// SHL by an immediate.
    pub fn shl(&mut self, width: Width, to: Reg, count: u8) {
        self.modrm(&[], width, &[0xc1], 4, Rm::Reg(to));
        self.code.push(count);
    }

    /// SHR by an immediate.
    pub fn shr(&mut self, width: Width, to: Reg, count: u8) {
        self.modrm(&[], width, &[0xc1], 5, Rm::Reg(to));
        self.code.push(count);
    }

    /// RORX (BMI2): rotates right without touching flags.
    pub fn rorx(&mut self, to: Reg, from: Reg, count: u8) {
        let r = !to.0 >> 3 & 1;
        let b = !from.0 >> 3 & 1;
        self.code.extend_from_slice(&[0xc4, r << 7 | 1 << 6 | b << 5 | 3, 0xfb, 0xf0]);
        self.code.extend_from_slice(&[0xc0 | (to.0 & 7) << 3 | from.0 & 7, count]);
    }

    // ---- flags ------------------------------------------------------------------------------------------------------

    /// LAHF.
    pub fn lahf(&mut self) {
        self.code.push(0x9f);
    }

    /// SAHF.
    pub fn sahf(&mut self) {
        self.code.push(0x9e);
    }

    /// SETO AL.
    pub fn seto_al(&mut self) {
        self.code.extend_from_slice(&[0x0f, 0x90, 0xc0]);
    }

    /// ADD AL, immediate.
    pub fn add_al(&mut self, value: u8) {
        self.code.extend_from_slice(&[0x04, value]);
    }

    // ---- control flow ---------------------------------------------------------------------------------------------

    fn relative(&mut self, label: Label) {
        self.fixups.push((self.code.len(), label));
        self.code.extend_from_slice(&[0; 4]);
    }

    /// JMP to a label.
    pub fn jmp(&mut self, label: Label) {
        self.code.push(0xe9);
        self.relative(label);
    }

    /// CALL of a label.
    pub fn call(&mut self, label: Label) {
        self.code.push(0xe8);
        self.relative(label);
    }

    /// Jcc to a label.
    pub fn jcc(&mut self, condition: u8, label: Label) {
        self.code.extend_from_slice(&[0x0f, 0x80 | condition]);
        self.relative(label);
    }

    /// JMP to an address within 2 GiB.
    pub fn jmp_to(&mut self, target: u64) {
        self.code.push(0xe9);
        let relative = target.wrapping_sub(self.address() + 4) as i32;
        self.code.extend_from_slice(&relative.to_le_bytes());
    }

    /// CALL of an address within 2 GiB.
    pub fn call_to(&mut self, target: u64) {
        self.code.push(0xe8);
        let relative = target.wrapping_sub(self.address() + 4) as i32;
        self.code.extend_from_slice(&relative.to_le_bytes());
    }

    /// Jcc to an address within 2 GiB.
    pub fn jcc_to(&mut self, condition: u8, target: u64) {
        self.code.extend_from_slice(&[0x0f, 0x80 | condition]);
        let relative = target.wrapping_sub(self.address() + 4) as i32;
        self.code.extend_from_slice(&relative.to_le_bytes());
    }

    /// JMP through a register or memory.
    pub fn jmp_rm(&mut self, target: Rm) {
        self.modrm(&[], Width::W32, &[0xff], 4, target);
    }

    /// CALL through a register or memory.
    pub fn call_rm(&mut self, target: Rm) {
        self.modrm(&[], Width::W32, &[0xff], 2, target);
    }

    /// PUSH of a 64-bit register.
    pub fn push(&mut self, register: Reg) {
        if register.0 >= 8 {
            self.code.push(0x41);
        }
        self.code.push(0x50 | register.0 & 7);
    }

    /// POP of a 64-bit register.
    pub fn pop(&mut self, register: Reg) {
        if register.0 >= 8 {
            self.code.push(0x41);
        }
        self.code.push(0x58 | register.0 & 7);
    }

    /// RET.
    pub fn ret(&mut self) {
        self.code.push(0xc3);
    }

    /// UD2: never reached.
    pub fn ud2(&mut self) {
        self.code.extend_from_slice(&[0x0f, 0x0b]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, FastFormatter};

    fn listing(build: impl FnOnce(&mut Asm)) -> Vec<String> {
        let mut asm = Asm::new(0x1000);
        build(&mut asm);
        let code = asm.finish();
        let mut formatter = FastFormatter::new();
        Decoder::with_ip(64, &code, 0x1000, DecoderOptions::NONE)
            .iter()
            .map(|instruction| {
                let mut text = String::new();
                formatter.format(&instruction, &mut text);
                text
            })
            .collect()
    }

    #[test]
    fn encodings_are_what_a_decoder_reads() {
        use Width::*;
        let lines = listing(|asm| {
            asm.load(W64, Reg::R11, Rm::Area(0x1234));
            asm.load(W64, Reg::R11, Rm::AreaIndex(Reg::R11, 3, 0x20000));
            asm.store(W16, Rm::Area(0x10), Reg::RAX);
            asm.store(W8, Rm::Reg(Reg::RSI), Reg::RDI);
            asm.store_imm(W32, Rm::Area(8), 7);
            asm.lea(W64, Reg::R10, Address::base(Reg::R13, 0));
            asm.lea(W64, Reg::R10, Address::base(Reg::R12, 0x1000));
            let address = Address { base: Some(Reg::R10), index: Some((Reg::R11, 0)), displacement: 0 };
            asm.lea(W32, Reg::R10, address);
            let address = Address { base: None, index: Some((Reg::R9, 2)), displacement: -8 };
            asm.lea(W64, Reg::R10, address);
            asm.alu(Alu::Xor, W64, Reg::R10, Rm::AreaIndex(Reg::R11, 3, 0x40));
            asm.alu_imm(Alu::Cmp, W64, Rm::Reg(Reg::R10), 0xff8);
            asm.alu_imm(Alu::Cmp, W32, Rm::Area(0x40), 0);
            asm.rorx(Reg::R11, Reg::R10, 12);
            asm.movzx16(Reg::R11, Rm::Reg(Reg::R11));
            asm.movsxd(Reg::R10, Rm::Area(0x24));
            asm.jmp_rm(Rm::AreaIndex(Reg::R11, 0, 0x48));
            asm.load_ymm(9, 0x100);
            asm.store_ymm(3, 0x100);
            asm.load_mxcsr(4);
            asm.xsave(0x40);
            asm.xrstor(0x40);
        });
        let expected = [
            "mov r11,gs:[1234h]",
            "mov r11,gs:[r11*8+20000h]",
            "mov gs:[10h],ax",
            "mov sil,dil",
            "mov dword ptr gs:[8h],7h",
            "lea r10,[r13]",
            "lea r10,[r12+1000h]",
            "lea r10d,[r10+r11]",
            "lea r10,[r9*4-8h]",
            "xor r10,gs:[r11*8+40h]",
            "cmp r10,0FF8h",
            "cmp dword ptr gs:[40h],0h",
            "rorx r11,r10,0Ch",
            "movzx r11d,r11w",
            "movsxd r10,gs:[24h]",
            "jmp qword ptr gs:[r11*1+48h]",
            "vmovdqa ymm9,gs:[100h]",
            "vmovdqa gs:[100h],ymm3",
            "ldmxcsr gs:[4h]",
            "xsave64 gs:[40h]",
            "xrstor64 gs:[40h]",
        ];
        assert_eq!(lines.len(), expected.len(), "{lines:#?}");
        for (line, expected) in lines.iter().zip(expected) {
            assert_eq!(line, expected);
        }
    }

    #[test]
    fn jumps_reach_their_labels() {
        let lines = listing(|asm| {
            let (back, forth) = (asm.label(), asm.label());
            asm.bind(back);
            asm.jcc(cond::NE, forth);
            asm.jmp(back);
            asm.bind(forth);
            asm.jmp_to(0x2000);
        });
        assert_eq!(lines, ["jne 100Bh", "jmp 1000h", "jmp 2000h"]);
    }
}
