//! The registers that user-mode instructions read and write, laid out for generated code.

/// User-visible register state of one vCPU. Generated code addresses the fields by their offsets, so the layout is
/// fixed.
#[repr(C, align(64))]
#[derive(Clone)]
pub struct UserRegs {
    /// General-purpose registers by architectural number.
    pub gpr: [u64; 16],
    /// Instruction pointer: while an instruction executes, the address of that instruction.
    pub rip: u64,
    /// Always zero: the register that an address without base or index uses.
    pub zero: u64,
    /// Linear bases of ES, CS, SS, DS, FS, GS as address generation uses them (zero for the first four in 64-bit code).
    pub segment_base: [u64; 6],
    /// The six status flags as LAHF and SETO give them: bits 8–15 hold SF ZF 0 AF 0 PF 1 CF, bits 0–7 hold OF as 0 or 1.
    pub status: u16,
    /// RFLAGS.DF as 0 or 1.
    pub direction: u16,
    /// MXCSR.
    pub mxcsr: u32,
    /// Scratch for generated code and memory operands that are not contiguous in host memory.
    pub bounce: Bounce,
    /// YMM0–15, low half first.
    pub vector: [[u8; 32]; 16],
    /// x87 and MMX state as an FXSAVE64 image; its XMM and MXCSR parts are not used.
    pub x87: X87Image,
    /// What XRSTOR wants to find behind the image.
    pub x87_header: [u64; 8],
}

/// A 512-byte FXSAVE64 image, aligned as the instruction demands.
#[repr(C, align(64))]
#[derive(Clone)]
pub struct X87Image(pub [u8; 512]);

/// Room for the largest memory operand at any alignment within 64 bytes, FXSAVE-sized operands included.
#[repr(C, align(64))]
#[derive(Clone)]
pub struct Bounce(pub [u8; 640]);

impl Default for UserRegs {
    fn default() -> Self {
        let mut x87 = [0; 512];
        x87[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
        x87[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        UserRegs {
            gpr: [0; 16],
            rip: 0,
            zero: 0,
            segment_base: [0; 6],
            status: status::ALWAYS,
            direction: 0,
            mxcsr: 0x1f80,
            bounce: Bounce([0; 640]),
            vector: [[0; 32]; 16],
            x87: X87Image(x87),
            x87_header: [0; 8],
        }
    }
}

/// The packed form of [`UserRegs::status`].
pub mod status {
    use iced_x86::RflagsBits;
    use x86::bits::rflags;

    /// The status flags in iced's numbering.
    pub const ICED: u32 =
        RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

    /// Those of a set of flags in iced's numbering that are status flags, in RFLAGS position.
    pub fn rflags_of_iced(flags: u32) -> u64 {
        [
            (RflagsBits::OF, rflags::OF),
            (RflagsBits::SF, rflags::SF),
            (RflagsBits::ZF, rflags::ZF),
            (RflagsBits::AF, rflags::AF),
            (RflagsBits::CF, rflags::CF),
            (RflagsBits::PF, rflags::PF),
        ]
        .into_iter()
        .filter(|(bit, _)| flags & bit != 0)
        .fold(0, |set, (_, flag)| set | flag)
    }

    /// Bit 1 of the flags byte reads as one.
    pub const ALWAYS: u16 = 0x0200;

    /// Packs the status bits of RFLAGS.
    pub const fn from_rflags(flags: u64) -> u16 {
        let low = (flags & (rflags::SF | rflags::ZF | rflags::AF | rflags::PF | rflags::CF)) as u16;
        (low << 8) | ALWAYS | ((flags & rflags::OF != 0) as u16)
    }

    /// The status bits in RFLAGS position.
    pub const fn to_rflags(status: u16) -> u64 {
        let low = (status >> 8) as u64 & (rflags::SF | rflags::ZF | rflags::AF | rflags::PF | rflags::CF);
        low | if status & 1 != 0 { rflags::OF } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use x86::bits::rflags;

    #[test]
    fn status_round_trips() {
        for bits in 0..64u64 {
            let all = [rflags::CF, rflags::PF, rflags::AF, rflags::ZF, rflags::SF, rflags::OF];
            let flags = (0..6).filter(|i| bits & (1 << i) != 0).fold(0, |f, i| f | all[i as usize]);
            assert_eq!(status::to_rflags(status::from_rflags(flags)), flags);
        }
    }
}
