//! The model on tables like those that KVM offers on real processors.

use super::*;

fn leaf(eax: u32, ebx: u32, ecx: u32, edx: u32) -> CpuidResult {
    CpuidResult { eax, ebx, ecx, edx }
}

/// What KVM offers on an AMD processor (Zen 4), abridged.
fn amd() -> CpuidTable {
    let mut table = CpuidTable::new();
    table.set(0, None, leaf(0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65));
    table.set(1, None, leaf(0x00a1_0f11, 0x0102_0800, 0xfefa_320b | 1 << 28, 0x178b_fbff));
    table.set(6, None, leaf(4, 0, 1, 0));
    table.set(7, Some(0), leaf(1, 0xf1bf_97a9, 0x0040_5fce, 0x1000_0010));
    table.set(7, Some(1), leaf(0x20, 0, 0, 0));
    table.set(0xb, Some(0), leaf(1, 2, 0x100, 0));
    table.set(0xd, Some(0), leaf(0x2e7, 0x988, 0x988, 0));
    table.set(0xd, Some(1), leaf(0xf, 0x988, 0, 0));
    for (bit, len, offset) in
        [(2, 256, 0x240), (5, 64, 0x340), (6, 512, 0x380), (7, 1024, 0x580), (9, 8, 0x980)]
    {
        table.set(0xd, Some(bit), leaf(len, offset, 0, 0));
    }
    table.set(0x10, Some(0), leaf(1, 2, 3, 4));
    table.set(0x4000_0000, None, leaf(0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d));
    table.set(0x4000_0001, None, leaf(0x0100_7efb, 0, 0, 0));
    table.set(0x8000_0000, None, leaf(0x8000_0028, 0x6874_7541, 0x444d_4163, 0x6974_6e65));
    table.set(0x8000_0001, None, leaf(0x00a1_0f11, 0x4000_0000, 0x0040_0397, 0x2fd3_fbff));
    table.set(0x8000_0002, None, leaf(0x2044_4d41, 0x4359_5045, 0x3436_3920, 0x0a0a_0a0a));
    table.set(0x8000_0008, None, leaf(0x3030, 0x5000_0205, 0x7001, 0));
    table.set(0x8000_000a, None, leaf(1, 8, 0, 0x8000_0001));
    for (n, (eax, sets)) in
        [(0x121, 0x3f), (0x122, 0x3f), (0x143, 0x7ff), (0x3c163, 0x7fff)].into_iter().enumerate()
    {
        table.set(0x8000_001d, Some(n as u32), leaf(eax, 0x01c0_003f, sets, 0));
    }
    table.set(0x8000_001d, Some(4), leaf(0, 0, 0, 0));
    table.set(0x8000_001e, None, leaf(9, 9, 9, 0));
    table.set(0x8000_001f, None, leaf(0xff, 0, 0, 0));
    table
}

/// The same for an Intel one.
fn intel() -> CpuidTable {
    let mut table = amd();
    table.set(0, None, leaf(0x20, 0x756e_6547, 0x6c65_746e, 0x4965_6e69));
    for (n, eax) in [0x1c00_4121u32, 0x1c00_4122, 0x1c00_4143, 0x1c03_c163].into_iter().enumerate() {
        table.set(4, Some(n as u32), leaf(eax, 0x01c0_003f, 0x3f, 0));
    }
    table.set(0x1f, Some(0), leaf(1, 2, 0x100, 0));
    table.remove(0x8000_001d);
    table.remove(0x8000_001e);
    table
}

fn options(sockets: u32, cores: u32, threads: u32, list: &str) -> ModelOptions {
    ModelOptions {
        topology: Topology { sockets, cores, threads },
        x2apic: true,
        features: FeatureList::parse(list).unwrap(),
    }
}

fn model(table: &CpuidTable, list: &str) -> Model {
    Model::new(table, &options(1, 1, 1, list)).unwrap()
}

fn refused(list: &str) -> ModelError {
    Model::new(&amd(), &options(1, 1, 1, list)).unwrap_err()
}

/// Socket, core and thread as Linux computes them from leaf 0BH (`arch/x86/kernel/cpu/topology*.c`).
fn as_linux_sees(table: &CpuidTable) -> (u32, u32, u32) {
    let threads = table.lookup(0xb, 0);
    let cores = table.lookup(0xb, 1);
    let id = threads.edx;
    (id >> cores.eax, (id & ((1 << cores.eax) - 1)) >> threads.eax, id & ((1 << threads.eax) - 1))
}

#[test]
fn two_sockets_of_two_cores() {
    for supported in [amd(), intel()] {
        let model = Model::new(&supported, &options(2, 2, 1, "")).unwrap();
        let tables: Vec<CpuidTable> = (0..4).map(|vcpu| model.table(vcpu)).collect();
        let seen: Vec<_> = tables.iter().map(as_linux_sees).collect();
        assert_eq!(seen, [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]);
        for (vcpu, table) in tables.iter().enumerate() {
            assert_eq!(table.apic_id(), Some(vcpu as u32));
            assert_eq!(table.lookup(1, 0).ebx >> 24, vcpu as u32);
            assert_eq!(table.lookup(1, 0).ebx >> 16 & 0xff, 2, "siblings");
            assert_ne!(table.lookup(1, 0).edx & HTT, 0);
            assert_eq!(table.lookup(0xb, 1).ebx, 2, "cores of a socket");
            assert_eq!(table.lookup(0xb, 2).ecx, 2);
        }
    }
}

#[test]
fn amd_leaves_follow_the_topology() {
    let model = Model::new(&amd(), &options(2, 3, 2, "")).unwrap();
    let table = model.table(11);
    // Socket 1, core 2, thread 1 with fields of one, two and one bits.
    assert_eq!(table.apic_id(), Some(0b1101));
    let extended = table.lookup(0x8000_001e, 0);
    assert_eq!((extended.eax, extended.ebx, extended.ecx), (0b1101, 1 << 8 | 2, 1));
    assert_eq!(table.lookup(0x8000_0008, 0).ecx, 3 << 12 | 5);
    assert_ne!(table.lookup(0x8000_0001, 0).ecx & CMP_LEGACY, 0);
    let sharing = |n| table.lookup(0x8000_001d, n).eax >> 14 & 0xfff;
    assert_eq!([sharing(0), sharing(2), sharing(3), sharing(4)], [1, 1, 7, 0]);
    assert_eq!(table.lookup(4, 0), CpuidResult::default());
    assert_eq!(table.lookup(AMD_TOPOLOGY_LEAF, 0), CpuidResult::default(), "the host does not have it");
}

#[test]
fn the_newer_amd_topology_leaf_is_filled_where_it_exists() {
    let mut supported = amd();
    supported.set(AMD_TOPOLOGY_LEAF, Some(0), leaf(1, 2, 0x100, 0));
    let table = Model::new(&supported, &options(2, 2, 2, "")).unwrap().table(5);
    let level = |n| table.lookup(AMD_TOPOLOGY_LEAF, n);
    assert_eq!((level(0).eax, level(0).ebx, level(0).ecx, level(0).edx), (1, 2, 0x100, 5));
    assert_eq!((level(3).eax, level(3).ebx, level(3).ecx), (2, 4, 0x403));
    assert_eq!(table.lookup(0x8000_0000, 0).eax, AMD_TOPOLOGY_LEAF);
}

#[test]
fn intel_cache_leaves_follow_the_topology() {
    let table = Model::new(&intel(), &options(1, 4, 2, "")).unwrap().table(0);
    let sharing = |n| table.lookup(4, n).eax >> 14 & 0xfff;
    assert_eq!([sharing(0), sharing(1), sharing(2), sharing(3)], [1, 1, 1, 7]);
    assert_eq!(table.lookup(4, 0).eax >> 26, 3, "core IDs in a socket, less one");
    assert_eq!(table.lookup(4, 0).eax & 0x3fff, 0x121, "type and level stay");
    assert_eq!(table.lookup(0x1f, 1), table.lookup(0xb, 1));
}

#[test]
fn one_processor_is_no_package_of_many() {
    let table = model(&amd(), "").table(0);
    assert_eq!(table.lookup(1, 0).edx & HTT, 0);
    assert_eq!(table.lookup(0x8000_0001, 0).ecx & CMP_LEGACY, 0);
    assert_eq!(table.lookup(0x8000_0008, 0).ecx, 0);
}

#[test]
fn identity_stays_and_the_rest_is_hidden() {
    let table = model(&amd(), "").table(0);
    assert_eq!(table.lookup(0, 0).ebx, 0x6874_7541);
    assert_eq!(table.lookup(1, 0).eax, 0x00a1_0f11);
    assert_eq!(table.lookup(0x8000_0002, 0).ebx, 0x4359_5045);
    let model = model(&amd(), "");
    for hidden in ["svm", "monitor", "ibs", "osvw"] {
        assert!(!model.has(hidden), "{hidden}");
    }
    assert_eq!(table.lookup(0x8000_000a, 0), CpuidResult::default());
    assert_eq!(table.lookup(0x10, 0), CpuidResult::default(), "leaves nobody vouches for stay away");
    assert_eq!(table.lookup(0x8000_001f, 0), CpuidResult::default());
    assert_eq!(table.lookup(1, 0).ecx & OSXSAVE, 0, "engines keep it");
    assert_eq!(table.lookup(6, 0), leaf(ARAT, 0, 0, 0));
}

#[test]
fn limits_are_the_highest_leaves_shown() {
    let table = model(&amd(), "").table(0);
    assert_eq!(table.lookup(0, 0).eax, 0xd);
    assert_eq!(table.lookup(0x8000_0000, 0).eax, 0x8000_001e);
    assert_eq!(model(&intel(), "").table(0).lookup(0, 0).eax, 0x1f);
}

#[test]
fn hypervisor_leaves() {
    let plain = model(&amd(), "").table(0);
    assert_ne!(plain.lookup(1, 0).ecx >> 31, 0);
    let base = plain.lookup(0x4000_0000, 0);
    assert_eq!(signature_text([base.ebx, base.ecx, base.edx]), *b"bhyve bhyve ");
    assert_eq!(base.eax, 0x4000_0000);
    assert_eq!(plain.lookup(0x4000_0100, 0), CpuidResult::default());

    let clock = model(&amd(), "+kvmclock").table(0);
    let kvm = clock.lookup(0x4000_0100, 0);
    assert_eq!(signature_text([kvm.ebx, kvm.ecx, kvm.edx]), KVM_SIGNATURE);
    assert_eq!(clock.lookup(0x4000_0101, 0).eax, 1 << 0 | 1 << 3 | 1 << 24);

    let none = model(&amd(), "-hypervisor").table(0);
    assert_eq!(none.lookup(1, 0).ecx >> 31, 0);
    assert_eq!(none.lookup(0x4000_0000, 0), CpuidResult::default());
}

#[test]
fn kvm_features_need_kvm() {
    let mut soft = amd();
    soft.remove(0x4000_0000);
    soft.remove(0x4000_0001);
    let error = Model::new(&soft, &options(1, 1, 1, "+kvmclock")).unwrap_err();
    assert_eq!(error, ModelError::NotOffered { name: "kvmclock" });
    assert!(Model::new(&soft, &options(1, 1, 1, "-kvmclock")).is_ok());
}

#[test]
fn removing_a_feature_removes_what_needs_it() {
    let without = model(&amd(), "-avx");
    for gone in ["avx", "avx2", "fma", "f16c", "avx512f", "avx512vl", "avx512_bf16", "vaes", "vpclmulqdq"] {
        assert!(!without.has(gone), "{gone}");
    }
    for left in ["xsave", "aes", "bmi2", "gfni", "pku"] {
        assert!(without.has(left), "{left}");
    }
    let xsave = without.table(0).lookup(0xd, 0);
    assert_eq!((xsave.eax, xsave.ecx), (0x203, 0x988));
    assert_eq!(without.table(0).lookup(0xd, 2), CpuidResult::default());

    let small = model(&amd(), "-avx512f,-pku").table(0);
    assert_eq!((small.lookup(0xd, 0).eax, small.lookup(0xd, 0).ecx), (7, 0x340));
    assert_eq!(model(&amd(), "-xsave").table(0).lookup(0xd, 0), CpuidResult::default());
}

#[test]
fn lists_that_cannot_be_met_are_refused() {
    assert!(matches!(FeatureList::parse("avx2"), Err(ModelError::Syntax { .. })));
    assert!(matches!(FeatureList::parse("+"), Err(ModelError::Syntax { .. })));
    assert!(matches!(FeatureList::parse("+é"), Err(ModelError::Unknown { .. })));
    let unknown = FeatureList::parse("+avx2,-x2apci").unwrap_err().to_string();
    assert!(unknown.contains("`x2apci`") && unknown.contains("x2apic"), "{unknown}");
    assert_eq!(refused("+xop"), ModelError::NotOffered { name: "xop" });
    assert_eq!(refused("+avx2,-avx"), ModelError::Conflict { name: "avx2", needs: "avx" });
    assert_eq!(
        refused("+kvm-asyncpf-int"),
        ModelError::Conflict { name: "kvm_asyncpf_int", needs: "kvm_asyncpf" }
    );
}

#[test]
fn later_items_override_earlier_ones() {
    let list = FeatureList::parse(" +avx2 , -avx2,, ").unwrap();
    assert_eq!(list.wish("avx2"), Some(false));
    assert_eq!(list.wish("avx"), None);
}

#[test]
fn x2apic_by_option_and_by_list() {
    let with = |x2apic, list: &str| {
        let options = ModelOptions { x2apic, ..options(1, 1, 1, list) };
        Model::new(&amd(), &options).unwrap().has("x2apic")
    };
    assert!(with(true, ""));
    assert!(!with(false, ""));
    assert!(with(false, "+x2apic"));
    assert!(!with(true, "-x2apic"));
}

#[test]
fn many_processors_need_x2apic() {
    let many = ModelOptions { x2apic: false, ..options(1, 256, 1, "") };
    assert_eq!(Model::new(&amd(), &many), Err(ModelError::NeedsX2apic { vcpus: 256, max_apic_id: 255 }));
    let table = Model::new(&amd(), &options(1, 300, 1, "")).unwrap().table(299);
    assert_eq!(table.apic_id(), Some(299));
    assert_eq!(table.lookup(1, 0).ebx >> 24, 299 & 0xff);
}

#[test]
fn topologies_without_processors_are_refused() {
    for (sockets, cores, threads) in [(0, 1, 1), (1, 0, 1), (1, 1, 0), (u32::MAX, u32::MAX, 2)] {
        let error = Model::new(&amd(), &options(sockets, cores, threads, "")).unwrap_err();
        assert!(matches!(error, ModelError::Topology(_)));
    }
}
