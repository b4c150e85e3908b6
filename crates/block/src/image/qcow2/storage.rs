//! What imago reads and writes an image through.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use vm_memory::VolatileSlice;

use super::header::{DIRTY, INCOMPATIBLE_AT};
use crate::image::raw::RawImage;
use crate::image::{Image, fill_zero, write_zero_bytes};

/// What is behind it.
enum Base {
    /// A file of the image, as long as what was written to it.
    File {
        file: Arc<RawImage>,
        /// Shows the image without its dirty bit. For images that are only read, where the refcounts, of which that bit says that they are
        /// wrong, do not matter; imago refuses the bit.
        hide_dirty: bool,
    },
    /// The disk below, which is only read.
    Disk(Arc<dyn Image>),
}

/// A file, or a whole image of whatever format, as imago's storage.
pub(super) struct Store {
    base: Base,
    helper: CommonStorageHelper,
}

impl Store {
    pub fn file(file: Arc<RawImage>, hide_dirty: bool) -> Self {
        Store { base: Base::File { file, hide_dirty }, helper: CommonStorageHelper::default() }
    }

    pub fn disk(image: Arc<dyn Image>) -> Self {
        Store { base: Base::Disk(image), helper: CommonStorageHelper::default() }
    }

    fn writable(&self) -> io::Result<&Arc<RawImage>> {
        match &self.base {
            Base::File { file, .. } => Ok(file),
            Base::Disk(_) => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
        }
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Store")
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.base {
            Base::File { .. } => "file",
            Base::Disk(_) => "backing image",
        })
    }
}

/// Takes the dirty bit out of the part of an image that was read.
fn hide_dirty_bit(offset: u64, buffers: &[VolatileSlice<'_>]) {
    // The bit is in the last byte of the big-endian field.
    let Some(mut at) = (INCOMPATIBLE_AT + 7).checked_sub(offset).map(|at| at as usize) else { return };
    for buffer in buffers {
        if let Ok(byte) = buffer.subslice(at, 1) {
            let mut value = [0];
            byte.copy_to(&mut value);
            byte.copy_from(&[value[0] & !(DIRTY as u8)]);
            return;
        }
        at -= buffer.len().min(at);
    }
}

impl Storage for Store {
    fn mem_align(&self) -> usize {
        match &self.base {
            Base::File { file, .. } => file.alignment().memory,
            Base::Disk(_) => 1,
        }
    }

    fn req_align(&self) -> usize {
        match &self.base {
            Base::File { file, .. } => file.alignment().offset,
            Base::Disk(_) => 512,
        }
    }

    fn size(&self) -> io::Result<u64> {
        Ok(match &self.base {
            Base::File { file, .. } => file.size(),
            Base::Disk(image) => image.size(),
        })
    }

    fn resolve_relative_path<P: AsRef<Path>>(&self, _relative: P) -> io::Result<PathBuf> {
        // Whatever an image refers to has been opened by us.
        Err(io::ErrorKind::Unsupported.into())
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let mut buffers = bufv.into_inner();
        let slices: Vec<_> = buffers.iter_mut().map(|buffer| VolatileSlice::from(&mut buffer[..])).collect();
        match &self.base {
            Base::File { file, hide_dirty } => {
                file.read_or_zero(offset, &slices)?;
                if *hide_dirty {
                    hide_dirty_bit(offset, &slices);
                }
                Ok(())
            }
            Base::Disk(image) => read_to_end(&**image, offset, &slices),
        }
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        let file = self.writable()?;
        let buffers = bufv.into_inner();
        let slices: Vec<_> = buffers
            .iter()
            // SAFETY: the buffers live through the call, and `RawImage::write` only reads from them.
            .map(|buffer| unsafe { VolatileSlice::new(buffer.as_ptr().cast_mut(), buffer.len()) })
            .collect();
        file.write(offset, &slices, false)
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        let file = self.writable()?;
        let end = offset.checked_add(length).ok_or(io::ErrorKind::InvalidInput)?;
        if file.size() < end {
            // Only writing makes it longer without a chance of cutting off what another thread appends.
            return write_zero_bytes(&**file, offset, length);
        }
        file.write_zeroes(offset, length, false)
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: as for this method.
        unsafe { self.pure_write_zeroes(offset, length) }
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.writable()?.discard(offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.writable()?.flush()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }

    fn resize(&self, new_size: u64, _preallocate: PreallocateMode) -> io::Result<()> {
        self.writable()?.resize(new_size)
    }
}

/// Reads from an image that may end before the buffers do; there, zeros.
pub(crate) fn read_to_end(image: &dyn Image, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
    let len: usize = buffers.iter().map(VolatileSlice::len).sum();
    let mut left = usize::try_from(image.size().saturating_sub(offset)).unwrap_or(usize::MAX);
    if len <= left {
        return image.read(offset, buffers);
    }
    let mut inside = Vec::with_capacity(buffers.len());
    for buffer in buffers {
        let here = left.min(buffer.len());
        let (data, rest) = buffer.split_at(here).map_err(io::Error::other)?;
        if here > 0 {
            inside.push(data);
        }
        fill_zero(&rest);
        left -= here;
    }
    if inside.is_empty() { Ok(()) } else { image.read(offset, &inside) }
}
