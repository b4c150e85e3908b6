//! Virtqueues, device side (virtio 1.2 §2.6 to §2.8): split and packed rings behind one interface.
//!
//! Everything in a ring is the driver's word. A ring that breaks the rules is a [`QueueError`]; the device then asks to be reset.

#[cfg(test)]
pub(crate) mod driver;
mod packed;
mod split;
#[cfg(test)]
mod tests;

use std::sync::atomic::Ordering;

use block::Span;
use memory::GuestMemory;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::bits::descriptor;

/// Descriptors of one buffer at most, however they are chained.
pub const MAX_DESCRIPTORS: usize = 1024;

/// How a ring breaks the rules.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// A part of it is not in guest memory.
    #[error("{0} at {1:#x} is not in guest memory")]
    Memory(&'static str, u64),
    /// More entries are available than the ring has.
    #[error("{0} entries are available in a ring of {1}")]
    AvailableIndex(u16, u16),
    /// A descriptor that the ring does not have.
    #[error("descriptor {0} in a ring of {1}")]
    DescriptorIndex(u16, u16),
    /// Too many descriptors, or a circle of them.
    #[error("a buffer of more than {MAX_DESCRIPTORS} descriptors")]
    TooLong,
    /// A table of descriptors that has no whole number of them, is empty or lies in another.
    #[error("an indirect descriptor of {0} bytes that is not allowed")]
    Indirect(u32),
    /// What the device reads has to come before what it writes.
    #[error("a descriptor for reading behind one for writing")]
    Order,
}

/// A buffer that the driver has made available.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// By which the driver knows it.
    id: u16,
    /// Entries of a packed ring that it takes.
    entries: u16,
    /// What the device may read.
    pub readable: Vec<Span>,
    /// What the device may write.
    pub writable: Vec<Span>,
}

impl Chain {
    fn new() -> Self {
        Chain { id: 0, entries: 1, readable: Vec::new(), writable: Vec::new() }
    }

    /// Bytes the device may read.
    pub fn readable_len(&self) -> u64 {
        self.readable.iter().map(|span| span.len as u64).sum()
    }

    /// Bytes the device may write.
    pub fn writable_len(&self) -> u64 {
        self.writable.iter().map(|span| span.len as u64).sum()
    }

    fn add(&mut self, descriptor: Descriptor) -> Result<(), QueueError> {
        if self.readable.len() + self.writable.len() == MAX_DESCRIPTORS {
            return Err(QueueError::TooLong);
        }
        let span = Span { address: GuestAddress(descriptor.address), len: descriptor.len as usize };
        if descriptor.flags & descriptor::WRITE != 0 {
            self.writable.push(span);
        } else if self.writable.is_empty() {
            self.readable.push(span);
        } else {
            return Err(QueueError::Order);
        }
        Ok(())
    }
}

/// What descriptors of both kinds have in common.
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    /// Split: the next one. Packed: the buffer's ID is in its place, before the flags.
    next: u16,
}

impl Descriptor {
    /// How many descriptors a table has that this one points to.
    fn table_len(&self) -> Result<u32, QueueError> {
        let count = self.len / descriptor::BYTES as u32;
        if count == 0 || !u64::from(self.len).is_multiple_of(descriptor::BYTES) {
            return Err(QueueError::Indirect(self.len));
        }
        Ok(count)
    }
}

/// The layout of a queue's ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Layout {
    /// Descriptor table, available ring, used ring.
    Split,
    /// One ring of descriptors.
    Packed,
}

/// Registers of a queue, and how far both sides have come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Entries it can have.
    pub max_size: u16,
    /// Entries it has: at most `max_size`; for split rings a power of two.
    pub size: u16,
    /// The driver has set it up.
    pub enabled: bool,
    /// Guest-physical address of the descriptors.
    pub descriptors: u64,
    /// Of the driver's area: available ring, or its event suppression.
    pub driver: u64,
    /// Of the device's area: used ring, or its event suppression.
    pub device: u64,
    /// Each side says from which entry on it wants to be notified.
    pub event_index: bool,
    /// Which ring it is.
    pub layout: Layout,
    /// Where the next available buffer is looked for.
    next_available: u16,
    /// Where the next used buffer goes.
    next_used: u16,
    /// Packed: wrap counters of both.
    available_wrap: bool,
    used_wrap: bool,
}

/// A queue of a device.
#[derive(Clone, Debug)]
pub struct Queue {
    state: QueueState,
    memory: GuestMemory,
}

impl Queue {
    /// A queue as it is after reset.
    pub fn new(memory: GuestMemory, max_size: u16) -> Self {
        let state = QueueState {
            max_size,
            size: max_size,
            enabled: false,
            descriptors: 0,
            driver: 0,
            device: 0,
            event_index: false,
            layout: Layout::Split,
            next_available: 0,
            next_used: 0,
            available_wrap: true,
            used_wrap: true,
        };
        Queue { state, memory }
    }

    /// Its registers.
    pub fn state(&self) -> &QueueState {
        &self.state
    }

    /// Its registers, to be changed before it is enabled.
    pub fn state_mut(&mut self) -> &mut QueueState {
        &mut self.state
    }

    /// Back to how it was made.
    pub fn reset(&mut self) {
        *self = Queue::new(self.memory.clone(), self.state.max_size);
    }

    /// Whether sizes, addresses and alignments are such that it can be enabled.
    pub fn is_valid(&self) -> bool {
        let QueueState { size, max_size, descriptors, driver, device, layout, .. } = self.state;
        let entries = u64::from(size);
        let (driver_part, device_part) = match layout {
            // With the event index at the end of each ring (§2.7).
            Layout::Split => ((6 + 2 * entries, 2), (6 + 8 * entries, 4)),
            Layout::Packed => ((4, 4), (4, 4)),
        };
        let fits = |address: u64, (len, alignment): (u64, u64)| {
            address.is_multiple_of(alignment) && self.memory.check_range(GuestAddress(address), len as usize)
        };
        (1..=max_size).contains(&size)
            && (layout == Layout::Packed || size.is_power_of_two())
            && fits(descriptors, (descriptor::BYTES * entries, 16))
            && fits(driver, driver_part)
            && fits(device, device_part)
    }

    /// The next buffer that the driver has made available, if there is one.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        match self.state.layout {
            Layout::Split => self.pop_split(),
            Layout::Packed => self.pop_packed(),
        }
    }

    /// Gives a buffer back, with the number of bytes written to it. Returns whether the driver wants an interrupt for it.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn push(&mut self, chain: &Chain, written: u32) -> Result<bool, QueueError> {
        match self.state.layout {
            Layout::Split => self.push_split(chain, written),
            Layout::Packed => self.push_packed(chain, written),
        }
    }

    /// Tells the driver whether to notify of buffers that it makes available. It may do so nevertheless.
    /// After enabling, look with [`Queue::pop`] once more: what came before is not notified.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn set_notifications(&mut self, wanted: bool) -> Result<(), QueueError> {
        match self.state.layout {
            Layout::Split => self.set_split_notifications(wanted)?,
            Layout::Packed => self.set_packed_notifications(wanted)?,
        }
        // The driver reads this after it has written its ring, we the ring after this.
        std::sync::atomic::fence(Ordering::SeqCst);
        Ok(())
    }

    fn load(&self, what: &'static str, address: u64) -> Result<u16, QueueError> {
        self.memory
            .load(GuestAddress(address), Ordering::Acquire)
            .map_err(|_| QueueError::Memory(what, address))
    }

    fn store(&self, what: &'static str, value: u16, address: u64) -> Result<(), QueueError> {
        self.memory
            .store(value, GuestAddress(address), Ordering::Release)
            .map_err(|_| QueueError::Memory(what, address))
    }

    fn descriptor(&self, address: u64) -> Result<Descriptor, QueueError> {
        let mut bytes = [0; descriptor::BYTES as usize];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .map_err(|_| QueueError::Memory("a descriptor", address))?;
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, x0, x1, y0, y1] = bytes;
        let (first, second) = (u16::from_le_bytes([x0, x1]), u16::from_le_bytes([y0, y1]));
        let (flags, next) = match self.state.layout {
            Layout::Split => (first, second),
            Layout::Packed => (second, first),
        };
        let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
        Ok(Descriptor { address, len: u32::from_le_bytes([l0, l1, l2, l3]), flags, next })
    }
}

/// Whether a step from `old` to `new` passes the entry that the other side has named (§2.7.7.1).
fn passes(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
