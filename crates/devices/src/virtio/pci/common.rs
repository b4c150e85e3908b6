//! The common configuration structure (virtio 1.2 §4.1.4.3).

use std::sync::atomic::Ordering;

use super::{Negotiation, VirtioPci};
use crate::access::{lock, merge};
use crate::virtio::bits::common::*;
use crate::virtio::{VirtioDevice, Virtqueue};

/// The half of a 64-bit set of features that a select register means.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

/// Puts a value at an offset of the image of the structure.
fn put<const N: usize>(image: &mut [u8], offset: u64, value: [u8; N]) {
    if let Some(place) = image.get_mut(offset as usize..).and_then(|rest| rest.get_mut(..N)) {
        place.copy_from_slice(&value);
    }
}

impl<D: VirtioDevice> VirtioPci<D> {
    fn selected(&self, negotiation: &Negotiation) -> Option<&Virtqueue> {
        self.queues.get(usize::from(negotiation.queue_select)).map(|queue| &**queue)
    }

    pub(super) fn common_read(&self, offset: u64, data: &mut [u8]) {
        let negotiation = lock(&self.negotiation);
        let signals = &self.signals;
        let mut image = [0; BYTES as usize];
        let select = negotiation.device_feature_select;
        put(&mut image, DEVICE_FEATURE_SELECT, select.to_le_bytes());
        put(&mut image, DEVICE_FEATURE, half(self.offered(), select).to_le_bytes());
        let select = negotiation.driver_feature_select;
        put(&mut image, DRIVER_FEATURE_SELECT, select.to_le_bytes());
        put(&mut image, DRIVER_FEATURE, half(negotiation.driver_features, select).to_le_bytes());
        let vector = signals.config_vector.load(Ordering::Relaxed);
        put(&mut image, CONFIG_MSIX_VECTOR, vector.to_le_bytes());
        put(&mut image, NUM_QUEUES, (self.queues.len() as u16).to_le_bytes());
        put(&mut image, DEVICE_STATUS, [signals.status.load(Ordering::Acquire)]);
        put(&mut image, CONFIG_GENERATION, [signals.generation.load(Ordering::Acquire)]);
        put(&mut image, QUEUE_SELECT, negotiation.queue_select.to_le_bytes());
        // A queue that is not there has size 0.
        if let Some(queue) = self.selected(&negotiation) {
            let select = negotiation.queue_select;
            let vector = signals.queue_vectors[usize::from(select)].load(Ordering::Relaxed);
            queue.with(|queue| {
                let state = queue.state();
                put(&mut image, QUEUE_SIZE, state.size.to_le_bytes());
                put(&mut image, QUEUE_MSIX_VECTOR, vector.to_le_bytes());
                put(&mut image, QUEUE_ENABLE, u16::from(state.enabled).to_le_bytes());
                put(&mut image, QUEUE_NOTIFY_OFF, select.to_le_bytes());
                put(&mut image, QUEUE_DESC, state.descriptors.to_le_bytes());
                put(&mut image, QUEUE_DRIVER, state.driver.to_le_bytes());
                put(&mut image, QUEUE_DEVICE, state.device.to_le_bytes());
                put(&mut image, QUEUE_NOTIFY_DATA, select.to_le_bytes());
            });
        }
        let from = image.get(offset as usize..).unwrap_or_default();
        data.iter_mut().zip(from).for_each(|(to, byte)| *to = *byte);
    }

    pub(super) fn common_write(&self, offset: u64, data: &[u8]) {
        let mut negotiation = lock(&self.negotiation);
        let negotiation = &mut *negotiation;
        let signals = &self.signals;
        let value = merge(0, data, 0);
        match (offset, data.len()) {
            (DEVICE_FEATURE_SELECT, 4) => negotiation.device_feature_select = value as u32,
            (DRIVER_FEATURE_SELECT, 4) => negotiation.driver_feature_select = value as u32,
            // Not after the device has agreed to them (§2.2.1).
            (DRIVER_FEATURE, 4) if !self.features_agreed() => {
                let old = negotiation.driver_features;
                negotiation.driver_features = match negotiation.driver_feature_select {
                    0 => old >> 32 << 32 | value,
                    1 => old & u64::from(u32::MAX) | value << 32,
                    _ => old,
                };
            }
            (CONFIG_MSIX_VECTOR, 2) => {
                signals.config_vector.store(signals.checked_vector(value as u16), Ordering::Relaxed);
            }
            (DEVICE_STATUS, 1) => self.set_status(negotiation, value as u8),
            (QUEUE_SELECT, 2) => negotiation.queue_select = value as u16,
            (QUEUE_MSIX_VECTOR, 2) => {
                if let Some(vector) = signals.queue_vectors.get(usize::from(negotiation.queue_select)) {
                    vector.store(signals.checked_vector(value as u16), Ordering::Relaxed);
                }
            }
            (QUEUE_RESET, 2) if value == 1 => {
                if let Some(queue) = self.selected(negotiation) {
                    self.device.drain();
                    queue.reset();
                    self.settle_rings(negotiation.driver_features);
                }
            }
            _ => {
                if let Some(queue) = self.selected(negotiation) {
                    set_up(queue, offset, data);
                }
            }
        }
    }

    fn features_agreed(&self) -> bool {
        use crate::virtio::bits::status::FEATURES_OK;
        self.signals.status.load(Ordering::Acquire) & FEATURES_OK != 0
    }
}

/// Writes to the registers of a queue, which stay as they are while it is enabled.
fn set_up(queue: &Virtqueue, offset: u64, data: &[u8]) {
    queue.with(|queue| {
        if queue.state().enabled {
            return;
        }
        let value = merge(0, data, 0);
        match (offset, data.len()) {
            (QUEUE_SIZE, 2) => queue.state_mut().size = value as u16,
            (QUEUE_ENABLE, 2) => {
                let valid = queue.is_valid();
                queue.state_mut().enabled = value == 1 && valid;
            }
            (QUEUE_DESC..QUEUE_NOTIFY_DATA, 4 | 8) => {
                let state = queue.state_mut();
                let address = match offset & !7 {
                    QUEUE_DESC => &mut state.descriptors,
                    QUEUE_DRIVER => &mut state.driver,
                    _ => &mut state.device,
                };
                *address = merge(*address, data, offset & 7);
            }
            _ => {}
        }
    });
}
