//! Split rings (virtio 1.2 §2.7).

use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress};

use super::{Chain, MAX_DESCRIPTORS, Queue, QueueError, passes};
use crate::virtio::bits::{descriptor, split};

impl Queue {
    pub(super) fn pop_split(&mut self) -> Result<Option<Chain>, QueueError> {
        let size = self.state.size;
        let index = self.load("the available ring", self.state.driver.wrapping_add(split::AVAIL_INDEX))?;
        let available = index.wrapping_sub(self.state.next_available);
        if available == 0 {
            return Ok(None);
        }
        if available > size {
            return Err(QueueError::AvailableIndex(available, size));
        }
        let entry = split::AVAIL_RING + 2 * u64::from(self.state.next_available % size);
        let head = self.load("the available ring", self.state.driver.wrapping_add(entry))?;
        let chain = self.split_chain(head)?;
        self.state.next_available = self.state.next_available.wrapping_add(1);
        Ok(Some(chain))
    }

    fn split_chain(&self, head: u16) -> Result<Chain, QueueError> {
        let mut chain = Chain { id: head, ..Chain::new() };
        let (mut table, mut count) = (self.state.descriptors, u32::from(self.state.size));
        let mut index = head;
        let mut indirect = false;
        // The descriptor that points to a table is none of the buffer's.
        for _ in 0..=MAX_DESCRIPTORS {
            if u32::from(index) >= count {
                return Err(QueueError::DescriptorIndex(index, count.min(u16::MAX.into()) as u16));
            }
            let descriptor = self.descriptor(table.wrapping_add(descriptor::BYTES * u64::from(index)))?;
            if descriptor.flags & descriptor::INDIRECT != 0 {
                if indirect || descriptor.flags & descriptor::NEXT != 0 {
                    return Err(QueueError::Indirect(descriptor.len));
                }
                (table, count) = (descriptor.address, descriptor.table_len()?);
                (index, indirect) = (0, true);
                continue;
            }
            chain.add(descriptor)?;
            if descriptor.flags & descriptor::NEXT == 0 {
                return Ok(chain);
            }
            index = descriptor.next;
        }
        Err(QueueError::TooLong)
    }

    pub(super) fn push_split(&mut self, chain: &Chain, written: u32) -> Result<bool, QueueError> {
        let (old, new) = (self.state.next_used, self.state.next_used.wrapping_add(1));
        let entry = self.state.device.wrapping_add(split::USED_RING + 8 * u64::from(old % self.state.size));
        let element = u64::from(chain.id) | u64::from(written) << 32;
        self.memory
            .write_slice(&element.to_le_bytes(), GuestAddress(entry))
            .map_err(|_| QueueError::Memory("the used ring", entry))?;
        self.store("the used ring", new, self.state.device.wrapping_add(split::USED_INDEX))?;
        self.state.next_used = new;
        // The driver writes its wish and then reads the index; we the other way round.
        fence(Ordering::SeqCst);
        if self.state.event_index {
            let place = split::AVAIL_RING + 2 * u64::from(self.state.size);
            let event = self.load("used_event", self.state.driver.wrapping_add(place))?;
            return Ok(passes(event, new, old));
        }
        Ok(self.load("the available ring", self.state.driver)? & split::AVAIL_NO_INTERRUPT == 0)
    }

    pub(super) fn set_split_notifications(&mut self, wanted: bool) -> Result<(), QueueError> {
        if !self.state.event_index {
            let flags = if wanted { 0 } else { split::USED_NO_NOTIFY };
            return self.store("the used ring", flags, self.state.device);
        }
        if !wanted {
            // An index that is never moved on is passed once in 65536 entries.
            return Ok(());
        }
        let place = split::USED_RING + 8 * u64::from(self.state.size);
        self.store("avail_event", self.state.next_available, self.state.device.wrapping_add(place))
    }
}
