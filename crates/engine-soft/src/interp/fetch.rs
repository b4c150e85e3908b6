//! Finding and decoding blocks.

use std::sync::atomic::{AtomicU32, Ordering};

use engine::memory::CODE;
use x86::paging::{PAGE_MASK, PAGE_SIZE};

use crate::cpu::{Cpu, R};
use crate::interp::block::{Block, Extent, MAX_OPS};
use crate::interp::decode::{DecodeError, Decoded, decode};
use crate::memory::RamSlot;
use crate::mmu::{Access, Place};
use crate::shared::lock;
use crate::tlb::Privilege;

/// Longest instruction in bytes.
const MAX_INSTRUCTION: usize = 15;
/// Bytes looked at when a block is decoded.
const WINDOW: usize = 512;
/// Guest-physical address of a block that has none.
const NO_ADDRESS: u64 = u64::MAX;

/// An instruction that spans pages: what it is, all its bytes, and where the second part of them is.
type Spanning = (Decoded, Box<[u8]>, Extent);

impl Cpu {
    /// What besides the address decides how code is fetched and decoded.
    fn fetch_context(&self) -> u8 {
        self.code_bits >> 5 | if self.cpl == 3 { 4 } else { 0 }
    }

    fn fetch_privilege(&self) -> Privilege {
        if self.cpl == 3 { Privilege::User } else { Privilege::Supervisor }
    }

    /// The block at RIP.
    #[inline(always)]
    pub fn find_block(&mut self) -> R<*const Block> {
        let linear = self.linear_ip(self.user.rip);
        let context = self.fetch_context();
        if let Some(block) = self.blocks.find_linear(linear, context) {
            // SAFETY: the cache holds the block.
            if unsafe { &*block }.is_current() {
                return Ok(block);
            }
        }
        self.find_block_slow(linear, context)
    }

    #[cold]
    fn find_block_slow(&mut self, linear: u64, context: u8) -> R<*const Block> {
        self.check_fetch(self.user.rip)?;
        let Place::Host(host) = self.fetch_place(linear)? else { return self.fetch_outside_cache(linear) };
        let map = self.map.clone();
        let Some((slot, gpa)) = map.find_host(host) else { return self.fetch_outside_cache(linear) };
        if let Some(block) = self.blocks.find_physical(gpa, self.code_bits)
            && (block.is_current() || self.revalidate(block))
        {
            let (found, second_page) = (std::ptr::from_ref(block), block.second_page());
            if self.continues_at(second_page, linear)? {
                self.blocks.remember(linear, context, found);
                return Ok(found);
            }
        }
        let in_page = (PAGE_SIZE - (gpa & PAGE_MASK)) as usize;
        let mut window = [0u8; WINDOW];
        let window = &mut window[..in_page.min(WINDOW)];
        let extent = self.read_code(slot, gpa, window);
        let (decoded, bytes, second) = match self.decode(window, MAX_OPS) {
            Ok(decoded) => {
                let bytes = &window[..decoded.len];
                (decoded, Box::from(bytes), None)
            }
            Err(_) => match self.decode_spanning(linear, window)? {
                Some((decoded, bytes, second)) => (decoded, bytes, Some(second)),
                None => return self.fetch_outside_cache(linear),
            },
        };
        if self.blocks.is_full() {
            self.blocks.clear();
        }
        let block = Block {
            bytes,
            ops: decoded.ops.into(),
            instructions: decoded.instructions,
            thunks: decoded.thunks,
            first: extent,
            second,
            heat: AtomicU32::new(0),
        };
        self.counters.blocks_decoded += 1;
        let block = self.blocks.insert(self.code_bits, block);
        self.blocks.remember(linear, context, block);
        Ok(block)
    }

    /// Where code at a linear address is.
    fn fetch_place(&mut self, linear: u64) -> R<Place> {
        let privilege = self.fetch_privilege();
        if let Some(page) = self.tlb().find_code(privilege, linear & !PAGE_MASK) {
            return Ok(Place::Host((page + (linear & PAGE_MASK)) as *mut u8));
        }
        self.translate(privilege, linear, Access::Execute)
    }

    /// Whether the code at a linear address, which was just fetched, survives a change of address space.
    pub fn is_global_code(&self, linear: u64) -> bool {
        self.tlb().is_global_code(self.fetch_privilege(), linear & !PAGE_MASK)
    }

    /// The guest-physical address of code at a linear address, if it is in RAM.
    pub(crate) fn fetch_gpa(&mut self, linear: u64) -> R<Option<u64>> {
        let Place::Host(host) = self.fetch_place(linear)? else { return Ok(None) };
        Ok(self.map.find_host(host).map(|(_, gpa)| gpa))
    }

    /// Where the page after the one of a linear address is.
    fn fetch_next_page(&mut self, linear: u64) -> R<Place> {
        let next = self.wrap_linear((linear & !PAGE_MASK).wrapping_add(PAGE_SIZE));
        self.fetch_place(next)
    }

    /// One instruction whose first bytes, up to the end of the page, are in `head`; `None` if the rest is not in RAM.
    fn decode_spanning(&mut self, linear: u64, head: &[u8]) -> R<Option<Spanning>> {
        if head.len() >= MAX_INSTRUCTION {
            return Ok(None);
        }
        let Place::Host(host) = self.fetch_next_page(linear)? else { return Ok(None) };
        let map = self.map.clone();
        let Some((slot, gpa)) = map.find_host(host) else { return Ok(None) };
        let mut bytes = [0u8; MAX_INSTRUCTION];
        let (first, rest) = bytes.split_at_mut(head.len());
        first.copy_from_slice(head);
        let extent = self.read_code(slot, gpa, rest);
        Ok(self.decode(&bytes, 1).ok().map(|decoded| {
            let bytes = Box::from(&bytes[..decoded.len]);
            (decoded, bytes, extent)
        }))
    }

    /// Whether code at `linear` that has its second part in another page, if it does, finds it where the next page is now.
    pub(crate) fn continues_at(&mut self, second_page: Option<u64>, linear: u64) -> R<bool> {
        let Some(second) = second_page else { return Ok(true) };
        let Place::Host(host) = self.fetch_next_page(linear)? else { return Ok(false) };
        Ok(self.map.find_host(host).is_some_and(|(_, gpa)| gpa == second))
    }

    /// Decodes; makes room for native code if there is none left. No block is running.
    pub(crate) fn decode(&mut self, bytes: &[u8], max: usize) -> Result<Decoded, DecodeError> {
        let (bits, ip) = (self.code_bits, self.user.rip);
        match decode(bytes, bits, ip, max, &mut self.thunks) {
            Err(DecodeError::Full) => {
                self.blocks.clear();
                self.forget_handler_calls();
                self.scratch = None;
                // SAFETY: everything that was decoded, and with it every thunk, was just dropped.
                unsafe { self.thunks.clear() };
                decode(bytes, bits, ip, max, &mut self.thunks)
            }
            other => other,
        }
    }

    /// Copies code and says which generation of its page the copy belongs to. From then on the page is watched.
    fn read_code(&self, slot: &RamSlot, gpa: u64, bytes: &mut [u8]) -> Extent {
        let (tracker, page) = (slot.tracker(), slot.page(gpa));
        let host = slot.host(gpa);
        loop {
            // Who finds the mark set relies on it that no fast path is left: whoever set it has to be done with that.
            let marking = lock(&self.shared.marking);
            if tracker.mark_code(page) {
                for vcpu in self.shared.vcpus.iter() {
                    vcpu.area.tlb().drop_writes_to(host as u64 & !PAGE_MASK);
                }
            }
            drop(marking);
            let generation = tracker.generation(page);
            // SAFETY: the bytes lie in one page of the slot. Another vCPU may be writing them; then the generation changes.
            unsafe { std::ptr::copy_nonoverlapping(host, bytes.as_mut_ptr(), bytes.len()) };
            if tracker.flags(page) & CODE != 0 && tracker.generation(page) == generation {
                return Extent { gpa, cell: slot.generation(gpa), generation: AtomicU32::new(generation) };
            }
        }
    }

    /// A page was written: is the block's code still the same?
    fn revalidate(&self, block: &Block) -> bool {
        let (head, tail) = block.bytes.split_at(block.bytes_in_first_page());
        self.is_still(&block.first, head)
            && block.second.as_ref().is_none_or(|second| self.is_still(second, tail))
    }

    fn is_still(&self, extent: &Extent, bytes: &[u8]) -> bool {
        let Some(generation) = self.generation_with(extent.gpa, bytes) else { return false };
        extent.generation.store(generation, Ordering::Relaxed);
        true
    }

    /// The generation of the page at a guest-physical address, if it has these bytes there.
    pub(crate) fn generation_with(&self, gpa: u64, bytes: &[u8]) -> Option<u32> {
        let slot = self.map.find(gpa)?;
        let mut now = [0u8; WINDOW];
        let now = &mut now[..bytes.len()];
        let read = self.read_code(slot, gpa, now);
        (*now == *bytes).then(|| read.generation())
    }

    /// The generation that code at a guest-physical address has now; `None` where there is no RAM.
    pub(crate) fn code_generation(&self, gpa: u64) -> Option<u32> {
        self.map.find(gpa).map(|slot| slot.generation(gpa).load(Ordering::Acquire))
    }

    /// One instruction that does not lie in RAM. It is decoded afresh each time.
    fn fetch_outside_cache(&mut self, linear: u64) -> R<*const Block> {
        let mut bytes = [0u8; MAX_INSTRUCTION];
        let in_page = ((PAGE_SIZE - (linear & PAGE_MASK)) as usize).min(MAX_INSTRUCTION);
        let (head, tail) = bytes.split_at_mut(in_page);
        let place = self.fetch_place(linear)?;
        self.load_from(place, head);
        let mut result = self.decode(head, 1);
        if result.is_err() && !tail.is_empty() {
            let place = self.fetch_next_page(linear)?;
            self.load_from(place, tail);
            result = self.decode(&bytes, 1);
        }
        let Ok(decoded) = result else { return self.ud() };
        static ALWAYS: AtomicU32 = AtomicU32::new(0);
        let block = self.scratch.insert(Box::new(Block {
            ops: decoded.ops.into(),
            instructions: decoded.instructions,
            thunks: decoded.thunks,
            bytes: Box::default(),
            first: Extent { gpa: NO_ADDRESS, cell: &ALWAYS, generation: AtomicU32::new(0) },
            second: None,
            heat: AtomicU32::new(0),
        }));
        Ok(std::ptr::from_ref(block.as_ref()))
    }
}
