//! Drivers that mean no good.

use proptest::prelude::*;

use super::super::bits::{self, interrupt};
use super::*;

const OUTSIDE: u64 = MEMORY_BYTES;

#[test]
fn structures_outside_of_memory_stop_the_port() {
    let bed = bed();
    let bench = Bench::disk(&bed);
    let stopped = |what: &str, wanted: u32| {
        assert_eq!(bench.port(port::IS) & !interrupt::DHRS, wanted, "{what}");
        bench.set_port(port::CI, 1 << 9);
        assert_ne!(bench.port(port::CI) & 1 << 9, 0, "{what}: nothing goes on");
        bench.set_port(port::CLB, LIST as u32);
        bench.set_port(port::CLBU, 0);
        bench.set_port(port::FBU, 0);
        bench.restart();
        assert_eq!(bench.run(Frame::new(0xec, 0, 0), 512).end(), GOOD, "{what}: all is well again");
    };
    for base in [OUTSIDE, u64::MAX] {
        bench.set_port(port::CLB, base as u32);
        bench.set_port(port::CLBU, (base >> 32) as u32);
        bench.set_port(port::CI, 1 << 31);
        stopped("command list", interrupt::HBFS);
    }
    for table in [OUTSIDE, u64::MAX] {
        bench.prepare(0, Frame::new(0xec, 0, 0), &[]);
        bench.memory.write_obj(table, GuestAddress(LIST + 8)).unwrap();
        bench.set_port(port::CI, 1);
        stopped("command table", interrupt::HBFS);
    }
    for len in [0, 4] {
        bench.prepare(0, Frame::new(0xec, 0, 0), &[]);
        bench.memory.write_obj((1u32 << 16) | len, GuestAddress(LIST)).unwrap();
        bench.set_port(port::CI, 1);
        stopped("short frame", interrupt::IFS);
    }
    let mut frame = Frame::new(0xec, 0, 0);
    frame.0[0] = 0x34;
    bench.prepare(0, frame, &[(DATA, 512)]);
    bench.set_port(port::CI, 1);
    stopped("a device's frame", interrupt::IFS);
    bench.set_port(port::FBU, u32::MAX);
    bench.prepare(0, Frame::new(0xe5, 0, 0), &[]);
    bench.set_port(port::CI, 1);
    stopped("received frames", interrupt::HBFS);
}

#[test]
fn data_outside_of_memory_stops_the_port() {
    let bed = bed();
    let bench = Bench::disk(&bed);
    let before = bed.contents.bytes().clone();
    for address in [OUTSIDE, OUTSIDE - 511, u64::MAX - 3, 1 << 63] {
        for code in [0x25, 0x35, 0xec, 0x06, 0x2f] {
            bench.prepare(0, Frame::new(code, 0, 1).features(u16::from(code == 0x06)), &[(address, 512)]);
            bench.set_port(port::CI, 1);
            assert_eq!(bench.port(port::IS), interrupt::HBFS, "{code:#x} at {address:#x}");
            bench.restart();
        }
    }
    // A table that leaves memory.
    bench.prepare(0, Frame::new(0x25, 0, 1), &[]);
    let table = OUTSIDE - 0x80;
    bench.memory.write_slice(&Frame::new(0x25, 0, 1).0, GuestAddress(table)).unwrap();
    bench.memory.write_obj([5u32 | 9 << 16, 0, table as u32, 0], GuestAddress(LIST)).unwrap();
    bench.set_port(port::CI, 1);
    assert_eq!(bench.port(port::IS), interrupt::HBFS);
    assert_eq!(*bed.contents.bytes(), before);
}

#[test]
fn tables_that_do_not_fit_the_command() {
    let bed = bed();
    let bench = Bench::disk(&bed);
    let too_short = |code: u8, len: u32| {
        let answer = bench.run(Frame::new(code, 0, 2).features(u16::from(code == 0x06)), len);
        assert_eq!(answer.end(), ABORTED, "{code:#x} {len}");
        assert_eq!(answer.interrupts, interrupt::OFS | interrupt::TFES | interrupt::DHRS);
    };
    for code in [0x25, 0x35, 0x24, 0x34, 0x06] {
        too_short(code, 0);
        too_short(code, 1023);
    }
    assert_eq!(bed.contents.accesses(), [""; 0]);
    let answer = bench.run(Frame::new(0xec, 0, 0), 100);
    assert_eq!((answer.end(), answer.moved), (GOOD, 100));
    assert_eq!(answer.interrupts, interrupt::OFS | interrupt::PSS);
    bench.fill(DATA, &[0xee; 2048]);
    let answer = bench.run(Frame::new(0x25, 1, 2), 2048);
    assert_eq!((answer.end(), answer.moved), (GOOD, 1024), "longer is no harm");
    assert_eq!(bench.data(DATA + 1024, 1024), [0xee; 1024]);
    // Odd regions: what lies between them stays.
    bench.fill(DATA, &[0xee; 2048]);
    bench.prepare(0, Frame::new(0x25, 1, 1), &[(DATA + 1, 255), (DATA + 257, 257)]);
    bench.set_port(port::CI, 1);
    assert_eq!(bench.answer().end(), GOOD);
    let data = bench.data(DATA, 515);
    assert_eq!(
        (data[0], data[1], data[255], data[256], data[257], data[513], data[514]),
        (0xee, 1, 1, 0xee, 1, 1, 0xee)
    );
}

#[test]
fn a_command_of_crumbs_is_done_in_steps() {
    let bed = bed();
    let bench = Bench::disk(&bed);
    // 60,000 regions of 2 bytes, every other word: the table reaches far into where other tables would be.
    let mut table = Vec::new();
    for i in 0..60_000u64 {
        table.extend_from_slice(&(0x80_0000 + 4 * i).to_le_bytes());
        table.extend_from_slice(&(1u64 << 32).to_le_bytes());
    }
    bench.prepare(0, Frame::new(0x25, 1, 234), &[]);
    bench.fill(TABLES + 0x80, &table);
    bench.memory.write_obj(60_000u32 << 16 | 5, GuestAddress(LIST)).unwrap();
    bench.set_port(port::CI, 1);
    let answer = bench.answer();
    assert_eq!((answer.end(), answer.moved), (GOOD, 234 * 512));
    let accesses = bed.contents.accesses();
    assert!(accesses.len() > 10, "{accesses:?}");
    assert_eq!(bench.data(0x80_0000, 6), [1, 1, 0, 0, 1, 1]);
    let last = 0x80_0000 + 4 * (234 * 256 - 1);
    assert_eq!(bench.data(last, 6), [234, 234, 0, 0, 0, 0]);
}

#[test]
fn a_command_may_overwrite_itself() {
    let bed = bed();
    let bench = Bench::disk(&bed);
    for target in [LIST, FRAMES, TABLES] {
        bench.prepare(0, Frame::new(0x25, 77, 8), &[(target, 4096)]);
        bench.set_port(port::CI, 1);
        assert_eq!(bench.answer().end(), GOOD);
        assert_eq!(bench.data(target + 2048, 1), [81]);
    }
}

/// What a driver may do, as often as not nonsense.
#[derive(Clone, Debug)]
enum Deed {
    Write(u32, u32),
    Read(u32),
    Command { slot: u8, code: u8, lba: u64, count: u16, features: u16, flags: u32, regions: Vec<(u64, u32)> },
    Noise(u64, u64),
}

fn deeds() -> impl Strategy<Value = Deed> {
    let register = prop_oneof![
        Just(bits::GHC),
        Just(bits::IS),
        (0u32..0x40).prop_map(|r| PORTS + 4 * (r / 2)),
        0u32..0x500
    ];
    let values =
        prop_oneof![Just(u32::MAX), Just(cmd::FRE | cmd::ST), Just(cmd::FRE), Just(0), Just(1), any::<u32>()];
    let codes = prop_oneof![
        prop::sample::select(vec![
            0x25, 0x35, 0xc8, 0xca, 0x24, 0x34, 0x29, 0x60, 0x61, 0x64, 0xec, 0xef, 0x2f, 0x47, 0x06, 0xb0,
            0xc6, 0xea, 0x42
        ]),
        any::<u8>()
    ];
    let addresses = prop_oneof![DATA..DATA + 0x1000, 0..MEMORY_BYTES + 0x1000, Just(u64::MAX)];
    let regions = prop::collection::vec((addresses.clone(), 1u32..0x2000), 0..5);
    let lba = prop_oneof![0u64..2100, Just(0xc24f06), Just(0x10), any::<u64>()];
    let count = prop_oneof![0u16..20, any::<u16>()];
    let features = prop_oneof![0u16..20, Just(0xd0), Just(0xd5), any::<u16>()];
    let flags = prop_oneof![4 => Just(0u32), 1 => any::<u32>()];
    prop_oneof![
        2 => (register.clone(), values).prop_map(|(register, value)| Deed::Write(register, value)),
        1 => register.prop_map(Deed::Read),
        6 => (0u8..32, codes, lba, count, features, flags, regions).prop_map(
            |(slot, code, lba, count, features, flags, regions)| Deed::Command {
                slot, code, lba, count, features, flags, regions
            }
        ),
        1 => (LIST..TABLES + 0x1000, any::<u64>()).prop_map(|(at, value)| Deed::Noise(at, value)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn nothing_a_driver_does_is_the_hosts_end(deeds in prop::collection::vec(deeds(), 1..60)) {
        let bed = bed();
        let bench = Bench::disk(&bed);
        for deed in deeds {
            match deed {
                Deed::Write(register, value) => bench.put(register, value),
                Deed::Read(register) => {
                    bench.get(register);
                }
                Deed::Noise(at, value) => bench.memory.write_obj(value, GuestAddress(at)).unwrap(),
                Deed::Command { slot, code, lba, count, features, flags, regions } => {
                    let frame = Frame::new(code, lba & 0xffff_ffff_ffff, count).features(features);
                    bench.prepare_with(slot, frame, &regions, flags);
                    bench.set_port(port::SACT, 1 << slot);
                    bench.set_port(port::CI, 1 << slot);
                }
            }
        }
        bed.disk.drain();
        // Whatever it was, a reset brings the adapter back.
        bench.put(bits::GHC, bits::ghc::HR);
        prop_assert_eq!(bench.get(bits::GHC), bits::ghc::AE);
        bench.set_port(port::CLBU, 0);
        bench.set_port(port::FBU, 0);
        bench.start();
        prop_assert_eq!(bench.run(Frame::new(0xec, 0, 0), 512).end(), GOOD);
    }
}
