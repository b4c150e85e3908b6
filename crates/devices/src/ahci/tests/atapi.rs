use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use super::super::bits::interrupt;
use super::*;

/// Answers with bytes of a pattern, or with a sense key; remembers commands.
#[derive(Default)]
struct Unit {
    commands: Mutex<Vec<[u8; 16]>>,
    resets: AtomicU32,
    memory: Mutex<Option<GuestMemory>>,
}

impl PacketDevice for Unit {
    fn execute(&self, packet: Packet) {
        self.commands.lock().unwrap().push(packet.cdb);
        let room: usize = packet.data.iter().map(|span| span.len).sum();
        let end = match packet.cdb[0] {
            0xa8 => {
                let memory = self.memory.lock().unwrap().clone().unwrap();
                let len = usize::from(packet.cdb[9]) * 16;
                let (span, moved) = (packet.data[0], len.min(room));
                memory.write_slice(&vec![0xcd; moved], span.address).unwrap();
                PacketEnd { transferred: moved as u64, overflow: len > room, result: Ok(()) }
            }
            0x00 => PacketEnd { transferred: 0, overflow: false, result: Ok(()) },
            key => PacketEnd { transferred: 0, overflow: false, result: Err(PacketError::Sense(key & 0xf)) },
        };
        (packet.done)(end);
    }

    fn reset(&self) {
        self.resets.fetch_add(1, Ordering::SeqCst);
    }
}

fn bench() -> (Bench, Arc<Unit>) {
    let memory = memory::join_regions(vec![memory::create_region("test", 0, MEMORY_BYTES).unwrap()]).unwrap();
    let unit = Arc::new(Unit::default());
    *unit.memory.lock().unwrap() = Some(memory.clone());
    let bench = Bench::new(Some(Drive::Packet(unit.clone(), DiskIdentity::dvd("DVD1".into()))), &memory);
    bench.start();
    (bench, unit)
}

fn packet(bench: &Bench, features: u16, limit: u16, cdb: [u8; 12], len: u32) -> Answer {
    let frame = Frame::new(0xa0, u64::from(limit) << 8, 0).features(features);
    let regions = [(DATA, len)];
    bench.prepare(0, frame, if len == 0 { &[] } else { &regions });
    bench.fill(TABLES + 0x40, &cdb);
    bench.set_port(port::CI, 1);
    bench.answer()
}

#[test]
fn shows_what_it_is() {
    let (bench, _) = bench();
    assert_eq!(bench.port(port::SIG), 0xeb14_0101);
    let answer = bench.run(Frame::new(0xec, 0, 0), 512);
    assert_eq!((answer.end(), answer.lba()), (ABORTED, 0xeb_1401), "not a disk");
    assert_eq!(bench.run(Frame::new(0xa1, 0, 0), 512).end(), GOOD);
    let id = words(&bench.data(DATA, 512));
    assert_eq!((id[0], id[82] & 0x10), (0x85c0, 0x10));
    assert_eq!(id[27], u16::from_be_bytes(*b"Ap"));
    assert_eq!(id[76] & 0x0100, 0, "no queue");
    assert_eq!(bench.run(Frame::new(0xef, 0, 0x42).features(3), 0).end(), GOOD);
    assert_eq!(bench.run(Frame::new(0xa1, 0, 0), 512).end(), GOOD);
    assert_eq!(words(&bench.data(DATA, 512))[88], 0x047f);
    assert_eq!(bench.run(Frame::new(0x25, 0, 1), 512).end(), ABORTED);
    bench.prepare(0, Frame::queued(0x60, 0, 1, 0), &[(DATA, 512)]);
    bench.set_port(port::CI, 1);
    assert_eq!(bench.port(port::TFD), 0x0451);
}

#[test]
fn packets_by_dma_and_pio() {
    let (bench, unit) = bench();
    let read = [0xa8, 0, 0, 0, 0, 7, 0, 0, 0, 4, 0, 0];
    let answer = packet(&bench, 1, 0, read, 100);
    assert_eq!((answer.end(), answer.moved, answer.count()), (GOOD, 64, 3));
    assert_eq!(answer.interrupts, interrupt::DHRS, "less than there is room for");
    assert_eq!(bench.data(DATA, 65), [vec![0xcd; 64], vec![0]].concat());
    let answer = packet(&bench, 1, 0, read, 40);
    assert_eq!((answer.end(), answer.moved), (GOOD, 40));
    assert_eq!(answer.interrupts, interrupt::DHRS | interrupt::OFS);
    let answer = packet(&bench, 0, 24, read, 64);
    assert_eq!((answer.end(), answer.moved), (GOOD, 64));
    assert_eq!(answer.interrupts, interrupt::DHRS | interrupt::PSS);
    assert_eq!(bench.frame::<20>(0x20)[16..18], [16, 0], "the last of three blocks");
    let answer = packet(&bench, 0, 0, [0; 12], 0);
    assert_eq!((answer.end(), answer.interrupts), (GOOD, interrupt::DHRS));
    let commands = unit.commands.lock().unwrap();
    assert_eq!((commands.len(), &commands[0][..12]), (4, &read[..]));
}

#[test]
fn sense_keys_come_in_the_error_register() {
    let (bench, unit) = bench();
    let answer = packet(&bench, 1, 0, [0x12; 12], 64);
    assert_eq!(answer.end(), (0x51, 0x20, false), "not ready");
    assert_eq!(answer.interrupts, interrupt::DHRS | interrupt::TFES);
    assert_eq!(packet(&bench, 1, 0, [0x15; 12], 64).end(), (0x51, 0x54, false), "illegal request");
    let before = unit.resets.load(Ordering::SeqCst);
    let answer = bench.run(Frame::new(0x08, 0, 0), 0);
    assert_eq!((answer.lba(), answer.issue), (0xeb_1401, 0), "device reset");
    assert_eq!(unit.resets.load(Ordering::SeqCst), before + 1);
}
