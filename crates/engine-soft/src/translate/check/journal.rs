//! What a block does to memory while it runs both ways.
//!
//! The interpreter's stores are kept one by one, with the bytes that they replace, so that they can be taken back without
//! touching a byte that a device writes meanwhile; no entry of the TLB permits stores then. The translated code gets its
//! permissions one page at a time, and of each such page a copy is made first: what it writes, wherever that is, shows.

use x86::paging::{PAGE_MASK, PAGE_SIZE, pte};

use crate::memory::MemoryMap;
use crate::tlb::{Privilege, Tables};

const PAGE: usize = PAGE_SIZE as usize;

/// What is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Keep {
    /// Nothing, and the TLB is used as usual: blocks run one way only.
    #[default]
    Off,
    /// Nothing, but the TLB permits no stores.
    Nothing,
    /// Each store.
    Stores,
    /// Each page before it is written.
    Pages,
}

/// A store that the interpreter made. Its bytes lie in one page.
#[derive(Clone, Copy)]
struct Store {
    host: u64,
    len: usize,
    /// Where its bytes are in [`Journal::old`] and [`Journal::new`].
    at: usize,
}

/// A page that translated code may have written.
struct Page {
    host: u64,
    /// Its bytes before; later with the interpreter's stores.
    bytes: Box<[u8; PAGE]>,
}

/// A byte that is not what it should be, and was put back.
#[derive(Clone, Copy)]
struct Stray {
    host: u64,
    before: u8,
    found: u8,
}

/// Bytes of memory that are not what the interpreter made of them.
pub(super) struct Difference {
    pub host: u64,
    pub interpreted: Vec<u8>,
    pub found: Vec<u8>,
}

/// The record. See the module.
#[derive(Default)]
pub struct Journal {
    keep: Keep,
    stores: Vec<Store>,
    old: Vec<u8>,
    new: Vec<u8>,
    pages: Vec<Page>,
    /// Copies to be used again.
    spare: Vec<Box<[u8; PAGE]>>,
    /// TLB entries that permit stores.
    permitted: Vec<(Privilege, u64)>,
    /// TLB entries that would permit stores if these were not kept one by one, and where the pages are.
    wanted: Vec<(Privilege, u64, u64)>,
    /// Linear pages whose TLB entries were filled.
    filled: Vec<u64>,
    /// Host addresses of entries of page tables that got an accessed or dirty bit.
    marked: Vec<u64>,
    /// Guest-physical addresses of code that was written.
    code: Vec<u64>,
    /// A device was to be accessed.
    device: bool,
    /// What was put back before the present attempt.
    strays: Vec<Stray>,
}

impl Journal {
    /// A journal for blocks that run both ways.
    pub fn kept() -> Self {
        Journal { keep: Keep::Nothing, ..Journal::default() }
    }

    // ---- what memory accesses tell it -------------------------------------------------------------------------------

    /// Bytes of one page are about to be written.
    #[inline]
    pub fn before_store(&mut self, host: *mut u8, len: usize) {
        match self.keep {
            Keep::Off | Keep::Nothing => {}
            Keep::Stores => {
                let at = self.old.len();
                self.stores.push(Store { host: host as u64, len, at });
                copy_bytes(host as u64, len, &mut self.old);
            }
            Keep::Pages => self.keep_page(host as u64),
        }
    }

    /// An entry of a page table is about to get its accessed or dirty bit.
    pub fn before_mark(&mut self, host: *mut u8, len: usize) {
        self.before_store(host, len);
        if matches!(self.keep, Keep::Stores | Keep::Pages) {
            self.marked.push(host as u64);
        }
    }

    /// A page that held code was written.
    pub fn note_code(&mut self, gpa: u64) {
        if matches!(self.keep, Keep::Stores | Keep::Pages) {
            self.code.push(gpa);
        }
    }

    /// The TLB gets an entry; whether it may permit stores, if `wanted`.
    pub fn permits_stores(&mut self, privilege: Privilege, page: u64, host: u64, wanted: bool) -> bool {
        match self.keep {
            Keep::Off => return wanted,
            Keep::Nothing => return false,
            Keep::Stores | Keep::Pages => self.filled.push(page),
        }
        if wanted && self.keep == Keep::Stores {
            self.wanted.push((privilege, page, host));
        }
        if !wanted || self.keep == Keep::Stores {
            return false;
        }
        self.keep_page(host);
        self.permitted.push((privilege, page));
        true
    }

    /// A device is about to be accessed; whether that must not happen, because it could not be taken back.
    pub fn keeps_from_device(&mut self) -> bool {
        let keeps = matches!(self.keep, Keep::Stores | Keep::Pages);
        self.device |= keeps;
        keeps
    }

    fn keep_page(&mut self, host: u64) {
        let host = host & !PAGE_MASK;
        if self.pages.iter().any(|page| page.host == host) {
            return;
        }
        let mut bytes = self.spare.pop().unwrap_or_else(|| Box::new([0; PAGE]));
        // SAFETY: who reports a store has a whole page of the guest's memory there.
        unsafe { std::ptr::copy_nonoverlapping(host as *const u8, bytes.as_mut_ptr(), PAGE) };
        self.pages.push(Page { host, bytes });
    }

    // ---- the course of a comparison ---------------------------------------------------------------------------------

    /// The interpreter runs from here on.
    pub(super) fn begin_stores(&mut self) {
        self.keep = Keep::Stores;
        self.stores.clear();
        self.old.clear();
        self.new.clear();
        self.device = false;
    }

    /// The interpreter has run: remembers what its stores left, and takes them back.
    pub(super) fn take_back_stores(&mut self, map: &MemoryMap, tlb: &Tables) {
        self.keep = Keep::Nothing;
        for store in &self.stores {
            copy_bytes(store.host, store.len, &mut self.new);
        }
        self.put_back_stores(map, tlb);
    }

    fn put_back_stores(&mut self, map: &MemoryMap, tlb: &Tables) {
        for store in self.stores.iter().rev() {
            let old = &self.old[store.at..store.at + store.len];
            // SAFETY: the place of a store that was made.
            unsafe { std::ptr::copy_nonoverlapping(old.as_ptr(), store.host as *mut u8, old.len()) };
        }
        // Code is there again, and whoever writes it has to notice.
        for gpa in &self.code {
            if let Some(slot) = map.find(*gpa) {
                slot.tracker().mark_code(slot.page(*gpa));
                let page = slot.host(*gpa) as u64 & !PAGE_MASK;
                self.wanted.retain(|(_, _, host)| host & !PAGE_MASK != page);
            }
        }
        self.code.clear();
        // What the TLB knows by having marked an entry of a page table has to be found out again.
        if !self.marked.is_empty() {
            self.filled.iter().for_each(|page| tlb.flush_page(*page));
        }
        self.filled.clear();
        self.marked.clear();
    }

    /// The translated code runs from here on. It may have its permissions for what the interpreter stored to at once, as if the
    /// pages had been stored to before.
    pub(super) fn begin_pages(&mut self, tlb: &Tables, permitted: bool) {
        self.keep = Keep::Pages;
        while let Some((privilege, page, host)) = self.wanted.pop() {
            if permitted && tlb.permit_write(privilege, page, host) {
                self.keep_page(host);
                self.permitted.push((privilege, page));
            }
        }
    }

    /// The translated code has run: it loses its permissions. Whether it left in memory what the interpreter did.
    pub(super) fn end_pages(&mut self, tlb: &Tables) -> bool {
        self.keep = Keep::Nothing;
        self.permitted.iter().for_each(|(privilege, page)| tlb.drop_write(*privilege, *page));
        self.permitted.clear();
        self.expect();
        let stores = self.stores.iter().all(|store| is_equal(store.host, self.new_bytes(store)));
        stores && self.pages.iter().all(|page| is_equal(page.host, page.bytes.as_slice()))
    }

    /// Makes the copies of pages what the pages should be now.
    fn expect(&mut self) {
        for page in &mut self.pages {
            let inside = |host: u64| host & !PAGE_MASK == page.host;
            for store in self.stores.iter().filter(|store| inside(store.host)) {
                let at = (store.host & PAGE_MASK) as usize;
                page.bytes[at..at + store.len].copy_from_slice(&self.new[store.at..store.at + store.len]);
            }
            // A processor may set the accessed bit for an access that it does not make in the end (SDM 3A §4.8).
            for entry in self.marked.iter().filter(|entry| inside(**entry)) {
                page.bytes[(entry & PAGE_MASK) as usize] |= pte::A as u8;
            }
        }
    }

    /// All is well: forgets the comparison. What was put back because it seemed to be wrong was somebody else's doing, if the
    /// block has not done it again.
    pub(super) fn accept(&mut self) {
        for stray in &self.strays {
            if is_equal(stray.host, &[stray.before]) {
                put_byte(stray.host, stray.found);
            }
        }
        self.strays.clear();
        self.forget();
    }

    /// The bytes that are not what they should be, after [`Journal::end_pages`].
    pub(super) fn differences(&self) -> Vec<Difference> {
        let elsewhere = |store: &&Store| !self.pages.iter().any(|page| page.host == store.host & !PAGE_MASK);
        let stores = self.stores.iter().filter(elsewhere).map(|store| (store.host, self.new_bytes(store)));
        let pages = self.pages.iter().map(|page| (page.host, page.bytes.as_slice()));
        stores.chain(pages).flat_map(|(host, expected)| runs(host, expected)).collect()
    }

    /// Makes memory what it was before the block, to try again.
    pub(super) fn reject(&mut self, map: &MemoryMap, tlb: &Tables) {
        for page in &self.pages {
            for (index, expected) in page.bytes.iter().enumerate() {
                let host = page.host + index as u64;
                let is_stored = self.stores.iter().any(|s| host.wrapping_sub(s.host) < s.len as u64);
                let mut found = [0];
                read_bytes(host, &mut found);
                if found[0] != *expected && !is_stored {
                    self.strays.push(Stray { host, before: *expected, found: found[0] });
                    put_byte(host, *expected);
                }
            }
        }
        self.put_back_stores(map, tlb);
        self.forget();
    }

    fn forget(&mut self) {
        while let Some(page) = self.pages.pop() {
            self.spare.push(page.bytes);
        }
        self.filled.clear();
        self.marked.clear();
        self.code.clear();
    }

    /// Whether a device was to be accessed since [`Journal::begin_stores`].
    pub(super) fn met_device(&self) -> bool {
        self.device
    }

    fn new_bytes(&self, store: &Store) -> &[u8] {
        &self.new[store.at..store.at + store.len]
    }
}

/// Appends bytes of guest memory.
fn copy_bytes(host: u64, len: usize, to: &mut Vec<u8>) {
    let at = to.len();
    to.resize(at + len, 0);
    read_bytes(host, &mut to[at..]);
}

fn read_bytes(host: u64, to: &mut [u8]) {
    // SAFETY: addresses come from stores and pages of guest memory.
    unsafe { std::ptr::copy_nonoverlapping(host as *const u8, to.as_mut_ptr(), to.len()) };
}

fn put_byte(host: u64, value: u8) {
    // SAFETY: as above.
    unsafe { (host as *mut u8).write(value) };
}

/// Compares guest memory, which a device may be writing, with what is expected.
fn is_equal(host: u64, expected: &[u8]) -> bool {
    // SAFETY: as above; the other side is a slice.
    unsafe { libc::memcmp(host as *const libc::c_void, expected.as_ptr().cast(), expected.len()) == 0 }
}

/// Runs of bytes that differ from what is expected.
fn runs(host: u64, expected: &[u8]) -> Vec<Difference> {
    let mut found = vec![0; expected.len()];
    read_bytes(host, &mut found);
    let mut runs: Vec<Difference> = Vec::new();
    for (index, (expected, found)) in expected.iter().zip(&found).enumerate() {
        if expected == found {
            continue;
        }
        let at = host + index as u64;
        match runs.last_mut() {
            Some(run) if run.host + run.found.len() as u64 == at => {
                run.interpreted.push(*expected);
                run.found.push(*found);
            }
            _ => runs.push(Difference { host: at, interpreted: vec![*expected], found: vec![*found] }),
        }
    }
    runs
}
