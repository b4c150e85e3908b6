//! The namespace (ACPI 6.5 chapters 5.3, 6 and 7): processors, PCI host bridges with their windows and interrupt routes, and the
//! devices on the LPC bus with their resources.

use acpi_tables::Aml;
use acpi_tables::aml as terms;

use super::aml::{
    Encoded, device, encode, hardware_id, irq, memory, method, name, package, path, ports, resources, scope,
    sequence,
};
use crate::layout::{ECAM_BASE, ECAM_BYTES, HPET_BASE, HPET_BYTES};
use crate::platform::{IntxRoute, PciRoot, Platform, SerialPort, fixed};

/// Everything after the table's header.
pub(super) fn definition_block(platform: &Platform) -> Vec<u8> {
    let mut board: Vec<Encoded> = (0..platform.apic_ids.len()).filter_map(processor).collect();
    board.extend(platform.pci_roots.iter().map(|root| host_bridge(platform, root)));
    if platform.hpet_capabilities.is_some() {
        board.push(device(
            "HPET",
            &[
                hardware_id("_HID", "PNP0103"),
                name("_UID", &terms::ZERO),
                resources(&[memory(HPET_BASE as u32, HPET_BYTES as u32)]),
            ],
        ));
    }
    board.push(memory_reservations());
    sequence([
        sleep_state("_S0_", 0),
        sleep_state("_S5_", fixed::SLEEP_TYPE_S5),
        interrupt_model(),
        scope("_SB_", &board),
    ])
    .into_bytes()
}

/// What to write to SLP_TYP of PM1a and PM1b control for a sleep state (§7.4.2).
fn sleep_state(state: &str, sleep_type: u8) -> Encoded {
    let values = [sleep_type, 0, 0, 0].map(|value| encode(&value));
    name(state, &package(&values))
}

/// `PICM`: 0 while the guest uses the 8259s, 1 with the IOAPIC (§5.8.1).
fn interrupt_model() -> Encoded {
    let picm = path("PICM");
    let store = encode(&terms::Store::new(&picm, &terms::Arg(0)));
    sequence([name("PICM", &terms::ZERO), method("_PIC", 1, false, &[store])])
}

/// Processor device (§8.4); its UID is what the MADT calls it. Names run out beyond 4095, long after room does.
fn processor(uid: usize) -> Option<Encoded> {
    const MAX_UID: usize = 0xfff;
    let label = format!("C{uid:03X}");
    (uid <= MAX_UID).then(|| device(&label, &[name("_HID", &"ACPI0007"), name("_UID", &uid)]))
}

/// Memory that belongs to no device with a driver: the configuration space (PCI Firmware 3.3 §4.1.2 wants it here too).
fn memory_reservations() -> Encoded {
    device(
        "MBRD",
        &[
            hardware_id("_HID", "PNP0C02"),
            name("_UID", &"memory"),
            resources(&[memory(ECAM_BASE as u32, ECAM_BYTES as u32)]),
        ],
    )
}

/// A PCI Express host bridge (PCI Firmware 3.3 §4).
fn host_bridge(platform: &Platform, root: &PciRoot) -> Encoded {
    let bus = *root.buses.start();
    let mut children = vec![
        hardware_id("_HID", "PNP0A08"),
        hardware_id("_CID", "PNP0A03"),
        name("_BBN", &bus),
        name("_UID", &bus),
        resources(&windows(root)),
        operating_system_capabilities(),
    ];
    children.extend(interrupt_routes(&root.interrupts));
    if bus == 0 {
        children.push(lpc(platform));
    }
    device(&format!("PC{bus:02X}"), &children)
}

/// What the bridge forwards.
fn windows(root: &PciRoot) -> Vec<Encoded> {
    /// The two configuration-mechanism registers, which the bridge itself answers.
    const CONFIGURATION_PORT: u16 = 0xcf8;
    let mut windows = vec![encode(&terms::AddressSpace::new_bus_number(
        u16::from(*root.buses.start()),
        u16::from(*root.buses.end()),
    ))];
    if *root.buses.start() == 0 {
        windows.push(ports(CONFIGURATION_PORT, 8));
    }
    let uncached = terms::AddressSpaceCacheable::NotCacheable;
    for io in root.io.iter().filter(|io| !io.is_empty() && (*io.start(), *io.end()) != (0, u16::MAX)) {
        windows.push(encode(&terms::AddressSpace::new_io(*io.start(), *io.end(), None)));
    }
    if let Some(range) =
        root.mmio32.as_ref().filter(|r| !r.is_empty() && (*r.start(), *r.end()) != (0, u32::MAX))
    {
        windows.push(encode(&terms::AddressSpace::new_memory(
            uncached,
            true,
            *range.start(),
            *range.end(),
            None,
        )));
    }
    if let Some(range) =
        root.mmio64.as_ref().filter(|r| !r.is_empty() && (*r.start(), *r.end()) != (0, u64::MAX))
    {
        windows.push(encode(&terms::AddressSpace::new_memory(
            uncached,
            true,
            *range.start(),
            *range.end(),
            None,
        )));
    }
    windows
}

/// `_OSC` (PCI Firmware 3.3 §4.5.1): the operating system may take every service that was defined with PCI Express; no
/// firmware wants them.
fn operating_system_capabilities() -> Encoded {
    const PCI_HOST_BRIDGE: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";
    /// Native hot-plug, SHPC hot-plug, PME, AER, PCI Express capability structure, LTR.
    const GRANTED: u32 = 0x3f;
    const UNRECOGNIZED_UUID: u32 = 1 << 2;
    const UNRECOGNIZED_REVISION: u32 = 1 << 3;
    const CAPABILITIES_MASKED: u32 = 1 << 4;

    let (status, control) = (path("CDW1"), path("CDW3"));
    let (uuid, revision, buffer) = (terms::Arg(0), terms::Arg(1), terms::Arg(3));
    let local = terms::Local(0);
    let set = |flag: u32| encode(&terms::Or::new(&status, &status, &flag));
    let when = |condition: &dyn Aml, term: Encoded| encode(&terms::If::new(condition, vec![&term]));

    let known = sequence([
        encode(&terms::CreateDWordField::new(&control, &buffer, &8u8)),
        encode(&terms::And::new(&local, &control, &GRANTED)),
        when(&terms::NotEqual::new(&revision, &terms::ONE), set(UNRECOGNIZED_REVISION)),
        when(&terms::NotEqual::new(&local, &control), set(CAPABILITIES_MASKED)),
        encode(&terms::Store::new(&control, &local)),
    ]);
    let expected = terms::Uuid::new(PCI_HOST_BRIDGE);
    method(
        "_OSC",
        4,
        true,
        &[
            encode(&terms::CreateDWordField::new(&status, &buffer, &terms::ZERO)),
            when(&terms::Equal::new(&uuid, &expected), known),
            encode(&terms::Else::new(vec![&set(UNRECOGNIZED_UUID)])),
            encode(&terms::Return::new(&buffer)),
        ],
    )
}

/// `_PRT` (§6.2.13): each pin in use leads to an IOAPIC input, and to an 8259 input while the guest uses those.
fn interrupt_routes(routes: &[IntxRoute]) -> Vec<Encoded> {
    let line = |route: &IntxRoute, source_index: u32| {
        package(&[
            encode(&(u32::from(route.slot) << 16 | 0xffff)),
            encode(&(route.pin as u8)),
            encode(&terms::ZERO),
            encode(&source_index),
        ])
    };
    let apic: Vec<Encoded> = routes.iter().map(|route| line(route, route.gsi)).collect();
    let pic: Vec<Encoded> =
        routes.iter().filter_map(|route| route.pic_irq.map(|irq| line(route, u32::from(irq)))).collect();
    let (apic_name, pic_name) = (path("APRT"), path("PPRT"));
    let in_apic_mode = encode(&terms::Return::new(&apic_name));
    vec![
        name("APRT", &package(&apic)),
        name("PPRT", &package(&pic)),
        method(
            "_PRT",
            0,
            false,
            &[
                encode(&terms::If::new(&path("PICM"), vec![&in_apic_mode])),
                encode(&terms::Return::new(&pic_name)),
            ],
        ),
    ]
}

/// The LPC bridge with what a PC has behind it. Where there is no such bridge the devices exist all the same, on a bus of
/// no particular kind.
fn lpc(platform: &Platform) -> Encoded {
    let mut children = vec![match platform.lpc {
        Some(slot) => name("_ADR", &(u32::from(slot.device) << 16 | u32::from(slot.function))),
        None => hardware_id("_HID", "PNP0A05"),
    }];
    children.push(system_ports());
    for port in &platform.serial_ports {
        children.push(serial_port(port));
    }
    let simple = |label: &str, id: &str, resource: &[Encoded]| {
        device(label, &[hardware_id("_HID", id), resources(resource)])
    };
    if platform.ps2 {
        children.push(simple("KBD_", "PNP0303", &[ports(0x60, 1), ports(0x64, 1), irq(1)]));
        children.push(simple("MOU_", "PNP0F13", &[irq(12)]));
    }
    children.push(simple("RTC_", "PNP0B00", &[ports(0x70, 2), irq(8)]));
    children.push(simple("PIC_", "PNP0000", &[ports(0x20, 2), ports(0xa0, 2), irq(2)]));
    children.push(simple("TIMR", "PNP0100", &[ports(0x40, 4), irq(0)]));
    device("ISA_", &children)
}

/// Ports that belong to no device with a driver.
fn system_ports() -> Encoded {
    const NMI_STATUS: u16 = 0x61;
    const INTERRUPT_LEVELS: u16 = 0x4d0;
    device(
        "SIO_",
        &[
            hardware_id("_HID", "PNP0C02"),
            name("_UID", &"ports"),
            resources(&[
                ports(NMI_STATUS, 1),
                ports(fixed::SMI_COMMAND_PORT, 1),
                // PM1 event and control, timer, general-purpose events.
                ports(fixed::PM1_EVENT_PORT, 0x10),
                ports(INTERRUPT_LEVELS, 2),
            ]),
        ],
    )
}

fn serial_port(port: &SerialPort) -> Encoded {
    const UART_PORTS: u8 = 8;
    device(
        &format!("COM{}", port.number % 10),
        &[
            hardware_id("_HID", "PNP0501"),
            name("_UID", &port.number),
            resources(&[ports(port.base, UART_PORTS), irq(port.irq)]),
        ],
    )
}
