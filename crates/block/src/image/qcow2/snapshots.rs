//! Snapshots within a qcow2 image: created, applied and deleted on the metadata in the file, while nobody else uses it.
//!
//! A snapshot is an L1 table of its own. What it shares with the disk has a refcount above one and is copied before it is written.

use std::io;

use super::header::{Header, MAX_SNAPSHOTS};
use super::metadata::{COPIED, Metadata, SnapshotEntry};
use crate::image::raw::RawImage;
use crate::image::{Snapshot, SnapshotChange};

/// Entries of the largest L1 table.
const MAX_L1_ENTRIES: usize = (32 << 20) / 8;
/// The longest name.
const MAX_NAME: usize = 255;

/// Makes a change to the snapshots of an image.
pub(super) fn change(file: &RawImage, change: SnapshotChange<'_>) -> io::Result<()> {
    let header = Header::read(file).map_err(|refusal| io::Error::other(format!("{refusal:?}")))?;
    if header.data_file.is_some() {
        return Err(io::Error::other("an image with an external data file cannot have snapshots"));
    }
    let mut metadata = Metadata::new(file, header);
    match change {
        SnapshotChange::Create(name, date) => create(&mut metadata, name, date),
        SnapshotChange::Apply(name) => apply(&mut metadata, name),
        SnapshotChange::Delete(name) => delete(&mut metadata, name),
    }
}

/// The place of a snapshot, by name first, then by id.
fn find(entries: &[SnapshotEntry], name: &str) -> io::Result<usize> {
    let by_name = entries.iter().position(|entry| entry.snapshot.name == name);
    let found = by_name.or_else(|| entries.iter().position(|entry| entry.snapshot.id == name));
    found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("there is no snapshot {name}")))
}

fn create(metadata: &mut Metadata<'_>, name: &str, date: (u32, u32)) -> io::Result<()> {
    let mut entries = metadata.snapshot_entries()?;
    if name.is_empty() || name.len() > MAX_NAME {
        return Err(io::Error::other(format!("the name of a snapshot has 1 to {MAX_NAME} bytes")));
    }
    if entries.iter().any(|entry| entry.snapshot.name == name) {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            format!("there is a snapshot {name} already"),
        ));
    }
    if entries.len() as u32 >= MAX_SNAPSHOTS {
        return Err(io::Error::other("the image has as many snapshots as it can have; delete some"));
    }
    // The refcounts first: a crash from here on wastes space only.
    let l1 = metadata.active_l1()?;
    metadata.count_tree(&l1, 1)?;
    let l1_offset = metadata.allocate(l1.len() as u64 * 8)?;
    metadata.write_refcounts()?;
    // What is shared now is to be copied before it is written.
    metadata.set_copied()?;
    let copy: Vec<u64> = l1.iter().map(|entry| entry & !COPIED).collect();
    metadata.write_table(l1_offset, &copy)?;
    metadata.flush()?;
    let id = entries.iter().filter_map(|entry| entry.snapshot.id.parse::<u64>().ok()).max().unwrap_or(0) + 1;
    entries.push(SnapshotEntry {
        l1_offset,
        l1_entries: metadata.header.l1_entries,
        snapshot: Snapshot {
            id: id.to_string(),
            name: name.to_owned(),
            date,
            size: Some(metadata.header.size),
            machine_state: 0,
        },
        clock: 0,
        // No instruction counter, which QEMU says with all ones.
        more: u64::MAX.to_be_bytes().to_vec(),
        bytes: 0,
    });
    metadata.replace_snapshots(&entries)?;
    metadata.write_refcounts()
}

fn apply(metadata: &mut Metadata<'_>, name: &str) -> io::Result<()> {
    let entries = metadata.snapshot_entries()?;
    let Some(entry) = entries.get(find(&entries, name)?) else { return Ok(()) };
    let l1 = metadata.read_table(entry.l1_offset, u64::from(entry.l1_entries))?;
    let old = metadata.active_l1()?;
    let (old_at, old_entries) = (metadata.header.l1_offset, metadata.header.l1_entries);
    metadata.count_tree(&l1, 1)?;
    let size = entry.snapshot.size.unwrap_or(metadata.header.size);
    let reached = metadata.header.cluster() * metadata.header.l2_entries();
    let mut copy: Vec<u64> = l1.iter().map(|entry| entry & !COPIED).collect();
    // The disk may have grown since, and the snapshot not know its own size.
    let needed = usize::try_from(size.div_ceil(reached)).ok().filter(|entries| *entries <= MAX_L1_ENTRIES);
    let needed = needed
        .ok_or_else(|| io::Error::other("the size of the snapshot is not possible; the image is broken"))?;
    copy.resize(copy.len().max(needed), 0);
    let at = metadata.allocate(copy.len() as u64 * 8)?;
    metadata.write_refcounts()?;
    metadata.write_table(at, &copy)?;
    metadata.flush()?;
    metadata.header.l1_offset = at;
    metadata.header.l1_entries = copy.len() as u32;
    metadata.header.size = size;
    metadata.write_l1_pointer()?;
    metadata.flush()?;
    // The disk as it was is nobody's now.
    metadata.count_tree(&old, -1)?;
    metadata.free(old_at, u64::from(old_entries) * 8)?;
    metadata.write_refcounts()?;
    metadata.set_copied()?;
    metadata.flush()
}

fn delete(metadata: &mut Metadata<'_>, name: &str) -> io::Result<()> {
    let mut entries = metadata.snapshot_entries()?;
    let entry = entries.remove(find(&entries, name)?);
    let l1 = metadata.read_table(entry.l1_offset, u64::from(entry.l1_entries))?;
    metadata.replace_snapshots(&entries)?;
    metadata.count_tree(&l1, -1)?;
    metadata.free(entry.l1_offset, u64::from(entry.l1_entries) * 8)?;
    metadata.write_refcounts()?;
    metadata.set_copied()?;
    metadata.flush()
}
