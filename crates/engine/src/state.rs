//! State in architectural form: what a snapshot carries and what any engine can load.

use serde::{Deserialize, Serialize};
use x86::bits::{cr0, dr6, dr7, rflags};
use x86::regs::Gpr;
use x86::{ControlRegisters, DebugRegisters, DescriptorTable, Exception, Registers, Segment, msr};

/// The segment registers and the two system segments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Segments {
    pub es: Segment,
    pub cs: Segment,
    pub ss: Segment,
    pub ds: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ldt: Segment,
    pub tr: Segment,
    pub gdt: DescriptorTable,
    pub idt: DescriptorTable,
}

/// Whether a processor runs or waits (SDM 3A §8.4, §10.4.7).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MpState {
    /// Executes instructions.
    #[default]
    Running,
    /// Waits in HLT.
    Halted,
    /// Has been through INIT (or is fresh and not the bootstrap processor) and waits for a start-up IPI.
    WaitForSipi,
}

/// Events that are on their way into a processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingEvents {
    /// An exception that was raised and not yet delivered.
    pub exception: Option<Exception>,
    /// A vector taken from the interrupt controller and not yet delivered.
    pub interrupt: Option<u8>,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// NMIs are blocked until IRET.
    pub nmi_masked: bool,
    /// STI or MOV SS/POP SS just executed: interrupts are held off for one instruction.
    pub interrupt_shadow: bool,
}

/// A LAPIC's register page: the 32-bit register at offset `0x10 * n` (SDM 3A table 10-1). In x2APIC mode the
/// 64-bit ICR is split over offsets 0x300 and 0x310, and the ID register holds the 32-bit x2APIC ID.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LapicState {
    /// 64 registers.
    pub registers: Vec<u32>,
}

impl Default for LapicState {
    fn default() -> Self {
        LapicState { registers: vec![0; 64] }
    }
}

/// Everything architectural about one processor.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    /// GPRs, RIP, RFLAGS.
    pub regs: Registers,
    /// Segment and descriptor-table registers.
    pub segments: Segments,
    /// CR0–CR8, EFER, XCR0.
    pub control: ControlRegisters,
    /// Debug registers.
    pub debug: DebugRegisters,
    /// Model-specific registers, except those that have a field of their own (EFER, FS/GS base, APIC base is here).
    pub msrs: Vec<(u32, u64)>,
    /// XSAVE image in standard form with the offsets of [`x86::xsave`]; at least [`x86::xsave::MIN_BYTES`] long.
    pub xsave: Vec<u8>,
    /// Local APIC registers.
    pub lapic: LapicState,
    /// Run state.
    pub mp_state: MpState,
    /// Events in flight.
    pub events: PendingEvents,
}

impl VcpuState {
    /// A processor after power-up or INIT (SDM 3A table 9-1): real mode at F000:FFF0. `id` gives the APIC ID;
    /// processor 0 is the bootstrap processor and runs, the others wait for SIPI.
    pub fn reset(id: u32) -> Self {
        let mut state = VcpuState::default();
        state.regs.rip = 0xfff0;
        state.regs.rflags = rflags::RESERVED_ONE;
        // Family 15 stepping 0; the signature that CPUID gives is set by the engine where it differs.
        state.regs.gpr[Gpr::Rdx as usize] = 0x600;
        let data = Segment::real_mode(0, false);
        state.segments.es = data;
        state.segments.ss = data;
        state.segments.ds = data;
        state.segments.fs = data;
        state.segments.gs = data;
        state.segments.cs = Segment { selector: 0xf000, base: 0xffff_0000, ..Segment::real_mode(0, true) };
        state.segments.ldt = Segment { attributes: 0x82, limit: 0xffff, ..Segment::default() };
        state.segments.tr = Segment { attributes: 0x8b, limit: 0xffff, ..Segment::default() };
        state.segments.gdt.limit = 0xffff;
        state.segments.idt.limit = 0xffff;
        state.control.cr0 = cr0::CD | cr0::NW | cr0::ET;
        state.control.xcr0 = x86::xsave::component::X87;
        state.debug.dr6 = dr6::FIXED;
        state.debug.dr7 = dr7::FIXED;
        state.xsave = vec![0; x86::xsave::MAX_BYTES];
        state.xsave[0..2].copy_from_slice(&0x37fu16.to_le_bytes()); // FCW
        state.xsave[24..28].copy_from_slice(&0x1f80u32.to_le_bytes()); // MXCSR
        let base = msr::apic_base::DEFAULT_ADDRESS
            | msr::apic_base::EN
            | if id == 0 { msr::apic_base::BSP } else { 0 };
        state.msrs = vec![(msr::APIC_BASE, base), (msr::PAT, 0x0007_0406_0007_0406)];
        state.lapic.registers[0x20 / 16] = id << 24;
        state.lapic.registers[0x30 / 16] = 0x0005_0014;
        state.lapic.registers[0xe0 / 16] = 0xffff_ffff;
        state.lapic.registers[0xf0 / 16] = 0xff;
        for lvt in 0x32..=0x37 {
            state.lapic.registers[lvt] = 0x1_0000;
        }
        if id != 0 {
            state.mp_state = MpState::WaitForSipi;
        }
        state
    }

    /// Value of an MSR in [`VcpuState::msrs`].
    pub fn msr(&self, index: u32) -> Option<u64> {
        self.msrs.iter().find(|(i, _)| *i == index).map(|(_, v)| *v)
    }

    /// Adds or replaces an MSR in [`VcpuState::msrs`].
    pub fn set_msr(&mut self, index: u32, value: u64) {
        match self.msrs.iter_mut().find(|(i, _)| *i == index) {
            Some((_, v)) => *v = value,
            None => self.msrs.push((index, value)),
        }
    }
}

/// One 8259A (Intel 8259A data sheet).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct PicState {
    /// Interrupt request register.
    pub irr: u8,
    /// In-service register.
    pub isr: u8,
    /// Mask register.
    pub imr: u8,
    /// Level of each input when last sampled.
    pub lines: u8,
    /// ELCR: a set bit makes the input level-triggered.
    pub level_triggered: u8,
    /// Input with the highest priority.
    pub priority_base: u8,
    /// Vector of input 0 (ICW2).
    pub vector_base: u8,
    /// Next expected initialisation word: 0 when initialised, else 2, 3 or 4.
    pub init_step: u8,
    pub needs_icw4: bool,
    pub auto_eoi: bool,
    pub rotate_on_auto_eoi: bool,
    pub special_mask: bool,
    pub special_fully_nested: bool,
    pub read_isr: bool,
    pub poll: bool,
}

/// The IOAPIC (Intel 82093AA).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct IoApicState {
    pub id: u8,
    pub select: u8,
    /// Level of each input.
    pub lines: u32,
    /// Redirection table, in register format (remote IRR and delivery status included).
    pub redirection: [u64; 24],
}

/// One channel of the 8254.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct PitChannelState {
    /// Reload value; 0 stands for 65536.
    pub count: u32,
    pub mode: u8,
    pub bcd: bool,
    /// 1 low byte, 2 high byte, 3 low then high; 0 before the first control word: the channel does not count.
    pub access: u8,
    /// The next read gives the high byte.
    pub read_high: bool,
    /// The next write gives the high byte; its low byte waits in `write_latch`.
    pub write_high: bool,
    pub write_latch: u8,
    pub latched_count: Option<u16>,
    pub latched_status: Option<u8>,
    pub gate: bool,
    /// Nanoseconds since the count was loaded.
    pub elapsed_ns: u64,
}

/// The 8254 with the port-61h latch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct PitState {
    pub channels: [PitChannelState; 3],
    pub speaker_data: bool,
}

/// The chips that an engine owns beside the LAPICs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ChipState {
    pub pic_master: PicState,
    pub pic_slave: PicState,
    pub ioapic: IoApicState,
    pub pit: PitState,
}
