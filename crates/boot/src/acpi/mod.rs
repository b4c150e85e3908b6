//! ACPI tables (ACPI 6.5): the fixed ones here, the namespace in [`dsdt`]. They start at 0xF2400 with the RSDP, where bhyve's are
//! and where an operating system without a pointer from its loader looks for it (§5.2.5.1).

mod aml;
mod dsdt;

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, facs::FACS};

use crate::layout::{ECAM_BASE, HPET_BASE, IOAPIC_BASE, LAPIC_BASE};
use crate::platform::{Platform, fixed};
use crate::tables::{Segment, TablesError, checksum};

/// Who made the tables, as bhyve's say; guests recognise the hypervisor by it.
const OEM_ID: [u8; 6] = *b"BHYVE ";
const OEM_REVISION: u32 = 1;
/// Length of a description header (§5.2.6).
const HEADER_BYTES: u32 = 36;
/// The FACS wants 64 (§5.2.10); the others follow suit with 16.
const ALIGNMENT: u64 = 16;
const FACS_ALIGNMENT: u64 = 64;

/// Table ID of a table: "BV", its signature, blanks.
const fn oem_table_id(signature: [u8; 4]) -> [u8; 8] {
    let [a, b, c, d] = signature;
    [b'B', b'V', a, b, c, d, b' ', b' ']
}

fn table(signature: [u8; 4], revision: u8) -> Sdt {
    Sdt::new(signature, HEADER_BYTES, revision, OEM_ID, oem_table_id(signature), OEM_REVISION)
}

fn bytes_of(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

/// Writes every table and returns the address of the RSDP.
pub(crate) fn write(segment: &mut Segment, platform: &Platform) -> Result<u64, TablesError> {
    const RSDP_BYTES: usize = 36;
    let rsdp_at = segment.allocate(RSDP_BYTES, ALIGNMENT, "the RSDP")?;
    let mut place = |bytes: &[u8], alignment: u64, what| -> Result<u64, TablesError> {
        let at = segment.allocate(bytes.len(), alignment, what)?;
        segment.put(at, bytes, what)?;
        Ok(at)
    };

    let mut facs = FACS::new();
    facs.version = 2;
    let facs_at = place(&bytes_of(&facs), FACS_ALIGNMENT, "the FACS")?;
    let mut dsdt = table(*b"DSDT", 2);
    dsdt.append_slice(&dsdt::definition_block(platform));
    let dsdt_at = place(dsdt.as_slice(), ALIGNMENT, "the DSDT")?;

    let mut roots = vec![
        place(&fadt(platform, facs_at, dsdt_at), ALIGNMENT, "the FADT")?,
        place(madt(platform).as_slice(), ALIGNMENT, "the MADT")?,
    ];
    if let Some(capabilities) = platform.hpet_capabilities {
        roots.push(place(hpet(capabilities).as_slice(), ALIGNMENT, "the HPET table")?);
    }
    if let (Some(first), Some(last)) = (
        platform.pci_roots.iter().map(|root| *root.buses.start()).min(),
        platform.pci_roots.iter().map(|root| *root.buses.end()).max(),
    ) {
        let mut mcfg = MCFG::new(OEM_ID, oem_table_id(*b"MCFG"), OEM_REVISION);
        // The window's base is that of bus 0, whatever the first bus is (PCI Firmware 3.3 §4.1.2).
        mcfg.add_ecam(ECAM_BASE, 0, first, last);
        roots.push(place(&bytes_of(&mcfg), ALIGNMENT, "the MCFG")?);
    }
    if platform.serial_ports.iter().any(|port| port.number == 1) {
        roots.push(place(spcr(platform).as_slice(), ALIGNMENT, "the SPCR")?);
    }

    let mut rsdt = table(*b"RSDT", 1);
    let mut xsdt = table(*b"XSDT", 1);
    for root in &roots {
        rsdt.append_slice(&(*root as u32).to_le_bytes());
        xsdt.append_slice(&root.to_le_bytes());
    }
    let rsdt_at = place(rsdt.as_slice(), ALIGNMENT, "the RSDT")?;
    let xsdt_at = place(xsdt.as_slice(), ALIGNMENT, "the XSDT")?;

    segment.put(rsdp_at, &rsdp(rsdt_at as u32, xsdt_at), "the RSDP")?;
    Ok(rsdp_at)
}

/// Root System Description Pointer (§5.2.5.3).
fn rsdp(rsdt: u32, xsdt: u64) -> [u8; 36] {
    const ACPI1_BYTES: usize = 20;
    let mut bytes = [0; 36];
    bytes[0..8].copy_from_slice(b"RSD PTR ");
    bytes[9..15].copy_from_slice(&OEM_ID);
    bytes[15] = 2; // revision
    bytes[16..20].copy_from_slice(&rsdt.to_le_bytes());
    bytes[20..24].copy_from_slice(&36u32.to_le_bytes());
    bytes[24..32].copy_from_slice(&xsdt.to_le_bytes());
    bytes[8] = checksum(&bytes[..ACPI1_BYTES]);
    bytes[32] = checksum(&bytes);
    bytes
}

/// Fixed ACPI Description Table (§5.2.9): where the fixed hardware of [`fixed`] is.
fn fadt(platform: &Platform, facs: u64, dsdt: u64) -> Vec<u8> {
    /// IA-PC boot architecture flags (§5.2.9.3).
    const LEGACY_DEVICES: u16 = 1 << 0;
    const KEYBOARD_CONTROLLER: u16 = 1 << 1;
    const NO_VGA: u16 = 1 << 2;
    const NO_ASPM: u16 = 1 << 4;
    /// Latencies above these say that there is no C2 and no C3.
    const NO_C2: u16 = 101;
    const NO_C3: u16 = 1001;

    let io = |port: u16, bytes: u8, access| {
        GAS::new(AddressSpace::SystemIo, bytes * 8, 0, access, u64::from(port))
    };
    let mut flags = vec![
        Flags::Wbinvd,
        Flags::ProcC1,
        Flags::SlpButton, // no fixed sleep button; the power button is fixed hardware
        Flags::TmrValExt,
        Flags::ResetRegSup,
        Flags::ForceApicPhysicalDestinationMode,
    ];
    let mut boot = NO_ASPM;
    if !platform.graphics {
        flags.push(Flags::Headless);
        boot |= NO_VGA;
    }
    if platform.ps2 {
        boot |= KEYBOARD_CONTROLLER;
    }
    if platform.ps2 || !platform.serial_ports.is_empty() {
        boot |= LEGACY_DEVICES;
    }

    let mut fadt = FADTBuilder::new(OEM_ID, oem_table_id(*b"FACP"), OEM_REVISION);
    fadt.major_version = 6;
    fadt.fadt_minor_version = 3;
    // The 64-bit FACS pointer is for one above 4 GiB (§5.2.9, X_FIRMWARE_CTRL): only one of the two may be set.
    fadt.firmware_ctrl = (facs as u32).into();
    fadt.dsdt = (dsdt as u32).into();
    fadt.x_dsdt = dsdt.into();
    fadt.sci_int = u16::from(fixed::SCI_IRQ).into();
    fadt.smi_cmd = u32::from(fixed::SMI_COMMAND_PORT).into();
    fadt.acpi_enable = fixed::ACPI_ENABLE;
    fadt.acpi_disable = fixed::ACPI_DISABLE;
    fadt.pm1a_evt_blk = u32::from(fixed::PM1_EVENT_PORT).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = io(fixed::PM1_EVENT_PORT, 4, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(fixed::PM1_CONTROL_PORT).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = io(fixed::PM1_CONTROL_PORT, 2, AccessSize::WordAccess);
    fadt.pm_tmr_blk = u32::from(fixed::PM_TIMER_PORT).into();
    fadt.pm_tmr_len = 4;
    fadt.x_pm_tmr_blk = io(fixed::PM_TIMER_PORT, 4, AccessSize::DwordAccess);
    if platform.gpe0 {
        fadt.gpe0_blk = u32::from(fixed::GPE0_PORT).into();
        fadt.gpe0_blk_len = fixed::GPE0_BYTES;
        fadt.x_gpe0_blk = io(fixed::GPE0_PORT, fixed::GPE0_BYTES, AccessSize::ByteAccess);
    }
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.century = fixed::RTC_CENTURY;
    fadt.iapc_boot_arch = boot.into();
    fadt.reset_reg = io(fixed::RESET_PORT, 1, AccessSize::ByteAccess);
    fadt.reset_value = fixed::RESET_VALUE;
    let fadt = flags.into_iter().fold(fadt, FADTBuilder::flag);
    bytes_of(&fadt.finalize())
}

/// Multiple APIC Description Table (§5.2.12).
fn madt(platform: &Platform) -> Sdt {
    mod kind {
        pub const LAPIC: u8 = 0;
        pub const IOAPIC: u8 = 1;
        pub const INTERRUPT_OVERRIDE: u8 = 2;
        pub const LAPIC_NMI: u8 = 4;
        pub const X2APIC: u8 = 9;
        pub const X2APIC_NMI: u8 = 10;
    }
    /// The two 8259s exist too.
    const PCAT_COMPAT: u32 = 1 << 0;
    const ENABLED: u32 = 1 << 0;
    /// xAPIC IDs, and processor UIDs next to them, end below 255 (§5.2.12.12).
    const XAPIC_END: u32 = 255;
    const ALL_PROCESSORS: u8 = 0xff;
    const ALL_X2APIC_PROCESSORS: u32 = u32::MAX;
    const ISA: u8 = 0;
    /// MPS INTI flags (table 5.25).
    const HIGH_EDGE: u16 = 0b01 | 0b01 << 2;
    const LOW_LEVEL: u16 = 0b11 | 0b11 << 2;
    const NMI_LINT: u8 = 1;

    let mut body = Vec::new();
    body.extend_from_slice(&(LAPIC_BASE as u32).to_le_bytes());
    body.extend_from_slice(&PCAT_COMPAT.to_le_bytes());
    let mut any_x2apic = false;
    for (uid, id) in (0u32..).zip(&platform.apic_ids) {
        match (u8::try_from(uid), u8::try_from(*id)) {
            (Ok(uid), Ok(short)) if uid < ALL_PROCESSORS && *id < XAPIC_END => {
                body.extend_from_slice(&[kind::LAPIC, 8, uid, short]);
                body.extend_from_slice(&ENABLED.to_le_bytes());
            }
            _ => {
                any_x2apic = true;
                body.extend_from_slice(&[kind::X2APIC, 16, 0, 0]);
                for field in [*id, ENABLED, uid] {
                    body.extend_from_slice(&field.to_le_bytes());
                }
            }
        }
    }
    body.extend_from_slice(&[kind::IOAPIC, 12, fixed::IOAPIC_ID, 0]);
    body.extend_from_slice(&(IOAPIC_BASE as u32).to_le_bytes());
    body.extend_from_slice(&0u32.to_le_bytes()); // its first GSI
    for (irq, gsi, flags) in [(0, fixed::PIT_GSI, HIGH_EDGE), (fixed::SCI_IRQ, fixed::SCI_IRQ, LOW_LEVEL)] {
        body.extend_from_slice(&[kind::INTERRUPT_OVERRIDE, 10, ISA, irq]);
        body.extend_from_slice(&u32::from(gsi).to_le_bytes());
        body.extend_from_slice(&flags.to_le_bytes());
    }
    let [low, high] = HIGH_EDGE.to_le_bytes();
    body.extend_from_slice(&[kind::LAPIC_NMI, 6, ALL_PROCESSORS, low, high, NMI_LINT]);
    if any_x2apic {
        body.extend_from_slice(&[kind::X2APIC_NMI, 12, low, high]);
        body.extend_from_slice(&ALL_X2APIC_PROCESSORS.to_le_bytes());
        body.extend_from_slice(&[NMI_LINT, 0, 0, 0]);
    }
    let mut madt = table(*b"APIC", 5);
    madt.append_slice(&body);
    madt
}

/// HPET description table (IA-PC HPET 1.0a §3.2.4).
fn hpet(capabilities: u32) -> Sdt {
    /// Nothing else is in the 4 KiB page.
    const PAGE_PROTECTED: u8 = 1;
    let mut body = Vec::new();
    body.extend_from_slice(&capabilities.to_le_bytes());
    body.extend_from_slice(&bytes_of(&GAS::new(
        AddressSpace::SystemMemory,
        64,
        0,
        AccessSize::Undefined,
        HPET_BASE,
    )));
    body.push(0); // sequence number
    body.extend_from_slice(&0u16.to_le_bytes()); // least tick for periodic mode: any
    body.push(PAGE_PROTECTED);
    let mut hpet = table(*b"HPET", 1);
    hpet.append_slice(&body);
    hpet
}

/// Serial Port Console Redirection table (Microsoft, version 2): com1, for early consoles.
fn spcr(platform: &Platform) -> Sdt {
    const INTERFACE_16550: u8 = 0;
    const INTERRUPT_8259_AND_IOAPIC: u8 = 0b11;
    const BAUD_115200: u8 = 7;
    const STOP_BITS_1: u8 = 1;
    const FLOW_RTS_CTS: u8 = 1 << 1;
    const TERMINAL_VT_UTF8: u8 = 2;
    const NOT_PCI: u16 = 0xffff;
    let (base, irq) =
        platform.serial_ports.iter().find(|p| p.number == 1).map_or((0, 0), |port| (port.base, port.irq));
    let mut body = vec![INTERFACE_16550, 0, 0, 0];
    let registers = GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(base));
    body.extend_from_slice(&bytes_of(&registers));
    body.extend_from_slice(&[INTERRUPT_8259_AND_IOAPIC, irq]);
    body.extend_from_slice(&u32::from(irq).to_le_bytes());
    body.extend_from_slice(&[BAUD_115200, 0, STOP_BITS_1, FLOW_RTS_CTS, TERMINAL_VT_UTF8, 0]);
    body.extend_from_slice(&NOT_PCI.to_le_bytes());
    body.extend_from_slice(&NOT_PCI.to_le_bytes());
    body.extend_from_slice(&[0; 3]); // bus, device, function
    body.extend_from_slice(&[0; 4]); // PCI flags
    body.extend_from_slice(&[0; 5]); // segment, reserved
    let mut spcr = table(*b"SPCR", 2);
    spcr.append_slice(&body);
    spcr
}

#[cfg(test)]
mod tests;
