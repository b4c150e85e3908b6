//! Branches: straight to the next unit where it lies in the same page, else by the table of known targets.

use std::mem::offset_of;

use iced_x86::{Instruction, OpKind};
use x86::paging::PAGE_SIZE;

use super::asm::{Address, Alu, Asm, Label, Reg, Rm, Width, cond};
use super::block::{Builder, Rounds};
use super::flags::Place;
use super::memory::Operand;
use super::registers::{T0, T1};
use super::runtime::PAIR_BYTES;
use super::stubs::SitePurpose;
use super::targets::{INDEX_BITS, MIX_SHIFT, Table, Target};
use crate::area::{ATTENTION_OFFSET, Layout, run_offset};

/// Longest instruction in bytes.
const MAX_INSTRUCTION: i64 = 15;
/// The page that a RIP lies in, as a mask.
const PAGE_OF: i32 = -(PAGE_SIZE as i32);

impl Builder<'_> {
    fn in_page(offset: i64) -> bool {
        (0..PAGE_SIZE as i64).contains(&offset)
    }

    /// Whether the instruction at an offset lies in the same page as a whole, so that it is where it is as long as this
    /// code is.
    fn is_near(offset: i64) -> bool {
        (0..PAGE_SIZE as i64 - (MAX_INSTRUCTION - 1)).contains(&offset)
    }

    /// Goes on at an offset relative to the page.
    pub fn go_to(&mut self, offset: i64) {
        if Self::is_near(offset) {
            if offset <= i64::from(self.offset) {
                // Every loop has to notice when something is wanted of the vCPU.
                self.free_flags();
                let exit = self.exit(offset);
                self.check_attention(exit);
            }
            if self.flags == Place::Repeat {
                self.restore_flags();
            }
            self.link(offset, |asm, label| asm.jmp(label));
        } else {
            self.save_flags();
            if offset <= i64::from(self.offset) {
                let exit = self.exit(offset);
                self.check_attention(exit);
            }
            self.jump_page(offset);
        }
    }

    /// Jcc; behind the last instruction of a block also the way on.
    pub fn jump_if(&mut self, instruction: &Instruction, last: bool) {
        let condition = instruction.condition_code() as u8 - 1;
        let target = self.target_of(instruction);
        let next = instruction.next_ip() as i64;
        let is_near = Self::is_near(target);
        let mut is_checked = target > i64::from(self.offset);
        if is_near && !is_checked && self.recipe.is_some() {
            // A loop: it notices what is wanted before the branch, since the flags can be had again.
            self.repeat_flags();
            let exit = self.exit(i64::from(self.offset));
            self.check_attention(exit);
            is_checked = true;
        }
        self.restore_flags();
        if let Some(rounds) = self.second_body(target) {
            self.rounds = Some(rounds);
            self.asm.jcc(condition, rounds.label);
        } else if is_near && is_checked {
            self.link(target, |asm, label| asm.jcc(condition, label));
        } else {
            let fall_through = self.asm.label();
            self.asm.jcc(condition ^ 1, fall_through);
            let flags = self.flags;
            self.go_to(target);
            self.flags = flags;
            self.asm.bind(fall_through);
        }
        if last {
            self.go_to(next);
        }
    }

    /// The second body that a branch leads to, if it is worth while to have one.
    fn second_body(&mut self, target: i64) -> Option<Rounds> {
        let begins_here = target == (self.block.gpa() & (PAGE_SIZE - 1)) as i64;
        let recipe = self.recipe.filter(|_| begins_here && Self::is_near(target))?;
        let saves = self.begins_with_flags == Place::Memory && self.lasts_from(0, recipe);
        self.rounds.or_else(|| saves.then(|| Rounds { label: self.asm.label(), recipe }))
    }

    /// CALL with a relative target.
    pub fn call(&mut self, instruction: &Instruction) {
        self.save_flags();
        let target = self.target_of(instruction);
        if target <= i64::from(self.offset) {
            // Calls alone can make a loop too.
            let exit = self.exit(i64::from(self.offset));
            self.check_attention(exit);
        }
        self.push_return_address(instruction);
        if Self::is_near(target) {
            self.link(target, |asm, label| asm.call(label));
        } else {
            self.call_page(target);
        }
        self.return_point(instruction);
    }

    /// The return address to the guest's stack, and, as the first of a pair, to that of translated code. The second is what
    /// the host's CALL pushes.
    fn push_return_address(&mut self, instruction: &Instruction) {
        let found = self.access(Operand::Stack(-(self.word as i8)), self.word, true, None);
        let found = self.one_register(found);
        self.load_rip(T1, instruction.next_ip() as i64);
        self.push_shadow(T1);
        self.asm.store(self.wide(), Rm::Memory(found), T1);
        self.move_stack(-i32::from(self.word));
    }

    /// Where a RET comes back to, with the return address in [`T0`].
    fn return_point(&mut self, instruction: &Instruction) {
        self.asm.lea(Width::W64, Reg::RSP, Address::base(Reg::RSP, 8));
        self.enter_page_of_target();
        // The page is that of the instruction after the call, which may be the next one.
        let next = instruction.next_ip() as i64;
        let in_its_page = next & (PAGE_SIZE as i64 - 1);
        self.flags = Place::Memory;
        if Self::is_near(next) {
            self.link(next, |asm, label| asm.jmp(label));
        } else if Self::in_page(next) {
            self.jump_page(next);
        } else {
            self.asm.mov_simm32(T1, in_its_page as i32);
            self.asm.alu(Alu::Add, Width::W64, T1, Rm::Area(run_offset!(page)));
            self.asm.mov(T0, T1);
            self.go_to_known_target();
        }
    }

    /// JMP or CALL through a register or memory.
    pub fn indirect(&mut self, instruction: &Instruction, is_call: bool) {
        self.save_flags();
        match instruction.op0_kind() {
            OpKind::Register => {
                self.held = None;
                self.load_guest(T0, instruction.op0_register().full_register().number());
                if self.word == 4 {
                    self.asm.load(Width::W32, T0, Rm::Reg(T0));
                }
            }
            _ => {
                let found = self.access(Operand::Of(instruction), self.word, false, None);
                self.load_found(T0, found);
            }
        }
        // An unknown target may be one that faults, before anything is pushed: the interpreter's case.
        let unknown = self.site(SitePurpose::Interpret, None);
        self.find_target(unknown);
        if is_call {
            self.asm.load(Width::W64, T1, Rm::AreaIndex(T1, 0, self.target_field(offset_of!(Target, host))));
            self.asm.store(Width::W64, Rm::Area(run_offset!(destination)), T1);
            self.asm.store(Width::W64, Rm::Area(run_offset!(temporary)), T0);
            self.push_return_address(instruction);
            self.asm.load(Width::W64, T0, Rm::Area(run_offset!(temporary)));
            self.enter_page_of_target();
            self.asm.call_rm(Rm::Area(run_offset!(destination)));
            self.return_point(instruction);
        } else {
            self.jump_to_found_target();
        }
    }

    /// RET.
    pub fn ret(&mut self, instruction: &Instruction) {
        self.save_flags();
        let found = self.access(Operand::Stack(0), self.word, false, None);
        self.load_found(T0, found);
        let arguments = if instruction.op_count() > 0 { i32::from(instruction.immediate16()) } else { 0 };
        let (paired, not_paired) = (self.asm.label(), self.asm.label());
        let is_top =
            |asm: &mut Asm| asm.alu(Alu::Cmp, Width::W64, T0, Rm::Memory(Address::base(Reg::RSP, 8)));
        is_top(&mut self.asm);
        self.asm.jcc(cond::NE, not_paired);
        self.asm.bind(paired);
        self.move_stack(i32::from(self.word) + arguments);
        self.asm.ret();
        // Not the return of the last call, which then is never returned from, but maybe of the one before.
        self.asm.bind(not_paired);
        self.asm.lea(Width::W64, Reg::RSP, Address::base(Reg::RSP, PAIR_BYTES));
        is_top(&mut self.asm);
        self.asm.jcc(cond::E, paired);
        let within = self.asm.label();
        self.asm.alu(Alu::Cmp, Width::W64, Reg::RSP, Rm::Area(run_offset!(shadow_top)));
        self.asm.jcc(cond::BE, within);
        self.asm.load(Width::W64, Reg::RSP, Rm::Area(run_offset!(shadow_top)));
        self.asm.bind(within);
        let unknown = self.site(SitePurpose::Interpret, None);
        self.find_target(unknown);
        self.move_stack(i32::from(self.word) + arguments);
        self.jump_to_found_target();
    }

    /// Goes on at the RIP in [`T0`], all other effects of the instruction being done.
    fn go_to_known_target(&mut self) {
        self.clobber_flags();
        self.asm.alu_imm(Alu::Cmp, Width::W32, Rm::Area(ATTENTION_OFFSET), 0);
        self.asm.jcc_to(cond::NE, self.routines.exit_to);
        self.index_target();
        self.asm.alu(Alu::Cmp, Width::W64, T0, self.target_operand(offset_of!(Target, rip)));
        self.asm.jcc_to(cond::NE, self.routines.exit_to);
        self.jump_to_found_target();
    }

    /// Looks the RIP in [`T0`] up; [`T1`] is then the entry's offset. If it is not known, or something is wanted of the vCPU,
    /// goes to `otherwise`.
    fn find_target(&mut self, otherwise: Label) {
        self.check_attention(otherwise);
        self.index_target();
        self.asm.alu(Alu::Cmp, Width::W64, T0, self.target_operand(offset_of!(Target, rip)));
        self.asm.jcc(cond::NE, otherwise);
    }

    /// The same hash as [`super::targets::index_of`], times the size of an entry.
    fn index_target(&mut self) {
        const { assert!(size_of::<Target>() == 16) };
        self.asm.rorx(T1, T0, MIX_SHIFT);
        self.asm.alu(Alu::Xor, Width::W32, T1, Rm::Reg(T0));
        self.asm.alu_imm(Alu::And, Width::W32, Rm::Reg(T1), (1 << INDEX_BITS) - 1);
        self.asm.shl(Width::W32, T1, 4);
    }

    fn target_field(&self, field: usize) -> i32 {
        let table = offset_of!(Layout, targets) + self.variant.privilege() as usize * size_of::<Table>();
        (table + offset_of!(Table, entries) + field) as i32
    }

    fn target_operand(&self, field: usize) -> Rm {
        Rm::AreaIndex(T1, 0, self.target_field(field))
    }

    fn jump_to_found_target(&mut self) {
        self.enter_page_of_target();
        self.asm.jmp_rm(self.target_operand(offset_of!(Target, host)));
    }

    /// Makes the page of the RIP in [`T0`] the current one.
    fn enter_page_of_target(&mut self) {
        self.asm.alu_imm(Alu::And, Width::W64, Rm::Reg(T0), PAGE_OF);
        self.asm.store(Width::W64, Rm::Area(run_offset!(page)), T0);
    }
}
