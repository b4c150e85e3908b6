//! Every format against a model: an array of bytes. Operations at random, and the image opened again now and then.

use std::fs;
use std::path::Path;

use crate::testing::{check, have_qemu, options, read, tool, write};
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
            15 => image.flush().unwrap(),
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
                let directory = tempfile::tempdir().unwrap();
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
