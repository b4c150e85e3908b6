//! Every format against a model: an array of bytes. Operations at random, and the image opened again now and then.

use std::fs;
use std::path::Path;

use vm_memory::VolatileSlice;

use crate::image::qcow2::Qcow2Image;
use crate::image::raw::RawImage;
use crate::image::vhdx::VhdxImage;
use crate::image::vmdk::VmdkImage;
use crate::open::Opening;
use crate::testing::{check, have_qemu, options, read, scratch, tool, write};
use crate::{CacheMode, DiskOptions, Image, SnapshotChange, open_image};

const LEN: usize = 4 << 20;

/// Numbers that look random, and are the same each time.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % limit
    }

    /// Whole sectors, mostly few.
    fn range(&mut self) -> (usize, usize) {
        let longest = [8, 64, 1024][self.below(3)];
        let len = (1 + self.below(longest)) * 512;
        (self.below((LEN - len) / 512 + 1) * 512, len)
    }
}

fn run(path: &Path, seed: u64, mut model: Vec<u8>, with_snapshots: bool) {
    let random = &mut Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let open = |cache| open_image(&DiskOptions { cache, ..options(path) }).unwrap();
    let mut image: Box<dyn Image> = open(CacheMode::Writeback);
    let mut snapshots: Vec<(String, Vec<u8>)> = Vec::new();
    for step in 0..250 {
        let (at, len) = random.range();
        let part = at..at + len;
        match random.below(20) {
            0..8 => {
                let bytes: Vec<u8> = (0..len).map(|index| (index / 512 + step) as u8 | 1).collect();
                write(&*image, at as u64, &bytes);
                model[part].copy_from_slice(&bytes);
            }
            8..12 => {
                assert!(read(&*image, at as u64, len) == model[part], "seed {seed}, step {step}: {at} {len}")
            }
            operation @ (12 | 13) => {
                image.write_zeroes(at as u64, len as u64, operation == 12).unwrap();
                model[part].fill(0);
            }
            14 => {
                image.discard(at as u64, len as u64).unwrap();
                // Whatever it is now, it stays so.
                let now = read(&*image, at as u64, len);
                model[part].copy_from_slice(&now);
            }
            15 => {
                image.flush().unwrap();
                if !path.with_file_name("image-f001").exists() {
                    crashed(path, &model, step % 4 == 0);
                }
            }
            16 => {
                drop(image);
                image = open([CacheMode::Writeback, CacheMode::None][random.below(2)]);
            }
            17 if with_snapshots && snapshots.len() < 4 => {
                let name = format!("at {step}");
                image.change_snapshots(SnapshotChange::Create(&name, (0, 0))).unwrap();
                snapshots.push((name, model.clone()));
            }
            18 if !snapshots.is_empty() => {
                let (name, contents) = &snapshots[random.below(snapshots.len())];
                image.change_snapshots(SnapshotChange::Apply(name)).unwrap();
                model.clone_from(contents);
            }
            19 if !snapshots.is_empty() => {
                let (name, _) = snapshots.swap_remove(random.below(snapshots.len()));
                image.change_snapshots(SnapshotChange::Delete(&name)).unwrap();
            }
            _ => {}
        }
    }
    assert!(read(&*image, 0, LEN) == model, "seed {seed}, at the end");
    drop(image);
    assert!(read(&*open(CacheMode::Writeback), 0, LEN) == model, "seed {seed}, opened again");
}

/// Were the machine gone now, right after a flush, all would be there.
fn crashed(path: &Path, model: &[u8], thoroughly: bool) {
    let copy = path.with_file_name("crashed");
    fs::copy(path, &copy).unwrap();
    for read_only in [true, false] {
        let image = open_image(&DiskOptions { read_only, ..options(&copy) }).unwrap();
        assert!(read(&*image, 0, LEN) == model, "after a crash, read-only {read_only}");
    }
    if thoroughly && fs::read(&copy).unwrap().starts_with(b"QFI") {
        check(&copy);
    }
}

/// QEMU finds the same contents.
fn compare(path: &Path, format: &str, seed: u64) {
    let converted = path.with_extension("raw");
    let (from, to) = (path.to_str().unwrap(), converted.to_str().unwrap());
    tool("qemu-img", &["convert", "-f", format, "-O", "raw", from, to]);
    let image = open_image(&options(path)).unwrap();
    assert!(fs::read(&converted).unwrap() == read(&*image, 0, LEN), "{format}, seed {seed}");
}

#[test]
fn random_operations() {
    if !have_qemu() {
        return;
    }
    let kinds = [
        ("qcow2", "cluster_size=4096"),
        ("qcow2", "cluster_size=512,refcount_bits=8"),
        ("qcow2", "cluster_size=65536"),
        ("qcow2", "compat=0.10,cluster_size=1024"),
        ("vmdk", "subformat=monolithicSparse"),
        ("vmdk", "subformat=twoGbMaxExtentFlat"),
        ("vhdx", "block_size=1M"),
    ];
    for (index, (format, option)) in kinds.into_iter().enumerate() {
        for backed in [false, true] {
            if backed && format != "qcow2" {
                continue;
            }
            for seed in 1..=3 {
                let directory =
                    if (index, seed) == (0, 1) { tempfile::tempdir().unwrap() } else { scratch() };
                let path = directory.path().join("image");
                let mut model = vec![0; LEN];
                let mut arguments = vec!["create", "-q", "-f", format, "-o", option];
                if backed {
                    // Shorter than what is above it.
                    model[..LEN - 70_000]
                        .iter_mut()
                        .enumerate()
                        .for_each(|(at, byte)| *byte = (at / 300) as u8);
                    fs::write(directory.path().join("base"), &model[..LEN - 70_000]).unwrap();
                    arguments.extend(["-F", "raw", "-b", "base"]);
                }
                arguments.extend([path.to_str().unwrap(), "4M"]);
                tool("qemu-img", &arguments);
                run(&path, seed + 10 * index as u64, model, format == "qcow2");
                if format == "qcow2" {
                    check(&path);
                }
                compare(&path, format, seed);
            }
        }
    }
}

/// Images with some bytes of their metadata changed: opening them or what is asked of them fails, or does not. It ends, and what it
/// allocates has bounds.
#[test]
fn corrupted_images() {
    if !have_qemu() {
        return;
    }
    let directory = scratch();
    let path = directory.path().join("image");
    let kinds = [
        ("qcow2", "cluster_size=512"),
        ("qcow2", "cluster_size=4096,lazy_refcounts=on"),
        ("vmdk", "subformat=monolithicSparse"),
        ("vhdx", "block_size=1M"),
    ];
    for (format, option) in kinds {
        let name = path.to_str().unwrap();
        tool("qemu-img", &["create", "-q", "-f", format, "-o", option, name, "4M"]);
        tool("qemu-io", &["-f", format, "-c", "write -P 7 0 64k", "-c", "write -P 8 2M 64k", name]);
        if format == "qcow2" {
            tool("qemu-img", &["snapshot", "-c", "one", name]);
            tool("qemu-io", &["-f", format, "-c", "write -P 9 0 4k", "-c", "write -c -P 9 1M 4k", name]);
        }
        let good = fs::read(&path).unwrap();
        // What is not zero is metadata, but for the data, which has one value.
        let places: Vec<usize> = (0..good.len()).filter(|at| !matches!(good[*at], 0 | 7 | 8)).collect();
        let random = &mut Random(0x1234_5678_9abc_def1);
        for case in 0..400 {
            let file = RawImage::in_memory(good.len() as u64).unwrap();
            file.write_bytes(0, &good).unwrap();
            for _ in 0..1 + random.below(4) {
                let at = places[random.below(places.len())] as u64 & !7;
                let value = [random.0, random.0 & 0xffff, !0, 1 << random.below(64), 0][random.below(5)];
                let value = if random.below(2) == 0 { value.to_be_bytes() } else { value.to_le_bytes() };
                let len = [1, 2, 4, 8][random.below(4)];
                file.write_bytes(at + random.below(9 - len) as u64, &value[8 - len..]).unwrap();
            }
            if case % 10 == 0 {
                file.resize(random.below(good.len()) as u64).unwrap();
            }
            let mut opening = Opening::new(CacheMode::Writeback);
            let image: Option<Box<dyn Image>> = match format {
                "qcow2" => {
                    Qcow2Image::open(file, &path, true, &mut opening).ok().map(|image| Box::new(image) as _)
                }
                "vmdk" => {
                    VmdkImage::open(file, &path, true, &mut opening).ok().map(|image| Box::new(image) as _)
                }
                _ => VhdxImage::open(file, &path, true, &mut opening).ok().map(|image| Box::new(image) as _),
            };
            let Some(image) = image else { continue };
            let size = image.size();
            let mut memory = vec![1; 128 << 10];
            for step in 0..12 {
                let len = (1 + random.below(256)) * 512;
                let offset = random.below((size.min(5 << 20) / 512 + 1) as usize) as u64 * 512;
                if offset + len as u64 > size {
                    continue;
                }
                let buffer = [VolatileSlice::from(&mut memory[..len])];
                // Any answer is fine.
                let _ = match step {
                    0 | 4 | 8 => image.read(offset, &buffer),
                    1 | 5 | 9 => image.write(offset, &buffer, false),
                    2 => image.write_zeroes(offset, len as u64, true),
                    3 => image.discard(offset, len as u64),
                    6 => image.change_snapshots(SnapshotChange::Create("two", (0, 0))),
                    7 => image.change_snapshots(SnapshotChange::Apply("one")),
                    10 => image.change_snapshots(SnapshotChange::Delete("one")),
                    _ => image.flush(),
                };
            }
        }
    }
}
