//! vhdx images (Hyper-V; [MS-VHDX]): fixed, dynamic and differencing ones.
//!
//! A disk is made of blocks. The block allocation table (BAT) says of each whether it is in the file and where; of a differencing
//! image, blocks, or sectors of them, may be the parent's.
//!
//! How it is written: new blocks go to the end of the file, and the entries of the BAT that say so are kept in memory until a flush,
//! which makes the data stable first. An entry is eight bytes of a sector, so it is either old or new after a crash, and the log is not
//! needed; one that somebody else left is replayed when the image is opened for writing, and taken into account when reading. A block
//! of a differencing image is copied from the parent as a whole before it is written.

mod layout;
mod log;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::VolatileSlice;

use self::layout::{Guid, Header, MIB, Metadata, Region, le64, regions};
use self::log::Overlay;
use super::fault::{Fault, invalid};
use super::qcow2::storage::read_to_end;
use super::raw::RawImage;
use super::vmdk::Cut;
use super::{Image, each_unit, fill_zero, write_zero_bytes};
use crate::OpenError;
use crate::open::{Opening, Reference};

/// How a file begins.
const SIGNATURE: &[u8; 8] = b"vhdxfile";
/// States of a block (§2.5.1.1).
const NOT_PRESENT: u64 = 0;
const ZERO: u64 = 2;
const FULLY_PRESENT: u64 = 6;
const PARTIALLY_PRESENT: u64 = 7;
const STATE: u64 = 7;
/// Where a block is: in mebibytes, above this bit.
const OFFSET_SHIFT: u32 = 20;
/// Sectors that one sector bitmap is for; it has a bit of each.
const BITMAP_SECTORS: u64 = 1 << 23;
/// Entries of the BAT that are read together.
const PAGE_ENTRIES: u64 = 512;
/// Unchanged pages of the BAT kept in memory.
const KEPT_PAGES: usize = 4096;
/// Copied at a time.
const COPY_BYTES: u64 = 1 << 20;

/// What changes while the image is in use.
struct State {
    header: Header,
    /// The file's GUIDs have been renewed, as they have to be before it is changed.
    changing: bool,
    /// Pages of the BAT.
    pages: BTreeMap<u64, Vec<u64>>,
    /// Those that have to be written.
    changed: BTreeSet<u64>,
    /// Where the next block goes; found when the first is needed.
    end: Option<u64>,
}

/// A vhdx image.
pub struct VhdxImage {
    file: RawImage,
    writable: bool,
    bat: Region,
    metadata: Metadata,
    /// Where no block can be: the BAT, the metadata, the log.
    reserved: Vec<Region>,
    /// Blocks that share a sector bitmap, whose entry follows theirs.
    ratio: u64,
    overlay: Overlay,
    parent: Option<Arc<dyn Image>>,
    state: Mutex<State>,
}

impl VhdxImage {
    /// The image in `file`, which is at `path`; its parent is opened by `opening`.
    pub(crate) fn open(
        file: RawImage,
        path: &Path,
        writable: bool,
        opening: &mut Opening,
    ) -> Result<Self, OpenError> {
        let refused = |fault: Fault| fault.of(path, "vhdx");
        let Found { header, bat, metadata, overlay, reserved } = look(&file, writable).map_err(refused)?;
        let parent = match &metadata.parent {
            None => None,
            Some(locator) => Some(open_parent(path, locator, opening)?),
        };
        let ratio = BITMAP_SECTORS * u64::from(metadata.logical) / metadata.block;
        let blocks = metadata.size.div_ceil(metadata.block);
        let entries = match parent {
            None => blocks + (blocks - 1) / ratio,
            Some(_) => blocks.div_ceil(ratio) * (ratio + 1),
        };
        if entries * 8 > bat.len {
            return Err(refused(Fault::Invalid(
                "its block allocation table is too small for the disk".into(),
            )));
        }
        let state =
            State { header, changing: false, pages: BTreeMap::new(), changed: BTreeSet::new(), end: None };
        Ok(VhdxImage {
            file,
            writable,
            bat,
            metadata,
            reserved,
            ratio,
            overlay,
            parent,
            state: Mutex::new(state),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the entry of a block is in the BAT, and that of its sector bitmap.
    fn entry_of_block(&self, block: u64) -> u64 {
        block + block / self.ratio
    }

    fn entry_of_bitmap(&self, block: u64) -> u64 {
        block / self.ratio * (self.ratio + 1) + self.ratio
    }

    /// The page of the BAT that has an entry.
    fn page<'s>(&self, state: &'s mut State, entry: u64) -> io::Result<&'s mut Vec<u64>> {
        let page = entry / PAGE_ENTRIES;
        if !state.pages.contains_key(&page) {
            if state.pages.len() >= KEPT_PAGES + state.changed.len() {
                let changed = &state.changed;
                state.pages.retain(|page, _| changed.contains(page));
            }
            let at = page * PAGE_ENTRIES * 8;
            let mut bytes = vec![0; (PAGE_ENTRIES * 8).min(self.bat.len.saturating_sub(at)) as usize];
            self.overlay.read(&self.file, self.bat.at + at, &mut bytes)?;
            let entries = (0..bytes.len() / 8).map(|index| le64(&bytes, index * 8)).collect();
            state.pages.insert(page, entries);
        }
        state.pages.get_mut(&page).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn entry(&self, state: &mut State, entry: u64) -> io::Result<u64> {
        let page = self.page(state, entry)?;
        page.get((entry % PAGE_ENTRIES) as usize).copied().ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn set_entry(&self, state: &mut State, entry: u64, value: u64) -> io::Result<()> {
        let page = self.page(state, entry)?;
        if let Some(place) = page.get_mut((entry % PAGE_ENTRIES) as usize) {
            *place = value;
        }
        state.changed.insert(entry / PAGE_ENTRIES);
        Ok(())
    }

    /// Where a block, or a sector bitmap, of this length is in the file by its entry.
    fn place(&self, entry: u64, len: u64) -> io::Result<u64> {
        let at = entry >> OFFSET_SHIFT << OFFSET_SHIFT;
        // A sector bitmap has a mebibyte, a block that or more.
        let end = at.saturating_add(len);
        if at < MIB || self.reserved.iter().any(|region| at < region.at + region.len && region.at < end) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a block is where none can be; the image is broken",
            ));
        }
        Ok(at)
    }

    /// Reads from the parent; there are zeros where it is too short.
    fn read_parent(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        match &self.parent {
            Some(parent) => read_to_end(&**parent, offset, buffers),
            None => {
                buffers.iter().for_each(fill_zero);
                Ok(())
            }
        }
    }

    /// Runs of sectors of a part of a block that are all here or all the parent's: whether here, where in the block, how much.
    fn runs(
        &self,
        state: &mut State,
        block: u64,
        within: u64,
        len: u64,
    ) -> io::Result<Vec<(bool, u64, u64)>> {
        let bitmap = self.entry_of_bitmap(block);
        let entry = self.entry(state, bitmap)?;
        if entry & STATE != FULLY_PRESENT {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a sector bitmap is missing; the image is broken",
            ));
        }
        let sector = u64::from(self.metadata.logical);
        let first = (block % self.ratio * self.metadata.block + within) / sector;
        let last = (block % self.ratio * self.metadata.block + within + len - 1) / sector;
        let mut bits = vec![0; (last / 8 - first / 8 + 1) as usize];
        self.overlay.read(&self.file, self.place(entry, MIB)? + first / 8, &mut bits)?;
        let here = |number: u64| bits[(number / 8 - first / 8) as usize] >> (number % 8) & 1 != 0;
        let mut runs: Vec<(bool, u64, u64)> = Vec::new();
        for number in first..=last {
            let start = (number * sector - block % self.ratio * self.metadata.block).max(within);
            let end = ((number + 1) * sector - block % self.ratio * self.metadata.block).min(within + len);
            match runs.last_mut() {
                Some((same, _, len)) if *same == here(number) => *len += end - start,
                _ => runs.push((here(number), start, end - start)),
            }
        }
        Ok(runs)
    }

    /// Before the first change: renews the GUIDs by which others see that the file and the disk have changed.
    fn begin_changes(&self, state: &mut State) -> io::Result<()> {
        if !state.changing {
            let (file_write, data_write) = (random_guid()?, random_guid()?);
            state.header.replace(&self.file, |header| header.renew(file_write, data_write))?;
            state.changing = true;
        }
        Ok(())
    }

    /// A new block at the end of the file, which reads as zeros.
    fn allocate(&self, state: &mut State) -> io::Result<u64> {
        let end = match state.end {
            Some(end) => end,
            None => self.find_end(state)?,
        };
        let at = end.next_multiple_of(MIB);
        self.file.resize(at + self.metadata.block)?;
        state.end = Some(at + self.metadata.block);
        Ok(at)
    }

    /// The end of the file and of all blocks that the BAT knows.
    fn find_end(&self, state: &mut State) -> io::Result<u64> {
        let mut end = self.file.size();
        for block in 0..self.metadata.size.div_ceil(self.metadata.block) {
            let entry = self.entry_of_block(block);
            let at = self.entry(state, entry)? >> OFFSET_SHIFT << OFFSET_SHIFT;
            end = end.max(at.saturating_add(self.metadata.block));
        }
        if end > 1 << 60 { Err(io::ErrorKind::InvalidData.into()) } else { Ok(end) }
    }

    /// Copies a part of a block from the parent, to a block at `at`.
    fn copy_from_parent(&self, block: u64, within: u64, len: u64, at: u64) -> io::Result<()> {
        let start = block * self.metadata.block + within;
        let len = len.min(self.metadata.size.saturating_sub(start));
        let mut bytes = vec![0; COPY_BYTES.min(len) as usize];
        let mut done = 0;
        while done < len {
            let now = COPY_BYTES.min(len - done);
            let piece = [VolatileSlice::from(&mut bytes[..now as usize])];
            self.read_parent(start + done, &piece)?;
            self.file.write(at + within + done, &piece, false)?;
            done += now;
        }
        Ok(())
    }

    /// Has a block fully in the file; returns where.
    fn ensure(&self, state: &mut State, block: u64) -> io::Result<u64> {
        let entry = self.entry_of_block(block);
        let value = self.entry(state, entry)?;
        self.begin_changes(state)?;
        let at = match value & STATE {
            FULLY_PRESENT => return self.place(value, self.metadata.block),
            PARTIALLY_PRESENT if self.parent.is_some() => {
                let at = self.place(value, self.metadata.block)?;
                for (here, within, len) in self.runs(state, block, 0, self.metadata.block)? {
                    if !here {
                        self.copy_from_parent(block, within, len, at)?;
                    }
                }
                at
            }
            NOT_PRESENT if self.parent.is_some() => {
                let at = self.allocate(state)?;
                self.copy_from_parent(block, 0, self.metadata.block, at)?;
                at
            }
            PARTIALLY_PRESENT => return Err(no_parent()),
            _ => self.allocate(state)?,
        };
        self.set_entry(state, entry, at | FULLY_PRESENT)?;
        Ok(at)
    }

    fn write_changes(&self) -> io::Result<()> {
        self.file.flush()?;
        let mut state = self.lock();
        if state.changed.is_empty() {
            return Ok(());
        }
        // Data that were written since, to blocks that are new since.
        self.file.flush()?;
        for page in &state.changed {
            let Some(entries) = state.pages.get(page) else { continue };
            let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
            self.file.write_bytes(self.bat.at + page * PAGE_ENTRIES * 8, &bytes)?;
        }
        self.file.flush()?;
        // Only now: after a failure all is written again.
        state.changed.clear();
        Ok(())
    }
}

fn no_parent() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "a block is partly in a parent that there is not; the image is broken",
    )
}

/// What is in a file besides its blocks.
struct Found {
    header: Header,
    bat: Region,
    metadata: Metadata,
    overlay: Overlay,
    reserved: Vec<Region>,
}

/// Reads all that is needed to use an image; replays its log if it may be written.
fn look(file: &RawImage, writable: bool) -> Result<Found, Fault> {
    let mut signature = [0; 8];
    file.read_bytes(0, &mut signature)?;
    if signature != *SIGNATURE {
        return invalid("it does not begin as such an image does");
    }
    let mut header = Header::read(file)?;
    let mut overlay = Overlay::of(file, &header)?;
    if writable && header.has_log() {
        overlay.write(file)?;
        overlay = Overlay::default();
        header.replace(file, |header| header.set_log_guid(Guid::default()))?;
    }
    let (bat, region) = regions(file, &overlay)?;
    let metadata = Metadata::read(file, &overlay, region)?;
    let mut reserved = vec![bat, region];
    reserved.extend(header.log(file.size()).map(|(at, len)| Region { at, len }).ok());
    Ok(Found { header, bat, metadata, overlay, reserved })
}

/// Opens the parent that a locator names, if it is still what it was.
fn open_parent(
    path: &Path,
    locator: &[(String, String)],
    opening: &mut Opening,
) -> Result<Arc<dyn Image>, OpenError> {
    let value = |key: &str| locator.iter().find(|(found, _)| found == key).map(|(_, value)| value.as_str());
    let Some(name) = value("relative_path") else {
        let reason = "it names its parent by no relative path; put that right with Hyper-V's Set-VHD";
        return Err(Fault::Unsupported(reason.into()).of(path, "vhdx"));
    };
    // Windows writes its own separators.
    let name = name.replace('\\', "/");
    let reference = Reference { name: &name, of: path };
    let file = opening.look_at(reference)?;
    let found = Header::read(&file).map_err(|fault| fault.of(path, "vhdx"))?.data_write_guid();
    let linked = [value("parent_linkage"), value("parent_linkage2")].into_iter().flatten();
    if !linked.filter_map(parse_guid).any(|guid| guid == found) {
        let reason = format!("its parent {name} has been changed since it was made, so it cannot be used");
        return Err(Fault::Unsupported(reason).of(path, "vhdx"));
    }
    drop(file);
    opening.backing(reference, Some("vhdx"))
}

/// `{XXXXXXXX-XXXX-XXXX-XXXX-XXXXXXXXXXXX}`
fn parse_guid(text: &str) -> Option<Guid> {
    let digits: String = text.chars().filter(|c| c.is_ascii_hexdigit()).collect();
    let mut bytes = u128::from_str_radix(&digits, 16).ok().filter(|_| digits.len() == 32)?.to_be_bytes();
    // The first three numbers are little-endian in files.
    bytes[..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    Some(bytes)
}

fn random_guid() -> io::Result<Guid> {
    let mut guid = Guid::default();
    // SAFETY: the buffer is valid for writes of its length.
    let filled = unsafe { libc::getrandom(guid.as_mut_ptr().cast(), guid.len(), 0) };
    if filled != guid.len() as isize {
        return Err(io::Error::last_os_error());
    }
    // Version 4, variant 1 (RFC 9562).
    guid[7] = guid[7] & 0x0f | 0x40;
    guid[8] = guid[8] & 0x3f | 0x80;
    Ok(guid)
}

impl Image for VhdxImage {
    fn size(&self) -> u64 {
        self.metadata.size
    }

    fn sectors(&self) -> (u32, u32) {
        (self.metadata.logical, self.metadata.physical)
    }

    fn read(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        let mut cut = Cut::new(buffers);
        let len = buffers.iter().map(|buffer| buffer.len() as u64).sum();
        each_unit(self.metadata.block, offset, len, |block, within, len| {
            let buffers = cut.next(len)?;
            let mut state = self.lock();
            let entry = self.entry(&mut state, self.entry_of_block(block))?;
            match entry & STATE {
                FULLY_PRESENT => {
                    drop(state);
                    self.file.read_or_zero(self.place(entry, self.metadata.block)? + within, &buffers)
                }
                PARTIALLY_PRESENT if self.parent.is_some() => {
                    let at = self.place(entry, self.metadata.block)?;
                    let runs = self.runs(&mut state, block, within, len)?;
                    drop(state);
                    let mut cut = Cut::new(&buffers);
                    runs.into_iter().try_for_each(|(here, within, len)| {
                        let buffers = cut.next(len)?;
                        if here {
                            self.file.read_or_zero(at + within, &buffers)
                        } else {
                            self.read_parent(block * self.metadata.block + within, &buffers)
                        }
                    })
                }
                NOT_PRESENT => {
                    drop(state);
                    self.read_parent(block * self.metadata.block + within, &buffers)
                }
                PARTIALLY_PRESENT => Err(no_parent()),
                // Zero, unmapped, undefined.
                _ => {
                    buffers.iter().for_each(fill_zero);
                    Ok(())
                }
            }
        })
    }

    fn write(&self, offset: u64, buffers: &[VolatileSlice<'_>], stable: bool) -> io::Result<()> {
        let mut cut = Cut::new(buffers);
        let len = buffers.iter().map(|buffer| buffer.len() as u64).sum();
        each_unit(self.metadata.block, offset, len, |block, within, len| {
            let buffers = cut.next(len)?;
            let at = self.ensure(&mut self.lock(), block)?;
            self.file.write(at + within, &buffers, false)
        })?;
        if stable { self.flush() } else { Ok(()) }
    }

    fn flush(&self) -> io::Result<()> {
        if self.writable { self.write_changes() } else { Ok(()) }
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        each_unit(self.metadata.block, offset, len, |block, within, len| {
            let entry = self.entry(&mut self.lock(), self.entry_of_block(block))?;
            // A hole in the file gives as much space back as taking the block out of it.
            if entry & STATE == FULLY_PRESENT {
                self.begin_changes(&mut self.lock())?;
                self.file.discard(self.place(entry, self.metadata.block)? + within, len)?;
            }
            Ok(())
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        each_unit(self.metadata.block, offset, len, |block, within, len| {
            let mut state = self.lock();
            let place = self.entry_of_block(block);
            let entry = self.entry(&mut state, place)?;
            let at = match entry & STATE {
                FULLY_PRESENT => {
                    self.begin_changes(&mut state)?;
                    self.place(entry, self.metadata.block)?
                }
                PARTIALLY_PRESENT => self.ensure(&mut state, block)?,
                NOT_PRESENT if self.parent.is_some() && len < self.metadata.block => {
                    self.ensure(&mut state, block)?
                }
                NOT_PRESENT if self.parent.is_some() => {
                    self.begin_changes(&mut state)?;
                    return self.set_entry(&mut state, place, ZERO);
                }
                _ => return Ok(()),
            };
            drop(state);
            if self.file.size() >= at + within + len {
                self.file.write_zeroes(at + within, len, unmap)
            } else {
                write_zero_bytes(&self.file, at + within, len)
            }
        })
    }
}

impl Drop for VhdxImage {
    fn drop(&mut self) {
        if let Err(error) = self.flush() {
            tracing::error!("closing a vhdx image: {error}");
        }
    }
}
