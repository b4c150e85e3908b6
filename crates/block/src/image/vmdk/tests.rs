//! vmdk images against QEMU's own tools.

use std::fs;
use std::path::PathBuf;

use super::*;
use crate::testing::{have_qemu, options, qemu_io, read, scratch, tool, write};
use crate::{DiskOptions, open_image};

const MIB: u64 = 1 << 20;

fn create(directory: &tempfile::TempDir, subformat: &str) -> PathBuf {
    let path = directory.path().join(format!("{subformat}.vmdk"));
    let option = format!("subformat={subformat}");
    tool("qemu-img", &["create", "-q", "-f", "vmdk", "-o", &option, path.to_str().unwrap(), "80M"]);
    path
}

#[test]
fn what_we_write_qemu_reads_and_the_other_way_round() {
    if !have_qemu() {
        return;
    }
    let directory = scratch();
    for subformat in ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        let path = create(&directory, subformat);
        qemu_io("vmdk", &path, &["write -P 0x11 1M 100k", "write -P 0x12 79M 64k"]);
        let image = open_image(&options(&path)).unwrap();
        assert_eq!(image.size(), 80 * MIB);
        assert_eq!(read(&*image, MIB, 102_400), vec![0x11; 102_400]);
        assert_eq!(read(&*image, MIB + 102_400, 4096), [0; 4096]);
        write(&*image, MIB + 512, &[0x22; 1024]);
        write(&*image, 40 * MIB - 512, &[0x33; 1024]);
        write(&*image, 80 * MIB - 512, &[0x44; 512]);
        image.write_zeroes(79 * MIB, 4096, true).unwrap();
        image.write_zeroes(50 * MIB, 10 * MIB, false).unwrap();
        image.discard(60 * MIB, MIB).unwrap();
        image.flush().unwrap();
        assert_eq!(
            read(&*image, 40 * MIB - 1024, 2048),
            [[0; 512], [0x33; 512], [0x33; 512], [0; 512]].concat()
        );
        drop(image);
        qemu_io(
            "vmdk",
            &path,
            &[
                "read -P 0x11 1M 512",
                "read -P 0x22 1049088 1024",
                "read -P 0x33 41942528 1024",
                "read -P 0 41943552 4k",
                "read -P 0x44 83885568 512",
                "read -P 0 79M 4k",
                "read -P 0x12 82841600 60k",
            ],
        );
        if subformat == "monolithicSparse" {
            tool("qemu-img", &["check", path.to_str().unwrap()]);
        }
    }
}

#[test]
fn stream_optimized_images_are_read() {
    if !have_qemu() {
        return;
    }
    let directory = scratch();
    let raw = directory.path().join("raw");
    let contents: Vec<u8> =
        (0..5 * MIB + 4096).map(|at| if at / 65536 % 3 == 1 { 0 } else { (at / 100) as u8 }).collect();
    fs::write(&raw, &contents).unwrap();
    let path = directory.path().join("stream.vmdk");
    let (from, to) = (raw.to_str().unwrap(), path.to_str().unwrap());
    tool("qemu-img", &["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", from, to]);
    let Err(error) = open_image(&options(&path)) else { panic!("was opened for writing") };
    assert!(error.to_string().contains("can only be read"), "{error}");
    let image = open_image(&DiskOptions { read_only: true, ..options(&path) }).unwrap();
    assert!(read(&*image, 0, contents.len()) == contents);
    assert_eq!(read(&*image, 65536 - 512, 1024), contents[65536 - 512..65536 + 512]);
}

#[test]
fn what_cannot_be_used_is_refused_in_one_line() {
    let directory = scratch();
    let path = directory.path().join("x.vmdk");
    fs::write(directory.path().join("flat"), [0; 4096]).unwrap();
    let refusal = |descriptor: &str| {
        fs::write(&path, format!("# Disk DescriptorFile\nversion=1\n{descriptor}\n")).unwrap();
        let Err(error) = open_image(&options(&path)) else { panic!("{descriptor}") };
        let line = error.to_string();
        assert!(!line.contains('\n'), "{line}");
        line
    };
    assert!(refusal("").contains("no extents"));
    assert!(refusal("RW x FLAT \"flat\" 0").contains("not one"));
    assert!(refusal("RW 9 FLAT \"flat\" 0").contains("longer than its file"));
    assert!(refusal("RW 8 FLAT \"flat\" 1").contains("longer than its file"));
    assert!(refusal("RW 8 FLAT \"flat\" 18446744073709551615").contains("longer than its file"));
    assert!(refusal("RW 8 FLAT \"none\" 0").contains("does not exist"));
    assert!(refusal("RW 8 FLAT \"x.vmdk\" 0").contains("in use"));
    assert!(refusal("RW 8 SPARSE \"flat\"").contains("does not begin as one"));
    assert!(refusal("RW 8 VMFSSPARSE \"flat\"").contains("VMFSSPARSE"));
    assert!(refusal("RW 18446744073709551615 ZERO").contains("too long"));
    assert!(refusal("parentCID=1234\nRW 8 FLAT \"flat\" 0").contains("parent"));
    assert!(refusal("version=9\nRW 8 FLAT \"flat\" 0").contains("version 9"));
    assert!(refusal("NOACCESS 8").contains("must not be accessed"));
    fs::write(&path, "# Disk DescriptorFile\nversion=1\nRW 8 FLAT \"flat\" 0\nRW 8 ZERO\n").unwrap();
    let image = open_image(&options(&path)).unwrap();
    assert_eq!((image.size(), read(&*image, 3584, 1024)), (8192, vec![0; 1024]));
    write(&*image, 3584, &[1; 512]);
    assert!(
        image.write(4096, &[VolatileSlice::from(&mut [1u8; 512][..])], false).is_err(),
        "zeros cannot be written"
    );
}

/// Whatever header and tables say, a request ends, with an error perhaps.
#[test]
fn lying_extents() {
    if !have_qemu() {
        return;
    }
    let directory = scratch();
    let path = create(&directory, "monolithicSparse");
    qemu_io("vmdk", &path, &["write -P 1 0 1M"]);
    let good = fs::read(&path).unwrap();
    let sector = |at: usize| u64::from_le_bytes(good[at..at + 8].try_into().unwrap()) as usize * 512;
    let directory_at = sector(56);
    let table_at =
        u32::from_le_bytes(good[directory_at..directory_at + 4].try_into().unwrap()) as usize * 512;
    for place in [4, 8, 12, 16, 20, 28, 36, 44, 48, 52, 56, 60, 76, directory_at, table_at, table_at + 2044] {
        for value in [0u32, 1, 2, 7, 0xffff, 0x7fff_ffff, 0x8000_0000, u32::MAX] {
            let mut bytes = good.clone();
            bytes[place..place + 4].copy_from_slice(&value.to_le_bytes());
            fs::write(&path, &bytes).unwrap();
            for read_only in [true, false] {
                let Ok(image) = open_image(&DiskOptions { read_only, ..options(&path) }) else { continue };
                let mut buffer = vec![9; 2 << 20];
                let len = image.size().min(2 << 20) as usize;
                let _ = image.read(0, &[VolatileSlice::from(&mut buffer[..len])]);
                if !read_only && len > 4096 {
                    let _ = image.write(512, &[VolatileSlice::from(&mut buffer[..512])], true);
                    let _ = image.write(len as u64 - 512, &[VolatileSlice::from(&mut buffer[..512])], true);
                }
            }
        }
    }
}
