//! The legacy interface (virtio 1.2 §4.1.4.10, §2.7.2): a few ports, and rings whose three parts follow each other.

use std::sync::atomic::Ordering;

use super::{Negotiation, VirtioPci};
use crate::access::{lock, merge, store};
use crate::virtio::VirtioDevice;
use crate::virtio::bits::{descriptor, feature, legacy::*, split};

impl<D: VirtioDevice> VirtioPci<D> {
    /// Where the device's own configuration begins: behind the vectors, if there are any.
    fn legacy_config(&self) -> u64 {
        if self.signals.msix_enabled() { 0x18 } else { 0x14 }
    }

    pub(super) fn legacy_read(&self, offset: u64, data: &mut [u8]) {
        let config = self.legacy_config();
        if offset >= config {
            data.fill(0);
            return self.device.config_read(offset - config, data);
        }
        let negotiation = lock(&self.negotiation);
        let index = usize::from(negotiation.queue_select);
        let signals = &self.signals;
        let queue = |read: fn(&crate::virtio::queue::QueueState) -> u64| {
            self.queues.get(index).map_or(0, |queue| queue.with(|queue| read(queue.state())))
        };
        let value = match (offset, data.len()) {
            (DEVICE_FEATURES, 4) => self.offered() & feature::LEGACY,
            (DRIVER_FEATURES, 4) => negotiation.driver_features & feature::LEGACY,
            (QUEUE_ADDRESS, 4) => queue(|state| state.descriptors / PAGE),
            (QUEUE_SIZE, 2) => queue(|state| state.max_size.into()),
            (QUEUE_SELECT, 2) => negotiation.queue_select.into(),
            (DEVICE_STATUS, 1) => signals.status.load(Ordering::Acquire).into(),
            (ISR, 1) => signals.take_isr().into(),
            (CONFIG_MSIX_VECTOR, 2) => signals.config_vector.load(Ordering::Relaxed).into(),
            (QUEUE_MSIX_VECTOR, 2) => signals
                .queue_vectors
                .get(index)
                .map_or(crate::virtio::bits::NO_VECTOR, |vector| vector.load(Ordering::Relaxed))
                .into(),
            _ => 0,
        };
        store(data, value);
    }

    pub(super) fn legacy_write(&self, offset: u64, data: &[u8]) {
        let config = self.legacy_config();
        if offset >= config {
            return self.device.config_write(offset - config, data);
        }
        let value = merge(0, data, 0);
        if (offset, data.len()) == (QUEUE_NOTIFY, 2) {
            return self.notify(value as u16);
        }
        let mut negotiation = lock(&self.negotiation);
        let index = usize::from(negotiation.queue_select);
        let signals = &self.signals;
        match (offset, data.len()) {
            (DRIVER_FEATURES, 4) => {
                negotiation.driver_features = value & self.offered() & feature::LEGACY;
                self.settle_rings(negotiation.driver_features);
            }
            (QUEUE_ADDRESS, 4) => self.legacy_queue(&negotiation, value * PAGE),
            (QUEUE_SELECT, 2) => negotiation.queue_select = value as u16,
            (DEVICE_STATUS, 1) => self.set_status(&mut negotiation, value as u8),
            (CONFIG_MSIX_VECTOR, 2) => {
                signals.config_vector.store(signals.checked_vector(value as u16), Ordering::Relaxed);
            }
            (QUEUE_MSIX_VECTOR, 2) => {
                if let Some(vector) = signals.queue_vectors.get(index) {
                    vector.store(signals.checked_vector(value as u16), Ordering::Relaxed);
                }
            }
            _ => {}
        }
    }

    /// The driver says where a queue is; nowhere disables it.
    fn legacy_queue(&self, negotiation: &Negotiation, address: u64) {
        let Some(queue) = self.queues.get(usize::from(negotiation.queue_select)) else { return };
        if queue.with(|queue| queue.state().enabled) {
            self.device.drain();
            queue.reset();
            self.settle_rings(negotiation.driver_features);
        }
        queue.with(|queue| {
            let state = queue.state_mut();
            let size = u64::from(state.max_size);
            state.descriptors = address;
            state.driver = address + descriptor::BYTES * size;
            state.device = (state.driver + split::AVAIL_RING + 2 * size + 2).next_multiple_of(PAGE);
            let valid = address != 0 && queue.is_valid();
            queue.state_mut().enabled = valid;
        });
    }
}
