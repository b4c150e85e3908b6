//! CPU features by name.
//!
//! The names are Linux's (`/proc/cpuinfo`), with QEMU's and FreeBSD's as aliases; underscores, dashes and dots are
//! the same, and so are capitals. The places are those of SDM 2A "CPUID" and APM 3 appendix E; KVM's own are from
//! Linux `Documentation/virt/kvm/x86/cpuid.rst`.

use super::CpuidResult;

/// One of the four registers of a [`CpuidResult`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    /// Its value.
    pub const fn of(self, result: &CpuidResult) -> u32 {
        match self {
            Register::Eax => result.eax,
            Register::Ebx => result.ebx,
            Register::Ecx => result.ecx,
            Register::Edx => result.edx,
        }
    }

    /// Access to it.
    pub const fn of_mut(self, result: &mut CpuidResult) -> &mut u32 {
        match self {
            Register::Eax => &mut result.eax,
            Register::Ebx => &mut result.ebx,
            Register::Ecx => &mut result.ecx,
            Register::Edx => &mut result.edx,
        }
    }
}

/// A register that holds features, and the names of its bits.
#[derive(Debug)]
pub struct FeatureWord {
    /// EAX on input.
    pub leaf: u32,
    /// ECX on input, for leaves that look at it.
    pub subleaf: Option<u32>,
    /// Which register of the answer.
    pub register: Register,
    /// Bit number and names, the first of them the usual one.
    bits: &'static [(u8, &'static str)],
}

/// A named feature.
#[derive(Clone, Copy, Debug)]
pub struct Feature {
    /// Its usual name.
    pub name: &'static str,
    /// Its aliases, separated by blanks.
    aliases: &'static str,
    /// Where it is.
    pub word: &'static FeatureWord,
    /// Bit number in the word's register.
    pub bit: u32,
}

impl Feature {
    /// The bit as a mask.
    pub const fn mask(&self) -> u32 {
        1 << self.bit
    }

    /// Whether it is one of KVM's own.
    pub const fn is_kvm(&self) -> bool {
        self.word.leaf == KVM_FEATURE_LEAF
    }
}

impl PartialEq for Feature {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

/// Where KVM says which of its own interfaces it offers.
pub const KVM_FEATURE_LEAF: u32 = 0x4000_0001;

/// All features in order of leaf.
pub fn all() -> impl Iterator<Item = Feature> {
    WORDS.iter().flat_map(|word| {
        word.bits.iter().map(move |(bit, names)| {
            let (name, aliases) = names.split_once(' ').unwrap_or((names, ""));
            Feature { name, aliases, word, bit: u32::from(*bit) }
        })
    })
}

/// The feature with this name or alias.
pub fn find(name: &str) -> Option<Feature> {
    let name = normal(name);
    all().find(|f| names_of(f).any(|known| normal(known) == name))
}

/// Known names that resemble `name`, the closest first.
pub fn similar(name: &str) -> Vec<&'static str> {
    const MOST: usize = 6;
    let name = normal(name);
    let mut ranked: Vec<(usize, &'static str)> = all()
        .filter_map(|feature| {
            let nearest = names_of(&feature)
                .map(|known| {
                    let known = normal(known);
                    let distance = edit_distance(&name, &known);
                    // Part of a name counts as near: "avx512" is a good start.
                    if name.len() >= 3 && (known.starts_with(&name) || name.starts_with(&known)) {
                        distance.min(2)
                    } else {
                        distance
                    }
                })
                .min()?;
            (nearest <= 2 && nearest < name.len()).then_some((nearest, feature.name))
        })
        .collect();
    ranked.sort();
    ranked.into_iter().map(|(_, name)| name).take(MOST).collect()
}

/// Features that `feature` is of no use without (SDM 1 §14, APM 1 §6): a guest is never shown it alone.
pub fn needs(feature: &str) -> &'static [&'static str] {
    NEEDS
        .iter()
        .find(|(names, _)| names.split(' ').any(|name| name == feature))
        .map_or(&[], |(_, needs)| needs)
}

fn names_of(feature: &Feature) -> impl Iterator<Item = &'static str> {
    std::iter::once(feature.name).chain(feature.aliases.split(' ').filter(|alias| !alias.is_empty()))
}

fn normal(name: &str) -> String {
    name.chars().filter(|c| !matches!(c, '_' | '-' | '.')).map(|c| c.to_ascii_lowercase()).collect()
}

/// Insertions, removals and replacements between two names (Levenshtein).
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, left) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, right) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(left != *right);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

const NEEDS: &[(&str, &[&str])] = &[
    ("avx pku xsaveopt xsavec xgetbv1 xsaves", &["xsave"]),
    ("avx2 fma f16c xop fma4", &["avx"]),
    ("vaes", &["avx", "aes"]),
    ("vpclmulqdq", &["avx", "pclmulqdq"]),
    ("avx_vnni avx_ifma avx_vnni_int8 avx_ne_convert avx_vnni_int16 sha512 sm3 sm4 avx512f", &["avx2"]),
    (
        "avx512dq avx512ifma avx512pf avx512er avx512cd avx512bw avx512vl avx512_vnni avx512_vpopcntdq \
         avx512_4vnniw avx512_4fmaps avx512_vp2intersect avx10",
        &["avx512f"],
    ),
    ("avx512vbmi avx512_vbmi2 avx512_bitalg avx512_bf16 avx512_fp16", &["avx512bw"]),
    ("x2apic tsc_deadline_timer", &["apic"]),
    ("ssse3", &["pni"]),
    ("sse4_1", &["ssse3"]),
    ("sse4_2", &["sse4_1"]),
    ("aes pclmulqdq sha_ni gfni", &["sse2"]),
    ("pni", &["sse2"]),
    ("sse2", &["sse"]),
    ("sse", &["fxsr"]),
    ("kvm_asyncpf_int kvm_asyncpf_vmexit", &["kvm_asyncpf"]),
];

use Register::{Eax, Ebx, Ecx, Edx};

const WORDS: &[FeatureWord] = &[
    FeatureWord {
        leaf: 1,
        subleaf: None,
        register: Ecx,
        bits: &[
            (0, "pni sse3"),
            (1, "pclmulqdq pclmul"),
            (2, "dtes64"),
            (3, "monitor mwait"),
            (4, "ds_cpl"),
            (5, "vmx"),
            (6, "smx"),
            (7, "est"),
            (8, "tm2"),
            (9, "ssse3"),
            (10, "cid"),
            (11, "sdbg"),
            (12, "fma"),
            (13, "cx16 cmpxchg16b"),
            (14, "xtpr"),
            (15, "pdcm"),
            (17, "pcid"),
            (18, "dca"),
            (19, "sse4_1"),
            (20, "sse4_2"),
            (21, "x2apic"),
            (22, "movbe"),
            (23, "popcnt"),
            (24, "tsc_deadline_timer tsc_deadline tscdlt"),
            (25, "aes aesni"),
            (26, "xsave"),
            (28, "avx"),
            (29, "f16c"),
            (30, "rdrand"),
            (31, "hypervisor hv"),
        ],
    },
    FeatureWord {
        leaf: 1,
        subleaf: None,
        register: Edx,
        bits: &[
            (0, "fpu"),
            (1, "vme"),
            (2, "de"),
            (3, "pse"),
            (4, "tsc"),
            (5, "msr"),
            (6, "pae"),
            (7, "mce"),
            (8, "cx8"),
            (9, "apic"),
            (11, "sep"),
            (12, "mtrr"),
            (13, "pge"),
            (14, "mca"),
            (15, "cmov"),
            (16, "pat"),
            (17, "pse36"),
            (18, "pn"),
            (19, "clflush clfsh"),
            (21, "dts ds"),
            (22, "acpi"),
            (23, "mmx"),
            (24, "fxsr"),
            (25, "sse"),
            (26, "sse2"),
            (27, "ss"),
            (29, "tm"),
            (31, "pbe"),
        ],
    },
    FeatureWord { leaf: 6, subleaf: None, register: Eax, bits: &[(2, "arat")] },
    FeatureWord {
        leaf: 7,
        subleaf: Some(0),
        register: Ebx,
        bits: &[
            (0, "fsgsbase"),
            (1, "tsc_adjust"),
            (3, "bmi1"),
            (4, "hle"),
            (5, "avx2"),
            (6, "fdp_excptn_only"),
            (7, "smep"),
            (8, "bmi2"),
            (9, "erms"),
            (10, "invpcid"),
            (11, "rtm"),
            (13, "zero_fcs_fds"),
            (16, "avx512f"),
            (17, "avx512dq"),
            (18, "rdseed"),
            (19, "adx"),
            (20, "smap"),
            (21, "avx512ifma"),
            (23, "clflushopt"),
            (24, "clwb"),
            (26, "avx512pf"),
            (27, "avx512er"),
            (28, "avx512cd"),
            (29, "sha_ni sha"),
            (30, "avx512bw"),
            (31, "avx512vl"),
        ],
    },
    FeatureWord {
        leaf: 7,
        subleaf: Some(0),
        register: Ecx,
        bits: &[
            (0, "prefetchwt1"),
            (1, "avx512vbmi"),
            (2, "umip"),
            (3, "pku"),
            (5, "waitpkg"),
            (6, "avx512_vbmi2"),
            (8, "gfni"),
            (9, "vaes"),
            (10, "vpclmulqdq"),
            (11, "avx512_vnni"),
            (12, "avx512_bitalg"),
            (14, "avx512_vpopcntdq"),
            (16, "la57"),
            (22, "rdpid"),
            (24, "bus_lock_detect"),
            (25, "cldemote"),
            (27, "movdiri"),
            (28, "movdir64b"),
            (31, "pks"),
        ],
    },
    FeatureWord {
        leaf: 7,
        subleaf: Some(0),
        register: Edx,
        bits: &[
            (2, "avx512_4vnniw"),
            (3, "avx512_4fmaps"),
            (4, "fsrm"),
            (8, "avx512_vp2intersect"),
            (10, "md_clear"),
            (14, "serialize"),
            (16, "tsxldtrk"),
            (23, "avx512_fp16"),
            (26, "spec_ctrl"),
            (27, "intel_stibp stibp"),
            (28, "flush_l1d"),
            (29, "arch_capabilities"),
            (30, "core_capabilities core_capability"),
            (31, "spec_ctrl_ssbd ssbd"),
        ],
    },
    FeatureWord {
        leaf: 7,
        subleaf: Some(1),
        register: Eax,
        bits: &[
            (0, "sha512"),
            (1, "sm3"),
            (2, "sm4"),
            (4, "avx_vnni"),
            (5, "avx512_bf16"),
            (6, "lass"),
            (7, "cmpccxadd"),
            (10, "fzrm"),
            (11, "fsrs"),
            (12, "fsrc"),
            (17, "fred"),
            (18, "lkgs"),
            (19, "wrmsrns"),
            (22, "hreset"),
            (23, "avx_ifma"),
            (26, "lam"),
        ],
    },
    FeatureWord {
        leaf: 7,
        subleaf: Some(1),
        register: Edx,
        bits: &[
            (4, "avx_vnni_int8"),
            (5, "avx_ne_convert"),
            (10, "avx_vnni_int16"),
            (14, "prefetchiti"),
            (19, "avx10"),
        ],
    },
    FeatureWord {
        leaf: 0xd,
        subleaf: Some(1),
        register: Eax,
        bits: &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1"), (3, "xsaves"), (4, "xfd")],
    },
    FeatureWord {
        leaf: KVM_FEATURE_LEAF,
        subleaf: None,
        register: Eax,
        bits: &[
            (1, "kvm_nopiodelay"),
            (3, "kvmclock"),
            (4, "kvm_asyncpf"),
            (5, "kvm_steal_time"),
            (6, "kvm_pv_eoi"),
            (7, "kvm_pv_unhalt"),
            (9, "kvm_pv_tlb_flush"),
            (10, "kvm_asyncpf_vmexit"),
            (11, "kvm_pv_ipi"),
            (12, "kvm_poll_control"),
            (13, "kvm_pv_sched_yield"),
            (14, "kvm_asyncpf_int"),
        ],
    },
    FeatureWord {
        leaf: 0x8000_0001,
        subleaf: None,
        register: Ecx,
        bits: &[
            (0, "lahf_lm"),
            (2, "svm"),
            (3, "extapic"),
            (4, "cr8_legacy"),
            (5, "abm lzcnt"),
            (6, "sse4a"),
            (7, "misalignsse"),
            (8, "3dnowprefetch prefetchw"),
            (9, "osvw"),
            (10, "ibs"),
            (11, "xop"),
            (12, "skinit"),
            (13, "wdt"),
            (15, "lwp"),
            (16, "fma4"),
            (17, "tce"),
            (19, "nodeid_msr"),
            (21, "tbm"),
            (22, "topoext"),
            (23, "perfctr_core"),
            (24, "perfctr_nb"),
            (26, "bpext"),
            (27, "ptsc"),
            (28, "perfctr_llc"),
            (29, "mwaitx monitorx"),
        ],
    },
    FeatureWord {
        leaf: 0x8000_0001,
        subleaf: None,
        register: Edx,
        bits: &[
            (11, "syscall"),
            (20, "nx xd"),
            (22, "mmxext"),
            (25, "fxsr_opt ffxsr"),
            (26, "pdpe1gb page1gb"),
            (27, "rdtscp"),
            (29, "lm i64"),
            (30, "3dnowext"),
            (31, "3dnow"),
        ],
    },
    FeatureWord {
        leaf: 0x8000_0007,
        subleaf: None,
        register: Edx,
        bits: &[(8, "invtsc nonstop_tsc constant_tsc")],
    },
    FeatureWord {
        leaf: 0x8000_0008,
        subleaf: None,
        register: Ebx,
        bits: &[
            (0, "clzero"),
            (1, "irperf"),
            (2, "xsaveerptr"),
            (4, "rdpru"),
            (9, "wbnoinvd"),
            (12, "amd_ibpb ibpb"),
            (14, "amd_ibrs ibrs"),
            (15, "amd_stibp"),
            (17, "amd_stibp_always_on"),
            (24, "amd_ssbd"),
            (25, "virt_ssbd"),
            (26, "amd_ssb_no"),
            (28, "amd_psfd"),
        ],
    },
    FeatureWord {
        leaf: 0x8000_0021,
        subleaf: None,
        register: Eax,
        bits: &[
            (0, "no_nested_data_bp"),
            (2, "lfence_rdtsc"),
            (6, "null_sel_clr_base"),
            (8, "autoibrs"),
            (9, "no_smm_ctl_msr"),
            (27, "sbpb"),
            (28, "ibpb_brtype"),
            (29, "srso_no"),
        ],
    },
    FeatureWord {
        leaf: 0x8000_0021,
        subleaf: None,
        register: Ecx,
        bits: &[(1, "tsa_sq_no"), (2, "tsa_l1_no")],
    },
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_and_places_are_unique() {
        let mut names = HashSet::new();
        let mut places = HashSet::new();
        for feature in all() {
            for name in names_of(&feature) {
                assert!(names.insert(normal(name)), "{name} twice");
            }
            assert!(feature.bit < 32);
            let word = feature.word;
            let register = format!("{:?}", word.register);
            assert!(places.insert((word.leaf, word.subleaf, register, feature.bit)), "{}", feature.name);
        }
    }

    #[test]
    fn every_dependency_names_known_features() {
        for (names, needs) in NEEDS {
            for name in names.split_whitespace().chain(needs.iter().copied()) {
                assert_eq!(find(name).map(|f| f.name), Some(name), "{name}");
            }
        }
    }

    #[test]
    fn spellings_of_other_systems_are_known() {
        for (spelling, name) in [
            ("SSE4.1", "sse4_1"),
            ("sse4.2", "sse4_2"),
            ("sse3", "pni"),
            ("tsc-deadline", "tsc_deadline_timer"),
            ("kvm-steal-time", "kvm_steal_time"),
            ("AVX512F", "avx512f"),
            ("sha-ni", "sha_ni"),
        ] {
            assert_eq!(find(spelling).map(|f| f.name), Some(name));
        }
    }

    #[test]
    fn misspelt_names_find_their_neighbours() {
        assert_eq!(similar("avx3")[0], "avx");
        assert!(similar("avx3").contains(&"avx2"));
        assert!(similar("x2apci").contains(&"x2apic"));
        assert!(similar("avx512").contains(&"avx512f"));
        assert!(similar("kvmclok").contains(&"kvmclock"));
        assert!(similar("zzzzzz").is_empty());
    }
}
