//! Where running machines are found, and how they are spoken to.
//!
//! Every VM has a [`runtime`] directory named after it, with a lock that dies with its process, and in it a Unix
//! socket that speaks the [`protocol`] (documented for scripts in `docs/control-protocol.md`). The process of the VM
//! runs the [`server`]; `bhyvectl`, the manager and tests use the [`client`].

pub mod actions;
pub mod client;
pub mod protocol;
pub mod runtime;
pub mod server;
mod sys;

pub use actions::ActionError;
pub use client::{Client, ClientError};
pub use protocol::{Command, ErrorCode, Failure, Hello, MachineState, Stats, Status, VcpuStats};
pub use runtime::{Runtime, RuntimeError, VmDirectory, VmEntry};
pub use server::{Handler, Server};
