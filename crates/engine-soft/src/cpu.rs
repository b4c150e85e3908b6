//! One virtual processor's registers and the decisions that follow from them (mode, privilege, what is enabled).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use x86::bits::{cr0, cr4, efer, rflags};
use x86::cpuid::CpuidTable;
use x86::regs::attr;
use x86::xsave::component;
use x86::{ControlRegisters, DebugRegisters, DescriptorTable, Exception, Segment, Vector};

use crate::area::Owner;
use crate::interp::block::{Block, BlockCache};
use crate::memory::MemoryMap;
use crate::msr::Msrs;
use crate::native::Thunks;
use crate::shared::{Counters, Shared};
use crate::tlb::{Privilege, Tables};
use crate::translate::check::{Check, Journal};
use crate::translate::dispatch::Translator;
use crate::user::status;

/// Segment register numbers as encoded (SDM 2 table B-8).
pub mod seg {
    #![allow(missing_docs)]
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// General register numbers as array indexes.
pub mod gpr {
    #![allow(missing_docs)]
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
    pub const R11: usize = 11;
}

/// An exception has been raised: it is in [`Cpu::fault`].
#[derive(Clone, Copy, Debug)]
pub struct Raised;

/// Result of anything that can raise an exception.
pub type R<T> = Result<T, Raised>;

/// How the processor interprets code (SDM 3A §2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// CR0.PE clear.
    Real,
    /// RFLAGS.VM set.
    Virtual8086,
    /// 16- or 32-bit protected mode, long mode not active.
    Protected,
    /// 16- or 32-bit code under long mode.
    Compatibility,
    /// 64-bit code.
    Long,
}

/// Instruction classes that the OS can disable, as bits of [`Cpu::disabled`].
pub mod class {
    /// x87: #NM if CR0.EM or CR0.TS.
    pub const X87: u8 = 1 << 0;
    /// WAIT: #NM if CR0.TS and CR0.MP.
    pub const WAIT: u8 = 1 << 1;
    /// MMX: #UD if CR0.EM, #NM if CR0.TS.
    pub const MMX: u8 = 1 << 2;
    /// SSE: #UD if CR0.EM or not CR4.OSFXSR, #NM if CR0.TS.
    pub const SSE: u8 = 1 << 3;
    /// AVX: #UD unless CR4.OSXSAVE and XCR0 enables it; #NM if CR0.TS.
    pub const AVX: u8 = 1 << 4;
}

/// One virtual processor.
pub struct Cpu {
    /// What user-mode instructions see.
    pub user: Owner,
    /// Instruction pointer after the current instruction; branches change it.
    pub next_ip: u64,
    /// Rights of data accesses.
    pub privilege: Privilege,
    /// Current privilege level.
    pub cpl: u8,
    /// Current mode.
    pub mode: Mode,
    /// Operand and address size of code: 16, 32 or 64.
    pub code_bits: u8,
    /// Classes of instructions that are disabled now (bits of [`class`]).
    pub disabled: u8,
    /// Segments (bit per register) that need no check: 64-bit code, or flat, present, readable and writable.
    pub unchecked_segments: u8,
    /// Misaligned operands raise #AC: CPL 3 with CR0.AM and RFLAGS.AC.
    pub alignment_check: bool,
    /// Mask of the stack pointer: 16, 32 or 64 bits.
    pub stack_mask: u64,
    /// The exception that [`Raised`] speaks of.
    pub fault: Exception,
    /// The fault was a non-canonical address: #SS instead of #GP if the access went through SS.
    pub fault_noncanonical: bool,
    /// Segment through which the faulting instruction accesses memory.
    pub fault_segment: u8,
    /// Interrupts and single-step traps wait for one more instruction (STI, MOV SS).
    pub interrupt_shadow: bool,
    /// NMIs wait for IRET.
    pub nmi_masked: bool,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// Waiting in HLT.
    pub halted: bool,
    /// INIT has been received and no SIPI yet.
    pub wait_for_sipi: bool,
    /// DR6 bits of traps that are due after the current instruction.
    pub pending_debug: u64,
    /// The running block must stop after the current instruction.
    pub stop_block: bool,
    /// RFLAGS without the status flags and DF.
    pub system_flags: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub segments: [Segment; 6],
    /// LDTR.
    pub ldt: Segment,
    /// Task register.
    pub tr: Segment,
    /// GDTR.
    pub gdt: DescriptorTable,
    /// IDTR.
    pub idt: DescriptorTable,
    /// CR0–CR4, EFER, XCR0. CR8 lives in the LAPIC.
    pub control: ControlRegisters,
    /// DR0–DR7.
    pub debug: DebugRegisters,
    /// Model-specific registers without a home elsewhere.
    pub msrs: Msrs,
    /// What CPUID answers.
    pub cpuid: CpuidTable,
    /// Physical address bits at and above MAXPHYADDR, which are reserved in page tables.
    pub reserved_physical: u64,
    /// 1 GiB pages exist.
    pub has_1g_pages: bool,
    /// Decoded code.
    pub blocks: BlockCache,
    /// Native code for instructions that the host executes.
    pub thunks: Thunks,
    /// Makes host code of blocks that run often; `None` if everything is interpreted.
    pub translator: Option<Box<Translator>>,
    /// What lets every block run both ways; `None` unless that is asked for.
    pub check: Option<Box<Check>>,
    /// What a block that runs both ways did to memory.
    pub journal: Journal,
    /// Why the vCPU cannot go on at all, if so.
    pub fatal: Option<String>,
    /// Guest memory, as of the last look.
    pub map: Arc<MemoryMap>,
    /// The machine.
    pub shared: Arc<Shared>,
    /// Number of this processor.
    pub id: u32,
    /// Guest TSC minus host TSC.
    pub tsc_offset: u64,
    /// Counters that only this vCPU's thread changes.
    pub counters: Counters,
    /// Debug registers may match loads and stores.
    pub watchpoints: bool,
    /// One instruction, or one iteration of a repeated one, at a time.
    pub single_step: bool,
    /// The block being run when it is not in the cache: code that spans pages or lies in a device.
    pub scratch: Option<Box<Block>>,
    /// [`engine::Exit::AllHalted`] has been reported and nothing has changed since.
    pub reported_halt: bool,
}

impl Cpu {
    /// Raises an exception: `return Err(cpu.raise(…))`.
    #[cold]
    pub fn raise(&mut self, exception: Exception) -> Raised {
        self.fault = exception;
        self.fault_noncanonical = false;
        Raised
    }

    /// #GP(0).
    #[cold]
    pub fn gp0<T>(&mut self) -> R<T> {
        Err(self.raise(Exception::gp(0)))
    }

    /// #GP with the error code of a selector (SDM 3A §6.13).
    #[cold]
    pub fn gp<T>(&mut self, selector: u16) -> R<T> {
        Err(self.raise(Exception::gp(u32::from(selector & 0xfffc))))
    }

    /// #UD.
    #[cold]
    pub fn ud<T>(&mut self) -> R<T> {
        Err(self.raise(Exception::ud()))
    }

    /// An exception with a selector as its error code.
    #[cold]
    pub fn fault_with<T>(&mut self, vector: Vector, selector: u16) -> R<T> {
        Err(self.raise(Exception::with_code(vector, u32::from(selector & 0xfffc))))
    }

    /// The own TLB.
    #[inline(always)]
    pub fn tlb(&self) -> &Tables {
        self.user.area().tlb()
    }

    /// RFLAGS in architectural form.
    pub fn rflags(&self) -> u64 {
        let direction = if self.user.direction != 0 { rflags::DF } else { 0 };
        self.system_flags | rflags::RESERVED_ONE | direction | status::to_rflags(self.user.status)
    }

    /// Sets all of RFLAGS, without privilege checks.
    pub fn set_rflags(&mut self, flags: u64) {
        const SYSTEM: u64 = rflags::TF
            | rflags::IF
            | rflags::IOPL
            | rflags::NT
            | rflags::RF
            | rflags::VM
            | rflags::AC
            | rflags::VIF
            | rflags::VIP
            | rflags::ID;
        let changed = self.system_flags ^ flags;
        self.system_flags = flags & SYSTEM;
        self.user.status = status::from_rflags(flags);
        self.user.direction = u16::from(flags & rflags::DF != 0);
        if changed & (rflags::VM | rflags::AC) != 0 {
            self.update_mode();
        }
        if flags & rflags::TF != 0 {
            self.stop_block = true;
        }
    }

    /// Whether long mode is active.
    #[inline(always)]
    pub fn long_mode(&self) -> bool {
        self.control.efer & efer::LMA != 0
    }

    /// Whether the processor runs 64-bit code.
    #[inline(always)]
    pub fn is_64bit(&self) -> bool {
        self.mode == Mode::Long
    }

    /// Whether protected-mode segmentation applies (not real mode, not virtual-8086).
    pub fn is_protected(&self) -> bool {
        !matches!(self.mode, Mode::Real | Mode::Virtual8086)
    }

    /// RFLAGS.IOPL.
    pub fn iopl(&self) -> u8 {
        ((self.system_flags & rflags::IOPL) >> rflags::IOPL_SHIFT) as u8
    }

    /// Recomputes everything that depends on CR0, CR4, EFER, RFLAGS.VM/AC, CPL and the segment registers.
    pub fn update_mode(&mut self) {
        let protected = self.control.cr0 & cr0::PE != 0;
        let cs = &self.segments[seg::CS];
        self.mode = if !protected {
            Mode::Real
        } else if self.system_flags & rflags::VM != 0 {
            Mode::Virtual8086
        } else if !self.long_mode() {
            Mode::Protected
        } else if cs.attributes & attr::L != 0 {
            Mode::Long
        } else {
            Mode::Compatibility
        };
        self.cpl = match self.mode {
            Mode::Real => 0,
            Mode::Virtual8086 => 3,
            _ => self.cpl,
        };
        let old_bits = self.code_bits;
        self.code_bits = match self.mode {
            Mode::Long => 64,
            _ if cs.attributes & attr::DB != 0 => 32,
            _ => 16,
        };
        if old_bits != self.code_bits {
            self.stop_block = true;
        }
        self.stack_mask = match self.mode {
            Mode::Long => u64::MAX,
            _ if self.segments[seg::SS].attributes & attr::DB != 0 => 0xffff_ffff,
            _ => 0xffff,
        };
        self.update_privilege();
        self.unchecked_segments = 0;
        for index in 0..6 {
            let segment = &self.segments[index];
            let long = self.mode == Mode::Long;
            self.user.segment_base[index] = if long && index < seg::FS { 0 } else { segment.base };
            if long || Self::is_flat(segment) {
                self.unchecked_segments |= 1 << index;
            }
        }
        self.update_disabled();
    }

    /// A present, readable and writable segment of 4 GiB that grows upwards.
    fn is_flat(segment: &Segment) -> bool {
        const LOOK_AT: u16 =
            attr::P | attr::S | attr::CODE | attr::DOWN_OR_CONFORMING | attr::WRITABLE_OR_READABLE;
        !segment.unusable
            && segment.limit == u32::MAX
            && segment.attributes & LOOK_AT == attr::P | attr::S | attr::WRITABLE_OR_READABLE
    }

    /// Recomputes the rights of data accesses and alignment checking from CPL, RFLAGS.AC, CR0.AM and CR4.SMAP.
    pub fn update_privilege(&mut self) {
        self.alignment_check =
            self.cpl == 3 && self.system_flags & rflags::AC != 0 && self.control.cr0 & cr0::AM != 0;
        self.privilege = if self.cpl == 3 {
            Privilege::User
        } else if self.control.cr4 & cr4::SMAP != 0 && self.system_flags & rflags::AC != 0 {
            Privilege::SupervisorAc
        } else {
            Privilege::Supervisor
        };
    }

    /// Recomputes which instruction classes are disabled.
    pub fn update_disabled(&mut self) {
        let ts = self.control.cr0 & cr0::TS != 0;
        let em = self.control.cr0 & cr0::EM != 0;
        let mp = self.control.cr0 & cr0::MP != 0;
        let fxsr = self.control.cr4 & cr4::OSFXSR != 0;
        let avx_state = component::SSE | component::AVX;
        let avx = self.control.cr4 & cr4::OSXSAVE != 0
            && self.control.xcr0 & avx_state == avx_state
            && self.is_protected();
        self.disabled = 0;
        let mut disable = |condition: bool, class: u8| {
            if condition {
                self.disabled |= class;
            }
        };
        disable(ts || em, class::X87);
        disable(ts && mp, class::WAIT);
        disable(ts || em, class::MMX);
        disable(ts || em || !fxsr, class::SSE);
        disable(ts || !avx, class::AVX);
    }

    /// The exception that a disabled class raises.
    #[cold]
    pub fn class_fault<T>(&mut self, class: u8) -> R<T> {
        let em = self.control.cr0 & cr0::EM != 0;
        let fxsr = self.control.cr4 & cr4::OSFXSR != 0;
        let undefined = match class {
            class::X87 | class::WAIT => false,
            class::MMX => em,
            class::SSE => em || !fxsr,
            _ => {
                let avx_state = component::SSE | component::AVX;
                self.control.cr4 & cr4::OSXSAVE == 0
                    || self.control.xcr0 & avx_state != avx_state
                    || !self.is_protected()
            }
        };
        if undefined { self.ud() } else { Err(self.raise(Exception::plain(Vector::DeviceNotAvailable))) }
    }

    /// Sets CPL after a control transfer.
    pub fn set_cpl(&mut self, cpl: u8) {
        self.cpl = cpl;
        self.update_mode();
    }

    /// Loads a segment register with everything checked already.
    pub fn set_segment(&mut self, index: usize, segment: Segment) {
        self.segments[index] = segment;
        self.update_mode();
    }

    /// Linear address of the current instruction.
    pub fn linear_ip(&self, ip: u64) -> u64 {
        if self.is_64bit() { ip } else { (self.segments[seg::CS].base.wrapping_add(ip)) & 0xffff_ffff }
    }

    /// The guest's time-stamp counter, read after everything that the guest did before.
    pub fn tsc(&self) -> u64 {
        // SAFETY: LFENCE is part of SSE2, which every x86-64 processor has.
        #[allow(unused_unsafe)]
        unsafe {
            core::arch::x86_64::_mm_lfence();
        }
        host_tsc().wrapping_add(self.tsc_offset)
    }

    /// Asks the own run loop to look at [`crate::area::Front::attention`] before the next block.
    pub fn note_attention(&self) {
        self.user.area().attention().fetch_or(1, Ordering::SeqCst);
    }

    /// Takes the current memory map and forgets translations and code that came from an older one.
    pub fn refresh_map(&mut self) {
        self.map = self.shared.map();
        self.tlb().flush(false);
        self.blocks.clear();
        self.clear_translations();
    }

    /// Whether an address is canonical (SDM 1 §3.3.7.1).
    #[inline(always)]
    pub fn is_canonical(address: u64) -> bool {
        (((address << 16) as i64) >> 16) as u64 == address
    }
}

/// The host's time-stamp counter.
pub fn host_tsc() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 processor and is not disabled on any host Apiary supports.
    unsafe { core::arch::x86_64::_rdtsc() }
}
