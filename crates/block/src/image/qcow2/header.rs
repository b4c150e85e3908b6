//! The header of a qcow2 image: read and held against the specification (`docs/interop/qcow2` of QEMU) before anything else looks at
//! the image. Everything in it may be a lie.

use crate::image::Image;
use crate::image::fault::{Fault, invalid, unsupported};
use crate::image::raw::RawImage;

/// "QFI\xfb".
pub(crate) const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes of a version 2 header, and the least of version 3.
const V2_BYTES: u32 = 72;
const V3_BYTES: u32 = 104;
/// Cluster sizes, as powers of two: from 512 bytes (specification) to 2 MiB (QEMU's limit, and everybody's).
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// The largest tables we load into memory (QEMU's limits).
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Snapshots at most (QEMU's limit).
pub(crate) const MAX_SNAPSHOTS: u32 = 65536;
/// The longest name of a backing file.
const MAX_BACKING_BYTES: u32 = 1023;
/// Header extensions at most: more than there are kinds, with room.
const MAX_EXTENSIONS: usize = 64;

/// Bits of `incompatible`.
pub(crate) const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

/// Where fields are that we write.
pub(crate) const SIZE_AT: u64 = 24;
pub(crate) const L1_SIZE_AT: u64 = 36;
pub(crate) const REFCOUNT_TABLE_AT: u64 = 48;
pub(crate) const SNAPSHOTS_AT: u64 = 60;
pub(crate) const INCOMPATIBLE_AT: u64 = 72;

/// Kinds of header extensions.
const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;

/// What stands in the header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub version: u32,
    pub cluster_bits: u32,
    /// Bytes of the disk.
    pub size: u64,
    pub l1_entries: u32,
    pub l1_offset: u64,
    pub refcount_table_offset: u64,
    pub refcount_table_clusters: u32,
    pub refcount_order: u32,
    pub snapshots: u32,
    pub snapshots_offset: u64,
    pub incompatible: u64,
    /// Name and format of the backing file.
    pub backing: Option<String>,
    pub backing_format: Option<String>,
    /// The contents are in another file, perhaps of this name.
    pub data_file: Option<Option<String>>,
}

/// A big-endian number at a place within `bytes`, which is there.
pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
}

/// As [`be32`], with 64 bits.
pub(crate) fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
}

impl Header {
    /// Reads and checks it.
    pub fn read(file: &RawImage) -> Result<Header, Fault> {
        let file_bytes = file.size();
        if file_bytes < u64::from(V2_BYTES) {
            return invalid("the file ends within the header");
        }
        let mut start = [0; V3_BYTES as usize];
        file.read_bytes(0, &mut start)?;
        if start[..4] != MAGIC {
            return invalid("it does not begin with the magic number");
        }
        let version = be32(&start, 4);
        if !(2..=3).contains(&version) {
            return unsupported(format!(
                "qcow2 version {version} is not known; convert the image with qemu-img convert"
            ));
        }
        let cluster_bits = be32(&start, 20);
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return invalid(format!("clusters of 2^{cluster_bits} bytes are not possible"));
        }
        let v3 = version == 3;
        let mut header = Header {
            version,
            cluster_bits,
            size: be64(&start, SIZE_AT as usize),
            l1_entries: be32(&start, L1_SIZE_AT as usize),
            l1_offset: be64(&start, 40),
            refcount_table_offset: be64(&start, REFCOUNT_TABLE_AT as usize),
            refcount_table_clusters: be32(&start, 56),
            refcount_order: if v3 { be32(&start, 96) } else { 4 },
            snapshots: be32(&start, SNAPSHOTS_AT as usize),
            snapshots_offset: be64(&start, 64),
            incompatible: if v3 { be64(&start, INCOMPATIBLE_AT as usize) } else { 0 },
            backing: None,
            backing_format: None,
            data_file: None,
        };
        let header_bytes = if v3 { be32(&start, 100) } else { V2_BYTES };
        let first_cluster = header.cluster().min(file_bytes);
        if v3 && (header_bytes < V3_BYTES || u64::from(header_bytes) > first_cluster || header_bytes % 8 != 0)
        {
            return invalid(format!("a header of {header_bytes} bytes is not possible"));
        }
        header.check_features(be32(&start, 32))?;
        header.check_tables(file_bytes)?;
        let mut cluster = vec![0; first_cluster as usize];
        file.read_bytes(0, &mut cluster)?;
        let extensions_end = header.read_backing(&cluster, be64(&start, 8), be32(&start, 16))?;
        header.read_extensions(&cluster[..extensions_end], header_bytes as usize)?;
        if header.incompatible & DATA_FILE != 0 {
            if header.snapshots > 0 {
                return invalid("an image with an external data file cannot have snapshots");
            }
            header.data_file.get_or_insert(None);
        } else {
            header.data_file = None;
        }
        Ok(header)
    }

    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of an L2 table, which is one cluster.
    pub fn l2_entries(&self) -> u64 {
        self.cluster() / 8
    }

    fn check_features(&self, encryption: u32) -> Result<(), Fault> {
        match encryption {
            0 => {}
            1 => {
                return unsupported(
                    "it is encrypted with the old AES method, which is not secure; convert it with qemu-img convert",
                );
            }
            2 => return unsupported("it is encrypted (LUKS); decrypt it with qemu-img convert"),
            other => return invalid(format!("encryption method {other} does not exist")),
        }
        if self.incompatible & CORRUPT != 0 {
            return unsupported("it is marked corrupt; have it repaired with qemu-img check -r all");
        }
        if self.incompatible & COMPRESSION != 0 {
            return unsupported(
                "its clusters are not compressed with zlib; convert it with qemu-img convert -o compression_type=zlib",
            );
        }
        if self.incompatible & EXTENDED_L2 != 0 {
            return unsupported(
                "it has extended L2 entries (subclusters); convert it with qemu-img convert -o extended_l2=off",
            );
        }
        let unknown = self.incompatible & !(DIRTY | DATA_FILE);
        if unknown != 0 {
            return unsupported(format!(
                "it uses features that are not known (incompatible features {unknown:#x})"
            ));
        }
        Ok(())
    }

    fn check_tables(&self, file_bytes: u64) -> Result<(), Fault> {
        let cluster = self.cluster();
        let file_end = file_bytes.next_multiple_of(cluster);
        // A table lies in the file if it has entries at all.
        let inside = |offset: u64, bytes: u64| {
            bytes == 0 || offset >= cluster && offset.checked_add(bytes).is_some_and(|end| end <= file_end)
        };
        if self.refcount_order > 6 {
            return invalid(format!("refcounts of 2^{} bits are not possible", self.refcount_order));
        }
        if self.size > 1 << 62 {
            return invalid(format!("a disk of {} bytes is not possible", self.size));
        }
        let l1_bytes = u64::from(self.l1_entries) * 8;
        if l1_bytes > MAX_L1_BYTES {
            return invalid(format!(
                "its L1 table has {} entries, more than an image can have",
                self.l1_entries
            ));
        }
        if u64::from(self.l1_entries) * self.l2_entries() < self.size.div_ceil(cluster) {
            return invalid("its L1 table is too small for the disk");
        }
        if !self.l1_offset.is_multiple_of(cluster) || !inside(self.l1_offset, l1_bytes) {
            return invalid("its L1 table is not within the file; the file may be truncated");
        }
        let refcount_bytes = u64::from(self.refcount_table_clusters) * cluster;
        if refcount_bytes == 0 || refcount_bytes > MAX_REFCOUNT_TABLE_BYTES.max(cluster) {
            return invalid(format!("a refcount table of {refcount_bytes} bytes is not possible"));
        }
        if !self.refcount_table_offset.is_multiple_of(cluster)
            || !inside(self.refcount_table_offset, refcount_bytes)
        {
            return invalid("its refcount table is not within the file; the file may be truncated");
        }
        if self.snapshots > MAX_SNAPSHOTS {
            return invalid(format!("{} snapshots are more than an image can have", self.snapshots));
        }
        if self.snapshots > 0
            && (!self.snapshots_offset.is_multiple_of(cluster) || !inside(self.snapshots_offset, 1))
        {
            return invalid("its snapshot table is not within the file");
        }
        Ok(())
    }

    /// Reads the name of the backing file; returns where the header extensions end at the latest.
    fn read_backing(&mut self, cluster: &[u8], offset: u64, len: u32) -> Result<usize, Fault> {
        if offset == 0 {
            return Ok(cluster.len());
        }
        let name = (len <= MAX_BACKING_BYTES)
            .then(|| usize::try_from(offset).ok())
            .flatten()
            .and_then(|at| cluster.get(at..at.checked_add(len as usize)?));
        let Some(name) = name else {
            return invalid("the name of its backing file is not within the header");
        };
        match std::str::from_utf8(name) {
            Ok(name) if !name.is_empty() && !name.contains('\0') => self.backing = Some(name.to_owned()),
            _ => return invalid("the name of its backing file is not text"),
        }
        Ok(offset as usize)
    }

    fn read_extensions(&mut self, header: &[u8], mut at: usize) -> Result<(), Fault> {
        for _ in 0..MAX_EXTENSIONS {
            // Version 2 images of old have none, and the name of the backing file follows at once.
            let Some(head) = header.get(at..at + 8) else { return Ok(()) };
            let (kind, len) = (be32(head, 0), be32(head, 4) as usize);
            if kind == EXTENSION_END {
                return Ok(());
            }
            let data = at.checked_add(8).and_then(|start| header.get(start..start.checked_add(len)?));
            let Some(data) = data else { return invalid("a header extension is not within the header") };
            let text = || match std::str::from_utf8(data) {
                Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
                _ => Err(Fault::Invalid("a name in a header extension is not text".into())),
            };
            match kind {
                EXTENSION_BACKING_FORMAT => self.backing_format = Some(text()?),
                EXTENSION_DATA_FILE => self.data_file = Some(Some(text()?)),
                _ => {}
            }
            at += 8 + len.next_multiple_of(8);
        }
        invalid("it has more header extensions than there are kinds")
    }
}
