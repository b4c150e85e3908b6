//! Segment registers and descriptors (SDM 3A chapters 3 and 5).

use x86::regs::attr;
use x86::{DescriptorTable, Exception, Segment, Vector};

use crate::cpu::{Cpu, Mode, R, seg};
use crate::mmu::Access;
use crate::tlb::Privilege;

/// Types of system descriptors (SDM 3A table 3-2).
pub mod system_type {
    #![allow(missing_docs)]
    pub const TSS16_AVAILABLE: u16 = 1;
    pub const LDT: u16 = 2;
    pub const TSS16_BUSY: u16 = 3;
    pub const CALL_GATE16: u16 = 4;
    pub const TASK_GATE: u16 = 5;
    pub const INTERRUPT_GATE16: u16 = 6;
    pub const TRAP_GATE16: u16 = 7;
    pub const TSS_AVAILABLE: u16 = 9;
    pub const TSS_BUSY: u16 = 11;
    pub const CALL_GATE: u16 = 12;
    pub const INTERRUPT_GATE: u16 = 14;
    pub const TRAP_GATE: u16 = 15;
}

/// A descriptor as found in a table.
#[derive(Clone, Copy)]
pub struct Descriptor {
    /// Its first eight bytes.
    pub low: u64,
    /// Linear address of those bytes.
    pub address: u64,
    /// The segment it describes.
    pub segment: Segment,
}

impl Descriptor {
    /// Access rights.
    pub fn attributes(&self) -> u16 {
        self.segment.attributes
    }

    /// Present.
    pub fn present(&self) -> bool {
        self.attributes() & attr::P != 0
    }

    /// Privilege level.
    pub fn dpl(&self) -> u8 {
        self.segment.dpl()
    }

    /// Code segment.
    pub fn is_code(&self) -> bool {
        self.attributes() & (attr::S | attr::CODE) == attr::S | attr::CODE
    }

    /// Data segment.
    pub fn is_data(&self) -> bool {
        self.attributes() & (attr::S | attr::CODE) == attr::S
    }

    /// Conforming code, or expand-down data.
    pub fn conforming(&self) -> bool {
        self.attributes() & attr::DOWN_OR_CONFORMING != 0
    }

    /// Readable code, or writable data.
    pub fn readable_or_writable(&self) -> bool {
        self.attributes() & attr::WRITABLE_OR_READABLE != 0
    }

    /// Type, if this is a system descriptor.
    pub fn system_type(&self) -> Option<u16> {
        (self.attributes() & attr::S == 0).then_some(self.attributes() & attr::TYPE)
    }
}

/// Whether a selector is null.
pub fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

/// Requested privilege level.
pub fn rpl(selector: u16) -> u8 {
    (selector & 3) as u8
}

impl Cpu {
    /// Limit and type checks of an access in a legacy mode (SDM 3A §5.3, §5.5).
    pub fn check_segment(&mut self, index: u8, offset: u64, len: u32, access: Access) -> R<()> {
        let segment = self.segments[usize::from(index)];
        let vector =
            if usize::from(index) == seg::SS { Vector::StackFault } else { Vector::GeneralProtection };
        let last = offset + u64::from(len - 1);
        let attributes = segment.attributes;
        let code = attributes & attr::CODE != 0;
        let down = !code && attributes & attr::DOWN_OR_CONFORMING != 0;
        let mut allowed = !segment.unusable || !self.is_protected();
        if self.is_protected() {
            allowed &= match access {
                Access::Write => !code && attributes & attr::WRITABLE_OR_READABLE != 0,
                Access::Read => !code || attributes & attr::WRITABLE_OR_READABLE != 0,
                Access::Execute => true,
            };
        }
        allowed &= if down {
            let top = if attributes & attr::DB != 0 { 0xffff_ffff } else { 0xffff };
            offset > u64::from(segment.limit) && last <= top
        } else {
            last <= u64::from(segment.limit)
        };
        if allowed { Ok(()) } else { Err(self.raise(Exception::with_code(vector, 0))) }
    }

    /// Loads from a system structure: supervisor rights whatever the CPL.
    pub fn read_system<T: crate::interp::alu::Int>(&mut self, address: u64) -> R<T> {
        let address = if self.long_mode() { address } else { address & 0xffff_ffff };
        self.read_as(Privilege::Supervisor, address)
    }

    /// Stores to a system structure.
    pub fn write_system<T: crate::interp::alu::Int>(&mut self, address: u64, value: T) -> R<()> {
        let address = if self.long_mode() { address } else { address & 0xffff_ffff };
        self.write_as(Privilege::Supervisor, address, value)
    }

    /// The descriptor that a selector names; `None` if it lies outside its table.
    pub fn descriptor(&mut self, selector: u16) -> R<Option<Descriptor>> {
        let (base, limit) = if selector & 4 != 0 {
            if self.ldt.unusable || is_null(self.ldt.selector) {
                return Ok(None);
            }
            (self.ldt.base, self.ldt.limit)
        } else {
            (self.gdt.base, u32::from(self.gdt.limit))
        };
        let index = u32::from(selector & 0xfff8);
        if index + 7 > limit {
            return Ok(None);
        }
        let address = base.wrapping_add(u64::from(index));
        let low: u64 = self.read_system(address)?;
        Ok(Some(Descriptor { low, address, segment: Segment::from_descriptor(selector, low) }))
    }

    /// As [`Cpu::descriptor`]; a selector outside its table raises `vector` with the selector.
    pub fn descriptor_or(&mut self, selector: u16, vector: Vector) -> R<Descriptor> {
        match self.descriptor(selector)? {
            Some(descriptor) => Ok(descriptor),
            None => self.fault_with(vector, selector),
        }
    }

    /// Upper half of the base of a 16-byte system descriptor in long mode; checks that its type field is zero.
    pub fn system_base(&mut self, descriptor: &Descriptor) -> R<u64> {
        if !self.long_mode() {
            return Ok(descriptor.segment.base);
        }
        let selector = descriptor.segment.selector;
        let table_limit = if selector & 4 != 0 { self.ldt.limit } else { u32::from(self.gdt.limit) };
        if u32::from(selector & 0xfff8) + 15 > table_limit {
            return self.gp(selector);
        }
        let high: u64 = self.read_system(descriptor.address.wrapping_add(8))?;
        if high >> 40 & 0x1f != 0 {
            return self.gp(selector);
        }
        let base = descriptor.segment.base | high << 32;
        if Cpu::is_canonical(base) { Ok(base) } else { self.gp(selector) }
    }

    /// Sets the accessed bit of a code or data descriptor in memory, if it is clear.
    pub fn mark_accessed(&mut self, descriptor: &mut Descriptor) -> R<()> {
        if descriptor.attributes() & attr::ACCESSED == 0 {
            let address = descriptor.address.wrapping_add(5);
            let byte: u8 = self.read_system(address)?;
            self.write_system(address, byte | 1)?;
            descriptor.segment.attributes |= attr::ACCESSED;
        }
        Ok(())
    }

    /// MOV and POP to ES, SS, DS, FS, GS, and their far-load forms (SDM 2 "MOV").
    pub fn load_segment(&mut self, index: usize, selector: u16) -> R<()> {
        match self.mode {
            Mode::Real => {
                // The hidden part keeps its limit and rights ("unreal" mode depends on it).
                let mut segment = self.segments[index];
                segment.selector = selector;
                segment.base = u64::from(selector) << 4;
                segment.unusable = false;
                self.set_segment(index, segment);
                return Ok(());
            }
            Mode::Virtual8086 => {
                self.set_segment(index, Segment { attributes: 0xf3, ..Segment::real_mode(selector, false) });
                return Ok(());
            }
            _ => {}
        }
        if is_null(selector) {
            let ss_allowed = self.is_64bit() && self.cpl < 3 && rpl(selector) == self.cpl;
            if index == seg::SS && !ss_allowed {
                return self.gp0();
            }
            let attributes = if index == seg::SS { u16::from(self.cpl) << attr::DPL_SHIFT } else { 0 };
            // AMD keeps base and limit, Intel clears the base; in 64-bit mode FS and GS bases are what matters.
            self.set_segment(index, Segment { selector, attributes, unusable: true, ..Segment::default() });
            return Ok(());
        }
        let mut descriptor = self.descriptor_or(selector, Vector::GeneralProtection)?;
        if index == seg::SS {
            if rpl(selector) != self.cpl
                || !descriptor.is_data()
                || !descriptor.readable_or_writable()
                || descriptor.dpl() != self.cpl
            {
                return self.gp(selector);
            }
            if !descriptor.present() {
                return self.fault_with(Vector::StackFault, selector);
            }
        } else {
            let readable = descriptor.is_data() || descriptor.is_code() && descriptor.readable_or_writable();
            let conforming_code = descriptor.is_code() && descriptor.conforming();
            if !readable || !conforming_code && descriptor.dpl() < self.cpl.max(rpl(selector)) {
                return self.gp(selector);
            }
            if !descriptor.present() {
                return self.fault_with(Vector::SegmentNotPresent, selector);
            }
        }
        self.mark_accessed(&mut descriptor)?;
        self.set_segment(index, descriptor.segment);
        Ok(())
    }

    /// LLDT.
    pub fn load_ldt(&mut self, selector: u16) -> R<()> {
        if is_null(selector) {
            self.ldt = Segment { selector, unusable: true, attributes: 0x82, ..Segment::default() };
            return Ok(());
        }
        if selector & 4 != 0 {
            return self.gp(selector);
        }
        let descriptor = self.descriptor_or(selector, Vector::GeneralProtection)?;
        if descriptor.system_type() != Some(system_type::LDT) {
            return self.gp(selector);
        }
        if !descriptor.present() {
            return self.fault_with(Vector::SegmentNotPresent, selector);
        }
        let base = self.system_base(&descriptor)?;
        self.ldt = Segment { base, ..descriptor.segment };
        Ok(())
    }

    /// LTR.
    pub fn load_tr(&mut self, selector: u16) -> R<()> {
        if is_null(selector) {
            return self.gp0();
        }
        if selector & 4 != 0 {
            return self.gp(selector);
        }
        let descriptor = self.descriptor_or(selector, Vector::GeneralProtection)?;
        let available = match descriptor.system_type() {
            Some(system_type::TSS_AVAILABLE) => true,
            Some(system_type::TSS16_AVAILABLE) => !self.long_mode(),
            _ => false,
        };
        if !available {
            return self.gp(selector);
        }
        if !descriptor.present() {
            return self.fault_with(Vector::SegmentNotPresent, selector);
        }
        let base = self.system_base(&descriptor)?;
        self.set_tss_busy(&descriptor, true)?;
        let mut segment = Segment { base, ..descriptor.segment };
        segment.attributes |= 2;
        self.tr = segment;
        Ok(())
    }

    /// Sets or clears the busy bit of a TSS descriptor in memory.
    pub fn set_tss_busy(&mut self, descriptor: &Descriptor, busy: bool) -> R<()> {
        let address = descriptor.address.wrapping_add(5);
        let byte: u8 = self.read_system(address)?;
        self.write_system(address, if busy { byte | 2 } else { byte & !2 })
    }

    /// LGDT and LIDT read six or ten bytes: limit, then base.
    pub fn read_table_register(&mut self, address: u64) -> R<DescriptorTable> {
        let limit: u16 = self.read(address)?;
        let base_address = self.wrap_linear(address.wrapping_add(2));
        let base = if self.is_64bit() {
            self.read::<u64>(base_address)?
        } else {
            u64::from(self.read::<u32>(base_address)?)
        };
        Ok(DescriptorTable { base, limit })
    }

    /// After a return to an outer privilege: data segments that the outer level may not use become null (SDM 3A
    /// §5.8.5).
    pub fn drop_inner_segments(&mut self) {
        for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let segment = &self.segments[index];
            let conforming = segment.attributes & (attr::CODE | attr::DOWN_OR_CONFORMING)
                == attr::CODE | attr::DOWN_OR_CONFORMING;
            if !segment.unusable && !conforming && segment.dpl() < self.cpl {
                self.segments[index] = Segment { unusable: true, ..Segment::default() };
            }
        }
        self.update_mode();
    }
}
