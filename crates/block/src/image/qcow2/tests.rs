//! qcow2 images against QEMU's own tools.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::*;
use crate::testing::{
    check, disk_read, disk_write, have_qemu, open, options, qemu_io, read, scratch, tool, write,
};
use crate::{DiskOptions, Image, SnapshotChange, open_image};

const MIB: u64 = 1 << 20;

struct Bed {
    directory: tempfile::TempDir,
}

impl Bed {
    fn new() -> Self {
        Bed { directory: scratch() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn create(&self, name: &str, arguments: &[&str]) -> PathBuf {
        let path = self.path(name);
        let mut all = vec!["create", "-q"];
        all.extend(arguments);
        all.insert(
            all.len() - usize::from(arguments.last().is_some_and(|a| a.ends_with('M'))),
            path.to_str().unwrap(),
        );
        tool("qemu-img", &all);
        path
    }
}

fn writable(path: &Path) -> Box<dyn Image> {
    open_image(&options(path)).unwrap()
}

fn readable(path: &Path) -> Box<dyn Image> {
    open_image(&DiskOptions { read_only: true, ..options(path) }).unwrap()
}

#[test]
fn what_we_write_qemu_reads_and_the_other_way_round() {
    if !have_qemu() {
        return;
    }
    let bed = Bed::new();
    for extra in [
        "cluster_size=65536",
        "cluster_size=512",
        "cluster_size=2M",
        "lazy_refcounts=on",
        "compat=0.10",
        "refcount_bits=1",
        "refcount_bits=64",
        "preallocation=metadata",
    ] {
        let path = bed.create(&format!("{extra}.qcow2"), &["-f", "qcow2", "-o", extra, "32M"]);
        qemu_io("qcow2", &path, &["write -P 0x11 1M 100k"]);
        let image = writable(&path);
        assert_eq!(image.size(), 32 * MIB);
        assert_eq!(read(&*image, MIB, 102_400), [0x11; 102_400], "{extra}");
        assert_eq!(read(&*image, MIB + 102_400, 4096), [0; 4096]);
        write(&*image, MIB + 512, &[0x22; 1024]);
        write(&*image, 32 * MIB - 512, &[0x33; 512]);
        for piece in 0..64 {
            write(&*image, 8 * MIB + piece * 65536, &vec![piece as u8 + 1; 65536]);
        }
        image.write_zeroes(9 * MIB, MIB, false).unwrap();
        image.write_zeroes(10 * MIB + 512, 65536, true).unwrap();
        image.discard(11 * MIB, MIB / 2).unwrap();
        image.flush().unwrap();
        assert_eq!(read(&*image, 9 * MIB, MIB as usize), vec![0; MIB as usize]);
        drop(image);
        check(&path);
        qemu_io(
            "qcow2",
            &path,
            &[
                "read -P 0x11 1M 512",
                "read -P 0x22 1049088 1024",
                "read -P 0x33 33553920 512",
                "read -P 1 8M 64k",
                "read -P 16 9371648 64k",
                "read -P 0 9M 1M",
                "read -P 0 10486272 64k",
                "read -P 34 10551808 512",
                "read -P 64 12517376 64k",
            ],
        );
    }
}

#[test]
fn compressed_clusters_are_read_and_rewritten() {
    if !have_qemu() {
        return;
    }
    let bed = Bed::new();
    let path = bed.create("compressed.qcow2", &["-f", "qcow2", "8M"]);
    qemu_io("qcow2", &path, &["write -c -P 0x41 0 64k", "write -c -P 0x42 64k 64k"]);
    let image = writable(&path);
    assert_eq!(read(&*image, 65536 - 512, 1024), [[0x41; 512], [0x42; 512]].concat());
    write(&*image, 65536 + 4096, &[0x43; 512]);
    assert_eq!(read(&*image, 65536 + 4096 - 1, 514), [&[0x42][..], &[0x43; 512], &[0x42]].concat());
    drop(image);
    check(&path);
    qemu_io("qcow2", &path, &["read -P 0x41 0 64k", "read -P 0x43 69632 512", "read -P 0x42 70144 4096"]);
}

#[test]
fn backing_files_are_read_and_never_written() {
    if !have_qemu() {
        return;
    }
    let bed = Bed::new();
    // The lowest is raw, ends within a sector of 4 KiB, and is shorter than what is above.
    fs::write(bed.path("base.raw"), vec![0x51; 3 * MIB as usize + 512]).unwrap();
    let middle = bed.create("middle.qcow2", &["-f", "qcow2", "-F", "raw", "-b", "base.raw", "6M"]);
    let top = bed.create("top.qcow2", &["-f", "qcow2", "-F", "qcow2", "-b", "middle.qcow2", "8M"]);
    qemu_io("qcow2", &middle, &["write -P 0x52 1M 64k"]);
    let before = (fs::read(bed.path("base.raw")).unwrap(), fs::read(&middle).unwrap());
    let image = writable(&top);
    assert_eq!(read(&*image, 0, 512), [0x51; 512]);
    assert_eq!(read(&*image, MIB - 512, 1024), [[0x51; 512], [0x52; 512]].concat());
    assert_eq!(read(&*image, 3 * MIB, 1024), [[0x51; 512], [0; 512]].concat(), "behind the end of the base");
    assert_eq!(read(&*image, 7 * MIB, 512), [0; 512]);
    write(&*image, MIB + 512, &[0x53; 512]);
    image.write_zeroes(2 * MIB, 65536, true).unwrap();
    image.discard(2 * MIB + 65536, 65536).unwrap();
    assert_eq!(read(&*image, MIB, 1536), [[0x52; 512], [0x53; 512], [0x52; 512]].concat());
    assert_eq!(read(&*image, 2 * MIB, 512), [0; 512], "the backing file does not show through");
    // Others may read the backing files, and not write them.
    assert!(open_image(&options(&middle)).is_err_and(|e| e.to_string().contains("in use")));
    drop(readable(&middle));
    drop(image);
    check(&top);
    assert_eq!(before, (fs::read(bed.path("base.raw")).unwrap(), fs::read(&middle).unwrap()));
    let top = top.to_str().unwrap();
    let compared = tool("qemu-img", &["compare", top, top]);
    assert!(compared.contains("identical"));
}

#[test]
fn a_chain_that_comes_back_to_itself_is_refused() {
    if !have_qemu() {
        return;
    }
    let bed = Bed::new();
    let a = bed.create("a.qcow2", &["-f", "qcow2", "1M"]);
    let b = bed.create("b.qcow2", &["-f", "qcow2", "-F", "qcow2", "-b", "a.qcow2", "1M"]);
    tool("qemu-img", &["rebase", "-u", "-F", "qcow2", "-b", "b.qcow2", a.to_str().unwrap()]);
    let Err(error) = open_image(&options(&b)) else { panic!("was opened") };
    assert!(error.to_string().contains("its own backing file"), "{error}");
}

#[test]
fn a_backing_file_of_unknown_format_is_opened_only_if_raw() {
    if !have_qemu() {
        return;
    }
    let bed = Bed::new();
    fs::write(bed.path("base"), vec![0x61; MIB as usize]).unwrap();
    let top = bed.create("top.qcow2", &["-f", "qcow2", "-F", "raw", "-b", "base", "1M"]);
    // The header extension with the format becomes an unknown one.
    let mut bytes = fs::read(&top).unwrap();
    let at = bytes.windows(4).position(|word| word == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
    bytes[at] = 0x77;
    fs::write(&top, bytes).unwrap();
    assert_eq!(read(&*readable(&top), 0, 512), [0x61; 512]);
    let base = bed.create("base", &["-f", "qcow2", "1M"]);
    let Err(error) = open_image(&options(&top)) else { panic!("was opened") };
    assert!(error.to_string().contains("does not record the format"), "{error}");
    drop(base);
}

#[test]
fn discard_gives_space_back_to_the_host() {
    if !have_qemu() {
        return;
    }
    let bed = Bed::new();
    let path = bed.create("d.qcow2", &["-f", "qcow2", "16M"]);
    let image = writable(&path);
    write(&*image, 0, &vec![1; 8 << 20]);
    image.flush().unwrap();
    let blocks = || fs::metadata(&path).unwrap().blocks() * 512;
    let before = blocks();
    image.discard(512, (8 << 20) - 512).unwrap();
    image.flush().unwrap();
    assert!(before - blocks() >= 7 << 20, "{before} {}", blocks());
    assert_eq!(read(&*image, 0, 512), [1; 512]);
    drop(image);
    check(&path);
}

#[test]
fn discarding_what_is_not_there_takes_no_space() {
    if !have_qemu() {
        return;
    }
    let bed = Bed::new();
    let path = bed.create("d.qcow2", &["-f", "qcow2", "-o", "cluster_size=512", "64M"]);
    let before = fs::metadata(&path).unwrap().len();
    let image = writable(&path);
    image.discard(0, 64 << 20).unwrap();
    image.write_zeroes(0, 64 << 20, true).unwrap();
    drop(image);
    assert_eq!(fs::metadata(&path).unwrap().len(), before);
}

#[test]
fn a_disk_grows_and_shrinks() {
    if !have_qemu() {
        return;
    }
    let bed = Bed::new();
    let path = bed.create("r.qcow2", &["-f", "qcow2", "-o", "cluster_size=512", "1M"]);
    let disk = open(options(&path)).unwrap();
    disk_write(&disk, MIB - 512, &[7; 512]).unwrap();
    disk.resize(64 * MIB).unwrap();
    assert_eq!(disk.info().size_bytes, 64 * MIB);
    disk_write(&disk, 64 * MIB - 512, &[8; 512]).unwrap();
    assert_eq!(disk_read(&disk, MIB - 512, 1024).unwrap(), [[7; 512], [0; 512]].concat());
    disk.resize(MIB / 2).unwrap();
    assert!(disk_read(&disk, MIB / 2, 512).is_err());
    disk.resize(MIB).unwrap();
    assert_eq!(disk_read(&disk, MIB - 512, 512).unwrap(), [0; 512], "what was cut off does not come back");
    disk.close().unwrap();
    drop(disk);
    check(&path);
}

#[test]
fn contents_in_another_file() {
    if !have_qemu() {
        return;
    }
    let bed = Bed::new();
    let data = bed.path("x.data");
    let path = bed.create("x.qcow2", &["-f", "qcow2", "-o", &format!("data_file={}", data.display()), "4M"]);
    let image = writable(&path);
    write(&*image, MIB, &[0x71; 4096]);
    image.flush().unwrap();
    assert_eq!(fs::read(&data).unwrap()[MIB as usize..][..4096], [0x71; 4096]);
    assert!(image.change_snapshots(SnapshotChange::Create("a", (0, 0))).is_err());
    drop(image);
    check(&path);
    qemu_io("qcow2", &path, &["read -P 0x71 1M 4k"]);
}

/// As after a loss of power: the refcounts have not been written.
#[test]
fn an_image_that_was_not_closed_gets_its_refcounts_back() {
    if !have_qemu() {
        return;
    }
    let bed = Bed::new();
    let path = bed.create("c.qcow2", &["-f", "qcow2", "4M"]);
    let incompatible = || fs::read(&path).unwrap()[79];
    let image = writable(&path);
    assert_eq!(incompatible() & 1, 0, "clean until the first write");
    let before = fs::read(&path).unwrap();
    write(&*image, 0, &[0x81; 65536]);
    image.flush().unwrap();
    assert_eq!(incompatible() & 1, 1);
    let crashed = bed.path("crashed.qcow2");
    fs::copy(&path, &crashed).unwrap();
    image.close().unwrap();
    assert_eq!(incompatible() & 1, 0);
    write(&*image, 65536, &[0x82; 65536]);
    assert_eq!(incompatible() & 1, 1, "also when it is used again after closing");
    drop(image);
    check(&path);
    // The refcount block, in cluster 2, as it was before.
    let file = fs::File::options().write(true).open(&crashed).unwrap();
    file.write_all_at(&before[2 * 65536..3 * 65536], 2 * 65536).unwrap();
    drop(file);
    // Reading does not need refcounts, and must not change the file.
    let broken = fs::read(&crashed).unwrap();
    assert_eq!(read(&*readable(&crashed), 0, 65536), vec![0x81; 65536]);
    assert_eq!(fs::read(&crashed).unwrap(), broken);
    let image = writable(&crashed);
    write(&*image, MIB, &[0x83; 65536]);
    assert_eq!(read(&*image, 0, 65536), vec![0x81; 65536], "no cluster is given away twice");
    drop(image);
    check(&crashed);
}

#[test]
fn what_cannot_be_used_is_refused_in_one_line() {
    if !have_qemu() {
        return;
    }
    let bed = Bed::new();
    let path = bed.create("h.qcow2", &["-f", "qcow2", "4M"]);
    let good = fs::read(&path).unwrap();
    let patches: &[(&str, usize, &[u8])] = &[
        ("version 9 is not known", 4, &[0, 0, 0, 9]),
        ("clusters of 2^40", 20, &[0, 0, 0, 40]),
        ("clusters of 2^8", 20, &[0, 0, 0, 8]),
        ("old AES", 32, &[0, 0, 0, 1]),
        ("encrypted (LUKS)", 32, &[0, 0, 0, 2]),
        ("encryption method 7", 32, &[0, 0, 0, 7]),
        ("marked corrupt", 79, &[2]),
        ("not compressed with zlib", 79, &[8]),
        ("extended L2", 79, &[16]),
        ("features that are not known", 72, &[1]),
        ("L1 table has", 36, &[0xff; 4]),
        ("L1 table is too small", 24, &[0, 0xff, 0, 0, 0, 0, 0, 0]),
        ("is not possible", 24, &[0xff; 8]),
        ("L1 table is not within", 40, &[0xff; 8]),
        ("L1 table is not within", 40, &[0, 0, 0, 0, 0, 0, 2, 0]),
        ("L1 table is not within", 40, &[0; 8]),
        ("refcount table of 0", 56, &[0; 4]),
        ("refcount table of", 56, &[0xff; 4]),
        ("refcount table is not within", 48, &[0x70, 0, 0, 0, 0, 0, 0, 0]),
        ("refcounts of 2^", 96, &[0xff; 4]),
        ("snapshots are more", 60, &[0xff; 4]),
        ("snapshot table is not within", 60, &[0, 0, 0, 1, 0x70, 0, 0, 0, 0, 0, 0, 0]),
        ("header of 96 bytes", 100, &[0, 0, 0, 96]),
        ("header of 4294967288", 100, &[0xff, 0xff, 0xff, 0xf8]),
        ("backing file is not within", 8, &[0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 3, 0xff]),
        ("backing file is not within", 8, &[0xff; 12]),
        ("backing file is not text", 8, &[0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 1]),
        ("header extension is not within", 112, &[1, 2, 3, 4, 0xff, 0xff, 0xff, 0xff]),
        ("more header extensions", 112, &[]),
    ];
    for (expected, at, patch) in patches {
        let mut bytes = good.clone();
        bytes[*at..at + patch.len()].copy_from_slice(patch);
        if patch.is_empty() {
            // Extensions of no length without end.
            bytes[*at..8192].iter_mut().step_by(8).for_each(|byte| *byte = 1);
            (*at..8192).for_each(|index| bytes[index] = u8::from(index % 8 == 3));
        }
        fs::write(&path, &bytes).unwrap();
        for read_only in [true, false] {
            match open_image(&DiskOptions { read_only, ..options(&path) }) {
                Ok(_) => panic!("{expected}: was opened"),
                Err(error) => {
                    let line = error.to_string();
                    assert!(line.contains(expected) && !line.contains('\n'), "{expected}: {line}");
                }
            }
        }
    }
    for len in [0, 3, 71, 100, 4096, 65536, 131_072, 196_608] {
        fs::write(&path, &good[..len.min(good.len())]).unwrap();
        let format = Some(crate::Format::Qcow2);
        if let Ok(image) = open_image(&DiskOptions { format, ..options(&path) }) {
            // Enough is left for an empty disk.
            assert_eq!((len, read(&*image, 0, 512)), (196_608, vec![0; 512]));
        }
    }
}

/// Whatever the tables say, a request ends, with an error perhaps; and nothing panics.
#[test]
fn lying_tables_fail_requests_only() {
    if !have_qemu() {
        return;
    }
    let bed = Bed::new();
    let path = bed.create("l.qcow2", &["-f", "qcow2", "-o", "cluster_size=4096", "4M"]);
    qemu_io("qcow2", &path, &["write -P 1 0 1M", "write -c -P 2 2M 64k"]);
    let good = fs::read(&path).unwrap();
    let l1_at = super::header::be64(&good, 40) as usize;
    let l2_at = (super::header::be64(&good, l1_at) & 0x00ff_ffff_ffff_fe00) as usize;
    let refcounts_at = super::header::be64(&good, 48) as usize;
    let values = [
        u64::MAX,
        1,
        1 << 62,
        (1 << 62) | 0x0fff,
        (1 << 63) | 0x0070_0000_0000_0000,
        (1 << 63) | 0x1000_0000,
        (1 << 63) | 0x200,
        (1 << 63) | l1_at as u64,
        0x3fff_ffff_ffff_ffff,
        (1 << 62) | 0x3fff_ffff_ffff_ffff,
    ];
    for place in [l1_at, l2_at, l2_at + 512 * 8 - 8, refcounts_at, refcounts_at + 8] {
        for value in values {
            let mut bytes = good.clone();
            bytes[place..place + 8].copy_from_slice(&value.to_be_bytes());
            fs::write(&path, &bytes).unwrap();
            let Ok(image) = open_image(&options(&path)) else { continue };
            let mut buffer = vec![9; 4 << 20];
            let whole = [VolatileSlice::from(&mut buffer[..])];
            let _ = image.read(0, &whole);
            let _ = image.write(512, &whole[0].split_at(512).map(|(a, _)| [a]).unwrap(), true);
            let _ = image.write(2 << 20, &whole[0].split_at(8192).map(|(a, _)| [a]).unwrap(), true);
            let _ = image.discard(0, 1 << 20);
            let _ = image.change_snapshots(SnapshotChange::Create("x", (1, 2)));
            let _ = image.write(3 << 20, &whole[0].split_at(4096).map(|(a, _)| [a]).unwrap(), true);
            let _ = image.resize(8 << 20);
            drop(image);
            // A dirty one is repaired, or refused.
            bytes[79] |= 1;
            fs::write(&path, &bytes).unwrap();
            let _ = open_image(&options(&path)).map(|image| image.flush());
        }
    }
}

#[test]
fn several_threads_at_once() {
    if !have_qemu() {
        return;
    }
    let bed = Bed::new();
    let path = bed.create("t.qcow2", &["-f", "qcow2", "-o", "cluster_size=4096", "16M"]);
    let image = writable(&path);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let image = &*image;
            scope.spawn(move || {
                for round in 0..128u64 {
                    // Neighbouring sectors of the same clusters, by different threads.
                    let offset = (round * 37 % 512) * 2048 + thread * 512;
                    write(image, offset, &[thread as u8 + 1; 512]);
                    if round % 16 == 0 {
                        image.flush().unwrap();
                        image.discard(8 * MIB + thread * MIB, MIB).unwrap();
                        write(image, 8 * MIB + thread * MIB, &[9; 4096]);
                    }
                    assert_eq!(read(image, offset, 512), [thread as u8 + 1; 512]);
                }
            });
        }
    });
    for round in 0..128 {
        let at = (round * 37 % 512) * 2048;
        let expected: Vec<u8> = (1..=4).flat_map(|thread| [thread; 512]).collect();
        assert_eq!(read(&*image, at, 2048), expected);
    }
    drop(image);
    check(&path);
}

#[test]
fn snapshots_are_made_applied_and_deleted() {
    if !have_qemu() {
        return;
    }
    let bed = Bed::new();
    for extra in ["cluster_size=65536", "cluster_size=512", "compat=0.10", "refcount_bits=8"] {
        let path = bed.create(&format!("{extra}.qcow2"), &["-f", "qcow2", "-o", extra, "8M"]);
        qemu_io("qcow2", &path, &["write -c -P 1 4M 64k"]);
        let image = writable(&path);
        write(&*image, 0, &vec![1; MIB as usize]);
        image.change_snapshots(SnapshotChange::Create("first", (1000, 5))).unwrap();
        write(&*image, 0, &vec![2; MIB as usize / 2]);
        write(&*image, 4 * MIB, &[2; 512]);
        image.change_snapshots(SnapshotChange::Create("second", (2000, 0))).unwrap();
        write(&*image, 0, &[3; 512]);
        let names = |image: &dyn Image| {
            image.snapshots().unwrap().into_iter().map(|s| (s.id, s.name)).collect::<Vec<_>>()
        };
        let pair = |id: &str, name: &str| (id.to_owned(), name.to_owned());
        assert_eq!(names(&*image), [pair("1", "first"), pair("2", "second")]);
        let same = image.change_snapshots(SnapshotChange::Create("second", (0, 0)));
        assert!(same.is_err_and(|e| e.to_string().contains("already")));
        assert!(image.change_snapshots(SnapshotChange::Apply("none")).is_err());
        image.close().unwrap();
        let copy = bed.path("copy");
        fs::copy(&path, &copy).unwrap();
        check(&copy);
        let list = tool("qemu-img", &["snapshot", "-l", copy.to_str().unwrap()]);
        assert!(list.contains("first") && list.contains("second"), "{list}");
        // QEMU applies ours.
        tool("qemu-img", &["snapshot", "-a", "first", copy.to_str().unwrap()]);
        qemu_io("qcow2", &copy, &["read -P 1 0 1M", "read -P 1 4M 64k"]);
        // And we.
        image.change_snapshots(SnapshotChange::Apply("first")).unwrap();
        assert_eq!(read(&*image, 0, MIB as usize), vec![1; MIB as usize], "{extra}");
        assert_eq!(read(&*image, 4 * MIB, 512), [1; 512]);
        write(&*image, 0, &[4; 4096]);
        image.change_snapshots(SnapshotChange::Apply("2")).unwrap();
        assert_eq!(read(&*image, 0, 512), [2; 512]);
        assert_eq!(read(&*image, 4 * MIB, 1024), [[2; 512], [1; 512]].concat());
        image.change_snapshots(SnapshotChange::Delete("first")).unwrap();
        write(&*image, MIB - 512, &[5; 512]);
        image.change_snapshots(SnapshotChange::Delete("second")).unwrap();
        assert_eq!(names(&*image), []);
        assert_eq!(read(&*image, MIB - 1024, 1024), [[1; 512], [5; 512]].concat());
        write(&*image, 6 * MIB, &[6; 65536]);
        drop(image);
        check(&path);
        // One of QEMU's.
        tool("qemu-img", &["snapshot", "-c", "theirs", path.to_str().unwrap()]);
        let image = writable(&path);
        write(&*image, 0, &vec![7; 2 * MIB as usize]);
        image.change_snapshots(SnapshotChange::Apply("theirs")).unwrap();
        assert_eq!(read(&*image, 6 * MIB, 65536), [6; 65536]);
        assert_eq!(read(&*image, MIB, 512), [0; 512]);
        image.change_snapshots(SnapshotChange::Delete("theirs")).unwrap();
        drop(image);
        check(&path);
    }
}

#[test]
fn applying_a_snapshot_gives_the_disk_its_old_size() {
    if !have_qemu() {
        return;
    }
    let bed = Bed::new();
    let path = bed.create("s.qcow2", &["-f", "qcow2", "-o", "cluster_size=512", "1M"]);
    let disk = open(options(&path)).unwrap();
    disk.change_snapshots(SnapshotChange::Create("small", (0, 0))).unwrap();
    disk.resize(64 * MIB).unwrap();
    disk_write(&disk, 63 * MIB, &[1; 512]).unwrap();
    assert!(disk.resize(MIB).is_err(), "smaller than it is, with snapshots");
    assert_eq!(disk.info().size_bytes, 64 * MIB);
    disk.change_snapshots(SnapshotChange::Apply("small")).unwrap();
    assert_eq!(disk.info().size_bytes, MIB);
    disk.close().unwrap();
    drop(disk);
    check(&path);
}

/// A snapshot that there is no room for in the refcounts is refused, and the image is as it was.
#[test]
fn refcounts_of_one_bit_allow_no_snapshot() {
    if !have_qemu() {
        return;
    }
    let bed = Bed::new();
    let path = bed.create("o.qcow2", &["-f", "qcow2", "-o", "refcount_bits=1", "1M"]);
    let image = writable(&path);
    write(&*image, 0, &[1; 65536]);
    let result = image.change_snapshots(SnapshotChange::Create("x", (0, 0)));
    assert!(result.is_err_and(|e| e.to_string().contains("refcount_bits=64")));
    write(&*image, 65536, &[2; 65536]);
    assert_eq!(read(&*image, 0, 512), [1; 512]);
    drop(image);
    check(&path);
}
