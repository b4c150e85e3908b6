//! The processor that the guest sees, and its state at power-on.

use boot::{EntryState, MemoryLayout, mtrr_msrs};
use config::VmSettings;
use engine::{Engine, EngineKind, Vcpu};
use x86::cpuid::CpuidTable;
use x86::cpuid::model::{FeatureList, Model, ModelOptions};

use crate::MachineError;

/// CPUID leaf with the width of physical addresses in EAX bits 0–7 (SDM 2A "CPUID").
const ADDRESS_SIZES_LEAF: u32 = 0x8000_0008;
/// What a processor without that leaf has.
const DEFAULT_ADDRESS_BITS: u32 = 36;

/// The list of features to add and remove.
///
/// # Errors
/// It names a feature that there is not.
pub(crate) fn features(settings: &VmSettings) -> Result<FeatureList, MachineError> {
    let item = |f: &config::settings::CpuFeature| format!("{}{}", if f.add { '+' } else { '-' }, f.name);
    let list: Vec<String> = settings.cpu_features.0.iter().map(item).collect();
    Ok(FeatureList::parse(&list.join(","))?)
}

/// Fits the engine's processor to the settings.
///
/// # Errors
/// The engine cannot say what it offers, the feature list asks for more, or physical addresses are too narrow for
/// the memory.
pub(crate) fn model(
    engine: &dyn Engine,
    settings: &VmSettings,
    features: &FeatureList,
    layout: &MemoryLayout,
) -> Result<Model, MachineError> {
    let supported = engine.supported_cpuid().map_err(MachineError::engine(engine.kind()))?;
    let options =
        ModelOptions { topology: settings.topology, x2apic: settings.x2apic, features: features.clone() };
    let model = Model::new(&supported, &options)?;
    let (needed, offered) = (layout.physical_address_bits(), address_bits(&model.table(0)));
    if needed > offered {
        return Err(MachineError::AddressBits { asked: layout.total_bytes(), needed, offered });
    }
    Ok(model)
}

fn address_bits(table: &CpuidTable) -> u32 {
    table.get(ADDRESS_SIZES_LEAF, 0).map_or(DEFAULT_ADDRESS_BITS, |leaf| leaf.eax & 0xff)
}

/// Brings a new vCPU into the state that firmware leaves it in: memory types on all, the guest's entry on the first.
pub(crate) fn power_on(
    kind: EngineKind,
    vcpu: &mut dyn Vcpu,
    table: &CpuidTable,
    entry: &EntryState,
) -> Result<(), MachineError> {
    let failed = MachineError::engine(kind);
    let mut state = vcpu.state().map_err(&failed)?;
    for (index, value) in mtrr_msrs(address_bits(table)) {
        state.set_msr(index, value);
    }
    if vcpu.id() == 0 {
        entry.apply(&mut state);
    }
    vcpu.set_state(&state).map_err(failed)
}

/// What the firmware tables repeat of CPUID.
pub(crate) fn describe(table: &CpuidTable) -> boot::platform::Processor {
    let text = |registers: &[u32]| {
        let bytes: Vec<u8> = registers.iter().flat_map(|r| r.to_le_bytes()).collect();
        let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..end]).trim().to_owned()
    };
    let vendor = table.lookup(0, 0);
    let brand: Vec<u32> = (0x8000_0002..=0x8000_0004)
        .map(|leaf| table.lookup(leaf, 0))
        .flat_map(|r| [r.eax, r.ebx, r.ecx, r.edx])
        .collect();
    let leaf1 = table.lookup(1, 0);
    boot::platform::Processor {
        signature: leaf1.eax,
        features: leaf1.edx,
        vendor: text(&[vendor.ebx, vendor.edx, vendor.ecx]),
        brand: text(&brand),
    }
}
