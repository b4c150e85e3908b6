//! Single-bit names of RFLAGS, the control registers, EFER and the debug registers
//! (SDM 3A §2.3, §2.5; APM 2 §3.1; SDM 3B §18.2).

/// RFLAGS.
pub mod rflags {
    /// Carry.
    pub const CF: u64 = 1 << 0;
    /// Always one.
    pub const RESERVED_ONE: u64 = 1 << 1;
    /// Parity of the low result byte.
    pub const PF: u64 = 1 << 2;
    /// Carry out of bit 3.
    pub const AF: u64 = 1 << 4;
    /// Zero.
    pub const ZF: u64 = 1 << 6;
    /// Sign.
    pub const SF: u64 = 1 << 7;
    /// Single-step trap.
    pub const TF: u64 = 1 << 8;
    /// Maskable interrupts enabled.
    pub const IF: u64 = 1 << 9;
    /// String direction.
    pub const DF: u64 = 1 << 10;
    /// Signed overflow.
    pub const OF: u64 = 1 << 11;
    /// I/O privilege level, two bits.
    pub const IOPL: u64 = 3 << 12;
    /// Bit position of [`IOPL`].
    pub const IOPL_SHIFT: u32 = 12;
    /// Nested task.
    pub const NT: u64 = 1 << 14;
    /// Resume: suppresses instruction breakpoints for one instruction.
    pub const RF: u64 = 1 << 16;
    /// Virtual-8086 mode.
    pub const VM: u64 = 1 << 17;
    /// Alignment check, or supervisor access to user pages under SMAP.
    pub const AC: u64 = 1 << 18;
    /// Virtual interrupt flag.
    pub const VIF: u64 = 1 << 19;
    /// Virtual interrupt pending.
    pub const VIP: u64 = 1 << 20;
    /// CPUID available.
    pub const ID: u64 = 1 << 21;
    /// The six status flags.
    pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
}

/// CR0.
pub mod cr0 {
    /// Protected mode.
    pub const PE: u64 = 1 << 0;
    /// WAIT/FWAIT honour TS.
    pub const MP: u64 = 1 << 1;
    /// No x87: its instructions raise #NM.
    pub const EM: u64 = 1 << 2;
    /// Task switched: the next FPU instruction raises #NM.
    pub const TS: u64 = 1 << 3;
    /// Extension type, always one.
    pub const ET: u64 = 1 << 4;
    /// Report x87 errors as #MF rather than through FERR#.
    pub const NE: u64 = 1 << 5;
    /// Supervisor writes honour read-only pages.
    pub const WP: u64 = 1 << 16;
    /// Alignment checking permitted.
    pub const AM: u64 = 1 << 18;
    /// Not write-through.
    pub const NW: u64 = 1 << 29;
    /// Cache disable.
    pub const CD: u64 = 1 << 30;
    /// Paging.
    pub const PG: u64 = 1 << 31;
}

/// CR4.
pub mod cr4 {
    /// Virtual-8086 mode extensions.
    pub const VME: u64 = 1 << 0;
    /// Protected-mode virtual interrupts.
    pub const PVI: u64 = 1 << 1;
    /// RDTSC only at CPL 0.
    pub const TSD: u64 = 1 << 2;
    /// Debug registers DR4/DR5 undefined.
    pub const DE: u64 = 1 << 3;
    /// 4 MiB pages in 2-level paging.
    pub const PSE: u64 = 1 << 4;
    /// 64-bit page-table entries.
    pub const PAE: u64 = 1 << 5;
    /// Machine-check exceptions.
    pub const MCE: u64 = 1 << 6;
    /// Global pages.
    pub const PGE: u64 = 1 << 7;
    /// RDPMC at any CPL.
    pub const PCE: u64 = 1 << 8;
    /// FXSAVE/SSE enabled by the OS.
    pub const OSFXSR: u64 = 1 << 9;
    /// OS handles #XM.
    pub const OSXMMEXCPT: u64 = 1 << 10;
    /// SGDT, SIDT, SLDT, STR, SMSW only at CPL 0.
    pub const UMIP: u64 = 1 << 11;
    /// 5-level paging.
    pub const LA57: u64 = 1 << 12;
    /// VMX enabled.
    pub const VMXE: u64 = 1 << 13;
    /// RDFSBASE and friends.
    pub const FSGSBASE: u64 = 1 << 16;
    /// Process-context identifiers.
    pub const PCIDE: u64 = 1 << 17;
    /// XSAVE and XCR0 enabled.
    pub const OSXSAVE: u64 = 1 << 18;
    /// Supervisor may not execute user pages.
    pub const SMEP: u64 = 1 << 20;
    /// Supervisor may not access user pages.
    pub const SMAP: u64 = 1 << 21;
    /// Protection keys for user pages.
    pub const PKE: u64 = 1 << 22;
}

/// IA32_EFER.
pub mod efer {
    /// SYSCALL enabled.
    pub const SCE: u64 = 1 << 0;
    /// Long mode enabled.
    pub const LME: u64 = 1 << 8;
    /// Long mode active.
    pub const LMA: u64 = 1 << 10;
    /// No-execute pages enabled.
    pub const NXE: u64 = 1 << 11;
    /// AMD SVM enabled.
    pub const SVME: u64 = 1 << 12;
    /// AMD fast FXSAVE.
    pub const FFXSR: u64 = 1 << 14;
    /// AMD automatic IBRS.
    pub const AUTO_IBRS: u64 = 1 << 21;
}

/// DR6, the debug status register.
pub mod dr6 {
    /// Breakpoint conditions 0 to 3 detected.
    pub const B0_3: u64 = 0xf;
    /// A debug register was touched while DR7.GD was set.
    pub const BD: u64 = 1 << 13;
    /// Single step.
    pub const BS: u64 = 1 << 14;
    /// Task switch with the T flag.
    pub const BT: u64 = 1 << 15;
    /// Bits that always read as one (RTM included: no transactional memory).
    pub const FIXED: u64 = 0xffff_0ff0;
}

/// DR7, the debug control register.
pub mod dr7 {
    /// Any local or global enable of the four breakpoints.
    pub const ENABLE_MASK: u64 = 0xff;
    /// General detect: the next debug-register access raises #DB.
    pub const GD: u64 = 1 << 13;
    /// Bit that always reads as one.
    pub const FIXED: u64 = 1 << 10;
}
