//! Hardware task switching (SDM 3A chapter 7), outside long mode.

use x86::bits::{cr0, cr4, rflags};
use x86::{Exception, Segment, Vector};

use crate::cpu::{Cpu, R, gpr, seg};
use crate::interp::op::Flow;
use crate::system::segmentation::{is_null, rpl, system_type};

/// What causes the switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskSwitch {
    /// Far JMP: the old task ends.
    Jump,
    /// Far CALL: the new task nests.
    Call,
    /// Interrupt or exception through a task gate: nests too.
    Gate,
    /// IRET with NT set: back to the previous task.
    Return,
}

/// Byte offsets of the fields that differ between the two TSS formats.
struct Layout {
    wide: bool,
}

impl Layout {
    const GPRS: [usize; 8] = [gpr::RAX, gpr::RCX, gpr::RDX, gpr::RBX, gpr::RSP, gpr::RBP, gpr::RSI, gpr::RDI];
    /// ES, CS, SS, DS and, in the 32-bit format, FS, GS.
    const SEGMENTS: [usize; 6] = [seg::ES, seg::CS, seg::SS, seg::DS, seg::FS, seg::GS];

    fn min_limit(&self) -> u32 {
        if self.wide { 0x67 } else { 0x2b }
    }

    fn ip(&self) -> u64 {
        if self.wide { 0x20 } else { 0x0e }
    }

    fn flags(&self) -> u64 {
        if self.wide { 0x24 } else { 0x10 }
    }

    fn gpr(&self, index: usize) -> u64 {
        let index = index as u64;
        if self.wide { 0x28 + 4 * index } else { 0x12 + 2 * index }
    }

    fn segment(&self, index: usize) -> u64 {
        let index = index as u64;
        if self.wide { 0x48 + 4 * index } else { 0x22 + 2 * index }
    }

    fn segment_count(&self) -> usize {
        if self.wide { 6 } else { 4 }
    }

    fn ldt(&self) -> u64 {
        if self.wide { 0x60 } else { 0x2a }
    }
}

impl Cpu {
    /// An IDT task gate.
    pub fn task_gate(&mut self, selector: u16, error_code: Option<u32>, external: u16) -> R<()> {
        if is_null(selector) || selector & 4 != 0 {
            return Err(self.raise(Exception::gp(u32::from(selector & 0xfffc | external))));
        }
        self.switch_task(selector, TaskSwitch::Gate, error_code)
    }

    /// IRET with NT set: the previous task's selector is in the current TSS.
    pub fn return_from_task(&mut self) -> R<Flow> {
        let link: u16 = self.read_system(self.tr.base)?;
        self.user.rip = self.next_ip;
        self.switch_task(link, TaskSwitch::Return, None)?;
        self.next_ip = self.user.rip;
        Ok(Flow::End)
    }

    /// Saves the current task and loads another (SDM 3A §7.3). `rip` is where the old task will resume.
    pub fn switch_task(&mut self, selector: u16, how: TaskSwitch, error_code: Option<u32>) -> R<()> {
        let bad = if how == TaskSwitch::Return { Vector::InvalidTss } else { Vector::GeneralProtection };
        if selector & 4 != 0 {
            return self.fault_with(bad, selector);
        }
        let target = self.descriptor_or(selector, bad)?;
        let (kind, busy) = match target.system_type() {
            Some(system_type::TSS_AVAILABLE) => (true, false),
            Some(system_type::TSS16_AVAILABLE) => (false, false),
            Some(system_type::TSS_BUSY) => (true, true),
            Some(system_type::TSS16_BUSY) => (false, true),
            _ => return self.fault_with(bad, selector),
        };
        if busy != (how == TaskSwitch::Return) {
            return self.fault_with(bad, selector);
        }
        if !target.present() {
            return self.fault_with(Vector::SegmentNotPresent, selector);
        }
        let new = Layout { wide: kind };
        if target.segment.limit < new.min_limit() {
            return self.fault_with(Vector::InvalidTss, selector);
        }
        let old = Layout { wide: self.tr.attributes & 8 != 0 };
        if self.tr.limit < old.min_limit() {
            return self.fault_with(Vector::InvalidTss, self.tr.selector);
        }
        self.save_task(&old, how)?;
        // Everything of the new task is read before anything changes.
        let base = target.segment.base;
        let mut gprs = [0u64; 8];
        for (index, value) in gprs.iter_mut().enumerate() {
            *value = self.read_task_word(&new, base + new.gpr(index))?;
        }
        let mut selectors = [0u16; 6];
        for (index, value) in selectors.iter_mut().enumerate().take(new.segment_count()) {
            *value = self.read_system(base + new.segment(index))?;
        }
        let ip = self.read_task_word(&new, base + new.ip())?;
        let mut flags = self.read_task_word(&new, base + new.flags())?;
        let ldt: u16 = self.read_system(base + new.ldt())?;
        let cr3: u32 = if new.wide { self.read_system(base + 0x1c)? } else { 0 };
        let trap: u16 = if new.wide { self.read_system(base + 0x64)? } else { 0 };

        let old_selector = self.tr.selector;
        if matches!(how, TaskSwitch::Jump | TaskSwitch::Return) {
            let current = self.descriptor_or(old_selector, Vector::InvalidTss)?;
            self.set_tss_busy(&current, false)?;
        }
        if matches!(how, TaskSwitch::Call | TaskSwitch::Gate) {
            self.write_system(base, old_selector)?;
            flags |= rflags::NT;
        }
        if how != TaskSwitch::Return {
            self.set_tss_busy(&target, true)?;
        }
        let mut tr = target.segment;
        tr.attributes |= 2;
        self.tr = tr;
        self.control.cr0 |= cr0::TS;
        self.debug.dr7 &= !0x155;
        if new.wide && self.control.cr0 & cr0::PG != 0 {
            self.control.cr3 = u64::from(cr3);
            self.flush_translations(true);
        }
        for (index, value) in gprs.iter().enumerate() {
            let register = &mut self.user.gpr[Layout::GPRS[index]];
            *register = if new.wide { *value } else { *register & !0xffff | value };
        }
        self.user.rip = ip;
        self.next_ip = ip;
        let mask = if new.wide { u64::from(u32::MAX) } else { 0xffff };
        self.set_rflags(self.rflags() & !mask | flags & mask | rflags::RESERVED_ONE);
        self.load_task_segments(&selectors, ldt)?;
        if let Some(code) = error_code {
            if new.wide { self.push(code)? } else { self.push(code as u16)? }
        }
        if trap & 1 != 0 {
            self.pending_debug |= x86::bits::dr6::BT;
        }
        if ip > u64::from(self.segments[seg::CS].limit) {
            return self.gp0();
        }
        Ok(())
    }

    fn read_task_word(&mut self, layout: &Layout, address: u64) -> R<u64> {
        if layout.wide {
            Ok(u64::from(self.read_system::<u32>(address)?))
        } else {
            Ok(u64::from(self.read_system::<u16>(address)?))
        }
    }

    fn save_task(&mut self, layout: &Layout, how: TaskSwitch) -> R<()> {
        let base = self.tr.base;
        let mut flags = self.rflags();
        if how == TaskSwitch::Return {
            flags &= !rflags::NT;
        }
        let mut words = vec![(layout.ip(), self.user.rip), (layout.flags(), flags)];
        for (index, register) in Layout::GPRS.iter().enumerate() {
            words.push((layout.gpr(index), self.user.gpr[*register]));
        }
        for (offset, value) in words {
            if layout.wide {
                self.write_system(base + offset, value as u32)?;
            } else {
                self.write_system(base + offset, value as u16)?;
            }
        }
        for index in 0..layout.segment_count() {
            let selector = self.segments[Layout::SEGMENTS[index]].selector;
            self.write_system(base + layout.segment(index), selector)?;
        }
        Ok(())
    }

    /// Loads the segments of a new task; faults are reported in its context as #TS, #NP or #SS.
    fn load_task_segments(&mut self, selectors: &[u16; 6], ldt: u16) -> R<()> {
        if self.system_flags & rflags::VM != 0 {
            self.ldt = Segment { selector: ldt, unusable: true, attributes: 0x82, ..Segment::default() };
            for (index, selector) in selectors.iter().enumerate() {
                let code = index == 1;
                self.segments[Layout::SEGMENTS[index]] = Segment {
                    attributes: if code { 0xfb } else { 0xf3 },
                    ..Segment::real_mode(*selector, code)
                };
            }
            self.cpl = 3;
            self.update_mode();
            return Ok(());
        }
        // The registers hold their selectors but are unusable until each is loaded.
        for (index, selector) in selectors.iter().enumerate() {
            self.segments[Layout::SEGMENTS[index]] =
                Segment { selector: *selector, unusable: true, ..Segment::default() };
        }
        self.load_ldt(ldt).or_else(|_| self.fault_with(Vector::InvalidTss, ldt))?;
        let cs = selectors[1];
        if is_null(cs) {
            return self.fault_with(Vector::InvalidTss, cs);
        }
        let mut code = self.descriptor_or(cs, Vector::InvalidTss)?;
        let level = rpl(cs);
        let fits = if code.conforming() { code.dpl() <= level } else { code.dpl() == level };
        if !code.is_code() || !fits {
            return self.fault_with(Vector::InvalidTss, cs);
        }
        if !code.present() {
            return self.fault_with(Vector::SegmentNotPresent, cs);
        }
        self.mark_accessed(&mut code)?;
        self.segments[seg::CS] = code.segment;
        self.set_cpl(level);
        let ss = selectors[2];
        let mut stack = self.inner_stack_segment(ss, level, 0)?;
        self.mark_accessed(&mut stack)?;
        self.set_segment(seg::SS, stack.segment);
        for (index, selector) in [
            (seg::ES, selectors[0]),
            (seg::DS, selectors[3]),
            (seg::FS, selectors[4]),
            (seg::GS, selectors[5]),
        ] {
            if let Err(raised) = self.load_segment(index, selector) {
                if self.fault.vector == Vector::GeneralProtection {
                    return self.fault_with(Vector::InvalidTss, selector);
                }
                return Err(raised);
            }
        }
        Ok(())
    }

    /// Whether code at the current privilege may use `len` ports from `port` (SDM 1 §19.5).
    pub fn check_port(&mut self, port: u16, len: u8) -> R<()> {
        let free = !self.is_protected() && self.mode == crate::cpu::Mode::Real;
        let v86 = self.mode == crate::cpu::Mode::Virtual8086;
        if free || !v86 && self.cpl <= self.iopl() {
            return Ok(());
        }
        if self.tr.unusable || self.tr.attributes & 8 == 0 || self.tr.limit < 0x67 {
            return self.gp0();
        }
        let map: u16 = self.read_system(self.tr.base.wrapping_add(0x66))?;
        let offset = u64::from(map) + u64::from(port / 8);
        if offset + 1 > u64::from(self.tr.limit) {
            return self.gp0();
        }
        let bits: u16 = self.read_system(self.tr.base.wrapping_add(offset))?;
        let mask = ((1u16 << len) - 1) << (port & 7);
        if bits & mask != 0 { self.gp0() } else { Ok(()) }
    }

    /// Whether CR4.VME lets virtual-8086 code run CLI, STI, PUSHF and POPF on VIF.
    pub fn virtual_interrupts(&self) -> bool {
        match self.mode {
            crate::cpu::Mode::Virtual8086 => self.control.cr4 & cr4::VME != 0,
            _ => self.cpl == 3 && self.control.cr4 & cr4::PVI != 0,
        }
    }
}
