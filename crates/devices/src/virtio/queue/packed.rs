//! Packed rings (virtio 1.2 §2.8).

use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress};

use super::{Chain, Descriptor, MAX_DESCRIPTORS, Queue, QueueError, passes};
use crate::virtio::bits::{descriptor, suppression};

/// Offset of a descriptor's flags.
const FLAGS: u64 = 14;

impl Queue {
    fn packed_address(&self, index: u16) -> u64 {
        self.state.descriptors.wrapping_add(descriptor::BYTES * u64::from(index))
    }

    /// The position after `count` entries, and the wrap counter there.
    fn packed_step(&self, index: u16, wrap: bool, count: u16) -> (u16, bool) {
        let next = u32::from(index) + u32::from(count);
        let size = u32::from(self.state.size);
        if next >= size { ((next - size) as u16, !wrap) } else { (next as u16, wrap) }
    }

    pub(super) fn pop_packed(&mut self) -> Result<Option<Chain>, QueueError> {
        let (mut index, mut wrap) = (self.state.next_available, self.state.available_wrap);
        let flags = self.load("a descriptor", self.packed_address(index) + FLAGS)?;
        let is = |bit: u16| flags & bit != 0;
        if is(descriptor::AVAIL) != wrap || is(descriptor::USED) == wrap {
            return Ok(None);
        }
        let mut chain = Chain { entries: 0, ..Chain::new() };
        loop {
            let descriptor = self.descriptor(self.packed_address(index))?;
            chain.entries += 1;
            (index, wrap) = self.packed_step(index, wrap, 1);
            let more = descriptor.flags & descriptor::NEXT != 0;
            if descriptor.flags & descriptor::INDIRECT != 0 {
                if more || chain.entries > 1 {
                    return Err(QueueError::Indirect(descriptor.len));
                }
                self.packed_table(&mut chain, descriptor)?;
            } else {
                chain.add(descriptor)?;
            }
            if !more {
                chain.id = descriptor.next;
                break;
            }
            if chain.entries >= self.state.size {
                return Err(QueueError::TooLong);
            }
        }
        (self.state.next_available, self.state.available_wrap) = (index, wrap);
        Ok(Some(chain))
    }

    /// The descriptors of a table follow each other; of their flags only the direction counts (§2.8.7).
    fn packed_table(&self, chain: &mut Chain, table: Descriptor) -> Result<(), QueueError> {
        let count = table.table_len()?;
        if count as usize > MAX_DESCRIPTORS {
            return Err(QueueError::TooLong);
        }
        for index in 0..u64::from(count) {
            chain.add(self.descriptor(table.address.wrapping_add(descriptor::BYTES * index))?)?;
        }
        Ok(())
    }

    pub(super) fn push_packed(&mut self, chain: &Chain, written: u32) -> Result<bool, QueueError> {
        let (old, old_wrap) = (self.state.next_used, self.state.used_wrap);
        let address = self.packed_address(old);
        let mut bytes = [0; 6];
        bytes[..4].copy_from_slice(&written.to_le_bytes());
        bytes[4..].copy_from_slice(&chain.id.to_le_bytes());
        self.memory
            .write_slice(&bytes, GuestAddress(address.wrapping_add(8)))
            .map_err(|_| QueueError::Memory("a descriptor", address))?;
        let wrap = if old_wrap { descriptor::AVAIL | descriptor::USED } else { 0 };
        let direction = if chain.writable.is_empty() { 0 } else { descriptor::WRITE };
        self.store("a descriptor", wrap | direction, address.wrapping_add(FLAGS))?;
        let (new, new_wrap) = self.packed_step(old, old_wrap, chain.entries);
        (self.state.next_used, self.state.used_wrap) = (new, new_wrap);

        // The driver writes its wish and then reads the ring; we the other way round.
        fence(Ordering::SeqCst);
        let flags = self.load("the driver's event suppression", self.state.driver + suppression::FLAGS)?;
        match flags & 3 {
            suppression::ENABLE => Ok(true),
            suppression::POSITION if self.state.event_index => {
                let named = self.load("the driver's event suppression", self.state.driver)?;
                // Positions become comparable when those of the round before count below zero.
                let event = named & !suppression::WRAP;
                let same_round = (named & suppression::WRAP != 0) == new_wrap;
                let event = if same_round { event } else { event.wrapping_sub(self.state.size) };
                let old = if old_wrap == new_wrap { old } else { old.wrapping_sub(self.state.size) };
                Ok(passes(event, new, old))
            }
            _ => Ok(false),
        }
    }

    pub(super) fn set_packed_notifications(&mut self, wanted: bool) -> Result<(), QueueError> {
        let flags = match (wanted, self.state.event_index) {
            (false, _) => suppression::DISABLE,
            (true, false) => suppression::ENABLE,
            (true, true) => {
                let wrap = if self.state.available_wrap { suppression::WRAP } else { 0 };
                let position = self.state.next_available | wrap;
                self.store("the device's event suppression", position, self.state.device)?;
                suppression::POSITION
            }
        };
        self.store("the device's event suppression", flags, self.state.device + suppression::FLAGS)
    }
}
