//! The driver's side of a ring, for tests.

use memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::{Layout, Queue, QueueState};
use crate::virtio::bits::{descriptor, suppression};

/// A piece of memory in a descriptor: address and bytes.
pub type Piece = (u64, u32);

/// A ring as a driver keeps it: descriptors at `base`, the driver's area 1000h, the device's 2000h further.
pub struct Ring {
    pub memory: GuestMemory,
    pub layout: Layout,
    pub size: u16,
    pub base: u64,
    next_descriptor: u16,
    wrap: bool,
    available: u16,
    used: u16,
    used_wrap: bool,
    /// Packed: entries that each buffer took, by its ID.
    taken: Vec<u16>,
}

impl Ring {
    pub fn new(memory: &GuestMemory, layout: Layout, size: u16, base: u64) -> Self {
        let taken = vec![0; usize::from(size)];
        Ring {
            memory: memory.clone(),
            layout,
            size,
            base,
            next_descriptor: 0,
            wrap: true,
            available: 0,
            used: 0,
            used_wrap: true,
            taken,
        }
    }

    /// The addresses of its three parts.
    pub fn parts(&self) -> [u64; 3] {
        [self.base, self.base + 0x1000, self.base + 0x2000]
    }

    /// A device's queue on it.
    pub fn queue(&self, event_index: bool) -> Queue {
        let mut queue = Queue::new(self.memory.clone(), self.size);
        let [descriptors, driver, device] = self.parts();
        let state = queue.state_mut();
        *state =
            QueueState { descriptors, driver, device, event_index, layout: self.layout, ..state.clone() };
        assert!(queue.is_valid());
        queue.state_mut().enabled = true;
        queue
    }

    pub fn put16(&self, address: u64, value: u16) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    pub fn get16(&self, address: u64) -> u16 {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }

    /// Writes a descriptor: the last two words in the order of the layout's own.
    pub fn put_descriptor(&self, at: u64, (address, len): Piece, words: [u16; 2]) {
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.put16(at + 12, words[0]);
        self.put16(at + 14, words[1]);
    }

    /// Where descriptor `index` is.
    pub fn at(&self, index: u16) -> u64 {
        self.base + descriptor::BYTES * u64::from(index)
    }

    /// Makes a buffer available and returns its ID.
    pub fn offer(&mut self, readable: &[Piece], writable: &[Piece]) -> u16 {
        let pieces: Vec<_> = readable
            .iter()
            .map(|piece| (*piece, 0))
            .chain(writable.iter().map(|piece| (*piece, descriptor::WRITE)))
            .collect();
        match self.layout {
            Layout::Split => self.offer_split(&pieces),
            Layout::Packed => self.offer_packed(&pieces),
        }
    }

    /// The same by way of a table at `table`.
    pub fn offer_table(&mut self, table: u64, readable: &[Piece], writable: &[Piece]) -> u16 {
        let pieces = readable
            .iter()
            .map(|piece| (piece, 0))
            .chain(writable.iter().map(|piece| (piece, descriptor::WRITE)));
        let count = readable.len() + writable.len();
        for (index, (piece, flags)) in pieces.enumerate() {
            let at = table + descriptor::BYTES * index as u64;
            let words = match self.layout {
                Layout::Split if index + 1 < count => [flags | descriptor::NEXT, index as u16 + 1],
                Layout::Split => [flags, 0],
                // Only the direction counts; the rest is there to be ignored.
                Layout::Packed => [0x5555, flags | descriptor::NEXT],
            };
            self.put_descriptor(at, *piece, words);
        }
        let table = ((table, count as u32 * descriptor::BYTES as u32), descriptor::INDIRECT);
        match self.layout {
            Layout::Split => self.offer_split(&[table]),
            Layout::Packed => self.offer_packed(&[table]),
        }
    }

    fn offer_split(&mut self, pieces: &[(Piece, u16)]) -> u16 {
        let head = self.next_descriptor;
        for (index, (piece, flags)) in pieces.iter().enumerate() {
            let at = self.next_descriptor;
            self.next_descriptor = (at + 1) % self.size;
            let more = index + 1 < pieces.len();
            let words = [flags | if more { descriptor::NEXT } else { 0 }, self.next_descriptor];
            self.put_descriptor(self.at(at), *piece, words);
        }
        self.offer_head(head);
        head
    }

    /// Split: makes the buffer that begins with a descriptor available.
    pub fn offer_head(&mut self, head: u16) {
        let [_, driver, _] = self.parts();
        self.put16(driver + 4 + 2 * u64::from(self.available % self.size), head);
        self.available = self.available.wrapping_add(1);
        self.put16(driver + 2, self.available);
    }

    fn offer_packed(&mut self, pieces: &[(Piece, u16)]) -> u16 {
        let (first, id) = (self.next_descriptor, self.next_descriptor);
        self.taken[usize::from(id)] = pieces.len() as u16;
        let mut first_flags = 0;
        for (index, (piece, flags)) in pieces.iter().enumerate() {
            let at = self.next_descriptor;
            let more = if index + 1 < pieces.len() { descriptor::NEXT } else { 0 };
            let wrap = if self.wrap { descriptor::AVAIL } else { descriptor::USED };
            let flags = flags | more | wrap;
            // The first becomes available when all the others are there.
            let written = if index == 0 { self.get16(self.at(at) + 14) } else { flags };
            if index == 0 {
                first_flags = flags;
            }
            self.put_descriptor(self.at(at), *piece, [id, written]);
            self.next_descriptor += 1;
            if self.next_descriptor == self.size {
                (self.next_descriptor, self.wrap) = (0, !self.wrap);
            }
        }
        self.put16(self.at(first) + 14, first_flags);
        id
    }

    /// The next buffer that came back: its ID, and how many bytes were written.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        let [_, _, device] = self.parts();
        match self.layout {
            Layout::Split => {
                if self.get16(device + 2) == self.used {
                    return None;
                }
                let at = device + 4 + 8 * u64::from(self.used % self.size);
                self.used = self.used.wrapping_add(1);
                let element: u64 = self.memory.read_obj(GuestAddress(at)).unwrap();
                Some((element as u16, (element >> 32) as u32))
            }
            Layout::Packed => {
                let at = self.at(self.used);
                let flags = self.get16(at + 14);
                let is = |bit| flags & bit != 0;
                if is(descriptor::AVAIL) != self.used_wrap || is(descriptor::USED) != self.used_wrap {
                    return None;
                }
                let (len, id) = (self.memory.read_obj(GuestAddress(at + 8)).unwrap(), self.get16(at + 12));
                self.used += self.taken[usize::from(id)];
                if self.used >= self.size {
                    self.used -= self.size;
                    self.used_wrap = !self.used_wrap;
                }
                Some((id, len))
            }
        }
    }

    /// Asks for an interrupt with the buffer that comes back next but `skip`.
    pub fn want_interrupt(&self, skip: u16) {
        let [_, driver, _] = self.parts();
        match self.layout {
            Layout::Split => {
                self.put16(driver + 4 + 2 * u64::from(self.size), self.used.wrapping_add(skip));
            }
            Layout::Packed => {
                let position = self.used + skip;
                let (position, wrap) = if position >= self.size {
                    (position - self.size, !self.used_wrap)
                } else {
                    (position, self.used_wrap)
                };
                self.put16(driver, position | if wrap { suppression::WRAP } else { 0 });
                self.put16(driver + 2, suppression::POSITION);
            }
        }
    }

    /// Asks for no interrupts, or for all, without the event index.
    pub fn set_interrupts(&self, wanted: bool) {
        let [_, driver, _] = self.parts();
        match self.layout {
            Layout::Split => self.put16(driver, u16::from(!wanted)),
            Layout::Packed => self.put16(driver + 2, u16::from(!wanted)),
        }
    }

    /// Whether the device wants to be told of the buffer that was offered last.
    pub fn wants_notification(&self, event_index: bool) -> bool {
        let [_, _, device] = self.parts();
        match (self.layout, event_index) {
            (Layout::Split, false) => self.get16(device) & 1 == 0,
            (Layout::Split, true) => {
                self.get16(device + 4 + 8 * u64::from(self.size)) == self.available.wrapping_sub(1)
            }
            (Layout::Packed, _) => match self.get16(device + 2) {
                suppression::ENABLE => true,
                suppression::DISABLE => false,
                _ => {
                    let wrap = if self.wrap { suppression::WRAP } else { 0 };
                    // Only right while the last offer took one entry and did not end the ring.
                    self.get16(device) == self.next_descriptor.wrapping_sub(1) | wrap
                }
            },
        }
    }
}
