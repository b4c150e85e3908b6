//! The x86-64 architecture as data: register files, flag and MSR names, exceptions, CPUID models and
//! page-table formats. Nothing here performs I/O or depends on another crate of the workspace, so every
//! layer (engines, loaders, debugger, tools) can share one vocabulary.
//!
//! Sources: Intel 64 and IA-32 Architectures Software Developer's Manual (SDM) and AMD64 Architecture
//! Programmer's Manual (APM); each module names the chapter it follows.
#![forbid(unsafe_code)]

pub mod bits;
pub mod cpuid;
pub mod exception;
pub mod msr;
pub mod paging;
pub mod regs;
pub mod xsave;

pub use exception::{Exception, Vector};
pub use regs::{ControlRegisters, DebugRegisters, DescriptorTable, Gpr, Registers, Segment};
