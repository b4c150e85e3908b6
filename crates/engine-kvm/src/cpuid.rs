//! CPUID tables between KVM's form and [`CpuidTable`], and what this engine makes of KVM's offer.

use engine::{EngineError, Result};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use x86::cpuid::{CpuidResult, CpuidTable};
use x86::xsave::{CPUID_LEAF as XSAVE_LEAF, EXTENDED, MIN_BYTES, component};

use crate::error::host;
use crate::xsave::HostLayout;

/// The leaves with the processor's marketing name.
const BRAND_LEAVES: std::ops::RangeInclusive<u32> = 0x8000_0002..=0x8000_0004;
/// Leaf 1 ECX: the LAPIC timer has a TSC deadline mode.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 7 EBX: bound registers, whose state no snapshot carries.
const MPX: u32 = 1 << 14;
/// Leaf 7 ECX: shadow stacks, likewise.
const SHADOW_STACK: u32 = 1 << 7;
/// Leaf 7 EDX: indirect branch tracking, likewise.
const BRANCH_TRACKING: u32 = 1 << 20;
/// Leaf 7 EDX: matrix tiles (bfloat16, tiles, int8), likewise.
const MATRIX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
/// Leaf 7 subleaf 1 EDX: extended general registers, likewise.
const APX: u32 = 1 << 21;

fn kvm_table(kvm: &Kvm) -> Result<CpuidTable> {
    let offered =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(host("asking KVM for its CPUID table"))?;
    let mut table = CpuidTable::new();
    for entry in offered.as_slice() {
        let subleaf = (entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(entry.index);
        let result = CpuidResult { eax: entry.eax, ebx: entry.ebx, ecx: entry.ecx, edx: entry.edx };
        table.set(entry.function, subleaf, result);
    }
    Ok(table)
}

/// Where the host, and so KVM, places XSAVE components.
pub(crate) fn host_layout(kvm: &Kvm) -> Result<HostLayout> {
    Ok(HostLayout::from_cpuid(&kvm_table(kvm)?))
}

/// What a guest may be shown: KVM's offer without what a snapshot could not carry.
pub(crate) fn supported(kvm: &Kvm) -> Result<CpuidTable> {
    let mut table = kvm_table(kvm)?;
    if kvm.check_extension(Cap::TscDeadlineTimer) {
        table.update(1, |leaf| leaf.ecx |= TSC_DEADLINE);
    }
    if let Some(mut leaf) = table.get(7, 0) {
        leaf.ebx &= !MPX;
        leaf.ecx &= !SHADOW_STACK;
        leaf.edx &= !(BRANCH_TRACKING | MATRIX);
        table.set(7, Some(0), leaf);
    }
    if let Some(mut leaf) = table.get(7, 1) {
        leaf.edx &= !APX;
        table.set(7, Some(1), leaf);
    }
    forget_host_processor(&mut table);
    restrict_xsave(&mut table);
    if BRAND_LEAVES.clone().all(|leaf| table.lookup(leaf, 0) == CpuidResult::default()) {
        for leaf in BRAND_LEAVES {
            table.set(leaf, None, host_cpuid(leaf));
        }
    }
    Ok(table)
}

/// KVM answers with the APIC ID of whichever host processor it was asked on; a guest's comes from its topology.
fn forget_host_processor(table: &mut CpuidTable) {
    const APIC_ID: u32 = 0xff << 24;
    table.update(1, |leaf| leaf.ebx &= !APIC_ID);
    for leaf in [0xb, 0x1f, 0x8000_0026] {
        table.update(leaf, |level| level.edx = 0);
    }
    table.update(0x8000_001e, |leaf| leaf.eax = 0);
}

/// Leaves only the state components that [`x86::xsave`] has a place for.
fn restrict_xsave(table: &mut CpuidTable) {
    let Some(mut leaf) = table.get(XSAVE_LEAF, 0) else { return };
    let known = HostLayout::from_cpuid(table).known() as u32;
    leaf.eax &= known;
    leaf.edx = 0;
    let offered = leaf.eax;
    let present = |bit: u32| bit < 32 && offered & 1 << bit != 0;
    leaf.ecx = EXTENDED
        .iter()
        .filter(|c| present(c.bit))
        .filter_map(|c| table.get(XSAVE_LEAF, c.bit))
        .map(|r| r.ebx.saturating_add(r.eax))
        .max()
        .unwrap_or(MIN_BYTES as u32)
        .max(MIN_BYTES as u32);
    // KVM itself keeps EBX, the size for the current XCR0; this is its value at reset.
    leaf.ebx = MIN_BYTES as u32;
    table.set(XSAVE_LEAF, Some(0), leaf);
    if let Some(mut leaf) = table.get(XSAVE_LEAF, 1) {
        // Supervisor components.
        leaf.ecx = 0;
        leaf.edx = 0;
        table.set(XSAVE_LEAF, Some(1), leaf);
    }
    let basic = component::X87 | component::SSE;
    let gone: Vec<u32> = table
        .entries()
        .iter()
        .filter(|e| e.leaf == XSAVE_LEAF)
        .filter_map(|e| e.subleaf)
        .filter(|n| *n >= 2 && (!present(*n) || basic & 1 << *n != 0))
        .collect();
    for subleaf in gone {
        table.set(XSAVE_LEAF, Some(subleaf), CpuidResult::default());
    }
}

/// What the host's own processor answers.
pub(crate) fn host_cpuid(leaf: u32) -> CpuidResult {
    let answer = std::arch::x86_64::__cpuid(leaf);
    CpuidResult { eax: answer.eax, ebx: answer.ebx, ecx: answer.ecx, edx: answer.edx }
}

/// A table as KVM takes it.
pub(crate) fn to_kvm(table: &CpuidTable) -> Result<CpuId> {
    let entries: Vec<kvm_cpuid_entry2> = table
        .entries()
        .iter()
        .map(|entry| kvm_cpuid_entry2 {
            function: entry.leaf,
            index: entry.subleaf.unwrap_or(0),
            flags: if entry.subleaf.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            eax: entry.result.eax,
            ebx: entry.result.ebx,
            ecx: entry.result.ecx,
            edx: entry.result.edx,
            ..Default::default()
        })
        .collect();
    CpuId::from_entries(&entries).map_err(|_| {
        EngineError::Unsupported(format!(
            "the CPUID table has {} leaves; KVM takes at most {KVM_MAX_CPUID_ENTRIES}",
            entries.len()
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_offer_does_not_depend_on_the_host_processor_that_answers() {
        let mut table = CpuidTable::new();
        table.set(1, None, CpuidResult { ebx: 0x0502_0800, ..CpuidResult::default() });
        table.set(0xb, Some(0), CpuidResult { eax: 1, ebx: 2, ecx: 0x100, edx: 5 });
        assert_eq!(table.apic_id(), Some(5));
        forget_host_processor(&mut table);
        assert_eq!(table.apic_id(), Some(0));
        assert_eq!(table.lookup(1, 0).ebx, 0x0002_0800);
    }

    #[test]
    fn components_without_a_place_are_not_offered() {
        let mut table = CpuidTable::new();
        table.set(XSAVE_LEAF, Some(0), CpuidResult { eax: 0x6_0207, ebx: 0x2b00, ecx: 0x2b00, edx: 1 });
        table.set(XSAVE_LEAF, Some(1), CpuidResult { eax: 0x1f, ebx: 0, ecx: 0x1800, edx: 0 });
        table.set(XSAVE_LEAF, Some(2), CpuidResult { eax: 256, ebx: 576, ecx: 0, edx: 0 });
        table.set(XSAVE_LEAF, Some(9), CpuidResult { eax: 8, ebx: 2688, ecx: 0, edx: 0 });
        table.set(XSAVE_LEAF, Some(18), CpuidResult { eax: 8192, ebx: 2752, ecx: 6, edx: 0 });
        restrict_xsave(&mut table);
        let offer = table.lookup(XSAVE_LEAF, 0);
        assert_eq!((offer.eax, offer.ebx, offer.ecx, offer.edx), (0x207, 576, 2696, 0));
        assert_eq!(table.lookup(XSAVE_LEAF, 18), CpuidResult::default());
        assert_eq!(table.lookup(XSAVE_LEAF, 1).ecx, 0, "no supervisor components");
    }
}
