//! Image formats.

pub mod raw;

use std::io;

use vm_memory::VolatileSlice;

/// How an access can be made on the thread that asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtOnce {
    /// Not: it may wait for a device.
    Never,
    /// With [`Image::try_read`], which refuses to wait.
    CachedReads,
    /// Always: the contents are in the host's memory.
    Always,
}

/// Contents of a disk. Several threads call it at once; its methods wait for the host.
///
/// Ranges are within [`Image::size`] and whole logical sectors; the buffers are as long as the range. Accesses of several threads to
/// the same place may be made in any order.
pub trait Image: Send + Sync {
    /// Bytes. May grow or shrink between two calls, when somebody resizes the image.
    fn size(&self) -> u64;

    /// Smallest logical sector size in bytes that the image can have, and the physical one it would like.
    fn sectors(&self) -> (u32, u32) {
        (512, 512)
    }

    /// Which accesses need no thread of their own.
    fn at_once(&self) -> AtOnce {
        AtOnce::Never
    }

    /// Reads into `buffers`.
    ///
    /// # Errors
    /// The host's.
    fn read(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()>;

    /// As [`Image::read`], if that needs no waiting.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if it does; some of the buffers may be filled then.
    fn try_read(&self, _offset: u64, _buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    /// Writes from `buffers`; with `stable`, survives a loss of power when it returns.
    ///
    /// # Errors
    /// The host's. The range may be partly written.
    fn write(&self, offset: u64, buffers: &[VolatileSlice<'_>], stable: bool) -> io::Result<()>;

    /// Makes all stable that was written before.
    ///
    /// # Errors
    /// The host's.
    fn flush(&self) -> io::Result<()>;

    /// Gives space back where the host can; elsewhere does nothing.
    ///
    /// # Errors
    /// The host's.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes a range read as zeros; with `unmap`, may give its space back.
    ///
    /// # Errors
    /// The host's.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;
}

/// Writes zeros the slow way, for hosts that know no other.
fn write_zero_bytes(image: &dyn Image, offset: u64, len: u64) -> io::Result<()> {
    const PIECE: usize = 256 << 10;
    let mut zeros = vec![0u8; PIECE.min(len as usize)];
    let mut done = 0;
    while done < len {
        let piece = (len - done).min(PIECE as u64) as usize;
        image.write(offset + done, &[VolatileSlice::from(&mut zeros[..piece])], false)?;
        done += piece as u64;
    }
    Ok(())
}
