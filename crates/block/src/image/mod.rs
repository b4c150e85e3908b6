//! Image formats.

pub(crate) mod fault;
pub mod luks;
#[cfg(test)]
mod model_tests;
pub mod nbd;
pub(crate) mod probe;
pub mod qcow2;
pub mod raw;
pub mod vhdx;
pub mod vmdk;

use std::fs::File;
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

    /// Whether the kernel can make accesses as they are, past the page cache ([`Image::direct`]).
    fn is_direct(&self) -> bool {
        false
    }

    /// The file in which the kernel can make this access as it is, at the same offset, if it can.
    fn direct(&self, _write: bool, _offset: u64, _buffers: &[VolatileSlice<'_>]) -> Option<&File> {
        None
    }

    /// Makes all stable, and leaves the image as somebody else may open it. It may be used again afterwards.
    ///
    /// # Errors
    /// The host's.
    fn close(&self) -> io::Result<()> {
        self.flush()
    }

    /// Gives the disk another size in bytes. What is new reads as zeros.
    ///
    /// # Errors
    /// The host's; [`io::ErrorKind::Unsupported`] if the format cannot.
    fn resize(&self, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// The snapshots that are within the image.
    ///
    /// # Errors
    /// The host's, or the image's; [`io::ErrorKind::Unsupported`] if the format knows none.
    fn snapshots(&self) -> io::Result<Vec<Snapshot>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Makes, applies or deletes a snapshot within the image. Everything else waits meanwhile.
    ///
    /// # Errors
    /// As [`Image::snapshots`]; there is no such snapshot, or there is one.
    fn change_snapshots(&self, _change: SnapshotChange<'_>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// A snapshot within an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Unique in the image; QEMU uses numbers.
    pub id: String,
    /// What it is called.
    pub name: String,
    /// When it was made, in seconds and nanoseconds since 1970.
    pub date: (u32, u32),
    /// Bytes of the disk at that time, if that is known.
    pub size: Option<u64>,
    /// Bytes of a machine's state that QEMU has saved with it.
    pub machine_state: u64,
}

/// What is to be done about the snapshots within an image. A snapshot is found by its name, or by its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotChange<'a> {
    /// Makes a snapshot of this name of the disk as it is, dated in seconds and nanoseconds since 1970.
    Create(&'a str, (u32, u32)),
    /// Makes the disk what it was; what has been written since, and is in no other snapshot, is lost.
    Apply(&'a str),
    /// Forgets it.
    Delete(&'a str),
}

/// Has each unit (cluster, grain, block) that a range touches do its part: its number, where in it, how many bytes.
pub(crate) fn each_unit(
    unit: u64,
    offset: u64,
    len: u64,
    mut part: impl FnMut(u64, u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let (mut at, end) = (offset, offset + len);
    while at < end {
        let within = at % unit;
        let now = (unit - within).min(end - at);
        part(at / unit, within, now)?;
        at += now;
    }
    Ok(())
}

/// Makes a buffer all zeros.
fn fill_zero(buffer: &VolatileSlice<'_>) {
    const ZEROS: [u8; 4096] = [0; 4096];
    let mut done = 0;
    while done < buffer.len() {
        let now = ZEROS.len().min(buffer.len() - done);
        if let Ok(part) = buffer.subslice(done, now) {
            part.copy_from(&ZEROS[..now]);
        }
        done += now;
    }
}

/// How far an access has come in its buffers.
pub(crate) struct Place<'a, 'b> {
    buffers: &'a [VolatileSlice<'b>],
    /// Bytes of the first buffer that are done.
    within: usize,
}

impl<'a, 'b> Place<'a, 'b> {
    pub fn new(buffers: &'a [VolatileSlice<'b>]) -> Self {
        Place { buffers, within: 0 }
    }

    /// Copies to the next `from.len()` bytes of the buffers.
    pub fn fill(&mut self, from: &[u8]) {
        self.each(from.len(), |buffer, range| {
            buffer.copy_from(&from[range]);
        });
    }

    /// Copies from the next `to.len()` bytes of the buffers.
    pub fn take(&mut self, to: &mut [u8]) {
        self.each(to.len(), |buffer, range| {
            buffer.copy_to(&mut to[range]);
        });
    }

    fn each(&mut self, len: usize, mut copy: impl FnMut(VolatileSlice<'b>, std::ops::Range<usize>)) {
        let mut done = 0;
        while let Some(first) = self.buffers.first().filter(|_| done < len) {
            let now = (len - done).min(first.len() - self.within);
            if let Ok(part) = first.subslice(self.within, now) {
                copy(part, done..done + now);
            }
            done += now;
            self.within += now;
            if self.within == first.len() {
                self.buffers = &self.buffers[1..];
                self.within = 0;
            }
        }
    }
}

/// Writes zeros the slow way, for hosts that know no other.
fn write_zero_bytes(image: &dyn Image, offset: u64, len: u64) -> io::Result<()> {
    const PIECE: usize = 256 << 10;
    let mut zeros = vec![0u8; PIECE.min(usize::try_from(len).unwrap_or(PIECE))];
    let mut done = 0;
    while done < len {
        let piece = (len - done).min(PIECE as u64) as usize;
        image.write(offset + done, &[VolatileSlice::from(&mut zeros[..piece])], false)?;
        done += piece as u64;
    }
    Ok(())
}
