//! Where the guest's status flags are at each point of a block.
//!
//! They are in the host's flags after an instruction that sets them, until something of ours needs the host's flags (a TLB
//! lookup compares); before that they are saved to memory, so that at every place where a block can be left, for a fault
//! or an interrupt, they are exact.

use iced_x86::{Instruction, Mnemonic, OpKind, RflagsBits};

/// OF, SF, ZF, AF, CF, PF.
const STATUS: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// Where the flags are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the host's flags only.
    Host,
    /// In memory only.
    Memory,
    /// In both.
    Both,
}

/// What an instruction does with the status flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Nothing.
    None,
    /// Replaces all, whatever they were.
    Replaces,
    /// Needs the old ones: it reads some, or leaves some as they were.
    Needs {
        /// And changes some.
        changes: bool,
    },
}

/// What an instruction does with the status flags.
pub fn usage(instruction: &Instruction) -> Use {
    let modified = instruction.rflags_modified() & STATUS;
    let read = instruction.rflags_read() & STATUS;
    if modified == 0 && read == 0 {
        return Use::None;
    }
    if read == 0 && modified == STATUS && !may_leave_flags(instruction) {
        return Use::Replaces;
    }
    Use::Needs { changes: modified != 0 }
}

/// Shifts that leave the flags alone if the count is zero, and instructions that leave flags undefined, which on some
/// processors means unchanged.
fn may_leave_flags(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    match instruction.mnemonic() {
        Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd => {
            let last = instruction.op_count() - 1;
            !matches!(instruction.op_kind(last), OpKind::Immediate8) || instruction.immediate8() & 0x1f == 0
        }
        Bsf | Bsr | Div | Idiv | Mul | Imul => true,
        _ => false,
    }
}
