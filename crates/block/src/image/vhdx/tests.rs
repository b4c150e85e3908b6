//! vhdx images against QEMU's own tools, which know no differencing ones: those are made here from its dynamic ones.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::layout::{FILE_PARAMETERS, PARENT_LOCATOR, VHDX_LOCATOR, checksum, guid_at, le16, le32};
use super::*;
use crate::testing::{have_qemu, options, qemu_io, read, scratch, tool, write};
use crate::{DiskOptions, open_image};

fn create(directory: &tempfile::TempDir, name: &str, option: &str, size: &str) -> PathBuf {
    let path = directory.path().join(name);
    tool("qemu-img", &["create", "-q", "-f", "vhdx", "-o", option, path.to_str().unwrap(), size]);
    path
}

fn open(path: &Path) -> Box<dyn Image> {
    open_image(&options(path)).unwrap()
}

#[test]
fn what_we_write_qemu_reads_and_the_other_way_round() {
    if !have_qemu() {
        return;
    }
    let directory = scratch();
    for (index, option) in ["block_size=1M", "block_size=8M", "subformat=fixed,block_size=2M", "log_size=2M"]
        .into_iter()
        .enumerate()
    {
        let path = create(&directory, &format!("{index}.vhdx"), option, "64M");
        qemu_io("vhdx", &path, &["write -P 0x11 1M 100k", "write -P 0x12 63M 1M"]);
        let image = open(&path);
        assert_eq!((image.size(), image.sectors()), (64 * MIB, (512, 512)), "{option}");
        assert_eq!(read(&*image, MIB, 102_400), vec![0x11; 102_400]);
        assert_eq!(read(&*image, MIB + 102_400, 4096), [0; 4096]);
        write(&*image, MIB + 512, &[0x22; 1024]);
        write(&*image, 40 * MIB - 512, &[0x33; 1024]);
        write(&*image, 64 * MIB - 512, &[0x44; 512]);
        image.write_zeroes(63 * MIB, 4096, true).unwrap();
        image.write_zeroes(50 * MIB + 512, 3 * MIB, false).unwrap();
        image.discard(30 * MIB, MIB).unwrap();
        image.flush().unwrap();
        write(&*image, 20 * MIB, &[0x55; 512]);
        assert_eq!(
            read(&*image, 40 * MIB - 1024, 2048),
            [[0; 512], [0x33; 512], [0x33; 512], [0; 512]].concat()
        );
        drop(image);
        qemu_io(
            "vhdx",
            &path,
            &[
                "read -P 0x11 1M 512",
                "read -P 0x22 1049088 1024",
                "read -P 0x33 41942528 1024",
                "read -P 0 41943552 4k",
                "read -P 0x44 67108352 512",
                "read -P 0 63M 4k",
                "read -P 0x12 66064384 512k",
                "read -P 0x55 20M 512",
            ],
        );
        tool("qemu-img", &["check", path.to_str().unwrap()]);
        drop(open_image(&DiskOptions { read_only: true, ..options(&path) }).unwrap());
    }
}

/// More blocks than one chunk has, so that the entries of sector bitmaps are between those of blocks.
#[test]
fn large_disks() {
    if !have_qemu() {
        return;
    }
    let directory = scratch();
    let path = create(&directory, "large.vhdx", "block_size=256M", "9T");
    let image = open(&path);
    for terabyte in [0u64, 1, 4, 8] {
        write(&*image, (terabyte << 40) + 4096, &[terabyte as u8 + 1; 512]);
    }
    drop(image);
    qemu_io(
        "vhdx",
        &path,
        &[
            "read -P 1 4096 512",
            "read -P 2 1099511631872 512",
            "read -P 5 4398046515200 512",
            "read -P 9 8796093026304 512",
        ],
    );
}

/// The metadata item of an image: where its entry and its contents are.
fn metadata_item(bytes: &[u8], id: Guid) -> Option<(usize, usize)> {
    let region = (0..le32(bytes, (192 << 10) + 8) as usize)
        .map(|index| (192 << 10) + 16 + index * 32)
        .map(|entry| le64(bytes, entry + 16) as usize)
        .find(|at| bytes[*at..].starts_with(b"metadata"))?;
    (0..usize::from(le16(bytes, region + 10)))
        .map(|index| region + 32 + index * 32)
        .find(|entry| guid_at(bytes, *entry) == id)
        .map(|entry| (entry, region + le32(bytes, entry + 16) as usize))
}

fn region_of(bytes: &[u8], metadata: bool) -> usize {
    (0..2)
        .map(|index| le64(bytes, (192 << 10) + 16 + index * 32 + 16) as usize)
        .find(|at| bytes[*at..].starts_with(b"metadata") == metadata)
        .unwrap()
}

fn guid_text(guid: Guid) -> String {
    let mut bytes = guid;
    bytes[..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02X}")).collect();
    let part = |range: std::ops::Range<usize>| hex[range].concat();
    format!("{{{}-{}-{}-{}-{}}}", part(0..4), part(4..6), part(6..8), part(8..10), part(10..16))
}

/// Makes a dynamic image a child of another.
fn adopt(child: &Path, parent: &Path, name: &str) {
    let mut bytes = fs::read(child).unwrap();
    let parent = RawImage::new(fs::File::open(parent).unwrap(), crate::CacheMode::Writeback).unwrap();
    let Ok(header) = Header::read(&parent) else { panic!("the parent has no header") };
    let pairs = [("parent_linkage", guid_text(header.data_write_guid())), ("relative_path", name.to_owned())];
    let mut item = VHDX_LOCATOR.to_vec();
    item.extend([0, 0, pairs.len() as u8, 0]);
    let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<_>>();
    let mut data = Vec::new();
    let data_at = 20 + 12 * pairs.len();
    for (key, value) in &pairs {
        let (key, value) = (utf16(key), utf16(value));
        item.extend(((data_at + data.len()) as u32).to_le_bytes());
        item.extend(((data_at + data.len() + key.len()) as u32).to_le_bytes());
        item.extend((key.len() as u16).to_le_bytes());
        item.extend((value.len() as u16).to_le_bytes());
        data.extend(key);
        data.extend(value);
    }
    item.extend(data);
    let region = region_of(&bytes, true);
    let (_, parameters) = metadata_item(&bytes, FILE_PARAMETERS).unwrap();
    bytes[parameters + 4] |= 2;
    let count = usize::from(le16(&bytes, region + 10));
    bytes[region + 10] = count as u8 + 1;
    let entry = region + 32 + count * 32;
    bytes[entry..entry + 16].copy_from_slice(&PARENT_LOCATOR);
    bytes[entry + 16..entry + 20].copy_from_slice(&(512u32 << 10).to_le_bytes());
    bytes[entry + 20..entry + 24].copy_from_slice(&(item.len() as u32).to_le_bytes());
    bytes[entry + 24] = 4;
    bytes[region + (512 << 10)..][..item.len()].copy_from_slice(&item);
    fs::write(child, bytes).unwrap();
}

#[test]
fn differencing_images() {
    if !have_qemu() {
        return;
    }
    let directory = scratch();
    let parent = create(&directory, "parent.vhdx", "block_size=1M", "8M");
    qemu_io("vhdx", &parent, &["write -P 1 0 4M"]);
    let child = create(&directory, "child.vhdx", "block_size=1M,block_state_zero=off", "9M");
    adopt(&child, &parent, ".\\parent.vhdx");
    // Block 1 is partly here: its sectors 1, 2 and 8.
    let mut bytes = fs::read(&child).unwrap();
    let bat = region_of(&bytes, false);
    let (data, bitmap) =
        (bytes.len().next_multiple_of(1 << 20), (bytes.len() + (1 << 20)).next_multiple_of(1 << 20));
    bytes.resize(bitmap + (1 << 20), 0);
    bytes[data..data + (1 << 20)].fill(2);
    // 4096 blocks of a mebibyte share a bitmap.
    bytes[bat + 8..bat + 16].copy_from_slice(&(data as u64 | PARTIALLY_PRESENT).to_le_bytes());
    bytes[bat + 4096 * 8..bat + 4096 * 8 + 8].copy_from_slice(&(bitmap as u64 | FULLY_PRESENT).to_le_bytes());
    bytes[bitmap + 2048 / 8] = 0b110;
    bytes[bitmap + 2048 / 8 + 1] = 1;
    fs::write(&child, bytes).unwrap();
    let before = fs::read(&parent).unwrap();
    let image = open(&child);
    let sectors =
        |image: &dyn Image| read(image, MIB, 10 * 512).iter().step_by(512).copied().collect::<Vec<_>>();
    assert_eq!(sectors(&*image), [1, 2, 2, 1, 1, 1, 1, 1, 2, 1]);
    assert_eq!(read(&*image, 0, 512), [1; 512]);
    assert_eq!(read(&*image, 8 * MIB - 512, 1024), [0; 1024], "beyond the end of the parent");
    write(&*image, MIB + 512 * 4, &[3; 512]);
    assert_eq!(sectors(&*image), [1, 2, 2, 1, 3, 1, 1, 1, 2, 1]);
    write(&*image, 512, &[4; 512]);
    assert_eq!(read(&*image, 0, 1536), [[1; 512], [4; 512], [1; 512]].concat());
    image.write_zeroes(2 * MIB, MIB, true).unwrap();
    image.write_zeroes(3 * MIB, 512, true).unwrap();
    drop(image);
    let image = open_image(&DiskOptions { read_only: true, ..options(&child) }).unwrap();
    assert_eq!(sectors(&*image), [1, 2, 2, 1, 3, 1, 1, 1, 2, 1]);
    assert_eq!(read(&*image, 0, 1536), [[1; 512], [4; 512], [1; 512]].concat());
    assert_eq!(read(&*image, 2 * MIB, MIB as usize), vec![0; MIB as usize]);
    assert_eq!(read(&*image, 3 * MIB, 1024), [[0; 512], [1; 512]].concat());
    drop(image);
    assert!(fs::read(&parent).unwrap() == before);
    // A parent that is not what it was.
    let image = open(&parent);
    write(&*image, 0, &[9; 512]);
    drop(image);
    let Err(error) = open_image(&options(&child)) else { panic!("was opened") };
    assert!(error.to_string().contains("has been changed"), "{error}");
}

/// An entry of a log that writes a page of the file.
fn log_entry(guid: Guid, sequence: u64, tail: u32, place: u64, page: &[u8], file_bytes: u64) -> Vec<u8> {
    let mut entry = vec![0; 8192];
    entry[..4].copy_from_slice(b"loge");
    entry[8..12].copy_from_slice(&8192u32.to_le_bytes());
    entry[12..16].copy_from_slice(&tail.to_le_bytes());
    entry[16..24].copy_from_slice(&sequence.to_le_bytes());
    entry[24] = 1;
    entry[32..48].copy_from_slice(&guid);
    entry[48..56].copy_from_slice(&file_bytes.to_le_bytes());
    entry[56..64].copy_from_slice(&file_bytes.to_le_bytes());
    entry[64..68].copy_from_slice(b"desc");
    entry[68..72].copy_from_slice(&page[4092..]);
    entry[72..80].copy_from_slice(&page[..8]);
    entry[80..88].copy_from_slice(&place.to_le_bytes());
    entry[88..96].copy_from_slice(&sequence.to_le_bytes());
    entry[4096..8192].copy_from_slice(page);
    entry[4096..4100].copy_from_slice(b"data");
    entry[4100..4104].copy_from_slice(&((sequence >> 32) as u32).to_le_bytes());
    entry[8188..].copy_from_slice(&(sequence as u32).to_le_bytes());
    let sum = checksum(&entry, 4);
    entry[4..8].copy_from_slice(&sum.to_le_bytes());
    entry
}

#[test]
fn a_log_is_replayed_as_qemu_does() {
    if !have_qemu() {
        return;
    }
    let directory = scratch();
    let path = create(&directory, "log.vhdx", "block_size=1M", "8M");
    qemu_io("vhdx", &path, &["write -P 7 0 1M"]);
    let mut bytes = fs::read(&path).unwrap();
    // What the BAT was is in the log only.
    let bat = region_of(&bytes, false);
    let page = bytes[bat..bat + 4096].to_vec();
    bytes[bat..bat + 4096].fill(0);
    let header =
        if le64(&bytes, (64 << 10) + 8) > le64(&bytes, (128 << 10) + 8) { 64 << 10 } else { 128 << 10 };
    let log = le64(&bytes, header + 72) as usize;
    let log_len = le32(&bytes, header + 68) as usize;
    let guid = [5; 16];
    bytes[header + 48..header + 64].copy_from_slice(&guid);
    let sum = checksum(&bytes[header..header + 4096], 4);
    bytes[header + 4..header + 8].copy_from_slice(&sum.to_le_bytes());
    bytes[log..log + log_len].fill(0);
    let len = bytes.len() as u64;
    // An old entry that is done with, one that counts and goes around the end of the log, and another that counts.
    let tail = log_len as u32 - 4096;
    bytes[log + 65536..][..8192].copy_from_slice(&log_entry(guid, 3, 65536, bat as u64, &[0xee; 4096], len));
    let first = log_entry(guid, 9, tail, bat as u64, &[0xdd; 4096], len);
    bytes[log + tail as usize..][..4096].copy_from_slice(&first[..4096]);
    bytes[log..log + 4096].copy_from_slice(&first[4096..]);
    bytes[log + 4096..][..8192].copy_from_slice(&log_entry(guid, 10, tail, bat as u64, &page, len));
    fs::write(&path, &bytes).unwrap();
    let theirs = directory.path().join("theirs.vhdx");
    fs::copy(&path, &theirs).unwrap();
    let image = open_image(&DiskOptions { read_only: true, ..options(&path) }).unwrap();
    assert_eq!(read(&*image, 0, 1 << 20), vec![7; 1 << 20]);
    drop(image);
    assert!(fs::read(&path).unwrap() == bytes, "reading changes nothing");
    let image = open(&path);
    assert_eq!(read(&*image, 0, 1 << 20), vec![7; 1 << 20]);
    write(&*image, 2 * MIB, &[8; 512]);
    drop(image);
    qemu_io("vhdx", &path, &["read -P 7 0 1M", "read -P 8 2M 512"]);
    tool("qemu-img", &["check", "-r", "all", theirs.to_str().unwrap()]);
    qemu_io("vhdx", &theirs, &["read -P 7 0 1M"]);
    let refusal = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let Err(error) = open_image(&options(&path)) else { panic!("was opened") };
        error.to_string()
    };
    // Entries that are damaged, and no others.
    let mut damaged = bytes.clone();
    damaged[log + 65536..][..4].fill(0);
    damaged[log + 5000] ^= 1;
    damaged[log + tail as usize + 8] ^= 1;
    assert!(refusal(&damaged).contains("nothing to replay"));
    // The file was longer when the entry was written.
    let mut truncated = bytes.clone();
    let entry = log_entry(guid, 10, tail, bat as u64, &page, len + 4096);
    truncated[log + 4096..][..8192].copy_from_slice(&entry);
    assert!(refusal(&truncated).contains("truncated"));
}

/// Whatever the tables say, opening or a request fails, and that is all.
#[test]
fn lying_tables() {
    if !have_qemu() {
        return;
    }
    let directory = scratch();
    let path = create(&directory, "l.vhdx", "block_size=1M", "8M");
    qemu_io("vhdx", &path, &["write -P 1 0 2M"]);
    let good = fs::read(&path).unwrap();
    let (bat, metadata) = (region_of(&good, false), region_of(&good, true));
    let header = 64 << 10;
    let regions = 192 << 10;
    let mut places = vec![bat, bat + 4, bat + 8, metadata, metadata + 8, metadata + (64 << 10)];
    places.extend((0..4 * 8).map(|word| metadata + 32 + word * 4 + 16));
    places.extend((0..8).map(|word| metadata + (64 << 10) + word * 4));
    places.extend((2..20).map(|word| header + word * 4));
    places.extend((2..22).map(|word| regions + word * 4));
    let file = fs::File::options().write(true).open(&path).unwrap();
    for place in places {
        for value in [0u32, 1, 7, 0x10_0006, 0xffff_ffff, 0x8000_0007] {
            let mut bytes = good.clone();
            bytes[place..place + 4].copy_from_slice(&value.to_le_bytes());
            // With checksums that are right, and one copy only.
            for (at, len) in [(header, 4096), (regions, 65536)] {
                let sum = checksum(&bytes[at..at + len], 4);
                bytes[at + 4..at + 8].copy_from_slice(&sum.to_le_bytes());
            }
            bytes[128 << 10] = 0;
            bytes[256 << 10] = 0;
            file.set_len(bytes.len() as u64).unwrap();
            file.write_all_at(&bytes, 0).unwrap();
            for read_only in [true, false] {
                let Ok(image) = open_image(&DiskOptions { read_only, ..options(&path) }) else { continue };
                let mut buffer = vec![9; 4 << 20];
                let len = image.size().min(4 << 20) as usize / 4096 * 4096;
                let _ = image.read(0, &[VolatileSlice::from(&mut buffer[..len])]);
                if !read_only && len >= 4096 {
                    let _ = image.write(0, &[VolatileSlice::from(&mut buffer[..4096])], true);
                    let _ = image.write(len as u64 - 4096, &[VolatileSlice::from(&mut buffer[..4096])], true);
                    let _ = image.write_zeroes(0, 4096, true);
                }
            }
        }
    }
    for len in [0, 7, 65536, 200_000, 1 << 20, 2 << 20, 3 << 20] {
        fs::write(&path, &good[..len]).unwrap();
        let format = Some(crate::Format::Vhdx);
        assert!(open_image(&DiskOptions { format, ..options(&path) }).is_err(), "{len}");
    }
}
