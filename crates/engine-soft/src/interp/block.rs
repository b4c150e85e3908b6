//! Decoded blocks: straight runs of instructions from one page, found again by linear address or by physical address and
//! code size. A block remembers its bytes and the generation of its page; when the page was written, the bytes are
//! compared before the block is used again.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use iced_x86::Instruction;
use rustc_hash::FxHashMap;
use x86::paging::{PAGE_MASK, PAGE_SIZE};

use crate::interp::op::Op;
use crate::native::Thunk;

/// Most instructions in a block.
pub const MAX_OPS: usize = 48;
/// Blocks kept before all are dropped, if everything is interpreted.
pub const INTERPRETED_BLOCKS: usize = 64 * 1024;
/// The same where blocks that run again are translated: what is left are those that ran once.
pub const COLD_BLOCKS: usize = 8 * 1024;
const FAST_BITS: u32 = 13;
const FAST_ENTRIES: usize = 1 << FAST_BITS;

/// A decoded block.
pub struct Block {
    /// Its instructions; the last one may branch.
    pub ops: Box<[Op]>,
    /// Full decodings that some handlers refer to; kept here so that the references stay valid.
    pub instructions: Vec<Box<Instruction>>,
    /// Thunks that native instructions refer to.
    pub thunks: Vec<Box<Thunk>>,
    /// The bytes it was decoded from.
    pub bytes: Box<[u8]>,
    /// Where they are, up to the end of their page.
    pub first: Extent,
    /// Where the rest is, for a single instruction that spans pages.
    pub second: Option<Extent>,
    /// How often it was interpreted.
    pub heat: AtomicU32,
}

// SAFETY: the pointers lead to records of guest memory and to what the block itself owns; neither is tied to a thread.
unsafe impl Send for Block {}
// SAFETY: as above; what changes is atomic.
unsafe impl Sync for Block {}

/// A part of a page that code was read from.
pub struct Extent {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// The page's generation counter.
    pub cell: *const AtomicU32,
    /// Its value when the bytes were last known to be right.
    pub generation: AtomicU32,
}

impl Extent {
    #[inline(always)]
    fn is_current(&self) -> bool {
        // SAFETY: the counter belongs to a mapped region; the cache is cleared before the map is let go.
        unsafe { &*self.cell }.load(Ordering::Acquire) == self.generation.load(Ordering::Relaxed)
    }

    /// The generation of the page when the bytes were last known to be right.
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::Relaxed)
    }

    fn copy(&self) -> Extent {
        Extent { generation: AtomicU32::new(self.generation()), ..*self }
    }
}

impl Block {
    /// Whether no page has changed since the block was decoded or last compared.
    #[inline(always)]
    pub fn is_current(&self) -> bool {
        self.first.is_current() && self.second.as_ref().is_none_or(Extent::is_current)
    }

    /// Guest-physical address of its first byte.
    pub fn gpa(&self) -> u64 {
        self.first.gpa
    }

    /// How many of its bytes are in the page where it begins.
    pub fn bytes_in_first_page(&self) -> usize {
        self.bytes.len().min((PAGE_SIZE - (self.first.gpa & PAGE_MASK)) as usize)
    }

    /// A block of some of its instructions alone, by their places. What their operations refer to belongs to `self`.
    pub fn part(&self, places: Range<usize>) -> Block {
        let start = self.offset_of(places.start);
        let end = self.offset_of(places.end);
        let first = Extent { gpa: self.first.gpa + start as u64, ..self.first.copy() };
        Block {
            ops: self.ops[places].into(),
            instructions: Vec::new(),
            thunks: Vec::new(),
            bytes: self.bytes[start..end].into(),
            first,
            second: self.second.as_ref().map(Extent::copy),
            heat: AtomicU32::new(0),
        }
    }

    /// Where an instruction begins, in bytes, by its place.
    fn offset_of(&self, place: usize) -> usize {
        self.ops[..place].iter().map(|op| usize::from(op.len)).sum()
    }

    /// How often it was interpreted.
    pub fn heat(&self) -> u32 {
        self.heat.load(Ordering::Relaxed)
    }

    /// Guest-physical address of the page that its only instruction reaches into, if it does.
    pub fn second_page(&self) -> Option<u64> {
        self.second.as_ref().map(|second| second.gpa)
    }
}

#[derive(Clone, Copy)]
struct Fast {
    linear: u64,
    key: u32,
    block: *const Block,
}

const EMPTY: Fast = Fast { linear: 0, key: u32::MAX, block: std::ptr::null() };

/// log2 of the entries in [`Met`].
const MET_BITS: u32 = 16;

/// Which code was met before, longer than its blocks are kept: code that runs once in every process is worth a
/// translation too. A direct-mapped table of hashes, which forgets.
struct Met(Box<[u16]>);

impl Met {
    fn new() -> Self {
        Met(vec![0; 1 << MET_BITS].into())
    }

    /// The entry for an address, and what is in it if the address was met.
    fn entry(&mut self, gpa: u64, code_bits: u8) -> (&mut u16, u16) {
        const MIX: u64 = 0x9e37_79b9_7f4a_7c15;
        let hash = (gpa ^ u64::from(code_bits) << 56).wrapping_mul(MIX);
        let tag = (hash >> MET_BITS) as u16 | 1;
        (&mut self.0[(hash >> (64 - MET_BITS)) as usize], tag)
    }

    /// Whether the address was met; from now on it was.
    fn meet(&mut self, gpa: u64, code_bits: u8) -> bool {
        let (entry, tag) = self.entry(gpa, code_bits);
        std::mem::replace(entry, tag) == tag
    }

    /// What is at the address now is new.
    fn forget(&mut self, gpa: u64, code_bits: u8) {
        *self.entry(gpa, code_bits).0 = 0;
    }
}

/// All blocks of one vCPU.
pub struct BlockCache {
    blocks: FxHashMap<(u64, u8), Box<Block>>,
    met: Met,
    /// Direct-mapped by linear address; emptied when translations may have changed.
    fast: Box<[Fast]>,
    /// Changes with every flush of `fast`, so that a flush need not touch it.
    epoch: u32,
    /// How many may be kept.
    capacity: usize,
}

// SAFETY: the pointers lead to blocks of the same cache.
unsafe impl Send for BlockCache {}

impl BlockCache {
    /// An empty cache for so many blocks.
    pub fn new(capacity: usize) -> Self {
        BlockCache {
            blocks: FxHashMap::default(),
            met: Met::new(),
            fast: vec![EMPTY; FAST_ENTRIES].into(),
            epoch: 0,
            capacity,
        }
    }

    fn slot(linear: u64) -> usize {
        (linear ^ linear >> FAST_BITS) as usize & (FAST_ENTRIES - 1)
    }

    /// The block at a linear address, if seen there since the last flush. `context` is what else decides about the
    /// translation: code size and privilege; below 16.
    #[inline(always)]
    pub fn find_linear(&self, linear: u64, context: u8) -> Option<*const Block> {
        let fast = &self.fast[Self::slot(linear)];
        let key = self.epoch << 4 | u32::from(context);
        (fast.linear == linear && fast.key == key).then_some(fast.block)
    }

    /// Remembers where a block is.
    pub fn remember(&mut self, linear: u64, context: u8, block: *const Block) {
        let key = self.epoch << 4 | u32::from(context);
        self.fast[Self::slot(linear)] = Fast { linear, key, block };
    }

    /// Forgets where blocks are, but not the blocks.
    pub fn flush_linear(&mut self) {
        self.epoch += 1;
        if self.epoch >= u32::MAX >> 4 {
            self.epoch = 0;
            self.fast.fill(EMPTY);
        }
    }

    /// The block at a physical address.
    pub fn find_physical(&self, gpa: u64, code_bits: u8) -> Option<&Block> {
        self.blocks.get(&(gpa, code_bits)).map(Box::as_ref)
    }

    /// Takes the block at a physical address out of the cache.
    pub fn take(&mut self, gpa: u64, code_bits: u8) -> Option<Box<Block>> {
        let block = self.blocks.remove(&(gpa, code_bits))?;
        self.flush_linear();
        Some(block)
    }

    /// Puts back what [`BlockCache::take`] took.
    pub fn put_back(&mut self, code_bits: u8, block: Box<Block>) {
        self.blocks.insert((block.gpa(), code_bits), block);
    }

    /// Whether inserting needs [`BlockCache::clear`] first.
    pub fn is_full(&self) -> bool {
        self.blocks.len() >= self.capacity
    }

    /// Adds or replaces a block.
    pub fn insert(&mut self, code_bits: u8, block: Block) -> *const Block {
        let key = (block.gpa(), code_bits);
        if self.blocks.contains_key(&key) {
            self.flush_linear();
        } else if self.met.meet(block.gpa(), code_bits) {
            block.heat.store(1, Ordering::Relaxed);
        }
        let block = Box::new(block);
        let pointer = std::ptr::from_ref(block.as_ref());
        self.blocks.insert(key, block);
        pointer
    }

    /// The code at an address has changed: it is as if never met.
    pub fn forget_heat(&mut self, gpa: u64, code_bits: u8) {
        self.met.forget(gpa, code_bits);
    }

    /// Drops every block.
    pub fn clear(&mut self) {
        self.flush_linear();
        self.blocks.clear();
    }
}
