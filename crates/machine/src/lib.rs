//! Puts a virtual machine together from its configuration and runs it to its end.
//!
//! [`run`] is the whole life of one machine: it claims the name ([`control::Runtime`]), opens the consoles, chooses an
//! engine ([`engines`]), allocates memory, builds the board ([`Board`] and the devices on it), loads the guest, starts
//! the vCPUs and waits for the [`Ending`]. `docs/architecture.md` follows it step by step.
//!
//! A machine lives once: a guest's reboot is an [`Ending`] like any other, and whoever wants the guest to go on runs a
//! new one, as with bhyve.

mod assembly;
mod board;
pub mod clock;
mod control_handler;
mod cpu;
mod disks;
pub mod engines;
mod error;
mod firmware;
mod hash;
pub mod lifecycle;
mod memory;
mod run;
mod signals;
mod vcpu;

pub use board::Board;
pub use engines::engines;
pub use error::MachineError;
pub use lifecycle::{Ending, Lifecycle};
pub use run::{Environment, run};
