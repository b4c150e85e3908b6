//! Where guest registers live while translated code runs.
//!
//! Most are in the host register of the same number. The host's RSP stays the host's, so guest RSP has another register, and
//! two more are taken as scratch; the guest registers of those numbers stay in the vCPU's area.

use iced_x86::Register;

use super::asm::Reg;

/// Scratch: the effective address, then the offset in its page, or a host pointer.
pub const T0: Reg = Reg::R10;
/// Scratch: an index into a table, then the host address of a page.
pub const T1: Reg = Reg::R11;
/// Guest RSP.
pub const GUEST_RSP: Reg = Reg::R15;

/// The host register of a guest register; `None` for those that stay in memory.
pub const fn home(guest: usize) -> Option<Reg> {
    match guest {
        4 => Some(GUEST_RSP),
        10 | 11 | 15 => None,
        _ => Some(Reg(guest as u8)),
    }
}

/// The part of a host register that has the size of a guest register's part. The high bytes of RAX … RBX stay themselves.
pub fn part(of: Reg, like: Register) -> Register {
    let number = u32::from(of.0);
    match like.size() {
        8 => Register::RAX + number,
        4 => Register::EAX + number,
        2 => Register::AX + number,
        _ => match number {
            0..4 => Register::AL + number,
            _ => Register::SPL + (number - 4),
        },
    }
}

/// AH, CH, DH, BH: not encodable together with the registers that only a REX prefix names.
pub fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::CH | Register::DH | Register::BH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_have_the_size_of_what_they_stand_for() {
        assert_eq!(part(GUEST_RSP, Register::RSP), Register::R15);
        assert_eq!(part(GUEST_RSP, Register::ESP), Register::R15D);
        assert_eq!(part(GUEST_RSP, Register::SP), Register::R15W);
        assert_eq!(part(GUEST_RSP, Register::SPL), Register::R15L);
        assert_eq!(part(Reg::RBX, Register::BL), Register::BL);
        assert_eq!(part(Reg::RSI, Register::SIL), Register::SIL);
        assert_eq!(part(T0, Register::R15L), Register::R10L);
    }
}
