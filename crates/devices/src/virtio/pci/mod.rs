//! Virtio over PCI (virtio 1.2 §4.1): transitional devices, with the modern structures in memory and the legacy registers in ports.

mod common;
mod legacy;
pub(in crate::virtio) mod signals;
#[cfg(test)]
mod tests;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use memory::GuestMemory;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::bits::{self, capability, common as registers, feature, status};
use super::queue::{Layout, QueueState};
use super::{Driver, VirtioDevice, Virtqueue};
use crate::access::lock;
use crate::pci::config::ConfigError;
use crate::pci::{
    BarKind, BarSpec, ConfigSpace, IntxPin, PciDevice, PciFunction, PciFunctionState, PciIdentity,
};
use crate::snapshot::{Persist, SnapshotError};
use signals::Signals;

/// BARs of the function.
const LEGACY_BAR: usize = 0;
const MSIX_BAR: usize = 1;
const MODERN_BAR: usize = 4;

/// Where the structures are in the modern BAR; each has a page of its own.
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const PART_BYTES: u64 = 0x1000;
const MODERN_BYTES: u64 = 0x4000;
/// Bytes between the places at which two queues are notified.
const NOTIFY_MULTIPLIER: u32 = 4;

/// What the driver has negotiated and selected.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Negotiation {
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    /// The device has been activated.
    active: bool,
}

/// A virtio device on the PCI bus.
pub struct VirtioPci<D> {
    device: Arc<D>,
    signals: Arc<Signals>,
    queues: Vec<Arc<Virtqueue>>,
    negotiation: Mutex<Negotiation>,
    /// Where the capability is by which configuration space gives access to BARs.
    window: usize,
}

/// Registers of a [`VirtioPci`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VirtioPciState {
    function: PciFunctionState,
    negotiation: Negotiation,
    status: u8,
    isr: u8,
    generation: u8,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    queues: Vec<QueueState>,
    device: Value,
}

impl<D: VirtioDevice> VirtioPci<D> {
    /// The identity of a transitional device: numbered as legacy drivers expect, which know the type from the subsystem.
    pub fn identity(device: &D) -> PciIdentity {
        let device_type = device.device_type();
        // The transitional numbers of the types of virtio 0.9 (§4.1.2.1).
        let id = match device_type {
            bits::device_type::NET => 0,
            bits::device_type::BLOCK => 1,
            bits::device_type::CONSOLE => 3,
            bits::device_type::SCSI => 4,
            bits::device_type::ENTROPY => 5,
            other => other,
        };
        PciIdentity {
            vendor: bits::VENDOR,
            device: bits::TRANSITIONAL_DEVICE_BASE + id,
            revision: 0,
            class: device.class(),
            subsystem_vendor: bits::VENDOR,
            subsystem: device_type,
        }
    }

    /// Puts a device behind PCI registers. It offers MSI-X, or one MSI message if not `msix` (`virtio_msix=false`).
    ///
    /// # Errors
    /// None in practice: BARs and capabilities fit.
    pub fn new(
        device: Arc<D>,
        identity: PciIdentity,
        memory: &GuestMemory,
        msix: bool,
    ) -> Result<Self, ConfigError> {
        let sizes = device.queue_sizes();
        let vectors = sizes.len() as u16 + 1;
        let mut config = ConfigSpace::new(identity);
        config.add_bar(BarSpec { index: LEGACY_BAR, kind: BarKind::Io, size: 0x80 })?;
        config.add_bar(BarSpec {
            index: MODERN_BAR,
            kind: BarKind::Memory64 { prefetchable: true },
            size: MODERN_BYTES,
        })?;
        for (kind, offset, len) in [
            (capability::COMMON, COMMON, registers::BYTES),
            (capability::ISR, ISR, 1),
            (capability::DEVICE, DEVICE, PART_BYTES),
        ] {
            config.add_capability(
                crate::pci::bits::capability::VENDOR,
                &structure(kind, offset, len, &[]),
                &[],
            )?;
        }
        let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
        let notify = structure(capability::NOTIFY, NOTIFY, PART_BYTES, &multiplier);
        config.add_capability(crate::pci::bits::capability::VENDOR, &notify, &[])?;
        let access = structure(capability::PCI, 0, 0, &[0; 4]);
        // BAR, offset and length are the driver's to choose.
        let mut writable = vec![0; access.len()];
        writable[2] = 0xff;
        writable[6..14].fill(0xff);
        let window = config.add_capability(crate::pci::bits::capability::VENDOR, &access, &writable)?;
        if msix {
            let table = u32::from(vectors) * crate::pci::bits::msix::ENTRY_BYTES as u32;
            let pending = table.next_multiple_of(2048);
            let size = (u64::from(pending) + 2048).next_power_of_two();
            config.add_bar(BarSpec {
                index: MSIX_BAR,
                kind: BarKind::Memory32 { prefetchable: false },
                size: size.max(4096),
            })?;
            config.add_msix_capability(vectors, MSIX_BAR, 0, pending)?;
        } else {
            config.add_msi_capability(1)?;
        }
        let function = Arc::new(PciFunction::new(config, Some(IntxPin::A)));
        let signals = Arc::new(Signals::new(function, msix, sizes.len()));
        let queues = sizes
            .into_iter()
            .zip(0..)
            .map(|(size, index)| Arc::new(Virtqueue::new(memory.clone(), index, size, signals.clone())))
            .collect();
        Ok(VirtioPci { device, signals, queues, negotiation: Mutex::default(), window })
    }

    /// The device behind the registers.
    pub fn device(&self) -> &Arc<D> {
        &self.device
    }

    /// What is offered to a driver.
    fn offered(&self) -> u64 {
        self.device.features()
            | feature::ANY_LAYOUT
            | feature::RING_INDIRECT_DESC
            | feature::RING_EVENT_IDX
            | feature::VERSION_1
            | feature::RING_PACKED
            | feature::RING_RESET
    }

    fn driver(&self, features: u64) -> Driver {
        Driver { features, queues: self.queues.clone(), signals: self.signals.clone() }
    }

    /// The driver writes the device status.
    fn set_status(&self, negotiation: &mut Negotiation, value: u8) {
        if value == 0 {
            return self.reset(negotiation);
        }
        let old = self.signals.status.load(Ordering::Acquire);
        // Bits are only set, and the device's own is not the driver's.
        let mut new = old | value & !status::DEVICE_NEEDS_RESET;
        if new & !old & status::FEATURES_OK != 0 && !self.accepts(negotiation.driver_features) {
            new &= !status::FEATURES_OK;
        }
        let starts = new & status::DRIVER_OK != 0 && !negotiation.active;
        if starts || new & !old & status::FEATURES_OK != 0 {
            self.settle_rings(negotiation.driver_features);
        }
        if starts {
            negotiation.active = true;
            self.device.activate(self.driver(negotiation.driver_features));
        }
        self.signals.status.fetch_or(new, Ordering::AcqRel);
        if starts {
            // Drivers may fill their queues before they are ready, and notify once.
            (0..self.queues.len() as u16).for_each(|queue| self.notify(queue));
        }
    }

    /// Whether a modern driver may have these features.
    fn accepts(&self, features: u64) -> bool {
        features & !self.offered() == 0 && features & feature::VERSION_1 != 0
    }

    fn settle_rings(&self, features: u64) {
        for queue in &self.queues {
            queue.with(|queue| {
                let state = queue.state_mut();
                state.event_index = features & feature::RING_EVENT_IDX != 0;
                state.layout =
                    if features & feature::RING_PACKED != 0 { Layout::Packed } else { Layout::Split };
            });
        }
    }

    fn reset(&self, negotiation: &mut Negotiation) {
        // First nothing new is begun, then what is on its way ends.
        self.signals.status.store(0, Ordering::Release);
        self.device.drain();
        self.device.reset();
        self.queues.iter().for_each(|queue| queue.reset());
        *negotiation = Negotiation::default();
        self.signals.reset();
    }

    fn notify(&self, queue: u16) {
        if usize::from(queue) < self.queues.len() && self.signals.may_access_memory() {
            self.device.notify(queue);
        }
    }

    fn modern_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            COMMON..ISR => self.common_read(offset - COMMON, data),
            ISR => data[0] = self.signals.take_isr(),
            DEVICE..NOTIFY => self.device.config_read(offset - DEVICE, data),
            _ => {}
        }
    }

    fn modern_write(&self, offset: u64, data: &[u8]) {
        match offset {
            COMMON..ISR => self.common_write(offset - COMMON, data),
            DEVICE..NOTIFY => self.device.config_write(offset - DEVICE, data),
            NOTIFY.. => self.notify(((offset - NOTIFY) / u64::from(NOTIFY_MULTIPLIER)) as u16),
            _ => {}
        }
    }

    /// The place in a BAR that the window in configuration space shows: BAR, offset, bytes.
    fn window(&self) -> (usize, u64, usize) {
        self.function().with_config(|config| {
            let at = self.window;
            (config.u8(at + 4).into(), config.u32(at + 8).into(), config.u32(at + 12) as usize)
        })
    }

    /// Whether an access to configuration space is one to a BAR, through the window.
    fn window_hit(&self, offset: u16, len: usize) -> Option<(usize, u64)> {
        let data = self.window + capability::BYTES;
        let (bar, at, window_len) = self.window();
        (usize::from(offset) == data && len == window_len && bar <= MODERN_BAR).then_some((bar, at))
    }
}

/// A `virtio_pci_cap` without its first two bytes.
fn structure(kind: u8, offset: u64, len: u64, more: &[u8]) -> Vec<u8> {
    let mut body = vec![(capability::BYTES + more.len()) as u8, kind, MODERN_BAR as u8, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((len as u32).to_le_bytes());
    body.extend(more);
    body
}

impl<D: VirtioDevice> PciDevice for VirtioPci<D> {
    fn function(&self) -> &PciFunction {
        &self.signals.function
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        match self.window_hit(offset, data.len()) {
            Some((bar, at)) => self.bar_read(bar, at, data),
            None => self.function().config_read(offset, data),
        }
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        match self.window_hit(offset, data.len()) {
            Some((bar, at)) => self.bar_write(bar, at, data),
            None => self.function().config_write(offset, data),
        }
    }

    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) {
        match bar {
            LEGACY_BAR => self.legacy_read(offset, data),
            MSIX_BAR => {
                if !self.function().msix_read(offset, data) {
                    data.fill(0);
                }
            }
            MODERN_BAR => self.modern_read(offset, data),
            _ => data.fill(0),
        }
    }

    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) {
        match bar {
            LEGACY_BAR => self.legacy_write(offset, data),
            MSIX_BAR => {
                self.function().msix_write(offset, data);
            }
            MODERN_BAR => self.modern_write(offset, data),
            _ => {}
        }
    }
}

impl<D: VirtioDevice> Persist for VirtioPci<D> {
    type State = VirtioPciState;
    const VERSION: u32 = 1;

    fn save(&self) -> VirtioPciState {
        let signals = &self.signals;
        VirtioPciState {
            function: signals.function.save(),
            negotiation: lock(&self.negotiation).clone(),
            status: signals.status.load(Ordering::Acquire),
            isr: signals.isr(),
            generation: signals.generation.load(Ordering::Acquire),
            config_vector: signals.config_vector.load(Ordering::Relaxed),
            queue_vectors: signals.queue_vectors.iter().map(|v| v.load(Ordering::Relaxed)).collect(),
            queues: self.queues.iter().map(|queue| queue.with(|queue| queue.state().clone())).collect(),
            device: self.device.save(),
        }
    }

    fn restore(&self, state: VirtioPciState) -> Result<(), SnapshotError> {
        let invalid = |what: &str| Err(SnapshotError::Invalid(format!("virtio: {what}")));
        if state.queues.len() != self.queues.len() || state.queue_vectors.len() != self.queues.len() {
            return invalid("another number of queues");
        }
        for (saved, queue) in state.queues.iter().zip(&self.queues) {
            let valid = queue.with(|queue| {
                let mut copy = queue.clone();
                let max_size = copy.state().max_size;
                *copy.state_mut() = saved.clone();
                saved.max_size == max_size && (!saved.enabled || copy.is_valid())
            });
            if !valid {
                return invalid("a queue that cannot be");
            }
        }
        self.device.restore(&state.device)?;
        let signals = &self.signals;
        signals.function.restore(&state.function, &[])?;
        for (saved, queue) in state.queues.iter().zip(&self.queues) {
            queue.restore(saved);
        }
        signals.generation.store(state.generation, Ordering::Release);
        signals.config_vector.store(signals.checked_vector(state.config_vector), Ordering::Relaxed);
        for (saved, vector) in state.queue_vectors.iter().zip(&signals.queue_vectors) {
            vector.store(signals.checked_vector(*saved), Ordering::Relaxed);
        }
        if state.negotiation.active {
            self.device.activate(self.driver(state.negotiation.driver_features));
        }
        *lock(&self.negotiation) = state.negotiation;
        signals.status.store(state.status, Ordering::Release);
        signals.set_isr(state.isr);
        Ok(())
    }
}
