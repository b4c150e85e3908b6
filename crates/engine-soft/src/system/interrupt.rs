//! Delivery of interrupts and exceptions through the IDT (SDM 3A chapter 6, SDM 2 "INT n").

use x86::bits::{cr0, cr4, rflags};
use x86::regs::attr;
use x86::{Exception, Segment, Vector};

use crate::cpu::{Cpu, Mode, R, gpr, seg};
use crate::interp::alu::Int;
use crate::system::segmentation::{Descriptor, is_null, rpl, system_type};

/// Where an event comes from; decides about privilege checks, the EXT bit and what is pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// An external interrupt or NMI.
    External,
    /// A processor exception.
    Exception,
    /// INT n, INT3, INTO.
    Software,
    /// INT1, which skips the DPL check.
    SoftwarePrivileged,
}

/// The vCPU cannot go on until it is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TripleFault;

/// A gate of the IDT.
struct Gate {
    selector: u16,
    offset: u64,
    kind: u16,
    ist: u8,
}

impl Cpu {
    /// Delivers an exception that an instruction raised; further faults on the way become double and triple faults
    /// (SDM 3A §6.15, table 6-5).
    pub fn deliver_exception(&mut self, exception: Exception) -> Result<(), TripleFault> {
        let mut current = exception;
        loop {
            self.counters.exceptions += 1;
            self.note_exception(&current);
            let code = current.vector.has_error_code().then_some(current.error_code);
            if self.deliver(current.vector as u8, Source::Exception, code).is_ok() {
                return Ok(());
            }
            let next = self.fault;
            let first_contributory = current.vector.is_contributory();
            let first_page = current.vector == Vector::PageFault;
            let next_contributory = next.vector.is_contributory();
            let next_page = next.vector == Vector::PageFault;
            current = if current.vector == Vector::DoubleFault {
                if next_contributory || next_page {
                    return Err(TripleFault);
                }
                next
            } else if first_contributory && next_contributory
                || first_page && (next_contributory || next_page)
            {
                Exception::with_code(Vector::DoubleFault, 0)
            } else {
                next
            };
        }
    }

    /// Registers that an exception sets before it is delivered.
    fn note_exception(&mut self, exception: &Exception) {
        match exception.vector {
            Vector::PageFault => self.control.cr2 = exception.payload,
            Vector::Debug => {
                self.debug.dr6 = self.debug.dr6 & !0xf | exception.payload;
                self.debug.dr7 &= !x86::bits::dr7::GD;
            }
            _ => {}
        }
    }

    /// Delivers an external interrupt or NMI; a fault on the way is delivered in its place.
    pub fn deliver_interrupt(&mut self, vector: u8) -> Result<(), TripleFault> {
        match self.deliver(vector, Source::External, None) {
            Ok(()) => Ok(()),
            Err(_) => {
                let fault = self.fault;
                self.deliver_exception(fault)
            }
        }
    }

    /// Delivers one event. [`Cpu::user`]'s `rip` is the address to return to. On an error nothing has changed.
    pub fn deliver(&mut self, vector: u8, source: Source, error_code: Option<u32>) -> R<()> {
        let result = match self.mode {
            Mode::Real => self.deliver_real(vector),
            _ => self.deliver_protected(vector, source, error_code),
        };
        self.blocks_context_changed();
        result
    }

    /// Through the interrupt vector table (SDM 3A §20.1.4).
    fn deliver_real(&mut self, vector: u8) -> R<()> {
        let entry = u64::from(vector) * 4;
        if entry + 3 > u64::from(self.idt.limit) {
            return Err(self.raise(Exception::plain(Vector::DoubleFault)));
        }
        let target: u32 = self.read_system(self.idt.base + entry)?;
        let saved = self.user.gpr[gpr::RSP];
        let flags = self.rflags() as u16;
        let pushed = self
            .push(flags)
            .and_then(|()| self.push(self.segments[seg::CS].selector))
            .and_then(|()| self.push(self.user.rip as u16));
        if let Err(raised) = pushed {
            self.user.gpr[gpr::RSP] = saved;
            return Err(raised);
        }
        self.set_rflags(self.rflags() & !(rflags::IF | rflags::TF | rflags::AC | rflags::RF));
        let mut code = self.segments[seg::CS];
        code.selector = (target >> 16) as u16;
        code.base = u64::from(code.selector) << 4;
        self.set_segment(seg::CS, code);
        self.user.rip = u64::from(target & 0xffff);
        Ok(())
    }

    /// Error code for a bad IDT entry: index, IDT bit, EXT.
    fn idt_error(&mut self, vector: Vector, entry: u8, source: Source) -> crate::cpu::Raised {
        let external = u32::from(!matches!(source, Source::Software | Source::SoftwarePrivileged));
        self.raise(Exception::with_code(vector, u32::from(entry) << 3 | 2 | external))
    }

    fn read_gate(&mut self, vector: u8, source: Source) -> R<Gate> {
        let long = self.long_mode();
        let size = if long { 16 } else { 8 };
        let offset = u64::from(vector) * size;
        if offset + size - 1 > u64::from(self.idt.limit) {
            return Err(self.idt_error(Vector::GeneralProtection, vector, source));
        }
        let address = self.idt.base.wrapping_add(offset);
        let low: u64 = self.read_system(address)?;
        let attributes = (low >> 40) as u16;
        let kind = attributes & 0x1f;
        let known = match kind {
            system_type::INTERRUPT_GATE | system_type::TRAP_GATE => true,
            system_type::INTERRUPT_GATE16 | system_type::TRAP_GATE16 | system_type::TASK_GATE => !long,
            _ => false,
        };
        if !known {
            return Err(self.idt_error(Vector::GeneralProtection, vector, source));
        }
        let dpl = (attributes >> attr::DPL_SHIFT & 3) as u8;
        if source == Source::Software && dpl < self.cpl {
            return Err(self.idt_error(Vector::GeneralProtection, vector, source));
        }
        if attributes & attr::P == 0 {
            return Err(self.idt_error(Vector::SegmentNotPresent, vector, source));
        }
        let mut target = low & 0xffff | (low >> 32) & 0xffff_0000;
        if long {
            let high: u64 = self.read_system(address.wrapping_add(8))?;
            target |= high << 32;
        } else if kind & 8 == 0 {
            target &= 0xffff;
        }
        Ok(Gate { selector: (low >> 16) as u16, offset: target, kind, ist: (low >> 32 & 7) as u8 })
    }

    fn deliver_protected(&mut self, vector: u8, source: Source, error_code: Option<u32>) -> R<()> {
        let external = u16::from(!matches!(source, Source::Software | Source::SoftwarePrivileged));
        if self.mode == Mode::Virtual8086 && source == Source::Software && vector != 3 && vector != 4 {
            if self.control.cr4 & cr4::VME != 0 && self.redirects_in_v86(vector)? {
                return self.deliver_v86_redirected(vector);
            }
            if self.iopl() < 3 {
                return self.gp0();
            }
        }
        let gate = self.read_gate(vector, source)?;
        if gate.kind == system_type::TASK_GATE {
            return self.task_gate(gate.selector, error_code, external);
        }
        if is_null(gate.selector) {
            return Err(self.raise(Exception::gp(u32::from(external))));
        }
        let code_error = u32::from(gate.selector & 0xfffc | external);
        let Some(mut code) = self.descriptor(gate.selector)? else {
            return Err(self.raise(Exception::gp(code_error)));
        };
        if !code.is_code() || code.dpl() > self.cpl {
            return Err(self.raise(Exception::gp(code_error)));
        }
        if !code.present() {
            return Err(self.raise(Exception::with_code(Vector::SegmentNotPresent, code_error)));
        }
        let long = self.long_mode();
        if long && code.attributes() & (attr::L | attr::DB) != attr::L {
            return Err(self.raise(Exception::gp(code_error)));
        }
        let inner = !code.conforming() && code.dpl() < self.cpl;
        if self.mode == Mode::Virtual8086 && (!inner || code.dpl() != 0) {
            return Err(self.raise(Exception::gp(code_error)));
        }
        let cpl = if inner { code.dpl() } else { self.cpl };
        let keep_if = matches!(gate.kind, system_type::TRAP_GATE | system_type::TRAP_GATE16);
        if long {
            self.enter_long(&mut code, &gate, cpl, inner, error_code)?;
        } else if gate.kind & 8 != 0 {
            self.enter_legacy::<u32>(&mut code, &gate, cpl, inner, error_code, external)?;
        } else {
            self.enter_legacy::<u16>(&mut code, &gate, cpl, inner, error_code, external)?;
        }
        let mut clear = rflags::TF | rflags::NT | rflags::RF | rflags::VM;
        if !keep_if {
            clear |= rflags::IF;
        }
        self.set_rflags(self.rflags() & !clear);
        Ok(())
    }

    fn enter_long(
        &mut self,
        code: &mut Descriptor,
        gate: &Gate,
        cpl: u8,
        inner: bool,
        error_code: Option<u32>,
    ) -> R<()> {
        if !Cpu::is_canonical(gate.offset) {
            return self.gp0();
        }
        let mut rsp = if gate.ist != 0 {
            self.tss64_stack(0x24 + 8 * (u64::from(gate.ist) - 1))?
        } else if inner {
            self.tss64_stack(4 + 8 * u64::from(cpl))?
        } else {
            self.user.gpr[gpr::RSP]
        };
        if !Cpu::is_canonical(rsp) {
            return Err(self.raise(Exception::with_code(Vector::StackFault, 0)));
        }
        rsp &= !0xf;
        let frame = [
            error_code.map(u64::from),
            Some(self.user.rip),
            Some(u64::from(self.segments[seg::CS].selector)),
            Some(self.rflags()),
            Some(self.user.gpr[gpr::RSP]),
            Some(u64::from(self.segments[seg::SS].selector)),
        ];
        let privilege = self.privilege_at(cpl);
        for value in frame.iter().rev().flatten() {
            rsp = rsp.wrapping_sub(8);
            self.write_as(privilege, rsp, *value)?;
        }
        self.mark_accessed(code)?;
        if inner {
            self.segments[seg::SS] = Segment {
                selector: u16::from(cpl),
                attributes: u16::from(cpl) << attr::DPL_SHIFT,
                unusable: true,
                ..Segment::default()
            };
        }
        self.user.gpr[gpr::RSP] = rsp;
        self.segments[seg::CS] = Segment { selector: gate.selector & !3 | u16::from(cpl), ..code.segment };
        self.set_cpl(cpl);
        self.user.rip = gate.offset;
        Ok(())
    }

    /// Rights with which a handler at `cpl` will use its stack; RFLAGS.AC does not count for the processor's own pushes.
    fn privilege_at(&self, cpl: u8) -> crate::tlb::Privilege {
        if cpl == 3 { crate::tlb::Privilege::User } else { crate::tlb::Privilege::Supervisor }
    }

    fn tss64_stack(&mut self, offset: u64) -> R<u64> {
        if offset + 7 > u64::from(self.tr.limit) {
            return self.fault_with(Vector::InvalidTss, self.tr.selector);
        }
        self.read_system(self.tr.base.wrapping_add(offset))
    }

    /// SS:ESP for an inner privilege from a 32- or 16-bit TSS.
    pub fn tss_stack(&mut self, cpl: u8, external: u16) -> R<(u16, u32)> {
        let tss32 = self.tr.attributes & 8 != 0;
        let (offset, size) = if tss32 { (4 + 8 * u32::from(cpl), 8) } else { (2 + 4 * u32::from(cpl), 4) };
        if offset + size - 1 > self.tr.limit {
            let code = u32::from(self.tr.selector & 0xfffc | external);
            return Err(self.raise(Exception::with_code(Vector::InvalidTss, code)));
        }
        let address = self.tr.base.wrapping_add(u64::from(offset));
        if tss32 {
            let esp: u32 = self.read_system(address)?;
            let ss: u16 = self.read_system(address.wrapping_add(4))?;
            Ok((ss, esp))
        } else {
            let sp: u16 = self.read_system(address)?;
            let ss: u16 = self.read_system(address.wrapping_add(2))?;
            Ok((ss, u32::from(sp)))
        }
    }

    /// Checks and reads the stack segment for a more privileged level; faults are #TS.
    pub fn inner_stack_segment(&mut self, selector: u16, cpl: u8, external: u16) -> R<Descriptor> {
        let code = u32::from(selector & 0xfffc | external);
        if is_null(selector) {
            return Err(self.raise(Exception::with_code(Vector::InvalidTss, u32::from(external))));
        }
        let Some(stack) = self.descriptor(selector)? else {
            return Err(self.raise(Exception::with_code(Vector::InvalidTss, code)));
        };
        if rpl(selector) != cpl || stack.dpl() != cpl || !stack.is_data() || !stack.readable_or_writable() {
            return Err(self.raise(Exception::with_code(Vector::InvalidTss, code)));
        }
        if !stack.present() {
            return Err(self.raise(Exception::with_code(Vector::StackFault, code)));
        }
        Ok(stack)
    }

    fn enter_legacy<T: Int>(
        &mut self,
        code: &mut Descriptor,
        gate: &Gate,
        cpl: u8,
        inner: bool,
        error_code: Option<u32>,
        external: u16,
    ) -> R<()> {
        if gate.offset > u64::from(code.segment.limit) {
            return Err(self.raise(Exception::gp(u32::from(external))));
        }
        let from_v86 = self.mode == Mode::Virtual8086;
        let width = u64::from(T::BYTES);
        let old_segments = self.segments;
        let old_rsp = self.user.gpr[gpr::RSP];
        let flags = self.rflags();
        let mut frame: Vec<u64> = Vec::with_capacity(10);
        if from_v86 {
            for index in [seg::GS, seg::FS, seg::DS, seg::ES] {
                frame.push(u64::from(old_segments[index].selector));
            }
        }
        if inner {
            frame.push(u64::from(old_segments[seg::SS].selector));
            frame.push(old_rsp);
        }
        frame.push(flags);
        frame.push(u64::from(old_segments[seg::CS].selector));
        frame.push(self.user.rip);
        frame.extend(error_code.map(u64::from));
        let (stack, mut sp) = if inner {
            let (ss, esp) = self.tss_stack(cpl, external)?;
            let mut descriptor = self.inner_stack_segment(ss, cpl, external)?;
            self.mark_accessed(&mut descriptor)?;
            (descriptor.segment, u64::from(esp))
        } else {
            (self.segments[seg::SS], old_rsp)
        };
        let mask = if stack.attributes & attr::DB != 0 { 0xffff_ffff } else { 0xffff };
        let stack_error =
            if inner { u32::from(stack.selector & 0xfffc | external) } else { u32::from(external) };
        let privilege = self.privilege_at(cpl);
        for value in &frame {
            sp = sp.wrapping_sub(width);
            let offset = sp & mask;
            if !within(&stack, offset, T::BYTES) {
                return Err(self.raise(Exception::with_code(Vector::StackFault, stack_error)));
            }
            let address = stack.base.wrapping_add(offset) & 0xffff_ffff;
            self.write_as(privilege, address, T::from_u64(*value))?;
        }
        self.mark_accessed(code)?;
        if from_v86 {
            for index in [seg::GS, seg::FS, seg::DS, seg::ES] {
                self.segments[index] = Segment { unusable: true, ..Segment::default() };
            }
            self.system_flags &= !rflags::VM;
        }
        if inner {
            self.segments[seg::SS] = stack;
        }
        let rsp = &mut self.user.gpr[gpr::RSP];
        *rsp = if mask == 0xffff { *rsp & !0xffff | sp & 0xffff } else { sp & mask };
        self.segments[seg::CS] = Segment { selector: gate.selector & !3 | u16::from(cpl), ..code.segment };
        self.set_cpl(cpl);
        self.user.rip = gate.offset;
        Ok(())
    }

    /// Whether the TSS's software-interrupt redirection bitmap sends INT n of virtual-8086 code to its own vector table
    /// (SDM 3A §20.3.3).
    fn redirects_in_v86(&mut self, vector: u8) -> R<bool> {
        let map_base: u16 = self.read_system(self.tr.base.wrapping_add(0x66))?;
        let offset = u64::from(map_base).wrapping_sub(32) + u64::from(vector / 8);
        if map_base < 32 || offset > u64::from(self.tr.limit) {
            return self.gp0();
        }
        let byte: u8 = self.read_system(self.tr.base.wrapping_add(offset))?;
        Ok(byte >> (vector & 7) & 1 == 0)
    }

    fn deliver_v86_redirected(&mut self, vector: u8) -> R<()> {
        let mut flags = self.rflags();
        if self.iopl() < 3 {
            let vif = flags & rflags::VIF != 0;
            flags = flags & !rflags::IF | rflags::IOPL | if vif { rflags::IF } else { 0 };
        }
        let target: u32 = self.read_as(crate::tlb::Privilege::User, u64::from(vector) * 4)?;
        let saved = self.user.gpr[gpr::RSP];
        let pushed = self
            .push(flags as u16)
            .and_then(|()| self.push(self.segments[seg::CS].selector))
            .and_then(|()| self.push(self.user.rip as u16));
        if let Err(raised) = pushed {
            self.user.gpr[gpr::RSP] = saved;
            return Err(raised);
        }
        let interrupt = if self.iopl() < 3 { rflags::VIF } else { rflags::IF };
        self.set_rflags(self.rflags() & !(interrupt | rflags::TF | rflags::NT));
        let code = Segment { attributes: 0xfb, ..Segment::real_mode((target >> 16) as u16, true) };
        self.set_segment(seg::CS, code);
        self.user.rip = u64::from(target & 0xffff);
        Ok(())
    }

    /// INT n, INT3, INTO, INT1 as instructions: the return address is the next instruction.
    pub fn software_interrupt(&mut self, vector: u8, source: Source) -> R<()> {
        let start = self.user.rip;
        self.user.rip = self.next_ip;
        match self.deliver(vector, source, None) {
            Ok(()) => {
                self.next_ip = self.user.rip;
                Ok(())
            }
            Err(raised) => {
                self.user.rip = start;
                Err(raised)
            }
        }
    }

    /// FERR# is reported through IRQ 13 instead of #MF when CR0.NE is clear.
    pub fn x87_error<T>(&mut self) -> R<T> {
        if self.control.cr0 & cr0::NE == 0 {
            self.shared.chips.set_irq_line(13, true);
            self.shared.chips.set_irq_line(13, false);
        }
        Err(self.raise(Exception::plain(Vector::X87)))
    }

    /// After anything that can change how code at the same address is fetched.
    pub fn blocks_context_changed(&mut self) {
        self.stop_block = true;
    }
}

/// Whether an access lies inside a stack segment.
pub fn within(segment: &Segment, offset: u64, len: u32) -> bool {
    let last = offset + u64::from(len - 1);
    if segment.attributes & attr::DOWN_OR_CONFORMING != 0 {
        let top = if segment.attributes & attr::DB != 0 { 0xffff_ffff } else { 0xffff };
        offset > u64::from(segment.limit) && last <= top
    } else {
        last <= u64::from(segment.limit)
    }
}

impl Cpu {
    /// Checks that an instruction fetch lies inside CS.
    pub fn check_fetch(&mut self, ip: u64) -> R<()> {
        if self.is_64bit() || ip <= u64::from(self.segments[seg::CS].limit) {
            return Ok(());
        }
        self.gp0()
    }
}
