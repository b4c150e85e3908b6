use std::io;

use block::{CacheMode, ErrorPolicy, SectorSize};

use super::super::bits::interrupt;
use super::*;

/// A text of IDENTIFY DEVICE.
fn text(words: &[u16]) -> String {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
    String::from_utf8(bytes).unwrap().trim_end().to_owned()
}

fn sum(block: &[u8]) -> u8 {
    block.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
}

#[test]
fn identify_tells_all_that_drivers_ask() {
    let bed = bed();
    let bench = Bench::disk(&bed);
    let answer = bench.run(Frame::new(0xec, 0, 0), 512);
    assert_eq!(answer.end(), GOOD);
    assert_eq!(answer.interrupts, interrupt::PSS, "PIO: a setup frame, and no register frame");
    assert_eq!((answer.frame[0], answer.moved), (0, 512));
    let setup = bench.frame::<20>(0x20);
    assert_eq!((setup[..4].to_vec(), setup[15]), (vec![0x5f, 0x60, 0x58, 0], 0x50));
    assert_eq!(setup[16..18], [0, 2]);
    let bytes = bench.data(DATA, 512);
    assert_eq!((bytes[510], sum(&bytes)), (0xa5, 0));
    let id = words(&bytes);
    assert_eq!(id[0], 0x0040);
    assert_eq!(text(&id[10..20]), "SERIAL 1");
    assert_eq!(text(&id[23..27]), "001");
    assert_eq!(text(&id[27..47]), "Apiary SATA DISK");
    assert_eq!(id[47], 0x8010);
    assert_eq!(id[49] & 0x0300, 0x0300, "LBA and DMA");
    assert_eq!((id[60], id[61]), (2048, 0));
    assert_eq!(id[69], 0x4000, "deterministic, but not zeros");
    assert_eq!((id[75], id[76] & 0x0100), (31, 0x0100), "32 commands in the queue");
    assert_eq!((id[80], id[82], id[83], id[84]), (0x07f0, 0x4069, 0x7408, 0x4062));
    assert_eq!((id[85], id[86], id[87]), (0x4069, 0xb400, 0x4062));
    assert_eq!(id[88], 0x407f);
    assert_eq!(id[100..104], [2048, 0, 0, 0]);
    assert_eq!((id[105], id[169]), (8, 1), "TRIM");
    assert_eq!((id[106], id[117], id[118]), (0x4000, 0, 0));
    assert_eq!((id[119], id[128], id[217]), (0x4008, 0, 0));
}

#[test]
fn identify_follows_disk_and_settings() {
    let bed = bed_with(|options| {
        options.sectors = Some(SectorSize { logical: 4096, physical: 16_384 });
        options.read_only = true;
        options.cache = CacheMode::Writethrough;
    });
    let identity = DiskIdentity {
        model: "a model whose name is longer than forty characters are".into(),
        serial: "Ä\n1".into(),
        firmware: "2.0".into(),
        rotation_rate: 1,
    };
    let bench = Bench::new(Some(Drive::Disk(bed.disk.clone(), identity)), &bed.memory);
    bench.start();
    let id = bench.identify();
    assert_eq!(text(&id[27..47]), "a model whose name is longer than forty ".trim_end());
    assert_eq!((text(&id[10..20]), text(&id[23..27])), ("  1".into(), "2.0".into()));
    assert_eq!((id[47], id[60], id[100]), (0x8008, 256, 256));
    assert_eq!((id[106], id[117], id[118]), (0x7002, 2048, 0));
    assert_eq!((id[105], id[169], id[69], id[77] & 0x40), (0, 0, 0, 0), "no TRIM for what is read only");
    assert_eq!((id[85] & 0x20, id[217]), (0, 1), "no write cache, no rotation");
    for (frame, word, bits) in [
        (Frame::new(0xef, 0, 0).features(0x02), 85, 0x0020),
        (Frame::new(0xef, 0, 0x80).features(0x05), 86, 0x0008),
        (Frame::new(0xc6, 0, 8), 59, 0x0108),
        (Frame::new(0xef, 0, 0x22).features(0x03), 63, 0x0407),
    ] {
        assert_eq!(bench.run(frame, 0).end(), GOOD);
        assert_eq!(bench.identify()[word] & bits, bits, "word {word}");
    }
    assert_eq!(bench.identify()[88], 0x007f, "Ultra DMA is not selected");
    for frame in [
        Frame::new(0xef, 0, 0x47).features(0x03),
        Frame::new(0xef, 0, 0).features(0x99),
        Frame::new(0xc6, 0, 3),
        Frame::new(0xc6, 0, 16),
    ] {
        assert_eq!(bench.run(frame, 0).end(), ABORTED);
    }
    for (off, word, bits) in [(0x55, 85, 0x0040), (0x82, 85, 0x0020), (0x85, 86, 0x0008)] {
        assert_eq!(bench.run(Frame::new(0xef, 0, 0).features(off), 0).end(), GOOD);
        assert_eq!(bench.identify()[word] & bits, 0);
    }
}

#[test]
fn dma_reads_and_writes() {
    let bed = bed();
    let bench = Bench::disk(&bed);
    // Two regions, the second with its interrupt bit; 28 bits.
    bench.prepare(0, Frame::short(0xc8, 7, 3), &[(DATA, 512), (DATA + 0x1000, 1024)]);
    let last = TABLES + 0x80 + 16 + 12;
    let dword: u32 = bench.memory.read_obj(GuestAddress(last)).unwrap();
    bench.memory.write_obj(dword | 1 << 31, GuestAddress(last)).unwrap();
    bench.set_port(port::CI, 1);
    let answer = bench.answer();
    assert_eq!((answer.end(), answer.moved), (GOOD, 1536));
    assert_eq!(answer.interrupts, interrupt::DHRS | interrupt::DPS);
    assert_eq!(answer.frame[..4], [0x34, 0x40, 0x50, 0]);
    assert_eq!(bench.data(DATA, 512), [7; 512]);
    assert_eq!(bench.data(DATA + 0x1000, 1024), [[8; 512], [9; 512]].concat());
    assert_eq!(bed.contents.accesses(), ["read e00+600"]);
    bench.fill(DATA, &[0xaa; 1024]);
    let answer = bench.run(Frame::new(0x35, 100, 2), 1024);
    assert_eq!((answer.end(), answer.moved), (GOOD, 1024));
    assert_eq!(bed.contents.bytes()[100 * 512..102 * 512], [0xaa; 1024]);
    assert_eq!(bench.run(Frame::new(0x3d, 100, 1), 512).end(), GOOD);
    assert_eq!(bed.contents.accesses(), ["write c800+400", "write stable c800+200"]);
    // A count of zero is the most there can be.
    assert_eq!(bench.run(Frame::short(0xc8, 0, 0), 256 * 512).moved, 256 * 512);
    assert_eq!(bed.contents.accesses(), ["read 0+20000"]);
    assert_eq!(bench.run(Frame::new(0x25, 0, 0), 512).error, 0x10, "65536 sectors are not there");
}

#[test]
fn without_write_cache_writes_are_stable() {
    let bed = bed();
    let bench = Bench::disk(&bed);
    assert_eq!(bench.run(Frame::new(0xef, 0, 0).features(0x82), 0).end(), GOOD);
    assert_eq!(bench.run(Frame::new(0x35, 0, 1), 512).end(), GOOD);
    assert_eq!(bed.contents.accesses(), ["flush 0+0", "write stable 0+200"]);
    assert_eq!(bench.run(Frame::new(0xef, 0, 0).features(0x02), 0).end(), GOOD);
    assert_eq!(bench.run(Frame::new(0x35, 0, 1), 512).end(), GOOD);
    assert_eq!(bed.contents.accesses(), ["write 0+200"]);
}

#[test]
fn pio_moves_the_same_data() {
    let bed = bed();
    let bench = Bench::disk(&bed);
    let answer = bench.run(Frame::short(0x20, 3, 2), 1024);
    assert_eq!((answer.end(), answer.interrupts), (GOOD, interrupt::PSS));
    assert_eq!(bench.frame::<20>(0x20)[16..18], [0, 2], "blocks of a sector");
    assert_eq!(bench.data(DATA, 1024), [[3; 512], [4; 512]].concat());
    bench.fill(DATA, &[0x55; 1536]);
    let answer = bench.run(Frame::new(0x34, 50, 3), 1536);
    assert_eq!((answer.end(), answer.interrupts), (GOOD, interrupt::DHRS));
    assert_eq!(bench.frame::<20>(0x20)[..3], [0x5f, 0, 0x58], "from the host, without interrupt");
    assert_eq!(bed.contents.bytes()[50 * 512..53 * 512], [0x55; 1536]);
    for code in [0xc4, 0xc5, 0x29, 0x39, 0xce] {
        assert_eq!(bench.run(Frame::new(code, 0, 5), 2560).end(), ABORTED, "no blocks have been set");
    }
    bench.run(Frame::new(0xc6, 0, 4), 0);
    bed.contents.accesses();
    assert_eq!(bench.run(Frame::short(0xc4, 0, 6), 3072).end(), GOOD);
    assert_eq!(bench.frame::<20>(0x20)[16..18], [0, 4], "the last block has two sectors");
    assert_eq!(bench.run(Frame::new(0xce, 9, 1), 512).end(), GOOD);
    assert_eq!(bed.contents.accesses(), ["read 0+c00", "write stable 1200+200"]);
}

#[test]
fn sectors_of_4096_bytes() {
    let bed = bed_with(|options| options.sectors = Some(SectorSize { logical: 4096, physical: 4096 }));
    let bench = Bench::disk(&bed);
    assert_eq!(bench.run(Frame::new(0x25, 2, 1), 4096).moved, 4096);
    assert_eq!(bed.contents.accesses(), ["read 2000+1000"]);
    assert_eq!(bench.data(DATA + 512, 1), [17]);
    assert_eq!(bench.run(Frame::new(0x25, 256, 1), 4096).error, 0x10);
}

#[test]
fn what_is_not_on_the_disk_is_not_found() {
    let bed = bed();
    let bench = Bench::disk(&bed);
    for (frame, lba) in [
        (Frame::new(0x25, 2047, 2), 2048),
        (Frame::new(0x35, 5000, 1), 5000),
        (Frame::new(0x25, 0xffff_ffff_ffff, 0), 0xffff_ffff_ffff),
        (Frame::short(0xc8, 2047, 2), 2048),
        (Frame::new(0x42, 2048, 1), 2048),
    ] {
        let answer = bench.run(frame, 1024);
        assert_eq!((answer.end(), answer.lba()), ((0x51, 0x10, false), lba));
        assert_eq!(answer.interrupts, interrupt::DHRS | interrupt::TFES);
    }
    let mut chs = Frame::short(0xc8, 0, 1);
    chs.0[7] = 0;
    assert_eq!(bench.run(chs, 512).end(), ABORTED, "no cylinders and heads");
    assert_eq!(bed.contents.accesses(), [""; 0]);
    assert_eq!(bench.run(Frame::new(0x25, 2047, 1), 512).end(), GOOD);
}

#[test]
fn failures_of_the_host_are_told() {
    let bed = bed_with(|options| {
        options.read_errors = ErrorPolicy::Report;
        options.write_errors = ErrorPolicy::Report;
    });
    let bench = Bench::disk(&bed);
    bed.contents.fail(io::ErrorKind::Other);
    let answer = bench.run(Frame::new(0x25, 9, 1), 512);
    assert_eq!((answer.end(), answer.lba()), ((0x51, 0x40, false), 9), "uncorrectable");
    bed.contents.fail(io::ErrorKind::StorageFull);
    assert_eq!(bench.run(Frame::new(0x35, 9, 1), 512).end(), (0x71, 0x04, false), "device fault");
    bed.contents.fail(io::ErrorKind::Other);
    assert_eq!(bench.run(Frame::new(0xea, 0, 0), 0).status, 0x71);
    let bed = bed_with(|options| options.read_only = true);
    let bench = Bench::disk(&bed);
    assert_eq!(bench.run(Frame::new(0x35, 9, 1), 512).end(), ABORTED);
    assert_eq!(bench.run(Frame::new(0x06, 0, 1).features(1), 512).end(), ABORTED);
}

#[test]
fn commands_without_data() {
    let bed = bed();
    let bench = Bench::disk(&bed);
    assert_eq!(bench.run(Frame::new(0x42, 10, 1000), 0).end(), GOOD, "verify");
    assert_eq!(bed.contents.accesses(), ["read 1400+40000", "read 41400+3d000"]);
    assert_eq!(bench.run(Frame::new(0xe7, 0, 0), 0).end(), GOOD, "flush cache");
    assert_eq!(bed.contents.accesses(), ["flush 0+0"]);
    let answer = bench.run(Frame::short(0xf8, 0, 0), 0);
    assert_eq!((answer.end(), answer.lba(), answer.frame[7]), (GOOD, 2047, 0x40), "read native max");
    assert_eq!(bench.run(Frame::new(0x27, 0, 0), 0).lba(), 2047);
    let answer = bench.run(Frame::new(0x90, 0, 0), 0);
    assert_eq!((answer.status, answer.error, answer.lba(), answer.count()), (0x50, 1, 1, 1), "diagnostic");
    let answer = bench.run(Frame::new(0xa1, 0, 0), 512);
    assert_eq!((answer.end(), answer.lba()), (ABORTED, 1), "not an ATAPI device");
    // NOP, packet, security, configuration, CHS, unknown.
    for code in [0x00, 0xa0, 0xf1, 0xf6, 0xb1, 0x91, 0x70, 0xff] {
        assert_eq!(bench.run(Frame::new(code, 0, 0), 512).end(), ABORTED, "{code:#x}");
    }
}

#[test]
fn power_modes_are_remembered() {
    let bed = bed();
    let bench = Bench::disk(&bed);
    let mode = || bench.run(Frame::new(0xe5, 0, 0), 0).count();
    assert_eq!(mode(), 0xff);
    for (code, shown) in [(0xe1, 0x80), (0xe3, 0x80), (0xe0, 0), (0xe2, 0)] {
        assert_eq!(bench.run(Frame::new(code, 0, 0), 0).end(), GOOD);
        assert_eq!(mode(), shown, "{code:#x}");
    }
    assert_eq!(bed.contents.accesses(), ["flush 0+0", "flush 0+0"], "standby saves what is cached");
    bench.run(Frame::new(0x25, 0, 1), 512);
    assert_eq!(mode(), 0xff);
    assert_eq!(bench.run(Frame::new(0xe6, 0, 0), 0).end(), GOOD);
    assert_eq!(bench.run(Frame::new(0x25, 0, 1), 512).end(), ABORTED, "asleep");
    bench.set_port(port::CMD, cmd::FRE);
    bench.set_port(port::SCTL, 1);
    bench.set_port(port::SCTL, 0);
    bench.restart();
    assert_eq!(mode(), 0xff, "a reset wakes it up");
}

#[test]
fn trim_gives_ranges_back() {
    let bed = bed();
    let bench = Bench::disk(&bed);
    let mut list = vec![0u8; 1024];
    let mut put = |at: usize, lba: u64, count: u64| {
        list[8 * at..8 * at + 8].copy_from_slice(&(lba | count << 48).to_le_bytes());
    };
    put(0, 8, 8);
    put(1, 16, 16);
    put(5, 100, 1);
    put(127, 2047, 1);
    bench.fill(DATA, &list);
    let answer = bench.run(Frame::new(0x06, 0, 2).features(1), 1024);
    assert_eq!((answer.end(), answer.moved), (GOOD, 1024));
    assert_eq!(bed.contents.accesses(), ["discard 1000+3000", "discard c800+200", "discard ffe00+200"]);
    // The last range is not on the disk: nothing is done.
    bench.fill(DATA + 8 * 127, &(2047u64 | 2 << 48).to_le_bytes());
    let answer = bench.run(Frame::new(0x06, 0, 2).features(1), 1024);
    assert_eq!((answer.end(), answer.lba()), ((0x51, 0x10, false), 2047));
    bench.fill(DATA + 8 * 127, &u64::MAX.to_le_bytes());
    assert_eq!(bench.run(Frame::new(0x06, 0, 2).features(1), 1024).error, 0x10);
    for frame in
        [Frame::new(0x06, 0, 9).features(1), Frame::new(0x06, 0, 0).features(1), Frame::new(0x06, 0, 1)]
    {
        assert_eq!(bench.run(frame, 8192).end(), ABORTED);
    }
    assert_eq!(bed.contents.accesses(), [""; 0]);
}

#[test]
fn smart_is_in_good_health() {
    let bed = bed();
    let bench = Bench::disk(&bed);
    let smart = |sub: u16, parameter: u64| Frame::new(0xb0, 0xc24f << 8 | parameter, 1).features(sub);
    bench.clock.advance(5 * 3600 * 1_000_000_000);
    bench.run(Frame::new(0x25, 0, 10), 5120);
    assert_eq!(bench.run(smart(0xda, 0), 0).lba() >> 8, 0xc24f, "no threshold is exceeded");
    assert_eq!(bench.run(smart(0xd0, 0), 512).end(), GOOD);
    let data = bench.data(DATA, 512);
    assert_eq!(sum(&data), 0);
    let raw = |id: u8| {
        let entry = data[2..362].chunks_exact(12).find(|entry| entry[0] == id).unwrap();
        assert_eq!(entry[3..5], [100, 100]);
        u64::from_le_bytes([entry[5], entry[6], entry[7], entry[8], entry[9], entry[10], 0, 0])
    };
    assert_eq!((raw(9), raw(242), raw(5)), (5, 10, 0));
    assert_eq!(bench.run(smart(0xd1, 0), 512).end(), GOOD);
    let thresholds = bench.data(DATA, 512);
    assert_eq!((thresholds[2], thresholds[3], sum(&thresholds)), (1, 6, 0));
    // A short, an extended self-test, one that there is not, and more than the log holds.
    for kind in [1, 2] {
        assert_eq!(bench.run(smart(0xd4, kind), 0).end(), GOOD);
    }
    assert_eq!(bench.run(smart(0xd4, 4), 0).end(), ABORTED);
    let log = |bench: &Bench| {
        assert_eq!(bench.run(smart(0xd5, 6), 512).end(), GOOD);
        bench.data(DATA, 512)
    };
    let entries = log(&bench);
    assert_eq!((entries[0], entries[508], sum(&entries)), (1, 2, 0));
    assert_eq!((&entries[2..6], &entries[26..30]), (&[1, 0, 5, 0][..], &[2, 0, 5, 0][..]));
    for _ in 0..30 {
        bench.run(smart(0xd4, 0x81), 0);
    }
    let entries = log(&bench);
    assert_eq!((entries[508], entries[2], entries[2 + 24 * 20]), (21, 0x81, 0x81));
    assert_eq!(bench.run(Frame::new(0x2f, 0x07, 1), 512).end(), GOOD);
    let extended = bench.data(DATA, 512);
    assert_eq!((extended[0], extended[2], extended[4], sum(&extended)), (1, 19, 0x81, 0));
    assert_eq!(bench.run(smart(0xd5, 0), 512).end(), GOOD);
    assert_eq!(bench.data(DATA, 14)[12], 1, "the directory has the self-test log");
    assert_eq!(bench.run(smart(0xd5, 1), 512).end(), ABORTED, "no error log");
    assert_eq!(bench.run(Frame::new(0xb0, 0, 1).features(0xd0), 512).end(), ABORTED, "not signed");
    assert_eq!(bench.run(smart(0xd9, 0), 0).end(), GOOD);
    assert_eq!(bench.run(smart(0xd0, 0), 512).end(), ABORTED, "switched off");
    assert_eq!(bench.identify()[85] & 1, 0);
    assert_eq!(bench.run(smart(0xd8, 0), 0).end(), GOOD);
    assert_eq!(bench.run(smart(0xd0, 0), 512).end(), GOOD);
}

#[test]
fn logs_are_listed_and_read() {
    let bed = bed();
    let bench = Bench::disk(&bed);
    bench.clock.advance(3 * 3600 * 1_000_000_000);
    bench.fill(DATA, &[0; 2048]);
    bench.run(Frame::new(0x35, 0, 4), 2048);
    let read = |code: u8, address: u64, page: u64, count: u16| {
        let lba = address | (page & 0xff) << 8 | (page >> 8) << 32;
        let answer = bench.run(Frame::new(code, lba, count), 512 * u32::from(count).max(1));
        (answer.end(), bench.data(DATA, 512 * usize::from(count)))
    };
    let (end, directory) = read(0x2f, 0, 0, 1);
    assert_eq!(end, GOOD);
    let sizes: Vec<_> = words(&directory).into_iter().enumerate().filter(|(_, pages)| *pages > 0).collect();
    assert_eq!(sizes, [(0, 1), (4, 5), (7, 1), (0x10, 1), (0x13, 1), (0x30, 6)]);
    let (end, pages) = read(0x47, 4, 0, 5);
    assert_eq!(end, GOOD);
    assert_eq!(pages[..12], [1, 0, 0, 0, 0, 0, 0, 0, 3, 0, 1, 4]);
    let statistic = |page: usize, offset: usize| {
        let at = 512 * page + offset;
        u64::from_le_bytes(pages[at..at + 8].try_into().unwrap())
    };
    let valid = 3 << 62;
    assert_eq!(
        [statistic(1, 0), statistic(1, 16), statistic(1, 24), statistic(1, 32)],
        [0x1_0001, valid | 3, valid | 4, valid | 1]
    );
    let (_, capacity) = read(0x47, 0x30, 2, 1);
    assert_eq!(u64::from_le_bytes(capacity[8..16].try_into().unwrap()), 1 << 63 | 2048);
    let (_, copy) = read(0x2f, 0x30, 1, 1);
    assert_eq!((words(&copy)[100], sum(&copy)), (2048, 0));
    let (_, queued) = read(0x2f, 0x13, 0, 1);
    assert_eq!((queued[0], queued[4]), (1, 1));
    let (_, error) = read(0x2f, 0x10, 0, 1);
    assert_eq!((error[0], sum(&error)), (0x80, 0), "no queued command has failed");
    for (address, page, count) in
        [(4, 0, 6), (4, 5, 1), (4, 0x100, 1), (0x10, 0, 0), (0x20, 0, 1), (4, 0xffff, 1)]
    {
        assert_eq!(read(0x2f, address, page, count).0, ABORTED, "{address:#x} {page} {count}");
    }
}

#[test]
fn another_size_is_shown_when_it_is_told() {
    let bed = bed();
    let bench = Bench::disk(&bed);
    bed.contents.bytes().resize(4096 * 512, 0x77);
    assert!(bed.disk.refresh_size().is_some());
    assert_eq!(bench.run(Frame::new(0x25, 4095, 1), 512).error, 0x10);
    bench.ahci.resized(0);
    bench.ahci.resized(1);
    bench.ahci.resized(77);
    assert_eq!(bench.identify()[100], 4096);
    assert_eq!(bench.run(Frame::new(0x25, 4095, 1), 512).end(), GOOD);
    assert_eq!(bench.data(DATA, 1), [0x77]);
}

#[test]
fn a_register_frame_interrupts_once() {
    let bed = bed();
    let bench = Bench::disk(&bed);
    let edges = bench.line.edges();
    bench.run(Frame::new(0x25, 0, 1).device(0x40), 512);
    assert_eq!(bench.line.edges(), edges + 1);
}
