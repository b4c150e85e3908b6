//! Raw images: a file or block device whose bytes are the disk's. Also the disk in memory (`ram=`), which is a file in memory.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};
use std::os::unix::fs::FileTypeExt;
use std::sync::{PoisonError, RwLock};

use rustix::fs::FallocateFlags;
use vm_memory::VolatileSlice;

use super::{AtOnce, Image, Place, write_zero_bytes};
use crate::CacheMode;

/// The most buffers of one preadv(2) (`IOV_MAX`).
const MAX_VECTORS: usize = 1024;
/// The most aligned memory for one piece of an unaligned access.
const BOUNCE_BYTES: usize = 1 << 20;
/// File systems in memory (statfs(2)): tmpfs, ramfs, hugetlbfs.
const MEMORY_FILE_SYSTEMS: [i64; 3] = [0x0102_1994, 0x8584_58f6, 0x9584_58f6];

/// A raw image.
#[derive(Debug)]
pub struct RawImage {
    file: File,
    block_device: bool,
    at_once: AtOnce,
    alignment: Alignment,
    /// Who writes part of an aligned block holds it alone.
    partial: RwLock<()>,
    /// The file has been locked.
    locked: bool,
}

impl Drop for RawImage {
    fn drop(&mut self) {
        if self.locked {
            crate::lock::unlock(&self.file);
        }
    }
}

/// What must be multiples of what with O_DIRECT, in bytes, powers of two; without, everything is a multiple of 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Alignment {
    /// Addresses of buffers.
    pub memory: usize,
    /// Offsets in the file and lengths of buffers.
    pub offset: usize,
}

impl Alignment {
    const NONE: Alignment = Alignment { memory: 1, offset: 1 };
}

/// Which way the data goes.
#[derive(Clone, Copy)]
enum Direction {
    Read,
    Write,
}

impl RawImage {
    /// The image in `file`, which has been opened as `cache` wants it (O_DIRECT, O_DSYNC).
    ///
    /// # Errors
    /// The host cannot tell what the file is.
    pub fn new(file: File, cache: CacheMode) -> io::Result<Self> {
        let kind = file.metadata()?.file_type();
        let in_memory = is_in_memory(&file)?;
        let alignment = if cache.direct() { direct_alignment(&file)? } else { Alignment::NONE };
        let at_once = match (in_memory, cache.direct()) {
            (true, _) if kind.is_file() => AtOnce::Always,
            (false, false) => AtOnce::CachedReads,
            _ => AtOnce::Never,
        };
        Ok(RawImage {
            block_device: kind.is_block_device(),
            file,
            at_once,
            alignment,
            partial: RwLock::new(()),
            locked: false,
        })
    }

    /// A disk of `len_bytes` zeros in memory. Pages are allocated when first written.
    ///
    /// # Errors
    /// The host refuses it.
    pub fn in_memory(len_bytes: u64) -> io::Result<Self> {
        // SAFETY: the name is a C string; no other pointer is passed.
        let fd = unsafe { libc::memfd_create(c"disk".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and is owned by nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(len_bytes)?;
        RawImage::new(file, CacheMode::Writeback)
    }

    /// Moves data between buffers and file, `flags` being those of preadv2(2).
    fn transfer(
        &self,
        direction: Direction,
        mut offset: u64,
        buffers: &[VolatileSlice<'_>],
        flags: libc::c_int,
    ) -> io::Result<()> {
        let guards: Vec<_> = buffers.iter().map(VolatileSlice::ptr_guard_mut).collect();
        let mut vectors: Vec<libc::iovec> = guards
            .iter()
            .filter(|guard| guard.len() > 0)
            .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() })
            .collect();
        let mut left = vectors.as_mut_slice();
        while !left.is_empty() {
            let count = left.len().min(MAX_VECTORS) as libc::c_int;
            let (fd, at) = (self.file.as_raw_fd(), offset as libc::off_t);
            // SAFETY: the vectors describe the buffers, which the guards keep mapped; the kernel reads or writes no more.
            let moved = unsafe {
                match direction {
                    Direction::Read => libc::preadv2(fd, left.as_ptr(), count, at, flags),
                    Direction::Write => libc::pwritev2(fd, left.as_ptr(), count, at, flags),
                }
            };
            match moved {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                moved if moved > 0 => {
                    offset += moved as u64;
                    left = advance(left, moved as usize);
                }
                _ => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        Ok(())
    }

    fn is_aligned(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> bool {
        let Alignment { memory, offset: block } = self.alignment;
        let unaligned = |b: &VolatileSlice<'_>| {
            b.ptr_guard().as_ptr() as usize & (memory - 1) != 0 || b.len() & (block - 1) != 0
        };
        self.alignment == Alignment::NONE
            || offset as usize & (block - 1) == 0 && !buffers.iter().any(unaligned)
    }

    /// A read that O_DIRECT does not take as it is: through aligned memory.
    fn read_bounced(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        let mut place = Place::new(buffers);
        self.bounced(offset, buffers, |start, skip, len, bounce| {
            if self.read_block(start, bounce)? < skip + len {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            place.fill(&bounce.bytes()[skip..skip + len]);
            Ok(())
        })
    }

    /// A write that O_DIRECT does not take as it is: what is around it in the first and last block is read first.
    fn write_bounced(
        &self,
        offset: u64,
        buffers: &[VolatileSlice<'_>],
        flags: libc::c_int,
    ) -> io::Result<()> {
        let mut place = Place::new(buffers);
        self.bounced(offset, buffers, |start, skip, len, bounce| {
            let whole = skip == 0 && len == bounce.len;
            let _alone = (!whole).then(|| self.partial.write().unwrap_or_else(PoisonError::into_inner));
            let _with_others = whole.then(|| self.partial.read().unwrap_or_else(PoisonError::into_inner));
            if !whole {
                self.read_block(start, bounce)?;
            }
            place.take(&mut bounce.bytes_mut()[skip..skip + len]);
            // An image may end within a block. What is behind its end cannot be written with O_DIRECT without making it longer.
            let end = self.size().max(start + (skip + len) as u64);
            self.transfer(Direction::Write, start, &[VolatileSlice::from(bounce.bytes_mut())], flags)?;
            if self.block_device || start + bounce.len as u64 <= end {
                Ok(())
            } else {
                self.file.set_len(end)
            }
        })
    }

    /// Has `piece` do a range in aligned pieces: told the offset of the piece, how far into it the range begins, how much of it is the
    /// range's, and the memory for it.
    fn bounced(
        &self,
        offset: u64,
        buffers: &[VolatileSlice<'_>],
        mut piece: impl FnMut(u64, usize, usize, &mut AlignedMemory) -> io::Result<()>,
    ) -> io::Result<()> {
        let block = self.alignment.offset;
        let len: usize = buffers.iter().map(VolatileSlice::len).sum();
        let mut skip = offset as usize & (block - 1);
        let mut start = offset - skip as u64;
        let mut left = len;
        while left > 0 {
            let most = BOUNCE_BYTES.next_multiple_of(block) - skip;
            let now = left.min(most);
            let mut bounce = AlignedMemory::new((skip + now).next_multiple_of(block), self.alignment.memory)?;
            piece(start, skip, now, &mut bounce)?;
            start += (skip + now) as u64;
            left -= now;
            skip = 0;
        }
        Ok(())
    }

    /// Fills aligned memory from an aligned offset; beyond the end of the image it is left alone. Returns how much is there.
    fn read_block(&self, offset: u64, memory: &mut AlignedMemory) -> io::Result<usize> {
        let len = memory.len;
        match self.transfer(Direction::Read, offset, &[VolatileSlice::from(memory.bytes_mut())], 0) {
            Ok(()) => Ok(len),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Ok(self.size().saturating_sub(offset).min(len as u64) as usize)
            }
            Err(error) => Err(error),
        }
    }

    /// Notes that the file is locked, for as long as this is.
    pub(crate) fn unlock_at_end(&mut self) {
        self.locked = true;
    }

    /// The file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// What O_DIRECT wants.
    pub(crate) fn alignment(&self) -> Alignment {
        self.alignment
    }

    /// Fills `bytes` from `offset`; what is beyond the end of the file reads as zeros. For formats.
    pub(crate) fn read_bytes(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.read_or_zero(offset, &[VolatileSlice::from(bytes)])
    }

    /// As [`Image::read`], but what is beyond the end of the file reads as zeros. For formats.
    pub(crate) fn read_or_zero(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        let len: usize = buffers.iter().map(VolatileSlice::len).sum();
        let there = self.size().saturating_sub(offset);
        if len as u64 <= there {
            return self.read(offset, buffers);
        }
        let mut left = there as usize;
        let mut inside = Vec::with_capacity(buffers.len());
        for buffer in buffers {
            let here = left.min(buffer.len());
            let (data, rest) = buffer.split_at(here).map_err(io::Error::other)?;
            if here > 0 {
                inside.push(data);
            }
            super::fill_zero(&rest);
            left -= here;
        }
        self.read(offset, &inside)
    }

    /// Writes `bytes`, making the file longer if need be. For formats.
    pub(crate) fn write_bytes(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        // SAFETY: the slice is only read from, by `write`, and lives through the call.
        let slice = unsafe { VolatileSlice::new(bytes.as_ptr().cast_mut(), bytes.len()) };
        self.write(offset, &[slice], false)
    }

    /// `BLKDISCARD` or `BLKZEROOUT` (linux/fs.h): a range of a block device.
    fn device_range(&self, request: libc::c_ulong, offset: u64, len: u64) -> io::Result<()> {
        let range = [offset, len];
        // SAFETY: the request takes a pointer to two 64-bit numbers, which live through the call.
        match unsafe { libc::ioctl(self.file.as_raw_fd(), request as _, range.as_ptr()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKZEROOUT: libc::c_ulong = 0x127f;

impl Image for RawImage {
    fn size(&self) -> u64 {
        // Works for files and for block devices.
        rustix::fs::seek(&self.file, rustix::fs::SeekFrom::End(0)).unwrap_or(0)
    }

    fn sectors(&self) -> (u32, u32) {
        if !self.block_device {
            return (512, 4096);
        }
        // SAFETY: the file is open for as long as it is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(self.file.as_raw_fd()) };
        let logical = rustix::fs::ioctl_blksszget(fd).unwrap_or(512);
        (logical, rustix::fs::ioctl_blkpbszget(fd).unwrap_or(logical).max(logical))
    }

    fn at_once(&self) -> AtOnce {
        self.at_once
    }

    fn read(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        if self.is_aligned(offset, buffers) {
            self.transfer(Direction::Read, offset, buffers, 0)
        } else {
            self.read_bounced(offset, buffers)
        }
    }

    fn try_read(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        match self.transfer(Direction::Read, offset, buffers, libc::RWF_NOWAIT) {
            // The file system does not know the flag.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                Err(io::ErrorKind::WouldBlock.into())
            }
            other => other,
        }
    }

    fn write(&self, offset: u64, buffers: &[VolatileSlice<'_>], stable: bool) -> io::Result<()> {
        let flags = if stable { libc::RWF_DSYNC } else { 0 };
        if !self.is_aligned(offset, buffers) {
            return self.write_bounced(offset, buffers, flags);
        }
        let _with_others = (self.alignment != Alignment::NONE)
            .then(|| self.partial.read().unwrap_or_else(PoisonError::into_inner));
        self.transfer(Direction::Write, offset, buffers, flags)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let result = if self.block_device {
            self.device_range(BLKDISCARD, offset, len)
        } else {
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&self.file, hole, offset, len).map_err(Into::into)
        };
        match result {
            Err(error) if is_unsupported(&error) => Ok(()),
            other => other,
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let keep = FallocateFlags::KEEP_SIZE;
        let by = |flags| rustix::fs::fallocate(&self.file, flags, offset, len).map_err(io::Error::from);
        let attempts: &[&dyn Fn() -> io::Result<()>] = &[
            &|| {
                if self.block_device {
                    self.device_range(BLKZEROOUT, offset, len)
                } else {
                    Err(unsupported())
                }
            },
            &|| if unmap { by(FallocateFlags::PUNCH_HOLE | keep) } else { Err(unsupported()) },
            &|| by(FallocateFlags::ZERO_RANGE | keep),
        ];
        for attempt in attempts {
            match attempt() {
                Err(error) if is_unsupported(&error) => {}
                other => return other,
            }
        }
        write_zero_bytes(self, offset, len)
    }

    fn is_direct(&self) -> bool {
        self.alignment != Alignment::NONE
    }

    fn direct(&self, write: bool, offset: u64, buffers: &[VolatileSlice<'_>]) -> Option<&File> {
        // Where a sector can be part of a block, who writes a part must have the block alone, which needs a thread.
        let by_parts = self.alignment.offset > 512;
        (self.is_direct() && !(write && by_parts) && self.is_aligned(offset, buffers)).then_some(&self.file)
    }

    fn resize(&self, len: u64) -> io::Result<()> {
        if self.block_device { Err(io::ErrorKind::Unsupported.into()) } else { self.file.set_len(len) }
    }
}

/// Whether a file is on a file system in memory.
pub(crate) fn is_in_memory(file: &File) -> io::Result<bool> {
    Ok(MEMORY_FILE_SYSTEMS.contains(&rustix::fs::fstatfs(file)?.f_type))
}

fn unsupported() -> io::Error {
    io::Error::from_raw_os_error(libc::EOPNOTSUPP)
}

/// Whether the host knows no such operation for this file.
fn is_unsupported(error: &io::Error) -> bool {
    let codes = [libc::EOPNOTSUPP, libc::ENOTTY, libc::ENOSYS, libc::EINVAL];
    error.raw_os_error().is_some_and(|code| codes.contains(&code))
}

/// Takes the first `count` bytes off the vectors.
fn advance(mut vectors: &mut [libc::iovec], mut count: usize) -> &mut [libc::iovec] {
    while let Some(first) = vectors.first_mut() {
        if count < first.iov_len {
            first.iov_base = first.iov_base.cast::<u8>().wrapping_add(count).cast();
            first.iov_len -= count;
            break;
        }
        count -= first.iov_len;
        vectors = &mut vectors[1..];
    }
    vectors
}

/// What O_DIRECT wants of this file (statx(2), `STATX_DIOALIGN`), in bytes.
fn direct_alignment(file: &File) -> io::Result<Alignment> {
    /// Enough for every disk there is, where the kernel does not say.
    const ASSUMED: u32 = 4096;
    let flags = rustix::fs::AtFlags::EMPTY_PATH;
    // SAFETY: an all-zero statx is valid, and it is written by the call only.
    let mut info: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is an empty C string, the structure is valid for writes.
    let result = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), flags.bits() as _, libc::STATX_DIOALIGN, &mut info)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let known = info.stx_mask & libc::STATX_DIOALIGN != 0 && info.stx_dio_offset_align > 0;
    let power = |bytes: u32| bytes.max(1).next_power_of_two() as usize;
    Ok(if known {
        Alignment { memory: power(info.stx_dio_mem_align), offset: power(info.stx_dio_offset_align) }
    } else {
        Alignment { memory: power(ASSUMED), offset: power(ASSUMED) }
    })
}

/// Memory at a multiple of its alignment.
struct AlignedMemory {
    storage: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedMemory {
    fn new(len: usize, alignment: usize) -> io::Result<Self> {
        let mut storage = Vec::new();
        storage.try_reserve_exact(len + alignment).map_err(|_| io::ErrorKind::OutOfMemory)?;
        storage.resize(len + alignment, 0);
        let start = storage.as_ptr().align_offset(alignment);
        Ok(AlignedMemory { storage, start, len })
    }

    fn bytes(&self) -> &[u8] {
        &self.storage[self.start..self.start + self.len]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.storage[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests;
