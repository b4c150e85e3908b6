//! Sparse extents ("Hosted Sparse Extents" and "Stream-Optimized Compressed Sparse Extents" of the specification).
//!
//! A grain directory refers to grain tables, these to grains. There may be a second, redundant set of both. What is in the tables is
//! read as it is needed; a new grain is at the end of the file, and in the tables once its data is in the file.

use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use miniz_oxide::inflate;
use vm_memory::VolatileSlice;

use super::{Cut, MAX_DESCRIPTOR, SECTOR, SPARSE_MAGIC, length};
use crate::image::fault::{Fault, invalid, unsupported};
use crate::image::raw::RawImage;
use crate::image::{Image, Place, each_unit, fill_zero, write_zero_bytes};

/// Bits of `flags`.
const REDUNDANT_TABLES: u32 = 1 << 1;
const ZEROED_GRAINS: u32 = 1 << 2;
const COMPRESSED: u32 = 1 << 16;
/// Compression with deflate.
const DEFLATE: u16 = 1;
/// The directory is found by the footer at the end of the file.
const AT_END: u64 = u64::MAX;
/// Entries of a grain table, always.
const TABLE_ENTRIES: u64 = 512;
const TABLE_BYTES: u64 = TABLE_ENTRIES * 4;
/// The largest grain: 64 KiB is what everybody has.
const MAX_GRAIN_SECTORS: u64 = 2048;
/// Directories at most: enough for 64 TiB in grains of 64 KiB.
const MAX_DIRECTORY_ENTRIES: u64 = 1 << 21;
/// Grain tables kept in memory.
const KEPT_TABLES: usize = 1024;
/// A grain that is known to be zeros.
const ZEROED: u32 = 1;

/// Places in the header.
const VERSION_AT: usize = 4;
const FLAGS_AT: usize = 8;
const CAPACITY_AT: usize = 12;
const GRAIN_AT: usize = 20;
const DESCRIPTOR_AT: usize = 28;
const DESCRIPTOR_SIZE_AT: usize = 36;
const TABLE_ENTRIES_AT: usize = 44;
const REDUNDANT_AT: usize = 48;
const DIRECTORY_AT: usize = 56;
const COMPRESSION_AT: usize = 77;

fn le16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_le_bytes)
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

/// A directory, and where it is in the file.
struct Directory {
    at: u64,
    /// Sectors where tables are.
    entries: Vec<u32>,
}

struct State {
    directory: Directory,
    redundant: Option<Directory>,
    tables: HashMap<u64, Vec<u32>>,
    /// Where the next grain goes; found when the first is needed.
    end: Option<u64>,
    /// The last compressed grain that was read.
    unpacked: (u64, Vec<u8>),
}

/// A sparse extent.
pub(super) struct SparseExtent {
    file: RawImage,
    /// Bytes of the disk, and of a grain.
    size: u64,
    grain: u64,
    compressed: bool,
    zeroed_grains: bool,
    state: Mutex<State>,
}

impl SparseExtent {
    /// The extent in a file, and the descriptor that is in it.
    pub fn open(file: RawImage, writable: bool) -> Result<(Self, Option<Vec<u8>>), Fault> {
        let mut header = [0; SECTOR as usize];
        file.read_bytes(0, &mut header)?;
        if header[..4] != SPARSE_MAGIC {
            return invalid("a sparse extent does not begin as one");
        }
        let (descriptor_at, descriptor_sectors) =
            (le64(&header, DESCRIPTOR_AT), le64(&header, DESCRIPTOR_SIZE_AT));
        if le64(&header, DIRECTORY_AT) == AT_END {
            // Before the last sector, which is an end marker.
            let Some(at) = file.size().checked_sub(2 * SECTOR) else { return invalid("it has no footer") };
            file.read_bytes(at, &mut header)?;
            if header[..4] != SPARSE_MAGIC || le64(&header, DIRECTORY_AT) == AT_END {
                return invalid("it has no footer; the file may be truncated");
            }
        }
        let (version, flags) = (le32(&header, VERSION_AT), le32(&header, FLAGS_AT));
        if !(1..=3).contains(&version) {
            return unsupported(format!("version {version} of sparse extents is not known"));
        }
        let (capacity, grain) = (le64(&header, CAPACITY_AT), le64(&header, GRAIN_AT));
        if !grain.is_power_of_two() || !(8..=MAX_GRAIN_SECTORS).contains(&grain) {
            return invalid(format!("grains of {grain} sectors are not possible"));
        }
        if u64::from(le32(&header, TABLE_ENTRIES_AT)) != TABLE_ENTRIES {
            return unsupported("its grain tables do not have 512 entries");
        }
        let tables = capacity.div_ceil(grain).div_ceil(TABLE_ENTRIES);
        if tables > MAX_DIRECTORY_ENTRIES {
            return invalid(format!("{capacity} sectors are more than an extent can have"));
        }
        let compressed = flags & COMPRESSED != 0;
        if compressed && le16(&header, COMPRESSION_AT) != DEFLATE {
            return unsupported("its grains are compressed in a way that is not known");
        }
        if compressed && writable {
            return unsupported(
                "it is stream-optimized and can only be read; attach it with the option ro, or convert it with qemu-img convert",
            );
        }
        let directory = read_directory(&file, le64(&header, DIRECTORY_AT), tables)?;
        let redundant = (flags & REDUNDANT_TABLES != 0 && writable)
            .then(|| read_directory(&file, le64(&header, REDUNDANT_AT), tables))
            .transpose()?;
        let descriptor = match (descriptor_at, descriptor_sectors.checked_mul(SECTOR)) {
            (0, _) | (_, Some(0)) => None,
            (at, Some(len)) if len <= MAX_DESCRIPTOR && at < file.size() / SECTOR => {
                let mut bytes = vec![0; len as usize];
                file.read_bytes(at * SECTOR, &mut bytes)?;
                Some(bytes)
            }
            _ => return invalid("its descriptor is not within the file"),
        };
        let state =
            State { directory, redundant, tables: HashMap::new(), end: None, unpacked: (AT_END, Vec::new()) };
        let extent = SparseExtent {
            file,
            size: capacity * SECTOR,
            grain: grain * SECTOR,
            compressed,
            zeroed_grains: flags & ZEROED_GRAINS != 0,
            state: Mutex::new(state),
        };
        Ok((extent, descriptor))
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a grain is in the file, if it is.
    fn find(&self, state: &mut State, grain: u64) -> io::Result<Option<u64>> {
        let (table, index) = (grain / TABLE_ENTRIES, grain % TABLE_ENTRIES);
        let Some(at) = state.directory.entries.get(table as usize).copied().filter(|at| *at != 0) else {
            return Ok(None);
        };
        if !state.tables.contains_key(&table) {
            let entries = self.read_table(at)?;
            if state.tables.len() >= KEPT_TABLES {
                state.tables.clear();
            }
            state.tables.insert(table, entries);
        }
        let entry =
            state.tables.get(&table).and_then(|table| table.get(index as usize)).copied().unwrap_or(0);
        if entry == 0 || entry == ZEROED && self.zeroed_grains {
            return Ok(None);
        }
        Ok(Some(u64::from(entry) * SECTOR))
    }

    fn read_table(&self, at: u32) -> io::Result<Vec<u32>> {
        let at = u64::from(at) * SECTOR;
        if at + TABLE_BYTES > self.file.size().next_multiple_of(SECTOR) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a grain table is not within the file"));
        }
        let mut bytes = vec![0; TABLE_BYTES as usize];
        self.file.read_bytes(at, &mut bytes)?;
        Ok((0..TABLE_ENTRIES as usize).map(|index| le32(&bytes, index * 4)).collect())
    }

    /// Reads a range of the extent.
    pub fn read(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        let mut cut = Cut::new(buffers);
        each_unit(self.grain, offset, length(buffers), |grain, within, len| {
            let buffers = cut.next(len)?;
            let mut state = self.lock();
            match self.find(&mut state, grain)? {
                None => {
                    buffers.iter().for_each(fill_zero);
                    Ok(())
                }
                Some(at) if self.compressed => {
                    if state.unpacked.0 != at {
                        state.unpacked = (at, self.unpack(at)?);
                    }
                    let data = state.unpacked.1.get(within as usize..(within + len) as usize);
                    Place::new(&buffers).fill(data.ok_or(io::ErrorKind::InvalidData)?);
                    Ok(())
                }
                Some(at) => {
                    drop(state);
                    self.file.read_or_zero(at + within, &buffers)
                }
            }
        })
    }

    /// A compressed grain: where it is on the disk (8 bytes), its length (4), its data.
    fn unpack(&self, at: u64) -> io::Result<Vec<u8>> {
        let broken = || io::Error::new(io::ErrorKind::InvalidData, "a compressed grain is broken");
        let mut head = [0; 12];
        self.file.read_bytes(at, &mut head)?;
        let len = u64::from(le32(&head, 8));
        // Deflate makes nothing much longer than it was.
        if len > 2 * self.grain || at + 12 + len > self.file.size() {
            return Err(broken());
        }
        let mut packed = vec![0; len as usize];
        self.file.read_bytes(at + 12, &mut packed)?;
        let mut data =
            inflate::decompress_to_vec_zlib_with_limit(&packed, self.grain as usize).map_err(|_| broken())?;
        // The last one may be short.
        data.resize(self.grain as usize, 0);
        Ok(data)
    }

    /// Writes a range of the extent.
    pub fn write(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        let mut cut = Cut::new(buffers);
        each_unit(self.grain, offset, length(buffers), |grain, within, len| {
            let buffers = cut.next(len)?;
            let mut state = self.lock();
            if let Some(at) = self.find(&mut state, grain)? {
                drop(state);
                return self.file.write(at + within, &buffers, false);
            }
            let at = self.allocate(&mut state, self.grain)?;
            // The rest of the grain is the new end of the file, which is zeros.
            self.file.resize(at + self.grain)?;
            self.file.write(at + within, &buffers, false)?;
            self.enter(&mut state, grain, at)
        })
    }

    /// Makes a range zeros; grains that are not there are.
    pub fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        each_unit(self.grain, offset, len, |grain, within, len| {
            let found = self.find(&mut self.lock(), grain)?;
            found.map_or(Ok(()), |at| write_zero_bytes(&self.file, at + within, len))
        })
    }

    /// Makes all stable.
    pub fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }

    /// Room at the end of the file.
    fn allocate(&self, state: &mut State, len: u64) -> io::Result<u64> {
        let end = match state.end {
            Some(end) => end,
            None => self.find_end(state)?,
        };
        let at = end.next_multiple_of(self.grain);
        if (at + len) / SECTOR > u64::from(u32::MAX) {
            return Err(io::Error::other(
                "the extent is as large as the format allows; convert the image to qcow2",
            ));
        }
        state.end = Some(at + len);
        Ok(at)
    }

    /// The end of the file, and of all that tables refer to: after a crash these may be beyond it.
    fn find_end(&self, state: &State) -> io::Result<u64> {
        let mut end = self.file.size();
        for at in state.directory.entries.iter().filter(|at| **at != 0) {
            let last = self.read_table(*at)?.into_iter().max().unwrap_or(0);
            end = end.max(u64::from(last) * SECTOR + self.grain);
        }
        Ok(end)
    }

    /// Enters a new grain into its tables, which are made if they are not there.
    fn enter(&self, state: &mut State, grain: u64, at: u64) -> io::Result<()> {
        let (table, index) = ((grain / TABLE_ENTRIES) as usize, grain % TABLE_ENTRIES);
        let sector = (at / SECTOR) as u32;
        for redundant in [true, false] {
            let directory = |state: &State| match (redundant, &state.redundant) {
                (false, _) => state.directory.entries.get(table).map(|entry| (state.directory.at, *entry)),
                (true, Some(directory)) => directory.entries.get(table).map(|entry| (directory.at, *entry)),
                (true, None) => None,
            };
            let Some((directory_at, mut entry)) = directory(state) else { continue };
            if entry == 0 {
                let at = self.allocate(state, TABLE_BYTES)?;
                write_zero_bytes(&self.file, at, TABLE_BYTES)?;
                entry = (at / SECTOR) as u32;
                self.file.write_bytes(directory_at + table as u64 * 4, &entry.to_le_bytes())?;
                let directory = if redundant { state.redundant.as_mut() } else { Some(&mut state.directory) };
                if let Some(place) = directory.and_then(|directory| directory.entries.get_mut(table)) {
                    *place = entry;
                }
            }
            self.file.write_bytes(u64::from(entry) * SECTOR + index * 4, &sector.to_le_bytes())?;
        }
        if let Some(place) =
            state.tables.get_mut(&(table as u64)).and_then(|table| table.get_mut(index as usize))
        {
            *place = sector;
        }
        Ok(())
    }
}

fn read_directory(file: &RawImage, sector: u64, tables: u64) -> Result<Directory, Fault> {
    let at = sector.checked_mul(SECTOR).filter(|at| *at != 0);
    let inside = |at: &u64| at.checked_add(tables * 4).is_some_and(|end| end <= file.size());
    let Some(at) = at.filter(inside) else {
        return invalid("its grain directory is not within the file; the file may be truncated");
    };
    let mut bytes = vec![0; tables as usize * 4];
    file.read_bytes(at, &mut bytes)?;
    Ok(Directory { at, entries: (0..tables as usize).map(|index| le32(&bytes, index * 4)).collect() })
}
