//! The machine as its firmware tables describe it: one plain value that the machine fills in and [`crate::write_tables`] turns
//! into ACPI, MP and SMBIOS tables.

use std::ops::RangeInclusive;

use crate::layout::{self, MemoryLayout};

/// Ports and numbers of the ACPI fixed hardware, which the power-management device and the tables must agree on.
pub mod fixed {
    /// Interrupt of the ACPI fixed hardware, as ISA IRQ and IOAPIC input; level-triggered, active low.
    pub const SCI_IRQ: u8 = 9;
    /// Port that takes [`ACPI_ENABLE`] and [`ACPI_DISABLE`].
    pub const SMI_COMMAND_PORT: u16 = 0xb2;
    /// Hands the fixed hardware to the operating system.
    pub const ACPI_ENABLE: u8 = 0xa0;
    /// Takes it back.
    pub const ACPI_DISABLE: u8 = 0xa1;
    /// PM1 status (2 bytes) and enable (2 bytes).
    pub const PM1_EVENT_PORT: u16 = 0x400;
    /// PM1 control (2 bytes).
    pub const PM1_CONTROL_PORT: u16 = 0x404;
    /// 32-bit timer at 3.579545 MHz.
    pub const PM_TIMER_PORT: u16 = 0x408;
    /// General-purpose events: one byte of status, one of enable.
    pub const GPE0_PORT: u16 = 0x40c;
    /// Bytes at [`GPE0_PORT`].
    pub const GPE0_BYTES: u8 = 2;
    /// PM1 SLP_TYP that turns the machine off.
    pub const SLEEP_TYPE_S5: u8 = 5;
    /// Reset control register.
    pub const RESET_PORT: u16 = 0xcf9;
    /// What to write there: hard reset.
    pub const RESET_VALUE: u8 = 0x06;
    /// RTC NVRAM byte that holds the century.
    pub const RTC_CENTURY: u8 = 0x32;
    /// IOAPIC input of the 8254, which is ISA IRQ 0.
    pub const PIT_GSI: u8 = 2;
    /// IOAPIC ID as its register reads after reset.
    pub const IOAPIC_ID: u8 = 0;
}

/// Sockets, cores in each, threads in each core; their product is the number of vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Topology {
    pub sockets: u32,
    pub cores: u32,
    pub threads: u32,
}

/// What CPUID tells about the processor, for tables that repeat it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Processor {
    /// CPUID leaf 1 EAX: family, model, stepping.
    pub signature: u32,
    /// CPUID leaf 1 EDX: feature flags.
    pub features: u32,
    /// Vendor string of leaf 0.
    pub vendor: String,
    /// Brand string of leaves 0x80000002 to 4.
    pub brand: String,
}

/// A 16550 on the LPC bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SerialPort {
    /// 1 for com1 and so on.
    pub number: u8,
    /// First of its eight ports.
    pub base: u16,
    /// ISA IRQ.
    pub irq: u8,
}

impl SerialPort {
    /// com1 to com4 with the addresses and interrupts of a PC.
    pub fn standard(number: u8) -> Option<Self> {
        let (base, irq) = match number {
            1 => (0x3f8, 4),
            2 => (0x2f8, 3),
            3 => (0x3e8, 4),
            4 => (0x2e8, 3),
            _ => return None,
        };
        Some(SerialPort { number, base, irq })
    }
}

/// A PCI interrupt pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
#[repr(u8)]
pub enum IntxPin {
    A = 0,
    B = 1,
    C = 2,
    D = 3,
}

/// Where the interrupt pin of a PCI slot leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IntxRoute {
    /// Device number on its bus.
    pub slot: u8,
    /// Pin.
    pub pin: IntxPin,
    /// IOAPIC input.
    pub gsi: u32,
    /// 8259 input, if the line is wired there too; for guests that do not use the IOAPIC.
    pub pic_irq: Option<u8>,
}

/// A PCI host bridge and what lies behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciRoot {
    /// Bus number of the root, and the last that belongs to it.
    pub buses: RangeInclusive<u8>,
    /// Ports that it forwards.
    pub io: Vec<RangeInclusive<u16>>,
    /// Memory below 4 GiB that it forwards.
    pub mmio32: Option<RangeInclusive<u32>>,
    /// Memory above 4 GiB that it forwards.
    pub mmio64: Option<RangeInclusive<u64>>,
    /// Routes of the interrupt pins in use.
    pub interrupts: Vec<IntxRoute>,
}

impl PciRoot {
    /// The root of a machine that has only one: every bus, every port but the configuration registers, both memory windows.
    pub fn sole(memory: &MemoryLayout, interrupts: Vec<IntxRoute>) -> Self {
        let mmio64 = memory.pci_mmio64();
        PciRoot {
            buses: 0..=255,
            io: vec![0..=0xcf7, 0xd00..=0xffff],
            mmio32: Some(layout::PCI_MMIO32.start as u32..=(layout::PCI_MMIO32.end - 1) as u32),
            mmio64: Some(mmio64.start..=mmio64.end - 1),
            interrupts,
        }
    }
}

/// A PCI function on bus 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct PciSlot {
    pub device: u8,
    pub function: u8,
}

/// Text of the SMBIOS tables: the variables of bhyve_config(5) by the same names, with its defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct SmbiosStrings {
    pub bios_vendor: String,
    pub bios_version: String,
    pub bios_release_date: String,
    pub system_family_name: String,
    pub system_manufacturer: String,
    pub system_product_name: String,
    pub system_serial_number: String,
    pub system_sku: String,
    pub system_version: String,
    pub board_manufacturer: String,
    pub board_product_name: String,
    pub board_version: String,
    pub board_serial_number: String,
    pub board_asset_tag: String,
    pub board_location: String,
    pub chassis_manufacturer: String,
    pub chassis_version: String,
    pub chassis_serial_number: String,
    pub chassis_asset_tag: String,
    pub chassis_sku: String,
}

impl Default for SmbiosStrings {
    fn default() -> Self {
        SmbiosStrings {
            bios_vendor: "BHYVE".into(),
            bios_version: "14.0".into(),
            bios_release_date: "10/17/2021".into(),
            system_family_name: "Virtual Machine".into(),
            system_manufacturer: "FreeBSD".into(),
            system_product_name: "BHYVE".into(),
            system_serial_number: "None".into(),
            system_sku: "None".into(),
            system_version: "1.0".into(),
            board_manufacturer: "FreeBSD".into(),
            board_product_name: "BHYVE".into(),
            board_version: "1.0".into(),
            board_serial_number: "None".into(),
            board_asset_tag: "None".into(),
            board_location: "None".into(),
            chassis_manufacturer: "FreeBSD".into(),
            chassis_version: "1.0".into(),
            chassis_serial_number: "None".into(),
            chassis_asset_tag: "None".into(),
            chassis_sku: "None".into(),
        }
    }
}

impl SmbiosStrings {
    /// The field for a variable of bhyve_config(5), such as `system.sku`.
    pub fn variable(&mut self, name: &str) -> Option<&mut String> {
        Some(match name {
            "bios.vendor" => &mut self.bios_vendor,
            "bios.version" => &mut self.bios_version,
            "bios.release_date" => &mut self.bios_release_date,
            "system.family_name" => &mut self.system_family_name,
            "system.manufacturer" => &mut self.system_manufacturer,
            "system.product_name" => &mut self.system_product_name,
            "system.serial_number" => &mut self.system_serial_number,
            "system.sku" => &mut self.system_sku,
            "system.version" => &mut self.system_version,
            "board.manufacturer" => &mut self.board_manufacturer,
            "board.product_name" => &mut self.board_product_name,
            "board.version" => &mut self.board_version,
            "board.serial_number" => &mut self.board_serial_number,
            "board.asset_tag" => &mut self.board_asset_tag,
            "board.location" => &mut self.board_location,
            "chassis.manufacturer" => &mut self.chassis_manufacturer,
            "chassis.version" => &mut self.chassis_version,
            "chassis.serial_number" => &mut self.chassis_serial_number,
            "chassis.asset_tag" => &mut self.chassis_asset_tag,
            "chassis.sku" => &mut self.chassis_sku,
            _ => return None,
        })
    }

    /// Every name that [`SmbiosStrings::variable`] knows.
    pub const VARIABLES: [&'static str; 20] = [
        "bios.vendor",
        "bios.version",
        "bios.release_date",
        "system.family_name",
        "system.manufacturer",
        "system.product_name",
        "system.serial_number",
        "system.sku",
        "system.version",
        "board.manufacturer",
        "board.product_name",
        "board.version",
        "board.serial_number",
        "board.asset_tag",
        "board.location",
        "chassis.manufacturer",
        "chassis.version",
        "chassis.serial_number",
        "chassis.asset_tag",
        "chassis.sku",
    ];
}

/// Everything the tables need to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// RAM and windows.
    pub layout: MemoryLayout,
    /// Processors by socket, core and thread.
    pub topology: Topology,
    /// APIC ID of each vCPU, in order of vCPU number.
    pub apic_ids: Vec<u32>,
    /// What CPUID says of them.
    pub processor: Processor,
    /// Serial ports that exist.
    pub serial_ports: Vec<SerialPort>,
    /// A PS/2 keyboard and mouse exist (beyond the controller's reset line).
    pub ps2: bool,
    /// A graphics adapter exists.
    pub graphics: bool,
    /// The low half of the HPET's capabilities register, if there is an HPET.
    pub hpet_capabilities: Option<u32>,
    /// The general-purpose event block at [`fixed::GPE0_PORT`] exists.
    pub gpe0: bool,
    /// Where the LPC bridge is; the ISA devices are described either way.
    pub lpc: Option<PciSlot>,
    /// PCI host bridges, the one with bus 0 first.
    pub pci_roots: Vec<PciRoot>,
    /// SMBIOS text.
    pub smbios: SmbiosStrings,
    /// System UUID, byte for byte as its text form reads (RFC 9562 order).
    pub uuid: [u8; 16],
    /// Write ACPI tables.
    pub acpi: bool,
    /// Write the MP table.
    pub mptable: bool,
}
