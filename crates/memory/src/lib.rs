//! Guest memory: memfd-backed regions that devices reach through `vm-memory` and engines map as they need,
//! with one record per page that both write to.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, RefSlice, WithBitmapSlice};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};
use x86::paging::{PAGE_SHIFT, PAGE_SIZE};

/// All of a guest's RAM.
pub type GuestMemory = GuestMemoryMmap<PageTracker>;
/// One contiguous piece of guest RAM or ROM.
pub type GuestRegion = GuestRegionMmap<PageTracker>;

/// The page was written since the log was last taken.
pub const DIRTY: u8 = 1 << 0;
/// The page holds guest code that an engine has decoded: writers must bump the page's generation.
pub const CODE: u8 = 1 << 1;

/// What is recorded of each page of a region: whether it was written ([`DIRTY`]), whether decoded guest code depends
/// on it ([`CODE`]), and a generation that changes when such code is overwritten.
///
/// It is the `Bitmap` of the region, so everything that a device writes through `vm-memory` is recorded by itself.
#[derive(Debug)]
pub struct PageTracker {
    flags: Box<[AtomicU8]>,
    generations: Box<[AtomicU32]>,
    /// Generations that have ended so far, of all pages.
    code_changes: AtomicU64,
}

impl PageTracker {
    /// A clean record for a region of `len_bytes`.
    pub fn new(len_bytes: usize) -> Self {
        let pages = len_bytes.div_ceil(PAGE_SIZE as usize);
        PageTracker {
            flags: (0..pages).map(|_| AtomicU8::new(0)).collect(),
            generations: (0..pages).map(|_| AtomicU32::new(0)).collect(),
            code_changes: AtomicU64::new(0),
        }
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.flags.len()
    }

    /// Flags of a page.
    pub fn flags(&self, page: usize) -> u8 {
        self.flags[page].load(Ordering::Acquire)
    }

    /// Generation of a page's code.
    pub fn generation(&self, page: usize) -> u32 {
        self.generations[page].load(Ordering::Acquire)
    }

    /// A number that grows whenever a page that holds code gets a new generation.
    pub fn code_changes(&self) -> u64 {
        self.code_changes.load(Ordering::Acquire)
    }

    /// The generation counter of a page, for engines that keep a reference to it.
    pub fn generation_cell(&self, page: usize) -> &AtomicU32 {
        &self.generations[page]
    }

    /// Declares that decoded code depends on the page. Call before reading the code. Returns whether the page was
    /// not yet marked: then writers that hold a fast path to it must be made to lose it.
    pub fn mark_code(&self, page: usize) -> bool {
        self.flags[page].fetch_or(CODE, Ordering::SeqCst) & CODE == 0
    }

    /// Records a write to a page: dirty, and if it holds code, a new generation. Call after the bytes are written.
    ///
    /// Who sees that the mark is gone also sees a new generation; and who set the mark in between, and read the code, finds
    /// his generation old. Returns by how much [`PageTracker::code_changes`] has grown by it.
    pub fn note_write(&self, page: usize) -> u64 {
        let old = self.flags[page].load(Ordering::Acquire);
        if old & (DIRTY | CODE) == DIRTY {
            return 0;
        }
        let mut ended = 0;
        if old & CODE != 0 {
            self.end_generation(page);
            ended += 1;
        }
        if self.flags[page].swap(DIRTY, Ordering::SeqCst) & CODE != 0 {
            self.end_generation(page);
            ended += 1;
        }
        ended
    }

    fn end_generation(&self, page: usize) {
        self.generations[page].fetch_add(1, Ordering::SeqCst);
        self.code_changes.fetch_add(1, Ordering::SeqCst);
    }

    /// Takes the dirty record, one bit a page from the lowest, leaving it clean.
    pub fn take_dirty(&self) -> Vec<u64> {
        let mut bits = vec![0u64; self.pages().div_ceil(64)];
        for (page, flags) in self.flags.iter().enumerate() {
            if flags.load(Ordering::Relaxed) & DIRTY != 0
                && flags.fetch_and(!DIRTY, Ordering::AcqRel) & DIRTY != 0
            {
                bits[page / 64] |= 1 << (page % 64);
            }
        }
        bits
    }
}

impl<'a> WithBitmapSlice<'a> for PageTracker {
    type S = RefSlice<'a, PageTracker>;
}

impl Bitmap for PageTracker {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        let first = offset >> PAGE_SHIFT;
        let last = (offset + len - 1) >> PAGE_SHIFT;
        for page in first..=last.min(self.pages().saturating_sub(1)) {
            self.note_write(page);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.flags.get(offset >> PAGE_SHIFT).is_some_and(|f| f.load(Ordering::Acquire) & DIRTY != 0)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, PageTracker> {
        RefSlice::new(self, offset)
    }
}

/// Makes one region of `len_bytes` (a multiple of the page size) at a guest address, backed by a memfd of its own
/// and mapped shared. Pages are allocated by the host when first touched.
///
/// # Errors
/// The host refuses the file or the mapping (out of memory or address space), or the range wraps.
pub fn create_region(name: &str, gpa: u64, len_bytes: u64) -> io::Result<Arc<GuestRegion>> {
    let cname = CString::new(name).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: the name is a valid C string for the duration of the call; no other pointer is passed.
    let fd = unsafe { libc::memfd_create(cname.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and is owned by nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len_bytes)?;
    map_region(file, 0, gpa, len_bytes)
}

/// Maps `len_bytes` of `file` from `offset` as a region at a guest address.
///
/// # Errors
/// As for [`create_region`].
pub fn map_region(file: File, offset: u64, gpa: u64, len_bytes: u64) -> io::Result<Arc<GuestRegion>> {
    let len = usize::try_from(len_bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mapping = MmapRegionBuilder::new_with_bitmap(len, PageTracker::new(len))
        .with_file_offset(FileOffset::new(file, offset))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .build()
        .map_err(io::Error::other)?;
    GuestRegionMmap::new(mapping, GuestAddress(gpa))
        .map(Arc::new)
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
}

/// Joins regions into one address space.
///
/// # Errors
/// Regions overlap, or there are none.
pub fn join_regions(regions: Vec<Arc<GuestRegion>>) -> io::Result<GuestMemory> {
    GuestMemoryMmap::from_arc_regions(regions).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn device_writes_are_recorded() {
        let region = create_region("test", 0x10_0000, 0x4000).unwrap();
        let memory = join_regions(vec![region.clone()]).unwrap();
        assert!(region.get_mmap().bitmap().mark_code(1));
        memory.write_slice(&[1, 2, 3, 4], GuestAddress(0x10_0ffe)).unwrap();
        let pages = region.get_mmap();
        assert_eq!(pages.bitmap().flags(0), DIRTY);
        assert_eq!(pages.bitmap().flags(1), DIRTY, "a write takes the code mark away");
        assert_ne!(pages.bitmap().generation(1), 0);
        assert_eq!(pages.bitmap().generation(0), 0);
        assert_ne!(pages.bitmap().code_changes(), 0);
        assert_eq!(pages.bitmap().take_dirty(), vec![0b11]);
        assert_eq!(pages.bitmap().take_dirty(), vec![0]);
    }
}
