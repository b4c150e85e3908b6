//! Where jumps to linear addresses lead: for each privilege a direct-mapped table from RIP to translated code, which
//! generated code looks up itself.
//!
//! An entry holds for the mapping of its page at the time it was made, so the table follows the TLB's life: it is
//! emptied when the address space changes, and loses a page's entries when the page's translation does.

use x86::paging::{PAGE_MASK, PAGE_SIZE};

use crate::tlb::{PRIVILEGES, Privilege};

/// Longest instruction in bytes.
const MAX_INSTRUCTION: u64 = 15;

/// log2 of the entries in each table.
pub const INDEX_BITS: u32 = 14;
const ENTRIES: usize = 1 << INDEX_BITS;
/// How far a page number is shifted to be mixed with the low bits of an address.
pub const MIX_SHIFT: u8 = 12;
/// No RIP: it is not canonical.
const NOTHING: u64 = 1 << 63;
/// Pages of which entries may exist are remembered in so many bits.
const FILTER_BITS: usize = 4096;

/// One known target.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Target {
    /// RIP.
    pub rip: u64,
    /// Translated code, entered with the flags in memory.
    pub host: u64,
}

/// One privilege's table.
#[repr(C)]
pub struct Table {
    /// By [`index_of`].
    pub entries: [Target; ENTRIES],
    filter: [u64; FILTER_BITS / 64],
    /// Anything was entered since the table was emptied.
    used: bool,
    /// Anything that does not survive a change of address space.
    local: bool,
    /// It was never emptied: zeroes would match RIP 0.
    ready: bool,
}

/// The three tables. All zeroes is a state in which [`Targets::empty`] has to be called before generated code runs.
#[repr(C)]
pub struct Targets([Table; 3]);

/// Index of a RIP.
pub fn index_of(rip: u64) -> usize {
    (rip ^ rip >> MIX_SHIFT) as usize & (ENTRIES - 1)
}

fn filter_bit(rip: u64) -> (usize, u64) {
    let bit = (rip >> 12) as usize % FILTER_BITS;
    (bit / 64, 1 << (bit % 64))
}

impl Targets {
    /// What is known of a RIP.
    pub fn find(&self, privilege: Privilege, rip: u64) -> Option<u64> {
        let entry = self.0[privilege as usize].entries[index_of(rip)];
        (entry.rip == rip).then_some(entry.host)
    }

    /// Remembers a target. `global` ones survive a change of address space.
    pub fn insert(&mut self, privilege: Privilege, rip: u64, host: u64, global: bool) {
        let table = &mut self.0[privilege as usize];
        table.entries[index_of(rip)] = Target { rip, host };
        let (word, bit) = filter_bit(rip);
        table.filter[word] |= bit;
        table.used = true;
        table.local |= !global;
    }

    /// The address space changed.
    pub fn forget_local(&mut self) {
        for privilege in PRIVILEGES {
            if self.0[privilege as usize].local {
                self.empty(privilege);
            }
        }
    }

    /// Forgets everything of one privilege.
    pub fn empty(&mut self, privilege: Privilege) {
        let table = &mut self.0[privilege as usize];
        if table.used || !table.ready {
            table.entries.fill(Target { rip: NOTHING, host: 0 });
            table.filter.fill(0);
            table.used = false;
            table.local = false;
            table.ready = true;
        }
    }

    /// Forgets what lies in the page of a RIP, and what reaches into it.
    pub fn forget_page(&mut self, rip: u64) {
        let page = rip & !PAGE_MASK;
        let reaching = page.wrapping_sub(MAX_INSTRUCTION - 1);
        for table in &mut self.0 {
            let may_have = |rip: u64| {
                let (word, bit) = filter_bit(rip);
                table.filter[word] & bit != 0
            };
            if may_have(page) || may_have(reaching) {
                for entry in &mut table.entries {
                    if entry.rip.wrapping_sub(reaching) < PAGE_SIZE + MAX_INSTRUCTION - 1 {
                        entry.rip = NOTHING;
                    }
                }
            }
        }
    }
}
