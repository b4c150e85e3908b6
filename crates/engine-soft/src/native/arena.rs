//! Memory for generated code: one anonymous file mapped twice, writable and executable, so that no page is ever both.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};

/// Pieces of code start at multiples of this.
const ALIGNMENT: usize = 16;

/// A bump allocator of executable memory.
pub struct Arena {
    writable: Mapping,
    executable: Mapping,
    used: usize,
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
        let writable = Mapping::new(&file, len, libc::PROT_READ | libc::PROT_WRITE)?;
        let executable = Mapping::new(&file, len, libc::PROT_READ | libc::PROT_EXEC)?;
        Ok(Arena { writable, executable, used: 0 })
    }

    /// Addresses at which code runs.
    pub fn range(&self) -> Range<usize> {
        let start = self.executable.base as usize;
        start..start + self.executable.len
    }

    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Overwrites four bytes of placed code.
    ///
    /// # Panics
    /// The address is not of placed code.
    pub fn patch(&mut self, address: u64, bytes: [u8; 4]) {
        let offset = (address as usize).wrapping_sub(self.executable.base as usize);
        assert!(offset.saturating_add(bytes.len()) <= self.used, "patching outside of placed code");
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
        if end > self.writable.len {
            return None;
        }
        // SAFETY: the range was just checked to be inside the mapping, which nothing in Rust refers to.
        unsafe { self.writable.base.add(self.used).copy_from_nonoverlapping(code.as_ptr(), code.len()) };
        // SAFETY: in bounds as above; both mappings have the same length.
        let placed = unsafe { self.executable.base.add(self.used) };
        self.used = end.next_multiple_of(ALIGNMENT).min(self.writable.len);
        Some(placed)
    }

    /// Frees everything from an offset on.
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
