//! CPUID tables (SDM 2A "CPUID", APM 3 appendix E).

pub mod features;
pub mod model;
pub mod topology;

use serde::{Deserialize, Serialize};

pub use topology::Topology;

/// The four registers that one CPUID leaf returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct CpuidResult {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// One leaf or subleaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidEntry {
    /// EAX on input.
    pub leaf: u32,
    /// ECX on input; `None` when the leaf ignores it.
    pub subleaf: Option<u32>,
    /// What the processor answers.
    pub result: CpuidResult,
}

/// What a processor answers to CPUID, leaf by leaf.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidTable {
    entries: Vec<CpuidEntry>,
}

impl CpuidTable {
    /// An empty table: every leaf answers zeros.
    pub fn new() -> Self {
        Self::default()
    }

    /// All entries, in no particular order.
    pub fn entries(&self) -> &[CpuidEntry] {
        &self.entries
    }

    /// Adds or replaces one entry.
    pub fn set(&mut self, leaf: u32, subleaf: Option<u32>, result: CpuidResult) {
        match self.entries.iter_mut().find(|e| e.leaf == leaf && e.subleaf == subleaf) {
            Some(entry) => entry.result = result,
            None => self.entries.push(CpuidEntry { leaf, subleaf, result }),
        }
    }

    /// Removes a leaf with all its subleaves.
    pub fn remove(&mut self, leaf: u32) {
        self.entries.retain(|e| e.leaf != leaf);
    }

    /// The entry for a leaf and subleaf, if the table has one.
    pub fn get(&self, leaf: u32, subleaf: u32) -> Option<CpuidResult> {
        self.entries
            .iter()
            .find(|e| e.leaf == leaf && e.subleaf.is_none_or(|s| s == subleaf))
            .map(|e| e.result)
    }

    /// What the instruction returns: leaves that are absent answer zeros, and leaves beyond the highest of
    /// their range answer like the highest basic leaf on Intel and zeros on AMD; Apiary answers zeros.
    pub fn lookup(&self, leaf: u32, subleaf: u32) -> CpuidResult {
        self.get(leaf, subleaf).unwrap_or_default()
    }

    /// The initial APIC ID that the table gives its processor: leaf 0BH if it enumerates a topology (SDM 2A), else
    /// leaf 1, which holds only eight bits. `None` for a table without leaf 1.
    pub fn apic_id(&self) -> Option<u32> {
        if let Some(topology) = self.get(0xb, 0).filter(|leaf| leaf.ebx != 0) {
            return Some(topology.edx);
        }
        self.get(1, 0).map(|leaf| leaf.ebx >> 24)
    }

    /// Applies `change` to every subleaf of `leaf` that is present.
    pub fn update(&mut self, leaf: u32, mut change: impl FnMut(&mut CpuidResult)) {
        for entry in self.entries.iter_mut().filter(|e| e.leaf == leaf) {
            change(&mut entry.result);
        }
    }
}
