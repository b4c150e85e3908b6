//! Guest-physical memory as the software CPU sees it: which address is RAM, where it is on the host, and who
//! must hear of writes to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use engine::memory::{CODE, DIRTY};
use engine::{GuestRegion, PageTracker};
use vm_memory::{Address, GuestMemoryRegion, MmapRegion};
use x86::paging::PAGE_SHIFT;

/// One mapped region.
#[derive(Clone)]
pub struct RamSlot {
    /// Name of the mapping.
    pub slot: u32,
    /// First guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// Stores reach the bytes; otherwise they go to the I/O handler.
    pub writable: bool,
    host: u64,
    mapping: Arc<MmapRegion<PageTracker>>,
}

impl RamSlot {
    /// Describes a region at its own guest address.
    pub fn new(slot: u32, region: &GuestRegion, writable: bool) -> Self {
        let mapping = region.get_mmap();
        RamSlot {
            slot,
            gpa: region.start_addr().raw_value(),
            len: mapping.size() as u64,
            writable,
            host: mapping.as_ptr() as u64,
            mapping,
        }
    }

    /// Records of the region's pages.
    pub fn tracker(&self) -> &PageTracker {
        self.mapping.bitmap()
    }

    /// Host address of a guest-physical address inside the slot.
    pub fn host(&self, gpa: u64) -> *mut u8 {
        debug_assert!(gpa - self.gpa < self.len);
        (self.host + (gpa - self.gpa)) as *mut u8
    }

    /// Index of an address's page in [`RamSlot::tracker`].
    pub fn page(&self, gpa: u64) -> usize {
        ((gpa - self.gpa) >> PAGE_SHIFT) as usize
    }

    /// The generation counter of an address's page.
    pub fn generation(&self, gpa: u64) -> &AtomicU32 {
        self.tracker().generation_cell(self.page(gpa))
    }

    /// Whether a page (by its index in the record) has been written since the dirty log was taken.
    pub fn is_dirty(&self, page: usize) -> bool {
        self.tracker().flags(page) & DIRTY != 0
    }

    /// Whether decoded code depends on the page.
    pub fn holds_code(&self, gpa: u64) -> bool {
        self.tracker().flags(self.page(gpa)) & CODE != 0
    }
}

/// All mapped regions. A vCPU works on its own reference and takes a new one when told that the map changed.
#[derive(Clone, Default)]
pub struct MemoryMap {
    slots: Vec<RamSlot>,
}

impl MemoryMap {
    /// The region that holds an address.
    #[inline]
    pub fn find(&self, gpa: u64) -> Option<&RamSlot> {
        self.slots.iter().find(|s| gpa.wrapping_sub(s.gpa) < s.len)
    }

    /// The region that a host address belongs to, and the guest-physical address it stands for.
    pub fn find_host(&self, host: *const u8) -> Option<(&RamSlot, u64)> {
        let offset_in = |s: &RamSlot| (host as u64).wrapping_sub(s.host);
        let slot = self.slots.iter().find(|s| offset_in(s) < s.len)?;
        Some((slot, slot.gpa + offset_in(slot)))
    }

    /// A number that changes whenever code in memory changes, whoever wrote it.
    #[inline]
    pub fn code_changes(&self) -> u64 {
        self.slots.iter().map(|slot| slot.tracker().code_changes()).sum()
    }

    /// The region with this name.
    pub fn slot(&self, slot: u32) -> Option<&RamSlot> {
        self.slots.iter().find(|s| s.slot == slot)
    }

    /// Adds a region; false if it overlaps another or the name is taken.
    pub fn insert(&mut self, new: RamSlot) -> bool {
        let clash =
            |s: &RamSlot| s.slot == new.slot || (new.gpa < s.gpa + s.len && s.gpa < new.gpa + new.len);
        if self.slots.iter().any(clash) {
            return false;
        }
        self.slots.push(new);
        true
    }

    /// Removes a region by name; false if there is none.
    pub fn remove(&mut self, slot: u32) -> bool {
        let before = self.slots.len();
        self.slots.retain(|s| s.slot != slot);
        self.slots.len() != before
    }

    /// Reads a naturally aligned 64-bit word; `None` where there is no RAM.
    pub fn read_u64(&self, gpa: u64) -> Option<u64> {
        let slot = self.find(gpa)?;
        // SAFETY: an aligned word inside the slot's mapping, which lives as long as the slot.
        Some(unsafe { std::sync::atomic::AtomicU64::from_ptr(slot.host(gpa).cast()) }.load(Ordering::Acquire))
    }

    /// Reads a naturally aligned 32-bit word; `None` where there is no RAM.
    pub fn read_u32(&self, gpa: u64) -> Option<u32> {
        let slot = self.find(gpa)?;
        // SAFETY: as above.
        Some(unsafe { AtomicU32::from_ptr(slot.host(gpa).cast()) }.load(Ordering::Acquire))
    }
}
