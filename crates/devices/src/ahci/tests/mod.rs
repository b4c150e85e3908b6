//! The adapter, driven as a driver does it.

mod atapi;
mod disk;
mod hostile;
mod queue;
mod registers;
mod reset;

use std::sync::Arc;

use block::DiskOptions;
use memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::bits::{cmd, fis, port};
use super::*;
use crate::host::{IrqLine, MsiSink};
use crate::pci::bits::{command, msi};
use crate::testing::disk::DiskBed;
use crate::testing::{Line, ManualClock, Messages};

/// Where the driver has its structures: command list, received frames, command tables, data.
const LIST: u64 = 0x1_0000;
const FRAMES: u64 = 0x2_0000;
const TABLES: u64 = 0x3_0000;
const TABLE_BYTES: u64 = 0x1000;
const DATA: u64 = 0x10_0000;
const MEMORY_BYTES: u64 = 16 << 20;

/// An adapter with one drive on port 0.
struct Bench {
    ahci: Arc<Ahci>,
    disk: Option<Arc<Disk>>,
    memory: GuestMemory,
    clock: Arc<ManualClock>,
    line: Arc<Line>,
    messages: Arc<Messages>,
}

/// A command frame.
#[derive(Clone, Copy)]
struct Frame([u8; 64]);

impl Frame {
    /// A command with 48-bit address and LBA bit.
    fn new(code: u8, lba: u64, count: u16) -> Self {
        let mut bytes = [0; 64];
        bytes[0] = fis::H2D;
        bytes[1] = fis::COMMAND;
        bytes[2] = code;
        let [l0, l1, l2, l3, l4, l5, ..] = lba.to_le_bytes();
        bytes[4..11].copy_from_slice(&[l0, l1, l2, 0x40, l3, l4, l5]);
        bytes[12..14].copy_from_slice(&count.to_le_bytes());
        Frame(bytes)
    }

    /// A command with a 28-bit address.
    fn short(code: u8, lba: u32, count: u8) -> Self {
        let mut frame = Frame::new(code, u64::from(lba & 0xff_ffff), count.into());
        frame.0[7] |= (lba >> 24) as u8;
        frame
    }

    /// A queued command.
    fn queued(code: u8, lba: u64, sectors: u16, tag: u8) -> Self {
        Frame::new(code, lba, u16::from(tag) << 3).features(sectors)
    }

    fn features(mut self, features: u16) -> Self {
        let [low, high] = features.to_le_bytes();
        self.0[3] = low;
        self.0[11] = high;
        self
    }

    fn device(mut self, device: u8) -> Self {
        self.0[7] |= device;
        self
    }

    /// Device control: SRST or nothing.
    fn control(control: u8) -> Self {
        let mut bytes = [0; 64];
        bytes[0] = fis::H2D;
        bytes[15] = control;
        Frame(bytes)
    }
}

impl Bench {
    fn new(drive: Option<Drive>, memory: &GuestMemory) -> Self {
        let clock = ManualClock::new(0);
        let disk = if let Some(Drive::Disk(disk, _)) = &drive { Some(disk.clone()) } else { None };
        let drives = vec![drive];
        let ahci = Arc::new(Ahci::new(Ahci::identity(), drives, memory.clone(), clock.clone()).unwrap());
        let (line, messages) = (Line::new(), Messages::new());
        ahci.function().connect_intx(line.clone() as Arc<dyn IrqLine>);
        ahci.function().connect_messages(messages.clone() as Arc<dyn MsiSink>);
        ahci.config_write(COMMAND as u16, &(command::MEMORY_SPACE | command::BUS_MASTER).to_le_bytes());
        Bench { ahci, disk, memory: memory.clone(), clock, line, messages }
    }

    /// With a disk of a bed, started.
    fn disk(bed: &DiskBed) -> Self {
        let bench = Bench::new(
            Some(Drive::Disk(bed.disk.clone(), DiskIdentity::disk("SERIAL 1".into()))),
            &bed.memory,
        );
        bench.start();
        bench
    }

    fn get(&self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.ahci.bar_read(5, register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn put(&self, register: u32, value: u32) {
        self.ahci.bar_write(5, register.into(), &value.to_le_bytes());
    }

    /// A register of port 0.
    fn port(&self, register: u32) -> u32 {
        self.get(PORTS + register)
    }

    fn set_port(&self, register: u32, value: u32) {
        self.put(PORTS + register, value);
    }

    /// What a driver does before the first command.
    fn start(&self) {
        self.put(super::bits::GHC, super::bits::ghc::AE | super::bits::ghc::IE);
        self.set_port(port::CLB, LIST as u32);
        self.set_port(port::FB, FRAMES as u32);
        self.set_port(port::CMD, cmd::FRE);
        self.set_port(port::SERR, u32::MAX);
        self.set_port(port::IE, u32::MAX);
        self.set_port(port::CMD, cmd::FRE | cmd::ST);
        self.fill(FRAMES, &[0; 256]);
    }

    /// Clears and sets ST, as drivers do after an error, and acknowledges interrupts.
    fn restart(&self) {
        self.set_port(port::CMD, cmd::FRE);
        self.acknowledge();
        self.set_port(port::CMD, cmd::FRE | cmd::ST);
    }

    /// Interrupts of port 0, acknowledged.
    fn acknowledge(&self) -> u32 {
        let status = self.port(port::IS);
        self.set_port(port::IS, status);
        self.put(super::bits::IS, 1);
        status
    }

    fn prepare_with(&self, slot: u8, frame: Frame, regions: &[(u64, u32)], flags: u32) {
        let table = TABLES + u64::from(slot) * TABLE_BYTES;
        self.memory.write_slice(&frame.0, GuestAddress(table)).unwrap();
        for (i, (address, len)) in regions.iter().enumerate() {
            let at = table + 0x80 + 16 * i as u64;
            self.memory.write_obj(*address, GuestAddress(at)).unwrap();
            self.memory.write_obj(u64::from(*len - 1) << 32, GuestAddress(at + 8)).unwrap();
        }
        let header = [(regions.len() as u32) << 16 | 5 | flags, 0xdead_beef, table as u32, 0];
        let at = LIST + u64::from(slot) * 32;
        self.memory.write_obj(header, GuestAddress(at)).unwrap();
    }

    fn prepare(&self, slot: u8, frame: Frame, regions: &[(u64, u32)]) {
        self.prepare_with(slot, frame, regions, 0);
    }

    /// Runs a command in slot 0 with a data region at [`DATA`].
    fn run(&self, frame: Frame, len: u32) -> Answer {
        let regions = [(DATA, len)];
        self.prepare(0, frame, if len == 0 { &[] } else { &regions });
        self.set_port(port::CI, 1);
        self.answer()
    }

    fn answer(&self) -> Answer {
        // Large requests run on the disk's own threads.
        self.disk.iter().for_each(|disk| disk.drain());
        let frame = self.frame::<20>(0x40);
        let answer = Answer {
            status: self.port(port::TFD) as u8,
            error: (self.port(port::TFD) >> 8) as u8,
            issue: self.port(port::CI),
            interrupts: self.acknowledge(),
            moved: self.memory.read_obj(GuestAddress(LIST + 4)).unwrap(),
            frame,
        };
        if answer.status & 1 != 0 {
            self.restart();
        }
        answer
    }

    /// A received frame, which is then wiped.
    fn frame<const LEN: usize>(&self, offset: u64) -> [u8; LEN] {
        let mut frame = [0; LEN];
        self.memory.read_slice(&mut frame, GuestAddress(FRAMES + offset)).unwrap();
        self.memory.write_slice(&[0; LEN], GuestAddress(FRAMES + offset)).unwrap();
        frame
    }

    fn data(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }

    fn fill(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// IDENTIFY DEVICE as words.
    fn identify(&self) -> Vec<u16> {
        let answer = self.run(Frame::new(0xec, 0, 0), 512);
        assert_eq!(answer.status, 0x50);
        words(&self.data(DATA, 512))
    }

    fn enable_msi(&self) {
        let at = self.ahci.function().with_config(|config| config.capability(5)).unwrap() as u16;
        self.ahci.config_write(at + 4, &0xfee0_0000u32.to_le_bytes());
        self.ahci.config_write(at + 12, &0x31u16.to_le_bytes());
        self.ahci.config_write(at + 2, &msi::ENABLE.to_le_bytes());
    }
}

/// How a command ended.
#[derive(Debug)]
struct Answer {
    status: u8,
    error: u8,
    issue: u32,
    interrupts: u32,
    moved: u32,
    /// The register frame.
    frame: [u8; 20],
}

impl Answer {
    fn lba(&self) -> u64 {
        let f = &self.frame;
        u64::from_le_bytes([f[4], f[5], f[6], f[8], f[9], f[10], 0, 0])
    }

    fn count(&self) -> u16 {
        u16::from_le_bytes([self.frame[12], self.frame[13]])
    }

    /// Status, error and whether the slot is free again.
    fn end(&self) -> (u8, u8, bool) {
        (self.status, self.error, self.issue == 0)
    }
}

const GOOD: (u8, u8, bool) = (0x50, 0, true);
/// The slot of a failed command stays issued until ST is cleared.
const ABORTED: (u8, u8, bool) = (0x51, 0x04, false);

fn words(bytes: &[u8]) -> Vec<u16> {
    bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect()
}

fn bed() -> DiskBed {
    DiskBed::new(MEMORY_BYTES, 2048, |_| ())
}

fn bed_with(change: impl FnOnce(&mut DiskOptions)) -> DiskBed {
    DiskBed::new(MEMORY_BYTES, 2048, change)
}
