//! Running blocks, and what comes between them.

use std::sync::atomic::Ordering;

use x86::bits::{dr6, rflags};
use x86::{Exception, Vector};

use crate::cpu::{Cpu, R};
use crate::interp::block::{Block, MAX_OPS};
use crate::interp::op::Flow;
use crate::system::interrupt::TripleFault;

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
            Some(variant) if limit > 1 && self.check.is_some() => self.run_checked(variant),
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
                let exception = self.raised_exception();
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
        self.find_and_run(1).map_err(|_| self.raised_exception())
    }

    /// The exception that was just raised, with #SS in place of #GP where the stack was accessed.
    pub fn raised_exception(&self) -> Exception {
        if self.fault_noncanonical && self.faulting_through_stack() {
            return Exception::with_code(Vector::StackFault, 0);
        }
        self.fault
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
    pub(crate) fn run_block(&mut self, block: *const Block) -> R<()> {
        // SAFETY: as in `run_ops`.
        let heat = unsafe { &(*block).heat };
        heat.store(heat.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        self.run_ops(block, MAX_OPS)
    }

    /// Interprets the first instruction of a block that was found for RIP.
    pub(crate) fn run_first(&mut self, block: *const Block) -> R<()> {
        self.run_ops(block, 1)
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
}
