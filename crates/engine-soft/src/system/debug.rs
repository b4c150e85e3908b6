//! Debug registers, breakpoints and single steps (SDM 3B chapter 18).

use x86::Exception;
use x86::bits::{cr4, dr6, dr7, rflags};
use x86::paging::PAGE_MASK;

use crate::cpu::{Cpu, R};
use crate::mmu::Access;

/// What a breakpoint waits for (R/W field of DR7).
const ON_EXECUTION: u64 = 0;
const ON_WRITE: u64 = 1;
const ON_IO: u64 = 2;

impl Cpu {
    fn breakpoint(&self, index: usize) -> Option<(u64, u64, u64)> {
        let enabled = self.debug.dr7 >> (2 * index) & 3 != 0;
        let kind = self.debug.dr7 >> (16 + 4 * index) & 3;
        let len = match self.debug.dr7 >> (18 + 4 * index) & 3 {
            0 => 1,
            1 => 2,
            2 => 8,
            _ => 4,
        };
        enabled.then_some((kind, self.debug.dr[index] & !(len - 1), len))
    }

    /// Recomputes whether loads and stores have to be looked at. Call after DR0–DR3 or DR7 change.
    pub fn update_watchpoints(&mut self) {
        self.watchpoints = (0..4)
            .any(|i| self.breakpoint(i).is_some_and(|(kind, ..)| kind != ON_EXECUTION && kind != ON_IO));
        self.flush_translations(false);
    }

    /// Whether a data breakpoint lies in a linear page.
    pub fn watchpoint_in_page(&self, page: u64) -> bool {
        (0..4).any(|i| self.breakpoint(i).is_some_and(|(_, address, _)| address & !PAGE_MASK == page))
    }

    /// Notes data breakpoints that an access touches.
    pub fn match_watchpoints(&mut self, gva: u64, len: u64, access: Access) {
        for index in 0..4 {
            let Some((kind, address, size)) = self.breakpoint(index) else { continue };
            let watched = match kind {
                ON_WRITE => access == Access::Write,
                3 => access != Access::Execute,
                _ => false,
            };
            if watched && gva < address.wrapping_add(size) && address < gva.wrapping_add(len) {
                self.pending_debug |= 1 << index;
                self.stop_block = true;
            }
        }
    }

    /// Notes I/O breakpoints that a port access touches.
    pub fn match_io_breakpoints(&mut self, port: u16, len: u64) {
        if self.debug.dr7 & dr7::ENABLE_MASK == 0 || self.control.cr4 & cr4::DE == 0 {
            return;
        }
        for index in 0..4 {
            let Some((ON_IO, address, size)) = self.breakpoint(index) else { continue };
            let port = u64::from(port);
            if port < address + size && address < port + len {
                self.pending_debug |= 1 << index;
                self.stop_block = true;
            }
        }
    }

    /// Whether an instruction breakpoint may be set, so that instructions have to be looked at one by one.
    pub fn has_instruction_breakpoints(&self) -> bool {
        self.debug.dr7 & dr7::ENABLE_MASK != 0
            && (0..4).any(|i| self.breakpoint(i).is_some_and(|(kind, ..)| kind == ON_EXECUTION))
    }

    /// The fault of an instruction breakpoint at a linear address, unless RFLAGS.RF suppresses it.
    pub fn check_instruction_breakpoints(&mut self, linear: u64) -> R<()> {
        if self.system_flags & rflags::RF != 0 {
            return Ok(());
        }
        let mut hit = 0;
        for index in 0..4 {
            if let Some((ON_EXECUTION, address, _)) = self.breakpoint(index)
                && address == linear
            {
                hit |= 1 << index;
            }
        }
        if hit != 0 { Err(self.raise(Exception::debug(hit))) } else { Ok(()) }
    }

    /// MOV to or from a debug register: DR4 and DR5 are aliases unless CR4.DE; DR7.GD traps.
    pub fn debug_register(&mut self, number: u8) -> R<u8> {
        let number = match number {
            4 | 5 if self.control.cr4 & cr4::DE != 0 => return self.ud(),
            4 | 5 => number + 2,
            _ => number,
        };
        if self.debug.dr7 & dr7::GD != 0 {
            return Err(self.raise(Exception::debug(dr6::BD)));
        }
        Ok(number)
    }
}
