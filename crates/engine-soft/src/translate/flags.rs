//! Where the guest's status flags are at each point of a block.
//!
//! They are in the host's flags after an instruction that sets them, until something of ours needs the host's flags (a TLB
//! lookup compares). Before that they are saved to memory, or, if they can be made again as long as anybody may ask for
//! them ([`super::recipe`]), nothing is saved: they are made again where they are asked for, mostly in a cold stub. So at
//! every place where a block can be left, for a fault or an interrupt, they are exact.

use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

use super::block::Builder;
use super::classes::Class;
use super::recipe::Recipe;
use super::runtime;
use crate::user::status;

/// Where the flags are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the host's flags only.
    Host,
    /// In memory only.
    Memory,
    /// In both.
    Both,
    /// In neither: they are made again ([`Recipe`]).
    Repeat,
}

/// The general registers that an instruction changes, a bit each.
pub fn written_registers(info: &mut InstructionInfoFactory, instruction: &Instruction) -> u16 {
    info.info(instruction)
        .used_registers()
        .iter()
        .filter(|used| used.register().is_gpr())
        .filter(|used| !matches!(used.access(), OpAccess::Read | OpAccess::CondRead))
        .fold(0, |bits, used| bits | 1 << (Register::full_register(used.register()).number() & 15))
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
    let modified = instruction.rflags_modified() & status::ICED;
    let read = instruction.rflags_read() & status::ICED;
    if modified == 0 && read == 0 {
        return Use::None;
    }
    if read == 0 && modified == status::ICED && !may_leave_flags(instruction) {
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

/// What an instruction does to flags and registers.
#[derive(Clone, Copy)]
pub(super) struct Effects {
    pub flags: Use,
    /// General registers that it changes, a bit each.
    pub written: u16,
}

impl Builder<'_> {
    /// Makes sure that the host's flags may be used for something else: the guest's are in memory, or can be had again.
    pub fn free_flags(&mut self) {
        if self.flags == Place::Host && self.recipe_lasts() {
            self.flags = Place::Repeat;
        }
        if self.flags == Place::Host {
            self.save_flags();
        }
    }

    /// Has the flags made again whenever they are wanted; there has to be a recipe.
    pub fn repeat_flags(&mut self) {
        if self.flags == Place::Host {
            self.flags = Place::Repeat;
        }
    }

    /// As [`Builder::free_flags`], before an instruction that may fault and uses flags so: what makes them again must not be
    /// done only for the instruction and leave the fault without.
    pub fn free_flags_before_fault(&mut self, usage: Use) {
        match usage {
            Use::Needs { .. } => self.save_flags(),
            _ => self.free_flags(),
        }
    }

    /// Makes memory hold the flags.
    pub fn save_flags(&mut self) {
        if self.flags == Place::Repeat {
            self.restore_flags();
        }
        if self.flags == Place::Host {
            runtime::save_flags(&mut self.asm);
            self.flags = Place::Both;
        }
    }

    /// Notes that the host's flags have been used for something else.
    pub fn clobber_flags(&mut self) {
        debug_assert!(self.flags != Place::Host);
        if self.flags == Place::Both {
            self.flags = Place::Memory;
        }
    }

    /// Makes the host's flags those of the guest. [`T1`] is lost.
    pub fn restore_flags(&mut self) {
        match (self.flags, self.recipe) {
            (Place::Memory, None) => {
                runtime::restore_flags(&mut self.asm);
                self.flags = Place::Both;
            }
            (Place::Memory, Some(recipe)) => {
                recipe.repeat(&mut self.asm);
                self.flags = Place::Both;
            }
            (Place::Repeat, Some(recipe)) => {
                recipe.repeat(&mut self.asm);
                self.flags = Place::Host;
            }
            _ => {}
        }
    }

    /// The recipe, if the flags are nowhere else.
    pub(super) fn recipe_in_use(&self) -> Option<Recipe> {
        self.recipe.filter(|_| self.flags == Place::Repeat)
    }

    /// In a cold stub: makes the flags again, to memory.
    pub(super) fn repeat_and_save(&mut self, recipe: Option<Recipe>) {
        if let Some(recipe) = recipe {
            recipe.repeat(&mut self.asm);
            runtime::save_flags(&mut self.asm);
        }
    }

    /// Whether the recipe's registers keep their values until the flags are set anew, or are wanted in their place.
    fn recipe_lasts(&self) -> bool {
        self.recipe.is_some_and(|recipe| self.lasts_from(self.current, recipe))
    }

    /// As above, from the instruction with this number on.
    pub(super) fn lasts_from(&self, first: usize, recipe: Recipe) -> bool {
        for (class, effects) in self.classes[first..].iter().zip(&self.effects[first..]) {
            match class {
                Class::Nothing
                | Class::Address
                | Class::Plain
                | Class::Memory(_)
                | Class::Gather
                | Class::MaskedMove
                | Class::Push
                | Class::Pop
                | Class::Leave => {}
                // There they are made again.
                _ => return true,
            }
            match effects.flags {
                Use::Replaces => return true,
                Use::Needs { .. } => return true,
                Use::None => {}
            }
            if effects.written & recipe.reads() != 0 {
                return false;
            }
        }
        true
    }

    /// What an instruction's execution means for the recipe.
    pub(super) fn note_effects(&mut self, instruction: &Instruction, class: Class) {
        let effects = self.effects[self.current];
        match class {
            Class::Nothing | Class::JumpIf => {}
            Class::Interpret => self.recipe = None,
            Class::Plain | Class::Memory(_) if effects.flags != Use::None => {
                let overwrites = |recipe: Recipe| recipe.reads() & effects.written != 0;
                if effects.flags == Use::Replaces {
                    self.recipe = Recipe::of(instruction);
                } else if effects.flags != (Use::Needs { changes: false })
                    || self.recipe.is_some_and(overwrites)
                {
                    self.recipe = None;
                }
            }
            _ if self.recipe.is_some_and(|recipe| recipe.reads() & effects.written != 0) => {
                debug_assert!(self.flags != Place::Repeat, "the flags are lost");
                self.recipe = None;
            }
            _ => {}
        }
    }

    /// What an instruction's execution means for the place of the flags.
    pub fn note_flags(&mut self, usage: Use) {
        if matches!(usage, Use::Replaces | Use::Needs { changes: true }) {
            self.flags = Place::Host;
        }
    }
}
