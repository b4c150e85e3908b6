//! What is in guest memory before the first instruction: the tables that describe this machine, and the kernel.

use std::collections::BTreeSet;
use std::fs;

use boot::platform::{self, IntxPin, IntxRoute, PciSlot, Platform, SerialPort, SmbiosStrings};
use boot::{EntryState, Image, KernelRequest, MemoryLayout};
use config::{Uuid, VmSettings};
use engine::GuestMemory;
use x86::cpuid::CpuidTable;

use crate::assembly::{Devices, serial_ports};
use crate::hash::fnv1a;
use crate::{MachineError, cpu};

/// The files that the guest boots from, opened.
pub(crate) struct BootFiles {
    kernel: Image,
    initrd: Option<Image>,
    command_line: String,
}

impl BootFiles {
    /// Opens them and looks whether the kernel is one.
    ///
    /// # Errors
    /// There is nothing to boot, or a file cannot be used.
    pub fn open(settings: &VmSettings) -> Result<Self, MachineError> {
        let boot = settings.boot.as_ref().ok_or(MachineError::NothingToBoot)?;
        let named = |option| move |source| MachineError::BootFile { option, source };
        let kernel = Image::open(&boot.kernel).map_err(named("--kernel"))?;
        boot::detect(&kernel).map_err(named("--kernel"))?;
        let initrd = boot.initrd.as_deref().map(Image::open).transpose().map_err(named("--initrd"))?;
        Ok(BootFiles { kernel, initrd, command_line: boot.cmdline.clone() })
    }
}

/// Writes the tables and loads the kernel.
///
/// # Errors
/// The tables do not fit, or the files are damaged or too large.
pub(crate) fn load(
    memory: &GuestMemory,
    files: &BootFiles,
    settings: &VmSettings,
    layout: &MemoryLayout,
    devices: &Devices,
    cpuid: &CpuidTable,
) -> Result<EntryState, MachineError> {
    let tables = boot::write_tables(memory, &platform(settings, layout, devices, cpuid))?;
    let request = KernelRequest {
        kernel: &files.kernel,
        initrd: files.initrd.as_ref(),
        command_line: &files.command_line,
        layout,
        rsdp: tables.rsdp,
    };
    Ok(boot::load(memory, &request)?)
}

fn platform(settings: &VmSettings, layout: &MemoryLayout, devices: &Devices, cpuid: &CpuidTable) -> Platform {
    let x86::cpuid::Topology { sockets, cores, threads } = settings.topology;
    let lpc = settings.pci.iter().find(|slot| slot.device == "lpc").map(|slot| slot.address);
    Platform {
        layout: *layout,
        topology: platform::Topology { sockets, cores, threads },
        apic_ids: (0..settings.topology.vcpus()).map(|vcpu| settings.topology.apic_id(vcpu)).collect(),
        processor: cpu::describe(cpuid),
        serial_ports: serial_ports(settings)
            .iter()
            .filter_map(|(index, _)| SerialPort::standard(u8::try_from(index + 1).ok()?))
            .collect(),
        ps2: false,
        graphics: false,
        hpet_capabilities: Some(devices.hpet.block_id()),
        gpe0: true,
        lpc: lpc.map(|a| PciSlot { device: a.slot, function: a.function }),
        pci_roots: vec![platform::PciRoot::sole(layout, interrupt_routes(devices))],
        smbios: smbios(&settings.smbios),
        uuid: settings.uuid.unwrap_or_else(|| default_uuid(settings.name.as_str())).0,
        acpi: settings.acpi_tables && settings.acpi_tables_in_memory,
        mptable: settings.mp_table,
    }
}

/// One route for each pin of each slot; functions of a slot share them.
fn interrupt_routes(devices: &Devices) -> Vec<IntxRoute> {
    let mut seen = BTreeSet::new();
    let routes = devices.pci.intx_routes().into_iter().filter(|route| route.address.bus == 0);
    routes
        .filter(|route| seen.insert((route.address.slot, route.pin)))
        .map(|route| IntxRoute {
            slot: route.address.slot,
            pin: match route.pin {
                devices::pci::IntxPin::A => IntxPin::A,
                devices::pci::IntxPin::B => IntxPin::B,
                devices::pci::IntxPin::C => IntxPin::C,
                devices::pci::IntxPin::D => IntxPin::D,
            },
            gsi: route.gsi,
            pic_irq: route.irq,
        })
        .collect()
}

fn smbios(strings: &config::settings::SmbiosStrings) -> SmbiosStrings {
    let s = strings.clone();
    SmbiosStrings {
        bios_vendor: s.bios_vendor,
        bios_version: s.bios_version,
        bios_release_date: s.bios_release_date,
        system_family_name: s.system_family_name,
        system_manufacturer: s.system_manufacturer,
        system_product_name: s.system_product_name,
        system_serial_number: s.system_serial_number,
        system_sku: s.system_sku,
        system_version: s.system_version,
        board_manufacturer: s.board_manufacturer,
        board_product_name: s.board_product_name,
        board_version: s.board_version,
        board_serial_number: s.board_serial_number,
        board_asset_tag: s.board_asset_tag,
        board_location: s.board_location,
        chassis_manufacturer: s.chassis_manufacturer,
        chassis_version: s.chassis_version,
        chassis_serial_number: s.chassis_serial_number,
        chassis_asset_tag: s.chassis_asset_tag,
        chassis_sku: s.chassis_sku,
    }
}

/// The UUID of a machine that has none set: the same each time on the same host (bhyve_config(5), `uuid`).
fn default_uuid(name: &str) -> Uuid {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    uuid_of(host.trim_end(), name)
}

/// A hash of both names (FNV-1a of 128 bits) as a UUID of version 8 (RFC 9562 §5.8).
fn uuid_of(host: &str, name: &str) -> Uuid {
    let mut uuid = fnv1a(host.bytes().chain([0]).chain(name.bytes())).to_be_bytes();
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    Uuid(uuid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_uuids_are_stable_valid_and_different() {
        let one = uuid_of("host", "g1");
        assert_eq!(one, uuid_of("host", "g1"));
        for other in [uuid_of("host", "g2"), uuid_of("other", "g1"), uuid_of("hostg", "1")] {
            assert_ne!(one, other);
        }
        assert_eq!((one.0[6] >> 4, one.0[8] >> 6), (8, 2));
    }
}
