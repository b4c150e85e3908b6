use std::io;

use block::ErrorPolicy;

use super::super::bits::interrupt;
use super::*;

impl Bench {
    /// Queues commands that have been prepared.
    fn queue(&self, slots: u32) {
        self.set_port(port::SACT, slots);
        self.set_port(port::CI, slots);
    }

    fn prepare_queued(&self, code: u8, lba: u64, sectors: u16, slot: u8) {
        let region = (DATA + u64::from(slot) * 0x1_0000, u32::from(sectors) * 512);
        self.prepare(slot, Frame::queued(code, lba, sectors, slot), &[region]);
    }
}

#[test]
fn queued_commands_end_with_set_device_bits() {
    let bed = bed();
    let bench = Bench::disk(&bed);
    for slot in 0..32 {
        bench.prepare_queued(0x60, u64::from(slot) * 3, 2, slot);
    }
    bench.queue(u32::MAX);
    assert_eq!((bench.port(port::CI), bench.port(port::SACT)), (0, 0));
    assert_eq!(bench.port(port::TFD), 0x50);
    assert_eq!(bench.acknowledge(), interrupt::SDBS, "the frame that accepts does not interrupt");
    for slot in 0..32 {
        assert_eq!(bench.data(DATA + u64::from(slot) * 0x1_0000, 512), [slot * 3; 512]);
    }
    assert_eq!(bench.frame::<8>(0x58), [0xa1, 0x40, 0x50, 0, 0, 0, 0, 0x80]);
    assert_eq!(bench.frame::<3>(0x40), [0x34, 0, 0x50]);
    let setup = bench.frame::<28>(0);
    assert_eq!((setup[0], setup[1], setup[4], &setup[20..24]), (0x41, 0x20, 31, &[0, 4, 0, 0][..]));
    bed.contents.accesses();
    bench.fill(DATA, &[0xc3; 512]);
    bench.prepare(0, Frame::queued(0x61, 40, 1, 0).device(0x80), &[(DATA, 512)]);
    bench.prepare(1, Frame::queued(0x61, 41, 1, 1), &[(DATA, 512)]);
    bench.queue(3);
    assert_eq!(bed.contents.accesses(), ["write stable 5000+200", "write 5200+200"]);
    assert_eq!(bed.contents.bytes()[40 * 512..42 * 512], [0xc3; 1024]);
}

#[test]
fn slots_are_taken_in_turn() {
    let bed = bed();
    let bench = Bench::disk(&bed);
    for (slot, lba) in [(3, 1), (30, 2), (31, 3)] {
        bench.prepare_queued(0x60, lba, 1, slot);
    }
    bench.queue(1 << 30);
    bench.prepare_queued(0x60, 4, 1, 0);
    // Both at once: after slot 30 comes 31, then 0, then 3.
    bench.queue(1 << 31 | 1 << 3 | 1);
    assert_eq!(bed.contents.accesses(), ["read 400+200", "read 600+200", "read 800+200", "read 200+200"]);
    assert_eq!(bench.port(port::CMD) >> 8 & 0x1f, 3, "current command slot");
}

#[test]
fn the_failure_of_one_ends_all_and_is_logged() {
    let bed = bed_with(|options| options.read_errors = ErrorPolicy::Report);
    let bench = Bench::disk(&bed);
    for slot in 0..4 {
        bench.prepare_queued(0x60, 100 + u64::from(slot), 1, slot);
    }
    bed.contents.fail(io::ErrorKind::Other);
    bench.set_port(port::SACT, 0xf);
    bench.set_port(port::CI, 1 << 2);
    assert_eq!(bench.frame::<8>(0x58), [0xa1, 0x40, 0x51, 0x40, 0, 0, 0, 0]);
    assert_eq!((bench.port(port::TFD), bench.port(port::SACT)), (0x4051, 0xf));
    assert_eq!(bench.port(port::IS), interrupt::SDBS | interrupt::TFES);
    bed.contents.accesses();
    bench.set_port(port::CI, 1 << 3);
    assert_eq!((bench.port(port::CI), bed.contents.accesses()), (1 << 3, vec![]), "the port has stopped");
    bench.restart();
    assert_eq!((bench.port(port::CI), bench.port(port::SACT)), (0, 0));
    assert_eq!(bench.run(Frame::new(0x2f, 0x10, 1), 512).end(), GOOD);
    let log = bench.data(DATA, 512);
    assert_eq!((log[0], log[2], log[3], log[4]), (2, 0x51, 0x40, 102));
    bench.queue(1 << 3);
    assert_eq!(bench.port(port::SACT), 0, "goes on");
    assert_eq!(bench.data(DATA + 0x3_0000, 1), [103]);
}

#[test]
fn bad_queued_commands_fail_by_the_queue() {
    let bed = bed();
    let bench = Bench::disk(&bed);
    let bad = [
        (Frame::queued(0x60, 2048, 1, 0), 0x10),
        (Frame::queued(0x60, 0, 0, 0), 0x10),
        (Frame::queued(0x60, 0, 1, 5), 0x04),
        (Frame::queued(0x63, 0, 1, 0), 0x04),
        (Frame::queued(0x65, 0, 1, 0), 0x04),
        (Frame::queued(0x64, 0, 1, 0), 0x04),
    ];
    for (frame, error) in bad {
        bench.prepare(0, frame, &[(DATA, 512)]);
        bench.queue(1);
        assert_eq!(bench.port(port::TFD), error << 8 | 0x51);
        assert_eq!((bench.port(port::CI), bench.port(port::SACT)), (0, 1));
        bench.restart();
    }
    assert_eq!(bed.contents.accesses(), [""; 0]);
}

#[test]
fn trim_in_the_queue() {
    let bed = bed();
    let bench = Bench::disk(&bed);
    bench.fill(DATA, &[0; 512]);
    bench.fill(DATA, &(64u64 | 32 << 48).to_le_bytes());
    let mut frame = Frame::queued(0x64, 0, 1, 7);
    frame.0[16] = 1;
    bench.prepare(7, frame, &[(DATA, 512)]);
    bench.queue(1 << 7);
    assert_eq!(bed.contents.accesses(), ["discard 8000+4000"]);
    assert_eq!((bench.port(port::SACT), bench.port(port::TFD)), (0, 0x50));
    assert_eq!(bench.frame::<8>(0x58)[4..], [0x80, 0, 0, 0]);
}
