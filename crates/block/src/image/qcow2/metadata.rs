//! The metadata of a qcow2 image in its file: refcounts, L1 and L2 tables, the snapshot table. For what imago does not do, on an image
//! that nobody else uses meanwhile.
//!
//! Refcounts are loaded as they are needed, changed in memory and written by [`Metadata::write_refcounts`]. Whoever changes something
//! orders the steps so that a crash between two of them leaves refcounts that are too high at worst, which wastes space only.

use std::collections::{BTreeMap, HashMap};
use std::io;

use super::header::{
    DIRTY, Header, INCOMPATIBLE_AT, L1_SIZE_AT, MAX_SNAPSHOTS, REFCOUNT_TABLE_AT, SIZE_AT, SNAPSHOTS_AT,
    be32, be64,
};
use crate::image::raw::RawImage;
use crate::image::{Image, Snapshot};

/// An entry of an L1 or L2 table refers to clusters that nobody else refers to.
pub(super) const COPIED: u64 = 1 << 63;
/// An entry of an L2 table is of compressed data.
const COMPRESSED: u64 = 1 << 62;
/// The offset in entries of L1 tables, and of L2 tables if not compressed.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The offset in entries of the refcount table.
const REFCOUNT_OFFSET: u64 = !0x1ff;
/// Memory for refcounts at most, which is enough for some hundred terabytes.
const MAX_REFCOUNT_BYTES: u64 = 1 << 30;
/// The largest snapshot table (QEMU's limit), and entry of it.
const MAX_SNAPSHOT_TABLE: u64 = 64 << 20;
const MAX_SNAPSHOT_EXTRA: u32 = 1024;

/// An entry of the snapshot table.
#[derive(Clone, Debug)]
pub(super) struct SnapshotEntry {
    pub l1_offset: u64,
    pub l1_entries: u32,
    pub snapshot: Snapshot,
    /// Nanoseconds that the guest had run.
    pub clock: u64,
    /// The rest of what QEMU keeps there, from the extra data's third field on.
    pub more: Vec<u8>,
    /// Bytes it takes in the table.
    pub bytes: u64,
}

/// The metadata of an image.
pub(crate) struct Metadata<'a> {
    file: &'a RawImage,
    pub(super) header: Header,
    /// The refcount table, once it is loaded.
    table: Option<Vec<u64>>,
    /// Refcount blocks by their number.
    blocks: HashMap<u64, RefcountBlock>,
    /// Where new clusters go: the end of the file.
    end: u64,
    /// Clusters whose last reference has gone, since refcounts were last written.
    freed: Vec<u64>,
}

struct RefcountBlock {
    bytes: Vec<u8>,
    changed: bool,
}

fn broken<T>(reason: impl Into<String>) -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::InvalidData, reason.into()))
}

impl<'a> Metadata<'a> {
    /// The metadata in a file, whose header has just been read.
    pub fn new(file: &'a RawImage, header: Header) -> Self {
        let end = file.size().next_multiple_of(header.cluster());
        Metadata { file, header, table: None, blocks: HashMap::new(), end, freed: Vec::new() }
    }

    /// The snapshots.
    pub fn snapshots(&self) -> io::Result<Vec<Snapshot>> {
        Ok(self.snapshot_entries()?.into_iter().map(|entry| entry.snapshot).collect())
    }

    // Tables.

    /// Reads a table of big-endian numbers, which has to be in the file.
    pub(super) fn read_table(&self, offset: u64, entries: u64) -> io::Result<Vec<u64>> {
        let bytes = entries.checked_mul(8).filter(|bytes| *bytes <= 32 << 20);
        let Some(bytes) = bytes.filter(|bytes| self.is_inside(offset, *bytes)) else {
            return broken("a table is not within the file; the image is broken");
        };
        let mut raw = vec![0; bytes as usize];
        self.file.read_bytes(offset, &mut raw)?;
        Ok((0..raw.len() / 8).map(|index| be64(&raw, index * 8)).collect())
    }

    pub(super) fn write_table(&self, offset: u64, table: &[u64]) -> io::Result<()> {
        let raw: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        self.file.write_bytes(offset, &raw)
    }

    fn is_inside(&self, offset: u64, bytes: u64) -> bool {
        offset.is_multiple_of(self.header.cluster())
            && offset >= self.header.cluster()
            && offset.checked_add(bytes).is_some_and(|end| end <= self.end)
    }

    /// The L2 table that an entry of an L1 table refers to, if any.
    pub(super) fn l2_offset(&self, l1_entry: u64) -> Option<u64> {
        Some(l1_entry & OFFSET).filter(|offset| *offset != 0)
    }

    pub(super) fn read_l2(&self, offset: u64) -> io::Result<Vec<u64>> {
        self.read_table(offset, self.header.l2_entries())
    }

    /// The clusters that an entry of an L2 table refers to: the first and how many.
    pub(super) fn data_clusters(&self, l2_entry: u64) -> io::Result<Option<(u64, u64)>> {
        if self.header.data_file.is_some() {
            return Ok(None);
        }
        let bits = self.header.cluster_bits;
        if l2_entry & COMPRESSED == 0 {
            let offset = l2_entry & OFFSET;
            if offset == 0 {
                return Ok(None);
            }
            if !self.is_inside(offset, self.header.cluster()) {
                return broken(format!(
                    "data at {offset:#x} is not within the file; the image is broken or truncated"
                ));
            }
            return Ok(Some((offset >> bits, 1)));
        }
        // The number of sectors after the first is in the bits above the offset.
        let offset_bits = 62 - (bits - 8);
        let offset = l2_entry & ((1 << offset_bits) - 1);
        let sectors = ((l2_entry & !(COPIED | COMPRESSED)) >> offset_bits) + 1;
        let (start, end) = (offset & !511, (offset & !511) + sectors * 512);
        if start < self.header.cluster() || end > self.end {
            return broken(format!(
                "data at {offset:#x} is not within the file; the image is broken or truncated"
            ));
        }
        let first = start >> bits;
        Ok(Some((first, ((end - 1) >> bits) - first + 1)))
    }

    /// Adds `by` to the refcounts of all that an L1 table refers to: its L2 tables and the data behind them. Each way that leads to
    /// a cluster counts, also if two L1 tables share an L2 table.
    pub(super) fn count_tree(&mut self, l1: &[u64], by: i64) -> io::Result<()> {
        for entry in l1 {
            let Some(offset) = self.l2_offset(*entry) else { continue };
            for data in self.read_l2(offset)? {
                if let Some((first, count)) = self.data_clusters(data)? {
                    self.add(first, count, by)?;
                }
            }
            self.add(offset >> self.header.cluster_bits, 1, by)?;
        }
        Ok(())
    }

    /// Sets in the active L1 table and its L2 tables which clusters nobody else refers to, and writes what has changed.
    pub(super) fn set_copied(&mut self) -> io::Result<()> {
        let bits = self.header.cluster_bits;
        let mut l1 = self.active_l1()?;
        for entry in &mut l1 {
            let Some(offset) = self.l2_offset(*entry) else { continue };
            let mut l2 = self.read_l2(offset)?;
            let mut changed = false;
            for data in &mut l2 {
                let alone = match self.data_clusters(*data)? {
                    Some((first, 1)) if *data & COMPRESSED == 0 => self.refcount(first)? == 1,
                    _ => false,
                };
                // An external data file is ours alone.
                let alone = alone || self.header.data_file.is_some() && *data & OFFSET != 0;
                let flagged = if alone { *data | COPIED } else { *data & !COPIED };
                changed |= flagged != *data;
                *data = flagged;
            }
            if changed {
                self.write_table(offset, &l2)?;
            }
            let alone = self.refcount(offset >> bits)? == 1;
            *entry = if alone { *entry | COPIED } else { *entry & !COPIED };
        }
        self.write_table(self.header.l1_offset, &l1)
    }

    pub(super) fn active_l1(&self) -> io::Result<Vec<u64>> {
        self.read_table(self.header.l1_offset, u64::from(self.header.l1_entries))
    }

    // Refcounts.

    /// Refcounts in a block, as a power of two.
    fn block_bits(&self) -> u32 {
        self.header.cluster_bits + 3 - self.header.refcount_order
    }

    fn load_table(&mut self) -> io::Result<&mut Vec<u64>> {
        if self.table.is_none() {
            let entries = (u64::from(self.header.refcount_table_clusters) << self.header.cluster_bits) / 8;
            self.table = Some(self.read_table(self.header.refcount_table_offset, entries)?);
        }
        Ok(self.table.get_or_insert_default())
    }

    /// The refcount block of a cluster, if there is one.
    fn block(&mut self, number: u64) -> io::Result<Option<&mut RefcountBlock>> {
        let entry = self.load_table()?.get(number as usize).copied().unwrap_or(0) & REFCOUNT_OFFSET;
        if entry == 0 {
            return Ok(None);
        }
        if !self.blocks.contains_key(&number) {
            let cluster = self.header.cluster();
            if !self.is_inside(entry, cluster) {
                return broken("a refcount block is not within the file; the image is broken");
            }
            if self.blocks.len() as u64 >= MAX_REFCOUNT_BYTES / cluster {
                return broken("it has too many refcounts");
            }
            let mut bytes = vec![0; cluster as usize];
            self.file.read_bytes(entry, &mut bytes)?;
            self.blocks.insert(number, RefcountBlock { bytes, changed: false });
        }
        Ok(self.blocks.get_mut(&number))
    }

    /// The refcount of a cluster.
    pub(super) fn refcount(&mut self, cluster: u64) -> io::Result<u64> {
        let (bits, order) = (self.block_bits(), self.header.refcount_order);
        let index = cluster & ((1 << bits) - 1);
        Ok(self.block(cluster >> bits)?.map_or(0, |block| read_refcount(&block.bytes, index, order)))
    }

    /// Sets the refcount of a cluster, making a block for it if there is none.
    fn set_refcount(&mut self, cluster: u64, value: u64) -> io::Result<()> {
        let (bits, order) = (self.block_bits(), self.header.refcount_order);
        if order < 6 && value >> (1 << order) != 0 {
            return broken(format!(
                "a cluster would be referred to {value} times, more than its refcounts of {} bits can count; \
                 convert the image with qemu-img convert -o refcount_bits=64",
                1 << order
            ));
        }
        let number = cluster >> bits;
        if self.block(number)?.is_none() {
            self.make_block(number)?;
        }
        let index = cluster & ((1 << bits) - 1);
        let Some(block) = self.block(number)? else { return broken("there is no place for a refcount") };
        write_refcount(&mut block.bytes, index, order, value);
        block.changed = true;
        Ok(())
    }

    /// Adds to the refcounts of clusters.
    pub(super) fn add(&mut self, first: u64, count: u64, by: i64) -> io::Result<()> {
        for cluster in first..first + count {
            let Some(value) = self.refcount(cluster)?.checked_add_signed(by) else {
                return broken("its refcounts are wrong; repair the image with qemu-img check -r all");
            };
            self.set_refcount(cluster, value)?;
            if value == 0 && by < 0 {
                self.freed.push(cluster);
            }
        }
        Ok(())
    }

    /// Makes a refcount block at the end of the file, and a larger refcount table if it has no place for it.
    fn make_block(&mut self, number: u64) -> io::Result<()> {
        let places = self.load_table()?.len() as u64;
        if number >= places {
            self.grow_table(number)?;
        }
        // A larger table may have needed the same block for itself.
        if self.block(number)?.is_some() {
            return Ok(());
        }
        let (cluster, at) = (self.header.cluster(), self.end);
        self.end += cluster;
        self.blocks.insert(number, RefcountBlock { bytes: vec![0; cluster as usize], changed: true });
        if let Some(entry) = self.load_table()?.get_mut(number as usize) {
            *entry = at;
        }
        self.set_refcount(at >> self.header.cluster_bits, 1)
    }

    /// Moves the refcount table to the end of the file, with more room.
    fn grow_table(&mut self, number: u64) -> io::Result<()> {
        let cluster = self.header.cluster();
        let clusters = ((number + 1) * 8).div_ceil(cluster) + 1;
        if clusters * cluster > 8 << 20 {
            return broken("the image is larger than its refcounts can count");
        }
        let (old_at, old_clusters) =
            (self.header.refcount_table_offset, u64::from(self.header.refcount_table_clusters));
        let at = self.end;
        self.end += clusters * cluster;
        self.load_table()?.resize((clusters * cluster / 8) as usize, 0);
        self.header.refcount_table_offset = at;
        self.header.refcount_table_clusters = clusters as u32;
        let bits = self.header.cluster_bits;
        self.add(at >> bits, clusters, 1)?;
        self.add(old_at >> bits, old_clusters, -1)
    }

    /// Clusters at the end of the file for something new: where they begin, in bytes.
    pub(super) fn allocate(&mut self, bytes: u64) -> io::Result<u64> {
        let cluster = self.header.cluster();
        let (at, clusters) = (self.end, bytes.div_ceil(cluster).max(1));
        self.end += clusters * cluster;
        self.add(at >> self.header.cluster_bits, clusters, 1)?;
        Ok(at)
    }

    /// Gives clusters back.
    pub(super) fn free(&mut self, at: u64, bytes: u64) -> io::Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        if !self.is_inside(at, 1) {
            return broken("a table is not within the file; the image is broken");
        }
        self.add(at >> self.header.cluster_bits, bytes.div_ceil(self.header.cluster()), -1)
    }

    /// Writes the refcounts that have changed, for good. A new refcount table is in the header only when it and its blocks are stable.
    pub(super) fn write_refcounts(&mut self) -> io::Result<()> {
        let table = self.load_table()?.clone();
        let mut changed = false;
        for (number, block) in &mut self.blocks {
            if std::mem::take(&mut block.changed)
                && let Some(entry) = table.get(*number as usize)
            {
                self.file.write_bytes(entry & REFCOUNT_OFFSET, &block.bytes)?;
                changed = true;
            }
        }
        if !changed {
            return Ok(());
        }
        self.file.flush()?;
        self.write_table(self.header.refcount_table_offset, &table)?;
        self.file.flush()?;
        let mut pointer = [0; 12];
        pointer[..8].copy_from_slice(&self.header.refcount_table_offset.to_be_bytes());
        pointer[8..].copy_from_slice(&self.header.refcount_table_clusters.to_be_bytes());
        self.file.write_bytes(REFCOUNT_TABLE_AT, &pointer)?;
        self.flush()?;
        self.give_back()
    }

    /// Punches holes into the file where clusters are nobody's any more.
    fn give_back(&mut self) -> io::Result<()> {
        let mut freed = std::mem::take(&mut self.freed);
        freed.sort_unstable();
        let cluster = self.header.cluster();
        for run in freed.chunk_by(|a, b| a + 1 == *b) {
            if let Some(first) = run.first() {
                self.file.discard(first * cluster, run.len() as u64 * cluster)?;
            }
        }
        Ok(())
    }

    /// Makes all stable that was written.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }

    /// Puts the active L1 table and the size of the disk into the header.
    pub(super) fn write_l1_pointer(&self) -> io::Result<()> {
        // size 24, encryption 32, L1 entries 36, L1 offset 40: one write, so that they change together.
        let mut fields = [0; 24];
        self.file.read_bytes(SIZE_AT, &mut fields)?;
        let l1 = (L1_SIZE_AT - SIZE_AT) as usize;
        fields[..8].copy_from_slice(&self.header.size.to_be_bytes());
        fields[l1..l1 + 4].copy_from_slice(&self.header.l1_entries.to_be_bytes());
        fields[l1 + 4..l1 + 12].copy_from_slice(&self.header.l1_offset.to_be_bytes());
        self.file.write_bytes(SIZE_AT, &fields)
    }

    // Repair.

    /// Raises each refcount to the number of references there are, and takes the dirty mark away. Refcounts that are too high stay:
    /// that wastes space, no more.
    pub fn raise_refcounts(&mut self) -> io::Result<()> {
        let mut needed = Needed::default();
        let bits = self.header.cluster_bits;
        let cluster = self.header.cluster();
        let clusters = |at: u64, bytes: u64| (at >> bits, bytes.div_ceil(cluster));
        needed.add((0, 1))?;
        let table_bytes = u64::from(self.header.refcount_table_clusters) * cluster;
        needed.add(clusters(self.header.refcount_table_offset, table_bytes))?;
        for entry in self.load_table()?.clone() {
            let at = entry & REFCOUNT_OFFSET;
            if at != 0 {
                if !self.is_inside(at, cluster) {
                    return broken("a refcount block is not within the file; the image is broken");
                }
                needed.add(clusters(at, cluster))?;
            }
        }
        let snapshots = self.snapshot_entries()?;
        if self.header.snapshots > 0 {
            needed.add(clusters(
                self.header.snapshots_offset,
                snapshots.iter().map(|entry| entry.bytes).sum(),
            ))?;
        }
        let active = (self.header.l1_offset, self.header.l1_entries);
        let trees = snapshots.iter().map(|entry| (entry.l1_offset, entry.l1_entries));
        for (at, entries) in trees.chain([active]) {
            needed.add(clusters(at, u64::from(entries) * 8))?;
            for entry in self.read_table(at, u64::from(entries))? {
                let Some(l2) = self.l2_offset(entry) else { continue };
                for data in self.read_l2(l2)? {
                    if let Some(range) = self.data_clusters(data)? {
                        needed.add(range)?;
                    }
                }
                needed.add(clusters(l2, cluster))?;
            }
        }
        for (base, counts) in needed.chunks {
            for (index, count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
                let number = base * Needed::CHUNK + index as u64;
                if self.refcount(number)? < u64::from(*count) {
                    self.set_refcount(number, u64::from(*count))?;
                }
            }
        }
        self.write_refcounts()?;
        let clean = self.header.incompatible & !DIRTY;
        self.file.write_bytes(INCOMPATIBLE_AT, &clean.to_be_bytes())?;
        self.header.incompatible = clean;
        self.flush()
    }

    // The snapshot table.

    /// Reads the snapshot table.
    pub(super) fn snapshot_entries(&self) -> io::Result<Vec<SnapshotEntry>> {
        let mut at = self.header.snapshots_offset;
        let mut entries = Vec::new();
        for _ in 0..self.header.snapshots.min(MAX_SNAPSHOTS) {
            let mut fixed = [0; 40];
            if at.checked_add(40).is_none_or(|end| end > self.end)
                || at - self.header.snapshots_offset > MAX_SNAPSHOT_TABLE
            {
                return broken("its snapshot table is not within the file; the image is broken");
            }
            self.file.read_bytes(at, &mut fixed)?;
            let len16 = |place: usize| usize::from(be32(&fixed, place - 2) as u16);
            let (id_len, name_len, extra_len) = (len16(12), len16(14), be32(&fixed, 36));
            if extra_len > MAX_SNAPSHOT_EXTRA {
                return broken("an entry of its snapshot table is too long");
            }
            let mut tail = vec![0; extra_len as usize + id_len + name_len];
            self.file.read_bytes(at + 40, &mut tail)?;
            let (extra, names) = tail.split_at(extra_len as usize);
            let (id, name) = names.split_at(id_len);
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            entries.push(SnapshotEntry {
                l1_offset: be64(&fixed, 0),
                l1_entries: be32(&fixed, 8),
                clock: be64(&fixed, 24),
                snapshot: Snapshot {
                    id: text(id),
                    name: text(name),
                    date: (be32(&fixed, 16), be32(&fixed, 20)),
                    size: (extra.len() >= 16).then(|| be64(extra, 8)),
                    machine_state: if extra.len() >= 8 {
                        be64(extra, 0)
                    } else {
                        u64::from(be32(&fixed, 32))
                    },
                },
                more: extra.get(16..).unwrap_or_default().to_vec(),
                bytes: (40 + tail.len() as u64).next_multiple_of(8),
            });
            at += (40 + tail.len() as u64).next_multiple_of(8);
        }
        Ok(entries)
    }

    /// Writes another snapshot table in a new place, and puts it into the header, each for good. The clusters of the old one are freed,
    /// in memory only.
    pub(super) fn replace_snapshots(&mut self, entries: &[SnapshotEntry]) -> io::Result<()> {
        let old = self.snapshot_entries()?;
        let (old_at, old_bytes): (u64, u64) =
            (self.header.snapshots_offset, old.iter().map(|entry| entry.bytes).sum());
        let table: Vec<u8> = entries.iter().flat_map(encode).collect();
        self.header.snapshots_offset = if table.is_empty() {
            0
        } else {
            let at = self.allocate(table.len() as u64)?;
            self.write_refcounts()?;
            self.file.write_bytes(at, &table)?;
            at
        };
        self.header.snapshots = entries.len() as u32;
        self.flush()?;
        let mut pointer = [0; 12];
        pointer[..4].copy_from_slice(&self.header.snapshots.to_be_bytes());
        pointer[4..].copy_from_slice(&self.header.snapshots_offset.to_be_bytes());
        self.file.write_bytes(SNAPSHOTS_AT, &pointer)?;
        self.flush()?;
        self.free(old_at, old_bytes)
    }
}

/// An entry of the snapshot table as it is in the file.
fn encode(entry: &SnapshotEntry) -> Vec<u8> {
    let SnapshotEntry { l1_offset, l1_entries, snapshot, clock, more, .. } = entry;
    let size = snapshot.size.unwrap_or(0);
    let extra_len = if snapshot.size.is_some() { 16 + more.len() } else { 8 };
    let mut bytes = Vec::new();
    bytes.extend(l1_offset.to_be_bytes());
    bytes.extend(l1_entries.to_be_bytes());
    bytes.extend((snapshot.id.len() as u16).to_be_bytes());
    bytes.extend((snapshot.name.len() as u16).to_be_bytes());
    bytes.extend(snapshot.date.0.to_be_bytes());
    bytes.extend(snapshot.date.1.to_be_bytes());
    bytes.extend(clock.to_be_bytes());
    bytes.extend(u32::try_from(snapshot.machine_state).unwrap_or(0).to_be_bytes());
    bytes.extend((extra_len as u32).to_be_bytes());
    bytes.extend(snapshot.machine_state.to_be_bytes());
    if snapshot.size.is_some() {
        bytes.extend(size.to_be_bytes());
        bytes.extend(more);
    }
    bytes.extend(snapshot.id.bytes());
    bytes.extend(snapshot.name.bytes());
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

/// How often clusters are referred to.
#[derive(Default)]
struct Needed {
    chunks: BTreeMap<u64, Vec<u32>>,
}

impl Needed {
    const CHUNK: u64 = 1 << 15;

    fn add(&mut self, (first, count): (u64, u64)) -> io::Result<()> {
        for cluster in first..first + count {
            if self.chunks.len() as u64 > MAX_REFCOUNT_BYTES / (4 * Self::CHUNK) {
                return broken("it has too many clusters to check; do it with qemu-img check -r all");
            }
            let chunk =
                self.chunks.entry(cluster / Self::CHUNK).or_insert_with(|| vec![0; Self::CHUNK as usize]);
            if let Some(counter) = chunk.get_mut((cluster % Self::CHUNK) as usize) {
                *counter = counter.saturating_add(1);
            }
        }
        Ok(())
    }
}

/// The refcount at an index of a block; those of less than a byte begin at its low bits.
fn read_refcount(block: &[u8], index: u64, order: u32) -> u64 {
    if order < 3 {
        let (per_byte, width) = (8 >> order, 1 << order);
        let byte = block.get((index / per_byte) as usize).copied().unwrap_or(0);
        return u64::from(byte >> (index % per_byte * width)) & ((1 << width) - 1);
    }
    let bytes = 1usize << (order - 3);
    let at = index as usize * bytes;
    block.get(at..at + bytes).unwrap_or_default().iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn write_refcount(block: &mut [u8], index: u64, order: u32, value: u64) {
    if order < 3 {
        let (per_byte, width) = (8 >> order, 1u64 << order);
        let shift = index % per_byte * width;
        if let Some(byte) = block.get_mut((index / per_byte) as usize) {
            let mask = ((1u64 << width) - 1) << shift;
            *byte = ((u64::from(*byte) & !mask) | (value << shift)) as u8;
        }
        return;
    }
    let bytes = 1usize << (order - 3);
    let at = index as usize * bytes;
    if let Some(place) = block.get_mut(at..at + bytes) {
        place.copy_from_slice(&value.to_be_bytes()[8 - bytes..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_of_every_width_do_not_touch_their_neighbours() {
        for order in 0..=6 {
            let mut block = vec![0xff; 64];
            let most = if order == 6 { u64::MAX } else { (1 << (1u32 << order)) - 1 };
            for value in [0, 1 & most, most] {
                write_refcount(&mut block, 3, order, value);
                let read: Vec<_> = (2..5).map(|index| read_refcount(&block, index, order)).collect();
                assert_eq!(read, [most, value, most], "order {order}");
            }
        }
    }
}
