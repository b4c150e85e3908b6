//! Far transfers: JMP, CALL, RET, IRET across segments and privileges (SDM 3A §5.8), SYSCALL and SYSENTER.

use x86::bits::{cr0, cr4, efer, rflags};
use x86::regs::attr;
use x86::{Exception, Segment, Vector};

use crate::cpu::{Cpu, Mode, R, gpr, seg};
use crate::interp::alu::Int;
use crate::interp::op::{Flow, Op};
use crate::mmu::Access;
use crate::system::interrupt::within;
use crate::system::segmentation::{Descriptor, is_null, rpl, system_type};
use crate::system::task::TaskSwitch;

type F = R<Flow>;

/// A code segment with base 0 and limit 4 GiB, as SYSCALL and SYSENTER make it.
fn flat_code(selector: u16, cpl: u8, long: bool) -> Segment {
    let size = if long { attr::L } else { attr::DB };
    let attributes = attr::G | size | attr::P | attr::S | 0xb | u16::from(cpl) << attr::DPL_SHIFT;
    Segment { selector, attributes, limit: u32::MAX, base: 0, unusable: false }
}

fn flat_data(selector: u16, cpl: u8) -> Segment {
    let attributes = attr::G | attr::DB | attr::P | attr::S | 0x3 | u16::from(cpl) << attr::DPL_SHIFT;
    Segment { selector, attributes, limit: u32::MAX, base: 0, unusable: false }
}

impl Cpu {
    fn jump_target_ok(&mut self, code: &Segment, target: u64) -> R<()> {
        let long = self.long_mode() && code.attributes & attr::L != 0;
        let ok = if long { Cpu::is_canonical(target) } else { target <= u64::from(code.limit) };
        if ok { Ok(()) } else { self.gp0() }
    }

    /// Common checks of a code descriptor that is the direct target of a far JMP or CALL.
    fn check_direct_code(&mut self, code: &Descriptor, selector: u16) -> R<()> {
        let allowed = if code.conforming() {
            code.dpl() <= self.cpl
        } else {
            rpl(selector) <= self.cpl && code.dpl() == self.cpl
        };
        if !allowed || self.long_mode() && code.attributes() & (attr::L | attr::DB) == attr::L | attr::DB {
            return self.gp(selector);
        }
        if !code.present() {
            return self.fault_with(Vector::SegmentNotPresent, selector);
        }
        Ok(())
    }

    /// JMP far.
    pub fn far_jump(&mut self, selector: u16, offset: u64) -> F {
        if !self.is_protected() {
            return self.far_jump_real(selector, offset);
        }
        if is_null(selector) {
            return self.gp0();
        }
        let mut target = self.descriptor_or(selector, Vector::GeneralProtection)?;
        if target.is_code() {
            self.check_direct_code(&target, selector)?;
            self.jump_target_ok(&target.segment, offset)?;
            self.mark_accessed(&mut target)?;
            self.set_segment(
                seg::CS,
                Segment { selector: selector & !3 | u16::from(self.cpl), ..target.segment },
            );
            self.next_ip = offset;
            return Ok(Flow::End);
        }
        match target.system_type() {
            Some(system_type::CALL_GATE | system_type::CALL_GATE16) => {
                let (gate_selector, gate_offset, mut code) = self.read_call_gate(&target, selector)?;
                let allowed = if code.conforming() { code.dpl() <= self.cpl } else { code.dpl() == self.cpl };
                if !allowed {
                    return self.gp(gate_selector);
                }
                self.jump_target_ok(&code.segment, gate_offset)?;
                self.mark_accessed(&mut code)?;
                let selector = gate_selector & !3 | u16::from(self.cpl);
                self.set_segment(seg::CS, Segment { selector, ..code.segment });
                self.next_ip = gate_offset;
                Ok(Flow::End)
            }
            Some(kind) => self.far_to_task(&target, selector, kind, TaskSwitch::Jump),
            None => self.gp(selector),
        }
    }

    fn far_jump_real(&mut self, selector: u16, offset: u64) -> F {
        if offset > u64::from(self.segments[seg::CS].limit) {
            return self.gp0();
        }
        let attributes = if self.mode == Mode::Virtual8086 { 0xfb } else { 0x9b };
        let limit = if self.mode == Mode::Real { self.segments[seg::CS].limit } else { 0xffff };
        let keep_big = self.segments[seg::CS].attributes & attr::DB;
        self.set_segment(
            seg::CS,
            Segment { attributes: attributes | keep_big, limit, ..Segment::real_mode(selector, true) },
        );
        self.next_ip = offset;
        Ok(Flow::End)
    }

    /// TSS or task gate as the target of a far JMP or CALL.
    fn far_to_task(&mut self, target: &Descriptor, selector: u16, kind: u16, how: TaskSwitch) -> F {
        let is_task = matches!(
            kind,
            system_type::TSS_AVAILABLE | system_type::TSS16_AVAILABLE | system_type::TASK_GATE
        );
        if self.long_mode() || !is_task || target.dpl() < self.cpl.max(rpl(selector)) {
            return self.gp(selector);
        }
        if !target.present() {
            return self.fault_with(Vector::SegmentNotPresent, selector);
        }
        let tss = if kind == system_type::TASK_GATE { (target.low >> 16) as u16 } else { selector };
        self.user.rip = self.next_ip;
        self.switch_task(tss, how, None)?;
        self.next_ip = self.user.rip;
        Ok(Flow::End)
    }

    /// Reads a call gate and the code descriptor it leads to; checks everything but the target's privilege.
    fn read_call_gate(&mut self, gate: &Descriptor, selector: u16) -> R<(u16, u64, Descriptor)> {
        let long = self.long_mode();
        let wide = gate.system_type() == Some(system_type::CALL_GATE);
        if long && !wide || gate.dpl() < self.cpl.max(rpl(selector)) {
            return self.gp(selector);
        }
        if !gate.present() {
            return self.fault_with(Vector::SegmentNotPresent, selector);
        }
        let target = (gate.low >> 16) as u16;
        let mut offset = gate.low & 0xffff;
        if wide {
            offset |= gate.low >> 32 & 0xffff_0000;
        }
        if long {
            let high: u64 = self.read_system(gate.address.wrapping_add(8))?;
            if high >> 40 & 0x1f != 0 {
                return self.gp(selector);
            }
            offset |= high << 32;
        }
        if is_null(target) {
            return self.gp0();
        }
        let code = self.descriptor_or(target, Vector::GeneralProtection)?;
        if !code.is_code()
            || code.dpl() > self.cpl
            || long && code.attributes() & (attr::L | attr::DB) != attr::L
        {
            return self.gp(target);
        }
        if !code.present() {
            return self.fault_with(Vector::SegmentNotPresent, target);
        }
        Ok((target, offset, code))
    }

    /// CALL far; `T` is the operand size of the pushed return address.
    pub fn far_call<T: Int>(&mut self, selector: u16, offset: u64) -> F {
        let (old_cs, back) = (self.segments[seg::CS].selector, self.next_ip);
        if !self.is_protected() {
            if offset > u64::from(self.segments[seg::CS].limit) {
                return self.gp0();
            }
            self.push_far::<T>(old_cs, back)?;
            return self.far_jump_real(selector, offset);
        }
        if is_null(selector) {
            return self.gp0();
        }
        let mut target = self.descriptor_or(selector, Vector::GeneralProtection)?;
        if target.is_code() {
            self.check_direct_code(&target, selector)?;
            self.jump_target_ok(&target.segment, offset)?;
            self.mark_accessed(&mut target)?;
            self.push_far::<T>(old_cs, back)?;
            let selector = selector & !3 | u16::from(self.cpl);
            self.set_segment(seg::CS, Segment { selector, ..target.segment });
            self.next_ip = offset;
            return Ok(Flow::End);
        }
        match target.system_type() {
            Some(system_type::CALL_GATE | system_type::CALL_GATE16) => {
                let (gate_selector, gate_offset, code) = self.read_call_gate(&target, selector)?;
                if self.long_mode() {
                    self.call_gate_long(gate_selector, gate_offset, code)
                } else if target.system_type() == Some(system_type::CALL_GATE) {
                    self.call_gate_legacy::<u32>(&target, gate_selector, gate_offset, code)
                } else {
                    self.call_gate_legacy::<u16>(&target, gate_selector, gate_offset, code)
                }
            }
            Some(kind) => self.far_to_task(&target, selector, kind, TaskSwitch::Call),
            None => self.gp(selector),
        }
    }

    fn push_far<T: Int>(&mut self, selector: u16, offset: u64) -> R<()> {
        let saved = self.user.gpr[gpr::RSP];
        let pushed =
            self.push(T::from_u64(u64::from(selector))).and_then(|()| self.push(T::from_u64(offset)));
        if pushed.is_err() {
            self.user.gpr[gpr::RSP] = saved;
        }
        pushed
    }

    fn call_gate_long(&mut self, selector: u16, offset: u64, mut code: Descriptor) -> F {
        self.jump_target_ok(&code.segment, offset)?;
        let (old_cs, back) = (self.segments[seg::CS].selector, self.next_ip);
        let inner = !code.conforming() && code.dpl() < self.cpl;
        if !inner {
            self.mark_accessed(&mut code)?;
            self.push_far::<u64>(old_cs, back)?;
            let selector = selector & !3 | u16::from(self.cpl);
            self.set_segment(seg::CS, Segment { selector, ..code.segment });
            self.next_ip = offset;
            return Ok(Flow::End);
        }
        let cpl = code.dpl();
        let slot = 4 + 8 * u64::from(cpl);
        if slot + 7 > u64::from(self.tr.limit) {
            return self.fault_with(Vector::InvalidTss, self.tr.selector);
        }
        let mut rsp: u64 = self.read_system(self.tr.base.wrapping_add(slot))?;
        if !Cpu::is_canonical(rsp) {
            return Err(self.raise(Exception::with_code(Vector::StackFault, 0)));
        }
        let frame =
            [u64::from(self.segments[seg::SS].selector), self.user.gpr[gpr::RSP], u64::from(old_cs), back];
        for value in frame {
            rsp = rsp.wrapping_sub(8);
            self.write_as(crate::tlb::Privilege::Supervisor, rsp, value)?;
        }
        self.mark_accessed(&mut code)?;
        self.segments[seg::SS] = Segment {
            selector: u16::from(cpl),
            attributes: u16::from(cpl) << attr::DPL_SHIFT,
            unusable: true,
            ..Segment::default()
        };
        self.user.gpr[gpr::RSP] = rsp;
        self.segments[seg::CS] = Segment { selector: selector & !3 | u16::from(cpl), ..code.segment };
        self.set_cpl(cpl);
        self.next_ip = offset;
        Ok(Flow::End)
    }

    fn call_gate_legacy<T: Int>(
        &mut self,
        gate: &Descriptor,
        selector: u16,
        offset: u64,
        mut code: Descriptor,
    ) -> F {
        self.jump_target_ok(&code.segment, offset)?;
        let (old_cs, back) = (self.segments[seg::CS].selector, self.next_ip);
        let inner = !code.conforming() && code.dpl() < self.cpl;
        if !inner {
            self.mark_accessed(&mut code)?;
            self.push_far::<T>(old_cs, back)?;
            let selector = selector & !3 | u16::from(self.cpl);
            self.set_segment(seg::CS, Segment { selector, ..code.segment });
            self.next_ip = offset;
            return Ok(Flow::End);
        }
        let cpl = code.dpl();
        let (ss, esp) = self.tss_stack(cpl, 0)?;
        let mut stack = self.inner_stack_segment(ss, cpl, 0)?;
        let parameters = gate.low >> 32 & 0x1f;
        let mut frame = vec![u64::from(self.segments[seg::SS].selector), self.user.gpr[gpr::RSP]];
        for index in (0..parameters).rev() {
            frame.push(self.peek::<T>(index * u64::from(T::BYTES))?.zext());
        }
        frame.extend([u64::from(old_cs), back]);
        let mask = if stack.attributes() & attr::DB != 0 { 0xffff_ffff } else { 0xffff };
        let mut sp = u64::from(esp);
        for value in frame {
            sp = sp.wrapping_sub(u64::from(T::BYTES));
            if !within(&stack.segment, sp & mask, T::BYTES) {
                return self.fault_with(Vector::StackFault, ss);
            }
            let address = stack.segment.base.wrapping_add(sp & mask) & 0xffff_ffff;
            self.write_as(crate::tlb::Privilege::Supervisor, address, T::from_u64(value))?;
        }
        self.mark_accessed(&mut stack)?;
        self.mark_accessed(&mut code)?;
        self.segments[seg::SS] = stack.segment;
        let rsp = &mut self.user.gpr[gpr::RSP];
        *rsp = if mask == 0xffff { *rsp & !0xffff | sp & 0xffff } else { sp & mask };
        self.segments[seg::CS] = Segment { selector: selector & !3 | u16::from(cpl), ..code.segment };
        self.set_cpl(cpl);
        self.next_ip = offset;
        Ok(Flow::End)
    }

    /// RET far; `extra` bytes of parameters are released.
    pub fn far_return<T: Int>(&mut self, extra: u64) -> F {
        let width = u64::from(T::BYTES);
        let target = self.peek::<T>(0)?.zext();
        let selector = self.peek::<T>(width)?.zext() as u16;
        if !self.is_protected() {
            let result = self.far_jump_real(selector, target)?;
            self.drop_stack(2 * width + extra);
            return Ok(result);
        }
        let code = self.return_code_segment(selector, target)?;
        if rpl(selector) == self.cpl {
            self.drop_stack(2 * width + extra);
            self.set_segment(seg::CS, code);
            self.next_ip = target;
            return Ok(Flow::End);
        }
        let new_sp = self.peek::<T>(2 * width + extra)?.zext();
        let new_ss = self.peek::<T>(3 * width + extra)?.zext() as u16;
        let stack = self.return_stack_segment(new_ss, rpl(selector), code.attributes & attr::L != 0)?;
        self.leave_to_outer(code, stack, new_sp.wrapping_add(extra));
        self.next_ip = target;
        Ok(Flow::End)
    }

    /// Checks the code segment that a far return or IRET goes to.
    fn return_code_segment(&mut self, selector: u16, target: u64) -> R<Segment> {
        if is_null(selector) {
            return self.gp0();
        }
        let mut code = self.descriptor_or(selector, Vector::GeneralProtection)?;
        let level = rpl(selector);
        let allowed = code.is_code()
            && level >= self.cpl
            && if code.conforming() { code.dpl() <= level } else { code.dpl() == level };
        if !allowed || self.long_mode() && code.attributes() & (attr::L | attr::DB) == attr::L | attr::DB {
            return self.gp(selector);
        }
        if !code.present() {
            return self.fault_with(Vector::SegmentNotPresent, selector);
        }
        self.jump_target_ok(&code.segment, target)?;
        self.mark_accessed(&mut code)?;
        Ok(Segment { selector, ..code.segment })
    }

    /// Checks the stack segment that a return to an outer privilege (or any IRET in 64-bit mode) loads.
    fn return_stack_segment(&mut self, selector: u16, cpl: u8, to_64bit: bool) -> R<Segment> {
        if is_null(selector) {
            if to_64bit && cpl != 3 && rpl(selector) == cpl {
                return Ok(Segment {
                    selector,
                    attributes: u16::from(cpl) << attr::DPL_SHIFT,
                    unusable: true,
                    ..Segment::default()
                });
            }
            return self.gp0();
        }
        let mut stack = self.descriptor_or(selector, Vector::GeneralProtection)?;
        if rpl(selector) != cpl || !stack.is_data() || !stack.readable_or_writable() || stack.dpl() != cpl {
            return self.gp(selector);
        }
        if !stack.present() {
            return self.fault_with(Vector::StackFault, selector);
        }
        self.mark_accessed(&mut stack)?;
        Ok(stack.segment)
    }

    fn leave_to_outer(&mut self, code: Segment, stack: Segment, sp: u64) {
        let cpl = rpl(code.selector);
        self.segments[seg::CS] = code;
        self.segments[seg::SS] = stack;
        self.cpl = cpl;
        self.update_mode();
        self.set_stack_pointer(sp);
        self.drop_inner_segments();
    }

    /// IRET, IRETD, IRETQ.
    pub fn interrupt_return<T: Int>(&mut self) -> F {
        let result = match self.mode {
            Mode::Real => self.iret_real::<T>(),
            Mode::Virtual8086 => self.iret_v86::<T>(),
            _ => self.iret_protected::<T>(),
        };
        if result.is_ok() {
            self.nmi_masked = false;
            self.note_attention();
        }
        result
    }

    fn iret_real<T: Int>(&mut self) -> F {
        let width = u64::from(T::BYTES);
        let target = self.peek::<T>(0)?.zext();
        let selector = self.peek::<T>(width)?.zext() as u16;
        let flags = self.peek::<T>(2 * width)?.zext();
        self.far_jump_real(selector, target)?;
        self.drop_stack(3 * width);
        self.load_flags::<T>(flags, 0);
        Ok(Flow::End)
    }

    fn iret_v86<T: Int>(&mut self) -> F {
        let width = u64::from(T::BYTES);
        let vme = self.control.cr4 & cr4::VME != 0;
        if self.iopl() < 3 && !(vme && T::BYTES == 2) {
            return self.gp0();
        }
        let target = self.peek::<T>(0)?.zext();
        let selector = self.peek::<T>(width)?.zext() as u16;
        let flags = self.peek::<T>(2 * width)?.zext();
        if self.iopl() < 3 {
            let pending = self.system_flags & rflags::VIP != 0;
            if flags & rflags::TF != 0 || flags & rflags::IF != 0 && pending {
                return self.gp0();
            }
            self.far_jump_real(selector, target)?;
            self.drop_stack(3 * width);
            let keep = rflags::IF | rflags::IOPL | !0xffff;
            let old = self.rflags();
            let vif = if flags & rflags::IF != 0 { rflags::VIF } else { 0 };
            self.set_rflags(old & keep & !rflags::VIF | flags & !keep & 0xffff | vif);
            return Ok(Flow::End);
        }
        self.far_jump_real(selector, target)?;
        self.drop_stack(3 * width);
        let keep = rflags::IOPL | rflags::VM | rflags::VIF | rflags::VIP;
        self.merge_flags::<T>(flags, keep);
        Ok(Flow::End)
    }

    fn iret_protected<T: Int>(&mut self) -> F {
        let width = u64::from(T::BYTES);
        if self.system_flags & rflags::NT != 0 {
            if self.long_mode() {
                return self.gp0();
            }
            return self.return_from_task();
        }
        let target = self.peek::<T>(0)?.zext();
        let selector = self.peek::<T>(width)?.zext() as u16;
        let flags = self.peek::<T>(2 * width)?.zext();
        if !self.long_mode() && flags & rflags::VM != 0 && self.cpl == 0 && T::BYTES == 4 {
            return self.iret_to_v86(selector, target, flags);
        }
        let code = self.return_code_segment(selector, target)?;
        let old_cpl = self.cpl;
        if rpl(selector) == self.cpl && !self.is_64bit() {
            self.drop_stack(3 * width);
            self.set_segment(seg::CS, code);
        } else {
            let new_sp = self.peek::<T>(3 * width)?.zext();
            let new_ss = self.peek::<T>(4 * width)?.zext() as u16;
            let stack = self.return_stack_segment(new_ss, rpl(selector), code.attributes & attr::L != 0)?;
            if rpl(selector) == self.cpl {
                self.segments[seg::CS] = code;
                self.segments[seg::SS] = stack;
                self.update_mode();
                self.set_stack_pointer(new_sp);
            } else {
                self.leave_to_outer(code, stack, new_sp);
            }
        }
        self.next_ip = target;
        self.load_flags::<T>(flags, old_cpl);
        Ok(Flow::End)
    }

    fn iret_to_v86(&mut self, selector: u16, target: u64, flags: u64) -> F {
        let mut selectors = [0u16; 5];
        let esp = self.peek::<u32>(12)?;
        for (index, value) in selectors.iter_mut().enumerate() {
            *value = self.peek::<u32>(16 + 4 * index as u64)? as u16;
        }
        if target > 0xffff {
            return self.gp0();
        }
        self.set_rflags(flags | rflags::RESERVED_ONE);
        for (index, value) in [
            (seg::SS, selectors[0]),
            (seg::ES, selectors[1]),
            (seg::DS, selectors[2]),
            (seg::FS, selectors[3]),
            (seg::GS, selectors[4]),
        ] {
            self.segments[index] = Segment { attributes: 0xf3, ..Segment::real_mode(value, false) };
        }
        self.segments[seg::CS] = Segment { attributes: 0xfb, ..Segment::real_mode(selector, true) };
        self.update_mode();
        self.user.gpr[gpr::RSP] = u64::from(esp);
        self.next_ip = target;
        Ok(Flow::End)
    }

    /// Loads the flags that IRET and POPF may change at `cpl`.
    pub fn load_flags<T: Int>(&mut self, flags: u64, cpl: u8) {
        let mut keep = rflags::VIF | rflags::VIP | rflags::VM;
        if cpl > 0 {
            keep |= rflags::IOPL;
        } else {
            keep &= !(rflags::VIF | rflags::VIP);
        }
        if self.is_protected() && cpl > self.iopl() {
            keep |= rflags::IF;
        }
        self.merge_flags::<T>(flags, keep);
    }

    /// Sets RFLAGS but for the bits in `keep` and those beyond the operand size.
    pub fn merge_flags<T: Int>(&mut self, flags: u64, keep: u64) {
        let keep = keep | if T::BYTES == 2 { !0xffff } else { 0 };
        let old = self.rflags();
        self.set_rflags(old & keep | flags & !keep);
        if (old ^ self.system_flags) & rflags::IF != 0 {
            self.note_attention();
        }
    }

    // ---- fast system calls ----------------------------------------------------------------------------------------

    /// SYSCALL (SDM 2, APM 3).
    pub fn syscall(&mut self) -> F {
        if self.control.efer & efer::SCE == 0 || self.control.cr0 & cr0::PE == 0 {
            return self.ud();
        }
        let star = self.msrs.star;
        let selector = (star >> 32) as u16 & 0xfffc;
        if self.long_mode() {
            let flags = self.rflags();
            self.user.gpr[gpr::RCX] = self.next_ip;
            self.user.gpr[gpr::R11] = flags & !rflags::RF;
            self.next_ip = if self.is_64bit() { self.msrs.lstar } else { self.msrs.cstar };
            self.set_rflags(flags & !(self.msrs.sfmask | rflags::RF));
        } else {
            if !self.is_protected() {
                return self.ud();
            }
            self.user.gpr[gpr::RCX] = self.next_ip & 0xffff_ffff;
            self.next_ip = star & 0xffff_ffff;
            self.set_rflags(self.rflags() & !(rflags::VM | rflags::IF | rflags::RF));
        }
        let long = self.long_mode();
        self.segments[seg::CS] = flat_code(selector, 0, long);
        self.segments[seg::SS] = flat_data(selector.wrapping_add(8), 0);
        self.set_cpl(0);
        Ok(Flow::End)
    }

    /// SYSRET; `to_64bit` with REX.W.
    pub fn sysret(&mut self, to_64bit: bool) -> F {
        if self.control.efer & efer::SCE == 0 || self.control.cr0 & cr0::PE == 0 {
            return self.ud();
        }
        if self.cpl != 0 {
            return self.gp0();
        }
        let base = (self.msrs.star >> 48) as u16;
        let target = self.user.gpr[gpr::RCX];
        if self.long_mode() {
            if to_64bit && !Cpu::is_canonical(target) {
                return self.gp0();
            }
            let flags = self.user.gpr[gpr::R11];
            let keep = rflags::VM | rflags::RF | !0x3f_7fd7;
            let flags = flags & !keep;
            self.set_rflags(flags | rflags::RESERVED_ONE);
        } else {
            self.set_rflags(self.rflags() | rflags::IF);
        }
        let (selector, target) =
            if to_64bit { (base.wrapping_add(16), target) } else { (base, target & 0xffff_ffff) };
        self.segments[seg::CS] = flat_code(selector | 3, 3, to_64bit);
        self.segments[seg::SS] = flat_data(base.wrapping_add(8) | 3, 3);
        self.set_cpl(3);
        self.note_attention();
        self.next_ip = target;
        Ok(Flow::End)
    }

    /// AMD's processors do not have SYSENTER and SYSEXIT in long mode (APM 3 "SYSENTER").
    fn has_sysenter(&self) -> bool {
        const AUTHENTIC_AMD: u32 = u32::from_le_bytes(*b"Auth");
        !self.long_mode() || self.cpuid.lookup(0, 0).ebx != AUTHENTIC_AMD
    }

    /// SYSENTER.
    pub fn sysenter(&mut self) -> F {
        if !self.has_sysenter() {
            return self.ud();
        }
        if self.control.cr0 & cr0::PE == 0 || self.msrs.sysenter_cs & 0xfffc == 0 {
            return self.gp0();
        }
        let selector = self.msrs.sysenter_cs as u16 & 0xfffc;
        let long = self.long_mode();
        self.set_rflags(self.rflags() & !(rflags::VM | rflags::IF | rflags::RF));
        self.segments[seg::CS] = flat_code(selector, 0, long);
        self.segments[seg::SS] = flat_data(selector.wrapping_add(8), 0);
        self.set_cpl(0);
        let mask = if long { u64::MAX } else { 0xffff_ffff };
        self.user.gpr[gpr::RSP] = self.msrs.sysenter_esp & mask;
        self.next_ip = self.msrs.sysenter_eip & mask;
        Ok(Flow::End)
    }

    /// SYSEXIT; `to_64bit` with REX.W.
    pub fn sysexit(&mut self, to_64bit: bool) -> F {
        if self.cpl != 0 {
            return self.gp0();
        }
        if !self.has_sysenter() {
            return self.ud();
        }
        if self.control.cr0 & cr0::PE == 0 || self.msrs.sysenter_cs & 0xfffc == 0 {
            return self.gp0();
        }
        let (rip, rsp) = (self.user.gpr[gpr::RDX], self.user.gpr[gpr::RCX]);
        if to_64bit && !(Cpu::is_canonical(rip) && Cpu::is_canonical(rsp)) {
            return self.gp0();
        }
        let selector = self.msrs.sysenter_cs as u16 & 0xfffc;
        let (code, mask) = if to_64bit {
            (selector.wrapping_add(32), u64::MAX)
        } else {
            (selector.wrapping_add(16), 0xffff_ffff)
        };
        self.segments[seg::CS] = flat_code(code | 3, 3, to_64bit);
        self.segments[seg::SS] = flat_data(code.wrapping_add(8) | 3, 3);
        self.set_cpl(3);
        self.user.gpr[gpr::RSP] = rsp & mask;
        self.next_ip = rip & mask;
        Ok(Flow::End)
    }
}

// ---- handlers -----------------------------------------------------------------------------------------------------

/// JMP ptr16:16/32. `imm` holds offset in the low and selector in the high half.
pub fn jmp_far_direct(cpu: &mut Cpu, op: &Op) -> F {
    cpu.far_jump((op.imm >> 32) as u16, op.imm & 0xffff_ffff)
}

fn far_pointer<T: Int>(cpu: &mut Cpu, op: &Op) -> R<(u16, u64)> {
    let address = cpu.address(op, T::BYTES + 2, Access::Read)?;
    let offset = cpu.read::<T>(address)?.zext();
    let selector_address = cpu.wrap_linear(address.wrapping_add(u64::from(T::BYTES)));
    let selector = cpu.read::<u16>(selector_address)?;
    Ok((selector, offset))
}

/// JMP m16:16/32/64.
pub fn jmp_far<T: Int>(cpu: &mut Cpu, op: &Op) -> F {
    let (selector, offset) = far_pointer::<T>(cpu, op)?;
    cpu.far_jump(selector, offset)
}

/// CALL ptr16:16/32.
pub fn call_far_direct<T: Int>(cpu: &mut Cpu, op: &Op) -> F {
    cpu.far_call::<T>((op.imm >> 32) as u16, op.imm & 0xffff_ffff)
}

/// CALL m16:16/32/64.
pub fn call_far<T: Int>(cpu: &mut Cpu, op: &Op) -> F {
    let (selector, offset) = far_pointer::<T>(cpu, op)?;
    cpu.far_call::<T>(selector, offset)
}

/// RETF.
pub fn ret_far<T: Int>(cpu: &mut Cpu, op: &Op) -> F {
    cpu.far_return::<T>(op.imm)
}

/// IRET.
pub fn iret<T: Int>(cpu: &mut Cpu, _: &Op) -> F {
    cpu.interrupt_return::<T>()
}

/// SYSCALL.
pub fn syscall(cpu: &mut Cpu, _: &Op) -> F {
    cpu.syscall()
}

/// SYSRET.
pub fn sysret(cpu: &mut Cpu, op: &Op) -> F {
    cpu.sysret(op.aux != 0)
}

/// SYSENTER.
pub fn sysenter(cpu: &mut Cpu, _: &Op) -> F {
    cpu.sysenter()
}

/// SYSEXIT.
pub fn sysexit(cpu: &mut Cpu, op: &Op) -> F {
    cpu.sysexit(op.aux != 0)
}

/// LDS, LES, LSS, LFS, LGS: `aux` is the segment register.
pub fn load_far_pointer<T: Int>(cpu: &mut Cpu, op: &Op) -> F {
    let (selector, offset) = far_pointer::<T>(cpu, op)?;
    cpu.load_segment(usize::from(op.aux), selector)?;
    cpu.set_reg(op.reg, T::from_u64(offset));
    Ok(Flow::End)
}
