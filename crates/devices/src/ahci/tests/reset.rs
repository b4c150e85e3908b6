//! Resets and errors with commands on their way, and snapshots.

use std::io;
use std::sync::{Condvar, Mutex};

use block::{ErrorPolicy, Image, Source};
use vm_memory::VolatileSlice;

use super::super::bits::{self, ghc, interrupt};
use super::*;
use crate::snapshot::Snapshot;
use crate::testing::disk::Troubles;

/// Requests that are inside an image, and which may leave it.
#[derive(Default)]
struct Gate {
    /// Requests inside; whether they may leave; whether those at odd sectors fail.
    state: Mutex<(usize, bool, bool)>,
    changed: Condvar,
}

impl Gate {
    fn pass(&self, offset: u64) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        state.0 += 1;
        self.changed.notify_all();
        let fails = state.2 && offset / 512 % 2 == 1;
        if !fails {
            state = self.changed.wait_while(state, |(_, open, _)| !*open).unwrap();
        }
        state.0 -= 1;
        if fails { Err(io::ErrorKind::Other.into()) } else { Ok(()) }
    }

    /// Waits until so many requests are inside.
    fn wait_for(&self, count: usize) {
        let state = self.state.lock().unwrap();
        drop(self.changed.wait_while(state, |(inside, ..)| *inside < count).unwrap());
    }

    fn set(&self, open: bool) {
        self.state.lock().unwrap().1 = open;
        self.changed.notify_all();
    }

    fn fail_odd(&self) {
        self.state.lock().unwrap().2 = true;
    }
}

/// A disk whose sectors all are 5Ah, behind a gate.
struct GatedImage(Arc<Gate>);

impl Image for GatedImage {
    fn size(&self) -> u64 {
        1 << 20
    }

    fn read(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.0.pass(offset)?;
        buffers.iter().for_each(|buffer| buffer.copy_from(&vec![0x5au8; buffer.len()]));
        Ok(())
    }

    fn write(&self, offset: u64, _buffers: &[VolatileSlice<'_>], _stable: bool) -> io::Result<()> {
        self.0.pass(offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.0.pass(0)
    }

    fn discard(&self, offset: u64, _len: u64) -> io::Result<()> {
        self.0.pass(offset)
    }

    fn write_zeroes(&self, offset: u64, _len: u64, _unmap: bool) -> io::Result<()> {
        self.0.pass(offset)
    }
}

/// A started adapter whose disk is behind a closed gate.
fn gated() -> (Bench, Arc<Gate>) {
    let memory = memory::join_regions(vec![memory::create_region("test", 0, MEMORY_BYTES).unwrap()]).unwrap();
    let gate = Arc::new(Gate::default());
    let mut options = DiskOptions::new(Source::Ram(0));
    options.read_errors = ErrorPolicy::Report;
    let image = Box::new(GatedImage(gate.clone()));
    let disk = Disk::new(image, memory.clone(), options, Arc::new(Troubles::default())).unwrap();
    let drive = Drive::Disk(Arc::new(disk), DiskIdentity::disk("S".into()));
    let bench = Bench::new(Some(drive), &memory);
    bench.start();
    (bench, gate)
}

impl Bench {
    /// Starts a read of a sector in slot 0, as a plain command.
    fn start_read(&self, lba: u64) {
        self.prepare(0, Frame::new(0x25, lba, 1), &[(DATA, 512)]);
        self.set_port(port::CI, 1);
    }

    /// Starts queued reads of sectors in slots of the same number.
    fn start_queued(&self, slots: &[u8]) {
        let mut mask = 0;
        for slot in slots {
            let region = (DATA + u64::from(*slot) * 0x1000, 512);
            self.prepare(*slot, Frame::queued(0x60, u64::from(*slot), 1, *slot), &[region]);
            mask |= 1 << slot;
        }
        self.set_port(port::SACT, mask);
        self.set_port(port::CI, mask);
    }

    fn finish(&self, gate: &Gate) {
        gate.set(true);
        self.disk.as_ref().unwrap().drain();
    }

    fn runs(&self) -> bool {
        self.port(port::CMD) & cmd::CR != 0
    }
}

#[test]
fn clearing_st_leaves_cr_until_commands_have_ended() {
    let (bench, gate) = gated();
    bench.start_read(2);
    gate.wait_for(1);
    assert_eq!((bench.port(port::TFD), bench.port(port::CI)), (0xd0, 1), "busy");
    bench.set_port(port::CMD, cmd::FRE);
    assert_eq!((bench.port(port::CI), bench.runs()), (0, true));
    bench.set_port(port::CMD, cmd::FRE | cmd::CLO);
    assert_eq!(bench.port(port::TFD), 0x50, "command list override");
    // A driver that does not wait: its command does.
    bench.set_port(port::CMD, cmd::FRE | cmd::ST);
    bench.prepare(1, Frame::new(0xec, 0, 0), &[(DATA + 0x1000, 512)]);
    bench.set_port(port::CI, 2);
    assert_eq!((bench.port(port::CI), bench.port(port::IS)), (2, 0));
    bench.finish(&gate);
    assert_eq!((bench.port(port::CI), bench.port(port::IS)), (0, interrupt::PSS), "only of the new one");
    assert_eq!(bench.frame::<1>(0x40), [0]);
    bench.set_port(port::CMD, cmd::FRE);
    assert!(!bench.runs());
    assert_eq!(bench.memory.read_obj::<u32>(GuestAddress(LIST + 4)).unwrap(), 0xdead_beef);
}

#[test]
fn a_disk_that_was_left_busy_becomes_ready() {
    let (bench, gate) = gated();
    bench.start_read(2);
    gate.wait_for(1);
    bench.set_port(port::CMD, cmd::FRE);
    assert_eq!(bench.port(port::TFD), 0xd0);
    bench.finish(&gate);
    assert_eq!((bench.port(port::TFD), bench.port(port::IS), bench.runs()), (0x50, 0, false));
}

#[test]
fn after_comreset_the_signature_waits_for_commands() {
    let (bench, gate) = gated();
    bench.start_queued(&[0, 2, 4]);
    gate.wait_for(3);
    assert_eq!((bench.port(port::CI), bench.port(port::SACT)), (0, 0x15));
    bench.set_port(port::CMD, cmd::FRE);
    bench.set_port(port::SCTL, 0x301);
    assert_eq!((bench.port(port::SSTS), bench.port(port::TFD)), (0, 0x7f));
    bench.set_port(port::SCTL, 0x310);
    assert_eq!(bench.port(port::SSTS), 0x113, "no faster than allowed");
    assert_eq!((bench.port(port::TFD), bench.port(port::SIG)), (0x80, u32::MAX));
    assert_eq!(bench.port(port::SERR), 1 << 26 | 1 << 16);
    assert_eq!(bench.port(port::IS), interrupt::PCS | interrupt::PRCS);
    bench.finish(&gate);
    assert_eq!((bench.port(port::TFD), bench.port(port::SIG)), (0x0150, 0x0101));
    assert_eq!((bench.frame::<1>(0x58), bench.port(port::SACT)), ([0], 0), "no end of the old ones");
    bench.set_port(port::SCTL, 4);
    assert_eq!((bench.port(port::SSTS), bench.port(port::TFD)), (4, 0x7f), "switched off");
    bench.set_port(port::SCTL, 0);
    assert_eq!((bench.port(port::SSTS), bench.port(port::TFD)), (0x133, 0x0150));
}

#[test]
fn an_hba_reset_is_over_when_commands_have_ended() {
    let (bench, gate) = gated();
    bench.start_read(0);
    gate.wait_for(1);
    bench.put(bits::GHC, ghc::HR | ghc::IE);
    assert_eq!(bench.get(bits::GHC), ghc::AE | ghc::HR);
    assert_eq!((bench.port(port::CLB), bench.port(port::FB)), (LIST as u32, FRAMES as u32));
    assert_eq!((bench.port(port::IE), bench.port(port::CI), bench.port(port::IS)), (0, 0, interrupt::PCS));
    bench.finish(&gate);
    assert_eq!(bench.get(bits::GHC), ghc::AE);
    assert_eq!(bench.port(port::TFD), 0x80, "the signature waits for FRE");
    bench.start();
    assert_eq!(bench.port(port::SIG), 0x0101);
    assert_eq!(bench.run(Frame::new(0xec, 0, 0), 512).end(), GOOD);
}

#[test]
fn software_reset_by_two_frames() {
    let bed = bed();
    let bench = Bench::disk(&bed);
    // Look-ahead off, and features stay over a software reset unless told otherwise.
    bench.run(Frame::new(0xef, 0, 0).features(0x55), 0);
    let reset = || {
        bench.prepare_with(0, Frame::control(4), &[], 1 << 8 | 1 << 10);
        bench.set_port(port::CI, 1);
        assert_eq!((bench.port(port::CI), bench.port(port::TFD) & 0x80), (0, 0));
        assert_eq!(bench.frame::<1>(0x40), [0], "not before the second");
        bench.prepare(0, Frame::control(0), &[]);
        bench.set_port(port::CI, 1);
        assert_eq!((bench.port(port::CI), bench.port(port::TFD)), (0, 0x0150));
        assert_eq!(bench.frame::<16>(0x40), [0x34, 0, 0x50, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
    };
    bench.frame::<20>(0x40);
    reset();
    assert_eq!(bench.identify()[85] & 0x40, 0);
    bench.run(Frame::new(0xef, 0, 0).features(0xcc), 0);
    bench.frame::<20>(0x40);
    reset();
    assert_eq!(bench.identify()[85] & 0x40, 0x40, "back to its default");
    // A control frame that changes nothing just ends.
    bench.prepare(0, Frame::control(0), &[]);
    bench.set_port(port::CI, 1);
    assert_eq!((bench.port(port::CI), bench.frame::<1>(0x40)), (0, [0]));
}

#[test]
fn software_reset_ends_what_is_queued() {
    let (bench, gate) = gated();
    bench.start_queued(&[1, 2]);
    gate.wait_for(2);
    bench.frame::<20>(0x40);
    bench.prepare_with(0, Frame::control(4), &[], 1 << 10);
    bench.set_port(port::CI, 1);
    bench.prepare(0, Frame::control(0), &[]);
    bench.set_port(port::CI, 1);
    assert_eq!(bench.port(port::CI), 1, "waits for what is on its way");
    bench.finish(&gate);
    assert_eq!((bench.port(port::CI), bench.port(port::TFD)), (0, 0x0150));
    assert_eq!((bench.frame::<1>(0x58), bench.port(port::IS)), ([0], 0));
}

#[test]
fn the_others_do_not_end_when_a_queued_command_has_failed() {
    let (bench, gate) = gated();
    gate.fail_odd();
    bench.start_queued(&[0, 2]);
    gate.wait_for(2);
    bench.start_queued(&[7]);
    // Its failure comes on another thread, and the port asks for an interrupt then.
    while bench.port(port::IS) & interrupt::TFES == 0 {
        std::thread::yield_now();
    }
    assert_eq!((bench.port(port::SACT), bench.port(port::TFD)), (0x85, 0x4051));
    assert_eq!(bench.frame::<8>(0x58), [0xa1, 0x40, 0x51, 0x40, 0, 0, 0, 0]);
    bench.set_port(port::CMD, cmd::FRE);
    assert!(bench.runs());
    bench.finish(&gate);
    assert!(!bench.runs());
    assert_eq!((bench.port(port::TFD), bench.frame::<1>(0x58)), (0x4051, [0]));
    bench.set_port(port::CMD, cmd::FRE | cmd::ST);
    assert_eq!(bench.run(Frame::new(0x2f, 0x10, 1), 512).end(), GOOD);
    assert_eq!(bench.data(DATA, 1), [7]);
}

#[test]
fn a_plain_command_waits_for_the_queue() {
    let (bench, gate) = gated();
    bench.start_queued(&[4, 6]);
    gate.wait_for(2);
    bench.prepare(5, Frame::new(0xec, 0, 0), &[(DATA + 0x8000, 512)]);
    bench.set_port(port::CI, 1 << 5);
    assert_eq!((bench.port(port::CI), bench.port(port::SACT)), (1 << 5, 0x50));
    bench.finish(&gate);
    assert_eq!((bench.port(port::CI), bench.port(port::SACT)), (0, 0));
    assert_eq!(bench.data(DATA + 0x8000, 1), [0x40]);
}

#[test]
fn a_tag_in_use_is_refused() {
    let (bench, gate) = gated();
    bench.start_queued(&[3]);
    gate.wait_for(1);
    bench.set_port(port::CI, 1 << 3);
    assert_eq!((bench.port(port::TFD), bench.port(port::SACT)), (0x0451, 1 << 3));
    bench.set_port(port::CMD, cmd::FRE);
    assert!(bench.runs(), "the first one is on its way");
    bench.finish(&gate);
    assert!(!bench.runs());
}

#[test]
fn a_command_of_many_steps_ends_with_its_port() {
    let (bench, gate) = gated();
    bench.prepare(0, Frame::new(0x42, 0, 2048), &[]);
    bench.set_port(port::CI, 1);
    gate.wait_for(1);
    bench.set_port(port::CMD, cmd::FRE);
    bench.finish(&gate);
    assert!(!bench.runs());
    let stats = bench.disk.as_ref().unwrap().stats().list();
    let reads = stats.iter().find(|(name, _)| name == "read operations").unwrap().1;
    assert_eq!(reads, 1, "of four");
}

#[test]
fn what_the_host_could_not_do_is_done_when_it_is_tried_again() {
    let bed = bed();
    let bench = Bench::disk(&bed);
    bed.contents.fail(io::ErrorKind::StorageFull);
    bench.prepare(0, Frame::new(0x35, 3, 1), &[(DATA, 512)]);
    bench.set_port(port::CI, 1);
    assert_eq!(bed.troubles.0.lock().unwrap().len(), 1);
    assert_eq!((bench.port(port::CI), bench.port(port::TFD)), (1, 0xd0));
    bed.disk.retry();
    assert_eq!(bench.answer().end(), GOOD);
}

#[test]
fn snapshots_hold_registers_and_what_was_set() {
    let bed = bed();
    let bench = Bench::disk(&bed);
    bench.clock.advance(7 * 3600 * 1_000_000_000);
    bench.run(Frame::new(0xc6, 0, 4), 0);
    bench.run(Frame::new(0x25, 0, 9), 9 * 512);
    bench.prepare(0, Frame::new(0xea, 0, 0), &[]);
    bench.set_port(port::CI, 1);
    let saved = bench.ahci.snapshot().unwrap();
    let other = Bench::disk(&bed);
    other.put(bits::GHC, 0);
    other.ahci.load_snapshot(&saved).unwrap();
    assert!(other.line.level(), "the interrupt is still to be acknowledged");
    assert_eq!(other.acknowledge(), interrupt::DHRS);
    assert_eq!(other.identify()[59], 0x0104);
    assert_eq!(other.run(Frame::new(0x2f, 4 | 1 << 8, 1), 512).end(), GOOD);
    assert_eq!(other.data(DATA + 16, 1), [7], "hours");
    assert_eq!(other.data(DATA + 40, 1), [9], "sectors read");
    // Another kind of device, another number of ports, impossible slots.
    let empty = Bench::new(None, &bed.memory);
    assert!(empty.ahci.load_snapshot(&saved).is_err());
    let mut more = bench.ahci.save();
    more.ports.pop();
    assert!(other.ahci.restore(more).is_err());
    let mut json = saved.clone();
    json.state["ports"][0]["registers"]["slot"] = 99.into();
    assert!(other.ahci.load_snapshot(&json).is_err());
    let mut json = saved;
    json.state["ports"][0]["device"]["Disk"]["settings"]["multiple"] = 3.into();
    assert!(other.ahci.load_snapshot(&json).is_err());
}

#[test]
fn commands_on_their_way_are_done_again_after_a_snapshot() {
    let (bench, gate) = gated();
    bench.start_queued(&[1, 3]);
    gate.wait_for(2);
    let queued = bench.ahci.snapshot().unwrap();
    bench.finish(&gate);
    gate.set(false);
    bench.restart();
    bench.start_read(2);
    gate.wait_for(1);
    let plain = bench.ahci.snapshot().unwrap();
    bench.finish(&gate);
    for (saved, address) in [(queued, DATA + 0x3000), (plain, DATA)] {
        bench.fill(DATA, &[0; 0x4000]);
        let (other, gate) = gated();
        let whole = bench.data(0, DATA as usize);
        other.fill(0, &whole);
        other.ahci.load_snapshot(&saved).unwrap();
        assert_ne!(other.port(port::CI), 0);
        other.ahci.resume();
        other.finish(&gate);
        assert_eq!((other.port(port::CI), other.port(port::SACT), other.port(port::TFD)), (0, 0, 0x50));
        assert_eq!(other.data(address, 512), [0x5a; 512]);
    }
}
