//! Raw images on the file systems that are here: ext4 or whatever /tmp is, and tmpfs.

use std::fs;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use proptest::prelude::*;

use super::*;

const LEN: usize = 256 << 10;

fn image_in(place: &str, cache: CacheMode, len: usize) -> (tempfile::NamedTempFile, RawImage) {
    let temporary = tempfile::NamedTempFile::new_in(place).unwrap();
    temporary.as_file().set_len(len as u64).unwrap();
    let flags = if cache.direct() { libc::O_DIRECT } else { 0 };
    let file = File::options().read(true).write(true).custom_flags(flags).open(temporary.path()).unwrap();
    (temporary, RawImage::new(file, cache).unwrap())
}

/// With O_DIRECT and blocks as large as some disks have, whatever this host's disk has.
fn direct(len: usize) -> (tempfile::NamedTempFile, RawImage) {
    let (file, mut image) = image_in("/tmp", CacheMode::None, len);
    image.alignment = Alignment { memory: 4096, offset: 4096 };
    (file, image)
}

fn slices(bytes: &mut [u8], lens: &[usize]) -> Vec<VolatileSlice<'static>> {
    let mut at = 0;
    lens.iter()
        .map(|len| {
            // SAFETY: the tests keep the bytes for as long as they use the slices.
            let slice = unsafe { VolatileSlice::new(bytes[at..at + len].as_mut_ptr(), *len) };
            at += len;
            slice
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the offset and however the buffers lie, as much arrives as was sent, and the rest of the disk stays as it was.
    #[test]
    fn misaligned_accesses_past_the_page_cache(
        offset in 0..LEN - 70_000, lens in prop::collection::vec(1usize..9000, 1..7), skew in 0usize..16,
    ) {
        let (file, image) = direct(LEN);
        fs::write(file.path(), vec![0x55; LEN]).unwrap();
        let total: usize = lens.iter().sum();
        let mut sent: Vec<u8> = (0..total + skew).map(|index| index as u8).collect();
        image.write(offset as u64, &slices(&mut sent[skew..], &lens), false).unwrap();
        let contents = fs::read(file.path()).unwrap();
        prop_assert_eq!(&contents[offset..offset + total], &sent[skew..]);
        prop_assert!(contents[..offset].iter().chain(&contents[offset + total..]).all(|byte| *byte == 0x55));
        prop_assert_eq!(contents.len(), LEN);
        let mut received = vec![0; total + skew];
        image.read(offset as u64, &slices(&mut received[skew..], &lens)).unwrap();
        prop_assert_eq!(&received[skew..], &sent[skew..]);
    }
}

/// More than the memory that is taken for it at a time.
#[test]
fn long_misaligned_accesses() {
    let len = 3 * BOUNCE_BYTES + 5000;
    let (file, image) = direct(len.next_multiple_of(4096));
    let mut bytes: Vec<u8> = (0..len - 4000).map(|index| (index / 7) as u8).collect();
    let lens = [1000, len - 5000];
    image.write(1000, &slices(&mut bytes, &lens), true).unwrap();
    assert!(fs::read(file.path()).unwrap()[1000..][..bytes.len()] == bytes);
    let mut received = vec![0; bytes.len()];
    image.read(1000, &slices(&mut received, &lens)).unwrap();
    assert!(received == bytes);
}

#[test]
fn an_image_may_end_within_a_block() {
    let len = 8192 + 512;
    let (file, image) = direct(len);
    let mut bytes = vec![7; 1024];
    image.write(8192 - 512, &slices(&mut bytes, &[1024]), false).unwrap();
    assert_eq!(image.size(), len as u64, "and keeps its length");
    assert_eq!(fs::read(file.path()).unwrap()[8192 - 512..], [7; 1024]);
    let mut received = vec![0; 512];
    image.read(8192, &slices(&mut received, &[512])).unwrap();
    assert_eq!(received, [7; 512]);
    assert!(image.read(8192, &slices(&mut vec![0; 4096], &[4096])).is_err(), "beyond the end");
    let mut longer = vec![9; 4096];
    image.read_or_zero(8192, &slices(&mut longer, &[256, 3840])).unwrap();
    assert_eq!(longer, [vec![7; 512], vec![0; 3584]].concat());
}

/// Each thread has its sectors of the same blocks; none may be lost.
#[test]
fn several_threads_write_parts_of_the_same_blocks() {
    let (file, image) = direct(8 * 4096);
    std::thread::scope(|scope| {
        for thread in 0..8u8 {
            let image = &image;
            scope.spawn(move || {
                for round in 0..8u64 {
                    for block in 0..8u64 {
                        let mut bytes = vec![thread * 16 + round as u8 + 1; 512];
                        let offset = block * 4096 + u64::from(thread) * 512;
                        image.write(offset, &slices(&mut bytes, &[512]), false).unwrap();
                    }
                }
            });
        }
    });
    let expected: Vec<u8> = (0..64).flat_map(|sector| [sector % 8 * 16 + 8; 512]).collect();
    assert_eq!(fs::read(file.path()).unwrap(), expected);
}

#[test]
fn discards_give_space_back_and_zeroes_are_zero() {
    for place in ["/tmp", "/dev/shm"] {
        let (file, image) = image_in(place, CacheMode::Writeback, LEN);
        let blocks = || fs::metadata(file.path()).unwrap().blocks() * 512;
        let fill = || {
            image.write_bytes(0, &[0x66; LEN]).unwrap();
            image.flush().unwrap();
        };
        fill();
        let full = blocks();
        image.discard(4096, 128 << 10).unwrap();
        assert!(full - blocks() >= 128 << 10, "{place}: {full} {}", blocks());
        for unmap in [false, true] {
            fill();
            image.write_zeroes(512, (128 << 10) - 1024, unmap).unwrap();
            let contents = fs::read(file.path()).unwrap();
            let expected =
                [vec![0x66; 512], vec![0; (128 << 10) - 1024], vec![0x66; LEN - (128 << 10) + 512]].concat();
            assert!(contents == expected, "{place}, unmap {unmap}");
        }
        assert!(full - blocks() >= 120 << 10, "{place}: unmapping gives space back");
    }
    let image = RawImage::in_memory(1 << 40).unwrap();
    image.write_bytes(1 << 39, &[1; 512]).unwrap();
    image.write_zeroes((1 << 39) - 512, 1024, true).unwrap();
    let mut bytes = [1; 512];
    image.read_bytes(1 << 39, &mut bytes).unwrap();
    assert_eq!((bytes, image.at_once()), ([0; 512], AtOnce::Always));
}

#[test]
fn more_buffers_than_one_call_takes() {
    for (_file, image) in [image_in("/tmp", CacheMode::Writeback, 4 << 20), direct(4 << 20)] {
        let lens = vec![512; 3000];
        let mut sent: Vec<u8> = (0..512 * 3000).map(|index| (index / 512) as u8).collect();
        image.write(512, &slices(&mut sent, &lens), false).unwrap();
        let mut received = vec![0; sent.len()];
        image.read(512, &slices(&mut received, &lens)).unwrap();
        assert!(received == sent);
    }
}

#[test]
fn the_host_tells_what_it_wants_of_addresses_and_of_offsets() {
    let (_file, image) = image_in("/tmp", CacheMode::None, 4096);
    let Alignment { memory, offset } = image.alignment;
    assert!(memory.is_power_of_two() && offset.is_power_of_two() && offset >= 512, "{memory} {offset}");
    // Memory that is aligned just as much is taken as it is.
    let mut aligned = AlignedMemory::new(offset + memory, 4096).unwrap();
    let slice = VolatileSlice::from(&mut aligned.bytes_mut()[memory..memory + offset]);
    assert!(image.is_aligned(0, &[slice]));
    image.transfer(Direction::Write, 0, &[slice], 0).unwrap();
    assert!(!image.is_aligned(offset as u64 / 2, &[slice]));
}
