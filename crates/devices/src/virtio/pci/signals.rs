//! How a virtio device gets its driver's attention: interrupts, and the status that goes with them.

use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex};

use crate::access::lock;
use crate::pci::PciFunction;
use crate::virtio::bits::{NO_VECTOR, isr, status};

/// The interrupt side of a virtio function.
pub struct Signals {
    pub(super) function: Arc<PciFunction>,
    /// The function has MSI-X, not MSI.
    msix: bool,
    /// Interrupt status, with its own lock so that it and the pin change together.
    isr: Mutex<u8>,
    pub(super) config_vector: AtomicU16,
    pub(super) queue_vectors: Vec<AtomicU16>,
    pub(super) generation: AtomicU8,
    pub(super) status: AtomicU8,
}

impl Signals {
    pub(super) fn new(function: Arc<PciFunction>, msix: bool, queues: usize) -> Self {
        Signals {
            function,
            msix,
            isr: Mutex::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            generation: AtomicU8::new(0),
            status: AtomicU8::new(0),
        }
    }

    /// Whether the device works on its queues at all.
    pub(in crate::virtio) fn may_access_memory(&self) -> bool {
        let now = self.status.load(Ordering::Acquire);
        now & status::DRIVER_OK != 0 && now & status::DEVICE_NEEDS_RESET == 0 && self.function.bus_master()
    }

    pub(super) fn msix_enabled(&self) -> bool {
        self.msix && self.function.sends_messages()
    }

    /// A queue has used buffers.
    pub(in crate::virtio) fn queue_used(&self, queue: u16) {
        let vector = self.queue_vectors.get(usize::from(queue)).map(|v| v.load(Ordering::Relaxed));
        self.interrupt(vector.unwrap_or(NO_VECTOR), isr::QUEUE);
    }

    /// The device's configuration has changed.
    pub(in crate::virtio) fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.interrupt(self.config_vector.load(Ordering::Relaxed), isr::CONFIG);
    }

    /// The device cannot go on before it is reset (§2.1.2).
    pub(in crate::virtio) fn needs_reset(&self) {
        let old = self.status.fetch_or(status::DEVICE_NEEDS_RESET, Ordering::AcqRel);
        if old & status::DEVICE_NEEDS_RESET == 0 && old & status::DRIVER_OK != 0 {
            self.interrupt(self.config_vector.load(Ordering::Relaxed), isr::CONFIG);
        }
    }

    fn interrupt(&self, vector: u16, cause: u8) {
        if self.msix_enabled() {
            if vector != NO_VECTOR {
                self.function.send(vector);
            }
            return;
        }
        // With MSI there is one message, and the status says what it means, as with the pin.
        *lock(&self.isr) |= cause;
        if self.function.sends_messages() {
            self.function.send(0);
        } else {
            self.drive_pin();
        }
    }

    fn drive_pin(&self) {
        let isr = lock(&self.isr);
        self.function.set_intx(*isr != 0 && !self.function.sends_messages());
    }

    /// The driver reads the interrupt status, which clears it.
    pub(super) fn take_isr(&self) -> u8 {
        let taken = std::mem::take(&mut *lock(&self.isr));
        self.drive_pin();
        taken
    }

    pub(super) fn isr(&self) -> u8 {
        *lock(&self.isr)
    }

    pub(super) fn set_isr(&self, value: u8) {
        *lock(&self.isr) = value;
        self.drive_pin();
    }

    /// Vectors and interrupt status as after a reset.
    pub(super) fn reset(&self) {
        self.status.store(0, Ordering::Release);
        for vector in self.queue_vectors.iter().chain([&self.config_vector]) {
            vector.store(NO_VECTOR, Ordering::Relaxed);
        }
        self.function.clear_pending_messages();
        self.set_isr(0);
    }

    /// The vector that a driver may set: one that the function has, or none.
    pub(super) fn checked_vector(&self, vector: u16) -> u16 {
        let vectors = if self.msix { self.queue_vectors.len() as u16 + 1 } else { 0 };
        if vector < vectors { vector } else { NO_VECTOR }
    }
}
