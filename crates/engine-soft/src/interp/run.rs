//! Finding, decoding and running blocks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use engine::memory::CODE;
use x86::bits::{dr6, rflags};
use x86::paging::{PAGE_MASK, PAGE_SIZE};
use x86::{Exception, Vector};

use crate::cpu::{Cpu, R};
use crate::interp::block::{Block, MAX_OPS};
use crate::interp::decode::{DecodeError, Decoded, decode};
use crate::interp::op::Flow;
use crate::memory::RamSlot;
use crate::mmu::{Access, Place};
use crate::system::interrupt::TripleFault;
use crate::tlb::Privilege;

/// Longest instruction in bytes.
const MAX_INSTRUCTION: usize = 15;
/// Guest-physical address of a block that has none.
const NO_ADDRESS: u64 = u64::MAX;
/// Bytes looked at when a block is decoded.
const WINDOW: usize = 512;

impl Cpu {
    /// Runs one block, or one instruction where each has to be looked at, and delivers what it raised.
    pub fn execute(&mut self) -> Result<(), TripleFault> {
        let stepping = rflags::TF | rflags::RF;
        self.single_step =
            self.interrupt_shadow || self.system_flags & stepping != 0 || self.has_instruction_breakpoints();
        let limit = if self.single_step { 1 } else { MAX_OPS };
        let trap = self.system_flags & rflags::TF != 0;
        let shadow = std::mem::take(&mut self.interrupt_shadow);
        let result = match self.variant() {
            Some(variant) if limit > 1 && self.translator.is_some() => self.run_translated(variant),
            _ => self.find_and_run(limit),
        };
        if shadow {
            self.note_attention();
        }
        match result {
            Ok(()) => {
                if trap {
                    self.pending_debug |= dr6::BS;
                }
                self.deliver_traps()
            }
            Err(_) => {
                let mut exception = self.fault;
                if self.fault_noncanonical && self.faulting_through_stack() {
                    exception = Exception::with_code(Vector::StackFault, 0);
                }
                self.pending_debug = 0;
                let breakpoint = exception.vector == Vector::Debug;
                if !breakpoint {
                    self.system_flags |= rflags::RF;
                }
                self.deliver_exception(exception)
            }
        }
    }

    /// Executes one instruction and returns what it raised instead of delivering it; a repeated string instruction may
    /// stop between two iterations, with RIP still at it. For tests and for comparing engines in lockstep.
    ///
    /// # Errors
    /// The exception; registers are as the instruction left them.
    pub fn step(&mut self) -> Result<(), Exception> {
        self.single_step = false;
        self.find_and_run(1).map_err(|_| {
            if self.fault_noncanonical && self.faulting_through_stack() {
                return Exception::with_code(Vector::StackFault, 0);
            }
            self.fault
        })
    }

    fn deliver_traps(&mut self) -> Result<(), TripleFault> {
        if self.pending_debug == 0 {
            return Ok(());
        }
        let dr6 = std::mem::take(&mut self.pending_debug);
        self.deliver_exception(Exception::debug(dr6))
    }

    /// Whether the instruction that faulted accessed memory through SS.
    fn faulting_through_stack(&self) -> bool {
        self.fault_segment == crate::cpu::seg::SS as u8
    }

    fn find_and_run(&mut self, limit: usize) -> R<()> {
        if self.single_step {
            let linear = self.linear_ip(self.user.rip);
            self.check_instruction_breakpoints(linear)?;
            self.system_flags &= !rflags::RF;
        }
        let block = self.find_block()?;
        self.run_ops(block, limit)
    }

    /// Interprets the block at RIP.
    pub fn interpret_block(&mut self) -> R<()> {
        self.find_and_run(MAX_OPS)
    }

    /// Interprets a block that was found for RIP.
    pub fn run_block(&mut self, block: *const Block) -> R<()> {
        // SAFETY: as in `run_ops`.
        let heat = unsafe { &(*block).heat };
        heat.store(heat.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        self.run_ops(block, MAX_OPS)
    }

    #[inline(always)]
    fn run_ops(&mut self, block: *const Block, limit: usize) -> R<()> {
        self.stop_block = false;
        // SAFETY: blocks are only dropped between calls of this function (see BlockCache), so the reference outlives the
        // loop although handlers have the whole Cpu.
        let ops = unsafe { &(&*block).ops };
        let mut executed = 0;
        for op in ops.iter().take(limit) {
            self.next_ip = self.user.rip.wrapping_add(u64::from(op.len));
            match (op.run)(self, op) {
                Ok(Flow::Next) => {
                    self.user.rip = self.next_ip;
                    executed += 1;
                    if self.stop_block {
                        break;
                    }
                }
                Ok(Flow::End) => {
                    self.user.rip = self.next_ip;
                    executed += 1;
                    break;
                }
                Err(raised) => {
                    self.fault_segment = op.segment;
                    self.counters.instructions += executed;
                    return Err(raised);
                }
            }
        }
        self.counters.instructions += executed;
        Ok(())
    }

    /// What besides the address decides how code is fetched and decoded.
    fn fetch_context(&self) -> u8 {
        self.code_bits >> 5 | if self.cpl == 3 { 4 } else { 0 }
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
        let privilege = if self.cpl == 3 { Privilege::User } else { Privilege::Supervisor };
        let host = match self.translate(privilege, linear, Access::Execute)? {
            Place::Host(host) => host,
            Place::Io(_) => return self.fetch_outside_cache(privilege, linear),
        };
        let map = self.map.clone();
        let Some((slot, gpa)) = map.find_host(host) else {
            return self.fetch_outside_cache(privilege, linear);
        };
        if let Some(block) = self.blocks.find_physical(gpa, self.code_bits) {
            let block = block.clone();
            if block.is_current() || self.revalidate(&block, slot) {
                self.blocks.remember(linear, context, Arc::as_ptr(&block));
                return Ok(Arc::as_ptr(&block));
            }
        }
        let in_page = (PAGE_SIZE - (gpa & PAGE_MASK)) as usize;
        let mut window = [0u8; WINDOW];
        let window = &mut window[..in_page.min(WINDOW)];
        let generation = self.read_code(slot, gpa, window);
        let decoded = match self.decode(window, MAX_OPS) {
            Ok(decoded) => decoded,
            Err(_) => return self.fetch_outside_cache(privilege, linear),
        };
        if self.blocks.is_full() {
            self.blocks.clear();
        }
        let block = Block {
            bytes: window[..decoded.len].into(),
            ops: decoded.ops.into(),
            instructions: decoded.instructions,
            thunks: decoded.thunks,
            gpa,
            host,
            cell: slot.generation(gpa),
            generation: AtomicU32::new(generation),
            heat: AtomicU32::new(0),
        };
        self.counters.blocks_decoded += 1;
        let block = self.blocks.insert(self.code_bits, block);
        self.blocks.remember(linear, context, block);
        Ok(block)
    }

    /// Decodes; makes room for native code if there is none left.
    fn decode(&mut self, bytes: &[u8], max: usize) -> Result<Decoded, DecodeError> {
        let (bits, ip) = (self.code_bits, self.user.rip);
        match decode(bytes, bits, ip, max, &mut self.thunks) {
            Err(DecodeError::Full) => {
                self.blocks.clear();
                self.clear_translations();
                self.scratch = None;
                // SAFETY: every block, and with them every thunk, was just dropped.
                unsafe { self.thunks.clear() };
                decode(bytes, bits, ip, max, &mut self.thunks)
            }
            other => other,
        }
    }

    /// Copies code and returns the generation of its page that the copy belongs to. From then on the page is watched.
    fn read_code(&mut self, slot: &RamSlot, gpa: u64, bytes: &mut [u8]) -> u32 {
        let (tracker, page) = (slot.tracker(), slot.page(gpa));
        let host = slot.host(gpa);
        loop {
            if tracker.mark_code(page) {
                for vcpu in self.shared.vcpus.iter() {
                    vcpu.area.tlb().drop_writes_to(host as u64 & !PAGE_MASK);
                }
            }
            let generation = tracker.generation(page);
            // SAFETY: the bytes lie in one page of the slot. Another vCPU may be writing them; then the generation changes.
            unsafe { std::ptr::copy_nonoverlapping(host, bytes.as_mut_ptr(), bytes.len()) };
            if tracker.flags(page) & CODE != 0 && tracker.generation(page) == generation {
                return generation;
            }
        }
    }

    /// The page was written: is the block's code still the same?
    fn revalidate(&mut self, block: &Block, slot: &RamSlot) -> bool {
        let mut now = [0u8; WINDOW];
        let now = &mut now[..block.bytes.len()];
        let generation = self.read_code(slot, block.gpa, now);
        if *now != *block.bytes {
            return false;
        }
        block.set_generation(generation);
        true
    }

    /// One instruction that spans pages or does not lie in RAM. It is decoded afresh each time.
    fn fetch_outside_cache(&mut self, privilege: Privilege, linear: u64) -> R<*const Block> {
        let mut bytes = [0u8; MAX_INSTRUCTION];
        let in_page = ((PAGE_SIZE - (linear & PAGE_MASK)) as usize).min(MAX_INSTRUCTION);
        let (head, tail) = bytes.split_at_mut(in_page);
        let place = self.translate(privilege, linear, Access::Execute)?;
        self.load_from(place, head);
        let mut result = self.decode(head, 1);
        if result.is_err() && !tail.is_empty() {
            let next = self.wrap_linear(linear.wrapping_add(in_page as u64));
            let place = self.translate(privilege, next, Access::Execute)?;
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
            gpa: NO_ADDRESS,
            host: std::ptr::null(),
            cell: &ALWAYS,
            generation: AtomicU32::new(ALWAYS.load(Ordering::Relaxed)),
            heat: AtomicU32::new(0),
        }));
        Ok(std::ptr::from_ref(block.as_ref()))
    }
}
