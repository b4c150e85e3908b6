//! Control registers and what they change (SDM 3A §2.5, §4.10.4).

use x86::bits::{cr0, cr4, efer};
use x86::regs::attr;
use x86::xsave::component;

use crate::cpu::{Cpu, R, seg};

/// CR4 bits that the CPU model has.
const CR4_KNOWN: u64 = cr4::VME
    | cr4::PVI
    | cr4::TSD
    | cr4::DE
    | cr4::PSE
    | cr4::PAE
    | cr4::MCE
    | cr4::PGE
    | cr4::PCE
    | cr4::OSFXSR
    | cr4::OSXMMEXCPT
    | cr4::UMIP
    | cr4::FSGSBASE
    | cr4::PCIDE
    | cr4::OSXSAVE
    | cr4::SMEP
    | cr4::SMAP;

/// CR4 bits each of which needs a CPUID feature: bit, leaf, register (0 EBX, 1 ECX, 2 EDX), feature bit.
const CR4_FEATURES: [(u64, u32, u8, u32); 9] = [
    (cr4::VME, 1, 2, 1),
    (cr4::PVI, 1, 2, 1),
    (cr4::UMIP, 7, 1, 2),
    (cr4::FSGSBASE, 7, 0, 0),
    (cr4::PCIDE, 1, 1, 17),
    (cr4::OSXSAVE, 1, 1, 26),
    (cr4::SMEP, 7, 0, 7),
    (cr4::SMAP, 7, 0, 20),
    (cr4::PGE, 1, 2, 13),
];

/// Bit 63 of a value for CR3 with PCID: keep the translations.
const CR3_NO_FLUSH: u64 = 1 << 63;

impl Cpu {
    /// CR4 bits that may be set, by the CPUID table.
    pub fn cr4_allowed(&self) -> u64 {
        CR4_FEATURES.iter().fold(CR4_KNOWN, |allowed, &(bit, leaf, register, feature)| {
            let result = self.cpuid.lookup(leaf, 0);
            let word = [result.ebx, result.ecx, result.edx][usize::from(register)];
            if word >> feature & 1 != 0 { allowed } else { allowed & !bit }
        })
    }

    /// XCR0 components that may be set, by the CPUID table.
    pub fn xcr0_allowed(&self) -> u64 {
        let leaf = self.cpuid.lookup(0xd, 0);
        u64::from(leaf.eax) | u64::from(leaf.edx) << 32
    }

    /// Forgets translations; global ones only if not `keep_global`.
    pub fn flush_translations(&mut self, keep_global: bool) {
        self.counters.tlb_flushes += 1;
        self.tlb().flush(keep_global);
        self.forget_code_addresses(keep_global);
        self.stop_block = true;
    }

    /// MOV to CR0.
    pub fn write_cr0(&mut self, value: u64) -> R<()> {
        let old = self.control.cr0;
        let bad = value >> 32 != 0
            || value & cr0::PG != 0 && value & cr0::PE == 0
            || value & cr0::NW != 0 && value & cr0::CD == 0;
        if bad {
            return self.gp0();
        }
        let paging_on = value & cr0::PG != 0 && old & cr0::PG == 0;
        let paging_off = value & cr0::PG == 0 && old & cr0::PG != 0;
        if paging_on && self.control.efer & efer::LME != 0 {
            if self.control.cr4 & cr4::PAE == 0 || self.segments[seg::CS].attributes & attr::L != 0 {
                return self.gp0();
            }
            self.control.efer |= efer::LMA;
        }
        if paging_off {
            if self.is_64bit() || self.control.cr4 & cr4::PCIDE != 0 {
                return self.gp0();
            }
            self.control.efer &= !efer::LMA;
        }
        const KEPT: u64 =
            cr0::PE | cr0::MP | cr0::EM | cr0::TS | cr0::NE | cr0::WP | cr0::AM | cr0::NW | cr0::CD | cr0::PG;
        self.control.cr0 = value & KEPT | cr0::ET;
        if (value ^ old) & (cr0::PG | cr0::WP | cr0::PE) != 0 {
            self.flush_translations(false);
        }
        self.update_mode();
        Ok(())
    }

    /// MOV to CR3.
    pub fn write_cr3(&mut self, value: u64) -> R<()> {
        let pcid = self.control.cr4 & cr4::PCIDE != 0;
        let keep = pcid && value & CR3_NO_FLUSH != 0;
        let value = if pcid { value & !CR3_NO_FLUSH } else { value };
        if self.long_mode() && value & self.reserved_physical & !pte_low() != 0 {
            return self.gp0();
        }
        let old = self.control.cr3;
        self.control.cr3 = value;
        // The TLB holds one context at a time, so even a kept one starts empty unless it is the same.
        if !(keep && old == value) {
            self.flush_translations(self.control.cr4 & cr4::PGE != 0);
        }
        Ok(())
    }

    /// MOV to CR4.
    pub fn write_cr4(&mut self, value: u64) -> R<()> {
        let old = self.control.cr4;
        let pcid_on = value & !old & cr4::PCIDE != 0;
        let bad = value & !self.cr4_allowed() != 0
            || self.long_mode() && value & cr4::PAE == 0
            || pcid_on && (!self.long_mode() || self.control.cr3 & 0xfff != 0);
        if bad {
            return self.gp0();
        }
        self.control.cr4 = value;
        const TRANSLATION: u64 = cr4::PSE | cr4::PAE | cr4::PGE | cr4::PCIDE | cr4::SMEP | cr4::SMAP;
        if (value ^ old) & TRANSLATION != 0 {
            self.flush_translations(false);
        }
        self.update_mode();
        Ok(())
    }

    /// XSETBV.
    pub fn write_xcr0(&mut self, value: u64) -> R<()> {
        let avx_without_sse = value & component::AVX != 0 && value & component::SSE == 0;
        if value & component::X87 == 0 || value & !self.xcr0_allowed() != 0 || avx_without_sse {
            return self.gp0();
        }
        self.control.xcr0 = value;
        self.update_disabled();
        Ok(())
    }

    /// What CPUID returns now: the table, with the bits that follow the processor's state.
    pub fn cpuid_now(&self, leaf: u32, subleaf: u32) -> x86::cpuid::CpuidResult {
        const OSXSAVE: u32 = 1 << 27;
        const APIC: u32 = 1 << 9;
        let mut result = self.cpuid.lookup(leaf, subleaf);
        let apic_enabled = self.shared.chips.apic_base(self.id) & x86::msr::apic_base::EN != 0;
        match (leaf, subleaf) {
            (1, _) => {
                result.ecx &= !OSXSAVE;
                if self.control.cr4 & cr4::OSXSAVE != 0 {
                    result.ecx |= OSXSAVE;
                }
                if !apic_enabled {
                    result.edx &= !APIC;
                }
            }
            (0x8000_0001, _) if !apic_enabled => result.edx &= !APIC,
            (0xd, 0) if result.eax != 0 => result.ebx = crate::cpuid::xsave_bytes(self.control.xcr0),
            _ => {}
        }
        result
    }
}

/// Bits of CR3 below the page-table address.
const fn pte_low() -> u64 {
    0xfff
}
