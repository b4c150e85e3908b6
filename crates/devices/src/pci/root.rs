//! The PCI root: finds the function that a configuration access means, and keeps BARs on the buses.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, RwLock};

use super::bits::{self, command, header_type, mechanism1};
use super::config::{BarKind, DecodedBar};
use super::device::{IntxPin, PciDevice};
use super::pirq::{PirqRouter, default_irq, gsi_of, pirq_of};
use super::{ECAM_BASE, ECAM_BYTES, PciAddress};
use crate::access::{lock, merge, store_from};
use crate::bus::{BusError, MmioBus, MmioDevice, PioBus, PioDevice};
use crate::host::MsiSink;
use crate::snapshot::{Persist, SnapshotError};

/// Memory BARs get whole pages, so that a page can be given to the guest or protected on its own.
const MEMORY_BAR_ALIGNMENT: u64 = 4096;
/// 64-bit BARs up to this size are placed below 4 GiB, where every guest can reach them.
const LARGEST_LOW_MEMORY64_BAR: u64 = 32 << 20;

/// Why a device could not be put on the PCI bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PciError {
    /// The address is taken.
    #[error("PCI slot {0} already holds a device; give one of them another slot or function")]
    Occupied(PciAddress),
    /// The BARs of all devices do not fit.
    #[error(
        "BAR {index} of the device in PCI slot {address} needs {size:#x} addresses, more than are left in {window}"
    )]
    NoRoom {
        /// Which function.
        address: PciAddress,
        /// Which BAR.
        index: usize,
        /// Its size.
        size: u64,
        /// Where it had to go.
        window: &'static str,
    },
}

/// Where [`PciRoot::assign_resources`] may place BARs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResourceWindows {
    /// Ports.
    pub io: Range<u64>,
    /// Memory below 4 GiB.
    pub memory: Range<u64>,
    /// Memory above RAM, for large 64-bit BARs.
    pub memory64: Range<u64>,
}

/// How a function's INTx pin reaches the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct IntxRoute {
    pub address: PciAddress,
    pub pin: IntxPin,
    pub pirq: usize,
    /// IOAPIC input.
    pub gsi: u32,
    /// ISA interrupt, where the PIRQ is routed to one.
    pub irq: Option<u8>,
}

type Functions = BTreeMap<PciAddress, Arc<dyn PciDevice>>;

/// The PCI buses behind the host bridge.
pub struct PciRoot {
    functions: RwLock<Functions>,
    /// BARs that are on the buses now. Its lock orders all changes of decoding.
    mapped: Mutex<BTreeMap<(PciAddress, usize), DecodedBar>>,
    router: Arc<PirqRouter>,
    messages: Arc<dyn MsiSink>,
    pio: Arc<PioBus>,
    mmio: Arc<MmioBus>,
    config_address: Mutex<u32>,
}

impl PciRoot {
    /// A root without devices, whose BARs appear on these buses, whose INTx pins go through `router` and whose messages through
    /// `messages`.
    pub fn new(
        pio: Arc<PioBus>,
        mmio: Arc<MmioBus>,
        router: Arc<PirqRouter>,
        messages: Arc<dyn MsiSink>,
    ) -> Self {
        PciRoot {
            functions: RwLock::default(),
            mapped: Mutex::default(),
            router,
            messages,
            pio,
            mmio,
            config_address: Mutex::new(0),
        }
    }

    /// Puts both access mechanisms on the buses. Port CF9h lies inside mechanism #1's ports and belongs to `reset_port`.
    ///
    /// # Errors
    /// Another device is there.
    pub fn attach(self: &Arc<Self>, reset_port: Arc<dyn PioDevice>) -> Result<(), BusError> {
        let ports = Arc::new(ConfigPorts { root: self.clone(), reset_port });
        self.pio.insert(u64::from(mechanism1::BASE), u64::from(mechanism1::PORTS), "pci-config", ports)?;
        self.mmio.insert(ECAM_BASE, ECAM_BYTES, "pci-ecam", self.clone())
    }

    /// The interrupt router.
    pub fn router(&self) -> &Arc<PirqRouter> {
        &self.router
    }

    fn functions(&self) -> std::sync::RwLockReadGuard<'_, Functions> {
        self.functions.read().unwrap_or_else(|e| e.into_inner())
    }

    /// Adds a function and wires its interrupts.
    ///
    /// # Errors
    /// The address is taken.
    pub fn insert(&self, address: PciAddress, device: Arc<dyn PciDevice>) -> Result<(), PciError> {
        {
            let mut functions = self.functions.write().unwrap_or_else(|e| e.into_inner());
            if functions.contains_key(&address) {
                return Err(PciError::Occupied(address));
            }
            functions.insert(address, device.clone());
        }
        if let Some(pin) = device.function().intx_pin() {
            let pirq = pirq_of(address, pin);
            if self.router.irq(pirq).is_none() {
                self.router.set_route(pirq, default_irq(pirq));
            }
            let line = self.router.irq(pirq).unwrap_or(0xff);
            device.function().with_config(|config| config.set_u8(bits::INTERRUPT_LINE, line));
            device.function().connect_intx(self.router.input(pirq));
        }
        device.function().connect_messages(self.messages.clone());
        self.refresh_decoding();
        Ok(())
    }

    /// Takes a function away; its BARs answer no longer.
    pub fn remove(&self, address: PciAddress) -> Option<Arc<dyn PciDevice>> {
        let device = self.functions.write().unwrap_or_else(|e| e.into_inner()).remove(&address);
        self.refresh_decoding();
        device
    }

    /// The function at an address.
    pub fn get(&self, address: PciAddress) -> Option<Arc<dyn PciDevice>> {
        self.functions().get(&address).cloned()
    }

    /// Every function, in order of address.
    pub fn devices(&self) -> Vec<(PciAddress, Arc<dyn PciDevice>)> {
        self.functions().iter().map(|(address, device)| (*address, device.clone())).collect()
    }

    /// How every INTx pin in use is routed, for firmware tables.
    pub fn intx_routes(&self) -> Vec<IntxRoute> {
        let route = |address, pin| {
            let pirq = pirq_of(address, pin);
            IntxRoute { address, pin, pirq, gsi: gsi_of(pirq), irq: self.router.irq(pirq) }
        };
        self.devices()
            .into_iter()
            .filter_map(|(address, device)| Some(route(address, device.function().intx_pin()?)))
            .collect()
    }

    /// Gives every BAR that has no address one, and enables decoding, as firmware would before an operating system runs.
    ///
    /// # Errors
    /// A window is too small; BARs that came before it are assigned.
    pub fn assign_resources(&self, windows: &ResourceWindows) -> Result<(), PciError> {
        let mut wanted = Vec::new();
        for (address, device) in self.devices() {
            device.function().with_config(|config| {
                let unassigned: Vec<_> = config
                    .bars()
                    .filter(|spec| spec.kind != BarKind::Rom && config.bar_base(spec.index) == Some(0))
                    .collect();
                wanted.extend(unassigned.into_iter().map(|spec| (address, device.clone(), spec)));
            });
        }
        // Largest first wastes no space on alignment; ties keep the order of addresses.
        wanted.sort_by_key(|(_, _, spec)| std::cmp::Reverse(spec.size));
        let mut free = windows.clone();
        for (address, device, spec) in wanted {
            let (window, name, alignment, enable) = match spec.kind {
                BarKind::Io => (&mut free.io, "the port window", spec.size, command::IO_SPACE),
                BarKind::Memory64 { .. } if spec.size > LARGEST_LOW_MEMORY64_BAR => (
                    &mut free.memory64,
                    "the memory window above RAM",
                    spec.size.max(MEMORY_BAR_ALIGNMENT),
                    command::MEMORY_SPACE,
                ),
                _ => (
                    &mut free.memory,
                    "the memory window below 4 GiB",
                    spec.size.max(MEMORY_BAR_ALIGNMENT),
                    command::MEMORY_SPACE,
                ),
            };
            let base = window
                .start
                .checked_next_multiple_of(alignment)
                .filter(|base| base.checked_add(alignment).is_some_and(|end| end <= window.end))
                .ok_or(PciError::NoRoom { address, index: spec.index, size: spec.size, window: name })?;
            window.start = base + alignment;
            device.function().with_config(|config| {
                config.set_bar_base(spec.index, base);
                config.set_u16(bits::COMMAND, config.command() | enable);
            });
        }
        self.refresh_decoding();
        Ok(())
    }

    /// Makes the buses show the BARs that are enabled now. Needed after anything but a configuration write has changed a
    /// function's command register or BARs.
    pub fn refresh_decoding(&self) {
        let mut mapped = lock(&self.mapped);
        let mut wanted = BTreeMap::new();
        let devices = self.functions().clone();
        for (address, device) in &devices {
            for bar in device.function().with_config(|config| config.decoded()) {
                wanted.insert((*address, bar.spec.index), bar);
            }
        }
        // Everything that moves is lifted before anything is put down: devices may swap places.
        mapped.retain(|key, bar| {
            if wanted.get(key) == Some(bar) {
                return true;
            }
            if bar.spec.kind.is_io() {
                self.pio.remove(bar.base);
            } else {
                self.mmio.remove(bar.base);
            }
            if let Some(device) = devices.get(&key.0) {
                device.bar_mapped(key.1, None);
            }
            false
        });
        for (key, bar) in wanted {
            if mapped.contains_key(&key) {
                continue;
            }
            let (address, index) = key;
            let Some(device) = devices.get(&address) else { continue };
            let window = Arc::new(BarWindow { device: device.clone(), index });
            let name = format!("pci {address} bar {index}");
            let inserted = if bar.spec.kind.is_io() {
                self.pio.insert(bar.base, bar.spec.size, &name, window)
            } else {
                self.mmio.insert(bar.base, bar.spec.size, &name, window)
            };
            match inserted {
                Ok(()) => {
                    mapped.insert(key, bar);
                    device.bar_mapped(index, Some(bar.base));
                }
                // Happens while software sizes a BAR without disabling it first. On hardware both devices would answer; here the
                // one that came first does, and this one is tried again at the next change.
                Err(error) => tracing::debug!("{error}"),
            }
        }
    }

    /// A configuration read; ones if nothing is there.
    pub fn config_read(&self, address: PciAddress, offset: u16, data: &mut [u8]) {
        let (device, siblings) = {
            let functions = self.functions();
            let slot = PciAddress { function: 0, ..address }..=PciAddress { function: 7, ..address };
            (functions.get(&address).cloned(), functions.range(slot).nth(1).is_some())
        };
        let Some(device) = device.filter(|_| aligned(offset, data.len())) else {
            data.fill(0xff);
            return;
        };
        device.config_read(offset, data);
        if siblings
            && let Some(byte) =
                bits::HEADER_TYPE.checked_sub(usize::from(offset)).and_then(|i| data.get_mut(i))
        {
            *byte |= header_type::MULTI_FUNCTION;
        }
    }

    /// A configuration write.
    pub fn config_write(&self, address: PciAddress, offset: u16, data: &[u8]) {
        let Some(device) = self.get(address).filter(|_| aligned(offset, data.len())) else { return };
        device.config_write(offset, data);
        if (bits::COMMAND..bits::CAPABILITIES_POINTER).contains(&usize::from(offset)) {
            self.refresh_decoding();
        }
    }
}

/// Configuration accesses are 1, 2 or 4 bytes on their natural boundary.
fn aligned(offset: u16, len: usize) -> bool {
    matches!(len, 1 | 2 | 4) && usize::from(offset) % len == 0
}

/// ECAM: offset bits 27–20 bus, 19–15 slot, 14–12 function, 11–0 register.
impl MmioDevice for PciRoot {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        // Wider accesses than four bytes are two (PCI Express 4.0 §7.2.2 leaves them to the root).
        for (i, part) in data.chunks_mut(4).enumerate() {
            let (address, register) = ecam_address(offset + 4 * i as u64);
            self.config_read(address, register, part);
        }
    }

    fn mmio_write(&self, offset: u64, data: &[u8]) {
        for (i, part) in data.chunks(4).enumerate() {
            let (address, register) = ecam_address(offset + 4 * i as u64);
            self.config_write(address, register, part);
        }
    }
}

fn ecam_address(offset: u64) -> (PciAddress, u16) {
    let register = offset % bits::EXTENDED_CONFIG_BYTES;
    let packed = offset / bits::EXTENDED_CONFIG_BYTES;
    (PciAddress::from_packed(packed as u16), register as u16)
}

/// Configuration mechanism #1, ports CF8h to CFFh, with the reset register at CF9h.
pub struct ConfigPorts {
    root: Arc<PciRoot>,
    reset_port: Arc<dyn PioDevice>,
}

impl ConfigPorts {
    /// Function and register that CONFIG_DATA means, if it means any.
    fn target(&self, offset: u16) -> Option<(PciAddress, u16)> {
        let value = *lock(&self.root.config_address);
        let register = (value & 0xfc) as u16 + (offset - mechanism1::DATA);
        (value & mechanism1::ENABLE != 0).then(|| (PciAddress::from_packed((value >> 8) as u16), register))
    }

    /// CONFIG_ADDRESS answers only as a whole (PCI 3.0 §3.2.2.3.2); bytes inside it are other devices' ports.
    fn is_reset_port(offset: u16, len: usize) -> bool {
        offset == 1 && len == 1
    }
}

impl PioDevice for ConfigPorts {
    fn pio_read(&self, offset: u16, data: &mut [u8]) {
        if Self::is_reset_port(offset, data.len()) {
            self.reset_port.pio_read(0, data);
        } else if offset >= mechanism1::DATA {
            match self.target(offset) {
                Some((address, register)) => self.root.config_read(address, register, data),
                None => data.fill(0xff),
            }
        } else if offset == 0 && data.len() == 4 {
            store_from(data, u64::from(*lock(&self.root.config_address)), 0);
        } else {
            data.fill(0xff);
        }
    }

    fn pio_write(&self, offset: u16, data: &[u8]) {
        if Self::is_reset_port(offset, data.len()) {
            self.reset_port.pio_write(0, data);
        } else if offset >= mechanism1::DATA {
            if let Some((address, register)) = self.target(offset) {
                self.root.config_write(address, register, data);
            }
        } else if offset == 0 && data.len() == 4 {
            *lock(&self.root.config_address) = merge(0, data, 0) as u32 & mechanism1::ADDRESS_MASK;
        }
    }
}

struct BarWindow {
    device: Arc<dyn PciDevice>,
    index: usize,
}

impl PioDevice for BarWindow {
    fn pio_read(&self, offset: u16, data: &mut [u8]) {
        self.device.bar_read(self.index, u64::from(offset), data);
    }

    fn pio_write(&self, offset: u16, data: &[u8]) {
        self.device.bar_write(self.index, u64::from(offset), data);
    }
}

impl MmioDevice for BarWindow {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        self.device.bar_read(self.index, offset, data);
    }

    fn mmio_write(&self, offset: u64, data: &[u8]) {
        self.device.bar_write(self.index, offset, data);
    }
}

/// Registers of the root itself; functions save their own.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PciRootState {
    /// CONFIG_ADDRESS.
    pub config_address: u32,
}

impl Persist for PciRoot {
    type State = PciRootState;
    const VERSION: u32 = 1;

    fn save(&self) -> PciRootState {
        PciRootState { config_address: *lock(&self.config_address) }
    }

    /// To be called after every function has been restored: BARs take their places here.
    fn restore(&self, state: PciRootState) -> Result<(), SnapshotError> {
        *lock(&self.config_address) = state.config_address & mechanism1::ADDRESS_MASK;
        self.refresh_decoding();
        Ok(())
    }
}
