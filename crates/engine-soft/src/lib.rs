//! The software CPU: runs x86-64 guests on x86-64 hosts without hardware virtualization.
//!
//! - [`cpu`]: one processor's registers and the decisions that follow from them; [`user`]: the part that user-mode
//!   instructions see, laid out for generated code.
//! - [`mmu`], [`tlb`], [`memory`]: linear and physical addresses.
//! - [`interp`]: decoding and the handlers of ordinary instructions; [`native`]: instructions that the host executes.
//! - [`translate`]: host code for blocks that run often; [`area`]: the memory that it addresses.
//! - [`system`]: segments, interrupts, far transfers, tasks, control registers; [`msr`].
//! - [`chips`]: LAPICs, IOAPIC, 8259s, 8254.
//! - [`vcpu`], [`vm`], [`shared`]: threads, run loop, and the engine border.

pub mod area;
pub mod chips;
pub mod cpu;
pub mod cpuid;
pub mod interp;
pub mod memory;
pub mod mmu;
pub mod msr;
pub mod native;
pub mod shared;
pub mod system;
pub mod tlb;
pub mod translate;
pub mod user;
pub mod vcpu;
pub mod vm;

use std::sync::Arc;

use engine::{Engine, EngineKind, Fitness, Result, Vm, VmConfig};
use x86::cpuid::CpuidTable;

/// The software engine.
#[derive(Clone, Copy, Debug, Default)]
pub struct SoftEngine;

impl SoftEngine {
    /// The engine.
    pub fn new() -> Self {
        SoftEngine
    }
}

impl Engine for SoftEngine {
    fn kind(&self) -> EngineKind {
        EngineKind::Soft
    }

    fn probe(&self) -> Fitness {
        Fitness::Fit
    }

    fn supported_cpuid(&self) -> Result<CpuidTable> {
        Ok(cpuid::supported_cpuid())
    }

    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn Vm>> {
        Ok(Arc::new(vm::SoftVm::new(config)?))
    }
}
