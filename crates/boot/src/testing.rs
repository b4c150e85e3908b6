//! What the tests of this crate share: guests of any size, a typical platform, and readers of little-endian fields.

use engine::memory::{create_region, join_regions};
use engine::{GuestMemory, GuestRegion};
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress};

use crate::layout::MemoryLayout;
use crate::platform::{
    IntxPin, IntxRoute, PciRoot, PciSlot, Platform, Processor, SerialPort, SmbiosStrings, Topology,
};

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// Memory of a guest with this much RAM.
pub fn guest(total_bytes: u64) -> (MemoryLayout, GuestMemory) {
    let layout = MemoryLayout::new(total_bytes).unwrap();
    let regions: Vec<Arc<GuestRegion>> = layout
        .ram_ranges()
        .into_iter()
        .map(|range| create_region("test", range.start, range.end - range.start).unwrap())
        .collect();
    (layout, join_regions(regions).unwrap())
}

/// A platform with one PCI root, an LPC bridge at 1:0, com1, and two routed pins.
pub fn platform(total_bytes: u64, sockets: u32, cores: u32) -> Platform {
    let layout = MemoryLayout::new(total_bytes).unwrap();
    let routes = vec![
        IntxRoute { slot: 2, pin: IntxPin::A, gsi: 16, pic_irq: Some(5) },
        IntxRoute { slot: 3, pin: IntxPin::C, gsi: 23, pic_irq: None },
    ];
    Platform {
        pci_roots: vec![PciRoot::sole(&layout, routes)],
        layout,
        topology: Topology { sockets, cores, threads: 1 },
        apic_ids: (0..sockets * cores).collect(),
        processor: Processor {
            signature: 0x000c_06f2,
            features: 0x1f8b_fbff,
            vendor: "GenuineIntel".into(),
            brand: "Test CPU".into(),
        },
        serial_ports: vec![SerialPort::standard(1).unwrap(), SerialPort::standard(2).unwrap()],
        ps2: true,
        graphics: false,
        hpet_capabilities: Some(0x8086_a701),
        gpe0: false,
        lpc: Some(PciSlot { device: 1, function: 0 }),
        smbios: SmbiosStrings::default(),
        uuid: *b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff",
        acpi: true,
        mptable: true,
    }
}

pub fn read(memory: &GuestMemory, gpa: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
    bytes
}

pub fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(bytes[offset..offset + 2].try_into().unwrap())
}

pub fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

pub fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

pub fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}
