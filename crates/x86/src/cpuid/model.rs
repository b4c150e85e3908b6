//! What CPUID tells a guest: the engine's offer, cut down and fitted to the guest's topology and feature list.
//!
//! Vendor, family and brand string stay the host's, so that a guest picks the errata workarounds and code paths that
//! suit the processor it really runs on. What bhyve hides (virtualization, MWAIT, performance and thermal monitoring)
//! is hidden unless asked for. Leaves follow SDM 2A "CPUID" and APM 3 appendix E; hypervisor leaves follow bhyve(8)'s
//! kernel side, with KVM's own (Linux `Documentation/virt/kvm/x86/cpuid.rst`) behind them where the feature list
//! asks for one.
//!
//! Bits that follow CR4 and XCR0 (OSXSAVE, OSPKE, the current XSAVE size) are left at their reset values: engines
//! keep them.

use super::features::{self, Feature, KVM_FEATURE_LEAF, Register};
use super::topology::{MAX_XAPIC_ID, Topology};
use super::{CpuidResult, CpuidTable};
use crate::xsave;

/// Why a guest's CPUID cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// The list has an item that is not a sign and a name.
    #[error("`{item}` in the CPU feature list is not of the form +NAME or -NAME (as in `+avx2,-x2apic`)")]
    Syntax {
        /// The item as given.
        item: String,
    },
    /// There is no such feature.
    #[error("CPU feature `{name}` is not known{}", close_matches(similar))]
    Unknown {
        /// The name as given.
        name: String,
        /// Known names that resemble it.
        similar: Vec<&'static str>,
    },
    /// The engine or the host does not have it.
    #[error(
        "CPU feature `{name}` was asked for, but the host's processor or the engine does not offer it: \
         remove +{name}"
    )]
    NotOffered {
        /// Its usual name.
        name: &'static str,
    },
    /// A feature is asked for together with the removal of one that it needs.
    #[error("CPU feature `{name}` was asked for, but it needs `{needs}`, which is switched off")]
    Conflict {
        /// The feature asked for.
        name: &'static str,
        /// What is missing.
        needs: &'static str,
    },
    /// So many processors need x2APIC mode.
    #[error(
        "{vcpus} vCPUs in this topology need APIC IDs up to {max_apic_id}, beyond the {MAX_XAPIC_ID} that xAPIC mode \
         has: switch x2APIC on (-x) or use fewer"
    )]
    NeedsX2apic {
        /// Processors of the topology.
        vcpus: u32,
        /// The highest APIC ID.
        max_apic_id: u32,
    },
    /// The topology has a zero or is too large to number.
    #[error(
        "a topology of {0:?} cannot be numbered: each part must be at least 1, and APIC IDs have 32 bits"
    )]
    Topology(Topology),
}

fn close_matches(similar: &[&str]) -> String {
    match similar {
        [] => String::new(),
        some => format!("; did you mean {}?", some.join(", ")),
    }
}

/// One item of a feature list.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Wish {
    feature: Feature,
    on: bool,
}

/// A list like `+avx2,-x2apic,+kvmclock`. Later items override earlier ones.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FeatureList {
    wishes: Vec<Wish>,
}

impl FeatureList {
    /// Parses a list; an empty one wishes nothing. See [`features`] for the names.
    ///
    /// # Errors
    /// An item without a sign or a name, or a name that is not known.
    pub fn parse(list: &str) -> Result<FeatureList, ModelError> {
        let mut wishes: Vec<Wish> = Vec::new();
        for item in list.split(',').map(str::trim).filter(|item| !item.is_empty()) {
            let syntax = || ModelError::Syntax { item: item.to_owned() };
            let (on, name) = match item.split_at_checked(1).ok_or_else(syntax)? {
                ("+", name) => (true, name),
                ("-", name) => (false, name),
                _ => return Err(syntax()),
            };
            if name.is_empty() {
                return Err(syntax());
            }
            let feature = features::find(name).ok_or_else(|| ModelError::Unknown {
                name: name.to_owned(),
                similar: features::similar(name),
            })?;
            wishes.retain(|wish| wish.feature != feature);
            wishes.push(Wish { feature, on });
        }
        Ok(FeatureList { wishes })
    }

    /// Whether the list switches a feature (given by its usual name) on or off.
    pub fn wish(&self, name: &str) -> Option<bool> {
        self.wishes.iter().find(|wish| wish.feature.name == name).map(|wish| wish.on)
    }
}

/// What a guest's CPUID depends on beside the engine.
#[derive(Clone, Debug)]
pub struct ModelOptions {
    /// Sockets, cores, threads.
    pub topology: Topology,
    /// Offer x2APIC mode (`-x`, variable `x86.x2apic`); the feature list overrides it.
    pub x2apic: bool,
    /// Additions and removals.
    pub features: FeatureList,
}

/// The CPUID of a guest, from which each vCPU's table is derived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    /// Everything that is the same for all vCPUs.
    common: CpuidTable,
    topology: Topology,
    vendor: Vendor,
}

/// Whose conventions the topology and cache leaves follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// Intel, and makers that follow it.
    Intel,
    /// AMD and Hygon.
    Amd,
}

impl Vendor {
    /// The vendor that leaf 0 names.
    pub fn of(table: &CpuidTable) -> Vendor {
        let name = table.lookup(0, 0);
        let name = signature_text([name.ebx, name.edx, name.ecx]);
        if name == *b"AuthenticAMD" || name == *b"HygonGenuine" { Vendor::Amd } else { Vendor::Intel }
    }
}

/// bhyve's signature in the hypervisor leaves.
pub const BHYVE_SIGNATURE: [u8; 12] = *b"bhyve bhyve ";
/// KVM's.
pub const KVM_SIGNATURE: [u8; 12] = *b"KVMKVMKVM\0\0\0";
/// First hypervisor leaf; a second hypervisor interface follows at a distance of 100H.
const HYPERVISOR_BASE: u32 = 0x4000_0000;
const KVM_BASE: u32 = 0x4000_0100;

/// Features that a guest does not get unless its list asks for them; the first two give nested virtualization.
const HIDDEN: [&str; 29] = [
    "vmx",
    "svm",
    "monitor",
    "mwaitx",
    "dtes64",
    "ds_cpl",
    "smx",
    "est",
    "tm2",
    "cid",
    "sdbg",
    "xtpr",
    "pdcm",
    "dca",
    "dts",
    "acpi",
    "tm",
    "pbe",
    "extapic",
    "osvw",
    "ibs",
    "skinit",
    "wdt",
    "lwp",
    "nodeid_msr",
    "perfctr_core",
    "perfctr_nb",
    "ptsc",
    "perfctr_llc",
];

/// Leaf 1 EBX fields.
const CLFLUSH_SIZE: u32 = 0xff00;
const LOGICAL_COUNT_SHIFT: u32 = 16;
const APIC_ID_SHIFT: u32 = 24;
/// Leaf 1 ECX: XSAVE enabled in CR4; kept by engines.
const OSXSAVE: u32 = 1 << 27;
/// Leaf 1 EDX: the logical count is meaningful.
const HTT: u32 = 1 << 28;
/// Leaf 7 ECX: protection keys enabled in CR4; kept by engines.
const OSPKE: u32 = 1 << 4;
/// Leaf 80000001H ECX: the core count in leaf 80000008H is meaningful.
const CMP_LEGACY: u32 = 1 << 1;

/// Topology leaves.
const TOPOLOGY_LEAF: u32 = 0xb;
const TOPOLOGY_LEAF_V2: u32 = 0x1f;
const AMD_TOPOLOGY_LEAF: u32 = 0x8000_0026;
/// Level types of leaf 0BH and 1FH.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// Leaves that pass from the engine's table if it has them; all others stay away from the guest.
const PASSED: [u32; 28] = [
    0,
    1,
    2,
    4,
    6,
    7,
    xsave::CPUID_LEAF,
    0x15,
    0x16,
    0x18,
    TOPOLOGY_LEAF_V2,
    0x24,
    0x8000_0000,
    0x8000_0001,
    0x8000_0002,
    0x8000_0003,
    0x8000_0004,
    0x8000_0005,
    0x8000_0006,
    0x8000_0007,
    0x8000_0008,
    0x8000_000a,
    0x8000_0019,
    0x8000_001a,
    0x8000_001d,
    0x8000_001e,
    0x8000_0021,
    AMD_TOPOLOGY_LEAF,
];

impl Model {
    /// Fits `supported`, an engine's offer, to a guest.
    ///
    /// # Errors
    /// The feature list asks for what is not offered or contradicts itself, or the topology cannot be numbered.
    pub fn new(supported: &CpuidTable, options: &ModelOptions) -> Result<Model, ModelError> {
        let topology = options.topology;
        check_topology(topology)?;
        let mut list = options.features.clone();
        if let (None, Some(feature)) = (list.wish("x2apic"), features::find("x2apic")) {
            let offered = is_set(supported, &feature);
            // Asked for by an option, not by name: nothing to refuse unless the number of processors needs it.
            list.wishes.push(Wish { feature, on: options.x2apic && offered });
        }
        let max_apic_id = topology.max_apic_id();
        if max_apic_id > MAX_XAPIC_ID && list.wish("x2apic") != Some(true) {
            return Err(ModelError::NeedsX2apic { vcpus: topology.vcpus(), max_apic_id });
        }

        let mut common = CpuidTable::new();
        for entry in
            supported.entries().iter().filter(|e| PASSED.contains(&e.leaf) && table_has(supported, e.leaf))
        {
            common.set(entry.leaf, entry.subleaf, entry.result);
        }
        let vendor = Vendor::of(supported);
        common.update(1, |leaf| leaf.ecx &= !OSXSAVE);
        change(&mut common, 7, Some(0), |leaf| leaf.ecx &= !OSPKE);
        // Of leaf 6 (power management) only what is a named feature remains.
        common.update(6, |leaf| *leaf = CpuidResult { eax: leaf.eax & ARAT, ..CpuidResult::default() });
        common.update(0x8000_0007, |leaf| *leaf = CpuidResult { edx: leaf.edx, ..CpuidResult::default() });

        let kvm_features = choose(&mut common, supported, &list)?;
        hypervisor_leaves(&mut common, kvm_features);
        fit_xsave(&mut common);
        if !named(&common, "svm") {
            common.remove(0x8000_000a);
        }
        fit_topology(&mut common, vendor, topology);
        fit_caches(&mut common, vendor, topology);
        set_limits(&mut common);
        Ok(Model { common, topology, vendor })
    }

    /// The table of one vCPU.
    pub fn table(&self, vcpu: u32) -> CpuidTable {
        let mut table = self.common.clone();
        let apic_id = self.topology.apic_id(vcpu);
        table.update(1, |leaf| leaf.ebx |= (apic_id & 0xff) << APIC_ID_SHIFT);
        for leaf in [TOPOLOGY_LEAF, TOPOLOGY_LEAF_V2, AMD_TOPOLOGY_LEAF] {
            table.update(leaf, |level| level.edx = apic_id);
        }
        if self.vendor == Vendor::Amd {
            let position = self.topology.position(vcpu);
            table.update(0x8000_001e, |leaf| {
                leaf.eax = apic_id;
                leaf.ebx = (self.topology.threads - 1).min(0xff) << 8 | position.core & 0xff;
                leaf.ecx = position.socket & 0xff;
            });
        }
        table
    }

    /// The topology that the model was made for.
    pub fn topology(&self) -> Topology {
        self.topology
    }

    /// The vendor whose conventions it follows.
    pub fn vendor(&self) -> Vendor {
        self.vendor
    }

    /// Whether the guest is shown a feature, by its usual name.
    pub fn has(&self, name: &str) -> bool {
        named(&self.common, name)
    }
}

/// Leaf 6 EAX: the LAPIC timer runs in every power state.
const ARAT: u32 = 1 << 2;

fn check_topology(topology: Topology) -> Result<(), ModelError> {
    let Topology { sockets, cores, threads } = topology;
    let wide = |count: u32| u64::from(count).next_power_of_two().trailing_zeros();
    if sockets == 0 || cores == 0 || threads == 0 || wide(sockets) + wide(cores) + wide(threads) > 31 {
        return Err(ModelError::Topology(topology));
    }
    Ok(())
}

/// Applies the feature list, bhyve's omissions and the dependencies. Returns the KVM features the guest gets.
fn choose(table: &mut CpuidTable, supported: &CpuidTable, list: &FeatureList) -> Result<u32, ModelError> {
    let kvm_offer = kvm_offer(supported);
    for wish in list.wishes.iter().filter(|wish| wish.on) {
        let name = wish.feature.name;
        let offered = if wish.feature.is_kvm() {
            kvm_offer & wish.feature.mask() != 0
        } else {
            is_set(supported, &wish.feature) || name == "hypervisor"
        };
        if !offered {
            return Err(ModelError::NotOffered { name });
        }
    }
    set(table, "hypervisor", true);
    for name in HIDDEN {
        if list.wish(name) != Some(true) {
            set(table, name, false);
        }
    }
    for wish in list.wishes.iter().filter(|wish| !wish.feature.is_kvm()) {
        set(table, wish.feature.name, wish.on);
    }
    drop_dependants(table, list)?;

    let mut chosen = 0;
    for wish in list.wishes.iter().filter(|wish| wish.feature.is_kvm() && wish.on) {
        if let Some(needs) = features::needs(wish.feature.name).iter().find(|n| list.wish(n) != Some(true)) {
            return Err(ModelError::Conflict { name: wish.feature.name, needs });
        }
        chosen |= wish.feature.mask();
        if wish.feature.name == "kvmclock" {
            chosen |= kvm_offer & KVMCLOCK_COMPANIONS;
        }
    }
    Ok(chosen)
}

/// The clock's old interface, and the promise that it never steps back between processors.
const KVMCLOCK_COMPANIONS: u32 = 1 << 0 | 1 << 24;

/// What is of no use without something that is off goes too, unless it was asked for by name.
fn drop_dependants(table: &mut CpuidTable, list: &FeatureList) -> Result<(), ModelError> {
    loop {
        let mut changed = false;
        for feature in features::all().filter(|f| !f.is_kvm() && f.word.leaf != KVM_FEATURE_LEAF) {
            if !is_set(table, &feature) {
                continue;
            }
            let Some(missing) = features::needs(feature.name).iter().find(|needed| !named(table, needed))
            else {
                continue;
            };
            if list.wish(feature.name) == Some(true) {
                return Err(ModelError::Conflict { name: feature.name, needs: missing });
            }
            set(table, feature.name, false);
            changed = true;
        }
        if !changed {
            return Ok(());
        }
    }
}

/// KVM features in an engine's table; zero for engines that are not KVM.
fn kvm_offer(supported: &CpuidTable) -> u32 {
    let base = supported.lookup(HYPERVISOR_BASE, 0);
    if signature_text([base.ebx, base.ecx, base.edx]) == KVM_SIGNATURE {
        supported.lookup(KVM_FEATURE_LEAF, 0).eax
    } else {
        0
    }
}

/// bhyve's leaf, and KVM's behind it if the guest gets something of KVM's. Guests that know both take the later.
fn hypervisor_leaves(table: &mut CpuidTable, kvm_features: u32) {
    if !named(table, "hypervisor") {
        return;
    }
    table.set(HYPERVISOR_BASE, None, signature(HYPERVISOR_BASE, BHYVE_SIGNATURE));
    if kvm_features != 0 {
        table.set(KVM_BASE, None, signature(KVM_BASE + 1, KVM_SIGNATURE));
        table.set(KVM_BASE + 1, None, CpuidResult { eax: kvm_features, ..CpuidResult::default() });
    }
}

fn signature(highest: u32, text: [u8; 12]) -> CpuidResult {
    let word = |n: usize| u32::from_le_bytes([text[n], text[n + 1], text[n + 2], text[n + 3]]);
    CpuidResult { eax: highest, ebx: word(0), ecx: word(4), edx: word(8) }
}

fn signature_text(words: [u32; 3]) -> [u8; 12] {
    let mut text = [0; 12];
    for (bytes, word) in text.chunks_exact_mut(4).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    text
}

/// Takes away the state components of features that are off, and sets the largest size (SDM 1 §13.2).
fn fit_xsave(table: &mut CpuidTable) {
    use xsave::component;
    let leaf = xsave::CPUID_LEAF;
    if !named(table, "xsave") {
        table.remove(leaf);
        return;
    }
    let mut components = table.lookup(leaf, 0).eax;
    for (feature, bits) in [
        ("avx", component::AVX),
        ("avx512f", component::OPMASK | component::ZMM_HI256 | component::HI16_ZMM),
        ("pku", component::PKRU),
    ] {
        if !named(table, feature) {
            components &= !(bits as u32);
        }
    }
    let mut size = xsave::MIN_BYTES as u32;
    for bit in 2..32 {
        let place = table.lookup(leaf, bit);
        if components & 1 << bit == 0 {
            if table.get(leaf, bit).is_some() {
                table.set(leaf, Some(bit), CpuidResult::default());
            }
        } else {
            size = size.max(place.eax.saturating_add(place.ebx));
        }
    }
    change(table, leaf, Some(0), |first| {
        first.eax = components;
        first.ecx = size;
        first.ebx = xsave::MIN_BYTES as u32;
    });
}

fn fit_topology(table: &mut CpuidTable, vendor: Vendor, topology: Topology) {
    let per_socket = topology.per_socket();
    let (thread_bits, socket_shift) = (topology.thread_bits(), topology.socket_shift());
    table.update(1, |leaf| {
        // Intel counts the IDs set aside for a socket, a power of two (SDM 2A); AMD its processors (APM 3 §E.3.2).
        let logical = match vendor {
            Vendor::Intel => 1u32 << socket_shift.min(8),
            Vendor::Amd => per_socket,
        };
        let logical = logical.min(0xff);
        leaf.ebx = leaf.ebx & CLFLUSH_SIZE | logical << LOGICAL_COUNT_SHIFT;
        leaf.edx = leaf.edx & !HTT | if per_socket > 1 { HTT } else { 0 };
    });

    let levels = [(LEVEL_THREAD, thread_bits, topology.threads), (LEVEL_CORE, socket_shift, per_socket)];
    let v2 = table_has(table, TOPOLOGY_LEAF_V2);
    for leaf in [Some(TOPOLOGY_LEAF), v2.then_some(TOPOLOGY_LEAF_V2)].into_iter().flatten() {
        table.remove(leaf);
        for (n, (kind, shift, count)) in levels.into_iter().enumerate() {
            table.set(leaf, Some(n as u32), level(n as u32, kind, shift, count));
        }
        let end = levels.len() as u32;
        table.set(leaf, Some(end), CpuidResult { ecx: end, ..CpuidResult::default() });
    }

    if vendor == Vendor::Intel {
        return;
    }
    table.update(0x8000_0001, |leaf| {
        leaf.ecx = leaf.ecx & !CMP_LEGACY | if per_socket > 1 { CMP_LEGACY } else { 0 };
    });
    table.update(0x8000_0008, |leaf| {
        leaf.ecx = socket_shift.min(0xf) << 12 | (per_socket - 1).min(0xff);
    });
    if named(table, "topoext") {
        table.set(0x8000_001e, None, CpuidResult::default());
    } else {
        table.remove(0x8000_001e);
    }
    if table_has(table, AMD_TOPOLOGY_LEAF) {
        // Core, complex, die, socket (APM 3 appendix E.4.24): a socket is one die with one complex.
        table.remove(AMD_TOPOLOGY_LEAF);
        let levels = [
            (1, thread_bits, topology.threads),
            (2, socket_shift, per_socket),
            (3, socket_shift, per_socket),
            (4, socket_shift, per_socket),
        ];
        for (n, (kind, shift, count)) in levels.into_iter().enumerate() {
            table.set(AMD_TOPOLOGY_LEAF, Some(n as u32), level(n as u32, kind, shift, count));
        }
        table.set(AMD_TOPOLOGY_LEAF, Some(4), CpuidResult { ecx: 4, ..CpuidResult::default() });
    }
}

/// One level of leaf 0BH, 1FH or 80000026H; EDX, the APIC ID, is each vCPU's own.
fn level(number: u32, kind: u32, shift: u32, count: u32) -> CpuidResult {
    CpuidResult { eax: shift & 0x1f, ebx: count & 0xffff, ecx: kind << 8 | number, edx: 0 }
}

/// Caches of level 1 and 2 belong to a core, higher ones to a socket.
fn fit_caches(table: &mut CpuidTable, vendor: Vendor, topology: Topology) {
    const TYPE: u32 = 0x1f;
    const SHARING: u32 = 0xfff << 14;
    let (leaf, other) = match vendor {
        Vendor::Intel => (4, 0x8000_001d),
        Vendor::Amd => (0x8000_001d, 4),
    };
    table.remove(other);
    if vendor == Vendor::Amd && !named(table, "topoext") {
        table.remove(leaf);
    }
    let core_ids = (1u32 << (topology.socket_shift() - topology.thread_bits()).min(6)) - 1;
    table.update(leaf, |cache| {
        if cache.eax & TYPE == 0 {
            return;
        }
        let bits = if cache.eax >> 5 & 7 <= 2 { topology.thread_bits() } else { topology.socket_shift() };
        let sharing = (1u32 << bits.min(12)) - 1;
        cache.eax = cache.eax & !SHARING | sharing << 14;
        if vendor == Vendor::Intel {
            cache.eax = cache.eax & !(0x3f << 26) | core_ids << 26;
        }
    });
}

/// The highest basic and extended leaves are those the table has.
fn set_limits(table: &mut CpuidTable) {
    for (first, range) in [(0, 0..HYPERVISOR_BASE), (0x8000_0000, 0x8000_0000..0x8001_0000)] {
        let highest =
            table.entries().iter().map(|e| e.leaf).filter(|leaf| range.contains(leaf)).max().unwrap_or(first);
        table.update(first, |leaf| leaf.eax = highest);
    }
}

fn table_has(table: &CpuidTable, leaf: u32) -> bool {
    table.entries().iter().any(|e| e.leaf == leaf && e.result != CpuidResult::default())
}

fn change(table: &mut CpuidTable, leaf: u32, subleaf: Option<u32>, with: impl FnOnce(&mut CpuidResult)) {
    if let Some(mut result) = table.get(leaf, subleaf.unwrap_or(0)) {
        with(&mut result);
        table.set(leaf, subleaf, result);
    }
}

fn is_set(table: &CpuidTable, feature: &Feature) -> bool {
    let word = feature.word;
    let result = table.lookup(word.leaf, word.subleaf.unwrap_or(0));
    Register::of(word.register, &result) & feature.mask() != 0
}

/// Whether the feature with this usual name is set.
fn named(table: &CpuidTable, name: &str) -> bool {
    features::find(name).is_some_and(|feature| is_set(table, &feature))
}

fn set(table: &mut CpuidTable, name: &str, on: bool) {
    let Some(feature) = features::find(name) else { return };
    let word = feature.word;
    change(table, word.leaf, word.subleaf, |result| {
        let register = word.register.of_mut(result);
        *register = if on { *register | feature.mask() } else { *register & !feature.mask() };
    });
}

#[cfg(test)]
mod tests;
