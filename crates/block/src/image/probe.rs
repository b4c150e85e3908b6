//! What format an image has, by its first bytes, and how a guest is kept from changing that.
//!
//! A guest that owns a raw disk can write the header of another format into its first sector. If the image is opened again with its
//! format being looked for, that header would be believed, and with it the names of files of the host that it refers to. So a raw image
//! whose format was looked for, not given, does not take writes that would make it look like something else ([`Guarded`]); that is
//! QEMU's rule too. Who needs such a disk says `format=raw`, when opening it and ever after.

use std::fs::File;
use std::io;

use vm_memory::VolatileSlice;

use super::{AtOnce, Image};
use crate::Format;
use crate::image::raw::RawImage;

/// As many bytes as [`probe`] looks at.
pub(crate) const PROBED_BYTES: usize = 512;

/// The format that the first sector of a file shows, if it is none that any contents may look like.
pub(crate) fn probe(sector: &[u8; PROBED_BYTES]) -> Option<Format> {
    /// How the formats begin.
    const MAGIC: [(&[u8], Format); 4] = [
        (b"QFI\xfb", Format::Qcow2),
        (b"KDMV", Format::Vmdk),
        (b"# Disk DescriptorFile", Format::Vmdk),
        (b"vhdxfile", Format::Vhdx),
    ];
    MAGIC.into_iter().find(|(magic, _)| sector.starts_with(magic)).map(|(_, format)| format)
}

/// A raw image whose first sector stays such that nobody takes it for another format.
pub(crate) struct Guarded(pub RawImage);

impl Image for Guarded {
    fn write(&self, offset: u64, buffers: &[VolatileSlice<'_>], stable: bool) -> io::Result<()> {
        if offset >= PROBED_BYTES as u64 {
            return self.0.write(offset, buffers, stable);
        }
        // The guest may change its memory while we look, so what is written is what was looked at.
        let len: usize = buffers.iter().map(VolatileSlice::len).sum();
        let within = offset as usize;
        let copied = len.min(PROBED_BYTES - within);
        let mut first = [0; PROBED_BYTES];
        if within > 0 || copied < PROBED_BYTES {
            self.0.read_bytes(0, &mut first)?;
        }
        let mut rest = Vec::with_capacity(buffers.len());
        let mut at = within;
        for buffer in buffers {
            let here = buffer.len().min(within + copied - at);
            let (head, tail) = buffer.split_at(here).map_err(io::Error::other)?;
            head.copy_to(&mut first[at..at + here]);
            at += here;
            if !tail.is_empty() {
                rest.push(tail);
            }
        }
        if let Some(format) = probe(&first) {
            tracing::warn!(
                "the guest was kept from making its raw disk look like a {} image; give format=raw if it may",
                format.name()
            );
            return Err(io::ErrorKind::Unsupported.into());
        }
        let mut all = vec![VolatileSlice::from(&mut first[within..within + copied])];
        all.extend(rest);
        self.0.write(offset, &all, stable)
    }

    fn size(&self) -> u64 {
        self.0.size()
    }

    fn sectors(&self) -> (u32, u32) {
        self.0.sectors()
    }

    fn at_once(&self) -> AtOnce {
        self.0.at_once()
    }

    fn read(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.0.read(offset, buffers)
    }

    fn try_read(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.0.try_read(offset, buffers)
    }

    fn flush(&self) -> io::Result<()> {
        self.0.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.0.write_zeroes(offset, len, unmap)
    }

    fn is_direct(&self) -> bool {
        self.0.is_direct()
    }

    fn direct(&self, write: bool, offset: u64, buffers: &[VolatileSlice<'_>]) -> Option<&File> {
        if write && offset < PROBED_BYTES as u64 { None } else { self.0.direct(write, offset, buffers) }
    }

    fn resize(&self, len: u64) -> io::Result<()> {
        self.0.resize(len)
    }
}
