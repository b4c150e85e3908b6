//! Files that are loaded into a guest: opened once, read at offsets, never trusted to be as long as they say.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use engine::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use crate::error::LoadError;

/// How much is read at a time while copying into the guest.
const COPY_BYTES: usize = 256 << 10;

/// A kernel or an initial RAM disk.
#[derive(Debug)]
pub struct Image {
    name: String,
    len: u64,
    content: Content,
}

#[derive(Debug)]
enum Content {
    File(File),
    Bytes(Vec<u8>),
}

impl Image {
    /// Opens a regular file or a block device.
    ///
    /// # Errors
    /// It does not exist, may not be read, or is neither.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let name = path.display().to_string();
        let failed = |source| LoadError::Open { name: name.clone(), source };
        let kind = std::fs::metadata(path).map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(LoadError::NotAFile { name });
        }
        let file = File::open(path).map_err(failed)?;
        let len = io::Seek::seek(&mut &file, io::SeekFrom::End(0)).map_err(failed)?;
        Ok(Image { name, len, content: Content::File(file) })
    }

    /// An image that is already in memory; `name` is used in messages.
    pub fn from_bytes(name: impl Into<String>, bytes: Vec<u8>) -> Self {
        Image { name: name.into(), len: bytes.len() as u64, content: Content::Bytes(bytes) }
    }

    /// How messages call it: the path it was opened by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Length in bytes when it was opened.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// The image ends before, or the host cannot read it.
    pub fn read_exact_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), LoadError> {
        let wanted = offset.checked_add(buffer.len() as u64);
        if wanted.is_none_or(|end| end > self.len) {
            return Err(LoadError::Truncated {
                name: self.name.clone(),
                have: self.len,
                need: wanted.unwrap_or(u64::MAX),
            });
        }
        match &self.content {
            Content::File(file) => file
                .read_exact_at(buffer, offset)
                .map_err(|source| LoadError::Read { name: self.name.clone(), source }),
            Content::Bytes(bytes) => {
                // In range of a Vec, so it fits a usize.
                let start = offset as usize;
                buffer.copy_from_slice(&bytes[start..start + buffer.len()]);
                Ok(())
            }
        }
    }

    /// The first bytes, up to `max`; fewer if the image is shorter.
    pub(crate) fn head(&self, max: usize) -> Result<Vec<u8>, LoadError> {
        let mut head = vec![0; self.len.min(max as u64) as usize];
        self.read_exact_at(0, &mut head)?;
        Ok(head)
    }

    /// Copies `len` bytes from `offset` to guest memory.
    ///
    /// # Errors
    /// As [`Image::read_exact_at`], or the destination is not RAM.
    pub(crate) fn copy_to_guest(
        &self,
        offset: u64,
        len: u64,
        memory: &GuestMemory,
        gpa: u64,
    ) -> Result<(), LoadError> {
        let mut buffer = vec![0; COPY_BYTES.min(len as usize)];
        let mut done = 0;
        while done < len {
            let chunk = (len - done).min(COPY_BYTES as u64) as usize;
            self.read_exact_at(offset.saturating_add(done), &mut buffer[..chunk])?;
            memory.write_slice(&buffer[..chunk], GuestAddress(gpa.saturating_add(done)))?;
            done += chunk as u64;
        }
        Ok(())
    }
}
