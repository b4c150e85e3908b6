//! vmdk images (VMware, "Virtual Disk Format 5.0"): a descriptor that lists extents, or one sparse extent with its descriptor inside.
//!
//! Flat and sparse extents are read and written, those of `streamOptimized` images (compressed) read only. Images with a parent
//! (links of a snapshot) are refused, and so are the sparse formats of ESX.

mod sparse;
#[cfg(test)]
mod tests;

use std::io;
use std::path::Path;

use vm_memory::VolatileSlice;

use self::sparse::SparseExtent;
use super::fault::{Fault, invalid, unsupported};
use super::raw::RawImage;
use super::{Image, fill_zero};
use crate::OpenError;
use crate::open::{Opening, Reference};

const SECTOR: u64 = 512;
/// How a sparse extent begins.
const SPARSE_MAGIC: [u8; 4] = *b"KDMV";
/// The longest descriptor.
const MAX_DESCRIPTOR: u64 = 1 << 20;
/// Extents at most: 64 TiB in pieces of two gigabytes.
const MAX_EXTENTS: usize = 32768;
/// Files of an image at most.
const MAX_FILES: usize = 1024;

/// Where an extent's bytes are.
enum Contents {
    /// In a file from this offset on.
    Flat(RawImage, u64),
    Sparse(Box<SparseExtent>),
    Zero,
}

struct Extent {
    /// Where on the disk, in bytes.
    start: u64,
    len: u64,
    contents: Contents,
}

/// A vmdk image.
pub struct VmdkImage {
    extents: Vec<Extent>,
    size: u64,
}

/// A line of a descriptor about an extent.
#[derive(Debug, PartialEq, Eq)]
struct ExtentLine<'a> {
    sectors: u64,
    kind: &'a str,
    file: Option<&'a str>,
    /// In sectors.
    offset: u64,
}

impl<'a> ExtentLine<'a> {
    /// `RW 4192256 FLAT "disk-flat.vmdk" 0`
    fn parse(line: &'a str) -> Option<Self> {
        let (before, file, after) = match line.split_once('"') {
            None => (line, None, ""),
            Some((before, rest)) => {
                let (file, after) = rest.rsplit_once('"')?;
                (before, Some(file), after)
            }
        };
        let mut words = before.split_whitespace().skip(1);
        let sectors = words.next()?.parse().ok()?;
        let kind = words.next().unwrap_or("ZERO");
        let offset = after.split_whitespace().next().map_or(Some(0), |word| word.parse().ok())?;
        Some(ExtentLine { sectors, kind, file, offset })
    }
}

/// What a descriptor says.
struct Descriptor<'a> {
    extents: Vec<ExtentLine<'a>>,
}

impl<'a> Descriptor<'a> {
    fn parse(text: &'a str) -> Result<Self, Fault> {
        let mut extents = Vec::new();
        for line in text.lines().map(str::trim) {
            let first = line.split_whitespace().next().unwrap_or("");
            if matches!(first, "RW" | "RDONLY" | "NOACCESS") {
                if first == "NOACCESS" {
                    return unsupported("an extent of it must not be accessed");
                }
                match ExtentLine::parse(line) {
                    Some(extent) => extents.push(extent),
                    None => return invalid(format!("its descriptor has an extent that is not one: {line}")),
                }
                if extents.len() > MAX_EXTENTS {
                    return invalid("its descriptor has too many extents");
                }
                continue;
            }
            let Some((key, value)) = line.split_once('=') else { continue };
            let value = value.trim().trim_matches('"');
            match key.trim() {
                "version" if !matches!(value, "1" | "2" | "3") => {
                    return unsupported(format!("version {value} of its descriptor is not known"));
                }
                "parentCID" if !value.eq_ignore_ascii_case("ffffffff") => {
                    return unsupported(
                        "it needs a parent image (a snapshot's link); convert it with qemu-img convert",
                    );
                }
                "encoding" if !matches!(value.to_ascii_lowercase().as_str(), "utf-8" | "windows-1252") => {
                    return unsupported(format!("its descriptor has the encoding {value}"));
                }
                _ => {}
            }
        }
        if extents.is_empty() { invalid("its descriptor has no extents") } else { Ok(Descriptor { extents }) }
    }
}

/// The text of a descriptor, which may be followed by zeros.
fn descriptor_text(bytes: &[u8]) -> Result<&str, Fault> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    std::str::from_utf8(&bytes[..end]).or_else(|_| invalid("its descriptor is not text"))
}

impl VmdkImage {
    /// The image in `file`, which is at `path`; what it refers to is opened by `opening`.
    pub(crate) fn open(
        file: RawImage,
        path: &Path,
        writable: bool,
        opening: &mut Opening,
    ) -> Result<Self, OpenError> {
        let refused = |fault: Fault| fault.of(path, "vmdk");
        let mut magic = [0; 4];
        file.read_bytes(0, &mut magic).map_err(|e| refused(e.into()))?;
        if magic == SPARSE_MAGIC {
            let (extent, descriptor) = SparseExtent::open(file, writable).map_err(refused)?;
            if let Some(descriptor) = descriptor {
                // Only that it asks for nothing more: this file is its extent.
                descriptor_text(&descriptor).and_then(Descriptor::parse).map_err(refused)?;
            }
            let size = extent.size();
            let contents = Contents::Sparse(Box::new(extent));
            return Ok(VmdkImage { extents: vec![Extent { start: 0, len: size, contents }], size });
        }
        if file.size() > MAX_DESCRIPTOR {
            return Err(refused(Fault::Invalid("it does not begin as such an image does".into())));
        }
        let mut bytes = vec![0; file.size() as usize];
        file.read_bytes(0, &mut bytes).map_err(|e| refused(e.into()))?;
        let descriptor = descriptor_text(&bytes).and_then(Descriptor::parse).map_err(refused)?;
        let mut image = VmdkImage { extents: Vec::new(), size: 0 };
        for line in &descriptor.extents {
            let contents = match (line.kind, line.file) {
                ("ZERO", _) => Ok(Contents::Zero),
                _ if image.extents.len() >= MAX_FILES => Err(Fault::Invalid("it has too many files".into())),
                ("FLAT" | "VMFS", Some(name)) => {
                    let file = opening.data_file(Reference { name, of: path }, writable)?;
                    flat(file, line)
                }
                ("SPARSE", Some(name)) => {
                    let file = opening.data_file(Reference { name, of: path }, writable)?;
                    SparseExtent::open(file, writable).map(|(extent, _)| Contents::Sparse(Box::new(extent)))
                }
                (kind, _) => unsupported(format!(
                    "extents of the kind {kind} are not known; convert it with qemu-img convert"
                )),
            };
            image.add(line.sectors, contents.map_err(refused)?).map_err(refused)?;
        }
        Ok(image)
    }

    fn add(&mut self, sectors: u64, contents: Contents) -> Result<(), Fault> {
        let len = sectors.checked_mul(SECTOR);
        let end = len.and_then(|len| self.size.checked_add(len)).filter(|end| *end <= 1 << 62);
        let (Some(len), Some(end)) = (len, end) else { return invalid("its extents are too long") };
        if let Contents::Sparse(extent) = &contents
            && extent.size() < len
        {
            return invalid("an extent is longer than its file says");
        }
        self.extents.push(Extent { start: self.size, len, contents });
        self.size = end;
        Ok(())
    }

    /// Has the extents of a range do their parts.
    fn each<'b>(
        &self,
        offset: u64,
        len: u64,
        buffers: &[VolatileSlice<'b>],
        mut part: impl FnMut(&Contents, u64, u64, &[VolatileSlice<'b>]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut cut = Cut::new(buffers);
        let (mut at, end) = (offset, offset + len);
        let first = self.extents.partition_point(|extent| extent.start + extent.len <= offset);
        for extent in self.extents.get(first..).unwrap_or_default() {
            if at >= end {
                break;
            }
            let within = at - extent.start;
            let now = (extent.len - within).min(end - at);
            part(&extent.contents, within, now, &cut.next(now)?)?;
            at += now;
        }
        if at < end { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }
}

fn flat(file: RawImage, line: &ExtentLine<'_>) -> Result<Contents, Fault> {
    let offset = line.offset.checked_mul(SECTOR);
    let end = offset.and_then(|offset| offset.checked_add(line.sectors.checked_mul(SECTOR)?));
    match (offset, end) {
        (Some(offset), Some(end)) if end <= file.size() => Ok(Contents::Flat(file, offset)),
        _ => invalid("an extent is longer than its file"),
    }
}

/// Takes buffers apart, piece by piece.
pub(crate) struct Cut<'a, 'b> {
    buffers: &'a [VolatileSlice<'b>],
    within: usize,
}

impl<'a, 'b> Cut<'a, 'b> {
    pub fn new(buffers: &'a [VolatileSlice<'b>]) -> Self {
        Cut { buffers, within: 0 }
    }

    /// The next `len` bytes; fewer if there are no more.
    pub fn next(&mut self, len: u64) -> io::Result<Vec<VolatileSlice<'b>>> {
        let mut left = len;
        let mut pieces = Vec::new();
        while let Some(first) = self.buffers.first().filter(|_| left > 0) {
            let now = ((first.len() - self.within) as u64).min(left) as usize;
            if now > 0 {
                pieces.push(first.subslice(self.within, now).map_err(io::Error::other)?);
            }
            left -= now as u64;
            self.within += now;
            if self.within == first.len() {
                self.buffers = self.buffers.get(1..).unwrap_or_default();
                self.within = 0;
            }
        }
        Ok(pieces)
    }
}

fn length(buffers: &[VolatileSlice<'_>]) -> u64 {
    buffers.iter().map(|buffer| buffer.len() as u64).sum()
}

impl Image for VmdkImage {
    fn size(&self) -> u64 {
        self.size
    }

    fn sectors(&self) -> (u32, u32) {
        (512, 4096)
    }

    fn read(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.each(offset, length(buffers), buffers, |contents, at, _, buffers| match contents {
            Contents::Flat(file, start) => file.read(start + at, buffers),
            Contents::Sparse(extent) => extent.read(at, buffers),
            Contents::Zero => {
                buffers.iter().for_each(fill_zero);
                Ok(())
            }
        })
    }

    fn write(&self, offset: u64, buffers: &[VolatileSlice<'_>], stable: bool) -> io::Result<()> {
        self.each(offset, length(buffers), buffers, |contents, at, _, buffers| match contents {
            Contents::Flat(file, start) => file.write(start + at, buffers, false),
            Contents::Sparse(extent) => extent.write(at, buffers),
            Contents::Zero => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
        })?;
        if stable { self.flush() } else { Ok(()) }
    }

    fn flush(&self) -> io::Result<()> {
        self.extents.iter().try_for_each(|extent| match &extent.contents {
            Contents::Flat(file, _) => file.flush(),
            Contents::Sparse(extent) => extent.flush(),
            Contents::Zero => Ok(()),
        })
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.each(offset, len, &[], |contents, at, len, _| match contents {
            Contents::Flat(file, start) => file.discard(start + at, len),
            // The format cannot give a grain back.
            Contents::Sparse(_) | Contents::Zero => Ok(()),
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.each(offset, len, &[], |contents, at, len, _| match contents {
            Contents::Flat(file, start) => file.write_zeroes(start + at, len, unmap),
            Contents::Sparse(extent) => extent.write_zeroes(at, len),
            Contents::Zero => Ok(()),
        })
    }
}
