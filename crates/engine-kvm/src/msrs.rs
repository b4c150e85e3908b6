//! Model-specific registers that belong to a vCPU's state.

use engine::{EngineError, Result};
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use x86::msr;

use crate::error::host;

/// Memory types, which KVM keeps but lists only in recent kernels.
const MTRRS: [u32; 28] = {
    let mut list = [0; 28];
    let mut n = 0;
    while n < 16 {
        list[n] = msr::MTRR_PHYSBASE0 + n as u32;
        n += 1;
    }
    list[16] = msr::MTRR_FIX64K_00000;
    list[17] = msr::MTRR_FIX16K_80000;
    list[18] = msr::MTRR_FIX16K_A0000;
    n = 0;
    while n < 8 {
        list[19 + n] = msr::MTRR_FIX4K_C0000 + n as u32;
        n += 1;
    }
    list[27] = msr::MTRR_DEF_TYPE;
    list
};

/// MSRs that have a field of their own in [`engine::VcpuState`].
const ELSEWHERE: [u32; 4] = [msr::EFER, msr::FS_BASE, msr::GS_BASE, msr::APIC_BASE];

/// MSRs that describe the processor or KVM to the guest: they follow from host and CPUID, not from what the guest
/// did, and loading an older value of them is either refused or wrong.
const DESCRIPTIONS: [u32; 8] = [
    msr::BIOS_SIGN_ID,
    0xce, // MSR_PLATFORM_INFO
    msr::MTRRCAP,
    msr::ARCH_CAPABILITIES,
    msr::MCG_CAP,
    0x345,       // IA32_PERF_CAPABILITIES
    0xcf,        // IA32_CORE_CAPABILITIES
    0x4b56_4d05, // MSR_KVM_POLL_CONTROL's reset value is not zero and nobody depends on it
];

/// First and last of KVM's own MSRs: part of the state only when the guest has set them.
const KVM_OWN: std::ops::RangeInclusive<u32> = 0x4b56_4d00..=0x4b56_4dff;

/// Most entries that one KVM_GET_MSRS takes is 256; we ask one at a time where refusals are expected.
const BATCH: usize = 128;

/// The MSRs to save: what KVM lists and what it keeps without listing.
pub(crate) fn state_msrs(kvm: &Kvm) -> Result<Vec<u32>> {
    let listed = kvm.get_msr_index_list().map_err(host("listing KVM's MSRs"))?;
    let mut wanted: Vec<u32> = listed.as_slice().to_vec();
    let unlisted = [msr::PAT, msr::KERNEL_GS_BASE, msr::TSC, msr::TSC_ADJUST, msr::TSC_DEADLINE];
    for index in MTRRS.into_iter().chain(unlisted) {
        if !wanted.contains(&index) {
            wanted.push(index);
        }
    }
    wanted.retain(|index| {
        !ELSEWHERE.contains(index)
            && !DESCRIPTIONS.contains(index)
            && !is_performance_counter(*index)
            && !is_hyperv(*index)
            && !(msr::X2APIC_BASE..=msr::X2APIC_END).contains(index)
            && !is_vmx_capability(*index)
    });
    Ok(wanted)
}

/// Performance monitoring is not shown to guests.
fn is_performance_counter(index: u32) -> bool {
    matches!(index, 0xc1..=0xc8 | 0x186..=0x18d | 0x309..=0x30c | 0x38d..=0x392 | 0x3f1..=0x3f7 | 0x4c1..=0x4c8
        | 0xc001_0000..=0xc001_0007 | 0xc001_0200..=0xc001_020b | 0xc000_0300..=0xc000_0303)
}

/// Hyper-V's MSRs are not shown to guests.
fn is_hyperv(index: u32) -> bool {
    (0x4000_0000..=0x4000_01ff).contains(&index)
}

/// VMX capability registers describe.
fn is_vmx_capability(index: u32) -> bool {
    (0x480..=0x493).contains(&index)
}

fn entries(pairs: impl Iterator<Item = (u32, u64)>) -> Vec<kvm_msr_entry> {
    pairs.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect()
}

fn fam(entries: &[kvm_msr_entry]) -> Result<Msrs> {
    Msrs::from_entries(entries).map_err(|_| EngineError::InvalidState("too many MSRs".into()))
}

/// Reads those of `wanted` that the vCPU has. KVM stops at the first it does not have; that one is passed over.
pub(crate) fn read(vcpu: &VcpuFd, wanted: &[u32]) -> Result<Vec<(u32, u64)>> {
    let mut values = Vec::with_capacity(wanted.len());
    let mut rest = wanted;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH)];
        let mut msrs = fam(&entries(batch.iter().map(|index| (*index, 0))))?;
        let done = vcpu.get_msrs(&mut msrs).map_err(host("reading MSRs"))?.min(batch.len());
        for entry in &msrs.as_slice()[..done] {
            if !KVM_OWN.contains(&entry.index) || entry.data != 0 {
                values.push((entry.index, entry.data));
            }
        }
        rest = &rest[if done < batch.len() { done + 1 } else { done }..];
    }
    Ok(values)
}

/// Writes MSRs in the order given. One that the vCPU does not have may be passed over if its value is zero or if
/// it only describes; otherwise the guest would miss it.
pub(crate) fn write(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<()> {
    let mut rest = values;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH)];
        let msrs = fam(&entries(batch.iter().copied()))?;
        let done = vcpu.set_msrs(&msrs).map_err(host("writing MSRs"))?.min(batch.len());
        if done == batch.len() {
            rest = &rest[done..];
            continue;
        }
        let (index, value) = batch[done];
        if value != 0 && !DESCRIPTIONS.contains(&index) {
            return Err(EngineError::InvalidState(format!(
                "KVM on this host refuses value {value:#x} for MSR {index:#x}; the state needs a processor that has it"
            )));
        }
        rest = &rest[done + 1..];
    }
    Ok(())
}
