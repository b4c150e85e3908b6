//! The state in which a loader hands over vCPU 0: registers, flat segments, page tables.
//!
//! Two hand-over states exist: 64-bit with identity-mapped paging (Linux `Documentation/arch/x86/boot.rst`, "64-bit boot protocol")
//! and 32-bit protected mode without paging ("32-bit boot protocol"; Xen `docs/misc/pvh.pandoc`).

use engine::{GuestMemory, VcpuState};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use x86::bits::{cr0, cr4, efer, rflags};
use x86::paging::{PAGE_SIZE, pte};
use x86::regs::{Gpr, attr};
use x86::{DescriptorTable, Segment, msr};

use crate::layout::{HIGHMEM_BASE, PCI_MMIO32};

/// Where loaders keep what the kernel reads once and then owns: all below the EBDA, above the BIOS data area.
pub(crate) mod scratch {
    /// Global descriptor table.
    pub const GDT: u64 = 0x6000;
    /// Linux boot parameters ("zero page") or PVH start info, with its lists.
    pub const BOOT_PARAMETERS: u64 = 0x7000;
    /// Initial stack pointer; grows down to the end of the boot parameters.
    pub const STACK_TOP: u64 = 0x8ff0;
    /// Page tables: PML4, PDPT, then four page directories.
    pub const PAGE_TABLES: u64 = 0x9000;
    /// Kernel command line.
    pub const COMMAND_LINE: u64 = 0x2_0000;
    /// Room for the command line with its NUL.
    pub const COMMAND_LINE_BYTES: usize = 0x1_0000;
}

/// Linux's `__BOOT_CS`; other protocols take any flat code segment.
pub const BOOT_CS: u16 = 0x10;
/// Linux's `__BOOT_DS`.
pub const BOOT_DS: u16 = 0x18;
/// A busy 32-bit TSS, as PVH asks for.
pub const BOOT_TSS: u16 = 0x20;

/// Flat 64-bit code: base 0, limit 4 GiB, readable, L.
const CODE64: u64 = 0x00af_9b00_0000_ffff;
/// Flat 32-bit code: base 0, limit 4 GiB, readable, D.
const CODE32: u64 = 0x00cf_9b00_0000_ffff;
/// Flat data: base 0, limit 4 GiB, writable, B.
const DATA: u64 = 0x00cf_9300_0000_ffff;
/// Busy 32-bit TSS: base 0, limit 0x67.
const TSS: u64 = 0x0000_8b00_0000_0067;

/// Processor mode at hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryMode {
    /// 64-bit mode, the first 4 GiB identity-mapped.
    Long,
    /// 32-bit protected mode, flat segments, paging off.
    Protected,
}

/// How vCPU 0 starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryState {
    /// Mode.
    pub mode: EntryMode,
    /// First instruction.
    pub rip: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// RBX: PVH start info, else zero.
    pub rbx: u64,
    /// RSI: Linux boot parameters, else zero.
    pub rsi: u64,
}

impl EntryState {
    /// Brings a processor that is in its reset state ([`VcpuState::reset`] or what the engine gives for a new vCPU 0) into the
    /// state that the kernel expects. What is not named by the boot protocol stays as it is, but for the LAPIC, which is
    /// enabled in virtual-wire mode (MP 1.4 §3.6.2.2) as firmware leaves it.
    pub fn apply(&self, state: &mut VcpuState) {
        let regs = &mut state.regs;
        regs.gpr = [0; 16];
        regs.gpr[Gpr::Rsp as usize] = self.rsp;
        regs.gpr[Gpr::Rbx as usize] = self.rbx;
        regs.gpr[Gpr::Rsi as usize] = self.rsi;
        regs.rip = self.rip;
        regs.rflags = rflags::RESERVED_ONE;

        let descriptors = gdt(self.mode);
        let segment =
            |selector: u16| Segment::from_descriptor(selector, descriptors[usize::from(selector / 8)]);
        let segments = &mut state.segments;
        segments.cs = segment(BOOT_CS);
        let data = segment(BOOT_DS);
        segments.ds = data;
        segments.es = data;
        segments.ss = data;
        segments.fs = data;
        segments.gs = data;
        segments.tr = segment(BOOT_TSS);
        segments.ldt = Segment { attributes: attr::P | 2, unusable: true, ..Segment::default() };
        segments.gdt = DescriptorTable { base: scratch::GDT, limit: (descriptors.len() * 8 - 1) as u16 };
        segments.idt = DescriptorTable { base: 0, limit: 0 };

        let control = &mut state.control;
        control.cr0 = cr0::PE | cr0::ET | cr0::NE;
        control.cr2 = 0;
        control.cr3 = 0;
        control.cr4 = 0;
        control.efer = 0;
        if self.mode == EntryMode::Long {
            control.cr0 |= cr0::PG | cr0::WP;
            control.cr3 = scratch::PAGE_TABLES;
            control.cr4 = cr4::PAE;
            control.efer = efer::LME | efer::LMA;
        }

        if state.lapic.registers.len() >= 64 {
            state.lapic.registers[lapic::SVR] = lapic::SVR_ENABLE | lapic::SPURIOUS_VECTOR;
            state.lapic.registers[lapic::LVT_LINT0] = lapic::DELIVERY_EXTINT;
            state.lapic.registers[lapic::LVT_LINT1] = lapic::DELIVERY_NMI;
        }
    }

    /// Writes the descriptor table and, for [`EntryMode::Long`], the page tables.
    pub(crate) fn write_tables(&self, memory: &GuestMemory) -> Result<(), GuestMemoryError> {
        for (i, descriptor) in gdt(self.mode).iter().enumerate() {
            memory.write_obj(*descriptor, GuestAddress(scratch::GDT + 8 * i as u64))?;
        }
        if self.mode == EntryMode::Long {
            write_identity_map(memory)?;
        }
        Ok(())
    }
}

/// Indices into [`engine::LapicState::registers`] and their bits (SDM 3A §10.5.1, §10.9).
mod lapic {
    pub const SVR: usize = 0xf0 / 16;
    pub const LVT_LINT0: usize = 0x350 / 16;
    pub const LVT_LINT1: usize = 0x360 / 16;
    pub const SVR_ENABLE: u32 = 1 << 8;
    pub const SPURIOUS_VECTOR: u32 = 0xff;
    pub const DELIVERY_NMI: u32 = 4 << 8;
    pub const DELIVERY_EXTINT: u32 = 7 << 8;
}

fn gdt(mode: EntryMode) -> [u64; 5] {
    let code = match mode {
        EntryMode::Long => CODE64,
        EntryMode::Protected => CODE32,
    };
    [0, 0, code, DATA, TSS]
}

/// Maps the first 4 GiB one to one with 2 MiB pages.
fn write_identity_map(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    const ENTRIES: u64 = PAGE_SIZE / 8;
    const LARGE_PAGE: u64 = 2 << 20;
    let pml4 = scratch::PAGE_TABLES;
    let pdpt = pml4 + PAGE_SIZE;
    let directories = pdpt + PAGE_SIZE;
    let count = HIGHMEM_BASE / (ENTRIES * LARGE_PAGE);

    let mut table = vec![0u64; (PAGE_SIZE * (2 + count) / 8) as usize];
    table[0] = pdpt | pte::P | pte::RW;
    for i in 0..count {
        table[(ENTRIES + i) as usize] = (directories + i * PAGE_SIZE) | pte::P | pte::RW;
    }
    for (i, entry) in table[2 * ENTRIES as usize..].iter_mut().enumerate() {
        *entry = (i as u64 * LARGE_PAGE) | pte::P | pte::RW | pte::PS;
    }
    let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    memory.write_slice(&bytes, GuestAddress(pml4))
}

/// The memory-type range registers as firmware programs them on every processor (SDM 3A §11.11): write-back by default, the
/// device hole from 3 to 4 GiB uncached, the legacy windows below 1 MiB as on a PC.
pub fn mtrr_msrs(physical_address_bits: u32) -> Vec<(u32, u64)> {
    const UNCACHED: u64 = 0;
    const WRITE_PROTECTED: u64 = 5;
    const WRITE_BACK: u64 = 6;
    const VALID: u64 = 1 << 11;
    const DEFAULT_ENABLE: u64 = 1 << 11;
    const FIXED_ENABLE: u64 = 1 << 10;
    /// MTRRfix4K registers, from C0000 to F8000.
    const FIXED_4K: u32 = msr::MTRR_FIX4K_F8000 - msr::MTRR_FIX4K_C0000 + 1;
    let eight = |memory_type: u64| memory_type * 0x0101_0101_0101_0101;
    let hole = HIGHMEM_BASE - PCI_MMIO32.start;
    let address_mask = (1u64 << physical_address_bits.clamp(36, 52)) - 1;

    let mut msrs = vec![
        (msr::MTRR_FIX64K_00000, eight(WRITE_BACK)),
        (msr::MTRR_FIX16K_80000, eight(WRITE_BACK)),
        (msr::MTRR_FIX16K_A0000, eight(UNCACHED)),
    ];
    msrs.extend((0..FIXED_4K).map(|i| (msr::MTRR_FIX4K_C0000 + i, eight(WRITE_PROTECTED))));
    msrs.push((msr::MTRR_PHYSBASE0, PCI_MMIO32.start | UNCACHED));
    msrs.push((msr::MTRR_PHYSBASE0 + 1, (address_mask & !(hole - 1)) | VALID));
    msrs.push((msr::MTRR_DEF_TYPE, DEFAULT_ENABLE | FIXED_ENABLE | WRITE_BACK));
    msrs
}
