//! Puts every firmware table in its place in the firmware segment (0xF0000 to 0xFFFFF), where bhyve puts it: MP table at
//! 0xF0000, SMBIOS at 0xF1000, ACPI at 0xF2400. A table that outgrows its place moves behind the ACPI tables; its entry point,
//! which operating systems search for, stays.

use engine::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use crate::layout::{EBDA_BASE, FIRMWARE_BASE, HIGH_MEMORY_START};
use crate::platform::Platform;
use crate::{acpi, mptable, smbios};

/// Where the MP floating pointer is.
pub const MP_TABLE_BASE: u64 = 0xf_0000;
/// Where the SMBIOS entry points are.
pub const SMBIOS_BASE: u64 = 0xf_1000;
/// Where the RSDP is.
pub const ACPI_BASE: u64 = 0xf_2400;

/// Why the tables could not be written.
#[derive(Debug, thiserror::Error)]
pub enum TablesError {
    /// They do not fit in the firmware segment.
    #[error(
        "firmware tables: {what} needs {len} bytes and {free} are left; use fewer CPUs, devices or shorter SMBIOS texts"
    )]
    NoRoom {
        /// Which table.
        what: &'static str,
        /// Its length in bytes.
        len: usize,
        /// What is left, in bytes.
        free: usize,
    },
    /// An MP table describes one PCI hierarchy only (bhyve(8), `-Y`).
    #[error(
        "the MP table cannot describe several PCI host bridges; leave it out with -Y (x86.mptable=false)"
    )]
    MpTableRoots,
    /// SMBIOS text cannot be represented.
    #[error("{variable} cannot go into the SMBIOS tables: it contains a NUL character")]
    SmbiosText {
        /// The configuration variable.
        variable: &'static str,
    },
    /// SMBIOS structures of more than 64 KiB.
    #[error("the SMBIOS tables are longer than 64 KiB; use shorter texts or fewer sockets")]
    SmbiosTooLong,
    /// The firmware segment is not RAM.
    #[error("guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Where the tables are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tables {
    /// ACPI root pointer.
    pub rsdp: Option<u64>,
    /// MP floating pointer.
    pub mp_table: Option<u64>,
    /// SMBIOS 2.x entry point; the 3.x one follows 32 bytes later.
    pub smbios: u64,
    /// First free address in the firmware segment.
    pub end: u64,
}

/// The firmware segment while it is being filled.
pub(crate) struct Segment {
    bytes: Vec<u8>,
    next: u64,
}

impl Segment {
    fn new() -> Self {
        Segment { bytes: vec![0; (HIGH_MEMORY_START - FIRMWARE_BASE) as usize], next: ACPI_BASE }
    }

    /// Puts `bytes` at an address inside the segment.
    pub(crate) fn put(&mut self, at: u64, bytes: &[u8], what: &'static str) -> Result<(), TablesError> {
        let offset = at.saturating_sub(FIRMWARE_BASE) as usize;
        let free = self.bytes.len().saturating_sub(offset);
        match self.bytes.get_mut(offset..).and_then(|rest| rest.get_mut(..bytes.len())) {
            Some(place) => {
                place.copy_from_slice(bytes);
                Ok(())
            }
            None => Err(TablesError::NoRoom { what, len: bytes.len(), free }),
        }
    }

    /// Takes room behind everything allocated so far.
    pub(crate) fn allocate(
        &mut self,
        len: usize,
        alignment: u64,
        what: &'static str,
    ) -> Result<u64, TablesError> {
        let at = self.next.next_multiple_of(alignment);
        let free = HIGH_MEMORY_START.saturating_sub(at) as usize;
        if len > free {
            return Err(TablesError::NoRoom { what, len, free });
        }
        self.next = at + len as u64;
        Ok(at)
    }

    /// Puts `bytes` at `at` if they end before `limit`, else behind everything else. Returns the address.
    fn put_or_move(
        &mut self,
        at: u64,
        limit: u64,
        bytes: &[u8],
        what: &'static str,
    ) -> Result<u64, TablesError> {
        let at = if at + bytes.len() as u64 <= limit { at } else { self.allocate(bytes.len(), 16, what)? };
        self.put(at, bytes, what)?;
        Ok(at)
    }
}

/// Writes the tables that `platform` asks for, and the BIOS data area that goes with them.
///
/// # Errors
/// The tables cannot describe the platform or do not fit.
pub fn write_tables(memory: &GuestMemory, platform: &Platform) -> Result<Tables, TablesError> {
    let mut segment = Segment::new();
    // First, so that they are where bhyve's are.
    let rsdp = if platform.acpi { Some(acpi::write(&mut segment, platform)?) } else { None };

    let mp_table = if platform.mptable {
        if platform.pci_roots.len() > 1 {
            return Err(TablesError::MpTableRoots);
        }
        let configuration = mptable::configuration(platform);
        let at = MP_TABLE_BASE + mptable::FLOATING_POINTER_BYTES as u64;
        let at = segment.put_or_move(at, SMBIOS_BASE, &configuration, "the MP table")?;
        segment.put(MP_TABLE_BASE, &mptable::floating_pointer(at as u32), "the MP table")?;
        Some(MP_TABLE_BASE)
    } else {
        None
    };

    let structures = smbios::structures(platform)?;
    let at = SMBIOS_BASE + smbios::ENTRY_POINTS_BYTES;
    let at = segment.put_or_move(at, ACPI_BASE, structures.bytes(), "SMBIOS")?;
    segment.put(SMBIOS_BASE, &structures.entry_points(at as u32), "SMBIOS")?;

    memory.write_slice(&segment.bytes, GuestAddress(FIRMWARE_BASE))?;
    write_bios_data_area(memory, platform)?;
    Ok(Tables { rsdp, mp_table, smbios: SMBIOS_BASE, end: segment.next })
}

/// The few words of the BIOS data area that operating systems and memory testers still read.
fn write_bios_data_area(memory: &GuestMemory, platform: &Platform) -> Result<(), TablesError> {
    /// Four words: port of each serial port, zero if absent.
    const SERIAL_PORTS: u64 = 0x400;
    /// Segment of the EBDA.
    const EBDA_SEGMENT: u64 = 0x40e;
    /// KiB of conventional memory.
    const CONVENTIONAL_KIB: u64 = 0x413;
    for number in 1..=4u8 {
        let base = platform.serial_ports.iter().find(|p| p.number == number).map_or(0, |p| p.base);
        memory.write_obj(base, GuestAddress(SERIAL_PORTS + 2 * u64::from(number - 1)))?;
    }
    memory.write_obj((EBDA_BASE >> 4) as u16, GuestAddress(EBDA_SEGMENT))?;
    memory.write_obj((EBDA_BASE >> 10) as u16, GuestAddress(CONVENTIONAL_KIB))?;
    // The EBDA's own length in KiB.
    memory.write_obj(1u8, GuestAddress(EBDA_BASE))?;
    Ok(())
}

/// What makes the sum of `bytes`, with this one added, zero.
pub(crate) fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}
