//! The MP table (Intel MultiProcessor Specification 1.4, chapter 4): processors, buses, the IOAPIC and how interrupts are wired,
//! for systems that do not read ACPI.

use crate::layout::{IOAPIC_BASE, LAPIC_BASE};
use crate::platform::{Platform, fixed};
use crate::tables::checksum;

/// Length of the floating pointer.
pub(crate) const FLOATING_POINTER_BYTES: usize = 16;

/// Specification revision 1.4.
const REVISION: u8 = 4;
const OEM_ID: &[u8; 8] = b"BHyVe   ";
const PRODUCT_ID: &[u8; 12] = b"Hypervisor  ";
/// Version registers of the integrated LAPIC and the 82093AA.
const LAPIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
/// Bus numbers: PCI buses have their own, ISA takes the next.
const PCI_BUS: u8 = 0;
const ISA_BUS: u8 = 1;
const ISA_IRQS: u8 = 16;
/// Destination "every LAPIC".
const ALL_LAPICS: u8 = 0xff;
/// APIC IDs are eight bits wide, and 255 stands for all.
const MAX_APIC_ID: u32 = 254;

/// Entry types (§4.3).
mod entry {
    pub const PROCESSOR: u8 = 0;
    pub const BUS: u8 = 1;
    pub const IOAPIC: u8 = 2;
    pub const IO_INTERRUPT: u8 = 3;
    pub const LOCAL_INTERRUPT: u8 = 4;
}
/// Interrupt types (table 4-11).
mod kind {
    pub const INT: u8 = 0;
    pub const NMI: u8 = 1;
    pub const EXTINT: u8 = 3;
}
const PROCESSOR_ENABLED: u8 = 1 << 0;
const PROCESSOR_BOOTSTRAP: u8 = 1 << 1;
const IOAPIC_ENABLED: u8 = 1 << 0;
/// Polarity and trigger mode as the bus has them.
const CONFORMING: u16 = 0;
/// Active low, level-triggered.
const LOW_LEVEL: u16 = 0b11 | 0b11 << 2;

/// The floating pointer to a configuration table at `table` (§4.1).
pub(crate) fn floating_pointer(table: u32) -> [u8; FLOATING_POINTER_BYTES] {
    let mut bytes = [0; FLOATING_POINTER_BYTES];
    bytes[0..4].copy_from_slice(b"_MP_");
    bytes[4..8].copy_from_slice(&table.to_le_bytes());
    bytes[8] = 1; // length in paragraphs
    bytes[9] = REVISION;
    bytes[10] = checksum(&bytes);
    bytes
}

/// The entries after the header, and how many there are.
#[derive(Default)]
struct Entries {
    bytes: Vec<u8>,
    count: u16,
}

impl Entries {
    fn push(&mut self, parts: &[&[u8]]) {
        parts.iter().for_each(|part| self.bytes.extend_from_slice(part));
        self.count += 1;
    }

    fn interrupt(&mut self, entry: u8, kind: u8, flags: u16, source: (u8, u8), destination: (u8, u8)) {
        let [low, high] = flags.to_le_bytes();
        self.push(&[&[entry, kind, low, high, source.0, source.1, destination.0, destination.1]]);
    }
}

/// The configuration table (§4.2). Processors whose APIC ID does not fit eight bits are left out: ACPI describes them.
pub(crate) fn configuration(platform: &Platform) -> Vec<u8> {
    let mut entries = Entries::default();
    for (i, id) in platform.apic_ids.iter().enumerate() {
        if *id > MAX_APIC_ID {
            continue;
        }
        let flags = PROCESSOR_ENABLED | if i == 0 { PROCESSOR_BOOTSTRAP } else { 0 };
        entries.push(&[
            &[entry::PROCESSOR, *id as u8, LAPIC_VERSION, flags],
            &platform.processor.signature.to_le_bytes(),
            &platform.processor.features.to_le_bytes(),
            &[0; 8],
        ]);
    }
    entries.push(&[&[entry::BUS, PCI_BUS], b"PCI   "]);
    entries.push(&[&[entry::BUS, ISA_BUS], b"ISA   "]);
    entries.push(&[
        &[entry::IOAPIC, fixed::IOAPIC_ID, IOAPIC_VERSION, IOAPIC_ENABLED],
        &(IOAPIC_BASE as u32).to_le_bytes(),
    ]);

    // The 8259s are behind input 0, the 8254 (IRQ 0) takes the cascade's input 2, the rest is one to one.
    for pin in 0..ISA_IRQS {
        let (kind, irq, flags) = match pin {
            0 => (kind::EXTINT, 0, CONFORMING),
            fixed::PIT_GSI => (kind::INT, 0, CONFORMING),
            fixed::SCI_IRQ => (kind::INT, fixed::SCI_IRQ, LOW_LEVEL),
            other => (kind::INT, other, CONFORMING),
        };
        entries.interrupt(entry::IO_INTERRUPT, kind, flags, (ISA_BUS, irq), (fixed::IOAPIC_ID, pin));
    }
    for route in platform.pci_roots.iter().flat_map(|root| &root.interrupts) {
        let Ok(pin) = u8::try_from(route.gsi) else { continue };
        let source = (route.slot << 2) | route.pin as u8;
        entries.interrupt(
            entry::IO_INTERRUPT,
            kind::INT,
            LOW_LEVEL,
            (PCI_BUS, source),
            (fixed::IOAPIC_ID, pin),
        );
    }
    entries.interrupt(entry::LOCAL_INTERRUPT, kind::EXTINT, CONFORMING, (ISA_BUS, 0), (ALL_LAPICS, 0));
    entries.interrupt(entry::LOCAL_INTERRUPT, kind::NMI, CONFORMING, (ISA_BUS, 0), (ALL_LAPICS, 1));

    const HEADER_BYTES: usize = 44;
    let mut table = Vec::with_capacity(HEADER_BYTES + entries.bytes.len());
    table.extend_from_slice(b"PCMP");
    table.extend_from_slice(&((HEADER_BYTES + entries.bytes.len()) as u16).to_le_bytes());
    table.extend_from_slice(&[REVISION, 0]);
    table.extend_from_slice(OEM_ID);
    table.extend_from_slice(PRODUCT_ID);
    table.extend_from_slice(&[0; 6]); // no OEM table
    table.extend_from_slice(&entries.count.to_le_bytes());
    table.extend_from_slice(&(LAPIC_BASE as u32).to_le_bytes());
    table.extend_from_slice(&[0; 4]); // no extended table
    table.extend_from_slice(&entries.bytes);
    table[7] = checksum(&table);
    table
}
