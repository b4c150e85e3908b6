//! Decoded blocks: straight runs of instructions from one page, found again by linear address or by physical address and
//! code size. A block remembers its bytes and the generation of its page; when the page was written, the bytes are
//! compared before the block is used again.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use iced_x86::Instruction;
use rustc_hash::FxHashMap;
use x86::paging::{PAGE_MASK, PAGE_SIZE};

use crate::interp::op::Op;
use crate::native::Thunk;

/// Most instructions in a block.
pub const MAX_OPS: usize = 48;
/// Blocks kept before all are dropped.
const MAX_BLOCKS: usize = 64 * 1024;
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

    fn copy(&self) -> Extent {
        Extent { generation: AtomicU32::new(self.generation.load(Ordering::Relaxed)), ..*self }
    }

    fn take_generation(&self, from: &Extent) {
        self.generation.store(from.generation.load(Ordering::Relaxed), Ordering::Relaxed);
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

    /// A block of its first instruction alone. What its operation refers to belongs to `self`.
    pub fn first_instruction(&self) -> Block {
        let len = self.ops.first().map_or(0, |op| usize::from(op.len));
        Block {
            ops: self.ops.iter().take(1).copied().collect(),
            instructions: Vec::new(),
            thunks: Vec::new(),
            bytes: self.bytes[..len].into(),
            first: self.first.copy(),
            second: self.second.as_ref().map(Extent::copy),
            heat: AtomicU32::new(0),
        }
    }

    /// Another block, which is current, was decoded from the same bytes at the same places: then so is this one.
    pub fn confirm_by(&self, other: &Block) -> bool {
        let places = |block: &Block| (block.first.gpa, block.second.as_ref().map(|second| second.gpa));
        if places(self) != places(other) || self.bytes != other.bytes {
            return false;
        }
        self.first.take_generation(&other.first);
        if let (Some(own), Some(second)) = (&self.second, &other.second) {
            own.take_generation(second);
        }
        true
    }

    /// How often it was interpreted.
    pub fn heat(&self) -> u32 {
        self.heat.load(Ordering::Relaxed)
    }

    /// Whether its only instruction reaches into the next page.
    pub fn spans(&self) -> bool {
        self.second.is_some()
    }
}

#[derive(Clone, Copy)]
struct Fast {
    linear: u64,
    key: u32,
    block: *const Block,
}

const EMPTY: Fast = Fast { linear: 0, key: u32::MAX, block: std::ptr::null() };

/// All blocks of one vCPU.
pub struct BlockCache {
    blocks: FxHashMap<(u64, u8), Arc<Block>>,
    /// Direct-mapped by linear address; emptied when translations may have changed.
    fast: Box<[Fast]>,
    /// Changes with every flush of `fast`, so that a flush need not touch it.
    epoch: u32,
}

// SAFETY: the pointers lead to blocks of the same cache.
unsafe impl Send for BlockCache {}

impl Default for BlockCache {
    fn default() -> Self {
        BlockCache { blocks: FxHashMap::default(), fast: vec![EMPTY; FAST_ENTRIES].into(), epoch: 0 }
    }
}

impl BlockCache {
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
    pub fn find_physical(&self, gpa: u64, code_bits: u8) -> Option<&Arc<Block>> {
        self.blocks.get(&(gpa, code_bits))
    }

    /// Shared possession of a block that is in the cache.
    pub fn shared(&self, block: &Block) -> Option<Arc<Block>> {
        [16, 32, 64]
            .into_iter()
            .filter_map(|bits| self.blocks.get(&(block.gpa(), bits)))
            .find(|found| std::ptr::eq(found.as_ref(), block))
            .cloned()
    }

    /// Whether inserting needs [`BlockCache::clear`] first.
    pub fn is_full(&self) -> bool {
        self.blocks.len() >= MAX_BLOCKS
    }

    /// Adds or replaces a block.
    pub fn insert(&mut self, code_bits: u8, block: Block) -> *const Block {
        let key = (block.gpa(), code_bits);
        if self.blocks.contains_key(&key) {
            self.flush_linear();
        }
        let block = Arc::new(block);
        let pointer = Arc::as_ptr(&block);
        self.blocks.insert(key, block);
        pointer
    }

    /// Drops every block.
    pub fn clear(&mut self) {
        self.flush_linear();
        self.blocks.clear();
    }
}
