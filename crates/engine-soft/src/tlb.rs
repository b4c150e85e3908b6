//! The software TLB: for each privilege a direct-mapped table from linear page to host page.
//!
//! Only its vCPU looks entries up and fills them. Other threads may take store permissions away
//! ([`Tables::drop_writes_to`]), so the fields are atomics; on the owner's side they compile to plain loads and stores.
//!
//! The tables are arrays of words, so that generated code finds an entry by its page number's low bits alone, and large,
//! so that few pages share an entry. What a flush costs depends on what was used: each table remembers which of its
//! chunks had an entry since they were last empty.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, AtomicUsize, Ordering};

use x86::paging::PAGE_SHIFT;

/// log2 of the entries in each table.
pub const INDEX_BITS: u32 = 16;
const ENTRIES: usize = 1 << INDEX_BITS;
/// Entries whose use is remembered together: those of one page of tags.
const CHUNK: usize = 512;
const CHUNKS: usize = ENTRIES / CHUNK;

/// Entries of the address space that are remembered one by one, so that few of them are flushed quickly.
const LOG: usize = 1024;

/// Bit of [`Table::used`]: entries of the address space.
const LOCAL: u8 = 1;
/// Bit of [`Table::used`]: entries that survive a change of address space.
const GLOBAL: u8 = 2;

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

/// All privileges.
pub const PRIVILEGES: [Privilege; 3] = [Privilege::Supervisor, Privilege::SupervisorAc, Privilege::User];

/// One table. A tag equals the linear page address if that kind of access may use the host page, else it is one that no
/// page of this entry has.
#[repr(C)]
pub struct Table {
    /// Tags for loads.
    pub read: [AtomicU64; ENTRIES],
    /// Tags for stores.
    pub write: [AtomicU64; ENTRIES],
    /// Tags for fetches.
    code: [AtomicU64; ENTRIES],
    /// Host addresses of the pages.
    pub host: [AtomicU64; ENTRIES],
    /// 1 for pages that survive a change of address space.
    global: [AtomicU8; ENTRIES],
    /// For each chunk, whether it may have entries: [`LOCAL`], [`GLOBAL`].
    used: [AtomicU8; CHUNKS],
    /// Indexes of the entries of the address space made since these were last flushed, as many as fit.
    log: [AtomicU16; LOG],
    /// How many were made.
    made: AtomicUsize,
}

/// The three tables. All zeroes, followed by [`Tables::init`], is the empty state.
#[repr(C)]
pub struct Tables([Table; 3]);

/// The place where a linear address can be.
#[derive(Clone, Copy)]
pub struct Entry<'a> {
    /// Tag for loads.
    pub read: &'a AtomicU64,
    /// Tag for stores.
    pub write: &'a AtomicU64,
    /// Host address of the page.
    pub host: &'a AtomicU64,
}

/// The tag of an empty entry: a page that belongs elsewhere.
const fn nothing(index: usize) -> u64 {
    if index == 0 { 1 << PAGE_SHIFT } else { 0 }
}

const fn index_of(gva: u64) -> usize {
    (gva >> PAGE_SHIFT) as usize & (ENTRIES - 1)
}

impl Table {
    fn clear(&self, index: usize) {
        self.read[index].store(nothing(index), Ordering::Relaxed);
        self.write[index].store(nothing(index), Ordering::Relaxed);
        self.code[index].store(nothing(index), Ordering::Relaxed);
    }

    fn used_chunks(&self) -> impl Iterator<Item = usize> {
        (0..CHUNKS).filter(|chunk| self.used[*chunk].load(Ordering::SeqCst) != 0)
    }

    fn flush(&self, keep_global: bool) {
        let made = self.made.load(Ordering::Relaxed);
        self.made.store(0, Ordering::Relaxed);
        match self.log.get(..made) {
            Some(log) if keep_global => self.flush_logged(log),
            _ => self.flush_chunks(keep_global),
        }
    }

    fn flush_logged(&self, log: &[AtomicU16]) {
        for index in log {
            let index = usize::from(index.load(Ordering::Relaxed));
            if self.global[index].load(Ordering::Relaxed) == 0 {
                self.clear(index);
            }
            self.used[index / CHUNK].fetch_and(GLOBAL, Ordering::SeqCst);
        }
    }

    fn flush_chunks(&self, keep_global: bool) {
        for chunk in self.used_chunks() {
            let used = self.used[chunk].load(Ordering::Relaxed);
            if keep_global && used == GLOBAL {
                continue;
            }
            for index in chunk * CHUNK..(chunk + 1) * CHUNK {
                if !(keep_global && self.global[index].load(Ordering::Relaxed) != 0) {
                    self.clear(index);
                }
            }
            self.used[chunk].store(if keep_global { used & GLOBAL } else { 0 }, Ordering::SeqCst);
        }
    }

    /// Makes an entry that of a page; what it held of another is lost.
    fn prepare(&self, page: u64, host: u64, global: bool) -> usize {
        let index = index_of(page);
        let keeps = |tags: &[AtomicU64; ENTRIES]| tags[index].load(Ordering::Relaxed) == page;
        let same_host = self.host[index].load(Ordering::Relaxed) == host;
        if !(same_host && (keeps(&self.read) || keeps(&self.write) || keeps(&self.code))) {
            self.clear(index);
        }
        self.host[index].store(host, Ordering::Relaxed);
        self.global[index].store(u8::from(global), Ordering::Relaxed);
        if !global {
            let made = self.made.load(Ordering::Relaxed);
            if let Some(place) = self.log.get(made) {
                place.store(index as u16, Ordering::Relaxed);
            }
            self.made.store(made + 1, Ordering::Relaxed);
        }
        let used = &self.used[index / CHUNK];
        let bit = if global { GLOBAL } else { LOCAL };
        if used.load(Ordering::Relaxed) & bit == 0 {
            used.fetch_or(bit, Ordering::SeqCst);
        }
        index
    }
}

impl Tables {
    /// Makes zeroed tables empty.
    pub fn init(&self) {
        for table in &self.0 {
            table.clear(0);
        }
    }

    /// The table of a privilege.
    pub fn table(&self, privilege: Privilege) -> &Table {
        &self.0[privilege as usize]
    }

    /// The entry that a linear address can be in.
    #[inline(always)]
    pub fn entry(&self, privilege: Privilege, gva: u64) -> Entry<'_> {
        let index = index_of(gva);
        let table = self.table(privilege);
        Entry { read: &table.read[index], write: &table.write[index], host: &table.host[index] }
    }

    /// Fills an entry for loads and stores. A tag is set for each permitted access.
    pub fn fill(&self, privilege: Privilege, page: u64, host: u64, read: bool, write: bool, global: bool) {
        let table = self.table(privilege);
        let index = table.prepare(page, host, global);
        let tag = |permitted: bool| if permitted { page } else { nothing(index) };
        table.read[index].store(tag(read), Ordering::Relaxed);
        table.write[index].store(tag(write), Ordering::SeqCst);
    }

    /// Fills an entry for fetches.
    pub fn fill_code(&self, privilege: Privilege, page: u64, host: u64, global: bool) {
        let table = self.table(privilege);
        let index = table.prepare(page, host, global);
        table.code[index].store(page, Ordering::Relaxed);
    }

    /// The host address of a page of code, if it is known.
    #[inline]
    pub fn find_code(&self, privilege: Privilege, page: u64) -> Option<u64> {
        let (table, index) = (self.table(privilege), index_of(page));
        (table.code[index].load(Ordering::Relaxed) == page).then(|| table.host[index].load(Ordering::Relaxed))
    }

    /// Whether the entry of a page of code survives a change of address space.
    pub fn is_global_code(&self, privilege: Privilege, page: u64) -> bool {
        let (table, index) = (self.table(privilege), index_of(page));
        table.code[index].load(Ordering::Relaxed) == page && table.global[index].load(Ordering::Relaxed) != 0
    }

    /// Forgets everything, or everything but global pages.
    pub fn flush(&self, keep_global: bool) {
        for table in &self.0 {
            table.flush(keep_global);
        }
    }

    /// Forgets one linear page.
    pub fn flush_page(&self, gva: u64) {
        for table in &self.0 {
            table.clear(index_of(gva));
        }
    }

    /// Gives the entry of a linear page the store permission, if the page may be loaded from; whether it has it now.
    pub fn permit_write(&self, privilege: Privilege, page: u64, host: u64) -> bool {
        let (table, index) = (self.table(privilege), index_of(page));
        let is_there = table.read[index].load(Ordering::Relaxed) == page
            && table.host[index].load(Ordering::Relaxed) == host;
        if is_there {
            table.write[index].store(page, Ordering::Relaxed);
        }
        is_there
    }

    /// Takes the store permission from the entry of one linear page.
    pub fn drop_write(&self, privilege: Privilege, gva: u64) {
        let index = index_of(gva);
        self.table(privilege).write[index].store(nothing(index), Ordering::Relaxed);
    }

    /// Takes the store permission from every entry that leads to a host page. Callable from any thread.
    pub fn drop_writes_to(&self, host_page: u64) {
        for table in &self.0 {
            for chunk in table.used_chunks() {
                for index in chunk * CHUNK..(chunk + 1) * CHUNK {
                    if table.write[index].load(Ordering::SeqCst) != nothing(index)
                        && table.host[index].load(Ordering::Relaxed) == host_page
                    {
                        table.write[index].store(nothing(index), Ordering::SeqCst);
                    }
                }
            }
        }
    }

    /// Takes the store permission from every entry. Callable from any thread.
    pub fn drop_all_writes(&self) {
        for table in &self.0 {
            for chunk in table.used_chunks() {
                for index in chunk * CHUNK..(chunk + 1) * CHUNK {
                    table.write[index].store(nothing(index), Ordering::SeqCst);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::area::Area;

    fn hits(tlb: &Tables, gva: u64) -> (bool, bool) {
        let entry = tlb.entry(Privilege::User, gva);
        (entry.read.load(Ordering::Relaxed) == gva, entry.write.load(Ordering::Relaxed) == gva)
    }

    #[test]
    fn flushes_keep_what_they_should() {
        let area = Area::new().unwrap();
        let tlb = area.tlb();
        tlb.fill(Privilege::User, 0x1000, 0x7000_0000, true, true, false);
        tlb.fill(Privilege::User, 0x2000, 0x7000_1000, true, true, true);
        tlb.drop_writes_to(0x7000_0000);
        assert_eq!(hits(tlb, 0x1000), (true, false));
        assert_eq!(hits(tlb, 0x2000), (true, true));
        tlb.flush(true);
        assert_eq!(hits(tlb, 0x1000), (false, false));
        assert_eq!(hits(tlb, 0x2000), (true, true));
        tlb.flush_page(0x2fff);
        assert_eq!(hits(tlb, 0x2000), (false, false));
    }

    #[test]
    fn more_entries_than_are_logged_are_flushed_too() {
        for pages in [1, LOG, LOG + 1, ENTRIES] {
            let area = Area::new().unwrap();
            let addresses = || (1..=pages as u64).map(|number| number << PAGE_SHIFT);
            for gva in addresses() {
                area.tlb().fill(Privilege::User, gva, 0x7000_0000, true, true, false);
            }
            area.tlb().flush(true);
            assert!(addresses().all(|gva| hits(area.tlb(), gva) == (false, false)), "{pages}");
        }
    }

    #[test]
    fn an_empty_entry_is_no_page_at_all() {
        let area = Area::new().unwrap();
        for gva in [0, 0x1000, 1 << 28, !0xfff] {
            assert_eq!(hits(area.tlb(), gva), (false, false), "{gva:#x}");
        }
        area.tlb().fill(Privilege::User, 0, 0x7000_0000, true, false, false);
        assert_eq!(hits(area.tlb(), 0), (true, false));
        area.tlb().flush(false);
        assert_eq!(hits(area.tlb(), 0), (false, false));
    }
}
