//! Memory for generated code: one anonymous file mapped twice, writable and executable, so that no page is ever both.
//!
//! Code fills it from its beginning. From its end it gives out chunks for what is known of the code, so that code and
//! records together never take more than was granted.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;
use std::sync::Arc;

/// Pieces of code start at multiples of this.
const ALIGNMENT: usize = 8;

/// A bump allocator of executable memory.
pub struct Arena {
    writable: Arc<Mapping>,
    executable: Mapping,
    /// Bytes of code, from the beginning.
    used: usize,
    /// Where the chunks begin.
    chunks: usize,
}

/// A piece of an arena's memory for other things than code: writable, and nobody else's.
pub struct Chunk {
    base: NonNull<u8>,
    /// Keeps the memory mapped.
    _memory: Arc<Mapping>,
}

// SAFETY: the memory is owned by the value and not tied to a thread.
unsafe impl Send for Chunk {}

impl Chunk {
    /// Size of every chunk.
    pub const BYTES: usize = 64 << 10;

    /// Its first byte, aligned to a page.
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }
}

struct Mapping {
    base: *mut u8,
    len: usize,
}

// SAFETY: the mapping is owned by the value and not tied to a thread.
unsafe impl Send for Mapping {}
// SAFETY: shared access never writes through the pointer.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(file: &File, len: usize, protection: libc::c_int) -> io::Result<Self> {
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapping { base: base.cast(), len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new` and belongs to this value.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

impl Arena {
    /// Room for so many bytes, rounded up to pages.
    ///
    /// # Errors
    /// The host refuses executable memory.
    pub fn new(capacity_bytes: usize) -> io::Result<Self> {
        let page = 4096;
        let len = capacity_bytes.max(1).checked_next_multiple_of(page).ok_or(io::ErrorKind::InvalidInput)?;
        let file = code_file()?;
        file.set_len(len as u64)?;
        let writable = Arc::new(Mapping::new(&file, len, libc::PROT_READ | libc::PROT_WRITE)?);
        let executable = Mapping::new(&file, len, libc::PROT_READ | libc::PROT_EXEC)?;
        Ok(Arena { writable, executable, used: 0, chunks: len })
    }

    /// Addresses at which code runs.
    pub fn range(&self) -> Range<usize> {
        let start = self.executable.base as usize;
        start..start + self.executable.len
    }

    /// Bytes of code.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Bytes in use for whatever purpose.
    #[cfg(test)]
    pub fn occupied(&self) -> usize {
        self.used + (self.writable.len - self.chunks)
    }

    /// Memory for records; `None` if code has taken it all.
    pub fn chunk(&mut self) -> Option<Chunk> {
        let start = self.chunks.checked_sub(Chunk::BYTES).filter(|start| *start >= self.used)?;
        // SAFETY: in bounds of the mapping, behind all code and before all other chunks.
        let base = unsafe { NonNull::new_unchecked(self.writable.base.add(start)) };
        self.chunks = start;
        Some(Chunk { base, _memory: self.writable.clone() })
    }

    /// Takes the memory of all chunks back. Those that were given out must be gone; else nothing happens.
    pub fn reclaim_chunks(&mut self) {
        if Arc::strong_count(&self.writable) == 1 {
            self.chunks = self.writable.len;
        }
    }

    /// Bytes of placed code.
    ///
    /// # Panics
    /// They are not of placed code.
    pub fn bytes(&self, range: Range<usize>) -> &[u8] {
        assert!(range.start <= range.end && range.end <= self.used, "reading outside of placed code");
        // SAFETY: in bounds, as just checked; written only by methods that borrow the arena exclusively.
        unsafe { std::slice::from_raw_parts(self.writable.base.add(range.start), range.len()) }
    }

    /// Overwrites four bytes of placed code at an offset.
    ///
    /// # Panics
    /// They are not of placed code.
    pub fn patch(&mut self, offset: u32, bytes: [u8; 4]) {
        let offset = offset as usize;
        assert!(offset + bytes.len() <= self.used, "patching outside of placed code");
        // SAFETY: in bounds, as just checked; nothing in Rust refers to the mapping.
        unsafe { self.writable.base.add(offset).cast::<[u8; 4]>().write_unaligned(bytes) };
    }

    /// Where the next piece of code will be.
    pub fn next_address(&self) -> u64 {
        self.executable.base as u64 + self.used as u64
    }

    /// Places code at [`Arena::next_address`]; `None` if there is no room.
    pub fn place(&mut self, code: &[u8]) -> Option<*const u8> {
        let end = self.used.checked_add(code.len())?;
        if end > self.chunks {
            return None;
        }
        // SAFETY: the range was just checked to be inside the mapping, which nothing in Rust refers to.
        unsafe { self.writable.base.add(self.used).copy_from_nonoverlapping(code.as_ptr(), code.len()) };
        // SAFETY: in bounds as above; both mappings have the same length.
        let placed = unsafe { self.executable.base.add(self.used) };
        self.used = end.next_multiple_of(ALIGNMENT).min(self.chunks);
        Some(placed)
    }

    /// Frees all code from an offset on.
    pub fn truncate(&mut self, used: usize) {
        self.used = used.min(self.used);
    }
}

/// An anonymous file that may be mapped executable.
fn code_file() -> io::Result<File> {
    let name = c"apiary-code";
    // Kernels from 6.3 on want to be told; older ones refuse the flag.
    for flags in [libc::MFD_CLOEXEC | libc::MFD_EXEC, libc::MFD_CLOEXEC] {
        // SAFETY: the name is a C string; no other pointer is passed.
        let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
        if fd >= 0 {
            // SAFETY: the descriptor was just made and is owned by nobody else.
            return Ok(unsafe { File::from_raw_fd(fd) });
        }
        if io::Error::last_os_error().raw_os_error() != Some(libc::EINVAL) {
            break;
        }
    }
    Err(io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_and_chunks_share_what_was_granted() {
        let mut arena = Arena::new(2 * Chunk::BYTES).unwrap();
        arena.place(&[0x90; 100]).unwrap();
        let chunk = arena.chunk().unwrap();
        assert!(arena.chunk().is_none(), "the other half has code in it");
        assert!(arena.place(&[0x90; Chunk::BYTES]).is_none(), "code would run into a chunk");
        assert_eq!(arena.occupied(), Chunk::BYTES + 104);
        arena.truncate(0);
        arena.reclaim_chunks();
        assert_eq!(arena.occupied(), Chunk::BYTES, "a chunk that somebody has is not taken back");
        drop(chunk);
        arena.reclaim_chunks();
        assert_eq!(arena.occupied(), 0);
        assert!(arena.place(&[0x90; 2 * Chunk::BYTES]).is_some());
    }
}
