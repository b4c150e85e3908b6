//! Counters under the names that `bhyvectl --get-stats` has for them (FreeBSD `sys/amd64/vmm/vmm_stat.c`).
//!
//! Most exits never leave the kernel; those are read from KVM's own statistics (Linux `api.rst` §4.134, kernels
//! from 5.14). What reaches this process is counted here.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

/// Exits that reached this process, by reason.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) userspace: AtomicU64,
    pub(crate) inout: AtomicU64,
    pub(crate) inout_string: AtomicU64,
    pub(crate) mmio: AtomicU64,
    pub(crate) interrupted: AtomicU64,
    pub(crate) unknown_msr: AtomicU64,
    pub(crate) shutdown: AtomicU64,
    pub(crate) debug: AtomicU64,
    pub(crate) unknown: AtomicU64,
}

/// Adds one.
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// bhyve's name of a statistic and KVM's.
const KERNEL_NAMES: [(&str, &str); 15] = [
    ("total number of vm exits", "exits"),
    ("vm exits due to external interrupt", "irq_exits"),
    ("number of times hlt was intercepted", "halt_exits"),
    ("vm exits due to interrupt window opening", "irq_window_exits"),
    ("vm exits due to nmi window opening", "nmi_window_exits"),
    ("number of times in/out was intercepted", "io_exits"),
    ("vm exits due to nested page fault", "pf_taken"),
    ("vm exits for instruction emulation", "insn_emulation"),
    ("number of times astpending at exit", "signal_exits"),
    ("number of NMIs delivered to vcpu", "nmi_injections"),
    ("number of ExtINTs delivered to vcpu", "irq_injections"),
    ("vm exits due to device memory", "mmio_exits"),
    ("number of hypercalls", "hypercalls"),
    ("TLB flushes", "tlb_flush"),
    ("wakeups from hlt", "halt_wakeup"),
];

impl Counters {
    /// All counters of a vCPU by name.
    pub(crate) fn named(&self, kernel: Option<&KernelStats>) -> Vec<(String, u64)> {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut named = Vec::new();
        match kernel.map(KernelStats::read) {
            Some(values) if !values.is_empty() => {
                for (ours, theirs) in KERNEL_NAMES {
                    if let Some((_, value)) = values.iter().find(|(name, _)| name == theirs) {
                        named.push((ours.to_owned(), *value));
                    }
                }
            }
            // Without the kernel's own numbers the exits seen here are all there is to tell.
            _ => {
                named.push(("total number of vm exits".to_owned(), read(&self.userspace)));
                named.push(("number of times in/out was intercepted".to_owned(), read(&self.inout)));
            }
        }
        for (name, counter) in [
            ("number of vm exits handled in userspace", &self.userspace),
            ("in/out handled in userspace", &self.inout),
            ("string in/out handled in userspace", &self.inout_string),
            ("device memory accesses handled in userspace", &self.mmio),
            ("vm exits due to a signal", &self.interrupted),
            ("accesses to unknown MSRs", &self.unknown_msr),
            ("vm exits due to triple fault", &self.shutdown),
            ("vm exits due to debugging", &self.debug),
            ("number of vm exits for unknown reason", &self.unknown),
        ] {
            named.push((name.to_owned(), read(counter)));
        }
        named
    }
}

/// Bytes of `struct kvm_stats_header`.
const HEADER_BYTES: usize = 24;
/// Bytes of `struct kvm_stats_desc` without the name that follows it.
const DESCRIPTOR_BYTES: usize = 16;
/// More descriptors than any kernel has; keeps a nonsensical header from costing memory.
const MAX_DESCRIPTORS: usize = 4096;

/// KVM's statistics of one VM or vCPU: names and places are read once, values on demand.
#[derive(Debug)]
pub(crate) struct KernelStats {
    file: File,
    /// Name and file offset of each single-value statistic.
    places: Vec<(String, u64)>,
}

impl KernelStats {
    /// Reads the descriptors; `None` if the kernel's layout is not the one documented.
    pub(crate) fn open(file: File) -> Option<KernelStats> {
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0).ok()?;
        let word = |n: usize| {
            u32::from_le_bytes([header[4 * n], header[4 * n + 1], header[4 * n + 2], header[4 * n + 3]])
        };
        // flags, name_size, num_desc, id_offset, desc_offset, data_offset
        let (name_bytes, descriptors) = (word(1) as usize, word(2) as usize);
        let (descriptor_offset, data_offset) = (u64::from(word(4)), u64::from(word(5)));
        if name_bytes == 0 || name_bytes > 256 || descriptors > MAX_DESCRIPTORS {
            return None;
        }
        let each = DESCRIPTOR_BYTES + name_bytes;
        let mut raw = vec![0; descriptors * each];
        file.read_exact_at(&mut raw, descriptor_offset).ok()?;
        let places = raw
            .chunks_exact(each)
            .filter_map(|descriptor| {
                // flags u32, exponent s16, size u16, offset u32, bucket_size u32, name
                let size = u16::from_le_bytes([descriptor[6], descriptor[7]]);
                let offset =
                    u32::from_le_bytes([descriptor[8], descriptor[9], descriptor[10], descriptor[11]]);
                let name = &descriptor[DESCRIPTOR_BYTES..];
                let name = &name[..name.iter().position(|b| *b == 0).unwrap_or(name.len())];
                let name = std::str::from_utf8(name).ok()?.to_owned();
                (size == 1).then_some((name, data_offset + u64::from(offset)))
            })
            .collect();
        Some(KernelStats { file, places })
    }

    /// Names and values now.
    pub(crate) fn read(&self) -> Vec<(String, u64)> {
        self.places
            .iter()
            .filter_map(|(name, offset)| {
                let mut value = [0; 8];
                self.file.read_exact_at(&mut value, *offset).ok()?;
                Some((name.clone(), u64::from_le_bytes(value)))
            })
            .collect()
    }
}
