//! The software TLB: for each privilege a direct-mapped table from linear page to host address.
//!
//! Only its vCPU looks entries up and fills them. Other threads may take permissions away ([`Tlb::drop_writes_to`]), so the
//! fields are atomics; on the owner's side they compile to plain loads and stores.

use std::sync::atomic::{AtomicU64, Ordering};

use x86::paging::PAGE_SHIFT;

/// log2 of the entries in each table.
const INDEX_BITS: u32 = 10;
const ENTRIES: usize = 1 << INDEX_BITS;
/// No linear page has this address: its low bits are not zero.
const NOTHING: u64 = u64::MAX;

/// With which rights an access is made; each has a table of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Privilege {
    /// CPL 0–2, or an access to a system structure; user pages are barred if SMAP is on.
    Supervisor = 0,
    /// CPL 0–2 with RFLAGS.AC set, which lifts SMAP.
    SupervisorAc = 1,
    /// CPL 3.
    User = 2,
}

/// One translation. A tag equals the linear page address if that kind of access may use `host`, else it matches no page.
#[repr(C, align(32))]
pub struct Entry {
    /// Tag for loads.
    pub read: AtomicU64,
    /// Tag for stores.
    pub write: AtomicU64,
    /// Linear page and [`GLOBAL`] bit, for flushing; [`NOTHING`] when empty.
    info: AtomicU64,
    /// Host address minus linear address.
    pub addend: AtomicU64,
}

const GLOBAL: u64 = 1;

/// The three tables.
pub struct Tlb {
    entries: Box<[Entry]>,
}

impl Default for Tlb {
    fn default() -> Self {
        let empty = || Entry {
            read: AtomicU64::new(NOTHING),
            write: AtomicU64::new(NOTHING),
            info: AtomicU64::new(NOTHING),
            addend: AtomicU64::new(0),
        };
        Tlb { entries: (0..3 * ENTRIES).map(|_| empty()).collect() }
    }
}

impl Tlb {
    /// The entry that a linear address can be in.
    #[inline(always)]
    pub fn entry(&self, privilege: Privilege, gva: u64) -> &Entry {
        let index = (gva >> PAGE_SHIFT) as usize & (ENTRIES - 1);
        // SAFETY: privilege is below 3 and the index below ENTRIES.
        unsafe { self.entries.get_unchecked(privilege as usize * ENTRIES + index) }
    }

    /// Fills an entry. A tag is set for each permitted access.
    pub fn fill(&self, privilege: Privilege, page: u64, host: u64, read: bool, write: bool, global: bool) {
        let entry = self.entry(privilege, page);
        entry.read.store(NOTHING, Ordering::Relaxed);
        entry.write.store(NOTHING, Ordering::Relaxed);
        entry.addend.store(host.wrapping_sub(page), Ordering::Relaxed);
        entry.info.store(page | if global { GLOBAL } else { 0 }, Ordering::Relaxed);
        entry.read.store(if read { page } else { NOTHING }, Ordering::Relaxed);
        entry.write.store(if write { page } else { NOTHING }, Ordering::SeqCst);
    }

    fn clear(entry: &Entry) {
        entry.read.store(NOTHING, Ordering::Relaxed);
        entry.write.store(NOTHING, Ordering::Relaxed);
        entry.info.store(NOTHING, Ordering::Relaxed);
    }

    /// Forgets everything, or everything but global pages.
    pub fn flush(&self, keep_global: bool) {
        for entry in &self.entries {
            let info = entry.info.load(Ordering::Relaxed);
            if info != NOTHING && !(keep_global && info & GLOBAL != 0) {
                Self::clear(entry);
            }
        }
    }

    /// Forgets one linear page.
    pub fn flush_page(&self, gva: u64) {
        let page = gva >> PAGE_SHIFT << PAGE_SHIFT;
        for privilege in [Privilege::Supervisor, Privilege::SupervisorAc, Privilege::User] {
            let entry = self.entry(privilege, gva);
            if entry.info.load(Ordering::Relaxed) & !GLOBAL == page {
                Self::clear(entry);
            }
        }
    }

    /// Takes the store permission from every entry that leads to a host page. Callable from any thread.
    pub fn drop_writes_to(&self, host_page: u64) {
        for entry in &self.entries {
            let tag = entry.write.load(Ordering::SeqCst);
            if tag != NOTHING && tag.wrapping_add(entry.addend.load(Ordering::Relaxed)) == host_page {
                entry.write.store(NOTHING, Ordering::SeqCst);
            }
        }
    }

    /// Takes the store permission from every entry. Callable from any thread.
    pub fn drop_all_writes(&self) {
        for entry in &self.entries {
            entry.write.store(NOTHING, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hits(tlb: &Tlb, gva: u64) -> (bool, bool) {
        let entry = tlb.entry(Privilege::User, gva);
        (entry.read.load(Ordering::Relaxed) == gva, entry.write.load(Ordering::Relaxed) == gva)
    }

    #[test]
    fn flushes_keep_what_they_should() {
        let tlb = Tlb::default();
        tlb.fill(Privilege::User, 0x1000, 0x7000_0000, true, true, false);
        tlb.fill(Privilege::User, 0x2000, 0x7000_1000, true, true, true);
        tlb.drop_writes_to(0x7000_0000);
        assert_eq!(hits(&tlb, 0x1000), (true, false));
        assert_eq!(hits(&tlb, 0x2000), (true, true));
        tlb.flush(true);
        assert_eq!(hits(&tlb, 0x1000), (false, false));
        assert_eq!(hits(&tlb, 0x2000), (true, true));
        tlb.flush_page(0x2fff);
        assert_eq!(hits(&tlb, 0x2000), (false, false));
    }
}
