//! Register files in architectural form.

use serde::{Deserialize, Serialize};

/// General-purpose register numbers as encoded by the architecture (SDM 2 §2.1.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Gpr {
    Rax = 0,
    Rcx = 1,
    Rdx = 2,
    Rbx = 3,
    Rsp = 4,
    Rbp = 5,
    Rsi = 6,
    Rdi = 7,
    R8 = 8,
    R9 = 9,
    R10 = 10,
    R11 = 11,
    R12 = 12,
    R13 = 13,
    R14 = 14,
    R15 = 15,
}

/// General-purpose registers, instruction pointer and flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    /// Indexed by [`Gpr`].
    pub gpr: [u64; 16],
    /// Offset of the next instruction within CS.
    pub rip: u64,
    /// RFLAGS; bit 1 always set.
    pub rflags: u64,
}

/// A segment register with its hidden part (SDM 3A §3.4.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Access rights in the layout of descriptor bits 40–55: type in bits 0–3, S 4, DPL 5–6, P 7,
    /// AVL 12, L 13, D/B 14, G 15.
    pub attributes: u16,
    /// Limit in bytes, granularity already applied.
    pub limit: u32,
    /// Linear base address.
    pub base: u64,
    /// The register holds a null or otherwise unusable selector.
    pub unusable: bool,
}

/// Bits of [`Segment::attributes`].
pub mod attr {
    /// Type field; for code/data: bit 0 accessed, 1 writable/readable, 2 expand-down/conforming, 3 code.
    pub const TYPE: u16 = 0xf;
    /// Accessed.
    pub const ACCESSED: u16 = 1 << 0;
    /// Writable data or readable code.
    pub const WRITABLE_OR_READABLE: u16 = 1 << 1;
    /// Expand-down data or conforming code.
    pub const DOWN_OR_CONFORMING: u16 = 1 << 2;
    /// Code rather than data.
    pub const CODE: u16 = 1 << 3;
    /// Code or data (not system).
    pub const S: u16 = 1 << 4;
    /// Bit position of the two-bit DPL.
    pub const DPL_SHIFT: u32 = 5;
    /// Present.
    pub const P: u16 = 1 << 7;
    /// 64-bit code.
    pub const L: u16 = 1 << 13;
    /// 32-bit default size, or big stack.
    pub const DB: u16 = 1 << 14;
    /// Limit counted in pages.
    pub const G: u16 = 1 << 15;
}

impl Segment {
    /// A real-mode segment: base is the selector times sixteen, limit 64 KiB.
    pub const fn real_mode(selector: u16, code: bool) -> Self {
        Segment {
            selector,
            attributes: if code { 0x9b } else { 0x93 },
            limit: 0xffff,
            base: (selector as u64) << 4,
            unusable: false,
        }
    }

    /// Descriptor privilege level.
    pub const fn dpl(&self) -> u8 {
        ((self.attributes >> attr::DPL_SHIFT) & 3) as u8
    }

    /// Decodes the eight descriptor bytes that `selector` names (SDM 3A §3.4.5). For system descriptors in
    /// long mode, which are sixteen bytes, the caller adds the upper half of the base.
    pub const fn from_descriptor(selector: u16, descriptor: u64) -> Self {
        let attributes = ((descriptor >> 40) & 0xf0ff) as u16;
        let raw = ((descriptor & 0xffff) | ((descriptor >> 32) & 0xf_0000)) as u32;
        Segment {
            selector,
            attributes,
            limit: if attributes & attr::G != 0 { (raw << 12) | 0xfff } else { raw },
            base: ((descriptor >> 16) & 0xff_ffff) | ((descriptor >> 32) & 0xff00_0000),
            unusable: false,
        }
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Offset of the last byte.
    pub limit: u16,
}

/// Control registers, with EFER and XCR0 which belong to the same decisions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ControlRegisters {
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub xcr0: u64,
}

/// Debug registers; DR4 and DR5 are aliases and not stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct DebugRegisters {
    pub dr: [u64; 4],
    pub dr6: u64,
    pub dr7: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat_descriptors_decode() {
        let code = Segment::from_descriptor(0x10, 0x00af_9b00_0000_ffff);
        assert_eq!((code.base, code.limit, code.attributes), (0, 0xffff_ffff, 0xa09b));
        let tss = Segment::from_descriptor(0x40, 0x1200_8934_5678_0067);
        assert_eq!((tss.base, tss.limit, tss.dpl()), (0x1234_5678, 0x67, 0));
    }
}
