//! Model-specific registers (SDM 4, APM 2 appendix A).

use std::sync::atomic::Ordering;

use x86::bits::{cr0, efer};
use x86::msr;

use crate::cpu::{Cpu, seg};

/// Registers that are only stored: PAT, MTRRs, machine check, and the like, with their reset values.
#[derive(Clone, Debug)]
pub struct Msrs {
    /// STAR.
    pub star: u64,
    /// LSTAR.
    pub lstar: u64,
    /// CSTAR.
    pub cstar: u64,
    /// SFMASK.
    pub sfmask: u64,
    /// KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// SYSENTER_CS.
    pub sysenter_cs: u64,
    /// SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// TSC_AUX.
    pub tsc_aux: u64,
    /// TSC_ADJUST: what writes to it and to TSC have added to the TSC.
    pub tsc_adjust: u64,
    /// SPEC_CTRL.
    pub spec_ctrl: u64,
    /// PAT.
    pub pat: u64,
    /// MTRR_DEF_TYPE.
    pub mtrr_default: u64,
    /// The eight variable ranges: base and mask alternately.
    pub mtrr_variable: [u64; 16],
    /// Fixed ranges in order of their addresses.
    pub mtrr_fixed: [u64; 11],
    /// MCG_STATUS.
    pub mcg_status: u64,
    /// MISC_ENABLE.
    pub misc_enable: u64,
    /// Machine-check banks: CTL, STATUS, ADDR, MISC of each.
    pub banks: [u64; 4 * BANKS],
}

/// CPUID leaf 7 EBX: there is a TSC_ADJUST.
const TSC_ADJUST: u32 = 1 << 1;
/// CPUID leaf 7 EDX: there are SPEC_CTRL and PRED_CMD.
const SPECULATION_CONTROL: u32 = 1 << 26;
/// CPUID leaf 7 EDX: there is ARCH_CAPABILITIES.
const ARCH_CAPABILITIES: u32 = 1 << 29;
/// Bits of ARCH_CAPABILITIES (SDM 4): RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, IF_PSCHANGE_MC_NO, TAA_NO,
/// SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO.
const UNAFFECTED: u64 = 1 << 0
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;
/// CPUID leaf 80000021H EAX: EFER has an automatic IBRS.
const AUTO_IBRS: u32 = 1 << 8;
/// SPEC_CTRL.IBRS.
const IBRS: u64 = 1 << 0;
/// PRED_CMD.IBPB.
const IBPB: u64 = 1 << 0;
/// HWCR.TscFreqSel: the TSC counts at the frequency of the highest performance state.
const HWCR_TSC_AT_P0: u64 = 1 << 24;
/// DE_CFG: LFENCE waits for all earlier instructions.
const DE_CFG_LFENCE_SERIALISES: u64 = 1 << 1;
/// Configuration registers of AMD processors that operating systems read and write without asking CPUID: there is
/// nothing behind them, so they read as zero and keep nothing.
const READ_AS_ZERO: [u32; 11] = [
    msr::SYSCFG,
    msr::VM_CR,
    msr::amd::NB_CFG,
    msr::amd::MMIO_CONFIG_BASE,
    msr::amd::INT_PENDING,
    msr::amd::OSVW_ID_LENGTH,
    msr::amd::OSVW_STATUS,
    msr::amd::LS_CFG,
    msr::amd::IC_CFG,
    msr::amd::DC_CFG,
    msr::amd::BU_CFG2,
];
/// Machine-check banks that MCG_CAP reports.
const BANKS: usize = 10;
/// MCG_CAP: the banks, and MCG_CTL absent.
const MCG_CAP: u64 = BANKS as u64;
/// MTRRCAP: eight variable ranges, fixed ranges, write-combining.
const MTRR_CAP: u64 = 8 | 1 << 8 | 1 << 10;
/// Addresses of the fixed-range MTRRs.
const FIXED: [u32; 11] = [
    msr::MTRR_FIX64K_00000,
    msr::MTRR_FIX16K_80000,
    msr::MTRR_FIX16K_A0000,
    0x268,
    0x269,
    0x26a,
    0x26b,
    0x26c,
    0x26d,
    0x26e,
    msr::MTRR_FIX4K_F8000,
];

impl Default for Msrs {
    fn default() -> Self {
        Msrs {
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            tsc_aux: 0,
            tsc_adjust: 0,
            spec_ctrl: 0,
            pat: 0x0007_0406_0007_0406,
            mtrr_default: 0,
            mtrr_variable: [0; 16],
            mtrr_fixed: [0; 11],
            mcg_status: 0,
            misc_enable: 1,
            banks: [0; 4 * BANKS],
        }
    }
}

/// Why an access is #GP(0), unless the machine is lenient about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadMsr {
    /// This CPU has no such register.
    Unknown,
    /// The register exists but not now, or it cannot hold the value.
    Refused,
}

/// Registers that [`Cpu::saved_msrs`] carries, besides those of the LAPIC.
const SAVED: [u32; 17] = [
    msr::TSC,
    msr::TSC_ADJUST,
    msr::TSC_AUX,
    msr::STAR,
    msr::LSTAR,
    msr::CSTAR,
    msr::SFMASK,
    msr::KERNEL_GS_BASE,
    msr::SYSENTER_CS,
    msr::SYSENTER_ESP,
    msr::SYSENTER_EIP,
    msr::PAT,
    msr::MTRR_DEF_TYPE,
    msr::MCG_STATUS,
    msr::MISC_ENABLE,
    msr::APIC_BASE,
    msr::TSC_DEADLINE,
];

/// Whether every byte is a memory type that PAT knows (SDM 3A §11.12.2).
fn is_pat(value: u64) -> bool {
    value.to_le_bytes().iter().all(|t| matches!(t, 0 | 1 | 4..=7))
}

impl Cpu {
    /// Reads a register.
    ///
    /// # Errors
    /// It does not exist.
    pub fn read_msr(&mut self, index: u32) -> Result<u64, BadMsr> {
        if crate::chips::Chips::handles_msr(index) {
            return self.shared.chips.read_msr(self.id, index).map_err(|_| BadMsr::Refused);
        }
        let m = &self.msrs;
        Ok(match index {
            msr::TSC => self.tsc(),
            msr::TSC_ADJUST if self.has_tsc_adjust() => m.tsc_adjust,
            msr::SPEC_CTRL if self.has_feature(SPECULATION_CONTROL) => m.spec_ctrl,
            msr::ARCH_CAPABILITIES if self.has_feature(ARCH_CAPABILITIES) => UNAFFECTED,
            msr::EFER => self.control.efer,
            msr::STAR => m.star,
            msr::LSTAR => m.lstar,
            msr::CSTAR => m.cstar,
            msr::SFMASK => m.sfmask,
            msr::FS_BASE => self.segments[seg::FS].base,
            msr::GS_BASE => self.segments[seg::GS].base,
            msr::KERNEL_GS_BASE => m.kernel_gs_base,
            msr::TSC_AUX => m.tsc_aux,
            msr::SYSENTER_CS => m.sysenter_cs,
            msr::SYSENTER_ESP => m.sysenter_esp,
            msr::SYSENTER_EIP => m.sysenter_eip,
            msr::PAT => m.pat,
            msr::MTRRCAP => MTRR_CAP,
            msr::MTRR_DEF_TYPE => m.mtrr_default,
            msr::MTRR_PHYSBASE0..=msr::MTRR_PHYSMASK7 => {
                m.mtrr_variable[(index - msr::MTRR_PHYSBASE0) as usize]
            }
            msr::MCG_CAP => MCG_CAP,
            msr::MCG_STATUS => m.mcg_status,
            msr::MISC_ENABLE => m.misc_enable,
            // No microcode update can be loaded; revision zero says so.
            msr::BIOS_SIGN_ID | msr::BIOS_UPDT_TRIG | msr::DEBUGCTL => 0,
            msr::HWCR => HWCR_TSC_AT_P0,
            msr::DE_CFG => DE_CFG_LFENCE_SERIALISES,
            _ if READ_AS_ZERO.contains(&index) => 0,
            _ => {
                if let Some(fixed) = FIXED.iter().position(|f| *f == index) {
                    m.mtrr_fixed[fixed]
                } else {
                    let bank = index.checked_sub(msr::MC0_CTL).map(|b| b as usize);
                    *bank.and_then(|b| m.banks.get(b)).ok_or(BadMsr::Unknown)?
                }
            }
        })
    }

    /// Writes a register.
    ///
    /// # Errors
    /// It does not exist, or the value has reserved bits.
    pub fn write_msr(&mut self, index: u32, value: u64) -> Result<(), BadMsr> {
        if crate::chips::Chips::handles_msr(index) {
            return self.shared.chips.write_msr(self.id, index, value).map_err(|_| BadMsr::Refused);
        }
        let canonical = Cpu::is_canonical(value);
        let require = |ok: bool| if ok { Ok(()) } else { Err(BadMsr::Refused) };
        match index {
            // Either register moves with the other (SDM 3B §18.17.3).
            msr::TSC => self.move_tsc(value.wrapping_sub(self.tsc())),
            msr::TSC_ADJUST if self.has_tsc_adjust() => {
                self.move_tsc(value.wrapping_sub(self.msrs.tsc_adjust))
            }
            msr::SPEC_CTRL if self.has_feature(SPECULATION_CONTROL) => {
                require(value & !IBRS == 0)?;
                self.msrs.spec_ctrl = value;
            }
            // There is nothing to forget.
            msr::PRED_CMD if self.has_feature(SPECULATION_CONTROL) => require(value & !IBPB == 0)?,
            msr::EFER => self.write_efer(value)?,
            msr::STAR => self.msrs.star = value,
            msr::LSTAR => {
                require(canonical)?;
                self.msrs.lstar = value;
            }
            msr::CSTAR => {
                require(canonical)?;
                self.msrs.cstar = value;
            }
            msr::SFMASK => self.msrs.sfmask = value & 0xffff_ffff,
            msr::FS_BASE | msr::GS_BASE => {
                require(canonical)?;
                let index = if index == msr::FS_BASE { seg::FS } else { seg::GS };
                self.segments[index].base = value;
                self.user.segment_base[index] = value;
            }
            msr::KERNEL_GS_BASE => {
                require(canonical)?;
                self.msrs.kernel_gs_base = value;
            }
            msr::TSC_AUX => self.msrs.tsc_aux = value & 0xffff_ffff,
            msr::SYSENTER_CS => self.msrs.sysenter_cs = value & 0xffff_ffff,
            msr::SYSENTER_ESP => {
                require(canonical)?;
                self.msrs.sysenter_esp = value;
            }
            msr::SYSENTER_EIP => {
                require(canonical)?;
                self.msrs.sysenter_eip = value;
            }
            msr::PAT => {
                require(is_pat(value))?;
                self.msrs.pat = value;
            }
            msr::MTRR_DEF_TYPE => {
                require(value & !0xcff == 0)?;
                self.msrs.mtrr_default = value;
            }
            msr::MTRR_PHYSBASE0..=msr::MTRR_PHYSMASK7 => {
                require(value & self.reserved_physical == 0)?;
                self.msrs.mtrr_variable[(index - msr::MTRR_PHYSBASE0) as usize] = value;
            }
            msr::MCG_STATUS => self.msrs.mcg_status = value,
            msr::MISC_ENABLE => self.msrs.misc_enable = value,
            msr::BIOS_SIGN_ID | msr::BIOS_UPDT_TRIG | msr::DEBUGCTL | msr::HWCR | msr::DE_CFG => {}
            msr::SYSCFG | msr::VM_CR => require(value == 0)?,
            _ if READ_AS_ZERO.contains(&index) => {}
            _ => {
                if let Some(fixed) = FIXED.iter().position(|f| *f == index) {
                    self.msrs.mtrr_fixed[fixed] = value;
                } else {
                    let bank = index.checked_sub(msr::MC0_CTL).map(|b| b as usize);
                    *bank.and_then(|b| self.msrs.banks.get_mut(b)).ok_or(BadMsr::Unknown)? = value;
                }
            }
        }
        Ok(())
    }

    /// Whether the model has a feature of leaf 7 EDX.
    fn has_feature(&self, bit: u32) -> bool {
        self.cpuid.lookup(7, 0).edx & bit != 0
    }

    /// Whether the model has TSC_ADJUST.
    fn has_tsc_adjust(&self) -> bool {
        self.cpuid.lookup(7, 0).ebx & TSC_ADJUST != 0
    }

    /// Adds to the TSC, as a write of the guest does.
    fn move_tsc(&mut self, delta: u64) {
        self.msrs.tsc_adjust = self.msrs.tsc_adjust.wrapping_add(delta);
        self.set_tsc_offset(self.tsc_offset.wrapping_add(delta));
    }

    /// Loads TSC_ADJUST from saved state, where the TSC comes separately.
    ///
    /// # Errors
    /// The model does not have it.
    pub fn load_tsc_adjust(&mut self, value: u64) -> Result<(), BadMsr> {
        if value != 0 && !self.has_tsc_adjust() {
            return Err(BadMsr::Unknown);
        }
        self.msrs.tsc_adjust = value;
        Ok(())
    }

    /// Sets what the guest's TSC is ahead of the host's.
    pub fn set_tsc_offset(&mut self, offset: u64) {
        self.tsc_offset = offset;
        self.shared.vcpus[self.id as usize].tsc_offset.store(offset, Ordering::Relaxed);
        self.shared.chips.tsc_changed(self.id);
    }

    fn write_efer(&mut self, value: u64) -> Result<(), BadMsr> {
        const ALWAYS: u64 = efer::SCE | efer::LME | efer::NXE | efer::FFXSR;
        let auto_ibrs = self.cpuid.lookup(0x8000_0021, 0).eax & AUTO_IBRS != 0;
        let writable = ALWAYS | if auto_ibrs { efer::AUTO_IBRS } else { 0 };
        let old = self.control.efer;
        if value & !(writable | efer::LMA) != 0 {
            return Err(BadMsr::Refused);
        }
        if (value ^ old) & efer::LME != 0 && self.control.cr0 & cr0::PG != 0 {
            return Err(BadMsr::Refused);
        }
        self.control.efer = value & writable | old & efer::LMA;
        if (value ^ old) & efer::NXE != 0 {
            self.flush_translations(false);
        }
        self.update_mode();
        Ok(())
    }

    /// All registers that a snapshot carries.
    pub fn saved_msrs(&mut self) -> Vec<(u32, u64)> {
        let variable = msr::MTRR_PHYSBASE0..=msr::MTRR_PHYSMASK7;
        let indexes: Vec<u32> = SAVED.into_iter().chain(variable).chain(FIXED).collect();
        indexes.into_iter().filter_map(|i| self.read_msr(i).ok().map(|v| (i, v))).collect()
    }
}
