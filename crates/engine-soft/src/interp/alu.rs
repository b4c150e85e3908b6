//! Integer arithmetic with exact flags, borrowed from the host: each operation is one host instruction whose
//! flags are read back with LAHF and SETO, in the packed form of [`crate::user::status`].

use std::arch::asm;

/// CF in packed status.
pub const CF: u16 = 0x0100;
/// OF in packed status.
pub const OF: u16 = 0x0001;

/// An operand width.
pub trait Int: Copy + Eq + 'static {
    /// Width in bytes.
    const BYTES: u32;
    /// Width in bits.
    const BITS: u32 = Self::BYTES * 8;
    /// Truncates.
    fn from_u64(value: u64) -> Self;
    /// Zero-extends.
    fn zext(self) -> u64;
    /// Sign-extends.
    fn sext(self) -> i64;
    /// `self + other`
    fn add(self, other: Self) -> (Self, u16);
    /// `self + other + CF`
    fn adc(self, other: Self, status: u16) -> (Self, u16);
    /// `self - other`
    fn sub(self, other: Self) -> (Self, u16);
    /// `self - other - CF`
    fn sbb(self, other: Self, status: u16) -> (Self, u16);
    /// Bitwise AND.
    fn and(self, other: Self) -> (Self, u16);
    /// Bitwise OR.
    fn or(self, other: Self) -> (Self, u16);
    /// Bitwise exclusive OR.
    fn xor(self, other: Self) -> (Self, u16);
    /// Signed product, truncated.
    fn imul(self, other: Self) -> (Self, u16);
    /// Shift left; `count` is not zero after masking.
    fn shl(self, count: u8) -> (Self, u16);
    /// Shift right; likewise.
    fn shr(self, count: u8) -> (Self, u16);
    /// Arithmetic shift right; likewise.
    fn sar(self, count: u8) -> (Self, u16);
    /// Rotate left; likewise.
    fn rol(self, count: u8) -> (Self, u16);
    /// Rotate right; likewise.
    fn ror(self, count: u8) -> (Self, u16);
    /// Rotate left through carry.
    fn rcl(self, count: u8, status: u16) -> (Self, u16);
    /// Rotate right through carry.
    fn rcr(self, count: u8, status: u16) -> (Self, u16);
}

macro_rules! binary {
    ($name:ident, $mnemonic:literal, $class:ident, $suffix:literal) => {
        #[inline(always)]
        fn $name(self, other: Self) -> (Self, u16) {
            let mut result = self;
            let status: u16;
            // SAFETY: registers only; every register written is declared.
            unsafe {
                asm!(
                    concat!($mnemonic, " {a", $suffix, "}, {b", $suffix, "}"), "lahf", "seto al",
                    a = inout($class) result, b = in($class) other, out("ax") status,
                    options(pure, nomem, nostack)
                );
            }
            (result, status)
        }
    };
}

macro_rules! binary_with_carry {
    ($name:ident, $mnemonic:literal, $class:ident, $suffix:literal) => {
        #[inline(always)]
        fn $name(self, other: Self, status: u16) -> (Self, u16) {
            let mut result = self;
            let out: u16;
            // SAFETY: registers only; every register written is declared.
            unsafe {
                asm!(
                    "bt {s:e}, 8",
                    concat!($mnemonic, " {a", $suffix, "}, {b", $suffix, "}"), "lahf", "seto al",
                    a = inout($class) result, b = in($class) other, s = in(reg) u32::from(status),
                    out("ax") out, options(pure, nomem, nostack)
                );
            }
            (result, out)
        }
    };
}

macro_rules! shift {
    ($name:ident, $mnemonic:literal, $class:ident, $suffix:literal) => {
        #[inline(always)]
        fn $name(self, count: u8) -> (Self, u16) {
            let mut result = self;
            let status: u16;
            // SAFETY: registers only; every register written is declared.
            unsafe {
                asm!(
                    concat!($mnemonic, " {a", $suffix, "}, cl"), "lahf", "seto al",
                    a = inout($class) result, in("cl") count, out("ax") status,
                    options(pure, nomem, nostack)
                );
            }
            (result, status)
        }
    };
}

macro_rules! shift_with_carry {
    ($name:ident, $mnemonic:literal, $class:ident, $suffix:literal) => {
        #[inline(always)]
        fn $name(self, count: u8, status: u16) -> (Self, u16) {
            let mut result = self;
            let out: u16;
            // SAFETY: registers only; every register written is declared.
            unsafe {
                asm!(
                    "bt {s:e}, 8",
                    concat!($mnemonic, " {a", $suffix, "}, cl"), "lahf", "seto al",
                    a = inout($class) result, in("cl") count, s = in(reg) u32::from(status),
                    out("ax") out, options(pure, nomem, nostack)
                );
            }
            (result, out)
        }
    };
}

macro_rules! int {
    ($type:tt, $signed:ty, $bytes:literal, $class:ident, $suffix:literal) => {
        impl Int for $type {
            const BYTES: u32 = $bytes;
            #[inline(always)]
            fn from_u64(value: u64) -> Self {
                value as $type
            }
            #[inline(always)]
            fn zext(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn sext(self) -> i64 {
                self as $signed as i64
            }
            binary!(add, "add", $class, $suffix);
            binary!(sub, "sub", $class, $suffix);
            binary!(and, "and", $class, $suffix);
            binary!(or, "or", $class, $suffix);
            binary!(xor, "xor", $class, $suffix);
            binary_with_carry!(adc, "adc", $class, $suffix);
            binary_with_carry!(sbb, "sbb", $class, $suffix);
            shift!(shl, "shl", $class, $suffix);
            shift!(shr, "shr", $class, $suffix);
            shift!(sar, "sar", $class, $suffix);
            shift!(rol, "rol", $class, $suffix);
            shift!(ror, "ror", $class, $suffix);
            shift_with_carry!(rcl, "rcl", $class, $suffix);
            shift_with_carry!(rcr, "rcr", $class, $suffix);
            imul!($type, $class, $suffix);
        }
    };
}

macro_rules! imul {
    (u8, $class:ident, $suffix:literal) => {
        #[inline(always)]
        fn imul(self, other: Self) -> (Self, u16) {
            // The two-operand form has no 8-bit width; nothing decodes to this.
            let wide = (self as i8 as i16).wrapping_mul(other as i8 as i16);
            let overflow = wide as i8 as i16 != wide;
            (wide as u8, if overflow { CF | OF } else { 0 })
        }
    };
    ($type:ty, $class:ident, $suffix:literal) => {
        binary!(imul, "imul", $class, $suffix);
    };
}

int!(u8, i8, 1, reg_byte, "");
int!(u16, i16, 2, reg, ":x");
int!(u32, i32, 4, reg, ":e");
int!(u64, i64, 8, reg, ":r");

/// For each packed status (flags byte, OF as bit 8), the set of condition codes that hold.
static CONDITIONS: [u16; 512] = conditions();

const fn conditions() -> [u16; 512] {
    let mut table = [0u16; 512];
    let mut index = 0;
    while index < 512 {
        let cf = index & 0x01 != 0;
        let pf = index & 0x04 != 0;
        let zf = index & 0x40 != 0;
        let sf = index & 0x80 != 0;
        let of = index & 0x100 != 0;
        let positive = [of, cf, zf, cf || zf, sf, pf, sf != of, zf || sf != of];
        let mut code = 0;
        while code < 8 {
            table[index] |= if positive[code] { 1 << (2 * code) } else { 2 << (2 * code) };
            code += 1;
        }
        index += 1;
    }
    table
}

/// Whether condition code `code` (0 = O … 15 = G, SDM 1 appendix B) holds.
#[inline(always)]
pub fn condition(status: u16, code: u8) -> bool {
    let index = usize::from(status >> 8) | usize::from(status & 1) << 8;
    CONDITIONS[index] >> code & 1 != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::user::status;
    use x86::bits::rflags;

    #[test]
    fn flags_of_common_operations() {
        let (r, s) = 0xffu8.add(1);
        assert_eq!((r, status::to_rflags(s)), (0, rflags::CF | rflags::ZF | rflags::AF | rflags::PF));
        let (r, s) = 0x8000_0000u32.sub(1);
        assert_eq!((r, status::to_rflags(s)), (0x7fff_ffff, rflags::OF | rflags::AF | rflags::PF));
        let (r, s) = 1u64.adc(u64::MAX - 1, status::from_rflags(rflags::CF));
        assert_eq!((r, s & CF), (0, CF));
        let (r, s) = 0x8000u16.rcl(1, status::from_rflags(0));
        assert_eq!((r, s & CF), (0, CF));
    }

    #[test]
    fn conditions_match_their_definitions() {
        let zf = status::from_rflags(rflags::ZF);
        assert!(condition(zf, 4) && !condition(zf, 5) && condition(zf, 6) && condition(zf, 14));
        let less = status::from_rflags(rflags::SF);
        assert!(condition(less, 12) && !condition(less, 13) && condition(less, 8));
        let both = status::from_rflags(rflags::SF | rflags::OF);
        assert!(condition(both, 15) && condition(both, 13) && !condition(both, 12));
    }
}
