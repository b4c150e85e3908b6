//! The processor that guests of the software CPU see: what the engine implements itself, and of what it leaves to
//! the host's own instructions, what this host has (SDM 2A "CPUID", APM 3 appendix E).
//!
//! [`supported_cpuid`] is the engine's offer. [`x86::cpuid::model`] makes each vCPU's table from it: topology,
//! hypervisor leaves, feature list. Two answers change while a guest runs and are the vCPU's to patch in:
//! OSXSAVE (leaf 1 ECX bit 27) follows CR4, and leaf 0DH subleaf 0 EBX follows XCR0 ([`xsave_bytes`]).
//!
//! Not offered, whatever the host has: AVX-512, AMX, virtualization, MONITOR/MWAIT, performance counters, protection
//! keys, control-flow enforcement, transactional memory, five-level paging, compacted XSAVE areas.

use x86::cpuid::features::{self, Feature};
use x86::cpuid::model::Vendor;
use x86::cpuid::{CpuidResult, CpuidTable};
use x86::xsave;

use crate::chips::lapic::timer::BUS_HZ;

/// Features of instructions that run on the host: offered if the host has them. Names as in
/// [`x86::cpuid::features`].
pub const FROM_HOST: &[&str] = &[
    "fpu",
    "cx8",
    "cmov",
    "clflush",
    "mmx",
    "fxsr",
    "sse",
    "sse2",
    "pni",
    "pclmulqdq",
    "ssse3",
    "fma",
    "cx16",
    "sse4_1",
    "sse4_2",
    "movbe",
    "popcnt",
    "aes",
    "avx",
    "f16c",
    "rdrand",
    "bmi1",
    "avx2",
    "bmi2",
    "erms",
    "rdseed",
    "adx",
    "clflushopt",
    "clwb",
    "sha_ni",
    "fsrm",
    "abm",
    "sse4a",
    "3dnowprefetch",
    "mmxext",
    "topoext",
    "invtsc",
    "lfence_rdtsc",
    // Not abilities but warnings that x87 pointers are kept as this host keeps them.
    "fdp_excptn_only",
    "zero_fcs_fds",
];

/// Features that the engine implements on any host.
pub const FROM_ENGINE: &[&str] = &[
    "de",
    "pse",
    "tsc",
    "msr",
    "pae",
    "mce",
    "apic",
    "sep",
    "mtrr",
    "pge",
    "mca",
    "pat",
    "pse36",
    "pcid",
    "x2apic",
    "tsc_deadline_timer",
    "xsave",
    "hypervisor",
    "arat",
    "fsgsbase",
    "tsc_adjust",
    "smep",
    "invpcid",
    "smap",
    "umip",
    "rdpid",
    "xsaveopt",
    "xgetbv1",
    "lahf_lm",
    "syscall",
    "nx",
    "pdpe1gb",
    "rdtscp",
    "lm",
];

/// On an AMD processor: it has nothing of what guests work around at a price (decision 0004).
const UNAFFECTED_AMD: &[&str] = &["autoibrs", "srso_no", "tsa_sq_no", "tsa_l1_no", "amd_ssb_no"];
/// On an Intel processor: there is a register that says so, and the one that IBRS comes with.
const UNAFFECTED_INTEL: &[&str] = &["arch_capabilities", "spec_ctrl"];

/// Features that need the host's operating system to have enabled the AVX state.
const NEED_AVX_STATE: &[&str] = &["avx", "avx2", "fma", "f16c"];

/// Leaf 1 EBX: CLFLUSH line size.
const CLFLUSH_SIZE: u32 = 0xff00;
/// Leaf 1 ECX: the host's operating system has enabled XSAVE, so that XCR0 can be read.
const OSXSAVE: u32 = 1 << 27;
/// Bits of leaf 1 EDX that AMD repeats in leaf 80000001H EDX (APM 3 §E.4.2).
const AMD_REPEATED: u32 = 0x0183_f3ff;
/// Linear address width without five-level paging.
const LINEAR_BITS: u32 = 48;
/// Physical address width that page tables can hold.
const MOST_PHYSICAL_BITS: u32 = 52;
/// Physical address width of a host that does not say (SDM 2A).
const LEAST_PHYSICAL_BITS: u32 = 36;
/// No processor has more subleaves of a cache leaf than this; the list ends with a null entry.
const MOST_CACHES: u32 = 16;

/// The CPUID instruction and XCR0 of some processor.
struct Host<'a> {
    cpuid: &'a dyn Fn(u32, u32) -> CpuidResult,
    xcr0: u64,
}

/// What the engine offers on this host.
pub fn supported_cpuid() -> CpuidTable {
    let os_uses_xsave = host_cpuid(1, 0).ecx & OSXSAVE != 0;
    offer(&Host { cpuid: &host_cpuid, xcr0: if os_uses_xsave { host_xcr0() } else { 0 } })
}

/// Bytes of the standard-form XSAVE area for the components in `xcr0`: leaf 0DH subleaf 0 EBX.
pub fn xsave_bytes(xcr0: u64) -> u32 {
    let end = xsave::EXTENDED
        .iter()
        .filter(|component| xcr0 >> component.bit & 1 != 0)
        .map(|component| component.offset + component.len)
        .max();
    end.unwrap_or(xsave::MIN_BYTES) as u32
}

fn host_cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    // Safe to call in recent releases of Rust.
    #[allow(unused_unsafe)]
    // SAFETY: every x86-64 processor has the instruction.
    let result = unsafe { std::arch::x86_64::__cpuid_count(leaf, subleaf) };
    CpuidResult { eax: result.eax, ebx: result.ebx, ecx: result.ecx, edx: result.edx }
}

fn host_xcr0() -> u64 {
    #[target_feature(enable = "xsave")]
    fn read() -> u64 {
        // SAFETY: XCR0 exists where XSAVE does.
        unsafe { std::arch::x86_64::_xgetbv(0) }
    }
    // SAFETY: the caller has seen OSXSAVE, which implies XSAVE.
    unsafe { read() }
}

impl Host<'_> {
    /// A leaf, zero if it is beyond the highest of its range (where Intel processors repeat another leaf).
    fn leaf(&self, leaf: u32, subleaf: u32) -> CpuidResult {
        let range = leaf & 0xffff_0000;
        let highest = (self.cpuid)(range, 0).eax;
        if leaf == range || (highest & 0xffff_0000 == range && leaf <= highest) {
            (self.cpuid)(leaf, subleaf)
        } else {
            CpuidResult::default()
        }
    }

    fn has(&self, feature: &Feature) -> bool {
        let word = feature.word;
        if self.xcr0 & AVX_STATE != AVX_STATE && NEED_AVX_STATE.contains(&feature.name) {
            return false;
        }
        word.register.of(&self.leaf(word.leaf, word.subleaf.unwrap_or(0))) & feature.mask() != 0
    }
}

/// XCR0 of a system that uses AVX.
const AVX_STATE: u64 = xsave::component::SSE | xsave::component::AVX;

fn offer(host: &Host) -> CpuidTable {
    let mut table = CpuidTable::new();
    let vendor = host.leaf(0, 0);
    table.set(0, None, vendor);
    let extended = host.leaf(0x8000_0000, 0);
    table.set(0x8000_0000, None, CpuidResult { eax: 0, ..extended });
    let signature = host.leaf(1, 0);
    table.set(
        1,
        None,
        CpuidResult { eax: signature.eax, ebx: signature.ebx & CLFLUSH_SIZE, ..CpuidResult::default() },
    );
    for (leaf, subleaf) in [(6, None), (7, Some(0)), (0x8000_0007, None)] {
        table.set(leaf, subleaf, CpuidResult::default());
    }
    table.set(
        0x8000_0001,
        None,
        CpuidResult { eax: host.leaf(0x8000_0001, 0).eax, ..CpuidResult::default() },
    );
    xsave_leaves(&mut table);
    for feature in features::all() {
        let offered =
            FROM_ENGINE.contains(&feature.name) || FROM_HOST.contains(&feature.name) && host.has(&feature);
        if offered {
            set(&mut table, &feature);
        }
    }
    if !has(&table, "avx") {
        forget_avx_state(&mut table);
    }

    // The processor's name.
    for leaf in 0x8000_0002..=0x8000_0004 {
        table.set(leaf, None, host.leaf(leaf, 0));
    }
    addresses(&mut table, host);
    match Vendor::of(&table) {
        Vendor::Intel => intel_leaves(&mut table, host),
        Vendor::Amd => amd_leaves(&mut table, host),
    }
    let unaffected = match Vendor::of(&table) {
        Vendor::Intel => UNAFFECTED_INTEL,
        Vendor::Amd => UNAFFECTED_AMD,
    };
    for feature in features::all().filter(|feature| unaffected.contains(&feature.name)) {
        set(&mut table, &feature);
    }
    let highest = |range: std::ops::RangeInclusive<u32>| {
        table.entries().iter().map(|entry| entry.leaf).filter(|leaf| range.contains(leaf)).max()
    };
    let (basic, extended) = (highest(0..=0xffff), highest(0x8000_0000..=0x8000_ffff));
    table.update(0, |leaf| leaf.eax = basic.unwrap_or(0));
    table.update(0x8000_0000, |leaf| leaf.eax = extended.unwrap_or(0x8000_0000));
    table
}

/// Leaf 80000008H: widths of addresses.
fn addresses(table: &mut CpuidTable, host: &Host) {
    let physical = match host.leaf(0x8000_0008, 0).eax & 0xff {
        0 => LEAST_PHYSICAL_BITS,
        bits => bits.min(MOST_PHYSICAL_BITS),
    };
    table.set(0x8000_0008, None, CpuidResult { eax: LINEAR_BITS << 8 | physical, ..CpuidResult::default() });
}

/// Leaf 0DH: the components and their places, which are Apiary's own on every host.
fn xsave_leaves(table: &mut CpuidTable) {
    use xsave::component::{AVX, SSE, X87};
    let components = X87 | SSE | AVX;
    table.set(
        xsave::CPUID_LEAF,
        Some(0),
        CpuidResult { eax: components as u32, ebx: xsave_bytes(X87), ecx: xsave_bytes(components), edx: 0 },
    );
    table.set(xsave::CPUID_LEAF, Some(1), CpuidResult::default());
    for component in xsave::EXTENDED.iter().filter(|component| components >> component.bit & 1 != 0) {
        table.set(
            xsave::CPUID_LEAF,
            Some(component.bit),
            CpuidResult { eax: component.len as u32, ebx: component.offset as u32, ..CpuidResult::default() },
        );
    }
}

fn forget_avx_state(table: &mut CpuidTable) {
    use xsave::component::{SSE, X87};
    table.remove(xsave::CPUID_LEAF);
    let bytes = xsave_bytes(X87 | SSE);
    table.set(
        xsave::CPUID_LEAF,
        Some(0),
        CpuidResult { eax: (X87 | SSE) as u32, ebx: bytes, ecx: bytes, edx: 0 },
    );
    table.set(xsave::CPUID_LEAF, Some(1), CpuidResult::default());
    for name in ["xsaveopt", "xgetbv1"] {
        if let Some(feature) = features::find(name) {
            set(table, &feature);
        }
    }
}

fn intel_leaves(table: &mut CpuidTable, host: &Host) {
    table.set(2, None, host.leaf(2, 0));
    caches(table, host, 4);
    table.set(0x8000_0006, None, host.leaf(0x8000_0006, 0));
    // The TSC runs as on the host; told in units of the clock that the guest's LAPIC timer counts.
    let tsc = host.leaf(0x15, 0);
    let tsc_hz = u64::from(tsc.ecx) * u64::from(tsc.ebx) / u64::from(tsc.eax.max(1));
    if tsc_hz != 0 {
        const KILO: u64 = 1000;
        table.set(
            0x15,
            None,
            CpuidResult {
                eax: (BUS_HZ / KILO) as u32,
                ebx: u32::try_from(tsc_hz / KILO).unwrap_or(u32::MAX),
                ecx: BUS_HZ as u32,
                edx: 0,
            },
        );
        // Megahertz: nominal, highest, bus.
        let speed = host.leaf(0x16, 0);
        if speed.eax & 0xffff != 0 {
            table.set(0x16, None, speed);
        }
    }
}

fn amd_leaves(table: &mut CpuidTable, host: &Host) {
    let basic = table.lookup(1, 0);
    table.update(0x8000_0001, |leaf| leaf.edx |= basic.edx & AMD_REPEATED);
    for leaf in [0x8000_0005, 0x8000_0006, 0x8000_0019] {
        table.set(leaf, None, host.leaf(leaf, 0));
    }
    if has(table, "topoext") {
        caches(table, host, 0x8000_001d);
    }
}

/// A leaf with a cache in each subleaf, up to the null entry that ends it.
fn caches(table: &mut CpuidTable, host: &Host, leaf: u32) {
    const CACHE_TYPE: u32 = 0x1f;
    for subleaf in 0..MOST_CACHES {
        let cache = host.leaf(leaf, subleaf);
        let last = cache.eax & CACHE_TYPE == 0;
        table.set(leaf, Some(subleaf), if last { CpuidResult::default() } else { cache });
        if last {
            break;
        }
    }
}

fn set(table: &mut CpuidTable, feature: &Feature) {
    let word = feature.word;
    let mut result = table.lookup(word.leaf, word.subleaf.unwrap_or(0));
    *word.register.of_mut(&mut result) |= feature.mask();
    table.set(word.leaf, word.subleaf, result);
}

fn has(table: &CpuidTable, name: &str) -> bool {
    features::find(name).is_some_and(|feature| {
        let word = feature.word;
        word.register.of(&table.lookup(word.leaf, word.subleaf.unwrap_or(0))) & feature.mask() != 0
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use x86::cpuid::Topology;
    use x86::cpuid::model::{FeatureList, Model, ModelOptions};

    const INTEL: [u32; 3] = [0x756e_6547, 0x6c65_746e, 0x4965_6e69];
    const AMD: [u32; 3] = [0x6874_7541, 0x444d_4163, 0x6974_6e65];

    /// A processor that claims every feature there is, named and unnamed.
    fn boastful(vendor: [u32; 3]) -> impl Fn(u32, u32) -> CpuidResult {
        let [ebx, ecx, edx] = vendor;
        move |leaf, subleaf| match leaf {
            0 => CpuidResult { eax: 0x20, ebx, ecx, edx },
            0x8000_0000 if vendor == INTEL => CpuidResult { eax: 0x8000_0008, ebx, ecx, edx },
            0x8000_0000 => CpuidResult { eax: 0x8000_0028, ebx, ecx, edx },
            4 | 0x8000_001d if subleaf < 4 => CpuidResult { eax: 0x121 + subleaf, ebx: 7, ecx: 8, edx: 9 },
            4 | 0x8000_001d => CpuidResult { eax: 0xff00, ebx: 1, ecx: 1, edx: 1 },
            0x15 => CpuidResult { eax: 2, ebx: 216, ecx: 25_000_000, edx: 0 },
            0x16 => CpuidResult { eax: 2700, ebx: 3500, ecx: 100, edx: 0 },
            0x8000_0008 => CpuidResult { eax: 0x3934, ebx: !0, ecx: !0, edx: !0 },
            _ => CpuidResult { eax: !0, ebx: !0, ecx: !0, edx: !0 },
        }
    }

    fn offered(vendor: [u32; 3], xcr0: u64) -> CpuidTable {
        offer(&Host { cpuid: &boastful(vendor), xcr0 })
    }

    #[test]
    fn every_listed_name_is_known_and_listed_once() {
        let names = || FROM_HOST.iter().chain(FROM_ENGINE);
        for name in names() {
            assert_eq!(features::find(name).map(|feature| feature.name), Some(*name), "{name}");
            assert_eq!(names().filter(|other| *other == name).count(), 1, "{name}");
        }
        for name in NEED_AVX_STATE {
            assert!(FROM_HOST.contains(name), "{name}");
        }
    }

    #[test]
    fn only_listed_features_come_through() {
        for vendor in [INTEL, AMD] {
            let table = offered(vendor, 7);
            let unaffected = if vendor == AMD { UNAFFECTED_AMD } else { UNAFFECTED_INTEL };
            for feature in features::all() {
                let listed = FROM_HOST.contains(&feature.name) || FROM_ENGINE.contains(&feature.name);
                // In a leaf that Intel's processors do not have.
                let listed = listed && (vendor == AMD || feature.name != "lfence_rdtsc")
                    || unaffected.contains(&feature.name);
                assert_eq!(has(&table, feature.name), listed, "{}", feature.name);
            }
            // Nor unnamed bits of the feature words.
            assert_eq!(table.lookup(1, 0).ecx & (1 << 27 | 1 << 3 | 1 << 5), 0);
            assert_eq!(table.lookup(7, 0).eax, 0);
            assert_eq!(table.lookup(7, 1), CpuidResult::default());
            assert_eq!(table.lookup(0x8000_0007, 0), CpuidResult { edx: 1 << 8, ..Default::default() });
            assert_eq!(table.lookup(6, 0), CpuidResult { eax: 1 << 2, ..Default::default() });
            assert_eq!(table.lookup(0xa, 0), CpuidResult::default());
            assert_eq!(table.lookup(0x1_0000, 0), CpuidResult::default());
        }
    }

    #[test]
    fn avx_needs_the_host_to_save_it() {
        for xcr0 in [0, 3, 5] {
            let table = offered(INTEL, xcr0);
            for name in NEED_AVX_STATE {
                assert!(!has(&table, name), "{name} with XCR0 {xcr0}");
            }
            assert!(has(&table, "xsave") && has(&table, "xgetbv1") && has(&table, "bmi2"));
            let areas = CpuidResult { eax: 3, ebx: 576, ecx: 576, edx: 0 };
            assert_eq!(table.lookup(0xd, 0), areas);
            assert_eq!(table.lookup(0xd, 2), CpuidResult::default());
        }
    }

    #[test]
    fn xsave_layout_is_apiarys() {
        let table = offered(AMD, 7);
        assert_eq!(table.lookup(0xd, 0), CpuidResult { eax: 7, ebx: 576, ecx: 832, edx: 0 });
        assert_eq!(table.lookup(0xd, 1), CpuidResult { eax: 5, ..Default::default() });
        assert_eq!(table.lookup(0xd, 2), CpuidResult { eax: 256, ebx: 576, ..Default::default() });
        assert_eq!(table.lookup(0xd, 9), CpuidResult::default());
        assert_eq!(xsave_bytes(1), 576);
        assert_eq!(xsave_bytes(7), 832);
    }

    #[test]
    fn intel_tells_the_tsc_in_timer_clocks() {
        let table = offered(INTEL, 7);
        // 25 MHz * 216 / 2 = 2.7 GHz.
        let leaf = table.lookup(0x15, 0);
        assert_eq!(u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax), 2_700_000_000);
        assert_eq!(u64::from(leaf.ecx), BUS_HZ);
        assert_eq!(table.lookup(0x16, 0).eax, 2700);
        assert_eq!(table.lookup(0, 0).eax, 0x16);
        // A host that does not say how fast its crystal is tells nothing; nor does AMD's.
        let quiet = |leaf, subleaf| match leaf {
            0x15 => CpuidResult { eax: 2, ebx: 216, ..CpuidResult::default() },
            _ => boastful(INTEL)(leaf, subleaf),
        };
        let table = offer(&Host { cpuid: &quiet, xcr0: 7 });
        assert_eq!(table.lookup(0x15, 0), CpuidResult::default());
        assert_eq!(table.lookup(0, 0).eax, 0xd);
        assert_eq!(offered(AMD, 7).lookup(0x15, 0), CpuidResult::default());
    }

    #[test]
    fn vendors_keep_their_own_leaves() {
        let intel = offered(INTEL, 7);
        assert_eq!(intel.lookup(0x8000_0000, 0).eax, 0x8000_0008);
        assert_eq!(intel.lookup(4, 3).eax, 0x124);
        assert_eq!(intel.get(4, 4), Some(CpuidResult::default()));
        assert_eq!(intel.get(0x8000_001d, 0), None);
        assert_eq!(intel.lookup(0x8000_0001, 0).edx & AMD_REPEATED, 0);
        let amd = offered(AMD, 7);
        assert_eq!(amd.lookup(0x8000_0000, 0).eax, 0x8000_0021);
        assert_eq!(amd.lookup(0x8000_001d, 3).eax, 0x124);
        assert_eq!(amd.get(4, 0), None);
        let unaffected = CpuidResult { eax: 1 << 29 | 1 << 8 | 1 << 2, ecx: 6, ..Default::default() };
        assert_eq!(amd.lookup(0x8000_0021, 0), unaffected);
        assert_eq!(intel.lookup(7, 0).edx & 1 << 29, 1 << 29);
        assert_eq!(amd.lookup(7, 0).edx & 1 << 29, 0);
        assert_eq!(amd.lookup(0x8000_0001, 0).edx & AMD_REPEATED, amd.lookup(1, 0).edx & AMD_REPEATED);
        for table in [intel, amd] {
            assert_eq!(table.lookup(0x8000_0008, 0).eax, 0x3034);
            assert_eq!(table.lookup(1, 0).ebx, 0xff00);
        }
    }

    #[test]
    fn an_old_processor_answers_only_what_it_has() {
        // A basic range of one leaf, no extended range; leaves beyond repeat the highest, as Intel's do.
        let old = |leaf, _| match leaf {
            0 => CpuidResult { eax: 1, ebx: INTEL[0], ecx: INTEL[1], edx: INTEL[2] },
            _ => CpuidResult { eax: 0x673, ebx: 0, ecx: 0, edx: 0x0183_fbff },
        };
        let table = offer(&Host { cpuid: &old, xcr0: 0 });
        assert!(has(&table, "mmx") && !has(&table, "sse2") && !has(&table, "bmi1"));
        assert_eq!(table.lookup(0x8000_0002, 0), CpuidResult::default());
        assert_eq!(table.lookup(0x8000_0008, 0).eax, 0x3024);
    }

    #[test]
    fn this_host() {
        let table = supported_cpuid();
        let host = host_cpuid(0, 0);
        let leaf = table.lookup(0, 0);
        assert_eq!((leaf.ebx, leaf.ecx, leaf.edx), (host.ebx, host.ecx, host.edx));
        assert!(leaf.eax >= 0xd);
        assert_eq!(table.lookup(1, 0).eax, host_cpuid(1, 0).eax);
        assert_eq!(table.lookup(0x8000_0003, 0), host_cpuid(0x8000_0003, 0));
        assert_eq!(has(&table, "avx2"), std::arch::is_x86_feature_detected!("avx2"));
        assert_eq!(has(&table, "sha_ni"), std::arch::is_x86_feature_detected!("sha"));
        assert!(has(&table, "sse2") && has(&table, "lm") && has(&table, "hypervisor"));
        assert!(!has(&table, "avx512f"));
    }

    #[test]
    fn models_are_made_from_it() {
        for table in [offered(INTEL, 7), offered(AMD, 7), offered(AMD, 3), supported_cpuid()] {
            let options = ModelOptions {
                topology: Topology { sockets: 2, cores: 2, threads: 1 },
                x2apic: true,
                features: FeatureList::parse("-sse4_2").unwrap(),
            };
            let model = Model::new(&table, &options).unwrap();
            assert!(model.has("x2apic") && model.has("pni") && !model.has("sse4_2"));
            assert_eq!(model.table(3).apic_id(), Some(3));
        }
    }
}
