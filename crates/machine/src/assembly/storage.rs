//! Controllers of disks, from the variables of their slots.

use std::sync::Arc;

use block::{Disk, SectorSize};
use config::settings::PciSlot;
use config::{Node, SettingError, ValueError};
use devices::ahci::{Ahci, AhciError, DiskIdentity, Drive};
use devices::nvme::{self, Nvme, NvmeConfig};
use devices::pci::PciDevice;
use devices::virtio::blk::{Blk, BlkConfig};
use devices::virtio::pci::VirtioPci;

use super::{Context, identity, pci_config};
use crate::MachineError;
use crate::hash::fnv1a;

/// The most queues of a virtio-blk device.
const MAX_BLK_QUEUES: i64 = 8;

pub(super) fn ahci(context: &Context<'_>, slot: &PciSlot) -> Result<Arc<dyn PciDevice>, MachineError> {
    let ports = context.tree.node(&slot.node).node("port");
    let mut drives = Vec::new();
    let mut disks = Vec::new();
    for number in 0..devices::ahci::MAX_PORTS {
        let port = ports.node(&number.to_string());
        drives.push(match port.string("type")?.as_deref() {
            None => None,
            Some("hd") => {
                let (disk, identity) = hard_disk(context, slot, number, &port)?;
                disks.push((number, disk.clone()));
                Some(Drive::Disk(disk, identity))
            }
            Some(_) => return Err(MachineError::NotAvailable("device ahci-cd".into())),
        });
    }
    // The adapter has no more ports than it needs.
    let used = drives.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
    drives.truncate(used);
    let identity = identity(context.tree, &slot.node, Ahci::identity())?;
    let memory = context.memory.clone();
    let ahci = Ahci::new(identity, drives, memory, context.clock.clone()).map_err(|error| match error {
        AhciError::Config(source) => pci_config(slot)(source),
        other => MachineError::Device(other.to_string()),
    })?;
    let ahci = Arc::new(ahci);
    for (number, disk) in disks {
        tell_size(context, &disk, &ahci, move |ahci: &Ahci| ahci.resized(number));
    }
    Ok(ahci)
}

/// A hard disk on a port of an AHCI adapter.
fn hard_disk(
    context: &Context<'_>,
    slot: &PciSlot,
    number: usize,
    port: &Node<'_>,
) -> Result<(Arc<Disk>, DiskIdentity), MachineError> {
    let disk = context.disks.open(&format!("{}.{number}", slot.address), port, context.memory, |_| ())?;
    let mut identity = DiskIdentity::disk(serial("APIARY", port)?);
    if let Some(model) = port.string("model")? {
        identity.model = model;
    }
    if let Some(firmware) = port.string("rev")? {
        identity.firmware = firmware;
    }
    if let Some(rate) = port.integer("nmrr", 0..=u16::MAX.into())? {
        identity.rotation_rate = u16::try_from(rate).unwrap_or_default();
    }
    Ok((disk, identity))
}

pub(super) fn nvme(context: &Context<'_>, slot: &PciSlot) -> Result<Arc<dyn PciDevice>, MachineError> {
    let node = context.tree.node(&slot.node);
    let number = |name: &str, most: i64, default: u16| -> Result<u16, MachineError> {
        Ok(node.integer(name, 1..=most)?.and_then(|value| u16::try_from(value).ok()).unwrap_or(default))
    };
    let block = node.convert("sectsz", block_size)?;
    let disk = context.disks.open(&slot.address.to_string(), &node, context.memory, |options| {
        if let Some(logical) = block {
            options.sectors = Some(SectorSize { logical, physical: logical.max(4096) });
        }
    })?;
    let serial = serial("NVME", &node)?;
    let info = disk.info();
    let config = NvmeConfig {
        max_queues: number("maxq", nvme::MAX_QUEUES.into(), 16)?,
        // A queue of one entry would always be both full and empty.
        queue_size: number("qsz", 4096, 2048)?.max(2),
        io_slots: number("ioslots", i64::from(u16::MAX), 64)?,
        block_bytes: info.sectors.logical,
        eui64: node.convert("eui64", eui64)?.unwrap_or_else(|| made_eui64(&serial)),
        serial,
        dataset_management: match node.string("dsm")?.as_deref() {
            Some("enable") => true,
            Some("disable") => false,
            _ => info.discard,
        },
    };
    let identity = identity(context.tree, &slot.node, nvme::IDENTITY)?;
    let nvme = Nvme::new(disk.clone(), context.memory.clone(), identity, config).map_err(pci_config(slot))?;
    tell_size(context, &disk, &nvme, Nvme::resized);
    Ok(nvme)
}

/// `sectsz` (bhyve(8)): the sizes that bhyve has.
fn block_size(text: &str) -> Result<u32, ValueError> {
    match text {
        "512" => Ok(512),
        "4096" => Ok(4096),
        "8192" => Ok(8192),
        _ => Err(ValueError::Word { value: text.to_owned(), accepted: "512, 4096, 8192" }),
    }
}

/// `eui64`: 64 bits, in decimal or, after 0x, in hexadecimal.
fn eui64(text: &str) -> Result<u64, ValueError> {
    let parsed = match text.strip_prefix("0x").or(text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| ValueError::Word { value: text.to_owned(), accepted: "a number of 64 bits" })
}

/// An identifier of a namespace that has been given none: its vendor part is the one of bhyve's (FreeBSD's OUI), the rest made of
/// the serial number.
fn made_eui64(serial: &str) -> u64 {
    const OUI: u64 = 0x58_9c_fc;
    OUI << 40 | (fnv1a(serial.bytes()) as u64) & 0xff_ffff_ffff
}

pub(super) fn virtio_blk(context: &Context<'_>, slot: &PciSlot) -> Result<Arc<dyn PciDevice>, MachineError> {
    let node = context.tree.node(&slot.node);
    let disk = context.disks.open(&slot.address.to_string(), &node, context.memory, |_| ())?;
    // A queue for each processor, so that none waits for another.
    let most = i64::from(context.settings.topology.vcpus()).min(MAX_BLK_QUEUES);
    let queues = node.integer("queues", 1..=MAX_BLK_QUEUES)?.unwrap_or(most);
    let config = BlkConfig { queues: u16::try_from(queues).unwrap_or(1), serial: serial("APIARY", &node)? };
    let device = Arc::new(Blk::new(disk.clone(), context.memory.clone(), config));
    tell_size(context, &disk, &device, Blk::resized);
    let identity = identity(context.tree, &slot.node, VirtioPci::identity(&*device))?;
    let msix = context.settings.virtio_msix;
    Ok(Arc::new(VirtioPci::new(device, identity, context.memory, msix).map_err(pci_config(slot))?))
}

/// Tells a device when its disk has another size.
fn tell_size<D: Send + Sync + 'static>(
    context: &Context<'_>,
    disk: &Arc<Disk>,
    device: &Arc<D>,
    tell: impl Fn(&D) + Send + Sync + 'static,
) {
    let device = Arc::downgrade(device);
    context.disks.on_resize(disk, move || device.upgrade().iter().for_each(|device| tell(device)));
}

/// The serial number (`ser`) of a disk. One that has been given none gets `prefix` and 12 hexadecimal digits, always the same for
/// the same image.
fn serial(prefix: &str, node: &Node<'_>) -> Result<String, SettingError> {
    if let Some(serial) = node.string("ser")? {
        return Ok(serial);
    }
    let hash = fnv1a(node.string_or("path", node.path())?.bytes());
    Ok(format!("{prefix}-{:012X}", (hash >> 80) as u64))
}
