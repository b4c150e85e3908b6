//! Model-specific register addresses (SDM 4, APM 2 appendix A).
#![allow(missing_docs)]

pub const TSC: u32 = 0x10;
pub const APIC_BASE: u32 = 0x1b;
pub const FEATURE_CONTROL: u32 = 0x3a;
pub const TSC_ADJUST: u32 = 0x3b;
pub const SPEC_CTRL: u32 = 0x48;
pub const PRED_CMD: u32 = 0x49;
pub const BIOS_UPDT_TRIG: u32 = 0x79;
pub const BIOS_SIGN_ID: u32 = 0x8b;
pub const MTRRCAP: u32 = 0xfe;
pub const ARCH_CAPABILITIES: u32 = 0x10a;
pub const SYSENTER_CS: u32 = 0x174;
pub const SYSENTER_ESP: u32 = 0x175;
pub const SYSENTER_EIP: u32 = 0x176;
pub const MCG_CAP: u32 = 0x179;
pub const MCG_STATUS: u32 = 0x17a;
pub const MISC_ENABLE: u32 = 0x1a0;
pub const DEBUGCTL: u32 = 0x1d9;
pub const MTRR_PHYSBASE0: u32 = 0x200;
pub const MTRR_PHYSMASK7: u32 = 0x20f;
pub const MTRR_FIX64K_00000: u32 = 0x250;
pub const MTRR_FIX16K_80000: u32 = 0x258;
pub const MTRR_FIX16K_A0000: u32 = 0x259;
pub const MTRR_FIX4K_C0000: u32 = 0x268;
pub const MTRR_FIX4K_F8000: u32 = 0x26f;
pub const PAT: u32 = 0x277;
pub const MTRR_DEF_TYPE: u32 = 0x2ff;
pub const MC0_CTL: u32 = 0x400;
pub const TSC_DEADLINE: u32 = 0x6e0;
/// First of the x2APIC registers: xAPIC offset `0x10 * n` is MSR `X2APIC_BASE + n`.
pub const X2APIC_BASE: u32 = 0x800;
pub const X2APIC_END: u32 = 0x8ff;
pub const XSS: u32 = 0xda0;
pub const EFER: u32 = 0xc000_0080;
pub const STAR: u32 = 0xc000_0081;
pub const LSTAR: u32 = 0xc000_0082;
pub const CSTAR: u32 = 0xc000_0083;
pub const SFMASK: u32 = 0xc000_0084;
pub const FS_BASE: u32 = 0xc000_0100;
pub const GS_BASE: u32 = 0xc000_0101;
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
pub const TSC_AUX: u32 = 0xc000_0103;
pub const SYSCFG: u32 = 0xc001_0010;
pub const HWCR: u32 = 0xc001_0015;
pub const PATCH_LEVEL: u32 = 0x8b;
pub const VM_CR: u32 = 0xc001_0114;
pub const DE_CFG: u32 = 0xc001_1029;

/// Bits of [`APIC_BASE`].
pub mod apic_base {
    /// This is the bootstrap processor.
    pub const BSP: u64 = 1 << 8;
    /// x2APIC mode.
    pub const EXTD: u64 = 1 << 10;
    /// APIC enabled.
    pub const EN: u64 = 1 << 11;
    /// Physical address of the xAPIC page.
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    /// Where the page is after reset.
    pub const DEFAULT_ADDRESS: u64 = 0xfee0_0000;
}

/// Configuration registers of AMD processors (BIOS and Kernel Developer's Guides, Processor Programming References).
pub mod amd {
    pub const NB_CFG: u32 = 0xc001_001f;
    pub const INT_PENDING: u32 = 0xc001_0055;
    pub const MMIO_CONFIG_BASE: u32 = 0xc001_0058;
    pub const OSVW_ID_LENGTH: u32 = 0xc001_0140;
    pub const OSVW_STATUS: u32 = 0xc001_0141;
    pub const LS_CFG: u32 = 0xc001_1020;
    pub const IC_CFG: u32 = 0xc001_1021;
    pub const DC_CFG: u32 = 0xc001_1022;
    pub const BU_CFG2: u32 = 0xc001_102a;
}
