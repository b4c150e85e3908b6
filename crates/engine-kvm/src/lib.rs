//! The KVM engine: guests run on the processor's own virtualization, with the interrupt chips in the kernel.
//!
//! Follows the Linux kernel's `Documentation/virt/kvm/api.rst` (cited as api.rst). The parts:
//!
//! - [`KvmEngine`]: opening `/dev/kvm`, what it offers, and (`probe`) whether it is worth taking;
//! - `vm`: memory slots, interrupt lines, messages, event descriptors; `routing`: where interrupts lead;
//! - `vcpu`: the run loop; `kick`: stopping it; `halt`: noticing that the machine has halted for good;
//! - `state`, `msrs`, `xsave`, `chips`: state between KVM's structures and the engine-neutral ones;
//! - `stats`: counters; `sys`: what `kvm-ioctls` lacks.

mod chips;
mod cpuid;
mod error;
mod halt;
mod kick;
mod msrs;
mod probe;
mod routing;
mod state;
mod stats;
mod sys;
mod vcpu;
mod vm;
mod xsave;

use std::sync::Arc;

use engine::{Engine, EngineError, EngineKind, Fitness, Result, Vm, VmConfig};
use kvm_ioctls::Kvm;
use x86::cpuid::CpuidTable;

/// Linux KVM as an [`Engine`].
///
/// The value holds nothing: `/dev/kvm` is opened by the calls that need it, so that an engine can be listed and
/// probed where it does not exist.
#[derive(Clone, Copy, Debug, Default)]
pub struct KvmEngine;

impl KvmEngine {
    /// The engine.
    pub fn new() -> Self {
        KvmEngine
    }

    fn open(self) -> Result<Kvm> {
        probe::open().map_err(EngineError::Unsupported)
    }
}

impl Engine for KvmEngine {
    fn kind(&self) -> EngineKind {
        EngineKind::Kvm
    }

    fn probe(&self) -> Fitness {
        match probe::probe(self) {
            Ok(()) => Fitness::Fit,
            Err(why) => Fitness::Unfit(why),
        }
    }

    fn supported_cpuid(&self) -> Result<CpuidTable> {
        cpuid::supported(&self.open()?)
    }

    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn Vm>> {
        if let Some((name, _)) = config.options.first() {
            return Err(EngineError::Unsupported(format!(
                "variable kvm.{name} is not known: the KVM engine has no settings of its own"
            )));
        }
        Ok(Arc::new(vm::KvmVm::new(&self.open()?, config)?))
    }
}
