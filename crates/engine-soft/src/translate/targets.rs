//! Where jumps to linear addresses lead: for each privilege a direct-mapped table from RIP to translated code, which
//! generated code looks up itself.
//!
//! An entry holds for the mapping of its page at the time it was made, so the table follows the TLB's life: it is
//! emptied when the address space changes, and loses a page's entries when the page's translation does.

use rustc_hash::FxHashSet;
use x86::paging::{PAGE_MASK, PAGE_SHIFT, PAGE_SIZE};

use crate::tlb::{PRIVILEGES, Privilege};

/// Longest instruction in bytes.
const MAX_INSTRUCTION: u64 = 15;

/// log2 of the entries in each table.
pub const INDEX_BITS: u32 = 14;
const ENTRIES: usize = 1 << INDEX_BITS;
/// How far a page number is shifted to be mixed with the low bits of an address.
pub const MIX_SHIFT: u8 = 12;

/// Entries that are remembered one by one, so that a table with few of them is emptied quickly.
const LOG: usize = 2048;

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
    /// Indexes of the entries made since the table was emptied, as many as fit.
    log: [u16; LOG],
    /// How many entries were made.
    made: usize,
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

/// What stands in an empty entry: a RIP that belongs elsewhere.
fn nothing(index: usize) -> Target {
    Target { rip: u64::from(index == 0), host: 0 }
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
        let index = index_of(rip);
        table.entries[index] = Target { rip, host };
        if let Some(place) = table.log.get_mut(table.made) {
            *place = index as u16;
        }
        table.made += 1;
        table.local |= !global;
    }

    /// Remembers a target until [`Targets::forget`]; nothing else is remembered meanwhile.
    pub fn expect(&mut self, privilege: Privilege, rip: u64, host: u64) {
        self.0[privilege as usize].entries[index_of(rip)] = Target { rip, host };
    }

    /// Forgets a target.
    pub fn forget(&mut self, privilege: Privilege, rip: u64) {
        let index = index_of(rip);
        self.0[privilege as usize].entries[index] = nothing(index);
    }

    /// The address space changed.
    pub fn forget_local(&mut self) {
        for privilege in PRIVILEGES {
            if self.0[privilege as usize].local {
                self.empty(privilege);
            }
        }
    }

    /// Forgets everything.
    pub fn forget_everything(&mut self) {
        for privilege in PRIVILEGES {
            self.empty(privilege);
        }
    }

    /// Forgets the targets of one privilege.
    pub fn empty(&mut self, privilege: Privilege) {
        let table = &mut self.0[privilege as usize];
        match table.log.get(..table.made) {
            Some(log) if table.ready => {
                for index in log {
                    table.entries[usize::from(*index)] = nothing(usize::from(*index));
                }
            }
            _ => {
                for (index, entry) in table.entries.iter_mut().enumerate() {
                    *entry = nothing(index);
                }
            }
        }
        table.made = 0;
        table.local = false;
        table.ready = true;
    }

    /// Forgets what lies in the page of a RIP, and what reaches into it.
    pub fn forget_page(&mut self, rip: u64) {
        let reaching = (rip & !PAGE_MASK).wrapping_sub(MAX_INSTRUCTION - 1);
        for table in &mut self.0 {
            for (index, entry) in table.entries.iter_mut().enumerate() {
                if entry.rip.wrapping_sub(reaching) < PAGE_SIZE + MAX_INSTRUCTION - 1 {
                    *entry = nothing(index);
                }
            }
        }
    }
}

/// Pages of code on whose place something depends: an entry of the table, or a link from another page.
#[derive(Default)]
pub struct Pages {
    global: FxHashSet<u64>,
    local: FxHashSet<u64>,
}

impl Pages {
    /// Remembers the page of a RIP.
    pub fn note(&mut self, rip: u64, global: bool) {
        let pages = if global { &mut self.global } else { &mut self.local };
        pages.insert(rip >> PAGE_SHIFT);
    }

    /// Whether anything depends on the page of a RIP, or on code that reaches into it from the page before.
    pub fn matter(&self, rip: u64) -> bool {
        let page = rip >> PAGE_SHIFT;
        [page, page.wrapping_sub(1)]
            .iter()
            .any(|page| self.global.contains(page) || self.local.contains(page))
    }

    /// Nothing depends on any page any more, or only on global ones.
    pub fn forget(&mut self, keep_global: bool) {
        self.local.clear();
        if !keep_global {
            self.global.clear();
        }
    }
}
