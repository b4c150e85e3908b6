use std::io::ErrorKind;

use block::image::AtOnce;
use block::{DiskOptions, ErrorPolicy, SectorSize};
use vm_memory::{Bytes, GuestAddress};

use super::bits::{feature, request, status};
use super::*;
use crate::pci::{PciDevice, bits as pci_bits};
use crate::testing::disk::DiskBed;
use crate::virtio::bits::{common, feature as transport, status as device_status};
use crate::virtio::pci::VirtioPci;
use crate::virtio::queue::Layout;
use crate::virtio::queue::driver::{Piece, Ring};

const RING: u64 = 0x1_0000;
const HEADER: u64 = 0x4000;
const STATUS: u64 = 0x4100;
const DATA: u64 = 0x8000;
const SECTORS: u64 = 128;
const MODERN_BAR: usize = 4;

struct Bed {
    disk: DiskBed,
    device: VirtioPci<Blk>,
    ring: Ring,
}

fn bed(features: u64, change: impl FnOnce(&mut DiskOptions)) -> Bed {
    start(DiskBed::new(1 << 20, SECTORS, change), features)
}

/// A device with one queue whose driver has started it.
fn start(disk: DiskBed, features: u64) -> Bed {
    let config = BlkConfig { queues: 1, serial: "serial number 1".into() };
    let blk = Arc::new(Blk::new(disk.disk.clone(), disk.memory.clone(), config));
    let identity = VirtioPci::identity(&*blk);
    let device = VirtioPci::new(blk, identity, &disk.memory, true).unwrap();
    device.config_write(pci_bits::COMMAND as u16, &pci_bits::command::BUS_MASTER.to_le_bytes());
    let put = |register: u64, data: &[u8]| device.bar_write(MODERN_BAR, register, data);
    let features = features | transport::VERSION_1;
    for select in 0..2u32 {
        put(common::DRIVER_FEATURE_SELECT, &select.to_le_bytes());
        put(common::DRIVER_FEATURE, &((features >> (32 * select)) as u32).to_le_bytes());
    }
    put(common::DEVICE_STATUS, &[device_status::FEATURES_OK]);
    let ring = Ring::new(&disk.memory, Layout::Split, QUEUE_SIZE, RING);
    let registers = [common::QUEUE_DESC, common::QUEUE_DRIVER, common::QUEUE_DEVICE];
    for (register, address) in registers.into_iter().zip(ring.parts()) {
        put(register, &address.to_le_bytes());
    }
    put(common::QUEUE_ENABLE, &[1, 0]);
    put(common::DEVICE_STATUS, &[device_status::DRIVER_OK]);
    Bed { disk, device, ring }
}

impl Bed {
    fn write<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.disk.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.disk.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn header(&self, kind: u32, sector: u64) {
        self.write(HEADER, kind);
        self.write(HEADER + 8, sector);
        self.write(STATUS, 0xffu8);
    }

    fn notify(&self) {
        self.device.bar_write(MODERN_BAR, 0x3000, &[0, 0]);
    }

    /// A request with data in these places; returns its status and how many bytes were written.
    fn ask(&mut self, kind: u32, sector: u64, out: &[Piece], into: &[Piece]) -> (u8, u32) {
        self.header(kind, sector);
        let readable: Vec<_> = [(HEADER, 16)].into_iter().chain(out.iter().copied()).collect();
        let writable: Vec<_> = into.iter().copied().chain([(STATUS, 1)]).collect();
        self.ring.offer(&readable, &writable);
        self.notify();
        let (_, written) = self.ring.used().expect("an answer");
        (self.bytes(STATUS, 1)[0], written)
    }

    fn range(&self, index: u64, sector: u64, sectors: u32, flags: u32) {
        let at = DATA + 16 * index;
        self.write(at, sector);
        self.write(at + 8, sectors);
        self.write(at + 12, flags);
    }

    fn needs_reset(&self) -> bool {
        let mut data = [0];
        self.device.bar_read(MODERN_BAR, common::DEVICE_STATUS, &mut data);
        data[0] & device_status::DEVICE_NEEDS_RESET != 0
    }
}

const OK: u8 = status::OK;

#[test]
fn data_goes_both_ways_in_pieces_of_any_size() {
    let mut bed = bed(feature::FLUSH, |_| ());
    let pieces = [(DATA, 100), (DATA + 0x1000, 1), (DATA + 0x2000, 923)];
    assert_eq!(bed.ask(request::IN, 5, &[], &pieces), (OK, 1025));
    assert_eq!([bed.bytes(DATA, 100), bed.bytes(DATA + 0x1000, 1)], [vec![5; 100], vec![5]]);
    let last = bed.bytes(DATA + 0x2000, 923);
    assert_eq!((&last[..411], &last[411..]), (&[5; 411][..], &[6; 512][..]));

    bed.disk.memory.write_slice(&[0xaa; 1024], GuestAddress(DATA)).unwrap();
    assert_eq!(bed.ask(request::OUT, 126, &[(DATA, 1), (DATA + 1, 1023)], &[]), (OK, 1));
    assert_eq!(bed.disk.contents.bytes()[126 * 512..], [0xaa; 1024]);
    assert_eq!(bed.ask(request::FLUSH, 0, &[], &[]), (OK, 1));
    assert_eq!(bed.disk.contents.accesses(), ["read a00+400", "write fc00+400", "flush 0+0"]);
}

#[test]
fn the_header_and_the_status_may_be_anywhere() {
    let mut bed = bed(feature::FLUSH, |_| ());
    bed.header(request::OUT, 1);
    bed.disk.memory.write_slice(&[0x77; 512], GuestAddress(HEADER + 16)).unwrap();
    // Header and data in one piece, the header torn, and a status behind an empty piece.
    bed.ring.offer(&[(HEADER, 3), (HEADER + 3, 13 + 512)], &[(STATUS, 1), (STATUS, 0)]);
    bed.notify();
    assert!(bed.ring.used().is_some());
    assert_eq!(bed.bytes(STATUS, 1), [OK]);
    assert_eq!(bed.disk.contents.bytes()[512..1024], [0x77; 512]);
    // The status at the end of the data.
    bed.header(request::IN, 1);
    bed.ring.offer(&[(HEADER, 16)], &[(DATA, 513)]);
    bed.notify();
    assert_eq!(bed.ring.used().map(|(_, written)| written), Some(513));
    assert_eq!(bed.bytes(DATA, 513), [vec![0x77; 512], vec![OK]].concat());
}

#[test]
fn requests_that_cannot_be_done_fail_alone() {
    let mut bed = bed(feature::FLUSH, |_| ());
    let error = (status::IOERR, 1);
    assert_eq!(bed.ask(request::IN, 127, &[], &[(DATA, 1024)]), error, "over the end");
    assert_eq!(bed.ask(request::IN, u64::MAX, &[], &[(DATA, 512)]), error);
    assert_eq!(bed.ask(request::IN, u64::MAX / 512 + 1, &[], &[(DATA, 512)]), error, "wraps");
    assert_eq!(bed.ask(request::IN, 0, &[], &[(DATA, 511)]), error, "part of a sector");
    assert_eq!(bed.ask(request::IN, 0, &[], &[(1 << 20, 512)]), error, "beyond memory");
    assert_eq!(bed.ask(request::OUT, 0, &[((1 << 20) - 256, 512)], &[]), error);
    assert_eq!(bed.ask(77, 0, &[], &[]), (status::UNSUPP, 1));
    assert!(bed.disk.contents.accesses().is_empty());
    assert!(!bed.needs_reset());
    assert_eq!(bed.ask(request::IN, 0, &[], &[(DATA, 512)]).0, OK);
}

#[test]
fn requests_without_header_or_status_break_the_device() {
    for (readable, writable) in [(&[(HEADER, 15)][..], &[(STATUS, 1)][..]), (&[(HEADER, 16)], &[])] {
        let mut bed = bed(feature::FLUSH, |_| ());
        bed.header(request::FLUSH, 0);
        bed.ring.offer(readable, writable);
        bed.notify();
        assert!(bed.ring.used().is_none() && bed.needs_reset());
    }
}

#[test]
fn writes_are_stable_at_once_for_a_driver_that_cannot_flush() {
    let mut bed = bed(0, |_| ());
    assert_eq!(bed.ask(request::OUT, 0, &[(DATA, 512)], &[]).0, OK);
    assert_eq!(bed.disk.contents.accesses(), ["write stable 0+200"]);
}

#[test]
fn the_driver_turns_the_write_cache_off_and_on() {
    let mut bed = bed(feature::FLUSH | feature::CONFIG_WCE, |_| ());
    for (on, expected) in [(0u8, "write stable 0+200"), (1, "write 0+200")] {
        bed.device.bar_write(MODERN_BAR, 0x2000 + CONFIG_WRITEBACK, &[on]);
        let mut now = [9];
        bed.device.bar_read(MODERN_BAR, 0x2000 + CONFIG_WRITEBACK, &mut now);
        assert_eq!(now[0], on);
        bed.ask(request::OUT, 0, &[(DATA, 512)], &[]);
        assert_eq!(bed.disk.contents.accesses(), [expected]);
    }
}

#[test]
fn ranges_are_discarded_and_zeroed_all_or_none() {
    let mut bed = bed(feature::FLUSH | feature::DISCARD | feature::WRITE_ZEROES, |_| ());
    bed.range(0, 8, 8, 0);
    bed.range(1, 64, 2, 0);
    assert_eq!(bed.ask(request::DISCARD, 0, &[(DATA, 20), (DATA + 20, 12)], &[]), (OK, 1));
    bed.range(1, 0, 1, request::UNMAP);
    assert_eq!(bed.ask(request::WRITE_ZEROES, 0, &[(DATA, 32)], &[]), (OK, 1));
    let accesses = bed.disk.contents.accesses();
    assert_eq!(accesses, ["discard 1000+1000", "discard 8000+400", "zero 1000+1000", "unmap 0+200"]);
    bed.range(0, 0, 1, 2);
    assert_eq!(bed.ask(request::WRITE_ZEROES, 0, &[(DATA, 16)], &[]).0, status::UNSUPP, "a flag");
    bed.range(0, 0, 1, request::UNMAP);
    assert_eq!(bed.ask(request::DISCARD, 0, &[(DATA, 16)], &[]).0, status::UNSUPP);
    for (sector, sectors) in [(127, 2), (u64::MAX, 1), (u64::MAX / 512, 2), (0, u32::MAX)] {
        bed.range(0, 0, 1, 0);
        bed.range(1, sector, sectors, 0);
        assert_eq!(bed.ask(request::DISCARD, 0, &[(DATA, 32)], &[]).0, status::IOERR);
    }
    for len in [0, 15, 17, 16 * (MAX_RANGES + 1)] {
        assert_eq!(bed.ask(request::DISCARD, 0, &[(DATA, len)], &[]).0, status::IOERR, "{len}");
    }
    assert!(bed.disk.contents.accesses().is_empty(), "nothing of a request that is refused");
    bed.range(0, 0, 1, 0);
    bed.range(1, 8, 1, 0);
    bed.disk.contents.fail(ErrorKind::Unsupported);
    assert_eq!(bed.ask(request::DISCARD, 0, &[(DATA, 32)], &[]).0, status::UNSUPP, "one part fails");
}

#[test]
fn the_serial_number() {
    let mut bed = bed(feature::FLUSH, |_| ());
    assert_eq!(bed.ask(request::GET_ID, 0, &[], &[(DATA, 3), (DATA + 3, 17)]), (OK, 21));
    assert_eq!(bed.bytes(DATA, 20), *b"serial number 1\0\0\0\0\0");
    assert_eq!(bed.ask(request::GET_ID, 0, &[], &[(DATA, 4)]), (OK, 5));
    assert_eq!(bed.ask(request::GET_ID, 0, &[], &[(1 << 20, 20)]), (status::IOERR, 1));
}

#[test]
fn the_configuration_says_what_the_disk_is() {
    let sectors = SectorSize { logical: 4096, physical: 16384 };
    let bed = bed(feature::FLUSH, |options| options.sectors = Some(sectors));
    let mut data = [0; 64];
    bed.device.bar_read(MODERN_BAR, 0x2000, &mut data);
    let word = |at: usize| u32::from_le_bytes(data[at..at + 4].try_into().unwrap());
    assert_eq!(u64::from(word(0)), SECTORS);
    assert_eq!((word(20), data[24]), (4096, 2), "block size, physical block exponent");
    assert_eq!(word(36) % 8, 0, "whole blocks are discarded");
    assert_eq!((word(44), data[56]), (32, 1));
    let features = bed.device.device().features();
    let with = |change: fn(&mut DiskOptions)| self::bed(0, change).device.device().features();
    assert_eq!(features & feature::RO, 0);
    assert_eq!(with(|o| o.read_only = true) & (feature::RO | feature::DISCARD), feature::RO);
    assert_eq!(with(|o| o.discard = false) & feature::DISCARD, 0);
    assert_eq!(with(|o| o.cache = block::CacheMode::Writethrough) & feature::FLUSH, 0);
}

#[test]
fn a_read_only_disk_is_not_written() {
    let mut bed = bed(feature::FLUSH, |options| options.read_only = true);
    assert_eq!(bed.ask(request::OUT, 0, &[(DATA, 512)], &[]).0, status::IOERR);
    bed.range(0, 0, 1, 0);
    for kind in [request::DISCARD, request::WRITE_ZEROES] {
        assert_eq!(bed.ask(kind, 0, &[(DATA, 16)], &[]).0, status::UNSUPP);
    }
    assert_eq!(bed.disk.contents.accesses(), [""; 0]);
    assert_eq!(bed.ask(request::IN, 3, &[], &[(DATA, 512)]).0, OK);
}

#[test]
fn a_hosts_failure_is_told_or_waits_for_help() {
    let mut bed = bed(feature::FLUSH, |options| options.write_errors = ErrorPolicy::Report);
    bed.disk.contents.fail(ErrorKind::StorageFull);
    assert_eq!(bed.ask(request::OUT, 0, &[(DATA, 512)], &[]).0, status::IOERR);

    let mut bed = self::bed(feature::FLUSH, |_| ());
    bed.disk.contents.fail(ErrorKind::StorageFull);
    bed.header(request::OUT, 9);
    bed.ring.offer(&[(HEADER, 16), (DATA, 512)], &[(STATUS, 1)]);
    bed.notify();
    assert_eq!(bed.ring.used(), None, "held back");
    assert_eq!(bed.disk.troubles.0.lock().unwrap().len(), 1);
    bed.disk.disk.retry();
    bed.disk.disk.drain();
    assert!(bed.ring.used().is_some());
    assert_eq!(bed.bytes(STATUS, 1), [OK]);
}

#[test]
fn a_reset_waits_for_requests_and_later_ones_do_not_answer() {
    let disk = DiskBed::with(AtOnce::Never, 1 << 20, SECTORS, |_| ());
    let mut bed = start(disk, feature::FLUSH);
    for sector in 0..64 {
        bed.header(request::IN, sector);
        bed.ring.offer(&[(HEADER, 16)], &[(DATA + 512 * sector, 512), (STATUS, 1)]);
        bed.notify();
    }
    bed.device.bar_write(MODERN_BAR, common::DEVICE_STATUS, &[0]);
    assert_eq!(bed.disk.contents.accesses().len(), 64, "all have ended");
    let answered = std::iter::from_fn(|| bed.ring.used()).count();
    assert_eq!(answered, 64);
}

/// A write that the host has failed and that waits for help is given up with the controller's reset: it is not tried again.
#[test]
fn a_reset_gives_up_what_is_held_back() {
    let mut bed = bed(feature::FLUSH, |_| ());
    bed.disk.contents.fail(ErrorKind::StorageFull);
    bed.header(request::IN, 9);
    bed.ring.offer(&[(HEADER, 16)], &[(DATA, 512), (STATUS, 1)]);
    bed.notify();
    assert_eq!(bed.disk.troubles.0.lock().unwrap().len(), 1);
    bed.device.bar_write(MODERN_BAR, common::DEVICE_STATUS, &[0]);
    bed.disk.contents.accesses();
    bed.disk.disk.retry();
    bed.disk.disk.drain();
    assert!(bed.disk.contents.accesses().is_empty(), "nothing is tried again");
    assert_eq!(bed.bytes(DATA, 512), [0; 512]);
}
